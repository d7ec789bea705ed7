"""Loggers beside the step: bounded, never slowing it, and counting what they could not write.

from aengine.loggers import track
from aengine.loggers.jsonl import JSONLines

track(trainer, JSONLines("log.jsonl"), Events.ITERATION_COMPLETED(every=10) | Events.EPOCH_COMPLETED)

One module for each place to write to; `sink` says what a sink of your own needs.
"""

from aengine.loggers.sink import Closable, Durable, Record, Rewindable, Sink, Witness, Write
from aengine.loggers.tracker import Tracker, TrackerStatistics, track

__all__ = [
    "Closable", "Durable", "Record", "Rewindable", "Sink", "Tracker", "TrackerStatistics", "Witness", "Write", "track",
]  # fmt: skip

"""Loggers beside the step: bounded, never slowing it, and counting what they could not write.

from aengine.loggers import track
from aengine.loggers.jsonl import JSONLines

track(trainer, JSONLines("log.jsonl"), Events.ITERATION_COMPLETED(every=10) | Events.EPOCH_COMPLETED)

One module for each place to write to; `sink` says what a sink of your own needs.
"""

from typing import TYPE_CHECKING

from aengine.lazy import lazy_names

if TYPE_CHECKING:
    from aengine.loggers.jsonl import JSONLines
    from aengine.loggers.mlflow import MLflow
    from aengine.loggers.opentelemetry import Instrumentation, OpenTelemetry, instrument
    from aengine.loggers.scalars import numbers_of
    from aengine.loggers.sink import Closable, Durable, Record, Rewindable, Sink, Witness, Write
    from aengine.loggers.tensorboard import TensorBoard
    from aengine.loggers.tracker import Tracker, TrackerStatistics, track
    from aengine.loggers.wandb import WandB
else:  # out of sight of type checkers, which would take any name for one of this module's
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "jsonl": "JSONLines",
            "mlflow": "MLflow",
            "opentelemetry": "Instrumentation OpenTelemetry instrument",
            "scalars": "numbers_of",
            "sink": "Closable Durable Record Rewindable Sink Witness Write",
            "tensorboard": "TensorBoard",
            "tracker": "Tracker TrackerStatistics track",
            "wandb": "WandB",
        },
    )

__all__ = [
    "Closable",
    "Durable",
    "Instrumentation",
    "JSONLines",
    "MLflow",
    "OpenTelemetry",
    "Record",
    "Rewindable",
    "Sink",
    "TensorBoard",
    "Tracker",
    "TrackerStatistics",
    "WandB",
    "Witness",
    "Write",
    "instrument",
    "numbers_of",
    "track",
]

# The house, from the ground up: a module imports from those before it, never from those after.
#   errors       the exception tree              host         where a source lives while a run lasts
#   state        what the loop knows             source       any data, as the next batch
#   events       names, filters, Event           progress     what is completed, limits, resuming
#   statistics   where the time went             attending    the half of the loop about events and requests
#   worker       threads, and the way back       loop         the loop itself: a generator that does no I/O
#   binding      users' functions, at the door   driver       advances the loop; owns its tasks and its thread
#   inbox        one listener's queue            synchronous  advances the loop without an event loop
#   topic        one event and its listeners     iteration    a run for a `for` of one's own
#   emission     driving a dispatch              publishing   the half of the face that is about events
#   bus          topics, subscribers, streams    engine       Engine: the face
#   control      what is asked of the loop       handlers/    ready-made: limits, progress, profiling, pictures
#   consumers    the subscribers' tasks          checkpoint/  saving while training goes on, and resuming exactly
#   data         users' data, at the door        training/    supervised steps, metrics, schedules, range test
#   prefetch     batches pulled ahead            loggers/     numbers of a run, written beside the step
#                                                interop/     pytorch-ignite's metrics and handlers
"""The training-loop engine for async Python.

from aengine import Engine, Events

trainer = Engine(train_step)
await trainer.run(loader, max_epochs=10)
"""

from aengine.engine import Engine
from aengine.errors import (
    AengineError,
    CheckpointDamaged,
    CheckpointError,
    CheckpointLocked,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointNotWritten,
    CheckpointWarning,
    DataExhausted,
    DataExhaustedWarning,
    EngineBusy,
    HandlerTimeout,
    InboxOverflow,
    NotSerializable,
    StrayCancellation,
)
from aengine.events import Event, EventEnum, Events, EventsList
from aengine.handlers.signals import stop_on_signals
from aengine.inbox import Overflow
from aengine.publishing import RemovableEventHandle
from aengine.state import State, StopReason
from aengine.statistics import EngineStatistics

__version__ = "0.1.0"

__all__ = [
    "AengineError",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointLocked",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "CheckpointNotWritten",
    "CheckpointWarning",
    "DataExhausted",
    "DataExhaustedWarning",
    "Engine",
    "EngineBusy",
    "EngineStatistics",
    "Event",
    "EventEnum",
    "Events",
    "EventsList",
    "HandlerTimeout",
    "InboxOverflow",
    "NotSerializable",
    "Overflow",
    "RemovableEventHandle",
    "State",
    "StopReason",
    "StrayCancellation",
    "stop_on_signals",
]

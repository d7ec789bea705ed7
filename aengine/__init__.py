# The rooms, from the ground up: a room imports from those before it, never from those after.
#   errors       the exception tree                 engine       Engine: run, stop, resume, save
#   state        what the loop knows                checkpoint/  saving while training goes on, and resuming exactly
#   events       names, filters, the Event record     capture/     every part's state at one instant, copied
#   statistics   where the time went                  formats/     how it becomes files, and state again
#   arguments    users' values, checked               store/       the directory: commits, locks, retention
#   callables    users' functions, checked, bound     cli/         python -m aengine checkpoints
#   threads/     crossing threads                   handlers/    ready-made: limits, progress, profiling, pictures
#   bus/         who listens                        signals      stop_on_signals
#   data/        any data as the next batch         training/    supervised steps, metrics, schedules, range test
#   loop/        the loop: a generator, no I/O      loggers/     numbers of a run, written beside the step
#   drivers/     who advances the loop              interop/     pytorch-ignite's metrics and handlers
"""The training-loop engine for async Python.

from aengine import Engine, Events

trainer = Engine(train_step)
await trainer.run(loader, max_epochs=10)
"""

from aengine.bus.emitter import RemovableEventHandle
from aengine.bus.inbox import Overflow
from aengine.drivers.services import Service
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
from aengine.signals import stop_on_signals
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
    "Service",
    "State",
    "StopReason",
    "StrayCancellation",
    "stop_on_signals",
]

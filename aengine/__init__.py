# The packages, from the lowest layer up: each imports from those before it, never from those after.
#   guesses      what a wrong word was meant to be  loop/        the loop: a generator, no I/O
#   arguments    users' values, checked             drivers/     advancing the loop; its tasks
#   callables    users' functions, checked, bound   engine       Engine: run, stop, resume, save
#   extras       optional packages that are missing attachment   what an object has added to its engine
#   command_line what all commands share            checkpoint/  saving during training, and resuming exactly
#   keywords     wrong keywords, answered             capture/     every part's state at one instant, copied
#   lazy         names that packages hand on          formats/     how it becomes files, and state again
#   type_variables  what the generic classes take     store/       the directory: commits, locks, retention
#   errors       the exception tree                   cli/         aengine checkpoints
#   state        what the loop knows                handlers/    ready-made: limits, guards, progress, profiling
#   events       names, filters, the Event record   signals      stop_on_signals
#   statistics   where the time went                plots/       pictures of a run
#   threads/     crossing threads                   training/    supervised steps, metrics, schedules, range test
#   bus/         listeners: inline, subscribers     loggers/     numbers of a run, written concurrently
#   data/        any data as the next batch         interop/     pytorch-ignite's metrics and handlers
"""The training-loop engine for async Python.

from aengine import Engine, Events

trainer = Engine(train_step)
await trainer.run(loader, max_epochs=10)
"""

from typing import TYPE_CHECKING

from aengine.lazy import lazy_names

if TYPE_CHECKING:
    # `import aengine` is enough for `aengine.handlers.EarlyStopping`.
    from aengine import (
        checkpoint as checkpoint,
        handlers as handlers,
        loggers as loggers,
        plots as plots,
        training as training,
    )
    from aengine.bus.emitter import RemovableEventHandle
    from aengine.bus.stream import Stream
    from aengine.checkpoint import Checkpoint, Keep
    from aengine.data.adapt import Data
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
        DataOrderWarning,
        EngineBusy,
        HandlerTimeout,
        InboxOverflow,
        NotSerializable,
        StrayCancellation,
    )
    from aengine.events import Event, EventEnum, EventLike, Events, EventsList, FilteredEvent
    from aengine.signals import stop_on_signals
    from aengine.state import ErrorInfo, State, Stateful, StopReason
    from aengine.statistics import EngineStatistics, ListenerInfo, ListenerStatistics, ServiceStatistics
else:  # out of sight of type checkers, which would take any name for one of this module's
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "bus.emitter": "RemovableEventHandle",
            "bus.stream": "Stream",
            "checkpoint": "Checkpoint Keep",
            "data.adapt": "Data",
            "drivers.services": "Service",
            "engine": "Engine",
            "errors": "AengineError CheckpointDamaged CheckpointError CheckpointLocked CheckpointMismatch"
            " CheckpointNotFound CheckpointNotWritten CheckpointWarning DataExhausted DataExhaustedWarning"
            " DataOrderWarning EngineBusy HandlerTimeout InboxOverflow NotSerializable StrayCancellation",
            "events": "Event EventEnum EventLike Events EventsList FilteredEvent",
            "signals": "stop_on_signals",
            "state": "ErrorInfo State Stateful StopReason",
            "statistics": "EngineStatistics ListenerInfo ListenerStatistics ServiceStatistics",
        },
    )

__version__ = "0.1.0"

__all__ = [
    "AengineError",
    "Checkpoint",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointLocked",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "CheckpointNotWritten",
    "CheckpointWarning",
    "Data",
    "DataExhausted",
    "DataExhaustedWarning",
    "DataOrderWarning",
    "Engine",
    "EngineBusy",
    "EngineStatistics",
    "ErrorInfo",
    "Event",
    "EventEnum",
    "EventLike",
    "Events",
    "EventsList",
    "FilteredEvent",
    "HandlerTimeout",
    "InboxOverflow",
    "Keep",
    "ListenerInfo",
    "ListenerStatistics",
    "NotSerializable",
    "RemovableEventHandle",
    "Service",
    "ServiceStatistics",
    "State",
    "Stateful",
    "StopReason",
    "StrayCancellation",
    "Stream",
    "stop_on_signals",
]

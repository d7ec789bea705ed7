# The house, from the ground up; a module imports from those before it, never from those after:
#   errors      the exception tree               progress     what is completed, limits, resuming
#   state       what the loop knows              loop         the loop itself: a generator that does no I/O
#   events      names, filters, Event            driver       advances the loop, owns tasks and the worker
#   statistics  where the time went              synchronous  advances the loop without an event loop
#   worker      threads, and the way back        iteration    a run for a `for` of one's own
#   inbox       one listener's queue, policies   engine       Engine: the face
#   topic       one event and its listeners      handlers/    ready-made: signals
#   bus         topics, subscribers, streams
#   control     what is asked of the loop
#   prefetch, host, source   any data, as the next batch
"""The training-loop engine for async Python.

    from aengine import Engine, Events

    trainer = Engine(train_step)
    await trainer.run(loader, max_epochs=10)
"""

from aengine.engine import Engine, RemovableEventHandle
from aengine.errors import (
    AengineError,
    DataExhausted,
    DataExhaustedWarning,
    EngineBusy,
    HandlerTimeout,
    InboxOverflow,
)
from aengine.events import Event, EventEnum, Events, EventsList
from aengine.handlers.signals import stop_on_signals
from aengine.inbox import Overflow
from aengine.state import State, StopReason
from aengine.statistics import EngineStatistics

__version__ = "0.1.0"

__all__ = [
    "AengineError",
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
    "Overflow",
    "RemovableEventHandle",
    "State",
    "StopReason",
    "stop_on_signals",
]

"""Events: those at which a save is special, and those that a Checkpoint fires."""

from typing import Any, TypeAlias

from aengine.engine import Engine
from aengine.events import EventEnum

AnyEngine: TypeAlias = Engine[Any, Any]

FINAL_EVENTS = frozenset({"TERMINATE", "INTERRUPT", "COMPLETED", "CANCELLED", "EXCEPTION_RAISED"})
"""Events after which there may be no other: a save that is due here is never skipped."""

FAILURE_EVENTS = frozenset({"CANCELLED", "EXCEPTION_RAISED"})
"""Events that can come in the middle of a step: no save here replaces one of the step before."""

DEFERRED_EVENTS = frozenset(
    {
        "GET_BATCH_STARTED",
        "GET_BATCH_COMPLETED",
        "ITERATION_STARTED",
        "DATALOADER_STOP_ITERATION",
        "TERMINATE_SINGLE_EPOCH",
    }
)
"""Between-step events at which a save is put off until the next completed step: random numbers may have been drawn, or
data been read to its end, which a resumed run would draw, or read, once more."""


class CheckpointEvents(EventEnum):
    """What a Checkpoint fires on its engine, beside the step. Subscribe to them."""

    CHECKPOINT_REQUESTED = "checkpoint_requested"
    CHECKPOINT_STAGED = "checkpoint_staged"
    CHECKPOINT_COMMITTED = "checkpoint_committed"
    CHECKPOINT_DAMAGED = "checkpoint_damaged"


REQUESTED = CheckpointEvents.CHECKPOINT_REQUESTED.name


def is_in_step(engine: AnyEngine) -> bool:
    """Say whether a step has begun that has not completed: its changes are in the state, and its number is not."""
    return bool(engine.state.iteration != engine.state_dict()["iteration"])

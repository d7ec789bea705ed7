"""Occasions: the events at which checkpoints are taken, and those that they fire."""

from typing import Any

from aengine.engine import Engine
from aengine.events import EventEnum

LAST_WORDS = frozenset({"TERMINATE", "INTERRUPT", "COMPLETED", "CANCELLED", "EXCEPTION_RAISED"})
"""Events after which there may be no other: what is due there is never skipped."""

ACCIDENTS = frozenset({"CANCELLED", "EXCEPTION_RAISED"})
"""Events that can come in the middle of a step: what was saved of the step before is not replaced then."""

WITHIN = frozenset(
    {
        "GET_BATCH_STARTED",
        "GET_BATCH_COMPLETED",
        "ITERATION_STARTED",
        "DATALOADER_STOP_ITERATION",
        "TERMINATE_SINGLE_EPOCH",
    }
)
"""Events at which something was drawn or ended since the last step that would not come again: saved is after them."""


class CheckpointEvents(EventEnum):
    """What a Checkpoint fires on its engine, beside the step. Subscribe to them."""

    CHECKPOINT_REQUESTED = "checkpoint_requested"
    CHECKPOINT_STAGED = "checkpoint_staged"
    CHECKPOINT_COMMITTED = "checkpoint_committed"
    CHECKPOINT_DAMAGED = "checkpoint_damaged"


REQUESTED = CheckpointEvents.CHECKPOINT_REQUESTED.name


def is_in_a_step(engine: Engine[Any, Any]) -> bool:
    """Say whether a step was begun that did not complete: the state is that of no step then."""
    return bool(engine.state.iteration != engine.state_dict()["iteration"])

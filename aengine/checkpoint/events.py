"""Events: those at which a save is special, and those that a Checkpoint fires."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from aengine.checkpoint.store.manifest import CheckpointInfo
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
    """What a Checkpoint fires on its engine, beside the step. Subscribe to them.

    Attributes:
        CHECKPOINT_STAGED: a snapshot was copied, and is being written. The payload is its step.
        CHECKPOINT_COMMITTED: a checkpoint is on the disk. The payload is a `CheckpointCommitted`.
        CHECKPOINT_DAMAGED: one was found damaged. The payload has its `path`, where it is now, and says `why`.
    """

    CHECKPOINT_STAGED = "checkpoint_staged"
    CHECKPOINT_COMMITTED = "checkpoint_committed"
    CHECKPOINT_DAMAGED = "checkpoint_damaged"


@dataclass(frozen=True, slots=True)
class CheckpointStatistics:
    """What became of the saves of one Checkpoint since it was made.

    Attributes:
        saved: those that were committed.
        skipped: those that were due while another was being written, and were skipped by `when_busy="skip"`.
        failures: those that failed, or were given up with the run.
        damaged: what `restore` and `load` found damaged: where it is now.
        is_saving: whether one is being written now.
    """

    saved: int
    skipped: int
    failures: int
    damaged: tuple[Path, ...]
    is_saving: bool


@dataclass(frozen=True, slots=True)
class CheckpointCommitted:
    """What CHECKPOINT_COMMITTED is about.

    Attributes:
        checkpoint: the one that was committed.
        position: where the data stands in it: what its own `state_dict()` had returned; for data without one, the
            batches taken of the pass under way and the length of a pass, as {"batches": 40, "length": 100}. A copy:
            what it says is on the disk.
    """

    checkpoint: CheckpointInfo
    position: Any


REQUESTED = "CHECKPOINT_REQUESTED"
"""What a Checkpoint has the loop fire before the next step, for a save that was asked for. No event of users."""


def is_in_step(engine: AnyEngine) -> bool:
    """Say whether a step has begun that has not completed: its changes are in the state, and its number is not."""
    return bool(engine.state.iteration != engine.state_dict()["iteration"])

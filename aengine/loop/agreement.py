"""Agreement: what several processes that train together do at one and the same iteration.

Each has an engine and a loop of its own, and what is requested of one would be served there alone, while the others
wait for it in their next collective operation. So between the fetch of a batch and its step the loop calls an
`Agreement`. What is requested is a wish until then, and what comes back is served: the same, before the same step, by
all. Where there is no agreement the loop has nothing more to do for this, not so much as a test in an iteration that is
short.
"""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Wishes:
    """What one process wishes before a step; or what is agreed by all.

    Attributes:
        iteration: the one that is about to begin, from 1. Processes that train together are at the same.
        has_batch: whether there is a batch to step on. Where it is agreed that there is none, the pass over the data
            ends: for those that have a batch, too.
        terminate: `terminate()` was called.
        skip_completed: as that was called.
        terminate_epoch: `terminate_epoch()` was called.
        skip_epoch_completed: as that was called.
        interrupt: `interrupt()` was called.
        pause: `pause()` was called. What is agreed lasts until `resume()` is called here.
        calls: how many events `fire_event_soon()` was called for, a save of a Checkpoint among them. So many of those
            that wait are fired after the step. Where others have more to call, `agree()` may add to them.
        error: what this run fails with, or is cancelled by. These are the last wishes of this process: nothing is read
            of what comes back.
    """

    iteration: int
    has_batch: bool = True
    terminate: bool = False
    skip_completed: bool = False
    terminate_epoch: bool = False
    skip_epoch_completed: bool = False
    interrupt: bool = False
    pause: bool = False
    calls: int = 0
    error: BaseException | None = None


class Agreement(Protocol):
    """Has several processes agree. `session_of(engine).agree_by(agreement)` gives an engine one, before a run."""

    def agree(self, wishes: Wishes, /) -> Wishes | Awaitable[Wishes]:
        """Return what all do, or an awaitable of it.

        Called where the step runs, for each iteration once; once more where there was no batch; and with `error`, as
        clean-up within the grace, where the run fails otherwise than by what this raises. What it raises fails the run.
        """
        ...

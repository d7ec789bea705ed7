"""Which checkpoint is meant: the newest to go on from, the best, or one that is asked for. Only this module decides it.

Synchronous, for a thread: disks are slow. Another one may give it up while it reads, and then nothing is changed.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from aengine.arguments import check_choice, check_whole
from aengine.callables import type_name
from aengine.checkpoint.store.files import Stopped
from aengine.checkpoint.store.manifest import CheckpointInfo, step_and_revision
from aengine.checkpoint.store.retention import ranked
from aengine.checkpoint.store.verify import Problem, problems, read, verify as _verify
from aengine.errors import CheckpointDamaged, CheckpointLocked, CheckpointNotFound, CheckpointNotWritten

if TYPE_CHECKING:
    from aengine.checkpoint.store.store import Store

Which: TypeAlias = Literal["latest", "best"] | int | Path
"""Which checkpoint is meant: the newest, the best, the one of a step, or the one at a path."""

_WORDS = {"latest": "the newest that is whole", "best": "by the metric of keep="}


def check_which(which: Any, store: "Store") -> None:
    """Raise what is wrong with asking for this one.

    A string is a word, never a path: so a slip of the pen is found, and not looked for on the disk.
    """
    if isinstance(which, str):
        if which.isdecimal():
            raise ValueError(f"which= is the number of a step, and not a text: write  {int(which)}")
        if which not in _WORDS and ("/" in which or "\\" in which or step_and_revision(which) is not None):
            raise ValueError(f"which= takes a path as a pathlib.Path, and not as a text: write  Path({which!r})")
        check_choice(which, "which=", _WORDS)
    elif isinstance(which, bool) or not isinstance(which, int | Path):
        raise TypeError(
            f'which= is "latest", "best", a step or a pathlib.Path, got {type_name(type(which))}: leave it out for the'
            " newest"
        )
    elif isinstance(which, int):
        check_whole(which, "which=", minimum=0, alternative='"latest", "best" or a pathlib.Path')
    if which == "best" and store.keep.metric is None:
        raise ValueError(
            'which checkpoint is the "best" is for keep= to say: make the Checkpoint with a metric, such as'
            ' keep=Keep(best=1, metric="accuracy", mode="max")'
        )


def newest_first(checkpoints: list[CheckpointInfo]) -> list[CheckpointInfo]:
    """Return them in the order in which they are tried; those from the middle of a step after all others."""
    return sorted(checkpoints, key=lambda info: (not info.is_mid_step, info.step, info.revision), reverse=True)


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that is whole, and what is in it."""

    info: CheckpointInfo
    tree: Mapping[str, Any]


class Finder:
    """Finds the checkpoint that is meant, and reads it.

    Args:
        store: where they are.
        read: returns what is in one that verifies.
        sets_aside: whether one that is found damaged is renamed, if no other process writes there.
        verify: raises CheckpointDamaged for one whose files are not whole; by default `verify.verify`.

    Attributes:
        problems: what was found damaged on the way: where it is now, and why. Set when all is read.
    """

    def __init__(
        self,
        store: "Store",
        read: Callable[[CheckpointInfo], Mapping[str, Any]],
        *,
        sets_aside: bool = True,
        verify: Callable[[CheckpointInfo], object] | None = None,
    ) -> None:
        self.problems: list[Problem] = []
        self._is_given_up = self._is_changing = False
        self._store = store
        self._read_contents = read
        self._sets_aside = sets_aside
        self._verify = verify or partial(_verify, is_stopped=lambda: self._is_given_up)
        self._passed: list[Problem] = []
        self._may_change: bool | None = None  # None until that was looked at
        self._deciding = threading.Lock()

    def lock(self) -> None:
        """Become the one writer, if there is something that may have to be set aside, and no other writes there.

        `find` does so, too. Before it, where that may be given up: a lock that is taken after that would stay.

        Raises:
            CheckpointNotWritten: the name of the directory is too long.
        """
        if self._may_change is None and self._store.exists():
            self._may_change = self._sets_aside and self._try_to_lock()

    def give_up(self) -> bool:
        """Have `find` end at its next look at this, having changed nothing. From another thread.

        Returns False if it is too late: all is read, what is damaged is being set aside, and `find` about to return.
        """
        with self._deciding:
            self._is_given_up = not self._is_changing
            return self._is_given_up

    def find(self, which: Which, *, required: bool = False) -> Found | None:
        """Read the one that is meant; None if that is the newest, there has never been any, and none is required.

        A step or a path is that one and no other, also one from the middle of a step. The newest is from the middle of
        a step only where there is no other, and the best never is. Of these, one that is damaged is passed over.

        Raises:
            CheckpointNotFound: there is none, and one is required; or none has a number by which it could be the best.
            CheckpointDamaged: the one that was asked for is not whole; of the newest and the best: none of them is.
            OSError: one that comes before all that are whole cannot be looked at. It may be whole itself.
            Stopped: it was given up.
        """
        if which == "best":
            return self._best()
        if isinstance(which, int):
            return self._read(self._store.find(which))
        if isinstance(which, Path):
            return self._read(read(which.absolute()))
        found = self._first_of(newest_first)
        if found is None and (causes := self._causes()):  # to begin anew in their place would lose them
            raise CheckpointDamaged(
                f"none of the checkpoints in {self._store.directory} is whole ({causes}). Repair one; or, to begin"
                " anew, remove them or choose another directory"
            )
        if found is None and required:
            raise CheckpointNotFound(f"there is no checkpoint in {self._store.directory}, and one is required")
        return found

    def _best(self) -> Found:
        found = self._first_of(partial(ranked, self._store.keep))
        if found is not None:
            return found
        there = f"in {self._store.directory} that has a number {self._store.keep.metric!r}, by which the best is chosen"
        if causes := self._causes():
            raise CheckpointDamaged(f"there is no checkpoint {there}, and is whole ({causes})")
        raise CheckpointNotFound(
            f"there is no checkpoint {there}: put it into engine.state.metrics before the checkpoint is taken"
        )

    def _first_of(self, order: Callable[[list[CheckpointInfo]], list[CheckpointInfo]]) -> Found | None:
        if not self._store.exists():
            return None
        self.lock()
        self._passed = []
        try:
            self._pass_over_unreadable()
            return self._first_whole(order)
        finally:
            self._set_aside_what_was_passed()

    def _first_whole(self, order: Callable[[list[CheckpointInfo]], list[CheckpointInfo]]) -> Found | None:
        while True:  # looked up anew each time: a writer may commit and remove some meanwhile
            passed = {problem.path for problem in self._passed}
            candidates = order([info for info in self._store.list() if info.path not in passed])
            if not candidates:
                return None
            info = candidates[0]
            try:
                return self._read(info)
            except CheckpointNotFound:  # its writer has just removed it, and committed another before that
                continue
            except CheckpointDamaged as error:
                if info.path.exists():
                    self._passed.append(Problem(info.path, str(error)))

    def _causes(self) -> str:
        """Return what is wrong with those that are there and not whole, "" if there are none."""
        seen = {problem.path: problem for problem in [*self.problems, *problems(self._store.directory)]}
        return "; ".join(f"{problem.path.name}: {problem.why}" for problem in seen.values())

    def _read(self, info: CheckpointInfo) -> Found:
        self._verify(info)
        self._go_on()
        return Found(info, self._read_contents(info))

    def _pass_over_unreadable(self) -> None:
        for problem in problems(self._store.directory):
            if problem.path.name.startswith("step-"):
                try:
                    read(problem.path)  # again: an OSError says nothing of what it holds, and is raised
                except (CheckpointDamaged, CheckpointNotFound) as error:
                    self._passed.append(Problem(problem.path, str(error)))

    def _set_aside_what_was_passed(self) -> None:
        with self._deciding:
            self._go_on()
            self._is_changing = True
        for path, why in ((problem.path, problem.why) for problem in self._passed):
            self.problems.append(Problem(self._store.set_aside(path, why) if self._may_change else path, why))
        self._is_changing = False

    def _go_on(self) -> None:
        if self._is_given_up:
            raise Stopped("the reading was given up")

    def _try_to_lock(self) -> bool:
        """Say whether damaged ones can be renamed: not in what another writes, nor in what is read-only."""
        try:
            self._store.lock()
        except (CheckpointLocked, CheckpointNotWritten):
            return False
        return True

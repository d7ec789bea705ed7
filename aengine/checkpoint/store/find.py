"""Resuming: finding the checkpoint that is meant, and reading it. Synchronous, for a thread: disks are slow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.checkpoint.store.store import Problem, Store
from aengine.checkpoint.store.verify import preference
from aengine.errors import (
    CheckpointDamaged,
    CheckpointLocked,
    CheckpointNotFound,
    CheckpointNotWritten,
)

Which: TypeAlias = int | str | PathLike[str] | None
"""Which checkpoint is meant: a step, a path, "best", the newest (None), or the newest, which must be there ("must")."""


def check_which(which: Any, store: Store) -> None:
    """Raise what is wrong with asking for this one."""
    if not isinstance(which, int | str | PathLike | None) or isinstance(which, bool):
        raise TypeError(f'which= is a step, a path, "best", "must" or None, got {type(which).__qualname__}')
    if which == "best" and store.keep.metric is None:
        raise ValueError(
            'which checkpoint is the "best" is for keep= to say: make the Checkpoint with a metric, such as'
            ' keep=Keep(best=1, metric="accuracy", mode="max")'
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that is whole, and what is in it."""

    info: CheckpointInfo
    tree: Mapping[str, Any]


class Reader:
    """Finds and reads the checkpoints of a store.

    Args:
        store: where they are.
        read: returns what is in one that verifies.
        sets_aside: whether one that is found damaged is renamed, if nobody else writes there.

    Attributes:
        problems: what was found damaged on the way: where it is now, and why.
    """

    def __init__(
        self, store: Store, read: Callable[[CheckpointInfo], Mapping[str, Any]], *, sets_aside: bool = True
    ) -> None:
        self.problems: list[Problem] = []
        self._store = store
        self._read_contents = read
        self._sets_aside = sets_aside

    def find(self, which: Which) -> Found | None:
        """Read the one that is meant; None if that is the newest, and there has never been any.

        Raises:
            CheckpointNotFound, CheckpointDamaged: as it is.
        """
        if which == "best":
            return self.best()
        if which is not None and which != "must":
            return self.read(which)
        found = self.newest()
        if found is None and which is not None:
            raise CheckpointNotFound(f"there is no checkpoint in {self._store.directory}, and one must be there")
        return found

    def read(self, which: int | str | PathLike[str]) -> Found:
        """Read the checkpoint of a step, or at a path: this one and no other.

        Raises:
            CheckpointNotFound, CheckpointDamaged: as it is.
        """
        return self._read(self._store.find(which) if isinstance(which, int) else self._store.open(which))

    def newest(self) -> Found | None:
        """Read the newest that is whole, setting aside those that are not; None if there has never been any.

        One that was taken in the middle of a step is read only if there is no other.

        Raises:
            CheckpointDamaged: there are some, and none is whole: nobody wants to begin anew for that.
        """
        found = self._first_of(lambda there_are: sorted(there_are, key=preference, reverse=True))
        if found is None and (said := self._said_of_problems()):
            raise CheckpointDamaged(
                f"none of the checkpoints in {self._store.directory} is whole ({said}). Repair one; or, to begin anew,"
                " remove them or choose another directory"
            )
        return found

    def best(self) -> Found:
        """Read the best that is whole, by the metric of the store's rule, setting aside better ones that are not.

        Raises:
            CheckpointNotFound: none has a number of this name.
            CheckpointDamaged: of those that have, none is whole.
        """
        found = self._first_of(self._store.keep.ranked)
        if found is not None:
            return found
        there = f"in {self._store.directory} that has a number {self._store.keep.metric!r}, by which the best is chosen"
        if said := self._said_of_problems():
            raise CheckpointDamaged(f"there is no checkpoint {there}, and is whole ({said})")
        raise CheckpointNotFound(
            f"there is no checkpoint {there}: put it into engine.state.metrics before the checkpoint is taken"
        )

    def _first_of(self, order: Callable[[list[CheckpointInfo]], list[CheckpointInfo]]) -> Found | None:
        if not self._store.directory.exists():
            return None
        may_set_aside = self._sets_aside and self._may_set_aside()
        self._pass_over_unreadable(may_set_aside=may_set_aside)
        while True:
            there_are = self._store.list()
            passed = {problem.path for problem in self.problems}
            candidates = order([info for info in there_are if info.path not in passed])
            if not candidates:
                return None
            info = candidates[0]
            try:
                return self._read(info)
            except CheckpointNotFound:  # its writer has removed it meanwhile, and written another
                continue
            except CheckpointDamaged as error:
                if info.path.exists():
                    self._meet(info.path, str(error), may_set_aside=may_set_aside)

    def _said_of_problems(self) -> str:
        """Return what is wrong with those that are there and not whole, "" if there are none."""
        seen = {problem.path: problem for problem in [*self.problems, *self._store.problems()]}
        return "; ".join(f"{problem.path.name}: {problem.why}" for problem in seen.values())

    def _read(self, info: CheckpointInfo) -> Found:
        self._store.verify(info)
        return Found(info, self._read_contents(info))

    def _pass_over_unreadable(self, *, may_set_aside: bool) -> None:
        for problem in self._store.problems():
            if problem.path.name.startswith("step-"):
                try:
                    self._store.open(problem.path)  # again: an OSError says nothing of what it holds, and goes out
                except (CheckpointDamaged, CheckpointNotFound) as error:
                    self._meet(problem.path, str(error), may_set_aside=may_set_aside)

    def _meet(self, path: Path, why: str, *, may_set_aside: bool) -> None:
        self.problems.append(Problem(self._store.set_aside(path, why) if may_set_aside else path, why))

    def _may_set_aside(self) -> bool:
        """Say whether damaged ones can be renamed: not in what another writes, nor in what is read-only."""
        try:
            self._store.lock()
        except (CheckpointLocked, CheckpointNotWritten):
            return False
        return True

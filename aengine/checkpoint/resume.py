"""Resuming: finding the checkpoint to go on from, and reading it. Synchronous, for a thread: disks are slow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from aengine.checkpoint.manifest import CheckpointInfo
from aengine.checkpoint.reading import preference
from aengine.checkpoint.store import Problem, Store
from aengine.errors import (
    CheckpointDamaged,
    CheckpointLocked,
    CheckpointNotFound,
    CheckpointNotWritten,
)


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that is whole, and what is in it."""

    info: CheckpointInfo
    tree: Mapping[str, Any]


class Reader:
    """Finds and reads the checkpoints of a store.

    Attributes:
        problems: what was found damaged on the way: where it is now, and why.
    """

    def __init__(self, store: Store, read: Callable[[CheckpointInfo], Mapping[str, Any]]) -> None:
        self.problems: list[Problem] = []
        self._store = store
        self._read_contents = read

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
        if not self._store.directory.exists():
            return None
        may_set_aside = self._may_set_aside()
        self._pass_over_unreadable(may_set_aside=may_set_aside)
        while True:
            there_are = self._store.list()
            passed = {problem.path for problem in self.problems}
            candidates = [info for info in there_are if info.path not in passed]
            if not candidates:
                break
            info = max(candidates, key=preference)
            try:
                return self._read(info)
            except CheckpointNotFound:  # its writer has removed it meanwhile, and written another
                continue
            except CheckpointDamaged as error:
                if info.path.exists():
                    self._meet(info.path, str(error), may_set_aside=may_set_aside)
        bad = self._store.problems()
        if bad or self.problems:
            said = "; ".join(f"{problem.path.name}: {problem.why}" for problem in bad or self.problems)
            raise CheckpointDamaged(
                f"none of the checkpoints in {self._store.directory} is whole ({said}). Repair one; or, to begin anew,"
                " remove them or choose another directory"
            )
        return None

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

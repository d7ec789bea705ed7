"""Restoring: the half of a Checkpoint's face that is about what there is: listing it, going back to it, loading it."""

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from anyio.to_thread import run_sync as in_thread

from aengine.checkpoint.arguments import check_engine
from aengine.checkpoint.capture.parts import Choice, Parts, gather, scatter
from aengine.checkpoint.formats.contents import Contents
from aengine.checkpoint.occasions import CheckpointEvents
from aengine.checkpoint.save import Saving
from aengine.checkpoint.store.find import Finder, Found, Which, check_which
from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.checkpoint.store.store import Store
from aengine.checkpoint.writer import Writer
from aengine.engine import Engine
from aengine.errors import CheckpointWarning, EngineBusy

AnyEngine: TypeAlias = Engine[Any, Any]

_logger = logging.getLogger("aengine.checkpoint")


class Restoring(ABC):
    """What a Checkpoint does with those that are there.

    Attributes:
        damaged: what `restore` and `load` found damaged.
    """

    def __init__(self, parts: Parts, store: Store, contents: Contents) -> None:
        self.damaged: tuple[Path, ...] = ()
        self._parts = parts
        self._store = store
        self._contents = contents
        self._writer = Writer(parts, store, contents)
        self._engine: AnyEngine | None = None
        self._saving: Saving | None = None

    @property
    def directory(self) -> Path:
        """Where the checkpoints are."""
        return self._store.directory

    def list(self) -> list[CheckpointInfo]:
        """Return the committed checkpoints, oldest first. Not verified: see `restore`."""
        return self._store.list()

    def pin(self, step: int) -> None:
        """Have the checkpoint of a step stay, whatever `keep` says.

        Raises:
            CheckpointNotFound: there is none of this step.
        """
        self._store.pin(self._store.find(step))

    def unpin(self, step: int) -> None:
        """Let `keep` decide over it again."""
        self._store.unpin(self._store.find(step))

    # Restoring

    async def restore(self, engine: AnyEngine, which: Which = None, *, strict: bool = True) -> CheckpointInfo | None:
        """Put the engine and the state back to a checkpoint, before `run()`. Returns which, None if there is none yet.

        Files are read in a thread, and verified by their checksums. The state is loaded in the calling task.

        Args:
            engine: the one to go on, with its handlers attached.
            which: None for the newest that is whole; "must" for the same, which must then exist; "best" for the best
                that is whole, by the `metric` and `mode` of `keep`; a step; or a path. One that was asked for by step
                or path is taken, or it is an error. Of the newest and the best, a damaged one is set aside,
                CHECKPOINT_DAMAGED is fired and a warning given, and the next is tried. When a run goes on from another
                than the newest and then saves, later ones are set aside as abandoned, so that they are not gone on
                from.
            strict: whether the checkpoint must have just the parts and handlers that there are here.

        Raises:
            CheckpointNotFound: there is none, and there must be; or none has a number by which it could be the best.
            CheckpointDamaged: none of those that there are is whole: a run is not begun anew in their place.
            CheckpointMismatch: it has other keys or shapes than the state here. No other is tried then.
            EngineBusy: the engine runs.
            TypeError, ValueError: an argument is wrong; "best" was asked for, and `keep` has no metric; this Checkpoint
                serves another engine.

        Cancellable while it reads; nothing is changed then.
        """
        check_which(which, self._store)
        check_engine(engine, "restore(engine, which)")
        self._serve(engine)
        live = partial(gather, self._parts, engine)
        found = await self._find(which, Finder(self._store, partial(self._contents.read, live=live)), "restore")
        if found is None:
            return None
        info, is_newest = found.info, which is None or which == "must"
        scatter(found.tree, self._parts, engine, strict=strict)
        self._writer.go_on_from(info, is_newest=is_newest)
        _logger.info("restored step %d, epoch %d, from %s", info.step, info.epoch, info.path)
        return info

    async def load(self, which: Which = "must", *, only: Iterable[str] | None = None) -> CheckpointInfo:
        """Load the state of a checkpoint, or some parts of it, and nothing else. Returns which.

            await checkpoint.load("best", only=["model"])

        For the end of a training, or a program that has but the model. The engine, its data, its handlers and the
        random states stay as they are; so does everything on the disk, and no engine is needed. It reads and verifies
        as `restore` does. A damaged one is told of and passed over, and not set aside.

        Args:
            which: as for `restore`; the newest by default.
            only: the names of the parts that are loaded, as in `state`; all of them, which the checkpoint must then
                have and no other, by default.

        Raises:
            CheckpointNotFound: there is none, or none has a number by which it could be the best.
            CheckpointDamaged: it is not whole; of the newest and the best: none of them is.
            CheckpointMismatch: it has no such part, or one of other keys or shapes. No other is tried then.
            EngineBusy: the engine that this Checkpoint serves runs, and would go on with what is loaded.
            TypeError, ValueError: an argument is wrong, or `only` has a name that the state has not; "best" was asked
                for, and `keep` has no metric.

        Cancellable while it reads; nothing is changed then.
        """
        check_which(which, self._store)
        choice = Choice(self._parts, only)
        read = partial(self._contents.read, live=choice.gather, places=choice.places)
        found = await self._find(
            "must" if which is None else which, Finder(self._store, read, sets_aside=False), "load"
        )
        assert found is not None, "it must be there"  # noqa: S101
        choice.scatter(found.tree)
        _logger.info("loaded %s of step %d from %s", only or "the state", found.info.step, found.info.path)
        return found.info

    async def _find(self, which: Which, finder: Finder, caller: str) -> Found | None:
        self._refuse_running(caller)
        while (saving := self._under_way()) is not None:  # which may be the one
            await saving.wait()
        engine = self._engine
        try:
            found = await in_thread(finder.find, which)
        finally:
            for problem in finder.problems:
                self.damaged += (problem.path,)
                said = f"a checkpoint is damaged, and was not used ({problem.path}): {problem.why}"
                _logger.warning(said)
                warnings.warn(said, CheckpointWarning, stacklevel=3)
                if engine is not None:
                    await engine.emit(CheckpointEvents.CHECKPOINT_DAMAGED)
        self._refuse_running(caller)
        if found is not None and found.info.is_mid_step and (which is None or which == "must"):
            said = f"there is no checkpoint but of the middle of a step: the one after step {found.info.step} had begun"
            warnings.warn(
                f"{said}, and what it had changed is in it ({found.info.path})", CheckpointWarning, stacklevel=3
            )
        return found

    def _under_way(self) -> Saving | None:
        saving = self._saving
        return None if saving is None or saving.is_over else saving

    def _refuse_running(self, caller: str) -> None:
        engine = self._engine
        if engine is not None and engine.is_running:
            raise EngineBusy(f"engine {engine.name!r} is running: {caller}() comes before run(), or after it")

    @abstractmethod
    def _serve(self, engine: AnyEngine) -> None:
        """Have this engine be the one that is served."""

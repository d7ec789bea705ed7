"""Restoring: a checkpoint is found, read and loaded, with the engine or into the state alone."""

import logging
import warnings
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path

from anyio.to_thread import run_sync as in_thread

from aengine.checkpoint.capture.parts import Choice, Parts, capture, restore
from aengine.checkpoint.events import AnyEngine, CheckpointEvents
from aengine.checkpoint.formats.contents import Contents
from aengine.checkpoint.store.find import Finder, Found, Which
from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.checkpoint.store.store import Store
from aengine.errors import CheckpointWarning, EngineBusy

_logger = logging.getLogger("aengine.checkpoint")


class Restorer:
    """Puts an engine and a state back to what a checkpoint says. See `Checkpoint.restore` and `Checkpoint.load`.

    Attributes:
        damaged: what was found damaged: where it is now.
    """

    def __init__(
        self, parts: Parts, store: Store, contents: Contents, finish_saving: Callable[[], Awaitable[None]]
    ) -> None:
        self.damaged: tuple[Path, ...] = ()
        self._parts = parts
        self._store = store
        self._contents = contents
        self._finish_saving = finish_saving

    async def restore(self, engine: AnyEngine, which: Which, *, strict: bool) -> CheckpointInfo | None:
        """Put the engine and the state back. Returns to which checkpoint, None if there is none yet."""
        read = partial(self._contents.read, live=partial(capture, self._parts, engine))
        found = await self._find(which, Finder(self._store, read), engine, "restore")
        if found is None:
            return None
        restore(found.tree, self._parts, engine, strict=strict)
        info = found.info
        _logger.info("restored step %d, epoch %d, from %s", info.step, info.epoch, info.path)
        return info

    async def load(self, engine: AnyEngine | None, which: Which, only: Iterable[str] | None) -> CheckpointInfo:
        """Load the state, or parts of it. The engine, if one is served, must not run, and stays as it is."""
        choice = Choice(self._parts, only)
        read = partial(self._contents.read, live=choice.capture, places=choice.places)
        which = "must" if which is None else which
        found = await self._find(which, Finder(self._store, read, sets_aside=False), engine, "load")
        assert found is not None, "it must be there"  # noqa: S101
        choice.restore(found.tree)
        _logger.info("loaded %s of step %d from %s", only or "the state", found.info.step, found.info.path)
        return found.info

    async def _find(self, which: Which, finder: Finder, engine: AnyEngine | None, caller: str) -> Found | None:
        _refuse_running(engine, caller)
        await self._finish_saving()  # what is being written may be the one
        try:
            found = await in_thread(finder.find, which)
        finally:
            for problem in finder.problems:
                self.damaged += (problem.path,)
                _warn(f"a checkpoint is damaged, and was not used ({problem.path}): {problem.why}")
                if engine is not None:
                    await engine.emit(CheckpointEvents.CHECKPOINT_DAMAGED)
        _refuse_running(engine, caller)  # once more: a run may have begun while this was awaited
        if found is not None and found.info.is_mid_step and (which is None or which == "must"):
            step, path = found.info.step, found.info.path
            _warn(
                f"there is no checkpoint but of the middle of a step: the one after step {step} had begun, and what"
                f" that had changed is in it ({path})"
            )
        return found


def _warn(message: str) -> None:
    _logger.warning(message)
    warnings.warn(message, CheckpointWarning, stacklevel=5)  # at the call of the Checkpoint's method


def _refuse_running(engine: AnyEngine | None, caller: str) -> None:
    if engine is not None and engine.is_running:
        raise EngineBusy(f"engine {engine.name!r} is running: {caller}() comes before run(), or after it")

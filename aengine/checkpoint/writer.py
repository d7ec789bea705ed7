"""Writer: copies what belongs to one instant, and makes a checkpoint of it on a thread of its own."""

import logging
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from aengine.checkpoint.capture.parts import Parts, capture
from aengine.checkpoint.capture.trees import rebuild
from aengine.checkpoint.events import AnyEngine, CheckpointCommitted
from aengine.checkpoint.formats.contents import Contents
from aengine.checkpoint.store.files import Stopped
from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.checkpoint.store.store import Store
from aengine.errors import CheckpointNotWritten
from aengine.threads.dedicated import DedicatedThread, wait_until_done

Write: TypeAlias = Callable[[Callable[[], bool], Callable[[], object]], CheckpointCommitted]
"""Writes what was staged, unless the first function that it is given says that it is to stop. The second blocks until
what is written may be committed."""


class Staged(NamedTuple):
    """A copy of one instant, to be written in a thread; valid until the next is staged."""

    write: Write
    step: int


_logger = logging.getLogger("aengine.checkpoint")

_VERSIONS = {
    "aengine": sys.modules["aengine"].__version__,  # to import it here would be to import upwards
    "torch": str(torch.__version__),
    "python": platform.python_version(),
}


class Writer:
    """Copies what belongs to one instant, and makes a checkpoint of it. Knows of no event and no loop.

    Attributes:
        last_saved: the last checkpoint that was written, None before the first.
        saved_step: of what was staged last, or restored from here; None before that.
    """

    def __init__(self, parts: Parts, store: Store, contents: Contents) -> None:
        self.last_saved: CheckpointInfo | None = None
        self.saved_step: int | None = None
        self._parts = parts
        self._store = store
        self._contents = contents
        self._restored: Path | None = None
        self._went_back_to: CheckpointInfo | None = None

    def open(self) -> None:
        """Take the directory, and start the process that writes, if there is to be one.

        Raises:
            CheckpointLocked, CheckpointNotWritten: another writer has it, or it cannot be written to.
        """
        self._store.lock()
        self._contents.start()

    def close(self) -> None:
        """End the process that writes, and let others have the directory. Blocks; no save may be under way."""
        self.saved_step = None
        self._contents.close()
        self._store.unlock()

    def stop(self) -> None:
        """Give up a write in another process, which does not ask whether to stop. From any thread."""
        self._contents.stop()

    def go_on_from(self, info: CheckpointInfo, *, is_newest: bool) -> None:
        """The run goes on from a checkpoint. If it is not the newest, the first save sets aside those after it."""
        self._restored = info.path
        self.saved_step = info.step if info.path.parent == self._store.directory else None
        self._went_back_to = None if is_newest else info

    def stage(self, event: str, engine: AnyEngine, *, is_mid_step: bool = False) -> Staged:
        """Copy all that belongs to this instant.

        Raises:
            CheckpointError: another writer has the directory; something in the state could not be loaded back.
        """
        self._store.lock()
        tree = capture(self._parts, engine)
        step = int(tree["engine"]["iteration"])
        staged = self._contents.stage(tree)
        self.saved_step = step
        about: dict[str, Any] = {
            "step": step,
            "epoch": engine.state.epoch,
            "event": event,
            "metrics": _numbers(tree["metrics"]),
            "versions": _VERSIONS,
            "extra": {"mid_step": True} if is_mid_step else {},
        }
        metric = self._store.keep.metric
        if metric is not None and metric not in about["metrics"]:
            _logger.warning(
                "checkpoint of step %d: engine.state.metrics has no number %r, by which the best are kept", step, metric
            )
        return Staged(partial(self._write, staged, about), step)

    def _write(
        self,
        staged: Any,
        about: dict[str, Any],
        is_stopped: Callable[[], bool],
        until_permitted: Callable[[], object],
    ) -> CheckpointCommitted:
        """In the thread of a save: write, commit, and only then remove what is not to be kept."""
        if self._went_back_to is not None:
            abandoned, self._went_back_to = self._store.abandon_after(self._went_back_to), None
            if abandoned:
                _logger.warning(
                    "the run went back: %d later checkpoints were set aside, %s the first",
                    len(abandoned),
                    abandoned[-1],
                )
        position = _position_in(staged)  # before the next save reuses the memory
        try:
            with self._store.begin(about["step"]) as draft:
                about["extra"] |= self._contents.write(staged, draft, is_stopped)
                until_permitted()
                try:
                    info = draft.commit(**about)
                except ValueError as error:  # as where names of metrics are far too long
                    raise CheckpointNotWritten(
                        f"the checkpoint of step {about['step']} was not written: its manifest could not be read back."
                        f" {error}"
                    ) from error
        except Stopped as error:
            raise CheckpointNotWritten(
                f"the checkpoint of step {about['step']} was not written: it was given up with the run, whose grace was"
                " over. Nothing of it stays"
            ) from error
        self.last_saved = info
        self._store.retain([path for path in (self._restored, info.path) if path is not None])
        return CheckpointCommitted(info, position)


class Saving:
    """A save under way: staged, and being written by a thread that ends with it.

    Attributes:
        step: of which checkpoint.
        committed: what was committed, once it is.
        error: why nothing was.
        is_reported: whether the error was raised somewhere.
        is_unawaited: whether what waited for it was cancelled, so that an error is still to be reported.
    """

    def __init__(self, staged: Staged, on_end: Callable[["Saving"], object], *, is_permitted: bool = True) -> None:
        self.step = staged.step
        self.committed: CheckpointCommitted | None = None
        self.error: BaseException | None = None
        self.is_reported = self.is_unawaited = False
        self._is_stopped = False
        self._is_permitted = threading.Event()  # to commit what is written, or stopped
        if is_permitted:
            self._is_permitted.set()
        self._work: tuple[Write, Callable[[Saving], object]] | None = (staged.write, on_end)
        # A thread for each save: a Checkpoint that is dropped without close() leaves none behind. It is a daemon: a
        # disk that hangs must not keep the process from ending, and what that cuts short is swept by the next writer.
        thread = DedicatedThread("aengine checkpoint")
        self._end = thread.submit(self._run)
        thread.abandon()

    @property
    def is_over(self) -> bool:
        """Whether it was committed or has failed."""
        return self._end.done()

    def _run(self) -> None:
        assert self._work is not None, "run once"  # noqa: S101
        (write, on_end), self._work = self._work, None
        time.sleep(0.001)  # lets go of the GIL, without which the loop, which has just started this, cannot go on
        try:
            self.committed = write(lambda: self._is_stopped, self._until_permitted)
        except BaseException as error:  # noqa: BLE001 -- handed to what waits; none is swallowed
            self.error = error
        del write  # and the staged tree with it, before the next save asks for its memory
        on_end(self)

    def _until_permitted(self) -> None:
        self._is_permitted.wait()
        if self._is_stopped:
            raise Stopped

    async def wait(self) -> None:
        """Wait for its end, whatever that is. Cancellable; the write goes on."""
        await wait_until_done(self._end)

    def permit(self) -> None:
        """Have it committed when it is written, and not before. From any thread."""
        self._is_permitted.set()

    def stop(self) -> None:
        """Give the write up at its next block: nothing of it stays."""
        self._is_stopped = True
        self._is_permitted.set()

    def result(self) -> CheckpointCommitted:
        """Return what was committed, or raise why nothing was. It must be over."""
        if self.error is not None:
            self.is_reported = True
            raise self.error
        assert self.committed is not None, "it is over"  # noqa: S101
        return self.committed


def _position_in(staged: Mapping[str, Any]) -> Any:
    """Return a copy of where the data stands in what was staged, as `CheckpointCommitted` describes it."""
    position: Mapping[str, Any] | None = staged["engine"]["data"]
    if position is None:
        return None
    if position["state"] is None:
        return {"batches": position["batches"], "length": position["length"]}
    return rebuild(position["state"], lambda leaf, _: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return those metrics that are single numbers, to show and to choose by."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            continue
    return numbers

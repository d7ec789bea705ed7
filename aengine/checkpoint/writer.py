"""Writer: takes what belongs to one instant, and makes a checkpoint of it, or says why there is none."""

import logging
import platform
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aengine.checkpoint.capture.parts import Parts, gather
from aengine.checkpoint.formats.contents import Contents
from aengine.checkpoint.store.files import Stopped
from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.checkpoint.store.store import Store
from aengine.engine import Engine
from aengine.errors import CheckpointNotWritten

_logger = logging.getLogger("aengine.checkpoint")

_VERSIONS = {
    "aengine": sys.modules["aengine"].__version__,  # to import it here would be to import upwards
    "torch": str(torch.__version__),
    "python": platform.python_version(),
}


class Writer:
    """Writes the checkpoints of one run after another.

    Attributes:
        committed: the last one, None before the first.
        saved_step: of what was staged last, or restored from here; None before that.
    """

    def __init__(self, parts: Parts, store: Store, contents: Contents) -> None:
        self.committed: CheckpointInfo | None = None
        self.saved_step: int | None = None
        self._parts = parts
        self._store = store
        self._contents = contents
        self._restored: Path | None = None
        self._went_back_to: CheckpointInfo | None = None

    def go_on_from(self, info: CheckpointInfo, *, is_newest: bool) -> None:
        """The run goes on from a checkpoint. If it is not the newest, the first save sets aside those after it."""
        self._restored = info.path
        self.saved_step = info.step if info.path.parent == self._store.directory else None
        self._went_back_to = None if is_newest else info

    def stage(
        self, event: str, engine: Engine[Any, Any], *, is_mid_step: bool = False
    ) -> Callable[[Callable[[], bool]], CheckpointInfo]:
        """Copy all that belongs to this instant. Returns what writes it, in a thread, valid until the next is staged.

        Raises:
            CheckpointError: another writer has the directory; something in the state could not be loaded back.
        """
        self._store.lock()
        tree = gather(self._parts, engine)
        step = int(tree["engine"]["iteration"])
        staged = self._contents.stage(tree)
        self.saved_step = step
        about: dict[str, Any] = {
            "step": step,
            "epoch": engine.state.epoch,
            "event": event,
            "metrics": _numbers(tree["metrics"]),
            "versions": _VERSIONS,
        }
        extra = {"mid_step": True} if is_mid_step else {}
        metric = self._store.keep.metric
        if metric is not None and metric not in about["metrics"]:
            _logger.warning(
                "checkpoint of step %d: engine.state.metrics has no number %r, by which the best are kept", step, metric
            )
        return partial(self._write, staged, about, extra)

    def _write(
        self, staged: Any, about: dict[str, Any], extra: dict[str, Any], is_stopped: Callable[[], bool]
    ) -> CheckpointInfo:
        """In the thread of a save: write, commit, and only then remove what is not to be kept."""
        if self._went_back_to is not None:
            left, self._went_back_to = self._store.abandon_after(self._went_back_to), None
            if left:
                _logger.warning(
                    "the run went back: %d later checkpoints were set aside, %s the first", len(left), left[-1]
                )
        try:
            with self._store.begin(about["step"]) as draft:
                extra = {**extra, **self._contents.write(staged, draft, is_stopped)}
                info = draft.commit(**about, extra=extra)
        except Stopped as error:
            raise CheckpointNotWritten(
                f"the checkpoint of step {about['step']} was not written: it was given up with the run, whose grace was"
                " over. Nothing of it stays"
            ) from error
        self.committed = info
        self._store.retain([path for path in (self._restored, info.path) if path is not None])
        return info


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return those metrics that are single numbers, to show and to choose by."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            continue
    return numbers

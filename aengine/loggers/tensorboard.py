"""TensorBoard: scalars as event files, for `tensorboard --logdir`."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aengine.callables import check_callable
from aengine.extras import missing_package
from aengine.keywords import explain_wrong_call
from aengine.loggers.runs import SharedRun
from aengine.loggers.sink import Record, tag_of
from aengine.state import StopReason

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as _error:
    raise missing_package(__name__, "tensorboard>=2.17", "tensorboard") from _error


@explain_wrong_call
class TensorBoard:
    """Writes each number of each record as a scalar, and has the file up to date after each call.

    Several engines may share one. A new event file begins when a run begins and no other is under way: an evaluator
    that runs beside a trainer, or in its handlers, writes into the trainer's file.

    Args:
        directory: where the event files go; made at the first record.
        tag: `tag(record, name)` returns the name of a value on the page.

    Raises:
        TypeError: an argument is wrong.
    """

    def __init__(self, directory: str | os.PathLike[str], *, tag: Callable[[Record, str], str] = tag_of) -> None:
        check_callable(tag, "TensorBoard(tag=)", "tag", "record", "name")
        self.directory: Path = Path(directory)
        self._tag = tag
        self._writer: Any = None
        self._purge_step: int | None = None  # the first one that is written once more, where a run went back
        self._runs = SharedRun()
        self._lock = threading.Lock()  # each engine that shares this calls it from a thread of its own

    def write(self, records: Sequence[Record], /) -> None:
        """Append the records.

        Raises:
            OSError: the files cannot be written. The records before the failure are written twice then.
        """
        with self._lock:
            writer = self._writer
            if writer is not None and self._purge_step is not None:
                writer.close()
                writer = None
            if writer is None:
                writer = self._writer = SummaryWriter(str(self.directory), purge_step=self._purge_step)
                self._purge_step = None
            for record in records:
                for name, value in record.values.items():
                    writer.add_scalar(self._tag(record, name), value, record.step, record.time)
            writer.flush()

    def run_went_back(self, engine_name: str, standing: Mapping[str, int], /) -> None:  # noqa: ARG002 -- as Rewindable has it
        """Have TensorBoard show nothing that was written of later steps before, by this engine or others."""
        self._purge_step = max(standing.values()) + 1

    def run_started(self, engine_name: str, time: float, /) -> None:
        """Take note that a run of an engine began."""
        self._runs.begin(engine_name, time)

    def run_ended(self, engine_name: str, time: float, reason: StopReason, /) -> None:
        """Take note that a run of an engine ended."""
        self._runs.end(engine_name, time, reason)

    def close(self) -> None:
        """Close the file until the next write, unless the run of another engine is under way, which writes to it."""
        with self._lock:
            if self._runs.take_news() and not self._runs.is_over:  # without news, the run was interrupted
                return
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()

    def __repr__(self) -> str:
        return f"TensorBoard({str(self.directory)!r})"

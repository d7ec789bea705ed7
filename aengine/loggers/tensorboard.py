"""TensorBoard: scalars as event files, for `tensorboard --logdir`."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aengine.loggers.records import Record, engine_and_name

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ImportError(
        'aengine.loggers.tensorboard needs tensorboard: pip install "tensorboard>=2.17", which is what the extra'
        ' "tensorboard" brings: pip install -e ".[tensorboard]"'
    ) from error


class TensorBoard:
    """Writes each number of each record as a scalar, and has the file up to date after each call.

    Several engines may share one. Each run of them begins a new event file, as TensorBoard expects.

    Args:
        directory: where the event files go; made at the first record.
        tag: `tag(record, name)` returns what the page calls a value.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, tag: Callable[[Record, str], str] = engine_and_name
    ) -> None:
        self.directory = Path(directory)
        self._tag = tag
        self._writer: Any = None
        self._lock = threading.Lock()  # several engines, each with a thread

    def write(self, records: Sequence[Record], /) -> None:
        """Append the records.

        Raises:
            OSError: the files cannot be written. What was written of these records is written twice then.
        """
        with self._lock:
            writer = self._writer
            if writer is None:
                writer = self._writer = SummaryWriter(str(self.directory))
            for record in records:
                for name, value in record.values.items():
                    writer.add_scalar(self._tag(record, name), value, record.step, record.time)
            writer.flush()

    def close(self) -> None:
        """Close the file until the next write."""
        with self._lock:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()

    def __repr__(self) -> str:
        return f"TensorBoard({str(self.directory)!r})"

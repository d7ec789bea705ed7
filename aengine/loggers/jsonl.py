"""JSONLines: a file with a line of JSON for each record, which stays readable if the process is killed."""

import json
import logging
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aengine.loggers.sink import Record

_logger = logging.getLogger("aengine.loggers")

_CHUNK = 1 << 16


class JSONLines:
    """Appends a line for each record to a file, and has it on the disk, by fsync, when the run is over.

    Before a `Checkpoint` of the engine commits, the lines of the steps that it covers are on the disk.

        {"step": 10, "epoch": 1, "time": 1764000000.5, "event": "ITERATION_COMPLETED", "engine": "trainer",
         "values": {"loss": 0.25}}

    Strict JSON, which has no numbers for these: they are the strings "NaN", "Infinity" and "-Infinity", which `float()`
    takes. A write that fails, as on a full disk, leaves nothing of its records. The file is opened at the first record;
    if it then ends in the middle of a line, because its writer was killed, that half is removed, and a line that only
    lacks its newline gets one. Several engines may share one; several processes may not.

    Args:
        path: the file; it and its folders are made if they are not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: int | None = None
        self._lock = threading.Lock()  # each engine that shares this calls it from a thread of its own

    def write(self, records: Sequence[Record], /) -> None:
        """Append the records: all of them, or, if that fails, none.

        Raises:
            OSError: the file cannot be opened or written.
        """
        lines = "".join([_line(record) for record in records]).encode()
        with self._lock:
            if self._file is None:
                self._file = _open(self.path)
            _append(self._file, lines)

    def sync_to_disk(self) -> None:
        """Have all of it on the disk, by fsync: a checkpoint that is committed next does not know more than this."""
        with self._lock:
            if self._file is not None:
                self._sync(self._file)

    def close(self) -> None:
        """Flush all of it to the disk by fsync, and close the file until the next write."""
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                try:
                    self._sync(file)
                finally:
                    os.close(file)

    def _sync(self, file: int) -> None:
        os.fsync(file)
        _sync_directory(self.path.parent)  # a new file's name is in there, and might be lost without

    def __repr__(self) -> str:
        return f"JSONLines({str(self.path)!r})"


def _line(record: Record) -> str:
    fields: dict[str, Any] = {name: getattr(record, name) for name in Record.__slots__}  # asdict() takes thrice as long
    try:
        return json.dumps(fields, allow_nan=False) + "\n"
    except ValueError:  # rare, and looking for NaN first would cost as much as the dump
        # json.dumps() has names for NaN and infinity, which become strings.
        fields["values"] = {
            name: value if math.isfinite(value) else json.dumps(value) for name, value in record.values.items()
        }
        return json.dumps(fields, allow_nan=False) + "\n"


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        _repair(file, path)
    except BaseException:
        os.close(file)
        raise
    return file


def _append(file: int, lines: bytes) -> None:
    size = os.fstat(file).st_size
    rest = memoryview(lines)
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
    except BaseException:
        os.ftruncate(file, size)  # these records come again, all of them
        raise


def _repair(file: int, path: Path) -> None:
    """Finish or remove a last line that was not written to its end."""
    size = os.fstat(file).st_size
    tail, begin = b"", size
    while begin > 0 and b"\n" not in tail:
        begin = max(0, begin - _CHUNK)
        tail = os.pread(file, size - begin, begin)
    line = tail.rpartition(b"\n")[2]
    if not line:
        return
    try:
        json.loads(line)
    except ValueError:
        os.ftruncate(file, size - len(line))
        _logger.warning("%s ended in the middle of a line, of which %d bytes were removed", path, len(line))
    else:
        os.write(file, b"\n")


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

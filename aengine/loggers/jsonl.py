"""JSONLines: a file with a line of JSON for each record, which stays readable if the process is killed."""

import json
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from aengine.keywords import explain_wrong_call
from aengine.loggers.sink import Record

_logger = logging.getLogger("aengine.loggers")

_CHUNK = 1 << 16

_FIELDS = tuple((name.removesuffix("_name"), name) for name in Record.__slots__)
"""The keys of a line, and what they are of a record: "engine" is the engine's name, for nothing else of it is there."""

_DISORDER = 60.0
"""Seconds by which lines of two engines may be out of order: each is written when its own tracker comes to that."""


@explain_wrong_call
class JSONLines:
    """Appends a line for each record to a file, and has it on the disk, by fsync, when the run is over.

    Before a `Checkpoint` of the engine commits, the lines of the steps that it covers are on the disk.

        {"step": 10, "epoch": 1, "time": 1764000000.5, "event": "ITERATION_COMPLETED", "engine": "trainer",
         "values": {"loss": 0.25}}

    Strict JSON, which has no numbers for these: they are the strings "NaN", "Infinity" and "-Infinity", which `float()`
    takes. A write that fails, as on a full disk, leaves nothing of its records. The file is opened at the first record;
    if it then ends in the middle of a line, because its writer was killed, that half is removed, and a line that only
    lacks its newline gets one. Several engines may share one; several processes may not.

    A run that goes on from a checkpoint goes over some steps again: the lines that it had written of them are moved to
    a file beside this one, "log.jsonl.gone-over", so that no step is there twice. So are the lines that other engines,
    such as an evaluator, wrote to this file since then, unless their own runs go on from a checkpoint as well. An
    engine that is not resumed appends to what is there.

    Args:
        path: the file; it and its folders are made if they are not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path)
        self._file: int | None = None
        self._points: dict[str, float] = {}  # by engine, the time of the step that it went back to, as lines have it
        self._gone_back: deque[tuple[str, Mapping[str, int]]] = deque()  # reported, and not done yet
        self._engines: set[str] = set()  # those that have written, or gone back
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
            self._go_back()
            if new := {record.engine_name for record in records} - self._engines:
                self._set_aside_of_others(new)
                self._engines |= new
            _append(self._file, lines)

    def run_went_back(self, engine_name: str, standing: Mapping[str, int], /) -> None:
        """Have the lines of an engine that come again moved to the file beside this one, before more are written."""
        self._gone_back.append((engine_name, standing))

    def _go_back(self) -> None:
        while self._gone_back and self._file is not None:
            engine, standing = self._gone_back[0]
            gone: list[_Line] = []
            least: dict[str, int] = {}
            last: _Line | None = None
            for line in _from_end(self._file):
                # Each tracker brings its lines in their order, so the first that stands is the last one of those.
                if line.engine == engine and line.event in standing:
                    if line.step <= standing[line.event]:
                        last = line
                        break
                    if line.step >= least.get(line.event, math.inf):  # of a run before, to which this one was appended
                        break
                    least[line.event] = line.step
                    gone.append(line)
            self._engines.add(engine)
            if gone:
                # Where the step itself has no line: since the first that is gone, so that nothing is that stands.
                is_exact = last is not None and last.step == standing[last.event]
                point = last.time if last is not None and is_exact else math.nextafter(gone[-1].time, 0)
                self._points[engine] = min(point, self._points.get(engine, point))  # it may have several trackers
                self._set_aside(gone)
            self._gone_back.popleft()

    def _set_aside_of_others(self, engines: Collection[str]) -> None:
        """Do the same with what these, which are not resumed, wrote after the point that another one went back to."""
        if self._points and self._file is not None:
            since = max(self._points.values())  # of two trainings that went back, nothing of either is to be lost
            recent = takewhile(lambda line: line.time > since - _DISORDER, _from_end(self._file))
            self._set_aside([line for line in recent if line.engine in engines and line.time > since])

    def _set_aside(self, gone: Sequence["_Line"]) -> None:
        """Move lines, the last one first, to the file beside this one. Whenever this is cut off, none is lost."""
        if not gone or self._file is None:
            return
        aside = self.path.with_name(f"{self.path.name}.gone-over")
        other = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _append(other, b"".join(line.text for line in reversed(gone)))
            os.fsync(other)
        finally:
            os.close(other)
        begin, gone_at = gone[-1].offset, {line.offset for line in gone}
        kept = [
            line.text
            for line in takewhile(lambda line: line.offset >= begin, _from_end(self._file))
            if line.offset not in gone_at
        ]
        if not kept:
            os.ftruncate(self._file, begin)
        else:
            partial = self.path.with_name(f".{self.path.name}.partial")
            with self.path.open("rb") as old, partial.open("wb") as new:
                _copy(old, new, begin)
                new.writelines(reversed(kept))
                new.flush()
                os.fsync(new.fileno())
            partial.replace(self.path)
            os.close(self._file)
            self._file = None
            self._file = _open(self.path)
        self._sync(self._file)
        _logger.info("%s: %d lines, of steps that are gone over again, were moved to %s", self.path, len(gone), aside)

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
    fields: dict[str, Any] = {key: getattr(record, name) for key, name in _FIELDS}  # asdict() takes thrice as long
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


class _Line(NamedTuple):
    """A line of the file, as far as it says whose it is; the engine of one that is no record has no name."""

    offset: int
    text: bytes
    engine: str
    event: str
    step: int
    time: float


def _from_end(file: int) -> Iterator[_Line]:
    """Yield the lines of a file, the last one first: a resumed run has to look at few of them."""
    end = os.fstat(file).st_size
    tail = b""  # what is read, up to the end of the lines that are not yielded yet
    begin = end
    while begin > 0:
        size = min(_CHUNK, begin)
        begin -= size
        tail = os.pread(file, size, begin) + tail
        first, newline, complete = tail.partition(b"\n") if begin > 0 else (b"", b"", tail)
        offset = begin + len(tail)
        for text in reversed(complete.splitlines(keepends=True)):
            offset -= len(text)
            yield _parsed(offset, text)
        tail = first + newline


def _parsed(offset: int, text: bytes) -> _Line:
    try:
        fields = json.loads(text)
        return _Line(offset, text, fields["engine"], fields["event"], fields["step"], fields["time"])
    except (ValueError, KeyError, TypeError):  # a line of the user's own
        return _Line(offset, text, "", "", 0, math.inf)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Copy this many bytes, from the beginning."""
    while size > 0 and (block := source.read(min(size, 1 << 20))):
        target.write(block)
        size -= len(block)


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

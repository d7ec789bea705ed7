"""The few ways in which checkpoints touch the disk. Each is durable when it returns, or says that it is not.

After a power cut all may be gone that no `fsync` covered: the content of a file and, apart from that, its name in its
directory. `write_file` syncs the content; its caller syncs the directory before anything relies on the name.
"""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

from aengine.checkpoint.store.manifest import FileEntry, file_name

IsStopped: TypeAlias = Callable[[], bool]

_SMALL = 1 << 16  # writes below this are put together: pickles and zip headers come in crumbs
_TOGETHER = 1 << 20
_PIECE = 1 << 22  # of a large write, between two looks at `is_stopped`; also what stays in the processor's cache


class Stopped(Exception):
    """The write was given up because its `is_stopped()` said so."""


class HashingFile:
    """What a serializer writes into: hashes and counts in the same pass, and copies nothing that is large.

    Does not own the descriptor. Once a write has failed every further one fails with the same error: what came after it
    would leave a hole.

    Attributes:
        error: what a write or flush raised. torch hides it in a RuntimeError of its own.
        size: bytes written so far, those still held together included.
    """

    def __init__(self, descriptor: int, is_stopped: IsStopped | None = None) -> None:
        self.error: OSError | Stopped | None = None
        self.size: int = 0
        self._descriptor = descriptor
        self._is_stopped = is_stopped
        self._hash = hashlib.sha256()
        self._together = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of it, and return how many bytes that were.

        Raises:
            Stopped: `is_stopped()` was true; it is asked at least every few megabytes.
            OSError: the disk is full, or worse.
        """
        self._go_on()
        view = memoryview(data)
        size = view.nbytes
        if size >= _SMALL:
            self.flush()
            self._put(view.cast("B"))
        else:
            self._together += view
            if len(self._together) >= _TOGETHER:
                self.flush()
        self.size += size
        return size

    def flush(self) -> None:
        """Hand to the system what is held together so far. It is not on the disk by that."""
        self._go_on()
        together, self._together = self._together, bytearray()
        self._put(memoryview(together))

    @property
    def sha256(self) -> str:
        """The checksum, in hexadecimal, of what was written and flushed."""
        return self._hash.hexdigest()

    def _put(self, view: memoryview) -> None:
        for start in range(0, view.nbytes, _PIECE):
            self._go_on()
            piece = view[start : start + _PIECE]
            self._hash.update(piece)  # lets go of the GIL, as os.write does
            try:
                while piece.nbytes:
                    piece = piece[os.write(self._descriptor, piece) :]
            except OSError as error:
                self.error = error
                raise

    def _go_on(self) -> None:
        if self.error is None and self._is_stopped is not None and self._is_stopped():
            self.error = Stopped("the write was stopped")
        if self.error is not None:
            raise self.error


def create(path: Path) -> int:
    """Open a new file for writing, only for its owner; fail if anything has that name, were it a dangling link."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def write_file(path: Path, write: Callable[[BinaryIO], object], is_stopped: IsStopped | None = None) -> FileEntry:
    """Create a file, let `write(file)` fill it, and return its entry once the content is on the disk.

    The file's name in its directory is not, until `sync_directory()`. A file that failed stays as it is: its directory
    is removed. Can be called in another process, for its arguments and result can be pickled if `write` can.

    Raises:
        Stopped: `is_stopped()` was true.
        OSError: with the path as its `filename`, even if the serializer raised something else because of it.
    """
    try:
        descriptor = create(path)
        file = HashingFile(descriptor, is_stopped)
        try:
            _fill(file, write)
            os.fsync(descriptor)
        finally:
            file.error = None  # its traceback holds the file, and both would hold what was to be written
            os.close(descriptor)
    except OSError as error:
        if error.filename is None:  # os.write and os.fsync know a number only
            error.filename = os.fspath(path)
        raise
    return FileEntry(file_name(path), file.size, file.sha256)


def _fill(file: HashingFile, write: Callable[[BinaryIO], object]) -> None:
    try:
        write(cast("BinaryIO", file))  # as much of one as a serializer needs
    except Exception as error:
        if file.error is not None and file.error is not error:
            raise file.error from None  # the reason, instead of what was made of it
        raise
    file.flush()  # fails if the serializer went on after a write that failed


def open_to_read(path: Path) -> int:
    """Open a regular file, and nothing else: no link is followed, and a pipe would be waited for for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return descriptor


def read_at_most(path: Path, limit: int) -> bytes:
    """Return the content of a regular file, cut after `limit` bytes."""
    with open(open_to_read(path), "rb") as file:
        return file.read(limit)


def measure(path: Path, is_stopped: IsStopped | None = None) -> FileEntry:
    """Return the entry of a file that is there already, read from its first byte to its last.

    Raises:
        Stopped: `is_stopped()` was true; it is called at every few megabytes.
    """
    digest, piece = hashlib.sha256(), memoryview(bytearray(_TOGETHER))
    with open(open_to_read(path), "rb", buffering=0) as file:
        while size := file.readinto(piece):
            if is_stopped is not None and is_stopped():
                raise Stopped("the reading was given up")
            digest.update(piece[:size])
        return FileEntry(file_name(path), file.tell(), digest.hexdigest())


def printable(text: str) -> str:
    """Return a text that any file and log takes: what a path has that is not UTF-8 is escaped."""
    return text.encode(errors="backslashreplace").decode()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: what was created, renamed and removed in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory that only its owner may enter, durably, with the parents it lacks; one that is there stays."""
    if path.is_dir():
        return
    if not path.parent.is_dir():
        make_directory(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)  # another process may have been faster
    sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Remove whatever is there, and never what a link in it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)  # goes by descriptors, so that not even a directory swapped for a link leads it out
    else:
        path.unlink()

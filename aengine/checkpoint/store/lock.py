"""One writer for a directory of checkpoints: a lock that a dead process cannot keep."""

import errno
import fcntl
import os
import re
import socket
import threading
import weakref
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path

from aengine.errors import CheckpointLocked


class DirectoryLock:
    """Makes sure that a directory has one writer, by `flock` on a file in it. The file stays when the lock is given up.

    The system gives it up for a process that dies. A child made by fork does not hold it: workers that outlive a killed
    parent for some seconds must not keep out the process that is started in its place.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None  # not a bare descriptor, which would stay open if this is dropped
        self._watches_forks = False
        self._is_acquiring = threading.Lock()

    def acquire(self) -> bool:
        """Take the lock, and return whether it was not held already. Does not wait for another holder.

        Raises:
            CheckpointLocked: another process, or another lock of this one, has it.
            OSError: the file cannot be made, is a link, or the file system does not know locks.
        """
        # flock() belongs to the open file: of two threads of one Checkpoint, each with a file of its own, the second
        # would take the first for another writer.
        with self._is_acquiring:
            if self._file is not None:
                return False
            self._file = self._open_and_lock()
            return True

    def _open_and_lock(self) -> FileIO:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = FileIO(os.open(self._path, flags, 0o600), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise CheckpointLocked(_describe_holder(self._path.parent, file.read(300))) from None
        except OSError:
            file.close()
            raise
        if not self._watches_forks:
            # Weak: what is registered stays for the life of the process.
            os.register_at_fork(after_in_child=partial(_drop_in_child, weakref.ref(self)))
            self._watches_forks = True
        with suppress(OSError):  # on a full disk the lock holds without a name on it
            file.truncate(0)
            file.write(_signature())
        return file

    def release(self) -> None:
        """Give the lock up, if it is held."""
        if self._file is not None:
            # Closing is not enough: a child that was forked in C has the file open.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self.drop()

    def check(self) -> None:
        """Make sure that the lock is held, and on the file that others would find.

        Raises:
            RuntimeError: it was never taken.
            OSError: the directory was removed meanwhile, and perhaps made anew.
        """
        if self._file is None:
            raise RuntimeError(f"writing to {self._path.parent} needs its lock: call lock() first, in this process")
        if not os.path.samestat(os.fstat(self._file.fileno()), self._path.lstat()):
            raise OSError(errno.ESTALE, "the lock file was replaced, so another writer may be at work", str(self._path))

    def __del__(self) -> None:
        self.drop()  # the file is closed here, so that there is no ResourceWarning

    def drop(self) -> None:
        """Forget the lock without giving it up: another process holds it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _drop_in_child(lock: "weakref.ref[DirectoryLock]") -> None:
    held = lock()
    if held is not None:
        held.drop()


def _signature() -> bytes:
    return f"{os.getpid()} {socket.gethostname()}\n".encode()


def _describe_holder(directory: Path, holder: bytes) -> str:
    if holder == _signature():
        return (
            f"{directory} is in use by another Checkpoint of this very process ({os.getpid()}). Two would remove each"
            " other's checkpoints: use the same one, let its run end first, or give each a directory of its own."
        )
    match = re.fullmatch(rb"([0-9]+) ([A-Za-z0-9._-]+)\n", holder)
    owner = f"process {match[1].decode()} on host {match[2].decode()}" if match else "another process"
    return (
        f"{directory} is in use by {owner}. Two writers would remove each other's checkpoints: wait until it has ended,"
        " end it, or choose another directory."
    )

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
from pathlib import Path
from typing import Any

from aengine.errors import CheckpointLocked


class DirectoryLock:
    """Makes sure that a directory has one writer, by `flock` on a file in it. The file stays when the lock is given up.

    The system gives it up for a process that dies. A child made by fork does not hold it: workers that outlive a killed
    parent for some seconds must not keep out the process that is started in its place.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        # Closes it, also if this is dropped. One of python's files would warn of that, where both are in a cycle and it
        # is the first to be collected.
        self._close: weakref.finalize[Any, Any] | None = None
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
            if self._descriptor is not None:
                return False
            descriptor = self._open_and_lock()
            self._close = weakref.finalize(self, os.close, descriptor)
            self._close.atexit = False  # the system does that, for the whole process at once
            self._descriptor = descriptor
            return True

    def _open_and_lock(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 300)
            os.close(descriptor)
            raise CheckpointLocked(_describe_holder(self._path.parent, holder)) from None
        except OSError:
            os.close(descriptor)
            raise
        if not self._watches_forks:
            # Weak: what is registered stays for the life of the process.
            os.register_at_fork(after_in_child=partial(_drop_in_child, weakref.ref(self)))
            self._watches_forks = True
        with suppress(OSError):  # on a full disk the lock holds without a name on it
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _signature())
        return descriptor

    def release(self) -> None:
        """Give the lock up, if it is held."""
        if self._descriptor is not None:
            # Closing is not enough: a child that was forked in C has the file open.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self.drop()

    def check(self) -> None:
        """Make sure that the lock is held, and on the file that others would find.

        Raises:
            RuntimeError: it was never taken.
            OSError: the directory was removed meanwhile, and perhaps made anew.
        """
        if self._descriptor is None:
            raise RuntimeError(f"writing to {self._path.parent} needs its lock: call lock() first, in this process")
        if not os.path.samestat(os.fstat(self._descriptor), self._path.lstat()):
            raise OSError(errno.ESTALE, "the lock file was replaced, so another writer may be at work", str(self._path))

    def drop(self) -> None:
        """Forget the lock without giving it up: another process holds it."""
        if self._close is not None:
            self._close()
        self._close = self._descriptor = None


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

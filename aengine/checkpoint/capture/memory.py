"""Where staged tensors live: in buffers that stay, so that staging is a copy and nothing else.

Writing into fresh memory costs five times as much as into memory that was written before, for each of its pages must
first be found and cleared.
"""

import mmap
import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

# What the allocators of torch align to, and more than any dtype asks for.
_ALIGNMENT = 64


class PrivateMemory:
    """Memory of this process, from torch's own allocators."""

    def __init__(self) -> None:
        self._regions: list[torch.Tensor] = []
        self._pinned = False

    def regions(self, sizes: Sequence[int], *, pinned: bool) -> list[torch.Tensor]:
        """Return a flat uint8 tensor for each of the sizes, in bytes, each with a storage of its own.

        Those of an earlier call are given up by that: they are given out again, or freed when nothing refers to them.
        """
        idle: dict[int, list[torch.Tensor]] = defaultdict(list)
        if pinned == self._pinned:
            for region in self._regions:
                idle[region.numel()].append(region)
        self._regions, self._pinned = [], pinned
        found = [idle[size].pop() if idle[size] else None for size in sizes]
        del idle  # what fits no longer is freed before more is allocated
        self._regions = [
            torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned) if region is None else region
            for size, region in zip(sizes, found, strict=True)
        ]
        return self._regions


class Arena:
    """One stretch of memory that another process can map. It has no name, so no kill leaves it behind."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.descriptor: int = _create_file(size)
        self.buffer: mmap.mmap = mmap.mmap(self.descriptor, size)
        self.address: int = torch.frombuffer(self.buffer, dtype=torch.uint8).data_ptr()
        self.is_pinned: bool = False

    def pin(self) -> None:
        """Let a GPU write here by itself."""
        if not self.is_pinned:
            runtime: Any = torch.cuda.cudart()
            torch.cuda.check_error(int(runtime.cudaHostRegister(self.address, self.size, 0)))
            self.is_pinned = True

    def region(self, start: int, size: int) -> torch.Tensor:
        """Return the bytes from `start` on as a tensor whose storage is just these. It keeps the memory mapped."""
        if size == 0:  # which frombuffer() refuses
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(self.buffer, dtype=torch.uint8, offset=start, count=size)

    def close(self) -> None:
        """Give the memory up. It goes when the last tensor in it does, here and in the other process."""
        if self.is_pinned:
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self.address)
            self.is_pinned = False
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "is_pinned"):  # not if it could not be made
            self.close()


class SharedMemory:
    """Memory that a `WriterProcess` sees as well: nothing is copied on the way to it."""

    def __init__(self) -> None:
        self.arena: Arena | None = None

    def regions(self, sizes: Sequence[int], *, pinned: bool) -> list[torch.Tensor]:
        """Do as `PrivateMemory` does, all in one arena. A larger one is made only if they do not fit."""
        *starts, end = accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0)
        if self.arena is None or self.arena.size < end:
            self.close()  # before more is asked for
            self.arena = Arena(max(end, _ALIGNMENT))
        if pinned:
            self.arena.pin()
        return [self.arena.region(start, size) for start, size in zip(starts, sizes, strict=True)]

    def find(self, storage: torch.UntypedStorage) -> tuple[int, int] | None:
        """Return where this storage begins in the memory and its size, in bytes; None if it is not in it."""
        if self.arena is None or not (size := storage.nbytes()):
            return None
        start = storage.data_ptr() - self.arena.address
        return (start, size) if 0 <= start < self.arena.size else None

    def close(self) -> None:
        """Give the memory up. Tensors that were staged in it can still be read."""
        if self.arena is not None:
            self.arena.close()
        self.arena = None


def _create_file(size: int) -> int:
    """Return the descriptor of a file in memory that no directory knows."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("aengine", os.MFD_CLOEXEC)
    else:  # macOS: a file that is deleted already
        with tempfile.TemporaryFile(buffering=0) as file:
            descriptor = os.dup(file.fileno())
    try:
        if hasattr(os, "posix_fallocate"):  # now, and with an error: a page that is missing later is a SIGBUS
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor

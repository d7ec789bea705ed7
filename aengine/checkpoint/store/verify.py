"""Reading a directory of checkpoints: what is there, what should be and is not, and whether it is whole.

Needs no lock, and changes nothing. Nothing that is found is trusted: links are refused, sizes bounded, names plain. A
checksum proves integrity, not origin (see `manifest`).
"""

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from aengine.checkpoint.store import files
from aengine.checkpoint.store.manifest import (
    MANIFEST,
    PINNED,
    SIZE_LIMIT,
    CheckpointInfo,
    decode,
    directory_name,
    step_and_revision,
)
from aengine.errors import CheckpointDamaged, CheckpointNotFound

DAMAGED = "damaged-"
ABANDONED = "abandoned-"
WHY = "why.txt"

# What the disk holds is wrong. Any other error (no permission, too many open files) says nothing about what it holds,
# and must not make a good checkpoint look damaged.
_DAMAGE = {
    errno.ENOENT: "is missing",
    errno.ELOOP: "is a symbolic link, and none is followed",
    errno.ENOTDIR: "is not a directory",
    errno.EISDIR: "is a directory, not a file",
    errno.EINVAL: "is not a regular file",
    errno.ENXIO: "is not a regular file",
    errno.EIO: "cannot be read: the medium failed",
}


_NOTHING_THERE = {errno.ENOENT, errno.ENAMETOOLONG}  # nothing can have a name that is too long


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in the directory that should be a checkpoint and is none, and why."""

    path: Path
    why: str


def committed(directory: Path) -> list[CheckpointInfo]:
    """Return what is committed and has a manifest that can be read, oldest first. Its files are not looked at.

    What vanishes meanwhile is left out. A checkpoint that could not be looked at (no permission, say) is an OSError
    and not left out: to go on from an older one because of that would lose work.
    """
    found = []
    for path in entries(directory):
        if step_and_revision(path.name) is not None:
            with suppress(CheckpointDamaged, CheckpointNotFound):
                found.append(read(path))
    return sorted(found, key=lambda info: (info.step, info.revision))


def read(path: Path) -> CheckpointInfo:
    """Return what the checkpoint at `path` says it is, in this directory or elsewhere. Its files are not looked at.

    Raises:
        CheckpointNotFound: nothing is there, or nothing that is called as a checkpoint is.
        CheckpointDamaged: its manifest is missing, cannot be understood, or something is a symbolic link.
    """
    if step_and_revision(path.name) is None:
        raise CheckpointNotFound(
            f"{path} is not a checkpoint: give its own directory, which is called as {directory_name(500)!r} is"
        )
    with _damage_in(path):
        try:
            _refuse_link(path)
            data = files.read_at_most(path / MANIFEST, SIZE_LIMIT + 1)
            return decode(data, path, pinned=os.path.lexists(path / PINNED))
        except OSError as error:
            if error.errno in _NOTHING_THERE and not os.path.lexists(path):
                raise CheckpointNotFound(f"there is no checkpoint at {path}") from None
            raise


def problems(directory: Path) -> list[Problem]:
    """Return what should be a checkpoint and cannot be read as one, and what was set aside, with the reasons."""
    found = []
    for path in entries(directory):
        if path.name.startswith(DAMAGED):
            found.append(Problem(path, why_set_aside(path)))
        elif path.name.startswith("step-"):
            try:
                read(path)
            except (CheckpointDamaged, CheckpointNotFound, OSError) as error:
                if os.path.lexists(path):
                    found.append(Problem(path, str(error)))
    return found


def verify(info: CheckpointInfo, is_stopped: files.IsStopped | None = None) -> None:
    """Read every file of a checkpoint and compare it with the manifest. Takes as long as reading takes.

    What the manifest does not name is left alone, unless it is a link: nothing reads it, since names come from the
    manifest only, and a note or an NFS leftover in the directory must not cost a run its newest checkpoint.

    Raises:
        CheckpointDamaged: says which file, and how.
        CheckpointNotFound: it was removed meanwhile.
        Stopped: `is_stopped()` was true.
    """
    if read(info.path).files != info.files:
        raise CheckpointDamaged(f"{info.path / MANIFEST} was changed since it was read")
    with _damage_in(info.path):
        _refuse_links(info.path)
        for entry in info.files:  # all the sizes before any content: a cut file shows at once
            path = info.path / entry.name
            size = path.lstat().st_size
            if size != entry.size:
                raise CheckpointDamaged(f"{path} has {size} bytes, and {entry.size} were written")
        for entry in info.files:
            path = info.path / entry.name
            if files.measure(path, is_stopped).sha256 != entry.sha256:
                raise CheckpointDamaged(f"{path} has the right size but another content than was written (sha256)")


def entries(directory: Path) -> list[Path]:
    """Return whatever is in the directory, by name; nothing if the directory is not there (yet)."""
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return []
        raise


@contextmanager
def _damage_in(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise CheckpointDamaged(f"{error.filename or path} {_DAMAGE[error.errno]}") from error


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _refuse_links(path: Path) -> None:
    _refuse_link(path)
    with os.scandir(path) as found:
        for entry in found:
            _refuse_link(Path(entry.path))
            if entry.is_dir(follow_symlinks=False):
                _refuse_links(Path(entry.path))


def why_set_aside(path: Path) -> str:
    """Return the reason that was put beside the files of what was set aside."""
    try:
        why = files.read_at_most(path / WHY, SIZE_LIMIT).decode(errors="replace").strip()
    except OSError:
        return "it was set aside"
    return f"it was set aside: {why}"

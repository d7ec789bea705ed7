"""Writing one checkpoint: into a directory of its own, and under its name only when all of it is on the disk.

The order is what makes it safe, at each step against a power cut at that instant:

1. The files are synced: else a manifest could be on the disk that names files without content.
2. The manifest is written and synced; then the directories, `dcp/` and the draft: else the names could be missing.
3. The rename is the commit. Before it there is a `.tmp-` directory, which is swept; after it a whole checkpoint.
4. The parent is synced: before that the rename itself could be undone, so nothing older is removed, and no
   CHECKPOINT_COMMITTED fired, until then.
"""

import errno
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Self

from aengine.checkpoint.store import files
from aengine.checkpoint.store.files import IsStopped
from aengine.checkpoint.store.lock import DirectoryLock
from aengine.checkpoint.store.manifest import (
    MANIFEST,
    SUBDIRECTORY,
    CheckpointInfo,
    FileEntry,
    check_name,
    decode,
    directory_name,
    encode,
    step_and_revision,
)
from aengine.checkpoint.store.verify import committed, entries
from aengine.errors import CheckpointNotWritten, CheckpointWarning

TEMPORARY = ".tmp-"
TRASH = ".trash-"

_READABLE = 12  # steps in a sentence

_ADVICE = {
    errno.ENOSPC: "Make room, or keep fewer checkpoints.",
    errno.EDQUOT: "Make room within your quota, or keep fewer checkpoints.",
    errno.EFBIG: "Raise the limit of the size of a file (ulimit -f).",
    errno.EROFS: "Choose a directory that is not mounted read-only.",
    errno.EACCES: "Choose a directory that this user may write to.",
    errno.EPERM: "Choose a directory that this user may write to.",
    errno.ENAMETOOLONG: "Choose a directory with a shorter name, or with fewer above it.",
    errno.ENOENT: "Something removed it while it was in use.",
    errno.ENOTDIR: "Something else than a directory has that name.",
    errno.EEXIST: "Something else than a directory has that name.",
    errno.ENOLCK: "Choose a directory on a file system that has locks (flock).",
    errno.EOPNOTSUPP: "Choose a directory on a file system that has locks (flock).",
    errno.ESTALE: "Something removed the directory while it was in use.",
}


class Draft:
    """A checkpoint that is being written. What is not committed when the block ends is removed, whatever happened.

    An OSError that leaves the block comes out as CheckpointNotWritten, with the OSError as its cause.

    Attributes:
        path: the directory to write into, made when the block is entered; after `commit()`, the checkpoint's own.
    """

    def __init__(self, directory: Path, lock: DirectoryLock, step: int) -> None:
        self.path = directory / f"{TEMPORARY}{directory_name(step)}-{secrets.token_hex(4)}"
        self._directory = directory
        self._lock = lock
        self._step = step
        self._entries: dict[str, FileEntry] = {}
        self._doing = "making its directory"
        self._is_committed = False

    def __enter__(self) -> Self:
        try:
            self._lock.check()
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise CheckpointNotWritten(self._explain(error)) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_committed:
            return
        if not isinstance(error, OSError):
            self._discard()
            return
        explanation = self._explain(error)  # before the draft makes room: how much there was is what it is about
        try:
            self._discard()
        finally:  # even where its warning is an error: the failure of the save is what is raised
            raise CheckpointNotWritten(explanation) from error

    def add(self, entry: FileEntry) -> None:
        """Count a file in that was written into `path` by other means. It must be synced; `files.measure()` it.

        Raises:
            ValueError: the name leads out of the checkpoint, or is taken.
        """
        check_name(entry.name)
        if entry.name in self._entries:
            raise ValueError(f"{entry.name} is in this checkpoint already: each file needs a name of its own")
        self._entries[entry.name] = entry

    def write(
        self,
        name: str,
        write: Callable[[BinaryIO], object],
        is_stopped: IsStopped | None = None,
        *,
        elsewhere: Callable[..., FileEntry] | None = None,
    ) -> FileEntry:
        """Let `write(file)` write a file of that name, and return its entry once the content is on the disk.

        Args:
            name: of the file.
            write: is given the file, to write to from its beginning to its end.
            is_stopped: called at every block, and says whether to give up.
            elsewhere: calls the function and arguments that it is given in another process, and returns the outcome.
                `is_stopped` is not called there.

        Raises:
            Stopped: `is_stopped()` was true.
            OSError: the file could not be written.
        """
        check_name(name)
        self._doing = f"writing {name}"
        path = self.path / name
        if path.parent != self.path:
            path.parent.mkdir(mode=0o700, exist_ok=True)
        if elsewhere is None:
            entry = files.write_file(path, write, is_stopped)
        else:
            entry = elsewhere(files.write_file, path, write)
        self.add(entry)
        return entry

    def commit(
        self,
        *,
        step: int,
        epoch: int,
        event: str,
        metrics: Mapping[str, float],
        versions: Mapping[str, str],
        world_size: int = 1,
        extra: Mapping[str, Any] = MappingProxyType({}),
    ) -> CheckpointInfo:
        """Make a checkpoint of what was written, and return it once it would survive a power cut.

        Raises:
            TypeError, ValueError: something of this cannot be put into the manifest.
            OSError: something of this cannot be written, or what was written is not there any more.
        """
        if step != self._step:
            raise ValueError(f"the draft was begun for step {self._step}, and cannot be committed as step {step}")
        self._doing = "looking at what was written"
        self._lock.check()
        for entry in self._entries.values():
            size = (self.path / entry.name).lstat().st_size
            if size != entry.size:
                raise OSError(
                    errno.EIO, f"it has {size} bytes where {entry.size} were written", str(self.path / entry.name)
                )
        revision, number = self._revision_and_number()
        info = CheckpointInfo(
            step=step,
            revision=revision,
            number=number,
            epoch=epoch,
            event=event,
            metrics=metrics,
            created=time.time(),  # noqa: TID251 -- for people to read, on another day
            size=sum(entry.size for entry in self._entries.values()),
            path=self._directory / directory_name(step, revision),
            is_pinned=False,
            files=tuple(self._entries.values()),
            versions=versions,
            world_size=world_size,
            extra=extra,
        )
        manifest = encode(info)
        self._doing = f"writing {MANIFEST}"
        files.write_file(self.path / MANIFEST, lambda file: file.write(manifest))
        self._doing = "committing it"
        if (self.path / SUBDIRECTORY).is_dir():
            files.sync_directory(self.path / SUBDIRECTORY)
        files.sync_directory(self.path)
        self.path.rename(info.path)
        self.path = info.path
        files.sync_directory(self._directory)
        self._is_committed = True
        return decode(manifest, info.path, pinned=False)  # as any reader would see it

    def _revision_and_number(self) -> tuple[int, int]:
        """Above all revisions that are there, also those that cannot be read: no name is ever used for two."""
        names = [step_and_revision(path.name) for path in entries(self._directory)]
        revision = 1 + max((each[1] for each in names if each and each[0] == self._step), default=0)
        number_of = {info.step: info.number for info in committed(self._directory)}
        return revision, number_of.get(self._step, 1 + max(number_of.values(), default=0))

    def _discard(self) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):  # it was removed by something else
            if step_and_revision(self.path.name):  # renamed, but not known to be durable
                self.path = to_trash(self.path)
            remove_all([self.path])

    def _explain(self, error: OSError) -> str:
        try:
            written = sum(path.lstat().st_size for path in self.path.rglob("*") if not path.is_dir())
            space = f"{size_words(written)} had been written, {size_words(free_space(self._directory))} are free"
            kept = f"Kept are {steps(committed(self._directory))}."
        except OSError as another:
            space, kept = "how much space is free is not known", f"Which are kept is not known: {words(another)}."
        return (
            f"the checkpoint of step {self._step} was not written: {words(error)}, while {self._doing} in"
            f" {self._directory}; {space}. {advice(error)} {kept}"
        )


def to_trash(path: Path) -> Path:
    """Rename a checkpoint so that it is none any more, and return where it is now."""
    trash = path.with_name(f"{TRASH}{path.name}-{secrets.token_hex(4)}")
    path.rename(trash)
    return trash


def remove_all(paths: Iterable[Path], troubles: Iterable[str] = ()) -> None:
    """Remove what is not needed any more; warn once, at the end, of what could not be, and of the other troubles."""
    said = list(troubles)
    for path in paths:
        try:
            files.remove_tree(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            said.append(words(error))
    if said:
        warnings.warn(
            f"what is not needed any more could not be removed: {'; '.join(said)}. It takes up space, and does no"
            " other harm.",
            CheckpointWarning,
            stacklevel=3,
        )


def free_space(directory: Path) -> int:
    """Return how many bytes this user can still write where a directory is, or will be."""
    place = directory
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def words(error: OSError) -> str:
    """Return what an error of the system says, and of which file."""
    return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")


def advice(error: OSError) -> str:
    """Return what to do about an error of the system, nothing if that is not known."""
    return _ADVICE.get(error.errno or 0, "")


def steps(checkpoints: list[CheckpointInfo]) -> str:
    """Return which steps there are, as part of a sentence."""
    found = [str(step) for step in dict.fromkeys(info.step for info in checkpoints)]
    if not found:
        return "none"
    if len(found) > _READABLE:
        found = [found[0], "...", *found[2 - _READABLE :]]
    return f"those of step {', '.join(found)}"


def size_words(count: int) -> str:
    """Return a size as people say it: 12 bytes, 1.2 MB."""
    for unit, size in {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3}.items():
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"

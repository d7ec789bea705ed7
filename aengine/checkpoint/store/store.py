"""The store: a directory of checkpoints, each of them there as a whole or not at all.

    DIR/step-0000000500/manifest.json  state.pt  [dcp/...]  [pinned]
    DIR/step-0000000500.2/...          a second one of the same step, taken at the end of the epoch, say
    DIR/.tmp-...  .trash-...           being written, being removed: strays of a dead writer are swept by the next
    DIR/damaged-step-...               set aside by `set_aside()`, and never looked at again
    DIR/abandoned-step-...             later than a checkpoint that a run went back to: likewise
    DIR/.lock                          one writer at a time

The rename is the commit, and retention comes after it: at no instant is the newest good checkpoint missing, whether the
process is killed or the power fails. There is no file that says which is the latest: see `find`. Everything here is
synchronous, and may be called from any thread, one call at a time.

A checksum proves integrity, not origin: load what is in here with `weights_only=True`.
"""

import builtins
import errno
import itertools
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from aengine.arguments import check_whole
from aengine.checkpoint.store import files, verify
from aengine.checkpoint.store.draft import TEMPORARY, TRASH, Draft, advice, remove_all, steps, to_trash, words
from aengine.checkpoint.store.find import newest_first
from aengine.checkpoint.store.lock import DirectoryLock
from aengine.checkpoint.store.manifest import PINNED, CheckpointInfo
from aengine.checkpoint.store.retention import Keep, removable
from aengine.checkpoint.store.verify import ABANDONED, DAMAGED, WHY
from aengine.errors import CheckpointNotFound, CheckpointNotWritten


class Store:
    """A directory of checkpoints. Reading needs no lock; writing, removing and setting aside need `lock()`.

    Attributes:
        directory: where they lie, as an absolute path.
        keep: which of them stay when `retain()` is called.

    Example:
        store = Store("checkpoints", Keep(last=3))
        store.lock()
        with store.begin(500) as draft:
            draft.write("state.pt", lambda file: torch.save(state, file))
            info = draft.commit(step=500, epoch=1, event="iteration_completed", metrics={}, versions={})
        store.retain()
    """

    def __init__(self, directory: str | os.PathLike[str], keep: Keep = Keep()) -> None:  # noqa: B008 -- it is frozen
        self.directory = Path(directory).absolute()  # wherever the process goes later
        self.keep = keep
        self._lock = DirectoryLock(self.directory / ".lock")

    def lock(self) -> None:
        """Become the one writer, making the directory if need be, and sweep what dead writers left. Idempotent.

        Raises:
            CheckpointLocked: there is another writer.
            CheckpointNotWritten: the directory cannot be made or written to.
        """
        try:
            files.make_directory(self.directory)
            is_new = self._lock.acquire()
            there_are = verify.entries(self.directory)
        except OSError as error:
            raise self._cannot_be_written(error) from error
        if is_new:
            remove_all(path for path in there_are if path.name.startswith((TEMPORARY, TRASH)))

    def exists(self) -> bool:
        """Say whether the directory is there yet.

        Raises:
            CheckpointNotWritten: nothing can have such a long name.
        """
        try:
            self.directory.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise self._cannot_be_written(error) from error
        return True

    def _cannot_be_written(self, error: OSError) -> CheckpointNotWritten:
        return CheckpointNotWritten(
            f"no checkpoint can be written to {self.directory}: {words(error)}. {advice(error)}"
        )

    def unlock(self) -> None:
        """Let others write, if this was the writer."""
        self._lock.release()

    def list(self) -> list[CheckpointInfo]:
        """Return what is committed and has a manifest that can be read, oldest first: see `verify.committed`."""
        return verify.committed(self.directory)

    def find(self, step: int) -> CheckpointInfo:
        """Return the checkpoint of a step, the last revision of it; one of a completed step, if there is any.

        Raises:
            CheckpointNotFound: there is none; says which there are.
        """
        there_are = self.list()
        for info in newest_first([one for one in there_are if one.step == step]):
            return info
        raise CheckpointNotFound(f"{self.directory} has no checkpoint of step {step}; it has {steps(there_are)}")

    def set_aside(self, path: Path, why: str) -> Path:
        """Rename a damaged checkpoint so that it is none any more, and return where it is now. Removes nothing.

        The reason is put beside its files as why.txt, if that can be done.

        Raises:
            OSError: it could not be renamed, and is where it was.
        """
        return self._set_aside(path, DAMAGED, why)

    def abandon_after(self, info: CheckpointInfo) -> builtins.list[Path]:
        """Rename what is later than a checkpoint that a run went back to, and return where it is now. Removes nothing.

        Otherwise the next run would go on from the latest of those, and not from where this one goes on.

        Raises:
            OSError: one could not be renamed, and is where it was.
        """
        later = [one for one in self.list() if (one.step, one.revision) > (info.step, info.revision)]
        why = f"the run went back to step {info.step} and went on from there"
        return [self._set_aside(one.path, ABANDONED, why) for one in reversed(later)]

    def _set_aside(self, path: Path, prefix: str, why: str) -> Path:
        self._lock.check()
        names = itertools.chain([f"{prefix}{path.name}"], (f"{prefix}{path.name}-{n}" for n in itertools.count(2)))
        target = next(free for name in names if not os.path.lexists(free := path.with_name(name)))
        path.rename(target)
        files.sync_directory(path.parent)
        if not target.is_symlink():
            with suppress(OSError):
                files.write_file(target / WHY, lambda file: file.write(f"{files.printable(why)}\n".encode()))
        return target

    def begin(self, step: int) -> Draft:
        """Return a draft of a checkpoint of so many completed iterations, to be entered with `with`."""
        check_whole(step, "step", minimum=0, of="iterations")
        return Draft(self.directory, self._lock, step)

    def retain(self, protected: Collection[Path] = ()) -> builtins.list[CheckpointInfo]:
        """Remove what `keep` does not keep, and return it. To be called after a commit, never before.

        What cannot be removed is a CheckpointWarning, after everything else was done: it takes up space, and does no
        harm.

        Args:
            protected: checkpoints that stay whatever the rule says: the one that was resumed from, and the one that was
                just committed, even where it is not the newest step: a run that went back to an older checkpoint
                writes below those that it goes on without.
        """
        removed: list[CheckpointInfo] = []
        trash: list[Path] = []
        troubles: list[str] = []
        try:
            self._lock.check()
            checkpoints = self.list()
            resolved = {path.resolve() for path in protected}  # the directory may be known by several names
            stays = [info.path for info in checkpoints if info.path.resolve() in resolved]
            for info in removable(self.keep, checkpoints, stays):
                try:
                    trash.append(to_trash(info.path))
                except OSError as error:
                    troubles.append(words(error))
                else:
                    removed.append(info)
            if trash:  # or a power cut could bring back the name of a checkpoint whose files are gone
                files.sync_directory(self.directory)
        except OSError as error:
            troubles.append(words(error))
            trash.clear()  # what was renamed is swept by the next `lock()`
        remove_all(trash, troubles)
        return removed

    def pin(self, info: CheckpointInfo) -> None:
        """Keep a checkpoint for good, until `unpin()`. Needs no lock: it may be that of a run under way.

        Raises:
            CheckpointNotFound: it is gone.
        """
        try:
            os.close(files.create(info.path / PINNED))
        except FileExistsError:
            return
        except FileNotFoundError:
            raise CheckpointNotFound(
                f"there is no checkpoint at {info.path} any more, so it cannot be pinned"
            ) from None
        files.sync_directory(info.path)

    def unpin(self, info: CheckpointInfo) -> None:
        """Leave a checkpoint to the rules again."""
        with suppress(FileNotFoundError):
            (info.path / PINNED).unlink()
            files.sync_directory(info.path)

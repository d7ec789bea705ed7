"""Contents: what a checkpoint's directory holds besides its manifest: the tree, and the shards of what is sharded."""

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from aengine.checkpoint.capture.parts import is_captured
from aengine.checkpoint.capture.staging import Staging
from aengine.checkpoint.formats.serializers import Serializer
from aengine.checkpoint.formats.writer_process import WriterProcess
from aengine.checkpoint.store import files
from aengine.checkpoint.store.draft import Draft
from aengine.checkpoint.store.manifest import STATE, SUBDIRECTORY, CheckpointInfo
from aengine.errors import CheckpointDamaged, CheckpointMismatch

if TYPE_CHECKING:
    from aengine.checkpoint.formats.sharded import ShardStore


class Contents:
    """Stages trees, writes them into drafts, in this process or in another, and reads them again."""

    def __init__(self, serializer: Serializer, *, in_process: bool) -> None:
        self._serializer = serializer
        self._process = WriterProcess() if in_process else None
        self._staging = Staging(None if self._process is None else self._process.memory, root=None)
        self._shard_store: ShardStore | None = None

    def stage(self, tree: Any) -> Any:
        """Copy a tree, between two steps. Valid until the next one is staged.

        Raises:
            NotSerializable: something in it could not be loaded back.
        """
        return self._staging.stage(tree)

    def write(self, tree: Any, draft: Draft, is_stopped: Callable[[], bool]) -> dict[str, Any]:
        """Write a staged tree into a draft. Returns what the manifest is to say of it."""
        shards: Mapping[str, Any] = {}
        if "torch.distributed.tensor" in sys.modules:
            from aengine.checkpoint.formats.sharded import take_out_shards  # noqa: PLC0415 -- it loads torch.distributed

            divided = take_out_shards(tree)
            if divided.shards:
                tree, shards = divided
        write = partial(self._serializer.write, tree)
        draft.write(STATE, write, is_stopped, elsewhere=None if self._process is None else self._process.call)
        if shards:
            directory = draft.path / SUBDIRECTORY
            directory.mkdir(mode=0o700)
            self._shards().write(shards, directory)
            for path in sorted(directory.iterdir()):
                path.chmod(0o600)
                draft.add(files.measure(path))
        return {"serializer": self._serializer.name, "shards": len(shards)}

    def read(self, info: CheckpointInfo, live: Callable[[], Any], places: tuple[str, ...] = ("",)) -> Mapping[str, Any]:
        """Return the tree of a checkpoint that verifies, with shards as the live tree has them at these places.

        The live tree is not changed. With the checksums right, a file may yet have been forged.

        Raises:
            CheckpointDamaged: a file is not what the serializer wrote, or that is no state of a run of so many steps.
            CheckpointMismatch: another serializer wrote it; or it has shards, and they do not fit the live tree.
        """
        written_by = info.extra.get("serializer")
        if written_by != self._serializer.name:
            raise CheckpointMismatch(
                f"{info.path} was written by the serializer {written_by!r}, and is to be read by"
                f" {self._serializer.name!r}: pass the Checkpoint the serializer= it was written by"
            )
        with os.fdopen(files.open_to_read(info.path / STATE), "rb") as file:
            tree: Any = self._serializer.read(file)
        shards = info.extra.get("shards", 0)
        if shards:
            _check(_is_divided(tree, shards), info, f"{shards} shards, and the places where they belong")
        whole = tree["state"] if shards else tree
        _check(is_captured(whole), info, "the state of a run")
        step = whole["engine"].get("iteration")
        _check(step == info.step, info, f"what was saved after {info.step} iterations, but after {step!r:.20}")
        if shards:
            from aengine.checkpoint.formats.sharded import put_in_shards  # noqa: PLC0415 -- it loads torch.distributed

            tree, into = put_in_shards(tree, live(), places)
            known = {file.name.removeprefix(f"{SUBDIRECTORY}/") for file in info.files}
            self._shards().read(into, info.path / SUBDIRECTORY, known)
        return cast("Mapping[str, Any]", tree)

    def _shards(self) -> "ShardStore":
        from aengine.checkpoint.formats.sharded import ShardStore  # noqa: PLC0415 -- it loads torch.distributed

        if self._shard_store is None:
            self._shard_store = ShardStore()
        return self._shard_store

    def start(self) -> None:
        """Start the other process, if that is to write, without waiting for the seconds in which it loads torch."""
        if self._process is not None:
            self._process.start()

    def stop(self) -> None:
        """Give up a write in another process, which does not ask whether to stop. From any thread."""
        if self._process is not None:
            self._process.terminate()

    def close(self) -> None:
        """Let the other process end, and wait for that."""
        if self._process is not None:
            self._process.close()


def _check(is_so: bool, info: CheckpointInfo, what: str) -> None:  # noqa: FBT001 -- as of an assertion
    if not is_so:
        raise CheckpointDamaged(f"{info.path / STATE} does not hold {what}")


def _is_divided(tree: Any, shards: int) -> bool:
    """Say whether this is what `take_out_shards()` has made of a tree."""
    if not isinstance(tree, dict) or tree.keys() != {"state", "shards"} or not isinstance(tree["shards"], dict):
        return False
    places: dict[Any, Any] = tree["shards"]
    return all(type(one) is str for one in (*places, *places.values())) and len({*places.values()}) == shards

"""State that is spread over several processes: each writes its own shards, and torch finds them again on any number.

A DTensor cannot be in a torch file that any rank reads by itself. So it is taken out of the tree, and written by
torch.distributed.checkpoint (DCP): only the tensors, into a directory of their own. DCP's
index is a pickle, and so would be whatever in it is no tensor: it is read here first, by an unpickler that knows the
classes of an index of tensors and no other.
"""

import io
import pickle
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import filesystem, metadata, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from aengine.checkpoint.capture.staging import distribute_like
from aengine.checkpoint.capture.trees import path_text, rebuild
from aengine.checkpoint.formats.archive import PlainUnpickler, Window, check_archive
from aengine.checkpoint.store.files import sync_directory
from aengine.errors import CheckpointDamaged, CheckpointMismatch, CheckpointNotWritten


class Divided(NamedTuple):
    """A tree in two parts."""

    tree: dict[str, Any]  # can be written by any serializer: the rest, and the places that are empty in it
    shards: dict[str, DTensor]  # by the place where it stands first


def take_out_shards(tree: Any) -> Divided:
    """Divide a tree. The DTensors are those of the tree: staged ones if it was staged."""
    shards: dict[str, DTensor] = {}
    places: dict[str, str] = {}  # and for each the name of the shard that belongs there
    names: dict[int, str] = {}

    def replace(leaf: Any, path: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        place = path_text(path)
        name = places[place] = names.setdefault(id(leaf), place)
        shards[name] = leaf
        return None

    # Beside the user's tree, not in it, so that nothing of theirs can be taken for a place.
    return Divided({"state": rebuild(tree, replace), "shards": places}, shards)


def put_in_shards(divided: Mapping[str, Any], live: Any, within: tuple[str, ...] = ("",)) -> Divided:
    """Return the tree that was divided, with DTensors as a live one has them in the empty places; and these, to read.

    They are new ones, on the CPU: what is being read may turn out to be damaged, or be given up.

    Args:
        divided: what `take_out_shards` made of a tree.
        live: a tree of the same form.
        within: how the places begin that are to be filled; the others stay empty.

    Raises:
        CheckpointMismatch: the live tree has no DTensor where one was saved.
    """
    found: dict[str, DTensor] = {}

    def find(leaf: Any, path: Any) -> Any:
        if isinstance(leaf, DTensor):
            found[path_text(path)] = leaf
        return leaf

    rebuild(live, find)
    saved: dict[str, str] = divided["shards"]
    places = {place: name for place, name in saved.items() if place.startswith(within)}
    missing = [place for place in places if place not in found]
    if missing:
        raise CheckpointMismatch(
            f"the checkpoint has sharded tensors where the state that it is to be loaded into has none, {len(missing)} "
            f"of them, the first at {missing[0]}. An optimizer has no state before its first step: make it with "
            "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer)."
        )

    empty: dict[str, Any] = {}
    for place, name in places.items():
        like = found[place]
        empty[name] = distribute_like(like, torch.zeros_like(like.to_local().detach(), device="cpu"))

    def replace(leaf: Any, path: Any) -> Any:
        place = path_text(path) if leaf is None else ""
        return empty[places[place]] if place in places else leaf

    return Divided(rebuild(divided["state"], replace), empty)


class ShardStore:
    """Writes and reads DTensors. All ranks make one, at the same point of the program, and call it alike.

    It talks over a process group of its own, so that it may be called from another thread than the step is in, whose
    collectives it would otherwise get between. It is of gloo whatever the step uses, for the tensors are on the CPU.
    """

    def __init__(self) -> None:
        self._group = cast(ProcessGroup, torch.distributed.new_group(backend="gloo"))

    def write(self, shards: Mapping[str, DTensor], directory: Path) -> None:
        """Write this rank's part, and return when all ranks have and it is on the disk. The directory must be new.

        Raises:
            CheckpointNotWritten: a rank could not write. Then it is raised on all of them.
        """
        writer = filesystem.FileSystemWriter(directory, sync_files=True, overwrite=False)
        try:
            state_dict_saver.save(dict(shards), storage_writer=writer, process_group=self._group)
        except CheckpointException as error:  # which is no Exception
            rank, cause = _first_failure(error)
            raise CheckpointNotWritten(f"rank {rank} could not write its shards: {cause}") from cause
        sync_directory(directory)

    def read(self, shards: Mapping[str, DTensor], directory: Path, known: Container[str] | None = None) -> None:
        """Read into these DTensors, in place, however they are divided now.

        Args:
            shards: by the names under which they were written.
            directory: what `write()` has made.
            known: the names of files there that are as they were written; any other is not read. By default: all.

        Raises:
            CheckpointDamaged: the files are not what `write()` left.
            CheckpointMismatch: they are, but of tensors of other names, shapes or types.
        """
        index = _read_index(directory / ".metadata")
        for place in index.storage_data.values():
            if known is not None and place.relative_path not in known:
                raise CheckpointDamaged(
                    f"{directory} has an index that names {place.relative_path!r}, which is unknown"
                )
        _compare(index, shards)
        reader = _Reader(directory)
        try:
            state_dict_loader.load(dict(shards), storage_reader=reader, process_group=self._group)
        except CheckpointException as error:
            rank, cause = _first_failure(error)
            raise CheckpointDamaged(f"rank {rank} could not read its shards: {cause}") from cause


class _Reader(filesystem.FileSystemReader):
    """Reads the index as carefully as we do, and looks at each shard before it is unpacked."""

    def read_data(self, plan: Any, planner: Any) -> Any:
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            with (Path(self.path) / place.relative_path).open("rb") as file:
                check_archive(io.BufferedReader(Window(file, place.offset, place.length)))
        return super().read_data(plan, planner)

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        index = _read_index(Path(self.path) / ".metadata")
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index


_PLACE = filesystem._StorageInfo  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
"""Where a shard is. It has no public name."""

# All that the index of a checkpoint of tensors refers to. Of what is no tensor there is a BytesStorageMetadata, and
# that is left out here on purpose: DCP unpickles what it stands for.
_OF_AN_INDEX: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        # What a tensor's properties are pickled as. It has no public name.
        metadata._MEM_FORMAT_ENCODING,  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
        _PLACE,
        torch.Size,
    )
}


class _IndexUnpickler(PlainUnpickler):
    """Knows the classes of an index, and no others: nothing that a pickle asks for is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _OF_AN_INDEX:
            return _OF_AN_INDEX[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout_of
        if module in {"pathlib", "pathlib._local"} and name in {"PosixPath", "WindowsPath"}:
            return _ignore  # where the checkpoint was written to
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which an index of tensors has no use for")


def _layout_of(_: str) -> torch.layout:
    return torch.strided


def _ignore(*_: object) -> None:
    return None


def _read_index(path: Path) -> metadata.Metadata:
    try:
        with path.open("rb") as file:
            # Of its bytes, and not of the file, which would make room for as many as a number in it says.
            index: metadata.Metadata = _IndexUnpickler(io.BytesIO(file.read())).load()
        _check_index(index)
    except FileNotFoundError as error:
        raise CheckpointDamaged(f"{path} is missing, and it says where the shards are") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}. Nothing of it was executed.") from error
    return index


def _check_index(index: Any) -> None:
    """Raise an error of any kind if an index is not of the form that DCP gives it, or leads out of its directory."""
    if not isinstance(index, metadata.Metadata):
        raise ValueError("it is no index of shards")  # noqa: TRY004 -- no argument is wrong
    described: dict[str, Any] = {**index.state_dict_metadata}  # by the file, and not by these types
    for name, one in described.items():
        is_known = isinstance(one, metadata.TensorStorageMetadata) and isinstance(cast(Any, one).size, torch.Size)
        if not is_known or not isinstance(one.properties.dtype, torch.dtype):
            raise ValueError(f"it says of {name!r} that it is {type(one).__name__}, which is no tensor")
        if sum(int(chunk.sizes.numel()) for chunk in one.chunks) != one.size.numel():
            raise ValueError(f"it has other parts of {name!r} than make up its size")
    for place in index.storage_data.values():
        if not isinstance(place, _PLACE) or type(place.relative_path) is not str:
            raise ValueError("it has a place that is none")
        if Path(place.relative_path).name != place.relative_path or getattr(place, "transform_descriptors", None):
            raise ValueError(f"it refers to {place.relative_path!r}, which is no plain file beside it")


def _compare(index: metadata.Metadata, shards: Mapping[str, DTensor]) -> None:
    for name, shard in shards.items():
        saved = index.state_dict_metadata.get(name)
        if not isinstance(saved, metadata.TensorStorageMetadata):
            raise CheckpointMismatch(f"there is no sharded tensor {name} in the checkpoint")
        if saved.size != shard.size() or saved.properties.dtype != shard.dtype:
            raise CheckpointMismatch(
                f"{name} was saved as {saved.properties.dtype} of shape {tuple(saved.size)}, and is to be loaded into "
                f"{shard.dtype} of shape {tuple(shard.size())}"
            )


def _first_failure(error: CheckpointException) -> tuple[int, BaseException]:
    rank, (cause, _) = min(error.failures.items())
    return rank, cause

"""Serializers: how a staged tree becomes a file, and comes back."""

import contextvars
import errno
import os
import pickle
import reprlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import torch

from aengine.checkpoint.capture.trees import path_text, why_not_loaded
from aengine.checkpoint.formats.archive import NoArchive, check_archive
from aengine.errors import CheckpointDamaged, CheckpointMismatch, NotSerializable
from aengine.extras import missing_package

try:
    from torch.utils.serialization import config as _options
except ImportError:  # before torch 2.7 or so
    _options = None  # type: ignore[assignment]


class Serializer(Protocol):
    """How the state of a checkpoint becomes a file, and comes back: what `Checkpoint(serializer=...)` takes.

    The state is a staged tree: dictionaries, lists, plain values, and tensors on the CPU. `TorchFile` is the default.

    Attributes:
        name: what the manifest calls the format. A checkpoint is only read by a serializer of the same name.
    """

    name: str

    def write(self, tree: Any, file: BinaryIO) -> None:
        """Write a tree, in order: of the file only `write()` and `flush()` are used. What these raise comes out."""
        ...

    def read(self, file: BinaryIO) -> Any:
        """Return the tree that was written, with its tensors on the CPU. Nothing that the file says is executed."""
        ...


class TorchFile:
    """The format of `torch.save()`. It is only read with `weights_only=True`, so that nothing in it is executed."""

    name = "torch"

    def write(self, tree: Any, file: BinaryIO) -> None:
        """Write a tree as torch.save() does, but for the checksums inside: the whole file has a better one.

        Raises:
            OSError: or whatever else the file raised, as the very object, which torch would hide in a RuntimeError.
            NotSerializable: the tree was not staged, and cannot be pickled.
        """
        watched = _WatchedFile(file)
        try:
            _save(tree, cast(BinaryIO, watched))
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
            if watched.error is None:
                raise NotSerializable(f"the state cannot be written: {error}. Staging says where it is.") from error
        except Exception:
            if watched.error is None:
                raise
        if watched.error is not None:  # also where torch's writer forgot it, while it closed the file
            raise watched.error from None

    def read(self, file: BinaryIO) -> Any:
        """Return the tree, with its tensors on the CPU.

        Raises:
            CheckpointDamaged: this is no such file, not a whole one, or one that would take more memory than its size.
            CheckpointMismatch: the file asks for a type that weights_only=True does not load here.
            MemoryError: there is not enough for it.
        """
        try:
            check_archive(file)
        except NoArchive as error:
            raise CheckpointDamaged(f"torch.load() cannot read the file: {error}") from error
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:  # which says nothing of the file
            raise
        except Exception as error:
            if (
                isinstance(error, OSError) and error.errno != errno.EINVAL
            ):  # nor does this; that is a place that is none
                raise
            reason = why_not_loaded(error)
            if "can't allocate memory" in reason:
                raise MemoryError(reason) from error
            if "unsupported" not in reason.lower():
                raise CheckpointDamaged(f"torch.load() cannot read the file: {reason}") from error
            raise CheckpointMismatch(  # not damaged: the type may have been allowed where it was written
                f"torch.load(weights_only=True) refuses what the file asks for: {reason} Nothing of it was executed."
            ) from error


def check_serializer(serializer: Any) -> None:
    """Raise a TypeError if this has not what a Serializer has, or is a class."""
    has_all = isinstance(getattr(serializer, "name", None), str) and all(
        callable(getattr(serializer, name, None)) for name in ("write", "read")
    )
    if isinstance(serializer, type) or not has_all:
        raise TypeError(
            "serializer= is an object with a name and the methods write(tree, file) and read(file), such as"
            f" TorchFile(), got {serializer!r}"
        )


def export_safetensors(tree: Any, path: Path, metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """Write weights for others to load: a tree of dictionaries of tensors, usually `model.state_dict()`.

    The keys on the way to a tensor make its name, with dots between them. Of tied weights the name that sorts first is
    written; the others are recorded in the file's metadata, each with the name that stands for it, as
    `safetensors.torch.save_model()` does, whose `load_model()` ties them again. The file appears when it is whole.

    Returns:
        The names that were left out, each with the one that stands for it.

    Raises:
        NotSerializable: something in the tree is no dense tensor, or two tensors have one name.
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file  # noqa: PLC0415 -- optional, and for this function only
    except ImportError as error:
        raise missing_package("exporting weights", "safetensors>=0.4.5", "checkpoint") from error
    tensors = _named_tensors(tree)
    first: dict[Hashable, str] = {}
    left_out: dict[str, str] = {}
    for name in sorted(tensors):
        kept = first.setdefault(_memory(tensors[name], name), name)
        if kept != name:
            left_out[name] = kept
    # Each in memory of its own, as the format wants it: views of one storage become copies.
    storages = Counter(tensors[name].untyped_storage().data_ptr() for name in first.values())
    written = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        if storages[tensor.untyped_storage().data_ptr()] > 1
        else tensor.contiguous()
        for name, tensor in tensors.items()
        if name not in left_out
    }
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        # Readers such as transformers refuse a file that does not say that it has torch's layout.
        save_file(written, unfinished, {"format": "pt", **(metadata or {}), **left_out})
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except KeyError as error:  # it looks the type up, and says no more than that
        raise NotSerializable(f"safetensors has no type for {error}: convert those tensors first") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return left_out


def _named_tensors(tree: Any) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for leaf, path in _leaves(tree, ()):
        is_plain = type(leaf) in {torch.Tensor, torch.nn.Parameter}
        if not is_plain or leaf.layout is not torch.strided or leaf.is_quantized:
            raise NotSerializable(
                f"{path_text(path)} is no dense tensor but {reprlib.repr(leaf)}, and safetensors holds nothing else: "
                "export the weights only, as in export_safetensors(model.state_dict(), path)"
            )
        name = ".".join(str(step) for step in path)
        if name in tensors:
            raise NotSerializable(
                f"{path_text(path)} would be called {name!r}, and so would another tensor: rename one of them"
            )
        tensors[name] = leaf.detach().resolve_conj().resolve_neg()  # which safetensors would not
    return tensors


def _leaves(tree: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    if isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(tree, list | tuple):
        for index, item in enumerate(tree):
            yield from _leaves(item, (*path, index))
    else:
        yield tree, path


def _memory(tensor: torch.Tensor, name: str) -> Hashable:
    """Return what two tensors have in common if they are the same numbers; an empty one is only itself."""
    if tensor.numel() == 0:
        return name
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.size(), tensor.stride()


class _WatchedFile:
    """Remembers the error of a file, and does not touch it again after one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: Any) -> None:
        self._call(self._file.write, data)

    def flush(self) -> None:
        self._call(self._file.flush)

    def _call(self, method: Callable[..., object], *arguments: Any) -> None:
        if self.error is not None:
            raise self.error
        try:
            method(*arguments)
        except BaseException as error:
            self.error = error
            raise


def _save(tree: Any, file: BinaryIO) -> None:
    """Call torch.save() without its crc32, a third of its time, where that is an option of this context alone."""
    option = getattr(_options, "_config", {}).get("save.compute_crc32")
    if not isinstance(getattr(option, "user_override", None), contextvars.ContextVar):  # one of the whole process
        torch.save(tree, file)
        return

    def save() -> None:
        torch.serialization.set_crc32_options(compute_crc32=False)
        torch.save(tree, file)

    contextvars.copy_context().run(save)

"""Serializers: how a staged tree becomes a file, and comes back."""

import contextvars
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol, cast

import torch
from torch.utils import serialization

from aengine.errors import CheckpointDamaged, CheckpointError, NotSerializable


class Serializer(Protocol):
    """A format for trees that were staged.

    Attributes:
        name: what the manifest calls the format.
    """

    name: str

    def write(self, tree: Any, file: BinaryIO) -> None:
        """Write a tree, in order: of the file only `write()` and `flush()` are used. What these raise comes out."""
        ...

    def read(self, file: BinaryIO) -> Any:
        """Return the tree that was written, with its tensors on the CPU. Nothing that the file says is executed."""
        ...


class TorchFile:
    """The format of `torch.save()`. It is only ever read with `weights_only=True`."""

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
        except Exception as error:
            if watched.error is not None:
                raise watched.error from None
            if isinstance(error, pickle.PicklingError | TypeError | AttributeError | RecursionError):
                raise NotSerializable(f"the state cannot be written: {error}. Staging says where it is.") from error
            raise
        if watched.error is not None:  # which the writer of torch forgets while it closes the file
            raise watched.error

    def read(self, file: BinaryIO) -> Any:
        """Return the tree, with its tensors on the CPU.

        Raises:
            CheckpointDamaged: this is no such file, or not a whole one.
            CheckpointError: the file asks for a type that weights_only=True does not load.
        """
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            # torch's own text is a page, and half of it is about how to do without weights_only.
            reason = (str(error).partition("WeightsUnpickler error: ")[2] or str(error)).strip().partition("\n")[0]
            if "Unsupported" not in reason:
                raise CheckpointDamaged(
                    f"torch.load() cannot read the file: {type(error).__name__}: {reason or 'it ends too early'}"
                ) from error
            raise CheckpointError(
                f"torch.load(weights_only=True) refuses what the file asks for: {reason} Nothing of it was executed."
            ) from error


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
    """Call torch.save() without its crc32, a third of its time, where that can be had without others noticing."""
    options = getattr(getattr(serialization, "config", None), "_config", {})
    option = getattr(options.get("save.compute_crc32"), "user_override", None)
    if not isinstance(option, contextvars.ContextVar):  # before torch 2.13 or so: an option of the whole process
        torch.save(tree, file)
        return

    def save() -> None:
        torch.serialization.set_crc32_options(compute_crc32=False)
        torch.save(tree, file)

    contextvars.copy_context().run(save)

"""Exporting: the weights of one part of a checkpoint, for others to load."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from aengine.checkpoint.formats.contents import Contents
from aengine.checkpoint.formats.serializers import TorchFile, export_safetensors
from aengine.checkpoint.store.find import Finder
from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.checkpoint.store.store import Store
from aengine.errors import CheckpointMismatch, CheckpointNotFound

_WHOLE_STATE = "state"  # what it is called where Checkpoint(...) was given one thing, and no names


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and of what.

    Attributes:
        info: the checkpoint.
        part: the name of the part, with dots between the names that lead to it.
        tensors: how many there are in the file.
        size: of the file, in bytes.
        passed_over: why checkpoints that come before it were not taken.
    """

    info: CheckpointInfo
    part: str
    tensors: int
    size: int
    passed_over: tuple[str, ...]


def export(store: Store, file: Path, *, step: int | None, part: str | None) -> Exported:
    """Write the tensors of a part to a safetensors file, which appears when it is whole.

    Without a step it is the checkpoint that a run would go on from. It is verified, and read with `weights_only=True`.
    Nothing is set aside, and no lock is taken.

    Raises:
        CheckpointNotFound, CheckpointDamaged: there is no such checkpoint, or it is not whole.
        CheckpointMismatch: it has no such part, or several that could be meant; it has shards; or it was written by a
            serializer of the user's.
        NotSerializable: the part holds what the format does not.
        OSError: the file cannot be written.
    """
    if not file.absolute().parent.is_dir():
        raise CheckpointNotFound(f"{file} cannot be written: there is no directory {file.absolute().parent}")
    if file.is_dir():
        raise CheckpointNotFound(f"{file} is a directory: give the file to write, such as {file / 'model.safetensors'}")
    contents = Contents(TorchFile(), in_process=False)
    finder = Finder(store, partial(contents.read, live=_nothing_live), sets_aside=False)
    found = finder.find("latest" if step is None else step, required=True)
    assert found is not None, "it must be there"  # noqa: S101
    name, tensors = _choose(_parts_in(found.tree["state"]), part)
    left_out = export_safetensors(tensors, file, {"step": str(found.info.step)})
    passed_over = tuple(problem.why for problem in finder.problems)
    return Exported(found.info, name, len(tensors) - len(left_out), file.stat().st_size, passed_over)


def _nothing_live() -> NoReturn:
    raise CheckpointMismatch(
        "the checkpoint has shards, which are read into those of a run only: restore it, and export there, with"
        " export_safetensors(model.state_dict(), path)"
    )


def _parts_in(state: Any) -> dict[str, Any]:
    """Return what could be exported, by name: each that consists of tensors, at whatever depth it is."""
    if not isinstance(state, Mapping):
        return {}
    named: Mapping[Any, Any] = state
    if named and all(isinstance(one, torch.Tensor) for one in named.values()):
        return {_WHOLE_STATE: named}
    found: dict[str, Any] = {}
    for name, one in named.items():
        for inner, tensors in _parts_in(one).items():
            found[str(name) if inner == _WHOLE_STATE else f"{name}.{inner}"] = tensors
    return found


def _choose(parts: dict[str, Any], name: str | None) -> tuple[str, Any]:
    """Return the part of that name; without one "model", or the only one that looks like a module's."""
    modules = [each for each, tensors in parts.items() if isinstance(tensors, OrderedDict)]
    if name is None and "model" in parts:
        name = "model"
    elif name is None and len(modules) == 1:
        name = modules[0]
    if name in parts:
        return name, parts[name]
    there_are = f"it has {', '.join(parts)}" if parts else "it has no part that consists of tensors only"
    if name is None:
        raise CheckpointMismatch(f"which part is to be exported? Say it with --part: {there_are}")
    raise CheckpointMismatch(f"the checkpoint has no part {name!r} that could be exported: {there_are}")

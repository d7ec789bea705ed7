"""What a state may consist of: trees that `torch.load(weights_only=True)` gives back as they were.

That loader takes a few types and no others, not even their subclasses. It says so when a run is to be resumed, which
is too late; so what it would refuse is refused when it is saved, with its place in the state.
"""

import dataclasses
import datetime as dt
import functools
import io
import reprlib
import sys
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set as AbstractSet
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from typing import Any, cast

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from aengine.callables import type_name
from aengine.errors import NotSerializable

_IMMUTABLE: frozenset[type] = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.Size}
)
_MAPPINGS: frozenset[type] = frozenset({dict, OrderedDict, Counter})
_CONTAINERS: frozenset[type] = _MAPPINGS | {list, tuple, set}

# pickle is recursive and gives up at some 490 levels under Python 3.11's default limit, in a thread that does no more.
DEEPEST = 300

# The longest that protocol 2 has room for in the opcode that the loader knows: 255 bytes, one bit of them the sign.
_LARGEST_INTEGER_BITS = 255 * 8 - 1


class Attribute(str):
    """A step of a path that is an attribute; any other step is a key or an index."""

    __slots__ = ()


def path_text(path: Iterable[Any], root: str | None = "state") -> str:
    """Return a path as one writes it: `state['optimizer']['param_groups'][0]['lr']`.

    Args:
        path: keys, indices and attributes, from the root on.
        root: what the tree is called; None if its first keys are names themselves.
    """
    if root is None:
        root, *path = path
    return str(root) + "".join(f".{step}" if type(step) is Attribute else f"[{step!r}]" for step in path)


def why_not_loaded(error: Exception) -> str:
    """Return the part of an error of `torch.load()` that is about the file, on one line.

    The rest is a page, half of it about how to do without weights_only.
    """
    lines = str(error).strip().splitlines() or ["it ends too early"]
    about_the_file = [line for line in lines if "WeightsUnpickler error: " in line or "GLOBAL" in line]
    reason = (about_the_file or lines)[0].rpartition("WeightsUnpickler error: ")[2].strip()
    return f"{type(error).__name__}: {reason}"


def rebuild(tree: Any, replace: Callable[[Any, Sequence[Any]], Any]) -> Any:
    """Return the same tree in new containers, with `replace(leaf, path)` in the place of every leaf.

    A container that is in the tree twice is in the result twice, as one. The tree must be one that was surveyed, or
    loaded. The path changes when the call is over.
    """
    path: list[Any] = []
    rebuilt: dict[int, Any] = {}

    def build(value: Any) -> Any:
        kind = type(value)
        if kind not in _CONTAINERS:
            return replace(value, path)
        if id(value) in rebuilt:
            return rebuilt[id(value)]
        built: Any = set(value) if kind is set else kind() if kind in _MAPPINGS else []
        path.append(None)
        if kind in _MAPPINGS:
            for path[-1], item in value.items():
                built[path[-1]] = build(item)
            if kind is OrderedDict:
                for name, item in vars(value).items():
                    path[-1] = Attribute(name)
                    setattr(built, name, build(item))
        elif kind is not set:
            for path[-1], item in enumerate(value):
                built.append(build(item))
            built = tuple(built) if kind is tuple else built
        path.pop()
        rebuilt[id(value)] = built
        return built

    return build(tree)


class Survey:
    """Looks at all of a tree before anything of it is copied, and refuses what could not be loaded back.

    Attributes:
        tensors: every tensor of the tree that holds numbers in memory, once, by its id; of a DTensor its local shard.
        substitutes: copies of what is neither a container nor such a tensor nor immutable, by the id of the original.
        shards: each DTensor, by its id, and its local shard, which is among the tensors.
    """

    def __init__(self, tree: Any, root: str | None = "state") -> None:
        self._root = root
        self.tensors: dict[int, torch.Tensor] = {}
        self.substitutes: dict[int, Any] = {}
        self.shards: dict[int, tuple[Any, torch.Tensor]] = {}
        self._path: list[Any] = []
        self._open: set[int] = set()
        self._seen: set[int] = set()
        # None where it is not loaded, and so there can be no DTensor: importing it takes a while.
        self._distributed_tensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
        self._look(tree)

    def _look(self, value: Any) -> None:
        kind = type(value)
        if kind in _IMMUTABLE:
            self._look_at_immutable(value, kind)
        elif kind in _CONTAINERS:
            if id(value) not in self._seen:
                self._look_into(value, kind)
        elif isinstance(value, torch.Tensor):
            self._look_at_tensor(value, kind)
        elif kind is bytearray:
            self.substitutes[id(value)] = bytearray(value)
        else:
            self._look_at_other(value)

    def _look_into(self, value: Any, kind: type) -> None:
        path, look = self._path, self._look
        if id(value) in self._open:
            raise self._refusal("contains itself", "leave that reference out")
        if len(path) >= DEEPEST:
            raise self._refusal(f"is more than {DEEPEST} levels deep, which pickle cannot write", "flatten it")
        self._open.add(id(value))
        path.append(None)
        if kind in _MAPPINGS:
            for path[-1], item in value.items():
                self._look_at_key(path[-1])
                look(item)
            if kind is OrderedDict:  # nn.Module.state_dict() keeps the versions of its modules in such an attribute
                for name, item in vars(value).items():
                    path[-1] = Attribute(name)
                    look(item)
        elif kind is set:
            for path[-1] in value:
                self._look_at_key(path[-1])
        else:
            for path[-1], item in enumerate(value):
                look(item)
        path.pop()
        self._open.remove(id(value))
        self._seen.add(id(value))

    def _look_at_immutable(self, value: Any, kind: type) -> None:
        if kind is int and value.bit_length() > _LARGEST_INTEGER_BITS:
            raise self._refusal(f"is an integer of {value.bit_length()} bits", "write hex(x) instead")
        if kind is bytes and not value:
            raise self._refusal("is empty bytes", "write bytearray() or None instead")

    def _look_at_key(self, key: Any) -> None:
        """Refuse what torch would not load, and what changes or is equal to itself only, as tensors are."""
        kind = type(key)
        if kind is str:
            return
        if kind is tuple:
            for part in key:
                self._look_at_key(part)
        elif kind in _IMMUTABLE:
            self._look_at_immutable(key, kind)
        else:
            raise self._refusal(f"is a key of type {type_name(kind)}", _advice(key))

    def _look_at_tensor(self, value: torch.Tensor, kind: type) -> None:
        if id(value) in self.tensors or id(value) in self.substitutes or id(value) in self.shards:
            return
        if kind is self._distributed_tensor:
            local: torch.Tensor = cast(Any, value).to_local()
            self._path.append(Attribute("to_local()"))
            self._look_at_tensor(local, type(local))
            self._path.pop()
            self.shards[id(value)] = value, local
        elif kind is not torch.Tensor and kind is not torch.nn.Parameter:
            self._look_at_other(value)
        elif value.is_meta:
            raise self._refusal(
                "is a tensor on the meta device, which has no numbers",
                "give its module memory with to_empty(device=...), and fill it",
            )
        elif value.layout is torch.strided and not value.is_quantized and not value.is_nested:
            if value.untyped_storage().nbytes() == 0 and value.numel() > 0:  # copying that would crash the process
                raise self._refusal(
                    "is a tensor whose memory has been freed, as FSDP does between uses",
                    "take the state_dict() where its numbers are gathered",
                )
            self.tensors[id(value)] = value
        elif value.layout is torch._mkldnn:  # type: ignore[attr-defined]  # noqa: SLF001 -- it has no other name
            raise self._refusal("is a tensor in the layout of mkldnn", "write x.to_dense() instead")
        else:  # a layout that is rare, and consists of more than one piece of memory
            self.substitutes[id(value)] = value.detach().to("cpu", copy=True).requires_grad_(value.requires_grad)

    def _look_at_other(self, value: Any) -> None:
        kind = type(value)
        allowed = _allowed_by_user()
        if not any(each is kind or each is value for each in allowed):
            raise self._refusal(f"is of type {type_name(kind)}: {reprlib.repr(value)}", _advice(value))
        if id(value) in self.substitutes:
            return
        try:
            self.substitutes[id(value)] = _copy_by_saving(value)
        except Exception as error:
            raise self._refusal(
                f"is of type {type_name(kind)}, which was allowed, but does not load: {why_not_loaded(error)}",
                "allow the types that it consists of as well, or write what it consists of instead",
            ) from error

    def _refusal(self, what: str, advice: str) -> NotSerializable:
        place = path_text(self._path, self._root)
        return NotSerializable(
            f"{place} {what}. torch.load(weights_only=True) would not give it back, so it is not saved: {advice}."
        )


def _allowed_by_user() -> list[Any]:
    """Return what was given to `torch.serialization.add_safe_globals()`."""
    return [each[0] if isinstance(each, tuple) else each for each in torch.serialization.get_safe_globals()]


def _copy_by_saving(value: Any) -> Any:
    """Return a copy that shares nothing, and has shown that it loads: a type being allowed says little of its parts."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


_LEAVE_OUT = "leave it out of the state, and give it again when the run is built"

# In this order: an IntEnum is an int, a datetime is a date, a namedtuple is a tuple.
_ADVICE: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (Enum, "write x.value or x.name instead"),
    ((UninitializedBuffer, UninitializedParameter), "run a batch through the lazy module before the first save"),
    (torch.Tensor, "write x.as_subclass(torch.Tensor) instead, or what it consists of"),
    (torch.Generator, "write x.get_state() instead"),
    (PurePath, "write str(x) instead"),
    ((dt.date, dt.time), "write x.isoformat() instead"),
    (dt.timedelta, "write x.total_seconds() instead"),
    ((Decimal, Fraction), "write str(x) instead"),
    *((kind, f"write {kind.__name__}(x) instead") for kind in (str, bytes, bytearray, int, float, complex)),
    (Mapping, "write dict(x) instead"),
    (frozenset, "write set(x) or sorted(x) instead"),
    (AbstractSet, "write set(x) instead"),
    (tuple, "write tuple(x) instead"),
    ((list, deque, range, types.GeneratorType), "write list(x) instead"),
    ((type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial), _LEAVE_OUT),
)


def _advice(value: Any) -> str:
    """Say what to write instead of a value."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return "write torch.from_numpy(x) instead, or x.tolist()"
    if numpy is not None and isinstance(value, numpy.generic):
        return f"write {type_name(type(value.item()))}(x) instead"
    general = (
        "write what it consists of, in numbers, strings, lists and dictionaries; or allow its type with "
        f"torch.serialization.add_safe_globals([{type(value).__qualname__}]), where it is loaded as well"
    )
    if dataclasses.is_dataclass(value):
        general = "write dataclasses.asdict(x) instead"
    if hasattr(value, "state_dict"):
        general = "write x.state_dict() instead"
    return next((advice for kinds, advice in _ADVICE if isinstance(value, kinds)), general)

"""What determines the order of data: the random number generators that it draws from, and samplers that have a state.

The generators are python's, numpy's and torch's that all code of the process shares, where those libraries are loaded,
and those that the data has of its own, wherever in it. They are captured as a pass over the data is opened, and put
back while that pass is opened and fetched once more, to go on in its middle.
"""

import base64
import copy
import logging
import random
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import islice
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, ClassVar, NamedTuple, cast

_logger = logging.getLogger("aengine.data")

_MOST_OBJECTS = 10_000
"""So many objects of the data are looked at."""

_MOST_ITEMS = 1_000
"""So many items of a list or a dictionary are looked at: a dataset may be a list of millions."""

_FIXED = frozenset({list, tuple, range, str, bytes, dict, type(None)})
"""Data that comes in the same order each time, whatever is drawn."""

_LEAVES = frozenset(
    {int, float, complex, bool, str, bytes, bytearray, type(None), range, slice, type, ModuleType, BuiltinFunctionType}
)


class Opening:
    """Where the generators of the process and of the data stood, and its samplers, as a pass over the data was opened.

    Attributes:
        process: the states of the generators that all share, by library.
        own: the states of those of the data, and of its samplers, by the path to them: each its kind, and its state.
        has_workers: whether a DataLoader had workers that it keeps.
    """

    def __init__(self, process: dict[str, Any], own: dict[str, tuple[str, Any]], *, has_workers: bool | None) -> None:
        self.process = process
        self.own = own
        self.has_workers = has_workers
        self._plain: dict[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """Return the same as plain values, which JSON can write: what `from_plain` takes."""
        if self._plain is None:
            self._plain = {
                "process": plain(self.process),
                "own": {
                    path: [kind, state if kind == "sampler" else plain(state)]  # a sampler's is the user's
                    for path, (kind, state) in self.own.items()
                },
                "has_workers": self.has_workers,
            }
        return self._plain

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opening) and self.plain() == other.plain()

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    @classmethod
    def from_plain(cls, saved: "Opening | Mapping[str, Any] | None") -> "Opening | None":
        """Return what was saved; where it was not saved but kept, that."""
        if saved is None or isinstance(saved, Opening):
            return saved
        own = {
            path: (kind, state if kind == "sampler" else not_plain(state))
            for path, (kind, state) in saved["own"].items()
        }
        return cls(not_plain(saved["process"]), own, has_workers=saved["has_workers"])


def capture(data: Any) -> Opening | None:
    """Return where the generators stand; None for data whose order none can change."""
    if type(data) in _FIXED:
        return None
    own = {path: (kind, _state_of(kind, found)) for path, kind, found in _find(data)}
    return Opening(capture_process(), own, has_workers=has_workers(data))


def restore(opening: Opening, data: Any) -> None:
    """Put the generators and the samplers back to where they stood.

    Raises:
        ValueError: the data lacks a generator, or a sampler, that it had.
    """
    if opening.has_workers:
        start_workers(data)
    restore_own(opening, data)
    restore_process(opening.process)
    if opening.has_workers is False and has_workers(data):
        # It drew this as it started them, and does not start them again.
        torch = cast(Any, sys.modules["torch"])
        torch.empty((), dtype=torch.int64).random_(generator=data.generator)


def restore_own(opening: Opening, data: Any, *, with_samplers: bool = True) -> None:
    """Put back only the data's own generators, and its samplers unless these are left out.

    Raises:
        ValueError: the data lacks one that it had.
    """
    if not opening.own:
        return
    found = {path: one for path, _, one in _find(data)}
    if absent := [path for path in opening.own if path not in found]:
        raise ValueError(
            f"the data ({type(data).__qualname__}) has no random number generator or sampler at {', '.join(absent)},"
            " and had one when its position was taken: build it as it was built then"
        )
    samplers_first = sorted(opening.own.items(), key=lambda item: item[1][0] != "sampler")
    for path, (kind, state) in samplers_first:  # loading a sampler may seed its generator
        if kind != "sampler" or with_samplers:
            _put_back(kind, found[path], state)


# The generators that all code of the process shares


def capture_process() -> dict[str, Any]:
    """Return where python's generator stands, numpy's and torch's if they are loaded, and CUDA's if it is in use."""
    states: dict[str, Any] = {"python": random.getstate()}
    if numpys := _loaded("numpy.random", "get_state"):
        states["numpy"] = numpys.get_state(legacy=False)
    if torch := _loaded("torch", "get_rng_state"):
        states["torch"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_process(states: Mapping[str, Any]) -> None:
    """Put them back to where they stood."""
    random.setstate(tuple(states["python"]))
    if "numpy" in states and (numpys := _loaded("numpy.random", "set_state")):
        numpys.set_state(states["numpy"])
    if torch := _loaded("torch", "set_rng_state"):
        if "torch" in states:
            torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_initialized():
            torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])


def _loaded(name: str, attribute: str) -> Any:
    """Return a library if it is loaded; this package must not be what loads it."""
    module = sys.modules.get(name)
    return module if hasattr(module, attribute) else None  # another thread may be importing it


# Those of the data


def _find(data: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield the path, the kind and the object of each generator, and of each sampler that has a state, once."""
    has_own_state = hasattr(data, "state_dict")  # which has that of its samplers
    for path, found in walk(data):
        about = _about(type(found))
        if about.generator:
            yield path, about.generator, found
        elif about.has_state and not has_own_state and path and (about.is_sampler or "sampler" in path.lower()):
            yield path, "sampler", found


def walk(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield what the data is made of, itself first, each object once, with the path to it: breadth first, bounded."""
    seen: dict[int, Any] = {id(data): data}  # holds them, so that no id is used again
    to_do: deque[tuple[str, Any]] = deque([("", data)])
    while to_do:
        path, owner = to_do.popleft()
        yield path, owner
        for name, value in _parts_of(owner):
            if id(value) in seen or _about(type(value)).is_leaf:
                continue
            if len(seen) >= _MOST_OBJECTS:
                _logger.debug("the data is made of more than %d objects; the rest is not looked at", _MOST_OBJECTS)
                yield from to_do
                return
            seen[id(value)] = value
            to_do.append((path + name, value))


class _About(NamedTuple):
    """What is to be known of a type."""

    generator: str  # which kind of generator it is, "" if it is none
    is_leaf: bool  # nothing that orders data is in it
    is_opaque: bool  # nothing in it is looked at but what a function refers to
    is_sampler: bool
    has_state: bool
    slots: tuple[str, ...]


def _look_at(kind: type) -> _About:
    has_state = hasattr(kind, "state_dict") and hasattr(kind, "load_state_dict")
    return _About(
        generator=_generator_kind(kind),
        is_leaf=kind in _LEAVES or issubclass(kind, _type_of("torch", "Tensor") + _type_of("numpy", "ndarray")),
        # An engine leads to what its steps draw from.
        is_opaque=issubclass(kind, type | FunctionType | MethodType) or hasattr(kind, "fire_event"),
        is_sampler=issubclass(kind, _type_of("torch.utils.data", "Sampler")),
        # A model, an optimizer or an engine is nothing that orders data.
        has_state=has_state and not (hasattr(kind, "zero_grad") or hasattr(kind, "fire_event")),
        slots=tuple(_slots_of(kind)),
    )


_about: Callable[[type], _About] = lru_cache(maxsize=1_024)(_look_at)


def _generator_kind(kind: type) -> str:
    if issubclass(kind, random.Random):
        return "" if issubclass(kind, random.SystemRandom) else "python"
    for name in ("Generator", "RandomState", "BitGenerator"):
        if issubclass(kind, _type_of("numpy.random", name)):
            return f"numpy {name}"
    return "torch" if issubclass(kind, _type_of("torch", "Generator")) else ""


def _type_of(module: str, name: str) -> tuple[type, ...]:
    """Return a type of a library, as a tuple; an empty one if it is not loaded, since nothing is of that type then."""
    loaded = sys.modules.get(module)
    return (getattr(loaded, name),) if hasattr(loaded, name) else ()


def _slots_of(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots: Any = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                is_private = name.startswith("__") and not name.endswith("__")
                yield f"_{base.__name__.lstrip('_')}{name}" if is_private else name


def _parts_of(owner: Any) -> Iterator[tuple[str, Any]]:  # noqa: C901, PLR0912 -- a branch for each kind of object
    about = _about(type(owner))
    if about.generator:
        return
    if isinstance(owner, dict):
        for key, value in islice(cast(dict[str, Any], owner).items(), _MOST_ITEMS):
            yield f"[{key!r}]" if type(key) in _LEAVES else "[]", value
    elif isinstance(owner, list | tuple | set | frozenset | deque):
        for index, value in enumerate(islice(cast(list[Any], owner), _MOST_ITEMS)):
            yield f"[{index}]", value
    elif isinstance(owner, FunctionType):
        yield from _parts_of_function(owner)
    elif isinstance(owner, MethodType):
        yield "", owner.__self__
        if isinstance(owner.__func__, FunctionType):
            yield from _parts_of_function(owner.__func__)
    elif isinstance(owner, partial):
        of_partial = cast("partial[object]", owner)
        yield ".func", of_partial.func
        yield ".args", of_partial.args
        yield ".keywords", of_partial.keywords
    if about.is_opaque:
        return
    attributes: dict[str, Any] = getattr(owner, "__dict__", {})
    for name, value in list(attributes.items()):
        if name != "_iterator":  # of a DataLoader that keeps its workers
            yield f".{name}", value
    for name in about.slots:
        if (value := getattr(owner, name, None)) is not None:
            yield f".{name}", value


def _parts_of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # not set yet
            continue
    if function.__defaults__ or function.__kwdefaults__:
        yield ".defaults", (function.__defaults__, function.__kwdefaults__)
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if _about(type(value)).generator:  # and nothing else: most of a program can be reached from there
            yield f".{name}", value


def _state_of(kind: str, value: Any) -> Any:
    if kind == "python":
        return value.getstate()
    if kind == "numpy Generator":
        return value.bit_generator.state
    if kind == "numpy RandomState":
        return value.get_state(legacy=False)
    if kind == "numpy BitGenerator":
        return value.state
    return value.get_state() if kind == "torch" else copy.deepcopy(value.state_dict())


def _put_back(kind: str, value: Any, state: Any) -> None:
    if kind == "python":
        value.setstate(tuple(state))
    elif kind == "numpy Generator":
        value.bit_generator.state = state
    elif kind == "numpy RandomState":
        value.set_state(state)
    elif kind == "numpy BitGenerator":
        value.state = state
    elif kind == "torch":
        value.set_state(state)
    else:
        value.load_state_dict(copy.deepcopy(state))


# DataLoaders that keep their workers


def has_workers(data: Any) -> bool | None:
    """Say whether a DataLoader has workers that it keeps from pass to pass; None if it keeps none."""
    if not (getattr(data, "persistent_workers", False) and getattr(data, "num_workers", 0)):
        return None
    return getattr(data, "_iterator", None) is not None  # it has no public name


def start_workers(data: Any) -> None:
    """Start them, as was done before, if there are none. The loader draws a seed then, and not in later passes."""
    if has_workers(data) is False:
        before = capture_process()
        iter(data)  # what they fetch now is given up by the next pass
        restore_process(before)


# As plain values


def plain(state: Any) -> Any:  # noqa: PLR0911 -- a return for each kind of value
    """Return a state as plain values: arrays of numbers as text, everything else as it is."""
    kind = type(state)
    if kind in (int, float, str, bool, type(None)):
        return state
    if kind is dict:
        return {name: plain(one) for name, one in cast(dict[str, Any], state).items()}
    if kind is tuple and state and type(state[0]) is int and len(state) > _IS_LONG:
        return {_NUMBERS: _text(struct.pack(f"<{len(state)}I", *state))}
    if kind in (tuple, list):
        return [plain(one) for one in state]
    if kind.__module__.partition(".")[0] == "torch" and str(state.dtype) == "torch.uint8":
        return {_TENSOR: _text(bytes(state.tolist()))}
    if kind.__name__ == "ndarray":
        return {_ARRAY: state.dtype.str, "data": _text(state.tobytes())}
    if kind.__module__ == "numpy":
        return state.item()
    return state


_IS_LONG = 16
_NUMBERS, _TENSOR, _ARRAY = "numbers as base64", "tensor as base64", "array as base64"


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def not_plain(saved: Any) -> Any:
    """Return the state that `plain` made this of. Python's is taken as tuples only."""
    if isinstance(saved, dict):
        held = cast(dict[str, Any], saved)
        if _NUMBERS in held:
            content = base64.b64decode(held[_NUMBERS])
            return struct.unpack(f"<{len(content) // 4}I", content)
        if _TENSOR in held:
            torch = cast(Any, sys.modules["torch"])
            return torch.frombuffer(bytearray(base64.b64decode(held[_TENSOR])), dtype=torch.uint8)
        if _ARRAY in held:
            numpy = cast(Any, sys.modules["numpy"])
            return numpy.frombuffer(base64.b64decode(held["data"]), dtype=held[_ARRAY]).copy()
        return {name: not_plain(one) for name, one in held.items()}
    return [not_plain(one) for one in cast(list[object], saved)] if isinstance(saved, list) else saved

"""Parts: what a checkpoint is made of: the user's state, the engine, its metrics, and handlers that have state.

What users hand in is turned at once into a tree of what has `state_dict` and `load_state_dict`. It is read into
one tree of plain values and tensors, and loaded from one.
"""

import logging
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias, cast

import torch

from aengine.callables import type_name
from aengine.checkpoint.capture.metrics import MetricPart, is_metric
from aengine.checkpoint.capture.modules import PlainNames, unwrap
from aengine.checkpoint.capture.randomness import PythonGenerator
from aengine.checkpoint.capture.trees import path_text
from aengine.engine import Engine, stateful_listeners
from aengine.errors import CheckpointMismatch
from aengine.state import Stateful

Parts: TypeAlias = "Stateful | dict[str, Parts]"
"""One thing with state, or several by name, nested."""

_logger = logging.getLogger("aengine.checkpoint")


def parts_of(state: Any, path: str = "state") -> Parts:
    """Turn what the user hands in into parts: DDP and compiled modules unwrapped, random generators given a state_dict.

    A metric of torchmetrics is given a state_dict that has its state. An engine is one that the handlers of another
    run: it goes on as it would have in memory.

    Raises:
        TypeError: something in it has no state that could be saved and loaded.
    """
    state = unwrap(state)
    if generator := _generator_of(state):
        return generator
    if isinstance(state, Engine):
        return _NestedEngine(state)
    if is_metric(state):
        return MetricPart(state)
    if isinstance(state, Stateful) and not isinstance(state, type):
        return state
    if isinstance(state, list | tuple):
        state = {str(index): one for index, one in enumerate(cast(list[Any], state))}
    if isinstance(state, Mapping):
        named: Mapping[Any, Any] = state
        if wrong := [name for name in named if type(name) is not str]:
            raise TypeError(f"the names in {path} must be strings, got {wrong[0]!r}")
        return {name: parts_of(one, f"{path}[{name!r}]") for name, one in named.items()}
    raise TypeError(
        f"{path} is {type_name(type(state))}, which has no state_dict() and load_state_dict(): pass a module, an"
        " optimizer, a scheduler, anything that has both, or a dictionary of them, such as"
        ' {"model": model, "optimizer": optimizer}, or a list'
    )


def _generator_of(state: Any) -> Stateful | None:
    """Return the state_dict of a random number generator, None if this is none."""
    if isinstance(state, torch.Generator):
        return _TorchGenerator(state)
    if isinstance(state, random.Random):
        return PythonGenerator(state)
    numpy = sys.modules.get("numpy")
    return _NumpyGenerator(state) if numpy and isinstance(state, numpy.random.Generator) else None


def _by_plain_names(part: Stateful) -> Stateful:
    """Return the part, or, where it is a module in which others are wrapped, its state without their names.

    Whenever it is read or loaded, and not once: parts of a model may be compiled after its Checkpoint was made.
    """
    named = PlainNames(part) if isinstance(part, torch.nn.Module) else None
    return named or part


def capture(parts: Parts, engine: Engine[Any, Any]) -> dict[str, Any]:
    """Read all that belongs to one instant. The values are live: to be copied before the next step."""
    return {
        "state": _read(parts),
        "engine": engine.state_dict(),
        "metrics": _plain_numbers(engine.state.metrics),
        "output": _numbers_only(engine.state.output),
        "handlers": _read(cast(Parts, _listeners(parts, engine)), "handlers"),
    }


def is_captured(tree: Any) -> bool:
    """Say whether this has the form of what `capture` reads, as far as that is the same for all states."""
    return (
        isinstance(tree, dict)
        and "state" in tree
        and "output" in tree
        and all(isinstance(tree.get(one), dict) for one in ("engine", "metrics", "handlers"))
    )


def _plain_numbers(metrics: Any) -> Any:
    """Return metrics with numpy's scalars as the numbers that they are, at any depth: torch would not load them."""
    if isinstance(metrics, dict):
        return {name: _plain_numbers(value) for name, value in cast(Mapping[Any, Any], metrics).items()}
    if type(metrics) in (list, tuple):
        return type(metrics)(map(_plain_numbers, metrics))
    if type(metrics).__module__ != "numpy" or getattr(metrics, "shape", None) != ():
        return metrics
    number = metrics.item()
    return number if type(number).__module__ != "numpy" else float(number)  # of a long double


def _numbers_only(output: Any) -> Any:
    """Return an output that is numbers, and tensors of one, at any depth; None for any other, which may be large.

    At the end of an epoch whose last step was completed before the save, handlers and loggers look at it.
    """

    def is_of_numbers(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.numel() == 1
        if type(value) in (dict, list, tuple):
            return all(map(is_of_numbers, value.values() if type(value) is dict else value))
        return type(value) in (bool, int, float)

    plain = _plain_numbers(output)
    return plain if is_of_numbers(plain) else None


class Choice:
    """The user's parts, or some of them by name: what is loaded without the engine.

    Attributes:
        places: how the places begin, in what `capture` reads, where these are.

    Raises:
        TypeError, ValueError: there are no parts of these names.
    """

    def __init__(self, parts: Parts, only: Iterable[str] | None) -> None:
        self._names = None if only is None else _names_among(parts, only)
        self._parts = parts
        self.places: tuple[str, ...] = (path_text(["state"]),)
        if self._names is not None:
            self._parts = {name: cast(dict[str, Parts], parts)[name] for name in self._names}
            self.places = tuple(path_text(["state", name]) for name in self._names)

    def capture(self) -> dict[str, Any]:
        """Read them, as `capture` does."""
        return {"state": _read(self._parts)}

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Load them from what `capture` read.

        Raises:
            CheckpointMismatch: it does not fit. What was loaded before stays loaded.
        """
        saved = tree["state"]
        if self._names is not None:
            if not isinstance(saved, Mapping):
                raise CheckpointMismatch("only= names parts, and the state in the checkpoint has none: it is one thing")
            if absent := [name for name in self._names if name not in saved]:
                raise CheckpointMismatch(f"only= names {absent}, which the checkpoint has not: it has {list(saved)}")
            saved = {name: saved[name] for name in self._names}
        _load(self._parts, saved, "state", strict=True)


def _names_among(parts: Parts, only: Iterable[str]) -> list[str]:
    names = [] if isinstance(only, str) else list(only)
    if not names or not all(isinstance(name, str) for name in names):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f'only= takes the names of parts, such as only=["model"], got {only!r}')
    if not isinstance(parts, dict):
        raise ValueError(  # noqa: TRY004 -- the state is as it may be
            f"the state is one thing ({type_name(type(parts))}), and its parts have no names: leave only= out"
        )
    if unknown := [name for name in names if name not in parts]:
        raise ValueError(f"only= names {unknown}, which the state has not: it has {list(parts)}")
    return names


def restore(
    tree: Mapping[str, Any], parts: Parts, engine: Engine[Any, Any], *, strict: bool, reseeds: bool = True
) -> None:
    """Load what `capture` read; but, unless it `reseeds`, not the generators that all of the process shares.

    Raises:
        CheckpointMismatch: it does not fit. What was loaded before stays loaded.
    """
    _load(parts, tree["state"], "state", strict=strict)
    handlers: Any = _listeners(parts, engine)
    _load(handlers, tree["handlers"], "handlers", strict=strict)
    saved: dict[str, Any] = tree["engine"]
    if not reseeds:
        saved = {name: one for name, one in saved.items() if name != "random"}
    _load(engine, saved, "engine", strict=strict)
    engine.state.metrics.update(tree["metrics"])
    engine.state.output = tree["output"]


def _read(parts: Parts, path: str = "state") -> Any:
    if isinstance(parts, dict):
        return {name: _read(one, f"{path}[{name!r}]") for name, one in parts.items()}
    try:
        return _by_plain_names(parts).state_dict()
    except Exception as error:
        error.add_note(f"in the state_dict() of {path} ({type_name(type(parts))})")
        raise


def _load(parts: Parts, saved: Any, path: str, *, strict: bool) -> None:
    if not isinstance(parts, dict):
        try:
            _by_plain_names(parts).load_state_dict(saved)
        except Exception as error:
            raise CheckpointMismatch(
                f"{path} ({type_name(type(parts))}) does not take what was saved of it: {error}"
            ) from error
        return
    if not isinstance(saved, Mapping):
        raise CheckpointMismatch(f"{path} has {list(parts)} here, and is no dictionary in the checkpoint")
    absent = [name for name in parts if name not in saved]
    unknown = [name for name in saved if name not in parts]
    if absent or unknown:
        said = f"{path} has {list(parts)} here, and {list(saved)} in the checkpoint"
        if strict:
            raise CheckpointMismatch(
                f"{said}. Build the same, handlers attached, before restore(); or leave out what only one side has, by"
                " restore(..., strict=False); or name the parts that are wanted, by load(..., only=[...])"
            )
        _logger.warning("%s: what only one side has is left out", said)
    for name, one in parts.items():
        if name in saved:
            _load(one, saved[name], f"{path}[{name!r}]", strict=strict)


def _listeners(parts: Parts, engine: Engine[Any, Any]) -> dict[str, Stateful]:
    """Return the handlers that have state, each once, by their type and their place among those of one type.

    Those of the engine, and those of the engines among the parts.
    """
    all_parts = list(_each(parts))
    known = {id(part.metric if isinstance(part, MetricPart) else part) for _, part in all_parts}
    nested = [(f" of {path}", part.engine) for path, part in all_parts if isinstance(part, _NestedEngine)]
    found: dict[str, Stateful] = {}
    for owner, its_engine in (("", engine), *nested):
        kinds: Counter[str] = Counter()
        for one in stateful_listeners(its_engine):
            if id(unwrap(one)) not in known and not isinstance(one, Engine):
                known.add(id(unwrap(one)))
                kinds[kind := type(one).__qualname__] += 1
                found[(kind if kinds[kind] == 1 else f"{kind}-{kinds[kind]}") + owner] = one
    return found


def _each(parts: Parts, path: str = "state") -> Iterator[tuple[str, Stateful]]:
    if isinstance(parts, dict):
        for name, one in parts.items():
            yield from _each(one, f"{path}[{name!r}]")
    else:
        yield path, parts


class _NestedEngine:
    """One that was done begins anew when it is run next, as in memory, where a run that is resumed would be over."""

    def __init__(self, engine: Engine[Any, Any]) -> None:
        self.engine = engine

    def state_dict(self) -> dict[str, Any]:
        return {"engine": self.engine.state_dict(), "metrics": _plain_numbers(self.engine.state.metrics)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.engine.load_state_dict(state_dict["engine"], restart_if_done=True)
        self.engine.state.metrics.update(state_dict["metrics"])


class _TorchGenerator:
    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        return {"state": self._generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._generator.set_state(state_dict["state"])


class _NumpyGenerator:
    """numpy's own dictionaries: of numbers, for PCG64, its default; for the others, with arrays, as lists."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = _as_lists(self._generator.bit_generator.state)
        return plain

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._generator.bit_generator.state = state_dict


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_lists(one) for name, one in cast(dict[str, Any], value).items()}
    return value.tolist() if hasattr(value, "tolist") else value

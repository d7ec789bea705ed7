"""Data: what users hand in to be stepped through, looked at at the door."""

import inspect
from types import FunctionType
from typing import Any


def check(data: Any) -> None:
    """Raise TypeError, saying what to pass instead, for what cannot be the data of a run."""
    if data is None or needs_event_loop(data) or is_iterable(data):
        return
    if not callable(data):
        raise TypeError(
            f"data must be an iterable, an async iterable, or a callable without arguments that makes one, got {data!r}"
        )
    if inspect.iscoroutinefunction(data):
        raise TypeError(
            f"data is the coroutine function {shown(data)}: make it an async generator, which yields batches"
        )
    try:
        inspect.signature(data).bind()
    except TypeError:
        raise TypeError(
            f"data is the callable {shown(data)}{inspect.signature(data)}, but it is called without arguments: wrap"
            " it, as in lambda: f(...)"
        ) from None
    except ValueError:  # a built-in without a signature: it will show
        return


def check_prefetch(prefetch: Any) -> None:
    """Raise ValueError for what is no number of batches to pull ahead."""
    if type(prefetch) is not int or prefetch < 0:
        raise ValueError(f"prefetch= must be a whole number from 0 on, got {prefetch!r}")


def length_of(data: Any) -> int | None:
    """Return `len(data)`, None where there is none (torch's DataLoader over an iterable dataset raises TypeError)."""
    try:
        return len(data)
    except TypeError:
        return None


def needs_event_loop(data: Any) -> bool:
    """Say whether this is async data."""
    return has(data, "__aiter__") or has(data, "__aenter__")


def has(data: Any, method: str) -> bool:
    """Say whether this has such a method for Python to use."""
    return hasattr(type(data), method)  # as Python itself looks it up: a class is not what its instances are


def is_iterable(data: Any) -> bool:
    """Say whether this is plain data."""
    return has(data, "__iter__") or has(data, "__getitem__")


def is_factory(data: Any) -> bool:
    """Say whether this makes the data when it is called."""
    return callable(data) and not has(data, "__aiter__") and not is_iterable(data)


def is_one_shot(data: Any) -> bool:
    """Say whether this is its own iterator, and no `__iter__` in Python could make it begin again."""
    for again, following in (("__iter__", "__next__"), ("__aiter__", "__anext__")):
        if has(data, following) and has(data, again):
            return not isinstance(getattr(type(data), again), FunctionType)
    return False


def shown(data: Any) -> str:
    """Return a name for data, to show."""
    return str(getattr(data, "__qualname__", None) or type(data).__qualname__)

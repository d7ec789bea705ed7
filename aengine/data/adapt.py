"""What users hand in as data, checked once, when it is given: its kind, its length, its name."""

import inspect
import logging
from collections.abc import AsyncIterable, Callable, Iterable, Sized
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Protocol, TypeAlias, TypeVar, cast

from aengine.callables import name_of, signature_of
from aengine.type_variables import Batch

_logger = logging.getLogger("aengine.data")

_Item = TypeVar("_Item", covariant=True)  # noqa: PLC0105 -- private


class Indexed(Protocol[_Item]):
    """What is iterated by `[0]`, `[1]`, and so on, until that raises an IndexError, as many datasets are."""

    def __getitem__(self, index: int, /) -> _Item:
        """Return the item at this index."""
        ...


_Batches: TypeAlias = Iterable[Batch] | AsyncIterable[Batch] | Indexed[Batch]
_Made: TypeAlias = _Batches[Batch] | Callable[[], _Batches[Batch]]

Data: TypeAlias = _Made[Batch] | AbstractAsyncContextManager[_Made[Batch], Any]
"""What `run()` takes: batches, iterable or async iterable; a callable that makes them; or an async context manager
that gives one of these, or is one."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """The data of a run, and what is known of it before it is opened."""

    data: Any
    name: str  # its type or function, for messages
    length: int | None  # `len(data)`, where it has one
    is_manager: bool  # an async context manager, to be entered before it is iterated
    is_async: bool  # needs an event loop; a factory may still return async data
    is_one_shot: bool  # its own iterator, so that nothing can restart it


def adapt(data: Any) -> Adapted:
    """Look at data once for a run, and ask for its length.

    Raises:
        TypeError: this cannot be the data of a run; the message says what to pass instead.
    """
    is_manager = has(data, "__aenter__") and not (has(data, "__enter__") and _can_be_either(data))
    is_async = is_manager or is_async_iterable(data)
    if not (data is None or is_async or is_iterable(data)):
        _check_factory(data)
    return Adapted(data, name_of(data), length_of(data), is_manager, is_async, is_one_shot(data))


def length_of(data: Any) -> int | None:
    """Return `len(data)`; None where it has none, or raises, as that of a DataLoader of an iterable dataset does."""
    if not has(data, "__len__"):
        return None
    try:
        return len(cast(Sized, data))
    except Exception:
        _logger.debug("len() of the data (%s) raised: its length is unknown", name_of(data), exc_info=True)
        return None


def _check_factory(data: Any) -> None:
    if not callable(data):
        raise TypeError(
            f"data must be an iterable, an async iterable, or a callable without arguments that makes one, got {data!r}"
        )
    if inspect.iscoroutinefunction(data):
        raise TypeError(
            f"data is the coroutine function {name_of(data)}: make it an async generator, which yields batches"
        )
    signature = signature_of(data)
    try:
        signature.bind()
    except TypeError:
        raise TypeError(
            f"data is the callable {name_of(data)}{signature}, but it is called without arguments: wrap it, as in"
            " lambda: f(...)"
        ) from None


def has(data: Any, method: str) -> bool:
    """Say whether this has such a method for Python to use."""
    return hasattr(type(data), method)  # on the type, as Python itself looks it up: a class is not an instance of it


def is_iterable(data: Any) -> bool:
    """Say whether this can be iterated without an event loop."""
    return has(data, "__iter__") or has(data, "__getitem__")


def is_async_iterable(data: Any) -> bool:
    """Say whether this is iterated on an event loop: also what could be iterated plainly, but has no length.

    What has a length lies ready, and is iterated the plain way, which costs less, and which `run_sync()` can. What has
    none may be a connection, which would block the event loop.
    """
    return has(data, "__aiter__") and not _can_be_either(data)


def _can_be_either(data: Any) -> bool:
    return has(data, "__aiter__") and is_iterable(data) and length_of(data) is not None


def is_stateful(data: Any) -> bool:
    """Say whether this can return its position, and be put back there."""
    # Not by isinstance(data, Stateful), which took a third of the time of a short epoch.
    return hasattr(data, "state_dict") and hasattr(data, "load_state_dict")


def is_factory(data: Any) -> bool:
    """Say whether this makes the data when it is called."""
    return callable(data) and not has(data, "__aiter__") and not is_iterable(data)


def unwrapped(data: Any) -> Any:
    """Return what this wraps, at any depth, as it says itself by `__wrapped__`, as functools.wraps() has it."""
    while (inner := getattr(data, "__wrapped__", None)) is not None:
        data = inner
    return data


def is_one_shot(data: Any) -> bool:
    """Say whether this is its own iterator, without an `__iter__` written in Python, which could restart it.

    An iterator that wraps another one is what that is.
    """
    data = unwrapped(data)
    again, following = ("__aiter__", "__anext__") if is_async_iterable(data) else ("__iter__", "__next__")
    if has(data, following) and has(data, again):
        return not isinstance(getattr(type(data), again), FunctionType)
    return False

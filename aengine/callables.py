"""Binding: what users hand in as steps and handlers, checked and flattened at the door, and named in messages."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import CoroutineType
from typing import Any, TypeAlias, cast


def is_awaitable(value: Any) -> bool:
    """Say whether `value` is to be awaited."""
    return type(value) is CoroutineType or inspect.isawaitable(value)


def is_async_callable(function: Any) -> bool:
    """Say whether calling this surely gives something to await; other callables are asked by their result."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def name_of(function: Any) -> str:
    """Return a name to show for a handler."""
    inner = function if hasattr(function, "__qualname__") else getattr(function, "func", function)  # of a partial
    name: str = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    return name


def named(handler: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return this handler under a name that says what it is for: so it stands in statistics, notes and errors."""
    renamed: Any = partial(handler)
    renamed.__qualname__ = name
    return cast("Callable[..., Any]", renamed)


def refuse_stop_iteration(error: Exception, what: str) -> None:
    """Raise a RuntimeError, with its cause, for an error that Python would take for the end of an iteration."""
    if isinstance(error, StopIteration | StopAsyncIteration):
        raise RuntimeError(  # noqa: TRY004 -- what Python itself makes of it
            f"{what} raised {type(error).__name__}, which would look like the end of the data"
        ) from error


def bind(
    handler: Callable[..., Any], event_name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[..., Any]:
    """Return `f(engine, *payload)` that calls the handler with what it takes of it, then `args` and `kwargs`.

    Raises:
        TypeError: the handler cannot be called with the engine nor without it, or calling it would do nothing.
    """
    refuse_generators(handler, "a handler")
    try:
        signature = inspect.signature(handler)
    except ValueError:  # some built-ins have none; then it takes the engine, as handlers do
        signature = inspect.Signature([inspect.Parameter("anything", inspect.Parameter.VAR_POSITIONAL)])
    forms, payload = (_FORMS[event_name], (_ANY,)) if event_name in _FORMS else (_PLAIN, ())
    for form in forms:
        first, named = form(_ANY, payload)
        try:
            signature.bind(*first, *args, **kwargs, **named)
        except TypeError:
            continue
        if form is _with_all and not args and not kwargs:
            return handler
        return _call_in_form(handler, form, args, kwargs)
    given = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
    raise TypeError(
        f"handler {name_of(handler)}{signature} of {event_name} cannot be called as"
        f" {name_of(handler)}({', '.join(filter(None, ['engine', given]))}) nor as {name_of(handler)}({given})"
    )


def refuse_generators(function: Any, what: str) -> None:
    """Raise TypeError for what is not callable, and for what would not run when called."""
    if not callable(function):
        raise TypeError(f"{what} must be callable, got {function!r}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"{what} must be a plain or an async function, but {name_of(function)} has a yield in it:"
            " calling it runs nothing"
        )


def check_call(function: Any, what: str, name: str, *arguments: str) -> None:
    """Raise TypeError for what cannot be called as `name(*arguments)`, or would do nothing.

    For instance: check_call(step, "the step", "step", "engine", "batch").
    """
    refuse_generators(function, what)
    try:
        signature = inspect.signature(function)
    except ValueError:  # a built-in without one: it will show
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise TypeError(
            f"{what} {name_of(function)}{signature} cannot be called as {name}({', '.join(arguments)}): have it take"
            f" {' and '.join(arguments)}"
        ) from None


def check_seconds(value: Any, what: str, usual: float) -> None:
    """Raise TypeError or ValueError for what is no number of seconds, 0 or more; it may be infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} is a number of seconds, such as {usual}; got {value!r}")
    if not value >= 0:
        raise ValueError(f"{what} is 0 seconds or more, such as {usual}; got {value!r}")


Form: TypeAlias = Callable[[Any, tuple[Any, ...]], tuple[tuple[Any, ...], dict[str, Any]]]
_ANY = object()


def _call_in_form(
    handler: Callable[..., Any], form: Form, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[..., Any]:
    def call(engine: Any, *payload: Any) -> Any:
        first, named = form(engine, payload)
        return handler(*first, *args, **kwargs, **named)

    return call


def _with_all(engine: Any, payload: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (engine, *payload), {}


def _with_engine(engine: Any, _: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (engine,), {}


def _with_payload(_: Any, payload: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return payload, {}


def _with_nothing(_: Any, __: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {}


def _with_engine_and_iterations(engine: Any, payload: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (engine,), {"iter_counter": payload[0]}


def _with_iterations(_: Any, payload: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"iter_counter": payload[0]}


_PLAIN: tuple[Form, ...] = (_with_all, _with_nothing)
_FORMS: Mapping[str, tuple[Form, ...]] = {
    "EXCEPTION_RAISED": (_with_all, _with_payload, _with_nothing),
    "TERMINATE_SINGLE_EPOCH": (_with_engine_and_iterations, _with_iterations, _with_engine, _with_nothing),
}

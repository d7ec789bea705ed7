"""Callables: the steps and handlers that users hand in, checked at once, and bound to one way of being called."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import CoroutineType, FunctionType
from typing import Any, cast


def is_awaitable(value: Any) -> bool:
    """Say whether `value` is to be awaited."""
    return type(value) is CoroutineType or inspect.isawaitable(value)  # the first is quick, and true of most


def is_async_callable(function: Any) -> bool:
    """Say whether calling this is sure to return an awaitable; of other callables only each result can tell."""
    if inspect.iscoroutinefunction(function):
        return True
    return type(function) is not FunctionType and inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def name_of(thing: Any) -> str:
    """Return a name for something that a user handed in: of a function, of what a partial calls, else of the type."""
    while isinstance(thing, partial) and not hasattr(thing, "__qualname__"):  # else it is `named`
        thing = thing.func
    return str(getattr(thing, "__qualname__", None) or type(thing).__qualname__)


def named(handler: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return this handler under a name that says what it is for: so it stands in statistics, notes and errors."""
    renamed: Any = partial(handler)
    renamed.__qualname__ = name
    return cast("Callable[..., Any]", renamed)


def type_name(kind: type) -> str:
    """Return the name of a type as one must import it: with its module, unless it is built in."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def refuse_stop_iteration(error: Exception, what: str) -> None:
    """Raise a RuntimeError, with its cause, for an error that Python would take for the end of an iteration."""
    if isinstance(error, StopIteration | StopAsyncIteration):
        raise RuntimeError(  # noqa: TRY004 -- as Python does for a generator that lets a StopIteration out (PEP 479)
            f"{what} raised {type(error).__name__}, which would look like the end of the data"
        ) from error


def check_callable(function: Any, what: str, name: str, *arguments: str) -> None:
    """Raise TypeError for what cannot be called as `name(*arguments)`, and for what would not run when it is called.

    For instance: check_callable(step, "the step", "step", "engine", "batch").
    """
    if _takes_exactly(function, len(arguments)):
        return
    check_function(function, what)
    signature = signature_of(function)
    try:
        signature.bind(*arguments)
    except TypeError:
        raise TypeError(
            f"{what} {name_of(function)}{signature} cannot be called as {name}({', '.join(arguments)}): have it take"
            f" {' and '.join(arguments) or 'no arguments'}"
        ) from None


def _takes_exactly(function: Any, count: int) -> bool:
    """Say whether this is a function with so many arguments and no `yield`: most steps are; a signature takes 10 µs."""
    if type(function) is not FunctionType or function.__dict__:  # which has the function that it wraps
        return False
    code = function.__code__
    return code.co_argcount == count and not code.co_kwonlyargcount and not code.co_flags & _WITH_YIELD


_WITH_YIELD = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def bind_handler(
    handler: Callable[..., Any],
    event_name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    has_payload: bool,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return `f(engine)` and `f(engine, payload)`, which call the handler with what it takes, then `args` and `kwargs`.

    Which of them it takes is found out here, once: a dispatch inspects no signature. With `has_payload` the event may
    be fired with a payload, or without: then a handler that needs one is given None.

    Raises:
        TypeError: the handler can be called neither with the engine nor without it, or would not run when it is called.
    """
    check_function(handler, "a handler")
    signature = signature_of(handler)
    ways = [way for way in _WAYS.get(event_name, _USUAL_WAYS) if _binds(way, signature, args, kwargs)]
    if event_name not in _WAYS and _with_all in ways:
        others = [way for way in ways if way is not _with_all]
        if others and not (has_payload and _wants_payload(signature, args)):
            ways = others
        elif not others and not has_payload:
            ways = []
    if not ways:
        given = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        raise TypeError(
            f"handler {name_of(handler)}{signature} of {event_name} cannot be called as"
            f" {name_of(handler)}({', '.join(filter(None, ['engine', given]))}) nor as {name_of(handler)}({given})"
        )
    with_payload = ways[0]
    needs_none = with_payload is _with_all and _with_engine not in ways
    without = _with_engine if with_payload is _with_all and not needs_none else with_payload
    is_bare = not args and not kwargs  # then it is the handler itself: no function in between at each event
    return (
        handler if without is _with_engine and is_bare else partial(without, handler, args, kwargs),
        handler if with_payload is _with_all and is_bare else partial(with_payload, handler, args, kwargs),
    )


def _binds(way: Callable[..., Any], signature: inspect.Signature, args: Any, kwargs: Any) -> bool:
    try:  # `signature.bind` in place of the handler: it refuses what the handler would refuse, and runs nothing
        way(signature.bind, args, kwargs, None)
    except TypeError:
        return False
    return True


def _wants_payload(signature: inspect.Signature, args: tuple[Any, ...]) -> bool:
    """Say whether a handler that can be called without the payload is to be given it: after the engine.

    A parameter whose default is a value, as in `lambda engine, i=i: ...`, is there for that value.
    """
    if signature is _UNKNOWN:
        return False
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    positional = [one for one in signature.parameters.values() if one.kind not in by_keyword]
    second = positional[1] if len(positional) > 1 else positional[-1]
    if second.name == "payload":
        return True
    return not args and (second.kind is inspect.Parameter.VAR_POSITIONAL or second.default is None)


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature; of a built-in that has none, one that takes anything: the call itself will show."""
    try:
        return inspect.signature(function)
    except ValueError:
        return _UNKNOWN


def check_function(function: Any, what: str) -> None:
    """Raise TypeError for what is not callable, and for what would run nothing when called: a generator function."""
    if not callable(function):
        raise TypeError(f"{what} must be callable, got {function!r}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"{what} must be a plain or an async function, but {name_of(function)} has a yield in it:"
            " calling it runs nothing"
        )


_UNKNOWN = inspect.Signature([inspect.Parameter("anything", inspect.Parameter.VAR_POSITIONAL)])


# The ways to call a handler: each takes the handler and its own arguments, bound once, and what comes with the event.


def _with_all(handler: Any, args: Any, kwargs: Any, engine: Any, payload: Any = None) -> Any:
    return handler(engine, payload, *args, **kwargs)


def _with_engine(handler: Any, args: Any, kwargs: Any, engine: Any, _: Any = None) -> Any:
    return handler(engine, *args, **kwargs)


def _with_payload(handler: Any, args: Any, kwargs: Any, _: Any, payload: Any = None) -> Any:
    return handler(payload, *args, **kwargs)


def _with_nothing(handler: Any, args: Any, kwargs: Any, *_: Any) -> Any:
    return handler(*args, **kwargs)


def _with_engine_and_counter(handler: Any, args: Any, kwargs: Any, engine: Any, payload: Any = None) -> Any:
    return handler(engine, *args, **kwargs, iter_counter=payload)


def _with_counter(handler: Any, args: Any, kwargs: Any, _: Any, payload: Any = None) -> Any:
    return handler(*args, **kwargs, iter_counter=payload)


# Tried in this order: the first that fits the signature is the one. The payload of EXCEPTION_RAISED is also given to a
# handler that takes nothing else, that of TERMINATE_SINGLE_EPOCH by the keyword `iter_counter`, as pytorch-ignite does.
_USUAL_WAYS: tuple[Callable[..., Any], ...] = (_with_all, _with_engine, _with_nothing)
_WAYS: Mapping[str, tuple[Callable[..., Any], ...]] = {
    "EXCEPTION_RAISED": (_with_all, _with_payload, _with_nothing),
    "TERMINATE_SINGLE_EPOCH": (_with_engine_and_counter, _with_counter, _with_engine, _with_nothing, _with_all),
}

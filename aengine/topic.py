"""Topic: one event and all that listens to it. Dispatch stands here, once, for inline and concurrent listeners.

A listener knows the next count at which it is due, a topic the least of its listeners': so an event that nobody
waits for yet costs the loop the comparison of two numbers. Registration happens at the door: what is called in the
loop has been checked, bound and flattened there.
"""

import inspect
from collections.abc import Awaitable, Callable, Generator, Mapping
from threading import RLock
from time import perf_counter, time
from types import CoroutineType
from typing import Any, TypeAlias

from aengine.events import ALWAYS, NEVER, Event, EventDraft, Filter, Selector
from aengine.inbox import Inbox, Room
from aengine.statistics import Stopwatch
from aengine.worker import Home

Snapshot: TypeAlias = Callable[[Any], Any]
Dispatch: TypeAlias = Generator[Awaitable[Any], Any, None]
"""Yields what must be awaited, and is sent the result or thrown the exception."""


class Listener:
    """What listens to one topic: when it is due next, and whether it is to be called then."""

    __slots__ = ("_last", "_next_time", "_wants_last", "due", "filter", "selector")

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self.filter: Filter | None = selector.filter
        self.due = ALWAYS
        self._last: int | None = None
        self._next_time = 0.0
        self._wants_last = False

    def rewind(self, count: int) -> None:
        """A run begins, at this count of the event."""
        self._last = None
        if self.filter is not None:
            self.due = self.filter.next_due(count)
            if self.filter.interval is not None:
                self._next_time = perf_counter() + self.filter.interval

    def admits(self, engine: Any, count: int) -> bool:
        """Say whether a filtered listener that is due is to be called, and find when it is due next."""
        condition = self.filter
        assert condition is not None, "asked of filtered listeners only"  # noqa: S101
        if self._wants_last:
            self._wants_last = False
            return True
        exact = condition.next_due(count) == count
        self.due = condition.next_due(count + 1)
        if exact and condition.test is not None:
            exact = bool(condition.test(engine, count))
        if exact and condition.interval is not None:
            now = perf_counter()
            exact = now >= self._next_time
            if exact:
                self._next_time = now + condition.interval
        if exact:
            self._last = count
        return exact

    def wants_last(self, count: int) -> bool:
        """Say whether this is to be called once more, for the count at the end of the run; then it is admitted."""
        self._wants_last = self.filter is not None and self.filter.at_end and self._last != count
        return self._wants_last


class InlineHandler(Listener):
    """A handler that runs between two steps, in order, with the live engine."""

    __slots__ = ("call", "handler", "is_async", "name", "seconds")

    def __init__(self, selector: Selector, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__(selector)
        self.handler = handler
        self.name = name_of(handler)
        self.call = bind(handler, selector.name, args, kwargs)
        self.is_async = is_async_callable(handler)
        self.seconds = 0.0


class Outlet(Listener):
    """Where a topic hands its events to the inbox of a subscriber or a stream."""

    __slots__ = ("inbox", "snapshot")

    def __init__(self, selector: Selector, inbox: Inbox, snapshot: Snapshot | None) -> None:
        super().__init__(selector)
        self.inbox = inbox
        self.snapshot = snapshot


class Publisher:
    """What all topics of an engine share: the order of its events, and the clock of its run."""

    __slots__ = ("home", "last_event_name", "lock", "name", "sequence", "stopwatch")

    def __init__(self, name: str) -> None:
        self.name = name
        self.sequence = 0
        self.lock = RLock()  # re-entrant: a signal handler may emit while its own thread does
        self.home: Home | None = None
        self.stopwatch = Stopwatch()
        self.last_event_name: str | None = None


class Topic:
    """One event of one engine, and its listeners."""

    __slots__ = ("_publisher", "due", "fired", "inline", "name", "outlets")

    def __init__(self, name: str, publisher: Publisher) -> None:
        self.name = name
        self.inline: tuple[InlineHandler, ...] = ()
        self.outlets: tuple[Outlet, ...] = ()
        self.due = NEVER
        self.fired = 0
        self._publisher = publisher

    def listen(self, listener: InlineHandler | Outlet, count: int) -> None:
        """Add a listener, from the next dispatch on."""
        listener.rewind(count)
        with self._publisher.lock:
            if isinstance(listener, InlineHandler):
                self.inline += (listener,)
            else:
                self.outlets += (listener,)
            self._find_due()

    def leave(self, listeners: list[InlineHandler] | list[Outlet]) -> None:
        """Remove listeners, from the next dispatch on."""
        with self._publisher.lock:
            self.inline = tuple(one for one in self.inline if one not in listeners)
            self.outlets = tuple(one for one in self.outlets if one not in listeners)
            self._find_due()

    def rewind(self, count: int) -> None:
        """A run begins, at this count."""
        with self._publisher.lock:
            for listener in (*self.inline, *self.outlets):
                listener.rewind(count)
            for handler in self.inline:
                handler.seconds = 0.0
            self._find_due()

    def _find_due(self) -> None:
        self.due = min((one.due for one in (*self.inline, *self.outlets)), default=NEVER)

    def next_count(self) -> int:
        """Count a firing of an event that counts its own."""
        with self._publisher.lock:
            self.fired += 1
            return self.fired

    def dispatch(self, engine: Any, count: int, *payload: Any) -> Dispatch:
        """Call what is due inline, in order of registration; then send what is due to the inboxes."""
        publisher = self._publisher
        publisher.last_event_name = self.name
        sampled = publisher.stopwatch.weight
        for handler in self.inline:
            if handler.due > count:
                continue
            weight = sampled
            try:
                if handler.filter is not None:
                    if not handler.admits(engine, count):
                        continue
                    weight = 1  # rare enough to time each call
                began = perf_counter() if weight else 0.0
                result = handler.call(engine, *payload)
                if result is not None and is_awaitable(result):
                    yield result
                if weight:
                    handler.seconds += (perf_counter() - began) * weight
            except Exception as error:
                self._tell_where(error, f"handler {handler.name!r}", engine)
                raise_for_user(error, f"handler {handler.name!r}")
        if self.outlets:
            yield from self._send(engine, count)
        if self.due > ALWAYS:
            self._find_due()

    def parts(self) -> list["Topic"]:
        """Return one topic for each listener: what fails in one does not keep the event from the others."""
        parts = [Topic(self.name, self._publisher) for _ in (*self.inline, *self.outlets)]
        for part, handler in zip(parts, self.inline, strict=False):
            part.inline = (handler,)
        for part, outlet in zip(parts[len(self.inline) :], self.outlets, strict=True):
            part.outlets = (outlet,)
        return parts

    def finish(self, engine: Any, count: int) -> Dispatch:
        """Dispatch once more, at the end of a run, to those that asked for it and have not seen this count."""
        last = Topic(self.name, self._publisher)
        last.inline = tuple(one for one in self.inline if one.wants_last(count))
        last.outlets = tuple(one for one in self.outlets if one.wants_last(count))
        for listener in (*last.inline, *last.outlets):
            listener.due = ALWAYS
        if last.inline or last.outlets:
            yield from last.dispatch(engine, count)

    def _send(self, engine: Any, count: int) -> Dispatch:
        publisher = self._publisher
        due: list[Outlet] = []
        snapshots: dict[Snapshot | None, Any] = {}
        for outlet in self.outlets:
            if outlet.due > count or (outlet.filter is not None and not outlet.admits(engine, count)):
                continue
            due.append(outlet)
            take = outlet.snapshot
            if take is not None and take not in snapshots:
                try:
                    snapshots[take] = value = take(engine)
                    if value is not None and is_awaitable(value):
                        snapshots[take] = yield value
                except Exception as error:
                    self._tell_where(error, f"snapshot {name_of(take)!r} for {outlet.inbox.name!r}", engine)
                    raise_for_user(error, f"snapshot {name_of(take)!r}")
        if not due:
            return
        full: list[Inbox] = []
        with publisher.lock:  # so that every inbox gets events in the order of their sequence numbers
            publisher.sequence += 1
            events: dict[Snapshot | None, Event] = {}
            for outlet in due:
                event = events.get(outlet.snapshot)
                if event is None:
                    draft = EventDraft(self.name, publisher.name, publisher.sequence, engine.state, perf_counter(), time())
                    event = events[outlet.snapshot] = draft.seal(snapshots.get(outlet.snapshot))
                if not outlet.inbox.put_nowait(event):
                    full.append(outlet.inbox)
        for inbox in full:
            began = perf_counter()
            yield Room(inbox, publisher.home)
            publisher.stopwatch.back_pressure += perf_counter() - began

    def _tell_where(self, error: BaseException, what: str, engine: Any) -> None:
        state = engine.state
        error.add_note(
            f"in {what} of {self.name}, engine {self._publisher.name!r}, epoch {state.epoch}, iteration {state.iteration}"
        )


def is_awaitable(value: Any) -> bool:
    """Say whether `value` is to be awaited."""
    return type(value) is CoroutineType or inspect.isawaitable(value)


def is_async_callable(function: Any) -> bool:
    """Say whether calling this surely gives something to await; other callables are asked by their result."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def name_of(function: Any) -> str:
    """Return a name to show for a handler."""
    inner = getattr(function, "func", function)  # of a functools.partial
    name: str = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    return name


def raise_for_user(error: Exception, what: str) -> None:
    """Raise an error of the user's as it is, but for one that Python would take for the end of an iteration."""
    if isinstance(error, StopIteration | StopAsyncIteration):
        raise RuntimeError(f"{what} raised {type(error).__name__}, which would look like the end of the data") from error
    raise error


def bind(handler: Callable[..., Any], event_name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """Return `f(engine, *payload)` that calls the handler with what it takes of it, then `args` and `kwargs`.

    Raises:
        TypeError: the handler cannot be called with the engine nor without it, or calling it would do nothing.
    """
    refuse_generators(handler, "a handler")
    try:
        signature = inspect.signature(handler)
    except ValueError:  # some built-ins have none; then it takes the engine, as handlers do
        signature = inspect.signature(lambda *args, **kwargs: None)
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
        raise TypeError(f"{what} must be a plain or an async function, but {name_of(function)} has a yield in it: calling it runs nothing")


def check_step(step: Any) -> None:
    """Raise TypeError for what cannot be called as `step(engine, batch)`."""
    refuse_generators(step, "the step")
    try:
        signature = inspect.signature(step)
    except ValueError:  # a built-in without one: it will show
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise TypeError(f"the step {name_of(step)}{signature} cannot be called as step(engine, batch): have it take these two") from None


Form: TypeAlias = Callable[[Any, tuple[Any, ...]], tuple[tuple[Any, ...], dict[str, Any]]]
_ANY = object()


def _call_in_form(handler: Callable[..., Any], form: Form, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
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

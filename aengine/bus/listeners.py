"""Listeners: what a topic dispatches to, and when each is due next."""

from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeAlias

from aengine.bus.inbox import Inbox
from aengine.callables import bind_handler, is_async_callable, name_of
from aengine.events import ALWAYS, Events, Filter, Selector

Snapshot: TypeAlias = Callable[[Any], Any]

_WITHOUT_PAYLOAD = frozenset(event.name for event in Events) - {"EXCEPTION_RAISED", "TERMINATE_SINGLE_EPOCH"}
"""The events of the loop that are about nothing but the engine: their handlers are given no more than that."""


class Listener:
    """What listens to one topic.

    Attributes:
        next_count: the count from which on `should_run` is to be asked. It always is where there is no filter.
        last_run: the count at which its filter last let it run, in this run of the engine.
    """

    __slots__ = ("_next_time", "filter", "last_run", "next_count", "selector")

    def __init__(self, selector: Selector) -> None:
        self.selector: Selector = selector
        self.filter: Filter | None = selector.filter
        self.next_count: int = ALWAYS
        self.last_run: int | None = None
        self._next_time = 0.0

    def reset(self, count: int) -> None:
        """A run begins, at this count of the event."""
        self.last_run = None
        self.reschedule(count)
        if self.filter is not None and self.filter.interval is not None:
            self._next_time = perf_counter() + self.filter.interval

    def reschedule(self, count: int) -> None:
        """Find when the filter is due from this count on."""
        if self.filter is not None:
            self.next_count = self.filter.next_due(count)

    def should_run(self, engine: Any, count: int) -> bool:
        """Say whether a filtered listener that is due is to be called, and find when it is due next."""
        condition = self.filter
        assert condition is not None, "asked only where there is a filter"  # noqa: S101
        exact = self.next_count == count or condition.next_due(count) == count
        self.next_count = condition.next_due(count + 1)
        if exact and condition.test is not None:
            exact = bool(condition.test(engine, count))
        if exact and condition.interval is not None:
            now = perf_counter()
            exact = now >= self._next_time
            if exact:
                self._next_time = now + condition.interval
        if exact:
            self.last_run = count
        return exact

    def runs_at_end(self, count: int) -> bool:
        """Say whether this is to be called once more, for the count at the end of the run."""
        return self.filter is not None and self.filter.at_end and self.last_run != count


@dataclass(frozen=True, slots=True)
class Observer:
    """An inline handler that runs after all that are none, also those that are added later: `function` in its place.

    So it sees what they have made: the metrics that they computed, the learning rate that they set. It is to be quick,
    since the loop waits for it.

    Attributes:
        name: shown in notes and statistics.
        function: the handler.
        key: two with the same name and key do the same, so that one can be found by the other.
    """

    name: str
    function: Callable[..., Any] = field(compare=False)
    key: Hashable = None

    def __call__(self, *arguments: Any) -> Any:
        """Call the handler. Not how the loop calls it, which is without this."""
        return self.function(*arguments)


class InlineHandler(Listener):
    """A handler that runs between two steps, in order, with the live engine. An observer runs after all that are none.

    Attributes:
        is_internal: whether it is no handler of a user's, to be shown.
        call: `call(engine)` calls the handler for a firing without a payload.
        call_with_payload: `call_with_payload(engine, payload)` does, for one that has a payload.
        seconds: that it took in this run of the engine. Written by the topic, where each call more would be felt.
    """

    __slots__ = ("call", "call_with_payload", "handler", "is_async", "is_observer", "name", "seconds")

    call: Callable[..., Any]
    call_with_payload: Callable[..., Any]

    is_internal = False

    def __init__(
        self,
        selector: Selector,
        handler: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__(selector)
        self.is_observer: bool = isinstance(handler, Observer)
        self.handler: Callable[..., Any] = handler
        function = handler.function if isinstance(handler, Observer) else handler
        self.name: str = handler.name if isinstance(handler, Observer) else name_of(handler)
        has_payload = selector.name not in _WITHOUT_PAYLOAD
        self.call, self.call_with_payload = bind_handler(function, selector.name, args, kwargs, has_payload=has_payload)
        self.is_async: bool = is_async_callable(function)
        self.seconds: float = 0.0

    def reset(self, count: int) -> None:
        """A run begins, at this count of the event."""
        super().reset(count)
        self.seconds = 0.0


class InboxListener(Listener):
    """Where a topic hands its events to the inbox of a subscriber or a stream."""

    __slots__ = ("inbox", "snapshot")

    def __init__(self, selector: Selector, inbox: Inbox, snapshot: Snapshot | None) -> None:
        super().__init__(selector)
        self.inbox: Inbox = inbox
        self.snapshot: Snapshot | None = snapshot


class NotYet:
    """What a snapshot returns that cannot be taken now: this is awaited, and then the snapshot is asked for again.

    So it is taken where the step runs, though what it waits for is awaited on the event loop.
    """

    __slots__ = ("awaitable",)

    def __init__(self, awaitable: Awaitable[object]) -> None:
        self.awaitable: Awaitable[object] = awaitable

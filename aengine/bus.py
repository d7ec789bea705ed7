"""The bus of one engine: its topics, the subscribers beside its step, and the streams of whoever reads along."""

import logging
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any, Self, TypeAlias, cast

import anyio
import anyio.lowlevel
import anyio.to_thread

from aengine.binding import check_call, is_async_callable, is_awaitable, name_of
from aengine.emission import reading
from aengine.errors import HandlerTimeout, StrayCancellation
from aengine.events import AnyEvent, Event, Selector, selectors
from aengine.inbox import Inbox, Overflow
from aengine.state import State
from aengine.statistics import ListenerStatistics
from aengine.topic import InlineHandler, Outlet, Publisher, Snapshot, Topic
from aengine.worker import Home

OnError: TypeAlias = str
Fail: TypeAlias = Callable[[BaseException], None]

_TURN = 0.002
"""Seconds that a subscriber whose handler never waits goes on before it lets other tasks have a turn."""

_TURN_EVENTS = 32
"""Events that a subscriber handles from one look at the clock to the next, and that a stream gives in one turn."""


class Listening:
    """What a subscriber and a stream have in common: an inbox, fed by one or several topics."""

    def __init__(
        self, bus: "Bus", event: AnyEvent, name: str, buffer: int, overflow: Overflow | str, snapshot: Snapshot | None
    ) -> None:
        if type(buffer) is not int or buffer < 1:
            raise ValueError(f"buffer= is the number of events that may wait, at least 1, got {buffer!r}")
        if snapshot is not None:
            check_call(snapshot, "snapshot=", "snapshot", "engine")
        if not isinstance(snapshot, Hashable):
            snapshot = partial(cast(Snapshot, snapshot))  # shared by those that were given the very same one
        self.name = name
        self.errors = 0
        self._busy = 0.0
        self._busy_since: float | None = None
        self.selectors = selectors(event)
        self.inbox = Inbox(name, buffer, _overflow(overflow), bus.lock)
        self._outlets = [Outlet(selector, self.inbox, snapshot) for selector in self.selectors]
        self._topics = [bus.topic(selector.name) for selector in self.selectors]

    def open(self, count_of: Callable[[Topic], int]) -> None:
        """Begin to listen."""
        for topic, outlet in zip(self._topics, self._outlets, strict=True):
            topic.listen(outlet, count_of(topic))

    def leave(self) -> None:
        """Listen no more."""
        for topic in self._topics:
            topic.leave(self._outlets)

    def statistics(self) -> ListenerStatistics:
        """Return what became of the events so far."""
        accepted, handled, dropped, discarded, depth = self.inbox.account()
        since = self._busy_since
        return ListenerStatistics(
            name=self.name,
            events=" | ".join(map(str, self.selectors)),
            depth=depth,
            accepted=accepted,
            handled=handled,
            dropped=dropped,
            discarded=discarded,
            errors=self.errors,
            busy=self._busy if since is None else self._busy + perf_counter() - since,
        )


class Subscriber(Listening):
    """A handler beside the step: while a run lasts, in a task of its own, one event at a time, in order."""

    def __init__(
        self,
        bus: "Bus",
        event: AnyEvent,
        handler: Callable[[Event], Any],
        *,
        buffer: int,
        overflow: Overflow | str,
        on_error: OnError,
        snapshot: Snapshot | None,
        name: str | None,
    ) -> None:
        check_call(handler, "a subscriber's handler", "handler", "event")
        if on_error not in ("raise", "log"):
            raise ValueError(f'on_error= is "raise" (the run fails) or "log" (counted and logged), got {on_error!r}')
        super().__init__(bus, event, name or name_of(handler), buffer, overflow, snapshot)
        self.handler = handler
        self._is_async = is_async_callable(handler)
        self._isolated = on_error == "log"
        self._logger = bus.logger
        self._scope: anyio.CancelScope | None = None
        self._limiter: anyio.CapacityLimiter | None = None
        self._turn_began = 0.0

    async def consume(self, home: Home, fail: Fail) -> None:
        """Handle what arrives until the inbox is closed and empty. Errors go to `fail`, not to the task group.

        Shielded: what was accepted before a cancellation is still handled. `give_up()` ends it all the same.
        """
        reading.set(self.inbox)
        self._limiter = anyio.CapacityLimiter(1)  # not the application's: a slow handler takes none of its threads
        is_done = False
        try:
            with anyio.CancelScope(shield=True) as self._scope:
                await self._consume(home)
                is_done = True
        except Exception as error:  # noqa: BLE001 -- handed over
            fail(error)
        except (KeyboardInterrupt, SystemExit) as error:  # asyncio would leave its loop with them at once
            fail(error)
        except BaseException as error:  # noqa: BLE001 -- handed over; our own cancellation the scope would have kept
            self.lose(fail, error)
        finally:
            self._scope = None
            if not is_done:
                self.inbox.close_nowait(discard=True)  # who is dead must block nobody

    def lose(self, fail: Fail, cancellation: BaseException | None = None) -> None:
        """Its task was cancelled from outside, in its midst or before its first step."""
        stray = StrayCancellation(
            f"subscriber {self.name!r} was cancelled from outside the run, or let a cancellation out"
        )
        stray.__cause__ = cancellation
        self.inbox.close_nowait(discard=True)
        fail(stray)

    async def _consume(self, home: Home) -> None:
        inbox, handler, is_async = self.inbox, self.handler, self._is_async
        self._begin_work()
        try:
            while True:
                for event in islice(inbox.taken(), _TURN_EVENTS):
                    try:
                        if is_async:
                            await handler(event)
                        else:
                            await self._handle_in_thread(event)
                    except Exception as error:
                        if not self._isolates(error, event):
                            raise
                if inbox.in_hand is not None:  # and handled: there may be more
                    inbox.done_nowait()
                    if perf_counter() - self._turn_began < _TURN:
                        continue
                elif inbox.closed:
                    return
                self._rest()
                await inbox.arrival(home)
                if inbox.is_dismissed:
                    return
                self._begin_work()
        finally:
            self._rest()

    def _begin_work(self) -> None:
        self._busy_since = self._turn_began = perf_counter()

    def _rest(self) -> None:
        since, self._busy_since = self._busy_since, None
        if since is not None:
            self._busy += perf_counter() - since

    def _isolates(self, error: Exception, event: Event) -> bool:
        """Note on an error where it was raised. Says whether it was logged, and the handler goes on."""
        self.errors += 1
        error.add_note(f"in subscriber {self.name!r} of {event.name}, {_place(event)}")
        if self._isolated:
            self._logger.error(
                "subscriber %r of %s failed, going on (%s)", self.name, event.name, _place(event), exc_info=error
            )
        return self._isolated

    async def _handle_in_thread(self, event: Event) -> None:
        def call() -> tuple[Any]:  # wrapped: trio refuses a coroutine that comes out of a thread
            return (self.handler(event),)

        (result,) = await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)
        if result is not None and is_awaitable(result):
            await result

    def give_up(self) -> None:
        """Cancel the handler: its time is over."""
        if self._scope is None:  # its task has not taken its first step, and will find nothing to do
            self.inbox.close_nowait(discard=True)
        else:
            self._scope.cancel()


class Stream(Listening):
    """Events for whoever reads them.

        async with engine.stream(event) as events:
            async for event in events: ...

    It owns no task, so it can be dropped anywhere. It begins with the `async with`, and ends when the run under way,
    or else the next one, ends; what is left can still be read then. Its reader is one task.

    Raises:
        RuntimeError: it is read outside of its `async with`.
    """

    def __init__(
        self, bus: "Bus", event: AnyEvent, *, buffer: int, overflow: Overflow | str, snapshot: Snapshot | None
    ) -> None:
        super().__init__(bus, event, f"stream of {' | '.join(map(str, selectors(event)))}", buffer, overflow, snapshot)
        self._bus = bus
        self._home: Home | None = None
        self._taken = 0

    async def __aenter__(self) -> Self:
        self._home = Home()
        self.inbox.reopen_nowait()
        self._bus.streams += (self,)
        self.open(self._bus.count_of)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._home = None
        self.leave()
        self._bus.streams = tuple(stream for stream in self._bus.streams if stream is not self)
        self.inbox.close_nowait(discard=True)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Event:
        home = self._home
        if home is None:
            raise RuntimeError(
                "a stream is read inside its block:"
                " async with engine.stream(...) as events: async for event in events: ..."
            )
        if self._taken % _TURN_EVENTS == _TURN_EVENTS - 1:
            await anyio.lowlevel.checkpoint()
        else:
            await anyio.lowlevel.checkpoint_if_cancelled()
        while (event := self.inbox.take_nowait()) is None:
            if self.inbox.closed:
                raise StopAsyncIteration
            await self.inbox.arrival(home)
        self.inbox.done_nowait()
        self._taken += 1
        return event


class Bus(Publisher):
    """Topics, subscribers and streams of one engine."""

    __slots__ = ("_topics", "logger", "state", "streams", "subscribers")

    def __init__(self, name: str, logger: logging.Logger, state: State) -> None:
        super().__init__(name)
        self.logger = logger
        self.state = state
        self.subscribers: tuple[Subscriber, ...] = ()
        self.streams: tuple[Stream, ...] = ()
        self._topics: dict[str, Topic] = {}

    def topic(self, name: str) -> Topic:
        """Return the topic of this name, the same each time."""
        topic = self._topics.get(name)
        if topic is None:
            topic = self._topics.setdefault(name, Topic(name, self))
        return topic

    @property
    def topics(self) -> Iterable[Topic]:
        """All topics that anybody has asked for."""
        return tuple(self._topics.values())

    def next_count(self, topic: Topic) -> int:
        """Return the counter of an event that fires now."""
        is_counted = topic.name in self.state.event_to_attr
        return topic.fire_at(self.count_of(topic) if is_counted else topic.next_count())

    def count_of(self, topic: Topic) -> int:
        """Return where the counter of an event stands."""
        counter = self.state.event_to_attr.get(topic.name)
        return topic.fired if counter is None else int(getattr(self.state, counter, 0))

    def add_inline(
        self, event: AnyEvent, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[InlineHandler]:
        """Add an inline handler to each of the events; to all, or, when it cannot be called, to none."""
        added = [InlineHandler(selector, handler, args, kwargs) for selector in selectors(event)]
        for one in added:
            topic = self.topic(one.selector.name)
            topic.listen(one, self.count_of(topic))
        return added

    def add_last(self, event: AnyEvent, handler: Callable[..., Any], name: str) -> None:
        """Add a plain handler that sees what the inline handlers have made, whoever was added first."""
        for selector in selectors(event):
            last = InlineHandler(selector, handler, (), {})
            last.name, last.is_last = name, True
            topic = self.topic(selector.name)
            topic.listen(last, self.count_of(topic))

    def remove_these(self, handlers: list[InlineHandler]) -> None:
        """Remove what `add_inline` returned."""
        for one in handlers:
            self.topic(one.selector.name).leave([one])

    def find_inline(self, handler: Callable[..., Any], selector: Selector | None) -> list[InlineHandler]:
        """Return where this handler listens: anywhere; to an event; or, if it is filtered, with that very filter."""
        topics = self.topics if selector is None else [self.topic(selector.name)]
        found = [one for topic in topics for one in topic.inline if one.handler == handler]
        exact = selector is not None and selector.filter is not None
        return [one for one in found if one.selector == selector] if exact else found

    def remove_inline(self, handler: Callable[..., Any], selector: Selector) -> bool:
        """Remove this handler where it listens with this very filter, or with none. Says whether it did."""
        topic = self.topic(selector.name)
        found = [one for one in topic.inline if one.handler == handler and one.selector == selector]
        topic.leave(found)
        return bool(found)

    def add_subscriber(self, subscriber: Subscriber) -> None:
        """Add a subscriber; who starts runs it from then on."""
        with self.lock:
            self.subscribers += (subscriber,)
        subscriber.open(self.count_of)

    def remove_subscriber(self, subscriber: Subscriber) -> None:
        """Remove a subscriber. What it has accepted it still handles; then its task ends."""
        with self.lock:
            self.subscribers = tuple(one for one in self.subscribers if one is not subscriber)
        subscriber.leave()
        subscriber.inbox.close_nowait()

    @property
    def must_await(self) -> bool:
        """Whether somebody listens who needs an event loop."""
        return bool(self.subscribers) or any(one.is_async for topic in self.topics for one in topic.inline)

    def rewind(self) -> None:
        """A run begins: filters look ahead from where the counters stand, and the clock starts."""
        self.start_clock()
        for topic in self.topics:
            topic.rewind(self.count_of(topic))

    def end_streams(self) -> None:
        """The run is over: their readers come to an end."""
        for stream in self.streams:
            stream.inbox.close_nowait()

    def give_up(self, late: list[Subscriber], grace: float) -> HandlerTimeout:
        """End what did not end by itself. Returns the error that says what was lost."""
        lost = "; ".join(
            f"{one.name!r} of {' | '.join(map(str, one.selectors))} "
            + (
                f"in {one.inbox.in_hand.name} ({_place(one.inbox.in_hand)})"
                if one.inbox.in_hand
                else "before its next event"
            )
            + f", {len(one.inbox)} more discarded"
            for one in late
        )
        for one in late:
            one.give_up()
        return HandlerTimeout(
            f"after {grace} seconds of grace these subscribers of engine {self.name!r} were still busy: {lost}"
        )


def _place(event: Event) -> str:
    return f"engine {event.engine!r}, epoch {event.epoch}, iteration {event.iteration}"


def _overflow(value: Overflow | str) -> Overflow:
    try:
        return Overflow(value)
    except ValueError:
        choices = ", ".join(f'"{one.value}"' for one in Overflow)
        raise ValueError(f"overflow= is one of {choices}, got {value!r}") from None

"""The bus of one engine: its topics, the subscribers beside its step, and the streams that are being read."""

import logging
from collections.abc import Callable, Iterable, Mapping
from threading import RLock
from typing import Any

from aengine.bus.listeners import InlineHandler
from aengine.bus.stream import Stream
from aengine.bus.subscriber import Subscriber, place_of
from aengine.bus.topic import Topic
from aengine.errors import HandlerTimeout
from aengine.events import ALWAYS, AnyEvent, Selector, selectors
from aengine.state import State
from aengine.statistics import Stopwatch
from aengine.threads.event_loop import EventLoopHandle


class Bus:
    """Topics, subscribers and streams of one engine, and what all its topics share.

    The topics write `sequence`, `last_event_name` and `next_count`, the loop `next_count` too: at each event or
    iteration, where a call more would be felt. All else is changed by the methods here.

    Attributes:
        lock: held while listeners come and go, and while an event is sent: so all inboxes see one order of events.
            Re-entrant, since a signal handler may emit while its own thread does.
        sequence: the number of the last event that was sent.
        next_count: the least count of iterations at which the loop has to look closer; found anew by the loop.
        loop_handle: the event loop of the run under way, None where none is.
        reported: an error from beside the loop that is being raised in it. It was noted where it was raised.
    """

    __slots__ = (
        "_topics", "last_event_name", "lock", "logger", "loop_handle", "name", "next_count", "reported", "sequence",
        "state", "stopwatch", "streams", "subscribers",
    )  # fmt: skip

    def __init__(self, name: str, logger: logging.Logger, state: State) -> None:
        self.name = name
        self.logger = logger
        self.state = state
        self.lock = RLock()
        self.sequence = 0
        self.last_event_name: str | None = None
        self.next_count = ALWAYS
        self.stopwatch = Stopwatch()
        self.loop_handle: EventLoopHandle | None = None
        self.reported: BaseException | None = None
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
        """All topics that were asked for so far."""
        return tuple(self._topics.values())

    @property
    def own_counts(self) -> dict[str, int]:
        """How often each event was fired, of those that count their own firings."""
        return {topic.name: topic.own_count for topic in self.topics if topic.own_count}

    def restore_own_counts(self, counts: Mapping[str, int]) -> None:
        """Have the events that count their own firings go on from here; from 0, if they are not named."""
        for topic in {*self.topics, *map(self.topic, counts)}:
            topic.restore_own_count(counts.get(topic.name, 0))

    # Inline handlers

    def add_inline(
        self, event: AnyEvent, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[InlineHandler]:
        """Add an inline handler to each of the events; to all, or, when it cannot be called, to none."""
        return self._listen([InlineHandler(selector, handler, args, kwargs) for selector in selectors(event)])

    def _listen(self, handlers: list[InlineHandler]) -> list[InlineHandler]:
        for one in handlers:
            self.topic(one.selector.name).listen(one)
        return handlers

    def remove_these(self, handlers: list[InlineHandler]) -> None:
        """Remove what `add_inline` returned."""
        for one in handlers:
            self.topic(one.selector.name).unsubscribe([one])

    def find_inline(self, handler: Callable[..., Any], selector: Selector | None) -> list[InlineHandler]:
        """Return where this handler listens: anywhere; to an event; or, if it is filtered, with that very filter."""
        topics = self.topics if selector is None else [self.topic(selector.name)]
        found = [one for topic in topics for one in topic.inline if one.handler == handler]
        exact = selector is not None and selector.filter is not None
        return [one for one in found if one.selector == selector] if exact else found

    def remove_inline(self, handler: Callable[..., Any], selector: Selector) -> bool:
        """Remove this handler where it listens with this very filter, or with none. Says whether it did."""
        found = [one for one in self.find_inline(handler, selector) if one.selector == selector]
        self.remove_these(found)
        return bool(found)

    # Subscribers and streams

    def add_subscriber(self, subscriber: Subscriber) -> None:
        """Add a subscriber. Its task is started by the caller, or by the next run."""
        with self.lock:
            self.subscribers += (subscriber,)
        subscriber.subscribe()

    def remove_subscriber(self, subscriber: Subscriber) -> None:
        """Remove a subscriber. What it has accepted it still handles; then its task ends."""
        with self.lock:
            self.subscribers = tuple(one for one in self.subscribers if one is not subscriber)
        subscriber.unsubscribe()
        subscriber.inbox.close_nowait()

    def add_stream(self, stream: Stream) -> None:
        """Add a stream that is entered."""
        with self.lock:
            self.streams += (stream,)
        stream.subscribe()

    def remove_stream(self, stream: Stream) -> None:
        """Remove a stream that is left. What it has not read is discarded."""
        with self.lock:
            self.streams = tuple(one for one in self.streams if one is not stream)
        stream.unsubscribe()
        stream.inbox.close_nowait(discard=True)

    @property
    def must_await(self) -> bool:
        """Whether something listens that needs an event loop."""
        return bool(self.subscribers) or any(one.is_async for topic in self.topics for one in topic.inline)

    # Runs

    def reset(self) -> None:
        """A run begins: the clock starts, and filters look ahead from where the counters stand."""
        self.start_clock()
        for topic in self.topics:
            topic.reset()

    def enter_loop(self, loop_handle: EventLoopHandle) -> None:
        """A run begins on an event loop: what waits for room in an inbox waits there."""
        self.loop_handle = loop_handle

    def leave_loop(self) -> None:
        """The run on an event loop is over."""
        self.loop_handle = self.reported = None

    def report(self, error: BaseException | None) -> None:
        """An error from beside the loop is about to be raised in it."""
        self.reported = error

    def start_clock(self) -> None:
        """A run begins, or goes on."""
        self.stopwatch = Stopwatch()
        self.next_count = ALWAYS

    def end_streams(self) -> None:
        """The run is over: what waits in the streams can still be read, then they end."""
        for stream in self.streams:
            stream.inbox.close_nowait()

    def cancel_late(self, late: list[Subscriber], grace: float) -> HandlerTimeout:
        """Cancel the subscribers that were not done in time. Returns the error that says what was lost."""
        lost = "; ".join(
            f"{one.name!r} of {' | '.join(map(str, one.selectors))} "
            + (
                f"in {one.inbox.in_hand.name} ({place_of(one.inbox.in_hand)})"
                if one.inbox.in_hand
                else "before its next event"
            )
            + f", {len(one.inbox)} more discarded"
            for one in late
        )
        for one in late:
            one.cancel()
        return HandlerTimeout(
            f"after {grace} seconds of grace these subscribers of engine {self.name!r} were still busy: {lost}"
        )

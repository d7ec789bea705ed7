"""The bus of one engine: its topics, the subscribers beside its step, and the streams of whoever reads along."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from aengine.bus.listeners import InlineHandler
from aengine.bus.stream import Stream
from aengine.bus.subscriber import Subscriber, place_of
from aengine.bus.topic import DispatchContext, Topic
from aengine.errors import HandlerTimeout
from aengine.events import AnyEvent, Selector, selectors
from aengine.state import State


class Bus(DispatchContext):
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

    def count_firing(self, topic: Topic) -> int:
        """Return the counter of an event that fires now."""
        is_counted = topic.name in self.state.event_to_attr
        return topic.record_firing(self.count_of(topic) if is_counted else topic.count_own_firing())

    def count_of(self, topic: Topic) -> int:
        """Return where the counter of an event stands."""
        counter = self.state.event_to_attr.get(topic.name)
        return topic.own_count if counter is None else int(getattr(self.state, counter, 0))

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
            self.topic(one.selector.name).unsubscribe([one])

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
        topic.unsubscribe(found)
        return bool(found)

    def add_subscriber(self, subscriber: Subscriber) -> None:
        """Add a subscriber; who starts runs it from then on."""
        with self.lock:
            self.subscribers += (subscriber,)
        subscriber.subscribe(self.count_of)

    def remove_subscriber(self, subscriber: Subscriber) -> None:
        """Remove a subscriber. What it has accepted it still handles; then its task ends."""
        with self.lock:
            self.subscribers = tuple(one for one in self.subscribers if one is not subscriber)
        subscriber.unsubscribe()
        subscriber.inbox.close_nowait()

    @property
    def must_await(self) -> bool:
        """Whether somebody listens who needs an event loop."""
        return bool(self.subscribers) or any(one.is_async for topic in self.topics for one in topic.inline)

    def reset(self) -> None:
        """A run begins: filters look ahead from where the counters stand, and the clock starts."""
        self.start_clock()
        for topic in self.topics:
            topic.reset(self.count_of(topic))

    def end_streams(self) -> None:
        """The run is over: their readers come to an end."""
        for stream in self.streams:
            stream.inbox.close_nowait()

    def give_up(self, late: list[Subscriber], grace: float) -> HandlerTimeout:
        """End what did not end by itself. Returns the error that says what was lost."""
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
            one.give_up()
        return HandlerTimeout(
            f"after {grace} seconds of grace these subscribers of engine {self.name!r} were still busy: {lost}"
        )

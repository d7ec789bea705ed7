"""EventEmitter: the part of an engine that is about events: their listeners, and firing the user's own."""

import logging
from collections.abc import Awaitable, Callable, Container, Mapping
from enum import Enum
from functools import partial
from typing import Any, Protocol, Self

from aengine.bus.bus import Bus
from aengine.bus.dispatch import async_handler_message, drive, drive_blocking, no_room, reading
from aengine.bus.inbox import BackpressureWait, Inbox
from aengine.bus.listeners import InlineHandler
from aengine.bus.subscriber import Subscriber
from aengine.bus.topic import Topic
from aengine.callables import name_of
from aengine.events import Event, EventEnum, EventLike, Events, Selector, check_no_event, event_name, selectors
from aengine.guesses import near_word
from aengine.state import State, Stateful
from aengine.statistics import ListenerInfo
from aengine.threads.worker import close_unawaited


class RemovableEventHandle:
    """What `add_event_handler`, `subscribe`, `add_service` and every `attach` return: removes what they have added.

    By call, or at the end of a `with`.
    """

    def __init__(self, remove: Callable[[], object]) -> None:
        self._remove: Callable[[], object] | None = remove

    def remove(self) -> None:
        """Remove what was added; of handlers, from the next dispatch on. A second call does nothing."""
        remove, self._remove = self._remove, None
        if remove is not None:
            remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Runner(Protocol):
    """What advances the run under way, as far as events need it. A driver is one."""

    @property
    def can_wait(self) -> bool:
        """Whether room in a full inbox can be waited for: the subscribers' tasks run."""
        ...

    @property
    def wait_blocking(self) -> Callable[[Awaitable[Any]], Any] | None:
        """What blocks until something has been awaited on the event loop. None unless the caller is on the worker."""
        ...

    def defer_backpressure(self, waits: list[BackpressureWait], /) -> None:
        """Have the loop wait for room before its next step, in place of a caller that cannot wait."""
        ...

    def start(self, subscriber: Subscriber) -> None:
        """Have a subscriber that was added during the run handle what it is sent. From any thread."""
        ...

    async def flush(self) -> None:
        """Wait until every event dispatched so far is handled."""


_OURS = {event.name: event for event in Events}  # once: the name of a member is slow to get


class EventEmitter:
    """Listeners come and go, events are fired: while a run lasts and between runs.

    It holds no engine, since the engine holds it: where handlers are called the engine is an argument.

    Attributes:
        bus: the topics, subscribers and streams.
        runner: what advances the run under way, None between runs.
        registered: the events that there are, by name, as they were given.
    """

    def __init__(self, name: str, logger: logging.Logger, state: State) -> None:
        self.bus: Bus = Bus(name, logger, state)
        self.runner: Runner | None = None
        self.registered: dict[str, Any] = dict(_OURS)
        self._attributes: dict[str, str] = {}  # of the state, that count events of the user's

    def __del__(self) -> None:
        """The engine is gone: the bus and its topics refer to each other, and would wait for the garbage collector.

        And with them the state, the last output and all that users have put there; a DataLoader ends its workers late.
        """
        if "bus" in vars(self):  # else it is but half made, as a copy that could not be made
            self.bus.close()

    def attach(self, runner: Runner | None) -> None:
        """A runner begins to advance a run; with None, no run is under way any more."""
        self.runner = runner

    # Listening

    def select(self, event: EventLike) -> tuple[Selector, ...]:
        """Take an event apart, as `selectors`.

        Raises:
            TypeError: this is no event.
            ValueError: it is not registered.
        """
        chosen = selectors(event)
        for selector in chosen:
            if selector.name not in self.registered:
                word = near_word(selector.name, self.registered)
                near = f"{word}? Else " if word else ""
                raise ValueError(
                    f"engine {self.bus.name!r} has no event {selector.name!r}: {near}register_events() makes"
                    f" one. It has {', '.join(self.registered)}"
                )
        return chosen

    def add_inline(
        self, event: EventLike, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RemovableEventHandle:
        """Add an inline handler, to each of several events."""
        selected = self.select(event)
        check_no_event(handler, "(event, handler); several events are joined by |")
        # All are made before one listens: what cannot be called is added to none.
        added = [InlineHandler(selector, handler, args, kwargs) for selector in selected]
        for one in added:
            self.bus.topic(one.selector.name).listen(one)
        return RemovableEventHandle(partial(self._remove, added))

    def _remove(self, handlers: list[InlineHandler]) -> None:
        for one in handlers:
            self.bus.topic(one.selector.name).unsubscribe([one])

    def remove_inline(self, handler: Callable[..., Any], event: EventLike) -> None:
        """Remove an inline handler from the very event that it was added with, or raise ValueError."""
        check_no_event(handler, "remove_event_handler(handler, event)")
        for selector in self.select(event):
            found = [one for one in self._find(handler, selector) if one.selector == selector]
            if not found:
                raise ValueError(
                    f"handler {name_of(handler)} does not listen to {selector}: a handler is removed by the very event"
                    " it was added with, its filter included"
                )
            self._remove(found)

    def has_inline(self, handler: Callable[..., Any], event: EventLike | None) -> bool:
        """Say whether an inline handler listens: to anything; to an event, or, filtered, with that very filter."""
        check_no_event(handler, "has_event_handler(handler, event)")
        if event is None:
            return any(one.handler == handler for topic in self.bus.topics for one in topic.inline)
        return any(
            selector.filter is None or one.selector == selector
            for selector in selectors(event)
            for one in self._find(handler, selector)
        )

    def _find(self, handler: Callable[..., Any], selector: Selector) -> list[InlineHandler]:
        return [one for one in self.bus.topic(selector.name).inline if one.handler == handler]

    def subscribe(self, subscriber: Subscriber) -> RemovableEventHandle:
        """Add a subscriber; where a run is under way, it takes part from now on."""
        self.bus.add(subscriber)
        if self.runner is not None:
            self.runner.start(subscriber)
        return RemovableEventHandle(partial(self.bus.remove, subscriber))

    def listeners(self) -> tuple[ListenerInfo, ...]:
        """Return what listens, as `Engine.listeners`."""
        bus = self.bus
        inline = [one for topic in bus.topics for one in topic.inline if not one.is_internal]
        return (
            *(ListenerInfo(one.name, str(one.selector), "inline") for one in inline),
            *(ListenerInfo(one.name, one.events, "subscriber") for one in bus.subscribers),
            *(ListenerInfo(one.name, one.events, "stream") for one in bus.streams),
        )

    def stateful_listeners(self, engine: Any) -> list[Any]:
        """Return the objects that listen and have a state to save, other than the engine itself."""
        handlers = [one.handler for topic in self.bus.topics for one in topic.inline]
        handlers += [one.handler for one in self.bus.subscribers]
        found: dict[int, Any] = {}
        for handler in handlers:
            function: Any = handler.func if isinstance(handler, partial) else handler
            owner = getattr(function, "__self__", function)
            if isinstance(owner, Stateful) and owner is not engine and not isinstance(owner, type):
                found[id(owner)] = owner
        return list(found.values())

    # Events of the user's own

    def register(self, events: tuple[str | EventEnum, ...], event_to_attr: Mapping[Any, str] | None) -> None:
        """Register events, and the attributes of the state that count them."""
        wanted: dict[str, Any] = {}
        for event in events:
            name = event_name(event)
            if name is None or isinstance(event, Event):
                given: Any = event
                several = f": write *{given.__name__}" if isinstance(given, type) and issubclass(given, Enum) else ""
                raise TypeError(
                    f"register_events() takes names and members of a subclass of EventEnum, got {event!r}{several}"
                )
            there = wanted.setdefault(name, self.registered.get(name, event))
            if not _is_same(there, event):
                raise ValueError(
                    f"engine {self.bus.name!r} has an event {name!r} already, {_shown(there)}, and events are equal by"
                    f" name: handlers of one would run at the other. Give {_shown(event)} another name"
                )
        attributes = _attributes_by_name(event_to_attr, {*self.registered, *wanted})
        self.registered.update(wanted)
        self._attributes.update(attributes)
        self._count_in(self.bus.state, attributes)

    def replace_state(self, state: State) -> None:
        """Have another state in place of this one: it counts the same events by the same attributes."""
        self._count_in(state, self._attributes)
        self.bus.state = state
        for topic in self.bus.topics:
            topic.reschedule(topic.count)

    @staticmethod
    def _count_in(state: State, attributes: Mapping[str, str]) -> None:
        state.event_to_attr.update(attributes)
        for attribute in attributes.values():
            if not hasattr(state, attribute):
                setattr(state, attribute, 0)

    def has_registered(self, event: EventLike) -> bool:
        """Say whether all of these can be listened to here."""
        return all(selector.name in self.registered for selector in selectors(event))

    def fire(self, engine: Any, event: EventLike, payload: Any) -> None:
        """Fire an event from plain code, as `Engine.fire_event`."""
        topic, count = self._topic_to_fire(event, payload)
        runner = self.runner
        wait_for = None if runner is None else runner.wait_blocking
        if wait_for is None and any(handler.is_async for handler in topic.inline):
            raise RuntimeError(async_handler_message(topic.name))
        deferred: list[BackpressureWait] = []

        def defer(wanted: Awaitable[Any]) -> None:
            if not isinstance(wanted, BackpressureWait):  # a handler turned out to be async
                close_unawaited(wanted)
                raise RuntimeError(async_handler_message(topic.name))  # noqa: TRY004 -- the place is wrong, not the type
            deferred.append(wanted)

        try:
            drive_blocking(topic.dispatch(engine, count, payload), wait_for or defer)
        finally:
            if (reader := reading.get()) is not None:
                self._fired_by(reader)
        if deferred and runner is None:
            raise no_room(deferred[0])
        if deferred and runner is not None:
            runner.defer_backpressure(deferred)

    async def emit(self, engine: Any, event: EventLike, payload: Any) -> None:
        """Fire an event from async code, as `Engine.emit`."""
        topic, count = self._topic_to_fire(event, payload)
        runner = self.runner
        try:
            await drive(topic.dispatch(engine, count, payload), can_wait=runner is not None and runner.can_wait)
        finally:
            if (reader := reading.get()) is not None:
                self._fired_by(reader)

    def _fired_by(self, reader: Inbox) -> None:
        """Have the end of the run wait for what a subscriber's handler has fired; not for what comes from elsewhere."""
        if reader.is_of(self.bus.lock):  # else the handler is another engine's
            self.bus.last_of_subscribers = self.bus.sequence

    async def flush(self) -> None:
        """Wait until every event that was fired before this call has been handled, as `Engine.flush`."""
        if self.runner is not None:
            await self.runner.flush()
            return
        waiting = [one.name for one in self.bus.subscribers if not one.inbox.is_idle]
        if waiting:
            raise RuntimeError(
                f"flush() would wait for ever: events wait for {waiting}, and no run is under way to handle them"
            )

    def name_to_fire(self, event: EventLike) -> str:
        """Return the name of the one event that this is; raise ValueError for several."""
        chosen = self.select(event)
        if len(chosen) != 1:
            raise ValueError(f"one event is fired at a time, got {event!r}")
        return chosen[0].name

    def _topic_to_fire(self, event: EventLike, payload: Any) -> tuple[Topic, int]:
        topic = self.bus.topic(self.name_to_fire(event))
        return topic, topic.count_firing(payload)

    @property
    def last_event(self) -> Any:
        """The event, as it was registered, that was fired last; None before the first."""
        name = self.bus.last_event_name
        return None if name is None else self.registered[name]


def _attributes_by_name(event_to_attr: Any, registered: Container[str]) -> dict[str, str]:
    """Return what `register_events` was given, by the names of the events; refuse what is nothing of the kind."""
    example = 'such as {Backward.DONE: "backward_passes"}'
    if event_to_attr is not None and not isinstance(event_to_attr, Mapping):
        raise TypeError(
            f"event_to_attr= is a dictionary of events to attributes of the state, {example}; got {event_to_attr!r}"
        )
    attributes: dict[str, str] = {}
    for event, attribute in (event_to_attr or {}).items():
        name = event_name(event)
        if name is None or not isinstance(attribute, str):
            raise TypeError(
                f"event_to_attr= maps an event to the name of an attribute of the state, {example}; got {event!r}:"
                f" {attribute!r}"
            )
        if name not in registered:
            raise ValueError(f"event_to_attr= names the event {name!r}, which is not registered: register it, too")
        attributes[name] = attribute
    return attributes


def _is_same(there: Any, event: Any) -> bool:
    """Say whether two events of one name are one and the same, or one of them is pytorch-ignite's of that name."""
    definitions = [_definition(one) for one in (there, event)]
    return definitions[0] == definitions[1] or any(module.partition(".")[0] == "ignite" for module, *_ in definitions)


def _definition(event: Any) -> tuple[str, str, Any]:
    """Return where an event was defined, and as what. A class that a notebook executes anew defines the same one."""
    kind = type(event)
    return kind.__module__, kind.__qualname__, getattr(event, "value", event)


def _shown(event: Any) -> str:
    return f"the name {event!r}" if isinstance(event, str) else f"{type(event).__qualname__}.{event.name}"

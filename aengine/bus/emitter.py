"""Publishing: the half of an engine's face that is about its events: listening to them, and firing one's own."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self, TypeVar, cast, overload

from aengine.bus.bus import Bus
from aengine.bus.dispatch import async_handler_message, drive, drive_blocking, drive_nowait, no_room
from aengine.bus.inbox import Overflow
from aengine.bus.listeners import Snapshot
from aengine.bus.stream import Stream
from aengine.bus.subscriber import Subscriber
from aengine.bus.topic import Topic
from aengine.callables import name_of
from aengine.drivers.driver import Driver
from aengine.events import AnyEvent, Event, EventEnum, Events, Selector, event_name, selectors
from aengine.loop.loop import Loop
from aengine.loop.requests import Request, Requests
from aengine.state import State, Stateful

Handler = TypeVar("Handler", bound=Callable[..., Any])


class RemovableEventHandle:
    """What `add_event_handler` and `subscribe` return: removes the handler again, by call or at the end of a `with`."""

    def __init__(self, remove: Callable[[], object]) -> None:
        self._remove: Callable[[], object] | None = remove

    def remove(self) -> None:
        """Remove the handler, from the next dispatch on. A second time does nothing."""
        remove, self._remove = self._remove, None
        if remove is not None:
            remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class EventEmitter:
    """What an Engine does with its events, while a run lasts and between runs.

    Attributes:
        name: shown in logs, notes, events and statistics.
        state: what the loop knows.
    """

    def __init__(self, name: str, state: State, bus: Bus, requests: Requests) -> None:
        self.name = name
        self.state = state
        self._bus = bus
        self._requests = requests
        self._driver: Driver | None = None
        self._loop: Loop | None = None
        self._waited_for: int | None = None  # the task of a body of `iterate()`, while it has the loop wait
        self._registered: dict[str, Any] = {event.name: event for event in Events}

    # Listening

    def on(self, event: AnyEvent, *args: Any, **kwargs: Any) -> Callable[[Handler], Handler]:
        """Return a decorator that adds an inline handler, and returns it as it was. See `add_event_handler`.

        Raises:
            TypeError: this is no event, such as the handler itself, by `@engine.on` without parentheses.
            ValueError: the event is not registered with this engine.
        """
        self._selectors(event)

        def add(handler: Handler) -> Handler:
            self.add_event_handler(event, handler, *args, **kwargs)
            return handler

        return add

    def add_event_handler(
        self, event: AnyEvent, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Add an inline handler: it runs between two steps, in order of registration, and the loop waits for it.

        It is called as `handler(engine, *args, **kwargs)`, without the engine if it does not take it; for
        EXCEPTION_RAISED with the exception after the engine; for TERMINATE_SINGLE_EPOCH with `iter_counter=` if it
        takes that. A plain `def` runs where the step runs, an `async def` is awaited on the event loop; so is whatever
        else it returns that can be awaited, such as the handle of a task. What it raises fails the run. Inline handlers
        run before the event is sent to subscribers and streams.

        Raises:
            TypeError: the handler cannot be called so.
            ValueError: the event is not registered with this engine.
        """
        self._selectors(event)
        added = self._bus.add_inline(event, handler, args, kwargs)
        return RemovableEventHandle(partial(self._bus.remove_these, added))

    def remove_event_handler(self, handler: Callable[..., Any], event: AnyEvent) -> None:
        """Remove an inline handler from the very event, with its filter, that it was added with.

        Raises:
            ValueError: it does not listen to that.
        """
        for selector in self._selectors(event):
            if not self._bus.remove_inline(handler, selector):
                raise ValueError(
                    f"handler {name_of(handler)} does not listen to {selector}: a handler is removed by the very event"
                    " it was added with, its filter included"
                )

    def has_event_handler(self, handler: Callable[..., Any], event: AnyEvent | None = None) -> bool:
        """Say whether an inline handler listens: to anything; to an event, or, filtered, with that very filter."""
        if event is None:
            return bool(self._bus.find_inline(handler, None))
        return any(self._bus.find_inline(handler, selector) for selector in selectors(event))

    @overload
    def subscribe(
        self,
        event: AnyEvent,
        handler: None = None,
        *,
        buffer: int = 64,
        overflow: Overflow | str = "wait",
        on_error: str = "raise",
        snapshot: Snapshot | None = None,
        name: str | None = None,
    ) -> Callable[[Handler], Handler]: ...
    @overload
    def subscribe(
        self,
        event: AnyEvent,
        handler: Callable[[Event], Any],
        *,
        buffer: int = 64,
        overflow: Overflow | str = "wait",
        on_error: str = "raise",
        snapshot: Snapshot | None = None,
        name: str | None = None,
    ) -> RemovableEventHandle: ...
    def subscribe(
        self,
        event: AnyEvent,
        handler: Callable[[Event], Any] | None = None,
        *,
        buffer: int = 64,
        overflow: Overflow | str = "wait",
        on_error: str = "raise",
        snapshot: Snapshot | None = None,
        name: str | None = None,
    ) -> Any:
        """Add a handler beside the step: while a run lasts, in a task of its own, one `Event` at a time, in order.

        Without a handler, returns a decorator. `run()` ends when every subscriber has handled what it was sent.

        Args:
            event: what to listen to; several with `|` share one inbox.
            handler: `handler(event)`; a plain `def` runs in a thread.
            buffer: how many events may wait in its inbox.
            overflow: what happens when more come: "wait" (the loop does), "latest", "drop_oldest", "drop_new", "error".
            on_error: "raise" fails the run with what the handler raised; "log" logs and counts it, and goes on.
            snapshot: `snapshot(engine)` is called inline, between steps, once for all that share it; what it returns
                travels in `event.snapshot`.
            name: shown in notes and statistics; by default the handler's.

        Raises:
            TypeError: the handler or the snapshot cannot be called so; or this is no event.
            ValueError: the event is not registered with this engine, or an argument is wrong.
        """
        self._selectors(event)

        def add(function: Callable[[Event], Any]) -> RemovableEventHandle:
            subscriber = Subscriber(
                self._bus,
                event,
                function,
                buffer=buffer,
                overflow=overflow,
                on_error=on_error,
                snapshot=snapshot,
                name=name,
            )
            self._bus.add_subscriber(subscriber)
            if self._driver is not None:
                self._driver.start(subscriber)
            elif self._loop is not None:  # driven without an event loop, until now
                self._requests.request(Request.RAISE_FAILURE)
            return RemovableEventHandle(partial(self._bus.remove_subscriber, subscriber))

        if handler is not None:
            return add(handler)

        def decorate(function: Handler) -> Handler:
            add(function)
            return function

        return decorate

    def stream(
        self,
        event: AnyEvent,
        *,
        buffer: int = 64,
        overflow: Overflow | str = "drop_oldest",
        snapshot: Snapshot | None = None,
    ) -> Stream:
        """Return events to be read, as in the class `Stream`.

        It ends with the run. The arguments are those of `subscribe`. A slow reader loses the oldest events, which are
        counted, and never slows the loop, unless it asks for that by `overflow="wait"`.
        """
        self._selectors(event)
        return Stream(self._bus, event, buffer=buffer, overflow=overflow, snapshot=snapshot)

    # Events of one's own

    def register_events(self, *events: str | EventEnum, event_to_attr: Mapping[Any, str] | None = None) -> None:
        """Register events of one's own, to listen to and to fire.

        Args:
            events: names, or members of a subclass of EventEnum.
            event_to_attr: the attribute of the state that counts an event, for its filters. It is made, as 0, if it is
                not there. An event without one counts its firings.

        Raises:
            TypeError: something that is no event.
        """
        for event in events:
            name = event_name(event)
            if name is None or isinstance(event, Event):
                raise TypeError(f"register_events() takes names and members of a subclass of EventEnum, got {event!r}")
            self._registered[name] = event
        for event, attribute in (event_to_attr or {}).items():
            self.state.event_to_attr[cast(str, event_name(event))] = attribute
            if not hasattr(self.state, attribute):
                setattr(self.state, attribute, 0)

    def has_registered_events(self, event: AnyEvent) -> bool:
        """Say whether all of these can be listened to here."""
        return all(selector.name in self._registered for selector in selectors(event))

    def fire_event(self, event: AnyEvent) -> None:
        """Fire an event, from a step or a plain handler: inline handlers run at once, then the inboxes are filled.

        On the worker thread it waits for async handlers and for room in inboxes. Elsewhere it never waits: events over
        an inbox's bound are accepted, and the loop waits in its place before the next step.

        Raises:
            RuntimeError: the event has an async inline handler, which cannot be awaited here; or an inbox is full, and
                no run is under way in which it could be emptied.
            ValueError: the event is not registered.
        """
        topic, count = self._topic_to_fire(event)
        driver = self._driver
        if driver is not None and driver.is_here:
            drive_blocking(topic.dispatch(self, count), driver.call_in_loop)
            return
        if any(handler.is_async for handler in topic.inline):
            raise RuntimeError(async_handler_message(topic.name))
        deferred = drive_nowait(topic.dispatch(self, count), topic.name)
        if deferred and self._loop is None:
            raise no_room(deferred[0])
        self._requests.defer_backpressure(deferred)

    def fire_between_steps(self, event: AnyEvent, *, at_end: Callable[[], object] | None = None) -> bool:
        """Have the loop fire an event before its next step, where the state is that of a completed one.

        From any thread or task, without waiting. Where the loop is paused, it is fired there. Returns False, and does
        nothing, if no run is under way.

        Args:
            event: the event.
            at_end: called when `run()` is about to return or raise, however it came to that: a run that is cancelled
                before its first event, or given up by a second Ctrl-C, fires nothing any more.

        Raises:
            ValueError: the event is not registered.
        """
        return self._requests.fire(self._one_selector(event).name, at_end)

    def stateful_listeners(self) -> list[Any]:
        """Return those who listen, inline or beside the step, and have `state_dict` and `load_state_dict`.

        Of a bound method it is the object. In order of registration, event by event, each once.
        """
        handlers = [one.handler for topic in self._bus.topics for one in topic.inline]
        handlers += [one.handler for one in self._bus.subscribers]
        found: dict[int, Any] = {}
        itself: Any = self
        for handler in handlers:
            function: Any = handler.func if isinstance(handler, partial) else handler
            owner = getattr(function, "__self__", function)
            if isinstance(owner, Stateful) and owner is not itself and not isinstance(owner, type):
                found[id(owner)] = owner
        return list(found.values())

    async def emit(self, event: AnyEvent) -> None:
        """Fire an event from async code: awaits its inline handlers, and room in the inboxes of its subscribers.

        Cancellable; an event that has been sent stays sent. From a subscriber's own handler it never deadlocks: where
        waiting for room would be waiting for itself, the event is accepted over the inbox's bound.

        Raises:
            RuntimeError: an inbox is full, and no run is under way that could empty it.
            ValueError: the event is not registered.
        """
        topic, count = self._topic_to_fire(event)
        await drive(topic.dispatch(self, count), can_wait=self._driver is not None)

    async def flush(self) -> None:
        """Wait until the subscribers have handled every event that was fired before this call. Cancellable.

        Raises:
            RuntimeError: called in a subscriber's handler, or events wait and no run is under way to handle them.
        """
        if self._driver is None:
            waiting = [one.name for one in self._bus.subscribers if not one.inbox.is_idle]
            if waiting:
                raise RuntimeError(
                    f"flush() would wait for ever: events wait for {waiting}, and no run is under way to handle them"
                )
            return
        await self._driver.flush()

    def _selectors(self, event: AnyEvent) -> tuple[Selector, ...]:
        chosen = selectors(event)
        for selector in chosen:
            if selector.name not in self._registered:
                raise ValueError(
                    f"engine {self.name!r} has no event {selector.name!r}: register_events() makes one. It has"
                    f" {', '.join(self._registered)}"
                )
        return chosen

    @property
    def is_inside(self) -> bool:
        """Whether the caller is the run under way itself: what the loop waits for.

        That is its step, an inline handler, or the body of an `iterate()`.
        """
        driver = self._driver
        if driver is None:
            return False
        return driver.is_inside or (self._waited_for is not None and driver.is_task(self._waited_for))

    def _waits_for(self, task: int | None) -> None:
        self._waited_for = task

    def _one_selector(self, event: AnyEvent) -> Selector:
        chosen = self._selectors(event)
        if len(chosen) != 1:
            raise ValueError(f"one event is fired at a time, got {event!r}")
        return chosen[0]

    def _topic_to_fire(self, event: AnyEvent) -> tuple[Topic, int]:
        topic = self._bus.topic(self._one_selector(event).name)
        return topic, topic.count_firing()

    @property
    def last_event_name(self) -> Any:
        """The event, or its name, that was last dispatched to anybody; None before the first."""
        name = self._bus.last_event_name
        return None if name is None else self._registered[name]

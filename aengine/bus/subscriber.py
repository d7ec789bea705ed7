"""Subscribers: handlers beside the step, each with an inbox and a task of its own."""

from collections.abc import Callable, Hashable
from functools import partial
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import anyio

from aengine.arguments import check_choice, check_whole
from aengine.bus.dispatch import reading
from aengine.bus.inbox import OVERFLOW, Inbox, Overflow
from aengine.bus.listeners import InboxListener, Snapshot
from aengine.callables import check_callable, is_async_callable, is_awaitable, name_of
from aengine.errors import StrayCancellation
from aengine.events import Event, Selector, check_no_event
from aengine.statistics import ListenerStatistics
from aengine.threads.dedicated import DedicatedThread, wait_until_done
from aengine.threads.event_loop import EventLoopHandle, OwnCancellations
from aengine.threads.guarded import guarded

if TYPE_CHECKING:
    from aengine.bus.bus import Bus

Fail: TypeAlias = Callable[[BaseException], None]

_TURN = 0.002
"""Seconds that a subscriber whose handler never waits goes on before it lets other tasks have a turn."""

TURN_EVENTS = 32
"""Events that a subscriber handles from one look at the clock to the next, and that a stream gives in one turn."""


class Subscription:
    """What a subscriber and a stream have in common: an inbox, fed by one or several topics."""

    def __init__(
        self,
        bus: "Bus",
        selectors: tuple[Selector, ...],
        name: str | None,
        buffer: int,
        overflow: Overflow,
        snapshot: Snapshot | None,
    ) -> None:
        check_whole(buffer, "buffer=", minimum=1, of="events that may wait")
        check_choice(overflow, "overflow=", list(OVERFLOW))
        if snapshot is not None:
            check_callable(snapshot, "snapshot=", "snapshot", "engine")
        if not isinstance(snapshot, Hashable):
            snapshot = partial(cast(Snapshot, snapshot))  # shared by those that were given the very same one
        self._bus = bus
        self.events: str = " | ".join(map(str, selectors))
        self.name: str = name or f"stream of {self.events}"
        self.errors = 0
        self._busy = 0.0
        self._busy_since: float | None = None
        self.inbox: Inbox = Inbox(self.name, buffer, overflow, bus.lock)
        self._listeners = [InboxListener(selector, self.inbox, snapshot) for selector in selectors]
        self._topics = [bus.topic(selector.name) for selector in selectors]

    def subscribe(self) -> None:
        """Begin to listen."""
        for topic, listener in zip(self._topics, self._listeners, strict=True):
            topic.listen(listener)

    def unsubscribe(self) -> None:
        """Listen no more."""
        for topic in self._topics:
            topic.unsubscribe(self._listeners)

    def statistics(self) -> ListenerStatistics:
        """Return what became of the events so far."""
        accepted, handled, dropped, discarded, depth = self.inbox.counts()
        since = self._busy_since
        return ListenerStatistics(
            name=self.name,
            events=self.events,
            depth=depth,
            accepted=accepted,
            handled=handled,
            dropped=dropped,
            discarded=discarded,
            errors=self.errors,
            busy=self._busy if since is None else self._busy + perf_counter() - since,
        )


class Subscriber(Subscription):
    """A handler beside the step: while a run lasts, in a task of its own, one event at a time, in order."""

    def __init__(
        self,
        bus: "Bus",
        selectors: tuple[Selector, ...],
        handler: Callable[[Event[Any, Any]], Any],
        *,
        buffer: int,
        overflow: Overflow,
        on_error: str,
        snapshot: Snapshot | None,
        name: str | None,
    ) -> None:
        check_no_event(handler, "(event, handler); several events are joined by |")
        check_callable(handler, "a subscriber's handler", "handler", "event")
        check_choice(on_error, "on_error=", {"raise": "the run fails", "log": "counted and logged"})
        super().__init__(bus, selectors, name or name_of(handler), buffer, overflow, snapshot)
        self.handler = handler
        self._is_async = is_async_callable(handler)
        self._isolated = on_error == "log"
        self._scope: anyio.CancelScope | None = None
        self._thread: DedicatedThread | None = None  # of a plain handler, while it makes no call
        self._turn_began = 0.0

    async def consume(self, loop_handle: EventLoopHandle, fail: Fail) -> None:
        """Handle what arrives until the inbox is closed and empty. Errors go to `fail`, not to the task group.

        Shielded: what was accepted before a cancellation is still handled. `cancel()` ends it all the same.
        """
        reading.set(self.inbox)
        is_done = False

        async def consume() -> None:
            nonlocal is_done
            with anyio.CancelScope(shield=True) as self._scope:
                await self._consume(loop_handle)
                is_done = True

        await guarded(consume, fail, self._stray)
        self._scope = None
        if (thread := self._thread) is not None:
            self._thread = None
            thread.stop()  # it is idle: microseconds
        if not is_done:  # nothing takes from this inbox any more, so nothing may wait for room in it
            self.inbox.close_nowait(discard=True)

    def fail_as_stray(self, fail: Fail) -> None:
        """Its task was cancelled natively before its first step."""
        self.inbox.close_nowait(discard=True)
        fail(self._stray())

    def _stray(self) -> StrayCancellation:
        return StrayCancellation(
            f"subscriber {self.name!r} was cancelled from outside the run, or let a cancellation out"
        )

    async def _consume(self, loop_handle: EventLoopHandle) -> None:  # noqa: C901, PLR0912 -- a call more for each event is felt
        inbox, handler, is_async = self.inbox, self.handler, self._is_async
        own_cancellations = OwnCancellations()
        self._begin_work()
        try:
            while True:
                for event in islice(inbox.drain(), TURN_EVENTS):
                    try:
                        if is_async:
                            await handler(event)
                        else:
                            await self._handle_in_thread(event)
                    except BaseException as error:
                        if own_cancellations.includes(error):
                            if not isinstance(error, Exception) or not self._isolates(error, event):
                                raise
                        else:  # of something that the handler has awaited: an error like any other
                            self._handle_stray(error, event)
                if inbox.in_hand is not None:  # the last of so many, and handled: there may be more
                    inbox.mark_handled()
                    if perf_counter() - self._turn_began < _TURN:
                        continue
                elif inbox.closed:
                    return
                self._rest()
                await inbox.wait_for_event(loop_handle)
                if inbox.is_reader_stopped:
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

    def _handle_stray(self, cancellation: BaseException, event: Event[Any, Any]) -> None:
        stray = self._stray()
        stray.__cause__ = cancellation
        try:
            if not self._isolates(stray, event):
                raise stray
        finally:
            del stray  # whose traceback holds this frame: no cycle may hold the engine

    def _isolates(self, error: Exception, event: Event[Any, Any]) -> bool:
        """Note on an error where it was raised. Says whether it was logged, and the handler goes on."""
        self.errors += 1
        error.add_note(f"in subscriber {self.name!r} of {event.name}, {place_of(event)}")
        if self._isolated:
            self._bus.logger.error(
                "subscriber %r of %s failed, going on (%s)", self.name, event.name, place_of(event), exc_info=error
            )
        return self._isolated

    async def _handle_in_thread(self, event: Event[Any, Any]) -> None:
        # A thread of its own, not one of anyio's: a slow handler takes none of the application's threads, and one that
        # never returns does not keep the process from ending.
        thread, self._thread = self._thread or DedicatedThread(f"aengine {self.name}"), None
        future = thread.submit(self.handler, event)
        try:
            await wait_until_done(future)
        finally:
            if future.done():
                self._thread = thread
            else:  # cancelled: the call, and its thread, are left to end by themselves
                thread.abandon()
        try:
            result = future.result()
        finally:
            del future  # holds the error, whose traceback holds this frame
        if result is not None and is_awaitable(result):
            await result

    def cancel(self) -> str:
        """Cancel the handler now, and discard what waits. Returns what is lost by that, to show."""
        event, discarded = self.inbox.in_hand, len(self.inbox)
        where = "before its next event" if event is None else f"in {event.name} ({place_of(event)})"
        if self._scope is None:  # its task has not taken its first step, and will find nothing to do
            self.inbox.close_nowait(discard=True)
        else:
            self._scope.cancel()
        return f"{self.name!r} of {self.events} {where}, {discarded} more discarded"


def place_of(event: Event[Any, Any]) -> str:
    """Return where in its run an event was fired, to show."""
    return f"engine {event.engine_name!r}, epoch {event.epoch}, iteration {event.iteration}"

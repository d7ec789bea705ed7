"""Topic: one event and all that listens to it. Dispatch stands here, once, for inline and concurrent listeners.

A listener knows the next count at which it is due, a topic the least of its listeners': so an event that nobody
waits for yet costs the loop the comparison of two numbers. Registration happens at the door: what is called in the
loop has been checked, bound and flattened there.
"""

from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from operator import length_hint
from threading import RLock
from time import perf_counter
from types import MappingProxyType
from typing import Any, TypeAlias

from aengine.bus.inbox import BackpressureWait, Inbox
from aengine.bus.listeners import InboxListener, InlineHandler, Listener, NotYet, Snapshot
from aengine.callables import is_awaitable, name_of, refuse_stop_iteration
from aengine.errors import InboxOverflow
from aengine.events import ALWAYS, NEVER, NO_METRICS, Event, Events, new_event
from aengine.statistics import Stopwatch
from aengine.threads.event_loop import EventLoopHandle

NEVER_FIRED = ALWAYS
_LOOP_EVENTS = frozenset(event.name for event in Events)
Dispatch: TypeAlias = Generator[Awaitable[Any], Any, None]
"""Yields what must be awaited, and is sent the result or thrown the exception."""


Awaited: TypeAlias = tuple[InlineHandler, Awaitable[Any]]
DispatchFunction: TypeAlias = Callable[..., "Dispatch | None"]
Quick: TypeAlias = tuple[tuple[Callable[..., Any], ...], tuple[InlineHandler, ...], tuple[Inbox, ...]]
"""The calls of inline handlers, those handlers, and the inboxes, where none has to be asked whether it is due."""


class DispatchContext:
    """What all topics of an engine share: the order of its events, and the clock of its run."""

    __slots__ = ("last_event_name", "lock", "loop_handle", "name", "next_due", "reported", "sequence", "stopwatch")

    def __init__(self, name: str) -> None:
        self.name = name
        self.sequence = 0
        self.lock = RLock()  # re-entrant: a signal handler may emit while its own thread does
        self.loop_handle: EventLoopHandle | None = None
        self.stopwatch = Stopwatch()
        self.last_event_name: str | None = None
        self.reported: BaseException | None = None  # an error from beside the loop, which is noted where it was raised
        self.next_due = ALWAYS  # the least count at which the loop has to look closer; found anew by the loop

    def start_clock(self) -> None:
        """A run begins, or goes on."""
        self.stopwatch = Stopwatch()
        self.next_due = ALWAYS


class Topic:
    """One event of one engine, and its listeners.

    Attributes:
        due: the least count at which somebody listens.
        publish: `publish(engine, count, payload=())` calls what is due inline, in order of registration, then sends
            what is due to the inboxes. It goes as far as it can without waiting; what is left, if something must be
            awaited, is returned to be driven. Exchanged as listeners come and go.
        count: of the last firing in this run, whoever listened; the loop's hot path does not keep it.
        fired: how often it was fired, if it counts that itself.
        is_fired_by_loop: so that the handlers' time is the loop's. Else it is part of the time of who fires it, in a
            step or beside the loop.
    """

    __slots__ = (
        "_context",
        "_quick",
        "count",
        "dispatch",
        "due",
        "inbox_listeners",
        "inline",
        "is_fired_by_loop",
        "name",
        "own_count",
    )  # fmt: skip

    def __init__(self, name: str, context: DispatchContext) -> None:
        self.name = name
        self.inline: tuple[InlineHandler, ...] = ()
        self.inbox_listeners: tuple[InboxListener, ...] = ()
        self.due = NEVER
        self.own_count = 0
        self.count = NEVER_FIRED
        self.is_fired_by_loop = name in _LOOP_EVENTS
        self.dispatch: DispatchFunction = self._dispatch_to_all
        self._context = context
        # What is called and sent to each time, all of one instant.
        self._quick: Quick = (), (), ()

    def listen(self, listener: InlineHandler | InboxListener, count: int) -> None:
        """Add a listener, from the next dispatch on."""
        listener.reset(count)
        with self._context.lock:
            if isinstance(listener, InlineHandler):
                self.inline = tuple(sorted((*self.inline, listener), key=lambda one: one.is_last))
            else:
                self.inbox_listeners += (listener,)
            self._arrange()

    def unsubscribe(self, listeners: list[InlineHandler] | list[InboxListener]) -> None:
        """Remove listeners, from the next dispatch on."""
        with self._context.lock:
            self.inline = tuple(one for one in self.inline if one not in listeners)
            self.inbox_listeners = tuple(one for one in self.inbox_listeners if one not in listeners)
            self._arrange()

    def reset(self, count: int) -> None:
        """A run begins, at this count."""
        with self._context.lock:
            self.count = NEVER_FIRED
            self.is_fired_by_loop = self.name in _LOOP_EVENTS
            for listener in (*self.inline, *self.inbox_listeners):
                listener.reset(count)
            for handler in self.inline:
                handler.seconds = 0.0
            self._arrange()

    def mark_fired_by_loop(self) -> None:
        """The loop fires this: its handlers are timed as often as the iteration that they are part of."""
        if not self.is_fired_by_loop:
            with self._context.lock:
                self.is_fired_by_loop = True
                self._arrange()

    def record_firing(self, count: int) -> int:
        """Take note of the count of a firing, which may be the last one's or less: some counters stand still."""
        self.count = count
        self.reschedule(count)
        return count

    def reschedule(self, count: int) -> None:
        """Have the filters find when they are due from this count on, whatever they have seen."""
        if self.dispatch == self._dispatch_to_due:
            with self._context.lock:
                for listener in (*self.inline, *self.inbox_listeners):
                    if listener.filter is not None:
                        listener.due = listener.filter.next_due(count)
                self._find_due()

    def _arrange(self) -> None:
        listeners = (*self.inline, *self.inbox_listeners)
        inboxes = tuple(one.inbox for one in self.inbox_listeners)
        self._quick = tuple(one.call for one in self.inline), self.inline, inboxes
        has_filter = any(one.filter is not None for one in listeners)
        has_snapshot = any(one.snapshot is not None for one in self.inbox_listeners)
        if has_filter or has_snapshot or (self.inline and not self.is_fired_by_loop):
            self.dispatch = self._dispatch_to_due
        else:
            self.dispatch = self._dispatch_to_all if self.inline else self._send
        self._find_due()

    def _find_due(self) -> None:
        self.due = min([one.due for one in self.inline] + [one.due for one in self.inbox_listeners], default=NEVER)
        self._context.next_due = ALWAYS

    def count_own_firing(self) -> int:
        """Count a firing of an event that counts its own."""
        with self._context.lock:
            self.own_count += 1
            return self.own_count

    def _dispatch_to_all(self, engine: Any, _: int, payload: tuple[Any, ...] = ()) -> Dispatch | None:
        """Publish where nobody has to be asked whether he is due. Times the handlers if the iteration is timed."""
        context = self._context
        context.last_event_name = self.name
        calls, inline, inboxes = self._quick  # what is added or removed meanwhile counts from the next time on
        if payload or context.stopwatch.weight:
            handlers = iter(inline)
            awaited = self._call(handlers, engine, payload)
            if awaited is not None:
                return self._await_the_rest(awaited, handlers, engine, payload, self._sending(inboxes))
        else:
            left = iter(calls)
            try:
                for call in left:
                    result = call(engine)
                    if result is not None and is_awaitable(result):
                        at = len(calls) - length_hint(left)
                        awaited, handlers = (inline[at - 1], result), iter(inline[at:])
                        return self._await_the_rest(awaited, handlers, engine, (), self._sending(inboxes))
            except Exception as error:
                self._blame(error, f"handler {inline[-1 - length_hint(left)].name!r}", engine)
                raise
        return self._send(engine, inboxes=inboxes) if inboxes else None

    def _dispatch_to_due(self, engine: Any, count: int, payload: tuple[Any, ...] = ()) -> Dispatch | None:
        """Publish where listeners have to be asked whether they are due, or for a snapshot."""
        self._context.last_event_name = self.name
        inbox_listeners, handlers = self.inbox_listeners, self._due(engine, count)
        awaited = self._call(handlers, engine, payload)
        sending = partial(self._send_due, count=count, inbox_listeners=inbox_listeners)
        if awaited is not None:
            return self._await_the_rest(awaited, handlers, engine, payload, sending)
        if inbox_listeners:
            return sending(engine)
        self._find_due()
        return None

    def _call(self, handlers: Iterator[InlineHandler], engine: Any, payload: tuple[Any, ...]) -> Awaited | None:
        """Call handlers until there is one to be awaited."""
        weight = self._context.stopwatch.weight if self.is_fired_by_loop else 1
        now = perf_counter()
        for handler in handlers:
            began = now
            try:
                result = handler.call(engine, *payload)
                if result is not None and is_awaitable(result):
                    return handler, result
            except Exception as error:
                self._blame(error, f"handler {handler.name!r}", engine)
                raise
            finally:  # those that are filtered are rare enough to time each call
                now = perf_counter()
                handler.seconds += (now - began) * (weight if handler.filter is None else 1)
        return None

    def _await_the_rest(
        self,
        awaited: Awaited | None,
        handlers: Iterator[InlineHandler],
        engine: Any,
        payload: tuple[Any, ...],
        send: Callable[[Any], Dispatch | None] | None,
    ) -> Dispatch:
        while awaited is not None:
            handler, result = awaited
            began = perf_counter()
            try:
                yield result
            except Exception as error:
                self._blame(error, f"handler {handler.name!r}", engine)
                raise
            handler.seconds += perf_counter() - began
            awaited = self._call(handlers, engine, payload)
        if send is not None:
            yield from send(engine) or ()

    def _due(self, engine: Any, count: int) -> Iterator[InlineHandler]:
        for handler in self.inline:
            if handler.filter is None or (handler.due <= count and self._admits(handler, handler.name, engine, count)):
                yield handler

    def _admits(self, listener: Listener, name: str, engine: Any, count: int) -> bool:
        try:
            return listener.filter is None or listener.should_run(engine, count)
        except Exception as error:
            self._blame(error, f"the filter of {name!r}", engine)
            raise

    def _sending(self, inboxes: tuple[Inbox, ...]) -> Callable[[Any], Dispatch | None] | None:
        return partial(self._send, inboxes=inboxes) if inboxes else None

    def _send_due(self, engine: Any, count: int, inbox_listeners: tuple[InboxListener, ...]) -> Dispatch:
        due = [
            listener
            for listener in inbox_listeners
            if listener.due <= count and self._admits(listener, listener.inbox.name, engine, count)
        ]
        if due:
            taken = yield from self._take_snapshots(engine, due)
            snapshots = {listener.inbox: taken[listener.snapshot] for listener in due}
            yield from self._send(engine, inboxes=[one.inbox for one in due], snapshots=snapshots) or ()
        self._find_due()

    def _take_snapshots(
        self, engine: Any, due: Iterable[InboxListener]
    ) -> Generator[Awaitable[Any], Any, dict[Snapshot | None, Any]]:
        taken: dict[Snapshot | None, Any] = {None: None}
        for listener in due:
            take = listener.snapshot
            if take is not None and take not in taken:
                try:
                    while type(value := take(engine)) is NotYet:
                        yield value.awaitable
                    taken[take] = (yield value) if value is not None and is_awaitable(value) else value
                except Exception as error:
                    self._blame(error, f"snapshot {name_of(take)!r} for {listener.inbox.name!r}", engine)
                    raise
        return taken

    def _send(
        self,
        engine: Any,
        _count: int = 0,
        _payload: tuple[Any, ...] = (),
        inboxes: Iterable[Inbox] | None = None,
        snapshots: Mapping[Inbox, Any] | None = None,
    ) -> Dispatch | None:
        """Put an event into the inboxes. This is `publish` itself where nobody but plain inboxes listens.

        Raises:
            InboxOverflow: an inbox with that policy is full. All others have got the event.
        """
        context, state, full, overflow = self._context, engine.state, None, None
        context.last_event_name = name = self.name
        metrics = state.metrics
        lock = context.lock
        lock.acquire()  # so that every inbox gets events in the order of their sequence numbers
        try:
            context.sequence = sequence = context.sequence + 1
            event = new_event(
                Event,
                (
                    name,
                    context.name,
                    sequence,
                    state.iteration,
                    state.epoch,
                    state.epoch_length,
                    state.max_epochs,
                    state.output,
                    MappingProxyType(dict(metrics)) if metrics else NO_METRICS,
                    perf_counter(),
                    None,
                ),
            )
            for inbox in self._quick[2] if inboxes is None else inboxes:
                if snapshots is not None:
                    event = new_event(Event, (*event[:-1], snapshots[inbox]))
                inbox.accepted += 1
                waiting = inbox.waiting
                if len(waiting) < inbox.limit:  # `put_nowait`, but for a call that would cost a tenth of all this
                    waiting.append(event)
                    if inbox.wakeup is not None:
                        inbox.call_reader()
                    continue
                try:
                    if not inbox.put_at_limit(event):
                        full = [inbox] if full is None else [*full, inbox]
                except InboxOverflow as error:
                    overflow = error
        finally:
            lock.release()  # a with statement costs twice as much
        if overflow is not None:
            raise overflow
        return None if full is None else self._wait_for_room(full)

    def _wait_for_room(self, full: list[Inbox]) -> Dispatch:
        for inbox in full:
            yield BackpressureWait(inbox, self._context.loop_handle)

    def parts(self) -> list["Topic"]:
        """Return one topic for each listener: what fails in one does not keep the event from the others."""
        parts = [Topic(self.name, self._context) for _ in (*self.inline, *self.inbox_listeners)]
        for part, handler in zip(parts, self.inline, strict=False):
            part.inline = (handler,)
        for part, listener in zip(parts[len(self.inline) :], self.inbox_listeners, strict=True):
            part.inbox_listeners = (listener,)
        for part in parts:
            part.is_fired_by_loop = self.is_fired_by_loop
            part._arrange()  # noqa: SLF001 -- another of this class
        return parts

    def clear(self) -> None:
        """Let go of the listeners. It is a cycle, by `publish`: one that was made for once holds nothing then."""
        self.inline = self.inbox_listeners = ()
        self._quick = (), (), ()

    def finish(self, engine: Any, count: int) -> Dispatch:
        """Dispatch once more, at the end of a run, to those that asked for it and have not seen this count."""
        last = Topic(self.name, self._context)
        last.inline = tuple(one for one in self.inline if one.runs_at_end(count))
        last.inbox_listeners = tuple(one for one in self.inbox_listeners if one.runs_at_end(count))
        for listener in (*last.inline, *last.inbox_listeners):
            listener.due = ALWAYS
        last._arrange()
        try:
            if last.inline or last.inbox_listeners:
                yield from last.dispatch(engine, count) or ()
        finally:
            last.clear()

    def _blame(self, error: Exception, what: str, engine: Any) -> None:
        """Note on an error where it was raised."""
        refuse_stop_iteration(error, what)
        if error is self._context.reported:
            return
        state = engine.state
        error.add_note(
            f"in {what} of {self.name}, engine {self._context.name!r}, epoch {state.epoch}, iteration {state.iteration}"
        )

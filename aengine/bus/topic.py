"""Topic: one event of one engine, the counter that its filters look at, and its dispatch to all that listens.

A listener knows the next count at which it is due, and a topic knows the smallest of them. So an event for which no
listener is due costs the loop the comparison of two numbers. What is called in the loop was checked and bound at
registration.
"""

from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from operator import length_hint
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from aengine.bus.inbox import BackpressureWait, Inbox
from aengine.bus.listeners import InboxListener, InlineHandler, Listener, NotYet, Snapshot
from aengine.callables import is_awaitable, name_of, refuse_stop_iteration
from aengine.errors import InboxOverflow
from aengine.events import ALWAYS, NEVER, NO_METRICS, Event, Events, new_event

if TYPE_CHECKING:
    from aengine.bus.bus import Bus

_LOOP_EVENTS = frozenset(event.name for event in Events)

Dispatch: TypeAlias = Generator[Awaitable[Any], Any, None]
"""Yields what must be awaited, and is sent the result or thrown the exception."""

DispatchFunction: TypeAlias = Callable[..., Dispatch | None]

_Listeners: TypeAlias = tuple[tuple[InlineHandler, ...], tuple[InboxListener, ...]]


class Topic:
    """One event of one engine, and its listeners.

    Attributes:
        next_count: the least count at which something listens.
        dispatch: `dispatch(engine, count, payload=None)` calls what is due inline, in order of registration, then sends
            what is due to the inboxes. Where something must be awaited, what is left to be done is returned, to be
            driven. There are three, exchanged as listeners come and go. A payload of None is none.
        last_count: its counter at the last firing in this run, None before the first. The loop's hot path does not
            keep it: it is recorded at the end of the run.
        has_at_end: whether a listener is to have a last event at the end of the run.
        is_fired_by_loop: whether the loop fires it. Then the time of its handlers counts as the loop's, otherwise as
            that of the step or the task that fires it.
    """

    __slots__ = (
        "_bus", "_has_filter", "_hot", "_last_payload", "dispatch", "has_at_end", "inbox_listeners", "inline",
        "is_fired_by_loop", "last_count", "name", "next_count",
    )  # fmt: skip

    has_at_end: bool

    def __init__(self, name: str, bus: "Bus") -> None:
        self.name: str = name
        self.inline: tuple[InlineHandler, ...] = ()
        self.inbox_listeners: tuple[InboxListener, ...] = ()
        self.next_count: int = NEVER
        self.last_count: int | None = None
        self.is_fired_by_loop: bool = name in _LOOP_EVENTS
        self.dispatch: DispatchFunction = self._send
        self._bus = bus
        self._has_filter = self.has_at_end = False
        self._last_payload: Any = None  # of the last firing, while something asks for one more event at the end
        # The calls of the inline handlers, the inboxes, and the listeners that these belong to. In one tuple, so that a
        # dispatch finds all of one instant, though another thread adds or removes one meanwhile.
        self._hot: tuple[tuple[Callable[..., Any], ...], tuple[Inbox, ...], _Listeners] = (), (), ((), ())

    # Listeners: one that is added or removed during a dispatch counts from the next one on

    def listen(self, listener: InlineHandler | InboxListener) -> None:
        """Add a listener."""
        listener.reset(self.count)
        with self._bus.lock:
            if isinstance(listener, InlineHandler):
                self.inline = tuple(sorted((*self.inline, listener), key=lambda one: one.is_observer))
            else:
                self.inbox_listeners += (listener,)
            self._choose_dispatch()

    def unsubscribe(self, listeners: list[InlineHandler] | list[InboxListener]) -> None:
        """Remove listeners."""
        with self._bus.lock:
            self.inline = tuple(one for one in self.inline if one not in listeners)
            self.inbox_listeners = tuple(one for one in self.inbox_listeners if one not in listeners)
            self._choose_dispatch()

    def reset(self) -> None:
        """A run begins: filters look ahead from where the counter stands."""
        with self._bus.lock:
            self.last_count = self._last_payload = None
            self.is_fired_by_loop = self.name in _LOOP_EVENTS
            for listener in (*self.inline, *self.inbox_listeners):
                listener.reset(self.count)
            self._choose_dispatch()

    def close(self) -> None:
        """The engine is gone: refer to this no more, nor to listeners, which may refer to the bus."""
        self.dispatch = _dispatch_nothing
        self.inline = self.inbox_listeners = ()
        self._hot = (), (), ((), ())

    def mark_fired_by_loop(self) -> None:
        """The loop fires this: its handlers are timed as often as the iteration that they are part of."""
        if not self.is_fired_by_loop:
            with self._bus.lock:
                self.is_fired_by_loop = True
                self._choose_dispatch()

    def _choose_dispatch(self) -> None:
        listeners = (*self.inline, *self.inbox_listeners)
        calls, inboxes = tuple(one.call for one in self.inline), tuple(one.inbox for one in self.inbox_listeners)
        self._hot = calls, inboxes, (self.inline, self.inbox_listeners)
        filters = [one.filter for one in listeners if one.filter is not None]
        self._has_filter, self.has_at_end = bool(filters), any(one.at_end for one in filters)
        has_snapshot = any(one.snapshot is not None for one in self.inbox_listeners)
        if self._has_filter or has_snapshot or (self.inline and not self.is_fired_by_loop):
            self.dispatch = self._dispatch_to_due
        else:
            self.dispatch = self._dispatch_to_all if self.inline else self._send
        self._find_next_count()

    # The counter

    @property
    def count(self) -> int:
        """Where the counter of the event stands: an attribute of the state, or the firings so far."""
        state = self._bus.state
        counter = state.event_to_attr.get(self.name)
        return self._bus.own_counts.get(self.name, 0) if counter is None else int(getattr(state, counter, 0))

    def count_firing(self, payload: Any = None) -> int:
        """The event is fired: count that, unless an attribute of the state does, and return the counter."""
        self._last_payload = payload if self.has_at_end else None
        bus = self._bus
        bus.last_event_name = self.name
        if self.name in bus.state.event_to_attr:
            count = self.count
        else:
            with bus.lock:  # a step and a task may fire it at once, and each is to have a count of its own
                bus.own_counts[self.name] = count = self.count + 1
        self.record_firing(count)
        return count

    def record_firing(self, count: int) -> None:
        """Take note of a firing. Its count may be that of the last one or less: some counters stand still."""
        self.last_count = count
        self.reschedule(count)

    def reschedule(self, count: int) -> None:
        """Have the filters find when they are due from this count on, whatever they have seen."""
        if self._has_filter:
            with self._bus.lock:
                for listener in (*self.inline, *self.inbox_listeners):
                    listener.reschedule(count)
                self._find_next_count()

    def _find_next_count(self) -> None:
        next_counts = [one.next_count for one in (*self.inline, *self.inbox_listeners)]
        self.next_count = min(next_counts, default=NEVER)
        self._bus.next_count = ALWAYS

    # Dispatch. `_deliver` is the general case. `_dispatch_to_all` and `_send` are what the loop may call at every
    # iteration: they ask no listener whether it is due, time no handler, and make no generator.

    def _dispatch_to_due(self, engine: Any, count: int, payload: Any = None) -> Dispatch:
        return self._deliver(engine, count, payload, self._hot[2])

    def _dispatch_to_all(self, engine: Any, count: int, payload: Any = None) -> Dispatch | None:
        """Dispatch where no listener has a filter or a snapshot: if the iteration is not timed, just call."""
        bus = self._bus
        bus.last_event_name = self.name
        calls, inboxes, listeners = self._hot
        if payload is not None or bus.stopwatch.weight:
            return self._deliver(engine, count, payload, listeners)
        left = iter(calls)
        try:
            for call in left:
                result = call(engine)
                if result is not None and is_awaitable(result):
                    inline, inbox_listeners = listeners
                    begun = inline[len(calls) - length_hint(left) - 1 :]
                    return self._deliver(engine, count, None, (begun, inbox_listeners), awaited=result)
        except Exception as error:
            self._note(error, f"handler {listeners[0][-1 - length_hint(left)].name!r}")
            raise
        return self._send(engine, inboxes=inboxes) if inboxes else None

    def dispatch_to_each(self, engine: Any, count: int, payload: Any) -> list[Dispatch]:
        """Return a dispatch for each listener: what fails in one does not keep the event from the others."""
        inline, inbox_listeners = self._hot[2]
        each: list[_Listeners] = [*(((one,), ()) for one in inline), *(((), (one,)) for one in inbox_listeners)]
        return [self._deliver(engine, count, payload, one) for one in each]

    def dispatch_at_end(self, engine: Any) -> Dispatch:
        """Dispatch once more, at the end of a run, to those that asked for it and have not seen the last count."""
        if (count := self.last_count) is not None:
            inline = tuple(one for one in self.inline if one.runs_at_end(count))
            inbox_listeners = tuple(one for one in self.inbox_listeners if one.runs_at_end(count))
            payload, self._last_payload = self._last_payload, None
            if inline or inbox_listeners:
                yield from self._deliver(engine, count, payload, (inline, inbox_listeners), all_due=True)

    def _deliver(  # noqa: C901 -- one pass over the handlers: a call more for each is felt
        self,
        engine: Any,
        count: int,
        payload: Any,
        listeners: _Listeners,
        *,
        awaited: Any = None,
        all_due: bool = False,
    ) -> Dispatch:
        """Call those handlers that are due, and time them; then send to those inboxes whose listeners are.

        Each filter is asked when its turn comes, since the handlers before may change what it looks at; none with
        `all_due`. `awaited` is what the first handler, which has been called already, gave to be awaited.
        """
        bus = self._bus
        bus.last_event_name = self.name
        inline, inbox_listeners = listeners
        weight = bus.stopwatch.weight if self.is_fired_by_loop else 1
        now = perf_counter()
        for handler in inline:
            if awaited is not None:
                result, awaited, must_wait = awaited, None, True
            elif all_due or handler.filter is None or self._should_run(handler, handler.name, engine, count):
                began = now
                try:
                    result = handler.call(engine) if payload is None else handler.call_with_payload(engine, payload)
                    must_wait = result is not None and is_awaitable(result)
                except Exception as error:
                    self._note(error, f"handler {handler.name!r}")
                    raise
                finally:  # those that are filtered are rare enough to time each call
                    now = perf_counter()
                    handler.seconds += (now - began) * (weight if handler.filter is None else 1)
            else:
                continue
            if must_wait:  # which takes long enough to be timed each time
                began = now
                try:
                    yield result  # pyright: ignore[reportReturnType]  # not None where it must be awaited
                except Exception as error:
                    self._note(error, f"handler {handler.name!r}")
                    raise
                now = perf_counter()
                handler.seconds += now - began
        if inbox_listeners:
            due = [
                one
                for one in inbox_listeners
                if all_due or one.filter is None or self._should_run(one, one.inbox.name, engine, count)
            ]
            snapshots: Mapping[Inbox, Any] | None = None
            if any(one.snapshot is not None for one in due):
                snapshots = yield from self._take_snapshots(engine, due)
            if due:
                yield from self._send(engine, count, payload, [one.inbox for one in due], snapshots) or ()
        if self._has_filter:
            self._find_next_count()

    def _should_run(self, listener: Listener, name: str, engine: Any, count: int) -> bool:
        try:
            return listener.next_count <= count and listener.should_run(engine, count)
        except Exception as error:
            self._note(error, f"the filter of {name!r}")
            raise

    def _take_snapshots(
        self, engine: Any, due: Iterable[InboxListener]
    ) -> Generator[Awaitable[Any], Any, dict[Inbox, Any]]:
        """Take each snapshot once, for all that share it."""
        taken: dict[Snapshot | None, Any] = {None: None}
        for listener in due:
            take = listener.snapshot
            if take is not None and take not in taken:
                try:
                    while type(value := take(engine)) is NotYet:
                        yield value.awaitable
                    taken[take] = (yield value) if value is not None and is_awaitable(value) else value
                except Exception as error:
                    self._note(error, f"snapshot {name_of(take)!r} for {listener.inbox.name!r}")
                    raise
        return {listener.inbox: taken[listener.snapshot] for listener in due}

    def _send(
        self,
        engine: Any,
        _count: int = 0,
        payload: Any = None,
        inboxes: Iterable[Inbox] | None = None,
        snapshots: Mapping[Inbox, Any] | None = None,
    ) -> Dispatch | None:
        """Put an event into the inboxes. This is `dispatch` itself where nothing but plain inboxes listens.

        It writes into the bus and the inboxes, where a call for each would cost a tenth of all this.

        Raises:
            InboxOverflow: an inbox with that policy is full. All others have got the event.
        """
        bus, state, full, overflow = self._bus, engine.state, None, None
        bus.last_event_name = name = self.name
        metrics = state.metrics
        lock = bus.lock
        lock.acquire()  # so that every inbox gets events in the order of their sequence numbers
        try:
            bus.sequence = sequence = bus.sequence + 1
            event = new_event(
                Event,
                (
                    name,
                    bus.name,
                    sequence,
                    state.iteration,
                    state.epoch,
                    state.epoch_length,
                    state.max_epochs,
                    state.max_iters,
                    state.output,
                    MappingProxyType(dict(metrics)) if metrics else NO_METRICS,
                    perf_counter(),
                    payload,
                    None,
                ),
            )
            for inbox in self._hot[1] if inboxes is None else inboxes:
                if snapshots is not None:
                    event = new_event(Event, (*event[:-1], snapshots[inbox]))
                inbox.accepted += 1
                waiting = inbox.waiting
                if len(waiting) < inbox.limit:
                    waiting.append(event)
                    if inbox.wakeup is not None:
                        inbox.wake_reader()
                    continue
                try:
                    if not inbox.put_at_limit(event):
                        full = [*(full or ()), BackpressureWait(inbox, bus.loop_handle, bus.are_waits_over)]
                except InboxOverflow as error:
                    overflow = error
        finally:
            lock.release()  # a with statement costs twice as much
        if overflow is not None:
            raise overflow
        return None if full is None else _wait_for_room(full)

    def _note(self, error: Exception, what: str) -> None:
        refuse_stop_iteration(error, what)
        self._bus.note(error, f"{what} of {self.name}")


def _dispatch_nothing(*_: Any) -> None:
    """Nothing listens, and nothing fires."""


def _wait_for_room(waits: list[BackpressureWait]) -> Dispatch:
    yield from waits

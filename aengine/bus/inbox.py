"""Inbox: what one concurrent listener has been sent and has not taken yet.

A deque and a one-shot event, not a stream of anyio's: those lose an item when the receiver that was handed one is
cancelled natively. Here an item is taken in a stretch of code without an await, so no cancellation comes between.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Literal, TypeAlias

from aengine.errors import InboxOverflow
from aengine.events import Event
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent

Overflow: TypeAlias = Literal["wait", "latest", "drop_oldest", "drop_new", "error"]
"""What happens to an event that meets a full inbox: see `OVERFLOW`."""

OVERFLOW: Mapping[Overflow, str] = {
    "wait": "it is accepted, and what emitted it waits until there is room",
    "latest": "of each event only the newest waits; buffer= is not looked at",
    "drop_oldest": "it takes the place of the one that has waited longest",
    "drop_new": "it is dropped",
    "error": "it is dropped, and an InboxOverflow is raised where it was emitted, which fails the run",
}
"""The policies, each with what it does with the event. None is silent: each drop is counted."""


class Inbox:
    """Events on their way to one listener, in the order of their sequence numbers.

    Many threads write, each holding the bus's lock: they append to `waiting`, count `accepted` and, by the policy,
    `dropped`, and wake the reader. One task reads, without the lock: it takes from the left of `waiting`, writes
    `in_hand` and `handled`, and makes and removes `wakeup`. That is sound because
    - whatever the reader does to the deque is one atomic operation, and a writer that drops an event from it can handle
      that the event is gone already;
    - the reader, having made its `wakeup`, looks once more before it waits, and writers append before they look for a
      `wakeup`: at least one of the two sees the other. The same holds for emitters that wait for room;
    - the reader may remove `wakeup` between two looks of a writer, so a writer reads it once.

    Always `accepted == handled + dropped + discarded + len(inbox) (+ 1 while one is in hand)`.

    Attributes:
        waiting: what was accepted and not taken.
        limit: so many may wait before another is a case for the policy.
        wakeup: wakes the reader, None unless it waits.
        in_hand: what was taken and is not handled yet.
        closed: nothing is accepted any more.
        is_reader_stopped: the reader is to end; what is accepted waits for the next run.
    """

    __slots__ = (
        "_at_limit", "_blocked_on", "_capacity", "_lock", "_overflow", "_processed_waiters", "_room_waiters",
        "accepted", "closed", "discarded", "dropped", "handled", "in_hand", "is_reader_stopped", "limit", "name",
        "waiting", "wakeup",
    )  # fmt: skip

    accepted: int
    discarded: int
    dropped: int
    handled: int

    def __init__(self, name: str, capacity: int, overflow: Overflow, lock: Any) -> None:
        self.name: str = name
        self.accepted = self.handled = self.dropped = self.discarded = 0
        self.waiting: deque[Event[Any, Any]] = deque()
        self.in_hand: Event[Any, Any] | None = None
        self.wakeup: ThreadSafeEvent | None = None
        self._capacity = capacity
        self._overflow = overflow
        self._lock = lock  # the bus's own, so that all its inboxes see events in one order
        self._blocked_on: list[Inbox] = []  # where this inbox's reader waits for room, to find a cycle
        self._room_waiters: list[tuple[int, ThreadSafeEvent]] = []
        self._processed_waiters: list[tuple[int, ThreadSafeEvent]] = []
        self._at_limit: Callable[[Inbox, Event], bool]
        self.reopen_nowait()

    def __len__(self) -> int:
        return len(self.waiting)

    def is_of(self, lock: Any) -> bool:
        """Whether this is an inbox of the bus with this lock."""
        return self._lock is lock

    def counts(self) -> tuple[int, int, int, int, int]:
        """Return what was accepted, handled, dropped and discarded, and what waits, all of one instant."""
        with self._lock:  # which keeps writers away; that the reader has moved is noticed
            while True:
                handled, depth = self.handled, len(self.waiting)
                if handled == self.handled:
                    return self.accepted, handled, self.dropped, self.discarded, depth

    # Writers, which hold the bus's lock. A topic puts events by itself, as far as the limit: a call for each is felt.

    def put_at_limit(self, event: Event[Any, Any]) -> bool:
        """Do what the policy says with an event that is over the limit. Returns False if room is to be waited for.

        Raises:
            InboxOverflow: the policy is "error". The event is counted as dropped.
        """
        return self._at_limit(self, event)

    def wake_reader(self) -> None:
        """Wake the reader, if it waits."""
        wakeup = self.wakeup  # read once: the reader may be removing it
        if wakeup is not None and not wakeup.is_posted:
            wakeup.set()

    def _discard(self, _: Event[Any, Any]) -> bool:
        self.discarded += 1
        return True

    def _wait(self, event: Event[Any, Any]) -> bool:
        self.waiting.append(event)
        self.wake_reader()
        return False

    def _drop_new(self, _: Event[Any, Any]) -> bool:
        self.dropped += 1
        return True

    def _refuse(self, event: Event[Any, Any]) -> bool:
        self.dropped += 1
        raise InboxOverflow(
            f"the inbox of {self.name!r} is full: {self._capacity} events wait and {event} came. Make its handler"
            ' faster, its buffer= larger, or choose another overflow=, such as "wait"'
        )

    def _drop_oldest(self, event: Event[Any, Any]) -> bool:
        try:  # suppress() costs as much as all the rest, here and below
            self.waiting.popleft()
            self.dropped += 1
        except IndexError:  # the reader was faster
            pass
        return self._replace_dropped(event)

    def _keep_latest(self, event: Event[Any, Any]) -> bool:
        waiting = self.waiting
        try:
            if waiting and waiting[-1].name == event.name:  # as it is wherever one event alone is listened to
                waiting.pop()
                self.dropped += 1
            elif old := [one for one in tuple(waiting) if one.name == event.name]:
                waiting.remove(old[0])
                self.dropped += 1
        except (IndexError, ValueError):  # the reader was faster
            pass
        return self._replace_dropped(event)

    def _replace_dropped(self, event: Event[Any, Any]) -> bool:
        if self._processed_waiters:  # the dropped one may have been what they waited for
            self._wake_processed()
        self.waiting.append(event)
        if self.wakeup is not None:
            self.wake_reader()
        return True

    # The reader

    def take_nowait(self) -> Event[Any, Any] | None:
        """Take the next event; None if none waits. The one before is thereby handled, this one is in hand."""
        return next(self.drain(), None)

    def drain(self) -> Iterator[Event[Any, Any]]:
        """Take one event after another, until none waits. The one before is thereby handled, each time."""
        waiting = self.waiting
        if self.in_hand is not None:
            self.mark_handled()
        if self.is_reader_stopped:  # not looked at for each event: see stop_reader()
            return
        while True:
            try:
                self.in_hand = event = waiting.popleft()
            except IndexError:
                return
            if self._room_waiters:
                self._give_room()
            yield event
            self.in_hand = None  # the lines of mark_handled(): a call for each event is felt
            self.handled += 1
            if self._processed_waiters:
                self._wake_processed()

    def mark_handled(self) -> None:
        """The event in hand has been handled."""
        self.in_hand = None
        self.handled += 1
        if self._processed_waiters:
            self._wake_processed()

    async def wait_for_event(self, loop_handle: EventLoopHandle) -> None:
        """Wait until an event waits, or the reader is to end. Cancellable; no event is lost by that."""
        # Most often one is there after one turn of the event loop, which costs a tenth of making a `wakeup`.
        await loop_handle.turn()
        if self.waiting or self.is_at_end:
            return
        wakeup = self.wakeup = ThreadSafeEvent(loop_handle)
        try:
            if not self.waiting and not self.is_at_end:
                await wakeup.wait()
        finally:
            self.wakeup = None

    async def wait_as_reader(self, wait: "BackpressureWait") -> None:
        """Wait, as the reader of this inbox, for room in another one. Return at once where that would be a cycle."""
        if not wait.inbox._is_blocked_on(self):  # noqa: SLF001 -- another of this class
            self._blocked_on.append(wait.inbox)
            try:
                await wait
            finally:
                self._blocked_on.remove(wait.inbox)

    def _is_blocked_on(self, other: "Inbox") -> bool:
        """Whether room in this inbox depends on room in the other."""
        return self is other or any(one._is_blocked_on(other) for one in self._blocked_on)  # noqa: SLF001 -- likewise

    # Begin and end

    def close_nowait(self, *, discard: bool = False) -> None:
        """Accept no more. What waits can still be taken, unless it is discarded."""
        with self._lock:
            self.closed: bool = True
            self.limit: int = 0
            self._at_limit = Inbox._discard
            if discard:
                self.discarded += len(self.waiting) + (self.in_hand is not None)
                self.waiting.clear()
                self.in_hand = None
                self._wake_processed()
            self.wake_reader()
            self.wake_emitters()

    def stop_reader(self) -> None:
        """Have the reader end after the event in hand. What waits, and what comes from now on, is for the next run."""
        with self._lock:
            self.is_reader_stopped: bool = True
            # In the place of this deque comes another, since the reader may be in the middle of it: it finds it empty,
            # though something else fires steadily. To look for each event whether it is to end would be felt.
            old, self.waiting = self.waiting, deque(self.waiting)
            old.clear()
        self.wake_reader()
        self.wake_emitters()

    def reopen_nowait(self) -> None:
        """Accept again: another run begins."""
        self.closed = self.is_reader_stopped = False
        # With "latest" every event is a case for the policy: it may take the place of an older one.
        self.limit = 0 if self._overflow == "latest" else self._capacity
        self._at_limit = {
            "wait": Inbox._wait,
            "latest": Inbox._keep_latest,
            "drop_oldest": Inbox._drop_oldest,
            "drop_new": Inbox._drop_new,
            "error": Inbox._refuse,
        }[self._overflow]

    @property
    def is_at_end(self) -> bool:
        """Whether what comes now is not going to be read: in this run at least."""
        return self.closed or self.is_reader_stopped

    def is_behind(self, sequence: int) -> bool:
        """Whether something up to this sequence number waits or is in hand."""
        return self._oldest <= sequence

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is in hand."""
        return not self.waiting and self.in_hand is None

    # Waiting for the reader

    async def wait_for_room(
        self,
        loop_handle: EventLoopHandle,
        accepted: int | None = None,
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> None:
        """Return when of so many accepted events, by default all, no more wait than may: there was room for another.

        What is accepted later does not prolong the wait, so steady firing from elsewhere holds nothing up. Returns also
        when nothing is read any more, and when the wait is abandoned. Cancellable.
        """
        before = self.accepted if accepted is None else accepted

        def must_wait() -> bool:
            return self._has_too_many(before) and not self.is_at_end and not is_abandoned()

        if must_wait():
            await loop_handle.turn()
        while must_wait():
            wakeup = ThreadSafeEvent(loop_handle)
            entry = before, wakeup
            self._room_waiters.append(entry)
            try:
                if must_wait():  # the reader may have made room before it could see that something waits
                    await wakeup.wait()
            finally:
                self._room_waiters.remove(entry)

    def _has_too_many(self, accepted: int) -> bool:
        # In this order: a writer counts an event before it appends it, and to return too early by one does no harm.
        return len(self.waiting) - self._capacity > self.accepted - accepted

    def _give_room(self) -> None:
        for accepted, wakeup in tuple(self._room_waiters):
            if not wakeup.is_posted and not self._has_too_many(accepted):
                wakeup.set()

    def wake_emitters(self) -> None:
        """Have those that wait for room look again. From any thread."""
        for _, wakeup in tuple(self._room_waiters):
            wakeup.set()

    async def wait_processed(self, sequence: int, loop_handle: EventLoopHandle) -> None:
        """Wait until all up to this sequence number is handled, dropped or discarded. Cancellable."""
        while self.is_behind(sequence):
            wakeup = ThreadSafeEvent(loop_handle)
            entry = sequence, wakeup
            self._processed_waiters.append(entry)
            try:
                if self.is_behind(sequence):  # the last may have gone before it could be seen that something waits
                    await wakeup.wait()
            finally:
                self._processed_waiters.remove(entry)

    @property
    def _oldest(self) -> float:
        in_hand = self.in_hand  # read once, and what waits without a look before: the other side may be taking it
        if in_hand is not None:
            return in_hand.sequence
        try:
            return self.waiting[0].sequence
        except IndexError:
            return float("inf")

    def _wake_processed(self) -> None:
        oldest = self._oldest
        # A copy, from which nothing is removed here: the reader and a writer that drops an event may both be here.
        for sequence, wakeup in tuple(self._processed_waiters):
            if oldest > sequence and not wakeup.is_posted:
                wakeup.set()


class BackpressureWait:
    """What is awaited for back-pressure. A type of its own, so that plain code can tell it from a handler's awaitable.

    Made while the lock of the bus is held, so that nothing is accepted between the event and this.

    Attributes:
        inbox: the one that is full.
    """

    __slots__ = ("_accepted", "_is_abandoned", "_loop_handle", "inbox")

    def __init__(self, inbox: Inbox, loop_handle: EventLoopHandle | None, is_abandoned: Callable[[], bool]) -> None:
        self.inbox: Inbox = inbox
        self._accepted = inbox.accepted
        self._loop_handle = loop_handle
        self._is_abandoned = is_abandoned

    def __await__(self) -> Generator[Any, Any, None]:
        loop_handle = EventLoopHandle() if self._loop_handle is None else self._loop_handle
        return self.inbox.wait_for_room(loop_handle, self._accepted, self._is_abandoned).__await__()

"""Inbox: what one concurrent listener has been sent and has not taken yet.

A deque and a bell, not a stream of anyio's: those lose an item when the receiver that was handed one is cancelled
natively. Here an item leaves in a stretch of code without an await, so no cancellation comes between.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from enum import Enum
from typing import Any

from aengine.errors import InboxOverflow
from aengine.events import Event
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent


class Overflow(Enum):
    """What happens to an event that meets a full inbox. No policy is silent: each drop is counted."""

    WAIT = "wait"
    """It is accepted, and who emitted it waits until there is room: back-pressure."""
    LATEST = "latest"
    """Of each event only the newest waits; `buffer` is not looked at."""
    DROP_OLDEST = "drop_oldest"
    """It takes the place of the one that has waited longest."""
    DROP_NEW = "drop_new"
    """It is dropped."""
    ERROR = "error"
    """It is dropped, and who emitted it gets an InboxOverflow, which fails the run."""


class Inbox:
    """Events on their way to one listener, in the order of their sequence numbers.

    Many emit, from any thread, each holding the bus's lock; one reads, at home, and needs none: each step it takes is
    one atomic operation on the deque, and whoever is about to wait looks once more after hanging up its bell. Always
    `accepted == handled + dropped + discarded + len(inbox) (+ 1 while one is in hand)`.
    """

    __slots__ = (
        "_at_limit",
        "_capacity",
        "_lock",
        "_overflow",
        "_processed_waiters",
        "_rooms",
        "accepted",
        "blocked_on",
        "closed",
        "discarded",
        "dropped",
        "handled",
        "in_hand",
        "is_dismissed",
        "limit",
        "name",
        "waiting",
        "wakeup",
        "when_awaited",
    )  # fmt: skip

    def __init__(self, name: str, capacity: int, overflow: Overflow, lock: Any) -> None:
        self.name = name
        self.accepted = self.handled = self.dropped = self.discarded = 0
        self.in_hand: Event | None = None
        self.blocked_on: list[Inbox] = []  # where this inbox's reader waits for room, to see a circle
        self.when_awaited: Callable[[], object] | None = None  # called when somebody is to wait for all to be handled
        self._capacity = capacity
        self._overflow = overflow
        self._lock = lock  # the bus's own, so that all its inboxes see events in one order
        self.waiting: deque[Event] = deque()
        self.wakeup: ThreadSafeEvent | None = None
        self._rooms: list[ThreadSafeEvent] = []
        self._at_limit: Callable[[Inbox, Event], bool]
        self._processed_waiters: list[tuple[int, ThreadSafeEvent]] = []
        self.reopen_nowait()

    def __len__(self) -> int:
        return len(self.waiting)

    def account(self) -> tuple[int, int, int, int, int]:
        """Return what was accepted, handled, dropped and discarded, and what waits, all of one instant."""
        with self._lock:  # keeps who emits away; the reader is noticed
            while True:
                handled, depth = self.handled, len(self.waiting)
                if handled == self.handled:
                    return self.accepted, handled, self.dropped, self.discarded, depth

    def put_nowait(self, event: Event) -> bool:
        """Accept an event; for who holds the bus's lock. Returns False if room is to be waited for before another.

        `Topic` has these lines once more, where each event passes. What is changed here is to be changed there.

        Raises:
            InboxOverflow: the inbox is full and its policy is ERROR. The event is counted as dropped.
        """
        self.accepted += 1
        waiting = self.waiting
        if len(waiting) >= self.limit:
            return self.put_at_limit(event)
        waiting.append(event)
        if self.wakeup is not None:
            self.call_reader()
        return True

    def put_at_limit(self, event: Event) -> bool:
        """Do what is to be done with an event that is over the limit, as `put_nowait`."""
        return self._at_limit(self, event)

    def call_reader(self) -> None:
        """Wake the reader, if he waits."""
        wakeup = self.wakeup  # which only the reader hangs up and takes down: he may be doing so right now
        if wakeup is not None and not wakeup.is_called:
            wakeup.is_called = True
            wakeup.set()

    # What happens at the limit: each says whether there is room for another event.

    @staticmethod
    def _policy(overflow: Overflow) -> "Callable[[Inbox, Event], bool]":
        return {
            Overflow.WAIT: Inbox._wait,
            Overflow.LATEST: Inbox._keep_latest,
            Overflow.DROP_OLDEST: Inbox._drop_oldest,
            Overflow.DROP_NEW: Inbox._drop_new,
            Overflow.ERROR: Inbox._refuse,
        }[overflow]

    def _discard(self, _: Event) -> bool:
        self.discarded += 1
        return True

    def _wait(self, event: Event) -> bool:
        self.waiting.append(event)
        self.call_reader()
        return False

    def _drop_new(self, _: Event) -> bool:
        self.dropped += 1
        return True

    def _refuse(self, event: Event) -> bool:
        self.dropped += 1
        raise InboxOverflow(
            f"the inbox of {self.name!r} is full: {self._capacity} events wait and {event} came. Make its handler"
            ' faster, its buffer= larger, or choose another overflow=, such as "wait"'
        )

    def _drop_oldest(self, event: Event) -> bool:
        try:  # suppress() costs as much as all the rest, here and below
            self.waiting.popleft()
            self.dropped += 1
        except IndexError:  # the reader was faster
            pass
        return self._take_the_place(event)

    def _keep_latest(self, event: Event) -> bool:
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
        return self._take_the_place(event)

    def _take_the_place(self, event: Event) -> bool:
        if self._processed_waiters:
            self._wake_processed()
        self.waiting.append(event)
        if self.wakeup is not None:
            self.call_reader()
        return True

    def take_nowait(self) -> Event | None:
        """Take the next event; None if none waits. The one before is thereby handled, this one is in hand."""
        return next(self.taken(), None)

    def taken(self) -> Iterator[Event]:
        """Take one event after another, until none waits. The one before is thereby handled, each time."""
        waiting, capacity = self.waiting, self._capacity
        if self.in_hand is not None:
            self.done_nowait()
        while True:
            try:
                self.in_hand = event = waiting.popleft()
            except IndexError:
                return
            if self._rooms and len(waiting) <= capacity:
                self._set_all(self._rooms)
            yield event
            self.in_hand = None
            self.handled += 1
            if self._processed_waiters:
                self._wake_processed()

    def done_nowait(self) -> None:
        """Say that the event in hand has been handled."""
        self.in_hand = None
        self.handled += 1
        if self._processed_waiters:
            self._wake_processed()

    def close_nowait(self, *, discard: bool = False) -> None:
        """Accept no more. What waits can still be taken, unless it is discarded."""
        with self._lock:
            self.closed = True
            self.limit = 0
            self._at_limit = Inbox._discard
            if discard:
                self.discarded += len(self.waiting) + (self.in_hand is not None)
                self.waiting.clear()
                self.in_hand = None
                self._wake_processed()
            if self.wakeup is not None:
                self.wakeup.set()
            self._set_all(self._rooms)

    def dismiss_reader(self) -> None:
        """Let the reader end, who has just handled everything. What comes from now on is accepted, and waits."""
        self.is_dismissed = True
        if self.wakeup is not None:
            self.wakeup.set()
        self._set_all(self._rooms)

    def reopen_nowait(self) -> None:
        """Accept again: another run begins."""
        self.closed = self.is_dismissed = False
        # At so many waiting events one more is no plain matter: it looks for its like, or is one too many, or too late.
        self.limit = 0 if self._overflow is Overflow.LATEST else self._capacity
        self._at_limit = self._policy(self._overflow)

    async def arrival(self, loop_handle: EventLoopHandle) -> None:
        """Wait until an event waits, or the reader is to end. For the one reader."""
        # Most often it is there after one turn of the event loop, which costs a tenth of hanging up a bell.
        await loop_handle.turn()
        if self.waiting or self.is_at_end:
            return
        wakeup = self.wakeup = ThreadSafeEvent(loop_handle)
        try:
            if not self.waiting and not self.is_at_end:
                await wakeup.wait()
        finally:
            self.wakeup = None

    async def room(self, loop_handle: EventLoopHandle, is_abandoned: Callable[[], bool] = lambda: False) -> None:
        """Wait until an event put now would not have to wait, the inbox is closed, or the wait is given up."""

        def must_wait() -> bool:
            return len(self.waiting) > self._capacity and not self.is_at_end and not is_abandoned()

        if must_wait():
            await loop_handle.turn()
        while must_wait():
            wakeup = ThreadSafeEvent(loop_handle)
            self._rooms.append(wakeup)
            if must_wait():
                await wakeup.wait()

    def wake_emitters(self) -> None:
        """Have those that wait for room look again."""
        self._set_all(self._rooms)

    async def wait_processed(self, sequence: int, loop_handle: EventLoopHandle) -> None:
        """Wait until every event up to this sequence number is handled, dropped or discarded. At the reader's home."""
        if self._oldest <= sequence:
            wakeup = ThreadSafeEvent(loop_handle)
            self._processed_waiters.append((sequence, wakeup))
            await wakeup.wait()

    @property
    def is_at_end(self) -> bool:
        """Whether nobody is going to read what comes now: in this run at least."""
        return self.closed or self.is_dismissed

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is in hand."""
        return not self.waiting and self.in_hand is None

    @property
    def _oldest(self) -> float:
        if self.in_hand is not None:
            return self.in_hand.sequence
        return self.waiting[0].sequence if self.waiting else float("inf")

    def _wake_processed(self) -> None:
        if self._processed_waiters:
            oldest = self._oldest
            for entry in [entry for entry in self._processed_waiters if oldest > entry[0]]:
                self._processed_waiters.remove(entry)
                entry[1].set()

    @staticmethod
    def _set_all(wakeups: list[ThreadSafeEvent]) -> None:
        while wakeups:
            wakeups.pop().set()


class BackpressureWait:
    """What is awaited for back-pressure. A type of its own, so that who must not wait can tell it from a handler."""

    __slots__ = ("_is_abandoned", "inbox", "loop_handle")

    def __init__(self, inbox: Inbox, loop_handle: EventLoopHandle | None) -> None:
        self.inbox = inbox
        self.loop_handle = loop_handle
        self._is_abandoned = False

    def abandon(self) -> None:
        """End the wait: the event was accepted, and something else matters more."""
        self._is_abandoned = True
        self.inbox.wake_emitters()

    def __await__(self) -> Generator[Any, Any, None]:
        loop_handle = EventLoopHandle() if self.loop_handle is None else self.loop_handle
        return self.inbox.room(loop_handle, lambda: self._is_abandoned).__await__()

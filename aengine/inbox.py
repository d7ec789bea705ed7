"""Inbox: what one concurrent listener has been sent and has not taken yet.

A deque and a bell, not a stream of anyio's: those lose an item when the receiver that was handed one is cancelled
natively. Here an item leaves in a stretch of code without an await, so no cancellation comes between.
"""

from collections import deque
from collections.abc import Generator
from enum import Enum
from threading import RLock
from typing import Any

from aengine.errors import InboxOverflow
from aengine.events import Event
from aengine.worker import Bell, Home


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

    Every method that ends in `_nowait` never waits and may be called from any thread. At any time
    `accepted == handled + dropped + discarded + len(inbox) (+ 1 while one is being handled)`.
    """

    __slots__ = ("_bell", "_capacity", "_lock", "_overflow", "_rooms", "_settled", "_waiting", "accepted", "closed",
                 "discarded", "dropped", "handled", "in_hand", "name", "reader_waits_for")  # fmt: skip

    def __init__(self, name: str, capacity: int, overflow: Overflow, lock: RLock) -> None:  # type: ignore[valid-type]  # RLock is a function in typeshed before 3.13
        self.name = name
        self.accepted = self.handled = self.dropped = self.discarded = 0
        self.closed = False
        self.in_hand: Event | None = None
        self.reader_waits_for: list[Inbox] = []  # where this inbox's reader waits for room, to see a circle
        self._capacity = capacity
        self._overflow = overflow
        self._lock: Any = lock  # the bus's own, so that all its inboxes see events in one order
        self._waiting: deque[Event] = deque()
        self._bell: Bell | None = None
        self._rooms: list[Bell] = []
        self._settled: list[tuple[int, Bell]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put_nowait(self, event: Event) -> bool:
        """Accept an event. Returns False if who emits is to wait for room before it emits another.

        Raises:
            InboxOverflow: the inbox is full and its policy is ERROR. The event is counted as dropped.
        """
        with self._lock:
            self.accepted += 1
            waiting = self._waiting
            if self.closed:
                self.discarded += 1
                return True
            if self._overflow is Overflow.LATEST:
                self._drop_same(event)
            elif len(waiting) >= self._capacity and not self._make_room(event):
                return True
            waiting.append(event)
            if self._bell is not None:
                self._bell.ring()
                self._bell = None
            return len(waiting) <= self._capacity or self._overflow is not Overflow.WAIT

    def _drop_same(self, event: Event) -> None:
        for old in self._waiting:
            if old.name == event.name:
                self._waiting.remove(old)
                self.dropped += 1
                self._settle()
                return

    def _make_room(self, event: Event) -> bool:
        if self._overflow is Overflow.WAIT:
            return True
        self.dropped += 1
        if self._overflow is Overflow.DROP_OLDEST:
            self._waiting.popleft()
            self._settle()
            return True
        if self._overflow is Overflow.ERROR:
            raise InboxOverflow(
                f"the inbox of {self.name!r} is full: {self._capacity} events wait and {event} came. Make its handler"
                ' faster, its buffer= larger, or choose another overflow=, such as "wait"'
            )
        return False

    def take_nowait(self) -> Event | None:
        """Take the next event, which is then in hand until `done_nowait`; None if none waits."""
        with self._lock:
            if not self._waiting:
                return None
            self.in_hand = event = self._waiting.popleft()
            if self._rooms and len(self._waiting) <= self._capacity:
                self._ring(self._rooms)
            return event

    def done_nowait(self) -> None:
        """Say that the event in hand has been handled."""
        with self._lock:
            self.in_hand = None
            self.handled += 1
            if self._settled:
                self._settle()

    def close_nowait(self, *, discard: bool = False) -> None:
        """Accept no more. What waits can still be taken, unless it is discarded."""
        with self._lock:
            self.closed = True
            if discard:
                self.discarded += len(self._waiting) + (self.in_hand is not None)
                self._waiting.clear()
                self.in_hand = None
                self._settle()
            if self._bell is not None:
                self._bell.ring()
            self._ring(self._rooms)

    def reopen_nowait(self) -> None:
        """Accept again: another run begins."""
        self.closed = False

    async def arrival(self, home: Home) -> None:
        """Wait until an event waits or the inbox is closed. For its one reader."""
        with self._lock:
            if self._waiting or self.closed:
                return
            bell = self._bell = Bell(home)
        await bell.wait()

    async def room(self, home: Home) -> None:
        """Wait until an event put now would not have to wait, or the inbox is closed."""
        while True:
            with self._lock:
                if len(self._waiting) <= self._capacity or self.closed:
                    return
                bell = Bell(home)
                self._rooms.append(bell)
            await bell.wait()

    async def settled(self, sequence: int, home: Home) -> None:
        """Wait until every event up to this sequence number is handled, dropped or discarded."""
        with self._lock:
            if self._oldest > sequence:
                return
            bell = Bell(home)
            self._settled.append((sequence, bell))
        await bell.wait()

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is in hand."""
        return not self._waiting and self.in_hand is None

    @property
    def _oldest(self) -> float:
        if self.in_hand is not None:
            return self.in_hand.sequence
        return self._waiting[0].sequence if self._waiting else float("inf")

    def _settle(self) -> None:
        oldest = self._oldest
        for entry in [entry for entry in self._settled if oldest > entry[0]]:
            self._settled.remove(entry)
            entry[1].ring()

    @staticmethod
    def _ring(bells: list[Bell]) -> None:
        for bell in bells:
            bell.ring()
        bells.clear()


class Room:
    """What is awaited for back-pressure. A type of its own, so that who must not wait can tell it from a handler."""

    __slots__ = ("home", "inbox")

    def __init__(self, inbox: Inbox, home: Home | None) -> None:
        self.inbox = inbox
        self.home = home

    def __await__(self) -> Generator[Any, Any, None]:
        return self.inbox.room(self.home or Home()).__await__()

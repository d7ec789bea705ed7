"""Inboxes: five policies, the account that always adds up, and waits that lose nothing."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aengine import Event, InboxOverflow, State
from aengine.bus.bus import Bus
from aengine.bus.inbox import OVERFLOW, Inbox, Overflow
from aengine.bus.listeners import InboxListener
from aengine.events import selectors
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent

POLICIES = list(OVERFLOW)


def event(sequence: int, name: str = "ITERATION_COMPLETED") -> Event:
    return Event(
        name,
        engine_name="engine",
        sequence=sequence,
        iteration=sequence,
        epoch=1,
        epoch_length=None,
        max_epochs=1,
        max_iters=None,
        output=None,
        metrics={},
        monotonic=0.0,
        payload=None,
        snapshot=None,
    )


class Box(Inbox):
    """An inbox with a bus of its own, from which it gets its events as in an engine."""

    def __init__(self, capacity: int, overflow: Overflow) -> None:
        self.bus = Bus("engine", logging.getLogger("aengine"), State())
        super().__init__("listener", capacity, overflow, self.bus.lock)

    def put(self, event: Event) -> bool:
        """Send an event of this name and number. Returns False if room is to be waited for before another."""
        topic = self.bus.topic(event.name)
        with self.bus.lock:
            if not topic.inbox_listeners:
                topic.listen(InboxListener(selectors(event.name)[0], self, snapshot=None))
        self.bus.sequence = event.sequence - 1
        return topic.dispatch(SimpleNamespace(state=self.bus.state), 0) is None


def inbox(capacity: int = 2, overflow: Overflow = "wait") -> Box:
    return Box(capacity, overflow)


def take_all(inbox: Inbox) -> list[int]:
    """Take and handle everything that waits; return the sequence numbers."""
    taken = []
    while (one := inbox.take_nowait()) is not None:
        taken.append(one.sequence)
    return taken


def account(inbox: Inbox) -> int:
    """What the account says was accepted."""
    in_hand = inbox.in_hand is not None
    return inbox.handled + inbox.dropped + inbox.discarded + len(inbox) + in_hand


@pytest.mark.parametrize("policy", POLICIES)
def test_events_leave_in_the_order_they_came(policy: Overflow) -> None:
    box = inbox(3, policy)
    for sequence, name in enumerate("abc"):
        assert box.put(event(sequence, name))
    assert take_all(box) == [0, 1, 2]
    assert box.is_idle
    assert (box.accepted, box.handled, box.dropped, box.discarded) == (3, 3, 0, 0)


def test_wait_accepts_over_the_bound_and_says_to_wait() -> None:
    box = inbox(2)
    assert [box.put(event(n)) for n in range(4)] == [True, True, False, False]
    assert take_all(box) == [0, 1, 2, 3]
    assert box.dropped == 0


def test_drop_oldest_keeps_the_newest() -> None:
    box = inbox(2, "drop_oldest")
    assert all(box.put(event(n)) for n in range(5))
    assert take_all(box) == [3, 4]
    assert box.dropped == 3


def test_drop_new_keeps_the_oldest() -> None:
    box = inbox(2, "drop_new")
    assert all(box.put(event(n)) for n in range(5))
    assert take_all(box) == [0, 1]
    assert box.dropped == 3


def test_latest_keeps_one_of_each_event_in_the_order_of_their_numbers() -> None:
    box = inbox(1, "latest")
    for sequence, name in enumerate("abaca"):
        assert box.put(event(sequence, name))
    assert take_all(box) == [1, 3, 4]
    assert box.dropped == 2


def test_error_raises_and_says_what_to_do() -> None:
    box = inbox(1, "error")
    box.put(event(0))
    with pytest.raises(InboxOverflow, match=r"'listener' is full: 1 events wait.*buffer=.*overflow="):
        box.put(event(1))
    assert box.accepted == account(box) == 2
    assert take_all(box) == [0]
    assert box.dropped == 1


def test_the_event_in_hand_takes_no_room() -> None:
    box = inbox(1, "error")
    box.put(event(0))
    assert box.take_nowait() is not None
    assert box.put(event(1))
    assert not box.is_idle
    box.mark_handled()
    assert take_all(box) == [1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_closed_inbox_discards_what_comes_and_keeps_what_waits(policy: Overflow) -> None:
    box = inbox(2, policy)
    box.put(event(0))
    box.close_nowait()
    assert box.put(event(1))
    assert box.discarded == 1
    assert take_all(box) == [0]
    box.reopen_nowait()
    assert box.put(event(2))
    assert take_all(box) == [2]
    assert box.accepted == account(box)


def test_closing_can_discard_what_waits_and_what_is_in_hand() -> None:
    box = inbox(4)
    for sequence in range(3):
        box.put(event(sequence))
    box.take_nowait()
    box.close_nowait(discard=True)
    assert box.is_idle
    assert box.discarded == box.accepted == 3


async def test_arrival_returns_when_an_event_comes_or_the_inbox_closes() -> None:
    box, loop_handle = inbox(), EventLoopHandle()
    arrivals = 0

    async def reader() -> None:
        nonlocal arrivals
        while not box.closed:
            await box.wait_for_event(loop_handle)
            arrivals += len(take_all(box))

    async with anyio.create_task_group() as group:
        group.start_soon(reader)
        for sequence in range(3):
            await anyio.wait_all_tasks_blocked()
            box.put(event(sequence))
        await anyio.wait_all_tasks_blocked()
        assert arrivals == 3
        box.close_nowait()


async def test_room_is_given_to_all_that_wait_for_it() -> None:
    box, loop_handle = inbox(1), EventLoopHandle()
    for sequence in range(3):
        box.put(event(sequence))
    let_in = 0

    async def emitter() -> None:
        nonlocal let_in
        await box.wait_for_room(loop_handle)
        let_in += 1

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(emitter)
        await anyio.wait_all_tasks_blocked()
        box.take_nowait()
        await anyio.wait_all_tasks_blocked()
        assert let_in == 0  # two wait where one may
        box.mark_handled()
        box.take_nowait()
        await anyio.wait_all_tasks_blocked()
        assert let_in == 5
    assert not box.put(event(3))


async def test_closing_ends_the_wait_for_room() -> None:
    box, loop_handle = inbox(1), EventLoopHandle()
    for sequence in range(3):
        box.put(event(sequence))
    async with anyio.create_task_group() as group:
        group.start_soon(box.wait_for_room, loop_handle)
        await anyio.wait_all_tasks_blocked()
        box.close_nowait()


async def test_wait_processed_waits_for_the_event_in_hand_too() -> None:
    box, loop_handle = inbox(4), EventLoopHandle()
    for sequence in range(1, 4):
        box.put(event(sequence))
    processed: list[int] = []

    async def wait(sequence: int) -> None:
        await box.wait_processed(sequence, loop_handle)
        processed.append(sequence)

    async with anyio.create_task_group() as group:
        for sequence in range(5):
            group.start_soon(wait, sequence)
        await anyio.wait_all_tasks_blocked()
        assert processed == [0]
        box.take_nowait()
        await anyio.wait_all_tasks_blocked()
        assert processed == [0]
        box.mark_handled()
        await anyio.wait_all_tasks_blocked()
        assert processed == [0, 1]
        take_all(box)
    assert sorted(processed) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("policy", ["latest", "drop_oldest"])
async def test_what_is_dropped_is_processed(policy: Overflow) -> None:
    box, loop_handle = inbox(1, policy), EventLoopHandle()
    box.put(event(1))
    async with anyio.create_task_group() as group:
        group.start_soon(box.wait_processed, 1, loop_handle)
        await anyio.wait_all_tasks_blocked()
        box.put(event(2))


async def test_what_is_discarded_is_processed() -> None:
    box, loop_handle = inbox(), EventLoopHandle()
    box.put(event(1))
    async with anyio.create_task_group() as group:
        group.start_soon(box.wait_processed, 1, loop_handle)
        await anyio.wait_all_tasks_blocked()
        box.close_nowait(discard=True)


class Moving(Box):
    """An inbox whose other side moves between two looks: what is looked at is there once, and then no longer."""

    def __init__(self, capacity: int, overflow: Overflow, name: str) -> None:
        super().__init__(capacity, overflow)
        self.name_of_moving = name

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in ("wakeup", "in_hand") and name == self.name_of_moving and value is not None:
            setattr(self, name, None)
        return value


async def test_an_inbox_is_closed_while_its_reader_stops_waiting() -> None:
    box = Moving(2, "wait", "wakeup")
    wakeup = ThreadSafeEvent(EventLoopHandle())
    box.wakeup = wakeup
    box.close_nowait()
    assert wakeup.is_set


def test_an_event_is_dropped_while_the_reader_handles_another() -> None:
    box = Moving(1, "drop_oldest", "in_hand")
    box.in_hand = event(0)
    assert box._oldest == 0
    assert box._oldest == float("inf")


class Emptied(deque[Event]):
    """A queue from which another thread takes the last event just after it was seen to be there."""

    def __len__(self) -> int:
        return 1


async def test_the_last_event_is_taken_while_what_waits_is_looked_at() -> None:
    box = inbox(1, "drop_oldest")
    box.waiting = Emptied()
    await box.wait_processed(1, EventLoopHandle())


async def test_an_inbox_is_closed_while_another_thread_wakes_emitters() -> None:
    class Taken(list[tuple[int, ThreadSafeEvent]]):
        def __len__(self) -> int:
            return 1

    box = inbox()
    box._room_waiters = Taken()
    box.close_nowait()


class ReadingHandle(EventLoopHandle):
    """Has the reader take an event whenever something is woken, as another thread may."""

    def __init__(self, box: Box) -> None:
        super().__init__()
        self.box = box

    def call(self, function: Callable[[], object]) -> None:
        take_all(self.box)
        super().call(function)


async def test_reader_and_writer_wake_the_same_waits_at_once() -> None:
    box = inbox(2, "drop_oldest")
    box.put(event(1))
    box.put(event(2))
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(box.wait_processed, 1, ReadingHandle(box))
        await anyio.wait_all_tasks_blocked()
        box.put(event(3))  # drops the first, which wakes; meanwhile the reader handles the second, which wakes too
    assert take_all(box) == [3]


async def test_a_wait_that_is_cancelled_leaves_nothing_behind() -> None:
    box = inbox()
    box.put(event(1))
    with anyio.move_on_after(0):
        await box.wait_processed(1, EventLoopHandle())
    assert not box._processed_waiters


async def test_events_put_by_a_thread_wake_the_reader_on_the_event_loop() -> None:
    box, loop_handle = inbox(8), EventLoopHandle()
    seen: list[int] = []
    has_room = threading.Semaphore(8)

    def produce() -> None:
        for sequence in range(1000):
            has_room.acquire()
            box.put(event(sequence))
        box.close_nowait()

    thread = threading.Thread(target=produce)
    thread.start()
    while True:
        if (one := box.take_nowait()) is None:
            if box.closed and not len(box):
                break
            await box.wait_for_event(loop_handle)
            continue
        seen.append(one.sequence)
        box.mark_handled()
        has_room.release()
    await anyio.to_thread.run_sync(thread.join)
    assert seen == list(range(1000))
    assert box.accepted == box.handled == 1000


async def test_room_made_by_a_thread_wakes_the_emitter_on_the_event_loop() -> None:
    box, loop_handle = inbox(1), EventLoopHandle()
    seen: list[int] = []
    arrived = threading.Semaphore(0)

    def consume() -> None:
        while len(seen) < 500:
            arrived.acquire()
            seen.extend(take_all(box))

    thread = threading.Thread(target=consume)
    thread.start()
    for sequence in range(500):
        must_wait = not box.put(event(sequence))
        arrived.release()
        if must_wait:
            await box.wait_for_room(loop_handle)
        assert len(box) <= 1
    await anyio.to_thread.run_sync(thread.join)
    assert seen == list(range(500))


async def test_a_thread_ends_wait_processed() -> None:
    box, loop_handle = inbox(4), EventLoopHandle()
    for sequence in range(3):
        box.put(event(sequence))
    async with anyio.create_task_group() as group:
        group.start_soon(box.wait_processed, 2, loop_handle)
        await anyio.wait_all_tasks_blocked()
        assert await anyio.to_thread.run_sync(take_all, box) == [0, 1, 2]


async def test_threads_that_put_at_once_lose_nothing() -> None:
    box, loop_handle = inbox(1), EventLoopHandle()  # far over its bound: nothing here waits for room

    def produce(first: int) -> None:
        for sequence in range(first, first + 250):
            box.put(event(sequence))

    threads = [threading.Thread(target=produce, args=(first,)) for first in range(0, 1000, 250)]
    for thread in threads:
        thread.start()
    seen: list[int] = []
    while len(seen) < 1000:
        await box.wait_for_event(loop_handle)
        seen += take_all(box)
    for thread in threads:
        await anyio.to_thread.run_sync(thread.join)
    assert sorted(seen) == list(range(1000))
    assert account(box) == box.accepted == 1000


# Native cancellation, the one that anyio's own streams lose items to

with_and_without_uvloop = pytest.mark.parametrize(
    "options", [{"use_uvloop": False}, {"use_uvloop": True}], ids=["asyncio", "uvloop"]
)


async def read_one(box: Inbox, loop_handle: EventLoopHandle, seen: list[int]) -> None:
    while (one := box.take_nowait()) is None:
        await box.wait_for_event(loop_handle)
    seen.append(one.sequence)
    box.mark_handled()


@with_and_without_uvloop
def test_native_cancellation_of_a_reader_that_was_woken_loses_nothing(options: dict[str, bool]) -> None:
    """Where a memory stream of anyio's loses 300 items of 300."""

    async def main() -> None:
        box, loop_handle = inbox(), EventLoopHandle()
        seen: list[int] = []
        for sequence in range(300):
            reader = asyncio.create_task(read_one(box, loop_handle, seen))
            await asyncio.sleep(0)
            box.put(event(sequence))
            for _ in range(sequence % 3):  # before the wake-up reaches it, and after
                await asyncio.sleep(0)
            reader.cancel()
            await asyncio.wait([reader])
        seen += take_all(box)
        assert seen == list(range(300))
        assert box.accepted == box.handled == 300

    anyio.run(main, backend="asyncio", backend_options=options)


@with_and_without_uvloop
def test_native_cancellation_of_a_reader_fed_by_a_thread_loses_nothing(options: dict[str, bool]) -> None:
    async def main() -> None:
        box, loop_handle = inbox(), EventLoopHandle()
        seen: list[int] = []
        puts = threading.Semaphore(0)

        def produce() -> None:
            for sequence in range(300):
                puts.acquire()
                box.put(event(sequence))

        thread = threading.Thread(target=produce)
        thread.start()
        for _ in range(300):
            reader = asyncio.create_task(read_one(box, loop_handle, seen))
            await asyncio.sleep(0)
            puts.release()
            await asyncio.sleep(0)
            reader.cancel()
            await asyncio.wait([reader])
        await asyncio.to_thread(thread.join)
        seen += take_all(box)
        assert seen == list(range(300))

    anyio.run(main, backend="asyncio", backend_options=options)


@with_and_without_uvloop
def test_native_cancellation_of_an_emitter_that_waits_for_room_loses_nothing(options: dict[str, bool]) -> None:
    async def main() -> None:
        box, loop_handle = inbox(1), EventLoopHandle()

        async def emit(sequence: int) -> None:
            if not box.put(event(sequence)):
                await box.wait_for_room(loop_handle)

        seen: list[int] = []
        for sequence in range(300):
            emitter = asyncio.create_task(emit(sequence))
            await asyncio.sleep(0)
            if sequence % 2:
                seen += take_all(box)
            emitter.cancel()
            await asyncio.wait([emitter])
        seen += take_all(box)
        assert seen == list(range(300))
        assert box.put(event(300))
        await asyncio.wait_for(box.wait_for_room(loop_handle), 5)  # the events of cancelled waits are in nothing's way

    anyio.run(main, backend="asyncio", backend_options=options)


@with_and_without_uvloop
def test_native_cancellation_of_one_barrier_does_not_end_another(options: dict[str, bool]) -> None:
    async def main() -> None:
        box, loop_handle = inbox(), EventLoopHandle()
        for sequence in range(0, 400, 2):
            box.put(event(sequence))
            cancelled = asyncio.create_task(box.wait_processed(sequence, loop_handle))
            other = asyncio.create_task(box.wait_processed(sequence, loop_handle))
            await asyncio.sleep(0)
            cancelled.cancel()
            assert not other.done()
            take_all(box)
            await asyncio.wait_for(other, 5)

    anyio.run(main, backend="asyncio", backend_options=options)


async def test_cancelled_waits_leave_the_inbox_usable() -> None:
    box, loop_handle = inbox(1), EventLoopHandle()
    for _ in range(100):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await box.wait_for_event(loop_handle)
        assert scope.cancelled_caught
    box.put(event(0))
    box.put(event(1))
    for _ in range(100):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await box.wait_for_room(loop_handle)
        assert scope.cancelled_caught
    async with anyio.create_task_group() as group:
        group.start_soon(box.wait_for_room, loop_handle)
        await checkpoint()
        assert take_all(box) == [0, 1]


# Against a model


def name_and_number(event: Event | None) -> tuple[str, int] | None:
    return None if event is None else (event.name, event.sequence)


class InboxMachine(RuleBasedStateMachine):
    """The inbox does what a list and five lines a policy do."""

    policy: Overflow
    capacity: int

    def __init__(self) -> None:
        super().__init__()
        self.box = inbox(self.capacity, self.policy)
        self.waiting: deque[Event] = deque()
        self.in_hand: Event | None = None
        self.closed = False
        self.handled = self.dropped = self.discarded = self.sequence = 0

    @rule(name=st.sampled_from("ab"))
    def put(self, name: str) -> None:
        self.sequence += 1
        new = event(self.sequence, name)
        if not self.closed and self.policy == "error" and len(self.waiting) >= self.capacity:
            self.dropped += 1
            with pytest.raises(InboxOverflow):
                self.box.put(new)
            return
        go_on = self.box.put(new)
        if self.closed:
            self.discarded += 1
        elif self.policy == "latest":
            kept = [one for one in self.waiting if one.name != name]
            self.dropped += len(self.waiting) - len(kept)
            self.waiting = deque([*kept, new])
        elif self.policy == "drop_new" and len(self.waiting) >= self.capacity:
            self.dropped += 1
        else:
            self.waiting.append(new)
            if self.policy == "drop_oldest" and len(self.waiting) > self.capacity:
                self.waiting.popleft()
                self.dropped += 1
        is_over = self.policy == "wait" and len(self.waiting) > self.capacity
        assert go_on is (self.closed or not is_over)

    @rule()
    def take(self) -> None:
        self.handled += self.in_hand is not None  # to take the next is to have handled this one
        self.in_hand = self.waiting.popleft() if self.waiting else None
        assert name_and_number(self.box.take_nowait()) == name_and_number(self.in_hand)

    @precondition(lambda self: self.in_hand is not None)
    @rule()
    def done(self) -> None:
        self.box.mark_handled()
        self.in_hand = None
        self.handled += 1

    @rule()
    def close(self) -> None:
        self.box.close_nowait()
        self.closed = True

    @rule()
    def discard(self) -> None:
        self.box.close_nowait(discard=True)
        self.closed = True
        self.discarded += len(self.waiting) + (self.in_hand is not None)
        self.waiting.clear()
        self.in_hand = None

    @rule()
    def reopen(self) -> None:
        self.box.reopen_nowait()
        self.closed = False

    @invariant()
    def agrees(self) -> None:
        box = self.box
        assert len(box) == len(self.waiting)
        assert box.closed is self.closed
        assert name_and_number(box.in_hand) == name_and_number(self.in_hand)
        assert box.is_idle is (not self.waiting and self.in_hand is None)
        assert (box.handled, box.dropped, box.discarded) == (
            self.handled,
            self.dropped,
            self.discarded,
        )
        assert box.accepted == self.sequence == account(box)
        if self.policy not in ("wait", "latest"):
            assert len(box) <= self.capacity


@pytest.mark.parametrize("capacity", [1, 2, 5])
@pytest.mark.parametrize("policy", POLICIES)
def test_inbox_agrees_with_a_model(policy: Overflow, capacity: int) -> None:
    machine = type("Machine", (InboxMachine,), {"policy": policy, "capacity": capacity})
    run_state_machine_as_test(machine, settings=settings(max_examples=25, deadline=None))

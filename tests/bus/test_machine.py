"""Random programs of subscribe, emit, handle, close and flush, on a real run, against a model of a few lines."""

from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.from_thread import start_blocking_portal
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.backends import Backend

from aengine import Engine, Event, InboxOverflow, RemovableEventHandle
from aengine.bus.inbox import OVERFLOW, Overflow


@dataclass
class Consumer:
    """A subscriber that handles an event when it is told to, and what is to be expected of it."""

    capacity: int
    overflow: Overflow
    handle: RemovableEventHandle | None = None
    permits: anyio.Semaphore = field(default_factory=lambda: anyio.Semaphore(0))
    seen: list[int] = field(default_factory=list)
    # The model
    waiting: deque[int] = field(default_factory=deque)
    in_hand: int | None = None
    is_closed: bool = False
    expected: list[int] = field(default_factory=list)
    dropped: int = 0
    accepted: int = 0

    async def on_event(self, event: Event) -> None:
        await self.permits.acquire()
        self.seen.append(event.metrics["number"])

    def put(self, number: int) -> str:
        """Put an event into the model; say what the emitter has to do."""
        self.accepted += 1
        is_full = len(self.waiting) >= self.capacity
        if is_full and self.overflow in ("drop_new", "error"):
            self.dropped += 1
            return "raise" if self.overflow == "error" else "go on"
        if self.waiting and self.overflow == "latest":
            self.dropped += len(self.waiting)
            self.waiting.clear()
        if is_full and self.overflow == "drop_oldest":
            self.waiting.popleft()
            self.dropped += 1
        self.waiting.append(number)
        return "wait" if is_full and self.overflow == "wait" else "go on"

    def take(self) -> None:
        if self.in_hand is None and self.waiting:
            self.in_hand = self.waiting.popleft()

    def has_room(self, number: int) -> bool:
        """Whether this event is within the bound. What came after it does not prolong its emitter's wait."""
        return self.is_closed or sum(1 for one in self.waiting if one <= number) <= self.capacity

    def has(self, numbers: set[int]) -> bool:
        return bool(numbers & {*self.waiting, self.in_hand})


class BusMachine(RuleBasedStateMachine):
    """Two consumers at most that are open; those that were closed handle what they were sent."""

    backend: Backend

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.consumers: list[Consumer] = []
        self.emitters: list[tuple[Future[Any], int, list[Consumer]]] = []
        self.flushes: list[tuple[Future[Any], set[int]]] = []
        self.exits = ExitStack()
        name, options = self.backend
        portal = self.exits.enter_context(start_blocking_portal(name, options))
        self.portal = portal
        self.gate = portal.call(anyio.Event)

        async def step(engine: Engine[None, None], batch: None) -> None:
            await self.gate.wait()

        self.engine = Engine(step)
        self.engine.register_events("NEWS")
        self.run = portal.start_task_soon(self.engine.run, None, 1, None, 1)
        self.settle()

    def settle(self) -> None:
        """Let everything happen that can happen by itself; in the model too."""
        self.portal.call(anyio.wait_all_tasks_blocked)
        for consumer in self.consumers:
            consumer.take()
        for _, number, full in self.emitters:
            while full and full[0].has_room(number):
                full.pop(0)

    @property
    def open_ones(self) -> list[Consumer]:
        return [one for one in self.consumers if not one.is_closed]

    @precondition(lambda self: len(self.open_ones) < 2)
    @rule(capacity=st.integers(1, 3), overflow=st.sampled_from(list(OVERFLOW)))
    def subscribe(self, capacity: int, overflow: Overflow) -> None:
        consumer = Consumer(capacity, overflow)

        async def subscribe() -> None:
            consumer.handle = self.engine.subscribe("NEWS", consumer.on_event, buffer=capacity, overflow=overflow)

        self.portal.call(subscribe)
        self.consumers.append(consumer)
        self.settle()

    @rule(times=st.integers(1, 3), plain=st.booleans())
    def emit(self, times: int, plain: bool) -> None:  # noqa: FBT001 -- hypothesis calls this
        for _ in range(times):
            self.number += 1
            self.engine.state.metrics["number"] = self.number
            emitting = self.portal.start_task_soon(self.fire_here if plain else self.emit_here)
            outcomes = [(one.put(self.number), one) for one in self.open_ones]
            self.portal.call(anyio.wait_all_tasks_blocked)
            if any(outcome == "raise" for outcome, _ in outcomes):
                assert isinstance(emitting.exception(timeout=60), InboxOverflow)
            elif plain:
                assert emitting.exception(timeout=60) is None
            else:
                full = [one for outcome, one in outcomes if outcome == "wait"]
                self.emitters.append((emitting, self.number, full))
            self.settle()

    async def fire_here(self) -> None:
        self.engine.fire_event("NEWS")

    async def emit_here(self) -> None:
        await self.engine.emit("NEWS")

    @precondition(lambda self: self.consumers)
    @rule(data=st.data())
    def handle(self, data: st.DataObject) -> None:
        self.let_handle(data.draw(st.sampled_from(self.consumers)))

    def let_handle(self, consumer: Consumer) -> None:
        if consumer.in_hand is not None:
            consumer.expected.append(consumer.in_hand)
            consumer.in_hand = None
            self.portal.call(consumer.permits.release)
            self.settle()

    @precondition(lambda self: self.open_ones)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        consumer = data.draw(st.sampled_from(self.open_ones))
        assert consumer.handle is not None
        self.portal.call(consumer.handle.remove)
        consumer.is_closed = True
        self.settle()

    @rule()
    def flush(self) -> None:
        numbers = {n for one in self.consumers for n in (*one.waiting, one.in_hand) if n}
        self.flushes.append((self.portal.start_task_soon(self.engine.flush), numbers))
        self.settle()

    @invariant()
    def handled_in_order(self) -> None:
        for consumer in self.consumers:
            assert consumer.seen == consumer.expected

    @invariant()
    def emitters_wait_for_room_and_no_longer(self) -> None:
        for emitting, _, full in self.emitters:
            assert emitting.done() is not bool(full)
        self.emitters = [entry for entry in self.emitters if not entry[0].done()]

    @invariant()
    def flushes_wait_for_what_was_sent_and_no_longer(self) -> None:
        for flushing, numbers in self.flushes:
            assert flushing.done() is not any(one.has(numbers) for one in self.consumers)
        self.flushes = [entry for entry in self.flushes if not entry[0].done()]

    @invariant()
    def accounts_add_up(self) -> None:
        listeners = self.engine.statistics().listeners
        for consumer, listener in zip(self.open_ones, listeners, strict=True):
            assert listener.depth == len(consumer.waiting)
            assert listener.accepted == consumer.accepted
            assert listener.dropped == consumer.dropped
            assert listener.handled == len(consumer.expected)
            assert listener.discarded == listener.errors == 0

    def teardown(self) -> None:
        """The run ends when all that was sent is handled, and not before."""
        with self.exits:
            self.portal.call(self.gate.set)
            self.settle()
            for consumer in self.consumers:
                while consumer.in_hand is not None:
                    assert not self.run.done()
                    self.let_handle(consumer)
            self.run.result(timeout=60)
            self.handled_in_order()
            for waiting in [*(entry[0] for entry in self.emitters), *(entry[0] for entry in self.flushes)]:
                waiting.result(timeout=60)


def test_the_bus_agrees_with_a_model(anyio_backend: Backend) -> None:
    machine: type[RuleBasedStateMachine] = type("Machine", (BusMachine,), {"backend": anyio_backend})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))

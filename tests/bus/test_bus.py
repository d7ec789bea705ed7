"""Subscribers: order, back-pressure, errors, coming and going, and the barrier at the end."""

import threading
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, Event, Events, InboxOverflow
from aengine.bus.inbox import Overflow
from aengine.threads.event_loop import EventLoopHandle

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


def step(engine: Engine[int, int], batch: int) -> int:
    return batch * 10


async def async_step(engine: Engine[int, int], batch: int) -> int:
    return batch * 10


# Order and completeness


@both_threads
@pytest.mark.parametrize("length", [1, 300])
async def test_each_subscriber_gets_every_event_in_order(thread: Thread, length: int) -> None:
    engine = Engine(step, thread=thread)
    in_task: list[int] = []
    in_thread: list[int] = []

    @engine.subscribe(Events.ITERATION_COMPLETED, buffer=3)
    async def by_task(event: Event) -> None:
        in_task.append(event.iteration)
        if event.iteration % 7 == 0:
            await checkpoint()

    @engine.subscribe(Events.ITERATION_COMPLETED)
    def by_thread(event: Event) -> None:
        in_thread.append(event.iteration)

    await engine.run(range(length))
    assert in_task == in_thread == list(range(1, length + 1))


@both_threads
async def test_each_run_of_an_engine_reaches_its_subscribers(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    seen: list[tuple[str, int]] = []

    @engine.subscribe(Events.STARTED | Events.ITERATION_COMPLETED | Events.COMPLETED)
    async def note(event: Event) -> None:
        seen.append((event.name, event.iteration))

    for _ in range(20):
        await engine.run([1, 2])
        assert seen == [
            ("STARTED", 0),
            ("ITERATION_COMPLETED", 1),
            ("ITERATION_COMPLETED", 2),
            ("COMPLETED", 2),
        ]
        seen.clear()


async def test_several_events_share_one_inbox_in_the_order_they_were_fired() -> None:
    engine = Engine(step)
    seen: list[str] = []
    sequences: list[int] = []

    @engine.subscribe(
        Events.EPOCH_STARTED | Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_COMPLETED,
        buffer=1,
    )
    async def note(event: Event) -> None:
        seen.append(f"{event.name}@{event.epoch}/{event.iteration}")
        sequences.append(event.sequence)

    await engine.run([1, 2], max_epochs=2)
    assert seen == [
        "EPOCH_STARTED@1/0",
        "ITERATION_COMPLETED@1/2",
        "EPOCH_COMPLETED@1/2",
        "EPOCH_STARTED@2/2",
        "ITERATION_COMPLETED@2/4",
        "EPOCH_COMPLETED@2/4",
    ]
    assert sequences == sorted(set(sequences))


async def test_plain_handlers_run_in_a_thread_and_one_at_a_time() -> None:
    engine = Engine(async_step)
    here = threading.get_ident()
    at_once = 0
    most = 0

    @engine.subscribe(Events.ITERATION_COMPLETED)
    def work(event: Event) -> None:
        nonlocal at_once, most
        assert threading.get_ident() != here
        at_once += 1
        most = max(most, at_once)
        at_once -= 1

    await engine.run(range(50))
    assert most == 1


async def test_what_a_plain_handler_returns_is_awaited() -> None:
    engine = Engine(step)
    seen: list[int] = []

    async def note(event: Event) -> None:
        seen.append(event.iteration)

    def plain(event: Event) -> Awaitable[None]:
        return note(event)

    engine.subscribe(Events.ITERATION_COMPLETED, plain)
    await engine.run([1, 2, 3])
    assert seen == [1, 2, 3]


def test_subscribe_as_a_decorator_returns_the_function_as_it_was() -> None:
    async def handler(event: Event) -> None: ...

    assert Engine(step).subscribe(Events.STARTED)(handler) is handler


# Facts


async def test_an_event_is_still_right_three_steps_later() -> None:
    async def counting(engine: Engine[int, int], batch: int) -> int:
        engine.state.metrics["loss"] = engine.state.iteration * 100
        await checkpoint()
        return engine.state.iteration * 10

    engine = Engine(counting, name="counter")
    late = 0

    @engine.subscribe(Events.ITERATION_COMPLETED)
    async def read(event: Event) -> None:
        nonlocal late
        while engine.state.iteration < min(event.iteration + 3, 20):
            await checkpoint()
        late += engine.state.iteration >= event.iteration + 3
        assert event.output == event.iteration * 10
        assert event.metrics == {"loss": event.iteration * 100}
        assert event.epoch == (1 if event.iteration <= 10 else 2)
        assert (event.epoch_length, event.max_epochs) == (10, 2)
        assert event.engine_name == "counter"
        assert event.name == "ITERATION_COMPLETED"
        assert event.snapshot is None

    await engine.run(range(10), max_epochs=2)
    assert late == 17


async def test_events_are_frozen() -> None:
    engine = Engine(step)
    seen: list[Event] = []
    engine.state.metrics["accuracy"] = 0.5

    @engine.subscribe(Events.COMPLETED)
    async def keep(event: Event) -> None:
        seen.append(event)

    began = perf_counter()
    await engine.run([1])
    (event,) = seen
    with pytest.raises(AttributeError):
        event.iteration = 2  # type: ignore[misc]  # that it raises is the point
    with pytest.raises(TypeError):
        event.metrics["accuracy"] = 1.0  # type: ignore[index]  # likewise
    engine.state.metrics["accuracy"] = 0.75
    assert event.metrics == {"accuracy": 0.5}
    assert began < event.monotonic < perf_counter()
    assert "COMPLETED" in repr(event)


async def test_an_event_tells_the_time_of_day_and_is_equal_to_itself_only() -> None:
    engine = Engine(step)
    seen: list[Event] = []

    @engine.subscribe(Events.COMPLETED)
    async def keep(event: Event) -> None:
        seen.append(event)

    began = datetime.now(UTC)
    for _ in range(2):
        await engine.run([1])
    one, other = seen
    slack = timedelta(minutes=1)  # the wall clock may be put right meanwhile
    assert began - slack < datetime.fromtimestamp(one.time, UTC) < datetime.now(UTC) + slack
    assert len({one, other, one}) == 2
    assert one != other


# Back-pressure and policies, as users see them


@pytest.mark.parametrize("buffer", [1, 4])
async def test_the_loop_waits_for_a_subscriber_that_is_behind(buffer: int) -> None:
    engine = Engine(async_step)
    gate, done = anyio.Event(), anyio.Event()

    @engine.subscribe(Events.ITERATION_COMPLETED, buffer=buffer)
    async def slow(event: Event) -> None:
        await gate.wait()

    async def run() -> None:
        await engine.run(range(50))
        done.set()

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await anyio.wait_all_tasks_blocked()
        # one in hand, as many waiting as there is room for, and the one that the loop waits with
        assert engine.state.iteration == buffer + 2
        assert engine.statistics().listeners[0].depth == buffer + 1
        gate.set()
        await done.wait()
    (listener,) = engine.statistics().listeners
    assert listener.handled == listener.accepted == 50


@both_threads
async def test_never_more_than_the_buffer_and_the_emitters_wait(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    engine.register_events("NEWS")
    buffer, deepest = 2, 0

    @engine.subscribe(Events.ITERATION_COMPLETED | "NEWS", buffer=buffer)
    async def slow(event: Event) -> None:
        nonlocal deepest
        deepest = max(deepest, engine.statistics().listeners[0].depth)
        await checkpoint()

    async def tell() -> None:
        for _ in range(100):
            await engine.emit("NEWS")

    @engine.on(Events.STARTED)
    async def start_two_that_emit() -> None:
        group.start_soon(tell)
        group.start_soon(tell)

    @engine.on(Events.EPOCH_COMPLETED)
    async def wait_for_both() -> None:
        while engine.statistics().listeners[0].accepted < 200 + 200:
            await checkpoint()

    async with anyio.create_task_group() as group:
        await engine.run(range(200))
    assert buffer <= deepest <= buffer + 3
    (listener,) = engine.statistics().listeners
    assert listener.handled == listener.accepted == 400


@pytest.mark.parametrize(
    ("overflow", "handled", "dropped"),
    [
        ("latest", [1, 10], 8),
        ("drop_oldest", [1, 8, 9, 10], 6),
        ("drop_new", [1, 2, 3, 4], 6),
    ],
)
async def test_overflow_policies_drop_and_count_and_never_wait(
    overflow: Overflow, handled: list[int], dropped: int
) -> None:
    begun, gate = anyio.Event(), anyio.Event()

    async def step(engine: Engine[int, None], batch: int) -> None:
        if batch:
            await begun.wait()

    engine = Engine(step)
    seen: list[int] = []

    @engine.subscribe(Events.ITERATION_COMPLETED, buffer=3, overflow=overflow)
    async def slow(event: Event) -> None:
        begun.set()
        await gate.wait()
        seen.append(event.iteration)

    @engine.on(Events.EPOCH_COMPLETED)
    def open_gate() -> None:
        gate.set()

    await engine.run(range(10))
    assert seen == handled
    (listener,) = engine.statistics().listeners
    assert (listener.accepted, listener.handled, listener.dropped) == (10, len(handled), dropped)


async def test_latest_keeps_one_of_each_of_several_events() -> None:
    begun, gate = anyio.Event(), anyio.Event()

    async def step(engine: Engine[int, None], batch: int) -> None:
        await begun.wait()

    engine = Engine(step)
    seen: list[str] = []

    @engine.subscribe(Events.STARTED | Events.EPOCH_STARTED | Events.ITERATION_COMPLETED, overflow="latest")
    async def slow(event: Event) -> None:
        begun.set()
        await gate.wait()
        seen.append(f"{event.name}@{event.iteration}")

    @engine.on(Events.COMPLETED)
    def open_gate() -> None:
        gate.set()

    await engine.run(range(3), max_epochs=2)
    assert seen == ["STARTED@0", "EPOCH_STARTED@3", "ITERATION_COMPLETED@6"]


@both_threads
async def test_overflow_error_fails_the_run_and_says_what_to_do(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    gate = anyio.Event()

    @engine.subscribe(Events.ITERATION_COMPLETED, buffer=2, overflow="error", name="saver")
    async def slow(event: Event) -> None:
        await gate.wait()

    @engine.on(Events.EXCEPTION_RAISED)
    def open_gate() -> None:
        loop_handle.call(gate.set)

    loop_handle = EventLoopHandle()
    with pytest.raises(InboxOverflow, match=r"'saver' is full.*overflow="):
        await engine.run(range(100))
    assert engine.state.iteration in (3, 4)  # the first may have been taken, or not yet
    (listener,) = engine.statistics().listeners
    assert listener.dropped == 1
    assert listener.accepted == listener.handled + listener.dropped + listener.discarded


async def test_a_full_inbox_that_raises_keeps_the_event_from_no_other() -> None:
    engine = Engine(async_step)
    engine.register_events("NEWS")
    first: list[int] = []
    last: list[int] = []
    gate = anyio.Event()

    @engine.subscribe("NEWS")
    async def before(event: Event) -> None:
        first.append(event.sequence)

    @engine.subscribe("NEWS", buffer=1, overflow="error")
    async def full(event: Event) -> None:
        await gate.wait()

    @engine.subscribe("NEWS")
    async def after(event: Event) -> None:
        last.append(event.sequence)

    overflows = 0

    @engine.on(Events.ITERATION_COMPLETED)
    async def tell() -> None:
        nonlocal overflows
        for _ in range(5):
            try:
                await engine.emit("NEWS")
            except InboxOverflow:
                overflows += 1
        gate.set()

    await engine.run([1])
    assert overflows >= 3
    assert len(first) == 5
    assert last == first


@pytest.mark.parametrize("overflow", ["latest", "drop_oldest", "drop_new"])
@both_threads
async def test_a_subscriber_that_hangs_does_not_delay_the_step(thread: Thread, overflow: Overflow) -> None:
    engine = Engine(step, thread=thread)
    gate = anyio.Event()

    @engine.subscribe(Events.ITERATION_COMPLETED, buffer=1, overflow=overflow)
    async def hang(event: Event) -> None:
        await gate.wait()

    @engine.on(Events.COMPLETED)
    def open_gate() -> None:
        loop_handle.call(gate.set)  # opened by the end of the run: had the loop waited, it never would be

    loop_handle = EventLoopHandle()
    await engine.run(range(1000))
    assert engine.state.iteration == 1000


async def test_a_removed_subscriber_lets_go_of_the_loop_that_waits_for_it() -> None:
    engine = Engine(async_step)
    gate = anyio.Event()

    async def hang(event: Event) -> None:
        await gate.wait()

    handle = engine.subscribe(Events.ITERATION_COMPLETED, hang, buffer=1)

    @engine.on(Events.COMPLETED)
    def open_gate() -> None:
        gate.set()

    async with anyio.create_task_group() as group:
        group.start_soon(engine.run, range(50))
        await anyio.wait_all_tasks_blocked()
        assert engine.state.iteration == 3
        handle.remove()
    assert engine.state.iteration == 50


@both_threads
async def test_a_subscriber_that_fails_lets_go_of_the_loop_that_waits_for_it(
    thread: Thread,
) -> None:
    engine = Engine(step, thread=thread)
    error = ValueError("third time")

    @engine.subscribe(Events.ITERATION_COMPLETED, buffer=1)
    async def fail(event: Event) -> None:
        for _ in range(10):
            await checkpoint()
        if event.iteration == 3:
            raise error

    with pytest.raises(ValueError, match="third time") as caught:
        await engine.run(range(1000))
    assert caught.value is error
    assert engine.state.iteration < 10

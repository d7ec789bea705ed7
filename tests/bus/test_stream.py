"""Streams: events to be read, however slowly and for however long."""
# ruff: noqa: PERF401, PT012 -- an `async for`, or a block with its `async with`, is what is under test

import gc
import threading
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, Event, Events, InboxOverflow
from aengine.bus.inbox import Overflow

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


def step(engine: Engine[int, int], batch: int) -> int:
    return batch


async def async_step(engine: Engine[int, int], batch: int) -> int:
    await checkpoint()
    return batch


# Reading


@both_threads
async def test_a_reader_beside_the_run_gets_every_event_in_order(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    seen: list[tuple[int, Any]] = []

    async def read(*, task_status: Any) -> None:
        async with engine.stream(Events.ITERATION_COMPLETED, overflow="wait", buffer=2) as events:
            task_status.started()
            async for event in events:
                seen.append((event.iteration, event.output))

    async with anyio.create_task_group() as group:
        await group.start(read)
        await engine.run(range(300))
    assert seen == [(n + 1, n) for n in range(300)]


async def test_it_ends_with_the_run_and_what_is_left_can_still_be_read() -> None:
    engine = Engine(step)
    async with engine.stream(Events.EPOCH_COMPLETED | Events.COMPLETED) as events:
        await engine.run([1], max_epochs=3)
        names = [f"{event.name}@{event.epoch}" async for event in events]
        assert names == [
            "EPOCH_COMPLETED@1",
            "EPOCH_COMPLETED@2",
            "EPOCH_COMPLETED@3",
            "COMPLETED@3",
        ]
        assert [event async for event in events] == []


async def test_a_failed_run_ends_it_too() -> None:
    engine = Engine(step)
    async with engine.stream(Events.ITERATION_COMPLETED | Events.EXCEPTION_RAISED) as events:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await engine.run([1, 2, 3])
        names = [event.name async for event in events]
    assert names == ["ITERATION_COMPLETED", "EXCEPTION_RAISED"]


async def test_a_cancelled_run_ends_it_too() -> None:
    engine = Engine(async_step)
    names: list[str] = []

    async def read(*, task_status: Any) -> None:
        async with engine.stream(Events.CANCELLED | Events.EPOCH_STARTED) as events:
            task_status.started()
            async for event in events:
                names.append(event.name)

    async with anyio.create_task_group() as group:
        await group.start(read)
        with anyio.CancelScope() as scope:
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), scope.cancel)
            await engine.run(range(10**6))
    assert names == ["EPOCH_STARTED", "CANCELLED"]


async def test_an_interrupted_run_does_not_end_it() -> None:
    engine = Engine(async_step)
    seen: list[int] = []

    async def read(*, task_status: Any) -> None:
        async with engine.stream(Events.ITERATION_COMPLETED) as events:
            task_status.started()
            async for event in events:
                seen.append(event.iteration)

    async with anyio.create_task_group() as group:
        await group.start(read)
        with engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt):
            await engine.run(range(5))
        await anyio.wait_all_tasks_blocked()
        assert seen == [1, 2]
        await engine.run()
    assert seen == [1, 2, 3, 4, 5]


async def test_opened_in_a_run_it_begins_with_the_next_event() -> None:
    engine = Engine(step)
    seen: list[int] = []

    async def read() -> None:
        async with engine.stream(Events.ITERATION_COMPLETED) as events:
            opened.set()
            async for event in events:
                seen.append(event.iteration)

    opened = anyio.Event()

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    async def open_one() -> None:
        group.start_soon(read)
        await opened.wait()

    async with anyio.create_task_group() as group:
        await engine.run(range(6))
    assert seen == [4, 5, 6]


async def test_one_stream_can_be_entered_again_for_another_run() -> None:
    engine = Engine(step)
    stream = engine.stream(Events.ITERATION_COMPLETED)
    for _ in range(2):
        async with stream as events:
            await engine.run(range(3))
            assert [event.iteration async for event in events] == [1, 2, 3]


async def test_one_block_reads_one_run() -> None:
    engine = Engine(step)
    async with engine.stream(Events.ITERATION_COMPLETED) as events:
        await engine.run(range(2))
        await engine.run(range(2))
        assert [event.iteration async for event in events] == [1, 2]


async def test_a_reader_in_another_event_loop_is_fed(anyio_backend: Any) -> None:
    engine = Engine(step)
    seen: list[int] = []

    async def read(*, task_status: Any) -> None:
        async with engine.stream(Events.ITERATION_COMPLETED, overflow="wait", buffer=1) as events:
            task_status.started()
            async for event in events:
                seen.append(event.iteration)

    def train() -> None:
        anyio.run(engine.run, range(100), backend=anyio_backend[0], backend_options=anyio_backend[1])

    async with anyio.create_task_group() as group:
        await group.start(read)
        await anyio.to_thread.run_sync(train)
    assert seen == list(range(1, 101))


async def test_a_reader_that_always_finds_an_event_lets_others_have_a_turn() -> None:
    engine = Engine(step)
    engine.register_events("NEWS")
    turns = 0

    async def other() -> None:
        nonlocal turns
        while turns < 3:
            turns += 1
            await checkpoint()

    async with anyio.create_task_group() as group, engine.stream("NEWS") as events:
        group.start_soon(other)
        engine.fire_event("NEWS")
        async for event in events:
            if turns == 3 or event.sequence == 10_000:
                break
            engine.fire_event("NEWS")
    assert event.sequence < 10_000


async def test_reading_is_a_cancellation_point() -> None:
    engine = Engine(step)
    async with engine.stream(Events.ITERATION_COMPLETED) as events:
        await engine.run(range(3))
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anext(events)
        assert scope.cancelled_caught
        assert [event.iteration async for event in events] == [1, 2, 3]  # nothing was lost by it


async def test_reading_outside_of_the_block_says_how_to() -> None:
    stream = Engine(step).stream(Events.STARTED)
    with pytest.raises(RuntimeError, match=r"async with engine\.stream"):
        await anext(stream)
    async with stream:
        pass
    with pytest.raises(RuntimeError, match=r"async with engine\.stream"):
        await anext(stream)


# Slow readers, and readers that go


async def test_a_slow_reader_loses_the_oldest_and_learns_how_many() -> None:
    engine = Engine(step)
    async with engine.stream(Events.ITERATION_COMPLETED, buffer=4) as events:
        await engine.run(range(100))
        (listener,) = engine.statistics().listeners
        assert (listener.accepted, listener.dropped, listener.depth) == (100, 96, 4)
        assert [event.iteration async for event in events] == [97, 98, 99, 100]
        (listener,) = engine.statistics().listeners
        assert (listener.handled, listener.depth) == (4, 0)


@pytest.mark.parametrize(
    ("overflow", "kept"), [("drop_new", [1, 2, 3]), ("latest", [100]), ("drop_oldest", [98, 99, 100])]
)
async def test_other_policies_are_kept(overflow: Overflow, kept: list[int]) -> None:
    engine = Engine(step)
    async with engine.stream(Events.ITERATION_COMPLETED, buffer=3, overflow=overflow) as events:
        await engine.run(range(100))
        assert [event.iteration async for event in events] == kept


async def test_overflow_error_fails_the_run() -> None:
    engine = Engine(step)
    async with engine.stream(Events.ITERATION_COMPLETED, buffer=3, overflow="error") as events:
        with pytest.raises(InboxOverflow, match="stream of ITERATION_COMPLETED"):
            await engine.run(range(100))
        assert [event.iteration async for event in events] == [1, 2, 3]


async def test_overflow_wait_makes_the_loop_wait_for_the_reader() -> None:
    engine = Engine(async_step)
    ahead: list[int] = []

    async def read(*, task_status: Any) -> None:
        async with engine.stream(Events.ITERATION_COMPLETED, buffer=2, overflow="wait") as events:
            task_status.started()
            async for event in events:
                await anyio.wait_all_tasks_blocked()
                ahead.append(engine.state.iteration - event.iteration)

    async with anyio.create_task_group() as group:
        await group.start(read)
        await engine.run(range(6))
    assert max(ahead) == 3  # two wait, and the loop waits with one
    assert len(ahead) == 6


async def test_a_reader_that_leaves_lets_go_of_the_loop() -> None:
    engine = Engine(step)

    async def read(*, task_status: Any) -> None:
        async with engine.stream(Events.ITERATION_COMPLETED, buffer=1, overflow="wait") as events:
            task_status.started()
            async for event in events:
                if event.iteration == 3:
                    break

    async with anyio.create_task_group() as group:
        await group.start(read)
        await engine.run(range(1000))
    assert engine.state.iteration == 1000
    assert not engine.statistics().listeners


async def test_a_reader_that_is_cancelled_lets_go_of_the_loop() -> None:
    engine = Engine(async_step)
    scope = anyio.CancelScope()

    async def read(*, task_status: Any) -> None:
        with scope:
            async with engine.stream(Events.ITERATION_COMPLETED, buffer=1, overflow="wait") as events:
                task_status.started()
                async for event in events:
                    if event.iteration == 3:
                        await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        await group.start(read)
        group.start_soon(engine.run, range(1000))
        await anyio.wait_all_tasks_blocked()
        assert engine.state.iteration == 5
        scope.cancel()
    assert engine.state.iteration == 1000


async def test_a_reader_that_raises_is_its_own_business() -> None:
    engine = Engine(async_step)
    error = ValueError("the client hung up")

    async def read(*, task_status: Any) -> None:
        with pytest.raises(ValueError, match="hung up") as caught:
            async with engine.stream(Events.ITERATION_COMPLETED) as events:
                task_status.started()
                async for _ in events:
                    raise error
        assert caught.value is error

    async with anyio.create_task_group() as group:
        await group.start(read)
        await engine.run(range(100))
    assert engine.state.iteration == 100


async def test_an_opened_stream_that_is_not_read_never_slows_the_run() -> None:
    engine = Engine(step)
    async with engine.stream(Events.ITERATION_COMPLETED):
        await engine.run(range(1000))
    assert engine.state.iteration == 1000
    assert engine.statistics().back_pressure == 0


# Generators around a stream: how web frameworks send events


async def server_sent(engine: Engine[int, int]) -> AsyncIterator[str]:
    async with engine.stream(Events.ITERATION_COMPLETED, overflow="wait", buffer=1) as events:
        async for event in events:
            yield f"data: {event.iteration}\n\n"


async def test_a_generator_around_a_stream_can_be_closed_early() -> None:
    engine = Engine(async_step)
    sent: list[str] = []

    async def serve() -> None:
        responses = server_sent(engine)
        async for response in responses:
            sent.append(response)
            if len(sent) == 3:
                break
        await responses.aclose()  # type: ignore[attr-defined]  # a generator, as frameworks know

    async with anyio.create_task_group() as group:
        group.start_soon(serve)
        await anyio.wait_all_tasks_blocked()
        await engine.run(range(100))
    assert sent == [f"data: {n}\n\n" for n in (1, 2, 3)]
    assert engine.state.iteration == 100
    assert not engine.statistics().listeners


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio's advice
async def test_a_generator_around_a_stream_can_be_abandoned() -> None:
    """The client is gone, and the framework drops the generator where it stands."""
    engine = Engine(async_step)

    async def serve() -> None:
        async for _ in server_sent(engine):
            break

    async with anyio.create_task_group() as group:
        group.start_soon(serve)
        await anyio.wait_all_tasks_blocked()
        await engine.run(range(100))
    gc.collect()
    for _ in range(5):  # the event loop closes it in a task of its own
        await checkpoint()
    assert engine.state.iteration == 100
    assert not engine.statistics().listeners


async def test_a_generator_may_be_advanced_by_one_task_and_closed_by_another() -> None:
    """As Starlette does with a response whose client disconnects."""
    engine = Engine(async_step)
    responses = server_sent(engine)
    got = anyio.Event()

    async def advance() -> None:
        await anext(responses)
        got.set()

    async def close() -> None:
        await got.wait()
        await responses.aclose()  # type: ignore[attr-defined]  # a generator

    async with anyio.create_task_group() as group:
        group.start_soon(advance)
        group.start_soon(close)
        await anyio.wait_all_tasks_blocked()
        await engine.run(range(100))
    assert engine.state.iteration == 100
    assert not engine.statistics().listeners


async def test_events_fired_by_a_thread_reach_a_reader_that_waits() -> None:
    engine = Engine(step)
    engine.register_events("NEWS")
    seen: list[Event] = []

    async def read(*, task_status: Any) -> None:
        async with engine.stream("NEWS", buffer=200) as events:
            task_status.started()
            async for event in events:
                seen.append(event)
                if len(seen) == 100:
                    return

    def fire() -> None:
        for _ in range(100):
            engine.fire_event("NEWS")

    async with anyio.create_task_group() as group:
        await group.start(read)
        thread = threading.Thread(target=fire)
        thread.start()
    await anyio.to_thread.run_sync(thread.join)
    assert [event.sequence for event in seen] == list(range(1, 101))

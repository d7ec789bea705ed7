"""flush(): the barrier, at will."""

from typing import TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, Event, Events
from aengine.threads.event_loop import EventLoopHandle

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


def step(engine: Engine[int, int], batch: int) -> int:
    return batch


async def async_step(engine: Engine[int, int], batch: int) -> int:
    await checkpoint()
    return batch


async def ignore(event: Event) -> None: ...


# flush


async def test_flush_in_an_inline_handler_waits_for_everything_before_it() -> None:
    engine = Engine(step)
    seen: list[int] = []
    counts: list[int] = []

    @engine.subscribe(Events.ITERATION_COMPLETED)
    async def slow(event: Event) -> None:
        for _ in range(5):
            await checkpoint()
        seen.append(event.iteration)

    @engine.on(Events.EPOCH_COMPLETED)
    async def barrier() -> None:
        await engine.flush()
        counts.append(len(seen))

    await engine.run(range(7), max_epochs=3)
    assert counts == [7, 14, 21]


@both_threads
async def test_flush_in_a_handler_that_has_been_removed_is_refused_as_in_any_other(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    refused: list[str] = []

    async def flush(event: Event) -> None:
        handle.remove()
        with pytest.raises(RuntimeError, match="the one that calls it here"):
            await engine.flush()
        refused.append(event.name)

    handle = engine.subscribe(Events.STARTED, flush)
    with anyio.fail_after(20):
        await engine.run([1, 2])
    assert refused == ["STARTED"]


async def test_flush_from_outside_waits_for_the_event_in_hand_and_not_for_later_ones() -> None:
    engine = Engine(async_step)
    gate, begun = anyio.Event(), anyio.Event()
    flushed: list[int] = []
    handled = 0

    @engine.subscribe(Events.ITERATION_COMPLETED, buffer=2)
    async def slow(event: Event) -> None:
        nonlocal handled
        begun.set()
        await gate.wait()
        await checkpoint()
        handled += 1

    async def flush() -> None:
        await begun.wait()
        await anyio.wait_all_tasks_blocked()
        sent = engine.statistics().listeners[0].accepted
        group.start_soon(open_when_flush_waits)
        await engine.flush()
        flushed.extend((sent, handled))

    async def open_when_flush_waits() -> None:
        await anyio.wait_all_tasks_blocked()
        assert not flushed
        gate.set()

    async with anyio.create_task_group() as group:
        group.start_soon(flush)
        await engine.run(range(200))
    sent, handled_then = flushed
    assert sent <= handled_then < 200
    assert handled == 200


async def test_flush_is_cancellable_and_loses_nothing() -> None:
    engine = Engine(async_step)
    gate = anyio.Event()
    seen: list[int] = []

    @engine.subscribe(Events.ITERATION_COMPLETED)
    async def slow(event: Event) -> None:
        await gate.wait()
        seen.append(event.iteration)

    @engine.on(Events.EPOCH_COMPLETED)
    async def flush_in_vain() -> None:
        with anyio.move_on_after(0.01) as scope:
            await engine.flush()
        assert scope.cancelled_caught
        gate.set()
        await engine.flush()
        assert seen == [1, 2, 3]

    await engine.run(range(3))


async def test_flush_in_a_subscriber_says_that_it_would_wait_for_itself() -> None:
    engine = Engine(step)

    @engine.subscribe(Events.COMPLETED)
    async def flush(event: Event) -> None:
        await engine.flush()

    with pytest.raises(RuntimeError, match=r"waits for every subscriber.*call it from"):
        await engine.run([1])


async def test_flush_of_another_engine_in_a_subscriber_is_fine() -> None:
    """A concurrent validation: another engine runs in a subscriber of the first."""
    trainer = Engine(step)
    validator = Engine(step)
    order: list[str] = []

    @validator.subscribe(Events.ITERATION_COMPLETED)
    async def note(event: Event) -> None:
        await checkpoint()
        order.append("noted")

    @validator.on(Events.COMPLETED)
    async def flush() -> None:
        await validator.flush()
        order.append("flushed")

    @trainer.subscribe(Events.EPOCH_COMPLETED)
    async def validate(event: Event) -> None:
        await validator.run([1, 2])

    await trainer.run([1])
    assert order == ["noted", "noted", "flushed"]


async def test_flush_waits_for_what_a_removed_subscriber_was_sent() -> None:
    engine = Engine(step)
    seen: list[int] = []

    async def slow(event: Event) -> None:
        for _ in range(20):
            await checkpoint()
        seen.append(event.iteration)

    handle = engine.subscribe(Events.ITERATION_COMPLETED, slow)

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    async def remove_and_flush() -> None:
        handle.remove()
        await engine.flush()
        assert seen[:2] == [1, 2]

    await engine.run(range(3))


async def test_flush_without_a_run_returns_at_once_or_says_why_it_cannot() -> None:
    engine = Engine(step)
    engine.register_events("NEWS")
    engine.subscribe("NEWS", ignore, name="reader")
    await engine.flush()
    await engine.emit("NEWS")
    with pytest.raises(RuntimeError, match=r"wait for ever.*reader"):
        await engine.flush()
    await engine.run([1])
    await engine.flush()


@both_threads
async def test_a_flush_that_waits_when_the_run_fails_comes_back(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    waits = anyio.Event()
    loop_handle = EventLoopHandle()

    @engine.subscribe(Events.ITERATION_COMPLETED)
    async def fail(event: Event) -> None:
        await waits.wait()
        raise ValueError("failed")

    async def flush() -> None:
        loop_handle.post(waits.set)
        await engine.flush()

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    async def start() -> None:
        group.start_soon(flush)

    async with anyio.create_task_group() as group:
        with pytest.raises(ValueError, match="failed"):
            await engine.run(range(10))

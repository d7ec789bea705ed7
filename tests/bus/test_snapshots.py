"""What travels with an event, and which events a subscriber gets: snapshots, at_end, intervals."""

import threading
from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter
from typing import Any, TypeAlias

import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, Event, Events

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


def step(engine: Engine[int, int], batch: int) -> int:
    return batch


def slow_step(engine: Engine[int, int], batch: int) -> int:
    """Take longer than the microsecond that the tests of intervals ask for."""
    began = perf_counter()
    while perf_counter() - began < 3e-6:
        pass
    return batch


# Snapshots


@both_threads
async def test_a_snapshot_is_taken_once_for_all_that_share_it(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    taken: list[int] = []
    seen: list[Any] = []

    def snapshot(engine: Engine[int, int]) -> list[int]:
        taken.append(engine.state.iteration)
        return [engine.state.iteration]

    async def keep(event: Event[Any, Any]) -> None:
        seen.append((event.iteration, event.snapshot))

    async def keep_without(event: Event) -> None:
        assert event.snapshot is None

    for _ in range(3):
        engine.subscribe(Events.ITERATION_COMPLETED(every=2), keep, snapshot=snapshot)
    engine.subscribe(Events.ITERATION_COMPLETED, keep_without)
    async with engine.stream(Events.ITERATION_COMPLETED(every=2), snapshot=snapshot) as events:
        await engine.run(range(6))
        streamed = [(event.iteration, event.snapshot) async for event in events]
    assert taken == [2, 4, 6]
    assert streamed == [(2, [2]), (4, [4]), (6, [6])]
    assert sorted(seen) == sorted(streamed * 3)
    assert len({id(one) for _, one in [*seen, *streamed]}) == 3  # shared, not copied


async def test_each_of_several_snapshots_goes_to_its_own_subscriber() -> None:
    engine = Engine(step)
    seen: dict[str, Any] = {}

    async def keep_weights(event: Event[Any, str]) -> None:
        seen["weights"] = event.snapshot

    async def keep_optimizer(event: Event[Any, str]) -> None:
        seen["optimizer"] = event.snapshot

    engine.subscribe(Events.COMPLETED, keep_weights, snapshot=lambda engine: "weights")
    engine.subscribe(Events.COMPLETED, keep_optimizer, snapshot=lambda engine: "optimizer")
    await engine.run([1])
    assert seen == {"weights": "weights", "optimizer": "optimizer"}


@both_threads
async def test_an_async_snapshot_is_awaited_between_two_steps(thread: Thread) -> None:
    in_step = False

    def guarded(engine: Engine[int, int], batch: int) -> int:
        nonlocal in_step
        in_step = True
        weights[0] = batch
        in_step = False
        return batch

    async def snapshot(engine: Engine[int, int]) -> int:
        before = weights[0]
        for _ in range(5):
            await checkpoint()
            assert not in_step
        assert weights[0] == before
        return before

    engine = Engine(guarded, thread=thread)
    weights = [0]
    seen: list[Any] = []

    @engine.subscribe(Events.ITERATION_COMPLETED, snapshot=snapshot)
    async def keep(event: Event[Any, Any]) -> None:
        seen.append((event.output, event.snapshot))

    await engine.run(range(5))
    assert seen == [(n, n) for n in range(5)]


async def test_a_plain_snapshot_is_taken_where_the_step_runs() -> None:
    threads: set[int] = set()

    def note_thread(engine: Engine[Any, Any], batch: int | None = None) -> None:
        threads.add(threading.get_ident())

    engine = Engine(note_thread)

    @engine.subscribe(Events.ITERATION_COMPLETED, snapshot=note_thread)
    async def ignore(event: Event) -> None: ...

    await engine.run(range(3))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@both_threads
async def test_an_error_in_a_snapshot_fails_the_run_and_is_named(thread: Thread) -> None:
    engine = Engine(step, thread=thread, name="trainer")
    error = MemoryError("no room for a copy")

    def snapshot(engine: Engine[int, int]) -> None:
        raise error

    @engine.subscribe(Events.EPOCH_COMPLETED, snapshot=snapshot, name="saver")
    async def ignore(event: Event) -> None: ...

    with pytest.raises(MemoryError) as caught:
        await engine.run([1])
    assert caught.value is error
    (note,) = error.__notes__
    for part in ("snapshot", "'saver'", "EPOCH_COMPLETED", "'trainer'", "iteration 1"):
        assert part in note


async def test_a_snapshot_may_be_any_callable() -> None:
    """A dataclass with a __call__ is equal by value, and so has no hash."""

    @dataclass
    class Snapshot:
        offset: int

        def __call__(self, engine: Engine[int, int]) -> int:
            return engine.state.iteration + self.offset

    engine = Engine(step)
    seen: list[int] = []

    @engine.subscribe(Events.COMPLETED, snapshot=Snapshot(100))
    async def keep(event: Event[Any, Any]) -> None:
        seen.append(event.snapshot)

    await engine.run(range(5))
    assert seen == [105]


async def test_no_snapshot_is_taken_when_no_listener_is_due() -> None:
    engine = Engine(step)
    taken = 0

    def snapshot(engine: Engine[int, int]) -> None:
        nonlocal taken
        taken += 1

    @engine.subscribe(Events.ITERATION_COMPLETED(once=3), snapshot=snapshot)
    async def ignore(event: Event) -> None: ...

    await engine.run(range(10))
    assert taken == 1


async def test_inline_handlers_come_before_the_snapshot() -> None:
    """So that a checkpoint holds what a scheduler or a metric did at that event."""
    engine = Engine(step)
    seen: list[Any] = []

    @engine.subscribe(Events.EPOCH_COMPLETED, snapshot=lambda engine: dict(engine.state.metrics))
    async def keep(event: Event[Any, Any]) -> None:
        seen.append((event.snapshot, dict(event.metrics)))

    @engine.on(Events.EPOCH_COMPLETED)
    def measure(engine: Engine[int, int]) -> None:
        engine.state.metrics["loss"] = engine.state.epoch

    await engine.run([1], max_epochs=2)
    assert seen == [({"loss": 1}, {"loss": 1}), ({"loss": 2}, {"loss": 2})]


# at_end


@both_threads
@pytest.mark.parametrize(("length", "expected"), [(10, [4, 8, 10]), (8, [4, 8]), (3, [3]), (4, [4])])
async def test_at_end_adds_the_last_iteration_once(thread: Thread, length: int, expected: list[int]) -> None:
    engine = Engine(step, thread=thread)
    seen: list[Any] = []

    @engine.subscribe(Events.ITERATION_COMPLETED(every=4, at_end=True))
    async def note(event: Event) -> None:
        seen.append((event.name, event.iteration, event.output))

    for _ in range(3):
        await engine.run(range(1, length + 1))
        assert seen == [("ITERATION_COMPLETED", n, n) for n in expected]
        seen.clear()


async def test_at_end_is_for_epochs_too() -> None:
    engine = Engine(step)
    seen: list[int] = []

    @engine.subscribe(Events.EPOCH_COMPLETED(every=2, at_end=True))
    async def note(event: Event) -> None:
        seen.append(event.epoch)

    await engine.run([1, 2], max_epochs=5)
    assert seen == [2, 4, 5]


async def test_at_end_comes_when_the_run_is_terminated() -> None:
    engine = Engine(step)
    seen: list[int] = []

    @engine.subscribe(Events.ITERATION_COMPLETED(every=4, at_end=True))
    async def note(event: Event) -> None:
        seen.append(event.iteration)

    @engine.on(Events.ITERATION_COMPLETED(once=6))
    def stop(engine: Engine[int, int]) -> None:
        engine.terminate()

    await engine.run(range(100))
    assert seen == [4, 6]


async def test_at_end_takes_its_snapshot() -> None:
    engine = Engine(step)
    seen: list[Any] = []

    @engine.subscribe(
        Events.ITERATION_COMPLETED(every=100, at_end=True),
        snapshot=lambda engine: engine.state.iteration,
    )
    async def note(event: Event[Any, int]) -> None:
        seen.append(event.snapshot)

    await engine.run(range(7))
    assert seen == [7]


# Intervals


@both_threads
async def test_every_microsecond_is_every_iteration(thread: Thread) -> None:
    engine = Engine(slow_step, thread=thread)
    seen: list[int] = []

    @engine.subscribe(Events.ITERATION_COMPLETED(every=timedelta(microseconds=1)))
    async def note(event: Event) -> None:
        seen.append(event.iteration)

    await engine.run(range(20))
    assert seen == list(range(1, 21))


@both_threads
@pytest.mark.parametrize("at_end", [False, True], ids=["", "at_end"])
async def test_every_hour_is_never_but_at_the_end(thread: Thread, at_end: Any) -> None:
    engine = Engine(slow_step, thread=thread)
    seen: list[int] = []

    @engine.subscribe(Events.ITERATION_COMPLETED(every=timedelta(hours=1), at_end=at_end))
    async def note(event: Event) -> None:
        seen.append(event.iteration)

    await engine.run(range(20))
    assert seen == ([20] if at_end else [])


async def test_an_interval_has_passed_since_the_event_before() -> None:
    engine = Engine(slow_step)
    times: list[float] = []

    @engine.subscribe(Events.ITERATION_COMPLETED(every=timedelta(microseconds=200)))
    async def note(event: Event) -> None:
        times.append(event.monotonic)

    def until_five() -> Any:
        while len(times) < 5:
            yield 1

    began = perf_counter()
    await engine.run(until_five)
    assert all(time - began >= n * 200e-6 for n, time in enumerate(times, start=1))


class Falsy:
    def __call__(self, engine: Engine[Any, Any]) -> int:
        return int(engine.state.iteration)

    def __bool__(self) -> bool:
        return False


async def test_a_snapshot_is_taken_by_a_callable_that_is_falsy() -> None:
    engine: Engine[int, None] = Engine(lambda engine, batch: None)
    taken: list[int] = []
    engine.subscribe(Events.ITERATION_COMPLETED, lambda event: taken.append(event.snapshot), snapshot=Falsy())
    await engine.run([1, 2])
    assert taken == [1, 2]

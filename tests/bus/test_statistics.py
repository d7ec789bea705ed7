"""Where the time went, and what became of each event: the account adds up."""

import dataclasses
import threading
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any, TypeAlias

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, EngineStatistics, Event, Events
from aengine.loop.effects import BUDGET
from aengine.statistics import Stopwatch
from aengine.threads.lag import LagTimer

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


def work(seconds: float) -> None:
    began = perf_counter()
    while perf_counter() - began < seconds:
        pass


def step(engine: Engine[int, int], batch: int) -> int:
    return batch


async def async_step(engine: Engine[int, int], batch: int) -> int:
    await checkpoint()
    return batch


async def test_the_record_is_frozen_and_names_the_listeners() -> None:
    engine = Engine(step, name="trainer")

    @engine.subscribe(Events.ITERATION_COMPLETED(every=2) | Events.COMPLETED, name="reporter")
    async def report(event: Event) -> None: ...

    async with engine.stream(Events.EPOCH_COMPLETED):
        await engine.run(range(4))
        statistics = engine.statistics()
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistics.total = 0.0  # type: ignore[misc]  # that it raises is the point
    assert (statistics.name, statistics.is_running) == ("trainer", False)
    assert (statistics.epoch, statistics.iteration) == (1, 4)
    reporter, stream = statistics.listeners
    assert (reporter.name, reporter.events) == (
        "reporter",
        "ITERATION_COMPLETED(every=2) | COMPLETED",
    )
    assert (reporter.accepted, reporter.handled, reporter.depth) == (3, 3, 0)
    assert stream.events == "EPOCH_COMPLETED"
    assert (stream.accepted, stream.handled, stream.depth) == (1, 0, 1)


@both_threads
async def test_the_times_add_up_to_the_total(thread: Thread) -> None:
    def working(engine: Engine[int, None], batch: int) -> None:
        work(2e-3)

    def batches() -> Any:
        for batch in range(10):
            work(1e-3)
            yield batch

    engine = Engine(working, thread=thread)

    @engine.on(Events.ITERATION_COMPLETED)
    def one_handler(engine: Engine[int, None]) -> None:
        work(1e-3)

    @engine.on(Events.ITERATION_COMPLETED(every=2))
    def other_handler() -> None:
        work(1e-3)

    began = perf_counter()
    await engine.run(batches)
    passed = perf_counter() - began
    statistics = engine.statistics()
    assert 45e-3 <= statistics.total <= passed
    assert statistics.step >= 20e-3
    assert statistics.data >= 10e-3
    one, other = statistics.handlers.values()
    assert one >= 10e-3
    assert other >= 5e-3
    parts = (
        statistics.step
        + statistics.data
        + sum(statistics.handlers.values())
        + statistics.back_pressure
        + statistics.event_loop
    )
    assert parts <= statistics.total


@pytest.mark.parametrize(
    ("seconds", "begins_at", "timed"), [(1e-6, 0, 18), (1e-6, 5000, 18), (90e-6, 0, 45), (3e-3, 0, 1000)]
)
def test_timed_iterations_stand_for_themselves_and_those_before_them(
    seconds: float, begins_at: int, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("aengine.statistics.perf_counter", lambda: now)
    watch, weights, last = Stopwatch(), [], begins_at
    for iteration in range(begins_at, begins_at + 1000):
        if iteration >= watch.next_reading:
            watch.read(iteration)
            weights.append(watch.weight)
            last = iteration
        now += seconds
    assert sum(weights) == last - begins_at + 1
    assert len(weights) == pytest.approx(timed, abs=2)


@both_threads
async def test_handlers_of_fired_events_are_not_counted_twice(thread: Thread) -> None:
    engine: Engine[int, None] = Engine(lambda engine, batch: engine.fire_event("NEWS"), thread=thread)
    engine.register_events("NEWS", "ASKED")

    @engine.on("NEWS")
    def tell() -> None:
        work(2.5e-3)  # so that each iteration is timed, and the step's time is exact, too

    @engine.on("ASKED")
    def answer() -> None:
        work(1e-3)

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    def ask(engine: Engine[int, None]) -> None:
        engine.fire_event_soon("ASKED")

    @engine.on(Events.COMPLETED)
    def look(engine: Engine[int, None]) -> None: ...

    here = "test_handlers_of_fired_events_are_not_counted_twice.<locals>"
    assert set(engine.statistics().handlers) == {f"{here}.ask", f"{here}.look"}
    await engine.run(range(20))
    statistics = engine.statistics()
    assert set(statistics.handlers) == {f"{here}.{name}" for name in ("ask", "answer", "look")}
    assert set(statistics.fired_handlers) == {f"{here}.tell"}
    assert statistics.handlers[f"{here}.answer"] >= 1e-3
    assert 50e-3 <= statistics.fired_handlers[f"{here}.tell"] <= statistics.step
    assert statistics.step + sum(statistics.handlers.values()) <= statistics.total


async def test_handlers_of_what_is_fired_beside_the_loop_are_timed_each_time() -> None:
    """Though the iterations of the loop may be too short for that."""
    engine = Engine(async_step)
    engine.register_events("NEWS")

    @engine.on("NEWS")
    def tell() -> None:
        work(1e-3)

    @engine.subscribe(Events.ITERATION_COMPLETED(every=100))
    async def report(event: Event) -> None:
        await engine.emit("NEWS")

    await engine.run(range(1000))
    statistics = engine.statistics()
    (told,) = statistics.fired_handlers.values()
    assert told >= 10e-3
    assert not statistics.handlers


async def test_handlers_are_named_as_they_are_written() -> None:
    engine = Engine(step)

    class Metric:
        def update(self, engine: Engine[int, int]) -> None: ...

        def __call__(self, engine: Engine[int, int], name: str = "") -> None: ...

    def plain() -> None: ...

    engine.add_event_handler(Events.ITERATION_COMPLETED, plain)
    engine.add_event_handler(Events.EPOCH_COMPLETED, Metric().update)
    engine.add_event_handler(Events.EPOCH_COMPLETED, Metric())
    engine.add_event_handler(Events.COMPLETED, partial(Metric(), name="loss"))
    engine.add_event_handler(Events.COMPLETED, partial(plain))
    await engine.run([1])
    here = "test_handlers_are_named_as_they_are_written.<locals>"
    assert set(engine.statistics().handlers) == {
        f"{here}.plain",
        f"{here}.Metric.update",
        f"{here}.Metric",
    }


def test_an_engine_is_called_after_its_step_wherever_that_was_made() -> None:
    def train_step(engine: Engine[int, int], batch: int) -> int:
        return batch

    assert Engine(train_step).name == "train_step"
    assert Engine(step).name == "step"
    assert Engine(step, name="trainer").name == "trainer"


async def test_times_and_counts_begin_anew_with_each_run() -> None:
    def working(engine: Engine[int, None], batch: int) -> None:
        work(batch * 1e-3)

    engine = Engine(working)

    @engine.on(Events.ITERATION_COMPLETED)
    def handler(engine: Engine[int, None]) -> None:
        work(engine.state.batch * 1e-3)

    for batch in (10, 0):
        began = perf_counter()
        await engine.run([batch])
        passed = perf_counter() - began
        statistics = engine.statistics()
        spent = [statistics.step, sum(statistics.handlers.values())]
        assert min(spent) >= batch * 1e-3
        assert sum(spent) <= statistics.total <= passed


async def test_an_async_step_and_handlers_are_timed_to_their_end() -> None:
    async def slow(engine: Engine[int, None], batch: int) -> None:
        await anyio.to_thread.run_sync(work, 2e-3)

    engine = Engine(slow)

    @engine.on(Events.ITERATION_COMPLETED)
    async def handler() -> None:
        await anyio.to_thread.run_sync(work, 2e-3)

    await engine.run(range(5))
    statistics = engine.statistics()
    assert statistics.step >= 10e-3
    assert sum(statistics.handlers.values()) >= 10e-3


@both_threads
async def test_back_pressure_grows_with_a_slow_subscriber(thread: Thread) -> None:
    engine = Engine(step, thread=thread)

    @engine.subscribe(Events.ITERATION_COMPLETED, buffer=1)
    async def slow(event: Event) -> None:
        while event.iteration == 1 and engine.statistics().listeners[0].depth < 2:
            await checkpoint()  # until there is one too many
        await anyio.to_thread.run_sync(work, 2e-3)

    await engine.run(range(10))
    statistics = engine.statistics()
    assert 0 < statistics.back_pressure < statistics.total
    assert statistics.listeners[0].busy >= 20e-3


async def test_back_pressure_is_all_the_time_that_the_loop_waited() -> None:
    engine = Engine(async_step)

    @engine.subscribe(Events.ITERATION_COMPLETED, buffer=1)
    async def slow(event: Event) -> None:
        if event.iteration == 1:
            await anyio.wait_all_tasks_blocked()  # the loop waits for room
            await anyio.to_thread.run_sync(work, 5e-3)

    await engine.run(range(3))
    assert engine.statistics().back_pressure >= 5e-3


@both_threads
async def test_there_is_no_back_pressure_without_a_reason(thread: Thread) -> None:
    engine = Engine(step, thread=thread)

    @engine.subscribe(Events.ITERATION_COMPLETED, buffer=100)
    async def slow(event: Event) -> None: ...

    await engine.run(range(50))
    assert engine.statistics().back_pressure == 0


async def test_back_pressure_is_the_loops_own_and_counted_once() -> None:
    engine = Engine(async_step)
    engine.register_events("NEWS")

    @engine.subscribe("NEWS", buffer=1)
    async def slow(event: Event) -> None:
        await anyio.to_thread.run_sync(work, 2e-3)

    async def emit_beside() -> None:
        for _ in range(5):
            await engine.emit("NEWS")

    @engine.on(Events.EPOCH_STARTED)
    async def wait_for_others() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(emit_beside)

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    async def emit_inline() -> None:
        await emit_beside()

    await engine.run(range(2))
    statistics = engine.statistics()
    assert statistics.back_pressure == 0  # the handlers have waited
    assert 10e-3 <= sum(statistics.handlers.values()) <= statistics.total


async def test_a_pause_is_time_of_the_event_loop() -> None:
    engine = Engine(async_step)

    async def pause() -> None:
        await anyio.wait_all_tasks_blocked()  # the loop waits to be resumed
        await anyio.to_thread.run_sync(work, 5e-3)
        engine.resume()

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    async def begin() -> None:
        engine.pause()
        group.start_soon(pause)

    async with anyio.create_task_group() as group:
        await engine.run(range(3))
    assert engine.statistics().event_loop >= 5e-3


@pytest.mark.parametrize("waits", [False, True])
async def test_turns_are_given_away_only_where_no_task_had_one(*, waits: bool) -> None:
    """A step that waits lets the others have their turn by that; one that does not spends the budget of the loop."""
    turns = 0

    async def step(engine: Engine[int, None], batch: int) -> None:
        for _ in range(4 * waits):  # trio's next turn but two is the first that is known of
            await checkpoint()
        work(2 * BUDGET)

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    engine = Engine(step)
    async with anyio.create_task_group() as group:
        group.start_soon(count_turns)
        await engine.run(range(20))
        group.cancel_scope.cancel()
    assert turns > 10
    assert (engine.statistics().event_loop == 0) == waits


async def test_a_handler_that_blocks_the_loop_shows_as_lag() -> None:
    engine = Engine(step, thread=False)

    async def block() -> None:
        while not done:
            work(5e-3)
            await checkpoint()

    done = False
    async with anyio.create_task_group() as group:
        group.start_soon(block)
        await engine.run(range(100_000))
        done = True
    assert engine.statistics().lag >= 5e-3


async def test_a_busy_subscriber_shows_while_it_is_busy() -> None:
    engine = Engine(async_step)
    seen: list[EngineStatistics] = []

    @engine.subscribe(Events.ITERATION_COMPLETED)
    async def slow(event: Event) -> None:
        await anyio.to_thread.run_sync(work, 2e-3)

    @engine.on(Events.EPOCH_COMPLETED)
    async def look() -> None:
        while engine.statistics().listeners[0].handled < 5:
            await checkpoint()
        seen.append(engine.statistics())

    await engine.run(range(20))
    (statistics,) = seen
    assert statistics.is_running
    (listener,) = statistics.listeners
    assert listener.busy >= 5 * 2e-3
    in_hand = 1
    assert listener.accepted == listener.handled + listener.depth + in_hand == 20


async def test_a_handlers_time_counts_though_it_raised() -> None:
    engine = Engine(async_step)

    @engine.subscribe(Events.ITERATION_COMPLETED)
    async def fail(event: Event) -> None:
        await anyio.to_thread.run_sync(work, 2e-3)
        raise ValueError("late")

    @engine.on(Events.EXCEPTION_RAISED)
    def clean_up() -> None:
        work(2e-3)

    with pytest.raises(ValueError, match="late"):
        await engine.run(range(10**6))
    statistics = engine.statistics()
    assert statistics.listeners[0].busy >= 2e-3
    assert sum(statistics.handlers.values()) >= 2e-3


@pytest.mark.slow
@both_threads
async def test_the_account_adds_up_at_any_time_from_any_thread(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    over = threading.Event()
    looked = 0

    def look() -> None:
        nonlocal looked
        while not over.is_set():
            for one in engine.statistics().listeners:
                accounted = one.handled + one.dropped + one.discarded + one.depth
                assert 0 <= one.accepted - accounted <= 1
            looked += 1

    for overflow in ("wait", "latest", "drop_oldest", "drop_new"):

        @engine.subscribe(Events.ITERATION_COMPLETED, buffer=2, overflow=overflow)
        async def slow(event: Event) -> None:
            await checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, look)
        await engine.run(range(3000))
        over.set()
    assert looked
    for one in engine.statistics().listeners:
        assert one.accepted == one.handled + one.dropped == 3000


# The lag of the event loop


@pytest.mark.every_event_loop
async def test_lag_of_the_event_loop_is_seen_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step runs on the worker, so that nothing else says that the event loop is blocked."""
    monkeypatch.setattr(LagTimer, "PERIOD", 0.01)
    seen: list[float] = []
    has_looked = threading.Event()

    def look(engine: Engine[int, None], batch: int) -> None:
        """Iterate until the event loop is late, and then until it has been free again."""
        seen.append(engine.statistics().event_loop_lag)
        if seen[-1] > 0.05:
            has_looked.set()
        if has_looked.is_set() and seen[-1] < 0.05:
            engine.terminate()

    engine: Engine[int, None] = Engine(look)

    @engine.subscribe(Events.STARTED)
    async def block(_: Event) -> None:
        assert has_looked.wait(60)  # on the event loop's thread

    assert engine.statistics().event_loop_lag == 0
    await engine.run(count())
    assert max(seen) > 0.05
    assert 0 <= engine.statistics().event_loop_lag < 60


def test_without_an_event_loop_there_is_no_lag() -> None:
    engine = Engine(step)
    engine.run_sync([1, 2])
    assert engine.statistics().event_loop_lag == 0


@pytest.mark.parametrize(("runs", "expected"), [(1, 1), (4, 3), (100, 34), (1000, 34)])
def test_where_many_runs_take_turns_each_is_timed_less_often(
    runs: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn of all takes long, and the step of each is a short part of it."""
    now = 0.0
    monkeypatch.setattr("aengine.statistics.perf_counter", lambda: now)
    watch = Stopwatch()
    watch.read(0)
    watch.runs = runs
    now += 3e-3  # one turn of all
    watch.read(1)
    assert watch.next_reading - 1 == expected
    assert watch.weight == 1

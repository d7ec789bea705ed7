"""The timer measures between its events, and stops with the run. The clock is the tests' own."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from support.ignite import ignite
from support.record import AnyEngine, Boom
from support.ways_to_end import cancel, fail, run_without_data, terminate

import aengine.handlers.timer
import aengine.statistics
from aengine import Engine, Events, StopReason
from aengine.handlers import Timer

THREADS = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


class Clock:
    """Advances only when a test sets it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> Callable[[], None]:
        """Return a handler that takes so long."""

        def act() -> None:
            self.now += seconds

        return act

    def step(self, engine: AnyEngine, batch: Any) -> None:
        self.now += 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (aengine.handlers.timer, aengine.statistics, ignite.handlers.timing):
        monkeypatch.setattr(module, "perf_counter", clock)
    return clock


def stepping(clock: Clock, *, thread: bool = True) -> AnyEngine:
    """Return an engine whose fetches, steps and validation take 10, 1 and 100 seconds."""
    engine: AnyEngine = Engine(clock.step, thread=thread)
    engine.add_event_handler(Events.GET_BATCH_STARTED, clock.passes(10))
    return engine


@THREADS
async def test_time_of_an_epoch_is_without_the_validation_after_it(clock: Clock, *, thread: bool) -> None:
    engine = stepping(clock, thread=thread)
    timer = Timer(average=True)
    timer.attach(engine, resume=Events.EPOCH_STARTED, pause=Events.EPOCH_COMPLETED, step=Events.EPOCH_COMPLETED)
    engine.add_event_handler(Events.EPOCH_COMPLETED, clock.passes(100))
    await engine.run([1, 2, 3], max_epochs=2)
    assert (timer.value(), timer.total, timer.step_count, timer.is_running) == (33.0, 66.0, 2, False)


async def test_time_of_a_batch_is_that_from_its_step_to_its_end(clock: Clock) -> None:
    engine = stepping(clock)
    engine.add_event_handler(Events.STARTED, clock.passes(1000))
    timer = Timer(average=True)
    timer.attach(
        engine, resume=Events.ITERATION_STARTED, pause=Events.ITERATION_COMPLETED, step=Events.ITERATION_COMPLETED
    )
    await engine.run([1, 2, 3])
    assert timer.value() == 1.0


async def test_time_of_a_run_is_its_default_and_begins_anew_with_each(clock: Clock) -> None:
    engine = stepping(clock)
    timer = Timer()
    timer.attach(engine)
    seen: list[float] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(timer.value()))
    for _ in range(2):
        await engine.run([1, 2])
        clock.now += 5
        assert timer.value() == 22.0
    assert seen == [11.0, 22.0] * 2


@pytest.mark.parametrize(
    "events",
    [
        {},
        {"resume": "EPOCH_STARTED", "pause": "EPOCH_COMPLETED", "step": "EPOCH_COMPLETED"},
        {
            "start": "EPOCH_STARTED",
            "pause": "ITERATION_COMPLETED",
            "resume": "GET_BATCH_STARTED",
            "step": "ITERATION_STARTED",
        },
    ],
    ids=["run", "epochs", "batches"],
)
@pytest.mark.parametrize("average", [False, True], ids=["total", "average"])
def test_it_measures_what_pytorch_ignites_does(clock: Clock, events: dict[str, str], *, average: bool) -> None:
    """Where nothing passes between its start and the first resumption: see its docstring."""
    values: list[float] = []
    sides: list[tuple[Any, Any]] = [
        (Timer, Engine(clock.step)),
        (ignite.handlers.Timer, ignite.engine.Engine(clock.step)),  # type: ignore[arg-type]  # it takes any engine
    ]
    for make, engine in sides:
        kind: Any = Events if isinstance(engine, Engine) else ignite.engine.Events
        engine.add_event_handler(kind.GET_BATCH_COMPLETED, clock.passes(10))
        engine.add_event_handler(kind.EPOCH_COMPLETED, clock.passes(100))
        timer = make(average=average)
        timer.attach(engine, **{role: kind[name] for role, name in events.items()})
        (engine.run_sync if isinstance(engine, Engine) else engine.run)([1, 2, 3], max_epochs=2)
        clock.now += 7
        values.append(timer.value())
    assert values[0] == values[1] > 0


def test_block_is_a_step(clock: Clock) -> None:
    timer = Timer(average=True)
    for seconds in (1, 3):
        with timer:
            clock.now += seconds
        clock.now += 50
    assert (timer.value(), timer.total) == (2.0, 4.0)
    with suppress(Boom), timer:
        clock.now += 5
        raise Boom
    assert (timer.total, timer.is_running) == (9.0, False)
    timer.reset()
    assert (timer.value(), timer.step_count) == (0.0, 0)


def test_it_can_be_resumed_and_paused_twice(clock: Clock) -> None:
    timer = Timer()
    timer.pause()
    for _ in range(2):
        timer.resume()
        clock.now += 1
    assert timer.is_running
    for _ in range(2):
        timer.pause()
        clock.now += 1
    assert timer.value() == 2.0


# All ways out


@pytest.mark.parametrize(
    ("end", "seconds"),
    [(fail, 21.0), (terminate, 21.0), (cancel, 21.0), (run_without_data, 10.0)],
    ids=lambda way: getattr(way, "__name__", ""),
)
@THREADS
async def test_it_stops_with_the_run(clock: Clock, end: Any, seconds: float, *, thread: bool) -> None:
    engine = stepping(clock, thread=thread)
    timer = Timer()
    timer.attach(engine)
    await end(engine)
    clock.now += 1000
    assert timer.value() == seconds


@pytest.mark.parametrize("reads", [False, True], ids=["silent", "read-meanwhile"])
async def test_time_between_an_interrupted_run_and_its_continuation_does_not_count(
    clock: Clock, *, reads: bool
) -> None:
    engine = stepping(clock)
    timer = Timer()
    timer.attach(engine)
    engine.add_event_handler(Events.ITERATION_STARTED(once=2), engine.interrupt)
    engine.add_event_handler(Events.INTERRUPT, clock.passes(3))
    await engine.run([1, 2, 3])
    assert engine.state.stop_reason is StopReason.INTERRUPTED
    clock.now += 1000
    if reads:
        assert (timer.value(), timer.is_running) == (21.0, False)
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: seen.append(timer.value()))
    seen: list[float] = []
    await engine.run()
    assert timer.value() == 33.0
    assert seen == ([22.0] if reads else [])


async def test_timer_that_stood_when_the_run_was_interrupted_stands_still_when_it_continues(clock: Clock) -> None:
    engine = stepping(clock)
    timer = Timer()
    timer.attach(engine, resume=Events.ITERATION_STARTED, pause=Events.ITERATION_COMPLETED)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    await engine.run([1, 2, 3])
    clock.now += 1000
    await engine.run()
    assert timer.value() == 3.0


@THREADS
async def test_removed_during_a_run_it_stops_and_keeps_what_it_has_measured(clock: Clock, *, thread: bool) -> None:
    engine = stepping(clock, thread=thread)
    timer = Timer()
    handle = timer.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), handle.remove)
    await engine.run([1, 2, 3, 4])
    assert (timer.value(), timer.is_running) == (22.0, False)
    timer.attach(other := stepping(clock, thread=thread))
    await other.run([1])
    assert timer.value() == 11.0


def test_it_is_attached_once() -> None:
    timer = Timer()
    timer.attach(Engine(lambda engine, batch: None))
    with pytest.raises(RuntimeError, match="make another one"):
        timer.attach(Engine(lambda engine, batch: None))
    with pytest.raises(ValueError, match="has no event 'STEPPED'"):
        Timer().attach(Engine(lambda engine, batch: None), step="STEPPED")

"""Time limits end a run before its next step. The clock is the tests' own."""

from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from support.record import AnyEngine

import aengine.handlers.time_limit
from aengine import Engine, Events, StopReason
from aengine.handlers import Deadline, TimeLimit


class Clock:
    """Advances by a second in each step."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def step(self, engine: AnyEngine, batch: int) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(aengine.handlers.time_limit, "perf_counter", clock)
    return clock


@pytest.mark.parametrize("limit", [3, 2.5, timedelta(seconds=3)], ids=str)
@pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
async def test_run_ends_when_its_time_is_up(clock: Clock, limit: Any, thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    engine: AnyEngine = Engine(clock.step, thread=thread)
    TimeLimit(limit).attach(engine)
    state = await engine.run(count())
    assert (state.iteration, state.stop_reason) == (3, StopReason.TERMINATED)


async def test_run_that_continues_has_as_much_time_again(clock: Clock) -> None:
    engine: AnyEngine = Engine(clock.step)
    TimeLimit(3).attach(engine)
    await engine.run(range(100))
    clock.now += 1000
    state = await engine.run(range(100))
    assert state.iteration == 6


async def test_time_of_an_engine_that_it_was_removed_from_is_not_that_of_the_next(clock: Clock) -> None:
    limit = TimeLimit(3)
    first: AnyEngine = Engine(clock.step)
    handle = limit.attach(first)
    first.add_event_handler(Events.ITERATION_COMPLETED(once=2), handle.remove)
    assert (await first.run(range(9))).iteration == 9
    second: AnyEngine = Engine(clock.step)
    with second.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: limit.attach(second)):
        state = await second.run(range(9))
    assert state.iteration == 9, "the run under way is not limited"
    assert (await second.run(range(9))).iteration == 3


async def test_run_ends_at_its_deadline(clock: Clock) -> None:
    engine: AnyEngine = Engine(clock.step)
    Deadline(datetime.now(UTC) + timedelta(hours=1)).attach(engine)
    engine.add_event_handler(Events.ITERATION_STARTED(once=5), lambda: setattr(clock, "now", clock.now + 3600))
    state = await engine.run(count())
    assert (state.iteration, state.stop_reason) == (5, StopReason.TERMINATED)


async def test_run_that_starts_after_its_deadline_does_no_step() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    Deadline(datetime.now(UTC) - timedelta(seconds=1)).attach(engine)
    state = await engine.run(count())
    assert (state.iteration, state.stop_reason) == (0, StopReason.TERMINATED)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: TimeLimit(0), ValueError, "more than 0 seconds, such as 3600.0; got 0"),
        (lambda: TimeLimit(timedelta(seconds=-1)), ValueError, "more than 0 seconds, such as 3600.0; got -1.0"),
        (lambda: TimeLimit(float("nan")), ValueError, "more than 0 seconds, such as 3600.0; got nan"),
        (lambda: TimeLimit("8h"), TypeError, "a number of seconds, such as 3600.0, or a timedelta; got '8h'"),  # type: ignore[arg-type]
        (lambda: Deadline(3600), TypeError, "is a datetime, got 3600; TimeLimit takes seconds"),  # type: ignore[arg-type]
        (lambda: Deadline(datetime(2030, 1, 1)), ValueError, r"has a time zone, .*moment\.astimezone\(\)"),  # noqa: DTZ001 -- the mistake
    ],
    ids=["zero", "negative", "nan", "text", "seconds", "naive"],
)
def test_what_is_no_time_is_refused(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()

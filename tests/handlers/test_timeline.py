"""A Timeline has equally spaced samples of a run of any length."""

import gc
import time
import weakref
from itertools import pairwise
from typing import Any, TypeAlias

import pytest

from aengine import Engine, Events
from aengine.handlers import Timeline

AnyEngine: TypeAlias = Engine[Any, Any]

SLOW = 4e-3


def rest() -> None:
    """Take time, which is the very thing that is recorded here."""
    time.sleep(SLOW)


def step(engine: AnyEngine, batch: int) -> int:
    return batch


@pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
async def test_a_run_of_any_length_has_as_many_samples(thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    engine: AnyEngine = Engine(step, thread=thread)
    timeline = Timeline(limit=50)
    timeline.attach(engine)
    await engine.run(range(1000), max_epochs=10)
    first, *between, last = timeline.samples
    assert (first.iteration, first.total) == (0, 0.0)
    assert 25 <= len(between) <= 51
    apart = {after.iteration - before.iteration for before, after in pairwise((first, *between))}
    assert apart == {256}  # 10,000 / 256 = 39; so the last of them were taken once in 256 iterations
    assert (last.iteration, last.epoch) == (10_000, 10)
    for before, after in pairwise(timeline.samples):
        assert all(was <= now for was, now in zip(before, after, strict=True))


async def test_samples_begin_anew_with_each_run_and_after_an_interruption() -> None:
    engine: AnyEngine = Engine(step)
    timeline = Timeline(limit=10)
    timeline.attach(engine)
    assert not timeline.samples
    await engine.run(range(100))
    await engine.run(range(5), max_epochs=1)
    assert [one.iteration for one in timeline.samples] == [0, 1, 2, 3, 4, 5, 5]
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    await engine.run(range(4), max_epochs=1)
    assert [one.iteration for one in timeline.samples] == [0, 1, 2, 2]
    await engine.run()
    assert [one.iteration for one in timeline.samples][1:] == [3, 4, 4]
    assert timeline.samples[-1].total == engine.statistics().total


async def test_time_of_a_handler_that_was_removed_stays() -> None:
    engine: AnyEngine = Engine(step)
    timeline = Timeline()
    timeline.attach(engine)
    handler = engine.add_event_handler(Events.ITERATION_COMPLETED, rest)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), handler.remove)
    await engine.run(range(20))
    assert sum(engine.statistics().handlers.values()) < SLOW
    assert timeline.samples[-1].handlers >= 4 * SLOW  # and what it took after the last sample that saw it


@pytest.mark.parametrize("limit", [1, 0, 2.5, True])
def test_limit_is_a_number_of_samples(limit: Any) -> None:
    with pytest.raises(ValueError, match=r"limit= is a whole number of samples to keep, 2 or more"):
        Timeline(limit=limit)


def test_engine_is_freed_at_once_while_its_timeline_is_kept() -> None:
    gc.disable()
    try:
        engine: AnyEngine = Engine(step, name="trainer")
        timeline = Timeline()
        handle = timeline.attach(engine)
        engine.run_sync([1, 2])
        samples = timeline.samples
        assert len(samples) == 4
        gone = weakref.ref(engine)
        del engine
        assert gone() is None
    finally:
        gc.enable()
    assert timeline.engine_name == "trainer"
    assert timeline.samples[:-1] == samples[:-1]
    assert timeline.samples[-1].iteration == 2
    handle.remove()


async def test_attached_during_a_run_it_goes_on_from_there() -> None:
    engine: AnyEngine = Engine(step)
    timeline = Timeline()
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: timeline.attach(engine))
    await engine.run(range(6))
    assert [one.iteration for one in timeline.samples] == [4, 4, 5, 6, 6]
    assert timeline.samples[-1].total == engine.statistics().total


async def test_removed_during_a_run_it_keeps_what_it_has() -> None:
    engine: AnyEngine = Engine(step)
    timeline = Timeline(limit=2)  # whose handler has been exchanged by then
    handle = timeline.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=9), handle.remove)
    await engine.run(range(20))
    seen = timeline.samples
    assert seen[-1].iteration == 9
    await engine.run(range(20))
    assert timeline.samples == seen

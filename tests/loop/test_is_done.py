"""`state.is_done`: whether the limits are reached, asked at every moment of a run and between runs."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.record import EVENTS, AnyEngine, Boom, Unsized, double, engine_that
from support.resume_cases import HERE_OR_THERE, STOPPED, STOPS, Way, run_and_stop

from aengine import Engine, State

LIMITS = pytest.mark.parametrize("limits", [{"max_epochs": 1}, {"max_epochs": 2}, {"max_iters": 3}, {"max_iters": 4}])


def test_new_engine_is_not_done() -> None:
    assert not State().is_done
    assert not Engine(double).state.is_done


@LIMITS
@pytest.mark.parametrize("again", [False, True], ids=["first run", "run after a complete one"])
def test_run_is_done_from_its_last_event_on(limits: dict[str, int], again: bool) -> None:  # noqa: FBT001 -- pytest's
    answers: list[tuple[str, bool]] = []

    def step(engine: AnyEngine, batch: int) -> None:
        answers.append(("step", engine.state.is_done))

    engine: AnyEngine = Engine(step)
    if again:
        engine.run_sync([1, 2], **limits)
        answers.clear()
    for letters, event in EVENTS.items():
        engine.add_event_handler(event, lambda engine, letters=letters: answers.append((letters, engine.state.is_done)))
    engine.run_sync([1, 2], **limits)
    *before, last = answers
    assert last == ("C", True)
    assert len(before) > 8
    assert not any(is_done for _, is_done in before)
    assert engine.state.is_done


@STOPPED
@HERE_OR_THERE
@pytest.mark.parametrize("where", ["S@0/0", "IC@1/1", "step@1/2", "EC@1/2", "ES@2/2", "IC@2/4"])
@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_iters": 4}])
def test_run_that_was_stopped_in_its_middle_is_not_done(where: str, stop: str, limit: dict[str, int], how: Way) -> None:
    data = [1, 2]
    engine = engine_that(where, STOPS[stop])
    run_and_stop(engine, data, **limit)
    assert not engine.state.is_done
    resumed = how(engine)
    assert not resumed.state.is_done
    resumed.run_sync(data)
    assert resumed.state.is_done


def test_run_of_one_epoch_that_was_terminated_in_it_is_not_done() -> None:
    answers: list[bool] = []
    engine = engine_that("IC@1/1", STOPS["terminate"])
    engine.add_event_handler(EVENTS["C"], lambda engine: answers.append(engine.state.is_done))
    engine.run_sync([1, 2, 3])
    assert answers == [False]
    assert not engine.state.is_done


@pytest.mark.parametrize("stop", ["terminate", "fail", "ctrl-c"])  # what is interrupted has its last event before it
def test_run_that_was_stopped_at_the_end_of_its_last_epoch_is_done(stop: str) -> None:
    engine = engine_that("EC@2/4", STOPS[stop])
    run_and_stop(engine, [1, 2], max_epochs=2)
    assert engine.state.is_done


@pytest.mark.parametrize("where", ["S", "IC"])
async def test_run_that_was_cancelled_is_not_done(where: str) -> None:
    engine: AnyEngine = Engine(double)
    await engine.run([1, 2])
    with anyio.CancelScope() as scope:

        @engine.on(EVENTS[where])
        async def stop() -> None:
            scope.cancel()
            await checkpoint()

        await engine.run([1, 2])
    assert scope.cancelled_caught
    assert not engine.state.is_done


@LIMITS
def test_complete_run_that_is_loaded_is_done(limits: dict[str, int]) -> None:
    engine: AnyEngine = Engine(double)
    engine.run_sync([1, 2], **limits)
    loaded: AnyEngine = Engine(double)
    loaded.load_state_dict(json.loads(json.dumps(engine.state_dict())))
    assert loaded.state.is_done


def test_state_dict_of_pytorch_ignite_is_done_at_the_end_of_its_last_epoch_only() -> None:
    engine: AnyEngine = Engine(double)
    for iteration, is_done in [(0, False), (3, False), (4, True)]:
        engine.load_state_dict({"epoch_length": 2, "max_epochs": 2, "iteration": iteration})
        assert engine.state.is_done is is_done


def test_limit_that_is_raised_or_taken_away_is_not_reached() -> None:
    engine: AnyEngine = Engine(double)
    engine.run_sync([1, 2], max_epochs=2)
    engine.state.max_epochs = 3
    assert not engine.state.is_done
    engine.state.max_epochs = None
    assert not engine.state.is_done


def one_shot(engine: AnyEngine) -> None:
    with pytest.warns(match="the data ended after 3 of"):
        engine.run_sync(iter([1, 2, 3]), max_epochs=2, epoch_length=3)


def stopped_at_once(engine: AnyEngine) -> None:
    with suppress(Boom):
        engine.run_sync(boom, epoch_length=2)


def boom() -> Iterator[int]:
    raise Boom
    yield


@pytest.mark.parametrize("run", [one_shot, stopped_at_once])
def test_run_whose_data_ended_or_failed_is_not_done(run: Callable[[AnyEngine], None]) -> None:
    engine: AnyEngine = Engine(double)
    run(engine)
    assert not engine.state.is_done


def test_run_over_data_of_unknown_length_is_done_when_it_has_ended() -> None:
    answers: list[bool] = []
    engine: AnyEngine = Engine(double)
    engine.add_event_handler(EVENTS["EC"], lambda engine: answers.append(engine.state.is_done))
    data: Any = Unsized(1, 2)
    engine.run_sync(data)
    assert answers == [False]
    assert engine.state.is_done

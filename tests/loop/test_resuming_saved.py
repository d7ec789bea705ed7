"""Resuming from dictionaries: what `state_dict()` holds and `load_state_dict()` takes, pytorch-ignite's too."""

import json
from typing import Any

import pytest
from support.record import AnyEngine, Steps, double, engine_that, place, record_steps
from support.resume_cases import HOW, SizedStateful, Way, from_state_dict, interrupt, terminate

from aengine import Engine, EventEnum, Events


class Own(EventEnum):
    HALF = "half"


def test_state_dict_is_plain_values() -> None:
    engine = engine_that("IC@2/4", terminate)
    engine.run_sync([1, 2, 3], max_epochs=2)
    saved = engine.state_dict()
    assert json.loads(json.dumps(saved)) == saved
    assert (saved["epoch_length"], saved["iteration"], saved["max_epochs"]) == (3, 4, 2)
    assert "max_iters" not in saved


def test_state_dict_of_a_run_by_iterations_has_max_iters() -> None:
    engine = engine_that("IC@2/4", terminate)
    engine.run_sync([1, 2, 3], max_iters=9)
    saved = engine.state_dict()
    assert saved["max_iters"] == 9
    assert "max_epochs" not in saved


def test_state_dict_does_not_change_when_the_run_goes_on() -> None:
    saved: list[dict[str, Any]] = []
    engine: AnyEngine = Engine(double)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda engine: saved.append(engine.state_dict()))
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=1), lambda engine: saved.append(json.loads(json.dumps(saved[0])))
    )
    engine.run_sync(SizedStateful(3), max_epochs=2)
    assert saved[0] == saved[1]


def test_state_dict_of_an_engine_that_never_ran_is_loaded_too() -> None:
    new: AnyEngine = Engine(double)
    new.load_state_dict(json.loads(json.dumps(Engine(double).state_dict())))
    assert new.run_sync([1, 2]).iteration == 2


def test_loading_the_state_of_a_done_engine_lets_it_go_on_with_more_epochs() -> None:
    engine: AnyEngine = Engine(double)
    engine.run_sync([1, 2], max_epochs=1)
    resumed = from_state_dict(engine)
    steps = record_steps(resumed)
    resumed.run_sync([1, 2], max_epochs=2)
    assert steps == [(2, 3, 1), (2, 4, 2)]


def test_state_shows_what_was_loaded_before_it_runs() -> None:
    engine = engine_that("IC@2/4", terminate)
    engine.run_sync([1, 2, 3], max_epochs=2)
    state = from_state_dict(engine).state
    assert (state.epoch, state.iteration, state.epoch_length, state.max_epochs) == (2, 4, 3, 2)


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({"iteration": 4, "epoch_length": 3, "max_epochs": 3}, [(2, 5, 2), (2, 6, 3), (3, 7, 1), (3, 8, 2), (3, 9, 3)]),
        ({"iteration": 3, "epoch_length": 3, "max_epochs": 2}, [(2, 4, 1), (2, 5, 2), (2, 6, 3)]),
        ({"epoch": 1, "epoch_length": 3, "max_epochs": 2}, [(2, 4, 1), (2, 5, 2), (2, 6, 3)]),
        ({"iteration": 0, "epoch_length": 3, "max_epochs": 1}, [(1, 1, 1), (1, 2, 2), (1, 3, 3)]),
        ({"epoch": 0, "epoch_length": 3, "max_epochs": 1}, [(1, 1, 1), (1, 2, 2), (1, 3, 3)]),
        ({"iteration": 0, "epoch_length": None, "max_epochs": 1}, [(1, 1, 1), (1, 2, 2), (1, 3, 3)]),
        ({"iteration": 2, "epoch_length": 3, "max_iters": 4}, [(1, 3, 3), (2, 4, 1)]),
        ({"epoch": 1, "epoch_length": 3, "max_iters": 4}, [(2, 4, 1)]),
    ],
    ids=str,
)
def test_dictionaries_of_ignite_are_loaded(saved: dict[str, int], expected: Steps) -> None:
    engine: AnyEngine = Engine(double)
    engine.load_state_dict(saved)
    steps = record_steps(engine)
    engine.run_sync([1, 2, 3])
    assert steps == expected


def test_dictionary_of_ignite_is_not_changed_by_loading_it() -> None:
    saved = {"epoch": 1, "epoch_length": 3, "max_epochs": 2}
    Engine(double).load_state_dict(saved)
    assert saved == {"epoch": 1, "epoch_length": 3, "max_epochs": 2}


def test_keys_of_the_user_are_saved_and_loaded() -> None:
    engine = engine_that("IC@1/1", terminate)
    engine.state_dict_user_keys.append("best")
    engine.state.best = {"loss": 0.5}
    engine.run_sync([1, 2])
    saved = json.loads(json.dumps(engine.state_dict()))
    assert saved["best"] == {"loss": 0.5}
    resumed: AnyEngine = Engine(double)
    resumed.state_dict_user_keys.append("best")
    resumed.load_state_dict(saved)
    assert resumed.state.best == {"loss": 0.5}
    assert resumed.run_sync([1, 2]).iteration == 2


@HOW
def test_counters_of_firings_go_on(how: Way) -> None:
    engine = engine_that("IC@4/4", terminate)
    engine.run_sync([1], max_epochs=9)
    resumed = how(engine)
    seen: list[str] = []
    resumed.add_event_handler(
        Events.DATALOADER_STOP_ITERATION(every=4), lambda engine: seen.append(place(engine, "4th"))
    )
    resumed.run_sync([1])
    assert seen == ["4th@5/4", "4th@9/8"]


def test_counters_of_firings_are_those_of_the_dictionary_and_no_others() -> None:
    def step(engine: AnyEngine, batch: int) -> None:
        engine.fire_event(Own.HALF)

    engine: AnyEngine = Engine(step)
    engine.register_events(*Own)
    before = json.loads(json.dumps(engine.state_dict()))
    fired: list[int] = []
    engine.add_event_handler(Own.HALF(once=2), lambda engine: fired.append(engine.state.iteration))
    engine.run_sync([1, 2, 3])
    engine.load_state_dict(before)
    engine.run_sync([1, 2, 3])
    assert fired == [2, 2]


def test_interrupted_run_is_given_up_when_another_state_is_loaded() -> None:
    engine = engine_that("IC@1/1", interrupt)
    steps = record_steps(engine)
    engine.run_sync([1, 2, 3])
    engine.load_state_dict({"iteration": 2, "epoch_length": 3, "max_epochs": 1})
    engine.run_sync([1, 2, 3])
    assert steps == [(1, 1, 1), (1, 3, 3)]

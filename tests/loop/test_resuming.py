"""Resuming: in memory and from a `state_dict` the same, wherever and however the run was stopped."""

import json
from typing import Any

import pytest
from support.record import PLAIN, AnyEngine, Boom, Steps, at, double, engine_that, record, record_steps
from support.resume_cases import (
    HERE_OR_THERE,
    HOW,
    PLACES,
    STOPPED,
    STOPS,
    WAYS,
    Way,
    fail,
    finish,
    from_state_dict,
    in_memory,
    run_and_stop,
    terminate,
    uninterrupted,
)

from aengine import Engine, Events


@HOW
@STOPPED
@pytest.mark.parametrize("where", PLACES)
def test_resumed_run_makes_the_remaining_steps(where: str, stop: str, how: Way) -> None:
    data = [1, 2]
    steps: Steps = []
    engine = engine_that(where, STOPS[stop], steps)
    run_and_stop(engine, data, max_epochs=2)
    resumed = how(engine)
    after = [] if resumed is engine else record_steps(resumed)
    finish(resumed, data)
    assert [*steps, *after] == uninterrupted(data, max_epochs=2)


@pytest.mark.parametrize("stop", ["terminate", "fail", "ctrl-c"])  # what is interrupted has more in memory
@pytest.mark.parametrize("where", PLACES)
def test_resuming_in_memory_and_from_a_state_dict_fire_the_same(where: str, stop: str) -> None:
    fired: list[list[str]] = []
    for how in WAYS:
        data = [1, 2]
        engine = engine_that(where, STOPS[stop])
        run_and_stop(engine, data, max_epochs=2)
        resumed = how(engine)
        seen = record(resumed)
        finish(resumed, data)
        fired.append(seen)
    assert fired[0] == fired[1] == fired[2]


@HOW
@pytest.mark.parametrize("where", PLACES)
def test_every_epoch_is_completed_once_however_often_the_run_was_stopped(where: str, how: Way) -> None:
    data = [1, 2]
    engine = engine_that(where, terminate)
    seen = record(engine, "EC")
    run_and_stop(engine, data, max_epochs=2)
    resumed = how(engine)
    after = [] if resumed is engine else record(resumed, "EC")
    finish(resumed, data)
    assert [*seen, *after] == ["EC@1/2", "EC@2/4"]


@HOW
@pytest.mark.parametrize("stop", ["terminate", "fail", "ctrl-c"])  # what is interrupted goes on with COMPLETED
def test_run_stopped_at_the_end_of_its_last_epoch_is_done(stop: str, how: Way) -> None:
    engine = engine_that("EC@2/4", STOPS[stop])
    run_and_stop(engine, [1, 2], max_epochs=2)
    resumed = how(engine)
    seen = record(resumed)
    resumed.run_sync([1, 2], max_epochs=2)
    # The same program, run again after its end, finds nothing left to do; an engine that is kept is used again.
    assert seen == (PLAIN if how is in_memory else ["S@2/4", "C@2/4"])


@HERE_OR_THERE
def test_run_that_is_done_goes_on_with_more_epochs(how: Way) -> None:
    engine = engine_that("EC@2/4", terminate)
    run_and_stop(engine, [1, 2], max_epochs=2)
    resumed = how(engine)
    seen = record(resumed, "S ES EC C")
    resumed.run_sync([1, 2], max_epochs=3)
    assert seen == ["S@2/4", "ES@3/4", "EC@3/6", "C@3/6"]


def test_loaded_run_that_was_done_and_is_run_twice_begins_anew_the_second_time() -> None:
    engine = engine_that("EC@2/4", terminate)
    run_and_stop(engine, [1, 2], max_epochs=2)
    resumed = from_state_dict(engine)
    resumed.run_sync([1, 2], max_epochs=2)
    seen = record(resumed)
    resumed.run_sync([1, 2], max_epochs=2)
    assert seen == PLAIN


@HOW
def test_epoch_under_way_is_finished_with_its_remaining_iterations(how: Way) -> None:
    data = [1, 2, 3]
    engine = engine_that("IC@2/4", terminate)
    run_and_stop(engine, data, max_epochs=2)
    resumed = how(engine)
    seen = record(resumed, "S ES GS IS IC EC C")
    starts: list[int] = []
    resumed.add_event_handler(Events.EPOCH_STARTED, lambda engine: starts.append(engine.state.epoch_start))
    finish(resumed, data)
    assert seen == "S@2/4 ES@2/4 GS@2/4 IS@2/5 IC@2/5 GS@2/5 IS@2/6 IC@2/6 EC@2/6 C@2/6".split()
    assert starts == [3]


@HOW
def test_run_stopped_after_the_last_step_of_an_epoch_lacks_only_its_end(how: Way) -> None:
    engine = engine_that("IC@2/4", terminate)
    run_and_stop(engine, [1, 2], max_epochs=2)
    resumed = how(engine)
    seen = record(resumed)
    finish(resumed, [1, 2])
    assert seen == ["S@2/4", "EC@2/4", "C@2/4"]


@HOW
@STOPPED
@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": 3, "epoch_length": 2},
        {"max_epochs": 3, "epoch_length": 4},
        {"max_epochs": 2, "epoch_length": 7},
        {"max_iters": 8},
        {"max_iters": 7, "epoch_length": 2},
    ],
    ids=str,
)
def test_resuming_holds_for_epochs_of_any_length(limits: dict[str, int], stop: str, how: Way) -> None:
    data = [1, 2, 3]
    whole = uninterrupted(data, **limits)
    for epoch, iteration, _ in whole[:-1]:
        for letters in ("IS", "step", "IC"):
            steps: Steps = []
            engine = engine_that(f"{letters}@{epoch}/{iteration}", STOPS[stop], steps)
            run_and_stop(engine, data, **limits)
            resumed = how(engine)
            after = [] if resumed is engine else record_steps(resumed)
            finish(resumed, data)
            assert [*steps, *after] == whole, f"{letters}@{epoch}/{iteration}"


def test_run_can_be_stopped_after_every_single_step() -> None:
    data = [1, 2, 3]
    saved: dict[str, Any] = {}
    steps: Steps = []
    for _ in range(6):
        engine: AnyEngine = Engine(double)
        one = record_steps(engine)
        if saved:
            engine.load_state_dict(saved)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: engine.terminate())
        engine.run_sync(data, max_epochs=2)
        steps += one
        saved = json.loads(json.dumps(engine.state_dict()))
    assert steps == uninterrupted(data, max_epochs=2)


@HOW
def test_failed_step_is_not_counted_and_is_made_again(how: Way) -> None:
    engine = engine_that("step@1/2", fail)
    with pytest.raises(Boom):
        engine.run_sync([1, 2, 3])
    assert engine.state_dict()["iteration"] == 1
    resumed = how(engine)
    steps = record_steps(resumed)
    finish(resumed, [1, 2, 3])
    assert steps == [(1, 2, 2), (1, 3, 3)]


def test_step_under_way_is_not_counted_and_one_that_completed_is() -> None:
    iterations: dict[str, int] = {}
    engine = engine_that("step@1/2", lambda engine: iterations.update(step=engine.state_dict()["iteration"]))
    for letters in ("GS", "GC", "IS", "IC"):
        at(
            engine,
            f"{letters}@1/{1 if letters.startswith('G') else 2}",
            lambda letters=letters: iterations.update({letters: engine.state_dict()["iteration"]}),  # type: ignore[misc]
        )
    engine.run_sync([1, 2, 3])
    assert iterations == {"GS": 1, "GC": 1, "IS": 1, "step": 1, "IC": 2}


@pytest.mark.parametrize("where", [*PLACES, "EC@2/4", "C@2/4"])
def test_state_dict_taken_anywhere_inside_a_run_resumes_after_its_last_step(where: str) -> None:
    saved: list[dict[str, Any]] = []
    data = [1, 2]
    engine = engine_that(where, lambda engine: saved.append(json.loads(json.dumps(engine.state_dict()))))
    engine.run_sync(data, max_epochs=2)
    resumed: AnyEngine = Engine(double)
    resumed.load_state_dict(saved[0])
    steps, ends = record_steps(resumed), record(resumed, "EC")
    whole = uninterrupted(data, max_epochs=2)
    done = saved[0]["iteration"]
    completed = [one for one in PLAIN[: PLAIN.index(where.replace("step", "IS")) + 1] if one.startswith("IC")]
    assert done == len(completed)
    resumed.run_sync(data)
    assert steps == whole[done:]
    passed = [one for one in PLAIN[: PLAIN.index(where.replace("step", "IS")) + 1] if one.startswith("EC")]
    assert ends == ["EC@1/2", "EC@2/4"][len(passed) :]


def test_stopped_run_may_be_given_a_later_end() -> None:
    engine = engine_that("IC@1/2", terminate)
    steps = record_steps(engine)
    engine.run_sync([1, 2, 3], max_epochs=2)
    engine.run_sync([1, 2, 3], max_epochs=3)
    assert steps == uninterrupted([1, 2, 3], max_epochs=3)


def test_stopped_run_may_be_given_an_earlier_end_that_is_yet_to_come() -> None:
    engine = engine_that("IC@2/4", terminate)
    steps = record_steps(engine)
    engine.run_sync([1, 2, 3], max_epochs=5)
    engine.run_sync([1, 2, 3], max_epochs=2)
    assert steps == uninterrupted([1, 2, 3], max_epochs=2)


@HERE_OR_THERE
def test_terminated_epoch_is_not_resumed_but_the_next_one_is(how: Way) -> None:
    data = [1, 2, 3]
    engine = engine_that("IC@1/2", lambda engine: engine.terminate_epoch())
    at(engine, "IC@2/3", engine.terminate)
    steps = record_steps(engine)
    run_and_stop(engine, data, max_epochs=3)
    resumed = how(engine)
    after = [] if resumed is engine else record_steps(resumed)
    finish(resumed, data)
    assert [(epoch, batch) for epoch, _, batch in (*steps, *after)] == [
        (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3),
    ]  # fmt: skip


def test_without_data_the_counters_go_on() -> None:
    batches: list[None] = []
    engine: AnyEngine = Engine(lambda engine, batch: batches.append(batch))
    at(engine, "IC@1/2", engine.terminate)
    engine.run_sync(max_epochs=2, epoch_length=3)
    resumed: AnyEngine = Engine(lambda engine, batch: batches.append(batch))
    resumed.load_state_dict(json.loads(json.dumps(engine.state_dict())))
    state = resumed.run_sync()
    assert len(batches) == 6
    assert (state.epoch, state.iteration) == (2, 6)

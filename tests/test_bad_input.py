"""What is refused: at the call that was wrong, saying what was expected, what came, and what to write instead."""

import math
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from support.record import AnyEngine, Unsized, at, double, engine_that, record

from aengine import Engine, EngineBusy, EventEnum, Events


def refused(error: type[Exception], *said: str) -> Any:
    """Expect this error, with all of this in its message."""
    return pytest.raises(error, check=lambda raised: all(one in str(raised) for one in said))


class Own(EventEnum):
    DONE = "done"


def yielding(engine: AnyEngine, batch: Any = None) -> Iterator[int]:
    yield 1


async def async_yielding(engine: AnyEngine, batch: Any = None) -> AsyncIterator[int]:
    yield 1


async def async_step(engine: AnyEngine, batch: int) -> int:
    return batch


# The step


@pytest.mark.parametrize("step", [None, 1, "step"])
def test_step_must_be_callable(step: Any) -> None:
    with refused(TypeError, "step", "callable", repr(step)):
        Engine(step)


def test_step_must_take_engine_and_batch() -> None:
    def step(batch: int) -> int:
        return batch

    with refused(TypeError, "step(batch: int)", "step(engine, batch)"):
        Engine(step)  # type: ignore[arg-type]  # that is what is tested
    with refused(TypeError, "step(engine, batch)"):
        Engine(lambda engine, batch, more: None)  # type: ignore[arg-type, misc]  # likewise


@pytest.mark.parametrize("step", [yielding, async_yielding])
def test_step_must_not_be_a_generator_function(step: Any) -> None:
    with refused(TypeError, step.__name__, "yield"):
        Engine(step)


@pytest.mark.parametrize("value", [None, 0, "worker"])
def test_thread_is_true_or_false(value: Any) -> None:
    with refused(TypeError, "thread=", "True", "False", repr(value)):
        Engine(double, thread=value)


@pytest.mark.parametrize("value", [None, "30", True])
def test_grace_must_be_a_number_of_seconds(value: Any) -> None:
    with refused(TypeError, "grace=", "seconds", "30.0", repr(value)):
        Engine(double, grace=value)


@pytest.mark.parametrize("value", [-5, math.nan])
def test_grace_must_not_be_negative(value: float) -> None:
    with refused(ValueError, "grace=", "0 seconds or more", repr(value)):
        Engine(double, grace=value)


async def test_grace_may_be_endless() -> None:
    engine = Engine(double, grace=math.inf)
    seen: list[int] = []
    engine.subscribe(Events.ITERATION_COMPLETED, lambda event: seen.append(event.iteration))
    await engine.run([1, 2, 3], prefetch=1)
    assert seen == [1, 2, 3]


# The data


@pytest.mark.parametrize("data", [1, object(), 0.5])
def test_data_must_be_iterable_or_make_something_iterable(data: Any) -> None:
    engine = Engine(double)
    seen = record(engine)
    with refused(TypeError, "iterable", "async iterable", "callable", repr(data)):
        engine.run_sync(data)
    assert seen == []


async def coroutine_function() -> list[int]:
    return [1]


def test_coroutine_function_is_no_data() -> None:
    with refused(TypeError, "coroutine_function", "async generator"):
        Engine(double).run_sync(coroutine_function)  # type: ignore[arg-type]  # that is what is tested


async def test_coroutine_is_no_data() -> None:
    coroutine = coroutine_function()
    with refused(TypeError, "coroutine"):
        await Engine(double).run(coroutine)  # type: ignore[arg-type]  # likewise
    coroutine.close()


def test_callable_that_makes_data_takes_no_arguments() -> None:
    def batches(count: int) -> list[int]:
        return [1] * count

    with refused(TypeError, "batches(count: int)", "without arguments", "lambda"):
        Engine(double).run_sync(batches)  # type: ignore[arg-type]  # likewise


@pytest.mark.parametrize("made", [None, 7])
def test_callable_must_make_something_iterable(made: Any) -> None:
    with refused(TypeError, repr(made), "iterable", "yield"):
        Engine(double).run_sync(lambda: made)


def test_no_data_needs_an_epoch_length() -> None:
    with refused(ValueError, "epoch_length=", "run(epoch_length=..., max_epochs=...)"):
        Engine(double).run_sync()


def test_set_data_needs_data_and_a_run() -> None:
    engine = Engine(double)
    with refused(RuntimeError, "set_data()", "run()"):
        engine.set_data([1])
    with refused(TypeError, "iterable"):
        engine.set_data(1)  # type: ignore[arg-type]  # likewise


def test_prefetch_must_be_a_number_of_batches() -> None:
    engine = Engine(double)
    with refused(ValueError, "prefetch=", "-1"):
        engine.run_sync([1, 2], prefetch=-1)
    assert engine.state.iteration == 0


# The limits


@pytest.mark.parametrize("name", ["max_epochs", "max_iters", "epoch_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_limits_must_be_whole_and_positive(name: str, value: Any) -> None:
    with refused(ValueError, f"{name}=", repr(value)):
        Engine(double).run_sync([1, 2], **{name: value})


def test_max_epochs_and_max_iters_exclude_each_other() -> None:
    with refused(ValueError, "max_epochs=", "max_iters=", "exclude"):
        Engine(double).run_sync([1, 2], max_epochs=1, max_iters=2)


def test_fewer_epochs_than_are_done_are_refused() -> None:
    engine = Engine(double)
    engine.run_sync([1, 2], max_epochs=3)
    with refused(ValueError, "max_epochs=2", "3", "engine.state.max_epochs = None"):
        engine.run_sync([1, 2], max_epochs=2)
    engine.state.max_epochs = None  # as it says
    assert engine.run_sync([1, 2], max_epochs=2).epoch == 2


def test_fewer_iterations_than_are_done_are_refused() -> None:
    engine = Engine(double)
    engine.run_sync([1, 2], max_iters=3)
    with refused(ValueError, "max_iters=2", "3", "engine.state.max_iters = None"):
        engine.run_sync([1, 2], max_iters=2)
    engine.state.max_iters = None
    assert engine.run_sync([1, 2], max_iters=2).iteration == 2


@pytest.mark.parametrize(("first", "then"), [("max_epochs", "max_iters"), ("max_iters", "max_epochs")])
def test_changing_between_epochs_and_iterations_is_refused(first: str, then: str) -> None:
    engine = Engine(double)
    engine.run_sync([1, 2], **{first: 2})
    with refused(ValueError, f"{then}=4", f"{first}=2", f"engine.state.{first} = None"):
        engine.run_sync([1, 2], **{then: 4})
    setattr(engine.state, first, None)
    engine.run_sync([1, 2], **{then: 4})
    assert getattr(engine.state, then) == 4


@pytest.mark.parametrize("stop", ["terminate", "interrupt"])
def test_another_epoch_length_for_a_run_under_way_is_refused(stop: str) -> None:
    engine = engine_that("IC@1/1", lambda engine: getattr(engine, stop)())
    data = [1, 2, 3]
    engine.run_sync(data, max_epochs=2)
    with refused(ValueError, "epoch_length=2", "3"):
        engine.run_sync(data, epoch_length=2)
    assert engine.run_sync(data, epoch_length=3).iteration == 6


def test_message_about_another_epoch_length_says_how_to_begin_anew() -> None:
    engine = engine_that("IC@1/1", lambda engine: engine.terminate())
    engine.run_sync([1, 2, 3])
    with refused(ValueError, "leave it out", "engine.state.max_epochs", "None"):
        engine.run_sync([1, 2, 3], epoch_length=2)


def test_refused_run_leaves_the_engine_as_it_was() -> None:
    engine = engine_that("IC@1/1", lambda engine: engine.terminate())
    engine.run_sync([1, 2, 3], max_epochs=2)
    before = engine.state_dict()
    wrong: list[Callable[[], object]] = [
        lambda: engine.run_sync([1, 2, 3], max_epochs=2, max_iters=3),
        lambda: engine.run_sync([1, 2, 3], max_iters=3),
        lambda: engine.run_sync([1, 2, 3], max_epochs=5, epoch_length=7),
        lambda: engine.run_sync([], max_epochs=5),
        lambda: engine.run_sync(1, max_epochs=5),  # type: ignore[arg-type]  # likewise
    ]
    for run in wrong:
        with pytest.raises((ValueError, TypeError)):
            run()
        assert engine.state_dict() == before


def test_interrupted_run_refuses_arguments_that_contradict_it() -> None:
    engine = engine_that("IC@1/1", lambda engine: engine.interrupt())
    data = [1, 2, 3]
    engine.run_sync(data, max_epochs=2)
    with refused(ValueError, "interrupted", "max_epochs=5", "2", "without arguments"):
        engine.run_sync(data, max_epochs=5)
    with refused(ValueError, "interrupted", "other data", "set_data()"):
        engine.run_sync([1, 2, 3])
    with refused(ValueError, "interrupted", "max_iters=2"):
        engine.run_sync(max_iters=2)
    assert engine.run_sync(data, max_epochs=2, epoch_length=3).iteration == 6


# Running


async def test_run_sync_inside_an_event_loop_says_to_await_run() -> None:
    engine = Engine(double)
    with refused(RuntimeError, "run_sync()", "await engine.run(...)"):
        engine.run_sync([1])
    assert engine.state.iteration == 0


def test_running_an_engine_that_runs_is_refused() -> None:
    engine = Engine(double, name="trainer")
    errors: list[EngineBusy] = []

    @engine.on(Events.ITERATION_STARTED(once=1))
    def again() -> None:
        with refused(EngineBusy, "'trainer'", "running", "one loop at a time") as raised:
            engine.run_sync([1])
        errors.append(raised.value)

    engine.run_sync([1, 2])
    assert len(errors) == 1
    assert isinstance(errors[0], RuntimeError)


async def test_awaiting_a_second_run_is_refused() -> None:
    engine = Engine(double)

    @engine.on(Events.ITERATION_STARTED(once=1))
    async def again() -> None:
        with refused(EngineBusy, "running"):
            await engine.run([1])

    await engine.run([1, 2])
    assert engine.state.iteration == 2


def test_loading_a_state_while_running_is_refused() -> None:
    engine = Engine(double)
    saved = engine.state_dict()

    @engine.on(Events.STARTED)
    def load() -> None:
        with refused(EngineBusy, "running", "before run()"):
            engine.load_state_dict(saved)

    engine.run_sync([1, 2])
    assert engine.state.iteration == 2


@pytest.mark.parametrize("where", ["S", "ES"])
def test_terminate_epoch_where_no_iteration_has_begun_is_refused(where: str) -> None:
    engine = Engine(double)
    refusals: list[int] = []

    def end() -> None:
        with refused(RuntimeError, "terminate_epoch()", "STARTED", "EPOCH_STARTED", "GET_BATCH_STARTED", "terminate()"):
            engine.terminate_epoch()
        refusals.append(1)

    at(engine, where, end)
    assert engine.run_sync([1, 2]).iteration == 2
    assert refusals == [1]


def test_terminate_epoch_that_is_not_caught_fails_the_run() -> None:
    engine = engine_that("ES", lambda engine: engine.terminate_epoch())
    seen = record(engine, "GS EXC EC C")
    with refused(RuntimeError, "terminate_epoch()"):
        engine.run_sync([1, 2])
    assert seen == ["EXC@1/0"]


# Dictionaries


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"iteration": 1, "max_epochs": 2},
        {"epoch_length": 3, "iteration": 1},
        {"epoch_length": 3, "max_epochs": 2},
        {"epoch_length": 3, "max_epochs": 2, "iteration": 1, "epoch": 1},
        {"epoch_length": 3, "max_epochs": 2, "max_iters": 2, "iteration": 1},
    ],
)
def test_dictionary_that_is_none_of_an_engine_is_refused(saved: dict[str, Any]) -> None:
    engine = Engine(double)
    before = engine.state_dict()
    with refused(
        ValueError, '"epoch_length"', '"iteration" or "epoch"', '"max_epochs" or "max_iters"', str(sorted(saved))
    ):
        engine.load_state_dict(saved)
    assert engine.state_dict() == before


@pytest.mark.parametrize("length", [None, 0])
@pytest.mark.parametrize("counter", ["iteration", "epoch"])
def test_dictionary_of_ignite_without_a_length_cannot_tell_epochs_from_iterations(
    counter: str, length: int | None
) -> None:
    with refused(ValueError, '"epoch_length"', "positive"):
        Engine(double).load_state_dict({"epoch_length": length, "max_epochs": 2, counter: 1})


def test_keys_of_the_user_must_be_there() -> None:
    engine = Engine(double)
    engine.state_dict_user_keys.append("best")
    with refused(ValueError, "state_dict_user_keys", "'best'", "engine.state"):
        engine.state_dict()
    with refused(ValueError, "state_dict_user_keys", "'best'", "'iteration'"):
        engine.load_state_dict({"epoch_length": 3, "max_epochs": 2, "iteration": 1})
    assert engine.state.iteration == 0


# The test of this file


def test_message_is_looked_at() -> None:
    with pytest.raises(AssertionError, match=re.compile("check", re.IGNORECASE)), refused(ValueError, "something else"):
        raise ValueError("what was said")


def test_unsized_data_is_not_taken_for_empty() -> None:
    assert Engine(double).run_sync(Unsized(1)).iteration == 1

"""Failing, and Ctrl-C: what is told of an error, and what comes out of `run()`. No event loop."""

from collections.abc import Callable
from typing import Any

import pytest
from support.record import (
    PLAIN,
    AnyEngine,
    Boom,
    double,
    engine_that,
    record,
    record_steps,
)

from aengine import Engine, Events, StopReason

STEPS = [f"step@{one.partition('@')[2]}" for one in PLAIN if one.startswith("IS@")]
BEFORE_COMPLETED = [*PLAIN[:-1], *STEPS]
IN_AN_EPOCH = [one for one in BEFORE_COMPLETED if one.partition("@")[0] in ("GS", "DSI", "GC", "IS", "step", "IC")]


def until(where: str) -> list[str]:
    """Return the plain run up to this place. After a stop within the step ITERATION_COMPLETED still fires."""
    return PLAIN[: PLAIN.index(where.replace("step", "IC")) + 1]


def here(where: str, *letters: str) -> list[str]:
    return [f"{one}@{where.partition('@')[2]}" for one in letters]


def raise_(error: BaseException) -> Callable[[AnyEngine], None]:
    def fail(_: AnyEngine) -> None:
        raise error

    return fail


@pytest.mark.parametrize("where", [*BEFORE_COMPLETED, "C@2/4"])
def test_error_is_told_of_once_and_comes_out_as_it_was_raised(where: str) -> None:
    boom = Boom()

    def fail(_: AnyEngine) -> None:
        raise boom

    engine = engine_that(where, fail)
    told: list[BaseException] = []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: told.append(error))
    seen = record(engine)
    with pytest.raises(Boom) as raised:
        engine.run_sync([1, 2], max_epochs=2)
    assert raised.value is boom
    assert told == [boom]
    reached = until(where.replace("step", "IS")) if where.startswith("step") else until(where)
    assert [one for one in seen if one != where] == [one for one in [*reached, *here(where, "EXC")] if one != where]
    assert engine.state.stop_reason is StopReason.FAILED


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", [*BEFORE_COMPLETED, "C@2/4"])
def test_ctrl_c_is_told_of_as_cancelled_and_goes_on(where: str, error: type[BaseException]) -> None:
    def stop(_: AnyEngine) -> None:
        raise error

    engine = engine_that(where, stop)
    seen = record(engine, "T EXC CAN C")
    with pytest.raises(error):
        engine.run_sync([1, 2], max_epochs=2)
    assert [one for one in seen if one != where] == here(where, "CAN")
    assert engine.state.stop_reason is StopReason.CANCELLED


def test_error_carries_a_note_that_says_where() -> None:
    def fail(_: AnyEngine) -> None:
        raise Boom

    engine = engine_that("step@2/3", fail)
    engine.name = "trainer"
    with pytest.raises(Boom) as raised:
        engine.run_sync([1, 2], max_epochs=2)
    assert len(raised.value.__notes__) == 1
    for said in ("the step", "epoch 2", "iteration 3"):
        assert said in raised.value.__notes__[0]

    def explode(engine: AnyEngine) -> None:
        raise Boom

    other = Engine(double, name="trainer")
    other.add_event_handler(Events.EPOCH_COMPLETED, explode)
    with pytest.raises(Boom) as raised:
        other.run_sync([1, 2], max_epochs=2)
    assert len(raised.value.__notes__) == 1
    for said in ("explode", "EPOCH_COMPLETED", "'trainer'", "epoch 1", "iteration 2"):
        assert said in raised.value.__notes__[0]


def test_error_of_the_data_says_which_data_and_which_batch() -> None:
    def broken() -> Any:
        yield 1
        raise Boom

    engine = Engine(double)
    seen = record(engine, "IC EC EXC C")
    with pytest.raises(Boom) as raised:
        engine.run_sync(broken)
    assert seen == ["IC@1/1", "EXC@1/1"]
    assert len(raised.value.__notes__) == 1
    for said in ("broken", "batch 2", "epoch 1"):
        assert said in raised.value.__notes__[0]


def test_every_handler_of_an_error_sees_it_though_one_of_them_fails() -> None:
    boom, another = Boom("the first"), Boom("in its handler")
    engine = engine_that("step@1/1", raise_(boom))
    told: list[object] = []

    def fail() -> None:
        raise another

    engine.add_event_handler(Events.EXCEPTION_RAISED, fail)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: told.append(error))
    with pytest.raises(ExceptionGroup) as raised:
        engine.run_sync([1])
    assert raised.value.exceptions == (boom, another)
    assert told == [boom]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_error_of_a_handler_of_cancelled_is_logged_where_ctrl_c_goes_on(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    boom = Boom()
    engine = engine_that("step@1/1", raise_(error()))

    @engine.on(Events.CANCELLED)
    def fail() -> None:
        raise boom

    with pytest.raises(error):
        engine.run_sync([1])
    assert boom in [record.exc_info[1] for record in caplog.records if record.exc_info]


def test_handler_of_an_error_that_raises_it_again_changes_nothing() -> None:
    boom = Boom()
    engine = engine_that("step@1/1", raise_(boom))
    told: list[BaseException] = []

    @engine.on(Events.EXCEPTION_RAISED)
    def raise_again(error: BaseException) -> None:
        told.append(error)
        raise error

    with pytest.raises(Boom) as raised:
        engine.run_sync([1])
    assert raised.value is boom
    assert told == [boom]


def test_who_wants_to_go_on_after_an_error_catches_it_and_runs_again() -> None:
    engine = engine_that("step@1/2", raise_(Boom()))
    steps = record_steps(engine)
    data = [1, 2, 3]
    with pytest.raises(Boom):
        engine.run_sync(data, max_epochs=2)
    engine.run_sync(data)
    assert steps == [(1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 4, 1), (2, 5, 2), (2, 6, 3)]


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
@pytest.mark.parametrize("where", BEFORE_COMPLETED)
def test_stop_iteration_of_a_step_or_handler_is_an_error_and_no_end_of_data(where: str, error: type[Exception]) -> None:
    stop = error("mine")
    engine = engine_that(where, raise_(stop))
    seen = record(engine, "C EXC")
    with pytest.raises(RuntimeError) as raised:
        engine.run_sync([1, 2], max_epochs=2)
    assert raised.value.__cause__ is stop
    assert error.__name__ in str(raised.value)
    assert seen == here(where, "EXC")

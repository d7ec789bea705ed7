"""Stopping, at every event there is and within the step: what is fired, and what the run leaves."""

import threading
from typing import Any

import anyio
import pytest
from support.record import (
    EVENTS,
    PLAIN,
    AnyEngine,
    Unsized,
    at,
    double,
    engine_that,
    place,
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


# Ending the run


@pytest.mark.parametrize("where", BEFORE_COMPLETED)
def test_terminate_ends_the_run_after_that_very_event(where: str) -> None:
    engine = engine_that(where, lambda engine: engine.terminate())
    seen = record(engine)
    state = engine.run_sync([1, 2], max_epochs=2)
    assert seen == [*until(where), *here(where, "T", "C")]
    assert state.stop_reason is StopReason.TERMINATED


@pytest.mark.parametrize("where", BEFORE_COMPLETED)
def test_terminate_can_skip_completed(where: str) -> None:
    engine = engine_that(where, lambda engine: engine.terminate(skip_completed=True))
    seen = record(engine)
    state = engine.run_sync([1, 2], max_epochs=2)
    assert seen == [*until(where), *here(where, "T")]
    assert state.stop_reason is StopReason.TERMINATED


def test_terminate_keeps_the_handlers_of_the_same_event_running() -> None:
    engine = engine_that("IC@1/1", lambda engine: engine.terminate())
    called: list[int] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, called.append, 1)
    engine.run_sync([1, 2])
    assert called == [1]


@pytest.mark.parametrize("where", ["T", "C"])
def test_terminate_of_a_run_that_ends_does_nothing(where: str) -> None:
    engine = engine_that("IC@1/2", lambda engine: engine.terminate())
    at(engine, where, engine.terminate)
    seen = record(engine, "T C")
    engine.run_sync([1, 2, 3])
    assert seen == ["T@1/2", "C@1/2"]


def test_last_terminate_decides_whether_completed_is_skipped() -> None:
    engine = engine_that("IS@1/1", lambda engine: (engine.terminate(skip_completed=True), engine.terminate()))
    seen = record(engine, "T C")
    engine.run_sync([1, 2])
    assert seen == ["T@1/1", "C@1/1"]


def test_terminate_without_a_run_does_nothing() -> None:
    engine = Engine(double)
    seen = record(engine)
    engine.terminate()
    engine.run_sync([1, 2], max_epochs=2)
    assert seen == PLAIN


def test_flags_show_what_was_requested_and_has_not_taken_effect() -> None:
    engine = engine_that("IC@1/1", lambda engine: engine.terminate())
    asked: list[bool] = []
    at(engine, "IC@1/1", lambda: asked.append(engine.should_terminate))
    assert not engine.should_terminate
    engine.run_sync([1, 2])
    assert asked == [True]
    assert engine.should_terminate

    def end_epoch(engine: AnyEngine) -> None:
        engine.terminate_epoch()
        asked.append(engine.should_terminate_single_epoch)

    other = engine_that("IC@1/1", end_epoch)
    other.run_sync([1, 2])
    assert asked == [True, True]
    assert not other.should_terminate_single_epoch
    assert not other.should_terminate

    def interrupt(engine: AnyEngine) -> None:
        engine.interrupt()
        asked.append(engine.should_interrupt)

    third = engine_that("IC@1/1", interrupt)
    third.run_sync([1, 2])
    assert asked == [True, True, True]
    assert not third.should_interrupt


# Ending the epoch


def after_end_of_epoch(where: str) -> list[str]:
    """Return what follows the end of an epoch in a run over two batches: the data begins again, so it never stops."""
    epoch, iteration = map(int, where.partition("@")[2].split("/"))
    rest = []
    for number in range(epoch + 1, 3):
        rest += [f"ES@{number}/{iteration}"]
        for _ in range(2):
            rest += [f"GS@{number}/{iteration}", f"GC@{number}/{iteration}"]
            iteration += 1
            rest += [f"IS@{number}/{iteration}", f"IC@{number}/{iteration}"]
        rest += [f"EC@{number}/{iteration}"]
    return [*rest, f"C@2/{iteration}"]


@pytest.mark.parametrize("where", IN_AN_EPOCH)
def test_terminate_epoch_ends_the_epoch_and_goes_on_with_the_next(where: str) -> None:
    engine = engine_that(where, lambda engine: engine.terminate_epoch())
    seen = record(engine)
    state = engine.run_sync([1, 2], max_epochs=2)
    assert seen == [*until(where), *here(where, "TSE", "EC"), *after_end_of_epoch(where)]
    assert state.stop_reason is StopReason.COMPLETED


@pytest.mark.parametrize("where", IN_AN_EPOCH)
def test_terminate_epoch_can_skip_epoch_completed(where: str) -> None:
    engine = engine_that(where, lambda engine: engine.terminate_epoch(skip_epoch_completed=True))
    seen = record(engine)
    engine.run_sync([1, 2], max_epochs=2)
    assert seen == [*until(where), *here(where, "TSE"), *after_end_of_epoch(where)]


@pytest.mark.parametrize(("length", "expected"), [(2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 3, 1])])
@pytest.mark.parametrize("letters", ["GS", "GC", "IS", "step", "IC"])
def test_terminate_epoch_restarts_the_data_from_its_beginning(letters: str, length: int, expected: list[int]) -> None:
    begun = letters in ("IS", "step", "IC")
    engine = engine_that(f"{letters}@2/{length + begun}", lambda engine: engine.terminate_epoch())
    steps = record_steps(engine)
    engine.run_sync([1, 2, 3], max_epochs=3, epoch_length=length)
    assert [batch for epoch, _, batch in steps if epoch == 3] == expected


def test_terminate_epoch_of_data_of_unknown_length_leaves_the_length_unknown() -> None:
    engine = engine_that("IC@1/1", lambda engine: engine.terminate_epoch())
    steps = record_steps(engine)
    state = engine.run_sync(Unsized(1, 2, 3), max_epochs=3)
    assert [batch for *_, batch in steps] == [1, 1, 2, 3, 1, 2, 3]
    assert state.epoch_length == 3


def test_terminate_epoch_without_data_goes_on_with_the_next() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: None)
    at(engine, "IC@1/1", engine.terminate_epoch)
    seen = record(engine, "ES EC TSE C")
    engine.run_sync(max_epochs=2, epoch_length=3)
    assert seen == ["ES@1/0", "TSE@1/1", "EC@1/1", "ES@2/1", "EC@2/4", "C@2/4"]


def test_handlers_of_a_terminated_epoch_get_its_number_of_iterations_if_they_take_it() -> None:
    counts: list[object] = []

    def take(engine: AnyEngine, iter_counter: int) -> None:
        counts.append(iter_counter)

    def take_more(engine: AnyEngine, more: str, /, **named: int) -> None:
        counts.append((more, named))

    engine = engine_that("IC@2/3", lambda engine: engine.terminate_epoch())
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, take)
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, take_more, "more")
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda: counts.append("nothing"))
    engine.run_sync([1, 2], max_epochs=2)
    assert counts == [1, ("more", {"iter_counter": 1}), "nothing"]


@pytest.mark.parametrize("where", ["TSE", "EC", "C"])
def test_terminate_epoch_of_an_epoch_that_ends_does_nothing(where: str) -> None:
    engine = engine_that("IC@1/1", lambda engine: engine.terminate_epoch())
    at(engine, where, engine.terminate_epoch)
    seen = record(engine, "TSE EC C")
    engine.run_sync([1, 2], max_epochs=2)
    assert seen == ["TSE@1/1", "EC@1/1", "EC@2/3", "C@2/3"]


def test_terminate_wins_over_terminate_epoch() -> None:
    engine = engine_that("IC@1/1", lambda engine: (engine.terminate_epoch(), engine.terminate()))
    seen = record(engine, "TSE EC T C")
    engine.run_sync([1, 2], max_epochs=2)
    assert seen == ["T@1/1", "C@1/1"]


def test_terminate_by_a_handler_of_a_terminated_epoch_lets_the_epoch_end() -> None:
    engine = engine_that("IC@1/1", lambda engine: engine.terminate_epoch())
    at(engine, "TSE", engine.terminate)
    seen = record(engine, "TSE EC T C")
    engine.run_sync([1, 2], max_epochs=2)
    assert seen == ["TSE@1/1", "EC@1/1", "T@1/1", "C@1/1"]


# Leaving the run in its middle


@pytest.mark.parametrize("where", BEFORE_COMPLETED)
def test_interrupted_run_goes_on_with_the_very_next_event(where: str) -> None:
    engine = engine_that(where, lambda engine: engine.interrupt())
    seen = record(engine)
    data = [1, 2]
    assert engine.run_sync(data, max_epochs=2).stop_reason is StopReason.INTERRUPTED
    assert seen == [*until(where), *here(where, "INT")]
    assert engine.run_sync(data, max_epochs=2).stop_reason is StopReason.COMPLETED
    assert seen == [*until(where), *here(where, "INT"), *PLAIN[len(until(where)) :]]


@pytest.mark.parametrize("where", BEFORE_COMPLETED)
def test_interrupted_run_goes_on_without_arguments(where: str) -> None:
    engine = engine_that(where, lambda engine: engine.interrupt())
    steps = record_steps(engine)
    engine.run_sync([1, 2], max_epochs=2)
    engine.run_sync()
    assert steps == [(1, 1, 1), (1, 2, 2), (2, 3, 1), (2, 4, 2)]


def test_run_can_be_interrupted_again_and_again() -> None:
    engine = Engine(double)
    engine.add_event_handler(Events.ITERATION_COMPLETED | Events.EPOCH_STARTED, engine.interrupt)
    seen = record(engine)
    stops = 0
    engine.run_sync([1, 2], max_epochs=2)
    while engine.state.stop_reason is StopReason.INTERRUPTED:
        stops += 1
        engine.run_sync()
    assert stops == 6
    assert [one for one in seen if not one.startswith("INT")] == PLAIN


@pytest.mark.parametrize("where", ["T", "C"])
def test_interrupt_of_a_run_that_ends_does_not_reach_the_next(where: str) -> None:
    engine = engine_that("IC@1/2", lambda engine: engine.terminate())
    at(engine, where, engine.interrupt)
    seen = record(engine, "INT C")
    engine.run_sync([1, 2, 3])
    engine.run_sync([1, 2, 3])
    assert seen == ["C@1/2", "C@1/3"]


def test_interrupt_that_is_requested_again_while_it_is_being_done_is_done_once() -> None:
    engine = engine_that("IC@1/1", lambda engine: engine.interrupt())
    engine.add_event_handler(Events.INTERRUPT, engine.interrupt)
    assert engine.run_sync([1, 2]).stop_reason is StopReason.INTERRUPTED
    state = engine.run_sync()
    assert (state.stop_reason, state.iteration) == (StopReason.COMPLETED, 2)


def test_terminate_wins_over_interrupt() -> None:
    engine = engine_that("IC@1/1", lambda engine: (engine.interrupt(), engine.terminate()))
    seen = record(engine, "INT T C")
    engine.run_sync([1, 2])
    assert seen == ["T@1/1", "C@1/1"]


def test_interrupt_with_terminate_epoch_comes_after_the_end_of_the_epoch() -> None:
    engine = engine_that("IC@1/1", lambda engine: (engine.interrupt(), engine.terminate_epoch()))
    seen = record(engine, "ES TSE EC INT C")
    engine.run_sync([1, 2], max_epochs=2)
    assert seen == ["ES@1/0", "TSE@1/1", "EC@1/1", "INT@1/1"]
    engine.run_sync()
    assert seen[4:] == ["ES@2/1", "EC@2/3", "C@2/3"]


def test_interrupted_engine_takes_other_requests_before_it_goes_on() -> None:
    engine = engine_that("IC@1/1", lambda engine: engine.interrupt())
    steps = record_steps(engine)
    engine.run_sync([1, 2], max_epochs=2)
    engine.set_data([7, 8])
    engine.run_sync()
    assert [batch for *_, batch in steps] == [1, 7, 8, 7]


def test_interrupted_engine_that_is_set_back_begins_anew() -> None:
    engine = engine_that("IC@1/1", lambda engine: engine.interrupt())
    engine.run_sync([1, 2], max_epochs=2)
    engine.state.max_epochs = None
    state = engine.run_sync([1, 2, 3])
    assert (state.epoch, state.iteration) == (1, 3)


def test_data_of_an_interrupted_engine_is_closed_when_the_engine_is_given_up() -> None:
    closed: list[bool] = []

    def batches() -> Any:
        try:
            yield from (1, 2, 3)
        finally:
            closed.append(True)

    engine = engine_that("IC@1/1", lambda engine: engine.interrupt())
    engine.run_sync(batches)
    assert not closed
    engine.state.max_epochs = None
    engine.run_sync([1])
    assert closed == [True]


# Pausing


def test_pause_holds_the_run_until_resume() -> None:
    engine = Engine(double)
    seen = record(engine)

    def resume() -> None:
        seen.append("resumed")
        engine.resume()

    def pause() -> None:
        engine.pause()
        threading.Thread(target=resume).start()

    at(engine, "IC@1/1", pause)
    engine.run_sync([1, 2], max_epochs=2)
    where = PLAIN.index("IC@1/1") + 1
    assert seen == [*PLAIN[:where], "resumed", *PLAIN[where:]]


def test_pause_requested_before_the_run_holds_it_after_started() -> None:
    engine = Engine(double)
    seen = record(engine, "S ES C")

    def resume() -> None:
        seen.append("resumed")
        engine.resume()

    engine.pause()
    engine.add_event_handler(Events.STARTED, lambda: threading.Thread(target=resume).start())
    engine.run_sync([1])
    assert seen == ["S@0/0", "resumed", "ES@1/0", "C@1/1"]


async def test_paused_run_can_be_cancelled() -> None:
    engine = Engine(double)
    seen = record(engine, "IC CAN T C")
    at(engine, "IC@1/1", engine.pause)
    async with anyio.create_task_group() as group, engine.stream(Events.ITERATION_COMPLETED) as events:
        group.start_soon(engine.run, [1, 2])
        await anext(events)
        await anyio.wait_all_tasks_blocked()
        assert seen == ["IC@1/1"]
        group.cancel_scope.cancel()
    assert seen == ["IC@1/1", "CAN@1/1"]
    engine.resume()
    assert (await engine.run([1, 2])).stop_reason is StopReason.COMPLETED
    assert seen == ["IC@1/1", "CAN@1/1", "IC@1/2", "C@1/2"]


def test_paused_run_can_be_terminated() -> None:
    engine = Engine(double)
    seen = record(engine, "IC T C")

    def pause() -> None:
        engine.pause()
        threading.Thread(target=engine.terminate).start()

    at(engine, "IC@1/1", pause)
    engine.run_sync([1, 2])
    assert seen == ["IC@1/1", "T@1/1", "C@1/1"]
    engine.resume()


def test_stop_reason_is_none_before_the_first_end_and_while_running() -> None:
    engine = Engine(double)
    reasons = [engine.state.stop_reason]
    engine.add_event_handler(Events.STARTED, lambda engine: reasons.append(engine.state.stop_reason))
    engine.run_sync([1])
    assert engine.state.stop_reason is StopReason.COMPLETED
    engine.run_sync([1])
    assert reasons == [None, None, None]


def test_handlers_of_completed_know_the_reason() -> None:
    engine = engine_that("IC@1/1", lambda engine: engine.terminate())
    reasons: list[object] = []
    engine.add_event_handler(Events.COMPLETED, lambda engine: reasons.append(engine.state.stop_reason))
    engine.run_sync([1, 2])
    engine.run_sync([1, 2])
    assert reasons == [StopReason.TERMINATED, StopReason.COMPLETED]


def test_places_are_those_of_the_events() -> None:
    """The table above is generated: it must hold every event of the plain run, and each step."""
    assert {one.partition("@")[0] for one in BEFORE_COMPLETED} == {*EVENTS, "step"} - {
        "T",
        "TSE",
        "INT",
        "EXC",
        "CAN",
        "C",
    }
    assert place(Engine(double), "S") == "S@0/0"

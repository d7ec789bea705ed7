"""Resuming: where each kind of data goes on, and what becomes of batches fetched and not stepped on."""

import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from functools import partial
from typing import Any

import anyio
import pytest
from support.record import AnyEngine, Boom, Steps, at, double, engine_that, record, record_steps
from support.resume_cases import (
    HERE_OR_THERE,
    KINDS,
    STOPPED,
    STOPS,
    Sized,
    SizedStateful,
    Stateful,
    Way,
    fail,
    finish,
    from_state_dict,
    numbers,
    run_and_stop,
    terminate,
)

from aengine import Engine, Events, StopReason


@HERE_OR_THERE
def test_list_is_fast_forwarded_by_fetching_and_dropping(how: Way, caplog: pytest.LogCaptureFixture) -> None:
    data = Sized(5)
    engine = engine_that("IC@1/3", terminate)
    run_and_stop(engine, data)
    resumed = how(engine)
    steps = record_steps(resumed)
    with caplog.at_level(logging.INFO, "aengine"):
        finish(resumed, data)
    assert [batch for *_, batch in steps] == [4, 5]
    assert data.fetched == [1, 2, 3, 1, 2, 3, 4, 5]
    assert len([one for one in caplog.messages if "fast-forwarded" in one and "3 batches" in one]) == 1


@HERE_OR_THERE
@pytest.mark.parametrize("where", ["IC@2/6", "EC@2/6", "ES@3/6"])
def test_data_of_a_completed_epoch_is_not_fast_forwarded_but_begun(where: str, how: Way) -> None:
    data = Sized(3)
    engine = engine_that(where, terminate)
    run_and_stop(engine, data, max_epochs=3)
    resumed = how(engine)
    seen = record(resumed, "DSI IC")
    finish(resumed, data)
    assert seen == ["DSI@3/6", "IC@3/7", "IC@3/8", "IC@3/9"]
    assert data.fetched == [1, 2, 3] * 3


@HERE_OR_THERE
@pytest.mark.parametrize("where", ["IC@1/3", "EC@1/3", "ES@2/3"])
def test_data_of_the_first_epoch_is_looked_at_for_more_than_its_length(where: str, how: Way) -> None:
    """That it ends there was not seen yet, and its type does not tell: it may give more."""
    data = Sized(3)
    engine = engine_that(where, terminate)
    run_and_stop(engine, data, max_epochs=2)
    resumed = how(engine)
    seen = record(resumed, "DSI IC")
    finish(resumed, data)
    assert seen == ["DSI@2/3", "IC@2/4", "IC@2/5", "IC@2/6"]
    assert data.fetched == [1, 2, 3] * 3


@pytest.mark.parametrize("where", ["IC@1/3", "EC@1/3", "ES@2/3"])
def test_a_list_has_the_length_that_it_says(where: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_that(where, terminate)
    run_and_stop(engine, [1, 2, 3], max_epochs=2)
    with caplog.at_level(logging.INFO, "aengine"):
        finish(from_state_dict(engine), [1, 2, 3])
    assert not [one for one in caplog.messages if "fast-forwarded" in one]


@HERE_OR_THERE
@pytest.mark.parametrize("kind", [Stateful, SizedStateful])
@pytest.mark.parametrize("letters", ["GS", "GC", "IS", "step", "IC"])
def test_data_with_a_state_is_restored_exactly(
    letters: str, kind: type[Stateful], how: Way, caplog: pytest.LogCaptureFixture
) -> None:
    data = kind(4)
    done = 2 if letters == "IC" else 1
    engine = engine_that(
        f"{letters}@1/{1 if letters in ('GS', 'GC') else 2}", STOPS["terminate" if letters != "step" else "fail"]
    )
    run_and_stop(engine, data, max_epochs=2, epoch_length=3)
    fresh = kind(4)
    resumed = how(engine)
    steps = record_steps(resumed)
    with caplog.at_level(logging.INFO, "aengine"):
        finish(resumed, fresh)
    assert [batch for *_, batch in steps] == [1, 2, 3, 4, 1, 2][done:]
    assert fresh.fetched == [1, 2, 3, 4, 1, 2][done:]
    assert any("own state" in one for one in caplog.messages)


def test_state_of_the_data_travels_with_each_batch() -> None:
    saved: list[Any] = []
    engine: AnyEngine = Engine(double)
    for event in (Events.GET_BATCH_COMPLETED, Events.ITERATION_COMPLETED):
        engine.add_event_handler(event, lambda engine: saved.append(engine.state_dict()["data"]["state"]))
    engine.run_sync(SizedStateful(3))
    assert saved == [None, {"next": 1}, {"next": 1}, {"next": 2}, {"next": 2}, {"next": 3}]


@HERE_OR_THERE
def test_stream_goes_on_where_it_is(how: Way, caplog: pytest.LogCaptureFixture) -> None:
    class Stream:
        """Iterated again, it goes on."""

        def __init__(self) -> None:
            self.next = 0

        def __iter__(self) -> Iterator[int]:
            while True:
                self.next += 1
                yield self.next

    stream = Stream()
    engine = engine_that("IC@1/2", terminate)
    run_and_stop(engine, stream, max_epochs=2, epoch_length=3)
    resumed = how(engine)
    steps = record_steps(resumed)
    with caplog.at_level(logging.INFO, "aengine"):
        finish(resumed, stream)
    assert steps == [(1, 3, 3), (2, 4, 4), (2, 5, 5), (2, 6, 6)]
    assert any("goes on where it is" in one for one in caplog.messages)


@STOPPED
@pytest.mark.parametrize("letters", ["S", "ES", "GS", "GC", "IS", "step", "IC"])
def test_one_shot_iterator_keeps_what_was_fetched_and_not_stepped_on(letters: str, stop: str) -> None:
    data = numbers(4)
    steps: Steps = []
    where = {"S": "S@0/0", "ES": "ES@1/0", "GS": "GS@1/1", "GC": "GC@1/1"}.get(letters, f"{letters}@1/2")
    engine = engine_that(where, STOPS[stop], steps)
    run_and_stop(engine, data, max_epochs=2, epoch_length=2)
    finish(engine, data)
    assert steps == [(1, 1, 1), (1, 2, 2), (2, 3, 3), (2, 4, 4)]


@pytest.mark.parametrize("letters", ["GC", "IS", "step"])
def test_one_shot_iterator_keeps_a_batch_though_it_was_stopped_twice(letters: str) -> None:
    data = numbers(3)
    engine = engine_that(f"{letters}@1/{1 if letters == 'GC' else 2}", fail)
    at(engine, "S@1/1", engine.terminate)
    steps = record_steps(engine)
    run_and_stop(engine, data, epoch_length=3)
    run_and_stop(engine, data)
    finish(engine, data)
    assert [batch for *_, batch in steps] == [1, 2, 3]


@pytest.mark.parametrize("stop", ["terminate", "interrupt", "fail"])
def test_one_shot_iterator_loses_no_batch_when_the_engine_begins_anew(stop: str) -> None:
    data = numbers(6)
    steps: Steps = []
    engine = engine_that("GC@1/1", STOPS[stop], steps)
    run_and_stop(engine, data, epoch_length=3)
    engine.state.max_epochs = None
    finish(engine, data, epoch_length=3)
    assert [batch for *_, batch in steps] == [1, 2, 3, 4]


@pytest.mark.parametrize("stop", ["terminate", "interrupt", "fail"])
def test_one_shot_iterator_loses_no_batch_when_a_state_is_loaded(stop: str) -> None:
    data = numbers(6)
    steps: Steps = []
    engine = engine_that("GC@1/1", STOPS[stop], steps)
    run_and_stop(engine, data, epoch_length=3)
    engine.load_state_dict(engine.state_dict())
    finish(engine, data)
    assert [batch for *_, batch in steps] == [1, 2, 3]


def test_other_one_shot_iterator_does_not_get_the_batches_of_the_first() -> None:
    engine = engine_that("GC@1/1", terminate)
    steps = record_steps(engine)
    run_and_stop(engine, numbers(4), epoch_length=3)
    finish(engine, iter([7, 8]))
    assert [batch for *_, batch in steps] == [1, 7, 8]


def test_one_shot_iterator_in_another_process_goes_on_where_it_is() -> None:
    engine = engine_that("IC@1/2", terminate)
    run_and_stop(engine, numbers(4), epoch_length=4)
    resumed = from_state_dict(engine)
    steps = record_steps(resumed)
    finish(resumed, iter([3, 4]))
    assert [batch for *_, batch in steps] == [3, 4]


@HERE_OR_THERE
def test_generator_function_is_fast_forwarded_once_its_length_is_known(how: Way) -> None:
    engine = engine_that("IC@2/4", terminate)
    run_and_stop(engine, lambda: numbers(3), max_epochs=2)
    resumed = how(engine)
    steps = record_steps(resumed)
    finish(resumed, lambda: numbers(3))
    assert steps == [(2, 5, 2), (2, 6, 3)]


@HERE_OR_THERE
def test_generator_function_of_unknown_length_is_called_again_with_a_warning(
    how: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be a stream: only the user knows whether it begins where it ended."""
    engine = engine_that("IC@1/2", terminate)
    run_and_stop(engine, lambda: numbers(3), epoch_length=3)
    resumed = how(engine)
    steps = record_steps(resumed)
    finish(resumed, lambda: iter([3, 4]))
    assert [batch for *_, batch in steps] == [3]
    (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert "not fast-forwarded by 2 batches" in warning.getMessage()
    assert "__len__" in warning.getMessage()


@HERE_OR_THERE
def test_generator_function_that_is_given_a_length_is_fast_forwarded(
    how: Way, caplog: pytest.LogCaptureFixture
) -> None:
    class Numbers:
        def __iter__(self) -> Iterator[int]:
            return numbers(3)

        def __len__(self) -> int:
            return 3

    engine = engine_that("IC@1/2", terminate)
    run_and_stop(engine, Numbers())
    resumed = how(engine)
    steps = record_steps(resumed)
    finish(resumed, Numbers())
    assert [batch for *_, batch in steps] == [3]
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


@HERE_OR_THERE
def test_a_stream_goes_on_without_a_warning(how: Way, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_that("IC@1/2", terminate)
    run_and_stop(engine, numbers(4), epoch_length=4)
    resumed = how(engine)
    finish(resumed, iter([3, 4]))
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_shorter_async_data_than_that_of_the_run_is_refused() -> None:
    async def batches(length: int) -> AsyncIterator[int]:
        for batch in range(length):
            yield batch

    engine = engine_that("IC@2/7", terminate)
    run_and_stop(engine, partial(batches, 4), max_epochs=2)
    with pytest.raises(ValueError, match=r"cannot resume after 3 batches.*it has only 2.*Pass the same data"):
        from_state_dict(engine).run_sync(partial(batches, 2))


def test_shorter_data_than_that_of_the_run_is_refused() -> None:
    engine = engine_that("IC@1/3", terminate)
    run_and_stop(engine, [1, 2, 3, 4])
    resumed = from_state_dict(engine)
    with pytest.raises(ValueError, match=r"cannot resume after 3 batches.*it has only 2.*Pass the same data"):
        resumed.run_sync([1, 2])


# Prefetch


class Counting:
    """Async data without a length that counts what was fetched, and goes on when it is iterated again."""

    def __init__(self) -> None:
        self.fetched = 0

    def __aiter__(self) -> "Counting":
        return self

    async def __anext__(self) -> int:
        await anyio.lowlevel.checkpoint()
        self.fetched += 1
        return self.fetched


@pytest.mark.covering(3)
@HERE_OR_THERE
@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", ["terminate", "fail"])
async def test_prefetched_batches_do_not_count_as_consumed(stop: str, kind: str, prefetch: int, how: Way) -> None:
    make = partial(KINDS[kind], 3)
    for where in ("GS@2/4", "GC@2/4", "IS@2/5", "step@2/5", "IC@2/5"):
        steps: Steps = []
        engine = engine_that(where, STOPS[stop], steps)
        data = make()
        try:
            await engine.run(data, max_epochs=3, prefetch=prefetch)
        except Boom:
            assert stop == "fail"
        assert engine.state_dict()["iteration"] == len(steps)
        resumed = how(engine)
        after = [] if resumed is engine else record_steps(resumed)
        await resumed.run(data if resumed is engine else make(), prefetch=prefetch)
        assert [batch for *_, batch in (*steps, *after)] == [1, 2, 3] * 3, where


@pytest.mark.parametrize("stop", ["terminate", "fail", "interrupt"])
@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_one_shot_iterator_keeps_what_was_prefetched(kind: str, prefetch: int, stop: str) -> None:
    data: Iterable[int] | AsyncIterator[int] = numbers(9) if kind == "sync" else Counting()
    steps: Steps = []
    engine = engine_that("step@1/2", STOPS[stop], steps)
    try:
        await engine.run(data, max_epochs=3, epoch_length=3, prefetch=prefetch)
    except Boom:
        assert stop == "fail"
    await engine.run(data, prefetch=prefetch)
    assert [batch for *_, batch in steps] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


async def test_cancelled_run_is_resumed_after_its_last_step() -> None:
    data = [1, 2, 3]
    scope = anyio.CancelScope()

    async def step(engine: AnyEngine, batch: int) -> int:
        if engine.state.iteration == 5 and not scope.cancel_called:
            scope.cancel()
            await anyio.sleep_forever()
        return 2 * batch

    engine: AnyEngine = Engine(step)
    steps, seen = record_steps(engine), record(engine, "CAN EXC C")
    with scope:
        await engine.run(data, max_epochs=2)
    assert scope.cancelled_caught
    assert engine.state.stop_reason is StopReason.CANCELLED
    assert seen == ["CAN@2/5"]
    assert engine.state_dict()["iteration"] == 4
    resumed = from_state_dict(engine)
    after = record_steps(resumed)
    await resumed.run(data)
    assert [*steps, *after] == [(1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 4, 1), (2, 5, 2), (2, 6, 3)]
    await engine.run(data)
    assert steps == [(1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 4, 1), (2, 5, 2), (2, 6, 3)]

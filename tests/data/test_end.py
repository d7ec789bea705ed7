"""Data that ends: empty, early, in the middle of an epoch, and what is never taken for its end. No event loop."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.record import AnyEngine, Boom, Unsized, at, double, engine_that, record, record_steps

from aengine import DataExhausted, DataExhaustedWarning, Engine, Events, StopReason


def numbers(count: int) -> Iterator[int]:
    yield from range(1, count + 1)


class Ticket:
    """An iterator written in Python: its `__iter__` may make it begin again. This one does not."""

    def __init__(self, count: int) -> None:
        self.remaining = count
        self.taken = 0

    def __iter__(self) -> "Ticket":
        return self

    def __next__(self) -> int:
        if not self.remaining:
            raise StopIteration
        self.remaining -= 1
        self.taken += 1
        return self.taken


class Nothing:
    def __iter__(self) -> Iterator[int]:
        return iter(())


# Empty


def test_data_of_length_zero_is_refused_before_anything_is_fired() -> None:
    engine = Engine(double)
    seen = record(engine)
    with pytest.raises(ValueError, match="length 0"):
        engine.run_sync([])
    assert seen == []
    assert engine.run_sync([1]).iteration == 1


@pytest.mark.parametrize("epoch_length", [None, 3])
@pytest.mark.parametrize(
    "data", [Nothing(), lambda: iter(()), Ticket(0), iter(())], ids=["iterable", "callable", "iterator", "one-shot"]
)
def test_data_that_turns_out_to_be_empty_is_refused_and_nothing_is_fired_after(
    data: Any, epoch_length: int | None
) -> None:
    engine = Engine(double)
    seen = record(engine)
    with pytest.raises(DataExhausted, match="empty") as raised:
        engine.run_sync(data, max_epochs=2, epoch_length=epoch_length)
    assert isinstance(raised.value, ValueError)
    assert seen == ["S@0/0", "ES@1/0", "GS@1/0"]
    assert engine.state.stop_reason is StopReason.FAILED


def test_engine_that_refused_empty_data_runs_with_other_data() -> None:
    engine = Engine(double)
    with pytest.raises(DataExhausted):
        engine.run_sync(iter(()), max_epochs=2)
    steps = record_steps(engine)
    engine.run_sync([1, 2], max_epochs=2)
    assert steps == [(1, 1, 1), (1, 2, 2), (2, 3, 1), (2, 4, 2)]


# Early


@pytest.mark.parametrize("make", [numbers, Ticket], ids=["generator", "iterator"])
def test_one_shot_iterator_that_is_long_enough_ends_without_a_warning(make: Callable[[int], Iterable[int]]) -> None:
    engine = Engine(double)
    seen = record(engine, "EC C")
    state = engine.run_sync(make(4), max_epochs=2, epoch_length=2)
    assert seen == ["EC@1/2", "EC@2/4", "C@2/4"]
    assert state.stop_reason is StopReason.COMPLETED


def test_one_shot_iterator_of_unknown_length_is_one_epoch() -> None:
    engine = Engine(double)
    seen = record(engine, "ES EC DSI C")
    state = engine.run_sync(numbers(3))
    assert seen == ["ES@1/0", "EC@1/3", "C@1/3"]
    assert (state.epoch_length, state.stop_reason) == (3, StopReason.COMPLETED)


def test_one_shot_iterator_that_ends_inside_an_epoch_completes_it_and_the_run() -> None:
    engine = Engine(double)
    seen = record(engine, "ES IC EC T C EXC")
    with pytest.warns(DataExhaustedWarning) as warned:
        state = engine.run_sync(numbers(3), max_epochs=3, epoch_length=2)
    assert seen == ["ES@1/0", "IC@1/1", "IC@1/2", "EC@1/2", "ES@2/2", "IC@2/3", "EC@2/3", "C@2/3"]
    assert state.stop_reason is StopReason.DATA_EXHAUSTED
    assert len(warned) == 1
    for said in ("3 of 6 iterations", "epoch_length=", "function"):
        assert said in str(warned[0].message)


def test_one_shot_iterator_that_ends_with_an_epoch_begins_no_other() -> None:
    engine = Engine(double)
    seen = record(engine, "ES EC C")
    with pytest.warns(DataExhaustedWarning, match="4 of 10"):
        state = engine.run_sync(numbers(4), max_epochs=5, epoch_length=2)
    assert seen == ["ES@1/0", "EC@1/2", "ES@2/2", "EC@2/4", "C@2/4"]
    assert state.epoch == 2


def test_one_shot_iterator_of_unknown_length_begins_no_second_epoch() -> None:
    engine = Engine(double)
    seen = record(engine, "ES EC C")
    with pytest.warns(DataExhaustedWarning, match="2 of 6"):
        state = engine.run_sync(numbers(2), max_epochs=3)
    assert seen == ["ES@1/0", "EC@1/2", "C@1/2"]
    assert (state.epoch, state.stop_reason) == (1, StopReason.DATA_EXHAUSTED)


def test_restart_that_yields_nothing_is_no_epoch() -> None:
    """Only a fetch shows it, so the epoch is begun; it is not counted, and not completed."""
    engine = Engine(double)
    seen = record(engine, "IC EC C")
    with pytest.warns(DataExhaustedWarning, match="2 of 6"):
        state = engine.run_sync(Ticket(2), max_epochs=3)
    assert seen == ["IC@1/1", "IC@1/2", "EC@1/2", "C@1/2"]
    assert (state.epoch, state.iteration, state.stop_reason) == (1, 2, StopReason.DATA_EXHAUSTED)


def test_restart_that_yields_nothing_inside_an_epoch_completes_it() -> None:
    engine = Engine(double)
    seen = record(engine, "IC DSI EC C")
    with pytest.warns(DataExhaustedWarning, match="2 of 3"):
        engine.run_sync(Ticket(2), max_epochs=1, epoch_length=3)
    assert seen == ["IC@1/1", "IC@1/2", "DSI@1/2", "EC@1/2", "C@1/2"]


def test_data_that_ends_before_max_iters_says_how_many_ran() -> None:
    engine = Engine(double)
    seen = record(engine, "EC T C")
    with pytest.warns(DataExhaustedWarning, match="3 of 5"):
        engine.run_sync(numbers(3), max_iters=5, epoch_length=2)
    assert seen == ["EC@1/2", "EC@2/3", "C@2/3"]


@pytest.mark.parametrize(
    ("count", "limits"),
    [
        (3, {"max_epochs": 1, "epoch_length": 5}),
        (3, {"max_epochs": 3, "epoch_length": 2}),
        (4, {"max_epochs": 2, "epoch_length": 3}),
        (5, {"max_epochs": 2, "epoch_length": 4}),
        (4, {"max_epochs": 5, "epoch_length": 2}),
        (3, {"max_iters": 5, "epoch_length": 2}),
        (3, {"max_iters": 5}),
    ],
)
def test_advice_of_the_warning_is_good(count: int, limits: dict[str, int]) -> None:
    """What it says to pass, passed with the same data, warns no more."""
    with pytest.warns(DataExhaustedWarning) as warned:
        Engine(double).run_sync(numbers(count), **limits)
    advised = re.findall(r"\b(epoch_length|max_epochs|max_iters)=(\d+)", str(warned[0].message))
    assert advised or count < limits["max_epochs"]  # of those no epoch would have a batch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, value in advised:
            Engine(double).run_sync(numbers(count), **{**limits, name: int(value)})
        Engine(double).run_sync(lambda: numbers(count), **limits)


def test_run_stopped_where_data_that_cannot_be_restarted_has_ended_ends_cleanly_when_it_goes_on() -> None:
    engine = engine_that("ES@2/2", lambda engine: engine.terminate())
    seen = record(engine, "IC EC C")
    data = Ticket(2)
    engine.run_sync(data, max_epochs=3)
    with pytest.warns(DataExhaustedWarning, match="2 of 6"):
        engine.run_sync(data)
    assert seen == ["IC@1/1", "IC@1/2", "EC@1/2", "C@2/2", "C@1/2"]


def test_exhausted_run_is_resumed_with_data_that_has_more() -> None:
    engine = Engine(double)
    steps = record_steps(engine)
    with pytest.warns(DataExhaustedWarning):
        engine.run_sync(numbers(3), max_epochs=2, epoch_length=2)
    engine.run_sync(iter([7, 8]))
    assert [batch for *_, batch in steps] in ([1, 2, 3, 7], [1, 2, 3, 7, 8])
    assert engine.state.stop_reason is StopReason.COMPLETED


def test_exhausted_iterator_that_is_asked_for_more_says_what_to_pass() -> None:
    engine = Engine(double)
    data = numbers(2)
    engine.run_sync(data)
    with pytest.raises(DataExhausted, match="one-shot iterator") as raised:
        engine.run_sync(data)
    assert "function" in str(raised.value)


# Other data at its end


@pytest.mark.parametrize("epoch_length", [None, 2, 3, 5])
@pytest.mark.parametrize("make", [numbers, lambda count: [*range(1, count + 1)]], ids=["one-shot", "list"])
def test_handler_of_the_end_of_one_shot_data_may_set_other_data(
    make: Callable[[int], Any], epoch_length: int | None
) -> None:
    engine = Engine(double)
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda: engine.set_data(make(3)))
    steps = record_steps(engine)
    state = engine.run_sync(numbers(3), max_epochs=4, epoch_length=epoch_length)
    iterations = 4 * (epoch_length or 3)
    assert [batch for *_, batch in steps] == [n % 3 + 1 for n in range(iterations)]
    assert [epoch for epoch, *_ in steps] == [n // (epoch_length or 3) + 1 for n in range(iterations)]
    assert (state.epoch, state.iteration, state.stop_reason) == (4, iterations, StopReason.COMPLETED)


def test_end_of_one_shot_data_is_fired_once_for_each_time_and_before_the_epoch_that_needs_more() -> None:
    engine = Engine(double)
    once = [numbers(2)]

    @engine.on(Events.DATALOADER_STOP_ITERATION)
    def add() -> None:
        if once:
            engine.set_data(once.pop())

    seen = record(engine, "ES DSI EC C")
    with pytest.warns(DataExhaustedWarning, match="4 of 6"):
        state = engine.run_sync(numbers(2), max_epochs=3)
    assert seen == ["ES@1/0", "EC@1/2", "DSI@1/2", "ES@2/2", "EC@2/4", "DSI@2/4", "C@2/4"]
    assert state.stop_reason is StopReason.DATA_EXHAUSTED


@pytest.mark.parametrize("epoch_length", [2, 3])
@pytest.mark.parametrize("empty", [lambda: numbers(0), lambda: iter(()), list], ids=["generator", "iterator", "list"])
def test_empty_data_that_is_set_at_the_end_of_one_shot_data_ends_the_run(
    empty: Callable[[], Any], epoch_length: int
) -> None:
    engine = Engine(double)
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda: engine.set_data(empty()))
    with pytest.warns(DataExhaustedWarning, match="2 of"):
        state = engine.run_sync(numbers(2), max_epochs=2, epoch_length=epoch_length)
    assert (state.epoch, state.iteration, state.stop_reason) == (1, 2, StopReason.DATA_EXHAUSTED)


@pytest.mark.parametrize("epoch_length", [2, 3])
@pytest.mark.parametrize("call", [Engine.terminate, Engine.interrupt])
def test_run_may_be_ended_at_the_end_of_one_shot_data(call: Callable[[AnyEngine], bool], epoch_length: int) -> None:
    engine = Engine(double)
    end = engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda: call(engine))
    state = engine.run_sync(numbers(2), max_epochs=2, epoch_length=epoch_length)
    assert state.iteration == 2
    assert state.stop_reason is (StopReason.TERMINATED if call is Engine.terminate else StopReason.INTERRUPTED)
    end.remove()
    if call is Engine.interrupt:
        with pytest.warns(DataExhaustedWarning):
            assert engine.run_sync().stop_reason is StopReason.DATA_EXHAUSTED


def test_assigning_the_data_of_the_state_says_what_to_call() -> None:
    engine = Engine(double)
    engine.add_event_handler(
        Events.DATALOADER_STOP_ITERATION,
        lambda: setattr(engine.state, "dataloader", numbers(2)),
    )
    with pytest.raises(AttributeError, match=r"engine\.set_data\(data\)"):
        engine.run_sync(numbers(2), max_epochs=2)
    assert engine.state.iteration == 2


# Restarted


def test_function_that_makes_an_iterator_is_called_for_each_pass() -> None:
    made: list[int] = []

    def batches() -> Iterator[int]:
        made.append(1)
        yield from (1, 2)

    engine = Engine(double)
    steps = record_steps(engine)
    state = engine.run_sync(batches, max_epochs=3)
    assert [batch for *_, batch in steps] == [1, 2] * 3
    assert (len(made), state.epoch_length) == (3, 2)


def test_iterator_that_begins_again_is_restarted() -> None:
    class Again(Ticket):
        def __iter__(self) -> "Again":
            self.remaining, self.taken = 2, 0
            return self

    engine = Engine(double)
    steps = record_steps(engine)
    engine.run_sync(Again(2), max_epochs=2)
    assert [batch for *_, batch in steps] == [1, 2, 1, 2]


def test_sequence_without_iter_is_data_too() -> None:
    class Sequence:
        def __getitem__(self, index: int) -> int:
            return [1, 2][index]

    engine = Engine(double)
    steps = record_steps(engine)
    engine.run_sync(Sequence(), max_epochs=2)
    assert [batch for *_, batch in steps] == [1, 2, 1, 2]


def test_len_that_raises_is_no_length() -> None:
    class Loader(Unsized):
        def __len__(self) -> int:
            raise TypeError("an iterable dataset has no length")

    assert Engine(double).run_sync(Loader(1, 2), max_epochs=2).epoch_length == 2


def test_data_that_is_shorter_than_its_length_is_restarted_inside_the_epoch() -> None:
    class Boaster(Unsized):
        def __len__(self) -> int:
            return 3

    engine = Engine(double)
    steps = record_steps(engine)
    engine.run_sync(Boaster(1, 2))
    assert [batch for *_, batch in steps] == [1, 2, 1]


def test_batch_may_be_none_or_false() -> None:
    batches: list[Any] = []
    engine: AnyEngine = Engine(lambda engine, batch: batches.append(batch))
    engine.run_sync([None, False, 0, ()], max_epochs=2, epoch_length=3)
    assert batches == [None, False, 0, (), None, False]


# Terminated epochs of what cannot be restarted


@pytest.mark.parametrize("letters", ["GS", "GC", "IS", "step", "IC"])
def test_terminated_epoch_of_a_one_shot_iterator_loses_no_batch_that_was_not_stepped_on(letters: str) -> None:
    where = f"{letters}@1/{1 if letters in ('GS', 'GC') else 2}"
    engine = engine_that(where, lambda engine: engine.terminate_epoch())
    steps = record_steps(engine)
    engine.run_sync(numbers(6), max_epochs=3, epoch_length=2)
    assert [batch for *_, batch in steps] == [1, 2, 3, 4, 5, 6][: len(steps)]
    assert len(steps) == (5 if letters in ("GS", "GC", "IS") else 6)


@pytest.mark.parametrize("letters", ["GS", "GC", "IS", "step", "IC"])
def test_run_terminated_at_the_end_of_a_terminated_epoch_repeats_no_batch(letters: str) -> None:
    where = f"{letters}@1/{1 if letters in ('GS', 'GC') else 2}"
    engine = engine_that(where, lambda engine: engine.terminate_epoch())
    at(engine, "EC", engine.terminate)
    steps = record_steps(engine)
    data = numbers(6)
    engine.run_sync(data, max_epochs=3, epoch_length=2)
    engine.run_sync(data)
    assert [batch for *_, batch in steps] == [1, 2, 3, 4, 5, 6][: len(steps)]


@pytest.mark.parametrize("letters", ["GS", "GC", "IS", "step", "IC"])
def test_run_terminated_at_the_end_of_a_terminated_epoch_begins_the_data_again(letters: str) -> None:
    where = f"{letters}@1/{1 if letters in ('GS', 'GC') else 2}"
    engine = engine_that(where, lambda engine: engine.terminate_epoch())
    at(engine, "EC", engine.terminate)
    steps = record_steps(engine)
    data = Unsized(1, 2, 3, 4)
    engine.run_sync(data, max_epochs=3, epoch_length=2)
    first = len(steps)
    engine.run_sync(data)
    assert [batch for *_, batch in steps[first:]] == [1, 2, 3, 4]


@pytest.mark.parametrize("prefetch", [0, 2])
async def test_terminate_after_the_end_of_the_data_cancels_no_handler(prefetch: int) -> None:
    """Only a wait for data is cancelled by it, and that wait is over."""
    send, receive = anyio.create_memory_object_stream[int](3)
    for batch in (1, 2, 3):
        send.send_nowait(batch)
    send.close()
    engine = Engine(double)
    handled: list[int] = []

    @engine.on(Events.COMPLETED)
    async def terminate_and_go_on() -> None:
        engine.terminate()
        for _ in range(10):
            await checkpoint()
        handled.append(engine.state.iteration)

    with receive, pytest.warns(DataExhaustedWarning):
        await engine.run(receive, max_epochs=2, epoch_length=3, prefetch=prefetch)
    assert handled == [3]
    assert engine.state.stop_reason is StopReason.DATA_EXHAUSTED


# What opens is closed


@pytest.mark.parametrize("how", ["completes", "is terminated", "fails", "ends its epoch", "is stopped by Ctrl-C"])
def test_generator_that_the_engine_opened_is_closed_however_the_run_ends(how: str) -> None:
    def end(engine: AnyEngine) -> None:
        if how == "is terminated":
            engine.terminate()
        elif how == "ends its epoch":
            engine.terminate_epoch()
        elif how == "fails":
            raise Boom
        elif how == "is stopped by Ctrl-C":
            raise KeyboardInterrupt

    opened: list[int] = []
    closed: list[int] = []

    def batches() -> Iterator[int]:
        opened.append(1)
        try:
            yield from range(10)
        finally:
            closed.append(1)

    engine = engine_that("step@1/1", end)
    try:
        engine.run_sync(batches, epoch_length=2)
    except (Boom, KeyboardInterrupt):
        assert how in ("fails", "is stopped by Ctrl-C")
    assert closed == opened == [1]


def test_generator_that_the_user_opened_is_left_open() -> None:
    data = numbers(5)
    Engine(double).run_sync(data, epoch_length=2)
    assert list(data) == [3, 4, 5]


def test_error_of_closing_the_data_is_raised() -> None:
    def batches() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            raise Boom

    with pytest.raises(Boom) as raised:
        Engine(double).run_sync(batches, epoch_length=2)
    assert "closing the data" in raised.value.__notes__[0]


def test_error_of_closing_the_data_comes_with_the_one_before_it() -> None:
    first, second = Boom(1), Boom(2)

    def fail(_: AnyEngine) -> None:
        raise first

    def batches() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            raise second

    with pytest.raises(ExceptionGroup) as raised:
        engine_that("step@1/1", fail).run_sync(batches, epoch_length=2)
    assert raised.value.exceptions == (first, second)


def test_stop_iteration_of_a_handler_between_fetches_is_not_the_end_of_the_data() -> None:
    engine = Engine(double)

    @engine.on(Events.GET_BATCH_STARTED(once=1))
    def stop() -> None:
        next(iter(()))

    with pytest.raises(RuntimeError, match="StopIteration") as raised:
        engine.run_sync([1, 2, 3])
    assert isinstance(raised.value.__cause__, StopIteration)
    assert engine.state.iteration == 1

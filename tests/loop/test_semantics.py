"""The plain run: what is fired, in which order, and what the state holds then. No event loop."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from support.record import EVENTS, PLAIN, AnyEngine, Boom, Unsized, at, double, engine_that, place, record, record_steps

from aengine import Engine, Events, State, StopReason

# The order of events


def test_plain_run_fires_its_events_in_order() -> None:
    engine = Engine(double)
    seen = record(engine)
    engine.run_sync([1, 2], max_epochs=2)
    assert seen == PLAIN


def test_data_is_restarted_by_the_first_fetch_of_the_next_epoch() -> None:
    data = Unsized(1, 2)
    engine = Engine(double)
    passes: list[tuple[str, int]] = []
    for letters in ("ES", "GS", "DSI", "GC"):
        engine.add_event_handler(
            EVENTS[letters], lambda engine, letters: passes.append((place(engine, letters), data.passes)), letters
        )
    engine.run_sync(data, max_epochs=2, epoch_length=2)
    assert passes[:2] == [("ES@1/0", 0), ("GS@1/0", 0)]
    assert passes[-5:-1] == [("GS@2/2", 1), ("DSI@2/2", 1), ("GC@2/2", 2), ("GS@2/3", 2)]


def test_last_epoch_fires_no_stop_of_the_data() -> None:
    engine = Engine(double)
    seen = record(engine, "DSI")
    engine.run_sync([1, 2], max_epochs=3)
    assert seen == ["DSI@2/2", "DSI@3/4"]


def test_sampler_can_be_seeded_before_the_iterator_of_its_epoch_is_made() -> None:
    class Sampler:
        epoch = 0

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[int]:
            return iter([10 * self.epoch, 10 * self.epoch + 1])

    sampler = Sampler()
    engine = Engine(double)
    steps = record_steps(engine)

    @engine.on(Events.EPOCH_STARTED)
    def seed(engine: AnyEngine) -> None:
        sampler.epoch = engine.state.epoch

    engine.run_sync(sampler, max_epochs=2)
    assert [batch for *_, batch in steps] == [10, 11, 20, 21]


def test_stop_of_the_data_comes_before_its_next_iterator_is_made() -> None:
    data = Unsized(1)
    engine = Engine(double)
    passes: list[int] = []
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda: passes.append(data.passes))
    engine.run_sync(data, max_epochs=3)
    assert passes == [1, 2]


# The length of an epoch


def test_epoch_is_as_long_as_the_data() -> None:
    assert Engine(double).run_sync([1, 2, 3]).epoch_length == 3


def test_without_a_length_an_epoch_ends_where_the_data_ends() -> None:
    engine = Engine(double)
    seen = record(engine)
    assert engine.run_sync(Unsized(1, 2), max_epochs=2).epoch_length == 2
    plain = PLAIN.copy()
    for end in ("EC@1/2", "EC@2/4"):
        plain.insert(plain.index(end), f"GS{end[2:]}")  # it must be asked to know that it has ended
    assert seen == plain


def test_length_of_the_first_epoch_is_known_when_it_is_completed() -> None:
    engine = Engine(double)
    lengths: list[int | None] = []
    for event in (Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
        engine.add_event_handler(event, lambda engine: lengths.append(engine.state.epoch_length))
    engine.run_sync(Unsized(1, 2))
    assert lengths == [None, None, 2]


def test_data_longer_than_an_epoch_goes_on_in_the_next_from_where_it_stands() -> None:
    engine = Engine(double)
    steps, seen = record_steps(engine), record(engine, "ES DSI EC")
    engine.run_sync([1, 2, 3], max_epochs=3, epoch_length=2)
    assert [batch for *_, batch in steps] == [1, 2, 3, 1, 2, 3]
    assert seen == ["ES@1/0", "EC@1/2", "ES@2/2", "DSI@2/3", "EC@2/4", "ES@3/4", "EC@3/6"]


def test_data_shorter_than_an_epoch_is_restarted_inside_it_as_often_as_it_takes() -> None:
    engine = Engine(double)
    steps, seen = record_steps(engine), record(engine, "ES DSI EC C")
    engine.run_sync([1, 2], max_epochs=1, epoch_length=5)
    assert [batch for *_, batch in steps] == [1, 2, 1, 2, 1]
    assert seen == ["ES@1/0", "DSI@1/2", "DSI@1/4", "EC@1/5", "C@1/5"]


def test_without_data_the_step_gets_none_and_nothing_is_fetched() -> None:
    batches: list[Any] = []
    engine: AnyEngine = Engine(lambda engine, batch: batches.append(batch))
    seen = record(engine)
    engine.run_sync(max_epochs=2, epoch_length=2)
    assert batches == [None] * 4
    assert seen == [one for one in PLAIN if one.partition("@")[0] not in ("GS", "GC", "DSI")]


# The end by iterations


def test_max_iters_reached_at_the_end_of_an_epoch_completes_it() -> None:
    engine = Engine(double)
    seen = record(engine)
    engine.run_sync([1, 2], max_iters=4)
    assert seen == PLAIN


def test_max_iters_reached_inside_an_epoch_ends_the_run_without_completing_it() -> None:
    engine = Engine(double)
    seen = record(engine)
    state = engine.run_sync([1, 2], max_iters=3)
    assert seen == [*PLAIN[: PLAIN.index("IC@2/3") + 1], "T@2/3", "C@2/3"]
    assert state.stop_reason is StopReason.COMPLETED


def test_max_iters_inside_an_epoch_of_unknown_length_ends_the_run() -> None:
    engine = Engine(double)
    seen = record(engine, "IC EC T C")
    engine.run_sync(Unsized(1, 2, 3), max_iters=2)
    assert seen == ["IC@1/1", "IC@1/2", "T@1/2", "C@1/2"]


def test_max_iters_goes_past_epochs_of_unknown_length() -> None:
    engine = Engine(double)
    seen = record(engine, "IC EC T C")
    engine.run_sync(Unsized(1, 2), max_iters=3)
    assert seen == ["IC@1/1", "IC@1/2", "EC@1/2", "IC@2/3", "T@2/3", "C@2/3"]


# The state


def test_batch_is_none_before_each_fetch_and_is_what_the_step_gets_after() -> None:
    engine = Engine(double)
    batches: dict[str, list[Any]] = {letters: [] for letters in ("GS", "DSI", "GC", "IS", "IC")}
    for letters, seen in batches.items():
        engine.add_event_handler(EVENTS[letters], lambda engine, seen: seen.append(engine.state.batch), seen)
    engine.run_sync([1, 2], max_epochs=2)
    assert batches["GS"] == [None] * 4
    assert batches["DSI"] == [None]
    assert batches["GC"] == batches["IS"] == batches["IC"] == [1, 2, 1, 2]


def test_memory_of_a_batch_is_free_before_the_next_one_is_fetched() -> None:
    class Batch:
        pass

    fetched: list[weakref.ref[Batch]] = []
    alive: list[int] = []

    def batches() -> Iterator[Batch]:
        for _ in range(3):
            alive.append(sum(reference() is not None for reference in fetched))
            batch = Batch()
            fetched.append(weakref.ref(batch))
            yield batch
            del batch

    engine: AnyEngine = Engine(lambda engine, batch: None)
    engine.run_sync(batches)
    assert alive == [0, 0, 0]


def test_handler_at_iteration_started_may_replace_the_batch() -> None:
    engine = Engine(double)

    @engine.on(Events.ITERATION_STARTED)
    def replace(engine: AnyEngine) -> None:
        engine.state.batch += 10

    outputs: list[int] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    engine.run_sync([1, 2])
    assert outputs == [22, 24]


def test_output_is_reset_after_a_fetch_and_so_is_the_last_steps_at_the_end() -> None:
    engine = Engine(double)
    outputs: dict[str, list[Any]] = {letters: [] for letters in ("ES", "GS", "DSI", "GC", "IS", "IC", "EC", "C")}
    for letters, seen in outputs.items():
        engine.add_event_handler(EVENTS[letters], lambda engine, seen: seen.append(engine.state.output), seen)
    engine.run_sync([1, 2], max_epochs=2)
    assert outputs == {
        "ES": [None, 4],
        "GS": [None, 2, 4, 2],
        "DSI": [4],
        "GC": [None] * 4,
        "IS": [None] * 4,
        "IC": [2, 4, 2, 4],
        "EC": [4, 4],
        "C": [4],
    }


def test_metrics_and_own_attributes_survive_from_run_to_run() -> None:
    engine = Engine(double)
    engine.state.metrics["loss"] = 0.5
    engine.state.best = 3
    engine.run_sync([1])
    engine.run_sync([1])
    assert engine.state.metrics == {"loss": 0.5}
    assert engine.state.best == 3


def test_times_are_set_before_the_handlers_run_and_again_after() -> None:
    engine = Engine(double)
    before: dict[str, Any] = {}

    @engine.on(Events.EPOCH_COMPLETED | Events.COMPLETED)
    def look(engine: AnyEngine) -> None:
        name = engine.last_event_name
        assert isinstance(name, Events)
        before[name.name] = engine.state.times[name.name]

    after: dict[str, Any] = engine.run_sync([1, 2]).times
    assert 0 < before["EPOCH_COMPLETED"] < after["EPOCH_COMPLETED"]
    assert before["EPOCH_COMPLETED"] < before["COMPLETED"] < after["COMPLETED"]


def test_time_of_an_epoch_includes_its_handlers_and_not_those_of_the_one_before() -> None:
    engine = Engine(double)
    times: list[Any] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: times.append(engine.state.times["EPOCH_COMPLETED"]))
    total: Any = engine.run_sync([1, 2], max_epochs=3).times["COMPLETED"]
    assert 0 < sum(times) < total


def test_run_returns_the_state_of_the_engine() -> None:
    engine = Engine(double)
    state = engine.state
    assert engine.run_sync([1]) is state
    assert isinstance(state, State)
    assert engine.state is state


def test_a_state_is_made_with_attributes_of_ones_own() -> None:
    state = State(best=0.5, batch=3)
    assert (state.best, state.batch, state.iteration) == (0.5, 3, 0)


def test_last_event_name_is_the_event_that_was_dispatched_last() -> None:
    engine = Engine(double)
    assert engine.last_event_name is None
    engine.add_event_handler(Events.COMPLETED, lambda: None)
    engine.run_sync([1])
    assert engine.last_event_name is Events.COMPLETED


# A run after a run


def test_engine_that_is_done_begins_anew_from_zero() -> None:
    engine = Engine(double)
    seen = record(engine)
    engine.run_sync([1, 2], max_epochs=2)
    engine.run_sync([1, 2], max_epochs=2)
    assert seen == [*PLAIN, *PLAIN]


def test_evaluator_runs_one_epoch_by_default() -> None:
    engine = Engine(double)
    engine.run_sync([1, 2], max_epochs=2)
    state = engine.run_sync([1, 2])
    assert (state.epoch, state.iteration, state.max_epochs) == (1, 2, 1)


def test_evaluator_takes_other_data_of_another_length() -> None:
    engine = Engine(double)
    steps = record_steps(engine)
    engine.run_sync([1, 2])
    engine.run_sync([3, 4, 5])
    engine.run_sync(Unsized(6))
    assert [batch for *_, batch in steps] == [1, 2, 3, 4, 5, 6]
    assert engine.state.epoch_length == 1


def test_evaluator_without_data_keeps_its_epoch_length() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: None)
    engine.run_sync(epoch_length=3)
    assert engine.run_sync().iteration == 3


def test_done_by_iterations_begins_anew_too() -> None:
    engine = Engine(double)
    seen = record(engine, "S IC")
    engine.run_sync([1, 2], max_iters=3)
    engine.run_sync([1, 2], max_iters=3)
    assert seen == [*"S@0/0 IC@1/1 IC@1/2 IC@2/3".split()] * 2


def test_larger_max_epochs_goes_on_as_one_run_would_have() -> None:
    engine = Engine(double)
    seen = record(engine)
    engine.run_sync([1, 2], max_epochs=1)
    del seen[:]
    engine.run_sync([1, 2], max_epochs=2)
    assert seen == ["S@1/2", *PLAIN[PLAIN.index("ES@2/2") :]]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_larger_max_epochs_goes_on_with_the_batch_after_the_last(length: int) -> None:
    engine, in_one = Engine(double), Engine(double)
    steps, steps_in_one = record_steps(engine), record_steps(in_one)
    for max_epochs in (1, 2, 4):
        engine.run_sync([1, 2, 3], max_epochs=max_epochs, epoch_length=length)
    in_one.run_sync([1, 2, 3], max_epochs=4, epoch_length=length)
    assert steps == steps_in_one


def test_larger_max_iters_goes_on_inside_the_epoch() -> None:
    engine = Engine(double)
    steps, seen = record_steps(engine), record(engine, "S ES EC T C")
    engine.run_sync([1, 2, 3], max_iters=2)
    engine.run_sync([1, 2, 3], max_iters=4)
    assert steps == [(1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 4, 1)]
    assert seen == "S@0/0 ES@1/0 T@1/2 C@1/2 S@1/2 ES@1/2 EC@1/3 ES@2/3 T@2/4 C@2/4".split()


def test_limit_set_to_none_begins_anew() -> None:
    engine = Engine(double)
    engine.run_sync([1, 2], max_epochs=5)
    engine.state.max_epochs = None
    state = engine.run_sync([1, 2, 3], max_iters=2)
    assert (state.epoch, state.iteration, state.epoch_length) == (1, 2, 3)


# What handlers may change


def test_limits_may_be_set_by_a_handler_of_started() -> None:
    engine = Engine(double)
    seen = record(engine, "EC C")

    @engine.on(Events.STARTED)
    def shorten(engine: AnyEngine) -> None:
        engine.state.max_epochs = 2
        engine.state.epoch_length = 3

    engine.run_sync([1, 2], max_epochs=9)
    assert seen == ["EC@1/3", "EC@2/6", "C@2/6"]


def test_max_epochs_may_be_raised_while_running() -> None:
    engine = Engine(double)
    seen = record(engine, "EC C")

    @engine.on(Events.EPOCH_COMPLETED(once=1))
    def go_on(engine: AnyEngine) -> None:
        engine.state.max_epochs = 2

    engine.run_sync([1, 2])
    assert seen == ["EC@1/2", "EC@2/4", "C@2/4"]


def test_data_may_be_changed_while_running() -> None:
    engine = Engine(double)
    steps = record_steps(engine)
    at(engine, "IC@1/1", lambda: engine.set_data([7, 8]))
    state = engine.run_sync([1, 2, 3], max_epochs=2)
    assert [batch for *_, batch in steps] == [1, 7, 8, 7, 8, 7]
    assert state.epoch_length == 3
    assert state.dataloader == [7, 8]


@pytest.mark.parametrize(
    ("first", "then", "fired"),
    [
        ([1, 2, 3], None, "GS@1/0 GC@1/0 IC@1/1 IC@1/2 IC@1/3"),
        (None, [1, 2], "IC@1/1 GS@1/1 GC@1/1 IC@1/2 GS@1/2 GC@1/2 IC@1/3"),
    ],
)
def test_batches_are_reported_as_soon_as_there_are_any(first: Any, then: Any, fired: str) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    seen = record(engine, "GS GC IC")
    at(engine, "IC@1/1", lambda: engine.set_data(then))
    engine.run_sync(first, epoch_length=3)
    assert seen == fired.split()


# Nothing stays behind


@pytest.mark.parametrize("ends", ["completes", "is terminated", "fails"])
def test_engine_is_freed_by_reference_count_after_its_run(ends: str) -> None:
    def end(engine: AnyEngine) -> None:
        if ends == "is terminated":
            engine.terminate()
        if ends == "fails":
            raise Boom

    engine = engine_that("step@1/1", end)
    if ends == "fails":
        with pytest.raises(Boom):
            engine.run_sync([1, 2])
    else:
        engine.run_sync([1, 2])
    reference = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert reference() is None
    finally:
        gc.enable()

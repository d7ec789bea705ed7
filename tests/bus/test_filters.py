"""Filters: at which of its firings an event reaches a handler. No event loop."""

from datetime import timedelta
from typing import Any

import pytest
from support.record import EVENTS, AnyEngine, Boom, double, engine_that, place, record

from aengine import Engine, EventEnum, Events


class Backward(EventEnum):
    BACKWARD_STARTED = "backward_started"
    DONE = "backward_done"


def counts(event: Any, counter: str = "iteration", *, max_epochs: int = 3, data: Any = (1, 2, 3, 4)) -> list[int]:
    """Return the counts at which a run fired this event."""
    engine = Engine(double)
    fired: list[int] = []
    engine.add_event_handler(event, lambda engine: fired.append(getattr(engine.state, counter)))
    engine.run_sync(data, max_epochs=max_epochs)
    return fired


# Counts


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"every": 1}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ({"every": 5}, [5, 10]),
        ({"every": 13}, []),
        ({"once": 3}, [3]),
        ({"once": [7, 2, 2]}, [2, 7]),
        ({"once": (1, 12, 99)}, [1, 12]),
        ({"once": range(4, 7)}, [4, 5, 6]),
        ({"before": 3}, [1, 2]),
        ({"before": 1}, []),
        ({"before": 0}, []),
        ({"after": 10}, [11, 12]),
        ({"after": 0, "before": 2}, [1]),
        ({"after": 4, "before": 7}, [5, 6]),
        ({"after": 4, "before": 5}, []),
        ({"every": 1, "after": 10}, [11, 12]),
        ({"every": 3, "after": 4}, [5, 8, 11]),
        ({"every": 3, "after": 4, "before": 11}, [5, 8]),
        ({"every": 5, "before": 9}, [1, 6]),
        ({"event_filter": lambda engine, count: count % 5 == 2}, [2, 7, 12]),
    ],
)
def test_filter_looks_at_the_iteration(arguments: dict[str, Any], expected: list[int]) -> None:
    assert counts(Events.ITERATION_COMPLETED(**arguments)) == expected
    assert counts(Events.ITERATION_STARTED(**arguments)) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"every": 2}, [2, 4]),
        ({"once": 3}, [3]),
        ({"before": 3}, [1, 2]),
        ({"after": 3}, [4, 5]),
        ({"every": 2, "after": 1}, [2, 4]),
    ],
)
def test_filter_of_an_epochs_event_looks_at_the_epoch(arguments: dict[str, Any], expected: list[int]) -> None:
    assert counts(Events.EPOCH_STARTED(**arguments), "epoch", max_epochs=5) == expected
    assert counts(Events.EPOCH_COMPLETED(**arguments), "epoch", max_epochs=5) == expected


def test_filter_of_a_fetch_looks_at_the_iterations_before_it() -> None:
    assert counts(Events.GET_BATCH_STARTED(every=4)) == [0, 4, 8]
    assert counts(Events.GET_BATCH_COMPLETED(after=9)) == [10, 11]


def test_filter_of_the_beginning_and_the_end_looks_at_the_epoch() -> None:
    assert counts(Events.STARTED(every=2), "epoch") == [0]
    assert counts(Events.STARTED(once=1), "epoch") == []
    assert counts(Events.COMPLETED(once=3), "epoch") == [3]
    assert counts(Events.COMPLETED(every=2), "epoch") == []


def test_filter_fires_again_at_a_count_that_stands_still() -> None:
    """An epoch that ends before its first iteration fetches again, after as many iterations as before."""
    engine = Engine(double)
    fired: list[tuple[int, int]] = []

    @engine.on(Events.GET_BATCH_STARTED(every=2))
    def look(engine: AnyEngine) -> None:
        fired.append((engine.state.epoch, engine.state.iteration))
        if engine.state.epoch == 2:
            engine.terminate_epoch()

    engine.run_sync([1, 2], max_epochs=3)
    assert fired == [(1, 0), (2, 2), (3, 2)]


def test_filter_of_ones_own_event_fires_again_at_a_count_that_stands_still() -> None:
    fired: list[int] = []

    def step(engine: AnyEngine, batch: int) -> None:
        engine.state.backward = batch
        for _ in range(2):
            engine.fire_event(Backward.DONE)

    engine = Engine(step)
    engine.register_events(*Backward, event_to_attr={Backward.DONE: "backward"})
    engine.add_event_handler(Backward.DONE(every=2), lambda engine: fired.append(engine.state.backward))
    engine.run_sync([1, 2, 3, 4, 2])
    assert fired == [2, 2, 4, 4, 2, 2]


def test_filter_begins_anew_with_the_engine() -> None:
    engine = Engine(double)
    fired: list[int] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: fired.append(engine.state.iteration))
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), lambda engine: fired.append(engine.state.iteration))
    engine.run_sync([1, 2, 3])
    engine.run_sync([1, 2, 3])
    assert fired == [2, 3, 2, 3]


def test_filter_of_ones_own_is_given_the_engine_and_the_count() -> None:
    engine = Engine(double)
    given: list[tuple[AnyEngine, int]] = []

    def look(engine: AnyEngine, count: int) -> bool:
        given.append((engine, count))
        return False

    engine.add_event_handler(Events.ITERATION_COMPLETED(look), lambda: pytest.fail("it was filtered out"))
    engine.run_sync([1, 2])
    assert given == [(engine, 1), (engine, 2)]


def test_filter_of_ones_own_that_fails_fails_the_run_and_is_named() -> None:
    def broken(engine: AnyEngine, count: int) -> bool:
        raise Boom

    def handler() -> None: ...

    engine = Engine(double)
    engine.add_event_handler(Events.ITERATION_COMPLETED(broken), handler)
    with pytest.raises(Boom) as raised:
        engine.run_sync([1])
    assert "ITERATION_COMPLETED" in raised.value.__notes__[0]


# Firings of events that have no counter


@pytest.mark.parametrize(("letters", "act"), [("TSE", "terminate_epoch"), ("INT", "interrupt"), ("T", "terminate")])
def test_event_without_a_counter_counts_its_firings(letters: str, act: str) -> None:
    engine = Engine(double)
    fired: list[str] = []
    engine.add_event_handler(EVENTS[letters](every=2), lambda engine: fired.append(place(engine, "2nd, 4th")))
    engine.add_event_handler(EVENTS[letters](once=3), lambda engine: fired.append(place(engine, "3rd")))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: getattr(engine, act)())
    engine.run_sync([1, 2, 3, 4, 5], max_epochs=4)
    while engine.state.iteration < 4:
        engine.run_sync(engine.state.dataloader)
    assert [one.partition("@")[0] for one in fired] == ["2nd, 4th", "3rd", "2nd, 4th"]
    assert [one.partition("/")[2] for one in fired] == ["2", "3", "4"]


def test_restarts_of_the_data_are_counted() -> None:
    assert counts(Events.DATALOADER_STOP_ITERATION(every=2), max_epochs=6) == [8, 16]


def test_firings_are_counted_from_run_to_run() -> None:
    engine = Engine(double)
    fired: list[int] = []
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION(once=3), lambda engine: fired.append(engine.state.epoch))
    engine.run_sync([1], max_epochs=3)
    engine.run_sync([1], max_epochs=3)
    assert fired == [2]


def test_errors_and_ctrl_c_are_counted() -> None:
    engine = Engine(double)
    fired: list[str] = []
    failing: list[BaseException] = []

    @engine.on(Events.ITERATION_STARTED)
    def fail() -> None:
        raise failing[-1]

    engine.add_event_handler(Events.EXCEPTION_RAISED(once=2), lambda engine, error: fired.append("EXC"))
    engine.add_event_handler(Events.CANCELLED(once=2), lambda engine: fired.append("CAN"))
    for error in (Boom(), KeyboardInterrupt(), KeyboardInterrupt(), Boom()):
        failing.append(error)
        with pytest.raises(type(error)):
            engine.run_sync([1, 2])
    assert fired == ["CAN", "EXC"]


def test_own_event_counts_its_firings() -> None:
    def step(engine: AnyEngine, batch: int) -> None:
        engine.fire_event(Backward.DONE)
        engine.fire_event(Backward.DONE)

    engine: AnyEngine = Engine(step)
    engine.register_events(*Backward)
    fired: list[int] = []
    engine.add_event_handler(Backward.DONE(every=3), lambda engine: fired.append(engine.state.iteration))
    engine.run_sync([1, 2, 3])
    assert fired == [2, 3]


def test_own_event_may_be_counted_by_an_attribute() -> None:
    def step(engine: AnyEngine, batch: int) -> None:
        engine.state.tokens += batch
        engine.fire_event(Backward.DONE)

    engine: AnyEngine = Engine(step)
    engine.register_events(*Backward, event_to_attr={Backward.DONE: "tokens"})
    fired: list[int] = []
    engine.add_event_handler(Backward.DONE(after=4), lambda engine: fired.append(engine.state.tokens))
    assert engine.state.tokens == 0
    assert engine.state.get_event_attrib_value(Backward.DONE) == 0
    engine.run_sync([1, 2, 3, 4])
    assert fired == [6, 10]


@pytest.mark.parametrize(
    ("arguments", "expected"), [({"every": 2}, [2, 2]), ({"once": 1}, [1, 1]), ({"before": 2}, [1, 1])]
)
def test_filter_holds_for_a_counter_that_begins_again(arguments: dict[str, Any], expected: list[int]) -> None:
    def step(engine: AnyEngine, batch: int) -> None:
        engine.state.batch_of_epoch = batch
        engine.fire_event(Backward.DONE)

    engine: AnyEngine = Engine(step)
    engine.register_events(*Backward, event_to_attr={Backward.DONE: "batch_of_epoch"})
    fired: list[int] = []
    engine.add_event_handler(Backward.DONE(**arguments), lambda engine: fired.append(engine.state.batch_of_epoch))
    engine.run_sync([1, 2, 3], max_epochs=2)
    assert fired == expected


@pytest.mark.parametrize("arguments", [{"every": 2}, {"once": 2}, {"after": 1, "before": 3}])
def test_filter_holds_for_a_counter_that_stands_still(arguments: dict[str, Any]) -> None:
    def step(engine: AnyEngine, batch: int) -> None:
        engine.fire_event(Backward.DONE)

    engine: AnyEngine = Engine(step)
    engine.register_events(*Backward, event_to_attr={Backward.DONE: "epoch"})
    fired: list[int] = []
    engine.add_event_handler(Backward.DONE(**arguments), lambda engine: fired.append(engine.state.iteration))
    engine.run_sync([1, 2], max_epochs=3)
    assert fired == [3, 4]


# Time


def test_event_filter_without_a_signature_is_called() -> None:
    """As some of what is written in C: nothing says what it takes."""
    due: Any = "due".format
    never: Any = "".format
    assert counts(Events.EPOCH_COMPLETED(due), "epoch") == [1, 2, 3]
    assert counts(Events.EPOCH_COMPLETED(never), "epoch") == []


class Clock:
    """Goes on when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("aengine.bus.listeners.perf_counter", clock)
    return clock


def seconds_apart(clock: Clock, seconds: float) -> Any:
    for batch in range(6):
        clock.now += seconds
        yield batch


@pytest.mark.parametrize(
    ("seconds", "expected"), [(1, []), (4, [3, 6]), (9, [2, 4, 6]), (10, [1, 2, 3, 4, 5, 6]), (30, [1, 2, 3, 4, 5, 6])]
)
def test_every_so_much_time_fires_only_when_it_has_passed(clock: Clock, seconds: int, expected: list[int]) -> None:
    event = Events.ITERATION_COMPLETED(every=timedelta(seconds=10))
    assert counts(event, max_epochs=1, data=seconds_apart(clock, seconds)) == expected


def test_every_so_much_time_begins_again_with_each_run(clock: Clock) -> None:
    engine = Engine(double)
    fired: list[int] = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(every=timedelta(seconds=10)),
        lambda engine: fired.append(engine.state.iteration),
    )
    for _ in range(2):
        clock.now += 1000
        engine.run_sync(lambda: seconds_apart(clock, 4))
    assert fired == [3, 6, 3, 6]


# at_end


@pytest.mark.parametrize(
    ("event", "counter", "expected"),
    [
        (Events.ITERATION_COMPLETED(every=5, at_end=True), "iteration", [5, 10, 12]),
        (Events.ITERATION_COMPLETED(every=6, at_end=True), "iteration", [6, 12]),
        (Events.ITERATION_COMPLETED(once=2, at_end=True), "iteration", [2, 12]),
        (Events.ITERATION_COMPLETED(before=2, at_end=True), "iteration", [1, 12]),
        (Events.ITERATION_COMPLETED(every=timedelta(days=1), at_end=True), "iteration", [12]),
        (Events.ITERATION_COMPLETED(lambda engine, count: count == 3, at_end=True), "iteration", [3, 12]),
        (Events.ITERATION_COMPLETED(every=1, at_end=True), "iteration", [*range(1, 13)]),
        (Events.ITERATION_STARTED(every=5, at_end=True), "iteration", [5, 10, 12]),
        (Events.EPOCH_COMPLETED(every=2, at_end=True), "epoch", [2, 3]),
        (Events.EPOCH_COMPLETED(every=3, at_end=True), "epoch", [3]),
        (Events.EPOCH_STARTED(every=2, at_end=True), "epoch", [2, 3]),
        (Events.COMPLETED(every=2, at_end=True), "epoch", [3]),
        (Events.COMPLETED(every=3, at_end=True), "epoch", [3]),
        (Events.STARTED(every=2, at_end=True), "epoch", [0]),
        (Events.GET_BATCH_STARTED(every=11, at_end=True), "iteration", [0, 11]),
        (
            Events.GET_BATCH_COMPLETED(every=6, at_end=True),
            "iteration",
            [0, 6, 12],
        ),  # the last count is 11, the iteration 12 by then
    ],
)
def test_at_end_fires_once_more_if_the_last_count_did_not(event: Any, counter: str, expected: list[int]) -> None:
    assert counts(event, counter) == expected


def test_at_end_of_an_event_that_counts_its_firings() -> None:
    assert counts(Events.DATALOADER_STOP_ITERATION(every=2, at_end=True), max_epochs=4) == [8, 16]  # after 1, 2, 3
    assert counts(Events.DATALOADER_STOP_ITERATION(every=3, at_end=True), max_epochs=4) == [12]
    assert counts(Events.DATALOADER_STOP_ITERATION(every=3, at_end=True), max_epochs=1) == []


def test_at_end_comes_before_completed_and_after_terminate() -> None:
    engine = engine_that("IC@1/2", lambda engine: engine.terminate())
    seen = record(engine, "IC T C")
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(every=5, at_end=True), lambda engine: seen.append(place(engine, "last"))
    )
    engine.run_sync([1, 2, 3])
    assert seen == ["IC@1/1", "IC@1/2", "T@1/2", "last@1/2", "C@1/2"]


def test_at_end_is_silent_about_a_run_without_any() -> None:
    engine = engine_that("S", lambda engine: engine.terminate())
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(every=5, at_end=True), lambda: pytest.fail("no iteration was completed")
    )
    engine.run_sync([1, 2, 3])

"""Random runs recorded by pytorch-ignite and by us, event by event.

Where our semantics differ on purpose the runs are not made; each such place says which row it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

import pytest
from hypothesis import example, given, settings, strategies as st
from support.ignite import EngineRunner, EngineRunnerWithIgniteEvents, IgniteRunner, ignite
from support.record import EVENTS, Boom, Unsized

import aengine

Row: TypeAlias = tuple[str, int, int, Any, Any]
"""Event, epoch, iteration, batch, output."""

ITERATION = ("GS", "GC", "IS", "IC")
EPOCH = ("S", "ES", "EC", "C")
LOOK_FOR_STOPS = ("S", "ES", "GS", "DSI", "GC", "IS", "step", "IC", "EC")

ACTS: dict[str, Callable[[Any], object]] = {
    "terminate": lambda engine: engine.terminate(),
    "terminate, skip": lambda engine: engine.terminate(skip_completed=True),
    "terminate_epoch": lambda engine: engine.terminate_epoch(),
    "terminate_epoch, skip": lambda engine: engine.terminate_epoch(skip_epoch_completed=True),
    "interrupt": lambda engine: engine.interrupt(),
    "raise": lambda engine: raise_(Boom()),
}


def raise_(error: Exception) -> None:
    raise error


@dataclass(frozen=True)
class Act:
    """What is asked for by a handler (or the step) when it is called for the n-th time."""

    where: str
    nth: int
    what: str


@dataclass(frozen=True)
class Script:
    """A run, and what happens in it."""

    length: int | None
    is_sized: bool
    limits: dict[str, int]
    acts: tuple[Act, ...] = ()
    filters: tuple[tuple[str, dict[str, Any]], ...] = ()
    again: dict[str, int] | None = None

    def data(self) -> Any:
        if self.length is None:
            return None
        batches = list(range(1, self.length + 1))
        return batches if self.is_sized else Unsized(*batches)


# Both record it


class Play:
    """What one of the libraries makes of a script."""

    def __init__(self, library: type[IgniteRunner | EngineRunner], script: Script) -> None:
        self.rows: list[Row | str] = []
        self._script = script
        self._asked: set[str] = set()
        self._firings = {where: count(1) for where in LOOK_FOR_STOPS}
        self._runner = runner = library(self._step)
        for letters, event in EVENTS.items():
            # "EXC observes. In ignite the mere presence of such a handler swallows the error"; CANCELLED is ours alone.
            if letters not in ("EXC", "CAN"):
                runner.engine.add_event_handler(getattr(runner.events, event.name), self._note, letters)
        for number, (letters, arguments) in enumerate(script.filters):
            filtered = getattr(runner.events, EVENTS[letters].name)(**arguments)
            runner.engine.add_event_handler(filtered, self._note, f"{letters}, filter {number}")
        for letters in set(LOOK_FOR_STOPS) - {"step"}:
            runner.engine.add_event_handler(getattr(runner.events, EVENTS[letters].name), self._act, letters)

    def run(self) -> "Play":
        """Run once, and again where that is comparable."""
        script = self._script
        try:
            self._runner.run(script.data(), **script.limits)
            self.rows.append("returned")
            if script.again is not None and not self._asked & {"terminate", "terminate, skip"}:
                self._runner.run(script.data(), **script.again)
        except Boom:
            self.rows.append("raised")
        except ValueError:
            self.rows.append("refused")
        return self

    @property
    def counters(self) -> dict[str, int | None]:
        """Where the state stands."""
        state = self._runner.engine.state
        return {
            name: getattr(state, name) for name in ("epoch", "iteration", "epoch_length", "max_epochs", "max_iters")
        }

    def _note(self, engine: Any, what: str, *_: Any, **__: Any) -> None:
        state = engine.state
        self.rows.append((what, state.epoch, state.iteration, state.batch, state.output))

    def _act(self, engine: Any, where: str) -> None:
        nth = next(self._firings[where])
        for one in self._script.acts:
            if (one.where, one.nth) == (where, nth):
                self._asked.add(one.what)
                ACTS[one.what](engine)

    def _step(self, engine: Any, batch: Any) -> Any:
        self._note(engine, "step")
        self._act(engine, "step")
        return engine.state.iteration * 100 + (batch or 0)


def play(library: type[IgniteRunner | EngineRunner], script: Script) -> tuple[list[Row | str], dict[str, int | None]]:
    """Return what the library fires in this script, and the counters it ends with."""
    played = Play(library, script).run()
    return played.rows, played.counters


# Random scripts


@st.composite
def filters(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    letters = draw(st.sampled_from([*ITERATION, *EPOCH]))
    few = st.integers(0, 6)
    kind = draw(st.sampled_from(["every", "once", "range", "own"]))
    if kind == "every":
        return letters, {"every": draw(st.integers(1, 4))}
    if kind == "once":
        return letters, {"once": draw(st.integers(1, 6) | st.lists(st.integers(1, 6), min_size=1, max_size=3))}
    if kind == "own":
        rest = draw(st.integers(0, 2))
        return letters, {"event_filter": lambda engine, event: event % 3 == rest}
    bounds = {name: draw(few) for name in draw(st.sampled_from([("before",), ("after",), ("before", "after")]))}
    return letters, bounds | ({"every": draw(st.integers(1, 3))} if draw(st.booleans()) else {})


@st.composite
def acts(draw: st.DrawFn) -> Act:
    what = draw(st.sampled_from(list(ACTS)))
    where = draw(st.sampled_from(LOOK_FOR_STOPS))
    if what.startswith("terminate_epoch") and where in ("S", "ES"):
        # "at S or ES: RuntimeError". That of ignite comes from the loop, ours from the call.
        where = "IC"
    if what == "interrupt" and where == "DSI":
        # "the next run() goes on with the very next event". ignite fires GET_BATCH_STARTED a second time.
        where = "GC"
    return Act(where, draw(st.integers(1, 8)), what)


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    length = draw(st.none() | st.integers(1, 4))
    is_sized = draw(st.booleans())
    epoch_length = draw(st.integers(1, 5) if length is None else st.none() | st.integers(1, 5))
    has_length = epoch_length is not None or is_sized
    limits = {} if epoch_length is None else {"epoch_length": epoch_length}
    # ignite, when it finds the length of an epoch in a run by iterations, sets `max_epochs` too: the run may then end
    # by that, and the next one is refused for "changing between epochs and iterations".
    by_iterations = has_length and draw(st.booleans())
    if by_iterations:
        limits["max_iters"] = draw(st.integers(1, 10))
    elif draw(st.booleans()):
        # "Without epoch_length= an epoch is a pass": theirs takes the length of the first pass for every one; ours
        # looks for the end of each.
        limits["max_epochs"] = draw(st.integers(1, 4 if has_length else 1))
    again = None
    # "without one the first epoch ends where the data ends": theirs keeps the length that the run before had found.
    if has_length and draw(st.booleans()):
        again = {name: value for name, value in limits.items() if name == "epoch_length"}
        limit = "max_iters" if by_iterations else "max_epochs"
        again |= draw(st.sampled_from([{}, {limit: limits.get(limit, 1)}, {limit: 1}]))
    # Not a larger limit, nor a run after a terminated one: "Resuming: one rule ... ignite starts a new epoch number,
    # drops the rest of the epoch, and starts the data from its first batch".
    return Script(
        length,
        is_sized,
        limits,
        tuple(draw(st.lists(acts(), max_size=3))),
        tuple(draw(st.lists(filters(), max_size=3))),
        again,
    )


PLAIN = Script(2, is_sized=True, limits={"max_epochs": 2})


@settings(max_examples=200)
@given(scripts())
@example(PLAIN)
@example(Script(2, is_sized=False, limits={"max_epochs": 1}))
@example(Script(None, is_sized=True, limits={"max_epochs": 2, "epoch_length": 2}))
@example(Script(3, is_sized=True, limits={"max_iters": 5}, again={"max_iters": 5}))
@example(Script(3, is_sized=True, limits={"max_epochs": 3}, again={"max_epochs": 1}))
@example(Script(2, is_sized=True, limits={}, acts=(Act("GS", 1, "terminate_epoch"),), filters=(("GS", {"every": 2}),)))
def test_random_runs_fire_what_ignite_fires(script: Script) -> None:
    theirs = play(IgniteRunner, script)
    assert play(EngineRunner, script) == theirs
    assert play(EngineRunnerWithIgniteEvents, script) == theirs


@pytest.mark.parametrize("what", ACTS)
@pytest.mark.parametrize("where", LOOK_FOR_STOPS)
def test_every_stop_everywhere_fires_what_ignite_fires(where: str, what: str) -> None:
    if what.startswith("terminate_epoch") and where in ("S", "ES"):
        with pytest.raises(RuntimeError, match="terminate_epoch"):
            play(IgniteRunner, Script(2, is_sized=True, limits={}, acts=(Act(where, 1, what),)))
        with pytest.raises(RuntimeError, match="terminate_epoch"):
            play(EngineRunner, Script(2, is_sized=True, limits={}, acts=(Act(where, 1, what),)))
        return
    for nth in (1, 2):
        script = Script(2, is_sized=True, limits={"max_epochs": 3}, acts=(Act(where, nth, what),))
        theirs, ours = play(IgniteRunner, script), play(EngineRunner, script)
        if (where, what) == ("DSI", "interrupt"):  # see `acts`
            again = [row for row in theirs[0] if row[0] == "GS"]
            assert len(again) == 1 + len([row for row in ours[0] if row[0] == "GS"])
        else:
            assert ours == theirs


# What differs on purpose does differ: a row that has changed at theirs is to be looked at again


def test_theirs_swallows_an_error_that_a_handler_observes_and_ours_does_not() -> None:
    """EXC observes. In ignite the mere presence of such a handler swallows the error."""
    reported: list[object] = []
    theirs, ours = (library(lambda engine, batch: raise_(Boom())) for library in (IgniteRunner, EngineRunner))
    for runner in (theirs, ours):
        runner.engine.add_event_handler(runner.events.EXCEPTION_RAISED, lambda engine, error: reported.append(error))
    theirs.run([1])
    with pytest.raises(Boom):
        ours.run([1])
    assert [type(error) for error in reported] == [Boom, Boom]


def test_theirs_begins_a_new_epoch_after_terminate_and_ours_finishes_the_one_under_way() -> None:
    """ignite starts a new epoch number, drops the rest of the epoch, and starts the data from its first batch."""
    batches: dict[type, list[tuple[int, int]]] = {}
    for library in (IgniteRunner, EngineRunner):
        seen: list[tuple[int, int]] = []
        runner = library(lambda engine, batch, seen=seen: seen.append((engine.state.epoch, batch)))  # type: ignore[misc]
        runner.engine.add_event_handler(runner.events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate())
        for _ in range(2):
            runner.run([1, 2, 3], max_epochs=2)
        batches[library] = seen
    assert batches[IgniteRunner] == [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]
    assert batches[EngineRunner] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]


def test_theirs_fires_empty_epochs_of_data_that_ended_and_ours_does_not() -> None:
    """No empty epochs are counted or fired (ignite fires them, and is silent about the last)."""
    ends: dict[type, list[int]] = {}
    for library in (IgniteRunner, EngineRunner):
        seen: list[int] = []
        runner = library(lambda engine, batch: None)
        runner.engine.add_event_handler(
            runner.events.EPOCH_COMPLETED,
            lambda engine, seen=seen: seen.append(engine.state.iteration),
        )
        with pytest.warns(UserWarning, match="data"):
            runner.run(iter([1, 2, 3, 4]), max_epochs=4, epoch_length=2)
        ends[library] = seen
    assert ends[IgniteRunner] == [2, 4, 4, 4]
    assert ends[EngineRunner] == [2, 4]


def test_theirs_takes_a_stop_iteration_of_a_handler_for_the_end_of_the_data_and_ours_does_not() -> None:
    """Only the fetch is inside the `try` that looks for the end."""

    def stop() -> None:
        next(iter(()))

    theirs, ours = (library(lambda engine, batch: None) for library in (IgniteRunner, EngineRunner))
    for runner in (theirs, ours):
        runner.engine.add_event_handler(runner.events.GET_BATCH_COMPLETED(once=1), stop)
    theirs.run([1, 2, 3])
    assert theirs.engine.state.iteration < 3
    with pytest.raises(RuntimeError, match="StopIteration"):
        ours.run([1, 2, 3])


def test_theirs_removes_all_filters_of_an_event_at_once_and_ours_the_one_that_is_given() -> None:
    """Handlers are removed by the very event they were added with (ignite removes all filters of it at once)."""

    def handler() -> None: ...

    for library in (IgniteRunner, EngineRunner):
        runner = library(lambda engine, batch: None)
        events = [runner.events.ITERATION_COMPLETED(every=every) for every in (2, 3)]
        for event in events:
            runner.engine.add_event_handler(event, handler)
        runner.engine.remove_event_handler(handler, events[0])
        assert runner.engine.has_event_handler(handler) == (library is EngineRunner)


def test_theirs_refuses_filters_of_events_that_it_does_not_count() -> None:
    """Events without a counter count their own firings per engine, which ignite refuses."""
    runner = IgniteRunner(lambda engine, batch: None)
    runner.engine.add_event_handler(runner.events.DATALOADER_STOP_ITERATION(every=2), lambda: None)
    with pytest.raises(RuntimeError):
        runner.run([1], max_epochs=3)
    ours = EngineRunner(lambda engine, batch: None)
    fired: list[int] = []
    ours.engine.add_event_handler(
        ours.events.DATALOADER_STOP_ITERATION(every=2), lambda engine: fired.append(engine.state.epoch)
    )
    ours.run([1], max_epochs=5)
    assert fired == [3, 5]


def test_theirs_changes_the_list_that_is_joined_and_ours_makes_a_new_one() -> None:
    """`a | b` makes a new list and changes neither side."""
    for library in (IgniteRunner, EngineRunner):
        events = library.events if library is EngineRunner else ignite.engine.Events
        both = events.STARTED | events.COMPLETED
        _ = both | events.EPOCH_STARTED
        assert len(list(both)) == (2 if library is EngineRunner else 3)


# pytorch-ignite's events


def test_events_of_both_libraries_are_equal_by_name_both_ways() -> None:
    for event in ignite.engine.Events:
        ours = aengine.Events[event.name]
        assert ours == event
        assert event.name == ours
        assert ours == event(event_filter=lambda engine, event: True)
        assert ours(once=1) == event
        assert hash(ours) == hash(event) == hash(ours(once=1))
        numbered: dict[Any, int] = {event: 1}
        assert numbered == {ours: 1}
        assert numbered[ours(once=1)] == 1
    assert ignite.engine.Events.STARTED != aengine.Events.COMPLETED
    assert aengine.Events.STARTED != ignite.engine.Events.COMPLETED


def numbers(engine: aengine.Engine[Any, Any], event: Any) -> list[int]:
    seen: list[int] = []
    engine.add_event_handler(event, lambda engine: seen.append(engine.state.iteration))
    return seen


def test_lists_of_ignites_events_are_listened_to() -> None:
    events = ignite.engine.Events
    runner = EngineRunner(lambda engine, batch: None)
    seen = numbers(runner.engine, events.ITERATION_COMPLETED(every=2) | events.EPOCH_COMPLETED | events.STARTED)
    mixed = numbers(runner.engine, aengine.Events.STARTED | events.ITERATION_COMPLETED(once=3))
    runner.run([1, 2, 3])
    assert seen == [0, 2, 3]
    assert mixed == [0, 3]
    assert runner.engine.has_registered_events(events.STARTED | events.COMPLETED)


def test_handler_is_removed_by_the_filtered_event_of_ignite_that_it_was_added_with() -> None:
    def handler() -> None: ...

    engine = EngineRunner(lambda engine, batch: None).engine
    event = ignite.engine.Events.ITERATION_COMPLETED(every=3)
    engine.add_event_handler(event, handler)
    assert engine.has_event_handler(handler, ignite.engine.Events.ITERATION_COMPLETED)
    assert engine.has_event_handler(handler, event)
    engine.remove_event_handler(handler, event)
    assert not engine.has_event_handler(handler)


def test_own_events_made_with_ignites_enum_are_registered_and_fired() -> None:
    class Own(ignite.engine.EventEnum):
        HALF = "half"

    def step(engine: Any, batch: int) -> None:
        engine.fire_event(Own.HALF)

    engine = EngineRunner(step).engine
    engine.register_events(*Own, event_to_attr={Own.HALF: "halves"})
    assert engine.has_registered_events(Own.HALF)
    seen = numbers(engine, Own.HALF)
    engine.run_sync([1, 2])
    assert seen == [1, 2]
    assert engine.state.halves == 0


def test_state_that_ignite_saved_is_loaded_and_what_we_save_ignite_loads() -> None:
    theirs = IgniteRunner(lambda engine, batch: None)
    theirs.engine.add_event_handler(ignite.engine.Events.EPOCH_COMPLETED(once=2), lambda engine: engine.terminate())
    theirs.run([1, 2, 3], max_epochs=4)
    ours = EngineRunner(lambda engine, batch: None)
    ours.engine.load_state_dict(theirs.engine.state_dict())
    seen = numbers(ours.engine, aengine.Events.EPOCH_STARTED)
    ours.engine.add_event_handler(aengine.Events.EPOCH_COMPLETED(once=3), lambda engine: engine.terminate())
    ours.run([1, 2, 3])
    assert seen == [6]
    back = IgniteRunner(lambda engine, batch: None)
    back.engine.load_state_dict(ours.engine.state_dict())
    assert (back.engine.state.iteration, back.engine.state.epoch, back.engine.state.max_epochs) == (9, 3, 4)
    back.run([1, 2, 3])
    assert (back.engine.state.iteration, back.engine.state.epoch) == (12, 4)

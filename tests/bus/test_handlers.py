"""Handlers and events: which are called, how, in which order; and how events are told apart. No event loop."""

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from support.record import AnyEngine, Boom, at, double, engine_that, place, record

from aengine import Engine, EventEnum, Events, EventsList, RemovableEventHandle
from aengine.callables import named
from aengine.engine import stateful_listeners


class Backward(EventEnum):
    BACKWARD_STARTED = "backward_started"
    DONE = "backward_done"


# Handlers


def test_handlers_run_in_the_order_in_which_they_were_added() -> None:
    engine = Engine(double)
    called: list[int] = []
    for number in range(5):
        engine.add_event_handler(Events.STARTED, called.append, number)
    engine.run_sync([1])
    assert called == [0, 1, 2, 3, 4]


def test_handler_without_a_signature_is_called_with_the_engine() -> None:
    """As some of what is written in C: nothing says what it takes."""
    engine = Engine(double)
    called: deque[object] = deque()
    engine.add_event_handler(Events.STARTED, called.append)
    engine.run_sync([1])
    assert called == deque([engine])


def test_handler_is_called_with_the_engine_if_it_takes_it() -> None:
    engine = Engine(double)
    called: list[tuple[object, ...]] = []

    def takes_engine(engine: AnyEngine, one: int, *, two: int) -> None:
        called.append((engine, one, two))

    def takes_none(one: int, *, two: int) -> None:
        called.append((one, two))

    def takes_anything(*arguments: object, **named: object) -> None:
        called.append((*arguments, named))

    class Handler:
        def method(self, engine: AnyEngine, one: int, two: int) -> None:
            called.append((engine, one, two))

        def __call__(self, one: int, two: int) -> None:
            called.append((one, two))

    for handler in (takes_engine, takes_none, takes_anything, Handler().method, Handler()):
        engine.add_event_handler(Events.STARTED, handler, 1, two=2)
    engine.run_sync([1])
    assert called == [(engine, 1, 2), (1, 2), (engine, 1, {"two": 2}), (engine, 1, 2), (1, 2)]


@pytest.mark.parametrize("takes_the_engine", [True, False])
def test_keyword_only_arguments_reach_the_handler(*, takes_the_engine: bool) -> None:
    """Those that are given; the others keep their defaults."""
    given: list[dict[str, Any]] = []
    engine = Engine(double)

    def with_engine(engine: Any, first: int, *, second: int, third: int = 3, **rest: int) -> None:
        given.append({"first": first, "second": second, "third": third, **rest})

    def without(*, second: int, third: int = 3, **rest: int) -> None:
        given.append({"second": second, "third": third, **rest})

    if takes_the_engine:
        # For mypy, engine= might be one of the others.
        engine.add_event_handler(Events.COMPLETED, with_engine, 1, second=2, fourth=4)  # type: ignore[arg-type]
        engine.on(Events.COMPLETED, first=10, second=20, third=30)(with_engine)
    else:
        engine.add_event_handler(Events.COMPLETED, without, second=2, fourth=4)
        engine.on(Events.COMPLETED, second=20, third=30)(without)
    engine.run_sync([1])
    first, last = ({"first": 1}, {"first": 10}) if takes_the_engine else ({}, {})
    assert given == [{**first, "second": 2, "third": 3, "fourth": 4}, {**last, "second": 20, "third": 30}]


def test_keyword_only_argument_that_is_missing_is_refused_when_the_handler_is_added() -> None:
    def handler(engine: Any, *, needed: int) -> None: ...

    with pytest.raises(TypeError, match=r"handler\(engine: Any, \*, needed: int\).*cannot be called as"):
        Engine(double).add_event_handler(Events.COMPLETED, handler)  # type: ignore[arg-type]  # that is what is tested


def test_named_handler_stands_under_its_name_and_is_called_as_before() -> None:
    """In statistics, and in the note on its error."""

    class Part:
        def fail(self, engine: Any, *, how: str) -> None:
            raise ValueError(how)

        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    part, engine = Part(), Engine(double)
    engine.add_event_handler(Events.COMPLETED, named(part.fail, "part of a test"), how="so")
    assert stateful_listeners(engine) == [part]
    with pytest.raises(ValueError, match="so") as caught:
        engine.run_sync([1])
    assert "in handler 'part of a test' of COMPLETED" in caught.value.__notes__[0]
    assert list(engine.statistics().handlers) == ["part of a test"]


def test_signature_is_looked_at_when_the_handler_is_added_and_not_when_it_is_called() -> None:
    class Handler:
        looked = 0
        called = 0

        @property
        def __signature__(self) -> Any:
            self.looked += 1
            raise AttributeError

        def __call__(self) -> None:
            self.called += 1

    handler = Handler()
    engine = Engine(double)
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
    looked = handler.looked
    engine.run_sync([1, 2, 3])
    assert (handler.called, handler.looked) == (3, looked)


def test_type_error_within_a_handler_is_its_own() -> None:
    engine = Engine(double)
    calls: list[int] = []

    @engine.on(Events.STARTED)
    def broken(engine: AnyEngine) -> None:
        calls.append(1)
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine"):
        engine.run_sync([1])
    assert calls == [1]


def test_handlers_of_an_error_get_it_if_they_take_it() -> None:
    boom = Boom()
    told: list[tuple[object, ...]] = []

    def fail(_: AnyEngine) -> None:
        raise boom

    def takes_both(engine: AnyEngine, error: BaseException, more: int) -> None:
        told.append((engine, error, more))

    def takes_error(error: BaseException, more: int) -> None:
        told.append((error, more))

    def takes_none(*, more: int) -> None:
        told.append((more,))

    engine = engine_that("step@1/1", fail)
    engine.add_event_handler(Events.EXCEPTION_RAISED, takes_both, 1)
    engine.add_event_handler(Events.EXCEPTION_RAISED, takes_error, 2)
    engine.add_event_handler(Events.EXCEPTION_RAISED, takes_none, more=3)
    with pytest.raises(Boom):
        engine.run_sync([1])
    assert told == [(engine, boom, 1), (boom, 2), (3,)]


def test_on_returns_the_handler_as_it_was() -> None:
    def handler() -> None: ...

    engine = Engine(double)
    assert engine.on(Events.STARTED)(handler) is handler


def test_handle_removes_the_handler_also_at_the_end_of_a_block() -> None:
    engine = Engine(double)
    called: list[int] = []
    handle = engine.add_event_handler(Events.STARTED, called.append, 1)
    assert isinstance(handle, RemovableEventHandle)
    with engine.add_event_handler(Events.STARTED, called.append, 2):
        engine.run_sync([1])
    engine.run_sync([1])
    handle.remove()
    handle.remove()
    engine.run_sync([1])
    assert called == [1, 2, 1]


def test_handle_removes_what_it_added_and_no_other_registration_of_the_same_handler() -> None:
    engine = Engine(double)
    called: list[int] = []
    handler: Callable[[], None] = lambda: called.append(1)  # noqa: E731 -- one object, added twice
    engine.add_event_handler(Events.STARTED, handler)
    with engine.add_event_handler(Events.STARTED, handler):
        engine.run_sync([1])
    engine.run_sync([1])
    assert called == [1, 1, 1]


def test_handler_is_removed_by_the_very_event_it_was_added_with() -> None:
    def handler() -> None: ...

    engine = Engine(double)
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), handler)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), handler)
    engine.remove_event_handler(handler, Events.ITERATION_COMPLETED(every=2))
    assert not engine.has_event_handler(handler, Events.ITERATION_COMPLETED(every=2))
    assert engine.has_event_handler(handler, Events.ITERATION_COMPLETED(every=3))
    engine.remove_event_handler(handler, Events.ITERATION_COMPLETED)
    assert engine.has_event_handler(handler, Events.ITERATION_COMPLETED(every=3))
    assert engine.has_event_handler(handler)
    engine.remove_event_handler(handler, Events.ITERATION_COMPLETED(every=3))
    assert not engine.has_event_handler(handler)


def test_handler_of_several_events_is_removed_from_all_of_them() -> None:
    def handler() -> None: ...

    engine = Engine(double)
    both = Events.STARTED | Events.COMPLETED
    engine.add_event_handler(both, handler).remove()
    assert not engine.has_event_handler(handler)
    engine.add_event_handler(both, handler)
    engine.remove_event_handler(handler, both)
    assert not engine.has_event_handler(handler)


def test_bound_method_is_found_and_removed_though_each_access_makes_another_object() -> None:
    class Metric:
        def update(self, engine: AnyEngine) -> None: ...

    metric, other = Metric(), Metric()
    engine = Engine(double)
    engine.add_event_handler(Events.STARTED, metric.update)
    assert engine.has_event_handler(metric.update, Events.STARTED)
    assert not engine.has_event_handler(other.update, Events.STARTED)
    engine.remove_event_handler(metric.update, Events.STARTED)
    assert not engine.has_event_handler(metric.update)


def test_handler_added_while_its_event_is_dispatched_is_called_from_the_next_time_on() -> None:
    engine = Engine(double)
    called: list[int] = []
    at(
        engine,
        "IC@1/2",
        lambda: engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: called.append(engine.state.iteration)
        ),
    )
    engine.run_sync([1, 2, 3])
    assert called == [3]


def test_handler_removed_while_its_event_is_dispatched_is_called_for_the_last_time() -> None:
    engine = Engine(double)
    called: list[int] = []
    at(engine, "IC@1/2", lambda: handle.remove())  # noqa: PLW0108 -- it is made below
    handle = engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: called.append(engine.state.iteration))
    engine.run_sync([1, 2, 3])
    assert called == [1, 2]


def test_handler_added_in_the_middle_of_a_run_is_filtered_by_the_counts_to_come() -> None:
    engine = Engine(double)
    called: list[int] = []
    at(
        engine,
        "GS@1/3",
        lambda: engine.add_event_handler(
            Events.ITERATION_COMPLETED(every=2), lambda engine: called.append(engine.state.iteration)
        ),
    )
    engine.run_sync([1, 2, 3, 4, 5, 6])
    assert called == [4, 6]


def test_handlers_are_held_strongly() -> None:
    class Handler:
        def __call__(self) -> None:
            called.append(1)

    called: list[int] = []
    engine = Engine(double)
    engine.add_event_handler(Events.STARTED, Handler())
    engine.add_event_handler(Events.STARTED, Handler().__call__)
    engine.run_sync([1])
    assert called == [1, 1]


# Events


def test_events_are_equal_by_name_filtered_or_not() -> None:
    assert Events.STARTED(once=1) == Events.STARTED
    assert Events.STARTED(once=1) == Events.STARTED(every=2)
    assert Events.STARTED(once=1) == "STARTED"
    assert Events.STARTED != Events.COMPLETED
    assert {Events.STARTED(once=1): 1} == {Events.STARTED: 1} == {"STARTED": 1}
    assert Events.STARTED != 1


def test_every_1_is_the_event_itself() -> None:
    def handler() -> None: ...

    engine = Engine(double)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=1), handler)
    engine.remove_event_handler(handler, Events.ITERATION_COMPLETED)
    assert not engine.has_event_handler(handler)


def test_joining_events_makes_a_new_list_and_changes_neither_side() -> None:
    left = Events.STARTED | Events.COMPLETED(once=1)
    right = Events.EPOCH_STARTED | Events.EPOCH_COMPLETED
    joined = left | right
    assert isinstance(joined, EventsList)
    assert list(joined) == [Events.STARTED, Events.COMPLETED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED]
    assert (len(left), len(right), len(joined)) == (2, 2, 4)
    assert joined[1] == Events.COMPLETED
    left |= Events.TERMINATE
    assert len(left) == 3
    assert len(joined) == 4
    assert next(iter(Events.STARTED | left)) == Events.STARTED


def test_joined_events_keep_their_filters() -> None:
    engine = Engine(double)
    seen: list[str] = []

    @engine.on(Events.STARTED | Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_COMPLETED(once=2))
    def note(engine: AnyEngine) -> None:
        seen.append(place(engine, str(getattr(engine.last_event_name, "name", None))))

    engine.run_sync([1, 2, 3], max_epochs=2)
    expected = "STARTED@0/0 ITERATION_COMPLETED@1/2 ITERATION_COMPLETED@2/4 ITERATION_COMPLETED@2/6 EPOCH_COMPLETED@2/6"
    assert seen == expected.split()


def test_filtered_event_shows_as_it_was_written() -> None:
    assert "ITERATION_COMPLETED" in repr(Events.ITERATION_COMPLETED(every=2))
    assert "every=2" in repr(Events.ITERATION_COMPLETED(every=2))


def test_own_events_are_fired_from_steps_and_handlers_and_handled_at_once() -> None:
    seen: list[str] = []

    def step(engine: AnyEngine, batch: int) -> None:
        engine.fire_event(Backward.BACKWARD_STARTED)
        seen.append("step")
        engine.fire_event(Backward.DONE)

    engine: AnyEngine = Engine(step)
    engine.register_events(*Backward)
    assert engine.has_registered_events(Backward.DONE)
    assert not engine.has_registered_events("SOMETHING")

    @engine.on(Backward.DONE)
    def done(engine: AnyEngine) -> None:
        seen.append("done")

    engine.run_sync([1])
    assert seen == ["step", "done"]


def test_own_event_may_not_have_the_name_of_one_of_ours() -> None:
    """Equal by name, its handlers would run at ours."""

    class Phases(EventEnum):
        STARTED = "phase_started"

    with pytest.raises(ValueError, match=r"Events\.STARTED.*Give .*Phases\.STARTED another name"):
        Engine(double).register_events(*Phases)


def test_terminate_by_a_handler_of_an_own_event_ends_the_run_after_the_step() -> None:
    def step(engine: AnyEngine, batch: int) -> None:
        engine.fire_event(Backward.DONE)

    engine: AnyEngine = Engine(step)
    engine.register_events(*Backward)
    engine.add_event_handler(Backward.DONE, lambda engine: engine.terminate())
    seen = record(engine, "IC T C")
    engine.run_sync([1, 2])
    assert seen == ["IC@1/1", "T@1/1", "C@1/1"]

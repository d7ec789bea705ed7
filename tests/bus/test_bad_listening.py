"""What is refused where something is to listen: filters, handlers, events, subscribers, streams."""

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from support.record import AnyEngine, double

from aengine import Engine, Event, EventEnum, Events, EventsList


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


# Filters


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"every": 2, "once": 3},
        {"once": 3, "before": 5},
        {"event_filter": lambda engine, count: True, "every": 2},
        {"event_filter": lambda engine, count: True, "once": 2},
        {"at_end": True},
    ],
)
def test_filter_is_one_thing(arguments: dict[str, Any]) -> None:
    with refused(ValueError, "event_filter=", "once=", "every=", "before=", "after="):
        Events.ITERATION_COMPLETED(**arguments)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_every_must_be_a_positive_number(value: Any) -> None:
    with refused(ValueError, "every=", "whole number, 1 or more, or a timedelta", repr(value)):
        Events.ITERATION_COMPLETED(every=value)


@pytest.mark.parametrize("value", [timedelta(0), timedelta(seconds=-1)])
def test_every_must_be_a_positive_time(value: timedelta) -> None:
    with refused(ValueError, "every=", "a timedelta of more than 0", repr(value)):
        Events.ITERATION_COMPLETED(every=value)


@pytest.mark.parametrize("more", ["before", "after"])
def test_every_as_a_time_does_not_go_with_counts(more: str) -> None:
    arguments: dict[str, Any] = {more: 3}
    with refused(ValueError, "timedelta", "before=", "after=", "counts"):
        Events.ITERATION_COMPLETED(every=timedelta(1), **arguments)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [(0, 0), (-1, -1), (1.5, 1.5), ("12", "12"), (True, True), ([], []), ({}, {}), ([1, 0], 0), ([1, "2"], "2")],
)
def test_once_must_be_positive_numbers(value: Any, wrong: Any) -> None:
    with refused(ValueError, "once=", "whole number, 1 or more, or several of them", repr(wrong)):
        Events.ITERATION_COMPLETED(once=value)


@pytest.mark.parametrize("name", ["before", "after"])
@pytest.mark.parametrize("value", [-1, 1.5, "2", True])
def test_before_and_after_must_be_counts(name: str, value: Any) -> None:
    with refused(ValueError, f"{name}=", "whole number, 0 or more", repr(value)):
        Events.ITERATION_COMPLETED(**{name: value})


@pytest.mark.parametrize("value", [1, "f"])
def test_event_filter_must_be_callable(value: Any) -> None:
    with refused(TypeError, "event_filter=", "must be callable", repr(value)):
        Events.ITERATION_COMPLETED(event_filter=value)


def test_event_filter_must_take_engine_and_count() -> None:
    def only_one(count: int) -> bool:
        return True

    with refused(TypeError, "event_filter=", "only_one(count: int)", "event_filter(engine, count)"):
        Events.ITERATION_COMPLETED(event_filter=only_one)  # type: ignore[arg-type]  # that is what is tested


# Handlers


def test_handler_that_cannot_be_called_is_refused_where_it_is_added_with_both_signatures() -> None:
    def handler(engine: AnyEngine, one: int, two: int) -> None: ...

    engine = Engine(double)
    with refused(TypeError, "handler(engine: ", "ITERATION_COMPLETED", "handler(engine, 1)", "nor as", "handler(1)"):
        engine.add_event_handler(Events.ITERATION_COMPLETED, handler, 1)
    with refused(TypeError, "(engine, 1, 2, three=3)", "(1, 2, three=3)"):
        engine.on(Events.ITERATION_COMPLETED, 1, 2, three=3)(handler)
    assert not engine.has_event_handler(handler)


def test_handler_of_several_events_is_added_to_all_or_to_none() -> None:
    def handler(engine: AnyEngine, error: Exception) -> None: ...

    engine = Engine(double)
    with refused(TypeError, "STARTED"):
        engine.add_event_handler(Events.EXCEPTION_RAISED | Events.STARTED, handler)
    assert not engine.has_event_handler(handler)


def test_handler_of_an_error_cannot_take_more_than_engine_and_error() -> None:
    def handler(engine: AnyEngine, error: Exception, more: int) -> None: ...

    with refused(TypeError, "handler(engine: ", "EXCEPTION_RAISED"):
        Engine(double).add_event_handler(Events.EXCEPTION_RAISED, handler)  # type: ignore[arg-type]  # likewise


@pytest.mark.parametrize("handler", [yielding, async_yielding])
def test_handler_must_not_be_a_generator_function(handler: Any) -> None:
    engine = Engine(double)
    with refused(TypeError, handler.__name__, "yield"):
        engine.add_event_handler(Events.STARTED, handler)
    with refused(TypeError, handler.__name__, "yield"):
        engine.subscribe(Events.STARTED, handler)


def test_handler_must_be_callable() -> None:
    engine = Engine(double)
    with refused(TypeError, "handler", "callable", "3"):
        engine.add_event_handler(Events.STARTED, 3)  # type: ignore[call-overload]  # that is what is tested
    with refused(TypeError, "handler", "callable", "3"):
        engine.subscribe(Events.STARTED, 3)  # type: ignore[call-overload]  # likewise


def test_handler_is_removed_only_from_what_it_listens_to() -> None:
    def handler() -> None: ...

    engine = Engine(double)
    with refused(ValueError, "handler", "STARTED"):
        engine.remove_event_handler(handler, Events.STARTED)
    engine.add_event_handler(Events.STARTED(once=1), handler)
    with refused(ValueError, "handler", "very event", "filter"):
        engine.remove_event_handler(handler, Events.STARTED)
    assert engine.has_event_handler(handler)


# Events


@pytest.mark.parametrize(
    "listen",
    [
        lambda engine: engine.on(Own.DONE),
        lambda engine: engine.add_event_handler(Own.DONE, print),
        lambda engine: engine.subscribe(Own.DONE, print),
        lambda engine: engine.stream(Own.DONE),
    ],
    ids=["on", "add_event_handler", "subscribe", "stream"],
)
def test_event_that_is_not_registered_is_refused(listen: Callable[[AnyEngine], object]) -> None:
    engine = Engine(double, name="trainer")
    with refused(ValueError, "'trainer'", "'DONE'", "register_events()", "ITERATION_COMPLETED"):
        listen(engine)


@pytest.mark.parametrize("event", [None, 1, Events, ["STARTED"], object()])
def test_what_is_no_event_is_refused(event: Any) -> None:
    engine = Engine(double)
    with refused(TypeError, "expected an event", "Events.STARTED", repr(event)):
        engine.add_event_handler(event, print)


@pytest.mark.parametrize("name", ["on", "subscribe"])
def test_decorator_without_its_event_is_refused(name: str) -> None:
    engine: Any = Engine(double)
    with refused(TypeError, "expected an event", "@engine.on(Events.ITERATION_COMPLETED)"):
        getattr(engine, name)(nothing)


def test_handler_before_its_event_is_refused() -> None:
    def handler() -> None: ...

    with refused(TypeError, "expected an event", "handler", "the event comes first"):
        Engine(double).add_event_handler(handler, Events.STARTED)  # type: ignore[call-overload]  # that is what is tested


def test_record_of_an_event_is_no_event_to_listen_to() -> None:
    engine = Engine(double)
    records: list[Event] = []
    engine.subscribe(Events.STARTED, records.append)
    engine.run_sync([1])
    with refused(TypeError, "expected an event"):
        engine.add_event_handler(records[0], print)  # type: ignore[call-overload]  # likewise
    with pytest.raises(AttributeError):
        records[0].iteration = 3  # type: ignore[misc]  # it is a fact


def test_joining_takes_events_only() -> None:
    with refused(TypeError, "expected an event", "3"):
        _ = Events.STARTED | 3
    with refused(TypeError, "expected an event"):
        EventsList([None])


@pytest.mark.parametrize("event", [None, 1, Own])
def test_only_names_and_own_events_are_registered(event: Any) -> None:
    with refused(TypeError, "register_events()", "EventEnum", repr(event)):
        Engine(double).register_events(event)


def test_event_to_be_fired_must_be_registered() -> None:
    engine = Engine(double)
    with refused(ValueError, "'DONE'", "register_events()"):
        engine.fire_event(Own.DONE)


def test_one_event_is_fired_at_a_time() -> None:
    with refused(ValueError, "one event", "STARTED", "COMPLETED"):
        Engine(double).fire_event(Events.STARTED | Events.COMPLETED)


def test_counter_of_an_event_that_has_none_says_which_have() -> None:
    with refused(RuntimeError, "'TERMINATE'", "ITERATION_COMPLETED"):
        Engine(double).state.get_event_attrib_value(Events.TERMINATE)


class Called:
    def __call__(self) -> None: ...


@pytest.mark.parametrize("handler", [print, partial(print), Called()])
@pytest.mark.parametrize("name", ["add_event_handler", "subscribe"])
def test_handler_before_its_event_is_answered_by_the_order(name: str, handler: Any) -> None:
    engine: Any = Engine(double)
    with refused(TypeError, "expected an event", "the event comes first", "(event, handler)"):
        getattr(engine, name)(handler, Events.STARTED)


@pytest.mark.parametrize("name", ["remove_event_handler", "has_event_handler"])
@pytest.mark.parametrize("arguments", [(Events.STARTED, print), (Events.STARTED, Events.STARTED), ("STARTED", print)])
def test_event_before_its_handler_is_answered_by_the_order(name: str, arguments: Any) -> None:
    engine: Any = Engine(double)
    with refused(TypeError, "a handler must be a function", repr(arguments[0]), f"{name}(handler, event)"):
        getattr(engine, name)(*arguments)


def test_event_alone_has_no_handler() -> None:
    engine: Any = Engine(double)
    with refused(TypeError, "has_event_handler(handler, event)"):
        engine.has_event_handler(Events.STARTED)


@pytest.mark.parametrize("name", ["add_event_handler", "subscribe"])
def test_event_is_no_handler(name: str) -> None:
    """It can be called, but for a filter."""
    engine: Any = Engine(double)
    with refused(TypeError, "a handler must be a function", repr(Events.COMPLETED), "joined by |"):
        getattr(engine, name)(Events.STARTED, Events.COMPLETED)
    assert engine.listeners() == ()


async def handler_to_await(engine: AnyEngine) -> None: ...


def test_fire_event_cannot_await_a_handler_outside_of_a_run() -> None:
    engine = Engine(double)
    engine.register_events(*Own)
    engine.add_event_handler(Own.DONE, handler_to_await)
    with refused(RuntimeError, "async", "fire_event()", "await engine.emit('DONE')"):
        engine.fire_event(Own.DONE)


async def test_fire_event_on_the_event_loop_cannot_await_a_handler() -> None:
    def step(engine: AnyEngine, batch: int) -> None:
        with refused(RuntimeError, "async", "fire_event()", "await engine.emit('DONE')"):
            engine.fire_event(Own.DONE)

    engine: AnyEngine = Engine(step, thread=False)
    engine.register_events(*Own)
    engine.add_event_handler(Own.DONE, handler_to_await)
    assert (await engine.run([1])).iteration == 1


# Subscribers and streams


@pytest.mark.parametrize("value", [0, -1])
def test_buffer_must_be_a_number_of_events(value: Any) -> None:
    engine = Engine(double)
    with refused(ValueError, "buffer=", "1 or more", repr(value)):
        engine.subscribe(Events.STARTED, print, buffer=value)
    with refused(ValueError, "buffer=", "1 or more", repr(value)):
        engine.stream(Events.STARTED, buffer=value)


@pytest.mark.parametrize("value", ["block", 1, None])
def test_overflow_must_be_a_policy(value: Any) -> None:
    choices = ("wait", "latest", "drop_oldest", "drop_new", "error")
    engine = Engine(double)
    with refused(ValueError, "overflow=", *choices, repr(value)):
        engine.subscribe(Events.STARTED, print, overflow=value)
    with refused(ValueError, "overflow=", *choices, repr(value)):
        engine.stream(Events.STARTED, overflow=value)


def test_on_error_must_be_raise_or_log() -> None:
    with refused(ValueError, "on_error=", '"raise"', '"log"', "'ignore'"):
        Engine(double).subscribe(Events.STARTED, print, on_error="ignore")  # type: ignore[call-overload]  # likewise


def test_snapshot_must_be_callable() -> None:
    with refused(TypeError, "snapshot=", "callable", "3"):
        Engine(double).subscribe(Events.STARTED, print, snapshot=3)  # type: ignore[call-overload]  # that is what is tested
    with refused(TypeError, "snapshot=", "callable", "3"):
        Engine(double).stream(Events.STARTED, snapshot=3)  # type: ignore[call-overload]  # likewise


def nothing() -> None: ...


def two(one: object, other: object) -> None: ...


@pytest.mark.parametrize(("function", "signature"), [(nothing, "nothing()"), (two, "two(one: object, other: object)")])
def test_subscriber_and_snapshot_must_take_one_argument(function: Any, signature: str) -> None:
    engine = Engine(double)
    with refused(TypeError, "subscriber's handler", signature, "handler(event)"):
        engine.subscribe(Events.STARTED, function)
    with refused(TypeError, "subscriber's handler", signature, "handler(event)"):
        engine.subscribe(Events.STARTED)(function)
    with refused(TypeError, "snapshot=", signature, "snapshot(engine)"):
        engine.subscribe(Events.STARTED, print, snapshot=function)
    with refused(TypeError, "snapshot=", signature, "snapshot(engine)"):
        engine.stream(Events.STARTED, snapshot=function)
    assert engine.statistics().listeners == ()


def test_subscriber_may_take_more_than_it_is_given() -> None:
    def more(event: Event, limit: int = 3, *rest: int, **named: int) -> None:
        seen.append((event.name, limit))

    engine = Engine(double)
    seen: list[Any] = []
    builtin: Any = str  # it has no signature
    engine.subscribe(Events.STARTED, more)
    engine.subscribe(Events.STARTED, partial(two, "x"))
    engine.subscribe(Events.STARTED, builtin, snapshot=builtin)
    engine.run_sync([1])
    assert seen == [("STARTED", 3)]


def test_refused_subscriber_is_not_added() -> None:
    engine = Engine(double)
    with pytest.raises(ValueError, match="overflow="):
        engine.subscribe(Events.STARTED | Events.COMPLETED, lambda event: None, overflow="?")  # type: ignore[call-overload]  # a checker says it, too
    engine.run_sync([1])
    assert engine.statistics().listeners == ()


async def test_stream_is_read_inside_its_block() -> None:
    stream = Engine(double).stream(Events.STARTED)
    with refused(RuntimeError, "async with engine.stream(...)"):
        await anext(stream)


def test_event_that_is_nearly_one_of_the_engines_is_answered_by_that() -> None:
    engine: Any = Engine(lambda engine, batch: batch)
    with pytest.raises(ValueError, match=r"has no event 'EPOCH_COMPLETE': EPOCH_COMPLETED\? Else register_events\(\)"):
        engine.add_event_handler("EPOCH_COMPLETE", print)

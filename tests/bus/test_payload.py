"""What an event is about travels in it: to inline handlers that take it, to subscribers and to streams."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from support.record import AnyEngine, Boom, at, double

from aengine import Engine, Event, EventEnum, Events


class Shards(EventEnum):
    LOADED = "shard_loaded"


def engine_with_shards(step: Callable[[AnyEngine, Any], Any] = double) -> AnyEngine:
    engine: AnyEngine = Engine(step)
    engine.register_events(*Shards)
    return engine


# Inline handlers


def takes_all(engine: Any, payload: Any) -> tuple[Any, ...]:
    return engine, payload


def takes_engine(engine: Any) -> tuple[Any, ...]:
    return (engine,)


def takes_none() -> tuple[Any, ...]:
    return ()


def takes_anything(*arguments: Any) -> tuple[Any, ...]:
    return arguments


def takes_it_or_none(engine: Any, shard: Any = None) -> tuple[Any, ...]:
    return engine, shard


def takes_it_by_name(engine: Any, payload: Any = "none came") -> tuple[Any, ...]:
    return engine, payload


def has_a_value_of_its_own(engine: Any, number: int = 3) -> tuple[Any, ...]:
    return engine, number


def takes_more(engine: Any, payload: Any, more: int) -> tuple[Any, ...]:
    return engine, payload, more


def takes_only_more(engine: Any, more: int) -> tuple[Any, ...]:
    return engine, more


def takes_more_or_none(engine: Any, more: int, rest: Any = None) -> tuple[Any, ...]:
    return engine, more, rest


@pytest.mark.parametrize(
    ("handler", "args", "with_payload", "without"),
    [
        (takes_all, (), ("engine", "shard-1"), ("engine", None)),
        (takes_engine, (), ("engine",), ("engine",)),
        (takes_none, (), (), ()),
        (takes_anything, (), ("engine", "shard-1"), ("engine",)),
        (takes_it_or_none, (), ("engine", "shard-1"), ("engine", None)),
        (takes_it_by_name, (), ("engine", "shard-1"), ("engine", "none came")),
        (has_a_value_of_its_own, (), ("engine", 3), ("engine", 3)),
        (takes_more, (7,), ("engine", "shard-1", 7), ("engine", None, 7)),
        (takes_only_more, (7,), ("engine", 7), ("engine", 7)),
        (takes_more_or_none, (7,), ("engine", 7, None), ("engine", 7, None)),
    ],
)
def test_handler_is_given_the_payload_if_it_takes_it(
    handler: Callable[..., Any], args: tuple[Any, ...], with_payload: tuple[Any, ...], without: tuple[Any, ...]
) -> None:
    engine = engine_with_shards()
    called: list[Any] = []

    class Handler:
        __wrapped__ = staticmethod(handler)  # for its signature

        def __call__(self, *arguments: Any) -> None:
            called.append(handler(*arguments))

    engine.add_event_handler(Shards.LOADED, Handler(), *args)
    engine.fire_event(Shards.LOADED, "shard-1")
    engine.fire_event(Shards.LOADED)
    assert [tuple("engine" if one is engine else one for one in each) for each in called] == [with_payload, without]


def test_events_of_the_loop_that_have_no_payload_refuse_a_handler_that_needs_one() -> None:
    with pytest.raises(TypeError, match=r"cannot be called as takes_all\(engine\) nor as takes_all\(\)"):
        Engine(double).add_event_handler(Events.ITERATION_COMPLETED, takes_all)


def test_events_of_the_loop_leave_an_argument_with_a_default_alone() -> None:
    engine: AnyEngine = Engine(double)
    called: list[Any] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine, one="own": called.append(one))
    engine.run_sync([1])
    assert called == ["own"]


def test_terminated_epoch_says_how_far_it_came() -> None:
    engine: AnyEngine = Engine(double)
    counts: list[Any] = []
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda engine, iter_counter: counts.append(iter_counter))
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda engine, payload: counts.append(payload))
    at(engine, "IC@1/2", engine.terminate_epoch)
    engine.run_sync([1, 2, 3])
    assert counts == [2, 2]


# Subscribers and streams


@pytest.mark.parametrize("threaded", [True, False])
async def test_subscribers_and_streams_get_it_though_the_state_has_moved_on(
    threaded: bool,  # noqa: FBT001 -- pytest passes it by name
) -> None:
    def step(engine: AnyEngine, batch: int) -> None:
        engine.fire_event(Shards.LOADED, f"shard-{batch}")

    engine: AnyEngine = Engine(step, thread=threaded)
    engine.register_events(*Shards)
    heard: list[Any] = []

    @engine.subscribe(Shards.LOADED, snapshot=lambda engine: engine.state.iteration)
    async def note(event: Event[Any, int]) -> None:
        await anyio.lowlevel.checkpoint()
        heard.append((event.payload, event.snapshot))

    async with engine.stream(Shards.LOADED) as events:
        await engine.run([1, 2, 3])
        read = [event.payload async for event in events]
    assert heard == [("shard-1", 1), ("shard-2", 2), ("shard-3", 3)]
    assert read == ["shard-1", "shard-2", "shard-3"]


async def test_emit_carries_it() -> None:
    engine = engine_with_shards()
    heard: list[Any] = []

    @engine.on(Shards.LOADED)
    async def note(engine: AnyEngine, payload: Any) -> None:
        await anyio.lowlevel.checkpoint()
        heard.append(payload)

    @engine.subscribe(Shards.LOADED)
    async def note_too(event: Event) -> None:
        heard.append(event.payload)

    await engine.emit(Shards.LOADED, "between runs")
    await engine.run([1])
    assert heard == ["between runs", "between runs"]


async def test_what_another_thread_asks_for_soon_carries_it() -> None:
    engine = engine_with_shards()
    heard: list[Any] = []
    asked = anyio.Event()

    @engine.on(Shards.LOADED)
    def note(engine: AnyEngine, payload: Any) -> None:
        heard.append(payload)

    @engine.on(Events.ITERATION_STARTED(once=2))
    async def wait() -> None:
        await asked.wait()

    @engine.on(Events.ITERATION_STARTED(once=1))
    async def ask() -> None:
        accepted = [
            await anyio.to_thread.run_sync(engine.fire_event_soon, Shards.LOADED, number) for number in range(3)
        ]
        assert accepted == [True] * 3
        asked.set()

    await engine.run([1, 2, 3])
    assert heard == [0, 1, 2]
    assert not engine.fire_event_soon(Shards.LOADED, 3)


class IncomparableButEqual:
    """As a tensor: comparing two of them is an error."""

    def __eq__(self, other: object) -> bool:
        raise Boom

    __hash__ = None  # type: ignore[assignment]


async def test_payloads_are_never_compared() -> None:
    engine = engine_with_shards()
    engine.add_event_handler(Shards.LOADED, lambda engine, payload: heard.append(payload))
    heard: list[Any] = []
    payloads = [IncomparableButEqual(), IncomparableButEqual()]

    def ask() -> None:
        for one in payloads:
            engine.fire_event_soon(Shards.LOADED, one)

    at(engine, "IS@1/1", ask)
    await engine.run([1])
    assert [id(one) for one in heard] == [id(one) for one in payloads]
    assert not engine.fire_event_soon(Shards.LOADED, payloads[0])


async def test_subscribers_of_an_error_get_it() -> None:
    engine: AnyEngine = Engine(double)
    boom = Boom()
    heard: list[Any] = []

    def fail() -> None:
        raise boom

    @engine.subscribe(Events.EXCEPTION_RAISED)
    async def note(event: Event) -> None:
        heard.append(event.payload)

    at(engine, "IS@1/1", fail)
    with pytest.raises(Boom):
        await engine.run([1])
    assert heard == [boom]


async def test_events_of_the_loop_have_none_and_know_the_limit_of_the_run() -> None:
    engine: AnyEngine = Engine(double)
    heard: list[Event] = []
    engine.subscribe(Events.ITERATION_COMPLETED | Events.COMPLETED, heard.append)
    await engine.run([1, 2], max_iters=3)
    assert [(event.payload, event.max_iters, event.max_epochs) for event in heard] == [(None, 3, None)] * 4


async def test_one_more_event_at_the_end_of_a_run_is_about_the_last_one() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: engine.fire_event(Shards.LOADED, batch))
    engine.register_events(*Shards)
    heard: list[Any] = []
    inline: list[Any] = []
    engine.subscribe(Shards.LOADED(every=2, at_end=True), lambda event: heard.append(event.payload))
    engine.add_event_handler(Shards.LOADED(every=2, at_end=True), lambda engine, payload: inline.append(payload))
    await engine.run(["a", "b", "c"])
    assert heard == inline == ["b", "c"]

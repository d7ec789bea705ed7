"""One story, however it is advanced: by hand, by `run_sync`, on the worker, on the event loop."""

import functools
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from typing import Any, TypeAlias

import anyio
import pytest
from support.record import EVENTS, PLAIN, AnyEngine, Boom, Unsized, double, place, record

from aengine import DataExhaustedWarning, Engine, EventEnum, Events, StopReason
from aengine.data.adapt import adapt

Story: TypeAlias = list[str]


class Own(EventEnum):
    HALF = "half"


async def settle() -> None:
    await anyio.lowlevel.checkpoint()


# What happens in a run: a place, and what is asked for there


def fail(_: AnyEngine) -> None:
    raise Boom


SCRIPTS: dict[str, tuple[list[int] | None, dict[str, int], dict[str, Callable[[AnyEngine], object]]]] = {
    "plain": ([1, 2], {"max_epochs": 2}, {}),
    "longer data": ([1, 2, 3], {"max_epochs": 3, "epoch_length": 2}, {}),
    "shorter data": ([1, 2], {"max_epochs": 2, "epoch_length": 5}, {}),
    "no data": (None, {"max_epochs": 2, "epoch_length": 2}, {}),
    "max_iters": ([1, 2], {"max_iters": 3}, {}),
    "terminated": ([1, 2], {"max_epochs": 2}, {"IS@2/3": lambda engine: engine.terminate()}),
    "terminated in the step": ([1, 2], {"max_epochs": 2}, {"step@2/3": lambda engine: engine.terminate()}),
    "skips": ([1, 2], {"max_epochs": 2}, {"GC@1/1": lambda engine: engine.terminate(skip_completed=True)}),
    "epoch terminated": ([1, 2, 3], {"max_epochs": 2}, {"IC@1/2": lambda engine: engine.terminate_epoch()}),
    "epoch terminated at once": ([1, 2, 3], {"max_epochs": 2}, {"GC@1/0": lambda engine: engine.terminate_epoch()}),
    "interrupted": ([1, 2], {"max_epochs": 2}, {"GC@1/1": lambda engine: engine.interrupt()}),
    "interrupted in the step": ([1, 2], {"max_epochs": 2}, {"step@1/1": lambda engine: engine.interrupt()}),
    "interrupted as the data stops": ([1, 2], {"max_epochs": 2}, {"DSI@2/2": lambda engine: engine.interrupt()}),
    "step fails": ([1, 2], {"max_epochs": 2}, {"step@1/2": fail}),
    "handler fails": ([1, 2], {"max_epochs": 2}, {"EC@1/2": fail}),
}


def play(engine: AnyEngine, script: str) -> Story:
    """Have the engine do what the script says, and record it."""
    story = record(engine)
    acts = SCRIPTS[script][2]

    @engine.on(Events.STARTED)
    def note_start() -> None:
        engine.state.acts = dict(acts)

    def act(engine: AnyEngine, letters: str) -> None:
        engine.state.acts.pop(place(engine, letters), lambda engine: None)(engine)

    for letters in ("ES", "GS", "GC", "IS", "IC", "DSI", "EC"):
        engine.add_event_handler(EVENTS[letters], act, letters)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: story.append(f"output {engine.state.output}"))
    return story


def step(engine: AnyEngine, batch: int | None) -> int:
    engine.state.acts.pop(place(engine, "step"), lambda engine: None)(engine)
    return 2 * (batch or 0)


async def async_step(engine: AnyEngine, batch: int | None) -> int:
    await settle()
    return step(engine, batch)


class AsyncData:
    """A list's batches, each of which must be awaited."""

    def __init__(self, batches: list[int]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    async def __aiter__(self) -> AsyncIterator[int]:
        for batch in self.batches:
            await settle()
            yield batch


Told: TypeAlias = dict[str, tuple[Story, object]]


@pytest.fixture(scope="module")
def told() -> Told:
    """What each script tells without an event loop."""
    told: Told = {}
    for script, (data, limits, _) in SCRIPTS.items():
        engine: AnyEngine = Engine(step)
        story = play(engine, script)
        try:
            engine.run_sync(data, **limits)
            if engine.state.stop_reason is StopReason.INTERRUPTED:
                engine.run_sync(data)
        except Boom as error:
            story.append(f"raised, noted {len(error.__notes__)} time")
        told[script] = story, engine.state.stop_reason
    return told


async def nothing_in_between(engine: AnyEngine) -> None:
    await settle()


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Hide from the engine that the function is async."""
    return function(*arguments)


ENGINES: dict[str, Callable[[], AnyEngine]] = {
    "worker": lambda: Engine(step),
    "thread=False": lambda: Engine(step, thread=False),
    "async step": lambda: Engine(async_step),
    "step that returns an awaitable": lambda: Engine(functools.partial(call, async_step)),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("handlers", ["plain handlers", "async handlers"])
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("kind", ["sync data", "async data"])
@pytest.mark.parametrize("way", ENGINES)
async def test_every_way_of_running_tells_the_same_story(
    way: str, kind: str, prefetch: int, handlers: str, told: Told
) -> None:
    for script, (batches, limits, _) in SCRIPTS.items():
        engine = ENGINES[way]()
        story = play(engine, script)
        for event in EVENTS.values() if handlers == "async handlers" else ():
            engine.add_event_handler(event, nothing_in_between)
        data = batches if batches is None or kind == "sync data" else AsyncData(batches)
        try:
            await engine.run(data, prefetch=prefetch, **limits)
            if engine.state.stop_reason is StopReason.INTERRUPTED:
                await engine.run(data, prefetch=prefetch)
        except Boom as error:
            story.append(f"raised, noted {len(error.__notes__)} time")
        assert (script, story, engine.state.stop_reason) == (script, *told[script])


@pytest.mark.parametrize("way", ENGINES)
def test_run_sync_opens_an_event_loop_for_what_must_be_awaited(way: str, told: Told) -> None:
    engine = ENGINES[way]()
    story = play(engine, "plain")
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), nothing_in_between)
    engine.run_sync([1, 2], max_epochs=2)
    assert story == told["plain"][0]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_run_sync_takes_async_data_and_prefetch(prefetch: int, told: Told) -> None:
    for data in (AsyncData([1, 2]), [1, 2], AsyncData([1, 2]).__aiter__):
        engine: AnyEngine = Engine(step)
        story = play(engine, "plain")
        engine.run_sync(data, max_epochs=2, epoch_length=2, prefetch=prefetch)
        assert story == told["plain"][0]


def test_run_sync_awaits_a_handler_of_an_own_event_that_the_step_fires() -> None:
    handled: list[int] = []

    def fires(engine: AnyEngine, batch: int) -> None:
        engine.fire_event(Own.HALF)

    async def handler(engine: AnyEngine) -> None:
        await settle()
        handled.append(engine.state.iteration)

    engine: AnyEngine = Engine(fires)
    engine.register_events(*Own)
    engine.add_event_handler(Own.HALF, handler)
    engine.run_sync([1, 2])
    assert handled == [1, 2]


async def test_step_on_the_worker_waits_for_a_handler_of_an_own_event() -> None:
    seen: list[str] = []

    def fires(engine: AnyEngine, batch: int) -> None:
        seen.append("before")
        engine.fire_event(Own.HALF)
        seen.append("after")

    async def handler(engine: AnyEngine) -> None:
        await settle()
        seen.append("handled")

    engine: AnyEngine = Engine(fires)
    engine.register_events(*Own)
    engine.add_event_handler(Own.HALF, handler)
    await engine.run([1])
    assert seen == ["before", "handled", "after"]


async def test_step_on_the_event_loop_emits_and_awaits() -> None:
    seen: list[str] = []

    async def emits(engine: AnyEngine, batch: int) -> None:
        await engine.emit(Own.HALF)
        seen.append("after")

    async def handler(engine: AnyEngine) -> None:
        await settle()
        seen.append("handled")

    engine: AnyEngine = Engine(emits)
    engine.register_events(*Own)
    engine.add_event_handler(Own.HALF, handler)
    await engine.run([1])
    assert seen == ["handled", "after"]


# By hand


def begin(engine: AnyEngine, data: Any, **limits: int) -> Generator[Any, Any, None]:
    """Return the story of a run, for the test to advance."""
    given = limits.get("max_epochs"), limits.get("max_iters"), limits.get("epoch_length")
    generator: Generator[Any, Any, None] = engine._session._begin(engine, adapt(data), given)[1]
    return generator


def awaited(story: Generator[Any, Any, None]) -> list[Any]:
    """Advance the story to its end, and return what it wanted to have awaited, besides its signals to the driver."""
    return [one for one in story if isinstance(one, Awaitable)]


def test_story_yields_nothing_but_what_must_be_awaited() -> None:
    engine = Engine(double)
    seen = record(engine)
    assert awaited(begin(engine, [1, 2], max_epochs=2)) == []
    assert seen == PLAIN


def test_story_yields_what_the_step_returned_and_goes_on_with_what_it_is_sent() -> None:
    engine: AnyEngine = Engine(async_step)
    engine.state.acts = {}
    outputs: list[int] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    story = begin(engine, [1, 2])
    first = next(story)
    assert (engine.state.iteration, outputs) == (1, [])
    second = story.send(10)
    assert (engine.state.iteration, outputs) == (2, [10])
    with pytest.raises(StopIteration):
        story.send(20)
    assert outputs == [10, 20]
    for wanted in (first, second):
        assert isinstance(wanted, Coroutine)
        wanted.close()


def test_error_thrown_where_something_was_awaited_is_the_steps() -> None:
    engine: AnyEngine = Engine(async_step)
    seen = record(engine, "IC EXC C")
    story = begin(engine, [1, 2])
    next(story).close()
    boom = Boom()
    story.throw(boom)  # a signal: clean-up begins
    with pytest.raises(Boom) as raised:
        awaited(story)
    assert raised.value is boom
    assert "the step" in boom.__notes__[0]
    assert seen == ["EXC@1/1"]


# Nested, and left


@pytest.mark.parametrize("way", ["worker", "thread=False", "async step"])
@pytest.mark.parametrize("inner", ["worker", "thread=False", "async step"])
async def test_another_engine_runs_in_an_async_handler(inner: str, way: str, told: Told) -> None:
    evaluator = ENGINES[inner]()
    evaluations = play(evaluator, "plain")
    trainer = ENGINES[way]()
    story = play(trainer, "plain")

    @trainer.on(Events.EPOCH_COMPLETED)
    async def evaluate() -> None:
        await evaluator.run([1, 2], max_epochs=2)

    await trainer.run([1, 2], max_epochs=2)
    assert story == told["plain"][0]
    assert evaluations == story * 2


async def test_another_engine_runs_in_a_plain_handler_on_the_worker() -> None:
    evaluator, trainer = Engine(double), Engine(double)
    evaluations, story = record(evaluator), record(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run_sync([1, 2], max_epochs=2))
    await trainer.run([1, 2], max_epochs=2)
    assert story == PLAIN
    assert evaluations == PLAIN * 2


def test_another_engine_runs_in_a_plain_handler_without_an_event_loop() -> None:
    evaluator, trainer = Engine(double), Engine(double)
    evaluations, story = record(evaluator), record(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run_sync([1, 2], max_epochs=2))
    trainer.run_sync([1, 2], max_epochs=2)
    assert story == PLAIN
    assert evaluations == PLAIN * 2


def test_error_of_an_engine_in_a_handler_comes_out_of_both_as_it_was_raised() -> None:
    boom = Boom()

    def explode(engine: AnyEngine, batch: int) -> None:
        raise boom

    evaluator: AnyEngine = Engine(explode)
    trainer = Engine(double)
    told = record(evaluator, "EXC"), record(trainer, "EXC")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run_sync([1]))
    with pytest.raises(Boom) as raised:
        trainer.run_sync([1, 2])
    assert raised.value is boom
    assert told == (["EXC@1/1"], ["EXC@1/2"])


@pytest.mark.parametrize("way", ENGINES)
async def test_data_that_ends_early_warns_and_ends_on_an_event_loop_too(way: str) -> None:
    for data in (iter([1, 2, 3]), AsyncData([1, 2, 3]).__aiter__()):
        engine = ENGINES[way]()
        engine.state.acts = {}
        seen = record(engine, "ES IC EC C")
        with pytest.warns(DataExhaustedWarning, match="3 of 6"):
            await engine.run(data, max_epochs=3, epoch_length=2)
        assert seen == "ES@1/0 IC@1/1 IC@1/2 EC@1/2 ES@2/2 IC@2/3 EC@2/3 C@2/3".split()


@pytest.mark.parametrize("way", ENGINES)
async def test_unknown_length_is_found_on_an_event_loop_too(way: str) -> None:
    engine = ENGINES[way]()
    engine.state.acts = {}
    seen = record(engine, "EC DSI C")
    await engine.run(Unsized(1, 2), max_epochs=2)
    assert seen == ["EC@1/2", "DSI@2/2", "EC@2/4", "C@2/4"]


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
@pytest.mark.parametrize("way", ENGINES)
async def test_stop_iteration_is_an_error_on_an_event_loop_too(way: str, error: type[Exception]) -> None:
    stop = error("mine")

    def raise_stop(_: AnyEngine) -> None:
        raise stop

    for where in ("step@1/1", "IS@1/1"):
        engine = ENGINES[way]()
        engine.state.acts = {where: raise_stop}
        engine.add_event_handler(
            Events.ITERATION_STARTED, lambda engine: engine.state.acts.pop("IS@1/1", lambda engine: None)(engine)
        )
        seen = record(engine, "EXC C")
        with pytest.raises(RuntimeError) as raised:
            await engine.run([1, 2])
        cause: BaseException | None = raised.value
        while cause is not None and cause is not stop:
            cause = cause.__cause__
        assert cause is stop
        assert seen == ["EXC@1/1"]


def generated(opened: list[int], closed: list[int]) -> Iterator[int]:
    opened.append(1)
    try:
        yield from range(9)
    finally:
        closed.append(1)


async def generated_async(opened: list[int], closed: list[int]) -> AsyncIterator[int]:
    opened.append(1)
    try:
        for number in range(9):
            await settle()
            yield number
    finally:
        await settle()
        closed.append(1)


@pytest.mark.covering(2)
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("ends", ["completes", "terminate", "fail", "interrupt"])
@pytest.mark.parametrize("make", [generated, generated_async])
async def test_generator_that_the_engine_opened_is_closed(make: Callable[..., Any], ends: str, prefetch: int) -> None:
    opened: list[int] = []
    closed: list[int] = []
    acts: dict[str, Callable[[AnyEngine], object]] = {
        "terminate": lambda engine: engine.terminate(),
        "fail": fail,
        "interrupt": lambda engine: engine.interrupt(),
    }
    engine: AnyEngine = Engine(step)
    engine.state.acts = {"step@1/2": acts[ends]} if ends in acts else {}
    data = functools.partial(make, opened, closed)
    try:
        await engine.run(data, epoch_length=3, prefetch=prefetch)
    except Boom:
        assert ends == "fail"
    if ends == "interrupt":
        assert not closed
        await engine.run(data, prefetch=prefetch)
    assert opened == closed == [1]


@pytest.mark.parametrize("ends", ["completes", "terminate", "fail"])
@pytest.mark.parametrize("way", ENGINES)
async def test_engine_is_freed_by_reference_count_after_its_run(way: str, ends: str) -> None:
    engine = ENGINES[way]()
    acts: dict[str, Callable[[AnyEngine], object]] = {"terminate": lambda engine: engine.terminate(), "fail": fail}
    engine.state.acts = {"step@1/1": acts[ends]} if ends in acts else {}
    gc.collect()
    gc.disable()
    try:
        await run_and_forget(engine)
        reference = weakref.ref(engine)
        del engine
        assert reference() is None
    finally:
        gc.enable()


async def run_and_forget(engine: AnyEngine) -> None:
    run: Awaitable[object] = engine.run([1, 2])
    try:
        await run
    except Boom:
        return

"""A run leaves nothing to the garbage collector, and an engine that is dropped is freed with all that it holds.

Otherwise memory of a GPU stays until the collector runs; and the worker processes of a DataLoader are ended by it, in
whatever thread it runs, which waits for them: the event loop, say.
"""

import gc
import logging
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.record import AnyEngine, Boom
from support.ways_out import WAYS, cancel_in_clean_up, complete, interrupt_and_leave

from aengine import Engine, Event, Events, Service

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


class Value:
    """A batch, or an output, which would be a tensor."""


class Data:
    def __iter__(self) -> Iterator[Value]:
        return iter([Value() for _ in range(8)])


class SizedData(Data):
    def __len__(self) -> int:
        return 8


class GeneratedData:
    def __iter__(self) -> Iterator[Value]:
        for _ in range(8):
            yield Value()


class AsyncData:
    async def __aiter__(self) -> AsyncIterator[Value]:
        for _ in range(8):
            await checkpoint()
            yield Value()


class ManagedData(AsyncData):
    def __len__(self) -> int:
        return 8

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *error: object) -> None: ...


KINDS = [Data, SizedData, GeneratedData, AsyncData, ManagedData]


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def collect() -> Counter[str]:
    """Return how many objects of ours the collector finds, by type."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return Counter(type(one).__name__ for one in gc.garbage if is_ours(one))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def is_ours(one: Any) -> bool:
    code = next((getattr(one, name, None) for name in ("f_code", "gi_code", "cr_code", "ag_code", "__code__")), None)
    module = type(one).__module__ if code is None else code.co_filename.replace("/", ".")
    return isinstance(one, Value | Boom) or "aengine." in f"{module}."


async def settle(held: "list[weakref.ref[Any]]") -> None:
    """Event loops and threads drop what they ran last a little later."""
    for _ in range(1000):
        await anyio.sleep(0.0005)
        if not any(one() is not None for one in held):
            return


@pytest.mark.covering(2)
@both_threads
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("way", [*WAYS, interrupt_and_leave])
async def test_an_engine_is_freed_when_it_is_dropped(
    thread: Thread,
    kind: Callable[[], Any],
    prefetch: int,
    way: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    anyio_backend_name: str,
) -> None:
    is_given_up = way.__name__ in ("interrupt_and_leave", "interrupt_and_begin_anew")
    if anyio_backend_name == "trio" and kind.__name__ == "AsyncData" and is_given_up:
        pytest.skip("an async generator that is given up is trio's to end, which warns, and holds it meanwhile")
    if way is cancel_in_clean_up and prefetch:
        return  # what the end of the grace cuts off may wait for the collector
    monkeypatch.setattr(logging.getLogger("aengine.engine"), "disabled", True)  # pytest keeps what is logged
    with without_collector():
        grace = 0.01 if way is cancel_in_clean_up else 30
        engine: AnyEngine = Engine(lambda engine, batch: Value(), thread=thread, grace=grace)
        data = kind()
        await way(engine, data, prefetch)
        held = [weakref.ref(one) for one in (engine, engine.state, data) if one is not None]
        held += [weakref.ref(one) for one in (engine.state.output, engine.state.batch) if isinstance(one, Value)]
        del engine, data
        await settle(held)
        assert [one() for one in held] == [None] * len(held)
        assert collect() == {}


async def subscribed(engine: AnyEngine) -> None:
    async def handle(event: Event) -> None:
        await checkpoint()

    engine.subscribe(Events.ITERATION_COMPLETED, handle)
    engine.subscribe(Events.ITERATION_COMPLETED, lambda event: None, overflow="latest")
    await complete(engine, Data(), 2)


async def streamed(engine: AnyEngine) -> None:
    async def read() -> None:
        async with engine.stream(Events.ITERATION_COMPLETED) as events:
            task_status.set()
            async for _ in events:
                pass

    task_status = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await task_status.wait()
        await complete(engine, Data(), 0)


async def served(engine: AnyEngine) -> None:
    class Serving(Service):
        async def serve(self, engine: AnyEngine) -> None:
            await anyio.sleep_forever()

    engine.add_service(Serving())
    await complete(engine, Data(), 0)


async def failing(engine: AnyEngine) -> None:
    def boom() -> None:
        raise Boom

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), boom)
    with pytest.raises(Boom):
        await complete(engine, Data(), 2)


async def nested(engine: AnyEngine) -> None:
    inner: AnyEngine = Engine(lambda engine, batch: Value())

    async def evaluate() -> None:
        await inner.run(Data())

    engine.add_event_handler(Events.EPOCH_COMPLETED, evaluate)
    await complete(engine, Data(), 0)


async def waited_for(engine: AnyEngine) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(engine.wait_completed, 3)
        await complete(engine, Data(), 0)


async def loaded(engine: AnyEngine) -> None:
    await complete(engine, SizedData(), 0)
    other: AnyEngine = Engine(lambda engine, batch: Value())
    other.load_state_dict(engine.state_dict())
    await other.run(SizedData(), 3)


async def with_a_task_that_lives_on(engine: AnyEngine) -> None:
    """It was started in a handler, and has the context of the run."""

    async def live() -> None:
        await anyio.sleep_forever()

    def start() -> None:
        group.start_soon(live)

    async with anyio.create_task_group() as group:

        @engine.on(Events.STARTED)
        async def start_here() -> None:
            start()

        await complete(engine, Data(), 0)
        group.cancel_scope.cancel()


@both_threads
@pytest.mark.parametrize(
    "way", [subscribed, streamed, served, failing, nested, waited_for, loaded, with_a_task_that_lives_on]
)
async def test_what_takes_part_in_a_run_does_not_hold_the_engine(thread: Thread, way: Callable[..., Any]) -> None:
    with without_collector():
        engine: AnyEngine = Engine(lambda engine, batch: Value(), thread=thread)
        await way(engine)
        held = [weakref.ref(one) for one in (engine, engine.state, engine.state.output) if one is not None]
        del engine
        await settle(held)
        assert [one() for one in held] == [None] * len(held)
        assert collect() == {}


@pytest.mark.parametrize("end", ["completed", "terminated", "interrupted", "failed"])
def test_run_sync_leaves_nothing_to_the_collector(end: str) -> None:
    def step(engine: AnyEngine, batch: Any) -> Value:
        if engine.state.iteration == 3:
            if end == "failed":
                raise Boom
            if end != "completed":
                engine.terminate() if end == "terminated" else engine.interrupt()
        return Value()

    with without_collector():
        engine: AnyEngine = Engine(step)
        try:
            engine.run_sync(GeneratedData(), max_epochs=2)
        except Boom:
            assert end == "failed"
        held = [weakref.ref(one) for one in (engine, engine.state, engine.state.output) if one is not None]
        del engine
        assert [one() for one in held] == [None] * len(held)
        assert collect() == {}

"""A cancellation that nothing requested of the run: that of a future which other code has cancelled.

It raises the same exception as a cancellation of the run does. Let out as one, it would end the task quietly, and a
task group would take the run for cancelled. asyncio only: trio's Cancelled is raised by scopes, and by nothing else.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.backends import Backend

from aengine import Engine, Event, Events, Service, StopReason, StrayCancellation

AnyEngine = Engine[Any, Any]

pytestmark = pytest.mark.filterwarnings("ignore::aengine.DataExhaustedWarning")


@pytest.fixture(autouse=True)
def _asyncio_only(anyio_backend: Backend) -> None:
    if anyio_backend[0] != "asyncio":
        pytest.skip("trio has no such cancellation")


def given_up() -> "asyncio.Future[Any]":
    """Return what other code has cancelled."""
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    return future


async def give_up_soon() -> None:
    """Await what is cancelled meanwhile."""
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.cancel)
    await future


async def in_wait_for() -> None:
    await asyncio.wait_for(given_up(), 30)


async def in_a_scope() -> None:
    with anyio.move_on_after(30):
        await given_up()


async def in_a_shield() -> None:
    with anyio.CancelScope(shield=True):
        await give_up_soon()


async def in_a_task() -> None:
    task = asyncio.ensure_future(anyio.sleep_forever())
    await checkpoint()
    task.cancel()
    await task


async def at_once() -> None:
    await given_up()


WAYS: list[Callable[[], Awaitable[None]]] = [at_once, give_up_soon, in_wait_for, in_a_scope, in_a_shield, in_a_task]


async def async_step(engine: AnyEngine, batch: int) -> int:
    await checkpoint()
    return batch


def step(engine: AnyEngine, batch: int) -> int:
    return batch


def raise_given_up(future: "asyncio.Future[Any]") -> None:
    """As plain code meets it: by `result()`."""
    future.result()


class Reports:
    def __init__(self, engine: AnyEngine) -> None:
        self.raised: list[BaseException] = []
        self.cancelled = 0
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._raised)
        engine.add_event_handler(Events.CANCELLED, self._cancelled)

    def _raised(self, engine: AnyEngine, error: BaseException) -> None:
        self.raised.append(error)

    def _cancelled(self) -> None:
        self.cancelled += 1


async def check_it_fails(
    engine: AnyEngine, run: Callable[[], Awaitable[object]], where: str | None = None
) -> StrayCancellation:
    reports = Reports(engine)
    with anyio.fail_after(30), pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(run())  # type: ignore[arg-type]  # a coroutine, in each case
    (error,) = caught.value.exceptions
    assert isinstance(error, StrayCancellation)
    assert isinstance(error.__cause__, asyncio.CancelledError)
    assert reports.raised == [error]
    assert not reports.cancelled
    assert engine.state.stop_reason is StopReason.FAILED
    if where is not None:
        assert where in "\n".join([str(error), *getattr(error, "__notes__", ())])
    return error


# In what the loop awaits, and calls


@pytest.mark.parametrize("way", WAYS)
async def test_in_an_async_step(way: Callable[[], Awaitable[None]]) -> None:
    async def awaits(engine: AnyEngine, batch: int) -> int:
        if batch == 2:
            await way()
        return batch

    engine: AnyEngine = Engine(awaits)
    await check_it_fails(engine, lambda: engine.run(range(4)), "in the step")
    assert engine.state_dict()["iteration"] == 2
    with pytest.raises(StrayCancellation):  # it did not complete: its batch comes again
        await engine.run(range(4))


@pytest.mark.parametrize("thread", [True, False])
async def test_in_a_plain_step(thread: bool) -> None:  # noqa: FBT001 -- of Engine's own
    future = given_up()

    def asks(engine: AnyEngine, batch: int) -> int:
        if batch == 2:
            raise_given_up(future)
        return batch

    engine: AnyEngine = Engine(asks, thread=thread)
    await check_it_fails(engine, lambda: engine.run(range(4)))


@pytest.mark.parametrize("make", [lambda: Engine(step), lambda: Engine(step, thread=False), lambda: Engine(async_step)])
@pytest.mark.parametrize("event", [Events.STARTED, Events.GET_BATCH_STARTED, Events.ITERATION_COMPLETED])
async def test_in_an_inline_handler(make: Callable[[], AnyEngine], event: Events) -> None:
    engine = make()
    engine.add_event_handler(event, at_once)
    await check_it_fails(engine, lambda: engine.run(range(4)), event.name)


async def test_in_a_handler_that_a_plain_step_waits_for() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: engine.fire_event("asked"))
    engine.register_events("asked")
    engine.add_event_handler("asked", at_once)
    await check_it_fails(engine, lambda: engine.run(range(4)))


async def test_a_plain_step_may_catch_what_it_waits_for() -> None:
    def fires(engine: AnyEngine, batch: int) -> int:
        with contextlib.suppress(StrayCancellation):
            engine.fire_event("asked")
        return batch

    engine: AnyEngine = Engine(fires)
    engine.register_events("asked")
    engine.add_event_handler("asked", at_once)
    await engine.run(range(4))
    assert engine.state.stop_reason is StopReason.COMPLETED


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("make", [lambda: Engine(step), lambda: Engine(step, thread=False), lambda: Engine(async_step)])
async def test_in_the_data(make: Callable[[], AnyEngine], prefetch: int) -> None:
    async def batches() -> AsyncIterator[int]:
        yield 1
        yield 2
        await at_once()
        yield 3

    engine = make()
    await check_it_fails(engine, lambda: engine.run(batches, prefetch=prefetch))
    assert engine.state.iteration == 2


async def test_in_plain_data() -> None:
    future = given_up()

    def batches() -> Iterator[int]:
        yield 1
        raise_given_up(future)

    engine: AnyEngine = Engine(step)
    await check_it_fails(engine, lambda: engine.run(batches))


async def test_in_closing_the_data() -> None:
    async def batches() -> AsyncIterator[int]:
        try:
            for number in range(10):
                yield number
        finally:
            await at_once()

    engine: AnyEngine = Engine(async_step)
    with pytest.raises(StrayCancellation):
        await engine.run(batches, max_iters=2)


async def test_in_a_handler_of_the_failure_itself() -> None:
    def fails(engine: AnyEngine, batch: int) -> int:
        raise OSError("first")

    engine: AnyEngine = Engine(fails)
    engine.add_event_handler(Events.EXCEPTION_RAISED, at_once)
    with pytest.raises(ExceptionGroup) as caught:
        await engine.run(range(4))
    assert [type(error) for error in caught.value.exceptions] == [OSError, StrayCancellation]


async def test_in_a_run_inside_a_step() -> None:
    async def awaits(engine: AnyEngine, batch: int) -> int:
        await given_up()
        return batch

    inner: AnyEngine = Engine(awaits, name="inner")

    async def runs(engine: AnyEngine, batch: int) -> int:
        await inner.run([1])
        return batch

    outer: AnyEngine = Engine(runs, name="outer")
    await check_it_fails(outer, lambda: outer.run(range(2)), "engine 'inner'")
    assert inner.state.stop_reason is StopReason.FAILED


# Beside the loop


@pytest.mark.parametrize("make", [lambda: Engine(step), lambda: Engine(async_step)])
async def test_in_a_subscriber(make: Callable[[], AnyEngine]) -> None:
    engine = make()

    @engine.subscribe(Events.ITERATION_COMPLETED(once=2))
    async def handle(event: Event) -> None:
        await at_once()

    await check_it_fails(engine, lambda: engine.run(range(4)), "handle")


async def test_in_a_subscriber_whose_errors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    engine: AnyEngine = Engine(async_step)
    seen: list[int] = []

    @engine.subscribe(Events.ITERATION_COMPLETED, on_error="log")
    async def handle(event: Event) -> None:
        seen.append(event.iteration)
        if event.iteration == 2:
            await at_once()

    with caplog.at_level(logging.ERROR, "aengine"):
        await engine.run(range(4))
    assert seen == [1, 2, 3, 4]
    assert engine.state.stop_reason is StopReason.COMPLETED
    assert engine.statistics().listeners[0].errors == 1
    assert "StrayCancellation" in caplog.text


@pytest.mark.parametrize("where", ["serve", "flush", "run_ended"])
async def test_in_a_service(where: str) -> None:
    class Hooked(Service):
        async def serve(self, engine: AnyEngine) -> None:
            if where == "serve":
                await at_once()

        async def flush(self) -> None:
            if where == "flush":
                await give_up_soon()

        async def run_ended(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
            if where == "run_ended":
                await give_up_soon()

    engine: AnyEngine = Engine(async_step)
    engine.add_service(Hooked())
    with pytest.raises(StrayCancellation, match=where):
        await engine.run(range(4))


# Other ways to run


@pytest.mark.parametrize("make", [lambda: Engine(step), lambda: Engine(async_step)])
async def test_in_a_step_under_iterate(make: Callable[[], AnyEngine]) -> None:
    engine = make()
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), at_once)

    async def iterate() -> None:
        async with engine.iterate(range(4)) as iterations:
            async for _ in iterations:
                pass

    await check_it_fails(engine, iterate, "ITERATION_COMPLETED")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [lambda: Engine(step), lambda: Engine(async_step)])
async def test_in_the_body_of_iterate(make: Callable[[], AnyEngine], way: Callable[[], Awaitable[None]]) -> None:
    engine = make()

    async def iterate() -> None:
        async with engine.iterate(range(4)) as iterations:
            async for event in iterations:
                if event.iteration == 2:
                    await way()

    await check_it_fails(engine, iterate, "body")


def test_in_run_sync_without_an_event_loop() -> None:
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    future.cancel()
    loop.close()
    engine: AnyEngine = Engine(lambda engine, batch: raise_given_up(future))
    reports = Reports(engine)
    with pytest.raises(StrayCancellation) as caught:
        engine.run_sync([1])
    assert reports.raised == [caught.value]
    assert engine.state.stop_reason is StopReason.FAILED


def test_in_run_sync_with_an_async_step() -> None:
    async def awaits(engine: AnyEngine, batch: int) -> int:
        await given_up()
        return batch

    with pytest.raises(StrayCancellation):
        Engine(awaits).run_sync([1])


# Beside a cancellation of the run


@pytest.mark.parametrize("way", ["native", "scope"])
async def test_a_run_that_is_cancelled_while_its_step_awaits_what_is_given_up_is_cancelled(way: str) -> None:
    scope, begun = anyio.CancelScope(), anyio.Event()

    async def awaits(engine: AnyEngine, batch: int) -> int:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            await given_up()
        return batch

    engine: AnyEngine = Engine(awaits)
    reports = Reports(engine)

    async def run() -> None:
        with scope:
            await engine.run(range(4))

    task = asyncio.ensure_future(run())
    await begun.wait()
    if way == "native":
        task.cancel()
    else:
        scope.cancel()
    await asyncio.wait([task])
    assert task.cancelled() == (way == "native")
    assert reports.cancelled == 1
    assert not reports.raised
    assert engine.state.stop_reason is StopReason.CANCELLED

"""`finally: await ...` in a step, a handler or data, under asyncio's own cancellation: it ends, within the grace.

anyio's scopes cancel each await anew, and a run is cancelled by such scopes inside. By hand, `Task.cancel()` is raised
once, so that code written for asyncio cleans up without a shield.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.backends import Backend

from aengine import Engine, Event, Events, StopReason

AnyEngine = Engine[Any, Any]

pytestmark = pytest.mark.every_event_loop


@pytest.fixture(autouse=True)
def _asyncio_only(anyio_backend: Backend) -> None:
    if anyio_backend[0] != "asyncio":
        pytest.skip("asyncio's own cancellation")


class Place:
    """User code that waits, and cleans up when it is cancelled: in several turns, and on real time."""

    def __init__(self) -> None:
        self.waits = anyio.Event()
        self.cleaned_up = 0
        self.cancellations = 0

    async def wait(self) -> None:
        try:
            self.waits.set()
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            self.cancellations += 1
            raise
        finally:
            await checkpoint()
            await anyio.sleep(0.001)  # a connection is closed
            await asyncio.wait_for(anyio.sleep(0.001), 30)
            self.cleaned_up += 1


async def step(engine: AnyEngine, batch: int) -> int:
    await checkpoint()
    return batch


def plain(engine: AnyEngine, batch: int) -> int:
    return batch


def in_a_step(place: Place) -> tuple[AnyEngine, Any]:
    async def waits(engine: AnyEngine, batch: int) -> int:
        if batch == 2:
            await place.wait()
        return batch

    return Engine(waits), range(4)


def in_a_handler(place: Place) -> tuple[AnyEngine, Any]:
    engine: AnyEngine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), place.wait)
    return engine, range(4)


def in_a_handler_beside_the_worker(place: Place) -> tuple[AnyEngine, Any]:
    engine: AnyEngine = Engine(plain)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), place.wait)
    return engine, range(4)


def in_a_handler_that_a_plain_step_waits_for(place: Place) -> tuple[AnyEngine, Any]:
    engine: AnyEngine = Engine(lambda engine, batch: engine.fire_event("asked"))
    engine.register_events("asked")
    engine.add_event_handler("asked", place.wait)
    return engine, range(4)


def in_the_data(place: Place) -> tuple[AnyEngine, Any]:
    async def batches() -> AsyncIterator[int]:
        yield 1
        await place.wait()

    return Engine(step), batches


def in_data_that_is_pulled_ahead(place: Place) -> tuple[AnyEngine, Any]:
    engine, data = in_the_data(place)
    engine.state.prefetch = 2
    return engine, data


class Connection:
    """Data that waits as it is entered."""

    def __init__(self, place: Place) -> None:
        self._place = place

    async def __aenter__(self) -> None:
        await self._place.wait()

    async def __aexit__(self, *_: object) -> None:
        """It was not entered."""

    async def __aiter__(self) -> AsyncIterator[int]:
        yield 1


def in_entering_the_data(place: Place) -> tuple[AnyEngine, Any]:
    return Engine(step), Connection(place)


def in_a_run_in_a_step(place: Place) -> tuple[AnyEngine, Any]:
    async def waits(engine: AnyEngine, batch: int) -> int:
        await place.wait()
        return batch

    async def runs(engine: AnyEngine, batch: int) -> int:
        await Engine(waits).run([1])
        return batch

    return Engine(runs), range(4)


def after_a_shield(place: Place) -> tuple[AnyEngine, Any]:
    """The cancellation comes in a shield of the user's, and is raised after it."""

    async def waits(engine: AnyEngine, batch: int) -> int:
        with anyio.CancelScope(shield=True):
            place.waits.set()
            await anyio.sleep(0.03)
        await place.wait()
        return batch

    return Engine(waits), range(4)


PLACES = [
    in_a_step,
    in_a_handler,
    in_a_handler_beside_the_worker,
    in_a_handler_that_a_plain_step_waits_for,
    in_the_data,
    in_data_that_is_pulled_ahead,
    in_entering_the_data,
    in_a_run_in_a_step,
    after_a_shield,
]


async def by_run(engine: AnyEngine, data: Any) -> None:
    await engine.run(data, max_epochs=1, prefetch=getattr(engine.state, "prefetch", 0))


async def by_iterate(engine: AnyEngine, data: Any) -> None:
    prefetch = getattr(engine.state, "prefetch", 0)
    async with engine.iterate(data, max_epochs=1, prefetch=prefetch) as iterations:
        async for _ in iterations:
            pass


async def by_cancelling(running: "asyncio.Task[None]") -> None:
    running.cancel()


async def by_insisting(running: "asyncio.Task[None]") -> None:
    while not running.done():
        running.cancel()
        await checkpoint()


@pytest.mark.covering(2)
@pytest.mark.parametrize("cancel", [by_cancelling, by_insisting])
@pytest.mark.parametrize("run", [by_run, by_iterate])
@pytest.mark.parametrize("make", PLACES)
async def test_it_ends(
    make: Callable[[Place], tuple[AnyEngine, Any]],
    run: Callable[[AnyEngine, Any], Awaitable[None]],
    cancel: Callable[["asyncio.Task[None]"], Awaitable[None]],
) -> None:
    if cancel is by_insisting and (run is by_iterate or make is in_a_run_in_a_step):
        pytest.skip("a second cancellation, of the task in which the run is awaited, is another")
    place = Place()
    engine, data = make(place)
    running = asyncio.ensure_future(run(engine, data))
    await place.waits.wait()
    with anyio.fail_after(30):
        await cancel(running)
        await asyncio.wait([running])
    assert running.cancelled(), "a cancellation goes on, always"
    assert (place.cleaned_up, place.cancellations) == (1, 1)
    assert engine.state.stop_reason is StopReason.CANCELLED


@pytest.mark.parametrize("make", PLACES)
async def test_it_ends_under_a_timeout_of_asyncio(make: Callable[[Place], tuple[AnyEngine, Any]]) -> None:
    place = Place()
    engine, data = make(place)

    async def run() -> None:
        async with asyncio.timeout(None) as timeout:
            group.start_soon(pass_deadline_of, timeout)
            await by_run(engine, data)

    async def pass_deadline_of(limit: asyncio.Timeout) -> None:
        await place.waits.wait()
        limit.reschedule(0)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            with pytest.raises(TimeoutError):
                await run()
    assert (place.cleaned_up, place.cancellations) == (1, 1)
    assert engine.state.stop_reason is StopReason.CANCELLED


@pytest.mark.parametrize("make", [in_a_step, in_a_handler, in_the_data, in_data_that_is_pulled_ahead])
async def test_it_ends_when_something_beside_the_loop_fails(make: Callable[[Place], tuple[AnyEngine, Any]]) -> None:
    place = Place()
    engine, data = make(place)

    @engine.subscribe(Events.STARTED)
    async def fails(event: Event) -> None:
        await place.waits.wait()
        raise OSError("beside")

    with anyio.fail_after(30), pytest.raises(OSError, match="beside"):
        await by_run(engine, data)
    assert (place.cleaned_up, place.cancellations) == (1, 1)
    assert engine.state.stop_reason is StopReason.FAILED


@pytest.mark.parametrize("make", [in_the_data, in_data_that_is_pulled_ahead])
async def test_it_ends_when_the_wait_for_data_is_ended_by_terminate(
    make: Callable[[Place], tuple[AnyEngine, Any]],
) -> None:
    place = Place()
    engine, data = make(place)
    async with anyio.create_task_group() as group:
        group.start_soon(by_run, engine, data)
        await place.waits.wait()
        engine.terminate()
    assert (place.cleaned_up, place.cancellations) == (1, 1)
    assert engine.state.stop_reason is StopReason.TERMINATED


async def test_after_the_grace_each_await_is_cancelled() -> None:
    waits, cancellations = anyio.Event(), 0

    async def insists(engine: AnyEngine, batch: int) -> int:
        nonlocal cancellations
        waits.set()
        for _ in range(3):
            try:
                await anyio.sleep_forever()
            except asyncio.CancelledError:
                cancellations += 1
        return batch

    engine: AnyEngine = Engine(insists, grace=0.05)
    running = asyncio.ensure_future(engine.run(range(4)))
    await waits.wait()
    running.cancel()
    with anyio.fail_after(30):
        await asyncio.wait([running])
    assert running.cancelled()
    assert cancellations == 3
    assert engine.state.iteration == 1
    assert engine.state.stop_reason is StopReason.CANCELLED


async def test_a_scope_around_the_run_cancels_each_await_as_anyio_does() -> None:
    place = Place()
    engine, data = in_a_step(place)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(by_run, engine, data)
            await place.waits.wait()
            scope.cancel()
    assert (place.cleaned_up, place.cancellations) == (0, 1)


async def test_a_task_group_in_a_step_is_cancelled_with_its_tasks_which_clean_up() -> None:
    waits, cleaned_up = anyio.Event(), 0

    async def child() -> None:
        nonlocal cleaned_up
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.001)
            cleaned_up += 1

    async def spawns(engine: AnyEngine, batch: int) -> int:
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
            group.create_task(child())
            await checkpoint()
            waits.set()
        return batch

    running = asyncio.ensure_future(Engine(spawns).run(range(4)))
    await waits.wait()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert cleaned_up == 2

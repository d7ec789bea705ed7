"""Runs that were given up: their event loop was closed under them, or a second cancellation left their step at work."""

import asyncio
import logging
import threading
from collections.abc import Callable
from itertools import count
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
import pytest

from aengine import Engine, EngineBusy, Event, Events, Service, StopReason

AnyEngine: TypeAlias = Engine[Any, Any]


async def async_step(engine: AnyEngine, batch: int) -> int:
    await anyio.lowlevel.checkpoint()
    return batch


def plain_step(engine: AnyEngine, batch: int) -> int:
    return batch


ENGINES: dict[str, Callable[[], AnyEngine]] = {
    "worker": lambda: Engine(plain_step, grace=10),
    "loop": lambda: Engine(plain_step, thread=False, grace=10),
    "async": lambda: Engine(async_step, grace=10),
}
each_engine = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES.keys())


def leave(engine: AnyEngine, *arguments: Any, until: Callable[[], bool], **options: Any) -> None:
    """Run on an event loop that is closed while the run is under way, as after Ctrl-C in `run_until_complete()`."""
    loop = asyncio.new_event_loop()

    async def look() -> None:
        while not until():  # noqa: ASYNC110 -- a thread sees to it, whose own event loop is to be told nothing
            await asyncio.sleep(0.001)

    task = loop.create_task(engine.run(*arguments, **options))
    loop.run_until_complete(look())
    for left in asyncio.all_tasks(loop):
        left._log_destroy_pending = False  # type: ignore[attr-defined]  # which is what is wanted here
    assert not task.done()
    loop.close()


def run_again(engine: AnyEngine, how: str, *arguments: Any, **options: Any) -> None:
    if how == "run_sync":
        engine.run_sync(*arguments, **options)
    else:
        anyio.run(lambda: engine.run(*arguments, **options), backend=how)


pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)  # what Python says of tasks that are dropped


@each_engine
@pytest.mark.parametrize("how", ["run_sync", "asyncio", "trio"])
def test_an_engine_whose_event_loop_is_gone_runs_again(make: Callable[[], AnyEngine], how: str) -> None:
    engine = make()
    seen: list[int] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(engine.state.iteration))
    data = range(10**9)
    leave(engine, data, until=lambda: engine.state.iteration > 3)
    assert not engine.is_running
    assert str(engine.state.stop_reason) == "cancelled"
    assert engine.terminate() is False
    engine.add_event_handler(Events.ITERATION_COMPLETED, engine.terminate)
    run_again(engine, how, data)
    assert engine.state.stop_reason is StopReason.TERMINATED
    assert seen == list(range(1, len(seen) + 1))
    assert engine.state.output == len(seen) - 1


def test_everything_beside_the_run_ends_with_it_and_takes_part_in_the_next(caplog: pytest.LogCaptureFixture) -> None:
    told: list[object] = []
    handled: list[int] = []

    class Told(Service):
        async def serve(self, engine: AnyEngine) -> None:
            await asyncio.sleep(1000)

        def run_started(self, engine: AnyEngine) -> None:
            told.append("started")

        def run_abandoned(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
            told.append(reason)

        async def run_ended(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
            told.append(reason)

    engine = Engine(async_step)
    engine.add_service(Told())

    @engine.subscribe(Events.ITERATION_COMPLETED, overflow="latest")
    async def handle(event: Event) -> None:
        await asyncio.sleep(0.01)
        handled.append(event.iteration)

    read: list[int] = []

    async def main() -> None:
        async with engine.stream(Events.ITERATION_COMPLETED, overflow="latest") as events:
            thread = threading.Thread(
                target=lambda: leave(engine, range(10**9), until=lambda: engine.state.iteration > 3)
            )
            thread.start()
            await asyncio.to_thread(thread.join)
            assert not engine.is_running
            read.extend([event.iteration async for event in events])

    with caplog.at_level(logging.WARNING):
        asyncio.run(asyncio.wait_for(main(), 10))
    assert "was closed during its run" in caplog.text
    assert read
    assert told == ["started", StopReason.CANCELLED]
    del handled[:]
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: engine.terminate() if handled else None)
    asyncio.run(engine.run(range(10**9)))
    assert told[2:] == ["started", StopReason.TERMINATED]
    assert handled


def test_a_step_is_the_last_one_after_its_event_loop_was_closed() -> None:
    """And the next run waits for it."""
    may_end, steps = threading.Event(), []

    def step(engine: AnyEngine, batch: int) -> None:
        steps.append(batch)
        if batch == 3:
            assert may_end.wait(30)

    engine = Engine(step, grace=10)
    leave(engine, range(10**9), until=lambda: len(steps) == 4)
    threading.Timer(0.1, may_end.set).start()
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=6), engine.terminate)
    asyncio.run(engine.run(range(10**9)))
    assert steps == list(range(6))


def test_a_worker_whose_event_loop_was_closed_stops_by_itself() -> None:
    engine, steps = Engine(plain_step), count()

    def step(engine: AnyEngine, batch: int) -> int:
        return next(steps)

    engine = Engine(step)
    leave(engine, count(), max_iters=10**9, until=lambda: engine.state.iteration > 3)
    driver = engine._session._driver
    assert driver is not None
    for _ in range(1000):
        if not driver.is_at_work:
            break
        threading.Event().wait(0.01)
    assert not driver.is_at_work
    assert engine._session._driver is driver  # nothing has looked at it


def test_what_such_a_step_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    may_end, has_begun = threading.Event(), threading.Event()
    boom = ValueError("boom")

    def step(engine: AnyEngine, batch: int) -> None:
        has_begun.set()
        assert may_end.wait(30)
        if batch == 0:
            raise boom

    engine = Engine(step)
    leave(engine, range(3), until=has_begun.is_set)
    with caplog.at_level(logging.ERROR):
        may_end.set()
        with pytest.raises(ValueError, match="boom"):
            asyncio.run(engine.run(range(3)))
    errors = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert errors == [boom]
    assert "failed after its run was given up" in caplog.text


def test_an_engine_with_a_step_that_does_not_end_is_busy() -> None:
    may_end, has_begun = threading.Event(), threading.Event()

    def step(engine: AnyEngine, batch: int) -> None:
        has_begun.set()
        assert may_end.wait(30)

    engine = Engine(step, grace=0.05)
    leave(engine, range(3), until=has_begun.is_set)
    for _ in range(2):
        with pytest.raises(EngineBusy, match="still makes a step"):
            asyncio.run(engine.run(range(3)))
    with pytest.raises(EngineBusy, match="still makes a step"):
        engine.load_state_dict(engine.state_dict())
    may_end.set()
    asyncio.run(engine.run(range(3)))
    assert engine.state.iteration == 3


def test_a_step_that_waits_for_a_closed_event_loop_waits_no_longer() -> None:
    """It fires an event with an async handler, which nothing will await."""
    hears = threading.Event()

    def step(engine: AnyEngine, batch: int) -> None:
        engine.fire_event("ask")

    engine = Engine(step, grace=10)
    engine.register_events("ask")

    async def answer() -> None:
        hears.set()
        await asyncio.sleep(1000)

    handle = engine.add_event_handler("ask", answer)
    leave(engine, range(3), until=hears.is_set)
    handle.remove()
    asyncio.run(engine.run(range(3)))
    assert engine.state.iteration == 3


def test_after_a_second_cancellation_the_next_run_waits_for_the_step_that_was_left() -> None:
    may_end, steps = threading.Event(), []

    def step(engine: AnyEngine, batch: int) -> None:
        steps.append(batch)
        if len(steps) == 1:
            assert may_end.wait(30)

    engine = Engine(step, grace=10)

    async def main() -> None:
        task = asyncio.ensure_future(engine.run(range(3)))
        while not steps:  # noqa: ASYNC110 -- likewise
            await asyncio.sleep(0.001)
        while not task.done():
            for each in asyncio.all_tasks() - {asyncio.current_task()}:
                each.cancel()
            await asyncio.sleep(0.001)
        assert not engine.is_running
        threading.Timer(0.1, may_end.set).start()
        await engine.run(range(3))

    asyncio.run(main())
    assert steps == [0, 1, 2]  # the step that was left has completed
    assert engine.state.stop_reason is StopReason.COMPLETED

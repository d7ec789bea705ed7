"""What listens to an engine, and whether the engine is paused."""

from typing import Any

import anyio
from support.record import AnyEngine, double

from aengine import Engine, Event, Events, ListenerInfo


async def test_listeners_are_shown_as_they_were_written() -> None:
    engine: AnyEngine = Engine(double)

    def steer(engine: AnyEngine) -> None: ...

    async def tell(event: Event) -> None: ...

    engine.add_event_handler(Events.ITERATION_COMPLETED(every=100) | Events.COMPLETED, steer)
    handle = engine.subscribe(Events.EPOCH_COMPLETED | Events.COMPLETED, tell)
    engine.subscribe(Events.STARTED, tell, name="the log")
    here = "test_listeners_are_shown_as_they_were_written.<locals>"
    expected = (
        ListenerInfo(f"{here}.steer", "ITERATION_COMPLETED(every=100)", "inline"),
        ListenerInfo(f"{here}.steer", "COMPLETED", "inline"),
        ListenerInfo(f"{here}.tell", "EPOCH_COMPLETED | COMPLETED", "subscriber"),
        ListenerInfo("the log", "STARTED", "subscriber"),
    )
    assert engine.listeners() == expected
    async with engine.stream(Events.ITERATION_COMPLETED):
        assert engine.listeners() == (
            *expected,
            ListenerInfo("stream of ITERATION_COMPLETED", "ITERATION_COMPLETED", "stream"),
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.wait_completed, 1)  # which is none
            await anyio.wait_all_tasks_blocked()
            assert len(engine.listeners()) == 5
            assert set(engine.statistics().handlers) == {f"{here}.steer"}
            await engine.run([1])
    handle.remove()
    assert [one.kind for one in engine.listeners()] == ["inline", "inline", "subscriber"]


async def test_paused_from_the_call_of_pause_to_that_of_resume() -> None:
    async def step(engine: AnyEngine, batch: Any) -> None:
        await anyio.lowlevel.checkpoint()

    engine: AnyEngine = Engine(step)
    assert not engine.is_paused
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(engine.run, range(10))
        await engine.wait_completed(2)
        engine.pause()
        assert engine.is_paused
        await anyio.wait_all_tasks_blocked()
        at = engine.state.iterations_completed
        await anyio.wait_all_tasks_blocked()
        assert engine.state.iterations_completed == at < 10
        engine.resume()
        assert not engine.is_paused
    assert engine.state.iterations_completed == 10

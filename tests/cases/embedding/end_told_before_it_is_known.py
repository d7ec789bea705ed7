"""When a stream is over, its reader can tell how the run ended: reason and error are set, and nothing runs any more."""

import contextlib

import anyio
import anyio.lowlevel

from aengine import Engine, Events, StopReason


async def step(engine: Engine, batch: int) -> None:
    await anyio.lowlevel.checkpoint()
    if batch == 3:
        raise ValueError("boom")


async def main() -> None:
    engine = Engine(step)

    async def train() -> None:
        with contextlib.suppress(ValueError):
            await engine.run([1, 2, 3])

    async with anyio.create_task_group() as tasks, engine.stream(Events.ITERATION_COMPLETED) as events:
        tasks.start_soon(train)
        assert [event.iteration async for event in events] == [1, 2]
        assert not engine.is_running
        assert engine.state.stop_reason is StopReason.FAILED
        assert "boom" in str(engine.state.error)

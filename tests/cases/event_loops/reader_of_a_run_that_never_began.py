"""A reader beside a run that is refused: the stream ends with the run, however that ends."""

import contextlib
from typing import Any

import anyio

from aengine import Engine, Events

RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "good": ([1, 2], {}),
    "empty": ([], {}),
    "a wrong argument": ([1], {"prefetch": -1}),
    "no data": (7, {}),
}


async def main() -> None:
    for name, (data, options) in RUNS.items():
        engine = Engine(lambda engine, batch: batch)
        read: list[int] = []
        async with engine.stream(Events.ITERATION_COMPLETED) as events, anyio.create_task_group() as tasks:

            async def run(engine: Engine = engine, data: Any = data, options: dict[str, Any] = options) -> None:
                with contextlib.suppress(Exception):
                    await engine.run(data, **options)

            tasks.start_soon(run)
            with anyio.move_on_after(10) as waiting:
                read += [event.iteration async for event in events]
        assert not waiting.cancelled_caught, f"{name}: the reader waits for ever"
        assert read == ([1, 2] if name == "good" else [])

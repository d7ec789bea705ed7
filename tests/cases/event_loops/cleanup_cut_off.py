"""A task is cancelled once. The `finally` of a step runs to its end as it would without an engine, awaits included."""

import asyncio
from typing import Any

from aengine import Engine

begun = asyncio.Event()
closed: list[int] = []


async def step(engine: Engine | None, batch: int) -> None:
    begun.set()
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)  # as  await connection.close()  gives way
        closed.append(batch)


async def by_hand() -> None:
    for batch in range(3):
        await step(None, batch)


async def main() -> None:
    runs: tuple[Any, ...] = (by_hand(), Engine(step).run(range(3)))
    for running in runs:
        closed.clear()
        begun.clear()
        task = asyncio.create_task(running)
        await begun.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert closed == [0]

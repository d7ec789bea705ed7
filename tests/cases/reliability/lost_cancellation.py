"""A cancelled scope ends a run whose step keeps the event loop busy, over async data that is prefetched."""

import time
from collections.abc import AsyncIterator

import anyio
import anyio.lowlevel

from aengine import Engine, StopReason


async def numbers() -> AsyncIterator[int]:
    while True:
        await anyio.lowlevel.checkpoint()
        yield 1


async def main() -> None:
    engine = Engine(lambda engine, batch: time.sleep(0.001), thread=False)
    with anyio.move_on_after(0.1):
        await engine.run(numbers, max_iters=3000, prefetch=2)
    assert engine.state.stop_reason is StopReason.CANCELLED
    assert engine.state.iteration < 1000, "the cancellation was lost"

"""Async data that keeps a time limit, a cancel scope, open while it yields: a run over it can be terminated."""

from collections.abc import AsyncIterator

import anyio
import anyio.lowlevel

from aengine import Engine, Events, StopReason


async def batches() -> AsyncIterator[int]:
    with anyio.fail_after(60):  # for the whole pass
        for number in range(10):
            await anyio.lowlevel.checkpoint()
            yield number


async def main() -> None:
    for prefetch in (0, 2):
        engine = Engine(lambda engine, batch: batch, grace=1)
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.terminate)
        state = await engine.run(batches, prefetch=prefetch)
        assert (state.iteration, state.stop_reason) == (3, StopReason.TERMINATED)

"""The ways in which a run over data ends, for tests of what must end with it, whatever the data and the step are."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.record import AnyEngine, Boom

from aengine import Events, StopReason


async def complete(engine: AnyEngine, data: Any, prefetch: int) -> None:
    await engine.run(data, 3, prefetch=prefetch)


async def be_shorter(engine: AnyEngine, data: Any, prefetch: int) -> None:
    await engine.run(data, 3, epoch_length=5, prefetch=prefetch)


async def terminate(engine: AnyEngine, data: Any, prefetch: int) -> None:
    with engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.terminate):
        await engine.run(data, prefetch=prefetch)


async def terminate_and_resume(engine: AnyEngine, data: Any, prefetch: int) -> None:
    await terminate(engine, data, prefetch)
    await engine.run(data, prefetch=prefetch)


async def terminate_epoch(engine: AnyEngine, data: Any, prefetch: int) -> None:
    with engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.terminate_epoch):
        await engine.run(data, 2, prefetch=prefetch)


async def fail(engine: AnyEngine, data: Any, prefetch: int) -> None:
    def boom() -> None:
        raise Boom

    with engine.add_event_handler(Events.ITERATION_STARTED(once=3), boom), pytest.raises(Boom):
        await engine.run(data, prefetch=prefetch)


async def fail_beside(engine: AnyEngine, data: Any, prefetch: int) -> None:
    async def boom(event: object) -> None:
        raise Boom

    engine.add_event_handler(Events.ITERATION_COMPLETED, checkpoint)
    with engine.subscribe(Events.ITERATION_COMPLETED(once=3), boom), pytest.raises(Boom):
        await engine.run(data, 10**6, prefetch=prefetch)


async def cancel(engine: AnyEngine, data: Any, prefetch: int) -> None:
    with anyio.CancelScope() as scope:

        async def cancel() -> None:
            scope.cancel()
            await checkpoint()

        engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), cancel)
        await engine.run(data, prefetch=prefetch)
    assert scope.cancelled_caught


async def cancel_in_clean_up(engine: AnyEngine, data: Any, prefetch: int) -> None:
    """The handlers of CANCELLED take all the grace there is, so that the loop itself closes nothing."""
    engine.add_event_handler(Events.CANCELLED, anyio.sleep_forever)
    await cancel(engine, data, prefetch)


async def change_data(engine: AnyEngine, data: Any, prefetch: int) -> None:
    with engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.set_data, range(10)):
        await engine.run(data, epoch_length=10, prefetch=prefetch)


async def interrupt(engine: AnyEngine, data: Any, prefetch: int) -> None:
    with engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), engine.interrupt):
        await engine.run(data, 2, prefetch=prefetch)
        while engine.state.stop_reason is StopReason.INTERRUPTED:
            await engine.run(prefetch=prefetch)


async def interrupt_and_leave(engine: AnyEngine, data: Any, prefetch: int) -> None:
    with engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.interrupt):
        await engine.run(data, 2, prefetch=prefetch)


async def interrupt_and_begin_anew(engine: AnyEngine, data: Any, prefetch: int) -> None:
    with engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.interrupt):
        await engine.run(data, prefetch=prefetch)
    engine.state.max_epochs = engine.state.max_iters = None
    await engine.run(data, prefetch=prefetch)


async def iterate(engine: AnyEngine, data: Any, prefetch: int) -> None:
    async with engine.iterate(data, 2, prefetch=prefetch) as iterations:
        async for _ in iterations:
            await checkpoint()


async def leave_iterate(engine: AnyEngine, data: Any, prefetch: int) -> None:
    async with engine.iterate(data, 2, prefetch=prefetch) as iterations:
        async for event in iterations:
            if event.iteration == 3:
                break


WAYS: list[Callable[..., Any]] = [
    complete, be_shorter, terminate, terminate_and_resume, terminate_epoch, fail, fail_beside, cancel,
    cancel_in_clean_up, change_data, interrupt, interrupt_and_begin_anew, iterate, leave_iterate,
]  # fmt: skip

"""The ways in which a run of an engine ends, for tests of what must end with it; and a look at what was freed."""

import weakref
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from support.record import AnyEngine, Boom

from aengine import DataExhausted, Events


async def complete(engine: AnyEngine) -> None:
    await engine.run([1])


async def fail(engine: AnyEngine) -> None:
    def raise_boom() -> None:
        raise Boom

    engine.add_event_handler(Events.ITERATION_STARTED(once=2), raise_boom)
    with pytest.raises(Boom):
        await engine.run([1, 2, 3])


async def terminate(engine: AnyEngine) -> None:
    engine.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: engine.terminate(skip_completed=True))
    await engine.run([1, 2, 3])


async def cancel(engine: AnyEngine) -> None:
    with anyio.CancelScope() as scope:

        @engine.on(Events.ITERATION_STARTED(once=2))
        async def cancel() -> None:
            scope.cancel()
            await anyio.sleep_forever()

        await engine.run([1, 2, 3])
    assert scope.cancelled_caught


async def run_without_data(engine: AnyEngine) -> None:
    def nothing() -> Iterator[int]:
        yield from ()

    with pytest.raises(DataExhausted):
        await engine.run(nothing)


async def is_freed(what: "weakref.ref[Any]") -> bool:
    """Return whether nothing refers to it any more. Event loops and threads drop what they ran last a little later."""
    for _ in range(1000):
        if what() is None:
            return True
        await anyio.sleep(0.001)
    return False

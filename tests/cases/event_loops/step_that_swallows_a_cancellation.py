"""A step returns whatever comes, the cancellation included. The cancelled run ends after that step, plain or async."""

import threading
import time
from itertools import count
from typing import Any

import anyio

from aengine import Engine, StopReason


async def awaited(engine: Engine, batch: int) -> None:
    try:
        await anyio.sleep(0.05)
    except BaseException:  # noqa: BLE001 -- what users write so that one failed request does not end a training
        return


def plain(engine: Engine, batch: int) -> None:
    time.sleep(0.05)


async def main() -> None:
    steps: tuple[Any, ...] = (plain, awaited)
    for step in steps:
        engine = Engine(step, grace=1)
        last_resort = threading.Timer(5, engine.terminate)
        last_resort.start()
        with anyio.move_on_after(0.12):
            await engine.run(count())
        last_resort.cancel()
        assert engine.state.stop_reason is StopReason.CANCELLED
        assert engine.state.iteration < 50

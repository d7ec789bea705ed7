"""A signal handler cancels the task of the run without waking the event loop, as a notebook's stop button does.

The run ends soon after, with a plain step as with an async one.
"""

import asyncio
import os
import signal
import threading
import time
from typing import Any

from aengine import Engine


def plain(engine: Engine, batch: int) -> None:
    time.sleep(0.02)


async def awaited(engine: Engine, batch: int) -> None:
    await asyncio.sleep(0.02)


async def cell(step: Any) -> float:
    """Run the engine until the signal has ended it. Returns the seconds that this took."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    signal.signal(signal.SIGINT, lambda *_: loop.call_soon(task.cancel))  # not call_soon_threadsafe
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.perf_counter()
    try:
        await Engine(step).run(range(250))
    except asyncio.CancelledError:
        task.uncancel()
    return time.perf_counter() - began


def main() -> None:
    for step in (awaited, plain):
        lasted = asyncio.run(cell(step))
        assert lasted < 2.5, f"{step.__name__} step: the signal came after 0.2 s, the end after {lasted:.1f} s"

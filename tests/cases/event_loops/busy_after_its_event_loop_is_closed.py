"""Ctrl-C out of run_until_complete() leaves the task pending: once its event loop is closed, the engine runs again."""

import asyncio
import gc
import os
import signal
import threading
from itertools import count

from aengine import Engine


async def step(engine: Engine, batch: int) -> None:
    await asyncio.sleep(0.02)


def main() -> None:
    engine = Engine(step, grace=1)
    loop = asyncio.new_event_loop()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        loop.run_until_complete(engine.run(count(), max_iters=10**6))
    except KeyboardInterrupt:
        engine.terminate()
    loop.close()
    gc.collect()
    asyncio.run(engine.run(count(), max_iters=engine.state.iteration + 3))

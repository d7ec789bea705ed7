"""stop_on_signals() beside uvicorn: SIGTERM ends the training, and then the server, too."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator
from itertools import count

import uvicorn
from starlette.applications import Starlette

from aengine import Engine, StopReason, stop_on_signals

trainer = Engine(lambda engine, batch: asyncio.sleep(0.02), thread=False)


async def train() -> None:
    with stop_on_signals(trainer):
        await trainer.run(count())


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    task = asyncio.create_task(train())
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    yield
    await task
    assert trainer.state.stop_reason is StopReason.TERMINATED
    os._exit(0)  # uvicorn would raise the signal once more, for whatever started it


def main() -> None:
    last_resort = threading.Timer(10, os._exit, (1,))
    last_resort.daemon = True
    last_resort.start()
    uvicorn.run(Starlette(lifespan=lifespan), port=0, log_level="warning")
    raise AssertionError("the server ended without its lifespan")

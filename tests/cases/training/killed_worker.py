"""A worker of a DataLoader is killed, as for want of memory: the run says so as soon on the worker thread as off it."""

import os
import signal
import time
from typing import Any

import anyio
from torch.utils.data import DataLoader, Dataset

from aengine import Engine


class Killed(Dataset[int]):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)  # so that the main thread waits for a batch, and not elsewhere, when the signal comes
        if index == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def seconds(backend: str, *, thread: bool) -> float:
    began = time.perf_counter()
    engine: Engine[Any, None] = Engine(lambda engine, batch: None, thread=thread)
    try:
        anyio.run(engine.run, DataLoader(Killed(), batch_size=4, num_workers=2), backend=backend)
    except (RuntimeError, OSError):
        return time.perf_counter() - began
    raise AssertionError("the run ended as if all was well")


def main(backend: str) -> None:
    # torch's handler of SIGCHLD raises in the main thread only; in others it looks every 5 s.
    assert seconds(backend, thread=True) - seconds(backend, thread=False) < 2

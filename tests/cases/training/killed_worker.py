"""A worker of a DataLoader is killed, as for want of memory: the run says so about as soon as a loop by hand does."""

import os
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import anyio
from torch.utils.data import DataLoader, Dataset

from aengine import Engine


class Killed(Dataset[int]):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        if index == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def by_hand(loader: Iterable[Any]) -> None:
    for _ in loader:
        pass


def seconds(iterate: Callable[[Iterable[Any]], object]) -> float:
    began = time.perf_counter()
    try:
        iterate(DataLoader(Killed(), batch_size=4, num_workers=2))
    except (RuntimeError, OSError):
        return time.perf_counter() - began
    raise AssertionError("the run ended as if all was well")


def main(backend: str) -> None:
    # torch's handler of SIGCHLD raises in the main thread only; in others it looks every 5 s.
    engine: Engine[Any, None] = Engine(lambda engine, batch: None)
    assert seconds(partial(anyio.run, engine.run, backend=backend)) - seconds(by_hand) < 2

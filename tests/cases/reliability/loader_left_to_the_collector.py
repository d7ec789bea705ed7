"""A dropped engine leaves no DataLoader to the cyclic collector, which would stand still 5 s for each worker of it.

Whatever thread it happens to run in, such as the event loop's, would stand still meanwhile. After a bare loop the
workers end at once.
"""

import gc
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import torch
from torch.utils.data import DataLoader, TensorDataset

from aengine import Engine


def loader() -> Any:
    return DataLoader(TensorDataset(torch.zeros(64, 4)), 8, num_workers=2, persistent_workers=True)


async def by_hand() -> None:
    for _ in loader():
        await anyio.lowlevel.checkpoint()


async def with_engine() -> None:
    await Engine(lambda engine, batch: None).run(loader())


async def seconds_after(run: Callable[[], Awaitable[None]]) -> float:
    """Return how long the collector takes when `run` is over, as it comes by itself sooner or later."""
    await run()
    await anyio.wait_all_tasks_blocked()
    began = time.perf_counter()
    gc.collect()
    return time.perf_counter() - began


async def main() -> None:
    gc.collect()
    seconds_by_hand, seconds = await seconds_after(by_hand), await seconds_after(with_engine)
    assert seconds < seconds_by_hand + 3, f"the collector stood still for {seconds:.1f} s"

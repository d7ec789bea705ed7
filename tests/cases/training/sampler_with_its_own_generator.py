"""Resumed in the second epoch, with a sampler that draws from a generator of its own.

The samples come in the order of a run that was not stopped, or a warning says that they do not.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler

from aengine import Checkpoint, Engine, Events


class Numpy(Sampler[int]):
    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.permutation(12).tolist())

    def __len__(self) -> int:
        return 12


class Wrapper(Sampler[int]):
    def __init__(self) -> None:
        self.inner = RandomSampler(range(12), generator=torch.Generator().manual_seed(0))

    def __iter__(self) -> Iterator[int]:
        return iter(self.inner)

    def __len__(self) -> int:
        return 12


async def train(directory: str, sampler: Sampler[int], stop: int | None = None) -> list[int]:
    seen: list[int] = []
    engine = Engine(lambda engine, batch: seen.append(int(batch)))
    async with Checkpoint(directory, {"model": torch.nn.Linear(1, 1)}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=6))
        await checkpoint.restore()
        if stop is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop), engine.terminate)
        data: Any = range(12)
        await engine.run(DataLoader(data, sampler=sampler), max_epochs=2)
    return seen


async def main() -> None:
    makers: tuple[Callable[[], Sampler[int]], ...] = (Numpy, Wrapper)
    for number, make in enumerate(makers):
        whole = await train(f"whole-{number}", make())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            seen = await train(f"stopped-{number}", make(), stop=18) + await train(f"stopped-{number}", make())
        assert seen == whole or told, "another order than without the stop, and no warning says so"

"""Data of every kind, for engines that say what a batch is."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Self

import anyio
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from aengine import Data, Engine


def step(engine: Engine, batch: int) -> float:
    return batch / 2


trainer = Engine(step)


def numbers() -> Iterator[int]:
    yield from range(3)


async def async_numbers() -> AsyncIterator[int]:
    for number in range(3):
        await anyio.sleep(0)
        yield number


class Counter:
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def __len__(self) -> int:
        return 3


class Connection:
    """A context manager that is what it gives."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def __aiter__(self) -> AsyncIterator[int]:
        yield 1


class Squares(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        if index > 9:
            raise IndexError
        return index**2


@asynccontextmanager
async def opened(path: str) -> AsyncGenerator[list[int]]:
    yield [len(path)]


async def main() -> None:
    await trainer.run([1, 2, 3], 2)
    await trainer.run(range(3), max_epochs=2, prefetch=4)
    await trainer.run((1, 2), max_iters=5, epoch_length=2)
    await trainer.run({1: "one"})
    await trainer.run(numbers())
    await trainer.run(numbers)
    await trainer.run(lambda: [1, 2, 3])
    await trainer.run(async_numbers())
    await trainer.run(async_numbers)
    await trainer.run(Counter())
    await trainer.run(Connection())
    await trainer.run(Squares())
    await trainer.run(opened("data"))
    await trainer.run(None, epoch_length=3)
    async with trainer.iterate(numbers(), epoch_length=3, max_epochs=1) as iterations:
        async for event in iterations:
            trainer.set_data([event.iteration])


async def train(engine: Engine[int, float], data: Data[int]) -> None:
    await engine.run(data)


def train_step(engine: Engine, batch: list[torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return (x - y).mean()


loader = DataLoader(TensorDataset(torch.zeros(4), torch.zeros(4)), batch_size=2)
loss = Engine(train_step).run_sync(loader, max_epochs=3).output.item()
identity = Engine(lambda engine, batch: batch)
identity.run_sync(loader)
identity.run_sync("abc")
anyio.run(main)
anyio.run(train, trainer, [1, 2])

"""Resumed with another batch size, an epoch is a pass over the data, or the run is refused, or a warning says so."""

import warnings
from typing import Any

import torch
from torch.utils.data import DataLoader

from aengine import Checkpoint, Engine, Events


async def train(directory: str, size: int, stop: int | None = None) -> list[tuple[int, list[int]]]:
    seen: list[tuple[int, list[int]]] = []
    engine = Engine(lambda engine, batch: seen.append((engine.state.epoch, batch.tolist())))
    async with Checkpoint(directory, {"model": torch.nn.Linear(1, 1)}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        await checkpoint.restore()
        if stop is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop), engine.terminate)
        data: Any = range(12)
        await engine.run(DataLoader(data, batch_size=size), max_epochs=3)
    return seen


async def main() -> None:
    for before, after in ((1, 2), (2, 1)):
        await train(f"from-{before}", before, stop=4)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                seen = await train(f"from-{before}", after)
            except ValueError:  # refused
                continue
        second = [sample for epoch, samples in seen if epoch == 2 for sample in samples]
        assert told or sorted(second) == list(range(12))

"""Hugging Face's iterable dataset in persistent workers, resumed: the later epochs are whole, as without the stop."""

import warnings

import datasets  # type: ignore[import-untyped]  # as it is
import torch
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]  # as it is

from aengine import Checkpoint, Engine, Events


async def train(directory: str, stop: int | None = None) -> list[tuple[int, list[int]]]:
    seen: list[tuple[int, list[int]]] = []
    data = datasets.Dataset.from_dict({"x": list(range(24))}).to_iterable_dataset(num_shards=4)
    loader = StatefulDataLoader(data, batch_size=2, num_workers=2, persistent_workers=True)
    engine = Engine(lambda engine, batch: seen.append((engine.state.epoch, batch["x"].tolist())))
    async with Checkpoint(directory, {"model": torch.nn.Linear(1, 1)}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        await checkpoint.restore()
        if stop is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop), engine.terminate)
        await engine.run(loader, max_epochs=3)
    return seen


async def main() -> None:
    whole = await train("whole")
    for stop in (5, 12):
        first = await train(f"stopped-{stop}", stop)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rest = await train(f"stopped-{stop}")
        assert first + rest == whole, f"stopped at {stop}"

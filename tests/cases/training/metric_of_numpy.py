"""A metric that numpy computed can be saved, and decides which checkpoint is best."""

import numpy as np
import torch

from aengine import Checkpoint, Engine, Events, Keep


async def main() -> None:
    losses: list[float] = []
    engine = Engine(lambda engine, batch: losses.append(float(batch)))
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: engine.state.metrics.update(loss=np.mean(losses)))
    keep = Keep(best=1, metric="loss", mode="min")
    async with Checkpoint("checkpoints", {"model": torch.nn.Linear(1, 1)}, keep=keep) as checkpoint:
        checkpoint.attach(engine, Events.EPOCH_COMPLETED)
        await engine.run(range(3), max_epochs=2)
        assert checkpoint.list()[-1].metrics["loss"] == 1.0

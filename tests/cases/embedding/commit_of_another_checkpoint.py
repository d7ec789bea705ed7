"""CHECKPOINT_COMMITTED says which checkpoint is meant, so that nothing is acknowledged that is not on the disk."""

import torch

from aengine import Checkpoint, Engine, Event, Events
from aengine.checkpoint import CheckpointEvents


async def main() -> None:
    told: list[int] = []
    saved: list[int] = []
    engine = Engine(lambda engine, batch: None)
    async with Checkpoint("checkpoints", {"model": torch.nn.Linear(500, 500)}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=20))

        async def note(event: Event) -> None:
            told.append(event.payload.checkpoint.step)
            assert checkpoint.last_saved is not None
            saved.append(checkpoint.last_saved.step)

        engine.subscribe(CheckpointEvents.CHECKPOINT_COMMITTED, note)
        await engine.run(range(100))
    assert told == saved == [20, 40, 60, 80, 100]

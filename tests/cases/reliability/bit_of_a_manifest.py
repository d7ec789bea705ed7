"""One flipped bit in the newest manifest is found out: restore() takes the checkpoint before that."""

import warnings
from pathlib import Path

import torch

from aengine import Checkpoint, Engine, Events
from aengine.checkpoint import CheckpointInfo


async def train() -> CheckpointInfo | None:
    engine = Engine(lambda engine, batch: None)
    async with Checkpoint("checkpoints", {"model": torch.nn.Linear(2, 2)}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=2))
        info = await checkpoint.restore()
        await engine.run(range(6))
    return info


def damage() -> None:
    manifest = Path("checkpoints", "step-0000000006", "manifest.json")
    data = bytearray(manifest.read_bytes())
    data[data.index(b"serializer")] ^= 1  # "rerializer"
    manifest.write_bytes(data)


async def main() -> None:
    await train()
    damage()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info = await train()
    assert info is not None
    assert info.step == 4

"""A damaged checkpoint in a directory whose name is not UTF-8: restore() takes the one before."""

import os
import warnings
from pathlib import Path

import torch

from aengine import Checkpoint, Engine, Events
from aengine.checkpoint import CheckpointInfo

DIRECTORY = Path(os.fsdecode(b"caf\xe9"))


async def train() -> CheckpointInfo | None:
    engine = Engine(lambda engine, batch: None)
    async with Checkpoint(DIRECTORY, {"model": torch.nn.Linear(2, 2)}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=2))
        info = await checkpoint.restore()
        await engine.run(range(6))
    return info


async def main() -> None:
    await train()
    with (DIRECTORY / "step-0000000006" / "state.pt").open("ab") as file:
        file.write(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info = await train()
    assert info is not None
    assert info.step == 4

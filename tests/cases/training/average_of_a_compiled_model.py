"""The average of a compiled model is loaded into that of a plain one, as for inference."""

from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from aengine import Checkpoint, Engine, Events


async def main() -> None:
    engine = Engine(lambda engine, batch: None)
    linear = torch.nn.Linear(2, 2)
    compiled: Any = torch.compile(linear, backend="eager")
    async with Checkpoint("checkpoints", {"model": compiled, "average": AveragedModel(compiled)}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        await engine.run([1])
    plain = torch.nn.Linear(2, 2)
    average = AveragedModel(plain)
    async with Checkpoint("checkpoints", {"model": plain, "average": average}) as checkpoint:
        await checkpoint.load(only=["model"])
        await checkpoint.load(only=["average"])
    assert torch.equal(plain.weight, linear.weight)
    assert torch.equal(average.module.get_parameter("weight"), linear.weight)

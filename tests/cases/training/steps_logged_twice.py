"""Ended at step 16, resumed from the checkpoint of step 10: the log has each step once, in order."""

import contextlib
import json
from pathlib import Path

import torch

from aengine import Checkpoint, Engine, Events
from aengine.loggers import JSONLines, Tracker


class Crash(Exception): ...


async def train(*, crashes: bool) -> None:
    def step(engine: Engine, batch: int) -> float:
        if crashes and engine.state.iteration == 16:
            raise Crash
        return float(batch)

    engine = Engine(step)
    Tracker(JSONLines("log.jsonl")).attach(engine, Events.ITERATION_COMPLETED)
    async with Checkpoint("checkpoints", {"model": torch.nn.Linear(1, 1)}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=10))
        await checkpoint.restore()
        await engine.run(range(20))


async def main() -> None:
    with contextlib.suppress(Crash):
        await train(crashes=True)
    await train(crashes=False)
    lines = Path("log.jsonl").read_text(encoding="utf-8").splitlines()  # noqa: ASYNC240 -- nothing else runs
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))

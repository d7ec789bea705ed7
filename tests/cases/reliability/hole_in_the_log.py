"""Killed right after a commit: of the steps that the checkpoint covers the log has every line after the resume."""

import json
import signal
import subprocess
import sys
from pathlib import Path

CHILD = """
import os, signal, time
import anyio, torch
from aengine import Checkpoint, Engine, Events
from aengine.checkpoint import CheckpointEvents
from aengine.loggers import JSONLines, Tracker

async def main():
    engine = Engine(lambda engine, batch: time.sleep(0.002))
    values = lambda engine: {"number": engine.state.iteration}
    Tracker(JSONLines("log.jsonl"), values=values).attach(engine, Events.ITERATION_COMPLETED)
    async with Checkpoint("checkpoints", {"model": torch.nn.Linear(2, 2)}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=20))
        if await checkpoint.restore() is None:

            async def die(event):
                os.kill(os.getpid(), signal.SIGKILL)

            engine.subscribe(CheckpointEvents.CHECKPOINT_COMMITTED, die)
        await engine.run(range(60))

anyio.run(main)
"""


def main() -> None:
    command = [sys.executable, "-c", CHILD]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert subprocess.run(command, check=False).returncode == 0
    steps = [json.loads(line)["step"] for line in Path("log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert set(steps) == set(range(1, 61))

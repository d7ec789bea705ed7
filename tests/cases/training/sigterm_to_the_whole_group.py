"""SIGTERM for the whole process group, the DataLoader's workers included, as from SLURM or `timeout`.

The run ends cleanly, with TERMINATE and a checkpoint.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

CHILD = """
import time
import anyio, torch
from torch.utils.data import DataLoader, Dataset
from aengine import Checkpoint, Engine, Events, stop_on_signals

class Slow(Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        time.sleep(0.02)
        return index

def step(engine, batch):
    if engine.state.iteration == 5:
        print("ready", flush=True)

async def main():
    engine = Engine(step)
    async with Checkpoint("checkpoints", {"model": torch.nn.Linear(1, 1)}) as checkpoint:
        checkpoint.attach(engine, Events.EPOCH_COMPLETED | Events.TERMINATE)
        with stop_on_signals(engine):
            await engine.run(DataLoader(Slow(), batch_size=4, num_workers=2))

anyio.run(main)
"""


def main() -> None:
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        os.killpg(child.pid, signal.SIGTERM)
        child.communicate(timeout=60)
    assert child.returncode == 0
    assert list(Path("checkpoints").glob("step-*"))

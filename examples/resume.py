"""A training that is killed again and again, and loses nothing: its losses equal an uninterrupted run's, bit by bit.

    python examples/resume.py                  kills, restarts and compares, in less than a minute
    python examples/resume.py train [FOLDER]   only trains, as on a machine that may be taken away

- `train` saves every 20 iterations, concurrently with the step, and begins by restoring what it finds in FOLDER.
  SIGTERM or Ctrl-C ends it with a last checkpoint. Whatever ended it, the same command resumes.
- Without `train`, it runs `train` as a child process that kills itself, at any moment or in the middle of a save, and
  starts it again, up to four times. Then it runs `train` once without a kill, and compares the losses.

With shuffled data and dropout, equal losses need more than the weights: also the optimizer, the random states, and the
position in the data. Only the model and the optimizer are handed in below; the rest is saved without being asked for.
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    parser = argparse.ArgumentParser(
        description="Train on scikit-learn's digits, killed now and then, and compare the losses."
    )
    parser.add_argument("what", nargs="?", choices=["train"], help="only train (default: kill, restart and compare)")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(), help="for train: folder of checkpoints (default: here)"
    )
    parser.add_argument("--kill", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

import os
import signal
import subprocess
import sys
import tempfile
from random import SystemRandom  # python's own state would be restored, and each kill would come at the same place
from threading import Timer

import anyio
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # comes without types
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aengine import Engine, Events, stop_on_signals
from aengine.checkpoint import Checkpoint, CheckpointEvents

Batch = tuple[Tensor, Tensor]

torch.manual_seed(0)
torch.set_num_threads(1)  # enough for images of 8x8

images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
data = DataLoader(digits, batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def train_step(engine: Engine[Batch, float], batch: Batch) -> float:
    x, y = batch
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


trainer = Engine(train_step)


async def train(folder: Path) -> None:
    async with Checkpoint(folder / "checkpoints", {"model": model, "optimizer": optimizer}) as checkpoint:
        checkpoint.attach(trainer, Events.ITERATION_COMPLETED(every=20, at_end=True))
        with (folder / "losses.txt").open("a") as losses, stop_on_signals(trainer):

            @trainer.on(Events.ITERATION_COMPLETED)
            def write(engine: Engine[Batch, float]) -> None:
                print(engine.state.iteration, engine.state.output, file=losses, flush=True)  # with all digits

            restored = await checkpoint.restore()
            print(f"resuming from step {restored.step}" if restored else "beginning", flush=True)
            state = await trainer.run(data, max_epochs=20)
    print(f"{state.stop_reason} at step {state.iteration} of 580")


def arrange_kill() -> None:
    """Have this process killed at any moment, or as soon as a save is under way."""
    chance = SystemRandom()

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if chance.random() < 0.5:
        trainer.add_event_handler(Events.STARTED, Timer(chance.uniform(0.1, 0.6), kill).start)
    else:
        trainer.register_events(*CheckpointEvents)
        trainer.subscribe(CheckpointEvents.CHECKPOINT_STAGED(once=chance.randint(1, 8)))(kill)


def run_train(folder: Path, *options: str) -> tuple[bool, list[str]]:
    """Run `train` as a child process. Returns whether it finished, and the lines it wrote: steps and their losses."""
    written = folder / "losses.txt"
    before = written.read_text().splitlines() if written.exists() else []
    command = [sys.executable, __file__, "train", str(folder), *options]
    child = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # noqa: S603 -- it is this very file
    if child.returncode not in {0, -signal.SIGKILL}:
        sys.exit(child.returncode)
    return child.returncode == 0, written.read_text().splitlines()[len(before) :]


def compare(folder: Path) -> None:
    print(" run  first step  last step")
    taken: list[str] = []
    is_finished, run = False, 0
    while not is_finished:
        run += 1
        is_finished, steps = run_train(folder / "killed", *(["--kill"] if run < 5 else []))
        taken += steps
        first, last = (steps[n].split()[0] if steps else "-" for n in (0, -1))
        is_inside_save = any((folder / "killed" / "checkpoints").glob(".tmp-*"))
        end = "finished" if is_finished else "killed inside a save" if is_inside_save else "killed"
        print(f"{run:4}  {first:>10}  {last:>9}  {end}", flush=True)

    _, uninterrupted = run_train(folder / "uninterrupted")
    if set(taken) != set(uninterrupted):  # steps that were taken again must have given the same losses
        sys.exit("the losses are not those of a run without a kill")
    again = len(taken) - len(uninterrupted)
    print(f"{len(uninterrupted)} steps, {again} taken again: all losses equal those of a run without a kill")


if __name__ == "__main__":
    if arguments.kill:
        arrange_kill()
    if arguments.what == "train":
        arguments.folder.mkdir(exist_ok=True)
        anyio.run(train, arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            compare(Path(temporary))

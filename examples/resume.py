"""A training that is killed again and again, and loses nothing: its losses equal an uninterrupted run's, bit by bit.

    python examples/resume.py                  the whole story, in less than a minute
    python examples/resume.py train [FOLDER]   the training alone, as on a machine that may be taken away

- `train` saves every 20 iterations, beside the step, and begins by restoring what it finds in FOLDER. SIGTERM or Ctrl-C
  ends it with a last checkpoint. Whatever ends it, the same command goes on.
- The story runs `train` as a child that kills itself, at any moment or in the middle of a save, and starts it again, up
  to four times. Then it runs it once without a kill, and compares the losses.

With a shuffle and dropout, equal losses take more than the weights: the optimizer, the random states, the place in the
data. Nothing below says so; only the model and the optimizer are handed in.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from random import SystemRandom  # python's own would be restored, and the next kill be the same one
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
torch.set_num_threads(1)  # for images of 8x8

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
            def write_down(engine: Engine[Batch, float]) -> None:
                print(engine.state.iteration, engine.state.output, file=losses, flush=True)  # all digits of it

            restored = await checkpoint.restore(trainer)
            print(f"resuming from step {restored.step}" if restored else "beginning", flush=True)
            state = await trainer.run(data, max_epochs=20)
    print(f"{state.stop_reason} at step {state.iteration} of 580")


def die_before_long() -> None:
    """At any moment, or as soon as a save is under way."""
    chance = SystemRandom()

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if chance.random() < 0.5:
        trainer.add_event_handler(Events.STARTED, Timer(chance.uniform(0.1, 0.6), die).start)
    else:
        trainer.register_events(*CheckpointEvents)
        trainer.subscribe(CheckpointEvents.CHECKPOINT_STAGED(once=chance.randint(1, 8)))(die)


def live(folder: Path, *arguments: str) -> tuple[bool, list[str]]:
    """Run `train` as a child. Returns whether it came to its end, and what it wrote down: steps, and their losses."""
    written = folder / "losses.txt"
    before = written.read_text().splitlines() if written.exists() else []
    command = [sys.executable, __file__, "train", str(folder), *arguments]
    child = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # noqa: S603 -- it is this very file
    if child.returncode not in {0, -signal.SIGKILL}:
        sys.exit(child.returncode)
    return child.returncode == 0, written.read_text().splitlines()[len(before) :]


def tell(folder: Path) -> None:
    print("life  first step  last step")
    taken: list[str] = []
    is_over, life = False, 0
    while not is_over:
        life += 1
        is_over, steps = live(folder / "killed", *(["--kill"] if life < 5 else []))
        taken += steps
        first, last = (steps[n].split()[0] if steps else "-" for n in (0, -1))
        is_inside_save = any((folder / "killed" / "checkpoints").glob(".tmp-*"))
        end = "finished" if is_over else "killed inside a save" if is_inside_save else "killed"
        print(f"{life:4}  {first:>10}  {last:>9}  {end}", flush=True)

    _, uninterrupted = live(folder / "uninterrupted")
    if set(taken) != set(uninterrupted):  # the losses of steps that were taken again are among them
        sys.exit("the losses are not those of a run without a kill")
    again = len(taken) - len(uninterrupted)
    print(f"{len(uninterrupted)} steps, {again} taken again: all losses equal those of a run without a kill")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train on scikit-learn's digits, killed now and then.")
    parser.add_argument("what", nargs="?", choices=["train"], help="only the training (default: the whole story)")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="for train: what it keeps (default: here)")
    parser.add_argument("--kill", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.kill:
        die_before_long()
    if chosen.what == "train":
        chosen.folder.mkdir(exist_ok=True)
        anyio.run(train, chosen.folder)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            tell(Path(temporary))

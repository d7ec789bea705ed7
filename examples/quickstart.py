"""Train a small network on the 1,797 handwritten digits of scikit-learn, with validation, a log and a progress bar.

    python examples/quickstart.py [--out FOLDER]

- The step is plain torch. It runs on the engine's own thread, so the event loop stays free.
- An async inline handler runs between two epochs. It sets the learning rate, and decides when to stop.
- Subscribers run concurrently with the step: validation of a snapshot of the weights by a second engine, a log with a
  line of JSON every ten iterations (FOLDER/quickstart.jsonl), a progress bar.

At the end it prints where the time went, and the accuracy on digits that neither training nor validation has seen.
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    parser = argparse.ArgumentParser(
        description="Train a small network on scikit-learn's digits, with validation, a log and a progress bar."
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the log (default: here)")
    arguments = parser.parse_args()

import json
from copy import deepcopy

import anyio
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # comes without types
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm  # type: ignore[import-untyped]  # comes without types

from aengine import Engine, Event, Events

Batch = tuple[Tensor, Tensor]
Weights = dict[str, Tensor]

torch.manual_seed(0)
torch.set_num_threads(1)  # enough for images of 8x8; the other cores run the subscribers

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
training, validation, test = torch.randperm(len(labels)).split([1197, 300, 300])

model = nn.Sequential(
    nn.Conv2d(1, 16, kernel_size=3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, kernel_size=3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Dropout(0.3),
    nn.Linear(32 * 4 * 4, 10),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.3, patience=1)


def train_step(engine: Engine[Batch, float], batch: Batch) -> float:
    x, y = batch
    model.train()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


trainer = Engine(train_step, name="trainer")

# Evaluation is a second engine. It has its own model, because the trainer changes its model meanwhile.
candidate = deepcopy(model).eval()
accuracies: list[float] = []  # on the validation digits, one for each epoch
best: Weights = {}


@torch.inference_mode()
def count_correct(engine: Engine[Batch, int], batch: Batch) -> int:
    x, y = batch
    return int((candidate(x).argmax(dim=1) == y).sum())


evaluator = Engine(count_correct, name="evaluator")


@evaluator.on(Events.ITERATION_COMPLETED)
def add_up(engine: Engine[Batch, int]) -> None:
    engine.state.correct += engine.state.output


async def accuracy(weights: Weights, which: Tensor) -> float:
    candidate.load_state_dict(weights)
    evaluator.state.correct = 0
    await evaluator.run(list(zip(images[which].split(100), labels[which].split(100), strict=True)))
    return float(evaluator.state.correct / len(which))


def copy_weights(engine: Engine[Batch, float]) -> Weights:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@trainer.subscribe(Events.EPOCH_COMPLETED, snapshot=copy_weights)
async def validate(event: Event[float, Weights]) -> None:
    accuracies.append(await accuracy(event.snapshot, validation))
    if accuracies[-1] == max(accuracies):
        best.update(event.snapshot)


@trainer.on(Events.EPOCH_COMPLETED(after=1))
async def adjust(engine: Engine[Batch, float]) -> None:
    # Wait for the validation of the previous epoch; this epoch's begins after the inline handlers. It has had a whole
    # epoch to finish, so the wait is short, and accuracies[-1] is the same in every run.
    await engine.flush()
    scheduler.step(accuracies[-1])
    if scheduler.get_last_lr()[0] < 1e-4:
        engine.terminate()


async def main(out: Path) -> None:
    data = DataLoader(TensorDataset(images[training], labels[training]), batch_size=32, shuffle=True)
    path = anyio.Path(out) / "quickstart.jsonl"
    async with await path.open("w") as log:
        with tqdm(total=20 * len(data), desc="training", unit="step") as bar:

            @trainer.subscribe(Events.ITERATION_COMPLETED(every=10, at_end=True), name="log")
            async def write(event: Event) -> None:
                line = {"iteration": event.iteration, "epoch": event.epoch, "loss": event.output, "time": event.time}
                await log.write(json.dumps(line) + "\n")

            @trainer.subscribe(Events.ITERATION_COMPLETED, overflow="latest", name="progress bar")
            def show(event: Event) -> None:
                bar.update(event.iteration - bar.n)

            state = await trainer.run(data, max_epochs=20)

    spent = trainer.statistics()
    inline = sum(spent.handlers.values())
    print(f"{state.iteration} iterations, {state.stop_reason}; log in {path}")
    print(f"of {spent.total:.2f} s: step {spent.step:.2f}, data {spent.data:.2f}, inline handlers {inline:.2f}")
    for one in spent.listeners:
        print(f"concurrently: {one.name} handled {one.handled} events in {one.busy:.2f} s, dropped {one.dropped}")
    print(f"test accuracy {await accuracy(best, test):.3f}")


if __name__ == "__main__":
    anyio.run(main, arguments.out)

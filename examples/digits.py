"""A complete training on handwritten digits: what a real training has around its step, and where each part runs.

    python examples/digits.py [--out FOLDER]

- Inline handlers run between two steps. They change the training, or follow the weights: the schedule with its warm-up,
  the moving average of the weights, the NaN guard, and validation of the average, which decides when to stop and which
  checkpoint is the best.
- Subscribers run concurrently with the step: two logs (FOLDER/log.jsonl; FOLDER/tensorboard, for
  `tensorboard --logdir`), a progress bar, the writing of checkpoints, and the accuracy of the average on the training
  digits, which nothing depends on.

Ctrl-C and SIGTERM end it cleanly, with a checkpoint. The same command resumes from there, and reaches the same numbers
as a run that was never stopped. At the end the best checkpoint is tested, on digits that no part of the training used.
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    parser = argparse.ArgumentParser(
        description="Train on scikit-learn's digits with metrics, a schedule, early stopping, checkpoints and logs."
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for logs and checkpoints (default: here)")
    arguments = parser.parse_args()

from copy import deepcopy
from typing import Any

import anyio
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # comes without types
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection, RunningMean
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from aengine import Engine, Event, Events, stop_on_signals
from aengine.checkpoint import Checkpoint, Keep
from aengine.handlers import EarlyStopping, NanGuard, ProgressBar, format_statistics
from aengine.loggers import JSONLines, TensorBoard, Tracker, numbers_of
from aengine.training import (
    AverageHandler,
    MetricHandler,
    OptimizerEvents,
    SchedulerHandler,
    create_supervised_evaluator,
    create_supervised_trainer,
)

EPOCHS, PATIENCE = 40, 8

torch.manual_seed(0)
torch.set_num_threads(1)  # enough for images of 8x8; the other cores run the subscribers

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
training, validation, test = torch.randperm(len(labels)).split([1197, 300, 300])
loader = DataLoader(TensorDataset(images[training], labels[training]), batch_size=32, shuffle=True)

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
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
warm_up = LinearLR(optimizer, start_factor=0.01, total_iters=50)
decay = CosineAnnealingLR(optimizer, T_max=EPOCHS * len(loader))
schedule = SequentialLR(optimizer, [warm_up, decay], milestones=[50])


def metrics() -> MetricCollection:
    one_number, table_of_ten = MulticlassAccuracy(10, average="micro"), MulticlassConfusionMatrix(10)
    return MetricCollection({"accuracy": one_number, "confusion": table_of_ten})


def in_batches(which: Tensor) -> list[tuple[Tensor, Tensor]]:
    # Not a DataLoader: it draws a random number for each pass, and a subscriber would draw it at an unpredictable step.
    return list(zip(images[which].split(100), labels[which].split(100), strict=True))


trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy)
validator = create_supervised_evaluator(average, {"validation": metrics()}, name="validator")
candidate = deepcopy(model)  # is given the weights of a snapshot, because the trainer's change meanwhile
observer = create_supervised_evaluator(candidate, {"training": metrics()}, name="observer")

SchedulerHandler(schedule).attach(trainer, OptimizerEvents.OPTIMIZER_STEPPED)
AverageHandler(average, model).attach(trainer)
MetricHandler(RunningMean(window=len(loader)), "mean loss", every=10).attach(trainer)
NanGuard().attach(trainer)
early_stopping = EarlyStopping(PATIENCE, "validation/accuracy", mode="max")
early_stopping.attach(trainer, evaluator=validator)


@trainer.on(Events.EPOCH_COMPLETED)
async def validate(engine: Engine[Any, Any]) -> None:
    await validator.run(in_batches(validation))
    engine.state.metrics["accuracy"] = validator.state.metrics["validation/accuracy"]


@trainer.on(Events.STARTED)
def begin(engine: Engine[Any, Any]) -> None:
    engine.state.metrics.setdefault("accuracy", 0.0)  # for a checkpoint that Ctrl-C saves before the first validation


@trainer.subscribe(Events.EPOCH_COMPLETED(every=5), snapshot=lambda _: deepcopy(average.module.state_dict()))
async def observe(event: Event[Any, dict[str, Any]]) -> None:
    candidate.load_state_dict(event.snapshot)
    observer.state.step = event.iteration
    await observer.run(in_batches(training))


def values(engine: Engine[Any, Any]) -> dict[str, Any]:
    now = {
        "loss": engine.state.output,
        "mean loss": engine.state.metrics["mean loss"],
        "rate": schedule.get_last_lr()[0],
    }
    return {**now, **numbers_of(validator)}


async def main(out: Path) -> None:
    for sink in (JSONLines(out / "log.jsonl"), TensorBoard(out / "tensorboard")):
        Tracker(sink, values=values).attach(trainer, Events.ITERATION_COMPLETED(every=10) | Events.EPOCH_COMPLETED)
        Tracker(sink, step=lambda engine: engine.state.step).attach(observer, Events.COMPLETED)
    ProgressBar().attach(trainer)

    state = {"model": model, "average": average, "optimizer": optimizer}
    async with Checkpoint(out / "checkpoints", state, keep=Keep(last=2, best=1, metric="accuracy")) as checkpoint:
        checkpoint.attach(trainer, Events.EPOCH_COMPLETED | Events.TERMINATE)
        restored = await checkpoint.restore()
        if early_stopping.waited == PATIENCE:
            print(f"done at step {trainer.state.iteration}")
        else:
            print(f"resuming from step {restored.step}" if restored else "beginning", flush=True)
            with stop_on_signals(trainer) as stop:
                await trainer.run(loader, max_epochs=EPOCHS)
            print(format_statistics(trainer.statistics()))
            if stop.received:
                print(f"stopped at step {trainer.state.iteration}: the same command resumes")
                return
        best = max(checkpoint.list(), key=lambda each: each.metrics["accuracy"])  # the first of equals, as in Keep
        await checkpoint.restore(best.step)

    tester = create_supervised_evaluator(average, {"test": metrics()})
    found = (await tester.run(in_batches(test))).metrics
    wrong = len(test) - int(found["test/confusion"].trace())
    print(f"the best is step {best.step}, of validation accuracy {best.metrics['accuracy']:.3f}")
    print(f"test accuracy {found['test/accuracy']:.3f}: {wrong} of {len(test)} are wrong")


if __name__ == "__main__":
    anyio.run(main, arguments.out)

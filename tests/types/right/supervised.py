"""Supervised training with everything around it."""

from collections.abc import Sequence
from datetime import timedelta

import anyio
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from aengine import Checkpoint, Engine, Events, Keep, RemovableEventHandle, StopReason, stop_on_signals
from aengine.checkpoint import CheckpointEvents
from aengine.handlers import EarlyStopping, NanGuard, ProgressBar, TimeLimit
from aengine.loggers import JSONLines, Record, Tracker
from aengine.training import (
    AverageHandler,
    MetricHandler,
    OptimizerEvents,
    SchedulerHandler,
    create_supervised_evaluator,
    create_supervised_trainer,
)

model = nn.Linear(8, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(torch.zeros(8, 8), torch.zeros(8, dtype=torch.int64)), batch_size=4)

trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy, gradient_accumulation_steps=2)
evaluator = create_supervised_evaluator(model, {"accuracy": MulticlassAccuracy(2)})


class Console:
    """A sink of one's own."""

    async def write(self, records: Sequence[Record]) -> None:
        for record in records:
            print(record.engine_name, record.step, record.values)


def write(records: Sequence[Record]) -> None:
    print(len(records))


handles: list[RemovableEventHandle] = [
    EarlyStopping(3, "accuracy", mode="max").attach(trainer, evaluator=evaluator),
    NanGuard().attach(trainer),
    TimeLimit(timedelta(minutes=1)).attach(trainer),
    ProgressBar().attach(trainer),
    MetricHandler(MulticlassAccuracy(2), "accuracy").attach(evaluator),
    SchedulerHandler(OneCycleLR(optimizer, 0.5, total_steps=60)).attach(trainer, OptimizerEvents.OPTIMIZER_STEPPED),
    AverageHandler(AveragedModel(model), model).attach(trainer),
    Tracker(JSONLines("log.jsonl")).attach(trainer, Events.ITERATION_COMPLETED(every=10)),
    Tracker(write, values=lambda engine: {"loss": engine.state.output}, on_error="raise").attach(trainer),
]
tracker = Tracker(Console(), step=lambda _: trainer.state.iteration)
tracker.attach(evaluator, Events.COMPLETED)


@trainer.on(Events.EPOCH_COMPLETED)
async def validate(engine: Engine) -> None:
    await evaluator.run(loader)
    engine.state.metrics.update(evaluator.state.metrics)


@trainer.on(Events.ITERATION_COMPLETED)
def show(engine: Engine) -> None:
    print(engine.state.output)


async def main() -> StopReason | None:
    parts = {"model": model, "optimizer": optimizer}
    async with Checkpoint("checkpoints", parts, keep=Keep(last=3, best=1, metric="accuracy")) as checkpoint:
        checkpoint.attach(trainer, Events.ITERATION_COMPLETED(every=500))
        trainer.add_event_handler(
            CheckpointEvents.CHECKPOINT_COMMITTED, lambda engine, payload: print(payload.position)
        )
        info = await checkpoint.restore()
        print("from", info and info.step)
        with stop_on_signals(trainer) as stop:
            state = await trainer.run(loader, max_epochs=10)
            print(state.output.item())
        if stop.received:
            return trainer.state.stop_reason
        best = await checkpoint.load("best", only=["model"])
        print(best.step, checkpoint.statistics(), tracker.statistics().written)
    return trainer.state.stop_reason


anyio.run(main)

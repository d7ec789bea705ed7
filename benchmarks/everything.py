"""A complete training: with aengine, as one loop written by hand, and with pytorch-ignite.

    python benchmarks/everything.py [--fast] [--json FILE] [--threads 1] [--directory DIR]

Method:

- The same training each time: the digits of scikit-learn, a small convolutional network, AdamW, shuffled batches of 64,
  dropout; at each step a one-cycle schedule with its warm-up, a moving average of the weights, the mean loss and a
  guard against NaN; after each epoch accuracy and F1 of the average on the digits held out, early stopping, which
  stops none of them, and a checkpoint, of which two are kept; a line of JSON and two scalars for TensorBoard at each
  step, and again after each epoch; a progress bar by tqdm, on a fake terminal that discards the output.
- By hand means one loop that does all of it in place, with the same libraries: torchmetrics, torch's averages and
  schedulers, `torch.save`, SummaryWriter, json, tqdm. It writes a checkpoint with care: into a new file, fsync, rename,
  fsync of the folder. aengine does that, too, and computes a checksum, and saves more state. Ignite uses its own parts
  for everything; its Checkpoint does not sync, and its average and metrics are other code.
- aengine is measured twice: with validation concurrently with the step, on a snapshot of the average; and in place, as
  in the other two.
- The time is from before the first step until everything is on the disk and the loggers are closed. The claim is about
  wall time, divided by that of the loop by hand in the same round. torch has `--threads` threads in all of them: one is
  enough for images of 8x8, and a second core is free for what runs concurrently with the step.
- Before anything is timed each is run once, and its losses and accuracies are read from its log. Those of aengine and
  of the loop by hand must be equal to the last bit, or the benchmark fails; ignite's are compared, and printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--fast", action="store_true", help="fewer and shorter: for CI")
    parser.add_argument("--threads", type=int, default=1, help="torch's (default: 1)")
    parser.add_argument("--directory", type=Path, help="where to write logs and checkpoints")
    parser.add_argument("--report", action="store_true", help="only print where the time of one run of aengine goes")
    arguments = parser.parse_args()

import io
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from measure import Report, Sample, Stopwatch, Subject, begin, claim, interleave, run_on
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # it has no stubs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from tqdm import tqdm  # type: ignore[import-untyped]  # it has no stubs

from aengine import Engine, Event, Events
from aengine.checkpoint import Checkpoint, Keep
from aengine.handlers import EarlyStopping, NanGuard, ProgressBar, TqdmBars, format_statistics
from aengine.loggers import JSONLines, TensorBoard, Tracker, numbers_of
from aengine.training import (
    AverageHandler,
    MetricHandler,
    OptimizerEvents,
    SchedulerHandler,
    create_supervised_evaluator,
    create_supervised_trainer,
)

AnyEngine: TypeAlias = Engine[Any, Any]
Batch: TypeAlias = tuple[Tensor, Tensor]

BATCH, DECAY, PATIENCE = 64, 0.99, 1000
HELD_OUT = 360

images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
y = torch.tensor(labels)


class Terminal(io.TextIOWrapper):
    """Claims to be a terminal, so that bars are drawn, and discards the output."""

    def __init__(self) -> None:
        super().__init__(open(os.devnull, "wb"))  # noqa: PTH123, SIM115 -- closed with this

    def isatty(self) -> bool:
        return True


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32 * 4 * 4, 10),
    )


@dataclass
class Training:
    """What all of them start from. All random numbers are drawn here, or in the loop, in the same order."""

    epochs: int
    folder: Path
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        which = torch.arange(len(x))
        held_out, trained = which[:HELD_OUT], which[HELD_OUT:]
        self.data = DataLoader(TensorDataset(x[trained], y[trained]), batch_size=BATCH, shuffle=True)
        # A list: a DataLoader would draw a random number for each pass.
        self.held_out: list[Batch] = list(zip(x[held_out].split(120), y[held_out].split(120), strict=True))
        self.schedule = OneCycleLR(self.optimizer, 5e-3, total_steps=self.steps)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    @property
    def steps(self) -> int:
        return self.epochs * len(self.data)


def metrics() -> MetricCollection:
    return MetricCollection({"accuracy": MulticlassAccuracy(10, average="micro"), "f1": MulticlassF1Score(10)})


# Ours


def ours(training: Training, *, is_concurrent: bool, report: Callable[[str], None] = lambda _: None) -> Sample:
    model, optimizer, schedule = training.model, training.optimizer, training.schedule
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    validated = AveragedModel(model) if is_concurrent else average
    trainer = create_supervised_trainer(model, optimizer, cross_entropy)
    validator = create_supervised_evaluator(validated.eval(), {"validation": metrics()}, name="validator")

    SchedulerHandler(schedule).attach(trainer, OptimizerEvents.OPTIMIZER_STEPPED)
    AverageHandler(average, model).attach(trainer)
    MetricHandler(MeanMetric(), "mean loss").attach(trainer)
    NanGuard().attach(trainer)
    EarlyStopping(PATIENCE, "validation/accuracy", mode="max").attach(trainer, evaluator=validator)

    def copy_average(_: AnyEngine) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in average.state_dict().items()}

    async def validate_snapshot(event: Event[Any, dict[str, Tensor]]) -> None:
        validated.load_state_dict(event.snapshot)
        validator.state.step = event.iteration
        await validator.run(training.held_out)

    async def validate(engine: AnyEngine) -> None:
        validator.state.step = engine.state.iteration
        await validator.run(training.held_out)

    if is_concurrent:
        trainer.subscribe(Events.EPOCH_COMPLETED, validate_snapshot, snapshot=copy_average)
    else:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)

    def values(engine: AnyEngine) -> dict[str, Any]:
        return {"loss": engine.state.output, "rate": schedule.get_last_lr()[0]}

    for sink in (JSONLines(training.folder / "log.jsonl"), TensorBoard(training.folder / "tensorboard")):
        Tracker(sink, values=values).attach(trainer, Events.ITERATION_COMPLETED)
        Tracker(sink, values=lambda engine: {"mean loss": engine.state.metrics["mean loss"]}).attach(
            trainer, Events.EPOCH_COMPLETED
        )
        Tracker(sink, values=numbers_of, step=lambda engine: engine.state.step).attach(validator, Events.COMPLETED)
    ProgressBar(TqdmBars(Terminal())).attach(trainer)

    async def run() -> Sample:
        state = {"model": model, "optimizer": optimizer, "average": average}
        with Stopwatch(training.steps) as watch:
            async with Checkpoint(training.folder / "checkpoints", state, keep=Keep(last=2)) as checkpoint:
                checkpoint.attach(trainer, Events.EPOCH_COMPLETED)
                await trainer.run(training.data, max_epochs=training.epochs)
        report(format_statistics(trainer.statistics()))
        return watch.sample

    return run_on("asyncio", run)


# By hand


class Log:
    """A line of JSON and scalars for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self._lines = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, event: str, engine: str, step: int, **values: float) -> None:
        record = {"step": step, "event": event, "engine": engine, "values": values}
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{engine}/{name}", value, step)

    def close(self) -> None:
        os.fsync(self._lines.fileno())
        self._lines.close()
        self._board.close()


def save(folder: Path, step: int, state: Any) -> None:
    """Write a checkpoint, whole or not at all, and then remove the one before the last."""
    folder.mkdir(exist_ok=True)
    temporary, path = folder / "temporary.pt", folder / f"step-{step:010}.pt"
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    for old in sorted(folder.glob("step-*.pt"))[:-2]:
        old.unlink()


def by_hand(training: Training) -> Sample:
    model, optimizer, schedule = training.model, training.optimizer, training.schedule
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY)).eval()
    mean, validation = MeanMetric(), metrics()
    step, waited, best = 0, 0, -math.inf
    terminal = Terminal()
    with Stopwatch(training.steps) as watch:
        log = Log(training.folder)
        for epoch in range(1, training.epochs + 1):
            mean.reset()
            with tqdm(training.data, desc=f"{epoch}/{training.epochs}", file=terminal) as bar:
                for inputs, targets in bar:
                    model.train()
                    optimizer.zero_grad()
                    loss = cross_entropy(model(inputs), targets)
                    loss.backward()
                    optimizer.step()
                    step += 1
                    schedule.step()
                    average.update_parameters(model)
                    mean.update(loss.detach())
                    number = loss.item()
                    if not math.isfinite(number):
                        raise FloatingPointError(f"the loss of step {step} is {number}")
                    log.write(
                        "ITERATION_COMPLETED", "trainer", step, loss=number, rate=float(schedule.get_last_lr()[0])
                    )
                    bar.set_postfix(loss=number, refresh=False)
            log.write("EPOCH_COMPLETED", "trainer", step, **{"mean loss": mean.compute().item()})

            validation.reset()
            with torch.no_grad():
                for inputs, targets in training.held_out:
                    validation.update(average(inputs), targets)
            found = {f"validation/{name}": value.item() for name, value in validation.compute().items()}
            log.write("COMPLETED", "validator", step, **found)

            score = found["validation/accuracy"]
            best, waited = (score, 0) if score > best else (best, waited + 1)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state_dict(),
                "schedule": schedule.state_dict(),
                "random": torch.get_rng_state(),
                "counters": {"epoch": epoch, "step": step, "best": best, "waited": waited},
            }
            save(training.folder / "checkpoints", step, state)
            if waited >= PATIENCE:
                break
        log.close()
    return watch.sample


# pytorch-ignite


def ignite(training: Training) -> Sample:  # noqa: PLR0915 -- one set-up, to be read in one go
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ignite import engine as its, handlers, metrics as its_metrics
        from ignite.handlers.tensorboard_logger import TensorboardLogger

    os.environ["LOCAL_RANK"] = "0"  # it warns that it has to guess
    model, optimizer = training.model, training.optimizer
    at = its.Events
    trainer = its.create_supervised_trainer(model, optimizer, cross_entropy)
    average = handlers.EMAHandler(model, momentum=1 - DECAY)
    validation = {"accuracy": its_metrics.Accuracy(), "f1": its_metrics.Fbeta(1)}
    validator = its.create_supervised_evaluator(average.ema_model, validation)

    trainer.add_event_handler(at.ITERATION_STARTED, handlers.LRScheduler(training.schedule))
    average.attach(trainer)
    its_metrics.Average().attach(trainer, "mean loss")
    trainer.add_event_handler(at.ITERATION_COMPLETED, handlers.TerminateOnNan())
    trainer.add_event_handler(at.EPOCH_COMPLETED, lambda: validator.run(training.held_out))
    stopping = handlers.EarlyStopping(PATIENCE, lambda engine: engine.state.metrics["accuracy"], trainer)
    validator.add_event_handler(at.COMPLETED, stopping)
    bar = handlers.ProgressBar(file=Terminal())
    bar.attach(trainer, output_transform=lambda loss: {"loss": loss})
    state = {"model": model, "optimizer": optimizer, "average": average.ema_model, "trainer": trainer}
    disk = handlers.DiskSaver(str(training.folder / "checkpoints"), require_empty=False)
    trainer.add_event_handler(at.EPOCH_COMPLETED, handlers.Checkpoint(state, disk, n_saved=2))

    def step_of_trainer(*_: object) -> int:
        return int(trainer.state.iteration)

    with Stopwatch(training.steps) as watch:
        board: Any = TensorboardLogger(log_dir=str(training.folder / "tensorboard"))
        board.attach_output_handler(
            trainer, at.ITERATION_COMPLETED, "trainer", output_transform=lambda loss: {"loss": loss}
        )
        board.attach_opt_params_handler(trainer, at.ITERATION_COMPLETED, optimizer, param_name="lr")
        board.attach_output_handler(trainer, at.EPOCH_COMPLETED, "trainer", metric_names=["mean loss"])
        board.attach_output_handler(
            validator, at.COMPLETED, "validator", metric_names=["accuracy", "f1"], global_step_transform=step_of_trainer
        )
        with (training.folder / "log.jsonl").open("a", encoding="utf-8") as lines:

            def write(event: str, name: str, **values: float) -> None:
                record = {"step": trainer.state.iteration, "event": event, "engine": name, "values": values}
                lines.write(json.dumps(record) + "\n")
                lines.flush()

            @trainer.on(at.ITERATION_COMPLETED)
            def write_step(engine: Any) -> None:
                rate = optimizer.param_groups[0]["lr"]
                write("ITERATION_COMPLETED", "trainer", loss=engine.state.output, rate=rate)

            @trainer.on(at.EPOCH_COMPLETED)
            def write_epoch(engine: Any) -> None:
                write("EPOCH_COMPLETED", "trainer", **{"mean loss": float(engine.state.metrics["mean loss"])})

            @validator.on(at.COMPLETED)
            def write_validation(engine: Any) -> None:
                found = {f"validation/{name}": value for name, value in engine.state.metrics.items()}
                write("COMPLETED", "validator", **found)

            trainer.run(training.data, max_epochs=training.epochs)
            os.fsync(lines.fileno())
        board.close()
    return watch.sample


BY_HAND, CONCURRENT, IN_PLACE, IGNITE = "by hand, in place", "aengine", "aengine, validating in place", "pytorch-ignite"
SUBJECTS: dict[str, Callable[[Training], Sample]] = {
    BY_HAND: by_hand,
    CONCURRENT: partial(ours, is_concurrent=True),
    IN_PLACE: partial(ours, is_concurrent=False),
    IGNITE: ignite,
}


# What came out


@dataclass(frozen=True)
class History:
    """The losses and accuracies in the log of a training, and how much it wrote."""

    losses: list[float]
    accuracies: list[float]
    means: list[float]
    lines: int
    checkpoints: int


def history_of(folder: Path) -> History:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    def all_of(name: str) -> list[float]:
        found = [(record["step"], record["values"][name]) for record in records if name in record["values"]]
        return [value for _, value in sorted(found)]

    kept = len([one for one in (folder / "checkpoints").iterdir() if not one.name.startswith(".")])
    return History(all_of("loss"), all_of("validation/accuracy"), all_of("mean loss"), len(records), kept)


def compare(report: Report, epochs: int, folder: Path) -> None:
    histories: dict[str, History] = {}
    for name, take in SUBJECTS.items():
        take(Training(epochs, folder))
        histories[name] = history_of(folder)
    hand = histories[BY_HAND]
    for name in (CONCURRENT, IN_PLACE):
        if histories[name] != hand:
            raise RuntimeError(
                f"{name}: its losses, accuracies, lines or checkpoints are not those of the loop by hand"
            )
    report.table(
        "What came out",
        ["", "last loss", "last accuracy", "losses equal those by hand", "accuracies", "log lines", "checkpoints kept"],
        [
            [
                name,
                f"{one.losses[-1]:.6f}",
                f"{one.accuracies[-1]:.4f}",
                "all" if one.losses == hand.losses else f"within {greatest_difference(one.losses, hand.losses):.1e}",
                "all" if one.accuracies == hand.accuracies else "not all",
                one.lines,
                one.checkpoints,
            ]
            for name, one in histories.items()
        ],
    )


def greatest_difference(some: list[float], others: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(some, others, strict=True))


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    begin()
    rounds, epochs = (3, 4) if options.fast else (15, 10)
    report = Report("everything", {"rounds": rounds, "epochs": epochs, "threads": options.threads})
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        folder = Path(temporary) / "run"
        if options.report:
            ours(Training(epochs, folder), is_concurrent=True, report=print)
            return
        compare(report, epochs, folder)
        steps = Training(epochs, folder).steps
        subjects = {
            name: Subject(lambda _, take=take: take(Training(epochs, folder)), most=steps, least=steps)  # type: ignore[misc]
            for name, take in SUBJECTS.items()
        }
        series = interleave(subjects, rounds=rounds, seconds=math.inf)
    hand = series[BY_HAND]
    report.table(
        f"A whole training of {steps} steps: µs a step",
        ["", "wall", "CPU", "wall by that of the loop by hand"],
        [[name, one.wall, one.cpu, f"{one.wall_ratio(hand).median:.3f}"] for name, one in series.items()],
    )
    report.claims += [
        claim("wall time, by that of the same loop by hand", 1.0, {"": series[CONCURRENT].wall_ratio(hand)}),
        claim("wall time of ignite by ours", 1.0, {"": series[IGNITE].wall_ratio(series[CONCURRENT])}, at_least=True),
    ]
    report.finish(options.json)


if __name__ == "__main__":
    main(arguments)

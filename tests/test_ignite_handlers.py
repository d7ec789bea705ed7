"""pytorch-ignite's own metrics and handlers, unmodified, on our engine: what they give there they give here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from backends import Backend
from theirs import Ours, Theirs, ignite
from torch import Tensor, nn

from aengine import Engine, Events, StopReason

handlers, metrics = ignite.handlers, ignite.metrics
Pair = tuple[Tensor, Tensor]


def pairs(count: int = 6) -> list[Pair]:
    """Return batches of scores for three classes, and the labels."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(4, 3, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(count)]


def hand_on(engine: Any, batch: Pair) -> Pair:
    return batch


def results(library: type[Theirs | Ours], attach: Callable[[Any], object], **limits: int) -> list[dict[str, Any]]:
    """Return the metrics after each iteration and each epoch."""
    runner = library(hand_on)
    attach(runner.engine)
    seen: list[dict[str, Any]] = []
    for event in (runner.events.ITERATION_COMPLETED, runner.events.EPOCH_COMPLETED):
        runner.engine.add_event_handler(event, lambda engine: seen.append(plain(engine.state.metrics)))
    runner.run(pairs(), **limits)
    return seen


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


METRICS: dict[str, Callable[[Any], object]] = {
    "accuracy": lambda engine: metrics.Accuracy().attach(engine, "it"),
    "loss": lambda engine: metrics.Loss(nn.functional.cross_entropy).attach(engine, "it"),
    "confusion matrix": lambda engine: metrics.ConfusionMatrix(3).attach(engine, "it"),
    "precision and recall": lambda engine: [
        metrics.Precision(average=True).attach(engine, "precision"),
        metrics.Recall(average=True).attach(engine, "recall"),
    ],
    "average of output": lambda engine: metrics.Average(output_transform=lambda pair: pair[0].mean()).attach(
        engine, "it"
    ),
    "running average of output": lambda engine: metrics.RunningAverage(
        output_transform=lambda pair: pair[0].mean().item()
    ).attach(engine, "it"),
    "running average of accuracy": lambda engine: metrics.RunningAverage(metrics.Accuracy()).attach(engine, "it"),
    "running average over epochs": lambda engine: metrics.RunningAverage(metrics.Accuracy()).attach(
        engine, "it", usage=metrics.metric.RunningEpochWise()
    ),
    "batch by batch": lambda engine: metrics.Accuracy().attach(engine, "it", usage=metrics.metric.BatchWise()),
    "every other batch": lambda engine: metrics.Accuracy().attach(
        engine, "it", usage=metrics.metric.BatchFiltered(every=2)
    ),
    "arithmetic": lambda engine: (
        (metrics.Precision(average=False) + metrics.Recall(average=False)).mean().attach(engine, "it")
    ),
}


@pytest.mark.parametrize("metric", METRICS)
def test_metric_gives_what_it_gives_on_ignites_engine(metric: str) -> None:
    theirs = results(Theirs, METRICS[metric], max_epochs=2)
    assert any(theirs)
    assert results(Ours, METRICS[metric], max_epochs=2) == theirs


def test_metric_is_detached() -> None:
    metric = metrics.Accuracy()
    engine: Any = Engine(hand_on)
    metric.attach(engine, "accuracy")
    assert metric.is_attached(engine)
    metric.detach(engine)
    assert not metric.is_attached(engine)
    engine.run_sync(pairs())
    assert engine.state.metrics == {}


async def test_metric_is_updated_on_the_worker_too() -> None:
    engine: Any = Engine(hand_on)
    METRICS["accuracy"](engine)
    await engine.run(pairs())
    theirs = Theirs(hand_on)
    METRICS["accuracy"](theirs.engine)
    theirs.run(pairs())
    assert engine.state.metrics == theirs.engine.state.metrics


def test_handler_ends_the_run_when_the_output_is_not_a_number() -> None:
    for library in (Theirs, Ours):
        runner = library(lambda engine, batch: batch)
        runner.engine.add_event_handler(runner.events.ITERATION_COMPLETED, handlers.TerminateOnNan())
        runner.run([1.0, float("nan"), 2.0])
        assert runner.engine.state.iteration == 2


def test_handler_ends_the_run_when_its_time_is_up() -> None:
    engine: Any = Engine(lambda engine, batch: None)
    limit = handlers.TimeLimit(limit_sec=1)
    limit.start_time -= 2
    engine.add_event_handler(Events.ITERATION_COMPLETED, limit)
    state = engine.run_sync([1, 2])
    assert (state.iteration, state.stop_reason) == (1, StopReason.TERMINATED)


def test_outputs_of_an_epoch_are_stored() -> None:
    stored: dict[type, Any] = {}
    for library in (Theirs, Ours):
        runner = library(lambda engine, batch: batch * 2)
        store = handlers.EpochOutputStore()
        store.attach(runner.engine, "outputs")
        runner.run([1, 2, 3], max_epochs=2)
        stored[library] = store.data, runner.engine.state.outputs
    assert stored[Ours] == stored[Theirs] == ([2, 4, 6], [2, 4, 6])


def test_timer_measures_between_the_events_it_is_given() -> None:
    events = ignite.engine.Events
    for library in (Theirs, Ours):
        runner = library(lambda engine, batch: None)
        timer = handlers.Timer(average=True)
        timer.attach(
            runner.engine,
            start=events.EPOCH_STARTED,
            pause=events.ITERATION_COMPLETED,
            resume=events.ITERATION_STARTED,
            step=events.ITERATION_COMPLETED,
        )
        runner.run([1, 2, 3], max_epochs=2)
        assert timer.step_count == 3
        assert 0 < timer.value() < 1


def test_learning_rate_is_scheduled_before_each_step() -> None:
    rates: dict[type, list[float]] = {}
    for library in (Theirs, Ours):
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.0)
        seen = rates[library] = []

        def step(engine: Any, batch: int, optimizer: Any = optimizer, seen: list[float] = seen) -> None:
            seen.append(optimizer.param_groups[0]["lr"])

        runner = library(step)
        scheduler = handlers.PiecewiseLinear(optimizer, "lr", milestones_values=[(0, 1.0), (4, 0.0)])
        runner.engine.add_event_handler(runner.events.ITERATION_STARTED, scheduler)
        runner.run([1, 2, 3], max_epochs=2)
    assert rates[Ours] == rates[Theirs]
    assert rates[Ours][:3] != rates[Ours][3:]


def test_attribute_of_the_state_is_scheduled() -> None:
    engine: Any = Engine(lambda engine, batch: None)
    scheduler = handlers.LambdaStateScheduler(lambda event: event * 10, "weight", create_new=True)
    scheduler.attach(engine, ignite.engine.Events.EPOCH_COMPLETED)
    engine.run_sync([1], max_epochs=3)
    assert engine.state.weight == 30


def test_moving_average_of_the_weights_is_kept() -> None:
    averages: dict[type, list[float]] = {}
    for library in (Theirs, Ours):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 0.0)

        def step(engine: Any, batch: float, model: nn.Linear = model) -> None:
            nn.init.constant_(model.weight, batch)

        runner = library(step)
        average = handlers.EMAHandler(model, momentum=0.1)
        average.attach(runner.engine, name="momentum", event=runner.events.ITERATION_COMPLETED)
        runner.run([1.0, 2.0, 3.0])
        averages[library] = [weight.item() for weight in average.ema_model.parameters()]
    assert averages[Ours] == averages[Theirs]


def test_best_result_is_looked_for_by_a_checkpoint_of_ours(tmp_path: Path) -> None:
    """Checkpoint saves what has a state_dict: the engine, with the model."""
    names: dict[type, list[str]] = {}
    for library in (Theirs, Ours):
        folder = tmp_path / library.__name__
        model = nn.Linear(1, 1)
        trainer = library(lambda engine, batch: None)
        saver = handlers.DiskSaver(str(folder), require_empty=False)
        checkpoint = handlers.Checkpoint(
            {"model": model, "trainer": trainer.engine},
            saver,
            n_saved=2,
            score_function=lambda engine: -abs(engine.state.epoch - 2),
            score_name="score",
            global_step_transform=handlers.global_step_from_engine(trainer.engine),
        )
        trainer.engine.add_event_handler(trainer.events.EPOCH_COMPLETED, checkpoint)
        trainer.run([1, 2, 3], max_epochs=4)
        names[library] = sorted(path.name for path in folder.iterdir())
    assert names[Ours] == names[Theirs]
    assert len(names[Ours]) == 2


def test_checkpoint_of_ignite_resumes_our_engine(tmp_path: Path) -> None:
    def step(engine: Any, batch: int) -> None:
        batches.append((engine.state.epoch, batch))

    batches: list[tuple[int, int]] = []
    trainer: Any = Engine(step)
    model = nn.Linear(1, 1)
    checkpoint = handlers.Checkpoint(
        {"model": model, "trainer": trainer}, handlers.DiskSaver(str(tmp_path)), n_saved=None
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), checkpoint)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda engine: engine.terminate())
    trainer.run_sync([1, 2, 3], max_epochs=2)

    (saved,) = tmp_path.iterdir()
    resumed: Any = Engine(step)
    other = nn.Linear(1, 1)
    handlers.Checkpoint.load_objects(
        {"model": other, "trainer": resumed}, checkpoint=torch.load(saved, weights_only=True)
    )
    assert torch.equal(model.weight, other.weight)
    del batches[:]
    resumed.run_sync([1, 2, 3])
    assert batches == [(2, 2), (2, 3)]


class View:
    """Ours, seen as one of ignite's: for the few handlers that ask `isinstance(trainer, ignite.engine.Engine)`."""

    __class__: Any = property(lambda _: ignite.engine.Engine)

    def __init__(self, engine: Engine[Any, Any]) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def test_trainer_is_stopped_early_by_the_score_of_another_engine() -> None:
    scores = iter([0.1, 0.3, 0.2, 0.2, 0.2, 0.2])
    trainer: Any = Engine(lambda engine, batch: None)
    evaluator: Any = Engine(lambda engine, batch: None)
    trainer_as_theirs: Any = View(trainer)
    stopping = handlers.EarlyStopping(2, lambda engine: next(scores), trainer_as_theirs)
    evaluator.add_event_handler(Events.COMPLETED, stopping)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run_sync([1]))
    state = trainer.run_sync([1, 2], max_epochs=6)
    assert (state.epoch, state.stop_reason) == (4, StopReason.TERMINATED)


def test_progress_of_training_looks_the_same_with_a_step_of_ignites(anyio_backend: Backend) -> None:
    """Its factories of steps need but `engine.state.iteration`."""
    losses: dict[str, list[float]] = {}
    for where in ("theirs", "ours", "ours, on the worker"):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = ignite.engine.supervised_training_step(model, optimizer, nn.functional.cross_entropy)
        runner = (Theirs if where == "theirs" else Ours)(step)
        seen: list[float] = []
        runner.engine.add_event_handler(
            runner.events.ITERATION_COMPLETED, lambda engine, seen: seen.append(engine.state.output), seen
        )
        if where.endswith("worker"):
            assert isinstance(runner, Ours)
            anyio.run(runner.engine.run, pairs(), 2, backend=anyio_backend[0], backend_options=anyio_backend[1])
        else:
            runner.run(pairs(), max_epochs=2)
        losses[where] = seen
    assert losses["ours"] == losses["ours, on the worker"] == losses["theirs"]

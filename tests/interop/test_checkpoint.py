"""Our Checkpoint saves and restores what has state of pytorch-ignite's metrics and handlers, without being asked to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ignite import ignite
from torch import Tensor, nn

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint
from aengine.errors import CheckpointMismatch
from aengine.interop.ignite import ResumableEpochWise, as_ignite

metrics: Any = ignite.metrics
handlers: Any = ignite.handlers
usages: Any = ignite.metrics.metric

CHANCE = torch.Generator().manual_seed(0)
DATA = [(torch.rand(4, 3, generator=CHANCE), torch.randint(3, (4,), generator=CHANCE)) for _ in range(6)]


class Training:
    """An engine that hands on its batches, its Checkpoint, and what of ignite is attached to it."""

    def __init__(self, directory: Path, attach: Callable[[Any], object]) -> None:
        self.engine: Any = Engine(lambda engine, batch: batch)
        self.attached: Any = attach(self.engine)
        self.results: list[Any] = []
        self.checkpoint = Checkpoint(directory, {"model": nn.Linear(1, 1)})
        self.checkpoint.attach(self.engine, Events.ITERATION_COMPLETED(every=4))
        self.engine.add_event_handler(
            Events.EPOCH_COMPLETED, lambda engine: self.results.append(plain(engine.state.metrics))
        )

    async def go(self, *, stop_at: int | None = None) -> None:
        if stop_at is not None:
            self.engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), lambda engine: engine.terminate())
        await self.checkpoint.restore()
        await self.engine.run(DATA, max_epochs=2)
        await self.checkpoint.aclose()


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


async def resumed(directory: Path, attach: Callable[[Any], object]) -> Training:
    """Stop a run in the middle of its first epoch, and go on with another, from the checkpoint of iteration 4."""
    await Training(directory, attach).go(stop_at=5)
    second = Training(directory, attach)
    await second.go()
    return second


def with_usage(metric: Callable[[], Any], usage: Callable[[], Any]) -> Callable[[Any], object]:
    return lambda engine: metric().attach(engine, "it", usage=usage())


METRICS: dict[str, Callable[[], Any]] = {
    "Accuracy": metrics.Accuracy,
    "ConfusionMatrix": lambda: metrics.ConfusionMatrix(3),
    "Fbeta": lambda: metrics.Fbeta(beta=1.0),
    "Loss": lambda: metrics.Loss(nn.functional.cross_entropy),
    "MetricGroup": lambda: metrics.MetricGroup({"one": metrics.Accuracy(), "other": metrics.Recall(average=True)}),
    "Precision": metrics.Precision,
    "TopKCategoricalAccuracy": lambda: metrics.TopKCategoricalAccuracy(2),
}


@pytest.mark.parametrize("metric", METRICS)
async def test_metric_in_mid_epoch_goes_on_where_it_was(metric: str, tmp_path: Path) -> None:
    attach = with_usage(METRICS[metric], ResumableEpochWise)
    undisturbed = Training(tmp_path / "undisturbed", attach)
    await undisturbed.go()
    assert len(undisturbed.results) == 2
    assert (await resumed(tmp_path / "resumed", attach)).results == undisturbed.results


async def test_metric_of_ignites_own_usage_is_that_of_the_rest_of_the_epoch(tmp_path: Path) -> None:
    """It is reset at EPOCH_STARTED, which is fired for the rest of the epoch too."""
    attach = with_usage(metrics.Accuracy, usages.EpochWise)
    undisturbed = Training(tmp_path / "undisturbed", attach)
    await undisturbed.go()
    rest = metrics.Accuracy()
    for batch in DATA[4:]:
        rest.update(batch)
    results = (await resumed(tmp_path / "resumed", attach)).results
    assert results == [{"it": rest.compute()}, undisturbed.results[1]]
    assert results[0] != undisturbed.results[0]


async def test_metric_whose_state_ignite_cannot_save_fails_the_run_with_its_error(tmp_path: Path) -> None:
    """There is a function among the arguments of IoU, which its state_dict refuses: attach it to an evaluator."""
    training = Training(tmp_path, with_usage(lambda: metrics.IoU(metrics.ConfusionMatrix(3)), usages.EpochWise))
    with pytest.raises(TypeError, match="attribute of unsupported type"):
        await training.go()
    await training.checkpoint.aclose()


async def test_metric_whose_state_ignite_cannot_load_is_named(tmp_path: Path) -> None:
    """A fresh EpochMetric does not take the lists of one that has seen batches."""
    attach = with_usage(lambda: metrics.EpochMetric(lambda scores, labels: 0.0), usages.EpochWise)
    await Training(tmp_path, attach).go(stop_at=5)
    second = Training(tmp_path, attach)
    with pytest.raises(CheckpointMismatch, match=r"handlers\['EpochMetric'\].*Size of y"):
        await second.go()
    await second.checkpoint.aclose()


async def test_metric_goes_on_after_terminate_without_any_checkpoint() -> None:
    engine: Any = Engine(lambda engine, batch: batch)
    metrics.Accuracy().attach(engine, "it", usage=ResumableEpochWise())
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda engine: engine.terminate())
    await engine.run(DATA, max_epochs=1)
    await engine.run(DATA)
    whole = metrics.Accuracy()
    for batch in DATA:
        whole.update(batch)
    assert engine.state.metrics == {"it": whole.compute()}


async def test_early_stopping_counts_on_after_a_restart(tmp_path: Path) -> None:
    def attach(engine: Any) -> Any:
        stopping = handlers.EarlyStopping(3, lambda engine: -engine.state.iteration, as_ignite(engine))
        as_ignite(engine).add_event_handler(Events.ITERATION_COMPLETED, stopping)
        return stopping

    first = Training(tmp_path, attach)
    await first.go(stop_at=4)
    assert (first.attached.counter, first.engine.state.iteration) == (3, 4)
    second = Training(tmp_path, attach)
    await second.checkpoint.restore()
    assert (second.attached.counter, second.attached.best_score) == (3, first.attached.best_score)
    await second.checkpoint.aclose()


async def test_scheduler_and_running_average_go_on_after_a_restart(tmp_path: Path) -> None:
    rates: list[float] = []

    def attach(engine: Any) -> Any:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = handlers.LinearCyclicalScheduler(optimizer, "lr", 0.0, 1.0, cycle_size=10)
        engine.add_event_handler(Events.ITERATION_STARTED, scheduler)
        engine.add_event_handler(Events.ITERATION_STARTED, lambda: rates.append(optimizer.param_groups[0]["lr"]))
        metrics.RunningAverage(output_transform=lambda output: output[0].mean().item()).attach(
            engine, "it", usage=usages.RunningBatchWise()
        )

    undisturbed = Training(tmp_path / "undisturbed", attach)
    await undisturbed.go()
    expected = rates[:]
    del rates[:]
    await resumed(tmp_path / "resumed", attach)
    assert expected == rates[:4] + rates[5:]
    assert len(set(expected)) > 3

"""A metric of torchmetrics that is handed in as state goes on as if it had not been saved, though its own does not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saving_run import saving
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection, RunningMean, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision
from torchmetrics.wrappers import MetricTracker, MinMaxMetric

from aengine import Events
from aengine.checkpoint import Checkpoint
from aengine.errors import CheckpointMismatch

NUMBERS = [torch.tensor([float(number)]) for number in (3, -1, 7, 2, 5, 0)]
CLASSES = [
    (torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(n)), torch.arange(8) % 3) for n in range(6)
]


def collection() -> MetricCollection:
    return MetricCollection([MulticlassAccuracy(3), MulticlassPrecision(3), MulticlassF1Score(3)])


def tracker() -> MetricTracker:
    made = MetricTracker(MeanMetric(), maximize=True)
    made.increment()
    return made


METRICS: list[tuple[Callable[[], Any], list[Any]]] = [
    (MeanMetric, NUMBERS),
    (CatMetric, NUMBERS),
    (lambda: RunningMean(window=3), NUMBERS),
    (lambda: MinMaxMetric(MeanMetric()), NUMBERS),
    (tracker, NUMBERS),
    (lambda: MetricCollection({"sum": SumMetric(), "max": MaxMetric()}), NUMBERS),
    (collection, CLASSES),
]


def update(metric: Any, given: Any) -> None:
    metric.update(*given) if isinstance(given, tuple) else metric.update(given)


@pytest.mark.parametrize(("make", "given"), METRICS)
async def test_a_metric_goes_on_where_it_was(make: Callable[[], Any], given: list[Any], tmp_path: Path) -> None:
    metric = make()
    async with saving(tmp_path) as run:
        run.checkpoint = Checkpoint(tmp_path, {"metric": metric})
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        run.engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: update(metric, given[run.engine.state.iteration - 1])
        )
        await run.engine.run([1, 2, 3, 4])
    restored = make()
    update(restored, given[0])  # and this is forgotten
    await Checkpoint(tmp_path, {"metric": restored}).load()
    for one in metric, restored:
        update(one, given[4])
    assert str(restored.compute()) == str(metric.compute())
    for one in metric, restored:
        update(one, given[5])
    assert str(restored.compute()) == str(metric.compute())


async def test_a_metric_of_other_states_is_refused(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint = Checkpoint(tmp_path, {"metric": MeanMetric()})
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        await run.engine.run([1])
    other = SumMetric()
    other.update(2.0)
    before = copy.deepcopy(other.metric_state)
    with pytest.raises(CheckpointMismatch, match=r"has \['sum_value'\] here.*\['mean_value', 'weight'\]"):
        await Checkpoint(tmp_path, {"metric": other}).load()
    assert other.metric_state == before


async def test_a_metric_that_also_listens_is_saved_once(tmp_path: Path) -> None:
    metric = MeanMetric()
    async with saving(tmp_path) as run:
        run.checkpoint = Checkpoint(tmp_path, {"metric": metric})
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        run.engine.add_event_handler(Events.EPOCH_STARTED, metric.reset)
        await run.engine.run([1])
    (path,) = (info.path for info in run.checkpoint.list())
    assert torch.load(path / "state.pt", weights_only=True)["handlers"] == {}

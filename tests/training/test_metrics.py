"""torchmetrics on an engine: the same results as by hand, also after a checkpoint in the middle of an epoch."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.record import AnyEngine, Boom
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection, RunningMean, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassPrecision, MulticlassRecall
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MetricTracker, MinMaxMetric, Running

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint, Keep
from aengine.engine import stateful_listeners
from aengine.errors import CheckpointMismatch
from aengine.training import MetricHandler, create_supervised_evaluator, create_supervised_trainer
from aengine.training.metrics import AnyMetric

CLASSES = 3


def scored() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return predictions and targets: 6 batches of 4."""
    chance = torch.Generator().manual_seed(1)
    return [
        (torch.rand(4, CLASSES, generator=chance).softmax(1), torch.randint(CLASSES, (4,), generator=chance))
        for _ in range(6)
    ]


def through(engine: AnyEngine, batch: Any) -> Any:
    return batch


def collection() -> MetricCollection:
    """Precision and recall share their state, which the collection finds out at its first update."""
    return MetricCollection([MulticlassPrecision(CLASSES), MulticlassRecall(CLASSES), MulticlassAUROC(CLASSES)])


METRICS: dict[str, Callable[[], AnyMetric]] = {
    "accuracy": lambda: MulticlassAccuracy(CLASSES),
    "auroc, whose state is a list": lambda: MulticlassAUROC(CLASSES),
    "collection": collection,
    "running": lambda: Running(MulticlassAccuracy(CLASSES), window=3),
    "classwise": lambda: ClasswiseWrapper(MulticlassAccuracy(CLASSES, average=None)),
    "min-max": lambda: MinMaxMetric(MulticlassAccuracy(CLASSES)),
    "bootstrap": lambda: BootStrapper(MulticlassAccuracy(CLASSES), num_bootstraps=3),
    "sum of metrics": lambda: MulticlassAccuracy(CLASSES) + MulticlassPrecision(CLASSES),
    "tracker": lambda: MetricTracker(MulticlassAccuracy(CLASSES)),
    "tracker of a collection": lambda: MetricTracker(collection()),
}


def by_hand(metric: AnyMetric, epochs: int, every: int) -> list[Any]:
    """Return what is computed every so many batches and at the end of each epoch."""
    results = []
    for _ in range(epochs):
        if isinstance(metric, MetricTracker):
            metric.increment()
        else:
            metric.reset()
        for number, batch in enumerate(scored(), start=1):
            metric.update(*batch)
            if number % every == 0:
                results.append(flat(metric.compute()))
        results.append(flat(metric.compute()))
    return results


def flat(result: Any) -> dict[str, Any]:
    named = {f"score/{key}": value for key, value in result.items()} if isinstance(result, dict) else {"score": result}
    return {key: value.item() for key, value in named.items()}


def results_of(engine: AnyEngine, every: int) -> list[Any]:
    """Return the list that is going to hold the results as they come."""
    results: list[Any] = []
    for event in (Events.ITERATION_COMPLETED(every=every), Events.EPOCH_COMPLETED):
        engine.add_event_handler(event, lambda engine: results.append(dict(engine.state.metrics)))
    return results


@pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
@pytest.mark.parametrize("kind", METRICS)
async def test_results_equal_those_by_hand(kind: str, thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    torch.manual_seed(5)
    expected = by_hand(METRICS[kind](), epochs=2, every=2)
    torch.manual_seed(5)
    engine: AnyEngine = Engine(through, thread=thread)
    MetricHandler(METRICS[kind](), "score", every=2).attach(engine)
    results = results_of(engine, 2)
    await engine.run(scored(), max_epochs=2)
    assert results == expected
    json.dumps(engine.state.metrics)


@pytest.mark.parametrize("kind", METRICS)
async def test_run_resumed_within_an_epoch_computes_what_it_would_have_computed(tmp_path: Path, kind: str) -> None:
    async def run(step: int | None = None) -> list[Any]:
        torch.manual_seed(5)
        engine: AnyEngine = Engine(through)
        handler = MetricHandler(METRICS[kind](), "score", every=2)
        handler.attach(engine)
        results = results_of(engine, 2)
        async with Checkpoint(tmp_path, {"nothing": torch.nn.Identity()}, keep=Keep(every_n=1)) as checkpoint:
            checkpoint.attach(engine, Events.ITERATION_COMPLETED)
            if step is not None:
                torch.rand(3)
                await checkpoint.restore(step)
            await engine.run(scored(), max_epochs=2)
        assert handler.iterations == 6
        if isinstance(handler.metric, MetricTracker):
            results.append({key: value.tolist() for key, value in _as_dict(handler.metric.compute_all()).items()})
        return results

    whole = await run()
    assert len({json.dumps(result) for result in whole}) >= 3
    for step, done in ((6, 3), (11, 6)):
        assert await run(step) == whole[done:], f"from step {step}"


def _as_dict(result: Any) -> dict[str, Any]:
    return result if isinstance(result, dict) else {"score": result}


async def test_running_mean_of_the_losses_continues_over_the_epochs_if_it_is_not_epoch_bound() -> None:
    engine: AnyEngine = Engine(through)
    MetricHandler(RunningMean(window=4), "bound").attach(engine)
    MetricHandler(RunningMean(window=4), "free", epoch_bound=False).attach(engine)
    await engine.run([torch.tensor(1.0), torch.tensor(2.0), torch.tensor(6.0)], max_epochs=2)
    assert engine.state.metrics == {"bound": 3.0, "free": 3.75}  # of 1, 2, 6; of 6, 1, 2, 6
    await engine.run([torch.tensor(5.0)])
    assert engine.state.metrics == {"bound": 5.0, "free": 5.0}  # a run that begins anew


async def test_output_transform_gives_arguments_by_place_or_by_name_or_one() -> None:
    engine: AnyEngine = Engine(through)
    swapped = {"target": 0, "preds": 1}
    MetricHandler(
        MeanSquaredError(), "by name", output_transform=lambda pair: {k: pair[i] for k, i in swapped.items()}
    ).attach(engine)
    MetricHandler(MeanSquaredError(), "by place").attach(engine)
    MetricHandler(SumMetric(), "one", output_transform=lambda pair: pair[0]).attach(engine)
    await engine.run([(torch.tensor([1.0]), torch.tensor([3.0]))])
    assert engine.state.metrics == {"by name": 4.0, "by place": 4.0, "one": 1.0}


async def test_results_that_are_no_single_number_stay_tensors() -> None:
    engine: AnyEngine = Engine(through)
    MetricHandler(MulticlassAccuracy(CLASSES, average=None), "each").attach(engine)
    await engine.run(scored())
    assert engine.state.metrics["each"].shape == (CLASSES,)


class Seen(Metric):
    """A metric of one's own, with plain numbers in its state, and in its result."""

    seen: list[Any]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", default=[], dist_reduce_fx=None)

    def update(self, value: float) -> None:
        self.seen.append((value, torch.tensor(value)))

    def compute(self) -> list[Any]:
        return [part for pair in self.seen for part in pair]


async def test_metric_of_ones_own_is_saved_and_has_results_of_its_own(tmp_path: Path) -> None:
    for step in (None, 2):
        engine: AnyEngine = Engine(through)
        MetricHandler(Seen(), "seen").attach(engine)
        async with Checkpoint(tmp_path, {}, keep=Keep(every_n=1)) as checkpoint:
            checkpoint.attach(engine, Events.ITERATION_COMPLETED)
            if step is not None:
                await checkpoint.restore(step)
            await engine.run([1.0, 2.0, 3.0])
        assert engine.state.metrics == {"seen": [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]}


async def test_trainer_and_evaluator_have_metrics() -> None:
    model = torch.nn.Linear(2, CLASSES)
    data = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))] * 3
    trainer = create_supervised_trainer(
        model, torch.optim.SGD(model.parameters(), lr=1.0), torch.nn.functional.cross_entropy
    )
    evaluator = create_supervised_evaluator(model, {"accuracy": MulticlassAccuracy(CLASSES, average="micro")})
    MetricHandler(MeanMetric(), "loss").attach(trainer)
    losses: list[float] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output.item()))
    await trainer.run(data)
    await evaluator.run(data)
    assert trainer.state.metrics["loss"] == pytest.approx(sum(losses) / 3)
    assert evaluator.state.metrics == {"accuracy": 1.0}


async def test_metric_of_a_run_that_failed_continues_with_it() -> None:
    failing = [Boom()]

    def step(engine: AnyEngine, batch: float) -> torch.Tensor:
        if engine.state.iteration == 3 and failing:
            raise failing.pop()
        return torch.tensor(batch)

    engine: AnyEngine = Engine(step)
    MetricHandler(SumMetric(), "sum").attach(engine)
    with pytest.raises(Boom):
        await engine.run([1.0, 2.0, 3.0])
    await engine.run([1.0, 2.0, 3.0])
    assert engine.state.metrics == {"sum": 6.0}


async def test_metric_that_misses_the_beginning_of_an_epoch_says_so(caplog: pytest.LogCaptureFixture) -> None:
    engine: AnyEngine = Engine(through)
    engine.load_state_dict({"iteration": 2, "epoch_length": 3, "max_epochs": 1})
    MetricHandler(SumMetric(), "sum").attach(engine)
    with caplog.at_level(logging.WARNING, "aengine.training"):
        await engine.run([torch.tensor(1.0)] * 3, max_epochs=1)
    assert "metric 'sum' continues within an epoch and has 0 of its 2 iterations" in caplog.text
    assert engine.state.metrics == {"sum": 1.0}


# Bad input


def test_what_is_no_metric_is_refused() -> None:
    engine: AnyEngine = Engine(through)
    wrong: Any = {"accuracy": MeanMetric()}
    with pytest.raises(TypeError, match=r"takes a metric of torchmetrics, got \{.*several go into a"):
        MetricHandler(wrong, "score").attach(engine)
    wrong = None
    with pytest.raises(TypeError, match="takes the name of the result, got None"):
        MetricHandler(MeanMetric(), wrong).attach(engine)


def test_second_metric_of_a_name_is_refused() -> None:
    engine: AnyEngine = Engine(through)
    MetricHandler(MeanMetric(), "loss").attach(engine)
    with pytest.raises(ValueError, match="has a metric 'loss' already: give this one another name"):
        MetricHandler(SumMetric(), "loss").attach(engine)


def test_second_name_of_a_metric_is_refused() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="evaluator")
    other: AnyEngine = Engine(lambda engine, batch: batch)
    metric = MeanMetric()
    MetricHandler(metric, "mean").attach(engine)
    with pytest.raises(RuntimeError, match="this MeanMetric is attached to engine 'evaluator' already, as 'mean'"):
        MetricHandler(metric, "average").attach(engine)
    MetricHandler(MeanMetric(), "average").attach(engine)
    MetricHandler(metric, "mean").attach(other)


def test_wrong_interval_is_refused_and_nothing_is_attached() -> None:
    engine: AnyEngine = Engine(through)
    with pytest.raises(ValueError, match="every"):
        MetricHandler(MeanMetric(), "loss", every=0).attach(engine)
    assert stateful_listeners(engine) == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (MeanMetric, r"score has \['mean_value', 'weight'\] here, and what was saved had \['sum_value'\]"),
        (lambda: MetricCollection([SumMetric()]), r"has \['SumMetric'\] here, and what was saved had \['itself'\]"),
    ],
    ids=["another", "a collection"],
)
async def test_state_of_another_metric_is_refused(tmp_path: Path, other: Callable[[], AnyMetric], message: str) -> None:
    for make in (SumMetric, other):
        engine: AnyEngine = Engine(through)
        MetricHandler(make(), "score").attach(engine)
        async with Checkpoint(tmp_path, {}) as checkpoint:
            checkpoint.attach(engine, Events.EPOCH_COMPLETED)
            if make is SumMetric:
                await engine.run([torch.tensor(1.0)])
                continue
            with pytest.raises(CheckpointMismatch, match=message):
                await checkpoint.restore()


def test_missing_torchmetrics_says_what_to_install() -> None:
    program = """
import sys
sys.modules["torchmetrics"] = None
import aengine.training.supervised  # which needs none
try:
    import aengine.training.metrics
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 'pip install -e ".[training]"' in done.stdout

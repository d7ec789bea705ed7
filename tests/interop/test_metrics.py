"""pytorch-ignite's metrics on our engine give what they give on its own, to the bit, whatever way the step runs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from support.ignite import ignite
from support.ignite_parity import MakeEngine, as_bits, same_on_both
from torch import Tensor, nn

from aengine import Engine
from aengine.interop.ignite import ResumableEpochWise, as_ignite

metrics, usages = ignite.metrics, ignite.metrics.metric
regression: Any = ignite.metrics.regression
Pair: TypeAlias = tuple[Any, ...]
Attach: TypeAlias = Callable[[Any], object]


def hand_on(engine: Any, batch: Pair) -> Pair:
    return batch


def results(attach: Attach) -> Callable[[MakeEngine], tuple[Any, Callable[[], Any]]]:
    """Return the scenario of an engine whose metrics are looked at after each iteration and each epoch."""

    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        engine = make(hand_on)
        attach(engine)
        seen: list[Any] = []
        events = ignite.engine.Events
        for event in (events.ITERATION_COMPLETED, events.EPOCH_COMPLETED):
            engine.add_event_handler(event, lambda engine: seen.append(as_bits(engine.state.metrics)))
        return engine, lambda: seen

    return scenario


def batches(make: Callable[[torch.Generator], Pair]) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    return [make(generator) for _ in range(4)]


CLASSES = batches(
    lambda chance: (torch.rand(6, 3, generator=chance).softmax(1), torch.randint(3, (6,), generator=chance))
)
BINARY = batches(lambda chance: (torch.rand(8, generator=chance), torch.randint(2, (8,), generator=chance)))
LABELS = batches(
    lambda chance: (torch.randint(2, (6, 3), generator=chance), torch.randint(2, (6, 3), generator=chance))
)
NUMBERS = batches(lambda chance: (torch.rand(7, generator=chance) + 1, torch.rand(7, generator=chance) + 1))
VECTORS = batches(lambda chance: (torch.rand(5, 4, generator=chance), torch.rand(5, 4, generator=chance)))
IMAGES = batches(
    lambda chance: (torch.rand(2, 3, 16, 16, generator=chance), torch.rand(2, 3, 16, 16, generator=chance))
)
SENTENCES = [
    (["the cat sat on the mat".split()], [["the cat sat on a mat".split(), "a cat was on the mat".split()]]),
    (["there is a dog in the house".split()], [["a dog is in the house".split()]]),
]


def classes(pair: Pair) -> Pair:
    return pair[0].argmax(1), pair[1]


def spread(scores: Tensor, labels: Tensor) -> float:
    return float(scores.max(1).values.std() + labels.float().mean())


METRICS: dict[str, tuple[list[Pair], Callable[[], Any]]] = {
    "Accuracy": (CLASSES, metrics.Accuracy),
    "Accuracy, multilabel": (LABELS, lambda: metrics.Accuracy(is_multilabel=True)),
    "AveragePrecision": (BINARY, metrics.AveragePrecision),
    "Bleu": (SENTENCES, lambda: metrics.Bleu(ngram=2, smooth="smooth1")),
    "ClassificationReport": (CLASSES, lambda: metrics.ClassificationReport(output_dict=True)),
    "CohenKappa": (CLASSES, lambda: metrics.CohenKappa(output_transform=classes)),
    "ConfusionMatrix": (CLASSES, lambda: metrics.ConfusionMatrix(3)),
    "CosineSimilarity": (VECTORS, metrics.CosineSimilarity),
    "DiceCoefficient": (CLASSES, lambda: metrics.DiceCoefficient(metrics.ConfusionMatrix(3))),
    "Entropy": (CLASSES, metrics.Entropy),
    "EpochMetric": (CLASSES, lambda: metrics.EpochMetric(spread)),
    "Fbeta": (CLASSES, lambda: metrics.Fbeta(beta=0.5)),
    "IoU": (CLASSES, lambda: metrics.IoU(metrics.ConfusionMatrix(3))),
    "JSDivergence": (VECTORS, metrics.JSDivergence),
    "KLDivergence": (VECTORS, metrics.KLDivergence),
    "Loss": (CLASSES, lambda: metrics.Loss(nn.functional.cross_entropy)),
    "MatthewsCorrCoef": (CLASSES, lambda: metrics.MatthewsCorrCoef(output_transform=classes)),
    "MeanAbsoluteError": (NUMBERS, metrics.MeanAbsoluteError),
    "MeanPairwiseDistance": (VECTORS, metrics.MeanPairwiseDistance),
    "MeanSquaredError": (NUMBERS, metrics.MeanSquaredError),
    "MedianAbsoluteError": (NUMBERS, regression.MedianAbsoluteError),
    "MetricGroup": (
        CLASSES,
        lambda: metrics.MetricGroup({"accuracy": metrics.Accuracy(), "top": metrics.TopKCategoricalAccuracy(2)}),
    ),
    "MultiLabelConfusionMatrix": (LABELS, lambda: metrics.MultiLabelConfusionMatrix(3)),
    "PSNR": (IMAGES, lambda: metrics.PSNR(data_range=1.0)),
    "PearsonCorrelation": (NUMBERS, regression.PearsonCorrelation),
    "Precision": (CLASSES, metrics.Precision),
    "R2Score": (NUMBERS, regression.R2Score),
    "ROC_AUC": (BINARY, metrics.ROC_AUC),
    "Recall": (CLASSES, lambda: metrics.Recall(average="macro")),
    "RootMeanSquaredError": (NUMBERS, metrics.RootMeanSquaredError),
    "Rouge": (SENTENCES, lambda: metrics.Rouge(variants=["L", 2], multiref="best")),
    "RunningAverage": (CLASSES, lambda: metrics.RunningAverage(metrics.Accuracy())),
    "SSIM": (IMAGES, lambda: metrics.SSIM(data_range=1.0)),
    "TopKCategoricalAccuracy": (CLASSES, lambda: metrics.TopKCategoricalAccuracy(2)),
    "mIoU": (CLASSES, lambda: metrics.mIoU(metrics.ConfusionMatrix(3), ignore_index=0)),
    "Average": (NUMBERS, lambda: metrics.Average(output_transform=lambda pair: pair[0].mean())),
    "GeometricAverage": (NUMBERS, lambda: metrics.GeometricAverage(output_transform=lambda pair: pair[0])),
    "VariableAccumulation": (
        NUMBERS,
        lambda: metrics.VariableAccumulation(
            lambda total, value: total + value.sum(), output_transform=lambda pair: pair[0]
        ),
    ),
    "RunningAverage of the output": (
        NUMBERS,
        lambda: metrics.RunningAverage(alpha=0.9, output_transform=lambda pair: pair[0].mean().item()),
    ),
    "arithmetic": (
        CLASSES,
        lambda: 2 * metrics.Precision() * metrics.Recall() / (metrics.Precision() + metrics.Recall() + 1e-9),
    ),
    "MetricsLambda": (
        CLASSES,
        lambda: metrics.MetricsLambda(
            lambda one, other, weight: weight * one + other, metrics.Accuracy(), metrics.Entropy(), weight=3.0
        ),
    ),
    "indexed": (CLASSES, lambda: metrics.ConfusionMatrix(3)[0]),
}


@pytest.mark.parametrize("metric", METRICS)
async def test_metric_gives_what_it_gives_on_ignites_engine(metric: str) -> None:
    data, make = METRICS[metric]
    seen = await same_on_both(results(lambda engine: make().attach(engine, "it")), data, max_epochs=2)
    assert "it" in seen[-1]


def test_at_least_twenty_classes_of_metrics_are_compared() -> None:
    assert len({type(make()) for _, make in METRICS.values()}) >= 20


USAGES: dict[str, Callable[[], Any]] = {
    "epoch by epoch": usages.EpochWise,
    "batch by batch": usages.BatchWise,
    "every other batch": lambda: usages.BatchFiltered(every=2),
    "after the first batch": lambda: usages.BatchFiltered(after=1),
}
RUNNING_USAGES: dict[str, Callable[[], Any]] = {
    "batch by batch": usages.RunningBatchWise,
    "epoch by epoch": usages.RunningEpochWise,
    "batch by batch of one epoch": usages.SingleEpochRunningBatchWise,
}


@pytest.mark.parametrize("usage", USAGES)
async def test_usage_of_a_metric_is_understood(usage: str) -> None:
    def attach(engine: Any) -> None:
        metrics.Accuracy().attach(engine, "it", usage=USAGES[usage]())

    seen = await same_on_both(results(attach), CLASSES, max_epochs=2)
    assert "it" in seen[-1]


@pytest.mark.parametrize("usage", RUNNING_USAGES)
async def test_running_usage_of_a_metric_is_understood(usage: str) -> None:
    def attach(engine: Any) -> None:
        metrics.RunningAverage(metrics.Accuracy()).attach(engine, "it", usage=RUNNING_USAGES[usage]())

    seen = await same_on_both(results(attach), CLASSES, max_epochs=3)
    assert "it" in seen[-1]


@pytest.mark.parametrize("usage", [*USAGES.values(), ResumableEpochWise], ids=[*USAGES, "resumable"])
def test_metric_is_detached_from_all_events_of_its_usage(usage: Callable[[], Any]) -> None:
    metric: Any = metrics.Accuracy()
    engine: Any = Engine(hand_on)
    chosen = usage()
    metric.attach(engine, "accuracy", usage=chosen)
    assert metric.is_attached(engine, usage=chosen)
    metric.detach(engine, usage=chosen)
    assert not any(engine.has_event_handler(one) for one in (metric.started, metric.iteration_completed))
    engine.run_sync(CLASSES)
    assert engine.state.metrics == {}


def test_metric_that_is_attached_through_the_view_is_the_engines() -> None:
    metric: Any = metrics.Accuracy()
    engine: Any = Engine(hand_on)
    metric.attach(as_ignite(engine), "accuracy")
    assert metric.is_attached(engine)
    engine.run_sync(CLASSES)
    assert set(engine.state.metrics) == {"accuracy"}
    metric.detach(engine)
    assert not metric.is_attached(as_ignite(engine))


PROCESSES = """
import json, sys, warnings
warnings.simplefilter("ignore")
import anyio, torch
import ignite.distributed as idist
from ignite.metrics import Accuracy, Loss
from aengine import Engine

def evaluate(rank):
    data = torch.load(sys.argv[1])
    evaluator = Engine(lambda engine, batch: batch)
    Accuracy().attach(evaluator, "accuracy")
    Loss(torch.nn.functional.nll_loss).attach(evaluator, "loss")
    anyio.run(evaluator.run, data[rank :: idist.get_world_size()])
    if rank == 0:
        print(json.dumps(evaluator.state.metrics))

with idist.Parallel(backend="gloo", nproc_per_node=2, start_method="fork") as parallel:
    parallel.run(evaluate)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_metrics_of_processes_that_ignite_has_launched_are_those_of_all_the_data(tmp_path: Path) -> None:
    torch.save(CLASSES, tmp_path / "data.pt")
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, str(tmp_path / "data.pt")], capture_output=True, text=True, check=True
    )
    whole: Any = ignite.engine.Engine(hand_on)
    metrics.Accuracy().attach(whole, "accuracy")
    metrics.Loss(nn.functional.nll_loss).attach(whole, "loss")
    assert json.loads(done.stdout) == pytest.approx(whole.run(CLASSES).metrics)

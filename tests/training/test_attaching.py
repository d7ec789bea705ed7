"""What listens here is attached and removed as a whole, and what is no part of that says what to write."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeAlias

import pytest
import torch
from support.ignite import ignite
from support.record import AnyEngine
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MeanMetric, MetricCollection

from aengine import Engine, Events
from aengine.bus.emitter import RemovableEventHandle
from aengine.interop.ignite import as_ignite
from aengine.training import (
    AverageHandler,
    GradientStatistics,
    MetricHandler,
    OptimizerUpdate,
    SchedulerHandler,
    create_supervised_evaluator,
)

Attach: TypeAlias = Callable[[AnyEngine], RemovableEventHandle]


class Training:
    """A model and its optimizer, an engine that steps it, and what may be attached to one."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.metric = MetricHandler(MeanMetric(), "mean", every=2)
        self.scheduler = SchedulerHandler(StepLR(self.optimizer, 1))
        self.average = AverageHandler(AveragedModel(self.model), self.model)
        self.update = OptimizerUpdate(self.model, self.optimizer)
        self.gradients = GradientStatistics(self.model, self.optimizer, every=1)
        self.attach: dict[str, Attach] = {
            "metric": self.metric.attach,
            "scheduler": lambda engine: self.scheduler.attach(engine, Events.ITERATION_COMPLETED),
            "average": self.average.attach,
            "update": self.update.attach,
            "gradients": self.gradients.attach,
        }

    def engine(self, name: str) -> AnyEngine:
        def step(engine: AnyEngine, batch: float) -> float:
            self.optimizer.zero_grad()
            self.model(torch.tensor([batch])).backward()
            self.optimizer.step()
            return batch

        return Engine(step, name=name)

    def done(self) -> tuple[Any, ...]:
        """What each of them has done so far."""
        hooks = len(self.optimizer._optimizer_step_pre_hooks), len(self.optimizer._optimizer_step_post_hooks)
        rate = self.optimizer.param_groups[0]["lr"]
        return self.metric.iterations, rate, int(self.average.average.n_averaged), self.gradients.state_dict(), hooks


def listening(engine: AnyEngine) -> Any:
    return engine.listeners(), engine.statistics().handlers


@pytest.mark.parametrize("kind", Training().attach)
def test_what_attach_returns_removes_all_of_it_and_it_may_be_attached_again(kind: str) -> None:
    training = Training()
    first, second = training.engine("first"), training.engine("second")
    before = listening(first)
    handle = training.attach[kind](first)
    assert listening(first) != before
    for engine in (first, second):
        with pytest.raises(RuntimeError, match=r"attached to engine 'first' already: make another one"):
            training.attach[kind](engine)
    handle.remove()
    assert listening(first) == before
    done = training.done()
    first.run_sync([1.0, 2.0, 3.0])
    assert training.done() == done

    with training.attach[kind](second):
        second.run_sync([1.0, 2.0, 3.0])
    assert kind == "update" or training.done() != done
    training.attach[kind](first)


def test_update_that_was_removed_asks_to_be_attached() -> None:
    training = Training()
    engine = training.engine("trainer")
    loss = training.model(torch.ones(1))
    with training.update.attach(engine):
        training.update(engine, loss)
    with pytest.raises(RuntimeError, match=r"not attached to engine 'trainer': call  update.attach\(engine\)"):
        training.update(engine, loss)


def test_metric_whose_handler_was_removed_is_free_for_another_engine_at_once() -> None:
    metric = MeanMetric()
    first, second = Training().engine("first"), Training().engine("second")
    handle = MetricHandler(metric, "mean").attach(first)
    first.add_event_handler(Events.ITERATION_COMPLETED(once=1), first.terminate)
    first.run_sync([1.0, 2.0])
    handle.remove()
    second.load_state_dict({"iteration": 1, "epoch_length": 2, "max_epochs": 1})
    MetricHandler(metric, "mean").attach(second)  # which goes on within an epoch: the metric is not reset
    assert second.run_sync([1.0, 2.0], max_epochs=1).metrics["mean"] == 1.5


def test_metric_computed_on_time_is_computed_at_the_end_of_the_epoch_too() -> None:
    engine = Training().engine("trainer")
    MetricHandler(MeanMetric(), "mean", every=timedelta(hours=1)).attach(engine)
    assert engine.run_sync([1.0, 3.0]).metrics["mean"] == 2.0


# Wrong input

ENGINE: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
LINEAR = torch.nn.Linear(1, 1)
SGD = torch.optim.SGD(LINEAR.parameters(), lr=0.1)
AVERAGE = AveragedModel(LINEAR)


def wrong(given: Any) -> Any:
    """Return it, as what no type checker knows."""
    return given


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "metric: its engine first": (
        lambda: MetricHandler(wrong(ENGINE), "mean"),
        r"takes a metric of torchmetrics, got an engine, which goes to attach\(engine\)",
    ),
    "metric: a class": (
        lambda: MetricHandler(wrong(MeanMetric), "mean"),
        r"MeanMetric is a class, and MetricHandler\(metric, name\) takes a metric: MeanMetric\(...\)",
    ),
    "metric: several": (
        lambda: MetricHandler(wrong({"mean": MeanMetric()}), "mean"),
        "several go into a torchmetrics.MetricCollection",
    ),
    "metric: of pytorch-ignite": (
        lambda: MetricHandler(wrong(ignite.metrics.Accuracy()), "accuracy"),
        r"Accuracy is pytorch-ignite's, .*write  metric.attach\(as_ignite\(engine\), 'accuracy'\)",
    ),
    "metric: a class of pytorch-ignite": (
        lambda: MetricHandler(wrong(ignite.metrics.Accuracy), "accuracy"),
        r"Accuracy is pytorch-ignite's, .*write  metric.attach\(as_ignite\(engine\), 'accuracy'\)",
    ),
    "metric: without a name": (
        lambda: MetricHandler(MeanMetric(), wrong(None)),
        "takes the name of the result, got None",
    ),
    "metric: an engine for its name": (lambda: MetricHandler(MeanMetric(), wrong(ENGINE)), "takes the name of the"),
    "metric: no function": (
        lambda: MetricHandler(MeanMetric(), "mean", output_transform=wrong("loss")),
        "output_transform= must be callable, got .loss.",
    ),
    "metric: attached to a metric": (
        lambda: MetricHandler(MeanMetric(), "mean").attach(wrong(MeanMetric())),
        r"MetricHandler.attach\(engine\) takes an Engine of aengine's first, got MeanMetric\(\)",
    ),
    "metric: attached to pytorch-ignite's engine": (
        lambda: MetricHandler(MeanMetric(), "mean").attach(wrong(as_ignite(ENGINE))),
        r"MetricHandler.attach\(engine\) takes an Engine of aengine's first, got .*pytorch-ignite's",
    ),
    "evaluator: metrics without names": (
        lambda: create_supervised_evaluator(LINEAR, wrong([MeanMetric()])),
        "metrics= are metrics by name",
    ),
    "scheduler: its engine first": (
        lambda: SchedulerHandler(wrong(ENGINE)),
        r"takes a scheduler .*, got an engine, which goes to attach\(engine, event\)",
    ),
    "scheduler: a class": (
        lambda: SchedulerHandler(wrong(StepLR)),
        r"takes a scheduler, and StepLR is a class: StepLR\(optimizer, ...\)",
    ),
    "scheduler: without an event": (
        lambda: SchedulerHandler(StepLR(SGD, 1)).attach(ENGINE, wrong(None)),
        "expected an event such as Events.STARTED, .*got None",
    ),
    "scheduler: the event first": (
        lambda: SchedulerHandler(StepLR(SGD, 1)).attach(wrong(Events.EPOCH_COMPLETED), wrong(ENGINE)),
        r"SchedulerHandler.attach\(engine\) takes an Engine of aengine's first, got <Events.EPOCH_COMPLETED",
    ),
    "average: its engine first": (
        lambda: AverageHandler(wrong(ENGINE), LINEAR),
        r"takes a torch.optim.swa_utils.AveragedModel, got an engine, which goes to attach\(engine\)",
    ),
    "average: the model first": (
        lambda: AverageHandler(wrong(LINEAR), wrong(AVERAGE)),
        r"takes a torch.optim.swa_utils.AveragedModel, got a Linear",
    ),
    "average: an engine for the model": (
        lambda: AverageHandler(AVERAGE, wrong(ENGINE)),
        "takes the model that is trained, got ",
    ),
    "average: attached to a model": (
        lambda: AverageHandler(AVERAGE, LINEAR).attach(wrong(LINEAR)),
        r"AverageHandler.attach\(engine\) takes an Engine of aengine's first, got Linear",
    ),
    "update: attached to a model": (
        lambda: OptimizerUpdate(LINEAR, SGD).attach(wrong(LINEAR)),
        r"OptimizerUpdate.attach\(engine\) takes an Engine of aengine's first, got Linear",
    ),
    "gradients: the optimizer first": (
        lambda: GradientStatistics(wrong(SGD), wrong(LINEAR)),
        "takes a model, or a dictionary of names to parameters, got SGD",
    ),
    "gradients: attached to an optimizer": (
        lambda: GradientStatistics(LINEAR, SGD).attach(wrong(SGD)),
        r"GradientStatistics.attach\(engine\) takes an Engine of aengine's first, got SGD",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_answered_and_nothing_is_added(mistake: str) -> None:
    call, message = MISTAKES[mistake]
    before = listening(ENGINE)
    with pytest.raises(TypeError, match=message):
        call()
    assert listening(ENGINE) == before
    assert not SGD._optimizer_step_pre_hooks


@pytest.mark.parametrize("event", ["MINE", Events.EPOCH_COMPLETED | "MINE"], ids=["one", "of-two"])
def test_event_that_the_engine_does_not_have_is_refused_and_nothing_is_added(event: Any) -> None:
    training = Training()
    engine = training.engine("trainer")
    before = listening(engine)
    for attach in (training.scheduler.attach, training.average.attach):
        with pytest.raises(ValueError, match="engine 'trainer' has no event 'MINE'"):
            attach(engine, event)
        assert listening(engine) == before
        attach(engine, Events.EPOCH_COMPLETED).remove()  # it may still be attached


def test_what_is_written_for_a_metric_of_pytorch_ignite_works() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    metric = ignite.metrics.Accuracy()
    metric.attach(as_ignite(engine), "accuracy")
    batch = torch.tensor([[0.1, 0.9], [0.9, 0.1]]), torch.tensor([1, 1])
    assert engine.run_sync([batch]).metrics["accuracy"] == 0.5


def test_collection_is_a_metric() -> None:
    MetricHandler(MetricCollection([MeanMetric()]), "several").attach(Training().engine("trainer"))

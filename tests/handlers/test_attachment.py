"""Attachment: what keeps something of a run serves one engine, once."""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeAlias

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torchmetrics import MeanMetric

from aengine import Engine, Events
from aengine.engine import stateful_listeners
from aengine.handlers.early_stopping import EarlyStopping
from aengine.handlers.nan_guard import NanGuard
from aengine.handlers.profiling import profile
from aengine.handlers.system import SystemStatistics
from aengine.handlers.time_limit import Deadline, TimeLimit
from aengine.handlers.timer import Timer
from aengine.loggers import Instrumentation
from aengine.training import GradientStatistics, MetricHandler, OptimizerUpdate, SchedulerHandler

AnyEngine: TypeAlias = Engine[Any, Any]


def engine_named(name: str) -> AnyEngine:
    return Engine(lambda engine, batch: batch, name=name, thread=False)


def build() -> tuple[torch.nn.Module, SGD]:
    model = torch.nn.Linear(1, 1)
    return model, SGD(model.parameters(), lr=0.1)


def by_attach(make: Callable[[], Any]) -> Callable[[AnyEngine], Callable[[AnyEngine], Any]]:
    def attach(engine: AnyEngine) -> Callable[[AnyEngine], Any]:
        made = make()
        made.attach(engine)
        again: Callable[[AnyEngine], Any] = made.attach
        return again

    return attach


def of_scheduler(engine: AnyEngine) -> Callable[[AnyEngine], Any]:
    schedule = SchedulerHandler(StepLR(build()[1], 1))
    schedule.attach(engine, Events.EPOCH_COMPLETED)
    return lambda other: schedule.attach(other, Events.EPOCH_COMPLETED)


def of_instrumentation(engine: AnyEngine) -> Callable[[AnyEngine], Any]:
    instrumentation = Instrumentation()
    instrumentation.attach(engine)
    return instrumentation.attach


ATTACHED: dict[str, Callable[[AnyEngine], Callable[[AnyEngine], Any]]] = {
    "NanGuard": by_attach(NanGuard),
    "TimeLimit": by_attach(lambda: TimeLimit(10)),
    "Deadline": by_attach(lambda: Deadline(datetime(2100, 1, 1, tzinfo=UTC))),
    "EarlyStopping": by_attach(lambda: EarlyStopping(3, "loss", mode="min")),
    "Timer": by_attach(Timer),
    "SystemStatistics": by_attach(SystemStatistics),
    "GradientStatistics": by_attach(lambda: GradientStatistics(*build())),
    "OptimizerUpdate": by_attach(lambda: OptimizerUpdate(*build())),
    "MetricHandler": by_attach(lambda: MetricHandler(MeanMetric(), "mean")),
    "SchedulerHandler": of_scheduler,
    "Profiling": lambda engine: profile(engine, "traces", Events.ITERATION_STARTED(once=1)).attach,
    "Instrumentation": of_instrumentation,
}


@pytest.mark.parametrize("name", ATTACHED)
def test_second_attachment_is_refused_and_adds_nothing(name: str) -> None:
    first, second = engine_named("trainer"), engine_named("evaluator")
    attach_again = ATTACHED[name](first)
    for engine in (second, first):
        before = len(stateful_listeners(engine)), engine.statistics()
        with pytest.raises(RuntimeError, match=r"this \w+ is attached to engine 'trainer' already.*make another one"):
            attach_again(engine)
        assert (len(stateful_listeners(engine)), engine.statistics().handlers) == (before[0], before[1].handlers)
    second.run_sync([1.0])


def test_attachment_that_failed_is_none() -> None:
    stopping = EarlyStopping(3, "loss", mode="min")
    with pytest.raises(ValueError, match="no event 'MINE'"):
        stopping.attach(engine_named("trainer"), event="MINE")
    stopping.attach(engine_named("next"))
    timer = Timer()
    with pytest.raises(ValueError, match="no event 'MINE'"):
        timer.attach(engine_named("trainer"), pause="MINE")
    timer.attach(engine_named("next"))


def test_metric_of_two_engines_is_right_one_after_the_other_and_refused_one_within_the_other() -> None:
    metric = MeanMetric()
    trainer, evaluator = engine_named("trainer"), engine_named("evaluator")
    for engine in (trainer, evaluator):
        MetricHandler(metric, "mean").attach(engine)
    for _ in range(2):  # as pytorch-ignite's users do it, with one dictionary of metrics for two evaluators
        assert math.isclose(trainer.run_sync([1.0, 2.0], max_epochs=2).metrics["mean"], 1.5)
        assert math.isclose(evaluator.run_sync([5.0]).metrics["mean"], 5.0)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: evaluator.run_sync([7.0]))
    with pytest.raises(RuntimeError, match=r"engine 'evaluator' has begun .* make another MeanMetric"):
        trainer.run_sync([1.0, 2.0])

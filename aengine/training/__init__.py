"""Training with torch: supervised steps, metrics, schedules, averages of weights. One module each.

update      from a loss to a step of the optimizer: accumulation, clipping
supervised  `create_supervised_trainer`, `create_supervised_evaluator`, and their steps
moving      batches copied to a GPU beside the step
metrics     torchmetrics' metrics on an engine (extra `training`)
schedules   torch's learning-rate schedulers on an engine
averages    torch's averages of weights on an engine
gradients   statistics of gradients, weights and updates
lr_range    a learning rate to begin with
"""

from typing import TYPE_CHECKING

from aengine.lazy import lazy_names

if TYPE_CHECKING:
    from aengine.training.averages import AverageHandler
    from aengine.training.gradients import GradientEvents, GradientStatistics
    from aengine.training.lr_range import LRRange, lr_range_test
    from aengine.training.metrics import MetricHandler
    from aengine.training.moving import prefetch_to_device
    from aengine.training.schedules import SchedulerHandler
    from aengine.training.supervised import (
        create_supervised_evaluator,
        create_supervised_trainer,
        evaluating,
        prepare_batch,
        supervised_evaluation_step,
        supervised_training_step,
    )
    from aengine.training.update import OptimizerEvents, OptimizerUpdate
else:  # out of sight of type checkers, which would take any name for one of this module's
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "averages": "AverageHandler",
            "gradients": "GradientEvents GradientStatistics",
            "lr_range": "LRRange lr_range_test",
            "metrics": "MetricHandler",
            "moving": "prefetch_to_device",
            "schedules": "SchedulerHandler",
            "supervised": "create_supervised_evaluator create_supervised_trainer evaluating prepare_batch"
            " supervised_evaluation_step supervised_training_step",
            "update": "OptimizerEvents OptimizerUpdate",
        },
    )

__all__ = [
    "AverageHandler",
    "GradientEvents",
    "GradientStatistics",
    "LRRange",
    "MetricHandler",
    "OptimizerEvents",
    "OptimizerUpdate",
    "SchedulerHandler",
    "create_supervised_evaluator",
    "create_supervised_trainer",
    "evaluating",
    "lr_range_test",
    "prefetch_to_device",
    "prepare_batch",
    "supervised_evaluation_step",
    "supervised_training_step",
]

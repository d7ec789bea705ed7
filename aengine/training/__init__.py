"""Training with torch: supervised steps, metrics, schedules, averages of weights. One module each.

update         from a loss to a step of the optimizer: accumulation, clipping
supervised     `create_supervised_trainer`, `create_supervised_evaluator`, and their steps
moving         batches copied to a GPU beside the step
metrics        torchmetrics' metrics on an engine (extra `training`)
schedules      torch's learning-rate schedulers on an engine
averages       torch's averages of weights on an engine
gradients      statistics of gradients, weights and updates
lr_range_test  a learning rate to begin with
"""

from typing import TYPE_CHECKING

from aengine.lazy import lazy_names

if TYPE_CHECKING:
    from aengine.training.averages import attach_average
    from aengine.training.gradients import GradientEvents, GradientStatistics
    from aengine.training.lr_range_test import LRRange
    from aengine.training.metrics import attach_metric
    from aengine.training.moving import move_ahead
    from aengine.training.schedules import attach_scheduler
    from aengine.training.supervised import (
        create_supervised_evaluator,
        create_supervised_trainer,
        evaluating,
        prepare_batch,
        supervised_evaluation_step,
        supervised_training_step,
    )
    from aengine.training.update import Update, UpdateEvents
else:  # out of sight of type checkers, which would take any name for one of this module's
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "averages": "attach_average",
            "gradients": "GradientEvents GradientStatistics",
            "lr_range_test": "LRRange",
            "metrics": "attach_metric",
            "moving": "move_ahead",
            "schedules": "attach_scheduler",
            "supervised": "create_supervised_evaluator create_supervised_trainer evaluating prepare_batch"
            " supervised_evaluation_step supervised_training_step",
            "update": "Update UpdateEvents",
        },
    )

__all__ = [
    "GradientEvents",
    "GradientStatistics",
    "LRRange",
    "Update",
    "UpdateEvents",
    "attach_average",
    "attach_metric",
    "attach_scheduler",
    "create_supervised_evaluator",
    "create_supervised_trainer",
    "evaluating",
    "move_ahead",
    "prepare_batch",
    "supervised_evaluation_step",
    "supervised_training_step",
]

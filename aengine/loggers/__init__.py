"""Loggers beside the step: bounded, never slowing it, and counting what they could not write.

from aengine.loggers import JSONLines, Tracker

Tracker(JSONLines("log.jsonl")).attach(trainer, Events.ITERATION_COMPLETED(every=10) | Events.EPOCH_COMPLETED)

One class for each place to write to; `Sink` says what a sink of your own needs.
"""

from typing import TYPE_CHECKING

from aengine.lazy import lazy_names

if TYPE_CHECKING:
    from aengine.loggers.jsonl import JSONLines
    from aengine.loggers.mlflow import MLflow
    from aengine.loggers.opentelemetry import Instrumentation, OpenTelemetry
    from aengine.loggers.scalars import numbers_of
    from aengine.loggers.sink import Closable, Durable, Record, Rewindable, RunListener, Sink
    from aengine.loggers.tensorboard import TensorBoard
    from aengine.loggers.tracker import Tracker, TrackerStatistics
    from aengine.loggers.wandb import WandB
else:  # out of sight of type checkers, which would take any name for one of this module's
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "jsonl": "JSONLines",
            "mlflow": "MLflow",
            "opentelemetry": "Instrumentation OpenTelemetry",
            "scalars": "numbers_of",
            "sink": "Closable Durable Record Rewindable RunListener Sink",
            "tensorboard": "TensorBoard",
            "tracker": "Tracker TrackerStatistics",
            "wandb": "WandB",
        },
    )

__all__ = [
    "Closable",
    "Durable",
    "Instrumentation",
    "JSONLines",
    "MLflow",
    "OpenTelemetry",
    "Record",
    "Rewindable",
    "RunListener",
    "Sink",
    "TensorBoard",
    "Tracker",
    "TrackerStatistics",
    "WandB",
    "numbers_of",
]

"""Guesses: what a wrong word was meant to be. A near one of ours, or what is written here for another library's.

Only read where something is refused already.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


def near_word(word: str, words: Iterable[str]) -> str | None:
    """Return the word that is meant by one that nearly is it; capitals and hyphens do not count. None if none is."""
    plain = {_plain(one): one for one in words}
    found = get_close_matches(_plain(word), plain, n=1, cutoff=0.7)
    return plain[found[0]] if found else None


def _plain(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")


def _table(rows: Mapping[str, str]) -> Mapping[str, str]:
    return {word: advice.format(name=word) for words, advice in rows.items() for word in words.split()}


NAMES: Mapping[str, str] = _table(
    {
        "as_ignite ResumableEpochWise": "from aengine.interop.ignite import as_ignite, ResumableEpochWise",
        # pytorch-ignite
        "ModelCheckpoint DiskSaver": "from aengine import Checkpoint",
        "TerminateOnNan": "from aengine.handlers import NanGuard",
        "BasicTimeProfiler HandlersTimeProfiler":
            "from aengine.handlers import Profiler, format_statistics  # and engine.statistics()",
        "FastaiLRFinder": "from aengine.training import lr_range_test",
        "EMAHandler": "from aengine.training import AverageHandler  # it holds an AveragedModel of torch",
        "LRScheduler ReduceLROnPlateauScheduler create_lr_scheduler_with_warmup":
            "from aengine.training import SchedulerHandler  # it holds a scheduler of torch",
        "BaseParamScheduler BatchSizeScheduler ConcatScheduler CosineAnnealingScheduler CyclicalScheduler"
        " LinearCyclicalScheduler ParamGroupScheduler ParamScheduler PiecewiseLinear":
            "from aengine.training import SchedulerHandler  # of one of torch; pytorch-ignite's attach as they are",
        "EpochOutputStore ExpStateScheduler LambdaStateScheduler MultiStepStateScheduler PiecewiseLinearStateScheduler"
        " StateParamScheduler StepStateScheduler":
            "from ignite.handlers import {name}  # pytorch-ignite's own attaches as it is",
        "TensorboardLogger TensorBoardLogger":
            "from aengine.loggers import TensorBoard, Tracker  # Tracker(TensorBoard(directory)).attach(engine)",
        "MLflowLogger MLFlowLogger":
            "from aengine.loggers import MLflow, Tracker  # Tracker(MLflow(...)).attach(engine)",
        "WandBLogger WandbLogger":
            "from aengine.loggers import Tracker, WandB  # Tracker(WandB(...)).attach(engine)",
        "ClearMLLogger FBResearchLogger NeptuneLogger PolyaxonLogger VisdomLogger":
            "from aengine.loggers import Tracker  # of an object with write(records)",
        "global_step_from_engine": "from aengine.loggers import Tracker  # Tracker(sink, step=f), f(engine) -> int",
        "CallableEventWithFilter": "from aengine import FilteredEvent",
        "DeterministicEngine": "from aengine import Checkpoint  # any Engine resumes exactly",
        "Serializable": "from aengine import Stateful",
        "supervised_training_step_amp": "from aengine.training import supervised_training_step  # autocast_dtype=",
        "supervised_evaluation_step_amp": "from aengine.training import supervised_evaluation_step  # autocast_dtype=",
        "supervised_training_step_apex supervised_training_step_tpu":
            "from aengine.training import supervised_training_step",
        "convert_tensor": "from aengine.training import prefetch_to_device, prepare_batch",
        "Accuracy Average ConfusionMatrix EpochMetric Fbeta Loss MeanAbsoluteError MeanSquaredError Metric"
        " MetricsLambda Precision ROC_AUC Recall RunningAverage TopKCategoricalAccuracy metrics":
            "from aengine.training import MetricHandler  # of one of torchmetrics; pytorch-ignite's attach as they are",
        # Lightning
        "LightningModule Trainer": "from aengine.training import create_supervised_trainer  # or aengine.Engine(step)",
        "Callback": "from aengine import Engine, Events  # engine.add_event_handler(Events.EPOCH_COMPLETED, f)",
        "CSVLogger": "from aengine.loggers import JSONLines, Tracker",
        "RichProgressBar": "from aengine.handlers import ProgressBar, RichBars",
        "TQDMProgressBar": "from aengine.handlers import ProgressBar, TqdmBars",
        "DeviceStatsMonitor": "from aengine.handlers import SystemStatistics",
        "AdvancedProfiler PyTorchProfiler SimpleProfiler": "from aengine.handlers import Profiler",
        "LearningRateFinder": "from aengine.training import lr_range_test",
        "LearningRateMonitor": "from aengine.loggers import Tracker  # Tracker(sink, values=f)",
        "GradientAccumulationScheduler": "from aengine.training import OptimizerUpdate",
        "StochasticWeightAveraging": "from aengine.training import AverageHandler",
    }
)  # fmt: skip
"""Of a name that other libraries have, and no package of ours: the import to write here."""

KEYWORDS: Mapping[str, str] = _table(
    {
        # pytorch-ignite
        "process_function": "step",
        "event_name": "event",
        "score_function score_name": "metric",
        "min_delta": "threshold",
        "min_delta_mode": "threshold_mode",
        "cumulative_delta": "cumulative",
        "to_save": "state",
        "save_handler dirname": "directory",
        "limit_sec": "limit",
        "amp_mode": "autocast_dtype",
        "metric_names": "values",
        "global_step_transform": "step",
        "n_saved": "write keep=Keep(last=2)",
        # Lightning, and what is written by hand
        "dirpath save_dir": "directory",
        "every_n_train_steps every_n_epochs": "write .attach(engine, Events.ITERATION_COMPLETED(every=500))",
        "save_top_k": 'write keep=Keep(best=1, metric="accuracy")',
        "monitor": "metric",
        "precision": "autocast_dtype",
        "accumulate_grad_batches accumulation_steps": "gradient_accumulation_steps",
        "gradient_clip_val max_norm": "clip_gradients",
        "criterion": "loss_fn",
        "dataloader loader train_dataloader": "data",
        "iterations max_steps steps": "max_iters",
        "buffer_size capacity maxsize queue_size": "buffer",
    }
)
"""Of a keyword that other libraries have, and ours has not: the parameter that is meant, or a sentence."""

OF_ATTACH: Mapping[str, str] = {
    "engine": "engine",
    "evaluator": "trainer, evaluator=evaluator",
    "event": "engine, event",
    "event_name": "engine, event",
    "trainer": "trainer",
}
"""Keywords that a constructor does not take, and `attach` does: how it is called with them."""

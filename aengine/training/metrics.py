"""torchmetrics' metrics on an engine: reset at the epoch, updated with each output, their results in `state.metrics`.

    attach_metric(evaluator, torchmetrics.classification.MulticlassAccuracy(num_classes=10), "accuracy")
    attach_metric(trainer, torchmetrics.RunningMean(window=100), "loss", every=10, epoch_bound=False)

Whatever has torchmetrics' interface goes: its collections, wrappers and trackers, and metrics of one's own. They live
where they are put: `metric.to(device)` for outputs on a GPU. Some look for bad values at each update, for which a GPU
must be waited for: `nan_strategy="disable"` and `validate_args=False` are faster.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import torch

from aengine.checkpoint.capture.metrics import MetricStates
from aengine.engine import Engine
from aengine.errors import missing_package
from aengine.events import Events

try:
    from torchmetrics import Metric, MetricCollection
    from torchmetrics.wrappers import MetricTracker
except ImportError as error:
    raise missing_package(__name__, "torchmetrics>=1.4", "training") from error

AnyMetric: TypeAlias = Metric | MetricCollection | MetricTracker

_logger = logging.getLogger("aengine.training")


def attach_metric(
    engine: Engine[Any, Any],
    metric: AnyMetric,
    name: str,
    *,
    output_transform: Callable[[Any], Any] = lambda output: output,
    every: int | None = None,
    epoch_bound: bool = True,
) -> "AttachedMetric":
    """Have a metric computed by an engine.

    It is reset when an epoch begins, a tracker incremented; updated when an iteration is completed; and computed when
    the epoch is. A result of one number becomes a plain number, `engine.state.metrics[name]`; results by name, as of
    collections, become `engine.state.metrics["name/key"]` each. A `Checkpoint` of the engine saves the metric without
    being asked, so that a run that is resumed within an epoch computes what it would have computed.

    Args:
        engine: whose outputs are measured.
        metric: of torchmetrics.
        name: of the result.
        output_transform: makes of the output what the metric takes: a tuple of arguments, a dictionary of them by name,
            or the only one.
        every: compute it after every so many iterations, too: of the epoch so far, or of what the metric itself
            remembers, as `RunningMean` does.
        epoch_bound: False to go on over the epochs of a run, and be reset when a run begins anew.

    Raises:
        TypeError: this is no metric of torchmetrics.
        ValueError: another one has this name on this engine; or `every` is less than 1.
        RuntimeError: this very metric is attached to this engine already.
    """
    attached = AttachedMetric(metric, name, output_transform=output_transform, epoch_bound=epoch_bound)
    attached.attach(engine, every=every)
    return attached


class AttachedMetric:
    """A metric on an engine: what `attach_metric` returns.

    Its `state_dict` has what torchmetrics' own has not by default: the metric's state under way, all of it, and that of
    the metrics that it is made of.

    Attributes:
        metric: the metric.
        name: of its result.
        iterations: how many outputs there have been since it was last reset.
    """

    def __init__(
        self, metric: AnyMetric, name: str, *, output_transform: Callable[[Any], Any], epoch_bound: bool
    ) -> None:
        _check(metric, name)
        self.metric = metric
        self.name = name
        self.iterations = 0
        self._transform = output_transform
        self._is_epoch_bound = epoch_bound
        self._states = MetricStates(metric, name)

    def attach(self, engine: Engine[Any, Any], *, every: int | None = None) -> None:
        """Have it computed by an engine: see `attach_metric`."""
        others = [one for one in engine.stateful_listeners() if isinstance(one, AttachedMetric)]
        for one in others:
            if one.metric is self.metric:
                raise RuntimeError(
                    f"this {type(self.metric).__qualname__} is attached to engine {engine.name!r} already, as"
                    f" {one.name!r}, and would be updated twice: make another one for {self.name!r}"
                )
        if self.name in [one.name for one in others]:
            raise ValueError(f"engine {engine.name!r} has a metric {self.name!r} already: give this one another name")
        now_and_then = None if every is None else Events.ITERATION_COMPLETED(every=every)
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
        if now_and_then is not None:
            engine.add_event_handler(now_and_then, self._publish)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._publish)

    def state_dict(self) -> dict[str, Any]:
        """Return the state under way. The tensors are live: a `Checkpoint` copies what is saved."""
        return {"iterations": self.iterations, "metrics": self._states.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with a state under way.

        Raises:
            ValueError: it is of a metric that is made of others.
        """
        self._states.load_state_dict(state_dict["metrics"])
        self.iterations = state_dict["iterations"]

    def _begin(self, engine: Engine[Any, Any]) -> None:
        state = engine.state
        seen = state.iteration - (state.epoch_start if self._is_epoch_bound else 0)
        if seen == 0:
            self.iterations = 0
            if isinstance(self.metric, MetricTracker):
                self.metric.increment()
            else:
                self.metric.reset()
        elif self._is_epoch_bound and seen != self.iterations:
            _logger.warning(
                "metric %r goes on within an epoch and has %d of its %d iterations: its state was not saved with the"
                " engine's, or it was attached later",
                self.name,
                self.iterations,
                seen,
            )

    def _update(self, engine: Engine[Any, Any]) -> None:
        given = self._transform(engine.state.output)
        if isinstance(given, tuple):
            arguments: tuple[Any, ...] = given
            self.metric.update(*arguments)
        elif isinstance(given, dict):
            self.metric.update(**cast(dict[str, Any], given))
        else:
            self.metric.update(given)
        self.iterations += 1

    def _publish(self, engine: Engine[Any, Any]) -> None:
        engine.state.metrics.update(_results(self.name, self.metric.compute()))


def _results(name: str, result: Any) -> dict[str, Any]:
    """Return results by full name: numbers as plain ones, so that they can be written down anywhere."""
    if isinstance(result, Mapping):
        found: dict[str, Any] = {}
        named: Mapping[Any, Any] = result
        for key, value in named.items():
            found.update(_results(f"{name}/{key}", value))
        return found
    return {name: _plain(result)}


def _plain(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.item() if result.dim() == 0 else result.detach()
    if isinstance(result, list | tuple):
        return [_plain(one) for one in cast(list[Any], result)]
    return result


def _check(metric: Any, name: Any) -> None:
    if not isinstance(metric, Metric | MetricCollection | MetricTracker):
        raise TypeError(
            f"attach_metric(engine, metric, name) takes a metric of torchmetrics, got {metric!r}: several go into a"
            " torchmetrics.MetricCollection"
        )
    if not isinstance(name, str) or not name:
        raise TypeError(f"attach_metric(engine, metric, name) takes the name of the result, got {name!r}")

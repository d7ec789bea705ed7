"""torchmetrics' metrics on an engine: reset at the epoch, updated with each output, their results in `state.metrics`.

    MetricHandler(torchmetrics.classification.MulticlassAccuracy(num_classes=10), "accuracy").attach(evaluator)
    MetricHandler(torchmetrics.RunningMean(window=100), "loss", every=10, epoch_bound=False).attach(trainer)

All of torchmetrics' classes will do, also its collections, wrappers and trackers, and metrics derived from them. A
metric stays on its device: call `metric.to(device)` for outputs on a GPU. Some check values at each update, and wait
for the GPU: `nan_strategy="disable"` and `validate_args=False` are faster.
"""

import logging
import weakref
from collections.abc import Callable, Generator, Mapping
from datetime import timedelta
from typing import Any, TypeAlias, cast

import torch

from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.callables import check_callable, name_of
from aengine.checkpoint.capture.metrics import MetricStates
from aengine.engine import Engine, stateful_listeners
from aengine.events import EventLike, Events
from aengine.extras import missing_package
from aengine.keywords import explain_wrong_call

try:
    from torchmetrics import Metric, MetricCollection
    from torchmetrics.wrappers import MetricTracker
except ImportError as error:
    raise missing_package(__name__, "torchmetrics>=1.4", "training") from error

AnyMetric: TypeAlias = Metric | MetricCollection | MetricTracker

_logger = logging.getLogger("aengine.training")

_in_use: "weakref.WeakValueDictionary[int, MetricHandler]" = weakref.WeakValueDictionary()
"""On which engine a metric was last reset, by the id of the metric, which its user keeps alive. It shows that two
engines have one metric, which is fine while they run one after the other, and would mix their outputs otherwise."""


@explain_wrong_call
class MetricHandler:
    """Has an engine compute a metric.

    It is reset when an epoch begins (a tracker is incremented), updated when an iteration is completed, and computed
    when the epoch is completed. A result of one number becomes a plain number, `engine.state.metrics[name]`; results by
    name, as of collections, become `engine.state.metrics["name/key"]` each. A `Checkpoint` of the engine saves the
    metric without being asked: a run that is resumed within an epoch computes what it would have computed. Saved is all
    of its current state, and that of the metrics that it consists of: by default torchmetrics' own `state_dict` has
    neither.

    Two handlers, each of its engine, may have one metric as long as no engine begins in the middle of an epoch of the
    other, as an evaluator that a handler of the trainer runs may do: the next update of the first is a RuntimeError
    then.

    Args:
        metric: a metric of torchmetrics.
        name: the name of the result.
        output_transform: makes of the output what the metric takes: a tuple of arguments, a dictionary of them by name,
            or the only argument.
        every: compute it also after every so many iterations, or at most once in so long a time: of the epoch so far,
            or of the window that the metric itself keeps, as `RunningMean` does.
        epoch_bound: False to continue over the epochs of a run, and be reset when another run begins.

    Attributes:
        metric: the metric.
        name: the name of its result.
        iterations: the number of outputs since it was last reset.

    Raises:
        TypeError: it is no metric of torchmetrics, or the name is no text.
        ValueError: `every` is less than 1.
    """

    def __init__(
        self,
        metric: AnyMetric,
        name: str,
        *,
        output_transform: Callable[[Any], Any] = lambda output: output,
        every: int | timedelta | None = None,
        epoch_bound: bool = True,
    ) -> None:
        _check(metric, name)
        check_callable(output_transform, "output_transform=", "output_transform", "output")
        self.metric = metric
        self.name = name
        self.iterations = 0
        self._attachment = Attachment(self)
        self._engine_name = ""
        self._is_attached = False
        self._transform = output_transform
        self._is_epoch_bound = epoch_bound
        self._states = MetricStates(metric, name)
        self._computed_at: EventLike = Events.EPOCH_COMPLETED
        if every is not None:
            self._computed_at = Events.ITERATION_COMPLETED(every=every) | Events.EPOCH_COMPLETED

    def attach(self, engine: Engine[Any, Any]) -> RemovableEventHandle:
        """Have an engine compute it, of the outputs of that engine.

        Raises:
            TypeError: it is no engine.
            ValueError: another metric has this name on this engine.
            RuntimeError: this is attached already, or its metric is to this engine.
        """
        return self._attachment.begin(engine, self._listen(engine))

    def _listen(self, engine: Engine[Any, Any]) -> Generator[RemovableEventHandle]:
        others = [one for one in stateful_listeners(engine) if isinstance(one, MetricHandler)]
        for one in others:
            if one.metric is self.metric:
                raise RuntimeError(
                    f"this {name_of(self.metric)} is attached to engine {engine.name!r} already, as {one.name!r}, and"
                    f" would be updated twice: make another one for {self.name!r}"
                )
        if self.name in [one.name for one in others]:
            raise ValueError(f"engine {engine.name!r} has a metric {self.name!r} already: give this one another name")
        self._engine_name = engine.name
        self._is_attached = True
        _in_use.setdefault(id(self.metric), self)
        yield RemovableEventHandle(self._release)
        yield engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        yield engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
        yield engine.add_event_handler(self._computed_at, self._compute)

    def _release(self) -> None:
        self._is_attached = False
        if _in_use.get(id(self.metric)) is self:
            del _in_use[id(self.metric)]

    def state_dict(self) -> dict[str, Any]:
        """Return the current state. Its tensors are those of the metric: a `Checkpoint` copies what it saves."""
        return {"iterations": self.iterations, "metrics": self._states.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue with such a state.

        Raises:
            ValueError: it is of a metric that consists of other metrics.
        """
        self._states.load_state_dict(state_dict["metrics"])
        _in_use[id(self.metric)] = self
        self.iterations = state_dict["iterations"]

    def _begin(self, engine: Engine[Any, Any]) -> None:
        state = engine.state
        seen = state.iteration - (state.epoch_start if self._is_epoch_bound else 0)
        if seen == 0:
            _in_use[id(self.metric)] = self
            self.iterations = 0
            if isinstance(self.metric, MetricTracker):
                self.metric.increment()
            else:
                self.metric.reset()
        elif self._is_epoch_bound and seen != self.iterations:
            _logger.warning(
                "metric %r continues within an epoch and has %d of its %d iterations: its state was not saved with the"
                " engine's, or it was attached later",
                self.name,
                self.iterations,
                seen,
            )

    def _update(self, engine: Engine[Any, Any]) -> None:
        other = _in_use.get(id(self.metric))
        if other is not self:
            if not self._is_attached:  # a handler before this one has removed it, at this very event
                return
            name = "another engine" if other is None else f"engine {other._engine_name!r}"  # noqa: SLF001 -- of this class
            raise RuntimeError(
                f"{name} has begun an epoch with the metric of {self.name!r} in the middle of one of engine"
                f" {engine.name!r}, and has reset it: make another {name_of(self.metric)} for it"
            )
        given = self._transform(engine.state.output)
        if isinstance(given, tuple):
            self.metric.update(*given)
        elif isinstance(given, dict):
            self.metric.update(**cast(dict[str, Any], given))
        else:
            self.metric.update(given)
        self.iterations += 1

    def _compute(self, engine: Engine[Any, Any]) -> None:
        engine.state.metrics.update(_results(self.name, self.metric.compute()))


def _results(name: str, result: Any) -> dict[str, Any]:
    """Return results by full name, single numbers as plain numbers, which any logger can write."""
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
    kind: type = metric if isinstance(metric, type) else type(metric)
    if any(one.__module__.partition(".")[0] == "ignite" for one in kind.__mro__):
        raise TypeError(
            f"MetricHandler(metric, name) takes a metric of torchmetrics; {kind.__name__} is pytorch-ignite's, which"
            f" attaches itself: write  metric.attach(as_ignite(engine), {name!r}) , with as_ignite of"
            " aengine.interop.ignite"
        )
    if isinstance(metric, Engine):
        raise TypeError(
            "MetricHandler(metric, name) takes a metric of torchmetrics, got an engine, which goes to attach(engine)"
        )
    if kind is metric and issubclass(kind, Metric | MetricCollection | MetricTracker):
        raise TypeError(
            f"{kind.__name__} is a class, and MetricHandler(metric, name) takes a metric: {kind.__name__}(...)"
        )
    if not isinstance(metric, Metric | MetricCollection | MetricTracker):
        raise TypeError(
            f"MetricHandler(metric, name) takes a metric of torchmetrics, got {metric!r}: several go into a"
            " torchmetrics.MetricCollection"
        )
    if not isinstance(name, str) or not name:
        raise TypeError(f"MetricHandler(metric, name) takes the name of the result, got {name!r}")

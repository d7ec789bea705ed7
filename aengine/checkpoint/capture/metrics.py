"""Metrics of torchmetrics that are handed in as state: their own `state_dict` lacks what they have accumulated.

It is left out by default, and what `persistent(True)` adds lacks the number of updates and whatever is not registered
as state. torchmetrics is not imported for this: a metric is recognised by its methods.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, cast

import torch

Plain: TypeAlias = bool | int | float | str | None

_CACHES = {"_cache", "_computed", "_forward_cache"}


def is_metric(value: Any) -> bool:
    """Say whether this is a metric of torchmetrics, or a collection, a wrapper or a tracker of them."""
    return (
        isinstance(value, torch.nn.Module)
        and all(callable(getattr(value, name, None)) for name in ("update", "compute", "reset"))
        and any(True for _ in _metrics_in(value))
    )


class MetricPart:
    """A metric with its state under way, beside its own `state_dict`."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self._states = MetricStates(metric)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it. The tensors are live."""
        return {"module": self.metric.state_dict(), "metrics": self._states.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with a state under way.

        Raises:
            ValueError: it is of a metric that is made of others.
        """
        self._states.check(state_dict["metrics"])
        self.metric.load_state_dict(state_dict["module"])
        self._states.load_state_dict(state_dict["metrics"])


class MetricStates:
    """The state under way of a metric, and of those that it is made of, by their paths."""

    def __init__(self, metric: Any, name: str = "the metric") -> None:
        self._metric = metric
        self._name = name
        # What differs from this is state, and the rest is how the metric was made.
        self._made = {path: _plain_values(one) for path, one in _metrics_in(metric)}

    def state_dict(self) -> dict[str, Any]:
        """Return all of it. The tensors are live."""
        if hasattr(self._metric, "compute_groups"):
            self._metric.items(copy_state=False)  # those that share the state of another one have it up to date
        return {path: self._state_of(path, one) for path, one in _metrics_in(self._metric)}

    def check(self, state_dict: Mapping[str, Any]) -> None:
        """Raise a ValueError if this is of a metric that is made of others. A tracker is given as many as it had."""
        if hasattr(self._metric, "increment"):
            while len(dict(_metrics_in(self._metric))) < len(state_dict):
                self._metric.increment()
        here = dict(_metrics_in(self._metric))
        _compare(self._name, here, state_dict)
        for path, one in here.items():
            _compare(f"{self._name} {path}".strip(), one.metric_state, state_dict[path]["states"])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with a state under way.

        Raises:
            ValueError: it is of a metric that is made of others.
        """
        self.check(state_dict)
        for path, one in _metrics_in(self._metric):
            saved = state_dict[path]
            one.reset()  # forgets what it has cached
            for name, value in {**self._made.get(path, {}), **saved["values"]}.items():
                setattr(one, name, value)
            for name, value in {**saved["states"], **saved["tensors"]}.items():
                setattr(one, name, _moved(value, one.device))

    def _state_of(self, path: str, metric: Any) -> dict[str, Any]:
        made = self._made.get(path, {})  # of a tracker's, that came later: all
        states: dict[str, Any] = metric.metric_state
        return {
            "states": {name: [*value] if isinstance(value, list) else value for name, value in states.items()},
            "tensors": {  # such as the least and greatest of MinMaxMetric
                name: value
                for name, value in vars(metric).items()
                if isinstance(value, torch.Tensor) and name not in states and name not in _CACHES
            },
            "values": {name: value for name, value in _plain_values(metric).items() if made.get(name, metric) != value},
        }


def _metrics_in(metric: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the metrics that one is made of, itself included, each with its path. A collection is none."""
    for path, one in metric.named_modules():
        if hasattr(one, "metric_state") and hasattr(one, "add_state"):
            yield path, one


def _compare(what: str, here: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    if here.keys() != saved.keys():
        raise ValueError(f"{what} has {_shown(here)} here, and what was saved had {_shown(saved)}")


def _shown(names: Mapping[str, Any]) -> list[str]:
    return [name or "itself" for name in names]


def _plain_values(metric: Any) -> dict[str, Plain]:
    return {
        name: value
        for name, value in vars(metric).items()
        if name not in _CACHES and isinstance(value, bool | int | float | str | None)
    }


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, list | tuple):
        make: Any = type(value)
        return make([_moved(one, device) for one in cast(list[Any], value)])
    return value

"""Scores: the one number by which a run is judged, and in which direction it is better."""

from collections.abc import Callable
from typing import Any, TypeAlias

from aengine.engine import Engine

MODES = {"max": "more is better", "min": "less is better"}
"""What `mode=` may be, for `check_choice`."""

Score: TypeAlias = str | Callable[[Engine[Any, Any]], float]
"""The name of a metric in `engine.state.metrics`, or `f(engine)` that returns the number."""


def score_reader(score: Any, argument: str) -> Callable[[Engine[Any, Any]], float]:
    """Return a function that reads a score from an engine. Without such a metric, its error names those that there are.

    Raises:
        TypeError: it is neither a name nor callable.
    """
    if isinstance(score, str):
        return lambda engine: _read(engine, score)
    if not callable(score):
        raise TypeError(
            f"{argument}= takes the name of a metric in engine.state.metrics, or f(engine) that returns a number; got"
            f" {score!r}"
        )
    function: Callable[[Engine[Any, Any]], Any] = score
    return lambda engine: float(function(engine))


def _read(engine: Engine[Any, Any], name: str) -> float:
    metrics = engine.state.metrics
    if name not in metrics:
        raise RuntimeError(
            f"engine {engine.name!r} has no metric {name!r} at this event; it has {list(metrics) or 'none'}. Handlers"
            " run in order of registration: attach what computes it first, or pass f(engine) that returns the number"
        )
    return float(metrics[name])

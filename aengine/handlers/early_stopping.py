"""Early stopping: the run ends when a score has not improved for a while."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aengine.engine import Engine
from aengine.events import AnyEvent, Events
from aengine.handlers.scores import Score, score_reader


@dataclass(frozen=True)
class _Seen:
    """Replaced as a whole, for it may be read on another thread."""

    best: float | None = None
    waited: int = 0


class EarlyStopping:
    """Terminates a run when a score has not improved for `patience` looks at it.

        EarlyStopping(patience=3, score="accuracy", mode="max").attach(trainer, evaluator)

    A score that is not a number is no improvement. A `Checkpoint` of the trainer saves what was seen, without being
    asked. A run that was stopped by this and is loaded has nothing left, and is terminated when it begins.

    Args:
        patience: how many looks in a row may see no improvement; at the last of them the run is terminated.
        score: the name of a metric, or `f(engine)` that returns a number.
        mode: "max" if larger is better, "min" if smaller is.
        threshold: by how much a score must be better than the best one.
        cumulative: whether the best one stays when it is exceeded by less than the threshold, so that many small steps
            make an improvement together.
        threshold_mode: "abs" for a difference, "rel" for a share of the best score.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """

    def __init__(
        self,
        patience: int,
        score: Score,
        *,
        mode: str,
        threshold: float = 0.0,
        cumulative: bool = False,
        threshold_mode: str = "abs",
    ) -> None:
        if type(patience) is not int or patience < 1:
            raise ValueError(f"patience= is a whole number of looks, 1 or more; got {patience!r}")
        if not 0 <= threshold < math.inf:
            raise ValueError(f"threshold= is 0 or more, got {threshold!r}; mode= says in which direction")
        _check_choice("mode", mode, "max", "min")
        _check_choice("threshold_mode", threshold_mode, "abs", "rel")
        self._patience = patience
        self._read = score_reader(score, "score")
        self._sign = 1 if mode == "max" else -1
        self._threshold = threshold
        self._is_cumulative = cumulative
        self._is_relative = threshold_mode == "rel"
        self._seen = _Seen()
        self._was_loaded = False

    @property
    def best(self) -> float | None:
        """The score to be exceeded; None before the first."""
        return self._seen.best

    @property
    def waited(self) -> int:
        """How many looks in a row have seen no improvement."""
        return self._seen.waited

    def attach(
        self, trainer: Engine[Any, Any], evaluator: Engine[Any, Any] | None = None, event: AnyEvent | None = None
    ) -> None:
        """Look at the score of the evaluator when that is completed; without one, of the trainer at each epoch's end.

        The evaluator may run inline or beside the step. After a termination beside it, the step in flight is the last.

        Args:
            trainer: what is terminated.
            evaluator: whose score it is; the trainer by default.
            event: when to look instead.

        Raises:
            ValueError: the event is not registered.
            TypeError: these are no engines.
            RuntimeError: this looks at the trainer or the evaluator already.
        """
        for engine in (trainer, evaluator or trainer):
            if not isinstance(engine, Engine):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"EarlyStopping.attach(trainer, evaluator) takes engines, got {engine!r}")
            if engine.has_event_handler(self._look):
                raise RuntimeError(
                    f"this EarlyStopping looks at engine {engine.name!r} already: make another one for another score;"
                    " event= takes several, joined by |"
                )
        trainer.add_event_handler(Events.STARTED, self._begin)  # through this, too, its state is found
        if evaluator is None or evaluator is trainer:
            trainer.add_event_handler(event or Events.EPOCH_COMPLETED, self._look)
        else:
            evaluator.add_event_handler(event or Events.COMPLETED, self._look, trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the best score and how long it has been waited for a better one."""
        seen = self._seen
        return {"best": seen.best, "waited": seen.waited}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on waiting."""
        self._seen = _Seen(state_dict["best"], state_dict["waited"])
        self._was_loaded = True

    def _begin(self, engine: Engine[Any, Any]) -> None:
        was_loaded, self._was_loaded = self._was_loaded, False
        if engine.state.iteration == 0:
            self._seen = _Seen()
        elif was_loaded and self.waited >= self._patience:
            engine.terminate()

    def _look(self, engine: Engine[Any, Any], trainer: Engine[Any, Any] | None = None) -> None:
        score, best, waited = self._read(engine), self._seen.best, self._seen.waited
        if self._is_better(score, best, self._threshold):
            self._seen = _Seen(score)
            return
        if not self._is_cumulative and self._is_better(score, best, 0.0):
            best = score
        self._seen = _Seen(best, waited + 1)
        if waited + 1 >= self._patience:
            stopped = trainer or engine
            stopped.logger.info(
                "engine %r is terminated: no better score than %s in %d looks", stopped.name, best, waited + 1
            )
            stopped.terminate()

    def _is_better(self, score: float, best: float | None, threshold: float) -> bool:
        if best is None:
            return not math.isnan(score)
        needed = threshold * abs(best) if self._is_relative else threshold
        return self._sign * score > self._sign * best + needed


def _check_choice(name: str, value: Any, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{name}= is one of {', '.join(map(repr, choices))}, got {value!r}")

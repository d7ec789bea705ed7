"""Early stopping: the run ends when a score has not improved for a while."""

import math
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal
from weakref import ref

from aengine.arguments import check_choice, check_whole
from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.engine import Engine
from aengine.events import EventLike, Events
from aengine.handlers.scores import MODES, Score, score_reader
from aengine.keywords import explain_wrong_call


@dataclass(frozen=True)
class _Progress:
    """Replaced as a whole: another thread may read it at any time, and never finds one half of it new."""

    best: float | None = None
    waited: int = 0


@explain_wrong_call
class EarlyStopping:
    """Terminates a run when a score has not improved `patience` times in a row.

        EarlyStopping(3, "accuracy", mode="max").attach(trainer, evaluator=evaluator)

    A score of NaN is no improvement. A `Checkpoint` of the trainer saves the best score and the count with it.
    A run that was stopped by this, and is loaded, is terminated as soon as it begins.

    Args:
        patience: how many scores in a row may be no improvement; at the last of them the run is terminated.
        metric: the name of the metric that is the score, or `f(engine)` that returns a number.
        mode: "max" if more is better, "min" if less is.
        threshold: by how much a score must be better than the best one to be an improvement.
        threshold_mode: "abs" for a difference, "rel" for a fraction of the best score.
        cumulative: keep the best score when it is exceeded by less than the threshold, so that many small steps make an
            improvement together.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """

    def __init__(
        self,
        patience: int,
        metric: Score,
        *,
        mode: Literal["max", "min"],
        threshold: float = 0.0,
        threshold_mode: Literal["abs", "rel"] = "abs",
        cumulative: bool = False,
    ) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"threshold= is a number, 0 or more, got {threshold!r}")
        if not 0 <= threshold < math.inf:
            raise ValueError(f"threshold= is 0 or more, got {threshold!r}; mode= says in which direction")
        self._patience = check_whole(patience, "patience=", minimum=1, of="scores")
        self._read = score_reader(metric, "metric")
        self._sign = 1 if check_choice(mode, "mode=", MODES) == "max" else -1
        self._threshold = threshold
        self._is_cumulative = cumulative
        self._is_relative = check_choice(threshold_mode, "threshold_mode=", ("abs", "rel")) == "rel"
        self._attachment = Attachment(self)
        self._progress = _Progress()
        self._was_loaded = False

    @property
    def best(self) -> float | None:
        """The score to be exceeded; None before the first."""
        return self._progress.best

    @property
    def waited(self) -> int:
        """How many scores in a row were no improvement."""
        return self._progress.waited

    def attach(
        self, trainer: Engine[Any, Any], event: EventLike | None = None, *, evaluator: Engine[Any, Any] | None = None
    ) -> RemovableEventHandle:
        """Read the evaluator's score at its COMPLETED; without an evaluator, the trainer's at each EPOCH_COMPLETED.

        The evaluator may run inline or beside the step; if it runs beside it, the step in flight is still completed.

        Args:
            trainer: the engine to terminate.
            event: when to read it instead: an event of the engine that has the score.
            evaluator: the engine that has the score; the trainer by default.

        Raises:
            ValueError: the event is not registered.
            TypeError: these are no engines and event.
            RuntimeError: this is attached already.
        """
        advice = "; event may be several, joined by |"
        return self._attachment.begin(trainer, self._listen(trainer, event, evaluator), advice)

    def _listen(
        self, trainer: Engine[Any, Any], event: EventLike | None, evaluator: Engine[Any, Any] | None
    ) -> Generator[RemovableEventHandle]:
        _check_evaluator(event, evaluator)
        judged = evaluator or trainer
        if event is None:
            event = Events.EPOCH_COMPLETED if judged is trainer else Events.COMPLETED
        judged.on(event)  # raises for what is no event of that engine, before anything is added
        # Also if the score is the evaluator's: a checkpoint of the trainer finds the state through this handler.
        yield trainer.add_event_handler(Events.STARTED, self._begin)
        # Weakly, since a handler of the trainer's often has the evaluator: each would keep the other.
        yield judged.add_event_handler(event, partial(self._judge, ref(trainer)))

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, and how many scores in a row were no improvement."""
        return asdict(self._progress)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from there."""
        self._progress = _Progress(state_dict["best"], state_dict["waited"])
        self._was_loaded = True

    def _begin(self, engine: Engine[Any, Any]) -> None:
        was_loaded, self._was_loaded = self._was_loaded, False
        if engine.state.iteration == 0:
            self._progress = _Progress()
        elif was_loaded and self.waited >= self._patience:
            engine.terminate()

    def _judge(self, trainer: "ref[Engine[Any, Any]]", engine: Engine[Any, Any]) -> None:
        score, best, waited = self._read(engine), self.best, self.waited + 1
        if self._is_better(score, best, self._threshold):
            self._progress = _Progress(score)
            return
        if not self._is_cumulative and self._is_better(score, best, 0.0):
            best = score
        self._progress = _Progress(best, waited)
        stopped = trainer()
        if waited >= self._patience and stopped is not None:
            stopped.logger.info("engine %r is terminated: %d scores were no better than %s", stopped.name, waited, best)
            stopped.terminate()

    def _is_better(self, score: float, best: float | None, threshold: float) -> bool:
        if best is None:
            return not math.isnan(score)
        needed = threshold * abs(best) if self._is_relative else threshold
        return self._sign * score > self._sign * best + needed


def _check_evaluator(event: Any, evaluator: Any) -> None:
    if isinstance(event, Engine) or not isinstance(evaluator, Engine | None):
        given = event if isinstance(event, Engine) else evaluator
        raise TypeError(
            f"an EarlyStopping is given the engine that has the score as evaluator=, got {given!r}: write"
            "  attach(trainer, evaluator=evaluator)"
        )

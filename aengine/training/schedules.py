"""Schedules: torch's learning-rate schedulers on an engine.

    attach_scheduler(trainer, OneCycleLR(optimizer, 0.1, total_steps=1000), UpdateEvents.OPTIMIZER_STEPPED)
    attach_scheduler(trainer, CosineAnnealingLR(optimizer, T_max=10), Events.EPOCH_COMPLETED)
    attach_scheduler(trainer, ReduceLROnPlateau(optimizer), Events.EPOCH_COMPLETED, metric="loss")

Warm-up is LinearLR in a SequentialLR or a ChainedScheduler, as torch has it.

Do not write `engine.add_event_handler(event, scheduler.step)`: `step()` takes an `epoch`, and would be called with the
engine as one. `lambda: scheduler.step()` works, but then checkpoints do not find the scheduler.
"""

from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from aengine.callables import name_of
from aengine.engine import Engine
from aengine.events import EventLike
from aengine.handlers.attachment import Attachment
from aengine.handlers.scores import Score, score_reader


def attach_scheduler(
    engine: Engine[Any, Any], scheduler: LRScheduler, event: EventLike, *, metric: Score | None = None
) -> "Schedule":
    """Have a scheduler take a step at each firing of an event.

    A `Checkpoint` of the engine saves the scheduler without being asked. The learning rate itself is a part of the
    optimizer's state: save that as well.

    Args:
        engine: the engine that fires the event: the trainer, so that its checkpoints have the scheduler.
        scheduler: of torch, or derived from its classes.
        event: ITERATION_COMPLETED; EPOCH_COMPLETED; or OPTIMIZER_STEPPED of `UpdateEvents`, which with gradient
            accumulation is fired once for each group.
        metric: for ReduceLROnPlateau only: the name of a metric of this engine, or `f(engine)` that returns a number,
            such as `lambda engine: evaluator.state.metrics["loss"]`.

    Raises:
        TypeError: it is no scheduler; or it needs a metric and there is none, or the other way round.
        ValueError: the event is not registered.
        RuntimeError: the scheduler is attached to the engine already.
    """
    schedule = Schedule(scheduler, metric=metric)
    schedule.attach(engine, event)
    return schedule


class Schedule:
    """A scheduler on an engine: what `attach_scheduler` returns.

    Attributes:
        scheduler: torch's.
    """

    def __init__(self, scheduler: LRScheduler, *, metric: Score | None = None) -> None:
        _check(scheduler, metric)
        self.scheduler = scheduler
        self._attachment = Attachment()
        self._metric = None if metric is None else score_reader(metric, "metric")

    def attach(self, engine: Engine[Any, Any], event: EventLike) -> None:
        """Take a step at each firing of an event: see `attach_scheduler`."""
        others = (one for one in engine.stateful_listeners() if isinstance(one, Schedule))
        if any(one.scheduler is self.scheduler for one in others):
            raise RuntimeError(
                f"this {name_of(self.scheduler)} is attached to engine {engine.name!r} already, and would step twice:"
                " make another one; or its event may be several, joined by |"
            )
        engine.on(event)  # raises for what is no event of this engine
        self._attachment.begin(self, engine)
        engine.add_event_handler(event, self._step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scheduler."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the scheduler."""
        self.scheduler.load_state_dict(state_dict)

    def _step(self, engine: Engine[Any, Any]) -> None:
        scheduler: Any = self.scheduler
        if self._metric is None:
            scheduler.step()
        else:
            scheduler.step(self._metric(engine))


def _check(scheduler: Any, metric: Any) -> None:
    kind = name_of(scheduler)
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            "attach_scheduler(engine, scheduler, event) takes a scheduler of torch.optim.lr_scheduler, got a"
            f" {kind}: call anything else in a handler,  engine.add_event_handler(event, lambda: ...)"
        )
    if isinstance(scheduler, ReduceLROnPlateau) and metric is None:
        raise TypeError(f'{kind} needs a metric: attach_scheduler(engine, scheduler, event, metric="loss")')
    if not isinstance(scheduler, ReduceLROnPlateau) and metric is not None:
        raise TypeError(f"{kind} takes no metric: leave metric= out; it is for ReduceLROnPlateau")

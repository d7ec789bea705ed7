"""Schedules: torch's learning-rate schedulers on an engine.

    SchedulerHandler(OneCycleLR(optimizer, 0.1, total_steps=1000)).attach(trainer, OptimizerEvents.OPTIMIZER_STEPPED)
    SchedulerHandler(CosineAnnealingLR(optimizer, T_max=10)).attach(trainer, Events.EPOCH_COMPLETED)
    SchedulerHandler(ReduceLROnPlateau(optimizer), metric="loss").attach(trainer, Events.EPOCH_COMPLETED)

Warm-up is LinearLR in a SequentialLR or a ChainedScheduler, as torch has it.

Do not write `engine.add_event_handler(event, scheduler.step)`: `step()` takes an `epoch`, and would be called with the
engine as one. `lambda: scheduler.step()` works, but then checkpoints do not find the scheduler.
"""

from collections.abc import Generator
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.callables import name_of
from aengine.engine import Engine, stateful_listeners
from aengine.events import EventLike
from aengine.handlers.scores import Score, score_reader
from aengine.keywords import explain_wrong_call


@explain_wrong_call
class SchedulerHandler:
    """Has a scheduler take a step at each firing of an event.

    A `Checkpoint` of the engine saves the scheduler without being asked. The learning rate itself is a part of the
    optimizer's state: save that as well.

    Args:
        scheduler: of torch, or derived from its classes.
        metric: for ReduceLROnPlateau only: the name of a metric of the engine, or `f(engine)` that returns a number,
            such as `lambda engine: evaluator.state.metrics["loss"]`.

    Attributes:
        scheduler: torch's.

    Raises:
        TypeError: it is no scheduler; or it needs a metric and there is none, or the other way round.
    """

    def __init__(self, scheduler: LRScheduler, *, metric: Score | None = None) -> None:
        _check(scheduler, metric)
        self.scheduler = scheduler
        self._attachment = Attachment(self)
        self._metric = None if metric is None else score_reader(metric, "metric")

    def attach(self, engine: Engine[Any, Any], event: EventLike) -> RemovableEventHandle:
        """Have it take a step at each firing of an event, from now on.

        Args:
            engine: the engine that fires the event: the trainer, so that its checkpoints have the scheduler.
            event: ITERATION_COMPLETED; EPOCH_COMPLETED; or OPTIMIZER_STEPPED of `OptimizerEvents`, which with gradient
                accumulation is fired once for each group.

        Raises:
            TypeError: these are no engine and event.
            ValueError: the event is not registered.
            RuntimeError: this is attached already, or its scheduler is to this engine.
        """
        return self._attachment.begin(engine, self._listen(engine, event), "; event may be several, joined by |")

    def _listen(self, engine: Engine[Any, Any], event: EventLike) -> Generator[RemovableEventHandle]:
        others = (one for one in stateful_listeners(engine) if isinstance(one, SchedulerHandler))
        if any(one.scheduler is self.scheduler for one in others):
            raise RuntimeError(
                f"this {name_of(self.scheduler)} is attached to engine {engine.name!r} already, and would step twice:"
                " make another one; event may be several, joined by |"
            )
        yield engine.add_event_handler(event, self._step)

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
    if isinstance(scheduler, Engine):
        raise TypeError(
            "SchedulerHandler(scheduler) takes a scheduler of torch.optim.lr_scheduler, got an engine, which goes to"
            " attach(engine, event)"
        )
    if isinstance(scheduler, type) and issubclass(scheduler, LRScheduler):
        raise TypeError(f"SchedulerHandler(scheduler) takes a scheduler, and {kind} is a class: {kind}(optimizer, ...)")
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"SchedulerHandler(scheduler) takes a scheduler of torch.optim.lr_scheduler, got a {kind}: call anything"
            " else in a handler,  engine.add_event_handler(event, lambda: ...)"
        )
    if isinstance(scheduler, ReduceLROnPlateau) and metric is None:
        raise TypeError(f'{kind} needs a metric: SchedulerHandler(scheduler, metric="loss")')
    if not isinstance(scheduler, ReduceLROnPlateau) and metric is not None:
        raise TypeError(f"{kind} takes no metric: leave metric= out; it is for ReduceLROnPlateau")

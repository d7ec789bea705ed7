"""Averages: torch's averages of weights on an engine: exponential moving averages, stochastic weight averaging.

    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    AverageHandler(average, model).attach(trainer)
    AverageHandler(AveragedModel(model), model).attach(trainer, Events.EPOCH_COMPLETED(after=75))  # SWA

Evaluate `average` like any model. Its buffers, such as the statistics of batch normalisation, are those that `model`
had at the last update; with `use_buffers=True` they are averages, as the weights. `torch.optim.swa_utils.update_bn`
computes the statistics of the averaged weights.
"""

from collections.abc import Generator
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.callables import name_of
from aengine.engine import Engine
from aengine.events import EventLike, Events
from aengine.keywords import explain_wrong_call
from aengine.training.update import OptimizerEvents


@explain_wrong_call
class AverageHandler:
    """Updates an average with the weights of a model at each firing of an event.

    A `Checkpoint` of the engine saves the average without being asked.

    Args:
        average: torch's average of that model.
        model: the model that is averaged.

    Attributes:
        average: torch's.

    Raises:
        TypeError: these are no average and model.
        ValueError: the average is one of another model.
    """

    def __init__(self, average: AveragedModel, model: torch.nn.Module) -> None:
        _check(average, model)
        self.average = average
        self._model = model
        self._attachment = Attachment(self)

    def attach(self, engine: Engine[Any, Any], event: EventLike | None = None) -> RemovableEventHandle:
        """Update the average from now on.

        Args:
            engine: the engine that trains the model.
            event: by default each step of the optimizer if the engine fires events for them, as supervised trainers do,
                else each iteration.

        Raises:
            TypeError: these are no engine and event.
            ValueError: the event is not registered.
            RuntimeError: this is attached already, or its average is to this engine.
        """
        return self._attachment.begin(engine, self._listen(engine, event), "; event may be several, joined by |")

    def _listen(self, engine: Engine[Any, Any], event: EventLike | None) -> Generator[RemovableEventHandle]:
        if engine.has_event_handler(self.average.update_parameters):
            raise RuntimeError(
                f"this average is attached to engine {engine.name!r} already, and would be updated twice: make another"
                " one; event may be several, joined by |"
            )
        if event is None:
            has_steps = engine.has_registered_events(OptimizerEvents.OPTIMIZER_STEPPED)
            event = OptimizerEvents.OPTIMIZER_STEPPED if has_steps else Events.ITERATION_COMPLETED
        # Its own method, so that a checkpoint finds the average through the handler.
        yield engine.add_event_handler(event, self.average.update_parameters, self._model)


def _check(average: Any, model: Any) -> None:
    if not isinstance(average, AveragedModel):
        raise TypeError(
            f"AverageHandler(average, model) takes a torch.optim.swa_utils.AveragedModel, got {_shown(average)}:"
            " AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999)) makes one"
        )
    if not isinstance(model, torch.nn.Module) or isinstance(model, AveragedModel):
        raise TypeError(f"AverageHandler(average, model) takes the model that is trained, got {model!r}")
    averaged, trained = ([tuple(parameter.shape) for parameter in one.parameters()] for one in (average, model))
    if averaged != trained:  # torch would silently average those parameters that both have
        raise ValueError(
            f"the average is one of another model: of its {len(averaged)} parameters and the {len(trained)} of this one"
            " not all have the same shapes"
        )


def _shown(given: Any) -> str:
    if isinstance(given, Engine):
        return "an engine, which goes to attach(engine)"
    return f"the class {name_of(given)}" if isinstance(given, type) else f"a {name_of(given)}"

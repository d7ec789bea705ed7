"""Averages: torch's averages of weights on an engine: exponential moving averages, stochastic weight averaging.

    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    attach_average(trainer, average, model)
    attach_average(trainer, AveragedModel(model), model, Events.EPOCH_COMPLETED(after=75))  # SWA

Evaluate `average` like any model. Its buffers, such as the statistics of batch normalisation, are those that `model`
had at the last update; with `use_buffers=True` they are averages, as the weights. `torch.optim.swa_utils.update_bn`
computes the statistics of the averaged weights.
"""

from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from aengine.callables import name_of
from aengine.engine import Engine
from aengine.events import EventLike, Events
from aengine.training.update import UpdateEvents


def attach_average(
    engine: Engine[Any, Any], average: AveragedModel, model: torch.nn.Module, event: EventLike | None = None
) -> None:
    """Update an average with the weights of a model at each firing of an event.

    A `Checkpoint` of the engine saves the average without being asked.

    Args:
        engine: the engine that trains the model.
        average: torch's average of that model.
        model: the model that is averaged.
        event: by default each step of the optimizer if the engine fires events for them, as supervised trainers do,
            else each iteration.

    Raises:
        TypeError: these are no average and model.
        ValueError: the average is one of another model, or the event is not registered.
        RuntimeError: the average is attached to the engine already.
    """
    _check(average, model)
    if engine.has_event_handler(average.update_parameters):
        raise RuntimeError(
            f"this average is attached to engine {engine.name!r} already, and would be updated twice: make another one;"
            " its event may be several, joined by |"
        )
    if event is None:
        has_steps = engine.has_registered_events(UpdateEvents.OPTIMIZER_STEPPED)
        event = UpdateEvents.OPTIMIZER_STEPPED if has_steps else Events.ITERATION_COMPLETED
    # Its own method, so that a checkpoint finds the average through the handler.
    engine.add_event_handler(event, average.update_parameters, model)


def _check(average: Any, model: Any) -> None:
    if not isinstance(average, AveragedModel):
        raise TypeError(
            "attach_average(engine, average, model) takes a torch.optim.swa_utils.AveragedModel, got a"
            f" {name_of(average)}: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999)) makes one"
        )
    if not isinstance(model, torch.nn.Module) or isinstance(model, AveragedModel):
        raise TypeError(f"attach_average(engine, average, model) takes the model that is trained, got {model!r}")
    averaged, trained = ([tuple(parameter.shape) for parameter in one.parameters()] for one in (average, model))
    if averaged != trained:  # torch would silently average those parameters that both have
        raise ValueError(
            f"the average is one of another model: of its {len(averaged)} parameters and the {len(trained)} of this one"
            " not all have the same shapes"
        )

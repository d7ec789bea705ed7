"""Update: what becomes of a loss: gradients, gathered over a group of batches and clipped, and the optimizer's step.

update = Update(model, optimizer, accumulate=4, clip_gradients=1.0)

def train_step(engine, batch):
    update.zero_grad()
    loss = loss_fn(model(batch[0]), batch[1])
    update(engine, loss)
    return loss.detach()

trainer = Engine(train_step)
update.attach(trainer)
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch.nn.utils import clip_grad_norm_

from aengine.engine import Engine
from aengine.events import EventEnum, Events

Clip: TypeAlias = Callable[[Iterable[torch.nn.Parameter]], object]

_logger = logging.getLogger("aengine.training")


class UpdateEvents(EventEnum):
    """What an engine with an Update fires.

    Attributes:
        OPTIMIZER_STEPPED: the optimizer was stepped, after a whole group of batches or the last, partial one of an
            epoch. Its handlers run before those of ITERATION_COMPLETED. It counts its firings, for filters. A
            GradScaler that found infinite gradients had the optimizer leave the parameters alone; it is fired anyway,
            for to know would be to wait for the device. At this event nothing can be saved.
    """

    OPTIMIZER_STEPPED = "optimizer_stepped"


class Update:
    """Turns the losses of a group of batches into a step of the optimizer.

    The loss of each batch is divided by `accumulate`, whether its group becomes whole or not. The last group of an
    epoch, and of a run that ends by `max_iters`, may be partial and is stepped on all the same: in the step of its last
    batch if the length of the epoch is known, else before the other handlers of EPOCH_COMPLETED. A group that
    `terminate()`, an interruption or an error leaves open goes on when the run is gone on with; one of an epoch that is
    terminated without EPOCH_COMPLETED, in the next epoch.

    For several optimizers, as of a GAN, make an Update for each, of the model that it trains.

    A model's `state_dict` has no gradients, so this has a `state_dict` of its own, which has those of an open group and
    the scaler. A `Checkpoint` saves it without being asked. In the middle of a group that is as much again as the
    parameters: saving every so many whole groups is cheaper.

    Args:
        model: whose gradients are clipped and saved.
        optimizer: what is stepped.
        scaler: a GradScaler, for gradients of float16.
        accumulate: batches in a group.
        clip_gradients: the greatest total norm of the gradients; or what is called with the parameters to clip them,
            such as `partial(clip_grad_value_, clip_value=0.5)`. Before each step, on unscaled gradients.

    Attributes:
        pending: batches of the group under way, whose gradients the optimizer is yet to step on.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 1,
        clip_gradients: float | Clip | None = None,
    ) -> None:
        _check(model, optimizer, scaler)
        if type(accumulate) is not int or accumulate < 1:
            raise ValueError(f"gradients are accumulated over a whole number of batches, 1 or more; got {accumulate!r}")
        self.pending = 0
        self._model = model
        self._optimizer = optimizer
        self._scaler = scaler
        self._accumulate = accumulate
        self._clip = _clip(clip_gradients)
        self._has_stepped = self._is_told_of = False
        self._is_adding = False  # from before the gradients of a step change until it is completed
        self._serves: weakref.ref[Engine[Any, Any]] | None = None  # weak, for the engine's handlers refer to this

    def attach(self, engine: Engine[Any, Any]) -> None:
        """Serve an engine: fire the event, end its epochs, be saved with it. Before other handlers are added.

        Raises:
            ValueError: this serves an engine.
        """
        if self._serves is not None:
            raise ValueError("this Update serves an engine already: make another one, with an optimizer of its own")
        self._serves = weakref.ref(engine)
        engine.register_events(*UpdateEvents)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._tell)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)
        engine.add_event_handler(Events.TERMINATE, self._look_back)

    def zero_grad(self) -> None:
        """Forget the gradients of the group before, if a new one begins: before the model is called.

        A group in which a step failed after it had begun to add its own gradients begins anew, too, and a warning says
        how many batches are lost with it: how much of that step is in there, nobody knows.
        """
        if self._is_adding and self.pending:
            _logger.warning(
                "a step failed while its gradients were added to those of its group: the group begins anew, without the"
                " gradients of %d batches",
                self.pending,
            )
            self.pending = 0
        if not self.pending:
            self._optimizer.zero_grad()

    def __call__(self, engine: Engine[Any, Any], loss: torch.Tensor) -> None:
        """Add the gradients of a loss to those of its group; step the optimizer if it was the last of it.

        Raises:
            TypeError: the loss is no tensor of a single number.
            RuntimeError: this was not attached to the engine, so that the last group could be lost.
        """
        _check_loss(loss)
        if self._serves is None or self._serves() is not engine:
            raise RuntimeError(f"this Update does not serve engine {engine.name!r}: call  update.attach(engine)  first")
        self._is_adding = True
        share = loss / self._accumulate if self._accumulate > 1 else loss
        (share if self._scaler is None else self._scaler.scale(share)).backward()
        self.pending += 1
        if self.pending == self._accumulate or _is_last(engine):
            self._step()

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients of an open group, in the order of the model's parameters, and the scaler's state.

        Raises:
            RuntimeError: called at OPTIMIZER_STEPPED.
        """
        if self._is_told_of:
            raise RuntimeError(
                "at OPTIMIZER_STEPPED other handlers are still to see the iteration, so that a run resumed from there"
                " would differ: save at ITERATION_COMPLETED or EPOCH_COMPLETED"
            )
        gradients = [parameter.grad for parameter in self._model.parameters()] if self.pending else []
        return {
            "pending": self.pending,
            "accumulate": self._accumulate,
            "gradients": gradients,
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with a group, after the parameters were loaded.

        Raises:
            ValueError: it was left open by an Update of groups of another size, or of another model; or only one of the
                two has a scaler.
        """
        pending, accumulate, gradients = (state_dict[name] for name in ("pending", "accumulate", "gradients"))
        parameters = list(self._model.parameters()) if pending else []
        if pending and accumulate != self._accumulate:
            raise ValueError(
                f"a group of {accumulate} batches was under way, {pending} of them done, and groups have"
                f" {self._accumulate} here: go on with {accumulate}, or from a checkpoint between two groups"
            )
        if len(gradients) != len(parameters):
            raise ValueError(f"there are gradients of {len(gradients)} parameters, and {len(parameters)} in the model")
        if (self._scaler is None) != (state_dict["scaler"] is None):
            here, there = ("no GradScaler", "one") if self._scaler is None else ("a GradScaler", "none")
            raise ValueError(f"this Update has {here}, and the one that was saved had {there}: build the same to go on")
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.detach().to(parameter.device, copy=True)
        if self._scaler is not None:
            self._scaler.load_state_dict(state_dict["scaler"])
            if pending:  # it has no scale before it has scaled something, and may be asked to unscale first
                self._scaler.scale(torch.zeros((), device=parameters[0].device))
        self.pending = pending
        self._has_stepped = self._is_adding = False

    def _step(self) -> None:
        scaler = self._scaler
        if self._clip is not None:
            if scaler is not None:
                scaler.unscale_(self._optimizer)
            self._clip(self._model.parameters())
        if scaler is None:
            self._optimizer.step()
        else:
            scaler.step(self._optimizer)
            scaler.update()
        self.pending = 0
        self._has_stepped = True

    def _tell(self, engine: Engine[Any, Any]) -> None:
        """The iteration is completed: only now do schedules and averages see a state that can be saved."""
        self._is_adding = False
        if self._has_stepped:
            self._has_stepped, self._is_told_of = False, True
            try:
                engine.fire_event(UpdateEvents.OPTIMIZER_STEPPED)
            finally:
                self._is_told_of = False

    def _finish(self, engine: Engine[Any, Any]) -> None:
        """Step on the rest of an epoch whose end could not be foreseen."""
        if self.pending:
            self._step()
            self._tell(engine)

    def _look_back(self) -> None:
        if self.pending:
            _logger.warning(
                "the run was ended in the middle of a group: the gradients of %d of %d batches were not stepped on yet,"
                " and will be if the run is gone on with",
                self.pending,
                self._accumulate,
            )


def _is_last(engine: Engine[Any, Any]) -> bool:
    """Say whether the iteration is known to be the last of its epoch, or of the run."""
    state = engine.state
    if state.iteration == state.max_iters:
        return True
    return state.epoch_length is not None and state.iteration == state.epoch_start + state.epoch_length


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        came = f"one of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise TypeError(f"the loss is a tensor of one number, got {came}: have loss_fn return the mean or the sum")


def _clip(clip: Any) -> Clip | None:
    if clip is None or callable(clip):
        return cast("Clip | None", clip)
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not clip > 0:
        raise ValueError(
            f"clip_gradients= takes the greatest norm, more than 0, or what is called with the parameters; got {clip!r}"
        )
    return partial(clip_grad_norm_, max_norm=float(clip))


def _check(model: Any, optimizer: Any, scaler: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"the model is a torch.nn.Module, got {model!r}")
    if not callable(getattr(optimizer, "step", None)) or not callable(getattr(optimizer, "zero_grad", None)):
        raise TypeError(f"the optimizer has step() and zero_grad(), as those of torch.optim; got {optimizer!r}")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"the scaler is a torch.amp.GradScaler, got {scaler!r}")

"""Update: from a loss to a step of the optimizer: gradients are accumulated over a group of batches, and clipped.

update = OptimizerUpdate(model, optimizer, gradient_accumulation_steps=4, clip_gradients=1.0)

def train_step(engine, batch):
    update.zero_grad()
    loss = loss_fn(model(batch[0]), batch[1])
    update(engine, loss)
    return loss.detach()

trainer = Engine(train_step)
update.attach(trainer)

Where the loss of a batch is a mean over a count that differs from batch to batch, as of the tokens that are not
padding, the mean of such means is not the mean of the group. With the count, it is:  update(engine, loss, weight=count)
"""

import logging
import math
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from numbers import Real
from typing import Any, TypeAlias, cast

import torch
from torch.nn.utils import clip_grad_norm_

from aengine.arguments import check_whole
from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.engine import Engine
from aengine.events import EventEnum, Events
from aengine.keywords import explain_wrong_call

Clip: TypeAlias = Callable[[Iterable[torch.nn.Parameter]], object]

_logger = logging.getLogger("aengine.training")


class OptimizerEvents(EventEnum):
    """What an engine with an OptimizerUpdate fires.

    Attributes:
        OPTIMIZER_STEPPED: the optimizer was stepped, after a complete group of batches, or after the last group of an
            epoch, which may be incomplete. Its handlers run before those of ITERATION_COMPLETED. It counts its own
            firings, for filters. It is fired also where a GradScaler skipped the step because gradients were infinite:
            finding that out would mean waiting for the device. At this event nothing can be saved. The payload is the
            optimizer: an engine may have several.
    """

    OPTIMIZER_STEPPED = "optimizer_stepped"


@explain_wrong_call
class OptimizerUpdate:
    """Turns the losses of a group of batches into a step of the optimizer.

    The optimizer gets the mean of the gradients of a group, weighted if its batches have weights. The last group of an
    epoch, or of a run that ends by `max_iters`, may be incomplete; the optimizer is stepped all the same, with the mean
    over the batches that there are: in the step of the last of them if the length of the epoch is known, else before
    the other handlers of EPOCH_COMPLETED. A group that `terminate()`, an interruption or an error leaves incomplete
    continues when the run continues; one of an epoch that is terminated without EPOCH_COMPLETED, in the next epoch.

    Losses are divided by the size of the group before their gradients are computed, and not afterwards, as far as the
    size is known when the group begins: a group without weights then has the very gradients of the plain loop.

    For several optimizers, as of a GAN, make an OptimizerUpdate for each, with the model that it trains.

    A model's `state_dict` has no gradients, so this has a `state_dict` of its own, with those of an incomplete group
    and the scaler's state. A `Checkpoint` saves it without being asked. In the middle of a group it is as large as the
    parameters: it is cheaper to save between two groups.

    Args:
        model: whose gradients are clipped and saved.
        optimizer: the optimizer to step.
        scaler: a GradScaler, for gradients of float16.
        gradient_accumulation_steps: batches in a group.
        clip_gradients: the greatest total norm of the gradients; or a function that is called with the parameters to
            clip them, such as `partial(clip_grad_value_, clip_value=0.5)`. Before each step, on unscaled gradients.

    Attributes:
        pending: batches of the current group, whose gradients the optimizer has not used yet.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: torch.amp.GradScaler | None = None,
        gradient_accumulation_steps: int = 1,
        clip_gradients: float | Clip | None = None,
    ) -> None:
        _check(model, optimizer, scaler)
        self.pending = 0
        self._model = model
        self._optimizer = optimizer
        self._scaler = scaler
        self._batches = check_whole(
            gradient_accumulation_steps, "gradient_accumulation_steps=", minimum=1, of="batches"
        )
        self._clip = _clip(clip_gradients)
        self._size = self._batches  # of the current group, as far as it was known at its beginning
        self._weight: float | torch.Tensor = 0.0  # of its batches so far
        self._has_stepped = False  # in the current iteration
        self._is_firing = False  # OPTIMIZER_STEPPED
        self._is_adding = False  # gradients: from backward() to ITERATION_COMPLETED; longer, if the step has failed
        # Weak, for the engine refers to this through its handlers: a cycle would keep the engine after its last use.
        self._attachment = Attachment(self)
        self._engine: weakref.ref[Engine[Any, Any]] | None = None

    def attach(self, engine: Engine[Any, Any]) -> RemovableEventHandle:
        """Fire the event on an engine, complete its epochs, be saved with it. Call it before other handlers are added.

        Raises:
            TypeError: it is no engine.
            RuntimeError: this is attached already.
        """
        return self._attachment.begin(engine, self._listen(engine), "; each optimizer has one of its own")

    def _listen(self, engine: Engine[Any, Any]) -> Generator[RemovableEventHandle]:
        engine.register_events(*OptimizerEvents)
        self._engine = weakref.ref(engine)
        yield RemovableEventHandle(self._forget_engine)
        yield engine.add_event_handler(Events.ITERATION_COMPLETED, self._report)
        yield engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)
        yield engine.add_event_handler(Events.TERMINATE, self._warn_if_incomplete)

    def _forget_engine(self) -> None:
        self._engine = None

    def zero_grad(self) -> None:
        """Clear the gradients of the group before, if a new group begins. Call it before the model is called.

        A group also begins anew where a step failed while it added its gradients: how much of them was added is
        unknown. A warning says how many batches are lost.
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

    def __call__(self, engine: Engine[Any, Any], loss: torch.Tensor, *, weight: float | torch.Tensor = 1.0) -> None:
        """Add the gradients of a loss to those of its group; step the optimizer if this is the last batch of the group.

        Args:
            engine: the engine whose step this is.
            loss: of the batch: a mean over something.
            weight: over how many, in relation to the other batches of the group: a number, or a tensor of one, which is
                not read, so that no step waits for its device. Without effect where there is one batch in the group.

        Raises:
            TypeError: the loss is no tensor of a single number, or the weight is no number.
            ValueError: the weight is negative, or not finite.
            RuntimeError: this is not attached to the engine, so that the last group could be lost.
        """
        _check_loss(loss)
        if self._engine is None or self._engine() is not engine:
            raise RuntimeError(
                f"this OptimizerUpdate is not attached to engine {engine.name!r}: call  update.attach(engine)  first"
            )
        weight = _checked_weight(weight)
        remaining = _remaining(engine)
        self._is_adding = True
        if not self.pending:
            self._size, self._weight = max(1, int(min(self._batches, remaining))), 0.0
        if self._size == 1:  # whatever the weight of the only one is
            share, weight = loss, 1.0
        elif isinstance(weight, float) and weight == 1.0:
            share = loss / self._size
        else:
            share = loss * (weight / self._size)
        (share if self._scaler is None else self._scaler.scale(share)).backward()
        self.pending += 1
        self._weight = self._weight + weight
        if self.pending == self._batches or remaining == 1:
            self._step()

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients of an incomplete group, in the order of the model's parameters, and the scaler's state.

        Raises:
            RuntimeError: called at OPTIMIZER_STEPPED.
        """
        if self._is_firing:
            raise RuntimeError(
                "at OPTIMIZER_STEPPED other handlers have not run for this iteration yet, so that a run resumed from"
                " there would differ: save at ITERATION_COMPLETED or EPOCH_COMPLETED"
            )
        gradients = [parameter.grad for parameter in self._model.parameters()] if self.pending else []
        return {
            "pending": self.pending,
            "gradient_accumulation_steps": self._batches,
            "size": self._size,
            "weight": self._weight,
            "gradients": gradients,
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue with a group. Call it after the parameters were loaded.

        Raises:
            ValueError: the group is of another size, or of another model; or only one of the two has a scaler.
        """
        names = "pending", "gradient_accumulation_steps", "gradients"
        pending, batches, gradients = (state_dict[name] for name in names)
        parameters = list(self._model.parameters()) if pending else []
        if pending and batches != self._batches:
            raise ValueError(
                f"a group of {batches} batches was under way, {pending} of them done, and groups have"
                f" {self._batches} here: continue with {batches}, or from a checkpoint between two groups"
            )
        if len(gradients) != len(parameters):
            raise ValueError(f"there are gradients of {len(gradients)} parameters, and {len(parameters)} in the model")
        if (self._scaler is None) != (state_dict["scaler"] is None):
            here, there = ("no GradScaler", "one") if self._scaler is None else ("a GradScaler", "none")
            raise ValueError(
                f"this OptimizerUpdate has {here}, and the one that was saved had {there}: build the same to continue"
            )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.detach().to(parameter.device, copy=True)
        if self._scaler is not None:
            self._scaler.load_state_dict(state_dict["scaler"])
            if pending:  # has it create its scale, which it does as it scales: the next step may unscale before that
                self._scaler.scale(torch.zeros((), device=parameters[0].device))
        self.pending, self._size, self._weight = pending, state_dict["size"], state_dict["weight"]
        self._has_stepped = self._is_adding = False

    def _step(self) -> None:
        self._correct_size()
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

    def _correct_size(self) -> None:
        """Have the gradients be those of a mean over what the group has: it is another size than was expected of it."""
        weight = self._weight
        if isinstance(weight, torch.Tensor):
            factor: float | torch.Tensor = torch.where(weight == 0, torch.ones_like(weight), self._size / weight)
        elif weight in (0, self._size):  # of the weight 0 are gradients of 0, which no factor changes
            return
        else:
            factor = self._size / weight
        groups: list[dict[str, Any]] = getattr(self._optimizer, "param_groups", [])
        optimized: list[torch.nn.Parameter] = [one for group in groups for one in group["params"]]
        with torch.no_grad():
            for parameter in dict.fromkeys([*self._model.parameters(), *optimized]):
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def _report(self, engine: Engine[Any, Any]) -> None:
        # At ITERATION_COMPLETED, not within the step: there schedules and averages would change in a state that is not
        # one to save.
        self._is_adding = False
        if self._has_stepped:
            self._has_stepped, self._is_firing = False, True
            try:
                engine.fire_event(OptimizerEvents.OPTIMIZER_STEPPED, self._optimizer)
            finally:
                self._is_firing = False

    def _finish(self, engine: Engine[Any, Any]) -> None:
        """Step the optimizer for the last group of an epoch whose length was not known."""
        if self.pending:
            self._step()
            self._report(engine)

    def _warn_if_incomplete(self) -> None:
        if self.pending:
            _logger.warning(
                "the run was ended in the middle of a group: the gradients of %d of %d batches are not used yet, and"
                " will be if the run continues",
                self.pending,
                self._batches,
            )


def _remaining(engine: Engine[Any, Any]) -> float:
    """Return how many iterations the epoch, or the run, still has, this one included; infinite if that is unknown."""
    state = engine.state
    ends = [] if state.max_iters is None else [state.max_iters]
    if state.epoch_length is not None:
        ends.append(state.epoch_start + state.epoch_length)
    return min(ends, default=math.inf) - state.iteration + 1


def _checked_weight(weight: Any) -> float | torch.Tensor:
    if isinstance(weight, torch.Tensor) and weight.numel() == 1 and not weight.is_complex():
        return weight.detach().reshape(()).to(weight.dtype if weight.is_floating_point() else torch.float32)
    if not isinstance(weight, Real):  # numpy's numbers are
        raise TypeError(
            "weight= is the count over which the loss of the batch is a mean, a number or a tensor of one, such as"
            f" mask.sum(); got {weight!r}"
        )
    number = float(weight)
    if not 0 <= number < math.inf:
        raise ValueError(f"weight= is 0 or more, and finite; got {weight!r}")
    return number


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        came = f"one of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise TypeError(f"the loss is a tensor of one number, got {came}: have loss_fn return the mean or the sum")


def _clip(clip: Any) -> Clip | None:
    if clip is None or callable(clip):
        return cast("Clip | None", clip)
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not clip > 0:
        raise ValueError(
            f"clip_gradients= takes the greatest norm, more than 0, or a function of the parameters; got {clip!r}"
        )
    return partial(clip_grad_norm_, max_norm=float(clip))


def _check(model: Any, optimizer: Any, scaler: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"the model is a torch.nn.Module, got {model!r}")
    if not callable(getattr(optimizer, "step", None)) or not callable(getattr(optimizer, "zero_grad", None)):
        raise TypeError(f"the optimizer has step() and zero_grad(), as those of torch.optim; got {optimizer!r}")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"the scaler is a torch.amp.GradScaler, got {scaler!r}")

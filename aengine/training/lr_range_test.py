"""Learning-rate range test: train with a rate that grows until the loss diverges, look at the curve, and undo it all.

    found = await lr_range_test(trainer, model, optimizer, loader, exponential(1e-6, 1.0, steps=100))
    optimizer.param_groups[0]["lr"] = found.suggestion

After Smith, "Cyclical Learning Rates for Training Neural Networks" (2015, arXiv:1506.01186), with the smoothed loss and
the stop at divergence of fastai's `lr_find`.
"""

import copy
import math
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias, cast

import torch

from aengine.checkpoint.capture.randomness import RandomStates
from aengine.engine import Engine
from aengine.events import Events
from aengine.state import State, Stateful
from aengine.training.gradients import GradientStatistics
from aengine.training.update import Update

AnyEngine: TypeAlias = Engine[Any, Any]

_FEWEST = 3
"""Points in which a slope can be seen."""

_PATIENCE = 1000
"""Iterations without a step of the optimizer, before it is said that there will be none."""

_SEEN_BY_STEP = ("iteration", "epoch", "epoch_start", "epoch_length", "max_epochs", "max_iters", "batch")


@dataclass(frozen=True, slots=True)
class LRRange:
    """What a range test found: a point for each step of the optimizer.

    Attributes:
        lrs: the learning rate of each step, of the first parameter group.
        losses: the loss that this step was to lower; with accumulation, the mean of its batches.
        smoothed: the same, smoothed.
        has_diverged: whether the test ended because the loss diverged, not because the rates or the data did end.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    has_diverged: bool

    @property
    def suggestion(self) -> float:
        """The rate at which the smoothed loss falls most from step to step, before its minimum.

        Raises:
            ValueError: it falls nowhere.
        """
        falling = self.smoothed[: self._lowest + 1]
        if len(falling) < _FEWEST:
            raise ValueError(
                f"the loss falls nowhere in the {len(self.lrs)} steps of the test, so no learning rate can be"
                " suggested: begin with a lower one, go up to a higher one, or take more steps"
            )
        slopes = [after - before for before, after in zip(falling, falling[2:], strict=False)]
        return self.lrs[1 + slopes.index(min(slopes))]

    @property
    def tenth_of_minimum(self) -> float:
        """A tenth of the rate at which the smoothed loss is least: more cautious where the curve is flat.

        Raises:
            ValueError: there is not a single point.
        """
        return self.lrs[self._lowest] / 10

    @property
    def _lowest(self) -> int:
        if not self.smoothed:
            raise ValueError("the test has not a single point: the loss was not finite from the first step on")
        return self.smoothed.index(min(self.smoothed))


def exponential(start: float = 1e-7, end: float = 10.0, steps: int = 100) -> list[float]:
    """Return rates from `start` to `end`, each the same multiple of the one before.

    Raises:
        ValueError: these are no two rates, or no number of steps.
    """
    _check_ends(start, end, steps)
    return [start * (end / start) ** (step / (steps - 1)) for step in range(steps)]


def linear(start: float = 1e-7, end: float = 10.0, steps: int = 100) -> list[float]:
    """Return rates from `start` to `end`, each more by the same amount than the one before.

    Raises:
        ValueError: these are no two rates, or no number of steps.
    """
    _check_ends(start, end, steps)
    return [start + (end - start) * step / (steps - 1) for step in range(steps)]


async def lr_range_test(  # noqa: PLR0913 -- what is trained, and how the curve is judged
    trainer: AnyEngine,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Any,
    rates: Sequence[float] | None = None,
    *,
    smoothing: float = 0.05,
    divergence: float = 5.0,
    output_transform: Callable[[Any], Any] = lambda output: output,
    also: Iterable[Stateful] = (),
) -> LRRange:
    """Run a trainer's step over data, each step of the optimizer with the next rate, and put everything back.

    The trainer itself is not run: its step is, by an engine of the test's own. So its handlers and subscribers hear
    nothing: no checkpoint, log record, schedule or average comes of the test. The step sees the counters of the test in
    `trainer.state`. It is called where the trainer would call it: on a worker, or on the event loop.

    Afterwards the parameters, buffers, gradients and modes of the model, the optimizer, the trainer's state, those
    handlers of the trainer that have a `state_dict`, and the random generators that a checkpoint would save are as they
    were, bit by bit, however the test ended. For the length of the test there is a second copy of all of them, which is
    made and put back on the thread of the event loop.

    Args:
        trainer: any engine whose step steps the optimizer, also one of several batches; its output has the loss.
        model: what is trained; several models as one `torch.nn.ModuleList`.
        optimizer: whose rate grows. If its parameter groups have different rates, or different `initial_lr` where a
            scheduler was made, the ratios between them stay, and `rates` are those of the first group.
        data: as of `run()`. It begins again when it ends before the rates do. A place that it keeps from one pass to
            the next is not put back, unless it is among `also`.
        rates: one for each step of the optimizer, rising; by default `exponential()`.
        smoothing: the weight of a new loss in the smoothed loss, which is an exponential average; 1 for no smoothing.
            It lags some `1 / smoothing` steps behind, and so does the suggestion: take several times as many.
        divergence: the test ends when the smoothed loss is so many times its least value, or is not finite. Of a least
            value below zero, when it is above it by as much as that is above zero.
        output_transform: makes the loss of the trainer's output: a number, or a tensor of one.
        also: what else the step changes and has `state_dict` and `load_state_dict`, such as a GradScaler of its own.

    Raises:
        EngineBusy: the trainer is running.
        ValueError, TypeError: an argument is wrong.
        RuntimeError: the optimizer was not stepped in the first thousand iterations, or between two steps of it.
        BaseException: what the step or the data raised, as the very object.

    Cancellation waits for the step in flight, puts everything back, and goes on.
    """
    if not isinstance(trainer, Engine):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            "lr_range_test(trainer, model, optimizer, data) takes the engine that trains the model first, got"
            f" {trainer!r}"
        )
    sweep = _Sweep(optimizer, exponential() if rates is None else rates, smoothing, divergence, output_transform)
    _check_model(model)
    own: Any = trainer  # whose step is run in its place
    step, is_threaded = own._step, own._threaded  # noqa: SLF001

    updates = [one for one in trainer.stateful_listeners() if isinstance(one, Update)]

    def end_step() -> None:
        # The trainer's ITERATION_COMPLETED, by which they learn that no step is under way, is not fired.
        for update in updates:
            update.load_state_dict(update.state_dict())

    def step_of_trainer(engine: AnyEngine, batch: Any) -> Any:
        for name in _SEEN_BY_STEP:
            setattr(trainer.state, name, getattr(engine.state, name))
        return step(trainer, batch)

    test: AnyEngine = Engine(
        step_of_trainer,
        name=f"learning-rate range test of {trainer.name}",
        thread=None if is_threaded else False,
    )
    test.add_event_handler(Events.ITERATION_COMPLETED, end_step)
    test.add_event_handler(Events.ITERATION_COMPLETED, sweep.note)
    with (
        own._busy(),  # noqa: SLF001 -- nobody is to run it meanwhile
        _restored(trainer, model, optimizer, data, also),
        sweep.listening(),
    ):
        await test.run(data, max_epochs=sys.maxsize)  # until it is terminated
    return sweep.found()


class _Sweep:
    """The curve, as it is drawn."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rates: Sequence[float],
        smoothing: float,
        divergence: float,
        output_transform: Callable[[Any], Any],
    ) -> None:
        self._ratios = _ratios(optimizer)
        self._rates = _rising(rates)
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing= is the weight of a new loss, more than 0 and at most 1; got {smoothing!r}")
        if not divergence > 1:
            raise ValueError(
                f"divergence= is how many times its least value a loss may be, more than 1; got {divergence!r}"
            )
        self._optimizer = optimizer
        self._smoothing = smoothing
        self._divergence = divergence
        self._transform = output_transform
        self._losses: list[float] = []
        self._smoothed: list[float] = []
        self._of_step: list[float] = []  # the losses of the batches since the last step
        self._has_stepped = self._has_diverged = False

    @contextmanager
    def listening(self) -> Generator[None]:
        """Set the first rate, and see the steps of the optimizer."""
        handle = self._optimizer.register_step_post_hook(self._see)
        try:
            self._set_rate()
            yield
        finally:
            handle.remove()

    def found(self) -> LRRange:
        count = len(self._losses)
        return LRRange(self._rates[:count], tuple(self._losses), tuple(self._smoothed), self._has_diverged)

    def note(self, engine: AnyEngine) -> None:
        """An iteration is completed."""
        loss = _number(self._transform(engine.state.output))
        self._of_step.append(loss)
        if not math.isfinite(loss):
            self._has_diverged = True
            engine.terminate()
        elif self._has_stepped:
            self._has_stepped = False
            self._add(sum(self._of_step) / len(self._of_step))
            self._of_step.clear()
            if self._has_diverged or len(self._losses) == len(self._rates):
                engine.terminate()
            else:
                self._set_rate()
        elif len(self._of_step) == _PATIENCE:
            raise RuntimeError(
                f"{_PATIENCE} iterations have passed without a step of the optimizer: pass the one that the trainer's"
                " step steps"
            )

    def _see(self, *_: Any) -> None:
        self._has_stepped = True

    def _add(self, loss: float) -> None:
        smoothed = self._smoothing * loss + (1 - self._smoothing) * self._smoothed[-1] if self._smoothed else loss
        self._losses.append(loss)
        self._smoothed.append(smoothed)
        least = min(self._smoothed)
        self._has_diverged = smoothed > least + (self._divergence - 1) * abs(least)

    def _set_rate(self) -> None:
        rate = self._rates[len(self._losses)]
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            if isinstance(group["lr"], torch.Tensor):  # where the step is captured, it reads this very tensor
                group["lr"].fill_(rate * ratio)
            else:
                group["lr"] = rate * ratio


def _number(loss: Any) -> float:
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return float(loss.item())
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError):  # the last is torch's, of more than one number
        raise TypeError(
            f"a range test needs the loss of each iteration, a number or a tensor of one, and the output is {loss!r}:"
            " have output_transform= make it, as in  output_transform=lambda output: output['loss']"
        ) from None


# Putting back


@contextmanager
def _restored(
    trainer: AnyEngine, model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: Any, also: Iterable[Stateful]
) -> Generator[None]:
    """Have all be afterwards as it is now. The last kept is put back first; one that fails keeps none from its turn."""
    with ExitStack() as kept:
        kept.callback(_keep_random(data))
        kept.callback(_keep_state(trainer.state))
        kept.callback(_keep_model(model, optimizer))  # after those that bring gradients of their own
        kept.callback(_keep_optimizer(optimizer))
        for one in (*trainer.stateful_listeners(), *also):
            if isinstance(one, GradientStatistics):  # its state is a part of what it shows
                kept.callback(one.keep())
            else:
                kept.callback(one.load_state_dict, copy.deepcopy(one.state_dict()))
        yield


def _keep_random(data: Any) -> Callable[[], object]:
    states = RandomStates()
    return partial(states.restore, states.capture(data), data)


def _keep_state(state: State) -> Callable[[], None]:
    attributes = dict(vars(state))
    contents = {name: copy.copy(value) for name, value in attributes.items() if type(value) in (dict, list, set)}

    def put_back() -> None:
        for name, content in contents.items():
            container: Any = attributes[name]  # the very same, for others may refer to it
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        vars(state).clear()
        vars(state).update(attributes)

    return put_back


def _keep_model(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    modes = [(module, module.training) for module in model.modules()]
    # Also those that a state_dict lacks, and those that the model replaces.
    named: list[dict[str, torch.Tensor | None]] = [vars(module)["_buffers"] for module in model.modules()]
    buffers = [(by_name, dict(by_name)) for by_name in named]
    parameters = list(dict.fromkeys([*model.parameters(), *_parameters_of(optimizer)]))
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    tensors = [*parameters, *model.buffers(), *(gradient for _, gradient in gradients if gradient is not None)]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put_back() -> None:
        for module, was_training in modes:
            module.training = was_training
        for by_name, before in buffers:
            by_name.clear()
            by_name.update(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for tensor, value in values:
                tensor.detach().copy_(value)

    return put_back


def _keep_optimizer(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    # Its own load_state_dict() would turn what it keeps in float32, of parameters in bfloat16, into theirs.
    state: Any = optimizer.state
    by_parameter = {parameter: copy.deepcopy(kept) for parameter, kept in state.items()}
    groups = [
        {name: value if name == "params" else copy.deepcopy(value) for name, value in group.items()}
        for group in optimizer.param_groups
    ]
    rates = [group["lr"] for group in optimizer.param_groups]

    def put_back() -> None:
        state.clear()
        state.update(by_parameter)
        for group, before, rate in zip(optimizer.param_groups, groups, rates, strict=True):
            group.clear()
            group.update(before)
            if isinstance(rate, torch.Tensor):  # the very same
                rate.copy_(before["lr"])
                group["lr"] = rate

    return put_back


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# At the door


def _check_ends(start: float, end: float, steps: int) -> None:
    if not 0 < start < end < math.inf:
        raise ValueError(f"the rates of a range test rise, from more than 0; got {start!r} to {end!r}")
    if type(steps) is not int or steps < _FEWEST:
        raise ValueError(f"steps= is a whole number, {_FEWEST} or more; got {steps!r}")


def _rising(rates: Any) -> tuple[float, ...]:
    if not isinstance(rates, Iterable):
        raise TypeError(f"rates= are several, such as exponential(1e-7, 10.0, steps=100); got {rates!r}")
    several: Iterable[Any] = rates
    rising = tuple(float(rate) for rate in several)
    if len(rising) < _FEWEST or not all(0 < one < other < math.inf for one, other in pairwise(rising)):
        raise ValueError(
            f"the rates of a range test are {_FEWEST} or more, rising, from more than 0, as exponential() and linear()"
            f" make them; got {len(rising)}: {rising[:5]}"
        )
    return rising


def _ratios(optimizer: Any) -> list[float]:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"a range test needs an optimizer of torch.optim, or derived from it; got {optimizer!r}")
    groups = optimizer.param_groups
    # Where a scheduler was made, it may have begun with a rate of 0.
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    if len(set(rates)) == 1:
        return [1.0] * len(groups)
    if not rates[0] > 0:
        raise ValueError(
            f"the parameter groups of the optimizer have the rates {rates}, and the others are to grow with the first,"
            " which is 0: make a group that has a rate the first one"
        )
    return [rate / rates[0] for rate in rates]


def _check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            "lr_range_test(trainer, model, optimizer, data) takes a torch.nn.Module, to put it back; several as"
            f" torch.nn.ModuleList([...]); got {cast(object, model)!r}"
        )

"""Learning-rate range test: train with a rate that grows until the loss diverges, record the loss, undo everything.

    rates = torch.logspace(-6, 0, 100).tolist()
    found = await lr_range_test(trainer, model, optimizer=optimizer, data=loader, rates=rates)
    optimizer.param_groups[0]["lr"] = found.suggestion

After Smith, "Cyclical Learning Rates for Training Neural Networks" (2015, arXiv:1506.01186), with the smoothed loss and
the stop at divergence of fastai's `lr_find`.
"""

import copy
import math
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from aengine.data.generators import capture, capture_process, restore, restore_process
from aengine.engine import Engine, session_of, stateful_listeners
from aengine.events import Events
from aengine.keywords import explain_wrong_call
from aengine.state import State, Stateful
from aengine.training.gradients import GradientStatistics, keep_measurements
from aengine.training.update import OptimizerUpdate

AnyEngine: TypeAlias = Engine[Any, Any]

_MIN_STEPS = 3
"""A slope is computed over three points."""

_DEFAULT_RATES = tuple(1e-7 * 1e8 ** (step / 99) for step in range(100))
"""From 1e-7 to 10."""

_MAX_ITERATIONS_PER_STEP = 1000
"""After so many iterations without a step of the optimizer, the test fails: there will be none."""

_SEEN_BY_STEP = ("iteration", "epoch", "epoch_start", "epoch_length", "max_epochs", "max_iters", "batch")
"""Attributes of the state that the trainer's step may read."""


@dataclass(frozen=True, slots=True)
class LRRange:
    """What a range test found: a point for each step of the optimizer.

    Attributes:
        lrs: the learning rate of each step, of the first parameter group.
        losses: the loss whose gradients the step used; with accumulation, the mean of its batches.
        smoothed: the same, smoothed.
        has_diverged: whether the test ended because the loss diverged, not because the rates or the data ended.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    has_diverged: bool

    @property
    def suggestion(self) -> float:
        """The rate at which the smoothed loss falls most steeply, before its minimum.

        Raises:
            ValueError: it never falls.
        """
        falling = self.smoothed[: self._lowest + 1]
        if len(falling) < _MIN_STEPS:
            raise ValueError(
                f"the loss never falls in the {len(self.lrs)} steps of the test, so no learning rate can be"
                " suggested: begin with a lower one, go up to a higher one, or take more steps"
            )
        slopes = [after - before for before, after in zip(falling, falling[2:], strict=False)]
        return self.lrs[1 + slopes.index(min(slopes))]

    @property
    def tenth_of_minimum(self) -> float:
        """A tenth of the rate at which the smoothed loss is least: more cautious where the curve is flat.

        Raises:
            ValueError: the test has no points.
        """
        return self.lrs[self._lowest] / 10

    @property
    def _lowest(self) -> int:
        if not self.smoothed:
            raise ValueError("the test has no points: the loss was not finite from the first step on")
        return self.smoothed.index(min(self.smoothed))


@explain_wrong_call
async def lr_range_test(  # noqa: PLR0913 -- what is trained, and how the curve is judged
    trainer: AnyEngine,
    model: torch.nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    data: Any,
    rates: Iterable[float] | None = None,
    smoothing: float = 0.05,
    divergence: float = 5.0,
    output_transform: Callable[[Any], Any] = lambda output: output,
    preserve: Iterable[Stateful] = (),
) -> LRRange:
    """Run a trainer's step over data, each step of the optimizer with the next rate, and restore everything.

    The trainer itself is not run: another engine runs its step. So none of its handlers and subscribers is called: the
    test leaves no checkpoint and no log record, and changes no schedule or average. The step sees the counters of the
    test in `trainer.state`. It is called on the thread on which the trainer would call it.

    Afterwards the parameters, buffers, gradients and modes of the model, the optimizer, the trainer's state, those
    handlers of the trainer that have a `state_dict`, and the random generators that a checkpoint would save are as they
    were, bit by bit, however the test ended. During the test there is a second copy of all of them in memory; it is
    made and restored on the thread of the event loop.

    Args:
        trainer: any engine whose step steps the optimizer, also once in several batches; its output has the loss.
        model: the model that is trained; several models as one `torch.nn.ModuleList`.
        optimizer: the optimizer whose rate grows. If its parameter groups have different rates, or different
            `initial_lr` where there is a scheduler, the ratios between them stay, and `rates` are for the first group.
        data: as of `run()`. It is restarted when it ends before the rates do. A position that it keeps from one pass to
            the next is not restored, unless it is among `preserve`.
        rates: one for each step of the optimizer, rising; by default 100 from 1e-7 to 10, each the same multiple of the
            one before. For instance `torch.logspace(-5, 0, 60).tolist()`.
        smoothing: the weight of a new loss in the smoothed loss, an exponential average; 1 for no smoothing. It lags
            behind by some `1 / smoothing` steps, and so does the suggestion: take several times as many steps.
        divergence: the test ends when the smoothed loss is so many times its least value, or is not finite. Where the
            least value is negative, when it is above it by `divergence - 1` times its absolute value.
        output_transform: takes the loss from the trainer's output: a number, or a tensor of one.
        preserve: objects with `state_dict` and `load_state_dict` that the step changes as well, such as a GradScaler.

    Raises:
        EngineBusy: the trainer is running.
        ValueError, TypeError: an argument is wrong.
        RuntimeError: there was no step of the optimizer in a thousand iterations.
        BaseException: what the step or the data raised, as the very object.

    A cancellation waits for the step in flight, and goes on when everything is restored.
    """
    if not isinstance(trainer, Engine):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            "lr_range_test(trainer, model, optimizer=..., data=...) takes the engine that trains the model first, got"
            f" {trainer!r}"
        )
    sweep = _Sweep(optimizer, _DEFAULT_RATES if rates is None else rates, smoothing, divergence, output_transform)
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            "lr_range_test(trainer, model, optimizer=..., data=...) takes a torch.nn.Module, to restore it; several as"
            f" torch.nn.ModuleList([...]); got {model!r}"
        )
    session = session_of(trainer)
    step, thread = session.step, session.threaded
    updates = [one for one in stateful_listeners(trainer) if isinstance(one, OptimizerUpdate)]

    def end_step() -> None:
        # At the trainer's ITERATION_COMPLETED, which is not fired here, an OptimizerUpdate notes that no step is under
        # way. It does so as well when a state is loaded.
        for update in updates:
            update.load_state_dict(update.state_dict())

    def step_of_trainer(engine: AnyEngine, batch: Any) -> Any:
        for name in _SEEN_BY_STEP:
            setattr(trainer.state, name, getattr(engine.state, name))
        return step(trainer, batch)

    test: AnyEngine = Engine(step_of_trainer, name=f"learning-rate range test of {trainer.name}", thread=thread)
    test.add_event_handler(Events.ITERATION_COMPLETED, end_step)
    test.add_event_handler(Events.ITERATION_COMPLETED, sweep.record)
    with (
        session.busy(),  # so that a run of the trainer is refused meanwhile
        _restored(trainer, model, optimizer, data, preserve),
        sweep.counting_steps(),
    ):
        await test.run(data, max_epochs=sys.maxsize)  # until the sweep terminates it
    return sweep.found()


class _Sweep:
    """Sets the next rate after each step of the optimizer, and records the losses."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rates: Iterable[float],
        smoothing: float,
        divergence: float,
        output_transform: Callable[[Any], Any],
    ) -> None:
        self._ratios = _ratios(optimizer)
        self._rates = _check_rates(rates)
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing= is the weight of a new loss, more than 0 and at most 1; got {smoothing!r}")
        if not divergence > 1:
            raise ValueError(f"divergence= is how many times its least value a loss may be, over 1; got {divergence!r}")
        self._optimizer = optimizer
        self._smoothing = smoothing
        self._divergence = divergence
        self._transform = output_transform
        self._losses: list[float] = []
        self._smoothed: list[float] = []
        self._since_step: list[float] = []  # the losses of the batches since the last step
        self._has_stepped = self._has_diverged = False

    @contextmanager
    def counting_steps(self) -> Generator[None]:
        """Set the first rate, and have the optimizer report its steps."""
        handle = self._optimizer.register_step_post_hook(self._note_step)
        try:
            self._set_rate()
            yield
        finally:
            handle.remove()

    def found(self) -> LRRange:
        count = len(self._losses)
        return LRRange(self._rates[:count], tuple(self._losses), tuple(self._smoothed), self._has_diverged)

    def record(self, engine: AnyEngine) -> None:
        """Record the loss of an iteration; end the test, or set the next rate, if the optimizer was stepped in it."""
        loss = _number(self._transform(engine.state.output))
        self._since_step.append(loss)
        if not math.isfinite(loss):
            self._has_diverged = True
            engine.terminate()
        elif self._has_stepped:
            self._has_stepped = False
            self._add_point(sum(self._since_step) / len(self._since_step))
            self._since_step.clear()
            if self._has_diverged or len(self._losses) == len(self._rates):
                engine.terminate()
            else:
                self._set_rate()
        elif len(self._since_step) == _MAX_ITERATIONS_PER_STEP:
            raise RuntimeError(
                f"{_MAX_ITERATIONS_PER_STEP} iterations have passed without a step of the optimizer: pass the one that"
                " the trainer's step steps"
            )

    def _note_step(self, *_: Any) -> None:
        self._has_stepped = True

    def _add_point(self, loss: float) -> None:
        smoothed = self._smoothing * loss + (1 - self._smoothing) * self._smoothed[-1] if self._smoothed else loss
        self._losses.append(loss)
        self._smoothed.append(smoothed)
        least = min(self._smoothed)
        self._has_diverged = smoothed > least + (self._divergence - 1) * abs(least)

    def _set_rate(self) -> None:
        rate = self._rates[len(self._losses)]
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            if isinstance(group["lr"], torch.Tensor):  # in place: a step captured in a CUDA graph reads this tensor
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
            " take it from there, as by  output_transform=lambda output: output['loss']"
        ) from None


# Keeping and restoring: each _keep_...() returns a function that restores what it has kept


@contextmanager
def _restored(
    trainer: AnyEngine,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Any,
    preserve: Iterable[Stateful],
) -> Generator[None]:
    """Restore everything at the end, what was kept last first. If one fails, the others are restored all the same."""
    with ExitStack() as kept:
        if (opening := capture(data)) is not None:
            kept.callback(restore, opening, data)
        else:
            kept.callback(restore_process, capture_process())
        kept.callback(_keep_state(trainer.state))
        kept.callback(
            _keep_model(model, optimizer)
        )  # restored after the handlers, as an OptimizerUpdate restores gradients too
        kept.callback(_keep_optimizer(optimizer))
        for one in (*stateful_listeners(trainer), *preserve):
            if isinstance(one, GradientStatistics):  # its state_dict lacks the measured values
                kept.callback(keep_measurements(one))
            else:
                kept.callback(one.load_state_dict, copy.deepcopy(one.state_dict()))
        yield


def _keep_state(state: State) -> Callable[[], None]:
    attributes = dict(vars(state))
    contents = {name: copy.copy(value) for name, value in attributes.items() if type(value) in (dict, list, set)}

    def restore() -> None:
        for name, content in contents.items():
            container: Any = attributes[name]  # the same object, as others may refer to it
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        vars(state).clear()
        vars(state).update(attributes)

    return restore


def _keep_model(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    modes = [(module, module.training) for module in model.modules()]
    # By name, as the model may replace a buffer by another tensor; also those that its state_dict lacks.
    named: list[dict[str, torch.Tensor | None]] = [vars(module)["_buffers"] for module in model.modules()]
    buffers = [(by_name, dict(by_name)) for by_name in named]
    optimized: list[torch.nn.Parameter] = [one for group in optimizer.param_groups for one in group["params"]]
    parameters = list(dict.fromkeys([*model.parameters(), *optimized]))
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    tensors = [*parameters, *model.buffers(), *(gradient for _, gradient in gradients if gradient is not None)]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore() -> None:
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

    return restore


def _keep_optimizer(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    # Not by its load_state_dict(), which casts what it keeps in float32 to the dtype of the parameter, as bfloat16.
    state: Any = optimizer.state
    by_parameter = {parameter: copy.deepcopy(kept) for parameter, kept in state.items()}
    groups = [
        {name: value if name == "params" else copy.deepcopy(value) for name, value in group.items()}
        for group in optimizer.param_groups
    ]
    rates = [group["lr"] for group in optimizer.param_groups]

    def restore() -> None:
        state.clear()
        state.update(by_parameter)
        for group, before, rate in zip(optimizer.param_groups, groups, rates, strict=True):
            group.clear()
            group.update(before)
            if isinstance(rate, torch.Tensor):  # the same tensor, as a captured step reads it
                rate.copy_(before["lr"])
                group["lr"] = rate

    return restore


# Arguments


def _check_rates(rates: Any) -> tuple[float, ...]:
    if not isinstance(rates, Iterable):
        raise TypeError(f"rates= are several, such as torch.logspace(-7, 1, 100).tolist(); got {rates!r}")
    rising = tuple(float(rate) for rate in rates)  # pyright: ignore[reportUnknownVariableType]
    if len(rising) < _MIN_STEPS or not all(0 < one < other < math.inf for one, other in pairwise(rising)):
        raise ValueError(
            f"the rates of a range test are {_MIN_STEPS} or more, rising, from more than 0, such as"
            f" torch.logspace(-7, 1, 100).tolist(); got {len(rising)}: {rising[:5]}"
        )
    return rising


def _ratios(optimizer: Any) -> list[float]:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"a range test needs an optimizer of torch.optim, or derived from it; got {optimizer!r}")
    groups = optimizer.param_groups
    # A scheduler keeps the configured rate in `initial_lr`, and may have set `lr` to 0 for a warm-up.
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    if len(set(rates)) == 1:
        return [1.0] * len(groups)
    if not rates[0] > 0:
        raise ValueError(
            f"the parameter groups of the optimizer have the rates {rates}; the others grow in proportion to the first,"
            " which is 0: make a group whose rate is not 0 the first one"
        )
    return [rate / rates[0] for rate in rates]

"""Supervised steps: the engines that most trainings need, and their steps, to be copied where they do not fit.

    trainer = create_supervised_trainer(model, optimizer, loss_fn, device="cuda")
    evaluator = create_supervised_evaluator(model, {"accuracy": accuracy}, device="cuda")

The names and their order are those of pytorch-ignite. What differs: `amp_mode` is the type to compute in; the output of
a trainer is by default a detached tensor, for which nobody waits; an evaluator leaves the model in the mode it was in.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import torch

from aengine.callables import check_callable
from aengine.engine import Engine
from aengine.training.update import Clip, Update

if TYPE_CHECKING:
    from aengine.training.metrics import AnyMetric

Device: TypeAlias = str | torch.device | None
AnyEngine: TypeAlias = Engine[Any, Any]
Step: TypeAlias = Callable[[AnyEngine, Any], Any]


class PrepareBatch(Protocol):
    """What makes inputs and targets, where they are needed, of a batch: `prepare_batch` is one."""

    def __call__(self, batch: Any, *, device: Device, non_blocking: bool) -> tuple[Any, Any]:
        """Return inputs and targets."""
        ...


def prepare_batch(batch: Any, device: Device = None, *, non_blocking: bool = False) -> tuple[Any, Any]:
    """Return the inputs and the targets of a batch that has these two, moved to a device if one is given.

    Raises:
        ValueError: the batch is no pair.
    """
    if not isinstance(batch, tuple | list) or len(cast(list[Any], batch)) != 2:  # noqa: PLR2004 -- a pair
        kind = type(batch).__qualname__
        came = f"{kind} of {len(cast(Any, batch))}" if hasattr(batch, "__len__") else kind
        raise ValueError(
            f"a batch is a pair of inputs and targets, got a {came}: have"
            " prepare_batch=f(batch, device=..., non_blocking=...) return the two"
        )
    inputs, targets = cast(list[Any], batch)
    if device is None:
        return inputs, targets
    return move(inputs, device, non_blocking=non_blocking), move(targets, device, non_blocking=non_blocking)


def move(value: Any, device: Device, *, non_blocking: bool = False) -> Any:
    """Return a value with all that has `to()` on a device, at any depth of mappings, lists, tuples, dataclasses.

    With `non_blocking`, copies of pinned memory to a GPU are not waited for.
    """
    if hasattr(value, "to"):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, Mapping):
        named: Mapping[Any, Any] = value
        return {name: move(one, device, non_blocking=non_blocking) for name, one in named.items()}
    if isinstance(value, tuple | list):
        moved = [move(one, device, non_blocking=non_blocking) for one in cast(list[Any], value)]
        make: Any = type(value)
        return make(*moved) if hasattr(value, "_fields") else make(moved)
    if is_dataclass(value) and not isinstance(value, type):
        twin = copy(value)  # which also does for one that is frozen, or has fields that it does not take
        for field in fields(value):
            moved_field = move(getattr(value, field.name), device, non_blocking=non_blocking)
            object.__setattr__(twin, field.name, moved_field)
        return twin
    return value


def apply_model(model: torch.nn.Module, x: Any) -> Any:
    """Return `model(x)`."""
    return model(x)


def unchanged(output: Any) -> Any:
    """Return what it is given."""
    return output


def detached_loss(_x: Any, _y: Any, _y_pred: Any, loss: torch.Tensor) -> torch.Tensor:
    """Return the loss as a tensor where it is: `loss.item()` would wait for the device at each step."""
    return loss.detach()


def predictions_and_targets(_x: Any, y: Any, y_pred: Any) -> tuple[Any, Any]:
    """Return predictions and targets, in the order of metrics."""
    return y_pred, y


def supervised_training_step(  # noqa: PLR0913 -- pytorch-ignite's arguments
    model: torch.nn.Module,
    update: Update,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    device: Device = None,
    non_blocking: bool = False,  # noqa: FBT001, FBT002 -- pytorch-ignite's order
    prepare_batch: PrepareBatch = prepare_batch,
    model_transform: Callable[[Any], Any] = unchanged,
    output_transform: Callable[[Any, Any, Any, torch.Tensor], Any] = detached_loss,
    *,
    amp_mode: torch.dtype | None = None,
    model_fn: Callable[[torch.nn.Module, Any], Any] = apply_model,
) -> Step:
    """Return the step of `create_supervised_trainer`. Whoever needs another one copies what is inside."""
    autocast = _autocast(amp_mode, device, model)
    if isinstance(loss_fn, type):
        name = loss_fn.__qualname__
        raise TypeError(f"loss_fn= is called as loss_fn(y_pred, y), and {name} is a class: loss_fn={name}()")
    check_callable(loss_fn, "loss_fn=", "loss_fn", "y_pred", "y")

    def train_step(engine: AnyEngine, batch: Any) -> Any:
        model.train()
        x, y = prepare_batch(batch, device=device, non_blocking=non_blocking)
        update.zero_grad()
        with autocast():
            y_pred = model_transform(model_fn(model, x))
            loss = loss_fn(y_pred, y)
        update(engine, loss)
        return output_transform(x, y, y_pred, loss)

    return train_step


def supervised_evaluation_step(
    model: torch.nn.Module,
    device: Device = None,
    non_blocking: bool = False,  # noqa: FBT001, FBT002 -- pytorch-ignite's order
    prepare_batch: PrepareBatch = prepare_batch,
    model_transform: Callable[[Any], Any] = unchanged,
    output_transform: Callable[[Any, Any, Any], Any] = predictions_and_targets,
    *,
    amp_mode: torch.dtype | None = None,
    model_fn: Callable[[torch.nn.Module, Any], Any] = apply_model,
) -> Step:
    """Return the step of `create_supervised_evaluator`. Whoever needs another one copies what is inside."""
    autocast = _autocast(amp_mode, device, model)

    def evaluate_step(engine: AnyEngine, batch: Any) -> Any:  # noqa: ARG001 -- a step takes it
        with evaluating(model), torch.no_grad():
            x, y = prepare_batch(batch, device=device, non_blocking=non_blocking)
            with autocast():
                y_pred = model_transform(model_fn(model, x))
            return output_transform(x, y, y_pred)

    return evaluate_step


def create_supervised_trainer(  # noqa: PLR0913 -- pytorch-ignite's arguments
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    device: Device = None,
    non_blocking: bool = False,  # noqa: FBT001, FBT002 -- pytorch-ignite's order
    prepare_batch: PrepareBatch = prepare_batch,
    model_transform: Callable[[Any], Any] = unchanged,
    output_transform: Callable[[Any, Any, Any, torch.Tensor], Any] = detached_loss,
    *,
    amp_mode: torch.dtype | None = None,
    scaler: bool | torch.amp.GradScaler = False,
    gradient_accumulation_steps: int = 1,
    clip_gradients: float | Clip | None = None,
    model_fn: Callable[[torch.nn.Module, Any], Any] = apply_model,
    name: str = "trainer",
    thread: bool | None = None,
) -> AnyEngine:
    """Return an engine that trains a model on batches of inputs and targets.

    The model is in training mode in each step. It is not moved: move it before the optimizer is made. A `Checkpoint` of
    this engine saves the scaler, and gradients that wait for the rest of their group, without being asked. The engine
    fires `UpdateEvents.OPTIMIZER_STEPPED`, for schedules and averages: see `Update`.

    Args:
        model: the model, also compiled or distributed.
        optimizer: of its parameters.
        loss_fn: `loss_fn(y_pred, y)` returns a tensor of one number.
        device: where batches are moved to; by default they stay where they are.
        non_blocking: do not wait for batches in pinned memory to have been copied.
        prepare_batch: makes inputs and targets of a batch.
        model_transform: makes predictions of what the model returns.
        output_transform: `f(x, y, y_pred, loss)` returns the output; by default the loss, as a detached tensor, not
            divided by anything.
        amp_mode: what autocast computes in: torch.bfloat16, or torch.float16 with a scaler; None for no autocast but
            the caller's.
        scaler: True, or a GradScaler, for gradients of float16.
        gradient_accumulation_steps: batches to a step of the optimizer; the last of an epoch may have fewer.
        clip_gradients: the greatest norm of the gradients, or what clips them: see `Update`.
        model_fn: `model_fn(model, x)` returns what the model does.
        name: the engine's.
        thread: the engine's: None for its worker, False for the event loop's thread.

    Raises:
        ValueError, TypeError: an argument is wrong, or contradicts another.
    """
    if amp_mode is torch.float16 and scaler is False:
        raise ValueError(
            "small gradients vanish in float16: pass scaler=True, or a GradScaler; or take amp_mode=torch.bfloat16,"
            " which needs none"
        )
    if scaler is True and amp_mode is None:
        raise ValueError(
            "scaler=True goes with amp_mode=torch.float16, and there is no amp_mode: pass both; or a GradScaler, for a"
            " precision of your own"
        )
    if isinstance(scaler, bool):
        _autocast(amp_mode, device, model)  # a wrong one is refused before its device is looked for
        chosen = torch.amp.GradScaler(_device_type(device, model)) if scaler else None
    else:
        chosen = scaler
    update = Update(
        model, optimizer, scaler=chosen, accumulate=gradient_accumulation_steps, clip_gradients=clip_gradients
    )
    step = supervised_training_step(
        model,
        update,
        loss_fn,
        device,
        non_blocking,
        prepare_batch,
        model_transform,
        output_transform,
        amp_mode=amp_mode,
        model_fn=model_fn,
    )
    trainer: AnyEngine = Engine(step, name=name, thread=thread)
    update.attach(trainer)
    return trainer


def create_supervised_evaluator(  # noqa: PLR0913 -- pytorch-ignite's arguments
    model: torch.nn.Module,
    metrics: "Mapping[str, AnyMetric] | None" = None,
    device: Device = None,
    non_blocking: bool = False,  # noqa: FBT001, FBT002 -- pytorch-ignite's order
    prepare_batch: PrepareBatch = prepare_batch,
    model_transform: Callable[[Any], Any] = unchanged,
    output_transform: Callable[[Any, Any, Any], Any] = predictions_and_targets,
    *,
    amp_mode: torch.dtype | None = None,
    model_fn: Callable[[torch.nn.Module, Any], Any] = apply_model,
    name: str = "evaluator",
    thread: bool | None = None,
) -> AnyEngine:
    """Return an engine that computes metrics of a model on batches of inputs and targets.

    In each step the model is in evaluation mode and gradients are off; between two steps each of its modules is in the
    mode it was in. A model of very many modules is quicker if it is in evaluation mode to begin with. For inference
    mode, write `with torch.inference_mode(): await evaluator.run(...)`.

    Args:
        model: the model; beside the step of a trainer, a copy of it.
        metrics: torchmetrics' metrics by name, for `attach_metric`.
        device: as of `create_supervised_trainer`, and likewise those that are not described here.
        non_blocking: do not wait for batches in pinned memory to have been copied.
        prepare_batch: makes inputs and targets of a batch.
        model_transform: makes predictions of what the model returns.
        output_transform: `f(x, y, y_pred)` returns the output; by default `(y_pred, y)`, as metrics take them.
        amp_mode: what autocast computes in, None for no autocast but the caller's.
        model_fn: `model_fn(model, x)` returns what the model does.
        name: the engine's.
        thread: the engine's.

    Raises:
        ValueError, TypeError: an argument is wrong.
        ImportError: there are metrics, and torchmetrics is not installed.
    """
    if metrics is not None and not isinstance(metrics, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f'metrics= are metrics by name, such as {{"accuracy": metric}}; got {metrics!r}')
    step = supervised_evaluation_step(
        model,
        device,
        non_blocking,
        prepare_batch,
        model_transform,
        output_transform,
        amp_mode=amp_mode,
        model_fn=model_fn,
    )
    evaluator: AnyEngine = Engine(step, name=name, thread=thread)
    if metrics:
        from aengine.training.metrics import attach_metric  # noqa: PLC0415 -- torchmetrics is optional

        for named, metric in metrics.items():
            attach_metric(evaluator, metric, named)
    return evaluator


@contextmanager
def evaluating(model: torch.nn.Module) -> Generator[None]:
    """Have a model in evaluation mode for a while, and then each of its modules in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    if not any(was_training for _, was_training in before):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()  # by its own method, which may do more than set the mode, as those of merged adapters do
        for module, was_training in before:
            if module.training != was_training:
                module.training = was_training


def _autocast(
    amp_mode: torch.dtype | None, device: Device, model: torch.nn.Module
) -> Callable[[], AbstractContextManager[object]]:
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"the model is a torch.nn.Module, got {model!r}")
    _check_device(device)
    if amp_mode is None:
        return nullcontext
    if amp_mode not in (torch.bfloat16, torch.float16):
        raise ValueError(
            "amp_mode= takes the type to compute in, torch.bfloat16, or torch.float16 with scaler=True (which is"
            f' pytorch-ignite\'s "amp"); got {amp_mode!r}'
        )
    device_type = _device_type(device, model)

    @contextmanager
    def autocast() -> Generator[None]:
        try:
            with torch.autocast(device_type, dtype=amp_mode):
                yield
        finally:
            # Only the outermost autocast forgets the weights that it has cast. If the caller of run() is within another
            # one, the next step would compute with the weights of this one.
            torch.clear_autocast_cache()

    return autocast


def _check_device(device: Device) -> None:
    if device is not None:
        try:
            torch.device(device)
        except RuntimeError:
            raise ValueError(f'device= is a device of torch, such as "cuda" or "cpu"; got {device!r}') from None


def _device_type(device: Device, model: torch.nn.Module) -> str:
    if device is not None:
        return torch.device(device).type
    return next((parameter.device.type for parameter in model.parameters()), "cpu")

"""Supervised training: the engines that most trainings need, and their steps, to be copied where they do not fit.

    trainer = create_supervised_trainer(model, optimizer, loss_fn, device="cuda")
    evaluator = create_supervised_evaluator(model, {"accuracy": accuracy}, device="cuda")

The names and their order are those of pytorch-ignite. What differs: `autocast_dtype` is the type to compute in, where
its `amp_mode` is a word; a trainer's output is by default a detached tensor, so that no step waits for the device;
modules that are in evaluation mode when the rest of the model is trained stay so; an evaluator leaves the model in its
mode.

A model of Hugging Face's is trained as it is, on batches that are mappings, by the loss that it returns:

    trainer = create_supervised_trainer(model, optimizer)
    evaluator = create_supervised_evaluator(model, {"accuracy": accuracy})  # of output.logits and batch["labels"]
"""

import inspect
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import torch

from aengine.callables import check_callable, name_of
from aengine.checkpoint.capture.modules import unwrap
from aengine.engine import Engine
from aengine.keywords import explain_wrong_call
from aengine.training.update import Clip, OptimizerUpdate

if TYPE_CHECKING:
    from aengine.training.metrics import AnyMetric

Device: TypeAlias = str | torch.device | None
AnyEngine: TypeAlias = Engine[Any, Any]
Step: TypeAlias = Callable[[AnyEngine, Any], Any]

_logger = logging.getLogger("aengine.training")


class PrepareBatch(Protocol):
    """Makes inputs and targets of a batch, on the device: `prepare_batch` is one."""

    def __call__(self, batch: Any, *, device: Device, non_blocking: bool) -> tuple[Any, Any]:
        """Return inputs and targets."""
        ...


def prepare_batch(batch: Any, device: Device = None, *, non_blocking: bool = False) -> tuple[Any, Any]:
    """Return the inputs and the targets of a batch, moved to a device if one is given.

    A batch is a pair of these two; or a mapping, as Hugging Face's: all of it is the model's inputs, by keyword, and
    its "labels", if it has them, are the targets.

    Raises:
        ValueError: the batch is neither.
    """
    if isinstance(batch, Mapping):
        named = Keywords(cast(Mapping[str, Any], batch))
        if device is not None:
            named = Keywords(move(dict(named), device, non_blocking=non_blocking))
        return named, named.get("labels")
    if not isinstance(batch, tuple | list) or len(cast(list[Any], batch)) != 2:  # noqa: PLR2004 -- a pair
        came = f"{name_of(batch)} of {len(cast(Any, batch))}" if hasattr(batch, "__len__") else name_of(batch)
        raise ValueError(
            f"a batch is a pair of inputs and targets, or a mapping of the model's inputs by keyword, got a {came}:"
            " have prepare_batch=f(batch, device=..., non_blocking=...) return the two"
        )
    inputs, targets = cast(list[Any], batch)
    if device is not None:
        inputs, targets = (move(one, device, non_blocking=non_blocking) for one in (inputs, targets))
    return inputs, targets


def move(value: Any, device: Device, *, non_blocking: bool = False) -> Any:
    """Return a value with everything that has `to()` on a device, at any depth of mappings, lists, tuples, dataclasses.

    With `non_blocking`, copies of pinned memory to a GPU are not waited for.
    """
    if hasattr(value, "to"):
        return value.to(device, non_blocking=non_blocking)
    moved = partial(move, device=device, non_blocking=non_blocking)
    if isinstance(value, Mapping):
        named: Mapping[Any, Any] = value
        return {name: moved(one) for name, one in named.items()}
    if isinstance(value, tuple | list):
        several = [moved(one) for one in cast(list[Any], value)]
        make: Any = type(value)
        return make(*several) if hasattr(value, "_fields") else make(several)
    if is_dataclass(value) and not isinstance(value, type):
        # A copy that is changed, for its class may be frozen, or have fields that its __init__ does not take.
        twin = copy(value)
        for field in fields(value):
            object.__setattr__(twin, field.name, moved(getattr(value, field.name)))
        return twin
    return value


class Keywords(dict[str, Any]):
    """The inputs of a model by keyword; any other mapping is its one argument."""


def apply_model(model: torch.nn.Module, x: Any) -> Any:
    """Return `model(x)`; of a batch that is a mapping, `model(**x)`."""
    if not isinstance(x, Keywords):
        return model(x)
    try:
        return model(**x)
    except TypeError as error:
        if not _takes(unwrap(model), x):
            error.add_note(
                f"a batch that is a mapping has the model's inputs by keyword, here {', '.join(map(str, x))}: have"
                " prepare_batch=f(batch, device=..., non_blocking=...) return inputs and targets in another way"
            )
        raise


def _takes(model: Any, x: Keywords) -> bool:
    try:
        inspect.signature(model.forward).bind(**x)
    except (TypeError, ValueError):  # the latter where there is no signature
        return False
    return True


def unchanged(output: Any) -> Any:
    """Return the output itself."""
    return output


def detached_loss(_x: Any, _y: Any, _y_pred: Any, loss: torch.Tensor) -> torch.Tensor:
    """Return the loss as a tensor on its device: `loss.item()` would wait for the device at each step."""
    return loss.detach()


def predictions_and_targets(x: Any, y: Any, y_pred: Any) -> tuple[Any, Any]:
    """Return predictions and targets, in the order in which metrics take them; of Hugging Face's outputs the logits."""
    if hasattr(y_pred, "loss") and hasattr(y_pred, "logits"):
        return y_pred.logits, y
    if isinstance(x, Keywords) and isinstance(y_pred, Mapping):
        named: Mapping[str, Any] = y_pred
        return named.get("logits", named), y
    return y_pred, y


def own_loss(output: Any) -> torch.Tensor:
    """Return the loss that a model has computed itself, as Hugging Face's do from a batch with "labels".

    Raises:
        TypeError: there is none in its output.
    """
    loss: Any = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise TypeError(
            "without loss_fn= the loss is the model's own, output.loss, and there is none in its output, a"
            f' {name_of(output)}: Hugging Face\'s models compute one where the batch has "labels"; for others pass'
            " loss_fn=f(y_pred, y)"
        )
    return cast(torch.Tensor, loss)


class TrainingModes:
    """The modes in which the modules of a model are trained: those that its user has given them.

    A model that is in evaluation mode as a whole, as one that was loaded or evaluated is left, is put into training
    mode; but for those modules that were in evaluation mode when it was trained last, as frozen ones are.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._frozen: list[torch.nn.Module] = []

    def ensure(self) -> None:
        """Put the model into these modes: before each step."""
        modules = list(unwrap(self._model).modules())  # a wrapper may be in training mode while nothing in it is
        frozen = [module for module in modules if not module.training]
        if len(frozen) < len(modules):
            self._frozen = frozen
            return
        _logger.info(
            "the model is in evaluation mode as a whole, and is put into training mode, but for %d modules that were in"
            " evaluation mode when it was trained before",
            len(self._frozen),
        )
        self._model.train()
        for module in self._frozen:
            module.training = False


@explain_wrong_call
def supervised_training_step(  # noqa: PLR0913 -- pytorch-ignite's arguments
    model: torch.nn.Module,
    update: OptimizerUpdate,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    device: Device = None,
    *,
    non_blocking: bool = False,
    prepare_batch: PrepareBatch = prepare_batch,
    model_transform: Callable[[Any], Any] = unchanged,
    output_transform: Callable[[Any, Any, Any, torch.Tensor], Any] = detached_loss,
    model_fn: Callable[[torch.nn.Module, Any], Any] = apply_model,
    autocast_dtype: torch.dtype | None = None,
) -> Step:
    """Return the step of `create_supervised_trainer`. For a step that differs, copy the body of this one."""
    autocast = _autocast(autocast_dtype, device, model)
    if isinstance(loss_fn, type):
        name = name_of(loss_fn)
        raise TypeError(f"loss_fn= is called as loss_fn(y_pred, y), and {name} is a class: loss_fn={name}()")
    if loss_fn is not None:
        check_callable(loss_fn, "loss_fn=", "loss_fn", "y_pred", "y")
    modes = TrainingModes(model)

    def train_step(engine: AnyEngine, batch: Any) -> Any:
        modes.ensure()
        x, y = prepare_batch(batch, device=device, non_blocking=non_blocking)
        update.zero_grad()
        with autocast():
            output = model_fn(model, x)
            y_pred = model_transform(output)
            loss = own_loss(output) if loss_fn is None else loss_fn(y_pred, y)
        update(engine, loss)
        return output_transform(x, y, y_pred, loss)

    return train_step


@explain_wrong_call
def supervised_evaluation_step(
    model: torch.nn.Module,
    device: Device = None,
    *,
    non_blocking: bool = False,
    prepare_batch: PrepareBatch = prepare_batch,
    model_transform: Callable[[Any], Any] = unchanged,
    output_transform: Callable[[Any, Any, Any], Any] = predictions_and_targets,
    model_fn: Callable[[torch.nn.Module, Any], Any] = apply_model,
    autocast_dtype: torch.dtype | None = None,
) -> Step:
    """Return the step of `create_supervised_evaluator`. For a step that differs, copy the body of this one."""
    autocast = _autocast(autocast_dtype, device, model)

    def evaluate_step(engine: AnyEngine, batch: Any) -> Any:  # noqa: ARG001 -- a step takes it
        with evaluating(model), torch.no_grad():
            x, y = prepare_batch(batch, device=device, non_blocking=non_blocking)
            with autocast():
                y_pred = model_transform(model_fn(model, x))
            return output_transform(x, y, y_pred)

    return evaluate_step


@explain_wrong_call
def create_supervised_trainer(  # noqa: PLR0913 -- pytorch-ignite's arguments
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    device: Device = None,
    *,
    non_blocking: bool = False,
    prepare_batch: PrepareBatch = prepare_batch,
    model_transform: Callable[[Any], Any] = unchanged,
    output_transform: Callable[[Any, Any, Any, torch.Tensor], Any] = detached_loss,
    model_fn: Callable[[torch.nn.Module, Any], Any] = apply_model,
    autocast_dtype: torch.dtype | None = None,
    scaler: bool | torch.amp.GradScaler = False,
    gradient_accumulation_steps: int = 1,
    clip_gradients: float | Clip | None = None,
    name: str = "trainer",
    thread: bool = True,
) -> Engine[Any, torch.Tensor]:
    """Return an engine that trains a model on batches of inputs and targets, or on mappings, as Hugging Face's.

    Modules that are in evaluation mode while others are in training mode stay so: frozen batch normalisation keeps its
    statistics. A model that is in evaluation mode as a whole is put into training mode, with the modules in evaluation
    mode that were so when it was trained before.

    The model is not moved: move it before the optimizer is made. A `Checkpoint` of this engine also saves the scaler,
    and the gradients of a group of batches that is not complete. The engine fires `OptimizerEvents.OPTIMIZER_STEPPED`,
    for schedules and averages: see `OptimizerUpdate`.

    Args:
        model: the model, also compiled or distributed.
        optimizer: of its parameters.
        loss_fn: `loss_fn(y_pred, y)` returns a tensor of one number; None for the one that the model returns, as
            `output.loss`.
        device: where batches are moved to; by default they stay where they are.
        non_blocking: do not wait for batches in pinned memory to have been copied.
        prepare_batch: makes inputs and targets of a batch.
        model_transform: makes predictions of what the model returns.
        output_transform: `f(x, y, y_pred, loss)` returns the output; by default the loss, as a detached tensor, not
            divided by anything.
        model_fn: calls the model: `model_fn(model, x)`.
        autocast_dtype: what autocast computes in: torch.bfloat16, or torch.float16 with a scaler; None for no autocast
            but the caller's.
        scaler: True, or a GradScaler, for gradients of float16.
        gradient_accumulation_steps: batches for each step of the optimizer, of the mean of their gradients; the last
            group of an epoch may have fewer. For batches that count differently, see `weight=` of an `OptimizerUpdate`.
        clip_gradients: the greatest norm of the gradients, or a function that clips them: see `OptimizerUpdate`.
        name: the name of the engine.
        thread: as of `Engine`: False for the event loop's thread.

    Raises:
        ValueError, TypeError: an argument is wrong, or contradicts another.
    """
    if autocast_dtype is torch.float16 and scaler is False:
        raise ValueError(
            "small gradients vanish in float16: pass scaler=True, or a GradScaler; or take"
            " autocast_dtype=torch.bfloat16, which needs none"
        )
    if scaler is True and autocast_dtype is None:
        raise ValueError(
            "scaler=True goes with autocast_dtype=torch.float16, and there is no autocast_dtype: pass both; or a"
            " GradScaler, for a precision of your own"
        )
    if isinstance(scaler, bool):
        _autocast(
            autocast_dtype, device, model
        )  # refuses a model or a device that is none, before the scaler needs them
        chosen = torch.amp.GradScaler(_device_type(device, model)) if scaler else None
    else:
        chosen = scaler
    update = OptimizerUpdate(
        model,
        optimizer,
        scaler=chosen,
        gradient_accumulation_steps=gradient_accumulation_steps,
        clip_gradients=clip_gradients,
    )
    step = supervised_training_step(
        model, update, loss_fn, device, non_blocking=non_blocking, prepare_batch=prepare_batch,
        model_transform=model_transform, output_transform=output_transform, model_fn=model_fn,
        autocast_dtype=autocast_dtype,
    )  # fmt: skip
    trainer: Engine[Any, torch.Tensor] = Engine(step, name=name, thread=thread)
    update.attach(trainer)
    return trainer


@explain_wrong_call
def create_supervised_evaluator(  # noqa: PLR0913 -- pytorch-ignite's arguments
    model: torch.nn.Module,
    metrics: "Mapping[str, AnyMetric] | None" = None,
    device: Device = None,
    *,
    non_blocking: bool = False,
    prepare_batch: PrepareBatch = prepare_batch,
    model_transform: Callable[[Any], Any] = unchanged,
    output_transform: Callable[[Any, Any, Any], Any] = predictions_and_targets,
    model_fn: Callable[[torch.nn.Module, Any], Any] = apply_model,
    autocast_dtype: torch.dtype | None = None,
    name: str = "evaluator",
    thread: bool = True,
) -> Engine[Any, tuple[Any, Any]]:
    """Return an engine that computes metrics of a model on batches of inputs and targets, or on mappings.

    In each step the model is in evaluation mode and gradients are off; between two steps each of its modules is in the
    mode it was in before. A model of very many modules is quicker if it is in evaluation mode from the beginning. For
    inference mode, write `with torch.inference_mode(): await evaluator.run(...)`.

    Args:
        model: the model; if it is evaluated beside the step of its trainer, a copy of it.
        metrics: torchmetrics' metrics by name, each for a `MetricHandler`.
        device: where batches are moved to; by default they stay where they are.
        non_blocking: do not wait for batches in pinned memory to have been copied.
        prepare_batch: makes inputs and targets of a batch.
        model_transform: makes predictions of what the model returns.
        output_transform: `f(x, y, y_pred)` returns the output; by default `(y_pred, y)`, as metrics take them, or
            `(y_pred.logits, y)` of Hugging Face's outputs.
        model_fn: calls the model: `model_fn(model, x)`.
        autocast_dtype: what autocast computes in; None for no autocast but the caller's.
        name: the name of the engine.
        thread: as of `Engine`: False for the event loop's thread.

    Raises:
        ValueError, TypeError: an argument is wrong.
        ImportError: there are metrics, and torchmetrics is not installed.
    """
    if metrics is not None and not isinstance(metrics, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f'metrics= are metrics by name, such as {{"accuracy": metric}}; got {metrics!r}')
    step = supervised_evaluation_step(
        model, device, non_blocking=non_blocking, prepare_batch=prepare_batch, model_transform=model_transform,
        output_transform=output_transform, model_fn=model_fn, autocast_dtype=autocast_dtype,
    )  # fmt: skip
    evaluator: Engine[Any, tuple[Any, Any]] = Engine(step, name=name, thread=thread)
    if metrics:
        from aengine.training.metrics import MetricHandler  # noqa: PLC0415 -- torchmetrics is optional

        for named, metric in metrics.items():
            MetricHandler(metric, named).attach(evaluator)
    return evaluator


@contextmanager
def evaluating(model: torch.nn.Module) -> Generator[None]:
    """Put a model into evaluation mode, and at the end each of its modules back into the mode it was in before."""
    before = [(module, module.training) for module in model.modules()]
    if not any(was_training for _, was_training in before):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()  # its own method may do more than set the mode: LoRA's unmerges its adapters
        for module, was_training in before:
            if module.training != was_training:
                module.training = was_training


def _autocast(
    autocast_dtype: torch.dtype | None, device: Device, model: torch.nn.Module
) -> Callable[[], AbstractContextManager[object]]:
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"the model is a torch.nn.Module, got {model!r}")
    try:
        torch.device("cpu" if device is None else device)
    except RuntimeError:
        raise ValueError(f'device= is a device of torch, such as "cuda" or "cpu"; got {device!r}') from None
    if autocast_dtype is None:
        return nullcontext
    if autocast_dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            "autocast_dtype= takes the type to compute in, torch.bfloat16, or torch.float16 with scaler=True (which is"
            f' pytorch-ignite\'s "amp"); got {autocast_dtype!r}'
        )
    device_type = _device_type(device, model)

    @contextmanager
    def autocast() -> Generator[None]:
        try:
            with torch.autocast(device_type, dtype=autocast_dtype):
                yield
        finally:
            # Only the outermost autocast clears its cache of cast weights. If run() was called within another autocast,
            # the next step would compute with this step's weights.
            torch.clear_autocast_cache()

    return autocast


def _device_type(device: Device, model: torch.nn.Module) -> str:
    if device is not None:
        return torch.device(device).type
    return next((parameter.device.type for parameter in model.parameters()), "cpu")

"""Gradients: statistics of gradients, weights and updates, measured in the step, on their device.

    gradients = GradientStatistics(model, optimizer, every=100)
    gradients.attach(trainer)
    Tracker(JSONLines("gradients.jsonl"), values=gradients.values).attach(trainer, GradientEvents.GRADIENTS_MEASURED)

Nothing is read from a device here: the results stay there, as tensors of one number, until they are used.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import torch

from aengine.arguments import check_whole
from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.callables import name_of
from aengine.engine import Engine
from aengine.events import EventEnum, Events
from aengine.keywords import explain_wrong_call

_foreach_norm: Any = torch._foreach_norm  # noqa: SLF001  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
"""Computes the norms of several tensors at once, as torch.nn.utils does; public only in newer versions of torch."""

Parameters: TypeAlias = torch.nn.Module | Mapping[str, Iterable[torch.nn.Parameter]]


class GradientEvents(EventEnum):
    """What an engine with GradientStatistics fires.

    Attributes:
        GRADIENTS_MEASURED: in the iteration just completed a step of the optimizer was measured. Its handlers run
            before those of ITERATION_COMPLETED that were added after the statistics were attached. The payload is what
            was measured, by name, as `GradientStatistics.values` returns it.
    """

    GRADIENTS_MEASURED = "gradients_measured"


@explain_wrong_call
class GradientStatistics:
    """Measures gradients, weights and updates at every so many steps of an optimizer.

    It measures within the optimizer's step, so it does not matter when gradients are zeroed, nor over how many batches
    they are accumulated. They are measured as the optimizer gets them: unscaled, and clipped. The norm before clipping
    is what the clipping function returns; to have it as well, keep it there:

        def clip(parameters):
            trainer.state.metrics["norm before clipping"] = clip_grad_norm_(parameters, 1.0)

        create_supervised_trainer(model, optimizer, loss_fn, clip_gradients=clip)

    A step that a GradScaler skips because its gradients are not finite is not measured, unless the optimizer is a fused
    one. Training is not changed by a single bit.

    The values for each group of parameters:

    - `gradient/norm`, `min`, `max`, `mean`, `std`, and, as fractions, `zeros` and `nonfinite`;
    - `weight/norm`, `min`, `max`, `mean`, `std`, before the step;
    - `update/norm`, of the difference that the step makes, and `update/ratio`, to the norm of the weights.

    Parameters without a gradient are left out of the gradients. Norms are Euclidean, deviations those of a population.
    DTensors, as of `fully_shard`, are measured as a whole: they are gathered one by one, so attach these statistics in
    all processes. Plain tensors are measured as they are in this process.

    Args:
        parameters: a model, as one group; or groups of parameters by name, with which the names of its values begin:
            `{name: child.parameters() for name, child in model.named_children()}`, or
            `{"": model.parameters(), "head": model.head.parameters()}`.
        optimizer: whose steps are measured.
        every: steps of the optimizer from one measurement to the next. One takes about a dozen small operations for
            each parameter.
        updates: measure updates as well, which needs memory for a copy of the parameters during a measured step.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """

    def __init__(
        self, parameters: Parameters, optimizer: torch.optim.Optimizer, *, every: int = 100, updates: bool = True
    ) -> None:
        self._groups = _by_prefix(parameters)
        self._parameters = list(dict.fromkeys(one for group in self._groups.values() for one in group))
        if not isinstance(optimizer, torch.optim.Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"gradients are measured at the steps of an optimizer of torch.optim, got {optimizer!r}")
        self._optimizer = optimizer
        self._every = check_whole(every, "every=", minimum=1, of="steps of the optimizer")
        self._updates = updates
        self._attachment = Attachment(self)
        self._steps = 0
        self._values: dict[str, torch.Tensor] = {}
        self._before: list[torch.Tensor] | None = None  # the parameters before the step, during a measured one
        self._is_measured = False  # the current step
        self._is_new = False  # the last measurement: GRADIENTS_MEASURED was not fired for it yet

    def attach(self, engine: Engine[Any, Any]) -> RemovableEventHandle:
        """Measure from now on, and fire GRADIENTS_MEASURED on this engine.

        Raises:
            TypeError: it is no engine.
            RuntimeError: this is attached already.
        """
        return self._attachment.begin(engine, self._listen(engine))

    def _listen(self, engine: Engine[Any, Any]) -> Generator[RemovableEventHandle]:
        engine.register_events(*GradientEvents)
        yield RemovableEventHandle(self._optimizer.register_step_pre_hook(self._measure_before).remove)
        yield RemovableEventHandle(self._optimizer.register_step_post_hook(self._measure_after).remove)
        yield engine.add_event_handler(Events.ITERATION_COMPLETED, self._report)

    def values(self, engine: Engine[Any, Any] | None = None) -> dict[str, torch.Tensor]:  # noqa: ARG002 -- as values= calls it
        """Return the values of the last measurement, by name, for `Tracker(values=)`; before the first, none."""
        return dict(self._values)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps so far, so that a resumed run measures the same steps."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue counting from there."""
        self._steps = state_dict["steps"]
        self._is_new = False

    @torch.no_grad()
    def _measure_before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._before, self._is_measured = None, False  # where the step before failed, they are still set
        self._steps += 1
        if self._steps % self._every:
            return
        gradients = {one: _dense(one.grad) for one in self._parameters if one.grad is not None}
        weights = {one: one.detach() for one in self._parameters}
        measured = {"gradient": _measure(gradients), "weight": _measure(weights)}
        # A GradScaler sets it on a fused optimizer, which unscales within its step.
        scale: torch.Tensor | None = getattr(optimizer, "grad_scale", None)
        self._values = {}
        for prefix, group in self._groups.items():
            for kind, of_each in measured.items():
                if several := [of_each[one] for one in group if one in of_each]:
                    numbers = _combine(several)
                    if kind == "weight":
                        del numbers["zeros"], numbers["nonfinite"]
                    elif scale is not None:
                        numbers = _unscaled(numbers, scale)
                    self._values |= {f"{prefix}{kind}/{number}": value for number, value in numbers.items()}
        self._is_measured = True
        if self._updates:
            self._before = [one.clone() for one in weights.values()]

    @torch.no_grad()
    def _measure_after(self, *_: Any) -> None:
        before, self._before = self._before, None
        self._is_new, self._is_measured = self._is_new or self._is_measured, False
        if before is None:
            return
        # Old minus new, in the memory of the old: the sign makes no difference to a norm.
        differences = [old.sub_(one.detach()) for old, one in zip(before, self._parameters, strict=True)]
        norms = dict(zip(self._parameters, _norms(differences), strict=True))
        for prefix, group in self._groups.items():
            if group:
                update = _norm_of([norms[one] for one in group])
                self._values[f"{prefix}update/norm"] = update
                self._values[f"{prefix}update/ratio"] = update / self._values[f"{prefix}weight/norm"]

    def _report(self, engine: Engine[Any, Any]) -> None:
        if self._is_new:
            self._is_new = False
            engine.fire_event(GradientEvents.GRADIENTS_MEASURED, self.values())


def keep_measurements(statistics: GradientStatistics) -> Callable[[], None]:
    """Return a function that restores what was measured, as it is now: `state_dict` has the count of steps only."""
    names = "_steps", "_values", "_is_new"
    kept = {name: getattr(statistics, name) for name in names}

    def restore() -> None:
        vars(statistics).update(kept)

    return restore


class _Measures(NamedTuple):
    """Sums and extremes of one tensor, on its device, from which those of several tensors can be computed."""

    size: int
    norm: torch.Tensor
    sum: torch.Tensor
    min: torch.Tensor
    max: torch.Tensor
    nonzeros: torch.Tensor
    finite: torch.Tensor


def _measure(tensors: Mapping[torch.nn.Parameter, torch.Tensor]) -> dict[torch.nn.Parameter, _Measures]:
    measured: dict[torch.nn.Parameter, _Measures] = {}
    filled = {one: tensor for one, tensor in tensors.items() if tensor.numel()}
    for (parameter, tensor), norm in zip(filled.items(), _norms(filled.values()), strict=True):
        whole = _whole(tensor)
        least, most = whole.aminmax()
        total, finite = whole.sum(dtype=_wide(whole.dtype)), whole.isfinite().sum()
        measured[parameter] = _Measures(whole.numel(), norm, total, least, most, whole.count_nonzero(), finite)
    return measured


def _norms(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the norm of each tensor, computed at once for those of one device and dtype."""
    several = list(tensors)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    norms: dict[int, torch.Tensor] = {}
    for index, tensor in enumerate(several):
        if hasattr(tensor, "full_tensor"):  # gathered one by one, not to have all of them in memory
            norms[index] = torch.linalg.vector_norm(_whole(tensor), dtype=_wide(tensor.dtype))
        else:
            kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    for (_, dtype), indices in kinds.items():
        # In half precision a norm would be right to two or three digits only.
        computed = _foreach_norm([several[index] for index in indices], 2, dtype=_wide(dtype))
        norms.update(zip(indices, computed, strict=True))
    return [norms[index] for index in range(len(several))]


def _combine(several: list[_Measures]) -> dict[str, torch.Tensor]:
    count = sum(one.size for one in several)
    total = _stacked([one.sum for one in several]).sum()
    norm = _norm_of([one.norm for one in several])
    mean = total / count
    deviation = (norm.square() / count - mean.square()).clamp_min(0).sqrt()  # rounding can make it negative
    return {
        "norm": norm,
        "min": _stacked([one.min for one in several]).amin(),
        "max": _stacked([one.max for one in several]).amax(),
        "mean": mean,
        "std": deviation,
        "zeros": 1 - _stacked([one.nonzeros for one in several]).sum() / count,
        "nonfinite": 1 - _stacked([one.finite for one in several]).sum() / count,
    }


def _unscaled(numbers: dict[str, torch.Tensor], scale: torch.Tensor) -> dict[str, torch.Tensor]:
    fractions = ("zeros", "nonfinite")
    return {
        name: value if name in fractions else value / scale.to(value.device, non_blocking=True)
        for name, value in numbers.items()
    }


def _norm_of(norms: list[torch.Tensor]) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(_stacked(norms))
    return norm


def _stacked(numbers: list[torch.Tensor]) -> torch.Tensor:
    """Return numbers as one tensor on the device of the first, in double precision, which squares and counts need."""
    device = numbers[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no double precision
    return torch.stack([one.to(device, dtype, non_blocking=True) for one in numbers])


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a DTensor, of which each process has a part, as a plain tensor: all processes must do it."""
    gather: Callable[[], torch.Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.detach()
    return gradient.to_dense() if gradient.is_sparse else gradient


def _by_prefix(parameters: Any) -> dict[str, list[torch.nn.Parameter]]:
    """Return the groups of parameters, each by what the names of its values begin with."""
    if isinstance(parameters, torch.nn.Module):
        parameters = {"": parameters.parameters()}
    if not isinstance(parameters, Mapping):
        raise TypeError(
            "GradientStatistics(parameters, optimizer) takes a model, or a dictionary of names to parameters, got"
            f" {parameters!r}"
        )
    groups = {str(name): list(group) for name, group in cast(Mapping[Any, Iterable[Any]], parameters).items()}
    for name, group in groups.items():
        if wrong := [one for one in group if not isinstance(one, torch.nn.Parameter)]:
            raise TypeError(f"the parameters of {name!r} are torch.nn.Parameter, got a {name_of(wrong[0])}")
    return {f"{name}/" if name else "": group for name, group in groups.items()}

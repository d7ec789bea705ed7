"""Gradients: what gradients, weights and updates look like, measured in the step, where they are.

    gradients = GradientStatistics(model, optimizer, every=100)
    gradients.attach(trainer)
    track(trainer, JSONLines("gradients.jsonl"), GradientEvents.MEASURED, values=gradients.values)

Nothing is read from a device: the results stay there, as tensors of one number, until somebody wants them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import torch

from aengine.bus.emitter import RemovableEventHandle
from aengine.engine import Engine
from aengine.events import EventEnum, Events

_foreach_norm: Any = torch._foreach_norm  # noqa: SLF001  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
"""Computes the norms of several tensors at once: what torch.nn.utils calls, in newer versions by a public name."""

Parameters: TypeAlias = torch.nn.Module | Mapping[str, Iterable[torch.nn.Parameter]]


class GradientEvents(EventEnum):
    """What an engine with GradientStatistics fires.

    Attributes:
        MEASURED: in the iteration just completed a step of the optimizer was measured. Its handlers run before those of
            ITERATION_COMPLETED that were added after the statistics were attached.
    """

    MEASURED = "gradients_measured"


class GradientStatistics:
    """Measures gradients, weights and updates at every so many steps of an optimizer.

    At the step itself, so it does not matter who zeroes gradients and when, nor how many batches they are gathered
    over. They are measured as the optimizer gets them: unscaled, and clipped. The norm before that is what clipping
    returns, so have it kept where it is done:

        def clip(parameters):
            trainer.state.metrics["norm before clipping"] = clip_grad_norm_(parameters, 1.0)

        create_supervised_trainer(model, optimizer, loss_fn, clip_gradients=clip)

    A step that a GradScaler leaves out, for its gradients are not finite, is not measured, unless the optimizer is a
    fused one. Training is not changed by a single bit.

    What there is of each group of parameters:

    - `gradient/norm`, `min`, `max`, `mean`, `std`, and, as fractions, `zeros` and `nonfinite`;
    - `weight/norm`, `min`, `max`, `mean`, `std`, before the step;
    - `update/norm`, of the difference that the step makes, and `update/ratio`, to the norm of the weights.

    Parameters without a gradient are left out of the gradients. Norms are Euclidean, deviations those of a population.

    Args:
        parameters: a model, all of it in one; or parameters in groups by name, which precedes that of the number:
            `{name: child.parameters() for name, child in model.named_children()}`, or
            `{"": model.parameters(), "head": model.head.parameters()}`.
        optimizer: whose steps are measured.
        every: how many of its steps from one measurement to the next. One takes about a dozen small operations for each
            parameter.
        updates: measure updates, too, for which there is a copy of the parameters in memory during a measured step.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """

    def __init__(
        self, parameters: Parameters, optimizer: torch.optim.Optimizer, *, every: int = 100, updates: bool = True
    ) -> None:
        self._groups = _by_name(parameters)
        self._parameters = list(dict.fromkeys(one for group in self._groups.values() for one in group))
        if not isinstance(optimizer, torch.optim.Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"gradients are measured at the steps of an optimizer of torch.optim, got {optimizer!r}")
        if type(every) is not int or every < 1:
            raise ValueError(f"every= is a whole number of steps of the optimizer, 1 or more; got {every!r}")
        self._optimizer = optimizer
        self._every = every
        self._updates = updates
        self._is_attached = False
        self._steps = 0
        self._values: dict[str, torch.Tensor] = {}
        self._before: list[torch.Tensor] | None = None  # the parameters, within a measured step
        self._is_measured = False  # the step under way
        self._is_new = False  # the last measurement, which nobody was told of

    def attach(self, engine: Engine[Any, Any]) -> RemovableEventHandle:
        """Measure from now on, and fire MEASURED on this engine. Returns what ends it.

        Raises:
            RuntimeError: this is attached already.
        """
        if self._is_attached:  # to any engine: each step of the optimizer would count twice
            raise RuntimeError(
                "these GradientStatistics are attached already: remove() what attach() returned, or make others for"
                " another engine"
            )
        engine.register_events(*GradientEvents)
        handles: list[Any] = [
            self._optimizer.register_step_pre_hook(self._look_before),
            self._optimizer.register_step_post_hook(self._look_after),
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._tell),
        ]
        self._is_attached = True

        def remove() -> None:
            self._is_attached = False
            for handle in handles:
                handle.remove()

        return RemovableEventHandle(remove)

    def values(self, _: Engine[Any, Any] | None = None) -> dict[str, torch.Tensor]:
        """Return the last measurement, by name, for `track(values=)`. Nothing before the first."""
        return dict(self._values)

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps there were, so that a run that is resumed measures the same ones."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._steps = state_dict["steps"]
        self._is_new = False

    def keep(self) -> Callable[[], None]:
        """Return what puts the measurements back as they are now, for `lr_range_test`."""
        kept = self._steps, self._values, self._is_new

        def put_back() -> None:
            self._steps, self._values, self._is_new = kept

        return put_back

    @torch.no_grad()
    def _look_before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._before, self._is_measured = None, False  # of a step that failed
        self._steps += 1
        if self._steps % self._every:
            return
        gradients = {one: _dense(one.grad) for one in self._parameters if one.grad is not None}
        weights = {one: one.detach() for one in self._parameters}
        measured = {"gradient": _measure(gradients), "weight": _measure(weights)}
        # Of a GradScaler, for a fused optimizer that divides by it on its own.
        scale: torch.Tensor | None = getattr(optimizer, "grad_scale", None)
        self._values = {}
        for name, group in self._groups.items():
            for kind, of_each in measured.items():
                if several := [of_each[one] for one in group if one in of_each]:
                    numbers = _combine(several)
                    if kind == "gradient":
                        numbers = _unscaled(numbers, scale)
                    else:
                        del numbers["zeros"], numbers["nonfinite"]
                    self._values |= {f"{_prefix(name)}{kind}/{number}": value for number, value in numbers.items()}
        self._is_measured = True
        if self._updates:
            self._before = [one.clone() for one in weights.values()]

    @torch.no_grad()
    def _look_after(self, *_: Any) -> None:
        before, self._before = self._before, None
        self._is_new, self._is_measured = self._is_new or self._is_measured, False
        if before is None:
            return
        differences = [
            old.sub_(one.detach()) for old, one in zip(before, self._parameters, strict=True)
        ]  # the sign does not show in a norm
        norms = dict(zip(self._parameters, _norms(differences), strict=True))
        for name, group in self._groups.items():
            if group:
                update = _norm_of([norms[one] for one in group])
                self._values[f"{_prefix(name)}update/norm"] = update
                self._values[f"{_prefix(name)}update/ratio"] = update / self._values[f"{_prefix(name)}weight/norm"]

    def _tell(self, engine: Engine[Any, Any]) -> None:
        if self._is_new:
            self._is_new = False
            engine.fire_event(GradientEvents.MEASURED)


class _Measures(NamedTuple):
    """What is known of one tensor, as numbers where it is, in the precision in which they are combined."""

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
        least, most = tensor.aminmax()
        measured[parameter] = _Measures(
            tensor.numel(),
            norm,
            tensor.sum(dtype=_wide(tensor.dtype)),
            least,
            most,
            tensor.count_nonzero(),
            tensor.isfinite().sum(),
        )
    return measured


def _norms(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the norm of each, computed for those of one kind at once."""
    several = list(tensors)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(several):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    norms: dict[int, torch.Tensor] = {}
    for (_, dtype), indices in kinds.items():
        # In the precision of half of them it would be true to two or three digits only.
        computed = _foreach_norm([several[index] for index in indices], 2, dtype=_wide(dtype))
        norms.update(zip(indices, computed, strict=True))
    return [norms[index] for index in range(len(several))]


def _combine(several: list[_Measures]) -> dict[str, torch.Tensor]:
    count = sum(one.size for one in several)
    total = _sum_of([one.sum for one in several])
    norm = _norm_of([one.norm for one in several])
    mean = total / count
    deviation = (norm.square() / count - mean.square()).clamp_min(0).sqrt()
    return {
        "norm": norm,
        "min": _stacked([one.min for one in several]).amin(),
        "max": _stacked([one.max for one in several]).amax(),
        "mean": mean,
        "std": deviation,
        "zeros": 1 - _sum_of([one.nonzeros for one in several]) / count,
        "nonfinite": 1 - _sum_of([one.finite for one in several]) / count,
    }


def _unscaled(numbers: dict[str, torch.Tensor], scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
    if scale is None:
        return numbers
    fractions = ("zeros", "nonfinite")
    return {
        name: value if name in fractions else value / scale.to(value.device, non_blocking=True)
        for name, value in numbers.items()
    }


def _norm_of(norms: list[torch.Tensor]) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(_stacked(norms))
    return norm


def _sum_of(numbers: list[torch.Tensor]) -> torch.Tensor:
    return _stacked(numbers).sum()


def _stacked(numbers: list[torch.Tensor]) -> torch.Tensor:
    """Return numbers as one tensor, where the first one is; in double precision, which squares and counts need."""
    device = numbers[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # the former has no other
    return torch.stack([one.to(device, dtype, non_blocking=True) for one in numbers])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.detach()
    return gradient.to_dense() if gradient.is_sparse else gradient


def _prefix(name: str) -> str:
    return f"{name}/" if name else ""


def _by_name(parameters: Any) -> dict[str, list[torch.nn.Parameter]]:
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
            raise TypeError(f"the parameters of {name!r} are torch.nn.Parameter, got a {type(wrong[0]).__qualname__}")
    return groups

"""NaN guard: a run whose outputs are no numbers any more fails, and is not saved over what was good."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any

from aengine.engine import Engine
from aengine.events import Events


class NanGuard:
    """Fails the run with a FloatingPointError when an output is, or contains, NaN or infinity.

        NanGuard().attach(trainer)

    Whether a tensor is finite is computed where the tensor is, and looked at only every so many iterations, so that a
    GPU is not waited for at each step. The error names the first iteration that was not. What has not been looked at
    yet is looked at when the engine is saved: a `Checkpoint` does not write what came of such an output.

    Args:
        every: how many iterations may pass before it is looked at.
        output_transform: makes of the output what is to be finite; by default all numbers and tensors in it, at any
            depth of dictionaries, lists and tuples.

    Raises:
        ValueError: `every` is no whole number, 1 or more.
    """

    def __init__(self, every: int = 20, output_transform: Callable[[Any], Any] = lambda output: output) -> None:
        if type(every) is not int or every < 1:
            raise ValueError(f"every= is a whole number of iterations, 1 or more; got {every!r}")
        self._every = every
        self._transform = output_transform
        self._unread: list[tuple[int, str, Any]] = []  # iteration, place in the output, whether it is finite

    def attach(self, engine: Engine[Any, Any]) -> None:
        """Guard an engine. What is added to it later runs on outputs that were noted, not looked at."""
        engine.add_event_handler(Events.STARTED, self._unread.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)
        for event in (Events.ITERATION_COMPLETED(every=self._every), Events.EPOCH_COMPLETED, Events.COMPLETED):
            engine.add_event_handler(event, self._look)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: what there is to be said must be said before a save.

        Raises:
            FloatingPointError: an output was not finite.
        """
        self._look()
        return {}

    def load_state_dict(self, _: Mapping[str, Any]) -> None:
        """Forget what was noted before."""
        self._unread.clear()

    def _note(self, engine: Engine[Any, Any]) -> None:
        for place, is_finite in _looked_at(self._transform(engine.state.output), "output"):
            self._unread.append((engine.state.iteration, place, is_finite))

    def _look(self) -> None:
        for iteration, place, is_finite in self._unread:
            if not is_finite:
                raise FloatingPointError(
                    f"in iteration {iteration} the {place} was not finite. Behind it may be a learning rate that is too"
                    " large, or bad data; torch.autograd.set_detect_anomaly(True) finds the operation"
                )
        self._unread.clear()


def _looked_at(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield for each tensor and number its place and whether it is finite, of a tensor as a tensor."""
    torch = sys.modules.get("torch")  # where it is not loaded, nothing is a tensor
    if torch is not None and isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            yield place, value.detach().isfinite().all()
    elif isinstance(value, Real):
        yield place, math.isfinite(value)
    elif isinstance(value, Mapping):
        named: Mapping[Any, Any] = value
        for key, one in named.items():
            yield from _looked_at(one, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        several: tuple[Any, ...] = tuple(value)
        for index, one in enumerate(several):
            yield from _looked_at(one, f"{place}[{index}]")

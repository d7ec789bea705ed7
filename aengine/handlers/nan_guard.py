"""NaN guard: a run whose outputs become NaN or infinite fails, and does not overwrite its good checkpoints."""

import math
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from numbers import Real
from typing import Any, cast

from aengine.arguments import check_whole
from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.engine import Engine
from aengine.events import Events
from aengine.keywords import explain_wrong_call


@explain_wrong_call
class NanGuard:
    """Fails the run with a FloatingPointError when an output is, or contains, NaN or infinity.

        NanGuard().attach(trainer)

    Whether a tensor is finite is computed on its device at each iteration, and read only every so many iterations: each
    read waits for the GPU. The error names the first iteration whose output was not finite. Results not read yet are
    read when the engine is saved: a `Checkpoint` does not save a state that such an output may have spoiled.

    Args:
        every: the iterations from one read to the next.
        output_transform: takes from the output what must be finite; by default all numbers and tensors in it, at any
            depth of dictionaries, lists and tuples.

    Raises:
        ValueError: `every` is no whole number, or less than 1.
    """

    def __init__(self, *, every: int = 20, output_transform: Callable[[Any], Any] = lambda output: output) -> None:
        self._every = check_whole(every, "every=", minimum=1, of="iterations")
        self._transform = output_transform
        self._attachment = Attachment(self)
        self._unread: list[tuple[int, str, Any]] = []  # iteration, path in the output, whether it is finite

    def attach(self, engine: Engine[Any, Any]) -> RemovableEventHandle:
        """Guard an engine. Between two reads its other handlers run on outputs that may not be finite.

        What is returned removes it again; results that are not read by then are forgotten.

        Raises:
            TypeError: this is no engine.
            RuntimeError: this is attached already.
        """
        return self._attachment.begin(engine, self._listen(engine))

    def _listen(self, engine: Engine[Any, Any]) -> Generator[RemovableEventHandle]:
        yield RemovableEventHandle(self._unread.clear)  # last: the outputs of this engine, and not of the next
        yield engine.add_event_handler(Events.STARTED, self._unread.clear)
        yield engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)
        for event in (Events.ITERATION_COMPLETED(every=self._every), Events.EPOCH_COMPLETED, Events.COMPLETED):
            yield engine.add_event_handler(event, self._read)

    def state_dict(self) -> dict[str, Any]:
        """Read all results that are not read yet, so that the save fails; return nothing, for there is no state.

        Raises:
            FloatingPointError: an output was not finite.
        """
        self._read()
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # noqa: ARG002 -- as Stateful has it
        """Forget the results that are not read yet: they are of outputs before the load."""
        self._unread.clear()

    def _note(self, engine: Engine[Any, Any]) -> None:
        for path, is_finite in _each_finite(self._transform(engine.state.output), "output"):
            self._unread.append((engine.state.iteration, path, is_finite))

    def _read(self) -> None:
        for iteration, path, is_finite in self._unread:
            if not is_finite:
                raise FloatingPointError(
                    f"in iteration {iteration} the {path} was not finite. A learning rate that is too large may be"
                    " the cause, or bad data; torch.autograd.set_detect_anomaly(True) finds the operation"
                )
        self._unread.clear()


def _each_finite(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the path of each tensor and number, and whether it is finite: for a tensor as a tensor on its device."""
    torch = sys.modules.get("torch")  # where it is not loaded, nothing is a tensor
    if torch is not None and isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            yield path, value.detach().isfinite().all()
    elif isinstance(value, Real):
        yield path, math.isfinite(value)
    elif isinstance(value, Mapping):
        named: Mapping[Any, Any] = value
        for key, one in named.items():
            yield from _each_finite(one, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, one in enumerate(cast(list[Any], value)):
            yield from _each_finite(one, f"{path}[{index}]")

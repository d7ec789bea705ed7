"""Scalars: copied between two steps without waiting for a device, and read beside the step."""

from collections.abc import Mapping
from typing import Any

import torch

from aengine.engine import Engine


class _OnDevice:
    """A copy of a number on a device that may still be computing it, and the event that says when the copy is done."""

    __slots__ = ("_copied", "_copy")

    def __init__(self, value: torch.Tensor) -> None:
        self._copy = value.detach().clone()
        # The copy is read from another thread, which has another current stream: without this event it would not wait
        # for the stream that computes the number.
        self._copied = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def resolve(self) -> Any:
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.item()


def numbers_of(engine: Engine[Any, Any]) -> dict[str, Any]:
    """Return the numbers in the last output and in the metrics: the default of `Tracker(values=)`.

    An output that is a mapping gives its entries, one that is a number is called "output". The rest is left out.
    """
    output, metrics = engine.state.output, engine.state.metrics
    named: Mapping[Any, Any] = output if isinstance(output, Mapping) else {"output": output}
    return {str(name): value for name, value in (*named.items(), *metrics.items()) if is_number(value)}


def is_number(value: Any) -> bool:
    """Say whether this is one real number, be it in a tensor or an array."""
    if isinstance(value, int | float):
        return True
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    return getattr(value, "size", None) == 1 and getattr(getattr(value, "dtype", None), "kind", "") in "biuf"


def snapshot(values: Any) -> dict[str, Any]:
    """Keep numbers as they are now: what is in memory is read, what is on a device is copied on that device.

    Raises:
        TypeError: this is no mapping of names to single numbers.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"Tracker(values=) must return a mapping of names to numbers, got {values!r}")
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if type(value) is float or type(value) is int:
            kept[str(name)] = value
        elif not is_number(value):
            raise TypeError(
                f"Tracker(values=) must give single numbers, but {name!r} is {value!r}: leave it out, or give its mean"
            )
        elif not all(one.is_replicate() for one in getattr(value, "placements", ())):
            raise TypeError(
                f"Tracker(values=) must give whole numbers of a DTensor, and this process has a part of {name!r}: call"
                " full_tensor() on it, in the step, where all processes do"
            )
        elif isinstance(value, torch.Tensor) and value.device.type != "cpu":
            kept[str(name)] = _OnDevice(value)
        else:
            kept[str(name)] = value.item() if hasattr(value, "item") else value
    return kept


def resolve(kept: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the numbers that `snapshot` kept. Waits for devices, so not to be called on the event loop's thread."""
    return {name: value.resolve() if type(value) is _OnDevice else value for name, value in kept.items()}

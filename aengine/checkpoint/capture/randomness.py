"""Random states: python's, numpy's and torch's generators, and a DataLoader's own, captured and put back.

What is captured is tensors and plain numbers, so that it loads with `weights_only=True`.
"""

import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from aengine.callables import type_name


class PythonGenerator:
    """The state of a generator of python's, or of the module `random`, as a tensor and plain numbers."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands."""
        version, internal, gauss = self._generator.getstate()
        return {"version": version, "state": torch.tensor(internal), "gauss": gauss}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put it back; python takes its numbers as a tuple only."""
        self._generator.setstate((state_dict["version"], tuple(state_dict["state"].tolist()), state_dict["gauss"]))


class RandomStates:
    """What `engine.randomness` is where checkpoints are taken: the generators that all share, and the data's own.

    numpy's legacy generator if numpy is loaded, CUDA's if it is in use. Of data that is a DataLoader, or looks like
    one: its generator, and those of its samplers. Randomness that is drawn in a DataLoader's workers follows from the
    seed that the loader draws as it starts them, and so comes again as well, unless they are persistent.
    """

    def capture(self, data: Any) -> dict[str, Any]:
        """Return where the generators stand; those of the data, too, unless it is None."""
        captured: dict[str, Any] = {"python": PythonGenerator(random).state_dict(), "torch": torch.get_rng_state()}
        if numpy := sys.modules.get("numpy"):
            name, keys, position, has_gauss, cached = numpy.random.get_state()
            captured["numpy"] = {
                "name": name,
                "state": torch.tensor(keys.tolist()),
                "position": position,
                "has_gauss": has_gauss,
                "gauss": cached,
            }
        if torch.cuda.is_initialized():
            captured["cuda"] = torch.cuda.get_rng_state_all()
        if data is not None:
            captured["data"] = [generator.get_state() for generator in _generators_of(data)]
            captured["has_workers"] = _has_workers(data)
        return captured

    def restore(self, captured: Mapping[str, Any], data: Any) -> None:
        """Put the generators back; those of the data, too, unless it is None.

        Raises:
            ValueError: the data has other generators than that of which this was captured.
        """
        has_workers = captured.get("has_workers")
        if has_workers and _keeps_workers(data) and not _has_workers(data):
            iter(data)  # starts them, as was done before; what they fetch now is given up by the next
        PythonGenerator(random).load_state_dict(captured["python"])
        torch.set_rng_state(captured["torch"])
        numpy = sys.modules.get("numpy")
        if numpy and (saved := captured.get("numpy")):
            keys = numpy.array(saved["state"].tolist(), dtype=numpy.uint32)
            numpy.random.set_state((saved["name"], keys, saved["position"], saved["has_gauss"], saved["gauss"]))
        if torch.cuda.is_initialized() and (on_devices := captured.get("cuda")):
            torch.cuda.set_rng_state_all(on_devices[: torch.cuda.device_count()])
        if data is not None:
            _restore_data(captured.get("data", []), data)
            if has_workers is False and _keeps_workers(data) and _has_workers(data):
                # It drew this as it started them, and does not start them again.
                torch.empty((), dtype=torch.int64).random_(generator=data.generator)

    def has_own(self, data: Any) -> bool:
        """Say whether the data has generators of its own."""
        return any(True for _ in _generators_of(data))


def _restore_data(states: list[torch.Tensor], data: Any) -> None:
    generators = list(_generators_of(data))
    if len(generators) != len(states):
        raise ValueError(
            f"the data ({type_name(type(data))}) has {len(generators)} generators of its own, and had"
            f" {len(states)} when its position was saved: build it as it was built then"
        )
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def _keeps_workers(data: Any) -> bool:
    return bool(getattr(data, "persistent_workers", False) and getattr(data, "num_workers", 0))


def _has_workers(data: Any) -> bool:
    """Say whether a DataLoader has workers that it keeps from epoch to epoch."""
    return getattr(data, "_iterator", None) is not None  # it has no public name


def _generators_of(data: Any) -> Iterator[torch.Generator]:
    """Yield the generators that a DataLoader's order depends on, each once."""
    seen: set[int] = set()
    for path in (
        ("generator",),
        ("sampler", "generator"),
        ("batch_sampler", "generator"),
        ("batch_sampler", "sampler", "generator"),
    ):
        owner = data
        for name in path:
            owner = getattr(owner, name, None)
        if isinstance(owner, torch.Generator) and id(owner) not in seen:
            seen.add(id(owner))
            yield owner

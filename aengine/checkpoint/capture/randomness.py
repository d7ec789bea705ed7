"""Random states: python's, numpy's and torch's generators, captured and put back.

What is captured is tensors and plain numbers, so that it loads with `weights_only=True`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from aengine.data.generators import capture_process, not_plain, plain, restore_process


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
    """What an engine saves with itself where checkpoints are taken: the generators that all share.

    numpy's legacy generator if numpy is loaded, CUDA's if it is in use. The data's own are saved with the position in
    the data.
    """

    def capture(self) -> dict[str, Any]:
        """Return where the generators stand, as plain values."""
        captured: dict[str, Any] = plain(capture_process())
        return captured

    def restore(self, captured: Mapping[str, Any]) -> None:
        """Put them back."""
        restore_process(not_plain(captured))

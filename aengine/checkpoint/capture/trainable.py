"""What is trained of a model, as a part of the state: an adapter without the base that it adapts."""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from aengine.callables import type_name
from aengine.checkpoint.capture.modules import PlainNames, unwrap

_logger = logging.getLogger("aengine.checkpoint")

_EXTRA_STATE = "_extra_state"
"""The name under which a module's `get_extra_state()` is in its state_dict."""


def trainable(model: torch.nn.Module) -> "Trainable":
    """Have a checkpoint hold what is trained of a model, and not what is frozen.

        model = add_adapter(load_base())  # in each run: the base is not in the checkpoint
        checkpoint = Checkpoint("checkpoints", {"adapter": trainable(model), "optimizer": optimizer})

    Saved are the parameters that require gradients, also those that did at an earlier save; the buffers that are not as
    they were when this was called, such as the running means of a batch norm in training; and what modules return from
    `get_extra_state()`. Names are those of the model's own `state_dict()`, without those of wrappers (torch.compile,
    DistributedDataParallel). Tied weights are saved once, and loaded into all of their places.

    At a restore the buffers that were not saved are put back to what they were, and frozen parameters are left to the
    program, which must have loaded them: a log line says how many. So call this when the base is loaded and frozen.

    Raises:
        TypeError: this is no module.
        ValueError: none of its parameters require gradients.
    """
    return Trainable(model)


class Trainable:
    """What `trainable` returns: a part of the state."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model: Any = unwrap(model)
        if not isinstance(self._model, torch.nn.Module):
            raise TypeError(f"trainable(model) takes a module, got {type_name(type(model))}")
        self._trained: set[str] = set()
        self._note_trained()
        if not self._trained:
            raise ValueError(
                f"no parameter of the model ({type_name(type(self._model))}) requires gradients, so that nothing of it"
                " would be saved: call trainable(model) after the adapter was added, or save the model itself"
            )
        self._buffers = {name: one.detach().clone() for name, one in self._named_buffers()}

    def state_dict(self) -> dict[str, Any]:
        """Return what is trained, by its names in the model. The tensors are live."""
        self._note_trained()
        wanted = self._trained | {name for name, one in self._named_buffers() if self._has_changed(name, one)}
        state = PlainNames(self._model).state_dict()
        return OrderedDict(
            (name, one) for name, one in state.items() if name in wanted or name.rpartition(".")[2] == _EXTRA_STATE
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what is trained, and put back the buffers that were not changed.

        Raises:
            ValueError: it has what the model has not, or lacks what requires gradients here. Nothing is loaded.
            RuntimeError: its shapes are others.
        """
        own = PlainNames(self._model)
        known, saved = own.state_dict(), dict(state_dict)
        if unknown := [name for name in saved if name not in known]:
            raise ValueError(f"the model has no {_listed(unknown)}: build it, with its adapter, as it was built")
        if absent := [name for name in self._named_trained() if name not in saved]:
            raise ValueError(
                f"{_listed(absent)} require gradients here and were not saved: freeze what was frozen then, restore,"
                " and unfreeze it afterwards"
            )
        reset = {name: self._buffers[name] for name, _ in self._named_buffers() if name in self._buffers}
        own.load_state_dict({**reset, **saved}, strict=False)
        parameters = dict(self._named("parameters"))
        self._trained |= saved.keys() & parameters.keys()
        left = [one for name, one in parameters.items() if name not in saved]
        _logger.info(
            "%s: %d parameters and buffers were restored; %d frozen parameters, of %d numbers, are not in the"
            " checkpoint and stay as the program has made them",
            type_name(type(self._model)),
            len(saved),
            len(left),
            sum(one.numel() for one in left),
        )

    def _note_trained(self) -> None:
        self._trained.update(self._named_trained())

    def _named_trained(self) -> list[str]:
        return [name for name, one in self._named("parameters") if one.requires_grad]

    def _named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the buffers that are in the model's state_dict: others are made anew by their modules."""
        saved = PlainNames(self._model).state_dict()
        return ((name, one) for name, one in self._named("buffers") if name in saved)

    def _named(self, what: str) -> Iterator[tuple[str, torch.Tensor]]:
        names = PlainNames(self._model)
        found: Iterator[tuple[str, torch.Tensor]] = getattr(self._model, f"named_{what}")(remove_duplicate=False)
        return ((names.plain(name), one) for name, one in found)

    def _has_changed(self, name: str, buffer: torch.Tensor) -> bool:
        before = self._buffers.get(name)
        return before is None or before.dtype != buffer.dtype or not torch.equal(before.to(buffer.device), buffer)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown  # noqa: PLR2004 -- as many as help

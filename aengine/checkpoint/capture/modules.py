"""Modules that are wrapped, compiled or distributed, at any depth: with the names that they have without that.

A checkpoint of a compiled model fits the plain one, and the other way round, also where the wrapper is within another
module: in an average of weights, or around a part of a model.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

_OWN_PREFIX = "_checkpoint_wrapped_module"
"""What torch's wrapper for activation checkpointing leaves out of the names in its own state_dict."""


def inner_name(module: Any) -> str | None:
    """Return under which name a wrapper has the module that it wraps, None if this is no wrapper."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return "module"
    compiled = sys.modules.get("torch._dynamo.eval_frame")  # where nothing is compiled, it is not loaded for this
    return "_orig_mod" if compiled is not None and isinstance(module, compiled.OptimizedModule) else None


def unwrap(module: Any) -> Any:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile; anything else as it is."""
    while (name := inner_name(module)) is not None:
        module = getattr(module, name)
    return module


class PlainNames:
    """The state of a module in which others are wrapped, by the names that it has without the wrappers."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._wrapped = set(_paths_of_wrapped(module))

    def __bool__(self) -> bool:
        """Whether there are wrappers in it."""
        return bool(self._wrapped)

    def state_dict(self) -> Any:
        """Return the state. The tensors are live."""
        state: Any = self._module.state_dict()
        if not isinstance(state, Mapping):  # of a module that has a state_dict() of its own
            return state
        named: Any = OrderedDict((self.plain(name), value) for name, value in cast(Mapping[str, Any], state).items())
        versions: Mapping[str, Any] = getattr(state, "_metadata", {})
        named._metadata = OrderedDict((self.plain(path), value) for path, value in versions.items())  # noqa: SLF001
        return named

    def load_state_dict(self, state_dict: Any, *, strict: bool = True) -> None:
        """Load what `state_dict` returned, of this module or of one that is wrapped in another way, or not at all.

        Unless it is `strict`, what the module has besides is left as it is.
        """
        own: Any = self._module.state_dict()
        if isinstance(own, Mapping) and isinstance(state_dict, Mapping):
            names = {self.plain(name): name for name in cast(Mapping[str, Any], own)}
            saved = cast(Mapping[str, Any], state_dict)
            state_dict = OrderedDict((names.get(name, name), value) for name, value in saved.items())
            versions, paths = getattr(saved, "_metadata", {}), getattr(own, "_metadata", {})
            state_dict._metadata = OrderedDict(  # noqa: SLF001 -- the versions of the modules, which have no public name
                (path, versions[plain]) for path in paths if (plain := self.plain(path)) in versions
            )
        if strict:
            self._module.load_state_dict(state_dict)  # a module's own may have no such argument
        else:
            self._module.load_state_dict(state_dict, strict=False)

    def plain(self, name: str) -> str:
        """Return a name as it would be if nothing was wrapped."""
        path, kept = "", list[str]()
        for step in _steps(name):
            path = f"{path}.{step}" if path else step
            if path not in self._wrapped:
                kept.append(step)
        return ".".join(kept)


def _paths_of_wrapped(module: torch.nn.Module) -> Iterator[str]:
    """Yield the path of each module that is wrapped, as the names in a state_dict have it."""
    for path, one in module.named_modules(remove_duplicate=False):
        if (name := inner_name(one)) is not None:
            yield ".".join([*_steps(path), name])


def _steps(path: str) -> list[str]:
    return [step for step in path.split(".") if step and step != _OWN_PREFIX]

"""Packages that hand their names on lazily (PEP 562): a module is loaded when the first of its names is asked for."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from aengine.guesses import NAMES, near_word

PACKAGES = (
    "aengine", "aengine.checkpoint", "aengine.handlers", "aengine.loggers", "aengine.plots", "aengine.training",
)  # fmt: skip
"""What users import from, and what is lazy: looking for a name in it loads nothing."""


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and the `__dir__` of a package.

    Args:
        package: its `__name__`.
        modules: of each of its modules the names that are handed on: `{"progress": "ProgressBar Display"}`.
    """
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if f"{package}.{name}" in PACKAGES:
            return import_module(f"{package}.{name}")
        if name not in homes:
            raise _missing(package, name)
        try:
            value = getattr(import_module(f"{package}.{homes[name]}"), name)
        except ImportError as error:  # of an optional library
            if _caller(2) == _IMPORT:
                raise
            # hasattr() and what looks at all members (inspect, pydoc) expect this one.
            raise AttributeError(f"{package}.{name} cannot be loaded: {error}") from error
        setattr(sys.modules[package], name, value)  # it is found without this function from now on
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names


_IMPORT = "_handle_fromlist"
"""The function of importlib that looks for the names of `from package import name`, by `hasattr()`.

Where that says no, it looks for a module of that name, and then the statement raises an ImportError of its own words.
So an error that is to be read must be none that `hasattr()` catches.
"""


def _missing(package: str, name: str) -> Exception:
    """Return the error for a name that a package does not have; it says which one may be meant."""
    message = f"{package} has no {name!r}"
    if name.startswith("_"):  # some code asks every module for it
        return AttributeError(message)
    is_import = _caller(3) == _IMPORT
    if is_import and find_spec(f"{package}.{name}") is not None:
        return AttributeError(message)  # a module of the package: the statement goes on, and loads it
    message += _advice(package, name)
    return ImportError(message, name=package) if is_import else AttributeError(message)


def _caller(depth: int) -> str:
    """Return the name of the function that called, so many calls up: 1 is the one that asks."""
    return sys._getframe(depth).f_code.co_name  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # no other way


def _advice(package: str, name: str) -> str:
    public = {one: import_module(one).__all__ for one in PACKAGES}
    homes = {other: one for one in reversed(PACKAGES) for other in public[one]}
    if name in homes:
        return f": from {homes[name]} import {name}"
    if name in NAMES:
        return f": {NAMES[name]}"
    inside = {one.rpartition(".")[2] for one in PACKAGES if one.startswith(f"{package}.")}
    if near := near_word(name, [*public[package], *inside]):
        return f": {near}?"
    if near := near_word(name, homes):
        return f": from {homes[near]} import {near}?"
    return f"; it has {', '.join(public[package])}"

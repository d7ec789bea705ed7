"""Packages that hand their names on lazily (PEP 562): a module is loaded when the first of its names is asked for."""

import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any

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
        if name not in homes:
            raise _missing(package, name)
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)  # it is found without this function from now on
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names


def _missing(package: str, name: str) -> Exception:
    """Return the error for a name that a package does not have; it says which one may be meant."""
    message = f"{package} has no {name!r}"
    if name.startswith("_"):
        return AttributeError(message)
    asks_for_import = _caller(3) == "_handle_fromlist"
    if asks_for_import and find_spec(f"{package}.{name}") is not None:
        return AttributeError(message)  # a module of the package: the import statement goes on, and loads it
    message += _advice(package, name)
    # `from package import name` catches an AttributeError, and raises an ImportError of its own words in its place.
    return ImportError(message) if asks_for_import else AttributeError(message)


def _caller(depth: int) -> str:
    """Return the name of the function that called, so many calls up: 1 is the one that asks."""
    return sys._getframe(depth).f_code.co_name  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # no other way


def _advice(package: str, name: str) -> str:
    public = {one: import_module(one).__all__ for one in PACKAGES}
    elsewhere = [one for one in PACKAGES if name in public[one]]
    if elsewhere:
        return f": from {elsewhere[0]} import {name}"
    near = get_close_matches(name, public[package], n=1)
    if near:
        return f": {near[0]}?"
    near = get_close_matches(name, [other for names in public.values() for other in names], n=1)
    homes = [one for one in PACKAGES if near and near[0] in public[one]]
    return f": from {homes[0]} import {near[0]}?" if homes else f"; it has {', '.join(public[package])}"

"""The public names of the package, with their parameters and members, as `docs/api.md` writes them.

    python -P tests/support/public_names.py > names.txt

prints them one a line, to be compared between two versions. A name is listed where users import it from, its members
with it. Members are what does not begin with an underscore: methods, properties, attributes that `self` is given.
What the standard library defines (of an Enum, a tuple, an exception) is not ours to list.
"""

import ast
import inspect
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from enum import Enum
from functools import cache
from importlib import import_module
from typing import Any

from aengine import EventEnum, EventsList
from aengine.lazy import PACKAGES

PUBLIC = (*PACKAGES, "aengine.interop.ignite")
"""What users import from. The last is no lazy package: it is there for those who have pytorch-ignite."""


def signature_of(function: Any) -> str:
    """Return the parameters and their defaults, without annotations; a default that no literal is is shown as `...`."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    shown = [
        one.replace(annotation=one.empty, default=one.default if one.default is one.empty else _Shown(one.default))
        for one in signature.parameters.values()
        if one.name != "self" or one.default is not one.empty
    ]
    return str(signature.replace(parameters=shown, return_annotation=signature.empty))


class _Shown:
    """A default, as it is written."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        match self._value:
            case str():
                shown = f'"{self._value}"'
            case EventsList():
                shown = " | ".join(map(str, self._value))
            case EventEnum():
                shown = str(self._value)
            case timedelta():
                shown = f"timedelta(seconds={self._value.total_seconds():g})"
            case None | bool() | int() | float() | ():
                shown = repr(self._value)
            case _:
                shown = "..."
        return shown


@cache
def values_in(package: str) -> Mapping[str, Any]:
    """Return what a package lists in `__all__`, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytorch-ignite's, of torch
        module = import_module(package)
    return {name: getattr(module, name) for name in module.__all__}


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "aengine"


def _public_bases(kind: type) -> list[type]:
    """Return the bases of a class that are public themselves, and listed with their members."""
    public = [value for package in PUBLIC for value in values_in(package).values()]
    return [base for base in kind.__mro__[1:] if _is_ours(base) and any(base is one for one in public)]


@cache
def _attributes_of(kind: type) -> frozenset[str]:
    """Return what a class gives to `self`, or names in its body with a type."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if isinstance(node.value, ast.Name) and node.value.id == "self"
    )


def members_of(kind: type) -> Mapping[str, str]:
    """Return the public members of a class, each with its signature if it has one; without what is listed elsewhere.

    That is what a public base has, and what a record, a dataclass or a named tuple, is made of: its parameters.
    """
    found: dict[str, str] = {}
    for base in filter(_is_ours, kind.__mro__):
        for name, value in vars(base).items():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            takes = inspect.isfunction(function) and not isinstance(value, classmethod)
            found.setdefault(name, signature_of(function) if takes else "")
        for name in (*_attributes_of(base), *inspect.get_annotations(base)):
            found.setdefault(name, "")
    listed = {name for base in _public_bases(kind) for name in members_of(base)}
    listed |= set(getattr(kind, "__dataclass_fields__", ())) | set(getattr(kind, "_fields", ()))
    return {name: found[name] for name in sorted(found) if not name.startswith("_") and name not in listed}


RETURNED = ("RemovableEventHandle", "Stream")
"""Classes that users are given objects of, and make none: what these take is not theirs to know."""


def is_made_by_users(value: Any) -> bool:
    """Say whether parameters are to be shown: of functions and classes; not of errors, Enums and protocols."""
    if not inspect.isclass(value):
        return inspect.isroutine(value)
    is_protocol = getattr(value, "_is_protocol", False)
    return not is_protocol and value.__name__ not in RETURNED and not issubclass(value, BaseException | Enum)


def names_in(package: str) -> Mapping[str, str]:
    """Return what a package lists in `__all__`, each with its signature if it has one."""
    values = values_in(package)
    return {name: signature_of(value) if is_made_by_users(value) else "" for name, value in values.items()}


def lines() -> Iterator[str]:
    """Give the public names, one a line."""
    for package in PUBLIC:
        for name, signature in names_in(package).items():
            yield f"{package}.{name}{signature}"
            value = values_in(package)[name]
            if inspect.isclass(value):
                yield from (f"{package}.{name}.{member}{given}" for member, given in members_of(value).items())


if __name__ == "__main__":
    print(*lines(), sep="\n")  # noqa: T201 -- it is a command, too

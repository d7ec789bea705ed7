"""The public names of the package, with their parameters and members, as `docs/api.md` writes them.

    python -P tests/support/public_names.py > names.txt

prints them one a line, to be compared between two versions. A name is listed where users import it from, its members
with it. Members are what does not begin with an underscore: methods, properties, attributes that `self` is given.
What the standard library defines (of an Enum, a tuple, an exception) is not ours to list.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from datetime import timedelta
from enum import Enum
from functools import cache
from importlib import import_module
from typing import Any

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
                return f'"{self._value}"'
            case Enum():
                return "..."
            case None | bool() | int() | float() | ():
                return repr(self._value)
            case timedelta():
                return f"timedelta(seconds={self._value.total_seconds():g})"
            case _:
                return "..."


def _ours(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if base.__module__.partition(".")[0] == "aengine"]


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
    """Return the public members of a class, each with its signature if it has one; without what it is made of.

    Those are the parameters of a record: a dataclass or a named tuple.
    """
    found: dict[str, str] = {}
    for base in _ours(kind):
        for name, value in vars(base).items():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            takes = inspect.isfunction(function) and not isinstance(value, classmethod)
            found.setdefault(name, signature_of(function) if takes else "")
        for name in (*_attributes_of(base), *inspect.get_annotations(base)):
            found.setdefault(name, "")
    made_of = set(getattr(kind, "__dataclass_fields__", ())) | set(getattr(kind, "_fields", ()))
    return {name: found[name] for name in sorted(found) if not name.startswith("_") and name not in made_of}


def is_made_by_users(value: Any) -> bool:
    """Say whether parameters are to be shown: of functions and classes; not of errors, Enums and protocols."""
    if not inspect.isclass(value):
        return inspect.isroutine(value)
    is_protocol = getattr(value, "_is_protocol", False)
    return not is_protocol and not issubclass(value, BaseException | Enum)


def names_in(package: str) -> Mapping[str, str]:
    """Return what a package lists in `__all__`, each with its signature if it has one."""
    module = import_module(package)
    values = {name: getattr(module, name) for name in module.__all__}
    return {name: signature_of(value) if is_made_by_users(value) else "" for name, value in values.items()}


def lines() -> Iterator[str]:
    """Give the public names, one a line."""
    for package in PUBLIC:
        for name, signature in names_in(package).items():
            yield f"{package}.{name}{signature}"
            value = getattr(import_module(package), name)
            if inspect.isclass(value):
                yield from (f"{package}.{name}.{member}{given}" for member, given in members_of(value).items())


if __name__ == "__main__":
    print(*lines(), sep="\n")

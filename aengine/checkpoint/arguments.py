"""Arguments: what a Checkpoint is given is looked at where it is given, not when the first save comes to it."""

import os
from typing import Any

from aengine.checkpoint.store.retention import Keep
from aengine.engine import Engine


def check_directory(directory: Any) -> None:
    """Raise a TypeError if this is no path."""
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"Checkpoint(directory, state) takes a path first, got {type(directory).__qualname__}")


def check_keep(keep: Any) -> None:
    """Raise a TypeError if this is no rule."""
    if not isinstance(keep, Keep):
        raise TypeError(f"keep= is a Keep, such as Keep(last=3), got {keep!r}")


def check_serializer(serializer: Any) -> None:
    """Raise a TypeError if this has not what a Serializer has, or is a class."""
    has_all = isinstance(getattr(serializer, "name", None), str) and all(
        callable(getattr(serializer, name, None)) for name in ("write", "read")
    )
    if isinstance(serializer, type) or not has_all:
        raise TypeError(
            "serializer= is an object with a name and the methods write(tree, file) and read(file), such as"
            f" TorchFile(), got {serializer!r}"
        )


def check_choice(name: str, value: Any, *choices: str) -> None:
    """Raise a ValueError if this is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}= is one of {', '.join(map(repr, choices))}, got {value!r}")


def check_engine(engine: Any, call: str) -> None:
    """Raise a TypeError if this is no engine."""
    if not isinstance(engine, Engine):
        raise TypeError(f"{call} takes an Engine first, got {type(engine).__qualname__}")

"""The type variables of the engine, its state and its events.

Each has a default (PEP 696), so that a bare `Engine`, and an `Event[float]`, can be written. Type checkers bring the
`typing_extensions` that this takes along; when it runs, nothing is needed of it.
"""

from typing import TYPE_CHECKING, Any, Generic

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    # Covariant, where users only read it: what takes an `Event[float]` may be given an `Event[int]`.
    Batch = TypeVar("Batch", default=Any)
    """What a step is given."""
    Output = TypeVar("Output", default=Any, covariant=True)  # noqa: PLC0105 -- users read these names
    """What a step returns."""
    Snapshot = TypeVar("Snapshot", default=None, covariant=True)  # noqa: PLC0105 -- likewise
    """What travels in an event besides; None where `snapshot=` was not passed."""
    Taken = TypeVar("Taken", default=Any)
    """What `snapshot=` returns; Any for an async function, under mypy."""
else:
    from typing import TypeVar

    Batch, Output, Snapshot, Taken = (TypeVar(name) for name in ("Batch", "Output", "Snapshot", "Taken"))

_DEFAULTS = {Batch: Any, Output: Any, Snapshot: None}


def with_defaults(kind: Any, parameters: Any) -> Any:
    """Return `kind[parameters]`, of which the last may be left out: a `__class_getitem__`.

    Python has such defaults from 3.13 on.
    """
    given = parameters if isinstance(parameters, tuple) else (parameters,)
    left_out = (_DEFAULTS[one] for one in kind.__parameters__[len(given) :] if one in _DEFAULTS)
    return vars(Generic)["__class_getitem__"].__get__(None, kind)((*given, *left_out))

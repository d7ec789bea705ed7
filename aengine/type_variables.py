"""The type variables of the engine, its state and its events.

Each has a default (PEP 696), so that a bare `Engine` or `Event` can be written. Type checkers bring the
`typing_extensions` that this takes along; when it runs, nothing is needed of it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Batch = TypeVar("Batch", default=Any)
    """What a step is given."""
    # Covariant, since nothing that has it is made by users: what takes an `Event[float]` may be given an `Event[int]`.
    Output = TypeVar("Output", default=Any, covariant=True)  # noqa: PLC0105 -- users read these names
    """What a step returns."""
    Snapshot = TypeVar("Snapshot", default=None, covariant=True)  # noqa: PLC0105 -- likewise
    """What `snapshot=` returns; None where there is none."""
    Taken = TypeVar("Taken", default=Any)
    """The same, where `snapshot=` is passed. Any where mypy does not find it, for an async function."""
else:
    from typing import TypeVar

    Batch, Output, Snapshot, Taken = map(TypeVar, ("Batch", "Output", "Snapshot", "Taken"))

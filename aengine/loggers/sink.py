"""Records: what is written of a run, and what must be able to write it."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from aengine.state import StopReason


@dataclass(frozen=True, slots=True)
class Record:
    """The numbers of one instant of a run.

    Attributes:
        step: the iteration, or what `track(step=)` gave in its place.
        epoch: the epoch.
        time: seconds since 1970, of the instant and not of the writing.
        event: the name of the event, such as "ITERATION_COMPLETED".
        engine: the name of the engine.
        values: numbers by name.
    """

    step: int
    epoch: int
    time: float
    event: str
    engine: str
    values: Mapping[str, int | float]


@runtime_checkable
class Sink(Protocol):
    """Where records are written: an object with `write`, or a plain function in its place.

        class Post:
            async def write(self, records):
                await http.post(url, json=[dict(record.values, step=record.step) for record in records])

    `write` gets what has been waiting since its last call, a thousand records at most, oldest first; so one that takes
    long is called less often, and catches up. A plain `def` is called in a thread, an `async def` is awaited on the
    event loop; one call at a time for each engine. When it raises, the same records come again later, perhaps with
    others: what was already written of them is written twice.
    """

    def write(self, records: Sequence[Record], /) -> Awaitable[None] | None:
        """Write these records, in this order."""
        ...


@runtime_checkable
class Closable(Protocol):
    """A sink that also wants to know when a run is over, to make safe what was written and to let go of files.

    It may be written to again afterwards: by the next run, or by another engine that shares it.
    """

    def close(self) -> Awaitable[None] | None:
        """Make safe what was written, and let go."""
        ...


@runtime_checkable
class Witness(Protocol):
    """A sink that also wants to know which runs it is written of, and why each of them ended.

    Both methods only take note: they are plain, and must not wait, for they are called where the loop runs, `begin`
    between two steps and `end` on the event loop. Of each run that begins, the end is told once, after its last records
    were written or given up, and before `close`; what is fired and written after that begins and ends it once more. A
    run that was interrupted has not ended. Several engines may share the sink, so that their runs overlap.
    """

    def begin(self, engine: str, time: float, /) -> None:
        """A run of the engine of this name began, at this time, in seconds since 1970."""
        ...

    def end(self, engine: str, time: float, reason: StopReason, /) -> None:
        """That run ended, at this time, for this reason."""
        ...


Write: TypeAlias = Callable[[Sequence[Record]], Awaitable[None] | None]
"""A sink that is only a function."""


def engine_and_name(record: Record, name: str) -> str:
    """Return the tag "trainer/loss": the engines that share a sink become the groups on its page."""
    return f"{record.engine}/{name}"

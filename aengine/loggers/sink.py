"""Record: what is written of a run; Sink, and what else it may be: what writes it."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from aengine.state import StopReason


@dataclass(frozen=True, slots=True)
class Record:
    """The numbers of a run at one event.

    Attributes:
        step: the iteration, or what `Tracker(step=)` gave in its place.
        epoch: the epoch.
        time: seconds since 1970, of the event and not of the writing.
        event: the name of the event, such as "ITERATION_COMPLETED".
        engine_name: the engine's.
        values: numbers by name.
    """

    step: int
    epoch: int
    time: float
    event: str
    engine_name: str
    values: Mapping[str, int | float]


@runtime_checkable
class Sink(Protocol):
    """Where records are written: an object with `write`, or a plain function in its place.

        class Post:
            async def write(self, records):
                await http.post(url, json=[dict(record.values, step=record.step) for record in records])

    `write` gets what has been waiting since its last call, a thousand records at most, oldest first; so a slow sink is
    called less often, with more records, and catches up. A plain `def` is called in a thread, an `async def` is awaited
    on the event loop; one call at a time for each engine. When it raises, the same records come again later, perhaps
    with others: those that it had written before it raised are written twice.
    """

    def write(self, records: Sequence[Record], /) -> Awaitable[None] | None:
        """Write these records, in this order."""
        ...


@runtime_checkable
class Closable(Protocol):
    """A sink that is also called when a run is over, to make safe what was written and to close its files.

    Likewise where its Tracker is removed during the run. It may be written to again afterwards: by the next run, or by
    another engine that shares it.
    """

    def close(self) -> Awaitable[None] | None:
        """Make safe what was written, and close files until the next write."""
        ...


@runtime_checkable
class Durable(Protocol):
    """A sink that is also called before a checkpoint of the engine is committed, when its records are written.

    It is called in a thread of its own, perhaps while another one writes.
    """

    def sync_to_disk(self) -> object:
        """Have what was written so far survive a crash of the machine, as by fsync."""
        ...


@runtime_checkable
class Rewindable(Protocol):
    """A sink to which is also reported that a run goes on from a `state_dict`: what it wrote of later steps is void.

    It only takes note: this is plain, and must not wait, for it is called on the event loop, before the first event of
    the run. What is to be done about it is done at the next `write`, of whichever engine.
    """

    def run_went_back(self, engine_name: str, standing: Mapping[str, int], /) -> None:
        """A run of the engine of this name went back.

        Args:
            engine_name: whose run it is.
            standing: by the names of events, up to which step the records of that event stand. Those of later steps, if
                there are any, were written by a run that did not get any further, and come again.
        """
        ...


@runtime_checkable
class RunListener(Protocol):
    """A sink to which is also reported when a run begins, and when and why it ends.

    Both methods only take note: they are plain, and must not wait, for they are called on the event loop. Of each run
    that begins, the end is reported once, after its last records were written or abandoned, and before `close`; a
    record that is taken after that begins and ends the run once more. A run that was interrupted has not ended. Where
    the Tracker is removed before the end, that is the end for the sink, by the reason INTERRUPTED. Several engines may
    share the sink, so that their runs overlap.
    """

    def run_started(self, engine_name: str, time: float, /) -> None:
        """A run of the engine of this name began, at this time, in seconds since 1970."""
        ...

    def run_ended(self, engine_name: str, time: float, reason: StopReason, /) -> None:
        """That run ended, at this time, for this reason."""
        ...


Write: TypeAlias = Callable[[Sequence[Record]], Awaitable[None] | None]
"""A sink that is only a function."""


def tag_of(record: Record, name: str) -> str:
    """Return the tag "trainer/loss", so that each engine that shares a sink becomes a group on its page."""
    return f"{record.engine_name}/{name}"

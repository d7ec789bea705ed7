"""Runs: what a sink with runs of its own remembers of the engines' runs that it is written of."""

from collections.abc import Sequence
from typing import Any

from aengine.loggers.sink import Record
from aengine.state import StopReason

BAD = frozenset({StopReason.FAILED, StopReason.CANCELLED})
"""Reasons to call a run one that did not end well."""

_REMEMBERED = 4000


class SharedRun:
    """Which engines' runs go on, while several share one run of a tracking server.

    That one lasts from the first beginning to the last end, and ends as the run did that began first: the trainer's,
    and not that of an evaluator beside it. Once that has failed, no run of another engine makes it good, though it
    begins when all have ended: the trainer's last evaluation, perhaps. For who holds a lock.

    Attributes:
        began: when the first of them began, in seconds since 1970; None if none has.
        ended: when the last of them ended.
        reason: why the first of them ended.
    """

    def __init__(self) -> None:
        self.began: float | None = None
        self.ended: float | None = None
        self.reason = StopReason.COMPLETED
        self._first = ""
        self._going_on = 0

    @property
    def is_over(self) -> bool:
        """Whether no run goes on."""
        return self._going_on == 0

    def begin(self, engine: str, time: float) -> None:
        """A run begins."""
        if self._going_on == 0:
            if engine == self._first or self.reason not in BAD:
                self._first, self.reason = engine, StopReason.COMPLETED
            self.began, self.ended = time, None
        elif self.began is None or time < self.began:  # they are told of in another order, by two threads
            self._first, self.began = engine, time
        self._going_on += 1

    def end(self, engine: str, time: float, reason: StopReason) -> None:
        """A run has ended."""
        self._going_on -= 1
        self.ended = time
        if engine == self._first:
            self.reason = reason


class RecentRecords:
    """The last records that were written, to know them when they come again: after a failure in the middle of them."""

    def __init__(self) -> None:
        self._keys: dict[tuple[Any, ...], None] = {}

    def new_of(self, records: Sequence[Record]) -> list[Record]:
        """Return those that have not been written."""
        return [record for record in records if _key(record) not in self._keys]

    def add(self, record: Record) -> None:
        """Take note of a record that has been written."""
        self._keys[_key(record)] = None
        if len(self._keys) > _REMEMBERED:
            del self._keys[next(iter(self._keys))]


def _key(record: Record) -> tuple[Any, ...]:
    return record.engine, record.event, record.step, record.time, tuple(record.values)

"""Spool: what waits to be written, bounded. When it is full the oldest goes first, iterations before all others."""

import math
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Spool(Generic[T]):
    """Records on their way to one sink. Always `taken == written + dropped + waiting`.

    For who holds a lock.
    """

    def __init__(self, size: int) -> None:
        self.taken = self.written = self.dropped = 0
        self._size = size
        self._passing: deque[tuple[int, T]] = deque()  # of iterations, of which there will be others
        self._lasting: deque[tuple[int, T]] = deque()
        self._in_hand: list[tuple[int, T, bool]] = []

    @property
    def waiting(self) -> int:
        """How many records wait, those in hand included."""
        return len(self) + len(self._in_hand)

    @property
    def is_passing(self) -> bool:
        """Whether all that waits is of iterations."""
        return not self._lasting and all(is_passing for *_, is_passing in self._in_hand)

    @property
    def oldest(self) -> float:
        """The number, from 1 in the order of coming, of the oldest record that waits; infinite if none does."""
        firsts = [some[0][0] for some in (self._in_hand, self._passing, self._lasting) if some]
        return min(firsts, default=math.inf)

    def __len__(self) -> int:
        return len(self._passing) + len(self._lasting)

    def put(self, record: T, *, is_passing: bool) -> None:
        """Accept a record. Over the bound one is dropped, and counted."""
        self.taken = number = self.taken + 1
        (self._passing if is_passing else self._lasting).append((number, record))
        self._keep_to_size()

    def take(self, most: int) -> list[T]:
        """Take the oldest records in hand, until `done` or `put_back`."""
        passing, lasting, in_hand = self._passing, self._lasting, self._in_hand
        while len(in_hand) < most and (passing or lasting):
            is_passing = bool(passing) and (not lasting or passing[0] < lasting[0])
            in_hand.append((*(passing if is_passing else lasting).popleft(), is_passing))
        return [record for _, record, _ in in_hand]

    def done(self) -> None:
        """Those in hand are written."""
        self.written += len(self._in_hand)
        self._in_hand.clear()

    def put_back(self) -> None:
        """Those in hand are to be taken again."""
        for number, record, is_passing in reversed(self._in_hand):
            (self._passing if is_passing else self._lasting).appendleft((number, record))
        self._in_hand.clear()
        self._keep_to_size()

    def _keep_to_size(self) -> None:
        while len(self) > self._size:
            (self._passing or self._lasting).popleft()
            self.dropped += 1

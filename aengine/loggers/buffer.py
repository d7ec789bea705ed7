"""RecordBuffer: the records that wait to be written, bounded. When it is full, the oldest are dropped first."""

import math
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class RecordBuffer(Generic[T]):
    """Records on their way to one sink. Always `taken == written + dropped + waiting`.

    Over the bound the oldest record of an iteration is dropped, for there will be others of its kind; where none waits,
    the oldest of all. Not thread-safe: the caller holds a lock.
    """

    dropped: int
    taken: int
    written: int

    def __init__(self, size: int) -> None:
        self.taken = self.written = self.dropped = 0
        self._size = size
        self._of_iterations: deque[tuple[int, T]] = deque()
        self._of_others: deque[tuple[int, T]] = deque()
        self._in_hand: list[tuple[int, T, bool]] = []  # being written: not dropped, and put back if that fails

    @property
    def waiting(self) -> int:
        """How many records wait, those being written included."""
        return len(self) + len(self._in_hand)

    @property
    def has_only_iterations(self) -> bool:
        """Whether all records that wait are of iterations."""
        return not self._of_others and all(is_iteration for *_, is_iteration in self._in_hand)

    @property
    def oldest(self) -> float:
        """The number, counted from 1 as the records came, of the oldest record that waits; infinite if none does."""
        firsts = [some[0][0] for some in (self._in_hand, self._of_iterations, self._of_others) if some]
        return min(firsts, default=math.inf)

    def __len__(self) -> int:
        return len(self._of_iterations) + len(self._of_others)

    def put(self, record: T, *, is_iteration: bool) -> None:
        """Accept a record. Over the bound one is dropped, and counted."""
        self.taken = number = self.taken + 1
        (self._of_iterations if is_iteration else self._of_others).append((number, record))
        self._keep_to_size()

    def take(self, most: int) -> list[T]:
        """Return the oldest records, at most so many, which are being written until `mark_written` or `put_back`."""
        iterations, others, in_hand = self._of_iterations, self._of_others, self._in_hand
        while len(in_hand) < most and (iterations or others):
            is_iteration = bool(iterations) and (not others or iterations[0] < others[0])
            in_hand.append((*(iterations if is_iteration else others).popleft(), is_iteration))
        return [record for _, record, _ in in_hand]

    def mark_written(self) -> None:
        """What was being written is written."""
        self.written += len(self._in_hand)
        self._in_hand.clear()

    def put_back(self) -> None:
        """What was being written is not written, and waits again, at its place in the order."""
        for number, record, is_iteration in reversed(self._in_hand):
            (self._of_iterations if is_iteration else self._of_others).appendleft((number, record))
        self._in_hand.clear()
        self._keep_to_size()

    def _keep_to_size(self) -> None:
        while len(self) > self._size:
            (self._of_iterations or self._of_others).popleft()
            self.dropped += 1

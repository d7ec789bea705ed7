"""Control: what is asked of a loop from outside: from handlers, other tasks, other threads, signal handlers.

Plain calls that take effect before the next step. They only leave a note; the loop reads it, after every event and
between steps, and so they need no lock: adding to a set is one atomic operation.
"""

from collections import deque
from collections.abc import Callable
from enum import Enum, auto

from aengine.bus.inbox import BackpressureWait


class Request(Enum):
    """What can be asked."""

    TERMINATE = auto()
    TERMINATE_EPOCH = auto()
    INTERRUPT = auto()
    PAUSE = auto()
    RAISE_FAILURE = auto()  # by whoever drives: come back, there is something to throw
    CHANGE_DATA = auto()
    FIRE = auto()  # an event of the user's, between two steps
    MAKE_ROOM = auto()  # somebody who could not wait has filled an inbox: the loop waits in his place


class Phase(Enum):
    """Where the loop is."""

    IDLE = auto()
    BETWEEN_EPOCHS = auto()
    ITERATING = auto()
    ENDING_EPOCH = auto()


class Requests:
    """The notes, and who is to be woken when one is left."""

    def __init__(self) -> None:
        self.pending: set[Request] = set()
        self.phase = Phase.IDLE
        self.skip_completed = False
        self.skip_epoch_completed = False
        self.deferred_backpressure: list[BackpressureWait] = []
        self.to_fire: deque[str] = deque()
        self.at_end: set[Callable[[], object]] = set()
        self.on_change: Callable[[], None] | None = None  # wakes a driver that waits on the loop's behalf

    def request(self, request: Request) -> None:
        """Leave a note. Never waits; from any thread."""
        self.pending.add(request)
        self._changed()

    def cancel(self, request: Request) -> None:
        """Take a note back."""
        self.pending.discard(request)
        self._changed()

    def return_to_driver(self) -> None:
        """Have the loop return to its driver: it has something to throw, or is to be continued by another one."""
        self.request(Request.RAISE_FAILURE)

    def _changed(self) -> None:
        if (wake := self.on_change) is not None:
            wake()

    def terminate(self, *, skip_completed: bool) -> None:
        """Ask for a clean end. Nothing happens where no run is under way."""
        if self.phase is not Phase.IDLE:
            self.skip_completed = skip_completed
            self.request(Request.TERMINATE)

    def terminate_epoch(self, *, skip_epoch_completed: bool) -> None:
        """Ask for the end of the epoch under way. Nothing happens where none is.

        Raises:
            RuntimeError: the epoch has not begun its iterations: called at STARTED or EPOCH_STARTED.
        """
        if self.phase is Phase.BETWEEN_EPOCHS:
            raise RuntimeError(
                "terminate_epoch() ends the iterations of an epoch, and none has begun at STARTED and EPOCH_STARTED:"
                " call it from GET_BATCH_STARTED on, or call terminate() to end the run"
            )
        if self.phase is Phase.ITERATING:
            self.skip_epoch_completed = skip_epoch_completed
            self.request(Request.TERMINATE_EPOCH)

    @property
    def skips_completed(self) -> bool:
        """Whether the run is to end without COMPLETED."""
        return Request.TERMINATE in self.pending and self.skip_completed

    def interrupt(self) -> None:
        """Ask for the run to be left in its middle. Nothing happens where none is under way."""
        if self.phase is not Phase.IDLE:
            self.request(Request.INTERRUPT)

    def fire(self, event: str, at_end: Callable[[], object] | None = None) -> bool:
        """Ask for an event to be fired between two steps. Returns False where no run is under way that would."""
        if at_end is not None:
            self.at_end.add(at_end)
        self.to_fire.append(event)  # before the look at the phase: the loop looks the other way round
        if self.phase is Phase.IDLE:
            try:
                self.to_fire.remove(event)
            except ValueError:  # it has just been fired after all, or the run is over, and who asked is told so
                return True
            return False
        self.request(Request.FIRE)
        return True

    def defer_backpressure(self, rooms: list[BackpressureWait]) -> None:
        """Have the loop wait for room before its next step."""
        if rooms and self.phase is not Phase.IDLE:
            self.deferred_backpressure += rooms
            self.request(Request.MAKE_ROOM)

    def begin(self) -> None:
        """A run begins: requests that were made of the one before are over. A pause is not."""
        self.pending &= {Request.PAUSE, Request.RAISE_FAILURE}
        self.phase = Phase.BETWEEN_EPOCHS
        self.deferred_backpressure.clear()

    def end(self) -> None:
        """A run is over, or left in its middle, however that came: also where not a line of its story was told."""
        self.phase = Phase.IDLE
        self.to_fire.clear()
        while self.at_end:
            self.at_end.pop()()

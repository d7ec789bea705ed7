"""Requests: what the loop is asked for from outside, by handlers, tasks, threads, signal handlers.

They are plain calls, and take effect before the next step. Each only adds to a set, which the loop reads after every
event and between steps. That takes no lock: adding to a set is one atomic operation.
"""

from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from aengine.bus.inbox import BackpressureWait, Inbox
from aengine.loop.agreement import Agreement, Wishes


class Request(Enum):
    """What can be requested."""

    TERMINATE = auto()
    TERMINATE_EPOCH = auto()
    INTERRUPT = auto()
    PAUSE = auto()
    RAISE_FAILURE = auto()  # of something beside the loop: yield the effect of this name, and the driver raises it here
    CHANGE_DATA = auto()
    FIRE = auto()  # an event of the user's, between two steps
    MAKE_ROOM = auto()  # an event that could not wait was put into a full inbox: wait for room in its place


_AGREED = frozenset({Request.TERMINATE, Request.TERMINATE_EPOCH, Request.INTERRUPT, Request.PAUSE, Request.FIRE})
"""What is a wish, where there is an agreement, until that is found."""


class Firing:
    """An event that is to be fired between two steps. Equal to nothing but itself: a payload may be a tensor."""

    __slots__ = ("event", "payload")

    def __init__(self, event: str, payload: Any) -> None:
        self.event: str = event
        self.payload: Any = payload


class Phase(Enum):
    """Where the loop is."""

    IDLE = auto()  # no run is under way, or it accepts no more requests
    BETWEEN_EPOCHS = auto()
    ITERATING = auto()
    ENDING_EPOCH = auto()


class Requests:
    """The requests of one engine that are pending. The loop reads `pending` between steps, and takes what it serves.

    Attributes:
        pending: what is to be served.
        wished: what was requested and is not agreed yet, where there is an `agreement`.
    """

    def __init__(self) -> None:
        self.pending: set[Request] = set()
        self.wished: set[Request] = set()
        self.agreement: Agreement | None = None
        self._calls = 0  # of what is to be fired: so much is agreed
        self.phase: Phase = Phase.IDLE
        self.skip_completed: bool = False
        self.skip_epoch_completed: bool = False
        self.deferred_backpressure: dict[Inbox, BackpressureWait] = {}  # the last one says it for those before
        self.to_fire: deque[Firing] = deque()
        self._wake: Callable[[], object] | None = None

    def wake_by(self, wake: Callable[[], object] | None) -> None:
        """Set what to call when a request is made or cancelled, from any thread: for a driver that may be waiting."""
        self._wake = wake

    def request(self, request: Request) -> None:
        """Make a request, and wake the driver. Never waits; from any thread."""
        (self.pending if self.agreement is None or request not in _AGREED else self.wished).add(request)
        self._changed()

    def is_requested(self, request: Request) -> bool:
        """Say whether this was requested and is yet to take effect, agreed or not."""
        return request in self.pending or request in self.wished

    def cancel(self, request: Request) -> None:
        """Cancel a request that was not served yet. From any thread."""
        self.pending.discard(request)
        self.wished.discard(request)
        self._changed()

    def return_to_driver(self) -> None:
        """Have the loop return to its driver: it has something to throw, or is to be continued by another one."""
        self.request(Request.RAISE_FAILURE)

    def take(self, request: Request) -> bool:
        """For the loop: return whether this is requested, and take it out of the pending ones, to be served."""
        is_pending = request in self.pending
        self.pending.discard(request)
        return is_pending

    def put_off(self, requests: set[Request]) -> None:
        """For the loop: it has taken these, and is to find them again after its next step."""
        self.pending |= requests

    def _changed(self) -> None:
        if (wake := self._wake) is not None:  # read once: the driver's thread may set it to None
            wake()

    # Agreeing

    def wishes(self, iteration: int, *, has_batch: bool) -> Wishes:
        """Return what is wished here, before the step of an iteration."""
        if self.to_fire:
            self.wished.add(Request.FIRE)
        wished = frozenset(self.wished)
        return Wishes(
            iteration,
            has_batch=has_batch,
            terminate=Request.TERMINATE in wished,
            skip_completed=self.skip_completed,
            terminate_epoch=Request.TERMINATE_EPOCH in wished,
            skip_epoch_completed=self.skip_epoch_completed,
            interrupt=Request.INTERRUPT in wished,
            pause=Request.PAUSE in wished,
            calls=len(self.to_fire),
        )

    def agree(self, agreed: Wishes) -> None:
        """Have what is agreed be pending."""
        self._calls = agreed.calls
        if agreed.terminate:
            self.skip_completed = agreed.skip_completed
        if agreed.terminate_epoch:
            self.skip_epoch_completed = agreed.skip_epoch_completed
        requests = {
            Request.TERMINATE: agreed.terminate,
            Request.TERMINATE_EPOCH: agreed.terminate_epoch,
            Request.INTERRUPT: agreed.interrupt,
            Request.PAUSE: agreed.pause,
            Request.FIRE: agreed.calls > 0,
        }
        for request, is_agreed in requests.items():
            if is_agreed:
                self.wished.discard(request)
                self.pending.add(request)

    @property
    def calls(self) -> int:
        """How many of the events that are to be fired may be fired now."""
        return len(self.to_fire) if self.agreement is None or self.phase is Phase.IDLE else self._calls

    # Ending. Each returns whether a run is under way that will serve the request. Without one the request stays
    # pending, to be seen, until the next run begins, which drops it.

    def terminate(self, *, skip_completed: bool) -> bool:
        """Request a clean end."""
        self.skip_completed = skip_completed
        return self._end_by(Request.TERMINATE)

    def terminate_epoch(self, *, skip_epoch_completed: bool) -> bool:
        """Request the end of the epoch under way. Does nothing where a run is between two epochs or is ending.

        Raises:
            RuntimeError: the epoch has not begun its iterations: called at STARTED or EPOCH_STARTED.
        """
        if self.phase is Phase.BETWEEN_EPOCHS:
            raise RuntimeError(
                "terminate_epoch() ends the iterations of an epoch, and none has begun at STARTED and EPOCH_STARTED:"
                " call it from GET_BATCH_STARTED on, or call terminate() to end the run"
            )
        if self.phase is Phase.ENDING_EPOCH:
            return False
        self.skip_epoch_completed = skip_epoch_completed
        return self._end_by(Request.TERMINATE_EPOCH)

    def interrupt(self) -> bool:
        """Request that the run is suspended in its middle."""
        return self._end_by(Request.INTERRUPT)

    def _end_by(self, request: Request) -> bool:
        if self.phase is Phase.IDLE:
            self.pending.add(request)
            return False
        self.request(request)
        return True

    def fire(self, event: str, payload: Any) -> bool:
        """Request that an event is fired between two steps. Returns False where no run is under way that would."""
        firing = Firing(event, payload)
        # Append, then read the phase. The loop does it in the opposite order, so at least one side sees the event.
        self.to_fire.append(firing)
        if self.phase is Phase.IDLE:
            try:
                self.to_fire.remove(firing)
            except ValueError:  # the loop has just fired it after all; or the run is over, which has taken it
                return True
            return False
        self.request(Request.FIRE)
        return True

    def defer_backpressure(self, waits: list[BackpressureWait]) -> None:
        """Have the loop wait for room in these inboxes before its next step."""
        if self.phase is not Phase.IDLE:
            self.deferred_backpressure |= {wait.inbox: wait for wait in waits}
            self.request(Request.MAKE_ROOM)

    def enter(self, phase: Phase) -> None:
        """For the loop: it is in another phase."""
        self.phase = phase

    def begin(self) -> None:
        """A run begins: requests that were made of an earlier one are void. A pause is not."""
        self.pending &= {Request.PAUSE, Request.RAISE_FAILURE}
        self.wished &= {Request.PAUSE}
        if self.agreement is not None:
            self.wished |= self.pending & _AGREED
            self.pending -= _AGREED
        self._calls = 0
        self.phase = Phase.BETWEEN_EPOCHS
        self.deferred_backpressure.clear()

    def go_on(self) -> None:
        """A run that was suspended goes on: it may be asked to end before the loop takes its first step.

        What was requested while it was suspended is void, but for a pause and other data.
        """
        self.pending -= {Request.TERMINATE, Request.TERMINATE_EPOCH, Request.INTERRUPT}
        self.wished -= {Request.TERMINATE, Request.TERMINATE_EPOCH, Request.INTERRUPT}
        self.phase = Phase.ITERATING

    def end(self) -> list[str]:
        """A run is over or suspended, however that came: also where the loop has not run at all.

        Returns the events that it was requested to fire, and did not.
        """
        self.phase = Phase.IDLE
        left = [firing.event for firing in self.to_fire]
        self.to_fire.clear()
        return left

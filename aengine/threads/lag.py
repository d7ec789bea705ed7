"""LagTimer: a timer on the event loop, which says how late it is served, and by which asyncio wakes."""

from time import perf_counter
from typing import Self, cast

from anyio.lowlevel import RunVar

from aengine.threads.event_loop import EventLoopHandle


class LagTimer:
    """A timer of an event loop, four times a second as long as runs are under way on it. How late it is is the lag.

    On asyncio it is needed for signals, too. A signal handler that calls `loop.call_soon(task.cancel)`, as the stop
    button of a notebook does, does not wake the event loop: Python resumes `select()` after it, and with a plain step
    nothing else may wake it before the end of the run.

    One for each event loop, shared by its engines. A run that ends before the timer is due costs two additions. All of
    it is called on the event loop's thread, but `seconds`.

    Attributes:
        runs: how many are under way on the event loop.
    """

    PERIOD = 0.25
    """Seconds from one look to the next."""

    @classmethod
    def here(cls, loop_handle: EventLoopHandle) -> Self:
        """Return that of the event loop that runs here."""
        try:
            return cast(Self, _lag_timer.get())
        except LookupError:
            timer = cls(loop_handle)
            _lag_timer.set(timer)
            return timer

    def __init__(self, loop_handle: EventLoopHandle) -> None:
        self._call_later = loop_handle.call_later
        self.runs: int = 0
        self._due: float | None = None  # when the next look is to be; None while there is to be none
        self._last = 0.0

    def begin(self) -> None:
        """A run begins."""
        self.runs += 1
        if self._due is None:
            self._look_soon()

    def end(self) -> None:
        """A run is over."""
        self.runs -= 1

    @property
    def seconds(self) -> float:
        """How late the last timer was served, or, where that is more, how late the next one is by now. Any thread."""
        due = self._due  # read once: the event loop's thread may set it to None
        return max(self._last, 0.0 if due is None else perf_counter() - due)

    def _look_soon(self) -> None:
        self._due = perf_counter() + self.PERIOD
        self._call_later(self.PERIOD, self._look)

    def _look(self) -> None:
        if self._due is not None:
            self._last = max(0.0, perf_counter() - self._due)
        if self.runs:
            self._look_soon()
        else:  # an idle event loop is not to be woken
            self._due = None


_lag_timer: RunVar[LagTimer] = RunVar("aengine_lag_timer")

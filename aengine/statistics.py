"""Where the time of a run went: the stopwatch that the loop reads, and the frozen records that users get."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

PERIOD = 2e-3
"""Seconds between two timed iterations, if iterations are shorter: timing one costs 1 µs, and 5 µs if the step has
filled the processor's caches."""

_LONGEST_PERIOD = 0.1
"""The same, where many runs take turns on one event loop: `PERIOD` for each of them, but no more than this."""

SAMPLE = 61
"""Of the shortest iterations one in so many is timed. A prime, so that it falls in with no habit of the user's."""


@dataclass(frozen=True, slots=True)
class ListenerStatistics:
    """What became of the events that one subscriber or stream was sent.

    All that was accepted is accounted for:
    `accepted == handled + dropped + discarded + depth (+ 1 while one is being handled)`

    Attributes:
        name: the one given as `name=`, or else the handler's qualified name.
        events: what it listens to, as its user would write it.
        depth: events that wait in its inbox now.
        accepted: events it was sent, since it was made.
        handled: events its handler has finished with, or its reader has taken.
        dropped: events that its overflow policy gave up.
        discarded: events that were left when it ended: after a failure, a time-out, or because its reader left.
        errors: exceptions that its handler raised.
        busy: seconds its handler was at work.
    """

    name: str
    events: str
    depth: int
    accepted: int
    handled: int
    dropped: int
    discarded: int
    errors: int
    busy: float


@dataclass(frozen=True, slots=True)
class ListenerInfo:
    """What listens to an engine.

    Attributes:
        name: the handler's qualified name, or the one given as `name=`.
        event: what it listens to, filter included, as its user would write it: "ITERATION_COMPLETED(every=100)".
        kind: "inline", "subscriber" or "stream".
    """

    name: str
    event: str
    kind: Literal["inline", "subscriber", "stream"]


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    """What one background service has been doing.

    Attributes:
        name: the service's class, or the name given as `name=`.
        is_running: whether it takes part in a run that is under way.
        errors: exceptions that its methods raised.
    """

    name: str
    is_running: bool
    errors: int


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Where the time went since the run began; of a run that has ended, the whole of it.

    The times are those the loop itself spent, so they add up to `total`, but for what the loop costs and the
    error of sampling: of iterations shorter than 2 ms one is timed about every 2 ms, and stands for the others.

    Attributes:
        name: the engine's name.
        is_running: whether a run is under way.
        epoch: epochs begun.
        iteration: iterations begun.
        total: seconds since the run began.
        data: seconds the loop waited for batches.
        step: seconds in the step.
        handlers: seconds in each inline handler of the loop's events, by the handler's qualified name.
        fired_handlers: seconds in each inline handler of events of one's own. They are part of the time of what
            fires the event: the step, another handler, or a task beside the loop.
        back_pressure: seconds the loop waited for room in the inboxes of slow subscribers.
        event_loop: seconds the loop had given way to other tasks, or was paused.
        lag: the longest time, in seconds, that the loop waited for its turn on the event loop when it needed no more
            than a turn: how late everything else on it was served.
        listeners: the subscribers and the streams that are open.
        services: the background services.
        event_loop_lag: how late, in seconds, the event loop served a timer when it was last looked at, four times a
            second while a run is under way; or how late it is now, where that is more. So it shows what blocks the
            event loop, also where the step is on the worker. 0 without an event loop.
    """

    name: str
    is_running: bool
    epoch: int
    iteration: int
    total: float
    data: float
    step: float
    handlers: Mapping[str, float]
    fired_handlers: Mapping[str, float]
    back_pressure: float
    event_loop: float
    lag: float
    listeners: tuple[ListenerStatistics, ...]
    services: tuple[ServiceStatistics, ...] = ()
    event_loop_lag: float = 0.0


class Stopwatch:
    """Times what the loop does.

    While iterations are long each is timed; when they are short one in several, which then counts for those before it:
    `weight` is how many iterations the present one stands for, 0 if it is not timed.
    """

    __slots__ = (
        "_read_at", "_read_iteration", "back_pressure", "began", "data", "ended", "event_loop", "event_loop_lag", "lag",
        "next_reading", "runs", "step", "weight",
    )  # fmt: skip

    back_pressure: float
    data: float
    event_loop: float
    lag: float
    step: float

    def __init__(self) -> None:
        self.data = self.step = self.back_pressure = self.event_loop = self.lag = 0.0
        self.event_loop_lag: Callable[[], float] = float  # 0.0: there is no event loop
        self.began: float = perf_counter()
        self.ended: float | None = None
        self.weight: int = 1
        self.runs: int = 1  # that take turns with this one
        self.next_reading: int = 0
        self._read_at = self.began
        self._read_iteration = -1

    def read(self, iteration: int) -> None:
        """Begin a timed iteration: set its weight, and say when to read next."""
        now = perf_counter()
        last = self._read_iteration
        passed = iteration - last if 0 <= last < iteration else 0
        self.weight = passed or 1
        # A turn of many runs takes long, and a step of each is short in it.
        period = PERIOD if self.runs == 1 else min(PERIOD * self.runs, _LONGEST_PERIOD)
        if (spent := now - self._read_at) >= period * passed:  # long ones, or the first, of which nothing is known yet
            self.next_reading = iteration + 1
        else:
            self.next_reading = iteration + min(SAMPLE, int(period * passed / max(spent, 1e-9)) + 1)
        self._read_at = now
        self._read_iteration = iteration

    def stop(self) -> None:
        """The run is over."""
        self.ended = perf_counter()

    @property
    def total(self) -> float:
        """Seconds from the beginning of the run to now, or to its end."""
        return (self.ended or perf_counter()) - self.began

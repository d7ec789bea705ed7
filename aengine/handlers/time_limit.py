"""Time limits: a run ends cleanly when its time is up, before something else ends it."""

import math
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import Any

from aengine.engine import Engine
from aengine.events import Events


class TimeLimit:
    """Terminates a run after some time, before its next step.

        TimeLimit(timedelta(hours=8)).attach(trainer)

    The time is that of one `run()`, from STARTED on: one that is resumed has as much again.

    Args:
        limit: seconds, or a timedelta.

    Raises:
        ValueError, TypeError: this is no time, or none is left.
    """

    def __init__(self, limit: float | timedelta) -> None:
        self._seconds = _seconds(limit)
        self._clock = _Clock()

    def attach(self, engine: Engine[Any, Any]) -> None:
        """Limit the runs of an engine."""
        engine.add_event_handler(Events.STARTED, self._begin)
        self._clock.attach(engine)

    def _begin(self) -> None:
        self._clock.end = perf_counter() + self._seconds


class Deadline:
    """Terminates a run at a moment, before its next step: ten minutes before a job is killed, say.

        Deadline(datetime.fromtimestamp(float(os.environ["SLURM_JOB_END_TIME"]), UTC) - timedelta(minutes=10))

    How long it is until then is read off the wall clock when a run starts, and measured by one that does not jump.

    Args:
        moment: a datetime that has a time zone.

    Raises:
        ValueError, TypeError: this is no such datetime.
    """

    def __init__(self, moment: datetime) -> None:
        self._moment = _aware(moment)
        self._clock = _Clock()

    def attach(self, engine: Engine[Any, Any]) -> None:
        """Limit the runs of an engine. One that starts after the moment ends before its first step."""
        engine.add_event_handler(Events.STARTED, self._begin)
        self._clock.attach(engine)

    def _begin(self, engine: Engine[Any, Any]) -> None:
        self._clock.end = perf_counter() + (self._moment - datetime.now(UTC)).total_seconds()
        self._clock.look(engine)


class _Clock:
    def __init__(self) -> None:
        self.end = math.inf

    def attach(self, engine: Engine[Any, Any]) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.look)

    def look(self, engine: Engine[Any, Any]) -> None:
        if perf_counter() >= self.end:
            engine.logger.info("engine %r is terminated: its time is up", engine.name)
            engine.terminate()


def _seconds(limit: Any) -> float:
    seconds: Any = limit.total_seconds() if isinstance(limit, timedelta) else limit
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"a TimeLimit is in seconds, or a timedelta; got {limit!r}")
    if not seconds > 0:
        raise ValueError(f"a TimeLimit is more than 0 seconds, got {limit!r}")
    return seconds


def _aware(moment: Any) -> datetime:
    if not isinstance(moment, datetime):
        raise TypeError(f"a Deadline is a datetime, got {moment!r}; TimeLimit takes seconds")
    if moment.utcoffset() is None:
        raise ValueError(
            f"a Deadline has a time zone, and {moment!r} has none: write  moment.astimezone()  if it is local time"
        )
    return moment

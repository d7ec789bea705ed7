"""Time limits: a run ends cleanly when its time is up, before it is killed from outside."""

import math
from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import Any

from aengine.arguments import check_seconds
from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.engine import Engine
from aengine.events import Events
from aengine.keywords import explain_wrong_call


@explain_wrong_call
class TimeLimit:
    """Terminates a run after some time, before its next step.

        TimeLimit(timedelta(hours=8)).attach(trainer)

    The limit is for one `run()`, counted from STARTED: a run that is resumed has as much time again. A run
    that is under way when this is attached is not limited.

    Args:
        limit: seconds, or a timedelta.

    Raises:
        ValueError, TypeError: it is no time, or not more than 0.
    """

    def __init__(self, limit: float | timedelta) -> None:
        seconds = check_seconds(limit, "a TimeLimit", 3600.0, positive=True)
        self._attachment = Attachment(self)
        self._clock = _Clock(lambda: seconds)

    def attach(self, engine: Engine[Any, Any]) -> RemovableEventHandle:
        """Limit the runs of an engine.

        Raises:
            TypeError: this is no engine.
            RuntimeError: this is attached already.
        """
        return self._attachment.begin(engine, self._clock.listen(engine))


@explain_wrong_call
class Deadline:
    """Terminates a run at a given moment, before its next step: ten minutes before a job is killed, say.

        Deadline(datetime.fromtimestamp(float(os.environ["SLURM_JOB_END_TIME"]), UTC) - timedelta(minutes=10))

    The wall clock is read once, when a run starts; the time until then is measured by a clock that does not jump.

    Args:
        moment: a datetime that has a time zone.

    Raises:
        ValueError, TypeError: it is no such datetime.
    """

    def __init__(self, moment: datetime) -> None:
        if not isinstance(moment, datetime):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a Deadline is a datetime, got {moment!r}; TimeLimit takes seconds")
        if moment.utcoffset() is None:
            raise ValueError(
                f"a Deadline has a time zone, and {moment!r} has none: write  moment.astimezone()  if it is local time"
            )
        self._moment = moment
        self._attachment = Attachment(self)
        self._clock = _Clock(self._seconds_left)

    def attach(self, engine: Engine[Any, Any]) -> RemovableEventHandle:
        """Limit the runs of an engine. One that starts after the moment ends before its first step.

        Raises:
            TypeError: this is no engine.
            RuntimeError: this is attached already.
        """
        return self._attachment.begin(engine, self._clock.listen(engine))

    def _seconds_left(self) -> float:
        return (self._moment - datetime.now(UTC)).total_seconds()


class _Clock:
    """Terminates a run when its time is up: `seconds_left()` is called as it starts."""

    def __init__(self, seconds_left: Callable[[], float]) -> None:
        self._seconds_left = seconds_left
        self._end = math.inf

    def listen(self, engine: Engine[Any, Any]) -> Generator[RemovableEventHandle]:
        self._end = math.inf  # of another run, if this was attached before
        yield engine.add_event_handler(Events.STARTED, self._begin)
        yield engine.add_event_handler(Events.ITERATION_COMPLETED, self._check)

    def _begin(self, engine: Engine[Any, Any]) -> None:
        seconds = self._seconds_left()
        self._end = perf_counter() + seconds
        if seconds <= 0:  # of a deadline: before the first step
            self._check(engine)

    def _check(self, engine: Engine[Any, Any]) -> None:
        if perf_counter() >= self._end:
            engine.logger.info("engine %r is terminated: its time is up", engine.name)
            engine.terminate()

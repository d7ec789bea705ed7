"""Timer: how long chosen stretches of a run take, in all or on average, by a clock that stops when the run does.

`engine.statistics()` has the totals of a run, and `state.times` those of the last epoch: this is for what they lack.
"""

from time import perf_counter
from typing import Any, Self

from aengine.engine import Engine
from aengine.events import AnyEvent, Events

_ENDS = Events.TERMINATE | Events.COMPLETED | Events.CANCELLED | Events.EXCEPTION_RAISED


class Timer:
    """Measures what passes between events, or in the blocks of a `with`.

        timer = Timer(average=True)
        timer.attach(
            trainer,
            resume=Events.ITERATION_STARTED,
            pause=Events.ITERATION_COMPLETED,
            step=Events.ITERATION_COMPLETED,
        )
        await trainer.run(loader)
        timer.value()  # seconds per step, the handlers before it included

    The names are pytorch-ignite's. It stands still until it is started, and can be read at any time, from any thread.

    Args:
        average: `value()` is the time of one step, not of all.

    Attributes:
        step_count: how often `step()` was called.
    """

    def __init__(self, *, average: bool = False) -> None:
        self._average = average
        self.step_count = 0
        self._measured: tuple[float, float | None] = 0.0, None  # seconds, and since when more; as one, for readers
        self._left_at: float | None = None  # when the run was interrupted in the midst of a stretch
        self._run_began = 0.0
        self._engine: Engine[Any, Any] | None = None

    def attach(
        self,
        engine: Engine[Any, Any],
        start: AnyEvent = Events.STARTED,
        pause: AnyEvent = Events.COMPLETED,
        resume: AnyEvent | None = None,
        step: AnyEvent | None = None,
    ) -> Self:
        """Have it started, paused and stepped by events of an engine.

        It stops with the run, however that ends. The time between an interrupted run and its continuation does not
        count. Handlers run in order of registration: attach it before those that it is to leave out of a stretch that
        ends with their event.

        Args:
            engine: whose events these are.
            start: sets it to zero; and starts it, if there is no `resume`.
            pause: stops it.
            resume: starts it, or has it go on. In pytorch-ignite the first stretch begins with `start` all the same.
            step: counts, for the average.

        Raises:
            ValueError: an event is not registered.
            RuntimeError: it has been attached before.
        """
        if self._engine is not None:
            raise RuntimeError("this Timer is attached already: make another one for each stretch that is measured")
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(start, self.reset)
        for event, act in ((start if resume is None else resume, self.resume), (pause, self.pause), (step, self.step)):
            if event is not None:
                engine.add_event_handler(event, act)
        engine.add_event_handler(_ENDS, lambda *_: self.pause())
        engine.add_event_handler(Events.INTERRUPT, self._leave)
        self._engine = engine
        return self

    def reset(self) -> None:
        """Stop it, and set it to zero."""
        self.step_count = 0
        self._left_at = None
        self._measured = 0.0, None

    def resume(self) -> None:
        """Start it, or have it go on. Where it runs already this does nothing."""
        seconds, since = self._now()
        self._measured = seconds, perf_counter() if since is None else since

    def pause(self) -> None:
        """Stop it. Where it stands already this does nothing."""
        seconds, since = self._now()
        self._measured = (seconds if since is None else seconds + perf_counter() - since), None

    def step(self) -> None:
        """Count, for the average."""
        self.step_count += 1

    @property
    def total(self) -> float:
        """Seconds in all, those of the stretch under way included."""
        seconds, since = self._measured_now()
        return seconds if since is None else seconds + self._clock() - since

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self._measured_now()[1] is not None

    def value(self) -> float:
        """Return the seconds in all; or, with `average`, those of one step, of all before the first is done."""
        return self.total / max(1, self.step_count) if self._average else self.total

    def __enter__(self) -> Self:
        self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()
        self.step()

    def _begin(self, engine: Engine[Any, Any]) -> None:
        self._run_began = perf_counter() - engine.statistics().total

    def _leave(self) -> None:
        """The run is interrupted, and no event tells when it is gone on with."""
        if self.running:
            self.pause()
            self._left_at = perf_counter()

    def _now(self) -> tuple[float, float | None]:
        self._measured, self._left_at = self._measured_now(), None
        return self._measured

    def _measured_now(self) -> tuple[float, float | None]:
        left_at, engine = self._left_at, self._engine
        if left_at is not None and engine is not None and engine.is_running:
            went_on_at = perf_counter() - engine.statistics().total
            if went_on_at > left_at:  # else the run that is left is not over yet
                return self._measured[0], went_on_at
        return self._measured

    def _clock(self) -> float:
        engine = self._engine
        if engine is None or engine.is_running:
            return perf_counter()
        return self._run_began + engine.statistics().total  # of a run that ended without an event: of no batch at all

"""Timer: how long chosen parts of a run take, in total or on average, by a clock that stops when the run does.

`engine.statistics()` has the totals of a run, and `state.times` those of the last epoch: this is for any other part.
"""

from collections.abc import Callable, Generator
from time import perf_counter
from typing import Any, Self
from weakref import ref

from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.engine import Engine
from aengine.events import EventLike, Events
from aengine.keywords import explain_wrong_call

_ENDS = Events.TERMINATE | Events.COMPLETED | Events.CANCELLED | Events.EXCEPTION_RAISED


@explain_wrong_call
class Timer:
    """Measures the time between events, or in the blocks of a `with`.

        timer = Timer(average=True)
        timer.attach(
            trainer,
            resume=Events.ITERATION_STARTED,
            pause=Events.ITERATION_COMPLETED,
            step=Events.ITERATION_COMPLETED,
        )
        await trainer.run(loader)
        timer.value()  # seconds per step, the handlers before it included

    The names are pytorch-ignite's. It does not run until it is started, and may be read at any time, on any thread.

    Args:
        average: `value()` is the time of one step, not of all.

    Attributes:
        step_count: how often `step()` was called.
    """

    def __init__(self, *, average: bool = False) -> None:
        self._average = average
        self.step_count = 0
        # Seconds so far, and since when it runs. One tuple: another thread must not read one half new and one half old.
        self._measured: tuple[float, float | None] = 0.0, None
        self._interrupted_at: float | None = None  # set if it ran when the run was interrupted
        self._run_began = 0.0
        # Weakly: the engine refers to this, and is to be freed by reference count.
        self._engine: Callable[[], Engine[Any, Any] | None] = lambda: None
        self._attachment = Attachment(self)

    def attach(
        self,
        engine: Engine[Any, Any],
        start: EventLike = Events.STARTED,
        pause: EventLike = Events.COMPLETED,
        resume: EventLike | None = None,
        step: EventLike | None = None,
    ) -> RemovableEventHandle:
        """Start, pause and step it at events of an engine.

        It stops when the run ends, in whatever way. The time between an interrupted run and its continuation does not
        count. Handlers run in order of registration: attach it before a handler of the event at which it pauses, and
        that handler's time does not count.

        Args:
            engine: the engine that fires these events.
            start: sets it to zero; and starts it, if there is no `resume`.
            pause: stops it.
            resume: starts it, or continues. In pytorch-ignite the first measurement begins with `start` all the same.
            step: counts, for the average.

        What is returned removes it again: it stops, and what it has measured stays.

        Raises:
            TypeError: these are no engine and events.
            ValueError: an event is not registered.
            RuntimeError: it is attached already.
        """
        return self._attachment.begin(engine, self._listen(engine, start, pause, resume, step))

    def _listen(
        self,
        engine: Engine[Any, Any],
        start: EventLike,
        pause: EventLike,
        resume: EventLike | None,
        step: EventLike | None,
    ) -> Generator[RemovableEventHandle]:
        for event in (start, pause, resume, step):
            if event is not None:
                engine.on(event)  # raises for what is no event of this engine, before anything is added
        self._engine = ref(engine)
        yield RemovableEventHandle(self._leave)
        yield engine.add_event_handler(Events.STARTED, self._begin)
        yield engine.add_event_handler(start, self.reset)
        yield engine.add_event_handler(start if resume is None else resume, self.resume)
        yield engine.add_event_handler(pause, self.pause)
        if step is not None:
            yield engine.add_event_handler(step, self.step)
        yield engine.add_event_handler(_ENDS, self.pause)
        yield engine.add_event_handler(Events.INTERRUPT, self._interrupt)

    def reset(self) -> None:
        """Stop it, and set it to zero."""
        self.step_count = 0
        self._interrupted_at = None
        self._measured = 0.0, None

    def resume(self) -> None:
        """Start it, or continue. Does nothing if it runs already."""
        seconds, since = self._update()
        self._measured = seconds, perf_counter() if since is None else since

    def pause(self) -> None:
        """Stop it. Does nothing if it does not run."""
        seconds, since = self._update()
        self._measured = (seconds if since is None else seconds + perf_counter() - since), None

    def step(self) -> None:
        """Count, for the average."""
        self.step_count += 1

    @property
    def total(self) -> float:
        """Seconds in total, up to now if it runs."""
        seconds, since = self._read()
        return seconds if since is None else seconds + self._clock() - since

    @property
    def is_running(self) -> bool:
        """Whether it runs."""
        return self._read()[1] is not None

    def value(self) -> float:
        """Return the seconds in total; or, with `average`, for each step, counting at least one."""
        return self.total / max(1, self.step_count) if self._average else self.total

    def __enter__(self) -> Self:
        self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()
        self.step()

    def _begin(self, engine: Engine[Any, Any]) -> None:
        self._run_began = perf_counter() - engine.statistics().total

    def _interrupt(self) -> None:
        if self.is_running:
            self.pause()
            self._interrupted_at = perf_counter()

    def _leave(self) -> None:
        """It is attached no more: nothing would stop it."""
        self._measured, self._interrupted_at, self._engine = (self.total, None), None, lambda: None

    def _update(self) -> tuple[float, float | None]:
        self._measured, self._interrupted_at = self._read(), None
        return self._measured

    def _read(self) -> tuple[float, float | None]:
        # No event is fired when an interrupted run continues: the statistics show that it has, and since when.
        interrupted_at, engine = self._interrupted_at, self._engine()
        if interrupted_at is not None and engine is not None and engine.is_running:
            continued_at = perf_counter() - engine.statistics().total
            if continued_at > interrupted_at:  # else it is still the run that is being interrupted
                return self._measured[0], continued_at
        return self._measured

    def _clock(self) -> float:
        engine = self._engine()
        if engine is None or engine.is_running:
            return perf_counter()
        # The run ended without any of _ENDS, as one without a single batch does: its statistics say when.
        return self._run_began + engine.statistics().total

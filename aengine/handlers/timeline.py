"""Timeline: where the time of a run went, and when: samples of its statistics, for `picture.timeline` to draw."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from aengine.engine import Engine
from aengine.events import Events, FilteredEvent
from aengine.statistics import EngineStatistics


class Sample(NamedTuple):
    """What the statistics said at one instant: seconds since the run began, spent so far in each of these.

    Attributes:
        iteration: iterations begun.
        epoch: epochs begun.
        total: seconds since the run began.
        data: in waiting for batches.
        step: in the step.
        handlers: in inline handlers.
        back_pressure: in waiting for room in the inboxes of slow subscribers.
        event_loop: in giving way to other tasks, or being paused.
    """

    iteration: int
    epoch: int
    total: float
    data: float
    step: float
    handlers: float
    back_pressure: float
    event_loop: float


class Timeline:
    """Takes samples of an engine's statistics while it runs.

        timeline = Timeline(trainer)
        await trainer.run(loader, max_epochs=10)
        picture.timeline(timeline).save("timeline.png")

    At first a sample is taken after each iteration. Whenever there are `limit`, every second one is dropped, and from
    then on one is taken half as often: so a run of any length has between a half and the whole of `limit`, at equal
    distances, and they cost the less the longer it is. One takes some 10 µs. They begin anew with each run, as the
    statistics do.

    Args:
        engine: whose time it is.
        limit: samples that are kept, at most.

    Raises:
        ValueError: this is no number of samples.
    """

    def __init__(self, engine: Engine[Any, Any], *, limit: int = 400) -> None:
        if type(limit) is not int or limit < 2:  # noqa: PLR2004 -- else there is nothing to halve
            raise ValueError(f"limit= is the number of samples to keep, at least 2, got {limit!r}")
        self._engine = engine
        self._recorder = _Recorder(limit)
        self._recorder.attach(engine)

    @property
    def name(self) -> str:
        """The engine's."""
        return self._engine.name

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples of the run under way, up to now, or of the last one: the first of its beginning, all zeros.

        At any time, from any thread.
        """
        return self._recorder.up_to(self._engine.statistics())


class _Recorder:
    """What the engine holds. It does not hold the engine, which is to be freed by reference count."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._samples: list[Sample] = []
        self._before: Mapping[str, float] = {}
        self._stride = 1
        self._event = _every(self._stride)
        self._is_over = False

    def attach(self, engine: Engine[Any, Any]) -> None:
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.INTERRUPT, self._interrupt)
        engine.add_event_handler(self._event, self._look)

    def up_to(self, now: EngineStatistics) -> tuple[Sample, ...]:
        samples = tuple(self._samples)
        if not samples:
            return ()
        last = self._sample(now)
        # Another run may have begun, which has told nobody yet.
        goes_on = last.iteration >= samples[-1].iteration and last.total > samples[-1].total
        return (*samples, last) if goes_on else samples

    def _begin(self, engine: Engine[Any, Any]) -> None:
        state = engine.state
        self._samples = [Sample(state.iteration, state.epoch, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
        self._before = {}
        self._is_over = False
        self._look_each(engine, 1)

    def _interrupt(self) -> None:
        self._is_over = True  # the run that goes on with it has a clock of its own, and fires no STARTED

    def _look(self, engine: Engine[Any, Any]) -> None:
        if self._is_over:
            self._begin(engine)
        now = engine.statistics()
        self._samples.append(self._sample(now))
        self._before = now.handlers
        if len(self._samples) > self._limit:
            self._samples = self._samples[::2]
            self._look_each(engine, 2 * self._stride)

    def _sample(self, now: EngineStatistics) -> Sample:
        # One by one: the seconds of a handler that was removed are in the statistics no more.
        more = sum(max(0.0, seconds - self._before.get(name, 0.0)) for name, seconds in now.handlers.items())
        handlers = self._samples[-1].handlers + more
        return Sample(
            now.iteration, now.epoch, now.total, now.data, now.step, handlers, now.back_pressure, now.event_loop
        )

    def _look_each(self, engine: Engine[Any, Any], iterations: int) -> None:
        """Be called after every so many iterations: by another filter, for one of our own would be asked each time."""
        engine.remove_event_handler(self._look, self._event)
        self._stride = iterations
        self._event = _every(iterations)
        engine.add_event_handler(self._event, self._look)


def _every(iterations: int) -> FilteredEvent:
    return Events.ITERATION_COMPLETED(every=iterations)

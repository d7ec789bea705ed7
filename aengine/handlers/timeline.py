"""Timeline: samples of a run's statistics, of which `plot_timeline` draws where its time went, and when."""

from collections.abc import Callable, Generator, Mapping
from threading import Lock
from typing import Any, NamedTuple
from weakref import ref

from aengine.arguments import check_whole
from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.engine import Engine
from aengine.events import Events
from aengine.keywords import explain_wrong_call
from aengine.statistics import EngineStatistics

_ENDS = Events.TERMINATE | Events.INTERRUPT | Events.COMPLETED | Events.CANCELLED | Events.EXCEPTION_RAISED


class Sample(NamedTuple):
    """The statistics at one instant: how many seconds of the run so far went into what.

    Attributes:
        iteration: iterations begun.
        epoch: epochs begun.
        total: seconds since the run began.
        data: waiting for batches.
        step: in the step.
        handlers: in inline handlers.
        back_pressure: waiting for space in the inboxes of slow subscribers.
        event_loop: in other tasks of the event loop, or paused.
    """

    iteration: int
    epoch: int
    total: float
    data: float
    step: float
    handlers: float
    back_pressure: float
    event_loop: float


@explain_wrong_call
class Timeline:
    """Takes samples of an engine's statistics while it runs.

        timeline = Timeline()
        timeline.attach(trainer)
        await trainer.run(loader, max_epochs=10)
        plot_timeline(timeline).save("timeline.png")  # of aengine.plots

    At first a sample is taken after each iteration. Whenever there are more than `limit`, every second one is dropped,
    and from then on samples are taken half as often: a run of any length has at least half of `limit`, equally spaced,
    and the longer it is, the less they cost. One takes some 10 µs. They begin anew with each run, as the statistics do.

    Args:
        limit: how many samples are kept, at most.

    Attributes:
        engine_name: of the engine that it was attached to last, "" before.

    Raises:
        ValueError: `limit` is no whole number, or less than 2.
    """

    def __init__(self, *, limit: int = 400) -> None:
        self.engine_name = ""
        self._limit = check_whole(limit, "limit=", minimum=2, of="samples to keep")
        self._recorder = _Recorder(self._limit)
        self._attachment = Attachment(self)

    def attach(self, engine: Engine[Any, Any]) -> RemovableEventHandle:
        """Take samples of an engine from now on, in place of those that there are.

        What is returned removes it again: the samples stay.

        Raises:
            TypeError: this is no engine.
            RuntimeError: this is attached already.
        """
        return self._attachment.begin(engine, self._listen(engine))

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples of the run under way, up to now, or of the last run. The first, of its beginning, is all zeros.

        May be read at any time, on any thread.
        """
        return self._recorder.samples

    def _listen(self, engine: Engine[Any, Any]) -> Generator[RemovableEventHandle]:
        self.engine_name = engine.name
        self._recorder = _Recorder(self._limit)
        yield from self._recorder.listen(engine)


class _Recorder:
    """What is known of one engine."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._samples: list[Sample] = []
        self._before: Mapping[str, float] = {}
        self._stride = 1
        self._event = Events.ITERATION_COMPLETED(every=1)
        self._is_over = False
        # Weakly: the engine refers to this, and is to be freed by reference count.
        self._engine: Callable[[], Engine[Any, Any] | None] = lambda: None
        self._at_end: EngineStatistics | None = None  # when the engine is gone, or this was removed
        self._lock = Lock()  # so that what is removed from another thread does not come again

    def listen(self, engine: Engine[Any, Any]) -> Generator[RemovableEventHandle]:
        self._engine = ref(engine)
        yield engine.add_event_handler(Events.STARTED, self._begin)
        yield engine.add_event_handler(Events.INTERRUPT, self._interrupt)
        yield engine.add_event_handler(_ENDS, self._end)
        engine.add_event_handler(self._event, self._take)
        yield RemovableEventHandle(self._leave)

    @property
    def samples(self) -> tuple[Sample, ...]:
        engine, samples = self._engine(), tuple(self._samples)
        now = self._at_end if engine is None else engine.statistics()
        if not samples or now is None:
            return samples
        last = self._sample(now)
        # If not later, `now` is of another run, which has begun but not fired STARTED yet.
        is_later = last.iteration >= samples[-1].iteration and last.total > samples[-1].total
        return (*samples, last) if is_later else samples

    def _begin(self, engine: Engine[Any, Any]) -> None:
        state = engine.state
        self._samples = [Sample(state.iteration, state.epoch, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
        self._before = {}
        self._at_end = None
        self._is_over = False
        self._take_every(engine, 1)

    def _interrupt(self) -> None:
        self._is_over = True  # the run that continues it has a clock of its own, and fires no STARTED

    def _end(self, engine: Engine[Any, Any]) -> None:
        self._at_end = engine.statistics()

    def _leave(self) -> None:
        """It is attached no more: what is known of the run stays as it is."""
        with self._lock:
            engine, self._engine = self._engine(), lambda: None
            if engine is not None:
                self._at_end = engine.statistics()
                engine.remove_event_handler(self._take, self._event)

    def _take(self, engine: Engine[Any, Any]) -> None:
        if self._is_over or not self._samples:  # or it was attached during the run
            self._begin(engine)
        now = engine.statistics()
        self._samples.append(self._sample(now))
        self._before = now.handlers
        if len(self._samples) > self._limit:
            self._samples = self._samples[::2]
            self._take_every(engine, 2 * self._stride)

    def _sample(self, now: EngineStatistics) -> Sample:
        # Summed handler by handler: those of a handler that was removed are no longer in the statistics, so that the
        # difference of the two sums could be negative.
        more = sum(max(0.0, seconds - self._before.get(name, 0.0)) for name, seconds in now.handlers.items())
        handlers = self._samples[-1].handlers + more
        return Sample(
            now.iteration, now.epoch, now.total, now.data, now.step, handlers, now.back_pressure, now.event_loop
        )

    def _take_every(self, engine: Engine[Any, Any], iterations: int) -> None:
        # By another filter: the engine computes when that is due next, and does not call anything in between.
        with self._lock:
            if self._engine() is None:  # it was removed meanwhile
                return
            engine.remove_event_handler(self._take, self._event)
            self._stride = iterations
            self._event = Events.ITERATION_COMPLETED(every=iterations)
            engine.add_event_handler(self._event, self._take)

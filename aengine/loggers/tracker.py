"""Tracking: brings the numbers of a run to a sink, beside the step.

Between two steps the numbers are put into a spool, where the step runs; from there a task of its own writes them, a
batch at a time, and has patience with a sink that fails. It is called for the first record, and then lets others come
together: what wakes it for each would have the step's thread and the event loop's take turns at each step.
"""

import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from threading import RLock
from time import perf_counter
from typing import Any, Literal, TypeAlias

import anyio

from aengine.arguments import check_seconds
from aengine.callables import check_callable
from aengine.engine import Engine
from aengine.events import AnyEvent, Event, EventEnum, Events, FilteredEvent, date_of, selectors
from aengine.loggers.buffer import RecordBuffer
from aengine.loggers.retry import RetryingSink
from aengine.loggers.runs import BAD
from aengine.loggers.scalars import numbers_of, snapshot
from aengine.loggers.sink import Record, Sink, Witness, Write
from aengine.state import StopReason
from aengine.threads.event_loop import EventLoopHandle

AnyEngine: TypeAlias = Engine[Any, Any]

_logger = logging.getLogger("aengine.loggers")

_BATCH = 1000
"""Records in one call of a sink, at most."""

_PACE = 0.1
"""Seconds from one call of a sink to the next, while records of iterations are all that waits, and nobody waits for
them: a call takes some changes of threads, which the step feels."""

_PASSING = frozenset({"GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED", "ITERATION_COMPLETED"})
_BEGINS = Events.STARTED | Events.EPOCH_STARTED
_ENDS = Events.TERMINATE | Events.INTERRUPT | Events.COMPLETED | Events.CANCELLED | Events.EXCEPTION_RAISED


class TrackerEvents(EventEnum):
    """What a Tracker fires on its engine, for itself."""

    RECORDS_WAIT = "records_wait"


@dataclass(frozen=True, slots=True)
class TrackerStatistics:
    """What became of the records of one tracker: `taken == written + dropped + waiting`.

    Attributes:
        name: the sink.
        taken: records made.
        written: records that the sink has accepted.
        dropped: records for which there was no room.
        waiting: records in the spool, or in the hands of the sink.
        failures: calls of the sink that raised, or outlived the run.
        busy: seconds in the sink.
    """

    name: str
    taken: int
    written: int
    dropped: int
    waiting: int
    failures: int
    busy: float


class Tracker:
    """What `track` returns: one engine's records on their way to one sink."""

    def __init__(
        self,
        engine: AnyEngine,
        sink: Sink | Write,
        values: Callable[[AnyEngine], Mapping[str, Any]],
        step: Callable[[AnyEngine], int] | None,
        spool: int,
        linger: float,
        *,
        must_raise: bool,
    ) -> None:
        self._sink = RetryingSink(sink, linger, must_raise=must_raise)
        self.name = self._sink.name
        anything: Any = sink
        self._gives = id(sink), values, step  # not the sink: two of them may be equal
        self._witness = anything if isinstance(anything, Witness) else None
        self._engine = engine
        self._values = values
        self._step = step
        self._enough = min(_BATCH, spool // 2)  # records to call the sink for at once
        # For what the step's thread and the event loop's both change, down to the blank line. Re-entrant: a signal
        # handler may fire an event while its own thread holds it.
        self._lock = RLock()
        self._spool: RecordBuffer[Record] = RecordBuffer(spool)
        self._goal = 0  # the number of the last record that is to be written before the call is answered
        self._is_called = False  # to write: the call is on its way, or being answered
        self._is_wanted = False  # and is to be sent
        self._is_insisted_on = False  # whoever sends another
        self._has_begun = False  # the run, as far as the sink was told
        self._ending: tuple[float, StopReason] | None = None  # when and why, until another run begins
        self._is_ending = False  # the run: there may be more ends of it to come
        self._closes_at_flush = False  # the run has come to an end: who waits for all then waits for the last record
        self._must_close = False  # the sink, after the last record
        self._is_suspended = False  # the run, which may go on without telling

        self._loop_handle: EventLoopHandle | None = None  # of the call, while it is answered
        self._hurry: anyio.Event | None = None  # while more records are waited for, and none has ended that
        self._has_told_of_drops = False

    def statistics(self) -> TrackerStatistics:
        """Return what became of the records so far."""
        spool, sink = self._spool, self._sink
        with self._lock:
            return TrackerStatistics(
                self.name, spool.taken, spool.written, spool.dropped, spool.waiting, sink.failures, sink.busy
            )

    def attach(self, event: AnyEvent) -> None:
        """Listen to the engine, for `track`."""
        engine = self._engine
        bus = engine._bus  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        listened_to = engine._emitter.select(event)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # or raises
        for one in listened_to:
            for other in bus.topic(one.name).inline:
                if other.selector.filter == one.filter and self._would_repeat(other.handler):
                    raise RuntimeError(
                        f"{self.name} gets these values of engine {engine.name!r} at {one} already, and would get"
                        " each of them twice: track it once, or at other events, or with other values="
                    )
        engine.register_events(*TrackerEvents)
        engine.subscribe(TrackerEvents.RECORDS_WAIT(self._take_call), self._answer, name=self.name)
        self._inbox = bus.subscribers[-1].inbox  # just added
        self._inbox.when_awaited = self._make_haste
        bus.add_last(_BEGINS, self._begin, f"begins for {self.name}")
        for one in listened_to:
            bus.add_last(FilteredEvent(one.name, one.filter), partial(self._take, one.name), f"records for {self.name}")
        for one in selectors(_ENDS):
            bus.add_last(one.name, partial(self._end, one.name), f"ends for {self.name}")

    def _would_repeat(self, handler: Any) -> bool:
        take = getattr(handler, "func", None)
        other = getattr(take, "__self__", None)
        return isinstance(other, Tracker) and take == other._take and other._gives == self._gives  # noqa: SLF001 -- of its own kind

    # Between two steps, where the step runs

    def _begin(self, _: AnyEngine) -> None:
        with self._lock:
            self._be_in_midst()
            self._tell_of_begin(date_of(perf_counter()))

    def _be_in_midst(self) -> None:
        self._is_ending = self._is_suspended = False
        self._sink.unlimit_time()

    def _leave(self) -> None:
        """The run is over, or interrupted, however that came: nothing of it may be taken for the next one's."""
        with self._lock:
            reason = self._engine.state.stop_reason
            if self._ending is None and reason in BAD:  # and no event told so
                self._ending = date_of(perf_counter()), reason
            self._tell_of_end()  # where the task that does so was given up
            self._ending = None
            self._be_in_midst()
            self._closes_at_flush = self._must_close = False
            self._is_called = not self._inbox.is_idle  # else its call was discarded
        self._sink.leave()

    def _take(self, event: str, engine: AnyEngine, *_: object) -> None:
        time = date_of(perf_counter())
        step = engine.state.iteration if self._step is None else self._step(engine)
        record = Record(step, engine.state.epoch, time, event, engine.name, snapshot(self._values(engine)))
        with self._lock:
            if self._is_ending:
                self._must_close = not self._closes_at_flush  # again: it was told of the end before this came
                self._begin_to_limit_time()
            self._tell_of_begin(time)  # a run that goes on after an interruption may not tell; or it is told of again
            self._spool.put(record, is_iteration=event in _PASSING)
            if self._is_called:
                self._hurry_if_due()
            else:
                self._is_called = self._is_wanted = perf_counter() >= self._sink.retry_at
        self._tell_of_drops()
        self._call_if_wanted()

    def _end(self, event: str, engine: AnyEngine, *_: object) -> None:
        reason = engine.state.stop_reason  # None at an event before the last, and where the run is only interrupted
        if engine._requests.skips_completed:  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # so this is the last
            reason = reason or StopReason.TERMINATED
        with self._lock:
            if reason is not None:
                time = date_of(perf_counter())
                self._ending = time, reason
                self._tell_of_begin(time)  # again, where a run fails after it was COMPLETED
            self._is_suspended = event == Events.INTERRUPT.name
            self._is_ending = self._closes_at_flush = True
            self._begin_to_limit_time()
            if not self._is_called:
                self._is_called = self._is_wanted = True
        self._call_if_wanted()

    def _begin_to_limit_time(self) -> None:
        self._sink.unlimit_time()  # that of an end before this one may have passed
        if (loop_handle := self._loop_handle) is not None:
            loop_handle.call(self._limit_time)

    def _call_if_wanted(self) -> None:
        if self._is_wanted:
            self._engine.fire_event(TrackerEvents.RECORDS_WAIT)

    def _take_call(self, _: AnyEngine, __: int) -> bool:
        """Say whether the event that is fired is for this tracker of the engine's."""
        with self._lock:
            is_wanted, self._is_wanted = self._is_wanted or self._is_insisted_on, False
            return is_wanted

    def _hurry_if_due(self) -> None:
        hurry, loop_handle = self._hurry, self._loop_handle
        if hurry is not None and loop_handle is not None and not self._may_gather():
            self._hurry = None  # once is enough
            loop_handle.call(hurry.set)

    def _tell_of_drops(self) -> None:
        if self._spool.dropped and not self._has_told_of_drops:
            self._has_told_of_drops = True
            _logger.warning(
                "%s is slower than the records come, or down, and its spool is full: the oldest are dropped, and"
                " counted. Log less often, or give it a larger spool=",
                self.name,
            )

    @property
    def _takes_part(self) -> bool:
        """Whether the run under way has told this of anything."""
        return self._leave in self._engine._requests.at_end  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]

    def _tell_of_begin(self, time: float) -> None:
        self._engine._requests.at_end.add(self._leave)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        if self._witness is not None and not self._has_begun:
            self._has_begun = True
            self._witness.begin(self._engine.name, time)

    # Beside the step

    async def _answer(self, _: Event) -> None:
        """Write what waits. Where the sink fails, leave it to the first record after a pause, or to the run's end."""
        self._loop_handle = EventLoopHandle()
        try:
            self._limit_time()
            await self._gather()
            is_well = await self._write_what_waits()
            while self._may_close():
                await self._sink.close()
                self._sink.leave()
                is_well = is_well and await self._write_what_waits()  # for who has begun to wait meanwhile
        except BaseException:
            self._is_called = False
            self._sink.leave()
            raise
        finally:
            with self._lock:
                self._loop_handle = None
                self._spool.put_back()  # what is in hand after a failure
        if self._has_more_to_do():
            await self._engine.emit(TrackerEvents.RECORDS_WAIT)

    def _make_haste(self) -> None:
        """Somebody waits for what was taken until now to be written; at the end of a run, the run itself."""
        with self._lock:
            self._goal = self._spool.taken
            self._notice_silent_end()
            self._hurry_if_due()
            must_close, self._closes_at_flush = self._closes_at_flush, False
            if must_close:
                self._must_close = True
            # A call may be on its way, in another thread: it would come too late to be waited for.
            if must_close or (self._inbox.is_idle and self._spool.waiting and self._sink.is_well):
                self._is_called = self._is_insisted_on = True
        if self._is_insisted_on:
            self._engine.fire_event(TrackerEvents.RECORDS_WAIT)
            self._is_insisted_on = False

    def _notice_silent_end(self) -> None:
        """A run without a batch ends without an event."""
        reason = self._engine.state.stop_reason
        if reason in BAD and not self._is_ending and self._takes_part:
            self._ending = date_of(perf_counter()), reason
            self._is_ending = self._closes_at_flush = True
            self._begin_to_limit_time()

    def _limit_time(self) -> None:
        with self._lock:
            if self._is_ending:
                self._sink.limit_time()
                if self._hurry is not None:
                    self._hurry.set()

    async def _write_what_waits(self) -> bool:
        while batch := self._next_batch():
            if not await self._sink.write(batch):
                return False
            with self._lock:
                self._spool.mark_written()
        return True

    def _next_batch(self) -> list[Record]:
        with self._lock:
            return self._spool.take(_BATCH) if self._is_ending or self._spool.oldest <= self._goal else []

    def _may_close(self) -> bool:
        with self._lock:
            if not self._must_close or (self._spool.waiting and not self._sink.is_late):
                return False
            self._must_close = False
            self._warn_of_loss()
            if not self._closes_at_flush:
                self._tell_of_end()
            return True

    def _has_more_to_do(self) -> bool:
        with self._lock:
            self._is_called = False
            if self._is_suspended and not self._must_close and not self._closes_at_flush:
                self._be_in_midst()
            has_records = self._spool.waiting > 0 and perf_counter() >= self._sink.retry_at
            if self._must_close or has_records:
                self._is_called = self._is_wanted = True
            return self._is_wanted

    async def _gather(self) -> None:
        """Let records of iterations come together, if the sink was called just now."""
        rest = self._sink.called_at + _PACE - perf_counter()
        hurry = anyio.Event()
        with self._lock:
            if rest > 0 and self._may_gather():
                self._hurry = hurry
        try:
            if self._hurry is hurry:
                with anyio.move_on_after(rest):
                    await hurry.wait()
        finally:
            self._hurry = None
        self._goal = self._spool.taken

    def _may_gather(self) -> bool:
        spool = self._spool
        nobody_waits = self._goal < spool.oldest and not self._is_ending
        return nobody_waits and spool.has_only_iterations and 0 < spool.waiting < self._enough

    def _warn_of_loss(self) -> None:
        spool = self._spool
        if spool.waiting or spool.dropped:
            _logger.warning(
                "the run ends, and of %d records for %s %d were dropped and %d not written: these wait for the next run"
                " of the engine, and are lost with the process",
                spool.taken, self.name, spool.dropped, spool.waiting,
            )  # fmt: skip

    def _tell_of_end(self) -> None:
        if self._witness is not None and self._ending is not None and self._has_begun:
            self._witness.end(self._engine.name, *self._ending)
            self._has_begun = False


def track(
    engine: AnyEngine,
    sink: Sink | Write,
    event: AnyEvent = Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED,
    *,
    values: Callable[[AnyEngine], Mapping[str, Any]] = numbers_of,
    step: Callable[[AnyEngine], int] | None = None,
    spool: int = 10_000,
    linger: float = 5.0,
    on_error: Literal["warn", "raise"] = "warn",
) -> Tracker:
    """Have the numbers of an engine written to a sink at each event, beside the step, which never waits for it.

        track(trainer, JSONLines("log.jsonl"), Events.ITERATION_COMPLETED(every=10) | Events.EPOCH_COMPLETED)

    What waits at the end of a run, however it ends, is written before `run()` returns; what was taken before an
    `engine.flush()`, before that does, unless the sink fails: one that is down would hold up who waits. Else records of
    iterations may wait a tenth of a second for others, and come to the sink together.

    Args:
        engine: whose numbers.
        sink: where to. See `Sink`: an object with `write(records)`, or a function.
        event: when: an event, filtered or not, or several.
        values: `values(engine)` returns numbers by name. It is called between two steps, after the inline handlers.
            Tensors of one number are fine: on a device they are copied there, and read beside the step. By default the
            output and the metrics, as far as they are numbers.
        step: `step(engine)` returns the step to write, for an engine whose own iterations mean nothing to the reader:
            `step=lambda _: trainer.state.iteration` for an evaluator.
        spool: how many records may wait. Over that the oldest are dropped, those of iterations before all others; the
            first drop gives a warning, and all are counted in `statistics()`.
        linger: seconds that a sink may have at the end of a run, if it is slow or down. Less than the engine's `grace`.
        on_error: what an exception of the sink does: "warn" logs one warning, tries the same records again after 0.1
            seconds, with the first record after that, then after twice as long, up to a minute, and says when it works
            again; "raise" fails the run.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: the sink gets the same values of the same engine at one of these events already.
    """
    _check_sink(sink)
    check_callable(values, "values=", "values", "engine")
    if step is not None:
        check_callable(step, "step=", "step", "engine")
    check_seconds(linger, "linger=", 5.0)
    if type(spool) is not int or spool < 1:
        raise ValueError(f"spool= is the number of records that may wait, at least 1, got {spool!r}")
    if on_error not in ("warn", "raise"):
        raise ValueError(f'on_error= is "warn" or "raise", got {on_error!r}')
    tracker = Tracker(engine, sink, values, step, spool, linger, must_raise=on_error == "raise")
    tracker.attach(event)
    return tracker


def _check_sink(sink: Any) -> None:
    if isinstance(sink, type):
        name = sink.__qualname__
        raise TypeError(f"a sink is an object, and {name} is a class: track(engine, {name}(...))")
    if isinstance(sink, io.IOBase):
        raise TypeError(f"a sink writes records, and {sink!r} is a file: track(engine, JSONLines(path)) writes one")
    write = getattr(sink, "write", sink)
    if not callable(write):
        raise TypeError(f"a sink has a method write(records), or is a function of the records, got {sink!r}")
    check_callable(write, "the sink", "write", "records")

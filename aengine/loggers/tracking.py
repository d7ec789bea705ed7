"""Tracking: brings the numbers of a run to a sink, beside the step.

Between two steps the numbers are taken down; on the event loop they are put into a spool; from there a task of its own
writes them, a batch at a time, and has patience with a sink that fails.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal, TypeAlias, cast

import anyio

from aengine.binding import is_async_callable, is_awaitable, name_of
from aengine.engine import Engine
from aengine.events import AnyEvent, Event, EventEnum, Events
from aengine.loggers.beside import Beside
from aengine.loggers.numbers import hold, numbers_of, read
from aengine.loggers.records import Closable, Record, Sink, Witness, Write
from aengine.loggers.spool import Spool
from aengine.state import StopReason
from aengine.worker import Home

AnyEngine: TypeAlias = Engine[Any, Any]

_logger = logging.getLogger("aengine.loggers")

_BATCH = 1000
"""Records in one call of a sink, at most."""

_PACE = 0.02
"""Seconds from one call of a sink to the next, while records of iterations are all that waits: a call takes two changes
of threads, which the step feels. Not more, for `engine.flush()` may wait for it."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 60.0
"""Seconds before a sink that failed is tried again: twice as many each time."""

_QUIET = 300.0
"""Seconds after a warning in which a sink that fails again, having recovered, is not warned of again."""

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
        sink: Sink | Write,
        values: Callable[[AnyEngine], Mapping[str, Any]],
        step: Callable[[AnyEngine], int] | None,
        spool: int,
        linger: float,
        *,
        must_raise: bool,
    ) -> None:
        self.name = name_of(sink) if hasattr(sink, "__qualname__") else repr(sink)
        self._beside = Beside(f"aengine sink {self.name}")
        self._write = self._writer(sink.write if isinstance(sink, Sink) else sink)
        anything: Any = sink
        self._close_sink = self._call_beside(anything.close) if isinstance(anything, Closable) else None
        self._witness = anything if isinstance(anything, Witness) else None
        self._has_begun = False  # the run, as far as the sink was told
        self._ending: tuple[float, StopReason] | None = None  # when and why, until the sink is told
        self._engine_name = ""
        self._values = values
        self._step = step
        self._linger = linger
        self._must_raise = must_raise
        self._spool: Spool[Record] = Spool(spool)
        self._enough = min(_BATCH, spool // 2)  # records to call the sink for at once
        self._called_at = -math.inf
        self._hurry: anyio.Event | None = None  # while more records are waited for
        self._failures = 0
        self._busy = 0.0
        self._is_called = False  # to write: the call waits, or is being answered
        self._deadline: float | None = None  # of the last words, once the run is ending
        self._is_suspended = False  # the run, which may go on without telling
        self._scope: anyio.CancelScope | None = None  # of the call of the sink under way
        self._pause = 0.0  # before the next try; 0 while the sink is well
        self._retry_at = -math.inf
        self._quiet_until = -math.inf
        self._has_told_of_drops = False

    def statistics(self) -> TrackerStatistics:
        """Return what became of the records so far."""
        spool = self._spool
        return TrackerStatistics(
            self.name, spool.taken, spool.written, spool.dropped, spool.waiting, self._failures, self._busy
        )

    def attach(self, engine: AnyEngine, event: AnyEvent) -> None:
        """Listen to an engine, for `track`."""
        self._engine_name = engine.name
        engine.register_events(*TrackerEvents)

        async def accept(event: Event) -> None:
            if self._deadline is None:  # the task that tells of it may come to that later
                self._tell_of_begin(event.time)
            self._accept(event)
            await call_if(self._spool.waiting > 0 and perf_counter() >= self._retry_at)

        async def turn(event: Event) -> None:
            await records.settled(event.sequence, Home())  # what was before it is in the spool then
            self._turn(event)
            await call_if(self._deadline is not None)

        async def call_if(is_due: bool) -> None:  # noqa: FBT001 -- read as a sentence
            if is_due and not self._is_called:
                self._is_called = True
                await engine.emit(TrackerEvents.RECORDS_WAIT)

        engine.subscribe(event, accept, snapshot=self._take, name=f"records for {self.name}")
        records = engine._bus.subscribers[-1].inbox  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # just added
        engine.subscribe(_BEGINS | _ENDS, turn, snapshot=_why_it_ends, name=f"ends for {self.name}")
        engine.subscribe(TrackerEvents.RECORDS_WAIT, self._answer, name=self.name)

    def _take(self, engine: AnyEngine) -> tuple[int, dict[str, Any]]:
        """Between two steps, where the step runs."""
        step = engine.state.iteration if self._step is None else self._step(engine)
        return step, hold(self._values(engine))

    def _accept(self, event: Event) -> None:
        step, values = event.snapshot
        record = Record(step, event.epoch, event.time, event.name, event.engine, values)
        is_passing = event.name in _PASSING
        self._spool.put(record, is_passing=is_passing)
        if self._hurry is not None and (not is_passing or self._spool.waiting >= self._enough):
            self._hurry.set()
        if self._spool.dropped and not self._has_told_of_drops:
            self._has_told_of_drops = True
            _logger.warning(
                "%s is slower than the records come, or down, and its spool is full: the oldest are dropped, and"
                " counted. Log less often, or give it a larger spool=",
                self.name,
            )

    def _turn(self, event: Event) -> None:
        self._is_suspended = event.name == Events.INTERRUPT.name
        if event.name in {one.name for one in _BEGINS}:
            self._deadline = None
            self._tell_of_begin(event.time)
            return
        if event.snapshot is not None:
            self._ending = event.time, event.snapshot
        self._deadline = anyio.current_time() + self._linger
        if self._hurry is not None:
            self._hurry.set()
        if self._scope is not None:
            self._scope.deadline = self._deadline

    def _tell_of_begin(self, time: float) -> None:
        if self._witness is not None and not self._has_begun:
            self._has_begun = True
            self._witness.begin(self._engine_name, time)

    def _tell_of_end(self) -> None:
        ending, self._ending = self._ending, None
        if self._witness is not None and ending is not None:
            time, reason = ending
            self._tell_of_begin(time)  # again, where a run fails after it was COMPLETED
            self._has_begun = False
            self._witness.end(self._engine_name, time, reason)

    # Writing

    async def _answer(self, _: Event) -> None:
        """Write what waits. Where the sink fails, leave it to the first record after a pause, or to the run's end."""
        if not self._is_called:  # it was for another tracker of the engine
            return
        try:
            await self._gather()
            while batch := self._spool.take(_BATCH):
                if not await self._deliver(batch):
                    break
        except BaseException:
            self._beside.leave()
            raise
        finally:
            self._spool.put_back()  # what is in hand after a failure
            self._is_called = False
        if self._deadline is not None:
            try:
                await self._close()
            finally:
                self._beside.leave()
            if self._is_suspended:
                self._deadline = None

    async def _gather(self) -> None:
        """Let records of iterations come together, if the sink was called just now."""
        rest = self._called_at + _PACE - perf_counter()
        if rest > 0 and self._deadline is None and self._spool.is_passing and self._spool.waiting < self._enough:
            self._hurry = anyio.Event()
            with anyio.move_on_after(rest):
                await self._hurry.wait()
            self._hurry = None

    def _writer(self, write: Write) -> Callable[[Sequence[Record]], Awaitable[None]]:
        """Return what first reads the numbers that are still on a device: in a thread, too, for that may take long."""

        def read_and_write(batch: Sequence[Record]) -> Any:
            return write(_read_all(batch))

        if not is_async_callable(write):
            return self._call_beside(read_and_write)

        async def call(batch: Sequence[Record]) -> None:
            await cast(Awaitable[None], write(await self._beside.call(_read_all, batch)))

        return call

    def _call_beside(self, function: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
        """Return the async form of what may be plain."""
        if is_async_callable(function):
            return function

        async def call(*arguments: Any) -> None:
            result = await self._beside.call(function, *arguments)
            if is_awaitable(result):
                await result

        return call

    async def _deliver(self, batch: Sequence[Record]) -> bool:
        self._called_at = perf_counter()
        while error := await self._call(lambda: self._write(batch), self._deadline):
            self._meet(error)
            left = 0.0 if self._deadline is None else self._deadline - anyio.current_time()
            if left <= 0:
                return False
            await anyio.sleep(min(self._pause, left))
        self._spool.done()
        if self._pause:
            self._pause, self._retry_at = 0.0, -math.inf
            _logger.info("%s works again, and gets what has been waiting", self.name)
        return True

    async def _call(self, function: Callable[[], Awaitable[None]], deadline: float | None) -> Exception | None:
        """Call the sink, and return what it raised."""
        began = perf_counter()
        try:
            with anyio.CancelScope(deadline=math.inf if deadline is None else deadline) as self._scope:
                await function()
                return None
        except Exception as error:  # noqa: BLE001 -- reported, or raised, by who called
            return error
        finally:
            self._scope = None
            self._busy += perf_counter() - began
        return TimeoutError(f"{self.name} was still busy {self._linger} seconds after the end of the run")

    def _meet(self, error: Exception) -> None:
        self._failures += 1
        if self._must_raise:
            raise error
        now = perf_counter()
        if not self._pause:
            level = logging.WARNING if now >= self._quiet_until else logging.INFO
            _logger.log(level, "%s failed; it is tried again, and records wait meanwhile", self.name, exc_info=error)
            self._quiet_until = now + _QUIET
        self._pause = min(self._pause * 2 or _FIRST_PAUSE, _LONGEST_PAUSE)
        self._retry_at = now + self._pause

    async def _close(self) -> None:
        spool = self._spool
        if spool.waiting or spool.dropped:
            _logger.warning(
                "the run ends, and of %d records for %s %d were dropped and %d not written: these wait for the next run"
                " of the engine, and are lost with the process",
                spool.taken, self.name, spool.dropped, spool.waiting,
            )  # fmt: skip
        self._tell_of_end()
        if self._close_sink is not None:
            assert self._deadline is not None, "it is ending"  # noqa: S101
            deadline = max(self._deadline, anyio.current_time() + 1)  # a moment, even where all else took too long
            if error := await self._call(self._close_sink, deadline):
                self._meet(error)


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

    What waits at the end of a run, however it ends, is written before `run()` returns. `engine.flush()` waits
    for the call of the sink that is under way, and for no more: a sink that is down would hold up the loop.

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
    """
    if not callable(getattr(sink, "write", sink)):
        raise TypeError(f"a sink has a method write(records), or is a function of the records, got {sink!r}")
    if spool < 1:
        raise ValueError(f"spool= is the number of records that may wait, at least 1, got {spool!r}")
    if on_error not in ("warn", "raise"):
        raise ValueError(f'on_error= is "warn" or "raise", got {on_error!r}')
    tracker = Tracker(sink, values, step, spool, linger, must_raise=on_error == "raise")
    tracker.attach(engine, event)
    return tracker


def _why_it_ends(engine: AnyEngine) -> StopReason | None:
    """Return the reason, at the last event of a run; None at an earlier one, and where the run is only interrupted."""
    if engine._control.skips_completed:  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # TERMINATE is the last
        return engine.state.stop_reason or StopReason.TERMINATED
    return engine.state.stop_reason


def _read_all(batch: Sequence[Record]) -> list[Record]:
    return [replace(record, values=read(record.values)) for record in batch]

"""RecordWriter: the background service that brings the records of one engine to one sink, beside the step."""

import logging
import math
from collections.abc import Callable, Mapping
from enum import Enum
from threading import RLock
from time import perf_counter
from typing import Any, TypeAlias

import anyio

from aengine.drivers.services import Service
from aengine.events import date_of
from aengine.loggers.buffer import RecordBuffer
from aengine.loggers.retry import RetryingSink
from aengine.loggers.sink import Record, Rewindable, Sink, Witness, Write
from aengine.state import StopReason
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent

Standing: TypeAlias = Callable[[Any], Mapping[str, int] | None]
"""Of an engine whose run begins, returns what `Rewindable` is called with; None if it does not go back."""

_logger = logging.getLogger("aengine.loggers")

_BATCH = 1000
"""The most records in one call of a sink."""

_PACE = 0.1
"""Seconds from one call of a sink to the next, while all that waits is records of iterations, and no flush waits for
them: waking the event loop for each record would have its thread and the step's take turns at each step."""


class _Phase(Enum):
    """What the writer is doing, and so what a record that comes now has to expect."""

    IDLE = "no run is under way: records wait for the next one"
    RUNNING = "serve() writes, at its pace"
    ENDING = "the run is ending: serve() writes all that waits, and has `linger` seconds for that"
    CLOSING = "serve() returns, for run_ended() writes the rest and closes the sink, in the time that remains"
    FAILED = "the run fails by an error of the sink: nothing more is written in it"


_SERVED = (_Phase.RUNNING, _Phase.ENDING)
_AT_END = (_Phase.ENDING, _Phase.CLOSING)


class RecordWriter(Service):
    """Takes records between two steps, by `put`, and writes them in its task, a batch at a time.

    `put` and `end` are called where the step runs, everything else on the event loop's thread. The lock guards what
    both sides use: the buffer, the phase, and the event that wakes the task. It is never held in an await or a call of
    the sink, so the step waits for neither. Re-entrant, because a signal handler may fire an event, and so call `put`,
    in a thread that holds it.
    """

    def __init__(self, sink: Sink | Write, size: int, linger: float, standing: Standing, *, must_raise: bool) -> None:
        anything: Any = sink
        self.sink = RetryingSink(sink, linger, must_raise=must_raise)
        self.buffer: RecordBuffer[Record] = RecordBuffer(size)
        self._linger = linger
        self._standing = standing
        self.lock = RLock()
        self._enough = min(_BATCH, size // 2)  # records for which the sink is called at once
        self._rewindable = anything if isinstance(anything, Rewindable) else None
        self._listener = anything if isinstance(anything, Witness) else None
        self._engine_name = ""
        self._is_begin_reported = False  # to the sink; an interrupted run stays begun until it has gone on and ended
        self._ended_at: float | None = None
        self._has_warned_of_drops = False

        self._phase = _Phase.IDLE
        self._goal = 0  # the number of the last record that a flush waits for
        self._wakeup: ThreadSafeEvent | None = None  # of the task, while it waits; taken by the first that sets it
        self._loop_handle: EventLoopHandle | None = None
        self._round: anyio.Event  # set when the task has written what waited, or failed to
        self._returned: anyio.Event | None = None  # set when the task has returned

    # Between two steps, where the step runs

    def put(self, record: Record, *, is_iteration: bool) -> None:
        """Accept a record, and wake the task if that is due. Never waits."""
        with self.lock:
            self.buffer.put(record, is_iteration=is_iteration)
            must_warn = self.buffer.dropped > 0 and not self._has_warned_of_drops
            self._has_warned_of_drops |= must_warn
            if self._phase in _AT_END:
                self._call_in_loop_to_limit_time()  # anew: the time since an event before may be over
            elif self._wakeup is not None and self._is_due():
                self._wake()
        if must_warn:
            _logger.warning(
                "%s is slower than the records come, or down, and its spool is full: the oldest are dropped, and"
                " counted. Log less often, or give it a larger spool=",
                self.sink.name,
            )

    def end(self) -> None:
        """The run is at an event with which it ends: what waits is written at once, and in a limited time."""
        with self.lock:
            if self._phase is _Phase.RUNNING:
                self._phase, self._ended_at = _Phase.ENDING, date_of(perf_counter())
            self._call_in_loop_to_limit_time()

    def _call_in_loop_to_limit_time(self) -> None:
        if self._loop_handle is not None:
            self._loop_handle.call(self._limit_time)

    def _is_due(self) -> bool:
        """Whether the task is to write now. For a caller that holds the lock."""
        if not self.buffer.waiting:
            return False
        if self._phase is _Phase.ENDING:
            return not self.sink.is_late
        now = perf_counter()
        if now < self.sink.retry_at:
            return False
        is_flushed = self.buffer.oldest <= self._goal
        is_enough = not self.buffer.has_only_iterations or self.buffer.waiting >= self._enough
        return is_flushed or is_enough or now >= self.sink.called_at + _PACE

    def _wake(self) -> None:
        with self.lock:
            wakeup, self._wakeup = self._wakeup, None
        if wakeup is not None:
            wakeup.set()

    # Beside the step, on the event loop's thread

    def run_started(self, engine: Any) -> None:
        """Report it to the sink, and be ready to be flushed, although the task has not taken its first step."""
        self._round, self._returned = anyio.Event(), None
        self._loop_handle = EventLoopHandle()
        self._engine_name, self._ended_at = engine.name, None
        self.sink.begin()
        if self._rewindable is not None and (standing := self._standing(engine)) is not None:
            self._rewindable.run_went_back(engine.name, standing)
        with self.lock:
            self._phase = _Phase.RUNNING
        self._report_begin()

    async def serve(self, engine: Any) -> None:  # noqa: ARG002 -- as Service has it
        """Write what waits, whenever that is due."""
        self._returned = anyio.Event()
        try:
            while await self._wait_until_due():
                await self._write(self.buffer.taken)
                self._end_round()
        except BaseException:  # also a native cancellation, which fails the run
            with self.lock:
                if self._phase in _SERVED:
                    self._phase = _Phase.FAILED
            raise
        finally:
            with self.lock:
                self._wakeup = None
            self._returned.set()
            self._end_round()

    async def flush(self) -> None:
        """Wait until what was taken so far is written; where the sink is down, until the task has tried.

        The task does the writing: a flush that is cancelled does not cut off a call of the sink.
        """
        with self.lock:
            goal = self._goal = self.buffer.taken
        while self._is_to_write(goal):
            end_of_round = self._round
            self._wake()
            await end_of_round.wait()

    async def before_commit(self) -> None:
        """Have what was taken so far written, and safe on the disk, in the time that a sink has at the end of a run."""
        with anyio.move_on_after(self._linger) as scope:
            await self.flush()
            await self.sink.sync_to_disk()
        if scope.cancelled_caught:
            _logger.warning(
                "a checkpoint is committed before all records of its steps are written: %s has taken longer than the"
                " %s seconds of linger= for them",
                self.sink.name, self._linger,
            )  # fmt: skip

    async def run_ended(self, engine: Any, reason: StopReason, error: BaseException | None) -> None:  # noqa: ARG002 -- as Service has it
        """Write what still waits, report the end to the sink, and close it: in `linger` seconds, and one for closing.

        A sink whose error failed the run is closed as well: what it wrote before that error is to be made safe.
        """
        if self._phase is _Phase.RUNNING:  # a run that found no data ends without an event
            self.end()
        with self.lock:
            if self._phase is _Phase.ENDING:
                self._phase = _Phase.CLOSING
        self._wake()
        if self._returned is not None:
            await self._returned.wait()  # one call of the sink at a time
        if self.sink.has_raised:
            await self._close(reason)
        while self._phase is _Phase.CLOSING and not self.sink.has_raised:
            try:
                await self._write(math.inf)
            except Exception:
                await self._close(reason)
                raise
            self._warn_of_loss()
            await self._close(reason)
            with self.lock:
                if not self.buffer.waiting or self.sink.is_late:
                    self._phase = _Phase.IDLE
            if self._phase is _Phase.CLOSING:  # a record came after the end was reported
                self._report_begin()
        self._finish(reason)

    def run_abandoned(self, engine: Any, reason: StopReason, error: BaseException | None) -> None:  # noqa: ARG002 -- as Service has it
        """Do not wait for the call of the sink that is under way. What is not written waits for the next run."""
        self._finish(reason)

    async def _close(self, reason: StopReason) -> None:
        self._report_end(reason)
        await self.sink.close()

    def _finish(self, reason: StopReason) -> None:
        with self.lock:
            self._phase = _Phase.IDLE
        self._report_end(reason)
        self.sink.abandon()

    async def _wait_until_due(self) -> bool:
        """Wait until there is something to write. Returns False when the task is to return."""
        while self._phase in _SERVED:
            with self.lock:
                if self._is_due():
                    return True
                assert self._loop_handle is not None, "made when the run started"  # noqa: S101
                wakeup = self._wakeup = ThreadSafeEvent(self._loop_handle)
                # Wait for the pace even where no record waits: the first that comes after it wakes the task. A sink
                # that is down is tried again with the first record after its pause.
                rest = self.sink.called_at + _PACE - perf_counter() if self.sink.is_well else 0.0
            with anyio.move_on_after(rest if rest > 0 else None):
                await wakeup.wait()
        return False

    async def _write(self, goal: float) -> None:
        """Write the records up to this number. They wait again, in their order, if the sink fails."""
        try:
            while batch := self._next_batch(goal):
                if not await self.sink.write(batch):
                    return
                with self.lock:
                    self.buffer.mark_written()
        finally:
            with self.lock:
                self.buffer.put_back()

    def _next_batch(self, goal: float) -> list[Record]:
        with self.lock:
            return self.buffer.take(_BATCH) if self.buffer.oldest <= goal else []

    def _end_round(self) -> None:
        end_of_round, self._round = self._round, anyio.Event()
        end_of_round.set()

    def _is_to_write(self, goal: int) -> bool:
        """Whether records up to this number wait, and the task will try: during the run not if the sink is down."""
        with self.lock:
            if self.buffer.oldest > goal:
                return False
            if self._phase is _Phase.ENDING:
                return not self.sink.is_late
            return self._phase is _Phase.RUNNING and self.sink.is_well

    def _limit_time(self) -> None:
        if self._phase in _AT_END:
            self.sink.limit_time()
            self._wake()

    def _warn_of_loss(self) -> None:
        buffer = self.buffer
        if buffer.waiting or buffer.dropped:
            _logger.warning(
                "the run ends, and of %d records for %s %d were dropped and %d not written: these wait for the next run"
                " of the engine, and are lost with the process",
                buffer.taken, self.sink.name, buffer.dropped, buffer.waiting,
            )  # fmt: skip

    def _report_begin(self) -> None:
        if self._listener is not None and not self._is_begin_reported:
            self._is_begin_reported = True
            self._listener.begin(self._engine_name, date_of(perf_counter()))

    def _report_end(self, reason: StopReason) -> None:
        if self._listener is not None and self._is_begin_reported and reason is not StopReason.INTERRUPTED:
            self._is_begin_reported = False
            ended_at, self._ended_at = self._ended_at, None
            self._listener.end(self._engine_name, ended_at or date_of(perf_counter()), reason)

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
from aengine.loggers.sink import Record, Rewindable, RunListener, Sink, Write
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
    LEAVING = "the tracker was removed during the run: serve() writes the rest and closes the sink, in a limited time"
    ENDING = "the run is ending: serve() writes all that waits, and has `shutdown_timeout` seconds for that"
    CLOSING = "serve() returns, for run_ended() writes the rest and closes the sink, in the time that remains"
    FAILED = "the run fails by an error of the sink: nothing more is written in it"


_SERVED = (_Phase.RUNNING, _Phase.ENDING)
_AT_END = (_Phase.LEAVING, _Phase.ENDING, _Phase.CLOSING)


class RecordWriter(Service):
    """Takes records between two steps, by `put`, and writes them in its task, a batch at a time.

    `put` and `end` are called where the step runs, `leave` in any thread, everything else on the event loop's thread.
    The lock guards what all of them use: the buffer, the phase, and the event that wakes the task. It is never held in
    an await or a call of the sink, so the step waits for neither. Re-entrant, because a signal handler may fire an
    event, and so call `put`, in a thread that holds it.
    """

    def __init__(
        self, sink: Sink | Write, size: int, shutdown_timeout: float, standing: Standing, *, must_raise: bool
    ) -> None:
        anything: Any = sink
        self.sink: RetryingSink = RetryingSink(sink, shutdown_timeout, must_raise=must_raise)
        self.buffer: RecordBuffer[Record] = RecordBuffer(size)
        self._shutdown_timeout = shutdown_timeout
        self._standing = standing
        self.lock: RLock = RLock()
        self._enough = min(_BATCH, size // 2)  # records for which the sink is called at once
        self._rewindable = anything if isinstance(anything, Rewindable) else None
        self._listener = anything if isinstance(anything, RunListener) else None
        self._engine_name = ""
        self._is_begin_reported = False  # to the sink; an interrupted run stays begun until it has gone on and ended
        self._ended_at: float | None = None
        self._has_warned_of_drops = False
        self._is_removed = False
        self._remove: Callable[[], object] | None = None  # what takes it off the engine, when it has written all

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
            if self._is_removed:  # in the midst of the handlers of this event
                return
            self.buffer.put(record, is_iteration=is_iteration)
            must_warn = self.buffer.dropped > 0 and not self._has_warned_of_drops
            self._has_warned_of_drops |= must_warn
            if self._phase in _AT_END:
                self._call_in_loop_to_limit_time()  # anew: the time since an event before may be over
            elif self._wakeup is not None and self._is_due():
                self._wake()
        if must_warn:
            _logger.warning(
                "%s is slower than the records come, or down, and its buffer is full: the oldest are dropped, and"
                " counted. Log less often, or give it a larger buffer=",
                self.sink.name,
            )

    def end(self) -> None:
        """The run is at an event with which it ends: what waits is written at once, and in a limited time."""
        with self.lock:
            if self._phase is _Phase.RUNNING:
                self._phase, self._ended_at = _Phase.ENDING, date_of(perf_counter())
            self._call_in_loop_to_limit_time()

    def leave(self, remove: Callable[[], object], *, is_running: bool) -> None:
        """Accept no more, write what was taken if a run is under way, close the sink, and then call `remove`.

        Args:
            remove: takes this off the engine.
            is_running: whether the engine is running.
        """
        with self.lock:
            self._is_removed, self._remove = True, remove
            if self._phase is _Phase.RUNNING:
                self._phase, self._ended_at = _Phase.LEAVING, date_of(perf_counter())
                self._call_in_loop_to_limit_time()
            # Added in the midst of a run, perhaps it has not been told of that yet, and has then to write all the same.
            is_idle = self._phase is _Phase.IDLE and not (is_running and self._loop_handle is None)
        if is_idle:
            if self.buffer.waiting:
                self._warn_of_loss()
            self._finish(StopReason.INTERRUPTED)

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
            self._phase = _Phase.LEAVING if self._is_removed else _Phase.RUNNING
        self._report_begin()

    async def serve(self, engine: Any) -> None:  # noqa: ARG002 -- as Service has it
        """Write what waits, whenever that is due."""
        self._returned = anyio.Event()
        try:
            while await self._wait_until_due():
                await self._write(self.buffer.taken)
                self._end_round()
            if self._phase is _Phase.LEAVING:
                self.sink.limit_time()
                await self._write_rest(_Phase.LEAVING, StopReason.INTERRUPTED)
                self._finish(StopReason.INTERRUPTED)
        except BaseException:  # also a native cancellation, which fails the run
            with self.lock:
                if self._phase in _SERVED or self._phase is _Phase.LEAVING:
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
        with anyio.move_on_after(self._shutdown_timeout) as scope:
            await self.flush()
            await self.sink.sync_to_disk()
        if scope.cancelled_caught:
            _logger.warning(
                "a checkpoint is committed before all records of its steps are written: %s has taken longer than the"
                " %s seconds of shutdown_timeout= for them",
                self.sink.name, self._shutdown_timeout,
            )  # fmt: skip

    async def run_ended(self, engine: Any, reason: StopReason, error: BaseException | None) -> None:  # noqa: ARG002 -- as Service has it
        """Write what still waits, report the end to the sink, and close it: in `shutdown_timeout` seconds and one more.

        A sink whose error failed the run is closed as well: what it wrote before that error is to be made safe.
        """
        if self._phase is _Phase.RUNNING:  # a run that found no data ends without an event
            self.end()
        with self.lock:
            if self._phase is _Phase.ENDING or (self._phase is _Phase.LEAVING and self._returned is None):
                self._phase = _Phase.CLOSING
        self._wake()
        if self._returned is not None:
            await self._returned.wait()  # one call of the sink at a time
        if self.sink.has_raised:
            await self._close(reason)
        await self._write_rest(_Phase.CLOSING, reason)
        self._finish(reason)

    def run_abandoned(self, engine: Any, reason: StopReason, error: BaseException | None) -> None:  # noqa: ARG002 -- as Service has it
        """Do not wait for the call of the sink that is under way. What is not written waits for the next run."""
        self._finish(reason)

    async def _write_rest(self, phase: _Phase, reason: StopReason) -> None:
        """While in this phase, write what still waits, report the end to the sink, and close it."""
        while self._phase is phase and not self.sink.has_raised:
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
            if self._phase is phase:  # a record came after the end was reported
                self._report_begin()

    async def _close(self, reason: StopReason) -> None:
        self._report_end(reason)
        await self.sink.close()

    def _finish(self, reason: StopReason) -> None:
        with self.lock:
            self._phase = _Phase.IDLE
        self._report_end(reason)
        self.sink.abandon()
        remove, self._remove = self._remove, None
        if remove is not None:
            remove()

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
        """Whether records up to this number wait, and the task will try: during the run not if the sink is down.

        Where the tracker is removed, also whether the sink is still to be closed.
        """
        with self.lock:
            if self._phase is _Phase.LEAVING:
                return True
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
                "%s, and of %d records for %s %d were dropped and %d not written: these %s",
                "the tracker is removed" if self._is_removed else "the run ends",
                buffer.taken, self.sink.name, buffer.dropped, buffer.waiting,
                "are lost" if self._is_removed else "wait for the next run of the engine, or are lost with the process",
            )  # fmt: skip

    def _report_begin(self) -> None:
        if self._listener is not None and not self._is_begin_reported:
            self._is_begin_reported = True
            self._listener.run_started(self._engine_name, date_of(perf_counter()))

    def _report_end(self, reason: StopReason) -> None:
        is_over = reason is not StopReason.INTERRUPTED or self._is_removed  # to this sink, at least
        if self._listener is not None and self._is_begin_reported and is_over:
            self._is_begin_reported = False
            ended_at, self._ended_at = self._ended_at, None
            self._listener.run_ended(self._engine_name, ended_at or date_of(perf_counter()), reason)

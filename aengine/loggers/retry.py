"""RetryingSink: calls one sink beside the step, warns when it fails, and tries again, in the time that it has."""

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeAlias, cast

import anyio
import anyio.to_thread

from aengine.callables import is_async_callable, is_awaitable, name_of
from aengine.loggers.scalars import resolve
from aengine.loggers.sink import Closable, Durable, Record, Sink, Write
from aengine.threads.dedicated import DedicatedThread

_logger = logging.getLogger("aengine.loggers")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 60.0
"""Seconds before a sink that failed is tried again: twice as many each time."""

_QUIET = 300.0
"""Seconds after a warning in which a sink that has recovered and fails again is not warned of again."""

_TIME_TO_CLOSE = 1.0
"""Seconds that closing a sink may take, even where the time at the end of the run is over."""

Call: TypeAlias = Callable[..., Awaitable[None]]


class RetryingSink:
    """A sink whose calls all end: its errors are reported and retried, and a call that hangs is abandoned in time.

    For one task at a time. Plain sinks are called in a thread of their own, a daemon: a server that is down may hold a
    call for minutes, and neither the end of the run nor that of the process waits for it. Times are those of
    `time.perf_counter()`, for they are read in the step's thread, too, where no event loop has a clock.

    Attributes:
        name: the sink's, for people.
        failures: calls that raised, or outlived the run.
        busy: seconds in the sink.
        has_raised: whether an error of it has failed the run.
        called_at: when it was last called to write.
        retry_at: when a sink that has failed may be called again; long ago, if it did not fail.
    """

    called_at: float
    retry_at: float

    def __init__(self, sink: Sink | Write, shutdown_timeout: float, *, must_raise: bool) -> None:
        anything: Any = sink
        self.name: str = name_of_sink(sink)
        self.failures: int = 0
        self.busy: float = 0.0
        self.has_raised: bool = False
        self.called_at = self.retry_at = -math.inf
        self._thread = DedicatedThread(f"aengine sink {self.name}")
        self._write = self._writer(sink.write if isinstance(sink, Sink) else sink)
        self._close = self._call_in_thread(anything.close) if isinstance(anything, Closable) else None
        self._sync: Callable[[], object] | None = anything.sync_to_disk if isinstance(anything, Durable) else None
        self._shutdown_timeout = shutdown_timeout
        self._must_raise = must_raise
        self._deadline = math.inf  # of all calls, once the run is ending
        self._scope: anyio.CancelScope | None = None  # of the call under way
        self._pause = 0.0  # before the next try; 0 if the last call did not fail
        self._quiet_until = -math.inf

    @property
    def is_well(self) -> bool:
        """Whether its last call to write did not fail."""
        return not self._pause

    @property
    def is_late(self) -> bool:
        """Whether its time at the end of the run is over."""
        return perf_counter() >= self._deadline

    def limit_time(self) -> None:
        """It is to end: from now on the sink has `shutdown_timeout` seconds, also for the call that is under way."""
        self._deadline = perf_counter() + self._shutdown_timeout
        if self._scope is not None:
            self._scope.deadline = _in_time_of_event_loop(self._deadline)

    def begin(self) -> None:
        """A run begins, or goes on: the time is unlimited again."""
        self._deadline, self.has_raised = math.inf, False

    async def write(self, batch: Sequence[Record]) -> bool:
        """Write these records. Returns False if the sink failed, or has no time any more: they are to be written later.

        During the run the sink is tried once. At the end of the run it is tried again until its time is over.

        Raises:
            Exception: what the sink raised, where that is to fail the run.
        """
        self.called_at = perf_counter()
        while not self.is_late:
            error = await self._try(lambda: self._write(batch), self._deadline)
            if error is None:
                if self._pause:
                    self._pause, self.retry_at = 0.0, -math.inf
                    _logger.info("%s works again, and gets what has been waiting", self.name)
                return True
            self._handle(error)
            if self._deadline == math.inf:
                return False
            remaining = self._deadline - perf_counter()
            if remaining < _FIRST_PAUSE:
                # A call that begins just before the deadline is abandoned, and may succeed all the same, in its thread:
                # the same records would then be written twice.
                self._deadline = perf_counter()
            else:
                await anyio.sleep(min(self._pause, remaining / 2))
        return False

    async def close(self) -> None:
        """Close the sink, if it wants to be closed."""
        if self._close is not None:
            deadline = perf_counter() + _TIME_TO_CLOSE
            if self._deadline != math.inf:
                deadline = max(deadline, self._deadline)
            if error := await self._try(self._close, deadline):
                self._handle(error)

    async def sync_to_disk(self) -> None:
        """Have what it has written on the disk, where it can do that. Also while it is called. An error is logged."""
        if self._sync is not None:
            try:
                limiter = anyio.CapacityLimiter(1)  # of its own: the application's threads stay free
                await anyio.to_thread.run_sync(self._sync, abandon_on_cancel=True, limiter=limiter)
            except Exception:
                _logger.exception("%s could not be synchronized to the disk", self.name)

    def abandon(self) -> None:
        """Let its thread end when the call that is under way does, without waiting. The next call has another."""
        self._thread.abandon()

    async def _try(self, function: Callable[[], Awaitable[None]], deadline: float) -> Exception | None:
        """Call the sink, and return what it raised."""
        began = perf_counter()
        try:
            with anyio.CancelScope(deadline=_in_time_of_event_loop(deadline)) as self._scope:
                await function()
                return None
        except Exception as error:  # noqa: BLE001 -- reported, or raised, by the caller
            return error
        finally:
            self._scope = None
            self.busy += perf_counter() - began
        return TimeoutError(f"{self.name} was still busy {self._shutdown_timeout} seconds after it was to end")

    def _handle(self, error: Exception) -> None:
        self.failures += 1
        if self._must_raise and not self.has_raised:  # one error is enough to fail the run: a second one is logged
            self.has_raised = True
            raise error
        now = perf_counter()
        if not self._pause:
            level = logging.WARNING if now >= self._quiet_until else logging.INFO
            _logger.log(level, "%s failed; it is tried again, and records wait meanwhile", self.name, exc_info=error)
            self._quiet_until = now + _QUIET
        self._pause = min(self._pause * 2 or _FIRST_PAUSE, _LONGEST_PAUSE)
        self.retry_at = now + self._pause

    def _writer(self, write: Write) -> Call:
        """Return the async form of it, which first waits for numbers that are still on a device, in the thread."""

        def read_and_write(batch: Sequence[Record]) -> Any:
            return write(_read_all(batch))

        if not is_async_callable(write):
            return self._call_in_thread(read_and_write)

        async def call(batch: Sequence[Record]) -> None:
            await cast(Awaitable[None], write(await self._thread.call(_read_all, batch)))

        return call

    def _call_in_thread(self, function: Callable[..., Any]) -> Call:
        """Return the async form of what may be plain."""
        if is_async_callable(function):
            return function

        async def call(*arguments: Any) -> None:
            result = await self._thread.call(function, *arguments)
            if is_awaitable(result):
                await result

        return call


def name_of_sink(sink: Any) -> str:
    """Return a name of a sink for people."""
    return name_of(sink) if hasattr(sink, "__qualname__") else repr(sink)


def _in_time_of_event_loop(deadline: float) -> float:
    return deadline if deadline == math.inf else anyio.current_time() + deadline - perf_counter()


def _read_all(batch: Sequence[Record]) -> list[Record]:
    return [replace(record, values=resolve(record.values)) for record in batch]

"""Patience: calls one sink beside the step, warns when it fails, tries again, and gives up when time is over."""

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeAlias, cast

import anyio

from aengine.callables import is_async_callable, is_awaitable, name_of
from aengine.loggers.scalars import resolve
from aengine.loggers.sink import Closable, Record, Sink, Write
from aengine.threads.dedicated import DedicatedThread

_logger = logging.getLogger("aengine.loggers")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 60.0
"""Seconds before a sink that failed is tried again: twice as many each time."""

_QUIET = 300.0
"""Seconds after a warning in which a sink that fails again, having recovered, is not warned of again."""

Call: TypeAlias = Callable[..., Awaitable[None]]


class RetryingSink:
    """A sink as the task sees it that writes to it, one call at a time: each call ends, though the sink may not.

    Attributes:
        name: the sink's, for people.
        failures: calls that raised, or outlived the run.
        busy: seconds in the sink.
        called_at: when it was last called to write, by `time.perf_counter()`.
        retry_at: when one that has failed may be called again; long ago, if it is well.
    """

    def __init__(self, sink: Sink | Write, linger: float, *, must_raise: bool) -> None:
        anything: Any = sink
        self.name = name_of(sink) if hasattr(sink, "__qualname__") else repr(sink)
        self.failures = 0
        self.busy = 0.0
        self.called_at = self.retry_at = -math.inf
        self._thread = DedicatedThread(f"aengine sink {self.name}")
        self._write = self._writer(sink.write if isinstance(sink, Sink) else sink)
        self._close = self._call_beside(anything.close) if isinstance(anything, Closable) else None
        self._linger = linger
        self._must_raise = must_raise
        self._deadline: float | None = None  # of the last words, once the run is ending
        self._scope: anyio.CancelScope | None = None  # of the call under way
        self._pause = 0.0  # before the next try; 0 while the sink is well
        self._quiet_until = -math.inf

    @property
    def is_well(self) -> bool:
        """Whether its last call to write was not in vain."""
        return not self._pause

    def limit_time(self) -> None:
        """The run is ending: it may linger from now on, unless it does so already."""
        if self._deadline is None:
            self._deadline = anyio.current_time() + self._linger
            if self._scope is not None:
                self._scope.deadline = self._deadline

    def unlimit_time(self) -> None:
        """The run goes on, or the next one begins. What is under way keeps its limit."""
        self._deadline = None

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return self._deadline is not None and anyio.current_time() >= self._deadline

    async def write(self, batch: Sequence[Record]) -> bool:
        """Write these, however often that takes. Returns False if they have to wait until it is called again.

        Raises:
            Exception: what the sink raised, where it was asked for that.
        """
        self.called_at = perf_counter()
        while error := await self._try(lambda: self._write(batch), self._deadline):
            self._meet(error)
            deadline = self._deadline
            left = 0.0 if deadline is None else deadline - anyio.current_time()
            if left < _FIRST_PAUSE:  # a call begun at the deadline is given up, and may yet be done: written twice
                await anyio.sleep(max(0.0, left))
                return False
            await anyio.sleep(min(self._pause, left / 2))
        if self._pause:
            self._pause, self.retry_at = 0.0, -math.inf
            _logger.info("%s works again, and gets what has been waiting", self.name)
        return True

    async def close(self) -> None:
        """Have it make safe what was written, if it wants to know."""
        if self._close is not None:
            moment, deadline = anyio.current_time() + 1, self._deadline  # a moment, even where all else took too long
            deadline = moment if deadline is None else max(deadline, moment)
            if error := await self._try(self._close, deadline):
                self._meet(error)

    def leave(self) -> None:
        """Let its thread end, when its call does. The next call has another."""
        self._thread.abandon()

    async def _try(self, function: Callable[[], Awaitable[None]], deadline: float | None) -> Exception | None:
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
            self.busy += perf_counter() - began
        return TimeoutError(f"{self.name} was still busy {self._linger} seconds after the end of the run")

    def _meet(self, error: Exception) -> None:
        self.failures += 1
        if self._must_raise:
            raise error
        now = perf_counter()
        if not self._pause:
            level = logging.WARNING if now >= self._quiet_until else logging.INFO
            _logger.log(level, "%s failed; it is tried again, and records wait meanwhile", self.name, exc_info=error)
            self._quiet_until = now + _QUIET
        self._pause = min(self._pause * 2 or _FIRST_PAUSE, _LONGEST_PAUSE)
        self.retry_at = now + self._pause

    def _writer(self, write: Write) -> Call:
        """Return what first reads the numbers that are still on a device: in a thread, too, for that may take long."""

        def read_and_write(batch: Sequence[Record]) -> Any:
            return write(_read_all(batch))

        if not is_async_callable(write):
            return self._call_beside(read_and_write)

        async def call(batch: Sequence[Record]) -> None:
            await cast(Awaitable[None], write(await self._thread.call(_read_all, batch)))

        return call

    def _call_beside(self, function: Callable[..., Any]) -> Call:
        """Return the async form of what may be plain."""
        if is_async_callable(function):
            return function

        async def call(*arguments: Any) -> None:
            result = await self._thread.call(function, *arguments)
            if is_awaitable(result):
                await result

        return call


def _read_all(batch: Sequence[Record]) -> list[Record]:
    return [replace(record, values=resolve(record.values)) for record in batch]

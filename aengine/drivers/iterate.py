"""Iteration: a run for people who keep their own `for`."""

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any

import anyio
import anyio.abc

from aengine.events import Event


class IterationStream:
    """A run whose caller is given each completed iteration, and has the loop wait for him.

    The body of the caller's `for` is part of the run, as an inline handler would be: what it raises fails the run, and
    leaving the block early terminates it.
    """

    def __init__(
        self,
        run: Callable[[], Awaitable[Any]],
        terminate: Callable[[], None],
        listen: Callable[[Any], Any],
        record: Callable[[], Event],
        loop_waits_for_task: Callable[[int | None], None],
    ) -> None:
        self._run = run
        self._terminate = terminate
        self._listen = listen
        self._record = record
        self._loop_waits_for_task = loop_waits_for_task  # told of the caller's task while the loop waits for it
        self._event: Event | None = None
        self._turn: anyio.Event  # the caller's: an event, or the end
        self._next: anyio.Event  # the loop's
        self._is_over = False
        self._is_left = False
        self._is_ahead_of_loop = False  # the caller has an event, and the loop waits for him
        self._error: BaseException | None = None
        self._group: anyio.abc.TaskGroup
        self._handle: Any = None

    async def __aenter__(self) -> AsyncIterator[Event]:
        self._turn, self._next = anyio.Event(), anyio.Event()
        self._handle = self._listen(self._wait_for_body)
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self._run_beside)
        return self

    def __aiter__(self) -> AsyncIterator[Event]:
        if self._handle is None:
            raise RuntimeError(
                "iterations are read inside their block:"
                " async with engine.iterate(...) as iterations: async for event in iterations: ..."
            )
        return self

    async def __anext__(self) -> Event:
        if self._is_ahead_of_loop:
            self._is_ahead_of_loop = False
            self._loop_waits_for_task(None)
            self._next.set()
        await self._turn.wait()
        event, self._event = self._event, None
        if event is None:
            await self._end()
            raise StopAsyncIteration
        self._turn = anyio.Event()
        self._is_ahead_of_loop = True
        self._loop_waits_for_task(anyio.get_current_task().id)
        return event

    async def __aexit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        self._is_left = True
        self._loop_waits_for_task(None)
        if (error is None or isinstance(error, Exception)) and not self._is_over:
            self._error = error  # raised inside the run, where the loop waits for the caller
            self._terminate()  # where it waits for something else, such as data
        elif error is not None:
            self._group.cancel_scope.cancel()
        self._next.set()
        try:
            await self._group.__aexit__(None, None, None)
        except BaseExceptionGroup as group:  # trio raises Ctrl-C in whatever waits, this task group too
            interrupts = group.subgroup((KeyboardInterrupt, SystemExit))
            if interrupts is None:
                raise
            raise interrupts.exceptions[0] from None
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a cancellation, after something had failed: that is raised, as by run()
            if self._error is None and not isinstance(error, Exception):
                raise
        finally:
            self._handle.remove()
        if error is None or (self._error is not None and self._error is not error):
            await self._end()  # beside an error of the body, it is a group of both

    async def _run_beside(self) -> None:
        try:
            await self._run()
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 -- raised in the caller's own task
            if error is not self._error:
                self._error = error
        finally:
            self._is_over = True
            self._turn.set()

    async def _wait_for_body(self) -> None:
        """Inline, when an iteration is completed: let the caller's body run before the next."""
        if self._is_left:
            self._leave()
            return
        self._event, self._next = self._record(), anyio.Event()
        self._turn.set()
        await self._next.wait()
        if self._is_left:
            self._leave()

    def _leave(self) -> None:
        """The caller's block was left: end the run as it was left."""
        if self._error is not None:
            raise self._error
        self._terminate()

    async def _end(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

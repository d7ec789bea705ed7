"""IterationStream: a run for users who keep their own `for`."""

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any

import anyio
import anyio.abc
from anyio.lowlevel import checkpoint

from aengine.drivers.session import Session
from aengine.errors import StrayCancellation
from aengine.events import Event, Events
from aengine.threads.event_loop import CancelOnceScope, OwnCancellations


class IterationStream:
    """A run that gives each completed iteration to a reader, and waits for it: what `engine.iterate()` returns.

    The body of the user's `for` is part of the run, as an inline handler would be: what it raises fails the run, and
    leaving the block early terminates it. The run has a task of its own, the body stays in the user's: the two take
    turns, by two events, so that only one of them is ever under way.
    """

    def __init__(self, engine: Any, run: Callable[[], Awaitable[Any]], session: Session) -> None:
        self._engine = engine
        self._run = run
        self._session = session
        self._event: Event | None = None
        self._body_may_go_on: anyio.Event  # set with an event for the body, and at the end of the run
        self._loop_may_go_on: anyio.Event
        self._is_over = False
        self._is_left = False
        self._is_cancelled = False  # the body is, or was interrupted by Ctrl-C
        self._loop_waits = False  # the body has an event, and the loop waits for it
        self._error: BaseException | None = None  # the run's, or the body's: raised once, in the user's task
        self._group: anyio.abc.TaskGroup
        self._scope: CancelOnceScope
        self._own_cancellations: OwnCancellations
        self._handle: Any = None

    async def __aenter__(self) -> AsyncIterator[Event[Any]]:
        self._body_may_go_on, self._loop_may_go_on = anyio.Event(), anyio.Event()
        self._scope, self._own_cancellations = CancelOnceScope(math.inf), OwnCancellations()
        self._handle = self._engine.add_event_handler(Events.ITERATION_COMPLETED, self._wait_for_body)
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self._run_to_its_end)
        return self

    def __aiter__(self) -> AsyncIterator[Event]:
        if self._handle is None:
            raise RuntimeError(
                "iterations are read inside their block:"
                " async with engine.iterate(...) as iterations: async for event in iterations: ..."
            )
        return self

    async def __anext__(self) -> Event:
        if self._loop_waits:
            self._loop_waits = False
            self._session.wait_for_body(None)
            self._loop_may_go_on.set()
        await self._body_may_go_on.wait()
        event, self._event = self._event, None
        if event is None:
            self._raise_error()
            raise StopAsyncIteration
        self._body_may_go_on = anyio.Event()
        self._loop_waits = True
        self._session.wait_for_body(anyio.get_current_task().id)
        return event

    async def __aexit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        self._leave(error)
        try:
            await self._group.__aexit__(None, None, None)
        except BaseExceptionGroup as group:  # trio raises Ctrl-C in whatever waits, in this task group too
            interrupts = group.subgroup((KeyboardInterrupt, SystemExit))
            if interrupts is None:
                raise
            raise interrupts.exceptions[0] from None
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a cancellation, after something had failed: the failure is raised, as by run()
            if self._error is None and not isinstance(error, Exception):
                raise
        finally:
            self._handle.remove()
            failure, self._error = self._error, None  # whose traceback holds this, where it is the body's
        try:
            if failure is not None and failure is not error:
                raise failure  # beside an error of the body, it is a group of both
        finally:
            del failure  # whose traceback holds this frame: no cycle may hold the engine

    def _leave(self, error: BaseException | None) -> None:
        """The body is left, with this error: end the run in the same way."""
        self._is_left = True
        self._session.wait_for_body(None)
        if error is not None and not self._own_cancellations.includes(error):
            stray = StrayCancellation(
                "something that the body of iterate() awaited was cancelled, but the body was not: the cause says where"
            )
            stray.__cause__, error = error, stray
        if (error is None or isinstance(error, Exception)) and not self._is_over:
            self._error = error  # raised inside the run, where the loop waits for the body
            self._engine.terminate()  # where the loop waits for something else, such as data
        elif error is not None:
            self._is_cancelled = True
            if anyio.current_effective_deadline() == -math.inf or isinstance(error, KeyboardInterrupt | SystemExit):
                self._group.cancel_scope.cancel()
            else:  # natively: once, so that the user's code can clean up
                self._scope.cancel()
        self._loop_may_go_on.set()

    async def _run_to_its_end(self) -> None:
        try:
            with self._scope:
                await self._run()
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 -- raised in the user's own task
            if error is not self._error:
                self._error = error
        finally:
            self._is_over = True
            self._body_may_go_on.set()

    async def _wait_for_body(self) -> None:
        """Let the user's body run before the next iteration. An inline handler of ITERATION_COMPLETED."""
        if not self._is_left:
            self._event, self._loop_may_go_on = self._session.record_iteration(), anyio.Event()
            self._body_may_go_on.set()
            await self._loop_may_go_on.wait()
        if self._is_cancelled:
            await checkpoint()  # a turn, in which the run sees that it is cancelled, and ends before its next step
        elif self._is_left:  # the block was left: end the run in the same way
            if self._error is not None:
                raise self._error
            self._engine.terminate()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # whose traceback holds this frame: no cycle may hold the engine

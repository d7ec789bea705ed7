"""What a source needs of the run that reads it, and data that is an async context manager."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import anyio

from aengine.errors import StrayCancellation
from aengine.threads.event_loop import CancelOnceScope, EventLoopHandle, ThreadSafeEvent
from aengine.threads.guarded import guarded
from aengine.threads.thread_state import ThreadState

NOT_ENTERED = object()
"""Stands for what is iterated until a context manager is entered."""


@dataclass(frozen=True, slots=True)
class RunContext:
    """The run on an event loop, as its source sees it."""

    loop_handle: EventLoopHandle
    spawn: Callable[[Callable[[], Any], Callable[[], Any]], None]  # a task, and what to call if it never starts
    fail: Callable[[BaseException], None]  # with an error that no wait of the loop would raise
    settings: ThreadState  # of the thread that called `run()`
    prefetch: int  # how many batches to pull ahead; 0 for none
    can_use: Callable[[int], bool]  # given for how many iterations batches were fetched: whether it can use one more
    grace: float  # seconds that clean-up may take


class ManagedData:
    """Data that is an async context manager: entered, held open and exited in one task of a run.

    It has a task of its own because a task group inside it may fail, which cancels the task that entered it. If that
    were the loop's task, a step would be cancelled. This one hands the error to the run, wherever the loop stands.
    """

    def __init__(self, manager: Any, run: RunContext) -> None:
        self._manager = manager
        self._run = run
        self._value: Any = None
        self._error: BaseException | None = None
        self._entered, self._released, self._exited = (ThreadSafeEvent(run.loop_handle) for _ in range(3))
        self._scope = CancelOnceScope(run.grace, shield=True)

    async def enter(self) -> Any:
        """Enter it, and stay inside until `exit()`. Returns what to iterate: what entering gave, else the manager.

        Cancellable: then it is not entered.

        Raises:
            BaseException: what entering it raised.
        """
        self._run.spawn(self._hold_open, self._never_started)
        await self._wait(self._entered)
        return self._manager if self._value is None else self._value

    async def exit(self) -> None:
        """Exit it, and wait for that. A cancellation makes it exit at once.

        Raises:
            BaseException: what exiting it raised.
        """
        self._released.set()
        await self._wait(self._exited)

    async def _wait(self, event: ThreadSafeEvent) -> None:
        try:
            await event.wait()
        except BaseException:
            self._scope.cancel()
            with anyio.CancelScope(shield=True):  # the task must not outlive the run
                await self._exited.wait()
            raise
        # Taken out: an error that stays here would hold its traceback, and so the engine.
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error

    async def _hold_open(self) -> None:
        async def hold_open() -> None:
            with self._scope:
                async with self._manager as self._value:
                    self._entered.set()
                    await self._released.wait()

        await guarded(hold_open, self._hand_over, _stray)
        self._entered.set()
        self._exited.set()

    def _never_started(self) -> None:
        self._hand_over(_stray())
        self._entered.set()
        self._exited.set()

    def _hand_over(self, error: BaseException) -> None:
        error = _only(error)
        if self._entered.is_set and not self._released.is_set:
            self._run.fail(error)
        else:  # `enter()` or `exit()` waits, and raises it
            self._error = error


def _stray() -> StrayCancellation:
    return StrayCancellation("the task in which the data is entered was cancelled from outside the run")


def _only(error: BaseException) -> BaseException:
    """Unwrap what a task group made of a single error."""
    while isinstance(error, BaseExceptionGroup):
        inner = cast(BaseExceptionGroup[BaseException], error).exceptions
        if len(inner) != 1:
            break
        error = inner[0]
    return error

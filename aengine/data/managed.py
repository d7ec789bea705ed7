"""Host: what a source needs of the run that uses it: where to pull ahead, and a task to live in."""

from collections.abc import Callable
from typing import Any, cast

import anyio

from aengine.errors import StrayCancellation
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent
from aengine.threads.thread_state import ThreadState


class RunContext:
    """The run, as its source sees it.

    Attributes:
        home: the run's event loop.
        spawn: starts a task of the run's, from any thread; given also what to call if the task never begins.
        settings: torch's settings of the thread that called `run()`.
        prefetch: how many batches to pull ahead; 0 for none.
        grace: seconds that clean-up may take.
        can_use: given of how many iterations the batches were fetched, says whether the run can use one more.
    """

    def __init__(
        self,
        loop_handle: EventLoopHandle,
        spawn: Callable[[Callable[[], Any], Callable[[], Any]], None],
        fail: Callable[[BaseException], None],
        settings: ThreadState,
        prefetch: int,
        can_use: Callable[[int], bool],
        grace: float,
    ) -> None:
        self.loop_handle = loop_handle
        self.spawn = spawn
        self.settings = settings
        self.prefetch = prefetch
        self.can_use = can_use
        self.grace = grace
        self._fail = fail
        self._task: ContextTask | None = None

    async def enter(self, manager: Any) -> Any:
        """Enter an async context manager in a task of its own, and stay there until `leave()`.

        A task of its own, because tasks that it starts may fail: then its own task is cancelled and raises, and the run
        is told, wherever the loop stands. Returns what is to be iterated: what it gave, or, if nothing, itself.

        Raises:
            BaseException: what entering it raised.
        """
        task = self._task = ContextTask(manager, self.loop_handle, self._fail)
        self.spawn(task.run, task.never_started)
        try:
            await task.entered.wait()
        except BaseException:
            task.scope.cancel()  # it has not entered, so there is nothing to exit
            with anyio.CancelScope(shield=True):
                await task.exited.wait()
            self._task = None
            raise
        if task.error is not None:
            self._task = None  # it has not entered, so there is nothing to exit
        task.raise_error()
        return manager if task.value is None else task.value

    async def leave(self) -> None:
        """Have it exit, and wait for that; a cancellation makes it exit now.

        Raises:
            BaseException: what exiting it raised.
        """
        task, self._task = self._task, None
        if task is None:
            return
        task.release.set()
        try:
            await task.exited.wait()
        except BaseException:
            task.scope.cancel()
            with anyio.CancelScope(shield=True):
                await task.exited.wait()
            raise
        task.raise_error()


class ContextTask:
    """The task in which an async context manager is entered, iterated beside, and exited."""

    def __init__(self, manager: Any, loop_handle: EventLoopHandle, fail: Callable[[BaseException], None]) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.entered, self.release, self.exited = (
            ThreadSafeEvent(loop_handle),
            ThreadSafeEvent(loop_handle),
            ThreadSafeEvent(loop_handle),
        )
        self.scope = anyio.CancelScope(shield=True)
        self._manager = manager
        self._fail = fail

    async def run(self) -> None:
        """The task: enter it, say so, and stay inside until released."""
        try:
            with self.scope:
                async with self._manager as self.value:
                    self.entered.set()
                    await self.release.wait()
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 -- handed over
            self._hand_over(_only(error))
        except BaseException as error:  # noqa: BLE001 -- likewise; its own cancellation its scope would have kept
            stray = _stray()
            stray.__cause__ = error
            self._hand_over(stray)
            del stray
        finally:
            self.entered.set()
            self.exited.set()

    def never_started(self) -> None:
        """The task was cancelled natively before its first step."""
        self._hand_over(_stray())
        self.entered.set()
        self.exited.set()

    def raise_error(self) -> None:
        """Raise what entering or exiting raised, once."""
        # Taken out: an error that stays here would hold its traceback, and so the engine.
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error

    def _hand_over(self, error: BaseException) -> None:
        if self.entered.is_set and not self.release.is_set:
            self._fail(error)
        else:  # somebody waits for it
            self.error = error


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

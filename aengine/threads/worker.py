"""WorkItem: one call on a run's worker thread, and how it has something awaited on the event loop meanwhile.

With a plain step the loop is advanced on the worker, a work item at a time: from one thing that must be awaited to the
next. The task that waits for a work item is not let go before the item has ended, since nothing can stop a torch step.
"""

from collections.abc import Awaitable, Callable
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any

import anyio

from aengine.errors import StrayCancellation
from aengine.threads.event_loop import EventLoopHandle, Interrupts, ThreadSafeEvent
from aengine.threads.from_thread import WayBack
from aengine.threads.thread_state import SharedContext

_LOOK = 1.0
"""Seconds from one look to the next whether the event loop that is waited for has ended."""


class WorkItem:
    """One call on the worker. While it lasts it can have things awaited on the event loop; then it has an outcome.

    Two threads share it, and take turns instead of a lock. The worker writes `result`, `error` and `done`, or `_wanted`
    and `_answers`, before it sets `_wakeup`; the event loop's thread reads them after that. Having asked for something,
    the worker touches nothing until it is answered, so the event loop's thread may replace `_wakeup` meanwhile.
    """

    __slots__ = (
        "_abandoned_by", "_answers", "_cancellation", "_contexts", "_is_left", "_loop_handle", "_of_task", "_of_worker",
        "_wakeup", "_wanted", "arguments", "done", "error", "function", "result",
    )  # fmt: skip

    def __init__(
        self, loop_handle: EventLoopHandle, contexts: SharedContext, function: Callable[..., Any], *arguments: Any
    ) -> None:
        self.function: Callable[..., Any] = function
        self.arguments: tuple[Any, ...] = arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.done: bool = False
        self._loop_handle = loop_handle
        self._contexts = contexts
        self._of_task = self._of_worker = copy_context()  # what each side had set when it handed over last
        self._wakeup = ThreadSafeEvent(loop_handle)
        self._wanted: Awaitable[Any] | None = None
        self._answers: SimpleQueue[tuple[Any, BaseException | None]] | None = None
        self._abandoned_by: BaseException | None = None
        self._is_left = False
        self._cancellation: BaseException | None = None  # that of the task that waits, while the call still lasts

    def run(self) -> bool:
        """Make the call, keep its outcome, and wake the task that waits for it. On the worker.

        Returns False where the event loop of that task has ended, so that nothing is left that would stop the thread.
        """
        try:
            if (contexts := self._contexts).of_worker.is_behind(self._of_task):
                contexts.context.run(contexts.of_worker.follow, self._of_task)
            self.result = contexts.context.run(self.function, *self.arguments)
        except BaseException as error:  # noqa: BLE001 -- every outcome is handed over, none is swallowed
            self.error = error
        self.arguments = ()  # an error that was thrown into the loop, whose traceback holds this frame
        self._of_worker = self._contexts.context.copy()
        del self.function  # it holds the loop, and this thread holds the item for a moment after the task has gone on
        is_heard = not (self._loop_handle.is_of_asyncio and self._loop_handle.is_closed)
        self.done = True
        self._wakeup.set()
        return is_heard

    def call_in_loop(self, wanted: Awaitable[Any]) -> Any:
        """Have the task that waits for this call await `wanted`, and block until it has. On the worker, in the call.

        Raises:
            BaseException: what `wanted` raised; or the cancellation of that task, and then `wanted` was not awaited.
        """
        answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._of_worker = self._contexts.context.copy()
        self._answers = answers
        self._wanted = wanted
        # Written first, then this read; _abandon() does the opposite, so that at least one of the two sees the other.
        if self._abandoned_by is not None:
            close_unawaited(wanted)
            raise self._abandoned_by
        self._wakeup.set()
        while True:
            try:
                result, error = answers.get(timeout=_LOOK)
                break
            except Empty:
                if self._loop_handle.is_closed:
                    close_unawaited(wanted)
                    raise StrayCancellation("the event loop in which this was to be awaited is closed") from None
        if self._contexts.of_worker.is_behind(self._of_task):
            self._contexts.of_worker.follow(self._of_task)
        if error is not None:
            raise error
        return result

    def check_cancelled(self) -> None:
        """Raise the cancellation of the task that waits for this call, if it was cancelled. On the worker."""
        if (cancellation := self._cancellation) is not None:
            raise cancellation

    async def wait(
        self, on_cancel: Callable[[], None], explain: Callable[[BaseException], BaseException] = lambda error: error
    ) -> None:
        """Wait for the end of the call, and await meanwhile what it asks for. On the event loop's thread.

        On a cancellation (or Ctrl-C, also one that is raised by what is awaited here) `on_cancel` is called: it is to
        make the call end soon. If the call waits for something, the cancellation is raised in it. It is raised here
        only when the call has ended, or is abandoned: by a second cancellation, or by a Ctrl-C after the first one.

        `explain` returns what is to be raised in the call for a cancellation that is raised by what is awaited here:
        another error, if that is not the cancellation of this task.
        """
        cancellation: BaseException | None = None
        interrupts: Interrupts | None = None
        try:
            while True:
                if cancellation is not None and interrupts is None:
                    interrupts = Interrupts.here()
                    interrupts.add(self._leave)
                try:
                    with anyio.CancelScope(shield=cancellation is not None):
                        await self._wakeup.wait()
                except BaseException as error:
                    if cancellation is not None:  # a second Ctrl-C: the user no longer wants to wait
                        self._abandon(error)
                        raise
                    cancellation = self._cancellation = error
                    on_cancel()
                    continue
                if self._is_left and cancellation is not None and not self.done:
                    self._abandon(cancellation)
                    raise cancellation
                if self._contexts.of_task.is_behind(self._of_worker):
                    self._contexts.of_task.follow(self._of_worker)
                if self.done:
                    break
                cancellation = await self._answer(cancellation, on_cancel, explain)
            if cancellation is not None:
                raise cancellation
        finally:
            if interrupts is not None:
                interrupts.remove(self._leave)
            self._cancellation = None
            del cancellation  # whose traceback holds this frame

    async def _answer(
        self,
        cancellation: BaseException | None,
        on_cancel: Callable[[], None],
        explain: Callable[[BaseException], BaseException],
    ) -> BaseException | None:
        """Await what the call asks for, and let it go on. Returns the cancellation, if there has been one by now."""
        wanted, answers = self._wanted, self._answers
        assert wanted is not None and answers is not None, "set without being done"  # noqa: PT018, S101
        self._wanted, self._wakeup = None, ThreadSafeEvent(self._loop_handle)
        if cancellation is not None:
            close_unawaited(wanted)
            answers.put((None, cancellation))
            return cancellation
        try:
            result = await wanted
            self._of_task = copy_context()
            answers.put((result, None))
        except Exception as error:  # noqa: BLE001 -- raised again where it was awaited, inside the call
            answers.put((None, error))
        except BaseException as error:  # noqa: BLE001 -- likewise; and it goes on here when the call has ended
            if isinstance(reason := explain(error), Exception):
                answers.put((None, reason))
                return None
            on_cancel()  # before the answer: a step that catches what it is answered must not be followed by another
            answers.put((None, error))
            return error
        return None

    def _leave(self) -> None:
        """The user no longer wants to wait. On the event loop's thread."""
        self._is_left = True
        self._wakeup.set()

    def _abandon(self, error: BaseException) -> None:
        """Have the call wait for nothing any more: no task is left that would answer."""
        self._abandoned_by = error
        if (wanted := self._wanted) is not None and (answers := self._answers) is not None:
            close_unawaited(wanted)
            answers.put((None, error))


class WorkerWayBack(WayBack):
    """On the worker of a run: what is called runs in the task of the run, and is cancelled with it.

    Attributes:
        item: what the worker does for this run now.
    """

    item: WorkItem | None = None

    def run_async_from_thread(self, function: Callable[..., Any], args: tuple[Any, ...], token: object) -> Any:
        """Have `function(*args)` awaited, and block until it has been."""
        if self.item is None:  # a step that was abandoned
            return super().run_async_from_thread(function, args, token)

        async def call() -> Any:
            return await function(*args)

        return self.item.call_in_loop(call())

    def run_sync_from_thread(self, function: Callable[..., Any], args: tuple[Any, ...], token: object) -> Any:
        """Have `function(*args)` called on the event loop's thread, and block until it has been."""
        if self.item is None:
            return super().run_sync_from_thread(function, args, token)

        async def call() -> Any:
            return function(*args)

        return self.item.call_in_loop(call())

    def check_cancelled(self) -> None:
        """Raise the cancellation of the run, which waits for the step, if it was cancelled."""
        if self.item is not None:
            self.item.check_cancelled()


def close_unawaited(wanted: object) -> None:
    """Give up a coroutine that will not be awaited, without Python's warning that it was not."""
    getattr(wanted, "close", lambda: None)()

"""One thread for what blocks, and the way back from it. The only file that knows that there are two backends.

A running engine owns one worker. The loop is advanced on it a slice at a time: from one thing that must be awaited to
the next. Whoever waits for a slice is not let go before the slice has ended, for nothing can stop a torch step.
"""

from collections.abc import Awaitable, Callable
from contextvars import Context
from queue import SimpleQueue
from typing import Any

import anyio

from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent


class WorkItem:
    """One call on the worker. While it lasts it can have things awaited at home; at its end it has a result."""

    __slots__ = (
        "_answers",
        "_context",
        "_loop_handle",
        "_wakeup",
        "_wanted",
        "arguments",
        "done",
        "error",
        "function",
        "result",
    )

    def __init__(
        self, loop_handle: EventLoopHandle, context: Context, function: Callable[..., Any], *arguments: Any
    ) -> None:
        self.function = function
        self.arguments = arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False
        self._loop_handle = loop_handle
        self._context = context
        self._wakeup = ThreadSafeEvent(loop_handle)
        self._wanted: Awaitable[Any] | None = None
        self._answers: SimpleQueue[tuple[Any, BaseException | None]] | None = None

    def run(self) -> None:
        """On the worker: make the call, keep its outcome, and wake who waits for it."""
        try:
            self.result = self._context.run(self.function, *self.arguments)
        except BaseException as error:  # noqa: BLE001 -- every outcome is handed over, none is swallowed
            self.error = error
        self.done = True
        self._wakeup.set()

    def call_in_loop(self, wanted: Awaitable[Any]) -> Any:
        """On the worker, inside the call: have `wanted` awaited at home, and block until it is."""
        self._answers = SimpleQueue()
        self._wanted = wanted
        self._wakeup.set()
        result, error = self._answers.get()
        if error is not None:
            raise error
        return result

    async def wait(self, on_cancel: Callable[[], None]) -> None:
        """At home: wait for the end of the call, and await meanwhile what it calls home for.

        A cancellation calls `on_cancel`, which is to make the call end soon; is handed to what the call waits for;
        and goes on when the call has ended, not before.
        """
        cancellation: BaseException | None = None
        try:
            while True:
                try:
                    with anyio.CancelScope(shield=cancellation is not None):
                        await self._wakeup.wait()
                except BaseException as error:
                    if cancellation is not None:  # a second Ctrl-C: the user no longer wants to wait
                        raise
                    cancellation = error
                    on_cancel()
                    continue
                if self.done:
                    break
                cancellation = await self._answer(cancellation)
            if cancellation is not None:
                raise cancellation
        finally:
            del cancellation  # whose traceback holds this frame

    async def _answer(self, cancellation: BaseException | None) -> BaseException | None:
        wanted, answers, self._wakeup = self._wanted, self._answers, ThreadSafeEvent(self._loop_handle)
        assert wanted is not None and answers is not None, "rung without being done"  # noqa: PT018, S101
        if cancellation is not None:
            getattr(wanted, "close", lambda: None)()
            answers.put((None, cancellation))
            return cancellation
        try:
            answers.put((await wanted, None))
        except Exception as error:  # noqa: BLE001 -- raised again where it was awaited, inside the call
            answers.put((None, error))
        except BaseException as error:  # noqa: BLE001 -- likewise; and it goes on here when the call has ended
            answers.put((None, error))
            return error
        return None

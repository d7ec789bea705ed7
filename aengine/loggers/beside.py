"""Beside: a thread for the calls of one sink, which nobody has to wait for when a call does not come back."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent
from aengine.threads.thread_state import context_for_thread

T = TypeVar("T")

_Calls: TypeAlias = "SimpleQueue[Callable[[], object] | None]"


class Beside:
    """Calls plain functions in a thread of its own, one at a time.

    A daemon: a server that is down may keep a call for minutes, and with one of anyio's threads the interpreter, under
    asyncio, would wait for that before it ends. It is kept from call to call, until `leave`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: _Calls | None = None

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call this, and return or raise what it does. On cancellation it is left to itself, and so is the thread."""
        if self._calls is None:
            self._calls = SimpleQueue()
            threading.Thread(target=_work, args=(self._calls,), name=self._name, daemon=True).start()
        outcome: Future[T] = Future()
        wakeup = ThreadSafeEvent(EventLoopHandle())
        self._calls.put(partial(_perform, partial(context_for_thread().run, function, *arguments), outcome, wakeup))
        try:
            await wakeup.wait()
        except BaseException:
            self.leave()
            raise
        return outcome.result()

    def leave(self) -> None:
        """Let the thread end, when its call does. The next call has another."""
        calls, self._calls = self._calls, None
        if calls is not None:
            calls.put(None)


def _work(calls: _Calls) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # while waiting for the next, keep no reference to what it holds


def _perform(call: Callable[[], T], outcome: "Future[T]", wakeup: ThreadSafeEvent) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:  # noqa: BLE001 -- every outcome is handed over, none is swallowed
        outcome.set_exception(error)
    wakeup.set()

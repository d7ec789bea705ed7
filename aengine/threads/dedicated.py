"""DedicatedThread: a thread of one's own for plain calls that may block for long, or never return."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import Context
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent
from aengine.threads.from_thread import WayBack, way_back
from aengine.threads.thread_state import context_for_thread

T = TypeVar("T")

_Calls: TypeAlias = "SimpleQueue[Callable[[], object] | None]"


class DedicatedThread:
    """Makes plain calls on a thread of its own, one at a time, in order.

    The thread is started when the first call is submitted, kept between calls, and ended by `stop()` or `abandon()`; a
    call after that starts another. Its methods are for one thread at a time: nothing here is locked.

    It is a daemon thread: a call that never returns must not keep the process from ending. One of anyio's worker
    threads would: under asyncio the interpreter joins those before it exits.

        thread = DedicatedThread("sink")
        await thread.call(sink.write, records)   # waits; a cancellation leaves the call, and its thread, behind
        future = thread.submit(sink.close)       # does not wait
        await wait_until_done(future)            # in any task, in several; a cancellation leaves the call alone
        thread.stop()
    """

    __slots__ = ("_calls", "_context", "_entering", "_ident", "_name", "_thread")

    def __init__(
        self, name: str, *entering: Callable[[], AbstractContextManager[None]], context: Context | None = None
    ) -> None:
        """Give the thread a name, what it is to enter as it begins, in this order, and a context for what is submitted.

        Without one, each call that is submitted has a copy of its caller's.
        """
        self._name = name
        self._entering = entering
        self._context = context
        self._calls: _Calls | None = None
        self._thread: threading.Thread | None = None
        self._ident: int | None = None

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call this on the thread, in the caller's context, and return or raise what it does.

        On cancellation the call is left to end by itself, and so is its thread: the next call has another.
        """
        future = self.submit(function, *arguments)
        try:
            await wait_until_done(future)
            return future.result()
        except BaseException:
            if not future.done():
                self.abandon()
            raise
        finally:
            del future  # holds the error, whose traceback holds this frame

    def submit(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Have this called on the thread after the calls before it, in the caller's context. Does not wait.

        In it, `anyio.from_thread` leads to the event loop of the caller.
        """
        future: Future[T] = Future()
        context = context_for_thread() if self._context is None else self._context
        self.post(partial(_run, future, partial(context.run, function, *arguments), way_back()))
        return future

    def post(self, call: Callable[[], object]) -> None:
        """Have this called on the thread after the calls before it. It must not raise, and has no context of its own.

        For what keeps its outcome itself, and is submitted too often for a future and a context each time.
        """
        calls = self._calls
        if calls is None:
            calls = self._calls = SimpleQueue()
            self._thread = threading.Thread(target=_work, args=(calls, self._entering), name=self._name, daemon=True)
            self._thread.start()
            self._ident = self._thread.ident  # before the first call is put, which may ask for `is_here`
        calls.put(call)

    @property
    def is_here(self) -> bool:
        """Whether the caller runs on this thread; also on the one that was abandoned last."""
        return threading.get_ident() == self._ident

    def stop(self) -> None:
        """Let the thread end after its calls, and block until it has: some 50 µs if it is idle."""
        self.abandon()
        thread, self._thread, self._ident = self._thread, None, None  # another thread may get the same ident
        if thread is not None:
            thread.join()

    def abandon(self) -> None:
        """Let the thread end after its calls, if they ever return, and do not wait for that."""
        calls, self._calls = self._calls, None
        if calls is not None:
            calls.put(None)


async def wait_until_done(future: "Future[Any]") -> None:
    """Wait in a task until a submitted call has returned or raised. Cancellable; the call goes on."""
    wakeup = ThreadSafeEvent(EventLoopHandle())
    future.add_done_callback(lambda _: wakeup.set())
    await wakeup.wait()


def _work(calls: _Calls, entering: Iterable[Callable[[], AbstractContextManager[None]]]) -> None:
    with ExitStack() as entered:
        for enter in entering:
            entered.enter_context(enter())
        while (call := calls.get()) is not None:
            call()
            del call  # while waiting for the next, keep no reference to a batch, an output or what else it holds


def _run(future: "Future[T]", call: Callable[[], T], back: WayBack | None) -> None:
    try:
        with nullcontext() if back is None else back.entered():
            result = call()
    except BaseException as error:  # noqa: BLE001 -- every outcome is handed over, none is swallowed
        future.set_exception(error)
        del future  # the error's traceback holds this frame
    else:
        future.set_result(result)

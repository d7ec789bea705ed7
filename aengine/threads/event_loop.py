"""An event loop as seen from any thread. The only file that knows that there are two backends."""

import math
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from contextvars import Context, copy_context
from functools import partial, wraps
from types import FrameType, TracebackType
from typing import Any, Self, cast

import anyio
import anyio.abc
from anyio.lowlevel import EventLoopToken, RunVar, current_token


class EventLoopHandle:
    """An event loop and its thread, to have things called there. Made on that thread, used from any.

    Attributes:
        thread: the identifier of the event loop's thread.
        token: anyio's name of the event loop.
        turn: `await turn()` gives other tasks one turn. Cancellable.
    """

    __slots__ = ("_context", "_is_asyncio", "_native", "_post", "thread", "token", "turn")

    def __init__(self) -> None:
        self.token: EventLoopToken = current_token()
        native: Any = self.token.native_token
        self._native = native
        self._is_asyncio = hasattr(native, "call_soon_threadsafe")
        self._post: Callable[..., object] = native.call_soon_threadsafe if self._is_asyncio else native.run_sync_soon
        # What anyio's checkpoint() does, without finding out each time which event loop this is: a fifth of a turn.
        self.turn: Callable[[], Awaitable[None]] = (
            partial(sys.modules["asyncio"].sleep, 0) if self._is_asyncio else sys.modules["trio"].lowlevel.checkpoint
        )
        # Callbacks run in a context of this thread. By default it would be that of the thread that posts them, where
        # sniffio says that no event loop runs, so that anyio's calls would fail in them.
        self._context = copy_context()
        self.thread: int = threading.get_ident()

    @property
    def is_of_asyncio(self) -> bool:
        """Whether this is asyncio's, or one like it, and not trio's."""
        return self._is_asyncio

    def is_same(self, other: "EventLoopHandle") -> bool:
        """Whether the other one is of the same event loop."""
        return self._post == other._post  # noqa: SLF001 -- another of this class

    @property
    def is_closed(self) -> bool:
        """Whether the event loop has ended for good. From any thread; on trio it wakes the event loop."""
        if self._is_asyncio:
            return bool(self._native.is_closed())
        try:
            self._post(int)
        except RuntimeError:  # trio's RunFinishedError
            return True
        return False

    @property
    def is_here(self) -> bool:
        """Whether this is the event loop's thread."""
        return threading.get_ident() == self.thread

    def current_task(self) -> int:
        """Return the `id` that anyio gives the running task, in a third of the time. On the event loop's thread."""
        module = sys.modules["asyncio"] if self._is_asyncio else sys.modules["trio"].lowlevel
        return id(module.current_task())

    def call(self, function: Callable[[], object]) -> None:
        """Call `function` on the event loop's thread: now if this is it, else soon. Never waits.

        Raises what it raises, if it is called now. On an event loop that has ended nothing is called.
        """
        if self.is_here:
            try:
                function()
            except RuntimeError:
                if not self.is_closed:
                    raise
        else:
            self.post(function)

    def post(self, function: Callable[[], object]) -> None:
        """Call `function` on the event loop's thread, soon. From any thread, and from signal handlers. Never raises.

        Also on the event loop's own thread this wakes the event loop, which `call_soon` does not: a signal handler
        interrupts `select()`, and Python resumes that afterwards unless something has woken it.
        """
        try:
            # A copy for each call, since a context that is entered cannot be entered again.
            self._post(partial(self._context.copy().run, function))
        except RuntimeError:  # the event loop has ended (trio's RunFinishedError is one too), and its tasks with it
            return

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call `function` in the next turn of the event loop. On its thread: asyncio is not woken by this."""
        if self._is_asyncio:
            self._native.call_soon(function, context=self._context)
        else:
            self._post(function)

    @property
    def call_later(self) -> Callable[[float, Callable[[], object]], object]:
        """What calls a function, which must not raise, in so many seconds. On the event loop's thread.

        It may outlive the run that gets it, and so it holds no context: in that there may be a run, and its engine.
        """
        return partial(self._native.call_later, context=Context()) if self._is_asyncio else _call_later_on_trio

    def start(
        self,
        group: "anyio.abc.TaskGroup",  # whose module loads others when it is asked for it
        function: Callable[[], Awaitable[object]],
        on_never_started: Callable[[], object],
        *,
        name: str | None = None,
    ) -> None:
        """Start a task. On the event loop's thread.

        If the task is cancelled natively before its first step, `on_never_started` is called in its place: such a task
        does not run a line, not even a `finally`, so that whatever waits for its end would wait for ever.
        """
        has_started = False

        @wraps(function)
        async def task() -> None:
            nonlocal has_started
            has_started = True
            await function()

        def look() -> None:
            if not has_started:
                on_never_started()

        group.start_soon(task, name=name)
        if self._is_asyncio:
            # A new task's first step is scheduled by start_soon(), and what is called soon after it comes after it. By
            # then the task has started, or it never will. On trio every task starts, cancelled or not.
            self.call_soon(look)

    @contextmanager
    def woken_by_signals(self) -> Generator[None]:
        """Have signals wake this event loop, so that their handlers are called at once. In the main thread.

        Python calls a signal's handler between two bytecodes of the main thread. A signal that comes just before
        `select()` does not interrupt it, and its handler would wait until something else does. So the interpreter is
        given a file descriptor to write to at each signal, and the event loop reads its other end. trio and uvloop
        have one already; asyncio has one on Windows, and elsewhere from its first `add_signal_handler()` on.
        """
        before = signal.set_wakeup_fd(-1) if self._is_asyncio else None  # there is no way to read it but to set it
        if before != -1:
            if before is not None:
                signal.set_wakeup_fd(before)
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        self._native.add_reader(reader, os.read, reader, 4096)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # a full pipe wakes the event loop just as well
        try:
            yield
        finally:
            last = signal.set_wakeup_fd(-1)
            if last != writer:  # another library has set its own meanwhile
                signal.set_wakeup_fd(last)
            self._native.remove_reader(reader)
            os.close(reader)
            os.close(writer)


def _call_later_on_trio(seconds: float, function: Callable[[], object]) -> None:
    trio: Any = sys.modules["trio"]

    async def call() -> None:
        await trio.sleep(seconds)
        function()

    trio.lowlevel.spawn_system_task(call, name="aengine timer")  # cancelled at the end of the event loop


class TickCounter:
    """Says whether the event loop has had a turn since it was asked before: then a loop on it need not give way.

    One for each event loop, shared by its engines, each of which has a `watch()` of its own. It counts only while it is
    asked: a callback in the next turn counts that turn, and schedules no other. So it does not keep an idle event loop
    awake. All of it is called on the event loop's thread.
    """

    @classmethod
    def here(cls) -> Self:
        """Return that of the event loop that runs here."""
        try:
            return cast(Self, _tick_counter.get())
        except LookupError:
            counter = cls()
            _tick_counter.set(counter)
            return counter

    def __init__(self) -> None:
        self._loop_handle = EventLoopHandle()
        self._ticks = 0
        self._is_counting = False  # the callback that counts the next turn is scheduled

    def watch(self) -> Callable[[], bool]:
        """Return a function that says whether a turn has passed since it was called before."""
        seen = self._read()

        def has_ticked() -> bool:
            nonlocal seen
            before, seen = seen, self._read()
            return seen != before

        return has_ticked

    def _read(self) -> int:
        if not self._is_counting:
            self._is_counting = True
            self._loop_handle.call_soon(self._tick)
        return self._ticks

    def _tick(self) -> None:
        self._is_counting = False
        self._ticks += 1


_tick_counter: RunVar[TickCounter] = RunVar("aengine_tick_counter")


class Interrupts:
    """Tells those that wait for something which cannot be stopped that the user no longer wants to wait: by Ctrl-C.

    At a second Ctrl-C `asyncio.run()` cancels every task once more, natively, which no shield holds off. trio raises
    it in its main task only, which waits for the others. So there SIGINT is handled here, too, as long as something
    waits, and then handed on. `stop_on_signals` calls `notify()` by itself.

    One for each event loop, shared by its engines. All of it is called on the event loop's thread.
    """

    @classmethod
    def here(cls) -> Self:
        """Return that of the event loop that runs here."""
        try:
            return cast(Self, _interrupts.get())
        except LookupError:
            interrupts = cls()
            _interrupts.set(interrupts)
            return interrupts

    def __init__(self) -> None:
        self._loop_handle = EventLoopHandle()
        self._waiting: list[Callable[[], object]] = []
        self._handler = self._handle  # the very object, by which it is found again
        self._before: Any = None
        self._must_handle = (
            not self._loop_handle.is_of_asyncio and threading.current_thread() is threading.main_thread()
        )

    def add(self, notify: Callable[[], object]) -> None:
        """Have this called at each Ctrl-C from now on."""
        self._waiting.append(notify)
        if self._must_handle and callable(before := signal.getsignal(signal.SIGINT)) and before is not self._handler:
            self._before = before
            signal.signal(signal.SIGINT, self._handler)

    def remove(self, notify: Callable[[], object]) -> None:
        """Call it no more."""
        self._waiting.remove(notify)
        if not self._waiting and self._must_handle and signal.getsignal(signal.SIGINT) is self._handler:
            signal.signal(signal.SIGINT, self._before)

    def notify(self) -> None:
        """The user no longer wants to wait."""
        for notify in tuple(self._waiting):
            notify()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._loop_handle.post(self.notify)
        self._before(number, frame)


_interrupts: RunVar[Interrupts] = RunVar("aengine_interrupts")


class ThreadSafeEvent:
    """A one-shot event: set from any thread, waited for on the event loop on which it was made.

    `anyio.Event.set()` is for the event loop's thread only, and is called there. So from another thread `is_posted`
    comes before `is_set`, by some turns of the event loop. There is no way back: what waits again makes another.

    Attributes:
        is_posted: whether `set()` has been called. For writers that set often, since each call wakes the event loop.
    """

    __slots__ = ("_event", "_loop_handle", "is_posted")

    def __init__(self, loop_handle: EventLoopHandle) -> None:
        self.is_posted: bool = False
        self._loop_handle = loop_handle
        self._event = anyio.Event()

    def set(self) -> None:
        """Wake all that wait for it, now or later. From any thread, any number of times."""
        self.is_posted = True
        self._loop_handle.call(self._event.set)

    @property
    def is_set(self) -> bool:
        """Whether it has been set, and the event loop knows."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Wait until it is set; at once if it is already. Cancellable; nothing is lost by that."""
        await self._event.wait()


class CancelOnceScope:
    """A cancel scope of a task that runs the user's code. On asyncio its cancellation is raised there once.

    anyio raises a cancellation again at each await until its scope is left. Code that was written for asyncio, where it
    comes once, would not get through its `finally: await connection.close()`. So this scope is two: the outer one, or
    one around it, is cancelled, and once that has reached the task the inner one is a shield, for `grace` seconds.
    After those it is none, and each await is cancelled. On trio code expects that, and shields its clean-up itself.

    All of it is called on the event loop's thread, `with` in the task itself, and only once.
    """

    __slots__ = ("_grace", "_info", "_inner", "_outer", "_seen", "_task", "_timer")

    def __init__(self, grace: float, *, shield: bool = False) -> None:
        self._grace = grace
        self._outer = anyio.CancelScope(shield=shield)
        self._inner = anyio.CancelScope()
        self._info: Any = None  # anyio's view of the task
        self._task: Any = None  # asyncio's, while the scope is entered
        self._seen = 0  # how often the task had been cancelled when this was looked at last
        self._timer: Any = None  # of what is to be done next with the inner scope

    def __enter__(self) -> Self:
        self._outer.__enter__()
        self._inner.__enter__()
        self._task = _task_of_asyncio()
        self._seen = self._requests
        self._info = anyio.get_current_task()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._task = None
        self._stop_timer()
        if self._inner.__exit__(kind, error, traceback):
            kind = error = traceback = None
        return bool(self._outer.__exit__(kind, error, traceback)) or error is None

    @property
    def deadline(self) -> float:
        """When each await inside is cancelled, in the event loop's time; unless `hold()` or `cancel()` was called."""
        return self._outer.deadline

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        self._outer.deadline = deadline

    @property
    def is_late(self) -> bool:
        """Whether the deadline that was given to `hold()` has passed."""
        return self._inner.cancel_called

    def cancel(self) -> None:
        """Cancel what is awaited inside, or is awaited next."""
        self.cancel_by(self._outer)

    def cancel_by(self, around: "anyio.CancelScope") -> None:
        """Cancel what is awaited inside, or is awaited next, by a scope around this one."""
        # It may have been reached already: a scope around a run cancels what runs inside the run's step, too.
        if self._requests > self._seen:
            self._inner.shield = True
        around.cancel()
        # A second cancellation arms no second timer: terminate() may wake a wait at each of several requests. `hold()`
        # stops the one timer that is known here. One that was lost would fire in the clean-up, take away the shield
        # that `hold()` has made, and have the cancellation, which is dealt with, raised there once more.
        if self._timer is not None and self._requests > self._seen:  # reached before: the grace that has begun goes on
            return
        self._stop_timer()
        self._hold_while_reached(None)

    def hold(self, deadline: float = math.inf) -> None:
        """Let what is inside go on, cancelled or not, until `release()`; or until a deadline, which is for good."""
        self._stop_timer()
        self._inner.deadline = deadline
        self._inner.shield = True

    def release(self) -> None:
        """Cancel each await inside, if a scope around it was cancelled."""
        self._stop_timer()
        self._inner.shield = False

    def take_requests(self) -> bool:
        """Say whether the task has been cancelled, by asyncio's `Task.cancel()`, since this was called before."""
        is_requested = self._requests > self._seen
        while self._requests:
            self._task.uncancel()
        self._seen = 0
        return is_requested

    @property
    def _requests(self) -> int:
        """How often the task was cancelled, by scopes too; 0 on trio."""
        return 0 if self._task is None else self._task.cancelling()

    def _hold_while_reached(self, until: float | None) -> None:
        """Be a shield as soon as the cancellation has been raised in the task, `until` then: the end of the grace."""
        if self._requests <= self._seen:
            self.release()  # which has anyio try at once; it does so in each turn of the event loop
            until = None
        if self._task is None:  # on trio; or the scope has been left, or is not entered yet
            return
        loop = self._task.get_loop()
        if self._requests > self._seen:
            until = loop.time() + self._grace if until is None else until
            if loop.time() >= until:
                self.release()
                return
        elif self._info.has_pending_cancellation():  # what it waits for has come: it is cancelled in its next wait
            self._timer = loop.call_soon(self._hold_while_reached, None)
            return
        # Else it is inside a shield of the user's, at the end of which the cancellation would be raised at each await.
        # Or it was reached by a cancellation of the user's, and that is over.
        self._inner.shield = True
        wait = _POLL if until is None else min(_POLL, until - loop.time())
        self._timer = loop.call_later(wait, self._hold_while_reached, until)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()


_POLL = 0.01
"""Seconds from one look to the next whether the user's code can be cancelled, or could be."""


class OwnCancellations:
    """Tells the cancellations of one task from those of something that it awaits, which raise the same exception.

    Made in that task. On trio there are no others.
    """

    def __init__(self) -> None:
        self._task = _task_of_asyncio()
        self._requests = 0
        if self._task is not None:  # less one that is still to be raised
            self._requests = self._task.cancelling() - anyio.get_current_task().has_pending_cancellation()

    def includes(self, error: BaseException) -> bool:
        """Whether this, which was raised in the task, is no cancellation, or is one of the task itself."""
        return (
            self._task is None
            or isinstance(error, Exception | KeyboardInterrupt | SystemExit)
            or not is_cancellation_of_asyncio(error)
            or self._task.cancelling() > self._requests
        )


def is_cancellation_of_asyncio(error: BaseException) -> bool:
    """Say whether this is asyncio's CancelledError, also where no event loop runs."""
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and isinstance(error, asyncio.CancelledError)


def _task_of_asyncio() -> Any:
    """Return the current task if it is one of asyncio, else None."""
    asyncio = sys.modules.get("asyncio")
    try:
        return None if asyncio is None else asyncio.current_task()
    except RuntimeError:  # no event loop of asyncio runs here
        return None

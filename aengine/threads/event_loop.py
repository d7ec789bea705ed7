"""An event loop as seen from any thread. The only file that knows that there are two backends."""

import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial, wraps
from typing import Any, Self, cast

import anyio
import anyio.abc
from anyio.lowlevel import RunVar, current_token


class EventLoopHandle:
    """An event loop and its thread, as seen from any thread."""

    __slots__ = ("_context", "_is_asyncio", "_native", "_post", "thread", "turn")

    def __init__(self) -> None:
        native: Any = current_token().native_token
        self._native = native
        self._is_asyncio = hasattr(native, "call_soon_threadsafe")
        self._post: Callable[..., object] = native.call_soon_threadsafe if self._is_asyncio else native.run_sync_soon
        # What anyio's checkpoint() comes to, but for finding out each time which event loop this is: a fifth of a turn.
        self.turn: Callable[[], Awaitable[None]] = (
            partial(sys.modules["asyncio"].sleep, 0) if self._is_asyncio else sys.modules["trio"].lowlevel.checkpoint
        )
        self._context = copy_context()  # of here: a callback has the context of its poster, where no event loop runs
        self.thread = threading.get_ident()

    def is_same(self, other: "EventLoopHandle") -> bool:
        """Say whether the other one is the same event loop."""
        return self._post == other._post  # noqa: SLF001 -- another of this class

    @property
    def is_here(self) -> bool:
        """Whether this is the event loop's thread."""
        return threading.get_ident() == self.thread

    def call(self, function: Callable[[], object]) -> None:
        """Call `function` on the event loop's thread: now if this is it, else soon. Never waits, never raises."""
        if self.is_here:
            function()
        else:
            self.post(function)

    def post(self, function: Callable[[], object]) -> None:
        """Call `function` on the event loop's thread, soon. From any thread, and from signal handlers."""
        try:
            self._post(partial(self._context.copy().run, function))
        except RuntimeError:  # that event loop has ended (trio's RunFinishedError is one too): nobody listens there
            return

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call `function` in the next turn of the event loop. At home, where asyncio's need not be woken for that."""
        if self._is_asyncio:
            self._native.call_soon(function, context=self._context)
        else:
            self._post(function)

    def start(
        self,
        group: "anyio.abc.TaskGroup",  # whose module loads others when it is asked for it
        function: Callable[[], Awaitable[object]],
        on_never_started: Callable[[], object],
        *,
        name: str | None = None,
    ) -> None:
        """Start a task, at home. If it is cancelled natively before its first step, `lost` is called in its place.

        Such a task runs not a line, so that nobody who waits for it would ever hear of its end.
        """
        has_begun = False

        @wraps(function)
        async def task() -> None:
            nonlocal has_begun
            has_begun = True
            await function()

        def look() -> None:
            if not has_begun:
                on_never_started()

        group.start_soon(task, name=name)
        if self._is_asyncio:  # which takes a task's first step before what is posted after it; trio begins every task
            self.post(look)

    @contextmanager
    def woken_by_signals(self) -> Generator[None]:
        """See that a signal wakes this event loop, so that its handler is called. At home, in the main thread.

        One that comes just before `select()` does not interrupt it. trio and uvloop have a wake-up fd for that; asyncio
        has one on Windows, and elsewhere from its first `add_signal_handler()` on.
        """
        before = signal.set_wakeup_fd(-1) if self._is_asyncio else None
        if before != -1:
            if before is not None:
                signal.set_wakeup_fd(before)
            yield
            return
        heard, rung = os.pipe()
        os.set_blocking(heard, False)
        os.set_blocking(rung, False)
        self._native.add_reader(heard, os.read, heard, 4096)
        signal.set_wakeup_fd(rung, warn_on_full_buffer=False)
        try:
            yield
        finally:
            last = signal.set_wakeup_fd(-1)
            if last != rung:  # somebody has put his own in its place
                signal.set_wakeup_fd(last)
            self._native.remove_reader(heard)
            os.close(heard)
            os.close(rung)


class TickCounter:
    """Counts the turns of the event loop, from one look to the next. One for each event loop, for all its engines."""

    @classmethod
    def here(cls) -> Self:
        """Return the one of the event loop that runs here."""
        try:
            return cast(Self, _turns.get())
        except LookupError:
            turns = cls()
            _turns.set(turns)
            return turns

    def __init__(self) -> None:
        self._loop_handle = EventLoopHandle()
        self._passed = 0
        self._is_counting = False

    def watch(self) -> Callable[[], bool]:
        """Return a function that says whether a turn has passed since it was called before. At home."""
        seen = self._look()

        def has_one_passed() -> bool:
            nonlocal seen
            before, seen = seen, self._look()
            return seen != before

        return has_one_passed

    def _look(self) -> int:
        if not self._is_counting:
            self._is_counting = True
            self._loop_handle.call_soon(self._pass)
        return self._passed

    def _pass(self) -> None:
        self._is_counting = False
        self._passed += 1


_turns: RunVar[TickCounter] = RunVar("aengine_turns")


class ThreadSafeEvent:
    """A one-shot event: rung from any thread, waited for at home."""

    __slots__ = ("_event", "_loop_handle", "is_posted")

    def __init__(self, loop_handle: EventLoopHandle) -> None:
        self.is_posted = False  # for who rings often: once is enough
        self._loop_handle = loop_handle
        self._event = anyio.Event()

    def set(self) -> None:
        """Wake who waits, now or later. Callable from any thread, any number of times."""
        self.is_posted = True
        self._loop_handle.call(self._event.set)

    @property
    def is_set(self) -> bool:
        """Whether it has been rung, and that has reached home."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Wait until it has been rung. Cancellable; nothing is lost by that."""
        await self._event.wait()

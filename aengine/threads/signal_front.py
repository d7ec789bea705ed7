"""SignalFront: a handler of one signal that stands in front of what else handles it, and hands it on."""

import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import anyio
from anyio.lowlevel import current_token


class SignalFront:
    """Handles a signal before a server that handles it, too, whichever of the two came first.

    A process has one handler of a signal, and the later one replaces the earlier. So what was there before is kept, and
    `look()`, called every now and then, finds what came later, and puts this in front of it. `hand_on()` gives the
    signal to the one that would have had it without this. asyncio calls what `loop.add_signal_handler()` was given by
    itself, in its next turn; it is set aside meanwhile. uvloop's cannot be: it is called at once.

    All of it is called in the main thread.
    """

    def __init__(self, number: int, handle: Callable[[int], object]) -> None:
        self._number = number
        self._handle = handle
        # What is installed alone, and what is installed in front of a later one. By these very objects it is known
        # whether the later one has put back what it had found.
        self._alone, self._in_front = self._handle_alone, self._handle_in_front
        self._before: Any = None
        self._inner: Any = None
        self._aside: Any = None  # what asyncio would call, and what it calls in the place of that
        self._in_place: Any = None
        self._native: Any = None
        self._has_handed_on = self._is_over = False

    def enter(self) -> None:
        """Handle the signal from now on. Raises what `signal.signal` does."""
        if not isinstance(getattr(signal.getsignal(self._number), "__self__", None), SignalFront):
            self._native = _event_loop()
        self._before = signal.signal(self._number, self._alone)
        self._set_aside()

    def exit(self) -> None:
        """Handle it no more."""
        self._is_over = True
        now = signal.getsignal(self._number)
        if now is self._alone:
            signal.signal(self._number, self._before)
        elif now is self._in_front:
            signal.signal(self._number, self._other)
        self._put_back()

    def look(self) -> None:
        """Stay in front of what was installed since."""
        now = signal.getsignal(self._number)
        if self._has_handed_on or isinstance(getattr(now, "__self__", None), SignalFront):
            if now is self._alone:
                self._inner = None
            return
        self._inner = now if self._hears(now) or self._is_of_event_loop(now) else None
        self._set_aside()
        signal.signal(self._number, self._alone if self._inner is None else self._in_front)

    @property
    def can_hand_on(self) -> bool:
        """Whether something else handles the signal, and has not heard of it."""
        if self._has_handed_on:
            return False
        return self._aside is not None or (self._hears(self._other) and not self._is_of_event_loop(self._other))

    def hand_on(self) -> None:
        """Give the signal to what would have had it without this, and all that come after it. Raises what that does."""
        self._has_handed_on = True
        self._put_back()
        signal.signal(self._number, self._other)
        signal.raise_signal(self._number)

    @property
    def _other(self) -> Any:
        return self._before if self._inner is None else self._inner

    def _handle_alone(self, number: int, frame: FrameType | None) -> None:
        if self._is_over:  # something that came later, and outlived this, has put it back
            if callable(self._before):
                self._before(number, frame)
            elif self._before == signal.SIG_DFL:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        elif not self._has_handed_on:  # else it comes back: a server raises it again, for those who were there before
            self._inner = None
            self._handle(number)

    def _handle_in_front(self, number: int, _: FrameType | None) -> None:
        self._handle(number)

    @staticmethod
    def _hears(handler: Any) -> bool:
        """Whether a handler is of something that is to hear of the signal, and does not just interrupt the program."""
        function = handler.func if isinstance(handler, partial) else handler
        module = str(getattr(function, "__module__", None))
        is_interrupt = function is signal.default_int_handler or module.partition(".")[0] in {
            "asyncio",
            "trio",
            "ipykernel",
        }
        return callable(function) and not is_interrupt

    def _is_of_event_loop(self, handler: Any) -> bool:
        """Whether it only stands for what the event loop calls by itself."""
        name = getattr(handler, "__name__", "")
        return self._native is not None and (
            getattr(handler, "__self__", None) is self._native or name == "_sighandler_noop"
        )

    def _set_aside(self) -> None:
        handlers: dict[int, Any] = getattr(self._native, "_signal_handlers", {})  # asyncio has no public way
        found = handlers.get(self._number)
        if found is None:  # it was removed
            self._aside = self._in_place = None
        elif found is not self._in_place:
            self._aside, self._in_place = found, type(found)(_do_nothing, (), self._native)
            handlers[self._number] = self._in_place

    def _put_back(self) -> None:
        self._set_aside()
        if self._aside is not None:
            self._native._signal_handlers[self._number] = self._aside  # noqa: SLF001 -- likewise
            self._aside = self._in_place = None


def _do_nothing() -> None:
    pass


def _event_loop() -> Any:
    try:
        native: Any = current_token().native_token
    except RuntimeError:  # none runs here
        return None
    return native if hasattr(native, "add_signal_handler") else None


@contextmanager
def called_every(seconds: float, function: Callable[[], object]) -> Generator[None]:
    """Call a function in the event loop that runs here, again and again. It must not raise."""
    native: Any = current_token().native_token
    if hasattr(native, "call_later"):
        timer: Any = None

        def call() -> None:
            nonlocal timer
            function()
            timer = native.call_later(seconds, call)

        timer = native.call_later(seconds, call)
        try:
            yield
        finally:
            timer.cancel()
        return
    scope = anyio.CancelScope()

    async def repeat() -> None:
        with scope:
            while True:
                await anyio.sleep(seconds)
                function()

    sys.modules["trio"].lowlevel.spawn_system_task(repeat)
    try:
        yield
    finally:
        scope.cancel()

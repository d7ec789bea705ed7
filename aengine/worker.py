"""One thread for what blocks, and the way back from it. The only file that knows that there are two backends.

A running engine owns one worker. The loop is advanced on it a slice at a time: from one thing that must be awaited to
the next. Whoever waits for a slice is not let go before the slice has ended, for nothing can stop a torch step.
"""

import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import ExitStack, contextmanager
from contextvars import Context, copy_context
from functools import cache, partial, wraps
from queue import SimpleQueue
from typing import Any, Self, cast

import anyio
import anyio.abc
from anyio.lowlevel import RunVar, current_token


class Home:
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

    def is_same(self, other: "Home") -> bool:
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
        lost: Callable[[], object],
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
                lost()

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


class Turns:
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
        self._home = Home()
        self._passed = 0
        self._is_counting = False

    def asker(self) -> Callable[[], bool]:
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
            self._home.call_soon(self._pass)
        return self._passed

    def _pass(self) -> None:
        self._is_counting = False
        self._passed += 1


_turns: RunVar[Turns] = RunVar("aengine_turns")


class Bell:
    """A one-shot event: rung from any thread, waited for at home."""

    __slots__ = ("_event", "_home", "is_called")

    def __init__(self, home: Home) -> None:
        self.is_called = False  # for who rings often: once is enough
        self._home = home
        self._event = anyio.Event()

    def ring(self) -> None:
        """Wake who waits, now or later. Callable from any thread, any number of times."""
        self._home.call(self._event.set)

    @property
    def is_rung(self) -> bool:
        """Whether it has been rung, and that has reached home."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Wait until it has been rung. Cancellable; nothing is lost by that."""
        await self._event.wait()


class Slice:
    """One call on the worker. While it lasts it can have things awaited at home; at its end it has a result."""

    __slots__ = (
        "_answers",
        "_bell",
        "_context",
        "_home",
        "_wanted",
        "arguments",
        "done",
        "error",
        "function",
        "result",
    )

    def __init__(self, home: Home, context: Context, function: Callable[..., Any], *arguments: Any) -> None:
        self.function = function
        self.arguments = arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False
        self._home = home
        self._context = context
        self._bell = Bell(home)
        self._wanted: Awaitable[Any] | None = None
        self._answers: SimpleQueue[tuple[Any, BaseException | None]] | None = None

    def perform(self) -> None:
        """On the worker: make the call, keep its outcome, and wake who waits for it."""
        try:
            self.result = self._context.run(self.function, *self.arguments)
        except BaseException as error:  # noqa: BLE001 -- every outcome is handed over, none is swallowed
            self.error = error
        self.done = True
        self._bell.ring()

    def call_home(self, wanted: Awaitable[Any]) -> Any:
        """On the worker, inside the call: have `wanted` awaited at home, and block until it is."""
        self._answers = SimpleQueue()
        self._wanted = wanted
        self._bell.ring()
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
                        await self._bell.wait()
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
        wanted, answers, self._bell = self._wanted, self._answers, Bell(self._home)
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


class Worker:
    """A thread that performs slices, one after another."""

    def __init__(self, name: str, settings: "ThreadState") -> None:
        self._settings = settings
        self._slices: SimpleQueue[Slice | None] = SimpleQueue()
        # Daemon: a step that never returns must not keep a process from ending; every other one is joined.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with self._settings.entered():
            while (one := self._slices.get()) is not None:
                one.perform()
                del one  # while waiting for the next, keep no reference to a batch or an output

    def submit(self, one: Slice) -> None:
        """Have a slice performed after those before it."""
        self._slices.put(one)

    @property
    def is_here(self) -> bool:
        """Whether the caller runs on this worker's thread."""
        return threading.get_ident() == self._thread.ident

    def stop(self) -> None:
        """Let the thread end, and wait for that. It is idle, so this takes some 50 µs."""
        self._slices.put(None)
        self._thread.join()

    def abandon(self) -> None:
        """Let the thread end when its slice does, if ever."""
        self._slices.put(None)


def context_for_thread() -> Context:
    """Return the caller's context for code on another thread, where no event loop runs."""
    context = copy_context()
    if sniffio := sys.modules.get("sniffio"):  # it keeps in the context which library runs: not there
        context.run(sniffio.current_async_library_cvar.set, None)
    return context


class ThreadState:
    """torch's settings that belong to a thread: taken over from the caller of `run()`, for its step to see.

    Grad mode, inference mode, autocast, default device and CUDA device. Nothing if torch is not loaded.
    """

    def __init__(self) -> None:
        """Take down the settings of the present thread."""
        self._torch: Any = sys.modules.get("torch")
        if torch := self._torch:
            self._grad = torch.is_grad_enabled()
            self._inference = torch.is_inference_mode_enabled()
            self._device = torch.get_default_device()
            self._cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            self._autocast = [
                (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
                for kind in (["cpu"] if self._cuda is None else ["cpu", "cuda"])
            ]
            self._caches = torch.is_autocast_cache_enabled()

    @contextmanager
    def entered(self) -> Generator[None]:
        """Make the present thread's settings these for a while; then what they were before."""
        with ExitStack() as entered:
            if self._torch is not None:
                self._enter(self._torch, entered)
            yield

    def _enter(self, torch: Any, entered: ExitStack) -> None:
        torch.get_num_threads()  # or convolutions do not keep to `set_num_threads()` on a thread that has never asked
        if self._cuda is not None:
            entered.enter_context(torch.cuda.device(self._cuda))
        before = torch.get_default_device()
        if self._device != before:
            torch.set_default_device(self._device)
        entered.callback(_restore_device, torch, before)
        # Each of these restores, on leaving, also what a step has left behind.
        entered.enter_context(torch.inference_mode(self._inference))
        entered.enter_context(torch.set_grad_enabled(self._grad))
        # Set, and not entered: torch forgets the weights that it has cast when the outermost autocast is left, and that
        # has to be the step's own, or the next step computes with the weights of this one.
        for kind, dtype, enabled in self._autocast:
            entered.callback(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind))
            entered.callback(torch.set_autocast_dtype, kind, torch.get_autocast_dtype(kind))
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        entered.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(self._caches)
        entered.callback(torch.clear_autocast_cache)


def _restore_device(torch: Any, before: Any) -> None:
    if torch.get_default_device() != before:
        torch.set_default_device(None if before.type == "cpu" else before)


def release_idle_threads() -> None:
    """Let go of the OpenMP threads that the calling thread keeps, if it keeps any.

    GNU's OpenMP stops spinning as soon as it manages more threads than there are processors; torch steps on another
    thread then run 3 to 5 times slower. `omp_pause_resource` is OpenMP 5.0, section 3.2.43; soft: settings stay.
    """
    if "torch" in sys.modules and (openmp := _openmp()) is not None:
        openmp.omp_pause_resource(_SOFT, openmp.omp_get_initial_device())


@contextmanager
def on_one_thread() -> Generator[None]:
    """Have the calling thread, and no other, do torch's work without help: where waiting for that takes longer."""
    openmp = _openmp() if "torch" in sys.modules else None
    before = 0 if openmp is None else openmp.omp_get_max_threads()
    if openmp is not None:
        openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        if openmp is not None:
            openmp.omp_set_num_threads(before)


@cache
def _openmp() -> Any:
    """Find the OpenMP library that torch has loaded. Another one, scikit-learn's say, has threads of its own."""
    import ctypes  # noqa: PLC0415 -- with pathlib, a fifth of the time of `import aengine`
    from pathlib import Path  # noqa: PLC0415

    try:
        loaded = {
            line.split()[-1] for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if "libgomp" in line
        }
        ours = [path for path in loaded if "torch" in path] or [path for path in loaded if path.startswith("/usr/lib")]
        openmp = ctypes.CDLL(ours[0], mode=_RTLD_NOLOAD)
    except (OSError, IndexError):  # pragma: no cover -- another system, or another OpenMP
        return None
    return openmp if hasattr(openmp, "omp_pause_resource") else None  # which is OpenMP 5.0


_RTLD_NOLOAD = 4  # of dlopen(3), where os.RTLD_NOLOAD is not defined
_SOFT = 1  # omp_pause_soft

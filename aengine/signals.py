"""Stopping an engine by SIGTERM and SIGINT: for scripts and containers. Nothing is installed unless asked for."""

import signal
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, Self

import anyio

from aengine.drivers.sync import runs_in_event_loop
from aengine.engine import Engine
from aengine.threads.event_loop import EventLoopHandle


class stop_on_signals:  # noqa: N801 -- used as a function is, like contextlib.suppress
    """End the run cleanly at the first SIGTERM or SIGINT; cancel what is in the block at the second.

        with stop_on_signals(trainer) as stop:
            await trainer.run(loader, max_epochs=100)
        if stop.received: ...

    The handlers that were there before come back at the end of the block. Around `run_sync()`, where no event loop
    runs, the second signal raises KeyboardInterrupt. A first signal while no engine runs, as when data is still being
    loaded, acts as a second one: there is nothing to end cleanly. After a second one the code behind the block goes on:
    look at `engine.state`, not at what `run()` would have returned.

    Args:
        engines: those to terminate.
        signals: what to listen to.

    Attributes:
        received: the signals that came, in order.

    Raises:
        TypeError: these are no engines, or no signals.
        RuntimeError: not in the main thread, the only one that Python lets handle signals.
    """

    def __init__(
        self, *engines: Engine[Any, Any], signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    ) -> None:
        for engine in engines:
            if not isinstance(engine, Engine):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    "stop_on_signals() takes engines, one after another: stop_on_signals(trainer, evaluator); got"
                    f" {engine!r}"
                )
        self.received: list[signal.Signals] = []
        self._engines = engines
        self._signals = _signals(signals)
        self._entered = ExitStack()
        self._cancel: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "stop_on_signals() works in the main thread only, where Python delivers signals; call"
                " engine.terminate()"
            )
        with ExitStack() as entered:
            if runs_in_event_loop():
                loop_handle, scope = EventLoopHandle(), anyio.CancelScope()
                entered.enter_context(scope)
                entered.enter_context(loop_handle.woken_by_signals())
                # Posted: a signal handler may run anywhere, also in the middle of the event loop's own code.
                self._cancel = lambda: loop_handle.post(scope.cancel)
            for one in self._signals:
                entered.callback(signal.signal, one, signal.signal(one, self._handle))
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._entered.__exit__(kind, error, trace)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
        # terminate() is safe here: it adds to a set, and wakes the loop by a post.
        if len(self.received) == 1 and any(engine.is_running for engine in self._engines):
            for engine in self._engines:
                engine.terminate()
        elif self._cancel is None:
            raise KeyboardInterrupt
        else:
            self._cancel()


def _signals(signals: Any) -> tuple[signal.Signals, ...]:
    chosen: tuple[Any, ...] = tuple(signals) if isinstance(signals, Iterable) else (None,)
    if not all(isinstance(one, int) for one in chosen):
        raise TypeError(f"signals= are several of the module signal, such as [signal.SIGTERM]; got {signals!r}")
    return chosen

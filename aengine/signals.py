"""Stopping an engine by SIGTERM and SIGINT: for scripts and containers. Nothing is installed unless asked for."""

import signal
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import anyio

from aengine.drivers.sync import runs_in_event_loop
from aengine.engine import Engine
from aengine.threads.event_loop import EventLoopHandle, Interrupts
from aengine.threads.signal_front import SignalFront, called_every

_LOOK = 0.1
"""Seconds from one look to the next at what handles the signals."""


class stop_on_signals:  # noqa: N801 -- used as a function is, like contextlib.suppress
    """End the run cleanly at the first SIGTERM or SIGINT; cancel what is in the block at the second.

        with stop_on_signals(trainer) as stop:
            await trainer.run(loader, max_epochs=100)
        if stop.received: ...

    The handlers that were there before come back at the end of the block. Around `run_sync()`, where no event loop
    runs, the second signal raises KeyboardInterrupt. A first signal while no engine runs, as when data is still being
    loaded, acts as a second one: there is nothing to end cleanly; where a server is notified of it, an engine that
    begins to run after it is terminated. After a second one the code behind the block goes on: look at
    `engine.state`, not at what `run()` would have returned. A third one leaves a step that never ends.

    A server that handles the same signals is notified of them, too, whether it has set its handlers before the block or
    inside: when the runs, and so their streams, have ended, or at the third signal. On uvloop what
    `loop.add_signal_handler()` was given is notified at once.

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
        self._leave: Callable[[], None] = _do_nothing
        self._look_soon: Callable[[], None] = _do_nothing
        self._fronts: dict[int, SignalFront] = {}
        self._raised: BaseException | None = None  # by another handler of a signal

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "stop_on_signals() works in the main thread only, where Python delivers signals; call"
                " engine.terminate()"
            )
        with ExitStack() as entered:
            if runs_in_event_loop():
                loop_handle, scope, interrupts = EventLoopHandle(), anyio.CancelScope(), Interrupts.here()
                entered.enter_context(scope)
                entered.enter_context(loop_handle.woken_by_signals())
                # Posted: a signal handler may run anywhere, also in the middle of the event loop's own code.
                self._cancel = lambda: loop_handle.post(scope.cancel)
                self._leave = lambda: loop_handle.post(interrupts.notify)
                self._look_soon = lambda: loop_handle.post(self._look)
                entered.enter_context(called_every(_LOOK, self._look))
            self._fronts = {number: SignalFront(number, self._handle) for number in self._signals}
            for front in self._fronts.values():
                front.enter()
                entered.callback(front.exit)
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        is_swallowed = self._entered.__exit__(kind, error, trace)
        for number in dict.fromkeys(self.received):
            if self._fronts[number].can_hand_on:
                self._fronts[number].hand_on()
        self._look_soon = self._leave = _do_nothing
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised
        return bool(is_swallowed)

    def _handle(self, number: int) -> None:
        self.received.append(signal.Signals(number))
        is_first = len(self.received) == 1
        # terminate() is safe here: it adds to a set, and wakes the loop by a post.
        if is_first and any(engine.is_running for engine in self._engines):
            for engine in self._engines:
                engine.terminate()
        elif not is_first or not self._fronts[number].can_hand_on:  # else it is the business of a server
            if self._cancel is None:
                raise KeyboardInterrupt
            self._cancel()
            if len(self.received) > 2:  # noqa: PLR2004 -- it is wanted urgently
                self._leave()
        self._look_soon()

    def _look(self) -> None:
        """See what else handles the signals, and hand on those that came when no engine runs any more."""
        for front in self._fronts.values():
            front.look()
        if not self.received:
            return
        for engine in self._engines:
            if engine.is_running and not engine.should_terminate:  # it has begun since
                engine.terminate()
        if len(self.received) <= 2 and any(engine.is_running for engine in self._engines):  # noqa: PLR2004 -- likewise
            return
        for number in dict.fromkeys(self.received):
            if self._fronts[number].can_hand_on:
                try:
                    self._fronts[number].hand_on()
                except BaseException as error:  # noqa: BLE001 -- raised at the end of the block
                    self._raised = error
                    if self._cancel is not None:
                        self._cancel()


def _do_nothing() -> None:
    pass


def _signals(signals: Any) -> tuple[signal.Signals, ...]:
    chosen: tuple[Any, ...] = tuple(signals) if isinstance(signals, Iterable) else (None,)
    if not all(isinstance(one, int) for one in chosen):
        raise TypeError(f"signals= are several of the module signal, such as [signal.SIGTERM]; got {signals!r}")
    return chosen

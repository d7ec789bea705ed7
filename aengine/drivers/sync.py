"""Running the loop without an event loop, as long as nothing must be awaited."""

import threading
from collections.abc import Callable
from typing import Any

from anyio.lowlevel import current_token

from aengine.bus.inbox import BackpressureWait
from aengine.bus.subscriber import Subscriber
from aengine.loop.effects import Effect, LoopGenerator
from aengine.loop.requests import Request, Requests

DONE = object()
SUSPENDED = object()


class BlockingRunner:
    """Advances one loop in the thread of its caller. To `EventEmitter` it is the `Runner` of the run."""

    can_wait = False  # no subscriber has a task that could make room
    wait_blocking = None  # there is no event loop on which something could be awaited

    def __init__(self, generator: LoopGenerator, requests: Requests) -> None:
        self._generator = generator
        self._requests = requests
        self.defer_backpressure: Callable[[list[BackpressureWait]], None] = requests.defer_backpressure
        self._changed: threading.Event | None = None  # set when a request comes, while the loop is paused

    def run(self, failures: list[BaseException]) -> Any:
        """Advance the loop until it is DONE, SUSPENDED, or wants something awaited, which is then returned.

        What failed the run, or Ctrl-C, is added to `failures`.
        """
        self._requests.wake_by(self._wake)
        try:
            for wanted in self._generator:  # nothing is sent: nothing has been awaited
                if wanted is Effect.SUSPEND:
                    return SUSPENDED
                # A subscriber or a service was added, which needs an event loop; at COMPLETED, it was not yet served.
                if wanted is Effect.RAISE_FAILURE or Request.RAISE_FAILURE in self._requests.pending:
                    return wanted
                if wanted is Effect.PAUSE:
                    self._wait_while_paused()
                elif type(wanted) is not Effect:
                    return wanted
        except BaseException as error:  # noqa: BLE001 -- raised by the caller of this
            failures.append(error)
        finally:
            self._requests.wake_by(None)
        return DONE

    def _wake(self) -> None:
        if (changed := self._changed) is not None:
            changed.set()

    def _wait_while_paused(self) -> None:
        changed = self._changed = threading.Event()  # before the look at what is pending
        while self._requests.pending == {Request.PAUSE}:
            changed.wait()
            changed.clear()

    def start(self, subscriber: Subscriber) -> None:  # noqa: ARG002 -- a Runner's
        """A subscriber was added, which needs an event loop: leave this, to be continued on one."""
        self._requests.return_to_driver()

    async def flush(self) -> None:
        """There is no subscriber, so nothing to wait for."""


def runs_in_event_loop(current: Callable[[], object] = current_token) -> bool:
    """Say whether an event loop runs in this thread."""
    try:
        current()
    except RuntimeError:
        return False
    return True

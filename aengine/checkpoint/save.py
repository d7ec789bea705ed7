"""Saving: one write beside the step, in a thread of its own, and all who wait for its end."""

import threading
import time
from collections.abc import Callable

from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent


class Saving:
    """A save under way: staged, and being written by a thread that ends with it.

    Attributes:
        info: what was committed, once it is.
        error: why nothing was.
        is_told: whether somebody has been given the error.
        is_left: whether who waited for it was cancelled, so that an error is still to be told.
    """

    def __init__(
        self, write: Callable[[Callable[[], bool]], CheckpointInfo], finished: Callable[["Saving"], object]
    ) -> None:
        self.info: CheckpointInfo | None = None
        self.error: BaseException | None = None
        self.is_told = self.is_left = False
        self._write: Callable[[Callable[[], bool]], CheckpointInfo] | None = write
        self._finished: Callable[[Saving], object] | None = finished
        self._is_stopped = False
        self._is_over = False
        self._lock = threading.Lock()
        self._wakeups: list[ThreadSafeEvent] = []
        # Daemon: a disk that hangs must not keep a process from ending, and what it cuts short is swept later.
        threading.Thread(target=self._run, name="aengine checkpoint", daemon=True).start()

    @property
    def is_over(self) -> bool:
        """Whether it was committed or has failed."""
        return self._is_over

    def _run(self) -> None:
        (write, self._write), (finished, self._finished) = (self._write, None), (self._finished, None)
        assert write is not None and finished is not None, "run once"  # noqa: PT018, S101
        time.sleep(0.001)  # let go of Python's lock, which the loop waits for in order to go on
        try:
            self.info = write(lambda: self._is_stopped)
        except BaseException as error:  # noqa: BLE001 -- handed to who waits; none is swallowed
            self.error = error
        del write  # with what was staged
        finished(self)
        del finished
        with self._lock:
            self._is_over = True
            wakeups, self._wakeups = self._wakeups, []
        for wakeup in wakeups:
            wakeup.set()

    async def wait(self) -> None:
        """Wait for its end, whatever that is. Cancellable; the write goes on."""
        wakeup = ThreadSafeEvent(EventLoopHandle())
        with self._lock:
            if self._is_over:
                return
            self._wakeups.append(wakeup)
        await wakeup.wait()

    def stop(self) -> None:
        """Give the write up at its next block: nothing of it stays."""
        self._is_stopped = True

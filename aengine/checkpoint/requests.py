"""Requests: saves that were asked for from beside the loop, and who waits for them. From any thread."""

import threading

from aengine.checkpoint.save import Saving
from aengine.errors import CheckpointNotWritten
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent

_RUN_ENDED = (
    "the run ended before the save that was asked for: in a step that did not complete, or while the save before it was"
    " being written"
)


class Request:
    """Somebody who waits for a save that he asked for: he is given one, or an error."""

    def __init__(self) -> None:
        self.saving: Saving | None = None
        self.error: BaseException | None = None
        self._wakeup = ThreadSafeEvent(EventLoopHandle())

    def answer(self, saving: Saving | None, error: BaseException | None) -> None:
        """Give him his save, or say why there is none."""
        self.saving, self.error = saving, error
        self._wakeup.set()

    async def granted(self) -> Saving:
        """Wait for the save to be staged, and return it.

        Raises:
            BaseException: it was not.
        """
        await self._wakeup.wait()
        error, self.error = self.error, None  # its traceback holds what holds this
        try:
            if error is not None:
                raise error
        finally:
            del error
        assert self.saving is not None, "he has one or the other"  # noqa: S101
        return self.saving


class Requests:
    """Those that were not served yet.

    Attributes:
        wanted_by: the event at which a save was put off, or was asked for by somebody who does not wait; else "".
    """

    def __init__(self) -> None:
        self.wanted_by = ""
        self._waiting: list[Request] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self) -> Request:
        """Ask for a save, and wait for it. On the event loop."""
        request = Request()
        with self._lock:
            self._waiting.append(request)
        return request

    def withdraw(self, request: Request) -> bool:
        """Take a request back. Returns False if it was served already."""
        with self._lock:
            if request not in self._waiting:
                return False
            self._waiting.remove(request)
            return True

    def answer(self, saving: Saving | None, error: BaseException | None = None) -> None:
        """Give a save to all, or say why there is none."""
        with self._lock:
            waiting, self._waiting, self.wanted_by = self._waiting, [], ""
        for request in waiting:
            request.answer(saving, error)

    def refuse(self, why: str = _RUN_ENDED) -> None:
        """Say to all that there will be none."""
        self.answer(None, CheckpointNotWritten(why))

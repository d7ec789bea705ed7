"""Acknowledging: data that has `acknowledge(position)` is called with each position that is on the disk, in order."""

from collections import deque
from collections.abc import Callable
from typing import Any, cast

from aengine.callables import is_async_callable, is_awaitable, name_of
from aengine.checkpoint.events import CheckpointCommitted
from aengine.checkpoint.writer import Saving
from aengine.engine import Engine, session_of
from aengine.threads.dedicated import DedicatedThread


class Acknowledgements:
    """Calls `acknowledge(position)` of the data for each checkpoint that is committed, one call after another.

    A plain one is called in a thread, as the handler of a subscriber is. Committed from the thread of a save, called
    from tasks of the run: whichever comes first makes all calls that are due, so that none overtakes another.
    """

    def __init__(self) -> None:
        self._due: deque[tuple[Callable[[Any], Any], CheckpointCommitted]] = deque()
        self._is_calling = False

    def begin(self) -> None:
        """A run begins: what the one before did not get to is not made up for, since its data may be closed."""
        self._due.clear()
        self._is_calling = False

    def add(self, acknowledge: Callable[[Any], Any] | None, saving: Saving) -> None:
        """A save has ended, committed or not. One from the middle of a step is not acknowledged.

        An older one is restored in its place, and what was consumed since then is to be delivered once more.
        """
        committed = saving.committed
        if acknowledge is not None and committed is not None and not committed.checkpoint.is_mid_step:
            self._due.append((acknowledge, committed))

    async def call(self, engine: Engine[Any, Any]) -> None:
        """Make the calls that are due. Cancellable: a call that is cut off is not made again, the next covers it."""
        if self._is_calling:
            return
        self._is_calling = True
        try:
            while self._due:
                acknowledge, committed = self._due.popleft()
                try:
                    await _call(acknowledge, committed.position)
                except Exception as error:
                    step = committed.checkpoint.step
                    error.add_note(f"in {name_of(acknowledge)}(), for the checkpoint of step {step} of {engine.name!r}")
                    raise
        finally:
            self._is_calling = False


def acknowledge_of(engine: Engine[Any, Any]) -> Callable[[Any], Any] | None:
    """Return the `acknowledge` of the data that batches come from now; None if it has none."""
    for data in session_of(engine).data_in_use():
        acknowledge: Any = getattr(data, "acknowledge", None)
        if callable(acknowledge) and not isinstance(data, type):
            return cast("Callable[[Any], Any]", acknowledge)
    return None


async def _call(acknowledge: Callable[[Any], Any], position: Any) -> None:
    if is_async_callable(acknowledge):
        await acknowledge(position)
        return

    # A thread of its own: a slow broker takes none of the application's, and one that hangs holds up no exit.
    thread = DedicatedThread("aengine acknowledge")
    try:
        result = await thread.call(acknowledge, position)
    finally:
        thread.abandon()
    if result is not None and is_awaitable(result):
        await result

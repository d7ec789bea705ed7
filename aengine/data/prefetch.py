"""Prefetching: batches pulled ahead beside the step, into a bounded buffer; async data in a task, plain in a thread.

One prefetcher serves one pass over the data, from where its iterator stands to its end: it never asks for more once the
data has ended, so the next pass begins when the loop asks for it, after the handlers of EPOCH_STARTED.
"""

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias

import anyio

from aengine.errors import StrayCancellation
from aengine.threads.dedicated import DedicatedThread, wait_until_done
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent
from aengine.threads.guarded import guarded
from aengine.threads.thread_state import ThreadState

DataState: TypeAlias = Any
"""What the data's own `state_dict()` returned, or None."""


class Fetched(NamedTuple):
    """A batch, and the state of the data after it."""

    batch: Any
    state: DataState


class Buffer:
    """At most `size` batches between the prefetcher and the loop. Its end is the error that ended the data.

    The condition guards it all. A thread waits on it; a task sets `_arrival` or `_room` to a one-shot event while it
    holds it, so that whatever the other side does next sets that event.
    """

    def __init__(self, size: int, loop_handle: EventLoopHandle, wanted: Callable[[int], bool]) -> None:
        self._size = size
        self._loop_handle = loop_handle
        self._wanted = wanted  # given how many were put so far, says whether the run can use one more
        self._put = 0
        self._batches: deque[Fetched] = deque()
        self._error: BaseException | None = None
        self._condition = threading.Condition()
        self._arrival: ThreadSafeEvent | None = None
        self._room: ThreadSafeEvent | None = None
        self.closed = False

    def take_nowait(self) -> Fetched | None:
        """Take the next batch, None if it has not come yet.

        Raises:
            BaseException: what ended the data, once everything before it was taken.
        """
        with self._condition:
            if not self._batches:
                if self._error is None:
                    return None
                # Each raised once: an error that stays here would hold its traceback, and so the engine.
                error, self._error = self._error, StopIteration()
                try:
                    raise error
                finally:
                    del error
            fetched = self._batches.popleft()
            self._make_room()
            return fetched

    def _make_room(self) -> None:
        self._condition.notify_all()
        if self._room is not None:
            self._room.set()
            self._room = None

    def put_nowait(self, fetched: Fetched) -> None:
        """Add a batch, after `room()` or `room_in_thread()` has returned True."""
        with self._condition:
            self._batches.append(fetched)
            self._put += 1
            self._arrived()

    def end_nowait(self, error: BaseException) -> None:
        """No more comes: the data failed, or, with a StopIteration or StopAsyncIteration, ended."""
        with self._condition:
            # A new one: the traceback of an end says nothing, and would hold the prefetcher, and so the engine.
            self._error = StopIteration() if isinstance(error, StopIteration | StopAsyncIteration) else error
            self._arrived()

    def _arrived(self) -> None:
        if self._arrival is not None:
            self._arrival.set()
            self._arrival = None

    def close_nowait(self) -> None:
        """Have the prefetcher stop after the batch that it is fetching."""
        with self._condition:
            self.closed = True
            self._make_room()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will be pulled."""
        return self._error is not None

    def unread(self) -> list[Fetched]:
        """Take what was fetched and not stepped on."""
        with self._condition:
            unread, self._batches = self._batches, deque()
            return list(unread)

    def unreported(self) -> BaseException | None:
        """Take the error of the data that was not raised yet, if there is one."""
        with self._condition:
            error = self._error
            if error is not None:
                self._error = StopIteration()
            return None if isinstance(error, StopIteration) else error

    async def arrival(self) -> None:
        """Wait until a batch or the end has come. Cancellable; nothing is lost."""
        with self._condition:
            if self._batches or self._error is not None:
                return
            wakeup = self._arrival = ThreadSafeEvent(self._loop_handle)
            self._make_room()  # the loop waits for one more, whatever the run's limits say
        await wakeup.wait()

    @property
    def _has_room(self) -> bool:
        return len(self._batches) < self._size and (self._wanted(self._put) or self._arrival is not None)

    async def room(self) -> bool:
        """Wait for room, in a task. False if the buffer was closed."""
        while True:
            with self._condition:
                if self.closed or self._has_room:
                    return not self.closed
                wakeup = self._room = ThreadSafeEvent(self._loop_handle)
            await wakeup.wait()

    def room_in_thread(self) -> bool:
        """Wait for room, in a thread. False if the buffer was closed."""
        with self._condition:
            self._condition.wait_for(lambda: self.closed or self._has_room)
            return not self.closed


class Prefetcher:
    """Pulls from one iterator into a buffer, until the data ends or it is stopped."""

    def __init__(self, buffer: Buffer, state: Callable[[], DataState]) -> None:
        self.buffer = buffer
        self._state = state
        self._ended: Future[None] = Future()

    async def stop(self) -> None:
        """Let the fetch under way end, and wait for that. Cancellable."""
        self.buffer.close_nowait()
        if not self._ended.done():
            await wait_until_done(self._ended)


class TaskPrefetcher(Prefetcher):
    """Pulls from an async iterator, in a task of the run's group."""

    def __init__(self, buffer: Buffer, state: Callable[[], DataState], iterator: AsyncIterator[Any]) -> None:
        super().__init__(buffer, state)
        self._iterator = iterator
        self._scope: anyio.CancelScope | None = None
        self._is_cancelled = False

    async def pull(self) -> None:
        """The task. What the data raises is raised where its batches are taken."""
        buffer = self.buffer

        async def pull() -> None:
            # Shielded: a run that is cancelled stops this at the right moment, and waits for it.
            with anyio.CancelScope(shield=True) as self._scope:
                if self._is_cancelled:
                    self._scope.cancel()
                while await buffer.room():
                    batch = await anext(self._iterator)
                    buffer.put_nowait(Fetched(batch, self._state()))
                    del batch  # while waiting for room, keep no reference to it

        await guarded(pull, buffer.end_nowait, _stray)
        self._ended.set_result(None)

    def never_started(self) -> None:
        """The task was cancelled natively before its first step."""
        self.buffer.end_nowait(_stray())
        self._ended.set_result(None)

    async def cancel(self) -> None:
        """Stop now, also within a fetch. An async generator does not survive that."""
        self._is_cancelled = True
        if self._scope is not None:
            self._scope.cancel()
        await self.stop()


def _stray() -> StrayCancellation:
    return StrayCancellation("the task that pulls batches ahead was cancelled from outside the run")


class ThreadPrefetcher(Prefetcher):
    """Pulls from a plain iterator, in a thread of its own, which has the settings of the run's caller."""

    def __init__(
        self, buffer: Buffer, state: Callable[[], DataState], iterator: Iterator[Any], settings: ThreadState
    ) -> None:
        super().__init__(buffer, state)
        self._iterator = iterator
        self._thread = DedicatedThread("aengine-prefetch", settings.entered)
        self._ended = self._thread.submit(self._pull)
        self._thread.abandon()  # it makes this one call, and ends by itself where nothing waits for it

    def _pull(self) -> None:
        buffer = self.buffer
        try:
            while buffer.room_in_thread():
                batch = next(self._iterator)
                buffer.put_nowait(Fetched(batch, self._state()))
                del batch  # while waiting for room, keep no reference to it
        except BaseException as error:  # noqa: BLE001 -- StopIteration or the data's own: raised where it is taken
            buffer.end_nowait(error)

    async def stop(self) -> None:
        """Wait for the fetch under way: nothing can stop it. Cancellable, which leaves the thread to end by itself."""
        await super().stop()
        self._thread.stop()  # its one call has returned: microseconds

"""Prefetching: batches pulled ahead beside the step, into a bounded buffer; async data in a task, plain in a thread.

One prefetcher serves one pass over the data, from where its iterator stands to its end: it never asks for more once the
data has ended, so the next pass begins when the loop asks for it, after the handlers of EPOCH_STARTED.
"""

import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import anyio

from aengine.errors import StrayCancellation
from aengine.threads.dedicated import DedicatedThread, wait_until_done
from aengine.threads.event_loop import CancelOnceScope, EventLoopHandle, ThreadSafeEvent
from aengine.threads.guarded import guarded

if TYPE_CHECKING:
    from aengine.data.opened import OpenedData

DataState: TypeAlias = Any
"""What the data's own `state_dict()` returned, or None."""

DataStateOf: TypeAlias = Callable[[], DataState]


class Fetched(NamedTuple):
    """A batch, and the state of the data after it."""

    batch: Any
    state: DataState


class Buffer:
    """At most `size` batches between the prefetcher and the loop. Its end is the error that ended the data.

    The condition guards it all. A thread waits on it; a task sets `_arrival` or `_room` to a one-shot event while it
    holds it, so that whatever the other side does next sets that event.
    """

    def __init__(self, size: int, loop_handle: EventLoopHandle) -> None:
        self._size = size
        self._loop_handle = loop_handle
        self._wanted: Callable[[int], bool] = lambda _: True
        self._put = 0
        self._batches: deque[Fetched] = deque()
        self._error: BaseException | None = None
        self._condition = threading.Condition()
        self._arrival: ThreadSafeEvent | None = None
        self._room: ThreadSafeEvent | None = None
        self.closed: bool = False

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

    def begin(self, unread: Iterable[Fetched], wanted: Callable[[int], bool]) -> None:
        """The data is open: begin with what was fetched before.

        `wanted` is given how many were put so far, and says whether the run can use one more.
        """
        with self._condition:
            self._batches.extend(unread)
            self._wanted = wanted
            if self._batches:
                self._arrived()

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
            self._wanted = _never  # not the run's, which this may outlive
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


def _never(_: int) -> bool:
    return False


class TaskPrefetcher:
    """Opens async data, pulls from it into a buffer, and closes it, all in one task of the run's group.

    For what the data holds may belong to a task, or nest in it: the token of a context variable, a cancel scope, a task
    group.
    """

    def __init__(
        self, buffer: Buffer, opened: "OpenedData", begin: Callable[[], None], state: DataStateOf, grace: float
    ) -> None:
        self.buffer = buffer
        self._opened = opened
        self._begin = begin
        self._state = state
        self._ended = anyio.Event()
        self._scope: CancelOnceScope | anyio.CancelScope = CancelOnceScope(grace, shield=True)
        self._is_fetching = False
        self._closes = False  # when it ends; not where another run is to go on with it
        self._error: BaseException | None = None  # of closing

    async def pull(self) -> None:
        """The task. What the data raises is raised where its batches are taken."""
        await guarded(self._pull, self.buffer.end_nowait, _stray)
        self._ended.set()

    def never_started(self) -> None:
        """The task was cancelled natively before its first step."""
        self.buffer.end_nowait(_stray())
        self._ended.set()

    async def _pull(self) -> None:
        try:
            # Shielded: a run that is cancelled stops this at the right moment, and waits for it.
            with self._scope:
                try:
                    await self._fetch_all()
                except Exception as error:  # noqa: BLE001 -- raised where the batches are taken
                    self.buffer.end_nowait(error)
                await self._close()  # in this scope, inside which those are that the data has left open
        finally:
            # A generator whose fetch was cancelled has ended by that. What else was cancelled is closed here.
            with anyio.CancelScope(shield=True, deadline=self._scope.deadline) as self._scope:
                await self._close()

    async def _fetch_all(self) -> None:
        buffer = self.buffer
        if buffer.closed:
            return
        await self._fetch(self._opened.open_async())
        self._begin()
        iterator = self._opened.iterator
        while await buffer.room():
            batch = await self._fetch(anext(iterator))
            buffer.put_nowait(Fetched(batch, self._state()))
            del batch  # while waiting for room, keep no reference to it

    async def _fetch(self, fetch: Awaitable[Any]) -> Any:
        self._is_fetching = True
        try:
            return await fetch
        finally:
            self._is_fetching = False

    async def _close(self) -> None:
        if self._closes or self.buffer.has_ended:
            try:
                await self._opened.aclose()
            except Exception as error:  # noqa: BLE001 -- raised by close()
                self._error = error

    def cancel(self) -> None:
        """End the fetch under way. An async generator does not survive that."""
        # Not between two fetches: the data may have left a scope open, which must not outlive the one around it. There
        # the task waits for room, and ends by itself.
        if self._is_fetching:
            self._scope.cancel()

    async def stop(self) -> None:
        """Let the fetch under way end, and wait for that. The data stays open. Cancellable."""
        self.buffer.close_nowait()
        await self._ended.wait()

    async def close(self, deadline: float) -> None:
        """Let the fetch under way end, have the data closed, and wait for that. At the deadline both are cancelled.

        Cancellable: the task then goes on, until it is done or the deadline is past.

        Raises:
            BaseException: what closing it raised.
        """
        self._closes = True
        self._scope.deadline = min(self._scope.deadline, deadline)
        await self.stop()
        await self._close()  # where the task was stopped before, or never started
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # whose traceback holds this frame


def _stray() -> StrayCancellation:
    return StrayCancellation("the task that pulls batches ahead was cancelled from outside the run")


class ThreadPrefetcher:
    """Opens plain data, pulls from it into a buffer, and closes it, all in one thread.

    For what the data holds may belong to a thread, as a connection of sqlite3 does. The thread is the source's, not
    this one's: one pass may leave such a thing to the next.
    """

    def __init__(
        self,
        buffer: Buffer,
        opened: "OpenedData",
        begin: Callable[[], None],
        state: DataStateOf,
        thread: DedicatedThread,
        report: Callable[[BaseException], None],
    ) -> None:
        self.buffer = buffer
        self._opened = opened
        self._begin = begin
        self._state = state
        self._thread = thread
        self._report = report
        self._closing: ClosingInThread | None = None
        self._ended = thread.submit(self._pull)

    def _pull(self) -> None:
        buffer = self.buffer
        try:
            if buffer.closed:
                return
            self._opened.open()
            self._begin()
            iterator = self._opened.iterator
            while buffer.room_in_thread():
                batch = next(iterator)
                buffer.put_nowait(Fetched(batch, self._state()))
                del batch  # while waiting for room, keep no reference to it
        except BaseException as error:  # noqa: BLE001 -- StopIteration or the data's own: raised where it is taken
            buffer.end_nowait(error)

    def cancel(self) -> None:
        """Nothing can end the fetch under way."""

    async def stop(self) -> None:
        """Wait for the fetch under way. The data stays open. Cancellable."""
        self.buffer.close_nowait()
        if not self._ended.done():
            await wait_until_done(self._ended)

    async def close(self, deadline: float) -> None:  # noqa: ARG002 -- nothing ends what a thread does
        """Have the data closed after the fetch under way, and wait for that.

        Cancellable: the data is then closed whenever the fetch returns, and the errors of both are logged.

        Raises:
            BaseException: what closing it raised.
        """
        self.buffer.close_nowait()
        self._closing = self._closing or ClosingInThread(self._thread, self._opened, self._report, self.buffer)
        await self._closing.wait()

    def close_soon(self) -> None:
        """Have the data closed after the fetch under way, and the errors of both logged. Does not wait."""
        self.buffer.close_nowait()
        self._closing = self._closing or ClosingInThread(self._thread, self._opened, self._report, self.buffer)
        self._closing.leave()

    @property
    def is_busy(self) -> bool:
        """Whether the thread is in a fetch, or closes the data; neither may ever return."""
        return not self._ended.done() or (self._closing is not None and self._closing.is_busy)


class ClosingInThread:
    """Plain data is closed in the thread that has opened it, after what that thread does now."""

    def __init__(
        self,
        thread: DedicatedThread,
        opened: "OpenedData",
        report: Callable[[BaseException], None],
        buffer: Buffer | None = None,
    ) -> None:
        self._report = report  # an error for which nothing waits any more
        self._buffer = buffer  # which may get one
        self._is_left = False
        self._closed = thread.submit(opened.close)

    @property
    def is_busy(self) -> bool:
        """Whether it is not closed yet."""
        return not self._closed.done()

    async def wait(self) -> None:
        """Wait until it is closed, and raise what that raised. A cancellation leaves it to be closed later."""
        try:
            await wait_until_done(self._closed)
        except BaseException:
            self.leave()
            raise
        if not self._is_left:
            self._closed.result()

    def leave(self) -> None:
        """Have errors logged: nothing waits for it any more."""
        if not self._is_left:
            self._is_left = True
            # Not a method: the future keeps its callbacks, and this keeps the future.
            self._closed.add_done_callback(partial(_report_errors, self._report, self._buffer))


def _report_errors(report: Callable[[BaseException], None], buffer: Buffer | None, closed: "Future[None]") -> None:
    for error in (None if buffer is None else buffer.unreported(), closed.exception()):
        if error is not None:
            report(error)
        del error


def reporter(logger: logging.Logger, name: str) -> Callable[[BaseException], None]:
    """Return a function that logs an error of the data, of this name, for which nothing waits any more."""

    def report(error: BaseException) -> None:
        logger.error("the data (%s) failed when its run was over", name, exc_info=error)

    return report


Prefetcher: TypeAlias = TaskPrefetcher | ThreadPrefetcher

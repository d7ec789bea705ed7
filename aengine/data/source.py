"""Source: any data, as the next batch. Opening, restarting, prefetching, suspending, closing.

The loop calls `take()`. It returns the batch, or PENDING if the batch must be awaited: then the loop awaits
`arrival()`. Both are plain attributes that are exchanged as the source opens, ends and restarts, so that a batch from
a list costs one call of its iterator and nothing of ours.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from types import AsyncGeneratorType, GeneratorType
from typing import Any

import anyio

from aengine.data.adapt import Adapted, is_stateful, unwrapped
from aengine.data.finish import Finish
from aengine.data.managed import NOT_ENTERED, ManagedData, RunContext
from aengine.data.opened import OpenedData
from aengine.data.position import DataPosition
from aengine.data.prefetch import (
    Buffer,
    ClosingInThread,
    Fetched,
    Prefetcher,
    TaskPrefetcher,
    ThreadPrefetcher,
    reporter,
)
from aengine.data.taking import PENDING, arrive_never, end_of_data, raise_stop, take_later, without_stop
from aengine.errors import StrayCancellation
from aengine.state import State
from aengine.threads.dedicated import DedicatedThread, wait_until_done
from aengine.threads.event_loop import EventLoopHandle
from aengine.threads.thread_state import context_for_thread


class Source:
    """The data of one run.

    Attributes:
        data: the data as the user gave it.
        name: its type or function, for messages.
        is_one_shot: whether nothing can restart it.
        position: where it stands, and what of it was fetched and not stepped on.
        take: returns the next batch, or PENDING; raises StopIteration at the end of the data.
        arrival: returns an awaitable of the next batch, which raises StopAsyncIteration at the end. It may return
            PENDING: then `take()` is called again, on the thread of the loop, as where the data was entered.
        has_ended: whether the end was met, so that only a restart gives more.
        opened: what is iterated: the data itself, or what it made or gave when it was called or entered.
        finish: what the data has remain to be done to a batch as it is taken.
        run: the run on an event loop that reads this; without one nothing is awaited.
        follows: the state whose `epoch_length` is that of the pass under way; None where it is fixed.
    """

    position: DataPosition
    take: Callable[[], Any]
    arrival: Callable[[], Awaitable[Any]]

    def __init__(
        self,
        data: Adapted,
        logger: logging.Logger,
        *,
        unread: Iterable[Fetched] = (),
        completed: int = 0,
        may_have_other_length: bool = False,
    ) -> None:
        self.data: Any = data.data
        self.name: str = data.name
        self.is_one_shot: bool = data.is_one_shot
        self.position = DataPosition(data, logger, unread, completed, may_have_other_length=may_have_other_length)
        self.has_ended: bool = False
        self.opened: Any = None
        self.run: RunContext | None = None
        self.follows: State | None = None
        self._logger = logger
        self._report = reporter(logger, data.name)
        self._is_manager = data.is_manager
        self._managed: ManagedData | None = None  # while it is entered
        self._is_put_back = self._is_closed = False  # the former: the context manager, before it was entered
        self._entered: Any = NOT_ENTERED if data.is_manager else data.data  # what is opened
        self._pass: OpenedData | None = None
        self._prefetcher: Prefetcher | None = None
        self._thread: DedicatedThread | None = None  # pulls plain data ahead, pass after pass, across interruptions
        self._worker: DedicatedThread | None = None  # that of an interrupted run, which has pulled what is open
        self._making: Future[bool] | None = None  # the call of a function that makes the data, in that thread
        self._begun_in: EventLoopHandle | None = None  # where an async iterator was begun that outlives a run
        self.finish: Finish = Finish()
        self.take: Callable[[], Any]
        self.arrival: Callable[[], Awaitable[Any]]
        self._use(self._open_and_take, self._open_and_wait)

    def attach(self, run: RunContext | None) -> None:
        """A run on an event loop begins, or goes on, and reads this; None when it is over.

        Raises:
            RuntimeError: the data was begun in another event loop, which has ended and an async generator with it.
        """
        if run is not None and self._begun_in is not None and not self._begun_in.is_same(run.loop_handle):
            raise RuntimeError(
                f"the data ({self.name}) was begun in another event loop: an interrupted run of async data of unknown"
                " length goes on in the same one; terminate() instead of interrupt() lets it be resumed anywhere"
            )
        self.run = run

    # Beginning, ending, beginning again

    def resume_at(self, position: Mapping[str, Any], completed: int) -> None:
        """Go on, at the next fetch, from a position of `position.after()`, in a loop that has completed so much."""
        if self.position.resume_at(position, completed):
            self.has_ended, self.take = True, raise_stop

    def end(self, completed: int) -> None:
        """The end of the data was met: from now on only `restart` gives more."""
        self.has_ended, self.take = True, raise_stop
        self.position.end(completed)

    def restart(self, completed: int) -> None:
        """Begin the data again at the next fetch. What is open has been closed; what is unread is dropped."""
        self.has_ended = self._is_closed = self.finish.is_missing = False
        self._use(self._open_and_take, self._open_and_wait)
        self.position.restart(completed)

    def unread_batch(self, batch: Any) -> None:
        """Take back the batch in hand, which was not stepped on: it is the next one."""
        self.position.unread_batch(self.finish.as_fetched(batch))
        self.finish.drop()
        self._use(self._take_unread)

    # Taking

    def _use(self, take: Callable[[], Any], arrival: Callable[[], Awaitable[Any]] | None = None) -> None:
        """Have batches taken, and awaited, so from now on."""
        self._take: Callable[[], Any] = take
        self._arrival: Callable[[], Awaitable[Any]] = arrival or self._arrival
        is_final = self.finish.is_missing
        self.take = take if is_final else self._take_finished
        self.arrival = self._arrival if is_final else self._arrival_unfinished

    def _take_finished(self) -> Any:
        self.finish.drop()
        batch = self._take()
        try:
            return batch if batch is PENDING else self.finish(batch)
        except BaseException:
            self.unread_batch(batch)
            raise

    async def _arrival_unfinished(self) -> Any:
        """What is awaited is awaited on the event loop: have the batch taken again, on the thread of the loop."""
        batch = await self._arrival()
        if batch is not PENDING and self.finish.hook is not None:
            self.unread_batch(batch)
            return PENDING
        return batch

    # Opening

    def _open_and_take(self) -> Any:
        data = self._entered
        if data is NOT_ENTERED:
            return PENDING
        if data is None:
            self.finish.look_for(data)
            self._use(lambda: None)
            return None
        opened = self._pass = OpenedData(data, self.data, self.position, self._put_back)
        run = self.run
        # Where a thread of its own would not have what is in force here, plain data is pulled here.
        is_ahead = run is not None and run.prefetch and (run.settings.bound is None or opened.make())
        if is_ahead or opened.make():
            self._use(take_later, self._open_ahead if is_ahead else None)
            return PENDING
        opened.open()
        self._choose()
        return self._took_first(self._take())

    async def _open_and_wait(self) -> Any:
        if self._entered is NOT_ENTERED:
            await self._enter()
            return PENDING
        opened = self._pass
        assert opened is not None, "made by take()"  # noqa: S101
        await opened.open_async()
        self._choose()
        batch = without_stop(self._take)
        if batch is PENDING:
            batch = await self._arrival()
        return self._took_first(batch)

    def _took_first(self, batch: Any) -> Any:
        """Only now is the length surely that of this pass: samplers may plan it as its first batch is fetched."""
        position, state, known = self.position, self.follows, self.position.said
        position.took_first(batch)
        length = position.ask_length()
        if state is not None and length not in (None, known) and position.origin == state.epoch_start:
            state.epoch_length = length
        return batch

    async def _enter(self) -> None:
        assert self.run is not None, "what is awaited is awaited on an event loop"  # noqa: S101
        if is_stateful(self.data) and not self._is_put_back:  # before it is entered: that may begin to fetch
            try:
                self.position.open()
                self.position.put_back(self.data)
            finally:
                self.position.leave()
            self._is_put_back = True
        managed = ManagedData(self.data, self.run)
        self._entered = await managed.enter()
        self._managed = managed

    def _put_back(self, made: Any) -> None:
        self.opened = made
        self.finish.look_for(made)
        if not self._is_put_back:
            self.position.put_back(self.data if self._is_manager and is_stateful(self.data) else made)
        self._is_put_back = False

    def _choose(self) -> None:
        """The data stands where it should: choose how to take from it."""
        position, opened = self.position, self._pass
        has_state = position.stateful is not None
        if position.unread:
            self._use(self._take_unread)
        elif self._prefetcher is not None:
            self._use(self._take_ahead, self._arrival_ahead)
        elif opened is None:
            self._use(raise_stop)
        elif opened.is_async:
            self._use(take_later, self._arrival_of_stateful if has_state else opened.iterator.__anext__)
        else:
            self._use(self._take_of_stateful if has_state else opened.iterator.__next__)

    def _take_unread(self) -> Any:
        fetched = self.position.unread.popleft()
        if not self.position.unread:
            self._choose()
        return self.position.took(*fetched)

    def _take_of_stateful(self) -> Any:
        batch, position = next(self._iterator), self.position
        return position.took(batch, position.state())

    async def _arrival_of_stateful(self) -> Any:
        batch, position = await anext(self._iterator), self.position
        return position.took(batch, position.state())

    @property
    def _iterator(self) -> Any:
        return None if self._pass is None else self._pass.iterator

    # Ahead of the step

    async def _open_ahead(self) -> Any:
        opened, run = self._pass, self.run
        assert opened is not None and run is not None, "opened by take(), awaited by a run"  # noqa: S101, PT018
        if opened.is_async is None and opened.is_made_by_plain_code:
            making = self._making = self._thread_of(run).submit(opened.make)
            try:
                await wait_until_done(making)
                making.result()
                self._making = None
            finally:
                del making  # holds the error, whose traceback holds this frame
        else:
            opened.make()
        self._pull_ahead(opened, run)
        batch = await self._arrival_ahead()
        self._choose()  # only now it is known whether the data has a hook
        return self._took_first(batch)

    def _pull_ahead(self, opened: OpenedData, run: RunContext) -> None:
        buffer = Buffer(run.prefetch or 1, run.loop_handle)
        begin, state = partial(self._begin_ahead, buffer, run), self.position.state
        if opened.is_async:
            self._prefetcher = TaskPrefetcher(buffer, opened, begin, state, run.grace)
            run.spawn(self._prefetcher.pull, self._prefetcher.never_started)
        else:
            thread = self._thread_of(run)
            self._prefetcher = ThreadPrefetcher(buffer, opened, begin, state, thread, self._report)
        self._use(self._take_ahead, self._arrival_ahead)

    def _begin_ahead(self, buffer: Buffer, run: RunContext) -> None:
        """The data is open. Called where it is pulled, while the loop waits for the first batch."""
        unread, fetched = self.position.unread, self.position.fetched
        # Without prefetch= an interrupted run goes on with data that another thread has pulled ahead: now on demand.
        buffer.begin(unread, lambda more: bool(run.prefetch) and run.can_use(fetched + more))
        unread.clear()

    def _thread_of(self, run: RunContext) -> DedicatedThread:
        if self._thread is None:
            self._thread = DedicatedThread("aengine-prefetch", run.settings.entered, context=context_for_thread())
        return self._thread

    def _take_ahead(self) -> Any:
        fetched = self._buffer.take_nowait()
        return PENDING if fetched is None else self.position.took(*fetched)

    async def _arrival_ahead(self) -> Any:
        await self._buffer.arrival()
        return without_stop(self._take_ahead)

    @property
    def _buffer(self) -> Buffer:
        assert self._prefetcher is not None, "put in place before this"  # noqa: S101
        return self._prefetcher.buffer

    # Suspending and closing

    @property
    def must_be_awaited(self) -> bool:
        """Whether suspending or closing this takes an await."""
        return self._prefetcher is not None or self._thread is not None or self._is_manager or self._is_async_of_ours

    @property
    def is_open(self) -> bool:
        """Whether `close()` is still to be called."""
        return self._pass is not None

    @property
    def must_be_closed(self) -> bool:
        """Whether anything is open, or under way, that `aclose()`, `close()` and `exit()` end."""
        return self.is_open or self._prefetcher is not None or self._thread is not None or self._managed is not None

    def suspend(self, completed: int) -> Generator[Awaitable[None], Any, None]:
        """Stop pulling ahead, but stay where the data stands. Yields what must be awaited; each is cancellable."""
        prefetcher = self._prefetcher
        if (self._is_async_of_ours or self._is_manager) and self.position.can_return:
            # The event loop may end before the next run, and an async generator with it; an async context manager is
            # exited, and entered again: begin again, by position.
            position = self.position.after(completed)
            if prefetcher is not None:
                yield prefetcher.close(math.inf)  # after the fetch under way
            yield from self.close_pass()
            self.restart(completed)
            self.resume_at(position, completed)
            if self._is_manager:
                self._entered = NOT_ENTERED
            return
        if prefetcher is not None:
            yield prefetcher.stop()
            if self._thread is not None:
                self._thread.settle()
            if not prefetcher.buffer.has_ended:
                self._keep_what_was_pulled()
                self._use(self._take_after_suspension)
        if self._is_async_of_ours and self.run is not None:
            self._begun_in = self.run.loop_handle
        if self._is_manager:  # it is exited with this run, and entered by the next
            is_ahead = self._prefetcher is not None and self._buffer.has_ended
            error = self._buffer.unreported() if is_ahead else None
            yield from self.close_pass()
            self._entered, self._is_closed, self.finish.is_missing = NOT_ENTERED, False, False
            self._use(self._open_and_take, self._open_and_wait)
            if is_ahead or self.has_ended:  # it goes on with what was pulled, then the end; a restart enters it again
                self._pass = OpenedData(end_of_data(error), None, self.position, lambda _: None)
                self._pass.make()
                self._pass.open()
                self._choose()

    @property
    def belongs_to_thread(self) -> bool:
        """Whether plain data that was left open by an interruption may belong to the thread of the loop."""
        iterator = None if self._thread is not None or self._pass is None or self._pass.is_async else self._iterator
        # What Python itself makes, as of a list, belongs to none: no thread need be kept for it.
        return isinstance(iterator, GeneratorType) or type(iterator).__module__ != "builtins"

    def keep_thread(self, thread: DedicatedThread | None) -> None:
        """Keep the thread of the loop, which is idle, for the next run, or to close in it what is open."""
        self._worker = thread

    def take_thread(self) -> DedicatedThread | None:
        """Return the thread that was kept, if there is one, and keep it no longer."""
        thread, self._worker = self._worker, None
        return thread

    @property
    def has_kept_thread(self) -> bool:
        """Whether the next run must go on in the thread of the run before."""
        return self._worker is not None

    def _take_after_suspension(self) -> Any:
        self._use(take_later, self._arrival_after_suspension)
        return PENDING

    async def _arrival_after_suspension(self) -> Any:
        opened, run = self._pass, self.run
        assert opened is not None and run is not None, "left open, awaited by a run"  # noqa: S101, PT018
        if run.prefetch or self._thread is not None:
            self._pull_ahead(opened, run)
        else:
            self._choose()
        taken = without_stop(self._take)
        return await self._arrival() if taken is PENDING else taken

    def _keep_what_was_pulled(self) -> None:
        self.position.unread.extend(self._buffer.unread())
        unreported = self._buffer.unreported()
        if unreported is not None and not isinstance(unreported, StrayCancellation):
            self._logger.error("the data (%s) failed, ahead of the last step", self.name, exc_info=unreported)
        del unreported
        self._prefetcher = None

    def close_pass(self, *, gently: bool = False) -> Generator[Awaitable[None], Any, None]:
        """Stop pulling ahead, and close what the engine has opened. Yields what must be awaited, as `aclose()` says.

        On the thread of the loop, which has pulled what was not pulled ahead.
        """
        try:
            if self.must_be_awaited:
                yield self.aclose(gently=gently)
        finally:
            self.close()

    async def aclose(self, *, gently: bool = False) -> None:
        """Close what must be awaited for that. The caller shields and bounds this, and then calls `close()`.

        With `gently`, a fetch from an async generator of the user's may end by itself, within half of the grace: to
        cancel it would end the generator, which the user may iterate further.
        """
        prefetcher, opened = self._prefetcher, self._pass
        if prefetcher is not None:
            grace = math.inf if self.run is None else self.run.grace
            if gently and self._is_generator_of_users:
                with anyio.move_on_after(grace / 2):
                    await prefetcher.stop()
            prefetcher.cancel()
            deadline = anyio.current_effective_deadline()
            try:
                await prefetcher.close(anyio.current_time() + grace if math.isinf(deadline) else deadline)
            except Exception:
                self._keep_what_was_pulled()
                raise
            self._keep_what_was_pulled()
        elif opened is not None and opened.is_async:
            await opened.aclose()
        elif opened is not None and self._thread is not None:  # it was left open by an interruption
            await ClosingInThread(self._thread, opened, self._report).wait()

    def close(self) -> None:
        """Close what takes no await, on the thread that has pulled it. Does nothing a second time."""
        # Bound methods of its own would keep this alive until the collector runs, and a DataLoader's workers with it.
        self.take, self.arrival = self._take, self._arrival = raise_stop, arrive_never
        self._is_closed = True
        opened, is_elsewhere = self._pass, self._thread is not None or self._worker is not None
        if opened is not None and not opened.is_async and not is_elsewhere:
            opened.close()
        if opened is None or opened.iterator is None:  # else `aclose()` was cut off, and is called again
            self._pass = None

    def give_up(self) -> None:
        """Close what an interrupted run has left open, where nothing can be awaited any more. An error is logged."""
        prefetcher, thread, opened = self._prefetcher, self._thread or self._worker, self._pass
        if isinstance(prefetcher, ThreadPrefetcher):
            prefetcher.close_soon()
        elif thread is not None and opened is not None:
            ClosingInThread(thread, opened, self._report).leave()
        is_busy = self._is_thread_busy
        self.close()
        self._pass = self._prefetcher = self._thread = self._worker = None
        if thread is not None:
            thread.abandon() if is_busy or thread.is_here else thread.stop()

    async def exit(self) -> None:
        """Exit the async context manager that the data is, and end the thread. Cancellable: then it exits at once."""
        managed, self._managed = self._managed, None
        try:
            if managed is not None:
                await managed.exit()
        finally:
            if self._is_closed:  # else the next run goes on with what is open, in this thread
                if self._thread is not None:
                    self._thread.abandon() if self._is_thread_busy else self._thread.stop()
                self._prefetcher = self._thread = None  # where its end was not waited for, it still refers to this

    @property
    def _is_thread_busy(self) -> bool:
        prefetcher, making = self._prefetcher, self._making
        is_making = making is not None and not making.done()
        return is_making or (isinstance(prefetcher, ThreadPrefetcher) and prefetcher.is_busy)

    @property
    def can_be_woken(self) -> bool:
        """Whether a wait for the next batch can be cancelled without harm to data that outlives the run."""
        return self._prefetcher is not None or not self._is_generator_of_users

    @property
    def _is_async_of_ours(self) -> bool:
        opened = self._pass
        return opened is not None and opened.is_ours and hasattr(opened.iterator, "aclose")

    @property
    def _is_generator_of_users(self) -> bool:
        opened = self._pass
        return opened is not None and not opened.is_ours and isinstance(unwrapped(opened.iterator), AsyncGeneratorType)

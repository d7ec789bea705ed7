"""Source: any data, as the next batch. Opening, restarting, prefetching, suspending, closing.

The loop calls `take()`. It returns the batch, or PENDING if the batch must be awaited: then the loop awaits
`arrival()`. Both are plain attributes that are exchanged as the source opens, ends and restarts, so that a batch from
a list costs one call of its iterator and nothing of ours.
"""

import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Generator, Iterable, Mapping
from types import AsyncGeneratorType
from typing import Any, NoReturn, cast

import anyio

from aengine.data.adapt import Adapted, has, is_factory, is_iterable
from aengine.data.managed import ManagedData, RunContext
from aengine.data.position import DataPosition
from aengine.data.prefetch import Buffer, Fetched, Prefetcher, TaskPrefetcher, ThreadPrefetcher
from aengine.data.rewind import END
from aengine.errors import StrayCancellation
from aengine.state import State
from aengine.threads.event_loop import EventLoopHandle

PENDING: Any = object()
"""What `take()` returns when the next batch must be awaited."""


class Source:
    """The data of one run.

    Attributes:
        data: the data as the user gave it.
        name: its type or function, for messages.
        is_one_shot: whether nothing can restart it.
        position: where it stands, and what of it was fetched and not stepped on.
        take: returns the next batch, or PENDING; raises StopIteration at the end of the data.
        arrival: returns an awaitable of the next batch, which raises StopAsyncIteration at the end.
        has_ended: whether the end was met, so that only a restart gives more.
        run: the run on an event loop that reads this; without one nothing is awaited.
        follows: the state whose `epoch_length` is that of the pass under way; None where it is fixed.
    """

    def __init__(
        self,
        data: Adapted,
        logger: logging.Logger,
        *,
        unread: Iterable[Fetched] = (),
        completed: int = 0,
        may_have_other_length: bool = False,
    ) -> None:
        self.data = data.data
        self.name = data.name
        self.is_one_shot = data.is_one_shot
        self.position = DataPosition(data, logger, unread, completed, may_have_other_length=may_have_other_length)
        self.has_ended = False
        self.run: RunContext | None = None
        self.follows: State | None = None
        self._logger = logger
        self._is_manager = data.is_manager
        self._managed: ManagedData | None = None  # while it is entered
        self._entered: Any = _NOT_ENTERED if data.is_manager else data.data  # what is opened
        self._made: Any = None  # async data that is to be put back, until it is
        self._iterator: Any = None
        self._prefetcher: Prefetcher | None = None
        self._begun_in: EventLoopHandle | None = None  # where an async iterator was begun that outlives a run
        self.arrival: Callable[[], Awaitable[Any]] = self._open_and_wait
        self.take: Callable[[], Any] = self._open_and_take

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
            self.has_ended, self.take = True, _raise_stop

    def end(self, completed: int) -> None:
        """The end of the data was met: from now on only `restart` gives more."""
        self.has_ended = True
        self.take = _raise_stop
        self.position.end(completed)

    def restart(self, completed: int) -> None:
        """Begin the data again at the next fetch. What is open has been closed; what is unread is dropped."""
        self.has_ended = False
        self.take, self.arrival = self._open_and_take, self._open_and_wait
        self.position.restart(completed)

    def unread_batch(self, batch: Any) -> None:
        """Take back the batch in hand, which was not stepped on: it is the next one."""
        self.position.unread_batch(batch)
        self.take = self._take_unread

    # Opening

    def _open_and_take(self) -> Any:
        data, position = self._entered, self.position
        if data is _NOT_ENTERED:
            return PENDING
        if data is None:
            self.take = lambda: None
            return None
        try:
            position.open()
            made: Any = data() if is_factory(data) else data
            is_async = has(made, "__aiter__")
            if not is_async and not is_iterable(made):
                raise TypeError(
                    f"data() returned {made!r}, which is no iterable and no async iterable: return or yield batches"
                )
            position.put_back(made)
            self._iterator = aiter(cast(AsyncIterable[Any], made)) if is_async else iter(cast(Iterable[Any], made))
            rewind = position.rewind
            while rewind is not None and rewind.to_fetch and not is_async:
                if rewind.fetched(next(self._iterator, END)):
                    self._iterator = iter(made)
        finally:
            if position.rewind is not None:
                position.rewind.leave()
        if is_async:
            self._made = made
            self.take = lambda: PENDING
            return PENDING
        self._start()
        return self.take()

    async def _open_and_wait(self) -> Any:
        if self._entered is _NOT_ENTERED:
            assert self.run is not None, "what is awaited is awaited on an event loop"  # noqa: S101
            managed = ManagedData(self.data, self.run)
            self._entered = await managed.enter()
            self._managed = managed
            taken = _without_stop(self._open_and_take)
            if taken is not PENDING:
                return taken
        rewind, made = self.position.rewind, self._made
        self._made = None
        while rewind is not None and rewind.to_fetch:
            if rewind.fetched(await rewind.within(anext(self._iterator, END))):
                self._iterator = aiter(made)
        self._start()
        taken = _without_stop(self.take)
        return await self.arrival() if taken is PENDING else taken

    def _start(self) -> None:
        """The iterator stands where it should: begin to pull ahead, if so wished, and take its first batch."""
        self.position.end_rewind()
        self._pull_ahead_if_wished()
        self.take = self._take_first

    def _take_first(self) -> Any:
        self._choose()
        batch = self.take()
        if batch is PENDING:
            self.arrival = self._arrival_first
        else:
            self._took_first(batch)
        return batch

    async def _arrival_first(self) -> Any:
        self._choose()
        batch = await self.arrival()
        self._took_first(batch)
        return batch

    def _took_first(self, batch: Any) -> None:
        """Only now is the length surely that of this pass: samplers may plan it as its first batch is fetched."""
        position, state, known = self.position, self.follows, self.position.said
        position.took_first(batch)
        length = position.ask_length()
        if state is not None and length not in (None, known) and position.origin == state.epoch_start:
            state.epoch_length = length

    def _choose(self) -> None:
        position, iterator = self.position, self._iterator
        has_state = position.stateful is not None
        if position.unread:
            self.take = self._take_unread
        elif self._prefetcher is not None:
            self.take, self.arrival = self._take_ahead, self._arrival_ahead
        elif has(iterator, "__anext__"):
            self.take = lambda: PENDING
            self.arrival = self._arrival_of_stateful if has_state else iterator.__anext__
        else:
            self.take = self._take_of_stateful if has_state else iterator.__next__

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

    # Ahead of the step

    def _pull_ahead_if_wished(self) -> None:
        if self.run is not None and self.run.prefetch and self._prefetcher is None:
            self._prefetcher = self._pull_ahead(self.run)

    def _pull_ahead(self, run: RunContext) -> Prefetcher:
        fetched, state = self.position.fetched, self.position.state
        buffer = Buffer(run.prefetch, run.loop_handle, lambda more: run.can_use(fetched + more))
        if not has(self._iterator, "__anext__"):
            return ThreadPrefetcher(buffer, state, self._iterator, run.settings)
        prefetcher = TaskPrefetcher(buffer, state, self._iterator)
        run.spawn(prefetcher.pull, prefetcher.never_started)
        return prefetcher

    def _take_ahead(self) -> Any:
        fetched = self._buffer.take_nowait()
        return PENDING if fetched is None else self.position.took(*fetched)

    async def _arrival_ahead(self) -> Any:
        await self._buffer.arrival()
        return _without_stop(self._take_ahead)

    @property
    def _buffer(self) -> Buffer:
        assert self._prefetcher is not None, "put in place before this"  # noqa: S101
        return self._prefetcher.buffer

    # Suspending and closing

    @property
    def must_be_awaited(self) -> bool:
        """Whether suspending or closing this takes an await."""
        return self._prefetcher is not None or self._is_manager or self._is_async_of_ours

    async def suspend(self, completed: int) -> None:
        """Stop pulling ahead, but stay where the data stands. Waits for the fetch under way. Cancellable."""
        if self._prefetcher is not None:
            await self._prefetcher.stop()
        if self._prefetcher is not None and not self._buffer.has_ended:
            self._keep_what_was_pulled()
            self.take = self._take_after_suspension
        if (self._is_async_of_ours or self._is_manager) and self.position.can_return:
            # The event loop may end before the next run, and an async generator with it; an async context manager is
            # exited, and entered again: begin again, by position.
            position = self.position.after(completed)
            await self.aclose()
            self.restart(completed)
            self.resume_at(position, completed)
            if self._is_manager:
                self._entered = _NOT_ENTERED
            return
        if self._is_async_of_ours and self.run is not None:
            self._begun_in = self.run.loop_handle
        if self._is_manager:  # it is exited with this run, and entered by the next
            is_ahead = self._prefetcher is not None and self._buffer.has_ended
            error = self._buffer.unreported() if is_ahead else None
            await self.aclose()
            self._entered = _NOT_ENTERED
            self.take, self.arrival = self._open_and_take, self._open_and_wait
            if is_ahead or self.has_ended:  # it goes on with what was pulled, then the end; a restart enters it again
                self._iterator = _end_of_data(error)
                self._choose()

    def _take_after_suspension(self) -> Any:
        self._pull_ahead_if_wished()
        self._choose()
        return self.take()

    def _keep_what_was_pulled(self) -> None:
        self.position.unread.extend(self._buffer.unread())
        unreported = self._buffer.unreported()
        if unreported is not None and not isinstance(unreported, StrayCancellation):
            self._logger.error("the data (%s) failed, ahead of the last step", self.name, exc_info=unreported)
        del unreported
        self._prefetcher = None

    async def aclose(self, *, gently: bool = False) -> None:
        """Stop pulling ahead, and close the iterator if the engine opened it. The caller shields and bounds this.

        With `gently`, a fetch from an async generator of the user's may end by itself, within half of the grace: to
        cancel it would end the generator, which the user may iterate further.
        """
        prefetcher = self._prefetcher
        if isinstance(prefetcher, TaskPrefetcher):
            if gently and self.run is not None and self._is_generator_of_users:
                with anyio.move_on_after(self.run.grace / 2):
                    await prefetcher.stop()
            await prefetcher.cancel()
        elif prefetcher is not None:
            await prefetcher.stop()
        if prefetcher is not None:
            self._keep_what_was_pulled()
        if self._is_async_of_ours:
            iterator, self._iterator = self._iterator, None
            await iterator.aclose()
        self.close()

    async def exit(self) -> None:
        """Exit the async context manager that the data is. Cancellable, which makes it exit at once."""
        managed, self._managed = self._managed, None
        if managed is not None:
            await managed.exit()

    def close(self) -> None:
        """Close the iterator if the engine opened it; where nothing must be awaited for that."""
        is_ours, iterator, self._iterator = self._is_ours, self._iterator, None
        # Bound methods of its own would keep this alive until the collector runs, and a DataLoader's workers with it.
        self.take, self.arrival = _raise_stop, _arrive_never
        if is_ours and hasattr(iterator, "close"):
            iterator.close()

    @property
    def can_be_woken(self) -> bool:
        """Whether a wait for the next batch can be cancelled without harm to data that outlives the run."""
        return self._prefetcher is not None or not self._is_generator_of_users

    @property
    def _is_ours(self) -> bool:
        iterator = self._iterator
        return iterator is not None and iterator is not self.data and iterator is not self._entered

    @property
    def _is_async_of_ours(self) -> bool:
        return self._is_ours and hasattr(self._iterator, "aclose")

    @property
    def _is_generator_of_users(self) -> bool:
        return not self._is_ours and isinstance(self._iterator, AsyncGeneratorType)


_NOT_ENTERED = object()


def _end_of_data(error: BaseException | None) -> Generator[NoReturn]:
    if error is not None:
        raise error
    yield from ()


def _without_stop(take: Callable[[], Any]) -> Any:
    """Take a batch in a coroutine, which cannot raise StopIteration."""
    try:
        return take()
    except StopIteration:
        raise StopAsyncIteration from None


def _raise_stop() -> NoReturn:
    raise StopIteration


async def _arrive_never() -> NoReturn:
    raise StopAsyncIteration

"""Source: any data, as the next batch. Opening, restarting, prefetching, position, closing.

The loop asks `take()`. It returns the batch, or PENDING if the batch must be awaited: then the loop awaits
`arrival()`. Both are plain attributes that are exchanged as the source opens, ends and restarts, so that a batch from
a list costs one call of its iterator and nothing of ours.
"""

import logging
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Generator, Iterable, Mapping
from enum import Enum
from types import AsyncGeneratorType
from typing import Any, Final, NoReturn, cast

import anyio

from aengine.data.adapt import has, is_factory, is_iterable, is_one_shot, length_of, shown
from aengine.data.managed import RunContext
from aengine.data.prefetch import Buffer, Fetched, Position, Prefetcher, TaskPrefetcher, ThreadPrefetcher
from aengine.errors import StrayCancellation
from aengine.state import Randomness, Stateful
from aengine.threads.event_loop import EventLoopHandle

_MAY_REPEAT = (
    "goes on where it is, and is not wound forward by {} batches: without a length it may be a stream. If it gives the"
    " same batches each time, those come again: give it __len__, or state_dict and load_state_dict"
)


class Pending(Enum):
    """The type of PENDING."""

    PENDING = "pending"


PENDING: Final = Pending.PENDING
"""What `take()` returns when the next batch must be awaited."""


class Source:
    """The data of one run.

    Attributes:
        data: the data as the user gave it.
        name: its type or function, to show.
        take: returns the next batch, or PENDING; raises StopIteration at the end of the data.
        arrival: returns an awaitable of the next batch, which raises StopAsyncIteration at the end.
        has_ended: whether the end was seen, so that only a restart gives more.
    """

    def __init__(
        self,
        data: Any,
        logger: logging.Logger,
        unread: list[Fetched] | None = None,
        randomness: Randomness | None = None,
    ) -> None:
        self.data = data
        self.name = shown(data)
        self.has_ended = False
        self.host: RunContext | None = None  # the run on an event loop; without one nothing is awaited
        self._is_manager = has(data, "__aenter__")
        self.entered: Any = _NOT_ENTERED if self._is_manager else data
        self.is_one_shot = is_one_shot(data)
        self._logger = logger
        self._origin = 0  # the count of completed iterations at which this pass over the data began
        self._resume_at: Mapping[str, Any] | None = None
        self._unread: deque[Fetched] = deque(unread or ())  # fetched in an earlier run, never stepped on
        self._iterator: Any = None
        self._stateful: Stateful | None = None
        self._prefetcher: Prefetcher | None = None
        self._length: int | None = length_of(data)
        # With a position of its own: where the data stood before and after the batch last taken.
        self._before: Position = None
        self._after: Position = None
        self._taken = 0
        self._to_skip = 0
        self._was_put_back = False
        self._randomness = randomness
        self._rng_at_start: Any = None  # where the generators stood as this pass over the data began
        self._rng_before_rewind: Any = None  # where they stood before it was put back to where it stood
        self._begun_at: EventLoopHandle | None = None  # where an async iterator was begun that outlives a run
        self.arrival: Callable[[], Awaitable[Any]] = self._open_and_wait
        self.take: Callable[[], Any] = self._open_and_take

    # Beginning, ending, beginning again

    def resume_at(self, position: Mapping[str, Any], completed: int) -> None:
        """Go on, at the next fetch, from a position that `position()` gave, in a loop that has completed so much."""
        self._resume_at = position
        self._origin = completed - position["batches"]
        self._taken = position["batches"]
        self._after = position["state"]
        self._rng_at_start = position.get("opening")
        self._length = self._length or position["length"]
        is_at_end = position["state"] is None and position["batches"] == self._length and not self.is_one_shot
        # Where a sampler draws from a generator of its own it does so once more as it ends: that end must be met.
        if is_at_end and not (self._randomness is not None and self._randomness.has_own(self.data)):
            self._resume_at = None  # nothing to wind to: the next fetch meets the end
            self.has_ended, self.take = True, _raise_stop

    def end(self, completed: int) -> None:
        """The end of the data was seen: from now on only `restart` gives more."""
        self.has_ended = True
        self.take = _raise_stop
        self._length = completed - self._origin

    def restart(self, completed: int) -> None:
        """Begin the data again at the next fetch. What is open has been closed."""
        self.has_ended = False
        self.take, self.arrival = self._open_and_take, self._open_and_wait
        self._origin = completed
        self._resume_at = None
        self._taken = 0
        self._before = self._after = None

    def forget(self) -> None:
        """Drop what was fetched and not stepped on: the data begins again."""
        self._unread.clear()

    def position(self, completed: int) -> dict[str, Any]:
        """Return the position after the batch of the last completed step: what `resume_at` takes."""
        batches = completed - self._origin
        state = self._after if self._taken <= batches else self._before
        position = {"batches": batches, "length": self._length, "state": state}
        return position if self._randomness is None else {**position, "opening": self._rng_at_start}

    def passed(self, completed: int) -> int:
        """Return how many batches of this pass over the data are completed."""
        return completed - self._origin

    def unread_batch(self, batch: Any) -> None:
        """Take back the batch in hand, which was not stepped on: it is the next one."""
        self._unread.appendleft(Fetched(batch, self._after))
        self._taken -= 1
        self._after = self._before
        self.take = self._take_unread

    def unread(self) -> list[Fetched]:
        """Return what was fetched and not stepped on, unless resuming will fetch it again."""
        return [] if self._can_skip or self._stateful is not None else list(self._unread)

    @property
    def _can_skip(self) -> bool:
        return not self.is_one_shot and self._length is not None

    # Opening

    def _open_and_take(self) -> Any:
        data = self.entered
        if data is _NOT_ENTERED:
            return PENDING
        if data is None:
            self.take = _no_batch
            return None
        made: Any = data() if is_factory(data) else data
        self._stateful = made if isinstance(made, Stateful) else None
        if self._was_put_back and type(made).__module__.partition(".")[0] == "datasets":
            # Hugging Face's go back to the state that they were given at each pass, until they are given another.
            made.load_state_dict({})
        if has(made, "__aiter__"):
            self._to_skip = self._resume()
            self._iterator = aiter(cast(AsyncIterable[Any], made))
            if not self._to_skip:
                self._restore_rng()
            self.take = _pending
            return PENDING
        if not is_iterable(made):
            raise TypeError(
                f"data() returned {made!r}, which is no iterable and no async iterable: return or yield batches"
            )
        to_skip = self._resume()
        try:
            self._iterator = iter(cast(Iterable[Any], made))
            for fetched in range(to_skip):
                if next(self._iterator, _END) is _END:
                    raise self._too_short(fetched, to_skip)
        finally:
            self._restore_rng()
        self._start()
        return self.take()

    async def _open_and_wait(self) -> Any:
        if self.entered is _NOT_ENTERED:
            assert self.host is not None, "what is awaited is awaited on an event loop"  # noqa: S101
            self.entered = await self.host.enter(self.data)
            taken = _without_stop(self._open_and_take)
            if taken is not PENDING:
                return taken
        try:
            for fetched in range(self._to_skip):
                if await anext(self._iterator, _END) is _END:
                    raise self._too_short(fetched, self._to_skip)
        finally:
            self._restore_rng()
        self._start()
        taken = _without_stop(self.take)
        return await self.arrival() if taken is PENDING else taken

    def _resume(self) -> int:
        """Put the data where the run to be resumed stood. Returns how many batches are to be fetched and dropped."""
        position, self._resume_at = self._resume_at, None
        randomness, level = self._randomness, logging.INFO
        if position is None or not (position["batches"] or position["state"]):
            if randomness is not None:
                self._rng_at_start = randomness.capture(self.data)
            return 0
        if randomness is not None:  # to open data may draw from them, which it did before, and not now
            self._rng_before_rewind = randomness.capture(None)
        if self._stateful is not None and position["state"] is not None:
            self._unread.clear()
            self._stateful.load_state_dict(position["state"])
            self._was_put_back = True
            how, to_skip = "was put back to its own state", 0
        elif self._can_skip:
            self._unread.clear()
            to_skip = int(position["batches"])
            if randomness is not None and self._rng_at_start is not None:
                randomness.restore(self._rng_at_start, self.data)
            how = f"is wound forward: {to_skip} batches are fetched and dropped"
        else:
            self._origin += position["batches"]
            self._taken = 0
            how, to_skip = "goes on where it is: it cannot be wound forward", 0
            if not self.is_one_shot and not self._is_manager:  # nobody but the user knows whether that is right
                level, how = logging.WARNING, _MAY_REPEAT.format(position["batches"])
        self._logger.log(level, "resuming: the data (%s) %s", self.name, how)
        return to_skip

    def _restore_rng(self) -> None:
        now, self._rng_before_rewind = self._rng_before_rewind, None
        if now is not None and self._randomness is not None:
            self._randomness.restore(now, None)

    def _too_short(self, length: int, to_skip: int) -> ValueError:
        return ValueError(
            f"cannot resume after {to_skip} batches of the data ({self.name}): it has only {length}. Pass the same data"
        )

    def _start(self) -> None:
        """The iterator stands where it should: begin to pull ahead, if so wished, and choose how to take."""
        if self.host is not None and self.host.prefetch and self._prefetcher is None:
            self._prefetcher = self._pull_ahead(self.host)
        self._choose()

    def _choose(self) -> None:
        if self._unread:
            self.take = self._take_unread
        elif self._prefetcher is not None:
            self.take, self.arrival = self._take_ahead, self._arrival_ahead
        elif has(self._iterator, "__anext__"):
            self.take = _pending
            self.arrival = self._iterator.__anext__ if self._stateful is None else self._arrival_of_stateful
        else:
            self.take = self._iterator.__next__ if self._stateful is None else self._take_of_stateful

    def _take_unread(self) -> Any:
        fetched = self._unread.popleft()
        if not self._unread:
            self._choose()
        return self._took(fetched)

    # With a position of its own

    def _took(self, fetched: Fetched) -> Any:
        self._taken += 1
        self._before, self._after = self._after, fetched.position
        return fetched.batch

    def _own_position(self) -> Position:
        return None if self._stateful is None else self._stateful.state_dict()

    def _take_of_stateful(self) -> Any:
        batch = next(self._iterator)
        return self._took(Fetched(batch, self._own_position()))

    async def _arrival_of_stateful(self) -> Any:
        batch = await anext(self._iterator)
        return self._took(Fetched(batch, self._own_position()))

    # Ahead of the step

    def _pull_ahead(self, host: RunContext) -> Prefetcher:
        fetched = self._origin + self._taken + len(self._unread)
        buffer = Buffer(host.prefetch, host.loop_handle, lambda more: host.can_use(fetched + more))
        if not has(self._iterator, "__anext__"):
            return ThreadPrefetcher(buffer, self._own_position, host.loop_handle, self._iterator, host.settings)
        prefetcher = TaskPrefetcher(buffer, self._own_position, host.loop_handle, self._iterator)
        host.spawn(prefetcher.pull, prefetcher.never_pull)
        return prefetcher

    def _take_ahead(self) -> Any:
        fetched = self._buffer.take_nowait()
        return PENDING if fetched is None else self._took(fetched)

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
        """Whether stopping or closing this takes an await."""
        return self._prefetcher is not None or self._is_manager or (self._is_ours and hasattr(self._iterator, "aclose"))

    async def suspend(self, completed: int) -> None:
        """Stop pulling ahead, but stay where the data stands. Waits for the fetch under way. Cancellable."""
        if self._prefetcher is not None:
            await self._prefetcher.stop()
        if self._prefetcher is not None and not self._buffer.has_ended:
            self._keep_what_was_pulled()
            self.take = self._take_after_suspension
        is_async = self._is_ours and hasattr(self._iterator, "aclose")
        if (is_async or self._is_manager) and (self._can_skip or self._stateful is not None):
            # The event loop may end before the next run, and an async generator with it; an async context manager is
            # left, and entered anew: begin again, by position.
            position = self.position(completed)
            await self.aclose()
            self.forget()
            self.restart(completed)
            self.resume_at(position, completed)
            if self._is_manager:
                self.entered = _NOT_ENTERED
            return
        if is_async and self.host is not None:
            self._begun_at = self.host.loop_handle
        if self._is_manager:  # it leaves the run's task group, and enters that of the next
            is_ahead = self._prefetcher is not None and self._buffer.has_ended
            error = self._buffer.unreported() if is_ahead else None
            await self.aclose()
            self.entered = _NOT_ENTERED
            self.take, self.arrival = self._open_and_take, self._open_and_wait
            if is_ahead or self.has_ended:  # so it goes on with what was pulled, then the end; a restart enters it anew
                self._iterator = _end_of_data(error)
                self._choose()

    def move_to(self, host: RunContext) -> None:
        """A run begins, or goes on.

        Raises:
            RuntimeError: the data was begun in another event loop, which has ended and an async generator with it.
        """
        if self._begun_at is not None and not self._begun_at.is_same(host.loop_handle):
            raise RuntimeError(
                f"the data ({self.name}) was begun in another event loop: an interrupted run of async data of unknown"
                " length goes on in the same one; terminate() instead of interrupt() lets it be resumed anywhere"
            )
        self.host = host

    def _take_after_suspension(self) -> Any:
        self._start()
        return self.take()

    def _keep_what_was_pulled(self) -> None:
        self._unread.extend(self._buffer.unread())
        unreported = self._buffer.unreported()
        if unreported is not None and not isinstance(unreported, StrayCancellation):
            self._logger.error("the data (%s) failed, ahead of the last step", self.name, exc_info=unreported)
        del unreported
        self._prefetcher = None

    async def aclose(self, *, gently: bool = False) -> None:
        """Stop pulling ahead, and close the iterator if the engine opened it. The caller shields and bounds this.

        Args:
            gently: let the fetch under way end if giving it up would end an async generator that the user has, and may
                go on with. It is given half of the grace.
        """
        prefetcher = self._prefetcher
        if isinstance(prefetcher, TaskPrefetcher):
            if (
                gently
                and self.host is not None
                and not self._is_ours
                and isinstance(self._iterator, AsyncGeneratorType)
            ):
                with anyio.move_on_after(self.host.grace / 2):
                    await prefetcher.stop()
            await prefetcher.cancel()
        elif prefetcher is not None:
            await prefetcher.stop()
        if prefetcher is not None:
            self._keep_what_was_pulled()
        if self._is_ours and hasattr(self._iterator, "aclose"):
            iterator, self._iterator = self._iterator, None
            await iterator.aclose()
        self.close()

    async def leave(self) -> None:
        """Exit the async context manager that the data is. Cancellable, which makes it exit at once."""
        if self.host is not None:
            await self.host.leave()

    def close(self) -> None:
        """Close the iterator if the engine opened it; where nothing must be awaited for that."""
        is_ours, iterator, self._iterator = self._is_ours, self._iterator, None
        # Let go of it: bound methods of one's own would hold it until the collector runs, and a DataLoader's workers.
        self.take, self.arrival = _raise_stop, _arrive_never
        if is_ours and hasattr(iterator, "close"):
            iterator.close()

    @property
    def can_be_woken(self) -> bool:
        """Whether a wait for the next batch can be given up without harm to data that outlives the run."""
        return self._prefetcher is not None or self._is_ours or not isinstance(self._iterator, AsyncGeneratorType)

    @property
    def _is_ours(self) -> bool:
        iterator = self._iterator
        return iterator is not None and iterator is not self.data and iterator is not self.entered


_END = object()
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


def _pending() -> Pending:
    return PENDING


def _no_batch() -> None:
    return None


def _raise_stop() -> NoReturn:
    raise StopIteration


async def _arrive_never() -> NoReturn:
    raise StopAsyncIteration

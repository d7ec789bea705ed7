"""Feed: the data of a run as the loop fetches it. Its end and its restart, other data in its place, its close."""

from collections.abc import Awaitable, Generator
from typing import Any

from aengine.data.rewind import END
from aengine.data.source import Source
from aengine.data.taking import PENDING
from aengine.errors import DataExhausted
from aengine.loop.effects import Effect, LoopGenerator, NextBatch
from aengine.state import State, set_dataloader


class Exhausted(Exception):
    """The data has ended too early, and cannot be restarted."""


class Feed:
    """What the loop fetches from. `completed` is always the number of iterations whose step has returned.

    Attributes:
        source: the data; another source from `change()` on.
        in_hand: the batch that was fetched and not stepped on, else END. Set by the loop, which is the hot path.
        consumed: the batch stepped on last, until another is fetched, else None; likewise.
        is_awaited: whether what the loop yielded last is the next batch. Set by the loop, likewise.
        empty: the error of data that gave nothing at all, after which no event is fired.
    """

    def __init__(self, source: Source, state: State, first: int) -> None:
        self.source: Source = source
        self.in_hand: Any = END
        self.consumed: Any = None
        self.is_awaited: bool = False
        self.empty: DataExhausted | None = None
        self._state = state
        self._first = first  # iterations completed before this run
        self._next_source = source  # until there is another
        self._is_closed = False

    def fetch(self) -> Generator[Awaitable[Any] | Effect, Any, Any]:
        """Return the next batch, END at the end of the data. The hot path does the same, in line."""
        try:
            batch = self.source.take()
            while batch is PENDING:
                self.is_awaited = True
                batch = yield NextBatch(self.source.arrival())
                self.is_awaited = False
                if batch is PENDING:
                    batch = self.source.take()
        except (StopIteration, StopAsyncIteration):
            return END
        finally:
            self.is_awaited = False
        return batch

    def look_ahead(self, completed: int) -> Generator[Awaitable[Any] | Effect, Any, bool]:
        """Before an epoch begins: fetch a batch of data that cannot be restarted, for no epoch is to be empty.

        Returns whether there is one.
        """
        source = self.source
        if not source.is_one_shot or completed == self._first:  # empty data is an error, which is raised by the epoch
            return True
        if not source.has_ended:
            batch = yield from self.fetch()
            if batch is not END:
                source.unread_batch(batch)
                return True
            source.end(completed)
        return False

    def look_for_end(self, completed: int) -> LoopGenerator:
        """Before an epoch begins: fetch on to where the pass of the epoch before should end.

        Its length may be less than the data gives. The handlers of EPOCH_STARTED may change the data, by `set_epoch()`
        of a sampler, and that is for the next pass.
        """
        batch = END
        if not self.source.position.look_for_end():
            batch = yield from self.fetch()
        if batch is END:
            self.source.end(completed)
        else:
            self.source.unread_batch(batch)

    def end(self, completed: int) -> bool:
        """The end of the data was met. Returns whether that is the end of an epoch, whose length was not known.

        Raises:
            DataExhausted: it gave nothing at all.
        """
        state, source = self._state, self.source
        self.is_awaited = False
        source.end(completed)
        if completed == self._first and (source.position.origin == completed or source.is_one_shot):
            self.empty = DataExhausted(self.exhaustion(completed))
            raise self.empty
        if state.epoch_length is None and completed > state.epoch_start:
            state.epoch_length = completed - state.epoch_start
            return True
        return False

    def restart(self, completed: int) -> LoopGenerator:
        """Begin the data again at the next fetch; what cannot begin again goes on where it is."""
        if self.source.is_one_shot:
            self.unread_batch()
            return
        self.in_hand = END
        yield from self._close()
        self.source.restart(completed)

    def replace(self, source: Source) -> None:
        """Set the source that `change()` is to put in the place of this one. From any thread."""
        self._next_source = source

    def change(self, completed: int) -> LoopGenerator:
        """Have the next batch come from the source that was set."""
        old, new = self.source, self._next_source
        yield from self._close(is_last=True)
        new.attach(old.run)
        new.follows = old.follows
        old.attach(None)
        new.restart(completed)
        set_dataloader(self._state, new.data)
        self.source = new

    def suspend(self, completed: int) -> LoopGenerator:
        """Leave the data where it stands, for the next run to go on with."""
        yield from self.source.suspend(completed + (self.in_hand is not END))

    def unread_batch(self) -> None:
        """Have the batch in hand, which is not stepped on, be the next one."""
        batch, self.in_hand = self.in_hand, END
        if batch is not END:
            self.source.unread_batch(batch)

    def close(self, *, gently: bool, exits: bool) -> LoopGenerator:
        """Close the data at the end of a run. A second time does nothing: then closing it is what failed.

        Without `exits`, an async context manager is left to the driver to be exited, when nothing needs it any more.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.unread_batch()
        if self.source.must_be_awaited:
            yield Effect.SHIELD
        yield from self._close(gently=gently, is_last=exits)

    def _close(self, *, gently: bool = False, is_last: bool = False) -> LoopGenerator:
        yield from self.source.close_pass(gently=gently)
        if is_last and self.source.must_be_awaited:
            yield self.source.exit()

    def position(self, completed: int) -> dict[str, Any]:
        """Return where the data stands, with what is compared when it is put back there."""
        position, following = self.source.position, self.in_hand
        if following is END and self._is_closed and position.unread:
            following = position.unread[0].batch
        as_fetched = self.source.finish.as_fetched
        return position.with_check(position.after(completed), as_fetched(self.consumed), as_fetched(following))

    def exhaustion(self, completed: int) -> str:
        """Return the sentence that says that the data has ended too early, and what to pass instead."""
        state, source = self._state, self.source
        if source.is_one_shot:
            why, what = f"it is a one-shot iterator ({source.data!r})", "the function itself, or a fresh iterator"
        else:
            why, what = f"begun again, it gave nothing ({source.name})", "data that can be iterated again"
        if not completed or (source.is_one_shot and completed == self._first):
            return f"the data is empty, or was used up before: {why}. Pass {what}"
        length, epochs, iterations = state.epoch_length or source.position.length, state.max_epochs, state.max_iters
        if iterations is not None:
            total, enough = str(iterations), f", or max_iters={completed}"
        else:
            total = str(length * epochs) if length and epochs else "an unknown number of"
            enough = f", or epoch_length={completed // epochs}" if epochs and completed >= epochs else ""
        ended = f"the data ended after {completed} of {total} iterations and cannot be restarted"
        return f"{ended}: {why}. Pass {what}{enough}"

"""What data holds may belong to a thread or a task: what opens it pulls from it and closes it, however a run ends."""

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.ways_out import WAYS, cancel, cancel_in_clean_up, interrupt, interrupt_and_begin_anew, terminate_and_resume

from aengine import Engine, HandlerTimeout

LENGTH = 8

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
prefetches = pytest.mark.parametrize("prefetch", [0, 1, 3])

variable: ContextVar[int] = ContextVar("variable", default=0)


class Log:
    """Counts what was opened, and what was closed where it was opened."""

    def __init__(self, *, has_context: bool = True) -> None:
        self.opened = self.closed = 0
        self.has_context = has_context


def rows(log: Log) -> Iterator[int]:
    """A connection must be used in the thread that opened it, and a token in the context that it is of."""
    log.opened += 1
    connection = sqlite3.connect(":memory:")
    token = variable.set(1)
    try:
        for row in range(LENGTH):
            connection.execute("SELECT 1")
            yield row
    finally:
        connection.close()
        if log.has_context:
            variable.reset(token)
        log.closed += 1


class Data:
    def __init__(self, log: Log) -> None:
        self.log = log


class Rows(Data):
    def __iter__(self) -> Iterator[int]:
        return rows(self.log)


class SizedRows(Rows):
    def __len__(self) -> int:
        return LENGTH


class EnteredRows(SizedRows):
    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *error: object) -> None: ...


class Cursor(Data):
    """Opened by `__iter__` itself, and closed by a method."""

    def __len__(self) -> int:
        return LENGTH

    def __iter__(self) -> "CursorIterator":
        return CursorIterator(self.log)


class CursorIterator:
    def __init__(self, log: Log) -> None:
        self.log = log
        self.log.opened += 1
        self.connection: sqlite3.Connection | None = sqlite3.connect(":memory:")
        self.remaining = LENGTH

    def __iter__(self) -> "CursorIterator":
        return self

    def __next__(self) -> int:
        assert self.connection is not None
        self.connection.execute("SELECT 1")
        if not self.remaining:
            raise StopIteration
        self.remaining -= 1
        return LENGTH - 1 - self.remaining

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None
            self.log.closed += 1


class KeptConnection(Data):
    """One pass leaves its connection to the next."""

    connection: sqlite3.Connection | None = None

    def __iter__(self) -> Iterator[int]:
        self.log.opened += 1
        self.connection = self.connection or sqlite3.connect(":memory:")
        try:
            for row in range(LENGTH):
                self.connection.execute("SELECT 1")
                yield row
        finally:
            self.connection.execute("SELECT 1")
            self.log.closed += 1


def factory(log: Log) -> Any:
    return lambda: rows(log)


def factory_that_opens(log: Log) -> Any:
    return lambda: CursorIterator(log)


PLAIN = [Rows, SizedRows, EnteredRows, Cursor, KeptConnection, factory, factory_that_opens]


class Token(Data):
    async def __aiter__(self) -> AsyncIterator[int]:
        self.log.opened += 1
        token = variable.set(1)
        try:
            for batch in range(LENGTH):
                await checkpoint()
                yield batch
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
            variable.reset(token)
            self.log.closed += 1


class SizedToken(Token):
    def __len__(self) -> int:
        return LENGTH


class Scope(Data):
    def __len__(self) -> int:
        return LENGTH

    async def __aiter__(self) -> AsyncIterator[int]:
        self.log.opened += 1
        try:
            with anyio.CancelScope():
                for batch in range(LENGTH):
                    await checkpoint()
                    yield batch
        except (GeneratorExit, anyio.get_cancelled_exc_class()):
            self.log.closed += 1  # anything else is the error of leaving the scope elsewhere
            raise
        self.log.closed += 1


class Group(Data):
    """A task of its own feeds it."""

    def __len__(self) -> int:
        return LENGTH

    async def __aiter__(self) -> AsyncIterator[int]:
        self.log.opened += 1
        task = anyio.get_current_task().id
        try:
            send, receive = anyio.create_memory_object_stream[int](0)
            with receive:
                async with anyio.create_task_group() as group:
                    group.start_soon(self.feed, send)
                    async for batch in receive:
                        yield batch
        finally:
            assert anyio.get_current_task().id == task
            self.log.closed += 1

    async def feed(self, send: Any) -> None:
        with send:
            for batch in range(LENGTH):
                await send.send(batch)


def async_factory(log: Log) -> Any:
    return lambda: Token(log)


ASYNC = [Token, SizedToken, async_factory]
SCOPED = [Scope, Group]


def is_promised(kind: Callable[[Log], Any], way: Callable[..., Any], prefetch: int) -> bool:
    if kind is KeptConnection:  # each run has a thread of its own
        return way not in (terminate_and_resume, interrupt_and_begin_anew)
    if kind in SCOPED and prefetch == 0:  # the scope is left in the task of the run, among the run's own
        return way not in (cancel, cancel_in_clean_up)
    if kind in (Token, async_factory):  # without a length it is left open, and its task ends with the run
        return way not in (interrupt, interrupt_and_begin_anew)
    return True


@pytest.mark.every_event_loop
@pytest.mark.covering(2)
@both_threads
@prefetches
@pytest.mark.parametrize("kind", [*PLAIN, *ASYNC, *SCOPED])
@pytest.mark.parametrize("way", WAYS)
async def test_data_is_closed_where_it_was_opened(
    thread: Thread, prefetch: int, kind: Callable[[Log], Any], way: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    if not is_promised(kind, way, prefetch):
        return
    # Without a prefetcher, what is left open is closed by the next run, which is another task.
    log = Log(has_context=prefetch > 0 or way not in (interrupt, interrupt_and_begin_anew))
    engine: Engine[int, int] = Engine(
        lambda engine, batch: batch, thread=thread, grace=0.05 if way is cancel_in_clean_up else 30
    )
    await way(engine, kind(log), prefetch)
    assert log.opened > 0
    with anyio.fail_after(60):
        while log.closed < log.opened and way is cancel_in_clean_up:
            await checkpoint()  # a thread that was not waited for, since the grace was over
    assert log.closed == log.opened
    logged = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert not [error for error in logged if not (way is cancel_in_clean_up and isinstance(error, HandlerTimeout))]

"""When a stream ends, however its run ends, and what its reader can tell then; and that it has one reader."""

import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, EngineBusy, ErrorInfo, Event, Events, StopReason

AnyEngine: TypeAlias = Engine[Any, Any]


async def async_step(engine: AnyEngine, batch: int) -> int:
    await checkpoint()
    return batch


def plain_step(engine: AnyEngine, batch: int) -> int:
    return batch


ENGINES: dict[str, Callable[[], AnyEngine]] = {
    "worker": lambda: Engine(plain_step, grace=0.05),
    "loop": lambda: Engine(plain_step, thread=False, grace=0.05),
    "async": lambda: Engine(async_step, grace=0.05),
}
each_engine = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES.keys())


class Reader:
    """Reads a stream to its end in a task of its own, and looks at the engine at that moment."""

    def __init__(self, engine: AnyEngine) -> None:
        self.engine = engine
        self.read: list[int] = []
        self.seen: tuple[StopReason | None, bool, ErrorInfo | None] | None = None

    async def __call__(self, *, task_status: Any) -> None:
        async with self.engine.stream(Events.ITERATION_COMPLETED) as events:
            task_status.started()
            async for event in events:
                self.read.append(event.iteration)
        self.seen = self.engine.state.stop_reason, self.engine.is_running, self.engine.state.error

    async def beside(self, run: Callable[[], Awaitable[Any]]) -> BaseException | None:
        """Read while this runs. Returns what it raised."""
        raised: BaseException | None = None
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                await group.start(self)
                try:
                    await run()
                except Exception as error:  # noqa: BLE001 -- returned
                    raised = error
        return raised


async def refuse_in_sync_way(engine: AnyEngine) -> None:
    engine.run_sync([1])


async def refuse_in_thread(engine: AnyEngine) -> None:
    await anyio.to_thread.run_sync(lambda: engine.run_sync([1], prefetch=-1))


async def refuse_iterating(engine: AnyEngine) -> None:
    async with engine.iterate([1], prefetch=-1) as iterations:
        async for _ in iterations:
            pass


REFUSED: dict[str, Callable[[AnyEngine], Awaitable[Any]]] = {
    "empty data": lambda engine: engine.run([]),
    "no data": lambda engine: engine.run(7),  # type: ignore[arg-type]
    "prefetch": lambda engine: engine.run([1], prefetch=-1),
    "both limits": lambda engine: engine.run([1], max_epochs=1, max_iters=1),
    "nothing to count": lambda engine: engine.run(None),
    "run_sync here": refuse_in_sync_way,
    "run_sync in a thread": refuse_in_thread,
    "iterate": refuse_iterating,
}


@each_engine
@pytest.mark.parametrize("run", REFUSED.values(), ids=REFUSED.keys())
async def test_it_ends_when_the_run_is_refused(
    make: Callable[[], AnyEngine], run: Callable[[AnyEngine], Awaitable[Any]]
) -> None:
    engine = make()
    reader = Reader(engine)
    error = await reader.beside(lambda: run(engine))
    assert error is not None
    assert reader.read == []
    assert reader.seen is not None
    reason, is_running, told = reader.seen
    assert (reason, is_running) == (StopReason.FAILED, False)
    assert told is not None
    assert (told.type, told.message) == (type(error).__name__, str(error))
    assert told.traceback.startswith("Traceback")


async def test_it_ends_when_a_run_that_was_interrupted_is_refused() -> None:
    engine = Engine(async_step)
    with engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt):
        await engine.run(range(4))
    reader = Reader(engine)
    error = await reader.beside(lambda: engine.run(max_epochs=7))
    assert isinstance(error, ValueError)
    assert reader.seen is not None
    assert reader.seen[:2] == (StopReason.FAILED, False)
    await engine.run()  # nothing of it was lost
    assert (engine.state.iteration, engine.state.stop_reason) == (4, StopReason.COMPLETED)


async def test_it_ends_when_the_run_is_cancelled_before_it_begins() -> None:
    engine = Engine(async_step)
    reader = Reader(engine)

    async def run() -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await engine.run([1])

    await reader.beside(run)
    assert reader.seen == (StopReason.CANCELLED, False, None)


async def test_a_second_run_that_is_refused_since_one_is_under_way_does_not_end_it() -> None:
    engine = Engine(async_step)

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    async def second() -> None:
        with pytest.raises(EngineBusy):
            await engine.run([1])

    reader = Reader(engine)
    assert await reader.beside(lambda: engine.run([1, 2, 3])) is None
    assert reader.read == [1, 2, 3]
    assert reader.seen == (StopReason.COMPLETED, False, None)


def failing_step(engine: AnyEngine) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: 1 / 0)


def failing_subscriber(engine: AnyEngine) -> None:
    @engine.subscribe(Events.ITERATION_COMPLETED)
    async def fail(event: Event) -> None:
        raise ZeroDivisionError("division by zero")


def failing_at_the_very_end(engine: AnyEngine) -> None:
    @engine.subscribe(Events.COMPLETED)
    async def fail(event: Event) -> None:
        raise ZeroDivisionError("division by zero")


def hanging_subscriber(engine: AnyEngine) -> None:
    @engine.subscribe(Events.ITERATION_COMPLETED)
    async def hang(event: Event) -> None:
        await anyio.sleep_forever()


@each_engine
@pytest.mark.parametrize(
    ("break_it", "kind", "words"),
    [
        (failing_step, "ZeroDivisionError", "division by zero"),
        (failing_subscriber, "ZeroDivisionError", "division by zero"),
        (failing_at_the_very_end, "ZeroDivisionError", "division by zero"),
        (hanging_subscriber, "HandlerTimeout", "still busy"),
    ],
)
async def test_the_reader_of_a_failed_run_can_tell_why(
    make: Callable[[], AnyEngine], break_it: Callable[[AnyEngine], None], kind: str, words: str
) -> None:
    engine = make()
    break_it(engine)
    reader = Reader(engine)
    assert await reader.beside(lambda: engine.run([1, 2, 3])) is not None
    assert reader.seen is not None
    reason, is_running, told = reader.seen
    assert (reason, is_running) == (StopReason.FAILED, False)
    assert told is not None
    assert told.type == kind
    assert words in told.message
    assert words in told.traceback


@each_engine
async def test_the_error_is_there_for_handlers_and_gone_with_the_next_run(make: Callable[[], AnyEngine]) -> None:
    engine, seen = make(), []

    @engine.on(Events.EXCEPTION_RAISED)
    def look(error: BaseException) -> None:
        assert engine.state.error is not None
        seen.append(engine.state.error.type)

    with (
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: 1 / 0),
        pytest.raises(ZeroDivisionError),
    ):
        await engine.run([1, 2])
    assert seen == ["ZeroDivisionError"]
    await engine.run([1, 2])
    assert (engine.state.stop_reason, engine.state.error) == (StopReason.COMPLETED, None)


def test_the_error_of_a_run_sync_is_told_too() -> None:
    engine = Engine(plain_step)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run_sync([1])
    assert engine.state.error is not None
    assert engine.state.error.type == "ZeroDivisionError"


def test_an_error_that_cannot_say_what_it_is_is_told_by_its_type() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise LookupError

    engine = Engine(plain_step)

    @engine.on(Events.ITERATION_COMPLETED)
    def fail() -> None:
        raise Mute

    with pytest.raises(Mute):
        engine.run_sync([1])
    assert engine.state.error is not None
    assert (engine.state.error.type, engine.state.error.message) == ("Mute", "")


# Where no run is under way


async def test_without_a_run_it_is_over_at_once_if_it_does_not_wait_for_one() -> None:
    engine = Engine(async_step)
    for _ in range(2):  # before the first run, and when it is done
        async with engine.stream(Events.ITERATION_COMPLETED, wait_for_run=False) as events:
            with anyio.fail_after(5):
                assert [event async for event in events] == []
        await engine.run([1, 2])


async def test_in_a_run_it_ends_with_that_run_though_it_waits_for_none() -> None:
    engine = Engine(async_step)
    read: list[int] = []

    async def reader() -> None:
        async with engine.stream(Events.ITERATION_COMPLETED, wait_for_run=False) as events:
            opened.set()
            read.extend([event.iteration async for event in events])

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    async def open_it() -> None:
        group.start_soon(reader)
        await opened.wait()

    opened = anyio.Event()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            await engine.run([1, 2, 3])
    assert read == [2, 3]


@pytest.mark.every_event_loop
async def test_a_reader_that_comes_as_the_run_ends_in_another_thread_does_not_wait_for_ever() -> None:
    """Between the end of the run and that of the streams there is no moment at which a stream is forgotten."""
    engine = Engine(plain_step)
    stop = threading.Event()

    def train() -> None:
        while not stop.is_set():
            engine.run_sync([1])

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.to_thread.run_sync, train)
            try:
                for _ in range(200):
                    async with engine.stream(Events.COMPLETED, wait_for_run=False) as events:
                        async for _ in events:
                            pass
            finally:
                stop.set()


# Its one reader


async def test_a_second_reader_is_refused_and_the_first_reads_on() -> None:
    engine = Engine(async_step)
    read: list[int] = []
    async with engine.stream(Events.ITERATION_COMPLETED) as events:

        async def first() -> None:
            read.extend([event.iteration async for event in events])

        async with anyio.create_task_group() as group:
            group.start_soon(first)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(RuntimeError, match=r"one event goes to one reader.*engine\.stream"):
                await anext(events)
            await engine.run([1, 2, 3])
    assert read == [1, 2, 3]


async def test_one_that_is_being_read_is_not_opened_again() -> None:
    engine = Engine(async_step)
    stream = engine.stream(Events.ITERATION_COMPLETED)
    async with stream as events:
        with pytest.raises(RuntimeError, match=r"engine\.stream"):
            async with stream:
                raise AssertionError("not entered")
        await engine.run([1, 2])
        assert [event.iteration async for event in events] == [1, 2]


async def test_readers_may_take_turns() -> None:
    """As `asyncio.wait_for(anext(events), ...)` does it, which has each event awaited in another task."""
    engine = Engine(async_step)
    read: list[int] = []
    async with engine.stream(Events.ITERATION_COMPLETED) as events:

        async def take_one() -> None:
            read.append((await anext(events)).iteration)

        await engine.run([1, 2, 3])
        for _ in range(3):
            async with anyio.create_task_group() as group:
                group.start_soon(take_one)
    assert read == [1, 2, 3]


async def test_a_reader_that_was_cancelled_as_it_waited_may_read_on() -> None:
    engine = Engine(async_step)
    async with engine.stream(Events.ITERATION_COMPLETED) as events:
        with anyio.move_on_after(0):
            await anext(events)
        await engine.run([1, 2])
        assert [event.iteration async for event in events] == [1, 2]

"""What remains to be done to a batch where the step runs, its data says itself: `finish_batch_for_step`."""

import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.engines import each_engine
from support.record import AnyEngine, Boom, double, record, record_steps
from support.resume_cases import KINDS, Sized, numbers

from aengine import Engine, Events

prefetches = pytest.mark.parametrize("prefetch", [0, 1, 3])


class Log:
    """Which batches were finished, and in which threads."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.threads: set[int] = set()

    def add(self, batch: Any) -> Any:
        self.batches.append(batch)
        self.threads.add(threading.get_ident())
        return -batch


def finishing(data: Any, log: Log) -> Any:
    """Return this data as that of a class that finishes its batches, by turning their sign."""
    kind: Any = type(data)

    class Finishing(kind):  # type: ignore[misc]  # a class as any other
        def finish_batch_for_step(self, batch: Any) -> Any:
            return log.add(batch)

    if kind is list:
        return Finishing(data)
    data.__class__ = Finishing
    return data


class Stream:
    """An async context manager of unknown length, which goes on where it is."""

    def __init__(self, *_: object) -> None:
        self.next = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        await checkpoint()
        self.next += 1
        return self.next


class OwnIterator:
    def __init__(self, count: int) -> None:
        self.numbers = numbers(count)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        return next(self.numbers)


ALL_KINDS: dict[str, Callable[[int], Any]] = {**KINDS, "stream": Stream, "own iterator": OwnIterator}


@pytest.mark.covering(2)
@each_engine
@prefetches
@pytest.mark.parametrize("kind", ALL_KINDS)
async def test_batch_is_finished_in_the_thread_of_the_step_before_anything_sees_it(
    make: Callable[..., AnyEngine], prefetch: int, kind: str
) -> None:
    log, seen, threads = Log(), list[int](), set[int]()
    engine = make()

    def note(engine: AnyEngine) -> None:
        seen.append(engine.state.batch)
        threads.add(threading.get_ident())

    for event in (Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
        engine.add_event_handler(event, note)
    await engine.run(finishing(ALL_KINDS[kind](6), log), max_epochs=2, epoch_length=3, prefetch=prefetch)
    assert seen == [-batch for batch in range(1, 7) for _ in range(3)]
    assert log.batches == [1, 2, 3, 4, 5, 6]
    assert log.threads == threads


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "async"])
def test_batch_is_finished_without_an_event_loop(kind: str) -> None:
    log = Log()
    engine: AnyEngine = Engine(double)
    steps = record_steps(engine)
    engine.run_sync(finishing(KINDS[kind](3), log), max_epochs=2)
    assert [batch for *_, batch in steps] == [-1, -2, -3] * 2
    assert log.batches == [1, 2, 3] * 2


@prefetches
async def test_batch_is_finished_in_a_loop_of_the_users(prefetch: int) -> None:
    engine: AnyEngine = Engine(double)
    async with engine.iterate(finishing(Sized(3), Log()), prefetch=prefetch) as iterations:
        assert [event.output async for event in iterations] == [-2, -4, -6]


@prefetches
async def test_events_are_those_of_the_data_without_it(prefetch: int) -> None:
    recorded = []
    for prepare in (lambda data, log: data, finishing):
        engine: AnyEngine = Engine(double)
        seen = record(engine)
        await engine.run(prepare(Sized(2), Log()), max_epochs=2, prefetch=prefetch)
        recorded.append(seen)
    assert recorded[0] == recorded[1]


@prefetches
async def test_each_data_that_is_set_finishes_its_own(prefetch: int) -> None:
    engine: AnyEngine = Engine(double)
    steps = record_steps(engine)
    first, second = Log(), Log()
    others = {2: [7, 8], 4: finishing(Sized(2), second)}

    @engine.on(Events.ITERATION_COMPLETED)
    def change() -> None:
        if engine.state.iteration in others:
            engine.set_data(others[engine.state.iteration])

    await engine.run(finishing(Sized(9), first), max_epochs=1, epoch_length=6, prefetch=prefetch)
    assert [batch for *_, batch in steps] == [-1, -2, 7, 8, -1, -2]
    assert (first.batches, second.batches) == ([1, 2], [1, 2])


@each_engine
@prefetches
async def test_function_that_makes_the_data_may_make_another_kind_each_time(
    make: Callable[..., AnyEngine], prefetch: int
) -> None:
    """The data begins again within an epoch, too."""
    passes = iter([Sized(2), finishing(Sized(2), Log()), Sized(2), finishing(Sized(2), Log())])
    engine = make()
    steps = record_steps(engine)
    await engine.run(lambda: next(passes), max_epochs=2, epoch_length=4, prefetch=prefetch)
    assert [batch for *_, batch in steps] == [1, 2, -1, -2] * 2


async def test_data_of_two_engines_finishes_the_batches_of_both() -> None:
    data = finishing(Sized(4), Log())
    recorded = []
    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            engine: AnyEngine = Engine(double)
            recorded.append(record_steps(engine))
            tasks.start_soon(engine.run, data)
    assert [[batch for *_, batch in steps] for steps in recorded] == [[-1, -2, -3, -4]] * 2


# Stopping and going on


@pytest.mark.covering(3)
@pytest.mark.parametrize("kind", ALL_KINDS)
@prefetches
@pytest.mark.parametrize("event", [Events.GET_BATCH_COMPLETED, Events.ITERATION_COMPLETED], ids=["fetched", "stepped"])
@pytest.mark.parametrize("how", ["terminate", "interrupt"])
async def test_run_goes_on_in_memory_with_what_was_not_stepped_on(
    how: str, event: Any, prefetch: int, kind: str
) -> None:
    log = Log()
    engine: AnyEngine = Engine(double)
    data = finishing(ALL_KINDS[kind](6), log)
    steps = record_steps(engine)
    stop = engine.add_event_handler(event(once=2), lambda engine: getattr(engine, how)())
    await engine.run(data, max_epochs=2, epoch_length=3, prefetch=prefetch)
    stop.remove()
    await engine.run(data, max_epochs=2, epoch_length=3, prefetch=prefetch)
    assert [batch for *_, batch in steps] == [-1, -2, -3, -4, -5, -6]
    is_finished_again = how == "terminate" and event is Events.GET_BATCH_COMPLETED  # else the loop still has it in hand
    assert log.batches == [1, 2, 3, *([3] if is_finished_again else []), 4, 5, 6]


@pytest.mark.parametrize("event", [Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED, Events.ITERATION_COMPLETED])
async def test_what_is_compared_when_a_run_is_resumed_is_the_batch_as_it_was_fetched(
    event: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Growing(Sized):
        """Finishes its batches otherwise in each process."""

        def __init__(self, by: int) -> None:
            super().__init__(5)
            self.by = by

        def finish_batch_for_step(self, batch: int) -> int:
            return batch + self.by

    first: AnyEngine = Engine(double)
    saved: list[str] = []
    first.add_event_handler(event(once=3), lambda engine: saved.append(json.dumps(engine.state_dict())))
    await first.run(Growing(10))
    second: AnyEngine = Engine(double)
    second.load_state_dict(json.loads(saved[0]))
    steps = record_steps(second)
    with caplog.at_level(logging.WARNING, "aengine"):
        await second.run(Growing(20))
    assert not caplog.records
    assert [batch for *_, batch in steps][-2:] == [24, 25]


@pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
@prefetches
async def test_batch_that_could_not_be_finished_is_not_lost(prefetch: int, thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    class Failing(OwnIterator):
        errors = iter([Boom("no stream")])

        def finish_batch_for_step(self, batch: int) -> int:
            if batch == 2 and (error := next(self.errors, None)) is not None:
                raise error
            return batch

    engine: AnyEngine = Engine(double, thread=thread)
    steps, data = record_steps(engine), Failing(4)
    with pytest.raises(Boom, match="no stream"):
        await engine.run(data, max_epochs=1, epoch_length=4, prefetch=prefetch)
    await engine.run(data, max_epochs=1, epoch_length=4, prefetch=prefetch)
    assert [batch for *_, batch in steps] == [1, 2, 3, 4]


# Wrong hooks


class Stopping(Sized):
    def finish_batch_for_step(self, batch: int) -> int:
        raise StopIteration


class Async(Sized):
    async def finish_batch_for_step(self, batch: int) -> int:
        return batch


class WithoutBatch(Sized):
    def finish_batch_for_step(self) -> int:
        return 1


@prefetches
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            Stopping,
            RuntimeError,
            "finish_batch_for_step raised StopIteration, which would look like the end of the data",
        ),
        (Async, TypeError, r"Async.finish_batch_for_step is async, .*: make it plain"),
        (WithoutBatch, TypeError, r"finish_batch_for_step\(batch\): have it take batch"),
    ],
)
async def test_hook_that_cannot_serve_says_so(
    kind: Callable[[int], Any], error: type[Exception], message: str, prefetch: int
) -> None:
    engine: AnyEngine = Engine(double)
    with pytest.raises(error, match=message):
        await engine.run(kind(3), prefetch=prefetch)
    assert engine.state.iteration == 0


# What it costs the others


def plain_data() -> Iterator[int]:
    yield from [1, 2, 3]


async def async_data() -> AsyncIterator[int]:
    for number in (1, 2, 3):
        yield number


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("data", [[1, 2, 3], plain_data, async_data], ids=["list", "function", "async"])
async def test_batches_of_other_data_are_taken_without_a_call_of_it(data: Any, prefetch: int) -> None:
    """Where batches come from at once, the loop calls the iterator of the data itself."""
    engine: AnyEngine = Engine(double)
    taken = []

    def look() -> None:
        source: Any = engine._session._loop.source  # type: ignore[union-attr]  # it runs
        taken.extend([source.take, source.arrival])

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), look)
    await engine.run(data, prefetch=prefetch)
    assert not [one for one in taken if one.__name__ in ("_take_finished", "_arrival_unfinished")]
    if not prefetch and data is not async_data:
        assert taken[0].__name__ == "__next__"

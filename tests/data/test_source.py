"""Any data: each batch once, in order, in each epoch, whatever it is made of and wherever it is pulled."""

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import anyio
import pytest
import torch
from anyio.lowlevel import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from aengine import DataExhausted, DataExhaustedWarning, Engine, Events, StopReason
from aengine.drivers.sync import runs_in_event_loop

LENGTH = 5

Step: TypeAlias = Callable[[list[Any]], Engine[Any, None]]


def plain_on_worker(seen: list[Any]) -> Engine[Any, None]:
    def step(engine: Engine[Any, None], batch: Any) -> None:
        seen.append(batch)

    return Engine(step)


def plain_on_loop(seen: list[Any]) -> Engine[Any, None]:
    def step(engine: Engine[Any, None], batch: Any) -> None:
        seen.append(batch)

    return Engine(step, thread=False)


def coroutine(seen: list[Any]) -> Engine[Any, None]:
    async def step(engine: Engine[Any, None], batch: Any) -> None:
        await checkpoint()
        seen.append(batch)

    return Engine(step)


STEPS: list[Step] = [plain_on_worker, plain_on_loop, coroutine]
PREFETCHES = [0, 1, 4]
ALL = [(make, prefetch) for make in STEPS for prefetch in PREFETCHES]


# Data that can be iterated again and again


def generator() -> Iterator[int]:
    yield from range(LENGTH)


async def async_generator() -> AsyncIterator[int]:
    for batch in range(LENGTH):
        yield batch
        await checkpoint()


class Iterable:
    def __iter__(self) -> Iterator[int]:
        return iter(range(LENGTH))


class Sequence:
    """What `for` could do before there were iterators."""

    def __getitem__(self, index: int) -> int:
        if index >= LENGTH:
            raise IndexError
        return index


class IterableAndCallable(Iterable):
    def __call__(self) -> Any:
        raise AssertionError("what can be iterated is not called")


class AsyncIterable:
    def __aiter__(self) -> AsyncIterator[int]:
        return async_generator()


class OwnIterator:
    """Its own iterator, that begins again when it is asked for one."""

    def __iter__(self) -> "OwnIterator":
        self.next = 0
        return self

    def __next__(self) -> int:
        if self.next == LENGTH:
            raise StopIteration
        self.next += 1
        return self.next - 1


class OwnAsyncIterator:
    def __aiter__(self) -> "OwnAsyncIterator":
        self.next = 0
        return self

    async def __anext__(self) -> int:
        if self.next == LENGTH:
            raise StopAsyncIteration
        self.next += 1
        await checkpoint()
        return self.next - 1


class Numbers(IterableDataset[int]):
    """A dataset without a length: `len()` of a loader of it raises TypeError."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(LENGTH))


class Managed(AsyncIterable):
    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


@asynccontextmanager
async def manages_list() -> AsyncIterator[list[int]]:
    yield list(range(LENGTH))


@asynccontextmanager
async def manages_factory() -> AsyncIterator[Callable[[], AsyncIterator[int]]]:
    yield async_generator


class BothWays:
    """A length, and so what lies ready: iterated the plain way."""

    def __len__(self) -> int:
        return LENGTH

    def __iter__(self) -> Iterator[int]:
        return iter(range(LENGTH))

    def __aiter__(self) -> AsyncIterator[int]:
        raise AssertionError("what lies ready is not awaited")


def made_by_a_callable() -> Callable[[], Any]:
    return BothWays


class OwnIteratorBothWays(OwnIterator):
    def __len__(self) -> int:
        return LENGTH

    def __aiter__(self) -> "OwnIteratorBothWays":
        return self

    async def __anext__(self) -> int:
        raise AssertionError("what lies ready is not awaited")


class UsedBothWays(BothWays):
    """As what serves plain and async code alike often is. Plain, it is entered by its user."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    async def __aenter__(self) -> None:
        raise AssertionError("what lies ready is not awaited")

    async def __aexit__(self, *_: object) -> None: ...


class EnteredAndIteratedBothWays(BothWays):
    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


class Stream(AsyncIterable):
    """Without a length it may be a connection: the plain way would block the event loop."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("what may have to be waited for is awaited")


class StreamWithoutLength(Stream):
    def __len__(self) -> int:
        raise TypeError("nobody knows")


RESTARTABLE: dict[str, Callable[[], Any]] = {
    "list": lambda: list(range(LENGTH)),
    "range": lambda: range(LENGTH),
    "generator function": lambda: generator,
    "lambda": lambda: lambda: list(range(LENGTH)),
    "lambda of an iterator": lambda: lambda: iter(range(LENGTH)),
    "async generator function": lambda: async_generator,
    "__iter__": Iterable,
    "__getitem__": Sequence,
    "class of __iter__": lambda: Iterable,
    "class of __getitem__": lambda: Sequence,
    "class of __aiter__": lambda: AsyncIterable,
    "__iter__ and __call__": IterableAndCallable,
    "__aiter__": AsyncIterable,
    "__next__": OwnIterator,
    "__anext__": OwnAsyncIterator,
    "DataLoader": lambda: DataLoader(range(LENGTH), batch_size=None),  # type: ignore[arg-type]  # a range has all it takes
    "DataLoader without a length": lambda: DataLoader(Numbers(), batch_size=None),
    "both ways": BothWays,
    "both ways, its own iterator": OwnIteratorBothWays,
    "both ways, also a context manager": UsedBothWays,
    "both ways, made by a callable": made_by_a_callable,
    "both ways without a length": Stream,
    "both ways with a length that raises": StreamWithoutLength,
    "__aenter__": Managed,
    "__aenter__, both ways": EnteredAndIteratedBothWays,
    "__aenter__ giving a list": manages_list,
    "__aenter__ giving a callable": manages_factory,
}


@pytest.mark.parametrize("kind", RESTARTABLE)
async def test_each_epoch_sees_every_batch_once_in_order(kind: str) -> None:
    for make, prefetch in ALL:
        seen: list[Any] = []
        restarts: list[str] = []
        engine = make(seen)
        event = Events.DATALOADER_STOP_ITERATION
        engine.add_event_handler(event, restarts.append, event.name)
        state = await engine.run(RESTARTABLE[kind](), max_epochs=3, prefetch=prefetch)
        assert seen == [*range(LENGTH)] * 3, (make, prefetch)
        assert (state.iteration, state.epoch, state.epoch_length) == (15, 3, LENGTH)
        assert len(restarts) == 2


@pytest.mark.parametrize("kind", RESTARTABLE)
async def test_an_epoch_may_be_shorter_or_longer_than_the_data(kind: str) -> None:
    for make, prefetch in ALL:
        for epoch_length, max_epochs in ((3, 4), (7, 2)):
            seen: list[Any] = []
            await make(seen).run(RESTARTABLE[kind](), max_epochs, epoch_length=epoch_length, prefetch=prefetch)
            expected = [n % LENGTH for n in range(epoch_length * max_epochs)]
            assert seen == expected, (make, prefetch, epoch_length)


# Data that can be iterated once

ONE_SHOT: dict[str, Callable[[], Any]] = {
    "generator": generator,
    "async generator": async_generator,
    "iterator": lambda: iter(range(LENGTH)),
    "map": lambda: map(int, "01234"),
}


def why(engine: Engine[Any, Any]) -> StopReason | None:
    """Ask in a call: a type checker would take two attributes for the same."""
    return engine.state.stop_reason


async def close(data: Any) -> None:
    """Close what we have passed: the engine does not."""
    if hasattr(data, "aclose"):
        await data.aclose()


@pytest.mark.parametrize("kind", ONE_SHOT)
async def test_a_one_shot_iterator_is_seen_once(kind: str) -> None:
    for make, prefetch in ALL:
        seen: list[Any] = []
        state = await make(seen).run(ONE_SHOT[kind](), prefetch=prefetch)
        assert seen == [*range(LENGTH)], (make, prefetch)
        assert (state.iteration, state.epoch_length) == (LENGTH, LENGTH)
        assert state.stop_reason is StopReason.COMPLETED


@pytest.mark.parametrize("kind", ONE_SHOT)
async def test_epochs_may_be_cut_out_of_a_one_shot_iterator(kind: str) -> None:
    for make, prefetch in ALL:
        seen: list[Any] = []
        ends: list[Any] = []
        engine = make(seen)
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: ends.append(seen[-1]))  # noqa: B023 -- this run's
        data = ONE_SHOT[kind]()
        await engine.run(data, max_epochs=2, epoch_length=2, prefetch=prefetch)
        assert seen == [0, 1, 2, 3], (make, prefetch)
        assert ends == [1, 3]
        await close(data)


@pytest.mark.parametrize("kind", ONE_SHOT)
async def test_a_one_shot_iterator_goes_on_in_the_next_run_where_it_stood(kind: str) -> None:
    """What was pulled ahead and not stepped on is not lost."""
    for make, prefetch in ALL:
        seen: list[Any] = []
        engine, data = make(seen), ONE_SHOT[kind]()
        for end in (1, 3, 5):
            await engine.run(data, max_iters=end, epoch_length=LENGTH, prefetch=prefetch)
            assert seen == [*range(end)], (make, prefetch)
            assert engine.state.iteration == end
        await close(data)


@pytest.mark.parametrize("kind", ONE_SHOT)
async def test_a_one_shot_iterator_goes_on_after_terminate(kind: str) -> None:
    for make, prefetch in ALL:
        seen: list[Any] = []
        engine, data = make(seen), ONE_SHOT[kind]()
        with engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate):
            await engine.run(data, epoch_length=LENGTH, prefetch=prefetch)
        assert seen == [0, 1], (make, prefetch)
        await engine.run(data, epoch_length=LENGTH, prefetch=prefetch)
        assert seen == [*range(LENGTH)], (make, prefetch)
        await close(data)


@pytest.mark.parametrize("kind", [*RESTARTABLE, *ONE_SHOT])
async def test_an_interrupted_run_goes_on_with_the_next_batch(kind: str) -> None:
    for make, prefetch in ALL:
        seen: list[Any] = []
        engine = make(seen)
        data = {**RESTARTABLE, **ONE_SHOT}[kind]()
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), engine.interrupt)
        await engine.run(data, prefetch=prefetch)
        assert seen == [0, 1], (make, prefetch)
        assert why(engine) is StopReason.INTERRUPTED
        if kind.startswith("__aenter__"):  # exited, and entered again: what it gives then is its own
            continue
        await engine.run(data, prefetch=prefetch)
        await engine.run(prefetch=prefetch)
        assert seen == [*range(LENGTH)], (make, prefetch)
        assert why(engine) is StopReason.COMPLETED


@pytest.mark.parametrize("kind", ONE_SHOT)
async def test_a_one_shot_iterator_that_ends_early_says_what_to_pass(kind: str) -> None:
    for make, prefetch in ALL:
        seen: list[Any] = []
        engine = make(seen)
        with pytest.warns(DataExhaustedWarning, match=r"after 5 of 15 iterations.*Pass the func"):
            await engine.run(ONE_SHOT[kind](), max_epochs=3, prefetch=prefetch)
        assert seen == [*range(LENGTH)], (make, prefetch)
        assert why(engine) is StopReason.DATA_EXHAUSTED


@pytest.mark.parametrize(
    "empty",
    [{}, [], list, lambda: iter([]), lambda: (_ for _ in ())],
    ids=["dict", "list", "class", "lambda of an iterator", "lambda of a generator"],
)
async def test_empty_data_is_refused(empty: Any) -> None:
    for make, prefetch in ALL:
        engine = make([])
        with pytest.raises(ValueError, match=r"has length 0|the data is empty"):
            await engine.run(empty, prefetch=prefetch)
        with pytest.raises(DataExhausted, match=r"the data is empty.*one-shot"):
            await engine.run(iter([]), prefetch=prefetch)
        assert engine.state.iteration == 0


@pytest.mark.parametrize("kind", [BothWays, OwnIteratorBothWays, UsedBothWays, made_by_a_callable])
def test_what_can_be_iterated_both_ways_and_has_a_length_needs_no_event_loop(kind: Callable[[], Any]) -> None:
    seen: list[Any] = []
    engine = plain_on_loop(seen)
    engine.add_event_handler(Events.STARTED, lambda: seen.append(runs_in_event_loop()))
    engine.run_sync(kind())
    assert seen == [False, *range(LENGTH)]


@pytest.mark.parametrize("kind", ONE_SHOT)
@pytest.mark.parametrize("epoch_length", [None, 3])
async def test_other_data_may_be_set_at_the_end_of_a_one_shot_iterator(kind: str, epoch_length: int | None) -> None:
    for make, prefetch in ALL:
        seen: list[Any] = []
        engine = make(seen)
        event = Events.DATALOADER_STOP_ITERATION
        engine.add_event_handler(event, lambda engine: engine.set_data(ONE_SHOT[kind]()))
        data = ONE_SHOT[kind]()
        state = await engine.run(data, max_epochs=3, epoch_length=epoch_length, prefetch=prefetch)
        assert seen == [n % LENGTH for n in range(3 * (epoch_length or LENGTH))], (make, prefetch)
        assert why(engine) is StopReason.COMPLETED
        await close(state.dataloader)


# No data


async def test_without_data_the_step_gets_none() -> None:
    for make, prefetch in ALL:
        seen: list[Any] = []
        names: list[str] = []
        engine = make(seen)
        for event in (Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED):
            engine.add_event_handler(event, names.append, event.name)
        state = await engine.run(epoch_length=3, max_epochs=2, prefetch=prefetch)
        assert seen == [None] * 6, (make, prefetch)
        assert not names
        assert (state.epoch, state.iteration) == (2, 6)


# torch's loader with processes of its own


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 2])
async def test_a_loader_starts_its_workers_from_our_thread(prefetch: int) -> None:
    data = TensorDataset(torch.arange(12))
    loader = DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=forkserver(), timeout=30)
    seen: list[Any] = []
    await plain_on_worker(seen).run(loader, max_epochs=2, prefetch=prefetch)
    assert [batch.tolist() for (batch,) in seen] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ] * 2


@pytest.mark.slow
async def test_a_loader_whose_run_is_cancelled_ends_its_workers() -> None:
    loader = DataLoader(TensorDataset(torch.arange(1000)), num_workers=2, multiprocessing_context=forkserver())
    engine = plain_on_worker([])
    with anyio.CancelScope() as scope:

        @engine.on(Events.ITERATION_COMPLETED(once=3))
        async def cancel() -> None:
            scope.cancel()

        await engine.run(loader, prefetch=2)
    assert scope.cancelled_caught
    del engine
    gc.collect()
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_loader_whose_worker_is_killed_fails_the_run_within_seconds(prefetch: int) -> None:
    loader = DataLoader(KilledInWorker(), batch_size=4, num_workers=2, multiprocessing_context=forkserver())
    began = time.monotonic()
    with pytest.raises((RuntimeError, OSError)):  # of the loader, or of a connection to the worker
        anyio.run(lambda: plain_on_worker([]).run(loader, prefetch=prefetch))
    assert time.monotonic() - began < 4.5  # torch itself, off the main thread: more than five


class KilledInWorker(Dataset[int]):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> int:
        if index == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def forkserver() -> Any:
    """A fork of a process with threads, such as ours, may hang: the server has one thread only."""
    return multiprocessing.get_context("forkserver")

"""Pulling ahead of the step: how far, when, where; and the position that travels with each batch."""

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, Events

pytestmark = pytest.mark.every_event_loop

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
prefetches = pytest.mark.parametrize("prefetch", [0, 1, 4])


def step(engine: Engine[Any, Any], batch: Any) -> Any:
    return batch


class Reporting:
    """Data that reports when it is begun, asked for a batch, and ended."""

    def __init__(self, length: int, report: Callable[[str], object]) -> None:
        self.length = length
        self.report = report

    def generate(self) -> Iterator[int]:
        self.report("begin")
        try:
            for batch in range(self.length):
                self.report(f"pull {batch}")
                yield batch
        finally:
            self.report("end")

    def __iter__(self) -> Iterator[int]:
        return self.generate()


class ReportingAsync(Reporting):
    __iter__ = None  # type: ignore[assignment]  # async only

    async def __aiter__(self) -> AsyncIterator[int]:
        for batch in self.generate():
            await checkpoint()
            yield batch


kinds = pytest.mark.parametrize("kind", [Reporting, ReportingAsync], ids=["sync", "async"])


# When and how far


@both_threads
@kinds
@prefetches
async def test_an_epoch_begins_its_data_after_the_handlers_of_its_start(
    thread: Thread, kind: type[Reporting], prefetch: int
) -> None:
    """A handler of EPOCH_STARTED re-seeds the sampler: nothing may be drawn from it before."""
    log: list[str] = []
    engine = Engine(step, thread=thread)

    @engine.on(Events.EPOCH_STARTED)
    def plain(engine: Engine[Any, Any]) -> None:
        log.append(f"epoch {engine.state.epoch}")

    @engine.on(Events.EPOCH_STARTED)
    async def seed() -> None:
        for _ in range(10):
            await checkpoint()
        log.append("seeded")

    @engine.on(Events.EPOCH_COMPLETED)
    async def let_it_pull_if_it_will() -> None:
        while prefetch and log.count("end") < engine.state.epoch < 3:
            await checkpoint()  # until it has come to the end of the data: it does not begin again
        for _ in range(10):
            await checkpoint()
        log.append("completed")

    await engine.run(kind(3, log.append), max_epochs=3, prefetch=prefetch)
    pulls = ["begin", "pull 0", "pull 1", "pull 2"]
    assert [entry for entry in log if entry != "end"] == [
        entry for epoch in (1, 2, 3) for entry in (f"epoch {epoch}", "seeded", *pulls, "completed")
    ]
    assert log.count("end") == 3


@both_threads
@kinds
@prefetches
async def test_it_never_pulls_further_ahead_than_it_may(thread: Thread, kind: type[Reporting], prefetch: int) -> None:
    engine = Engine(step, thread=thread)
    pulled = furthest = 0

    def report(what: str) -> None:
        nonlocal pulled, furthest
        if what.startswith("pull"):
            pulled += 1
            furthest = max(furthest, pulled - engine.state.iteration)

    await engine.run(kind(300, report), prefetch=prefetch)
    assert pulled == 300
    assert furthest <= prefetch + 1  # and the one in hand, whose iteration has not begun


@both_threads
@kinds
@pytest.mark.parametrize("prefetch", [1, 4])
async def test_it_pulls_ahead_while_the_step_works(thread: Thread, kind: type[Reporting], prefetch: int) -> None:
    """Each step waits until as many batches are ahead of it as may be."""
    pulled = threading.Semaphore(0)

    async def waiting(engine: Engine[Any, None], batch: int) -> None:
        while batch < 20 - prefetch and not pulled.acquire(blocking=False):
            await checkpoint()

    def waiting_in_thread(engine: Engine[Any, None], batch: int) -> None:
        assert batch >= 20 - prefetch or pulled.acquire(timeout=60)

    def report(what: str) -> None:
        if what.startswith("pull") and int(what.split()[1]) >= prefetch:
            pulled.release()

    engine = Engine(waiting if not thread else waiting_in_thread)
    with anyio.fail_after(60):
        await engine.run(kind(20, report), prefetch=prefetch)
    assert engine.state.iteration == 20


@both_threads
@prefetches
async def test_it_pulls_no_more_than_the_run_can_use(thread: Thread, prefetch: int) -> None:
    for _ in range(50):
        engine = Engine(step, thread=thread)
        log: list[str] = []
        data = Reporting(100, log.append).generate()
        await engine.run(data, max_epochs=2, epoch_length=3, prefetch=prefetch)
        assert log[-1] == "pull 5"
        assert next(data) == 6
        data.close()  # type: ignore[attr-defined]  # a generator


@both_threads
@prefetches
async def test_resumed_it_pulls_no_more_than_the_run_can_use(thread: Thread, prefetch: int) -> None:
    """What was pulled before, and not stepped on, counts."""
    engine = Engine(step, thread=thread)
    log: list[str] = []
    data = Reporting(100, log.append).generate()
    failing = engine.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: 1 / 0)
    with failing, pytest.raises(ZeroDivisionError):
        await engine.run(data, max_epochs=2, epoch_length=3, prefetch=prefetch)
    await engine.run(data, max_epochs=2, epoch_length=3, prefetch=prefetch)
    assert engine.state.iteration == 6
    assert log[-1] == "pull 5"


@pytest.mark.parametrize("prefetch", [1, 4])
async def test_it_pulls_no_more_async_data_than_the_run_can_use(prefetch: int) -> None:
    async def async_step(engine: Engine[Any, None], batch: Any) -> None:
        for _ in range(10):
            await checkpoint()

    log: list[str] = []
    data = ReportingAsync(100, log.append).__aiter__()
    await Engine(async_step).run(data, max_epochs=2, epoch_length=3, prefetch=prefetch)
    assert log[-1] == "pull 5"
    assert await anext(data) == 6
    await data.aclose()  # type: ignore[attr-defined]  # a generator


@pytest.mark.parametrize("prefetch", [1, 4])
async def test_a_limit_that_is_raised_in_the_run_is_seen(prefetch: int) -> None:
    engine = Engine(step)
    log: list[str] = []

    @engine.on(Events.EPOCH_COMPLETED(once=2))
    def go_on(engine: Engine[Any, Any]) -> None:
        engine.state.max_epochs = 4

    await engine.run(Reporting(12, log.append), max_epochs=2, epoch_length=3, prefetch=prefetch)
    assert engine.state.iteration == 12


# Where


@both_threads
async def test_plain_data_is_pulled_in_one_thread_of_its_own(thread: Thread) -> None:
    threads: set[str] = set()
    engine = Engine(step, thread=thread)
    await engine.run(Reporting(20, lambda what: threads.add(threading.current_thread().name)), prefetch=2)
    assert threads == {"aengine-prefetch"}


@both_threads
async def test_without_prefetch_plain_data_is_pulled_where_the_step_runs(thread: Thread) -> None:
    threads: set[int] = set()

    def note(engine: Engine[Any, None], batch: int) -> None:
        threads.add(threading.get_ident())

    await Engine(note, thread=thread).run(Reporting(20, lambda what: threads.add(threading.get_ident())))
    assert len(threads) == 1
    assert (threading.get_ident() in threads) is not thread


@both_threads
@prefetches
async def test_async_data_is_pulled_on_the_loop(thread: Thread, prefetch: int) -> None:
    threads: set[int] = set()
    await Engine(step, thread=thread).run(
        ReportingAsync(20, lambda what: threads.add(threading.get_ident())), prefetch=prefetch
    )
    assert threads == {threading.get_ident()}


@both_threads
@kinds
async def test_a_slow_producer_and_a_slow_step_overlap(thread: Thread, kind: type[Reporting]) -> None:
    """Each batch is begun only once the step before it has, and each step ends only then."""
    step_begun = [threading.Event() for _ in range(10)]
    pull_begun = [threading.Event() for _ in range(11)]

    def plain(engine: Engine[Any, None], batch: int) -> None:
        step_begun[batch].set()
        assert pull_begun[batch + 1].wait(20)

    async def on_loop(engine: Engine[Any, None], batch: int) -> None:
        step_begun[batch].set()
        while not pull_begun[batch + 1].is_set():
            await checkpoint()

    class Slow(Reporting):
        def generate(self) -> Iterator[int]:
            for batch in range(self.length):
                pull_begun[batch].set()
                assert not batch or step_begun[batch - 1].wait(20)
                yield batch

    class SlowAsync(Reporting):
        __iter__ = None  # type: ignore[assignment]  # async only

        async def __aiter__(self) -> AsyncIterator[int]:
            for batch in range(self.length):
                pull_begun[batch].set()
                while batch and not step_begun[batch - 1].is_set():
                    await checkpoint()
                yield batch

    engine = Engine(on_loop if not thread else plain)
    pull_begun[10].set()
    data = (Slow if kind is Reporting else SlowAsync)(10, str)
    with anyio.fail_after(60):
        await engine.run(data, prefetch=1)
    assert engine.state.iteration == 10


# Positions


class Stateful:
    """Data that can say where it stands, and be put back there."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.position = 0
        self.loaded: list[Any] = []

    def __iter__(self) -> Iterator[int]:
        while self.position < self.length:
            self.position += 1
            yield self.position - 1
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.loaded.append(state_dict)
        self.position = state_dict["position"]


class AsyncStateful(Stateful):
    __iter__ = None  # type: ignore[assignment]  # async only

    async def __aiter__(self) -> AsyncIterator[int]:
        for batch in Stateful.__iter__(self):
            await checkpoint()
            yield batch


stateful_kinds = pytest.mark.parametrize("kind", [Stateful, AsyncStateful], ids=["sync", "async"])


@both_threads
@stateful_kinds
@prefetches
async def test_the_position_is_that_of_the_last_step_and_not_of_the_last_pull(
    thread: Thread, kind: type[Stateful], prefetch: int
) -> None:
    positions: list[tuple[int, Any, int]] = []

    def noting(engine: Engine[Any, None], batch: int) -> None:
        note(engine)  # in the step, it is not completed yet

    def note(engine: Engine[Any, None]) -> None:
        saved = engine.state_dict()
        positions.append((saved["iteration"], saved["data"]["state"], saved["data"]["batches"]))

    engine = Engine(noting, thread=thread)
    engine.add_event_handler(Events.ITERATION_COMPLETED, note)
    await engine.run(kind(4), max_epochs=2, prefetch=prefetch)
    after = [(n, None if n in (0, 4) else {"position": n % 4}, n % 4) for n in range(9)]
    in_steps, between = positions[::2], positions[1::2]
    assert [n for n, *_ in in_steps] == list(range(8))
    assert [n for n, *_ in between] == list(range(1, 9))
    for seen, expected in [*zip(in_steps, after, strict=False), *zip(between, after[1:], strict=True)]:
        if expected[0] % 4:
            assert seen == expected


@both_threads
@stateful_kinds
@prefetches
async def test_stateful_data_is_put_back_to_the_last_step(thread: Thread, kind: type[Stateful], prefetch: int) -> None:
    for stop in (1, 3, 4, 5, 7):
        seen: list[int] = []

        def noting(engine: Engine[Any, None], batch: int) -> None:
            seen.append(batch)  # noqa: B023 -- this run's

        engine = Engine(noting, thread=thread)
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop), engine.terminate)
        await engine.run(kind(4), max_epochs=2, prefetch=prefetch)
        saved = engine.state_dict()
        data = kind(4)
        engine = Engine(noting, thread=thread)
        engine.load_state_dict(saved)
        await engine.run(data, prefetch=prefetch)
        assert seen == [0, 1, 2, 3] * 2
        assert data.loaded == [{"position": stop % 4 or 4}]


@stateful_kinds
@prefetches
async def test_a_step_that_failed_gets_its_batch_again(kind: type[Stateful], prefetch: int) -> None:
    seen: list[int] = []

    def fail_once(engine: Engine[Any, None], batch: int) -> None:
        seen.append(batch)
        if seen == [0, 1, 2]:
            raise ValueError("once")

    engine = Engine(fail_once)
    data = kind(5)
    with pytest.raises(ValueError, match="once"):
        await engine.run(data, prefetch=prefetch)
    assert {"batches": 2, "length": None, "state": {"position": 2}}.items() <= engine.state_dict()["data"].items()
    await engine.run(data, prefetch=prefetch)
    assert seen == [0, 1, 2, 2, 3, 4]


@prefetches
async def test_data_of_known_length_is_fast_forwarded(prefetch: int) -> None:
    seen: list[int] = []

    def noting(engine: Engine[Any, None], batch: int) -> None:
        seen.append(batch)

    engine = Engine(noting)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=7), engine.terminate)
    await engine.run(range(5), max_epochs=2, prefetch=prefetch)
    saved = engine.state_dict()
    assert (saved["iteration"], saved["data"]["batches"]) == (7, 2)
    engine = Engine(noting)
    engine.load_state_dict(saved)
    await engine.run(range(5), prefetch=prefetch)
    assert seen == [0, 1, 2, 3, 4] * 2

"""The worker: one thread for what blocks, its own or shared, and an event loop that stays free."""

import asyncio
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import torch
from anyio.lowlevel import checkpoint

from aengine import Engine, Event, Events, StopReason
from aengine.threads.dedicated import DedicatedThread
from aengine.threads.event_loop import EventLoopHandle
from aengine.threads.openmp import release_idle_threads
from aengine.threads.thread_state import SharedContext
from aengine.threads.worker import WorkItem

pytestmark = pytest.mark.every_event_loop

request: ContextVar[str] = ContextVar("request", default="none")


def noting(threads: list[threading.Thread]) -> Engine[Any, None]:
    def step(engine: Engine[Any, None], batch: Any) -> None:
        threads.append(threading.current_thread())

    return Engine(step, name="trainer")


# Which thread


async def test_all_plain_steps_and_handlers_of_a_run_share_one_thread() -> None:
    threads: list[threading.Thread] = []
    engine = noting(threads)

    def note() -> None:
        threads.append(threading.current_thread())

    for event in (Events.STARTED, Events.GET_BATCH_STARTED, Events.EPOCH_COMPLETED):
        engine.add_event_handler(event, note)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), note)
    engine.add_event_handler(Events.ITERATION_COMPLETED, checkpoint)  # the loop comes and goes
    engine.add_event_handler(Events.COMPLETED, note)

    def data() -> Iterator[int]:
        for batch in range(5):
            note()
            yield batch

    await engine.run(data, max_epochs=2)
    (worker,) = set(threads)
    assert worker.name == "aengine trainer"
    assert worker.daemon
    assert worker is not threading.current_thread()
    assert not worker.is_alive()  # joined before run() has returned


async def test_each_run_has_a_thread_of_its_own_that_is_gone_after_it() -> None:
    threads: list[threading.Thread] = []
    engine = noting(threads)
    for _ in range(3):
        await engine.run([1])
        assert not threads[-1].is_alive()
    assert len(set(threads)) == 3


@pytest.mark.parametrize("way", ["fails", "is cancelled", "is interrupted", "is terminated"])
async def test_the_thread_is_gone_when_the_run(way: str) -> None:
    threads: list[threading.Thread] = []
    engine = noting(threads)
    with anyio.CancelScope() as scope:

        @engine.on(Events.ITERATION_COMPLETED(once=2))
        async def stop() -> None:
            match way:
                case "fails":
                    raise ValueError(way)
                case "is cancelled":
                    scope.cancel()
                    await checkpoint()
                case "is interrupted":
                    engine.interrupt()
                case "is terminated":
                    engine.terminate()

        if way == "fails":
            with pytest.raises(ValueError, match="fails"):
                await engine.run(range(5))
        else:
            await engine.run(range(5))
    assert scope.cancelled_caught is (way == "is cancelled")
    assert len(set(threads)) == 1
    assert not threads[0].is_alive()


@pytest.mark.parametrize("is_async", [False, True], ids=["thread=False", "async"])
async def test_other_steps_run_on_the_loops_thread_and_start_none(is_async: Any) -> None:
    threads: list[threading.Thread] = []

    def step(engine: Engine[int, None], batch: int) -> None:
        threads.append(threading.current_thread())

    async def async_step(engine: Engine[int, None], batch: int) -> None:
        threads.append(threading.current_thread())

    engine = Engine(async_step) if is_async else Engine(step, thread=False)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: threads.append(threading.current_thread()))
    before = threading.active_count()
    engine.add_event_handler(Events.COMPLETED, lambda: threads.append(threading.current_thread()))
    await engine.run(range(3))
    assert set(threads) == {threading.current_thread()}
    assert threading.active_count() == before


@pytest.mark.parametrize("thread", [True, False])
async def test_an_async_step_runs_on_the_event_loop_whatever_thread_says(*, thread: bool) -> None:
    async def step(engine: Engine[int, threading.Thread], batch: int) -> threading.Thread:
        return threading.current_thread()

    assert (await Engine(step, thread=thread).run([1])).output is threading.current_thread()


async def test_the_event_loop_stays_free_while_a_step_blocks() -> None:
    """Each step waits for a task; were the loop blocked, that task would never run."""
    begun = [threading.Event() for _ in range(5)]
    answered = [threading.Event() for _ in range(5)]

    def step(engine: Engine[int, None], batch: int) -> None:
        begun[batch].set()
        assert answered[batch].wait(20)

    async def answer() -> None:
        for question, reply in zip(begun, answered, strict=True):
            while not question.is_set():
                await checkpoint()
            reply.set()

    async with anyio.create_task_group() as group:
        group.start_soon(answer)
        await Engine(step).run(range(5))


async def test_many_engines_step_at_once() -> None:
    barrier = threading.Barrier(8, timeout=60)

    def step(engine: Engine[int, None], batch: int) -> None:
        barrier.wait()

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(Engine(step).run, range(3))


# The caller's context


async def test_context_variables_are_seen_everywhere_in_a_run() -> None:
    seen: dict[str, str] = {}

    def see(where: str) -> None:
        seen[where] = request.get()

    def step(engine: Engine[int, None], batch: int) -> None:
        see("step")

    engine = Engine(step)
    engine.add_event_handler(Events.EPOCH_STARTED, see, "handler")

    @engine.on(Events.EPOCH_STARTED)
    async def handler() -> None:
        see("async handler")

    @engine.subscribe(Events.EPOCH_COMPLETED)
    async def subscriber(event: Event) -> None:
        see("subscriber")

    @engine.subscribe(Events.EPOCH_COMPLETED)
    def plain_subscriber(event: Event) -> None:
        see("plain subscriber")

    @engine.on(Events.ITERATION_STARTED(once=1))
    def subscribe_late() -> None:
        async def late(event: Event) -> None:
            see("late subscriber")

        engine.subscribe(Events.EPOCH_COMPLETED, late)

    def data() -> Iterator[int]:
        see("prefetch thread")
        yield 1

    async def async_data() -> Any:
        see("prefetch task")
        yield 1

    request.set("mine")
    await engine.run(data, prefetch=1)
    await Engine(lambda engine, batch: None).run(async_data, prefetch=1)
    assert seen == dict.fromkeys(
        [
            "step",
            "handler",
            "async handler",
            "subscriber",
            "plain subscriber",
            "late subscriber",
            "prefetch thread",
            "prefetch task",
        ],
        "mine",
    )


async def test_a_context_variable_that_a_step_sets_stays_in_its_run() -> None:
    seen: list[str] = []

    def step(engine: Engine[int, None], batch: int) -> None:
        seen.append(request.get())
        request.set(f"step {batch}")

    request.set("caller")
    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), checkpoint)
    await engine.run(range(3))
    assert seen == ["caller", "step 0", "step 1"]
    assert request.get() == "caller"
    await engine.run(range(1))
    assert seen[3] == "caller"


# Nested runs


async def test_a_run_in_an_async_handler_shares_the_idle_thread() -> None:
    threads: list[threading.Thread] = []
    outer, middle, inner = noting(threads), noting(threads), noting(threads)

    @outer.on(Events.ITERATION_COMPLETED)
    async def nest() -> None:
        await middle.run([1])

    @middle.on(Events.COMPLETED)
    async def nest_deeper() -> None:
        await inner.run([1])

    await outer.run(range(3))
    assert len(threads) == 9
    assert len(set(threads)) == 1


async def test_two_runs_at_once_in_one_handler_do_not_share_it() -> None:
    threads: set[int] = set()
    barrier = threading.Barrier(2, timeout=60)

    def meet(engine: Engine[int, None], batch: int) -> None:
        threads.add(threading.get_ident())
        barrier.wait()

    outer = noting([])

    @outer.on(Events.ITERATION_COMPLETED)
    async def nest() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(Engine(meet).run, range(3))

    await outer.run([1])
    assert len(threads) == 2


async def test_a_run_in_a_subscriber_has_a_thread_of_its_own() -> None:
    """It runs beside the step: sharing its thread, it would wait for it."""
    met = threading.Barrier(2, timeout=60)

    def meet(engine: Engine[int, None], batch: int) -> None:
        if batch == 1:
            met.wait()

    trainer, validator = Engine(meet), Engine(meet)

    @trainer.subscribe(Events.ITERATION_COMPLETED(once=1))
    async def validate(event: Event) -> None:
        await validator.run([1])

    await trainer.run([0, 1])


async def test_a_run_in_a_handler_of_an_async_engine_has_a_thread_of_its_own() -> None:
    threads: list[threading.Thread] = []

    async def step(engine: Engine[int, None], batch: int) -> None: ...

    outer, inner = Engine(step), noting(threads)

    @outer.on(Events.ITERATION_COMPLETED)
    async def nest() -> None:
        await inner.run([1])

    await outer.run(range(2))
    assert threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


async def test_a_run_sync_in_a_plain_handler_stays_on_the_thread() -> None:
    threads: list[threading.Thread] = []
    outer, inner = noting(threads), noting(threads)
    outer.add_event_handler(Events.ITERATION_COMPLETED, lambda: inner.run_sync([1, 2]))
    await outer.run(range(2))
    assert len(threads) == 6
    assert len(set(threads)) == 1


async def test_a_run_sync_in_a_plain_handler_may_need_an_event_loop() -> None:
    seen: list[int] = []

    async def step(engine: Engine[int, None], batch: int) -> None:
        await checkpoint()
        seen.append(batch)

    outer, inner = noting([]), Engine(step)

    @inner.subscribe(Events.ITERATION_COMPLETED)
    async def note(event: Event) -> None:
        await checkpoint()
        seen.append(event.iteration * 10)

    outer.add_event_handler(Events.EPOCH_COMPLETED, lambda: inner.run_sync([1, 2]))
    await outer.run([0])
    assert sorted(seen) == [1, 2, 10, 20]


async def test_a_nested_run_that_fails_gives_the_thread_back() -> None:
    threads: list[threading.Thread] = []
    outer = noting(threads)

    def fail(engine: Engine[int, None], batch: int) -> None:
        threads.append(threading.current_thread())
        raise ValueError("inner")

    @outer.on(Events.ITERATION_COMPLETED)
    async def nest() -> None:
        with pytest.raises(ValueError, match="inner"):
            await Engine(fail).run([1])

    await outer.run(range(3))
    assert len(threads) == 6
    assert len(set(threads)) == 1


async def test_an_engine_in_its_own_handler_says_that_it_is_busy() -> None:
    engine = noting([])

    @engine.on(Events.ITERATION_COMPLETED)
    async def nest() -> None:
        await engine.run([1])

    with pytest.raises(RuntimeError, match="'trainer' is running: one engine runs one loop"):
        await engine.run([1])


# Steps are never abandoned


async def test_a_cancellation_waits_for_the_step_in_flight() -> None:
    begun, gate = threading.Event(), threading.Event()
    ended: list[int] = []

    def step(engine: Engine[int, None], batch: int) -> None:
        begun.set()
        assert gate.wait(20)
        ended.append(batch)

    engine = Engine(step)
    cancelled: list[int] = []
    engine.add_event_handler(Events.CANCELLED, lambda: cancelled.append(len(ended)))

    async def cancel() -> None:
        while not begun.is_set():
            await checkpoint()
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            for _ in range(20):
                await checkpoint()
        assert engine.statistics().is_running
        gate.set()

    async with anyio.create_task_group() as group:
        group.start_soon(cancel)
        await engine.run(range(5))
    assert group.cancel_scope.cancelled_caught
    assert ended == [0]
    assert cancelled == [1]


@pytest.mark.parametrize("ending", ["cancellation", KeyboardInterrupt, SystemExit])
async def test_a_step_that_catches_what_ends_the_run_is_the_last(ending: Any) -> None:
    """It waits for an async handler of an event that it fires, and catches what comes out of that."""
    waiting = anyio.Event()
    steps: list[int] = []

    def step(engine: Engine[int, None], batch: int) -> None:
        steps.append(batch)
        if batch == 1:
            with suppress(BaseException):
                engine.fire_event("asked")

    engine = Engine(step)
    engine.register_events("asked")

    @engine.on("asked")
    async def answer() -> None:
        if ending != "cancellation":
            raise ending
        waiting.set()
        await anyio.sleep_forever()

    async def cancel() -> None:
        await waiting.wait()
        group.cancel_scope.cancel()

    with nullcontext() if ending == "cancellation" else pytest.raises(ending):
        try:
            async with anyio.create_task_group() as group:
                if ending == "cancellation":
                    group.start_soon(cancel)
                await engine.run(range(100))
        except BaseExceptionGroup as error:  # trio's way
            raise error.exceptions[0] from None
    assert steps == [0, 1]
    assert engine.state.stop_reason is StopReason.CANCELLED


@pytest.mark.parametrize("calls", ["before", "after"])
async def test_a_call_that_is_no_longer_waited_for_waits_for_nothing(calls: str, anyio_backend_name: str) -> None:
    """A second Ctrl-C, which asyncio makes a second cancellation, while a step is about to fire an event, or does."""
    if anyio_backend_name == "trio":
        pytest.skip("trio has no cancellation that a shield does not hold")
    thread = DedicatedThread("worker")
    begun, gate, ended = threading.Event(), threading.Event(), threading.Event()
    cancelled: list[bool] = []
    raised: list[BaseException] = []

    def call() -> None:
        begun.set()
        assert gate.wait(20)
        try:
            item.call_in_loop(checkpoint())
        except BaseException as error:  # noqa: BLE001 -- looked at below
            raised.append(error)
        ended.set()

    item = WorkItem(EventLoopHandle(), SharedContext(copy_context()), call)
    thread.post(item.run)
    task = asyncio.create_task(item.wait(lambda: cancelled.append(True)))
    await anyio.to_thread.run_sync(begun.wait)
    task.cancel()
    while not cancelled:
        await checkpoint()
    await anyio.wait_all_tasks_blocked()
    if calls == "before":
        gate.set()
        while item._wanted is None:  # without a turn of the event loop, so that it is not answered before
            pass
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    assert ended.wait(20)
    assert isinstance(raised[0], asyncio.CancelledError)
    thread.stop()


async def test_a_batch_is_freed_before_the_next_is_fetched() -> None:
    """On a device there may be no room for two."""

    class Batch: ...

    batches: list[weakref.ref[Batch]] = []
    gone: list[bool] = []

    def data() -> Iterator[Batch]:
        for _ in range(5):
            gone.extend(batch() is None for batch in batches)
            batch = Batch()
            batches.append(weakref.ref(batch))
            yield batch
            del batch

    engine = noting([])
    await engine.run(data)
    engine.add_event_handler(Events.ITERATION_COMPLETED, checkpoint)
    await engine.run(data)
    assert all(gone)
    assert len(gone) > 20


# What torch's threads cost


def test_a_run_without_torch_loads_none() -> None:
    program = (
        "import asyncio, sys, aengine\n"
        "engine = aengine.Engine(lambda engine, batch: batch)\n"
        "asyncio.run(engine.run([1, 2]))\n"
        "engine.run_sync([1, 2])\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP, and /proc")
async def test_a_run_releases_the_idle_threads_of_its_caller() -> None:
    def count_threads() -> int:
        return len([*Path("/proc/self/task").iterdir()])

    def in_parallel() -> float:
        return float(torch.ones(1_000_000).add_(1).sum())

    threads_before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert in_parallel() == 2_000_000
        team = count_threads()
        counts: list[int] = []

        def step(engine: Engine[int, float], batch: int) -> float:
            counts.append(count_threads())
            return in_parallel()

        engine = Engine(step)
        await engine.run(range(3))
        assert engine.state.output == 2_000_000
        assert counts[0] == team - 1 + 1  # one of the team is gone, the worker has come
        assert in_parallel() == 2_000_000  # and it comes back when it is needed
        release_idle_threads()
        release_idle_threads()
        assert in_parallel() == 2_000_000
    finally:
        torch.set_num_threads(threads_before)

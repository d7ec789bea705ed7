"""What is stuck when a run is to end: data that gives no batch, handlers that never return."""

import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.backends import Backend
from support.engines import each_engine, plain_step
from support.record import AnyEngine

from aengine import Engine, Events, StopReason


@pytest.mark.every_event_loop
@each_engine
@pytest.mark.parametrize("prefetch", [0, 2])
async def test_terminate_ends_the_wait_for_a_generator_that_gives_no_batch(
    make: Callable[..., AnyEngine], prefetch: int
) -> None:
    is_closed = False

    async def batches() -> AsyncIterator[int]:
        nonlocal is_closed
        yield 0
        try:
            await anyio.sleep_forever()
        finally:
            is_closed = True

    engine = make(grace=0.1)

    async def terminate() -> None:
        while engine.state.iteration < 1:
            await checkpoint()
        await anyio.wait_all_tasks_blocked()
        engine.terminate()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(terminate)
            await engine.run(batches(), max_iters=10, prefetch=prefetch)
    assert is_closed
    assert (engine.state.stop_reason, engine.state.iteration) == (StopReason.TERMINATED, 1)


@each_engine
async def test_a_batch_that_comes_in_time_is_stepped_on_and_the_generator_goes_on(
    make: Callable[..., AnyEngine],
) -> None:
    engine, may_come = make(grace=30), anyio.Event()

    async def batches() -> AsyncIterator[int]:
        yield 0
        await may_come.wait()
        yield 1
        yield 2

    async def terminate() -> None:
        while engine.state.iteration < 1:
            await checkpoint()
        await anyio.wait_all_tasks_blocked()
        engine.terminate()
        await anyio.wait_all_tasks_blocked()
        may_come.set()

    generator = batches()
    async with anyio.create_task_group() as group:
        group.start_soon(terminate)
        await engine.run(generator, max_iters=10)
    assert (engine.state.stop_reason, engine.state.iteration) == (StopReason.TERMINATED, 2)
    assert await anext(generator) == 2
    await generator.aclose()  # type: ignore[attr-defined]  # a generator


STUCK = """
import json, sys, threading
import anyio
from aengine import Engine, Events

backend, options = json.loads(sys.argv[1])
engine = Engine(lambda engine, batch: batch, grace=0.05)
engine.subscribe(Events.ITERATION_COMPLETED, lambda event: threading.Event().wait())
try:
    anyio.run(engine.run, [1, 2], backend=backend, backend_options=options)
except TimeoutError as error:
    print(type(error).__name__)
"""


def test_a_plain_subscriber_that_never_returns_does_not_keep_the_process(anyio_backend: Backend) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STUCK, json.dumps(anyio_backend)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "HandlerTimeout\n", "")


async def test_a_plain_subscriber_keeps_its_thread_through_a_run() -> None:
    """What belongs to a thread, such as a connection to SQLite, can be kept by its handler."""
    threads: set[threading.Thread] = set()
    engine = Engine(plain_step)
    engine.subscribe(Events.ITERATION_COMPLETED, lambda event: threads.add(threading.current_thread()))
    await engine.run(range(20))
    assert len(threads) == 1
    assert not any(thread.is_alive() for thread in threads)

"""Control calls: plain, from any thread and task, with effect before the next step."""

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, Event, Events, StopReason

pytestmark = pytest.mark.every_event_loop

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


def in_thread(call: Callable[[], object]) -> None:
    """Make a call in another thread, and wait for it."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


CALLS: dict[str, tuple[Callable[[Engine[Any, Any]], bool], StopReason, int]] = {
    "terminate": (Engine.terminate, StopReason.TERMINATED, 3),
    "interrupt": (Engine.interrupt, StopReason.INTERRUPTED, 3),
    "terminate_epoch": (Engine.terminate_epoch, StopReason.COMPLETED, 8),
}


@both_threads
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("where", ["step", "thread", "handler", "async handler", "subscriber"])
async def test_a_call_takes_effect_before_the_next_step(thread: Thread, call: str, where: str) -> None:
    function, reason, expected = CALLS[call]
    called = anyio.Event()
    steps = 0

    def step(engine: Engine[int, None], batch: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            if where == "step":
                function(engine)
            elif where == "thread":
                in_thread(lambda: function(engine))

    engine = Engine(step, thread=thread)
    once = Events.ITERATION_COMPLETED(once=3)
    if where == "handler":
        engine.add_event_handler(once, lambda: function(engine))
    elif where == "async handler":

        @engine.on(once)
        async def handler() -> None:
            await checkpoint()
            function(engine)
            await checkpoint()

    elif where == "subscriber":

        @engine.subscribe(Events.ITERATION_COMPLETED(once=3))
        async def subscriber(event: Event) -> None:
            function(engine)
            called.set()

        engine.add_event_handler(Events.ITERATION_STARTED(once=4), called.wait)

    await engine.run(range(5), max_epochs=2)
    assert engine.state.stop_reason is reason
    assert steps == expected


@both_threads
async def test_a_call_from_a_thread_reaches_a_run_between_any_two_steps(thread: Thread) -> None:
    """No chance decides this: whenever the call comes, the run ends after it."""
    for _ in range(50):
        begun = threading.Event()

        def step(engine: Engine[int, None], batch: int) -> None:
            begun.set()  # noqa: B023 -- this run's

        engine = Engine(step, thread=thread)

        def terminate() -> None:
            begun.wait(60)  # noqa: B023 -- likewise
            engine.terminate()  # noqa: B023

        async with anyio.create_task_group() as group:
            group.start_soon(anyio.to_thread.run_sync, terminate)
            await engine.run(range(10**7))
        assert engine.state.stop_reason is StopReason.TERMINATED


async def idle() -> None:
    """Give the loop every chance to go on where it must not."""
    for _ in range(50):
        await checkpoint()
        await anyio.to_thread.run_sync(lambda: None)


@both_threads
@pytest.mark.parametrize("caller", ["task", "thread"])
async def test_a_paused_run_waits_until_it_is_resumed(thread: Thread, caller: str) -> None:
    paused = threading.Event()

    def step(engine: Engine[int, None], batch: int) -> None:
        if batch == 2:
            engine.pause()
            paused.set()

    engine = Engine(step, thread=thread)

    async def resume() -> None:
        await anyio.to_thread.run_sync(paused.wait)
        await idle()
        assert engine.state.iteration == 3
        assert engine.statistics().is_running
        if caller == "task":
            engine.resume()
        else:
            await anyio.to_thread.run_sync(engine.resume)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(resume)
            await engine.run(range(5))
    assert engine.state.iteration == 5
    assert engine.state.stop_reason is StopReason.COMPLETED


@both_threads
async def test_a_paused_run_can_be_cancelled_and_resumed_afterwards(thread: Thread) -> None:
    paused = threading.Event()

    def step(engine: Engine[int, None], batch: int) -> None:
        if batch == 2 and not paused.is_set():
            engine.pause()
            paused.set()

    engine = Engine(step, thread=thread)

    async def cancel() -> None:
        await anyio.to_thread.run_sync(paused.wait)
        await idle()
        group.cancel_scope.cancel()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(cancel)
            await engine.run(range(5))
    assert engine.state.stop_reason is StopReason.CANCELLED
    assert engine.state.iteration == 3
    engine.resume()
    await engine.run(range(5))
    assert engine.state.iteration == 5


@both_threads
@pytest.mark.parametrize("call", ["terminate", "interrupt"])
async def test_a_paused_run_can_be_stopped(thread: Thread, call: str) -> None:
    paused = threading.Event()

    def step(engine: Engine[int, None], batch: int) -> None:
        if batch == 2:
            engine.pause()
            paused.set()

    engine = Engine(step, thread=thread)

    async def stop() -> None:
        await anyio.to_thread.run_sync(paused.wait)
        await idle()
        await anyio.to_thread.run_sync(getattr(engine, call))

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(stop)
            await engine.run(range(5))
    assert engine.state.iteration == 3
    assert engine.state.stop_reason is CALLS[call][1]


async def test_paused_and_resumed_at_once_it_goes_on() -> None:
    def step(engine: Engine[int, None], batch: int) -> None:
        engine.pause()
        engine.resume()

    engine = Engine(step)
    with anyio.fail_after(60):
        await engine.run(range(100))
    assert engine.state.iteration == 100


async def test_pauses_and_resumes_of_many_threads_leave_it_going() -> None:
    engine: Engine[int, int] = Engine(lambda engine, batch: batch)
    over = threading.Event()

    def toggle() -> None:
        while not over.is_set():
            engine.pause()
            engine.resume()

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(anyio.to_thread.run_sync, toggle)
        try:
            with anyio.fail_after(60):
                await engine.run(range(500))  # under uvloop each takes 10 ms beside three threads that never rest
        finally:
            over.set()
    assert engine.state.iteration == 500


async def test_calls_without_a_run_do_nothing_to_the_next() -> None:
    engine: Engine[int, int] = Engine(lambda engine, batch: batch)
    engine.terminate()
    engine.interrupt()
    engine.terminate_epoch()
    await engine.run(range(3))
    assert engine.state.stop_reason is StopReason.COMPLETED
    engine.terminate()
    await engine.run(range(3))
    assert engine.state.iteration == 3


FLAGS: dict[str, Callable[[Engine[Any, Any]], bool]] = {
    "terminate": lambda engine: engine.should_terminate,
    "interrupt": lambda engine: engine.should_interrupt,
    "terminate_epoch": lambda engine: engine.should_terminate_single_epoch,
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_says_whether_a_run_will_serve_it(call: str) -> None:
    function, flag = CALLS[call][0], FLAGS[call]
    heard: list[bool] = []
    flags: list[bool] = []
    engine: Engine[int, int] = Engine(lambda engine, batch: batch)
    engine.add_event_handler(Events.STARTED, lambda: flags.append(flag(engine)))

    assert function(engine) is False  # before the first run
    assert flag(engine)
    with engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: heard.append(function(engine))):
        await engine.run(range(4), max_epochs=2)
    assert heard == [True]
    await engine.run()
    assert engine.state.stop_reason is StopReason.COMPLETED

    assert function(engine) is False  # when it is done
    assert flag(engine)
    await engine.run(range(4), max_epochs=2)
    assert engine.state.stop_reason is StopReason.COMPLETED
    assert engine.state.iteration == 8
    assert not any(flags)
    assert not flag(engine)


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_while_the_run_is_suspended_does_nothing_to_it(call: str) -> None:
    function, flag = CALLS[call][0], FLAGS[call]
    engine: Engine[int, int] = Engine(lambda engine, batch: batch)
    with engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt):
        await engine.run(range(4), max_epochs=2)
    assert function(engine) is False
    assert flag(engine)
    await engine.run()
    assert (engine.state.stop_reason, engine.state.iteration) == (StopReason.COMPLETED, 8)


@pytest.mark.parametrize("call", CALLS)
async def test_a_run_that_is_refused_leaves_what_was_called(call: str) -> None:
    engine: Engine[int, int] = Engine(lambda engine, batch: batch)
    CALLS[call][0](engine)
    with pytest.raises(ValueError, match="length 0"):
        await engine.run([])
    assert FLAGS[call](engine)


async def test_a_job_that_waits_to_run_is_stopped_before_it_begins() -> None:
    """As README shows it: the flag is looked at by whatever is about to call `run()`."""
    engine: Engine[int, int] = Engine(lambda engine, batch: batch)
    slot = anyio.Event()

    async def job() -> None:
        await slot.wait()
        if not engine.should_terminate:
            await engine.run(range(3))

    async with anyio.create_task_group() as group:
        group.start_soon(job)
        await anyio.wait_all_tasks_blocked()
        assert engine.terminate() is False
        slot.set()
    assert engine.state.iteration == 0


@both_threads
async def test_data_may_be_changed_from_anywhere(thread: Thread) -> None:
    seen: list[int] = []

    def step(engine: Engine[int, None], batch: int) -> None:
        seen.append(batch)
        if batch == 1:
            in_thread(lambda: engine.set_data([10, 11, 12, 13, 14]))

    engine = Engine(step, thread=thread)
    await engine.run(range(5))
    assert seen == [0, 1, 10, 11, 12]
    with pytest.raises(RuntimeError, match=r"pass the data to run\(\)"):
        engine.set_data([1])

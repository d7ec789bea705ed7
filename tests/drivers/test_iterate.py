"""iterate(): a run for people who keep their own `for`."""
# ruff: noqa: PERF401, PT012 -- an `async for`, or a block with its `async with`, is what is under test

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.record import Boom
from support.ways_to_end import is_freed

from aengine import Engine, EngineBusy, Event, Events, StopReason

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


def step(engine: Engine[int, int], batch: int) -> int:
    return batch * 10


def why(engine: Engine[Any, Any]) -> StopReason | None:
    """Ask in a call: a type checker would take two attributes for the same."""
    return engine.state.stop_reason


def told(engine: Engine[Any, Any]) -> list[str]:
    """Note how the run ends."""
    names: list[str] = []
    for event in (Events.TERMINATE, Events.COMPLETED, Events.CANCELLED, Events.EXCEPTION_RAISED):
        engine.add_event_handler(event, names.append, event.name)
    return names


@both_threads
async def test_the_body_sees_every_iteration_and_the_loop_waits_for_it(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    names = told(engine)
    seen: list[tuple[int, int, Any]] = []
    async with engine.iterate(range(5), max_epochs=2) as iterations:
        async for event in iterations:
            assert isinstance(event, Event)
            for _ in range(5):
                await checkpoint()
                assert engine.state.iteration == event.iteration
            seen.append((event.epoch, event.iteration, event.output))
    assert seen == [(1 + n // 5, n + 1, n % 5 * 10) for n in range(10)]
    assert names == ["COMPLETED"]
    assert why(engine) is StopReason.COMPLETED


@both_threads
async def test_inline_handlers_have_run_before_the_body(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    order: list[str] = []

    @engine.on(Events.ITERATION_COMPLETED)
    def handler(engine: Engine[int, int]) -> None:
        order.append(f"handler {engine.state.iteration}")

    async with engine.iterate(range(2)) as iterations:
        async for event in iterations:
            order.append(f"body {event.iteration}")
    assert order == ["handler 1", "body 1", "handler 2", "body 2"]


@both_threads
async def test_break_terminates_and_the_run_can_be_resumed(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    names = told(engine)
    async with engine.iterate(range(5)) as iterations:
        async for event in iterations:
            if event.iteration == 2:
                break
    assert names == ["TERMINATE", "COMPLETED"]
    assert why(engine) is StopReason.TERMINATED
    assert engine.state.iteration == 2
    async with engine.iterate(range(5)) as iterations:
        rest = [event.output async for event in iterations]
    assert rest == [20, 30, 40]
    assert why(engine) is StopReason.COMPLETED


@both_threads
async def test_an_error_in_the_body_fails_the_run(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    names, error = told(engine), ValueError("of the body")
    raised: list[BaseException] = []

    @engine.on(Events.EXCEPTION_RAISED)
    def tell(engine: Engine[int, int], error: BaseException) -> None:
        raised.append(error)

    with pytest.raises(ValueError, match="of the body") as caught:
        async with engine.iterate(range(5)) as iterations:
            async for event in iterations:
                if event.iteration == 2:
                    raise error
    assert caught.value is error
    assert raised == [error]
    assert names == ["EXCEPTION_RAISED"]
    assert why(engine) is StopReason.FAILED
    await engine.run(range(5))
    assert engine.state.iteration == 5


@both_threads
async def test_an_error_of_the_step_comes_out_of_the_for(thread: Thread) -> None:
    error = ValueError("of the step")

    def fail(engine: Engine[int, int], batch: int) -> int:
        if batch == 2:
            raise error
        return batch

    engine = Engine(fail, thread=thread)
    names = told(engine)
    seen: list[int] = []
    with pytest.raises(ValueError, match="of the step") as caught:
        async with engine.iterate(range(5)) as iterations:
            async for event in iterations:
                seen.append(event.iteration)
    assert caught.value is error
    assert seen == [1, 2]
    assert names == ["EXCEPTION_RAISED"]


@both_threads
async def test_an_error_of_the_step_can_be_caught_around_the_for(thread: Thread) -> None:
    def fail(engine: Engine[int, int], batch: int) -> int:
        raise ValueError("of the step")

    engine = Engine(fail, thread=thread)
    async with engine.iterate(range(5)) as iterations:
        with pytest.raises(ValueError, match="of the step"):
            await anext(iterations)
        with pytest.raises(StopAsyncIteration):
            await anext(iterations)


@both_threads
async def test_an_error_in_the_body_and_one_in_a_handler_come_out_together(thread: Thread) -> None:
    engine = Engine(step, thread=thread)

    @engine.on(Events.EXCEPTION_RAISED)
    def fail() -> None:
        raise KeyError("of the handler")

    with pytest.raises(ExceptionGroup) as caught:
        async with engine.iterate(range(5)) as iterations:
            async for _ in iterations:
                raise ValueError("of the body")
    assert {type(error) for error in caught.value.exceptions} == {KeyError, ValueError}


@both_threads
async def test_a_subscriber_that_fails_ends_the_for(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    error = ValueError("of the subscriber")

    @engine.subscribe(Events.ITERATION_COMPLETED(once=2))
    async def fail(event: Event) -> None:
        raise error

    with anyio.fail_after(60), pytest.raises(ValueError, match="of the subs") as caught:
        async with engine.iterate(range(10**6)) as iterations:
            async for _ in iterations:
                await checkpoint()
    assert caught.value is error


@both_threads
async def test_cancelled_in_the_body_the_run_is_cancelled(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    names = told(engine)
    with anyio.CancelScope() as scope:
        async with engine.iterate(range(5)) as iterations:
            async for event in iterations:
                if event.iteration == 2:
                    scope.cancel()
                    await checkpoint()
    assert scope.cancelled_caught
    assert names == ["CANCELLED"]
    assert why(engine) is StopReason.CANCELLED
    await engine.run(range(5))
    assert engine.state.iteration == 5


async def test_cancelled_while_it_waits_for_a_step_the_run_is_cancelled() -> None:
    async def hang(engine: Engine[int, None], batch: int) -> None:
        if batch == 2:
            scope.cancel()
            await anyio.sleep_forever()

    engine = Engine(hang)
    names = told(engine)
    with anyio.CancelScope() as scope:
        async with engine.iterate(range(5)) as iterations:
            async for _ in iterations:
                pass
    assert scope.cancelled_caught
    assert names == ["CANCELLED"]


@both_threads
async def test_left_before_the_first_iteration_it_ends_there(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    async with engine.iterate(range(1000)):
        pass
    assert engine.state.iteration <= 1
    async with engine.iterate(range(1000)):
        await checkpoint()
    assert engine.state.iteration <= 2


@both_threads
async def test_an_error_before_the_first_iteration_ends_it_there(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    error = ValueError("too early")
    for turns in (0, 1, 20):
        with pytest.raises(ValueError, match="too early") as caught:
            async with engine.iterate(range(1000)):
                for _ in range(turns):
                    await checkpoint()
                raise error
        assert caught.value is error
    assert engine.state.iteration <= 3


@both_threads
async def test_terminated_or_interrupted_in_the_body_the_for_ends(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    seen: list[int] = []
    async with engine.iterate(range(5)) as iterations:
        async for event in iterations:
            seen.append(event.iteration)
            if event.iteration == 2:
                engine.interrupt()
    assert seen == [1, 2]
    assert why(engine) is StopReason.INTERRUPTED
    async with engine.iterate() as iterations:
        async for event in iterations:
            seen.append(event.iteration)
            if event.iteration == 4:
                engine.terminate()
    assert seen == [1, 2, 3, 4]
    assert why(engine) is StopReason.TERMINATED


async def test_what_run_refuses_it_refuses() -> None:
    engine = Engine(step)
    with pytest.raises(ValueError, match="max_epochs= and max_iters= exclude each other"):
        async with engine.iterate(range(5), max_epochs=1, max_iters=2) as iterations:
            async for _ in iterations:
                raise AssertionError("nothing runs")
    async with engine.iterate(range(5)) as iterations:
        await anext(iterations)
        with pytest.raises(EngineBusy):
            async with engine.iterate(range(5)) as others:
                await anext(others)


async def test_it_leaves_no_handler_behind() -> None:
    engine = Engine(step)
    async with engine.iterate(range(3)) as iterations:
        async for _ in iterations:
            pass
    assert not engine.statistics().handlers


async def test_prefetch_and_async_data_work_in_it() -> None:
    async def batches() -> Any:
        for batch in range(5):
            await checkpoint()
            yield batch

    engine = Engine(step)
    async with engine.iterate(batches, prefetch=2, max_epochs=2) as iterations:
        seen = [event.output async for event in iterations]
    assert seen == [0, 10, 20, 30, 40] * 2


async def test_an_event_of_it_is_a_fact() -> None:
    engine = Engine(step)
    async with engine.iterate(range(3)) as iterations:
        events = [event async for event in iterations]
    assert [event.iteration for event in events] == [1, 2, 3]
    assert {event.name for event in events} == {"ITERATION_COMPLETED"}
    assert events[0].monotonic < events[1].monotonic < events[2].monotonic


async def end_of(engine: Engine[int, int], turns: int, *, is_native: bool) -> str:
    """Iterate, and be cancelled so many turns after the step has failed. Return what came of it."""
    failed = anyio.Event()
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda _, __: failed.set())

    async def iterate() -> None:
        async with engine.iterate([1, 2, 3]) as iterations:
            async for _ in iterations:
                pass

    async def cancel(cancel: Callable[[], object]) -> None:
        await failed.wait()
        for _ in range(turns):
            await checkpoint()
        cancel()

    async with anyio.create_task_group() as group:
        if is_native:
            task = asyncio.ensure_future(iterate())
            group.start_soon(cancel, task.cancel)
            await asyncio.wait([task])
            return repr(task.exception())
        with anyio.CancelScope() as scope:
            group.start_soon(cancel, scope.cancel)
            try:
                await iterate()
            except Boom as error:
                return repr(error)
    return "nothing"


@pytest.mark.parametrize("is_native", [False, True], ids=["scope", "native"])
@pytest.mark.parametrize("turns", range(12))
async def test_an_error_is_raised_though_the_caller_is_cancelled_while_it_comes(
    anyio_backend_name: str, turns: int, *, is_native: bool
) -> None:
    if is_native and anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own cancellation")

    async def fail(engine: Engine[int, int], batch: int) -> int:
        if batch == 2:
            raise Boom
        return batch

    engine = Engine(fail)
    assert await end_of(engine, turns, is_native=is_native) == repr(Boom())
    assert why(engine) is StopReason.FAILED


async def test_iterations_are_read_inside_their_block() -> None:
    iterations: Any = Engine(lambda engine, batch: batch).iterate([1])
    with pytest.raises(RuntimeError, match=r"async with engine\.iterate\(\.\.\.\) as iterations: async for"):
        async for _ in iterations:
            pass


async def test_an_error_that_it_raises_keeps_no_engine() -> None:
    def fail(engine: Engine[int, int], batch: int) -> int:
        raise Boom

    async def run_and_forget() -> "weakref.ref[Engine[int, int]]":
        engine = Engine(fail)
        try:
            async with engine.iterate([1]) as iterations:
                async for _ in iterations:
                    pass
        except Boom:
            pass
        return weakref.ref(engine)

    gc.disable()
    try:
        assert await is_freed(await run_and_forget())
    finally:
        gc.enable()

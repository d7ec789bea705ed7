"""stop_on_signals: the first signal ends the run cleanly, the second cancels, and nothing stays installed."""
# ruff: noqa: PT012 -- an `async for`, or a block with its `async with`, is what is under test

import os
import signal
import threading
from typing import Any, TypeAlias

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, Events, StopReason, stop_on_signals

pytestmark = pytest.mark.every_event_loop

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
both_signals = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def step(engine: Engine[int, int], batch: int) -> int:
    return batch


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def endless() -> Any:
    while True:
        yield 1


@both_threads
@both_signals
async def test_the_first_signal_ends_the_run_cleanly(thread: Thread, number: signal.Signals) -> None:
    engine = Engine(step, thread=thread)
    names: list[str] = []
    for event in (Events.TERMINATE, Events.COMPLETED, Events.CANCELLED):
        engine.add_event_handler(event, names.append, event.name)

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    async def send() -> None:
        signal.raise_signal(number)

    before = handlers()
    with stop_on_signals(engine) as stop:
        await engine.run(endless)
    assert names == ["TERMINATE", "COMPLETED"]
    assert engine.state.stop_reason is StopReason.TERMINATED
    assert engine.state.iteration == 3
    assert stop.received == [number]
    assert handlers() == before


@pytest.mark.parametrize("moment", range(5))  # it is a race with the loop, which is about to wait
async def test_a_signal_reaches_an_event_loop_that_is_idle(moment: int) -> None:
    """Sent as a container does it: by another thread's doing, while the main one waits."""

    async def hang() -> Any:
        yield 1
        waits.set()
        await anyio.sleep_forever()

    def send() -> None:
        assert waits.wait(20)
        os.kill(os.getpid(), signal.SIGTERM)

    engine, waits = Engine(step), threading.Event()
    thread = threading.Thread(target=send)
    thread.start()
    with anyio.fail_after(3), stop_on_signals(engine) as stop:
        await engine.run(hang)
    thread.join()
    assert stop.received == [signal.SIGTERM]
    assert engine.state.stop_reason is StopReason.TERMINATED


@both_threads
async def test_the_second_signal_cancels_what_is_in_the_block(thread: Thread) -> None:
    engine = Engine(step, thread=thread)
    names: list[str] = []
    for event in (Events.TERMINATE, Events.COMPLETED, Events.CANCELLED):
        engine.add_event_handler(event, names.append, event.name)

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    async def send() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        await anyio.sleep_forever()

    before = handlers()
    after = False
    with anyio.fail_after(10):
        with stop_on_signals(engine) as stop:
            await engine.run(endless)
            raise AssertionError("cancelled before this")
        after = True
    assert after
    assert names == ["CANCELLED"]
    assert engine.state.stop_reason is StopReason.CANCELLED
    assert stop.received == [signal.SIGTERM, signal.SIGINT]
    assert handlers() == before


async def test_other_signals_may_be_chosen() -> None:
    engine = Engine(step)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    async def send() -> None:
        signal.raise_signal(signal.SIGUSR1)

    before = handlers()
    with stop_on_signals(engine, signals=[signal.SIGUSR1]) as stop:
        assert handlers()[:2] == before[:2]
        await engine.run(endless)
    assert stop.received == [signal.SIGUSR1]
    assert handlers() == before


async def test_all_engines_of_the_block_end() -> None:
    engines = [Engine(step) for _ in range(3)]
    with stop_on_signals(*engines):
        async with anyio.create_task_group() as group:
            for engine in engines:
                group.start_soon(engine.run, endless)
            while not all(engine.state.iteration for engine in engines):
                await checkpoint()
            signal.raise_signal(signal.SIGTERM)
    assert {engine.state.stop_reason for engine in engines} == {StopReason.TERMINATED}


async def test_the_handlers_come_back_after_an_error() -> None:
    before = handlers()
    with pytest.raises(ZeroDivisionError), stop_on_signals(Engine(step)):
        assert handlers()[:2] != before[:2]
        raise ZeroDivisionError
    assert handlers() == before


async def test_a_signal_that_cannot_be_handled_leaves_nothing_installed() -> None:
    before = handlers()
    with (
        pytest.raises((OSError, ValueError)),
        stop_on_signals(Engine(step), signals=[signal.SIGTERM, signal.SIGKILL]),
    ):
        raise AssertionError("not entered")
    assert handlers() == before
    with anyio.CancelScope() as scope:  # nor a cancel scope of its own
        scope.cancel()
        await checkpoint()
    assert scope.cancelled_caught


async def test_a_cancellation_from_elsewhere_goes_through_the_block() -> None:
    engine = Engine(step)
    with anyio.CancelScope() as scope:
        with stop_on_signals(engine):

            @engine.on(Events.ITERATION_COMPLETED(once=2))
            async def cancel() -> None:
                scope.cancel()

            await engine.run(endless)
        raise AssertionError("cancelled before this")
    assert scope.cancelled_caught
    assert engine.state.stop_reason is StopReason.CANCELLED


async def test_a_signal_before_the_run_is_not_forgotten() -> None:
    """A container that is stopped while the data is being loaded."""
    engine = Engine(step)
    with stop_on_signals(engine) as stop:
        signal.raise_signal(signal.SIGTERM)
        await engine.run(endless)
        raise AssertionError("cancelled before this")
    assert stop.received == [signal.SIGTERM]


async def test_outside_of_the_main_thread_it_says_what_to_do() -> None:
    def enter() -> None:
        with stop_on_signals(Engine(step)):
            raise AssertionError("not entered")

    with pytest.raises(RuntimeError, match=r"main thread only.*engine\.terminate\(\)"):
        await anyio.to_thread.run_sync(enter)


# Without an event loop


@both_signals
def test_the_first_signal_ends_run_sync_cleanly(number: signal.Signals) -> None:
    engine = Engine(step)

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    def send() -> None:
        signal.raise_signal(number)

    before = handlers()
    with stop_on_signals(engine) as stop:
        engine.run_sync(endless)
    assert engine.state.iteration == 3
    assert engine.state.stop_reason is StopReason.TERMINATED
    assert stop.received == [number]
    assert handlers() == before


def test_the_second_signal_is_ctrl_c_for_run_sync() -> None:
    engine = Engine(step)
    names: list[str] = []
    engine.add_event_handler(Events.CANCELLED, names.append, "cancelled")

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    def send() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    before = handlers()
    with pytest.raises(KeyboardInterrupt), stop_on_signals(engine):
        engine.run_sync(endless)
    assert names == ["cancelled"]
    assert handlers() == before


def test_a_signal_ends_a_run_sync_that_has_opened_an_event_loop() -> None:
    async def async_step(engine: Engine[int, None], batch: int) -> None:
        await checkpoint()
        if engine.state.iteration == 3:
            signal.raise_signal(signal.SIGINT)

    engine = Engine(async_step)
    with stop_on_signals(engine) as stop:
        engine.run_sync(endless)
    assert engine.state.iteration == 3
    assert engine.state.stop_reason is StopReason.TERMINATED
    assert stop.received == [signal.SIGINT]


def test_what_is_no_engine_is_refused() -> None:
    engine = Engine(step)
    with pytest.raises(TypeError, match=r"one after another: stop_on_signals\(trainer, evaluator\); got \[<Engine"):
        stop_on_signals([engine, engine])  # type: ignore[arg-type]  # that is what is tested


@pytest.mark.parametrize("signals", ["SIGINT", ["SIGINT"], signal.SIGINT, None])
def test_what_are_no_signals_is_refused(signals: Any) -> None:
    with pytest.raises(TypeError, match=r"signals= are several .*\[signal\.SIGTERM\]; got "):
        stop_on_signals(Engine(step), signals=signals)

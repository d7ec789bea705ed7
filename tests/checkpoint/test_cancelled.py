"""A run that is cancelled while it saves: the save is finished within the grace, or given up without a trace."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import anyio
import pytest
from support.backends import Backend
from support.saving_run import Run, Valve, endless, saving, strays, until

from aengine import Event, Events, StopReason
from aengine.errors import CheckpointNotWritten

pytestmark = pytest.mark.every_event_loop


async def test_a_save_under_way_is_finished_when_the_run_is_cancelled(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=2))
        run.valve.is_open.clear()
        run.engine.add_event_handler(Events.CANCELLED, run.valve.is_open.set)
        with anyio.CancelScope() as scope:
            run.engine.add_event_handler(Events.ITERATION_STARTED(once=3), scope.cancel)
            await run.engine.run(endless)
        assert scope.cancelled_caught
        assert run.saved == [2], "before run() has returned"
        assert run.engine.state.stop_reason is StopReason.CANCELLED


async def test_the_loop_that_waits_for_a_save_can_be_cancelled(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED)
        run.valve.is_open.clear()
        run.engine.add_event_handler(Events.CANCELLED, run.valve.is_open.set)
        async with anyio.create_task_group() as group:
            group.start_soon(run.engine.run, endless)
            await until(lambda: run.steps == 2)
            group.cancel_scope.cancel()
        assert run.saved == [1]


class Endless(Valve):
    """Writes on until it is stopped, without a byte."""

    def write(self, tree: Any, file: BinaryIO) -> None:
        self.begun.set()
        while True:
            file.write(b"")


async def test_a_save_that_outlives_the_grace_is_given_up_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, grace=0.05, valve=Endless())
    run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=2))
    with anyio.CancelScope() as scope:
        run.engine.add_event_handler(Events.ITERATION_STARTED(once=3), scope.cancel)
        await run.engine.run(endless)
    assert scope.cancelled_caught
    assert "0.05 seconds of grace" in caplog.text, "and it is not raised again"
    with anyio.fail_after(60):
        await until(lambda: strays(tmp_path) == [])
        await run.checkpoint.aclose()
    assert run.saved == []


async def test_waiting_for_a_save_that_is_given_up_raises(tmp_path: Path) -> None:
    """One request for it, and one for another after it."""
    run, errors = Run(tmp_path, grace=0.05, valve=Endless()), []
    run.checkpoint.attach(run.engine, Events.EXCEPTION_RAISED)

    async def ask() -> None:
        with pytest.raises(CheckpointNotWritten) as caught:
            await run.checkpoint.save()
        errors.append(str(caught.value))

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:

                async def ask_and_cancel() -> None:
                    group.start_soon(ask)
                    await until(run.valve.begun.is_set)
                    group.start_soon(ask)
                    await until(lambda: bool(run.checkpoint._saver._requests))
                    scope.cancel()

                group.start_soon(ask_and_cancel)
                await run.engine.run(endless)
    assert ["given up" in error for error in sorted(errors)] == [True, False]
    await run.checkpoint.aclose()
    assert strays(tmp_path) == []


async def test_in_a_scope_that_is_cancelled_nothing_is_written(tmp_path: Path) -> None:
    async with saving(tmp_path / "run") as run:
        run.checkpoint.attach(run.engine, Events.STARTED | Events.CANCELLED)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await run.engine.run(endless)
        assert not (tmp_path / "run").exists()


async def test_waiting_for_a_save_can_be_cancelled_and_it_goes_on(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.EXCEPTION_RAISED)
        run.valve.is_open.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(run.checkpoint.save)
            await until(run.valve.begun.is_set)
            group.cancel_scope.cancel()
        assert run.saved == []
        run.valve.is_open.set()
        await run.checkpoint.flush()
        assert run.saved == [0]


async def test_drain_can_be_cancelled_and_the_save_goes_on(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        run.valve.is_open.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(run.engine.run, [1])
            await until(run.valve.begun.is_set)
            with anyio.move_on_after(0) as waiting:
                await run.checkpoint.flush()
            assert waiting.cancelled_caught
            run.valve.is_open.set()
            await run.checkpoint.flush()
            assert run.saved == [1]


@pytest.mark.parametrize("times", [1, 2])
async def test_a_native_cancellation_waits_for_the_save(times: int, anyio_backend: Backend, tmp_path: Path) -> None:
    if anyio_backend[0] != "asyncio":
        pytest.skip("trio has no such thing")
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=2))
        run.valve.is_open.clear()
        task = asyncio.create_task(run.engine.run(endless))
        await until(run.valve.begun.is_set)
        for _ in range(times):
            task.cancel()
            await anyio.lowlevel.checkpoint()
        run.valve.is_open.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert run.saved == [2]


@pytest.mark.parametrize("when", ["staged", "committed"])
async def test_cancelled_at_an_event_of_a_save_the_run_keeps_it(when: str, tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=2))
        with anyio.CancelScope() as scope:
            cancel: Callable[[], None] = scope.cancel

            @run.engine.subscribe(f"checkpoint_{when}".upper())
            async def stop(event: Event) -> None:
                cancel()

            await run.engine.run(endless)
        assert run.saved == [2]

"""When saves are taken: at events, on time, asked for; and what happens when one is due while another is written."""

import signal
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from support.record import Boom
from support.saving_run import Run, endless, saving, until

from aengine import Event, Events, StopReason, stop_on_signals
from aengine.checkpoint import CheckpointEvents
from aengine.errors import CheckpointError, CheckpointLocked, CheckpointNotWritten, CheckpointWarning

# One due while another is being written


async def test_with_wait_the_loop_waits_for_the_save_before(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED)
        run.valve.is_open.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(run.engine.run, [1, 2, 3])
            await until(lambda: run.engine.state.iteration == 2)
            for _ in range(100):
                await anyio.lowlevel.checkpoint()
            assert run.steps == 2
            run.valve.is_open.set()
        assert run.checkpoint.statistics().skipped == 0
        assert run.saved == [1, 2, 3]


async def test_with_skip_the_loop_goes_on_and_the_last_is_never_skipped(tmp_path: Path) -> None:
    async with saving(tmp_path, when_busy="skip") as run:
        run.engine.add_event_handler(Events.COMPLETED, run.valve.is_open.set)
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED | Events.COMPLETED)
        run.valve.is_open.clear()
        await run.engine.run([1, 2, 3, 4])
        assert run.checkpoint.statistics().skipped == 3
        assert run.saved == [1, 4]


# Asked for


async def test_a_save_that_is_asked_for_is_of_a_completed_step_and_committed(tmp_path: Path) -> None:
    async with saving(tmp_path, thread=True) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        async with anyio.create_task_group() as group:
            group.start_soon(run.engine.run, endless)
            await until(lambda: run.engine.state.iteration > 2)
            info = await run.checkpoint.save()
            assert info == run.checkpoint.last_saved
            run.engine.terminate()
        assert run.saved[0] == info.step
        fresh = Run(tmp_path)
        await fresh.restore(info.step)
        assert fresh.steps == info.step == fresh.engine.state.iteration


async def test_without_a_run_it_is_saved_at_once(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        assert (await run.checkpoint.save()).step == 0
        await run.engine.run([1, 2])
        again = await run.checkpoint.save()
        assert (again.step, again.revision) == (2, 2)
        assert run.saved == [0, 2]


async def test_during_a_pause_it_is_saved_where_the_loop_stands(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        run.engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), run.engine.pause)
        async with anyio.create_task_group() as group:
            group.start_soon(run.engine.run, [1, 2, 3])
            await until(lambda: run.engine.state.iteration == 2)
            assert (await run.checkpoint.save()).step == 2
            run.engine.resume()
        assert run.saved == [2, 3]


@pytest.mark.parametrize("thread", [True, False])
async def test_from_within_the_run_the_advice_is_to_save_soon(thread: bool, tmp_path: Path) -> None:  # noqa: FBT001 -- a parameter of the test
    async with saving(tmp_path, thread=thread) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)

        @run.engine.on(Events.ITERATION_COMPLETED(once=2))
        async def ask() -> None:
            with pytest.raises(RuntimeError, match=r"checkpoint\.save_soon\(\)"):
                await run.checkpoint.save()
            run.checkpoint.save_soon()

        await run.engine.run([1, 2, 3, 4])
        assert run.saved == [2, 4]


async def test_save_soon_in_a_step_saves_what_that_step_leads_to(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        run.engine.add_event_handler(Events.ITERATION_STARTED(once=2), run.checkpoint.save_soon)
        await run.engine.run([1, 2, 3])
        assert run.saved == [2, 3]


async def test_a_request_where_there_is_nothing_to_save_is_refused_with_advice(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        with pytest.raises(RuntimeError, match=r"call  checkpoint\.attach\(engine, event\)  first"):
            await run.checkpoint.save()
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        with pytest.raises(RuntimeError, match=r"await checkpoint\.save\(\)"):
            run.checkpoint.save_soon()


async def test_a_save_asked_for_by_two_is_one(tmp_path: Path) -> None:
    infos = []
    async with saving(tmp_path) as run, anyio.create_task_group() as askers:
        run.checkpoint.attach(run.engine, Events.EXCEPTION_RAISED)

        async def ask() -> None:
            infos.append(await run.checkpoint.save())

        @run.engine.on(Events.ITERATION_STARTED(once=1))
        async def have_two_ask() -> None:
            askers.start_soon(ask)
            askers.start_soon(ask)
            await until(lambda: len(run.checkpoint._saver._requests) == 2)

        await run.engine.run([1, 2])
    assert infos == [run.checkpoint.last_saved] * 2
    assert [(info.step, info.revision) for info in infos] == [(1, 1), (1, 1)]


# Asked for, and the run ends


async def test_a_request_during_a_step_that_fails_gets_an_error_and_no_half_of_a_step(tmp_path: Path) -> None:
    """The model was changed before the step failed: no run must go on from that."""
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=1))

        async def ask() -> None:
            with pytest.raises(CheckpointNotWritten, match="in a step that did not complete"):
                await run.checkpoint.save()

        async with anyio.create_task_group() as group:

            @run.engine.on(Events.ITERATION_STARTED(once=3))
            async def fail() -> None:
                group.start_soon(ask)
                await until(lambda: bool(run.checkpoint._saver._requests))
                run._step(run.engine, None)
                raise Boom

            with pytest.raises(Boom):
                await run.engine.run(endless)
        assert run.saved == [1]


@pytest.mark.parametrize("stop", ["cancel", "fail"])
async def test_a_request_that_the_loop_waits_to_serve_is_served_when_the_run_is_stopped(
    stop: str, tmp_path: Path
) -> None:
    """The loop was waiting for the save before when it was told to end."""
    answers: list[int] = []
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=1))
        run.engine.add_event_handler(Events.CANCELLED | Events.EXCEPTION_RAISED, lambda *_: run.valve.is_open.set())
        run.valve.is_open.clear()
        boom = Boom()

        @run.engine.subscribe(Events.ITERATION_STARTED(once=2))
        async def fail_beside(event: Event) -> None:
            if stop == "fail":
                await until(lambda: waits)
                raise boom

        async def ask() -> None:
            answers.append((await run.checkpoint.save()).step)

        waits = False
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                with anyio.CancelScope() as scope:

                    async def end_it() -> None:
                        nonlocal waits
                        await until(lambda: run.engine.state.iteration >= 2)
                        group.start_soon(ask)
                        await until(lambda: bool(run.checkpoint._saver._requests) and not run.engine._requests.to_fire)
                        for _ in range(20):
                            await anyio.lowlevel.checkpoint()
                        waits = True
                        if stop == "cancel":
                            scope.cancel()

                    group.start_soon(end_it)
                    with pytest.raises(Boom) if stop == "fail" else anyio.CancelScope():
                        await run.engine.run(endless)
        assert len(answers) == 1
        assert run.saved == [1, *answers]


async def test_a_request_is_refused_with_the_error_of_the_save_before_that_failed_the_run(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=1))
        run.valve.is_open.clear()
        run.valve.error = OSError(28, "full")

        async def begin() -> None:
            with pytest.raises(CheckpointNotWritten, match="full"):
                await run.engine.run(endless)

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(begin)
                await until(run.valve.begun.is_set)

                async def open_later() -> None:
                    await until(lambda: bool(run.checkpoint._saver._requests))
                    run.valve.is_open.set()

                group.start_soon(open_later)
                with pytest.raises(CheckpointError):
                    await run.checkpoint.save()


# Events


@pytest.mark.parametrize("event", ["TERMINATE", "INTERRUPT", "EXCEPTION_RAISED", "CANCELLED"])
async def test_a_run_that_is_stopped_is_saved_where_it_stopped(event: str, tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events[event])
        engine = run.engine
        with anyio.CancelScope() as scope:
            boom = Boom()

            def fail() -> None:
                raise boom

            stops: dict[str, Any] = {
                "TERMINATE": engine.terminate,
                "INTERRUPT": engine.interrupt,
                "EXCEPTION_RAISED": fail,
                "CANCELLED": scope.cancel,
            }
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), stops[event])
            with pytest.raises(Boom) if event == "EXCEPTION_RAISED" else anyio.CancelScope():
                await engine.run(endless)
        assert run.saved == [3]
        await run.checkpoint.aclose()

        fresh = Run(tmp_path)
        is_in_a_step = event == "CANCELLED"  # and what it has changed so far is not known
        with pytest.warns(CheckpointWarning, match="middle of a step") if is_in_a_step else nullcontext():
            assert (await fresh.restore()) is not None
        fresh.engine.add_event_handler(Events.ITERATION_COMPLETED, fresh.engine.terminate)
        await fresh.engine.run(endless)
        assert fresh.steps == fresh.engine.state.iteration == 4
        await fresh.checkpoint.aclose()


async def test_what_is_saved_already_is_not_saved_again_when_the_run_fails(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED | Events.EXCEPTION_RAISED)

        @run.engine.on(Events.ITERATION_STARTED(once=3))
        def fail() -> None:
            raise Boom

        with pytest.raises(Boom):
            await run.engine.run(endless)
        assert [(info.step, info.revision) for info in run.checkpoint.list()] == [(1, 1), (2, 1)]


async def test_a_signal_ends_the_run_with_a_last_checkpoint(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.TERMINATE)
        run.engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), partial(signal.raise_signal, signal.SIGTERM))
        with stop_on_signals(run.engine) as stop:
            await run.engine.run(endless)
        assert stop.received == [signal.SIGTERM]
        assert run.engine.state.stop_reason is StopReason.TERMINATED
        assert run.saved == [3]


@pytest.mark.parametrize(("every", "expected"), [(timedelta(microseconds=1), 4), (timedelta(hours=1), 0)])
async def test_saves_come_on_time(every: timedelta, expected: int, tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(every=every))
        committed: list[int] = []

        @run.engine.subscribe(CheckpointEvents.CHECKPOINT_COMMITTED)
        async def note(event: Event) -> None:
            committed.append(event.iteration)

        await run.engine.run([1, 2, 3, 4])
        assert len(committed) == expected


async def test_subscribers_get_that_it_is_staged_and_then_that_it_is_committed(tmp_path: Path) -> None:
    heard: list[tuple[str, bool]] = []
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=2))
        run.valve.is_open.clear()

        @run.engine.subscribe(CheckpointEvents.CHECKPOINT_STAGED | CheckpointEvents.CHECKPOINT_COMMITTED)
        async def note(event: Event) -> None:
            heard.append((event.name, run.checkpoint.last_saved is not None))
            run.valve.is_open.set()

        await run.engine.run([1, 2])
        assert heard == [("CHECKPOINT_STAGED", False), ("CHECKPOINT_COMMITTED", True)]


# One directory, two writers


async def test_a_second_run_on_the_directory_fails_at_its_start(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        await run.engine.run([1])
        second = Run(tmp_path)
        second.checkpoint.attach(second.engine, Events.COMPLETED)
        with pytest.raises(CheckpointLocked, match="another Checkpoint of this very process"):
            await second.engine.run([1, 2])
        assert second.steps == 0
        await run.checkpoint.aclose()
        await second.engine.run([1, 2])
        assert second.saved == [1, 2]
        await second.checkpoint.aclose()

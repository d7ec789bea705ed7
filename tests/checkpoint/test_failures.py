"""Saves that fail: the run hears of it before its next step, or at its end; no error hides another."""

import errno
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.backends import Backend
from support.record import Boom
from support.saving_run import Run, endless, saving, strays, until

from aengine import Events, StopReason
from aengine.checkpoint import CheckpointEvents
from aengine.errors import CheckpointNotWritten, NotSerializable

FULL = "No space left on device"


def full() -> OSError:
    return OSError(errno.ENOSPC, FULL)


def fill_the_disk(run: Run) -> None:
    run.valve.error = full()


def remove_the_directory(run: Run) -> None:
    shutil.rmtree(run.directory)


def replace_the_directory(run: Run) -> None:
    run.directory.rename(run.directory.with_name("moved"))
    run.directory.mkdir()


def make_it_read_only(run: Run) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    run.directory.chmod(0o500)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (fill_the_disk, FULL),
        (remove_the_directory, "No such file or directory"),
        (replace_the_directory, r"No such file or directory|replaced"),
        (make_it_read_only, "Permission denied"),
    ],
)
async def test_a_save_that_fails_beside_the_steps_fails_the_run(
    fault: Callable[[Run], None], said: str, tmp_path: Path
) -> None:
    """The data is endless: it is the failure that ends the run."""
    told: list[BaseException] = []
    async with saving(tmp_path / "run") as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(every=2))
        run.before_step(4, lambda: fault(run))
        run.engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: told.append(error))
        with anyio.fail_after(60), pytest.raises(CheckpointNotWritten, match=said) as caught:
            await run.engine.run(endless)
        assert told == [caught.value]
        assert "step 4" in str(caught.value)
        assert run.engine.state.stop_reason is StopReason.FAILED
        (tmp_path / "run").exists() and (tmp_path / "run").chmod(0o700)
        assert run.saved == ([2] if fault in (fill_the_disk, make_it_read_only) else [])


async def test_no_other_save_begins_after_one_has_failed(tmp_path: Path) -> None:
    """What is due after it, at the end as well, is of a run that has failed to save already."""
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED | Events.EXCEPTION_RAISED)
        run.before_step(3, lambda: fill_the_disk(run))
        with anyio.fail_after(60), pytest.raises(CheckpointNotWritten, match="step 3"):
            await run.engine.run(endless)
        assert run.saved == [1, 2]


@pytest.mark.parametrize("last", [Events.COMPLETED, Events.EPOCH_COMPLETED, Events.ITERATION_COMPLETED(once=3)])
async def test_the_last_save_of_a_run_fails_it_as_well(last: Any, tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, last)
        fill_the_disk(run)
        with pytest.raises(CheckpointNotWritten, match=FULL):
            await run.engine.run([1, 2, 3])
        assert run.engine.state.iteration == 3
        assert run.saved == []


async def test_a_run_that_failed_to_save_can_be_gone_on_with(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(every=2))
        fill_the_disk(run)
        data = list(range(60))
        with pytest.raises(CheckpointNotWritten):
            await run.engine.run(data)
        await run.engine.run(data)
        assert run.steps == run.engine.state.iteration == 60
        assert run.saved[-1] == 60


@pytest.mark.parametrize("thread", [True, False])
async def test_the_error_of_the_step_and_that_of_the_save_both_come_out(thread: bool, tmp_path: Path) -> None:  # noqa: FBT001 -- a parameter of the test
    async with saving(tmp_path, thread=thread) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=2))
        fill_the_disk(run)
        run.valve.is_open.clear()
        run.engine.add_event_handler(Events.EXCEPTION_RAISED, run.valve.is_open.set)
        boom = Boom()

        @run.engine.on(Events.ITERATION_STARTED(once=3))
        def fail() -> None:
            raise boom

        with anyio.fail_after(60), pytest.raises(ExceptionGroup) as caught:
            await run.engine.run(endless)
        assert len(caught.value.exceptions) == 2
        assert boom in caught.value.exceptions
        assert any(isinstance(error, CheckpointNotWritten) for error in caught.value.exceptions)


async def test_ctrl_c_wins_over_a_save_that_fails_which_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=2))
        fill_the_disk(run)
        run.valve.is_open.clear()
        run.engine.add_event_handler(Events.CANCELLED, run.valve.is_open.set)

        @run.engine.on(Events.ITERATION_STARTED(once=3))
        def press_ctrl_c() -> None:
            raise KeyboardInterrupt

        with anyio.fail_after(60), pytest.raises(KeyboardInterrupt):
            await run.engine.run(endless)
        logged = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert [record.exc_info and record.exc_info[0] for record in logged] == [CheckpointNotWritten]


async def test_with_log_the_run_goes_on_and_the_failures_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with saving(tmp_path, on_error="log") as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(every=2))
        for step in (2, 6):
            run.before_step(step, lambda: fill_the_disk(run))
        await run.engine.run(range(8))
        logged = [record for record in caplog.records if record.exc_info and FULL in str(record.exc_info[1])]
        assert len(logged) == run.checkpoint.statistics().failures == run.checkpoint.statistics().saved == 2
        assert run.engine.state.stop_reason is StopReason.COMPLETED
        assert run.saved == [4, 8]


class Grown:
    """Something whose state cannot be saved from some moment on."""

    def __init__(self) -> None:
        self.value: Any = 1

    def state_dict(self) -> dict[str, Any]:
        return {"inner": [self.value]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def grow(self) -> None:
        self.value = object()

    def __call__(self) -> None:
        """Being a handler, it is saved with the engine."""


async def test_what_could_not_be_loaded_back_fails_the_run_at_the_save(tmp_path: Path) -> None:
    """It is named by its place, and nothing has been written of it."""
    async with saving(tmp_path) as run:
        grown = Grown()
        run.engine.add_event_handler(Events.STARTED, grown)
        run.engine.add_event_handler(Events.ITERATION_STARTED(once=3), grown.grow)
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED)
        with pytest.raises(NotSerializable, match=r"handlers.*Grown.*inner.*object"):
            await run.engine.run(endless)
        assert run.engine.state.iteration == 3
        assert run.saved == [1, 2]


async def test_with_log_what_cannot_be_staged_is_a_failure_as_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with saving(tmp_path, on_error="log") as run:
        grown = Grown()
        run.engine.add_event_handler(Events.STARTED, grown)
        run.engine.add_event_handler(Events.ITERATION_STARTED(once=3), grown.grow)
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED)
        await run.engine.run([1, 2, 3, 4])
        assert "Grown" in caplog.text
        assert run.checkpoint.statistics().failures == 2
        assert run.saved == [1, 2]


async def test_the_waits_for_a_save_that_fails_do_not_hang(tmp_path: Path) -> None:
    """The loop waits for the one before; a request for another waits as well; then both get the failure."""
    heard: list[str] = []
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED)

        async def ask() -> None:
            with pytest.raises(CheckpointNotWritten, match=FULL):
                await run.checkpoint.save()
            heard.append("the other task")

        async def begin() -> None:
            with pytest.raises(CheckpointNotWritten, match=FULL):
                await run.engine.run(endless)
            heard.append("the run")

        run.valve.is_open.clear()
        fill_the_disk(run)
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:

                @run.engine.on(Events.STARTED)
                def have_one_ask() -> None:
                    group.start_soon(ask)

                group.start_soon(begin)
                await until(run.valve.begun.is_set)
                run.valve.is_open.set()
        assert sorted(heard) == ["the other task", "the run"]


async def test_a_failure_that_no_run_has_raised_is_raised_by_drain_and_close(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.checkpoint.attach(run.engine, Events.COMPLETED)
    fill_the_disk(run)
    run.valve.is_open.clear()

    async def ask_and_leave() -> None:
        with anyio.CancelScope() as scope:

            @run.engine.on(CheckpointEvents.CHECKPOINT_STAGED)
            def leave() -> None:
                scope.cancel()

            await run.checkpoint.save()

    await ask_and_leave()
    run.valve.is_open.set()
    with pytest.raises(CheckpointNotWritten, match=FULL):
        await run.checkpoint.flush()
    await run.checkpoint.aclose()
    assert strays(tmp_path) == []


def test_a_file_size_limit_is_an_error_that_says_what_to_do(anyio_backend: Backend, tmp_path: Path) -> None:
    """A disk that is really full, as the system sees it: half of the file is there when it is."""
    if anyio_backend[1]:
        pytest.skip("the disk knows no event loop")
    program = f"""
        import resource, sys, anyio, torch
        from aengine import Engine, Events
        from aengine.checkpoint import Checkpoint
        model = torch.nn.Linear(300, 300)
        engine = Engine(lambda engine, batch: batch)
        checkpoint = Checkpoint(sys.argv[1], {{"model": model}})
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        anyio.run(engine.run, [1, 2, 3], backend="{anyio_backend[0]}")
    """
    # Nor does the limit leave room for what a measurement of coverage would write.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    last = done.stderr.strip().splitlines()[-2:]
    assert "CheckpointNotWritten: the checkpoint of step 1 was not written: File too large" in " ".join(last)
    assert "Raise the limit of the size of a file (ulimit -f). Kept are none." in " ".join(last)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]

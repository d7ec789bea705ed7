"""What a Checkpoint leaves behind, whatever it went through: no memory, no lock, no process, no thread."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, BinaryIO

import anyio
import pytest
import torch
from support.record import AnyEngine, double
from support.saving_run import Run, saving, until
from support.ways_to_end import is_freed

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint, TorchFile
from aengine.errors import CheckpointNotWritten


class FullDisk(TorchFile):
    """A disk that is full, and keeps no error."""

    def write(self, tree: Any, file: BinaryIO) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", ["well", "on a full disk", "asked for on a full disk"])
async def test_engine_and_model_are_freed_by_reference_count_once_it_is_closed(how: str, tmp_path: Path) -> None:
    """No error that it met may hold them: its traceback holds the frames of the save."""

    async def train() -> list["weakref.ref[Any]"]:
        model, engine = torch.nn.Linear(2, 2), Engine(double)
        disk = TorchFile() if how == "well" else FullDisk()
        async with Checkpoint(tmp_path, {"model": model}, serializer=disk) as checkpoint:
            checkpoint.attach(engine, Events.ITERATION_COMPLETED)
            try:
                if how.startswith("asked"):
                    await checkpoint.save()
                else:
                    await engine.run([1, 2])
            except CheckpointNotWritten as error:
                said = str(error)
                assert "No space" in said
            else:
                assert how == "well"
        return [weakref.ref(engine), weakref.ref(model), weakref.ref(checkpoint)]

    gc.disable()
    try:
        refs = await train()
        assert [await is_freed(ref) for ref in refs] == [True, True, True]
    finally:
        gc.enable()


async def test_closed_and_attached_again_it_saves_as_before(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        for steps in (1, 2):
            run.checkpoint.attach(run.engine, Events.COMPLETED)
            await run.engine.run(range(steps))
            assert (await run.checkpoint.save()).step == steps
            await run.checkpoint.aclose()
        other: AnyEngine = Engine(double)
        run.checkpoint.attach(other, Events.COMPLETED)
        await other.run([1, 2, 3])
        assert run.saved == [1, 2, 3]
        assert not run.engine.statistics().listeners


async def test_close_that_is_cancelled_lets_go_of_the_directory(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.EXCEPTION_RAISED)
        run.valve.is_open.clear()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(run.checkpoint.save)
                await until(run.valve.begun.is_set)
                scope.cancel()
        under_way = run.checkpoint._saver.under_way
        assert under_way is not None
        async with anyio.create_task_group() as others:

            async def open_when_given_up() -> None:
                await until(lambda: under_way._is_stopped)
                run.valve.is_open.set()

            others.start_soon(open_when_given_up)
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(run.checkpoint.aclose)
                    await until(lambda: run.checkpoint._attachment.engine is None)
                    scope.cancel()
        other = Run(tmp_path)
        async with other.checkpoint:
            other.checkpoint.attach(other.engine, Events.COMPLETED)
            await other.engine.run([1])
        assert run.saved == [1]  # what was under way was given up


async def test_requests_of_a_long_run_are_not_kept(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.EXCEPTION_RAISED)
        run.engine.pause()
        async with anyio.create_task_group() as group:
            group.start_soon(run.engine.run, [1])
            for _ in range(5):
                await until(lambda: run.engine.is_running)
                await run.checkpoint.save()
            assert not run.checkpoint._saver._requests
            assert not run.engine._requests.to_fire
            run.engine.resume()


def test_checkpoint_that_is_dropped_lets_its_process_end(tmp_path: Path) -> None:
    """Without a close(), and without a word: it ends with what held it."""
    script = f"""
import gc, warnings, torch, anyio
warnings.simplefilter("error")
from aengine import Engine, Events
from aengine.checkpoint import Checkpoint

def train():
    engine = Engine(lambda engine, batch: batch)
    checkpoint = Checkpoint({str(tmp_path)!r}, {{"model": torch.nn.Linear(2, 2)}}, write_in="process")
    checkpoint.attach(engine, Events.COMPLETED)
    engine.run_sync([1])
    return checkpoint._writer._contents._process._child._process.pid

pid = train()
import os, time
try:
    for _ in range(1000):  # the thread that wrote lets go of what it held a little later than it says that it is done
        gc.collect()
        os.kill(pid, 0)
        time.sleep(0.01)
except ProcessLookupError:
    print("gone")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.stdout, ended.stderr) == ("gone\n", "")
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_last_save_of_a_program_that_ends_normally_is_committed(tmp_path: Path) -> None:
    script = f"""
import time, torch
from aengine import Engine, Events
from aengine.checkpoint import Checkpoint, TorchFile

class Slow(TorchFile):
    def write(self, tree, file):
        time.sleep(0.5)  # noqa
        super().write(tree, file)

engine = Engine(lambda engine, batch: batch)
checkpoint = Checkpoint({str(tmp_path)!r}, {{"model": torch.nn.Linear(2, 2)}}, serializer=Slow())
checkpoint.attach(engine, Events.COMPLETED)
engine.run_sync([1])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-0000000001"]

"""`restore()` and `load()` that are cancelled while they read have changed nothing."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

import anyio
import pytest
import torch
from support.backends import Backend
from support.kill_campaign import flip
from support.saving_run import Run, Valve, saving, until

from aengine import CheckpointWarning, Engine, Events
from aengine.checkpoint import Checkpoint, Keep
from aengine.checkpoint.store import files
from aengine.errors import CheckpointMismatch

pytestmark = pytest.mark.every_event_loop


class SlowToRead(Valve):
    """Reads torch's format once it is open, as a file system across a network may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_read = threading.Event()
        self.reads = threading.Event()

    def read(self, file: BinaryIO) -> Any:
        self.reads.set()
        assert self.may_read.wait(60)
        return super().read(file)


async def save_some(directory: Path) -> None:
    async with saving(directory, keep=Keep(last=3, best=1, metric="loss")) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED)
        run.engine.state.metrics["loss"] = 1.0
        await run.engine.run([1, 2, 3])


@asynccontextmanager
async def reading(directory: Path) -> AsyncIterator[tuple[Run, SlowToRead]]:
    valve = SlowToRead()
    async with saving(directory, keep=Keep(last=3, best=1, metric="loss"), valve=valve) as run:
        try:
            yield run, valve
        finally:
            valve.may_read.set()
            await until(lambda: not [one for one in threading.enumerate() if one.name == "aengine checkpoint: read"])


def content(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.covering(2)
@pytest.mark.parametrize("how", ["scope", "native"])
@pytest.mark.parametrize("call", ["restore", "restore best", "restore 2", "load"])
async def test_cancelled_while_it_reads_it_has_changed_nothing(
    call: str, how: str, anyio_backend: Backend, tmp_path: Path
) -> None:
    if how == "native" and anyio_backend[0] != "asyncio":
        pytest.skip("trio has no such thing")
    await save_some(tmp_path)
    flip(tmp_path / "step-0000000003")  # which would be set aside
    before = content(tmp_path)
    async with reading(tmp_path) as (run, valve):
        rng = torch.get_rng_state()

        async def read() -> None:
            if call == "load":
                await run.checkpoint.load()
            else:
                which: Any = {"restore": "latest", "restore best": "best", "restore 2": 2}[call]
                await run.restore(which)

        with anyio.fail_after(30):
            if how == "native":
                task = asyncio.create_task(read())
                await until(valve.reads.is_set)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                async with anyio.create_task_group() as group:
                    group.start_soon(read)
                    await until(valve.reads.is_set)
                    group.cancel_scope.cancel()
        assert not valve.may_read.is_set(), "it did not wait for the file"
        assert (run.steps, run.engine.state.iteration, run.engine.state_dict()["iteration"]) == (0, 0, 0)
        assert not run.checkpoint.statistics().damaged
        assert content(tmp_path) == before
        assert torch.equal(rng, torch.get_rng_state())
        valve.may_read.set()
        await until(lambda: not [one for one in threading.enumerate() if one.name == "aengine checkpoint: read"])
        assert content(tmp_path) == before, "nor does what was left behind change anything"
        assert run.steps == 0

        with pytest.warns(CheckpointWarning, match="step-0000000003"):
            info = await run.restore()
        assert info is not None
        assert (info.step, run.steps) == (2, 2)
        assert list(run.checkpoint.statistics().damaged) == [tmp_path / "damaged-step-0000000003"]


async def test_one_that_is_cancelled_leaves_the_checkpoint_free_for_another_engine(tmp_path: Path) -> None:
    await save_some(tmp_path)
    async with reading(tmp_path) as (run, valve):
        async with anyio.create_task_group() as group:
            group.start_soon(run.restore)
            await until(valve.reads.is_set)
            group.cancel_scope.cancel()
        valve.may_read.set()
        await run.checkpoint.aclose()
        assert run.engine.statistics().listeners == ()
        run.engine = Engine(lambda engine, batch: None)
        assert await run.restore() is not None


async def test_cancelled_while_it_compares_checksums_it_reads_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save_some(tmp_path)
    begun, may_go_on, measured = threading.Event(), threading.Event(), []
    actual = files.measure

    def slow(path: Path, is_stopped: files.IsStopped | None = None) -> Any:
        begun.set()
        assert may_go_on.wait(60)
        try:
            return actual(path, is_stopped)
        finally:
            measured.append(path)

    monkeypatch.setattr(files, "measure", slow)
    async with reading(tmp_path) as (run, valve):
        async with anyio.create_task_group() as group:
            group.start_soon(run.restore)
            await until(begun.is_set)
            group.cancel_scope.cancel()
        may_go_on.set()
        await until(lambda: not [one for one in threading.enumerate() if one.name == "aengine checkpoint: read"])
        assert len(measured) == 1
        assert not valve.reads.is_set()
        assert run.checkpoint.statistics().damaged == ()


async def test_what_is_damaged_is_set_aside_also_where_what_follows_is_of_another_model(tmp_path: Path) -> None:
    await save_some(tmp_path)
    flip(tmp_path / "step-0000000003")
    async with Checkpoint(tmp_path, {"other": torch.nn.Linear(2, 2)}) as checkpoint:
        _kept = Engine(lambda engine, batch: None)  # a Checkpoint does not keep it
        checkpoint.attach(_kept)
        with pytest.warns(CheckpointWarning, match="step-0000000003"), pytest.raises(CheckpointMismatch):
            await checkpoint.restore()
    assert (tmp_path / "damaged-step-0000000003").exists()

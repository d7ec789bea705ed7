"""Directories with names that are no text, or too long."""

import json
import os
import warnings
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
import torch
from safetensors.torch import load
from support.record import AnyEngine

from aengine import CheckpointWarning, Engine, Events
from aengine.__main__ import main as command
from aengine.checkpoint import Checkpoint, Keep
from aengine.errors import CheckpointNotFound, CheckpointNotWritten


def engine() -> AnyEngine:
    return Engine(lambda engine, batch: None)


@pytest.fixture
def no_text(tmp_path: Path) -> Path:
    """Give a directory that is called as in Latin-1."""
    return Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))


@pytest.mark.parametrize("write_in", ["thread", pytest.param("process", marks=pytest.mark.slow)])
async def test_a_directory_whose_name_is_not_utf_8_is_like_any_other(
    no_text: Path, write_in: Literal["thread", "process"], caplog: pytest.LogCaptureFixture
) -> None:
    for resumed in (None, 4):
        run = engine()
        run.state.metrics["accuracy"] = 0.5
        keep = Keep(last=3, best=1, metric="accuracy")
        async with Checkpoint(no_text, {"model": torch.nn.Linear(2, 2)}, keep=keep, write_in=write_in) as checkpoint:
            checkpoint.attach(run, Events.ITERATION_COMPLETED(every=2))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointWarning)
                info = await checkpoint.restore()
            assert (info and info.step) == resumed
            await run.run(range(6))
            assert [one.path.parent for one in checkpoint.list()] == [no_text] * 3
            checkpoint.pin(4)
            checkpoint.unpin(4)
            assert (await checkpoint.load("best")).step in {2, 4}
            for text in (listener.name for listener in run.statistics().listeners):
                text.encode()
        if resumed is None:
            with (no_text / "step-0000000006" / "state.pt").open("ab") as file:
                file.write(b"x")
    assert "state.pt has" in (no_text / "damaged-step-0000000006" / "why.txt").read_text(encoding="utf-8")
    for record in caplog.records:
        record.getMessage().encode()


async def test_the_command_takes_a_directory_whose_name_is_not_utf_8(
    no_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Checkpoint(no_text, {"model": torch.nn.Linear(2, 2)}) as checkpoint:
        run = engine()
        checkpoint.attach(run, Events.ITERATION_COMPLETED)
        await run.run([1, 2, 3])
    (no_text / "step-0000000003" / "state.pt").unlink()

    def say(action: str, *arguments: object) -> tuple[int, str, str]:
        status = command(["checkpoints", action, str(no_text), *map(str, arguments)])
        said = capsys.readouterr()
        assert (said.out + said.err).encode()
        return status, said.out, said.err

    assert "step-0000000003: damaged" in say("list")[1]
    assert "step-0000000002: whole" in say("verify")[1]
    assert say("pin", 2)[0] == say("unpin", 2)[0] == 0
    assert json.loads(say("list", "--json")[1])["resumes_from"] == str(no_text / "step-0000000002")
    weights = no_text / "weights.safetensors"
    assert say("export", "--safetensors", weights)[0] == 0
    assert set(load(weights.read_bytes())) == {"weight", "bias"}
    assert "is one checkpoint" in say_of_one(no_text, capsys)


def say_of_one(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert command(["checkpoints", "list", str(directory / "step-0000000002")]) == 2
    return capsys.readouterr().err


def long_path(directory: Path, length: int) -> Path:
    """Return a path of so many characters, no part of which is too long by itself."""
    while (missing := length - len(str(directory)) - 1) > 0:
        directory /= "d" * min(200, missing if missing <= 200 else missing - 2)
    return directory


def too_long(directory: Path, how: str) -> Path:
    if how == "path":
        return long_path(directory, 4200)
    if how == "almost":  # there is room for the directory, and not for what is in it
        return long_path(directory, 4070)
    return directory / ("x" * 300) / ("y" if how == "above" else "")


@pytest.mark.parametrize("how", ["name", "above", "path", "almost"])
async def test_where_the_name_is_too_long_nothing_is_written_and_that_is_said(tmp_path: Path, how: str) -> None:
    directory = too_long(tmp_path, how)
    advice = "File name too long.*Choose a directory with a shorter name"
    async with Checkpoint(directory, {"model": torch.nn.Linear(2, 2)}) as checkpoint:
        run = engine()
        checkpoint.attach(run, Events.ITERATION_COMPLETED)
        with pytest.raises(CheckpointNotWritten, match=advice):
            await run.run([1])
        with pytest.raises(CheckpointNotWritten, match=advice):
            await checkpoint.save()
        assert checkpoint.list() == []
        with pytest.raises(CheckpointNotFound):
            checkpoint.pin(1)


@pytest.mark.parametrize("call", ["restore", "load"])
@pytest.mark.parametrize("how", ["name", "above", "path"])
async def test_where_the_name_is_too_long_restoring_says_so(tmp_path: Path, how: str, call: str) -> None:
    directory = too_long(tmp_path, how)
    async with Checkpoint(directory, {"model": torch.nn.Linear(2, 2)}) as checkpoint:
        _kept = engine()  # a Checkpoint does not keep it
        checkpoint.attach(_kept)

        async def read(which: Any, **options: bool) -> object:
            return await (checkpoint.restore(which, **options) if call == "restore" else checkpoint.load(which))

        with pytest.raises(CheckpointNotWritten, match="Choose a directory with a shorter name"):
            await (read("latest", required=True) if call == "restore" else read("latest"))
        for which in (1, directory / "step-0000000001"):
            with pytest.raises(CheckpointNotFound):
                await read(which)


async def test_a_manifest_that_is_too_long_is_not_written(tmp_path: Path) -> None:
    run = engine()
    run.state.metrics["x" * (1 << 20)] = 1.0
    async with Checkpoint(tmp_path, {"model": torch.nn.Linear(2, 2)}) as checkpoint:
        checkpoint.attach(run, Events.COMPLETED)
        with pytest.raises(CheckpointNotWritten, match=r"step 1 was not written: .* larger than 1048576 bytes"):
            await run.run([1])
        assert checkpoint.list() == []
        with anyio.fail_after(10):
            await checkpoint.flush()

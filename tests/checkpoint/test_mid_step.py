"""Checkpoints of a step that failed or was cancelled: kept to be looked at, and not resumed from without need."""

import json
from pathlib import Path

import anyio
import pytest
from support.record import AnyEngine, Boom
from support.saving_run import Run, saving

from aengine import CheckpointWarning, Events
from aengine.__main__ import main as command


class HalfWay(Run):
    """Its third step changes the model, and then fails, or waits for ever."""

    waits: anyio.Event

    async def _async_step(self, engine: AnyEngine, batch: str) -> float:
        result = await super()._async_step(engine, batch)
        if batch == "fail":
            raise Boom
        if batch == "wait":
            self.waits.set()
            await anyio.sleep_forever()
        return result


async def stop_in_a_step(directory: Path, *, saved_at: object, how: str) -> HalfWay:
    run = HalfWay(directory)
    run.checkpoint.attach(run.engine, saved_at | Events.EXCEPTION_RAISED | Events.CANCELLED)  # type: ignore[operator]
    if how == "fail":
        with pytest.raises(Boom):
            await run.engine.run(["go", "go", "fail"])
    else:
        run.waits = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(run.engine.run, ["go", "go", "wait"])
            await run.waits.wait()
            group.cancel_scope.cancel()
    assert run.steps == 3
    await run.checkpoint.aclose()
    return run


@pytest.mark.parametrize("how", ["fail", "wait"])
async def test_the_one_before_is_gone_on_from(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = await stop_in_a_step(tmp_path, saved_at=Events.ITERATION_COMPLETED(once=1), how=how)
    assert [(info.step, info.is_mid_step) for info in run.checkpoint.list()] == [(1, False), (2, True)]

    assert command(["checkpoints", "list", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["resumes_from"] == str(tmp_path / "step-0000000001")
    assert [one["mid_step"] for one in told["checkpoints"]] == [False, True]

    async with saving(tmp_path) as again:
        info = await again.restore()
        assert info is not None
        assert (info.step, again.steps) == (1, 1)
    async with saving(tmp_path) as again:  # asked for by its step, it is taken
        info = await again.restore(2)
        assert info is not None
        assert (info.is_mid_step, again.steps) == (True, 3)


async def test_it_is_gone_on_from_if_there_is_no_other_and_that_is_said(tmp_path: Path) -> None:
    run = await stop_in_a_step(tmp_path, saved_at=Events.COMPLETED, how="fail")
    assert [(info.step, info.is_mid_step) for info in run.checkpoint.list()] == [(2, True)]
    async with saving(tmp_path) as again:
        with pytest.warns(CheckpointWarning, match="no checkpoint but of the middle of a step"):
            info = await again.restore()
        assert info is not None
        assert again.steps == 3
    async with saving(tmp_path) as again:
        with pytest.warns(CheckpointWarning, match="no checkpoint but of the middle of a step"):
            await again.checkpoint.load()
        assert again.steps == 3


async def test_where_a_step_has_completed_what_is_saved_of_an_accident_is_whole(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.EXCEPTION_RAISED)

        @run.engine.on(Events.ITERATION_COMPLETED(once=2))
        def fail() -> None:
            raise Boom

        with pytest.raises(Boom):
            await run.engine.run([1, 2, 3])
        assert [(info.step, info.is_mid_step) for info in run.checkpoint.list()] == [(2, False)]

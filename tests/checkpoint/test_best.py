"""The best checkpoint, and loading: which one is the best, and weights are had without going back."""

import math
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from support.kill_campaign import checkpoints, flip
from support.saving_run import Run, saving

from aengine import Event, Events
from aengine.checkpoint import Checkpoint, CheckpointEvents, Keep
from aengine.errors import (
    CheckpointDamaged,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointWarning,
    EngineBusy,
)

SCORES = {1: 0.7, 2: 0.9, 3: math.nan, 4: 0.8, 5: 0.9}
BEST = Keep(last=5, best=1, metric="score")


def left_behind(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("abandoned-*"))


def times_of_change(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


async def save_scored(run: Run) -> None:
    """Leave the checkpoints of steps 1 to 5 there. The best is that of step 2, for of equals the older is better."""
    run.engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: engine.state.metrics.update(score=SCORES[engine.state.iteration])
    )
    run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED)
    await run.engine.run([1, 2, 3, 4, 5])


@pytest.fixture
async def directory(tmp_path: Path) -> Path:
    async with saving(tmp_path, keep=BEST) as run:
        await save_scored(run)
    return tmp_path


@pytest.mark.parametrize(("mode", "step"), [("max", 2), ("min", 1)])
async def test_the_best_is_restored_by_the_rule_of_keep(directory: Path, mode: Any, step: int) -> None:
    async with saving(directory, keep=Keep(metric="score", mode=mode)) as run:
        info = await run.restore("best")
        assert info is not None
        assert run.steps == run.engine.state.iteration == info.step == step


async def test_where_the_best_is_damaged_the_next_best_is_restored(directory: Path) -> None:
    flip(directory / "step-0000000002")
    heard: list[str] = []
    async with saving(directory, keep=BEST) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        run.engine.add_event_handler(CheckpointEvents.CHECKPOINT_DAMAGED, lambda: heard.append("damaged"))
        with pytest.warns(CheckpointWarning, match="step-0000000002"):
            await run.restore("best")
        assert run.steps == 5
        assert heard == ["damaged"]
        assert run.checkpoint.statistics().damaged == (directory / "damaged-step-0000000002",)


async def test_a_run_that_goes_on_from_the_best_leaves_the_later_ones_behind(directory: Path) -> None:
    async with saving(directory, keep=BEST) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        await run.restore("best")
        await run.engine.run([1, 2, 3, 4, 5])
        assert run.saved == [1, 2, 5]
        assert len(left_behind(directory)) == 3


async def test_where_nothing_says_what_is_best_that_is_said_at_the_call(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        with pytest.raises(ValueError, match=r"make the Checkpoint with a metric, such as keep=Keep\(best=1"):
            await run.restore("best")
        with pytest.raises(ValueError, match="make the Checkpoint with a metric"):
            await run.checkpoint.load("best")


async def test_where_none_can_be_the_best_no_other_is_taken(directory: Path) -> None:
    async with saving(directory, keep=Keep(metric="loss")) as run:
        with pytest.raises(CheckpointNotFound, match=r"has a number 'loss'.*engine\.state\.metrics"):
            await run.restore("best")
    async with saving(directory / "none", keep=Keep(metric="loss")) as run:
        with pytest.raises(CheckpointNotFound):
            await run.checkpoint.load("best")
    for name in checkpoints(directory):
        if name != "step-0000000003":  # which has NaN
            flip(directory / name)
    async with saving(directory, keep=BEST) as run:
        with pytest.warns(CheckpointWarning), pytest.raises(CheckpointDamaged, match=r"0000000002: .*sha256"):
            await run.restore("best")
        assert run.steps == 0


@pytest.mark.parametrize("which", [1.5, True, None, torch.nn.Linear(1, 1)])
async def test_what_names_no_checkpoint_is_a_wrong_type(tmp_path: Path, which: Any) -> None:
    async with saving(tmp_path) as run:
        with pytest.raises(TypeError, match=r'which= is "latest", "best", a step or a pathlib.Path, got'):
            await run.restore(which)
        with pytest.raises(TypeError, match="which= is "):
            await run.checkpoint.load(which)


async def test_a_training_ends_with_its_best_weights_and_goes_on_as_if_nothing_were(tmp_path: Path) -> None:
    async with saving(tmp_path, keep=BEST) as run:
        await save_scored(run)
        engine, random = run.engine.state_dict(), torch.get_rng_state()
        files = times_of_change(tmp_path)
        info = await run.checkpoint.load("best", only=["model"])
        assert run.steps == info.step == 2
        assert str(run.engine.state_dict()) == str(engine)
        assert run.engine.state.metrics["score"] == SCORES[5]
        assert torch.equal(torch.get_rng_state(), random)
        assert times_of_change(tmp_path) == files
        await run.checkpoint.save()
        assert run.saved == [1, 2, 3, 4, 5]
        assert left_behind(tmp_path) == []


@pytest.mark.parametrize(("which", "step"), [("latest", 5), (3, 3), ("path", 4), ("best", 2)])
async def test_any_checkpoint_is_loaded_without_an_engine(directory: Path, which: Any, step: int) -> None:
    run = Run(directory, keep=BEST)
    info = await run.checkpoint.load(directory / "step-0000000004" if which == "path" else which)
    assert run.steps == info.step == step
    assert run.engine.state.iteration == 0


async def test_loading_reads_beside_the_run_that_writes_and_lets_it_begin(directory: Path) -> None:
    reader = Run(directory, keep=BEST)
    await reader.checkpoint.load("best")
    async with saving(directory, keep=BEST) as writer:
        writer.checkpoint.attach(writer.engine, Events.COMPLETED)
        await writer.engine.run([1])
        flip(directory / "step-0000000002")
        with pytest.warns(CheckpointWarning, match="step-0000000002"):
            info = await reader.checkpoint.load("best")
        assert reader.steps == info.step == 5
        assert reader.checkpoint.statistics().damaged == (directory / "step-0000000002",)
        assert "step-0000000002" in checkpoints(directory)  # not set aside: nothing on the disk is changed


async def test_only_the_parts_that_are_named_are_loaded(tmp_path: Path) -> None:
    def made() -> dict[str, torch.nn.Linear]:
        return {name: torch.nn.Linear(2, 1) for name in ("first", "second")}

    async with saving(tmp_path) as run:
        saved, here = made(), made()
        run.checkpoint = Checkpoint(tmp_path, saved)
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        await run.engine.run([1])
        await run.checkpoint.aclose()
        second = here["second"].weight.clone()
        await Checkpoint(tmp_path, here).load(only=["first"])
        assert torch.equal(here["first"].weight, saved["first"].weight)
        assert torch.equal(here["second"].weight, second)
        alone = Checkpoint(tmp_path, {"first": here["first"]})
        await alone.load(only=("first",))
        with pytest.raises(CheckpointMismatch, match=r"\['first', 'second'\] in the checkpoint.*load\(\.\.\., only="):
            await alone.load()
        other = Checkpoint(tmp_path, {"third": here["first"]})
        with pytest.raises(CheckpointMismatch, match=r"only= names \['third'\].*it has \['first', 'second'\]"):
            await other.load(only=["third"])


@pytest.mark.parametrize(
    ("only", "error", "said"),
    [
        (["modle"], ValueError, r"only= names \['modle'\], which the state has not: it has \['model'\]"),
        ("model", TypeError, r'such as only=\["model"\], got \'model\''),
        ([], TypeError, "names of parts"),
        ([1], TypeError, "names of parts"),
    ],
)
async def test_parts_that_are_not_there_are_refused_at_the_call(
    tmp_path: Path, only: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        await Run(tmp_path).checkpoint.load(only=only)


async def test_state_without_names_has_no_parts_to_choose_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one thing \(torch.nn.modules.linear.Linear\).*leave only= out"):
        await Checkpoint(tmp_path, torch.nn.Linear(1, 1)).load(only=["model"])


async def test_nothing_is_loaded_under_a_run(directory: Path) -> None:
    async with saving(directory, keep=BEST) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)

        @run.engine.subscribe(Events.ITERATION_COMPLETED(once=1))
        async def load(event: Event) -> None:
            with pytest.raises(EngineBusy, match=r"load\(\) comes before run\(\), or after it"):
                await run.checkpoint.load("best")

        await run.engine.run([1, 2])
        assert run.steps == 2


async def test_loading_that_is_cancelled_has_changed_nothing(directory: Path) -> None:
    run = Run(directory)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await run.checkpoint.load()
    assert scope.cancelled_caught
    assert run.steps == 0

"""Restoring: which checkpoint is taken, what is put back, and what is refused without touching anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.kill_campaign import DAMAGES, checkpoints, flip
from support.saving_run import Counted, Run, endless, saving

from aengine import Event, Events
from aengine.checkpoint import Checkpoint, CheckpointEvents, Keep
from aengine.errors import (
    CheckpointDamaged,
    CheckpointLocked,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointWarning,
    EngineBusy,
)


async def save_some(directory: Path) -> None:
    """Leave the checkpoints of steps 1 to 4 there."""
    async with saving(directory, keep=Keep(last=4)) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED)
        await run.engine.run([1, 2, 3, 4])


def content(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


async def test_where_there_is_none_nothing_is_restored_and_nothing_made(tmp_path: Path) -> None:
    async with saving(tmp_path / "run") as run:
        assert await run.restore() is None
        assert not (tmp_path / "run").exists()
        with pytest.raises(CheckpointNotFound, match="one is required"):
            await run.restore(required=True)


@pytest.mark.parametrize("which", ["latest", 2, "path"])
async def test_the_one_that_is_asked_for_is_restored(which: Any, tmp_path: Path) -> None:
    await save_some(tmp_path)
    async with saving(tmp_path) as run:
        chosen = tmp_path / "step-0000000003" if which == "path" else which
        info = await run.restore(chosen)
        expected = {"latest": 4, 2: 2, "path": 3}[which]
        assert info is not None
        assert run.steps == run.engine.state.iteration == info.step == expected


async def test_what_is_asked_for_and_not_there_is_said_with_what_there_is(tmp_path: Path) -> None:
    await save_some(tmp_path)
    async with saving(tmp_path) as run:
        with pytest.raises(CheckpointNotFound, match="no checkpoint of step 9; it has those of step 1, 2, 3, 4"):
            await run.restore(9)
        with pytest.raises(CheckpointNotFound, match="step-0000000009"):
            await run.restore(tmp_path / "step-0000000009")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: str(damage.__name__))
async def test_a_damaged_newest_is_set_aside_and_the_one_before_taken(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    await save_some(tmp_path)
    damage(tmp_path / "step-0000000004")
    heard: list[str] = []
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        run.engine.add_event_handler(CheckpointEvents.CHECKPOINT_DAMAGED, lambda: heard.append("damaged"))
        with pytest.warns(CheckpointWarning, match="step-0000000004"):
            info = await run.restore()
        assert info is not None
        assert run.steps == info.step == 3
        assert heard == ["damaged"]
        aside = tmp_path / "damaged-step-0000000004"
        assert run.checkpoint.statistics().damaged == (aside,)
        assert (aside / "why.txt").read_text()


async def test_one_that_was_asked_for_by_step_is_refused_when_it_is_damaged(tmp_path: Path) -> None:
    await save_some(tmp_path)
    flip(tmp_path / "step-0000000004")
    before = content(tmp_path)
    async with saving(tmp_path) as run:
        with pytest.raises(CheckpointDamaged, match="sha256"):
            await run.restore(4)
        assert run.steps == 0
    assert content(tmp_path) == before


async def test_if_all_are_damaged_nothing_begins_anew_and_not_at_the_next_attempt_either(tmp_path: Path) -> None:
    await save_some(tmp_path)
    for name in checkpoints(tmp_path):
        flip(tmp_path / name)
    async with saving(tmp_path) as run:
        with pytest.warns(CheckpointWarning), pytest.raises(CheckpointDamaged, match="none of the checkpoints"):
            await run.restore()
        with pytest.raises(CheckpointDamaged, match=r"damaged-step-0000000004.*remove them or choose another"):
            await run.restore()
        assert run.steps == 0


async def test_what_another_writes_is_read_and_nothing_of_it_set_aside(tmp_path: Path) -> None:
    await save_some(tmp_path)
    flip(tmp_path / "step-0000000004")
    async with saving(tmp_path) as writer:
        writer.checkpoint.attach(writer.engine, Events.EXCEPTION_RAISED)
        await writer.checkpoint._saver.open()
        reader = Run(tmp_path)
        reader.checkpoint.attach(reader.engine)
        with pytest.warns(CheckpointWarning) as warned:
            await reader.checkpoint.restore()
        assert warned[0].filename == __file__
        assert reader.steps == 3
        assert checkpoints(tmp_path)[-1] == "step-0000000004"
        reader.checkpoint.attach(reader.engine, Events.COMPLETED)
        with pytest.raises(CheckpointLocked):
            await reader.engine.run(endless)


async def test_handlers_and_metrics_are_restored_with_the_engine(tmp_path: Path) -> None:
    first = Counted()
    async with saving(tmp_path) as run:
        run.engine.add_event_handler(Events.ITERATION_COMPLETED, first)
        run.engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: engine.state.metrics.update(loss=0.5, table=torch.ones(2))
        )
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        await run.engine.run([1, 2, 3])
        assert dict(run.checkpoint.list()[0].metrics) == {"loss": 0.5}
    second = Counted()
    async with saving(tmp_path) as run:
        run.engine.add_event_handler(Events.ITERATION_COMPLETED, second)
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        await run.restore()
        assert second.count == first.count == 3
        assert run.engine.state.metrics["loss"] == 0.5
        assert torch.equal(run.engine.state.metrics["table"], torch.ones(2))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"other": torch.nn.Linear(2, 1)}, r"state has \['other'\] here, and \['model'\] in the checkpoint"),
        ({"model": torch.nn.Linear(3, 1)}, "size mismatch for weight"),
        ({"model": torch.nn.Linear(2, 1, bias=False)}, "Unexpected key"),
        (torch.nn.Linear(2, 1), "Missing key"),
    ],
    ids=["names", "shapes", "keys", "form"],
)
async def test_what_does_not_fit_is_refused_and_stays_on_the_disk(state: Any, said: str, tmp_path: Path) -> None:
    """No other checkpoint is tried: it is the program that is another, not the disk that is broken."""
    await save_some(tmp_path)
    before = content(tmp_path)
    async with saving(tmp_path) as run:
        run.checkpoint = Checkpoint(tmp_path, state)
        with pytest.raises(CheckpointMismatch, match=said):
            await run.restore()
        assert run.engine.state.iteration == 0
    assert content(tmp_path) == before


async def test_a_handler_that_is_missing_is_refused_unless_one_says_so(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.engine.add_event_handler(Events.ITERATION_COMPLETED, Counted())
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        await run.engine.run([1, 2])
    async with saving(tmp_path) as run:
        with pytest.raises(CheckpointMismatch, match=r"handlers has \[\] here, and \['Counted'\].*strict=False"):
            await run.restore()
        await run.restore(strict=False)
        assert run.steps == run.engine.state.iteration == 2


async def test_a_compiled_module_is_saved_under_the_names_of_the_plain_one(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        compiled: Any = torch.compile(run.model, backend="eager")
        run.checkpoint = Checkpoint(tmp_path, {"model": compiled})
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        await run.engine.run([1, 2])
    async with saving(tmp_path) as run:
        await run.restore()
        assert run.steps == 2


async def test_a_run_that_is_under_way_is_not_restored(tmp_path: Path) -> None:
    await save_some(tmp_path)
    async with saving(tmp_path) as run:

        @run.engine.subscribe(Events.ITERATION_COMPLETED(once=1))
        async def restore(event: Event) -> None:
            with pytest.raises(EngineBusy, match=r"restore\(\) comes before run\(\)"):
                await run.restore()

        await run.engine.run([1, 2])
        assert run.steps == 2


async def test_one_checkpoint_serves_one_engine(tmp_path: Path) -> None:
    async with saving(tmp_path) as run, saving(tmp_path / "other") as other:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        with pytest.raises(RuntimeError, match=r"make another one, .* or hand engine .* in as a part of the state"):
            run.checkpoint.attach(other.engine)

"""TensorBoard: what its own reader finds in the files."""

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from aengine import Engine, Events
from aengine.loggers import Record, TensorBoard, Tracker

AnyEngine: TypeAlias = Engine[Any, Any]


def scalars_of(directory: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def files_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


async def test_a_run_becomes_scalars(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: {"loss": batch / 2, "accuracy": batch}, name="trainer")
    Tracker(TensorBoard(tmp_path)).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2], max_epochs=2)
    assert scalars_of(tmp_path) == {
        "trainer/loss": [(1, 0.5), (2, 1.0), (3, 0.5), (4, 1.0)],
        "trainer/accuracy": [(1, 1.0), (2, 2.0), (3, 1.0), (4, 2.0)],
    }


async def test_the_time_is_that_of_the_step_and_not_of_the_writing(tmp_path: Path) -> None:
    times: list[float] = []

    class Noting(TensorBoard):
        def write(self, records: Sequence[Record]) -> None:
            times.extend(one.time for one in records)
            super().write(records)

    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    Tracker(Noting(tmp_path)).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2, 3])
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [one.wall_time for one in found.Scalars("trainer/output")] == times


async def test_tags_are_what_one_makes_of_them(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    Tracker(TensorBoard(tmp_path, tag=lambda record, name: f"{name} at {record.event}")).attach(
        engine, Events.COMPLETED
    )
    await engine.run([math.nan])
    ((tag, ((step, value),)),) = scalars_of(tmp_path).items()
    assert (tag, step) == ("output at COMPLETED", 1)
    assert math.isnan(value)


@pytest.mark.parametrize("tag", ["loss", lambda name: name])
def test_tags_that_cannot_be_made_are_refused_at_once(tmp_path: Path, tag: Any) -> None:
    with pytest.raises(TypeError, match=r"^TensorBoard\(tag=\) "):
        TensorBoard(tmp_path, tag=tag)


async def test_a_second_run_begins_a_second_file(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    Tracker(TensorBoard(tmp_path, tag=lambda record, name: name)).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1])
    await engine.run([1, 2], max_epochs=2)
    assert len(files_in(tmp_path)) == 2


async def test_an_evaluator_in_the_run_of_a_trainer_writes_into_its_file(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path)
    trainer: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    evaluator: AnyEngine = Engine(lambda engine, batch: batch * 10, name="evaluator")
    Tracker(sink).attach(trainer, Events.ITERATION_COMPLETED)
    Tracker(sink, step=lambda _: trainer.state.iteration).attach(evaluator, Events.COMPLETED)

    @trainer.on(Events.EPOCH_COMPLETED)
    async def evaluate() -> None:
        await trainer.flush()  # the trainer's begin is reported
        await evaluator.run([7])

    await trainer.run([1, 2], max_epochs=3)
    assert scalars_of(tmp_path) == {
        "trainer/output": [(1, 1.0), (2, 2.0), (3, 1.0), (4, 2.0), (5, 1.0), (6, 2.0)],
        "evaluator/output": [(2, 70.0), (4, 70.0), (6, 70.0)],
    }
    assert len(files_in(tmp_path)) == 1


def test_without_the_package_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['tensorboard'] = None; from aengine.loggers import TensorBoard"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install -e ".[tensorboard]"' in done.stderr

"""An engine that a handler runs, such as an evaluator, is saved as part of the one whose handler it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.record import AnyEngine
from support.saving_run import Counted

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint


class Training:
    """A trainer that runs an evaluator after each epoch.

    Attributes:
        told: after each evaluation: the trainer's epoch, the evaluator's counts, and what its handlers have counted.
    """

    def __init__(self, directory: Path, *, whole: bool) -> None:
        self.trainer: AnyEngine = Engine(lambda engine, batch: None, name="trainer")
        self.evaluator: AnyEngine = Engine(lambda engine, batch: batch, name="evaluator")
        self.batches, self.epochs = Counted(), Counted()
        self.limits: dict[str, int] = {}
        self.told: list[Any] = []
        self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.batches)
        self.evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.epochs)
        self.evaluator.add_event_handler(Events.EPOCH_COMPLETED, self._measure)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.evaluate)
        state: Any = {"nested": {"evaluator": self.evaluator}} if whole else self.evaluator
        self.checkpoint = Checkpoint(directory, state)
        self.checkpoint.attach(self.trainer, Events.EPOCH_COMPLETED)

    def _measure(self) -> None:
        self.evaluator.state.metrics["batches"] = self.batches.count

    async def evaluate(self) -> None:
        state = await self.evaluator.run([1, 2, 3], **self.limits)
        self.told.append((self.trainer.state.epoch, state.iteration, self.batches.count, self.epochs.count))


@pytest.mark.parametrize("limits", [{}, {"max_epochs": 2}, {"max_iters": 2}], ids=str)
@pytest.mark.parametrize("whole", [False, True])
async def test_an_evaluator_that_was_saved_evaluates_when_the_run_goes_on(
    tmp_path: Path, limits: dict[str, int], *, whole: bool
) -> None:
    async def train(directory: Path, epochs: int) -> Training:
        training = Training(directory, whole=whole)
        training.limits = limits
        async with training.checkpoint:
            await training.checkpoint.restore()
            await training.trainer.run([1, 2], max_epochs=epochs)
        return training

    never_stopped = await train(tmp_path / "never-stopped", 4)
    begun = await train(tmp_path / "stopped", 2)
    resumed = await train(tmp_path / "stopped", 4)
    assert [*begun.told, *resumed.told] == never_stopped.told
    assert [one[0] for one in never_stopped.told] == [1, 2, 3, 4]


async def test_between_its_runs_it_is_as_it_was(tmp_path: Path) -> None:
    saved, restored = Training(tmp_path, whole=True), Training(tmp_path, whole=True)
    async with saved.checkpoint:
        await saved.trainer.run([1, 2])
    async with restored.checkpoint:
        await restored.checkpoint.restore()
    assert restored.evaluator.state_dict() == saved.evaluator.state_dict()
    assert restored.evaluator.state.metrics == saved.evaluator.state.metrics == {"batches": 3}


async def test_an_evaluation_that_was_stopped_goes_on(tmp_path: Path) -> None:
    saved, restored = Training(tmp_path, whole=True), Training(tmp_path, whole=True)
    handle = saved.evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=2), saved.evaluator.terminate)
    async with saved.checkpoint:
        await saved.trainer.run([1, 2])
    handle.remove()
    async with restored.checkpoint:
        await restored.checkpoint.restore()
    for training in (saved, restored):
        await training.evaluate()
    assert saved.told[-1] == restored.told[-1] == (1, 3, 3, 1)


async def test_a_handler_of_both_engines_is_saved_once(tmp_path: Path) -> None:
    def made() -> tuple[Training, Counted]:
        training, both = Training(tmp_path, whole=True), Counted()
        training.trainer.add_event_handler(Events.ITERATION_COMPLETED, both)
        training.evaluator.add_event_handler(Events.ITERATION_COMPLETED, both)
        return training, both

    saved, its_both = made()
    async with saved.checkpoint:
        await saved.trainer.run([1, 2])
    (path,) = (info.path for info in saved.checkpoint.list())
    handlers = torch.load(path / "state.pt", weights_only=True)["handlers"]
    of_evaluator = "of state['nested']['evaluator']"
    assert set(handlers) == {"Counted", f"Counted {of_evaluator}", f"Counted-2 {of_evaluator}"}
    restored, both = made()
    async with restored.checkpoint:
        await restored.checkpoint.restore()
    assert both.count == its_both.count


async def test_an_engine_that_is_loaded_begins_anew_where_that_is_asked_for() -> None:
    done: AnyEngine = Engine(lambda engine, batch: None)
    await done.run([1, 2], max_epochs=2)
    iterations: list[int] = []
    for restart_if_done in (False, True):
        engine: AnyEngine = Engine(lambda engine, batch: None)
        steps = Counted()
        engine.add_event_handler(Events.ITERATION_COMPLETED, steps)
        engine.load_state_dict(done.state_dict(), restart_if_done=restart_if_done)
        await engine.run([1, 2], max_epochs=2)
        iterations.append(steps.count)
    assert iterations == [0, 4]

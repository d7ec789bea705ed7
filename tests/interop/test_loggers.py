"""pytorch-ignite's loggers on our engine: what they write is what they write there."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ignite import ignite
from support.ignite_parity import MakeEngine, Scenario, same_on_both
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]  # it has no types
from torch import nn

import aengine
from aengine import Engine
from aengine.interop.ignite import as_ignite

handlers: Any = ignite.handlers
tensorboard: Any = ignite.handlers.tensorboard_logger
THEIRS: Any = ignite.engine.Events


def hand_on(engine: Any, batch: Any) -> Any:
    return batch


def written_in(folder: Path) -> dict[str, list[Any]]:
    """Return what TensorBoard would show: by tag, the steps and values, without the times."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    read.Reload()
    shown: dict[str, list[Any]] = {
        tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]
    }
    for tag in read.Tags()["histograms"]:
        shown[tag] = [(one.step, tuple(one.histogram_value.bucket)) for one in read.Histograms(tag)]
    return shown


# TensorboardLogger


async def test_tensorboard_shows_what_it_shows_there(tmp_path: Path) -> None:
    made: list[Path] = []

    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        made.append(folder := tmp_path / str(len(made)))
        model = nn.Linear(1, 1)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

        def step(engine: Any, batch: float) -> float:
            optimizer.zero_grad()
            nn.init.constant_(model.weight, batch)
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            return batch * 2

        engine = make(step)
        logger = handlers.TensorboardLogger(log_dir=str(folder))
        ignite.metrics.Average(output_transform=lambda output: output).attach(engine, "mean")
        logger.attach_output_handler(
            engine, THEIRS.ITERATION_COMPLETED(every=2), tag="training", output_transform=lambda output: {"it": output}
        )
        logger.attach_output_handler(engine, THEIRS.EPOCH_COMPLETED, tag="training", metric_names=["mean"])
        logger.attach_opt_params_handler(engine, THEIRS.ITERATION_STARTED, optimizer=optimizer)
        logger.attach(engine, tensorboard.WeightsScalarHandler(model), THEIRS.EPOCH_COMPLETED)
        logger.attach(engine, tensorboard.WeightsHistHandler(model), THEIRS.EPOCH_COMPLETED)
        logger.attach(engine, tensorboard.GradsScalarHandler(model), THEIRS.ITERATION_COMPLETED | THEIRS.COMPLETED)

        def outcome() -> Any:
            logger.close()
            return written_in(folder)

        return engine, outcome

    shown = await same_on_both(scenario, [1.0, 2.0, 3.0], max_epochs=2)
    assert shown["training/it"] == [(2, 4.0), (4, 2.0), (6, 6.0)]
    assert shown["training/mean"] == [(1, 4.0), (2, 4.0)]
    assert len(shown["lr/group_0"]) == 6
    assert {tag.partition("/")[0] for tag in shown} == {"training", "lr", "weights_norm", "weights", "grads_norm"}


async def test_logging_is_set_up_by_ignites_own_helper(tmp_path: Path) -> None:
    """It asks whether its one evaluator is an engine."""
    made: list[Path] = []

    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        made.append(folder := tmp_path / str(len(made)))
        trainer, evaluator = make(hand_on), make(hand_on)
        logger = handlers.logger_utils.setup_tb_logging(
            str(folder), as_ignite(trainer), evaluators=as_ignite(evaluator), log_every_iters=1
        )
        trainer.state.metrics["loss"] = 1.0
        evaluator.state.metrics["score"] = 0.5
        trainer.add_event_handler(THEIRS.EPOCH_COMPLETED, lambda: evaluator.fire_event(THEIRS.COMPLETED))

        def outcome() -> Any:
            logger.close()
            return written_in(folder)

        return trainer, outcome

    shown = await same_on_both(scenario, [1.0, 2.0])
    assert shown == {"training/loss": [(1, 1.0), (2, 1.0)], "validation/score": [(1, 0.5)]}


def test_logger_refuses_an_event_of_ours_that_ignite_does_not_know(tmp_path: Path) -> None:
    """It looks in a table of ignite's State class. What its `attach` does can be done without it."""

    class Own(aengine.EventEnum):
        HALF = "half"

    def step(engine: Any, batch: float) -> float:
        engine.fire_event(Own.HALF)
        return batch

    engine: Any = Engine(step)
    engine.register_events(*Own, event_to_attr={Own.HALF: "halves"})
    with handlers.TensorboardLogger(log_dir=str(tmp_path)) as logger:
        handler = tensorboard.OutputHandler(
            "own",
            output_transform=lambda output: 1.0,
            global_step_transform=lambda engine, event: engine.state.iteration,
        )
        with pytest.raises(RuntimeError, match="Unknown event name"):
            logger.attach(engine, handler, Own.HALF)
        engine.add_event_handler(Own.HALF, handler, logger, Own.HALF)
        engine.run_sync([1.0, 2.0])
    assert written_in(tmp_path) == {"own/output": [(1, 1.0), (2, 1.0)]}


# ProgressBar


def progress(attach: Callable[[Any, Any], object], **options: Any) -> Scenario:
    """Return the scenario of a progress bar, which tells what it has written, without the times."""

    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        written = io.StringIO()
        engine = make(hand_on)
        ignite.metrics.RunningAverage(output_transform=lambda output: output).attach(engine, "mean")
        attach(handlers.ProgressBar(file=written, mininterval=0, **options), as_ignite(engine))
        return engine, lambda: re.sub(r"\d\d:\d\d|\?", "", written.getvalue()).split("\r")

    return scenario


PROGRESS: dict[str, Scenario] = {
    "plain": progress(lambda bar, engine: bar.attach(engine)),
    "metrics": progress(lambda bar, engine: bar.attach(engine, ["mean"])),
    "all metrics, persisting": progress(lambda bar, engine: bar.attach(engine, "all"), persist=True),
    "output": progress(lambda bar, engine: bar.attach(engine, output_transform=lambda output: {"it": output})),
    "epochs": progress(
        lambda bar, engine: bar.attach(engine, event_name=THEIRS.EPOCH_COMPLETED, closing_event_name=THEIRS.COMPLETED),
        desc="all of it",
    ),
    "every other": progress(lambda bar, engine: bar.attach(engine, event_name=THEIRS.ITERATION_COMPLETED(every=2))),
}


@pytest.mark.parametrize("bar", PROGRESS)
async def test_progress_bar_writes_what_it_writes_there(bar: str) -> None:
    written = await same_on_both(PROGRESS[bar], [1.0, 2.0, 3.0, 4.0], max_epochs=2)
    assert any("2/2" in line for line in written)


def test_progress_bar_refuses_an_event_that_the_engine_does_not_have() -> None:
    class Own(ignite.engine.EventEnum):
        HALF = "half"

    engine = as_ignite(Engine(hand_on))
    with pytest.raises(ValueError, match="not in allowed events"):
        handlers.ProgressBar().attach(engine, event_name=Own.HALF)

"""Early stopping ends a run whose score does not improve, also when it was resumed in between."""

import gc
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
from support.record import AnyEngine

from aengine import Engine, Events, StopReason
from aengine.checkpoint import Checkpoint, Keep
from aengine.engine import stateful_listeners
from aengine.handlers import EarlyStopping


def scoring(scores: list[float], **options: Any) -> tuple[AnyEngine, EarlyStopping]:
    """Return a trainer of one iteration to an epoch, whose metric takes these values."""
    trainer: AnyEngine = Engine(lambda engine, batch: None, name="trainer")

    @trainer.on(Events.EPOCH_COMPLETED)
    def measure(engine: AnyEngine) -> None:
        engine.state.metrics["score"] = scores[engine.state.epoch - 1]

    arguments: dict[str, Any] = {"patience": 2, "metric": "score", "mode": "max"} | options
    stopping = EarlyStopping(**arguments)
    stopping.attach(trainer)
    return trainer, stopping


def shown(value: object) -> str:
    """Return an id that is the same in every process: no function has its address in it."""
    return re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", str(value))


def the_less_the_better(engine: AnyEngine) -> float:
    return -float(engine.state.metrics["score"])


@pytest.mark.parametrize(
    ("scores", "options", "epochs"),
    [
        ([1, 2, 3, 4, 5], {}, 5),
        ([1, 2, 2, 1.5, 5], {}, 4),
        ([1, 0, 2, 0, 2, 5], {}, 5),
        ([1, 0, 5], {"patience": 1}, 2),
        ([3, 2, 2.5, 4, 1], {"mode": "min"}, 4),
        ([-3, -2, -1], {"mode": "min"}, 3),
        ([1, 1.4, 1.8, 2.2], {"threshold": 0.5}, 3),
        ([1, 1.4, 1.8, 2.2, 2.6], {"threshold": 0.5, "cumulative": True}, 5),
        ([100, 105, 109, 111], {"threshold": 0.1, "threshold_mode": "rel"}, 3),
        ([100, 105, 111, 150], {"threshold": 0.1, "threshold_mode": "rel", "cumulative": True}, 4),
        ([-100, -95, -91, -50], {"threshold": 0.1, "threshold_mode": "rel"}, 3),
        ([-100, -111, -123], {"threshold": 0.1, "threshold_mode": "rel", "mode": "min"}, 3),
        ([math.nan, 1, math.nan, 2, math.nan, math.nan, 9], {}, 6),
        ([math.nan, math.nan, 9], {}, 2),
        ([1, 2, 3], {"metric": the_less_the_better}, 3),
    ],
    ids=shown,
)
def test_run_ends_after_so_many_scores_without_improvement(
    scores: list[float], options: dict[str, Any], epochs: int
) -> None:
    trainer, _ = scoring(scores, **options)
    trainer.run_sync([1], max_epochs=len(scores))
    assert trainer.state.epoch == epochs


def test_stop_is_a_termination() -> None:
    trainer, stopping = scoring([3, 2, 1, 0])
    trainer.run_sync([1], max_epochs=4)
    assert trainer.state.stop_reason is StopReason.TERMINATED
    assert (stopping.best, stopping.waited) == (3, 2)


async def test_resumed_run_continues_to_count(tmp_path: Path) -> None:
    async def run(step: int | None = None) -> tuple[int, float | None]:
        trainer, stopping = scoring([1, 5, 4, 3, 2, 1, 0], patience=4)
        async with Checkpoint(tmp_path, {}, keep=Keep(every_n=1)) as checkpoint:
            checkpoint.attach(trainer, Events.EPOCH_COMPLETED)
            if step:
                await checkpoint.restore(step)
            await trainer.run([1], max_epochs=7)
        return trainer.state.epoch, stopping.best

    assert await run() == (6, 5)
    assert await run(4) == (6, 5)


async def test_run_that_was_stopped_and_is_loaded_has_nothing_left(tmp_path: Path) -> None:
    scores = [1.0, 0, 0, 5]
    trainer, stopping = scoring(scores)
    async with Checkpoint(tmp_path, {}, keep=Keep()) as checkpoint:
        checkpoint.attach(trainer, Events.EPOCH_COMPLETED)
        await trainer.run([0], max_epochs=4)
    again, stopping = scoring(scores)
    async with Checkpoint(tmp_path, {}, keep=Keep()) as checkpoint:
        checkpoint.attach(again)
        await checkpoint.restore()
        state = await again.run([0], max_epochs=4)
        assert (state.epoch, state.stop_reason, stopping.waited) == (3, StopReason.TERMINATED, 2)
        assert (await again.run([0], max_epochs=4)).epoch == 4, "it can be run again all the same"


def test_run_that_begins_anew_waits_anew() -> None:
    trainer, stopping = scoring([5, 4])
    for _ in range(2):
        trainer.run_sync([1], max_epochs=2)
        assert trainer.state.stop_reason is StopReason.COMPLETED
        assert (stopping.best, stopping.waited) == (5, 1)


@pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
async def test_score_may_be_that_of_an_evaluator_beside_the_step(tmp_path: Path, thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    trainer: AnyEngine = Engine(lambda engine, batch: None, name="trainer", thread=thread)
    evaluator: AnyEngine = Engine(lambda engine, batch: batch, name="evaluator", thread=thread)

    @evaluator.on(Events.COMPLETED)
    def measure(engine: AnyEngine) -> None:
        engine.state.metrics["loss"] = engine.state.output

    stopping = EarlyStopping(3, "loss", mode="min")
    stopping.attach(trainer, evaluator=evaluator)
    scores = [3.0, 2.0, 4.0, 4.0, 4.0, 1.0]

    @trainer.subscribe(Events.EPOCH_COMPLETED)
    async def evaluate(event: Any) -> None:
        if stopping.waited < 3:
            await evaluator.run([scores[event.epoch - 1]])

    async with Checkpoint(tmp_path, {}) as checkpoint:
        checkpoint.attach(trainer, Events.COMPLETED)
        await trainer.run([1], max_epochs=100_000)
        assert trainer.state.stop_reason is StopReason.TERMINATED
        assert (stopping.best, stopping.waited) == (2.0, 3)
        assert stopping in stateful_listeners(trainer)


def test_event_may_have_a_payload() -> None:
    trainer: AnyEngine = Engine(lambda engine, batch: engine.fire_event("SCORED", batch), name="trainer")
    trainer.register_events("SCORED")
    EarlyStopping(2, lambda engine: 1.0, mode="max").attach(trainer, "SCORED")
    trainer.run_sync([object()], max_epochs=9)
    assert trainer.state.epoch == 3


def test_removed_during_a_run_it_stops_it_no_more() -> None:
    trainer: AnyEngine = Engine(lambda engine, batch: None, name="trainer")
    stopping = EarlyStopping(2, lambda engine: 1.0, mode="max")
    handle = stopping.attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), handle.remove)
    trainer.run_sync([1], max_epochs=5)
    assert (trainer.state.epoch, stopping.best, stopping.waited) == (5, 1.0, 1)
    stopping.attach(trainer)
    trainer.run_sync([1], max_epochs=5)
    assert trainer.state.epoch == 3


def test_engines_are_freed_at_once() -> None:
    """Though the trainer's handler has the evaluator, and the evaluator's terminates the trainer."""
    gc.disable()
    try:
        trainer: AnyEngine = Engine(lambda engine, batch: None, name="trainer")
        evaluator: AnyEngine = Engine(lambda engine, batch: batch, name="evaluator")
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _, evaluator=evaluator: evaluator.run_sync([1.0]))
        stopping = EarlyStopping(2, lambda engine: engine.state.output, mode="max")
        stopping.attach(trainer, evaluator=evaluator)
        trainer.run_sync([1], max_epochs=9)
        assert trainer.state.epoch == 3
        gone = [weakref.ref(trainer), weakref.ref(evaluator)]
        del trainer, evaluator
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


def test_metric_that_is_not_there_is_named_with_those_that_are() -> None:
    trainer, _ = scoring([1], metric="accuracy")
    with pytest.raises(RuntimeError, match=r"engine 'trainer' has no metric 'accuracy' .* it has \['score'\]"):
        trainer.run_sync([1])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"patience": 0}, ValueError, "patience= is a whole number of scores, 1 or more; got 0"),
        ({"threshold": -0.1}, ValueError, "threshold= is 0 or more, got -0.1"),
        ({"threshold": math.nan}, ValueError, "threshold= is 0 or more, got nan"),
        ({"threshold": "0.1"}, TypeError, "threshold= is a number, 0 or more, got .0.1."),
        (
            {"mode": "maximum"},
            ValueError,
            r'mode= is one of "max" \(more is better\), "min" \(less is better\), got .maximum.',
        ),
        ({"threshold_mode": "relative"}, ValueError, 'threshold_mode= is one of "abs", "rel", got .relative.'),
        ({"metric": 0.5}, TypeError, "metric= takes the name of a metric .*; got 0.5"),
    ],
    ids=str,
)
def test_wrong_argument_is_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"patience": 1, "metric": "score", "mode": "max"} | options
    with pytest.raises(kind, match=message):
        EarlyStopping(**arguments)


def test_second_attachment_is_refused_also_with_an_evaluator_and_to_the_next_engine() -> None:
    trainer, stopping = scoring([1, 2])
    evaluator: AnyEngine = Engine(lambda engine, batch: None, name="evaluator")
    next_one: AnyEngine = Engine(lambda engine, batch: None, name="next")
    for engine, judged in ((trainer, None), (trainer, evaluator), (next_one, None), (next_one, evaluator)):
        with pytest.raises(
            RuntimeError, match=r"is attached to engine .trainer. already.*make another one.*; event may"
        ):
            stopping.attach(engine, evaluator=judged)
    with pytest.raises(ValueError, match="no event 'MINE'"):
        EarlyStopping(1, "loss", mode="min").attach(next_one, "MINE", evaluator=evaluator)


def test_what_is_no_engine_is_refused() -> None:
    wrong: Any = object()
    trainer, evaluator = (Engine[Any, Any](lambda engine, batch: None, name=name) for name in ("trainer", "evaluator"))
    stopping = EarlyStopping(1, "loss", mode="min")
    with pytest.raises(TypeError, match=r"takes an Engine of aengine's first, got <object"):
        stopping.attach(wrong)
    with pytest.raises(TypeError, match=r"as evaluator=, got <object .*attach\(trainer, evaluator=evaluator\)"):
        stopping.attach(trainer, evaluator=wrong)
    with pytest.raises(
        TypeError, match=r"as evaluator=, got <Engine 'evaluator' .*attach\(trainer, evaluator=evaluator\)"
    ):
        stopping.attach(trainer, evaluator)  # type: ignore[arg-type]  # as pytorch-ignite's users may write it
    assert not trainer.listeners()

"""First guesses at calls, pytorch-ignite's among them: the error says what to write here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from aengine import Checkpoint, Engine, Events, Keep
from aengine.handlers import EarlyStopping, NanGuard, TimeLimit
from aengine.loggers import JSONLines, Tracker
from aengine.training import MetricHandler, OptimizerUpdate, create_supervised_evaluator, create_supervised_trainer

# Out of sight of type checkers, which would say as much.
engine: Any = Engine(lambda engine, batch: batch)
engine_class: Any = Engine
checkpoint: Any = Checkpoint
keep: Any = Keep
early_stopping: Any = EarlyStopping
nan_guard: Any = NanGuard
time_limit: Any = TimeLimit
tracker: Any = Tracker
metric_handler: Any = MetricHandler
optimizer_update: Any = OptimizerUpdate
supervised_trainer: Any = create_supervised_trainer
supervised_evaluator: Any = create_supervised_evaluator
sink = JSONLines(Path("log.jsonl"))


def handler(engine: Any) -> None: ...


def run(**arguments: Any) -> None:
    async def main() -> None:
        await engine.run([1], **arguments)

    anyio.run(main)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: engine_class(process_function=handler), "Engine() has no process_function=: write step="),
        (lambda: engine_class(handler, "trainer"), "Engine() takes step by position, and by keyword name=, thread="),
        (lambda: run(epochs=3), "Engine.run() has no epochs=: max_epochs=?"),
        (lambda: run(max_steps=3), "Engine.run() has no max_steps=: write max_iters="),
        (lambda: engine.run_sync(dataloader=[1]), "Engine.run_sync() has no dataloader=: write data="),
        (lambda: engine.iterate([1], max_epoch=1), "Engine.iterate() has no max_epoch=: max_epochs=?"),
        (lambda: engine.terminate(skip=True), "Engine.terminate() has no skip=; it takes skip_completed="),
        (
            lambda: engine.terminate(True),  # noqa: FBT003 -- that is refused
            "Engine.terminate() takes nothing by position, and by keyword skip_completed=",
        ),
        (lambda: engine.set_data(loader=[1]), "Engine.set_data() has no loader=: write data="),
        (
            lambda: engine.add_event_handler(event_name=Events.STARTED, handler=handler),
            "Engine.add_event_handler() has no event_name=: write event=",
        ),
        (lambda: engine.on(event_name=Events.STARTED), "Engine.on() has no event_name=: write event="),
        (
            lambda: engine.remove_event_handler(handler, event_name=Events.STARTED),
            "Engine.remove_event_handler() has no event_name=: write event=",
        ),
        (
            lambda: engine.has_event_handler(handler, event_name=Events.STARTED),
            "Engine.has_event_handler() has no event_name=: write event=",
        ),
        (lambda: engine.subscribe(Events.STARTED, handlr=handler), "Engine.subscribe() has no handlr=: handler=?"),
        (
            lambda: engine.subscribe(Events.STARTED, handler, 8),
            "Engine.subscribe() takes event and handler by position",
        ),
        (lambda: engine.subscribe(Events.STARTED, handler, maxsize=8), "has no maxsize=: write buffer="),
        (lambda: engine.stream(Events.STARTED, 8), "Engine.stream() takes event by position, and by keyword buffer="),
        (
            lambda: early_stopping(patience=3, score_function=handler, trainer=engine),
            "no score_function=: write metric=, no trainer=: write EarlyStopping(...).attach(trainer)",
        ),
        (
            lambda: early_stopping(3, handler, engine),
            "; the engine and the event are for EarlyStopping(...).attach()",
        ),
        (
            lambda: early_stopping(3, "accuracy", mode="max", trainer=engine),
            "EarlyStopping() has no trainer=: write EarlyStopping(...).attach(trainer)",
        ),
        (lambda: early_stopping(3, "accuracy", mode="max", min_delta=1), "has no min_delta=: write threshold="),
        (lambda: early_stopping(3, monitor="accuracy", mode="max"), "has no monitor=: write metric="),
        (lambda: time_limit(limit_sec=3), "TimeLimit() has no limit_sec=: write limit="),
        (lambda: nan_guard(20), "NanGuard() takes nothing by position, and by keyword every="),
        (lambda: checkpoint("checkpoints", to_save={}), "Checkpoint() has no to_save=: write state="),
        (lambda: checkpoint("checkpoints", {}, n_saved=3), "Checkpoint() has no n_saved=: write keep=Keep(last=2)"),
        (lambda: checkpoint("checkpoints", {}, keeps=keep()), "Checkpoint() has no keeps=: keep=?"),
        (lambda: keep(lasts=3), "Keep() has no lasts=: last=?"),
        (lambda: tracker(sink, engine), "; the engine and the event are for Tracker(...).attach()"),
        (lambda: tracker(sink, metric_names=["loss"]), "Tracker() has no metric_names=: write values="),
        (lambda: metric_handler(None, "loss", engine=engine), "write MetricHandler(...).attach(engine)"),
        (lambda: supervised_trainer(None, None, amp_mode="amp"), "has no amp_mode=: write autocast_dtype="),
        (lambda: supervised_trainer(None, None, criterion=None), "has no criterion=: write loss_fn="),
        (lambda: supervised_evaluator(None, metric={}), "create_supervised_evaluator() has no metric=: metrics=?"),
        (
            lambda: optimizer_update(None, None, accumulation_steps=4),
            "OptimizerUpdate() has no accumulation_steps=: write gradient_accumulation_steps=",
        ),
    ],
)
def test_guessed_call_is_answered_by_the_right_one(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: engine.subscribe(Events.STARTED, handler, overflow="drop-oldest"), ': "drop_oldest"?'),
        (lambda: engine.subscribe(Events.STARTED, handler, on_error="raises"), ': "raise"?'),
        (lambda: engine.stream(Events.STARTED, overflow="Latest"), ': "latest"?'),
        (lambda: early_stopping(3, "accuracy", mode="Max"), ': "max"?'),
        (lambda: keep(best=1, metric="accuracy", mode="mx"), ': "max"?'),
        (lambda: tracker(sink, on_error="logs"), ': "log"?'),
        (lambda: checkpoint("checkpoints", {}, when_busy="waits"), ': "wait"?'),
        (lambda: checkpoint("checkpoints", {}, write_in="threads"), ': "thread"?'),
    ],
)
def test_guessed_word_of_a_choice_is_answered_by_the_right_one(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 -- the message is looked at below
        call()
    assert str(raised.value).endswith(message)

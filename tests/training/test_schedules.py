"""Learning-rate schedulers and averages of weights: as in the plain loop, to the last bit, also resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plain_loops import LOSS, as_numbers, assert_equal_bits, batches, build, plain_loop, record_losses
from support.record import AnyEngine
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint, Keep
from aengine.training import AverageHandler, OptimizerEvents, SchedulerHandler, create_supervised_trainer

THREADS = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
STEPPED = OptimizerEvents.OPTIMIZER_STEPPED


def warming_up(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return SequentialLR(
        optimizer,
        [LinearLR(optimizer, start_factor=0.1, total_iters=4), CosineAnnealingLR(optimizer, T_max=10)],
        milestones=[4],
    )


def chained(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return ChainedScheduler([LinearLR(optimizer, 0.1, total_iters=4), ExponentialLR(optimizer, 0.9)])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=10),
    "restarts": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, T_0=3),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.2, total_steps=20),
    "cyclic": lambda optimizer: CyclicLR(optimizer, 0.01, 0.1, step_size_up=3),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "step": lambda optimizer: StepLR(optimizer, 2, gamma=0.5),
    "sequential": warming_up,
    "chained": chained,
}


class Training:
    """A supervised trainer with a scheduler and an average, and a checkpoint that is given neither."""

    def __init__(
        self,
        directory: Path,
        make: Callable[[torch.optim.Optimizer], LRScheduler],
        event: Any = STEPPED,
        **options: Any,
    ) -> None:
        self.model, self.optimizer = build()
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.scheduler = make(self.optimizer)
        self.trainer = create_supervised_trainer(self.model, self.optimizer, LOSS, **options)
        SchedulerHandler(self.scheduler).attach(self.trainer, event)
        AverageHandler(self.average, self.model).attach(self.trainer)
        self.losses = record_losses(self.trainer)
        self.rates: list[float] = []
        self.trainer.add_event_handler(
            Events.ITERATION_STARTED, lambda: self.rates.append(self.optimizer.param_groups[0]["lr"])
        )
        state = {"model": self.model, "optimizer": self.optimizer}
        self.checkpoint = Checkpoint(directory, state, keep=Keep(every_n=1))
        self.checkpoint.attach(self.trainer, Events.ITERATION_COMPLETED)

    async def run(self, step: int | None = None) -> list[float]:
        async with self.checkpoint:
            if step is not None:
                await self.checkpoint.restore(step)
            await self.trainer.run(batches(), max_epochs=2)
        return as_numbers(self.losses)


@pytest.mark.covering(2)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # SequentialLR's own
@THREADS
@pytest.mark.parametrize("kind", SCHEDULERS)
async def test_scheduler_and_average_equal_those_of_the_plain_loop_also_resumed(
    tmp_path: Path,
    kind: str,
    thread: bool,  # noqa: FBT001 -- pytest passes it by name
) -> None:
    model, optimizer = build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    scheduler = SCHEDULERS[kind](optimizer)

    def after_step() -> None:
        scheduler.step()
        average.update_parameters(model)

    expected = plain_loop(model, optimizer, accumulate=2, after_step=after_step)
    whole = Training(tmp_path, SCHEDULERS[kind], thread=thread, gradient_accumulation_steps=2)
    assert await whole.run() == expected
    assert len(set(whole.rates)) > 2
    for step in (3, 10):
        resumed = Training(tmp_path, SCHEDULERS[kind], thread=thread, gradient_accumulation_steps=2)
        assert await resumed.run(step) == expected[step:]
        assert resumed.rates == whole.rates[step:]
        assert_equal_bits(resumed.average.state_dict(), average.state_dict())
        assert resumed.scheduler.get_last_lr() == scheduler.get_last_lr()


@THREADS
@pytest.mark.parametrize(
    ("event", "group", "changes"),
    [
        (Events.ITERATION_COMPLETED, 1, 14),
        (STEPPED, 3, 6),
        (Events.EPOCH_COMPLETED, 3, 2),
        (STEPPED(every=2), 3, 3),
    ],
    ids=["iteration", "step", "epoch", "every-second-step"],
)
async def test_scheduler_takes_a_step_at_each_firing(event: Any, group: int, changes: int, thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS, gradient_accumulation_steps=group, thread=thread)
    SchedulerHandler(StepLR(optimizer, 1, gamma=0.5)).attach(trainer, event)
    await trainer.run(batches(), max_epochs=2)
    assert optimizer.param_groups[0]["lr"] == 0.05 * 0.5**changes


async def test_plateau_is_found_in_a_metric_of_the_engine_or_another_one() -> None:
    evaluator: AnyEngine = Engine(lambda engine, batch: batch)
    evaluator.state.metrics["loss"] = torch.tensor(1.0)
    rates = []
    for metric in ("loss", lambda engine: evaluator.state.metrics["loss"]):
        model, optimizer = build()
        trainer = create_supervised_trainer(model, optimizer, LOSS)
        trainer.state.metrics["loss"] = 1.0
        plateau = ReduceLROnPlateau(optimizer, patience=1, factor=0.1)
        SchedulerHandler(plateau, metric=metric).attach(trainer, Events.EPOCH_COMPLETED)
        await trainer.run(batches(), max_epochs=3)
        assert plateau.best == 1.0
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [pytest.approx(0.005)] * 2


async def test_plateau_that_was_resumed_continues_to_count(tmp_path: Path) -> None:
    async def run(step: int | None = None) -> list[float]:
        model, optimizer = build()
        trainer = create_supervised_trainer(model, optimizer, LOSS)
        trainer.state.metrics["loss"] = 1.0
        SchedulerHandler(ReduceLROnPlateau(optimizer, patience=2), metric="loss").attach(
            trainer, Events.EPOCH_COMPLETED
        )
        rates: list[float] = []
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: rates.append(optimizer.param_groups[0]["lr"]))
        async with Checkpoint(tmp_path, {"optimizer": optimizer}, keep=Keep(every_n=1)) as checkpoint:
            checkpoint.attach(trainer, Events.EPOCH_COMPLETED)
            if step is not None:
                await checkpoint.restore(step)
            await trainer.run(batches(), max_epochs=5)
        return rates

    whole = await run()
    assert len(set(whole)) == 2
    assert await run(14) == whole[2:]


async def test_average_of_an_engine_of_ones_own_takes_in_each_iteration_or_at_its_event() -> None:
    model = torch.nn.Linear(1, 1)

    def step(engine: AnyEngine, batch: float) -> None:
        with torch.no_grad():
            model.weight.fill_(batch)

    engine: AnyEngine = Engine(step)
    average, late = AveragedModel(model), AveragedModel(model)
    AverageHandler(average, model).attach(engine)
    AverageHandler(late, model).attach(engine, Events.ITERATION_COMPLETED(after=1))
    await engine.run([1.0, 2.0, 6.0])
    assert average.state_dict()["module.weight"].item() == 3.0
    assert late.state_dict()["module.weight"].item() == 4.0


async def test_average_that_is_handed_to_the_checkpoint_too_is_saved_once(tmp_path: Path) -> None:
    model, optimizer = build()
    average = AveragedModel(model)
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    AverageHandler(average, model).attach(trainer)
    async with Checkpoint(tmp_path, {"average": average}) as checkpoint:
        checkpoint.attach(trainer, Events.EPOCH_COMPLETED)
        await trainer.run(batches())
        (info,) = checkpoint.list()
    tree = torch.load(info.path / "state.pt", weights_only=True)
    assert list(tree["handlers"]) == ["OptimizerUpdate"]
    assert tree["state"]["average"]["n_averaged"] == 7


async def test_average_is_of_a_compiled_model_as_well() -> None:
    model, optimizer = build()
    compiled: Any = torch.compile(model, backend="eager")
    average = AveragedModel(model)
    trainer = create_supervised_trainer(compiled, optimizer, LOSS)
    AverageHandler(average, compiled).attach(trainer)
    await trainer.run(batches()[:1])
    assert_equal_bits(list(average.module.parameters()), list(model.parameters()))


# Bad input


def scheduler_of(kind: str) -> Any:
    _, optimizer = build()
    return {"plateau": ReduceLROnPlateau(optimizer), "step": StepLR(optimizer, 1), "optimizer": optimizer}[kind]


@pytest.mark.parametrize(
    ("kind", "metric", "message"),
    [
        ("plateau", None, r'ReduceLROnPlateau needs a metric: SchedulerHandler\(scheduler, metric="loss"\)'),
        ("step", "loss", "StepLR takes no metric: leave metric= out"),
        ("optimizer", None, r"takes a scheduler of torch.optim.lr_scheduler, got a SGD"),
        ("plateau", 0.5, "metric= takes the name of a metric .*; got 0.5"),
    ],
    ids=str,
)
def test_scheduler_that_does_not_fit_is_refused(kind: str, metric: Any, message: str) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    with pytest.raises(TypeError, match=message):
        SchedulerHandler(scheduler_of(kind), metric=metric).attach(engine, Events.EPOCH_COMPLETED)


def test_step_of_the_optimizer_is_no_event_of_an_engine_that_does_not_tell_of_it() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="own")
    with pytest.raises(ValueError, match="engine 'own' has no event 'OPTIMIZER_STEPPED'"):
        SchedulerHandler(scheduler_of("step")).attach(engine, STEPPED)


def test_average_that_does_not_fit_is_refused() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    model, _ = build()
    average, not_one = AveragedModel(model), model
    wrong: Any = not_one
    with pytest.raises(TypeError, match=r"takes a torch.optim.swa_utils.AveragedModel, got a Sequential"):
        AverageHandler(wrong, model).attach(engine)
    with pytest.raises(TypeError, match="takes the model that is trained, got AveragedModel"):
        AverageHandler(average, average).attach(engine)
    with pytest.raises(ValueError, match="the average is one of another model: of its 6 parameters and the 2"):
        AverageHandler(average, torch.nn.Linear(2, 1)).attach(engine)


def test_scheduler_is_attached_to_an_engine_once() -> None:
    _, optimizer = build()
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    other: AnyEngine = Engine(lambda engine, batch: batch)
    scheduler = StepLR(optimizer, 2)
    schedule = SchedulerHandler(scheduler)
    schedule.attach(engine, Events.EPOCH_COMPLETED)
    with pytest.raises(RuntimeError, match="this StepLR is attached to engine 'trainer' already"):
        SchedulerHandler(scheduler).attach(engine, Events.ITERATION_COMPLETED)
    with pytest.raises(RuntimeError, match="already"):
        schedule.attach(engine, Events.EPOCH_COMPLETED)
    SchedulerHandler(StepLR(optimizer, 2)).attach(engine, Events.EPOCH_COMPLETED)
    SchedulerHandler(scheduler).attach(other, Events.EPOCH_COMPLETED)


def test_average_is_attached_to_an_engine_once() -> None:
    model, _ = build()
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    other: AnyEngine = Engine(lambda engine, batch: batch)
    average = AveragedModel(model)
    AverageHandler(average, model).attach(engine)
    with pytest.raises(RuntimeError, match="this average is attached to engine 'trainer' already"):
        AverageHandler(average, model).attach(engine, Events.EPOCH_COMPLETED)
    AverageHandler(AveragedModel(model), model).attach(engine)
    AverageHandler(average, model).attach(other)

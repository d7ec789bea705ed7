"""pytorch-ignite's handlers, unmodified, attached to our engine as it is: what they do there they do here."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ignite import ignite
from support.ignite_parity import MakeEngine, as_bits, same_on_both
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from aengine import Engine, Events, StopReason

handlers: Any = ignite.handlers
THEIRS: Any = ignite.engine.Events


def nothing(engine: Any, batch: Any) -> None: ...


def hand_on(engine: Any, batch: Any) -> Any:
    return batch


def optimizer_of(*parameters: Tensor, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(parameters or [torch.zeros(1, requires_grad=True)], lr=lr)


# Schedulers


def with_warmup(optimizer: Any) -> Any:
    return handlers.create_lr_scheduler_with_warmup(StepLR(optimizer, 2), warmup_start_value=0.01, warmup_duration=3)


def one_after_another(optimizer: Any) -> Any:
    rising = handlers.LinearCyclicalScheduler(optimizer, "lr", 0.1, 0.5, cycle_size=6)
    falling = handlers.CosineAnnealingScheduler(optimizer, "lr", 0.5, 0.01, cycle_size=4)
    return handlers.ConcatScheduler([rising, falling], [3])


def of_groups(optimizer: Any) -> Any:
    return handlers.ParamGroupScheduler(
        [handlers.LinearCyclicalScheduler(optimizer, "lr", 0.0, 1.0, cycle_size=4, param_group_index=0)]
    )


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "CosineAnnealingScheduler": lambda optimizer: handlers.CosineAnnealingScheduler(optimizer, "lr", 1.0, 0.1, 5),
    "ConcatScheduler": one_after_another,
    "LRScheduler": lambda optimizer: handlers.LRScheduler(StepLR(optimizer, 3, gamma=0.3)),
    "LinearCyclicalScheduler": lambda optimizer: handlers.LinearCyclicalScheduler(optimizer, "lr", 0.1, 0.9, 4),
    "ParamGroupScheduler": of_groups,
    "PiecewiseLinear": lambda optimizer: handlers.PiecewiseLinear(optimizer, "lr", [(2, 1.0), (5, 0.1), (6, 0.4)]),
    "create_lr_scheduler_with_warmup": with_warmup,
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
async def test_rate_is_scheduled_before_each_step(scheduler: str) -> None:
    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        rates: list[float] = []
        optimizer = optimizer_of()

        def step(engine: Any, batch: int) -> None:
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])

        engine = make(step)
        engine.add_event_handler(THEIRS.ITERATION_STARTED, SCHEDULERS[scheduler](optimizer))
        return engine, lambda: as_bits(rates)

    rates = await same_on_both(scenario, [1, 2, 3, 4], max_epochs=2)
    assert len(rates) == 8
    assert len({bits for _, bits in rates}) > 1


async def test_rate_is_reduced_on_a_plateau_of_a_metric() -> None:
    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        rates: list[float] = []
        optimizer = optimizer_of(lr=1.0)
        engine = make(nothing)
        scheduler = handlers.ReduceLROnPlateauScheduler(
            optimizer, metric_name="loss", mode="min", factor=0.5, patience=1
        )
        engine.add_event_handler(THEIRS.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(loss=1.0))
        engine.add_event_handler(THEIRS.EPOCH_COMPLETED, scheduler)
        engine.add_event_handler(THEIRS.EPOCH_COMPLETED, lambda: rates.append(optimizer.param_groups[0]["lr"]))
        return engine, lambda: rates

    assert await same_on_both(scenario, [1, 2], max_epochs=5) == [1.0, 1.0, 0.5, 0.5, 0.25]


STATE_SCHEDULERS: dict[str, Callable[[], Any]] = {
    "LambdaStateScheduler": lambda: handlers.LambdaStateScheduler(lambda event: event * 10, "it", create_new=True),
    "PiecewiseLinearStateScheduler": lambda: handlers.PiecewiseLinearStateScheduler(
        [(1, 0.0), (5, 1.0)], "it", create_new=True
    ),
    "ExpStateScheduler": lambda: handlers.ExpStateScheduler(2.0, 0.7, "it", create_new=True),
    "StepStateScheduler": lambda: handlers.StepStateScheduler(2.0, 0.7, 3, "it", create_new=True),
    "MultiStepStateScheduler": lambda: handlers.MultiStepStateScheduler(2.0, 0.7, [2, 4], "it", create_new=True),
}


@pytest.mark.parametrize("scheduler", STATE_SCHEDULERS)
async def test_attribute_of_the_state_is_scheduled(scheduler: str) -> None:
    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        seen: list[Any] = []
        engine = make(nothing)
        STATE_SCHEDULERS[scheduler]().attach(engine, THEIRS.ITERATION_COMPLETED)
        engine.add_event_handler(THEIRS.ITERATION_COMPLETED, lambda engine: seen.append(as_bits(engine.state.it)))
        return engine, lambda: seen

    seen = await same_on_both(scenario, [1, 2, 3], max_epochs=2)
    assert len(seen) == 6
    assert seen[0] != seen[-1]


async def test_sizes_of_batches_are_scheduled() -> None:
    loader: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(12)), batch_size=1)

    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        sizes: list[int] = []
        engine = make(lambda engine, batch: sizes.append(len(batch[0])))
        handlers.param_scheduler.BatchSizeScheduler(loader, lambda event: 2 + event).attach(engine)
        return engine, lambda: sizes

    assert await same_on_both(scenario, loader, max_epochs=2, epoch_length=6) == [2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]


async def test_rates_are_searched_through_and_the_run_undone() -> None:
    """FastaiLRFinder ends the run by itself, and puts the model, the optimizer and the engine back."""

    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 2.0)
        optimizer = optimizer_of(model.weight, lr=1e-3)

        def step(engine: Any, batch: float) -> float:
            optimizer.zero_grad()
            loss: Tensor = (model(torch.tensor([[batch]])) ** 2).mean()
            loss.backward()
            optimizer.step()
            return loss.item()

        engine = make(step)
        finder = handlers.FastaiLRFinder()
        search = finder.attach(engine, {"model": model, "optimizer": optimizer}, end_lr=100.0, diverge_th=1.5)
        assert search.__enter__() is engine

        def outcome() -> Any:
            rows = engine.state.iteration
            search.__exit__(None, None, None)
            state = engine.state
            assert not engine.has_event_handler(finder._log_lr_and_loss)
            return (
                rows,
                as_bits([finder.get_results(), finder.lr_suggestion(), model.weight.item()]),
                (state.iteration, state.epoch),
                optimizer.param_groups[0]["lr"],
            )

        return engine, outcome

    iterations, (_, _, weight), place, rate = await same_on_both(scenario, [1.0, 0.5, 0.7] * 10, max_epochs=2)
    assert 10 < iterations < 60  # it has diverged
    assert (weight, place, rate) == (as_bits(2.0), (0, 0), 1e-3)


async def test_search_of_rates_that_is_longer_than_the_run_extends_it() -> None:
    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        optimizer = optimizer_of()

        def step(engine: Any, batch: int) -> float:
            optimizer.step()
            return 1.0

        engine = make(step)
        finder = handlers.FastaiLRFinder()
        search = finder.attach(engine, {"optimizer": optimizer}, num_iter=7, step_mode="linear")
        search.__enter__()

        def outcome() -> Any:
            ended_at = engine.state.iteration
            search.__exit__(None, None, None)
            return ended_at, as_bits(finder.get_results())

        return engine, outcome

    with pytest.warns(UserWarning, match="without loss diverging"):
        ended_at, history = await same_on_both(scenario, [1, 2, 3], max_epochs=1)
    assert ended_at >= 7
    assert len(history["lr"]) == ended_at


# Weights


@pytest.mark.parametrize("buffers", ["copy", "update"])
async def test_moving_average_of_the_weights_is_kept(buffers: str) -> None:
    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        seen: list[Any] = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(engine: Any, batch: Tensor) -> None:
            optimizer.zero_grad()
            model(batch).pow(2).sum().backward()
            optimizer.step()

        engine = make(step)
        average = handlers.EMAHandler(model, momentum=0.1, momentum_warmup=0.5, warmup_iters=4, handle_buffers=buffers)
        average.attach(engine, name="ema_momentum")

        def look(engine: Any) -> None:
            seen.append(as_bits([engine.state.ema_momentum, dict(average.ema_model.state_dict())]))

        engine.add_event_handler(THEIRS.ITERATION_COMPLETED, look)
        return engine, lambda: seen

    data = list(torch.rand(5, 4, 2, generator=torch.Generator().manual_seed(0)))
    seen = await same_on_both(scenario, data)
    assert len({str(one) for one in seen}) == 5


# Checkpoints


def files(folder: Path) -> dict[str, Any]:
    return {path.name: as_bits(torch.load(path, weights_only=True)) for path in sorted(folder.iterdir())}


async def test_checkpoint_writes_the_files_that_it_writes_there(tmp_path: Path) -> None:
    made: list[Path] = []

    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        made.append(folder := tmp_path / str(len(made)))
        model, saved = nn.Linear(1, 1, bias=False), []
        trainer = make(lambda engine, batch: nn.init.constant_(model.weight, engine.state.iteration))
        checkpoint = handlers.Checkpoint(
            {"model": model},
            handlers.DiskSaver(str(folder), require_empty=False),
            n_saved=2,
            score_function=lambda engine: -abs(engine.state.epoch - 2),
            score_name="score",
            global_step_transform=handlers.global_step_from_engine(trainer),
        )
        trainer.add_event_handler(THEIRS.EPOCH_COMPLETED, checkpoint)
        trainer.add_event_handler(
            THEIRS.EPOCH_COMPLETED(once=1),
            lambda: trainer.add_event_handler(
                handlers.checkpoint.CheckpointEvents.SAVED_CHECKPOINT,
                lambda engine: saved.append((engine.state.epoch, Path(checkpoint.last_checkpoint).name)),
            ),
        )
        return trainer, lambda: (files(folder), saved)

    written, saved = await same_on_both(scenario, [1, 2, 3], max_epochs=4)
    assert list(written) == ["model_1_score=-1.pt", "model_2_score=0.pt"]
    assert saved == [(2, "model_2_score=0.pt")]


async def test_model_checkpoint_keeps_the_last_ones(tmp_path: Path) -> None:
    made: list[Path] = []

    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        made.append(folder := tmp_path / str(len(made)))
        model = nn.Linear(1, 1, bias=False)
        trainer = make(lambda engine, batch: nn.init.constant_(model.weight, engine.state.iteration))
        checkpoint = handlers.ModelCheckpoint(str(folder), "run", n_saved=2)
        trainer.add_event_handler(THEIRS.ITERATION_COMPLETED(every=2), checkpoint, {"model": model})
        return trainer, lambda: files(folder)

    assert list(await same_on_both(scenario, [1, 2, 3], max_epochs=3)) == ["run_model_6.pt", "run_model_8.pt"]


def test_checkpoint_of_ignite_resumes_our_engine(tmp_path: Path) -> None:
    def step(engine: Any, batch: int) -> None:
        batches.append((engine.state.epoch, batch))

    batches: list[tuple[int, int]] = []
    trainer: Any = Engine(step)
    model = nn.Linear(1, 1)
    checkpoint = handlers.Checkpoint(
        {"model": model, "trainer": trainer}, handlers.DiskSaver(str(tmp_path)), n_saved=None
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), checkpoint)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda engine: engine.terminate())
    trainer.run_sync([1, 2, 3], max_epochs=2)

    (saved,) = tmp_path.iterdir()
    resumed: Any = Engine(step)
    other = nn.Linear(1, 1)
    handlers.Checkpoint.load_objects(
        {"model": other, "trainer": resumed}, checkpoint=torch.load(saved, weights_only=True)
    )
    assert torch.equal(model.weight, other.weight)
    del batches[:]
    resumed.run_sync([1, 2, 3])
    assert batches == [(2, 2), (2, 3)]


# Stops, times and outputs


async def test_run_ends_when_the_output_is_not_a_number() -> None:
    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        engine = make(hand_on)
        engine.add_event_handler(THEIRS.ITERATION_COMPLETED, handlers.TerminateOnNan())
        return engine, lambda: engine.state.iteration

    assert await same_on_both(scenario, [1.0, math.nan, 2.0]) == 2


def test_run_ends_when_its_time_is_up() -> None:
    engine: Any = Engine(nothing)
    limit = handlers.TimeLimit(limit_sec=1)
    limit.start_time -= 2
    engine.add_event_handler(Events.ITERATION_COMPLETED, limit)
    state = engine.run_sync([1, 2])
    assert (state.iteration, state.stop_reason) == (1, StopReason.TERMINATED)


async def test_outputs_of_an_epoch_are_stored() -> None:
    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        engine = make(lambda engine, batch: batch * 2)
        store = handlers.EpochOutputStore()
        store.attach(engine, "outputs")
        return engine, lambda: (store.data, engine.state.outputs)

    assert await same_on_both(scenario, [1, 2, 3], max_epochs=2) == ([2, 4, 6], [2, 4, 6])


async def test_timer_measures_between_the_events_it_is_given() -> None:
    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        engine = make(nothing)
        timer = handlers.Timer(average=True)
        timer.attach(
            engine,
            start=THEIRS.EPOCH_STARTED,
            pause=THEIRS.ITERATION_COMPLETED,
            resume=THEIRS.ITERATION_STARTED,
            step=THEIRS.ITERATION_COMPLETED,
        )
        stood: list[tuple[str, bool]] = []
        for event in (THEIRS.STARTED, THEIRS.EPOCH_STARTED, THEIRS.ITERATION_STARTED, THEIRS.ITERATION_COMPLETED):
            engine.add_event_handler(event, lambda name: stood.append((name, timer.running)), event.name)
        return engine, lambda: (timer.step_count, stood, 0 < timer.value() < 10)

    count, stood, is_sound = await same_on_both(scenario, [1, 2, 3], max_epochs=2)
    assert (count, is_sound) == (3, True)
    assert {running for name, running in stood if name == "ITERATION_COMPLETED"} == {False}


async def test_step_of_ignites_factory_trains_as_it_does_there() -> None:
    """Its factories of steps need but `engine.state.iteration`."""

    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses: list[float] = []
        engine = make(ignite.engine.supervised_training_step(model, optimizer, nn.functional.cross_entropy))
        engine.add_event_handler(THEIRS.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
        return engine, lambda: as_bits(losses)

    chance = torch.Generator().manual_seed(0)
    data = [(torch.rand(4, 3, generator=chance), torch.randint(3, (4,), generator=chance)) for _ in range(6)]
    assert len(await same_on_both(scenario, data, max_epochs=2)) == 12

"""The range test draws the curve of the plain loop, and leaves no trace, however it ends."""

import copy
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import anyio
import pytest
import torch
from support.backends import Backend
from support.ignite import ignite
from support.plain_loops import LOSS, WIDTH, as_numbers, assert_equal_bits, batches, build, record_losses
from support.record import AnyEngine, Boom
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from aengine import Engine, EngineBusy, Events
from aengine.checkpoint import Checkpoint
from aengine.engine import stateful_listeners
from aengine.training import (
    AverageHandler,
    GradientEvents,
    GradientStatistics,
    LRRange,
    OptimizerEvents,
    SchedulerHandler,
    create_supervised_trainer,
    lr_range_test,
)

THREADS = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


def geometric(start: float, end: float, steps: int) -> list[float]:
    return [start * (end / start) ** (step / (steps - 1)) for step in range(steps)]


RATES = geometric(1e-3, 1e-1, steps=10)


def plain_curve(rates: list[float], *, accumulate: int = 1) -> list[float]:
    """The loop that everybody writes. Returns the mean loss of each group of batches."""
    model, optimizer = build()
    losses: list[float] = []
    found: list[float] = []
    while True:
        for number, (x, y) in enumerate(batches(), start=1):
            optimizer.param_groups[0]["lr"] = rates[len(found)]
            loss = LOSS(model(x), y)
            last = len(batches()) % accumulate
            size = last if number > len(batches()) - last else accumulate
            (loss / size if size > 1 else loss).backward()
            losses.append(loss.item())
            if number % accumulate == 0 or number == len(batches()):
                optimizer.step()
                optimizer.zero_grad()
                found.append(sum(losses) / len(losses))
                losses.clear()
                if len(found) == len(rates):
                    return found


def assert_same(left: Any, right: Any, place: str = "") -> None:
    """Of whatever a state is made of, texts included."""
    assert type(left) is type(right), place
    if isinstance(left, torch.Tensor):
        assert_equal_bits(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right), place
        for name in left:
            assert_same(left[name], right[name], f"{place}/{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), place
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{place}/{number}")
    else:
        assert left == right, place


# The curve


@THREADS
@pytest.mark.parametrize("accumulate", [1, 3])
async def test_curve_is_that_of_the_plain_loop(accumulate: int, *, thread: bool) -> None:
    expected = plain_curve(RATES, accumulate=accumulate)
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS, gradient_accumulation_steps=accumulate, thread=thread)
    found = await lr_range_test(trainer, model, optimizer=optimizer, data=batches(), rates=RATES)
    assert (list(found.lrs), list(found.losses)) == (RATES, expected)
    assert len(set(expected)) == len(RATES)
    assert not found.has_diverged


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_rate_grows_with_the_steps_that_a_step_of_ones_own_makes(kind: str) -> None:
    """It counts its batches by the engine's counter, as one does with pytorch-ignite."""
    expected = plain_curve(RATES[:6], accumulate=2)
    model, optimizer = build()

    def plain(engine: AnyEngine, batch: Any) -> dict[str, torch.Tensor]:
        loss = LOSS(model(batch[0]), batch[1])
        of_epoch = engine.state.iteration - engine.state.epoch_start
        is_alone = of_epoch % 2 == 1 and of_epoch == engine.state.epoch_length
        (loss if is_alone else loss / 2).backward()
        if of_epoch % 2 == 0 or is_alone:
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss.detach()}

    async def asynchronous(engine: AnyEngine, batch: Any) -> dict[str, torch.Tensor]:
        await anyio.lowlevel.checkpoint()
        return plain(engine, batch)

    trainer: AnyEngine = Engine(plain if kind == "plain" else asynchronous)
    found = await lr_range_test(
        trainer,
        model,
        optimizer=optimizer,
        data=batches(),
        rates=RATES[:6],
        output_transform=lambda output: output["loss"],
    )
    assert list(found.losses) == expected


async def test_curve_is_that_of_pytorch_ignite() -> None:
    """With the rates that its optimizer had. It writes each loss down beside the rate of the step after it, and takes
    its first step with a rate made of the optimizer's own: here one that comes before the others.
    """
    steps, start, end = 40, 1e-4, 10.0
    model, optimizer = build()
    optimizer.param_groups[0]["lr"] = (start / end ** (1 / steps)) ** (1 / (1 - 1 / steps))
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    theirs = ignite.engine.create_supervised_trainer(model, optimizer, LOSS)
    finder = ignite.handlers.FastaiLRFinder()
    torch.manual_seed(5)
    with finder.attach(
        theirs, {"model": model, "optimizer": optimizer}, num_iter=steps, start_lr=start, end_lr=end
    ) as attached:
        attached.run(batches())
    expected = finder.get_results()

    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    torch.manual_seed(5)
    found = await lr_range_test(trainer, model, optimizer=optimizer, data=batches(), rates=[*used, 20.0])
    assert found.has_diverged
    assert list(found.lrs) == used
    assert list(found.smoothed) == expected["loss"]
    assert used[1:] == expected["lr"][: len(used) - 1]
    assert expected["lr"][used.index(found.suggestion)] == finder.lr_suggestion()


async def test_test_ends_where_the_loss_diverges_also_into_what_is_no_number() -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    found = await lr_range_test(
        trainer, model, optimizer=optimizer, data=batches(), rates=geometric(1e-3, 1e30, steps=60)
    )
    assert found.has_diverged
    assert 3 < len(found.losses) < 60
    assert len(found.lrs) == len(found.losses) == len(found.smoothed)
    assert all(map(math.isfinite, found.losses))
    numbers = iter([1.0, 2.0, math.nan])
    stepper: AnyEngine = Engine(lambda engine, batch: (optimizer.step(), next(numbers))[1])
    assert await lr_range_test(
        stepper, model, optimizer=optimizer, data=batches(), rates=RATES, smoothing=1
    ) == LRRange(tuple(RATES[:2]), (1.0, 2.0), (1.0, 2.0), has_diverged=True)


@pytest.mark.parametrize(
    ("losses", "count"), [([-1.0, -2.0, -1.5, -1.0, 5.9, 6.1, 7.0], 6), ([1.0, 0.5, 2.4, 2.6, 3.0], 4)]
)
async def test_loss_below_zero_diverges_by_as_much_as_one_above(losses: list[float], count: int) -> None:
    model, optimizer = build()
    numbers = iter(losses)
    trainer: AnyEngine = Engine(lambda engine, batch: (optimizer.step(), next(numbers))[1])
    found = await lr_range_test(trainer, model, optimizer=optimizer, data=batches(), rates=RATES, smoothing=1)
    assert (len(found.losses), found.has_diverged) == (count, True)


def test_suggestions_are_read_off_the_smoothed_curve() -> None:
    found = LRRange((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (0.0,) * 6, (9.0, 8.5, 6.0, 4.0, 3.5, 5.0), has_diverged=False)
    assert found.suggestion == 3.0
    assert found.tenth_of_minimum == 0.5
    with pytest.raises(ValueError, match="the loss never falls in the 3 steps"):
        _ = LRRange((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (1.0, 2.0, 3.0), has_diverged=False).suggestion
    with pytest.raises(ValueError, match="the test has no points"):
        _ = LRRange((), (), (), has_diverged=True).tenth_of_minimum


async def test_rates_are_by_default_a_hundred_from_very_low_to_very_high() -> None:
    model, optimizer = build()
    trainer: AnyEngine = Engine(lambda engine, batch: (optimizer.step(), 1.0)[1])
    found = await lr_range_test(trainer, model, optimizer=optimizer, data=batches())
    assert found.lrs == pytest.approx(torch.logspace(-7, 1, 100, dtype=torch.float64).tolist())


async def test_suggested_rate_trains_better_than_one_far_below_it() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(256, WIDTH)
    data = DataLoader(TensorDataset(inputs, inputs.square().sum(1, keepdim=True)), batch_size=32, shuffle=True)
    ends: list[float] = []
    for factor in (1.0, 0.01):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        optimizer = torch.optim.Adam(model.parameters())
        trainer = create_supervised_trainer(model, optimizer, LOSS)
        losses = record_losses(trainer)
        found = await lr_range_test(trainer, model, optimizer=optimizer, data=data)
        optimizer.param_groups[0]["lr"] = found.suggestion * factor
        await trainer.run(data, max_epochs=10)
        ends.append(sum(as_numbers(losses[-8:])))
    assert ends[0] < ends[1] / 2


# Parameter groups


async def test_ratios_between_parameter_groups_stay_also_of_those_that_a_schedule_began_with_nothing() -> None:
    model, _ = build()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters(), "lr": 1.0}]
    )
    LambdaLR(optimizer, lambda step: step / 10)  # warming up from 0
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append([g["lr"] for g in optimizer.param_groups]))
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    found = await lr_range_test(trainer, model, optimizer=optimizer, data=batches(), rates=[0.01, 0.02, 0.03])
    assert seen == [[0.01, pytest.approx(0.1)], [0.02, pytest.approx(0.2)], [0.03, pytest.approx(0.3)]]
    assert found.lrs == (0.01, 0.02, 0.03)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


async def test_rate_that_is_a_tensor_stays_that_tensor() -> None:
    model, _ = build()
    rate = torch.tensor(0.01)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=False)
    before = copy.deepcopy(optimizer.state_dict())
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    await lr_range_test(trainer, model, optimizer=optimizer, data=batches(), rates=RATES)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == torch.tensor(0.01)
    assert_same(optimizer.state_dict(), before)


# Nothing is left of it


class Sized(torch.nn.Module):
    """Counts its calls in a buffer that no state_dict has, and keeps its last input in one that it exchanges."""

    calls: torch.Tensor
    last: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("last", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = x.detach().sum()
        return x * (1 + 0.01 * self.calls)


class Training:
    """A trainer in the middle of its run, and of a group of batches, with all that has a state."""

    def __init__(self, thread: bool) -> None:  # noqa: FBT001 -- read as what it is
        self.act: Callable[[int], object] = lambda count: None
        self.count = 0
        torch.manual_seed(3)
        random.seed(4)
        base, _ = build()
        self.model = torch.nn.Sequential(base, Sized())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.scheduler = OneCycleLR(self.optimizer, 0.05, total_steps=100)
        self.average = AveragedModel(self.model)
        self.trainer = create_supervised_trainer(
            self.model,
            self.optimizer,
            self.loss,
            scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3),
            gradient_accumulation_steps=2,
            thread=thread,
        )
        self.data = DataLoader(
            TensorDataset(*(torch.cat(several) for several in zip(*batches(), strict=True))),
            batch_size=4,
            shuffle=True,
            generator=torch.Generator().manual_seed(6),
        )
        SchedulerHandler(self.scheduler).attach(self.trainer, OptimizerEvents.OPTIMIZER_STEPPED)
        AverageHandler(self.average, self.model).attach(self.trainer)
        self.losses = record_losses(self.trainer)
        self.trainer.state.seen = ["begun"]
        self.trainer.state.metrics["accuracy"] = 0.5

    def loss(self, predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.act(self.count)
        self.trainer.state.seen.append(self.count)
        self.trainer.state.metrics["count"] = self.count
        return LOSS(predicted + random.gauss(0, 0.01), wanted)

    async def begin(self) -> None:
        handle = self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), self.trainer.terminate)
        await self.trainer.run(self.data, max_epochs=4)
        handle.remove()
        assert self.trainer.state.iteration == 5

    async def test(self) -> LRRange:
        return await lr_range_test(
            self.trainer, self.model, optimizer=self.optimizer, data=self.data, rates=geometric(1e-3, 1e-1, steps=30)
        )

    def all(self) -> dict[str, Any]:
        state = {
            name: copy.copy(value)
            for name, value in vars(self.trainer.state).items()
            if name not in ("_dataloader", "output")
        }
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "buffers": dict(self.model.named_buffers()),
                "gradients": [one.grad for one in self.model.parameters()],
                "modes": [one.training for one in self.model.modules()],
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "average": self.average.state_dict(),
                "listeners": [one.state_dict() for one in stateful_listeners(self.trainer)[:1]],
                "random": (torch.get_rng_state(), torch.tensor(random.getstate()[1])),
                "data": self.data.generator.get_state(),
                "engine": self.trainer.state_dict(),
                "state": {name: value for name, value in state.items() if name != "stop_reason"},
            }
        )


async def to_the_end(training: Training) -> None:
    found = await training.test()
    assert len(found.losses) == 30


async def diverging(training: Training) -> None:
    rates = geometric(1e-2, 1e20, steps=40)
    found = await lr_range_test(
        training.trainer, training.model, optimizer=training.optimizer, data=training.data, rates=rates
    )
    assert found.has_diverged


async def failing(training: Training) -> None:
    def fail(count: int) -> None:
        if count == 9:
            raise Boom

    training.act = fail
    with pytest.raises(Boom):
        await training.test()


async def failing_data(training: Training) -> None:
    def data() -> Iterator[Any]:
        yield from batches()
        raise Boom

    with pytest.raises(Boom):
        await lr_range_test(training.trainer, training.model, optimizer=training.optimizer, data=data)


async def cancelled_in_a_step(training: Training) -> None:
    started, token = anyio.Event(), anyio.lowlevel.current_token()

    def tell(count: int) -> None:
        if count == 9 and training.trainer._session.threaded:
            anyio.from_thread.run_sync(started.set, token=token)
        elif count == 9:
            started.set()

    training.act = tell
    await cancel_when(started, training.test)


async def cancelled_between_steps(training: Training) -> None:
    arrived = anyio.Event()

    async def data() -> Any:
        for batch in batches():
            yield batch
        arrived.set()
        await anyio.sleep_forever()

    await cancel_when(
        arrived, partial(lr_range_test, training.trainer, training.model, optimizer=training.optimizer, data=data)
    )


WAYS = [
    *((way, thread) for way in (to_the_end, cancelled_in_a_step) for thread in (True, False)),
    *((way, True) for way in (diverging, failing, failing_data, cancelled_between_steps)),
]


async def cancel_when(event: anyio.Event, function: Callable[[], Any]) -> None:
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            @tasks.start_soon
            async def cancel() -> None:
                await event.wait()
                scope.cancel()

            await function()
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    ("way", "thread"), WAYS, ids=lambda one: "loop" if one is False else getattr(one, "__name__", "worker")
)
async def test_everything_is_as_it_was_and_the_training_continues_as_if_not(way: Any, *, thread: bool) -> None:
    untested, tested = Training(thread), Training(thread)
    expected: Any = None
    for training in (untested, tested):
        training.__init__(thread)  # type: ignore[misc]  # so that both begin with the same random numbers
        await training.begin()
        if training is tested:
            before, objects = training.all(), [*training.model.parameters(), *training.model.buffers()]
            await way(training)
            training.act = lambda count: None
            assert_same(training.all(), before)
            now = [*training.model.parameters(), *training.model.buffers()]
            assert all(one is other for one, other in zip(now, objects, strict=True))
        await training.trainer.run(training.data)
        if training is untested:
            expected = as_numbers(training.losses)
    assert as_numbers(tested.losses) == expected
    assert len(set(expected)) == 28
    assert_equal_bits(tested.average.state_dict(), untested.average.state_dict())
    assert not tested.optimizer._optimizer_step_post_hooks


async def test_trainer_that_was_not_run_is_as_new() -> None:
    model, optimizer = build()
    model[1].eval()  # the step has all of it in training mode
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), trainer.state_dict(), vars(trainer.state)))
    await lr_range_test(trainer, model, optimizer=optimizer, data=batches(), rates=RATES)
    assert_same((model.state_dict(), optimizer.state_dict(), trainer.state_dict(), vars(trainer.state)), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not optimizer.state
    assert [module.training for module in model] == [True, False, True, True]


async def test_state_of_an_optimizer_in_float32_of_parameters_in_bfloat16_keeps_its_bits() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    model = torch.nn.Module()
    model.weight = parameter
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = torch.full((3,), 1 + 2**-20)
    optimizer.state[parameter]["master"] = kept.clone()

    def step(engine: AnyEngine, batch: Any) -> float:
        optimizer.state[parameter]["master"] += 1
        optimizer.step()
        return 1.0

    await lr_range_test(Engine(step), model, optimizer=optimizer, data=batches(), rates=RATES)
    assert torch.equal(optimizer.state[parameter]["master"], kept)


async def test_handlers_and_checkpoints_of_the_trainer_hear_nothing(tmp_path: Any) -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    heard: list[str] = []
    for event in (*Events, OptimizerEvents.OPTIMIZER_STEPPED):
        trainer.add_event_handler(event, heard.append, event.name)
    async with Checkpoint(tmp_path, {"model": model, "optimizer": optimizer}) as checkpoint:
        checkpoint.attach(trainer, Events.ITERATION_COMPLETED)
        await lr_range_test(trainer, model, optimizer=optimizer, data=batches(), rates=RATES)
        assert not checkpoint.list()
    assert not heard


async def test_gradient_statistics_show_nothing_of_the_test() -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    gradients = GradientStatistics(model, optimizer, every=2)
    gradients.attach(trainer)
    measured: list[int] = []
    trainer.add_event_handler(GradientEvents.GRADIENTS_MEASURED, lambda engine: measured.append(engine.state.iteration))
    await lr_range_test(trainer, model, optimizer=optimizer, data=batches(), rates=RATES)
    assert gradients.values() == {}
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), trainer.terminate)
    await trainer.run(batches())
    before = gradients.values()
    await lr_range_test(trainer, model, optimizer=optimizer, data=batches(), rates=RATES)
    assert [*map(id, gradients.values().values())] == [*map(id, before.values())]
    await trainer.run(batches())
    assert measured == [2, 4, 6]


async def test_what_else_the_step_changes_is_put_back_if_it_is_named() -> None:
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)

    def step(engine: AnyEngine, batch: Any) -> float:
        optimizer.zero_grad()
        loss = LOSS(model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # not taken while the scale is too large
        scaler.update()
        return loss.item()

    found = await lr_range_test(
        Engine(step), model, optimizer=optimizer, data=batches(), rates=RATES, preserve=[scaler]
    )
    assert len(found.losses) == len(RATES)
    assert scaler.get_scale() == 2.0**40


async def test_interrupted_trainer_continues_where_it_was() -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    data = batches()
    handle = trainer.add_event_handler(Events.ITERATION_STARTED(once=3), trainer.interrupt)
    await trainer.run(data)
    handle.remove()
    await lr_range_test(trainer, model, optimizer=optimizer, data=batches(), rates=RATES)
    assert trainer.state.iteration == 3
    assert trainer.state.batch is data[2]
    state = await trainer.run()
    assert state.iteration == 7


def test_it_needs_no_event_loop_that_runs_already(anyio_backend: Backend) -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    test = partial(lr_range_test, trainer, model, optimizer=optimizer, data=batches(), rates=RATES)
    found = anyio.run(test, backend=anyio_backend[0], backend_options=anyio_backend[1])
    assert list(found.losses) == plain_curve(RATES)


# What is refused


async def test_trainer_that_runs_is_refused_and_one_that_is_tested_is_busy() -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS)

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    async def test() -> None:
        await lr_range_test(trainer, model, optimizer=optimizer, data=batches(), rates=RATES)

    with pytest.raises(EngineBusy):
        await trainer.run(batches())

    async def data() -> Any:
        yield batches()[0]
        await trainer.run(batches())

    other = create_supervised_trainer(*build(), LOSS)
    trainer = other
    with pytest.raises(EngineBusy):
        await lr_range_test(other, model, optimizer=optimizer, data=data)
    assert not other.is_running


async def test_optimizer_that_the_step_does_not_step_is_found_out() -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = 1e-6
    with pytest.raises(RuntimeError, match="1000 iterations have passed without a step of the optimizer"):
        await lr_range_test(trainer, model, optimizer=other, data=batches())


@pytest.mark.parametrize("output", [None, "text", {"loss": 1.0}, torch.ones(2)], ids=["none", "text", "dict", "two"])
async def test_output_that_is_no_loss_is_refused(output: Any) -> None:
    model, optimizer = build()
    trainer: AnyEngine = Engine(lambda engine, batch: output)
    with pytest.raises(TypeError, match="take it from there, as by  output_transform="):
        await lr_range_test(trainer, model, optimizer=optimizer, data=batches(), rates=RATES)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"rates": [1.0, 0.5, 2.0]}, ValueError, "rising, from more than 0"),
        ({"rates": [0.0, 0.5, 2.0]}, ValueError, "rising, from more than 0"),
        ({"rates": [1.0, 2.0]}, ValueError, "are 3 or more"),
        ({"smoothing": 0}, ValueError, "smoothing= is the weight of a new loss"),
        ({"smoothing": 1.5}, ValueError, "smoothing= is the weight of a new loss"),
        ({"divergence": 1}, ValueError, "divergence= is how many times"),
        ({"model": [torch.nn.Linear(1, 1)]}, TypeError, "several as torch.nn.ModuleList"),
        ({"rates": 100}, TypeError, r"rates= are several, such as torch.logspace\(.*; got 100"),
        ({"trainer": torch.nn.Linear(1, 1)}, TypeError, "takes the engine that trains the model first, got Linear"),
        ({"optimizer": "SGD"}, TypeError, "needs an optimizer of torch.optim"),
    ],
    ids=["falling", "zero", "two", "no-smoothing", "too-much", "no-divergence", "list", "number", "model", "text"],
)
async def test_wrong_arguments_are_refused(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    given: dict[str, Any] = {"trainer": trainer, "model": model, "optimizer": optimizer, **change}
    with pytest.raises(kind, match=message):
        await lr_range_test(data=batches(), **given)


async def test_first_group_without_a_rate_is_refused_where_others_have_one() -> None:
    model, _ = build()
    groups: list[dict[str, Any]] = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[3].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    with pytest.raises(ValueError, match="make a group whose rate is not 0 the first one"):
        await lr_range_test(trainer, model, optimizer=optimizer, data=batches())

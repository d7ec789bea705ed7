"""The supervised trainer and evaluator do what the plain loop does, to the last bit, on the worker and off it."""

import logging
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plain_loops import (
    BATCH,
    LOSS,
    SGD_OF_HALF,
    WIDTH,
    Unsized,
    as_numbers,
    assert_equal_bits,
    batches,
    build,
    plain_loop,
    record_losses,
)
from support.record import AnyEngine, Boom
from torch.nn.utils import clip_grad_value_
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MeanSquaredError

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint, Keep
from aengine.engine import stateful_listeners
from aengine.errors import CheckpointMismatch
from aengine.training import (
    OptimizerEvents,
    OptimizerUpdate,
    create_supervised_evaluator,
    create_supervised_trainer,
    evaluating,
    prepare_batch,
    supervised_training_step,
)
from aengine.training.supervised import move

THREADS = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])

# The arguments of the trainer, and the same for the plain loop.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 3}, {"accumulate": 3}),
    "clipping": ({"clip_gradients": 0.5}, {"norm": 0.5}),
    "bfloat16": ({"autocast_dtype": torch.bfloat16}, {"dtype": torch.bfloat16}),
    "accumulation, clipping, bfloat16": (
        {"gradient_accumulation_steps": 4, "clip_gradients": 0.3, "autocast_dtype": torch.bfloat16},
        {"accumulate": 4, "norm": 0.3, "dtype": torch.bfloat16},
    ),
}


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)  # so large that it must back off at first


@THREADS
@pytest.mark.parametrize("variant", VARIANTS)
async def test_losses_equal_those_of_the_plain_loop(variant: str, thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    ours, theirs = VARIANTS[variant]
    plain_model, plain_optimizer = build()
    expected = plain_loop(plain_model, plain_optimizer, **theirs)
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS, thread=thread, **ours)
    losses = record_losses(trainer)
    await trainer.run(batches(), max_epochs=2)
    assert as_numbers(losses) == expected
    assert len(set(expected)) == 14
    assert_equal_bits(model.state_dict(), plain_model.state_dict())


@THREADS
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
async def test_gradient_scaler_scales_as_in_the_plain_loop(dtype: torch.dtype | None, thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    plain_model, plain_optimizer = build()
    plain_scaler = scaler()
    expected = plain_loop(plain_model, plain_optimizer, scaler=plain_scaler, dtype=dtype, norm=0.5, accumulate=2)
    model, optimizer = build()
    own = scaler()
    trainer = create_supervised_trainer(
        model,
        optimizer,
        LOSS,
        autocast_dtype=dtype,
        scaler=own,
        clip_gradients=0.5,
        gradient_accumulation_steps=2,
        thread=thread,
    )
    losses = record_losses(trainer)
    await trainer.run(batches(), max_epochs=2)
    assert as_numbers(losses) == expected
    assert own.state_dict() == plain_scaler.state_dict()
    assert_equal_bits(model.state_dict(), plain_model.state_dict())


async def test_weights_that_were_cast_for_one_step_are_not_used_in_the_next() -> None:
    """Though the caller's autocast continues, which alone would forget them."""
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS, autocast_dtype=torch.bfloat16, thread=False)
    evaluator = create_supervised_evaluator(model, autocast_dtype=torch.bfloat16, thread=False)
    losses = record_losses(trainer)
    predictions: list[torch.Tensor] = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        await trainer.run(batches(), max_epochs=2)
        for scale in (1.0, 0.0):
            with torch.no_grad():
                for parameter in model[3].parameters():
                    parameter.mul_(scale)
            await evaluator.run(batches()[:1])
            predictions.append(evaluator.state.output[0])
    plain_model, plain_optimizer = build()
    assert as_numbers(losses) == plain_loop(plain_model, plain_optimizer, dtype=torch.bfloat16)
    assert predictions[0].any()
    assert not predictions[1].any()


async def test_compiled_model_is_trained_as_it_is() -> None:
    plain_model, plain_optimizer = build()
    expected = plain_loop(plain_model, plain_optimizer)
    model, optimizer = build()
    compiled: Any = torch.compile(model, backend="eager")
    trainer = create_supervised_trainer(compiled, optimizer, LOSS)
    losses = record_losses(trainer)
    await trainer.run(batches(), max_epochs=2)
    assert as_numbers(losses) == expected
    evaluator = create_supervised_evaluator(compiled)
    await evaluator.run(batches()[:1])
    with torch.no_grad():
        assert_equal_bits(evaluator.state.output[0], model.eval()(batches()[0][0]))


async def test_clipping_may_be_a_function_of_the_parameters() -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(
        model, optimizer, LOSS, clip_gradients=partial(clip_grad_value_, clip_value=1e-3)
    )
    await trainer.run(batches()[:1])
    assert max(float(parameter.grad.abs().max()) for parameter in model.parameters() if parameter.grad is not None) == (
        pytest.approx(1e-3)
    )


# Accumulation


def stepped(engine: AnyEngine) -> list[int]:
    """Return the list that is going to hold the iterations at which the optimizer was stepped."""
    seen: list[int] = []

    def note(engine: AnyEngine, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(optimizer, torch.optim.Optimizer)
        seen.append(engine.state.iteration)

    engine.add_event_handler(OptimizerEvents.OPTIMIZER_STEPPED, note)
    return seen


def accumulating(steps: int, **options: Any) -> tuple[AnyEngine, torch.nn.Module]:
    model, optimizer = build()
    return create_supervised_trainer(model, optimizer, LOSS, gradient_accumulation_steps=steps, **options), model


@THREADS
async def test_optimizer_is_stepped_at_the_end_of_each_group_and_epoch(thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    trainer, _ = accumulating(3, thread=thread)
    seen = stepped(trainer)
    await trainer.run(batches(), max_epochs=2)
    assert seen == [3, 6, 7, 10, 13, 14]


async def test_last_group_of_data_of_unknown_length_is_stepped_on_at_the_end_of_the_epoch() -> None:
    plain_model, plain_optimizer = build()
    expected = plain_loop(plain_model, plain_optimizer, accumulate=3, knows_length=False)
    trainer, model = accumulating(3)
    seen, losses = stepped(trainer), record_losses(trainer)
    await trainer.run(lambda: iter(batches()), max_epochs=2)
    assert seen == [3, 6, 7, 10, 13, 14]
    # Not to the last bit: the gradients are divided by their number when that is known.
    assert as_numbers(losses) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(model.state_dict(), plain_model.state_dict())


async def test_last_group_of_a_run_that_ends_by_iterations_is_stepped_on() -> None:
    trainer, _ = accumulating(4)
    seen = stepped(trainer)
    await trainer.run(batches(), max_iters=6)
    assert seen == [4, 6]


async def test_group_of_an_epoch_that_is_terminated_is_stepped_on() -> None:
    trainer, _ = accumulating(4)
    seen = stepped(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.terminate_epoch)
    await trainer.run(batches(), max_epochs=2)
    assert seen == [2, 6, 9]


def slope_trainer(steps: int, **options: Any) -> tuple[AnyEngine, torch.nn.Linear]:
    """A trainer whose batches have the gradients that they are: each of its steps moves the weight by their mean."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    update = OptimizerUpdate(model, optimizer, gradient_accumulation_steps=steps, **options)

    def step(engine: AnyEngine, batch: Any) -> None:
        slope, weight = batch if isinstance(batch, tuple) else (batch, None)
        update.zero_grad()
        loss = model(torch.full((1, 1), float(slope))).mean()
        update(engine, loss, **({} if weight is None else {"weight": weight}))

    engine: AnyEngine = Engine(step, thread=False)
    update.attach(engine)
    return engine, model


def moves(engine: AnyEngine, model: torch.nn.Linear) -> list[float]:
    """Return the list that is going to hold by how much each step of the optimizer moves the weight."""
    at, moved = [0.0], []

    def note() -> None:
        at.append(-model.weight.item())
        moved.append(round(at[-1] - at[-2], 4))

    engine.add_event_handler(OptimizerEvents.OPTIMIZER_STEPPED, note)
    return moved


UNEVEN = [1.0, 2.0, 3.0, 6.0, 5.0]  # of groups of four: the means 3 and 5; of three: 2 and 5.5


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (UNEVEN, {}, [3.0, 5.0]),
        (UNEVEN, {"max_epochs": 2}, [3.0, 5.0, 3.0, 5.0]),
        (UNEVEN[:1], {}, [1.0]),
        (UNEVEN, {"max_iters": 3}, [2.0]),
        (UNEVEN, {"max_iters": 7}, [3.0, 5.0, 1.5]),
        (UNEVEN, {"epoch_length": 3}, [2.0]),
        (lambda: iter(UNEVEN), {}, [3.0, 5.0]),  # of unknown length
    ],
    ids=["once", "twice", "one", "by iterations", "more iterations", "length given", "length unknown"],
)
def test_each_step_is_the_mean_of_its_own_group(data: Any, options: dict[str, Any], expected: list[float]) -> None:
    engine, model = slope_trainer(4)
    moved = moves(engine, model)
    engine.run_sync(data, **options)
    assert moved == expected


@pytest.mark.parametrize("skip", [False, True])
def test_group_of_an_epoch_that_is_terminated_is_the_mean_of_what_it_has(*, skip: bool) -> None:
    engine, model = slope_trainer(4)
    moved = moves(engine, model)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=2), lambda: engine.terminate_epoch(skip_epoch_completed=skip)
    )
    engine.run_sync(UNEVEN, max_epochs=2)
    # Where EPOCH_COMPLETED is skipped, the group goes on in the next epoch: 1, 2, 1, 2; then 3, 6, 5.
    assert moved == ([1.5, 4.6667] if skip else [1.5, 3.0, 5.0])


@pytest.mark.parametrize("kind", ["number", "tensor", "whole", "one of many"])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_batches_of_unequal_counts_are_weighted_by_them(kind: str, steps: int) -> None:
    counts = [10, 30, 20, 0, 40]
    make: dict[str, Any] = {
        "number": float,
        "tensor": torch.tensor,
        "whole": int,
        "one of many": lambda count: torch.tensor([float(count)]),
    }
    engine, model = slope_trainer(steps)
    moved = moves(engine, model)
    engine.run_sync([(slope, make[kind](count)) for slope, count in zip(UNEVEN, counts, strict=True)])
    means = {1: UNEVEN, 3: [130 / 60, 5.0], 5: [330 / 100]}
    assert moved == pytest.approx(means[steps], abs=1e-4)


def test_group_of_nothing_changes_nothing() -> None:
    for zero in (0, torch.tensor(0)):
        engine, model = slope_trainer(2)
        engine.run_sync([(1.0, zero)] * 2)
        assert model.weight.item() == 0.0


@pytest.mark.parametrize(
    ("weight", "kind"),
    [(-1, ValueError), (float("nan"), ValueError), ("10", TypeError), (torch.ones(2), TypeError), ([], TypeError)],
    ids=str,
)
def test_weight_that_is_none_is_refused(weight: Any, kind: type[Exception]) -> None:
    engine, _ = slope_trainer(2)
    with pytest.raises(kind, match="weight= is"):
        engine.run_sync([(1.0, weight)])


async def test_weighted_group_that_is_resumed_continues_with_its_weights(tmp_path: Path) -> None:
    data = [(slope, torch.tensor(count)) for slope, count in zip(UNEVEN, (1, 4, 2, 3, 5), strict=True)]
    weights = []
    for step in (None, 1, 2, 4):
        engine, model = slope_trainer(3, clip_gradients=100.0)
        async with Checkpoint(tmp_path, {"model": model}, keep=Keep(every_n=1)) as checkpoint:
            checkpoint.attach(engine, Events.ITERATION_COMPLETED)
            if step is not None:
                await checkpoint.restore(step)
            await engine.run(data)
        weights.append(model.weight.item())
    assert len(set(weights)) == 1
    assert weights[0] == pytest.approx(-(15 / 7 + 43 / 8))


@pytest.mark.parametrize("skip", [False, True], ids=["completed", "skip-completed"])
async def test_terminated_run_says_what_is_not_used_yet_and_continues_as_if_it_had_not_ended(
    caplog: pytest.LogCaptureFixture,
    skip: bool,  # noqa: FBT001 -- pytest passes it by name
) -> None:
    plain_model, plain_optimizer = build()
    expected = plain_loop(plain_model, plain_optimizer, accumulate=3)
    trainer, _ = accumulating(3)
    losses = record_losses(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda: trainer.terminate(skip_completed=skip))
    with caplog.at_level(logging.WARNING, "aengine.training"):
        await trainer.run(batches(), max_epochs=2)
    assert "the gradients of 2 of 3 batches are not used yet" in caplog.text
    caplog.clear()
    await trainer.run(batches(), max_epochs=2)
    assert as_numbers(losses) == expected
    assert not caplog.records


class Resumable:
    """A trainer and its checkpoint: made twice, the second one continues where the first one was."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.model, self.optimizer = build()
        self.trainer = create_supervised_trainer(self.model, self.optimizer, LOSS, **options)
        self.losses = record_losses(self.trainer)
        self.checkpoint = Checkpoint(
            directory, {"model": self.model, "optimizer": self.optimizer}, keep=Keep(every_n=1)
        )
        self.checkpoint.attach(self.trainer, Events.ITERATION_COMPLETED)

    async def run(self, step: int | None = None, data: Any = None) -> list[float]:
        async with self.checkpoint:
            if step is not None:
                torch.rand(5)
                await self.checkpoint.restore(step)
            await self.trainer.run(batches() if data is None else data, max_epochs=2)
        return as_numbers(self.losses)


@pytest.mark.covering(2)
@THREADS
@pytest.mark.parametrize("has_length", [True, False], ids=["length", "no-length"])
async def test_run_resumed_in_the_middle_of_a_group_continues_as_if_it_had_not_ended(
    tmp_path: Path,
    thread: bool,  # noqa: FBT001 -- pytest passes it by name
    has_length: bool,  # noqa: FBT001 -- pytest passes it by name
) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 4, "clip_gradients": 0.5, "thread": thread}
    whole = Resumable(tmp_path, **options, scaler=scaler())
    expected = await whole.run(data=batches() if has_length else Unsized())
    for step in (2, 7, 10):
        resumed = Resumable(tmp_path, **options, scaler=scaler())
        assert await resumed.run(step, batches() if has_length else Unsized()) == expected[step:]
        assert_equal_bits(resumed.model.state_dict(), whole.model.state_dict())


async def test_group_cannot_be_continued_in_another_size(tmp_path: Path) -> None:
    await Resumable(tmp_path, gradient_accumulation_steps=4).run()
    other = Resumable(tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(
        CheckpointMismatch, match="a group of 4 batches was under way, 2 of them done, and groups have 2"
    ):
        await other.run(2)
    assert len(await Resumable(tmp_path, gradient_accumulation_steps=2).run(4)) == 10  # between two groups


async def test_trainer_with_a_scaler_does_not_continue_without_one(tmp_path: Path) -> None:
    await Resumable(tmp_path).run()
    with pytest.raises(
        CheckpointMismatch, match="this OptimizerUpdate has a GradScaler, and the one that was saved had none"
    ):
        await Resumable(tmp_path, scaler=scaler()).run(2)


async def test_group_in_which_a_step_failed_begins_anew_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    failing = [Boom()]

    def fail_once(x: Any, y: Any, y_pred: Any, loss: torch.Tensor) -> torch.Tensor:
        if trainer.state.iteration == 3 and failing:
            raise failing.pop()
        return loss.detach()

    trainer, _ = accumulating(4, output_transform=fail_once)
    losses, seen = record_losses(trainer), stepped(trainer)
    with pytest.raises(Boom):
        await trainer.run(batches())
    await trainer.run(batches())
    assert "the group begins anew, without the gradients of 3 batches" in caplog.text
    assert seen == [6, 7]
    assert len(losses) == 7


def test_step_that_failed_before_its_gradients_were_added_costs_the_group_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = [Boom()]

    def fail_once(model: torch.nn.Module, x: torch.Tensor) -> Any:
        if trainer.state.iteration == 3 and failing:
            raise failing.pop()
        return model(x)

    trainer, _ = accumulating(4, model_fn=fail_once)
    losses, seen = record_losses(trainer), stepped(trainer)
    with pytest.raises(Boom):
        trainer.run_sync(batches(), max_epochs=2)
    trainer.run_sync(batches(), max_epochs=2)
    assert seen == [4, 7, 11, 14]
    plain_model, plain_optimizer = build()
    assert as_numbers(losses) == plain_loop(plain_model, plain_optimizer, accumulate=4)
    assert not caplog.records


async def test_save_at_a_step_of_the_optimizer_is_taken_when_all_have_seen_the_iteration(tmp_path: Path) -> None:
    trainer, model = accumulating(3)
    async with Checkpoint(tmp_path, {"model": model}, keep=Keep(every_n=1)) as checkpoint:
        checkpoint.attach(trainer, OptimizerEvents.OPTIMIZER_STEPPED)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: engine.state.metrics.update(seen=1.0))
        await trainer.run(batches())
        infos = checkpoint.list()
    assert infos
    assert {info.event for info in infos} == {"OPTIMIZER_STEPPED"}
    assert all(info.metrics == {"seen": 1.0} for info in infos)


def test_state_in_the_midst_of_a_step_of_the_optimizer_is_refused() -> None:
    trainer, _ = accumulating(3)
    (update,) = stateful_listeners(trainer)
    trainer.add_event_handler(OptimizerEvents.OPTIMIZER_STEPPED, update.state_dict)
    with pytest.raises(RuntimeError, match="save at ITERATION_COMPLETED or EPOCH_COMPLETED"):
        trainer.run_sync(batches())


# The step


class NobodyWaits(TorchDispatchMode):
    """Refuses what reads a number out of a tensor, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "clip_gradients": 1.0}], ids=["plain", "all"]
)
def test_default_step_reads_no_number_out_of_a_tensor(options: dict[str, Any]) -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS, thread=False, **options)
    nobody_waits: Any = NobodyWaits
    with nobody_waits():
        trainer.run_sync(batches())
    assert isinstance(trainer.state.output, torch.Tensor)
    assert not trainer.state.output.requires_grad

    reading = create_supervised_trainer(model, optimizer, LOSS, output_transform=lambda x, y, p, loss: loss.item())
    with pytest.raises(AssertionError), nobody_waits():  # the control
        reading.run_sync(batches())


def test_step_prepares_applies_and_transforms_as_its_arguments_say() -> None:
    model = torch.nn.Linear(WIDTH, 1)
    given: list[Any] = []

    def prepare(batch: Any, *, device: Any, non_blocking: bool) -> tuple[Any, Any]:
        given.append((device, non_blocking))
        return batch["x"], batch["y"]

    trainer = create_supervised_trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        LOSS,
        "cpu",
        non_blocking=True,
        prepare_batch=prepare,
        model_transform=lambda output: output["logits"],
        output_transform=lambda x, y, y_pred, loss: (x, y, y_pred, loss.item()),
        model_fn=lambda model, x: {"logits": 2 * model(x)},
    )
    x, y = batches()[0]
    trainer.run_sync([{"x": x, "y": y}])
    assert given == [("cpu", True)]
    assert_equal_bits(trainer.state.output, (x, y, 2 * model(x), LOSS(2 * model(x), y).item()))


def test_loss_that_is_handed_out_is_not_divided_by_the_size_of_the_group() -> None:
    losses = []
    for steps in (1, 7):
        trainer, _ = accumulating(steps)
        trainer.run_sync(batches()[:1])
        losses.append(trainer.state.output.item())
    assert losses[0] == losses[1]


def test_batches_are_moved_whatever_they_are_made_of() -> None:
    point = namedtuple("point", "x y")  # noqa: PYI024 -- a plain one
    inputs = {
        "ids": torch.ones(2),
        "pair": (torch.ones(1), [torch.ones(1)]),
        "point": point(torch.ones(1), 2),
        "n": "a",
    }
    moved, target = prepare_batch([inputs, torch.ones(3)], "meta")
    assert moved["ids"].is_meta
    assert moved["pair"][0].is_meta
    assert moved["pair"][1][0].is_meta
    assert (moved["point"].x.is_meta, moved["point"].y, moved["n"]) == (True, 2, "a")
    assert target.is_meta
    assert move("a", "meta") == "a"


def test_public_step_serves_an_engine_of_ones_own() -> None:
    model, optimizer = build()
    update = OptimizerUpdate(model, optimizer, gradient_accumulation_steps=2)
    trainer: AnyEngine = Engine(supervised_training_step(model, update, LOSS), name="own")
    update.attach(trainer)
    losses = record_losses(trainer)
    trainer.run_sync(batches(), max_epochs=2)
    plain_model, plain_optimizer = build()
    assert as_numbers(losses) == plain_loop(plain_model, plain_optimizer, accumulate=2)


async def test_async_step_of_ones_own_updates_as_well() -> None:
    model, optimizer = build()
    update = OptimizerUpdate(model, optimizer, gradient_accumulation_steps=3)

    async def step(engine: AnyEngine, batch: Any) -> torch.Tensor:
        update.zero_grad()
        loss = LOSS(model(batch[0]), batch[1])
        update(engine, loss)
        return loss.detach()

    trainer: AnyEngine = Engine(step)
    update.attach(trainer)
    seen, losses = stepped(trainer), record_losses(trainer)
    await trainer.run(batches(), max_epochs=2)
    plain_model, plain_optimizer = build()
    assert as_numbers(losses) == plain_loop(plain_model, plain_optimizer, accumulate=3)
    assert seen == [3, 6, 7, 10, 13, 14]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16], ids=str)
def test_default_step_on_a_gpu_never_waits_for_it(autocast_dtype: torch.dtype | None) -> None:
    model, _ = build()
    model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        LOSS,
        "cuda",
        non_blocking=True,
        autocast_dtype=autocast_dtype,
        clip_gradients=1.0,
        thread=False,
    )
    pinned = [(x.pin_memory(), y.pin_memory()) for x, y in batches()]
    trainer.run_sync(pinned)  # the first calls of libraries may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.run_sync(pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.output.is_cuda


def drop_nothing(model: torch.nn.Sequential) -> None:
    dropout = model[2]
    assert isinstance(dropout, torch.nn.Dropout)
    dropout.p = 0.0


def test_two_models_with_an_optimizer_each_are_updated_one_by_one() -> None:
    """Each in groups of its own size, as the plain loops of each do."""
    (first, first_optimizer), (second, second_optimizer) = build(), build()
    updates = (
        OptimizerUpdate(first, first_optimizer, gradient_accumulation_steps=2),
        OptimizerUpdate(second, second_optimizer, gradient_accumulation_steps=3),
    )

    def step(engine: AnyEngine, batch: Any) -> list[float]:
        losses = []
        for model, update in zip((first, second), updates, strict=True):
            update.zero_grad()
            loss = LOSS(model(batch[0]), batch[1])
            update(engine, loss)
            losses.append(loss.item())
        return losses

    trainer: AnyEngine = Engine(step)
    for update in updates:
        update.attach(trainer)
    losses: list[list[float]] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
    for model in (first, second):
        drop_nothing(model)  # for the two would draw in turn
    trainer.run_sync(batches(), max_epochs=2)
    for number, accumulate in enumerate((2, 3)):
        plain_model, plain_optimizer = build()
        drop_nothing(plain_model)
        assert [pair[number] for pair in losses] == plain_loop(plain_model, plain_optimizer, accumulate=accumulate)


# Modes


def frozen_model() -> torch.nn.Sequential:
    backbone = torch.nn.Sequential(torch.nn.Linear(WIDTH, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    return torch.nn.Sequential(backbone.requires_grad_(requires_grad=False).eval(), torch.nn.Linear(4, 1))


def modes_of(model: Any) -> list[bool]:
    return [module.training for module in model.modules()]


WRAPPERS: dict[str, Any] = {
    "as it is": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": torch.nn.DataParallel,
}


@THREADS
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
async def test_what_is_frozen_stays_in_evaluation_mode(thread: bool, wrap: Any) -> None:  # noqa: FBT001 -- pytest passes it by name
    model = frozen_model()
    before = {name: value.clone() for name, value in model[0].state_dict().items()}
    modes = modes_of(model)
    trainer = create_supervised_trainer(
        wrap(model), torch.optim.SGD(model[1].parameters(), lr=0.1), LOSS, thread=thread
    )
    evaluator = create_supervised_evaluator(wrap(model), thread=thread)

    @trainer.on(Events.EPOCH_COMPLETED(every=2))
    async def evaluate() -> None:
        await evaluator.run(batches()[:2])

    @trainer.on(Events.EPOCH_COMPLETED(once=3))
    def evaluate_as_in_pytorch_ignite() -> None:  # where nothing puts the model back
        model.eval()

    await trainer.run(batches(), max_epochs=4)
    assert_equal_bits(model[0].state_dict(), before)
    assert modes_of(model) == modes


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_model_in_evaluation_mode_as_a_whole_is_trained_in_training_mode(
    wrap: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain_model, plain_optimizer = build()
    expected = plain_loop(plain_model, plain_optimizer)
    model, optimizer = build()
    trainer = create_supervised_trainer(wrap(model.eval()), optimizer, LOSS)  # as one that was loaded may be
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), model.eval)
    losses = record_losses(trainer)
    with caplog.at_level(logging.INFO, "aengine.training"):
        trainer.run_sync(batches(), max_epochs=2)
    assert as_numbers(losses) == expected
    assert "is in evaluation mode as a whole, and is put into training mode" in caplog.text


def test_model_that_is_unfrozen_is_trained_so() -> None:
    model = frozen_model()
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), LOSS)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: model.train())  # noqa: PLW0108 -- train() would take the engine for its mode
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), model.eval)
    trainer.run_sync(batches())
    assert all(modes_of(model))


# Batches that are mappings, and outputs with a loss, as Hugging Face's


@dataclass
class Output:
    """As transformers' are without their base class."""

    loss: torch.Tensor | None
    logits: torch.Tensor


class ModelOutput(OrderedDict[str, Any]):
    """As transformers': what is None is not among its items."""

    def __init__(self, loss: torch.Tensor | None, logits: torch.Tensor) -> None:
        super().__init__({"logits": logits} if loss is None else {"loss": loss, "logits": logits})
        self.loss, self.logits = loss, logits


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding."""


class Classifier(torch.nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.inner, self.kind = build()[0], kind

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_: Any) -> Any:
        logits = self.inner(input_ids)
        return self.kind(None if labels is None else LOSS(logits, labels), logits)


def as_mappings(kind: Any) -> list[Any]:
    return [kind({"input_ids": x, "labels": y, "attention_mask": torch.ones(BATCH)}) for x, y in batches()]


def as_dict(loss: Any, logits: Any) -> dict[str, Any]:
    return {"loss": loss, "logits": logits}


@pytest.mark.parametrize(
    ("output", "batch", "device", "wrapper"),
    [
        (Output, dict, None, "as it is"),
        (ModelOutput, Encoding, "cpu", "as it is"),
        (as_dict, dict, "cpu", "as it is"),
        (Output, Encoding, None, "compiled"),
    ],
)
def test_model_with_a_loss_of_its_own_is_trained_and_evaluated_as_it_is(
    output: Any, batch: Any, device: str | None, wrapper: str
) -> None:
    wrap = WRAPPERS[wrapper]
    plain_model, plain_optimizer = build()
    expected = plain_loop(plain_model, plain_optimizer)
    model = Classifier(output).eval()  # as from_pretrained() returns it
    optimizer = torch.optim.SGD(model.parameters(), **SGD_OF_HALF)
    trainer = create_supervised_trainer(wrap(model), optimizer, device=device)
    losses = record_losses(trainer)
    trainer.run_sync(as_mappings(batch), max_epochs=2)
    assert as_numbers(losses) == expected

    evaluator = create_supervised_evaluator(wrap(model), {"error": MeanSquaredError()}, device=device)
    state = evaluator.run_sync(as_mappings(batch))
    plain_model.eval()
    inputs, targets = (torch.cat(some) for some in zip(*batches(), strict=True))
    assert state.metrics["error"] == pytest.approx(LOSS(plain_model(inputs), targets).item(), rel=1e-5)


def test_loss_function_gets_the_output_of_the_model_and_the_labels() -> None:
    model = Classifier(Output)
    trainer = create_supervised_trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda output, labels: LOSS(output.logits, labels) + 1
    )
    assert float(trainer.run_sync(as_mappings(dict)[:1]).output) > 1


@pytest.mark.parametrize(
    ("batch", "loss_fn", "message"),
    [
        ({"input_ids": batches()[0][0]}, None, r'none in its output, a Output: .* where the batch has "labels"'),
        (batches()[0][:1] * 2, None, "without loss_fn= the loss is the model's own"),
        ({"input": batches()[0][0]}, LOSS, "unexpected keyword|missing"),
    ],
    ids=["no labels", "pair", "other names"],
)
def test_batch_without_a_loss_says_what_is_missing(batch: Any, loss_fn: Any, message: str) -> None:
    class Strict(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Classifier(Output)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
            return self.inner(input_ids, labels)

    model = Strict()
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)
    with pytest.raises(TypeError, match=message) as caught:
        trainer.run_sync([batch])
    if loss_fn is not None:
        assert "here input: have prepare_batch=" in "".join(caught.value.__notes__)


# Evaluation


@THREADS
async def test_evaluator_evaluates_and_leaves_each_module_in_the_mode_it_was_in(thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    model, _ = build()
    model.train()
    model[1].eval()  # frozen, as batch normalisation often is
    modes: list[Any] = []
    evaluator = create_supervised_evaluator(model, thread=thread)

    @evaluator.on(Events.ITERATION_COMPLETED)
    def look() -> None:
        modes.append([module.training for module in model])

    await evaluator.run(batches())
    assert modes == [[True, False, True, True]] * 7
    assert model.training
    y_pred, y = evaluator.state.output
    model.eval()
    x, target = batches()[-1]
    assert_equal_bits(y_pred, model(x).detach())
    assert not y_pred.requires_grad
    assert y is not None
    assert_equal_bits(y, target)


def test_model_that_fails_is_back_in_training_mode() -> None:
    model, _ = build()
    evaluator = create_supervised_evaluator(model, model_fn=lambda model, x: model(x[:, :2]))
    with pytest.raises(RuntimeError, match="shapes"):
        evaluator.run_sync(batches())
    assert all(module.training for module in model.modules())


def test_model_is_back_in_training_mode_by_its_own_train() -> None:
    class Merged(torch.nn.Module):
        is_merged = False

        def train(self, mode: bool = True) -> "Merged":  # noqa: FBT001, FBT002 -- torch's signature
            self.is_merged = not mode
            return super().train(mode)

    model = Merged()
    with evaluating(model):
        assert model.is_merged
    assert not model.is_merged


def test_evaluator_computes_in_the_type_it_is_given() -> None:
    model = torch.nn.Linear(WIDTH, 1).eval()
    for device in (None, "cpu"):
        evaluator = create_supervised_evaluator(model, device=device, autocast_dtype=torch.bfloat16)
        evaluator.run_sync(batches())
        assert evaluator.state.output[0].dtype is torch.bfloat16
        assert not model.training  # as it was


# Bad input


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"autocast_dtype": "amp"}, ValueError, "torch.float16 with scaler=True .which is pytorch-ignite's"),
        (
            {"autocast_dtype": torch.float16},
            ValueError,
            "pass scaler=True, or a GradScaler; or take autocast_dtype=torch.bfloat16",
        ),
        ({"scaler": True}, ValueError, "scaler=True goes with autocast_dtype=torch.float16"),
        ({"scaler": 65536.0}, TypeError, "the scaler is a torch.amp.GradScaler, got 65536.0"),
        ({"gradient_accumulation_steps": 0}, ValueError, "a whole number of batches, 1 or more; got 0"),
        ({"clip_gradients": -1.0}, ValueError, "clip_gradients= takes the greatest norm, more than 0"),
        ({"clip_gradients": True}, ValueError, "clip_gradients= takes the greatest norm, more than 0"),
        ({"model": len}, TypeError, "the model is a torch.nn.Module, got <built-in function len>"),
        ({"loss_fn": torch.nn.MSELoss}, TypeError, r"MSELoss is a class: loss_fn=MSELoss\(\)"),
        ({"loss_fn": "mse"}, TypeError, "loss_fn= must be callable, got 'mse'"),
        ({"loss_fn": abs}, TypeError, r"loss_fn= abs.* cannot be called as loss_fn\(y_pred, y\)"),
        ({"device": "gpu"}, ValueError, """device= is a device of torch, such as "cuda" or "cpu"; got 'gpu'"""),
        ({"optimizer": 0.1}, TypeError, r"the optimizer has step\(\) and zero_grad\(\)"),
    ],
    ids=str,
)
def test_wrong_argument_is_refused_where_it_is_given(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model, optimizer = build()
    arguments: dict[str, Any] = {"model": model, "optimizer": optimizer, "loss_fn": LOSS}
    with pytest.raises(kind, match=message):
        create_supervised_trainer(**(arguments | options))


def test_metrics_of_an_evaluator_have_names() -> None:
    model, _ = build()
    wrong: Any = [len]
    with pytest.raises(TypeError, match=r'metrics by name, such as \{"accuracy": metric\}; got \[<built-in'):
        create_supervised_evaluator(model, wrong)


def test_scaler_given_as_true_is_one_for_the_device_of_the_model() -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS, autocast_dtype=torch.float16, scaler=True)
    (update,) = stateful_listeners(trainer)
    assert update.state_dict()["scaler"]["scale"] == 65536.0


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(1),) * 3, "a batch is a pair of inputs and targets, or .* got a tuple of 3: have prepare_batch="),
        (7, "got a int"),
    ],
    ids=["three", "number"],
)
def test_batch_that_is_no_pair_is_refused(batch: Any, message: str) -> None:
    model, optimizer = build()
    with pytest.raises(ValueError, match=message):
        create_supervised_trainer(model, optimizer, LOSS).run_sync([batch])


def test_loss_of_many_numbers_is_refused() -> None:
    model, optimizer = build()
    loss_fn = torch.nn.MSELoss(reduction="none")
    with pytest.raises(
        TypeError, match=rf"a tensor of one number, got one of shape \[{BATCH}, 1\]: have loss_fn return"
    ):
        create_supervised_trainer(model, optimizer, loss_fn).run_sync(batches())


def test_update_is_of_a_model_and_takes_the_gradients_of_no_other() -> None:
    wrong: Any = len
    model, optimizer = build()
    with pytest.raises(TypeError, match=r"the model is a torch.nn.Module, got <built-in function len>"):
        OptimizerUpdate(wrong, optimizer)
    saved = {"pending": 1, "gradient_accumulation_steps": 2, "gradients": [None], "scaler": None}
    with pytest.raises(ValueError, match="there are gradients of 1 parameters, and 6 in the model"):
        OptimizerUpdate(model, optimizer, gradient_accumulation_steps=2).load_state_dict(saved)


def test_update_that_is_attached_to_no_engine_says_so() -> None:
    model, optimizer = build()
    update = OptimizerUpdate(model, optimizer)
    trainer: AnyEngine = Engine(supervised_training_step(model, update, LOSS), name="own")
    with pytest.raises(RuntimeError, match=r"is not attached to engine 'own': call  update.attach"):
        trainer.run_sync(batches())
    update.attach(trainer)
    with pytest.raises(RuntimeError, match=r"already: make another one, .*each optimizer has one of its own"):
        update.attach(trainer)

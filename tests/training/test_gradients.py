"""Statistics of gradients, weights and updates are those of the plain loop at that step, and change not a bit of it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from support.plain_loops import LOSS, as_numbers, assert_equal_bits, batches, build, plain_loop, record_losses
from support.record import AnyEngine
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint, Keep
from aengine.loggers import Record, Tracker
from aengine.training import GradientEvents, GradientStatistics, create_supervised_trainer

THREADS = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


def expected_of(
    gradients: list[torch.Tensor], weights: list[torch.Tensor], after: list[torch.Tensor]
) -> dict[str, float]:
    """Say it all of one long vector."""
    gradient, weight, new = (
        torch.cat([one.flatten() for one in several]).double() for several in (gradients, weights, after)
    )
    values = {
        "gradient/zeros": (gradient == 0).double().mean(),
        "gradient/nonfinite": (~gradient.isfinite()).double().mean(),
    }
    for name, numbers in (("gradient", gradient), ("weight", weight)):
        values |= {
            f"{name}/norm": numbers.norm(),
            f"{name}/min": numbers.min(),
            f"{name}/max": numbers.max(),
            f"{name}/mean": numbers.mean(),
            f"{name}/std": numbers.std(correction=0),
        }
    values |= {"update/norm": (new - weight).norm(), "update/ratio": (new - weight).norm() / weight.norm()}
    return {name: value.item() for name, value in values.items()}


class Plain:
    """The plain loop, and what there was at each of its steps."""

    def __init__(self, **options: Any) -> None:
        self.model, self.optimizer = build()
        self.seen: list[tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]] = []
        before: list[list[torch.Tensor]] = []

        def look(*_: Any) -> None:
            parameters = list(self.model.parameters())
            before.append([one.detach().clone() for one in parameters])
            self.gradients = [one.grad.clone() for one in parameters if one.grad is not None]

        def look_again(*_: Any) -> None:
            after = [one.detach().clone() for one in self.model.parameters()]
            self.seen.append((self.gradients, before.pop(), after))

        self.optimizer.register_step_pre_hook(look)
        self.optimizer.register_step_post_hook(look_again)
        self.losses = plain_loop(self.model, self.optimizer, **options)


def record_values(engine: AnyEngine, statistics: GradientStatistics) -> list[tuple[int, dict[str, float]]]:
    seen: list[tuple[int, dict[str, float]]] = []

    @engine.on(GradientEvents.GRADIENTS_MEASURED)
    def note(engine: AnyEngine, payload: dict[str, torch.Tensor]) -> None:
        values = statistics.values(engine)
        assert payload.keys() == values.keys()
        assert all(payload[name] is value for name, value in values.items())
        assert all(one.numel() == 1 for one in values.values())
        seen.append((engine.state.iteration, {name: one.item() for name, one in values.items()}))

    return seen


@THREADS
@pytest.mark.parametrize("accumulate", [1, 3])
async def test_numbers_are_those_of_the_plain_loop_and_training_is_the_same(accumulate: int, *, thread: bool) -> None:
    plain = Plain(accumulate=accumulate, norm=0.5)
    model, optimizer = build()
    trainer = create_supervised_trainer(
        model, optimizer, LOSS, gradient_accumulation_steps=accumulate, clip_gradients=0.5, thread=thread
    )
    statistics = GradientStatistics(model, optimizer, every=2)
    statistics.attach(trainer)
    seen, losses = record_values(trainer, statistics), record_losses(trainer)
    await trainer.run(batches(), max_epochs=2)
    assert as_numbers(losses) == plain.losses
    assert_equal_bits(model.state_dict(), plain.model.state_dict())
    measured = plain.seen[1::2]
    assert [values for _, values in seen] == [pytest.approx(expected_of(*one), rel=1e-5, abs=1e-9) for one in measured]
    assert len(seen) == (7 if accumulate == 1 else 3)
    if accumulate == 3:  # two whole groups and a partial one in an epoch of 7
        assert [iteration for iteration, _ in seen] == [6, 10, 14]


async def test_numbers_of_the_steps_of_ones_own_that_zeroes_gradients_at_its_end() -> None:
    model, optimizer = build()

    async def step(engine: AnyEngine, batch: Any) -> None:
        LOSS(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    trainer: AnyEngine = Engine(step)
    statistics = GradientStatistics(model, optimizer, every=1)
    statistics.attach(trainer)
    seen = record_values(trainer, statistics)
    await trainer.run(batches())
    plain = Plain(epochs=1)
    assert [values for _, values in seen] == [
        pytest.approx(expected_of(*one), rel=1e-5, abs=1e-9) for one in plain.seen
    ]


async def test_nesterov_momentum_that_changes_gradients_in_place_does_not_change_what_is_measured() -> None:
    gradients: list[torch.Tensor] = []
    model, _ = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, foreach=True)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append(
            torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
        )
    )
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    statistics = GradientStatistics(model, optimizer, every=1)
    statistics.attach(trainer)
    seen = record_values(trainer, statistics)
    await trainer.run(batches())
    assert [values["gradient/norm"] for _, values in seen] == [pytest.approx(one.norm().item()) for one in gradients]


async def test_groups_have_their_names_and_share_what_is_measured_once() -> None:
    model, optimizer = build()
    head = list(model[3].parameters())
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    statistics = GradientStatistics(
        {"": model.parameters(), **{name: child.parameters() for name, child in model.named_children()}},
        optimizer,
        every=3,
    )
    statistics.attach(trainer)
    before: list[list[torch.Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: before.append([one.detach().clone() for one in head]))
    seen = record_values(trainer, statistics)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), trainer.terminate)
    await trainer.run(batches())
    ((iteration, values),) = seen
    assert iteration == 3
    gradients = [one.grad for one in head if one.grad is not None]
    expected = expected_of(gradients, before[2], [one.detach() for one in head])
    found = {name.removeprefix("3/"): value for name, value in values.items() if name.startswith("3/")}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)
    parts = [values[f"{name}/gradient/norm"] for name in "013"]
    assert values["gradient/norm"] == pytest.approx(sum(part**2 for part in parts) ** 0.5)
    assert not [name for name in values if name.startswith("2/")]  # dropout has no parameters


@pytest.mark.parametrize("kind", ["bfloat16", "sparse", "frozen", "not finite"])
async def test_gradients_of_every_kind(kind: str) -> None:
    torch.manual_seed(1)
    if kind == "sparse":
        model: Any = torch.nn.Embedding(10, 3, sparse=True)
        data: Any = [torch.tensor([1, 2, 2])]
    else:
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 4))
        data = [torch.ones(2, 5)]
    if kind == "bfloat16":
        model, data = model.bfloat16(), [data[0].bfloat16()]
    if kind == "frozen":
        model[0].requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept: list[Any] = []
    optimizer.register_step_pre_hook(
        lambda *_: kept.append(
            (
                [one.grad.to_dense().clone() for one in model.parameters() if one.grad is not None],
                [one.detach().clone() for one in model.parameters()],
            )
        )
    )

    def step(engine: AnyEngine, batch: Any) -> None:
        factor = torch.inf if kind == "not finite" else 1.0
        (model(batch).square().sum() * factor).backward()
        optimizer.step()

    trainer: AnyEngine = Engine(step)
    statistics = GradientStatistics(model, optimizer, every=1)
    statistics.attach(trainer)
    seen = record_values(trainer, statistics)
    await trainer.run(data)
    gradients, weights = kept[0]
    expected = expected_of(gradients, weights, [one.detach() for one in model.parameters()])
    assert seen[0][1] == pytest.approx(expected, rel=1e-2 if kind == "bfloat16" else 1e-5, abs=1e-9, nan_ok=True)
    assert seen[0][1]["gradient/nonfinite"] == (1.0 if kind == "not finite" else 0.0)
    if kind == "sparse":
        assert seen[0][1]["gradient/zeros"] == pytest.approx(0.8)
    if kind == "bfloat16":  # in its own precision it would be one of 256 numbers to a power of two
        exact = torch.cat([one.double().flatten() for one in kept[0][0]]).norm().item()
        assert seen[0][1]["gradient/norm"] == pytest.approx(exact, rel=1e-6)


async def test_group_without_a_gradient_has_numbers_of_its_weights_only() -> None:
    model, optimizer = build()
    unused = torch.nn.Parameter(torch.ones(2))
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    statistics = GradientStatistics({"unused": [unused]}, optimizer, every=1)
    statistics.attach(trainer)
    seen = record_values(trainer, statistics)
    await trainer.run(batches()[:1])
    assert {name for name in seen[0][1] if "gradient" in name} == set()
    assert seen[0][1]["unused/weight/norm"] == pytest.approx(2**0.5)
    assert seen[0][1]["unused/update/ratio"] == 0.0


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("clips", [False, True], ids=["unclipped", "clipped"])
async def test_gradients_of_a_scaler_are_unscaled(*, fused: bool, clips: bool) -> None:
    norms: dict[bool, list[float]] = {}
    for scales in (False, True):
        model, _ = build()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.001, fused=fused, foreach=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scales else False
        trainer = create_supervised_trainer(
            model, optimizer, LOSS, scaler=scaler, clip_gradients=0.5 if clips else None
        )
        statistics = GradientStatistics(model, optimizer, every=1)
        statistics.attach(trainer)
        seen = record_values(trainer, statistics)
        await trainer.run(batches())
        norms[scales] = [values["gradient/norm"] for _, values in seen]
    assert norms[True] == pytest.approx(norms[False], rel=1e-3)
    assert len(norms[True]) == 7


async def test_norm_before_clipping_is_kept_where_it_is_clipped() -> None:
    model, optimizer = build()
    norms: list[float] = []

    def clip(parameters: Any) -> None:
        trainer.state.metrics["norm before clipping"] = clip_grad_norm_(parameters, 0.5)

    trainer = create_supervised_trainer(model, optimizer, LOSS, clip_gradients=clip)
    statistics = GradientStatistics(model, optimizer, every=1)
    statistics.attach(trainer)
    seen = record_values(trainer, statistics)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: norms.append(engine.state.metrics["norm before clipping"].item())
    )
    await trainer.run(batches())
    assert [values["gradient/norm"] for _, values in seen] == pytest.approx([min(0.5, norm) for norm in norms])
    assert max(norms) > 0.5


class Reads(TorchDispatchMode):
    """Counts when a number is read out of a tensor, or a tensor's shape depends on its numbers: for both of which a GPU
    would have to be waited for.
    """

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += function in waits
        return function(*args, **(kwargs or {}))


def test_no_device_is_waited_for() -> None:
    counts = []
    for measures in (False, True):
        model, optimizer = build()
        trainer = create_supervised_trainer(model, optimizer, LOSS)
        statistics = GradientStatistics(model, optimizer, every=1)
        if measures:
            statistics.attach(trainer)
        make: Any = Reads
        reads: Reads = make()
        with reads:
            trainer.run_sync(batches())
        counts.append(reads.count)
        assert bool(statistics.values()) is measures
    assert counts[0] == counts[1]


@THREADS
async def test_numbers_are_tracked_at_their_own_cadence(*, thread: bool) -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS, thread=thread)
    statistics = GradientStatistics(model, optimizer, every=3)
    statistics.attach(trainer)
    seen = record_values(trainer, statistics)
    written: list[Record] = []
    Tracker(written.extend, values=statistics.values).attach(trainer, GradientEvents.GRADIENTS_MEASURED)
    await trainer.run(batches(), max_epochs=2)
    assert [(record.step, record.values) for record in written] == seen
    assert [record.step for record in written] == [3, 6, 9, 12]


async def test_without_updates_nothing_is_copied() -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    statistics = GradientStatistics(model, optimizer, every=1, updates=False)
    statistics.attach(trainer)
    held: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: held.append(statistics._before))
    seen = record_values(trainer, statistics)
    await trainer.run(batches())
    assert not [name for name in seen[0][1] if name.startswith("update")]
    assert held == [None] * 7


async def test_run_that_is_resumed_measures_the_same_steps(tmp_path: Path) -> None:
    steps: list[list[int]] = []
    for place in (None, 4):
        model, optimizer = build()
        trainer = create_supervised_trainer(model, optimizer, LOSS)
        statistics = GradientStatistics(model, optimizer, every=3)
        statistics.attach(trainer)
        seen = record_values(trainer, statistics)
        async with Checkpoint(tmp_path, {"model": model, "optimizer": optimizer}, keep=Keep(every_n=1)) as checkpoint:
            checkpoint.attach(trainer, Events.ITERATION_COMPLETED)
            if place is not None:
                await checkpoint.restore(place)
            await trainer.run(batches(), max_epochs=2)
        steps.append([iteration for iteration, _ in seen])
    assert steps == [[3, 6, 9, 12], [6, 9, 12]]


async def test_it_ends_when_it_is_removed() -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    statistics = GradientStatistics(model, optimizer, every=1)
    handle = statistics.attach(trainer)
    seen = record_values(trainer, statistics)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), handle.remove)
    await trainer.run(batches())
    assert len(seen) == 2
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


async def test_step_that_fails_is_not_reported_and_leaves_no_copy_behind() -> None:
    model, optimizer = build()
    statistics = GradientStatistics(model, optimizer, every=2)
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    statistics.attach(trainer)
    seen = record_values(trainer, statistics)
    group = optimizer.param_groups[0]
    with (
        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: group.update(lr="fast")),
        pytest.raises(TypeError),
    ):
        await trainer.run(batches())
    assert statistics._before is not None
    group["lr"] = 0.01
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: seen.append((0, {})))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), trainer.terminate)
    await trainer.run(batches())
    assert [iteration for iteration, _ in seen] == [0, 3]  # the second step that there was
    assert statistics._before is None


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda model, optimizer: GradientStatistics(model, optimizer, every=0),
            ValueError,
            "every= is a whole number",
        ),
        (lambda model, optimizer: GradientStatistics(model, model), TypeError, "at the steps of an optimizer"),
        (
            lambda model, optimizer: GradientStatistics([1], optimizer),  # type: ignore[arg-type]
            TypeError,
            "takes a model, or a dictionary",
        ),
        (
            lambda model, optimizer: GradientStatistics({"a": [1]}, optimizer),  # type: ignore[list-item]
            TypeError,
            "'a' are torch.nn.Parameter, got a int",
        ),
    ],
    ids=["every", "optimizer", "list", "numbers"],
)
def test_wrong_arguments_are_refused(make: Callable[..., Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        partial(make, *build())()


def test_it_is_attached_once_until_it_is_removed() -> None:
    model, optimizer = build()
    trainer = create_supervised_trainer(model, optimizer, LOSS)
    statistics = GradientStatistics(model, optimizer)
    handle = statistics.attach(trainer)
    for engine in (trainer, create_supervised_trainer(model, optimizer, LOSS)):
        with pytest.raises(RuntimeError, match=r"is attached to engine .* already.*make another one, or remove\(\)"):
            statistics.attach(engine)
    handle.remove()
    statistics.attach(trainer)
    handle.remove()  # a second time it does nothing
    with pytest.raises(RuntimeError, match="already"):
        statistics.attach(trainer)
    GradientStatistics(model, optimizer).attach(trainer)


# DTensors


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # it is public, if not exported
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_statistics_of_a_dtensor_are_plain_numbers_of_the_whole(mesh: DeviceMesh) -> None:
    found: list[dict[str, float]] = []
    for shard in (lambda model: None, lambda model: distribute_module(model, mesh, shard_rows)):
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 5)
        shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        statistics = GradientStatistics(model, optimizer, every=1)
        engine: AnyEngine = Engine(lambda engine, batch: None, thread=False)
        statistics.attach(engine)
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = parameter.detach() * 2 + number
        optimizer.step()
        assert all(type(value) is torch.Tensor for value in statistics.values().values())
        found.append({name: value.item() for name, value in statistics.values().items()})
    assert found[0] == pytest.approx(found[1])
    assert len(found[0]) == 14


def shard_rows(name: str, module: torch.nn.Module, mesh: DeviceMesh) -> None:
    for parameter_name, parameter in module.named_parameters(recurse=False):
        whole = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        module.register_parameter(parameter_name, torch.nn.Parameter(whole))


# Seven rows: the last process has fewer than the others. It leaves as the test of shards does.
RANK = """
import os, sys, torch, torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from aengine import Engine
from aengine.training import GradientStatistics

rank, size = int(sys.argv[1]), int(sys.argv[2])
store = torch.distributed.FileStore(sys.argv[3], size)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
mesh = init_device_mesh("cpu", (size,))
whole = torch.arange(21.0).reshape(7, 3) - 3
values = []
for make in (lambda tensor: tensor, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])):
    parameter = torch.nn.Parameter(make(whole.clone()))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    statistics = GradientStatistics({"": [parameter]}, optimizer, every=1)
    statistics.attach(Engine(lambda engine, batch: None))
    parameter.grad = make(whole.square())
    optimizer.step()
    values.append({name: value.item() for name, value in statistics.values().items()})
assert values[0].keys() == values[1].keys() and len(values[0]) == 14
for name, value in values[0].items():
    assert abs(value - values[1][name]) < 1e-5, (name, values)
torch.distributed.destroy_process_group()
os._exit(0)
"""


@pytest.mark.slow
def test_statistics_of_a_dtensor_are_the_same_in_each_process(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), "3", str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 3, "\n".join(errors)


def test_part_of_a_number_is_not_logged_as_the_whole(mesh: DeviceMesh) -> None:
    part = DTensor.from_local(torch.tensor(3.0), mesh, [Partial()])
    engine: AnyEngine = Engine(lambda engine, batch: {"loss": part}, thread=False)
    records: list[Record] = []
    Tracker(records.extend).attach(engine, Events.ITERATION_COMPLETED)
    with pytest.raises(TypeError, match=r"this process has a part of 'loss': call full_tensor\(\)"):
        engine.run_sync([1])
    part = part.redistribute(placements=[Replicate()])
    engine.run_sync([1], max_epochs=2)
    assert records[-1].values == {"loss": 3.0}

"""What checkpoints hold, written from a run: by another process, with shards, by a serializer of one's own."""

import json
import random
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import anyio
import numpy as np
import pytest
import torch
import torch.distributed
from support.crash import CrashingSerializer
from support.record import AnyEngine
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_module

from aengine import CheckpointMismatch, CheckpointNotWritten, Engine, Events, NotSerializable
from aengine.checkpoint import Checkpoint, CheckpointEvents, Keep
from aengine.engine import session_of


def halve(model: torch.nn.Module) -> AnyEngine:
    """Return an engine whose step halves the parameters and adds one."""

    def step(engine: AnyEngine, batch: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5).add_(1)

    return Engine(step)


async def test_process_writes_what_a_thread_would_have_written(tmp_path: Path) -> None:
    model = torch.nn.Linear(300, 300)
    engine = halve(model)
    expected: dict[int, torch.Tensor] = {}
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: expected.update({engine.state.iteration: model.weight.clone()})
    )
    async with Checkpoint(tmp_path, {"model": model}, write_in="process") as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        await engine.run([1, 2, 3])

    for step in (2, 3):
        again = torch.nn.Linear(300, 300)
        async with Checkpoint(tmp_path, {"model": again}) as reader:
            _kept = halve(again)  # a Checkpoint does not keep it
            reader.attach(_kept)
            await reader.restore(step)
        assert again.weight.equal(expected[step])


async def test_writing_process_that_is_killed_fails_the_run_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    model, trigger, directory = torch.nn.Linear(2, 2), tmp_path / "trigger", tmp_path / "checkpoints"
    engine = halve(model)
    async with Checkpoint(directory, model, serializer=CrashingSerializer(trigger), write_in="process") as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        engine.subscribe(CheckpointEvents.CHECKPOINT_COMMITTED, lambda event: trigger.touch())
        with pytest.raises(CheckpointNotWritten, match="SIGKILL"):
            await engine.run(range(10**9))
        assert trigger.exists()
        committed = [info.path.name for info in checkpoint.list()]
        assert committed[0] == "step-0000000001"
        assert sorted(names_in(directory)) == [".lock", *committed]


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # it is public, if not exported
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


async def test_sharded_model_is_saved_in_shards_and_restored_into_them(mesh: DeviceMesh, tmp_path: Path) -> None:
    def sharded() -> torch.nn.Module:
        return distribute_module(torch.nn.Linear(4, 3), mesh)

    def whole(model: torch.nn.Module) -> list[torch.Tensor]:
        parameters: Any = model.parameters()
        return [parameter.full_tensor().clone() for parameter in parameters]

    model = sharded()
    engine = halve(model)
    seen: list[list[torch.Tensor]] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(whole(model)))
    async with Checkpoint(tmp_path, model) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        await engine.run([1, 2])
        infos = checkpoint.list()
        assert {file.name.partition("/")[0] for file in infos[-1].files} == {"state.pt", "dcp"}
        assert infos[-1].extra["shards"] == 2

    for step in (1, 2):
        again = sharded()
        async with Checkpoint(tmp_path, again) as reader:
            _kept = halve(again)  # a Checkpoint does not keep it
            reader.attach(_kept)
            await reader.restore(step)
        assert all(a.equal(b) for a, b in zip(whole(again), seen[step - 1], strict=True))


class Json:
    """A serializer of the user's own, for state without tensors."""

    name = "json"

    def write(self, tree: Any, file: BinaryIO) -> None:
        file.write(json.dumps(tree, default=lambda tensor: {"tensor": tensor.tolist()}).encode())

    def read(self, file: BinaryIO) -> Any:
        return json.load(file, object_hook=lambda one: torch.tensor(one["tensor"]) if set(one) == {"tensor"} else one)


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.count = state_dict["count"]


async def test_serializer_of_ones_own_writes_and_reads_and_another_refuses(tmp_path: Path) -> None:
    counter = Counter()

    def step(engine: AnyEngine, batch: int) -> None:
        counter.count += batch

    engine: AnyEngine = Engine(step)
    async with Checkpoint(tmp_path, counter, serializer=Json()) as checkpoint:
        checkpoint.attach(engine, Events.COMPLETED)
        await engine.run([3, 4])
    counter.count = 0
    async with Checkpoint(tmp_path, counter) as other:
        _kept = Engine(step)  # a Checkpoint does not keep it
        other.attach(_kept)
        with pytest.raises(CheckpointMismatch, match="written by the serializer 'json'"):
            await other.restore()
    again: AnyEngine = Engine(step)
    session_of(again).use_randomness(None)
    async with Checkpoint(tmp_path, counter, serializer=Json()) as reader:
        reader.attach(again)
        info = await reader.restore()
    assert info is not None
    assert (info.step, info.epoch, info.event, counter.count) == (2, 1, "COMPLETED", 7)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (np.float64(1.5), r"^state\['part'\]\['value'\]"),
        (np.zeros(2), r"^state\['part'\]\['value'\]"),
        ([1, {"deep": (Path("a"),)}], r"^state\['part'\]\['value'\]\[1\]\['deep'\]\[0\]"),
    ],
)
async def test_what_could_not_be_loaded_back_is_refused_at_the_save_with_its_place(
    tmp_path: Path, value: Any, place: str
) -> None:
    class Part:
        def state_dict(self) -> dict[str, Any]:
            return {"value": value}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise AssertionError

    engine: AnyEngine = Engine(lambda engine, batch: None)
    async with Checkpoint(tmp_path, {"part": Part()}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        with pytest.raises(NotSerializable, match=place):
            await engine.run([1])
        assert checkpoint.list() == []


async def test_metric_that_could_not_be_loaded_back_is_refused_too(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: engine.state.metrics.update(accuracy=np.zeros(2)))
    async with Checkpoint(tmp_path, {}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        with pytest.raises(NotSerializable, match=r"^metrics\['accuracy'\].*array"):
            await engine.run([1])


async def test_metric_that_is_a_number_of_numpy_is_saved_as_a_number(tmp_path: Path) -> None:
    metrics: dict[str, Any] = {
        "mean": np.mean([1.0, 2.0]),
        "single": np.float32(0.5),
        "long": np.longdouble(0.25),
        "array": np.array(3.0),
        "count": np.int64(7),
        "is_good": np.bool_(True),  # noqa: FBT003 -- numpy's only form
        "name": np.str_("best"),
        "several": {"of_class": [np.float64(1.0), (np.int32(2),)]},
    }
    expected = {
        "mean": 1.5, "single": 0.5, "long": 0.25, "array": 3.0, "count": 7, "is_good": True, "name": "best",
        "several": {"of_class": [1.0, (2,)]},
    }  # fmt: skip
    engine: AnyEngine = Engine(lambda engine, batch: engine.state.metrics.update(metrics))
    evaluator: AnyEngine = Engine(lambda engine, batch: None)
    evaluator.state.metrics.update(metrics)
    keep = Keep(best=1, metric="mean")
    async with Checkpoint(tmp_path, {"evaluator": evaluator}, keep=keep) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        await engine.run([1])
        assert checkpoint.list()[-1].metrics["mean"] == 1.5
        path = checkpoint.list()[-1].path
    tree = torch.load(anyio.Path(path / "state.pt"), weights_only=True)
    for saved in (tree["metrics"], tree["state"]["evaluator"]["metrics"]):
        assert saved == expected
        assert [type(one) for one in saved.values()] == [type(one) for one in expected.values()]
    assert engine.state.metrics["single"] is metrics["single"]  # the run has what it had


async def test_modules_are_unwrapped_and_generators_are_parts(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    generators = [torch.Generator().manual_seed(1), random.Random(2), np.random.default_rng(3)]

    def draw(from_: list[Any]) -> list[float]:
        first, second, third = from_
        return [torch.rand(1, generator=first).item(), second.random(), third.random()]

    engine: AnyEngine = Engine(lambda engine, batch: None)
    compiled: Any = torch.compile(model, backend="eager")
    wrapped = torch.nn.DataParallel(compiled)
    async with Checkpoint(tmp_path, {"model": wrapped, "generators": generators}) as checkpoint:
        checkpoint.attach(engine, Events.COMPLETED)
        await engine.run([1])
        path = checkpoint.list()[-1].path
    expected = draw(generators)
    tree = torch.load(anyio.Path(path / "state.pt"), weights_only=True)
    assert type(tree["state"]["model"]) is OrderedDict
    assert list(tree["state"]["model"]) == ["weight", "bias"]

    again = [torch.Generator(), random.Random(), np.random.default_rng()]
    bare = torch.nn.Linear(2, 2)
    async with Checkpoint(tmp_path, {"model": bare, "generators": again}) as reader:
        _kept = Engine(lambda engine, batch: None)  # a Checkpoint does not keep it
        reader.attach(_kept)
        await reader.restore()
    assert bare.weight.equal(model.weight)
    assert draw(again) == expected


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (3, "state is int"),
        ({"a": {"b": object()}}, r"state\['a'\]\['b'\] is object"),
        ({"a": torch.nn.Linear}, r"state\['a'\] is type"),
        ({1: torch.nn.Linear(1, 1)}, "the names in state must be strings, got 1"),
        ([torch.ones(1)], r"state\['0'\] is torch.Tensor"),
    ],
)
def test_what_has_no_state_is_refused_where_it_is_handed_in(tmp_path: Path, state: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        Checkpoint(tmp_path, state)


@pytest.mark.parametrize("name", ["when_busy", "on_error", "write_in"])
def test_choices_are_checked_where_they_are_made(tmp_path: Path, name: str) -> None:
    wrong: dict[str, Any] = {name: "never"}
    with pytest.raises(ValueError, match=f"{name}= is one of .*, got 'never'"):
        Checkpoint(tmp_path, {}, **wrong)


async def test_handler_whose_state_dict_fails_is_named(tmp_path: Path) -> None:
    class Broken:
        def __call__(self) -> None:
            pass

        def state_dict(self) -> dict[str, Any]:
            raise ZeroDivisionError

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise AssertionError

    engine: AnyEngine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.STARTED, Broken())
    async with Checkpoint(tmp_path, {}) as checkpoint:
        checkpoint.attach(engine, Events.COMPLETED)
        with pytest.raises(ZeroDivisionError) as caught:
            await engine.run([1])
    assert "handlers['test_handler" in caught.value.__notes__[0]

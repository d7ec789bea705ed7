"""Modules that are compiled and wrapped, in any order and at any depth, have the names that they have without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plain_loops import assert_equal_bits
from support.record import AnyEngine
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from aengine import CheckpointMismatch, Engine, Events
from aengine.checkpoint import Checkpoint
from aengine.training import AverageHandler

Wrap = Callable[[Any], Any]


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def build() -> Any:
    block = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    return torch.nn.Sequential(block, torch.nn.Linear(2, 2))


def with_block(wrap: Wrap) -> Wrap:
    def wrapped(model: Any) -> Any:
        model[0] = wrap(model[0])
        return model

    return wrapped


parallel: Wrap = torch.nn.DataParallel

WRAPPED: dict[str, Wrap] = {
    "compiled": compiled,
    "parallel, compiled": lambda model: parallel(compiled(model)),
    "compiled, parallel": lambda model: compiled(parallel(model)),
    "compiled, parallel, compiled": lambda model: compiled(parallel(compiled(model))),
    "a compiled block": with_block(compiled),
    "a compiled layer of a parallel block": with_block(lambda block: parallel(with_block(compiled)(block))),
    "a compiled block of a parallel model": lambda model: parallel(with_block(compiled)(model)),
    "a compiled block, wrapped for activation checkpointing": with_block(
        lambda block: checkpoint_wrapper(compiled(block))
    ),
    "a block wrapped for activation checkpointing, compiled": with_block(
        lambda block: compiled(checkpoint_wrapper(with_block(compiled)(block)))
    ),
}


def engine_of(model: Any, average: Any) -> AnyEngine:
    def step(engine: AnyEngine, batch: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.full_like(parameter, float(batch)))

    engine: AnyEngine = Engine(step, thread=False)
    AverageHandler(average, model).attach(engine)  # a part that the checkpoint finds by itself
    return engine


def named(module: Any) -> list[str]:
    return list(module.state_dict())


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("way", ["wrapped to plain", "plain to wrapped"])
async def test_checkpoint_of_a_wrapped_model_and_that_of_a_plain_one_are_the_same(
    wrap: Wrap, way: str, tmp_path: Path
) -> None:
    models = {"wrapped": wrap(build()), "plain": build()}
    averages = {name: AveragedModel(model) for name, model in models.items()}
    own = {name: AveragedModel(model) for name, model in models.items()}
    saved, loaded = way.split(" to ")

    async with Checkpoint(tmp_path, {"model": models[saved], "average": averages[saved]}) as checkpoint:
        engine = engine_of(models[saved], own[saved])
        checkpoint.attach(engine, Events.COMPLETED)
        await engine.run([3, 5])
        path = checkpoint.list()[-1].path
    tree = torch.load(path / "state.pt", weights_only=True)
    assert list(tree["state"]["model"]) == named(models["plain"])
    assert list(tree["state"]["average"]) == list(tree["handlers"]["AveragedModel"]) == named(averages["plain"])
    versions = getattr(tree["state"]["average"], "_metadata", None)  # which batch normalisation loads by
    assert versions == getattr(averages["plain"].state_dict(), "_metadata", {})

    async with Checkpoint(tmp_path, {"model": models[loaded], "average": averages[loaded]}) as checkpoint:
        _kept = engine_of(models[loaded], own[loaded])  # a Checkpoint does not keep it
        checkpoint.attach(_kept)
        assert await checkpoint.restore() is not None
    for some in (models, averages, own):
        assert_equal_bits(list(some["wrapped"].state_dict().values()), list(some["plain"].state_dict().values()))
    assert own[loaded].module(torch.ones(2, 2)).isfinite().all()


async def test_block_may_be_compiled_after_the_checkpoint_was_made(tmp_path: Path) -> None:
    model = build()
    async with Checkpoint(tmp_path, {"model": model}) as checkpoint:
        with_block(compiled)(model)
        engine: AnyEngine = Engine(lambda engine, batch: None)
        checkpoint.attach(engine, Events.COMPLETED)
        await engine.run([1])
        await checkpoint.load()
        path = checkpoint.list()[-1].path
    assert list(torch.load(path / "state.pt", weights_only=True)["state"]["model"]) == named(build())


async def test_names_that_do_not_fit_are_named_all_the_same(tmp_path: Path) -> None:
    async with Checkpoint(tmp_path, {"model": with_block(compiled)(build())}) as checkpoint:
        engine: AnyEngine = Engine(lambda engine, batch: None)
        checkpoint.attach(engine, Events.COMPLETED)
        await engine.run([1])
    other = torch.nn.Sequential(compiled(torch.nn.Linear(2, 2)))
    async with Checkpoint(tmp_path, {"model": other}) as checkpoint:
        with pytest.raises(CheckpointMismatch, match=r"(?s)state\['model'\].*1\.weight"):
            await checkpoint.load()

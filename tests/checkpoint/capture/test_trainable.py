"""`trainable(model)`: what is trained is saved, what is frozen is left to the program."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.record import AnyEngine

from aengine import CheckpointMismatch, Engine, Events
from aengine.__main__ import main as command
from aengine.checkpoint import Checkpoint, trainable


class Adapted(torch.nn.Module):
    """A large base that is frozen, a batch norm in training mode, an adapter of rank 1, a head that is tied to it."""

    mask: torch.Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = torch.nn.Linear(300, 300)
        self.norm = torch.nn.BatchNorm1d(300)
        self.register_buffer("mask", torch.ones(300, 300))
        self.register_buffer("cache", torch.zeros(300, 300), persistent=False)
        for parameter in self.parameters():
            parameter.requires_grad = False
        self.down = torch.nn.Linear(300, 1, bias=False)
        self.up = torch.nn.Linear(1, 300, bias=False)
        self.head = torch.nn.Linear(300, 1, bias=False)
        self.head.weight = self.down.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.base(x) * self.mask[0])
        head: torch.Tensor = self.head(x + self.up(self.down(x)))
        return head


def trainer(model: Any) -> tuple[AnyEngine, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1)

    def step(engine: AnyEngine, batch: int) -> float:
        torch.manual_seed(batch)
        optimizer.zero_grad()
        loss = model(torch.randn(4, 300)).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Engine(step), optimizer


async def train(directory: Path, model: Any, steps: int, **parts: Any) -> list[float]:
    """Train, or go on, to so many steps, and return the losses of these."""
    engine, optimizer = trainer(model)
    losses: list[float] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
    parts = parts or {"adapter": trainable(model)}
    async with Checkpoint(directory, {**parts, "optimizer": optimizer}) as checkpoint:
        checkpoint.attach(engine, Events.COMPLETED)
        await checkpoint.restore()
        engine.state.max_iters = steps
        await engine.run(range(100), max_iters=steps)
    return losses


@pytest.mark.parametrize("wrap", ["not", "compiled", "part compiled", "parallel"])
async def test_a_run_resumed_from_what_is_trained_is_exact_and_the_base_not_saved(tmp_path: Path, wrap: str) -> None:
    whole = await train(tmp_path / "whole", Adapted(), 8)
    first = await train(tmp_path / "run", Adapted(), 4)
    (state,) = (tmp_path / "run").glob("step-*/state.pt")
    assert state.stat().st_size < 60_000, "and the base is of 360 kB"
    model: Any = Adapted()
    if wrap == "compiled":
        model = torch.compile(model, backend="eager")
    if wrap == "part compiled":
        model.base = torch.compile(model.base, backend="eager")
    if wrap == "parallel":
        model = torch.nn.DataParallel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler
        assert first + await train(tmp_path / "run", model, 8) == whole


async def test_it_says_what_it_leaves_to_the_program(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await train(tmp_path, Adapted(), 2)
    with caplog.at_level(logging.INFO):
        await train(tmp_path, Adapted(), 2)
    # the base's, and the norm's
    assert (
        "Adapted: 6 parameters and buffers were restored; 4 frozen parameters, of 90900 numbers, are not" in caplog.text
    )


def test_what_is_saved_has_the_names_of_the_model_and_shares_the_memory_of_tied_weights() -> None:
    model = Adapted()
    part = trainable(torch.nn.DataParallel(model))
    saved = part.state_dict()
    assert list(saved) == ["down.weight", "up.weight", "head.weight"]
    assert saved["down.weight"].data_ptr() == saved["head.weight"].data_ptr() == model.down.weight.data_ptr()
    model(torch.randn(4, 300))
    changed = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert part.state_dict().keys() == saved.keys() | changed
    model.mask.zero_()
    assert part.state_dict().keys() == saved.keys() | changed | {"mask"}


def test_buffers_that_were_not_saved_are_put_back() -> None:
    model = Adapted()
    part = trainable(model)
    saved = {name: one.clone() for name, one in part.state_dict().items()}
    model(torch.randn(4, 300))
    model.mask.zero_()
    part.load_state_dict(saved)
    assert model.mask.eq(1).all()
    assert model.norm.running_mean is not None
    assert model.norm.running_mean.eq(0).all()


def test_what_was_trained_once_stays_in() -> None:
    model = Adapted()
    part = trainable(model)
    model.base.bias.requires_grad_()
    assert "base.bias" in part.state_dict()
    model.base.bias.requires_grad = False
    saved = part.state_dict()
    assert "base.bias" in saved
    again = Adapted(1)
    part = trainable(again)
    part.load_state_dict(saved)
    assert again.base.bias.equal(model.base.bias)
    assert "base.bias" in part.state_dict()


class Extra(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scale = 1.0

    def get_extra_state(self) -> float:
        return self.scale

    def set_extra_state(self, state: float) -> None:
        self.scale = state


def test_extra_state_is_saved() -> None:
    model, again = torch.nn.Sequential(Extra()), torch.nn.Sequential(Extra())
    model[0].scale = 2.0  # type: ignore[assignment]
    trainable(again).load_state_dict(trainable(model).state_dict())
    assert again[0].scale == 2.0


async def test_an_adapter_of_another_form_does_not_fit(tmp_path: Path) -> None:
    await train(tmp_path, Adapted(), 1)
    unfrozen = Adapted()
    unfrozen.base.bias.requires_grad_()
    with pytest.raises(CheckpointMismatch, match=r"base\.bias require gradients here and were not saved: freeze"):
        await train(tmp_path, unfrozen, 1)
    without = Adapted()
    del without.up
    with pytest.raises(CheckpointMismatch, match=r"the model has no up\.weight: build it"):
        await train(tmp_path, without, 1)
    other = Adapted()
    other.down = other.head = torch.nn.Linear(300, 2, bias=False)
    with pytest.raises(CheckpointMismatch, match="size mismatch"):
        await train(tmp_path, other, 1)


async def test_it_is_exported_and_loaded_by_its_name(tmp_path: Path) -> None:
    model = Adapted()
    await train(tmp_path, model, 1)
    file = tmp_path / "adapter.safetensors"
    assert command(["checkpoints", "export", str(tmp_path), "--safetensors", str(file), "--part", "adapter"]) == 0
    assert load_file(file)["down.weight"].equal(model.down.weight)
    again = Adapted(1)
    async with Checkpoint(tmp_path, {"adapter": trainable(again)}) as checkpoint:
        await checkpoint.load(only=["adapter"])
    assert again.up.weight.equal(model.up.weight)
    assert not again.base.weight.equal(model.base.weight)


def test_what_cannot_be_trained_is_refused() -> None:
    frozen = Adapted()
    for parameter in frozen.parameters():
        parameter.requires_grad = False
    with pytest.raises(ValueError, match=r"no parameter of the model .* requires gradients"):
        trainable(frozen)
    with pytest.raises(TypeError, match=r"trainable\(model\) takes a module, got dict"):
        trainable({})  # type: ignore[arg-type]

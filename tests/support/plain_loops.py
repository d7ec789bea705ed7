"""A plain training loop, its model and data, to compare the engine's losses and weights with bit by bit."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from aengine import Events
from aengine.engine import Engine

ROWS, WIDTH, BATCH = 28, 5, 4  # 7 batches to an epoch
LOSS = torch.nn.functional.mse_loss
Batches = list[tuple[torch.Tensor, torch.Tensor]]
SGD_OF_HALF: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}


def batches() -> Batches:
    inputs = torch.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH).sin()
    return list(zip(inputs.split(BATCH), inputs.square().sum(1, keepdim=True).split(BATCH), strict=True))


class Unsized:
    """The same batches, without a length, and with a state: the position."""

    def __init__(self) -> None:
        self._next = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while self._next < len(batches()):
            self._next += 1
            yield batches()[self._next - 1]
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._next = state_dict["next"]


def build() -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    """Return a model with dropout and batch normalisation, and its optimizer: with the same seed, the same."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
    )
    return model, torch.optim.SGD(model.parameters(), **SGD_OF_HALF)


def plain_loop(  # noqa: PLR0913 -- what the trainer takes
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int = 2,
    accumulate: int = 1,
    norm: float | None = None,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    after_step: Callable[[], object] = lambda: None,
    knows_length: bool = True,
) -> list[float]:
    """The usual loop over epochs and batches. Returns the losses.

    A step is made with the mean of the gradients of its batches. Where the length is not known, the size of the last
    group is not either, until it has ended.
    """
    losses, data = [], batches()
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(epochs):
        for number, (x, y) in enumerate(data, start=1):
            model.train()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = LOSS(model(x), y)
            last = len(data) % accumulate
            is_of_last = number > len(data) - last
            scaler.scale(loss / (last if is_of_last and knows_length else accumulate)).backward()
            if number % accumulate == 0 or number == len(data):
                if is_of_last and not knows_length:
                    for parameter in model.parameters():
                        assert parameter.grad is not None
                        parameter.grad *= accumulate / last
                if norm is not None:
                    scaler.unscale_(optimizer)
                    clip_grad_norm_(model.parameters(), norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                after_step()
            losses.append(loss.item())
    return losses


def record_losses(engine: Engine[Any, Any]) -> list[torch.Tensor]:
    losses: list[torch.Tensor] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
    return losses


def as_numbers(losses: Iterable[torch.Tensor]) -> list[float]:
    return [loss.item() for loss in losses]


def assert_equal_bits(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)

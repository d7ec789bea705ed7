"""Real torch steps for the benchmarks: scikit-learn's digits, a small network and a wide one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped] # it has no stubs
from torch import nn

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
Step: TypeAlias = Callable[[object, Batch], float]


def digit_batches(size: int) -> list[Batch]:
    """The 1,797 digits in batches of that size; a batch larger than the set repeats images."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)
    wanted = torch.arange(max(len(x) // size, 1) * size) % len(x)
    return list(zip(x[wanted].split(size), y[wanted].split(size), strict=True))


def network(width: int, layers: int) -> nn.Module:
    """A multilayer perceptron from 8 x 8 pixels to ten digits."""
    modules: list[nn.Module] = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(layers - 1):
        modules += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*modules, nn.Linear(width, 10))


def training_step(width: int, layers: int) -> Step:
    """The usual step: forward, loss, backward, optimizer."""
    model = network(width, layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss_fn = nn.CrossEntropyLoss()

    def step(_engine: object, batch: Batch) -> float:
        x, y = batch
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def seconds_a_step(step: Step, batches: list[Batch], seconds: float = 0.3) -> float:
    """How long a step takes in a bare loop on this thread, after a short warm-up."""
    for batch in batches[:5]:
        step(None, batch)
    count, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        step(None, batches[count % len(batches)])
        count += 1
    return (time.perf_counter() - started) / count


def wide_step() -> tuple[Step, list[Batch]]:
    """A step of width 512, about 7 ms on two cores."""
    return training_step(512, 3), digit_batches(128)


def twenty_millisecond_step() -> tuple[Step, list[Batch]]:
    """The same network with batches that take it about 20 ms here."""
    step = training_step(512, 3)
    size = 512
    seconds = seconds_a_step(step, digit_batches(size))
    return step, digit_batches(int(size * 0.020 / seconds))


def small_step() -> tuple[Step, list[Batch]]:
    """A step of about 0.3 ms on the digits."""
    return training_step(64, 1), digit_batches(64)


def run_parallel_operations() -> None:
    """Do what loading data and building models does: open parallel regions on the calling thread."""
    matrix = torch.randn(1024, 1024)
    for _ in range(5):
        matrix = torch.tanh(matrix @ matrix)

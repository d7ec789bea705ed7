"""The training that the kill campaign kills: with everything that has a state, and a digest of it at the end.

Its programs differ in where the step runs, in the data, and in whether the position of the data is saved as it must be.
"""

import hashlib
import logging
import random
import warnings
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import numpy as np
import torch
import torch._dynamo  # now, as of trio: otherwise each child would import it in its first step
import trio  # noqa: F401 -- now, and not in each child
from anyio.lowlevel import checkpoint as breathe
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]  # as it is

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint, Keep
from aengine.errors import CheckpointWarning

AnyEngine: TypeAlias = Engine[Any, Any]
Report: TypeAlias = Callable[..., None]

SAMPLES, BATCH, EPOCHS = 60, 4, 4
EPOCH = SAMPLES // BATCH
INPUTS = torch.randn(SAMPLES, 16, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS.sum(1, keepdim=True)


class History:
    """Every loss so far, as part of the state. A save begins by asking for it, which is reported."""

    def __init__(self, report: Report) -> None:
        self.losses: list[float] = []
        self._report = report

    def state_dict(self) -> dict[str, Any]:
        self._report("save")
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.losses = list(state_dict["losses"])


class Smoothed:
    """A handler with a state: the loss as a metric, smoothed."""

    def __init__(self) -> None:
        self.value = 0.0

    def __call__(self, engine: AnyEngine) -> None:
        self.value = 0.9 * self.value + 0.1 * engine.state.output
        engine.state.metrics["loss"] = self.value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.value = state_dict["value"]


class Stream:
    """Endless async batches, in another order at each pass, with a state: the position."""

    def __init__(self) -> None:
        self._passes = self._next = 0

    async def __aiter__(self) -> AsyncIterator[list[torch.Tensor]]:
        while True:
            order = random.Random(self._passes).sample(range(SAMPLES), SAMPLES)
            chosen = order[self._next : self._next + BATCH]
            self._next += BATCH
            if self._next == SAMPLES:
                self._passes, self._next = self._passes + 1, 0
            await breathe()
            yield [INPUTS[chosen], TARGETS[chosen]]

    def state_dict(self) -> dict[str, int]:
        return {"passes": self._passes, "next": self._next}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self._passes, self._next = state_dict["passes"], state_dict["next"]


class CarelessStream(Stream):
    """The same, saved as a part by mistake: the position of the source, not of the training. See `Training.parts`."""

    async def batches(self) -> AsyncIterator[list[torch.Tensor]]:
        async for batch in self:
            yield batch


def shuffled() -> Any:
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=BATCH, shuffle=True)


def shuffled_by_torchdata() -> Any:
    return StatefulDataLoader(TensorDataset(INPUTS, TARGETS), batch_size=BATCH, shuffle=True)


@dataclass(frozen=True)
class Program:
    data: Callable[[], Any]
    prefetch: int
    is_async: bool


PROGRAMS = {
    "plain": Program(shuffled, prefetch=4, is_async=False),
    "async": Program(shuffled, prefetch=4, is_async=True),
    "without prefetch": Program(shuffled, prefetch=0, is_async=False),
    "async without prefetch": Program(shuffled, prefetch=0, is_async=True),
    "stream": Program(Stream, prefetch=4, is_async=False),
    "async stream": Program(Stream, prefetch=4, is_async=True),
    "torchdata": Program(shuffled_by_torchdata, prefetch=4, is_async=False),
    "async torchdata": Program(shuffled_by_torchdata, prefetch=4, is_async=True),
    "careless": Program(CarelessStream, prefetch=4, is_async=True),
    "careless without prefetch": Program(CarelessStream, prefetch=0, is_async=True),
}


class Training:
    """The model and all that changes with it."""

    def __init__(self, report: Report) -> None:
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        nn = torch.nn
        self.model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.3), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=7, gamma=0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=5)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.history = History(report)
        self._report = report

    def step(self, engine: Any, batch: list[torch.Tensor]) -> float:
        inputs, targets = batch
        noise = torch.tensor(random.gauss(0, 0.01) + float(np.random.randn()) * 0.01)
        loss = torch.nn.functional.mse_loss(self.model(inputs + noise), targets)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.average.update_parameters(self.model)
        self.history.losses.append(loss.item())
        self._report("iteration", engine.state.iteration)
        return loss.item()

    async def async_step(self, engine: AnyEngine, batch: list[torch.Tensor]) -> float:
        await breathe()
        loss = self.step(engine, batch)
        await breathe()
        return loss

    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "average": self.average,
            "history": self.history,
        }

    def digest(self, *others: Any) -> str:
        """Return a checksum of every bit of it, and of the random generators."""
        hashed = hashlib.sha256()
        _feed(hashed, {name: part.state_dict() for name, part in self.parts().items()})
        _feed(hashed, [random.getstate(), *np.random.get_state(), torch.get_rng_state(), *others])
        return hashed.hexdigest()


def _feed(hashed: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        _feed(hashed, list(value.items()))
    elif isinstance(value, list | tuple):
        for one in value:
            _feed(hashed, one)
    elif isinstance(value, torch.Tensor | np.ndarray):
        hashed.update(np.asarray(value).tobytes())
    else:
        hashed.update(repr(value).encode())


def run(options: dict[str, Any], report: Report) -> None:
    """Resume from the newest checkpoint, if there is one, and run to the end."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CheckpointWarning)
    logging.getLogger("aengine").addHandler(logging.NullHandler())
    anyio.run(train, PROGRAMS[options["program"]], options["directory"], report, backend=options["backend"])


def _strays(directory: str) -> list[str]:
    return [path.name for path in Path(directory).glob(".t*")]


async def train(program: Program, directory: str | None, report: Report) -> None:
    training, smoothed, data = Training(report), Smoothed(), program.data()
    engine: AnyEngine = Engine(training.async_step if program.is_async else training.step)
    engine.add_event_handler(Events.ITERATION_COMPLETED, smoothed)
    parts = training.parts()
    if isinstance(data, CarelessStream):
        parts["data"], data = data, data.batches
    if directory is not None:
        checkpoint = Checkpoint(directory, parts, keep=Keep(last=2, best=1, metric="loss", mode="min"))
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=5) | Events.EPOCH_COMPLETED)
        info = await checkpoint.restore()
        report("restored", info.path.name if info else "nothing", *_strays(directory))
    await engine.run(data, max_epochs=EPOCHS, epoch_length=EPOCH, prefetch=program.prefetch)
    if directory is not None:
        await checkpoint.aclose()
    report("finished", training.digest(smoothed.value, engine.state.metrics, engine.state.iteration))

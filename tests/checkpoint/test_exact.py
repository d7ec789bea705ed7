"""Runs that are resumed from a checkpoint go on as if they had never been stopped, to the last bit."""

import importlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from support.record import AnyEngine
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint, Keep

ROWS, WIDTH = 24, 5


def rows() -> torch.Tensor:
    return torch.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH)


# Data, of all the kinds that there are to resume


def in_a_list() -> Any:
    return list(rows().split(4))


def in_a_loader() -> Any:
    return DataLoader(TensorDataset(rows()), batch_size=4, shuffle=True)


def in_a_loader_with_a_generator() -> Any:
    return DataLoader(TensorDataset(rows()), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))


def in_a_stateful_loader() -> Any:
    torchdata: Any = importlib.import_module("torchdata.stateful_dataloader")  # it takes a second, and has no types
    return torchdata.StatefulDataLoader(TensorDataset(rows()), batch_size=4, shuffle=True)


def in_a_stream_of_hugging_face() -> Any:
    datasets: Any = importlib.import_module("datasets")  # it takes seconds, and has no types

    stream = datasets.Dataset.from_dict({"row": rows().tolist()}).to_iterable_dataset(num_shards=3)
    return stream.batch(batch_size=4)


class AsyncStream:
    """An async source of no known length, such as a broker's, that says where it stands."""

    def __init__(self) -> None:
        self._next = 0
        self._is_put_back = False

    async def __aiter__(self) -> AsyncIterator[torch.Tensor]:
        if not self._is_put_back:
            self._next = 0
        self._is_put_back = False
        while self._next < ROWS:
            await anyio.lowlevel.checkpoint()
            self._next += 4
            yield rows()[self._next - 4 : self._next]

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._next, self._is_put_back = state_dict["next"], True


DATA: list[Callable[[], Any]] = [
    in_a_list,
    in_a_loader,
    in_a_loader_with_a_generator,
    in_a_stateful_loader,
    in_a_stream_of_hugging_face,
    AsyncStream,
]


class History:
    """What the run has seen, which is a part of its state like any other."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = list(state_dict["losses"])


class Patience:
    """A handler that has state, which is not handed to the checkpoint."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, engine: AnyEngine) -> None:
        self.seen.append(engine.state.iteration)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = list(state_dict["seen"])


class Training:
    """A model with dropout, an optimizer, a scheduler, a scaler, an average, draws from every generator."""

    def __init__(self, directory: Path, make_data: Callable[[], Any], *, is_async: bool, prefetch: int) -> None:
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=12)
        self.scaler = torch.amp.GradScaler("cpu", growth_interval=3)
        self.own = random.Random(7)
        self.numpys = np.random.default_rng(8)
        self.history, self.patience = History(), Patience()
        self.data, self.prefetch = make_data(), prefetch
        self.engine: AnyEngine = Engine(self.async_step if is_async else self.step, name="trainer")
        self.engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: self.scheduler.step())
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, self.patience)
        state = {
            "nets": {"model": self.model, "average": self.average},
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "history": self.history,
            "own": self.own,
            "numpys": self.numpys,
        }
        self.checkpoint = Checkpoint(directory, state, keep=Keep(every_n=1))
        self.checkpoint.attach(self.engine, Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED)

    def step(self, engine: AnyEngine, batch: Any) -> float:
        if isinstance(batch, dict):
            batch = torch.tensor(batch["row"])
        inputs = batch[0] if isinstance(batch, list) else batch
        noise = random.random() + np.random.rand() + self.own.random() + self.numpys.random()
        self.optimizer.zero_grad()
        loss = (self.model(inputs) - noise).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update_parameters(self.model)
        value: float = loss.item()
        self.history.losses.append(value)
        engine.state.metrics["loss"] = value
        return value

    async def async_step(self, engine: AnyEngine, batch: Any) -> float:
        await anyio.lowlevel.checkpoint()
        return self.step(engine, batch)

    async def run(self, step: int | None = None) -> dict[str, Any]:
        """Run to the end, from a step if one is given, and return all that is to be equal."""
        if step is not None:
            torch.rand(17)  # whatever a new process has drawn
            random.random()
            await self.checkpoint.restore(step)
        await self.engine.run(self.data, max_epochs=2, prefetch=self.prefetch)
        await self.checkpoint.aclose()
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.history.losses,
            "seen": self.patience.seen,
            "metrics": self.engine.state.metrics,
            "place": (self.engine.state.iteration, self.engine.state.epoch),
            "drawn": (random.random(), np.random.rand(), torch.rand(3), self.own.random(), self.numpys.random()),
        }


@pytest.mark.covering(2)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it
@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("make_data", DATA, ids=lambda make: str(make.__name__))
async def test_resumed_run_equals_the_uninterrupted_one_bitwise(
    tmp_path: Path,
    make_data: Callable[[], Any],
    is_async: bool,  # noqa: FBT001 -- pytest passes it by name
    prefetch: int,
) -> None:
    def training() -> Training:
        return Training(tmp_path / "checkpoints", make_data, is_async=is_async, prefetch=prefetch)

    whole = await training().run()
    assert len(whole["losses"]) == 12
    assert len(set(whole["losses"])) == 12
    for step in (1, 5, 6, 8, 12):  # 6 is the end of an epoch, and 12 of the run
        resumed = await training().run(step)
        assert resumed["losses"] == whole["losses"], f"from step {step}"
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


async def test_position_taken_from_the_source_at_the_time_of_the_save_is_wrong(tmp_path: Path) -> None:
    """The control: what was fetched ahead would never be stepped on."""

    class Ahead(AsyncStream):
        def state_dict(self) -> dict[str, int]:
            return vars(self)  # the live one, which goes on

        def load_state_dict(self, state_dict: dict[str, int]) -> None:
            super().load_state_dict({"next": state_dict["_next"]})

    def training() -> Training:
        return Training(tmp_path / "checkpoints", Ahead, is_async=False, prefetch=3)

    whole = await training().run()
    resumed = await training().run(2)
    assert len(resumed["losses"]) < len(whole["losses"])


def abandoned(directory: Path) -> list[Path]:
    return list(directory.glob("abandoned-step-*"))


async def test_run_that_went_back_is_gone_on_with_and_not_the_one_that_was_left(tmp_path: Path) -> None:
    def training() -> Training:
        return Training(tmp_path, in_a_list, is_async=False, prefetch=0)

    await training().run()
    looked = training()
    await looked.checkpoint.restore(5)
    await looked.checkpoint.aclose()
    assert [info.step for info in looked.checkpoint.list()][-1] == 12  # to look back changes nothing

    went_back = training()
    went_back.engine.add_event_handler(Events.ITERATION_COMPLETED(once=7), went_back.engine.terminate)
    await went_back.run(5)
    assert [info.step for info in went_back.checkpoint.list()] == [1, 2, 3, 4, 5, 6, 7]
    assert len(abandoned(tmp_path)) == 7  # steps 6 to 12

    resumed = training()
    info = await resumed.checkpoint.restore()
    await resumed.checkpoint.aclose()
    assert info is not None
    assert info.step == 7

"""A run that saves, for the tests of checkpoints: a test decides when its disk writes, and when it fails."""

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch
from anyio.lowlevel import checkpoint as breathe
from support.record import AnyEngine

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint, CheckpointInfo, TorchFile


class Valve(TorchFile):
    """Writes torch's format once it is open, or raises `error`.

    Attributes:
        is_open: cleared by a test to keep a save in progress.
        begun: set when a save begins to write.
        error: raised by the next save.
    """

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.begun = threading.Event()
        self.error: OSError | None = None

    def write(self, tree: Any, file: BinaryIO) -> None:
        self.begun.set()
        assert self.is_open.wait(60)
        error, self.error = self.error, None
        if error is not None:
            raise error
        super().write(tree, file)


class Run:
    """An engine that counts its steps in a model, and a Checkpoint of it that is not attached yet."""

    def __init__(
        self, directory: Path, *, thread: bool = False, grace: float = 30.0, valve: Valve | None = None, **options: Any
    ) -> None:
        self.directory = directory
        self.model = torch.nn.Linear(2, 1)
        torch.nn.init.zeros_(self.model.weight)
        self.engine: AnyEngine = Engine(self._step if thread else self._async_step, name="saved", grace=grace)
        self.valve = valve or Valve()
        self.checkpoint = Checkpoint(directory, {"model": self.model}, serializer=self.valve, **options)

    def _step(self, engine: AnyEngine, batch: Any) -> float:
        with torch.no_grad():
            self.model.weight += 1
        return self.steps

    async def _async_step(self, engine: AnyEngine, batch: Any) -> float:
        await breathe()
        return self._step(engine, batch)

    async def restore(self, which: Any = "latest", **options: bool) -> CheckpointInfo | None:
        """Have the Checkpoint attached, at no event more, and restore."""
        self.checkpoint.attach(self.engine)
        return await self.checkpoint.restore(which, **options)

    def before_step(self, step: int, act: Callable[[], object]) -> None:
        """Call `act` as a step begins, when earlier saves are over."""

        @self.engine.on(Events.ITERATION_STARTED(once=step))
        async def do() -> None:
            await self.checkpoint.flush()
            act()

    @property
    def steps(self) -> int:
        """How many steps the model has seen."""
        return int(self.model.weight[0, 0].item())

    @property
    def saved(self) -> list[int]:
        """The steps of the checkpoints that are there."""
        return [info.step for info in self.checkpoint.list()]


@asynccontextmanager
async def saving(directory: Path, **options: Any) -> AsyncIterator[Run]:
    """Make a run; in the end close its checkpoint, and assert that no temporary file and no open file is left."""
    run = Run(directory, **options)
    try:
        yield run
    finally:
        run.valve.is_open.set()
        await run.checkpoint.aclose()
    assert strays(directory) == []
    assert open_files(directory) == []


async def until(condition: Callable[[], bool]) -> None:
    """Yield to other tasks until the condition holds."""
    while not condition():
        await breathe()


class Counted:
    """A handler with a state."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.count = state_dict["count"]


def endless() -> Iterator[int]:
    return count()


def strays(directory: Path) -> list[str]:
    """Return what is in a directory of checkpoints and should not stay there."""
    return [path.name for path in directory.glob(".t*")]


def open_files(directory: Path) -> list[str]:
    """Return which files there this process has open, where the system tells."""
    found: list[str] = []
    for link in Path("/proc/self/fd").glob("*"):
        with suppress(FileNotFoundError):  # another thread's, which has just closed it
            found.append(str(link.readlink()))
    return [target for target in found if target.startswith(str(directory))]

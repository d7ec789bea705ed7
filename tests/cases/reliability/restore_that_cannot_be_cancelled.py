"""restore() is cancelled while it reads: it returns soon, and has changed nothing."""

import threading
from typing import Any

import anyio
import torch

from aengine import Checkpoint, Engine, Events
from aengine.checkpoint import TorchFile

MAY_GO_ON = threading.Event()


class Slow(TorchFile):
    def read(self, file: Any) -> Any:
        MAY_GO_ON.wait(10)  # a network file system on a bad day
        return super().read(file)


async def main() -> None:
    for resumes in (False, True):
        engine = Engine(lambda engine, batch: None)
        async with Checkpoint("checkpoints", {"model": torch.nn.Linear(2, 2)}, serializer=Slow()) as checkpoint:
            checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=2))
            if not resumes:
                await engine.run(range(4))
                continue
            with anyio.move_on_after(0.2) as scope:
                await checkpoint.restore()
            assert not MAY_GO_ON.is_set()
            MAY_GO_ON.set()
            assert scope.cancelled_caught
            assert engine.state.iteration == 0

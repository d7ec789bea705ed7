"""`every=1000, at_end=True` saves once more at the end of a run, also of one that is cancelled: no step is lost."""

import anyio
import torch

from aengine import Checkpoint, Engine, Events


async def main() -> None:
    engine = Engine(lambda engine, batch: None)
    async with Checkpoint("checkpoints", {"model": torch.nn.Linear(2, 2)}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=1000, at_end=True))
        with anyio.CancelScope() as scope:

            async def cancel() -> None:
                scope.cancel()

            engine.add_event_handler(Events.ITERATION_COMPLETED(once=99), cancel)
            await engine.run(range(500))
        steps = [info.step for info in checkpoint.list()]
    assert steps[-1:] >= [99]

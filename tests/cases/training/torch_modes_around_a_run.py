"""FlopCounterMode and the profiler around `await engine.run()` count what the step does, whichever thread it has."""

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from aengine import Engine

model = torch.nn.Linear(4, 4)


def step(engine: Engine, batch: int) -> None:
    model(torch.ones(2, 4)).sum().backward()


async def counted(*, thread: bool) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        await Engine(step, thread=thread).run(range(3))
    with profile() as profiler:
        await Engine(step, thread=thread).run(range(3))
    linears = sum(average.count for average in profiler.key_averages() if average.key == "aten::linear")
    return counter.get_total_flops(), linears


async def main() -> None:
    flops, linears = await counted(thread=False)
    assert flops > 0
    assert linears == 3
    assert await counted(thread=True) == (flops, linears)

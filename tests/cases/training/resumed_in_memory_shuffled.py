"""A run that failed, or was terminated, goes on in memory: of a shuffled DataLoader each sample comes once."""

import contextlib
from typing import Any

import torch
from torch.utils.data import DataLoader

from aengine import Engine, Events


def run(how: str) -> list[int]:
    torch.manual_seed(0)
    seen: list[int] = []
    failures = [OSError("transient")] if how == "raise" else []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        if engine.state.iteration == 7 and failures:
            raise failures.pop()
        seen.append(int(batch))

    engine = Engine(step)
    if how == "terminate":
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=6), engine.terminate)
    data: Any = range(12)
    loader: Any = DataLoader(data, shuffle=True)
    with contextlib.suppress(OSError):
        engine.run_sync(loader)
    engine.run_sync(loader)
    return seen


def main() -> None:
    for how in ("raise", "terminate"):
        assert sorted(run(how)) == list(range(12))

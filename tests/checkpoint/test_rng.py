"""`rng=`: whether a run that goes on from a checkpoint sets the generators back that the whole process shares."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.record import AnyEngine, Boom
from torch.utils.data import DataLoader

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint


def loader(*, own: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3) if own else None
    return DataLoader(list(range(12)), batch_size=1, shuffle=True, generator=generator)  # type: ignore[arg-type]


def draw() -> list[float]:
    """Draw from each of the generators that the process shares."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


async def run(directory: Path, seed: int, *, own: bool, fails_at: int | None, **options: Any) -> tuple[list[int], Any]:
    """Train an epoch, or go on with it. Returns the samples seen, and what is drawn right after the first step."""
    seen: list[int] = []
    drawn: list[Any] = []

    def step(engine: AnyEngine, batch: torch.Tensor) -> None:
        if engine.state.iteration == fails_at:
            raise Boom
        seen.append(int(batch))

    engine: AnyEngine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=6), lambda: drawn.extend(draw()))
    async with Checkpoint(directory, {"model": torch.nn.Linear(1, 1)}, **options) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(once=5))
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        await checkpoint.restore()
        try:
            await engine.run(loader(own=own))
        except Boom:
            return seen, None
    return seen, drawn


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("rng", ["process", "data"])
async def test_the_data_goes_on_and_the_process_is_reseeded_or_left_alone(
    tmp_path: Path, rng: str, *, own: bool
) -> None:
    first, _ = await run(tmp_path, 1, own=own, fails_at=6)
    rest, drawn = await run(tmp_path, 2, own=own, fails_at=None, rng=rng)
    assert len(first) == 5
    assert sorted(first + rest) == list(range(12)), "each sample once"
    whole, undisturbed = await run(tmp_path / "whole", 1, own=own, fails_at=None)
    assert first + rest == whole
    if rng == "process":
        assert drawn == undisturbed
    else:
        torch.manual_seed(2)
        random.seed(2)
        np.random.seed(2)
        assert drawn != undisturbed
        assert drawn == draw(), "as if there had been no checkpoint"


def test_another_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rng="):
        Checkpoint(tmp_path, torch.nn.Linear(1, 1), rng="all")  # type: ignore[arg-type]

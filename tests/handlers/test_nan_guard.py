"""The guard finds what is not finite, without waiting for it at each step, and before it is saved."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.record import AnyEngine
from torch.utils._python_dispatch import TorchDispatchMode

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint, Keep
from aengine.handlers import NanGuard


def guarded(bad_at: int, make: Callable[[float], Any] = torch.tensor, **options: Any) -> AnyEngine:
    """Return an engine whose output is made of 1.0, but in one iteration of NaN."""
    engine: AnyEngine = Engine(lambda engine, batch: make(math.nan if engine.state.iteration == bad_at else 1.0))
    NanGuard(**options).attach(engine)
    return engine


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (torch.tensor, "output"),
        (float, "output"),
        (lambda bad: {"loss": torch.tensor([1.0, bad]), "n": 3}, r"output\['loss'\]"),
        (lambda bad: (torch.tensor(1), [torch.ones(2), -math.inf if bad != 1.0 else 0.0]), r"output\[1\]\[1\]"),
        (lambda bad: torch.tensor(complex(1.0, bad)), "output"),
        (lambda bad: torch.tensor(bad, requires_grad=True, dtype=torch.bfloat16), "output"),
    ],
    ids=["tensor", "number", "dictionary", "nested", "complex", "bfloat16"],
)
async def test_run_fails_with_the_iteration_and_the_place(make: Callable[[float], Any], place: str) -> None:
    engine = guarded(3, make, every=4)
    with pytest.raises(FloatingPointError, match=rf"in iteration 3 the {place} was not finite"):
        await engine.run(range(10))
    assert engine.state.iteration == 4  # when it was looked at


async def test_finite_outputs_of_any_kind_pass() -> None:
    engine = guarded(0, lambda number: {"loss": torch.tensor(number), "name": "x", "n": torch.tensor(1), "none": None})
    state = await engine.run(range(45))
    assert state.iteration == 45


@pytest.mark.parametrize("end", ["epoch", "termination"])
async def test_results_not_read_yet_are_read_at_the_end(end: str) -> None:
    engine = guarded(3)
    if end == "termination":
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.terminate)
    with pytest.raises(FloatingPointError, match="in iteration 3 "):
        await engine.run(range(4))


async def test_output_transform_chooses_what_is_to_be_finite() -> None:
    engine = guarded(2, lambda bad: {"loss": 1.0, "perplexity": bad}, output_transform=lambda output: output["loss"])
    await engine.run(range(5))
    assert engine.state.iteration == 5


class Reads(TorchDispatchMode):
    """Counts when a number is read out of a tensor, for which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_before_it_is_due() -> None:
    engine = guarded(0, every=10)
    make: Any = Reads
    reads: Reads = make()
    counts: list[int] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: counts.append(reads.count))
    with reads:
        engine.run_sync(range(20))
    assert counts[:9] == [0] * 9
    assert counts[9:19] == [10] * 10
    assert counts[19] == 20


async def test_checkpoint_of_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    engine = guarded(4, every=100)
    async with Checkpoint(tmp_path, {}, keep=Keep(every_n=1)) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        with pytest.raises(FloatingPointError, match="in iteration 4 "):
            await engine.run(range(10))
        assert [info.step for info in checkpoint.list()] == [1, 2, 3]

        again = guarded(0, every=100)
        other = Checkpoint(tmp_path / "other", {})
        other.attach(again, Events.EPOCH_COMPLETED)
        await again.run(range(3))
        await other.aclose()


async def test_run_that_is_restored_and_tried_again_is_not_failed_for_what_was_before(tmp_path: Path) -> None:
    bad = [4]
    engine: AnyEngine = Engine(lambda engine, batch: math.nan if engine.state.iteration in bad else 1.0)
    NanGuard(every=5).attach(engine)
    async with Checkpoint(tmp_path, {}, keep=Keep(every_n=1)) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        with pytest.raises(FloatingPointError):
            await engine.run(range(10))
        bad.clear()
        await checkpoint.restore()
        await engine.run(range(10))
        assert engine.state.iteration == 10


async def test_removed_it_forgets_what_it_has_not_read() -> None:
    guard = NanGuard(every=100)
    first: AnyEngine = Engine(lambda engine, batch: math.nan)
    handle = guard.attach(first)
    first.add_event_handler(Events.ITERATION_COMPLETED(once=2), handle.remove)
    await first.run(range(3))
    second: AnyEngine = Engine(lambda engine, batch: 1.0)
    second.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: guard.attach(second))  # no STARTED comes
    state = await second.run(range(3))
    assert state.iteration == 3


@pytest.mark.parametrize("every", [0, -1, 2.5, None], ids=str)
def test_wrong_interval_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match="every= is a whole number of iterations, 1 or more; got"):
        NanGuard(every=every)

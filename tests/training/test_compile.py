"""Models compiled by inductor, on the CPU: trained and evaluated on the worker as in a plain loop, to the last bit."""

import shutil
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from support.plain_loops import LOSS, as_numbers, assert_equal_bits, batches, build, plain_loop, record_losses
from torch._dynamo.utils import counters

from aengine import Events
from aengine.checkpoint import Checkpoint
from aengine.training import create_supervised_evaluator, create_supervised_trainer

# The compiler of C++ that inductor looks for, and the headers of this Python, which what it writes includes.
CAN_COMPILE = (shutil.which("g++") or shutil.which("clang++")) and Path(
    sysconfig.get_path("include"), "Python.h"
).exists()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # a compilation takes some ten seconds, and many times that on a busy machine
    pytest.mark.skipif(not CAN_COMPILE, reason="needs a compiler of C++"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what inductor imports of torch
]

THREADS = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


@pytest.fixture(autouse=True)
def compile_here() -> Iterator[None]:
    """Compile in this process, rather than in some that would outlive the test, and begin with nothing compiled."""
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def build_compiled() -> tuple[torch.nn.Module, Any, torch.optim.Optimizer]:
    """Return a model, the same compiled, and its optimizer."""
    model, optimizer = build()
    return model, torch.compile(model), optimizer


def plain_losses(**options: Any) -> tuple[list[float], dict[str, Any]]:
    """Return what the plain loop makes of the compiled model: the losses, and the weights at the end."""
    model, compiled, optimizer = build_compiled()
    losses = plain_loop(compiled, optimizer, **options)
    return losses, model.state_dict()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@THREADS
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16], ids=str)
async def test_losses_equal_those_of_the_plain_loop_over_the_compiled_model(
    autocast_dtype: torch.dtype | None,
    thread: bool,  # noqa: FBT001 -- pytest passes it by name
) -> None:
    expected, weights = plain_losses(dtype=autocast_dtype)
    torch._dynamo.reset()
    model, compiled, optimizer = build_compiled()
    trainer = create_supervised_trainer(compiled, optimizer, LOSS, thread=thread, autocast_dtype=autocast_dtype)
    losses = record_losses(trainer)
    await trainer.run(batches(), max_epochs=2)
    assert graphs() > 0
    assert as_numbers(losses) == expected
    assert len(set(expected)) == 14
    assert_equal_bits(model.state_dict(), weights)


async def test_model_that_was_warmed_up_on_the_main_thread_is_not_compiled_again_on_the_worker() -> None:
    """What dynamo guards belongs to threads in part: grad mode, autocast, the number of threads."""
    expected, weights = plain_losses()
    torch._dynamo.reset()
    model, compiled, optimizer = build_compiled()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chance = torch.get_rng_state()
    compiled.train()
    LOSS(compiled(batches()[0][0]), batches()[0][1]).backward()
    optimizer.zero_grad()
    model.load_state_dict(before)
    torch.set_rng_state(chance)
    warm = graphs()
    assert warm > 0

    trainer = create_supervised_trainer(compiled, optimizer, LOSS)
    losses = record_losses(trainer)
    where: set[str] = set()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: where.add(threading.current_thread().name))
    await trainer.run(batches(), max_epochs=2)
    assert where == {"aengine trainer"}
    assert graphs() == warm
    assert as_numbers(losses) == expected
    assert_equal_bits(model.state_dict(), weights)


async def test_model_that_was_compiled_on_one_worker_serves_the_next_run_and_the_main_thread() -> None:
    expected, weights = plain_losses(epochs=4)
    torch._dynamo.reset()
    model, compiled, optimizer = build_compiled()
    trainer = create_supervised_trainer(compiled, optimizer, LOSS)
    losses = record_losses(trainer)
    await trainer.run(batches(), max_epochs=1)
    compiled_once = graphs()
    await trainer.run(batches(), max_epochs=3)  # another run, and so another thread
    optimizer.zero_grad()  # which the plain loop does after a step, and the trainer before the next
    rest = plain_loop(compiled, optimizer, epochs=1)
    assert graphs() == compiled_once
    assert as_numbers(losses) + rest == expected
    assert_equal_bits(model.state_dict(), weights)


@THREADS
async def test_evaluation_beside_training_equals_that_of_the_plain_loop(thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    """One compiled model in both modes, with gradients and without, in turn."""
    expected: list[torch.Tensor] = []
    _, compiled, optimizer = build_compiled()
    losses = []
    for _ in range(2):
        losses += plain_loop(compiled, optimizer, epochs=1)
        compiled.eval()
        with torch.no_grad():
            expected += [compiled(x) for x, _ in batches()]

    torch._dynamo.reset()
    _, compiled, optimizer = build_compiled()
    trainer = create_supervised_trainer(compiled, optimizer, LOSS, thread=thread)
    evaluator = create_supervised_evaluator(compiled, thread=thread)
    predictions: list[torch.Tensor] = []
    evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: predictions.append(engine.state.output[0].clone())
    )
    trained = record_losses(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    async def evaluate() -> None:
        await evaluator.run(batches())

    await trainer.run(batches(), max_epochs=2)
    assert as_numbers(trained) == losses
    assert_equal_bits(predictions, expected)
    assert not any(prediction.requires_grad for prediction in predictions)


async def test_checkpoint_of_a_compiled_model_is_restored_into_a_plain_one_and_back(tmp_path: Path) -> None:
    model, compiled, optimizer = build_compiled()
    trainer = create_supervised_trainer(compiled, optimizer, LOSS)
    async with Checkpoint(tmp_path, {"model": compiled, "optimizer": optimizer}) as saving:
        saving.attach(trainer, Events.EPOCH_COMPLETED)
        await trainer.run(batches(), max_epochs=2)

    plain, plain_optimizer = build()
    resumed = create_supervised_trainer(plain, plain_optimizer, LOSS)
    async with Checkpoint(tmp_path, {"model": plain, "optimizer": plain_optimizer}) as restoring:
        restoring.attach(resumed, Events.EPOCH_COMPLETED)
        assert await restoring.restore() is not None
        assert resumed.state.epoch == 2
        assert_equal_bits(plain.state_dict(), model.state_dict())
        assert_equal_bits(plain_optimizer.state_dict(), optimizer.state_dict())
        await resumed.run(batches(), max_epochs=3)

    other, other_compiled, other_optimizer = build_compiled()
    last = create_supervised_trainer(other_compiled, other_optimizer, LOSS)
    async with Checkpoint(tmp_path, {"model": other_compiled, "optimizer": other_optimizer}) as restoring:
        restoring.attach(last)
        await restoring.restore()
        assert_equal_bits(other.state_dict(), plain.state_dict())


async def test_run_of_a_compiled_model_that_is_resumed_equals_one_that_was_not_stopped(tmp_path: Path) -> None:
    async def train(folder: str, stop_at: int | None = None) -> list[float]:
        torch._dynamo.reset()
        _, compiled, optimizer = build_compiled()
        trainer = create_supervised_trainer(compiled, optimizer, LOSS)
        losses = record_losses(trainer)
        async with Checkpoint(tmp_path / folder, {"model": compiled, "optimizer": optimizer}) as saving:
            saving.attach(trainer, Events.ITERATION_COMPLETED(every=5))
            await saving.restore()
            if stop_at is not None:
                trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), trainer.terminate)
            await trainer.run(batches(), max_epochs=2)
        return as_numbers(losses)

    whole = await train("whole")
    assert await train("parts", stop_at=10) + await train("parts") == whole
    assert len(whole) == 14

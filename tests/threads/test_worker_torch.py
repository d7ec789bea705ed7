"""torch's settings that belong to a thread: those of the caller hold in its run, and no other's do."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import anyio
import pytest
import torch
from anyio.lowlevel import checkpoint

from aengine import Engine, Events
from aengine.threads.openmp import _openmp


class Settings(NamedTuple):
    grad: bool
    inference: bool
    autocast: bool
    autocast_dtype: torch.dtype
    caches: bool
    device: torch.device
    dtype: torch.dtype
    result: torch.dtype
    """Of a product: what autocast is about."""


def settings() -> Settings:
    ones = torch.ones(2, 2)
    return Settings(
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        ones.device,
        torch.get_default_dtype(),
        (ones.cpu() @ ones.cpu()).dtype if ones.device.type == "cpu" else ones.dtype,
    )


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def grad_disabled_by_call() -> Iterator[None]:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "set_grad_enabled": grad_disabled_by_call,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16, cache_enabled=False),
    "device": lambda: torch.device("meta"),
    "set_default_device": default_device,
    "set_default_dtype": default_dtype,
}

contexts = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)


@contexts
async def test_the_settings_of_the_caller_hold_in_its_run(
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    seen: dict[str, Settings] = {}

    def see(where: str) -> None:
        seen[where] = settings()

    def step(engine: Engine[Any, None], batch: Any) -> None:
        see(f"step {engine.state.iteration}")

    def data() -> Iterator[int]:
        see("data")
        yield 1
        yield 2

    engine = Engine(step)
    nested: Engine[int, None] = Engine(lambda engine, batch: see("nested step"))
    engine.add_event_handler(Events.STARTED, see, "handler")

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    async def nest() -> None:
        await checkpoint()
        see("async handler")
        await nested.run([1])

    engine.add_event_handler(Events.COMPLETED, lambda: nested.run_sync([1]))
    with context():
        expected = settings()
        await engine.run(data)
        await Engine(step).run(data, prefetch=1)
    assert seen == dict.fromkeys(["data", "step 1", "step 2", "handler", "async handler", "nested step"], expected)
    assert settings() != expected or context is nullcontext


@contexts
async def test_each_run_has_the_settings_of_its_own_caller(
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    """An evaluation in a handler, under no_grad say, shares the thread of the training."""
    seen: list[Settings] = []

    def step(engine: Engine[Any, None], batch: Any) -> None:
        seen.append(settings())

    outside = settings()
    trainer, evaluator = Engine(step), Engine(step)

    @trainer.on(Events.ITERATION_COMPLETED)
    async def evaluate() -> None:
        with context():
            inside.append(settings())
            await evaluator.run([1])

    inside: list[Settings] = []
    await trainer.run(range(2))
    assert seen == [outside, inside[0], outside, inside[0]]
    assert settings() == outside


KEPT: list[Any] = []
"""What is entered and never left lives on: here."""


def leave_behind_grad_mode() -> None:
    torch.set_grad_enabled(False)


def leave_behind_autocast() -> None:
    KEPT.append(torch.autocast("cpu", dtype=torch.float16))
    KEPT[-1].__enter__()


def leave_behind_inference_mode() -> None:
    KEPT.append(torch.inference_mode())
    KEPT[-1].__enter__()


def leave_behind_default_device() -> None:
    torch.set_default_device("meta")


@pytest.mark.parametrize(
    "leave_behind",
    [
        leave_behind_grad_mode,
        leave_behind_autocast,
        leave_behind_inference_mode,
        leave_behind_default_device,
    ],
)
async def test_what_a_step_leaves_behind_changes_no_other_run(
    leave_behind: Callable[[], None],
) -> None:
    before = settings()
    seen: dict[str, Settings] = {}

    def change(engine: Engine[Any, None], batch: Any) -> None:
        leave_behind()
        assert settings() != before

    changing = Engine(change)
    outer: Engine[int, None] = Engine(lambda engine, batch: seen.update(outer=settings()))
    beside: Engine[int, None] = Engine(lambda engine, batch: seen.update(beside=settings()))

    @outer.on(Events.ITERATION_COMPLETED)
    async def nest() -> None:
        await changing.run([1])

    try:
        await changing.run([1])
        seen["caller"] = settings()
        async with anyio.create_task_group() as group:
            group.start_soon(changing.run, range(3))
            group.start_soon(beside.run, range(3))
        await beside.run([1])
        await outer.run(range(2))  # its second step comes after a nested run on its thread
        seen["caller again"] = settings()
    finally:
        KEPT.clear()
    assert seen == dict.fromkeys(["caller", "beside", "outer", "caller again"], before)


async def test_what_a_step_leaves_behind_holds_for_the_rest_of_its_run() -> None:
    """As it would in a plain loop."""
    seen: list[bool] = []

    def step(engine: Engine[int, None], batch: int) -> None:
        seen.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED, checkpoint)
    await engine.run(range(3))
    assert seen == [True, False, False]
    await engine.run(range(1))
    assert seen[3] is True


async def test_a_training_step_on_the_worker_learns_what_a_plain_loop_learns() -> None:
    def train(engine: Engine[torch.Tensor, float] | None, batch: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = (model(batch) - 3 * batch).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    def build() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    batches = list(torch.randn(10, 8, 4, generator=torch.Generator().manual_seed(1)))
    model, optimizer = build()
    losses = [train(None, batch) for _ in range(3) for batch in batches]
    expected = model.weight.detach().clone()

    model, optimizer = build()
    seen: list[float] = []
    engine: Engine[torch.Tensor, float] = Engine(train)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output))
    await engine.run(batches, max_epochs=3)
    assert seen == losses
    assert torch.equal(model.weight, expected)


@pytest.mark.parametrize("threaded", [True, False])
async def test_a_step_with_an_autocast_of_its_own_computes_with_the_weights_as_they_are(
    threaded: bool,  # noqa: FBT001 -- pytest passes it by name
) -> None:
    """torch keeps the weights that it has cast until the outermost autocast is left: that must be the step's."""
    data = [torch.ones(2, 4)] * 4

    def losses_of(run: Callable[[Callable[[Any, Any], None]], Any]) -> tuple[list[float], Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses: list[float] = []

        def step(engine: Any, batch: torch.Tensor) -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        return losses, run(step)

    plain, _ = losses_of(lambda step: [step(None, batch) for batch in data])
    ours, running = losses_of(lambda step: Engine(step, thread=threaded).run(data))
    await running
    assert ours == plain
    assert len(set(plain)) == 4


@pytest.mark.parametrize("count", [1, 2])
async def test_a_convolution_on_the_worker_keeps_to_the_number_of_threads(count: int) -> None:
    """torch sets it for a thread that asks, as most operations do; convolutions only look at what OpenMP says."""
    openmp = _openmp()
    if openmp is None:
        pytest.skip("torch has another OpenMP here")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        state = await Engine(lambda _, batch: openmp.omp_get_max_threads()).run([1])
    finally:
        torch.set_num_threads(before)
    assert state.output == count

"""torch's modes, hooks and profiler around `run()`: they see its step as they see a plain loop's, or are refused."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from anyio.lowlevel import checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from aengine import Engine, Events

Seen = Callable[[], object]
"""Says what a mode has seen."""

Context = Callable[[], AbstractContextManager[Seen]]


class FunctionMode(TorchFunctionMode):
    """Sees each function of torch that is called. Counts anew each time it is entered, as some of torch's modes do."""

    def __enter__(self) -> Any:
        self.seen: list[str] = []
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __enter__(self) -> Any:
        self.seen: list[str] = []
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@contextmanager
def function_mode() -> Iterator[Seen]:
    with FunctionMode() as mode:
        yield lambda: mode.seen


@contextmanager
def dispatch_mode() -> Iterator[Seen]:
    with DispatchMode() as mode:  # type: ignore[no-untyped-call]
        yield lambda: mode.seen


@contextmanager
def flops() -> Iterator[Seen]:
    with FlopCounterMode(display=False) as counter:
        yield counter.get_total_flops


@contextmanager
def fake_tensors() -> Iterator[Seen]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield lambda: None  # the type of what the step returns says it


@contextmanager
def saved_tensors_hooks() -> Iterator[Seen]:
    packed: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: packed


@contextmanager
def two_pairs_of_hooks() -> Iterator[Seen]:
    with saved_tensors_hooks() as outer, saved_tensors_hooks() as inner:
        yield lambda: (outer(), inner())


@contextmanager
def no_saved_tensors_hooks() -> Iterator[Seen]:
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        yield lambda: None


@contextmanager
def no_multithreading() -> Iterator[Seen]:
    with torch.autograd.set_multithreading_enabled(False):
        yield lambda: None


@contextmanager
def several() -> Iterator[Seen]:
    with function_mode() as functions, torch.device("meta"), flops() as operations, fake_tensors():
        yield lambda: (functions(), operations())


@contextmanager
def profiler() -> Iterator[Seen]:
    counts: list[int] = []
    with profile() as recorded:
        yield lambda: counts
    counts.append(linears(recorded))


@contextmanager
def torch_function_disabled() -> Iterator[Seen]:
    with torch._C.DisableTorchFunctionSubclass():
        yield torch._C._is_torch_function_enabled


CARRIED: list[Context] = [saved_tensors_hooks, two_pairs_of_hooks, no_saved_tensors_hooks, no_multithreading]
"""In force on the worker, and on the thread that pulls data ahead."""

BOUND: dict[Context, str] = {
    function_mode: "FunctionMode",
    dispatch_mode: "DispatchMode",
    flops: "FlopCounterMode",
    fake_tensors: "FakeTensorMode",
    several: "FakeTensorMode and FlopCounterMode and FunctionMode",
    profiler: "a torch profiler",
    torch_function_disabled: "DisableTorchFunctionSubclass",
}
"""Of one thread only: the step runs on that."""


def linears(recorded: profile) -> int:
    """Say how many calls of compute() a profiler has recorded."""
    return sum(event.count for event in recorded.key_averages() if event.key == "aten::linear")


def compute(*_: Any) -> object:
    """Use torch in every way that a mode may see, and say what is in force."""
    torch.manual_seed(0)
    weight = torch.ones(4, 4, requires_grad=True)
    product = torch.nn.functional.linear(torch.ones(2, 4), weight)
    product.exp().sum().backward()
    allowed: object = False
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            allowed = True
    except RuntimeError as error:
        allowed = str(error)
    return type(product), product.device, torch._C._is_multithreading_enabled(), allowed


def batches() -> Iterator[object]:
    yield compute()
    yield compute()


def plain_loop(context: Context) -> tuple[object, object]:
    with context() as seen:
        outputs = [(batch, compute()) for batch in batches()]
    return outputs, seen()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("context", [*CARRIED, *BOUND])
async def test_what_is_on_around_a_run_sees_what_it_sees_around_a_plain_loop(context: Context, prefetch: int) -> None:
    outputs: list[object] = []
    engine: Engine[object, None] = Engine(lambda _, batch: outputs.append((batch, compute())))
    with context() as seen:
        await engine.run(batches, prefetch=prefetch)
    expected = plain_loop(context)
    if prefetch and context in CARRIED:  # in two threads, in no certain order
        assert outputs == expected[0]
    else:
        assert (outputs, seen()) == expected


@pytest.mark.parametrize("context", [*CARRIED, *BOUND])
async def test_it_is_on_in_the_run_of_its_own_caller_only(context: Context) -> None:
    outputs: list[object] = []
    inside: list[object] = []
    outer: Engine[int, None] = Engine(lambda *_: outputs.append(compute()))
    inner: Engine[int, None] = Engine(lambda *_: inside.append(compute()))  # where it can, on the thread of the other

    @outer.on(Events.ITERATION_COMPLETED)
    async def evaluate() -> None:
        await checkpoint()
        with context() as seen:
            await inner.run([1])
        inside.append(seen())

    await outer.run(range(2))
    with context() as seen:
        expected = [compute()]
    expected.append(seen())
    assert inside == expected * 2
    assert outputs == [compute()] * 2


async def test_hooks_that_a_step_does_not_leave_end_with_its_run() -> None:
    left: list[Any] = []

    def enter(*_: Any) -> None:
        left.append(torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("packed"), lambda tensor: tensor))
        left[-1].__enter__()

    leaving: Engine[int, None] = Engine(enter)
    outer: Engine[int, object] = Engine(compute)
    outputs: list[object] = []

    @outer.on(Events.ITERATION_COMPLETED)
    async def nest() -> None:
        outputs.append(outer.state.output)
        await leaving.run([1])  # on the thread of the outer run

    await outer.run(range(3))
    assert outputs == [compute()] * 3
    assert len(left) == 3


@pytest.mark.parametrize(("context", "name"), BOUND.items())
async def test_what_belongs_to_one_thread_has_the_step_run_there_and_a_warning_says_so(
    context: Context, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine: Engine[int, str] = Engine(lambda *_: threading.current_thread().name, name="named")
    with context():
        on_loop = (await engine.run([1])).output
    (said,) = caplog.messages
    assert said.startswith(f"{name}: in force on the thread that runs engine 'named'")
    assert on_loop == threading.current_thread().name
    assert (await engine.run([1])).output == "aengine named"
    assert len(caplog.messages) == 1


async def test_a_step_on_the_event_loop_needs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with flops(), torch.device("cpu"):
        await Engine(lambda *_: compute(), thread=False).run([1])
    with torch.device("meta"):  # a mode, and carried
        assert (await Engine(lambda *_: threading.current_thread().name, name="b").run([1])).output == "aengine b"
    assert not caplog.messages


async def test_a_profiler_that_a_step_begins_leaves_it_on_the_worker() -> None:
    recorded = profile()

    def step(_: Engine[int, None], batch: int) -> None:
        if batch == 0:
            recorded.start()
        compute()
        if batch == 2:
            recorded.stop()

    await Engine(step).run(range(4))
    assert linears(recorded) == 3


def test_run_sync_with_an_event_loop_of_its_own_does_likewise() -> None:
    engine: Engine[int, object] = Engine(compute)
    engine.add_event_handler(Events.STARTED, checkpoint)
    with profile() as recorded:
        engine.run_sync(range(2))
    assert linears(recorded) == 2

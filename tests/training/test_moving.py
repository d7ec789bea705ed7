"""Batches that are moved ahead are those that would have come, on another device; the data is what it was."""

import inspect
import json
from collections import UserDict, namedtuple
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import anyio
import pytest
import torch
from anyio.lowlevel import checkpoint as breathe
from support.record import AnyEngine, double, record, record_steps
from support.resume_cases import KINDS, AsyncSized, Sized, SizedStateful, Stateful, numbers
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]  # as it is

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint
from aengine.training import create_supervised_trainer, prefetch_to_device
from aengine.training.moving import tensors_in
from aengine.training.supervised import move

# trio warns of an async generator that is dropped before its end. One of the user's is the user's to close.
pytestmark = pytest.mark.filterwarnings("ignore:Async generator .* was garbage collected:ResourceWarning")

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
prefetches = pytest.mark.parametrize("prefetch", [0, 1, 3])
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Broker:
    """A stream that is its own iterator, continues where it is, and has to be entered."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.next = 0
        self.cancel: Callable[[], object] = list  # what is called as it gives its third batch, and its sixth

    async def __aenter__(self) -> Self:
        self.log.append("entered")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.log.append("exited")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        await breathe()
        self.next += 1
        if self.next in (3, 6):
            self.cancel()
        return self.next

    async def aclose(self) -> None:
        self.log.append("closed")


async def numbers_async(count: int) -> AsyncGenerator[int]:
    for number in numbers(count):
        await breathe()
        yield number


def itself(data: Any) -> Any:
    return data


ALL_KINDS: dict[str, Callable[[int], Any]] = {
    **KINDS,
    "generator function": lambda count: lambda: numbers(count),
    "async generator function": lambda count: lambda: numbers_async(count),
    "function that makes stateful data": lambda count: partial(itself, SizedStateful(count)),
    "generator": numbers,
    "async generator": numbers_async,
    "iterator": lambda count: iter(range(1, count + 1)),
    "broker": lambda count: Broker(),
}


# What comes


@pytest.mark.covering(2)
@both_threads
@prefetches
@pytest.mark.parametrize("kind", ALL_KINDS)
async def test_a_run_is_what_it_was(kind: str, prefetch: int, thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    """The same events, batches and outputs, of data of every kind."""
    recorded = []
    for is_moved in (False, True):
        engine: AnyEngine = Engine(double, thread=thread)
        data: Any = ALL_KINDS[kind](6)
        if is_moved:
            data = prefetch_to_device(data, "cpu")
        seen, steps = record(engine), record_steps(engine)
        state = await engine.run(data, max_epochs=2, epoch_length=3, prefetch=prefetch)
        recorded.append((seen, steps, state.stop_reason, state.epoch_length))
    assert recorded[0] == recorded[1]
    assert [batch for *_, batch in recorded[1][1]] == [1, 2, 3, 4, 5, 6]


@prefetches
async def test_batches_are_on_the_device_when_the_step_and_handlers_see_them(prefetch: int) -> None:
    seen: list[bool] = []
    engine: AnyEngine = Engine(lambda engine, batch: seen.append(batch.is_meta))
    data = prefetch_to_device([torch.ones(2)] * 3, "meta")
    for event in (Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
        engine.add_event_handler(event, lambda engine: seen.append(engine.state.batch.is_meta))
    await engine.run(data, prefetch=prefetch)
    assert seen == [True] * 12


@dataclass(frozen=True)
class Pair:
    x: torch.Tensor
    y: torch.Tensor
    names: tuple[str, ...] = ()
    length: int = field(init=False, default=1)


@dataclass(slots=True)
class Slotted:
    x: torch.Tensor


class Graph:
    """An object with `to()`, as libraries have them."""

    def __init__(self, nodes: torch.Tensor) -> None:
        self.nodes = nodes
        self.store = {"edges": [nodes + 1]}

    def to(self, device: Any, *, non_blocking: bool = False) -> "Graph":
        return Graph(self.nodes.to(device, non_blocking=non_blocking))


Point = namedtuple("Point", "x y")  # noqa: PYI024 -- a plain one


def one(*_: object) -> torch.Tensor:
    return torch.ones(1)


def test_batches_are_moved_whatever_they_are_made_of() -> None:
    ids = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    batch = {
        "pair": Pair(one(), one(), ("a",)),
        "slotted": [Slotted(one())],
        "point": Point(one(), 2),
        "graph": (Graph(one()), None),
        "packed": ids,
        "mapping": UserDict({"ids": one()}),
        "kind": Pair,
    }
    moved = move(batch, "meta")
    assert moved["pair"].x.is_meta
    assert moved["pair"].y.is_meta
    assert (type(moved["pair"]), moved["pair"].names, moved["pair"].length) == (Pair, ("a",), 1)
    assert moved["slotted"][0].x.is_meta
    assert (type(moved["point"]), moved["point"].x.is_meta, moved["point"].y) == (Point, True, 2)
    assert moved["graph"][0].nodes.is_meta
    assert moved["packed"].data.is_meta
    assert moved["mapping"]["ids"].is_meta
    assert moved["kind"] is Pair
    assert not batch["pair"].x.is_meta  # type: ignore[attr-defined]  # what was moved is another one

    found = list(tensors_in(moved))
    assert len(found) == 2 + 1 + 1 + 2 + 2 + 1  # packed: also the sizes of its steps
    assert sum(tensor.is_meta for tensor in found) == 8


def test_object_whose_tensors_cannot_be_found_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"has a SimpleNamespace, which has to\(\), but no tensors among its attributes"
    ):
        list(tensors_in([SimpleNamespace(to=move)]))


def test_what_is_no_data_is_refused() -> None:
    with pytest.raises(TypeError, match=r"data must be an iterable"):
        prefetch_to_device(3, "cpu")
    with pytest.raises(TypeError, match=r"a run without data has no batches"):
        prefetch_to_device(None, "cpu")


@pytest.mark.parametrize(
    "step", [lambda engine, batch: sum(batch), lambda engine, batch: batch[0]], ids=["iter", "get"]
)
def test_batch_that_no_engine_has_handed_over_says_so(step: Any) -> None:
    data = prefetch_to_device([[1, 2]], "cpu")
    with pytest.raises(RuntimeError, match=r"an engine does that where run\(\) is given what prefetch_to_device\("):
        Engine(step).run_sync(list(data))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs that there is no GPU")
def test_device_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        prefetch_to_device([torch.ones(1)], "cuda")


def test_data_keeps_its_attributes() -> None:
    loader = DataLoader(TensorDataset(torch.arange(6)), batch_size=2, generator=torch.Generator())
    data = prefetch_to_device(loader, "cpu")
    assert len(data) == 3
    assert data.generator is loader.generator
    assert data.batch_size == 2
    with pytest.raises(AttributeError):
        data.nothing  # noqa: B018 -- that it raises is the point


async def one_after_the_other(data: Any) -> list[Any]:
    seen: list[Any] = []
    for _ in range(2):
        engine: AnyEngine = Engine(lambda engine, batch: seen.append(batch))
        await engine.run(data, prefetch=2)
    return seen[:3]


async def at_once(data: Any) -> list[Any]:
    seen: list[Any] = []
    async with anyio.create_task_group() as tasks:
        engines: list[AnyEngine] = [Engine(double), Engine(lambda engine, batch: seen.append(batch))]
        for engine in engines:
            tasks.start_soon(partial(engine.run, data, prefetch=2))
    return seen


async def made_by_a_function(data: Any) -> list[Any]:
    seen: list[Any] = []
    await Engine(lambda engine, batch: seen.append(batch)).run(lambda: data)
    return seen


async def in_a_loop(data: Any) -> list[Any]:
    async with Engine(double).iterate(data, prefetch=2) as iterations:
        return [event.output // 2 async for event in iterations]


async def set_within_a_run(data: Any) -> list[Any]:
    seen: list[Any] = []
    engine: AnyEngine = Engine(lambda engine, batch: seen.append(batch))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), engine.set_data, data)
    await engine.run([0, 0], epoch_length=4, prefetch=2)
    return seen[1:]


@pytest.mark.parametrize("use", [one_after_the_other, at_once, made_by_a_function, in_a_loop, set_within_a_run])
async def test_data_is_of_no_engine_and_needs_none(use: Callable[[Any], Any]) -> None:
    assert await use(prefetch_to_device([1, 2, 3], "cpu")) == [1, 2, 3]


class Finishing(list[int]):
    def finish_batch_for_step(self, batch: int) -> int:
        return -batch


async def test_what_the_data_itself_has_remain_to_be_done_is_done_to_the_moved_batch() -> None:
    engine: AnyEngine = Engine(double)
    steps = record_steps(engine)
    await engine.run(prefetch_to_device(Finishing([1, 2]), "cpu"), prefetch=1)
    assert [batch for *_, batch in steps] == [-1, -2]


# Where it is resumed


@pytest.mark.covering(3)
@both_threads
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("stop_at", [1, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
async def test_run_that_was_stopped_continues_exactly(
    kind: str,
    stop_at: int,
    prefetch: int,
    thread: bool,  # noqa: FBT001 -- pytest passes it by name
) -> None:
    """With a new engine and new data, from what JSON can hold; what was fetched ahead is not taken for stepped on."""
    first: AnyEngine = Engine(double, thread=thread)
    data = prefetch_to_device(KINDS[kind](5), "cpu")
    steps = record_steps(first)
    first.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), first.terminate)
    await first.run(data, max_epochs=3, epoch_length=4, prefetch=prefetch)
    saved = json.loads(json.dumps(first.state_dict()))

    second: AnyEngine = Engine(double, thread=thread)
    second.load_state_dict(saved)
    more = record_steps(second)
    await second.run(prefetch_to_device(KINDS[kind](5), "cpu"), max_epochs=3, epoch_length=4, prefetch=prefetch)
    plain: AnyEngine = Engine(double)
    expected = record_steps(plain)
    await plain.run(KINDS[kind](5), max_epochs=3, epoch_length=4)
    assert steps + more == expected


@pytest.mark.parametrize("prefetch", [0, 2])
# Not functions of generators, which begin anew after what was fetched ahead, and that is a matter of time.
@pytest.mark.covering(3)
@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if "generator function" not in kind])
@pytest.mark.parametrize("event", [Events.GET_BATCH_COMPLETED, Events.ITERATION_COMPLETED], ids=["fetched", "stepped"])
@pytest.mark.parametrize("how", ["terminate", "interrupt"])
async def test_run_continues_in_memory_as_it_would_without(how: str, event: Any, kind: str, prefetch: int) -> None:
    """Also where it stops with a batch in hand, that was handed over and not stepped on."""
    recorded = []
    for is_moved in (False, True):
        engine: AnyEngine = Engine(double)
        data: Any = ALL_KINDS[kind](6)
        if is_moved:
            data = prefetch_to_device(data, "cpu")
        steps = record_steps(engine)
        stop = engine.add_event_handler(event(once=2), lambda engine: getattr(engine, how)())
        await engine.run(data, max_epochs=2, epoch_length=3, prefetch=prefetch)
        stop.remove()
        await engine.run(data, max_epochs=2, epoch_length=3, prefetch=prefetch)
        recorded.append(steps)
    assert recorded[0] == recorded[1]
    assert len(recorded[0]) == 6


def shuffled(generator: torch.Generator | None = None) -> Any:
    return DataLoader(TensorDataset(torch.arange(12.0)), batch_size=2, shuffle=True, generator=generator)


LOADERS: dict[str, Callable[[], Any]] = {
    "of the global generator": shuffled,
    "of its own generator": lambda: shuffled(torch.Generator().manual_seed(5)),
    "torchdata": lambda: StatefulDataLoader(TensorDataset(torch.arange(12.0)), batch_size=2, shuffle=True),
}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("loader", LOADERS)
async def test_shuffled_data_comes_as_it_would_have_come(loader: str, prefetch: int, tmp_path: Path) -> None:
    async def train(folder: str, stop_at: int | None = None) -> list[Any]:
        torch.manual_seed(1)
        seen: list[Any] = []
        engine: AnyEngine = Engine(lambda engine, batch: seen.append(batch[0].tolist()))
        async with Checkpoint(tmp_path / folder, {}) as saving:
            saving.attach(engine, Events.ITERATION_COMPLETED(every=4))
            data = prefetch_to_device(LOADERS[loader](), "cpu")
            await saving.restore()
            if stop_at is not None:
                engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), engine.terminate)
            await engine.run(data, max_epochs=3, prefetch=prefetch)
        return seen

    whole = await train("whole")
    begun = await train("parts", stop_at=8)
    assert begun + await train("parts") == whole
    assert len(whole) == 18


@pytest.mark.slow
async def test_hugging_face_data_that_was_put_back_begins_its_next_pass_at_its_beginning() -> None:
    import datasets  # type: ignore[import-untyped] # noqa: PLC0415 -- it takes seconds, and has no types

    def stream() -> Any:
        return datasets.Dataset.from_dict({"row": list(range(5))}).to_iterable_dataset()

    def reading(engine: AnyEngine, batch: Any) -> int:
        return int(batch["row"])

    first: AnyEngine = Engine(reading)
    first.add_event_handler(Events.ITERATION_COMPLETED(once=3), first.terminate)
    await first.run(prefetch_to_device(stream(), "cpu"), max_epochs=3, epoch_length=5, prefetch=2)
    second: AnyEngine = Engine(reading)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rows: list[int] = []
    second.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: rows.append(engine.state.output))
    await second.run(prefetch_to_device(stream(), "cpu"), max_epochs=3, epoch_length=5, prefetch=2)
    assert rows == [3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


# How it ends


class Closing(Sized):
    def __init__(self, count: int, log: list[str]) -> None:
        super().__init__(count)
        self.log = log

    def __iter__(self) -> Iterator[int]:
        try:
            yield from super().__iter__()
        finally:
            self.log.append("closed")


class ClosingAsync(AsyncSized):
    def __init__(self, count: int, log: list[str]) -> None:
        super().__init__(count)
        self.log = log

    async def __aiter__(self) -> AsyncIterator[int]:
        try:
            for batch in numbers(self.count):
                await breathe()
                yield batch
        finally:
            self.log.append("closed")


CLOSING: dict[str, Callable[[list[str]], Any]] = {
    "sync": lambda log: Closing(9, log),
    "async": lambda log: ClosingAsync(9, log),
    "sync function": lambda log: lambda: iter(Closing(9, log)),
    "async function": lambda log: lambda: aiter(ClosingAsync(9, log)),
}


@pytest.mark.covering(2)
@both_threads
@prefetches
@pytest.mark.parametrize("kind", CLOSING)
async def test_what_the_engine_opened_is_closed_once(kind: str, prefetch: int, thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    log: list[str] = []
    engine: AnyEngine = Engine(double, thread=thread)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=4), engine.terminate)
    await engine.run(prefetch_to_device(CLOSING[kind](log), "cpu"), prefetch=prefetch)
    assert log == ["closed"]


@prefetches
async def test_generators_of_the_user_are_left_open(prefetch: int) -> None:
    plain, own = numbers(9), numbers_async(9)
    for data in (plain, own):
        engine: AnyEngine = Engine(double)
        await engine.run(prefetch_to_device(data, "cpu"), max_iters=2, prefetch=prefetch)
    fetched = 2  # never more than the run can use
    assert next(plain) == fetched + 1
    assert await anext(own) == fetched + 1
    await own.aclose()


@both_threads
@prefetches
async def test_broker_is_entered_and_exited_and_loses_no_batch_to_a_cancellation(
    prefetch: int,
    thread: bool,  # noqa: FBT001 -- pytest passes it by name
) -> None:
    """Also none that is being moved as the cancellation comes. Data that is its own iterator is not closed."""
    broker = Broker()
    engine: AnyEngine = Engine(double, thread=thread)
    steps = record_steps(engine)
    data = prefetch_to_device(broker, "cpu")
    for _ in range(3):
        with anyio.CancelScope() as scope:
            broker.cancel = scope.cancel
            await engine.run(data, max_epochs=1, epoch_length=10, prefetch=prefetch)
    assert broker.log == ["entered", "exited"] * 3
    assert [batch for *_, batch in steps] == list(range(1, 11))


class OwnIterator:
    """Data that is its own iterator, and is the user's to close."""

    def __init__(self) -> None:
        self.next = 0
        self.is_closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        self.next += 1
        return self.next

    def close(self) -> None:
        self.is_closed = True


@prefetches
async def test_data_that_is_its_own_iterator_is_left_open(prefetch: int) -> None:
    own, engine = OwnIterator(), Engine[Any, Any](double)
    await engine.run(prefetch_to_device(own, "cpu"), max_iters=3, prefetch=prefetch)
    assert (own.next, own.is_closed) == (3, False)


def test_position_of_the_data_is_found_where_every_python_looks() -> None:
    """From 3.12 on, isinstance() of a protocol sees nothing that `__getattr__` gives."""
    data = prefetch_to_device(Stateful(3), "cpu")
    assert inspect.getattr_static(data, "state_dict")() == {"next": 0}
    with pytest.raises(AttributeError):
        inspect.getattr_static(prefetch_to_device([1], "cpu"), "state_dict")


async def test_error_of_the_data_comes_out_as_it_is() -> None:
    boom = OSError("gone")

    def batches() -> Iterator[int]:
        yield 1
        raise boom

    for data in (batches, batches()):
        engine: AnyEngine = Engine(double)
        with pytest.raises(OSError, match="gone") as raised:
            await engine.run(prefetch_to_device(data, "cpu"), prefetch=2)
        assert raised.value is boom
        assert engine.state.iteration == 1


# No thread waits


def test_default_step_needs_nothing_of_what_is_in_a_tensor() -> None:
    """On a device that computes nothing, whatever asks for a number fails: `item()`, `bool()`, `nonzero()`, a copy."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1)).to("meta")
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = create_supervised_trainer(
        model, optimizer, torch.nn.functional.mse_loss, clip_gradients=1.0, gradient_accumulation_steps=2
    )
    trainer.run_sync(prefetch_to_device([(torch.ones(2, 4), torch.ones(2, 1))] * 5, "meta"), max_epochs=2)
    assert trainer.state.output.is_meta

    reading = create_supervised_trainer(
        model, optimizer, torch.nn.functional.mse_loss, output_transform=lambda x, y, p, loss: loss.item()
    )
    with pytest.raises(RuntimeError, match="meta"):  # the control
        reading.run_sync(prefetch_to_device([(torch.ones(2, 4), torch.ones(2, 1))], "meta"))


# On a GPU


ROWS = 1 << 20


def pinned(count: int) -> list[torch.Tensor]:
    return [torch.full((ROWS,), float(number)).pin_memory() for number in range(count)]


@on_a_gpu
@both_threads
@pytest.mark.parametrize("is_side", [False, True], ids=["default-stream", "other-stream"])
async def test_step_computes_with_its_own_batch_however_far_the_copies_are_ahead(
    thread: bool,  # noqa: FBT001 -- pytest passes it by name
    is_side: bool,  # noqa: FBT001 -- pytest passes it by name
) -> None:
    """The kernels of each step are long, and queue up: memory that is reused too early gives another batch's sum."""
    busy = torch.randn(2048, 2048, device="cuda")
    stream = torch.cuda.Stream() if is_side else torch.cuda.current_stream()
    sums: list[torch.Tensor] = []

    def step(engine: AnyEngine, batch: torch.Tensor) -> None:
        with torch.cuda.stream(stream):
            if is_side:
                stream.wait_stream(torch.cuda.default_stream())
                batch.record_stream(stream)  # a stream that the step enters is its own affair
            for _ in range(10):
                busy @ busy
            sums.append(batch.double().mean())

    engine: AnyEngine = Engine(step, thread=thread)
    await engine.run(prefetch_to_device(pinned(40), "cuda"), prefetch=3)
    torch.cuda.synchronize()
    assert [one.item() for one in sums] == [float(number) for number in range(40)]


@on_a_gpu
@pytest.mark.parametrize("prefetch", [0, 2])
async def test_batch_that_is_made_on_the_gpu_is_waited_for(prefetch: int) -> None:
    busy = torch.randn(2048, 2048, device="cuda")

    def batches() -> Iterator[torch.Tensor]:
        for number in range(20):
            busy @ busy
            yield torch.full((ROWS,), float(number), device="cuda")

    means: list[torch.Tensor] = []
    engine: AnyEngine = Engine(lambda engine, batch: means.append(batch.double().mean()))
    await engine.run(prefetch_to_device(batches, "cuda"), prefetch=prefetch)
    assert [one.item() for one in means] == [float(number) for number in range(20)]


@on_a_gpu
def test_moving_ahead_never_waits_for_the_gpu() -> None:
    model = torch.nn.Linear(64, 1, device="cuda")
    trainer = create_supervised_trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.01), torch.nn.functional.mse_loss, "cuda", thread=False
    )
    batches = [(torch.ones(8, 64).pin_memory(), torch.ones(8, 1).pin_memory()) for _ in range(20)]
    data = prefetch_to_device(batches, "cuda")
    trainer.run_sync(data)  # the first calls of libraries may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.run_sync(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.output.is_cuda


@on_a_gpu
async def test_losses_are_those_of_batches_that_the_step_moves() -> None:
    losses: list[list[float]] = []
    for is_moved in (False, True):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer = create_supervised_trainer(model, optimizer, torch.nn.functional.mse_loss, "cuda")
        seen: list[torch.Tensor] = []
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine, seen=seen: seen.append(engine.state.output)
        )
        inputs = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
        data: Any = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8, pin_memory=True)
        if is_moved:
            data = prefetch_to_device(data, "cuda")
        await trainer.run(data, max_epochs=3, prefetch=2)
        losses.append([one.item() for one in seen])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 96


def test_wrapped_data_is_as_true_as_the_data() -> None:
    assert prefetch_to_device(iter(list[int]()), "cpu")
    assert prefetch_to_device([1], "cpu")
    assert not prefetch_to_device([], "cpu")

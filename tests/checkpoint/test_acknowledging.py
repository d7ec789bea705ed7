"""Data that acknowledges: after the commit, beside the step, in order, the very position that is on the disk."""

import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import anyio
import pytest
import torch
from support.kill_campaign import ForkServer
from support.record import AnyEngine, Boom, at

from aengine import Engine, Event, Events
from aengine.checkpoint import Checkpoint, CheckpointCommitted, CheckpointEvents, CheckpointInfo
from aengine.errors import CheckpointWarning


class Offsets:
    """Data that knows its place, and keeps what it is given to acknowledge."""

    def __init__(self, length: int = 12) -> None:
        self.length = length
        self.offset = 0
        self.acknowledged: list[Any] = []
        self.live = {"offset": 0}  # what its state_dict returns: changed as it goes on, which no one should do

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        if self.offset == self.length:
            raise StopIteration
        self.offset += 1
        self.live["offset"] = self.offset
        return self.offset

    def state_dict(self) -> dict[str, int]:
        return self.live

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.offset = state_dict["offset"]

    def acknowledge(self, position: Any) -> Any:
        self.acknowledged.append(position)


class AsyncOffsets(Offsets):
    async def acknowledge(self, position: Any) -> None:
        await anyio.lowlevel.checkpoint()
        self.acknowledged.append(position)


class AwaitableOffsets(Offsets):
    """A plain function that returns what is to be awaited."""

    def acknowledge(self, position: Any) -> Any:
        async def acknowledge() -> None:
            await anyio.lowlevel.checkpoint()
            self.acknowledged.append(position)

        return acknowledge()


def engine_of(seen: list[Any] | None = None) -> AnyEngine:
    def step(engine: AnyEngine, batch: Any) -> None:
        if seen is not None:
            seen.append(batch)

    return Engine(step)


@pytest.fixture
def state() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


@pytest.mark.parametrize("kind", [Offsets, AsyncOffsets, AwaitableOffsets])
async def test_each_commit_is_acknowledged_in_order(kind: type[Offsets], tmp_path: Path, state: Any) -> None:
    data, engine = kind(), engine_of()
    async with Checkpoint(tmp_path, state) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=4))
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(once=6))  # a subscriber of its own
        await engine.run(data, max_iters=12)
    assert data.acknowledged == [{"offset": one} for one in (4, 6, 8, 12)]


async def test_event_of_a_commit_says_which_checkpoint_and_where_the_data_stands(tmp_path: Path, state: Any) -> None:
    engine, heard = engine_of(), []
    async with Checkpoint(tmp_path, state) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=2))

        @engine.subscribe(CheckpointEvents.CHECKPOINT_COMMITTED)
        async def note(event: Event) -> None:
            heard.append(event.payload)

        staged: list[int] = []
        engine.subscribe(CheckpointEvents.CHECKPOINT_STAGED, lambda event: staged.append(event.payload))
        await engine.run(range(6))
        listed = checkpoint.list()
    assert all(isinstance(one, CheckpointCommitted) and isinstance(one.checkpoint, CheckpointInfo) for one in heard)
    assert [one.checkpoint.step for one in heard] == staged == [2, 4, 6]
    assert [one.position for one in heard] == [{"batches": one, "length": 6} for one in (2, 4, 6)]
    assert heard[-1].checkpoint == listed[-1]


async def test_save_between_runs_is_acknowledged_too(tmp_path: Path, state: Any) -> None:
    data, engine = AsyncOffsets(), engine_of()
    async with Checkpoint(tmp_path, state) as checkpoint:
        checkpoint.attach(engine, Events.COMPLETED(once=100))
        await engine.run(data, max_iters=3)
        await checkpoint.save()
    assert data.acknowledged == [{"offset": 3}]


async def test_plain_one_is_called_beside_the_step(tmp_path: Path, state: Any) -> None:
    """In a thread, so that a slow broker holds up neither the step nor the event loop."""
    threads: set[int] = set()
    stepped, acknowledged = threading.Event(), threading.Event()

    class Slow(Offsets):
        def acknowledge(self, position: Any) -> None:
            threads.add(threading.get_ident())
            assert stepped.wait(60)  # for a step after the save that this is about
            acknowledged.set()

    def step(engine: AnyEngine, batch: int) -> None:
        threads.discard(threading.get_ident())
        if batch == 3:
            stepped.set()

    engine: AnyEngine = Engine(step)
    async with Checkpoint(tmp_path, state) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(once=1))
        await engine.run(Slow(), max_iters=4)
    assert acknowledged.is_set()
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("kind", [Offsets, AsyncOffsets])
async def test_its_error_fails_the_run(kind: type[Offsets], tmp_path: Path, state: Any) -> None:
    class Failing(kind):  # type: ignore[valid-type, misc]
        def acknowledge(self, position: Any) -> Any:
            raise Boom

    engine = engine_of()
    async with Checkpoint(tmp_path, state) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=2))
        with pytest.raises(Boom) as caught:
            await engine.run(Failing(), max_iters=12)
    assert any("acknowledge(), for the checkpoint of step 2" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("where", ["made by a function", "entered"])
async def test_what_is_iterated_is_asked_first(where: str, tmp_path: Path, state: Any) -> None:
    inner, engine = Offsets(), engine_of()

    class Entered:
        async def __aenter__(self) -> Offsets:
            return inner

        async def __aexit__(self, *_: object) -> None: ...

        def __aiter__(self) -> AsyncIterator[int]:
            raise NotImplementedError

    async with Checkpoint(tmp_path, state) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=6))
        await engine.run(Entered() if where == "entered" else lambda: inner, max_iters=12)
    assert inner.acknowledged == [{"offset": 6}, {"offset": 12}]


async def test_data_that_was_replaced_is_acknowledged_as_far_as_it_was_used(tmp_path: Path, state: Any) -> None:
    first, second, engine = Offsets(), Offsets(), engine_of()
    at(engine, "IC@1/3", lambda: engine.set_data(second))
    async with Checkpoint(tmp_path, state) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=2))
        await engine.run(first, max_iters=6)
    assert (first.acknowledged, second.acknowledged) == ([{"offset": 2}], [{"offset": 1}, {"offset": 3}])


async def test_checkpoint_from_the_middle_of_a_step_is_not_acknowledged(tmp_path: Path, state: Any) -> None:
    """An older one is restored in its place."""

    def fail(engine: AnyEngine, batch: int) -> None:
        if batch == 5:
            raise Boom

    data, engine = Offsets(), Engine(fail)
    async with Checkpoint(tmp_path, state) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=2) | Events.EXCEPTION_RAISED)
        with pytest.raises(Boom):
            await engine.run(data, max_iters=12)
        assert data.acknowledged == [{"offset": 2}, {"offset": 4}]


class Broker(AsyncOffsets):
    """Acknowledges only while it is entered, and counts what it was told after that."""

    def __init__(self) -> None:
        super().__init__()
        self.is_open = False

    async def __aenter__(self) -> Self:
        await anyio.lowlevel.checkpoint()
        self.is_open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        await anyio.lowlevel.checkpoint()
        self.is_open = False

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        raise NotImplementedError

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        await anyio.lowlevel.checkpoint()
        return next(self)

    async def acknowledge(self, position: Any) -> None:
        assert self.is_open
        await super().acknowledge(position)


@pytest.mark.parametrize("end", ["completed", "terminated", "interrupted", "failed", "cancelled"])
async def test_data_is_open_until_the_last_save_of_the_run_is_acknowledged(
    end: str, tmp_path: Path, state: Any
) -> None:
    data, engine, scope = Broker(), engine_of(), anyio.CancelScope()

    @engine.on(Events.ITERATION_COMPLETED(once=6))
    async def act() -> None:
        if end == "failed":
            raise Boom
        acts: dict[str, Any] = {"terminated": engine.terminate, "interrupted": engine.interrupt}
        acts.get(end, scope.cancel if end == "cancelled" else str)()

    async with Checkpoint(tmp_path, state) as checkpoint:
        at_ends = Events.EXCEPTION_RAISED | Events.CANCELLED
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=3) | at_ends)
        expected: Any = pytest.raises(Boom) if end == "failed" else nullcontext()
        with scope, expected:
            await engine.run(data, max_iters=6 if end == "completed" else 12)
    assert not data.is_open
    assert data.acknowledged[-1] == {"offset": 6}


async def test_damaged_checkpoint_is_what_its_event_is_about(tmp_path: Path, state: Any) -> None:
    engine, heard = engine_of(), []
    async with Checkpoint(tmp_path, state) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED)
        await engine.run([1, 2])
        info = checkpoint.list()[-1]
    (info.path / "state.pt").write_bytes(b"")
    engine = engine_of()
    async with Checkpoint(tmp_path, state) as checkpoint:
        checkpoint.attach(engine, Events.COMPLETED)
        engine.add_event_handler(
            CheckpointEvents.CHECKPOINT_DAMAGED, lambda engine, damaged: heard.append((damaged.path, damaged.why))
        )
        with pytest.warns(CheckpointWarning):
            await checkpoint.restore()
        assert heard[0][0] in checkpoint.statistics().damaged
        assert "state.pt" in heard[0][1]


# Killed right after each acknowledgement

PROGRAMS = ["plain", "plain prefetch", "async", "async prefetch"]


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer("support.acknowledging") as one:
        yield one


def kill_until_it_ends(
    fork_server: ForkServer, program: str, backend: str, directory: Path, seed: int, messages: int = 400
) -> int:
    """Kill a training right after one of its next acknowledgements, again and again. Returns how often."""
    chance, kills = random.Random(seed), 0
    while True:
        run = fork_server.start(
            program,
            directory,
            backend=backend,
            slowness=0,
            messages=messages,
            acknowledgements=chance.choice([1, 1, 2, 3]),
        )
        run.end()
        if run.status == 0:
            trained_on = next(words[1:] for words in run.reports if words[0] == "messages")
            assert [int(one) for one in trained_on] == list(range(1, messages + 1))
            return kills
        assert run.status == -9
        kills += 1


@pytest.mark.parametrize(("program", "backend"), [("plain prefetch", "asyncio"), ("async", "trio")])
def test_queue_that_is_acknowledged_so_loses_nothing(
    fork_server: ForkServer, program: str, backend: str, tmp_path: Path
) -> None:
    """The short form of the campaign."""
    assert kill_until_it_ends(fork_server, program, backend, tmp_path, seed=3, messages=40) > 5


@pytest.mark.campaign
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_queue_that_is_acknowledged_so_loses_nothing_in_hundreds_of_kills(
    fork_server: ForkServer, program: str, backend: str, tmp_path: Path
) -> None:
    kills, seed = 0, random.SystemRandom().randrange(10**6)
    while kills < 200:
        directory = tmp_path / str(seed)
        directory.mkdir()
        kills += kill_until_it_ends(fork_server, program, backend, directory, seed)
        seed += 1

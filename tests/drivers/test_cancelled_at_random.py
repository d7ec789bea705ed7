"""Cancelled at random instants: where the step runs x the data x prefetch x the way of cancelling x the step's answer.

Injecting before each await, as `test_cancellation.py` does, cannot see a cancellation that is lost since two tasks wake
each other: what it injects changes who waits for whom. Here the run is cancelled from beside it. It must end with the
step under way, and go on afterwards as if nothing had been: each batch is stepped exactly once.
"""

import asyncio
import itertools
import math
import random
import threading
from collections.abc import AsyncIterator, Callable
from time import perf_counter
from typing import Any, NamedTuple

import anyio
import pytest
from anyio.lowlevel import checkpoint, current_token
from support.backends import Backend
from support.turns import call_and_wait_for_turns

from aengine import Engine, StopReason

pytestmark = pytest.mark.every_event_loop

LENGTH = 60
"""Batches in all."""


# The data


class Plain:
    """It can be begun again, and has a length."""

    def __len__(self) -> int:
        return LENGTH

    def __iter__(self) -> Any:
        yield from range(LENGTH)


class Async:
    def __len__(self) -> int:
        return LENGTH

    async def __aiter__(self) -> AsyncIterator[int]:
        for batch in range(LENGTH):
            await checkpoint()
            yield batch


class AsyncAtOnce(Async):
    """It never suspends: with `prefetch`, it and the loop do nothing but wake each other."""

    async def __aiter__(self) -> AsyncIterator[int]:
        for batch in range(LENGTH):
            yield batch


class AsyncInScope(Async):
    """It holds a scope of its own open from its first batch to its last."""

    async def __aiter__(self) -> AsyncIterator[int]:
        with anyio.fail_after(60):
            for batch in range(LENGTH):
                await checkpoint()
                yield batch


class AsyncStream:
    """It cannot be begun again: what is lost of it is lost."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> int:
        await checkpoint()
        return next(self._numbers)


class AsyncStateful:
    """It says where it stands, and can be put back there."""

    def __init__(self) -> None:
        self._at = self._first = 0

    async def __aiter__(self) -> AsyncIterator[int]:
        self._at, self._first = self._first, 0
        while True:
            await checkpoint()
            self._at += 1
            yield self._at - 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self._at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._first = state["at"]


class Answered:
    """Each batch is asked of another task, which waits for the question: the two wake each other."""

    def __init__(self) -> None:
        self._at = 0
        self._asked = anyio.Event()
        self._answered = anyio.Event()

    def __len__(self) -> int:
        return LENGTH

    async def answer(self) -> None:
        while True:
            await self._asked.wait()
            self._asked = anyio.Event()
            self._answered.set()

    async def __aiter__(self) -> AsyncIterator[int]:
        for batch in range(LENGTH):
            self._answered = anyio.Event()
            self._asked.set()
            await self._answered.wait()
            yield batch


DATA: dict[str, Callable[[], Any]] = {
    "list": lambda: list(range(LENGTH)),
    "plain": Plain,
    "async": Async,
    "at once": AsyncAtOnce,
    "in a scope": AsyncInScope,
    "stream": AsyncStream,
    "stateful": AsyncStateful,
    "answered": Answered,
}


class Program(NamedTuple):
    """A run, and how it is cancelled."""

    step: str
    data: str
    prefetch: int
    answer: str
    way: str
    turns: int  # of the event loop before it is cancelled; on the worker: steps

    @classmethod
    def at_random(cls, chance: random.Random, step: str, backend: Backend) -> "Program":
        ways = ["scope", "timeout", "iterate"] + ["native", "native iterate"] * (backend[0] == "asyncio")
        answers = ["lets it out", "swallows", "answers", "delays"] if step == "suspends" else ["lets it out"]
        return cls(
            step,
            chance.choice(list(DATA)),
            chance.randrange(4),
            chance.choice(answers),
            chance.choice(ways),
            chance.randrange(LENGTH // 2),
        )


class Trial:
    """One program, run once. `cancel` is set by the way in which it is cancelled."""

    def __init__(self, program: Program, *, seconds: float = 0.0) -> None:
        self.program = program
        self.seconds = seconds  # that a step takes
        self.data = DATA[program.data]()
        self.begun: list[int] = []
        self.stepped: list[int] = []
        self.begun_before: int | None = None
        self.cancel: Callable[[], object] = lambda: None
        self._home = threading.get_ident()
        native: Any = current_token().native_token
        self._post = getattr(native, "call_soon_threadsafe", None) or native.run_sync_soon
        steps: dict[str, Any] = {"async": self.at_once, "suspends": self.suspends}
        self.engine: Engine[int, int] = Engine(
            steps.get(program.step, self.plain),
            name="tried",
            thread=program.step != "here",
            grace=20,
        )

    # The steps

    def plain(self, engine: Any, batch: int) -> int:
        self.begun.append(batch)
        until = perf_counter() + self.seconds
        self._cancel_if_due()
        while perf_counter() < until:
            pass
        self.stepped.append(batch)
        return batch

    async def at_once(self, engine: Any, batch: int) -> int:
        return self.plain(engine, batch)

    async def suspends(self, engine: Any, batch: int) -> int:
        self.begun.append(batch)
        answer = self.program.answer
        try:
            await checkpoint()
        except BaseException:
            if answer in ("lets it out", "delays"):
                raise
            if answer == "answers":
                self.stepped.append(batch)
                return -1
        finally:
            if answer == "delays":
                with anyio.CancelScope(shield=True):
                    await checkpoint()
                    await checkpoint()
        self.stepped.append(batch)
        return batch

    # How it is cancelled

    def act(self) -> None:
        if self.begun_before is None:
            self.begun_before = len(self.begun)
            self.cancel()

    def _cancel_if_due(self) -> None:
        """Cancel from inside a step, where no other task would have a turn. On the worker, wait until it is heard."""
        if len(self.begun) != self.program.turns + 1 or self.begun_before is not None:
            return
        if threading.get_ident() == self._home:
            if self.program.data in ("list", "plain"):
                self.act()
            return
        call_and_wait_for_turns(self._post, self.act)

    async def act_later(self) -> None:
        if self.program.step != "worker":
            for _ in range(self.program.turns):
                await checkpoint()
            self.act()

    # What is run

    async def run(self) -> None:
        program = self.program
        options: dict[str, Any] = {"prefetch": program.prefetch}
        if program.data in ("stream", "stateful"):
            options["epoch_length"] = LENGTH
        if program.way.endswith("iterate"):
            async with self.engine.iterate(self.data, **options) as iterations:
                async for _ in iterations:
                    pass
        else:
            await self.engine.run(self.data, **options)

    async def be_cancelled(self) -> None:
        if self.program.way.startswith("native"):
            task = asyncio.ensure_future(self.run())
            self.cancel = task.cancel
            later = asyncio.ensure_future(self.act_later())
            await asyncio.wait([task])
            later.cancel()
            await asyncio.wait([later])
            if self.engine.state.stop_reason is StopReason.CANCELLED:
                assert task.cancelled(), "a cancellation goes on, always"
            elif not task.cancelled():
                await task
            return
        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                self.cancel = self._pass_deadline_of(scope) if self.program.way == "timeout" else scope.cancel
                group.start_soon(self.act_later)
                await self.run()
            if self.engine.state.stop_reason is StopReason.CANCELLED:
                assert scope.cancelled_caught, "a cancellation goes on, always"
            group.cancel_scope.cancel()

    @staticmethod
    def _pass_deadline_of(scope: anyio.CancelScope) -> Callable[[], object]:
        def pass_deadline() -> None:
            scope.deadline = -math.inf

        return pass_deadline

    @property
    def latency(self) -> int:
        """How many steps may begin after the cancellation: more than one only of those that take no time."""
        program = self.program
        if program.step == "worker" or self.seconds:
            return 1
        never_suspends = program.data in ("list", "plain") or (program.data == "at once" and not program.prefetch)
        if program.step != "suspends" and never_suspends:
            return LENGTH  # others have a turn after 2 ms, and nothing can be cancelled before
        return 1 + 2 * program.prefetch  # it is heard in the next turn, until which there are as many as are fetched

    def check(self) -> None:
        engine, before = self.engine, self.begun_before
        assert engine.state_dict()["iteration"] == len(self.stepped)
        assert before is None or len(self.begun) <= before + self.latency, "it ends with the step under way"
        if engine.state.stop_reason is not StopReason.CANCELLED:
            assert engine.state.stop_reason is StopReason.COMPLETED
            assert len(self.stepped) == LENGTH

    async def go_on(self) -> None:
        if len(self.stepped) < LENGTH:
            self.begun_before = 0  # it is not cancelled again
            self.program = self.program._replace(way="scope", answer="lets it out")
            await self.run()
        assert self.stepped == list(range(LENGTH))
        assert self.engine.state.stop_reason is StopReason.COMPLETED


async def try_out(program: Program, *, seconds: float = 0.0) -> bool:
    """Run it, cancel it, and resume it. Says whether the cancellation came in time."""
    trial = Trial(program, seconds=seconds)
    try:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as beside:
                if program.data == "answered":
                    beside.start_soon(trial.data.answer)
                await trial.be_cancelled()
                was_cancelled = trial.engine.state.stop_reason is StopReason.CANCELLED
                trial.check()
                trial.seconds = 0.0
                await trial.go_on()
                beside.cancel_scope.cancel()
    except BaseException as error:
        error.add_note(f"{program}")
        raise
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("aengine")]
    return was_cancelled


STEPS = ["worker", "here", "async", "suspends"]


async def try_out_many(step: str, backend: Backend, seed: int, times: int) -> None:
    chance = random.Random(seed)
    cancelled = [await try_out(Program.at_random(chance, step, backend)) for _ in range(times)]
    assert sum(cancelled) > times / 2, "the instants are such that most runs are cancelled"


@pytest.mark.parametrize("step", STEPS)
async def test_cancelled_at_a_random_instant_it_ends_with_the_step_and_goes_on_exactly(
    step: str, anyio_backend: Backend
) -> None:
    await try_out_many(step, anyio_backend, seed=0, times=25)


@pytest.mark.slow
@pytest.mark.variant
@pytest.mark.parametrize("seed", range(1, 15))
@pytest.mark.parametrize("step", STEPS)
async def test_cancelled_at_random_instants_five_thousand_times(step: str, seed: int, anyio_backend: Backend) -> None:
    await try_out_many(step, anyio_backend, seed=seed, times=30)


def every_program_in_step(step: str) -> list[Program]:
    return [
        Program(step, data, prefetch, "lets it out", "scope", turns=10)
        for data, prefetch in itertools.product(DATA, range(4))
    ]


@pytest.mark.parametrize("step", STEPS)
async def test_each_kind_of_data_with_each_prefetch_is_cancelled(step: str) -> None:
    cancelled = [await try_out(program) for program in every_program_in_step(step)]
    assert sum(cancelled) > len(cancelled) / 2


@pytest.mark.parametrize("prefetch", range(4))
@pytest.mark.parametrize("step", ["here", "async"])
async def test_of_steps_that_keep_the_event_loop_busy_none_begins_after_the_cancellation(
    step: str, prefetch: int
) -> None:
    for data in ("list", "async", "at once", "answered"):
        assert await try_out(Program(step, data, prefetch, "lets it out", "scope", turns=4), seconds=0.003)

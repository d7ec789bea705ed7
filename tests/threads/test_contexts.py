"""Context variables in a run: what code on the worker sets, code on the event loop sees, and the other way round."""

import random
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import anyio.from_thread
import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, Events

pytestmark = pytest.mark.every_event_loop

AnyEngine = Engine[Any, Any]


class Value:
    """As a tensor, it refuses to be compared."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return str(self.number)

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    __hash__ = object.__hash__


VARIABLES: list[ContextVar[Any]] = [ContextVar(name) for name in "abc"]
EVENTS = (Events.EPOCH_STARTED, Events.GET_BATCH_STARTED, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED)


class Program:
    """Handlers and a step that set variables, reset them, and say what they see, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seen: list[list[str]] = []
        self.handlers = [(self.random.choice(EVENTS), self.random.random() < 0.5) for _ in range(5)]
        # A token is good in the context in which it was made, that of async code or that of plain code. Those of both
        # are nested, as `with` statements are.
        self.tokens: dict[ContextVar[Any], list[tuple[bool, Token[Any]]]] = {one: [] for one in VARIABLES}

    def act(self, *, is_async: bool) -> None:
        self.seen.append([repr(variable.get("unset")) for variable in VARIABLES])
        variable, action = self.random.choice(VARIABLES), self.random.random()
        tokens = self.tokens[variable]
        if action < 0.4:
            tokens.append((is_async, variable.set(Value(len(self.seen)))))
        elif tokens and tokens[-1][0] is is_async:
            variable.reset(tokens.pop()[1])

    async def act_in_task(self) -> None:
        await checkpoint()
        self.act(is_async=True)

    async def data(self) -> Any:
        for batch in range(5):
            self.act(is_async=True)
            yield batch

    def engine(self, *, thread: bool) -> AnyEngine:
        engine: AnyEngine = Engine(lambda *_: self.act(is_async=False), thread=thread)
        for event, is_async in self.handlers:
            if is_async:
                engine.add_event_handler(event, self.act_in_task)
            else:
                engine.add_event_handler(event, lambda: self.act(is_async=False))
        return engine


async def test_plain_and_async_code_of_a_run_see_each_others_changes() -> None:
    """On the worker as on the event loop's own thread, where there is one context."""
    for seed in range(8):
        programs = Program(seed), Program(seed)
        await programs[0].engine(thread=True).run(programs[0].data, max_epochs=2)
        await programs[1].engine(thread=False).run(programs[1].data, max_epochs=2)
        assert programs[0].seen == programs[1].seen, f"seed {seed}"
        assert not any(variable.get(None) for variable in VARIABLES), "a change has left its run"


async def set_in_task() -> None:
    await checkpoint()
    VARIABLES[0].set("theirs")


def by_event(engine: AnyEngine) -> None:
    engine.fire_event("own")


def by_from_thread(_: AnyEngine) -> None:
    anyio.from_thread.run(set_in_task)


@pytest.mark.parametrize("change", [by_event, by_from_thread])
async def test_a_step_sees_the_change_of_what_it_waits_for(change: Callable[[AnyEngine], None]) -> None:
    def step(engine: AnyEngine, _: int) -> list[str]:
        before = VARIABLES[0].get("unset")
        VARIABLES[0].set("mine")
        change(engine)
        return [before, VARIABLES[0].get()]

    engine = Engine(step)
    engine.register_events("own")
    engine.add_event_handler("own", set_in_task)
    assert (await engine.run([1])).output == ["unset", "theirs"]
    assert (await engine.run([1])).output == ["unset", "theirs"]


async def test_a_change_in_a_nested_run_stays_there() -> None:
    seen: list[str] = []
    inner: AnyEngine = Engine(lambda *_: VARIABLES[0].set("inner"))
    inner.add_event_handler(Events.ITERATION_COMPLETED, set_in_task)
    outer: AnyEngine = Engine(lambda *_: seen.append(VARIABLES[0].get("unset")))

    @outer.on(Events.ITERATION_COMPLETED)
    async def evaluate() -> None:
        await inner.run([1])
        seen.append(VARIABLES[0].get("unset"))

    await outer.run(range(2))
    assert seen == ["unset"] * 4

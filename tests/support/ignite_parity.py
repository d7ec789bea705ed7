"""The same scenario on pytorch-ignite's engine and on ours, in each of the ways that ours runs a step."""

import struct
from collections.abc import Callable
from typing import Any, TypeAlias

from anyio.lowlevel import checkpoint as breathe
from support.ignite import ignite
from torch import Tensor

from aengine import Engine

Step: TypeAlias = Callable[[Any, Any], Any]
Make: TypeAlias = Callable[[Step], Any]
"""Makes an engine, theirs or ours."""
Scenario: TypeAlias = Callable[[Make], tuple[Any, Callable[[], Any]]]
"""Makes an engine, and attaches what is under test; returns it, and what says, after the run, what came of it."""


def of_async_step(step: Step) -> Any:
    async def step_that_waits(engine: Any, batch: Any) -> Any:
        await breathe()
        return step(engine, batch)

    return Engine(step_that_waits)


WAYS: dict[str, Make] = {
    "on the worker": Engine,
    "on the event loop": lambda step: Engine(step, thread=False),
    "async": of_async_step,
}


def run_theirs(scenario: Scenario, data: Any, **limits: int) -> Any:
    engine, outcome = scenario(ignite.engine.Engine)
    engine.run(data, **limits)
    return outcome()


async def run_ours(scenario: Scenario, data: Any, **limits: int) -> dict[str, Any]:
    """Return the outcome in each of the ways."""
    outcomes: dict[str, Any] = {}
    for way, make in WAYS.items():
        engine, outcome = scenario(make)
        await engine.run(data, **limits)
        outcomes[way] = outcome()
    return outcomes


async def same_on_both(scenario: Scenario, data: Any, **limits: int) -> Any:
    """Run a scenario on both, check that all outcomes are the same, and return that."""
    theirs = run_theirs(scenario, data, **limits)
    for way, ours in (await run_ours(scenario, data, **limits)).items():
        assert ours == theirs, way
    return theirs


def to_the_bit(value: Any) -> Any:
    """Return what is equal only where each bit of it is: 0.1 + 0.2 is not 0.3, and nan is nan."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.cpu().numpy().tobytes()
    if isinstance(value, float):
        return type(value).__name__, struct.pack("d", value)
    if isinstance(value, dict):
        return {name: to_the_bit(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_the_bit(one) for one in value]
    assert isinstance(value, int | str | None), type(value)
    return value

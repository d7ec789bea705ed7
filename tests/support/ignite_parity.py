"""One scenario run on pytorch-ignite's engine and on ours, in each way that ours runs a step: equal outcomes."""

import struct
from collections.abc import Callable
from typing import Any, TypeAlias

from anyio.lowlevel import checkpoint
from support.ignite import ignite
from torch import Tensor

from aengine import Engine

Step: TypeAlias = Callable[[Any, Any], Any]
MakeEngine: TypeAlias = Callable[[Step], Any]
"""Makes an engine of a step, ignite's or ours."""
Scenario: TypeAlias = Callable[[MakeEngine], tuple[Any, Callable[[], Any]]]
"""Makes an engine and attaches what is under test; returns the engine, and a function that gives the outcome."""


def engine_of_async_step(step: Step) -> Any:
    async def step_that_awaits(engine: Any, batch: Any) -> Any:
        await checkpoint()
        return step(engine, batch)

    return Engine(step_that_awaits)


WAYS: dict[str, MakeEngine] = {
    "on the worker": Engine,
    "on the event loop": lambda step: Engine(step, thread=False),
    "async": engine_of_async_step,
}


def outcome_on_ignite(scenario: Scenario, data: Any, **limits: int) -> Any:
    engine, outcome = scenario(ignite.engine.Engine)
    engine.run(data, **limits)
    return outcome()


async def outcomes_on_ours(scenario: Scenario, data: Any, **limits: int) -> dict[str, Any]:
    """Return the outcome for each way of running the step."""
    outcomes: dict[str, Any] = {}
    for way, make in WAYS.items():
        engine, outcome = scenario(make)
        await engine.run(data, **limits)
        outcomes[way] = outcome()
    return outcomes


async def same_on_both(scenario: Scenario, data: Any, **limits: int) -> Any:
    """Run a scenario on both engines, assert that all outcomes are equal, and return it."""
    expected = outcome_on_ignite(scenario, data, **limits)
    for way, outcome in (await outcomes_on_ours(scenario, data, **limits)).items():
        assert outcome == expected, way
    return expected


def as_bits(value: Any) -> Any:
    """Return a value that is equal only where each bit is: 0.1 + 0.2 differs from 0.3, and nan equals nan."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.cpu().numpy().tobytes()
    if isinstance(value, float):
        return type(value).__name__, struct.pack("d", value)
    if isinstance(value, dict):
        return {name: as_bits(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_bits(one) for one in value]
    assert isinstance(value, int | str | None), type(value)
    return value

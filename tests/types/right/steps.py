"""Steps of every kind: what they take and return is what the engine has."""

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Any, assert_type

from aengine import Engine, State


def plain(engine: Engine, batch: int) -> float:
    return batch / 2


async def asynchronous(engine: Engine[int, str], batch: int) -> str:
    await asyncio.sleep(0)
    return str(engine.state.iteration + batch)


def scaled(factor: float, engine: Engine, batch: int) -> float:
    return factor * batch


def with_any(engine: Any, batch: Any) -> Any:
    return batch


def nothing(_: Engine, batch: list[int]) -> None:
    batch.clear()


class Model:
    def step(self, engine: Engine, batch: bytes) -> dict[str, float]:
        return {"loss": len(batch)}

    async def async_step(self, engine: Engine, batch: bytes) -> int:
        return len(batch)

    def __call__(self, engine: Engine, batch: bytes) -> list[int]:
        return list(batch)


assert_type(Engine(plain), Engine[int, float])
assert_type(Engine(asynchronous, name="async"), Engine[int, str])
assert_type(Engine(with_any), Engine[Any, Any])
assert_type(Engine(nothing), Engine[list[int], None])
assert_type(Engine(Model().step, thread=False), Engine[bytes, dict[str, float]])
assert_type(Engine(Model().async_step), Engine[bytes, int])
assert_type(Engine(Model()), Engine[bytes, list[int]])
identity = Engine(lambda engine, batch: batch)
assert_type(identity, Engine[Any, Any])
assert_type(Engine(lambda engine, batch: 0.5), Engine[Any, float])
assert_type(Engine(lambda engine, batch: asynchronous(engine, 1)), Engine[Any, str])

by_partial: Engine[int, float] = Engine(partial(scaled, 0.5), grace=1.0)
declared: Engine[int, float] = Engine(plain)
bare: Engine = Engine(plain)
anything: Engine[Any, Any] = Engine(lambda engine, batch: batch * 2)
batches_only: Engine[int] = Engine(plain)
wider: Engine[int, float | None] = declared  # an output is only read


def awaits(engine: Engine, batch: int) -> Awaitable[None]:
    return asyncio.sleep(batch)


Engine(awaits).run_sync([1])

state = declared.run_sync([1, 2, 3], max_epochs=2)
assert_type(state, State[int, float])
print(state.output + 0.5, state.epoch, state.metrics["loss"], state.my_own_attribute)
identity.run_sync("abc").output.anything_at_all()
bare.run_sync([1]).output.anything_at_all()

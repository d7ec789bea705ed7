"""An engine for each place in which a step can run."""

from collections.abc import Callable

import pytest
from anyio.lowlevel import checkpoint
from support.record import AnyEngine

from aengine import Engine


async def async_step(engine: AnyEngine, batch: int) -> int:
    await checkpoint()
    return batch


def plain_step(engine: AnyEngine, batch: int) -> int:
    return batch


ENGINES: dict[str, Callable[..., AnyEngine]] = {
    "worker": lambda **options: Engine(plain_step, **options),
    "loop": lambda **options: Engine(plain_step, thread=False, **options),
    "async": lambda **options: Engine(async_step, **options),
}
each_engine = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES.keys())

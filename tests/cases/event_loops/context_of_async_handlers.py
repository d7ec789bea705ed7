"""A context variable that an async handler sets, such as a request's id, is seen by the steps, plain or async."""

import contextvars
from typing import Any

from aengine import Engine, Events

where = contextvars.ContextVar("where", default="nowhere")


async def awaited(engine: Engine, batch: int) -> str:
    return where.get()


def plain(engine: Engine, batch: int) -> str:
    return where.get()


async def main() -> None:
    steps: tuple[Any, ...] = (awaited, plain)
    for step in steps:
        engine = Engine(step)

        async def enter(engine: Engine) -> None:
            where.set(f"epoch {engine.state.epoch}")

        engine.add_event_handler(Events.EPOCH_STARTED, enter)
        assert (await engine.run([1])).output == "epoch 1"

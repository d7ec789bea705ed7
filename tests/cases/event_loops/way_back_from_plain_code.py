"""anyio.from_thread.run() works in the user's plain code, wherever the engine calls it."""

from typing import Any

import anyio
import anyio.lowlevel

from aengine import Engine, Events

answers: list[str] = []


async def remote() -> str:
    await anyio.lowlevel.checkpoint()
    return "answer"


def ask(*_: Any) -> None:
    answers.append(anyio.from_thread.run(remote))


async def main() -> None:
    in_step = Engine(ask)
    in_subscriber, in_handler = Engine(lambda engine, batch: batch), Engine(lambda engine, batch: batch)
    in_subscriber.subscribe(Events.ITERATION_COMPLETED, ask)
    in_handler.add_event_handler(Events.ITERATION_COMPLETED, ask)
    for number, engine in enumerate((in_step, in_subscriber, in_handler), 1):
        await engine.run([1])
        assert answers == ["answer"] * number

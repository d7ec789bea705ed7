"""Subscribed while a cancelled run cleans up: run() does not wait for a subscriber that was never started."""

import time

import anyio

from aengine import Engine, Event, Events


async def main() -> None:
    engine = Engine(lambda engine, batch: anyio.sleep(0.01), grace=10.0)
    engine.register_events("late", "again")

    async def ignore(event: Event) -> None:
        await anyio.sleep(0.05)

    async def subscribe_late(event: Event) -> None:
        await anyio.sleep(0.2)  # the run is cancelled meanwhile, and waits for this
        engine.subscribe("late", ignore)
        engine.fire_event("late")
        await anyio.sleep(0.05)

    async def fire_later(event: Event) -> None:
        await anyio.sleep(0.3)
        engine.fire_event("again")

    engine.subscribe(Events.STARTED, subscribe_late)
    engine.subscribe(Events.STARTED, fire_later)
    engine.subscribe("again", ignore)
    began = time.perf_counter()
    with anyio.move_on_after(0.1):
        await engine.run(range(100_000))
    assert time.perf_counter() - began < 5

"""Subscribed while a cancelled run cleans up: run() does not wait for a subscriber that was never started."""

import time

import anyio

from aengine import Engine, Event, Events


async def main() -> None:
    engine = Engine(lambda engine, batch: anyio.sleep(0.01), grace=10.0)
    engine.register_events("late", "again")

    cleaning, subscribed = anyio.Event(), anyio.Event()

    async def begin() -> None:
        cleaning.set()

    async def ignore(event: Event) -> None: ...

    async def subscribe_late(event: Event) -> None:
        await cleaning.wait()  # the run is cancelled, and waits for this
        engine.subscribe("late", ignore)
        engine.fire_event("late")
        subscribed.set()

    async def fire_later(event: Event) -> None:
        await subscribed.wait()
        engine.fire_event("again")

    engine.subscribe(Events.STARTED, subscribe_late)
    engine.subscribe(Events.STARTED, fire_later)
    engine.subscribe("again", ignore)
    engine.add_event_handler(Events.CANCELLED, begin)
    began = time.perf_counter()
    with anyio.move_on_after(0.1):
        await engine.run(range(100_000))
    assert time.perf_counter() - began < 5

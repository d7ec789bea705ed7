"""An event of one's own brings its value to a subscriber."""

from typing import Any

from aengine import Engine, Event, EventEnum


class Shards(EventEnum):
    LOADED = "shard loaded"


def step(engine: Engine, batch: int) -> None:
    engine.fire_event(Shards.LOADED, f"shard-{batch}")


async def main() -> None:
    heard: list[Any] = []
    engine = Engine(step)
    engine.register_events(*Shards)

    async def note(event: Event) -> None:
        heard.append(event.payload)

    engine.subscribe(Shards.LOADED, note)
    await engine.run([1, 2, 3])
    assert heard == ["shard-1", "shard-2", "shard-3"]

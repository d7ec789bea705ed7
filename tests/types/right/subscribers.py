"""Subscribers, streams and snapshots: what the event has."""

from typing import Any, assert_type

import anyio

from aengine import Engine, Event, Events, Stream


async def step(engine: Engine, batch: int) -> float:
    await anyio.sleep(0)
    return batch / 2


trainer = Engine(step)


def weights(engine: Engine) -> dict[str, float]:
    return {"loss": engine.state.output}


async def weights_later(engine: Engine) -> dict[str, float]:
    await anyio.sleep(0)
    return weights(engine)


def plain(event: Event) -> None:
    print(event.name, event.engine_name, event.iteration, event.output, event.metrics["loss"], event.payload)


async def asynchronous(event: Event[float]) -> None:
    print(event.output + 0.5, event.time)


async def of_snapshot(event: Event[float, dict[str, float]]) -> None:
    print(event.snapshot["loss"])


class Report:
    def __init__(self) -> None:
        self.events: list[Event[Any, Any]] = []

    async def handle(self, event: Event[Any, Any]) -> None:
        self.events.append(event)


trainer.subscribe(Events.EPOCH_COMPLETED, plain)
trainer.subscribe(Events.EPOCH_COMPLETED, asynchronous, buffer=8, overflow="latest", on_error="log", name="log")
trainer.subscribe(Events.EPOCH_COMPLETED, of_snapshot, snapshot=weights)
trainer.subscribe(Events.EPOCH_COMPLETED, of_snapshot, snapshot=weights_later)
trainer.subscribe(Events.EPOCH_COMPLETED, lambda event: print(event.output + 0.5))
trainer.subscribe(Events.EPOCH_COMPLETED, Report().handle)
trainer.subscribe(Events.EPOCH_COMPLETED, Report().handle, snapshot=lambda engine: engine.state.iteration)


@trainer.subscribe(Events.EPOCH_COMPLETED)
async def decorated(event: Event[float]) -> None:
    print(event.output + 0.5)


@trainer.subscribe(Events.EPOCH_COMPLETED(every=2), snapshot=weights, overflow="drop_oldest")
def decorated_with_snapshot(event: Event[float, dict[str, float]]) -> None:
    print(event.output + event.snapshot["loss"])


@trainer.subscribe(Events.EPOCH_COMPLETED, snapshot=lambda engine: engine.state.iteration)
async def decorated_with_lambda(event: Event[Any, int]) -> None:
    print(event.snapshot + 1)


async def read(stream: Stream[float]) -> None:
    async with stream as events:
        async for event in events:
            assert_type(event, Event[float, None])
            print(event.output + 0.5)


async def main() -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(read, trainer.stream(Events.ITERATION_COMPLETED))
        await trainer.run([1, 2, 3])
    async with trainer.stream(Events.EPOCH_COMPLETED, snapshot=weights, wait_for_run=False) as events:
        async for event in events:
            assert_type(event.snapshot, dict[str, float])
    async with trainer.iterate([1, 2, 3], max_epochs=2) as iterations:
        async for each in iterations:
            assert_type(each, Event[float, None])
            if each.name == Events.ITERATION_COMPLETED:
                print(each.output + 0.5, each.epoch)
    await trainer.flush()
    print(await trainer.wait_completed(3), trainer.statistics().is_running, trainer.listeners()[0].name)


anyio.run(main)

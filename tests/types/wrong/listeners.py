"""What is wrong of handlers, subscribers, streams and snapshots."""

from typing import Any

from aengine import Engine, Event, Events


def step(engine: Engine, batch: int) -> float:
    return batch / 2


trainer = Engine(step)
event = Events.EPOCH_COMPLETED


def with_arguments(engine: Engine, name: str) -> None:
    print(engine, name)


def without(name: str) -> None:
    print(name)


def of_another(engine: Engine[str, float]) -> None:
    print(engine)


def plain(event: Event) -> None:
    print(event)


def of_text(event: Event[str]) -> None:
    print(event)


def of_weights(event: Event[float, list[float]]) -> None:
    print(event)


def weights(engine: Engine) -> dict[str, float]:
    return {}


# Handlers

trainer.add_event_handler(event, with_arguments, 3)  # error: call-overload, reportCallIssue
trainer.add_event_handler(event, with_arguments, "a", "b")  # error: call-overload, reportCallIssue
trainer.add_event_handler(event, with_arguments, count=3)  # error: call-overload, reportCallIssue
trainer.add_event_handler(event, without)  # error: arg-type, reportCallIssue
trainer.add_event_handler(event, without, 3)  # error: call-overload, reportArgumentType, reportCallIssue
trainer.add_event_handler(event, of_another)  # error: arg-type, reportCallIssue
trainer.add_event_handler(event, "handler")  # error: call-overload, reportArgumentType, reportCallIssue
trainer.add_event_handler(with_arguments, event)  # error: call-overload, reportArgumentType, reportCallIssue
trainer.add_event_handler([event], with_arguments, "a")  # error: call-overload, reportArgumentType, reportCallIssue
trainer.add_event_handler(trainer, with_arguments, "a")  # error: call-overload, reportArgumentType, reportCallIssue
trainer.add_event_handler(event, lambda engine: engine.sate)  # error: attr-defined, reportAttributeAccessIssue
trainer.remove_event_handler(event, with_arguments)  # error: arg-type, reportArgumentType
event(evry=2)  # error: call-arg, reportCallIssue
event(every="2")  # error: arg-type, reportArgumentType
event.name.foo()  # error: attr-defined, reportAttributeAccessIssue


@trainer.on(event, 3)  # error: arg-type, reportArgumentType, reportCallIssue
def decorated(engine: Engine, name: str) -> None:
    print(engine, name)


# Subscribers

trainer.subscribe(event, of_text)  # error: arg-type, reportArgumentType, reportCallIssue
trainer.subscribe(event, of_weights)  # error: arg-type, reportArgumentType, reportCallIssue
trainer.subscribe(event, of_weights, snapshot=weights)  # error: misc, reportArgumentType, reportCallIssue
trainer.subscribe(event, with_arguments)  # error: arg-type, reportArgumentType, reportCallIssue
trainer.subscribe(event, plain, overflow="newest")  # error: call-overload, reportArgumentType, reportCallIssue
trainer.subscribe(event, plain, on_error="warn")  # error: call-overload, reportArgumentType, reportCallIssue
trainer.subscribe(event, plain, 8)  # error: call-overload, reportCallIssue
trainer.subscribe(event, lambda event: event.output.upper())  # error: union-attr, reportAttributeAccessIssue
trainer.add_service(trainer)  # error: arg-type, reportArgumentType
trainer.fire_event(3)  # error: arg-type, reportArgumentType


@trainer.subscribe(event, snapshot=weights)  # error: arg-type, reportArgumentType
async def decorated_with_snapshot(event: Event[float, list[float]]) -> None:
    print(event)


@trainer.subscribe(event, snapshot=weights)  # error: arg-type, reportArgumentType
async def decorated_without_its_type(event: Event) -> None:
    print(event)


@trainer.subscribe(event)
async def no_snapshot(event: Event) -> None:
    print(event.snapshot.keys())  # error: attr-defined, reportAttributeAccessIssue
    print(event.engine)  # error: attr-defined, reportAttributeAccessIssue
    event.iteration = 3  # error: misc, reportAttributeAccessIssue


# Streams

trainer.stream(event, overflow="newest")  # error: call-overload, reportArgumentType
trainer.stream(event, snapshot=3)  # error: call-overload, reportArgumentType, reportCallIssue


async def read() -> None:
    async with trainer.stream(event, snapshot=weights) as events:
        async for one in events:
            print(one.snapshot.foo)  # error: attr-defined, reportAttributeAccessIssue
            print(one.output.upper())  # error: union-attr, reportAttributeAccessIssue
    async with trainer.iterate([1]) as iterations:
        async for each in iterations:
            print(each.output.upper())  # error: union-attr, reportAttributeAccessIssue
            print(each.snapshot.foo)  # error: attr-defined, reportAttributeAccessIssue
    async for each in trainer.iterate([1]):  # error: attr-defined, reportGeneralTypeIssues
        pass


anything: Any = trainer
anything.subscribe(event, 3)

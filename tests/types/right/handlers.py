"""Inline handlers: with the engine and without, with arguments of their own, with a payload, as decorators."""

from functools import partial
from typing import Any

from aengine import Engine, EventEnum, EventLike, Events, RemovableEventHandle


class Backward(EventEnum):
    STARTED_BACKWARD = "started_backward"
    COMPLETED_BACKWARD = "completed_backward"


def step(engine: Engine, batch: int) -> float:
    engine.fire_event(Backward.STARTED_BACKWARD, {"batch": batch})
    return batch / 2


trainer = Engine(step)
trainer.register_events(*Backward, "my own", event_to_attr={Backward.STARTED_BACKWARD: "backward_passes"})


def with_engine(engine: Engine) -> None:
    print(engine.state.output)


def with_this_engine(engine: Engine[int, float]) -> None:
    print(engine.state.output + 0.5)


def without() -> None: ...


def with_arguments(engine: Engine, name: str, *, count: int = 1) -> None:
    print(engine, name * count)


def only_arguments(name: str) -> None:
    print(name)


def with_error(engine: Engine, error: BaseException) -> None:
    print(engine, error)


def only_error(error: BaseException) -> None:
    print(error)


async def asynchronous(engine: Engine) -> None:
    await engine.emit(Backward.COMPLETED_BACKWARD)


class Handler:
    def begin(self) -> None: ...

    def complete(self, engine: Engine) -> None: ...

    def __call__(self, engine: Engine, factor: float) -> None: ...


handle: RemovableEventHandle = trainer.add_event_handler(Events.STARTED, with_engine)
with trainer.add_event_handler(Events.EPOCH_COMPLETED(every=2), with_this_engine):
    trainer.run_sync([1, 2, 3])
handle.remove()
trainer.add_event_handler(Events.STARTED | Events.COMPLETED, without)
trainer.add_event_handler("my own", with_arguments, "name")
trainer.add_event_handler(Events.STARTED, with_arguments, "name", count=2)
trainer.add_event_handler(Events.STARTED, only_arguments, "name")
trainer.add_event_handler(Events.EXCEPTION_RAISED, with_error)
trainer.add_event_handler(Events.EXCEPTION_RAISED, only_error)
trainer.add_event_handler(Events.COMPLETED, asynchronous)
trainer.add_event_handler(Backward.STARTED_BACKWARD, lambda engine, payload: print(engine, payload))
trainer.add_event_handler(Events.STARTED, Handler().begin)
trainer.add_event_handler(Events.STARTED, Handler().complete)
trainer.add_event_handler(Events.STARTED, Handler(), 0.5)
trainer.add_event_handler(Events.STARTED, partial(with_arguments, name="name"))
trainer.add_event_handler(Events.ITERATION_COMPLETED(once=[1, 10]), lambda engine: print(engine.state.output + 0.5))
trainer.add_event_handler(Events.ITERATION_COMPLETED(event_filter=lambda engine, count: count < 9), lambda: print("!"))
trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.terminate)
for name in ("a", "b"):
    trainer.add_event_handler(Events.STARTED, lambda engine, name=name: print(engine, name))
seen: list[str] = []
trainer.add_event_handler(Events.STARTED, seen.append, "started")


@trainer.on(Events.STARTED)
def decorated(engine: Engine) -> None:
    print(engine.name)


@trainer.on(Events.STARTED)
def decorated_without() -> int:
    return 1


@trainer.on(Events.ITERATION_COMPLETED(every=3), "name")
def decorated_with_arguments(engine: Engine, name: str) -> None:
    print(engine, name)


@trainer.on(Events.ITERATION_COMPLETED, count=3)
def decorated_with_keywords(engine: Engine, *, count: int) -> None:
    print(engine, count)


@trainer.on(Events.EXCEPTION_RAISED)
def decorated_with_error(engine: Engine, error: BaseException) -> None:
    print(engine, error)


evaluator = Engine(lambda engine, batch: "output")


@evaluator.on(Events.COMPLETED)
@trainer.on(Events.COMPLETED)
async def of_both(engine: Engine[Any, Any]) -> None:
    print(engine.state.metrics)


decorated(trainer)
number: int = decorated_without()
trainer.remove_event_handler(with_engine, Events.STARTED)
if trainer.has_event_handler(with_engine) or trainer.has_registered_events(Backward.STARTED_BACKWARD):
    print(Events.STARTED.name.lower(), Backward.STARTED_BACKWARD.name.lower(), Events.STARTED(every=2).name.lower())


def listen(engine: Engine, event: EventLike) -> None:
    engine.add_event_handler(event, without)


for event in (Events.STARTED, "my own", Events.STARTED | Events.COMPLETED, Events.EPOCH_STARTED(every=2)):
    listen(trainer, event)
listen(evaluator, Events.STARTED)

"""pytorch-ignite's events are taken as they are."""

from ignite.engine import Events

from aengine import Engine

trainer = Engine(lambda engine, batch: batch)


def handler(engine: Engine) -> None:
    print(engine.state.iteration)


trainer.add_event_handler(Events.STARTED, handler)
trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), handler)


@trainer.on(Events.EPOCH_COMPLETED)
def show(engine: Engine) -> None:
    print(engine.state.epoch)

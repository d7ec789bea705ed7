"""A filtered event of pytorch-ignite is found, and removed, by an equal one."""

from support.ignite import ignite

from aengine import Engine


def handler() -> None: ...


def main() -> None:
    event, engine = ignite.engine.Events.ITERATION_COMPLETED, Engine(lambda engine, batch: 0)
    engine.add_event_handler(event(every=2), handler)
    assert engine.has_event_handler(handler, event(every=2))
    engine.remove_event_handler(handler, event(every=2))
    assert not engine.has_event_handler(handler)

"""A State of one's own may be assigned: filters count with it."""

from aengine import Engine, Events, State


def main() -> None:
    engine = Engine(lambda engine, batch: batch)
    fired: list[int] = []
    engine.state = State()
    engine.add_event_handler(Events.EPOCH_COMPLETED(every=2), lambda: fired.append(engine.state.epoch))
    engine.run_sync([1, 2, 3, 4], max_epochs=4)
    assert fired == [2, 4]

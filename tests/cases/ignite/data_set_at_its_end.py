"""One-shot data ends: a handler of DATALOADER_STOP_ITERATION may set new data, and the run goes on."""

from collections.abc import Iterator

from aengine import Engine, Events


def finite() -> Iterator[int]:
    yield from range(11)


def main() -> None:
    engine = Engine(lambda engine, batch: batch)
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda: engine.set_data(finite()))
    state = engine.run_sync(finite(), max_epochs=5)
    assert (state.epoch, state.iteration) == (5, 55)

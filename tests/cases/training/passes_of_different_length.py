"""Data without a length, of another length in each pass: an epoch is a pass."""

from collections.abc import Iterator

from aengine import Engine, Events

LENGTHS = [3, 5, 2, 4]


def main() -> None:
    now = 0
    seen: list[tuple[int, int]] = []

    def batches() -> Iterator[int]:
        yield from range(now)

    engine = Engine(lambda engine, batch: seen.append((engine.state.epoch, batch)))

    def choose(engine: Engine) -> None:
        nonlocal now
        now = LENGTHS[engine.state.epoch - 1]

    engine.add_event_handler(Events.EPOCH_STARTED, choose)
    engine.run_sync(batches, max_epochs=4)
    assert [sum(epoch == number for epoch, _ in seen) for number in (1, 2, 3, 4)] == LENGTHS

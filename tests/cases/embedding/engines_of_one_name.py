"""Two evaluators of one name write to one sink: their numbers are not mistaken for each other's."""

import warnings
from collections.abc import Sequence

from aengine import Engine, Events
from aengine.loggers import Record, Tracker

records: list[Record] = []


async def sink(batch: Sequence[Record]) -> None:
    records.extend(batch)


def evaluator(value: float) -> Engine:
    engine = Engine(lambda engine, batch: None, name="evaluator")
    engine.add_event_handler(Events.COMPLETED, lambda: engine.state.metrics.update(accuracy=value))
    Tracker(sink).attach(engine, Events.COMPLETED)
    return engine


async def main() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engines = evaluator(0.5), evaluator(0.25)
        for engine in engines:
            await engine.run([1])
    assert len(records) == 2
    assert told or len({record.engine_name for record in records}) == 2

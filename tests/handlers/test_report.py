"""The report: where the time went, as a table."""

from typing import Any, TypeAlias

from aengine import Engine, EngineStatistics, Event, Events
from aengine.handlers import format_statistics
from aengine.statistics import ListenerStatistics

AnyEngine: TypeAlias = Engine[Any, Any]

LISTENER = ListenerStatistics(
    name="log",
    events="EPOCH_COMPLETED",
    depth=1,
    accepted=12,
    handled=7,
    dropped=3,
    discarded=0,
    errors=1,
    busy=0.25,
)
STATISTICS = EngineStatistics(
    name="trainer",
    is_running=False,
    epoch=2,
    iteration=400,
    total=2.0,
    data=0.5,
    step=1.0,
    handlers={"steer": 0.002, "show": 0.0},
    fired_handlers={"tell": 0.03},
    back_pressure=0.000004,
    event_loop=0.0,
    lag=0.0,
    listeners=(LISTENER,),
)


def test_the_whole_table() -> None:
    assert format_statistics(STATISTICS) == (
        "trainer: 400 iterations, 2 epochs, 2.0 s\n"
        "in the loop     seconds  of all\n"
        "step              1.0 s   50.0%\n"
        "data           500.0 ms   25.0%\n"
        "handler steer    2.0 ms    0.1%\n"
        "handler show          0    0.0%\n"
        "back-pressure      4 µs    0.0%\n"
        "event loop            0    0.0%\n"
        "the rest       498.0 ms   24.9%\n"
        "\n"
        "of events that were fired  seconds\n"
        "tell                       30.0 ms\n"
        "\n"
        "beside it      busy  of all  handled  waiting  dropped  discarded  errors\n"
        "log        250.0 ms   12.5%        7        1        3          0       1"
    )


async def test_a_run_has_its_handlers_and_listeners_in_it() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")

    @engine.on(Events.ITERATION_COMPLETED)
    def look() -> None:
        pass

    @engine.subscribe(Events.EPOCH_COMPLETED, name="reporter")
    async def report(event: Event) -> None:
        pass

    await engine.run(range(100), max_epochs=3)
    title, *lines = format_statistics(engine.statistics()).splitlines()
    assert title.startswith("trainer: 300 iterations, 3 epochs, ")
    assert any(line.startswith("handler test_a_run_has") and line.split()[1].endswith("look") for line in lines)
    assert [line.split()[-5:] for line in lines if line.startswith("reporter")] == [["3", "0", "0", "0", "0"]]


def test_an_engine_that_has_not_run_has_a_table_too() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    assert format_statistics(engine.statistics()).startswith("trainer: 0 iterations, 0 epochs")

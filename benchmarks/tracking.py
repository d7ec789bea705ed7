"""What a logger costs the steps: a tracking sink that takes 50 ms per call, one that is down, and none at all.

    python benchmarks/tracking.py [--fast] [--json FILE]

Method: steps of 5 ms, which sleep, so that only the loop decides what waits for what; a record after each step. The
sink is a plain function that sleeps for 50 ms, like a call of a distant server. Two times are taken: from the first
ITERATION_STARTED to the last ITERATION_COMPLETED, which gives the step rate; and the whole of `run()`, in which the
last records are written. The claim is about the time of an iteration, divided by that of the same engine without a sink
in the same round. The sink must have received every record, or the benchmark fails. pytorch-ignite calls the same
function in an inline handler, once for each step, as its own loggers do; it takes ten times as long, and is given a
tenth of the steps. A second table has steps that do almost nothing, and so shows the cost of a record: in µs of CPU an
iteration above the run without a sink, for a file of JSON lines, and with `every=100`.
"""

from __future__ import annotations

from measure import arguments

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    chosen = arguments(__doc__, ("rates", "cost"))

import importlib.util
import logging
import statistics
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from measure import (
    BACKENDS,
    Figure,
    Report,
    Stopwatch,
    Subject,
    begin,
    claim,
    interleave,
    run_on,
    settle,
)

from aengine import Engine, Events
from aengine.loggers import JSONLines, Record, Tracker

AnyEngine: TypeAlias = Engine[Any, Any]
Pair: TypeAlias = tuple[float, float]
"""Seconds an iteration: of the steps alone, and of the whole of `run()`."""

STEP = 0.005
CALL = 0.050


def step(engine: object, batch: int) -> int:
    time.sleep(STEP)
    return batch


class Server:
    """A sink that takes 50 ms per call, also when it raises because it is down."""

    def __init__(self, *, is_down: bool = False) -> None:
        self.written = 0
        self._is_down = is_down

    def write(self, records: Sequence[Record]) -> None:
        time.sleep(CALL)
        if self._is_down:
            raise ConnectionRefusedError("no server")
        self.written += len(records)

    def check(self, count: int) -> None:
        if self.written != (0 if self._is_down else count):
            raise RuntimeError(f"{self.written} of {count} records were written")


class Rate:
    """Two inline handlers that read the clock at the first and at the last step."""

    def __init__(self, engine: Any, events: Any, count: int) -> None:
        self._count = count
        self._began = self._ended = 0.0
        engine.add_event_handler(events.ITERATION_STARTED(once=1), self._begin)
        engine.add_event_handler(events.ITERATION_COMPLETED(once=count), self._end)

    def _begin(self) -> None:
        self._began = time.perf_counter()

    def _end(self) -> None:
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return (self._ended - self._began) / self._count


def ours(backend: str, make: Callable[[], Server] | None, count: int) -> Pair:
    async def run() -> Pair:
        engine: AnyEngine = Engine(step)
        rate = Rate(engine, Events, count)
        sink = make() if make is not None else None
        if sink is not None:
            Tracker(sink, shutdown_timeout=1.0).attach(engine, Events.ITERATION_COMPLETED)
        began = time.perf_counter()
        await engine.run(range(count))
        whole = (time.perf_counter() - began) / count
        if sink is not None:
            sink.check(count)
        return rate.seconds, whole

    return run_on(backend, run)


def ignite(make: Callable[[], Server] | None, count: int) -> Pair:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ignite.engine import Engine as IgniteEngine, Events as IgniteEvents

    engine = IgniteEngine(step)
    sink = make() if make is not None else None
    if sink is not None:

        @engine.on(IgniteEvents.ITERATION_COMPLETED)
        def log(engine: Any) -> None:
            state = engine.state
            values = {"output": state.output}
            sink.write([Record(state.iteration, state.epoch, time.time(), "ITERATION_COMPLETED", "", values)])

    rate = Rate(engine, IgniteEvents, count)  # after the logger, whose last call counts
    began = time.perf_counter()
    engine.run(range(count))
    whole = (time.perf_counter() - began) / count
    if sink is not None:
        sink.check(count)
    return rate.seconds, whole


def step_rates(report: Report, *, rounds: int, count: int) -> None:
    backends = [one for one in BACKENDS if one != "uvloop" or importlib.util.find_spec("uvloop") is not None]
    pairs: dict[str, tuple[Callable[[], Pair], Callable[[], Pair]]] = {}
    for backend in backends:
        none = partial(ours, backend, None, count)
        pairs[f"{backend}: 50 ms per call"] = none, partial(ours, backend, Server, count)
        pairs[f"{backend}: down"] = none, partial(ours, backend, partial(Server, is_down=True), count)
    tenth = count // 10
    pairs["ignite: 50 ms per call"] = partial(ignite, None, tenth), partial(ignite, Server, tenth)
    taken: dict[str, list[tuple[Pair, Pair]]] = {name: [] for name in pairs}
    for number in range(rounds):
        for name, (without, with_sink) in pairs.items():
            settle()
            first = with_sink() if number % 2 else None  # whatever the machine does meanwhile, it meets both alike
            plain = without()
            taken[name].append((plain, first or with_sink()))
    figures: dict[str, Figure] = {}
    rows: list[tuple[object, ...]] = []
    for name, both in taken.items():
        ratios = [logged[0] / plain[0] for plain, logged in both]
        figures[name] = Figure(statistics.median(ratios), min(ratios))
        plain_ms = statistics.median(one[0] for one, _ in both) * 1e3
        stepping, whole = (statistics.median(one[index] for _, one in both) * 1e3 for index in (0, 1))
        rows.append((name, plain_ms, stepping, f"{figures[name].median:.3f}", whole))
    report.table(
        "Steps of 5 ms, a record each: ms an iteration",
        ("", "no sink", "with it", "ratio", "run() in all"),
        rows,
    )
    theirs = figures.pop("ignite: 50 ms per call")
    report.claims += [
        claim("a sink of 50 ms per call, or one that is down: by no sink", 1.03, figures),
        claim("the sink of 50 ms in ignite, for comparison", 9.0, {"": theirs}, at_least=True),
    ]


def step_of_nothing(engine: object, batch: int) -> float:
    return 0.5


def attach_nothing(engine: object) -> None:
    pass


def of_nothing(attach: Callable[[AnyEngine], object], iterations: int) -> Any:
    async def run() -> Any:
        engine: AnyEngine = Engine(step_of_nothing)
        attach(engine)
        with Stopwatch(iterations) as watch:
            await engine.run(range(iterations))
        return watch.sample

    return run_on("asyncio", run)


def cost_of_a_record(report: Report, *, rounds: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"

        def write(event: Any) -> Callable[[AnyEngine], object]:
            return lambda engine: Tracker(JSONLines(path), buffer=1_000_000).attach(engine, event)

        def subscribe(engine: AnyEngine) -> None:
            async def nothing(event: object) -> None:
                pass

            engine.subscribe(Events.ITERATION_COMPLETED, nothing)

        none = "no sink"
        subjects = {
            none: Subject(partial(of_nothing, attach_nothing)),
            "a subscriber that does nothing": Subject(partial(of_nothing, subscribe), most=20_000),
            "JSON lines": Subject(partial(of_nothing, write(Events.ITERATION_COMPLETED)), most=20_000),
            "JSON lines, every=100": Subject(partial(of_nothing, write(Events.ITERATION_COMPLETED(every=100)))),
        }
        series = interleave(subjects, rounds=rounds, seconds=seconds)
    rows = [(name, one.cpu, one.cpu_over(series[none])) for name, one in series.items()]
    report.table("Steps of nothing: µs of CPU an iteration", ("", "CPU", "above no sink"), rows)


def main(chosen: Namespace) -> None:
    fast: bool = chosen.fast
    rounds, count = (5, 100) if fast else (7, 600)
    report = Report("tracking", {"fast": fast, "rounds": rounds, "iterations": count})
    logging.getLogger("aengine.loggers").setLevel(logging.CRITICAL)  # its warnings are expected here
    begin()
    if "rates" in chosen.only:
        step_rates(report, rounds=rounds, count=count)
    if "cost" in chosen.only:
        cost_of_a_record(report, rounds=rounds, seconds=0.2 if fast else 1.0)
    report.finish(chosen.json)


if __name__ == "__main__":
    main(chosen)

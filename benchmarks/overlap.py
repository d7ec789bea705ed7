"""What overlaps: data, step and a concurrent handler that take 5 ms each.

    python benchmarks/overlap.py [--fast] [--json FILE]

Method: each of the three sleeps (`time.sleep` where it is plain, `anyio.sleep` where it is async), so that only the
loop decides what runs concurrently. Each is timed alone in the same round, on the same backend, in a loop of its own,
half before the run and half after: a sleep takes longer than its argument, by an amount that depends on the machine.
The run is timed from before `run()` until it has returned, the filling of the pipeline and the handling of the last
event included. The claim is about the time of an iteration, divided by that of the slowest part. The data is prefetched
(`prefetch=2`), the handler is a subscriber with the default policy: every event is handled. pytorch-ignite runs the
same three plain functions one after the other.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import anyio
from measure import BACKENDS, Figure, Report, arguments, begin, claim, run_on, settle

from aengine import Engine, Events

AnyEngine: TypeAlias = Engine[Any, Any]
SECONDS = 0.005


def plain_batches(count: int) -> Iterator[int]:
    for batch in range(count):
        time.sleep(SECONDS)
        yield batch


async def async_batches(count: int) -> AsyncIterator[int]:
    for batch in range(count):
        await anyio.sleep(SECONDS)
        yield batch


def plain_step(engine: object, batch: int) -> int:
    time.sleep(SECONDS)
    return batch


async def async_step(engine: object, batch: int) -> int:
    await anyio.sleep(SECONDS)
    return batch


def plain_handler(event: object) -> None:
    time.sleep(SECONDS)


async def async_handler(event: object) -> None:
    await anyio.sleep(SECONDS)


async def alone(*, plain: bool, count: int) -> float:
    """Seconds that one part takes by itself."""
    started = time.perf_counter()
    for _ in range(count):
        if plain:
            time.sleep(SECONDS)  # noqa: ASYNC251 - timed alone: nothing else is on this event loop
        else:
            await anyio.sleep(SECONDS)
    return (time.perf_counter() - started) / count


@dataclass(frozen=True, slots=True)
class Parts:
    """Which of the three are async."""

    data: Callable[[int], Any]
    step: Callable[[Any, Any], Any]
    handler: Callable[[Any], Any]

    @property
    def kinds(self) -> set[bool]:
        """True where a part is plain."""
        return {part in PLAIN for part in (self.data, self.step, self.handler)}


PLAIN: set[object] = {plain_batches, plain_step, plain_handler}
VARIANTS = {
    "plain data, plain step, async handler": Parts(plain_batches, plain_step, async_handler),
    "plain data, plain step, plain handler": Parts(plain_batches, plain_step, plain_handler),
    "async data, plain step, async handler": Parts(async_batches, plain_step, async_handler),
    "async data, async step, async handler": Parts(async_batches, async_step, async_handler),
    "plain data, async step, async handler": Parts(plain_batches, async_step, async_handler),
}


async def together(parts: Parts, count: int) -> tuple[float, float]:
    """Seconds an iteration took, and the slowest part alone, timed half before and half after."""
    before = [await alone(plain=plain, count=count // 8) for plain in parts.kinds]
    engine: AnyEngine = Engine(parts.step)
    engine.subscribe(Events.ITERATION_COMPLETED, parts.handler)
    started = time.perf_counter()
    await engine.run(lambda: parts.data(count), max_epochs=1, epoch_length=count, prefetch=2)
    taken = (time.perf_counter() - started) / count
    if engine.state.iteration != count:
        raise RuntimeError(f"{engine.state.iteration} of {count} iterations ran")
    after = [await alone(plain=plain, count=count // 8) for plain in parts.kinds]
    return taken, max((b + a) / 2 for b, a in zip(before, after, strict=True))


async def ignite_together(count: int) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ignite.engine import Engine as IgniteEngine, Events as IgniteEvents

    before = await alone(plain=True, count=count // 8)
    engine = IgniteEngine(plain_step)
    engine.add_event_handler(IgniteEvents.ITERATION_COMPLETED, plain_handler)
    started = time.perf_counter()
    engine.run(plain_batches(count), max_epochs=1, epoch_length=count)
    taken = (time.perf_counter() - started) / count
    after = await alone(plain=True, count=count // 8)
    return taken, (before + after) / 2


def main() -> None:
    chosen = arguments(__doc__, ("overlap",))
    fast: bool = chosen.fast
    rounds, count = (3, 80) if fast else (7, 400)
    backends = list(BACKENDS)
    if importlib.util.find_spec("uvloop") is None:
        backends.remove("uvloop")
    report = Report("overlap", {"fast": fast, "rounds": rounds, "iterations": count})
    begin()
    subjects: dict[str, Callable[[], tuple[float, float]]] = {}
    for backend in backends:
        for name, parts in VARIANTS.items():
            subjects[f"{backend}: {name}"] = bind(backend, parts, count)
    subjects["ignite: all plain"] = lambda: run_on("asyncio", lambda: ignite_together(count // 2))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, run in subjects.items():
            settle()
            taken[name].append(run())
    figures: dict[str, Figure] = {}
    rows: list[tuple[object, ...]] = []
    for name, pairs in taken.items():
        ratios = [together / slowest for together, slowest in pairs]
        figures[name] = Figure(statistics.median(ratios), min(ratios))
        milliseconds = [statistics.median(column) * 1e3 for column in zip(*pairs, strict=True)]
        rows.append((name, *milliseconds, figures[name]))
    report.table(
        "Data, step and handler of 5 ms each: ms an iteration",
        ("", "together", "slowest alone", "ratio"),
        rows,
    )
    theirs = figures.pop("ignite: all plain")
    report.claims += [
        claim("data, step and handler of 5 ms: by the slowest alone", 1.10, figures),
        claim("the same in ignite, for comparison", 2.5, {"": theirs}, at_least=True),
    ]
    report.finish(chosen.json)


def bind(backend: str, parts: Parts, count: int) -> Callable[[], tuple[float, float]]:
    return lambda: run_on(backend, lambda: together(parts, count))


if __name__ == "__main__":
    main()

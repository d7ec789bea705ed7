"""The memory of one engine among many, and of a long run, which must not grow.

    python benchmarks/memory.py [--fast] [--json FILE] [--only GROUP ...]

Method:

- memory of an engine: 1,000 engines, each suspended in the 500th of its 1,000 async steps, in a fresh process. Measured
  twice: what Python allocated since before the first was built (tracemalloc) and what the process grew by (RSS). Both
  include the engine, its run, its task group and the task that awaits it. The claim is about the larger. For
  comparison, the same number of tasks that only sleep.
- growth: one run, with a subscriber (every event handled) and a stream that is read, on the worker; memory after the
  first tenth and at the end, each after a full garbage collection, in a fresh process; RSS and tracemalloc in separate
  runs. Only the contents of the two inboxes may differ between the two: 64 KiB of traced memory, and 1 MiB of
  RSS, which grows in pages and arenas.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import tracemalloc
from typing import Any, TypeAlias

import anyio
import psutil  # type: ignore[import-untyped]  # its stubs are a distribution of their own
from measure import BACKENDS, Figure, Report, arguments, begin, claim, in_fresh_process, run_on

from aengine import Engine, Events

AnyEngine: TypeAlias = Engine[Any, Any]
GROUPS = ("memory", "growth")
KIB = 1024


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def memory_of_many(backend: str, what: str, count: int, *, trace: bool) -> float:
    """Bytes for each of many engines (or mere tasks), all suspended half way; run in a fresh process."""
    bytes_now = traced if trace else resident

    async def main() -> float:
        arrived, release, everyone = 0, anyio.Event(), anyio.Event()

        async def wait_for_release() -> None:
            nonlocal arrived
            arrived += 1
            if arrived == count:
                everyone.set()
            await release.wait()

        async def step(engine: object, batch: int) -> None:
            if batch == 500:
                await wait_for_release()

        async def receive(event: object) -> None:
            pass

        async def run_engine(data: list[int]) -> None:
            engine: AnyEngine = Engine(step)
            if what == "engine and subscriber":
                engine.subscribe(Events.ITERATION_COMPLETED, receive)
            await engine.run(data)

        async def run_task(data: list[int]) -> None:
            await wait_for_release()

        runner = run_task if what == "task" else run_engine
        data = list(range(1000))
        await runner_warm_up(data)
        if trace:
            tracemalloc.start()
        before = bytes_now()
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(runner, data)
            await everyone.wait()
            used = bytes_now() - before
            release.set()
        return used / count

    return run_on(backend, main)


async def runner_warm_up(data: list[int]) -> None:
    """Load and allocate what only the first run needs, and later runs share."""

    async def step(engine: object, batch: int) -> None:
        pass

    await Engine[Any, Any](step).run(data)


def memory_group(report: Report, backends: list[str], *, fast: bool) -> None:
    """Memory with the number of engines."""
    count = 200 if fast else 1000
    judged: dict[str, Figure] = {}
    rows: list[tuple[object, ...]] = []
    for backend in backends:
        for what in ("engine", "engine and subscriber", "task"):
            ask = functools.partial(memory_of_many, backend, what, count)
            by_trace = in_fresh_process(functools.partial(ask, trace=True))
            by_resident = in_fresh_process(functools.partial(ask, trace=False))
            rows.append((f"{backend}, {what}", by_trace / KIB, by_resident / KIB))
            if what == "engine":
                larger = max(by_trace, by_resident) / KIB
                judged[backend] = Figure(larger, larger)
    report.table(
        f"Memory for each of {count}, suspended half way: KiB",
        ("", "tracemalloc", "RSS"),
        rows,
    )
    report.claims.append(claim(f"memory of an engine, {count} at once: KiB", 32, judged))


def growth_of(backend: str, iterations: int, *, trace: bool) -> int:
    """Bytes between the first tenth and the end of a run with a subscriber and a stream."""
    bytes_now = traced if trace else resident
    seen: list[int] = []
    handled = 0

    def step(engine: object, batch: int) -> int:
        return batch

    def sample(engine: object) -> None:
        seen.append(bytes_now())

    async def receive(event: object) -> None:
        nonlocal handled
        handled += 1

    async def main() -> None:
        engine: AnyEngine = Engine(step)
        tenth = iterations // 10
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=tenth), sample)
        engine.subscribe(Events.ITERATION_COMPLETED, receive)
        async with anyio.create_task_group() as group, engine.stream(Events.ITERATION_COMPLETED) as events:

            async def read() -> None:
                async for _ in events:
                    pass

            group.start_soon(read)
            await engine.run(range(iterations))
            group.cancel_scope.cancel()

    if trace:
        tracemalloc.start()
    run_on(backend, main)
    if handled != iterations:
        raise RuntimeError(f"the subscriber handled {handled} of {iterations} events")
    return seen[-1] - seen[0]


def growth_group(report: Report, backends: list[str], *, fast: bool) -> None:
    """A long run does not grow."""
    iterations = 100_000 if fast else 1_000_000
    by_resident: dict[str, Figure] = {}
    by_trace: dict[str, Figure] = {}
    for backend in backends:
        for kept, trace in ((by_resident, False), (by_trace, True)):
            run = functools.partial(growth_of, backend, iterations, trace=trace)
            grown = in_fresh_process(run) / KIB
            kept[backend] = Figure(grown, grown)
    report.table(
        f"Growth from the first tenth to the end of {iterations:,} iterations: KiB",
        ("", "RSS", "tracemalloc"),
        [(name, by_resident[name].median, by_trace[name].median) for name in backends],
    )
    report.claims += [
        claim(f"{iterations:,} iterations: growth of RSS, KiB", 1024, by_resident),
        claim(f"{iterations:,} iterations: growth of traced memory, KiB", 64, by_trace),
    ]


def main() -> None:
    chosen = arguments(__doc__, GROUPS)
    fast: bool = chosen.fast
    backends = list(BACKENDS)
    if importlib.util.find_spec("uvloop") is None:
        backends.remove("uvloop")
    report = Report("memory", {"fast": fast, "only": chosen.only})
    begin()
    if "memory" in chosen.only:
        memory_group(report, backends, fast=fast)
    if "growth" in chosen.only:
        growth_group(report, backends, fast=fast)
    report.finish(chosen.json)


if __name__ == "__main__":
    main()

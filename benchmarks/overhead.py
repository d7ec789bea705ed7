"""What the loop costs: µs an iteration with a step that does nothing, compared with a bare loop and pytorch-ignite.

    python benchmarks/overhead.py [--fast] [--json FILE] [--only GROUP ...]

Method (`measure.py` has the rest: samples, interleaved rounds, medians with the minimum in brackets):

- A subject is one epoch over a list, with a step that does nothing; up to 200,000 iterations, so that starting and
  ending the run vanish. Every figure is process CPU time (all threads) unless it says wall. The figures of one table
  come from the same interleaved rounds in one process.
- "Over the bare loop" means: minus a `for` loop that calls the same step over the same list (for async steps, one
  that awaits it; for async data, an `async for`), within each round.
- "ignite" is its `Engine` with default settings: no debug logging, no handlers but those named. It has no async, so an
  async step, async handlers and async data have nothing to be compared with.
- "worker": a plain step in the default mode, on the engine's own thread; "loop": `thread=False`, on the event loop.
- A short run: an engine is made and run for one step, 200 times in a row, with torch loaded.
- One event to n subscribers: the cost of the run with n subscribers to ITERATION_COMPLETED, each a trivial `async def`,
  minus the same run without, per iteration. The buffer is the default (64), but for "error", which gets one that holds
  the whole run. With policies that drop, many events are dropped: that is their purpose, and the share delivered is
  shown. On the worker, a step that does nothing fills the buffer of 64 in some 50 µs, and each 64 events cost two
  thread switches: their price is the operating system's, and a step that takes longer does not pay it.
- For comparison, by hand and without events, state or errors: an object through a memory stream of anyio, of 64, to
  another task; and a thread that puts 64 objects on a deque, has the event loop take them, and waits for that.
- The torch rows run real steps on scikit-learn's digits with torch's default threads, after the main thread has built
  the model and run parallel operations; the ratio is wall time of the default mode by that of the bare loop. A sample
  takes a second, so that what a run costs once (a thread, and OpenMP's threads for it: some 2 ms) is in proportion.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import anyio
import anyio.to_thread
from anyio.lowlevel import current_token
from measure import (
    BACKENDS,
    Figure,
    Report,
    Sample,
    Series,
    Stopwatch,
    Subject,
    arguments,
    begin,
    claim,
    interleave,
    run_on,
    times_less,
)

from aengine import Engine, Events

AnyEngine: TypeAlias = Engine[Any, Any]
Prepare: TypeAlias = Callable[[AnyEngine, int], None]
POLICIES = ("wait", "latest", "drop_oldest", "drop_new", "error")
BUFFER = 64  # the default
GROUPS = ("loop", "async", "short", "bus", "torch")


# The subjects: bare loops, ours, ignite's.


def step(engine: object, batch: object) -> None:
    pass


async def async_step(engine: object, batch: object) -> None:
    pass


async def batches(count: int) -> AsyncIterator[int]:
    for batch in range(count):
        yield batch


def bare(count: int) -> Sample:
    """The loop that everything is measured against."""
    data = list(range(count))
    with Stopwatch(count) as watch:
        for batch in data:
            step(None, batch)
    return watch.sample


def bare_async_step(count: int) -> Sample:
    async def main() -> Sample:
        data = list(range(count))
        with Stopwatch(count) as watch:
            for batch in data:
                await async_step(None, batch)
        return watch.sample

    return run_on("asyncio", main)


def bare_async_data(count: int) -> Sample:
    async def main() -> Sample:
        with Stopwatch(count) as watch:
            async for batch in batches(count):
                step(None, batch)
        return watch.sample

    return run_on("asyncio", main)


def bare_async_both(count: int) -> Sample:
    async def main() -> Sample:
        with Stopwatch(count) as watch:
            async for batch in batches(count):
                await async_step(None, batch)
        return watch.sample

    return run_on("asyncio", main)


def nothing(engine: AnyEngine, count: int) -> None:
    pass


def ours(
    count: int,
    *,
    backend: str,
    the_step: Callable[[Any, Any], Any] = step,
    thread: bool = True,
    async_data: bool = False,
    prefetch: int = 0,
    prepare: Prepare = nothing,
) -> Sample:
    """One run of our engine."""

    async def main() -> Sample:
        engine: AnyEngine = Engine(the_step, thread=thread)
        prepare(engine, count)
        data: Any = partial(batches, count) if async_data else list(range(count))
        with Stopwatch(count) as watch:
            await engine.run(data, max_epochs=1, epoch_length=count, prefetch=prefetch)
        if engine.state.iteration != count:
            raise RuntimeError(f"{engine.state.iteration} of {count} iterations ran")
        return watch.sample

    return run_on(backend, main)


def with_handlers(
    engine: AnyEngine, _: int, *, handler: Callable[..., Any], number: int, every: int | None = None
) -> None:
    event = Events.ITERATION_COMPLETED(every=every) if every else Events.ITERATION_COMPLETED
    for _ in range(number):
        engine.add_event_handler(event, handler)


def handler(engine: object) -> None:
    pass


async def async_handler(engine: object) -> None:
    pass


def ignite(count: int, *, number: int = 0, every: int | None = None) -> Sample:
    """One run of pytorch-ignite's engine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ignite.engine import Engine as IgniteEngine, Events as IgniteEvents

    engine = IgniteEngine(step)
    event = IgniteEvents.ITERATION_COMPLETED
    for _ in range(number):
        engine.add_event_handler(event(every=every) if every else event, handler)
    data = list(range(count))
    with Stopwatch(count) as watch:
        engine.run(data, max_epochs=1)
    return watch.sample


# The groups: each prints a table or two and judges the claims it can.

HANDLERS: dict[str, dict[str, Any]] = {
    "no handler": {"number": 0},
    "1 handler": {"number": 1},
    "5 handlers": {"number": 5},
    "5 every=100": {"number": 5, "every": 100},
}


def loop_group(report: Report, backends: list[str], rounds: int, seconds: float) -> None:
    """Sync step, sync data, inline sync handlers, compared with ignite."""
    over: dict[str, dict[str, Figure]] = {kind: {} for kind in HANDLERS}
    less: dict[str, dict[str, Figure]] = {kind: {} for kind in HANDLERS}
    more: dict[str, Figure] = {}
    for backend in backends:
        subjects = {"bare for": Subject(bare)}
        for kind, options in HANDLERS.items():
            subjects[f"ignite, {kind}"] = Subject(partial(ignite, **options))
            prepare = partial(with_handlers, handler=handler, **options)
            for where, thread in (("worker", True), ("loop", False)):
                run = partial(ours, backend=backend, thread=thread, prepare=prepare)
                subjects[f"{where}, {kind}"] = Subject(run)
        series = interleave(subjects, rounds=rounds, seconds=seconds)
        bare_series = series["bare for"]
        for kind in HANDLERS:
            for where in ("worker", "loop"):
                mine = series[f"{where}, {kind}"]
                name = f"{backend}, {where}"
                over[kind][name] = mine.cpu_over(bare_series)
                less[kind][name] = times_less(mine, series[f"ignite, {kind}"], bare_series)
                if kind == "5 every=100":
                    more[name] = mine.cpu_over(series[f"{where}, no handler"])
        report.table(
            f"Sync step, sync data, inline sync handlers, on {backend}: µs an iteration",
            ("", "cpu", "cpu over the bare loop", "wall", "ignite's multiple of the excess"),
            [
                (name, each.cpu, each.cpu_over(bare_series), each.wall, multiple(name, series))
                for name, each in series.items()
            ],
        )
    report.claims += [
        claim("no handler: µs over the bare loop", 0.40, over["no handler"]),
        claim("no handler: times less than ignite", 15, less["no handler"], at_least=True),
        claim("5 handlers: times less than ignite", 10, less["5 handlers"], at_least=True),
        claim("5 every=100: µs more than no handler", 0.10, more),
        claim("5 every=100: times less than ignite", 30, less["5 every=100"], at_least=True),
    ]


def multiple(name: str, series: Mapping[str, Series]) -> Figure | str:
    where, _, kind = name.partition(", ")
    if where not in {"worker", "loop"}:
        return ""
    return times_less(series[name], series[f"ignite, {kind}"], series["bare for"])


def async_group(report: Report, backends: list[str], rounds: int, seconds: float) -> None:
    """Async steps, async data, inline async handlers."""
    one = partial(with_handlers, handler=async_handler, number=1)
    five = partial(with_handlers, handler=async_handler, number=5)
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "async step": ("bare async step", {"the_step": async_step}),
        "async step, async data": ("bare async both", {"the_step": async_step, "async_data": True}),
        "async data, loop": ("bare async data", {"async_data": True, "thread": False}),
        "async data, worker": ("bare async data", {"async_data": True}),
        "async data, worker, prefetch=64": ("bare async data", {"async_data": True, "prefetch": 64}),
        "1 async handler, async step": ("bare async step", {"the_step": async_step, "prepare": one}),
        "5 async handlers, async step": ("bare async step", {"the_step": async_step, "prepare": five}),
        "1 async handler, loop": ("bare for", {"thread": False, "prepare": one}),
        "5 async handlers, loop": ("bare for", {"thread": False, "prepare": five}),
        "1 async handler, worker": ("bare for", {"prepare": one}),
        "5 async handlers, worker": ("bare for", {"prepare": five}),
    }
    over: dict[str, Figure] = {}
    over_plain: dict[str, Figure] = {}
    for backend in backends:
        subjects = {
            "bare for": Subject(bare),
            "bare async step": Subject(bare_async_step),
            "bare async data": Subject(bare_async_data),
            "bare async both": Subject(bare_async_both),
        }
        for name, (_, options) in variants.items():
            subjects[name] = Subject(partial(ours, backend=backend, **options))
        series = interleave(subjects, rounds=rounds, seconds=seconds)
        over[backend] = series["async step"].cpu_over(series["bare async step"])
        over_plain[backend] = series["async step"].cpu_over(series["bare for"])
        report.table(
            f"Async steps, data and handlers, on {backend}: µs an iteration",
            ("", "cpu", "cpu over its bare loop", "wall"),
            [
                (name, each.cpu, each.cpu_over(series[variants[name][0]]) if name in variants else "", each.wall)
                for name, each in series.items()
            ],
        )
    report.claims += [
        claim("async step: µs over the bare loop that awaits it", 0.55, over),
        claim("async step: µs over the bare loop of a plain step", 0.55, over_plain),
    ]


def short(count: int, *, backend: str, the_step: Callable[[Any, Any], Any] = step, thread: bool = True) -> Sample:
    """`count` engines, made and run for one step each, one after the other."""

    async def main() -> Sample:
        with Stopwatch(count) as watch:
            for _ in range(count):
                await Engine(step, thread=thread).run([1])
        return watch.sample

    return run_on(backend, main)


def short_sync(count: int) -> Sample:
    with Stopwatch(count) as watch:
        for _ in range(count):
            Engine(step).run_sync([1])
    return watch.sample


def short_group(report: Report, backends: list[str], rounds: int) -> None:
    """What a run costs that is short: evaluators, episodes, engines of a user's own."""
    subjects = {"run_sync": Subject(short_sync, most=200, least=200)}
    for name in backends:
        for where, thread in (("worker", True), ("loop", False)):
            subjects[f"{name}, {where}"] = Subject(partial(short, backend=name, thread=thread), most=200, least=200)
    series = interleave(subjects, rounds=rounds, seconds=0)
    rows = [(name, each.cpu, each.wall) for name, each in series.items()]
    report.table("An engine, and a run of one step that does nothing: µs", ("", "cpu", "wall"), rows)
    for where, limit in (("worker", 450), ("loop", 200), ("run_sync", 60)):
        figures = {name: each.cpu for name, each in series.items() if where in name}
        report.claims.append(claim(f"a short run, {where}: µs", limit, figures))


async def receive(event: object) -> None:
    pass


def with_subscribers(engine: AnyEngine, count: int, *, number: int, policy: Any) -> None:
    buffer = count + 1 if policy == "error" else BUFFER
    for _ in range(number):
        subscribe(engine, policy, buffer)


def subscribe(engine: AnyEngine, policy: Any, buffer: int) -> None:
    engine.subscribe(Events.ITERATION_COMPLETED, receive, buffer=buffer, overflow=policy)


def share_delivered(backend: str, policy: Any, *, thread: bool, count: int = 20_000) -> float:
    """How many of a run's events reach the handler: counted in a separate run, because counting costs time."""
    delivered = 0

    async def counting(event: object) -> None:
        nonlocal delivered
        delivered += 1

    async def main() -> None:
        engine: AnyEngine = Engine(step, thread=thread)
        buffer = count + 1 if policy == "error" else BUFFER
        engine.subscribe(Events.ITERATION_COMPLETED, counting, buffer=buffer, overflow=policy)
        await engine.run(list(range(count)), max_epochs=1)

    run_on(backend, main)
    return delivered / count


def by_stream(count: int, *, backend: str) -> Sample:
    """Objects to another task, sent by hand."""

    async def main() -> Sample:
        send, received = anyio.create_memory_object_stream[int](BUFFER)

        async def take() -> None:
            async for _ in received:
                pass

        with Stopwatch(count) as watch:
            async with anyio.create_task_group() as group:
                group.start_soon(take)
                async with send:
                    for number in range(count):
                        await send.send(number)
        return watch.sample

    return run_on(backend, main)


def from_thread(count: int, *, backend: str) -> Sample:
    """Objects from a thread to the event loop, a buffer at a time: the least that such a transfer costs."""

    async def main() -> Sample:
        waiting: deque[int] = deque()
        taken = threading.Lock()
        taken.acquire()

        def take() -> None:
            while waiting:
                waiting.popleft()
            taken.release()

        def put(call: Callable[[Callable[[], None]], object]) -> None:
            for _ in range(0, count, BUFFER):
                for number in range(BUFFER):
                    waiting.append(number)
                call(take)
                taken.acquire()

        token: Any = current_token().native_token
        with Stopwatch(count) as watch:
            await anyio.to_thread.run_sync(
                put, token.run_sync_soon if backend == "trio" else token.call_soon_threadsafe
            )
        return watch.sample

    return run_on(backend, main)


def bus_group(report: Report, backends: list[str], rounds: int, seconds: float, numbers: tuple[int, ...]) -> None:
    """One event to concurrent subscribers, under each policy."""
    to_one: dict[str, Figure] = {}
    waiting: dict[str, dict[str, Figure]] = {"worker": {}, "loop": {}}
    for backend in backends:
        for where, thread in (("worker", True), ("loop", False)):
            base = partial(ours, backend=backend, thread=thread)
            hand = "a thread to the event loop" if thread else "a stream of anyio"
            by_hand = partial(from_thread if thread else by_stream, backend=backend)
            subjects = {"none": Subject(base, most=100_000), "hand": Subject(by_hand, most=100_000)}
            for policy in POLICIES:
                for number in numbers:
                    prepare = partial(with_subscribers, number=number, policy=policy)
                    run = partial(base, prepare=prepare)
                    subjects[f"{policy}, {number}"] = Subject(run, most=100_000)
            series = interleave(subjects, rounds=rounds, seconds=seconds)
            none = series["none"]
            for policy in POLICIES:
                figure = series[f"{policy}, 1"].cpu_over(none)
                to_one[f"{policy}: {backend}, {where}"] = figure
                if policy == "wait":
                    waiting[where][backend] = figure
            report.table(
                f"One event to n concurrent subscribers, on {backend}, {where}: µs of cpu an event",
                ("policy", *(f"to {number}" for number in numbers), "delivered"),
                [
                    (
                        policy,
                        *(series[f"{policy}, {number}"].cpu_over(none) for number in numbers),
                        f"{share_delivered(backend, policy, thread=thread):.0%}",
                    )
                    for policy in POLICIES
                ]
                + [(f"by hand, {hand}", series["hand"].cpu, *("" for _ in numbers))],
            )
    report.claims += [
        claim("one event to one subscriber, on the event loop: µs", 1.0, waiting["loop"]),
        claim("the same on the worker, its inbox full each 64 events: µs", 1.0, waiting["worker"]),
        claim("one event to one subscriber, any policy: µs", 1.0, to_one),
    ]


def torch_group(report: Report, rounds: int, seconds: float) -> None:
    """Real steps in the default mode, compared with the bare loop."""
    from torch_steps import Batch, Step, run_parallel_operations, small_step, wide_step

    run_parallel_operations()

    def sample(kind: str, the_step: Step, data: list[Batch], count: int) -> Sample:
        async def main() -> Sample:
            if kind == "bare for":
                with Stopwatch(count) as watch:
                    for index in range(count):
                        the_step(None, data[index % len(data)])
                return watch.sample
            engine: AnyEngine = Engine(the_step, thread=kind != "loop")
            with Stopwatch(count) as watch:
                await engine.run(data, max_epochs=1, epoch_length=count)
            return watch.sample

        return run_on("asyncio", main)

    def sample_ignite(the_step: Step, data: list[Batch], count: int) -> Sample:
        from ignite.engine import Engine as IgniteEngine

        engine = IgniteEngine(the_step)
        with Stopwatch(count) as watch:
            engine.run(data, max_epochs=1, epoch_length=count)
        return watch.sample

    for name, (the_step, data) in {
        "small step on the digits": small_step(),
        "step of width 512": wide_step(),
    }.items():
        kinds = ("bare for", "worker", "loop")
        subjects = {kind: Subject(partial(sample, kind, the_step, data), most=5000, least=10) for kind in kinds}
        subjects["ignite"] = Subject(partial(sample_ignite, the_step, data), most=5000, least=10)
        series = interleave(subjects, rounds=rounds, seconds=seconds)
        bare_series = series["bare for"]
        report.table(
            f"{name}: µs a step (batches of {len(data[0][0])})",
            ("", "wall", "wall by the bare loop's", "cpu"),
            [(kind, each.wall, each.wall_ratio(bare_series), each.cpu) for kind, each in series.items()],
        )
        ratio = {"": series["worker"].wall_ratio(bare_series)}
        milliseconds = bare_series.wall.median / 1e3
        text = f"{name}, {milliseconds:.2g} ms: wall by the bare loop's"
        report.claims.append(claim(text, 1.05, ratio))


def main() -> None:
    chosen = arguments(__doc__, GROUPS)
    fast: bool = chosen.fast
    rounds, seconds = (5, 0.02) if fast else (15, 0.08)
    backends = ["asyncio", "trio"] if fast else list(BACKENDS)
    if importlib.util.find_spec("uvloop") is None:
        backends = [name for name in backends if name != "uvloop"]
    report = Report("overhead", {"fast": fast, "rounds": rounds, "seconds a sample": seconds, "only": chosen.only})
    ignite(10)  # imports torch too: every subject runs in the same process, with the same libraries loaded
    begin()
    if "loop" in chosen.only:
        loop_group(report, backends, rounds, seconds)
    if "async" in chosen.only:
        async_group(report, backends, rounds, seconds)
    if "short" in chosen.only:
        short_group(report, backends, rounds)
    if "bus" in chosen.only:
        bus_group(report, backends, rounds if fast else 9, seconds, (1, 4) if fast else (1, 4, 16))
    if "torch" in chosen.only:
        torch_group(report, 3 if fast else 9, 0.3 if fast else 1.0)
    report.finish(chosen.json)


if __name__ == "__main__":
    main()

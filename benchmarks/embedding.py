"""What embedding costs: many engines at once, a server on the same event loop, cancellation, the import.

    python benchmarks/embedding.py [--fast] [--json FILE] [--only GROUP ...]

Method (`measure.py` has the rest):

- engines: 1,000 engines run at once in one event loop, 1,000 async steps each, compared with ten lots of 100 engines,
  one lot after the other, so that both do the same work; building the engines is not timed, the task group is. With
  steps that never suspend, with steps that await a checkpoint every tenth time, so that all runs really overlap, and
  with a tenth as many steps that do so each time. The claims are about the ratio of CPU time (that of wall time is
  shown).
- server: a TCP echo server (anyio's) on the event loop that runs the engine, a client in another process that sends one
  request after the other, 2 ms apart. Idle and training phases alternate. The step is a torch step of about 20 ms, with
  torch's default threads and default settings of the engine. The claim is about the median latency, divided by that of
  the idle phases.
- cancel: from `scope.cancel()` until `run()` has ended, while the step awaits for ever, while no-op steps run on the
  worker, and while a 20 ms step runs there: that one is waited for, so it takes up to a step.
- import: in a fresh interpreter, with bytecode. `import aengine` alone loads next to nothing: its names are handed on
  when they are asked for. With the Engine, it is anyio and the loop.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import anyio
import anyio.abc
from anyio.lowlevel import checkpoint
from measure import (
    BACKENDS,
    Claim,
    Figure,
    Report,
    Sample,
    Stopwatch,
    Subject,
    arguments,
    begin,
    claim,
    interleave,
    run_on,
    settle,
)

from aengine import Engine

AnyEngine: TypeAlias = Engine[Any, Any]
GROUPS = ("import", "cancel", "engines", "server")


# Many engines at once.


async def unsuspended_step(engine: object, batch: int) -> None:
    pass


async def suspending_step(engine: object, batch: int) -> None:
    if batch % 10 == 0:
        await checkpoint()


async def always_suspending_step(engine: object, batch: int) -> None:
    await checkpoint()


def many_engines(steps: int, *, backend: str, step: Any, lots: int, size: int) -> Sample:
    """`lots` lots of `size` engines at once, one lot after the other."""

    async def main() -> Sample:
        data = list(range(steps))
        engines = [[Engine[Any, Any](step) for _ in range(size)] for _ in range(lots)]
        settle()
        with Stopwatch(steps * lots * size) as watch:
            for lot in engines:
                async with anyio.create_task_group() as group:
                    for engine in lot:
                        group.start_soon(engine.run, data)
        for lot in engines:
            if any(engine.state.iteration != steps for engine in lot):
                raise RuntimeError("an engine did not run to its end")
        return watch.sample

    return run_on(backend, main)


def engines_group(report: Report, backends: list[str], *, fast: bool) -> None:
    """Time with the number of engines."""
    small, large, most, rounds = (20, 200, 200, 5) if fast else (100, 1000, 1000, 3)
    figures: dict[str, Figure] = {}
    each_time: dict[str, Figure] = {}
    rows: list[tuple[object, ...]] = []
    for backend in backends:
        for kind, step, steps in (
            ("never suspends", unsuspended_step, most),
            ("suspends", suspending_step, most),
            ("suspends each time", always_suspending_step, most // 10),
        ):
            run = functools.partial(many_engines, backend=backend, step=step)
            many = functools.partial(run, lots=1, size=large)
            few = functools.partial(run, lots=large // small, size=small)
            subjects = {
                "many": Subject(many, most=steps, least=steps),
                "few": Subject(few, most=steps, least=steps),
            }
            series = interleave(subjects, rounds=rounds, seconds=0)
            name = f"{backend}, step {kind}"
            ratio, wall_ratio = series["many"].cpu_ratio(series["few"]), series["many"].wall_ratio(series["few"])
            (each_time if step is always_suspending_step else figures)[name] = ratio
            rows.append((name, series["few"].cpu, series["many"].cpu, ratio, wall_ratio))
    report.table(
        f"{large} engines at once, {most} async steps each: µs of cpu a step",
        ("", f"{small} engines", f"{large} engines", "ratio", "ratio of wall"),
        rows,
    )
    text = f"{large} engines at once: time a step by that of {small}"
    report.claims += [claim(text, 1.20, figures), claim(f"{text}, where each step suspends", 2.0, each_time)]


# A server on the same event loop.

CLIENT = """
import json, socket, sys, time
port, count = int(sys.argv[1]), int(sys.argv[2])
taken = []
with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(count):
        time.sleep(0.002)
        started = time.perf_counter()
        connection.sendall(b"x" * 64)
        received = 0
        while received < 64:
            received += len(connection.recv(64))
        taken.append((time.perf_counter() - started) * 1e3)
print(json.dumps(taken))
"""


async def ask_server(port: int, count: int) -> list[float]:
    """Milliseconds each request took, sent by another process."""
    command = [sys.executable, "-S", "-c", CLIENT, str(port), str(count)]
    done = await anyio.run_process(command)
    taken: list[float] = json.loads(done.stdout)
    return taken


async def echo(stream: anyio.abc.SocketStream) -> None:
    async with stream:
        try:
            while True:
                await stream.send(await stream.receive())
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return


async def serve_and_train(
    step: Callable[[Any, Any], Any], data: list[Any], phases: int, requests: int, *, thread: bool
) -> tuple[list[float], list[float]]:
    """Latencies in milliseconds: idle, and while the engine trains."""
    idle: list[float] = []
    training: list[float] = []
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as server,
    ):
        port = listener.listeners[0].extra(anyio.abc.SocketAttribute.local_port)  # noqa: S610 -- not Django's
        server.start_soon(listener.serve, echo)
        await ask_server(port, 20)
        for _ in range(phases):
            idle += await ask_server(port, requests)
            engine: AnyEngine = Engine(step, thread=thread)
            async with anyio.create_task_group() as trainer:
                trainer.start_soon(functools.partial(engine.run, data, max_epochs=1_000_000))
                await anyio.sleep(0.1)
                training += await ask_server(port, requests)
                engine.terminate()
        server.cancel_scope.cancel()
    return idle, training


def server_group(report: Report, backends: list[str], *, fast: bool) -> None:
    """Latency of requests while a torch step runs."""
    from torch_steps import run_parallel_operations, seconds_a_step, twenty_millisecond_step

    step, data = twenty_millisecond_step()
    run_parallel_operations()
    alone = seconds_a_step(step, data) * 1e3
    phases, requests = (2, 50) if fast else (5, 200)
    judged: dict[str, Figure] = {}
    rows: list[tuple[object, ...]] = []
    for backend in backends:
        for where, thread in (("worker (default)", True), ("loop", False)):
            number = requests if thread else requests // 10
            run = functools.partial(serve_and_train, step, data, phases, number, thread=thread)
            idle, training = run_on(backend, run)
            ratio = statistics.median(training) / statistics.median(idle)
            if thread:
                judged[backend] = Figure(ratio, min(training) / min(idle))
            quantiles = [percentile(taken, percent) for taken in (idle, training) for percent in (50, 99)]
            rows.append((f"{backend}, {where}", *quantiles, ratio))
    report.table(
        f"A TCP echo server during a torch step of {alone:.0f} ms: ms a request",
        ("", "idle p50", "idle p99", "training p50", "training p99", "ratio of p50"),
        rows,
    )
    report.claims.append(claim("request during a 20 ms torch step: by the idle median", 2, judged))


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


# Cancellation and the import.


async def wait_for_ever(engine: object, batch: object) -> None:
    await anyio.sleep_forever()


def plain_step(engine: object, batch: object) -> None:
    pass


def slow_step(engine: object, batch: object) -> None:
    time.sleep(0.02)


async def cancel_latency(step: Callable[[Any, Any], Any]) -> float:
    """Milliseconds from the cancellation until `run()` has ended."""
    engine: AnyEngine = Engine(step)
    cancelled_at = 0.0
    async with anyio.create_task_group() as group:

        async def cancel_soon() -> None:
            nonlocal cancelled_at
            await anyio.sleep(0.03)
            cancelled_at = time.perf_counter()
            group.cancel_scope.cancel()

        group.start_soon(cancel_soon)
        await engine.run(range(1_000_000), max_epochs=1_000)
    return (time.perf_counter() - cancelled_at) * 1e3


def cancel_group(report: Report, backends: list[str], *, fast: bool) -> None:
    """How soon a cancelled run has ended."""
    kinds: dict[str, Callable[[Any, Any], Any]] = {
        "step that waits for ever": wait_for_ever,
        "no-op steps on the worker": plain_step,
        "20 ms steps on the worker": slow_step,
    }
    rows: list[tuple[object, ...]] = []
    slow: dict[str, Figure] = {}
    for backend in backends:
        for kind, step in kinds.items():
            run = functools.partial(cancel_latency, step)
            taken = [run_on(backend, run) for _ in range(5 if fast else 21)]
            rows.append((f"{backend}, {kind}", statistics.median(taken), max(taken)))
            if step is slow_step:
                slow[backend] = Figure(statistics.median(taken), min(taken))
    report.table("From cancel to the end of run(): ms", ("", "median", "longest"), rows)
    report.claims.append(claim("cancelling a run of 20 ms steps: ms (at most one step)", 25, slow))


IMPORT = """
import sys, time
started = time.perf_counter()
{statement}
print((time.perf_counter() - started) * 1e3, int("torch" in sys.modules))
"""


def import_group(report: Report, *, fast: bool) -> None:
    """How long the import takes, and that it does not load torch."""
    rounds = 5 if fast else 21
    statements = ("import aengine", "from aengine import Engine, Events", "import anyio")
    taken: dict[str, list[float]] = {statement: [] for statement in statements}
    torch_loaded = 0
    with tempfile.TemporaryDirectory() as compiled:
        # With bytecode, as anything installed has it; the first round, not kept, writes it.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for turn in range(rounds + 1):
            for statement, times in taken.items():
                command = [sys.executable, "-c", IMPORT.format(statement=statement)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)  # noqa: S603
                milliseconds, torch_seen = done.stdout.split()
                torch_loaded += int(torch_seen)
                if turn:
                    times.append(float(milliseconds))
    figures = {statement: Figure(statistics.median(times), min(times)) for statement, times in taken.items()}
    report.table("Import in a fresh interpreter: ms", ("", "wall"), list(figures.items()))
    report.claims += [
        claim("import: ms", 50, {name: figures[name] for name in statements if "aengine" in name}),
        Claim("times torch was loaded", 0, torch_loaded),
    ]


def main() -> None:
    chosen = arguments(__doc__, GROUPS)
    fast: bool = chosen.fast
    backends = list(BACKENDS)
    if importlib.util.find_spec("uvloop") is None:
        backends.remove("uvloop")
    report = Report("embedding", {"fast": fast, "only": chosen.only})
    begin()
    groups: dict[str, Callable[[], None]] = {
        "import": lambda: import_group(report, fast=fast),
        "cancel": lambda: cancel_group(report, backends, fast=fast),
        "engines": lambda: engines_group(report, backends, fast=fast),
        "server": lambda: server_group(report, backends, fast=fast),
    }
    for name, run in groups.items():
        if name in chosen.only:
            run()
    report.finish(chosen.json)


if __name__ == "__main__":
    main()

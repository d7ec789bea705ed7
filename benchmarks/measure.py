"""What the benchmarks share: samples, interleaved rounds, claims and the report.

How a figure is made:

- A *sample* is one whole run of a subject over many iterations, timed from just before the loop starts until it has
  returned, and divided by the number of iterations. Starting the event loop is outside, starting and ending the run
  is inside. CPU is `time.process_time`, which counts every thread of the process and no other process: on a shared
  machine it varies less than wall time.
- The subjects that are compared are sampled in *rounds*, each once per round, in an order that is shuffled for each
  round (with a fixed seed), so that other load on the machine affects all of them alike.
- Differences and ratios are taken within a round, and their median over the rounds is the figure. The figure in
  brackets is taken from the smallest sample of each subject: what the code costs when nothing disturbs it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import anyio

T = TypeVar("T")

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}

VERSIONS_OF = ("torch", "anyio", "trio", "uvloop", "pytorch-ignite", "numpy", "scikit-learn")


def run_on(backend: str, function: Callable[[], Awaitable[T]]) -> T:
    """Run an async function on a fresh event loop of that kind, and return its result."""
    name, options = BACKENDS[backend]
    return anyio.run(function, backend=name, backend_options=options)


def in_fresh_process(function: Callable[[], T]) -> T:
    """Call a function in a new interpreter: for memory, which earlier work in the process would change."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(function).result()


def settle() -> None:
    """Collect the garbage of the sample before."""
    gc.collect()


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed run: µs an iteration."""

    cpu: float
    wall: float


class Stopwatch:
    """`with Stopwatch(iterations) as watch: ...`, then `watch.sample`."""

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations

    def __enter__(self) -> Self:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        scale = 1e6 / self._iterations
        self.sample = Sample(
            cpu=(time.process_time() - self._cpu) * scale,
            wall=(time.perf_counter() - self._wall) * scale,
        )


@dataclass(frozen=True, slots=True)
class Figure:
    """A median over rounds and, in brackets, the figure of the smallest samples."""

    median: float
    minimum: float

    def __str__(self) -> str:
        return f"{shown(self.median)} ({shown(self.minimum)})"


@dataclass(frozen=True, slots=True)
class Series:
    """The samples of one subject, round by round."""

    samples: tuple[Sample, ...]

    @property
    def cpu(self) -> Figure:
        values = [sample.cpu for sample in self.samples]
        return Figure(statistics.median(values), min(values))

    @property
    def wall(self) -> Figure:
        values = [sample.wall for sample in self.samples]
        return Figure(statistics.median(values), min(values))

    def cpu_over(self, other: Series) -> Figure:
        """CPU in excess of another subject's, within each round."""
        pairs = zip(self.samples, other.samples, strict=True)
        differences = [mine.cpu - theirs.cpu for mine, theirs in pairs]
        return Figure(statistics.median(differences), self.cpu.minimum - other.cpu.minimum)

    def cpu_ratio(self, other: Series) -> Figure:
        """CPU as a multiple of another subject's, within each round."""
        pairs = zip(self.samples, other.samples, strict=True)
        ratios = [mine.cpu / theirs.cpu for mine, theirs in pairs]
        return Figure(statistics.median(ratios), self.cpu.minimum / other.cpu.minimum)

    def wall_ratio(self, other: Series) -> Figure:
        """Wall time as a multiple of another subject's, within each round."""
        pairs = zip(self.samples, other.samples, strict=True)
        ratios = [mine.wall / theirs.wall for mine, theirs in pairs]
        return Figure(statistics.median(ratios), self.wall.minimum / other.wall.minimum)


def times_less(ours: Series, theirs: Series, bare: Series) -> Figure:
    """How many times less the loop of `ours` costs than that of `theirs`, each above the bare loop.

    A median difference that is nothing at all has no ratio: the smallest step of the clock stands in for it.
    """
    rounds = zip(ours.samples, theirs.samples, bare.samples, strict=True)
    ratios = [(t.cpu - b.cpu) / max(o.cpu - b.cpu, 1e-3) for o, t, b in rounds]
    smallest = max(ours.cpu.minimum - bare.cpu.minimum, 1e-3)
    return Figure(statistics.median(ratios), (theirs.cpu.minimum - bare.cpu.minimum) / smallest)


@dataclass(frozen=True, slots=True)
class Subject:
    """Something to sample: `take(iterations)` runs it once.

    The number of iterations is the `most`, or fewer where a sample of that many would take longer than the time
    given to a sample.
    """

    take: Callable[[int], Sample]
    most: int = 200_000
    least: int = 500

    def iterations_for(self, seconds: float) -> int:
        if self.most <= self.least:
            return self.least
        cost = self.take(self.least).wall
        if cost * self.most > seconds * 1e6:
            # The first run met cold code and paid for the whole of starting; ask again before cutting down.
            cost = self.take(self.least * 4).wall
        return max(self.least, min(self.most, int(seconds * 1e6 / cost)))


def interleave(subjects: Mapping[str, Subject], *, rounds: int, seconds: float) -> dict[str, Series]:
    """Sample every subject once per round, in an order shuffled per round; also a warm-up for each."""
    iterations = {name: subject.iterations_for(seconds) for name, subject in subjects.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in subjects}
    order = list(subjects)
    shuffle = random.Random(0).shuffle  # noqa: S311 - an order of measuring, not a secret
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            settle()
            samples[name].append(subjects[name].take(iterations[name]))
    return {name: Series(tuple(taken)) for name, taken in samples.items()}


@dataclass(frozen=True, slots=True)
class Claim:
    """A promise of the project, with the figure measured."""

    text: str
    limit: float
    seen: float
    where: str = ""
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.seen >= self.limit if self.at_least else self.seen <= self.limit


def worst(figures: Mapping[str, Figure], *, at_least: bool = False) -> tuple[str, float]:
    """The name and median of the figure furthest on the wrong side."""
    pick = min if at_least else max
    name = pick(figures, key=lambda key: figures[key].median)
    return name, figures[name].median


def claim(text: str, limit: float, figures: Mapping[str, Figure], *, at_least: bool = False) -> Claim:
    """A promise that must hold for each of the figures: the worst one decides."""
    where, seen = worst(figures, at_least=at_least)
    return Claim(text, limit, seen, where if len(figures) > 1 else "", at_least)


@dataclass(slots=True)
class Report:
    """The measurements: printed at once, written as JSON at the end."""

    title: str
    settings: dict[str, object]
    figures: list[dict[str, object]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def table(self, heading: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print rows under a heading, and keep them."""
        kept = [list(row) for row in rows]
        print(f"\n{heading}", flush=True)
        print_table(columns, [[shown(cell) for cell in row] for row in kept])
        names = [column or "subject" for column in columns]
        for row in kept:
            figure: dict[str, object] = {"table": heading}
            for name, cell in zip(names, row, strict=True):
                figure[name] = asdict(cell) if isinstance(cell, Figure) else cell
            self.figures.append(figure)

    def finish(self, json_path: Path | None) -> None:
        """Print each claim with the figure measured, and write everything as JSON."""
        print("\nClaims")
        rows = [
            [
                "holds" if each.holds else "MISSES",
                each.text,
                f"{'>=' if each.at_least else '<='} {shown(each.limit)}",
                shown(each.seen),
                each.where,
            ]
            for each in self.claims
        ]
        print_table(["", "claim", "limit", "seen", "worst of several"], rows)
        if json_path is None:
            return
        document = {
            "title": self.title,
            "environment": environment(),
            "settings": self.settings,
            "figures": self.figures,
            "claims": [{**asdict(each), "holds": each.holds} for each in self.claims],
        }
        json_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten to {json_path}")


def arguments(description: str | None, groups: Sequence[str]) -> argparse.Namespace:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--fast", action="store_true", help="fewer and shorter: for CI")
    parser.add_argument("--only", nargs="+", choices=groups, default=list(groups))
    return parser.parse_args()


def environment() -> dict[str, object]:
    """The versions and the machine that the figures were measured with."""
    versions: dict[str, object] = {"python": sys.version.split()[0], "machine": platform.platform()}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {**versions, "cpu_count": os.cpu_count(), "load average": round(os.getloadavg()[0], 1)}


def begin() -> None:
    """Print the environment; exclude what was imported from garbage collection."""
    gc.collect()
    gc.freeze()
    print(", ".join(f"{name} {value}" for name, value in environment().items()))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip(), flush=True)


def shown(value: object) -> str:
    """A number, with only its significant digits."""
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"

"""Trackers under random runs: whatever happens, each record is written once, in order, and each end is reported."""

import random
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import anyio
import pytest
from support.record import AnyEngine, Boom

from aengine import DataExhausted, Engine, Events, StopReason
from aengine.loggers import Record, Tracker, retry

SEEDS = 15
"""In the short form, and on each event loop."""

EVENTS: list[Any] = [
    Events.ITERATION_COMPLETED,
    Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_COMPLETED,
    Events.STARTED | Events.COMPLETED,
    Events.EPOCH_STARTED | Events.EPOCH_COMPLETED | Events.TERMINATE,
    Events.ITERATION_STARTED | Events.EXCEPTION_RAISED | Events.CANCELLED,
    "mine",
    Events.ITERATION_COMPLETED | "mine",
]


class Moody:
    """A sink that is slow now and then, and fails before it has written anything."""

    def __init__(self, rng: random.Random) -> None:
        self.reports: list[str] = []
        self.written: list[int] = []
        self._rng = rng
        self._failing = rng.choice([0.0, 0.0, 0.3])
        self._slow = rng.choice([0.0, 0.3])

    def _take(self, records: Sequence[Record]) -> None:
        if self._rng.random() < self._failing:
            raise Boom
        self.written += [int(record.values["number"]) for record in records]
        self.reports.append("write")

    def run_started(self, engine_name: str, time: float) -> None:
        self.reports.append("begin")

    def run_ended(self, engine_name: str, time: float, reason: StopReason) -> None:
        self.reports.append(f"end: {reason}")

    def be_well(self) -> None:
        self._failing = self._slow = 0.0


class MoodyThread(Moody):
    def write(self, records: Sequence[Record]) -> None:
        if self._rng.random() < self._slow:
            time.sleep(1e-3)
        self._take(records)

    def close(self) -> None:
        self.reports.append("close")


class MoodyTask(Moody):
    async def write(self, records: Sequence[Record]) -> None:
        if self._rng.random() < self._slow:
            await anyio.sleep(1e-3)
        self._take(records)

    async def close(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.reports.append("close")


class Tracked:
    """A sink with its tracker, and the numbers of the records that were taken for it."""

    def __init__(self, rng: random.Random, engine: AnyEngine) -> None:
        self.sink: Moody = rng.choice([MoodyThread, MoodyTask])(rng)
        self.taken = 0
        self.tracker: Tracker = Tracker(
            self.sink,  # type: ignore[arg-type]  # it is one of two that have the methods
            values=self._values,
            buffer=rng.choice([2, 10_000]),
            shutdown_timeout=20.0,
        )
        self._handle = self.tracker.attach(engine, rng.choice(EVENTS))
        self.is_removed = False

    def remove(self) -> None:
        """Remove the tracker, during a run."""
        self.is_removed = True
        self._handle.remove()

    def _values(self, _: AnyEngine) -> dict[str, int]:
        self.taken += 1
        return {"number": self.taken}

    def check(self, reason: StopReason | None) -> None:
        """Check what holds between two runs."""
        now, reports = self.tracker.statistics(), self.sink.reports
        assert now.taken == now.written + now.dropped + now.waiting
        assert now.taken == self.taken or (self.is_removed and now.taken == self.taken - 1)  # in the midst of an event
        assert len(self.sink.written) == now.written
        assert self.sink.written == sorted(set(self.sink.written))
        marks = [one.partition(":")[0] for one in reports if not one.startswith(("write", "close"))]
        assert marks == ["begin", "end"] * (len(marks) // 2) + ["begin"] * (len(marks) % 2)
        if self.is_removed:
            assert marks == ["begin", "end"] * (len(marks) // 2)
        if reports and (self.is_removed or reason is not StopReason.INTERRUPTED):
            assert not now.waiting
            assert reports[-1] == "close"
        if reports and not self.is_removed and reason is not StopReason.INTERRUPTED:
            assert [one for one in reports if one.startswith("end")][-1] == f"end: {reason}"

    def check_all(self) -> None:
        now = self.tracker.statistics()
        assert (now.written + now.dropped, now.waiting) == (now.taken, 0)


class Trouble:
    """What is done to an engine at random, by its step, by an inline handler, and from beside."""

    def __init__(self, rng: random.Random, engine: AnyEngine) -> None:
        self._rng = rng
        self._engine = engine
        self.removable: list[Tracked] = []
        self._odds = rng.choice([0.0, 0.1, 0.4])
        self.scope: anyio.CancelScope | None = None

    def be_over(self) -> None:
        self._odds = 0.0

    def strike(self) -> None:
        if self._rng.random() < self._odds:
            engine = self._engine
            ends = [engine.terminate, engine.terminate_epoch, engine.interrupt, self._raise]
            self._rng.choice([*ends, self._remove, *[self._fire] * 8])()

    async def strike_async(self) -> None:
        if self._rng.random() < self._odds:
            await self._engine.flush()
        if self._rng.random() < self._odds:
            await self._engine.emit("mine")
        if self._rng.random() < self._odds / 4 and self.scope is not None:
            self.scope.cancel()
        if self._rng.random() < self._odds / 4:
            self._remove()

    async def beside(self) -> None:
        while self._odds:
            with suppress(RuntimeError):  # no run is under way, and something waits for the next one
                await self._engine.flush()
            await anyio.sleep(1e-3)

    async def run(self, data: Sequence[int], max_epochs: int) -> None:
        with anyio.CancelScope() as self.scope, suppress(Boom, DataExhausted):
            if self._engine.state.stop_reason is StopReason.INTERRUPTED:
                await self._engine.run()
            else:
                self._engine.state.max_epochs = None
                await self._engine.run(lambda: iter(data), max_epochs=max_epochs)

    def _fire(self) -> None:
        self._engine.fire_event("mine")

    def _remove(self) -> None:
        if self.removable:
            self.removable.pop().remove()

    def _raise(self) -> None:
        raise Boom


def engine_of(rng: random.Random) -> tuple[AnyEngine, Trouble]:
    is_async, thread = rng.choice([(True, True), (False, True), (False, False)])

    async def async_step(engine: AnyEngine, batch: int) -> None:
        trouble.strike()
        if rng.random() < 0.2:
            await anyio.lowlevel.checkpoint()

    def step(engine: AnyEngine, batch: int) -> None:
        trouble.strike()
        if rng.random() < 0.1:
            time.sleep(1e-3)

    engine: AnyEngine = Engine(async_step if is_async else step, thread=thread)
    engine.register_events("mine")
    trouble = Trouble(rng, engine)
    engine.add_event_handler(rng.choice([Events.EPOCH_COMPLETED, Events.COMPLETED]), trouble.strike_async)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=rng.randint(1, 9)), trouble.strike_async)
    return engine, trouble


async def run_at_random(seed: int) -> None:
    rng = random.Random(seed)
    engine, trouble = engine_of(rng)
    tracked = [Tracked(rng, engine) for _ in range(rng.randint(1, 4))]
    trouble.removable = tracked[:2]

    async def run(length: int) -> None:
        await trouble.run(range(length), max_epochs=rng.randint(1, 3))
        for one in tracked:
            one.check(engine.state.stop_reason)

    async with anyio.create_task_group() as group:
        group.start_soon(trouble.beside)
        for _ in range(rng.randint(1, 4)):
            await run(rng.choice([0, 1, 3, 20]))
        trouble.be_over()
    for one in tracked:
        one.sink.be_well()
    while engine.state.stop_reason is StopReason.INTERRUPTED:
        await run(3)
    await run(3)
    for one in tracked:
        one.check_all()
    assert len(engine.statistics().services) == sum(not one.is_removed for one in tracked)


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 1e-4)
    monkeypatch.setattr(retry, "_LONGEST_PAUSE", 1e-3)


async def test_nothing_is_lost_written_twice_or_never_reported() -> None:
    for seed in range(SEEDS):
        with anyio.fail_after(60):
            await run_at_random(seed)


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(10))
async def test_nothing_is_lost_in_a_thousand_runs(hundred: int) -> None:
    for seed in range(100 * hundred, 100 * hundred + 100):
        with anyio.fail_after(60):
            await run_at_random(seed)

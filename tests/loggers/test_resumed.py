"""Logs of runs that are resumed: no step is there twice, and none that a committed checkpoint covers is missing."""

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import pytest
import torch
from support.record import Boom
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint, CheckpointEvents, Keep
from aengine.events import EventLike
from aengine.loggers import JSONLines, Record, TensorBoard, Tracker

AnyEngine: TypeAlias = Engine[Any, Any]

BOTH = Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


class Training:
    """A training whose steps fail where it is told to, with an evaluator that writes to the same file."""

    def __init__(self, folder: Path, events: EventLike = BOTH, *, saves_at: EventLike, fails_at: int = 0) -> None:
        self.path = folder / "log.jsonl"
        self.model = torch.nn.Linear(1, 1)
        with torch.no_grad():
            self.model.weight.fill_(1.0)
        self.fails_at = fails_at
        self.engine: AnyEngine = Engine(self.step, name="trainer")
        self.evaluator: AnyEngine = Engine(lambda engine, batch: float(batch), name="evaluator")
        self.sink = JSONLines(self.path)
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, self.evaluate)
        Tracker(self.sink).attach(self.engine, events)
        at_step = self.engine.state
        Tracker(self.sink, step=lambda _: at_step.iteration).attach(self.evaluator, Events.COMPLETED)
        self.checkpoint = Checkpoint(folder / "checkpoints", {"model": self.model}, keep=Keep(every_n=1))
        self.checkpoint.attach(self.engine, saves_at)

    def step(self, engine: AnyEngine, batch: int) -> float:
        if engine.state.iteration == self.fails_at:
            raise Boom
        with torch.no_grad():
            self.model.weight.mul_(0.9).add_(batch)
        return self.model.weight.item()

    async def evaluate(self) -> None:
        await self.evaluator.run([self.model.weight.item()])

    async def run(self, which: Any = "latest") -> list[dict[str, Any]]:
        async with self.checkpoint:
            if await self.checkpoint.restore(which) is None:
                await self.checkpoint.save()  # so that also what comes before the first save is gone over
            await self.engine.run(range(5), max_epochs=4)
        return without_times(lines_of(self.path))


def by_engine(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [line for line in lines if line["engine"] == name] for name in ("trainer", "evaluator")}


@pytest.mark.parametrize("fails_at", [6, 11, *(pytest.param(step, marks=pytest.mark.slow) for step in (5, 10, 16, 20))])
@pytest.mark.parametrize(
    "saves_at",
    [Events.ITERATION_COMPLETED(every=4), Events.ITERATION_COMPLETED(every=5), Events.EPOCH_COMPLETED],
    ids=["in epochs", "before ends of epochs", "at ends of epochs"],
)
async def test_log_of_a_resumed_run_is_that_of_one_that_was_never_stopped(
    fails_at: int, saves_at: EventLike, tmp_path: Path
) -> None:
    whole = Training(tmp_path / "whole", saves_at=saves_at)
    expected = await whole.run()
    assert len(expected) == 20 + 4 + 4
    failing = Training(tmp_path / "again", saves_at=saves_at, fails_at=fails_at)
    with pytest.raises(Boom):
        await failing.run()
    resumed = Training(tmp_path / "again", saves_at=saves_at)
    assert by_engine(await resumed.run()) == by_engine(expected)
    assert resumed.model.weight.equal(whole.model.weight)
    assert resumed.path.read_bytes().endswith(b"}\n")


async def test_what_is_gone_over_is_kept_beside_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Training(tmp_path, saves_at=Events.ITERATION_COMPLETED(every=4), fails_at=15)
    with pytest.raises(Boom):
        await first.run()
    before = first.path.read_text().splitlines()
    with caplog.at_level(logging.INFO, "aengine.loggers"):
        await Training(tmp_path, saves_at=Events.ITERATION_COMPLETED(every=4)).run(8)
    aside = tmp_path / "log.jsonl.gone-over"
    assert set(before) <= {*aside.read_text().splitlines(), *first.path.read_text().splitlines()}
    assert {line["step"] for line in lines_of(aside)} == set(range(9, 15))
    assert "were moved to" in caplog.text


async def test_lines_of_others_and_of_the_user_stay(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    training = Training(tmp_path, Events.ITERATION_COMPLETED, saves_at=Events.ITERATION_COMPLETED(every=4), fails_at=10)
    with pytest.raises(Boom):
        await training.run()
    earlier = path.read_text()
    independent = json.dumps({"step": 7, "epoch": 1, "time": 0.5, "event": "X", "engine": "other", "values": {}})
    former = earlier.replace('"step": 1,', '"step": 100,')  # of a training before, which got further
    path.write_text(former + earlier + independent + '\n{"note": "mine"}\n')
    await Training(tmp_path, Events.ITERATION_COMPLETED, saves_at=Events.ITERATION_COMPLETED(every=4)).run()
    text = path.read_text()
    assert text.startswith(former)
    assert independent in text
    assert '{"note": "mine"}\n' in text
    rest = [json.loads(line) for line in text.removeprefix(former).splitlines()]
    assert [line["step"] for line in rest if line.get("engine") == "trainer"] == list(range(1, 21))


@pytest.mark.parametrize("events", [Events.ITERATION_COMPLETED(every=3), Events.EPOCH_COMPLETED, Events.EPOCH_STARTED])
async def test_sparse_lines_are_there_once(events: EventLike, tmp_path: Path) -> None:
    saves_at = Events.ITERATION_COMPLETED(every=7)
    expected = await Training(tmp_path / "whole", events, saves_at=saves_at).run()
    for fails_at in (13, 19):
        folder = tmp_path / str(fails_at)
        with pytest.raises(Boom):
            await Training(folder, events, saves_at=saves_at, fails_at=fails_at).run()
        lines = by_engine(await Training(folder, events, saves_at=saves_at).run())
        if events != Events.EPOCH_STARTED:  # it is fired for the rest of the epoch, too
            assert lines["trainer"] == by_engine(expected)["trainer"]
        keys = [(line["step"], line["event"]) for line in lines["trainer"]]
        assert len(set(keys)) == len(keys)


async def test_run_that_begins_anew_appends(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: float(batch), name="trainer")
    Tracker(JSONLines(tmp_path / "log.jsonl")).attach(engine, Events.ITERATION_COMPLETED)
    for _ in range(2):
        await engine.run(range(3))
    assert [line["step"] for line in lines_of(tmp_path / "log.jsonl")] == [1, 2, 3] * 2


@pytest.mark.parametrize("is_async", [True, False])
async def test_sink_of_ones_own_is_notified_of_what_stands(*, is_async: bool) -> None:
    calls: list[Any] = []

    class Plain:
        def run_went_back(self, engine_name: str, standing: Any) -> None:
            calls.append((engine_name, dict(standing)))

        def write(self, records: Sequence[Record]) -> None:
            calls.extend(record.step for record in records)

    class Async(Plain):
        async def write(self, records: Sequence[Record]) -> None:  # type: ignore[override]
            super().write(records)

    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    await engine.run(range(4), max_iters=3)
    saved = engine.state_dict() | {"max_iters": 6}
    engine.load_state_dict(saved)
    Tracker(Async() if is_async else Plain(), step=lambda engine: 10 * engine.state.iteration).attach(engine, BOTH)
    await engine.run(range(4))
    await engine.run(range(4), max_iters=7)  # in memory nothing is gone over
    standing = {"ITERATION_COMPLETED": 30, "EPOCH_COMPLETED": 29}
    assert calls == [("trainer", standing), 40, 40, 50, 60, 70]


async def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    for fails_at in (9, 0):

        def step(engine: AnyEngine, batch: int, fails_at: int = fails_at) -> float:
            if engine.state.iteration == fails_at:
                raise Boom
            return float(engine.state.iteration + (100 if fails_at else 0))

        engine: AnyEngine = Engine(step, name="trainer")
        Tracker(TensorBoard(tmp_path / "board")).attach(engine, Events.ITERATION_COMPLETED)
        async with Checkpoint(tmp_path / "checkpoints", {}) as checkpoint:
            checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=6))
            await checkpoint.restore()
            if fails_at:
                with pytest.raises(Boom):
                    await engine.run(range(12))
            else:
                await engine.run(range(12))
    accumulator = EventAccumulator(str(tmp_path / "board"))
    accumulator.Reload()
    shown = [(one.step, one.value) for one in accumulator.Scalars("trainer/output")]
    assert shown == [(step, step + 100.0 if step <= 6 else step) for step in range(1, 13)]


# What a checkpoint covers is on the disk before it


@pytest.mark.parametrize("write_in", ["thread", pytest.param("process", marks=pytest.mark.slow)])
@pytest.mark.parametrize("saves_at", [Events.ITERATION_COMPLETED(every=4), Events.EPOCH_COMPLETED])
async def test_lines_of_what_a_checkpoint_covers_are_written_before_it(
    write_in: Any, saves_at: EventLike, tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    engine: AnyEngine = Engine(lambda engine, batch: float(batch), name="trainer")
    Tracker(JSONLines(path)).attach(engine, Events.ITERATION_COMPLETED)
    covered: list[int] = []
    async with Checkpoint(tmp_path / "checkpoints", {}, write_in=write_in) as checkpoint:
        checkpoint.attach(engine, saves_at)

        @engine.subscribe(CheckpointEvents.CHECKPOINT_COMMITTED)
        async def look(event: Any) -> None:
            covered.append(event.payload.checkpoint.step)
            assert [line["step"] for line in lines_of(path)][: covered[-1]] == list(range(1, covered[-1] + 1))

        await engine.run(range(10), max_epochs=2)
    assert covered == ([4, 8, 12, 16, 20] if saves_at != Events.EPOCH_COMPLETED else [10, 20])


async def test_sink_that_hangs_does_not_keep_a_checkpoint_from_being_committed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    released = anyio.Event()

    async def hang(records: Sequence[Record]) -> None:
        await released.wait()

    engine: AnyEngine = Engine(lambda engine, batch: float(batch), name="trainer")
    Tracker(hang, shutdown_timeout=0.05).attach(engine, Events.ITERATION_COMPLETED)
    async with Checkpoint(tmp_path, {}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(once=2))
        engine.subscribe(CheckpointEvents.CHECKPOINT_COMMITTED, lambda event: engine.terminate())

        def endless() -> Any:
            while True:
                yield 1

        await engine.run(endless, epoch_length=1 << 40)
        assert [info.step for info in checkpoint.list()] == [2]
    assert "a checkpoint is committed before all records of its steps are written" in caplog.text


async def test_run_that_is_cancelled_while_a_commit_waits_ends(tmp_path: Path) -> None:
    is_writing = anyio.Event()

    async def hang(records: Sequence[Record]) -> None:
        is_writing.set()
        await anyio.sleep_forever()

    engine: AnyEngine = Engine(lambda engine, batch: float(batch), name="trainer", grace=0.1)
    Tracker(hang, shutdown_timeout=0.02).attach(engine, Events.ITERATION_COMPLETED)
    async with Checkpoint(tmp_path, {}) as checkpoint, anyio.create_task_group() as group:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=3))
        group.start_soon(engine.run, [1] * 1_000_000)
        await is_writing.wait()
        group.cancel_scope.cancel()
    assert not engine.is_running


CAMPAIGN = """
import os, random, signal, sys, threading, time
import anyio, torch
from pathlib import Path
from aengine import Engine, Events
from aengine.checkpoint import Checkpoint
from aengine.loggers import JSONLines, Tracker

async def main(folder, dies_after):
    model = torch.nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
    def step(engine, batch):
        time.sleep(0.002)
        with torch.no_grad():
            model.weight.mul_(0.9).add_(batch)
        return model.weight.item()
    engine = Engine(step, name="trainer")
    Tracker(JSONLines(folder / "log.jsonl")).attach(engine, Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED)
    async with Checkpoint(folder / "checkpoints", {"model": model}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=7))
        restored = await checkpoint.restore()
        if restored is None:
            await checkpoint.save()
        if dies_after:
            threading.Timer(dies_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        await engine.run(range(20), max_epochs=20)
    print(model.weight.item())
    os._exit(0)

anyio.run(main, Path(sys.argv[1]), float(sys.argv[2]))
"""


@pytest.mark.campaign
@pytest.mark.slow
def test_log_of_a_run_that_is_killed_again_and_again_is_that_of_one_that_was_not(tmp_path: Path) -> None:
    def train(folder: Path, dies_after: float) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CAMPAIGN, str(folder), str(dies_after)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)

    whole = train(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    chance = random.Random(5)
    kills = 0
    while (done := train(tmp_path / "again", chance.uniform(0.05, 0.25))).returncode < 0:
        kills += 1
        lines = lines_of(tmp_path / "again" / "log.jsonl") if (tmp_path / "again" / "log.jsonl").exists() else []
        assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert done.returncode == 0, done.stderr
    assert kills > 2
    assert done.stdout == whole.stdout
    logs = [without_times(lines_of(tmp_path / folder / "log.jsonl")) for folder in ("whole", "again")]
    assert logs[0] == logs[1]

"""Weights & Biases: what its own process has written to the file of an offline run, record by record."""

import json
import logging
import math
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import anyio
import pytest
import wandb
from support.record import Boom
from wandb.proto.wandb_internal_pb2 import Record as RecentRecords  # type: ignore[attr-defined]  # chosen at import

from aengine import Engine, Events, StopReason
from aengine.checkpoint import Checkpoint
from aengine.loggers import Record, Tracker, WandB

AnyEngine: TypeAlias = Engine[Any, Any]

PatientTracker = partial(Tracker, shutdown_timeout=25.0)  # on a busy machine it takes seconds to begin

_BLOCK, _HEADER = 1 << 15, 7


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    wandb.teardown()  # it has read the variables of an earlier test


def record(step: int, **values: float) -> Record:
    return Record(step, 1, 1000.5 + step, "ITERATION_COMPLETED", "trainer", values)


def files_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))


def written_in(directory: Path) -> list[Any]:
    """Return W&B's records of all runs in this folder, in LevelDB's log format: this wandb has no reader in Python."""
    wandb.teardown()  # waits for W&B's process, which writes on after `finish()`
    return [one for path in files_in(directory) for one in records_of(path.read_bytes())]


def records_of(data: bytes) -> Iterator[Any]:
    at, whole = _HEADER, b""
    while at < len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left  # what is left of a block that holds no header
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield RecentRecords.FromString(whole)
            whole = b""


def rows(directory: Path, engine: str = "trainer") -> list[dict[str, Any]]:
    """Return the rows of one engine, its name removed."""
    found = []
    for one in written_in(directory):
        if one.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in one.history.item}
            if f"{engine}/step" in row:
                found.append({key.removeprefix(f"{engine}/"): value for key, value in row.items()})
    return found


def values(directory: Path, name: str, engine: str = "trainer") -> list[tuple[int, Any]]:
    return [(row["step"], row[name]) for row in rows(directory, engine) if name in row]


def exit_codes(directory: Path) -> list[int]:
    found = [one for one in written_in(directory) if one.WhichOneof("record_type") == "exit"]
    return [one.exit.exit_code for one in found]


def ids(directory: Path) -> list[str]:
    return [path.stem.removeprefix("run-") for path in files_in(directory)]


# What is written


async def test_a_run_becomes_rows(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: {"loss": batch / 2, "accuracy": batch}, name="trainer")
    times: list[float] = []

    class Noting(WandB):
        def write(self, records: Sequence[Record]) -> None:
            times.extend(one.time for one in records)
            super().write(records)

    sink = Noting("digits", name="first", config={"lr": 0.1}, directory=tmp_path / "there")
    PatientTracker(sink).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2], max_epochs=2)
    found = rows(tmp_path / "there")
    assert [(row["step"], row["loss"], row["accuracy"]) for row in found] == [
        (1, 0.5, 1),
        (2, 1.0, 2),
        (3, 0.5, 1),
        (4, 1.0, 2),
    ]
    assert [row["_timestamp"] for row in found] == pytest.approx(times, abs=0.001)
    (run,) = [one.run for one in written_in(tmp_path / "there") if one.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, run.run_id) == ("digits", "first", sink.run_id)
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["lr"] == 0.1
    assert exit_codes(tmp_path / "there") == [0]


def test_each_engine_has_a_step_of_its_own(tmp_path: Path) -> None:
    sink = WandB()
    sink.write([record(step, loss=step) for step in range(5, 8)])
    sink.write([Record(1, 1, 1000.0, "COMPLETED", "evalu*tor", {"step": 3})])
    sink.close()
    defined = [one.metric for one in written_in(tmp_path) if one.WhichOneof("record_type") == "metric"]
    assert {(one.glob_name, one.step_metric) for one in defined if one.glob_name} == {
        ("trainer/*", "trainer/step"),
        ("evalu_tor/*", "evalu_tor/step"),
    }
    assert values(tmp_path, "loss") == [(5, 5), (6, 6), (7, 7)]
    assert values(tmp_path, "step_", "evalu_tor") == [(1, 3)]


def test_what_is_no_number_is_written_as_such(tmp_path: Path) -> None:
    sink = WandB()
    sink.write([record(1, a=math.nan, b=math.inf, c=-math.inf, d=True, e=10**20, f=1e-300)])
    sink.close()
    (row,) = rows(tmp_path)
    assert math.isnan(float(row["a"]))
    assert (float(row["b"]), float(row["c"])) == (math.inf, -math.inf)
    assert (row["d"], row["e"], row["f"]) == (True, 10**20, 1e-300)


async def test_a_long_run_is_there_to_the_last_row(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    PatientTracker(WandB(), shutdown_timeout=25).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run(range(5000))
    assert values(tmp_path, "output") == [(step, step - 1) for step in range(1, 5001)]


async def test_it_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    PatientTracker(WandB()).attach(engine)
    await engine.run([1])
    assert capfd.readouterr() == ("", "")


async def test_wandb_is_called_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, init, finish = [], wandb.init, wandb.Run.finish

    def noted_init(*given: Any, **named: Any) -> Any:
        threads.append(threading.current_thread())
        return init(*given, **named)

    def noted_finish(self: wandb.Run, *given: Any, **named: Any) -> None:
        threads.append(threading.current_thread())
        finish(self, *given, **named)

    monkeypatch.setattr(wandb, "init", noted_init)
    monkeypatch.setattr(wandb.Run, "finish", noted_finish)
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    PatientTracker(WandB()).attach(engine)
    await engine.run([1])
    assert len(threads) == 2
    assert threading.current_thread() not in threads
    assert wandb.run is None


# Ends


@pytest.mark.parametrize("fails_at", [1, 3])
async def test_a_run_that_raises_has_failed_even_before_its_first_record(tmp_path: Path, fails_at: int) -> None:
    def fail(engine: AnyEngine, batch: int) -> int:
        if batch == fails_at:
            raise Boom
        return batch

    engine = Engine(fail, name="trainer")
    PatientTracker(WandB()).attach(engine, Events.ITERATION_COMPLETED)
    with pytest.raises(Boom):
        await engine.run([1, 2, 3, 4])
    assert exit_codes(tmp_path) == [1]
    assert values(tmp_path, "output") == [(step, step) for step in range(1, fails_at)]


async def test_a_run_that_is_cancelled_has_failed(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    PatientTracker(WandB()).attach(engine, Events.STARTED)
    with anyio.CancelScope() as scope:

        @engine.on(Events.ITERATION_COMPLETED(once=5))
        async def cancel() -> None:
            scope.cancel()

        await engine.run(iter(int, 1), epoch_length=10**9)
    assert exit_codes(tmp_path) == [1]


async def test_a_run_that_is_interrupted_is_finished_when_it_has_gone_on(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    PatientTracker(WandB()).attach(engine, Events.ITERATION_COMPLETED)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    await engine.run([1, 2, 3])
    await engine.run()
    assert exit_codes(tmp_path) == [0]  # finished once, in one folder
    assert len(files_in(tmp_path)) == 1
    assert values(tmp_path, "output") == [(1, 1), (2, 2), (3, 3)]


async def test_two_runs_in_a_row_have_one_id(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    sink = WandB()
    PatientTracker(sink).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2])
    await engine.run([1, 2], max_epochs=2)
    assert ids(tmp_path) == [sink.run_id] * 2
    assert values(tmp_path, "output") == [(1, 1), (2, 2), (3, 1), (4, 2)]


def test_what_is_written_after_the_end_does_not_replace_what_was_before_it(tmp_path: Path) -> None:
    sink = WandB()
    for step in range(1, 4):
        sink.write([record(step, loss=step)])
        sink.close()
    assert ids(tmp_path) == [sink.run_id] * 3
    assert values(tmp_path, "loss") == [(1, 1), (2, 2), (3, 3)]


async def test_a_trainer_and_its_evaluator_share_a_run_that_ends_as_the_trainer_did(tmp_path: Path) -> None:
    def step(engine: AnyEngine, batch: int) -> int:
        if engine.state.iteration == 5:
            raise Boom
        return batch

    sink = WandB()
    trainer: AnyEngine = Engine(step, name="trainer")
    evaluator: AnyEngine = Engine(lambda engine, batch: batch * 10, name="evaluator")
    PatientTracker(sink).attach(trainer, Events.ITERATION_COMPLETED)
    PatientTracker(sink, step=lambda _: trainer.state.iteration).attach(evaluator, Events.COMPLETED)

    @trainer.on(Events.EPOCH_COMPLETED)
    async def evaluate() -> None:
        await evaluator.run([1, 2, 3])

    with pytest.raises(Boom):
        await trainer.run([1, 2], max_epochs=3)
    assert values(tmp_path, "output") == [(1, 1), (2, 2), (3, 1), (4, 2)]
    assert values(tmp_path, "output", "evaluator") == [(2, 30), (4, 30)]
    assert (ids(tmp_path), exit_codes(tmp_path)) == ([sink.run_id], [1])


async def test_a_run_of_ones_own_is_written_into_and_never_finished(tmp_path: Path) -> None:
    run = wandb.init(settings=wandb.Settings(silent=True, console="off"))
    try:
        engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
        PatientTracker(WandB(run=run)).attach(engine, Events.ITERATION_COMPLETED)
        await engine.run([1, 2])
        run.log({"mine": 1})  # fails where it is finished
    finally:
        run.finish()
    assert values(tmp_path, "output") == [(1, 1), (2, 2)]
    assert ids(tmp_path) == [run.id]


async def test_a_run_of_ones_own_that_is_finished_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    run = wandb.init(settings=wandb.Settings(silent=True, console="off"))
    run.finish()
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    tracker = PatientTracker(WandB(run=run), shutdown_timeout=0.1)
    tracker.attach(engine)
    await engine.run([1, 2])
    assert tracker.statistics().written == 0
    warned = [
        one.getMessage() for one in caplog.records if one.name == "aengine.loggers" and one.levelno >= logging.WARNING
    ]
    assert ["failed" in one for one in warned] == [True, False]


async def test_the_applications_own_run_is_left_alone(tmp_path: Path) -> None:
    own = wandb.init(settings=wandb.Settings(silent=True, console="off"))
    try:
        engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
        sink = WandB()
        PatientTracker(sink).attach(engine, Events.ITERATION_COMPLETED)
        await engine.run([1, 2])
        assert wandb.run is own
        own.log({"mine": 1})
    finally:
        own.finish()
    assert sorted(ids(tmp_path)) == sorted([own.id, sink.run_id])


# Resuming


async def test_a_checkpoint_has_it_go_on_in_the_same_run(tmp_path: Path) -> None:
    async def train(epochs: int) -> WandB:
        engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
        sink = WandB(directory=tmp_path / str(epochs))
        PatientTracker(sink).attach(engine, Events.EPOCH_COMPLETED)
        async with Checkpoint(tmp_path / "checkpoints", {"wandb": sink}) as checkpoint:
            checkpoint.attach(engine, Events.EPOCH_COMPLETED)
            await checkpoint.restore()
            await engine.run([1, 2], max_epochs=epochs)
        return sink

    first, second = await train(1), await train(3)
    assert first.run_id == second.run_id
    assert (ids(tmp_path / "1"), ids(tmp_path / "3")) == ([first.run_id], [first.run_id])
    assert values(tmp_path / "3", "output") == [(4, 2), (6, 2)]


def test_a_state_cannot_be_loaded_into_a_run_that_is_under_way() -> None:
    sink = WandB()
    sink.write([record(1, loss=1)])
    with pytest.raises(RuntimeError, match="before the first record"):
        sink.load_state_dict({"run_id": "another"})
    sink.close()


def test_what_was_written_before_a_failure_is_not_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, calls = wandb.Run.log, []

    def fail_once(self: wandb.Run, *given: Any, **named: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionError
        log(self, *given, **named)

    monkeypatch.setattr(wandb.Run, "log", fail_once)
    sink = WandB()
    records = [record(step, loss=step) for step in range(1, 5)]
    with pytest.raises(ConnectionError):
        sink.write(records)
    sink.write(records)
    sink.close()
    assert values(tmp_path, "loss") == [(step, step) for step in range(1, 5)]


# Servers that are down

# Both event loops in one process, since to import wandb takes seconds.
DOWN = """
import time
import anyio
from aengine import Engine, Events
from aengine.loggers import Tracker, WandB

for backend in ("asyncio", "trio"):
    engine = Engine(lambda engine, batch: batch)
    tracker = Tracker(WandB("x", mode="online"), shutdown_timeout=0.5, buffer=100)
    tracker.attach(engine, Events.ITERATION_COMPLETED)
    began = time.perf_counter()
    anyio.run(engine.run, range(1000), backend=backend)
    print(tracker.statistics().taken, time.perf_counter() - began)
"""


def test_with_a_server_that_is_down_the_run_and_the_process_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # "discard", a port where no server listens
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    began = perf_counter()
    done = subprocess.run([sys.executable, "-c", DOWN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = [line.split() for line in done.stdout.splitlines()]
    assert [(int(taken), float(seconds) < 20) for taken, seconds in runs] == [(1000, True)] * 2
    assert perf_counter() - began < 60


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"project": 3}, "project="),
        ({"name": ""}, "name="),
        ({"config": [("lr", 1)]}, "config="),
        ({"mode": "on"}, '"online", "offline", "disabled"'),
        ({"run_id": "a/b"}, "run_id="),
        ({"run": "abc"}, "run="),
    ],
    ids=["project", "name", "config", "mode", "run_id", "run"],
)
def test_what_cannot_work_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        WandB(**arguments)


def test_a_run_that_exists_is_as_it_is() -> None:
    run = wandb.init(mode="disabled", settings=wandb.Settings(silent=True))
    with pytest.raises(ValueError, match="give its project, name and so on there"):
        WandB("digits", run=run)
    run.finish()


def test_a_sink_that_is_disabled_writes_nothing(tmp_path: Path) -> None:
    sink = WandB(mode="disabled")
    sink.run_started("trainer", 1000.0)
    sink.write([record(1, loss=1)])
    sink.run_ended("trainer", 1001.0, StopReason.COMPLETED)
    sink.close()
    assert files_in(tmp_path) == []


def test_it_begins_no_run_before_the_first_record(tmp_path: Path) -> None:
    sink = WandB()
    sink.close()
    sink.write([])
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['wandb'] = None; from aengine.loggers import WandB"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install -e ".[wandb]"' in done.stderr

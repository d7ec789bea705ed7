"""JSON lines: every line whole and strict, whatever happens to the process that writes them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from aengine import Engine, Events
from aengine.loggers import JSONLines, Record, Tracker

AnyEngine: TypeAlias = Engine[Any, Any]


def record(step: int, **values: float) -> Record:
    return Record(step, 1, 1000.5, "ITERATION_COMPLETED", "trainer", values)


def strictly(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return read


def lines_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [strictly(line) for line in text.splitlines()]


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in lines_of(path)]


async def test_a_run_becomes_lines(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.jsonl"
    engine: AnyEngine = Engine(lambda engine, batch: {"loss": batch / 2}, name="trainer")
    Tracker(JSONLines(path)).attach(engine)
    await engine.run([1, 2])
    first, *_, last = lines_of(path)
    assert first.pop("time") <= last.pop("time")
    common = {"epoch": 1, "engine": "trainer"}
    assert first == {"step": 1, "event": "ITERATION_COMPLETED", "values": {"loss": 0.5}, **common}
    assert last == {"step": 2, "event": "EPOCH_COMPLETED", "values": {"loss": 1.0}, **common}


async def test_a_second_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    Tracker(JSONLines(path)).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2])
    await engine.run([1])
    assert steps_of(path) == [1, 2, 1]


def test_what_is_no_number_in_json_is_a_string_that_float_takes(tmp_path: Path) -> None:
    sink = JSONLines(tmp_path / "run.jsonl")
    sink.write([record(1, a=float("nan"), b=float("inf"), c=float("-inf"), d=1.5, e=True)])
    sink.close()
    (line,) = lines_of(sink.path)
    assert line["values"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.5, "e": True}
    assert float(line["values"]["c"]) == float("-inf")


@pytest.mark.parametrize("kept", range(1, 20))
def test_half_a_line_is_removed_before_another_is_written(tmp_path: Path, kept: int) -> None:
    sink = JSONLines(tmp_path / "run.jsonl")
    sink.write([record(1), record(2)])
    sink.close()
    first, second, _ = sink.path.read_bytes().split(b"\n")
    sink.path.write_bytes(first + b"\n" + second[: kept * len(second) // 20])
    sink.write([record(3)])
    sink.close()
    assert steps_of(sink.path) == [1, 3]


def test_a_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    sink = JSONLines(tmp_path / "run.jsonl")
    sink.write([record(1), record(2)])
    sink.close()
    os.truncate(sink.path, sink.path.stat().st_size - 1)
    sink.write([record(3)])
    sink.close()
    assert steps_of(sink.path) == [1, 2, 3]


def test_a_half_line_longer_than_a_look_is_removed_as_well(tmp_path: Path) -> None:
    sink = JSONLines(tmp_path / "run.jsonl")
    sink.write([record(1)])
    sink.close()
    with sink.path.open("ab") as file:
        file.write(b'{"step": 2, "values": {"' + b"x" * 200_000)
    sink.write([record(3)])
    sink.close()
    assert steps_of(sink.path) == [1, 3]


def test_a_write_that_fails_leaves_nothing_of_itself(tmp_path: Path) -> None:
    # In a process of its own, which may write no more than so many bytes to a file: as on a disk that is full.
    code = """
import resource, signal, sys
from aengine.loggers import JSONLines, Record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = JSONLines(sys.argv[1])
record = lambda step: Record(step, 1, 1000.5, "ITERATION_COMPLETED", "trainer", {})
sink.write([record(1)])
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
try:
    sink.write([record(2), record(3), record(4)])
except OSError:
    print("failed")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sink.write([record(2), record(3), record(4)])
sink.close()
"""
    path = tmp_path / "run.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "failed\n"
    assert steps_of(path) == [1, 2, 3, 4]


def test_after_a_kill_every_line_is_whole_and_the_next_run_goes_on(tmp_path: Path) -> None:
    code = """
import itertools, os, signal, sys
from aengine import Engine, Events
from aengine.loggers import JSONLines, Tracker
engine = Engine(lambda engine, batch: batch)
Tracker(JSONLines(sys.argv[1]), buffer=10**6).attach(engine, Events.ITERATION_COMPLETED)
@engine.on(Events.ITERATION_COMPLETED)
def die(engine):
    if os.path.exists(sys.argv[1]) and os.path.getsize(sys.argv[1]) > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
engine.run_sync(itertools.count(), epoch_length=10**9)
"""
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        size = 20_000 + (path.stat().st_size if path.exists() else 0)
        done = subprocess.run([sys.executable, "-c", code, str(path), str(size)], check=False)
        assert done.returncode == -signal.SIGKILL
    sink = JSONLines(path)
    sink.write([record(0)])
    sink.close()
    steps = steps_of(path)
    again = steps.index(1, 1)
    assert steps[:again] == list(range(1, again + 1))
    assert steps[again:-1] == list(range(1, len(steps) - again))


async def test_two_engines_share_a_file(tmp_path: Path) -> None:
    sink = JSONLines(tmp_path / "run.jsonl")
    trainer: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    evaluator: AnyEngine = Engine(lambda engine, batch: batch, name="evaluator")
    Tracker(sink).attach(trainer, Events.ITERATION_COMPLETED)
    Tracker(sink).attach(evaluator, Events.ITERATION_COMPLETED)

    @trainer.subscribe(Events.EPOCH_COMPLETED)
    async def evaluate(_: object) -> None:
        await evaluator.run(range(50))

    await trainer.run(range(50), max_epochs=4)
    lines = lines_of(sink.path)
    assert [line["step"] for line in lines if line["engine"] == "trainer"] == list(range(1, 201))
    assert [line["step"] for line in lines if line["engine"] == "evaluator"] == 4 * list(range(1, 51))


def test_what_writes_files_loads_neither_torch_nor_the_libraries_of_other_sinks() -> None:
    others = {"torch", "tensorboard", "mlflow", "wandb", "opentelemetry"}
    code = f"import sys; from aengine.loggers import JSONLines, Record, Sink; print({others} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

"""Curves are read from what a logger has written."""

import math
from pathlib import Path
from typing import Any

import pytest

from aengine.loggers import JSONLines, Record
from aengine.plots import Curve, read_curve


def record(step: int, event: str = "ITERATION_COMPLETED", engine: str = "trainer", **values: float) -> Record:
    return Record(step, 1, 0.0, event, engine, values)


RECORDS = [
    record(1, loss=3.0),
    record(2, loss=math.nan),
    record(3, loss=2.0),
    record(2, loss=1.0),  # taken again
    record(2, engine="evaluator", loss=9.0, accuracy=0.5),
    record(3, "EPOCH_COMPLETED", loss=1.5),
]


@pytest.fixture(params=["file", "records"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "records":
        return RECORDS
    sink = JSONLines(tmp_path / "log.jsonl")
    sink.write(RECORDS)
    sink.close()
    with sink.path.open("a") as file:
        file.write('{"step": 4, "values": {"loss"')  # its writer is at it
    return sink.path


def test_values_are_read_from_a_log(log: Any) -> None:
    curve = read_curve(log, "loss", engine_name="trainer", event="ITERATION_COMPLETED")
    assert (curve.steps, curve.values, curve.name) == ([1, 2, 3], [3.0, 1.0, 2.0], "loss")
    assert read_curve(log, "loss", engine_name="trainer").values == [3.0, 1.0, 1.5]
    assert read_curve(log, "loss").values == [3.0, 9.0, 1.5]
    assert read_curve(log, "accuracy") == Curve([2], [0.5], "accuracy")


def test_numbers_that_are_none_are_read_as_such(tmp_path: Path) -> None:
    sink = JSONLines(tmp_path / "log.jsonl")
    sink.write([record(1, loss=math.nan), record(2, loss=math.inf)])
    sink.close()
    values = read_curve(sink.path, "loss").values
    assert math.isnan(values[0])
    assert values[1] == math.inf


def test_name_that_is_not_in_the_log_is_refused_with_those_that_are(log: Any) -> None:
    with pytest.raises(ValueError, match=r"nothing is called 'los' in the log; it has \['accuracy', 'loss'\]"):
        read_curve(log, "los")
    there = r"at engine_name=None, event='ITERATION' in the log; it is at engine_name='.*', event='ITERATION_COMPLETED'"
    with pytest.raises(ValueError, match=there):
        read_curve(log, "loss", event="ITERATION")

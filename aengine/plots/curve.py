"""Curves: the values of one name in a log, over the course of a run. Reading them needs no matplotlib."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aengine.keywords import explain_wrong_call

if TYPE_CHECKING:
    from aengine.loggers.sink import Record


@dataclass(frozen=True)
class Curve:
    """Values over the course of a run.

    Attributes:
        steps: the iteration of each value, rising.
        values: the values.
        name: what they are, for the axis.
    """

    steps: Sequence[int]
    values: Sequence[float]
    name: str = ""


@explain_wrong_call
def read_curve(
    log: "str | os.PathLike[str] | Iterable[Record]",
    name: str,
    *,
    engine_name: str | None = None,
    event: str | None = None,
) -> Curve:
    """Return the values of one name from a log that `JSONLines` has written, or from records.

    Of a step that was logged twice, as by a run that was killed and resumed, the later value counts.

    Args:
        log: the file, or the records.
        name: the name of the values, such as "loss".
        engine_name: of the engine, if several engines log values of this name.
        event: the name of the event, such as "EPOCH_COMPLETED", if the value is logged at several.

    Raises:
        ValueError: there is no such value in the log; the message says what there is.
        OSError: the file cannot be read.
    """
    found: dict[int, float] = {}
    names: set[str] = set()
    origins: set[str] = set()
    for step, line_engine, line_event, values in _records(log):
        names.update(values)
        if name in values:
            origins.add(f"engine_name={line_engine!r}, event={line_event!r}")
            if engine_name in (None, line_engine) and event in (None, line_event):
                found[step] = float(values[name])
    if found:
        return Curve(sorted(found), [found[step] for step in sorted(found)], name)
    if origins:
        raise ValueError(
            f"nothing is called {name!r} at engine_name={engine_name!r}, event={event!r} in the log; it is at"
            f" {'; '.join(sorted(origins))}"
        )
    raise ValueError(f"nothing is called {name!r} in the log; it has {sorted(names)}")


def _records(log: "str | os.PathLike[str] | Iterable[Record]") -> Iterable[tuple[int, str, str, Mapping[str, Any]]]:
    """Yield step, engine, event and values."""
    if not isinstance(log, str | os.PathLike):
        for record in log:
            yield record.step, record.engine_name, record.event, record.values
        return
    with Path(log).open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # else it is still being written
                read = json.loads(line)
                yield read["step"], read["engine"], read["event"], read["values"]

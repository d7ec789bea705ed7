"""Sinks of loggers that a test holds, and what was warned of them."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from aengine.loggers import Record


class Holding:
    """Before the class of a sink: its calls wait for the test.

    Attributes:
        is_busy: set when a call waits.
        go_on: set by the test.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.is_busy = threading.Event()
        self.go_on = threading.Event()

    def write(self, records: Sequence[Record]) -> None:
        self.is_busy.set()
        self.go_on.wait()
        super().write(records)  # type: ignore[misc]  # that of the sink


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    logged = [record for record in caplog.records if record.name == "aengine.loggers"]
    return [record.getMessage() for record in logged if record.levelno >= logging.WARNING]

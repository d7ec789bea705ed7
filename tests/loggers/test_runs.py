"""Which of the engines that share a run of a tracking server decides how it ends."""

import pytest

from aengine import StopReason
from aengine.loggers.runs import SharedRun


def test_the_first_that_began_decides_even_if_it_is_reported_later() -> None:
    runs = SharedRun()
    runs.begin("evaluator", 11.0)
    runs.begin("trainer", 10.0)
    runs.end("evaluator", 12.0, StopReason.COMPLETED)
    assert not runs.is_over
    runs.end("trainer", 13.0, StopReason.FAILED)
    assert runs.is_over
    assert (runs.began, runs.ended, runs.reason) == (10.0, 13.0, StopReason.FAILED)


def test_one_that_ends_later_does_not_change_that() -> None:
    runs = SharedRun()
    runs.begin("trainer", 10.0)
    runs.begin("evaluator", 11.0)
    runs.end("trainer", 12.0, StopReason.FAILED)
    runs.end("evaluator", 13.0, StopReason.COMPLETED)
    assert (runs.began, runs.ended, runs.reason) == (10.0, 13.0, StopReason.FAILED)


def test_the_next_of_the_same_engine_begins_anew() -> None:
    runs = SharedRun()
    runs.begin("trainer", 10.0)
    runs.end("trainer", 11.0, StopReason.FAILED)
    runs.begin("trainer", 12.0)
    runs.end("trainer", 13.0, StopReason.COMPLETED)
    assert (runs.began, runs.ended, runs.reason) == (12.0, 13.0, StopReason.COMPLETED)


@pytest.mark.parametrize("reason", [StopReason.FAILED, StopReason.CANCELLED])
def test_one_that_begins_after_a_failure_does_not_make_it_good(reason: StopReason) -> None:
    runs = SharedRun()
    runs.begin("trainer", 10.0)
    runs.end("trainer", 11.0, reason)
    runs.begin("evaluator", 12.0)
    runs.end("evaluator", 13.0, StopReason.COMPLETED)
    assert (runs.ended, runs.reason) == (13.0, reason)


def test_one_that_begins_after_all_went_well_decides() -> None:
    runs = SharedRun()
    runs.begin("evaluator", 10.0)
    runs.end("evaluator", 11.0, StopReason.COMPLETED)
    runs.begin("trainer", 12.0)
    runs.end("trainer", 13.0, StopReason.FAILED)
    assert (runs.began, runs.ended, runs.reason) == (12.0, 13.0, StopReason.FAILED)

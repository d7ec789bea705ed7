"""Effects: what the loop yields to its driver, and what the driver may throw into it in return."""

from collections.abc import Awaitable, Generator
from enum import Enum, auto
from typing import Any, TypeAlias

BUDGET = 0.002
"""Seconds that the loop runs on the event loop's own thread before it lets other tasks have a turn."""


class Effect(Enum):
    """What the loop asks its driver for, besides awaiting something."""

    YIELD = auto()  # the time budget is spent: let other tasks have a turn
    RAISE_FAILURE = auto()  # as requested: throw what failed beside the loop into it, or the cancellation of the run
    PAUSE = auto()  # resume the loop when the pause is over
    SUSPEND = auto()  # interrupted: keep this generator for the next run
    FLUSH = auto()  # wait for the subscribers; throw what fails there
    SHIELD = auto()  # what follows is clean-up: shield it from cancellation, and bound it


LoopGenerator: TypeAlias = Generator[Awaitable[Any] | Effect, Any, None]


class NextBatch:
    """An awaitable of the next batch. Of its own type, because `terminate()` cancels this wait and no other."""

    __slots__ = ("awaitable",)

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self.awaitable: Awaitable[Any] = awaitable

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.awaitable.__await__()

    def close(self) -> None:
        """Close it where it will not be awaited."""
        getattr(self.awaitable, "close", lambda: None)()


class WaitCancelled(Exception):
    """Thrown into the loop while it waits for the next batch: a request has to be served first."""

"""Story: what the loop yields to whoever drives it, and may be thrown in return. The terms between the two."""

from collections.abc import Awaitable, Generator
from enum import Enum, auto
from typing import Any, TypeAlias

BUDGET = 0.002
"""Seconds that the loop runs on the event loop's own thread before it lets other tasks have a turn."""


class Effect(Enum):
    """What the loop yields, besides awaitables, to whoever drives it."""

    YIELD = auto()  # the time budget is spent: let others have a turn
    PAUSE = auto()  # come back when the pause has ended
    SUSPEND = auto()  # interrupted: keep this generator, the next run goes on with it
    RAISE_FAILURE = auto()  # as was asked: throw what there is to throw
    FLUSH = auto()  # let the subscribers finish; throw what goes wrong there
    SHIELD = auto()  # what follows is clean-up: let no cancellation in, and bound it


LoopGenerator: TypeAlias = Generator[Awaitable[Any] | Effect, Any, None]


class NextBatch:
    """The next batch, awaited. A type of its own: it is the one wait that `terminate()` cuts short."""

    __slots__ = ("awaitable",)

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self.awaitable = awaitable

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.awaitable.__await__()

    def close(self) -> None:
        """Give it up unawaited."""
        getattr(self.awaitable, "close", lambda: None)()


class WaitCancelled(Exception):
    """Stop waiting for data: something was asked."""

"""Records what an engine fires, in short: `IC@1/2` is ITERATION_COMPLETED of epoch 1, iteration 2."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from aengine import Engine, Events

AnyEngine: TypeAlias = Engine[Any, Any]
Steps: TypeAlias = list[tuple[int, int, Any]]
"""Epoch, iteration and batch of each completed step."""


class Boom(Exception):
    """The error that a test raises, and expects to come out."""


LETTERS = {
    "STARTED": "S",
    "EPOCH_STARTED": "ES",
    "GET_BATCH_STARTED": "GS",
    "GET_BATCH_COMPLETED": "GC",
    "ITERATION_STARTED": "IS",
    "ITERATION_COMPLETED": "IC",
    "DATALOADER_STOP_ITERATION": "DSI",
    "EPOCH_COMPLETED": "EC",
    "TERMINATE": "T",
    "TERMINATE_SINGLE_EPOCH": "TSE",
    "INTERRUPT": "INT",
    "EXCEPTION_RAISED": "EXC",
    "CANCELLED": "CAN",
    "COMPLETED": "C",
}
EVENTS = {letters: Events[name] for name, letters in LETTERS.items()}

PLAIN = (
    "S@0/0 ES@1/0 GS@1/0 GC@1/0 IS@1/1 IC@1/1 GS@1/1 GC@1/1 IS@1/2 IC@1/2 EC@1/2 "
    "ES@2/2 GS@2/2 DSI@2/2 GC@2/2 IS@2/3 IC@2/3 GS@2/3 GC@2/3 IS@2/4 IC@2/4 EC@2/4 C@2/4"
).split()
"""What `run([1, 2], max_epochs=2)` fires."""


def double(engine: AnyEngine, batch: int) -> int:
    return 2 * batch


def place(engine: AnyEngine, letters: str) -> str:
    return f"{letters}@{engine.state.epoch}/{engine.state.iteration}"


def record(engine: AnyEngine, letters: str = "") -> list[str]:
    """Return the list that is going to hold what this engine fires, or those events of it that are named."""
    seen: list[str] = []

    def listen(one: str) -> None:
        engine.add_event_handler(EVENTS[one], lambda engine, *_: seen.append(place(engine, one)))

    for one in letters.split() or EVENTS:
        listen(one)
    return seen


def record_steps(engine: AnyEngine) -> Steps:
    """Return the list that is going to hold the steps of this engine."""
    steps: Steps = []

    @engine.on(Events.ITERATION_COMPLETED)
    def note(engine: AnyEngine) -> None:
        steps.append((engine.state.epoch, engine.state.iteration, engine.state.batch))

    return steps


def at(engine: AnyEngine, where: str, act: Callable[[], object]) -> None:
    """Have `act` called by a handler when the engine is at a place such as "IC@1/2", or "IC", the first time."""
    pending = [act]

    def look(engine: AnyEngine, *_: object) -> None:
        if pending and where in (place(engine, letters), letters):
            pending.pop()()

    letters = where.partition("@")[0]
    engine.add_event_handler(EVENTS[letters], look)


def engine_that(where: str, act: Callable[[AnyEngine], object], steps: Steps | None = None) -> AnyEngine:
    """Return an engine that doubles its batches, and calls `act` at a place: "step@1/2" is within that step.

    The steps that it completes are appended to `steps`.
    """
    pending = [act]

    def step(engine: AnyEngine, batch: int) -> int:
        if pending and where == place(engine, "step"):
            pending.pop()(engine)
        if steps is not None:
            steps.append((engine.state.epoch, engine.state.iteration, batch))
        return double(engine, batch)

    engine: AnyEngine = Engine(step)
    if not where.startswith("step"):
        at(engine, where, lambda: act(engine))
    return engine


class Unsized:
    """Data that can be iterated again and again, but has no length. Counts how often it was."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.batches)

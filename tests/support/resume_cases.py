"""The ways to stop a run, the ways to resume it, and the kinds of data to resume it with."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any, TypeAlias

import anyio
import pytest
from support.record import PLAIN, AnyEngine, Boom, Steps, double, record_steps

from aengine import Engine, StopReason

Way: TypeAlias = Callable[[AnyEngine], AnyEngine]


# Ways to stop


def terminate(engine: AnyEngine) -> None:
    engine.terminate()


def interrupt(engine: AnyEngine) -> None:
    engine.interrupt()


def fail(_: AnyEngine) -> None:
    raise Boom


def press_ctrl_c(_: AnyEngine) -> None:
    raise KeyboardInterrupt


STOPS = {"terminate": terminate, "interrupt": interrupt, "fail": fail, "ctrl-c": press_ctrl_c}
STOPPED = pytest.mark.parametrize("stop", STOPS)

PLACES = [  # but the last two, where the run is done
    *PLAIN[:-2],
    *(f"step@{one.partition('@')[2]}" for one in PLAIN if one.startswith("IS@")),
]


def run_and_stop(engine: AnyEngine, data: Any, **limits: int) -> None:
    """Run until one of the STOPS, prepared by the test, stops it."""
    with suppress(Boom, KeyboardInterrupt):
        engine.run_sync(data, **limits)
    assert engine.state.stop_reason is not StopReason.COMPLETED


# Ways to resume


def in_memory(engine: AnyEngine) -> AnyEngine:
    return engine


def from_state_dict(engine: AnyEngine) -> AnyEngine:
    """Return a new engine with the state of this one, as read back from JSON."""
    saved = json.loads(json.dumps(engine.state_dict()))
    new: AnyEngine = Engine(double)
    new.load_state_dict(saved)
    return new


def from_own_state_dict(engine: AnyEngine) -> AnyEngine:
    engine.load_state_dict(json.loads(json.dumps(engine.state_dict())))
    return engine


WAYS = [in_memory, from_state_dict, from_own_state_dict]
HOW = pytest.mark.parametrize("how", WAYS, ids=lambda how: str(how.__name__))
HERE_OR_THERE = pytest.mark.parametrize("how", WAYS[:2], ids=lambda how: str(how.__name__))


def finish(engine: AnyEngine, data: Any, **limits: int) -> None:
    """Go on to the end."""
    engine.run_sync(data, **limits)
    assert engine.state.stop_reason is StopReason.COMPLETED


def uninterrupted(data: Any, **limits: int) -> Steps:
    """Return the steps of a run that is not stopped."""
    engine: AnyEngine = Engine(double)
    steps = record_steps(engine)
    engine.run_sync(data, **limits)
    return steps


# Data: the numbers from 1 on


def numbers(count: int) -> Iterator[int]:
    yield from range(1, count + 1)


class Sized:
    """Re-iterable data that has a length, and no index. Remembers what was fetched."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        for batch in range(1, self.count + 1):
            self.fetched.append(batch)
            yield batch


class Stateful:
    """Data with a state, its position, as torchdata's StatefulDataLoader does. Remembers what was fetched."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.fetched: list[int] = []
        self._next = 0
        self._is_restored = False

    def __iter__(self) -> Iterator[int]:
        if not self._is_restored:
            self._next = 0
        self._is_restored = False
        while self._next < self.count:
            self._next += 1
            self.fetched.append(self._next)
            yield self._next

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._next = state_dict["next"]
        self._is_restored = True


class SizedStateful(Stateful):
    """The same with a length."""

    def __len__(self) -> int:
        return self.count


class AsyncSized:
    """Async data that has a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    async def __aiter__(self) -> AsyncIterator[int]:
        for number in range(1, self.count + 1):
            await anyio.lowlevel.checkpoint()
            yield number


KINDS: dict[str, Callable[[int], Any]] = {
    "list": lambda count: list(range(1, count + 1)),
    "sized": Sized,
    "stateful": Stateful,
    "stateful with a length": SizedStateful,
    "async": AsyncSized,
}

"""A training from a queue that forgets what was acknowledged, and that is killed right after acknowledging.

What a checkpoint does not hold and the queue has forgotten would be lost: it is never delivered again.
"""

import os
import signal
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import anyio
import torch
import torch._dynamo  # now, as of trio: otherwise each child would import it in its first step
import trio  # noqa: F401 -- now, and not in each child

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint
from aengine.errors import CheckpointWarning

EVERY = 3


class Queue:
    """Messages, numbered from 1. On the disk is the last one that was acknowledged: those after it are delivered.

    Args:
        directory: where that is.
        messages: how many there are.
        acknowledged: called when it is there.
    """

    def __init__(self, directory: Path, messages: int, acknowledged: Callable[[int], None]) -> None:
        self._file = directory / "acknowledged"
        self._messages = messages
        self._acknowledged = acknowledged
        self._last = int(self._file.read_text()) if self._file.exists() else 0

    def __next__(self) -> int:
        if self._last == self._messages:
            raise StopIteration
        self._last += 1
        return self._last

    def state_dict(self) -> dict[str, int]:
        return {"last": self._last}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self._last = max(self._last, state_dict["last"])  # what was acknowledged is not there any more

    def forget(self, position: Mapping[str, int]) -> None:
        draft = self._file.with_suffix(".new")
        draft.write_text(str(position["last"]))
        draft.replace(self._file)
        self._acknowledged(position["last"])


class PlainQueue(Queue):
    def __iter__(self) -> Iterator[int]:
        return self

    acknowledge = Queue.forget


class AsyncQueue(Queue):
    """One to be entered, acknowledged asynchronously, and only while it is entered: as a broker's."""

    is_open = False

    async def __aenter__(self) -> Self:
        await anyio.lowlevel.checkpoint()
        self.is_open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        await anyio.lowlevel.checkpoint()
        self.is_open = False

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        await anyio.lowlevel.checkpoint()
        message = next(self, None)
        if message is None:
            raise StopAsyncIteration
        return message

    async def acknowledge(self, position: Mapping[str, int]) -> None:
        assert self.is_open
        await anyio.lowlevel.checkpoint()
        self.forget(position)


class Seen:
    """The messages that were trained on, as part of the state."""

    def __init__(self) -> None:
        self.messages: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"messages": list(self.messages)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.messages = list(state_dict["messages"])


def run(options: Mapping[str, Any], report: Callable[..., None]) -> None:
    """Train until so many acknowledgements; report every message that was trained on if it comes to the end."""
    anyio.run(_run, options, report, backend=options["backend"])


async def _run(options: Mapping[str, Any], report: Callable[..., None]) -> None:
    warnings.simplefilter("ignore", CheckpointWarning)
    seen, directory = Seen(), Path(options["directory"])
    left, messages = options["acknowledgements"], options["messages"]

    def acknowledged(message: int) -> None:
        nonlocal left
        report("acknowledged", message)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    def step(_: Engine[Any, Any], message: int) -> None:
        seen.messages.append(message)
        torch.ones(40, 40) @ torch.ones(40, 40)

    async def async_step(engine: Engine[Any, Any], message: int) -> None:
        await anyio.lowlevel.checkpoint()
        step(engine, message)

    kind, is_async = (AsyncQueue, True) if options["program"].startswith("async") else (PlainQueue, False)
    engine: Engine[Any, Any] = Engine(async_step if is_async else step)
    async with Checkpoint(directory / "checkpoints", seen) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(every=EVERY, at_end=True))
        await checkpoint.restore()
        prefetch = 2 if options["program"].endswith("prefetch") else 0
        await engine.run(kind(directory, messages, acknowledged), max_iters=messages, prefetch=prefetch)
    report("messages", *seen.messages)

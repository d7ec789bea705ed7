"""Driving the loop without an event loop, as long as nothing must be awaited."""

import threading
from collections.abc import Callable
from typing import Any

from anyio.lowlevel import current_token

from aengine.loop.effects import Effect, LoopGenerator
from aengine.loop.requests import Request, Requests

DONE = object()
SUSPENDED = object()


def drive(generator: LoopGenerator, requests: Requests, failures: list[BaseException]) -> Any:
    """Advance the story until it is OVER, SUSPENDED, or wants something awaited, which is then returned.

    What failed the run, or Ctrl-C, is added to `failures`.
    """
    changed = threading.Event()
    requests.wake_by(changed.set)
    try:
        while True:
            wanted = next(generator)
            if wanted is Effect.SUSPEND:
                return SUSPENDED
            if wanted is Effect.RAISE_FAILURE:  # a subscriber has come, who needs an event loop
                return wanted
            if wanted is Effect.PAUSE:
                _wait_while_paused(requests, changed)
            elif type(wanted) is not Effect:
                return wanted
    except StopIteration:
        return DONE
    except BaseException as error:  # noqa: BLE001 -- raised by who called this
        failures.append(error)
        return DONE
    finally:
        requests.wake_by(None)


def _wait_while_paused(requests: Requests, changed: threading.Event) -> None:
    while requests.pending == {Request.PAUSE}:
        changed.wait()
        changed.clear()


def runs_in_event_loop(current: Callable[[], object] = current_token) -> bool:
    """Say whether an event loop runs in this thread."""
    try:
        current()
    except RuntimeError:
        return False
    return True

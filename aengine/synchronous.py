"""Driving the loop without an event loop, as long as nothing must be awaited."""

import threading
from collections.abc import Callable
from typing import Any

from anyio.lowlevel import current_token

from aengine.control import Control, Request
from aengine.story import Signal, Story

OVER = object()
SUSPENDED = object()


def drive_here(story: Story, control: Control, failures: list[BaseException]) -> Any:
    """Advance the story until it is OVER, SUSPENDED, or wants something awaited, which is then returned.

    What failed the run, or Ctrl-C, is added to `failures`.
    """
    changed = threading.Event()
    control.on_change = changed.set
    try:
        while True:
            wanted = next(story)
            if wanted is Signal.SUSPEND:
                return SUSPENDED
            if wanted is Signal.HALT:  # a subscriber has come, who needs an event loop
                return wanted
            if wanted is Signal.PAUSE:
                _wait_while_paused(control, changed)
            elif type(wanted) is not Signal:
                return wanted
    except StopIteration:
        return OVER
    except BaseException as error:  # noqa: BLE001 -- raised by who called this
        failures.append(error)
        return OVER
    finally:
        control.on_change = None


def _wait_while_paused(control: Control, changed: threading.Event) -> None:
    while control.asked == {Request.PAUSE}:
        changed.wait()
        changed.clear()


def runs_in_event_loop(current: Callable[[], object] = current_token) -> bool:
    """Say whether an event loop runs in this thread."""
    try:
        current()
    except RuntimeError:
        return False
    return True

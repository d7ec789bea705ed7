"""Turns of an event loop, waited for on another thread."""

import threading
from collections.abc import Callable


def call_and_wait_for_turns(post: Callable[[Callable[[], object]], object], act: Callable[[], object]) -> None:
    """Have the event loop call `act`, and block until it has had ten more turns, in which that is heard of."""
    turns, gone_by = iter(range(10)), threading.Event()

    def turn() -> None:
        if next(turns, None) is None:
            gone_by.set()
        else:
            post(turn)

    post(act)
    post(turn)
    assert gone_by.wait(30)

"""Driving a dispatch, from async code, which awaits what it yields, and from plain code.

A dispatch is what `Topic.dispatch` leaves to be done. It yields what handlers gave to be awaited, and a
BackpressureWait for each inbox that is full.
"""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from aengine.bus.inbox import BackpressureWait, Inbox
from aengine.bus.topic import Dispatch
from aengine.errors import InboxOverflow

reading: ContextVar[Inbox | None] = ContextVar("aengine_reading", default=None)
"""The inbox of the subscriber in whose handler the caller is, None elsewhere."""


async def drive(dispatch: Dispatch | None, *, can_wait: bool) -> None:
    """Drive a dispatch from async code. Cancellable: the cancellation is thrown into the dispatch, which ends.

    A subscriber that emits waits for room as any other task does, unless that inbox's own reader waits, directly or
    through others, for room in the emitter's: then the event is accepted over the bound, and nothing is stuck.

    Raises:
        InboxOverflow: there is no room, and, as `can_wait` says, no run that would make some.
    """
    if dispatch is None:
        return
    resume: Callable[[Any], Any] = dispatch.send
    value: Any = None
    while True:
        try:
            wanted = resume(value)
        except StopIteration:
            return
        try:
            value = await (_wait_for_room(wanted, can_wait=can_wait) if type(wanted) is BackpressureWait else wanted)
            resume = dispatch.send
        except BaseException as error:  # noqa: BLE001 -- thrown into the dispatch, which lets it out again
            resume, value = dispatch.throw, error


def drive_blocking(dispatch: Dispatch | None, wait_for: Callable[[Awaitable[Any]], Any]) -> None:
    """Drive a dispatch from plain code: `wait_for` returns the result of what it yields, or raises."""
    if dispatch is None:
        return
    resume: Callable[[Any], Any] = dispatch.send
    value: Any = None
    while True:
        try:
            wanted = resume(value)
        except StopIteration:
            return
        try:
            resume, value = dispatch.send, wait_for(wanted)
        except BaseException as error:  # noqa: BLE001 -- thrown into the dispatch, which lets it out again
            resume, value = dispatch.throw, error


def async_handler_message(name: str) -> str:
    """Say what to write instead of a plain `fire_event`."""
    return (
        f"{name} has an async inline handler, which fire_event() cannot await here: write  await engine.emit({name!r})"
    )


def no_room(wait: BackpressureWait) -> InboxOverflow:
    """Return the error of an event that would wait for ever. It was accepted."""
    return InboxOverflow(
        f"the inbox of {wait.inbox.name!r} is full, and no run is under way in which it is emptied: emit fewer events"
        " between runs, make its buffer= larger, or choose another overflow="
    )


async def _wait_for_room(wait: BackpressureWait, *, can_wait: bool) -> None:
    if not can_wait:
        raise no_room(wait)
    own_inbox = reading.get()
    await (wait if own_inbox is None else own_inbox.wait_as_reader(wait))

"""Streams: events for an `async for` of one's own."""

from typing import Self

import anyio
import anyio.lowlevel

from aengine.bus.subscriber import TURN_EVENTS, Subscription
from aengine.events import Event
from aengine.threads.event_loop import EventLoopHandle


class Stream(Subscription):
    """Events to be read, in order.

        async with engine.stream(event) as events:
            async for event in events: ...

    It owns no task, so it can be dropped anywhere. It begins with the `async with`, and ends when the run under way,
    or else the next one, ends; what waits can still be read then. One task reads it. Cancellable; no event is lost by
    that.

    Raises:
        RuntimeError: it is read outside of its `async with`.
    """

    _loop_handle: EventLoopHandle | None = None  # where it is read
    _taken = 0

    async def __aenter__(self) -> Self:
        self._loop_handle = EventLoopHandle()
        self.inbox.reopen_nowait()
        self._bus.add(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop_handle = None
        self._bus.remove(self)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Event:
        loop_handle = self._loop_handle
        if loop_handle is None:
            raise RuntimeError(
                "a stream is read inside its block:"
                " async with engine.stream(...) as events: async for event in events: ..."
            )
        # A turn of the event loop costs more than an event: it is given away now and then, not for each.
        if self._taken % TURN_EVENTS == TURN_EVENTS - 1:
            await anyio.lowlevel.checkpoint()
        else:
            await anyio.lowlevel.checkpoint_if_cancelled()
        while (event := self.inbox.take_nowait()) is None:
            if self.inbox.closed:
                raise StopAsyncIteration
            await self.inbox.wait_for_event(loop_handle)
        self.inbox.mark_handled()
        self._taken += 1
        return event

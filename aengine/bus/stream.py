"""Streams: events for an `async for` of one's own."""

from typing import TYPE_CHECKING, Any, Generic, Self

import anyio
import anyio.lowlevel

from aengine.bus.subscriber import TURN_EVENTS, Subscription
from aengine.events import Event
from aengine.threads.event_loop import EventLoopHandle
from aengine.type_variables import Output, Snapshot, with_defaults

if TYPE_CHECKING:
    from aengine.bus.bus import Bus


class Stream(Generic[Output, Snapshot]):
    """Events to be read, in order.

        async with engine.stream(event) as events:
            async for event in events: ...

    It owns no task, so it can be dropped anywhere. It begins with the `async with`, and ends when the run under way,
    or else the next one, ends, also where `run()` is refused; what waits can still be read then. With
    `wait_for_run=False` it is over at once where no run is under way. When it is over, `engine.state` says how the run
    ended. One task reads it. Cancellable; no event is lost by that.

    Raises:
        RuntimeError: it is read outside of its `async with`, or by a second task, or its `async with` is entered twice.
    """

    def __class_getitem__(cls, parameters: Any) -> Any:
        return with_defaults(cls, parameters)

    _loop_handle: EventLoopHandle | None = None  # where it is read
    _taken = 0
    _is_awaited = False  # a task waits for the next event

    def __init__(self, bus: "Bus", *arguments: Any, wait_for_run: bool = True) -> None:
        self._bus = bus
        self._subscription = Subscription(bus, *arguments)
        self._inbox = self._subscription.inbox
        self._wait_for_run = wait_for_run

    async def __aenter__(self) -> Self:
        if self._loop_handle is not None:
            raise RuntimeError(
                "this stream is being read in another block: open one for each reader, by another engine.stream(...)"
            )
        self._loop_handle = EventLoopHandle()
        self._inbox.reopen_nowait()
        self._bus.add(self._subscription)
        if not self._wait_for_run and not self._bus.has_run:  # looked at when a run that ends now would find it
            self._inbox.close_nowait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop_handle = None
        self._bus.remove(self._subscription)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event[Output, Snapshot]:
        loop_handle = self._loop_handle
        if loop_handle is None:
            raise RuntimeError(
                "a stream is read inside its block:"
                " async with engine.stream(...) as events: async for event in events: ..."
            )
        if self._is_awaited:
            raise RuntimeError(
                f"another task waits for the next event of this {self._subscription.name}, and one event goes to one"
                " reader: open a stream for each, by another engine.stream(...)"
            )
        # A turn of the event loop costs more than an event: it is given away now and then, not for each.
        if self._taken % TURN_EVENTS == TURN_EVENTS - 1:
            self._is_awaited = True
            try:
                await anyio.lowlevel.checkpoint()
            finally:
                self._is_awaited = False
        else:
            await anyio.lowlevel.checkpoint_if_cancelled()
        while (event := self._inbox.take_nowait()) is None:
            if self._inbox.closed:
                raise StopAsyncIteration
            self._is_awaited = True
            try:
                await self._inbox.wait_for_event(loop_handle)
            finally:
                self._is_awaited = False
        self._inbox.mark_handled()
        self._taken += 1
        return event

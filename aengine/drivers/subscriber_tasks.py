"""SubscriberTasks: the tasks of one run in which its subscribers handle what they are sent."""

from functools import partial
from typing import TYPE_CHECKING

import anyio

from aengine.bus.bus import Bus
from aengine.bus.dispatch import reading
from aengine.bus.subscriber import Fail, Subscriber
from aengine.errors import HandlerTimeout
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent

if TYPE_CHECKING:
    from anyio.abc import TaskGroup


class SubscriberTasks:
    """A task for each subscriber, in the task group of the run. All of it is called on the event loop's thread."""

    def __init__(self, bus: Bus, loop_handle: EventLoopHandle, grace: float) -> None:
        self._bus = bus
        self._loop_handle = loop_handle
        self._grace = grace
        self._ends: dict[Subscriber, ThreadSafeEvent] = {}
        self._starts_no_more = False
        self._are_over = False

    def start(self, subscriber: Subscriber, group: "TaskGroup", fail: Fail) -> None:
        """Have a subscriber handle what it is sent, from now to the end of the run. Errors go to `fail`."""
        if self._starts_no_more:
            if not self._are_over:
                subscriber.inbox.stop_reader()  # what it is sent waits for the next run, and nothing waits for it
        elif subscriber not in self._ends:
            subscriber.inbox.reopen_nowait()
            self._ends[subscriber] = ThreadSafeEvent(self._loop_handle)
            self._loop_handle.start(
                group, partial(self._consume, subscriber, fail), partial(self._never_started, subscriber, fail)
            )

    def start_no_more(self) -> None:
        """The loop is over: a subscriber that is added from now on takes part in the next run."""
        self._starts_no_more = True

    async def _consume(self, subscriber: Subscriber, fail: Fail) -> None:
        try:
            await subscriber.consume(self._loop_handle, fail)
        finally:
            self._mark_ended(subscriber)

    def _never_started(self, subscriber: Subscriber, fail: Fail) -> None:
        subscriber.fail_as_stray(fail)
        self._mark_ended(subscriber)

    def _mark_ended(self, subscriber: Subscriber) -> None:
        self._ends[subscriber].set()
        if subscriber not in self._bus.subscribers:  # a run may last for days, and see many come and go
            del self._ends[subscriber]

    @property
    def _awaited(self) -> set[Subscriber]:
        # Those that were removed may still have events to handle. Others may just be about to be started.
        return {*self._ends} if self._starts_no_more else {*self._ends, *self._bus.subscribers}

    def refuse_own_flush(self) -> None:
        """Raise RuntimeError in a subscriber's handler: waiting for all would be waiting for itself."""
        me = reading.get()
        if any(one.inbox is me for one in self._awaited):
            raise RuntimeError(
                "flush() waits for every subscriber, and so for the one that calls it here: call it from the step, from"
                " an inline handler, or from outside"
            )

    @property
    def are_any(self) -> bool:
        """Whether there are subscribers, or tasks of some that were removed."""
        return bool(self._ends or self._bus.subscribers)

    async def flush(self) -> None:
        """Wait until every event dispatched so far is handled. Cancellable."""
        if self._are_over:  # what is emitted now waits for the next run
            return
        await self._flush_to(self._bus.sequence)

    async def _flush_to(self, sequence: int) -> None:
        loop_handle = EventLoopHandle()
        for subscriber in self._awaited:
            await subscriber.inbox.wait_processed(sequence, loop_handle)

    async def finish(self, deadline: float) -> None:
        """Wait until all that was accepted has been handled, and what the handlers themselves fire meanwhile.

        Not for what other tasks and threads fire from now on, which may have no end: it waits for the next run, unless
        there is time for it.

        Raises:
            HandlerTimeout: some were not done at the deadline. They have been cancelled; it says what was lost.
        """
        bus = self._bus
        sequence = bus.sequence
        with anyio.CancelScope(deadline=deadline) as scope:
            await self._flush_to(sequence)
            while bus.last_of_subscribers > sequence:
                sequence = bus.last_of_subscribers
                await self._flush_to(sequence)
        sequence = max(sequence, bus.last_of_subscribers)
        late = [one for one in self._ends if one.inbox.is_behind(sequence)]
        if scope.cancelled_caught and late:  # else the last was handled at the deadline
            lost = "; ".join([one.cancel() for one in late])
            raise HandlerTimeout(
                f"after {self._grace} seconds of grace these subscribers of engine {self._bus.name!r} were still busy:"
                f" {lost}"
            )

    async def end(self) -> None:
        """Have the tasks end, and wait for that. What is emitted from now on waits for the next run."""
        ends = dict(self._ends)
        for subscriber in ends:
            subscriber.inbox.stop_reader()
        for end in ends.values():
            await end.wait()
        self.end_nowait()

    def end_nowait(self) -> None:
        """No task is left. What is emitted from now on waits for the next run."""
        self._are_over = True
        for subscriber in self._bus.subscribers:
            subscriber.inbox.reopen_nowait()

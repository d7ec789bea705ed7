"""Waiting for iterations to be completed: from any task, on any event loop."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from anyio.lowlevel import checkpoint

from aengine.bus.listeners import InlineHandler, Observer
from aengine.events import Filter, Selector
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent

if TYPE_CHECKING:
    from aengine.bus.bus import Bus

_EVENT = "ITERATION_COMPLETED"


class _Waiter(InlineHandler):
    """Wakes what waits for an iteration. With a filter, so that until then it costs the loop a comparison."""

    __slots__ = ("woken",)

    is_internal = True

    def __init__(self, count: int) -> None:
        self.woken = ThreadSafeEvent(EventLoopHandle())
        selector = Selector(_EVENT, Filter(after=count - 1))
        super().__init__(selector, Observer("wait_completed", self.woken.set), (), {})


class Completions:
    """What waits for the number of completed iterations of one engine.

    It holds no bus, since the bus holds it.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiter] = []

    async def wait(self, bus: "Bus", count: int, is_over: Callable[[], bool]) -> int:
        """Return the number of completed iterations when it is so large, or the run has ended first.

        That of the run under way, or else of the next one. `is_over` says whether a run is under way that completes no
        more. Cancellable.
        """
        await checkpoint()
        if bus.state.iterations_completed < count and not is_over():
            waiter, topic = _Waiter(count), bus.topic(_EVENT)
            listeners: list[InlineHandler] = [waiter]
            # Added, then looked. The loop and the end of the run do the opposite, so that one side sees the other.
            self._waiting.append(waiter)
            topic.listen(waiter)
            try:
                if bus.state.iterations_completed < count and not is_over():
                    await waiter.woken.wait()
            finally:
                topic.unsubscribe(listeners)
                self._waiting.remove(waiter)
        return int(bus.state.iterations_completed)

    def end(self) -> None:
        """The run completes no more iterations: what waits for one gets what there is. From any thread."""
        for waiter in tuple(self._waiting):
            waiter.woken.set()

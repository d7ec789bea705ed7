"""Attending: the half of the loop that fires its events, and sees to what was asked of it meanwhile."""

from typing import Any

from aengine.bus.bus import Bus
from aengine.loop.effects import Effect, LoopGenerator
from aengine.loop.requests import Phase, Request, Requests
from aengine.state import State, StopReason


class Terminated(Exception):
    """The run is to end here."""

    def __init__(self, reason: StopReason) -> None:
        self.reason = reason


class EpochTerminated(Exception):
    """The epoch is to end here."""


class Attending:
    """What the loop does between two lines of its story."""

    def __init__(self, engine: Any, state: State, bus: Bus, requests: Requests) -> None:
        self._engine = engine
        self._state = state
        self._bus = bus
        self._requests = requests

    def _fire(self, name: str) -> LoopGenerator:
        yield from self._dispatch(name)
        yield from self._serve_requests()

    def _dispatch(self, name: str, *payload: Any) -> LoopGenerator:
        self._bus.stopwatch.weight = 1
        topic = self._bus.topic(name)
        topic.mark_fired_by_loop()
        count = topic.count_firing()
        if count >= topic.next_count:
            yield from topic.dispatch(self._engine, count, payload) or ()

    def _serve_requests(self, *, between_steps: bool = True) -> LoopGenerator:  # noqa: C901, PLR0912 -- a branch a request
        """See to what was asked, until nothing is asked that keeps the loop from going on."""
        requests = self._requests
        pending, is_put_off = requests.pending, False
        if requests.to_fire:
            pending.add(Request.FIRE)
        while pending:
            if Request.RAISE_FAILURE in pending:
                pending.discard(Request.RAISE_FAILURE)
                yield Effect.RAISE_FAILURE
            elif Request.CHANGE_DATA in pending:
                pending.discard(Request.CHANGE_DATA)
                yield from self._change_data()
            elif Request.TERMINATE in pending:
                raise Terminated(StopReason.TERMINATED)
            elif Request.TERMINATE_EPOCH in pending:
                pending.discard(Request.TERMINATE_EPOCH)
                if requests.phase is Phase.ITERATING:
                    raise EpochTerminated
            elif Request.INTERRUPT in pending:
                pending.discard(Request.INTERRUPT)
                yield from self._suspend()
            elif Request.FIRE in pending:
                pending.discard(Request.FIRE)
                if between_steps:
                    yield from self._fire_requested()
                else:
                    is_put_off = True
            elif Request.PAUSE in pending:
                yield Effect.PAUSE
            elif Request.MAKE_ROOM in pending:
                pending.discard(Request.MAKE_ROOM)
                while requests.deferred_backpressure:
                    yield requests.deferred_backpressure.pop()
        if is_put_off:
            pending.add(Request.FIRE)

    def _fire_requested(self) -> LoopGenerator:
        while self._requests.to_fire:
            yield from self._dispatch(self._requests.to_fire.popleft())

    def _take_no_more_requests(self) -> LoopGenerator:
        """Serve those that came in time. Who comes later is told so: no run is under way."""
        self._requests.phase = Phase.IDLE
        yield from self._fire_requested()

    def _suspend(self) -> LoopGenerator:
        """Leave the run in its middle."""
        raise NotImplementedError

    def _change_data(self) -> LoopGenerator:
        """Put other data in the place of what there is."""
        raise NotImplementedError

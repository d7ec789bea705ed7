"""Attending: the half of the loop that fires its events, and sees to what was asked of it meanwhile."""

from typing import Any

from aengine.bus import Bus
from aengine.control import Control, Phase, Request
from aengine.state import State, StopReason
from aengine.story import Signal, Story


class Terminated(Exception):
    """The run is to end here."""

    def __init__(self, reason: StopReason) -> None:
        self.reason = reason


class EpochTerminated(Exception):
    """The epoch is to end here."""


class Attending:
    """What the loop does between two lines of its story."""

    def __init__(self, engine: Any, state: State, bus: Bus, control: Control) -> None:
        self._engine = engine
        self._state = state
        self._bus = bus
        self._control = control

    def _fire(self, name: str) -> Story:
        yield from self._dispatch(name)
        yield from self._attend()

    def _dispatch(self, name: str, *payload: Any) -> Story:
        self._bus.stopwatch.weight = 1
        topic = self._bus.topic(name)
        topic.mark_fired_by_loop()
        count = self._bus.next_count(topic)
        if count >= topic.due:
            yield from topic.publish(self._engine, count, payload) or ()

    def _attend(self, *, between_steps: bool = True) -> Story:  # noqa: C901, PLR0912 -- a branch a request
        """See to what was asked, until nothing is asked that keeps the loop from going on."""
        control = self._control
        asked, is_put_off = control.asked, False
        if control.to_fire:
            asked.add(Request.FIRE)
        while asked:
            if Request.HALT in asked:
                asked.discard(Request.HALT)
                yield Signal.HALT
            elif Request.CHANGE_DATA in asked:
                asked.discard(Request.CHANGE_DATA)
                yield from self._change_data()
            elif Request.TERMINATE in asked:
                raise Terminated(StopReason.TERMINATED)
            elif Request.TERMINATE_EPOCH in asked:
                asked.discard(Request.TERMINATE_EPOCH)
                if control.phase is Phase.ITERATING:
                    raise EpochTerminated
            elif Request.INTERRUPT in asked:
                asked.discard(Request.INTERRUPT)
                yield from self._suspend()
            elif Request.FIRE in asked:
                asked.discard(Request.FIRE)
                if between_steps:
                    yield from self._fire_requested()
                else:
                    is_put_off = True
            elif Request.PAUSE in asked:
                yield Signal.PAUSE
            elif Request.MAKE_ROOM in asked:
                asked.discard(Request.MAKE_ROOM)
                while control.owed:
                    yield control.owed.pop()
        if is_put_off:
            asked.add(Request.FIRE)

    def _fire_requested(self) -> Story:
        while self._control.to_fire:
            yield from self._dispatch(self._control.to_fire.popleft())

    def _take_no_more_requests(self) -> Story:
        """Serve those that came in time. Who comes later is told so: no run is under way."""
        self._control.phase = Phase.IDLE
        yield from self._fire_requested()

    def _suspend(self) -> Story:
        """Leave the run in its middle."""
        raise NotImplementedError

    def _change_data(self) -> Story:
        """Put other data in the place of what there is."""
        raise NotImplementedError

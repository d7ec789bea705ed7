"""Random runs, stopped at random, again and again: together they make the steps of one run that nothing stopped."""

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from hypothesis import example, given, settings, strategies as st
from support.record import EVENTS, AnyEngine, Boom, Steps
from support.resume_cases import KINDS, STOPS

from aengine import Engine, StopReason

LETTERS = ("S", "ES", "GS", "DSI", "GC", "IS", "step", "IC", "EC")


@dataclass(frozen=True)
class Stop:
    """Stops the run when it is at this event for the n-th time; goes on in memory, or in a new engine."""

    letters: str
    nth: int
    how: str
    is_saved: bool


@dataclass(frozen=True)
class Plan:
    """A run, and its stops."""

    kind: str
    length: int
    prefetch: int
    limits: dict[str, int]
    ended_epoch: int | None
    stops: tuple[Stop, ...]


plans = st.builds(
    Plan,
    kind=st.sampled_from(list(KINDS)),
    length=st.integers(1, 4),
    prefetch=st.sampled_from([0, 0, 0, 1, 3]),
    limits=st.builds(
        lambda name, limit, length: {name: limit} | ({"epoch_length": length} if length else {}),
        st.sampled_from(["max_epochs", "max_iters"]),
        st.integers(1, 6),
        st.none() | st.integers(1, 5),
    ),
    ended_epoch=st.none() | st.integers(1, 6),
    stops=st.lists(
        st.builds(Stop, st.sampled_from(LETTERS), st.integers(1, 4), st.sampled_from(list(STOPS)), st.booleans()),
        max_size=4,
    ).map(tuple),
)


class Stopper:
    """Stops an engine as the plan says, one stop a run."""

    def __init__(self, plan: Plan) -> None:
        self.steps: Steps = []
        self._plan = plan
        self._stop: Stop | None = None
        self._left = 0

    def engine(self) -> AnyEngine:
        """Return an engine that makes the steps, ends an epoch early if it is to, and looks for the stop."""
        engine: AnyEngine = Engine(self._step)
        for letters in LETTERS:
            if letters != "step":
                engine.add_event_handler(EVENTS[letters], self._look, letters)
        return engine

    def _look(self, engine: AnyEngine, letters: str) -> None:
        stop = self._stop
        if stop is None or letters != stop.letters:
            return
        if letters in ("step", "IC") and engine.state.iteration == self._plan.ended_epoch:
            return  # what ends the run would hide what ends the epoch
        self._left -= 1
        if self._left == 0:
            STOPS[stop.how](engine)

    def _step(self, engine: AnyEngine, batch: int) -> int:
        self._look(engine, "step")
        self.steps.append((engine.state.epoch, engine.state.iteration, batch))
        if engine.state.iteration == self._plan.ended_epoch:
            engine.terminate_epoch()
        return batch

    def run(self, engine: AnyEngine, data: Any, stop: Stop | None) -> None:
        """Run to the stop, or to the end."""
        self._stop, self._left = stop, stop.nth if stop else 0
        with suppress(Boom, KeyboardInterrupt):
            engine.run_sync(data, prefetch=self._plan.prefetch, **self._plan.limits)


def tell_in_one(plan: Plan) -> Steps:
    """Return the steps of the run that nothing stops."""
    stopper = Stopper(replace(plan, prefetch=0))
    stopper.run(stopper.engine(), KINDS["list"](plan.length), None)
    return stopper.steps


@settings(max_examples=200)
@given(plans)
@example(Plan("async", 2, 0, {"max_epochs": 1}, None, (Stop("GC", 1, "interrupt", is_saved=False),)))
@example(Plan("async", 3, 2, {"max_epochs": 2}, None, (Stop("step", 2, "interrupt", is_saved=False),)))
@example(Plan("stateful", 3, 2, {"max_epochs": 2}, None, (Stop("step", 2, "interrupt", is_saved=False),)))
@example(Plan("list", 3, 2, {"max_epochs": 2}, 2, (Stop("EC", 1, "terminate", is_saved=False),)))
def test_random_stops_make_the_steps_of_one_run(plan: Plan) -> None:
    whole = tell_in_one(plan)
    stopper = Stopper(plan)
    engine, data = stopper.engine(), KINDS[plan.kind](plan.length)
    for stop in (*plan.stops, None):
        stopper.run(engine, data, stop)
        if engine.state.stop_reason is StopReason.COMPLETED or len(stopper.steps) == len(whole):
            break
        assert engine.state_dict()["iteration"] == stopper.steps[-1][1] if stopper.steps else True
        if stop is not None and stop.is_saved:
            saved = json.loads(json.dumps(engine.state_dict()))
            engine, data = stopper.engine(), KINDS[plan.kind](plan.length)
            engine.load_state_dict(saved)
    assert stopper.steps == whole


@settings(max_examples=100)
@given(plans)
def test_random_stops_lose_and_repeat_nothing_of_a_one_shot_iterator(plan: Plan) -> None:
    """There is one, and it cannot be put back, so all is in memory: what was fetched and not stepped on is kept."""
    data = count()
    stopper = Stopper(plan)
    engine = stopper.engine()
    limits = {"epoch_length": 3, **plan.limits}
    stopper._plan = replace(plan, limits=limits)
    for stop in (*plan.stops, None):
        stopper.run(engine, data, stop)
        if engine.state.stop_reason is StopReason.COMPLETED:
            break
    assert [batch for *_, batch in stopper.steps] == list(range(len(stopper.steps)))
    assert engine.state.stop_reason is StopReason.COMPLETED

"""What is no state of an engine, or lies past its own end, is refused, and changes nothing."""

from typing import Any

import pytest
from support.record import AnyEngine, double

from aengine import Engine, EventEnum

GOOD: dict[str, Any] = {"iteration": 4, "max_epochs": 3, "epoch_length": 2}


class Backward(EventEnum):
    BACKWARD_DONE = "backward_done"


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        ([1, 2], TypeError, r"load_state_dict\(\) takes what an engine's state_dict\(\) returned, a dictionary; got"),
        (None, TypeError, "a dictionary; got None"),
        ({**GOOD, "iteration": "4"}, ValueError, '"iteration" in the state_dict is a whole number'),
        ({**GOOD, "iteration": None}, ValueError, '"iteration" in the state_dict is a whole number'),
        ({**GOOD, "iteration": -1}, ValueError, '"iteration" in the state_dict is a whole number'),
        ({**GOOD, "max_epochs": 2.5}, ValueError, '"max_epochs" in the state_dict is a whole number'),
        ({**GOOD, "epoch_length": [2]}, ValueError, '"epoch_length" in the state_dict is a whole number'),
        ({**GOOD, "iteration": 7}, ValueError, r"past its own end: 4 epochs, and max_epochs is 3\. Set"),
        ({"epoch": 5, "max_epochs": 3, "epoch_length": 10}, ValueError, "past its own end: 5 epochs"),
        ({"iteration": 9, "max_iters": 8, "epoch_length": 2}, ValueError, "past its own end: 9 iterations"),
    ],
)
def test_what_is_no_state_of_an_engine_is_refused(wrong: Any, kind: type[Exception], says: str) -> None:
    engine: AnyEngine = Engine(double)
    with pytest.raises(kind, match=says):
        engine.load_state_dict(wrong)
    assert (engine.state.iteration, engine.state.max_epochs, engine.state.max_iters) == (0, None, None)


@pytest.mark.parametrize("saved", [GOOD, {**GOOD, "iteration": 6}, {"epoch": 3, "max_epochs": 3, "epoch_length": 2}])
def test_what_lies_at_its_end_or_before_is_loaded(saved: dict[str, Any]) -> None:
    engine: AnyEngine = Engine(double)
    engine.load_state_dict(saved)
    engine.run_sync([1, 2])
    assert engine.state.iteration == 6


def test_a_saved_state_of_ours_that_was_changed_to_lie_past_its_end_is_refused() -> None:
    first: AnyEngine = Engine(double)
    first.run_sync([1, 2], max_epochs=3)
    saved = {**first.state_dict(), "max_epochs": 2}
    with pytest.raises(ValueError, match="past its own end: 3 epochs, and max_epochs is 2"):
        Engine(double).load_state_dict(saved)


@pytest.mark.parametrize(
    ("events", "event_to_attr", "kind", "says"),
    [
        ([Backward], None, TypeError, r"takes names and members of a subclass of EventEnum.*write \*Backward"),
        ([1], None, TypeError, "takes names and members of a subclass of EventEnum, got 1"),
        ([*Backward], ["steps"], TypeError, r"event_to_attr= is a dictionary of events to attributes.*got \['steps'\]"),
        ([*Backward], {1: "steps"}, TypeError, "event_to_attr= maps an event to the name of an attribute.*got 1"),
        ([*Backward], {Backward.BACKWARD_DONE: 1}, TypeError, "event_to_attr= maps an event to the name"),
        (
            [*Backward],
            {"OTHER": "others"},
            ValueError,
            "event_to_attr= names the event 'OTHER', which is not registered",
        ),
    ],
)
def test_what_is_no_event_or_attribute_is_not_registered(
    events: list[Any], event_to_attr: Any, kind: type[Exception], says: str
) -> None:
    engine: AnyEngine = Engine(double)
    with pytest.raises(kind, match=says):
        engine.register_events(*events, event_to_attr=event_to_attr)
    assert not engine.has_registered_events("BACKWARD_DONE")
    assert not hasattr(engine.state, "others")

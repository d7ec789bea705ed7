"""Engine, State, Event and Stream are generic when they run, too, with parameters that may be left out."""

import copy
import pickle
from typing import Any, TypeVar, get_args

import pytest

from aengine import Data, Engine, Event, Events, State, Stream

T = TypeVar("T")


@pytest.mark.parametrize(
    ("alias", "parameters"),
    [
        (Engine[int], (int, Any)),
        (Engine[int, str], (int, str)),
        (State[int], (int, Any)),
        (Event[int], (int, type(None))),
        (Event[int, str], (int, str)),
        (Event[T], (T, type(None))),  # type: ignore[valid-type]  # of no class
        (Event[T][int], (int, type(None))),  # type: ignore[valid-type]  # likewise
        (Stream[int], (int, type(None))),
    ],
    ids=repr,
)
def test_parameters_that_are_left_out_have_their_defaults(alias: Any, parameters: tuple[Any, ...]) -> None:
    assert get_args(alias) == parameters


def test_too_many_parameters_are_refused() -> None:
    for kind in (Engine, State, Event, Stream):
        several: Any = kind
        with pytest.raises(TypeError, match="Too many"):
            several[int, int, int]


def test_what_is_made_by_an_alias_is_what_the_class_makes() -> None:
    class Own(Engine[int, int]):
        """An engine of one's own."""

    kinds: list[Any] = [Engine[int, int], Own]
    for kind in kinds:
        engine = kind(lambda _, batch: batch)
        engine.state = State[int, int](seed=3)
        assert (engine.run_sync([1, 2]).output, engine.state.seed) == (2, 3)
        assert "__orig" not in repr(engine.state)
    data: Any = Data
    assert get_args(data[int])


def test_event_travels_to_another_process() -> None:
    """With what it says of its metrics, which it still keeps from being changed."""
    engine: Engine[int, int] = Engine(lambda _, batch: batch)
    seen: list[Event[int]] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: engine.state.metrics.update(loss=0.5))
    engine.subscribe(Events.ITERATION_COMPLETED, seen.append)
    engine.run_sync([1, 2])
    for copied in (pickle.loads(pickle.dumps(seen[1])), copy.deepcopy(seen[1])):
        assert type(copied) is Event
        assert tuple(copied) == tuple(seen[1])
        with pytest.raises(TypeError, match="does not support item assignment"):
            copied.metrics["loss"] = 0.0  # type: ignore[index]  # that is refused


async def test_an_event_is_a_tuple_that_is_equal_to_itself_alone() -> None:
    engine = Engine(lambda _, batch: batch)
    events: list[Event[Any, Any]] = []
    engine.subscribe(Events.ITERATION_COMPLETED, events.append)
    await engine.run([1, 2])
    assert isinstance(events[0], Event)
    assert isinstance(events[0], tuple)
    assert events[0] != Event(*events[0])
    assert events[0].engine_name == engine.name

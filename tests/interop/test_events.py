"""pytorch-ignite's events on our engine: filters, joined with ours, and what looks into an engine of theirs."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ignite import ignite
from support.record import AnyEngine, double

from aengine import Engine, EventEnum, Events
from aengine.training import create_supervised_evaluator

Theirs: Any = ignite.engine.Events
theirs: Any = ignite.engine.Engine
IC: Any = Theirs.ITERATION_COMPLETED


class Own(EventEnum):
    FIRST = "first"


FILTERS: list[dict[str, Any]] = [
    {"every": 2},
    {"once": 3},
    {"once": [2, 5]},
    {"before": 4},
    {"after": 4},
    {"before": 7, "after": 2},
    {"every": 3, "after": 2},
    {"every": 2, "before": 8, "after": 1},
    {"every": 1},
]


@pytest.mark.parametrize("arguments", FILTERS)
@pytest.mark.parametrize("made_anew", [IC, Events.ITERATION_COMPLETED], ids=["theirs", "ours"])
def test_filter_of_theirs_is_found_and_removed_by_an_equal_one(arguments: Any, made_anew: Any) -> None:
    engine: AnyEngine = Engine(double)
    seen: list[int] = []

    def note(engine: AnyEngine) -> None:
        seen.append(engine.state.iteration)

    engine.add_event_handler(IC(**arguments), note)
    assert engine.has_event_handler(note, made_anew(**arguments))
    assert not engine.has_event_handler(note, made_anew(every=11))
    with pytest.raises(ValueError, match="does not listen to"):
        engine.remove_event_handler(note, made_anew(every=11))
    engine.remove_event_handler(note, made_anew(**arguments))
    assert not engine.has_event_handler(note)


@pytest.mark.parametrize("arguments", FILTERS)
def test_filter_of_theirs_fires_as_on_their_engine(arguments: Any) -> None:
    seen: dict[str, list[int]] = {}
    for make in (theirs, Engine):
        engine: Any = make(double)
        counts = seen.setdefault(type(engine).__module__, [])
        engine.add_event_handler(IC(**arguments), lambda engine, counts=counts: counts.append(engine.state.iteration))
        engine.add_event_handler(
            Theirs.GET_BATCH_STARTED(**arguments), lambda engine, counts=counts: counts.append(-engine.state.iteration)
        )
        (engine.run_sync if isinstance(engine, Engine) else engine.run)([1, 2, 3], max_epochs=3)
    assert seen["aengine.engine"] == seen["ignite.engine.engine"]


def test_filter_function_of_theirs_is_found_by_itself() -> None:
    engine: AnyEngine = Engine(double)
    engine.add_event_handler(IC(event_filter=is_odd), double, 1)
    assert engine.has_event_handler(double, IC(event_filter=is_odd))
    engine.remove_event_handler(double, Events.ITERATION_COMPLETED(event_filter=is_odd))
    assert not engine.has_event_handler(double)


def is_odd(engine: Any, event: int) -> bool:
    return event % 2 == 1


# Joined by |


def several(kind: Any) -> Any:
    return kind.EPOCH_STARTED | kind.EPOCH_COMPLETED(every=2)


@pytest.mark.parametrize("ours", [lambda: Events.STARTED, lambda: Events.STARTED(once=1), lambda: several(Events)])
@pytest.mark.parametrize(
    "theirs", [lambda: Theirs.COMPLETED, lambda: Theirs.COMPLETED(once=1), lambda: several(Theirs)]
)
@pytest.mark.parametrize("ours_first", [True, False])
def test_events_of_both_are_joined_in_either_order(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    ours_first: bool,  # noqa: FBT001 -- pytest passes it by name
) -> None:
    joined: Any = ours() | theirs() if ours_first else theirs() | ours()
    engine: AnyEngine = Engine(double)
    engine.add_event_handler(joined, double, 1)
    each = [one.event for event in (ours, theirs) for one in listening_to(event())]
    assert sorted(one.event for one in engine.listeners()) == sorted(each)


def listening_to(event: Any) -> Any:
    engine: AnyEngine = Engine(double)
    engine.add_event_handler(event, double, 1)
    return engine.listeners()


@pytest.mark.parametrize("event", [Events.STARTED, Own.FIRST, Events.STARTED(every=2), Events.STARTED | Own.FIRST])
def test_what_joins_theirs_is_shown_copied_and_pickled_as_what_it_is(event: Any) -> None:
    for one in (pickle.loads(pickle.dumps(event)), copy.copy(event), copy.deepcopy(event)):
        assert type(one) is type(event)
        assert repr(one) == repr(event)
    assert isinstance(event, type(event))
    assert repr(Own.FIRST) == "<Own.FIRST: 'first'>"
    assert str(Own.FIRST) == f"{Own.FIRST}" == "Own.FIRST"
    assert isinstance(Own.FIRST, EventEnum)
    assert Own("first") is Own.FIRST
    assert Own.FIRST in Own


# What looks into their engine


@pytest.mark.parametrize("name", ["_allowed_events", "_event_handlers", "_fire_event", "_process_function"])
def test_private_names_of_their_engine_say_how_to_show_ours_as_one(name: str) -> None:
    engine: Any = Engine(double)
    with pytest.raises(AttributeError, match=rf"'{name}' is inside of pytorch-ignite's engine.*as_ignite\(engine\)"):
        getattr(engine, name)
    assert not hasattr(engine, name)
    with pytest.raises(AttributeError, match="has no attribute '_other'"):
        _ = engine._other


def test_their_progress_bar_says_how() -> None:
    engine: Any = Engine(double)
    with pytest.raises(AttributeError, match=r"as_ignite\(engine\)"):
        ignite.handlers.ProgressBar().attach(engine)


def test_their_metric_is_not_one_for_our_evaluator() -> None:
    metrics: Any = {"accuracy": ignite.metrics.Accuracy()}
    model = torch.nn.Linear(1, 1)
    message = r"Accuracy is pytorch-ignite's, .*metric\.attach\(as_ignite\(engine\), 'accuracy'\)"
    with pytest.raises(TypeError, match=message):
        create_supervised_evaluator(model, metrics)


# The last event, as theirs


@pytest.mark.parametrize("listens", [True, False])
def test_last_event_at_the_ends_of_runs_and_epochs_is_theirs(*, listens: bool) -> None:
    seen: dict[str, list[Any]] = {}
    for make in (theirs, Engine):
        engine: Any = make(double)
        run = engine.run_sync if isinstance(engine, Engine) else engine.run
        last = seen.setdefault(type(engine).__module__, [])
        if listens:
            for event in (Theirs.EPOCH_STARTED, Theirs.EPOCH_COMPLETED, Theirs.COMPLETED):
                engine.add_event_handler(event, lambda engine, last=last: last.append(engine.last_event_name.name))
        run([1, 2], max_epochs=2)
        last.append(engine.last_event_name.name)
        engine.add_event_handler(IC(once=5), lambda engine: engine.terminate())
        run([1, 2], max_epochs=3)
        last.append(engine.last_event_name.name)
    assert seen["aengine.engine"] == seen["ignite.engine.engine"]
    assert seen["aengine.engine"][-1] == "COMPLETED"

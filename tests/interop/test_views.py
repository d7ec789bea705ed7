"""Our engine seen as one of pytorch-ignite's: what asks for that type, or looks into it, works as it does there."""

import gc
import importlib
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from anyio.lowlevel import checkpoint as breathe
from support.ignite import ignite
from support.ignite_parity import MakeEngine, same_on_both

import aengine
from aengine import Engine, Events, StopReason
from aengine.engine import stateful_listeners
from aengine.interop.ignite import as_ignite

handlers: Any = ignite.handlers
THEIRS: Any = ignite.engine.Events


def nothing(engine: Any, batch: Any) -> None: ...


def view_of(engine: Any) -> Any:
    return as_ignite(engine)


# The view


def test_view_is_an_engine_of_ignites_and_keeps_nothing_of_its_own() -> None:
    engine: Any = Engine(nothing, name="ours")
    view: Any = view_of(engine)
    assert isinstance(view, ignite.engine.Engine)
    assert not isinstance(engine, ignite.engine.Engine)
    assert view.state is engine.state
    view.state_dict_user_keys.append("weight")
    logger: Any = object()
    view.logger = logger
    assert engine.state_dict_user_keys == ["weight"]
    assert engine.logger is logger
    assert "ours" in repr(view)


def test_views_of_one_engine_are_equal_and_those_of_two_are_not() -> None:
    engine: Any = Engine(nothing)
    assert view_of(engine) == view_of(engine)
    assert len({view_of(engine), view_of(engine)}) == 1
    assert view_of(engine) != view_of(Engine(nothing))
    assert view_of(engine) != engine


def test_what_is_ignites_already_is_returned_as_it_is() -> None:
    theirs: Any = ignite.engine.Engine(nothing)
    view = view_of(Engine(nothing))
    assert as_ignite(theirs) is theirs
    assert as_ignite(view) is view


def test_what_is_no_engine_is_refused() -> None:
    with pytest.raises(TypeError, match=r"aengine\.Engine.*got 'trainer'"):
        view_of("trainer")


def test_inside_of_ignites_engine_that_is_not_shown_is_named() -> None:
    view = view_of(Engine(nothing))
    with pytest.raises(AttributeError, match=r"'_process_function' is inside.*public, and _allowed_events"):
        view._process_function(view, 1)
    assert not hasattr(view, "_internal_run_generator")
    with pytest.raises(AttributeError, match="no attribute 'run_as_legacy'"):
        _ = view.run_as_legacy


def test_view_keeps_no_engine_alive() -> None:
    engine: Any = Engine(nothing)
    view_of(engine).add_event_handler(THEIRS.EPOCH_COMPLETED, lambda engine: None)
    engine.run_sync([1])
    left = weakref.ref(engine)
    gc.disable()  # by reference count: no cycle holds it
    try:
        del engine
        assert left() is None
    finally:
        gc.enable()


def test_view_knows_the_events_that_are_registered() -> None:
    engine: Any = Engine(nothing)
    engine.register_events("half")
    allowed = view_of(engine)._allowed_events
    assert all(event in allowed for event in THEIRS)
    assert "half" in allowed
    assert aengine.Events.CANCELLED in allowed
    assert "quarter" not in allowed


async def test_handlers_are_given_what_they_were_attached_through_and_run_in_one_order() -> None:
    given: list[tuple[str, type]] = []
    engine: Any = Engine(nothing)
    view = view_of(engine)

    def note(engine: Any, which: str) -> None:
        given.append((which, type(engine)))

    async def wait(engine: Any) -> None:
        await breathe()
        given.append(("async", type(engine)))

    assert view.on(THEIRS.COMPLETED, "first")(note) is note
    engine.add_event_handler(THEIRS.COMPLETED, note, "second")
    view.add_event_handler(THEIRS.COMPLETED, wait)
    view.add_event_handler(THEIRS.COMPLETED, lambda: given.append(("without", type(None))))
    await engine.run([1])
    assert given == [("first", type(view)), ("second", Engine), ("async", type(view)), ("without", type(None))]


def test_handlers_attached_through_the_view_are_found_and_removed_through_either() -> None:
    engine: Any = Engine(nothing)
    view = view_of(engine)
    calls: list[int] = []

    def note() -> None:
        calls.append(1)

    event = THEIRS.ITERATION_COMPLETED(every=2)
    view.add_event_handler(event, note)
    assert engine.has_event_handler(note, event)
    engine.remove_event_handler(note, event)
    assert not view.has_event_handler(note)
    with view.add_event_handler(THEIRS.ITERATION_COMPLETED | THEIRS.COMPLETED, note):
        engine.run_sync([1])
    assert calls == [1, 1]
    assert not engine.has_event_handler(note)


async def test_handler_gets_a_view_in_the_place_of_its_engine_only() -> None:
    given: list[Any] = []
    trainer: Any = Engine(nothing, name="trainer")
    evaluator: Any = Engine(nothing, name="evaluator")
    view_of(trainer).add_event_handler(Events.COMPLETED, given.append, evaluator)
    view_of(trainer).add_event_handler(Events.COMPLETED, lambda engine, other: given.extend([engine, other]), evaluator)
    await trainer.run([1])
    assert given[0] is given[2] is evaluator
    assert given[1] == view_of(trainer)


def test_handlers_attached_through_the_view_keep_what_is_known_of_them() -> None:
    class Counting:
        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state_dict: Any) -> None: ...

        def __call__(self, engine: Any) -> None: ...

        async def wait(self, engine: Any) -> None: ...

    engine: Any = Engine(nothing)
    view, counting = view_of(engine), Counting()
    view.add_event_handler(Events.COMPLETED, counting)
    assert stateful_listeners(engine) == [counting]
    view.add_event_handler("COMPLETED", counting.wait)
    with pytest.raises(RuntimeError, match=r"async inline handler"):  # known to be async before it is called
        engine.fire_event(Events.COMPLETED)
    with pytest.raises(TypeError, match="has a yield in it"):
        view.add_event_handler(Events.COMPLETED, lambda engine: (yield))
    with pytest.raises(TypeError, match=r"handler nothing\(engine: Any, batch: Any\).*cannot be called as"):
        view.add_event_handler(Events.COMPLETED, nothing)
    assert set(engine.statistics().handlers) == {
        f"{test_handlers_attached_through_the_view_keep_what_is_known_of_them.__name__}.<locals>.{name}"
        for name in ("Counting", "Counting.wait")
    }


def test_event_that_is_not_registered_is_refused_as_the_engine_does() -> None:
    with pytest.raises(ValueError, match="has no event 'half'"):
        view_of(Engine(nothing)).add_event_handler("half", nothing)


def test_run_of_the_view_blocks_as_ignites_does() -> None:
    engine: Any = Engine(lambda engine, batch: batch * 2)
    evaluator = view_of(Engine(lambda engine, batch: batch + 1))
    outputs: list[int] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: outputs.append(evaluator.run([1, 2]).output))
    state = view_of(engine).run([1, 2], max_epochs=2)
    assert (state.output, state.epoch) == (4, 2)
    assert outputs == [3, 3]


async def test_run_of_the_view_refuses_to_block_an_event_loop() -> None:
    with pytest.raises(RuntimeError, match=r"await engine\.run"):
        view_of(Engine(nothing)).run([1])


def test_what_to_install_is_said_where_ignite_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ignite.engine", None)
    monkeypatch.delitem(sys.modules, "aengine.interop.ignite")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pytorch-ignite>=0\.5"'):
        importlib.import_module("aengine.interop.ignite")


# EarlyStopping


async def test_trainer_is_stopped_when_ignite_stops_it() -> None:
    def scenario(make: MakeEngine) -> tuple[Any, Callable[[], Any]]:
        scores = iter([0.1, 0.3, 0.2, 0.4, 0.3, 0.35, 0.1, 0.1, 0.1])
        trainer = make(nothing)
        seen: list[Any] = []
        stopping = handlers.EarlyStopping(2, lambda engine: next(scores), view_of(trainer))
        stopping.attach(trainer, THEIRS.EPOCH_COMPLETED)
        trainer.add_event_handler(
            THEIRS.EPOCH_COMPLETED, lambda engine: seen.append((engine.state.epoch, stopping.counter))
        )
        return trainer, lambda: seen

    seen = await same_on_both(scenario, [1, 2], max_epochs=9)
    assert seen == [(1, 0), (2, 0), (3, 1), (4, 0), (5, 1), (6, 2)]


async def test_trainer_is_stopped_by_the_score_of_an_evaluator_that_is_awaited() -> None:
    scores = iter([0.1, 0.3, 0.2, 0.2, 0.2, 0.2])
    trainer: Any = Engine(nothing)
    evaluator: Any = Engine(nothing)
    evaluator.add_event_handler(
        Events.COMPLETED, handlers.EarlyStopping(2, lambda engine: next(scores), view_of(trainer))
    )

    async def evaluate() -> None:
        await evaluator.run([1])

    trainer.add_event_handler(Events.EPOCH_COMPLETED, evaluate)
    state = await trainer.run([1, 2], max_epochs=6)
    assert (state.epoch, state.stop_reason) == (4, StopReason.TERMINATED)


def test_early_stopping_refuses_our_engine_itself() -> None:
    with pytest.raises(TypeError, match="instance of Engine"):
        handlers.EarlyStopping(2, lambda engine: 1.0, Engine(nothing))


# What is not supported


@pytest.mark.parametrize("profiler", ["HandlersTimeProfiler", "BasicTimeProfiler"])
def test_profilers_that_exchange_handlers_are_refused_and_others_named(profiler: str) -> None:
    engine: Any = Engine(nothing)
    with pytest.raises(AttributeError, match=rf"{profiler}.*engine\.statistics\(\).*aengine\.handlers\.Profiler"):
        getattr(handlers, profiler)().attach(view_of(engine))
    engine.run_sync([1])  # and nothing of it is left behind
    assert engine.statistics().handlers == {}

"""Our engine seen as one of pytorch-ignite's: what asks for that type, or looks into it, works as it does there."""

import gc
import importlib
import sys
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint as breathe
from support.ignite import ignite
from support.ignite_parity import Make, told_by_both

import aengine
from aengine import Engine, Events, StopReason
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
    with pytest.raises(AttributeError, match=r"'_process_function' is inside.*_event_handlers and _allowed_events"):
        view._process_function(view, 1)
    assert not hasattr(view, "_internal_run_generator")
    with pytest.raises(AttributeError, match="no attribute 'run_as_legacy'"):
        _ = view.run_as_legacy


def test_view_keeps_no_engine_alive_that_nobody_else_holds() -> None:
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
    def story(make: Make) -> tuple[Any, Callable[[], Any]]:
        scores = iter([0.1, 0.3, 0.2, 0.4, 0.3, 0.35, 0.1, 0.1, 0.1])
        trainer = make(nothing)
        seen: list[Any] = []
        stopping = handlers.EarlyStopping(2, lambda engine: next(scores), view_of(trainer))
        stopping.attach(trainer, THEIRS.EPOCH_COMPLETED)
        trainer.add_event_handler(
            THEIRS.EPOCH_COMPLETED, lambda engine: seen.append((engine.state.epoch, stopping.counter))
        )
        return trainer, lambda: seen

    seen = await told_by_both(story, [1, 2], max_epochs=9)
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


# The profilers


def with_handlers(make: Make) -> Any:
    engine = make(nothing)

    def twice() -> None: ...
    def once(engine: Any) -> None: ...

    engine.add_event_handler(THEIRS.STARTED, once)
    engine.add_event_handler(THEIRS.STARTED | THEIRS.COMPLETED, twice)
    engine.add_event_handler(THEIRS.EPOCH_COMPLETED, handlers.EpochOutputStore().reset)
    engine.add_event_handler(THEIRS.ITERATION_COMPLETED, handlers.TerminateOnNan(lambda output: 0.0))
    engine.add_event_handler(THEIRS.ITERATION_STARTED, twice)
    return engine


async def test_basic_profiler_collects_and_prints_what_it_does_there(capsys: pytest.CaptureFixture[str]) -> None:
    def story(make: Make) -> tuple[Any, Callable[[], Any]]:
        engine = with_handlers(make)
        profiler = handlers.BasicTimeProfiler()
        profiler.attach(view_of(engine))
        profiler.attach(view_of(engine))

        def told() -> Any:
            results = profiler.get_results()
            profiler.print_results(results)
            times = {event.name: (times > 0).tolist() for event, times in profiler.event_handlers_times.items()}
            table = view_of(engine)._event_handlers
            left = [(event.name, [row[0] for row in table[event] if "Profiler" in repr(row[0])]) for event in THEIRS]
            return (
                profiler.event_handlers_names,
                times,
                (profiler.processing_times > 0).tolist(),
                (profiler.dataflow_times > 0).tolist(),
                list(results["event_handlers_stats"]),
                [(name, len(found)) for name, found in left],
                [line for line in capsys.readouterr().out.splitlines() if line.startswith(("-", "|", "total"))],
            )

        return engine, told

    names, times, processing, dataflow, _, left, printed = await told_by_both(story, [1, 2, 3], max_epochs=2)
    assert [len(one.split(".")) for one in names[THEIRS.STARTED]] == [3, 3]
    assert times["STARTED"] == times["COMPLETED"] == [True]
    assert processing == dataflow == [True] * 6
    assert dict(left)["STARTED"] == 1
    assert sum(count for _, count in left) == 1
    assert any("TerminateOnNan" in line for line in printed)


async def test_handlers_profiler_collects_and_prints_what_it_does_there(capsys: pytest.CaptureFixture[str]) -> None:
    def story(make: Make) -> tuple[Any, Callable[[], Any]]:
        engine = with_handlers(make)
        profiler = handlers.HandlersTimeProfiler()
        profiler.attach(view_of(engine))

        def told() -> Any:
            results = profiler.get_results()
            profiler.print_results(results)
            calls = {
                (getattr(event, "name", event), name): len(times)
                for event, by_name in profiler.event_handlers_times.items()
                for name, times in by_name.items()
            }
            printed = capsys.readouterr().out.splitlines()
            return (
                calls,
                [row[0] for row in results],
                (len(profiler.processing_times), len(profiler.dataflow_times)),
                [line.split()[:2] for line in printed if line and not line.startswith(("-", "Total"))],
            )

        return engine, told

    calls, rows, (processing, dataflow), printed = await told_by_both(story, [1, 2, 3], max_epochs=2)
    assert calls["ITERATION_COMPLETED", "TerminateOnNan"] == 6
    assert {name.rpartition(".")[2] for event, name in calls if event == "STARTED"} == {"once", "twice"}
    assert set(calls.values()) == {1, 2, 6}
    assert (processing, dataflow) == (6, 6)
    assert rows[-3:] == ["Total", "Processing", "Dataflow"]
    assert ["TerminateOnNan", "ITERATION_COMPLETED"] in printed


async def test_both_profilers_profile_one_engine() -> None:
    def story(make: Make) -> tuple[Any, Callable[[], Any]]:
        engine = with_handlers(make)
        basic, by_handler = handlers.BasicTimeProfiler(), handlers.HandlersTimeProfiler()
        by_handler.attach(view_of(engine))
        basic.attach(view_of(engine))
        return engine, lambda: (
            basic.event_handlers_names[THEIRS.STARTED],
            {event.name: list(by_name) for event, by_name in by_handler.event_handlers_times.items() if by_name},
        )

    _, names = await told_by_both(story, [1, 2], max_epochs=2)
    assert "TerminateOnNan" in names["ITERATION_COMPLETED"]


async def test_events_of_ones_own_are_profiled() -> None:
    class Own(ignite.engine.EventEnum):
        HALF = "half"

    def step(engine: Any, batch: Any) -> None:
        engine.fire_event(Own.HALF)

    def story(make: Make) -> tuple[Any, Callable[[], Any]]:
        engine = make(step)
        engine.register_events(*Own)
        engine.add_event_handler(Own.HALF, nothing_at_all)
        profiler = handlers.HandlersTimeProfiler()
        profiler.attach(view_of(engine))
        return engine, lambda: {name: len(times) for name, times in profiler.event_handlers_times[Own.HALF].items()}

    assert await told_by_both(story, [1, 2], max_epochs=2) == {"nothing_at_all": 4}


def nothing_at_all() -> None: ...


async def test_async_handler_is_awaited_under_the_profiler_and_after_it() -> None:
    awaited: list[int] = []
    engine: Any = Engine(nothing)

    async def wait(engine: Any) -> None:
        await breathe()
        awaited.append(engine.state.epoch)

    engine.add_event_handler(Events.EPOCH_COMPLETED, wait)
    profiler = handlers.HandlersTimeProfiler()
    profiler.attach(view_of(engine))
    for _ in range(2):
        await engine.run([1], max_epochs=2)
    assert awaited == [1, 2, 1, 2]
    ((times),) = profiler.event_handlers_times[THEIRS.EPOCH_COMPLETED].values()
    assert len(times) == 2


async def test_filtered_handler_keeps_its_filter_under_the_profiler() -> None:
    called: list[int] = []
    engine: Any = Engine(nothing)
    event = Events.ITERATION_COMPLETED(every=3)
    handle = engine.add_event_handler(event, lambda engine: called.append(engine.state.iteration))
    profiler = handlers.HandlersTimeProfiler()
    profiler.attach(view_of(engine))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=7), handle.remove)
    await engine.run(range(10))
    assert called == [3, 6]
    assert [len(times) for times in profiler.event_handlers_times[event].values()] == [2, 1]


def test_exception_reaches_its_handler_under_the_profiler() -> None:
    told: list[BaseException] = []
    counted: list[int] = []

    def count(iter_counter: int) -> None:
        counted.append(iter_counter)

    def fail(engine: Any, batch: int) -> None:
        if batch == 2:
            raise ZeroDivisionError

    engine: Any = Engine(fail)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: told.append(error))
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, count)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda engine: engine.terminate_epoch())
    handlers.HandlersTimeProfiler().attach(view_of(engine))
    with pytest.raises(ZeroDivisionError) as caught:
        engine.run_sync(iter([1, 2]), max_epochs=2, epoch_length=2)
    assert told == [caught.value]
    assert counted == [1]


# The table of handlers, as its users beyond ignite would meet it


def test_table_lists_the_events_and_handlers_of_the_engine() -> None:
    engine: Any = Engine(nothing)
    engine.register_events("half")
    engine.add_event_handler("half", nothing_at_all)
    view = view_of(engine)
    table = view._event_handlers
    assert [event for event in THEIRS if event not in view._allowed_events] == []
    assert len(table) == len(view._allowed_events) == len(THEIRS) + 2  # CANCELLED, and the one of our own
    assert "half" in table
    assert aengine.Events.CANCELLED in table
    assert "quarter" not in table
    assert [repr(function) for function, _, _ in table["half"]] == [repr(nothing_at_all)]
    assert [repr(function) for function, _, _ in table["half"][:1]] == [repr(nothing_at_all)]


def test_handler_that_is_exchanged_for_another_is_called_no_more() -> None:
    calls: list[str] = []
    engine: Any = Engine(nothing)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: calls.append("first"))
    rows = view_of(engine)._event_handlers[THEIRS.ITERATION_COMPLETED]

    def exchange() -> None:
        rows[0] = (lambda engine, name: calls.append(name), ("second",), {})

    engine.add_event_handler(Events.STARTED, exchange)
    engine.run_sync(range(100))  # most of them untimed, which is another path
    assert calls == ["second"] * 100


def test_handlers_are_added_and_exchanged_within_the_dispatch_under_way() -> None:
    calls: list[str] = []
    engine: Any = Engine(nothing)
    rows = view_of(engine)._event_handlers[THEIRS.STARTED]

    def arrange() -> None:
        rows[1] = (lambda: calls.append("exchanged"), (), {})
        rows.append((lambda: calls.append("appended"), (), {}))

    engine.add_event_handler(Events.STARTED, lambda: calls.append("as it was"))
    rows.insert(0, (arrange, (), {}))
    engine.run_sync([1])
    assert calls == ["exchanged", "appended"]


def test_handlers_of_others_are_still_added_from_the_next_dispatch_on() -> None:
    calls: list[str] = []
    engine: Any = Engine(nothing)
    rows = view_of(engine)._event_handlers[THEIRS.EPOCH_STARTED]
    rows.insert(0, (lambda: engine.add_event_handler(Events.EPOCH_STARTED, calls.append, "late"), (), {}))
    engine.run_sync([1], max_epochs=1)
    assert calls == []


def test_profiled_engine_runs_on_every_backend(anyio_backend: Any) -> None:
    engine: Any = with_handlers(Engine)
    profiler = handlers.BasicTimeProfiler()
    profiler.attach(view_of(engine))
    for _ in range(2):  # it takes its places anew
        anyio.run(engine.run, [1, 2], backend=anyio_backend[0], backend_options=anyio_backend[1])
        assert (profiler.processing_times > 0).all()
        assert profiler.event_handlers_times[THEIRS.STARTED] > 0

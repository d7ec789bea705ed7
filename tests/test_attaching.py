"""The rule of attaching, in all that listens: one engine, once; what attach() returns removes all of it again."""

import ast
import gc
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import anyio
import anyio.to_thread
import pytest
import torch
from support.ignite import ignite
from support.record import AnyEngine
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MeanMetric

import aengine
from aengine import Engine, Event, Events, RemovableEventHandle, Service
from aengine.checkpoint import Checkpoint
from aengine.engine import stateful_listeners
from aengine.handlers import (
    Deadline,
    EarlyStopping,
    NanGuard,
    Profiler,
    ProgressBar,
    SystemStatistics,
    TimeLimit,
    Timeline,
    Timer,
)
from aengine.lazy import PACKAGES
from aengine.loggers import Instrumentation, Tracker
from aengine.training import AverageHandler, GradientStatistics, MetricHandler, OptimizerUpdate, SchedulerHandler


class Row(NamedTuple):
    """Something that attaches.

    Attributes:
        make: returns it; of a folder of the test's.
        events: what attach() takes after the engine, beside what it takes by default.
        wrong: likewise, with an event that the engine does not have; nothing where no event is taken.
        further: an event that may be added on its own engine, where that is allowed.
    """

    make: Callable[[Path], Any]
    events: tuple[Any, ...] = ()
    wrong: tuple[Any, ...] = ()
    further: Any = None


class Shown:
    """A display, and its bar, which draws nothing."""

    is_quiet = False

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def bar(self, unit: str) -> Self:
        return self

    def begin(self, name: str, count: int, total: int | None) -> None: ...

    def show(self, count: int, text: str) -> None: ...

    def close(self) -> None: ...


def build() -> tuple[torch.nn.Module, SGD]:
    model = torch.nn.Linear(1, 1)
    return model, SGD(model.parameters(), lr=0.1)


def scheduler() -> StepLR:
    optimizer = build()[1]
    made = StepLR(optimizer, 1)
    optimizer.step()  # torch warns of a scheduler that steps first
    return made


def average() -> AverageHandler:
    model = build()[0]
    return AverageHandler(AveragedModel(model), model)


ROWS: dict[str, Row] = {
    "AverageHandler": Row(lambda _: average(), wrong=("MINE",)),
    "Checkpoint": Row(
        lambda folder: Checkpoint(folder, {}),
        events=(Events.EPOCH_COMPLETED,),
        wrong=("MINE",),
        further=Events.COMPLETED,
    ),
    "Deadline": Row(lambda _: Deadline(datetime(2100, 1, 1, tzinfo=UTC))),
    "EarlyStopping": Row(lambda _: EarlyStopping(3, lambda engine: 1.0, mode="min"), wrong=("MINE",)),
    "GradientStatistics": Row(lambda _: GradientStatistics(*build())),
    "Instrumentation": Row(lambda _: Instrumentation()),
    "MetricHandler": Row(lambda _: MetricHandler(MeanMetric(), "mean")),
    "NanGuard": Row(lambda _: NanGuard()),
    "OptimizerUpdate": Row(lambda _: OptimizerUpdate(*build())),
    "Profiler": Row(
        lambda folder: Profiler(folder, activities=[torch.profiler.ProfilerActivity.CPU]),
        events=(Events.ITERATION_STARTED(once=(2, 6)),),
        wrong=("MINE",),
        further=Events.ITERATION_STARTED(once=1000),
    ),
    "ProgressBar": Row(lambda _: ProgressBar(Shown(), every=timedelta(microseconds=1))),
    "SchedulerHandler": Row(
        lambda _: SchedulerHandler(scheduler()), events=(Events.ITERATION_COMPLETED,), wrong=("MINE",)
    ),
    "SystemStatistics": Row(lambda _: SystemStatistics()),
    "TimeLimit": Row(lambda _: TimeLimit(1000)),
    "Timeline": Row(lambda _: Timeline(limit=2)),
    "Timer": Row(lambda _: Timer(), wrong=(Events.STARTED, Events.COMPLETED, "MINE")),
    "Tracker": Row(lambda _: Tracker(lambda records: None), wrong=("MINE",)),
}


def rows(chosen: Callable[[Row], Any] = lambda _: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items() if chosen(row)])


def engine_named(name: str = "trainer", **options: Any) -> AnyEngine:
    return Engine(lambda engine, batch: float(batch), name=name, **options)


def on(engine: AnyEngine) -> tuple[Any, ...]:
    """Return all that listens to an engine: what listeners() shows, what it does not, and what is saved with it."""
    statistics = engine.statistics()
    inside = [one for topic in engine._emitter.bus.topics for one in topic.inline]
    services = [one.name for one in statistics.services]
    return engine.listeners(), services, list(statistics.handlers), len(inside), stateful_listeners(engine)


def test_table_has_everything_that_attaches() -> None:
    folders = [Path(aengine.__file__).parent.joinpath(*package.split(".")[1:]) for package in PACKAGES]
    trees = [ast.parse(path.read_text()) for folder in folders for path in folder.glob("*.py")]
    classes = [one for tree in trees for one in ast.walk(tree) if isinstance(one, ast.ClassDef)]
    attaching = {one.name for one in classes if any(getattr(part, "name", "") == "attach" for part in one.body)}
    assert attaching == ROWS.keys()


@rows()
def test_what_attach_returns_removes_all_of_it_and_it_may_be_attached_again(row: Row, tmp_path: Path) -> None:
    made = row.make(tmp_path)
    for engine in (engine_named("trainer"), engine_named("evaluator")):
        before = on(engine)
        handle = made.attach(engine, *row.events)
        assert type(handle) is RemovableEventHandle
        assert on(engine) != before
        handle.remove()
        assert on(engine) == before
        handle.remove()
        with made.attach(engine, *row.events) as entered:
            assert type(entered) is RemovableEventHandle
            handle.remove()  # of the time before: it has no effect on this one
            assert on(engine) != before
        assert on(engine) == before


@rows()
def test_second_attachment_is_refused_alike_and_adds_nothing(row: Row, tmp_path: Path) -> None:
    made, engine, other = row.make(tmp_path), engine_named("trainer"), engine_named("evaluator")
    handle = made.attach(engine, *row.events)
    text = f"this {type(made).__name__} is attached to engine 'trainer' already: make another one, or remove() what"
    for second in (other,) if row.further else (other, engine):
        before = on(second)
        with pytest.raises(RuntimeError) as caught:
            made.attach(second, *row.events)
        assert str(caught.value).startswith(text)
        assert on(second) == before
    handle.remove()
    made.attach(other, *row.events)


@rows(lambda row: row.further is not None)
def test_some_take_further_events_of_their_own_engine(row: Row, tmp_path: Path) -> None:
    made, engine = row.make(tmp_path), engine_named("trainer")
    before = on(engine)
    handle = made.attach(engine, *row.events)
    one = on(engine)
    further = made.attach(engine, row.further)
    handle.remove()
    assert len(on(engine)[0]) == len(one[0])
    with pytest.raises(RuntimeError, match="is attached to engine 'trainer' already"):
        made.attach(engine_named("evaluator"), *row.events)
    further.remove()
    assert on(engine) == before
    made.attach(engine_named("evaluator"), *row.events)


IGNITES = ignite.engine.Engine(lambda engine, batch: None)


@rows()
@pytest.mark.parametrize(
    "wrong", [IGNITES, Events.STARTED, "trainer", None, Engine], ids=["ignite's", "event", "name", "None", "class"]
)
def test_what_is_no_engine_is_refused_alike(row: Row, wrong: Any, tmp_path: Path) -> None:
    made = row.make(tmp_path)
    with pytest.raises(TypeError, match=rf"^{type(made).__name__}\.attach\(engine.*\) takes an Engine of aengine's"):
        made.attach(wrong, *row.events)
    made.attach(engine_named(), *row.events)  # it is not attached yet


@rows(lambda row: row.wrong)
def test_event_that_the_engine_does_not_have_adds_nothing(row: Row, tmp_path: Path) -> None:
    made, engine = row.make(tmp_path), engine_named()
    before = on(engine)
    with pytest.raises(ValueError, match="MINE"):
        made.attach(engine, *row.wrong)
    assert on(engine) == before
    made.attach(engine, *row.events)


# During a run, and after it


@rows()
@pytest.mark.parametrize(
    ("place", "where"),
    [("worker", "inline"), ("worker", "another thread"), ("loop", "inline"), ("loop", "another thread")],
)
async def test_removed_and_attached_again_during_a_run(
    row: Row, place: str, where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    made, engine = row.make(tmp_path), engine_named(thread=place == "worker")
    before: list[Any] = []
    seen: list[Any] = []
    handles = [made.attach(engine, *row.events)]

    def remove(*_: Any) -> None:
        handles.pop().remove()

    def attach(*_: Any) -> None:
        handles.append(made.attach(engine, *row.events))

    for iteration, act in ((3, remove), (5, attach), (7, remove)):
        event = Events.ITERATION_COMPLETED(once=iteration)
        if where == "inline":
            engine.add_event_handler(event, act)
        else:
            engine.add_event_handler(event, partial(anyio.to_thread.run_sync, act))

    @engine.on(Events.ITERATION_COMPLETED(once=(4, 8)))
    async def look() -> None:
        await engine.flush()  # a Tracker still writes what it has taken
        seen.append(on(engine))

    remove()
    before.append(on(engine))
    attach()
    state = await engine.run(range(8))
    assert state.iteration == 8
    for then in (*seen, on(engine)):
        # What has run has seconds in the statistics, be it there or not.
        assert [*then[:2], *then[3:]] == [*before[0][:2], *before[0][3:]]
    assert not caplog.records
    made.attach(engine_named("evaluator"), *row.events)


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@rows()
@pytest.mark.parametrize("removed", [False, True], ids=["attached", "removed"])
@pytest.mark.usefixtures("without_collector")
def test_engine_is_freed_at_once_while_it_and_its_handle_are_kept(row: Row, removed: bool, tmp_path: Path) -> None:  # noqa: FBT001 -- pytest passes it by name
    made, engine = row.make(tmp_path), engine_named()
    handle = made.attach(engine, *row.events)
    engine.run_sync([1, 2, 3, 4, 5])
    if removed:
        handle.remove()
    gone = weakref.ref(engine)
    del engine
    assert gone() is None
    if not removed:
        handle.remove()


# What they are made of


ADDING: dict[str, Callable[[AnyEngine], RemovableEventHandle]] = {
    "add_event_handler": lambda engine: engine.add_event_handler(Events.STARTED | Events.COMPLETED, lambda: None),
    "subscribe": lambda engine: engine.subscribe(Events.STARTED, lambda event: None),
    "add_service": lambda engine: engine.add_service(Service()),
}


@pytest.mark.parametrize("add", ADDING.values(), ids=ADDING)
def test_whatever_adds_something_returns_what_removes_it(add: Callable[[AnyEngine], RemovableEventHandle]) -> None:
    engine = engine_named()
    before = on(engine)
    with add(engine) as handle:
        assert type(handle) is RemovableEventHandle
        assert on(engine) != before
    assert on(engine) == before
    handle.remove()
    assert on(engine) == before


def test_decorators_return_the_function_as_it_was() -> None:
    def show() -> None: ...

    def send(event: Event) -> None: ...

    engine = engine_named()
    assert engine.on(Events.STARTED)(show) is show
    assert engine.subscribe(Events.STARTED)(send) is send


def test_metric_of_two_engines_is_right_one_after_the_other_and_refused_one_within_the_other() -> None:
    metric = MeanMetric()
    trainer, evaluator = engine_named("trainer", thread=False), engine_named("evaluator", thread=False)
    for engine in (trainer, evaluator):
        MetricHandler(metric, "mean").attach(engine)
    for _ in range(2):  # as pytorch-ignite's users do it, with one dictionary of metrics for two evaluators
        assert math.isclose(trainer.run_sync([1.0, 2.0], max_epochs=2).metrics["mean"], 1.5)
        assert math.isclose(evaluator.run_sync([5.0]).metrics["mean"], 5.0)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: evaluator.run_sync([7.0]))
    with pytest.raises(RuntimeError, match=r"engine 'evaluator' has begun .* make another MeanMetric"):
        trainer.run_sync([1.0, 2.0])

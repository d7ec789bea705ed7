"""A Tracker attached and removed: what was taken is written, the sink is closed, and the run goes on without it."""

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import anyio
import anyio.to_thread
import pytest
from support.record import Boom
from support.sinks import Holding, warnings_of

from aengine import Engine, Events, RemovableEventHandle, StopReason
from aengine.loggers import Record, Tracker

AnyEngine: TypeAlias = Engine[Any, Any]


class Listening:
    """A sink that notes what it is told, in order: the steps of records, ends, closings. Raises while it is down."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.is_down = False

    def run_started(self, engine_name: str, time: float) -> None:
        self.seen.append(f"{engine_name} started")

    def write(self, records: Sequence[Record]) -> None:
        if self.is_down:
            raise Boom
        self.seen.extend(record.step for record in records)

    def run_ended(self, engine_name: str, time: float, reason: StopReason) -> None:
        self.seen.append(f"{engine_name} {reason}")

    def close(self) -> None:
        self.seen.append("close")

    @property
    def steps(self) -> list[int]:
        return [one for one in self.seen if isinstance(one, int)]


class Async(Listening):
    async def write(self, records: Sequence[Record]) -> None:  # type: ignore[override]
        await anyio.lowlevel.checkpoint()
        super().write(records)

    async def close(self) -> None:  # type: ignore[override]
        await anyio.lowlevel.checkpoint()
        super().close()


class Held(Holding, Listening):
    """A sink whose calls wait for the test."""


def same(engine: AnyEngine, batch: int) -> int:
    return batch


def account(tracker: Tracker) -> tuple[int, int, int, int]:
    now = tracker.statistics()
    return now.taken, now.written, now.dropped, now.waiting


# Removed during the run


def by_handler(engine: AnyEngine, remove: Callable[[], None]) -> None:
    engine.add_event_handler(Events.ITERATION_STARTED(once=3), remove)


def by_handler_of_the_event(engine: AnyEngine, remove: Callable[[], None]) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), remove)


def by_async_handler(engine: AnyEngine, remove: Callable[[], None]) -> None:
    async def remove_here(_: AnyEngine) -> None:
        remove()

    engine.add_event_handler(Events.ITERATION_STARTED(once=3), remove_here)


def by_subscriber(engine: AnyEngine, remove: Callable[[], None]) -> None:
    engine.subscribe(Events.ITERATION_COMPLETED(once=3), lambda event: remove())


def by_async_subscriber(engine: AnyEngine, remove: Callable[[], None]) -> None:
    async def remove_here(event: object) -> None:
        remove()

    engine.subscribe(Events.ITERATION_COMPLETED(once=3), remove_here)


def by_thread(engine: AnyEngine, remove: Callable[[], None]) -> None:
    async def remove_there(_: AnyEngine) -> None:
        await anyio.to_thread.run_sync(remove)

    engine.add_event_handler(Events.ITERATION_STARTED(once=3), remove_there)


@pytest.mark.parametrize("make", [Listening, Async])
@pytest.mark.parametrize(
    "remove_by",
    [by_handler, by_handler_of_the_event, by_async_handler, by_subscriber, by_async_subscriber, by_thread],
)
@pytest.mark.parametrize("thread", [True, False])
async def test_removed_during_the_run_it_has_all_written_and_the_sink_closed_while_the_run_goes_on(
    remove_by: Callable[[AnyEngine, Callable[[], None]], None], make: Callable[[], Listening], *, thread: bool
) -> None:
    sink, engine = make(), Engine(same, name="trainer", thread=thread)
    tracker = Tracker(sink)
    handle = tracker.attach(engine, Events.ITERATION_COMPLETED)
    removed, after = threading.Event(), list[Any]()

    def remove() -> None:
        handle.remove()
        removed.set()

    remove_by(engine, remove)

    @engine.on(Events.ITERATION_STARTED)
    async def look() -> None:  # as soon as it is removed
        await anyio.lowlevel.checkpoint()
        if removed.is_set() and not after:
            await engine.flush()
            after.extend(sink.seen)
            assert engine.statistics().services == ()
            engine.terminate()

    await engine.run(itertools.count(), epoch_length=10**9)
    steps = sink.steps
    assert after == ["trainer started", *steps, "trainer interrupted", "close"]
    assert sink.seen == after  # nothing of the end of the run
    assert steps == [*range(1, len(steps) + 1)]
    assert len(steps) >= 2
    assert remove_by not in (by_handler, by_handler_of_the_event, by_async_handler) or len(steps) == 2
    assert account(tracker) == (len(steps), len(steps), 0, 0)


async def until_gone(engine: AnyEngine) -> None:
    while engine.statistics().services:
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("kind", ["down", "hangs"])
async def test_sink_that_does_not_take_the_rest_has_its_time_and_holds_up_no_step(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Held()
    if kind == "down":
        sink.go_on.set()
        sink.is_down = True
    engine: AnyEngine = Engine(same, name="trainer")
    tracker = Tracker(sink, shutdown_timeout=timedelta(seconds=0.05))
    handle = tracker.attach(engine, Events.ITERATION_COMPLETED)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    async def until_busy() -> None:
        await anyio.to_thread.run_sync(sink.is_busy.wait)

    @engine.on(Events.ITERATION_STARTED(once=4))
    async def remove() -> None:
        handle.remove()
        await engine.flush()
        assert engine.statistics().services == ()

    try:
        await engine.run(range(5))
    finally:
        sink.go_on.set()
    assert account(tracker) == (3, 0, 0, 3)
    assert "the tracker is removed, and of 3 records" in warnings_of(caplog)[-1]
    assert "3 not written: these are lost" in warnings_of(caplog)[-1]
    assert sink.seen[:2] == ["trainer started", "trainer interrupted"]
    assert engine.state.stop_reason is StopReason.COMPLETED


async def test_sink_whose_errors_fail_the_run_does_so_when_the_rest_is_written() -> None:
    sink, engine = Listening(), Engine(same, name="trainer")
    sink.is_down = True
    engine.register_events("mine")

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    def log_once() -> None:
        with Tracker(sink, on_error="raise").attach(engine, "mine"):
            engine.fire_event("mine")

    with pytest.raises(Boom):
        await engine.run(itertools.count(), epoch_length=10**9)
    assert sink.seen[-1] == "close"
    assert engine.statistics().services == ()


@pytest.mark.parametrize("skip", [False, True])
async def test_removed_as_the_run_ends_it_reports_why_that_ended(*, skip: bool) -> None:
    sink, engine = Listening(), Engine(same, name="trainer")
    handle = Tracker(sink).attach(engine, Events.ITERATION_COMPLETED)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate, skip_completed=skip)
    engine.add_event_handler(Events.TERMINATE if skip else Events.COMPLETED, handle.remove)
    await engine.run(range(5))
    # An observer, which ends the records, comes after the handler that removes it.
    reason = "interrupted" if skip else "terminated"
    assert [one for one in sink.seen if one != "close"] == ["trainer started", 1, 2, f"trainer {reason}"]
    assert sink.seen[-1] == "close"
    assert engine.statistics().services == ()


@pytest.mark.parametrize("thread", [True, False])
async def test_attached_and_removed_in_one_handler_of_a_run_it_has_all_written(*, thread: bool) -> None:
    sink, engine = Listening(), Engine(same, name="trainer", thread=thread)
    engine.register_events("mine")
    tracker = Tracker(sink)

    @engine.on(Events.ITERATION_STARTED(once=2))
    def log_once() -> None:
        with tracker.attach(engine, "mine"):
            engine.fire_event("mine")
        engine.fire_event("mine")  # of which nothing is taken

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), until_gone)
    await engine.run(range(5))
    assert sink.seen == ["trainer started", 2, "trainer interrupted", "close"]
    assert account(tracker) == (1, 1, 0, 0)


def test_attached_and_removed_in_a_run_without_an_event_loop_it_has_one_opened() -> None:
    sink, engine = Listening(), Engine(same, name="trainer")
    tracker = Tracker(sink)

    @engine.on(Events.ITERATION_STARTED(once=2))
    def log_once() -> None:
        with tracker.attach(engine, Events.STARTED):
            engine.fire_event(Events.STARTED)

    engine.run_sync(range(5))
    assert sink.seen == ["trainer started", 2, "trainer interrupted", "close"]
    assert account(tracker) == (1, 1, 0, 0)


async def test_removed_it_can_be_attached_again_in_the_same_run_and_to_another_engine() -> None:
    sink, engine, other = Listening(), Engine(same, name="trainer"), Engine(same, name="other")
    tracker = Tracker(sink)
    handles = [tracker.attach(engine, Events.ITERATION_COMPLETED)]

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def attach_again() -> None:
        handles.pop().remove()
        handles.append(tracker.attach(engine, Events.EPOCH_COMPLETED))

    await engine.run(range(5))
    assert sorted(sink.steps) == [1, 5]
    assert account(tracker) == (1, 1, 0, 0)  # since it was attached
    handles.pop().remove()
    tracker.attach(other)
    sink.seen.clear()
    await engine.run(range(5), max_epochs=2)
    assert sink.seen == []
    await other.run([7])
    assert sink.seen == ["other started", 1, 1, "other completed", "close"]


async def test_sink_that_another_tracker_uses_goes_on_with_that() -> None:
    sink, engine = Listening(), Engine(same, name="trainer")
    handle = Tracker(sink).attach(engine, Events.ITERATION_COMPLETED(every=2))
    Tracker(sink).attach(engine, Events.ITERATION_COMPLETED)

    @engine.on(Events.ITERATION_STARTED(once=3))
    async def remove() -> None:
        handle.remove()
        while len(engine.statistics().services) > 1:
            await anyio.lowlevel.checkpoint()

    await engine.run(range(4))
    assert sorted(sink.steps) == [1, 2, 2, 3, 4]
    assert sink.seen.count("close") == 2
    assert sink.seen[-2:] == ["trainer completed", "close"]


# Removed between runs


async def test_removed_between_runs_nothing_is_left_and_what_was_not_written_is_lost_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink, engine = Listening(), Engine(same, name="trainer")
    sink.is_down = True
    tracker = Tracker(sink, shutdown_timeout=0.0)
    handle = tracker.attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2])
    sink.is_down = False
    caplog.clear()
    handle.remove()
    handle.remove()
    assert engine.statistics().services == ()
    assert account(tracker) == (2, 0, 0, 2)
    assert warnings_of(caplog) == [
        f"the tracker is removed, and of 2 records for {tracker.name} 0 were dropped and 2 not written: these are lost"
    ]
    await engine.run([1, 2], max_epochs=2)
    assert sink.seen == ["trainer started", "trainer completed", "close"]


async def test_run_that_was_interrupted_has_ended_for_a_sink_whose_tracker_is_removed() -> None:
    sink, engine = Listening(), Engine(same, name="trainer")
    handle = Tracker(sink).attach(engine, Events.ITERATION_COMPLETED)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    await engine.run([1, 2, 3])
    assert sink.seen == ["trainer started", 1, 2, "close"]
    handle.remove()
    assert sink.seen == ["trainer started", 1, 2, "close", "trainer interrupted"]
    await engine.run()
    assert sink.steps == [1, 2]


@pytest.mark.parametrize("is_kept", [False, True])
async def test_engine_is_freed_by_reference_count_though_the_handle_is_kept(*, is_kept: bool) -> None:
    sink, engine = Listening(), Engine(same, name="trainer", thread=False)
    tracker = Tracker(sink)
    handle: RemovableEventHandle | None = tracker.attach(engine)
    if not is_kept:
        handle = None
    await engine.run([1])
    is_alive = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        for _ in range(3):  # what the run has scheduled on the event loop
            await anyio.lowlevel.checkpoint()
        assert is_alive() is None
    finally:
        gc.enable()
    if handle is not None:
        handle.remove()
    tracker_of_next = tracker if is_kept else Tracker(sink)
    tracker_of_next.attach(Engine(same))


# Attached once, as a whole


def test_tracker_serves_one_engine_once() -> None:
    engine, other = Engine(same, name="trainer"), Engine(same, name="other")
    tracker = Tracker(Listening())
    handle = tracker.attach(engine)
    for one in (engine, other):
        with pytest.raises(RuntimeError, match=r"this Tracker is attached to engine 'trainer' already: make another"):
            tracker.attach(one, Events.COMPLETED)
        assert len(one.statistics().services) == (one is engine)
    handle.remove()
    tracker.attach(other)


@pytest.mark.parametrize(
    ("error", "event", "message"),
    [
        (ValueError, "ITERATION_COMPLETE", "no event 'ITERATION_COMPLETE'"),
        (ValueError, Events.COMPLETED | "MINE", "no event 'MINE'"),
        (TypeError, 10, "expected an event"),
        (TypeError, print, "expected an event"),
    ],
)
def test_attachment_to_no_event_of_the_engine_adds_nothing(error: type[Exception], event: Any, message: str) -> None:
    engine: AnyEngine = Engine(same)
    tracker = Tracker(Listening())
    with pytest.raises(error, match=message):
        tracker.attach(engine, event)
    assert engine.statistics().services == ()
    assert engine.listeners() == ()
    tracker.attach(engine)


@pytest.mark.filterwarnings("error")
def test_warning_of_one_name_names_the_call_and_where_it_is_an_error_nothing_is_attached() -> None:
    sink = Listening()
    first, second = Engine(same, name="evaluator"), Engine(same, name="evaluator")
    handle = Tracker(sink).attach(first)
    tracker = Tracker(sink)
    with pytest.raises(UserWarning, match="two engines of the name 'evaluator'"):
        tracker.attach(second)
    assert second.listeners() == ()
    with pytest.warns(UserWarning, match="two engines of the name 'evaluator'") as warned:
        tracker.attach(second).remove()
    assert warned[0].filename == __file__
    handle.remove()  # which writes no more to it
    tracker.attach(second)

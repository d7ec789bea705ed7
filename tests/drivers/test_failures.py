"""An exception in every piece of the user's code: the very object comes out, told once, and nothing is left behind."""

import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import Any

import anyio
import anyio.from_thread
import pytest
from anyio.lowlevel import checkpoint
from support.backends import Backend
from support.ways_to_end import is_freed

from aengine import (
    Engine,
    EngineBusy,
    Event,
    EventEnum,
    Events,
    HandlerTimeout,
    InboxOverflow,
    StopReason,
)
from aengine.bus.inbox import Overflow

STEPS = ("worker", "here", "async")
DATA = [1, 2, 3, 4]

each_step = pytest.mark.parametrize("step", STEPS)


class Boom(Exception):
    """Raised on purpose, so that nothing else is mistaken for it."""


class Rig:
    """An engine that keeps what was stepped, fired and told, and whose step can be made to fail."""

    def __init__(self, step: str = "worker", *, grace: float = 10.0) -> None:
        self.stepped: list[Any] = []
        self.fired: list[str] = []
        self.told: list[BaseException] = []
        self.fail_at: Any = None
        self.error: BaseException = Boom("the step")
        self.engine: Engine[Any, Any] = Engine(
            self._step_async if step == "async" else self._step,
            name="tried",
            grace=grace,
            thread=step != "here",
        )
        for event in Events:
            self.engine.add_event_handler(event, self._record, event.name)
        self.engine.add_event_handler(Events.EXCEPTION_RAISED, self._tell)

    def _step(self, engine: Any, batch: Any) -> Any:
        if batch == self.fail_at:
            raise self.error
        self.stepped.append(batch)
        return batch

    async def _step_async(self, engine: Any, batch: Any) -> Any:
        await checkpoint()
        return self._step(engine, batch)

    def _record(self, engine: Any, *rest: Any) -> None:
        self.fired.append(rest[-1])

    def _tell(self, engine: Any, error: BaseException) -> None:
        self.told.append(error)

    def check_nothing_is_left(self) -> None:
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("aengine")]
        statistics = self.engine.statistics()
        assert not statistics.is_running
        for one in statistics.listeners:
            assert one.accepted == one.handled + one.dropped + one.discarded
            assert one.depth == 0

    async def fails(self, error: BaseException, *said: str, data: Any = DATA, **options: Any) -> None:
        """Run. This very error comes out, was told once, and one note has all that is to be said of it."""
        with anyio.fail_after(30), pytest.raises(type(error)) as caught:
            await self.engine.run(data, **options)
        assert caught.value is error
        assert error.__cause__ is None
        notes = error.__notes__
        assert len(notes) == 1
        assert [part for part in (*said, "engine 'tried'") if part not in notes[0]] == []
        assert self.told == [error]
        assert self.fired.count("EXCEPTION_RAISED") == 1
        assert "CANCELLED" not in self.fired
        assert self.engine.state.stop_reason is StopReason.FAILED
        self.check_nothing_is_left()

    async def goes_on(self, stepped: list[Any], data: Any = DATA, **options: Any) -> None:
        """Run again: in all these batches have been stepped then."""
        with anyio.fail_after(30):
            await self.engine.run(data, **options)
        assert self.stepped == stepped
        assert self.engine.state.stop_reason is StopReason.COMPLETED
        self.check_nothing_is_left()


# The step


@each_step
@pytest.mark.parametrize("error", [Boom("a"), ExceptionGroup("the user's own", [Boom("b")])], ids=["error", "group"])
async def test_what_the_step_raises_comes_out(step: str, error: Exception) -> None:
    rig = Rig(step)
    error.__notes__ = []
    rig.fail_at, rig.error = 3, error.with_traceback(None)
    await rig.fails(error, "the step", "epoch 1", "iteration 3")
    assert rig.stepped == [1, 2]
    assert rig.engine.state_dict()["iteration"] == 2, "the failed one is not counted"
    rig.fail_at = None
    await rig.goes_on(DATA)


@each_step
@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_the_end_of_an_iteration_raised_by_the_step_is_an_error(step: str, kind: type[Exception]) -> None:
    rig = Rig(step)
    rig.fail_at, rig.error = 2, kind("mine")
    with pytest.raises(RuntimeError) as caught:
        await rig.engine.run(DATA)
    assert caught.value.__cause__ is rig.error
    assert rig.told == [caught.value]
    assert rig.stepped == [1]
    assert rig.engine.state.stop_reason is StopReason.FAILED


@each_step
async def test_whoever_wants_to_go_on_catches_the_error_and_runs_again(step: str) -> None:
    rig = Rig(step)
    for batch in DATA:
        rig.fail_at = batch
        with pytest.raises(Boom):
            await rig.engine.run(DATA, max_epochs=2)
    rig.fail_at = None
    await rig.goes_on(DATA * 2, max_epochs=2)
    assert len(rig.told) == len(DATA)


def test_what_fails_under_run_sync_comes_out() -> None:
    rig = Rig()
    rig.fail_at = 3
    with pytest.raises(Boom) as caught:
        rig.engine.run_sync(DATA)
    assert caught.value is rig.error
    assert rig.told == [rig.error]
    assert len(rig.error.__notes__) == 1
    rig.fail_at = None
    rig.engine.run_sync(DATA)
    assert rig.stepped == DATA


# Inline handlers


def bring_about(event: Events, rig: Rig) -> None:
    """Have this event fired by a run of two epochs."""
    engine = rig.engine
    if event is Events.TERMINATE:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate)
    elif event is Events.TERMINATE_SINGLE_EPOCH:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate_epoch)
    elif event is Events.INTERRUPT:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)


def failing_handler(error: BaseException, *, is_async: bool) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    async def fail_async() -> None:
        await checkpoint()
        raise error

    return fail_async if is_async else fail


OF_A_RUN = [event for event in Events if event not in (Events.EXCEPTION_RAISED, Events.CANCELLED)]
is_or_is_not_async = pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])


@pytest.mark.covering(2)
@each_step
@is_or_is_not_async
@pytest.mark.parametrize("event", OF_A_RUN, ids=lambda event: event.name)
async def test_what_an_inline_handler_raises_comes_out(event: Events, step: str, *, is_async: bool) -> None:
    rig, error = Rig(step), Boom()
    bring_about(event, rig)
    after: list[str] = []
    handle = rig.engine.add_event_handler(event, failing_handler(error, is_async=is_async))
    rig.engine.add_event_handler(event, after.append, "called")
    await rig.fails(error, "fail", event.name, "epoch", "iteration", max_epochs=2)
    assert not after, "the handlers after it are not called"
    handle.remove()
    if rig.engine.state_dict()["iteration"] < 8:  # else it is done, and would begin anew
        await rig.goes_on(DATA * 2, max_epochs=2)


@each_step
@is_or_is_not_async
async def test_an_exception_raised_by_a_handler_of_exception_raised_comes_out_beside_the_first(
    step: str, *, is_async: bool
) -> None:
    rig, error = Rig(step), Boom("another")
    rig.fail_at = 2
    rig.engine.add_event_handler(Events.EXCEPTION_RAISED, failing_handler(error, is_async=is_async))
    after: list[BaseException] = []
    rig.engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: after.append(error))
    with anyio.fail_after(30), pytest.raises(ExceptionGroup) as caught:
        await rig.engine.run(DATA)
    assert list(caught.value.exceptions) == [rig.error, error]
    assert rig.told == after == [rig.error], "told once, and to those after the one that failed, too"
    assert "EXCEPTION_RAISED" in error.__notes__[0]
    rig.check_nothing_is_left()


@each_step
async def test_a_handler_of_exception_raised_that_raises_the_same_changes_nothing(step: str) -> None:
    rig = Rig(step)
    rig.fail_at = 2

    @rig.engine.on(Events.EXCEPTION_RAISED)
    def raise_it(engine: Any, error: BaseException) -> None:
        raise error

    with anyio.fail_after(30), pytest.raises(Boom) as caught:
        await rig.engine.run(DATA)
    assert caught.value is rig.error
    assert rig.told == [rig.error]


@each_step
@is_or_is_not_async
async def test_what_a_handler_of_cancelled_raises_is_logged_and_the_cancellation_goes_on(
    step: str, caplog: pytest.LogCaptureFixture, *, is_async: bool
) -> None:
    rig, error = Rig(step), Boom("in its wake")
    rig.engine.add_event_handler(Events.CANCELLED, failing_handler(error, is_async=is_async))
    after: list[str] = []
    rig.engine.add_event_handler(Events.CANCELLED, after.append, "called")
    with anyio.fail_after(30), anyio.CancelScope() as scope:
        rig.engine.add_event_handler(Events.ITERATION_COMPLETED, cancel_and_wait, scope)
        await rig.engine.run(DATA)
    assert scope.cancelled_caught
    assert after == ["called"]
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [error]
    assert not rig.told
    assert rig.engine.state.stop_reason is StopReason.CANCELLED
    rig.check_nothing_is_left()


async def cancel_and_wait(engine: Any, scope: anyio.CancelScope) -> None:
    scope.cancel()
    await checkpoint()


@pytest.mark.covering(2)
@each_step
@is_or_is_not_async
@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
@pytest.mark.parametrize("event", [Events.GET_BATCH_STARTED, Events.COMPLETED], ids=lambda event: event.name)
async def test_the_end_of_an_iteration_raised_by_a_handler_is_an_error(
    event: Events, kind: type[Exception], step: str, *, is_async: bool
) -> None:
    rig, error = Rig(step), kind("mine")
    rig.engine.add_event_handler(event, failing_handler(error, is_async=is_async))
    with anyio.fail_after(30), pytest.raises(RuntimeError) as caught:
        await rig.engine.run(DATA)
    assert caught.value.__cause__ is error
    assert rig.told == [caught.value]
    rig.check_nothing_is_left()


@each_step
@pytest.mark.parametrize("how", ["on", "subscribe"])
async def test_what_a_filter_raises_comes_out(step: str, how: str) -> None:
    rig, error = Rig(step), Boom()  # the filter is asked before its handler is known

    def choose(engine: Any, count: int) -> bool:
        if count == 3:
            raise error
        return True

    def listen(*rest: Any) -> None:
        return

    getattr(rig.engine, how)(Events.ITERATION_COMPLETED(event_filter=choose))(listen)
    await rig.fails(error, "listen", "ITERATION_COMPLETED", "epoch 1", "iteration 3")
    assert rig.stepped == [1, 2, 3]


@each_step
@is_or_is_not_async
async def test_what_a_snapshot_raises_comes_out(step: str, *, is_async: bool) -> None:
    rig, error = Rig(step), Boom()
    snapshot = failing_handler(error, is_async=is_async)

    @rig.engine.subscribe(Events.ITERATION_COMPLETED(once=2), snapshot=lambda engine: snapshot(), name="saves")
    async def save(event: Event) -> None:
        raise AssertionError("there is nothing to save")

    await rig.fails(error, "snapshot", "saves", "ITERATION_COMPLETED", "iteration 2")


class Own(EventEnum):
    MOVED = "moved"


@each_step
@is_or_is_not_async
async def test_what_a_handler_of_an_event_of_ones_own_raises_comes_out(step: str, *, is_async: bool) -> None:
    rig, error = Rig(step), Boom()
    rig.engine.register_events(*Own)
    rig.engine.add_event_handler(Own.MOVED, failing_handler(error, is_async=is_async))

    @rig.engine.on(Events.ITERATION_COMPLETED(once=2))
    async def move(engine: Engine[Any, Any]) -> None:
        await engine.emit(Own.MOVED)

    with anyio.fail_after(30), pytest.raises(Boom) as caught:
        await rig.engine.run(DATA)
    assert caught.value is error
    assert "MOVED" in error.__notes__[0]
    assert "ITERATION_COMPLETED" in error.__notes__[1]
    assert rig.told == [error]
    rig.check_nothing_is_left()


@is_or_is_not_async
async def test_what_a_handler_raises_comes_out_of_fire_event_on_the_worker(*, is_async: bool) -> None:
    rig, error, caught = Rig("worker"), Boom(), []
    rig.engine.register_events(*Own)
    rig.engine.add_event_handler(Own.MOVED, failing_handler(error, is_async=is_async))

    @rig.engine.on(Events.ITERATION_COMPLETED(once=2))
    def move(engine: Engine[Any, Any]) -> None:
        try:
            engine.fire_event(Own.MOVED)
        except Boom as one:
            caught.append(one)

    await rig.goes_on(DATA)
    assert caught == [error]


# Subscribers


@each_step
@is_or_is_not_async
async def test_what_a_subscriber_raises_comes_out(step: str, *, is_async: bool) -> None:
    rig, error = Rig(step), Boom()
    fail, seen = failing_handler(error, is_async=is_async), []

    def handle(event: Event) -> Any:
        return fail() if event.iteration == 3 else None

    async def handle_async(event: Event) -> None:
        if event.iteration == 3:
            await fail()

    rig.engine.subscribe(Events.ITERATION_COMPLETED, handle_async if is_async else handle, buffer=1, name="fails")

    @rig.engine.subscribe(Events.ITERATION_COMPLETED)
    async def see(event: Event) -> None:
        await checkpoint()
        seen.append(event.iteration)

    await rig.fails(error, "fails", "ITERATION_COMPLETED", "epoch 1", "iteration 3", data=range(1000))
    failed, other = rig.engine.statistics().listeners
    assert failed.errors == 1
    assert len(rig.stepped) < 1000
    assert seen == list(range(1, len(rig.stepped) + 1)), "the other one has handled all that it was sent"
    assert other.handled == other.accepted


@each_step
@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED], ids=lambda one: one.name)
async def test_what_a_subscriber_raises_at_either_end_comes_out_and_is_told(event: Events, step: str) -> None:
    rig, error = Rig(step), Boom()

    @rig.engine.subscribe(event)
    async def fail(one: Event) -> None:
        await checkpoint()
        raise error

    await rig.fails(error, "fail", event.name, "iteration")


@each_step
@is_or_is_not_async
async def test_a_subscriber_that_logs_its_errors_is_isolated_and_counted(
    step: str, caplog: pytest.LogCaptureFixture, *, is_async: bool
) -> None:
    rig, error, seen = Rig(step), Boom(), []
    fail = failing_handler(error, is_async=is_async)

    def handle(event: Event) -> Any:
        seen.append(event.iteration)
        return fail() if event.iteration % 2 else None

    async def handle_async(event: Event) -> None:
        seen.append(event.iteration)
        if event.iteration % 2:
            await fail()

    rig.engine.subscribe(Events.ITERATION_COMPLETED, handle_async if is_async else handle, on_error="log", name="odd")
    await rig.goes_on(DATA)
    assert seen == [1, 2, 3, 4]
    (statistics,) = rig.engine.statistics().listeners
    assert (statistics.errors, statistics.handled, statistics.discarded) == (2, 4, 0)
    logged = [record for record in caplog.records if record.exc_info and record.exc_info[1] is error]
    assert len(logged) == 2
    assert "odd" in logged[0].getMessage()
    assert "iteration 1" in logged[0].getMessage()
    assert not rig.told


@each_step
async def test_two_independent_failures_come_out_as_a_group(step: str) -> None:
    rig, error = Rig(step), Boom("the subscriber")
    has_failed = anyio.Event()
    rig.fail_at = 2

    @rig.engine.subscribe(Events.ITERATION_COMPLETED)
    async def fail(event: Event) -> None:
        await has_failed.wait()
        raise error

    @rig.engine.on(Events.EXCEPTION_RAISED)
    async def go_on(engine: Any, error: BaseException) -> None:
        has_failed.set()

    with anyio.fail_after(30), pytest.raises(ExceptionGroup) as caught:
        await rig.engine.run(DATA)
    assert set(caught.value.exceptions) == {rig.error, error}
    assert rig.told == [rig.error], "one firing, with the one that ended the run"
    assert "fail" in error.__notes__[0]
    rig.check_nothing_is_left()


@each_step
async def test_two_subscribers_that_fail_come_out_as_a_group(step: str) -> None:
    rig, errors = Rig(step), [Boom("one"), Boom("two")]
    for error in errors:
        rig.engine.subscribe(Events.ITERATION_COMPLETED, partial(raise_it, error))
    with anyio.fail_after(30), pytest.raises(ExceptionGroup) as caught:
        await rig.engine.run(DATA)
    assert set(caught.value.exceptions) == set(errors)
    assert len(rig.told) == 1
    assert rig.told[0] in errors
    rig.check_nothing_is_left()


def raise_it(error: BaseException, event: Event) -> None:
    raise error


@each_step
async def test_a_full_inbox_with_overflow_error_fails_the_run(step: str) -> None:
    rig, release = Rig(step), anyio.Event()

    @rig.engine.subscribe(Events.ITERATION_COMPLETED, buffer=2, overflow="error", name="slow")
    async def wait(event: Event) -> None:
        await release.wait()

    @rig.engine.on(Events.EXCEPTION_RAISED)
    async def go_on(engine: Any, error: BaseException) -> None:
        release.set()

    with anyio.fail_after(30), pytest.raises(InboxOverflow, match="'slow' is full") as caught:
        await rig.engine.run(range(1000))
    assert rig.told == [caught.value]
    assert 3 <= len(rig.stepped) <= 4, "two wait, and one may be in hand"
    (slow,) = rig.engine.statistics().listeners
    assert slow.dropped == 1
    rig.check_nothing_is_left()


# Subscribers that hang


@pytest.mark.covering(2)
@each_step
@is_or_is_not_async
@pytest.mark.parametrize("overflow", ["wait", "latest", "drop_oldest", "drop_new", "error"])
async def test_a_hung_subscriber_is_named_when_the_grace_is_over(
    step: str, overflow: Overflow, *, is_async: bool
) -> None:
    """Until then the run is none the worse for it."""
    rig, release = Rig(step, grace=0.2), threading.Event()

    async def hang_async(event: Event) -> None:
        await anyio.sleep_forever()

    def hang(event: Event) -> None:
        release.wait()

    seen: list[int] = []

    @rig.engine.subscribe(Events.ITERATION_COMPLETED)
    async def see(event: Event) -> None:
        seen.append(event.iteration)

    completed: list[float] = []
    rig.engine.add_event_handler(Events.COMPLETED, lambda: completed.append(perf_counter()))
    rig.engine.subscribe(
        Events.ITERATION_COMPLETED, hang_async if is_async else hang, overflow=overflow, buffer=64, name="hung"
    )
    try:
        with anyio.fail_after(30), pytest.raises(HandlerTimeout) as caught:
            await rig.engine.run(DATA)
        took = perf_counter() - completed[0]
    finally:
        release.set()
        for thread in threading.enumerate():  # that of the call which was left behind
            if thread.name == "aengine hung":
                thread.join(20)
    assert 0.19 <= took < 20
    assert rig.stepped == seen == DATA
    assert "hung" in str(caught.value)
    assert "ITERATION_COMPLETED" in str(caught.value)
    assert "epoch 1, iteration" in str(caught.value)
    assert "see" not in str(caught.value).split("busy:")[1]
    hung = rig.engine.statistics().listeners[1]
    assert hung.discarded + hung.dropped == hung.accepted == len(DATA)
    for thread in threading.enumerate():
        if thread.name == "aengine hung":
            thread.join(30)  # what hangs is abandoned: its thread ends by itself
    rig.check_nothing_is_left()


@each_step
async def test_a_hung_subscriber_stops_the_loop_when_its_inbox_is_full_and_terminate_still_ends_it(step: str) -> None:
    rig = Rig(step, grace=0.05)

    @rig.engine.subscribe(Events.ITERATION_COMPLETED, buffer=2)
    async def hang(event: Event) -> None:
        await anyio.sleep_forever()

    async def terminate() -> None:
        while rig.engine.statistics().listeners[0].accepted < 4:
            await checkpoint()
        await anyio.wait_all_tasks_blocked()
        rig.engine.terminate()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(terminate)
            with pytest.raises(HandlerTimeout, match="hang"):
                await rig.engine.run(range(1000))
    assert rig.fired[-3:] == ["TERMINATE", "COMPLETED", "EXCEPTION_RAISED"]
    assert rig.stepped == [0, 1, 2, 3], "one is in hand, two wait, and one is over the bound"
    rig.check_nothing_is_left()


# The data


class Faulty:
    """Data that can be restarted, and raises in one of its methods; at the second batch, where it is that."""

    def __init__(self, where: str, error: BaseException) -> None:
        self.error = error
        self.where: str | None = where
        self.open = 0
        self.batch = 0

    def reach(self, where: str) -> None:
        if where == self.where:
            raise self.error

    def __len__(self) -> int:
        return len(DATA)

    def next(self, end: type[Exception]) -> int:
        self.batch += 1
        if self.batch == 3:
            self.reach("next")
        if self.batch > len(DATA):
            raise end
        return DATA[self.batch - 1]


class FaultyIterable(Faulty):
    def __iter__(self) -> "FaultyIterable.Iterator":
        self.reach("iter")
        self.open += 1
        self.batch = 0
        return FaultyIterable.Iterator(self)

    class Iterator:
        def __init__(self, data: Faulty) -> None:
            self.data = data

        def __iter__(self) -> "FaultyIterable.Iterator":
            return self

        def __next__(self) -> int:
            return self.data.next(StopIteration)

        def close(self) -> None:
            self.data.open -= 1
            self.data.reach("close")


class FaultyAsyncIterable(Faulty):
    def __aiter__(self) -> "FaultyAsyncIterable.Iterator":
        self.reach("iter")
        self.open += 1
        self.batch = 0
        return FaultyAsyncIterable.Iterator(self)

    class Iterator:
        def __init__(self, data: Faulty) -> None:
            self.data = data

        def __aiter__(self) -> "FaultyAsyncIterable.Iterator":
            return self

        async def __anext__(self) -> int:
            await checkpoint()
            return self.data.next(StopAsyncIteration)

        async def aclose(self) -> None:
            self.data.open -= 1
            await checkpoint()
            self.data.reach("close")


class FaultyStateful(FaultyIterable):
    at = 0

    def __iter__(self) -> FaultyIterable.Iterator:
        iterator = super().__iter__()
        self.batch, self.at = self.at, 0
        return iterator

    def state_dict(self) -> dict[str, int]:
        if self.batch == 3:
            self.reach("state_dict")
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.reach("load_state_dict")
        self.at = state["batch"]


class FaultyManager(FaultyAsyncIterable):
    async def __aenter__(self) -> None:
        await checkpoint()
        self.reach("aenter")
        self.open += 1

    async def __aexit__(self, *_: object) -> None:
        self.open -= 1
        await checkpoint()
        self.reach("aexit")


DATA_FAULTS = [
    (FaultyIterable, "iter", "fetching batch 1"),
    (FaultyIterable, "next", "fetching batch 3"),
    (FaultyIterable, "close", "closing"),
    (FaultyAsyncIterable, "iter", "fetching batch 1"),
    (FaultyAsyncIterable, "next", "fetching batch 3"),
    (FaultyAsyncIterable, "close", "closing"),
    (FaultyStateful, "state_dict", "fetching batch 3"),
    (FaultyManager, "aenter", "fetching batch 1"),
    (FaultyManager, "aexit", "data"),
]


@pytest.mark.covering(2)
@each_step
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(("kind", "where", "said"), DATA_FAULTS, ids=lambda one: getattr(one, "__name__", one))
async def test_what_the_data_raises_comes_out(
    kind: type[Faulty], where: str, said: str, prefetch: int, step: str
) -> None:
    rig, error = Rig(step), Boom()
    data = kind(where, error)
    await rig.fails(error, said, kind.__name__, "epoch", data=data, prefetch=prefetch)
    assert data.open == 0
    assert rig.stepped == {"fetching batch 1": [], "fetching batch 3": [1, 2]}.get(said, DATA)
    if rig.stepped != DATA:  # else it is done, and would begin anew
        data.where = None
        await rig.goes_on(DATA, data=data, prefetch=prefetch)
        assert data.open == 0


@each_step
async def test_what_a_callable_that_makes_the_data_raises_comes_out(step: str) -> None:
    rig, error = Rig(step), Boom()

    def batches() -> list[int]:
        raise error

    await rig.fails(error, "batches", "fetching batch 1", data=batches)


@each_step
@pytest.mark.parametrize("prefetch", [0, 2])
@is_or_is_not_async
async def test_what_a_generator_raises_comes_out(step: str, prefetch: int, *, is_async: bool) -> None:
    rig, error = Rig(step), Boom()

    def batches() -> Iterator[int]:
        yield from DATA[:2]
        raise error

    async def batches_async() -> AsyncIterator[int]:
        for batch in DATA[:2]:
            yield batch
        raise error

    data = batches_async if is_async else batches
    await rig.fails(error, "batches", "epoch 1", "fetching batch 3", data=data, prefetch=prefetch)
    assert rig.stepped == [1, 2]


class Broker:
    """Entered anew by each run, and cannot be put back to where it stood."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
        self.open = 0
        self.at_end = anyio.Event()

    async def __aenter__(self) -> None:
        self.open += 1

    async def __aexit__(self, *_: object) -> None:
        self.open -= 1

    async def __aiter__(self) -> AsyncIterator[int]:
        yield 1
        yield 2
        self.at_end.set()
        if self.error is not None:
            raise self.error


@each_step
@pytest.mark.parametrize("error", [None, Boom()], ids=["end", "error"])
async def test_the_end_that_the_data_met_ahead_of_an_interruption_is_met_after_it(
    step: str, error: Exception | None
) -> None:
    rig, data = Rig(step), Broker(error)

    @rig.engine.on(Events.ITERATION_COMPLETED(once=1))
    async def interrupt() -> None:
        await data.at_end.wait()
        await anyio.wait_all_tasks_blocked()
        rig.engine.interrupt()

    with anyio.fail_after(30):
        await rig.engine.run(data, prefetch=2)
    assert rig.stepped == [1]
    assert data.open == 0
    if error is None:
        await rig.goes_on([1, 2], data=None)
    else:
        error.__notes__ = []
        await rig.fails(error.with_traceback(None), "Broker", "fetching batch 3", data=data, prefetch=2)
    assert rig.stepped == [1, 2]
    assert data.open == 0


@each_step
async def test_what_load_state_dict_of_the_data_raises_comes_out(step: str) -> None:
    rig, error = Rig(step), Boom()
    data = FaultyStateful("next", Boom("at first"))
    with pytest.raises(Boom, match="at first"):
        await rig.engine.run(data)
    rig.told.clear()
    rig.fired.clear()
    data.where, data.error = "load_state_dict", error
    await rig.fails(error, "FaultyStateful", "epoch 1", "fetching batch 3", data=data)


@each_step
async def test_a_step_that_fails_and_data_that_fails_to_close_come_out_as_a_group(step: str) -> None:
    rig, error = Rig(step), Boom("the data")
    rig.fail_at = 2
    data = FaultyAsyncIterable("close", error)
    with anyio.fail_after(30), pytest.raises(ExceptionGroup) as caught:
        await rig.engine.run(data)
    assert set(caught.value.exceptions) == {rig.error, error}
    assert rig.told == [rig.error]
    rig.check_nothing_is_left()


@each_step
@pytest.mark.parametrize("when", ["waiting", "stepping"])
async def test_a_task_of_the_data_that_fails_fails_the_run(step: str, when: str) -> None:
    """An async context manager may have tasks, a broker's client say: when one fails, it is as if the data did."""
    rig, error, fail = Rig(step), Boom(), anyio.Event()

    class Broker:
        async def __aenter__(self) -> None:
            self.group = anyio.create_task_group()
            await self.group.__aenter__()
            self.group.start_soon(self.listen)

        async def __aexit__(
            self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
        ) -> bool | None:
            self.group.cancel_scope.cancel()
            return await self.group.__aexit__(kind, raised, trace)

        async def listen(self) -> None:
            await fail.wait()
            raise error

        async def __aiter__(self) -> AsyncIterator[int]:
            yield 1
            if when == "waiting":
                fail.set()
                await anyio.sleep_forever()
            while True:
                yield 2

    @rig.engine.on(Events.ITERATION_COMPLETED(once=5))
    async def stepping(engine: Any) -> None:
        fail.set()
        await anyio.sleep_forever()

    await rig.fails(error, "Broker", data=Broker(), epoch_length=10)


class Hanging:
    """Its third batch never comes."""

    def __init__(self) -> None:
        self.hangs = anyio.Event()
        self.was_cancelled = False
        self.batch = 0

    def __aiter__(self) -> "Hanging":
        return self

    async def __anext__(self) -> int:
        self.batch += 1
        if self.batch == 3:
            self.hangs.set()
            try:
                await anyio.sleep_forever()
            except BaseException:
                self.was_cancelled = True
                raise
        return self.batch


@each_step
@pytest.mark.parametrize("prefetch", [0, 2])
async def test_a_wait_for_data_that_hangs_can_be_cancelled(step: str, prefetch: int) -> None:
    rig, data = Rig(step), Hanging()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(rig.engine.run, data, None, None, 4)
            await data.hangs.wait()
            while rig.stepped != [1, 2]:
                await checkpoint()
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
    assert data.was_cancelled
    assert rig.stepped == [1, 2]
    assert rig.fired[-1] == "CANCELLED"
    rig.check_nothing_is_left()


@each_step
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("from_thread", [False, True], ids=["task", "thread"])
async def test_terminate_ends_a_wait_for_data_that_hangs(step: str, prefetch: int, *, from_thread: bool) -> None:
    rig, data = Rig(step), Hanging()

    async def terminate() -> None:
        await data.hangs.wait()
        while rig.stepped != [1, 2]:
            await checkpoint()
        await anyio.wait_all_tasks_blocked()
        if from_thread:
            await anyio.to_thread.run_sync(rig.engine.terminate)
        else:
            rig.engine.terminate()

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(terminate)
            await rig.engine.run(data, epoch_length=4, prefetch=prefetch)
    assert data.was_cancelled
    assert rig.stepped == [1, 2]
    assert rig.fired[-2:] == ["TERMINATE", "COMPLETED"]
    assert rig.engine.state.stop_reason is StopReason.TERMINATED
    rig.check_nothing_is_left()
    await rig.goes_on([1, 2, 4, 5], data=data, epoch_length=4, prefetch=prefetch)


@each_step
async def test_terminate_waits_for_a_generator_of_the_users_for_he_will_go_on_with_it(step: str) -> None:
    """An async generator does not survive a cancellation, and this one is the user's own."""
    rig, hangs, come = Rig(step), anyio.Event(), anyio.Event()

    async def numbers() -> AsyncIterator[int]:
        yield 1
        hangs.set()
        await come.wait()
        yield 2
        yield 3

    async def terminate() -> None:
        await hangs.wait()
        await anyio.wait_all_tasks_blocked()
        rig.engine.terminate()
        await anyio.wait_all_tasks_blocked()
        come.set()

    data = numbers()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(terminate)
            await rig.engine.run(data, epoch_length=3)
        assert rig.stepped == [1]
        await rig.goes_on([1, 2, 3], data=data, epoch_length=3)


# Streams


@each_step
async def test_what_the_reader_of_a_stream_raises_is_his_own_business(step: str) -> None:
    rig, error = Rig(step), Boom()
    caught: list[Boom] = []

    async def read() -> None:
        try:
            async with rig.engine.stream(Events.ITERATION_COMPLETED, overflow="wait", buffer=1) as events:
                opened.set()
                async for event in events:
                    if event.iteration == 2:
                        raise error
        except Boom as one:
            caught.append(one)

    opened = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await opened.wait()
        await rig.goes_on(list(range(100)), data=range(100))
    assert caught == [error]
    assert not rig.told


# KeyboardInterrupt and SystemExit


EXITS = """
import json, sys, threading, warnings
import anyio
from anyio.lowlevel import checkpoint
from aengine import Engine, Events

backend, options = json.loads(sys.argv[1])


def leave():
    raise SystemExit(7)


async def leave_async():
    await checkpoint()
    raise SystemExit(7)


def plain(engine, batch): return batch
async def awaiting(engine, batch): await checkpoint()
def bad(engine, batch): leave()
async def bad_async(engine, batch): await leave_async()
def batches(): yield 1; leave()
async def batches_async(): yield 1; leave()
async def quick(event): await checkpoint()


def attempt(place, thread, prefetch):
    found = dict(place=place, thread=thread, prefetch=prefetch, exit=None, fired=[])

    async def main():
        step = {"step": bad, "async step": bad_async}.get(place, plain)
        engine = Engine(step, name="left", thread=thread)
        for event in (Events.CANCELLED, Events.EXCEPTION_RAISED, Events.COMPLETED):
            engine.add_event_handler(event, lambda engine, *rest: found["fired"].append(rest[-1]), event.name)
        engine.subscribe(Events.ITERATION_COMPLETED, quick)
        if place == "handler":
            engine.add_event_handler(Events.ITERATION_COMPLETED, leave)
        if place == "async handler":
            engine.add_event_handler(Events.ITERATION_COMPLETED, leave_async)
        if place == "subscriber":
            engine.subscribe(Events.ITERATION_COMPLETED, lambda event: leave())
        if place == "async subscriber":
            async def handle(event): await leave_async()
            engine.subscribe(Events.ITERATION_COMPLETED, handle)
        data = {"data": batches, "async data": batches_async}.get(place, [1, 2, 3])
        try:
            await engine.run(data, prefetch=prefetch)
        except BaseException as error:
            found["raised"] = repr(error)
            raise

    try:
        anyio.run(main, backend=backend, backend_options=options)
    except SystemExit as error:
        found["exit"] = error.code
    found["threads"] = [one.name for one in threading.enumerate() if one.name.startswith("aengine")]
    return found


places = ["step", "async step", "handler", "async handler", "subscriber", "async subscriber", "data", "async data"]
print(json.dumps([attempt(place, thread, prefetch)
                  for place in places for thread in (True, False) for prefetch in (0, 2)]))
"""


def test_system_exit_comes_out_of_every_place_and_ends_the_process(anyio_backend: Backend) -> None:
    """In a process of its own, for asyncio lets it out of its loop at once, wherever a task raises it."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXITS, json.dumps(anyio_backend)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        assert found["exit"] == 7, found
        assert found["raised"] == "SystemExit(7)", found
        assert found["fired"][-1:] == ["CANCELLED"], found
        assert not found["threads"], found
    assert not done.stderr


@each_step
async def test_system_exit_wins_over_another_failure(step: str) -> None:
    rig, leave = Rig(step), SystemExit(7)
    rig.fail_at, rig.error = 2, leave

    @rig.engine.on(Events.CANCELLED)
    def fail(engine: Any) -> None:
        raise Boom

    with anyio.fail_after(30), pytest.raises(SystemExit) as caught:
        await rig.engine.run(DATA)
    assert caught.value is leave
    assert "CANCELLED" in rig.fired
    rig.check_nothing_is_left()


# While an event is being dispatched


@each_step
@is_or_is_not_async
async def test_handlers_added_and_removed_during_a_dispatch_are_so_from_the_next_one_on(
    step: str, *, is_async: bool
) -> None:
    rig, called = Rig(step), []
    engine, event = rig.engine, Events.ITERATION_COMPLETED

    def turn(engine: Any) -> None:
        called.append("turn")
        if engine.state.iteration == 2:
            itself.remove()
            following.remove()
            engine.add_event_handler(event, called.append, "added")

    async def turn_async(engine: Any) -> None:
        await checkpoint()
        turn(engine)

    engine.add_event_handler(event, called.append, "before")
    itself = engine.add_event_handler(event, turn_async if is_async else turn)
    following = engine.add_event_handler(event, called.append, "following")
    engine.add_event_handler(event, called.append, "after")
    await rig.goes_on(DATA)
    first = ["before", "turn", "following", "after"]
    assert called == [*first, *first, *["before", "after", "added"] * 2]


@each_step
async def test_subscribers_added_and_removed_during_a_dispatch_are_so_from_the_next_one_on(step: str) -> None:
    rig, event = Rig(step), Events.ITERATION_COMPLETED
    engine = rig.engine
    seen: dict[str, list[int]] = {"leaves": [], "comes": []}

    async def leaves(event: Event) -> None:
        seen["leaves"].append(event.iteration)

    async def comes(event: Event) -> None:
        seen["comes"].append(event.iteration)

    handle = engine.subscribe(event, leaves)

    @engine.on(event(once=2))
    def turn(engine: Engine[Any, Any]) -> None:
        handle.remove()
        engine.subscribe(event, comes)

    await rig.goes_on(DATA)
    assert seen["leaves"][:1] == [1]
    assert seen["leaves"] in ([1], [1, 2]), "the one under way may or may not reach it, none after it does"
    assert seen["comes"] in ([2, 3, 4], [3, 4])


@each_step
async def test_a_handler_that_fires_its_own_event_sees_each_firing_in_order(step: str) -> None:
    rig = Rig(step)
    seen: list[int] = []
    rig.engine.register_events(*Own)

    @rig.engine.on(Own.MOVED)
    def again(engine: Engine[Any, Any]) -> None:
        seen.append(len(seen))
        if len(seen) % 5:
            engine.fire_event(Own.MOVED)

    @rig.engine.on(Events.ITERATION_COMPLETED)
    def fire(engine: Engine[Any, Any]) -> None:
        engine.fire_event(Own.MOVED)

    await rig.goes_on(DATA)
    assert seen == list(range(5 * len(DATA)))


# Subscribers that emit


class Ring(EventEnum):
    A = "a"
    B = "b"
    C = "c"


class Circle:
    """Subscribers that each take an event and emit two of the next one's: inboxes of one are full at once."""

    def __init__(self, engine: Engine[Any, Any], ring: list[Ring]) -> None:
        self.engine = engine
        self.handled = dict.fromkeys(ring, 0)
        self.emitted = dict.fromkeys(ring, 0)

    def wants_more(self, event: Ring) -> bool:
        wants = self.emitted[event] < 20
        self.emitted[event] += wants
        return wants

    def join(self, event: Ring, following: Ring, *, is_async: bool) -> None:
        async def handle_async(one: Event) -> None:
            self.handled[event] += 1
            for _ in range(2):
                if self.wants_more(following):
                    await self.engine.emit(following)

        def handle(one: Event) -> None:
            self.handled[event] += 1
            for _ in range(2):
                if self.wants_more(following):
                    self.engine.fire_event(following)

        self.engine.subscribe(event, handle_async if is_async else handle, buffer=1, name=event.name)


@each_step
@is_or_is_not_async
@pytest.mark.parametrize("members", [1, 2, 3])
async def test_subscribers_that_emit_in_a_circle_of_full_inboxes_get_stuck_never(
    step: str, members: int, *, is_async: bool
) -> None:
    rig, ring = Rig(step), list(Ring)[:members]
    rig.engine.register_events(*ring)
    circle = Circle(rig.engine, ring)
    for event, following in zip(ring, ring[1:] + ring[:1], strict=True):
        circle.join(event, following, is_async=is_async)

    @rig.engine.on(Events.ITERATION_COMPLETED)
    async def begin(engine: Engine[Any, Any]) -> None:
        if circle.wants_more(ring[0]):
            await engine.emit(ring[0])

    await rig.goes_on(DATA)
    assert circle.handled == circle.emitted == dict.fromkeys(ring, 20)
    assert all(one.discarded == one.dropped == 0 for one in rig.engine.statistics().listeners)


@each_step
async def test_a_handler_that_emits_into_a_full_inbox_waits_for_its_reader(step: str) -> None:
    rig, sizes = Rig(step), []
    engine = rig.engine
    engine.register_events(*Own)

    @engine.subscribe(Own.MOVED, buffer=2)
    async def read(event: Event) -> None:
        await checkpoint()

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    async def emit(engine: Engine[Any, Any]) -> None:
        for _ in range(50):
            await engine.emit(Own.MOVED)
            sizes.append(engine.statistics().listeners[0].depth)

    await rig.goes_on(DATA)
    assert max(sizes) <= 2
    assert engine.statistics().listeners[0].handled == 50


@pytest.mark.parametrize("step", ["worker", "here"])
async def test_a_step_that_fires_into_a_full_inbox_is_held_back_and_never_stuck(step: str) -> None:
    depths: list[int] = []

    def fire(engine: Engine[int, None], batch: int) -> None:
        for _ in range(10):
            engine.fire_event(Own.MOVED)
        depths.append(engine.statistics().listeners[0].depth)

    engine = Engine(fire, name="tried", thread=step == "worker")
    engine.register_events(*Own)

    @engine.subscribe(Own.MOVED, buffer=2)
    async def read(event: Event) -> None:
        await checkpoint()

    with anyio.fail_after(30):
        await engine.run(range(20))
    statistics = engine.statistics().listeners[0]
    assert statistics.handled == statistics.accepted == 200
    assert max(depths) <= (2 if step == "worker" else 12), "off the worker it is the loop that waits, after the step"


# A run within a run


def note_thread(engine: Any, threads: set[int]) -> None:
    threads.add(threading.get_ident())


@pytest.mark.parametrize("step", ["worker", "here", "async"])
async def test_another_engine_in_an_async_inline_handler_borrows_the_thread(step: str) -> None:
    threads: dict[str, set[int]] = {"outer": set(), "inner": set()}
    outer, inner = Rig(step), Rig("worker")
    for name, rig in (("outer", outer), ("inner", inner)):
        rig.engine.add_event_handler(Events.ITERATION_COMPLETED, note_thread, threads[name])

    @outer.engine.on(Events.EPOCH_COMPLETED)
    async def evaluate(engine: Any) -> None:
        await inner.engine.run([7, 8])

    await outer.goes_on(DATA * 2, max_epochs=2)
    assert inner.stepped == [7, 8] * 2
    assert (threads["inner"] == threads["outer"]) == (step == "worker")
    assert (threading.get_ident() in threads["inner"]) is False
    inner.check_nothing_is_left()


@pytest.mark.parametrize("has_subscriber", [False, True])
async def test_another_engine_in_a_plain_inline_handler_runs_on_its_thread(*, has_subscriber: bool) -> None:
    threads, seen = set(), []
    outer, inner = Rig("worker"), Rig("worker")

    async def see(event: Event) -> None:
        seen.append(event.iteration)

    if has_subscriber:
        inner.engine.subscribe(Events.ITERATION_COMPLETED, see)
    else:
        inner.engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: threads.add(threading.get_ident()))

    @outer.engine.on(Events.EPOCH_COMPLETED)
    def evaluate(engine: Any) -> None:
        inner.engine.run_sync([7, 8])
        threads.add(threading.get_ident())

    await outer.goes_on(DATA * 2, max_epochs=2)
    assert inner.stepped == [7, 8] * 2
    assert len(threads) == 1
    assert seen == ([1, 2] * 2 if has_subscriber else [])
    inner.check_nothing_is_left()


async def test_another_engine_in_a_subscriber_has_a_thread_of_its_own() -> None:
    threads: dict[str, set[int]] = {"outer": set(), "inner": set()}
    outer, inner = Rig("worker"), Rig("worker")
    for name, rig in (("outer", outer), ("inner", inner)):
        rig.engine.add_event_handler(Events.ITERATION_COMPLETED, note_thread, threads[name])

    @outer.engine.subscribe(Events.EPOCH_COMPLETED)
    async def evaluate(event: Event) -> None:
        await inner.engine.run([7, 8])

    await outer.goes_on(DATA * 2, max_epochs=2)
    assert inner.stepped == [7, 8] * 2
    assert not threads["inner"] & threads["outer"]


@each_step
async def test_what_fails_in_a_run_within_a_run_comes_out_of_both(step: str) -> None:
    outer, inner = Rig(step), Rig(step)
    inner.fail_at = 8

    @outer.engine.on(Events.EPOCH_COMPLETED)
    async def evaluate(engine: Any) -> None:
        await inner.engine.run([7, 8])

    with anyio.fail_after(30), pytest.raises(Boom) as caught:
        await outer.engine.run(DATA)
    assert caught.value is inner.error
    assert inner.told == outer.told == [inner.error]
    assert "the step" in inner.error.__notes__[0]
    assert "evaluate" in inner.error.__notes__[1]
    assert len(inner.error.__notes__) == 2
    for rig in (outer, inner):
        rig.check_nothing_is_left()


@each_step
@pytest.mark.parametrize("where", ["handler", "subscriber"])
async def test_running_the_same_engine_within_its_run_is_refused(step: str, where: str) -> None:
    rig, refused = Rig(step), []

    async def again(_: Any) -> None:
        with pytest.raises(EngineBusy, match="'tried' is running") as caught:
            await rig.engine.run(DATA)
        refused.append(caught.value)

    listen = rig.engine.on if where == "handler" else rig.engine.subscribe
    listen(Events.ITERATION_COMPLETED(once=2))(again)
    await rig.goes_on(DATA)
    assert len(refused) == 1


@pytest.mark.parametrize("step", ["worker", "here"])
async def test_running_the_same_engine_in_its_step_is_refused(step: str) -> None:
    rig, refused = Rig(step), []

    @rig.engine.on(Events.ITERATION_STARTED(once=2))
    def again(engine: Engine[Any, Any]) -> None:
        with pytest.raises(EngineBusy) as caught:  # also off the worker, where an event loop runs
            engine.run_sync(DATA)
        refused.append(caught.value)

    await rig.goes_on(DATA)
    assert len(refused) == 1


@each_step
async def test_a_second_run_beside_the_first_is_refused_and_harms_it_not(step: str) -> None:
    rig, begun = Rig(step), anyio.Event()

    @rig.engine.on(Events.ITERATION_COMPLETED(once=2))
    async def wait(engine: Any) -> None:
        begun.set()
        await refused.wait()

    refused = anyio.Event()

    async def second() -> None:
        await begun.wait()
        with pytest.raises(EngineBusy):
            await rig.engine.run(DATA)
        refused.set()

    async with anyio.create_task_group() as group:
        group.start_soon(second)
        await rig.goes_on(DATA)


# Engines side by side


@each_step
async def test_of_two_engines_in_one_loop_one_fails_and_the_other_goes_on(step: str) -> None:
    bad, good = Rig(step), Rig(step)
    bad.fail_at = 2
    has_failed = anyio.Event()
    seen: list[int] = []

    async def fail() -> None:
        with pytest.raises(Boom):
            await bad.engine.run(DATA)
        has_failed.set()

    @good.engine.on(Events.ITERATION_COMPLETED(once=1))
    async def wait(engine: Any) -> None:
        await has_failed.wait()

    @good.engine.subscribe(Events.ITERATION_COMPLETED)
    async def see(event: Event) -> None:
        seen.append(event.iteration)

    async with anyio.create_task_group() as group:
        group.start_soon(fail)
        await good.goes_on(list(range(100)), data=range(100))
    assert seen == list(range(1, 101))
    assert bad.told == [bad.error]
    assert not good.told


# A `for` of one's own


@each_step
async def test_what_the_body_of_iterate_raises_comes_out(step: str) -> None:
    rig, error = Rig(step), Boom()

    async def run() -> None:
        async with rig.engine.iterate(DATA) as iterations:
            async for event in iterations:
                if event.iteration == 2:
                    raise error

    with anyio.fail_after(30), pytest.raises(Boom) as caught:
        await run()
    assert caught.value is error
    assert rig.told == [error]
    assert rig.stepped == [1, 2]
    assert rig.engine.state.stop_reason is StopReason.FAILED
    rig.check_nothing_is_left()
    await rig.goes_on(DATA)


@each_step
async def test_what_the_step_raises_comes_out_of_iterate(step: str) -> None:
    rig = Rig(step)
    rig.fail_at = 3
    seen: list[int] = []

    async def run() -> None:
        async with rig.engine.iterate(DATA) as iterations:
            async for event in iterations:
                await checkpoint()
                seen.append(event.output)

    with anyio.fail_after(30), pytest.raises(Boom) as caught:
        await run()
    assert caught.value is rig.error
    assert rig.told == [rig.error]
    assert seen == [1, 2]
    rig.check_nothing_is_left()


@each_step
async def test_leaving_iterate_early_terminates(step: str) -> None:
    rig = Rig(step)
    with anyio.fail_after(30):
        async with rig.engine.iterate(DATA) as iterations:
            async for event in iterations:
                if event.iteration == 2:
                    break
    assert rig.stepped == [1, 2]
    assert rig.engine.state.stop_reason is StopReason.TERMINATED
    rig.check_nothing_is_left()
    await rig.goes_on(DATA)


# Nothing keeps an engine alive


async def handle(event: Event[Any, int]) -> None:
    await checkpoint()


async def fail(event: Event) -> None:
    await checkpoint()
    raise Boom


def batches() -> Iterator[int]:
    yield from DATA


def batches_that_fail() -> Iterator[int]:
    yield 1
    raise Boom


async def run_and_forget(ending: str, prefetch: int, step: str) -> "weakref.ref[Engine[Any, Any]]":
    def plain(engine: Any, batch: int) -> int:
        if ending == "failed" and batch == 3:
            raise Boom
        return batch

    async def awaiting(engine: Any, batch: int) -> int:
        await checkpoint()
        return plain(engine, batch)

    async def wait(engine: Any) -> None:
        await checkpoint()

    engine: Engine[Any, Any] = Engine(awaiting if step == "async" else plain, thread=step != "here")
    engine.on(Events.ITERATION_COMPLETED)(wait)
    engine.on(Events.EPOCH_COMPLETED(every=1))(lambda engine: None)
    engine.subscribe(Events.ITERATION_COMPLETED, handle, snapshot=lambda engine: 1)
    engine.subscribe(Events.EPOCH_COMPLETED, lambda event: None)
    scope = anyio.CancelScope()
    if ending == "terminated":
        engine.on(Events.ITERATION_COMPLETED(once=2))(lambda engine: engine.terminate())
    elif ending == "cancelled":
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), cancel_and_wait, scope)
    elif ending == "subscriber failed":
        engine.subscribe(Events.ITERATION_COMPLETED(once=2), fail)
    try:
        with anyio.fail_after(30), scope:
            await engine.run(batches_that_fail if ending == "data failed" else batches, prefetch=prefetch)
    except Boom:
        assert "failed" in ending
    return weakref.ref(engine)


@pytest.mark.covering(2)
@each_step
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    "ending", ["completed", "terminated", "failed", "subscriber failed", "data failed", "cancelled"]
)
async def test_an_engine_is_freed_by_reference_count_after_its_run(ending: str, prefetch: int, step: str) -> None:
    gc.collect()
    gc.disable()
    try:
        engine = await run_and_forget(ending, prefetch, step)
        assert await is_freed(engine)
    finally:
        gc.enable()


@each_step
async def test_an_interrupted_engine_that_is_dropped_closes_its_data(step: str) -> None:
    """In the middle of its run it holds itself, so it is the collector that finds it."""
    data = FaultyIterable("", Boom())
    rig = Rig(step)
    rig.engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), rig.engine.interrupt)
    await rig.engine.run(data)
    assert rig.engine.state.stop_reason is StopReason.INTERRUPTED
    # What is open may belong to the thread that has opened it, which is kept for the run that goes on, or to close it.
    kept = [thread for thread in threading.enumerate() if thread.name.startswith("aengine")]
    assert [thread.name for thread in kept] == (["aengine tried"] if step == "worker" else [])
    assert all(thread.daemon for thread in kept)
    assert data.open == 1
    engine = weakref.ref(rig.engine)
    del rig
    gc.collect()
    assert engine() is None
    for thread in kept:
        thread.join(30)
        assert not thread.is_alive()
    assert data.open == 0


def test_an_engine_is_freed_by_reference_count_after_run_sync() -> None:
    gc.collect()
    gc.disable()
    try:
        engine: Engine[Any, Any] = Engine(plain_step)
        engine.run_sync(DATA)
        gone = weakref.ref(engine)
        del engine
        assert gone() is None
    finally:
        gc.enable()


def plain_step(engine: Any, batch: Any) -> Any:
    return batch

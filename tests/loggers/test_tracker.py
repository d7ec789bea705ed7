"""Loggers beside the step: what is written, in which order, and what happens when a sink is slow or down."""

import asyncio
import gc
import itertools
import json
import logging
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Awaitable, Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch
from support.record import Boom
from support.sinks import Holding, warnings_of

from aengine import DataExhausted, Engine, Events, HandlerTimeout, Service, StopReason, StrayCancellation
from aengine.bus.inbox import Inbox
from aengine.drivers.subscriber_tasks import SubscriberTasks
from aengine.loggers import Record, Tracker, writer as writer_module
from aengine.loggers.writer import RecordWriter
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent

AnyEngine: TypeAlias = Engine[Any, Any]


class Memory:
    """A sink that keeps what it gets, call by call; raises while it is down."""

    def __init__(self) -> None:
        self.calls: list[list[Record]] = []
        self.tries = 0
        self.fails = 0
        self.closed = 0

    def write(self, records: Sequence[Record]) -> None:
        self.tries += 1
        if self.fails:
            self.fails -= 1
            raise Boom(f"try {self.tries}")
        self.calls.append(list(records))

    def close(self) -> None:
        self.closed += 1

    @property
    def records(self) -> list[Record]:
        return [record for call in self.calls for record in call]

    @property
    def steps(self) -> list[int]:
        return [record.step for record in self.records]


class Held(Holding, Memory):
    """A sink that is as slow as it gets: its calls wait for the test."""


def tenfold(engine: AnyEngine, batch: int) -> int:
    return batch * 10


def account(tracker: Tracker) -> tuple[int, int, int, int]:
    now = tracker.statistics()
    return now.taken, now.written, now.dropped, now.waiting


def writer_of(tracker: Tracker) -> RecordWriter:
    writer = tracker._writer
    assert writer is not None
    return writer


# What is written


@pytest.mark.parametrize("thread", [True, False])
async def test_each_event_is_a_record_in_order(*, thread: bool) -> None:
    sink, engine = Memory(), Engine(tenfold, name="trainer", thread=thread)
    tracker = Tracker(sink)
    tracker.attach(engine)
    await engine.run([1, 2], max_epochs=2)
    seen = [(record.event, record.engine_name, record.step, record.epoch, record.values) for record in sink.records]
    ic, ec = "ITERATION_COMPLETED", "EPOCH_COMPLETED"
    assert seen == [
        (ic, "trainer", 1, 1, {"output": 10}),
        (ic, "trainer", 2, 1, {"output": 20}),
        (ec, "trainer", 2, 1, {"output": 20}),
        (ic, "trainer", 3, 2, {"output": 10}),
        (ic, "trainer", 4, 2, {"output": 20}),
        (ec, "trainer", 4, 2, {"output": 20}),
    ]
    assert account(tracker) == (6, 6, 0, 0)
    assert sink.closed


async def test_an_async_sink_is_awaited_on_the_event_loop() -> None:
    engine, threads = Engine(tenfold), set()
    steps: list[int] = []

    async def write(records: Sequence[Record]) -> None:
        await anyio.lowlevel.checkpoint()
        threads.add(threading.get_ident())
        steps.extend(record.step for record in records)

    Tracker(write).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2, 3])
    assert (threads, steps) == ({threading.get_ident()}, [1, 2, 3])


async def test_a_plain_sink_is_called_in_another_thread() -> None:
    engine, threads = Engine(tenfold), []
    Tracker(lambda records: threads.append(threading.current_thread())).attach(engine, Events.COMPLETED)
    await engine.run([1])
    assert threads
    assert threads[0] is not threading.current_thread()


async def test_values_are_taken_after_the_inline_handlers_in_whatever_order_they_were_added() -> None:
    sink, engine = Memory(), Engine(tenfold)
    Tracker(sink).attach(engine, Events.EPOCH_COMPLETED)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(accuracy=0.5))
    await engine.run([1])
    assert sink.records[0].values == {"output": 10, "accuracy": 0.5}


async def test_a_tensor_is_written_as_it_was_though_the_next_step_changes_it() -> None:
    total = torch.zeros(())

    def add_up(engine: AnyEngine, batch: int) -> dict[str, Any]:
        return {"total": total.add_(batch), "logits": torch.zeros(3), "name": "x"}

    sink, engine = Memory(), Engine(add_up)
    Tracker(sink).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2, 3])
    assert [record.values for record in sink.records] == [{"total": 1.0}, {"total": 3.0}, {"total": 6.0}]


async def test_a_step_of_ones_own_takes_the_place_of_the_iteration() -> None:
    sink, trainer, evaluator = Memory(), Engine(tenfold), Engine(tenfold)
    Tracker(sink, step=lambda _: trainer.state.iteration).attach(evaluator, Events.COMPLETED)

    @trainer.on(Events.EPOCH_COMPLETED)
    async def evaluate() -> None:
        await evaluator.run([1, 2, 3])

    await trainer.run([1, 2], max_epochs=2)
    assert sink.steps == [2, 4]


async def test_what_is_no_number_is_refused_where_it_is_asked_for() -> None:
    engine = Engine(tenfold)
    Tracker(Memory(), values=lambda engine: {"rates": [0.1, 0.2]}).attach(engine)
    with pytest.raises(TypeError, match=r"'rates' is \[0.1, 0.2\]"):
        await engine.run([1])


def hooks(**methods: Any) -> Any:
    """Return a sink with these beside `write`."""
    return type("Hooked", (), {"write": lambda self, records: None, **methods})()


async def takes_note(self: Any, *_: Any) -> None: ...


unchecked: Any = Tracker  # as a user might call it who has no type checker


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: unchecked(Engine(tenfold)),
            r"put on an engine by  Tracker\(sink\).attach\(engine\); got <Engine 'tenf",
        ),
        (
            lambda: unchecked(Engine(tenfold), Memory()),
            r"by position, .*; the engine and the event are for Tracker\(...\)",
        ),
        (
            lambda: unchecked(Memory(), Events.COMPLETED),
            r"takes sink by position, and by keyword values=, step=, buffer=",
        ),
        (lambda: unchecked(Memory(), event="mine"), r"no event=: write Tracker\(...\).attach\(engine, event\)"),
        (lambda: unchecked(Memory(), engine=3), r"no engine=: write Tracker\(...\).attach\(engine\)"),
        (lambda: unchecked(Memory(), bufer=3), r"no bufer=: buffer=\?"),
        (lambda: unchecked("logs/a.jsonl"), r"'logs/a.jsonl' is a path: Tracker\(JSONLines\('logs/a.jsonl'\)\)"),
        (lambda: unchecked(Path("a.jsonl")), r"is a path: Tracker\(JSONLines\('a.jsonl'\)\) writes a file"),
        (lambda: unchecked(3), r"has a method write\(records\), or is a function of the records, got 3"),
        (lambda: unchecked(Memory), r"Memory is a class: Tracker\(Memory\(\.\.\.\)\)"),
        (lambda: unchecked(sys.__stdout__), r"is a file: Tracker\(JSONLines\(path\)\)"),
        (lambda: unchecked(lambda: None), r"cannot be called as write\(records\)"),
        (lambda: unchecked(hooks(write=lambda self: None)), r"cannot be called as write\(records\)"),
        (lambda: unchecked(hooks(close=lambda self, reason: None)), r"as close\(\): have it take no arguments"),
        (lambda: unchecked(hooks(close=True)), r"^the sink's close\(\) must be callable, got True"),
        (lambda: unchecked(hooks(run_ended=lambda self, name: None)), r"as run_ended\(engine_name, time, reason\)"),
        (lambda: unchecked(hooks(run_started=takes_note, run_ended=takes_note)), r"run_started\(\) must be a plain"),
        (lambda: unchecked(hooks(sync_to_disk=takes_note)), r"sync_to_disk\(\) must be a plain function"),
        (
            lambda: unchecked(hooks(run_ended=lambda self, *_: None)),
            r"one of run_started\(\) and run_ended\(\): a RunL",
        ),
        (lambda: unchecked(Memory(), on_error="ignore"), r'^on_error= is one of "raise", "log", got \'ignore\''),
    ],
)
def test_tracker_that_cannot_work_is_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_sink_gets_the_same_values_of_an_event_once() -> None:
    engine, other = Engine(tenfold, name="trainer"), Engine(tenfold)
    memory = Memory()
    every = Events.ITERATION_COMPLETED(every=2)
    Tracker(memory).attach(engine, every | Events.EPOCH_COMPLETED)
    for event in (every, Events.COMPLETED | Events.EPOCH_COMPLETED):
        with pytest.raises(
            RuntimeError, match=r"these values of engine 'trainer' at (ITERATION|EPOCH)_COMPLETED.* already"
        ):
            Tracker(memory).attach(engine, event)
    assert len(engine.statistics().services) == 1
    Tracker(memory).attach(engine, Events.ITERATION_COMPLETED(every=3))
    Tracker(memory, values=lambda engine: {"lr": 0.1}).attach(engine, Events.EPOCH_COMPLETED)
    Tracker(memory, step=lambda engine: 3).attach(engine, Events.EPOCH_COMPLETED)
    Tracker(Memory()).attach(engine, every)
    Tracker(memory).attach(other, every)


@pytest.mark.parametrize(
    ("error", "argument", "value"),
    [
        (TypeError, "values", {"loss": 1}),
        (TypeError, "values", lambda: {"loss": 1}),
        (TypeError, "step", 3),
        (TypeError, "step", lambda: 3),
        (ValueError, "buffer", 0),
        (ValueError, "buffer", "a"),
        (TypeError, "shutdown_timeout", "5"),
        (TypeError, "shutdown_timeout", None),
        (ValueError, "shutdown_timeout", -1),
    ],
)
def test_an_argument_that_cannot_be_used_is_refused_at_once(error: type[Exception], argument: str, value: Any) -> None:
    with pytest.raises(error, match=f"^{argument}= "):
        Tracker(Memory(), **{argument: value})


@pytest.mark.parametrize(("given", "seconds"), [(2, 2.0), (timedelta(minutes=1), 60.0)])
def test_shutdown_timeout_is_seconds_or_a_timedelta(given: Any, seconds: float) -> None:
    tracker = Tracker(Memory(), shutdown_timeout=given)
    tracker.attach(Engine(tenfold))
    assert writer_of(tracker).sink._shutdown_timeout == seconds


# Slow sinks


async def test_a_slow_sink_delays_no_step_and_gets_what_waited_in_one_call() -> None:
    sink, engine = Held(), Engine(tenfold)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    async def until_busy() -> None:
        await anyio.to_thread.run_sync(sink.is_busy.wait)

    @engine.on(Events.ITERATION_COMPLETED(once=500))  # reached while the first call has not returned
    def let_go() -> None:
        assert sink.calls == []
        sink.go_on.set()

    Tracker(sink).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run(range(500))
    assert sink.steps == list(range(1, 501))
    assert len(sink.calls) <= 3


async def test_a_full_buffer_drops_the_oldest_iterations_and_keeps_the_epochs(caplog: pytest.LogCaptureFixture) -> None:
    sink, engine = Held(), Engine(tenfold)

    @engine.on(Events.ITERATION_STARTED(once=2))
    async def until_busy() -> None:
        await anyio.to_thread.run_sync(sink.is_busy.wait)

    tracker = Tracker(sink, buffer=10)
    tracker.attach(engine)
    engine.add_event_handler(Events.COMPLETED, sink.go_on.set)
    await engine.run(range(20), max_epochs=3)
    epochs = [record.epoch for record in sink.records if record.event == "EPOCH_COMPLETED"]
    assert epochs == [1, 2, 3]
    assert sink.steps == [1, 20, 40, *range(54, 61), 60]
    assert account(tracker) == (63, 11, 52, 0)
    assert len(warnings_of(caplog)) == 2  # the first drop, and the sum at the end
    assert "52 were dropped" in warnings_of(caplog)[1]


@pytest.fixture
def never_at_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have records wait for others, once the sink was called, until something calls for them."""
    monkeypatch.setattr(writer_module, "_PACE", 3600.0)


@pytest.mark.usefixtures("never_at_its_own_pace")
async def test_flush_waits_until_what_was_taken_is_written_and_not_for_others_to_gather() -> None:
    sink, engine = Memory(), Engine(tenfold)
    flushed: list[list[int]] = []

    @engine.on(Events.ITERATION_COMPLETED)
    async def hand_over() -> None:  # before the record of this iteration, which is taken last
        await engine.flush()
        flushed.append(list(sink.steps))

    Tracker(sink).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run(range(50))
    assert flushed == [list(range(1, number)) for number in range(1, 51)]


async def test_flush_ends_though_there_are_always_more_records_than_written() -> None:
    sink, engine = Memory(), Engine(tenfold)
    Tracker(sink, buffer=10**6).attach(engine, Events.ITERATION_COMPLETED)
    has_begun = anyio.Event()

    @engine.subscribe(Events.ITERATION_COMPLETED(once=10))
    async def begin(_: object) -> None:
        has_begun.set()

    async with anyio.create_task_group() as group:
        group.start_soon(partial(engine.run, itertools.count(), epoch_length=10**9))
        await has_begun.wait()
        with anyio.fail_after(60):
            await engine.flush()
        assert sink.steps[:10] == list(range(1, 11))
        engine.terminate()
    assert sink.steps == [*range(1, engine.state.iteration + 1)]


@pytest.mark.usefixtures("never_at_its_own_pace")
async def test_flush_waits_for_what_was_taken_though_others_are_waited_for_first() -> None:
    for _ in range(10):  # which one is waited for first is left to chance
        has_begun, go_on, engine = anyio.Event(), anyio.Event(), Engine(tenfold)
        steps: list[int] = []

        async def write(
            records: Sequence[Record],
            has_begun: anyio.Event = has_begun,
            go_on: anyio.Event = go_on,
            steps: list[int] = steps,
        ) -> None:
            has_begun.set()
            await go_on.wait()
            steps.extend(record.step for record in records)

        @engine.subscribe(Events.ITERATION_COMPLETED(once=1))
        async def take_longer(_: object, go_on: anyio.Event = go_on) -> None:
            await go_on.wait()
            for _ in range(10):
                await anyio.lowlevel.checkpoint()

        @engine.on(Events.ITERATION_STARTED(once=5))
        async def hand_over(
            engine: AnyEngine,
            has_begun: anyio.Event = has_begun,
            go_on: anyio.Event = go_on,
            steps: list[int] = steps,
        ) -> None:
            await has_begun.wait()
            async with anyio.create_task_group() as group:
                group.start_soon(engine.flush)
                for _ in range(10):
                    await anyio.lowlevel.checkpoint()
                go_on.set()
            assert steps == [1, 2, 3, 4]

        Tracker(write).attach(engine, Events.ITERATION_COMPLETED)
        await engine.run(range(6))


async def test_what_became_of_the_records_adds_up_at_any_time_in_any_thread() -> None:
    engine = Engine(tenfold)
    tracker = Tracker(Memory())
    tracker.attach(engine, Events.ITERATION_COMPLETED)
    accounts: list[tuple[int, int, int, int]] = []

    def look() -> None:
        while engine.is_running:
            accounts.append(account(tracker))

    watcher = threading.Thread(target=look)
    engine.add_event_handler(Events.STARTED, watcher.start)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        await engine.run(range(10_000))
    finally:
        sys.setswitchinterval(before)
    watcher.join()
    assert [one for one in accounts if one[0] != sum(one[1:])] == []


async def test_the_step_may_find_that_a_record_is_due_while_the_event_loop_stops_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(tenfold)
    tracker = Tracker(Memory())
    tracker.attach(engine, Events.ITERATION_COMPLETED)
    writer, wakeup = writer_of(tracker), ThreadSafeEvent(EventLoopHandle())
    writer._wakeup = wakeup
    is_locked: list[bool] = []

    def stop_waiting() -> None:  # as the event loop does, on its thread
        if writer.lock.acquire(blocking=False):
            writer._wakeup = None
        is_locked.append(writer._wakeup is not None)

    def find_due() -> bool:
        thread = threading.Thread(target=stop_waiting)
        thread.start()
        thread.join()
        return True

    monkeypatch.setattr(writer, "_is_due", find_due)
    writer.put(Record(1, 1, 0.0, "ITERATION_COMPLETED", "trainer", {}), is_iteration=True)
    assert is_locked == [True]
    assert wakeup.is_set


def test_a_signal_handler_may_fire_an_event_while_a_record_is_taken() -> None:
    sink, engine = Memory(), Engine(tenfold, thread=False)
    engine.register_events("signal")
    tracker = Tracker(sink)
    tracker.attach(engine, Events.ITERATION_COMPLETED | "signal")
    lock = writer_of(tracker).lock
    with lock:  # held by the thread in which the handler runs
        assert lock.acquire(blocking=False)
        lock.release()
        engine.fire_event("signal")
    engine.run_sync([1])
    assert sorted(record.event for record in sink.records) == ["ITERATION_COMPLETED", "signal"]


@pytest.mark.usefixtures("never_at_its_own_pace")
async def test_a_flush_that_is_cancelled_does_not_cut_off_the_call_of_the_sink() -> None:
    has_begun, go_on, engine = anyio.Event(), anyio.Event(), Engine(tenfold)
    steps: list[int] = []

    async def write(records: Sequence[Record]) -> None:
        has_begun.set()
        await go_on.wait()
        steps.extend(record.step for record in records)

    @engine.on(Events.ITERATION_STARTED(once=2))
    async def cancel_a_flush() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(engine.flush)
            await has_begun.wait()
            group.cancel_scope.cancel()
        go_on.set()

    tracker = Tracker(write)
    tracker.attach(engine, Events.ITERATION_COMPLETED)
    await engine.run(range(3))
    assert (steps, tracker.statistics().failures) == ([1, 2, 3], 0)


async def test_a_flush_ends_when_the_task_that_writes_is_cancelled_from_outside(anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no such cancellation")
    engine = Engine(tenfold)
    has_flushed = anyio.Event()

    async def write(records: Sequence[Record]) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await anyio.sleep_forever()

    tracker = Tracker(write)
    tracker.attach(engine, Events.ITERATION_COMPLETED)

    async def flush() -> None:
        while not account(tracker)[0]:
            await anyio.lowlevel.checkpoint()
        await engine.flush()
        has_flushed.set()

    async with anyio.create_task_group() as group:
        group.start_soon(flush)
        with pytest.raises(StrayCancellation):
            await engine.run(iter(int, 1), epoch_length=10**9)
        with anyio.fail_after(10):
            await has_flushed.wait()
    assert account(tracker)[1] == 0


def test_a_tracker_shows_in_the_statistics_as_a_service() -> None:
    engine = Engine(tenfold)
    tracker = Tracker(Memory())
    tracker.attach(engine)
    assert [one.name for one in engine.statistics().services] == [tracker.name]


@pytest.mark.usefixtures("never_at_its_own_pace")
async def test_many_records_go_to_the_sink_in_one_call() -> None:
    sink, engine = Memory(), Engine(tenfold)
    Tracker(sink, buffer=10**6).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run(range(20_000))
    assert sink.steps == list(range(1, 20_001))
    assert len(sink.calls) < 100  # one for the first, then for a thousand; a batch that is behind leaves a rest


@pytest.mark.usefixtures("never_at_its_own_pace")
async def test_a_record_of_an_epoch_waits_for_nothing() -> None:
    sink, engine = Memory(), Engine(tenfold)
    tracker = Tracker(sink)
    tracker.attach(engine)

    @engine.on(Events.EPOCH_STARTED)
    async def until_it_is_there(engine: AnyEngine) -> None:
        while tracker.statistics().waiting:
            await anyio.lowlevel.checkpoint()

    await engine.run(range(5), max_epochs=4)
    assert sink.steps == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13, 14, 15, 15, 16, 17, 18, 19, 20, 20]


async def test_only_the_tracker_that_has_something_to_write_is_called() -> None:
    often, seldom, engine = Memory(), Memory(), Engine(tenfold)
    Tracker(often).attach(engine, Events.ITERATION_COMPLETED)
    Tracker(seldom).attach(engine, Events.COMPLETED)

    @engine.on(Events.ITERATION_COMPLETED)
    async def hand_over() -> None:
        await engine.flush()

    await engine.run(range(20))
    assert len(often.calls) > 10
    assert len(seldom.calls) == 1


# Sinks that fail


async def test_a_sink_that_is_down_costs_one_warning_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sink, engine = Memory(), Engine(tenfold)
    sink.fails = 3
    tracker = Tracker(sink)
    tracker.attach(engine, Events.ITERATION_COMPLETED)
    await engine.run(range(100))
    assert sink.steps == list(range(1, 101))
    assert tracker.statistics().failures == 3
    assert len(warnings_of(caplog)) == 1
    said = [record.getMessage() for record in caplog.records if record.name == "aengine.loggers"]
    assert ["failed" in one for one in said] == [True, False]
    assert "works again" in said[1]


async def test_a_sink_that_is_down_is_left_alone_between_two_tries() -> None:
    sink, engine = Memory(), Engine(tenfold)
    sink.fails = 10**6
    Tracker(sink, shutdown_timeout=0.0).attach(engine)

    @engine.on(Events.EPOCH_COMPLETED)
    async def hand_over() -> None:
        await engine.flush()  # comes back, though nothing could be written

    await engine.run([1], max_epochs=1000)
    assert sink.tries < 20  # of two thousand records; the pauses grow from 0.1 s


async def test_what_a_dead_sink_did_not_get_is_logged_and_waits_for_the_next_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Dead(Memory):
        async def write(self, records: Sequence[Record]) -> None:  # type: ignore[override]
            super().write(records)  # not in a thread: there, a call that was given up might come to it later

    sink, engine = Dead(), Engine(tenfold)
    sink.fails = 10**6
    tracker = Tracker(sink, shutdown_timeout=0.2)
    tracker.attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2, 3])
    assert account(tracker) == (3, 0, 0, 3)
    assert "3 not written" in warnings_of(caplog)[-1]
    sink.fails = 0
    writer_of(tracker).sink._shutdown_timeout = 30.0  # on a busy machine the time of the first might be too short
    await engine.run([1, 2])
    assert sink.steps == [1, 2, 3, 1, 2]
    assert account(tracker) == (5, 5, 0, 0)


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_sink_that_hangs_does_not_keep_the_run_from_ending(*, is_async: bool) -> None:
    release = threading.Event()

    async def hang(records: Sequence[Record]) -> None:
        await anyio.sleep_forever()

    def hang_in_thread(records: Sequence[Record]) -> None:
        release.wait()

    engine = Engine(tenfold)
    tracker = Tracker(hang if is_async else hang_in_thread, shutdown_timeout=0.05)
    tracker.attach(engine)
    try:
        await engine.run([1, 2, 3])  # without HandlerTimeout
    finally:
        release.set()
    assert tracker.statistics().waiting == 4


async def test_with_raise_the_error_of_the_sink_fails_the_run() -> None:
    sink, engine = Memory(), Engine(tenfold)
    sink.fails = 1
    Tracker(sink, on_error="raise").attach(engine)
    with pytest.raises(Boom):
        await engine.run([1, 2, 3])


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED(once=1), Events.EXCEPTION_RAISED])
@pytest.mark.parametrize("fails_to_close", [False, True])
async def test_a_sink_whose_error_failed_the_run_is_closed(event: Any, *, fails_to_close: bool) -> None:
    class Broken(Listening):
        def close(self) -> None:
            super().close()
            if fails_to_close:
                raise OSError("cannot close")

    def step(engine: AnyEngine, batch: int) -> int:
        if batch == 2:
            raise Boom("the step")
        return batch

    sink, engine = Broken(), Engine(step, name="trainer")
    sink.fails = 1
    tracker = Tracker(sink, values=lambda _: {}, on_error="raise")
    tracker.attach(engine, event)
    with pytest.raises(ExceptionGroup, match="several failures"):  # of the step, and of the sink
        await engine.run([1, 2])
    assert sink.reports == ["trainer begins", "trainer failed", "close"]
    assert tracker.statistics().failures == 1 + fails_to_close


async def test_a_server_that_comes_up_late_gets_all_from_the_beginning() -> None:
    received: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()

    def post(records: Sequence[Record]) -> None:
        with closing(HTTPConnection(address[0], address[1], timeout=10)) as connection:
            connection.request("POST", "/", json.dumps([record.step for record in records]))
            assert connection.getresponse().status == 204

    engine = Engine(tenfold)
    tracker = Tracker(post)
    tracker.attach(engine, Events.ITERATION_COMPLETED)

    @engine.on(Events.ITERATION_COMPLETED(once=50))
    async def until_it_has_failed() -> None:
        while not tracker.statistics().failures:
            await anyio.lowlevel.checkpoint()

    with ExitStack() as entered:

        @engine.on(Events.ITERATION_COMPLETED(once=100))
        def come_up() -> None:
            server = entered.enter_context(HTTPServer(address, Handler))
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            entered.callback(thread.join)
            entered.callback(server.shutdown)

        await engine.run(range(150))
    assert received == list(range(1, 151))
    assert account(tracker) == (150, 150, 0, 0)


HANGS = """
import sys, threading, time
import anyio
from aengine import Engine, Events
from aengine.loggers import Tracker

def hang(records):
    threading.Event().wait()

engine = Engine(lambda engine, batch: batch)
tracker = Tracker(hang, shutdown_timeout=0.1)
tracker.attach(engine)
anyio.run(engine.run, [1, 2, 3], backend=sys.argv[1])
print(tracker.statistics().waiting)
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_sink_that_hangs_does_not_keep_the_process_from_ending(backend: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, backend], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "4\n")
    assert "still busy" in done.stderr


# Ends


async def test_an_async_sink_is_closed_by_awaiting_it_after_the_last_record() -> None:
    reports: list[str] = []

    class Async:
        async def write(self, records: Sequence[Record]) -> None:
            reports.extend(record.event for record in records)

        async def close(self) -> None:
            await anyio.lowlevel.checkpoint()
            reports.append("closed")

    engine = Engine(tenfold)
    Tracker(Async()).attach(engine, Events.EPOCH_COMPLETED)
    await engine.run([1], max_epochs=2)
    assert reports == ["EPOCH_COMPLETED", "EPOCH_COMPLETED", "closed"]


async def test_a_sink_is_not_closed_before_the_last_record_is_written() -> None:
    reports: list[str] = []

    class Reporting:
        async def write(self, records: Sequence[Record]) -> None:
            reports.extend("written" for _ in records)

        async def close(self) -> None:
            await anyio.lowlevel.checkpoint()
            reports.append("closed")

    class Breathing:
        def __init__(self, times: int) -> None:
            self.times = times

        async def __call__(self, *given: Any) -> None:
            for _ in range(self.times):
                await anyio.lowlevel.checkpoint()

    for in_step, before_it in [
        *itertools.product(range(7), range(6))
    ] * 3:  # the tasks meet in one order, and in the other
        engine: AnyEngine = Engine(Breathing(in_step))
        engine.add_event_handler(Events.EPOCH_STARTED, Breathing(before_it))
        Tracker(Reporting()).attach(engine, Events.EPOCH_COMPLETED)
        reports.clear()
        await engine.run([1], max_epochs=2)
        assert reports == ["written", "written", "closed"]


async def test_a_sink_that_cannot_be_closed_is_warned_of_and_the_run_is_none_the_worse(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Full(Memory):
        def close(self) -> None:
            raise OSError("no space left")

    engine = Engine(tenfold)
    tracker = Tracker(Full())
    tracker.attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2])
    assert engine.state.stop_reason is StopReason.COMPLETED
    assert account(tracker) == (2, 2, 0, 0)
    assert len(warnings_of(caplog)) == 1


async def test_a_plain_function_may_return_what_is_to_be_awaited() -> None:
    steps: list[int] = []

    async def write(records: Sequence[Record]) -> None:
        await anyio.lowlevel.checkpoint()
        steps.extend(record.step for record in records)

    engine = Engine(tenfold)

    def hand_over(records: Sequence[Record]) -> Awaitable[None]:
        return write(records)

    Tracker(hand_over).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2])
    assert steps == [1, 2]


async def test_a_sink_that_outlives_the_grace_of_the_engine_fails_the_run_and_nothing_is_unaccounted_for() -> None:
    async def hang(records: Sequence[Record]) -> None:
        await anyio.sleep_forever()

    engine = Engine(tenfold, grace=0.05)
    tracker = Tracker(hang)
    tracker.attach(engine, Events.ITERATION_COMPLETED)  # shutdown_timeout=5
    with pytest.raises(HandlerTimeout, match="hang"):
        await engine.run([1, 2, 3])
    assert account(tracker) == (3, 0, 0, 3)


async def test_a_native_cancellation_loses_no_line(anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has none")
    sink, engine = Held(), Engine(tenfold)
    Tracker(sink, buffer=10**6).attach(engine, Events.ITERATION_COMPLETED)
    task = asyncio.create_task(engine.run(iter(int, 1), epoch_length=10**9))
    await asyncio.to_thread(sink.is_busy.wait)
    task.cancel()
    sink.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sink.steps == list(range(1, engine.state.iteration + 1))


async def test_the_last_lines_before_a_failure_are_written() -> None:
    def fail(engine: AnyEngine, batch: int) -> int:
        if batch == 3:
            raise Boom
        return batch

    sink, engine = Memory(), Engine(fail)
    Tracker(sink).attach(engine)
    with pytest.raises(Boom):
        await engine.run([1, 2, 3, 4])
    assert sink.steps == [1, 2]
    assert sink.closed


async def test_the_last_lines_before_a_cancellation_are_written() -> None:
    sink, engine = Memory(), Engine(tenfold)
    Tracker(sink, buffer=10**6).attach(engine)
    with anyio.CancelScope() as scope:

        @engine.subscribe(Events.ITERATION_COMPLETED(once=5))
        async def cancel(_: object) -> None:
            scope.cancel()

        await engine.run(iter(int, 1), epoch_length=10**9)
    assert sink.steps == list(range(1, engine.state.iteration + 1))
    assert engine.state.iteration >= 5
    assert sink.closed


async def test_a_run_that_is_interrupted_goes_on_writing() -> None:
    sink, engine = Memory(), Engine(tenfold)
    tracker = Tracker(sink, shutdown_timeout=0.0)
    tracker.attach(engine)  # so that the time for the last words is over as soon as it begins
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)

    async def until_it_has_tried(events: int) -> None:
        while tracker.statistics().written + tracker.statistics().failures < events:
            await anyio.lowlevel.checkpoint()

    @engine.on(Events.INTERRUPT)
    async def until_it_has_tried_two() -> None:
        await until_it_has_tried(2)

    @engine.on(Events.EPOCH_COMPLETED)
    async def until_it_has_tried_three() -> None:  # before the true end, whose deadline is another
        await until_it_has_tried(3)

    @engine.on(Events.COMPLETED)
    async def until_it_has_tried_all() -> None:
        await until_it_has_tried(4)

    await engine.run([1, 2, 3])
    assert sink.steps == [1, 2]
    await engine.run()
    assert sink.steps == [1, 2, 3, 3]
    assert tracker.statistics().failures == 0
    assert sink.closed >= 2


async def test_a_record_of_the_last_event_is_written_though_the_time_of_an_event_before_is_over() -> None:
    sink, engine = Memory(), Engine(tenfold)
    tracker = Tracker(sink, shutdown_timeout=0.01)
    tracker.attach(engine, Events.COMPLETED)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), engine.terminate)

    @engine.on(Events.COMPLETED)
    async def take_longer() -> None:
        while not writer_of(tracker).sink.is_late:  # noqa: ASYNC110 -- it is time itself that is waited for
            await anyio.sleep(0.01)
        writer_of(tracker).sink._shutdown_timeout = 30.0

    await engine.run([1, 2])
    assert sink.steps == [1]
    assert tracker.statistics().failures == 0


@pytest.mark.parametrize("moment", ["between runs", "at the start"])
async def test_an_event_before_the_next_run_has_begun_has_nothing_of_the_end_of_the_last(moment: str) -> None:
    sink, engine = Listening(), Engine(tenfold, name="trainer")
    engine.register_events("mine")
    tracker = Tracker(sink, shutdown_timeout=0.0, on_error="raise")
    tracker.attach(engine, "mine")
    await engine.run([1])
    await anyio.sleep(0.01)  # the deadline of the last run, whose shutdown_timeout is 0, is over
    engine.state.max_epochs = None
    sink.reports.clear()
    if moment == "between runs":
        await engine.emit("mine")
    else:

        @engine.on(Events.STARTED)
        async def emit_and_wait(engine: AnyEngine) -> None:
            await engine.emit("mine")
            await engine.flush()

    @engine.on(Events.ITERATION_COMPLETED)
    async def hand_over(engine: AnyEngine) -> None:
        await engine.flush()

    await engine.run([1])
    assert sink.reports == ["trainer begins", "mine", "trainer completed", "close"]
    assert account(tracker) == (1, 1, 0, 0)


async def test_an_event_while_an_interrupted_run_ends_does_not_keep_later_records_from_being_written() -> None:
    sink, engine = Memory(), Engine(tenfold)
    engine.register_events("mine")
    tracker = Tracker(sink)
    tracker.attach(engine, Events.EPOCH_COMPLETED | "mine")
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), engine.interrupt)

    class EmitsLate(Service):
        async def run_ended(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
            while engine.statistics().services[0].is_running:  # which is the tracker
                await anyio.lowlevel.checkpoint()
            if reason is StopReason.INTERRUPTED:
                await engine.emit("mine")

    engine.add_service(EmitsLate())
    await engine.run([1, 2])
    await engine.run()
    assert [record.event for record in sink.records] == ["mine", "EPOCH_COMPLETED"]
    assert account(tracker) == (2, 2, 0, 0)


async def test_two_trackers_of_one_engine_get_everything() -> None:
    one, other, engine = Memory(), Memory(), Engine(tenfold)
    one.fails = 1
    Tracker(one).attach(engine, Events.ITERATION_COMPLETED)
    Tracker(other).attach(engine, Events.ITERATION_COMPLETED(every=2))
    await engine.run(range(10))
    assert (one.steps, other.steps) == ([*range(1, 11)], [2, 4, 6, 8, 10])


def test_run_sync_writes_as_well() -> None:
    sink, engine = Memory(), Engine(tenfold)
    Tracker(sink).attach(engine)
    engine.run_sync([1, 2])
    assert sink.steps == [1, 2, 2]


# Run listeners


class Listening(Memory):
    """A sink that notes what is reported to it of runs, and in which order with its records."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[str] = []

    def run_started(self, engine_name: str, time: float) -> None:
        self.reports.append(f"{engine_name} begins")

    def write(self, records: Sequence[Record]) -> None:
        super().write(records)
        self.reports.extend(record.event for record in records)

    def run_ended(self, engine_name: str, time: float, reason: StopReason) -> None:
        self.reports.append(f"{engine_name} {reason}")

    def close(self) -> None:
        super().close()
        self.reports.append("close")


async def test_a_run_listener_gets_the_begin_of_a_run_and_why_it_ended() -> None:
    sink, engine = Listening(), Engine(tenfold, name="trainer")
    Tracker(sink).attach(engine, Events.EPOCH_COMPLETED)
    for _ in range(2):
        await engine.run([1])
    assert sink.reports == ["trainer begins", "EPOCH_COMPLETED", "trainer completed", "close"] * 2


@pytest.mark.parametrize("skip", [False, True])
async def test_a_run_listener_gets_a_termination_once(*, skip: bool) -> None:
    sink, engine = Listening(), Engine(tenfold, name="trainer")
    Tracker(sink).attach(engine, Events.COMPLETED | Events.TERMINATE)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), engine.terminate, skip_completed=skip)
    await engine.run([1, 2])
    closed = [one for one in sink.reports if one != "close"]
    last = [] if skip else ["COMPLETED"]
    assert closed == ["trainer begins", "TERMINATE", *last, "trainer terminated"]
    assert sink.reports[-1] == "close"


async def test_a_run_listener_gets_a_failure() -> None:
    def fail(engine: AnyEngine, batch: int) -> int:
        raise Boom

    sink, engine = Listening(), Engine(fail, name="trainer")
    Tracker(sink).attach(engine)
    with pytest.raises(Boom):
        await engine.run([1])
    assert sink.reports == ["trainer begins", "trainer failed", "close"]


async def test_a_run_listener_gets_a_cancellation() -> None:
    sink, engine = Listening(), Engine(tenfold, name="trainer")
    Tracker(sink).attach(engine, Events.STARTED)
    with anyio.CancelScope() as scope:

        @engine.on(Events.ITERATION_COMPLETED(once=5))
        async def cancel() -> None:
            scope.cancel()

        await engine.run(iter(int, 1), epoch_length=10**9)
    assert sink.reports == ["trainer begins", "STARTED", "trainer cancelled", "close"]


async def test_a_run_listener_gets_the_failure_of_a_run_that_was_completed() -> None:
    sink, engine = Listening(), Engine(tenfold, name="trainer")
    Tracker(sink).attach(engine, Events.EPOCH_COMPLETED)

    @engine.on(Events.COMPLETED)
    def fail() -> None:
        raise Boom

    with pytest.raises(Boom):
        await engine.run([1])
    assert sink.reports[-2:] == ["trainer failed", "close"]


async def test_a_run_that_is_interrupted_has_not_ended_for_a_run_listener() -> None:
    sink, engine = Listening(), Engine(tenfold, name="trainer")
    Tracker(sink).attach(engine, Events.EPOCH_COMPLETED)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    await engine.run([1, 2, 3])
    assert sink.reports == ["trainer begins", "close"]
    await engine.run()
    assert sink.reports == ["trainer begins", "close", "EPOCH_COMPLETED", "trainer completed", "close"]


@pytest.mark.parametrize(
    "event", [Events.ITERATION_COMPLETED(every=10, at_end=True), Events.COMPLETED(every=2, at_end=True)]
)
@pytest.mark.parametrize("skip", [False, True])
async def test_a_record_that_comes_at_the_very_end_is_written_before_the_end_is_reported(
    event: Any, *, skip: bool
) -> None:
    sink, engine = Listening(), Engine(tenfold, name="trainer")

    def look(_: object) -> dict[str, int]:
        threading.Event().wait(0.02)  # long enough for the task that writes to come to an end
        return {}

    Tracker(sink, values=look).attach(engine, event)
    if skip:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.terminate, skip_completed=True)
    await engine.run(range(5))
    last = [] if skip and event == Events.COMPLETED else [event.name]
    reason = "terminated" if skip else "completed"
    assert sink.reports == ["trainer begins", *last, f"trainer {reason}", "close"]


async def test_a_record_after_the_end_was_reported_is_of_a_run_that_is_reported_again() -> None:
    class EmitsLate(Listening):
        async def close(self) -> None:  # type: ignore[override]
            super().close()
            if self.closed == 1:
                await engine.emit("mine")

    sink, engine = EmitsLate(), Engine(tenfold, name="trainer")
    engine.register_events("mine")
    Tracker(sink).attach(engine, "mine")
    await engine.run([1])
    once = ["trainer begins", "trainer completed", "close"]
    assert sink.reports == [*once, "trainer begins", "mine", *once[1:]]


async def test_the_end_of_a_run_whose_sink_was_given_up_is_not_reported_of_the_next() -> None:
    class Hanging(Listening):
        async def write(self, records: Sequence[Record]) -> None:  # type: ignore[override]
            if engine.state.max_epochs == 1:
                await anyio.sleep_forever()
            super().write(records)

    sink, engine = Hanging(), Engine(tenfold, name="trainer", grace=0.05)
    Tracker(sink).attach(engine, Events.EPOCH_COMPLETED)
    with pytest.raises(HandlerTimeout):
        await engine.run([1])
    assert sink.reports == ["trainer begins", "trainer failed"]
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    await engine.run([1], max_epochs=2)
    assert sink.reports[2:] == ["trainer begins", "EPOCH_COMPLETED", "close"]


@pytest.mark.parametrize("thread", [True, False])
async def test_what_was_taken_of_a_run_without_data_is_written_and_the_sink_closed(*, thread: bool) -> None:
    """Such a run ends without an event."""
    sink, engine = Listening(), Engine(tenfold, name="trainer", thread=thread)
    tracker = Tracker(sink, values=lambda _: {"rate": 0.1})
    tracker.attach(engine, Events.STARTED)
    for _ in range(2):
        with pytest.raises(DataExhausted):
            await engine.run(lambda: iter(()))
        assert sink.reports == ["trainer begins", "STARTED", "trainer failed", "close"]
        sink.reports.clear()
    assert account(tracker) == (2, 2, 0, 0)


async def test_a_sink_that_is_down_has_its_time_when_a_run_found_no_data(caplog: pytest.LogCaptureFixture) -> None:
    sink, engine = Memory(), Engine(tenfold)
    sink.fails = 1
    tracker = Tracker(sink, values=lambda _: {"rate": 0.1})
    tracker.attach(engine, Events.STARTED)
    with pytest.raises(DataExhausted):
        await engine.run(lambda: iter(()))
    assert (account(tracker), sink.tries, sink.closed) == ((1, 1, 0, 0), 2, 1)
    assert len(warnings_of(caplog)) == 1


# Two engines, one sink


class OfMethod:
    def send(self, records: Sequence[Record]) -> None: ...


@pytest.mark.parametrize("is_method", [False, True])
def test_two_engines_of_one_name_on_one_sink_are_warned_of(*, is_method: bool) -> None:
    memory, other = Memory(), OfMethod()
    make: Any = {False: lambda: memory, True: lambda: other.send}[is_method]
    validation, test = Engine(tenfold, name="evaluator"), Engine(tenfold, name="evaluator")
    Tracker(make()).attach(validation, Events.COMPLETED)
    Tracker(make()).attach(validation, Events.EPOCH_COMPLETED)
    Tracker(Memory()).attach(test, Events.COMPLETED)
    Tracker(make()).attach(Engine(tenfold, name="test"), Events.COMPLETED)
    with pytest.warns(UserWarning, match=r"two engines of the name 'evaluator' write to one sink, .* give each a name"):
        Tracker(make()).attach(test, Events.COMPLETED)


async def test_engines_of_one_name_one_after_the_other_are_fine_and_freed_by_reference_count() -> None:
    sink = Memory()
    for _ in range(3):
        engine = Engine(tenfold, name="evaluator", thread=False)
        tracker = Tracker(sink)
        tracker.attach(engine, Events.COMPLETED)
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
        assert account(tracker) == (1, 1, 0, 0)
    assert len(sink.records) == 3


# What the end of a run waits for


async def test_an_event_that_comes_after_the_last_look_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tenfold)
    engine.subscribe(Events.STARTED, print)
    looks = iter([False, True])
    loop_handle = EventLoopHandle()
    consumers = SubscriberTasks(engine._emitter.bus, loop_handle, grace=30.0)
    consumers._ends = dict.fromkeys(engine._emitter.bus.subscribers, ThreadSafeEvent(loop_handle))
    monkeypatch.setattr(Inbox, "is_behind", lambda *_: next(looks))
    await consumers.finish(anyio.current_time() + 30)


async def test_flush_returns_at_once_where_the_tasks_of_the_run_have_ended() -> None:
    engine = Engine(tenfold)
    engine.subscribe(Events.STARTED, print)
    consumers = SubscriberTasks(engine._emitter.bus, EventLoopHandle(), grace=30.0)
    await consumers.end()
    await engine.emit(Events.STARTED)  # waits for the next run
    with anyio.fail_after(10):
        await consumers.flush()

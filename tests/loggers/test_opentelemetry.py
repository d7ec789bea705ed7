"""OpenTelemetry: the spans and metrics that its own SDK gets of a run, and what an exporter does to it."""

import asyncio
import gc
import logging
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
import pytest
from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from support.backends import Backend
from support.record import Boom, at
from support.ways_to_end import is_freed

from aengine import DataExhausted, Engine, Event, Events
from aengine.loggers import Instrumentation, OpenTelemetry, Tracker

AnyEngine: TypeAlias = Engine[Any, Any]

SLACK = 1_000_000
"""Nanoseconds, between two clocks: the one on the wall, and the one that does not jump."""


class Traces:
    """What is traced, written as "run trainer > epoch trainer > iteration trainer"."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("the user's own")

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        """Those that have ended, in the order of their beginnings."""
        return tuple(sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0))

    def all(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.all(name)
        return span

    def line(self, span: ReadableSpan) -> str:
        by_id = {each.context.span_id: each for each in self.spans if each.context is not None}
        names = [span.name]
        while span.parent is not None:
            span = by_id[span.parent.span_id]
            names.insert(0, span.name)
        return " > ".join(names)

    def lines(self, name: str) -> list[str]:
        return [self.line(span) for span in self.all(name)]


@pytest.fixture
def traces() -> Iterator[Traces]:
    traces = Traces()
    yield traces
    traces.provider.shutdown()


def plain(engine: AnyEngine, batch: int) -> int:
    return batch * 10


async def waiting(engine: AnyEngine, batch: int) -> int:
    await anyio.lowlevel.checkpoint()
    return batch * 10


def spanning(traces: Traces, name: str = "in the step") -> Callable[[AnyEngine, int], int]:
    """Return a step that has a span of its own."""

    def step(engine: AnyEngine, batch: int) -> int:
        with traces.tracer.start_as_current_span(name):
            return batch

    return step


def spanning_and_waiting(traces: Traces) -> Callable[[AnyEngine, int], Any]:
    async def step(engine: AnyEngine, batch: int) -> int:
        with traces.tracer.start_as_current_span("in the step"):
            await anyio.lowlevel.checkpoint()
            return batch

    return step


def fail(error: BaseException | None = None) -> None:
    raise error or Boom


def known(span: ReadableSpan) -> dict[str, Any]:
    return {name.removeprefix("aengine."): value for name, value in (span.attributes or {}).items()}


def events_of(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


WAYS = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
STEPS = pytest.mark.parametrize(
    "make",
    [
        lambda traces: Engine(spanning(traces), name="trainer"),
        lambda traces: Engine(spanning(traces), name="trainer", thread=False),
        lambda traces: Engine(spanning_and_waiting(traces), name="trainer"),
    ],
    ids=["worker", "loop", "async"],
)


# Spans and their relations


@WAYS
async def test_a_run_is_a_tree_of_epochs_and_iterations(traces: Traces, *, thread: bool) -> None:
    engine: AnyEngine = Engine(plain, name="trainer", thread=thread)
    Instrumentation(tracer_provider=traces.provider, every=2).attach(engine)
    await engine.run([1, 2, 3], max_epochs=2)
    assert [(traces.line(span), known(span)) for span in traces.spans] == [
        (
            "run trainer",
            {
                "engine": "trainer",
                "max_epochs": 2,
                "epoch_length": 3,
                "resumed": False,
                "epoch": 2,
                "iteration": 6,
                "stop_reason": "completed",
            },
        ),
        ("run trainer > epoch trainer", {"epoch": 1, "epoch_length": 3, "resumed": False}),
        ("run trainer > epoch trainer > iteration trainer", {"epoch": 1, "iteration": 2}),
        ("run trainer > epoch trainer", {"epoch": 2, "epoch_length": 3, "resumed": False}),
        ("run trainer > epoch trainer > iteration trainer", {"epoch": 2, "iteration": 4}),
        ("run trainer > epoch trainer > iteration trainer", {"epoch": 2, "iteration": 6}),
    ]
    assert {span.status.status_code for span in traces.spans} == {StatusCode.UNSET}


@WAYS
async def test_a_run_is_a_child_of_the_span_that_it_was_called_in(traces: Traces, *, thread: bool) -> None:
    engine: AnyEngine = Engine(plain, name="trainer", thread=thread)
    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    with traces.tracer.start_as_current_span("GET /train"):
        await engine.run([1])
        assert context.get_current() == trace.set_span_in_context(trace.get_current_span())
    await engine.run([1])
    assert [known(run)["resumed"] for run in traces.all("run trainer")] == [False, False]
    assert traces.lines("iteration trainer") == [
        "GET /train > run trainer > epoch trainer > iteration trainer",
        "run trainer > epoch trainer > iteration trainer",
    ]


@STEPS
async def test_the_step_sees_the_span_of_its_iteration_or_else_of_its_epoch(
    traces: Traces, make: Callable[[Traces], AnyEngine]
) -> None:
    engine = make(traces)
    Instrumentation(tracer_provider=traces.provider, every=2).attach(engine)
    await engine.run([1, 2, 3])
    assert traces.lines("in the step") == [
        "run trainer > epoch trainer > in the step",
        "run trainer > epoch trainer > iteration trainer > in the step",
        "run trainer > epoch trainer > in the step",
    ]


@WAYS
async def test_inline_handlers_are_within_the_span_of_their_event_in_whatever_order_they_were_added(
    traces: Traces, *, thread: bool
) -> None:
    engine: AnyEngine = Engine(plain, name="trainer", thread=thread)

    @engine.on(Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED | Events.COMPLETED)
    def handle() -> None:
        with traces.tracer.start_as_current_span(f"at {engine.last_event_name.name}"):
            pass

    @engine.on(Events.EPOCH_COMPLETED | Events.COMPLETED)
    async def await_something() -> None:
        with traces.tracer.start_as_current_span(f"async at {engine.last_event_name.name}"):
            await anyio.lowlevel.checkpoint()

    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    await engine.run([1])
    assert {traces.line(span) for span in traces.spans if " at " in f" {span.name}"} == {
        "run trainer > epoch trainer > iteration trainer > at ITERATION_COMPLETED",
        "run trainer > epoch trainer > at EPOCH_COMPLETED",
        "run trainer > epoch trainer > async at EPOCH_COMPLETED",
        "run trainer > at COMPLETED",
        "run trainer > async at COMPLETED",
    }
    ends = {span.name: span.end_time or 0 for span in traces.spans}
    assert ends["at ITERATION_COMPLETED"] <= ends["iteration trainer"]
    assert ends["async at EPOCH_COMPLETED"] <= ends["epoch trainer"]


@WAYS
async def test_an_evaluator_run_in_an_async_handler_is_a_child_of_the_epoch(traces: Traces, *, thread: bool) -> None:
    trainer: AnyEngine = Engine(plain, name="trainer", thread=thread)
    evaluator: AnyEngine = Engine(spanning(traces), name="evaluator", thread=thread)
    Instrumentation(tracer_provider=traces.provider).attach(trainer)
    Instrumentation(tracer_provider=traces.provider).attach(evaluator)

    @trainer.on(Events.EPOCH_COMPLETED)
    async def evaluate() -> None:
        await evaluator.run([1])

    await trainer.run([1], max_epochs=2)
    line = "run trainer > epoch trainer > run evaluator > epoch evaluator > in the step"
    assert traces.lines("in the step") == [line, line]


async def test_an_evaluator_run_in_a_plain_handler_is_a_child_of_the_iteration(traces: Traces) -> None:
    trainer: AnyEngine = Engine(plain, name="trainer")
    evaluator: AnyEngine = Engine(plain, name="evaluator")
    Instrumentation(tracer_provider=traces.provider, every=1).attach(trainer)
    Instrumentation(tracer_provider=traces.provider).attach(evaluator)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: evaluator.run_sync([1]))
    await trainer.run([1])
    assert traces.lines("run evaluator") == [
        "run trainer > epoch trainer > iteration trainer > run evaluator",
    ]


async def test_a_subscriber_is_given_the_context_of_the_run(traces: Traces) -> None:
    trainer: AnyEngine = Engine(plain, name="trainer")
    evaluator: AnyEngine = Engine(plain, name="evaluator")
    instrumentation = Instrumentation(tracer_provider=traces.provider)
    instrumentation.attach(trainer)
    Instrumentation(tracer_provider=traces.provider).attach(evaluator)

    @trainer.subscribe(Events.EPOCH_COMPLETED)
    async def evaluate(event: Event) -> None:
        assert instrumentation.context is not None
        context.attach(instrumentation.context)
        await evaluator.run([1])

    assert instrumentation.context is None
    await trainer.run([1])
    assert instrumentation.context is None
    assert traces.lines("run evaluator") == ["run trainer > run evaluator"]


async def test_two_runs_at_once_have_each_its_own_tree(traces: Traces) -> None:
    async def train(name: str) -> None:
        engine: AnyEngine = Engine(spanning(traces, f"step of {name}"), name=name)
        Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
        with traces.tracer.start_as_current_span(f"POST /{name}"):
            await engine.run([1, 2])

    async with anyio.create_task_group() as group:
        group.start_soon(train, "a")
        group.start_soon(train, "b")
    for name in "ab":
        line = f"POST /{name} > run {name} > epoch {name} > iteration {name} > step of {name}"
        assert traces.lines(f"step of {name}") == [line, line]


def test_run_sync_is_traced_and_leaves_no_span_behind(traces: Traces) -> None:
    engine: AnyEngine = Engine(spanning(traces), name="trainer")
    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    with traces.tracer.start_as_current_span("main") as main:
        engine.run_sync([1])
        assert trace.get_current_span() is main
    assert traces.lines("in the step") == ["main > run trainer > epoch trainer > iteration trainer > in the step"]


async def test_an_instrumented_engine_is_freed_when_nothing_holds_it(traces: Traces) -> None:
    engine: AnyEngine = Engine(plain, name="trainer")
    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    await engine.run([1, 2], max_epochs=2)
    freed = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert await is_freed(freed)
    finally:
        gc.enable()


async def test_what_is_not_sampled_costs_no_span_and_fails_nothing(traces: Traces) -> None:
    engine: AnyEngine = Engine(plain, name="trainer")
    Instrumentation(tracer_provider=trace.NoOpTracerProvider(), every=1).attach(engine)
    await engine.run([1, 2])
    assert engine.state.iteration == 2


# Times


class Held(SpanProcessor):
    """What ends a span waits for the test."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def on_end(self, span: ReadableSpan) -> None:
        self.go_on.wait()


@WAYS
async def test_the_times_are_those_of_the_events_and_not_of_the_writing(traces: Traces, *, thread: bool) -> None:
    held, stepped = Held(), []

    def step(engine: AnyEngine, batch: int) -> None:
        began = time.time_ns()
        sum(range(10_000))
        stepped.append((began, time.time_ns()))

    traces.provider.add_span_processor(held)
    engine: AnyEngine = Engine(step, name="trainer", thread=thread)
    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    let_go_at: list[int] = []

    @engine.on(Events.COMPLETED)
    def let_go() -> None:  # so far nothing was written but, perhaps, the first
        let_go_at.append(time.time_ns())
        held.go_on.set()

    await engine.run([1, 2, 3])
    spans = traces.all("iteration trainer")
    for span, (began, ended), next_begins in zip(spans, stepped, [*stepped[1:], (let_go_at[0], 0)], strict=True):
        assert (span.start_time or 0) <= began
        assert ended - SLACK <= (span.end_time or 0) <= next_begins[0] + SLACK


@WAYS
async def test_children_lie_within_their_parents(traces: Traces, *, thread: bool) -> None:
    engine: AnyEngine = Engine(spanning(traces), name="trainer", thread=thread)
    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    await engine.run([1, 2], max_epochs=3)
    by_id = {span.context.span_id: span for span in traces.spans if span.context is not None}
    children = [span for span in traces.spans if span.parent is not None]
    assert len(children) == 3 + 6 + 6
    for child in children:
        assert child.parent is not None
        parent = by_id[child.parent.span_id]
        assert (parent.start_time or 0) <= (child.start_time or 0) <= (child.end_time or 0)
        assert (child.end_time or 0) <= (parent.end_time or 0) + SLACK


# Ends


@STEPS
async def test_a_run_that_fails_has_the_status_and_its_exception(
    traces: Traces, make: Callable[[Traces], AnyEngine]
) -> None:
    engine, boom = make(traces), Boom("the loss is not a number")
    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)

    at(engine, "IC@1/2", lambda: fail(boom))
    with pytest.raises(Boom):
        await engine.run([1, 2, 3])
    first, last = traces.all("iteration trainer")
    for span in (traces.one("run trainer"), traces.one("epoch trainer"), last):
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == "Boom: the loss is not a number"
        assert known(span)["stop_reason"] == "failed"
    assert first.status.status_code is StatusCode.UNSET
    (event,) = traces.one("run trainer").events
    assert event.name == "exception"
    assert (event.attributes or {})["exception.message"] == "the loss is not a number"


async def test_what_failed_ended_when_it_failed_and_the_run_after_its_clean_up(traces: Traces) -> None:
    engine: AnyEngine = Engine(plain, name="trainer")
    Instrumentation(tracer_provider=traces.provider).attach(engine)

    @engine.on(Events.EXCEPTION_RAISED)
    async def save_what_there_is(engine: AnyEngine, error: Exception) -> None:
        with traces.tracer.start_as_current_span("saving"):
            await anyio.sleep(0.01)  # the time by which it would be wrong

    at(engine, "IC@1/1", fail)
    with pytest.raises(Boom):
        await engine.run([1])
    saving = traces.one("saving")
    assert (traces.one("epoch trainer").end_time or 0) < (saving.end_time or 0)
    assert (saving.end_time or 0) <= (traces.one("run trainer").end_time or 0) + SLACK


async def test_data_without_a_batch_is_a_failure_as_well(traces: Traces) -> None:
    engine: AnyEngine = Engine(plain, name="trainer")
    Instrumentation(tracer_provider=traces.provider).attach(engine)
    with pytest.raises(DataExhausted):
        await engine.run(iter([]), epoch_length=2)
    run = traces.one("run trainer")
    assert run.status.status_code is StatusCode.ERROR
    assert events_of(run) == ["exception"]


async def test_a_run_inside_of_an_except_block_that_completes_has_not_failed(traces: Traces) -> None:
    engine: AnyEngine = Engine(plain, name="trainer")
    Instrumentation(tracer_provider=traces.provider).attach(engine)
    try:
        raise Boom  # noqa: TRY301 -- what a program may be handling when it trains
    except Boom:
        await engine.run([1])
    assert traces.one("run trainer").status.status_code is StatusCode.UNSET


@WAYS
@pytest.mark.parametrize("skip", [False, True], ids=["completed", "skip"])
async def test_a_run_that_is_terminated_says_so_and_the_next_one_that_it_is_resumed(
    traces: Traces, *, thread: bool, skip: bool
) -> None:
    engine: AnyEngine = Engine(plain, name="trainer", thread=thread)
    Instrumentation(tracer_provider=traces.provider, every=2).attach(engine)
    at(engine, "IC@1/2", lambda: engine.terminate(skip_completed=skip))

    @engine.on(Events.COMPLETED)
    def evaluate() -> None:
        with traces.tracer.start_as_current_span("at COMPLETED"):
            pass

    await engine.run([1, 2, 3])
    assert traces.lines("at COMPLETED") == ([] if skip else ["run trainer > at COMPLETED"])
    first = traces.one("run trainer")
    assert (known(first)["stop_reason"], known(first)["resumed"]) == ("terminated", False)
    assert events_of(first) == ["aengine.terminate"]
    assert known(traces.one("epoch trainer"))["stop_reason"] == "terminated"
    await engine.run([1, 2, 3])
    _, second = traces.all("run trainer")
    assert (known(second)["stop_reason"], known(second)["resumed"]) == ("completed", True)
    assert [known(one)["resumed"] for one in traces.all("epoch trainer")] == [False, True]


@WAYS
@pytest.mark.parametrize("where", ["S", "ES", "GS@1/1", "GC@1/1", "IS@1/2", "IC@1/2", "EC", "C"])
async def test_a_run_that_goes_on_is_linked_to_the_one_that_was_interrupted(
    traces: Traces, *, thread: bool, where: str
) -> None:
    engine: AnyEngine = Engine(spanning(traces), name="trainer", thread=thread)
    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    at(engine, where, engine.interrupt)
    await engine.run([1, 2], max_epochs=2)
    with traces.tracer.start_as_current_span("later"):
        await engine.run()
    runs = traces.all("run trainer")
    if where == "C":  # too late: it had completed, and the second is another one
        assert [known(run)["stop_reason"] for run in runs] == ["completed", "completed"]
        assert not runs[1].links
        return
    assert [known(run)["stop_reason"] for run in runs] == ["interrupted", "completed"]
    assert [known(run)["resumed"] for run in runs] == [False, True]
    assert events_of(runs[0]) == ["aengine.interrupt"]
    assert [link.context for link in runs[1].links] == [runs[0].context]
    lines = traces.lines("in the step")
    before = {"S": 0, "ES": 0, "IC@1/2": 2, "EC": 2}.get(where, 1)
    assert [line.startswith("run trainer > epoch trainer") for line in lines] == [
        number < before for number in range(4)
    ]
    if where == "IS@1/2":  # no event comes before that step
        assert lines.pop(1) == "later > in the step"
    assert all(line.startswith("later > run trainer > epoch trainer") for line in lines[before:])


async def test_an_interrupted_run_that_is_given_up_is_linked_to_nothing(traces: Traces) -> None:
    engine: AnyEngine = Engine(plain, name="trainer")
    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    at(engine, "IC@1/1", engine.interrupt)
    await engine.run([1, 2])
    engine.state.max_epochs = None
    await engine.run([1, 2])
    first, second = traces.all("run trainer")
    assert known(first)["stop_reason"] == "interrupted"
    assert not second.links
    assert len(traces.all("epoch trainer")) == 2


@STEPS
async def test_a_run_that_is_cancelled_says_so_and_is_no_error(
    traces: Traces, make: Callable[[Traces], AnyEngine]
) -> None:
    engine = make(traces)
    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    with anyio.CancelScope() as scope:

        @engine.on(Events.ITERATION_COMPLETED(once=2))
        async def cancel() -> None:
            scope.cancel()
            await anyio.lowlevel.checkpoint()

        await engine.run([1, 2, 3])
    assert scope.cancelled_caught
    run = traces.one("run trainer")
    assert (known(run)["stop_reason"], events_of(run)) == ("cancelled", ["aengine.cancelled"])
    assert run.status.status_code is StatusCode.UNSET
    assert len(traces.all("iteration trainer")) == 2
    assert len(traces.all("epoch trainer")) == 1


@WAYS
@pytest.mark.parametrize("skip", [False, True], ids=["completed", "skip"])
@pytest.mark.parametrize("where", ["IS@1/2", "IC@1/2"])
async def test_an_epoch_that_is_terminated_ends_and_the_next_one_begins(
    traces: Traces, *, thread: bool, where: str, skip: bool
) -> None:
    engine: AnyEngine = Engine(plain, name="trainer", thread=thread)
    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    at(engine, where, lambda: engine.terminate_epoch(skip_epoch_completed=skip))
    await engine.run([1, 2, 3], max_epochs=2)
    first, second = traces.all("epoch trainer")
    assert (events_of(first), events_of(second)) == (["aengine.epoch_terminated"], [])
    assert (first.end_time or 0) <= (second.start_time or 0) + SLACK
    assert traces.lines("iteration trainer") == ["run trainer > epoch trainer > iteration trainer"] * 5


@WAYS
@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("where", ["IS@1/2", "IC@1/2", "EC@1/3"])
async def test_a_run_instrumented_under_way_is_traced_from_there(
    traces: Traces, caplog: pytest.LogCaptureFixture, *, thread: bool, where: str, every: int
) -> None:
    engine: AnyEngine = Engine(plain, name="trainer", thread=thread)
    at(engine, where, lambda: Instrumentation(tracer_provider=traces.provider, every=every).attach(engine))
    await engine.run([1, 2, 3], max_epochs=2)
    before = {"IS@1/2": 1, "IC@1/2": 1, "EC@1/3": 0}[where]
    assert traces.lines("iteration trainer") == (
        []
        if every == 100
        else ["run trainer > iteration trainer"] * before + ["run trainer > epoch trainer > iteration trainer"] * 3
    )
    assert traces.lines("epoch trainer") == ["run trainer > epoch trainer"]
    assert not caplog.records


async def test_a_run_instrumented_when_it_is_about_to_end_has_no_spans(traces: Traces) -> None:
    engine: AnyEngine = Engine(plain, name="trainer")
    at(engine, "IC@1/2", lambda: Instrumentation(tracer_provider=traces.provider).attach(engine))
    at(engine, "IC@1/2", engine.terminate)
    await engine.run([1, 2, 3])
    assert not traces.spans
    await engine.run([1, 2, 3])
    assert known(traces.one("run trainer"))["resumed"] is True


@WAYS
@pytest.mark.parametrize("where", ["IS@1/2", "IC@1/2", "EC@1/3"])
async def test_removed_during_a_run_it_ends_the_spans_that_are_open(
    traces: Traces, caplog: pytest.LogCaptureFixture, *, thread: bool, where: str
) -> None:
    engine: AnyEngine = Engine(plain, name="trainer", thread=thread)
    instrumentation = Instrumentation(tracer_provider=traces.provider, every=1)
    handle = instrumentation.attach(engine)
    at(engine, where, handle.remove)
    await engine.run([1, 2, 3], max_epochs=2)
    spans = traces.spans
    assert "stop_reason" not in known(traces.one("run trainer"))
    assert len(traces.all("iteration trainer")) == {"IS@1/2": 2, "IC@1/2": 2, "EC@1/3": 3}[where]
    assert len(traces.all("epoch trainer")) == 1
    assert instrumentation.context is None
    assert (len(engine.listeners()), engine.statistics().services, caplog.records) == (1, (), [])  # that of the test

    instrumentation.attach(engine)
    await engine.run([1])
    assert traces.lines("iteration trainer")[-1] == "run trainer > epoch trainer > iteration trainer"
    assert len(traces.spans) == len(spans) + 3


async def test_removed_after_an_interruption_it_leaves_nothing(traces: Traces) -> None:
    engine: AnyEngine = Engine(plain, name="trainer")
    handle = Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    with engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt):
        await engine.run([1, 2, 3])
    spans = traces.spans
    handle.remove()
    assert (engine.listeners(), engine.statistics().services) == ((), ())
    await engine.run()
    assert traces.spans == spans


async def test_a_native_cancellation_ends_the_spans_too(traces: Traces, anyio_backend: Backend) -> None:
    if anyio_backend[0] != "asyncio":
        pytest.skip("asyncio's own")
    engine: AnyEngine = Engine(waiting, name="trainer")
    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    at(engine, "IC@1/2", lambda: task.cancel())  # noqa: PLW0108 -- made below
    task = asyncio.ensure_future(engine.run([1, 2, 3]))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert known(traces.one("run trainer"))["stop_reason"] == "cancelled"
    assert len(traces.all("epoch trainer")) == 1


async def test_a_span_processor_that_fails_is_logged_and_the_run_goes_on(
    traces: Traces, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            if span.name != "run trainer":
                raise Boom

    traces.provider.add_span_processor(Failing())
    engine: AnyEngine = Engine(plain, name="trainer")
    Instrumentation(tracer_provider=traces.provider, every=1).attach(engine)
    await engine.run([1, 2])
    assert engine.state.iteration == 2
    assert sum("spans of trainer" in record.getMessage() for record in caplog.records) == 3
    assert len(traces.all("iteration trainer")) == 2


# Metrics


class Meters:
    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)

    def points(self, name: str) -> list[Any]:
        data = self.reader.get_metrics_data()
        assert data is not None
        return [
            point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


@pytest.fixture
def meters() -> Iterator[Meters]:
    meters = Meters()
    yield meters
    meters.provider.shutdown()


@WAYS
async def test_iterations_are_counted_over_all_runs(meters: Meters, *, thread: bool) -> None:
    engine: AnyEngine = Engine(plain, name="evaluator", thread=thread)
    Instrumentation(tracer_provider=trace.NoOpTracerProvider(), meter_provider=meters.provider, every=4).attach(engine)
    await engine.run([1, 2, 3], max_epochs=2)
    await engine.run([1, 2, 3])
    at(engine, "IC@1/2", engine.interrupt)
    await engine.run([1, 2, 3])
    await engine.run()
    (count,) = meters.points("aengine.iterations")
    assert (count.value, count.attributes) == (12, {"aengine.engine": "evaluator"})


async def test_the_count_is_there_while_the_run_goes_on(meters: Meters) -> None:
    engine: AnyEngine = Engine(plain, name="trainer")
    Instrumentation(tracer_provider=trace.NoOpTracerProvider(), meter_provider=meters.provider, every=2).attach(engine)
    seen: list[int] = []

    @engine.on(Events.ITERATION_COMPLETED(once=5))
    async def look() -> None:
        await engine.flush()
        (count,) = meters.points("aengine.iterations")
        seen.append(count.value)

    await engine.run(range(6))
    assert seen[0] in (4, 5)  # of four, or read when the fifth had begun


async def test_the_time_is_split_as_in_the_statistics(meters: Meters) -> None:
    engine: AnyEngine = Engine(plain, name="trainer")
    Instrumentation(tracer_provider=trace.NoOpTracerProvider(), meter_provider=meters.provider).attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: sum(range(10_000)))
    await engine.run(range(500), max_epochs=2)
    spent = engine.statistics()
    points = {point.attributes["aengine.activity"]: point.value for point in meters.points("aengine.time")}
    assert points == pytest.approx(
        {
            "data": spent.data,
            "step": spent.step,
            "handlers": sum(spent.handlers.values()),
            "back_pressure": spent.back_pressure,
            "event_loop": spent.event_loop,
        },
        abs=0.01,
    )
    assert points["step"] == pytest.approx(spent.step)
    assert points["handlers"] > 0


async def test_the_durations_of_traced_iterations_are_a_histogram(traces: Traces, meters: Meters) -> None:
    engine: AnyEngine = Engine(plain, name="trainer")
    Instrumentation(tracer_provider=traces.provider, meter_provider=meters.provider, every=2).attach(engine)
    await engine.run(range(6))
    (point,) = meters.points("aengine.iteration.duration")
    took = [(span.end_time or 0) - (span.start_time or 0) for span in traces.all("iteration trainer")]
    assert (point.count, point.sum) == (3, pytest.approx(sum(took) / 1e9, abs=1e-6))
    assert point.explicit_bounds[0] == 1e-4


async def test_logged_numbers_are_gauges_by_name(meters: Meters) -> None:
    for name in ("trainer", "evaluator"):
        engine: AnyEngine = Engine(lambda engine, batch: {"loss": batch / 2, "top 5 %": batch}, name=name)
        Tracker(OpenTelemetry(meters.provider)).attach(engine, Events.ITERATION_COMPLETED)
        await engine.run([1, 2] if name == "trainer" else [3])
    losses = {point.attributes["aengine.engine"]: point.value for point in meters.points("aengine.values.loss")}
    assert losses == {"trainer": 1.0, "evaluator": 1.5}
    assert [point.value for point in meters.points("aengine.values.top_5__")] == [2, 3]


# Exporters


class Collector(ThreadingHTTPServer):
    """A collector that keeps the spans and the metrics it is sent, once it answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Collecting)
        self.spans: list[Any] = []
        self.metrics: dict[str, Any] = {}
        self.is_called = threading.Event()
        self.answers = threading.Event()
        self.answers.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Collecting(BaseHTTPRequestHandler):
    server: Collector  # type: ignore[mutable-override]  # it is only made by a Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.is_called.set()
        self.server.answers.wait()
        answer: Any
        if self.path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
            answer = ExportTraceServiceResponse()
        else:
            for of in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                self.server.metrics |= {metric.name: metric for scope in of.scope_metrics for metric in scope.metrics}
            answer = ExportMetricsServiceResponse()
        content = answer.SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.answers.set()
        collector.shutdown()
        thread.join()


@WAYS
async def test_a_collector_gets_every_span_and_the_metrics(collector: Collector, *, thread: bool) -> None:
    tracers, engine = TracerProvider(shutdown_on_exit=False), Engine(plain, name="trainer", thread=thread)
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{collector.url}/v1/traces")))
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{collector.url}/v1/metrics"))
    meters = MeterProvider([reader], shutdown_on_exit=False)
    Instrumentation(tracer_provider=tracers, meter_provider=meters, every=1).attach(engine)
    Tracker(OpenTelemetry(meters)).attach(engine, Events.EPOCH_COMPLETED)
    await engine.run(range(100), max_epochs=3)
    tracers.shutdown()
    meters.shutdown()
    names = [span.name for span in collector.spans]
    assert {name: names.count(name) for name in set(names)} == {
        "run trainer": 1,
        "epoch trainer": 3,
        "iteration trainer": 300,
    }
    (run,) = (span for span in collector.spans if span.name == "run trainer")
    assert {span.parent_span_id for span in collector.spans if span.name == "epoch trainer"} == {run.span_id}
    assert {span.trace_id for span in collector.spans} == {run.trace_id}
    assert collector.metrics["aengine.iterations"].sum.data_points[0].as_int == 300
    assert collector.metrics["aengine.values.output"].gauge.data_points[0].as_int == 990


@WAYS
async def test_a_collector_that_does_not_answer_holds_up_no_run(collector: Collector, *, thread: bool) -> None:
    collector.answers.clear()
    tracers, engine = TracerProvider(shutdown_on_exit=False), Engine(plain, name="trainer", thread=thread)
    exporter = OTLPSpanExporter(f"{collector.url}/v1/traces")
    tracers.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1))
    Instrumentation(tracer_provider=tracers, every=1).attach(engine)
    await engine.run(range(100), max_epochs=3)
    collector.is_called.wait()
    assert engine.state.iteration == 300
    assert not collector.spans  # it still has the first of them in hand
    collector.answers.set()
    tracers.shutdown()
    assert len(collector.spans) == 1 + 3 + 300


@WAYS
async def test_a_collector_that_is_down_holds_up_no_run(caplog: pytest.LogCaptureFixture, *, thread: bool) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Collecting) as gone:
        port = gone.server_address[1]
    tracers, engine = TracerProvider(shutdown_on_exit=False), Engine(plain, name="trainer", thread=thread)
    exporter = OTLPSpanExporter(f"http://127.0.0.1:{port}/v1/traces", timeout=0.1)
    tracers.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1))
    Instrumentation(tracer_provider=tracers, every=1).attach(engine)
    state = await engine.run(range(100), max_epochs=3)
    tracers.shutdown()
    assert state.iteration == 300
    assert any(record.name.startswith("opentelemetry") for record in caplog.records if record.levelno >= logging.ERROR)
    assert not [record for record in caplog.records if record.name.startswith("aengine")]


# The door


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_what_is_no_number_of_iterations_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match=f"every= is a whole number of iterations, 1 or more; got {every}"):
        Instrumentation(every=every).attach(Engine(plain))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_the_package_it_says_what_to_install() -> None:
    done = run_python("import sys; sys.modules['opentelemetry'] = None; from aengine.loggers import Instrumentation")
    assert 'pip install -e ".[opentelemetry]"' in done.stderr


def test_the_api_alone_is_enough() -> None:
    code = """
import sys
sys.modules["opentelemetry.sdk"] = None
from aengine import Engine
from aengine.loggers import Instrumentation, OpenTelemetry, Tracker
engine = Engine(lambda engine, batch: batch)
Instrumentation(every=1).attach(engine)
Tracker(OpenTelemetry()).attach(engine)
print(engine.run_sync([1, 2]).iteration)
"""
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("2\n", "")

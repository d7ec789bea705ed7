"""OpenTelemetry: a run as spans and metrics, in the trace of its caller.

Instrumentation().attach(trainer)                                # spans, and metrics of the loop
Tracker(OpenTelemetry()).attach(trainer, Events.EPOCH_COMPLETED)  # its numbers, as gauges

Needs the API of OpenTelemetry, which does nothing by itself: the SDK and an exporter are the application's choice.
"""

import re
import threading
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from time import perf_counter, time_ns
from typing import Any, NamedTuple, TypeAlias

from aengine.arguments import check_whole
from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.drivers.services import Service
from aengine.engine import Engine
from aengine.events import Event, Events, EventsList
from aengine.extras import missing_package
from aengine.keywords import explain_wrong_call
from aengine.loggers.sink import Record
from aengine.state import StopReason
from aengine.statistics import EngineStatistics

try:
    from opentelemetry import context, metrics, trace
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Span, Status, StatusCode
except ImportError as _error:
    raise missing_package(__name__, "opentelemetry-api>=1.30", "opentelemetry") from _error

AnyEngine: TypeAlias = Engine[Any, Any]
Attributes: TypeAlias = dict[str, str | int | bool]

_NAME = "aengine"  # of the instrumentation, to OpenTelemetry
_STOPS = Events.TERMINATE | Events.INTERRUPT | Events.CANCELLED
_FIRST_OF_RESUMED = EventsList(event for event in Events if event is not Events.STARTED)
"""The events that may come first in a run that was interrupted and goes on."""

_BUCKETS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
"""Bounds of the histogram in seconds; OpenTelemetry's default ones are for milliseconds."""


@explain_wrong_call
class OpenTelemetry:
    """A sink for `Tracker`: each number becomes a gauge, "aengine.values.loss", with the engine's name as attribute.

    Characters that OpenTelemetry does not allow in the name of a metric become "_". Several engines may share one. A
    gauge has the time of the writing, because OpenTelemetry takes no other, and keeps the last value only: log as often
    as the reader collects.

    Args:
        meter_provider: gives the meter; by default the global one.
    """

    def __init__(self, meter_provider: metrics.MeterProvider | None = None) -> None:
        self._meter = metrics.get_meter(_NAME, meter_provider=meter_provider)
        self._gauges: dict[str, Any] = {}
        self._lock = threading.Lock()  # each engine that shares this calls it from a thread of its own

    def write(self, records: Sequence[Record], /) -> None:
        """Set the gauges."""
        with self._lock:
            for record in records:
                attributes: Attributes = {"aengine.engine": record.engine_name}
                for name, value in record.values.items():
                    self._gauge(name).set(value, attributes)

    def _gauge(self, name: str) -> Any:
        gauge = self._gauges.get(name)
        if gauge is None:
            # OpenTelemetry's specification, "Instrument name syntax": 255 characters of these at most.
            allowed = f"aengine.values.{re.sub(r'[^-_./0-9A-Za-z]', '_', name)}"[:255]
            gauge = self._gauges[name] = self._meter.create_gauge(allowed, description=f"{name}, as it was logged")
        return gauge

    def __repr__(self) -> str:
        return "OpenTelemetry()"


@explain_wrong_call
class Instrumentation:
    """Traces and measures the runs of an engine: attach one to each engine, before other handlers are added.

        Instrumentation().attach(trainer)
        Instrumentation().attach(evaluator)

    A run is a span, a child of the caller's current one; its epochs are children of that, and one iteration in `every`
    a child of its epoch. The step, and what handlers call, see the innermost of these as the current span, on the
    worker thread too. So their own spans, and the runs of other engines, become its children. There are two exceptions:
    async inline handlers, where a plain step runs on the worker, see the epoch in place of the iteration, and
    subscribers see the caller's span (see `context`).

    The span of an iteration or an epoch ends after the inline handlers of its last event, that of a run when its
    subscribers are done. A run that fails has the status ERROR, and the exception recorded; the epoch and the iteration
    in which it failed have the status, too. "aengine.stop_reason" says how it ended otherwise. A run that goes on after
    `interrupt()` is a new span, linked to the one before. It begins with its first event: if the run was interrupted at
    ITERATION_STARTED, the step comes before that.

    Metrics, with the engine's name as attribute: "aengine.iterations" counts iterations begun; "aengine.time" the
    seconds of `engine.statistics()`, with "aengine.activity" for what they were spent on; "aengine.iteration.duration"
    is a histogram of the iterations that are spans. All are updated when a span ends.

    The spans of iterations and epochs are ended beside the step, in a thread; those of runs on the event loop. A span
    processor that exports at once, as SimpleSpanProcessor does, would hold that up: give the provider a
    BatchSpanProcessor. What it raises is logged.

    Args:
        tracer_provider: gives the tracer; by default the global one, which an application may set later.
        meter_provider: gives the meter; likewise.
        every: one iteration in so many is a span.

    Raises:
        ValueError: `every` is no whole number, or less than 1.
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        every: int = 100,
    ) -> None:
        self._every = check_whole(every, "every=", minimum=1, of="iterations")
        self._attachment = Attachment(self)
        self._tracer = trace.get_tracer(_NAME, tracer_provider=tracer_provider)
        self._meter = metrics.get_meter(_NAME, meter_provider=meter_provider)
        self._spans: _Spans | None = None  # until it is attached

    @property
    def context(self) -> Context | None:
        """OpenTelemetry's context with the span of the run under way, None between runs.

        For code that Python's context variables do not reach: a subscriber's handler gives it to
        `tracer.start_span(context=...)`, or hands it to `opentelemetry.context.attach` before it runs another engine.
        """
        return None if self._spans is None else self._spans.context

    def attach(self, engine: AnyEngine) -> RemovableEventHandle:
        """Trace the runs of an engine, also the one under way.

        What is returned removes it again; during a run, the spans that are open then end, without a stop reason.

        Raises:
            TypeError: this is no engine.
            RuntimeError: this is attached already.
        """
        return self._attachment.begin(engine, self._listen(engine))

    def _listen(self, engine: AnyEngine) -> Iterator[RemovableEventHandle]:
        spans = self._spans = _Spans(self._tracer, _Costs(self._meter, engine.name), engine.name)
        name = f"spans of {engine.name}"
        yield engine.add_service(spans, on_error="log", name=name)
        started, completed = Events.ITERATION_STARTED(every=self._every), Events.ITERATION_COMPLETED(every=self._every)
        yield engine.add_event_handler(Events.STARTED, spans.begin_run)
        yield engine.add_event_handler(Events.EPOCH_STARTED, spans.begin_epoch)
        yield engine.add_event_handler(started, spans.begin_iteration)
        yield engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, spans.note_end_of_epoch)
        for event in _STOPS:
            yield engine.add_event_handler(event, spans.stop, event.value)
        yield engine.add_event_handler(Events.EXCEPTION_RAISED, spans.fail)

        # A snapshot is taken after all inline handlers, in whatever order they were added: all are within the span.
        leave, leave_epoch = spans.leave_iteration, spans.leave_epoch
        yield engine.subscribe(completed, spans.end_iteration, snapshot=leave, on_error="log", name=name)
        yield engine.subscribe(Events.EPOCH_COMPLETED, spans.end, snapshot=leave_epoch, on_error="log", name=name)
        yield RemovableEventHandle(spans.forget)  # first of all, when it is removed


class _Spans(Service):
    """The spans of one engine's runs, as long as an Instrumentation is attached to it."""

    def __init__(self, tracer: trace.Tracer, costs: "_Costs", engine_name: str) -> None:
        self.context: Context | None = None
        self._tracer = tracer
        self._costs = costs
        self._engine_name = engine_name
        self._run: _Open | None = None
        self._epoch: _Open | None = None
        self._iteration: _Open | None = None
        self._stopped_at: float | None = None
        self._interrupted: Span | None = None  # of the run that was interrupted, and may go on
        self._was_in_epoch = False  # when it was interrupted
        self._until_resumed = RemovableEventHandle(lambda: None)  # the handler of its next event
        self._is_removed = False  # though handlers of the event under way are still called

    def forget(self) -> None:
        """Begin and leave no span any more: those that are open end with the service."""
        self._is_removed = True
        self._until_resumed.remove()

    # Beside the step, in a thread

    def end_iteration(self, event: "Event[Any, _Ended]") -> None:
        for opened in event.snapshot.opened:
            self._costs.took(event.monotonic - opened.began)
        self.end(event)

    def end(self, event: "Event[Any, _Ended]") -> None:
        ended = event.snapshot
        for opened in ended.opened:
            opened.end(event.monotonic)
        self._costs.add(ended.engine)

    # Inline, where the step runs

    def begin_run(self, engine: AnyEngine) -> Awaitable[None] | None:
        if self._is_removed:
            return None
        self._interrupted = None  # this run begins anew
        return _enter(self._ensure_run(engine))

    def begin_epoch(self, engine: AnyEngine) -> Awaitable[None] | None:
        if self._is_removed:
            return None
        run = self._ensure_run(engine)
        for opened in self._take_epoch():  # of an epoch whose EPOCH_COMPLETED was skipped
            opened.end(perf_counter())
        return _enter(self._open_epoch(engine, run))

    def begin_iteration(self, engine: AnyEngine) -> None:
        if self._is_removed:
            return
        outside = self._ensure_run(engine) if self._epoch is None else self._epoch.context
        attributes = {"aengine.iteration": engine.state.iteration, "aengine.epoch": engine.state.epoch}
        self._iteration = self._open("iteration", outside, attributes)
        context.attach(self._iteration.context)

    def leave_iteration(self, engine: AnyEngine) -> "_Ended":
        if self._is_removed:
            return _Ended(engine, ())
        run = self._ensure_run(engine)
        iteration, self._iteration = self._iteration, None
        context.attach(run if self._epoch is None else self._epoch.context)
        return _Ended(engine, () if iteration is None else (iteration,))

    def leave_epoch(self, engine: AnyEngine) -> "Awaitable[_Ended] | _Ended":
        if self._is_removed:
            return _Ended(engine, ())
        run = self._ensure_run(engine)
        return _enter(run, _Ended(engine, self._take_epoch()))

    def _take_epoch(self) -> tuple["_Open", ...]:
        """Return the open spans of the epoch, the innermost first, and hold them no longer."""
        opened = tuple(one for one in (self._iteration, self._epoch) if one is not None)
        self._iteration = self._epoch = None
        return opened

    def note_end_of_epoch(self) -> None:
        if self._epoch is not None:
            self._epoch.span.add_event("aengine.epoch_terminated")

    def stop(self, _: AnyEngine, how: str) -> Awaitable[None] | None:
        self._stopped_at = perf_counter()
        if self._run is None or self._is_removed:
            return None
        self._run.span.add_event(f"aengine.{how}")
        return _enter(self._run.context)  # what the handlers of COMPLETED do is not in the epoch

    def fail(self) -> None:
        self._stopped_at = perf_counter()

    # Runs

    async def run_ended(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
        self._end_run(engine, reason, error)

    def run_abandoned(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
        self._end_run(engine, None if self._is_removed else reason, error)  # the run goes on

    def _ensure_run(self, engine: AnyEngine) -> Context:
        """Return the context of the run. Begins its span if this is the first event of it that is seen."""
        if self._run is not None:
            return self._run.context
        self._until_resumed.remove()
        state, interrupted = engine.state, self._interrupted
        attributes = {
            "aengine.engine": engine.name,
            "aengine.max_epochs": state.max_epochs,
            "aengine.max_iters": state.max_iters,
            "aengine.epoch_length": state.epoch_length,
            "aengine.resumed": interrupted is not None or state.iteration > 0,
        }
        links = () if interrupted is None else (Link(interrupted.get_span_context()),)
        self._run = self._open("run", context.get_current(), attributes, links)
        self.context = self._run.context
        self._costs.begin(engine.statistics())
        self._stopped_at = None
        if interrupted is not None and self._was_in_epoch:
            self._open_epoch(engine, self.context)
        self._interrupted, self._was_in_epoch = None, False
        return self.context

    def _resume(self, engine: AnyEngine) -> Awaitable[None] | None:
        if self._is_removed:
            return None
        run = self._ensure_run(engine)
        return _enter(run if self._epoch is None else self._epoch.context)

    def _open_epoch(self, engine: AnyEngine, run: Context) -> Context:
        state = engine.state
        attributes = {
            "aengine.epoch": state.epoch,
            "aengine.epoch_length": state.epoch_length,
            "aengine.resumed": state.iteration > state.epoch_start or self._interrupted is not None,
        }
        self._epoch = self._open("epoch", run, attributes)
        return self._epoch.context

    def _end_run(self, engine: AnyEngine, reason: StopReason | None, error: BaseException | None) -> None:
        run, self._run, self.context = self._run, None, None
        if run is None:  # it fired no event since this was attached
            return
        if reason is not StopReason.FAILED:  # a Ctrl-C cancels a run
            error = None
        if reason is StopReason.INTERRUPTED and not self._is_removed:
            self._interrupted, self._was_in_epoch = run.span, self._epoch is not None
            # No STARTED comes when it goes on: its span begins with its next event, whichever that is.
            self._until_resumed = engine.add_event_handler(_FIRST_OF_RESUMED, lambda: self._resume(engine))
        state, now = engine.state, perf_counter()
        stopped_at = now if self._stopped_at is None else self._stopped_at
        ends = [*((opened, stopped_at) for opened in self._take_epoch()), (run, now)]
        if error is not None:
            run.span.record_exception(error)
        run.span.set_attributes({"aengine.epoch": state.epoch, "aengine.iteration": state.iteration})
        for opened, at in ends:
            if reason is not None:
                opened.span.set_attribute("aengine.stop_reason", str(reason))
            if error is not None:
                opened.span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
            opened.end(at)
        self._costs.add(engine)

    def _open(self, what: str, outside: Context, attributes: Mapping[str, Any], links: Sequence[Link] = ()) -> "_Open":
        known, began, now = _known(attributes), perf_counter(), time_ns()
        span = self._tracer.start_span(
            f"{what} {self._engine_name}", outside, attributes=known, links=links, start_time=now
        )
        return _Open(span, trace.set_span_in_context(span, outside), began, now)


class _Open:
    """A span that has begun. Its duration is measured by the monotonic clock: the wall clock may jump meanwhile."""

    __slots__ = ("_began", "began", "context", "span")

    def __init__(self, span: Span, inside: Context, began: float, now: int) -> None:
        self.span = span
        self.context = inside
        self.began = began
        self._began = now

    def end(self, at: float) -> None:
        self.span.end(self._began + int((at - self.began) * 1e9))


class _Ended(NamedTuple):
    """The spans that an event ends. With the engine, because the Instrumentation must not hold it: a cycle."""

    engine: AnyEngine
    opened: tuple[_Open, ...]


class _Costs:
    """Where the time of a run goes, as metrics: the differences between two calls of `engine.statistics()`."""

    def __init__(self, meter: metrics.Meter, engine_name: str) -> None:
        self._engine: Attributes = {"aengine.engine": engine_name}
        self._iterations = meter.create_counter("aengine.iterations", "{iteration}", "Iterations begun")
        self._time = meter.create_counter("aengine.time", "s", "Time of the loop, by what it was spent on")
        self._duration = meter.create_histogram(
            "aengine.iteration.duration",
            "s",
            "Time from ITERATION_STARTED to ITERATION_COMPLETED, of the iterations that are spans",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._counted = 0
        self._spent: dict[str, float] = {}
        self._lock = threading.Lock()  # two subscribers, each with a thread, and the end of the run add to them

    def begin(self, now: EngineStatistics) -> None:
        self._counted, self._spent = now.iteration, _spent(now)

    def took(self, seconds: float) -> None:
        self._duration.record(seconds, self._engine)

    def add(self, engine: AnyEngine) -> None:
        with self._lock:
            now = engine.statistics()  # within the lock, so that the statistics are added in their order
            spent = _spent(now)
            self._iterations.add(max(0, now.iteration - self._counted), self._engine)
            for activity, seconds in spent.items():
                more = max(0.0, seconds - self._spent[activity])  # negative where a handler was removed, with its time
                self._time.add(more, {**self._engine, "aengine.activity": activity})
            self._counted, self._spent = now.iteration, spent


def _spent(statistics: EngineStatistics) -> dict[str, float]:
    return {
        "data": statistics.data,
        "step": statistics.step,
        "handlers": sum(statistics.handlers.values()),
        "back_pressure": statistics.back_pressure,
        "event_loop": statistics.event_loop,
    }


def _enter(inside: Context, result: Any = None) -> Awaitable[Any]:
    """Make a context the current one: here, where the step runs, and, when awaited, on the event loop.

    No token is kept for a reset: both places have copies of the caller's context variables, which end with the run.
    """
    context.attach(inside)
    return _enter_on_event_loop(inside, result)


async def _enter_on_event_loop(inside: Context, result: Any) -> Any:
    context.attach(inside)
    return result


def _known(attributes: Mapping[str, Any]) -> Attributes:
    return {name: value for name, value in attributes.items() if value is not None}

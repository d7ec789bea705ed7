"""Tracker: takes the numbers of a run between two steps, and has them written to a sink beside the step."""

import io
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from threading import Lock
from time import perf_counter
from types import MethodType
from typing import Any, Literal, TypeAlias

from aengine.arguments import check_choice, check_seconds, check_whole
from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.bus.listeners import Observer
from aengine.callables import check_callable, is_async_callable
from aengine.engine import Engine, session_of
from aengine.events import EventLike, Events, FilteredEvent, date_of, selectors
from aengine.keywords import explain_wrong_call
from aengine.loggers.retry import name_of_sink
from aengine.loggers.scalars import numbers_of, snapshot
from aengine.loggers.sink import Record, Sink, Write
from aengine.loggers.writer import RecordWriter

AnyEngine: TypeAlias = Engine[Any, Any]

_OF_ITERATIONS = frozenset({"GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED", "ITERATION_COMPLETED"})
_AGAIN = _OF_ITERATIONS - {"ITERATION_COMPLETED"} | {"STARTED", "EPOCH_STARTED", "DATALOADER_STOP_ITERATION"}
"""Events that come again, at the step that was completed, where a run goes on."""
_ENDS = Events.TERMINATE | Events.INTERRUPT | Events.COMPLETED | Events.CANCELLED | Events.EXCEPTION_RAISED


@dataclass(frozen=True, slots=True)
class TrackerStatistics:
    """What became of the records of one tracker: `taken == written + dropped + waiting`.

    Attributes:
        name: the sink.
        taken: records made.
        written: records that the sink has accepted.
        dropped: records given up because more than `buffer` waited.
        waiting: records in the buffer, and those that the sink is just writing.
        failures: calls of the sink that raised, or outlived the run.
        busy: seconds in the sink.
    """

    name: str
    taken: int
    written: int
    dropped: int
    waiting: int
    failures: int
    busy: float


@explain_wrong_call
class Tracker:
    """Has the numbers of an engine written to a sink at each event, beside the step, which never waits for it.

        Tracker(JSONLines("log.jsonl")).attach(trainer, Events.ITERATION_COMPLETED(every=10) | Events.EPOCH_COMPLETED)

    What waits at the end of a run, however it ends, is written before `run()` returns. `engine.flush()` waits until
    what was taken before it is written, but not for a sink that is down. Apart from that, records of iterations may
    wait a tenth of a second for others, and come to the sink together.

    When a run goes on from a checkpoint, the sink is notified up to where its records stand, if it is `Rewindable`, as
    `JSONLines` is: so none is there twice.

    Args:
        sink: where they are written to: an object with `write(records)`, or a function. See `Sink`. Several Trackers
            may share one.
        values: `values(engine)` returns numbers by name. It is called between two steps, after the inline handlers.
            Tensors of one number are allowed: on a device they are copied there, and read beside the step. By default
            the output and the metrics, as far as they are numbers.
        step: `step(engine)` returns the step to write, for an engine whose own iterations mean nothing to the reader:
            `step=lambda _: trainer.state.iteration` for an evaluator.
        buffer: how many records may wait. Over that the oldest are dropped, those of iterations before all others; the
            first drop is warned of, and all are counted in `statistics()`.
        shutdown_timeout: seconds, or a timedelta, that a sink may have at the end of a run, if it is slow or down. Less
            than the engine's `grace`.
        on_error: what an exception of the sink does: "log" logs one warning, tries the same records again after 0.1
            seconds, with the first record that comes then, next after twice as long, up to a minute, and logs when it
            works again; "raise" fails the run, and closes the sink.

    Attributes:
        name: the sink's.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(
        self,
        sink: Sink | Write,
        *,
        values: Callable[[AnyEngine], Mapping[str, Any]] = numbers_of,
        step: Callable[[AnyEngine], int] | None = None,
        buffer: int = 10_000,
        shutdown_timeout: float | timedelta = 5.0,
        on_error: Literal["raise", "log"] = "log",
    ) -> None:
        _check_sink(sink)
        check_callable(values, "values=", "values", "engine")
        if step is not None:
            check_callable(step, "step=", "step", "engine")
        check_whole(buffer, "buffer=", minimum=1, of="records that may wait")
        seconds = check_seconds(shutdown_timeout, "shutdown_timeout=", 5.0)
        check_choice(on_error, "on_error=", ("raise", "log"))
        self.name: str = name_of_sink(sink)
        self._sink = sink
        self._values = values
        self._step = step
        self._make_writer = partial(RecordWriter, sink, buffer, seconds, must_raise=on_error == "raise")
        self._writer: RecordWriter | None = None  # until it is attached
        self._attachment = Attachment(self)

    def attach(
        self, engine: AnyEngine, event: EventLike = Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED
    ) -> RemovableEventHandle:
        """Take the numbers of an engine at each event, also in the run under way.

        What is returned removes it again. During a run, what was taken until then is still written, in
        `shutdown_timeout` seconds and beside the step, and the sink is closed as at the end of a run: `engine.flush()`
        waits for that. Where no run is under way, what a sink that is down has not taken is lost.

        Two engines of one name that are alive and write to one sink are warned of.

        Args:
            engine: the engine whose numbers are written.
            event: when they are taken: an event, filtered or not, or several.

        Raises:
            TypeError: this is no engine, or no event.
            ValueError: the engine has no such event.
            RuntimeError: this is attached already; or another Tracker gives the sink the same values of this engine at
                one of these events.
        """
        advice = "; event= takes several, joined by |"
        return self._attachment.begin(engine, self._listen(engine, event), advice)

    def statistics(self) -> TrackerStatistics:
        """Return what has become of the records since this was attached."""
        writer = self._writer
        if writer is None:
            return TrackerStatistics(self.name, taken=0, written=0, dropped=0, waiting=0, failures=0, busy=0.0)
        buffer, sink = writer.buffer, writer.sink
        with writer.lock:
            return TrackerStatistics(
                self.name, buffer.taken, buffer.written, buffer.dropped, buffer.waiting, sink.failures, sink.busy
            )

    def _listen(self, engine: AnyEngine, event: EventLike) -> Iterator[RemovableEventHandle]:
        engine.on(event)  # raises for what is no event of this engine
        chosen = selectors(event)
        writer = self._make_writer(partial(_standing, self._step, frozenset(one.name for one in chosen)))
        # Observers: they run after all other inline handlers, so the records have what those have made.
        takes = [
            (
                FilteredEvent(one.name, one.filter),
                # The sink's id, because two sinks may be equal.
                Observer(
                    f"records for {self.name}",
                    partial(self._take, writer, one.name),
                    (id(self._sink), self._values, self._step, one.filter),
                ),
            )
            for one in chosen
        ]
        for one, take in takes:
            if engine.has_event_handler(take, one):
                raise RuntimeError(
                    f"{self.name} gets these values of engine {engine.name!r} at {one} already, and would get each of"
                    " them twice: attach one Tracker only, or choose other events, or other values="
                )
        self._writer = writer
        service = engine.add_service(writer, name=self.name)
        session = session_of(engine)  # the handle is the user's to keep, and keeps no engine alive
        yield RemovableEventHandle(lambda: writer.leave(service.remove, is_running=session.is_running))
        for one, take in takes:
            yield engine.add_event_handler(one, take)
        yield engine.add_event_handler(_ENDS, Observer(f"ends for {self.name}", writer.end))
        yield _share(engine, self._sink)

    def _take(self, writer: RecordWriter, event: str, engine: AnyEngine, *_: object) -> None:
        time = date_of(perf_counter())
        step = engine.state.iteration if self._step is None else self._step(engine)
        record = Record(step, engine.state.epoch, time, event, engine.name, snapshot(self._values(engine)))
        writer.put(record, is_iteration=event in _OF_ITERATIONS)


def _standing(
    step: Callable[[AnyEngine], int] | None, events: frozenset[str], engine: AnyEngine
) -> dict[str, int] | None:
    """Return up to which step no records of these events come again, where a run goes on from a `state_dict`."""
    progress = session_of(engine).went_back_to
    if progress is None:
        return None
    at = progress.iteration if step is None else step(engine)
    again = _AGAIN if progress.epoch_is_complete else _AGAIN | {"EPOCH_COMPLETED"}
    return {event: at - (event in again) for event in events}


_sinks: "weakref.WeakKeyDictionary[AnyEngine, list[Any]]" = weakref.WeakKeyDictionary()
"""The sinks of each engine that is alive. A sink is the user's, and may be a function: in no other place can be seen
that two engines share it."""
_sinks_lock = Lock()


def _share(engine: AnyEngine, sink: Any) -> RemovableEventHandle:
    """Note that an engine writes to a sink, until the handle is removed; warn if another of its name does as well."""
    with _sinks_lock:
        has_namesake = any(
            other is not engine and other.name == engine.name and any(_is_same(one, sink) for one in sinks)
            for other, sinks in list(_sinks.items())
        )
        _sinks.setdefault(engine, []).append(sink)
    handle = RemovableEventHandle(partial(_forget, weakref.ref(engine), sink))
    if has_namesake:
        try:
            warnings.warn(
                f"two engines of the name {engine.name!r} write to one sink, {name_of_sink(sink)}, where nothing tells"
                ' their records apart: give each a name, as by  create_supervised_evaluator(..., name="validation")  or'
                "  Engine(step, name=...)",
                stacklevel=6,  # the call of Tracker.attach()
            )
        except Warning:  # they are errors here: then this attaches nothing
            handle.remove()
            raise
    return handle


def _forget(reference: "weakref.ref[AnyEngine]", sink: Any) -> None:
    engine = reference()
    with _sinks_lock:
        if engine is not None:
            _sinks[engine] = [one for one in _sinks[engine] if one is not sink]


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, MethodType) and bool(one == other))  # a bound method is made anew each time


_HOOKS: Mapping[str, tuple[str, ...]] = {
    "close": (),
    "sync_to_disk": (),
    "run_went_back": ("engine_name", "standing"),
    "run_started": ("engine_name", "time"),
    "run_ended": ("engine_name", "time", "reason"),
}
"""What is called on a sink that has it, and with what. All but `close` are plain."""


def _check_sink(sink: Any) -> None:
    if isinstance(sink, Engine):
        raise TypeError(
            f"a Tracker is made with a sink, and put on an engine by  Tracker(sink).attach(engine); got {sink!r}"
        )
    if isinstance(sink, type):
        name = sink.__qualname__
        raise TypeError(f"a sink is an object, and {name} is a class: Tracker({name}(...))")
    if isinstance(sink, io.IOBase):
        raise TypeError(f"a sink writes records, and {sink!r} is a file: Tracker(JSONLines(path)) writes one")
    if isinstance(sink, str | os.PathLike):
        to_file = f"Tracker(JSONLines({str(sink)!r}))"
        raise TypeError(f"a sink writes records, and {sink!r} is a path: {to_file} writes a file")
    write = getattr(sink, "write", sink)
    if not callable(write):
        raise TypeError(f"a sink has a method write(records), or is a function of the records, got {sink!r}")
    check_callable(write, "the sink", "write", "records")
    for name, arguments in _HOOKS.items():
        hook = getattr(sink, name, None)
        if hook is not None:
            check_callable(hook, f"the sink's {name}()", name, *arguments)
            if name != "close" and is_async_callable(hook):
                raise TypeError(f"the sink's {name}() must be a plain function, which takes note, and never waits")
    if hasattr(sink, "run_started") != hasattr(sink, "run_ended"):
        raise TypeError(f"{name_of_sink(sink)} has one of run_started() and run_ended(): a RunListener has both")

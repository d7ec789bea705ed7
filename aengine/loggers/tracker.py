"""Tracker: takes the numbers of a run between two steps, and has them written to a sink beside the step."""

import io
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from threading import Lock
from time import perf_counter
from types import MethodType
from typing import Any, Literal, TypeAlias

from aengine.arguments import check_choice, check_seconds, check_whole
from aengine.bus.listeners import Observer
from aengine.callables import check_callable
from aengine.engine import Engine, session_of
from aengine.events import EventLike, Events, Filter, FilteredEvent, date_of, selectors
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
        dropped: records given up because more than `spool` waited.
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


class Tracker:
    """What `track` returns: one engine's records on their way to one sink.

    Attributes:
        name: the sink's.
    """

    def __init__(
        self,
        sink: Sink | Write,
        event: EventLike,
        values: Callable[[AnyEngine], Mapping[str, Any]],
        step: Callable[[AnyEngine], int] | None,
        spool: int,
        linger: float,
        *,
        must_raise: bool,
    ) -> None:
        self._selectors = selectors(event)
        standing = partial(_standing, step, frozenset(one.name for one in self._selectors))
        self._writer = RecordWriter(sink, spool, linger, standing, must_raise=must_raise)
        self.name = self._writer.sink.name
        self._sink = sink
        self._values = values
        self._step = step

    def statistics(self) -> TrackerStatistics:
        """Return what became of the records so far."""
        buffer, sink = self._writer.buffer, self._writer.sink
        with self._writer.lock:
            return TrackerStatistics(
                self.name, buffer.taken, buffer.written, buffer.dropped, buffer.waiting, sink.failures, sink.busy
            )

    def attach(self, engine: AnyEngine) -> None:
        """Listen to an engine, for `track`. It is not kept: that would be a cycle, and the engine be freed later."""
        # Observers: they run after all other inline handlers, so the records have what those have made.
        takes = [
            (FilteredEvent(one.name, one.filter), self._observer(partial(self._take, one.name), one.filter))
            for one in self._selectors
        ]
        for one, take in takes:
            if engine.has_event_handler(take, one):
                raise RuntimeError(
                    f"{self.name} gets these values of engine {engine.name!r} at {one} already, and would get each of"
                    " them twice: track it once, or at other events, or with other values="
                )
        engine.add_service(self._writer, name=self.name)
        for one, take in takes:
            engine.add_event_handler(one, take)
        engine.add_event_handler(_ENDS, Observer(f"ends for {self.name}", self._writer.end))

    def _observer(self, take: Callable[..., None], condition: Filter | None) -> Observer:
        # The sink's id, because two sinks may be equal.
        return Observer(f"records for {self.name}", take, (id(self._sink), self._values, self._step, condition))

    def _take(self, event: str, engine: AnyEngine, *_: object) -> None:
        time = date_of(perf_counter())
        step = engine.state.iteration if self._step is None else self._step(engine)
        record = Record(step, engine.state.epoch, time, event, engine.name, snapshot(self._values(engine)))
        self._writer.put(record, is_iteration=event in _OF_ITERATIONS)


def track(
    engine: AnyEngine,
    sink: Sink | Write,
    event: EventLike = Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED,
    *,
    values: Callable[[AnyEngine], Mapping[str, Any]] = numbers_of,
    step: Callable[[AnyEngine], int] | None = None,
    spool: int = 10_000,
    linger: float = 5.0,
    on_error: Literal["warn", "raise"] = "warn",
) -> Tracker:
    """Have the numbers of an engine written to a sink at each event, beside the step, which never waits for it.

        track(trainer, JSONLines("log.jsonl"), Events.ITERATION_COMPLETED(every=10) | Events.EPOCH_COMPLETED)

    What waits at the end of a run, however it ends, is written before `run()` returns. `engine.flush()` waits until
    what was taken before it is written, but not for a sink that is down. Apart from that, records of iterations may
    wait a tenth of a second for others, and come to the sink together.

    Args:
        engine: the engine whose numbers are written.
        sink: where they are written to: an object with `write(records)`, or a function. See `Sink`.
        event: when they are taken: an event, filtered or not, or several.
        values: `values(engine)` returns numbers by name. It is called between two steps, after the inline handlers.
            Tensors of one number are allowed: on a device they are copied there, and read beside the step. By default
            the output and the metrics, as far as they are numbers.
        step: `step(engine)` returns the step to write, for an engine whose own iterations mean nothing to the reader:
            `step=lambda _: trainer.state.iteration` for an evaluator.
        spool: how many records may wait. Over that the oldest are dropped, those of iterations before all others; the
            first drop is warned of, and all are counted in `statistics()`.
        linger: seconds that a sink may have at the end of a run, if it is slow or down. Less than the engine's `grace`.
        on_error: what an exception of the sink does: "warn" logs one warning, tries the same records again after 0.1
            seconds, with the first record that comes then, next after twice as long, up to a minute, and logs when it
            works again; "raise" fails the run, and closes the sink.

    Two engines of one name that are alive and write to one sink are warned of.

    When a run goes on from a checkpoint, the sink is notified up to where its records stand, if it is `Rewindable`, as
    `JSONLines` is: so none is there twice.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: the sink gets the same values of the same engine at one of these events already.
    """
    _check_sink(sink)
    check_callable(values, "values=", "values", "engine")
    if step is not None:
        check_callable(step, "step=", "step", "engine")
    linger = check_seconds(linger, "linger=", 5.0)
    check_whole(spool, "spool=", minimum=1, of="records that may wait")
    check_choice(on_error, "on_error=", ("warn", "raise"))
    engine.on(event)  # raises for what is no event of this engine
    tracker = Tracker(sink, event, values, step, spool, linger, must_raise=on_error == "raise")
    tracker.attach(engine)
    _warn_of_same_name(engine, sink)
    return tracker


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


def _warn_of_same_name(engine: AnyEngine, sink: Any) -> None:
    with _sinks_lock:
        namesakes = [
            other
            for other, sinks in list(_sinks.items())
            if other is not engine and other.name == engine.name and any(_is_same(one, sink) for one in sinks)
        ]
        _sinks.setdefault(engine, []).append(sink)
    if namesakes:
        warnings.warn(
            f"two engines of the name {engine.name!r} write to one sink, {name_of_sink(sink)}, where nothing tells"
            ' their records apart: give each a name, as by  create_supervised_evaluator(..., name="validation")  or'
            "  Engine(step, name=...)",
            stacklevel=3,
        )


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, MethodType) and bool(one == other))  # a bound method is made anew each time


def _check_sink(sink: Any) -> None:
    if isinstance(sink, type):
        name = sink.__qualname__
        raise TypeError(f"a sink is an object, and {name} is a class: track(engine, {name}(...))")
    if isinstance(sink, io.IOBase):
        raise TypeError(f"a sink writes records, and {sink!r} is a file: track(engine, JSONLines(path)) writes one")
    write = getattr(sink, "write", sink)
    if not callable(write):
        raise TypeError(f"a sink has a method write(records), or is a function of the records, got {sink!r}")
    check_callable(write, "the sink", "write", "records")

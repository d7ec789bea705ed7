"""Events: their names, the filters that thin them out, and the record that a concurrent listener gets.

Events are equal by name, filtered or not, ours or pytorch-ignite's: `Events.STARTED == "STARTED"` is true, and so
are dictionaries keyed by either library's events. What listens is added and removed by a `Selector`, the name
together with its filter.
"""

import inspect
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeAlias, cast

from aengine.arguments import check_interval, check_whole
from aengine.callables import check_callable
from aengine.type_variables import Output, Snapshot, with_defaults

Test: TypeAlias = Callable[[Any, int], bool]
"""A filter of one's own: given the engine and the event's counter, says whether to fire."""

NEVER = sys.maxsize
"""A count that no counter reaches."""

ALWAYS = -NEVER
"""A count that every counter has reached."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which firings of an event count. Answers "when next?", so that the loop compares two numbers, no more.

    The first count at which it fires is `next_due(count)`; with a `test` or an `interval` that only says when to
    look, and `test` (the listener's clock, for an interval) decides.
    """

    every: int | None = None
    interval: float | None = None
    once: tuple[int, ...] | None = None
    before: int | None = None
    after: int | None = None
    test: Test | None = None
    at_end: bool = False

    def next_due(self, count: int) -> int:
        """Return the first count from `count` on at which this fires, NEVER if there is none."""
        if self.once is not None:
            return min((one for one in self.once if one >= count), default=NEVER)
        if self.before is None and self.after is None:
            return -(-count // self.every) * self.every if self.every else count
        first = 1 + (self.after or 0)
        due = max(count, first)
        if self.every:  # counted from the first one after `after`
            due = first - (first - due) // self.every * self.every
        return due if self.before is None or due < self.before else NEVER


class _JoinsIgnites:
    """What can stand on the right of `|` where an event of pytorch-ignite's is on the left.

    That one, which Python asks first, raises unless `isinstance()` says that the other is an event of its own. So, once
    its module is loaded, what `isinstance()` asks for besides the type is its class; the type stays what it is.
    """

    if not TYPE_CHECKING:

        @property
        def __class__(self) -> type:
            theirs = sys.modules.get("ignite.engine.events")
            return type(self) if theirs is None else theirs.CallableEventWithFilter


class _Named(_JoinsIgnites):
    """What has an event's name, and is equal to everything else that has the same one."""

    filter: Filter | None = None

    if TYPE_CHECKING:  # an Enum defines it in its own way

        @property
        def name(self) -> str: ...

    def __call__(
        self,
        event_filter: Test | None = None,
        every: int | timedelta | None = None,
        once: int | Iterable[int] | None = None,
        before: int | None = None,
        after: int | None = None,
        *,
        at_end: bool = False,
    ) -> "FilteredEvent":
        """Return this event, thinned out. The counts are those of the event's counter (see `State`).

        Args:
            event_filter: `f(engine, count)` that says whether to fire.
            every: fire every so many counts; or, given a timedelta, at the first firing after that much time
                has passed since the last one (or since the start of the run).
            once: the count, or the counts, at which to fire.
            before: fire only at counts less than this.
            after: fire only at counts greater than this; `every` is then counted from the one after it.
            at_end: fire once more at the end of the run, if the last count was not one that fired.

        Raises:
            ValueError, TypeError: the arguments contradict each other or are out of range.
        """
        return FilteredEvent(self.name, _filter(event_filter, every, once, before, after, at_end=at_end))

    def __or__(self, other: Any) -> "EventsList":
        return EventsList([self]).__or__(other)

    def __eq__(self, other: object) -> bool:
        name = event_name(other)
        return NotImplemented if name is None else self.name == name

    def __hash__(self) -> int:
        return hash(self.name)


class FilteredEvent(_Named):
    """An event with a filter: what `Events.ITERATION_COMPLETED(every=100)` returns."""

    def __init__(self, name: str, filter: Filter | None) -> None:  # noqa: A002 -- the field's name for it
        self._name = name
        self.filter = filter

    @property
    def name(self) -> str:
        """The event's name."""
        return self._name

    def __repr__(self) -> str:
        return self.name if self.filter is None else f"{self.name}({describe(self.filter)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.filter)  # by its type: what has another `__class__` cannot be pickled


class EventEnum(_Named, Enum):  # pyright: ignore[reportIncompatibleMethodOverride]  # an Enum's own name
    """What one's own events derive from, to be registered with `engine.register_events(*MyEvents)`.

    class BackpropEvents(EventEnum):
        BACKWARD_STARTED = "backward_started"
        BACKWARD_COMPLETED = "backward_completed"
    """

    __hash__ = _Named.__hash__  # Enum has one of its own, that would not agree with equality by name

    # As Enum has them, but by the type, and not by `__class__`.

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self._name_}: {self._value_!r}>"

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self._name_}"

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        return type(self), (self._value_,)


class Events(EventEnum):
    """What the loop fires. The module `loop` shows when."""

    STARTED = "started"
    EPOCH_STARTED = "epoch_started"
    GET_BATCH_STARTED = "get_batch_started"
    GET_BATCH_COMPLETED = "get_batch_completed"
    ITERATION_STARTED = "iteration_started"
    ITERATION_COMPLETED = "iteration_completed"
    DATALOADER_STOP_ITERATION = "dataloader_stop_iteration"
    EPOCH_COMPLETED = "epoch_completed"
    TERMINATE_SINGLE_EPOCH = "terminate_single_epoch"
    TERMINATE = "terminate"
    INTERRUPT = "interrupt"
    EXCEPTION_RAISED = "exception_raised"
    CANCELLED = "cancelled"
    COMPLETED = "completed"


class EventsList(_JoinsIgnites):
    """Several events to listen to at once: what `a | b` returns. `|` makes a new list and changes neither side."""

    def __init__(self, events: Iterable[Any] = ()) -> None:
        self._events: tuple[Any, ...] = tuple(flat for one in events for flat in _flat(one))
        for event in self._events:
            _selector(event)  # raises where the mistake is made

    def __iter__(self) -> Iterator[Any]:
        return iter(self._events)

    def __len__(self) -> int:
        return len(self._events)

    def __getitem__(self, index: int) -> Any:
        return self._events[index]

    def __or__(self, other: Any) -> "EventsList":
        return EventsList([*self._events, other])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._events,)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self._events))


class NamedEvent(Protocol):
    """An event, filtered or not, ours or pytorch-ignite's."""

    filter: Any

    @property
    def name(self) -> str:
        """The event's name."""
        ...


EventLike: TypeAlias = str | NamedEvent | EventsList
"""What can be listened to: an event, filtered or not, its name, several with `|`, or pytorch-ignite's likewise."""


@dataclass(frozen=True, slots=True)
class Selector:
    """An event's name and its filter: what one listener listens to."""

    name: str
    filter: Filter | None = None

    def __str__(self) -> str:
        return self.name if self.filter is None else f"{self.name}({describe(self.filter)})"


class Event(NamedTuple, Generic[Output, Snapshot]):
    """One firing of an event, as concurrent listeners get it: a fact that stays true while the loop goes on.

    Tensors in `output` and `metrics` are references: what will be read later is detached or copied by `snapshot=`.
    A tuple, because making one takes a quarter of the time of a frozen dataclass; equal to nothing but itself.

    Attributes:
        name: the event's name, such as "ITERATION_COMPLETED"; equal to the event itself.
        engine_name: the name of the engine that fired it.
        sequence: its place among all events that the engine has sent, from 1.
        iteration: the engine's state at that instant, as the next six.
        epoch: see `State`.
        epoch_length: see `State`.
        max_epochs: see `State`.
        max_iters: see `State`.
        output: see `State`.
        metrics: a read-only copy of the metrics by name.
        monotonic: seconds of `time.perf_counter()`, to measure between events.
        payload: what the event is about, as it was fired with: of EXCEPTION_RAISED the exception, of
            TERMINATE_SINGLE_EPOCH the iterations that the epoch had begun; None for the loop's other events.
        snapshot: what the listener's `snapshot=` callable returned.
    """

    name: str
    engine_name: str
    sequence: int
    iteration: int
    epoch: int
    epoch_length: int | None
    max_epochs: int | None
    max_iters: int | None
    output: Output | Any
    metrics: Mapping[str, Any]
    monotonic: float
    payload: Any
    snapshot: Snapshot

    @classmethod  # said, for a NamedTuple does not know
    def __class_getitem__(cls, parameters: Any) -> Any:
        return with_defaults(cls, parameters)

    @property
    def time(self) -> float:
        """Seconds since 1970, to show: by the wall clock as it goes now."""
        return date_of(self.monotonic)

    def __eq__(self, other: object) -> bool:
        # By identity: comparing the tensors in two events would raise, or take longer than the step that made them.
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other  # a tuple has one of its own

    def __hash__(self) -> int:
        return id(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # The view of the metrics cannot be pickled: what travels to another process is what it shows.
        return _restored, (type(self), tuple(self._replace(metrics=dict(self.metrics))))

    def __repr__(self) -> str:
        return (
            f"Event({self.name}, engine_name={self.engine_name!r}, sequence={self.sequence}, epoch={self.epoch},"
            f" iteration={self.iteration})"
        )


def date_of(monotonic: float) -> float:
    """Return the seconds since 1970, by the wall clock as it goes now, of an instant of `time.perf_counter()`."""
    return time.time() - (time.perf_counter() - monotonic)  # noqa: TID251 -- the one place that shows a date


new_event: Callable[[type[Event[Any, Any]], tuple[Any, ...]], Event[Any, Any]] = tuple.__new__
"""Makes an Event of its fields in order, without the cost of its Python constructor."""


def _restored(kind: type[Event[Any, Any]], fields: tuple[Any, ...]) -> Event[Any, Any]:
    event = new_event(kind, fields)
    return event._replace(metrics=MappingProxyType(event.metrics))


NO_METRICS: Mapping[str, Any] = MappingProxyType({})


def event_name(event: object) -> str | None:
    """Return the name of an event, ours or pytorch-ignite's, or None if this is none."""
    if isinstance(event, str):
        return event
    is_event = isinstance(event, _Named | Event) or hasattr(event, "filter")
    name = getattr(event, "name", None) if is_event else None
    return name if isinstance(name, str) else None


def check_no_event(handler: object, instead: str) -> None:
    """Raise TypeError for an event where a handler belongs: events can be called, too.

    Args:
        handler: what the user gave.
        instead: what to write instead.
    """
    if event_name(handler) is not None:
        raise TypeError(f"a handler must be a function, got the event {handler!r}: {instead}")


def selectors(event: EventLike) -> tuple[Selector, ...]:
    """Take apart whatever can be listened to. Raises TypeError for anything else."""
    return tuple(_selector(one) for one in _flat(event))


def _flat(event: Any) -> Iterator[Any]:
    """Take apart a list of events, ours or ignite's, which is not imported. Either may hold lists of the other."""
    if type(event).__name__ == "EventsList":
        for one in event:
            yield from _flat(one)
    else:
        yield event


def _selector(event: Any) -> Selector:
    name = event_name(event)
    if name is None or isinstance(event, Event):
        advice = ": the event comes first, as in  @engine.on(Events.ITERATION_COMPLETED)  or (event, handler)"
        raise TypeError(
            f"expected an event such as Events.STARTED, an event's name, or several joined by |, got {event!r}"
            + advice * (callable(event) and not isinstance(event, type))
        )
    condition = getattr(event, "filter", None)
    if callable(condition):  # an event of ignite's
        condition = _filter_of_ignites(condition)
    return Selector(name, condition)


def _filter_of_ignites(function: Callable[..., Any]) -> Filter:
    """Return the filter of an event of pytorch-ignite's. Equal ones are equal, though each has a function of its own.

    Those functions are closures over what was written, and say the same as ours.
    """
    if getattr(function, "__module__", None) == "ignite.engine.events" and inspect.isfunction(function):
        written = inspect.getclosurevars(function).nonlocals
        if "once" in written:
            return Filter(once=tuple(written["once"]))
        if "every" in written or "before_" in written:
            before = None if written.get("before_") in (None, float("inf")) else written["before_"]
            after = written.get("after_")
            # Where there is only `before=`, ignite's has 0 for `after=`, and ours None.
            return Filter(every=written.get("every"), before=before, after=after if before is None else after or None)
    return Filter(test=cast(Test, function))


def _filter(  # noqa: C901 -- a branch an argument
    test: Test | None,
    every: int | timedelta | None,
    once: int | Iterable[int] | None,
    before: int | None,
    after: int | None,
    *,
    at_end: bool,
) -> Filter | None:
    counted = every is not None or before is not None or after is not None
    if (test is not None) + (once is not None) + counted != 1:
        raise ValueError(
            "a filter is either event_filter=, or once=, or any of every=, before= and after= together"
            f" (got event_filter={test}, every={every}, once={once}, before={before}, after={after})"
        )
    if test is not None:
        check_callable(test, "event_filter=", "event_filter", "engine", "count")
    for what, value in (("before=", before), ("after=", after)):
        if value is not None:
            check_whole(value, what, minimum=0)
    counts: Any = None
    if once is not None:
        counts = tuple(once) if isinstance(once, Iterable) and not isinstance(once, str) else (once,)
        for count in counts or (once,):  # no count at all is refused, too
            check_whole(count, "once=", minimum=1, alternative="several of them")
    interval = None
    if isinstance(every, timedelta):
        interval, every = check_interval(every, "every=", 60), None
        if before is not None or after is not None:
            raise ValueError("every= as a timedelta does not go together with before= and after=, which are counts")
    elif every is not None:
        check_whole(every, "every=", minimum=1, alternative="a timedelta")
    if every == 1 and before is None and after is None:
        return None
    return Filter(every, interval, counts, before, after, test, at_end)


def describe(condition: Filter) -> str:
    """Return a filter as its user would write it."""
    shown = {
        "every": condition.every if condition.interval is None else timedelta(seconds=condition.interval),
        "once": condition.once,
        "before": condition.before,
        "after": condition.after,
        "event_filter": condition.test,
        "at_end": condition.at_end or None,
    }
    return ", ".join(f"{name}={value}" for name, value in shown.items() if value is not None)

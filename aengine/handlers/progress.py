"""Progress: what a run shows of itself while it goes on, on any display: `progress_tqdm`, `progress_rich`, one's own.

from aengine.handlers.progress import show_progress
from aengine.handlers.progress_rich import RichBars

bars = RichBars()
show_progress(trainer, bars)
show_progress(evaluator, bars)
"""

import logging
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, TypeAlias

from aengine.bus.emitter import RemovableEventHandle
from aengine.callables import check_callable
from aengine.engine import Engine
from aengine.events import Event, Events

AnyEngine: TypeAlias = Engine[Any, Any]

_logger = logging.getLogger("aengine.handlers")

_ENDS = Events.TERMINATE | Events.INTERRUPT | Events.COMPLETED | Events.CANCELLED | Events.EXCEPTION_RAISED
_END_NAMES = frozenset(one.name for one in _ENDS)
_EPOCH_ENDS = frozenset({Events.EPOCH_COMPLETED.name, Events.COMPLETED.name})


class Bar(Protocol):
    """A line that shows how far something has got."""

    def begin(self, name: str, count: int, total: int | None) -> None:
        """Show the bar, as of something that begins now and stands at `count` already. Called again for the next."""
        ...

    def show(self, count: int, text: str) -> None:
        """Show how far it is, and some text beside it."""
        ...

    def close(self) -> None:
        """Leave it as it is: its run is over. It may begin again with another one."""
        ...


class Display(Protocol):
    """Where bars are shown. Several engines may share one.

    Attributes:
        lock: held while an engine draws, in a thread: so its lines stay together, and nobody else is drawing.
    """

    lock: threading.Lock

    @property
    def is_quiet(self) -> bool:
        """Whether nobody would see it, as in a file that a terminal's output goes to."""
        ...

    def bar(self, unit: str) -> Bar:
        """Return a new bar, not shown yet, of something that is counted in this unit."""
        ...


class _Place(NamedTuple):
    """Where a run stands, seen between two steps."""

    iteration: int
    of_epoch: int
    max_iters: int | None
    values: Mapping[str, Any]


def values_of(engine: AnyEngine) -> dict[str, Any]:
    """Return the last output and the metrics: what is shown unless told otherwise, as far as it is numbers."""
    output = engine.state.output
    named: Mapping[Any, Any] = output if isinstance(output, Mapping) else {"output": output}
    return {**{str(name): value for name, value in named.items()}, **engine.state.metrics}


def show_progress(
    engine: AnyEngine,
    display: Display,
    *,
    values: Callable[[AnyEngine], Mapping[str, Any]] = values_of,
    every: timedelta = timedelta(seconds=0.1),
) -> RemovableEventHandle:
    """Show a bar of the iterations of each epoch, below one of the epochs if there are several.

    Drawn beside the step, in a thread: a terminal that is slow, or stopped by Ctrl-S, delays no step. On a display that
    is quiet nothing is done at all. A display that fails is warned of once, and the run goes on without.

    Args:
        engine: whose progress.
        display: where to; share one between engines that run at once.
        values: `values(engine)` returns what is shown beside the bar, by name; what is no number is left out. Called
            between two steps; numbers on a device are read beside the step.
        every: the time between two looks.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    _check_display(display)
    check_callable(values, "values=", "values", "engine")
    if not isinstance(every, timedelta):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"every= is a timedelta, such as timedelta(seconds=0.1); got {every!r}")
    if not every > timedelta(0):
        raise ValueError(f"every= is the time from one look to the next, more than 0; got {every!r}")
    if display.is_quiet:
        return RemovableEventHandle(lambda: None)

    def look(engine: AnyEngine) -> _Place:
        state = engine.state
        return _Place(state.iteration, state.iteration - state.epoch_start, state.max_iters, values(engine))

    when = (
        Events.STARTED | Events.EPOCH_STARTED | Events.ITERATION_COMPLETED(every=every) | Events.EPOCH_COMPLETED | _ENDS
    )
    return engine.subscribe(
        when, _Drawing(display).draw, snapshot=look, overflow="latest", name=f"progress of {engine.name}"
    )


def _check_display(display: Any) -> None:
    if isinstance(display, type):
        raise TypeError(
            f"a display is an object, and {display.__qualname__} is a class: show_progress(engine,"
            f" {display.__qualname__}())"
        )
    if not callable(getattr(display, "bar", None)):
        raise TypeError(f"a display has a method bar(unit), as TqdmBars() and RichBars() have; got {display!r}")


class _Drawing:
    """The bars of one engine."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._bars: dict[str, Bar] = {}  # by their unit; kept from run to run
        self._open: dict[Bar, int] = {}  # and which part of the run each is of
        self._has_failed = False

    def draw(self, event: Event) -> None:
        """Draw what an event says. Any of them is enough to draw all: those in between may have been dropped."""
        if self._has_failed:
            return
        try:
            with self._display.lock:
                self._draw(event)
        except Exception as error:  # a terminal that is gone is no reason to stop training
            self._has_failed = True
            _logger.warning("the progress of %s cannot be shown any more", event.engine, exc_info=error)

    def _draw(self, event: Event) -> None:
        place: _Place = event.snapshot
        is_end = event.name in _END_NAMES
        if is_end and not self._open:  # the second end, such as COMPLETED after TERMINATE
            return
        for line in _lines(event, place):
            self._show(line)
        if is_end:
            for bar in self._open:
                bar.close()
            self._open.clear()

    def _show(self, line: "_Line") -> None:
        bar = self._bars.get(line.unit)
        if bar is None:
            bar = self._bars[line.unit] = self._display.bar(line.unit)
        if self._open.get(bar) != line.part:
            self._open[bar] = line.part
            bar.begin(line.name, line.done, line.total)
        bar.show(line.done, line.text)


class _Line(NamedTuple):
    """What one bar shows. It begins anew with each `part`."""

    unit: str
    name: str
    part: int
    done: int
    total: int | None
    text: str


def _lines(event: Event, place: _Place) -> list[_Line]:
    text = ", ".join(_shown(place.values))
    name, epochs = event.engine, event.max_epochs
    if epochs is None:  # the run is so many iterations, whatever the epochs
        return [_Line("it", name, 0, place.iteration, place.max_iters, text)]
    if epochs == 1:
        return [_Line("it", name, 0, place.of_epoch, event.epoch_length, text)]
    is_complete = event.name in _EPOCH_ENDS or (
        event.name == Events.TERMINATE.name and place.of_epoch == event.epoch_length  # as by its EPOCH_COMPLETED
    )
    completed = event.epoch if is_complete else max(0, event.epoch - 1)
    return [
        _Line("epoch", name, 0, completed, epochs, ""),
        _Line("it", f"{name} {event.epoch}/{epochs}", event.epoch, place.of_epoch, event.epoch_length, text),
    ]


def _shown(values: Mapping[str, Any]) -> list[str]:
    """Return those that are single numbers, short."""
    shown: list[str] = []
    for name, value in values.items():
        try:
            number = float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, RuntimeError):  # the last is torch's, of more than one number
            continue
        shown.append(f"{name}={number:.4g}")
    return shown

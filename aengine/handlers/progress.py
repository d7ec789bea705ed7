"""Progress: bars that show how far a run is, on any display: of `progress_tqdm`, of `progress_rich`, or your own.

bars = RichBars()
ProgressBar(bars).attach(trainer)
ProgressBar(bars).attach(evaluator)
"""

import logging
import threading
from collections.abc import Callable, Generator, Mapping
from datetime import timedelta
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple, Protocol, TypeAlias

from aengine.arguments import check_interval
from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.callables import check_callable, name_of
from aengine.engine import Engine
from aengine.events import Event, Events
from aengine.keywords import explain_wrong_call

AnyEngine: TypeAlias = Engine[Any, Any]
_Snapshot: TypeAlias = tuple[int, int, Mapping[str, Any]]

_logger = logging.getLogger("aengine.handlers")

_ENDS = Events.TERMINATE | Events.INTERRUPT | Events.COMPLETED | Events.CANCELLED | Events.EXCEPTION_RAISED
_END_NAMES = frozenset(one.name for one in _ENDS)


class Bar(Protocol):
    """A line that shows how many of a total are done. What a `Display` of your own returns; called on a thread."""

    def begin(self, name: str, count: int, total: int | None) -> None:
        """Show the bar for something that begins, with `count` done already. Called again for the next epoch or run.

        Args:
            name: what is counted: the engine's name, and which epoch.
            count: how many are done.
            total: how many there are; None if that is not known.
        """
        ...

    def show(self, count: int, text: str) -> None:
        """Show how many are done, and a text beside the bar."""
        ...

    def close(self) -> None:
        """Leave the bar as it is: its run is over. `begin()` may be called again for another run."""
        ...


class Display(Protocol):
    """Where bars are shown: `TqdmBars`, `RichBars`, or an object of your own with these three. Engines may share one.

    Attributes:
        lock: held while the bars of an engine are drawn, on a thread: one engine at a time.
    """

    lock: threading.Lock

    @property
    def is_quiet(self) -> bool:
        """Whether it would not be seen, as where the output goes to a file: then nothing is drawn."""
        ...

    def bar(self, unit: str) -> Bar:
        """Return a new bar, not shown yet, for what is counted in this unit: "it" or "epoch"."""
        ...


def _values_of(engine: AnyEngine) -> dict[str, Any]:
    """Return the last output and the metrics, which are shown by default, as far as they are numbers."""
    output = engine.state.output
    named: Mapping[Any, Any] = output if isinstance(output, Mapping) else {"output": output}
    return {**{str(name): value for name, value in named.items()}, **engine.state.metrics}


@explain_wrong_call
class ProgressBar:
    """Shows a bar of the iterations of each epoch, below one of the epochs if there are several.

        ProgressBar().attach(trainer)

    They are drawn beside the step, on a thread: a terminal that is slow, or stopped by Ctrl-S, delays no step. On a
    quiet display nothing is done at all. If a display fails, there is one warning, and the run continues without it.

    Args:
        display: where to show it: one for all engines that run at the same time. By default tqdm's bars on stderr, the
            same for all.
        values: `values(engine)` returns what is shown beside the bar, by name; what is no number is left out. Called
            between two steps; numbers on a device are read beside the step. By default the output and the metrics.
        every: the time from one update to the next.

    Raises:
        ImportError: tqdm is not installed, and no other display is given.
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(
        self,
        display: Display | None = None,
        *,
        values: Callable[[AnyEngine], Mapping[str, Any]] = _values_of,
        every: timedelta = timedelta(seconds=0.1),
    ) -> None:
        self._display = _default_display() if display is None else _checked(display)
        self._values = values
        self._every = every
        check_callable(values, "values=", "values", "engine")
        check_interval(every, "every=", 0.1)
        self._attachment = Attachment(self)

    def attach(self, engine: AnyEngine) -> RemovableEventHandle:
        """Show the progress of an engine, also of the run under way.

        What is returned removes it again; bars of a run under way stay as they are. It waits for the display, if that
        is being drawn on.

        Raises:
            TypeError: this is no engine.
            RuntimeError: this is attached already.
        """
        return self._attachment.begin(engine, self._listen(engine))

    def _listen(self, engine: AnyEngine) -> Generator[RemovableEventHandle]:
        if self._display.is_quiet:
            return
        bars, values = _Bars(self._display), self._values
        yield RemovableEventHandle(partial(bars.close, engine.name))
        yield engine.subscribe(
            Events.ITERATION_COMPLETED(every=self._every)
            | Events.STARTED
            | Events.EPOCH_STARTED
            | Events.EPOCH_COMPLETED
            | _ENDS,
            bars.draw,
            snapshot=lambda engine: (engine.state.epoch_start, engine.state.epochs_completed, values(engine)),
            overflow="latest",
            name=f"progress of {engine.name}",
        )


@cache
def _default_display() -> Display:
    """Return tqdm's bars, always the same: two of them would draw on each other's lines."""
    bars: Display = import_module("aengine.handlers.progress_tqdm").TqdmBars()
    return bars


def _checked(display: Any) -> Display:
    if isinstance(display, Engine):
        raise TypeError(f"ProgressBar() takes a display, got {display!r}: write  ProgressBar().attach(engine)")
    if isinstance(display, type):
        name = name_of(display)
        raise TypeError(f"a display is an object, and {name} is a class: ProgressBar({name}())")
    if missing := [name for name in ("bar", "is_quiet", "lock") if not hasattr(display, name)]:
        raise TypeError(
            f"a display has bar(unit), is_quiet and lock, as TqdmBars() and RichBars() have; {display!r} has no"
            f" {', '.join(missing)}"
        )
    checked: Display = display
    return checked


class _Bars:
    """The bars of one engine."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._bars: dict[str, Bar] = {}  # by their unit; kept from run to run
        self._open: dict[Bar, int] = {}  # with the part of the run that each shows
        self._is_over = False  # it has failed, or was removed

    def draw(self, event: Event[Any, _Snapshot]) -> None:
        """Draw all that there is to show at an event: the events before it may have been dropped."""
        try:
            with self._display.lock:
                if not self._is_over:
                    self._draw(event)
        except Exception as error:  # a terminal that is closed is no reason to stop training
            self._is_over = True
            _logger.warning("the progress of %s cannot be shown any more", event.engine_name, exc_info=error)

    def close(self, engine_name: str) -> None:
        """Leave the bars of a run under way as they are, and draw nothing any more."""
        try:
            with self._display.lock:
                if not self._is_over:
                    self._is_over = True
                    self._close_all()
        except Exception as error:  # nor to fail where it is removed
            _logger.warning("the progress of %s cannot be shown any more", engine_name, exc_info=error)

    def _draw(self, event: Event[Any, _Snapshot]) -> None:
        is_end = event.name in _END_NAMES
        if is_end and not self._open:  # a second event of the end, such as COMPLETED after TERMINATE
            return
        for line in _lines(event):
            bar = self._bars.get(line.unit)
            if bar is None:
                bar = self._bars[line.unit] = self._display.bar(line.unit)
            if self._open.get(bar) != line.part:
                self._open[bar] = line.part
                bar.begin(line.name, line.done, line.total)
            bar.show(line.done, line.text)
        if is_end:
            self._close_all()

    def _close_all(self) -> None:
        while self._open:
            self._open.popitem()[0].close()


class _Line(NamedTuple):
    """What one bar shows. With another `part` the bar begins again."""

    unit: str
    name: str
    part: int
    done: int
    total: int | None
    text: str


def _lines(event: Event[Any, _Snapshot]) -> list[_Line]:
    epoch_start, epochs_completed, values = event.snapshot
    text = ", ".join(_formatted(values))
    name, epochs, done = event.engine_name, event.max_epochs, event.iteration - epoch_start
    if epochs is None:  # the run is limited by its iterations alone
        return [_Line("it", name, 0, event.iteration, event.max_iters, text)]
    if epochs == 1:
        return [_Line("it", name, 0, done, event.epoch_length, text)]
    return [
        _Line("epoch", name, 0, epochs_completed, epochs, ""),
        _Line("it", f"{name} {event.epoch}/{epochs}", event.epoch, done, event.epoch_length, text),
    ]


def _formatted(values: Mapping[str, Any]) -> list[str]:
    """Return those values that are single numbers, with four digits."""
    formatted: list[str] = []
    for name, value in values.items():
        try:
            number = float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, RuntimeError):  # the last is torch's, of more than one number
            continue
        formatted.append(f"{name}={number:.4g}")
    return formatted

"""Pictures of a run, as PNG or SVG: where its time went, and how it learned.

    picture.timeline(timeline).save("timeline.png")
    picture.learning_curve(
        picture.read("log.jsonl", "loss"), picture.read("log.jsonl", "accuracy")
    ).save("learning_curve.png")

Drawn on figures of their own, without pyplot and its state: in any thread, also in a server. One takes about a second;
from async code, `await anyio.to_thread.run_sync(...)`.
"""

import io
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from aengine.errors import missing_package
from aengine.handlers.timeline import Timeline

if TYPE_CHECKING:
    from aengine.loggers.sink import Record

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
except ImportError as error:
    raise missing_package(__name__, "matplotlib>=3.9", "picture") from error

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"

_INK, _FAINT = "#333333", "#d9d9d9"
_LOSS, _METRIC, _BEST = "#0072B2", "#009E73", "#D55E00"
"""Of the palette of Okabe and Ito, which all can tell apart: https://jfly.uni-koeln.de/color/"""

_PARTS = {
    "step": ("step", "#0072B2"),
    "data": ("waiting for data", "#E69F00"),
    "handlers": ("inline handlers", "#009E73"),
    "back_pressure": ("waiting for subscribers", "#D55E00"),
    "event_loop": ("other tasks, pauses", "#56B4E9"),
    "rest": ("the rest", "#c8c8c8"),
}
_BINS = 100
"""Columns of a timeline: few enough for each to have several samples of a long run."""

_POINTS = 1600
"""Points of a curve, one for each pixel of a picture: more are drawn as the range that they span."""

_drawing = threading.Lock()  # matplotlib's caches of fonts were not made for threads


class Picture:
    """A figure to be saved, or changed before.

    Attributes:
        figure: matplotlib's.
    """

    def __init__(self, figure: Figure) -> None:
        self.figure = figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, which is a PNG of 1600 pixels across, or an SVG, as its name ends.

        Raises:
            ValueError: the name ends otherwise.
            OSError: the file cannot be written.
        """
        target = Path(path)
        kind = target.suffix.lower()
        if kind not in (".png", ".svg"):
            raise ValueError(f"a picture is saved as .png or .svg, got {str(path)!r}")
        target.write_bytes(self.render("png" if kind == ".png" else "svg"))

    def render(self, kind: Literal["png", "svg"] = "png") -> bytes:
        """Return what `save` would write: the same bytes for the same picture."""
        drawn = io.BytesIO()
        metadata: Any = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        with _drawing:
            self.figure.savefig(drawn, format=kind, metadata=metadata)
        return drawn.getvalue()


@dataclass(frozen=True)
class Curve:
    """Numbers over the course of a run.

    Attributes:
        steps: the iteration of each, rising.
        values: the numbers.
        name: what they are, for the axis.
    """

    steps: Sequence[int]
    values: Sequence[float]
    name: str = ""


def read(
    log: "str | os.PathLike[str] | Iterable[Record]", name: str, *, engine: str | None = None, event: str | None = None
) -> Curve:
    """Return the values of one name from a log that `JSONLines` has written, or from records.

    Of a step that was logged again, as by a run that was killed and resumed, the last one counts.

    Args:
        log: the file, or the records.
        name: of the values, as in "loss".
        engine: its name, if several engines share the log and the name.
        event: such as "EPOCH_COMPLETED", if the value is also logged at others.

    Raises:
        ValueError: there is no such value in the log, which has others.
        OSError: the file cannot be read.
    """
    found: dict[int, float] = {}
    others: set[str] = set()
    places: set[str] = set()
    for step, line_engine, line_event, values in _lines(log):
        others.update(values)
        if name in values:
            places.add(f"engine={line_engine!r}, event={line_event!r}")
            if engine in (None, line_engine) and event in (None, line_event):
                found[step] = float(values[name])
    if not found and places:
        raise ValueError(
            f"nothing is called {name!r} at engine={engine!r}, event={event!r} in the log; it is at"
            f" {'; '.join(sorted(places))}"
        )
    if not found:
        raise ValueError(f"nothing is called {name!r} in the log; it has {sorted(others)}")
    steps = sorted(found)
    return Curve(steps, [found[step] for step in steps], name)


def learning_curve(
    loss: Curve | Sequence[float], metric: Curve | Sequence[float] | None = None, *, mode: Literal["max", "min"] = "max"
) -> Picture:
    """Draw the loss of the training, each value and their running mean, and below it a metric, its best value marked.

    Args:
        loss: a value for each iteration, or for some.
        metric: of the validation, a value for each epoch; a plain sequence is spread evenly over the iterations.
        mode: whether the best metric is the greatest or the least.

    Raises:
        ValueError: there are no numbers, or not as many as steps.
    """
    if mode not in ("max", "min"):
        raise ValueError(f'mode= is "max" or "min", got {mode!r}')
    steps, losses = _arrays(loss, "the loss")
    with _drawing:
        figure = _figure(4.6 if metric is not None else 2.8)
        if metric is None:
            axes = figure.subplots()
        else:
            axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 3))
            _draw_metric(below, metric, mode, last=steps[-1])
        _draw_loss(axes, steps, losses, _name(loss, "loss"))
        axes.set_xlim(min(steps[0], 0.0), steps[-1] * 1.01)
        lowest = figure.axes[-1]
        lowest.set_xlabel("iteration")
        lowest.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        lowest.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return Picture(figure)


def timeline(recorded: Timeline) -> Picture:
    """Draw where the time of a run went, over its course: of a run that is over, or of one that goes on, up to now.

    What the loop did, as shares of each hundredth of the time. The legend has the shares of the whole; what took none
    is left out. "The rest" is the loop itself, and at the end its wait for subscribers to be done.

    Raises:
        TypeError: this is no Timeline.
        ValueError: nothing was recorded.
    """
    if not isinstance(recorded, Timeline):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            "timeline() draws what a Timeline has recorded: write  recorded = Timeline(engine)  before the run; got"
            f" {recorded!r}"
        )
    edges, shares, whole = _shares(recorded)
    scale, unit = _unit(edges[-1])
    shown = [part for part in _PARTS if whole[part] >= 0.0005]  # noqa: PLR2004 -- 0.1 %, rounded
    with _drawing:
        figure = _figure(3.4)
        axes = figure.subplots()
        bottom = np.zeros(len(edges) - 1)
        for part in shown:
            top = bottom + shares[part]
            # Edges of the colour of the area, or white lines would show between two areas.
            axes.stairs(
                top, edges / scale, baseline=bottom, fill=True, facecolor=_PARTS[part][1], edgecolor=_PARTS[part][1],
                linewidth=0.3,
            )  # fmt: skip
            bottom = top
        axes.set(
            xlim=(0, edges[-1] / scale), ylim=(0, 1), xlabel=f"time since the run began ({unit})",
            ylabel="share of the time",
        )  # fmt: skip
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        patches = [
            Patch(facecolor=_PARTS[part][1], label=f"{_PARTS[part][0]}  {whole[part]:.1%}".replace("%", " %"))
            for part in shown
        ]
        # In the order of the areas, from above.
        axes.legend(
            handles=patches[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=10,
            labelcolor=_INK, handlelength=1.0, handleheight=1.0, labelspacing=0.7,
        )  # fmt: skip
        last = recorded.samples[-1]
        _title(axes, f"{recorded.name}: {last.iteration} iterations in {edges[-1] / scale:.3g} {unit}")
    return Picture(figure)


# Figures


def _figure(height: float) -> Figure:
    """Return a figure 8 inches across: at 100 points of a page to the inch, 800, in which 10-point letters are 14."""
    figure = Figure(figsize=(8, height), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _dress(axes: Axes) -> None:
    axes.set_facecolor("white")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(labelsize=10, colors=_INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(size=10, color=_INK)


def _title(axes: Axes, text: str) -> None:
    _dress(axes)
    axes.set_title(text, loc="left", fontsize=11, color=_INK)


# The timeline


def _shares(recorded: Timeline) -> tuple[Array, dict[str, Array], dict[str, float]]:
    """Return the edges of the columns in seconds, each part's share of each column, and of the whole."""
    samples = recorded.samples
    if len(samples) < 2 or not samples[-1].total:  # noqa: PLR2004 -- an interval has two ends
        raise ValueError(
            f"nothing was recorded of engine {recorded.name!r}: make the Timeline before run(), and draw it afterwards,"
            " or meanwhile"
        )
    at = np.array([sample.total for sample in samples])
    edges = np.linspace(0.0, at[-1], min(_BINS, len(samples) - 1) + 1)
    width = edges[1]
    spent: dict[str, Array] = {}
    for part in _PARTS:
        if part != "rest":
            so_far = np.array([getattr(sample, part) for sample in samples])
            spent[part] = np.diff(np.interp(edges, at, so_far)) / width
    # One timed iteration may stand for several, of which some were before its column.
    too_much = np.maximum(1.0, sum(spent.values()))
    shares = {part: share / too_much for part, share in spent.items()}
    shares["rest"] = np.clip(1.0 - sum(shares.values()), 0.0, 1.0)
    return edges, shares, {part: float(share.mean()) for part, share in shares.items()}


def _unit(seconds: float) -> tuple[float, str]:
    if seconds < 1.0:
        return 1e-3, "ms"
    for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 3 * size:
            return size, unit
    return 1.0, "seconds"


# The curve


def _draw_loss(axes: Axes, steps: Array, losses: Array, name: str) -> None:
    window = max(1, len(losses) // 40)
    if window > 1:
        mean = _running_mean(losses, window)
        if len(losses) > _POINTS:
            least, greatest, middle = _ranges(losses)
            axes.fill_between(steps[middle], least, greatest, color=_LOSS, alpha=0.25, linewidth=0, label="all values")
            steps, mean = steps[middle], mean[middle]
        else:
            axes.plot(steps, losses, color=_LOSS, alpha=0.35, linewidth=0.8, label="each value")
        axes.plot(steps, mean, color=_LOSS, linewidth=1.8, label=f"mean of {window:,}")
    else:
        axes.plot(steps, losses, color=_LOSS, linewidth=1.4, marker="o", markersize=3, label="each value")
    axes.set_ylabel(f"training {name}")
    _dress(axes)
    _legend(axes)


def _draw_metric(axes: Axes, metric: Curve | Sequence[float], mode: str, *, last: float) -> None:
    steps, values = _arrays(metric, "the metric")
    if not isinstance(metric, Curve):
        steps = steps * last / len(values)
    name = _name(metric, "metric")
    axes.plot(
        steps, values, color=_METRIC, linewidth=1.4, marker="o", markersize=4 if len(values) <= 100 else 0,  # noqa: PLR2004
        label="after each epoch",
    )  # fmt: skip
    if np.isfinite(values).any():
        best = int(np.nanargmax(values) if mode == "max" else np.nanargmin(values))
        axes.plot(
            steps[best], values[best], color=_BEST, linestyle="none", marker="o", markersize=9, fillstyle="none",
            markeredgewidth=1.8, label=f"best: {values[best]:.4g}, epoch {best + 1}", clip_on=False, zorder=3,
        )  # fmt: skip
    axes.set_ylabel(f"validation {name}")
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.margins(y=0.12)  # room for the ring around the best
    _dress(axes)
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    # Above, where no curve can run through it.
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=10, labelcolor=_INK,
        borderaxespad=0.2,
    )  # fmt: skip


def _running_mean(values: Array, window: int) -> Array:
    """Return the mean of so many values around each, of fewer at the ends; what is no number is left out."""
    known = np.isfinite(values)
    box = np.ones(window)
    total = np.convolve(np.where(known, values, 0.0), box, mode="same")
    count = np.convolve(known.astype(float), box, mode="same")
    mean: Array = np.divide(total, count, out=np.full(len(values), math.nan), where=count > 0.5)  # noqa: PLR2004 -- or nothing
    return mean


def _ranges(values: Array) -> tuple[Array, Array, "np.ndarray[Any, np.dtype[np.int64]]"]:
    """Return the least and the greatest of each of `_POINTS` stretches, and the index of its middle."""
    starts = np.linspace(0, len(values), _POINTS, endpoint=False).astype(np.int64)
    middle = (starts + np.append(starts[1:], len(values))) // 2
    return np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts), middle


def _arrays(curve: Curve | Sequence[float], what: str) -> tuple[Array, Array]:
    values = np.asarray(curve.values if isinstance(curve, Curve) else curve, dtype=np.float64)
    steps = np.asarray(curve.steps, dtype=np.float64) if isinstance(curve, Curve) else np.arange(1.0, len(values) + 1)
    if values.ndim != 1 or not len(values) or steps.shape != values.shape:
        raise ValueError(
            f"{what} is a sequence of numbers, or a Curve with as many steps as values; got {steps.shape} steps and"
            f" {values.shape} values"
        )
    return steps, values


def _name(curve: Curve | Sequence[float], default: str) -> str:
    return (curve.name if isinstance(curve, Curve) else "") or default


def _lines(
    log: "str | os.PathLike[str] | Iterable[Record]",
) -> "Iterable[tuple[int, str, str, Mapping[str, Any]]]":
    if not isinstance(log, str | os.PathLike):
        for record in log:
            yield record.step, record.engine, record.event, record.values
        return
    with Path(log).open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # else its writer is in the middle of it
                read = json.loads(line)
                yield read["step"], read["engine"], read["event"], read["values"]

"""Pictures of a run, as PNG or SVG: where its time went, and how it learned.

    plot_timeline(timeline).save("timeline.png")
    plot_learning_curve(read_curve("log.jsonl", "loss"), read_curve("log.jsonl", "accuracy")).save("learning_curve.png")

Drawn without pyplot and its global state: on any thread, also in a server. A picture takes about a second; from async
code, `await anyio.to_thread.run_sync(...)`.
"""

import io
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from aengine.arguments import check_choice
from aengine.extras import missing_package
from aengine.handlers.scores import MODES
from aengine.handlers.timeline import Timeline
from aengine.keywords import explain_wrong_call
from aengine.plots.curve import Curve

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
except ImportError as _error:
    raise missing_package(__name__, "matplotlib>=3.9", "plots") from _error

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"

_INK, _FAINT = "#333333", "#d9d9d9"
_LOSS, _METRIC, _BEST = "#0072B2", "#009E73", "#D55E00"
"""From the palette of Okabe and Ito, for people with any colour vision: https://jfly.uni-koeln.de/color/"""

_PARTS = {
    "step": ("step", "#0072B2"),
    "data": ("waiting for data", "#E69F00"),
    "handlers": ("inline handlers", "#009E73"),
    "back_pressure": ("waiting for subscribers", "#D55E00"),
    "event_loop": ("other tasks, pauses", "#56B4E9"),
    "rest": ("the rest", "#c8c8c8"),
}
_COLUMNS = 100
"""Of a timeline: so few that each has several samples of a long run."""

_POINTS = 1600
"""Of a curve, one for each pixel of a picture: if there are more, the range that they span is drawn."""

_drawing = threading.Lock()  # matplotlib's font caches are not thread-safe


class Picture:
    """A figure to save, or to change first.

    Attributes:
        figure: the figure, of matplotlib.
    """

    def __init__(self, figure: Figure) -> None:
        self.figure = figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file: a PNG, 1600 pixels wide, or an SVG, by the ending of its name.

        Raises:
            ValueError: the name ends in something else.
            OSError: the file cannot be written.
        """
        kind = Path(path).suffix.lower()
        if kind not in (".png", ".svg"):
            raise ValueError(f"a picture is saved as .png or .svg, got {str(path)!r}")
        Path(path).write_bytes(self.render("png" if kind == ".png" else "svg"))

    def render(self, kind: Literal["png", "svg"] = "png") -> bytes:
        """Return what `save` would write. As PNG, the same picture is the same bytes."""
        drawn = io.BytesIO()
        # Without the version of matplotlib and the time, which would differ.
        metadata: Any = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        with _drawing:
            self.figure.savefig(drawn, format=kind, metadata=metadata)
        return drawn.getvalue()


@explain_wrong_call
def plot_learning_curve(
    loss: Curve | Sequence[float], metric: Curve | Sequence[float] | None = None, *, mode: Literal["max", "min"] = "max"
) -> Picture:
    """Draw the training loss, each value and their running mean, and below it a metric with its best value marked.

    Args:
        loss: a value for each iteration, or for some.
        metric: of the validation, a value for each epoch; a plain sequence is spread evenly over the iterations.
        mode: "max" if more is better, "min" if less is.

    Raises:
        ValueError: there are no numbers, or not as many as steps.
    """
    check_choice(mode, "mode=", MODES)
    steps, losses, name = _points(loss, "loss")
    with _drawing:
        figure = _figure(4.6 if metric is not None else 2.8)
        if metric is None:
            axes = figure.subplots()
        else:
            axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 3))
            _draw_metric(below, metric, mode, last=steps[-1])
        _draw_loss(axes, steps, losses, name)
        axes.set_xlim(min(steps[0], 0.0), steps[-1] * 1.01)
        lowest = figure.axes[-1]
        lowest.set_xlabel("iteration")
        lowest.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        lowest.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return Picture(figure)


@explain_wrong_call
def plot_timeline(timeline: Timeline) -> Picture:
    """Draw where the time of a run went, over its course; of a run that is under way, up to now.

    It draws what the loop did, as shares of each hundredth of the time. The legend has the shares of the whole run;
    what took no time is left out. "The rest" is the loop itself, and its wait for the subscribers at the end.

    Raises:
        TypeError: it is no Timeline.
        ValueError: nothing was recorded.
    """
    if not isinstance(timeline, Timeline):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            "plot_timeline() draws what a Timeline has recorded: write  timeline.attach(engine)  before the run, of a"
            f"  timeline = Timeline() ; got {timeline!r}"
        )
    edges, shares, whole = _shares(timeline)
    scale, unit = _unit(edges[-1])
    shown = [part for part in _PARTS if whole[part] >= 0.0005]  # noqa: PLR2004 -- 0.1 %, rounded
    with _drawing:
        figure = _figure(3.4)
        axes = figure.subplots()
        bottom = np.zeros(len(edges) - 1)
        for part in shown:
            top = bottom + shares[part]
            # With edges in the colour of the area, else white lines show between two areas.
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
        # From the top down, as the areas are.
        axes.legend(
            handles=patches[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=10,
            labelcolor=_INK, handlelength=1.0, handleheight=1.0, labelspacing=0.7,
        )  # fmt: skip
        _dress(axes)
        title = f"{timeline.engine_name}: {timeline.samples[-1].iteration} iterations in {edges[-1] / scale:.3g} {unit}"
        axes.set_title(title, loc="left", fontsize=11, color=_INK)
    return Picture(figure)


# Figures


def _figure(height: float) -> Figure:
    # 1600 pixels wide. Where a page shows it 800 wide, letters of 10 points are 14 pixels high.
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


# The timeline


def _shares(timeline: Timeline) -> tuple[Array, dict[str, Array], dict[str, float]]:
    """Return the edges of the columns in seconds, each part's share of each column, and of the whole."""
    samples = timeline.samples
    if len(samples) < 2 or not samples[-1].total:  # noqa: PLR2004 -- an interval has two ends
        raise ValueError(
            f"nothing was recorded of engine {timeline.engine_name!r}: attach the Timeline before run(), and draw it"
            " afterwards, or meanwhile"
        )
    at = np.array([sample.total for sample in samples])
    edges = np.linspace(0.0, at[-1], min(_COLUMNS, len(samples) - 1) + 1)
    width = edges[1]
    spent: dict[str, Array] = {}
    for part in _PARTS:
        if part != "rest":
            so_far = np.array([getattr(sample, part) for sample in samples])
            spent[part] = np.diff(np.interp(edges, at, so_far)) / width
    # Only some iterations are timed, each for several, of which some may belong to the column before: so the shares of
    # a column can add up to more than 1.
    excess = np.maximum(1.0, sum(spent.values()))
    shares = {part: share / excess for part, share in spent.items()}
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
    steps, values, name = _points(metric, "metric")
    if not isinstance(metric, Curve):
        steps = steps * last / len(values)
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
    axes.margins(y=0.12)  # so that the ring around the best value fits
    _dress(axes)
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    # Above the axes, where no curve crosses it.
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=10, labelcolor=_INK,
        borderaxespad=0.2,
    )  # fmt: skip


def _running_mean(values: Array, window: int) -> Array:
    """Return the mean of `window` values around each, of fewer at the ends; NaN and infinity are left out."""
    known = np.isfinite(values)
    box = np.ones(window)
    total = np.convolve(np.where(known, values, 0.0), box, mode="same")
    count = np.convolve(known.astype(float), box, mode="same")
    mean: Array = np.divide(total, count, out=np.full(len(values), math.nan), where=count > 0.5)  # noqa: PLR2004 -- or nothing
    return mean


def _ranges(values: Array) -> tuple[Array, Array, "np.ndarray[Any, np.dtype[np.int64]]"]:
    """Return the least and the greatest value of each of `_POINTS` sections, and the index of the middle of each."""
    starts = np.linspace(0, len(values), _POINTS, endpoint=False).astype(np.int64)
    middle = (starts + np.append(starts[1:], len(values))) // 2
    return np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts), middle


def _points(curve: Curve | Sequence[float], default_name: str) -> tuple[Array, Array, str]:
    """Return steps, values and their name."""
    values = np.asarray(curve.values if isinstance(curve, Curve) else curve, dtype=np.float64)
    steps = np.asarray(curve.steps, dtype=np.float64) if isinstance(curve, Curve) else np.arange(1.0, len(values) + 1)
    if values.ndim != 1 or not len(values) or steps.shape != values.shape:
        raise ValueError(
            f"the {default_name} is a sequence of numbers, or a Curve with as many steps as values; got {steps.shape}"
            f" steps and {values.shape} values"
        )
    return steps, values, (curve.name if isinstance(curve, Curve) else "") or default_name

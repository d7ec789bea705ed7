"""The pictures of a run say what happened in it, can be read, and touch nothing that others use."""

import math
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import anyio.to_thread
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from aengine import Engine, Event, Events
from aengine.handlers import Timeline
from aengine.plots import Curve, Picture, plot_learning_curve, plot_timeline
from aengine.plots.picture import _PARTS

AnyEngine: TypeAlias = Engine[Any, Any]

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])

SLOW, BATCHES = 4e-3, 20


def rest() -> None:
    """Take time, which is the very thing that is recorded here."""
    time.sleep(SLOW)


def slowly(number: int) -> Iterator[int]:
    for batch in range(number):
        rest()
        yield batch


def step(engine: AnyEngine, batch: int) -> int:
    return batch


# What is recorded


async def slow_data(engine: AnyEngine) -> None:
    await engine.run(lambda: slowly(BATCHES))


async def slow_step(engine: AnyEngine) -> None:
    engine.state.is_slow = True
    await engine.run(range(BATCHES))


async def slow_handler(engine: AnyEngine) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED, rest)
    await engine.run(range(BATCHES))


async def slow_subscriber(engine: AnyEngine) -> None:
    async def report(event: Event) -> None:
        await anyio.sleep(SLOW)

    engine.subscribe(Events.ITERATION_COMPLETED, report, buffer=1)
    await engine.run(range(BATCHES))


async def pauses(engine: AnyEngine) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=5), engine.pause)

    async def go_on(event: Event) -> None:
        await anyio.sleep(10 * SLOW)
        engine.resume()

    engine.subscribe(Events.ITERATION_COMPLETED(every=5), go_on)
    await engine.run(range(BATCHES))


KINDS: dict[str, Callable[[AnyEngine], Any]] = {
    "data": slow_data,
    "step": slow_step,
    "handlers": slow_handler,
    "back_pressure": slow_subscriber,
    "event_loop": pauses,
}
LABELS = {
    "data": "waiting for data",
    "step": "step",
    "handlers": "inline handlers",
    "back_pressure": "waiting for subscribers",
    "event_loop": "other tasks, pauses",
}


def maybe_slow_step(engine: AnyEngine, batch: int) -> int:
    if getattr(engine.state, "is_slow", False):
        rest()
    return batch


def legend(drawn: Picture) -> dict[str, float]:
    """Return the shares that a timeline's legend tells, in per cent."""
    written = [text.get_text() for text in drawn.figure.axes[0].get_legend().get_texts()]  # type: ignore[union-attr]
    return {(words := line.rsplit(maxsplit=2))[0]: float(words[1]) for line in written}


@both_threads
@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_slow_has_most_of_the_timeline(kind: str, thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    engine: AnyEngine = Engine(maybe_slow_step, thread=thread)
    timeline = Timeline()
    timeline.attach(engine)
    await KINDS[kind](engine)
    last, statistics = timeline.samples[-1], engine.statistics()
    spent = {name: getattr(last, name) for name in KINDS}
    assert max(spent, key=lambda name: spent[name]) == kind
    assert spent[kind] > sum(spent.values()) / 2
    assert last.total == statistics.total
    assert last.iteration == BATCHES
    shares = legend(plot_timeline(timeline))
    assert max(LABELS.values(), key=lambda label: shares.get(label, 0.0)) == LABELS[kind]  # "the rest" may be more
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)


@both_threads
async def test_timeline_shows_when_it_was_slow(thread: bool) -> None:  # noqa: FBT001 -- pytest passes it by name
    """Data that is slow at first, then a step that is."""
    engine: AnyEngine = Engine(maybe_slow_step, thread=thread)
    timeline = Timeline()
    timeline.attach(engine)

    def batches() -> Iterator[int]:
        yield from slowly(BATCHES)
        engine.state.is_slow = True
        yield from range(BATCHES)

    await engine.run(batches)
    (at_first,) = [one for one in timeline.samples if one.iteration == BATCHES]
    last = timeline.samples[-1]
    assert at_first.data > at_first.step
    assert last.step - at_first.step > last.data - at_first.data

    patches = {patch.get_facecolor(): patch.get_data() for patch in plot_timeline(timeline).figure.axes[0].patches}  # type: ignore[attr-defined]
    column = {part: mpl.colors.to_rgba(colour) for part, (_, colour) in _PARTS.items()}
    data, stepped = patches[column["data"]], patches[column["step"]]
    quarter = len(data.values) // 4
    drawn_data = data.values - data.baseline
    drawn_step = stepped.values - stepped.baseline
    assert drawn_data[:quarter].mean() > drawn_step[:quarter].mean()
    assert drawn_data[-quarter:].mean() < drawn_step[-quarter:].mean()
    assert data.edges[-1] == pytest.approx(last.total * 1e3 if last.total < 1 else last.total)


async def test_run_under_way_is_drawn_up_to_now_from_another_thread() -> None:
    engine: AnyEngine = Engine(step)
    timeline = Timeline()
    timeline.attach(engine)
    drawn: list[Picture] = []

    @engine.on(Events.ITERATION_COMPLETED(once=5))
    async def draw() -> None:
        drawn.append(await anyio.to_thread.run_sync(plot_timeline, timeline))

    await engine.run(range(10))
    assert drawn[0].figure.axes[0].get_title("left").startswith(f"{engine.name}: 5 iterations in ")


async def test_nothing_recorded_says_what_to_do() -> None:
    engine: AnyEngine = Engine(step, name="trainer")
    await engine.run([1])
    timeline = Timeline()
    timeline.attach(engine)
    with pytest.raises(ValueError, match=r"nothing was recorded of engine 'trainer': attach the Timeline before"):
        plot_timeline(timeline)
    with pytest.raises(TypeError, match=r"timeline\.attach\(engine\)  before the run.*; got <Engine 'trainer'"):
        plot_timeline(engine)  # type: ignore[arg-type]  # a user's mistake


# What is drawn

NOISY = 2 * np.exp(-np.arange(700) / 100) + 0.1 * np.abs(np.sin(np.arange(700) * 12.9898))
ACCURACIES = [0.8, 0.9, 0.97, 0.95, 0.97, 0.96, 0.96]
GAPS = NOISY.copy()
GAPS[100:300] = math.nan

CURVES: dict[str, Callable[[], Picture]] = {
    "loss and metric": lambda: plot_learning_curve(NOISY.tolist(), ACCURACIES),
    "loss": lambda: plot_learning_curve(NOISY.tolist()),
    "few": lambda: plot_learning_curve([3.0, 2.0, 1.0], Curve([3], [0.1], "error"), mode="min"),
    "one": lambda: plot_learning_curve([1.0]),
    "constant": lambda: plot_learning_curve([0.5] * 100, [0.0, 0.0]),
    "many": lambda: plot_learning_curve(np.tile(NOISY, 300).tolist(), np.tile(ACCURACIES, 30).tolist()),
    "gaps": lambda: plot_learning_curve(GAPS.tolist(), [0.5, math.nan, 0.7]),
    "nothing but gaps": lambda: plot_learning_curve([math.nan] * 100, [math.nan] * 3),
    "infinite": lambda: plot_learning_curve([*NOISY.tolist(), math.inf], [0.5, math.inf], mode="min"),
    "wide numbers": lambda: plot_learning_curve(
        Curve([1_000_000, 12_000_000], [1e-7, 123_456.0], "loss per token"), [1e8, 1.23456e8]
    ),
}


def texts(drawn: Picture) -> list[Text]:
    """Return what is written; matplotlib also keeps labels of ticks that are out of view, which it does not draw."""
    figure: Any = drawn.figure
    unseen = []
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    unseen += [tick.label1, tick.label2]
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in unseen]


def assert_is_legible(drawn: Picture) -> None:
    """No text touches another, or is cut off, or is too small; the background is white."""
    image = Image.open(BytesIO(drawn.render()))
    assert image.width == 1600
    assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    page = drawn.figure.bbox.padded(1)
    boxes = {text: text.get_window_extent() for text in texts(drawn)}
    for text, box in boxes.items():
        assert float(text.get_fontsize()) >= 10
        assert page.contains(box.x0, box.y0), text
        assert page.contains(box.x1, box.y1), text
    for one, other in combinations(boxes, 2):
        assert not boxes[one].overlaps(boxes[other]), (one, other)


@pytest.mark.parametrize("name", CURVES)
def test_learning_curve_is_legible(name: str) -> None:
    drawn = CURVES[name]()
    assert_is_legible(drawn)
    assert drawn.figure.axes[-1].get_xlabel() == "iteration"
    assert drawn.figure.axes[0].get_ylabel().startswith("training loss")


async def test_timeline_is_legible() -> None:
    engine: AnyEngine = Engine(maybe_slow_step, name="trainer")
    timeline = Timeline()
    timeline.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), rest)

    async def report(event: Event) -> None:
        await anyio.sleep(4 * SLOW)

    engine.subscribe(Events.ITERATION_COMPLETED, report, buffer=1)
    engine.state.is_slow = True
    await engine.run(lambda: slowly(BATCHES))
    drawn = plot_timeline(timeline)
    assert_is_legible(drawn)
    axes = drawn.figure.axes[0]
    assert axes.get_xlabel() in ("time since the run began (ms)", "time since the run began (seconds)")
    assert axes.get_ylabel() == "share of the time"
    assert {"step", "waiting for data", "inline handlers", "waiting for subscribers"} <= set(legend(drawn))


@pytest.mark.parametrize(("mode", "best"), [("max", (3, 0.97)), ("min", (1, 0.8))], ids=["max", "min"])
def test_best_metric_is_marked(mode: Any, best: tuple[int, float]) -> None:
    epoch, value = best
    drawn = plot_learning_curve(NOISY.tolist(), [*ACCURACIES[:3], math.nan, *ACCURACIES[4:]], mode=mode)
    line, ring = drawn.figure.axes[1].lines
    assert ring.get_label() == f"best: {value}, epoch {epoch}"
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (100 * epoch, value)  # type: ignore[index]
    assert list(line.get_xdata()) == [100, 200, 300, 400, 500, 600, 700]  # type: ignore[arg-type]


def test_mean_runs_through_the_middle_of_the_values() -> None:
    values = [float(number % 2) for number in range(400)]
    each, mean = plot_learning_curve(values).figure.axes[0].lines
    assert list(each.get_ydata()) == values  # type: ignore[arg-type]
    assert mean.get_label() == "mean of 10"
    assert np.asarray(mean.get_ydata())[10:-10] == pytest.approx(0.5)


def test_curve_of_too_many_values_is_the_range_that_they_span() -> None:
    values = [float(number % 2) for number in range(20_000)]
    axes = plot_learning_curve(values).figure.axes[0]
    assert len(axes.lines) == 1
    box = axes.collections[0].get_paths()[0].get_extents()
    assert (box.y0, box.y1) == (0.0, 1.0)
    assert np.shape(axes.collections[0].get_paths()[0].vertices)[0] < 4000


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (([],), r"the loss is a sequence of numbers"),
        ((Curve([1, 2], [1.0]),), r"got \(2,\) steps and \(1,\) values"),
        (([1.0], []), r"the metric is a sequence of numbers"),
        (([1.0], [1.0], "best"), r'mode= is one of "max" \(more is better\), "min" \(less is better\), got .best.'),
    ],
    ids=["empty", "steps", "metric", "mode"],
)
def test_what_is_no_curve_is_refused(arguments: Any, advice: str) -> None:
    loss, *more = arguments
    with pytest.raises(ValueError, match=advice):
        plot_learning_curve(loss, *more[:1], **dict(zip(["mode"], more[1:], strict=False)))


# Where it is drawn


def test_it_is_saved_as_its_name_ends(tmp_path: Path) -> None:
    drawn = CURVES["few"]()
    drawn.save(tmp_path / "a.png")
    drawn.save(str(tmp_path / "a.SVG"))
    assert (tmp_path / "a.png").read_bytes() == drawn.render() == CURVES["few"]().render()
    assert ET.fromstring((tmp_path / "a.SVG").read_bytes()).tag.endswith("svg")
    with pytest.raises(ValueError, match=r"a picture is saved as .png or .svg, got 'a.pdf'"):
        drawn.save("a.pdf")


def test_threads_draw_the_same_at_once() -> None:
    names = ["loss and metric", "loss", "few", "one"] * 2
    expected = {name: CURVES[name]().render() for name in names}
    drawn: list[tuple[str, bytes]] = []
    threads = [
        threading.Thread(target=lambda name=name: drawn.append((name, CURVES[name]().render()))) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == len(names)
    assert all(rendered == expected[name] for name, rendered in drawn)


def test_pyplot_and_its_settings_are_left_alone() -> None:
    code = """
import sys
import matplotlib
before = matplotlib.rcParams.copy()
from aengine.plots import plot_learning_curve
plot_learning_curve([2.0, 1.0], [0.5]).render()
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams.copy() == before
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("name", ["plots import plot_timeline", "plots import read_curve", "handlers import Timeline"])
def test_only_pictures_need_matplotlib(name: str) -> None:
    code = f"import sys; sys.modules['matplotlib'] = None; from aengine.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "plot_" not in name:
        assert done.returncode == 0
    else:
        assert 'pip install "matplotlib>=3.9"' in done.stderr

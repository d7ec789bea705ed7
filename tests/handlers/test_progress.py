"""Progress: how the bars are called, and what they print on a terminal, in a pipe, and for several engines at once."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeAlias

import anyio
import pytest
import torch
from rich.console import Console
from support.record import Boom

from aengine import Engine, Events
from aengine.handlers import Display, ProgressBar, RichBars, TqdmBars

AnyEngine: TypeAlias = Engine[Any, Any]
EACH = timedelta(microseconds=1)


class RecordingDisplay:
    """A display that records the calls of each bar."""

    is_quiet = False

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.bars: dict[str, list[Any]] = {}
        self.error: Exception | None = None

    def bar(self, unit: str) -> "_RecordingBar":
        if self.error is not None:
            raise self.error
        return _RecordingBar(self.bars.setdefault(unit, []))


class _RecordingBar:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def begin(self, name: str, count: int, total: int | None) -> None:
        self.calls.append([name, total, count])

    def show(self, count: int, text: str) -> None:
        self.text = text
        if self.calls[-1][-1] != count:
            self.calls[-1].append(count)

    def close(self) -> None:
        self.calls.append("closed")


def plain(engine: AnyEngine, batch: int) -> float:
    return batch / 3


# How the bars are called


async def test_epochs_and_iterations_are_nested() -> None:
    display = RecordingDisplay()
    engine: AnyEngine = Engine(plain, name="trainer")
    ProgressBar(display, every=EACH).attach(engine)

    @engine.on(Events.ITERATION_COMPLETED | Events.EPOCH_STARTED | Events.EPOCH_COMPLETED)
    async def wait_for_the_look_before() -> None:
        await engine.flush()

    await engine.run([1, 2, 3], max_epochs=2)
    assert display.bars["epoch"] == [["trainer", 2, 0, 1, 2], "closed"]
    first, second, closed = [one for one in display.bars["it"] if one[0] != "trainer 0/2"]
    assert (first, closed) == (["trainer 1/2", 3, 0, 1, 2, 3], "closed")
    assert second == ["trainer 2/2", 3, 0, 1, 2, 3]


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_iters": 4}])
async def test_a_single_epoch_or_so_many_iterations_are_one_bar(limit: dict[str, int]) -> None:
    display = RecordingDisplay()
    engine: AnyEngine = Engine(plain, name="trainer")
    ProgressBar(display).attach(engine)
    await engine.run([1, 2, 3, 4], **limit)
    (bar, closed) = display.bars.pop("it")
    assert (bar[0], bar[-1], closed) == ("trainer", 4, "closed")
    assert not display.bars


async def test_what_is_terminated_stays_where_it_was() -> None:
    display = RecordingDisplay()
    engine: AnyEngine = Engine(plain)
    ProgressBar(display).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), engine.terminate)
    await engine.run([1, 2, 3], max_epochs=4)
    assert display.bars["epoch"][-2][-1] == 1
    assert display.bars["it"][-2][-1] == 2
    assert display.bars["it"][-1] == "closed"
    assert display.bars["it"].count("closed") == 1


async def test_what_is_terminated_at_the_end_of_an_epoch_has_completed_it() -> None:
    display = RecordingDisplay()
    engine: AnyEngine = Engine(plain)
    ProgressBar(display).attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=2), engine.terminate)
    await engine.run([1, 2, 3], max_epochs=4)
    assert display.bars["epoch"][-2][-1] == 2
    assert display.bars["it"][-2][-1] == 3


async def test_a_run_that_fails_closes_its_bars() -> None:
    def fail(engine: AnyEngine, batch: int) -> None:
        raise Boom

    display = RecordingDisplay()
    engine: AnyEngine = Engine(fail)
    ProgressBar(display).attach(engine)
    with pytest.raises(Boom):
        await engine.run([1])
    assert display.bars["it"][-1] == "closed"


async def test_numbers_stand_beside_the_bar_and_the_rest_does_not() -> None:
    def step(engine: AnyEngine, batch: int) -> dict[str, Any]:
        loss = torch.tensor(1 / 3, requires_grad=True)
        return {"loss": loss, "logits": torch.zeros(2), "name": "x", "count": batch}

    display, texts = RecordingDisplay(), []
    engine: AnyEngine = Engine(step)
    bar = display.bar("it")
    display.bar = lambda unit: bar  # type: ignore[method-assign]  # to read its text
    ProgressBar(display).attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(accuracy=0.5))
    await engine.run([7])
    texts.append(bar.text)
    assert texts == ["loss=0.3333, count=7, accuracy=0.5"]


async def test_a_display_that_fails_is_warned_of_once_and_the_run_continues(caplog: pytest.LogCaptureFixture) -> None:
    display = RecordingDisplay()
    display.error = OSError("the terminal is gone")
    engine: AnyEngine = Engine(plain)
    ProgressBar(display, every=EACH).attach(engine)
    await engine.run([1, 2, 3], max_epochs=3)
    assert engine.state.iteration == 9
    assert [one.levelname for one in caplog.records if one.name == "aengine.handlers"] == ["WARNING"]


async def test_a_terminal_that_is_stopped_delays_no_step() -> None:
    is_drawing, go_on = threading.Event(), threading.Event()

    class Stopped(RecordingDisplay):
        def bar(self, unit: str) -> "_RecordingBar":
            is_drawing.set()
            go_on.wait()
            return super().bar(unit)

    engine: AnyEngine = Engine(plain)
    ProgressBar(Stopped(), every=EACH).attach(engine)

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    def until_it_draws() -> None:
        is_drawing.wait()

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1000), go_on.set)  # reached though nothing is drawn
    await engine.run(range(1000))
    assert engine.state.iteration == 1000


@pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
async def test_removed_during_a_run_its_bars_stay_as_they_are(*, thread: bool) -> None:
    display = RecordingDisplay()
    engine: AnyEngine = Engine(plain, name="trainer", thread=thread)
    handle = ProgressBar(display, every=EACH).attach(engine)

    @engine.on(Events.ITERATION_COMPLETED(once=5))
    async def remove() -> None:
        await engine.flush()
        handle.remove()

    await engine.run([1, 2, 3], max_epochs=4)
    for calls, count in ((display.bars["epoch"], 1), (display.bars["it"], 1)):
        assert (calls[-2][-1], calls[-1], calls.count("closed")) == (count, "closed", 1)


async def test_bars_that_cannot_be_closed_are_warned_of_when_removed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(RecordingDisplay):
        def bar(self, unit: str) -> "_RecordingBar":
            bar = super().bar(unit)
            bar.close = self.fail  # type: ignore[method-assign]
            return bar

        def fail(self) -> None:
            raise OSError("the terminal is gone")

    engine: AnyEngine = Engine(plain, name="trainer")
    handle = ProgressBar(Broken(), every=EACH).attach(engine)

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    async def remove() -> None:
        await engine.flush()
        handle.remove()

    await engine.run([1, 2])
    assert [one.levelname for one in caplog.records if one.name == "aengine.handlers"] == ["WARNING"]


# What they print


class Terminal(io.StringIO):
    """What says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def tqdm_on(file: io.StringIO) -> Display:
    return TqdmBars(file)


def rich_on(file: io.StringIO) -> Display:
    return RichBars(Console(file=file, width=100, force_terminal=file.isatty()))


BOTH = pytest.mark.parametrize("bars_on", [tqdm_on, rich_on])


@BOTH
async def test_the_last_lines_say_that_all_is_done(bars_on: Callable[[io.StringIO], Display]) -> None:
    terminal = Terminal()
    trainer: AnyEngine = Engine(plain, name="trainer")
    evaluator: AnyEngine = Engine(plain, name="evaluator")
    bars = bars_on(terminal)
    ProgressBar(bars).attach(trainer)
    ProgressBar(bars).attach(evaluator)

    @trainer.on(Events.EPOCH_COMPLETED)
    async def evaluate() -> None:
        await trainer.flush()  # its lines are there
        await evaluator.run(range(7))

    await trainer.run(range(20), max_epochs=3)
    *_, epochs, iterations, evaluations, rest = terminal.getvalue().split("\n")
    assert "trainer" in epochs
    assert "3/3" in epochs
    assert "trainer 3/3" in iterations
    assert "20/20" in iterations
    assert "output=6.333" in iterations
    assert "evaluator" in evaluations
    assert "7/7" in evaluations
    assert "\n" not in rest


@BOTH
async def test_several_engines_at_once_have_a_line_each(bars_on: Callable[[io.StringIO], Display]) -> None:
    terminal = Terminal()
    bars = bars_on(terminal)
    engines: list[AnyEngine] = [Engine(plain, name=f"engine-{number}") for number in range(4)]
    everyone = anyio.Event()
    arrived: list[AnyEngine] = []

    async def meet(engine: AnyEngine) -> None:
        await engine.flush()  # its bar is there
        arrived.append(engine)
        if len(arrived) == len(engines):
            everyone.set()
        await everyone.wait()

    async with anyio.create_task_group() as group:
        for number, engine in enumerate(engines):
            ProgressBar(bars).attach(engine)
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), meet)
            group.start_soon(engine.run, range(10 + number))
    last = [line.rpartition("\r")[2] for line in terminal.getvalue().split("\n")[-5:-1]]
    for number in range(4):
        assert sum(f"engine-{number}" in line and f"{10 + number}/{10 + number}" in line for line in last) == 1


async def test_the_time_of_a_run_that_is_over_stands_still() -> None:
    terminal = Terminal()
    bars = TqdmBars(terminal)
    short: AnyEngine = Engine(plain, name="short")
    long: AnyEngine = Engine(plain, name="long")

    @long.on(Events.ITERATION_COMPLETED(once=1))
    async def run_the_other() -> None:
        await long.flush()
        await short.run(range(10))

    for engine in (short, long):
        ProgressBar(bars).attach(engine)
    await long.run(range(10))
    looks = [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", terminal.getvalue()) if "short: 100%" in line]
    assert len(looks) > 1
    assert looks[-1] == looks[-2]


async def test_without_a_display_engines_share_one_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: AnyEngine = Engine(plain, name="trainer")
    evaluator: AnyEngine = Engine(plain, name="evaluator")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())  # replaced later than it was made, as notebooks do
    for engine in (trainer, evaluator):
        ProgressBar().attach(engine)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(range(7)))
    await trainer.run(range(20))
    *_, trained, evaluated, rest = terminal.getvalue().split("\n")
    assert "trainer: 100%" in trained
    assert "evaluator: 100%" in evaluated
    assert "\n" not in rest


@BOTH
async def test_where_there_is_no_terminal_it_is_quiet(bars_on: Callable[[io.StringIO], Display]) -> None:
    file = io.StringIO()
    engine: AnyEngine = Engine(plain)
    ProgressBar(bars_on(file)).attach(engine)
    await engine.run(range(10))
    assert file.getvalue() == ""
    assert engine.statistics().listeners == ()


@BOTH
async def test_no_thread_is_left(bars_on: Callable[[io.StringIO], Display]) -> None:
    before = threading.enumerate()
    engine: AnyEngine = Engine(plain)
    ProgressBar(bars_on(Terminal())).attach(engine)
    await engine.run(range(10))
    names = [thread.name for thread in threading.enumerate() if thread not in before]
    assert all("AnyIO" in name or "trio" in name.lower() for name in names), names  # which end when they are idle


SCRIPT = """
import sys
from aengine import Engine
from aengine.handlers import ProgressBar
if sys.argv[1] == "tqdm":
    from aengine.handlers import TqdmBars as Bars
else:
    from aengine.handlers import RichBars as Bars
engine = Engine(lambda engine, batch: batch, name="trainer")
ProgressBar(Bars()).attach(engine)
engine.run_sync(range(30), max_epochs=2)
print("printed after")
"""


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
def test_on_a_real_terminal_what_is_printed_next_has_a_line_of_its_own(kind: str) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (20, 100))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "20"}
    command = [sys.executable, "-c", SCRIPT, kind]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        printed = b""
        try:
            while some := os.read(ours, 1 << 16):
                printed += some
        except OSError:  # Linux's way to say that no writer is left
            pass
        os.close(ours)
    assert process.returncode == 0
    lines = printed.decode().split("\n")
    after = next(number for number, line in enumerate(lines) if "printed after" in line)
    assert lines[after].strip().endswith("printed after")
    assert "30/30" in lines[after - 1]
    assert "2/2" in lines[after - 2]


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
def test_in_a_pipe_nothing_is_printed(kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, kind], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("printed after\n", "")


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
def test_without_the_package_it_says_what_to_install(kind: str) -> None:
    code = f"import sys; sys.modules[{kind!r}] = None; import aengine.handlers.progress_{kind}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"needs {kind}: pip install" in done.stderr


@pytest.mark.parametrize("is_quiet", [False, True])
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"every= is a timedelta, such as timedelta\(seconds=0.1\); got 0.5", {"every": 0.5}),
        (TypeError, r"every= is a timedelta, .*; got 5", {"every": 5}),
        (ValueError, r"every= is a timedelta of more than 0", {"every": timedelta(0)}),
        (TypeError, r"values= must be callable, got \{'loss': 1\}", {"values": {"loss": 1}}),
        (TypeError, r"values= .* cannot be called as values\(engine\)", {"values": lambda: {"loss": 1}}),
    ],
)
def test_what_cannot_be_shown_is_refused_on_any_display(
    *, is_quiet: bool, error: type[Exception], message: str, arguments: dict[str, Any]
) -> None:
    display = RecordingDisplay()
    display.is_quiet = is_quiet
    with pytest.raises(error, match=message):
        ProgressBar(display, **arguments)


@pytest.mark.parametrize("bars", [TqdmBars, RichBars])
def test_a_class_of_bars_is_no_display(bars: Any) -> None:
    with pytest.raises(TypeError, match=rf"class: ProgressBar\({bars.__name__}\(\)\)"):
        ProgressBar(bars)
    with pytest.raises(TypeError, match=r"bar\(unit\).* TqdmBars\(\).* 'tqdm' has no bar, is_quiet, lock"):
        ProgressBar("tqdm")  # type: ignore[arg-type]  # a user's mistake
    with pytest.raises(TypeError, match=r"takes a display, got <Engine.*ProgressBar\(\)\.attach\(engine\)"):
        ProgressBar(Engine(lambda engine, batch: batch))  # type: ignore[arg-type]  # likewise

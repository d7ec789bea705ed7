"""Profiling: torch.profiler on chosen iterations, where the step runs; the traces are written beside it.

Profiler("traces").attach(trainer, Events.ITERATION_STARTED(once=(100, 1000)))
Profiler("traces").attach(trainer, torch.profiler.schedule(wait=5, warmup=1, active=3, repeat=2))
"""

import os
import re
import threading
from collections.abc import Callable, Generator
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch.autograd import profiler as torch_profiler
from torch.profiler import ProfilerAction, record_function

from aengine.arguments import check_whole
from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.engine import Engine
from aengine.events import Event, EventEnum, EventLike, Events, selectors
from aengine.keywords import explain_wrong_call

AnyEngine: TypeAlias = Engine[Any, Any]
Schedule: TypeAlias = Callable[[int], ProfilerAction]
"""What `torch.profiler.schedule` returns: says what to do in an iteration, counted from 0."""
OnTrace: TypeAlias = Callable[[torch.profiler.profile, Path], object]

_RECORDS = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
_ENDS = Events.TERMINATE | Events.INTERRUPT | Events.COMPLETED | Events.CANCELLED | Events.EXCEPTION_RAISED

_in_use = threading.Lock()
"""Kineto, below torch.profiler, exists once in a process: a second recording ruins the first, or ends in a crash. So
does this lock. It is held while a window is open, which torch itself does not show while it warms up."""


class _ProfilerEvents(EventEnum):
    """What is fired on the engine, to be sent what was recorded."""

    PROFILER_TRACE_RECORDED = "profiler_trace_recorded"


@explain_wrong_call
class Profiler:
    """Records chosen iterations of an engine with torch.profiler.

        def show(recorded, path):
            print(path, recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=10))

        profiler = Profiler("traces", iterations=5, on_trace=show)
        profiler.attach(trainer, Events.ITERATION_STARTED(every=1000))  # before other handlers

    A trace begins with an iteration's step, and ends after the handlers of the last one. In it the ranges
    "aengine.data", "aengine.step" and "aengine.handlers" are the wait for a batch, the step, and what is done between
    two of them: inline handlers (those added before this is attached are within the range of the step), and whatever
    else the loop waits for. It holds what runs on the thread of the step, and what runs on devices, but not what is
    beside the step.

    The files are called after the engine and the first and last iterations recorded, "trainer-101-103.pt.trace.json",
    for TensorBoard, Perfetto or chrome://tracing. One that is there already is kept, and the next gets another number;
    several processes need folders of their own. They are written in a thread, and appear when they are whole. Torch
    holds Python's lock while it writes, though: for 200 MB the loop stands still for about a second, and longer than
    that when the recording stops. So choose few iterations.

    A run that ends inside of a window, in whatever way, writes what was recorded by then. What fails in the writing, or
    in `on_trace`, is logged, and the run goes on.

    Args:
        directory: where the traces go; made with the first of them.
        iterations: how many are recorded in a window, where an event opens it. An event that comes while a window is
            open opens no other.
        warmup: how many iterations go before these, in which the profiler is on already: its own beginning is slow.
        compress: write gzip, "trainer-101-103.pt.trace.json.gz", which is some ten times smaller.
        on_trace: `on_trace(profile, path)` is called in the writing thread when a trace has been written.
        options: what else `torch.profiler.profile` takes, such as `record_shapes=True`.

    Attributes:
        paths: the traces written so far.

    Raises:
        TypeError, ValueError: an argument is wrong.

    Torch has one profiler for a process. So the run fails, with a RuntimeError, where a window is to open and something
    else is profiling, another engine or a torch.profiler of one's own; and, as the trace is lost, where one of
    one's own was started while a window recorded. If one is started while a window warms up, the process may crash.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        iterations: int = 3,
        warmup: int = 1,
        compress: bool = False,
        on_trace: OnTrace | None = None,
        **options: Any,
    ) -> None:
        if isinstance(directory, Engine):
            raise TypeError(
                f"a Profiler is made with the directory of its traces, got {directory!r}: write"
                '  Profiler("traces").attach(engine, event)'
            )
        if wrong := {"engine", "event", "on", "on_trace_ready", "schedule"} & options.keys():
            raise TypeError(
                "a Profiler has attach(engine, event), which takes a schedule as well, and on_trace= in the place of"
                f" {', '.join(sorted(wrong))}="
            )
        torch.profiler.profile(**options)  # it would fail the run later
        self.paths: list[Path] = []
        self._directory = Path(directory)
        self._schedule = torch.profiler.schedule(
            wait=0,
            warmup=check_whole(warmup, "warmup=", minimum=0, of="iterations"),
            active=check_whole(iterations, "iterations=", minimum=1, of="iterations to record"),
            repeat=1,
        )
        self._compress = compress
        self._on_trace = on_trace
        self._options = options
        self._attachment = Attachment(self, takes_several=True)
        self._window: _Window | None = None

    def attach(self, engine: AnyEngine, event: EventLike | Schedule) -> RemovableEventHandle:
        """Record iterations of an engine: attach it before other handlers. Further events of this engine may be added.

        What is returned removes this event again. Where a window of its is open, what that has recorded is dropped: at
        once if the calling thread is the step's, or else when the iteration under way is completed.

        Args:
            engine: whose iterations.
            event: an ITERATION_STARTED with a filter, at each of which a window opens; or a schedule of
                `torch.profiler`, which is called for each iteration, and says itself which to warm up for and which to
                record. In it the first iteration has the number 0.

        Raises:
            TypeError, ValueError: this is no engine, no such event and no schedule.
            RuntimeError: this is attached to another engine.
        """
        return self._attachment.begin(engine, self._listen(engine, event))

    def _listen(self, engine: AnyEngine, event: EventLike | Schedule) -> Generator[RemovableEventHandle]:
        windows = _windows(event, self._schedule)
        engine.on(windows.event)
        engine.register_events(*_ProfilerEvents)
        yield engine.subscribe(
            _ProfilerEvents.PROFILER_TRACE_RECORDED,
            partial(self._write, windows),
            on_error="log",
            name=f"traces of {engine.name}",
        )
        # Before the other handlers, which are not the step's; all others are added while a window is open.
        yield engine.add_event_handler(Events.ITERATION_COMPLETED, self._end_step, windows)
        yield engine.add_event_handler(windows.event, self._open, windows)
        yield RemovableEventHandle(partial(self._leave, windows))

    # Inline, where the step runs: torch.profiler records the thread that starts it, and is to be stopped there

    def _open(self, engine: AnyEngine, windows: "_Windows") -> None:
        if self._window is not None:
            return
        window = self._window = _Window(engine, windows, self._options)
        for event, range_ in ((Events.GET_BATCH_STARTED, "data"), (Events.GET_BATCH_COMPLETED, "handlers")):
            window.handles.append(engine.add_event_handler(event, window.begin_range, range_))
        window.handles += [
            engine.add_event_handler(Events.ITERATION_STARTED, window.begin_range, "step"),
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._end_iteration),
            engine.add_event_handler(_ENDS, lambda: self._close(engine)),
        ]

    def _end_step(self, _: AnyEngine, windows: "_Windows") -> None:
        if self._window is not None and self._window.windows is windows:
            self._window.begin_range("handlers")

    def _end_iteration(self, engine: AnyEngine) -> None:
        if self._window is not None and not self._window.goes_on():
            self._close(engine)

    def _close(self, engine: AnyEngine) -> None:
        window = self._forget_window()
        if (recorded := window.close(engine)) is not None:
            engine.fire_event(_ProfilerEvents.PROFILER_TRACE_RECORDED, (window.windows, recorded))

    def _forget_window(self) -> "_Window":
        window, self._window = self._window, None
        assert window is not None, "the handlers that call this are removed with the window"  # noqa: S101
        while window.handles:
            window.handles.pop().remove()
        return window

    # From any thread

    def _leave(self, windows: "_Windows") -> None:
        window = self._window
        if window is None or window.windows is not windows:
            return
        window.is_wanted = False
        if window.is_of_this_thread:  # or else its own thread closes it
            self._forget_window().stop()

    # Beside the step, in a thread

    def _write(self, windows: "_Windows", event: Event) -> None:
        by, recorded = event.payload
        if by is not windows:  # another one of this engine's
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"{re.sub(r'[^-.0-9A-Za-z_]+', '_', event.engine_name)}-{recorded.first}-{recorded.last}"
        suffix = "pt.trace.json.gz" if self._compress else "pt.trace.json"  # what TensorBoard's plugin looks for
        with TemporaryDirectory(prefix=".partial-", dir=self._directory) as folder:
            trace = Path(folder, suffix)
            recorded.profile.export_chrome_trace(str(trace))  # compressed, if it is to end in .gz
            path = _free_path(self._directory, name, suffix)
            trace.replace(path)
        self.paths.append(path)
        if self._on_trace is not None:
            self._on_trace(recorded.profile, path)


class _Recorded(NamedTuple):
    profile: torch.profiler.profile
    first: int
    last: int


class _Windows(NamedTuple):
    """When windows open, and by which schedule: one that counts from the beginning of the run, or of the window."""

    event: EventLike
    schedule: Schedule
    is_of_run: bool


class _Window:
    """Some iterations in a row, with a profiler of their own: a trace can be written only once, and that takes long.

    Attributes:
        windows: of which it is one.
        handles: what it has added to the engine.
        is_wanted: False when what it records is to be dropped.
    """

    def __init__(self, engine: AnyEngine, windows: _Windows, options: dict[str, Any]) -> None:
        self._opened_at = engine.state.iteration
        before = self._opened_at - 1 if windows.is_of_run else 0
        self._schedule: Schedule = lambda step: windows.schedule(before + step)
        _take_profiler(engine)
        try:
            self._profile = torch.profiler.profile(**options, schedule=self._schedule)
            self._profile.start()
        except BaseException:
            _in_use.release()
            raise
        self.windows = windows
        self.handles: list[RemovableEventHandle] = []
        self.is_wanted = True
        self._thread = threading.get_ident()
        self._range: Any = None
        self._is_lost = False
        self.begin_range("step")

    def begin_range(self, name: str) -> None:
        """End the range under way, and begin another."""
        self._end_range()
        self._range = record_function(f"aengine.{name}")
        self._range.__enter__()

    def _end_range(self) -> None:
        ended, self._range = self._range, None
        if ended is not None:
            ended.__exit__(None, None, None)

    @property
    def is_of_this_thread(self) -> bool:
        """Whether it may be stopped here."""
        return threading.get_ident() == self._thread

    def goes_on(self) -> bool:
        """An iteration has been completed: say whether the next one is of this window, and if so, begin it.

        Raises:
            RuntimeError: another profiler was started or stopped meanwhile.
        """
        if not self.is_wanted:
            return False
        now, next_ = self._schedule(self._profile.step_num), self._schedule(self._profile.step_num + 1)
        if now is ProfilerAction.RECORD_AND_SAVE or next_ is ProfilerAction.NONE:
            return False
        self._end_range()
        self._refuse_if_disturbed()
        self._profile.step()
        self.begin_range("handlers")
        return True

    def close(self, engine: AnyEngine) -> _Recorded | None:
        """Stop the profiler, and return what it has recorded, if that is an iteration.

        Raises:
            RuntimeError: another profiler was started or stopped meanwhile.
        """
        self.stop()
        if self._is_lost or not self.is_wanted:
            return None
        begun = min(self._profile.step_num, engine.state.iteration - self._opened_at) + 1
        recorded = [self._opened_at + step for step in range(begun) if self._schedule(step) in _RECORDS]
        return _Recorded(self._profile, recorded[0], recorded[-1]) if recorded else None

    def stop(self) -> None:
        """Stop the profiler, unless it is lost.

        Raises:
            RuntimeError: another profiler was started or stopped meanwhile.
        """
        try:
            self._end_range()
            if not self._is_lost:
                self._refuse_if_disturbed()
                self._profile.stop()
        finally:
            _in_use.release()

    def _refuse_if_disturbed(self) -> None:
        step = self._profile.step_num
        if _something_records() != (self._schedule(step) in _RECORDS):
            self._is_lost = True  # stopping a profiler that is stopped already crashes the process
            raise RuntimeError(
                f"another profiler was started or stopped while iterations {self._opened_at} to"
                f" {self._opened_at + step} were profiled, and torch has one at a time: the trace is lost. Use one of"
                " them, or choose other iterations"
            )


def _something_records() -> bool:
    """Say whether a profiler records, in any thread."""
    anything: Any = torch_profiler  # what is public knows the calling thread only
    return bool(anything._is_profiler_enabled)  # noqa: SLF001


def _take_profiler(engine: AnyEngine) -> None:
    if not _in_use.acquire(blocking=False):
        other = "another engine, or another Profiler of this one,"
    elif _something_records():
        _in_use.release()
        other = "another profiler, as by a  with torch.profiler.profile():  around it,"
    else:
        return
    raise RuntimeError(
        f"iteration {engine.state.iteration} of engine {engine.name!r} cannot be profiled while {other} is being"
        " recorded: torch has one profiler for a process. Choose iterations that do not coincide, or use one of them"
    )


def _windows(event: Any, of_window: Schedule) -> _Windows:
    try:
        chosen = selectors(event)
    except TypeError:
        if not callable(event):
            raise TypeError(
                "a Profiler is attached to an event such as Events.ITERATION_STARTED(once=100), or to a"
                f" torch.profiler.schedule(...), got {event!r}"
            ) from None
        of_run = cast(Schedule, event)
        opens = Events.ITERATION_STARTED(event_filter=lambda _, at: of_run(at - 1) is not ProfilerAction.NONE)
        return _Windows(opens, of_run, is_of_run=True)
    if others := [str(one) for one in chosen if one.name != Events.ITERATION_STARTED.name]:
        raise ValueError(
            "a Profiler is attached to ITERATION_STARTED with a filter, by which iterations are chosen, got"
            f" {', '.join(others)}"
        )
    return _Windows(event, of_window, is_of_run=False)


def _free_path(directory: Path, name: str, suffix: str) -> Path:
    paths = (directory / f"{name}{'' if number == 1 else f'.{number}'}.{suffix}" for number in count(1))
    return next(path for path in paths if not path.exists())

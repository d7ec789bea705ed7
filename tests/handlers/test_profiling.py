"""Profiling: what torch's own traces hold of the chosen iterations, and what becomes of one that is broken off."""

import gzip
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch
from support.record import Boom, at
from torch.profiler import ProfilerAction, ProfilerActivity, schedule

from aengine import Engine, Events
from aengine.handlers import Profiler

AnyEngine: TypeAlias = Engine[Any, Any]

ON_CPU: dict[str, Any] = {"activities": [ProfilerActivity.CPU]}
WAYS = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


def profiled(engine: AnyEngine, directory: Path, event: Any, **options: Any) -> Profiler:
    """Return the Profiler of an engine: attached before other handlers."""
    profiler = Profiler(directory, **options)
    profiler.attach(engine, event)
    return profiler


def multiply(engine: AnyEngine, batch: int) -> float:
    ones = torch.ones(4, 4, requires_grad=True)
    total = torch.mm(ones, ones).sum()
    total.backward()  # in a thread of autograd's, or not
    return total.item()


async def multiply_and_wait(engine: AnyEngine, batch: int) -> float:
    await anyio.lowlevel.checkpoint()
    return multiply(engine, batch)


MAKE = pytest.mark.parametrize(
    "make",
    [
        lambda: Engine(multiply, name="trainer"),
        lambda: Engine(multiply, name="trainer", thread=False),
        lambda: Engine(multiply_and_wait, name="trainer"),
    ],
    ids=["worker", "loop", "async"],
)


@pytest.fixture(autouse=True)
def the_profiler_is_free_afterwards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever a test has done: nothing records any more, and the next one, torch's own or an engine's, works."""
    yield
    with torch.profiler.profile(**ON_CPU) as recorded:
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    assert [one.count for one in recorded.key_averages() if one.key == "aten::mm"] == [1]
    engine: AnyEngine = Engine(multiply)
    profiler = profiled(
        engine, tmp_path_factory.mktemp("afterwards"), Events.ITERATION_STARTED(once=1), iterations=1, **ON_CPU
    )
    engine.run_sync([1, 2])
    assert [ops(path) for path in profiler.paths] == [3]


def events_in(path: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found: list[dict[str, Any]] = json.loads(content)["traceEvents"]
    return [event for event in found if event["ph"] == "X"]


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return sorted((event for event in events if event["name"] == name), key=lambda event: float(event["ts"]))


def ranges_around(events: list[dict[str, Any]], name: str) -> list[str]:
    """Return, for each op of this name, the range of ours that it lies in."""
    ranges = [event for event in events if event["name"].startswith("aengine.")]
    around: list[str] = []
    for op in named(events, name):
        inside = [one["name"] for one in ranges if one["ts"] <= op["ts"] <= one["ts"] + one["dur"]]
        around += inside or ["none"]
    return around


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def ops(path: Path, name: str = "aten::mm") -> int:
    return len(named(events_in(path), name))


# What is recorded


@MAKE
async def test_the_ops_of_the_chosen_steps_are_in_the_trace(tmp_path: Path, make: Callable[[], AnyEngine]) -> None:
    engine = make()
    profiler = profiled(engine, tmp_path, Events.ITERATION_STARTED(once=3), iterations=2, warmup=1, **ON_CPU)
    await engine.run(range(8))
    assert names_in(tmp_path) == ["trainer-4-5.pt.trace.json"]
    assert profiler.paths == [tmp_path / "trainer-4-5.pt.trace.json"]
    events = events_in(profiler.paths[0])
    backward = 2  # for each of the two factors
    assert len(named(events, "aten::mm")) == 2 * (1 + backward)
    assert set(ranges_around(events, "aten::mm")) == {"aengine.step"}
    assert [len(named(events, f"ProfilerStep#{number}")) for number in range(4)] == [0, 1, 1, 0]


@WAYS
async def test_data_step_and_handlers_are_ranges_of_their_own(tmp_path: Path, *, thread: bool) -> None:
    def load() -> Iterator[torch.Tensor]:
        for _ in range(6):
            yield torch.cumsum(torch.ones(3), 0)

    engine: AnyEngine = Engine(multiply, name="trainer", thread=thread)
    profiler = profiled(engine, tmp_path, Events.ITERATION_STARTED(once=2), iterations=2, warmup=1, **ON_CPU)

    @engine.on(Events.ITERATION_COMPLETED)
    def clip() -> None:
        torch.clamp(torch.ones(3), max=0.5)

    @engine.on(Events.ITERATION_COMPLETED)
    async def wait() -> None:
        await anyio.lowlevel.checkpoint()

    @engine.on(Events.ITERATION_COMPLETED)
    def clip_again() -> None:
        torch.erf(torch.ones(3))

    await engine.run(load, epoch_length=6)
    (path,) = profiler.paths
    events = events_in(path)
    assert path.name == "trainer-3-4.pt.trace.json"
    assert ranges_around(events, "aten::cumsum") == ["aengine.data"] * 2
    assert ranges_around(events, "aten::clamp") == ["aengine.handlers"] * 2
    assert ranges_around(events, "aten::erf") == ["aengine.handlers"] * 2
    assert set(ranges_around(events, "aten::mm")) == {"aengine.step"}


async def test_without_data_there_is_no_range_of_it(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(multiply, name="trainer")
    profiler = profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), iterations=2, **ON_CPU)
    await engine.run(epoch_length=4)
    events = events_in(profiler.paths[0])
    assert {event["name"] for event in events if event["name"].startswith("aengine.")} == {
        "aengine.step",
        "aengine.handlers",
    }


@WAYS
async def test_an_engine_run_in_a_handler_is_in_the_trace(tmp_path: Path, *, thread: bool) -> None:
    trainer: AnyEngine = Engine(multiply, name="trainer", thread=thread)
    evaluator: AnyEngine = Engine(lambda engine, batch: torch.cumsum(torch.ones(3), 0), thread=thread)
    profiler = profiled(trainer, tmp_path, Events.ITERATION_STARTED(once=1), iterations=1, warmup=1, **ON_CPU)

    @trainer.on(Events.ITERATION_COMPLETED)
    async def evaluate() -> None:
        await evaluator.run([1, 2, 3])

    await trainer.run(range(3))
    assert ranges_around(events_in(profiler.paths[0]), "aten::cumsum") == ["aengine.handlers"] * 3


@WAYS
async def test_windows_open_at_each_event_of_the_filter(tmp_path: Path, *, thread: bool) -> None:
    engine: AnyEngine = Engine(multiply, name="trainer", thread=thread)
    profiled(engine, tmp_path, Events.ITERATION_STARTED(every=4), iterations=1, warmup=1, **ON_CPU)
    await engine.run(range(5), max_epochs=3)
    assert names_in(tmp_path) == [f"trainer-{n}-{n}.pt.trace.json" for n in (13, 5, 9)]


async def test_an_engine_may_have_several_profilers(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(multiply, name="trainer")
    early = profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), iterations=1, **ON_CPU)
    late = profiled(engine, tmp_path, Events.ITERATION_STARTED(once=5), iterations=2, **ON_CPU)
    await engine.run(range(9))
    assert [path.name for path in early.paths] == ["trainer-2-2.pt.trace.json"]
    assert [path.name for path in late.paths] == ["trainer-6-7.pt.trace.json"]


async def test_an_event_while_a_window_is_open_opens_no_other(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(multiply, name="trainer")
    profiled(engine, tmp_path, Events.ITERATION_STARTED(every=2), iterations=3, warmup=1, **ON_CPU)
    await engine.run(range(9))
    assert names_in(tmp_path) == ["trainer-3-5.pt.trace.json", "trainer-7-9.pt.trace.json"]


@MAKE
async def test_a_schedule_of_torch_says_which_iterations(tmp_path: Path, make: Callable[[], AnyEngine]) -> None:
    engine = make()
    profiler = profiled(engine, tmp_path, schedule(wait=2, warmup=1, active=2, repeat=2), **ON_CPU)
    await engine.run(range(15))
    assert [path.name for path in profiler.paths] == ["trainer-4-5.pt.trace.json", "trainer-9-10.pt.trace.json"]
    assert [ops(path) for path in profiler.paths] == [6, 6]


@WAYS
async def test_a_schedule_of_ones_own_may_end_without_a_word(tmp_path: Path, *, thread: bool) -> None:
    def second_and_third(step: int) -> ProfilerAction:
        return ProfilerAction.RECORD if step in (1, 2) else ProfilerAction.NONE

    engine: AnyEngine = Engine(multiply, name="trainer", thread=thread)
    profiler = profiled(engine, tmp_path, second_and_third, **ON_CPU)
    await engine.run(range(6))
    assert [(path.name, ops(path)) for path in profiler.paths] == [("trainer-2-3.pt.trace.json", 6)]


async def test_a_schedule_that_raises_fails_the_run(tmp_path: Path) -> None:
    calls: list[int] = []

    def fails_when_it_opens(step: int) -> ProfilerAction:
        calls.append(step)
        if len(calls) > 1:
            raise Boom
        return ProfilerAction.RECORD

    engine: AnyEngine = Engine(multiply, name="trainer")
    profiled(engine, tmp_path, fails_when_it_opens, **ON_CPU)
    with pytest.raises(Boom):
        await engine.run(range(6))


@WAYS
async def test_cycles_that_follow_each_other_are_traces_of_their_own(tmp_path: Path, *, thread: bool) -> None:
    """The next is recorded while the last is written."""
    engine: AnyEngine = Engine(multiply, name="trainer", thread=thread)
    profiler = profiled(engine, tmp_path, schedule(wait=0, warmup=1, active=1, repeat=4), **ON_CPU)
    await engine.run(range(10))
    assert [path.name for path in profiler.paths] == [f"trainer-{n}-{n}.pt.trace.json" for n in (2, 4, 6, 8)]
    assert [ops(path) for path in profiler.paths] == [3] * 4


async def test_options_are_those_of_torch(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(multiply, name="trainer")
    profiler = profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), record_shapes=True, **ON_CPU)
    await engine.run(range(5))
    mm = named(events_in(profiler.paths[0]), "aten::mm")
    assert {str(one["args"]["Input Dims"]) for one in mm} == {"[[4, 4], [4, 4]]"}


def test_run_sync_is_profiled_as_well(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(multiply, name="trainer")
    profiler = profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), iterations=1, **ON_CPU)
    engine.run_sync(range(3))
    assert [ops(path) for path in profiler.paths] == [3]


# What is written


@WAYS
async def test_the_table_is_had_when_the_trace_is_written(tmp_path: Path, *, thread: bool) -> None:
    reports: list[Any] = []

    def tell(recorded: torch.profiler.profile, path: Path) -> None:
        table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=10)
        reports.append((path.name, path.exists(), "aten::mm" in table, threading.current_thread()))

    step_threads: set[Any] = set()

    def step(engine: AnyEngine, batch: int) -> float:
        step_threads.add(threading.current_thread())
        return multiply(engine, batch)

    engine: AnyEngine = Engine(step, name="trainer", thread=thread)
    profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), iterations=1, on_trace=tell, **ON_CPU)
    await engine.run(range(3))
    ((name, exists, has_mm, written_by),) = reports
    assert (name, exists, has_mm) == ("trainer-2-2.pt.trace.json", True, True)
    assert written_by not in step_threads
    assert written_by is not threading.main_thread()


async def test_the_loop_goes_on_while_a_trace_is_being_handled(tmp_path: Path) -> None:
    go_on = threading.Event()
    engine: AnyEngine = Engine(multiply, name="trainer")
    profiled(
        engine,
        tmp_path,
        Events.ITERATION_STARTED(once=1),
        iterations=1,
        on_trace=lambda recorded, path: go_on.wait(),
        **ON_CPU,
    )
    at(engine, "IC@1/100", go_on.set)  # which would not be come to
    await engine.run(range(100))
    assert names_in(tmp_path) == ["trainer-2-2.pt.trace.json"]


async def test_a_trace_can_be_compressed(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(multiply, name="trainer")
    profiler = profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), iterations=1, compress=True, **ON_CPU)
    await engine.run(range(3))
    assert names_in(tmp_path) == ["trainer-2-2.pt.trace.json.gz"]
    assert [ops(path) for path in profiler.paths] == [3]


async def test_a_trace_that_is_there_is_kept(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(multiply, name="eval/val <1>")
    profiler = profiled(engine, tmp_path / "a" / "b", Events.ITERATION_STARTED(once=1), iterations=1, **ON_CPU)
    for _ in range(3):
        await engine.run(range(3))
    names = ["eval_val_1_-2-2.pt.trace.json", "eval_val_1_-2-2.2.pt.trace.json", "eval_val_1_-2-2.3.pt.trace.json"]
    assert [path.name for path in profiler.paths] == names
    assert names_in(tmp_path / "a" / "b") == sorted(names)
    assert [ops(path) for path in profiler.paths] == [3, 3, 3]


async def test_a_trace_that_cannot_be_written_is_logged_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "traces").write_text("a file")
    engine: AnyEngine = Engine(multiply, name="trainer")
    profiled(engine, tmp_path / "traces", Events.ITERATION_STARTED(once=1), iterations=1, **ON_CPU)
    state = await engine.run(range(3))
    assert state.iteration == 3
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "traces of trainer" in record.getMessage()


async def test_nothing_is_left_of_a_trace_that_fails_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fill(_: object, path: str) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", fill)
    engine: AnyEngine = Engine(multiply, name="trainer")
    profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), iterations=1, compress=True, **ON_CPU)
    await engine.run(range(3))
    assert names_in(tmp_path) == []
    assert [record.levelname for record in caplog.records if "traces of trainer" in record.getMessage()] == ["ERROR"]


# Runs that end inside of a window


def fail() -> None:
    raise Boom


@MAKE
@pytest.mark.parametrize("iteration", [1, 3], ids=["warming up", "recording"])
async def test_a_run_that_fails_inside_of_a_window_writes_what_there_is(
    tmp_path: Path, make: Callable[[], AnyEngine], iteration: int
) -> None:
    engine = make()
    profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), iterations=5, warmup=1, **ON_CPU)
    at(engine, f"IC@1/{iteration}", fail)
    with pytest.raises(Boom):
        await engine.run(range(9))
    assert names_in(tmp_path) == ([] if iteration == 1 else ["trainer-2-3.pt.trace.json"])


@WAYS
async def test_a_step_that_raises_is_in_its_trace(tmp_path: Path, *, thread: bool) -> None:
    def step(engine: AnyEngine, batch: int) -> float:
        result = multiply(engine, batch)
        if batch == 2:
            raise Boom
        return result

    engine: AnyEngine = Engine(step, name="trainer", thread=thread)
    profiler = profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), iterations=5, warmup=1, **ON_CPU)
    with pytest.raises(Boom):
        await engine.run(range(9))
    assert [(path.name, ops(path)) for path in profiler.paths] == [("trainer-2-3.pt.trace.json", 6)]


@MAKE
@pytest.mark.parametrize("how", ["terminate", "interrupt"])
async def test_a_run_that_is_stopped_inside_of_a_window_writes_what_there_is(
    tmp_path: Path, make: Callable[[], AnyEngine], how: str
) -> None:
    engine = make()
    profiler = profiled(engine, tmp_path, Events.ITERATION_STARTED(once=(1, 6)), iterations=3, warmup=1, **ON_CPU)
    at(engine, "IC@1/3", getattr(engine, how))
    await engine.run(range(9))
    assert [(path.name, ops(path)) for path in profiler.paths] == [("trainer-2-3.pt.trace.json", 6)]
    await engine.run(None if how == "interrupt" else range(9), max_epochs=1)
    assert [(path.name, ops(path)) for path in profiler.paths[1:]] == [("trainer-7-9.pt.trace.json", 9)]


async def test_a_run_that_is_terminated_without_completed_writes_it_too(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(multiply, name="trainer")
    profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), iterations=5, **ON_CPU)
    at(engine, "IC@1/3", lambda: engine.terminate(skip_completed=True))
    await engine.run(range(9))
    assert names_in(tmp_path) == ["trainer-2-3.pt.trace.json"]


@WAYS
async def test_a_run_that_is_over_before_the_window_writes_what_there_is(tmp_path: Path, *, thread: bool) -> None:
    engine: AnyEngine = Engine(multiply, name="trainer", thread=thread)
    profiled(engine, tmp_path, Events.ITERATION_STARTED(every=2), iterations=9, warmup=1, **ON_CPU)
    await engine.run(range(2))  # only warmed up
    assert names_in(tmp_path) == []
    await engine.run(range(4))
    assert names_in(tmp_path) == ["trainer-3-4.pt.trace.json"]


@MAKE
async def test_a_window_goes_on_over_the_end_of_an_epoch(tmp_path: Path, make: Callable[[], AnyEngine]) -> None:
    engine = make()
    profiler = profiled(engine, tmp_path, Events.ITERATION_STARTED(once=2), iterations=3, warmup=1, **ON_CPU)
    at(engine, "IC@1/3", engine.terminate_epoch)
    await engine.run(range(4), max_epochs=2)
    assert [(path.name, ops(path)) for path in profiler.paths] == [("trainer-3-5.pt.trace.json", 9)]


@MAKE
async def test_a_run_that_is_cancelled_inside_of_a_window_writes_what_there_is(
    tmp_path: Path, make: Callable[[], AnyEngine]
) -> None:
    engine = make()
    profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), iterations=5, warmup=1, **ON_CPU)
    with anyio.CancelScope() as scope:

        @engine.on(Events.ITERATION_COMPLETED(once=3))
        async def cancel() -> None:
            scope.cancel()
            await anyio.lowlevel.checkpoint()

        await engine.run(range(9))
    assert scope.cancelled_caught
    assert names_in(tmp_path) == ["trainer-2-3.pt.trace.json"]


# Removed and attached again


@WAYS
@pytest.mark.parametrize("iteration", [2, 3], ids=["warming up", "recording"])
async def test_removed_inside_of_a_window_it_drops_what_it_has(tmp_path: Path, *, thread: bool, iteration: int) -> None:
    """At once where the step runs, and the engine is as it was; the process's profiler is free."""
    engine: AnyEngine = Engine(multiply, name="trainer", thread=thread)
    profiler, free = Profiler(tmp_path, iterations=5, **ON_CPU), Profiler(tmp_path / "free", iterations=1, **ON_CPU)
    handle = profiler.attach(engine, Events.ITERATION_STARTED(once=2))
    free.attach(engine, Events.ITERATION_STARTED(once=iteration + 1))
    listeners: list[int] = []

    @engine.on(Events.ITERATION_COMPLETED(once=iteration))
    def remove() -> None:
        handle.remove()
        listeners.append(len(engine.listeners()))

    await engine.run(range(9))
    assert listeners == [len(engine.listeners())]
    assert profiler.paths == []
    assert [path.name for path in free.paths] == [f"trainer-{iteration + 2}-{iteration + 2}.pt.trace.json"]


@WAYS
@pytest.mark.parametrize("iteration", [2, 3], ids=["warming up", "recording"])
async def test_removed_on_another_thread_it_drops_it_when_the_iteration_is_over(
    tmp_path: Path, *, thread: bool, iteration: int
) -> None:
    engine: AnyEngine = Engine(multiply, name="trainer", thread=thread)
    profiler = Profiler(tmp_path, iterations=5, **ON_CPU)
    handle = profiler.attach(engine, Events.ITERATION_STARTED(once=2))

    @engine.on(Events.ITERATION_STARTED(once=iteration))
    async def remove() -> None:
        await anyio.to_thread.run_sync(handle.remove)

    seen: list[int] = []
    after = Events.ITERATION_COMPLETED(once=iteration + 1)
    engine.add_event_handler(after, lambda: seen.append(len(engine.listeners())))
    await engine.run(range(9))
    assert seen == [2]  # what this test has added
    assert profiler.paths == []
    profiler.attach(engine, Events.ITERATION_STARTED(once=1))
    await engine.run(range(9))
    assert [path.name for path in profiler.paths] == ["trainer-2-6.pt.trace.json"]


async def test_windows_of_several_events_of_one_engine(tmp_path: Path) -> None:
    """One that is to open while another is open does not."""
    engine: AnyEngine = Engine(multiply, name="trainer")
    profiler = Profiler(tmp_path, iterations=2, **ON_CPU)
    profiler.attach(engine, Events.ITERATION_STARTED(once=(1, 7)))
    handle = profiler.attach(engine, Events.ITERATION_STARTED(once=2))
    profiler.attach(engine, schedule(wait=3, warmup=1, active=1, repeat=1))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=8), handle.remove)  # not the one whose window is open
    await engine.run(range(12))
    assert sorted(path.name for path in profiler.paths) == [
        "trainer-2-3.pt.trace.json",
        "trainer-5-5.pt.trace.json",
        "trainer-8-9.pt.trace.json",
    ]


# One profiler for a process


@WAYS
async def test_a_second_engine_at_once_is_refused_and_the_first_goes_on(tmp_path: Path, *, thread: bool) -> None:
    first: AnyEngine = Engine(multiply, name="first", thread=thread)
    second: AnyEngine = Engine(multiply, name="second", thread=thread)
    profiler = profiled(first, tmp_path, Events.ITERATION_STARTED(once=1), iterations=3, warmup=1, **ON_CPU)
    profiled(second, tmp_path, Events.ITERATION_STARTED(once=2), **ON_CPU)
    refused: list[str] = []

    @first.on(Events.ITERATION_COMPLETED(once=[1, 2]))  # warming up, and recording
    async def run_the_second() -> None:
        with pytest.raises(RuntimeError) as caught:
            await second.run(range(3))
        refused.append(str(caught.value))

    await first.run(range(6))
    start = "iteration 2 of engine 'second' cannot be profiled while another engine, or another Profiler of this one,"
    assert [one.startswith(start) for one in refused] == [True, True]
    assert [path.name for path in profiler.paths] == ["first-2-4.pt.trace.json"]
    assert ops(profiler.paths[0]) == 9
    await second.run(range(3))
    assert names_in(tmp_path) == ["first-2-4.pt.trace.json", "second-3-3.pt.trace.json"]


@WAYS
async def test_inside_of_the_users_own_profiler_it_is_refused(tmp_path: Path, *, thread: bool) -> None:
    engine: AnyEngine = Engine(multiply, name="trainer", thread=thread)
    profiled(engine, tmp_path, Events.ITERATION_STARTED(once=2), **ON_CPU)
    with torch.profiler.profile(**ON_CPU) as own:
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
        with pytest.raises(RuntimeError, match=r"iteration 2 of engine 'trainer' .* torch\.profiler\.profile\(\):"):
            await engine.run(range(9))
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    assert [one.count for one in own.key_averages() if one.key == "aten::mm"] == [2 + 3]  # the steps, too
    await engine.run(range(9))
    assert names_in(tmp_path) != []


@WAYS
@pytest.mark.parametrize("when", [2, 3], ids=["first", "last"])
async def test_a_profiler_of_the_users_inside_of_a_window_is_found_out(
    tmp_path: Path, *, thread: bool, when: int
) -> None:
    own: list[Any] = []

    def step(engine: AnyEngine, batch: int) -> float:
        if engine.state.iteration != when:
            return multiply(engine, batch)
        with torch.profiler.profile(**ON_CPU) as recorded:
            result = multiply(engine, batch)
        own.append(recorded)
        return result

    engine: AnyEngine = Engine(step, name="trainer", thread=thread)
    profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), iterations=2, warmup=1, **ON_CPU)
    with pytest.raises(RuntimeError, match="another profiler was started or stopped while iterations 1 to"):
        await engine.run(range(6))
    assert names_in(tmp_path) == []
    assert [one.count for one in own[0].key_averages() if one.key == "aten::mm"] == [3]


@WAYS
async def test_a_profiler_of_the_users_that_began_in_the_warm_up_is_found_out(tmp_path: Path, *, thread: bool) -> None:
    own = torch.profiler.profile(**ON_CPU)

    def step(engine: AnyEngine, batch: int) -> float:
        if engine.state.iteration == 1:
            own.start()
        return multiply(engine, batch)

    engine: AnyEngine = Engine(step, name="trainer", thread=thread)
    profiled(engine, tmp_path, Events.ITERATION_STARTED(once=1), iterations=2, warmup=1, **ON_CPU)
    engine.add_event_handler(Events.EXCEPTION_RAISED, own.stop)
    with pytest.raises(RuntimeError, match="another profiler was started or stopped while iterations 1 to 1 were"):
        await engine.run(range(6))
    assert [one.count for one in own.key_averages() if one.key == "aten::mm"] == [3]


# The door


@pytest.mark.parametrize(
    ("on", "kind", "message"),
    [
        (100, TypeError, r"attached to an event such as .* got 100"),
        (
            Events.ITERATION_COMPLETED(once=1),
            ValueError,
            r"to ITERATION_STARTED .* got ITERATION_COMPLETED\(once=\(1,\)",
        ),
        (Events.ITERATION_STARTED | Events.EPOCH_STARTED, ValueError, "got EPOCH_STARTED"),
    ],
    ids=["number", "completed", "epoch"],
)
def test_what_chooses_no_iterations_is_refused(tmp_path: Path, on: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        profiled(Engine(multiply), tmp_path, on)


@pytest.mark.parametrize("options", [{"schedule": schedule(wait=1, warmup=1, active=1)}, {"on_trace_ready": print}])
def test_what_is_ours_to_set_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"has attach\(engine, event\), .* and on_trace= in the place of"):
        profiled(Engine(multiply), tmp_path, Events.ITERATION_STARTED(once=1), **options)


def test_what_torch_does_not_know_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="record_shape"):
        profiled(Engine(multiply), tmp_path, Events.ITERATION_STARTED(once=1), record_shape=True)

"""System statistics: real processes and real memory show in the numbers, and the samples begin and end with the run."""

import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import psutil  # type: ignore[import-untyped]  # its stubs are a distribution of their own
import pynvml  # type: ignore[import-untyped]  # it has none
import pytest
from support.record import AnyEngine, Boom
from support.ways_to_end import cancel, complete, fail, run_without_data, terminate

import aengine.handlers.system
from aengine import Engine, Events, StopReason
from aengine.handlers import SystemEvents, SystemStatistics
from aengine.loggers import Record, Tracker

OFTEN = timedelta(milliseconds=10)
NEVER = timedelta(days=1)
Values = dict[str, float]

BURN = "print('on', flush=True)\nwhile True: pass"


def sampled(engine: AnyEngine, every: timedelta = OFTEN) -> list[Values]:
    """Return the list that is going to hold the samples of this engine."""
    system = SystemStatistics(every=every)
    system.attach(engine)
    samples: list[Values] = []

    def note(engine: AnyEngine, payload: Values) -> None:
        assert payload == system.values(engine)
        samples.append(payload)

    engine.add_event_handler(SystemEvents.SYSTEM_SAMPLED, note)
    return samples


@contextmanager
def burning() -> Iterator[int]:
    """Have a process of its own use a processor. Gives its id."""
    with subprocess.Popen([sys.executable, "-c", BURN], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            yield child.pid
        finally:
            child.kill()


async def sample_until(engine: AnyEngine, samples: list[Values], enough: Callable[[Values], bool]) -> Values:
    """Run an engine until a sample is as it should be; the test's time limit says when it never is."""

    def look() -> None:
        if enough(samples[-1]):
            engine.terminate()

    handle = engine.add_event_handler(SystemEvents.SYSTEM_SAMPLED, look)
    await engine.run(endless)
    handle.remove()
    return samples[-1]


async def endless() -> Any:
    """Batches that never come: the samples do all the same."""
    yield 0
    await anyio.sleep_forever()


def doing_nothing(*, thread: bool = True) -> AnyEngine:
    return Engine(lambda engine, batch: None, thread=thread)


# The numbers


@pytest.mark.parametrize("thread", [True, False])
async def test_child_that_burns_a_processor_shows(*, thread: bool) -> None:
    engine = doing_nothing(thread=thread)
    samples = sampled(engine, timedelta(milliseconds=200))
    with burning() as pid:
        last = await sample_until(
            engine,
            samples,
            lambda values: values.get("children/cpu_percent", 0) > 10 and values["system/cpu_percent"] > 0,
        )
        assert last["children/count"] >= 1
        assert last["children/memory_bytes"] >= psutil.Process(pid).memory_info().rss / 2
    assert "children/cpu_percent" not in samples[0]


async def test_process_that_burns_a_processor_shows() -> None:
    engine = doing_nothing()
    samples = sampled(engine, timedelta(milliseconds=200))
    over = threading.Event()

    def burn() -> None:
        while not over.is_set():
            sum(range(1000))

    burner = threading.Thread(target=burn)
    burner.start()
    try:
        last = await sample_until(engine, samples, lambda values: values.get("process/cpu_percent", 0) > 10)
    finally:
        over.set()
        burner.join()
    assert last["process/threads"] >= 2


async def test_memory_that_is_allocated_shows() -> None:
    size = 64 * 2**20
    engine = doing_nothing()
    samples = sampled(engine)
    first = (await sample_until(engine, samples, lambda values: True))["process/memory_bytes"]
    held = bytearray(b"x" * size)
    last = (await sample_until(engine, samples, lambda values: True))["process/memory_bytes"]
    assert last - first > size / 2
    assert len(held) == size


async def test_open_files_and_what_is_written_to_the_network_show() -> None:
    engine = doing_nothing()
    samples = sampled(engine)
    first = (await sample_until(engine, samples, lambda values: True))["process/open_files"]
    descriptors = [os.open(__file__, os.O_RDONLY) for _ in range(50)]
    last = await sample_until(engine, samples, lambda values: "network/sent_bytes_per_second" in values)
    for descriptor in descriptors:
        os.close(descriptor)
    assert last["process/open_files"] >= first + 40
    assert all(value >= 0 for value in last.values())


async def test_first_sample_is_of_the_beginning_and_has_nothing_that_is_counted_over_time() -> None:
    engine = doing_nothing()
    samples = sampled(engine, NEVER)
    await sample_until(engine, samples, lambda values: True)
    assert len(samples) == 1
    assert {"process/memory_bytes", "process/threads", "system/memory_percent"} <= samples[0].keys()
    assert not [name for name in samples[0] if "per_second" in name or "cpu" in name]


async def test_machine_without_a_gpu_gives_no_numbers_of_one_and_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    engine = doing_nothing()
    samples = sampled(engine)
    await sample_until(engine, samples, lambda values: "system/cpu_percent" in values)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert not [name for values in samples for name in values if name.startswith(("gpu", "cuda"))]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class Nvml:
    """A driver of two GPUs, of which one does not tell its power. NVIDIA's library, not ours: there is none here."""

    NVMLError = pynvml.NVMLError
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU

    def __init__(self) -> None:
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802 -- its name
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802 -- its name
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 -- its name
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 -- its name
        return index

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> Any:  # noqa: N802 -- its name
        return SimpleNamespace(gpu=50 + gpu)

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:  # noqa: N802 -- its name
        return SimpleNamespace(used=2**30, total=2**32)

    def nvmlDeviceGetTemperature(self, gpu: int, sensor: int) -> int:  # noqa: N802 -- its name
        return 60

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:  # noqa: N802 -- its name
        if gpu:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 250_000


@pytest.mark.parametrize("end", ["terminated", "failed", "cancelled"])
async def test_each_gpu_gives_what_it_knows_and_is_let_go_of(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    nvml = Nvml()
    monkeypatch.setattr(aengine.handlers.system, "_nvml", nvml)
    engine = doing_nothing()
    samples = sampled(engine)
    opened: list[int] = []
    with anyio.CancelScope() as scope:

        @engine.on(SystemEvents.SYSTEM_SAMPLED)
        async def leave() -> None:
            opened.append(nvml.open)
            if end == "failed":
                raise Boom
            engine.terminate() if end == "terminated" else scope.cancel()

        if end == "failed":
            with pytest.raises(Boom):
                await engine.run(endless)
        else:
            await engine.run(endless)
    assert (opened, nvml.open) == ([1], 0)
    assert {name: value for name, value in samples[0].items() if name.startswith("gpu/")} == {
        "gpu/0/utilization_percent": 50,
        "gpu/0/memory_bytes": 2**30,
        "gpu/0/memory_percent": 25.0,
        "gpu/0/temperature_celsius": 60,
        "gpu/0/power_watts": 250.0,
        "gpu/1/utilization_percent": 51,
        "gpu/1/memory_bytes": 2**30,
        "gpu/1/memory_percent": 25.0,
        "gpu/1/temperature_celsius": 60,
    }


# When they come


@pytest.mark.parametrize("thread", [True, False])
async def test_samples_are_tracked_at_their_own_cadence_while_a_step_lasts(*, thread: bool) -> None:
    """The engine waits for its data, or in a step on the worker, and three samples are written meanwhile."""
    written: list[Record] = []
    enough = threading.Event()

    def step(engine: AnyEngine, batch: int) -> None:
        if thread:
            assert enough.wait(60)

    def write(records: Any) -> None:
        written.extend(records)
        if len(written) >= 3:
            enough.set()
            if not thread:
                engine.terminate()

    engine: AnyEngine = Engine(step, name="trainer", thread=thread)
    system = SystemStatistics(every=OFTEN)
    system.attach(engine)
    Tracker(write, values=system.values).attach(engine, SystemEvents.SYSTEM_SAMPLED)
    await engine.run([1] if thread else endless)
    assert {(record.event, record.engine_name) for record in written} == {("SYSTEM_SAMPLED", "trainer")}
    assert {record.step for record in written} <= {0, 1}
    assert all(record.values["process/memory_bytes"] > 0 for record in written)


async def test_samples_go_on_in_each_run() -> None:
    engine = doing_nothing()
    samples = sampled(engine, NEVER)
    for number in range(1, 4):
        await sample_until(engine, samples, lambda values: True)
        assert len(samples) == number


@pytest.mark.parametrize("again", [False, True], ids=["goes-on", "begins-anew"])
async def test_samples_go_on_when_an_interrupted_run_does(*, again: bool) -> None:
    came = [anyio.Event(), anyio.Event()]

    async def step(engine: AnyEngine, batch: anyio.Event | None) -> None:
        if batch is not None:
            await batch.wait()

    engine: AnyEngine = Engine(step)
    samples = sampled(engine, NEVER)
    for number, event in enumerate(came, start=1):
        engine.add_event_handler(SystemEvents.SYSTEM_SAMPLED(once=number), event.set)
    engine.add_event_handler(SystemEvents.SYSTEM_SAMPLED(once=1), engine.interrupt)
    data = [came[0], None, came[1]]
    await engine.run(data)
    assert (engine.state.stop_reason, len(samples)) == (StopReason.INTERRUPTED, 1)
    if again:
        engine.state.max_epochs = None
    await engine.run(data)
    assert (engine.state.stop_reason, engine.state.iteration, len(samples)) == (StopReason.COMPLETED, 3, 2)


@pytest.mark.parametrize("end", [complete, terminate, fail, cancel, run_without_data], ids=lambda way: way.__name__)
@pytest.mark.parametrize("thread", [True, False])
async def test_run_does_not_wait_for_the_next_sample(end: Any, *, thread: bool) -> None:
    """It would be failed after its grace of 30 seconds."""
    engine = doing_nothing(thread=thread)
    samples = sampled(engine, NEVER)
    await end(engine)
    assert len(samples) <= 1
    assert [one.name for one in engine.statistics().services] == ["system statistics"]


async def test_flushing_does_not_wait_for_the_end_of_the_run() -> None:
    engine = doing_nothing()
    sampled(engine, NEVER)
    flushed: list[bool] = []

    async def data() -> Any:
        yield 0
        await engine.flush()
        flushed.append(True)
        engine.terminate()

    with anyio.fail_after(60):
        await engine.run(data)
    assert flushed == [True]


async def test_machine_that_cannot_be_read_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise Boom

    monkeypatch.setattr(psutil, "virtual_memory", fail)
    engine = doing_nothing()
    sampled(engine)
    with pytest.raises(Boom) as caught:
        await engine.run(endless)
    assert "in the system statistics of engine '<lambda>'" in caught.value.__notes__


def test_without_an_event_loop_of_ones_own() -> None:
    enough = threading.Event()
    engine: AnyEngine = Engine(lambda engine, batch: enough.wait(60))
    samples = sampled(engine)
    engine.add_event_handler(SystemEvents.SYSTEM_SAMPLED(once=2), enough.set)
    engine.run_sync([1])
    assert len(samples) >= 2


async def test_removed_during_a_run_it_samples_no_more_and_attached_again_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml = Nvml()
    monkeypatch.setattr(aengine.handlers.system, "_nvml", nvml)
    system, engine = SystemStatistics(every=OFTEN), doing_nothing()
    handles = [system.attach(engine)]
    came = 0

    @engine.on(SystemEvents.SYSTEM_SAMPLED)
    def note() -> None:
        nonlocal came
        came += 1
        handles.pop().remove()  # a second one, without a handle, would fail

    @engine.on(Events.ITERATION_COMPLETED)
    async def go_on() -> None:
        if came == 1 and not handles and not nvml.open:  # what was removed has let go of the GPUs
            handles.append(system.attach(engine))
        if came == 2:
            engine.terminate()
        await anyio.lowlevel.checkpoint()

    with anyio.fail_after(60):
        await engine.run(itertools.count())
    assert (came, handles, nvml.open, engine.statistics().services) == (2, [], 0, ())
    assert system.values()


# What is refused


@pytest.mark.parametrize(
    ("every", "kind"), [(10, TypeError), (timedelta(0), ValueError), (timedelta(seconds=-1), ValueError)], ids=str
)
def test_what_is_no_time_is_refused(every: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="every= is "):
        SystemStatistics(every=every)


@pytest.mark.parametrize(("missing", "says"), [("psutil", "needs psutil"), ("pynvml", "none")])
def test_what_is_not_installed_is_named_or_done_without(missing: str, says: str) -> None:
    script = f"""
import sys
sys.modules[{missing!r}] = None
try:
    import aengine.handlers.system as system
except ImportError as error:
    print(error)
else:
    values = system._Machine().read()
    print("none" if not any(name.startswith("gpu") for name in values) else values)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert says in done.stdout

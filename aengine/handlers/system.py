"""System: what the process, the machine and its GPUs are busy with, sampled beside the step.

    system = SystemStatistics(every=timedelta(seconds=10))
    system.attach(trainer)
    track(trainer, JSONLines("system.jsonl"), SystemEvents.SAMPLED, values=system.values)

The process and the machine are read by psutil, the GPUs by nvidia-ml-py (extra `system`), and what torch has allocated
on them by torch, if it is in use. What is not there gives no numbers.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from time import perf_counter
from typing import Any

import anyio
import anyio.to_thread

from aengine.bus.emitter import RemovableEventHandle
from aengine.engine import Engine
from aengine.events import Event, EventEnum, Events

try:
    import psutil  # type: ignore[import-untyped]  # its stubs are a distribution of their own
except ImportError as error:
    raise ImportError(
        'aengine.handlers.system needs psutil: pip install "psutil>=6", which the extra "system" brings, with'
        ' nvidia-ml-py for GPUs: pip install -e ".[system]"'
    ) from error

try:
    import pynvml  # type: ignore[import-untyped]  # it has none
except ImportError:  # a machine without NVIDIA's GPUs need not have it
    pynvml = None

_nvml: Any = pynvml

_ENDS = Events.TERMINATE | Events.INTERRUPT | Events.COMPLETED | Events.CANCELLED | Events.EXCEPTION_RAISED

_LOOK = 0.5
"""Seconds from one look to the next at whether the run has ended, for one of no batch at all ends without an event."""


class SystemEvents(EventEnum):
    """What an engine with SystemStatistics fires.

    Attributes:
        SAMPLED: there are new numbers. Fired on the event loop, beside the step; so its handlers must not take the
            engine to be between two steps.
    """

    SAMPLED = "system_sampled"


class SystemStatistics:
    """Samples a process and its machine when a run begins, and then every so many seconds, whatever the steps take.

    In a task of the run, and a thread: it touches the loop as little as any subscriber does. The samples end with the
    run, however it ends.

    - `process/cpu_percent` (of one core, so more than 100 with several), `memory_bytes` (resident), `threads`,
      `open_files` (descriptors, sockets included; handles on Windows);
    - `children/count`, `cpu_percent`, `memory_bytes`: of the processes that it has started, such as the workers of a
      DataLoader, in all;
    - `system/cpu_percent` (of all cores), `memory_percent`;
    - `disk/read_bytes_per_second`, `written_bytes_per_second`, `network/received_bytes_per_second`,
      `sent_bytes_per_second`: of the machine;
    - `gpu/0/utilization_percent`, `memory_bytes`, `memory_percent`, `temperature_celsius`, `power_watts`: of each GPU,
      as `nvidia-smi` numbers them, of all who use it;
    - `cuda/0/allocated_bytes`, `reserved_bytes`: of this process, as torch numbers its devices.

    What is counted over time is that of the time since the sample before, so the first sample is without.

    Args:
        every: the time from one sample to the next.

    Raises:
        TypeError, ValueError: this is no time.
    """

    def __init__(self, every: timedelta = timedelta(seconds=10)) -> None:
        if not isinstance(every, timedelta):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"every= is a timedelta, such as timedelta(seconds=10); got {every!r}")
        if not every > timedelta(0):
            raise ValueError(f"every= is the time from one sample to the next, more than 0; got {every!r}")
        self._every = every.total_seconds()
        self._values: dict[str, float] = {}
        self._is_attached = False
        self._is_over = False
        self._scope: anyio.CancelScope | None = None  # of the task that samples
        self._continuation: RemovableEventHandle | None = None  # of a run that was interrupted

    def attach(self, engine: Engine[Any, Any]) -> None:
        """Sample in each run of an engine, from its next one on.

        Raises:
            RuntimeError: this has been attached before.
        """
        if self._is_attached:
            raise RuntimeError("these SystemStatistics are attached already: make others for another engine")
        self._is_attached = True
        engine.register_events(*SystemEvents)
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.INTERRUPT, self._wait_for_continuation)
        engine.subscribe(_ENDS, self._finish, name="end of system statistics")

    def values(self, _: Engine[Any, Any] | None = None) -> dict[str, float]:
        """Return the last sample, by name, for `track(values=)`. Nothing before the first."""
        return dict(self._values)

    def _begin(self, engine: Engine[Any, Any]) -> None:
        """Have the run start a task. A subscriber's would not do: who flushes the engine would wait for its end."""
        self._is_over = False
        if self._continuation is not None:
            self._continuation.remove()
        anything: Any = engine
        driver = anything._driver  # noqa: SLF001 -- there is one, for there is a subscriber

        async def sample() -> None:
            try:
                await self._sample(engine)
            except Exception as error:  # noqa: BLE001 -- raised by run()
                error.add_note(f"in the system statistics of engine {engine.name!r}")
                driver.fail(error)

        driver.spawn(sample, lambda: None)

    def _wait_for_continuation(self, engine: Engine[Any, Any]) -> None:
        """An interrupted run goes on without an event of its own: its next iteration has to tell."""
        self._continuation = engine.add_event_handler(Events.ITERATION_COMPLETED, self._begin)

    async def _finish(self, _: Event) -> None:
        self._is_over = True
        if self._scope is not None:
            self._scope.cancel()

    async def _sample(self, engine: Engine[Any, Any]) -> None:
        machine = _Machine()
        try:
            # Cancelled, not waited for: a driver of a GPU that hangs is not to hold up the end of the run.
            with anyio.CancelScope() as self._scope:
                while not self._has_ended(engine):
                    self._values = await _in_thread(machine.read)
                    await engine.emit(SystemEvents.SAMPLED)
                    await self._pass_time(engine)
        finally:
            self._scope = None
            machine.close()

    def _has_ended(self, engine: Engine[Any, Any]) -> bool:
        return self._is_over or engine.state.stop_reason is not None

    async def _pass_time(self, engine: Engine[Any, Any]) -> None:
        deadline = anyio.current_time() + self._every
        # A run of no batch at all ends without an event that could be waited for.
        while not self._has_ended(engine) and (left := deadline - anyio.current_time()) > 0:  # noqa: ASYNC110
            await anyio.sleep(min(left, _LOOK))


async def _in_thread(function: Callable[[], dict[str, float]]) -> dict[str, float]:
    # A limiter of its own: a driver that hangs takes none of the application's threads.
    return await anyio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))


class _Machine:
    """What is sampled, and what was counted when that was done last. In one thread at a time."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._children: dict[int, psutil.Process] = {}
        self._gpus: list[Any] | None = None
        self._has_opened = False
        self._counted: tuple[float, dict[str, int]] | None = None
        self._is_first = True

    def read(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for part in (self._of_process, self._of_children, self._of_system, self._of_gpus, _of_torch):
            values |= part()
        if self._is_first:  # of what time these would be nobody knows
            self._is_first = False
            values = {name: value for name, value in values.items() if not name.endswith("cpu_percent")}
        return values

    def close(self) -> None:
        """Let go of the GPUs."""
        self._has_opened = True  # a thread that was given up is not to open them now
        gpus, self._gpus = self._gpus, None
        if gpus is not None and _nvml is not None:
            _nvml.nvmlShutdown()

    def _of_process(self) -> dict[str, float]:
        process = self._process
        with process.oneshot():
            values: dict[str, float] = {
                "process/cpu_percent": process.cpu_percent(),
                "process/memory_bytes": process.memory_info().rss,
                "process/threads": process.num_threads(),
            }
        with suppress(psutil.Error):  # some sandboxes do not let one see that
            values["process/open_files"] = process.num_handles() if sys.platform == "win32" else process.num_fds()
        return values

    def _of_children(self) -> dict[str, float]:
        known = self._children
        with suppress(psutil.Error):
            self._children = {one.pid: known.get(one.pid, one) for one in self._process.children(recursive=True)}
        cpu = memory = 0.0
        for child in self._children.values():
            with suppress(psutil.Error):  # it has just ended
                cpu += child.cpu_percent()
                memory += child.memory_info().rss
        return {
            "children/count": len(self._children),
            "children/cpu_percent": cpu,
            "children/memory_bytes": memory,
        }

    def _of_system(self) -> dict[str, float]:
        values: dict[str, float] = {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/memory_percent": psutil.virtual_memory().percent,
        }
        now, counted = perf_counter(), dict(_counters())
        if self._counted is not None:
            before, last = self._counted
            for name in counted.keys() & last.keys():
                values[name] = max(0, counted[name] - last[name]) / (now - before)  # disks and networks come and go
        self._counted = now, counted
        return values

    def _of_gpus(self) -> dict[str, float]:
        if _nvml is None:
            return {}
        if not self._has_opened:
            self._has_opened = True
            with suppress(_nvml.NVMLError):  # there is no GPU of theirs, or no driver
                _nvml.nvmlInit()
                self._gpus = []
                for index in range(_nvml.nvmlDeviceGetCount()):
                    self._gpus.append(_nvml.nvmlDeviceGetHandleByIndex(index))
        values: dict[str, float] = {}
        for index, gpu in enumerate(self._gpus or ()):
            for reading in _READINGS:
                with suppress(_nvml.NVMLError):  # not every GPU knows everything of itself
                    values |= {f"gpu/{index}/{name}": value for name, value in reading(gpu).items()}
        return values


def _counters() -> Iterator[tuple[str, int]]:
    disk: Any = psutil.disk_io_counters()  # None where there is none to be seen, as in some containers
    if disk is not None:
        yield "disk/read_bytes_per_second", disk.read_bytes
        yield "disk/written_bytes_per_second", disk.write_bytes
    network: Any = psutil.net_io_counters()
    if network is not None:
        yield "network/received_bytes_per_second", network.bytes_recv
        yield "network/sent_bytes_per_second", network.bytes_sent


def _of_torch() -> dict[str, float]:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():  # to ask would initialize it
        return {}
    return {
        f"cuda/{device}/{name}_bytes": function(device)
        for device in range(torch.cuda.device_count())
        for name, function in (("allocated", torch.cuda.memory_allocated), ("reserved", torch.cuda.memory_reserved))
    }


def _memory(gpu: Any) -> dict[str, float]:
    memory = _nvml.nvmlDeviceGetMemoryInfo(gpu)
    return {"memory_bytes": memory.used, "memory_percent": 100 * memory.used / memory.total}


_READINGS: tuple[Callable[[Any], Mapping[str, float]], ...] = (
    lambda gpu: {"utilization_percent": _nvml.nvmlDeviceGetUtilizationRates(gpu).gpu},
    _memory,
    lambda gpu: {"temperature_celsius": _nvml.nvmlDeviceGetTemperature(gpu, _nvml.NVML_TEMPERATURE_GPU)},
    lambda gpu: {"power_watts": _nvml.nvmlDeviceGetPowerUsage(gpu) / 1000},
)

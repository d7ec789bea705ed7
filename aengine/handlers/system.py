"""System statistics: what the process, the machine and its GPUs are busy with, sampled beside the step.

    system = SystemStatistics(every=timedelta(seconds=10))
    system.attach(trainer)
    Tracker(JSONLines("system.jsonl"), values=system.values).attach(trainer, SystemEvents.SYSTEM_SAMPLED)

The process and the machine are read by psutil, the GPUs by nvidia-ml-py (extra `system`), and what torch has allocated
on them by torch, if it is in use. What is not installed or not there gives no numbers.
"""

import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from time import perf_counter
from typing import Any

import anyio

from aengine.arguments import check_interval
from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.drivers.services import Service
from aengine.engine import Engine
from aengine.events import EventEnum, Events
from aengine.extras import missing_package
from aengine.keywords import explain_wrong_call
from aengine.threads.dedicated import DedicatedThread

try:
    import psutil  # type: ignore[import-untyped]  # its stubs are a distribution of their own
except ImportError as _error:
    raise missing_package(__name__, "psutil>=6", "system") from _error

try:
    import pynvml  # type: ignore[import-untyped]  # it has none
except ImportError:  # a machine without NVIDIA's GPUs need not have it
    pynvml = None

_nvml: Any = pynvml

_ENDS = Events.TERMINATE | Events.INTERRUPT | Events.COMPLETED | Events.CANCELLED | Events.EXCEPTION_RAISED


class SystemEvents(EventEnum):
    """What an engine with SystemStatistics fires.

    Attributes:
        SYSTEM_SAMPLED: there are new numbers. Fired on the event loop, beside the step: for its handlers the engine may
            be in the middle of a step. The payload has them, by name, as `SystemStatistics.values` returns them.
    """

    SYSTEM_SAMPLED = "system_sampled"


@explain_wrong_call
class SystemStatistics:
    """Samples a process and its machine when a run begins, and then every so many seconds, whatever the steps take.

    A background service of the engine, which reads in a thread: the steps do not wait for it. The samples end with the
    run, however it ends.

    - `process/cpu_percent` (of one core, so more than 100 with several), `memory_bytes` (resident), `threads`,
      `open_files` (descriptors, sockets included; handles on Windows);
    - `children/count`, `cpu_percent`, `memory_bytes`: of the processes that it has started, such as the workers of a
      DataLoader, in all;
    - `system/cpu_percent` (of all cores), `memory_percent`;
    - `disk/read_bytes_per_second`, `written_bytes_per_second`, `network/received_bytes_per_second`,
      `sent_bytes_per_second`: of the machine;
    - `gpu/0/utilization_percent`, `memory_bytes`, `memory_percent`, `temperature_celsius`, `power_watts`: of each GPU,
      as `nvidia-smi` numbers them, of all processes that use it;
    - `cuda/0/allocated_bytes`, `reserved_bytes`: of this process, as torch numbers its devices.

    What is counted over time is counted since the sample before, so the first sample does not have it.

    Args:
        every: the time from one sample to the next.

    Raises:
        TypeError, ValueError: this is no time.
    """

    def __init__(self, *, every: timedelta = timedelta(seconds=10)) -> None:
        self._seconds = check_interval(every, "every=", 10.0)
        self._values: dict[str, float] = {}
        self._attachment = Attachment(self)

    def attach(self, engine: Engine[Any, Any]) -> RemovableEventHandle:
        """Sample in each run of an engine, also in the one under way.

        Raises:
            TypeError: this is no engine.
            RuntimeError: this is attached already.
        """
        return self._attachment.begin(engine, self._listen(engine))

    def _listen(self, engine: Engine[Any, Any]) -> Generator[RemovableEventHandle]:
        engine.register_events(*SystemEvents)
        # One for each time that it is attached: removed during a run, the one before may still be ending there.
        sampler = _Sampler(self._seconds, self._keep)
        yield engine.add_event_handler(_ENDS, sampler.end)
        yield engine.add_service(sampler, name="system statistics")

    def _keep(self, values: dict[str, float]) -> None:
        self._values = values

    def values(self, engine: Engine[Any, Any] | None = None) -> dict[str, float]:  # noqa: ARG002 -- as values= calls it
        """Return the last sample, by name, for `Tracker(values=)`. Nothing before the first."""
        return dict(self._values)


class _Sampler(Service):
    """Samples in a task of the run, which is cancelled at its end."""

    def __init__(self, seconds: float, keep: Callable[[dict[str, float]], None]) -> None:
        self._seconds = seconds
        self._keep = keep
        self._is_ending = False

    def end(self) -> None:
        """Take no more samples: events that came while subscribers and loggers finish would have them go on."""
        self._is_ending = True

    def run_started(self, engine: Any) -> None:  # noqa: ARG002 -- as Service has it
        self._is_ending = False

    async def serve(self, engine: Any) -> None:
        # A thread that is abandoned at the end of the run: neither that nor the process waits for a GPU's driver that
        # hangs, and such a driver takes none of the application's threads.
        machine, thread = _Machine(), DedicatedThread("aengine system statistics")
        try:
            while not self._is_ending:
                values = await thread.call(machine.read)
                self._keep(values)
                if not self._is_ending:
                    await engine.emit(SystemEvents.SYSTEM_SAMPLED, dict(values))
                await anyio.sleep(self._seconds)
        except Exception as error:
            error.add_note(f"in the system statistics of engine {engine.name!r}")
            raise
        finally:
            thread.abandon()
            machine.close()


class _Machine:
    """Reads the numbers, and keeps the counters of the time before. For one thread at a time."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._children: dict[int, psutil.Process] = {}
        self._gpus: list[Any] | None = None
        self._has_opened = False
        self._counted: tuple[float, dict[str, int]] | None = None  # None before the first reading

    def read(self) -> dict[str, float]:
        is_first = self._counted is None
        values: dict[str, float] = {}
        for part in (self._of_process, self._of_children, self._of_system, self._of_gpus, _of_torch):
            values |= part()
        if is_first:  # psutil counts these since its last call, and there was none
            values = {name: value for name, value in values.items() if not name.endswith("cpu_percent")}
        return values

    def close(self) -> None:
        """Close the library of the GPUs."""
        self._has_opened = True  # an abandoned thread must not open it from now on
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
        with suppress(psutil.Error):  # some sandboxes forbid that
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
        return {"children/count": len(self._children), "children/cpu_percent": cpu, "children/memory_bytes": memory}

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
            with suppress(_nvml.NVMLError):  # there is no GPU of NVIDIA's, or no driver
                _nvml.nvmlInit()
                self._gpus = []
                self._gpus += map(_nvml.nvmlDeviceGetHandleByIndex, range(_nvml.nvmlDeviceGetCount()))
        values: dict[str, float] = {}
        for index, gpu in enumerate(self._gpus or ()):
            for reading in _READINGS:
                with suppress(_nvml.NVMLError):  # not every GPU has every sensor
                    values |= {f"gpu/{index}/{name}": value for name, value in reading(gpu).items()}
        return values


def _counters() -> Iterator[tuple[str, int]]:
    disk: Any = psutil.disk_io_counters()  # None where no disk can be seen, as in some containers
    if disk is not None:
        yield "disk/read_bytes_per_second", disk.read_bytes
        yield "disk/written_bytes_per_second", disk.write_bytes
    network: Any = psutil.net_io_counters()
    if network is not None:
        yield "network/received_bytes_per_second", network.bytes_recv
        yield "network/sent_bytes_per_second", network.bytes_sent


def _of_torch() -> dict[str, float]:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():  # asking for the memory would initialize it
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

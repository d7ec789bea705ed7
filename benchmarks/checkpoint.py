"""What a checkpoint costs a run: how long the loop waits, and its step rate while a checkpoint is written.

    python benchmarks/checkpoint.py [--fast] [--json FILE] [--only GROUP ...] [--directory DIR]

Method:

- The state is a model and its AdamW, 256 MB and 1 GB in memory, in some two hundred tensors.
- stand: how long the loop waits for one save. For aengine it is measured in a real run, on the worker: from the end of
  the last inline handler of the iteration that saves to the first handler of the next iteration, minus the same time
  where nothing is saved. For the others it is the time until the call that saves has returned: `torch.save` and fsync
  into a new file, pytorch-ignite's Checkpoint with its DiskSaver, Lightning's AsyncCheckpointIO, `dcp.async_save` of
  torch with its default arguments. For comparison, the same number of bytes is copied from one flat tensor into
  another that exists already. Each in turn, in rounds; the first save of each, which may allocate buffers, is not
  counted; waiting for the write, and removing the files, is not timed.
- rate: steps that are completed between the start of a save and its end on the disk, divided by the steps that the same
  loop completes in that time without a save. The wait of the loop counts. 1.0 is a save that does not slow the loop.

The files are written to `--directory`, by default to the directory for temporary files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

if __name__ == "__main__":  # before the other imports: --help is not to wait for torch
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--fast", action="store_true", help="fewer and smaller: for CI")
    parser.add_argument("--only", nargs="+", choices=("stand", "rate"), default=["stand", "rate"])
    parser.add_argument("--directory", type=Path, help="where to write the checkpoints")
    arguments = parser.parse_args()

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

import anyio
import torch
import torch.distributed as dist
from measure import Figure, Report, begin, claim, settle
from torch.distributed.checkpoint.state_dict_saver import async_save

from aengine import Engine, Event, Events
from aengine.checkpoint import Checkpoint, Keep

AnyEngine: TypeAlias = Engine[Any, Any]
MB = 1_000_000


class Training:
    """A model of a given size in bytes with its AdamW, and a step on a small model of its own."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        width = 512
        layers = max(1, round(size / 3 / (4 * width * (width + 1))))
        self.model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.bytes = sum(
            tensor.nbytes
            for state in (self.model.state_dict(), *self.optimizer.state.values())
            for tensor in state.values()
        )

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def do_nothing(engine: object, batch: object) -> None:
    pass


class Saver(Protocol):
    """One way to save."""

    def save(self) -> float:
        """Save, and return for how many seconds the caller waited."""

    def is_written(self) -> bool:
        """Say whether it is on the disk."""

    def finish(self) -> None:
        """Wait until it is, and remove it."""


class MemoryCopy:
    """No saver: what the memory itself takes."""

    def __init__(self, training: Training, _: Path) -> None:
        self._from = torch.ones(training.bytes, dtype=torch.uint8)
        self._to = torch.empty_like(self._from)

    def save(self) -> float:
        began = time.perf_counter()
        self._to.copy_(self._from)
        return time.perf_counter() - began

    def is_written(self) -> bool:
        return True

    def finish(self) -> None:
        pass


class TorchSave:
    def __init__(self, training: Training, directory: Path) -> None:
        self._training, self._directory, self._count = training, directory, 0

    def save(self) -> float:
        self._count += 1
        began = time.perf_counter()
        with (self._directory / f"{self._count}.pt").open("wb") as file:
            torch.save(self._training.state(), file)
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - began

    def is_written(self) -> bool:
        return True

    def finish(self) -> None:
        (self._directory / f"{self._count}.pt").unlink()


class Ignite:
    """Does not sync what it writes."""

    def __init__(self, training: Training, directory: Path) -> None:
        from ignite.engine import Engine as TheirEngine
        from ignite.handlers import Checkpoint as TheirCheckpoint, DiskSaver

        self._engine = TheirEngine(do_nothing)
        os.environ["LOCAL_RANK"] = "0"  # it warns that it has to guess
        self._engine.state.iteration = self._engine.state.epoch = 0
        self._save = TheirCheckpoint(
            {"model": training.model, "optimizer": training.optimizer},
            DiskSaver(str(directory), create_dir=True, require_empty=False),
            n_saved=2,
            global_step_transform=lambda engine, _: engine.state.iteration,
        )

    def save(self) -> float:
        self._engine.state.iteration += 1
        began = time.perf_counter()
        self._save(self._engine)
        return time.perf_counter() - began

    def is_written(self) -> bool:
        return True

    def finish(self) -> None:
        os.sync()


class Lightning:
    """Clones, and writes in a thread. Does not sync what it writes."""

    def __init__(self, training: Training, directory: Path) -> None:
        from lightning_fabric.plugins import TorchCheckpointIO
        from pytorch_lightning.plugins.io import AsyncCheckpointIO

        self._io = AsyncCheckpointIO(TorchCheckpointIO())
        self._training, self._directory, self._count = training, directory, 0

    def save(self) -> float:
        self._count += 1
        self._path = self._directory / f"{self._count}.ckpt"
        began = time.perf_counter()
        self._io.save_checkpoint(self._training.state(), self._path)
        stood = time.perf_counter() - began
        executor: Any = self._io._executor  # noqa: SLF001 -- there is no public way to wait for it
        self._done = executor.submit(lambda: None)  # its one thread is done with what came before
        return stood

    def is_written(self) -> bool:
        return bool(self._done.done())

    def finish(self) -> None:
        self._done.result()
        self._path.unlink()
        os.sync()


class DcpAsync:
    """Stages into new memory, and writes in a thread. Syncs its files."""

    def __init__(self, training: Training, directory: Path) -> None:
        self._training, self._directory, self._count = training, directory, 0

    def save(self) -> float:
        self._count += 1
        self._path = self._directory / f"{self._count}"
        began = time.perf_counter()
        self._done = async_save(self._training.state(), checkpoint_id=self._path)
        return time.perf_counter() - began

    def is_written(self) -> bool:
        return self._done.done()  # type: ignore[union-attr]  # a future, by default

    def finish(self) -> None:
        self._done.result()  # type: ignore[union-attr]
        shutil.rmtree(self._path)


class Ours:
    """A run of three iterations for each save, which is made after the second."""

    def __init__(self, training: Training, directory: Path, *, write_in: Any = "thread") -> None:
        self._engine: AnyEngine = Engine(do_nothing)
        state = {"model": training.model, "optimizer": training.optimizer}
        self._checkpoint = Checkpoint(directory / "ours", state, keep=Keep(last=2), write_in=write_in)
        self._checkpoint.attach(self._engine, Events.ITERATION_COMPLETED(lambda _, iteration: iteration % 3 == 2))
        self._ends: list[float] = []
        self._begins: list[float] = []
        self._engine.add_event_handler(Events.ITERATION_COMPLETED, self._note, self._ends)
        self._engine.add_event_handler(Events.GET_BATCH_STARTED, self._note, self._begins)
        self._epochs = 0

    def _note(self, _: AnyEngine, times: list[float]) -> None:
        times.append(time.perf_counter())

    def save(self) -> float:
        self._epochs += 1
        self._ends.clear()
        self._begins.clear()
        anyio.run(partial(self._engine.run, [0, 1, 2], max_epochs=self._epochs))  # returns when it is committed
        without, saving = (self._begins[n + 1] - self._ends[n] for n in (0, 1))
        return saving - without

    def is_written(self) -> bool:
        return True

    def finish(self) -> None:
        pass

    def close(self) -> None:
        anyio.run(self._checkpoint.aclose)


SAVERS: dict[str, Callable[[Training, Path], Saver]] = {
    "memory copy": MemoryCopy,
    "aengine": Ours,
    "aengine, written in a process": partial(Ours, write_in="process"),
    "torch.save and fsync": TorchSave,
    "pytorch-ignite's Checkpoint": Ignite,
    "Lightning's AsyncCheckpointIO": Lightning,
    "dcp.async_save": DcpAsync,
}


def measure_stand(report: Report, size: int, directory: Path, *, rounds: int) -> dict[str, list[float]]:
    training = Training(size)
    savers: dict[str, Saver] = {}
    for name, make in SAVERS.items():
        place = directory / str(len(savers))
        place.mkdir(parents=True)
        savers[name] = make(training, place)
    stood: dict[str, list[float]] = {name: [] for name in savers}
    for number in range(rounds + 1):
        for name, saver in savers.items():
            settle()
            seconds = saver.save()
            saver.finish()
            if number:
                stood[name].append(seconds)
    for saver in savers.values():
        if isinstance(saver, Ours):
            saver.close()
    copy, ours = stood["memory copy"], stood["aengine"]
    report.table(
        f"The loop stands still for one save of {training.bytes / MB:.0f} MB",
        ["", "ms", "times the memory copy", "times aengine"],
        [[name, in_ms(seconds), over(seconds, copy), over(seconds, ours)] for name, seconds in stood.items()],
    )
    return stood


def in_ms(seconds: list[float]) -> Figure:
    return Figure(statistics.median(seconds) * 1e3, min(seconds) * 1e3)


def over(mine: list[float], theirs: list[float]) -> Figure:
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return Figure(statistics.median(ratios), min(mine) / min(theirs))


def step_of(width: int) -> Callable[[], object]:
    """A step of a model of its own: what is saved is not what is stepped, so that all steps are alike."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(max(64, width), 64), torch.randint(0, 10, (max(64, width),))
    loss_fn = torch.nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    return step


def rate_of_saver(saver: Saver, step: Callable[[], object], usual: float) -> float:
    """Steps during one save of a bare loop, over those that there would have been without it."""
    began = time.perf_counter()
    saver.save()
    steps = 0
    while not saver.is_written():
        step()
        steps += 1
    ended = time.perf_counter()
    saver.finish()
    return steps * usual / (ended - began)


def rate_of_ours(training: Training, directory: Path, step: Callable[[], object], usual: float, write_in: Any) -> float:
    """The same of a run: from the end of the iteration that saves to the commit, as the event loop hears of it."""
    marks: dict[str, float] = {}
    steps = 0

    def count(engine: AnyEngine, batch: int) -> None:
        nonlocal steps
        step()
        steps += "began" in marks

    async def run() -> float:
        engine: AnyEngine = Engine(count)
        state = {"model": training.model, "optimizer": training.optimizer}
        async with Checkpoint(directory / f"ours in a {write_in}", state, write_in=write_in) as checkpoint:
            checkpoint.attach(engine, Events.ITERATION_COMPLETED(once=[1, warm]))

            @engine.on(Events.ITERATION_COMPLETED(once=warm))
            def began() -> None:
                marks["began"] = time.perf_counter()

            @engine.subscribe("CHECKPOINT_COMMITTED")
            async def ended(event: Event) -> None:
                if "began" in marks:
                    marks["ended"] = time.perf_counter()
                    engine.terminate()

            await engine.run(epoch_length=10**9)
        return steps * usual / (marks["ended"] - marks["began"])

    warm = 2 + int(4 / usual)  # the first save makes the buffers and, elsewhere, the process
    return anyio.run(run)


def usual_time(step: Callable[[], object], seconds: float) -> float:
    for _ in range(10):
        step()
    began, steps = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        step()
        steps += 1
    return passed / steps


def measure_rate(report: Report, size: int, directory: Path, *, rounds: int) -> None:
    training = Training(size)
    background = {name: SAVERS[name] for name in ("Lightning's AsyncCheckpointIO", "dcp.async_save")}
    savers: dict[str, Saver] = {}
    for name, make in background.items():
        place = directory / f"rate {len(savers)}"
        place.mkdir(parents=True)
        savers[name] = make(training, place)
        savers[name].save()
        savers[name].finish()
    kept: dict[str, dict[int, list[float]]] = {}
    times: dict[int, float] = {}
    for width in (64, 512):
        step = step_of(width)
        for number in range(rounds):
            usual = times[width] = usual_time(step, 1.0)
            for write_in in ("thread", "process"):
                name = "aengine" if write_in == "thread" else "aengine, written in a process"
                place = directory / f"rate of ours {width} {number} {write_in}"
                kept.setdefault(name, {}).setdefault(width, []).append(
                    rate_of_ours(training, place, step, usual, write_in)
                )
                shutil.rmtree(place)
            for name, saver in savers.items():
                kept.setdefault(name, {}).setdefault(width, []).append(rate_of_saver(saver, step, usual))
    report.table(
        f"Of its step rate the loop keeps, while {training.bytes / MB:.0f} MB are saved",
        ["", *(f"steps of {times[width] * 1e3:.2f} ms" for width in times)],
        [
            [name, *(Figure(statistics.median(rates), max(rates)) for rates in by_width.values())]
            for name, by_width in kept.items()
        ],
    )


def main(options: argparse.Namespace) -> None:
    begin()
    sizes = [64 * MB] if options.fast else [256 * MB, 1000 * MB]
    rounds = 3 if options.fast else 9
    report = Report("checkpoints", {"fast": options.fast, "sizes": sizes, "rounds": rounds})
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        directory = Path(temporary)
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        for size in sizes:
            if "stand" in options.only:
                stood = measure_stand(report, size, directory / f"stand {size}", rounds=rounds)
                if size == sizes[0]:
                    copy, ours, theirs = (stood[name] for name in ("memory copy", "aengine", "torch.save and fsync"))
                    said = f"{size // MB} MB"
                    report.claims.append(
                        claim(f"{said}: standing still, over the memory copy", 1.6, {"": over(ours, copy)})
                    )
                    report.claims.append(
                        claim(
                            f"{said}: times less than torch.save and fsync",
                            8,
                            {"": over(theirs, ours)},
                            at_least=True,
                        )
                    )
            if "rate" in options.only:
                measure_rate(report, size, directory / f"rate {size}", rounds=1 if options.fast else 3)
        dist.destroy_process_group()
    report.finish(options.json)


if __name__ == "__main__":
    main(arguments)

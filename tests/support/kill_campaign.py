"""Kills a training again and again, damages what it saved, and counts: starts the children of `fork_child.py`."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SLOWNESS = 0.0015
"""Seconds that each call of a save to the disk takes at most, so that a kill hits a save often enough."""

_COMMITTED = re.compile(r"step-(\d{10})(?:\.(\d+))?")
_KILLED = -signal.SIGKILL


class ForkServer:
    """The process of `fork_child.py`, from which each run is forked. A context manager."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._last: ForkedRun | None = None

    def __enter__(self) -> Self:
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "support.fork_child", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | single | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert self.read() == ["ready"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()  # which ends it, and its child
        self.process.wait()
        self.process.stdout.close()

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read(self) -> list[str]:
        """Return the words of the next line of its output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def start(
        self,
        program: str,
        directory: Path | None,
        *,
        backend: str,
        seed: int = 0,
        slowness: float = SLOWNESS,
        die_at: tuple[int, int] | None = None,
        threads: tuple[str, ...] = ("aengine checkpoint",),
        **options: Any,
    ) -> "ForkedRun":
        """Start a run. One that a failed test has left is killed.

        Args:
            program: which training.
            directory: where its checkpoints are, None for none.
            backend: which event loop.
            seed: of the time that each call to the disk takes.
            slowness: how many seconds that is at most.
            die_at: at which save, and at which of its calls to the disk, the process is killed.
            threads: whose calls to the disk are slow.
            options: further options of the training.
        """
        described = {
            "program": program,
            "backend": backend,
            "directory": directory and str(directory),
            "seed": seed,
            "slowness": slowness,
            "die_at": die_at,
            "threads": threads,
            **options,
        }
        if self._last is not None:
            self._last.kill()
        self.send(json.dumps(described))
        self._last = ForkedRun(self)
        return self._last


class ForkedRun:
    """A run in a child of the server, as far as it has reported.

    Attributes:
        reports: the words of each line so far.
        status: the exit status, None while it runs.
        digest: of the final state, if it ran to its end.
    """

    def __init__(self, fork_server: ForkServer) -> None:
        self.reports: list[list[str]] = []
        self.status: int | None = None
        self.digest = ""
        self._server = fork_server
        self._pid = int(fork_server.read()[1])

    def until(self, *wanted: str, times: int = 1) -> bool:
        """Read until a line has begun with these words so many times. Returns False if it ended before."""
        for words in self._read_reports():
            times -= words[: len(wanted)] == list(wanted)
            if not times:
                return True
        return False

    def kill(self) -> bool:
        """Kill it. Returns whether it had not ended before."""
        if self.status is None:
            os.kill(self._pid, signal.SIGKILL)  # not reaped yet, so the pid is still its own
            self.end()
        return self.status == _KILLED

    def end(self) -> None:
        """Wait for its end."""
        for _ in self._read_reports():
            pass

    def _read_reports(self) -> Iterator[list[str]]:
        while self.status is None:
            words = self._server.read()
            assert words, "the fork_server has ended"
            if words[0] == "failed":
                raise AssertionError(json.loads(" ".join(words[1:])))
            if words[0] == "over":
                self._server.send("reap")
            elif words[0] == "reaped":
                self.status = int(words[1])
            else:
                self.reports.append(words)
                if words[0] == "finished":
                    self.digest = words[1]
                yield words

    # What must hold of it

    def begins_at(self, checkpoint: str) -> None:
        """Assert that it begins from this checkpoint, and that it removed what earlier runs had not finished."""
        assert self.until("restored")
        assert self.reports[-1] == ["restored", checkpoint]

    def newest_left(self, directory: Path, began_at: str) -> str:
        """Return the newest checkpoint after it was killed: its last one, or the one that it began from."""
        committed = [words[3] for words in self.reports if _commits(words) and words[0] == "done"]
        begun = [words[3] for words in self.reports if _commits(words)]
        left = newest(directory)
        assert left in ([began_at, *committed][-1], [began_at, *begun][-1])
        return left

    def completes(self, directory: Path | None) -> None:
        """Wait until it has run to its end, and assert that it left no temporary file."""
        self.end()
        assert self.status == 0
        if directory is not None:
            left = [path.name for path in directory.iterdir() if not path.name.startswith(("step-", "damaged-step-"))]
            assert left == [".lock"]


def _commits(words: list[str]) -> bool:
    """Say whether this is the rename of a draft, about to be done or done."""
    return words[1:2] == ["rename"] and words[3].startswith("step-")


# Damage


def flip(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / "state.pt").write_bytes(data)


def cut(checkpoint: Path) -> None:
    os.truncate(checkpoint / "state.pt", (checkpoint / "state.pt").stat().st_size // 2)


def empty(checkpoint: Path) -> None:
    os.truncate(checkpoint / "state.pt", 0)


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def cut_manifest(checkpoint: Path) -> None:
    os.truncate(checkpoint / "manifest.json", 100)


DAMAGES: list[Callable[[Path], None]] = [flip, cut, remove_manifest, empty, cut_manifest]


def checkpoints(directory: Path) -> list[str]:
    """Return the names of the checkpoints that are there, oldest first, by their names, whatever is in them."""
    names = [path.name for path in directory.glob("step-*")]
    return sorted(names, key=lambda name: [int(part or 1) for part in _parts(name)])


def _parts(name: str) -> tuple[str, ...]:
    match = _COMMITTED.fullmatch(name)
    assert match, name
    return match.groups()


def newest(directory: Path) -> str:
    return ["nothing", *checkpoints(directory)][-1]


# The campaign

AIMS: list[tuple[tuple[str, ...], int, float]] = [
    (("iteration",), 12, 0.02),
    (("save",), 3, 0.02),
    (("disk", "mkdir"), 3, 0.02),
    (("disk", "rename"), 6, 0.01),
    (("disk", "unlink"), 3, 0.002),
]
"""When to kill: after which report, how often repeated at most, and how many seconds later at most."""


def kill_at_random(run: ForkedRun, chance: random.Random, aims: list[tuple[tuple[str, ...], int, float]]) -> bool:
    """Kill at a random moment of the training. Returns False if it ran to its end before."""
    heard, times, seconds = chance.choice(aims)
    if run.until(*heard, times=chance.randint(1, times)):
        time.sleep(chance.uniform(0, seconds))  # no synchronisation: the random moment is what is tested
    return run.kill()


@dataclass
class Tally:
    starts: int = 0
    kills: int = 0
    in_save: int = 0  # with a draft left behind: between its directory and its commit
    in_retention: int = 0  # with trash left behind
    before_the_first: int = 0  # checkpoint was committed
    damaged: int = 0
    runs: int = 0
    programs: set[str] = field(default_factory=set)


class Campaign:
    """Runs that are killed, and started again until they complete. All random choices follow from the seed.

    Asserts that each start begins from the right checkpoint, and that a completed run leaves no temporary file.
    """

    def __init__(self, fork_server: ForkServer, backend: str, root: Path, seed: int) -> None:
        self.tally = Tally()
        self._server = fork_server
        self._backend = backend
        self._root = root
        self._chance = random.Random(seed)

    def run(self, program: str, kills: int) -> str:
        """Run to the end, killed until there were so many kills in all; return its digest."""
        tally, directory = self.tally, self._root / f"run-{self.tally.runs}"
        tally.runs += 1
        tally.programs.add(program)
        began_at = "nothing"
        while True:
            run = self._server.start(program, directory, backend=self._backend, seed=self._chance.getrandbits(32))
            tally.starts += 1
            run.begins_at(began_at)
            if tally.kills == kills or not kill_at_random(run, self._chance, AIMS):
                break
            self._count(directory)
            began_at = run.newest_left(directory, began_at)
            if tally.kills >= 5 * (tally.damaged + 1):  # where there is but one, after a later kill
                began_at = self._damage(directory, began_at)
        run.completes(directory)
        shutil.rmtree(directory)
        return run.digest

    def _count(self, directory: Path) -> None:
        tally = self.tally
        tally.kills += 1
        tally.in_save += any(directory.glob(".tmp-*"))
        tally.in_retention += any(directory.glob(".trash-*"))
        tally.before_the_first += not checkpoints(directory)

    def _damage(self, directory: Path, newest: str) -> str:
        """Damage the newest, and return the one that the next start must begin from."""
        there_are = checkpoints(directory)
        if len(there_are) < 2:
            return newest
        DAMAGES[self.tally.damaged % len(DAMAGES)](directory / newest)
        self.tally.damaged += 1
        return there_are[-2]

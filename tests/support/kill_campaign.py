"""Kills a training again and again, damages what it saved, and counts: the parent of the lives of `fork_child.py`."""

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
"""Seconds that each call of a save to the disk takes at most, more than it would: there must be something to hit."""

_COMMITTED = re.compile(r"step-(\d{10})(?:\.(\d+))?")
_KILLED = -signal.SIGKILL


class Template:
    """The process that is forked for each life. A context manager."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._last: Life | None = None

    def __enter__(self) -> Self:
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "support.fork_child", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | single | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert self.say() == ["ready"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()  # which ends it, and the life under way
        self.process.wait()
        self.process.stdout.close()

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def say(self) -> list[str]:
        """Return the words of the next line that it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def live(
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
    ) -> "Life":
        """Begin a life. One that a test has left, when it failed, ends now.

        Args:
            program: which training.
            directory: where its checkpoints are, None for none.
            backend: which event loop.
            seed: of how slow the disk is at each call.
            slowness: how many seconds that is at most.
            die_at: at which call to the disk of which save to die.
            threads: whose calls to the disk are slow.
            options: what else the training is to know.
        """
        about = {
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
        self.ask(json.dumps(about))
        self._last = Life(self)
        return self._last


class Life:
    """One life, from what it says.

    Attributes:
        reports: all that it has said so far.
        status: how it ended.
        digest: what all came to, if it came to its end.
    """

    def __init__(self, template: Template) -> None:
        self.reports: list[list[str]] = []
        self.status: int | None = None
        self.digest = ""
        self._template = template
        self._pid = int(template.say()[1])

    def until(self, *wanted: str, times: int = 1) -> bool:
        """Listen until it has said a line that begins like this so many times. False if it ended before."""
        for words in self._listen():
            times -= words[: len(wanted)] == list(wanted)
            if not times:
                return True
        return False

    def kill(self) -> bool:
        """End it now. Returns whether that is what it died of."""
        if self.status is None:
            os.kill(self._pid, signal.SIGKILL)  # it is not reaped, so this is nobody else
            self.end()
        return self.status == _KILLED

    def end(self) -> None:
        """Wait for its end."""
        for _ in self._listen():
            pass

    def _listen(self) -> Iterator[list[str]]:
        while self.status is None:
            words = self._template.say()
            assert words, "the template has ended"
            if words[0] == "failed":
                raise AssertionError(json.loads(" ".join(words[1:])))
            if words[0] == "over":
                self._template.ask("reap")
            elif words[0] == "reaped":
                self.status = int(words[1])
            else:
                self.reports.append(words)
                if words[0] == "finished":
                    self.digest = words[1]
                yield words

    # What must be true of it

    def begins_at(self, checkpoint: str) -> None:
        """Listen until it has begun: from this checkpoint, and with what others left lying about swept away."""
        assert self.until("restored")
        assert self.reports[-1] == ["restored", checkpoint]

    def left(self, directory: Path, began_at: str) -> str:
        """Return the newest checkpoint that it left: its last one, or that where it began."""
        committed = [words[3] for words in self.reports if _commits(words) and words[0] == "done"]
        begun = [words[3] for words in self.reports if _commits(words)]
        left = newest(directory)
        assert left in ([began_at, *committed][-1], [began_at, *begun][-1])
        return left

    def ends(self, directory: Path | None) -> None:
        """Wait for its end, which nobody brought about, and after which nothing is left lying about."""
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
    """Return the names of the checkpoints that are there, oldest first, as they are called and whatever is in them."""
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
"""When to kill: what must be heard, how often at most, and how many seconds may then pass at most."""


def kill_at_random(life: Life, chance: random.Random, aims: list[tuple[tuple[str, ...], int, float]]) -> bool:
    """Kill once it trains, at a moment of chance. Returns False if it came to its end before."""
    heard, times, seconds = chance.choice(aims)
    if life.until(*heard, times=chance.randint(1, times)):
        time.sleep(chance.uniform(0, seconds))  # not to synchronise: it is the experiment
    return life.kill()


@dataclass
class Tally:
    lives: int = 0
    kills: int = 0
    in_save: int = 0  # with a draft left behind: between its directory and its commit
    in_retention: int = 0  # with trash left behind
    before_the_first: int = 0  # checkpoint was committed
    damaged: int = 0
    runs: int = 0
    programs: set[str] = field(default_factory=set)


class Campaign:
    """Runs that are killed on their way until they are through, over and over. All chance follows from the seed.

    Asserts, of each life, that it begins where it must; and of each run, that nothing is left lying about.
    """

    def __init__(self, template: Template, backend: str, root: Path, seed: int) -> None:
        self.tally = Tally()
        self._template = template
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
            life = self._template.live(program, directory, backend=self._backend, seed=self._chance.getrandbits(32))
            tally.lives += 1
            life.begins_at(began_at)
            if tally.kills == kills or not kill_at_random(life, self._chance, AIMS):
                break
            self._count(directory)
            began_at = life.left(directory, began_at)
            if tally.kills >= 5 * (tally.damaged + 1):  # where there is but one, it is made up for later
                began_at = self._damage(directory, began_at)
        life.ends(directory)
        shutil.rmtree(directory)
        return life.digest

    def _count(self, directory: Path) -> None:
        tally = self.tally
        tally.kills += 1
        tally.in_save += any(directory.glob(".tmp-*"))
        tally.in_retention += any(directory.glob(".trash-*"))
        tally.before_the_first += not checkpoints(directory)

    def _damage(self, directory: Path, newest: str) -> str:
        """Damage the newest, and return the one that is to be gone on from instead."""
        there_are = checkpoints(directory)
        if len(there_are) < 2:
            return newest
        DAMAGES[self.tally.damaged % len(DAMAGES)](directory / newest)
        self.tally.damaged += 1
        return there_are[-2]

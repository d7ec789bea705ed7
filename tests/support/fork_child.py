"""A process that forks a child for each life that is to be ended: it has imported what a training needs, once.

    python -m support.fork_child support.killable

The argument is the module whose live(life, report) a child calls; lives are read from stdin, as JSON.

Whatever a child reports, and what becomes of it, comes out on stdout, a line each: `pid 123`, what it says, `over` when
it is dead, and, asked to `reap` it, `reaped` with its status. Until then its pid is nobody else's, so that it can be
killed without a race. A life takes a tenth of a second instead of the seconds that importing torch takes.
"""

import importlib
import json
import os
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

_write = os.write  # the one that is never slow
_CALLS = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir")
_SAVES = "aengine checkpoint"
"""The name of the thread of a save."""


def report(*words: object) -> None:
    _write(1, (" ".join(map(str, words)) + "\n").encode())  # one write, which no other cuts in two


class SlowDisk:
    """Makes whatever a save does to the disk take its time, reports it, and has it be the last thing that happens.

    Args:
        seed: of how long it takes.
        slowness: seconds that each call takes at most.
        die_at: which save of this life, and which of its calls, is not to return. A write gets half of it done.
    """

    def __init__(self, seed: int, slowness: float, die_at: list[int] | None) -> None:
        self._random = random.Random(seed)
        self._slowness = slowness
        self._die_at = tuple(die_at or ())
        self._save = self._call = 0

    def install(self, *, threads: tuple[str, ...]) -> None:
        for name in _CALLS:
            setattr(os, name, self._slowed(name, getattr(os, name), threads))

    def _slowed(self, name: str, function: Callable[..., Any], threads: tuple[str, ...]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread().name not in threads or (name == "open" and not arguments[1] & os.O_CREAT):
                return function(*arguments, **options)
            named = [Path(one).name for one in arguments if isinstance(one, str | os.PathLike)]
            if name == "mkdir" and named[0].startswith(".tmp-"):
                self._save, self._call = self._save + 1, 0
            self._call += 1
            report("disk", name, *named)
            if (self._save, self._call) == self._die_at:
                if name == "write":
                    function(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self._random.uniform(0, self._slowness))
            result = function(*arguments, **options)
            if name in ("rename", "replace"):
                report("done", name, *named)
            return result

        return call


def _live(live: Callable[[dict[str, Any], Callable[..., None]], None], life: dict[str, Any]) -> None:
    status = 1
    try:
        disk = SlowDisk(life["seed"], life["slowness"], life["die_at"])
        disk.install(threads=tuple(life["threads"]))
        live(life, report)
        status = 0
    except BaseException:  # noqa: BLE001 -- a child that returned would be a second template
        report("failed", json.dumps(traceback.format_exc()))
    finally:
        os._exit(status)


def main(module: str) -> None:
    live = importlib.import_module(module).live
    report("ready")
    while line := sys.stdin.readline():
        alive, held = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(alive)
            report("pid", os.getpid())
            _live(live, json.loads(line))
        os.close(held)
        if select.select([alive, sys.stdin], [], [])[0] == [alive]:  # else the parent has ended: so does the child
            report("over")
            sys.stdin.readline()
        else:
            os.kill(pid, signal.SIGKILL)
        os.close(alive)
        report("reaped", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main(sys.argv[1])

"""A server that has imported what a training needs, and forks a child for each run that is to be killed.

    python -m support.fork_child support.killable

The argument is the module whose run(options, report) a child calls. Options are read from stdin, a line of JSON for
each child. A child starts in a tenth of a second instead of the seconds that importing torch takes.

What a child reports and what becomes of it is written to stdout, a line each: `pid 123`, its reports, `over` when it
has ended, and, after the line `reap`, `reaped` with its status. Before that its pid is not used again, so that it
can be killed without a race.
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

_write = os.write  # as it was before SlowDisk replaced it
_CALLS = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir")


def report(*words: object) -> None:
    _write(1, (" ".join(map(str, words)) + "\n").encode())  # one write, which no other cuts in two


class SlowDisk:
    """Replaces the calls to the disk by such as take longer and are reported, one of which kills the process.

    Args:
        seed: of the time that each call takes.
        slowness: how many seconds that is at most.
        die_at: at which save of this process, and at which of its calls, to kill it. A write writes half before.
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


def _run_child(run: Callable[[dict[str, Any], Callable[..., None]], None], options: dict[str, Any]) -> None:
    status = 1
    try:
        disk = SlowDisk(options["seed"], options["slowness"], options["die_at"])
        disk.install(threads=tuple(options["threads"]))
        run(options, report)
        status = 0
    except BaseException:  # noqa: BLE001 -- a child that returned would go on as a second server
        report("failed", json.dumps(traceback.format_exc()))
    finally:
        os._exit(status)


def main(module: str) -> None:
    run = importlib.import_module(module).run
    report("ready")
    while line := sys.stdin.readline():
        alive, held = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(alive)
            report("pid", os.getpid())
            _run_child(run, json.loads(line))
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

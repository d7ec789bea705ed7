"""Plain data waits for what never comes. A few Ctrl-C end the process, on every event loop."""

import signal
import subprocess
import sys

CHILD = """
import sys, threading
import anyio
from aengine import Engine

def data():
    yield 0
    print("waiting", flush=True)
    threading.Event().wait()

anyio.run(Engine(lambda engine, batch: None, grace=0.3).run, data, backend=sys.argv[1])
"""


def main(backend: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, backend], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "waiting\n"
            for _ in range(4):
                child.send_signal(signal.SIGINT)
                try:
                    child.wait(0.7)
                except subprocess.TimeoutExpired:
                    continue
                return
        finally:
            child.kill()
    raise AssertionError("four Ctrl-C, and it is still there")

"""A plain subscriber hangs: run() raises HandlerTimeout after its grace, and then the process ends."""

import subprocess
import sys

CHILD = """
import sys, time
import anyio
from aengine import Engine, Events

engine = Engine(lambda engine, batch: None, grace=0.2)
engine.subscribe(Events.ITERATION_COMPLETED, lambda event: time.sleep(1000))
try:
    anyio.run(engine.run, [1, 2, 3], backend=sys.argv[1])
except Exception as error:
    print(type(error).__name__, flush=True)
"""


def main(backend: str) -> None:
    command = [sys.executable, "-c", CHILD, backend]
    done = subprocess.run(command, timeout=20, capture_output=True, text=True, check=False)
    assert done.stdout == "HandlerTimeout\n"

"""terminate() ends a run while another thread keeps firing to a subscriber whose overflow policy is "wait"."""

import contextlib
import threading
import time

import anyio

from aengine import Engine, StopReason


async def handle(event: object) -> None: ...


async def main() -> None:
    engine = Engine(lambda engine, batch: time.sleep(0.001))
    engine.register_events("tick")
    engine.subscribe("tick", handle)
    over = threading.Event()

    def fire() -> None:
        while not over.is_set():
            with contextlib.suppress(RuntimeError):  # the run has not begun, or is over
                engine.fire_event("tick")

    thread = threading.Thread(target=fire)
    thread.start()
    threading.Timer(0.2, engine.terminate).start()
    try:
        with anyio.fail_after(10):
            await engine.run(iter(int, 1))
    finally:
        over.set()
        thread.join()
    assert engine.state.stop_reason is StopReason.TERMINATED

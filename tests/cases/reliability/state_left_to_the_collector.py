"""A dropped engine is freed at once, and its state with the last output, without the cyclic collector."""

import gc
import weakref

import anyio

from aengine import Engine


class Big: ...


async def main() -> None:
    gc.collect()
    gc.disable()
    try:
        engine = Engine(lambda engine, batch: Big())
        await engine.run([1, 2, 3])
        output, itself = weakref.ref(engine.state.output), weakref.ref(engine)
        del engine
        await anyio.sleep(0.01)
        assert itself() is None
        assert output() is None
    finally:
        gc.enable()

"""stop_on_signals beside a server that handles the same signals: both hear of them, runs and streams end first."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint, current_token
from support.backends import Backend

from aengine import Engine, Events, StopReason, stop_on_signals

pytestmark = pytest.mark.every_event_loop

AnyEngine: TypeAlias = Engine[Any, Any]


async def step(engine: AnyEngine, batch: int) -> int:
    await checkpoint()
    return batch


def endless() -> Iterator[int]:
    while True:
        yield 1


class Server:
    """Handles SIGTERM and SIGINT, by the one or the other way, and is over when it has heard and its streams are."""

    def __init__(self, engine: AnyEngine, order: list[str]) -> None:
        self.engine = engine
        self.order = order
        self.heard = anyio.Event()
        self.readers = 0

    def hear(self, *_: object) -> None:
        self.order.append("server heard")
        if not self.heard.is_set():
            current_token()  # it is called on the event loop's thread
            self.heard.set()

    @contextmanager
    def by_signal_signal(self) -> Iterator[None]:
        """As uvicorn does it: the handlers that it found come back, and get the signals that it heard."""
        caught: list[int] = []
        token: Any = current_token().native_token
        post = getattr(token, "call_soon_threadsafe", None) or token.run_sync_soon

        def handle(number: int, _: object) -> None:
            caught.append(number)
            post(self.hear)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        for caught_number in caught:
            if before[signal.Signals(caught_number)].__class__.__name__ == "method":  # ours, and not what ends the tests
                signal.raise_signal(caught_number)

    @contextmanager
    def by_event_loop(self) -> Iterator[None]:
        """As hypercorn does it."""
        loop: Any = current_token().native_token
        if not hasattr(loop, "add_signal_handler"):
            pytest.skip("asyncio's own")
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.hear)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    async def stream(self, *, task_status: Any) -> None:
        self.readers += 1
        async with self.engine.stream(Events.ITERATION_COMPLETED) as events:
            task_status.started()
            async for _ in events:
                pass
        self.order.append("stream ended")
        self.readers -= 1

    async def serve(self) -> None:
        await self.heard.wait()
        while self.readers:
            await checkpoint()
        self.order.append("server ended")


@pytest.mark.parametrize("way", [Server.by_signal_signal, Server.by_event_loop])
@pytest.mark.parametrize("server_is", ["outside", "inside"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_both_hear_of_it_and_runs_and_streams_end_first(
    way: Callable[[Server], AbstractContextManager[None]],
    server_is: str,
    number: signal.Signals,
    anyio_backend: Backend,
) -> None:
    order: list[str] = []
    before = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    engine = Engine(step)
    server = Server(engine, order)
    outside = way(server) if server_is == "outside" else nullcontext()
    inside = way(server) if server_is == "inside" else nullcontext()

    async def run() -> None:
        await engine.run(endless)
        order.append("run ended")

    with anyio.fail_after(10), outside, stop_on_signals(engine) as stop, inside:
        async with anyio.create_task_group() as group:
            await group.start(server.stream)
            group.start_soon(run)
            group.start_soon(server.serve)
            while engine.state.iteration < 3:
                await checkpoint()
            await anyio.sleep(0.25)  # one look at what handles the signals
            os.kill(os.getpid(), number)
    assert engine.state.stop_reason is StopReason.TERMINATED
    assert stop.received == [number]
    assert order.count("server heard") == 1
    assert order[-1] == "server ended"
    if not (anyio_backend[1].get("use_uvloop") and way is Server.by_event_loop):  # which is called at once
        assert order.index("server heard") > max(order.index("run ended"), order.index("stream ended"))
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == before


async def test_where_no_engine_runs_the_server_hears_at_once_and_a_run_that_begins_later_ends() -> None:
    order: list[str] = []
    engine = Engine(step)
    server = Server(engine, order)
    with anyio.fail_after(10), server.by_signal_signal(), stop_on_signals(engine):
        async with anyio.create_task_group() as group:
            group.start_soon(server.serve)
            os.kill(os.getpid(), signal.SIGTERM)
            await server.heard.wait()
            await engine.run(endless)
    assert engine.state.stop_reason is StopReason.TERMINATED
    assert order == ["server heard", "server ended"]


async def test_blocks_in_blocks_end_from_the_inside() -> None:
    order: list[str] = []
    inner, outer = Engine(step), Engine(step)

    async def run_outer() -> None:
        await outer.run(endless)
        order.append("outer")

    with anyio.fail_after(10), stop_on_signals(outer):
        async with anyio.create_task_group() as group:
            group.start_soon(run_outer)
            with stop_on_signals(inner):
                inner.add_event_handler(Events.ITERATION_COMPLETED(once=9), os.kill, os.getpid(), signal.SIGTERM)
                await inner.run(endless)
                order.append("inner")
    assert order == ["inner", "outer"]


UVICORN = """
import asyncio, contextlib, http.client, json, os, signal, sys, threading
from itertools import count

import uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from aengine import Engine, Events, stop_on_signals

loop, where, number, port = json.loads(sys.argv[1])
trainer = Engine(lambda engine, batch: asyncio.sleep(0.01), thread=False)
tasks = []


async def train():
    with stop_on_signals(trainer) if where == "task" else contextlib.nullcontext():
        await trainer.run(count())
    print("trained until", trainer.state.stop_reason, flush=True)


async def events(request):
    async def lines():
        async with trainer.stream(Events.ITERATION_COMPLETED) as stream:
            async for event in stream:
                yield f"{event.iteration}\\n"
        print("stream ended", flush=True)

    return StreamingResponse(lines())


@contextlib.asynccontextmanager
async def lifespan(app):
    with stop_on_signals(trainer) if where == "lifespan" else contextlib.nullcontext():
        tasks.append(asyncio.create_task(train()))
        yield
        await tasks[0]
        print("server is down", flush=True)


def client(server):
    while not server.started or trainer.state.iteration < 3:
        threading.Event().wait(0.01)
    connection = http.client.HTTPConnection("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])
    connection.request("GET", "/")
    response = connection.getresponse()
    response.readline()
    threading.Event().wait(0.3)
    os.kill(os.getpid(), number)
    response.read()


app = Starlette(lifespan=lifespan, routes=[Route("/", events)])
server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", loop=loop))
threading.Thread(target=client, args=(server,), daemon=True).start()


async def main():
    with stop_on_signals(trainer) as stop:
        await server.serve()
    print("after the block", stop.received == [number], flush=True)


if where == "around":
    asyncio.run(main(), **({"loop_factory": server.config.get_loop_factory()} if sys.version_info >= (3, 12) else {}))
else:
    signal.signal(number, lambda *_: print("raised again", flush=True))
    server.run()
"""


@pytest.mark.parametrize("where", ["task", "lifespan", "around"])
def test_beside_uvicorn_with_an_open_stream(where: str, anyio_backend: Backend) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    if anyio_backend[0] == "trio":
        pytest.skip("uvicorn runs on asyncio")
    loop = "uvloop" if anyio_backend[1].get("use_uvloop") else "asyncio"
    done = subprocess.run(
        [sys.executable, "-c", UVICORN, json.dumps([loop, where, signal.SIGTERM, 0])],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    lines = done.stdout.splitlines()
    assert set(lines[:2]) == {"trained until terminated", "stream ended"}, done
    assert lines[2:] == ["server is down", "after the block True" if where == "around" else "raised again"], done
    assert done.returncode == 0, done

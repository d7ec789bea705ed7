"""`anyio.from_thread` in plain code of the user: it leads from every thread of ours to the event loop of the run."""

import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar, copy_context
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint
from sniffio import current_async_library_cvar

from aengine import Engine, Event, Events, StopReason
from aengine.threads.dedicated import DedicatedThread

pytestmark = pytest.mark.every_event_loop

AnyEngine = Engine[Any, Any]

variable: ContextVar[str] = ContextVar("variable", default="none")


async def where(name: str) -> tuple[str, int, str]:
    await checkpoint()
    return name, threading.get_ident(), variable.get()


def ask(*_: Any) -> list[tuple[str, int, str]]:
    """Ask on the event loop's thread, by a coroutine and by a plain function."""
    assert threading.current_thread() is not threading.main_thread()
    thread = anyio.from_thread.run_sync(threading.get_ident)
    return [anyio.from_thread.run(where, "awaited"), ("called", thread, variable.get())]


async def in_step(heard: list[Any]) -> None:
    await Engine(lambda *_: heard.extend(ask())).run([1])


async def in_inline_handler(heard: list[Any]) -> None:
    engine: AnyEngine = Engine(lambda *_: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: heard.extend(ask()))
    await engine.run([1])


async def in_subscriber(heard: list[Any]) -> None:
    engine: AnyEngine = Engine(lambda *_: None)

    @engine.subscribe(Events.ITERATION_COMPLETED)
    def hear(event: Event) -> None:
        heard.extend(ask())

    await engine.run([1])


async def in_snapshot(heard: list[Any]) -> None:
    engine: AnyEngine = Engine(lambda *_: None)
    engine.subscribe(Events.ITERATION_COMPLETED, lambda event: heard.extend(event.snapshot), snapshot=ask)
    await engine.run([1])


async def in_data(heard: list[Any], prefetch: int = 0) -> None:
    def data() -> Iterator[int]:
        heard.extend(ask())
        yield 1

    await Engine(lambda *_: None).run(data, prefetch=prefetch)


async def in_data_pulled_ahead(heard: list[Any]) -> None:
    await in_data(heard, prefetch=2)


async def in_data_pulled_ahead_of_an_async_step(heard: list[Any]) -> None:
    async def step(engine: AnyEngine, batch: int) -> None:
        pass

    def data() -> Iterator[int]:
        heard.extend(ask())
        yield 1

    await Engine(step).run(data, prefetch=2)


async def in_run_on_the_thread_of_another(heard: list[Any]) -> None:
    outer: AnyEngine = Engine(lambda *_: heard.extend(ask()))
    inner: AnyEngine = Engine(lambda *_: heard.extend(ask()))

    @outer.on(Events.ITERATION_COMPLETED)
    async def evaluate() -> None:
        await inner.run([1])

    await outer.run([1, 2])


async def in_run_sync_of_a_plain_handler(heard: list[Any]) -> None:
    outer: AnyEngine = Engine(lambda *_: None)
    inner: AnyEngine = Engine(lambda *_: heard.extend(ask()))
    outer.add_event_handler(Events.ITERATION_COMPLETED, lambda: inner.run_sync([1]))
    await outer.run([1])


async def in_dedicated_thread(heard: list[Any]) -> None:
    thread = DedicatedThread("aengine sink")
    try:
        await thread.call(lambda: heard.extend(ask()))
    finally:
        thread.stop()


@pytest.mark.parametrize(
    "place",
    [
        in_step,
        in_inline_handler,
        in_subscriber,
        in_snapshot,
        in_data,
        in_data_pulled_ahead,
        in_data_pulled_ahead_of_an_async_step,
        in_run_on_the_thread_of_another,
        in_run_sync_of_a_plain_handler,
        in_dedicated_thread,
    ],
)
async def test_it_leads_to_the_event_loop_of_the_run(place: Callable[[list[Any]], Any]) -> None:
    heard: list[Any] = []
    variable.set("mine")
    await place(heard)
    expected = [("awaited", threading.get_ident(), "mine"), ("called", threading.get_ident(), "mine")]
    assert heard == expected * (len(heard) // 2 or 1)


async def test_what_is_called_runs_in_the_context_of_the_step() -> None:
    async def change() -> str:
        variable.set("theirs")
        return "changed"

    def step(*_: Any) -> list[str]:
        variable.set("step")
        return [*anyio.from_thread.run(where, "")[2:], anyio.from_thread.run(change), variable.get()]

    assert (await Engine(step).run([1])).output == ["step", "changed", "theirs"]


async def test_what_it_raises_is_raised_in_the_step() -> None:
    async def fail() -> None:
        raise LookupError("remote")

    def fail_plainly() -> None:
        raise LookupError("here")

    caught: list[str] = []

    def step(*_: Any) -> None:
        with pytest.raises(LookupError) as raised:
            anyio.from_thread.run(fail)
        caught.append(str(raised.value))
        with pytest.raises(LookupError) as raised:
            anyio.from_thread.run_sync(fail_plainly)
        caught.append(str(raised.value))
        anyio.from_thread.run(fail)

    engine: AnyEngine = Engine(step)
    with pytest.raises(LookupError, match="remote"):
        await engine.run([1])
    assert caught == ["remote", "here"]


async def test_a_cancelled_run_cancels_what_its_step_waits_for() -> None:
    entered = anyio.Event()
    fired: list[AnyEngine] = []

    async def wait() -> None:
        entered.set()
        await anyio.sleep_forever()

    engine: AnyEngine = Engine(lambda *_: anyio.from_thread.run(wait))
    engine.add_event_handler(Events.CANCELLED, fired.append)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.run, range(9))
        await entered.wait()
        group.cancel_scope.cancel()
    assert fired == [engine]
    assert engine.state.stop_reason is StopReason.CANCELLED
    assert engine.state_dict()["iteration"] == 0


async def test_a_step_that_computes_for_long_can_look_whether_its_run_is_cancelled() -> None:
    began, looked = threading.Event(), []
    engine: AnyEngine

    def step(*_: Any) -> None:
        anyio.from_thread.check_cancelled()
        looked.append("not yet")
        began.set()
        while True:
            anyio.from_thread.check_cancelled()

    engine = Engine(step)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.run, range(9))
        await anyio.to_thread.run_sync(began.wait)
        group.cancel_scope.cancel()
    assert looked == ["not yet"]
    assert engine.state.stop_reason is StopReason.CANCELLED
    assert engine.state_dict()["iteration"] == 0


async def test_on_a_thread_of_the_users_it_is_an_error_as_ever() -> None:
    errors: list[BaseException] = []

    def ask_here() -> None:
        try:
            anyio.from_thread.run(where, "")
        except RuntimeError as error:
            errors.append(error)

    def step(*_: Any) -> None:
        ask_here()
        thread = threading.Thread(target=ask_here)
        thread.start()
        thread.join()

    await Engine(step).run([1])
    assert [type(error) for error in errors] == [anyio.NoEventLoopError]


async def test_an_event_loop_that_a_step_opens_has_its_own(anyio_backend: Any) -> None:
    """As in a thread of anyio's."""
    name, options = anyio_backend
    threads: list[int] = []

    async def main() -> None:
        await anyio.to_thread.run_sync(lambda: threads.append(anyio.from_thread.run(where, "")[1]))
        await Engine(lambda *_: threads.append(anyio.from_thread.run(where, "")[1])).run([1])

    def step(*_: Any) -> int:
        anyio.run(main, backend=name, backend_options=options)
        threads.append(anyio.from_thread.run(where, "")[1])
        return threading.get_ident()

    worker = (await Engine(step).run([1])).output
    assert threads == [worker, worker, threading.get_ident()]


def test_thread_is_given_work_where_an_event_loop_is_being_closed() -> None:
    """There the garbage collector may free an engine; sniffio still names a library, and no event loop runs."""
    heard: list[int] = []

    def free() -> None:
        current_async_library_cvar.set("asyncio")
        thread = DedicatedThread("test")
        thread.submit(heard.append, 1).result()
        thread.stop()

    copy_context().run(free)
    assert heard == [1]

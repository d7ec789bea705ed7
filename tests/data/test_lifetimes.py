"""Data that is closed, that fails, that hangs, and that lives in a task of the run."""

import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from typing import Any, TypeAlias

import anyio
import anyio.abc
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from aengine import DataExhausted, Engine, Events, HandlerTimeout, StopReason

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])
prefetches = pytest.mark.parametrize("prefetch", [0, 1, 4])


def step(engine: Engine[Any, Any], batch: Any) -> Any:
    return batch


class Opened:
    """Counts the generators that are open."""

    def __init__(self) -> None:
        self.opened = self.closed = 0

    def generate(self) -> Iterator[int]:
        self.opened += 1
        try:
            yield from range(10)
        finally:
            self.closed += 1

    async def generate_async(self) -> AsyncIterator[int]:
        self.opened += 1
        try:
            for batch in range(10):
                yield batch
                await checkpoint()
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()  # closing may have to wait
            self.closed += 1


kinds = pytest.mark.parametrize("kind", ["generate", "generate_async"], ids=["sync", "async"])


async def complete(engine: Engine[Any, Any], data: Any, prefetch: int) -> None:
    await engine.run(data, max_epochs=2, prefetch=prefetch)


async def reach_max_iters(engine: Engine[Any, Any], data: Any, prefetch: int) -> None:
    await engine.run(data, max_iters=13, prefetch=prefetch)


async def terminate(engine: Engine[Any, Any], data: Any, prefetch: int) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.terminate)
    await engine.run(data, prefetch=prefetch)


async def terminate_epoch(engine: Engine[Any, Any], data: Any, prefetch: int) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.terminate_epoch)
    await engine.run(data, max_epochs=2, epoch_length=10, prefetch=prefetch)


async def fail(engine: Engine[Any, Any], data: Any, prefetch: int) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await engine.run(data, prefetch=prefetch)


async def fail_beside(engine: Engine[Any, Any], data: Any, prefetch: int) -> None:
    engine.subscribe(Events.ITERATION_COMPLETED(once=3), lambda event: 1 / 0)
    engine.add_event_handler(Events.ITERATION_COMPLETED, checkpoint)
    with pytest.raises(ZeroDivisionError):
        await engine.run(data, max_epochs=10**6, prefetch=prefetch)


async def cancel(engine: Engine[Any, Any], data: Any, prefetch: int) -> None:
    with anyio.CancelScope() as scope:

        async def cancel_here() -> None:
            scope.cancel()
            await checkpoint()

        engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), cancel_here)
        await engine.run(data, prefetch=prefetch)
    assert scope.cancelled_caught


async def change_data(engine: Engine[Any, Any], data: Any, prefetch: int) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.set_data, range(10))
    await engine.run(data, prefetch=prefetch, epoch_length=10)


async def interrupt_and_go_on(engine: Engine[Any, Any], data: Any, prefetch: int) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.interrupt)
    await engine.run(data, prefetch=prefetch)
    await engine.run()


WAYS_OUT = [
    complete,
    reach_max_iters,
    terminate,
    terminate_epoch,
    fail,
    fail_beside,
    cancel,
    change_data,
    interrupt_and_go_on,
]


@pytest.mark.covering(3)
@both_threads
@kinds
@prefetches
@pytest.mark.parametrize("way", WAYS_OUT)
async def test_what_the_engine_opened_it_closes_on_every_way_out(
    thread: Thread, kind: str, prefetch: int, way: Callable[..., Any]
) -> None:
    data = Opened()
    await way(Engine(step, thread=thread), getattr(data, kind), prefetch)
    assert data.opened > 0
    assert data.closed == data.opened


@both_threads
@prefetches
async def test_an_interrupted_engine_that_is_dropped_closes_its_data(thread: Thread, prefetch: int) -> None:
    data = Opened()
    engine = Engine(step, thread=thread)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.interrupt)
    await engine.run(data.generate, prefetch=prefetch)
    assert (data.opened, data.closed) == (1, 0)
    del engine
    gc.collect()
    assert (data.opened, data.closed) == (1, 1)


@pytest.mark.covering(2)
@both_threads
@kinds
@prefetches
@pytest.mark.parametrize("way", [reach_max_iters, terminate, fail, interrupt_and_go_on])
async def test_what_the_user_passed_stays_open(
    thread: Thread, kind: str, prefetch: int, way: Callable[..., Any]
) -> None:
    data = Opened()
    passed = getattr(data, kind)()

    async def run(engine: Engine[Any, Any]) -> None:
        if way is reach_max_iters:
            await engine.run(passed, max_iters=3, epoch_length=10, prefetch=prefetch)
        elif way is interrupt_and_go_on:
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.interrupt)
            await engine.run(passed, prefetch=prefetch)
        else:
            await way(engine, passed, prefetch)

    await run(Engine(step, thread=thread))
    assert (data.opened, data.closed) == (1, 0)
    if kind == "generate":
        passed.close()
    else:
        assert await anext(passed) in range(3, 9)
        await passed.aclose()


# Errors


@both_threads
@prefetches
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_an_error_of_the_data_names_the_data_and_the_batch(thread: Thread, prefetch: int, is_async: Any) -> None:
    error = OSError("the disk is gone")
    seen: list[int] = []

    def batches() -> Iterator[int]:
        yield 0
        yield 1
        raise error

    async def async_batches() -> AsyncIterator[int]:
        for batch in batches():
            yield batch

    def noting(engine: Engine[Any, None], batch: int) -> None:
        seen.append(batch)

    engine = Engine(noting, thread=thread, name="trainer")
    with pytest.raises(OSError, match="the disk is gone") as caught:
        await engine.run(async_batches if is_async else batches, prefetch=prefetch)
    assert caught.value is error
    assert seen == [0, 1]
    notes = "\n".join(error.__notes__)
    for part in ("in the data", "batches", "fetching batch 3", "'trainer'", "epoch 1"):
        assert part in notes
    assert engine.state.iteration == 2
    assert engine.state.stop_reason is StopReason.FAILED


@both_threads
@prefetches
async def test_an_error_in_opening_the_data_is_one_of_the_data(thread: Thread, prefetch: int) -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise OSError("no such file")

    def factory() -> Any:
        raise OSError("no such file")

    for data in (Broken(), factory):
        with pytest.raises(OSError, match="no such file") as caught:
            await Engine(step, thread=thread).run(data, prefetch=prefetch)
        assert "in the data" in caught.value.__notes__[0]


async def test_a_callable_that_makes_no_data_says_what_it_returned() -> None:
    with pytest.raises(TypeError, match=r"data\(\) returned 3, .*return or yield batches"):
        await Engine(step).run(lambda: 3)  # type: ignore[arg-type, return-value]  # that is what is tested


async def test_what_cannot_be_data_is_refused_before_anything_is_fired() -> None:
    engine = Engine(step)
    fired: list[str] = []
    engine.add_event_handler(Events.STARTED, fired.append, "started")

    async def coroutine_function() -> None: ...

    def with_arguments(path: str) -> Any: ...

    cases: list[tuple[Any, str]] = [
        (3, "data must be an iterable"),
        (coroutine_function, "make it an async generator"),
        (with_arguments, "wrap it, as in lambda"),
    ]
    for data, message in cases:
        with pytest.raises(TypeError, match=message):
            await engine.run(data)
    assert not fired


@both_threads
@prefetches
async def test_an_error_in_closing_the_data_is_raised(thread: Thread, prefetch: int) -> None:
    def batches() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            raise OSError("could not close")

    with pytest.raises(OSError, match="could not close") as caught:
        await Engine(step, thread=thread).run(batches, max_iters=3, epoch_length=10, prefetch=prefetch)
    assert "closing the data" in caught.value.__notes__[0]


# Errors once a termination is requested


async def as_async(batches: Iterator[int]) -> AsyncIterator[int]:
    for batch in batches:
        await checkpoint()
        yield batch


@both_threads
@prefetches
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("epochs", [1, 2])
async def test_an_error_of_the_data_does_not_replace_the_clean_end_that_was_requested(
    thread: Thread, prefetch: int, is_async: Any, epochs: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A signal to the process group ends a loader's workers as this process is to save its run."""
    engine = Engine(step, thread=thread)
    error = OSError("the worker was killed")

    def batches() -> Iterator[int]:
        yield from range(3)
        if epochs == 2:
            yield 3
            engine.terminate()
            raise error
        while engine.state.iteration < 3:  # not ahead of the steps, which would end the run first
            yield 3
        engine.terminate()
        raise error

    names: list[str] = []
    for event in (Events.TERMINATE, Events.COMPLETED, Events.EXCEPTION_RAISED):
        engine.add_event_handler(event, lambda *_, name: names.append(name), name=event.name)
    data = (lambda: as_async(batches())) if is_async else batches
    await engine.run(data, max_epochs=2, epoch_length=10**6, prefetch=prefetch)
    assert names == ["TERMINATE", "COMPLETED"]
    assert engine.state.stop_reason is StopReason.TERMINATED
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [error]


@both_threads
@prefetches
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_an_error_in_closing_the_data_does_not_replace_the_clean_end_that_was_requested(
    thread: Thread, prefetch: int, is_async: Any, caplog: pytest.LogCaptureFixture
) -> None:
    error = OSError("could not close")

    def batches() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            raise error

    async def async_batches() -> AsyncIterator[int]:
        try:
            for batch in range(10):
                yield batch
        finally:
            raise error

    engine = Engine(step, thread=thread)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.terminate)
    await engine.run(async_batches if is_async else batches, prefetch=prefetch)
    assert engine.state.stop_reason is StopReason.TERMINATED
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [error]


@both_threads
@prefetches
@pytest.mark.parametrize("where", ["task", "exit"])
async def test_an_error_of_a_source_does_not_replace_the_clean_end_that_was_requested(
    thread: Thread, prefetch: int, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Lost(Broker):
        async def __aexit__(self, *error: object) -> None:
            await super().__aexit__(*error)
            if where == "exit":
                raise self.error

    engine, broker = Engine(step, thread=thread), Lost(10**6)

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    async def terminate() -> None:
        engine.terminate()
        if where == "task":
            broker.fail.set()
            await anyio.wait_all_tasks_blocked()

    with anyio.fail_after(60):
        await engine.run(broker, prefetch=prefetch)
    assert engine.state.stop_reason is StopReason.TERMINATED
    assert engine.state.iteration == 3
    assert broker.error in [record.exc_info[1] for record in caplog.records if record.exc_info]


# Data that hangs


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does, until nothing here has anything to do either."""
    while not condition():
        await checkpoint()
    await anyio.wait_all_tasks_blocked()


class Hanging:
    """Gives two batches, and then nothing more until it is let go."""

    def __init__(self) -> None:
        self.hangs = anyio.Event()
        self.was_cancelled = False

    async def __aiter__(self) -> AsyncIterator[int]:
        yield 0
        yield 1
        self.hangs.set()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            self.was_cancelled = True
            raise


@both_threads
@prefetches
async def test_waiting_for_data_that_hangs_can_be_cancelled(thread: Thread, prefetch: int) -> None:
    engine, data = Engine(step, thread=thread), Hanging()
    async with anyio.create_task_group() as group:

        async def cancel() -> None:
            await data.hangs.wait()
            await until(lambda: engine.state.iteration == 2)
            group.cancel_scope.cancel()

        group.start_soon(cancel)
        await engine.run(data, prefetch=prefetch)
    assert data.was_cancelled
    assert engine.state.stop_reason is StopReason.CANCELLED
    assert engine.state.iteration == 2


@both_threads
@prefetches
async def test_terminate_ends_the_wait_for_data_that_hangs(thread: Thread, prefetch: int) -> None:
    engine, data = Engine(step, thread=thread), Hanging()
    names: list[str] = []
    for event in (Events.TERMINATE, Events.COMPLETED, Events.EXCEPTION_RAISED, Events.CANCELLED):
        engine.add_event_handler(event, names.append, event.name)

    async def terminate() -> None:
        await data.hangs.wait()
        await until(lambda: engine.state.iteration == 2)
        engine.terminate()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(terminate)
            await engine.run(data, prefetch=prefetch)
    assert data.was_cancelled
    assert names == ["TERMINATE", "COMPLETED"]
    assert engine.state.stop_reason is StopReason.TERMINATED
    assert engine.state.iteration == 2


@both_threads
@prefetches
async def test_terminate_from_a_thread_ends_the_wait_too(thread: Thread, prefetch: int) -> None:
    engine, data = Engine(step, thread=thread), Hanging()

    async def terminate() -> None:
        await data.hangs.wait()
        await until(lambda: engine.state.iteration == 2)
        await anyio.to_thread.run_sync(engine.terminate)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(terminate)
            await engine.run(data, prefetch=prefetch)
    assert engine.state.stop_reason is StopReason.TERMINATED


@both_threads
async def test_interrupt_while_the_data_hangs_takes_effect_when_the_batch_has_come(
    thread: Thread,
) -> None:
    engine = Engine(step, thread=thread)
    gate = anyio.Event()

    async def batches() -> AsyncIterator[int]:
        yield 0
        engine.interrupt()
        group.start_soon(open_gate)
        await gate.wait()
        yield 1
        yield 2

    async def open_gate() -> None:
        await anyio.wait_all_tasks_blocked()
        gate.set()

    async with anyio.create_task_group() as group:
        await engine.run(batches, epoch_length=3)
        assert engine.state.stop_reason is StopReason.INTERRUPTED
        await engine.run()
    assert engine.state.iteration == 3


@both_threads
async def test_plain_data_that_hangs_in_its_thread_does_not_keep_a_termination(
    thread: Thread,
) -> None:
    """The wait ends at once; the end of the run waits for the fetch, as long as grace allows."""
    gate, hangs = threading.Event(), threading.Event()
    engine = Engine(step, thread=thread)

    def batches() -> Iterator[int]:
        yield 0
        hangs.set()
        gate.wait()
        yield 1

    async def terminate() -> None:
        await anyio.to_thread.run_sync(hangs.wait)
        await until(lambda: engine.state.iteration == 1)
        engine.terminate()

    engine.add_event_handler(Events.COMPLETED, gate.set)
    async with anyio.create_task_group() as group:
        group.start_soon(terminate)
        await engine.run(batches, prefetch=1)
    assert engine.state.stop_reason is StopReason.TERMINATED
    assert engine.state.iteration == 1


async def stop(engine: Engine[Any, Any], _: anyio.CancelScope) -> None:
    engine.terminate()


async def cancel_run(_: Engine[Any, Any], scope: anyio.CancelScope) -> None:
    scope.cancel()


@both_threads
@pytest.mark.parametrize("end", [stop, cancel_run])
@pytest.mark.parametrize("then", ["gives", "fails", "ends", "fails in closing"])
async def test_plain_data_that_hangs_for_ever_is_abandoned_and_closed_when_it_comes_out(
    thread: Thread, end: Callable[..., Any], then: str, caplog: pytest.LogCaptureFixture
) -> None:
    gate, hangs, closed = threading.Event(), threading.Event(), threading.Event()
    error = OSError("the disk is back")
    threads: list[int] = []

    def batches() -> Iterator[int]:
        threads.append(threading.get_ident())
        try:
            yield 0
            hangs.set()
            gate.wait()
            if then == "fails":
                raise error
            if then != "ends":
                yield 1
        finally:
            threads.append(threading.get_ident())
            closed.set()
            if then == "fails in closing":
                raise error

    engine = Engine(step, name="trainer", grace=0.05, thread=thread)
    async with anyio.create_task_group() as group:

        async def end_it() -> None:
            await anyio.to_thread.run_sync(hangs.wait)
            await end(engine, group.cancel_scope)

        group.start_soon(end_it)
        # A cancellation goes on, and the error is only logged.
        late = pytest.raises(HandlerTimeout, match="clean-up of engine 'trainer'") if end is stop else nullcontext()
        with late:
            await engine.run(batches, prefetch=1)
    assert not closed.is_set()
    pulling = [one for one in threading.enumerate() if one.name == "aengine-prefetch"]
    gate.set()
    assert closed.wait(60)
    for one in pulling:
        one.join(60)
        assert not one.is_alive()
    assert len(set(threads)) == 1
    logged = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [one for one in logged if not isinstance(one, HandlerTimeout)] == [error] * then.startswith("fails")


# Data that is an async context manager


class Broker:
    """A source with tasks of its own."""

    def __init__(self, length: int = 5) -> None:
        self.length = length
        self.log: list[str] = []
        self.fail = anyio.Event()
        self.error = OSError("the connection is lost")
        self.group: anyio.abc.TaskGroup

    async def __aenter__(self) -> None:
        self.log.append("enter")
        self.group = await anyio.create_task_group().__aenter__()
        self.group.start_soon(self.heartbeat)

    async def heartbeat(self) -> None:
        await self.fail.wait()
        raise self.error

    async def __aexit__(self, *error: object) -> None:
        self.group.cancel_scope.cancel()
        try:
            await self.group.__aexit__(*error)  # type: ignore[arg-type]  # an exit's three
        finally:
            self.log.append("exit")

    async def __aiter__(self) -> AsyncIterator[int]:
        for batch in range(self.length):
            await checkpoint()
            yield batch


class Entered:
    """A source that is entered, and then iterated as any list is."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *error: object) -> None: ...

    def __iter__(self) -> Iterator[int]:
        yield from self.batches


class Sized(Entered):
    def __len__(self) -> int:
        return len(self.batches)


class Positioned(Entered):
    """It knows where it is."""

    at = 0
    was_put_back = False

    def __iter__(self) -> Iterator[int]:
        if not self.was_put_back:
            self.at = 0
        self.was_put_back = False
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.was_put_back = state["at"], True


@pytest.mark.covering(3)
@both_threads
@prefetches
@pytest.mark.parametrize("kind", [Sized, Positioned])
@pytest.mark.parametrize("event", [Events.GET_BATCH_COMPLETED, Events.ITERATION_COMPLETED])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
async def test_a_source_with_plain_batches_that_is_interrupted_goes_on_where_it_was(
    thread: Thread, prefetch: int, kind: type[Entered], event: Events, count: int
) -> None:
    stepped: list[int] = []
    engine: Engine[int, None] = Engine(lambda engine, batch: stepped.append(batch), thread=thread)
    source = kind(1, 2, 3, 4, 5)
    engine.add_event_handler(event(once=count), engine.interrupt)
    await engine.run(source, max_epochs=2, epoch_length=5, prefetch=prefetch)
    assert engine.state.stop_reason is StopReason.INTERRUPTED
    await engine.run(source, prefetch=prefetch)
    assert stepped == [1, 2, 3, 4, 5] * 2


@pytest.mark.covering(2)
@both_threads
@prefetches
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("gives", ["itself", "another"])
@pytest.mark.parametrize("way", ["loaded", "in memory", "interrupted"])
async def test_a_source_is_put_back_before_it_is_entered(  # noqa: C901 -- a source and its kinds
    thread: Thread, prefetch: int, is_async: Any, gives: str, way: str
) -> None:
    """Entering it may begin to fetch, from where it is."""
    calls: list[str] = []
    stepped: list[int] = []

    class Fetching:
        position = 0

        async def __aenter__(self) -> Any:
            calls.append(f"entered at {self.position}")
            await checkpoint()
            batches = self.generate if is_async else self.generate_plain
            return self if gives == "itself" else batches

        async def __aexit__(self, *error: object) -> None: ...

        def generate_plain(self) -> Iterator[int]:
            while self.position < 8:
                self.position += 1
                yield self.position
            self.position = 0

        async def generate(self) -> AsyncIterator[int]:
            for batch in self.generate_plain():
                await checkpoint()
                yield batch

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            calls.append(f"put back to {state['position']}")
            self.position = state["position"]

    class FetchingAsync(Fetching):
        __aiter__ = Fetching.generate

    class FetchingPlain(Fetching):
        __iter__ = Fetching.generate_plain

    def noting(engine: Engine[int, None], batch: int) -> None:
        stepped.append(batch)

    kind = FetchingAsync if is_async else FetchingPlain
    engine, source = Engine(noting, thread=thread), kind()
    once = Events.ITERATION_COMPLETED(once=3)
    with engine.add_event_handler(once, engine.interrupt if way == "interrupted" else engine.terminate):
        await engine.run(source, max_iters=6, epoch_length=8, prefetch=prefetch)
    if way == "loaded":
        resumed = Engine(noting, thread=thread)
        resumed.load_state_dict(engine.state_dict())
        await resumed.run(kind(), prefetch=prefetch)
    else:
        await engine.run(source, prefetch=prefetch)
    assert calls == ["entered at 0", "put back to 3", "entered at 3"]
    assert stepped == [1, 2, 3, 4, 5, 6]


@both_threads
@prefetches
async def test_a_source_with_plain_batches_that_has_none_is_refused_as_any_other(thread: Thread, prefetch: int) -> None:
    engine = Engine(step, thread=thread)
    with pytest.raises(DataExhausted, match="the data is empty"):
        await engine.run(Entered(), prefetch=prefetch)


@both_threads
@prefetches
async def test_a_source_is_entered_once_and_exited_at_the_end_of_the_run(thread: Thread, prefetch: int) -> None:
    engine, broker = Engine(step, thread=thread), Broker()
    engine.add_event_handler(Events.COMPLETED, broker.log.append, "completed")
    await engine.run(broker, max_epochs=3, prefetch=prefetch)
    assert broker.log == ["enter", "completed", "exit"]
    assert engine.state.iteration == 15


@both_threads
@prefetches
@pytest.mark.parametrize("way", [terminate, fail, cancel])
async def test_a_source_is_exited_on_every_way_out(thread: Thread, prefetch: int, way: Callable[..., Any]) -> None:
    engine, broker = Engine(step, thread=thread), Broker()
    await way(engine, broker, prefetch)
    assert broker.log == ["enter", "exit"]


@both_threads
@prefetches
async def test_an_interrupted_run_exits_its_source_and_the_next_enters_it_again(thread: Thread, prefetch: int) -> None:
    engine, broker = Engine(step, thread=thread), Broker()
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    await engine.run(broker, epoch_length=5, prefetch=prefetch)
    assert broker.log == ["enter", "exit"]
    await engine.run(prefetch=prefetch)
    assert broker.log == ["enter", "exit"] * 2
    assert engine.state.iteration == 5


@both_threads
@prefetches
async def test_a_task_of_the_source_that_fails_while_the_loop_waits_for_data_fails_the_run(
    thread: Thread, prefetch: int
) -> None:
    class Silent(Broker):
        async def __aiter__(self) -> AsyncIterator[int]:
            yield 0
            self.fail.set()
            await anyio.sleep_forever()

    engine, broker = Engine(step, thread=thread), Silent()
    reported: list[BaseException] = []

    @engine.on(Events.EXCEPTION_RAISED)
    def report(engine: Engine[Any, Any], error: BaseException) -> None:
        reported.append(error)

    with anyio.fail_after(60), pytest.raises(OSError, match="connection") as caught:
        await engine.run(broker, prefetch=prefetch)
    assert caught.value is broker.error
    assert reported == [broker.error]
    assert any("Silent" in note for note in broker.error.__notes__)
    assert broker.log == ["enter", "exit"]


@both_threads
async def test_a_task_of_the_source_that_fails_while_the_loop_steps_fails_the_run(
    thread: Thread,
) -> None:
    engine, broker = Engine(step, thread=thread), Broker(10**9)

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    async def lose_connection() -> None:
        broker.fail.set()

    with anyio.fail_after(60), pytest.raises(OSError, match="connection") as caught:
        await engine.run(broker)
    assert caught.value is broker.error
    assert broker.log == ["enter", "exit"]


@both_threads
@prefetches
@pytest.mark.parametrize("then", [Broker, list], ids=["source", "plain"])
async def test_a_source_in_whose_place_other_data_is_put_is_exited(
    thread: Thread, prefetch: int, then: Callable[[], Any]
) -> None:
    engine, first, second = Engine(step, thread=thread), Broker(), then() or [7, 8]
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.set_data, second)
    with anyio.fail_after(60):
        await engine.run(first, epoch_length=4, prefetch=prefetch)
    assert first.log == ["enter", "exit"]
    if isinstance(second, Broker):
        assert second.log == ["enter", "exit"]
    assert engine.state.iteration == 4


async def test_a_source_that_cannot_be_entered_fails_the_run_with_its_very_error() -> None:
    class Refused(Broker):
        async def __aenter__(self) -> None:
            await checkpoint()
            raise self.error

    broker = Refused()
    with pytest.raises(OSError, match="connection") as caught:
        await Engine(step).run(broker)
    assert caught.value is broker.error
    assert "in the data" in broker.error.__notes__[0]
    assert broker.log == []


async def test_a_source_whose_exit_fails_fails_the_run_with_its_very_error() -> None:
    class Stuck(Broker):
        async def __aexit__(self, *error: object) -> None:
            await super().__aexit__(*error)
            raise self.error

    engine, broker = Engine(step), Stuck()
    with pytest.raises(OSError, match="connection") as caught:
        await engine.run(broker)
    assert caught.value is broker.error
    assert engine.state.iteration == 5


async def test_a_source_is_entered_and_exited_in_one_task() -> None:
    """As cancel scopes and task groups must be."""

    class Scoped(Broker):
        async def __aenter__(self) -> None:
            self.task = anyio.get_current_task()
            await super().__aenter__()

        async def __aexit__(self, *error: object) -> None:
            assert anyio.get_current_task() == self.task
            await super().__aexit__(*error)

    engine, broker = Engine(step), Scoped()
    await engine.run(broker, prefetch=2)
    assert broker.log == ["enter", "exit"]


async def test_a_source_that_hangs_in_its_exit_is_cancelled_when_its_grace_is_over() -> None:
    class Hangs(Broker):
        async def __aexit__(self, *error: object) -> None:
            try:
                await anyio.sleep_forever()
            finally:
                await super().__aexit__(*error)

    engine, broker = Engine(step, grace=0.05), Hangs()
    with anyio.fail_after(60), pytest.raises(HandlerTimeout, match="grace"):
        await engine.run(broker)
    assert broker.log == ["enter", "exit"]


async def test_entering_a_source_can_be_cancelled() -> None:
    class Slow(Broker):
        async def __aenter__(self) -> None:
            entering.set()
            await anyio.sleep_forever()

    entering = anyio.Event()
    engine, broker = Engine(step), Slow()
    async with anyio.create_task_group() as group:

        async def cancel() -> None:
            await entering.wait()
            group.cancel_scope.cancel()

        group.start_soon(cancel)
        with anyio.fail_after(60):
            await engine.run(broker)
    assert engine.state.stop_reason is StopReason.CANCELLED


@both_threads
@prefetches
async def test_an_iterator_is_released_with_the_run_and_not_with_the_collector(prefetch: int, thread: Thread) -> None:
    """That of a DataLoader ends its worker processes when it is freed."""
    iterators: list[weakref.ref[Any]] = []

    class Numbers:
        def __init__(self) -> None:
            self.numbers = iter(range(3))
            iterators.append(weakref.ref(self))

        def __iter__(self) -> "Numbers":
            return self

        def __next__(self) -> int:
            return next(self.numbers)

    gc.disable()
    try:
        engine = Engine(step, thread=thread)
        await engine.run(Numbers, max_epochs=2, prefetch=prefetch)
        for _ in range(100):  # event loops let go of what ran last a turn later
            if not any(one() for one in iterators):
                break
            await checkpoint()
        assert [one() for one in iterators] == [None, None]
    finally:
        gc.enable()

"""Background services: what lives beside the runs of an engine, from the begin of each to its end."""

import contextlib
import gc
import logging
import weakref
from collections.abc import Awaitable
from functools import partial
from typing import Any

import anyio
import pytest
from support.backends import Backend
from support.record import AnyEngine, Boom
from support.ways_to_end import is_freed

from aengine import Engine, Events, HandlerTimeout, RemovableEventHandle, Service, StopReason, StrayCancellation


class Log(Service):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.is_serving = anyio.Event()

    def run_started(self, engine: AnyEngine) -> None:
        self.calls.append("run_started")

    async def serve(self, engine: AnyEngine) -> None:
        self.calls.append("serve")
        self.is_serving.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.calls.append("cancelled")

    async def flush(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.calls.append("flush")

    async def run_ended(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
        await anyio.lowlevel.checkpoint()  # awaited, whatever became of the run
        self.calls.append(("run_ended", reason, error))

    def run_abandoned(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
        self.calls.append(("run_abandoned", reason, error))


class Failing(Log):
    """Raises in one of its methods."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__()
        self.where = where
        self.error = error

    def _fail(self, where: str) -> None:
        if where == self.where:
            raise self.error

    def run_started(self, engine: AnyEngine) -> None:
        self._fail("run_started")
        super().run_started(engine)

    async def serve(self, engine: AnyEngine) -> None:
        self._fail("serve")
        await super().serve(engine)

    async def flush(self) -> None:
        self._fail("flush")
        await super().flush()

    async def run_ended(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
        self._fail("run_ended")
        await super().run_ended(engine, reason, error)


def engine_with(service: Service, step: Any = None, **options: Any) -> AnyEngine:
    engine: AnyEngine = Engine(step or (lambda engine, batch: batch))
    engine.add_service(service, **options)
    return engine


async def wait_for(service: Log) -> None:
    await service.is_serving.wait()


@pytest.mark.parametrize("options", [{}, {"thread": False}], ids=["worker", "loop"])
async def test_is_told_of_the_run_from_before_its_first_event_to_after_its_last(options: dict[str, Any]) -> None:
    service = Log()
    engine: AnyEngine = Engine(lambda engine, batch: batch, **options)
    engine.add_service(service)
    engine.add_event_handler(Events.STARTED, lambda: service.calls.append("STARTED"))
    engine.add_event_handler(Events.STARTED, partial_wait(service))
    engine.add_event_handler(Events.COMPLETED, lambda: service.calls.append("COMPLETED"))
    await engine.run([1, 2])
    ended = ("run_ended", StopReason.COMPLETED, None)
    assert sorted(service.calls[1:3]) == ["STARTED", "serve"]  # the one in its task, the other in the loop's
    assert service.calls[:1] + service.calls[3:] == ["run_started", "COMPLETED", "flush", ended, "cancelled"]


def partial_wait(service: Log) -> Any:
    async def wait(engine: AnyEngine) -> None:
        await wait_for(service)

    return wait


async def test_gets_the_very_error_that_failed_the_run() -> None:
    boom, service = Boom(), Log()

    def step(engine: AnyEngine, batch: int) -> None:
        raise boom

    engine = engine_with(service, step)
    with pytest.raises(Boom):
        await engine.run([1])
    assert ("run_ended", StopReason.FAILED, boom) in service.calls
    assert "flush" not in service.calls


async def test_a_cancelled_run_tells_it_so_and_waits_for_it() -> None:
    service = Log()
    engine = engine_with(service)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), partial_wait(service))
    with anyio.CancelScope() as scope:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), scope_cancel(scope))
        await engine.run(range(100))
    assert scope.cancelled_caught
    assert service.calls[-2:] == [("run_ended", StopReason.CANCELLED, None), "cancelled"]


def scope_cancel(scope: anyio.CancelScope) -> Any:
    async def cancel(engine: AnyEngine) -> None:
        scope.cancel()

    return cancel


async def test_what_it_was_handed_before_a_cancellation_it_still_deals_with() -> None:
    class Writer(Service):
        def __init__(self) -> None:
            self.written: list[int] = []
            self.sent, self.received = anyio.create_memory_object_stream[int](10)

        async def serve(self, engine: AnyEngine) -> None:
            async for item in self.received:
                await anyio.lowlevel.checkpoint()
                self.written.append(item)

        async def run_ended(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
            self.sent.close()
            while self.received.statistics().current_buffer_used:
                await anyio.lowlevel.checkpoint()
            for _ in range(3):
                await anyio.lowlevel.checkpoint()

    service = Writer()
    engine = engine_with(service)
    with anyio.CancelScope() as scope:

        @engine.on(Events.ITERATION_COMPLETED)
        async def hand_over(engine: AnyEngine) -> None:
            service.sent.send_nowait(engine.state.iteration)
            if engine.state.iteration == 5:
                scope.cancel()

        await engine.run(range(100))
    assert service.written == [1, 2, 3, 4, 5]
    service.received.close()


@pytest.mark.parametrize("where", ["run_started", "serve", "flush", "run_ended"])
async def test_its_error_fails_the_run_as_the_very_object_with_a_note(where: str) -> None:
    boom = Boom()
    service = Failing(where, boom)
    engine = engine_with(service, name="mine")
    engine.add_event_handler(Events.STARTED, partial_wait(service)) if where == "flush" else None
    with pytest.raises(Boom) as caught:
        await engine.run(range(5) if where != "serve" else forever)
    assert caught.value is boom
    assert f"in {where}() of service 'mine'" in boom.__notes__[0]
    assert engine.statistics().services[0].errors == 1
    if where == "run_ended":
        assert service.calls[-2:] == [("run_abandoned", StopReason.COMPLETED, None), "cancelled"]


def forever() -> Any:
    while True:
        yield 1


@pytest.mark.parametrize("where", ["run_started", "serve", "flush", "run_ended"])
async def test_or_is_logged_and_counted(where: str, caplog: pytest.LogCaptureFixture) -> None:
    boom = Boom()
    engine = engine_with(Failing(where, boom), name="mine", on_error="log")
    with caplog.at_level(logging.ERROR, "aengine.engine"):
        await engine.run([1, 2])
    assert engine.state.stop_reason is StopReason.COMPLETED
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [boom]
    assert engine.statistics().services[0].errors == 1


@pytest.mark.parametrize("where", ["flush", "run_ended"])
async def test_one_that_hangs_at_the_end_is_abandoned_after_the_grace_and_named(where: str) -> None:
    class Hanging(Log):
        async def flush(self) -> None:
            if where == "flush":
                await anyio.sleep_forever()

        async def run_ended(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
            await anyio.sleep_forever()

    hanging, other = Hanging(), Log()
    engine: AnyEngine = Engine(lambda engine, batch: batch, grace=0.05)
    engine.add_service(hanging, name="hanging")
    engine.add_service(other)
    with pytest.raises(HandlerTimeout, match=r"services of engine .* were still busy .*: 'hanging'"):
        await engine.run([1])
    assert hanging.calls.count(("run_abandoned", engine.state.stop_reason, None)) == (where == "run_ended")
    if where == "flush":  # which fails the run: it is told so
        ((reason, error),) = [call[1:] for call in hanging.calls if type(call) is tuple]
        assert (reason, type(error)) == (StopReason.FAILED, HandlerTimeout)
    assert [call[0] for call in hanging.calls if type(call) is tuple] == ["run_abandoned"]
    assert [call[0] for call in other.calls if type(call) is tuple] == ["run_ended"]


async def test_an_interrupted_run_ends_for_it_and_begins_again() -> None:
    service = Log()
    engine = engine_with(service)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    await engine.run(range(4))
    assert ("run_ended", StopReason.INTERRUPTED, None) in service.calls
    await engine.run()
    told = [call for call in service.calls if call == "run_started" or type(call) is tuple]
    assert told == [
        "run_started",
        ("run_ended", StopReason.INTERRUPTED, None),
        "run_started",
        ("run_ended", StopReason.COMPLETED, None),
    ]


async def test_added_during_a_run_it_takes_part_from_then_on() -> None:
    service = Log()
    engine: AnyEngine = Engine(lambda engine, batch: batch)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    async def add(engine: AnyEngine) -> None:
        engine.add_service(service)
        await service.is_serving.wait()

    await engine.run(range(4))
    assert service.calls[:2] == ["run_started", "serve"]
    assert ("run_ended", StopReason.COMPLETED, None) in service.calls


async def test_removed_during_a_run_it_is_cancelled_and_told_so() -> None:
    service = Log()
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    handle = engine.add_service(service)
    cancelled = anyio.Event()

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    async def remove(engine: AnyEngine) -> None:
        await service.is_serving.wait()
        handle.remove()
        while "cancelled" not in service.calls:  # a turn of the event loop later
            await anyio.lowlevel.checkpoint()
        cancelled.set()

    await engine.run(range(4))
    assert cancelled.is_set()
    assert service.calls == ["run_started", "serve", ("run_abandoned", StopReason.CANCELLED, None), "cancelled"]
    assert engine.statistics().services == ()


async def test_flush_of_the_engine_flushes_it_and_not_from_within() -> None:
    class Flushes(Log):
        async def serve(self, engine: AnyEngine) -> None:
            with pytest.raises(RuntimeError, match="waits for every service, and so for the one that calls it"):
                await engine.flush()
            await super().serve(engine)

    service = Flushes()
    engine = engine_with(service)

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    async def flush(engine: AnyEngine) -> None:
        await service.is_serving.wait()
        await engine.flush()

    await engine.run([1, 2])
    assert service.calls.count("flush") == 2


def test_run_sync_opens_an_event_loop_for_it() -> None:
    service = Log()
    engine = engine_with(service)
    engine.run_sync([1, 2])
    assert service.calls[0] == "run_started"
    assert ("run_ended", StopReason.COMPLETED, None) in service.calls


def test_added_by_a_step_of_a_run_without_an_event_loop_it_gets_one() -> None:
    service = Log()

    def step(engine: AnyEngine, batch: int) -> None:
        if batch == 2:
            engine.add_service(service)

    engine: AnyEngine = Engine(step)
    engine.run_sync([1, 2, 3])
    assert service.calls[0] == "run_started"
    assert ("run_ended", StopReason.COMPLETED, None) in service.calls


async def test_a_run_that_is_cancelled_before_it_begins_tells_it_nothing() -> None:
    service = Log()
    engine = engine_with(service)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await engine.run([1])
    assert service.calls == []


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # anyio's own, of one cancelled before it began
def test_a_run_whose_task_is_cancelled_natively_before_its_first_step_is_abandoned() -> None:
    import asyncio  # noqa: PLC0415 -- native cancellation is its own

    service = Log()
    engine = engine_with(service)

    async def main() -> None:
        await engine.run([1])  # whose reason is not that of the next
        service.calls.clear()
        run = asyncio.ensure_future(engine.run([1]))
        while "run_started" not in service.calls:  # noqa: ASYNC110 -- a turn, and not one more
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    asyncio.run(main())
    ends = [call for call in service.calls if type(call) is tuple]
    assert len(ends) == 1
    assert ends[0][1] is StopReason.CANCELLED


def test_statistics_show_it_by_its_name_and_bad_ones_are_refused() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    service = Log()
    engine.add_service(service, name="log of losses")
    engine.add_service(Log())
    assert [one.name for one in engine.statistics().services] == ["log of losses", "Log"]
    assert not any(one.is_running for one in engine.statistics().services)
    wrong: Any = Log
    with pytest.raises(TypeError, match=r"a service derives from aengine\.Service, got"):
        engine.add_service(wrong)
    with pytest.raises(ValueError, match="on_error= "):
        engine.add_service(Log(), on_error="warn")  # type: ignore[arg-type]  # that is what is tested
    with pytest.raises(ValueError, match="has this service already"):
        engine.add_service(service)


def test_the_engine_is_freed_by_its_last_reference(anyio_backend: Backend) -> None:
    engine = engine_with(Log())
    backend, options = anyio_backend
    anyio.run(engine.run, [1, 2], backend=backend, backend_options=options)
    gone = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert gone() is None
    finally:
        gc.enable()


class Hooked(Log):
    """Calls a function in each of its methods that has one."""

    def __init__(self, **hooks: Any) -> None:
        super().__init__()
        self.hooks = hooks

    def _call(self, where: str) -> Any:
        return self.hooks.get(where, lambda: None)()

    async def _await(self, where: str) -> None:
        if isinstance(result := self._call(where), Awaitable):
            await result

    def run_started(self, engine: AnyEngine) -> None:
        super().run_started(engine)
        self._call("run_started")

    async def serve(self, engine: AnyEngine) -> None:
        self.calls.append("serve")
        self.is_serving.set()
        await anyio.Event().wait()

    async def flush(self) -> None:
        await self._await("flush")
        await super().flush()

    async def run_ended(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
        await self._await("run_ended")
        await super().run_ended(engine, reason, error)

    def run_abandoned(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
        super().run_abandoned(engine, reason, error)
        self._call("run_abandoned")

    @property
    def ends(self) -> list[Any]:
        return [call for call in self.calls if type(call) is tuple]


def remove_first(handles: list[RemovableEventHandle]) -> None:
    handles[0].remove()


def test_run_started_may_subscribe_and_the_handler_gets_the_events_of_this_run(anyio_backend: Backend) -> None:
    seen: list[int] = []

    def subscribe() -> None:
        engine.subscribe(Events.ITERATION_COMPLETED, lambda event: seen.append(event.iteration))

    engine = engine_with(Hooked(run_started=subscribe))
    backend, options = anyio_backend
    anyio.run(engine.run, [1, 2], backend=backend, backend_options=options)
    assert seen == [1, 2]


async def test_may_remove_itself_when_the_run_has_ended() -> None:
    handles: list[RemovableEventHandle] = []
    service = Hooked(run_ended=partial(remove_first, handles))
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    handles.append(engine.add_service(service))
    await engine.run([1])
    assert service.ends == [("run_ended", StopReason.COMPLETED, None)]
    await engine.run([1])
    assert service.calls.count("run_started") == 1


async def test_removed_by_another_before_its_run_started_it_hears_nothing() -> None:
    service, handles = Log(), list[RemovableEventHandle]()
    engine = engine_with(Hooked(run_started=partial(remove_first, handles)))
    handles.append(engine.add_service(service))
    await engine.run([1])
    assert service.calls == []


async def test_the_run_abandoned_of_one_may_remove_another() -> None:
    handles: list[RemovableEventHandle] = []
    first = Hooked(run_ended=anyio.sleep_forever, run_abandoned=partial(remove_first, handles))
    second = Hooked(run_ended=anyio.sleep_forever)
    engine: AnyEngine = Engine(lambda engine, batch: batch, grace=0.05)
    engine.add_service(first)
    handles.append(engine.add_service(second))
    with pytest.raises(HandlerTimeout):
        await engine.run([1])
    assert first.ends == second.ends == [("run_abandoned", StopReason.COMPLETED, None)]


async def test_ctrl_c_in_a_run_abandoned_keeps_no_other_and_no_run_from_its_end() -> None:
    interrupt = KeyboardInterrupt()
    first, second = Hooked(run_ended=anyio.sleep_forever), Hooked(run_ended=anyio.sleep_forever)
    first.hooks["run_abandoned"] = partial(throw, interrupt)
    engine: AnyEngine = Engine(lambda engine, batch: batch, grace=0.05)
    engine.add_service(first, on_error="log")
    engine.add_service(second, on_error="log")
    with pytest.raises(KeyboardInterrupt) as caught:
        await engine.run([1])
    assert caught.value is interrupt
    assert first.ends == second.ends == [("run_abandoned", StopReason.COMPLETED, None)]
    first.hooks = second.hooks = {}
    await engine.run([1])
    assert first.ends[1:] == second.ends[1:] == [("run_ended", StopReason.COMPLETED, None)]


def throw(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("where", ["run_started", "run_abandoned"])
def test_ctrl_c_in_one_that_comes_or_goes_in_a_step_on_the_worker_ends_the_run(
    where: str, anyio_backend: Backend
) -> None:
    interrupt = KeyboardInterrupt()
    service = Hooked(**{where: partial(throw, interrupt)})

    def step(engine: AnyEngine, batch: int) -> None:
        if engine.state.iteration == 2:
            engine.add_service(service).remove()

    engine: AnyEngine = Engine(step)
    backend, options = anyio_backend
    with pytest.raises(KeyboardInterrupt) as caught:
        anyio.run(engine.run, forever(), backend=backend, backend_options=options)
    assert caught.value is interrupt
    assert service.ends == [("run_abandoned", StopReason.CANCELLED, None)]


@pytest.mark.parametrize("where", ["flush", "run_ended"])
async def test_one_that_hangs_at_the_end_fails_no_run_if_its_errors_are_logged(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = Hooked(**{where: anyio.sleep_forever})
    engine: AnyEngine = Engine(lambda engine, batch: batch, grace=0.05)
    engine.add_service(service, on_error="log")
    with caplog.at_level(logging.ERROR, "aengine.engine"):
        await engine.run([1])
    assert service.ends == [("run_abandoned", StopReason.COMPLETED, None)]
    assert [type(record.exc_info[1]) for record in caplog.records if record.exc_info] == [HandlerTimeout]
    assert engine.statistics().services[0].errors == 1


@pytest.mark.parametrize("request_end", ["terminate", "interrupt"])
async def test_run_started_may_end_a_run_that_goes_on_after_an_interruption(request_end: str) -> None:
    def end() -> None:
        if engine.state.iteration == 2:
            getattr(engine, request_end)()

    engine = engine_with(Hooked(run_started=end))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    await engine.run(range(4))
    assert (await engine.run()).iteration == 2
    assert engine.state.stop_reason is StopReason[f"{request_end.upper()}{'D' if request_end[-1] == 'e' else 'ED'}"]


@pytest.mark.parametrize("where", ["flush", "run_ended"])
def test_a_cancellation_that_it_lets_out_fails_the_run_and_disturbs_no_other(where: str) -> None:
    import asyncio  # noqa: PLC0415 -- native cancellation is its own

    async def cancelled() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    service, other = Hooked(**{where: cancelled}), Hooked()
    engine = engine_with(service)
    engine.add_service(other)
    with pytest.raises(StrayCancellation, match=rf"{where}\(\) of service 'Hooked' was cancelled"):
        asyncio.run(engine.run([1]))
    assert [end[0] for end in other.ends] == ["run_ended"]


async def test_removed_while_the_engine_waits_for_its_flush_it_is_waited_for_no_longer() -> None:
    async def remove_and_wait() -> None:
        handle.remove()
        await anyio.sleep_forever()

    async def step(engine: AnyEngine, batch: int) -> None:
        await engine.flush()

    service = Hooked(flush=remove_and_wait)
    engine: AnyEngine = Engine(step)
    handle = engine.add_service(service)
    with anyio.fail_after(5):
        await engine.run([1])
    assert service.ends == [("run_abandoned", StopReason.CANCELLED, None)]


async def test_a_flush_from_outside_comes_back_when_the_run_fails() -> None:
    is_flushing = anyio.Event()

    async def hang() -> None:
        is_flushing.set()
        await anyio.sleep_forever()

    async def step(engine: AnyEngine, batch: int) -> None:
        group.start_soon(engine.flush)
        await is_flushing.wait()
        raise Boom

    engine = engine_with(Hooked(flush=hang), step)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            with pytest.raises(Boom):
                await engine.run([1])


async def test_one_that_comes_and_goes_during_a_run_is_freed_before_its_end() -> None:
    gone: list[Any] = []

    async def come_and_go(engine: AnyEngine) -> None:
        service = Hooked()
        handle = engine.add_service(service)
        await service.is_serving.wait()
        handle.remove()
        gone.append(weakref.ref(service))

    async def count(engine: AnyEngine) -> None:
        with anyio.fail_after(5):
            while any(one() is not None for one in gone):  # some turns of the event loop later
                await anyio.lowlevel.checkpoint()
                gc.collect()

    engine: AnyEngine = Engine(lambda engine, batch: batch, thread=False)
    engine.add_event_handler(Events.ITERATION_COMPLETED, come_and_go)
    engine.add_event_handler(Events.COMPLETED, count)
    await engine.run(range(3))
    assert len(gone) == 3


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, Events.COMPLETED], ids=lambda event: event.name)
def test_added_at_the_end_of_a_run_without_an_event_loop_it_takes_part_as_well(event: Any) -> None:
    service = Log()
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    engine.add_event_handler(event, lambda engine: engine.add_service(service))
    engine.run_sync([1])
    assert service.calls[0] == "run_started"
    assert ("run_ended", StopReason.COMPLETED, None) in service.calls


async def test_does_not_begin_to_serve_when_the_run_has_ended_for_it() -> None:
    class Quick(Service):
        def __init__(self) -> None:
            self.calls: list[str] = []

        async def serve(self, engine: AnyEngine) -> None:
            self.calls.append("serve")

        async def run_ended(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
            self.calls.append("run_ended")

    for _ in range(20):  # trio starts tasks in any order
        service = Quick()
        engine: AnyEngine = Engine(lambda engine, batch: batch, thread=False)
        engine.add_service(service)
        await engine.run([1])
        assert service.calls[-1] == "run_ended"


async def test_a_run_that_fails_while_it_is_flushed_keeps_no_engine() -> None:
    class Flushing(Service):
        def __init__(self) -> None:
            self.is_flushing = anyio.Event()

        async def flush(self) -> None:
            self.is_flushing.set()
            await anyio.Event().wait()

    class FailsThen(Service):
        def __init__(self, other: Flushing) -> None:
            self.other = other

        async def serve(self, engine: AnyEngine) -> None:
            await self.other.is_flushing.wait()
            raise Boom

    async def step(engine: AnyEngine, batch: int) -> None:
        await engine.flush()

    async def run_and_forget() -> "weakref.ref[AnyEngine]":
        engine, service = Engine(step), Flushing()
        engine.add_service(service)
        engine.add_service(FailsThen(service))
        with contextlib.suppress(Boom):
            await engine.run([1])
        return weakref.ref(engine)

    gc.disable()
    try:
        assert await is_freed(await run_and_forget())
    finally:
        gc.enable()

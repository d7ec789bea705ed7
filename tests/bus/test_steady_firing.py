"""Events that other tasks and threads fire without end, to subscribers for which an emitter waits, keep no run from
its steps, from `terminate()` and from its end."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint
from support.engines import async_step, each_engine
from support.record import AnyEngine

from aengine import Engine, Event, Events, HandlerTimeout, StopReason

ENDS: dict[str, tuple[Callable[[AnyEngine], object], StopReason]] = {
    "terminate": (Engine.terminate, StopReason.TERMINATED),
    "interrupt": (Engine.interrupt, StopReason.INTERRUPTED),
}
each_end = pytest.mark.parametrize(("end", "reason"), ENDS.values(), ids=ENDS.keys())


@contextmanager
def calling_steadily(call: Callable[[], object]) -> Iterator[None]:
    """Have another thread make a call again and again."""
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            with suppress(RuntimeError):  # an inbox is full, and no run is under way
                call()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def add_tick(engine: AnyEngine, handle: Callable[[Event], Any], **options: Any) -> None:
    engine.register_events("tick")
    engine.subscribe("tick", handle, **options)


async def ignore(event: Event) -> None:
    pass


@pytest.mark.every_event_loop
@each_engine
async def test_the_steps_go_on(make: Callable[..., AnyEngine]) -> None:
    engine = make()
    add_tick(engine, ignore, buffer=2)
    with calling_steadily(lambda: engine.fire_event("tick")), anyio.fail_after(20):
        await engine.run(range(20))
    assert engine.state.iteration == 20


@each_engine
async def test_requested_events_leave_the_steps_their_turn(make: Callable[..., AnyEngine]) -> None:
    engine = make()
    engine.register_events("tick")
    engine.add_event_handler("tick", lambda: None)
    with calling_steadily(lambda: engine.fire_event_soon("tick")), anyio.fail_after(20):
        await engine.run(range(20))
    assert engine.state.iteration == 20


@pytest.mark.every_event_loop
@each_engine
@each_end
async def test_the_run_ends_by_request(
    make: Callable[..., AnyEngine], end: Callable[[AnyEngine], object], reason: StopReason
) -> None:
    engine = make()
    add_tick(engine, ignore, buffer=2)

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    async def end_it() -> None:
        await anyio.to_thread.run_sync(end, engine)

    with calling_steadily(lambda: engine.fire_event("tick")), anyio.fail_after(20):
        await engine.run(range(10**6))
    assert engine.state.stop_reason is reason
    assert engine.state.iteration == 3


@pytest.mark.parametrize("end", ENDS)
async def test_a_step_that_fires_to_a_stuck_subscriber_is_released_by_a_request(end: str) -> None:
    """The event is accepted over the bound; the end of the run waits for the subscriber, up to its grace."""
    fired: list[int] = []

    def step(engine: AnyEngine, batch: int) -> None:
        for _ in range(4):
            engine.fire_event("tick")
            fired.append(batch)

    async def hang(event: Event) -> None:
        await stuck.wait()

    async def request() -> None:
        while len(fired) < 2:  # the third waits: one is in hand, one may wait
            await checkpoint()
        await anyio.wait_all_tasks_blocked()
        assert len(fired) == 2
        ENDS[end][0](engine)
        while len(fired) < 4:
            await checkpoint()
        stuck.set()

    stuck, engine = anyio.Event(), Engine(step)
    add_tick(engine, hang, buffer=1)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(request)
            await engine.run(range(10))
    assert (engine.state.stop_reason, engine.state.iteration) == (ENDS[end][1], 1)
    assert engine.statistics().listeners[0].handled == 4


@each_engine
async def test_in_a_pause_events_over_the_bound_leave_the_event_loop_its_turns(make: Callable[..., AnyEngine]) -> None:
    engine, handled = make(), []
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.pause)

    async def handle(event: Event) -> None:
        await checkpoint()
        handled.append(event)

    add_tick(engine, handle, buffer=1)

    async def fire() -> None:
        while engine.state.iteration < 2:
            await checkpoint()
        for _ in range(4):
            engine.fire_event("tick")
        while len(handled) < 4:
            await checkpoint()
        assert engine.state.iteration == 2
        engine.resume()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(fire)
            await engine.run(range(4))
    assert engine.state.iteration == 4


# The end of a run


class Answered:
    """A handler of events that, before it is done with one, has another one fired, by a task that is none of the run's.

    So there is always one more: whatever waits until nothing waits, waits for ever.
    """

    def __init__(self, engine: AnyEngine) -> None:
        self.engine = engine
        self.handled: list[int] = []
        self._wanted = anyio.Event()

    async def __call__(self, event: Event) -> None:
        fired = self._fired = anyio.Event()
        self._wanted.set()
        await fired.wait()
        self.handled.append(event.sequence)

    async def fire(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted = anyio.Event()
            self.engine.fire_event("tick")
            self._fired.set()


@each_engine
@pytest.mark.parametrize("how", ["completed", "terminated", "cancelled", "interrupted"])
async def test_it_is_not_put_off_by_what_is_fired_meanwhile(make: Callable[..., AnyEngine], how: str) -> None:
    engine = make()
    answered = Answered(engine)
    add_tick(engine, answered)
    first: list[int] = []

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    async def begin() -> None:
        for _ in range(3):
            engine.fire_event("tick")
        first.extend(range(engine._emitter.bus.sequence - 2, engine._emitter.bus.sequence + 1))
        if how == "terminated":
            engine.terminate()
        elif how == "interrupted":
            engine.interrupt()
        elif how == "cancelled":
            scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(answered.fire)
        with anyio.fail_after(20), anyio.CancelScope() as scope:
            await engine.run(range(2) if how == "completed" else range(100))
        group.cancel_scope.cancel()
    assert str(engine.state.stop_reason) == how
    assert answered.handled[:3] == first  # what was accepted before the end
    listener = engine.statistics().listeners[0]
    assert listener.depth > 0  # the rest waits for the next run
    assert listener.accepted == listener.handled + listener.depth


async def test_what_waited_for_the_next_run_is_handled_there_in_order() -> None:
    engine = Engine(async_step)
    answered = Answered(engine)
    add_tick(engine, answered)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: engine.fire_event("tick"))
    async with anyio.create_task_group() as group:
        group.start_soon(answered.fire)
        with anyio.fail_after(20):
            for _ in range(3):
                await engine.run(range(2))
        group.cancel_scope.cancel()
    assert answered.handled == sorted(answered.handled)
    assert len(answered.handled) >= 3


@each_engine
@pytest.mark.parametrize("plain", [False, True], ids=["async handlers", "plain handlers"])
async def test_it_waits_for_what_handlers_fire_meanwhile(make: Callable[..., AnyEngine], plain: bool) -> None:  # noqa: FBT001
    """Each link of the chain is fired when the run is ending already."""
    engine, seen = make(), []
    engine.register_events(*(f"link {n}" for n in range(5)))

    async def fire_next(event: Event) -> None:
        seen.append(event.name)
        await checkpoint()
        if event.name != "link 4":
            await engine.emit(f"link {int(event.name[-1]) + 1}")

    def fire_next_plainly(event: Event) -> None:
        seen.append(event.name)
        if event.name != "link 4":
            engine.fire_event(f"link {int(event.name[-1]) + 1}")

    for n in range(5):
        engine.subscribe(f"link {n}", fire_next_plainly if plain else fire_next)

    @engine.subscribe(Events.COMPLETED)
    async def begin(event: Event) -> None:
        await engine.emit("link 0")

    await engine.run([1])
    assert seen == [f"link {n}" for n in range(5)]


async def test_handlers_that_fire_to_each_other_without_end_are_cut_by_the_grace() -> None:
    engine = Engine(async_step, grace=0.1)
    engine.register_events("ping", "pong")

    @engine.subscribe("ping")
    async def ping(event: Event) -> None:
        await checkpoint()
        await engine.emit("pong")

    @engine.subscribe("pong")
    async def pong(event: Event) -> None:
        await checkpoint()
        await engine.emit("ping")

    engine.add_event_handler(Events.COMPLETED, lambda: engine.fire_event("ping"))
    with anyio.fail_after(20), pytest.raises(HandlerTimeout, match=r"p[io]ng"):
        await engine.run([1])


async def test_a_subscriber_of_another_engine_that_fires_steadily_is_something_else() -> None:
    """It waits for the events of that engine, so what it fires here is no part of the end of this run."""
    other, engine = Engine(async_step), Engine(async_step, grace=20)
    answered = Answered(engine)
    add_tick(engine, answered)
    ended = anyio.Event()

    @other.subscribe(Events.STARTED)
    async def fire(event: Event) -> None:
        with anyio.CancelScope() as scope:
            group.start_soon(run)
            group.start_soon(lambda: cancel_after_end(scope))
            await answered.fire()

    async def run() -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: engine.fire_event("tick"))
        await engine.run([1])
        ended.set()

    async def cancel_after_end(scope: anyio.CancelScope) -> None:
        await ended.wait()
        scope.cancel()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            await other.run([1])


# Subscribers that come when the loop is over


@each_engine
async def test_one_that_is_added_in_the_clean_up_is_not_waited_for(make: Callable[..., AnyEngine]) -> None:
    engine, seen = make(grace=30.0), []
    engine.register_events("late")

    async def late(event: Event) -> None:
        seen.append(event.sequence)

    @engine.subscribe(Events.CANCELLED)
    async def add(event: Event) -> None:
        driver = engine._session._driver
        assert driver is not None
        while not driver._is_over:
            await checkpoint()
        engine.subscribe("late", late, buffer=1)
        for _ in range(3):  # nor for room in its inbox, from which nothing takes before the next run
            await engine.emit("late")

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    async def cancel() -> None:
        scope.cancel()

    with anyio.fail_after(10), anyio.CancelScope() as scope:
        await engine.run(range(10**6))
    assert engine.state.stop_reason is StopReason.CANCELLED
    assert [one.depth for one in engine.statistics().listeners] == [0, 3]
    engine.add_event_handler(Events.ITERATION_COMPLETED, engine.terminate)
    await engine.run(range(10**6))
    assert len(seen) == 3

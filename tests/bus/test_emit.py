"""Events of one's own: from the step, from handlers, from other tasks and threads, in a run and outside of one."""

import threading
from typing import Any, TypeAlias

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, Event, EventEnum, Events, InboxOverflow

pytestmark = pytest.mark.every_event_loop

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


class Backprop(EventEnum):
    BACKWARD_STARTED = "backward_started"
    BACKWARD_COMPLETED = "backward_completed"


def step(engine: Engine[int, int], batch: int) -> int:
    return batch


async def async_step(engine: Engine[int, int], batch: int) -> int:
    return batch


def firing(engine: Engine[int, None], batch: int) -> None:
    engine.fire_event(Backprop.BACKWARD_STARTED)
    engine.fire_event(Backprop.BACKWARD_COMPLETED)


async def ignore(event: Event[Any, Any]) -> None: ...


# From a plain step


@both_threads
async def test_a_step_fires_to_handlers_subscribers_and_streams(thread: Thread) -> None:
    engine = Engine(firing, thread=thread)
    engine.register_events(*Backprop)
    inline: list[str] = []
    beside: list[str] = []

    @engine.on(Backprop.BACKWARD_STARTED)
    def started(engine: Engine[int, None]) -> None:
        inline.append(f"started@{engine.state.iteration}")

    @engine.on("BACKWARD_COMPLETED")
    def completed() -> None:
        inline.append("completed")

    @engine.subscribe(Backprop.BACKWARD_STARTED | Backprop.BACKWARD_COMPLETED)
    async def note(event: Event) -> None:
        beside.append(f"{event.name}@{event.iteration}")

    async with engine.stream(Backprop.BACKWARD_COMPLETED) as events:
        await engine.run(range(2))
        streamed = [event.iteration async for event in events]
    assert inline == ["started@1", "completed", "started@2", "completed"]
    assert beside == [
        "BACKWARD_STARTED@1",
        "BACKWARD_COMPLETED@1",
        "BACKWARD_STARTED@2",
        "BACKWARD_COMPLETED@2",
    ]
    assert streamed == [1, 2]


async def test_a_step_on_the_worker_waits_for_async_handlers() -> None:
    engine = Engine(firing)
    engine.register_events(*Backprop)
    order: list[str] = []
    loop_thread = threading.get_ident()

    @engine.on(Backprop.BACKWARD_STARTED)
    async def started() -> None:
        assert threading.get_ident() == loop_thread
        order.append("begins")
        await checkpoint()
        order.append("ends")

    @engine.on(Backprop.BACKWARD_COMPLETED)
    def completed() -> None:
        order.append("completed")

    await engine.run(range(2))
    assert order == ["begins", "ends", "completed"] * 2


async def test_plain_handlers_run_where_the_step_runs_that_fires() -> None:
    threads: set[int] = set()

    def fire(engine: Engine[int, None], batch: int) -> None:
        threads.add(threading.get_ident())
        engine.fire_event("NEWS")

    engine = Engine(fire)
    engine.register_events("NEWS")

    @engine.on("NEWS")
    def note_thread() -> None:
        threads.add(threading.get_ident())

    @engine.on("NEWS")
    async def wait() -> None:
        await checkpoint()

    engine.add_event_handler("NEWS", note_thread)
    await engine.run(range(3))
    assert len(threads) == 1


@both_threads
async def test_an_error_of_a_handler_comes_out_of_fire_event(thread: Thread) -> None:
    error = KeyError("of the handler")
    caught: list[BaseException] = []

    def fire(engine: Engine[int, None], batch: int) -> None:
        try:
            engine.fire_event("NEWS")
        except KeyError as one:
            caught.append(one)

    engine = Engine(fire, thread=thread)
    engine.register_events("NEWS")

    @engine.on("NEWS")
    def fail() -> None:
        raise error

    await engine.run([1])
    assert caught == [error]
    assert "handler" in error.__notes__[0]


async def test_an_error_of_an_async_handler_comes_out_of_fire_event_on_the_worker() -> None:
    error = KeyError("of the handler")
    caught: list[BaseException] = []

    def fire(engine: Engine[int, None], batch: int) -> None:
        try:
            engine.fire_event("NEWS")
        except KeyError as one:
            caught.append(one)

    engine = Engine(fire)
    engine.register_events("NEWS")

    @engine.on("NEWS")
    async def fail() -> None:
        await checkpoint()
        raise error

    await engine.run([1])
    assert caught == [error]


async def test_on_the_loop_thread_an_async_handler_is_refused_by_the_way_out() -> None:
    engine = Engine(firing, thread=False)
    engine.register_events(*Backprop)
    ran: list[str] = []

    @engine.on(Backprop.BACKWARD_STARTED)
    def plain() -> None:
        ran.append("plain")

    @engine.on(Backprop.BACKWARD_STARTED)
    async def handler() -> None:
        ran.append("async")

    with pytest.raises(RuntimeError, match=r"await engine\.emit\('BACKWARD_STARTED'\)"):
        await engine.run([1])
    assert ran == []  # all or nothing


async def test_a_handler_that_turns_out_to_be_async_is_refused_too() -> None:
    engine = Engine(firing, thread=False)
    engine.register_events(*Backprop)

    async def handler() -> None: ...

    engine.add_event_handler(Backprop.BACKWARD_STARTED, lambda: handler())  # noqa: PLW0108 -- plain to look at
    with pytest.raises(RuntimeError, match=r"await engine\.emit\('BACKWARD_STARTED'\)"):
        await engine.run([1])


async def test_an_async_snapshot_is_refused_where_it_cannot_be_awaited() -> None:
    engine = Engine(firing, thread=False)
    engine.register_events(*Backprop)

    async def snapshot(engine: Engine[int, None]) -> int:
        return 1

    engine.subscribe(Backprop.BACKWARD_STARTED, ignore, snapshot=snapshot)
    with pytest.raises(RuntimeError, match=r"(?s)await engine\.emit\('BACKWARD_STARTED'\).*snapshot"):
        await engine.run([1])


# Full inboxes


async def test_a_step_on_the_worker_waits_for_room() -> None:
    deepest = 0

    def fire(engine: Engine[int, None], batch: int) -> None:
        for _ in range(10):
            engine.fire_event("NEWS")

    engine = Engine(fire)
    engine.register_events("NEWS")

    @engine.subscribe("NEWS", buffer=2)
    async def slow(event: Event) -> None:
        nonlocal deepest
        deepest = max(deepest, engine.statistics().listeners[0].depth)
        await checkpoint()

    await engine.run(range(20))
    (listener,) = engine.statistics().listeners
    assert listener.handled == 200
    assert deepest <= 3


async def test_a_step_on_the_loop_fires_over_the_bound_and_the_loop_waits_afterwards() -> None:
    gate = anyio.Event()
    steps = 0

    async def fire(engine: Engine[int, None], batch: int) -> None:
        nonlocal steps
        for _ in range(10):
            engine.fire_event("NEWS")
        steps += 1

    engine = Engine(fire)
    engine.register_events("NEWS")

    @engine.subscribe("NEWS", buffer=2)
    async def slow(event: Event) -> None:
        await gate.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(engine.run, range(5))
        await anyio.wait_all_tasks_blocked()
        assert steps == 1
        assert engine.statistics().listeners[0].accepted == 10
        gate.set()
    (listener,) = engine.statistics().listeners
    assert listener.handled == 50


async def test_a_plain_step_on_the_loop_has_the_loop_wait_too() -> None:
    gate = anyio.Event()

    def fire(engine: Engine[int, None], batch: int) -> None:
        for _ in range(10):
            engine.fire_event("NEWS")

    engine = Engine(fire, thread=False)
    engine.register_events("NEWS")

    @engine.subscribe("NEWS", buffer=2)
    async def slow(event: Event) -> None:
        await gate.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(engine.run, range(5))
        await anyio.wait_all_tasks_blocked()
        assert engine.state.iteration == 1
        gate.set()
    (listener,) = engine.statistics().listeners
    assert listener.handled == 50


async def test_a_full_inbox_that_raises_does_so_in_the_step() -> None:
    gate = anyio.Event()
    overflows = 0

    async def fire(engine: Engine[int, None], batch: int) -> None:
        nonlocal overflows
        for _ in range(10):
            try:
                engine.fire_event("NEWS")
            except InboxOverflow:
                overflows += 1
        gate.set()

    engine = Engine(fire)
    engine.register_events("NEWS")

    @engine.subscribe("NEWS", buffer=2, overflow="error")
    async def slow(event: Event) -> None:
        await gate.wait()

    await engine.run([1])
    assert overflows in (7, 8)
    (listener,) = engine.statistics().listeners
    assert listener.handled == 10 - overflows


# emit


async def test_emit_awaits_handlers_and_room() -> None:
    order: list[str] = []

    async def emitting(engine: Engine[int, None], batch: int) -> None:
        await engine.emit("NEWS")
        order.append("emitted")

    engine = Engine(emitting)
    engine.register_events("NEWS")

    @engine.on("NEWS")
    async def handler() -> None:
        order.append("begins")
        await checkpoint()
        order.append("ends")

    @engine.subscribe("NEWS", buffer=1)
    async def slow(event: Event) -> None:
        for _ in range(5):
            await checkpoint()

    await engine.run(range(5))
    assert order == ["begins", "ends", "emitted"] * 5
    (listener,) = engine.statistics().listeners
    assert listener.handled == 5


async def test_emit_is_cancellable_and_what_was_sent_stays_sent() -> None:
    engine = Engine(async_step)
    engine.register_events("NEWS")
    gate = anyio.Event()

    @engine.subscribe("NEWS", buffer=1)
    async def slow(event: Event) -> None:
        await gate.wait()

    @engine.on(Events.ITERATION_COMPLETED)
    async def tell() -> None:
        for _ in range(3):
            with anyio.move_on_after(0.01):
                await engine.emit("NEWS")
        gate.set()

    await engine.run([1])
    (listener,) = engine.statistics().listeners
    assert listener.handled == listener.accepted == 3


async def test_a_subscriber_that_emits_to_itself_never_waits_for_itself() -> None:
    engine = Engine(async_step)
    engine.register_events("NEWS")
    seen = 0

    @engine.subscribe("NEWS", buffer=1)
    async def multiply(event: Event) -> None:
        nonlocal seen
        seen += 1
        if seen <= 20:
            for _ in range(3):
                await engine.emit("NEWS")

    @engine.on(Events.STARTED)
    async def begin() -> None:
        await engine.emit("NEWS")

    with anyio.fail_after(60):
        await engine.run([1])
    assert seen == 61


@pytest.mark.parametrize("length", [2, 3, 5])
async def test_subscribers_that_emit_in_a_circle_never_wait_for_each_other(length: int) -> None:
    engine = Engine(async_step)
    names = [f"E{n}" for n in range(length)]
    engine.register_events(*names)
    left = 300

    def passing(name: str) -> Any:
        async def pass_on(event: Event) -> None:
            nonlocal left
            await checkpoint()
            for _ in range(2):
                if left:
                    left -= 1
                    await engine.emit(name)

        return pass_on

    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        engine.subscribe(name, passing(following), buffer=1)

    @engine.on(Events.STARTED)
    async def begin() -> None:
        await engine.emit(names[0])

    with anyio.fail_after(60):
        await engine.run([1])
    assert left == 0
    assert sum(one.handled for one in engine.statistics().listeners) == 301


async def test_a_subscriber_of_the_loops_events_that_emits_never_deadlocks_with_the_loop() -> None:
    """The loop waits for room in its inbox while it waits for room in the inbox of another."""
    engine = Engine(step)
    engine.register_events("NEWS")
    seen = 0

    @engine.subscribe(Events.ITERATION_COMPLETED, buffer=1)
    async def tell(event: Event) -> None:
        await engine.emit("NEWS")
        await engine.emit("NEWS")

    @engine.subscribe("NEWS", buffer=1)
    async def count(event: Event) -> None:
        nonlocal seen
        await checkpoint()
        seen += 1

    with anyio.fail_after(60):
        await engine.run(range(100))
    assert seen == 200


async def test_a_plain_subscriber_may_fire() -> None:
    engine = Engine(step)
    engine.register_events("NEWS")
    seen = 0

    @engine.subscribe(Events.ITERATION_COMPLETED)
    def tell(event: Event) -> None:
        engine.fire_event("NEWS")

    @engine.subscribe("NEWS", buffer=1)
    async def count(event: Event) -> None:
        nonlocal seen
        seen += 1

    await engine.run(range(50))
    assert seen == 50


async def test_another_thread_may_fire() -> None:
    engine = Engine(async_step)
    engine.register_events("NEWS")
    seen: list[int] = []

    @engine.subscribe("NEWS")
    async def note(event: Event) -> None:
        seen.append(event.sequence)

    def fire() -> None:
        for _ in range(200):
            engine.fire_event("NEWS")

    @engine.on(Events.ITERATION_COMPLETED)
    async def from_thread() -> None:
        await anyio.to_thread.run_sync(fire)

    await engine.run([1])
    assert len(seen) == 200
    assert seen == sorted(seen)


# Counting


@both_threads
async def test_a_filter_of_an_own_event_counts_its_firings(thread: Thread) -> None:
    engine = Engine(firing, thread=thread)
    engine.register_events(*Backprop)
    inline = 0
    seen: list[int] = []

    @engine.on(Backprop.BACKWARD_STARTED(every=3))
    def count() -> None:
        nonlocal inline
        inline += 1

    @engine.subscribe(Backprop.BACKWARD_COMPLETED(after=7))
    async def note(event: Event) -> None:
        seen.append(event.iteration)

    await engine.run(range(10))
    assert inline == 3
    assert seen == [8, 9, 10]


async def test_an_attribute_may_count_an_own_event() -> None:
    class Tokens(EventEnum):
        SEEN = "seen"

    def counting(engine: Engine[int, None], batch: int) -> None:
        for _ in range(batch):
            engine.state.tokens += 1
            engine.fire_event(Tokens.SEEN)

    engine = Engine(counting)
    engine.register_events(*Tokens, event_to_attr={Tokens.SEEN: "tokens"})
    assert engine.state.tokens == 0
    seen: list[int] = []

    @engine.on(Tokens.SEEN(every=100))
    def note(engine: Engine[int, None]) -> None:
        seen.append(engine.state.tokens)

    await engine.run([50, 130, 70])
    assert seen == [100, 200]


# Outside of a run


async def test_events_between_runs_wait_for_the_next_one() -> None:
    engine = Engine(step)
    engine.register_events("NEWS")
    seen: list[int] = []

    @engine.subscribe("NEWS")
    async def note(event: Event) -> None:
        seen.append(event.sequence)

    for n in range(1, 4):
        await engine.emit("NEWS")
        engine.fire_event("NEWS")
        assert len(seen) == 2 * (n - 1)
        await engine.run([1])
        assert len(seen) == 2 * n
    (listener,) = engine.statistics().listeners
    assert (listener.handled, listener.discarded) == (6, 0)


async def test_emit_outside_of_a_run_refuses_to_wait_for_ever() -> None:
    engine = Engine(step)
    engine.register_events("NEWS")
    engine.subscribe("NEWS", ignore, buffer=2, name="reader")
    await engine.emit("NEWS")
    await engine.emit("NEWS")
    with pytest.raises(RuntimeError, match=r"'reader' is full, and no run is under way.*buffer="):
        await engine.emit("NEWS")
    with pytest.raises(RuntimeError, match=r"'reader' is full, and no run is under way.*buffer="):
        engine.fire_event("NEWS")
    await engine.run([1])
    (listener,) = engine.statistics().listeners
    assert listener.handled == listener.accepted


async def test_inline_handlers_run_outside_of_a_run_too() -> None:
    engine = Engine(step)
    engine.register_events("NEWS")
    seen: list[str] = []

    @engine.on("NEWS")
    async def handler() -> None:
        seen.append("async")

    @engine.on("NEWS")
    def plain() -> None:
        seen.append("plain")

    await engine.emit("NEWS")
    assert seen == ["async", "plain"]


def test_fire_event_needs_no_event_loop() -> None:
    engine = Engine(firing)
    engine.register_events(*Backprop)
    seen: list[int] = []

    @engine.on(Backprop.BACKWARD_STARTED)
    def note(engine: Engine[int, None]) -> None:
        seen.append(engine.state.iteration)

    engine.fire_event(Backprop.BACKWARD_STARTED)
    engine.run_sync(range(2))
    assert seen == [0, 1, 2]


# Bad input


async def test_what_is_not_registered_is_refused() -> None:
    engine = Engine(step)
    with pytest.raises(ValueError, match="has no event 'NEWS': register_events"):
        engine.fire_event("NEWS")
    with pytest.raises(ValueError, match="has no event 'NEWS': register_events"):
        await engine.emit("NEWS")
    with pytest.raises(ValueError, match="one event is fired at a time"):
        await engine.emit(Events.STARTED | Events.COMPLETED)
    with pytest.raises(TypeError, match="expected an event"):
        engine.fire_event(3)  # type: ignore[arg-type]  # that it raises is the point


def test_register_events_takes_names_and_enums() -> None:
    engine = Engine(step)
    engine.register_events("NEWS", *Backprop)
    assert engine.has_registered_events("NEWS")
    assert engine.has_registered_events(Backprop.BACKWARD_STARTED | Events.STARTED)
    assert not engine.has_registered_events("OTHER")
    with pytest.raises(TypeError, match="takes names and members"):
        engine.register_events(3)  # type: ignore[arg-type]  # that it raises is the point


class News(EventEnum):
    SAMPLED = "news"


class Sensor(EventEnum):
    SAMPLED = "a value of a sensor"


@pytest.mark.parametrize(
    ("first", "second"),
    [(News.SAMPLED, Sensor.SAMPLED), (News.SAMPLED, "SAMPLED"), ("SAMPLED", News.SAMPLED), (Events.STARTED, "STARTED")],
)
def test_second_event_of_a_name_is_refused_and_nothing_is_registered(first: Any, second: Any) -> None:
    engine = Engine(step)
    engine.register_events(first)
    with pytest.raises(ValueError, match=r"Give .* another name"):
        engine.register_events("NEWS", second)
    assert not engine.has_registered_events("NEWS")
    with pytest.raises(ValueError, match="events are equal by name"):
        Engine(step).register_events(first, second)


def test_same_event_may_be_registered_again() -> None:
    def define() -> type[EventEnum]:  # as a cell of a notebook does, each time that it is executed
        class Rollouts(EventEnum):
            PUBLISHED = "published"

        return Rollouts

    engine = Engine(step)
    for _ in range(2):
        engine.register_events("NEWS", *News, *Events, *define())
    assert engine.has_registered_events("PUBLISHED")

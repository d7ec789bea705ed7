"""Subscribers that come, go, fail, hang or wait for one another; and the end of a run."""

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, Event, Events, HandlerTimeout, StopReason

Thread: TypeAlias = bool

both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


def step(engine: Engine[int, int], batch: int) -> int:
    return batch


async def async_step(engine: Engine[int, int], batch: int) -> int:
    await checkpoint()
    return batch


async def ignore(event: Event) -> None: ...


# Errors


@both_threads
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "async"])
async def test_an_error_fails_the_run_as_the_very_object_with_a_note(thread: Thread, plain: Any) -> None:
    engine = Engine(step, thread=thread, name="trainer")
    error = ValueError("no disk")

    def fail(event: Event) -> None:
        if event.iteration == 3:
            raise error

    async def fail_async(event: Event) -> None:
        fail(event)

    engine.subscribe(Events.ITERATION_COMPLETED, fail if plain else fail_async, name="saver")
    with pytest.raises(ValueError, match="no disk") as caught:
        await engine.run(range(10))
    assert caught.value is error
    notes = "\n".join(error.__notes__)
    for part in ("'saver'", "ITERATION_COMPLETED", "'trainer'", "epoch 1", "iteration 3"):
        assert part in notes
    (listener,) = engine.statistics().listeners
    assert listener.errors == 1
    assert listener.handled == 2
    assert listener.accepted == listener.handled + listener.discarded


async def test_an_error_at_the_last_event_still_fails_the_run() -> None:
    engine = Engine(step)
    error = ValueError("late")
    told: list[BaseException] = []

    @engine.subscribe(Events.COMPLETED)
    async def fail(event: Event) -> None:
        await checkpoint()
        raise error

    @engine.on(Events.EXCEPTION_RAISED)
    def tell(engine: Engine[int, int], error: BaseException) -> None:
        told.append(error)

    with pytest.raises(ValueError, match="late") as caught:
        await engine.run([1])
    assert caught.value is error
    assert engine.state.stop_reason is StopReason.FAILED
    assert told == [error]


async def test_the_errors_of_two_subscribers_come_out_together() -> None:
    engine = Engine(step)

    @engine.subscribe(Events.COMPLETED)
    async def one(event: Event) -> None:
        raise KeyError("one")

    @engine.subscribe(Events.COMPLETED)
    async def other(event: Event) -> None:
        raise ValueError("other")

    with pytest.raises(ExceptionGroup) as caught:
        await engine.run([1])
    assert {type(error) for error in caught.value.exceptions} == {KeyError, ValueError}


async def test_a_run_after_a_failed_one_is_served_again() -> None:
    engine = Engine(step)
    seen: list[int] = []

    @engine.subscribe(Events.ITERATION_COMPLETED)
    async def fail_once(event: Event) -> None:
        if not seen:
            seen.append(0)
            raise ValueError("once")
        seen.append(event.iteration)

    with pytest.raises(ValueError, match="once"):
        await engine.run(range(3))
    seen[:] = [0]
    engine.state.max_epochs = None  # begin anew
    await engine.run(range(3))
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "async"])
async def test_an_isolated_subscriber_logs_counts_and_goes_on(plain: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(step)
    seen: list[int] = []

    def fail_often(event: Event) -> None:
        seen.append(event.iteration)
        if event.iteration % 2:
            raise ValueError("odd")

    async def fail_often_async(event: Event) -> None:
        fail_often(event)

    handler = fail_often if plain else fail_often_async
    engine.subscribe(Events.ITERATION_COMPLETED, handler, on_error="log", name="reporter")
    with caplog.at_level(logging.ERROR, "aengine.engine"):
        await engine.run(range(5))
    assert seen == [1, 2, 3, 4, 5]
    (listener,) = engine.statistics().listeners
    assert (listener.errors, listener.handled) == (3, 5)
    records = [record for record in caplog.records if "reporter" in record.getMessage()]
    assert len(records) == 3
    assert all(record.exc_info for record in records)


# Coming and going


@both_threads
async def test_subscribed_in_a_run_it_hears_the_next_event(thread: Thread) -> None:
    seen: list[int] = []

    async def note(event: Event) -> None:
        seen.append(event.iteration)

    def subscribing(engine: Engine[int, None], batch: int) -> None:
        if batch == 2:
            engine.subscribe(Events.ITERATION_COMPLETED, note)

    await Engine(subscribing, thread=thread).run(range(5))
    assert seen == [3, 4, 5]


@both_threads
async def test_subscribed_while_its_event_is_dispatched_it_hears_the_one_after(
    thread: Thread,
) -> None:
    engine = Engine(step, thread=thread)
    seen: list[int] = []

    async def note(event: Event) -> None:
        seen.append(event.iteration)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def subscribe() -> None:
        engine.subscribe(Events.ITERATION_COMPLETED, note)

    @engine.on(Events.ITERATION_COMPLETED(once=4))
    async def subscribe_async() -> None:
        engine.subscribe(Events.ITERATION_COMPLETED, note)

    await engine.run(range(6))
    assert sorted(seen) == [3, 4, 5, 5, 6, 6]


async def test_subscribed_from_another_task_or_thread_it_is_served() -> None:
    engine = Engine(async_step)
    seen: list[str] = []

    def listener(name: str) -> Callable[[Event], Any]:
        async def note(event: Event) -> None:
            seen.append(name)

        return note

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    async def subscribe_elsewhere() -> None:
        thread = threading.Thread(target=engine.subscribe, args=(Events.EPOCH_COMPLETED, listener("thread")))
        thread.start()
        thread.join()
        async with anyio.create_task_group() as group:
            group.start_soon(subscribe_in_task)

    async def subscribe_in_task() -> None:
        engine.subscribe(Events.EPOCH_COMPLETED, listener("task"))

    await engine.run(range(3))
    assert sorted(seen) == ["task", "thread"]


@both_threads
async def test_removed_in_a_run_it_handles_what_it_was_sent_and_no_more(thread: Thread) -> None:
    seen: list[int] = []

    def removing(engine: Engine[int, None], batch: int) -> None:
        if batch == 2:
            handle.remove()
            handle.remove()  # a second time does nothing

    engine = Engine(removing, thread=thread)

    async def note(event: Event) -> None:
        await checkpoint()
        seen.append(event.iteration)

    handle = engine.subscribe(Events.ITERATION_COMPLETED, note)
    await engine.run(range(5))
    assert seen == [1, 2]
    await engine.run(range(5))
    assert seen == [1, 2]
    assert not engine.statistics().listeners


async def test_a_handle_as_a_context_manager_removes() -> None:
    engine = Engine(step)
    seen: list[int] = []

    async def note(event: Event) -> None:
        seen.append(event.iteration)

    with engine.subscribe(Events.ITERATION_COMPLETED, note):
        await engine.run(range(2))
    await engine.run(range(2))
    assert seen == [1, 2]


async def test_a_subscriber_that_removes_itself_handles_what_it_was_sent_before() -> None:
    engine = Engine(async_step)
    seen: list[int] = []

    async def once(event: Event) -> None:
        seen.append(event.iteration)
        handle.remove()

    handle = engine.subscribe(Events.ITERATION_COMPLETED, once)
    await engine.run(range(100))
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) < 100


async def test_a_subscriber_removed_in_a_long_run_is_freed_in_it() -> None:
    """A server subscribes for each of its clients; a run lasts for days."""
    engine = Engine(async_step)
    alive: list[bool] = []

    class Client:
        async def handle(self, event: Event) -> None: ...

    @engine.on(Events.ITERATION_COMPLETED)
    async def come_and_go() -> None:
        client = Client()
        engine.subscribe(Events.ITERATION_COMPLETED, client.handle).remove()
        gone = weakref.ref(client)
        del client
        for _ in range(10):
            await checkpoint()
        gc.collect()
        alive.append(gone() is not None)

    await engine.run(range(3))
    assert alive == [False] * 3


async def test_removed_before_its_task_began_it_does_not_live_on() -> None:
    engine = Engine(async_step)

    @engine.on(Events.STARTED)
    async def come_and_go() -> None:
        engine.subscribe(Events.ITERATION_COMPLETED, ignore).remove()

    with anyio.fail_after(60):
        await engine.run(range(3))


async def test_an_engine_runs_without_its_subscribers_outliving_it() -> None:
    engine = Engine(step)
    engine.subscribe(Events.ITERATION_COMPLETED, ignore)
    await engine.run(range(3))
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None


# The end of a run


async def test_run_ends_when_what_was_sent_is_handled() -> None:
    engine = Engine(step)
    seen = 0

    @engine.subscribe(Events.ITERATION_COMPLETED)
    async def slow(event: Event) -> None:
        nonlocal seen
        for _ in range(10):
            await checkpoint()
        seen += 1

    await engine.run(range(60))
    assert seen == 60


async def test_run_ends_when_what_subscribers_sent_each_other_is_handled() -> None:
    """A chain of three: each event of the loop's becomes one of A's, and that one of B's."""
    engine = Engine(step)
    engine.register_events("A", "B")
    seen = 0

    @engine.subscribe(Events.ITERATION_COMPLETED, buffer=1)
    async def to_a(event: Event) -> None:
        await checkpoint()
        await engine.emit("A")

    @engine.subscribe("A", buffer=1)
    async def to_b(event: Event) -> None:
        await checkpoint()
        await engine.emit("B")

    @engine.subscribe("B", buffer=1)
    async def count(event: Event) -> None:
        nonlocal seen
        await checkpoint()
        seen += 1

    await engine.run(range(30))
    assert seen == 30


@pytest.mark.parametrize("way", ["completes", "is interrupted"])
async def test_what_others_fire_while_the_run_ends_waits_for_the_next_one(way: str) -> None:
    engine = Engine(async_step)
    engine.register_events("mine")
    seen: dict[str, list[int]] = {"first": [], "second": [], "third": []}

    def listen(mine: list[int]) -> None:
        @engine.subscribe("mine")
        async def take(event: Event) -> None:
            mine.append(event.sequence)

    for one in seen.values():
        listen(one)
    fired = 0

    async def fire_on() -> None:
        nonlocal fired
        while True:
            if engine.is_running:
                engine.fire_event("mine")
                fired += 1
            await checkpoint()

    if way == "is interrupted":
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    async with anyio.create_task_group() as group:
        group.start_soon(fire_on)
        await engine.run([1, 2, 3])
        group.cancel_scope.cancel()
    if way == "completes":
        await engine.run([1, 2, 3], max_epochs=2)
    else:
        await engine.run()
    assert fired > 0
    assert [len(one) for one in seen.values()] == [fired] * 3
    assert {one.discarded for one in engine.statistics().listeners} == {0}


async def test_a_handler_that_hangs_is_named_when_its_grace_is_over() -> None:
    engine = Engine(step, name="trainer", grace=0.02)

    @engine.subscribe(Events.ITERATION_COMPLETED, name="uploader")
    async def hang(event: Event) -> None:
        await anyio.sleep_forever()

    with pytest.raises(HandlerTimeout, match=r"'trainer'.*'uploader' of ITERATION_COMPLETED.*iteration 1.*2 more"):
        await engine.run(range(3))
    (listener,) = engine.statistics().listeners
    assert (listener.accepted, listener.handled, listener.discarded) == (3, 0, 3)


async def test_a_plain_handler_that_hangs_is_left_behind_when_its_grace_is_over() -> None:
    engine = Engine(step, grace=0.02)
    gate = threading.Event()

    @engine.subscribe(Events.ITERATION_COMPLETED, name="uploader")
    def hang(event: Event) -> None:
        gate.wait()

    with pytest.raises(HandlerTimeout, match="uploader"):
        await engine.run(range(3))
    gate.set()


async def test_a_cancelled_run_still_handles_what_was_sent() -> None:
    engine = Engine(async_step)
    seen: list[int] = []

    @engine.subscribe(Events.ITERATION_COMPLETED)
    async def slow(event: Event) -> None:
        for _ in range(10):
            await checkpoint()
        seen.append(event.iteration)

    with anyio.CancelScope() as scope:

        @engine.on(Events.ITERATION_COMPLETED(once=5))
        def cancel() -> None:
            scope.cancel()

        await engine.run(range(100))
    assert scope.cancelled_caught
    (listener,) = engine.statistics().listeners
    assert listener.handled == listener.accepted == len(seen)
    assert seen[:4] == [1, 2, 3, 4]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"buffer": 0}, ValueError, "buffer= is a whole number of events that may wait, 1 or more"),
        ({"overflow": "drop"}, ValueError, 'overflow= is one of "wait", "latest"'),
        ({"on_error": "ignore"}, ValueError, 'on_error= is one of "raise"'),
        ({"snapshot": 3}, TypeError, "snapshot= must be callable"),
    ],
)
def test_wrong_options_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    engine = Engine(step)
    with pytest.raises(error, match=message):
        engine.subscribe(Events.STARTED, ignore, **arguments)
    assert not engine.statistics().listeners


def test_what_cannot_handle_events_is_refused() -> None:
    engine = Engine(step)

    def generator(event: Event) -> Any:
        yield event

    with pytest.raises(TypeError, match="has a yield in it"):
        engine.subscribe(Events.STARTED, generator)
    with pytest.raises(TypeError, match="must be callable"):
        engine.subscribe(Events.STARTED, 3)  # type: ignore[call-overload]  # that it raises is the point
    with pytest.raises(ValueError, match="register_events"):
        engine.subscribe("NEWS", ignore)
    with pytest.raises(TypeError, match="expected an event"):
        engine.subscribe(3, ignore)  # type: ignore[call-overload]  # likewise

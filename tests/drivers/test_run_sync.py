"""run_sync: the same loop where no event loop runs; and where one must be opened after all."""

import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from traceback import walk_stack
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aengine import Engine, Event, Events, StopReason


def step(engine: Engine[Any, Any], batch: Any) -> Any:
    return batch


async def async_step(engine: Engine[Any, Any], batch: Any) -> Any:
    await checkpoint()
    return batch


def is_in_event_loop() -> bool:
    try:
        anyio.get_current_task()
    except (RuntimeError, LookupError):
        return False
    return True


def test_plain_things_need_neither_an_event_loop_nor_a_thread() -> None:
    seen: list[tuple[int, bool]] = []

    def note(*_: Any) -> None:
        seen.append((threading.get_ident(), is_in_event_loop()))

    engine: Engine[int, None] = Engine(lambda engine, batch: note())
    engine.add_event_handler(Events.ITERATION_COMPLETED, note)

    def data() -> Iterator[int]:
        note()
        yield from range(3)

    before = threading.active_count()
    engine.add_event_handler(Events.COMPLETED, lambda: seen.append((threading.active_count(), False)))
    state = engine.run_sync(data, max_epochs=2)
    *calls, threads = seen
    assert set(calls) == {(threading.get_ident(), False)}
    assert threads[0] == before
    assert (state.iteration, state.epoch) == (6, 2)
    assert state.stop_reason is StopReason.COMPLETED


def test_an_async_step_opens_an_event_loop() -> None:
    assert Engine(async_step).run_sync(range(3)).output == 2


def test_a_step_that_turns_out_to_be_async_opens_one() -> None:
    assert Engine(lambda engine, batch: async_step(engine, batch)).run_sync(range(3)).output == 2  # noqa: PLW0108 -- plain to look at


def test_an_async_handler_opens_one_when_it_is_first_called() -> None:
    seen: list[tuple[str, int]] = []
    in_loop: list[bool] = []

    def plain(engine: Engine[Any, Any]) -> None:
        seen.append(("plain", engine.state.iteration))
        assert not is_in_event_loop()  # after it was opened, too: on the worker

    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED, plain)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    async def handler(engine: Engine[Any, Any]) -> None:
        await checkpoint()
        seen.append(("async", engine.state.iteration))
        in_loop.append(is_in_event_loop())

    engine.run_sync(range(3))
    assert seen == [("plain", 1), ("plain", 2), ("async", 2), ("plain", 3)]
    assert in_loop == [True]


def test_a_subscriber_opens_one() -> None:
    seen: list[int] = []
    engine = Engine(step)

    @engine.subscribe(Events.ITERATION_COMPLETED)
    async def note(event: Event) -> None:
        await checkpoint()
        seen.append(event.iteration)

    for _ in range(2):
        engine.run_sync(range(3))
        assert seen == [1, 2, 3]
        seen.clear()


def test_data_without_a_signature_is_called() -> None:
    """As some of what is written in C: nobody can say what it takes, but it can be called without arguments."""
    with pytest.raises(ValueError, match="the data is empty"):
        Engine(step).run_sync(dict)


def test_a_subscriber_that_comes_in_the_run_handles_what_it_is_sent() -> None:
    seen: list[int] = []

    async def note(event: Event) -> None:
        await checkpoint()
        seen.append(event.iteration)

    engine = Engine(step)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def subscribe(engine: Engine[Any, Any]) -> None:
        engine.subscribe(Events.ITERATION_COMPLETED, note)

    engine.run_sync(range(5))
    assert seen == [3, 4, 5]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_async_data_opens_one(prefetch: int) -> None:
    async def generate() -> AsyncIterator[int]:
        for batch in range(3):
            await checkpoint()
            yield batch

    @asynccontextmanager
    async def manage() -> AsyncIterator[list[int]]:
        yield [0, 1, 2]

    for data in (generate, generate(), manage()):
        assert Engine(step).run_sync(data, prefetch=prefetch).output == 2


def test_prefetch_opens_one() -> None:
    assert Engine(step).run_sync(range(3), prefetch=2).output == 2


def test_prefetch_pulls_batches_beside_the_step() -> None:
    fetching: set[int] = set()
    stepping: set[int] = set()

    def generate() -> Iterator[int]:
        for batch in range(3):
            fetching.add(threading.get_ident())
            yield batch

    engine: Engine[int, None] = Engine(lambda engine, batch: stepping.add(threading.get_ident()))
    engine.run_sync(generate, prefetch=2)
    assert fetching
    assert stepping
    assert fetching.isdisjoint(stepping)


async def test_where_an_event_loop_runs_it_says_what_to_write() -> None:
    with pytest.raises(RuntimeError, match=r"would block the event loop.*await engine\.run"):
        Engine(step).run_sync([1])


def test_errors_come_out_as_they_are() -> None:
    error = ValueError("of the step")

    def fail(engine: Engine[Any, Any], batch: Any) -> None:
        raise error

    async def fail_async(engine: Engine[Any, Any], batch: Any) -> None:
        raise error

    for one in (fail, fail_async):
        engine = Engine(one)
        told: list[BaseException] = []

        @engine.on(Events.EXCEPTION_RAISED)
        def tell(engine: Engine[Any, Any], error: BaseException) -> None:
            told.append(error)  # noqa: B023 -- this engine's

        with pytest.raises(ValueError, match="of the step") as caught:
            engine.run_sync([1])
        assert caught.value is error
        assert told == [error]
        assert engine.state.stop_reason is StopReason.FAILED


def test_ctrl_c_in_a_step_comes_out_and_the_run_can_be_resumed() -> None:
    seen: list[int] = []
    told: list[str] = []

    def interrupted_once(engine: Engine[int, None], batch: int) -> None:
        seen.append(batch)
        if seen == [0, 1]:
            raise KeyboardInterrupt

    engine = Engine(interrupted_once)
    engine.add_event_handler(Events.CANCELLED, told.append, "cancelled")
    with pytest.raises(KeyboardInterrupt):
        engine.run_sync(range(3))
    assert told == ["cancelled"]
    assert engine.state.stop_reason is StopReason.CANCELLED
    engine.run_sync(range(3))
    assert seen == [0, 1, 1, 2]


def test_what_one_way_began_the_other_goes_on_with() -> None:
    seen: list[int] = []
    engine: Engine[int, None] = Engine(lambda engine, batch: seen.append(batch))
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), engine.interrupt)
    engine.run_sync(range(5))
    assert seen == [0, 1]
    anyio.run(engine.run)
    assert seen == [0, 1, 2, 3]
    engine.run_sync()
    assert seen == [0, 1, 2, 3, 4]
    assert engine.state.stop_reason is StopReason.COMPLETED


def test_what_was_interrupted_in_an_event_loop_that_is_gone_says_so() -> None:
    """An event loop closes the async generators that are left when it ends: that is no end of the data."""

    async def generate() -> AsyncIterator[int]:
        for batch in range(5):
            yield batch

    engine = Engine(step)
    with engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt):
        anyio.run(engine.run, generate)
    with pytest.raises(RuntimeError, match="event loop"):
        engine.run_sync()


def test_pause_holds_it_until_another_thread_resumes() -> None:
    engine = Engine(step)
    resumers: list[threading.Thread] = []
    here, begun = threading.get_ident(), threading.Event()

    def resume_what_waits() -> None:
        begun.wait()
        while "wait" not in [frame.f_code.co_name for frame, _ in walk_stack(sys._current_frames()[here])]:
            pass
        assert engine.state.iteration == 2
        engine.resume()

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def pause() -> None:
        engine.pause()
        resumers.append(threading.Thread(target=resume_what_waits))
        resumers[0].start()  # which waits, too
        begun.set()

    assert engine.run_sync(range(3)).iteration == 3
    resumers[0].join()


def test_a_step_without_a_signature_gets_engine_and_batch() -> None:
    """As some of what is written in C: nobody can say what it takes."""
    assert Engine(getattr, name="of C").run_sync(["name"]).output == "of C"


def test_a_subscriber_that_comes_in_the_run_opens_one() -> None:
    engine = Engine(step)
    seen: list[int] = []

    async def note(event: Event) -> None:
        seen.append(event.iteration)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def subscribe() -> None:
        engine.subscribe(Events.ITERATION_COMPLETED, note)

    engine.run_sync(range(4))
    assert seen[-2:] == [3, 4]
    assert engine.state.iteration == 4


def test_an_engine_in_its_own_handler_is_busy() -> None:
    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: engine.run_sync([1]))
    with pytest.raises(RuntimeError, match="one engine runs one loop at a time"):
        engine.run_sync([1])


def test_own_events_reach_plain_handlers_and_subscribers() -> None:
    seen: list[str] = []
    engine: Engine[int, None] = Engine(lambda engine, batch: engine.fire_event("NEWS"))
    engine.register_events("NEWS")
    engine.add_event_handler("NEWS", seen.append, "inline")
    engine.run_sync(range(2))
    assert seen == ["inline"] * 2

    @engine.subscribe("NEWS", buffer=1)
    async def note(event: Event) -> None:
        seen.append("beside")

    engine.run_sync(range(2))
    assert seen.count("inline") == 4
    assert seen.count("beside") == 2


def test_a_loop_that_goes_on_in_an_event_loop_gives_way_to_it_before_its_epoch_ends() -> None:
    engine: Engine[int, int] = Engine(lambda engine, batch: batch)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def come_later(engine: Engine[int, int]) -> None:
        engine.subscribe(Events.ITERATION_COMPLETED, lambda event: engine.terminate(), overflow="drop_new")

    engine.run_sync(range(5_000_000))
    assert 2 < engine.state.iteration < 5_000_000

"""Waiting for iterations to be completed: from any task and event loop; and how many are completed and left."""

import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from support.backends import Backend
from support.record import AnyEngine, Boom, at, double

from aengine import Engine, Events, State

threads = pytest.mark.parametrize("threaded", [True, False], ids=["worker", "loop"])


async def breathe(engine: AnyEngine, batch: Any) -> Any:
    await anyio.lowlevel.checkpoint()
    return batch


@pytest.mark.parametrize("step", [double, breathe])
@threads
async def test_a_task_beside_the_run_is_woken_at_that_iteration(step: Any, *, threaded: bool) -> None:
    engine: AnyEngine = Engine(step, thread=threaded)
    reached: list[tuple[int, int]] = []
    seen = anyio.Event()

    async def wait(count: int) -> None:
        reached.append((count, await engine.wait_completed(count)))
        if count == 3:
            seen.set()

    @engine.on(Events.ITERATION_STARTED(once=5))
    async def hold() -> None:
        await seen.wait()  # so that no more than this is completed when the one that waits for 3 looks

    async with anyio.create_task_group() as tasks:
        for count in (3, 1, 100):
            tasks.start_soon(wait, count)
        await anyio.wait_all_tasks_blocked()
        await engine.run([1, 2, 3, 4], max_epochs=2)
    assert {count: bool(count <= got <= 4) for count, got in reached if count < 100} == {3: True, 1: True}
    assert reached[-1] == (100, 8)  # the run ended first
    assert await engine.wait_completed(8) == 8
    assert [one.name for one in engine.listeners()] == [
        "test_a_task_beside_the_run_is_woken_at_that_iteration.<locals>.hold"
    ]


@pytest.mark.every_event_loop
def test_a_task_of_another_event_loop_is_woken(anyio_backend: Backend) -> None:
    engine: AnyEngine = Engine(breathe)
    began, woken = threading.Event(), threading.Event()
    got: list[int] = []

    async def wait() -> None:
        began.set()
        got.append(await engine.wait_completed(2))
        woken.set()

    async def run() -> None:
        @engine.on(Events.ITERATION_STARTED(once=3))
        async def hold() -> None:
            await anyio.to_thread.run_sync(woken.wait, 60)

        await engine.run([1, 2, 3])

    for backend in ("asyncio", "trio"):
        other = threading.Thread(target=lambda name=backend: anyio.run(wait, backend=name), name="other loop")
        other.start()
        assert began.wait(60)
        anyio.run(run, backend=anyio_backend[0], backend_options=anyio_backend[1])
        other.join(60)
        assert woken.is_set()
        began.clear()
        woken.clear()
        engine.state = State()  # begin anew
    assert got == [2, 2]


@pytest.mark.parametrize("end", ["interrupted", "terminated", "failed", "cancelled", "refused"])
async def test_the_end_of_the_run_wakes_it_however_that_comes(end: str) -> None:
    engine: AnyEngine = Engine(breathe)
    got: list[int] = []
    scope = anyio.CancelScope()

    def fail() -> None:
        raise Boom

    acts = {"interrupted": engine.interrupt, "terminated": engine.terminate, "failed": fail, "cancelled": scope.cancel}

    async def wait() -> None:
        got.append(await engine.wait_completed(10))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        if end == "refused":
            with pytest.raises(ValueError, match="max_epochs="):
                await engine.run([1], max_epochs=0)
        else:
            at(engine, "IC@1/2", acts[end])
            with scope:
                try:
                    await engine.run([1, 2, 3])
                except Boom:
                    assert end == "failed"
    assert got == [0 if end == "refused" else 2]


async def test_a_subscriber_that_waits_for_more_than_comes_does_not_hold_up_the_end() -> None:
    engine: AnyEngine = Engine(breathe)
    got: list[int] = []

    @engine.subscribe(Events.ITERATION_COMPLETED(once=1) | Events.COMPLETED)
    async def wait(_: Any) -> None:
        got.append(await engine.wait_completed(10))

    with anyio.fail_after(20):  # less than the grace
        await engine.run([1, 2, 3])
    assert got == [3, 3]


async def test_prefetched_data_keeps_pace_with_the_steps() -> None:
    """As rollouts do: no further ahead than one batch of what is trained on."""
    ahead: list[int] = []

    async def rollouts() -> AsyncIterator[int]:
        for version in range(8):
            await engine.wait_completed(version - 1)
            ahead.append(version - engine.state.iterations_completed)
            yield version

    engine: AnyEngine = Engine(double)
    await engine.run(rollouts, max_iters=8, prefetch=3)
    assert max(ahead) <= 1


@pytest.mark.parametrize("where", ["step", "handler", "data", "body"])
async def test_what_the_loop_waits_for_cannot_wait_for_the_loop(where: str) -> None:
    async def wait() -> None:
        assert await engine.wait_completed(0) >= 0
        with pytest.raises(RuntimeError, match=r"wait_completed\(9\) waits for the loop, which waits for it here"):
            await engine.wait_completed(9)
        waited.append(True)

    async def step(engine: AnyEngine, batch: Any) -> None:
        if where == "step":
            await wait()

    async def data() -> AsyncIterator[int]:
        if where == "data":
            await wait()
        yield 1

    waited: list[bool] = []
    engine: AnyEngine = Engine(step)
    if where == "handler":
        engine.add_event_handler(Events.ITERATION_COMPLETED, wait)
    if where == "body":
        async with engine.iterate(data) as iterations:
            async for _ in iterations:
                await wait()
    else:
        await engine.run(data)
    assert waited == [True]


async def test_what_waits_can_be_cancelled_and_leaves_nothing() -> None:
    engine: AnyEngine = Engine(double)
    with anyio.move_on_after(0):
        await engine.wait_completed(1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(engine.wait_completed, 1)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert not engine.listeners()
    await engine.run([1])
    wrong: Any = 1.5
    with pytest.raises(ValueError, match="iterations is a whole number"):
        await engine.wait_completed(wrong)


# How many are completed and left


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_epochs": 2}, [(0, 6), (1, 5), (2, 4), (3, 3), (4, 2), (5, 1), (6, 0)]),
        ({"max_iters": 5}, [(0, 5), (1, 4), (2, 3), (3, 2), (4, 1), (5, 0)]),
    ],
)
def test_completed_and_left_are_counted_after_the_step(limits: Any, expected: list[tuple[int, int]]) -> None:
    seen: list[tuple[int, int | None]] = []

    def note(engine: AnyEngine) -> None:
        seen.append((engine.state.iterations_completed, engine.state.iterations_left))

    engine: AnyEngine = Engine(lambda engine, batch: note(engine))
    engine.add_event_handler(Events.COMPLETED, note)
    engine.run_sync([1, 2, 3], **limits)
    assert seen == expected


def test_a_step_that_fails_is_not_completed_and_a_resumed_run_counts_on() -> None:
    engine: AnyEngine = Engine(double)

    def fail() -> None:
        raise Boom

    at(engine, "IS@1/2", fail)
    with pytest.raises(Boom):
        engine.run_sync([1, 2, 3], max_epochs=2)
    assert (engine.state.iteration, engine.state.iterations_completed, engine.state.iterations_left) == (2, 1, 5)
    another: AnyEngine = Engine(double)
    another.load_state_dict(engine.state_dict())
    assert (another.state.iterations_completed, another.state.iterations_left) == (1, 5)
    another.run_sync([1, 2, 3])
    assert (another.state.iterations_completed, another.state.epochs_completed, another.state.iterations_left) == (
        6,
        2,
        0,
    )


def test_what_a_terminated_epoch_has_left_is_not_to_come() -> None:
    engine: AnyEngine = Engine(double)
    left: list[int | None] = []
    at(engine, "IC@1/1", engine.terminate_epoch)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: left.append(engine.state.iterations_left))
    engine.run_sync([1, 2, 3], max_epochs=3)
    assert left == [6, 3, 0]


def test_without_a_length_it_is_not_known_how_many_are_left() -> None:
    left: list[int | None] = []
    engine: AnyEngine = Engine(lambda engine, batch: left.append(engine.state.iterations_left))
    assert engine.state.iterations_left is None
    engine.run_sync(lambda: iter([1, 2]), max_epochs=1)
    assert left == [None, None]


# A state of one's own


def test_filters_count_with_a_state_that_was_assigned() -> None:
    engine: AnyEngine = Engine(double)
    engine.register_events("own", event_to_attr={"own": "owns"})
    fired: list[Any] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED(every=2), lambda: fired.append(engine.state.epoch))
    engine.add_event_handler("own", lambda: fired.append("own"))
    engine.run_sync([1, 2], max_epochs=1)
    engine.state = State(mine=7)
    assert (engine.state.mine, engine.state.owns, engine.state.get_event_attrib_value("own")) == (7, 0, 0)
    engine.run_sync([1, 2], max_epochs=4)
    assert fired == [2, 4]
    assert (engine.state.iteration, engine.state.iterations_completed) == (8, 8)


def test_a_state_can_be_put_back() -> None:
    engine: AnyEngine = Engine(double)
    at(engine, "IC@1/2", engine.terminate)
    first = engine.run_sync([1, 2, 3], max_epochs=2)
    engine.state = State()
    assert engine.run_sync([5]).output == 10
    engine.state = first
    assert engine.run_sync([1, 2, 3]).iteration == 6


def test_an_interrupted_run_is_given_up_for_another_state() -> None:
    engine: AnyEngine = Engine(double)
    at(engine, "IC@1/2", engine.interrupt)
    engine.run_sync([1, 2, 3])
    engine.state = State()
    assert engine.run_sync([1, 2, 3]).iteration == 3


def test_a_state_is_not_exchanged_in_a_run_nor_for_something_else() -> None:
    engine: AnyEngine = Engine(double)
    at(engine, "IC@1/1", lambda: setattr(engine, "state", State()))
    with pytest.raises(RuntimeError, match="is running: assign its state before run"):
        engine.run_sync([1])
    with pytest.raises(TypeError, match=r"engine\.state is an aengine\.State"):
        engine.state = object()  # type: ignore[assignment]

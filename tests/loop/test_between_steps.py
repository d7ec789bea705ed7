"""Events that the loop fires between two steps on request, and snapshots that wait."""

import threading
from typing import Any

import anyio
import pytest
from support.record import AnyEngine, Boom, at, double, record

from aengine import Engine, Event, Events, StopReason
from aengine.bus.listeners import NotYet
from aengine.engine import stateful_listeners


def engine_that_requests(where: str, accepted: list[bool]) -> tuple[AnyEngine, list[str]]:
    """Return an engine in which, at a place, an own event is asked for; and what it fires, that as OWN."""
    engine: AnyEngine = Engine(double)
    engine.register_events("own")
    at(engine, where, lambda: accepted.append(engine.fire_event_soon("own")))
    seen = record(engine)
    engine.add_event_handler("own", lambda engine: seen.append(f"OWN@{engine.state.epoch}/{engine.state.iteration}"))
    return engine, seen


@pytest.mark.parametrize(
    ("where", "before"),
    [
        ("S@0/0", "S@0/0"),
        ("ES@1/0", "ES@1/0"),
        ("GS@1/1", "IC@1/2"),  # a batch is being fetched: not before it has been stepped on
        ("GC@1/1", "IC@1/2"),
        ("IS@1/2", "IC@1/2"),
        ("IC@1/1", "IC@1/1"),
        ("EC@1/2", "EC@1/2"),
        ("DSI@2/2", "IC@2/3"),
        ("EC@2/4", "EC@2/4"),
        ("C@2/4", "C@2/4"),
    ],
)
async def test_it_is_fired_at_the_next_place_between_steps(where: str, before: str) -> None:
    accepted: list[bool] = []
    engine, seen = engine_that_requests(where, accepted)
    await engine.run([1, 2], max_epochs=2)
    assert accepted == [True]
    assert sum(one.startswith("OWN") for one in seen) == 1
    own = next(index for index, one in enumerate(seen) if one.startswith("OWN"))
    assert seen[own - 1] == before


async def test_it_is_fired_in_a_run_that_is_terminated() -> None:
    accepted: list[bool] = []
    engine, seen = engine_that_requests("T", accepted)
    at(engine, "IC@1/1", engine.terminate)
    await engine.run([1, 2])
    assert (seen[-3:], accepted) == (["T@1/1", "C@1/1", "OWN@1/1"], [True])


async def test_it_is_fired_in_a_run_that_fails() -> None:
    accepted: list[bool] = []
    engine, seen = engine_that_requests("EXC", accepted)

    def fail() -> None:
        raise Boom

    at(engine, "IC@1/1", fail)
    with pytest.raises(Boom):
        await engine.run([1, 2])
    assert (seen[-2:], accepted) == (["EXC@1/1", "OWN@1/1"], [True])


async def test_what_its_handler_raises_in_a_run_that_fails_is_raised_with_it() -> None:
    engine: AnyEngine = Engine(double)
    engine.register_events("own")

    def fail(_: AnyEngine) -> None:
        raise Boom("later")

    def fail_first() -> None:
        engine.fire_event_soon("own")
        raise Boom("first")

    engine.add_event_handler("own", fail)
    at(engine, "IS@1/1", fail_first)
    with pytest.raises(ExceptionGroup) as caught:
        await engine.run([1, 2])
    assert [str(one) for one in caught.value.exceptions] == ["first", "later"]


async def test_it_is_fired_before_an_interrupted_run_returns() -> None:
    accepted: list[bool] = []
    engine, seen = engine_that_requests("INT", accepted)
    at(engine, "IC@1/1", engine.interrupt)
    await engine.run([1, 2])
    assert (seen[-2:], accepted) == (["INT@1/1", "OWN@1/1"], [True])
    assert not engine.fire_event_soon("own")
    await engine.run()
    assert engine.state.stop_reason is StopReason.COMPLETED
    assert sum(one.startswith("OWN") for one in seen) == 1


async def test_it_is_fired_where_the_loop_is_paused() -> None:
    engine: AnyEngine = Engine(double)
    engine.register_events("own")
    paused, fired = anyio.Event(), anyio.Event()

    @engine.on(Events.ITERATION_COMPLETED(once=1))
    async def pause() -> None:
        engine.pause()
        paused.set()

    @engine.on("own")
    async def note() -> None:
        assert engine.state.iteration == 1
        fired.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(engine.run, [1, 2])
        await paused.wait()
        assert engine.fire_event_soon("own")
        await fired.wait()
        assert engine.state.iteration == 1
        engine.resume()
    assert engine.state.iteration == 2


async def test_nothing_is_fired_where_no_run_is_under_way() -> None:
    accepted: list[bool] = []
    engine, seen = engine_that_requests("C", accepted)
    assert not engine.fire_event_soon("own")
    await engine.run([1])
    assert not engine.fire_event_soon("own")
    assert [one for one in seen if one.startswith("OWN")] == ["OWN@1/1"]


def test_an_event_that_is_not_registered_is_refused_where_it_is_requested() -> None:
    engine: AnyEngine = Engine(double)
    with pytest.raises(ValueError, match="no event 'own'"):
        engine.fire_event_soon("own")


@pytest.mark.parametrize("threaded", [True, False])
async def test_a_snapshot_that_cannot_be_taken_yet_is_taken_again_where_the_step_runs(
    threaded: bool,  # noqa: FBT001 -- pytest passes it by name
) -> None:
    threads: set[int] = set()

    def step(engine: AnyEngine, batch: int) -> int:
        threads.add(threading.get_ident())
        return batch

    engine: AnyEngine = Engine(step, thread=threaded)
    asked: list[int] = []
    waited: list[int] = []
    got: list[Any] = []

    async def wait() -> None:
        await anyio.lowlevel.checkpoint()
        waited.append(threading.get_ident())

    def snapshot(engine: AnyEngine) -> Any:
        asked.append(engine.state.iteration)
        threads.add(threading.get_ident())
        return engine.state.output if len(asked) % 3 == 0 else NotYet(wait())

    @engine.subscribe(Events.ITERATION_COMPLETED, snapshot=snapshot)
    async def note(event: Event) -> None:
        got.append(event.snapshot)

    await engine.run([10, 20])
    assert asked == [1, 1, 1, 2, 2, 2]
    assert got == [10, 20]
    assert len(threads) == 1
    assert set(waited) == {threading.get_ident()}


class Holder:
    """A handler that has state."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1

    def also(self, _: object) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.count = state_dict["count"]


def test_listeners_that_have_state_are_found_each_once() -> None:
    engine: AnyEngine = Engine(double)
    first, second, third = Holder(), Holder(), Holder()
    engine.add_event_handler(Events.STARTED, first)
    engine.add_event_handler(Events.EPOCH_COMPLETED, first.also)
    engine.add_event_handler(Events.EPOCH_COMPLETED, second.also)
    engine.add_event_handler(Events.EPOCH_COMPLETED, engine.terminate)
    engine.add_event_handler(Events.EPOCH_COMPLETED, double, 1)
    engine.subscribe(Events.ITERATION_COMPLETED, third.also)
    assert stateful_listeners(engine) == [first, second, third]

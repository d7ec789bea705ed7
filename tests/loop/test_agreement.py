"""Several loops that agree: what is requested of one is done by all, before the same step."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import anyio
import pytest
from support.record import AnyEngine, Boom, at, record, record_steps

from aengine import Engine, Events, StopReason
from aengine.engine import session_of
from aengine.loop.agreement import Wishes


class PeerFailed(Exception):
    """What one gets where another has failed."""


class Group:
    """As processes do it with a collective operation: all come to one place, and leave it with the same."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rounds: list[list[Wishes]] = [[]]
        self._all_came = anyio.Event()

    async def agree(self, wishes: Wishes) -> Wishes:
        came, all_came = self.rounds[-1], self._all_came
        came.append(wishes)
        if len(came) == self.size:
            self.rounds.append([])
            self._all_came = anyio.Event()
            all_came.set()
        await all_came.wait()
        if wishes.error is None and any(one.error is not None for one in came):
            raise PeerFailed
        assert len({one.iteration for one in came if one.error is None}) == 1
        return replace(
            wishes,
            has_batch=all(one.has_batch for one in came),
            terminate=any(one.terminate for one in came),
            terminate_epoch=any(one.terminate_epoch for one in came),
            interrupt=any(one.interrupt for one in came),
            pause=any(one.pause for one in came),
            calls=max(one.calls for one in came),
        )


def group_of(
    size: int, data: Callable[[int], Iterable[Any]] = lambda _: [1, 2, 3], *, thread: bool = True
) -> tuple[list[AnyEngine], Callable[..., Any], Group]:
    """Return engines that agree, a function that runs them all and returns what each raised, and their group."""
    group = Group(size)
    engines: list[AnyEngine] = [
        Engine(lambda engine, batch: batch, name=f"rank {rank}", thread=thread) for rank in range(size)
    ]
    for engine in engines:
        session_of(engine).agree_by(group)

    async def run(**limits: int) -> list[BaseException | None]:
        raised: list[BaseException | None] = [None] * size

        async def run_one(rank: int) -> None:
            try:
                await engines[rank].run(data(rank), **limits)
            except (Boom, PeerFailed) as error:
                raised[rank] = error

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for rank in range(size):
                    tasks.start_soon(run_one, rank)
        return raised

    return engines, run, group


both_threads = pytest.mark.parametrize("thread", [True, False], ids=["worker", "loop"])


@both_threads
@pytest.mark.parametrize("where", ["GS@1/1", "GC@1/1", "IS@1/2", "IC@1/2", "EC@1/3", "ES@2/3"])
async def test_termination_of_one_ends_all_before_the_same_step(where: str, *, thread: bool) -> None:
    engines, run, _ = group_of(3, thread=thread)
    at(engines[1], where, engines[1].terminate)
    at(engines[1], where, lambda: terminated.append(engines[1].should_terminate))
    terminated: list[bool] = []
    steps = [record_steps(engine) for engine in engines]
    await run(max_epochs=3)
    assert terminated == [True]
    assert steps[0] == steps[1] == steps[2]
    assert 1 <= len(steps[0]) <= 3
    for engine in engines:
        assert engine.state.stop_reason is StopReason.TERMINATED
    await run()  # and all go on, with the batch that was in hand
    assert [len(one) for one in steps] == [9, 9, 9]
    assert [batch for *_, batch in steps[0]] == [1, 2, 3] * 3


async def test_each_iteration_is_agreed_once_and_each_end_of_the_data() -> None:
    _, run, group = group_of(2, lambda rank: [1, 2, 3])
    await run(max_epochs=2)
    agreed = [(one[0].iteration, one[0].has_batch) for one in group.rounds if one]
    assert agreed == [(1, True), (2, True), (3, True), (4, False), (4, True), (5, True), (6, True)]


async def test_epoch_that_one_terminates_ends_for_all() -> None:
    engines, run, _ = group_of(2)
    at(engines[0], "IC@1/1", engines[0].terminate_epoch)
    seen = [record(engine, "TSE EC") for engine in engines]
    await run(max_epochs=2)
    assert seen == [["TSE@1/1", "EC@1/1", "EC@2/4"]] * 2


async def test_interrupted_all_go_on_where_they_were() -> None:
    engines, run, _ = group_of(2)
    at(engines[0], "IC@1/1", engines[0].interrupt)
    steps = [record_steps(engine) for engine in engines]
    await run(max_epochs=2)
    assert [engine.state.stop_reason for engine in engines] == [StopReason.INTERRUPTED] * 2
    assert [len(one) for one in steps] == [1, 1]
    async with anyio.create_task_group() as tasks:
        for engine in engines:
            tasks.start_soon(engine.run)
    assert [[batch for *_, batch in one] for one in steps] == [[1, 2, 3, 1, 2, 3]] * 2


async def test_pause_of_one_is_a_pause_of_all() -> None:
    engines, run, _ = group_of(2, thread=False)  # so that all is done that can be when all tasks wait
    at(engines[0], "IC@1/2", engines[0].pause)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        for engine in engines:
            await engine.wait_completed(2)
        await anyio.wait_all_tasks_blocked()
        assert [engine.state.iterations_completed for engine in engines] == [2, 2]
        assert [engine.is_paused for engine in engines] == [True, True]
        for engine in engines:
            engine.resume()
    assert [engine.state.iterations_completed for engine in engines] == [3, 3]


@pytest.mark.parametrize("sized", [True, False])
async def test_pass_ends_for_all_where_the_data_of_one_ends(*, sized: bool) -> None:
    def data(rank: int) -> Any:
        batches = [1, 2] if rank else [1, 2, 3, 4]
        return batches if sized else lambda: iter(batches)

    engines, run, _ = group_of(2, data)
    steps = [record_steps(engine) for engine in engines]
    await run(max_epochs=2, **({"epoch_length": 4} if sized else {}))
    expected = [1, 2, 1, 2] * (2 if sized else 1)
    assert [[batch for *_, batch in one] for one in steps] == [expected, expected]
    assert [engine.state.stop_reason for engine in engines] == [StopReason.COMPLETED] * 2


async def test_one_shot_data_keeps_the_batch_that_was_not_stepped_on() -> None:
    iterators = [iter([1, 2, 3, 4]), iter([1, 2])]
    engines, run, _ = group_of(2, lambda rank: iterators[rank])
    with pytest.warns(UserWarning, match="the data ended after 2 of"):
        await run(epoch_length=4)
    steps = record_steps(engines[0])
    session_of(engines[0]).agree_by(None)
    await engines[0].run(iterators[0])
    assert [batch for *_, batch in steps] == [3, 4]


async def test_events_asked_for_of_one_are_fired_by_all_after_the_same_step() -> None:
    """As a save is: the group has the others call it, too."""
    engines, run, group = group_of(2)
    seen: list[tuple[int, int]] = []
    for rank, engine in enumerate(engines):
        engine.register_events("own")
        engine.add_event_handler(
            "own", lambda engine, rank=rank: seen.append((rank, engine.state.iterations_completed))
        )
    agree = group.agree

    class Caller:
        async def agree(self, wishes: Wishes) -> Wishes:
            agreed = await agree(wishes)
            for _ in range(agreed.calls - wishes.calls):
                engines[1].fire_event_soon("own")
            return agreed

    session_of(engines[1]).agree_by(Caller())
    at(engines[0], "IS@1/1", lambda: engines[0].fire_event_soon("own"))
    at(engines[0], "IC@1/1", lambda: engines[0].fire_event_soon("own"))
    await run()
    assert sorted(seen) == [(0, 2), (0, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("where", ["IS@1/2", "EC@1/3", "S@0/0"])
async def test_failure_of_one_ends_all_with_its_reason(where: str) -> None:
    engines, run, group = group_of(3)

    def fail() -> None:
        raise Boom

    at(engines[2], where, fail)
    raised = await run(max_epochs=2)
    assert [type(one) for one in raised] == [PeerFailed, PeerFailed, Boom]
    (error,) = [one.error for came in group.rounds for one in came if one.error is not None]
    assert error is raised[2]
    assert [engine.state.stop_reason for engine in engines] == [StopReason.FAILED] * 3


async def test_failure_of_the_agreement_fails_the_run_and_is_not_agreed_on() -> None:
    class Broken:
        calls = 0

        def agree(self, wishes: Wishes) -> Wishes:
            self.calls += 1
            raise Boom

    engine: AnyEngine = Engine(lambda engine, batch: batch)
    broken = Broken()
    session_of(engine).agree_by(broken)
    with pytest.raises(Boom):
        await engine.run([1, 2])
    assert broken.calls == 1


def test_plain_agreement_needs_no_event_loop_and_sees_the_wishes() -> None:
    class Alone:
        def __init__(self) -> None:
            self.wishes: list[Wishes] = []

        def agree(self, wishes: Wishes) -> Wishes:
            self.wishes.append(wishes)
            return wishes

    engine: AnyEngine = Engine(lambda engine, batch: batch)
    alone = Alone()
    session_of(engine).agree_by(alone)
    seen = record(engine, "T C")
    at(engine, "IC@1/2", lambda: engine.terminate(skip_completed=True))
    engine.run_sync(range(100))
    assert alone.wishes == [Wishes(1), Wishes(2), Wishes(3, terminate=True, skip_completed=True)]
    assert seen == ["T@1/2"]
    engine.pause()  # before a run: a wish like any other
    engine.add_event_handler(Events.STARTED, engine.resume)
    engine.run_sync(range(100))
    assert engine.state.iteration == 100
    assert len(alone.wishes) == 3 + 98


async def test_it_is_not_exchanged_in_a_run() -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    at(engine, "IC@1/1", lambda: session_of(engine).agree_by(None))
    with pytest.raises(RuntimeError, match="is running"):
        await engine.run([1, 2])

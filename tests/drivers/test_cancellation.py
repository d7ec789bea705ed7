"""Cancelled before every step that any task of a run takes, and inside every call of the user's code.

`before_each_step` sees the steps of all tasks of a run: the caller's, the driver's, the subscribers', the prefetcher's.
A test cancels before the first one, then, in a new run, before the second, and so on, until a run has fewer. After each
the same must hold (`Rig.check`), and the run is resumed: every batch is stepped exactly once.
"""

import asyncio
import itertools
import json
import logging
import math
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest
import trio
from anyio.lowlevel import checkpoint, current_token
from support.backends import BACKENDS, Backend
from support.turns import call_and_wait_for_turns

from aengine import Engine, Event, Events, StopReason

ONE_OF_MANY = [pytest.mark.slow, pytest.mark.variant]
ON_ASYNCIO = pytest.mark.parametrize("anyio_backend", [each for each in BACKENDS if each.id != "trio"], indirect=True)
"""For tests of asyncio's own cancellation."""

Act = Callable[[], object]

LENGTH = 2
"""Batches in an epoch."""


# Every step of every task


class Counted(Coroutine[Any, Any, Any]):
    """A task's coroutine that says before each step that it is about to take one."""

    def __init__(self, inner: Any, tick: Act) -> None:
        self._inner = inner
        self._tick = tick

    def send(self, value: Any) -> Any:
        self._tick()
        return self._inner.send(value)

    def throw(self, *error: Any) -> Any:
        self._tick()
        return self._inner.throw(*error)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Any:
        return self._inner.__await__()

    def __getattr__(self, name: str) -> Any:  # cr_running, cr_frame: anyio looks whether it was started
        return getattr(self._inner, name)


class TrioSteps(trio.abc.Instrument):
    def __init__(self, tick: Act, alive: set[Any]) -> None:
        self._tick = tick
        self._alive = alive

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        if task.name != "aengine timer":  # the event loop's own, which outlives the run by some moments
            self._alive.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task in self._alive:
            self._tick()

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        self._alive.discard(task)


@contextmanager
def before_each_step(tick: Act) -> Iterator[set[Any]]:
    """Call `tick` before each step of the tasks begun inside. Gives the set of those that are alive."""
    alive: set[Any] = set()
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        instrument = TrioSteps(tick, alive)
        trio.lowlevel.add_instrument(instrument)
        yield alive
        trio.lowlevel.remove_instrument(instrument)
        return

    def make(loop: asyncio.AbstractEventLoop, inner: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(Counted(inner, tick), loop=loop, **options)
        alive.add(task)
        task.add_done_callback(alive.discard)
        return task

    loop.set_task_factory(make)
    try:
        yield alive
    finally:
        loop.set_task_factory(None)


class Countdown:
    """Acts at the n-th tick, and, if wished, once more at a later one."""

    def __init__(self, n: int, act: Act | None = None, *, again_after: int | None = None) -> None:
        self.ticks = 0
        self.acted = 0
        self.act = act
        self._at = {n} if again_after is None else {n, n + again_after}

    def tick(self) -> None:
        self.ticks += 1
        if self.ticks in self._at:
            self.acted += 1
            assert self.act is not None
            self.act()


# Every call of the user's code


class Touch:
    """Has something done on the event loop from inside the k-th call of the user's code.

    From another thread: the call goes on when the loop has taken some turns after it, so that what was done is
    under way.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0
        self.act: Act = lambda: None
        self._home = threading.get_ident()
        native: Any = current_token().native_token
        self._post = getattr(native, "call_soon_threadsafe", None) or native.run_sync_soon

    def __call__(self) -> None:
        self.calls += 1
        if self.calls != self.at:
            return
        if threading.get_ident() == self._home:
            self.act()
            return
        call_and_wait_for_turns(self._post, self.act)


# The data


class Batches:
    """Data that can be restarted, and counts the iterators that are open."""

    def __init__(self, touch: Act) -> None:
        self.open = 0
        self.touch = touch

    def __len__(self) -> int:
        return LENGTH

    def __iter__(self) -> Iterator[int]:
        self.open += 1
        try:
            for batch in range(LENGTH):
                self.touch()
                yield batch
        finally:
            self.open -= 1


class AsyncBatches:
    def __init__(self, touch: Act) -> None:
        self.open = 0
        self.touch = touch

    def __len__(self) -> int:
        return LENGTH

    async def __aiter__(self) -> AsyncIterator[int]:
        self.open += 1
        is_between = False
        try:
            for batch in range(LENGTH):
                is_between = False
                await checkpoint()
                self.touch()
                is_between = True
                yield batch
            is_between = False
        finally:
            if is_between:  # closed where it waits to be asked: shielded, so this comes back
                await checkpoint()
            self.open -= 1


class EnteredBatches(AsyncBatches):
    """With a task of its own, as a broker's client has one."""

    async def __aenter__(self) -> None:
        self.touch()
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(anyio.sleep_forever)
        self.open += 1

    async def __aexit__(self, *_: object) -> None:
        self.open -= 1
        try:
            self.touch()
        finally:
            self._group.cancel_scope.cancel()
            await self._group.__aexit__(None, None, None)


class AsyncStream:
    """It cannot be restarted: what is lost of it is lost."""

    def __init__(self, touch: Act) -> None:
        self.open = 0
        self.touch = touch
        self._numbers = itertools.count()

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> int:
        await checkpoint()
        self.touch()
        return next(self._numbers)


class Stream:
    def __init__(self, touch: Act) -> None:
        self.open = 0

        def numbers() -> Iterator[int]:
            for number in itertools.count():
                touch()
                yield number

        self.generator = numbers()


# One engine with everything on it


class Case(NamedTuple):
    step: str
    data: str
    prefetch: int
    overflow: Any

    def __str__(self) -> str:
        return "-".join(map(str, self))


STEPS = ("worker", "here", "async")
DATA = {
    "list": list,
    "batches": Batches,
    "async": AsyncBatches,
    "entered": EnteredBatches,
    "stream": Stream,
    "async_stream": AsyncStream,
}
OVERFLOWS = ("wait", "latest", "drop_oldest", "drop_new", "error")
ALL = [Case(*one) for one in itertools.product(STEPS, DATA, (0, 2), OVERFLOWS)]
# Each step with each data; the rest takes turns.
SOME = [
    Case(step, data, 2 * (number // 2 % 2), OVERFLOWS[number % len(OVERFLOWS)])
    for number, (step, data) in enumerate(itertools.product(STEPS, DATA))
]
FEW = [
    Case("worker", "list", 0, "wait"),
    Case("worker", "batches", 2, "latest"),
    Case("worker", "async_stream", 2, "drop_oldest"),
    Case("here", "async", 0, "drop_new"),
    Case("async", "entered", 2, "wait"),
    Case("async", "stream", 0, "error"),
]


def cases(quick: Sequence[Case], slow: Sequence[Case] = ()) -> list[Any]:
    """Return parameters: those of `quick`; and those of `slow` that are not among them, marked so."""
    return [pytest.param(case, id=str(case)) for case in quick] + [
        pytest.param(case, id=str(case), marks=ONE_OF_MANY) for case in slow if case not in quick
    ]


class Rig:
    def __init__(self, case: Case, *, grace: float = 20.0) -> None:
        self.case = case
        self.touch = Touch()
        self.open_data: Any = None
        self.is_stream = case.data.endswith("stream")
        if case.data == "list":
            self.data: Any = list(range(LENGTH))
        else:
            self.open_data = self.data = DATA[case.data](self.touch)
        if case.data == "stream":
            self.data = self.open_data.generator
        self.begun: list[int] = []
        self.stepped: list[int] = []
        self.in_step = 0
        self.fired: list[str] = []
        self.told = 0
        self.may_discard = False
        self.handled: dict[str, list[Event]] = {"beside": [], "in_thread": []}
        self.engine: Engine[int, int] = Engine(
            self.step_async if case.step == "async" else self.step,
            name="tried",
            thread=case.step != "here",
            grace=grace,
        )
        self._listen()

    def step(self, engine: Any, batch: int) -> int:
        self.in_step += 1
        try:
            self.begun.append(batch)
            self.touch()
            self.stepped.append(batch)
            return batch
        finally:
            self.in_step -= 1

    async def step_async(self, engine: Any, batch: int) -> int:
        self.in_step += 1
        try:
            self.begun.append(batch)
            self.touch()
            await checkpoint()
            self.stepped.append(batch)
            return batch
        finally:
            self.in_step -= 1

    def _listen(self) -> None:
        engine = self.engine
        for event in Events:
            engine.add_event_handler(event, self._record, event.name)
        for event in (Events.STARTED, Events.GET_BATCH_STARTED, Events.ITERATION_COMPLETED, Events.COMPLETED):
            engine.add_event_handler(event, self._wait)
        engine.add_event_handler(Events.CANCELLED, self._tell)
        engine.subscribe(
            Events.ITERATION_COMPLETED,
            self._handle,
            buffer=64 if self.case.overflow == "error" else 1,
            overflow=self.case.overflow,
            snapshot=self._snapshot,
            name="beside",
        )
        engine.subscribe(Events.EPOCH_STARTED | Events.EPOCH_COMPLETED, self._handle_in_thread, name="in_thread")

    def _record(self, engine: Any, *rest: Any) -> None:
        self.fired.append(rest[-1])
        if rest[-1] in ("EPOCH_STARTED", "ITERATION_STARTED"):
            self.touch()

    async def _wait(self, engine: Any) -> None:
        await checkpoint()
        self.touch()

    async def _tell(self, engine: Any) -> None:
        await checkpoint()  # shielded, so this comes back
        self.told += 1

    def _snapshot(self, engine: Any) -> int:
        self.touch()
        return int(engine.state.iteration)

    async def _handle(self, event: Event[Any, Any]) -> None:
        assert event.snapshot == event.iteration
        await checkpoint()
        self.touch()
        self.handled["beside"].append(event)

    def _handle_in_thread(self, event: Event) -> None:
        self.touch()
        self.handled["in_thread"].append(event)

    async def run(self, max_epochs: int = 2) -> None:
        epoch_length = LENGTH if self.is_stream else None
        await self.engine.run(self.data, max_epochs, epoch_length=epoch_length, prefetch=self.case.prefetch)

    async def iterate(self) -> None:
        epoch_length = LENGTH if self.is_stream else None
        seen = []
        async with self.engine.iterate(
            self.data, 2, epoch_length=epoch_length, prefetch=self.case.prefetch
        ) as iterations:
            async for event in iterations:
                await checkpoint()
                self.touch()
                seen.append(event.output)
        assert seen == self.stepped

    def expected(self, epochs: int) -> list[int]:
        return list(range(LENGTH * epochs)) if self.is_stream else list(range(LENGTH)) * epochs

    # What must hold

    def check_nothing_is_left(self) -> None:
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("aengine")]
        assert not self.in_step, "a step was abandoned"
        assert self.open_data is None or not self.open_data.open, "an iterator is open"
        statistics = self.engine.statistics()
        assert not statistics.is_running
        for one in statistics.listeners:
            assert one.depth == one.errors == 0
            assert one.accepted == one.handled + one.dropped + one.discarded
            assert self.may_discard or not one.discarded, "what was accepted is handled, within the grace"
            assert one.handled == len(self.handled[one.name])
        for events in self.handled.values():
            assert [one.sequence for one in events] == sorted(one.sequence for one in events)
        assert self.engine.state_dict()["iteration"] == len(self.stepped)

    def check_it_was_told(self) -> None:
        fired, reason = self.fired, self.engine.state.stop_reason
        assert fired.count("EXCEPTION_RAISED") == 0
        if reason is StopReason.COMPLETED:  # it came too late, or in the clean-up
            assert fired[-1] == "COMPLETED"
            assert self.stepped == self.expected(2)
        elif fired:
            assert fired[0] == "STARTED"
            assert fired[-1] == "CANCELLED"
            assert reason is StopReason.CANCELLED
        else:  # before it began, so that nothing was fired; or `run()` was not even called
            assert reason in (None, StopReason.CANCELLED)
        assert self.told == fired.count("CANCELLED") == (bool(fired) and reason is StopReason.CANCELLED)
        assert fired.count("STARTED") == bool(fired)

    async def check_it_goes_on(self) -> None:
        """The loop is usable, and the run resumed steps every batch exactly once."""
        await checkpoint()
        self.fired.clear()
        with anyio.fail_after(30):
            await self.run(max_epochs=3)
        assert self.stepped == self.expected(3)
        assert self.fired[-1] == "COMPLETED"
        assert self.engine.state.stop_reason is StopReason.COMPLETED
        assert self.engine.state.epoch == 3
        self.check_nothing_is_left()


def cancelling() -> int:
    """Return how many native cancellations of this task are pending."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return 0
    return 0 if task is None else task.cancelling()


# A scope around the run


Run = Callable[[Rig], Awaitable[None]]


async def cancel_scope_before_step(case: Case, n: int, run: Run = Rig.run) -> bool:
    """Run, with the scope cancelled before the n-th step of all tasks; says whether there were as many."""
    rig, scope = Rig(case), anyio.CancelScope()
    countdown = Countdown(n, scope.cancel)

    async def job() -> None:
        with scope:
            await run(rig)
        assert cancelling() == 0
        await checkpoint()

    with anyio.fail_after(30), before_each_step(countdown.tick) as alive:
        async with anyio.create_task_group() as group:
            group.start_soon(job)
    assert not alive
    rig.check_nothing_is_left()
    rig.check_it_was_told()
    await rig.check_it_goes_on()
    return countdown.acted > 0


async def at_each(attempt: Callable[[int], Awaitable[bool]]) -> None:
    """Attempt it at each point there is."""
    for n in itertools.count(1):
        try:
            if not await attempt(n):
                assert n > 10, "a run has that many"
                return
        except BaseException as error:
            error.add_note(f"at point {n}")
            raise


@pytest.mark.every_event_loop
@pytest.mark.parametrize("case", cases(FEW, ALL))
async def test_scope_cancelled_before_each_step_of_each_task(case: Case) -> None:
    await at_each(lambda n: cancel_scope_before_step(case, n))


@pytest.mark.parametrize("step", ["worker", pytest.param("async", marks=ONE_OF_MANY)])
async def test_scope_cancelled_before_each_step_around_iterate(step: str) -> None:
    case = Case(step, "async", 2, "wait")
    await at_each(lambda n: cancel_scope_before_step(case, n, Rig.iterate))


async def cancel_scope_in_call(case: Case, k: int) -> bool:
    """Run, with the scope cancelled inside the k-th call of the user's code; says whether there were as many."""
    rig, scope = Rig(case), anyio.CancelScope()
    begun = math.inf

    def cancel() -> None:
        nonlocal begun
        begun = len(rig.begun)
        scope.cancel()

    rig.touch.at, rig.touch.act = k, cancel
    with anyio.fail_after(30), scope:
        await rig.run()
    assert cancelling() == 0
    rig.check_nothing_is_left()
    rig.check_it_was_told()
    if case.step == "worker" and not case.prefetch:
        assert len(rig.begun) <= begun + 1, "the latency of a cancellation is one step"
    await rig.check_it_goes_on()
    return begun < math.inf


@pytest.mark.parametrize("case", cases(FEW[1::2], SOME))
async def test_scope_cancelled_in_each_call_of_the_users_code(case: Case) -> None:
    await at_each(lambda k: cancel_scope_in_call(case, k))


@pytest.mark.every_event_loop
async def test_a_run_inside_a_cancelled_scope_does_nothing_but_say_so() -> None:
    rig = Rig(Case("worker", "entered", 2, "wait"))
    with anyio.CancelScope() as scope:
        scope.cancel()
        await rig.run()
    assert scope.cancelled_caught
    assert rig.touch.calls == 0
    assert rig.engine.state.stop_reason is StopReason.CANCELLED
    rig.check_nothing_is_left()
    await rig.check_it_goes_on()


# asyncio's own cancellation


def needs_asyncio(backend: Backend) -> None:
    if backend[0] != "asyncio":
        pytest.skip("asyncio's own cancellation")


async def cancel_task_before_step(case: Case, n: int, *, again_after: int | None = None, run: Run = Rig.run) -> bool:
    rig = Rig(case)
    countdown = Countdown(n, again_after=again_after)
    with anyio.fail_after(30), before_each_step(countdown.tick) as alive:
        task = asyncio.ensure_future(run(rig))
        countdown.act = task.cancel
        await asyncio.wait([task])
        await checkpoint()
    assert not alive
    assert task.cancelled() == (countdown.acted > 0), "a cancellation goes on, always"
    if not countdown.acted:
        await task
    rig.check_nothing_is_left()
    rig.check_it_was_told()
    await rig.check_it_goes_on()
    return countdown.acted > 0


@pytest.mark.every_event_loop
@ON_ASYNCIO
@pytest.mark.parametrize("case", cases(FEW[::2], ALL))
async def test_task_cancelled_before_each_step_of_each_task(case: Case) -> None:
    await at_each(lambda n: cancel_task_before_step(case, n))


@pytest.mark.every_event_loop
@pytest.mark.covering(2)
@ON_ASYNCIO
@pytest.mark.parametrize("again_after", [1, 3])
@pytest.mark.parametrize("case", cases(FEW[1::4], SOME))
async def test_task_cancelled_twice_before_each_step_of_each_task(case: Case, again_after: int) -> None:
    await at_each(lambda n: cancel_task_before_step(case, n, again_after=again_after))


@ON_ASYNCIO
@pytest.mark.parametrize("step", ["worker", pytest.param("async", marks=ONE_OF_MANY)])
async def test_task_cancelled_before_each_step_around_iterate(step: str) -> None:
    case = Case(step, "async", 2, "wait")
    await at_each(lambda n: cancel_task_before_step(case, n, run=Rig.iterate))


async def cancel_task_in_call(case: Case, k: int, *, times: int) -> bool:
    rig = Rig(case)
    acted = False

    def cancel() -> None:
        nonlocal acted
        acted = True
        for _ in range(times):
            task.cancel()

    rig.touch.at, rig.touch.act = k, cancel
    task = asyncio.ensure_future(rig.run())
    with anyio.fail_after(30):
        await asyncio.wait([task])
    assert task.cancelled() == acted, "a cancellation goes on, always"
    if not acted:
        await task
    rig.check_nothing_is_left()
    rig.check_it_was_told()
    await rig.check_it_goes_on()
    return acted


@pytest.mark.every_event_loop
@pytest.mark.covering(2)
@ON_ASYNCIO
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("case", cases(FEW[1::3], SOME))
async def test_task_cancelled_in_each_call_of_the_users_code(case: Case, times: int) -> None:
    await at_each(lambda k: cancel_task_in_call(case, k, times=times))


@pytest.mark.every_event_loop
@ON_ASYNCIO
@pytest.mark.parametrize("case", cases(FEW))
async def test_timeout_of_asyncio_around_a_run_is_a_timeout(case: Case) -> None:
    rig = Rig(case)

    async def run() -> None:
        async with asyncio.timeout(None) as timeout:
            rig.touch.at = 12
            rig.touch.act = lambda: timeout.reschedule(0)
            await rig.run()

    with pytest.raises(TimeoutError):
        await run()
    assert cancelling() == 0
    rig.check_nothing_is_left()
    rig.check_it_was_told()
    assert rig.engine.state.stop_reason is StopReason.CANCELLED
    await rig.check_it_goes_on()


@pytest.mark.every_event_loop
@ON_ASYNCIO
@pytest.mark.parametrize("case", cases(FEW))
async def test_a_sibling_in_a_task_group_of_asyncio_that_fails_cancels_the_run(case: Case) -> None:
    rig, fail = Rig(case), asyncio.Event()
    rig.touch.at, rig.touch.act = 12, fail.set

    async def sibling() -> None:
        await fail.wait()
        raise OSError("the sibling")

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(rig.run())
            group.create_task(sibling())

    with pytest.raises(ExceptionGroup) as caught:
        await both()
    assert [str(error) for error in caught.value.exceptions] == ["the sibling"]
    rig.check_nothing_is_left()
    rig.check_it_was_told()
    await rig.check_it_goes_on()


async def cancel_every_task_before_step(case: Case, n: int) -> bool:
    """What asyncio.run() does to the tasks that are left when its main one has ended."""
    rig = Rig(case, grace=5)
    countdown = Countdown(n, lambda: [task.cancel() for task in alive])
    with anyio.fail_after(30), before_each_step(countdown.tick) as alive:
        task = asyncio.ensure_future(rig.run())
        await asyncio.wait([task])
        await checkpoint()
    assert not alive
    assert not rig.in_step
    for thread in threading.enumerate():
        if thread.name == "aengine in_thread":  # whose task was cancelled, so that nothing waits for it
            thread.join(30)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("aengine")]
    for one in rig.engine.statistics().listeners:
        assert one.accepted == one.handled + one.dropped + one.discarded
        assert one.depth == 0
    assert task.cancelled() == (countdown.acted > 0), "a cancellation goes on, always"
    return countdown.acted > 0


@ON_ASYNCIO
@pytest.mark.parametrize("case", cases(FEW[1::3], SOME))
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # anyio's own, of one cancelled before it began
async def test_every_task_of_a_run_cancelled_natively_ends_it(case: Case) -> None:
    await at_each(lambda n: cancel_every_task_before_step(case, n))


# Asked to stop, instead


async def terminate_before_step(case: Case, n: int) -> bool:
    rig = Rig(case)
    countdown = Countdown(n, rig.engine.terminate)
    with anyio.fail_after(30), before_each_step(countdown.tick) as alive:
        async with anyio.create_task_group() as group:
            group.start_soon(rig.run)
    assert not alive
    if rig.engine.state.stop_reason is StopReason.COMPLETED:  # it came before the run, or when it was over
        assert rig.stepped == rig.expected(2)
    else:
        assert rig.engine.state.stop_reason is StopReason.TERMINATED
        assert rig.fired[-2:] == ["TERMINATE", "COMPLETED"]
    rig.check_nothing_is_left()
    await rig.check_it_goes_on()
    return countdown.acted > 0


@pytest.mark.parametrize("case", cases(FEW[1::3], SOME))
async def test_terminated_before_each_step_of_each_task(case: Case) -> None:
    await at_each(lambda n: terminate_before_step(case, n))


async def interrupt_before_step(case: Case, n: int, uninterrupted: list[str]) -> bool:
    rig = Rig(case)
    countdown = Countdown(n, rig.engine.interrupt)
    with anyio.fail_after(30), before_each_step(countdown.tick) as alive:
        async with anyio.create_task_group() as group:
            group.start_soon(rig.run)
    assert not alive
    if rig.engine.state.stop_reason is StopReason.INTERRUPTED:
        # The thread that has opened the data is kept, since that may belong to it.
        left = {thread.name for thread in threading.enumerate() if thread.name.startswith("aengine")}
        assert left <= {f"aengine {rig.engine.name}", "aengine-prefetch"}
        assert rig.fired.pop() == "INTERRUPT"
        with anyio.fail_after(30):
            await rig.run()
    assert rig.fired == uninterrupted
    rig.check_nothing_is_left()
    await rig.check_it_goes_on()
    return countdown.acted > 0


@pytest.mark.parametrize("case", cases(FEW[1::3], SOME))
async def test_interrupted_before_each_step_of_each_task(case: Case) -> None:
    plain = Rig(case)
    await plain.run()
    await at_each(lambda n: interrupt_before_step(case, n, plain.fired))


# In special places


@pytest.mark.every_event_loop
async def test_cancelled_while_paused() -> None:
    rig, scope = Rig(Case("worker", "batches", 0, "wait")), anyio.CancelScope()

    async def cancel(engine: Any) -> None:
        engine.pause()
        group.start_soon(when_idle)

    async def when_idle() -> None:
        await anyio.wait_all_tasks_blocked()
        scope.cancel()

    rig.engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), cancel)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            with scope:
                await rig.run()
    assert scope.cancelled_caught
    assert rig.stepped == rig.expected(1)
    rig.check_nothing_is_left()
    rig.check_it_was_told()
    rig.engine.resume()
    await rig.check_it_goes_on()


async def cancel_nested_before_step(step: str, n: int) -> bool:
    """Another engine runs in an async inline handler of the first."""
    case = Case(step, "list", 0, "wait")
    outer, inner, scope = Rig(case), Rig(case), anyio.CancelScope()

    @outer.engine.on(Events.EPOCH_COMPLETED(once=1))
    async def evaluate(engine: Any) -> None:
        await inner.run()

    countdown = Countdown(n, scope.cancel)

    async def job() -> None:
        with scope:
            await outer.run()
        assert cancelling() == 0

    with anyio.fail_after(30), before_each_step(countdown.tick) as alive:
        async with anyio.create_task_group() as group:
            group.start_soon(job)
    assert not alive
    for rig in (outer, inner):
        rig.check_nothing_is_left()
        rig.check_it_was_told()
        await rig.check_it_goes_on()
    return countdown.acted > 0


@pytest.mark.parametrize("step", ["worker", pytest.param("async", marks=ONE_OF_MANY)])
async def test_scope_cancelled_before_each_step_of_nested_runs(step: str) -> None:
    await at_each(lambda n: cancel_nested_before_step(step, n))


@pytest.mark.every_event_loop
@ON_ASYNCIO
@pytest.mark.parametrize("step", STEPS)
async def test_a_stream_loses_no_event_when_its_reader_is_cancelled_natively(step: str) -> None:

    async def attempt(n: int) -> bool:
        rig = Rig(Case(step, "list", 0, "wait"))
        seen: list[int] = []

        async def read() -> None:
            async for event in events:
                seen.append(event.iteration)
                await checkpoint()

        async with rig.engine.stream(Events.ITERATION_COMPLETED, overflow="wait", buffer=1) as events:
            countdown = Countdown(n)
            with before_each_step(countdown.tick):
                reader = asyncio.ensure_future(read())
            countdown.act = reader.cancel
            running = asyncio.ensure_future(rig.run())
            await asyncio.wait([reader])
            if countdown.acted:
                assert reader.cancelled()
                await read()
            await running
        assert seen == [1, 2, 3, 4]
        return countdown.acted > 0

    with anyio.fail_after(30):
        n = 1
        while await attempt(n):
            n += 1
    assert n > 4


@pytest.mark.every_event_loop
@pytest.mark.parametrize("step", STEPS)
async def test_the_time_of_a_hanging_cancelled_handler_is_the_grace(
    step: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(Case(step, "batches", 0, "wait"), grace=0.05)

    async def hang(engine: Any) -> None:
        await anyio.sleep_forever()

    rig.engine.add_event_handler(Events.CANCELLED, hang)
    scope = anyio.CancelScope()
    rig.touch.at, rig.touch.act = 12, scope.cancel
    with anyio.fail_after(30), scope, caplog.at_level(logging.ERROR, "aengine"):
        await rig.run()
    assert scope.cancelled_caught, "a cancellation goes on, always"
    assert "did not end within its 0.05 seconds of grace" in caplog.text
    rig.check_nothing_is_left()
    rig.check_it_was_told()


@pytest.mark.every_event_loop
@pytest.mark.parametrize("native", [False, True], ids=["scope", "native"])
async def test_the_time_of_a_hanging_subscriber_is_the_grace_also_under_cancellation(
    anyio_backend: Backend, caplog: pytest.LogCaptureFixture, *, native: bool
) -> None:
    if native:
        needs_asyncio(anyio_backend)
    rig = Rig(Case("worker", "batches", 0, "wait"), grace=0.05)

    @rig.engine.subscribe(Events.STARTED)
    async def hang(event: Event) -> None:
        await anyio.sleep_forever()

    scope = anyio.CancelScope()

    async def job() -> None:
        with scope:
            await rig.run()

    rig.touch.at = 12
    with anyio.fail_after(30), caplog.at_level(logging.ERROR, "aengine"):
        if native:
            task = asyncio.ensure_future(rig.run())
            rig.touch.act = task.cancel
            await asyncio.wait([task])
            assert task.cancelled(), "a cancellation goes on, always"
        else:
            rig.touch.act = scope.cancel
            await job()
            assert scope.cancelled_caught, "a cancellation goes on, always"
    assert "HandlerTimeout" in caplog.text
    assert "hang" in caplog.text
    assert rig.engine.state.stop_reason is StopReason.CANCELLED
    hung = rig.engine.statistics().listeners[-1]
    assert (hung.accepted, hung.handled, hung.discarded, hung.depth) == (1, 0, 1, 0)


@pytest.mark.every_event_loop
async def test_a_step_that_fails_while_a_cancellation_waits_for_it_is_not_silent() -> None:
    scope, error = anyio.CancelScope(), ValueError("nan")
    touch = Touch()
    touch.at, touch.act = 2, scope.cancel

    def step(engine: Any, batch: int) -> None:
        touch()
        if batch == 2:
            raise error

    engine: Engine[int, None] = Engine(step)
    told: list[BaseException] = []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: told.append(error))
    with anyio.fail_after(30), pytest.raises(ValueError, match="nan") as caught, scope:
        await engine.run([1, 2, 3])
    assert caught.value is error
    assert told == [error]
    assert engine.state.stop_reason is StopReason.FAILED


# Ctrl-C: in a process of its own, whose main thread runs the loop

CTRL_C = """
import json, logging, os, signal, sys, threading
import anyio
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from test_cancellation import Case, Rig

logging.getLogger("aengine.engine").setLevel(logging.ERROR)  # not the warning that a stream may give its batches again

case, times, way, backend, options = json.loads(sys.argv[2])
reports = []


def attempt(k):
    report = {"point": k, "raised": None, "begun": None}

    def act():
        report["begun"] = len(rig.begun)
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    async def first():
        nonlocal rig
        rig = Rig(Case(*case))
        rig.touch.at, rig.touch.act = k, act
        await getattr(rig, way)()

    async def again():
        rig.touch.__init__()
        await rig.check_it_goes_on()

    rig = None
    try:
        anyio.run(first, backend=backend, backend_options=options)
    except KeyboardInterrupt:
        report["raised"] = "KeyboardInterrupt"
    report["begun in all"] = len(rig.begun)
    report["fired"] = rig.fired
    rig.may_discard = backend == "trio"  # which raises it in the subscriber's own code
    rig.check_nothing_is_left()
    rig.check_it_was_told()
    generator = getattr(rig.open_data, "generator", None)
    if generator is None or generator.gi_frame is not None:  # else trio raised it in there, which ends a generator
        anyio.run(again, backend=backend, backend_options=options)
    return report


while not reports or reports[-1]["begun"] is not None:
    reports.append(attempt(len(reports) + 1))
print(json.dumps(reports))
"""


@pytest.mark.every_event_loop
@pytest.mark.parametrize("way", ["run", "iterate"])
@pytest.mark.parametrize("case", cases(FEW[1:2], FEW))
def test_ctrl_c_in_each_call_of_the_users_code(case: Case, way: str, anyio_backend: Backend) -> None:
    """The step in flight is waited for, CANCELLED is told, KeyboardInterrupt comes out, and the run can be resumed."""
    arguments = json.dumps([case, 1, way, *anyio_backend])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CTRL_C, str(Path(__file__).parent), arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    *reports, last = json.loads(done.stdout)
    assert len(reports) > 10
    assert last["raised"] is None
    for report in reports:
        assert report["raised"] == "KeyboardInterrupt", report
        if case.step == "worker" and not case.prefetch:
            assert report["begun in all"] <= report["begun"] + 1, report


SECOND_CTRL_C = """
import json, signal, sys, threading, time
import anyio
from aengine import Engine, stop_on_signals
from aengine.threads.event_loop import EventLoopHandle

(backend, options), where = json.loads(sys.argv[1])
needed = 3 if where == "signals" else 2  # the first one only terminates there


async def main():
    home = EventLoopHandle()

    def step(engine, batch):
        for _ in range(needed):
            for _ in range(10):  # turns of the event loop: the first one has been heard everywhere before the second
                heard = threading.Event()
                home.post(heard.set)
                assert heard.wait(30)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while True:
            home.post(int)  # asyncio sleeps through a signal that comes just before its select()
            time.sleep(0.01)

    engine = Engine(step, name="stuck", grace=0.05)
    if where == "child":
        async with anyio.create_task_group() as group:
            group.start_soon(engine.run, [1])
    elif where == "iterate":
        async with engine.iterate([1]) as iterations:
            async for _ in iterations:
                pass
    elif where == "signals":
        with stop_on_signals(engine):
            await engine.run([1])
        raise KeyboardInterrupt
    else:
        await engine.run([1])


before = signal.getsignal(signal.SIGINT)
try:
    anyio.run(main, backend=backend, backend_options=options)
except KeyboardInterrupt:
    print("interrupted", signal.getsignal(signal.SIGINT) is before)
"""


@pytest.mark.every_event_loop
@pytest.mark.parametrize("where", ["main", "child", "iterate", "signals"])
def test_a_second_ctrl_c_leaves_a_step_that_never_ends(where: str, anyio_backend: Backend) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SECOND_CTRL_C, json.dumps([anyio_backend, where])],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted True\n", "")

"""`at_end=True`: the last state is saved however the run ends, where it is that of an iteration."""

import asyncio
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import pytest
import torch
from support.backends import Backend
from support.record import AnyEngine, Boom
from support.saving_run import Run, Valve, endless, saving, strays, until

from aengine import CheckpointWarning, Engine, Events
from aengine.checkpoint import Checkpoint, Keep
from aengine.handlers import NanGuard

SELDOM = Events.ITERATION_COMPLETED(every=1000, at_end=True)


def saved_at_last(run: Run) -> int:
    """Return the step of the one checkpoint that there is, after a look at what is in it."""
    (info,) = run.checkpoint.list()
    assert not info.is_mid_step
    tree = torch.load(info.path / "state.pt", weights_only=True)
    assert int(tree["state"]["model"]["weight"][0, 0]) == info.step == tree["engine"]["iteration"], "of one iteration"
    return info.step


THIRD = Events.ITERATION_COMPLETED(once=3)


async def _data(run: Run) -> None:
    def failing() -> Iterator[int]:
        yield from range(3)
        raise Boom

    await run.engine.run(failing())


async def _handler(run: Run) -> None:
    run.engine.add_event_handler(THIRD, _boom)
    await run.engine.run(endless)


async def _subscriber(run: Run) -> None:
    run.engine.subscribe(THIRD, lambda event: _boom())
    await run.engine.run(endless)


async def _cancelled(run: Run) -> None:
    with anyio.CancelScope() as scope:

        @run.engine.on(THIRD)
        async def cancel() -> None:
            scope.cancel()

        await run.engine.run(endless)


async def _cancelled_in_an_inline_handler(run: Run) -> None:
    with anyio.CancelScope() as scope:

        @run.engine.on(THIRD)
        async def wait() -> None:
            scope.cancel()
            await anyio.sleep_forever()

        await run.engine.run(endless)


async def _cancelled_in_a_wait_for_data(run: Run) -> None:
    with anyio.CancelScope() as scope:

        async def waiting() -> AsyncIterator[int]:
            for number in range(3):
                yield number
            scope.cancel()
            await anyio.sleep_forever()

        await run.engine.run(waiting())


def _boom() -> None:
    raise Boom


FAILURES = [_data, _handler, _subscriber]
CANCELLATIONS = [_cancelled, _cancelled_in_an_inline_handler, _cancelled_in_a_wait_for_data]
MAY_COME_IN_A_STEP = [_subscriber, _cancelled]

End: TypeAlias = Callable[[Run], Awaitable[None]]


@pytest.mark.every_event_loop
@pytest.mark.covering(2)
@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("end", FAILURES + CANCELLATIONS)
async def test_the_last_state_is_saved_where_the_run_fails_or_is_cancelled(
    end: End, *, thread: bool, tmp_path: Path
) -> None:
    async with saving(tmp_path, thread=thread) as run:
        run.checkpoint.attach(run.engine, SELDOM)
        with warnings.catch_warnings(), pytest.raises(Boom) if end in FAILURES else nullcontext():
            if end in MAY_COME_IN_A_STEP and not thread:
                warnings.simplefilter("ignore", CheckpointWarning)
            await end(run)
        if not run.saved:
            assert end in MAY_COME_IN_A_STEP
            assert not thread
            return
        assert saved_at_last(run) == run.engine.state_dict()["iteration"] >= 3
        (info,) = run.checkpoint.list()
        assert info.event == ("EXCEPTION_RAISED" if end in FAILURES else "CANCELLED")


@pytest.mark.every_event_loop
@pytest.mark.parametrize("how", ["fails", "is cancelled"])
@pytest.mark.parametrize("saved", [None, 2])
async def test_a_step_that_is_cut_is_not_saved_and_that_is_said(how: str, saved: int | None, tmp_path: Path) -> None:
    class Cut(Run):
        async def _async_step(self, engine: AnyEngine, batch: Any) -> float:
            result = await super()._async_step(engine, batch)
            if self.steps == 4:
                if how == "fails":
                    raise Boom
                scope.cancel()
                await anyio.sleep_forever()
            return result

    run = Cut(tmp_path)
    run.checkpoint.attach(run.engine, SELDOM)
    if saved is not None:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=saved))
    last = "the last step that is saved is 2" if saved else "nothing is saved of it"
    with (
        pytest.warns(CheckpointWarning, match=f"in step 4, .* not saved; {last}"),
        pytest.raises(Boom) if how == "fails" else nullcontext(),
        anyio.CancelScope() as scope,
    ):
        await run.engine.run(endless)
    assert run.steps == 4
    assert run.saved == ([] if saved is None else [saved])
    await run.checkpoint.aclose()


async def test_what_is_saved_already_is_not_saved_again_and_nothing_said(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(every=2, at_end=True))

        @run.engine.on(Events.ITERATION_STARTED(once=5))
        def fail() -> None:
            raise Boom

        with pytest.raises(Boom):
            await run.engine.run(endless)
        assert run.saved == [2, 4]


@pytest.mark.parametrize("event", [Events.STARTED, Events.GET_BATCH_STARTED])
async def test_a_run_without_a_step_saves_nothing(tmp_path: Path, event: Events) -> None:
    async with saving(tmp_path / "run") as run:
        run.checkpoint.attach(run.engine, SELDOM)
        run.engine.add_event_handler(event, _boom)
        with pytest.raises(Boom):
            await run.engine.run(endless)
        assert run.saved == []


async def test_without_at_end_nothing_is_saved_of_an_accident(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        handle = run.checkpoint.attach(run.engine, SELDOM)
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(every=1000))
        handle.remove()
        with pytest.raises(Boom):
            await _data(run)
        assert run.saved == []


@pytest.mark.parametrize("when_busy", ["wait", "skip"])
async def test_the_save_before_is_waited_for(tmp_path: Path, when_busy: str) -> None:
    async with saving(tmp_path, thread=True, when_busy=when_busy) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(every=2, at_end=True))
        run.valve.is_open.clear()
        run.engine.add_event_handler(Events.EXCEPTION_RAISED, run.valve.is_open.set)
        with pytest.raises(Boom):
            await _handler(run)
        assert run.saved == [2, 3]


async def test_a_state_that_a_guard_refuses_is_not_saved_and_its_error_is_the_only_one(tmp_path: Path) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    NanGuard(every=1).attach(engine)
    async with Checkpoint(tmp_path, {"model": torch.nn.Linear(1, 1)}) as checkpoint:
        checkpoint.attach(engine, SELDOM)
        with (
            pytest.warns(CheckpointWarning, match="could not be saved: FloatingPointError"),
            pytest.raises(FloatingPointError),
        ):
            await engine.run([1.0, 2.0, float("nan")])
        assert checkpoint.list() == []


async def test_a_disk_that_fails_at_the_end_is_warned_of_beside_what_ended_the_run(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, SELDOM)
        run.valve.error = OSError(28, "No space left on device")
        with (
            pytest.warns(CheckpointWarning, match="its last state was not saved: .*No space left"),
            pytest.raises(Boom),
        ):
            await _data(run)
        assert run.saved == []
        await run.checkpoint.flush()


class Endless(Valve):
    """Writes on until it is stopped, without a byte."""

    def write(self, tree: Any, file: Any) -> None:
        while True:
            file.write(b"")


async def test_it_has_the_grace_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, grace=0.05, valve=Endless(), thread=True)
    run.checkpoint.attach(run.engine, SELDOM)
    with anyio.fail_after(30):
        await _cancelled(run)
    assert "0.05 seconds of grace" in caplog.text
    await until(lambda: strays(tmp_path) == [])
    await run.checkpoint.aclose()
    assert run.saved == []


@pytest.mark.every_event_loop
@pytest.mark.parametrize("thread", [False, True])
async def test_a_native_cancellation_saves_it_too(tmp_path: Path, *, thread: bool, anyio_backend: Backend) -> None:
    if anyio_backend[0] != "asyncio":
        pytest.skip("trio has no such thing")
    async with saving(tmp_path, thread=thread) as run:
        run.checkpoint.attach(run.engine, SELDOM)
        task = asyncio.create_task(run.engine.run(endless))
        cancel: Callable[[], object] = task.cancel
        loop = asyncio.get_running_loop()
        run.engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: loop.call_soon_threadsafe(cancel))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            with pytest.raises(asyncio.CancelledError):
                await task
        if thread:
            assert saved_at_last(run) == run.engine.state_dict()["iteration"] >= 3


async def test_a_resumed_run_goes_on_from_the_end(tmp_path: Path) -> None:
    async with saving(tmp_path, keep=Keep(last=2)) as run:
        run.checkpoint.attach(run.engine, SELDOM)
        with pytest.raises(Boom):
            await _data(run)
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, SELDOM)
        info = await run.restore()
        assert info is not None
        assert info.step == run.steps == 3
        with pytest.raises(Boom):
            await run.engine.run(_failing_at_once)
        assert run.saved == [3], "which is saved already"


def _failing_at_once() -> Iterator[int]:
    raise Boom
    yield 0

"""Saves that are asked for as runs begin, end, fail and are given up: no request waits for ever, nothing is torn."""

import asyncio
import threading
from pathlib import Path
from typing import Any, BinaryIO

import anyio
import pytest
import torch
from anyio.lowlevel import checkpoint as breathe
from support.record import AnyEngine, Boom
from support.saving_run import Run, Valve, endless, saving, until

from aengine import Engine, Event, Events, HandlerTimeout
from aengine.checkpoint import Checkpoint, CheckpointEvents, Keep, TorchFile
from aengine.checkpoint.events import REQUESTED
from aengine.drivers.services import ServiceTasks
from aengine.errors import CheckpointNotWritten, StrayCancellation

pytestmark = pytest.mark.every_event_loop

DISK_FULL = OSError(28, "No space left on device")


def tree_of(checkpoint: Checkpoint, step: int) -> Any:
    info = next(info for info in checkpoint.list() if info.step == step)
    return torch.load(info.path / "state.pt", weights_only=True)


# No request waits for ever


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # anyio's own, of one cancelled before it began
async def test_a_request_to_a_run_that_dies_before_its_first_event_is_refused(
    tmp_path: Path, anyio_backend_name: str
) -> None:
    """A task that is cancelled natively before its first step runs not a line."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio begins every task")
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)

        async def ask() -> None:
            with pytest.raises(CheckpointNotWritten, match="the run ended before"):
                await run.checkpoint.save()

        def tasks_of_the_run() -> list[Any]:
            return [task for task in asyncio.all_tasks() if task.get_name() == "aengine saved"]

        running = asyncio.create_task(run.engine.run([1, 2]))
        await until(lambda: bool(tasks_of_the_run()))
        asking = asyncio.create_task(ask())
        tasks_of_the_run()[0].cancel()
        with pytest.raises(StrayCancellation):
            await running
        assert not run.engine.fire_event_soon(REQUESTED)
        with anyio.fail_after(60):
            await asking


async def test_a_request_to_a_run_that_is_abandoned_is_refused(tmp_path: Path) -> None:
    """As after a second Ctrl-C, in the middle of a step that does not end."""
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        services = ServiceTasks(run.engine, run.engine._session.services, 0)
        with run.engine._session.busy():
            run.engine._requests.begin()
            services.run_started(lambda error: None)  # and from here on the loop is not advanced
            async with anyio.create_task_group() as group:

                async def ask() -> None:
                    for _ in range(2):  # and of what is left of that run
                        with pytest.raises(CheckpointNotWritten, match="the run ended before"):
                            await run.checkpoint.save()
                    told.set()

                told = anyio.Event()
                group.start_soon(ask)
                await until(lambda: bool(run.checkpoint._saver._requests))
                services.close(None)
                with anyio.fail_after(60):
                    await told.wait()


async def test_a_request_as_the_directory_turns_out_to_be_taken_is_refused(tmp_path: Path) -> None:
    async with saving(tmp_path) as other:
        other.checkpoint.attach(other.engine, Events.COMPLETED)
        await other.engine.run([1])
        run = Run(tmp_path)
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        async with anyio.create_task_group() as group:

            async def ask() -> None:
                with pytest.raises(CheckpointNotWritten):
                    await run.checkpoint.save()

            async def ask_first(_: AnyEngine) -> None:
                group.start_soon(ask)
                await until(lambda: bool(run.checkpoint._saver._requests))

            # Before the Checkpoint's own handler of STARTED, which fails.
            topic = run.engine._emitter.bus.topic("STARTED")
            run.engine.add_event_handler(Events.STARTED, ask_first)
            topic.inline = topic.inline[::-1]
            topic._choose_dispatch()
            with pytest.raises(Exception, match="in use by another Checkpoint"), anyio.fail_after(60):
                await run.engine.run([1])
        await run.checkpoint.aclose()


async def test_a_request_to_a_checkpoint_that_is_closed_is_refused(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=1))
        run.engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), run.engine.pause)
        async with anyio.create_task_group() as group:
            group.start_soon(run.engine.run, [1, 2, 3])
            await until(lambda: run.engine.state.iteration == 2)
            await run.checkpoint.flush()
            await run.checkpoint.aclose()
            with pytest.raises(RuntimeError, match="is attached to no engine"), anyio.fail_after(60):
                await run.checkpoint.save()
            run.engine.resume()


async def test_save_soon_that_is_overtaken_by_detaching_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with saving(tmp_path) as run:
        handle = run.checkpoint.attach(run.engine)

        def ask_and_leave() -> None:
            run.checkpoint.save_soon()
            handle.remove()

        run.engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), ask_and_leave)
        await run.engine.run([1, 2, 3])
        assert run.saved == []
        assert "detached before a save that was asked for" in caplog.text


async def test_the_body_of_an_iteration_is_advised_to_save_soon(tmp_path: Path) -> None:
    """The loop waits for it, as for an inline handler."""
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        with anyio.fail_after(60):
            async with run.engine.iterate([1, 2, 3]) as iterations:
                async for event in iterations:
                    if event.iteration == 2:
                        with pytest.raises(RuntimeError, match=r"save_soon\(\)"):
                            await run.checkpoint.save()
                        run.checkpoint.save_soon()
        assert run.saved == [2, 3]


# Nothing is torn


async def test_a_run_that_begins_while_a_save_is_waited_for_is_saved_between_its_steps(tmp_path: Path) -> None:
    """A request made between runs, that had to wait, meets another run: it gets no half of its step."""
    inside, goes_on = threading.Event(), threading.Event()
    valve = Valve()
    model = torch.nn.Linear(1, 1)

    def step(engine: AnyEngine, batch: int) -> None:
        with torch.no_grad():
            model.weight.fill_(batch)
            inside.set()
            assert goes_on.wait(60)
            model.bias.fill_(batch)

    engine: AnyEngine = Engine(step)
    async with Checkpoint(tmp_path, {"model": model}, serializer=valve) as checkpoint:
        checkpoint.attach(engine, Events.EXCEPTION_RAISED)
        valve.is_open.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(checkpoint.save)
            await until(valve.begun.is_set)
            group.start_soon(checkpoint.save)
            for _ in range(10):
                await breathe()
            group.start_soon(engine.run, [7])
            await until(inside.is_set)
            valve.is_open.set()
            for _ in range(10):
                await breathe()
            await until(lambda: checkpoint.last_saved is not None and not checkpoint._saver.under_way)
            for _ in range(10):
                await breathe()
            goes_on.set()
        assert [info.step for info in checkpoint.list()] == [0, 1]
        saved = tree_of(checkpoint, 1)["state"]["model"]
        assert saved["weight"].item() == saved["bias"].item() == 7


@pytest.mark.parametrize("way", ["in the step", "from another task", "in an inline handler"])
async def test_event_of_ones_own_in_the_middle_of_a_step_is_saved_after_it(way: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    inside, goes_on = threading.Event(), threading.Event()
    later: list[int] = []

    def step(engine: AnyEngine, batch: int) -> None:
        with torch.no_grad():
            model.weight.fill_(batch)
        if batch == 2 and way == "in the step":
            engine.fire_event("own")
        if batch == 2 and way == "from another task":
            inside.set()
            assert goes_on.wait(60)
        with torch.no_grad():
            model.bias.fill_(batch)

    engine: AnyEngine = Engine(step)
    engine.register_events("own")

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    async def emit() -> None:
        if way == "in an inline handler":
            await engine.emit("own")

    @engine.on(Events.ITERATION_COMPLETED)
    def draw() -> None:
        later.append(0)
        with torch.no_grad():
            model.bias.add_(1)

    async with Checkpoint(tmp_path, {"model": model}) as checkpoint:
        checkpoint.attach(engine, "own")
        async with anyio.create_task_group() as group:
            group.start_soon(engine.run, [1, 2, 3])
            if way == "from another task":
                await until(inside.is_set)
                await engine.emit("own")
                goes_on.set()
        (info,) = checkpoint.list()
        assert (info.step, info.event) == (2, "own")
        saved = tree_of(checkpoint, 2)["state"]["model"]
        assert (saved["weight"].item(), saved["bias"].item()) == (2, 3)


@pytest.mark.parametrize(
    "event", ["GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED", "DATALOADER_STOP_ITERATION"]
)
async def test_due_in_the_middle_of_an_iteration_is_saved_at_its_end_and_resumed_bitwise(
    event: str, tmp_path: Path
) -> None:
    """The data has drawn by then, and what it drew would not come again."""

    class Run:
        def __init__(self) -> None:
            torch.manual_seed(1)
            self.seen: list[float] = []
            self.engine: AnyEngine = Engine(self.step)
            self.checkpoint = Checkpoint(tmp_path, {"run": self}, keep=Keep(every_n=1))
            self.checkpoint.attach(self.engine, Events[event])

        def step(self, engine: AnyEngine, batch: Any) -> None:
            self.seen.append(batch[0].item() + torch.rand(1).item())

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state_dict: Any) -> None:
            self.seen = list(state_dict["seen"])

        async def run(self, step: int | None = None) -> list[float]:
            data = torch.utils.data.TensorDataset(torch.arange(3.0))
            async with self.checkpoint as checkpoint:
                if step is not None:
                    await checkpoint.restore(step)
                await self.engine.run(torch.utils.data.DataLoader(data, shuffle=True), max_epochs=3)
            return self.seen

    whole = Run()
    await whole.run()
    for info in whole.checkpoint.list():
        assert await Run().run(info.step) == whole.seen, f"from step {info.step}"


async def test_epoch_that_is_to_end_is_saved_when_it_has_ended(tmp_path: Path) -> None:
    """That it was asked to end would not be known to the run that is restored: it would finish the epoch."""
    seen: list[tuple[int, int]] = []

    async def step(engine: AnyEngine, batch: int) -> None:
        seen.append((engine.state.epoch, engine.state.iteration))
        if engine.state.iteration == 2:
            engine.terminate_epoch()

    engine: AnyEngine = Engine(step)
    async with Checkpoint(tmp_path, {}) as checkpoint:
        checkpoint.attach(engine, Events.ITERATION_COMPLETED(once=2))
        await engine.run([1, 2, 3, 4], max_epochs=2)
        whole = list(seen)
        assert [info.step for info in checkpoint.list()] == [2]
    engine = Engine(step)
    del seen[2:]
    async with Checkpoint(tmp_path, {}) as checkpoint:
        checkpoint.attach(engine)
        await checkpoint.restore()
        await engine.run([1, 2, 3, 4])
    assert seen == whole


@pytest.mark.parametrize("saved_at", [Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED])
async def test_accident_in_the_first_step_of_an_epoch_does_not_replace_what_is_saved(
    saved_at: Events, tmp_path: Path
) -> None:
    async def train(*, restore: bool) -> None:
        run = Run(tmp_path)
        run.checkpoint.attach(run.engine, saved_at | Events.EXCEPTION_RAISED)
        fails = run.engine.add_event_handler(Events.ITERATION_STARTED(once=3), lambda: run._step(run.engine, 0))
        run.engine.add_event_handler(Events.ITERATION_STARTED(once=3), fail)
        async with run.checkpoint:
            if restore:
                await run.restore(required=True)
            assert run.steps == run.engine.state.iteration
            with pytest.raises(Boom):
                await run.engine.run([1, 2], max_epochs=2)
            assert run.saved[-1:] == [2]
            assert tree_of(run.checkpoint, 2)["state"]["model"]["weight"][0, 0].item() == 2
            fails.remove()

    def fail() -> None:
        raise Boom

    await train(restore=False)
    await train(restore=True)  # and so it is when it was not saved, but restored


# Nothing is silent, and what failed in one run is not held against the next


async def test_interrupted_run_is_saved_again_after_a_save_between_that_failed(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED)
        run.engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), run.engine.interrupt)
        await run.engine.run([1, 2, 3])
        run.valve.error = DISK_FULL
        with pytest.raises(CheckpointNotWritten, match="No space left"):
            await run.checkpoint.save()
        await run.engine.run()
        assert run.saved == [1, 2, 3]


async def test_error_of_a_save_between_runs_that_was_not_reported_fails_the_next_one(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED)
        run.valve.is_open.clear()
        run.valve.error = DISK_FULL
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(run.checkpoint.save)
                await until(run.valve.begun.is_set)
                scope.cancel()
        run.valve.is_open.set()
        with pytest.raises(CheckpointNotWritten, match="of step 0"):
            await run.engine.run([1, 2])
        await run.engine.run([1, 2])  # it has been told of
        assert run.saved == [2]


async def test_save_that_was_given_up_with_one_run_does_not_keep_the_next_from_saving(tmp_path: Path) -> None:
    async with saving(tmp_path, grace=0.01) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        run.valve.is_open.clear()
        with pytest.raises(HandlerTimeout):
            await run.engine.run([1])
        run.engine._session._grace = 30.0
        run.engine.add_event_handler(Events.STARTED, run.valve.is_open.set)  # it ends when the next run has begun
        await run.engine.run([1, 2])
        assert run.saved == [2]


async def test_handler_of_staged_that_fails_does_not_give_up_the_save(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=1))

        @run.engine.on(CheckpointEvents.CHECKPOINT_STAGED)
        async def fail() -> None:
            raise Boom

        with pytest.raises(Boom):
            await run.engine.run(endless)
        assert run.saved == [1]


async def test_inbox_that_is_full_between_runs_does_not_fail_a_save(tmp_path: Path) -> None:
    heard: list[int] = []

    async def note(event: Event) -> None:
        heard.append(event.iteration)

    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.EXCEPTION_RAISED)
        run.engine.subscribe(CheckpointEvents.CHECKPOINT_COMMITTED, note, buffer=1)
        for revision in (1, 2, 3):
            info = await run.checkpoint.save()
            assert (info.step, info.revision) == (0, revision)


async def test_number_that_is_no_float_is_no_reason_not_to_save(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        run.engine.state.metrics.update(loss=0.5, huge=10**400)
        await run.engine.run([1])
        (info,) = run.checkpoint.list()
        assert dict(info.metrics) == {"loss": 0.5}


async def test_with_skip_what_is_put_off_is_skipped_and_what_is_asked_for_is_not(tmp_path: Path) -> None:
    async with saving(tmp_path, when_busy="skip") as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_STARTED)
        run.engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), run.checkpoint.save_soon)
        run.valve.is_open.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(run.engine.run, [1, 2, 3])
            await until(lambda: run.engine.state.iteration == 3)
            run.valve.is_open.set()
        assert run.checkpoint.statistics().skipped == 1
        assert run.saved == [1, 3]


async def test_restoring_waits_for_the_save_under_way(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        await run.engine.run([1])
        run._step(run.engine, 0)
        run.valve.is_open.clear()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(run.checkpoint.save)
                await until(lambda: run.checkpoint._saver.under_way is not None)
                scope.cancel()
        async with anyio.create_task_group() as group:
            group.start_soon(run.restore)
            for _ in range(10):
                await breathe()
            run.valve.is_open.set()
        assert run.steps == 2


async def test_two_checkpoints_of_one_engine_serve_their_own_requests(tmp_path: Path) -> None:
    async with saving(tmp_path / "one") as run, Checkpoint(tmp_path / "other", {"model": run.model}) as other:
        run.checkpoint.attach(run.engine, Events.COMPLETED)
        other.attach(run.engine, Events.EXCEPTION_RAISED)
        run.engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), run.engine.pause)
        async with anyio.create_task_group() as group:
            group.start_soon(run.engine.run, [1, 2])
            await until(lambda: run.engine.state.iteration == 1)
            assert (await other.save()).step == 1
            run.engine.resume()
        assert (run.saved, [info.step for info in other.list()]) == ([2], [1])


class FailsAtThird(TorchFile):
    written = 0

    def write(self, tree: Any, file: BinaryIO) -> None:
        self.written += 1
        if self.written == 3:
            raise OSError(*DISK_FULL.args)
        super().write(tree, file)


async def test_save_that_failed_is_not_said_to_be_committed_where_the_checkpoint_is_closed_meanwhile(
    tmp_path: Path,
) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: None)
    serializer = FailsAtThird()
    checkpoint = Checkpoint(tmp_path, torch.nn.Linear(1, 1), serializer=serializer)
    checkpoint.attach(engine, Events.ITERATION_COMPLETED)
    is_closed = anyio.Event()
    committed: list[Event] = []

    async def wait_until_closed(_: object) -> None:
        await is_closed.wait()

    engine.subscribe(CheckpointEvents.CHECKPOINT_STAGED, wait_until_closed, buffer=1)  # is full at the third
    engine.subscribe(CheckpointEvents.CHECKPOINT_COMMITTED, committed.append)

    async def run() -> None:
        with pytest.raises(CheckpointNotWritten):
            await engine.run(range(4))

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await until(lambda: serializer.written == 3 and checkpoint._saver.under_way is None)
        with pytest.raises(CheckpointNotWritten):
            await checkpoint.aclose()
        is_closed.set()
    assert len(committed) == len(checkpoint.list()) == 2

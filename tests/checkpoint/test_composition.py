"""What a Checkpoint adds to an engine, by name, and what its rooms may load."""

import subprocess
import sys
from pathlib import Path

import anyio
from support.record import AnyEngine
from support.saving_run import saving, until

from aengine import Events, Service, StopReason
from aengine.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]


async def test_statistics_name_what_it_adds_by_its_role(tmp_path: Path) -> None:
    async with saving(tmp_path) as run, Checkpoint(tmp_path / "best", {"model": run.model}) as best:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(every=2) | Events.COMPLETED)
        best.attach(run.engine, Events.COMPLETED)
        await run.engine.run([1, 2, 3])
        shown = run.engine.statistics()
        assert [one.name for one in shown.listeners] == [
            f"checkpoint: save on request ({tmp_path})",
            f"checkpoint: save at ITERATION_COMPLETED(every=2) ({tmp_path})",
            f"checkpoint: save at COMPLETED ({tmp_path})",
            f"checkpoint: save on request ({tmp_path}/best)",
            f"checkpoint: save at COMPLETED ({tmp_path}/best)",
        ]
        assert [one.name for one in shown.services] == [f"checkpoint ({tmp_path})", f"checkpoint ({tmp_path}/best)"]
        assert set(shown.handlers) == {f"checkpoint: lock ({tmp_path})", f"checkpoint: lock ({tmp_path}/best)"}


async def test_a_run_waits_at_its_end_for_a_save_that_was_begun_before_it(tmp_path: Path) -> None:
    """What had asked for it was cancelled, and so nothing else waits for it."""
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.EXCEPTION_RAISED)
        run.valve.is_open.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(run.checkpoint.save)
            await until(run.valve.begun.is_set)
            group.cancel_scope.cancel()
        async with anyio.create_task_group() as group:
            group.start_soon(run.engine.run, [1, 2])
            await until(lambda: run.engine.state.times["COMPLETED"] is not None)
            assert run.engine.is_running
            run.valve.is_open.set()
        assert run.saved == [0]


async def test_a_request_when_the_loop_has_ended_and_its_run_has_not_is_served_at_once(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:

        class Asks(Service):
            async def run_ended(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:
                assert run.engine.is_running
                with anyio.fail_after(60):
                    assert (await run.checkpoint.save()).step == 2

        run.checkpoint.attach(run.engine, Events.EXCEPTION_RAISED)
        run.engine.add_service(Asks())
        await run.engine.run([1, 2])
        assert run.saved == [2]


def test_the_store_loads_no_torch() -> None:
    """Not through what it imports either: a directory is listed, verified and pinned at once."""
    rooms = [path.stem for path in (ROOT / "aengine/checkpoint/store").glob("[!_]*.py")]
    loaded = loaded_by(f"from aengine.checkpoint.store import {', '.join(rooms)}")
    assert {f"aengine.checkpoint.store.{room}" for room in rooms} <= loaded
    assert not loaded & {"torch", "numpy", "aengine.checkpoint.capture", "aengine.checkpoint.formats"}


def test_what_captures_state_loads_nothing_that_touches_the_disk() -> None:
    rooms = [path.stem for path in (ROOT / "aengine/checkpoint/capture").glob("[!_]*.py")]
    loaded = loaded_by(f"from aengine.checkpoint.capture import {', '.join(rooms)}")
    there = {name for name in loaded if name.startswith(("aengine.checkpoint.store.", "aengine.checkpoint.formats"))}
    # What `aengine.checkpoint` itself offers, which does no I/O.
    assert there <= {"aengine.checkpoint.store.manifest", "aengine.checkpoint.store.retention"}


def loaded_by(statement: str) -> set[str]:
    command = [sys.executable, "-c", f"{statement}; import sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

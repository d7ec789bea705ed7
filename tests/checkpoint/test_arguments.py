"""What a Checkpoint is given: refused at the call that was wrong, with what to write instead."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.saving_run import saving

from aengine import Engine, EventEnum, Events
from aengine.checkpoint import Checkpoint, TorchFile


class Nameless:
    write = read = None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keep": 3}, r"keep= is a Keep, such as Keep\(last=3\), got 3"),
        ({"keep": 0}, "keep= is a Keep"),
        ({"serializer": "torch"}, r"serializer= is an object with .*, such as TorchFile\(\), got 'torch'"),
        ({"serializer": TorchFile}, r"such as TorchFile\(\), got <class"),
        ({"serializer": Nameless()}, "serializer= is an object with a name and the methods"),
        ({"serializer": ""}, "serializer= is an object with a name and the methods"),
        ({"directory": torch.nn.Linear(1, 1)}, r"Checkpoint\(directory, state\) takes a path first, got Linear"),
        ({"directory": None}, "takes a path first, got NoneType"),
    ],
)
def test_wrong_types_are_refused_where_they_are_handed_in(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        Checkpoint(**{"directory": tmp_path, "state": {}, **wrong})


async def test_what_is_no_engine_is_neither_attached_nor_restored(tmp_path: Path) -> None:
    engine: Any = Engine(lambda engine, batch: None)
    completed: Any = Events.COMPLETED
    model: Any = torch.nn.Linear(1, 1)
    checkpoint = Checkpoint(tmp_path, {})
    restore: Any = checkpoint.restore
    with pytest.raises(TypeError, match=r"attach\(engine\) takes an Engine of aengine.s first, got .*Events"):
        checkpoint.attach(completed, engine)
    with pytest.raises(TypeError, match=r"takes no engine.*call  checkpoint\.attach\(engine, event\)"):
        await checkpoint.restore(engine)
    with pytest.raises(TypeError, match=r"takes which by position, .*; its engine is the one that it is attached to"):
        await restore(engine, 500)
    with pytest.raises(RuntimeError, match=r"is attached to no engine: call  checkpoint\.attach"):
        await checkpoint.restore()
    with pytest.raises(TypeError, match="expected an event"):
        checkpoint.attach(engine, model)
    checkpoint.attach(Engine(lambda engine, batch: None), Events.COMPLETED)  # it serves none of those
    with pytest.raises(RuntimeError, match="is gone: keep it in a variable"):
        await checkpoint.restore()


async def test_attaching_that_is_refused_attaches_nothing(tmp_path: Path) -> None:
    class Unknown(EventEnum):
        HERE = "here"

    engine: Engine[int, None] = Engine(lambda engine, batch: None)
    async with Checkpoint(tmp_path, torch.nn.Linear(1, 1)) as checkpoint:
        with pytest.raises(ValueError, match="has no event 'HERE'"):
            checkpoint.attach(engine, Events.COMPLETED | Unknown.HERE)
        await engine.run([1])
        assert checkpoint.list() == []
        checkpoint.attach(engine, Events.COMPLETED)
        await engine.run([1])
        assert [info.step for info in checkpoint.list()] == [1]


async def test_it_is_attached_to_an_event_once_and_to_others_as_well(tmp_path: Path) -> None:
    async with saving(tmp_path) as run:
        every = Events.ITERATION_COMPLETED(every=2)
        handle = run.checkpoint.attach(run.engine, every)
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED(once=3) | Events.EPOCH_COMPLETED)
        for again in (
            every,
            Events.ITERATION_COMPLETED(every=2),
            "EPOCH_COMPLETED",
            Events.COMPLETED | Events.COMPLETED,
        ):
            with pytest.raises(RuntimeError, match=r"attached to .*COMPLETED.* already, and would save twice"):
                run.checkpoint.attach(run.engine, again)
        handle.remove()
        run.checkpoint.attach(run.engine, every)
        await run.engine.run([1, 2, 3, 4, 5])
        assert [(info.step, info.revision) for info in run.checkpoint.list()] == [(3, 1), (4, 1), (5, 1)]
        await run.checkpoint.aclose()
        handle.remove()
        run.checkpoint.attach(run.engine, every)

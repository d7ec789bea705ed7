"""Finding the checkpoint to go on from: what is damaged is passed over, and what cannot be looked at is not."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from aengine.checkpoint.store.find import Finder, Found
from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.checkpoint.store.retention import Keep
from aengine.checkpoint.store.store import Store
from aengine.errors import CheckpointDamaged, CheckpointNotFound


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "checkpoints")
    store.lock()
    for step in 1, 2:
        commit(store, step)
    yield store
    store.unlock()


def commit(store: Store, step: int, *, is_mid_step: bool = False, metrics: Mapping[str, float] = {}) -> CheckpointInfo:
    with store.begin(step) as draft:
        draft.write("state.pt", lambda file: file.write(b"state"))
        extra = {"mid_step": True} if is_mid_step else {}
        return draft.commit(step=step, epoch=1, event="completed", metrics=metrics, versions={}, extra=extra)


@pytest.mark.parametrize("name", ["manifest.json", "state.pt"])
def test_a_checkpoint_that_may_not_be_read_is_an_error_and_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    forbidden = store.find(2).path / name
    actual = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path) == forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return actual(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(PermissionError):
            Finder(store, lambda info: {}).find("latest")
    assert [info.step for info in store.list()] == [1, 2]


@pytest.mark.parametrize("name", ["manifest.json", "state.pt"])
def test_a_damaged_one_is_set_aside_and_the_one_before_is_read(store: Store, name: str) -> None:
    damaged = store.find(2).path
    (damaged / name).write_bytes(b"STATE")
    finder = Finder(store, lambda info: {"step": info.step})
    found = finder.find("latest")
    assert found is not None
    assert found.tree == {"step": 1}
    assert [problem.path.name for problem in finder.problems] == [f"damaged-{damaged.name}"]


def test_a_directory_that_is_only_called_like_one_is_set_aside(store: Store) -> None:
    (store.directory / "step-9").mkdir()
    finder = Finder(store, lambda info: {})
    found = finder.find("latest")
    assert found is not None
    assert found.info.step == 2
    assert [problem.path.name for problem in finder.problems] == ["damaged-step-9"]


def test_the_middle_of_a_step_is_found_where_there_is_nothing_else_or_it_is_asked_for(store: Store) -> None:
    mid_step = commit(store, 3, is_mid_step=True)
    finder = Finder(store, lambda info: {})
    assert finder.find("latest") == finder.find("latest", required=True) == Found(store.find(2), {})
    assert finder.find(3) == finder.find(mid_step.path) == Found(mid_step, {})
    for step in 1, 2:
        (store.find(step).path / "state.pt").write_bytes(b"STATE")
    assert finder.find("latest", required=True) == Found(mid_step, {})


def test_the_middle_of_a_step_is_never_the_best(store: Store) -> None:
    commit(store, 3, metrics={"accuracy": 0.5})
    commit(store, 4, metrics={"accuracy": 0.9}, is_mid_step=True)
    store.keep = Keep(best=1, metric="accuracy")
    finder = Finder(store, lambda info: {})
    assert finder.find("best") == Found(store.find(3), {})
    (store.find(3).path / "state.pt").write_bytes(b"STATE")
    with pytest.raises(CheckpointDamaged, match=r"damaged-step-0000000003: .*another content"):
        finder.find("best")


def test_where_only_the_middle_of_a_step_has_the_metric_there_is_no_best(store: Store) -> None:
    commit(store, 3, metrics={"accuracy": 0.9}, is_mid_step=True)
    store.keep = Keep(best=1, metric="accuracy")
    with pytest.raises(CheckpointNotFound, match="a number 'accuracy'"):
        Finder(store, lambda info: {}).find("best")

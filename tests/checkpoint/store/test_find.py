"""Finding the checkpoint to go on from: what is damaged is passed over, and what cannot be looked at is not."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aengine.checkpoint.store.find import Reader
from aengine.checkpoint.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "checkpoints")
    store.lock()
    for step in 1, 2:
        with store.begin(step) as draft:
            draft.write("state.pt", lambda file: file.write(b"state"))
            draft.commit(step=step, epoch=1, event="completed", metrics={}, versions={})
    yield store
    store.unlock()


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
            Reader(store, lambda info: {}).newest()
    assert [info.step for info in store.list()] == [1, 2]


@pytest.mark.parametrize("name", ["manifest.json", "state.pt"])
def test_a_damaged_one_is_set_aside_and_the_one_before_is_read(store: Store, name: str) -> None:
    damaged = store.find(2).path
    (damaged / name).write_bytes(b"STATE")
    reader = Reader(store, lambda info: {"step": info.step})
    found = reader.newest()
    assert found is not None
    assert found.tree == {"step": 1}
    assert [problem.path.name for problem in reader.problems] == [f"damaged-{damaged.name}"]


def test_a_directory_that_is_only_called_like_one_is_set_aside(store: Store) -> None:
    (store.directory / "step-9").mkdir()
    reader = Reader(store, lambda info: {})
    found = reader.newest()
    assert found is not None
    assert found.info.step == 2
    assert [problem.path.name for problem in reader.problems] == ["damaged-step-9"]

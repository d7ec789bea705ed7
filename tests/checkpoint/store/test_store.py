"""What is committed is found whole, and what is damaged is found out. See also `test_checkpoint_store_*.py`."""

import dataclasses
import errno
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.disk_log import locked, recorded, save

from aengine.checkpoint.store import files
from aengine.checkpoint.store.draft import free_space
from aengine.checkpoint.store.retention import Keep
from aengine.checkpoint.store.store import Store
from aengine.checkpoint.store.verify import problems, read, verify
from aengine.errors import CheckpointNotFound


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with locked(tmp_path / "checkpoints", Keep(last=2)) as store:
        yield store


def steps(store: Store) -> list[int]:
    return [info.step for info in store.list()]


# -- writing


def test_committed_checkpoint_is_found_as_it_was_returned(store: Store) -> None:
    metrics = {"loss": 0.5, "count": 3, "bad": math.inf, "worse": -math.inf}
    extra = {"serializer": "torch", "shards": 1, "mid_step": True}
    returned = save(store, 500, b"content", epoch=2, metrics=metrics, world_size=4, extra=extra)
    [found] = store.list()

    assert found == returned
    assert (found.step, found.revision, found.number, found.epoch, found.world_size) == (500, 1, 1, 2, 4)
    assert dict(found.metrics) == metrics
    assert dict(found.extra) == extra
    assert found.path == store.directory / "step-0000000500"
    assert found.size == len(b"content") + len(b"shards")
    assert [(one.name, one.size, one.sha256) for one in found.files] == [
        ("state.pt", 7, hashlib.sha256(b"content").hexdigest()),
        ("dcp/.metadata", 6, hashlib.sha256(b"shards").hexdigest()),
    ]
    assert (found.path / "state.pt").read_bytes() == b"content"
    verify(found)


def test_metric_that_is_nan_is_written_as_strict_json(store: Store) -> None:
    info = save(store, 1, metrics={"loss": math.nan})

    json.loads((info.path / "manifest.json").read_bytes(), parse_constant=pytest.fail)
    assert math.isnan(store.find(1).metrics["loss"])


def test_everything_is_synced_and_closed_before_the_rename_and_the_parent_after_it(store: Store) -> None:
    with recorded() as record:
        info = save(store, 500)
    root = store.directory
    draft = next(path for call, path, _ in record if call == "mkdir")

    def name(path: Path) -> str:
        return "DIR" if path == root else str(path.relative_to(draft)) if path.is_relative_to(draft) else path.name

    assert [(call, name(path)) for call, path, _ in record] == [
        ("mkdir", "."),
        ("create", "state.pt"),
        ("write", "state.pt"),
        ("fsync", "state.pt"),
        ("close", "state.pt"),
        ("mkdir", "dcp"),
        ("create", "dcp/.metadata"),
        ("write", "dcp/.metadata"),
        ("fsync", "dcp/.metadata"),
        ("close", "dcp/.metadata"),
        ("create", "manifest.json"),
        ("write", "manifest.json"),
        ("fsync", "manifest.json"),
        ("close", "manifest.json"),
        ("fsync", "dcp"),
        ("close", "dcp"),
        ("fsync", "."),
        ("close", "."),
        ("rename", "."),
        ("fsync", "DIR"),
        ("close", "DIR"),
    ]
    assert record[-3][2] == info.path


def test_only_the_owner_may_look_into_a_checkpoint(store: Store) -> None:
    info = save(store, 1)
    paths = [store.directory, info.path, *info.path.rglob("*")]

    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {0o600}


def test_second_checkpoint_of_a_step_is_a_revision_that_stands_in_for_the_first(store: Store) -> None:
    first, second = save(store, 500), save(store, 500, b"at the end of the epoch")
    third = save(store, 600)

    assert (first.path.name, second.path.name) == ("step-0000000500", "step-0000000500.2")
    assert (first.number, second.number, third.number) == (1, 1, 2)
    assert store.find(500) == second
    assert store.retain() == [first]
    assert save(store, 500).path.name == "step-0000000500.3"


def test_revision_is_above_one_that_cannot_be_read(store: Store) -> None:
    (save(store, 500).path / "manifest.json").unlink()

    assert save(store, 500).path.name == "step-0000000500.2"


def test_steps_and_revisions_of_any_size_are_ordered_as_numbers(store: Store) -> None:
    for step in (10**11, 7, 2 * 10**10, 0, *[5] * 11):
        save(store, step)

    assert steps(store) == [0, *[5] * 11, 7, 2 * 10**10, 10**11]
    assert [info.revision for info in store.list() if info.step == 5] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert store.find(10**11).path.name == "step-100000000000"


def test_draft_that_is_not_committed_leaves_nothing(store: Store) -> None:
    with store.begin(1) as draft:
        draft.write("state.pt", lambda file: file.write(b"x"))

    assert [path.name for path in store.directory.iterdir()] == [".lock"]


@pytest.mark.parametrize("error", [RuntimeError("from the serializer"), KeyboardInterrupt()])
def test_what_a_serializer_raises_comes_out_as_it_is_and_leaves_nothing(store: Store, error: BaseException) -> None:
    def fail(file: Any) -> None:
        file.write(b"some of it")
        raise error

    with pytest.raises(type(error)) as caught, store.begin(1) as draft:
        draft.write("state.pt", fail)

    assert caught.value is error
    assert [path.name for path in store.directory.iterdir()] == [".lock"]


def test_file_written_by_other_means_is_counted_in(store: Store) -> None:
    with store.begin(1) as draft:
        (draft.path / "dcp").mkdir()
        (draft.path / "dcp" / "__0_0.distcp").write_bytes(b"tensors")
        draft.add(files.measure(draft.path / "dcp" / "__0_0.distcp"))
        draft.write("state.pt", lambda file: file.write(b"the rest"))
        info = draft.commit(step=1, epoch=1, event="e", metrics={}, versions={})

    assert [one.name for one in info.files] == ["dcp/__0_0.distcp", "state.pt"]
    verify(info)


def test_file_written_in_another_process_is_counted_in(store: Store) -> None:
    with store.begin(1) as draft, multiprocessing.get_context("spawn").Pool(1) as pool:
        draft.add(pool.apply(files.write_file, (draft.path / "state.pt", write_in_another_process)))
        info = draft.commit(step=1, epoch=1, event="e", metrics={}, versions={})
        pool.close()
        pool.join()

    verify(info)
    assert (info.path / "state.pt").read_bytes() == b"from another process"


def write_in_another_process(file: Any) -> None:
    file.write(b"from another process")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../state.pt", "/etc/passwd", ".hidden", "a..b", "a/b", "a\n", "a\0", "größe", "x" * 300],
)
def test_name_that_is_no_plain_base_name_is_refused(store: Store, name: str) -> None:
    with store.begin(1) as draft, pytest.raises(ValueError, match="is no name for a file of a checkpoint"):
        draft.write(name, lambda file: file.write(b"x"))


@pytest.mark.parametrize("name", ["dcp", "dcp/", "dcp/../x", "dcp/.x", "dcp/a/b", "manifest.json", "pinned"])
def test_name_that_has_a_meaning_is_refused(store: Store, name: str) -> None:
    with store.begin(1) as draft, pytest.raises(ValueError, match="is no name for a file of a checkpoint"):
        draft.write(name, lambda file: file.write(b"x"))


def test_name_that_is_taken_is_refused(store: Store) -> None:
    with store.begin(1) as draft:
        entry = draft.write("state.pt", lambda file: file.write(b"x"))
        with pytest.raises(ValueError, match=r"state\.pt is in this checkpoint already"):
            draft.add(entry)


@pytest.mark.parametrize(
    ("told", "advice"),
    [
        ({"metrics": {"loss": "low"}}, r"metrics\['loss'\] must be a number, and is 'low'"),
        ({"metrics": {"loss": True}}, r"metrics\['loss'\] must be a number, and is True"),
        ({"versions": {"torch": 2}}, r"versions\['torch'\] must be text, and is 2"),
        ({"extra": {"x": math.nan}}, "Out of range float values are not JSON compliant"),
        ({"extra": {"x": "long" * 300_000}}, "it is larger than 1048576 bytes"),
        ({"epoch": -1}, "'epoch' must be 0 or more, and is -1"),
        ({"world_size": 0}, "'world_size' must be 1 or more"),
        ({"event": None}, "'event' must be text, and is None"),
    ],
)
def test_what_could_not_be_read_back_is_refused_before_anything_is_committed(
    store: Store, told: dict[str, Any], advice: str
) -> None:
    with pytest.raises(ValueError, match=advice):
        save(store, 1, **told)

    assert [path.name for path in store.directory.iterdir()] == [".lock"]


@pytest.mark.parametrize("step", [-1, True, 1.0, "1"])
def test_step_that_is_no_count_is_refused(store: Store, step: Any) -> None:
    with pytest.raises(ValueError, match="step is a whole number of iterations, 0 or more; got"):
        store.begin(step)


def test_draft_cannot_be_committed_as_another_step(store: Store) -> None:
    with (
        store.begin(1) as draft,
        pytest.raises(ValueError, match="begun for step 1, and cannot be committed as step 2"),
    ):
        draft.commit(step=2, epoch=1, event="e", metrics={}, versions={})


# -- reading


def test_directory_that_is_not_there_has_no_checkpoints(tmp_path: Path) -> None:
    store = Store(tmp_path / "none" / "yet")

    assert (store.list(), problems(store.directory)) == ([], [])
    assert free_space(store.directory) > 0
    assert not (tmp_path / "none").exists()


def test_step_that_is_not_there_is_reported_with_those_that_are(store: Store) -> None:
    save(store, 100)
    save(store, 200)

    with pytest.raises(CheckpointNotFound, match="has no checkpoint of step 300; it has those of step 100, 200"):
        store.find(300)


def test_of_many_steps_the_first_and_the_last_are_shown(store: Store) -> None:
    for step in range(1, 21):
        save(store, step)

    with pytest.raises(CheckpointNotFound, match=r"those of step 1, \.\.\., 11, 12, 13, 14, 15, 16, 17, 18, 19, 20$"):
        store.find(300)


def test_checkpoint_of_another_directory_can_be_opened_and_verified(store: Store, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "step-0000000500"
    shutil.copytree(save(store, 500).path, elsewhere)
    info = read(elsewhere)

    assert (info.step, info.path) == (500, elsewhere)
    verify(info)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("step-0000000009", "there is no checkpoint at"),
        ("checkpoint-9", "is not a checkpoint: give its own directory"),
        ("step-9", "is not a checkpoint"),
        ("step-00000000009", "is not a checkpoint"),
        ("step-0000000009.1", "is not a checkpoint"),
        ("damaged-step-0000000009", "is not a checkpoint"),
    ],
)
def test_path_that_is_no_checkpoint_is_not_opened(store: Store, name: str, words: str) -> None:
    if name != "step-0000000009":
        shutil.copytree(save(store, 9).path, store.directory / name)

    with pytest.raises(CheckpointNotFound, match=words):
        read(store.directory / name)


@pytest.mark.parametrize(("look", "found"), [(steps, [1]), (lambda store: problems(store.directory), [])])
def test_checkpoint_that_is_removed_while_it_is_looked_at_is_left_out(
    store: Store, monkeypatch: pytest.MonkeyPatch, look: Callable[[Store], object], found: list[int]
) -> None:
    save(store, 1)
    going = save(store, 2)
    real = os.open

    def remove_first(path: Any, *arguments: Any, **keywords: Any) -> int:
        if Path(path).parent == going.path:
            shutil.rmtree(going.path)
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", remove_first)
    assert look(store) == found
    assert not going.path.exists()


def test_checkpoint_that_may_not_be_looked_at_is_an_error_and_not_left_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = save(store, 1)
    real = os.open

    def refuse(path: Any, *arguments: Any, **keywords: Any) -> int:
        if path == info.path / "manifest.json":
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return real(path, *arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            store.list()
        assert "Too many open files" in problems(store.directory)[0].why


# -- keeping


def test_what_the_rule_does_not_keep_is_removed_and_returned(store: Store) -> None:
    infos = [save(store, step) for step in (100, 200, 300, 400)]

    assert store.retain() == infos[:2]
    assert sorted(path.name for path in store.directory.iterdir()) == [".lock", "step-0000000300", "step-0000000400"]


def test_pinned_checkpoint_stays_until_it_is_unpinned(store: Store) -> None:
    infos = [save(store, step) for step in (100, 200, 300)]
    other = Store(store.directory)  # without the lock
    other.pin(infos[0])
    other.pin(infos[0])

    assert store.retain() == []
    assert store.find(100).is_pinned
    verify(store.find(100))

    other.unpin(infos[0])
    other.unpin(infos[0])
    assert [info.step for info in store.retain()] == [100]


def test_checkpoint_that_is_gone_cannot_be_pinned(store: Store) -> None:
    info = save(store, 1)
    shutil.rmtree(info.path)

    with pytest.raises(CheckpointNotFound, match="any more, so it cannot be pinned"):
        store.pin(info)


def test_one_that_was_resumed_from_stays_by_whatever_name_its_directory_is_known(store: Store, tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        save(store, step)
    (tmp_path / "link").symlink_to(store.directory)

    assert [info.step for info in store.retain([tmp_path / "link" / "step-0000000100"])] == [200]


def test_run_that_went_back_keeps_what_it_wrote_last(store: Store) -> None:
    for step in (100, 200, 300):
        save(store, step)
    store.retain([save(store, 150).path])

    assert steps(store) == [150, 200, 300]


def test_directory_given_relatively_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("checkpoints")
    store.lock()
    monkeypatch.chdir("/")
    save(store, 1)
    store.unlock()

    assert (tmp_path / "checkpoints" / "step-0000000001" / "state.pt").exists()


def test_record_of_a_checkpoint_cannot_be_changed(store: Store) -> None:
    info = save(store, 1, metrics={"loss": 1.0})

    with pytest.raises(dataclasses.FrozenInstanceError):
        info.step = 2  # type: ignore[misc]  # that is the point
    with pytest.raises(TypeError):
        info.metrics["loss"] = 0.0  # type: ignore[index]  # that is the point
    assert len({info, store.find(1)}) == 1

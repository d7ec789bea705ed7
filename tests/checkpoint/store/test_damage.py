"""What is damaged is found out, named and set aside, and nothing in it is followed."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.disk_log import locked, save
from support.forged import rewrite, sealed

from aengine.checkpoint.store.manifest import CheckpointInfo, decode
from aengine.checkpoint.store.retention import Keep
from aengine.checkpoint.store.store import Store
from aengine.checkpoint.store.verify import problems, read, verify
from aengine.errors import CheckpointDamaged


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with locked(tmp_path / "checkpoints", Keep(last=2)) as store:
        yield store


def steps(store: Store) -> list[int]:
    return [info.step for info in store.list()]


def cut(info: CheckpointInfo) -> None:
    os.truncate(info.path / "state.pt", 3)


def flip_a_bit(info: CheckpointInfo) -> None:
    content = bytearray((info.path / "state.pt").read_bytes())
    content[2] ^= 1
    (info.path / "state.pt").write_bytes(content)


def lose_a_file(info: CheckpointInfo) -> None:
    (info.path / "dcp" / ".metadata").unlink()


def replace_by_a_link(info: CheckpointInfo) -> None:
    elsewhere = (info.path / "state.pt").rename(info.path.parent / "elsewhere")
    (info.path / "state.pt").symlink_to(elsewhere)


def replace_the_subdirectory_by_a_link(info: CheckpointInfo) -> None:
    elsewhere = (info.path / "dcp").rename(info.path.parent / "elsewhere")
    (info.path / "dcp").symlink_to(elsewhere)


def add_a_link(info: CheckpointInfo) -> None:
    (info.path / "extra").symlink_to("/etc/passwd")


def replace_by_a_pipe(info: CheckpointInfo) -> None:
    (info.path / "state.pt").unlink()
    os.mkfifo(info.path / "state.pt")


def replace_by_a_directory(info: CheckpointInfo) -> None:
    (info.path / "state.pt").unlink()
    (info.path / "state.pt").mkdir()


def change_the_manifest(info: CheckpointInfo) -> None:
    rewrite(info.path, "files", [entry(size=8), entry(name="dcp/.metadata")])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, r"state\.pt has 3 bytes, and 7 were written"),
        (flip_a_bit, r"state\.pt has the right size but another content"),
        (lose_a_file, r"dcp/\.metadata is missing"),
        (replace_by_a_link, r"state\.pt is a symbolic link, and none is followed"),
        (replace_the_subdirectory_by_a_link, r"dcp is a symbolic link"),
        (add_a_link, r"extra is a symbolic link"),
        (replace_by_a_pipe, r"state\.pt has 0 bytes"),
        (replace_by_a_directory, r"state\.pt (has \d+ bytes|is a directory)"),
        (change_the_manifest, r"manifest\.json was changed since it was read"),
    ],
)
def test_damaged_file_is_found_out_and_named(
    store: Store, damage: Callable[[CheckpointInfo], None], words: str
) -> None:
    info = save(store, 500)
    verify(info)
    damage(info)

    with pytest.raises(CheckpointDamaged, match=words):
        verify(info)


def test_empty_file_that_became_a_pipe_is_found_out_without_waiting_for_it(store: Store) -> None:
    info = save(store, 500, b"")
    replace_by_a_pipe(info)

    with pytest.raises(CheckpointDamaged, match=r"state\.pt is not a regular file"):
        verify(info)


def test_what_the_manifest_does_not_name_is_no_damage(store: Store) -> None:
    info = save(store, 500)
    (info.path / "notes.txt").write_text("the good one")
    (info.path / ".nfs0001").touch()

    verify(info)


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "state.pt", "size": 7, "sha256": "0" * 64, **changes}


def raw(content: bytes) -> Callable[[CheckpointInfo], object]:
    return lambda info: (info.path / "manifest.json").write_bytes(content)


def changed(key: str, value: object) -> Callable[[CheckpointInfo], object]:
    return lambda info: rewrite(info.path, key, value)


def of_an_earlier_version(info: CheckpointInfo) -> None:
    path = info.path / "manifest.json"
    record = {**json.loads(path.read_bytes()), "format": 1}
    path.write_text(json.dumps({name: value for name, value in record.items() if name not in {"sha256", "revision"}}))


def without_its_checksum(info: CheckpointInfo) -> None:
    path = info.path / "manifest.json"
    path.write_bytes(path.read_bytes().rpartition(b',\n "sha256"')[0] + b"\n}")


def with_a_second_checksum(info: CheckpointInfo) -> None:
    path = info.path / "manifest.json"
    path.write_bytes(sealed(json.loads(path.read_bytes())))


def with_other_spaces(info: CheckpointInfo) -> None:
    path = info.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes())))


def link_the_manifest(info: CheckpointInfo) -> None:
    elsewhere = (info.path / "manifest.json").rename(info.path / "elsewhere")
    (info.path / "manifest.json").symlink_to(elsewhere)


def link_the_checkpoint(info: CheckpointInfo) -> None:
    elsewhere = info.path.rename(info.path.parent / "elsewhere")
    info.path.symlink_to(elsewhere)


def replace_by_a_file(info: CheckpointInfo) -> None:
    shutil.rmtree(info.path)
    info.path.touch()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda info: (info.path / "manifest.json").unlink(), "manifest.json is missing", id="missing"),
        pytest.param(raw(b""), "it is empty", id="empty"),
        pytest.param(raw(b"\0" * 500), "is damaged: ", id="zeros"),
        pytest.param(raw(b'{"format": 1, "step": 5'), "is damaged: Expecting", id="cut"),
        pytest.param(raw(b" " * (1 << 20) + b"{}"), "it is larger than 1048576 bytes", id="oversized"),
        pytest.param(raw(b"[" * 100_000), "is damaged: ", id="deep"),
        pytest.param(raw(b"[]"), r"it must be an object, and is \[\]", id="a list"),
        pytest.param(raw(b'{"format": 1, "format": 1}'), "the same key twice", id="duplicate key"),
        pytest.param(raw(b"\xff\xff"), "is damaged: ", id="no text"),
        pytest.param(raw(b'{"format": NaN}'), "NaN is not JSON", id="NaN"),
        pytest.param(changed("format", 3), "its format is 3, and this version of aengine reads 2: .*'0'", id="newer"),
        pytest.param(of_an_earlier_version, "its format is 1, and this version of aengine reads 2", id="older"),
        pytest.param(without_its_checksum, r"its content is not what was written \(sha256\)", id="without checksum"),
        pytest.param(with_a_second_checksum, "the same key twice", id="two checksums"),
        pytest.param(with_other_spaces, r"its content is not what was written \(sha256\)", id="other spaces"),
        pytest.param(changed("format", value=True), "its format is True", id="format of a wrong type"),
        pytest.param(changed("step", 501), "is that of step-0000000501, and lies in step-0000000500", id="other step"),
        pytest.param(changed("revision", 2), r"is that of step-0000000500\.2, and lies in", id="other revision"),
        pytest.param(changed("number", 10**4000), r"must be less than 2\*\*63, and is 1000", id="a huge number"),
        pytest.param(changed("extra", {"rerializer": "torch"}), r"'extra' has \['rerializer'\]", id="extra"),
        pytest.param(changed("extra", {"serializer": 1}), "'serializer' must be text, and is 1", id="serializer"),
        pytest.param(changed("extra", {"shards": "2"}), "'shards' must be a whole number", id="shards"),
        pytest.param(changed("extra", {"mid_step": False}), "'mid_step' must be true, or not be there", id="mid-step"),
        pytest.param(changed("step", "500"), "'step' must be a whole number, and is '500'", id="step as text"),
        pytest.param(changed("step", 500.0), "'step' must be a whole number", id="step as float"),
        pytest.param(changed("epoch", value=True), "'epoch' must be a whole number, and is True", id="epoch as bool"),
        pytest.param(changed("number", 0), "'number' must be 1 or more", id="number"),
        pytest.param(changed("event", ...), "'event' is missing", id="without event"),
        pytest.param(changed("surplus", 1), r"it has \['surplus'\], which do not belong there", id="surplus"),
        pytest.param(changed("metrics", {"loss": "low"}), r"metrics\['loss'\] must be a number", id="metric"),
        pytest.param(changed("metrics", {"loss": 10**400}), "is damaged: ", id="metric that is too large"),
        pytest.param(changed("metrics", []), "'metrics' must be an object", id="metrics"),
        pytest.param(changed("versions", {"torch": 2}), r"versions\['torch'\] must be text", id="version"),
        pytest.param(changed("files", {}), "'files' must be a list", id="files"),
        pytest.param(changed("files", []), "it does not name state.pt, without which nothing can be", id="no files"),
        pytest.param(changed("files", ["state.pt"]), "an entry of 'files' must be an object", id="file"),
        pytest.param(changed("files", [entry(), entry()]), "it names a file twice", id="twice"),
        pytest.param(changed("files", [entry(name="../x")]), r"'\.\./x' is no name for a file", id="../"),
        pytest.param(changed("files", [entry(name="dcp/../../x")]), "is no name for a file", id="dcp/../"),
        pytest.param(changed("files", [entry(name="/etc/passwd")]), "is no name for a file", id="absolute"),
        pytest.param(changed("files", [entry(size=-1)]), "'size' must be 0 or more", id="size"),
        pytest.param(changed("files", [entry(sha256="0" * 63)]), "not 64 hexadecimal digits", id="sha256"),
        pytest.param(changed("files", [entry(mode=0)]), r"has \['mode'\], which do not belong", id="surplus of a file"),
        pytest.param(link_the_manifest, "manifest.json is a symbolic link", id="manifest is a link"),
        pytest.param(link_the_checkpoint, "step-0000000500 is a symbolic link", id="checkpoint is a link"),
        pytest.param(replace_by_a_file, "manifest.json is not a directory", id="checkpoint is a file"),
    ],
)
def test_damaged_manifest_is_found_and_reported_and_the_one_before_is_still_there(
    store: Store, damage: Callable[[CheckpointInfo], object], words: str
) -> None:
    save(store, 400)
    info = save(store, 500)
    damage(info)

    with pytest.raises(CheckpointDamaged, match=words):
        read(info.path)
    assert steps(store) == [400]
    [problem] = problems(store.directory)
    assert problem.path == info.path
    with pytest.raises(CheckpointDamaged, match=words):
        raise CheckpointDamaged(problem.why)


def test_one_that_has_shards_names_their_index(store: Store) -> None:
    info = save(store, 500, extra={"serializer": "torch", "shards": 2})
    assert read(info.path) == info
    rewrite(info.path, "files", [entry()])
    with pytest.raises(CheckpointDamaged, match=r"it does not name dcp/\.metadata"):
        read(info.path)


def test_what_could_not_be_loaded_is_not_committed(store: Store) -> None:
    with store.begin(500) as draft:
        draft.write("other.pt", lambda file: file.write(b"weights"))
        with pytest.raises(ValueError, match=r"it does not name state\.pt"):
            draft.commit(step=500, epoch=1, event="e", metrics={}, versions={})
    assert steps(store) == []


def test_manifest_in_a_directory_that_is_none_of_a_checkpoint_is_refused(store: Store) -> None:
    manifest = (save(store, 500).path / "manifest.json").read_bytes()

    with pytest.raises(CheckpointDamaged, match="it lies in 'elsewhere', which is no name of a checkpoint"):
        decode(manifest, Path("elsewhere"), pinned=False)


def test_linked_checkpoint_is_never_removed_through_the_link(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "step-0000000001"
    save(store, 1).path.rename(outside)
    (store.directory / "step-0000000001").symlink_to(outside)
    (store.directory / ".tmp-link").symlink_to(outside)
    (store.directory / ".trash-1").mkdir()
    (store.directory / ".trash-1" / "link").symlink_to(outside)
    store.unlock()
    store.lock()
    for step in (2, 3, 4):
        save(store, step)
    store.retain()

    assert (outside / "state.pt").exists()
    assert not list(store.directory.glob(".t*"))
    assert steps(store) == [3, 4]


def test_damaged_checkpoint_is_set_aside_with_the_reason(store: Store) -> None:
    first = store.set_aside(save(store, 500).path, "state.pt was cut")
    second = store.set_aside(save(store, 500).path, "again")
    third = store.set_aside(save(store, 500).path, "and again")

    assert [path.name for path in (first, second, third)] == [
        "damaged-step-0000000500",
        "damaged-step-0000000500-2",
        "damaged-step-0000000500-3",
    ]
    assert store.list() == []
    assert (first / "state.pt").exists()
    assert [problem.why for problem in problems(store.directory)] == [
        "it was set aside: state.pt was cut",
        "it was set aside: again",
        "it was set aside: and again",
    ]


def test_link_that_is_set_aside_is_not_written_through(store: Store, tmp_path: Path) -> None:
    info = save(store, 500)
    link_the_checkpoint(info)
    aside = store.set_aside(info.path, "a link")

    assert aside.is_symlink()
    assert not (aside / "why.txt").exists()
    assert [problem.why for problem in problems(store.directory)] == ["it was set aside"]

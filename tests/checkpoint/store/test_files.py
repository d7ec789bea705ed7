"""The file that a serializer writes into."""

import errno
import gc
import hashlib
import os
import tracemalloc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from support.disk_log import recorded

from aengine.checkpoint.store.files import HashingFile, Stopped, make_directory, remove_tree, write_file

MEGABYTE = 1 << 20


@pytest.fixture
def null() -> Iterator[int]:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@settings(max_examples=30)  # each writes megabytes
@given(sizes=st.lists(st.integers(0, 100) | st.sampled_from([65_535, 65_536, MEGABYTE, 5 * MEGABYTE]), max_size=8))
def test_size_and_checksum_are_those_of_what_reaches_the_disk(
    sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    parts = [bytes([index + 1]) * size for index, size in enumerate(sizes)]
    path = tmp_path_factory.mktemp("files") / "state.pt"
    entry = write_file(path, lambda file: [file.write(part) for part in parts])
    content = path.read_bytes()
    path.unlink()

    assert content == b"".join(parts)
    assert (entry.name, entry.size, entry.sha256) == ("state.pt", len(content), hashlib.sha256(content).hexdigest())


def test_crumbs_are_written_together_and_what_is_large_is_not_copied(null: int) -> None:
    large: Any = memoryview(bytes(64 * MEGABYTE)).cast("d")  # as that of a tensor's numbers
    file = HashingFile(null)
    tracemalloc.start()
    try:
        with recorded_writes() as sizes:
            for _ in range(1000):
                file.write(b"crumb")
            file.write(large)
            file.write(b"end")
            file.flush()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert sizes == [5000, *[4 * MEGABYTE] * 16, 3]
    assert most < MEGABYTE
    assert file.size == 5003 + 64 * MEGABYTE


@contextmanager
def recorded_writes() -> Iterator[list[int]]:
    sizes: list[int] = []
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        sizes.append(len(data))
        return real(descriptor, data)

    with patch.object(os, "write", write):
        yield sizes


def test_write_that_the_system_cuts_short_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:1000]))
    content = bytes(range(256)) * 1000
    entry = write_file(tmp_path / "state.pt", lambda file: file.write(content))

    assert (tmp_path / "state.pt").read_bytes() == content
    assert entry.sha256 == hashlib.sha256(content).hexdigest()


def test_full_disk_is_remembered_and_every_later_write_fails_with_it() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    file = HashingFile(descriptor)
    file.write(b"crumb")  # held together with others
    with pytest.raises(OSError, match="No space left") as first:
        file.flush()
    with pytest.raises(OSError, match="No space left") as second:
        file.write(b"more")
    os.close(descriptor)

    assert first.value is second.value is file.error
    assert first.value.errno == errno.ENOSPC


@pytest.mark.parametrize("size", [1, 10 * MEGABYTE])
def test_write_is_stopped_in_the_midst_of_it(null: int, size: int) -> None:
    answers = iter([False] * (size > MEGABYTE) * 3 + [True])
    file = HashingFile(null, lambda: next(answers))

    with recorded_writes() as sizes, pytest.raises(Stopped):
        file.write(bytes(size))
    assert sizes == ([4 * MEGABYTE] if size > MEGABYTE else [])
    with pytest.raises(Stopped):
        file.flush()


def test_serializer_that_makes_something_else_of_the_reason_does_not_hide_it(tmp_path: Path) -> None:
    def write(file: Any) -> None:
        try:
            file.write(b"x")
        except Stopped:
            raise RuntimeError("PytorchStreamWriter failed") from None

    with pytest.raises(Stopped):
        write_file(tmp_path / "state.pt", write, lambda: True)


class Content(bytearray):
    """One that tells when it is gone."""


def test_failed_write_does_not_hold_on_to_what_was_to_be_written(tmp_path: Path) -> None:
    content = Content(MEGABYTE)
    is_there = weakref.ref(content)
    gc.disable()
    try:
        try:
            write_file(tmp_path / "state.pt", lambda file: file.write(content), lambda: True)
        except Stopped:
            del content
        assert is_there() is None
    finally:
        gc.enable()


def test_serializer_that_swallows_the_reason_does_not_hide_it(tmp_path: Path) -> None:
    def write(file: Any) -> None:
        with suppress(Stopped):
            file.write(b"x")

    with pytest.raises(Stopped):
        write_file(tmp_path / "state.pt", write, lambda: True)


def test_file_that_is_there_is_not_written_over_not_even_through_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")

    for name in ("there", "dangling"):
        with pytest.raises(FileExistsError):
            write_file(tmp_path / name, lambda file: file.write(b"x"))
    assert (tmp_path / "there").read_text() == "precious"
    assert not (tmp_path / "elsewhere").exists()


def test_directory_is_made_with_the_parents_it_lacks_and_each_is_synced(tmp_path: Path) -> None:
    with recorded() as record:
        make_directory(tmp_path / "a" / "b")
        make_directory(tmp_path / "a" / "b")

    assert [(call, path.relative_to(tmp_path).as_posix()) for call, path, _ in record if call != "close"] == [
        ("mkdir", "a"),
        ("fsync", "."),
        ("mkdir", "a/b"),
        ("fsync", "a"),
    ]


def test_removing_never_follows_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "link").symlink_to(outside)
    (tmp_path / "link").symlink_to(outside)
    remove_tree(tree)
    remove_tree(tmp_path / "link")

    assert (outside / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]

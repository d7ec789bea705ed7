"""One writer at a time."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.disk_log import locked, save

from aengine.checkpoint.store.retention import Keep
from aengine.checkpoint.store.store import Store
from aengine.errors import CheckpointLocked, CheckpointNotWritten


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with locked(tmp_path / "checkpoints", Keep(last=2)) as store:
        yield store


def test_second_writer_in_this_process_is_refused_with_the_reason(store: Store) -> None:
    with pytest.raises(CheckpointLocked, match=f"another Checkpoint of this very process \\({os.getpid()}\\)"):
        Store(store.directory).lock()
    save(store, 1)  # the first still may


def test_lock_that_is_given_up_can_be_taken(store: Store) -> None:
    store.lock()  # twice is once
    store.unlock()
    store.unlock()
    other = Store(store.directory)
    other.lock()
    save(other, 1)
    other.unlock()


HOLDS_THE_LOCK = """
import sys
from aengine.checkpoint.store.store import Store
store = Store(sys.argv[1])
store.lock()
print("locked", flush=True)
sys.stdin.read()
"""


def in_another_process(script: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *map(str, arguments)]
    root = str(Path(__file__).parents[3])
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )


def test_writer_in_another_process_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    store = Store(tmp_path / "checkpoints")
    with in_another_process(HOLDS_THE_LOCK, store.directory) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(
            CheckpointLocked, match=rf"is in use by process {process.pid} on host [\w.-]+\. Two writers"
        ):
            store.lock()
        assert store.list() == []  # reading needs no lock
        process.kill()
    store.lock()
    save(store, 1)
    store.unlock()


LEAVES_A_CHILD = """
import os, sys
from aengine.checkpoint.store.store import Store
store = Store(sys.argv[1])
store.lock()
reading, writing = os.pipe()
if os.fork():
    os.read(reading, 1)  # the child runs
    print("locked", flush=True)
    os.kill(os.getpid(), 9)
os.write(writing, b".")
sys.stdin.read()
try:
    store.begin(1).__enter__()
except RuntimeError as error:
    print(error)
store.unlock()
"""


def test_child_that_outlives_a_killed_writer_does_not_hold_its_lock(tmp_path: Path) -> None:
    store = Store(tmp_path / "checkpoints")
    with in_another_process(LEAVES_A_CHILD, store.directory) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        assert process.wait() == -9
        store.lock()  # while the child lives
        process.stdin.close()
        assert "needs its lock: call lock() first, in this process" in process.stdout.read()
    save(store, 1)
    store.unlock()


def test_lock_that_is_given_up_is_free_even_if_its_file_is_open_elsewhere(store: Store) -> None:
    """As a child has that was forked by a library in C, and did not close its files."""
    descriptor = store._lock._descriptor
    assert descriptor is not None
    inherited = os.dup(descriptor)
    store.unlock()
    other = Store(store.directory)
    other.lock()
    other.unlock()
    os.close(inherited)


def test_holder_is_named_whatever_was_in_the_lock_file_before(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(
        "123456789 a-host-with-a-name-that-is-longer-than-any-that-may-come-after-it.example.com\n"
    )
    store = Store(tmp_path)
    store.lock()

    with pytest.raises(CheckpointLocked, match=f"this very process \\({os.getpid()}\\)"):
        Store(tmp_path).lock()
    store.unlock()


@pytest.mark.parametrize(
    "use", [lambda store: save(store, 1), Store.retain, lambda store: store.set_aside(Path("x"), "")]
)
def test_writing_without_the_lock_is_refused(tmp_path: Path, use: Callable[[Store], object]) -> None:
    with pytest.raises(RuntimeError, match=r"needs its lock: call lock\(\) first"):
        use(Store(tmp_path))


def test_lock_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")

    with pytest.raises(CheckpointNotWritten, match="no checkpoint can be written to"):
        Store(tmp_path).lock()
    assert (tmp_path / "victim").read_text() == "precious"


def test_strays_of_a_dead_writer_are_swept_and_nothing_else(store: Store) -> None:
    save(store, 1)
    store.set_aside(save(store, 2).path, "test")
    before = sorted(store.directory.iterdir())
    for name in (".tmp-step-0000000003-ab", ".trash-step-0000000001-cd"):
        shutil.copytree(store.directory / "step-0000000001", store.directory / name)
    (store.directory / ".tmp-file").touch()
    store.unlock()
    store.lock()

    assert sorted(store.directory.iterdir()) == before

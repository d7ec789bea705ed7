"""Disks that are full, read-only or gone: what the user is told, and what is left."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.disk_log import locked, save

from aengine.checkpoint.store import files
from aengine.checkpoint.store.retention import Keep
from aengine.checkpoint.store.store import Store
from aengine.checkpoint.store.verify import problems
from aengine.errors import CheckpointNotWritten, CheckpointWarning

TESTS = Path(__file__).parents[2]

# What a script finds there: a directory, and a way to tell what a save came to.
PROLOGUE = f"""
import errno, json, os, resource, signal, subprocess, sys
from pathlib import Path
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
from support.disk_log import save
from aengine.checkpoint.store.retention import Keep
from aengine.checkpoint.store.store import Store
from aengine.checkpoint.store.verify import verify
from aengine.errors import CheckpointError

root = Path(sys.argv[1])
told = {{}}

def attempt(name, action):
    try:
        action()
    except CheckpointError as error:
        told[name] = [type(error).__name__, str(error), errno.errorcode[error.__cause__.errno]]

def make_read_only():
    # A second mount over the first, which the lock file keeps busy.
    subprocess.run(["mount", "--bind", root, root], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", root], check=True)

def tell(store):
    for info in store.list():
        verify(info)
    told["steps"] = [info.step for info in store.list()]
    told["names"] = sorted(path.name for path in store.directory.iterdir())
    print(json.dumps(told))
"""


def run(script: str, *arguments: object, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what a script told that ran in a process of its own."""
    command = [*prefix, sys.executable, "-c", PROLOGUE + script, *map(str, arguments)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    return told


@pytest.fixture
def own_mounts(tmp_path: Path) -> tuple[str, ...]:
    """What to put before a command so that it may mount, for itself alone."""
    prefix = ("unshare", "--user", "--map-root-user", "--mount")
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1), which gives a process mounts of its own")
    command = [*prefix, "mount", "-t", "tmpfs", "none", str(tmp_path)]
    attempt = subprocess.run(command, check=False, capture_output=True, text=True)
    if attempt.returncode != 0:
        pytest.skip(f"this system allows no mount in a new namespace: {attempt.stderr.strip()}")
    return prefix


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with locked(tmp_path / "checkpoints", Keep(last=2)) as store:
        yield store


FULL_DISK = """
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", root], check=True)
store = Store(root, Keep(last=2))
store.lock()
save(store, 100, bytes(1_500_000))
save(store, 200, bytes(1_500_000))

attempt("full", lambda: save(store, 300, bytes(1_500_000)))
store.pin(store.find(100))
save(store, 400, bytes(400_000))
tell(store)
"""


def test_full_disk_is_reported_with_what_is_free_and_what_is_kept_and_a_smaller_one_still_fits(
    tmp_path: Path, own_mounts: tuple[str, ...]
) -> None:
    told = run(FULL_DISK, tmp_path, prefix=own_mounts)
    kind, words, cause = told["full"]

    assert (kind, cause) == ("CheckpointNotWritten", "ENOSPC")
    assert words.startswith("the checkpoint of step 300 was not written: No space left on device (")
    assert f"state.pt), while writing state.pt in {tmp_path}; 1." in words
    assert words.endswith(
        " MB had been written, 0 bytes are free. Make room, or keep fewer checkpoints. Kept are those of step 100, 200."
    )
    assert told["steps"] == [100, 200, 400]
    assert told["names"] == [".lock", "step-0000000100", "step-0000000200", "step-0000000400"]


FULL_FOR_TORCH = """
import torch
weights = torch.arange(100_000)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", root], check=True)
store = Store(root)
store.lock()

def save_tensors(step, tensors):
    with store.begin(step) as draft:
        draft.write("state.pt", lambda file: torch.save(tensors, file))
        return draft.commit(step=step, epoch=1, event="e", metrics={}, versions={})

info = save_tensors(100, weights)
assert torch.equal(torch.load(info.path / "state.pt", weights_only=True), weights)
attempt("full", lambda: save_tensors(200, torch.zeros(2_000_000)))
tell(store)
"""


def test_torch_does_not_hide_that_the_disk_is_full(tmp_path: Path, own_mounts: tuple[str, ...]) -> None:
    told = run(FULL_FOR_TORCH, tmp_path, prefix=own_mounts)

    assert told["full"][0::2] == ["CheckpointNotWritten", "ENOSPC"]
    assert told["names"] == [".lock", "step-0000000100"]


FULL_OF_FILES = """
subprocess.run(["mount", "-t", "tmpfs", "-o", f"nr_inodes={sys.argv[2]}", "none", root], check=True)
store = Store(root)
store.lock()
save(store, 100)
attempt("full", lambda: save(store, 200))
tell(store)
"""


@pytest.mark.parametrize(
    ("files_that_fit", "doing"),
    [
        (0, "making its directory"),
        (1, "writing state.pt"),
        (2, "writing dcp/.metadata"),
        (3, "writing dcp/.metadata"),
        (4, "writing manifest.json"),
    ],
)
def test_disk_that_is_full_at_any_point_of_a_save_is_left_with_the_others_whole(
    tmp_path: Path, own_mounts: tuple[str, ...], files_that_fit: int, doing: str
) -> None:
    there_already = 1 + len([".lock"]) + len(["step", "state.pt", "dcp", ".metadata", "manifest.json"])
    told = run(FULL_OF_FILES, tmp_path, there_already + files_that_fit, prefix=own_mounts)

    assert told["full"][0::2] == ["CheckpointNotWritten", "ENOSPC"]
    assert f"while {doing} in" in told["full"][1]
    assert told["steps"] == [100]
    assert told["names"] == [".lock", "step-0000000100"]


LIMITED_FILE = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(root / "checkpoints")
store.lock()
save(store, 100)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, resource.RLIM_INFINITY))

def write(file):
    try:
        for _ in range(100):
            file.write(bytes(100_000))
    except OSError:
        raise RuntimeError("unexpected pos 64 vs 0") from None

def save_much():
    with store.begin(200) as draft:
        draft.write("state.pt", write)

attempt("limited", save_much)
save(store, 300)
tell(store)
"""


def test_file_that_may_not_grow_is_reported_though_the_serializer_hides_why(tmp_path: Path) -> None:
    told = run(LIMITED_FILE, tmp_path)
    kind, words, cause = told["limited"]

    assert (kind, cause) == ("CheckpointNotWritten", "EFBIG")
    assert "File too large" in words
    assert "Raise the limit of the size of a file (ulimit -f). Kept are those of step 100." in words
    assert told["names"] == [".lock", "step-0000000100", "step-0000000300"]


READ_ONLY = """
store = Store(root)
store.lock()
save(store, 100)
make_read_only()
attempt("save", lambda: save(store, 200))
store.unlock()
attempt("lock", lambda: Store(root / "new").lock())
tell(store)
"""


def test_read_only_directory_is_reported_and_can_be_read(tmp_path: Path, own_mounts: tuple[str, ...]) -> None:
    told = run(READ_ONLY, tmp_path, prefix=own_mounts)

    assert told["save"][0::2] == told["lock"][0::2] == ["CheckpointNotWritten", "EROFS"]
    assert "while making its directory" in told["save"][1]
    assert "Choose a directory that is not mounted read-only. Kept are those of step 100." in told["save"][1]
    assert told["lock"][1].startswith(f"no checkpoint can be written to {tmp_path / 'new'}: Read-only file system")
    assert told["names"] == [".lock", "step-0000000100"]


READ_ONLY_MEANWHILE = """
import warnings
from aengine.errors import CheckpointWarning
warnings.simplefilter("error", CheckpointWarning)
store = Store(root)
store.lock()
save(store, 100)

def save_and_lose_the_right():
    with store.begin(200) as draft:
        draft.write("state.pt", lambda file: file.write(b"x"))
        make_read_only()
        draft.write("more", lambda file: file.write(b"x"))

attempt("save", save_and_lose_the_right)
subprocess.run(["umount", root], check=True)
store.unlock()
store.lock()
tell(store)
"""


def test_stray_that_cannot_be_removed_does_not_hide_why_and_is_swept_later(
    tmp_path: Path, own_mounts: tuple[str, ...]
) -> None:
    told = run(READ_ONLY_MEANWHILE, tmp_path, prefix=own_mounts)

    assert told["save"][0::2] == ["CheckpointNotWritten", "EROFS"]
    assert told["names"] == [".lock", "step-0000000100"]


NO_PERMISSION = """
store = Store(root)
store.lock()
save(store, 100)
os.chmod(root, 0o555)
for path in root.rglob("*"):
    os.chmod(path, 0o555 if path.is_dir() else 0o444)
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
attempt("save", lambda: save(store, 200))
store.unlock()
attempt("lock", lambda: Store(root).lock())
tell(store)
"""


def test_directory_without_permission_is_reported_and_can_be_read() -> None:
    root = Path(tempfile.mkdtemp())  # not pytest's, which only root may enter
    try:
        root.chmod(0o755)
        told = run(NO_PERMISSION, root)
    finally:
        root.chmod(0o700)
        for path in root.glob("step-*/"):
            path.chmod(0o700)
            (path / "dcp").chmod(0o700)
        shutil.rmtree(root)

    assert told["save"][0::2] == told["lock"][0::2] == ["CheckpointNotWritten", "EACCES"]
    assert "Choose a directory that this user may write to. Kept are those of step 100." in told["save"][1]
    assert told["names"] == [".lock", "step-0000000100"]


# -- gone


def remove_the_directory(store: Store, draft: Path) -> None:
    shutil.rmtree(store.directory)


def remove_the_draft(store: Store, draft: Path) -> None:
    shutil.rmtree(draft)


def remove_a_file(store: Store, draft: Path) -> None:
    (draft / "state.pt").unlink()


def cut_a_file(store: Store, draft: Path) -> None:
    os.truncate(draft / "state.pt", 1)


def replace_the_directory(store: Store, draft: Path) -> None:
    shutil.rmtree(store.directory)
    other = Store(store.directory)
    other.lock()
    other.unlock()


def replace_the_directory_by_a_file(store: Store, draft: Path) -> None:
    shutil.rmtree(store.directory)
    store.directory.touch()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            remove_the_directory,
            r"No such file or directory .*\. Something removed it while it was in use. Kept are none",
        ),
        (remove_the_draft, r"No such file or directory .*Something removed it .* Kept are those of step 100"),
        (remove_a_file, r"No such file or directory .*state\.pt.*Kept are those of step 100"),
        (cut_a_file, r"it has 1 bytes where 7 were written .*state\.pt"),
        (replace_the_directory_by_a_file, r"Not a directory .* Which are kept is not known: Not a directory"),
        (replace_the_directory, r"the lock file was replaced, so another writer may be at work"),
    ],
)
def test_what_is_removed_under_a_save_is_reported(
    store: Store, harm: Callable[[Store, Path], None], words: str
) -> None:
    save(store, 100)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(CheckpointNotWritten, match=words):
            save(store, 200, before_commit=lambda draft: harm(store, draft.path))

    assert not warned  # that it is gone already is no trouble
    assert not list(store.directory.glob(".t*"))
    if store.directory.is_dir():
        assert 200 not in [info.step for info in store.list()]


def test_directory_that_is_gone_before_a_save_is_reported(store: Store) -> None:
    shutil.rmtree(store.directory)

    with pytest.raises(CheckpointNotWritten, match="Something removed it while it was in use"):
        save(store, 100)


def test_directory_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(CheckpointNotWritten, match=r"File exists .*Something else than a directory has that name"):
        Store(tmp_path / "file").lock()


def test_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        CheckpointNotWritten, match=r"No locks available\. Choose a directory on a file system that has"
    ):
        Store(tmp_path).lock()


# -- each call that may fail. Real disks fail at few of them when asked to; so the system is made to say so.


@pytest.mark.parametrize("failing", ["state.pt", ".metadata", "manifest.json", "dcp", ".tmp-", "checkpoints"])
def test_disk_that_is_full_only_when_synced_is_reported_and_leaves_nothing(
    store: Store, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 100)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(failing):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointNotWritten) as caught:
        save(store, 200)

    assert isinstance(caught.value.__cause__, OSError)
    assert "No space left on device" in str(caught.value)
    assert "Make room, or keep fewer checkpoints. Kept are those of step 100" in str(caught.value)
    assert sorted(path.name for path in store.directory.iterdir()) == [".lock", "step-0000000100"]


def test_rename_that_fails_is_reported_and_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(source: Any, target: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CheckpointNotWritten, match="while committing it"):
        save(store, 200)

    assert [path.name for path in store.directory.iterdir()] == [".lock"]


def test_checkpoint_that_cannot_be_renamed_away_is_a_warning_and_the_others_go(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    infos = [save(store, step) for step in (100, 200, 300, 400)]
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(source) == infos[0].path:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.warns(CheckpointWarning, match=r"could not be removed: Operation not permitted .*step-0000000100"):
        removed = store.retain()

    assert removed == [infos[1]]
    assert [info.step for info in store.list()] == [100, 300, 400]


def test_file_that_cannot_be_deleted_is_a_warning_and_is_swept_by_the_next_writer(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    infos = [save(store, step) for step in (100, 200, 300)]

    def unlink(name: Any, **keywords: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(name))

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink)
        with pytest.warns(CheckpointWarning, match="could not be removed"):
            assert store.retain() == [infos[0]]
    assert len(list(store.directory.glob(".trash-*"))) == 1
    assert [info.step for info in store.list()] == [200, 300]

    store.unlock()
    store.lock()
    assert not list(store.directory.glob(".trash-*"))


def test_nothing_is_deleted_whose_old_name_a_power_cut_could_bring_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (100, 200, 300):
        save(store, step)

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.warns(CheckpointWarning, match="could not be removed: Input/output error"):
        store.retain()

    [trash] = store.directory.glob(".trash-*")
    assert sorted(path.name for path in trash.iterdir()) == ["dcp", "manifest.json", "state.pt"]


def test_directory_that_is_gone_is_a_warning_of_retention_and_not_an_error(store: Store) -> None:
    save(store, 100)
    shutil.rmtree(store.directory)

    with pytest.warns(CheckpointWarning, match="No such file or directory"):
        assert store.retain() == []


def test_reason_cannot_be_written_and_the_damaged_one_is_set_aside_all_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = save(store, 100)

    def create(path: Path) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "create", create)
    assert store.set_aside(info.path, "state.pt was cut").name == "damaged-step-0000000100"
    assert [problem.why for problem in problems(store.directory)] == ["it was set aside"]

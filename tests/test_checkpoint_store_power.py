"""A process that is killed, and a disk whose power fails, at each point of saving and removing checkpoints."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from disk import Call, Tree, build, disks_after_power_cut, recorded, save

from aengine.checkpoint.keep import Keep
from aengine.checkpoint.store import Store
from aengine.errors import CheckpointDamaged

STEPS = [100, 200, 300, 400]  # the last two of which make the first two go


def saves_with_retention(root: Path) -> list[Call]:
    """Return the record of four saves, with a "returned" for each commit that came back."""
    with recorded() as record:
        store = Store(root / "runs" / "checkpoints", Keep(last=2))
        store.lock()
        for step in STEPS:
            save(store, step)
            record.append(("returned", root, step))
            store.retain()
        store.unlock()
    return record


def what_is_lost(record: list[Call], root: Path, scratch: Path) -> str | None:
    """Cut the power after each of the calls, and return what is wrong with the first disk that is not as it must be."""
    numbers = itertools.count()
    seen: dict[Tree, tuple[list[int], list[int]]] = {}
    for length in range(len(record) + 1):
        done = record[:length]
        returned = [step for call, _, step in done if call == "returned"]
        for tree in disks_after_power_cut(done, root):
            if tree not in seen:
                place = scratch / str(next(numbers))
                build(tree, place)
                seen[tree] = listed_and_whole(Store(place / "runs" / "checkpoints"))
            listed, whole = seen[tree]
            if listed != whole:
                return f"after {done[-1]}: of the checkpoints {listed} only {whole} are whole"
            if not set(returned[-2:]) <= set(whole):
                return f"after {done[-1]}: {returned[-2:]} were committed, and {whole} are found"
    return None


def listed_and_whole(store: Store) -> tuple[list[int], list[int]]:
    listed, whole = [], []
    for info in store.list():
        listed.append(info.step)
        try:
            store.verify(info)
        except CheckpointDamaged:
            continue
        whole.append(info.step)
    return listed, whole


def test_power_cut_at_any_point_leaves_the_last_two_committed_checkpoints_whole(tmp_path: Path) -> None:
    root, scratch = tmp_path / "root", tmp_path / "scratch"
    root.mkdir()
    scratch.mkdir()
    record = saves_with_retention(root)

    assert what_is_lost(record, root, scratch) is None
    assert len(list(scratch.iterdir())) > 100  # different disks were looked at


def of_file(name: str) -> Callable[[list[Call], int], bool]:
    return lambda record, index: record[index][1].name == name


def of_draft(record: list[Call], index: int) -> bool:
    return record[index][1].name.startswith(".tmp-")


def of_parent(record: list[Call], index: int) -> bool:
    return record[index][1].name == "runs"


def after_rename_to(prefix: str) -> Callable[[list[Call], int], bool]:
    def is_meant(record: list[Call], index: int) -> bool:
        renames = [argument for call, _, argument in record[:index] if call == "rename"]
        is_store = record[index][1].name == "checkpoints"
        return is_store and bool(renames) and Path(renames[-1]).name.startswith(prefix)

    return is_meant


@pytest.mark.parametrize(
    "is_left_out",
    [
        pytest.param(of_file("state.pt"), id="state"),
        pytest.param(of_file("manifest.json"), id="manifest"),
        pytest.param(of_file("dcp"), id="dcp"),
        pytest.param(of_draft, id="draft"),
        pytest.param(of_parent, id="parent"),
        pytest.param(after_rename_to("step-"), id="commit"),
        pytest.param(after_rename_to(".trash-"), id="retention"),
    ],
)
def test_each_sync_is_needed(is_left_out: Callable[[list[Call], int], bool], tmp_path: Path) -> None:
    root, scratch = tmp_path / "root", tmp_path / "scratch"
    root.mkdir()
    scratch.mkdir()
    record = saves_with_retention(root)
    synced_less = [call for index, call in enumerate(record) if not (call[0] == "fsync" and is_left_out(record, index))]

    assert len(synced_less) < len(record)
    assert what_is_lost(synced_less, root, scratch) is not None


# Forks a process for each point at which it is to be killed, until one lives to the end.
KILLED_AT_EACH_CALL = """
import itertools, os, signal, sys
from pathlib import Path
from disk import save, watched
from aengine.checkpoint.keep import Keep
from aengine.checkpoint.store import Store

def saves_with_retention(root, last_call):
    calls = itertools.count(1)

    def before(call, path, argument):
        if next(calls) == last_call:
            if call == "write":
                with path.open("ab") as file:
                    file.write(argument[: len(argument) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    journal = (root / "returned").open("w", buffering=1)
    with watched(before):
        store = Store(root / "checkpoints", Keep(last=2))
        store.lock()
        for step in STEPS:
            save(store, step)
            journal.write(f"{step}\\n")
            store.retain()

for last_call in itertools.count(1):
    root = Path(sys.argv[1], str(last_call))
    root.mkdir()
    child = os.fork()
    if not child:
        saves_with_retention(root, last_call)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
"""


def test_killed_at_any_call_it_leaves_what_was_committed_and_the_next_writer_sweeps_the_rest(tmp_path: Path) -> None:
    script = f"STEPS = {STEPS}\n{KILLED_AT_EACH_CALL}"
    path = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{script}", str(tmp_path)], check=True, timeout=100
    )

    outcomes = set()
    for root in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        returned = [int(line) for line in (root / "returned").read_text().split()]
        store = Store(root / "checkpoints", Keep(last=2))
        listed, whole = listed_and_whole(store)
        assert listed == whole
        assert set(returned[-2:]) <= set(whole)
        assert not store.problems()

        store.lock()
        assert {path.name for path in store.directory.iterdir()} == {
            ".lock",
            *(info.path.name for info in store.list()),
        }
        save(store, 1000)
        store.retain()
        assert [info.step for info in store.list()] == [*whole, 1000][-2:]
        store.unlock()
        outcomes.add((tuple(returned), tuple(whole)))
    # Killed between the rename and the return of commit(), there is one more than was said; between the commit and the
    # end of retention, there are three.
    assert {((100,), (100, 200)), ((100, 200), (100, 200, 300)), ((100, 200, 300), (200, 300))} <= outcomes

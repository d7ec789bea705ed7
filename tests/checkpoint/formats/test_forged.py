"""Files that are forged, with their checksums right: found out before they fill the memory, and never half loaded."""

import io
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forged import repacked, replace_file
from support.saving_run import Run, saving

from aengine import CheckpointWarning, Events
from aengine.checkpoint import TorchFile
from aengine.checkpoint.formats.archive import NoArchive, Window, check_archive
from aengine.errors import CheckpointDamaged

TREE: dict[str, Any] = {"weights": torch.arange(4.0), "bytes": bytearray(b"xy")}


def in_pickle(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        assert name != "data.pkl" or old in content
        return content.replace(old, new) if name == "data.pkl" else content

    return change


def renamed(old: str, new: str) -> bytes:
    packed = repacked(TREE)
    assert len(old) == len(new)
    return packed.replace(old.encode(), new.encode())


def huge(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)  # LONG1


FORGED = {
    "compressed": repacked({"weights": torch.zeros(1 << 18)}, compression=zipfile.ZIP_DEFLATED),
    "larger than its record": repacked(TREE, in_pickle(b"K\x04t", huge(10**12) + b"t")),
    "a negative count": repacked(TREE, in_pickle(b"K\x04t", huge(-4) + b"t")),
    "a record that is not there": repacked(TREE, in_pickle(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009")),
    "no storage": repacked(TREE, in_pickle(b"storage", b"nothing")),
    "bytes by their number": repacked(TREE, in_pickle(b"c_codecs\nencode\n", b"J\x00\x00\x00\x7f\x85R(N\x88")),
    "a bytearray of 64 GB": repacked(
        TREE, lambda name, content: b"\x80\x02cbuiltins\nbytearray\n" + huge(1 << 36) + b"\x85R."
    ),
    "a memo of 64 GB": repacked(TREE, lambda name, content: b"\x80\x02}r\xfe\xff\xff\xffX\xff\xff\xff\x7f"),
    "a bytearray of 64 GB, at once": repacked(
        TREE, lambda name, content: b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b"."
    ),
    "a place before the file": repacked(TREE).replace(b"PK\x05\x06", b"PK\x05\x06")[:-6] + b"\xff\xff\xff\x7f\0\0",
    "two pickles": renamed("data/0", "DATA.PKL"[:6]),
    "none": b"no archive at all",
    "empty": b"",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_file_that_torch_would_not_have_written_is_damaged_and_not_unpacked(name: str) -> None:
    with pytest.raises(CheckpointDamaged, match="cannot read the file"):
        TorchFile().read(io.BytesIO(FORGED[name]))


def test_what_is_repacked_without_a_change_is_read() -> None:
    assert TorchFile().read(io.BytesIO(repacked(TREE)))["weights"].equal(TREE["weights"])


def test_entries_that_share_their_bytes_are_not_unpacked() -> None:
    """As in the bombs of zip archives that lie over each other."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/data/0", b"\0" * 10_000)
        for number in range(1, 200):
            entry = zipfile.ZipInfo(f"archive/data/{number}")
            entry.file_size, entry.compress_size, entry.CRC = 10_000, 10_000, 0
            entry.header_offset = archive.getinfo("archive/data/0").header_offset
            archive.filelist.append(entry)
    with pytest.raises(NoArchive, match="its entries have more bytes than its"):
        check_archive(packed)


def test_all_that_torch_saves_passes() -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
    kinds = [*floats, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64]
    tensors = {str(kind): torch.zeros(3).to(kind) for kind in [*kinds, torch.complex128]}
    for tree in (
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        tensors,
        {"sparse": torch.eye(3).to_sparse(), "empty": torch.empty(0), "shared": [tensors["torch.float32"]] * 2},
        [1j, {1, 2}, 2**70, torch.Size([1]), torch.device("cpu"), torch.float16, b"x", bytearray(b"x"), None, "é"],
    ):
        file = io.BytesIO()
        TorchFile().write(tree, file)
        check_archive(file)
        TorchFile().read(file)


def test_a_window_is_read_as_a_file() -> None:
    packed = repacked(TREE)
    file = io.BytesIO(b"before" + packed + b"after")
    check_archive(io.BufferedReader(Window(file, 6, len(packed))))
    window = Window(file, 6, len(packed))
    assert window.read() == packed
    with pytest.raises(OSError, match="before the beginning"):
        window.seek(-1)


def test_a_disk_that_fails_is_no_damage() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        check_archive(Failing(repacked(TREE)))


def tree_of(step: int, **changes: Any) -> Any:
    tree = {"state": {}, "engine": {"iteration": step}, "metrics": {}, "output": None, "handlers": {}, **changes}
    return {name: one for name, one in tree.items() if one is not ...}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ([1, 2], "does not hold the state of a run"),
        ({}, "does not hold the state of a run"),
        (tree_of(2, handlers=...), "does not hold the state of a run"),
        (tree_of(2, state=...), "does not hold the state of a run"),
        (tree_of(2, metrics=[]), "does not hold the state of a run"),
        (tree_of(3), "after 2 iterations, but after 3"),
        (tree_of(2, engine={}), "after 2 iterations, but after None"),
    ],
)
async def test_a_file_that_holds_something_else_is_passed_over(tmp_path: Path, tree: Any, words: str) -> None:
    async with saving(tmp_path) as run:
        run.checkpoint.attach(run.engine, Events.ITERATION_COMPLETED)
        await run.engine.run([1, 2])
    replace_file(tmp_path / "step-0000000002", "state.pt", repacked(tree))
    run = Run(tmp_path)
    with pytest.raises(CheckpointDamaged, match=words):
        await run.restore(2)
    with pytest.warns(CheckpointWarning, match=words):
        info = await run.restore()
    assert info is not None
    assert (info.step, run.steps) == (1, 1)
    await run.checkpoint.aclose()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORGED if name != "compressed"])
def test_it_takes_no_memory(name: str, tmp_path: Path) -> None:
    (tmp_path / "forged").write_bytes(FORGED[name])
    program = """
        import resource, sys
        from aengine.checkpoint import TorchFile
        from aengine.errors import CheckpointDamaged
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            TorchFile().read(open(sys.argv[1], "rb"))
        except CheckpointDamaged:
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000
            sys.exit(0)
        sys.exit(1)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), tmp_path / "forged"], check=True)

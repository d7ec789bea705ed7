"""Shards: they come back into whatever mesh there is, and the index of their files cannot run anything."""

import os
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from support.forged import repacked
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from aengine.checkpoint.capture.staging import Staging
from aengine.checkpoint.formats.serializers import TorchFile, export_safetensors
from aengine.checkpoint.formats.sharded import ShardStore, put_in_shards, take_out_shards
from aengine.errors import CheckpointDamaged, CheckpointMismatch, CheckpointNotWritten, NotSerializable


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # it is public, if not exported
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def store(mesh: DeviceMesh) -> ShardStore:
    return ShardStore()


def full(tensor: Any) -> torch.Tensor:
    whole: torch.Tensor = tensor.full_tensor()
    return whole


def state_of(mesh: DeviceMesh) -> dict[str, Any]:
    weight = distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])
    return {
        "model": {"weight": weight, "tied": weight, "plain": torch.ones(2), "none": None},
        "optimizer": {"state": [{"average": distribute_tensor(torch.randn(4, 3), mesh, [Replicate()]), "step": 3}]},
    }


def write(state: Any, store: ShardStore, folder: Path) -> None:
    divided = take_out_shards(Staging().stage(state))
    with (folder / "state.pt").open("wb") as file:
        TorchFile().write(divided.tree, file)
    store.write(divided.shards, folder / "dcp")


def read(state: Any, store: ShardStore, folder: Path) -> Any:
    with (folder / "state.pt").open("rb") as file:
        back = put_in_shards(TorchFile().read(file), state)
    store.read(back.shards, folder / "dcp")
    return back.tree


def test_staged_shard_is_a_copy_with_the_same_mesh_and_placements(mesh: DeviceMesh) -> None:
    state = state_of(mesh)
    state["parameter"] = torch.nn.Parameter(state["model"]["weight"])
    before = full(state["model"]["weight"]).clone()
    staged = Staging().stage(state)
    with torch.no_grad():
        state["model"]["weight"].to_local().zero_()
    copy = staged["model"]["weight"]
    assert type(copy) is DTensor
    assert full(copy).equal(before)
    assert (copy.device_mesh, copy.placements) == (mesh, (Shard(0),))
    assert staged["model"]["tied"] is copy
    assert isinstance(staged["parameter"], torch.nn.Parameter)
    assert full(staged["parameter"]).equal(before)


def test_shards_and_the_rest_come_back(mesh: DeviceMesh, store: ShardStore, tmp_path: Path) -> None:
    saved, live = state_of(mesh), state_of(mesh)
    live["model"]["plain"].zero_()
    before = full(live["model"]["weight"]).clone()
    write(saved, store, tmp_path)
    loaded = read(live, store, tmp_path)
    assert full(loaded["model"]["weight"]).equal(full(saved["model"]["weight"]))
    assert loaded["model"]["tied"] is loaded["model"]["weight"]
    assert full(live["model"]["weight"]).equal(before), "which is not changed while it is read"
    assert loaded["model"]["plain"].eq(1).all()
    assert loaded["model"]["none"] is None
    average = loaded["optimizer"]["state"][0]["average"]
    assert full(average).equal(full(saved["optimizer"]["state"][0]["average"]))
    assert loaded["optimizer"]["state"][0]["step"] == 3


def test_tied_shards_are_written_once(mesh: DeviceMesh) -> None:
    assert set(take_out_shards(state_of(mesh)).shards) == {
        "state['model']['weight']",
        "state['optimizer']['state'][0]['average']",
    }


def test_nothing_of_the_users_can_be_taken_for_a_place(mesh: DeviceMesh) -> None:
    state = {"state": None, "shards": {"state['state']": "state['state']"}}
    divided = take_out_shards(state)
    assert put_in_shards(divided.tree, {}).tree == state


def test_shards_of_chosen_places_are_read_and_no_others(mesh: DeviceMesh, store: ShardStore, tmp_path: Path) -> None:
    saved, live = state_of(mesh), {"model": state_of(mesh)["model"]}
    write(saved, store, tmp_path)
    with (tmp_path / "state.pt").open("rb") as file:
        back = put_in_shards(TorchFile().read(file), live, ("state['model']",))
    assert set(back.shards) == {"state['model']['weight']"}
    store.read(back.shards, tmp_path / "dcp")
    assert full(back.tree["model"]["weight"]).equal(full(saved["model"]["weight"]))
    assert back.tree["optimizer"]["state"][0]["average"] is None


def test_shards_are_written_from_another_thread(mesh: DeviceMesh, store: ShardStore, tmp_path: Path) -> None:
    state = state_of(mesh)
    thread = threading.Thread(target=write, args=(state, store, tmp_path))
    thread.start()
    for _ in range(10):
        torch.distributed.all_reduce(torch.ones(1))
    thread.join()
    loaded = read(state_of(mesh), store, tmp_path)
    assert full(loaded["model"]["weight"]).equal(full(state["model"]["weight"]))


def test_everything_is_on_the_disk_before_it_is_said_to_be(
    mesh: DeviceMesh, store: ShardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write(state_of(mesh), store, tmp_path)
    assert synced == {"dcp", ".metadata.tmp", *(path.name for path in (tmp_path / "dcp").glob("*.distcp"))}


def test_failure_to_write_is_an_ordinary_error(mesh: DeviceMesh, store: ShardStore, tmp_path: Path) -> None:
    write(state_of(mesh), store, tmp_path)
    with pytest.raises(CheckpointNotWritten, match=r"rank 0 could not write its shards: .*already exists"):
        write(state_of(mesh), store, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointNotWritten, match="rank 0") as caught:
        store.write(take_out_shards(state_of(mesh)).shards, tmp_path / "file")
    assert isinstance(caught.value.__cause__, OSError)


def test_state_without_a_place_for_a_shard_does_not_fit(mesh: DeviceMesh, store: ShardStore, tmp_path: Path) -> None:
    write(state_of(mesh), store, tmp_path)
    live = state_of(mesh)
    live["optimizer"]["state"].clear()
    with pytest.raises(
        CheckpointMismatch, match=r"1 of them, the first at state\['optimizer'\].* before its first step"
    ):
        read(live, store, tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.randn(4, 2), r"of shape \(4, 3\), and is to be loaded into torch.float32 of shape \(4, 2\)"),
        (torch.randn(4, 3, dtype=torch.float64), r"saved as torch.float32 .*loaded into torch.float64"),
    ],
)
def test_other_shapes_and_types_do_not_fit(
    mesh: DeviceMesh, store: ShardStore, tmp_path: Path, other: torch.Tensor, message: str
) -> None:
    write(state_of(mesh), store, tmp_path)
    live = state_of(mesh)
    live["model"]["weight"] = live["model"]["tied"] = distribute_tensor(other, mesh, [Shard(0)])
    before = full(live["model"]["weight"]).clone()
    with pytest.raises(CheckpointMismatch, match=message):
        read(live, store, tmp_path)
    assert full(live["model"]["weight"]).equal(before)


def test_shards_that_were_cut_are_damaged(mesh: DeviceMesh, store: ShardStore, tmp_path: Path) -> None:
    write(state_of(mesh), store, tmp_path)
    (shards,) = (tmp_path / "dcp").glob("*.distcp")
    os.truncate(shards, 100)
    with pytest.raises(CheckpointDamaged, match="rank 0 could not read its shards"):
        read(state_of(mesh), store, tmp_path)


class Malicious:
    """Makes a directory when it is unpickled, were it executed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def test_index_with_something_to_run_in_it_is_refused(mesh: DeviceMesh, store: ShardStore, tmp_path: Path) -> None:
    state = state_of(mesh)
    write(state, store, tmp_path)
    index = tmp_path / "dcp" / ".metadata"
    true_index = pickle.loads(index.read_bytes())
    true_index.planner_data = Malicious(tmp_path / "executed")
    index.write_bytes(pickle.dumps(true_index))
    with pytest.raises(CheckpointDamaged, match=r"asks for posix\.mkdir.* Nothing of it was executed"):
        read(state, store, tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(index.read_bytes())
    assert (tmp_path / "executed").exists()  # so it would have been


@pytest.mark.parametrize("name", ["eval", "torch.Size.__class__", "load"])
def test_index_that_reaches_through_a_module_is_refused(store: ShardStore, tmp_path: Path, name: str) -> None:
    module = {"eval": "builtins", "torch.Size.__class__": "torch", "load": "torch"}[name]
    text = f"\x80\x04\x8c{chr(len(module))}{module}\x8c{chr(len(name))}{name}\x93."
    (tmp_path / ".metadata").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointDamaged, match="has no use for"):
        store.read({}, tmp_path)


def test_index_that_has_bytes_to_unpickle_for_a_tensor_is_refused(
    mesh: DeviceMesh, store: ShardStore, tmp_path: Path
) -> None:
    """DCP reads such an entry with weights_only=False."""
    state = state_of(mesh)
    write(state, store, tmp_path)
    index = tmp_path / "dcp" / ".metadata"
    true_index = pickle.loads(index.read_bytes())
    true_index.state_dict_metadata["state['model']['weight']"] = metadata.BytesStorageMetadata()
    index.write_bytes(pickle.dumps(true_index))
    with pytest.raises(CheckpointDamaged, match="BytesStorageMetadata"):
        read(state, store, tmp_path)


def test_index_that_refers_to_files_elsewhere_is_refused(mesh: DeviceMesh, store: ShardStore, tmp_path: Path) -> None:
    state = state_of(mesh)
    write(state, store, tmp_path)
    index = tmp_path / "dcp" / ".metadata"
    true_index = pickle.loads(index.read_bytes())
    for key, place in true_index.storage_data.items():
        true_index.storage_data[key] = filesystem._StorageInfo("../" + place.relative_path, place.offset, place.length)
    index.write_bytes(pickle.dumps(true_index))
    with pytest.raises(CheckpointDamaged, match=r"'\.\./__0_0\.distcp', which is no plain file"):
        read(state, store, tmp_path)


def test_a_shard_that_would_unpack_to_more_than_its_size_is_not_unpacked(
    mesh: DeviceMesh, store: ShardStore, tmp_path: Path
) -> None:
    write(state_of(mesh), store, tmp_path)
    (shards,) = (tmp_path / "dcp").glob("*.distcp")
    compressed = repacked(torch.zeros(4, 3), compression=zipfile.ZIP_DEFLATED)
    shards.write_bytes(compressed)
    index = tmp_path / "dcp" / ".metadata"
    true_index = pickle.loads(index.read_bytes())
    for key, place in true_index.storage_data.items():
        true_index.storage_data[key] = filesystem._StorageInfo(place.relative_path, 0, len(compressed))
    index.write_bytes(pickle.dumps(true_index))
    with pytest.raises(CheckpointDamaged, match="is compressed, to"):
        read(state_of(mesh), store, tmp_path)


def test_a_file_that_has_no_checksum_is_not_read(mesh: DeviceMesh, store: ShardStore, tmp_path: Path) -> None:
    shards = take_out_shards(state_of(mesh)).shards
    store.write(shards, tmp_path / "dcp")
    store.read(shards, tmp_path / "dcp", {"__0_0.distcp"})
    with pytest.raises(CheckpointDamaged, match=r"names '__0_0\.distcp', which is unknown"):
        store.read(shards, tmp_path / "dcp", {"__1_0.distcp"})


def _forge_size(index: Any) -> None:
    next(iter(index.state_dict_metadata.values())).size = 7


def _forge_type(index: Any) -> None:
    next(iter(index.state_dict_metadata.values())).properties = None


def _forge_place(index: Any) -> None:
    index.storage_data = dict.fromkeys(index.storage_data, torch.Size([1]))


def _forge_name(index: Any) -> None:
    key, place = next(iter(index.storage_data.items()))
    index.storage_data[key] = filesystem._StorageInfo(7, place.offset, place.length)  # type: ignore[arg-type]


def _forge_offset(index: Any) -> None:
    for key, place in index.storage_data.items():
        index.storage_data[key] = filesystem._StorageInfo(place.relative_path, 2**60, 2**60)


def _lose_places(index: Any) -> None:
    index.storage_data.clear()


def _lose_chunks(index: Any) -> None:
    for one in index.state_dict_metadata.values():
        one.chunks = None


@pytest.mark.parametrize(
    "forge", [_forge_size, _forge_type, _forge_place, _forge_name, _forge_offset, _lose_places, _lose_chunks]
)
def test_an_index_that_was_forged_is_damaged(
    mesh: DeviceMesh, store: ShardStore, tmp_path: Path, forge: Callable[[Any], None]
) -> None:
    write(state_of(mesh), store, tmp_path)
    index = tmp_path / "dcp" / ".metadata"
    true_index = pickle.loads(index.read_bytes())
    forge(true_index)
    index.write_bytes(pickle.dumps(true_index))
    with pytest.raises(CheckpointDamaged):
        read(state_of(mesh), store, tmp_path)


def test_an_index_cannot_have_more_allocated_than_its_size(store: ShardStore, tmp_path: Path) -> None:
    """Python's unpickler in C makes room for as many values as the number of one says, here 2**32."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x02}r\xfe\xff\xff\xff.")
    with pytest.raises(CheckpointDamaged, match="is no index of shards"):
        store.read({}, tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"no": "index"}), pickle.dumps(None)])
def test_index_that_is_none_is_damaged(store: ShardStore, tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointDamaged):
        store.read({}, tmp_path)


def test_index_that_is_missing_or_does_not_know_a_tensor_is_said_so(
    mesh: DeviceMesh, store: ShardStore, tmp_path: Path
) -> None:
    shards = take_out_shards(state_of(mesh)).shards
    with pytest.raises(CheckpointDamaged, match="is missing"):
        store.read(shards, tmp_path / "dcp")
    store.write(shards, tmp_path / "dcp")
    with pytest.raises(CheckpointMismatch, match="no sharded tensor other"):
        store.read({"other": next(iter(shards.values()))}, tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").unlink()
    (tmp_path / "dcp" / ".metadata").mkdir()
    with pytest.raises(IsADirectoryError):
        store.read(shards, tmp_path / "dcp")


def test_shards_are_not_exported_as_if_they_were_the_whole(mesh: DeviceMesh, tmp_path: Path) -> None:
    with pytest.raises(NotSerializable, match=r"state\['model'\]\['weight'\] is no dense tensor"):
        export_safetensors(state_of(mesh), tmp_path / "weights")


# It leaves by os._exit(), for threads of torch's gloo now and then abort a process that ends as others do.
RANK = """
import os, sys, torch, torch.distributed
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from aengine.checkpoint.formats.serializers import TorchFile
from aengine.checkpoint.formats.sharded import ShardStore, put_in_shards, take_out_shards
from aengine.checkpoint.capture.staging import Staging

rank, size, folder, action = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
store = torch.distributed.FileStore(str(folder / f"store-{action}"), size)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
mesh = init_device_mesh("cpu", (size,))
whole = torch.arange(21.0).reshape(7, 3)
placement = Replicate() if action == "read" and size == 2 else Shard(0)
weight = distribute_tensor(whole if action == "write" else torch.zeros(7, 3), mesh, [placement])
shards = ShardStore()
if action == "write":
    divided = take_out_shards(Staging().stage({"weight": weight, "rank": rank}))
    with (folder / f"rank-{rank}.pt").open("wb") as file:
        TorchFile().write(divided.tree, file)
    shards.write(divided.shards, folder / "dcp")
else:
    with (folder / "rank-0.pt").open("rb") as file:
        back = put_in_shards(TorchFile().read(file), {"weight": weight, "rank": -1})
    shards.read(back.shards, folder / "dcp")
    assert back.tree["weight"].full_tensor().equal(whole)
torch.distributed.destroy_process_group()
os._exit(0)
"""


def run_ranks(size: int, folder: Path, action: str) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(size), str(folder), action], stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(errors)


@pytest.mark.slow
@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2), (2, 3)])
def test_shards_written_by_some_ranks_are_read_by_any_number(tmp_path: Path, writers: int, readers: int) -> None:
    run_ranks(writers, tmp_path, "write")
    run_ranks(readers, tmp_path, "read")

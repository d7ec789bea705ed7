"""Files: what goes wrong with them is said as it was, and nothing that they say is executed."""

import errno
import io
import os
import pickle
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model

from aengine.checkpoint.capture.staging import Staging
from aengine.checkpoint.formats.serializers import TorchFile, export_safetensors
from aengine.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, NotSerializable

STATE = {"weights": [torch.arange(1000.0), torch.ones(3, dtype=torch.bfloat16)], "step": 7, "name": "run"}


class Disk:
    """A file that has `write` and `flush` and nothing else, and fails at one of the calls."""

    def __init__(self, error: BaseException | None = None, failing_call: int = 0) -> None:
        self.data = bytearray()
        self.calls: list[str] = []
        self._error = error
        self._failing_call = failing_call

    def write(self, data: Any) -> int:
        self._call("write")
        self.data += data
        return len(data)

    def flush(self) -> None:
        self._call("flush")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self._error is not None and len(self.calls) == self._failing_call:
            raise self._error


def write(tree: Any, disk: Disk) -> None:
    TorchFile().write(tree, cast(BinaryIO, disk))


def written(tree: Any) -> bytes:
    disk = Disk()
    write(tree, disk)
    return bytes(disk.data)


def calls_of(tree: Any) -> list[str]:
    disk = Disk()
    write(tree, disk)
    return disk.calls


def test_file_is_written_in_order_and_read_back() -> None:
    loaded = TorchFile().read(io.BytesIO(written(STATE)))
    assert loaded["weights"][0].equal(STATE["weights"][0])  # type: ignore[index]
    assert loaded["weights"][1].equal(STATE["weights"][1])  # type: ignore[index]
    assert (loaded["step"], loaded["name"]) == (7, "run")


@pytest.mark.parametrize("failing_call", range(1, len(calls_of(STATE)) + 1))
def test_error_of_the_disk_comes_out_as_the_very_object_and_the_file_is_let_alone_then(failing_call: int) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    disk = Disk(error, failing_call)
    with pytest.raises(OSError, match="No space left") as caught:
        write(STATE, disk)
    assert caught.value is error
    assert len(disk.calls) == failing_call


def test_last_call_is_a_flush() -> None:
    assert calls_of(STATE)[-1] == "flush"


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("error", [Stopped(), ValueError("not now"), KeyboardInterrupt()])
def test_any_other_exception_of_the_file_comes_out_as_well(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        write(STATE, Disk(error, 3))
    assert caught.value is error


def test_tree_that_was_not_staged_and_cannot_be_pickled_is_refused() -> None:
    with pytest.raises(NotSerializable, match="Staging says where it is"):
        written({"a": lambda: None})


def test_any_other_error_of_torch_is_left_as_it_is() -> None:
    numbers = torch.randn(4, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        written([numbers, torch.view_as_real(numbers)])


def test_error_of_the_disk_while_reading_is_no_damage() -> None:
    class Broken(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        TorchFile().read(Broken(written(STATE)))


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_file_that_was_cut_is_damaged(share: float) -> None:
    data = written(STATE)
    with pytest.raises(CheckpointDamaged, match=r"cannot read the file: \w+"):
        TorchFile().read(io.BytesIO(data[: int(len(data) * share)]))


def test_file_of_another_kind_is_damaged() -> None:
    with pytest.raises(CheckpointDamaged):
        TorchFile().read(io.BytesIO(b"these are not the weights that you are looking for"))


class Malicious:
    """Makes a directory when it is unpickled, were it executed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def test_nothing_that_a_file_asks_for_is_executed(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"weights": Malicious(tmp_path / "executed")}, file)
    file.seek(0)
    with pytest.raises(CheckpointMismatch, match=r"mkdir.*Nothing of it was executed"):
        TorchFile().read(file)
    assert not (tmp_path / "executed").exists()
    file.seek(0)
    torch.load(file, weights_only=False)
    assert (tmp_path / "executed").exists()  # so it would have been


def test_bare_pickle_is_not_executed_either(tmp_path: Path) -> None:
    data = pickle.dumps(Malicious(tmp_path / "executed"), protocol=2)
    with pytest.raises(CheckpointError):
        TorchFile().read(io.BytesIO(data))
    assert not (tmp_path / "executed").exists()


def test_type_that_does_not_load_is_named_on_one_line() -> None:
    file = io.BytesIO()
    torch.save({"a": np.arange(3)}, file)
    file.seek(0)
    with pytest.raises(CheckpointMismatch, match=r"numpy\._core\.multiarray\._reconstruct") as caught:
        TorchFile().read(file)
    assert "\n" not in str(caught.value)
    assert "weights_only` set to `False`" not in str(caught.value)


def test_checksums_inside_are_left_out_in_this_context_only() -> None:
    """While a file is being written, in its very middle, the option of torch is as it was for everybody."""
    seen: list[bool] = []

    class Looking(Disk):
        def write(self, data: Any) -> int:
            thread = threading.Thread(target=lambda: seen.append(torch.serialization.get_crc32_options()))
            thread.start()
            thread.join()
            return super().write(data)

    disk = Looking()
    write(STATE, disk)
    seen.append(torch.serialization.get_crc32_options())
    assert set(seen) == {True}
    file = io.BytesIO()
    torch.save(STATE, file)
    assert zipfile.ZipFile(file).testzip() is None
    with_option_set = zipfile.ZipFile(io.BytesIO(bytes(disk.data)))
    assert with_option_set.testzip() is not None  # torch.load() does not look, and we have a checksum of the whole


def test_torch_whose_option_is_one_for_all_threads_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aengine.checkpoint.formats.serializers._options", None)
    assert zipfile.ZipFile(io.BytesIO(written(STATE))).testzip() is None


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.body = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("is_staged", [False, True], ids=["live", "staged"])
def test_exported_weights_load_into_another_model(tmp_path: Path, is_staged: bool) -> None:  # noqa: FBT001
    model, other = Tied(), Tied()
    state: Any = model.state_dict()
    left_out = export_safetensors(Staging().stage(state) if is_staged else state, tmp_path / "model.safetensors")
    assert left_out == {"head.weight": "embedding.weight"}
    load_model(other, tmp_path / "model.safetensors")
    assert all(other.state_dict()[name].equal(tensor) for name, tensor in state.items())


def test_names_that_were_left_out_are_in_the_metadata(tmp_path: Path) -> None:
    export_safetensors(Tied().state_dict(), tmp_path / "model.safetensors", {"step": "7"})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7", "head.weight": "embedding.weight"}
        assert set(file.keys()) == {"embedding.weight", "body.weight", "body.bias"}


def test_nested_trees_views_and_strides_are_exported_as_plain_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tree = {
        "model": {"layers": [base[0], base[:2], base.t()]},
        "empty": [torch.empty(0), torch.empty(0)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    assert export_safetensors(tree, tmp_path / "weights") == {}
    loaded = load_file(tmp_path / "weights")
    assert loaded["model.layers.0"].equal(base[0])
    assert loaded["model.layers.1"].equal(base[:2])
    assert loaded["model.layers.2"].equal(base.t())
    assert loaded["empty.1"].shape == (0,)
    assert loaded["parameter"].equal(torch.ones(2))
    assert loaded["conjugate"].item() == 1 - 2j


def test_weights_that_are_in_the_tree_twice_have_both_names(tmp_path: Path) -> None:
    layer = {"w": torch.ones(1)}
    assert export_safetensors({"a": layer, "b": layer}, tmp_path / "weights") == {"b.w": "a.w"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"w": torch.ones(1)}, "step": 3}, r"state\['step'\] is no dense tensor but 3"),
        ({"w": torch.eye(2).to_sparse()}, r"state\['w'\] is no dense tensor"),
        ({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, r"state\['a'\]\['b'\] would be called 'a\.b'"),
        ({"w": torch.ones(1, dtype=torch.complex128)}, "no type for torch.complex128"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_the_file_before_is_kept(
    tmp_path: Path, tree: Any, message: str
) -> None:
    (tmp_path / "weights").write_bytes(b"the one before")
    with pytest.raises(NotSerializable, match=message):
        export_safetensors(tree, tmp_path / "weights")
    assert (tmp_path / "weights").read_bytes() == b"the one before"
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_missing_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r'pip install "safetensors'):
        export_safetensors({"w": torch.ones(1)}, tmp_path / "weights")

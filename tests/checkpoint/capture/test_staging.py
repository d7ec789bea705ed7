"""Staging: the copy is equal, shares nothing with what it was made of, and is made in the same memory every time."""

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from aengine.checkpoint.capture.memory import PrivateMemory, SharedMemory
from aengine.checkpoint.capture.staging import Staging
from aengine.checkpoint.formats.serializers import TorchFile
from aengine.errors import NotSerializable


@pytest.fixture(params=[PrivateMemory, SharedMemory])
def staging(request: pytest.FixtureRequest) -> Iterator[Staging]:
    memory: PrivateMemory | SharedMemory = request.param()
    yield Staging(memory)
    if isinstance(memory, SharedMemory):
        memory.close()


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for item in tree.values() for leaf in leaves(item)]
    if isinstance(tree, list | tuple):
        return [leaf for item in tree for leaf in leaves(item)]
    return [tree]


def bits(value: Any) -> Any:
    """Return what two trees have in common if they are the same to the last bit."""
    if isinstance(value, torch.Tensor):
        numbers = value.detach().contiguous().reshape(-1)
        return type(value), value.dtype, value.shape, value.requires_grad, numbers.view(torch.uint8).tolist()
    if isinstance(value, dict):
        return type(value), [(key, bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [bits(item) for item in value]
    return type(value), repr(value)


def through_a_file(tree: Any) -> Any:
    file = io.BytesIO()
    TorchFile().write(tree, file)
    file.seek(0)
    return TorchFile().read(file)


def size_of_file(tree: Any) -> int:
    file = io.BytesIO()
    TorchFile().write(tree, file)
    return file.tell()


class Training:
    """All that a run usually saves."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        convolution = torch.nn.Conv2d(3, 8, 3)
        convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
        self.model = torch.nn.Sequential(
            convolution, torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, amsgrad=True)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.1, total_steps=20)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.parts: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "averaged": self.averaged,
        }

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(4, 3, 8, 8)).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.averaged.update_parameters(self.model)

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()} | {"random": torch.get_rng_state()}

    def load(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])


def test_training_goes_on_from_what_was_staged_as_if_nothing_had_been(staging: Staging) -> None:
    training = Training(seed=1)
    for _ in range(3):
        training.step()
    file = io.BytesIO()
    TorchFile().write(staging.stage(training.state()), file)
    for _ in range(3):
        training.step()
    expected = bits(training.state())

    resumed = Training(seed=2)
    file.seek(0)
    resumed.load(TorchFile().read(file))
    for _ in range(3):
        resumed.step()
    assert bits(resumed.state()) == expected


def test_staged_state_does_not_change_when_the_training_goes_on(staging: Staging) -> None:
    training = Training(seed=1)
    training.step()
    before = bits(training.state())
    staged = staging.stage(training.state())
    training.step()
    assert bits(staged) == before
    assert bits(training.state()) != before


def test_containers_are_new_and_may_be_changed(staging: Staging) -> None:
    state: dict[str, Any] = {"list": [1, [2]], "bytes": bytearray(b"ab"), "set": {1}, "metadata": OrderedDict(a=1)}
    staged = staging.stage(state)
    state["list"][1].append(3)
    state["bytes"].extend(b"c")
    state["set"].add(2)
    assert staged == {"list": [1, [2]], "bytes": bytearray(b"ab"), "set": {1}, "metadata": OrderedDict(a=1)}


def test_buffers_are_used_again(staging: Staging) -> None:
    training = Training(seed=1)
    training.step()
    first = staging.stage(training.state())
    places = [leaf.data_ptr() for leaf in leaves(first) if isinstance(leaf, torch.Tensor)]
    training.step()
    second = staging.stage(training.state())
    assert [leaf.data_ptr() for leaf in leaves(second) if isinstance(leaf, torch.Tensor)] == places
    assert bits(second) == bits(training.state())


def test_optimizer_that_gets_its_state_after_the_first_stage_is_staged_whole(staging: Staging) -> None:
    training = Training(seed=1)
    assert bits(staging.stage(training.state())) == bits(training.state())
    training.step()
    assert bits(staging.stage(training.state())) == bits(training.state())
    training.model.append(torch.nn.Linear(5, 2))
    assert bits(staging.stage(training.state())) == bits(training.state())


def test_buffers_that_still_fit_are_kept_when_the_state_grows() -> None:
    staging = Staging()
    place = staging.stage([torch.ones(1000)])[0].data_ptr()
    grown = staging.stage([torch.ones(10), torch.ones(1000)])
    assert grown[1].data_ptr() == place


def test_shared_memory_is_kept_when_the_state_shrinks_and_grows_again() -> None:
    memory = SharedMemory()
    staging = Staging(memory)
    staging.stage([torch.ones(1000), torch.ones(10)])
    arena = memory.arena
    staging.stage([torch.ones(10)])
    staging.stage([torch.ones(1010)])
    assert memory.arena is arena
    memory.close()


def test_tied_weights_are_copied_once_and_tied_in_the_result_and_in_the_file(staging: Staging) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(100, 50), torch.nn.Linear(50, 100, bias=False))
    model[1].weight = model[0].weight
    state = model.state_dict()
    assert state["0.weight"] is not state["1.weight"]
    staged = staging.stage(state)
    assert staged["0.weight"].data_ptr() == staged["1.weight"].data_ptr()
    assert staged["0.weight"].untyped_storage().nbytes() == 100 * 50 * 4
    assert size_of_file(staged) < 100 * 50 * 4 + 3000
    loaded = through_a_file(staged)
    assert loaded["0.weight"].data_ptr() == loaded["1.weight"].data_ptr()
    model.load_state_dict(loaded)


def test_views_that_overlap_still_do(staging: Staging) -> None:
    base = torch.arange(100.0)
    staged = staging.stage({"whole": base[10:50], "part": base[20:60].view(8, 5), "same": base[10:50]})
    assert staged["whole"].equal(torch.arange(10.0, 50.0))
    assert staged["part"].equal(torch.arange(20.0, 60.0).view(8, 5))
    staged["whole"].zero_()
    assert staged["part"].eq(0).sum() == 30
    assert staged["same"].eq(0).all()
    assert staged["part"].untyped_storage().nbytes() == 50 * 4


def test_only_what_is_seen_of_a_storage_is_copied(staging: Staging) -> None:
    base = torch.randn(1_000_000)
    staged = staging.stage({"a": base[5:10], "b": base[999_000:], "column": base.view(1000, 1000)[:, 7]})
    assert staged["a"].equal(base[5:10])
    assert staged["b"].equal(base[999_000:])
    assert staged["column"].equal(base[7::1000])
    assert size_of_file(staged) < 12_000


def test_columns_of_one_matrix_do_not_bring_the_matrix_along(staging: Staging) -> None:
    base = torch.randn(1000, 1000)
    staged = staging.stage([base[:, 1], base[:, 5], base[:, 1]])
    assert staged[0].equal(base[:, 1])
    assert staged[1].equal(base[:, 5])
    assert staged[2].data_ptr() == staged[0].data_ptr()
    assert sum(each.nbytes for each in staged[:2]) == 8000
    assert size_of_file(staged) < 12_000


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, 4).t(),
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(4, 1, 3).permute(2, 0, 1),
        lambda: torch.randn(7, 3)[2:5],
    ],
    ids=["transposed", "channels last", "permuted", "rows"],
)
def test_dense_tensor_keeps_its_strides(staging: Staging, make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    (staged,) = staging.stage([tensor])
    assert staged.stride() == tensor.stride()
    assert staged.equal(tensor)
    assert staged.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(1).expand(6),
        lambda: torch.randn(10)[::2],
        lambda: torch.randn(4, 6)[:, 1:3],
        lambda: torch.randn(10).unfold(0, 3, 1),
        lambda: torch.as_strided(torch.arange(8.0), (2, 2, 2), (1, 1, 5)),
    ],
    ids=["expanded", "every second", "columns", "windows", "as many bytes as it seems to need"],
)
def test_tensor_with_gaps_or_repetitions_becomes_contiguous(staging: Staging, make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    (staged,) = staging.stage([tensor])
    assert staged.is_contiguous()
    assert staged.equal(tensor)
    assert staged.untyped_storage().nbytes() == staged.nbytes


def test_each_tensor_has_a_storage_with_nothing_else_in_it(staging: Staging) -> None:
    training = Training(seed=1)
    training.step()
    staged = [leaf for leaf in leaves(staging.stage(training.state())) if isinstance(leaf, torch.Tensor)]
    assert all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in staged)
    assert len({leaf.untyped_storage().data_ptr() for leaf in staged}) == len(staged)


def test_same_object_twice_is_the_same_object_twice(staging: Staging) -> None:
    tensor, items = torch.ones(2), [1, 2]
    staged = staging.stage({"a": tensor, "b": [tensor], "c": items, "d": (items,)})
    assert staged["a"] is staged["b"][0]
    assert staged["c"] is staged["d"][0]
    assert staged["c"] is not items


def test_tree_that_doubles_at_each_level_is_walked_once(staging: Staging) -> None:
    tree: list[Any] = [torch.ones(1)]
    for _ in range(100):
        tree = [tree, tree]
    staged = staging.stage(tree)
    for _ in range(100):
        assert staged[0] is staged[1]
        staged = staged[0]


def test_one_storage_read_as_two_types_can_be_saved(staging: Staging) -> None:
    """torch.save() itself refuses it: staged, they are two."""
    numbers = torch.randn(4, dtype=torch.complex64)
    loaded = through_a_file(staging.stage({"complex": numbers, "real": torch.view_as_real(numbers)}))
    assert loaded["complex"].equal(numbers)
    assert loaded["real"].equal(torch.view_as_real(numbers))


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_of_number_is_kept_to_the_bit(staging: Staging, dtype: torch.dtype) -> None:
    random_bytes = torch.randint(0, 2 if dtype is torch.bool else 256, (6 * dtype.itemsize,), dtype=torch.uint8)
    tensor = random_bytes.view(dtype)
    state = {"flat": tensor, "part": tensor[1:3], "one": tensor[5], "none": tensor[:0].reshape(0, 3)}
    assert bits(through_a_file(staging.stage(state))) == bits(state)


def test_empty_tensors_stay_empty_and_keep_their_shapes(staging: Staging) -> None:
    state = [torch.empty(0), torch.empty(3, 0, 2), torch.ones(5)[:0], torch.nn.Parameter(torch.empty(0, 2))]
    staged = staging.stage(state)
    assert bits(staged) == bits(state)
    assert bits(through_a_file(staged)) == bits(state)


def test_parameters_stay_parameters_and_gradients_are_asked_for_as_before(staging: Staging) -> None:
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    state = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "frozen": frozen,
        "leaf": torch.ones(2, requires_grad=True),
        "result": torch.ones(2, requires_grad=True) * 2,
        "buffer": torch.nn.Buffer(torch.ones(2)),
    }
    for _ in range(2):
        staged = staging.stage(state)
        assert bits(staged) == bits(state)
        assert all(each.is_leaf for each in staged.values())
    assert bits(through_a_file(staged)) == bits(state)


def test_inference_tensors_and_inference_mode_make_no_difference(staging: Staging) -> None:
    with torch.inference_mode():
        inference = torch.arange(3.0)
        first = staging.stage([inference, torch.nn.Parameter(torch.ones(1))])
    assert not first[0].is_inference()
    with torch.inference_mode():
        inference += 1
    second = staging.stage([inference, torch.nn.Parameter(torch.ones(1))])
    assert second[0].tolist() == [1, 2, 3]
    second[0].add_(1)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_default_device_of_the_user_makes_no_difference(staging: Staging, device: str) -> None:
    tensors = [torch.ones(2), torch.ones(0), torch.ones(4)[::2], torch.nn.Parameter(torch.ones(1))]
    with torch.device(device):
        staged = staging.stage(tensors)
    assert bits(through_a_file(staged)) == bits(tensors)


def test_staging_leaves_gradient_mode_as_it_was(staging: Staging) -> None:
    staging.stage([torch.ones(2)])
    assert torch.is_grad_enabled()
    with torch.no_grad():
        staging.stage([torch.ones(2)])
        assert not torch.is_grad_enabled()


def test_conjugate_and_negative_views_are_resolved(staging: Staging) -> None:
    numbers = torch.randn(3, 2, dtype=torch.complex64)
    state = {"numbers": numbers, "conjugate": numbers.conj(), "negative": numbers.conj().imag, "adjoint": numbers.mH}
    expected = {name: each.resolve_conj().resolve_neg() for name, each in state.items()}
    for _ in range(2):
        loaded = through_a_file(staging.stage(state))
        assert all(loaded[name].equal(each) for name, each in expected.items())


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support", "ignore:torch.quantize_per_tensor", "ignore:TypedStorage"
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
    ],
    ids=["coo", "csr", "quantized"],
)
def test_rare_layouts_are_cloned(staging: Staging, make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    staged = staging.stage({"a": tensor, "b": [tensor]})
    assert staged["a"] is staged["b"][0]
    assert staged["a"] is not tensor
    dense = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
    loaded = through_a_file(staged)["a"]
    assert loaded.layout == tensor.layout
    assert (loaded.dequantize() if tensor.is_quantized else loaded.to_dense()).equal(dense)


def test_versions_of_modules_are_kept_for_load_state_dict(staging: Staging) -> None:
    """A batch norm without a version is taken for an old one, which is given the counter that it lacks."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    state = model.state_dict()
    metadata = state._metadata  # type: ignore[attr-defined]
    staged = staging.stage({"model": state})["model"]
    assert staged._metadata == metadata
    assert staged._metadata is not metadata
    loaded = through_a_file(staged)
    assert loaded._metadata == metadata
    del loaded["0.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        model.load_state_dict(loaded)


def test_refused_state_leaves_the_one_before_as_it_was(staging: Staging) -> None:
    tensor = torch.zeros(3)
    staged = staging.stage([tensor])
    tensor += 1
    with pytest.raises(NotSerializable):
        staging.stage([tensor, object()])
    assert staged[0].eq(0).all()


def test_what_was_staged_outlives_the_stager() -> None:
    memory = SharedMemory()
    staged = Staging(memory).stage([torch.ones(1000)])
    memory.close()
    del memory
    assert staged[0].sum() == 1000


def test_memory_that_cannot_be_had_is_an_error_and_the_next_stage_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SharedMemory()
    staging = Staging(memory)
    staging.stage([torch.ones(10)])
    with monkeypatch.context() as patch:
        patch.setattr("aengine.checkpoint.capture.memory._create_file", lambda size: [][size])
        with pytest.raises(IndexError):
            staging.stage([torch.ones(1000)])
    assert staging.stage([torch.ones(10)])[0].sum() == 10
    memory.close()

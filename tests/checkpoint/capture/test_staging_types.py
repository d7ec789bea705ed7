"""What staging accepts loads back equal with weights_only=True, and what it refuses does not."""

import collections
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import importlib
import io
import pathlib
import pickle
import re
import struct
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from aengine.checkpoint.capture.staging import Staging
from aengine.checkpoint.capture.trees import DEEPEST
from aengine.checkpoint.formats.serializers import TorchFile
from aengine.errors import NotSerializable


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Settings:
    rate: float = 0.5


class Metric:
    def state_dict(self) -> dict[str, Any]:
        return {}


class Text(str):
    __slots__ = ()


class Bytes(bytes):
    __slots__ = ()


class ByteArray(bytearray):
    __slots__ = ()


class Complex(complex):
    __slots__ = ()


class Image(torch.Tensor):
    pass


def function() -> None: ...


def write(tree: Any) -> bytes:
    file = io.BytesIO()
    TorchFile().write(tree, file)
    return file.getvalue()


def read(data: bytes) -> Any:
    return TorchFile().read(io.BytesIO(data))


def through_torch_alone(tree: Any) -> Any:
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(value: Any) -> Any:
    """Return what two trees have in common if they are the same: types, order, and every bit, also of a NaN."""
    kind: Any = type(value)
    alike: Any = value
    if isinstance(value, torch.Tensor):
        numbers = value.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
        alike = value.dtype, value.shape, value.requires_grad, bytes(numbers.tolist())
    elif isinstance(value, dict):
        alike = tuple((same(key), same(item)) for key, item in value.items()), same(getattr(value, "_metadata", None))
    elif isinstance(value, list | tuple):
        alike = tuple(same(item) for item in value)
    elif isinstance(value, set):
        alike = frozenset(same(item) for item in value)
    elif isinstance(value, float | complex):
        alike = struct.pack("dd", value.real, value.imag)
    elif isinstance(value, bytearray):
        alike = bytes(value)
    return kind, alike


ACCEPTED: list[Any] = [
    None, True, 0, -1, 2**31, -(2**63), 2**2039 - 1, -(2**2039) + 1, 0.0, -0.0, float("inf"), float("nan"), 1 + 2j, "",
    "text", "\N{SNOWMAN}", "\ud800", b"bytes", bytes(range(256)) * 3, bytearray(), bytearray(b"ab"), torch.float32,
    torch.float8_e5m2, torch.bool, torch.device("cuda", 1), torch.device("cpu"), torch.Size([2, 3]), torch.Size([]),
    torch.strided, torch.sparse_coo, [], (), {}, set(), OrderedDict(), Counter(), [1, [2, (3,)]], (1,), (1, 2, 3, 4, 5),
    {"a": 1, 2: 3, 2.5: 4, None: 5, True: 6, ("b", (3, None)): 7, torch.float16: 8, b"key": 9}, {1, "two", (3, 4)},
    OrderedDict(b=1, a=[2]), Counter("abbb"), torch.ones(2), torch.nn.Parameter(torch.ones(2)),
]  # fmt: skip


def shown(value: Any) -> str:
    """Return an id that is the same in every process of one run."""
    text = f"set of {len(value)}" if isinstance(value, set) else re.sub(r"0x[0-9a-f]+", "", repr(value))
    return text[:30].encode("ascii", "replace").decode()


@pytest.mark.parametrize("value", ACCEPTED, ids=shown)
def test_what_is_accepted_loads_back_equal(value: Any) -> None:
    staged = Staging().stage({"state": [value]})
    assert same(staged) == same({"state": [value]})
    assert same(read(write(staged))) == same({"state": [value]})


REFUSED: list[tuple[Any, str]] = [
    (Color.RED, r"write x\.value or x\.name"),
    (Level.HIGH, r"write x\.value or x\.name"),
    (np.float64(0.1), r"write float\(x\)"),
    (np.float32(0.1), r"write float\(x\)"),
    (np.int64(3), r"write int\(x\)"),
    (np.bool_(True), r"write bool\(x\)"),  # noqa: FBT003 -- it is the value that matters
    (np.str_("a"), r"write str\(x\)"),
    (np.arange(3), r"write torch\.from_numpy\(x\)"),
    (Point(1, 2), r"write tuple\(x\)"),
    (torch.ones(3).max(0), r"write tuple\(x\)"),
    (collections.defaultdict(list), r"write dict\(x\)"),
    (collections.deque([1]), r"write list\(x\)"),
    (frozenset({1}), r"write set\(x\) or sorted\(x\)"),
    (range(3), r"write list\(x\)"),
    (Text("a"), r"write str\(x\)"),
    (pathlib.Path("a"), r"write str\(x\)"),
    (dt.datetime(2020, 1, 1, tzinfo=dt.UTC), r"write x\.isoformat\(\)"),
    (dt.date(2020, 1, 1), r"write x\.isoformat\(\)"),
    (dt.timedelta(1), r"write x\.total_seconds\(\)"),
    (decimal.Decimal(1), r"write str\(x\)"),
    (fractions.Fraction(1, 2), r"write str\(x\)"),
    (functools.partial(int), "leave it out of the state"),
    (function, "leave it out of the state"),
    (Settings, "leave it out of the state"),
    (Settings(), r"write dataclasses\.asdict\(x\)"),
    (Metric(), r"write x\.state_dict\(\)"),
    (torch.nn.Linear(1, 1), r"write x\.state_dict\(\)"),
    (torch.Generator(), r"write x\.get_state\(\)"),
    (torch.ones(2).as_subclass(Image), r"write x\.as_subclass\(torch\.Tensor\)"),
    (Bytes(b"a"), r"write bytes\(x\)"),
    (ByteArray(b"a"), r"write bytearray\(x\)"),
    (Complex(1, 2), r"write complex\(x\)"),
    ({"a": 1}.keys(), r"write set\(x\)"),
    ((x for x in "abc"), r"write list\(x\)"),
    (len, "leave it out of the state"),
    (Metric().state_dict, "leave it out of the state"),
    (slice(1), r"add_safe_globals\(\[slice\]\)"),
    (..., r"add_safe_globals\(\[ellipsis\]\)"),
    (2**2039, r"write hex\(x\)"),
    (-(2**2040), r"write hex\(x\)"),
    (b"", r"write bytearray\(\)"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("value", "advice"), REFUSED, ids=shown)
def test_what_is_refused_would_not_load_and_the_error_says_where_it_is_and_what_to_write(
    value: Any, advice: str
) -> None:
    state = {"optimizer": {"param_groups": [{"lr": value}]}}
    with pytest.raises(NotSerializable, match=advice) as caught:
        Staging().stage(state)
    assert str(caught.value).startswith("state['optimizer']['param_groups'][0]['lr'] ")
    with pytest.raises((pickle.PickleError, AttributeError, TypeError)):
        through_torch_alone(state)


@pytest.mark.parametrize("key", [Color.RED, np.int64(1), Point(1, 2), frozenset({1}), b"", 2**3000, (1, Level.HIGH)])
def test_keys_are_looked_at_as_well(key: Any) -> None:
    with pytest.raises(NotSerializable, match=r"^state\['a'\]\["):
        Staging().stage({"a": {key: 1}})
    with pytest.raises(NotSerializable, match=r"^state\['a'\]\["):
        Staging().stage({"a": {key}})


def test_tensors_are_no_keys() -> None:
    """They would load, and never be found: a tensor is equal to itself only."""
    with pytest.raises(NotSerializable, match=r"is a key of type torch\.Tensor"):
        Staging().stage({torch.ones(1): 1})


def test_attributes_of_an_ordered_dictionary_have_a_path() -> None:
    state: Any = OrderedDict(a=1)
    state._metadata = {"": {"version": np.int64(2)}}
    with pytest.raises(
        NotSerializable, match=r"^state\['model'\]\._metadata\[''\]\['version'\] is of type numpy.int64"
    ):
        Staging().stage({"model": state})


def test_tensor_without_numbers_is_refused() -> None:
    with pytest.raises(NotSerializable, match=r"^state\['w'\] is a tensor on the meta device.*to_empty"):
        Staging().stage({"w": torch.empty(2, device="meta")})
    freed = torch.ones(2)
    freed.untyped_storage().resize_(0)
    with pytest.raises(NotSerializable, match=r"^state\['w'\] is a tensor whose memory has been freed"):
        Staging().stage({"w": freed})
    with pytest.raises(NotSerializable, match="run a batch through the lazy module"):
        Staging().stage(torch.nn.LazyLinear(2).state_dict(keep_vars=True))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without it")
def test_layout_of_mkldnn_is_refused() -> None:
    with pytest.raises(NotSerializable, match=r"write x\.to_dense\(\)"):
        Staging().stage([torch.ones(2).to_mkldnn()])


def test_cycles_are_refused_with_their_path() -> None:
    items: list[Any] = [1]
    items.append({"back": (items,)})
    with pytest.raises(NotSerializable, match=r"^state\['a'\]\[1\]\['back'\]\[0\] contains itself"):
        Staging().stage({"a": items})
    ordered: Any = OrderedDict()
    ordered.itself = ordered
    with pytest.raises(NotSerializable, match=r"^state\.itself contains itself"):
        Staging().stage(ordered)


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"a": x}, lambda x: (x,), lambda x: OrderedDict(a=x)])
def test_deep_trees_are_saved_and_deeper_ones_than_pickle_can_write_are_refused(wrap: Any) -> None:
    tree = wrap(torch.ones(1))
    for _ in range(DEEPEST - 1):
        tree = wrap(tree)
    loaded = read(write(Staging().stage(tree)))
    for _ in range(DEEPEST):
        loaded = loaded["a"] if isinstance(loaded, dict) else loaded[0]
    assert loaded == 1
    with pytest.raises(NotSerializable, match=f"is more than {DEEPEST} levels deep"):
        Staging().stage(wrap(tree))


@pytest.mark.parametrize("value", [Point(1, 2), Level.HIGH, Color.RED, Settings(), decimal.Decimal("1.5")])
def test_type_that_the_user_allowed_is_copied_and_loads(value: Any) -> None:
    with torch.serialization.safe_globals([type(value)]):
        staged = Staging().stage({"a": value, "b": [value]})
        assert read(write(staged)) == {"a": value, "b": [value]}
    with pytest.raises(NotSerializable):
        Staging().stage({"a": value})


def test_copy_of_an_allowed_object_is_another_one() -> None:
    with torch.serialization.safe_globals([Settings]):
        settings = Settings()
        staged = Staging().stage([settings])
        settings.rate = 0.9
        assert staged[0].rate == 0.5


def test_allowed_type_whose_parts_are_not_allowed_is_refused() -> None:
    with (
        torch.serialization.safe_globals([np.ndarray]),
        pytest.raises(
            NotSerializable, match=r"state\[0\] is of type numpy.ndarray, which was allowed, but .*_reconstruct"
        ),
    ):
        Staging().stage([np.arange(3)])


def test_array_loads_where_all_of_its_types_are_allowed() -> None:
    parts = [np.ndarray, np.dtype, np.dtypes.Int64DType, importlib.import_module("numpy._core.multiarray")._reconstruct]
    with torch.serialization.safe_globals(parts):
        assert read(write(Staging().stage([np.arange(3)])))[0].tolist() == [0, 1, 2]


NUMBERS = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(NUMBERS))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = int(np.prod(shape))
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    raw = torch.tensor(list(data), dtype=torch.uint8) & (1 if dtype is torch.bool else 255)
    tensor = raw.view(dtype).reshape(shape)
    if draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(list(range(len(shape))))))
    if tensor.dim() > 0 and draw(st.booleans()):
        tensor = tensor[draw(st.integers(0, 1)) :: draw(st.integers(1, 2))]
    if dtype is torch.float32 and draw(st.booleans()):
        return torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
    return tensor


keys: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
keys |= st.tuples(st.text(max_size=2), st.integers())
plain = (
    keys | st.floats() | st.complex_numbers() | st.binary(min_size=1, max_size=5) | st.builds(bytearray, st.binary())
    | st.sampled_from([torch.float32, torch.device("cpu"), torch.Size([1, 2])])
)  # fmt: skip


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mapping = st.dictionaries(keys, inner, max_size=4)
    return (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | mapping | mapping.map(OrderedDict)
        | st.sets(keys, max_size=4) | st.tuples(inner).map(lambda one: [one[0], one[0], {"again": one[0]}])
    )  # fmt: skip


trees = st.recursive(plain | tensors(), containers, max_leaves=12)


@hypothesis.given(first=trees, second=trees)
def test_any_tree_comes_back_equal_whatever_was_staged_before(first: Any, second: Any) -> None:
    staging = Staging()
    for tree in (first, second, first):
        expected = same(copy.deepcopy(tree))
        staged = staging.stage(tree)
        for leaf in tensors_of(tree):  # what is staged does not see this
            leaf.detach().zero_()
        assert same(staged) == expected
        assert same(read(write(staged))) == expected


def tensors_of(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [leaf for item in tree.values() for leaf in tensors_of(item)]
    if isinstance(tree, list | tuple):
        return [leaf for item in tree for leaf in tensors_of(item)]
    return []

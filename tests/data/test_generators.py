"""What determines the order of data: generators and samplers, found wherever they are, captured and put back."""

import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset

from aengine import Engine
from aengine.data.generators import Opening, capture, restore, walk

GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "python": lambda: random.Random(2),
    "numpy": lambda: np.random.default_rng(3),
    "MT19937": lambda: np.random.Generator(np.random.MT19937(4)),
    "Philox": lambda: np.random.Generator(np.random.Philox(5)),
    "RandomState": lambda: np.random.RandomState(6),
    "BitGenerator": lambda: np.random.SFC64(7),
}


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    if isinstance(generator, np.random.BitGenerator):
        return float(generator.random_raw())
    return float(generator.random() if hasattr(generator, "random") else generator.random_sample())


class Slotted:
    __slots__ = ("__kept", "other")

    def __init__(self, kept: Any) -> None:
        self.__kept = kept


class Method:
    def __init__(self, generator: Any) -> None:
        self.any_name = generator

    def batches(self) -> Iterator[int]:
        yield from range(3)


def closure(generator: Any) -> Callable[[], Iterator[float]]:
    def batches() -> Iterator[float]:
        yield draw(generator)

    return batches


def cycle(generator: Any) -> Any:
    one, other = SimpleNamespace(), SimpleNamespace(generator=generator)
    one.other, other.one = other, one
    return one


def nested(generator: Any) -> Any:
    inner = SimpleNamespace(x=generator)
    for _ in range(50):
        inner = SimpleNamespace(inner=inner)
    return inner


PLACES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda generator: SimpleNamespace(whatever=generator),
    "slot": Slotted,
    "list": lambda generator: SimpleNamespace(all=[0, [generator]]),
    "dictionary": lambda generator: SimpleNamespace(all={"a": 1, "b": {2: generator}}),
    "tuple and deque": lambda generator: SimpleNamespace(all=deque([(generator,)])),
    "cycle": cycle,
    "deep": nested,
    "closure": closure,
    "partial": lambda generator: partial(draw, generator),
    "keyword of a partial": lambda generator: partial(draw, generator=generator),
    "bound method": lambda generator: Method(generator).batches,
    "default": lambda generator: lambda one=generator: iter([one]),
    "dataset": lambda generator: DataLoader(Slotted(generator), sampler=range(3)),  # type: ignore[arg-type]
    "collate function": lambda generator: DataLoader([1], collate_fn=closure(generator)),  # type: ignore[arg-type]
    "batch sampler": lambda generator: DataLoader([1], batch_sampler=Slotted(generator)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_of_any_kind_is_found_anywhere_and_put_back(kind: str) -> None:
    """As plain values, and in data that was built anew, as another process does it."""
    for place in PLACES.values():
        generator, again = GENERATORS[kind](), GENERATORS[kind]()
        draw(generator)
        opening = capture(place(generator))
        assert opening is not None
        expected = [draw(generator) for _ in range(3)]
        saved = Opening.from_plain(json.loads(json.dumps(opening.plain())))
        assert saved is not None
        restore(saved, place(again))
        assert [draw(again) for _ in range(3)] == expected


def test_those_of_the_process_are_put_back_as_plain_values_too() -> None:
    def draw_all() -> list[float]:
        return [random.gauss(0, 1), np.random.randn(), float(np.random.rand()), torch.rand(()).item()]

    draw_all()
    opening = capture(SimpleNamespace())
    assert opening is not None
    expected = draw_all()
    saved = Opening.from_plain(json.loads(json.dumps(opening.plain())))
    assert saved is not None
    restore(saved, SimpleNamespace())
    assert draw_all() == expected


def test_plain_values_load_with_weights_only(tmp_path: Any) -> None:
    loader = DataLoader(TensorDataset(torch.arange(3)), shuffle=True, generator=torch.Generator())
    opening = capture(loader)
    assert opening is not None
    torch.save(opening.plain(), tmp_path / "opening.pt")
    assert torch.load(tmp_path / "opening.pt", weights_only=True) == opening.plain()


@pytest.mark.parametrize("data", [[1, 2], (1, 2), range(3), None])
def test_what_is_always_in_the_same_order_has_nothing_to_capture(data: Any) -> None:
    assert capture(data) is None


DATASET: Any = range(3)


class WithState(Sampler[int]):
    def __init__(self) -> None:
        self.state: dict[str, Any] = {"epoch": 1, "of": [0]}

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


@pytest.mark.parametrize(
    "build",
    [
        lambda sampler: DataLoader(DATASET, sampler=sampler),
        lambda sampler: DataLoader(DATASET, batch_sampler=BatchSampler(sampler, 2, drop_last=False)),
        lambda sampler: SimpleNamespace(loader=DataLoader(DATASET, sampler=SimpleNamespace(order=sampler))),
    ],
)
def test_samplers_with_a_state_are_put_back(build: Callable[[Any], Any]) -> None:
    sampler, again = WithState(), WithState()
    opening = capture(build(sampler))
    sampler.state["epoch"] = 5  # what was captured is a copy
    sampler.state["of"].append(1)
    assert opening is not None
    again.state = {}
    restore(opening, build(again))
    assert again.state == {"epoch": 1, "of": [0]}


def test_models_and_engines_are_left_alone() -> None:
    """Their states have nothing to do with the order, and are not to be put back."""
    model, generator = torch.nn.Linear(1, 1), random.Random(1)

    class Source:
        def __init__(self) -> None:
            self.sampler = SimpleNamespace(policy=model, engine=Engine(lambda engine, batch: generator.random()))

    opening = capture(Source())
    assert opening is not None
    assert opening.own == {}


def test_large_data_is_looked_at_only_in_part() -> None:
    many = SimpleNamespace(items=[SimpleNamespace(items=list(map(str, range(5)))) for _ in range(2_000)])
    assert len(list(walk(many))) < 2_500


def test_data_that_lacks_a_generator_is_refused_by_its_place() -> None:
    sampler = RandomSampler(range(3), generator=torch.Generator())
    opening = capture(DataLoader(range(3), sampler=sampler))  # type: ignore[arg-type]
    assert opening is not None
    with pytest.raises(ValueError, match=r"no random number generator or sampler at \.sampler\.generator"):
        restore(opening, DataLoader(range(3)))  # type: ignore[arg-type]

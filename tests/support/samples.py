"""Data of twelve samples, in an order of its own each time: of each kind whose order has to come again, or be told."""

import random
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import anyio
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, TensorDataset, WeightedRandomSampler

COUNT = 12


def samples_of(batch: Any) -> list[int]:
    """Return the samples in a batch, of whatever kind it is."""
    if isinstance(batch, dict):
        batch = batch["x"]
    if isinstance(batch, list | tuple) and len(batch) and isinstance(batch[0], torch.Tensor):
        batch = batch[0]
    return [int(one) for one in (batch.reshape(-1).tolist() if hasattr(batch, "tolist") else batch)]


class Shuffled:
    """Plain data of one's own, shuffled by what draws `shuffle`."""

    def __init__(self, size: int, shuffle: Callable[[list[int]], Any]) -> None:
        self.size = size
        self.shuffle = shuffle

    def __len__(self) -> int:
        return (COUNT + self.size - 1) // self.size

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(COUNT))
        self.shuffle(order)
        for start in range(0, COUNT, self.size):
            yield order[start : start + self.size]


class AsyncShuffled(Shuffled):
    async def __aiter__(self) -> AsyncIterator[list[int]]:
        for batch in Shuffled.__iter__(self):
            await anyio.lowlevel.checkpoint()
            yield batch


class Unsized:
    """It does not say how long it is, so that a pass in its middle is known to be gone on with from the second on."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


class Stateful(Shuffled):
    """It is put back by its own state: the order, and where it stands."""

    def __init__(self, size: int, shuffle: Callable[[list[int]], Any]) -> None:
        super().__init__(size, shuffle)
        self.order: list[int] = []
        self.next = COUNT

    def __iter__(self) -> Iterator[list[int]]:
        if self.next >= COUNT:
            self.order, self.next = list(range(COUNT)), 0
            self.shuffle(self.order)
        while self.next < COUNT:
            self.next += self.size
            yield self.order[self.next - self.size : self.next]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "next": self.next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.order, self.next = list(state_dict["order"]), state_dict["next"]


# Samplers


class Drawing(Sampler[int]):
    """Draws its order from a generator of its own, under a name that nobody knows."""

    def __init__(self, permutation: Callable[[int], Any]) -> None:
        self._hidden = {"deep": [permutation]}

    def __iter__(self) -> Iterator[int]:
        return iter([int(one) for one in self._hidden["deep"][0](COUNT)])

    def __len__(self) -> int:
        return COUNT


class Wrapping(Sampler[int]):
    def __init__(self, inner: Any) -> None:
        self.__inner = inner

    def __iter__(self) -> Iterator[int]:
        yield from self.__inner

    def __len__(self) -> int:
        return COUNT


class Picking(Sampler[int]):
    """Picks one sample after the other, as they are fetched."""

    def __init__(self, generator: random.Random) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[int]:
        left = list(range(COUNT))
        while left:
            yield left.pop(self.generator.randrange(len(left)))

    def __len__(self) -> int:
        return COUNT


class Counting(Sampler[int]):
    """Its order follows from how many passes there were, which its state tells."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(random.Random(self.passes).sample(range(COUNT), COUNT))

    def __len__(self) -> int:
        return COUNT

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.passes = state_dict["passes"]


class Standing(Counting):
    """Its state tells where it stands in a pass, as that of torchdata's StatefulDistributedSampler."""

    def __init__(self) -> None:
        super().__init__()
        self.yielded = 0
        self.begin_at: int | None = None

    def __iter__(self) -> Iterator[int]:
        self.passes += self.begin_at is None
        order = random.Random(self.passes).sample(range(COUNT), COUNT)
        self.yielded, self.begin_at = self.begin_at or 0, None
        for one in order[self.yielded :]:
            self.yielded += 1
            yield one

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes, "yielded": self.yielded}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.passes, self.begin_at = state_dict["passes"], state_dict["yielded"] or None


class Stubborn(Sampler[int]):
    """Nothing that can be found tells its order: it is another each time. Resuming can only warn."""

    def __iter__(self) -> Iterator[int]:
        return iter(random.SystemRandom().sample(range(COUNT), COUNT))

    def __len__(self) -> int:
        return COUNT


class Planning(Sampler[list[int]]):
    """Plans batches of various sizes anew for each pass, and says how many only then."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.plan: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        order = self.generator.permutation(COUNT).tolist()
        self.plan = []
        while order:
            size = int(self.generator.integers(1, 5))
            self.plan.append(order[:size])
            del order[:size]
        yield from self.plan

    def __len__(self) -> int:
        return len(self.plan) or 4


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(index), "y": torch.tensor(index / 7)}


def loader(size: int, data: Any = None, **options: Any) -> Any:
    return DataLoader(range(COUNT) if data is None else data, batch_size=size, **options)  # type: ignore[arg-type]


def torchs(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shuffled_by_a_factory(size: int) -> Callable[[], Any]:
    generator = random.Random(4)

    def batches() -> Any:
        order = list(range(COUNT))
        generator.shuffle(order)
        return [order[start : start + size] for start in range(0, COUNT, size)]

    return batches


KINDS: dict[str, Callable[[int], Any]] = {
    "list": lambda size: [list(range(one, one + size)) for one in range(0, COUNT - COUNT % size, size)],
    "python": lambda size: Shuffled(size, random.shuffle),
    "numpy": lambda size: Shuffled(size, np.random.shuffle),
    "own python": lambda size: Shuffled(size, random.Random(1).shuffle),
    "own numpy": lambda size: Shuffled(size, np.random.default_rng(1).shuffle),
    "own RandomState": lambda size: Shuffled(size, np.random.RandomState(1).shuffle),
    "async": lambda size: AsyncShuffled(size, random.shuffle),
    "own async": lambda size: AsyncShuffled(size, random.Random(2).shuffle),
    "stateful": lambda size: Stateful(size, random.shuffle),
    "loader": partial(loader, shuffle=True),
    "loader in order": loader,
    "loader of dictionaries": lambda size: loader(size, Rows(), shuffle=True),
    "loader of tuples": lambda size: loader(size, TensorDataset(*[torch.arange(COUNT)] * 2), shuffle=True),
    "own loader": lambda size: loader(size, shuffle=True, generator=torchs(1)),
    "sampler": lambda size: loader(size, sampler=RandomSampler(range(COUNT), generator=torchs(2))),
    "numpy sampler": lambda size: loader(size, sampler=Drawing(np.random.default_rng(3).permutation)),
    "global sampler": lambda size: loader(size, sampler=Drawing(np.random.permutation)),
    "wrapped sampler": lambda size: loader(
        size, sampler=Wrapping(Wrapping(RandomSampler(range(COUNT), generator=torchs(3))))
    ),
    "picking sampler": lambda size: loader(size, sampler=Picking(random.Random(5))),
    "counting sampler": lambda size: loader(size, sampler=Counting()),
    "standing sampler": lambda size: loader(size, sampler=Standing()),
    "weighted sampler": lambda size: loader(
        size, sampler=WeightedRandomSampler([1.0] * COUNT, COUNT, replacement=False, generator=torchs(4))
    ),
    "batch sampler": lambda size: DataLoader(range(COUNT), batch_sampler=Planning(size)),  # type: ignore[arg-type]
    "unsized": lambda size: Unsized(loader(size, shuffle=True, generator=torchs(6))),
    "factory": shuffled_by_a_factory,
    "factory of a loader": lambda size: lambda: loader(size, shuffle=True),
    "stubborn": lambda size: loader(size, sampler=Stubborn()),
}

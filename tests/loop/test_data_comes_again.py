"""Data of a run that is resumed comes again as it came, or it is told: order, length, and what is drawn meanwhile."""

import importlib
import json
import logging
import random
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from support.record import AnyEngine, Boom
from support.samples import COUNT, KINDS, AsyncShuffled, Shuffled, Stubborn, loader, samples_of
from torch.utils.data import Dataset

from aengine import DataOrderWarning, Engine, Events
from aengine.data.digest import differing, digest_of


def noting() -> tuple[AnyEngine, list[int]]:
    seen: list[int] = []
    return Engine(lambda engine, batch: seen.extend(samples_of(batch))), seen


def stop(engine: AnyEngine, at: int) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=at), engine.terminate)


def saved_at(data: Any, at: int, **limits: Any) -> dict[str, Any]:
    """Return the state of a run that was stopped there."""
    engine, _ = noting()
    stop(engine, at)
    engine.run_sync(data, **limits)
    saved: dict[str, Any] = json.loads(json.dumps(engine.state_dict()))
    return saved


def resumed(saved: dict[str, Any], data: Any, **limits: Any) -> list[int]:
    engine, seen = noting()
    engine.load_state_dict(saved)
    engine.run_sync(data, **limits)
    return seen


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


# Nothing else draws other numbers


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("factory of a loader", "stubborn")])
@pytest.mark.parametrize("how", ["terminate", "fail"])
def test_the_generators_of_the_process_stand_where_they_stood(kind: str, how: str) -> None:
    """What steps draw in the rest of a pass is what they would draw if nothing had been resumed."""

    def run(data: Any, *, stops: bool) -> list[list[float]]:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        draws: list[list[float]] = []

        def step(engine: AnyEngine, batch: Any) -> None:
            if stops and how == "fail" and engine.state.iteration == 3 and len(draws) == 2 and armed:
                armed.clear()
                raise Boom
            draws.append(drawn())

        armed = [True]
        engine: AnyEngine = Engine(step)
        if stops and how == "terminate":
            stop(engine, 2)
        with suppress(Boom):
            engine.run_sync(data)
        if stops:
            engine.run_sync(data)
        return draws

    whole, parts = run(KINDS[kind](2), stops=False), run(KINDS[kind](2), stops=True)
    assert len(whole) >= 3
    if kind not in ("unsized", "factory", "batch sampler"):  # these begin anew, or are of another length
        assert parts == whole


def test_other_tasks_draw_the_processs_own_numbers_while_async_data_is_wound() -> None:
    class Slow(AsyncShuffled):
        async def __aiter__(self) -> AsyncIterator[list[int]]:
            async for batch in super().__aiter__():
                random.random()  # drawn by the data, at each fetch
                yield batch

    async def main() -> None:
        data = Slow(1, random.shuffle)
        engine, seen = noting()
        stop(engine, 9)
        await engine.run(data)
        random.seed(5)
        expected = [random.random() for _ in range(5)]
        random.seed(5)
        got: list[float] = []

        async def other() -> None:
            while len(got) < 5:
                got.append(random.random())
                await anyio.lowlevel.checkpoint()

        engine.add_event_handler(Events.ITERATION_STARTED(once=10), lambda: fetched.append(len(got)))
        fetched: list[int] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other)
            await engine.run(data, max_iters=None)
        assert sorted(seen) == list(range(COUNT))
        # Until the data goes on, nothing else drew: what the other task has drawn is in one sequence.
        assert got[: fetched[0]] == expected[: fetched[0]]
        assert fetched[0] >= 1  # it had a turn meanwhile

    anyio.run(main)


# Another length


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 4)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_another_length_is_refused(before: int, after: int, shuffle: bool) -> None:  # noqa: FBT001
    saved = saved_at(loader(before, shuffle=shuffle), 2)
    with pytest.raises(ValueError, match=r"has \d+ batches, and had \d+ .* Pass the same data.* epoch_length="):
        resumed(saved, loader(after, shuffle=shuffle))


def test_data_that_has_grown_is_refused_in_memory_too() -> None:
    data = [1, 2, 3]
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    stop(engine, 2)
    engine.run_sync(data)
    data.append(4)
    with pytest.raises(ValueError, match="has 4 batches, and had 3"):
        engine.run_sync(data)


def test_data_of_another_length_is_taken_where_the_length_of_an_epoch_is_given() -> None:
    saved = saved_at([[0], [1], [2], [3]], 2)
    assert resumed(saved, [[0], [1], [2]], epoch_length=4) == [2, 0]


def test_data_may_be_of_another_length_from_the_next_pass_on() -> None:
    saved = saved_at(loader(2), 6, max_epochs=2)
    engine, seen = noting()
    engine.load_state_dict(saved)
    assert engine.run_sync(loader(3)).epoch_length == 4
    assert seen == list(range(COUNT))


# Another order


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("event", [Events.GET_BATCH_STARTED, Events.ITERATION_COMPLETED, Events.ITERATION_STARTED])
def test_another_order_is_warned_of(event: Events, at: int) -> None:
    """Wherever the run was stopped; the warning names both batches."""
    data = loader(4, sampler=Stubborn())
    engine, _ = noting()
    once = event(event_filter=lambda engine, count: engine.state.iteration >= at)
    with engine.add_event_handler(once, engine.terminate):
        engine.run_sync(data)
    saved = engine.state_dict()
    with pytest.warns(DataOrderWarning, match=r"batch \d of the pass .* was int64 .*, and is int64 .* twice"):
        resumed(saved, data)
    with pytest.warns(DataOrderWarning):
        engine.run_sync(data)


def test_a_failed_step_whose_batch_does_not_come_again_is_warned_of() -> None:
    data = Shuffled(3, random.SystemRandom().shuffle)
    armed = [True]

    def step(engine: AnyEngine, batch: Any) -> None:
        if armed:
            armed.clear()
            raise Boom

    engine: AnyEngine = Engine(step)
    with suppress(Boom):
        engine.run_sync(data)
    with pytest.warns(DataOrderWarning):
        engine.run_sync(data)


class Pairs(Dataset[tuple[torch.Tensor, int]]):
    """Images that are augmented as they are read, by the generator that the steps draw from; and labels."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return index + torch.rand(3), index


@pytest.mark.parametrize("change", ["nothing", "replaces", "in place", "pops", "moves"])
def test_what_steps_and_handlers_do_to_their_batches_is_no_other_order(change: str) -> None:
    class Rows(Pairs):
        def __getitem__(self, index: int) -> Any:
            return {"x": torch.tensor([float(index)]), "y": index}

    def step(engine: AnyEngine, batch: Any) -> None:
        if change == "in place":
            batch["x"].add_(1)
        elif change == "pops":
            batch.pop("x")

    engine: AnyEngine = Engine(step)
    if change in ("replaces", "moves"):

        @engine.on(Events.ITERATION_STARTED)
        def replace(engine: AnyEngine) -> None:
            batch = engine.state.batch
            engine.state.batch = (
                {name: one.to("cpu", copy=True) for name, one in batch.items()} if change == "moves" else "another"
            )

    stop(engine, 2)
    engine.run_sync(loader(3, Rows(), shuffle=True))
    saved = engine.state_dict()
    again: AnyEngine = Engine(step)
    again.load_state_dict(saved)
    again.run_sync(loader(3, Rows(), shuffle=True))  # a warning would be an error
    engine.run_sync(loader(3, Rows(), shuffle=True))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_augmentation_at_each_fetch_is_no_other_order(at: int) -> None:
    engine, seen = noting()

    def step(_: AnyEngine, batch: Any) -> None:
        torch.rand(7)
        seen.extend(batch[1].tolist())

    engine = Engine(step)
    stop(engine, at)
    data = loader(3, Pairs(), shuffle=True)
    engine.run_sync(data)
    engine.run_sync(data)
    assert sorted(seen) == list(range(COUNT))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.arange(3), torch.arange(3) + 1),
        (np.arange(3), np.arange(3)[::-1]),
        ({"a": [1, "x"]}, {"a": [1, "y"]}),
        ([1] * 500, [1] * 499 + [2]),
        (SimpleNamespace(x=torch.zeros(2)), SimpleNamespace(x=torch.ones(2))),
        (torch.zeros(1000, 50, dtype=torch.bfloat16), torch.ones(1000, 50, dtype=torch.bfloat16)),
        (torch.zeros(2), torch.zeros(3)),
        (b"a", b"b"),
        (torch.zeros(64, 3, 100, 100).to(memory_format=torch.channels_last), torch.ones(64, 3, 100, 100)),
        (torch.tensor(1 + 1j), torch.tensor(1 - 1j)),
    ],
)
def test_digests_of_other_batches_are_others(one: Any, other: Any) -> None:
    digest = json.loads(json.dumps(digest_of(one)))
    assert differing(digest, digest_of(one)) == []
    assert differing(digest, digest_of(other)) != []


def test_what_cannot_be_read_is_not_compared() -> None:
    assert digest_of([torch.eye(3).to_sparse(), object()]) == {}


# The length of a pass


class Passes:
    """Data whose passes are of these lengths; it says so if it is to, and only once a pass has begun."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = list(lengths)
        self.begun = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.begun += 1
        for number in range(self.lengths[self.begun - 1]):
            yield [number]


class SizedPasses(Passes):
    def __len__(self) -> int:
        return self.lengths[max(self.begun, 1) - 1]


@pytest.mark.parametrize("make", [Passes, SizedPasses])
@pytest.mark.parametrize("prefetch", [0, 2])
async def test_an_epoch_is_a_pass_whatever_its_length(make: type[Passes], prefetch: int) -> None:
    lengths: list[int | None] = []
    seen: list[tuple[int, int]] = []
    engine: AnyEngine = Engine(lambda engine, batch: seen.append((engine.state.epoch, batch[0])))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: lengths.append(engine.state.epoch_length))
    await engine.run(make(3, 5, 1, 4), max_epochs=4, prefetch=prefetch)
    assert [sum(epoch == one for epoch, _ in seen) for one in (1, 2, 3, 4)] == [3, 5, 1, 4]
    if make is SizedPasses:
        assert lengths == [3] * 3 + [5] * 5 + [1] + [4] * 4
    else:
        assert set(lengths) == {None}


def has_reached(at: int, engine: AnyEngine, _: int) -> bool:
    return engine.state.iteration >= at


class PassOfTheDay:
    """Data that handlers of EPOCH_STARTED give another length for each pass, as `set_epoch()` of a sampler does."""

    def __init__(self) -> None:
        self.length = 0

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[number] for number in range(self.length)])


class SizedPassOfTheDay(PassOfTheDay):
    def __len__(self) -> int:
        return self.length or 3


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED, Events.EPOCH_STARTED])
@pytest.mark.parametrize("make", [PassOfTheDay, SizedPassOfTheDay])
def test_passes_of_any_length_are_resumed(
    make: type[PassOfTheDay],
    event: Events,
    is_saved: bool,  # noqa: FBT001
) -> None:
    def build() -> tuple[AnyEngine, list[int], PassOfTheDay]:
        engine, seen = noting()
        data = make()
        lengths = [3, 5, 1, 4]
        engine.add_event_handler(
            Events.EPOCH_STARTED, lambda engine: setattr(data, "length", lengths[engine.state.epoch - 1])
        )
        return engine, seen, data

    # In the first pass, data without a length may be a stream: it goes on where it is, with a warning.
    is_told = make is PassOfTheDay and event is Events.ITERATION_COMPLETED
    for at in range(4 if is_told else 1, 13):
        engine, seen, data = build()
        reached = event(event_filter=partial(has_reached, at))
        with engine.add_event_handler(reached, engine.terminate):
            engine.run_sync(data, max_epochs=4)
        if is_saved:
            saved = json.loads(json.dumps(engine.state_dict()))
            engine, rest, data = build()
            engine.load_state_dict(saved)
            engine.run_sync(data)
            seen += rest
        elif not engine.state.is_done:
            engine.run_sync(data)
        assert seen == [0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1, 2, 3], at


class Boaster:
    """It gives more than it says."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0], [1], [2], [3], [4]])


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_epochs": 3, "epoch_length": 4}, {"max_iters": 9}])
def test_data_that_gives_more_than_its_length_goes_on_where_it_stood(limits: dict[str, int]) -> None:
    engine, whole = noting()
    engine.run_sync(Boaster(), **limits)
    assert whole[:7] == [0, 1, 2, 3, 4, 0, 1]
    for at in range(1, 9):
        engine, seen = noting()
        stop(engine, at)
        engine.run_sync(Boaster(), **limits)
        saved = engine.state_dict()
        assert seen + resumed(saved, Boaster()) == whole, at
        engine.run_sync(Boaster())
        assert seen == whole, at


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, KeyError, ZeroDivisionError])
def test_a_length_that_raises_is_unknown(error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    class Stream(Passes):
        def __len__(self) -> int:
            raise error("it shows at the end")

    engine, seen = noting()
    with caplog.at_level(logging.DEBUG, "aengine.data"):
        assert engine.run_sync(Stream(2, 3), max_epochs=2).epoch_length == 3
    assert seen == [0, 1, 0, 1, 2]
    assert any("length is unknown" in one for one in caplog.messages)


def test_a_length_that_a_handler_sets_is_kept() -> None:
    engine, seen = noting()
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda engine: setattr(engine.state, "epoch_length", 2))
    engine.run_sync([[0], [1], [2]], max_epochs=3)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_resuming_is_not_told_of_where_all_is_well() -> None:
    saved = saved_at(loader(1, shuffle=True, generator=torch.Generator()), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(resumed(saved, loader(1, shuffle=True, generator=torch.Generator()))) == 7


# Data that is put back to its own state


@pytest.mark.slow  # it imports Hugging Face's datasets, and starts workers
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # other ways take seconds a worker
@pytest.mark.parametrize("at", [5, 12, 20])
@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 0},
        {"num_workers": 2, "multiprocessing_context": "fork"},
        {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "fork"},
    ],
    ids=["none", "anew", "kept"],
)
def test_streams_of_hugging_face_in_a_stateful_loader_are_whole_in_later_passes(
    options: dict[str, Any], at: int
) -> None:
    datasets: Any = importlib.import_module("datasets")  # it takes seconds, and has no types
    torchdata: Any = importlib.import_module("torchdata.stateful_dataloader")  # likewise

    def build() -> Any:
        rows = datasets.Dataset.from_dict({"x": list(range(24))}).to_iterable_dataset(num_shards=4)
        return torchdata.StatefulDataLoader(rows, batch_size=2, **options)

    engine, whole = noting()
    data = build()
    engine.run_sync(data, max_epochs=3)
    data._iterator = None  # its workers end
    engine, seen = noting()
    stop(engine, at)
    engine.run_sync(data := build(), max_epochs=3)
    saved = engine.state_dict()
    rest = resumed(saved, other := build(), max_epochs=3)
    assert seen + rest == whole
    engine.run_sync(data, max_epochs=3)
    assert seen == whole
    data._iterator = other._iterator = None

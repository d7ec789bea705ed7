import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from aengine.checkpoint.store.manifest import CheckpointInfo, directory_name
from aengine.checkpoint.store.retention import Keep, removable


def checkpoint(
    step: int,
    revision: int = 1,
    *,
    number: int | None = None,
    pinned: bool = False,
    mid_step: bool = False,
    **metrics: Any,
) -> Any:
    return CheckpointInfo(
        step=step,
        revision=revision,
        number=number or step,
        epoch=1,
        event="epoch_completed",
        metrics=metrics,
        created=0.0,
        size=0,
        path=Path("/checkpoints") / directory_name(step, revision),
        is_pinned=pinned,
        files=(),
        versions={},
        world_size=1,
        extra={"mid_step": True} if mid_step else {},
    )


def names(checkpoints: list[CheckpointInfo]) -> list[tuple[int, int]]:
    return [(info.step, info.revision) for info in checkpoints]


def scored(*scores: float) -> list[CheckpointInfo]:
    return [checkpoint(step, score=score) for step, score in enumerate(scores, start=1)]


@pytest.mark.parametrize(
    ("keep", "there", "removed"),
    [
        pytest.param(Keep(), [checkpoint(step) for step in (1, 2, 3)], [], id="no more than are kept"),
        pytest.param(Keep(), [checkpoint(step) for step in (1, 2, 3, 4, 5)], [1, 2], id="the last three"),
        pytest.param(Keep(last=2), [checkpoint(step) for step in (9, 10, 100)], [9], id="ordered as numbers"),
        pytest.param(
            Keep(last=2),
            [*map(checkpoint, (1, 2, 3)), checkpoint(4, mid_step=True)],
            [1],
            id="one of the middle of a step is none of the last",
        ),
        pytest.param(
            Keep(last=2),
            [*map(checkpoint, (1, 2)), checkpoint(3, mid_step=True), checkpoint(4)],
            [1, 3],
            id="one of the middle of a step goes when there is a later one",
        ),
        pytest.param(Keep(last=2), [checkpoint(step) for step in (3, 1, 2)], [1], id="in whatever order they come"),
        pytest.param(Keep(last=2, best=1, metric="score"), scored(1, 9, 5, 3, 2), [1, 3], id="the best"),
        pytest.param(Keep(last=2, best=2, metric="score"), scored(1, 9, 5, 3, 2), [1], id="the best two"),
        pytest.param(Keep(last=2, best=1, metric="score", mode="min"), scored(4, 1, 5, 3, 2), [1, 3], id="the least"),
        pytest.param(Keep(last=2, best=1, metric="score"), scored(7, 9, 9, 3, 2), [1, 3], id="a tie: the older"),
        pytest.param(
            Keep(last=2, best=1, metric="score", mode="min"), scored(7, 1, 1, 3, 2), [1, 3], id="a tie of the least"
        ),
        pytest.param(Keep(last=2, best=1, metric="score"), scored(1, math.nan, 0, 0, 0), [2, 3], id="NaN is not best"),
        pytest.param(
            Keep(last=2, best=1, metric="score", mode="min"), scored(1, math.nan, 2, 2, 2), [2, 3], id="nor the least"
        ),
        pytest.param(Keep(last=2, best=1, metric="score"), scored(math.inf, 1, 1, 1), [2], id="infinity may be"),
        pytest.param(
            Keep(last=2, best=2, metric="score"),
            [checkpoint(1), checkpoint(2, score=1.0), checkpoint(3, other=9.0), checkpoint(4), checkpoint(5)],
            [1, 3],
            id="without the metric it is never best",
        ),
        pytest.param(
            Keep(last=2, every_n=3), [checkpoint(step) for step in range(1, 9)], [1, 2, 4, 5], id="every third"
        ),
        pytest.param(
            Keep(last=2, every_n=2),
            [checkpoint(step, number=number) for step, number in [(10, 1), (20, 2), (30, 3), (40, 4), (50, 5)]],
            [10, 30],
            id="every second by its number and not its step",
        ),
        pytest.param(
            Keep(last=2), [checkpoint(1, pinned=True), checkpoint(2), checkpoint(3), checkpoint(4)], [2], id="pinned"
        ),
    ],
)
def test_rule_removes_what_it_does_not_keep(keep: Keep, there: list[CheckpointInfo], removed: list[int]) -> None:
    assert [info.step for info in removable(keep, there)] == removed


def test_protected_one_stays_whatever_its_age() -> None:
    there = [checkpoint(step) for step in (1, 2, 3, 4)]

    assert names(removable(Keep(last=2), there, [there[0].path])) == [(2, 1)]


def test_earlier_revision_goes_and_does_not_count_as_one_of_the_last() -> None:
    there = [checkpoint(1), checkpoint(2), checkpoint(2, 2), checkpoint(2, 3)]

    assert names(removable(Keep(last=2), there)) == [(2, 1), (2, 2)]


def test_earlier_revision_is_not_the_best_of_its_step() -> None:
    there = [checkpoint(1, score=5.0), checkpoint(1, 2, score=1.0), checkpoint(2, score=2.0), *scored(0, 0, 0, 0)[2:]]

    assert names(removable(Keep(last=2, best=1, metric="score"), there)) == [(1, 1), (1, 2)]


def test_earlier_revision_that_is_pinned_or_protected_stays() -> None:
    there = [checkpoint(1, pinned=True), checkpoint(1, 2), checkpoint(1, 3)]

    assert names(removable(Keep(last=2), there, [there[1].path])) == []


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"last": 1}, "last= is .* of steps, since the newest may turn out to be damaged, 2 or more; got 1"),
        ({"last": True}, "last= is a whole number of steps.*, 2 or more; got"),
        ({"last": 2.5}, "last= is a whole number of steps.*, 2 or more; got"),
        ({"best": -1, "metric": "loss"}, "best= is a whole number, 0 or more; got -1"),
        ({"best": 2}, "best=2 needs to know by what: add metric="),
        ({"mode": "maximum"}, "mode= is one of \"max\" .* got 'maximum'"),
        ({"every_n": 0}, "every_n= is a whole number, 1 or more, or None"),
        ({"every_n": "2"}, "every_n= is a whole number, 1 or more, or None"),
    ],
)
def test_wrong_rule_is_refused_with_advice(arguments: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        Keep(**arguments)


def measured(score: float | None) -> dict[str, Any]:
    return {} if score is None else {"score": score}


scores = st.none() | st.floats()
checkpoints = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 3), st.integers(1, 40), scores, st.booleans()),
    unique_by=lambda one: one[:2],
    min_size=1,
).map(
    lambda rows: [
        checkpoint(step, revision, number=number, pinned=pinned, **measured(score))
        for step, revision, number, score, pinned in rows
    ]
)
better: dict[str, Callable[[float, float], bool]] = {"max": lambda a, b: a > b, "min": lambda a, b: a < b}


@given(
    there=checkpoints,
    last=st.integers(2, 5),
    best=st.integers(0, 3),
    mode=st.sampled_from(["max", "min"]),
    every_n=st.none() | st.integers(1, 10),
    data=st.data(),
)
def test_rule_never_removes_the_newest_the_best_the_pinned_or_the_protected(
    there: list[CheckpointInfo], last: int, best: int, mode: Any, every_n: int | None, data: st.DataObject
) -> None:
    protected = data.draw(st.lists(st.sampled_from([info.path for info in there])))
    keep = Keep(last=last, best=best, metric="score" if best else None, mode=mode, every_n=every_n)
    removed = removable(keep, there, protected)
    stay = [info for info in there if info not in removed]

    assert {info.path for info in removed}.isdisjoint(protected)
    assert not any(info.is_pinned for info in removed)

    def is_latest(info: CheckpointInfo) -> bool:
        return info.revision == max(other.revision for other in there if other.step == info.step)

    newest = sorted({info.step for info in there})[-last:]
    assert set(newest) <= {info.step for info in stay if is_latest(info)}
    scores_that_stay = [info.metrics.get("score", math.nan) for info in stay if is_latest(info)]
    for gone in filter(is_latest, removed):
        assert every_n is None or gone.number % every_n
        score = gone.metrics.get("score", math.nan)
        at_least_as_good = [one for one in scores_that_stay if one == score or better[mode](one, score)]
        assert math.isnan(score) or len(at_least_as_good) >= best

    # What has no reason to stay goes: or it could keep everything, and all of the above would hold.
    reasons = last + best + len(set(protected)) + sum(info.is_pinned for info in there)
    assert every_n is not None or len(stay) <= reasons
    assert removable(keep, stay, protected) == []

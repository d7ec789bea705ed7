"""Which checkpoints stay: a rule without I/O, which is given what there is and says what may go."""

import math
from collections.abc import Collection, Iterable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from aengine.arguments import check_choice, check_whole
from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.keywords import explain_wrong_call


@explain_wrong_call
@dataclass(frozen=True, slots=True)
class Keep:
    """Which checkpoints to keep: the last few, the best few, and every n-th for good. Pinned ones always stay.

    Args:
        last: how many of the newest steps; at least 2, since the newest may turn out to be damaged.
        best: how many of the best by `metric`. One whose metric is missing or NaN is never among them. Of equal ones
            the older is better: the later may just have been saved before the metric was measured again.
        metric: the name of the metric that `best` ranks by.
        mode: whether more of it is better, "max", or less, "min".
        every_n: keep every n-th checkpoint for good, counted over the whole life of the directory.

    Example:
        Keep(last=3, best=1, metric="accuracy")
    """

    last: int = 3
    best: int = 0
    _: KW_ONLY
    metric: str | None = None
    mode: Literal["max", "min"] = "max"
    every_n: int | None = None

    def __post_init__(self) -> None:
        check_whole(self.last, "last=", minimum=2, of="steps, since the newest may turn out to be damaged")
        check_whole(self.best, "best=", minimum=0)
        if self.metric is not None and not isinstance(self.metric, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                "metric= is the name of a metric in engine.state.metrics, since it is looked up in the checkpoints; got"
                f" {self.metric!r}"
            )
        if self.best and self.metric is None:
            raise ValueError(f'best={self.best} needs to know by what: add metric=, such as metric="accuracy"')
        check_choice(self.mode, "mode=", {"max": "more is better", "min": "less is better"})
        if self.every_n is not None:
            check_whole(self.every_n, "every_n=", minimum=1, alternative="None for no such rule")


def removable(
    keep: Keep, checkpoints: Iterable[CheckpointInfo], protected: Collection[Path] = ()
) -> list[CheckpointInfo]:
    """Return which of these no rule keeps, oldest first; never one that is pinned, or whose path is protected.

    A step counts once: an earlier revision of it does not count, and goes. Nor does what was taken in the middle of
    a step, which stays until there is a later one.
    """
    ordered = sorted(checkpoints, key=_age)
    latest_revisions = _latest_revisions(ordered)
    kept = {each.path for each in latest_revisions[-keep.last :]}
    kept.update(each.path for each in ordered[-1:] if each.is_mid_step)
    kept.update(each.path for each in ranked(keep, ordered)[: keep.best])
    if keep.every_n is not None:
        kept.update(each.path for each in latest_revisions if each.number % keep.every_n == 0)
    return [each for each in ordered if not (each.is_pinned or each.path in kept or each.path in protected)]


def ranked(keep: Keep, checkpoints: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
    """Return those that can be the best by `keep.metric`, the best first; of each step the last revision.

    Never one whose metric is missing or NaN, nor one that was taken in the middle of a step.
    """
    sign = 1 if keep.mode == "max" else -1
    ranked = [
        (-sign * value, _age(each), each)
        for each in _latest_revisions(sorted(checkpoints, key=_age))
        if not math.isnan(value := each.metrics.get(keep.metric or "", math.nan))
    ]
    ranked.sort(key=lambda one: one[:2])
    return [each for _, _, each in ranked]


def _latest_revisions(ordered: list[CheckpointInfo]) -> list[CheckpointInfo]:
    return list({each.step: each for each in ordered if not each.is_mid_step}.values())


def _age(info: CheckpointInfo) -> tuple[int, int]:
    return info.step, info.revision

"""Which checkpoints stay. A pure rule: it is given what there is and says what may go."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aengine.checkpoint.store.manifest import CheckpointInfo


@dataclass(frozen=True, slots=True)
class Keep:
    """How many checkpoints to keep: the last few, the best few, and every n-th for good. Pinned ones stay anyway.

    Args:
        last: how many of the newest steps. Two at least, for the newest may turn out to be damaged.
        best: how many of the best by `metric`. One whose metric is missing or NaN is never among them; of equal ones,
            the older is better: one that is saved before the metric is measured again has that of the one before.
        metric: the name of the metric that `best` ranks by.
        mode: whether more of it is better, "max", or less, "min".
        every_n: keep every n-th checkpoint for good, counted over the whole life of the directory.

    Example:
        Keep(last=3, best=1, metric="accuracy")
    """

    last: int = 3
    best: int = 0
    metric: str | None = None
    mode: Literal["max", "min"] = "max"
    every_n: int | None = None

    def __post_init__(self) -> None:
        if not _is_whole(self.last) or self.last < 2:  # noqa: PLR2004 -- the reason is in the message
            raise ValueError(
                f"last= must be 2 or more, got {self.last!r}: the newest checkpoint may be the damaged one, and then"
                " the one before it is what there is"
            )
        if not _is_whole(self.best) or self.best < 0:
            raise ValueError(f"best= must be a whole number from 0 on, got {self.best!r}")
        if self.best and self.metric is None:
            raise ValueError(f'best={self.best} needs to know by what: add metric=, such as metric="accuracy"')
        if self.mode not in ("max", "min"):
            raise ValueError(f'mode= must be "max" (more is better) or "min" (less is better), got {self.mode!r}')
        if self.every_n is not None and (not _is_whole(self.every_n) or self.every_n < 1):
            raise ValueError(
                f"every_n= must be a whole number from 1 on, or None for no such rule, got {self.every_n!r}"
            )

    def removable(
        self, checkpoints: Iterable[CheckpointInfo], protected: Collection[Path] = ()
    ) -> list[CheckpointInfo]:
        """Return which of these no rule keeps, oldest first; never one that is pinned, or whose path is protected.

        A step counts once: an earlier revision of it does not count, and goes. Nor does what was taken in the middle of
        a step, which stays until there is a later one.
        """
        ordered = sorted(checkpoints, key=_age)
        latest_revisions = _latest_revisions(ordered)
        kept = {each.path for each in latest_revisions[-self.last :]}
        kept.update(each.path for each in ordered[-1:] if each.is_mid_step)
        kept.update(each.path for each in self.ranked(ordered)[: self.best])
        if self.every_n is not None:
            kept.update(each.path for each in latest_revisions if each.number % self.every_n == 0)
        return [each for each in ordered if not (each.pinned or each.path in kept or each.path in protected)]

    def ranked(self, checkpoints: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
        """Return those that can be the best by `metric` and `mode`, the best first; of each step the last revision.

        Never one whose metric is missing or NaN, nor one that was taken in the middle of a step.
        """
        sign = 1 if self.mode == "max" else -1
        ranked = [
            (-sign * value, _age(each), each)
            for each in _latest_revisions(sorted(checkpoints, key=_age))
            if not math.isnan(value := each.metrics.get(self.metric or "", math.nan))
        ]
        ranked.sort(key=lambda one: one[:2])
        return [each for _, _, each in ranked]


def _latest_revisions(ordered: list[CheckpointInfo]) -> list[CheckpointInfo]:
    return list({each.step: each for each in ordered if not each.is_mid_step}.values())


def _age(info: CheckpointInfo) -> tuple[int, int]:
    return info.step, info.revision


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""Which cases of a test that multiplies its parameters are enough for every two, or three, of their values to meet.

A fault that takes one value to show, or two of them together, shows in one of the chosen cases (strength 2: pairwise).
What only more of them bring about may be missed there, and is looked for by the cases left out: `pytest -m variant`.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations_with_replacement
from operator import itemgetter
from typing import TypeAlias

Case: TypeAlias = Mapping[str, Hashable]
"""The value of each parameter, by its name."""


def covering(cases: Sequence[Case], strength: int) -> list[int]:
    """Return the positions of cases in which every `strength` values meet that meet in any of them.

    Greedy: always the case that adds most, and the first of those that add as much, so that the choice is the same
    in every process. It takes some more cases than the fewest possible.
    """
    # With replacement: with fewer parameters than `strength`, a value is met by itself.
    meetings = [set(combinations_with_replacement(sorted(case.items(), key=itemgetter(0)), strength)) for case in cases]
    missing = set().union(*meetings)
    chosen: list[int] = []
    while missing:
        best = max(range(len(cases)), key=lambda position: len(meetings[position] & missing))
        chosen.append(best)
        missing -= meetings[best]
    return sorted(chosen)

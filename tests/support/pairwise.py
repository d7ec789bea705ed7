"""Which cases of a test that multiplies its parameters are enough for every two values to meet.

What fails with one value, or with two of them together, fails in one of the chosen cases. Only what takes three
particular values at once may be missed, which is what the cases left out are still run for, with `-m variant`.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations_with_replacement
from operator import itemgetter
from typing import TypeAlias

Case: TypeAlias = Mapping[str, Hashable]
"""The parameters of a case, each with its value."""


def covering(cases: Sequence[Case]) -> list[int]:
    """Return the positions of cases in which every two values meet that meet in any; the same each time.

    Greedy: each time the case that adds most pairs, the first of several. No more than a few cases above the fewest.
    """
    # With replacement: a value is met by itself as well, where there is but one parameter.
    pairs = [set(combinations_with_replacement(sorted(case.items(), key=itemgetter(0)), 2)) for case in cases]
    missing = set().union(*pairs)
    chosen: list[int] = []
    while missing:
        best = max(range(len(cases)), key=lambda position: len(pairs[position] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)

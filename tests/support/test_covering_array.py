from itertools import combinations, product

import pytest
from support.covering_array import covering


@pytest.mark.parametrize("strength", [2, 3])
@pytest.mark.parametrize("sizes", [(2,), (2, 3), (2, 2, 3, 9), (2, 5, 3, 2, 2, 2)], ids=str)
def test_every_values_meet_in_far_fewer_cases(sizes: tuple[int, ...], strength: int) -> None:
    names = "abcdef"[: len(sizes)]
    cases = [dict(zip(names, values, strict=True)) for values in product(*map(range, sizes))]
    chosen = [cases[position] for position in covering(cases, strength)]
    for some in combinations(names, min(strength, len(names))):
        assert {tuple(case[name] for name in some) for case in chosen} == set(
            product(*(range(sizes[names.index(name)]) for name in some))
        )
    fewest = 1
    for size in sorted(sizes, reverse=True)[:strength]:
        fewest *= size
    assert len(chosen) <= 1.5 * fewest


def test_cases_that_the_product_lacks_are_not_asked_for() -> None:
    cases = [{"a": 0, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}]
    assert covering(cases, 2) == [0, 1, 2]

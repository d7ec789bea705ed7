from itertools import combinations, product

import pytest
from support.pairwise import covering


@pytest.mark.parametrize("sizes", [(2,), (2, 3), (2, 2, 3, 9), (2, 4, 3, 2, 2, 5)])
def test_every_two_values_meet_in_far_fewer_cases(sizes: tuple[int, ...]) -> None:
    cases = [dict(zip("abcdef", values, strict=False)) for values in product(*map(range, sizes))]
    chosen = [cases[position] for position in covering(cases)]
    for one, other in combinations("abcdef"[: len(sizes)], 2):
        assert {(case[one], case[other]) for case in chosen} == {(case[one], case[other]) for case in cases}
    largest, second = (*sorted(sizes, reverse=True), 1)[:2]
    assert len(chosen) <= 1.5 * largest * second  # which is the least there can be


def test_cases_that_the_product_lacks_are_not_asked_for() -> None:
    cases = [{"a": 0, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}]
    assert covering(cases) == [0, 1, 2]


def test_cases_of_one_parameter_or_none_are_all_chosen() -> None:
    assert covering([{"a": 0}, {"a": 1}, {"a": 2}]) == [0, 1, 2]

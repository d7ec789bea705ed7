"""Arguments: the checks and the names in messages, which all of the package shares."""

import math
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from aengine.arguments import check_choice, check_interval, check_seconds, check_whole
from aengine.callables import name_of, type_name


@pytest.mark.parametrize(("value", "minimum"), [(0, 0), (1, 1), (7, 2), (10**20, 1)])
def test_whole_number_is_returned(value: int, minimum: int) -> None:
    assert check_whole(value, "every=", minimum=minimum) is value


@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, "1", None, math.nan])
def test_what_is_no_whole_number_from_the_minimum_on_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, check=lambda raised: str(raised).startswith("every= is a whole number, 1 or more")):
        check_whole(value, "every=", minimum=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "n= is a whole number, 2 or more; got 1"),
        ({"of": "samples to keep"}, "n= is a whole number of samples to keep, 2 or more; got 1"),
        ({"alternative": "a timedelta"}, "n= is a whole number, 2 or more, or a timedelta; got 1"),
    ],
)
def test_message_says_what_is_counted_and_what_else_is_taken(words: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, check=lambda raised: str(raised) == message):
        check_whole(1, "n=", minimum=2, **words)


@pytest.mark.parametrize("value", [0, 0.5, 3, math.inf])
def test_seconds_are_returned(value: float) -> None:
    assert check_seconds(value, "grace=", 30.0) is value


def test_timedelta_is_seconds() -> None:
    assert check_seconds(timedelta(minutes=1.5), "grace=", 30.0) == 90.0


@pytest.mark.parametrize("value", [True, "3", None])
def test_what_is_no_number_is_no_number_of_seconds(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^grace= is a number of seconds, such as 30\.0, or a timedelta; got "):
        check_seconds(value, "grace=", 30.0)


@pytest.mark.parametrize("value", [-1, -math.inf, math.nan])
def test_seconds_are_not_negative(value: float) -> None:
    with pytest.raises(ValueError, match=r"^grace= is 0 seconds or more, such as 30\.0; got "):
        check_seconds(value, "grace=", 30.0)


@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan])
def test_seconds_may_have_to_be_more_than_0(value: float) -> None:
    assert check_seconds(0.1, "limit=", 30.0, positive=True) == 0.1
    with pytest.raises(ValueError, match=r"^limit= is more than 0 seconds, such as 30\.0; got "):
        check_seconds(value, "limit=", 30.0, positive=True)


def test_interval_is_returned_in_seconds() -> None:
    assert check_interval(timedelta(minutes=1), "every=", 10) == 60.0


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (10, TypeError, "every= is a timedelta, such as timedelta(seconds=0.1); got 10"),
        (
            timedelta(0),
            ValueError,
            "every= is a timedelta of more than 0, such as timedelta(seconds=0.1); got datetime.timedelta(0)",
        ),
    ],
)
def test_interval_is_a_positive_timedelta(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, check=lambda raised: str(raised) == message):
        check_interval(value, "every=", 0.1)


@pytest.mark.parametrize("choices", [("max", "min"), {"max": "more is better", "min": ""}])
def test_choice_is_returned(choices: Any) -> None:
    assert check_choice("min", "mode=", choices) == "min"


@pytest.mark.parametrize("value", ["maximum", None, 1, ["max"]])
def test_what_is_none_of_the_choices_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, check=lambda raised: str(raised) == f'm= is one of "max", "min", got {value!r}'):
        check_choice(value, "m=", iter(("max", "min")))


def test_message_says_what_each_choice_means() -> None:
    message = 'on_error= is one of "raise" (the run fails), "log" (it goes on), got \'ignore\''
    with pytest.raises(ValueError, check=lambda raised: str(raised) == message):
        check_choice("ignore", "on_error=", {"raise": "the run fails", "log": "it goes on"})


@pytest.mark.parametrize("value", ["drop-oldest", "Drop_Oldest", "dropoldest", "drop_oldst"])
def test_word_that_nearly_is_a_choice_is_answered_by_it(value: str) -> None:
    message = f'overflow= is one of "wait", "drop_oldest", got {value!r}: "drop_oldest"?'
    with pytest.raises(ValueError, check=lambda raised: str(raised) == message):
        check_choice(value, "overflow=", ["wait", "drop_oldest"])


class Sink:
    def write(self) -> None: ...

    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Sink, "Sink"),
        (Sink(), "Sink"),
        (Sink.write, "Sink.write"),
        (Sink().write, "Sink.write"),
        (partial(partial(Sink.write), 1), "Sink.write"),
        (partial(Sink()), "Sink"),
        (len, "len"),
        ([1, 2], "list"),
    ],
)
def test_name_is_the_one_of_a_function_or_of_a_type(thing: Any, name: str) -> None:
    assert name_of(thing) == name


def test_type_is_named_with_its_module_unless_it_is_built_in() -> None:
    assert type_name(int) == "int"
    assert type_name(timedelta) == "datetime.timedelta"

"""Arguments: plain values that users hand in, checked at the call that was wrong."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from aengine.guesses import near_word

T = TypeVar("T")


def check_whole(value: Any, what: str, *, minimum: int, of: str = "", alternative: str = "") -> int:
    """Return the value, which must be a whole number, `minimum` or more; True and False are none.

    Args:
        value: what the user gave.
        what: the argument, as the user writes it.
        minimum: the least value allowed.
        of: what is counted, for the message.
        alternative: what else the caller takes, for the message.

    Raises:
        ValueError: it is something else.

    For instance: `check_whole(buffer, "buffer=", minimum=1, of="events that may wait")` says
    "buffer= is a whole number of events that may wait, 1 or more; got 0".
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
        return value
    counted, other = f" of {of}" if of else "", f", or {alternative}" if alternative else ""
    raise ValueError(f"{what} is a whole number{counted}, {minimum} or more{other}; got {value!r}")


def check_seconds(value: Any, what: str, usual: float, *, positive: bool = False) -> float:
    """Return the seconds that a duration is: a number of them, which may be infinite, or a timedelta; 0 or more.

    Args:
        value: what the user gave.
        what: the argument, as the user writes it.
        usual: an example for the message.
        positive: 0 is refused as well.

    Raises:
        TypeError: it is neither.
        ValueError: it is negative, or NaN.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} is a number of seconds, such as {usual}, or a timedelta; got {value!r}")
    if not value >= 0 or (positive and value == 0):
        least = "more than 0 seconds" if positive else "0 seconds or more"
        raise ValueError(f"{what} is {least}, such as {usual}; got {value!r}")
    return value


def check_interval(value: Any, what: str, usual: float) -> float:
    """Return how many seconds the value is, which must be a timedelta of more than 0.

    Args:
        value: what the user gave.
        what: the argument, as the user writes it.
        usual: an example for the message, in seconds.

    Raises:
        TypeError: it is no timedelta.
        ValueError: it is 0 or negative.
    """
    if not isinstance(value, timedelta):
        raise TypeError(f"{what} is a timedelta, such as timedelta(seconds={usual}); got {value!r}")
    if not value > timedelta(0):
        raise ValueError(f"{what} is a timedelta of more than 0, such as timedelta(seconds={usual}); got {value!r}")
    return value.total_seconds()


def check_choice(value: T, what: str, choices: Iterable[str]) -> T:
    """Return the value, which must be one of `choices`; where they are a mapping, the message says what each means.

    A word that is nearly one of them is answered by it.

    For instance: `check_choice(mode, "mode=", {"max": "more is better", "min": "less is better"})`.

    Raises:
        ValueError: it is none of them.
    """
    names = list(choices)
    if value in names:
        return value
    meanings: Mapping[str, str] = choices if isinstance(choices, Mapping) else {}
    shown = (f'"{name}" ({meanings[name]})' if name in meanings else f'"{name}"' for name in names)
    near = near_word(value, names) if isinstance(value, str) else None
    raise ValueError(f"{what} is one of {', '.join(shown)}, got {value!r}" + (f': "{near}"?' if near else ""))

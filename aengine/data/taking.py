"""Taking: what is called for the next batch where that must be awaited, or where there is none."""

from collections.abc import Callable, Generator
from typing import Any, NoReturn

PENDING: Any = object()
"""What `take()` returns when the next batch must be awaited; and what is awaited, where it is to be taken after all."""


def take_later() -> Any:
    """The next batch must be awaited."""
    return PENDING


def raise_stop() -> NoReturn:
    """There is no next batch."""
    raise StopIteration


async def arrive_never() -> NoReturn:
    """There is no next batch to be awaited."""
    raise StopAsyncIteration


def without_stop(take: Callable[[], Any]) -> Any:
    """Take a batch in a coroutine, which cannot raise StopIteration."""
    try:
        return take()
    except StopIteration:
        raise StopAsyncIteration from None


def end_of_data(error: BaseException | None) -> Generator[NoReturn]:
    """Data that has come to its end, by this error or as it should."""
    if error is not None:
        raise error
    yield from ()

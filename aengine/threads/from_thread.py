"""`anyio.from_thread` on threads that are ours: the way back to the event loop that anyio gives its own threads."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import anyio
from anyio._core._eventloop import threadlocals  # where anyio looks: it has no public way to say it
from anyio.lowlevel import EventLoopToken, current_token

if TYPE_CHECKING:
    import anyio.from_thread  # loaded where it is called; it loads much


class WayBack:
    """What anyio finds on a thread in the place of its own backend. What is called runs in a task of its own.

    That task ends by itself, or with its event loop: no cancellation of a run reaches it.
    """

    def __init__(self, token: EventLoopToken) -> None:
        self.token = token

    def run_async_from_thread(self, function: Callable[..., Any], args: tuple[Any, ...], token: object) -> Any:  # noqa: ARG002 -- the caller has none, or anyio would not come here
        """Have `function(*args)` awaited, and block until it has been."""
        return anyio.from_thread.run(function, *args, token=self.token)

    def run_sync_from_thread(self, function: Callable[..., Any], args: tuple[Any, ...], token: object) -> Any:  # noqa: ARG002 -- likewise
        """Have `function(*args)` called on the event loop's thread, and block until it has been."""
        return anyio.from_thread.run_sync(function, *args, token=self.token)

    def check_cancelled(self) -> None:
        """Raise the cancellation of what waits for the calling thread: none is known."""

    @contextmanager
    def entered(self) -> Generator[None]:
        """Have anyio find this on the calling thread for a while."""
        before = getattr(threadlocals, "current_token", None)
        # Not kept: it refers to this. No cycle may hold what the worker does.
        threadlocals.current_token = EventLoopToken(cast("Any", self), self.token.native_token)
        try:
            yield
        finally:
            threadlocals.current_token = before
            if before is None:
                del threadlocals.current_token


def way_back() -> WayBack | None:
    """Return the way back to the event loop of the caller, for a thread that it has something called on.

    On a thread that has a way back itself, it is one to the same event loop; on others it is None.
    """
    try:
        return WayBack(current_token())
    except RuntimeError:  # also asyncio's own: the collector may free an engine where an event loop is being closed
        token: EventLoopToken | None = getattr(threadlocals, "current_token", None)
        if token is None:
            return None
        backend: Any = token.backend_class
        return WayBack(backend.token if isinstance(backend, WayBack) else token)

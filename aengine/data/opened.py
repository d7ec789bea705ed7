"""One pass over the data, from opening it to closing it, all of it where its batches are pulled."""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from aengine.data.adapt import is_async_iterable, is_factory, is_iterable
from aengine.data.position import DataPosition
from aengine.data.rewind import END


class OpenedData:
    """Data that is opened for one pass, and skipped to where the pass is to go on.

    What is opened may belong to a thread or a task: a connection of sqlite3, the token of a context variable, a cancel
    scope. So one thread, or one task, calls all of `open()`, `iterator` and `close()`, or their async counterparts.

    Attributes:
        is_async: whether it is iterated on an event loop; None until it is made.
        iterator: what gives the batches; None until it is opened, and when it is closed.
    """

    def __init__(
        self, data: Any, user_data: Any, position: DataPosition, put_back: Callable[[Any], None] | None = None
    ) -> None:
        self.is_async: bool | None = None
        self.iterator: Any = None
        self._data = data
        self._user_data = user_data
        self._position = position
        self._put_back = put_back or position.put_back
        self._made: Any = None

    @property
    def is_made_by_plain_code(self) -> bool:
        """Whether a function of the user's makes the data, whose resources may belong to the thread that calls it."""
        return is_factory(self._data) and not inspect.isasyncgenfunction(self._data)

    def make(self) -> bool:
        """Call the function that makes the data, if it is one and was not called. Returns whether the data is async.

        Raises:
            TypeError: what it made is no data.
        """
        if self.is_async is None:
            made: Any = self._call() if is_factory(self._data) else self._data
            is_async = is_async_iterable(made)
            if not (is_async or is_iterable(made)):
                raise TypeError(
                    f"data() returned {made!r}, which is no iterable and no async iterable: return or yield batches"
                )
            self._made, self.is_async = made, is_async
        return self.is_async

    def _call(self) -> Any:
        try:
            self._position.open()
            return self._data()
        finally:
            self._position.leave()

    @property
    def is_ours(self) -> bool:
        """Whether the engine has opened the iterator, and so closes it; one that the user passed is left open."""
        iterator = self.iterator
        return iterator is not None and iterator is not self._user_data and iterator is not self._data

    def open(self) -> None:
        """Open plain data, unless it is open."""
        if self.iterator is not None:
            return
        position = self._position
        try:
            position.open()
            self._put_back(self._made)
            self.iterator = self._iterate()
            rewind = position.rewind
            while rewind is not None and rewind.to_fetch:
                if rewind.fetched(next(self.iterator, END)):
                    self.iterator = self._iterate()
        finally:
            position.leave()
        position.end_rewind()

    def _iterate(self) -> Iterator[Any]:
        iterator = iter(cast(Iterable[Any], self._made))
        _look_after_workers(iterator)
        return iterator

    async def open_async(self) -> None:
        """Open async data, unless it is open."""
        if self.iterator is not None:
            return
        position = self._position
        try:
            position.open()
            self._put_back(self._made)
            self.iterator = aiter(self._made)
        finally:
            position.leave()
        rewind = position.rewind
        while rewind is not None and rewind.to_fetch:
            if rewind.fetched(await rewind.within(anext(self.iterator, END))):
                self.iterator = aiter(self._made)
        position.end_rewind()

    def close(self) -> None:
        """Close a plain iterator, if the engine has opened it."""
        is_ours, iterator, self.iterator = self.is_ours, self.iterator, None
        if is_ours and hasattr(iterator, "close"):
            iterator.close()

    async def aclose(self) -> None:
        """Close an async iterator, if the engine has opened it."""
        is_ours, iterator, self.iterator = self.is_ours, self.iterator, None
        if is_ours and hasattr(iterator, "aclose"):
            try:
                await iterator.aclose()
            except BaseExceptionGroup as group:
                # A task group that an async generator holds open wraps what closes the generator.
                rest = group.split(GeneratorExit)[1]
                if rest is not None:
                    raise rest from None


def _look_after_workers(iterator: Any) -> None:
    """Have torch's DataLoader look twice a second, not every five seconds, whether its worker processes are alive.

    In the main thread the signal of a child's end tells it at once that one was killed, as when memory has run out. On
    other threads it looks only where it has waited for its usual time.
    """
    look = getattr(type(iterator), "_try_get_data", None)
    if look is None or threading.current_thread() is threading.main_thread():
        return
    weak = weakref.ref(iterator)  # for the iterator, whose workers end with it, holds this function

    def look_often(timeout: float = 0.5) -> Any:
        return look(weak(), timeout)

    iterator._try_get_data = look_often  # noqa: SLF001 -- torch has no public name for it, nor an argument

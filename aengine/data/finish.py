"""Finish: what remains to be done to a batch where the step runs. The data says it itself.

Data that is iterated may have a method `finish_batch_for_step(batch)`. It is called with each batch just before that
becomes `state.batch`, by the thread that is about to make the step, and returns the batch that handlers and the step
see: for what belongs to that thread, as a stream of a GPU does, where the batch was fetched in another. It is plain
code, and may be called again with a batch that was not stepped on, where a later run begins with it. What is compared
when a run is resumed is the batch as it was fetched.
"""

from collections.abc import Callable
from typing import Any

from aengine.callables import check_callable, is_async_callable, name_of, refuse_stop_iteration

HOOK = "finish_batch_for_step"


class Finish:
    """The hook of the data that is open, and the batch that it has finished last.

    Attributes:
        hook: the method of the data, if it has one.
        is_missing: whether the data was asked for it, and has none. Then nothing of this is called for a batch.
            False while the data is not open yet.
    """

    def __init__(self) -> None:
        self.hook: Callable[[Any], Any] | None = None
        self.is_missing: bool = False
        self._last: tuple[Any, Any] | None = None  # as it was fetched, and finished

    def look_for(self, data: Any) -> None:
        """Ask data that is being opened for its hook.

        Raises:
            TypeError: it has one that cannot be called with a batch, or is async.
        """
        self.hook = hook = getattr(data, HOOK, None)
        self.is_missing = hook is None
        if hook is None:
            return
        what = f"{name_of(data)}.{HOOK}"
        check_callable(hook, what, HOOK, "batch")
        if is_async_callable(hook):
            raise TypeError(f"{what} is async, and is called where the step runs, which may be a thread: make it plain")

    def drop(self) -> None:
        """Keep no reference to the last batch: its memory is to be free before the next one comes."""
        self._last = None

    def __call__(self, batch: Any) -> Any:
        """Return a batch, finished."""
        if self.hook is None:
            return batch
        try:
            finished = self.hook(batch)
        except Exception as error:
            refuse_stop_iteration(error, HOOK)
            raise
        self._last = batch, finished
        return finished

    def as_fetched(self, batch: Any) -> Any:
        """Return the batch that was finished last as it was fetched; any other one itself."""
        return self._last[0] if self._last is not None and self._last[1] is batch else batch

"""RunWorker: the thread on which a run advances its loop, where the step is a plain one."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import anyio

from aengine.threads.dedicated import DedicatedThread
from aengine.threads.event_loop import EventLoopHandle
from aengine.threads.openmp import release_idle_threads
from aengine.threads.thread_state import SharedContext, ThreadState, context_for_thread
from aengine.threads.worker import WorkerWayBack, WorkItem, close_unawaited


class RunWorker:
    """A thread with the context and the torch settings of the caller of `run()`. Made in the caller's task.

    A run that an inline handler of another run waits for shares the thread of that one, which is idle meanwhile: OpenMP
    keeps a team of threads for each thread that has computed, and one team more than there are processors is slow. A
    run that was interrupted goes on in the thread that it had, where that was kept: its data may belong to it.

    Attributes:
        item: what the run under way does on the thread now.
        thread: this run's own thread, or the one that it shares; None before `start`.
    """

    def __init__(self, name: str, settings: ThreadState, loop_handle: EventLoopHandle) -> None:
        self.item: WorkItem | None = None
        self.thread: DedicatedThread | None = None
        self._name = name
        self._settings = settings
        self._loop_handle = loop_handle
        self._context = context_for_thread()
        self._contexts: SharedContext | None = None
        self._way_back = WorkerWayBack(loop_handle.token)
        self._shared: ExitStack | None = None  # what puts the settings of the other run back
        self._is_own = True  # the thread, not that of another run under way

    @property
    def is_idle(self) -> bool:
        """Whether the thread is there, and does nothing."""
        return self.thread is not None and self.item is None

    @property
    def is_here(self) -> bool:
        """Whether the caller runs on the thread, inside this run."""
        return self.item is not None and self.thread is not None and self.thread.is_here

    async def start(self, parent: "RunWorker | None", kept: DedicatedThread | None) -> None:
        """Start a thread, or take one that was kept, or share that of a parent, which must be idle until this stops.

        In the run's task.
        """
        self._contexts = SharedContext(self._context)
        if parent is None and kept is None:
            release_idle_threads()
            entering = self._settings.entered, self._way_back.entered
            self.thread = DedicatedThread(self._name, *entering, context=self._context)
            return
        self._is_own = kept is not None
        self.thread = kept or (None if parent is None else parent.thread)
        self._shared = ExitStack()
        await self._call(self._shared.enter_context, self._settings.entered())
        await self._call(self._shared.enter_context, self._way_back.entered())

    @property
    def is_at_work(self) -> bool:
        """Whether a call on the thread has not ended, though nothing waits for it any more."""
        return self.item is not None and not self.item.done

    def leave(self) -> None:
        """The event loop of the run is closed: let the thread end, if it is this run's own. It is not at work."""
        if self.item is not None:
            close_unawaited(self.item.result)
        self.item = self._way_back.item = None
        self._let_end()

    def submit(self, function: Callable[[Any], Any], argument: Any) -> WorkItem:
        """Have the thread make one call, and return it. It is `item` until `finish()`."""
        assert self.thread is not None and self._contexts is not None, "started before"  # noqa: PT018, S101
        # Stored before it begins: the step that it runs may ask at once whether it is here.
        item = self.item = self._way_back.item = WorkItem(self._loop_handle, self._contexts, function, argument)
        self.thread.post(partial(self._work, item))
        return item

    def _work(self, item: WorkItem) -> None:
        """Make the call; on the thread. Where nothing is left that would ever stop the thread, let it end."""
        item.run()
        if self._loop_handle.is_of_asyncio and self._loop_handle.is_closed:
            self._let_end()

    def _let_end(self) -> None:
        if self._is_own and self.thread is not None:
            self.thread.abandon()

    def finish(self) -> None:
        """The call has returned or raised."""
        self.item = self._way_back.item = None

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
        assert self.thread is not None and self._contexts is not None, "started before"  # noqa: PT018, S101
        item = WorkItem(self._loop_handle, self._contexts, function, *arguments)
        self.thread.post(item.run)
        with anyio.CancelScope(shield=True):  # microseconds: nothing of the user's runs in it
            await item.wait(lambda: None)
        if item.error is not None:
            raise item.error

    @property
    def is_shared(self) -> bool:
        """Whether the thread was there before, and is to be left as it was found, which `give_back()` does."""
        return self._shared is not None

    async def give_back(self) -> None:
        """Leave the thread as it was found, unless a step still runs on it. Called before `stop()` and `keep()`."""
        shared, self._shared = self._shared, None
        if shared is not None and self.item is None:
            await self._call(shared.close)

    def stop(self) -> None:
        """End the thread, if it is this run's own. Where a step still runs on it, it is abandoned."""
        thread = self.keep()
        if thread is not None:
            thread.stop() if self.item is None else thread.abandon()

    def keep(self) -> DedicatedThread | None:
        """Use the thread no longer, and return it, if it is this run's own. A later run may take it."""
        thread, self.thread = self.thread, None
        self._contexts = None  # among them is that of the run's task, which holds the run
        return thread if self._is_own else None

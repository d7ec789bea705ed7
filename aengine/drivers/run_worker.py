"""RunWorker: the thread on which a run advances its loop, where the step is a plain one."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import anyio

from aengine.threads.dedicated import DedicatedThread
from aengine.threads.event_loop import EventLoopHandle
from aengine.threads.openmp import release_idle_threads
from aengine.threads.thread_state import SharedContext, ThreadState, context_for_thread
from aengine.threads.worker import WorkerWayBack, WorkItem


class RunWorker:
    """A thread with the context and the torch settings of the caller of `run()`. Made in the caller's task.

    A run that an inline handler of another run waits for shares the thread of that one, which is idle meanwhile: OpenMP
    keeps a team of threads for each thread that has computed, and one team more than there are processors is slow.

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

    @property
    def is_idle(self) -> bool:
        """Whether the thread is there, and does nothing."""
        return self.thread is not None and self.item is None

    @property
    def is_here(self) -> bool:
        """Whether the caller runs on the thread, inside this run."""
        return self.item is not None and self.thread is not None and self.thread.is_here

    async def start(self, parent: "RunWorker | None") -> None:
        """Start a thread, or share that of a parent, which must be idle until this is stopped. In the run's task."""
        self._contexts = SharedContext(self._context)
        if parent is None:
            release_idle_threads()
            self.thread = DedicatedThread(self._name, self._settings.entered, self._way_back.entered)
            return
        self.thread = parent.thread
        self._shared = ExitStack()
        await self._call(self._shared.enter_context, self._settings.entered())
        await self._call(self._shared.enter_context, self._way_back.entered())

    def submit(self, function: Callable[[Any], Any], argument: Any) -> WorkItem:
        """Have the thread make one call, and return it. It is `item` until `finish()`."""
        assert self.thread is not None and self._contexts is not None, "started before"  # noqa: PT018, S101
        # Stored before it begins: the step that it runs may ask at once whether it is here.
        item = self.item = self._way_back.item = WorkItem(self._loop_handle, self._contexts, function, argument)
        self.thread.post(item.run)
        return item

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
        """Whether the thread is that of another run, and is to be given back."""
        return self._shared is not None

    async def give_back(self) -> None:
        """Leave the thread to the run whose it is as it was."""
        if self._shared is not None:
            await self._call(self._shared.close)
        self._contexts = None

    def stop(self) -> None:
        """End the thread. Where a step still runs on it, it is abandoned."""
        if self.thread is not None:
            self.thread.stop() if self.item is None else self.thread.abandon()
        self._contexts = None  # among them is that of the run's task, which holds the run

"""Ending: how a run ends what it has started, however it came to its end."""

import math
from collections.abc import Awaitable, Callable
from functools import partial

import anyio

from aengine.drivers.outcome import Outcome
from aengine.drivers.run_worker import RunWorker
from aengine.drivers.services import ServiceTasks
from aengine.drivers.subscriber_tasks import SubscriberTasks
from aengine.loop.loop import Loop


class Ending:
    """Ends what one run has started, in the order in which one may still need the other. In the task of the run.

    `explain` returns the failure to report for a cancellation, if that was not the run's.
    """

    def __init__(
        self,
        loop: Loop,
        worker: RunWorker | None,
        subscribers: SubscriberTasks,
        services: ServiceTasks,
        outcome: Outcome,
        explain: Callable[[BaseException], BaseException],
    ) -> None:
        self._source = loop.source
        self._cancellations = loop.cancellations
        self._worker = worker
        self._subscribers = subscribers
        self._services = services
        self._outcome = outcome
        self._explain = explain

    @property
    def must_wait(self) -> bool:
        """Whether anything is there to be ended that takes an await: a short run has nothing, and is to cost little."""
        return (
            self._subscribers.are_any
            or self._services.are_any
            or self._source.must_be_closed
            or (self._worker is not None and self._worker.is_shared)
        )

    async def close(self, deadline: float, *, is_suspended: bool) -> None:
        """End all that takes an await. What fails is added to the outcome. The caller shields this."""
        source, worker, error = self._source, self._worker, self._outcome.first_error
        await self._run_cleanup(partial(self._subscribers.finish, deadline))
        await self._run_cleanup(partial(self._services.run_ended, error, deadline))
        await self._run_cleanup(self._subscribers.end)
        del error
        if not is_suspended and (worker is None or worker.item is None):  # else a step still runs, which was abandoned
            # The loop has done so itself, unless it was cancelled in its clean-up.
            await self._run_cleanup(source.aclose, deadline)
            await self._run_cleanup(self._close_data)
        await self._run_cleanup(source.exit, deadline)
        if worker is not None:
            await self._run_cleanup(worker.give_back)

    def end_worker(self, *, is_suspended: bool) -> None:
        """End the worker; or keep its thread, to which the data belongs that the next run goes on with."""
        worker, source = self._worker, self._source
        if worker is not None and is_suspended and source.belongs_to_thread:
            source.keep_thread(worker.keep())
        elif worker is not None:
            worker.stop()

    async def _close_data(self) -> None:
        """Close plain data on the thread that has pulled it."""
        source, worker = self._source, self._worker
        if worker is None or worker.thread is None or not source.is_open:
            source.close()
            return
        item = worker.submit(lambda _: source.close(), None)
        try:
            await item.wait(lambda: None)
        finally:
            if item.done:
                worker.finish()
        if item.error is not None:
            raise item.error

    async def _run_cleanup(self, part: Callable[[], Awaitable[None]], deadline: float = math.inf) -> None:
        """Run one part of the clean-up to its end: again if a native cancellation, which no shield holds off, cut it.

        Each part can be called again: it goes on where it was. Its error is raised by `run()`, with the others.
        """
        while True:
            try:
                with anyio.CancelScope(deadline=deadline):
                    await part()
            except self._cancellations as error:
                failure = self._explain(error)
                if isinstance(failure, self._cancellations):
                    self._outcome.add_cancellation(failure)
                else:
                    self._outcome.failures.append(failure)
                del failure  # whose cause holds this frame
            except Exception as error:  # noqa: BLE001 -- raised by run(), beside what else went wrong
                self._outcome.failures.append(error)
                return
            else:
                return

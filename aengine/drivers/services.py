"""Services: what lives beside the runs of an engine, with a task in each of them: a tracker, a sampler, an exporter."""

import logging
import math
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from aengine.errors import HandlerTimeout, StrayCancellation
from aengine.state import StopReason
from aengine.statistics import ServiceStatistics
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent
from aengine.threads.guarded import guarded

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

_logger = logging.getLogger("aengine.engine")

_caller: ContextVar["Service | None"] = ContextVar("aengine_service", default=None)
"""The service whose task or method this is, None elsewhere."""


class Service:
    """What lives beside the runs of an engine: subclass it, override what is needed, hand it to `engine.add_service()`.

    class Heartbeat(Service):
        async def serve(self, engine):
            while True:
                await post(url, json={"iteration": engine.state.iteration})
                await anyio.sleep(10)

        async def run_ended(self, engine, reason, error):
            await post(url, json={"stopped": str(reason)})

    Every run of the engine, and every part of one that was interrupted, calls `run_started` first, has `serve` as one
    of its tasks, and ends with `run_ended`, or with `run_abandoned` where that could not be awaited to its end. All of
    them are called on the event loop's thread, but `run_abandoned`, which may be called where no event loop runs any
    more. What `serve`, `flush` and `run_ended` raise fails the run, or is logged, as `on_error=` of `add_service` says.
    """

    def run_started(self, engine: Any) -> None:
        """A run begins, or goes on: before its first event, and before `serve` takes its first step."""

    async def serve(self, engine: Any) -> None:
        """Live beside the run. It may return early; it is cancelled at the end of the run, after `run_ended`.

        A cancellation of the run does not reach it: what was handed to a service before that is still dealt with.
        """

    async def flush(self) -> None:
        """Deal with all that was handed over so far: awaited by `engine.flush()`, and before a clean end of a run.

        A run that ends cleanly awaits it when all handlers are done, so that an error still fails the run as any other
        does. Where the run fails or is cancelled there is `run_ended` alone.
        """

    async def run_ended(self, engine: Any, reason: StopReason, error: BaseException | None) -> None:
        """The run has ended, or was interrupted. At most `grace` seconds; a cancellation of the run is not felt.

        Args:
            engine: whose run it is.
            reason: why it ended.
            error: what failed it, if something did.
        """

    def run_abandoned(self, engine: Any, reason: StopReason, error: BaseException | None) -> None:
        """Called in place of `run_ended` where that was not awaited to its end.

        So it is after the grace is over, after a second Ctrl-C, and where a run was cancelled before its first step. It
        must not wait; what it raises is logged.
        """


class ServiceEntry:
    """A service as it was added to an engine.

    Attributes:
        name: shown in notes, logs and statistics.
        errors: how many exceptions its methods raised.
    """

    def __init__(self, service: Service, name: str, *, raises: bool) -> None:
        self.service = service
        self.name = name
        self.errors = 0
        self.is_running = False
        self._raises = raises

    def count(self, error: Exception, where: str, engine_name: str) -> bool:
        """Take note of an error where it was raised. Says whether it is to fail the run; else it has been logged."""
        self.errors += 1
        error.add_note(f"in {where}() of service {self.name!r}, engine {engine_name!r}")
        if not self._raises:
            _logger.error("service %r of engine %r failed, going on without it", self.name, engine_name, exc_info=error)
        return self._raises

    def statistics(self) -> ServiceStatistics:
        """Return what it has been doing."""
        return ServiceStatistics(self.name, self.is_running, self.errors)


class ServiceTasks:
    """The services of one run. All but `close` is called on the event loop's thread."""

    def __init__(self, engine: Any, entries: tuple[ServiceEntry, ...], grace: float) -> None:
        self._engine = engine
        self._grace = grace
        self._open = list(entries)  # those that have not been told of the end of the run
        self._ending: set[ServiceEntry] = set()  # those whose `run_ended` was called, or is not to be: flush() was late
        self._failures: list[BaseException] = []  # of those that were called before the run could be told
        self._tasks: dict[ServiceEntry, _Task] = {}
        self._group: TaskGroup | None = None
        self._loop_handle: EventLoopHandle | None = None
        self._fail: Callable[[BaseException], None] = self._failures.append

    def run_started(self) -> None:
        """Tell them that the run begins. In the task that called `run()`, so that each is told of the end, too."""
        for entry in tuple(self._open):
            self._call_started(entry)

    def _call_started(self, entry: ServiceEntry) -> None:
        entry.is_running = True
        try:
            entry.service.run_started(self._engine)
        except Exception as error:  # noqa: BLE001 -- handed over, or logged
            self._handle(entry, error, "run_started")

    def start(self, group: "TaskGroup", loop_handle: EventLoopHandle, fail: Callable[[BaseException], None]) -> None:
        """Start their tasks in the group of the run. Errors go to `fail`."""
        self._group, self._loop_handle, self._fail = group, loop_handle, fail
        for error in self._failures:
            fail(error)
        self._failures.clear()
        for entry in self._open:
            self._start_task(entry)

    def add(self, entry: ServiceEntry) -> None:
        """Have one that was added during the run take part in it."""
        self._open.append(entry)
        self._call_started(entry)
        if self._group is not None:
            self._start_task(entry)

    def remove(self, entry: ServiceEntry) -> None:
        """Have one that was removed during the run take no more part in it: its task is cancelled."""
        if entry in self._open:
            self._abandon(entry, None)

    def _start_task(self, entry: ServiceEntry) -> None:
        assert self._group is not None and self._loop_handle is not None, "started before"  # noqa: PT018, S101
        if type(entry.service).serve is Service.serve:  # it has no use for a task
            return
        task = self._tasks[entry] = _Task(entry, self._engine, self._loop_handle, self._handle)
        self._loop_handle.start(self._group, task.run, task.never_started, name=entry.name)

    def _handle(self, entry: ServiceEntry, error: BaseException, where: str) -> None:
        if not isinstance(error, Exception) or entry.count(error, where, self._engine.name):
            self._fail(error)

    # Flushing and ending

    def refuse_own_flush(self) -> None:
        """Raise RuntimeError where waiting for all would be waiting for itself."""
        if any(entry.service is _caller.get() for entry in self._open):
            raise RuntimeError(
                "flush() waits for every service, and so for the one that calls it here: call it from the step, from an"
                " inline handler, or from outside"
            )

    async def flush(self, deadline: float = math.inf) -> None:
        """Have each deal with what it was handed so far. Cancellable.

        Raises:
            HandlerTimeout: some were not done at the deadline. They have been abandoned.
        """
        flushable = [entry for entry in self._open if type(entry.service).flush is not Service.flush]
        late = await self._for_each(flushable, lambda entry: entry.service.flush(), "flush", deadline)
        for entry in late:  # `run_abandoned` is called when the run has ended: it is this that fails it
            self._ending.add(entry)
            if entry in self._tasks:
                self._tasks[entry].cancel()
        self._raise_timeout(late)

    async def run_ended(self, error: BaseException | None, deadline: float) -> None:
        """Tell them that the run has ended, and wait for them; then cancel their tasks, and wait for these.

        Raises:
            HandlerTimeout: some were not done at the deadline. They have been abandoned.
        """

        async def end(entry: ServiceEntry) -> None:
            await entry.service.run_ended(self._engine, self._reason, error)
            self._close(entry)

        # A native cancellation has this called again: those that it cut off are abandoned, and not called once more.
        ending = [entry for entry in self._open if entry not in self._ending]
        self._ending.update(ending)
        late = await self._for_each(ending, end, "run_ended", deadline)
        self._abandon_all(error)  # those that are late, and those that failed
        for task in self._tasks.values():
            task.cancel()
        for task in self._tasks.values():
            await task.ended.wait()
        self._raise_timeout(late)

    async def _for_each(
        self,
        entries: list[ServiceEntry],
        method: Callable[[ServiceEntry], Awaitable[None]],
        where: str,
        deadline: float,
    ) -> list[ServiceEntry]:
        """Await a method of all at once, so that one that hangs keeps no other from its end. Returns the late ones."""
        late = list(entries)

        async def call(entry: ServiceEntry) -> None:
            _caller.set(entry.service)
            try:
                await method(entry)
            except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 -- handed over, or logged
                self._handle(entry, error, where)
            late.remove(entry)

        if entries:
            with anyio.CancelScope(deadline=deadline):
                async with anyio.create_task_group() as group:
                    for entry in entries:
                        group.start_soon(call, entry)
        return late

    def _raise_timeout(self, late: list[ServiceEntry]) -> None:
        if late:
            names = ", ".join(repr(entry.name) for entry in late)
            raise HandlerTimeout(
                f"after {self._grace} seconds of grace these services of engine {self._engine.name!r} were still busy"
                f" with the end of the run: {names}"
            )

    def close(self, error: BaseException | None) -> None:
        """The run is over, however that came: those that have not been told of its end are, without waiting."""
        self._abandon_all(error)
        self._tasks.clear()  # which refer to this: no cycle may hold the engine
        self._group, self._fail = None, self._failures.append

    def _abandon_all(self, error: BaseException | None) -> None:
        for entry in tuple(self._open):
            self._abandon(entry, error)

    def _abandon(self, entry: ServiceEntry, error: BaseException | None) -> None:
        if entry in self._tasks:
            self._tasks[entry].cancel()
        self._close(entry)
        try:
            entry.service.run_abandoned(self._engine, self._reason, error)
        except Exception:
            entry.errors += 1
            _logger.exception("run_abandoned() of service %r of engine %r failed", entry.name, self._engine.name)

    @property
    def _reason(self) -> StopReason:
        reason: StopReason | None = self._engine.state.stop_reason
        return reason or StopReason.CANCELLED  # before its first step, or by a second Ctrl-C

    def _close(self, entry: ServiceEntry) -> None:
        entry.is_running = False
        self._open.remove(entry)


class _Task:
    """The task in which a service serves."""

    def __init__(
        self,
        entry: ServiceEntry,
        engine: Any,
        loop_handle: EventLoopHandle,
        on_error: Callable[[ServiceEntry, BaseException, str], None],
    ) -> None:
        self.ended = ThreadSafeEvent(loop_handle)
        self._service = entry.service
        self._name = entry.name
        self._serve = partial(entry.service.serve, engine)
        self._on_error: Callable[[BaseException], None] = lambda error: on_error(entry, error, "serve")
        self._scope = anyio.CancelScope(shield=True)  # what cancels the run does not cancel this: see `Service.serve`

    async def run(self) -> None:
        _caller.set(self._service)
        await guarded(self._serve_in_scope, self._on_error, self._stray)
        self.ended.set()

    async def _serve_in_scope(self) -> None:
        with self._scope:
            await self._serve()

    def never_started(self) -> None:
        """Its task was cancelled natively before its first step."""
        self._on_error(self._stray())
        self.ended.set()

    def _stray(self) -> StrayCancellation:
        return StrayCancellation(f"the task of service {self._name!r} was cancelled from outside the run")

    def cancel(self) -> None:
        self._scope.cancel()

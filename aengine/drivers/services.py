"""Services: what lives beside the runs of an engine, with a task in each of them: a tracker, a sampler, an exporter."""

import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from aengine.errors import HandlerTimeout, StrayCancellation
from aengine.state import StopReason
from aengine.statistics import ServiceStatistics
from aengine.threads.event_loop import EventLoopHandle
from aengine.threads.guarded import guarded

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from aengine.engine import Engine

_logger = logging.getLogger("aengine.engine")

_caller: ContextVar[int | None] = ContextVar("aengine_service", default=None)
"""The id of the service whose task or method this is, None elsewhere. Not the service, since contexts outlive runs."""


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
    of its tasks, and ends with `run_ended`, or with `run_abandoned` where that could not be awaited to its end. All but
    `run_abandoned` are called on the event loop's thread; that one may be called when no event loop runs any more. What
    `serve`, `flush` and `run_ended` raise fails the run, or is logged, as `on_error=` of `add_service` says.
    """

    def run_started(self, engine: "Engine[Any, Any]") -> None:
        """A run begins, or goes on: before its first event, and before `serve` takes its first step."""

    async def serve(self, engine: "Engine[Any, Any]") -> None:
        """Live beside the run. It may return early; it is cancelled at the end of the run, after `run_ended`.

        A cancellation of the run does not reach it: what was handed to a service before that is still dealt with.
        """

    async def flush(self) -> None:
        """Deal with all that was handed over so far: awaited by `engine.flush()`, and before a clean end of a run.

        A run that ends cleanly, or is interrupted, awaits it after its last handler and before it counts as ended, so
        an error still fails the run as any other does. A run that fails or is cancelled calls `run_ended` only.
        """

    async def before_commit(self) -> None:
        """A checkpoint of the run is written, and is going to be committed: make safe what was handed over so far.

        So a run that is resumed from it finds on the disk whatever belongs to the steps before. Awaited beside the
        step, by a `Checkpoint` of the engine, for which the commit waits, though not for longer than `grace` seconds.
        """

    async def run_ended(self, engine: "Engine[Any, Any]", reason: StopReason, error: BaseException | None) -> None:
        """The run has ended, or was interrupted. It has `grace` seconds; a cancellation of the run does not reach it.

        Args:
            engine: whose run it is.
            reason: why the loop ended.
            error: what failed the run, if something did. Beside a reason like COMPLETED, it came as the loop had ended.
        """

    def run_abandoned(self, engine: "Engine[Any, Any]", reason: StopReason, error: BaseException | None) -> None:
        """Called in place of `run_ended` where that was not awaited to its end.

        This happens when the grace is over, after a second Ctrl-C, when a run was cancelled before its first step, and
        when the service was removed during the run. It must not wait; what it raises is logged.
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
        self.errors: int = 0
        self.is_running = False
        self._raises = raises

    def count(self, error: Exception, where: str, engine_name: str) -> bool:
        """Take note of an error where it was raised. Says whether it is to fail the run; else it has been logged."""
        self.errors += 1
        error.add_note(f"in {where}() of service {self.name!r}, engine {engine_name!r}")
        if not self._raises:
            _logger.error("service %r of engine %r failed, and the run goes on", self.name, engine_name, exc_info=error)
        return self._raises

    def statistics(self) -> ServiceStatistics:
        """Return what it has been doing."""
        return ServiceStatistics(self.name, self.is_running, self.errors)


class ServiceTasks:
    """The services of one run. All of it is called on the event loop's thread, but `close` where none runs any more."""

    def __init__(self, engine: Any, entries: tuple[ServiceEntry, ...], grace: float) -> None:
        self._engine = engine
        self._grace = grace
        self._open = list(entries)  # those whose `run_ended` or `run_abandoned` is still to come
        self._ending: set[ServiceEntry] = set()  # `run_ended` was called, or is not to be, since their flush() was late
        self._under_way: dict[anyio.CancelScope, ServiceEntry] = {}  # calls of `serve`, `flush` and `run_ended`
        self._serving: dict[ServiceEntry, anyio.Event] = {}  # set when the task has ended
        self._start: Callable[..., None] | None = None
        self._fail: Callable[[BaseException], None] = _log_unheard

    @property
    def are_any(self) -> bool:
        """Whether one has not heard of the end of the run, or still runs."""
        return bool(self._open or self._serving)

    def run_started(self, fail: Callable[[BaseException], None]) -> None:
        """Call `run_started` of each, in the task that called `run()`. Errors go to `fail`, now and later.

        Not in the task of the run: if that never takes its first step, each is to hear of the end all the same.
        """
        self._fail = fail
        for entry in tuple(self._open):
            if entry in self._open:  # otherwise the `run_started` of another has removed it
                self._call_started(entry)

    def _call_started(self, entry: ServiceEntry) -> None:
        entry.is_running = True
        try:
            entry.service.run_started(self._engine)
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 -- handed over, or logged
            self._handle(entry, "run_started", error)

    def start(self, group: "TaskGroup", loop_handle: EventLoopHandle) -> None:
        """Start their tasks in the group of the run."""
        self._start = partial(loop_handle.start, group)
        for entry in self._open:
            self._start_task(entry)

    def add(self, entry: ServiceEntry) -> None:
        """Have one that was added during the run take part in it."""
        self._open.append(entry)
        self._call_started(entry)
        if entry in self._open:  # otherwise it has removed itself
            self._start_task(entry)

    def remove(self, entry: ServiceEntry) -> None:
        """Have one that was removed during the run take no more part in it: what it does is cancelled."""
        if entry in self._open and entry not in self._ending:  # its end, which is bounded, it may still meet
            try:
                self._abandon(entry, None)
            except (KeyboardInterrupt, SystemExit) as error:  # not into the event loop, which may be calling this
                self._fail(error)

    def _start_task(self, entry: ServiceEntry) -> None:
        if self._start is None or type(entry.service).serve is Service.serve:  # too early, or it has no use for a task
            return
        scope = anyio.CancelScope(shield=True)  # what cancels the run does not cancel this: see `Service.serve`
        self._under_way[scope] = entry
        ended = self._serving[entry] = anyio.Event()
        fail = partial(self._handle, entry, "serve")

        async def serve() -> None:
            with scope:
                if not scope.cancel_called:  # the run may have ended before this task's first step
                    await entry.service.serve(self._engine)

        async def run() -> None:
            _caller.set(id(entry.service))
            await guarded(serve, fail, partial(_stray, entry, "serve"))
            end()

        def never_started() -> None:  # its task was cancelled natively before its first step
            fail(_stray(entry, "serve"))
            end()

        def end() -> None:  # a run may last for days, and see many come and go
            del self._under_way[scope], self._serving[entry]
            ended.set()

        self._start(run, never_started, name=entry.name)

    def _handle(self, entry: ServiceEntry, where: str, error: BaseException) -> None:
        if not isinstance(error, Exception) or entry.count(error, where, self._engine.name):
            self._fail(error)

    # Flushing and ending

    def refuse_own_flush(self) -> None:
        """Raise RuntimeError where waiting for all would be waiting for itself."""
        if any(id(entry.service) == _caller.get() for entry in self._open):
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
            self._cancel(entry)
        self._raise_timeout(late, "flush")

    @property
    def must_prepare_commit(self) -> bool:
        """Whether one of them is to be awaited before a checkpoint is committed."""
        return any(type(entry.service).before_commit is not Service.before_commit for entry in tuple(self._open))

    async def before_commit(self) -> None:
        """Have each make safe what it was handed so far, in the time of a clean-up. Cancellable."""
        entries = [entry for entry in self._open if type(entry.service).before_commit is not Service.before_commit]
        deadline = anyio.current_time() + self._grace
        late = await self._for_each(entries, lambda entry: entry.service.before_commit(), "before_commit", deadline)
        for entry in late:
            _logger.warning(
                "a checkpoint of engine %r is committed before service %r has made safe what belongs to its steps: that"
                " took longer than the grace of %s seconds",
                self._engine.name, entry.name, self._grace,
            )  # fmt: skip

    async def run_ended(self, error: BaseException | None, deadline: float) -> None:
        """Await `run_ended` of each; then cancel their tasks, and wait for these.

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
        for ended in tuple(self._serving.values()):
            await ended.wait()
        self._raise_timeout(late, "run_ended")

    async def _for_each(
        self,
        entries: list[ServiceEntry],
        method: Callable[[ServiceEntry], Awaitable[None]],
        where: str,
        deadline: float,
    ) -> list[ServiceEntry]:
        """Await a method of all at once, so that one that hangs keeps no other from its end. Returns the late ones."""
        late: list[ServiceEntry] = []
        strays: list[tuple[ServiceEntry, BaseException]] = []
        cancelled = anyio.get_cancelled_exc_class()

        async def call(entry: ServiceEntry) -> None:
            _caller.set(id(entry.service))
            # A cancellation of the run is raised in the task that waits for this one, too. Let out of this one, on
            # asyncio, anyio would keep it in a cycle, and with it the engine.
            with suppress(cancelled), anyio.CancelScope(deadline=deadline) as scope:
                self._under_way[scope] = entry
                try:
                    await method(entry)
                except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 -- handed over, or logged
                    self._handle(entry, where, error)
                except BaseException as error:
                    if anyio.current_effective_deadline() > -math.inf:  # no scope around this is cancelled
                        strays.append((entry, error))
                    raise
                finally:
                    del self._under_way[scope]
            if scope.cancelled_caught and entry in self._open:
                late.append(entry)

        try:
            if entries:
                async with anyio.create_task_group() as group:
                    for entry in entries:
                        group.start_soon(call, entry)
            # This task was not cancelled, or it would not be here. So these are cancellations of something which a
            # service has awaited, or native ones of their tasks alone.
            for entry, error in strays:
                lost = _stray(entry, where)
                lost.__cause__ = error
                self._handle(entry, where, lost)
                del lost, error
        finally:
            strays.clear()  # their tracebacks hold frames of this: no cycle may hold the engine
        return late

    def _raise_timeout(self, late: list[ServiceEntry], where: str) -> None:
        names = ", ".join(repr(entry.name) for entry in late)
        timeout = HandlerTimeout(
            f"after {self._grace} seconds of grace these services of engine {self._engine.name!r} were still busy"
            f" with the end of the run: {names}"
        )
        try:
            if [entry for entry in late if entry.count(timeout, where, self._engine.name)]:
                raise timeout
        finally:
            del timeout  # whose traceback holds this frame: no cycle may hold the engine

    def close(self, error: BaseException | None) -> None:
        """The run is over, however that came: those that have not heard of its end do so, without waiting."""
        try:
            self._abandon_all(error)
        finally:
            self._start, self._fail = None, _log_unheard  # which refer to this: no cycle may hold the engine

    def desert(self) -> None:
        """The event loop was closed before the end of the run: no task is left that could be cancelled."""
        self._under_way.clear()
        self._abandon_all(None)

    def _abandon_all(self, error: BaseException | None) -> None:
        try:
            while self._open:
                self._abandon(self._open[0], error)
        finally:
            if self._open:  # Ctrl-C came in the `run_abandoned` of one: the others are called all the same
                self._abandon_all(error)

    def _abandon(self, entry: ServiceEntry, error: BaseException | None) -> None:
        has_started = entry.is_running
        self._close(entry)
        if not has_started:  # it was removed by the `run_started` of another
            return
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
        self._cancel(entry)

    def _cancel(self, entry: ServiceEntry) -> None:
        for scope, owner in self._under_way.items():
            if owner is entry:
                scope.cancel()


def _stray(entry: ServiceEntry, where: str) -> StrayCancellation:
    return StrayCancellation(f"{where}() of service {entry.name!r} was cancelled from outside the run")


def _log_unheard(error: BaseException) -> None:
    _logger.error("a service failed when its run was over", exc_info=error)

"""Driver: advances one engine's loop on an event loop, and owns every task and thread of the run while it lasts.

The loop is advanced in a task of its own, a child of the task that called `run()`. A native asyncio cancellation or a
Ctrl-C hits the caller, which waits for its task group; what the child does then is cancelled by anyio's rules, so a
shield holds, a step in flight is waited for, and clean-up ends.
"""

import math
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial
from time import perf_counter
from types import CoroutineType
from typing import Any, cast
from weakref import WeakMethod

import anyio
import anyio.abc
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from aengine.bus.bus import Bus
from aengine.bus.inbox import BackpressureWait
from aengine.bus.subscriber import Subscriber
from aengine.data.managed import RunContext
from aengine.drivers.services import ServiceEntry, ServiceTasks
from aengine.drivers.subscriber_tasks import SubscriberTasks
from aengine.errors import HandlerTimeout, StrayCancellation, raise_failures
from aengine.loop.effects import Effect, LoopGenerator, NextBatch, WaitCancelled
from aengine.loop.loop import Loop
from aengine.loop.requests import Request, Requests
from aengine.threads.dedicated import DedicatedThread
from aengine.threads.event_loop import EventLoopHandle, ThreadSafeEvent, TickCounter
from aengine.threads.openmp import release_idle_threads
from aengine.threads.thread_state import ThreadState, context_for_thread
from aengine.threads.worker import WorkItem, close_unawaited

_TURNS = 4
"""Turns of the event loop to give away in a row: one is not enough for a socket to be served."""

_current: ContextVar["Driver | None"] = ContextVar("aengine_driver", default=None)


class Driver:
    """One `run()` on an event loop. Made in the task that calls it.

    Attributes:
        is_suspended: whether the story was interrupted, and is to be gone on with by another driver.
    """

    def __init__(
        self,
        loop: Loop,
        generator: LoopGenerator,
        bus: Bus,
        requests: Requests,
        services: ServiceTasks,
        *,
        threaded: bool,
        grace: float,
        prefetch: int,
    ) -> None:
        self.is_suspended = False
        self._loop_handle = EventLoopHandle()
        self._loop = loop
        self._generator = generator
        self._bus = bus
        self._requests = requests
        self._threaded = threaded
        self._grace = grace
        self._prefetch = prefetch
        self._context = context_for_thread()
        self._settings = ThreadState()
        self._parent = _current.get()
        self._caller = anyio.get_current_task().id
        self._task: int | None = None
        # Where the story stands: how to go on, or what it wants to have awaited first.
        self._next: tuple[Callable[[Any], Any], Any] = (generator.send, None)
        self._wanted: Any = None
        self._scope = anyio.CancelScope()
        self._is_over = False
        self._is_woken = False
        self._deadline: float | None = None  # of the clean-up, once it has begun
        self._cancellation: BaseException | None = None
        self._failures: list[BaseException] = []
        self._failures_before: int | None = None  # how many there were when a cancellation came
        self._outcome: BaseException | None = None  # what the story ended with, if that is an error
        self._reported: BaseException | None = None  # a failure beside the loop that it was not told of yet
        self._changed: ThreadSafeEvent | None = None
        self._room: BackpressureWait | None = None  # what the loop waits for
        self._worker: DedicatedThread | None = None
        self._work_item: WorkItem | None = None
        self._shared: ExitStack | None = None
        self._subscribers = SubscriberTasks(bus, self._loop_handle, grace)
        self._services = services
        self._group: anyio.abc.TaskGroup

    async def run(self, wanted: Any = None) -> None:
        """Drive the loop to its end or its interruption, and end all that was started for it.

        Args:
            wanted: what the loop has yielded already, where it was begun without an event loop.

        Raises:
            BaseException: what failed the run, as the very object that was raised; several as an ExceptionGroup.
                A cancellation, when the step in flight and the clean-up have ended.
        """
        if wanted is not None:
            self._next = (lambda _: wanted, None)
        loop, bus = self._loop, self._bus
        cancelled = anyio.get_cancelled_exc_class()
        if cancelled not in loop.cancellations:
            loop.cancellations += (cancelled,)
        loop.others_had_a_turn = None if self._threaded else TickCounter.here().watch()
        host = RunContext(
            self._loop_handle, self.spawn, self._fail_of_data, self._settings, self._prefetch, loop.can_use, self._grace
        )
        loop.source.move_to(host)
        bus.loop_handle = self._loop_handle
        # Posted, even from the loop's own thread: a signal handler runs inside its select(), which goes back to sleep.
        # Held weakly: what was posted is let go of a turn later, and would keep the engine until then.
        self._requests.on_change = partial(
            self._loop_handle.post, partial(_call_if_alive, WeakMethod(self._look_at_requests))
        )
        ending: BaseException | None = None
        try:
            self._services.run_started()
            async with anyio.create_task_group() as self._group:
                self._loop_handle.start(self._group, self._main, self._never_begin, name=f"aengine {bus.name}")
            if self._cancellation is not None:
                # It hit the task of the loop. If it is the caller's as well, he gets one of his own: under trio each
                # belongs to the scope that it was raised in. A native one belongs to nobody, and goes on as it is.
                await checkpoint_if_cancelled()
        except BaseException as error:  # noqa: BLE001 -- raised below, unless something worse was
            ending = error
        finally:
            self._requests.on_change = bus.loop_handle = None
            loop.source.host = bus.reported = None
        try:
            self._raise(ending)
        finally:
            del ending, self._failures, self._cancellation, self._reported, self._outcome  # no cycles with tracebacks

    def _raise(self, ending: BaseException | None) -> None:
        failures = [*self._failures, *self._loop.also_raised]
        if isinstance(ending, BaseExceptionGroup):  # an error of ours, in a task: not to be hidden
            failures += cast(BaseExceptionGroup[BaseException], ending).exceptions
            ending = None
        cancellation = ending or self._cancellation
        before = len(failures) if self._failures_before is None else self._failures_before
        raised: list[BaseException] = []
        for index, error in enumerate(failures):
            # The cancellation goes on, always; what failed in its wake is told here. Ctrl-C is no failure, wherever it
            # was raised: it is the cause of the cancellation, and wins.
            if cancellation is None or isinstance(error, KeyboardInterrupt | SystemExit):
                raised.append(error)
            elif isinstance(error, StrayCancellation):  # nor is the same cancellation in another task of the run
                continue
            elif index < before or error is self._outcome:
                raised.append(error)
            else:
                self._bus.logger.error("engine %r failed while it was cancelled", self._bus.name, exc_info=error)
            del error
        try:
            raise_failures(self._bus.name, raised, cancellation)
        finally:
            failures.clear()
            raised.clear()
            del cancellation, ending

    # What the run owns

    def spawn(self, function: Callable[[], Any], on_never_started: Callable[[], Any]) -> None:
        """Start a task of this run's. From any thread. `lost` is called if it is cancelled before it begins."""
        self._loop_handle.call(lambda: self._loop_handle.start(self._group, function, on_never_started))

    def start(self, subscriber: Subscriber) -> None:
        """Have a subscriber handle what it is sent, from now to the end of the run. From any thread."""
        self._loop_handle.call(partial(self._start, subscriber))

    def _start(self, subscriber: Subscriber) -> None:
        if not self._is_over:
            self._subscribers.start(subscriber, self._group, self.fail)

    def add_service(self, entry: ServiceEntry) -> None:
        """Have a service take part in this run, from now to its end. From any thread."""
        self._loop_handle.call(lambda: None if self._is_over else self._services.add(entry))

    def remove_service(self, entry: ServiceEntry) -> None:
        """Have a service take no more part in this run. From any thread."""
        self._loop_handle.call(partial(self._services.remove, entry))

    async def flush(self) -> None:
        """Wait until every event dispatched so far is handled, also by the services. Cancellable."""
        self._subscribers.refuse_own_flush()
        self._services.refuse_own_flush()
        await self._subscribers.flush()
        await self._services.flush()

    def fail(self, error: BaseException) -> None:
        """Something beside the loop has failed: the loop is told of it where it stands, and ends. At home."""
        self._failures.append(error)
        if self._reported is None and self._deadline is None and not self._is_over:
            self._reported = error
            self._requests.pending.add(Request.RAISE_FAILURE)
            self._scope.cancel()

    def _fail_of_data(self, error: BaseException) -> None:
        self._loop.note(error, f"the data ({self._loop.source.name})")
        self.fail(error)

    async def _main(self) -> None:
        self._task = anyio.get_current_task().id
        _current.set(self)
        for subscriber in self._bus.subscribers:
            self.start(subscriber)
        self._services.start(self._group, self._loop_handle, self.fail)
        try:
            if self._threaded:
                await self._find_worker()
            await self._drive()
        except self._loop.cancellations as error:
            self._cancelled_by(error)
        finally:
            self._is_over = True
            with anyio.CancelScope(shield=True):
                await self._close()

    def _never_begin(self) -> None:
        self._failures.append(StrayCancellation(f"the run of engine {self._bus.name!r} was cancelled from outside"))

    def _cancelled_by(self, error: BaseException) -> None:
        if not isinstance(error, KeyboardInterrupt | SystemExit):
            self._cancellation = error
        elif not any(error is one for one in self._failures):
            self._failures.append(error)

    async def _find_worker(self) -> None:
        parent = self._parent
        if parent is None or not parent.can_share(self._caller):
            release_idle_threads()
            self._worker = DedicatedThread(f"aengine {self._bus.name}", self._settings)
            return
        self._worker = parent._worker  # noqa: SLF001 -- another driver
        self._shared = ExitStack()
        await self._on_worker(self._shared.enter_context, self._settings.entered())

    def can_share(self, task: int) -> bool:
        """Whether this worker is idle because this very task, inside an inline handler, runs another engine."""
        return self._worker is not None and self._work_item is None and task == self._task

    @property
    def has_abandoned(self) -> bool:
        """Whether a step is still running, for the user no longer wanted to wait for it."""
        return self._work_item is not None

    can_wait = True  # for room in an inbox: the subscribers' tasks run

    @property
    def wait_blocking(self) -> Callable[[Awaitable[Any]], Any] | None:
        """On the worker, inside this run: what has something awaited in the task of the run, and blocks until it is."""
        item = self._work_item
        return None if item is None or not self._is_on_worker else item.call_in_loop

    @property
    def _is_on_worker(self) -> bool:
        return self._work_item is not None and self._worker is not None and self._worker.is_here

    def defer_backpressure(self, waits: list[BackpressureWait]) -> None:
        """Have the loop wait for room before its next step."""
        self._requests.defer_backpressure(waits)

    @property
    def is_inside(self) -> bool:
        """Whether the caller is the loop itself, here or on the worker."""
        return self._is_on_worker or (self._task is not None and self.is_task(self._task))

    def is_task(self, task: int) -> bool:
        """Whether the caller is this task of the run's event loop. Elsewhere, or in no task, it is somebody else."""
        return self._loop_handle.is_here and anyio.get_current_task().id == task

    async def _on_worker(self, function: Callable[..., Any], *arguments: Any) -> Any:
        assert self._worker is not None, "found before the loop is driven"  # noqa: S101
        one = WorkItem(self._loop_handle, self._context, function, *arguments)
        self._worker.post(one.run)
        with anyio.CancelScope(shield=True):
            await one.wait(lambda: None)
        if one.error is not None:
            raise one.error
        return one.result

    async def _close(self) -> None:
        deadline = self._deadline or anyio.current_time() + self._grace
        await self._run_cleanup(partial(self._subscribers.finish, deadline))
        error = self._outcome or next(iter(self._failures), None)
        await self._run_cleanup(partial(self._services.run_ended, error, deadline))
        await self._run_cleanup(self._subscribers.end)
        for subscriber in self._bus.subscribers:  # what is emitted between runs waits for the next one
            subscriber.inbox.reopen_nowait()
        if not self.is_suspended:
            self._bus.end_streams()
            if self._work_item is None:  # the story has done so, unless it was given up, or cancelled in its clean-up
                await self._run_cleanup(self._loop.source.aclose, deadline)
        await self._run_cleanup(self._loop.source.leave, deadline)
        if self._shared is not None:
            await self._run_cleanup(partial(self._on_worker, self._shared.close))
        elif self._worker is not None:
            self._worker.stop() if self._work_item is None else self._worker.abandon()

    async def _run_cleanup(self, part: Callable[[], Awaitable[None]], deadline: float = math.inf) -> None:
        """Have a part of the clean-up done, though this task be cancelled natively, against which no shield holds."""
        while True:
            try:
                with anyio.CancelScope(deadline=deadline):
                    await part()
            except self._loop.cancellations as error:
                self._cancelled_by(error)
            except Exception as error:  # noqa: BLE001 -- raised by run(), beside what else went wrong
                self._failures.append(error)
                return
            else:
                return

    # Driving

    async def _drive(self) -> None:
        advance = self._advance_on_worker if self._threaded else self._advance_here
        while not self._is_over:
            thrown: BaseException | None = None
            try:
                with anyio.CancelScope(
                    shield=self._deadline is not None, deadline=math.inf if self._deadline is None else self._deadline
                ) as self._scope:
                    await advance()
            except BaseException as error:  # noqa: BLE001 -- thrown into the story, which lets it out again
                thrown = error
                if self._failures_before is None:
                    self._failures_before = len(self._failures)
            else:
                if self._scope.cancelled_caught:
                    thrown = self._why_cancelled()
            if self._is_over:
                if isinstance(thrown, self._loop.cancellations):
                    self._cancelled_by(thrown)
            elif thrown is not None and self._wanted is Effect.SHIELD:  # it has been told before, and is ending
                self._begin_clean_up()
                self._wanted, self._next = None, (self._generator.send, None)
            elif thrown is not None:
                close_unawaited(self._wanted)
                self._wanted = None
                self._next = (self._generator.throw, thrown)
            del thrown

    def _why_cancelled(self) -> BaseException | None:
        if self._deadline is not None:
            return HandlerTimeout(
                f"the clean-up of engine {self._bus.name!r} did not end within its {self._grace} seconds of grace"
            )
        reported, self._reported = self._reported, None
        was_woken, self._is_woken = self._is_woken, False
        self._bus.reported = reported
        return reported or (WaitCancelled() if was_woken and self._loop.waits_for_data else None)

    async def _advance_here(self) -> None:  # noqa: C901 -- an await a turn: each call more would be felt
        """Advance the story on the event loop's own thread, until it is over or the scope must be another."""
        send: Callable[[Any], Any] = self._generator.send
        throw: Callable[[Any], Any] = self._generator.throw
        wanted: Any
        resume: Callable[[Any], Any]
        resume, value = self._next
        while True:
            try:
                wanted = resume(cast(Any, value))
            except StopIteration:
                self._is_over = True
                return
            except BaseException as error:  # noqa: BLE001 -- kept, and raised by run()
                self._end_with(error)
                return
            resume = send
            try:
                kind: Any = type(wanted)
                if kind is CoroutineType:
                    value = await wanted
                elif kind is Effect:
                    value = None
                    if not await self._apply(wanted):
                        return
                elif kind is BackpressureWait:
                    value = await self._await_room(wanted)
                elif kind is not NextBatch:
                    value = await wanted
                elif Request.TERMINATE in self._requests.pending:
                    wanted.close()
                    resume, value = throw, WaitCancelled()
                else:
                    value = await wanted.awaitable
                    if self._is_woken:
                        self._next = (send, value)
                        return
            except Exception as error:  # noqa: BLE001 -- thrown into the story, where it was awaited
                resume, value = throw, error

    async def _advance_on_worker(self) -> None:
        """Advance the story on the worker, a slice at a time: from one thing to be awaited to the next."""
        send, throw = self._generator.send, self._generator.throw
        while True:
            if self._wanted is None:
                self._wanted = await self._run_work_item()
                if self._is_over:
                    return
            wanted = self._wanted
            try:
                if type(wanted) is Effect:
                    self._next, self._wanted = (send, None), None
                    if not await self._apply(wanted):
                        return
                    continue
                if type(wanted) is NextBatch and Request.TERMINATE in self._requests.pending:
                    wanted.close()
                    self._next = (throw, WaitCancelled())
                else:
                    self._next = (
                        send,
                        await (self._await_room(wanted) if type(wanted) is BackpressureWait else wanted),
                    )
            except Exception as error:  # noqa: BLE001 -- thrown into the story, where it was awaited
                self._next = (throw, error)
            self._wanted = None
            if self._is_woken:
                return

    async def _run_work_item(self) -> Any:
        assert self._worker is not None, "found before the loop is driven"  # noqa: S101
        one = WorkItem(self._loop_handle, self._context, *self._next)
        self._work_item = one  # before it begins: its step may ask whether it is here
        self._worker.post(one.run)
        try:
            await one.wait(partial(self._requests.pending.add, Request.RAISE_FAILURE))
        finally:
            if one.done:
                self._work_item = None
                self._wanted = one.result
                error, one.error = one.error, None  # whose traceback holds the slice
                if isinstance(error, StopIteration):
                    self._is_over = True
                elif error is not None:
                    self._end_with(error)
                del error
            else:
                self._is_over = True  # a second Ctrl-C: the user no longer wants to wait for the step
        return one.result

    def _end_with(self, error: BaseException) -> None:
        self._is_over = True
        if isinstance(error, self._loop.cancellations) and not isinstance(error, KeyboardInterrupt | SystemExit):
            self._cancellation = error
        else:
            self._outcome = error
            if not any(error is one for one in self._failures):
                self._failures.append(error)

    async def _apply(self, signal: Effect) -> bool:
        """Do what the story signals. Returns False if it is to be gone on with in another scope, or not at all."""
        began = perf_counter()
        if signal is Effect.YIELD:
            for _ in range(_TURNS):
                await checkpoint()
            watch = self._bus.stopwatch
            watch.lag = max(watch.lag, perf_counter() - began)
            watch.event_loop += perf_counter() - began
        elif signal is Effect.PAUSE:
            await self._until_resumed()
            self._bus.stopwatch.event_loop += perf_counter() - began
        elif signal is Effect.FLUSH:
            deadline = anyio.current_time() + self._grace
            await self._subscribers.finish(deadline)
            await self._services.flush(deadline)
            await self._subscribers.finish(deadline)  # what the services fired meanwhile
            if self._reported is not None:  # it failed at the very last, and all is handled nevertheless
                return self._throw_reported()
        elif signal is Effect.SHIELD:
            if self._deadline is None:
                self._begin_clean_up()
                self._next = (self._generator.send, None)
                return False
        elif signal is Effect.RAISE_FAILURE:
            return self._throw_reported()
        elif signal is Effect.SUSPEND:
            self.is_suspended = self._is_over = True
            return False
        return True

    def _throw_reported(self) -> bool:
        reported, self._reported = self._reported, None
        if reported is None:
            return True
        self._bus.reported = reported
        self._next = (self._generator.throw, reported)
        return False

    def _begin_clean_up(self) -> None:
        if self._deadline is None:
            self._deadline = anyio.current_time() + self._grace

    async def _await_room(self, room: BackpressureWait) -> None:
        began = perf_counter()
        self._room = room
        self._look_at_requests()
        try:
            await room
        finally:
            self._room = None
            self._bus.stopwatch.back_pressure += perf_counter() - began

    async def _until_resumed(self) -> None:
        while True:
            wakeup = self._changed = ThreadSafeEvent(self._loop_handle)
            if self._requests.pending != {Request.PAUSE}:
                return
            await wakeup.wait()

    def _look_at_requests(self) -> None:
        if self._changed is not None:
            self._changed.set()
        if self._room is not None and not self._requests.pending.isdisjoint({Request.TERMINATE, Request.INTERRUPT}):
            self._room.abandon()
        if (
            Request.TERMINATE in self._requests.pending
            and self._loop.waits_for_data
            and self._deadline is None
            and not self._is_over
            and self._loop.source.can_be_woken
        ):
            self._is_woken = True
            self._scope.cancel()


def _call_if_alive(method: "WeakMethod[Callable[[], None]]") -> None:
    if (call := method()) is not None:
        call()

"""Driver: advances one engine's loop on an event loop, and owns every task and thread of the run while it lasts.

The loop is advanced in a task of its own, a child of the task that called `run()`. A native asyncio cancellation or a
Ctrl-C reaches the caller, which waits for its task group; the child is then cancelled by anyio's rules, so that a
shield holds there: a step in flight is waited for, and the clean-up is done to its end.
"""

import math
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from time import perf_counter
from types import CoroutineType
from typing import Any, Final
from weakref import WeakMethod, ref

import anyio
import anyio.abc
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from aengine.bus.bus import Bus
from aengine.bus.inbox import BackpressureWait
from aengine.bus.subscriber import Subscriber
from aengine.data.managed import RunContext
from aengine.drivers.ending import Ending
from aengine.drivers.outcome import Outcome
from aengine.drivers.run_worker import RunWorker
from aengine.drivers.services import ServiceEntry, ServiceTasks
from aengine.drivers.subscriber_tasks import SubscriberTasks
from aengine.errors import HandlerTimeout, StrayCancellation
from aengine.loop.effects import Effect, LoopGenerator, NextBatch, WaitCancelled
from aengine.loop.loop import Loop
from aengine.loop.requests import Request, Requests
from aengine.threads.event_loop import CancelOnceScope, EventLoopHandle, ThreadSafeEvent, TickCounter
from aengine.threads.lag import LagTimer
from aengine.threads.thread_state import ThreadState
from aengine.threads.worker import close_unawaited

_TICKS = 4
"""Turns of the event loop to give away in a row: one is not enough for a socket to be served."""

_ENDING: Final = frozenset({Request.TERMINATE, Request.INTERRUPT})
"""Requests with which the run ends or is suspended."""

_RETURN: Final = object()
"""In place of the result of what was awaited: leave the scope. `_next` says how the loop is to be continued."""

_current: ContextVar["Callable[[], Driver | None]"] = ContextVar("aengine_driver", default=lambda: None)
"""Returns the driver of the run that the caller is part of. A weak reference: what was scheduled in a run's context may
outlive the run, as the timer of a scope does that was left in time, until asyncio comes to it."""


class Driver:
    """One `run()` on an event loop. Made in the task that calls it. To `EventEmitter` it is the `Runner` of the run.

    Attributes:
        is_suspended: whether the loop was interrupted, and is to be continued by another driver.
    """

    can_wait = True  # for room in an inbox: the subscribers' tasks run

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
        self.is_suspended: bool = False
        self._loop_handle = EventLoopHandle()
        self._loop = loop
        self._generator = generator
        self._bus = bus
        self._requests = requests
        self.defer_backpressure: Callable[[list[BackpressureWait]], None] = requests.defer_backpressure
        self._grace = grace
        self._prefetch = prefetch
        self._settings = ThreadState(is_needed=threaded or prefetch > 0)
        self._worker = RunWorker(f"aengine {bus.name}", self._settings, self._loop_handle) if threaded else None
        self._parent = _current.get()()
        self._caller = anyio.get_current_task()
        self._task: int | None = None
        # Where the loop stands: how it is to be continued; or, on the worker, what it wants to have awaited first.
        self._next: tuple[Callable[[Any], Any], Any] = (generator.send, None)
        self._wanted: Any = None
        self._scope = CancelOnceScope(grace)
        self._is_over = False
        self._cancelled = anyio.get_cancelled_exc_class()
        self._has_ended = anyio.Event()  # the task of the run is at its end
        self._is_cancelled = False  # the caller is, or was interrupted by Ctrl-C
        self._is_woken = False  # the wait for the next batch was cancelled, since a request came
        self._deadline: float | None = None  # of the clean-up, once it has begun
        self._outcome = Outcome(bus.name, bus.logger)
        self._reported: BaseException | None = None  # a failure beside the loop that is to be thrown into it
        self._changed: ThreadSafeEvent | None = None  # set when a request comes, while the loop is paused
        self._last_wait: anyio.CancelScope | None = None  # of the task that ends a wait for data that goes on
        self._subscribers = SubscriberTasks(bus, self._loop_handle, grace)
        self._services = services
        self._group: anyio.abc.TaskGroup

    @property
    def services(self) -> ServiceTasks:
        """Those that take part in this run."""
        return self._services

    async def run(self, wanted: Any = None) -> None:
        """Drive the loop to its end or its interruption, and end all that was started for it.

        `wanted` is what the loop has yielded already, where it was begun without an event loop.

        Raises:
            BaseException: what failed the run, as the very object that was raised; several as an ExceptionGroup.
                A cancellation, when the step in flight and the clean-up have ended.
        """
        if wanted is not None:
            self._next = (lambda _: wanted, None)
        self._connect()
        lag = LagTimer.here(self._loop_handle)
        lag.begin()
        watch = self._bus.stopwatch
        watch.event_loop_lag = lambda: lag.seconds
        ending: BaseException | None = None
        try:
            self._services.run_started(self.fail)
            async with anyio.create_task_group() as self._group:
                self._loop_handle.start(self._group, self._main, self._never_started, name=f"aengine {self._bus.name}")
                await self._wait_for_end()
            if self._outcome.cancellation is not None:
                # The cancellation reached the loop's task. If the caller's scope is cancelled too, a fresh one is
                # raised here: a trio Cancelled is only valid inside the scope it was raised for. A native asyncio
                # CancelledError has no scope, and is raised again unchanged.
                await checkpoint_if_cancelled()
        except BaseException as error:  # noqa: BLE001 -- raised below, unless something worse was
            ending = error
        finally:
            lag.end()
            last_lag = lag.seconds
            watch.event_loop_lag = lambda: last_lag
            self._requests.wake_by(None)
            self._loop.detach()
            self._bus.attach(None)
        try:
            self._outcome.raise_all(ending, self._loop.also_raised)
        finally:
            del ending
            self._outcome.clear()
            self._loop.also_raised.clear()
            self._reported = None

    async def _wait_for_end(self) -> None:
        """Wait in the caller's task until that of the run is at its end; have the loop end if this is cancelled.

        On asyncio, anyio cancels a task only where what it waits for has not come yet, looking once in each turn of the
        event loop. So a loop and a prefetcher that wake each other in each turn may never be cancelled; nor is a step
        that catches its cancellation. The caller waits for one thing, which comes last, so that a cancellation always
        reaches it here. Then the loop is to return to this driver before its next step.
        """
        try:
            await self._has_ended.wait()
        except BaseException:
            self._is_cancelled = True
            if self._deadline is None and not self._is_over:
                self._requests.return_to_driver()
                if anyio.current_effective_deadline() == -math.inf:  # by a scope: at each await, as anyio's are
                    self._scope.release()
                else:
                    self._scope.cancel_by(self._group.cancel_scope)
            raise

    def _connect(self) -> None:
        """Tell the loop, its data, the bus and the requests of this run's event loop."""
        loop, handle = self._loop, self._loop_handle
        self._bus.has_company = self._services.are_any
        context = RunContext(
            handle, self.spawn, self._fail_of_data, self._settings, self._prefetch, loop.can_use, self._grace
        )
        if self._worker is None:
            may_go_on: Callable[[], int] | None = _watch_turns(self._caller, handle)
        else:
            # Nothing waits for a turn there. But the worker would go on to the end of the run, though the event loop
            # was closed: a task that is still pending then is just dropped.
            may_go_on = partial(_is_open, handle) if handle.is_of_asyncio else None
        loop.attach(context, self._cancelled, self._explain, may_go_on, self._is_given_up)
        self._bus.attach(handle)
        # Posted even from the loop's own thread: a signal handler interrupts select(), which sleeps again unless woken.
        # A weak reference: the scheduled callback lives one more turn of the event loop, and would keep the engine.
        self._requests.wake_by(partial(handle.post, partial(_call_if_alive, WeakMethod(self._on_request))))
        if not self._requests.pending.isdisjoint(_ENDING):  # requested before this could hear it
            self._bus.end_waits()

    # What the run owns

    def spawn(self, function: Callable[[], Any], on_never_started: Callable[[], Any]) -> None:
        """Start a task of this run. From any thread. If it is cancelled before it begins, the other one is called."""
        self._bus.has_company = True
        self._loop_handle.call(lambda: self._loop_handle.start(self._group, function, on_never_started))

    def start(self, subscriber: Subscriber) -> None:
        """Have a subscriber handle what it is sent, from now to the end of the run. From any thread."""
        self._bus.has_company = True
        start = partial(self._subscribers.start, subscriber)
        # Before its first step, the task of the run starts all there are.
        self._loop_handle.call(lambda: None if self._task is None else start(self._group, self.fail))

    def add_service(self, entry: ServiceEntry) -> None:
        """Have a service take part in this run, from now to its end. From any thread."""
        self._bus.has_company = True
        self._loop_handle.call(lambda: None if self._is_over else self._services.add(entry))

    def remove_service(self, entry: ServiceEntry) -> None:
        """Have a service take no more part in this run. From any thread."""
        self._loop_handle.call(partial(self._services.remove, entry))

    async def flush(self) -> None:
        """Wait until every event dispatched so far has been handled, and the services have done likewise. Cancellable.

        Raises:
            RuntimeError: called by a subscriber's handler or a service, which would wait for itself.
        """
        self._subscribers.refuse_own_flush()
        self._services.refuse_own_flush()
        await self._subscribers.flush()
        await self._services.flush()

    def fail(self, error: BaseException) -> None:
        """Something beside the loop has failed: raise it in the loop, wherever that is. On the event loop's thread."""
        self._outcome.failures.append(error)
        if self._reported is None and self._deadline is None and not self._is_over:
            self._reported = error
            self._requests.return_to_driver()
            self._scope.cancel()

    def _fail_of_data(self, error: BaseException) -> None:
        if isinstance(error, Exception) and self._loop.log_error_of_data(error):
            return
        self._bus.note(error, f"the data ({self._loop.source.name})")
        self.fail(error)

    # The caller: is it part of this run?

    @property
    def wait_blocking(self) -> Callable[[Awaitable[Any]], Any] | None:
        """On the worker, inside this run: what has something awaited in the task of the run, and blocks until it is."""
        worker = self._worker
        return worker.item.call_in_loop if worker is not None and worker.is_here and worker.item is not None else None

    @property
    def is_inside(self) -> bool:
        """Whether the caller is the loop itself, on the event loop's thread or on the worker."""
        is_on_worker = self._worker is not None and self._worker.is_here
        return is_on_worker or (self._task is not None and self.is_task(self._task))

    def is_task(self, task: int) -> bool:
        """Whether the caller is this task of the run's event loop. False on other threads, and outside of tasks."""
        return self._loop_handle.is_here and self._loop_handle.current_task() == task

    @property
    def has_abandoned(self) -> bool:
        """Whether a step is still running, since the user no longer wanted to wait for it."""
        return self._worker is not None and self._worker.item is not None

    @property
    def is_deserted(self) -> bool:
        """Whether the event loop was closed before the end of the run, which nothing continues any more."""
        return self._loop_handle.is_closed

    @property
    def is_at_work(self) -> bool:
        """Whether a step is still running, though the run was given up."""
        return self._worker is not None and self._worker.is_at_work

    def desert(self) -> None:
        """The event loop was closed before the end of the run: have the step in flight be the last one."""
        self._is_over = True
        self._requests.wake_by(None)
        if self.is_at_work:
            self._requests.return_to_driver()
        self._services.desert()

    def leave(self) -> None:
        """Let go of a run that was given up, whose last step has ended."""
        self._loop.detach()
        self._bus.attach(None)
        if self._worker is not None:
            self._worker.leave()
        self._outcome.clear()

    def _is_given_up(self) -> bool:
        return self.is_deserted or (self._is_over and self.is_at_work)

    def worker_for(self, task: int) -> RunWorker | None:
        """Return this run's worker if it is idle because this very task, in an inline handler, runs another engine."""
        return self._worker if self._worker is not None and self._worker.is_idle and task == self._task else None

    # The task of the run

    async def _main(self) -> None:
        self._task = self._loop_handle.current_task()
        _current.set(ref(self))
        for subscriber in self._bus.subscribers:
            self.start(subscriber)
        self._services.start(self._group, self._loop_handle)
        try:
            if self._worker is not None:
                parent = None if self._parent is None else self._parent.worker_for(self._caller.id)
                await self._worker.start(parent, self._loop.source.take_thread())
            await self._drive()
        except self._loop.cancellations as error:
            self._outcome.add_cancellation(error)
        finally:
            self._is_over = True
            if not self.is_deserted:  # else this task is being dropped, and can await nothing any more
                self._subscribers.start_no_more()
                if self._last_wait is not None:
                    self._last_wait.cancel()
                try:
                    await self._end()
                finally:
                    self._has_ended.set()

    async def _end(self) -> None:
        """End what the run has started."""
        ending = Ending(self._loop, self._worker, self._subscribers, self._services, self._outcome, self._explain)
        if ending.must_wait:
            with anyio.CancelScope(shield=True):
                await ending.close(self._deadline or anyio.current_time() + self._grace, is_suspended=self.is_suspended)
        else:
            self._subscribers.end_nowait()
        ending.end_worker(is_suspended=self.is_suspended)

    def _never_started(self) -> None:
        self._has_ended.set()
        self._outcome.add(StrayCancellation(f"the run of engine {self._bus.name!r} was cancelled from outside"))

    # Driving

    async def _drive(self) -> None:
        """Advance the loop until it is over, in one scope, and throw into it what cancels what it awaits.

        The scope is not left before the end of the run, since data may hold open a scope of its own, from where it is
        opened to where it is closed: scopes of one task are left in the order opposite to that in which they were
        entered. Once what has cancelled it is dealt with, it is a shield, which has a deadline in the clean-up.
        """
        advance = self._advance_here if self._worker is None else self._advance_on_worker
        with self._scope:
            while not self._is_over:
                try:
                    await advance()
                except BaseException as error:  # noqa: BLE001 -- thrown into the loop, which lets it out again
                    self._throw(error)

    def _throw(self, error: BaseException) -> None:
        """Have an exception that ended what the loop awaits, a cancellation most often, be raised in the loop."""
        thrown = self._why_cancelled(error) if isinstance(error, self._cancelled) else error
        if thrown is None:
            return
        if isinstance(thrown, self._loop.cancellations):
            self._outcome.mark_cancelled()
        if self._is_over:
            if isinstance(thrown, self._loop.cancellations):
                self._outcome.add_cancellation(thrown)
        elif self._wanted is Effect.SHIELD:  # the loop has had it, and is ending
            self._begin_clean_up()
            self._wanted, self._next = None, (self._generator.send, None)
        else:
            close_unawaited(self._wanted)
            self._wanted = None
            self._next = (self._generator.throw, thrown)

    def _why_cancelled(self, error: BaseException) -> BaseException | None:
        """Return what is to be raised in the loop for a cancellation of what it awaits; None for nothing."""
        is_requested = self._scope.take_requests()
        if self._deadline is not None:
            if self._scope.is_late:
                return HandlerTimeout(
                    f"the clean-up of engine {self._bus.name!r} did not end within its {self._grace} seconds of grace"
                )
            return error if is_requested else self._name_stray(error)
        self._scope.hold()
        was_woken, self._is_woken = self._is_woken, False
        if not was_woken or self._is_cancelled or self._reported is not None:
            return self._explain(error)
        return WaitCancelled() if self._loop.feed.is_awaited else None

    def _explain(self, error: BaseException) -> BaseException:
        """Return what the run fails with, for an error: the reason of a cancellation, where that is not the run's.

        Also called on the worker.
        """
        # The caller's task may be cancelled, and have not taken its next step, in which it sees that.
        if not isinstance(error, self._cancelled) or self._is_cancelled or self._caller.has_pending_cancellation():
            return error
        return self._take_reported() or self._name_stray(error)

    def _explain_in_call(self, error: BaseException) -> BaseException:
        """Return what is to be raised on the worker for an error of what it has had awaited.

        A failure beside the loop is raised by the loop, between steps: here a step could catch it.
        """
        return error if self._reported is not None else self._explain(error)

    def _name_stray(self, error: BaseException) -> StrayCancellation:
        stray = StrayCancellation(
            f"something that engine {self._bus.name!r} awaited was cancelled, but the run was not: its cause says where"
        )
        stray.__cause__ = error
        return stray

    # The hot path on the event loop. What is awaited most, a step or handler and the next batch, is awaited in place: a
    # coroutine between would cost a tenth of the iteration.
    async def _advance_here(self) -> None:
        """Advance the loop on the event loop's own thread, until it is over or is to leave the scope."""
        pending = self._requests.pending
        send: Callable[[Any], Any] = self._generator.send
        throw: Callable[[Any], Any] = self._generator.throw
        (resume, value), self._next = self._next, (send, None)  # an error that stays there would hold its traceback
        while True:
            try:
                wanted: Any = resume(value)
            except StopIteration:
                self._is_over = True
                return
            except BaseException as error:  # noqa: BLE001 -- kept, and raised by run()
                value = None  # an error that was thrown in: its traceback holds this frame, and so the engine
                self._end_with(error)
                return
            resume = send
            try:
                kind: Any = type(wanted)  # of no type to narrow by
                if kind is CoroutineType:
                    value = await wanted
                elif kind is NextBatch and Request.TERMINATE not in pending:
                    value = await wanted.awaitable
                    if self._is_woken:  # the batch came as the scope was cancelled
                        self._is_woken = False
                        self._scope.hold()
                elif (value := await self._wait_for(wanted)) is _RETURN:
                    return
            except Exception as error:  # noqa: BLE001 -- thrown into the loop, where it was awaited
                resume, value = throw, error
                if self._is_woken:
                    self._is_woken = False
                    self._scope.hold()

    async def _advance_on_worker(self) -> None:
        """Advance the loop on the worker, a work item at a time: from one thing to be awaited to the next."""
        send, throw = self._generator.send, self._generator.throw
        while True:
            if self._wanted is None:
                await self._run_work_item()
                if self._is_over:
                    return
                if self._is_woken and not self._loop.feed.is_awaited:  # the worker has had the request, and has gone on
                    self._is_woken = False
                    self._scope.hold()
            try:
                value = await self._wait_for(self._wanted)
            except Exception as error:  # noqa: BLE001 -- thrown into the loop, where it was awaited
                self._next = (throw, error)
            else:
                if value is _RETURN:
                    self._wanted = None
                    return
                self._next = (send, value)
                del value
            self._wanted = None
            if self._is_woken:  # the batch came as the scope was cancelled
                self._is_woken = False
                self._scope.hold()

    async def _run_work_item(self) -> None:
        """Continue the loop on the worker until it wants something awaited, `_wanted`, or is over."""
        worker = self._worker
        assert worker is not None, "started before"  # noqa: S101
        item = worker.submit(*self._next)
        self._next = (self._generator.send, None)  # an error that stays there would hold its traceback
        try:
            # A cancellation must not wait for the whole loop: it is asked to return to this driver after its step.
            await item.wait(self._requests.return_to_driver, self._explain_in_call)
        finally:
            if item.done:
                worker.finish()
                self._wanted = item.result
                error, item.error = item.error, None  # whose traceback holds the item
                if isinstance(error, StopIteration):
                    self._is_over = True
                elif error is not None:
                    self._end_with(error)
                del error
            else:
                self._is_over = True  # a second Ctrl-C: the user no longer wants to wait for the step

    def _end_with(self, error: BaseException) -> None:
        self._is_over = True
        self._outcome.end_loop_with(error, is_cancellation=isinstance(error, self._loop.cancellations))

    async def _wait_for(self, wanted: Any) -> Any:
        """Await what the loop has yielded, or have its effect. Returns the result, or `_RETURN` to leave the scope."""
        kind = type(wanted)
        if kind is Effect:
            return None if await self._apply(wanted) else _RETURN
        if kind is BackpressureWait:
            return await self._wait_for_room(wanted)
        if kind is not NextBatch:
            return await wanted
        if Request.TERMINATE in self._requests.pending:
            wanted.close()
            raise WaitCancelled
        return await wanted.awaitable

    async def _apply(self, effect: Effect) -> bool:
        """Have an effect that the loop asks for. Returns False if it is to be continued in another scope, or never."""
        began = perf_counter()
        if effect is Effect.YIELD:
            for _ in range(_TICKS):
                await checkpoint()
            watch = self._bus.stopwatch
            watch.lag = max(watch.lag, perf_counter() - began)
            watch.event_loop += perf_counter() - began
        elif effect is Effect.PAUSE:
            await self._until_resumed()
            self._bus.stopwatch.event_loop += perf_counter() - began
        elif effect is Effect.FLUSH:
            deadline = anyio.current_time() + self._grace
            await self._subscribers.finish(deadline)
            await self._services.flush(deadline)
            await self._subscribers.finish(deadline)  # what the services fired meanwhile
            return self._reported is None or self._throw_reported()  # which failed at the very last
        elif effect is Effect.SHIELD:
            self._begin_clean_up()
        elif effect is Effect.RAISE_FAILURE:
            if self._is_cancelled and self._deadline is None:
                self._scope.release()
                await checkpoint_if_cancelled()
            return self._throw_reported()
        elif effect is Effect.SUSPEND:
            self.is_suspended = self._is_over = True
            return False
        return True

    def _throw_reported(self) -> bool:
        reported = self._take_reported()
        if reported is None:
            return True
        self._scope.hold()  # which may have been cancelled for it
        self._next = (self._generator.throw, reported)
        return False

    def _take_reported(self) -> BaseException | None:
        # The bus is told, so that no further note is made on it: it was noted where it was raised.
        reported, self._reported = self._reported, None
        self._bus.report(reported)
        return reported

    def _begin_clean_up(self) -> None:
        if self._deadline is None:
            self._deadline = anyio.current_time() + self._grace
            self._scope.hold(self._deadline)

    async def _wait_for_room(self, wait: BackpressureWait) -> None:
        began = perf_counter()
        try:
            await wait
        finally:
            self._bus.stopwatch.back_pressure += perf_counter() - began

    async def _until_resumed(self) -> None:
        while True:
            changed = self._changed = ThreadSafeEvent(self._loop_handle)
            if self._requests.pending != {Request.PAUSE}:
                return
            await changed.wait()

    def _on_request(self) -> None:
        """A request has come: end the wait that keeps the loop from serving it. On the event loop's thread."""
        pending = self._requests.pending
        if self._changed is not None:
            self._changed.set()
        if not pending.isdisjoint(_ENDING):
            self._bus.end_waits()
        if Request.TERMINATE in pending and self._waits_for_data:
            if self._loop.source.can_be_woken:
                self._wake()
            elif self._last_wait is None:
                self._last_wait = anyio.CancelScope(shield=True)
                self.spawn(self._end_last_wait, lambda: None)

    @property
    def _waits_for_data(self) -> bool:
        return self._loop.feed.is_awaited and self._deadline is None and not self._is_over

    def _wake(self) -> None:
        """Cancel the wait for the next batch."""
        self._is_woken = True
        self._scope.cancel()

    async def _end_last_wait(self) -> None:
        """Cancel the wait for a batch that does not come in half of the grace: the other half is for the clean-up.

        A task of its own. Not at once, since it ends an async generator of the user's, which may be iterated further.
        """
        assert self._last_wait is not None, "made with this task"  # noqa: S101
        with self._last_wait:
            await anyio.sleep(self._grace / 2)
            if self._waits_for_data:
                self._bus.logger.warning(
                    "the data (%s) gave no batch in the %s seconds after terminate(): the wait is cancelled, which"
                    " ends an async generator",
                    self._loop.source.name,
                    self._grace / 2,
                )
                self._wake()


def _is_open(handle: EventLoopHandle) -> bool:
    return not handle.is_closed


def _watch_turns(caller: "anyio.TaskInfo", loop_handle: EventLoopHandle) -> Callable[[], int]:
    """Return what says how many runs share the event loop, if others have had a turn since it was called before.

    Else 0; also where the caller is cancelled, and needs a turn to see that.
    """
    has_ticked, lag = TickCounter.here().watch(), LagTimer.here(loop_handle)
    return lambda: lag.runs if has_ticked() and not caller.has_pending_cancellation() else 0


def _call_if_alive(method: "WeakMethod[Callable[[], None]]") -> None:
    if (call := method()) is not None:
        call()

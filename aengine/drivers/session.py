"""Session: the runs of one engine. The one that is under way or interrupted, and where the next one goes on."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter, sleep
from typing import Any

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from aengine.arguments import check_choice, check_whole
from aengine.bus.emitter import EventEmitter, RemovableEventHandle
from aengine.data.adapt import Adapted, adapt
from aengine.data.prefetch import Fetched
from aengine.data.source import Source
from aengine.drivers.driver import Driver
from aengine.drivers.records import iteration_of, statistics_of
from aengine.drivers.services import Service, ServiceEntry, ServiceTasks
from aengine.drivers.sync import DONE, SUSPENDED, BlockingRunner, runs_in_event_loop
from aengine.errors import EngineBusy, raise_failures
from aengine.events import Event
from aengine.loop.agreement import Agreement
from aengine.loop.effects import LoopGenerator
from aengine.loop.loop import Loop
from aengine.loop.progress import Limits, Progress, begin, refuse_other_arguments
from aengine.loop.requests import Phase, Request, Requests
from aengine.loop.state_dict import from_state_dict, to_state_dict
from aengine.state import Randomness, State, StopReason, describe_error, set_dataloader
from aengine.statistics import EngineStatistics
from aengine.threads.thread_state import bound_to_this_thread
from aengine.threads.worker import close_unawaited

_ONE_AT_A_TIME = "one engine runs one loop at a time. Await the run under way, or make another engine"

_LOOK = 0.005
"""Seconds from one look to the next whether a step has ended that nothing waits for."""


class Session:
    """Begins, drives and ends the runs of one engine.

    It holds no engine, since the engine holds it, but while a run is under way or interrupted: the loop does.

    Attributes:
        step: the engine's step.
        threaded: whether a plain step runs on a worker thread, where nothing of torch is bound to the caller's.
        services: those that take part in each run.
        went_back_to: what was completed where a `state_dict` was taken, if the run under way goes on from one.
        body_task: the task of a body of `iterate()`, while the loop waits for it.
    """

    def __init__(
        self,
        step: Callable[[Any, Any], Any],
        emitter: EventEmitter,
        requests: Requests,
        *,
        is_async: bool,
        threaded: bool,
        grace: float,
    ) -> None:
        self._is_running = False
        self._call = 0  # the number of the run that is under way, or was the last one
        self.services: tuple[ServiceEntry, ...] = ()
        self.went_back_to: Progress | None = None
        self.body_task: int | None = None
        self.step = step
        self._emitter = emitter
        self._bus = emitter.bus
        self._requests = requests
        self._is_async = is_async
        self.threaded = threaded
        self._grace = grace
        self._driver: Driver | None = None
        self._left: Driver | None = None  # of a run that was given up, and whose step may still be at work
        # Both are kept while a run is interrupted: the next one goes on with this very generator.
        self._loop: Loop | None = None
        self._generator: LoopGenerator | None = None
        self._progress = Progress()
        self._unread: tuple[Any, list[Fetched]] | None = None  # the data of the last run, and what it fetched too much
        self._randomness: Randomness | None = None
        self._rng_to_restore: Any = None  # the random states of a `state_dict`, until the run that goes on from it

    @property
    def _state(self) -> State:
        return self._bus.state

    def replace_state(self, state: Any) -> None:
        """Have another state in place of this one: the next run begins where it stands."""
        self.refuse_running("assign its state before run()")
        if not isinstance(state, State):
            raise TypeError(f"engine.state is an aengine.State, such as State(); got {state!r}")
        self._give_up()
        self._progress = state.last_progress or Progress()
        self._emitter.replace_state(state)

    async def run(self, engine: Any, data: Any, limits: Limits, prefetch: int) -> None:
        """Run the loop on the event loop that runs here, as `Engine.run`."""
        deadline = perf_counter() + self._grace
        while self._is_left_at_work and perf_counter() < deadline:  # noqa: ASYNC110 -- its event loop may be gone
            await anyio.sleep(_LOOK)
        with self._under_way():
            await checkpoint_if_cancelled()
            check_whole(prefetch, "prefetch=", minimum=0, of="batches to pull ahead")
            await self._run(engine, adapt(data), limits, prefetch)

    async def _run(self, engine: Any, adapted: Adapted, limits: Limits, prefetch: int) -> None:
        if (bound := bound_to_this_thread()) is not None:
            self._stay_on_thread(bound, prefetch)
        loop, generator = self._begin(engine, adapted, limits)
        await self._drive(engine, loop, generator, prefetch, threaded=self.threaded and bound is None)

    def run_sync(self, engine: Any, data: Any, limits: Limits, prefetch: int) -> None:
        """Run the loop without an event loop until something must be awaited, as `Engine.run_sync`."""
        deadline = perf_counter() + self._grace
        while self._is_left_at_work and perf_counter() < deadline:
            sleep(_LOOK)
        with self._under_way():
            if runs_in_event_loop():
                raise RuntimeError("run_sync() would block the event loop that runs here: write  await engine.run(...)")
            check_whole(prefetch, "prefetch=", minimum=0, of="batches to pull ahead")
            adapted = adapt(data)
            if self._is_async or prefetch or self.services or self._must_await or adapted.is_async:
                anyio.run(self._run, engine, adapted, limits, prefetch)
            else:
                self._run_blocking(engine, adapted, limits)

    def _run_blocking(self, engine: Any, adapted: Adapted, limits: Limits) -> None:
        loop, generator = self._begin(engine, adapted, limits)
        runner = BlockingRunner(generator, self._requests)
        self._emitter.attach(runner)
        failures: list[BaseException] = []
        try:
            wanted = runner.run(failures)
        finally:
            self._emitter.attach(None)
        if wanted is not DONE and wanted is not SUSPENDED:
            try:
                anyio.run(partial(self._drive, engine, loop, generator, 0, wanted))
            finally:
                close_unawaited(wanted)  # where the driver did not come to it
        else:
            self._end(loop, generator, is_suspended=wanted is SUSPENDED)
            try:
                raise_failures(self._bus.name, [*failures, *loop.also_raised])
            finally:
                loop.also_raised.clear()
                failures.clear()  # an error's traceback holds this frame: no cycle may hold the engine

    @contextmanager
    def _under_way(self) -> Generator[None]:
        """Have a call of `run()` be under way. However it ends, the state says how, and then the streams end."""
        self.refuse_running(_ONE_AT_A_TIME)  # which ends nothing
        state, call = self._state, self._call + 1
        try:
            with self.busy():
                state.stop_reason = state.error = None
                self._bus.begin_run()
                try:
                    yield
                except BaseException as error:
                    if call == self._call:
                        self._record_error(error)
                    raise
        finally:
            if call == self._call:  # else its event loop was closed, and it was given up
                self._bus.end_run(is_suspended=state.stop_reason is StopReason.INTERRUPTED)

    def _record_error(self, error: BaseException) -> None:
        """Have the state say what `run()` raises. Why it ended the loop has said, unless it had not begun."""
        state = self._state
        is_failure = isinstance(error, Exception | BaseExceptionGroup)
        if state.stop_reason is None:
            state.stop_reason = StopReason.FAILED if is_failure else StopReason.CANCELLED
        # A step's own BaseException has failed the run, too. What else is none of these is a cancellation.
        if is_failure or isinstance(error, KeyboardInterrupt | SystemExit) or state.stop_reason is StopReason.FAILED:
            state.error = describe_error(error)

    def _stay_on_thread(self, bound: str, prefetch: int) -> None:
        """Say that something of torch, which `bound` names, is in force on this thread, and must see step and data."""
        if self.threaded or prefetch:
            self._bus.logger.warning(
                "%s: in force on the thread that runs engine %r, and on no other. So the step and plain data run on"
                " this one, the event loop's, and no plain data is pulled ahead. thread=False says so; what is entered"
                " in the step leaves it on the worker",
                bound,
                self._bus.name,
            )

    @property
    def _must_await(self) -> bool:
        has_kept_thread = self._loop is not None and self._loop.source.has_kept_thread
        return has_kept_thread or self._bus.must_await

    @contextmanager
    def busy(self) -> Generator[None]:
        """Have the engine be running; another run is refused meanwhile."""
        self.refuse_running(_ONE_AT_A_TIME)
        self._is_running = True
        call = self._call = self._call + 1
        try:
            yield
        finally:
            if call == self._call:  # else its event loop was closed, and it was given up
                self._end_call()

    def _end_call(self) -> None:
        self._is_running = False
        if left := self._requests.end():  # cancelled before its first event, or given up by a second Ctrl-C
            self._bus.logger.warning(
                "the run of engine %r ended before it could fire what fire_event_soon() had accepted: %s",
                self._bus.name,
                ", ".join(left),
            )

    @property
    def is_running(self) -> bool:
        """Whether a run is under way."""
        self._give_up_deserted()
        return self._is_running

    @property
    def requests(self) -> Requests:
        """Where the run under way is requested to end."""
        self._give_up_deserted()
        return self._requests

    def refuse_running(self, advice: str) -> None:
        """Raise EngineBusy while a run is under way, or the step of one that was given up is still at work."""
        if self.is_running:
            raise EngineBusy(f"engine {self._bus.name!r} is running: {advice}")
        if self._is_left_at_work:
            raise EngineBusy(
                f"engine {self._bus.name!r} still makes a step of a run that was given up, on a thread that nothing can"
                " stop: wait until it has returned, or make another engine"
            )
        self._end_left()

    # A run that was given up: by a second Ctrl-C while a step was at work, or since its event loop was closed. In the
    # latter case nothing says so: the tasks of the run are still pending, and are never continued.

    def _give_up_deserted(self) -> None:
        """If the event loop of the run under way was closed, give the run up. From any thread."""
        driver = self._driver
        if driver is None or not driver.is_deserted:
            return
        self._driver, self._left = None, driver
        self._call += 1  # so that what is left of its tasks, if it is ever dropped, changes nothing here
        self._bus.logger.warning(
            "the event loop of engine %r was closed during its run, which is given up where it is", self._bus.name
        )
        if self._state.stop_reason is None:
            self._state.stop_reason = StopReason.CANCELLED
        self._emitter.attach(None)
        try:
            driver.desert()
        finally:
            self._end_call()
            self._bus.end_run(is_suspended=False)

    @property
    def _is_left_at_work(self) -> bool:
        self._give_up_deserted()
        return self._left is not None and self._left.is_at_work

    def _end_left(self) -> None:
        """Go on, at the next run, where one ended that was given up."""
        left, self._left = self._left, None
        if left is not None and self._loop is not None and self._generator is not None:
            self._requests.cancel(Request.RAISE_FAILURE)  # with which its step was to be the last
            source = self._loop.source
            left.leave()
            self._end(self._loop, self._generator, is_suspended=False)
            source.close()

    def _begin(self, engine: Any, adapted: Adapted, limits: Limits) -> tuple[Loop, LoopGenerator]:
        data = adapted.data
        state, randomness = self._state, self._randomness
        if state.max_epochs is None and state.max_iters is None:
            self._give_up()
        self.went_back_to = None
        if self._loop is not None and self._generator is not None:
            refuse_other_arguments(state, self._bus.name, data, limits)
            self._loop.engine = engine
            self._requests.go_on()
            self._bus.start_clock()
            return self._loop, self._generator
        progress = begin(state, self._progress, adapted, *limits)
        self.went_back_to = progress if self._progress.is_loaded else None
        unread = self._unread[1] if self._unread is not None and self._unread[0] is data else ()
        source = Source(
            adapted,
            self._bus.logger,
            unread=unread,
            completed=progress.iteration,
            may_have_other_length=limits[2] is not None,
        )
        if progress.position is not None:
            source.resume_at(progress.position, progress.iteration)
        set_dataloader(state, data)
        self._requests.begin()
        self._bus.reset()
        rng, self._rng_to_restore = self._rng_to_restore, None
        loop = self._loop = Loop(
            engine,
            self.step,
            source,
            progress,
            bus=self._bus,
            requests=self._requests,
            restore_rng=None if randomness is None or rng is None else partial(randomness.restore, rng),
        )
        generator = self._generator = loop.run()
        return loop, generator

    def _give_up(self) -> None:
        """The next run begins anew, or elsewhere: an interrupted one will not be continued."""
        if self._loop is not None and self._generator is not None:
            self._generator.close()
            self._keep_unread(self._loop.source)
        self._loop = self._generator = None

    async def _drive(
        self,
        engine: Any,
        loop: Loop,
        generator: LoopGenerator,
        prefetch: int,
        wanted: Any = None,
        *,
        threaded: bool = False,
    ) -> None:
        services = ServiceTasks(engine, self.services, self._grace)
        driver = self._driver = Driver(
            loop,
            generator,
            self._bus,
            self._requests,
            services,
            threaded=threaded,
            grace=self._grace,
            prefetch=prefetch,
        )
        self._emitter.attach(driver)
        failure: BaseException | None = None
        try:
            await driver.run(wanted)
        except BaseException as error:
            failure = error
            raise
        finally:
            if self._driver is driver:  # else its event loop was closed, and it was given up
                self._driver = None
                self._emitter.attach(None)
                try:
                    services.close(failure)
                finally:  # Ctrl-C may have come in it
                    del failure  # whose traceback holds this frame
                    if driver.has_abandoned:  # the step still runs, and the generator with it
                        self._left = driver
                    else:
                        self._end(loop, generator, is_suspended=driver.is_suspended)

    def _end(self, loop: Loop, generator: LoopGenerator, *, is_suspended: bool) -> None:
        self._bus.stopwatch.stop()
        known = self._state.last_progress  # where the run has ended by itself
        self._progress = known if known is not None and not is_suspended else loop.progress()
        if is_suspended:
            loop.engine = None  # which would otherwise be held by its own generator, until the garbage collector runs
            return
        self._state.last_progress = self._progress
        self._loop = self._generator = None
        self._keep_unread(loop.source)
        generator.close()

    def _keep_unread(self, source: Source) -> None:
        """Keep what was fetched and not stepped on, for the next run over the same data."""
        position = source.position
        unread = [] if position.can_return else list(position.unread)  # resuming will fetch it again if it can return
        self._unread = (source.data, unread) if unread else None

    # While it lasts

    def data_in_use(self) -> list[Any]:
        """Return what batches come from now: what is iterated, which data may have made, and the data itself."""
        opened = [] if self._loop is None else [self._loop.source.opened]
        return [*opened, self._state.dataloader]

    def set_data(self, data: Any) -> None:
        """Have the next batch come from other data, as `Engine.set_data`."""
        adapted = adapt(data)
        if self._loop is None:
            raise RuntimeError(
                "set_data() changes the data of a run under way, and there is none: pass the data to run()"
            )
        self._loop.set_data(Source(adapted, self._bus.logger))

    def add_service(self, service: Service, on_error: str, name: str | None) -> RemovableEventHandle:
        """Add a service, as `Engine.add_service`; where a run is under way, it takes part from now on."""
        if not isinstance(service, Service):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a service derives from aengine.Service, got {service!r}")
        check_choice(on_error, "on_error=", ("raise", "log"))
        if any(entry.service is service for entry in self.services):
            raise ValueError(f"engine {self._bus.name!r} has this service already: {service!r}")
        entry = ServiceEntry(service, name or type(service).__qualname__, raises=on_error == "raise")
        self.services += (entry,)
        if self._driver is not None:
            self._driver.add_service(entry)
        elif self._emitter.runner is not None:  # driven without an event loop, until now
            self._requests.return_to_driver()
        return RemovableEventHandle(partial(self._remove_service, entry))

    def _remove_service(self, entry: ServiceEntry) -> None:
        self.services = tuple(one for one in self.services if one is not entry)
        if self._driver is not None:
            self._driver.remove_service(entry)

    @property
    def must_prepare_commit(self) -> bool:
        """Whether a service of the run under way is to be awaited before a checkpoint of it is committed."""
        return self._driver is not None and self._driver.services.must_prepare_commit

    async def before_commit(self) -> None:
        """Have the services of the run under way make safe what belongs to the steps so far. Cancellable."""
        if self._driver is not None:
            await self._driver.services.before_commit()

    async def wait_completed(self, iterations: int) -> int:
        """Wait until so many iterations are completed, as `Engine.wait_completed`."""
        # What is less than 0 has been reached, as by data that keeps so many batches ahead of the steps.
        check_whole(max(iterations, 0) if type(iterations) is int else iterations, "iterations", minimum=0)
        if self._state.iterations_completed < iterations and self.is_inside:
            raise RuntimeError(
                f"wait_completed({iterations}) waits for the loop, which waits for it here: call it from a subscriber,"
                " a service, data with prefetch=, or a task of your own"
            )
        return await self._bus.completions.wait(self._bus, iterations, self._completes_no_more)

    def _completes_no_more(self) -> bool:
        return self.is_running and self._requests.phase is Phase.IDLE

    def agree_by(self, agreement: Agreement | None) -> None:
        """Have the runs of this engine do what this agrees on with those of other processes; with None, no more."""
        self.refuse_running("what it agrees by is set before run()")
        self._requests.agreement = agreement

    def wait_for_body(self, task: int | None) -> None:
        """The loop waits for this task, with the body of an `iterate()`; None where it waits no longer."""
        self.body_task = task

    @property
    def is_inside(self) -> bool:
        """Whether the loop waits for the caller: a step, an inline handler, or the body of an `iterate()`."""
        driver = self._driver
        return driver is not None and (
            driver.is_inside or (self.body_task is not None and driver.is_task(self.body_task))
        )

    # Saving

    def use_randomness(self, randomness: Randomness | None) -> None:
        """Save and restore the states of random number generators with the engine, by this; None for not."""
        self._randomness = randomness

    def state_dict(self, engine: Any) -> dict[str, Any]:
        """Return where the engine stands, as `Engine.state_dict`."""
        progress = self._progress if self._loop is None else self._loop.progress()
        saved = to_state_dict(progress, self._state, self._bus.own_counts, engine.state_dict_user_keys)
        if self._randomness is not None:
            saved["random"] = self._randomness.capture()
        return saved

    def load_state_dict(self, engine: Any, state_dict: Mapping[str, Any], *, restart_if_done: bool) -> None:
        """Go on at the next run where a `state_dict` was taken, as `Engine.load_state_dict`."""
        self.refuse_running("load its state before run()")
        progress = from_state_dict(state_dict, self._state, engine.state_dict_user_keys)
        self._progress = replace(progress, is_loaded=False) if restart_if_done else progress
        self._give_up()
        self._rng_to_restore = state_dict.get("random")
        self._bus.restore_own_counts(state_dict.get("fired", {}))

    # Looking

    def statistics(self) -> EngineStatistics:
        """Return where the time goes, as `Engine.statistics`."""
        services = tuple(entry.statistics() for entry in self.services)
        return statistics_of(self._bus, services, is_running=self.is_running)

    def record_iteration(self) -> Event:
        """Return the event of the iteration that was completed last, as a subscriber would get it."""
        return iteration_of(self._bus)

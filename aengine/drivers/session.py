"""Session: the runs of one engine. The one that is under way or interrupted, and where the next one goes on."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, TypeAlias

import anyio

from aengine.arguments import check_choice, check_whole
from aengine.bus.emitter import EventEmitter, RemovableEventHandle
from aengine.data.adapt import adapt
from aengine.data.prefetch import Fetched
from aengine.data.source import Source
from aengine.drivers.driver import Driver
from aengine.drivers.services import Service, ServiceEntry, ServiceTasks
from aengine.drivers.sync import DONE, SUSPENDED, BlockingRunner, runs_in_event_loop
from aengine.errors import EngineBusy, raise_failures
from aengine.events import Event
from aengine.loop.effects import LoopGenerator
from aengine.loop.loop import Loop
from aengine.loop.progress import Progress, begin
from aengine.loop.requests import Requests
from aengine.loop.state_dict import from_state_dict, to_state_dict
from aengine.statistics import EngineStatistics
from aengine.threads.worker import close_unawaited

Limits: TypeAlias = tuple[int | None, int | None, int | None]
"""max_epochs, max_iters, epoch_length, as they were given to `run()`."""


class Session:
    """Begins, drives and ends the runs of one engine.

    It holds no engine, since the engine holds it, but while a run is under way or interrupted: the loop does.

    Attributes:
        step: the engine's step.
        threaded: whether a plain step runs on a worker thread.
        is_running: whether a run is under way.
        services: those that take part in each run.
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
        self.is_running = False
        self.services: tuple[ServiceEntry, ...] = ()
        self.body_task: int | None = None
        self.step = step
        self._emitter = emitter
        self._bus = emitter.bus
        self._state = emitter.bus.state
        self._requests = requests
        self._is_async = is_async
        self.threaded = threaded
        self._grace = grace
        self._driver: Driver | None = None
        # Both are kept while a run is interrupted: the next one goes on with this very generator.
        self._loop: Loop | None = None
        self._generator: LoopGenerator | None = None
        self._progress = Progress()
        self._unread: tuple[Any, list[Fetched]] | None = None  # the data of the last run, and what it fetched too much
        self._rng_to_restore: Any = None  # the random states of a `state_dict`, until the run that goes on from it

    async def run(self, engine: Any, data: Any, limits: Limits, prefetch: int) -> None:
        """Run the loop on the event loop that runs here, as `Engine.run`."""
        with self.busy():
            check_whole(prefetch, "prefetch=", minimum=0, of="batches to pull ahead")
            loop, generator = self._begin(engine, data, limits)
            await self._drive(engine, loop, generator, prefetch)

    def run_sync(self, engine: Any, data: Any, limits: Limits, prefetch: int) -> None:
        """Run the loop without an event loop until something must be awaited, as `Engine.run_sync`."""
        if runs_in_event_loop():
            raise RuntimeError("run_sync() would block the event loop that runs here: write  await engine.run(...)")
        check_whole(prefetch, "prefetch=", minimum=0, of="batches to pull ahead")
        if self._is_async or prefetch or self.services or self._bus.must_await or adapt(data).is_async:
            anyio.run(self.run, engine, data, limits, prefetch)
            return
        with self.busy():
            loop, generator = self._begin(engine, data, limits)
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
                    failures.clear()  # an error's traceback holds this frame: no cycle may hold the engine

    @contextmanager
    def busy(self) -> Generator[None]:
        """Have the engine be running; another run is refused meanwhile."""
        self.refuse_running("one engine runs one loop at a time. Await the run under way, or make another engine")
        self.is_running = True
        try:
            yield
        finally:
            self.is_running = False
            self._requests.end()

    def refuse_running(self, advice: str) -> None:
        """Raise EngineBusy while a run is under way."""
        if self.is_running:
            raise EngineBusy(f"engine {self._bus.name!r} is running: {advice}")

    def _begin(self, engine: Any, data: Any, limits: Limits) -> tuple[Loop, LoopGenerator]:
        adapted = adapt(data)
        state, randomness = self._state, engine.randomness
        if state.max_epochs is None and state.max_iters is None:
            self._give_up()
        if self._loop is not None and self._generator is not None:
            self._refuse_other_arguments(data, limits)
            state.stop_reason = None
            self._requests.go_on()
            self._bus.start_clock()
            return self._loop, self._generator
        progress = begin(state, self._progress, adapted, *limits)
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
        state.dataloader = data
        state.stop_reason = None
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

    def _refuse_other_arguments(self, data: Any, limits: Limits) -> None:
        state = self._state
        given = zip(("max_epochs", "max_iters", "epoch_length"), limits, strict=True)
        other = [
            f"{name}={value} (it has {getattr(state, name)})"
            for name, value in given
            if value not in (None, getattr(state, name))
        ]
        if data is not None and data is not state.dataloader:
            other.append("other data")
        if other:
            raise ValueError(
                f"engine {self._bus.name!r} was interrupted and goes on where it was, so it cannot take"
                f" {', '.join(other)}: call run() with what it was called with, or without arguments; set_data()"
                " changes the data"
            )

    async def _drive(
        self, engine: Any, loop: Loop, generator: LoopGenerator, prefetch: int, wanted: Any = None
    ) -> None:
        services = ServiceTasks(engine, self.services, self._grace)
        driver = self._driver = Driver(
            loop,
            generator,
            self._bus,
            self._requests,
            services,
            threaded=self.threaded and wanted is None,
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
            self._driver = None
            self._emitter.attach(None)
            try:
                services.close(failure)
            finally:  # Ctrl-C may have come in it
                del failure  # whose traceback holds this frame
                if not driver.has_abandoned:  # else the step still runs, and the generator with it
                    self._end(loop, generator, is_suspended=driver.is_suspended)

    def _end(self, loop: Loop, generator: LoopGenerator, *, is_suspended: bool) -> None:
        self._bus.stopwatch.stop()
        known = self._state.last_progress  # where the run has ended by itself
        self._progress = known if known is not None and not is_suspended else loop.progress()
        if is_suspended:
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

    def state_dict(self, engine: Any) -> dict[str, Any]:
        """Return where the engine stands, as `Engine.state_dict`."""
        progress = self._progress if self._loop is None else self._loop.progress()
        saved = to_state_dict(progress, self._state, self._bus.own_counts, engine.state_dict_user_keys)
        if engine.randomness is not None:
            saved["random"] = engine.randomness.capture()
        return saved

    def load_state_dict(self, engine: Any, state_dict: Mapping[str, Any], *, begins_anew: bool) -> None:
        """Go on at the next run where a `state_dict` was taken, as `Engine.load_state_dict`."""
        self.refuse_running("load its state before run()")
        progress = from_state_dict(state_dict, self._state, engine.state_dict_user_keys)
        self._progress = replace(progress, is_loaded=False) if begins_anew else progress
        self._give_up()
        self._rng_to_restore = state_dict.get("random")
        self._bus.restore_own_counts(state_dict.get("fired", {}))

    # Looking

    def statistics(self) -> EngineStatistics:
        """Return where the time goes, as `Engine.statistics`."""
        bus, watch = self._bus, self._bus.stopwatch
        handlers: dict[str, float] = {}
        of_fired: dict[str, float] = {}
        for topic in bus.topics:
            seconds = handlers if topic.is_fired_by_loop else of_fired
            for handler in topic.inline:
                seconds[handler.name] = seconds.get(handler.name, 0.0) + handler.seconds
        return EngineStatistics(
            name=bus.name,
            running=self.is_running,
            epoch=self._state.epoch,
            iteration=self._state.iteration,
            total=watch.total,
            data=watch.data,
            step=watch.step,
            handlers=handlers,
            handlers_of_fired=of_fired,
            back_pressure=watch.back_pressure,
            event_loop=watch.event_loop,
            lag=watch.lag,
            listeners=tuple(one.statistics() for one in (*bus.subscribers, *bus.streams)),
            services=tuple(entry.statistics() for entry in self.services),
        )

    def record_iteration(self) -> Event:
        """Return the event of the iteration that was completed last, as a subscriber would get it."""
        state, bus = self._state, self._bus
        return Event(
            "ITERATION_COMPLETED",
            bus.name,
            bus.sequence,
            state.iteration,
            state.epoch,
            state.epoch_length,
            state.max_epochs,
            state.output,
            dict(state.metrics),
            perf_counter(),
            None,
        )

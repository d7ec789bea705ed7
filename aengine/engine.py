"""Engine: the face. What users construct, listen to, run and stop."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, Generic, TypeVar

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from aengine.arguments import check_seconds, check_whole
from aengine.bus.bus import Bus
from aengine.bus.dispatch import close_unawaited
from aengine.bus.emitter import EventEmitter
from aengine.callables import check_callable, is_async_callable, name_of
from aengine.data.adapt import adapt
from aengine.data.prefetch import Fetched
from aengine.data.source import Source
from aengine.drivers.driver import Driver
from aengine.drivers.iterate import IterationStream
from aengine.drivers.sync import DONE, SUSPENDED, drive, runs_in_event_loop
from aengine.errors import EngineBusy, raise_failures
from aengine.events import Event, Events
from aengine.loop.effects import LoopGenerator
from aengine.loop.loop import Loop
from aengine.loop.progress import Progress, begin, from_state_dict, to_state_dict
from aengine.loop.requests import Request, Requests
from aengine.state import Randomness, State
from aengine.statistics import EngineStatistics

Batch = TypeVar("Batch")
Output = TypeVar("Output")


class Engine(EventEmitter, Generic[Batch, Output]):
    """Loops over data, runs a step for each batch, and publishes what happens.

    Args:
        step: `step(engine, batch)` returns the output, or an awaitable of it. A plain `def` runs on the engine's own
            worker thread, an `async def` on the event loop.
        name: shown in logs, notes, events and statistics; by default the step's name.
        thread: None for where the step belongs; False to run a plain step on the event loop's own thread; True to
            insist on the worker.
        grace: seconds that clean-up may take: handlers of CANCELLED and EXCEPTION_RAISED, subscribers that are behind,
            closing the data.

    Attributes:
        state_dict_user_keys: the attributes of the state that are saved and loaded with the engine.
        randomness: what saves and restores the states of random number generators with the engine, so that a run
            that is resumed draws what it would have drawn, and shuffled data comes as it came. None for nothing;
            `aengine.checkpoint` puts one here.

    Raises:
        TypeError: the step cannot be called as `step(engine, batch)`, or `thread=True` was given for an async one.
        TypeError, ValueError: `grace` is no number of seconds, 0 or more.

    Example:
        >>> engine = Engine(lambda engine, batch: batch * 2)
        >>> engine.run_sync([1, 2, 3]).output
        6
    """

    def __init__(
        self,
        step: Callable[["Engine[Batch, Output]", Batch], Output | Awaitable[Output]],
        *,
        name: str | None = None,
        thread: bool | None = None,
        grace: float = 30.0,
    ) -> None:
        check_callable(step, "the step", "step", "engine", "batch")
        check_seconds(grace, "grace=", 30.0)
        is_async = is_async_callable(step)
        if thread and is_async:
            raise TypeError(
                f"thread=True puts a plain step on the worker, but {name_of(step)} is async: leave thread= out"
            )
        name, state = name or name_of(step).rpartition("<locals>.")[2], State()
        self.logger = logging.getLogger("aengine.engine")
        super().__init__(name, state, Bus(name, self.logger, state), Requests())
        self._step = step
        self._threaded = not is_async and thread is not False
        self._is_async = is_async
        self._grace = grace
        self._progress = Progress()
        self._unread: tuple[Any, list[Fetched]] | None = None
        self._rng_to_restore: Any = None
        self._generator: LoopGenerator | None = None
        self._is_running = False
        self.state_dict_user_keys: list[str] = []
        self.randomness: Randomness | None = None

    # Running

    async def run(
        self,
        data: Any = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
        *,
        prefetch: int = 0,
    ) -> State:
        """Run the loop over `data` until `max_epochs` or `max_iters`, and return the state.

        An engine that is done begins anew, for one epoch unless told otherwise; one that was stopped goes on where it
        was; one that was interrupted goes on with its very next event.

        Args:
            data: an iterable or async iterable of batches, a callable that makes one, an async context manager that is
                one, or None, for a step that needs none.
            max_epochs: epochs in all, those of earlier runs that this one resumes included; 1 if nothing is given.
            max_iters: iterations in all, instead of epochs.
            epoch_length: iterations in an epoch; by default `len(data)`, or what the first epoch finds.
            prefetch: how many batches to pull ahead of the step, in a task or, for plain data, in a thread.

        Raises:
            EngineBusy: this engine is running.
            ValueError, TypeError: an argument is wrong, or contradicts the run to be gone on with.
            DataExhausted: the data gave not a single batch.
            HandlerTimeout: subscribers were busy for longer than `grace` seconds at the end.
            BaseException: what a step, a handler or the data raised, as the very object; several as an ExceptionGroup.

        Cancellation waits for the step in flight, fires CANCELLED within `grace` seconds, and goes on. The run can then
        be resumed.
        """
        await checkpoint_if_cancelled()
        with self._busy():
            check_whole(prefetch, "prefetch=", minimum=0, of="batches to pull ahead")
            loop, generator = self._begin(data, max_epochs, max_iters, epoch_length)
            await self._drive(loop, generator, prefetch)
        return self.state

    def run_sync(
        self,
        data: Any = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
        *,
        prefetch: int = 0,
    ) -> State:
        """Run the same loop where no event loop runs, and without one as long as nothing must be awaited.

        Subscribers, async steps, handlers and data, and `prefetch` have it open one, on asyncio.

        Raises:
            RuntimeError: an event loop runs in this thread.
            BaseException: as `run` does.
        """
        if runs_in_event_loop():
            raise RuntimeError("run_sync() would block the event loop that runs here: write  await engine.run(...)")
        check_whole(prefetch, "prefetch=", minimum=0, of="batches to pull ahead")
        if self._is_async or prefetch or self._bus.must_await or adapt(data).is_async:
            return anyio.run(partial(self.run, data, max_epochs, max_iters, epoch_length, prefetch=prefetch))
        with self._busy():
            loop, generator = self._begin(data, max_epochs, max_iters, epoch_length)
            failures: list[BaseException] = []
            wanted = drive(generator, self._requests, failures)
            if wanted is not DONE and wanted is not SUSPENDED:
                try:
                    anyio.run(partial(self._drive, loop, generator, 0, wanted))
                finally:
                    close_unawaited(wanted)  # where it was not come to
            else:
                self._end(loop, generator, is_suspended=wanted is SUSPENDED)
                try:
                    raise_failures(self.name, [*failures, *loop.also_raised])
                finally:
                    failures.clear()  # an error's traceback holds this frame: no cycle may hold the engine
        return self.state

    def iterate(
        self,
        data: Any = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
        *,
        prefetch: int = 0,
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Run the same loop for a `for` of one's own: an event for each completed iteration; the loop waits meanwhile.

            async with engine.iterate(data, max_epochs=3) as iterations:
                async for event in iterations:
                    print(event.iteration, event.output)

        The body is part of the run: its exception fails the run, and leaving the block early terminates it. Raises and
        cancels as `run` does.
        """
        return IterationStream(
            partial(self.run, data, max_epochs, max_iters, epoch_length, prefetch=prefetch),
            self.terminate,
            partial(self.add_event_handler, Events.ITERATION_COMPLETED),
            self._record,
            self._waits_for,
        )

    @contextmanager
    def _busy(self) -> Generator[None]:
        if self._is_running:
            raise EngineBusy(
                f"engine {self.name!r} is running: one engine runs one loop at a time. Await the run under way, or make"
                " another engine"
            )
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False
            self._requests.end()

    def _begin(
        self, data: Any, max_epochs: int | None, max_iters: int | None, epoch_length: int | None
    ) -> tuple[Loop, LoopGenerator]:
        adapted = adapt(data)
        if self.state.max_epochs is None and self.state.max_iters is None:
            self._give_up()
        if self._loop is not None and self._generator is not None:
            self._refuse_other_arguments(data, max_epochs, max_iters, epoch_length)
            self._bus.start_clock()
            return self._loop, self._generator
        state = self.state
        progress = begin(state, self._progress, adapted, max_epochs, max_iters, epoch_length)
        unread = self._unread[1] if self._unread is not None and self._unread[0] is data else ()
        source = Source(adapted, self.logger, unread, self.randomness)
        if progress.position is not None:
            source.resume_at(progress.position, progress.iteration)
        else:
            source.restart(progress.iteration)
        state.dataloader = data
        self._requests.begin()
        self._bus.reset()
        rng_states, self._rng_to_restore = self._rng_to_restore, None
        restore_rng = None
        if self.randomness is not None and rng_states is not None:
            restore_rng = partial(self.randomness.restore, rng_states, data)
        loop = self._loop = Loop(
            self,
            self._step,
            source,
            progress,
            state=state,
            bus=self._bus,
            requests=self._requests,
            restore_rng=restore_rng,
        )
        generator = self._generator = loop.run()
        return loop, generator

    def _give_up(self) -> None:
        """Begin anew, or elsewhere: what was interrupted will not be gone on with."""
        if self._loop is not None and self._generator is not None:
            self._generator.close()
            self._keep_unread(self._loop.source)
        self._loop = self._generator = None

    def _refuse_other_arguments(
        self, data: Any, max_epochs: int | None, max_iters: int | None, epoch_length: int | None
    ) -> None:
        state = self.state
        given = {"max_epochs": max_epochs, "max_iters": max_iters, "epoch_length": epoch_length}
        other = [
            f"{name}={value} (it has {getattr(state, name)})"
            for name, value in given.items()
            if value not in (None, getattr(state, name))
        ]
        if data is not None and data is not state.dataloader:
            other.append("other data")
        if other:
            raise ValueError(
                f"engine {self.name!r} was interrupted and goes on where it was, so it cannot take {', '.join(other)}:"
                " call run() with what it was called with, or without arguments; set_data() changes the data"
            )

    async def _drive(self, loop: Loop, generator: LoopGenerator, prefetch: int, wanted: Any = None) -> State:
        driver = self._driver = Driver(
            loop,
            generator,
            self._bus,
            self._requests,
            threaded=self._threaded and wanted is None,
            grace=self._grace,
            prefetch=prefetch,
            wanted=wanted,
        )
        try:
            await driver.run()
        finally:
            self._driver = None
            if not driver.has_abandoned:
                self._end(loop, generator, is_suspended=driver.is_suspended)
        return self.state

    def _end(self, loop: Loop, generator: LoopGenerator, *, is_suspended: bool) -> None:
        self._bus.stopwatch.stop()
        self._progress = loop.progress()
        if is_suspended:
            return
        self.state.last_progress = self._progress
        self._loop = self._generator = None
        self._keep_unread(loop.source)
        generator.close()

    def _keep_unread(self, source: Source) -> None:
        """Keep what was fetched and not stepped on, for the next run over the same data."""
        unread = source.unread()
        self._unread = (source.data, unread) if unread else None

    # Stopping

    def terminate(self, *, skip_completed: bool = False) -> None:
        """End the run before its next step: TERMINATE and COMPLETED are fired, and `run()` returns.

        From any thread or task. A later `run()` resumes. Without a run under way it does nothing.

        Args:
            skip_completed: fire no COMPLETED.
        """
        self._requests.terminate(skip_completed=skip_completed)

    def terminate_epoch(self, *, skip_epoch_completed: bool = False) -> None:
        """End the epoch before its next step: the data begins again with the next epoch. From any thread or task.

        Args:
            skip_epoch_completed: fire no EPOCH_COMPLETED.

        Raises:
            RuntimeError: called at STARTED or EPOCH_STARTED, where no iteration has begun.
        """
        self._requests.terminate_epoch(skip_epoch_completed=skip_epoch_completed)

    def interrupt(self) -> None:
        """Leave the run before its next step, to go on with the very next event at the next `run()`."""
        self._requests.interrupt()

    def pause(self) -> None:
        """Have the loop wait before its next step, inside `run()`, until `resume()`. From any thread or task."""
        self._requests.request(Request.PAUSE)

    def resume(self) -> None:
        """End a pause. From any thread or task."""
        self._requests.cancel(Request.PAUSE)

    def set_data(self, data: Any) -> None:
        """Have the next batch come from other data. The length of the epoch stays. From any thread or task.

        Raises:
            RuntimeError: no run is under way.
            TypeError: this cannot be data.
        """
        adapted = adapt(data)
        if self._loop is None:
            raise RuntimeError(
                "set_data() changes the data of a run under way, and there is none: pass the data to run()"
            )
        self._loop.set_data(Source(adapted, self.logger, randomness=self.randomness))

    @property
    def is_running(self) -> bool:
        """Whether a run is under way."""
        return self._is_running

    @property
    def should_terminate(self) -> bool:
        """Whether `terminate()` was called of the run under way, or of the last one."""
        return Request.TERMINATE in self._requests.pending

    @property
    def should_terminate_single_epoch(self) -> bool:
        """Whether `terminate_epoch()` was called and is yet to take effect."""
        return Request.TERMINATE_EPOCH in self._requests.pending

    @property
    def should_interrupt(self) -> bool:
        """Whether `interrupt()` was called and is yet to take effect."""
        return Request.INTERRUPT in self._requests.pending

    # Saving and looking

    def state_dict(self) -> dict[str, Any]:
        """Return where the engine stands, after the last step that completed: plain values, to be saved.

        Holds the counters and limits, the position of the data (and the data's own `state_dict`, where it has one),
        the counts of events that count their firings, and the state's attributes that `state_dict_user_keys` names;
        with `engine.randomness`, also the states of random number generators, as tensors.
        """
        progress = self._progress if self._loop is None else self._loop.progress()
        fired = {topic.name: topic.own_count for topic in self._bus.topics if topic.own_count}
        saved = to_state_dict(progress, self.state, fired, self.state_dict_user_keys)
        if self.randomness is not None:
            saved["random"] = self.randomness.capture(self.state.dataloader)
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any], *, begins_anew: bool = False) -> None:
        """Go on, at the next `run()`, where a `state_dict` was taken, by this engine or by pytorch-ignite's.

        Args:
            state_dict: what was taken.
            begins_anew: whether an engine that was done begins anew, as it does in memory: for one that is run again
                and again, as an evaluator. By default it has nothing left but its last event.

        Raises:
            EngineBusy: a run is under way.
            ValueError: a key is missing, or two contradict each other.
        """
        if self._is_running:
            raise EngineBusy(f"engine {self.name!r} is running: load its state before run()")
        self._progress = from_state_dict(state_dict, self.state, self.state_dict_user_keys)
        if begins_anew:
            self._progress = replace(self._progress, is_loaded=False)
        self._give_up()
        self._rng_to_restore = state_dict.get("random")
        fired = state_dict.get("fired", {})
        for topic in {*self._bus.topics, *map(self._bus.topic, fired)}:
            topic.own_count = fired.get(topic.name, 0)

    def statistics(self) -> EngineStatistics:
        """Return where the time goes, and what becomes of the events. Cheap; at any time, from any thread."""
        bus, watch = self._bus, self._bus.stopwatch
        handlers: dict[str, float] = {}
        of_fired: dict[str, float] = {}
        for topic in bus.topics:
            seconds = handlers if topic.is_fired_by_loop else of_fired
            for handler in topic.inline:
                seconds[handler.name] = seconds.get(handler.name, 0.0) + handler.seconds
        return EngineStatistics(
            name=self.name,
            running=self._is_running,
            epoch=self.state.epoch,
            iteration=self.state.iteration,
            total=watch.total,
            data=watch.data,
            step=watch.step,
            handlers=handlers,
            handlers_of_fired=of_fired,
            back_pressure=watch.back_pressure,
            event_loop=watch.event_loop,
            lag=watch.lag,
            listeners=tuple(one.statistics() for one in (*bus.subscribers, *bus.streams)),
        )

    def _record(self) -> Event:
        state, bus = self.state, self._bus
        return Event(
            "ITERATION_COMPLETED",
            self.name,
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

    def __repr__(self) -> str:
        state = self.state
        return f"<Engine {self.name!r} epoch={state.epoch}/{state.max_epochs} iteration={state.iteration}>"

"""The loop: epochs, batches, steps, events, requests. It does no I/O, knows no event loop, and never waits.

It is a plain generator. What must be awaited (by a step, a handler, the data) it yields, and is sent the result or
thrown the exception. Its driver decides where it runs: on the event loop, on a thread, or with neither.
"""

import warnings
from collections.abc import Awaitable, Callable, Generator
from time import perf_counter
from types import CoroutineType, GeneratorType
from typing import Any

from aengine.bus.bus import Bus
from aengine.bus.topic import Topic
from aengine.callables import is_awaitable, refuse_stop_iteration
from aengine.data.managed import RunContext
from aengine.data.rewind import END
from aengine.data.source import PENDING, Source
from aengine.errors import DataExhaustedWarning
from aengine.events import ALWAYS, NEVER
from aengine.loop.effects import BUDGET, Effect, LoopGenerator, NextBatch, WaitCancelled
from aengine.loop.feed import Exhausted, Feed
from aengine.loop.progress import Progress
from aengine.loop.requests import Phase, Request, Requests
from aengine.state import StopReason


class Terminated(Exception):
    """The run is to end here."""

    def __init__(self, reason: StopReason) -> None:
        self.reason = reason


class EpochTerminated(Exception):
    """The epoch is to end here."""


class Loop:
    """One run, from STARTED to COMPLETED, across interruptions.

    Attributes:
        completed: iterations whose step has returned. `state.iteration` is one more while a step runs.
        feed: the data.
        also_raised: errors of handlers and of the data that came while a first one was being reported.
        cancellations: the exceptions that are reported as CANCELLED.
    """

    def __init__(
        self,
        engine: Any,
        step: Callable[[Any, Any], Any],
        source: Source,
        progress: Progress,
        *,
        bus: Bus,
        requests: Requests,
        restore_rng: Callable[[], object] | None = None,
    ) -> None:
        self.completed = progress.iteration
        self.feed = Feed(source, bus.state, progress.iteration)
        self.also_raised: list[BaseException] = []
        self.cancellations: tuple[type[BaseException], ...] = (KeyboardInterrupt, SystemExit)
        self._engine = engine
        self._step = step
        self._state = bus.state
        self._bus = bus
        self._requests = requests
        # After STARTED and EPOCH_STARTED of a run that is resumed: the run before fired them, too, and their handlers
        # may draw random numbers.
        self._restore_rng = restore_rng
        self._has_other_data = False  # the data was replaced during the epoch: there may now be events of it, or none
        self._epoch_is_complete = progress.epoch_is_complete
        self._first = progress.iteration
        self._pass_length = self._state.epoch_length  # as it was found out: what is set in its place is to stay
        self._is_of_passes = progress.is_of_passes
        source.follows = bus.state if progress.is_of_passes else None
        self._others_had_a_turn: Callable[[], bool] | None = None
        self._next_yield = perf_counter() + BUDGET
        # Of what steps return, the types that are not awaitable: asking `inspect` costs as much as a whole iteration.
        self._plain_types: set[type] = set()

    def attach(
        self, run: RunContext, cancelled: type[BaseException], others_had_a_turn: Callable[[], bool] | None
    ) -> None:
        """A driver on an event loop begins to advance this. Raises as `Source.attach` does.

        `cancelled` is what a cancellation raises there. `others_had_a_turn` returns whether other tasks had a turn
        since it was called before; it is None where the loop does not run on the event loop's own thread.
        """
        self.source.attach(run)
        if cancelled not in self.cancellations:
            self.cancellations += (cancelled,)
        self._others_had_a_turn = others_had_a_turn

    @property
    def source(self) -> Source:
        """The data that batches come from."""
        return self.feed.source

    # The run

    def run(self) -> LoopGenerator:  # noqa: PLR0915 -- the whole run, from its first event to its last
        """Run from STARTED to COMPLETED. Yields what must be awaited; raises what fails the run."""
        state, requests, began = self._state, self._requests, perf_counter()
        state.times.update(EPOCH_COMPLETED=0.0, COMPLETED=0.0)
        try:
            try:
                yield from self._dispatch("STARTED")
                yield from self._serve_requests()
                if self._epoch_is_complete or self._is_done:
                    self._restore_rng_once()
                while not self._is_done:
                    yield from self._epoch()
                reason = StopReason.COMPLETED
            except Terminated as end:
                reason = end.reason
                requests.enter(Phase.ENDING_EPOCH)
                yield from self._dispatch("TERMINATE")
            except Exhausted:
                reason = StopReason.DATA_EXHAUSTED
                warnings.warn(self.feed.exhaustion(self.completed), DataExhaustedWarning, stacklevel=2)
            requests.enter(Phase.ENDING_EPOCH)
            yield from self._finish_listeners()
            state.stop_reason = reason
            state.last_progress = self.progress()
            state.times["COMPLETED"] = perf_counter() - began
            if not (Request.TERMINATE in requests.pending and requests.skip_completed):
                yield from self._dispatch("COMPLETED")
                yield from self._bus.topic("COMPLETED").dispatch_at_end(self._engine)
                state.times["COMPLETED"] = perf_counter() - began
            yield from self._accept_no_more()
            yield Effect.FLUSH
            yield from self._close(gently=True)
        except GeneratorExit:  # an interrupted engine is given up: nothing can be awaited any more
            self.feed.unread_batch()
            self.source.close()
            raise
        except BaseException as error:
            yield from self._report(error)
            try:
                yield from self._close(gently=not isinstance(error, self.cancellations))
            except Exception as another:  # noqa: BLE001 -- raised with the first
                self.also_raised.append(another)
            raise

    def _epoch(self) -> LoopGenerator:
        state, requests, began = self._state, self._requests, perf_counter()
        yield from self._look_ahead()
        if self._epoch_is_complete:
            state.epoch += 1
            state.epoch_start = state.iteration
            self._epoch_is_complete = False
            if self._is_of_passes and state.epoch_length != self._pass_length:
                self._fix_epoch_length()
            if self._is_of_passes:
                state.epoch_length = self.source.position.ask_length()
        try:
            # Otherwise the epoch was resumed after its last iteration, and only EPOCH_COMPLETED is left to fire.
            if state.iteration < self._end_of_epoch:
                yield from self._dispatch("EPOCH_STARTED")
                yield from self._serve_requests()
            self._restore_rng_once()
            requests.enter(Phase.ITERATING)
            yield from self._iterations()
        except EpochTerminated:
            requests.enter(Phase.ENDING_EPOCH)
            # At ITERATION_STARTED an iteration was begun whose batch is dropped with the rest of the epoch.
            self.completed = state.iteration
            yield from self._dispatch("TERMINATE_SINGLE_EPOCH", state.iteration - state.epoch_start)
            yield from self.feed.restart(self.completed)
            yield from self._complete_epoch(began, fire=not requests.skip_epoch_completed)
        except Exhausted:
            if state.iteration > state.epoch_start:
                yield from self._complete_epoch(began)
            else:
                state.epoch -= 1
                self._epoch_is_complete = True
            raise
        else:
            yield from self._complete_epoch(began)

    def _look_ahead(self) -> LoopGenerator:
        """Before an epoch begins, or was begun but for its first iteration: look whether the data has ended."""
        state, source = self._state, self.source
        if source.is_one_shot:
            yield from self._fetching(self.feed.look_ahead(self.completed))
        elif source.position.may_be_at_end and (self._epoch_is_complete or state.iteration == state.epoch_start):
            yield from self._fetching(self.feed.look_for_end(self.completed))

    def _complete_epoch(self, began: float, *, fire: bool = True) -> LoopGenerator:
        requests, times = self._requests, self._state.times
        requests.enter(Phase.ENDING_EPOCH)
        self._epoch_is_complete = True
        self._pass_length = self._state.epoch_length
        times["EPOCH_COMPLETED"] = perf_counter() - began
        if fire:
            yield from self._dispatch("EPOCH_COMPLETED")
            times["EPOCH_COMPLETED"] = perf_counter() - began
        yield from self._serve_requests()
        requests.enter(Phase.BETWEEN_EPOCHS)

    def _restore_rng_once(self) -> None:
        restore, self._restore_rng = self._restore_rng, None
        if restore is not None:
            restore()

    def _fix_epoch_length(self) -> None:
        """From here on an epoch is no longer a pass over the data: it has the length of the one under way."""
        self._is_of_passes, self.source.follows = False, None

    @property
    def _end_of_epoch(self) -> int:
        length = self._state.epoch_length
        return NEVER if length is None else self._state.epoch_start + length

    @property
    def _end(self) -> int:
        """Where the epoch ends, or the run within it."""
        max_iters = self._state.max_iters
        return min(self._end_of_epoch, NEVER if max_iters is None else max_iters)

    @property
    def _is_done(self) -> bool:
        state = self._state
        progress = Progress(self.completed, state.epoch, state.epoch_start, self._epoch_is_complete)
        return progress.reaches(state.max_epochs, state.max_iters, state.epoch_length)

    # One function: as several, the calls between them would cost more than they do. It writes into `state`, `bus` and
    # its stopwatch, and `feed` directly, for the same reason.
    def _iterations(self) -> LoopGenerator:  # noqa: C901, PLR0912, PLR0915
        """The hot path: fetch, step, next. `bus.next_count` is the next iteration in which there is more to do."""
        engine, state, step, requests, bus = self._engine, self._state, self._step, self._requests, self._bus
        feed, watch, plain_types, coroutine = self.feed, bus.stopwatch, self._plain_types, CoroutineType
        getting, got, started, completed = self._topics_of_an_iteration()
        # The first batch of a pass may show that it has another length than it was said to have.
        end = min(self._end, state.iteration + 1) if self._is_of_passes else self._end
        feed.consumed = consumed = None
        watch.weight, bus.next_count = 0, ALWAYS  # the epoch before may have ended at this very iteration
        is_timed, mark, batch = False, 0.0, END
        usual: type | None = None  # what the step has returned last, if that is not to be awaited
        try:
            while (iteration := state.iteration) < end or iteration < (end := self._end):
                state.batch = None
                if is_busy := iteration >= bus.next_count:
                    if self._has_other_data:
                        self._has_other_data = False
                        getting, got, started, completed = self._topics_of_an_iteration()
                    if is_timed := iteration >= watch.next_reading:
                        watch.read(iteration)
                        bus.next_count = min(
                            watch.next_reading, getting.next_count, got.next_count, started.next_count - 1
                        )
                    if iteration >= getting.next_count:
                        feed.consumed = consumed
                        if (rest := getting.dispatch(engine, iteration)) is not None:
                            yield from rest
                        feed.consumed = None
                        if requests.pending:
                            yield from self._serve_requests(between_steps=False)
                    if is_timed:
                        mark = perf_counter()
                consumed = None  # so that its memory is free before the next one comes
                try:
                    take = feed.source.take  # calls of a local are specialised, those of such an attribute are not
                    batch = take()
                    if batch is PENDING:
                        batch = END
                        feed.is_awaited = True
                        batch = yield NextBatch(feed.source.arrival())
                        feed.is_awaited = False
                except (StopIteration, StopAsyncIteration):
                    batch = END
                except BaseException as error:
                    yield from self._meet_error_of_data(error)
                    raise
                if batch is END:
                    batch = yield from self._meet_end_of_data()
                    if batch is END:
                        break
                state.output = None
                state.batch = batch
                if is_busy:
                    if is_timed:
                        watch.data += (perf_counter() - mark) * watch.weight
                    if iteration >= got.next_count:
                        if (rest := got.dispatch(engine, iteration)) is not None:
                            yield from rest
                        if requests.pending:
                            feed.in_hand = batch
                            yield from self._serve_requests(between_steps=False)
                            feed.in_hand = END

                state.iteration = iteration = iteration + 1
                if is_busy:
                    if iteration >= started.next_count:
                        if (rest := started.dispatch(engine, iteration)) is not None:
                            yield from rest
                        if requests.pending:
                            feed.in_hand = batch
                            yield from self._serve_requests(between_steps=False)
                            feed.in_hand = END
                    if is_timed:
                        mark = perf_counter()
                try:
                    output = step(engine, state.batch)
                    kind = type(output)
                    if kind is not usual:
                        if kind is coroutine or (kind not in plain_types and self._is_awaitable(output)):
                            output = yield output
                        elif kind in plain_types:
                            usual = kind
                except Exception as error:
                    refuse_stop_iteration(error, "the step")
                    bus.note(error, "the step")
                    raise
                if is_timed:
                    watch.step += (perf_counter() - mark) * watch.weight
                state.output = output
                consumed, batch = batch, END
                self.completed = iteration
                if iteration >= completed.next_count:
                    feed.consumed = consumed
                    dispatch = completed.dispatch
                    if (rest := dispatch(engine, iteration)) is not None:
                        yield from rest
                    feed.consumed = None
                if requests.pending:
                    feed.consumed = consumed
                    yield from self._serve_requests()
                    feed.consumed = None

                if is_timed:
                    is_timed, watch.weight = False, 0
                    # Read each time: an epoch may go on with another driver than it began with.
                    if (had_turn := self._others_had_a_turn) is not None and perf_counter() >= self._next_yield:
                        if not had_turn():  # otherwise the step has waited for something
                            yield Effect.YIELD
                            had_turn()
                        self._next_yield = perf_counter() + BUDGET
        finally:
            feed.in_hand = batch  # what was fetched and not stepped on is not lost
            feed.consumed = consumed
        if self._end_of_epoch > state.iteration:  # max_iters, inside an epoch
            raise Terminated(StopReason.COMPLETED)

    # The data

    def _fetching(
        self, part: Generator[Awaitable[Any] | Effect, Any, Any]
    ) -> Generator[Awaitable[Any] | Effect, Any, Any]:
        try:
            return (yield from part)
        except BaseException as error:
            yield from self._meet_error_of_data(error)
            raise

    def _meet_error_of_data(self, error: BaseException) -> LoopGenerator:
        self.feed.is_awaited = False
        if isinstance(error, WaitCancelled):
            yield from self._serve_requests()  # which ends the run: only `terminate()` cancels this wait
        elif isinstance(error, Exception) and not isinstance(error, Exhausted):
            self._bus.note(error, f"the data ({self.source.name}), fetching batch {self.completed + 1}")

    def _meet_end_of_data(self) -> Generator[Awaitable[Any] | Effect, Any, Any]:
        """Restart the data and return its first batch; END if it ends an epoch whose length was not known."""
        if self.feed.end(self.completed):
            return END
        yield from self._dispatch("DATALOADER_STOP_ITERATION")
        yield from self._serve_requests(between_steps=False)
        yield from self.feed.restart(self.completed)
        batch = yield from self._fetching(self.feed.fetch())
        if batch is END:
            raise Exhausted
        return batch

    def set_data(self, source: Source) -> None:
        """Have the next batch come from another source. From any thread."""
        self.feed.replace(source)
        self._requests.request(Request.CHANGE_DATA)

    def _change_data(self) -> LoopGenerator:
        """In the middle of an epoch of known length, epochs keep that length; else they follow the new data."""
        state, is_under_way = self._state, not self._epoch_is_complete
        is_in_middle = is_under_way and state.iteration > state.epoch_start
        if is_in_middle and state.epoch_length is not None:
            self._fix_epoch_length()
        yield from self.feed.change(self.completed)
        if self._is_of_passes and is_under_way and not is_in_middle:
            state.epoch_length = self.source.position.said

    def can_use(self, fetched: int) -> bool:
        """Say whether this run can use another batch, when batches were fetched for so many of its iterations."""
        state = self._state
        if state.max_iters is not None:
            return fetched < state.max_iters
        if state.max_epochs is None or state.epoch_length is None:
            return True
        return fetched < state.epoch_start + state.epoch_length * (state.max_epochs - state.epoch + 1)

    # Events and requests

    def _dispatch(self, name: str, *payload: Any) -> LoopGenerator:
        self._bus.stopwatch.weight = 1
        topic = self._bus.topic(name)
        topic.mark_fired_by_loop()
        count = topic.count_firing()
        if count >= topic.next_count:
            yield from topic.dispatch(self._engine, count, payload) or ()

    def _serve_requests(self, *, between_steps: bool = True) -> LoopGenerator:  # noqa: C901, PLR0912 -- a branch a request
        """Serve what was requested, until nothing is pending that keeps the loop from going on."""
        requests, is_put_off = self._requests, False
        if requests.to_fire:
            requests.request(Request.FIRE)
        while requests.pending:
            if requests.take(Request.RAISE_FAILURE):
                yield Effect.RAISE_FAILURE
            elif requests.take(Request.CHANGE_DATA):
                yield from self._change_data()
                self._has_other_data, self._bus.next_count = True, ALWAYS
            elif Request.TERMINATE in requests.pending:
                raise Terminated(StopReason.TERMINATED)
            elif requests.take(Request.TERMINATE_EPOCH):
                if requests.phase is Phase.ITERATING:
                    raise EpochTerminated
            elif requests.take(Request.INTERRUPT):
                yield from self._suspend()
            elif requests.take(Request.FIRE):
                if between_steps:
                    yield from self._fire_requested()
                else:
                    is_put_off = True
            elif Request.PAUSE in requests.pending:
                yield Effect.PAUSE
            elif requests.take(Request.MAKE_ROOM):
                while requests.deferred_backpressure:
                    yield requests.deferred_backpressure.pop()
        if is_put_off:
            requests.request(Request.FIRE)

    def _fire_requested(self) -> LoopGenerator:
        while self._requests.to_fire:
            yield from self._dispatch(self._requests.to_fire.popleft())

    def _accept_no_more(self) -> LoopGenerator:
        """Accept no more requests, then fire what was requested in time: in this order, or one in between is lost."""
        self._requests.enter(Phase.IDLE)
        yield from self._fire_requested()

    def _suspend(self) -> LoopGenerator:
        """Leave the run in its middle, and go on from here in the next."""
        requests, state = self._requests, self._state
        yield from self._dispatch("INTERRUPT")
        yield from self.feed.suspend(self.completed)
        phase = requests.phase
        yield from self._accept_no_more()
        requests.take(Request.INTERRUPT)  # requested again meanwhile, it is served, too
        yield Effect.FLUSH
        state.stop_reason = StopReason.INTERRUPTED
        yield Effect.SUSPEND
        requests.enter(phase)

    def _topics_of_an_iteration(self) -> tuple[Topic, Topic, Topic, Topic]:
        bus = self._bus
        never_fired = Topic("", bus)
        has_data = self.source.data is not None
        getting = bus.topic("GET_BATCH_STARTED") if has_data else never_fired
        got = bus.topic("GET_BATCH_COMPLETED") if has_data else never_fired
        topics = getting, got, bus.topic("ITERATION_STARTED"), bus.topic("ITERATION_COMPLETED")
        for topic in topics:
            topic.reschedule(self._state.iteration)
        return topics

    def _finish_listeners(self) -> LoopGenerator:
        """Give those that asked for it their last event, if it did not come by itself."""
        if self.completed > self._first:  # the hot path does not record these
            for name in ("GET_BATCH_STARTED", "GET_BATCH_COMPLETED"):
                self._bus.topic(name).record_firing(self.completed - 1)
            for name in ("ITERATION_STARTED", "ITERATION_COMPLETED"):
                self._bus.topic(name).record_firing(self.completed)
        for topic in self._bus.topics:
            yield from topic.dispatch_at_end(self._engine)

    # The end

    def _report(self, error: BaseException) -> LoopGenerator:
        """Fire CANCELLED or EXCEPTION_RAISED, as clean-up."""
        is_cancellation = isinstance(error, self.cancellations)
        self._state.stop_reason = StopReason.CANCELLED if is_cancellation else StopReason.FAILED
        self._requests.enter(Phase.ENDING_EPOCH)
        if error is self.feed.empty:
            yield from self._accept_no_more()
            return
        yield Effect.SHIELD
        self._bus.stopwatch.weight = 1
        topic = self._bus.topic("CANCELLED" if is_cancellation else "EXCEPTION_RAISED")
        payload = () if is_cancellation else (error,)
        for dispatch in topic.dispatch_to_each(self._engine, topic.count_firing(), payload):
            try:
                yield from dispatch
            except Exception as another:  # noqa: BLE001 -- the others are called, too; it is raised with the first
                if another is not error:
                    self.also_raised.append(another)
        try:
            yield from self._accept_no_more()
        except Exception as another:  # noqa: BLE001 -- likewise
            self.also_raised.append(another)

    def _close(self, *, gently: bool) -> LoopGenerator:
        self._requests.enter(Phase.IDLE)
        try:
            yield from self.feed.close(gently=gently)
        except Exception as error:
            self._bus.note(error, f"closing the data ({self.source.name})")
            raise

    def progress(self) -> Progress:
        """Return what is completed: where to go on from here."""
        return Progress(
            iteration=self.completed,
            epoch=self._state.epoch,
            epoch_start=self._state.epoch_start,
            epoch_is_complete=self._epoch_is_complete,
            is_of_passes=self._is_of_passes,
            position=self.feed.position(self.completed),
        )

    def _is_awaitable(self, output: Any) -> bool:
        if is_awaitable(output):
            return True
        if type(output) is not GeneratorType:  # of those, some are and some are not
            self._plain_types.add(type(output))
        return False

"""The loop: epochs, batches, steps, events, requests. It does no I/O, knows no event loop, and never waits.

It is a plain generator. What must be awaited (by a step, a handler, the data) it yields, and is sent the result or
thrown the exception. Its driver decides where it runs: on the event loop, on a thread, or with neither.
"""

import warnings
from collections.abc import Awaitable, Callable, Generator
from dataclasses import replace
from time import perf_counter
from types import CoroutineType, GeneratorType
from typing import Any

from aengine.bus.bus import Bus
from aengine.bus.topic import Topic
from aengine.callables import is_awaitable, refuse_stop_iteration
from aengine.data.managed import RunContext
from aengine.data.rewind import END
from aengine.data.source import Source
from aengine.data.taking import PENDING
from aengine.errors import DataExhaustedWarning, HandlerTimeout, StrayCancellation
from aengine.events import ALWAYS, NEVER
from aengine.loop.effects import BUDGET, Effect, LoopGenerator, NextBatch, WaitCancelled
from aengine.loop.ends import EpochTerminated, Terminated
from aengine.loop.feed import Exhausted, Feed
from aengine.loop.progress import Progress
from aengine.loop.requests import Phase, Request, Requests
from aengine.state import StopReason, describe_error
from aengine.threads.event_loop import is_cancellation_of_asyncio


class Loop:
    """One run, from STARTED to COMPLETED, across interruptions.

    Attributes:
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
        self.feed: Feed = Feed(source, bus.state, progress.iteration)
        self.also_raised: list[BaseException] = []
        self.cancellations: tuple[type[BaseException], ...] = (KeyboardInterrupt, SystemExit)
        self._explain: Callable[[BaseException], BaseException] | None = None
        self.engine = engine
        self._step = step
        self._state = bus.state
        self._bus = bus
        self._requests = requests
        # After STARTED and EPOCH_STARTED of a run that is resumed: the run before fired them, too, and their handlers
        # may draw random numbers.
        self._restore_rng = restore_rng
        self._has_other_data = False  # the data was replaced during the epoch: there may now be events of it, or none
        self._first = progress.iteration
        self._pass_length = self._state.epoch_length  # as it was found out: what is set in its place is to stay
        self._is_of_passes = progress.is_of_passes
        source.follows = bus.state if progress.is_of_passes else None
        self._is_agreeing = False  # with other processes; also where that has failed
        self._others_had_a_turn: Callable[[], int] | None = None
        self._is_given_up: Callable[[], bool] | None = None
        self._next_yield = perf_counter() + BUDGET
        # Of what steps return, the types that are not awaitable: asking `inspect` costs as much as a whole iteration.
        self._plain_types: set[type] = set()

    def attach(
        self,
        run: RunContext,
        cancelled: type[BaseException],
        explain: Callable[[BaseException], BaseException],
        others_had_a_turn: Callable[[], int] | None,
        is_given_up: Callable[[], bool],
    ) -> None:
        """A driver on an event loop begins to advance this. Raises as `Source.attach` does.

        `cancelled` is what a cancellation raises there. `explain` returns the failure to report for an error: another
        one for a cancellation of something else, which the user's code has let out. `others_had_a_turn` returns how
        many runs take turns, if other tasks had one since it was called before, else 0; or on the worker whether there
        is still an event loop.
        `is_given_up` returns whether nothing is left that would hear of an error.
        """
        self.source.attach(run)
        if cancelled not in self.cancellations:
            self.cancellations += (cancelled,)
        self._explain = explain
        self._others_had_a_turn = others_had_a_turn
        self._is_given_up = is_given_up

    def detach(self) -> None:
        """The driver is at its end."""
        self.source.attach(None)
        # Which refer to the driver: no cycle may hold the engine.
        self._explain = self._is_given_up = self._others_had_a_turn = None

    @property
    def source(self) -> Source:
        """The data that batches come from."""
        return self.feed.source

    @property
    def completed(self) -> int:
        """Iterations whose step has returned. `state.iteration` is one more while a step runs."""
        return self._state.iterations_completed

    @property
    def _epoch_is_complete(self) -> bool:
        return self._state.epochs_completed == self._state.epoch

    @_epoch_is_complete.setter
    def _epoch_is_complete(self, is_complete: bool) -> None:
        self._state.epochs_completed = self._state.epoch - (not is_complete)

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
                yield from self._bus.topic("COMPLETED").dispatch_at_end(self.engine)
                state.times["COMPLETED"] = perf_counter() - began
            yield from self._accept_no_more()
            yield from self._flush()
            yield from self._close(gently=True, exits=True)
        except GeneratorExit:  # an interrupted engine is given up: nothing can be awaited any more
            self.feed.unread_batch()
            self.source.give_up()
            raise
        except BaseException as error:  # noqa: BLE001 -- raised again, or the reason of it
            failure = self._failure_of(error)
            try:
                yield from self._report(failure)
                try:
                    # Subscribers are still at work, and may need the data: to acknowledge what they have written.
                    yield from self._close(gently=not isinstance(failure, self.cancellations), exits=False)
                except Exception as another:  # noqa: BLE001 -- raised with the first
                    self.also_raised.append(another)
                if failure is not error:
                    raise failure
                raise
            finally:
                del failure  # whose traceback holds this frame

    def _epoch(self) -> LoopGenerator:
        state, requests, began = self._state, self._requests, perf_counter()
        if not (yield from self._fetching(self.feed.look_ahead(self.completed))):
            yield from self._fire_end_of_data()
            if not (yield from self._fetching(self.feed.look_ahead(self.completed))):
                raise Exhausted  # other data was set, and it is empty, too
        if self.source.position.may_be_at_end and (self._epoch_is_complete or state.iteration == state.epoch_start):
            yield from self._fetching(self.feed.look_for_end(self.completed))
        if self._epoch_is_complete:
            self._begin_epoch()
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
            state.iterations_completed = state.iteration
            yield from self._dispatch("TERMINATE_SINGLE_EPOCH", state.iteration - state.epoch_start)
            yield from self._fetching(self.feed.restart(self.completed))
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

    def _begin_epoch(self) -> None:
        state = self._state
        state.epoch += 1
        state.epoch_start = state.iteration
        self._epoch_is_complete = False
        if self._is_of_passes and state.epoch_length != self._pass_length:
            self._fix_epoch_length()
        if self._is_of_passes:
            state.epoch_length = self.source.position.ask_length()

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
        # Set to None wherever the run may be suspended: then the engine holds this generator, and not the reverse.
        engine: Any = self.engine
        state, step, requests, bus = self._state, self._step, self._requests, self._bus
        feed, watch, plain_types, coroutine = self.feed, bus.stopwatch, self._plain_types, CoroutineType
        getting, got, started, completed = self._topics_of_an_iteration()
        # The first batch of a pass may show that it has another length than it was said to have.
        end = min(self._end, state.iteration + 1) if self._is_of_passes else self._end
        feed.consumed = consumed = None
        watch.weight, bus.next_count = 0, ALWAYS  # the epoch before may have ended at this very iteration
        is_timed, mark, batch = False, 0.0, END
        usual: type | None = None  # what the step has returned last, if that is not to be awaited
        # Where processes agree, each iteration is one in which there is more to do: `bus.next_count` stays where it is.
        must_agree, last_output = requests.agreement is not None, None
        try:
            while (iteration := state.iteration) < end or iteration < (end := self._end):
                state.batch = None
                if is_busy := iteration >= bus.next_count:
                    if self._has_other_data:
                        self._has_other_data = False
                        getting, got, started, completed = self._topics_of_an_iteration()
                    if is_timed := iteration >= watch.next_reading:
                        watch.read(iteration)
                        bus.next_count = (
                            ALWAYS
                            if must_agree
                            else min(watch.next_reading, getting.next_count, got.next_count, started.next_count - 1)
                        )
                    if iteration >= getting.next_count:
                        feed.consumed = consumed
                        if (rest := getting.dispatch(engine, iteration)) is not None:
                            yield from rest
                        feed.consumed = None
                        if requests.pending:
                            engine = None
                            yield from self._serve_requests(between_steps=False)
                            engine = self.engine
                    if must_agree:
                        last_output = state.output
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
                        if batch is PENDING:
                            batch = yield from feed.fetch()
                except (StopIteration, StopAsyncIteration):
                    batch = END
                except BaseException as error:
                    yield from self._meet_error_of_data(error)
                    raise
                if batch is END:
                    engine = None
                    batch = yield from self._meet_end_of_data()
                    engine = self.engine
                    if batch is END:
                        break
                state.output = None
                state.batch = batch
                if is_busy:
                    if is_timed:
                        watch.data += (perf_counter() - mark) * watch.weight
                    if must_agree:
                        engine = None
                        batch = yield from self._agree_to_step(batch, last_output)
                        engine = self.engine
                        state.batch, last_output = None if batch is END else batch, None
                        if batch is END:
                            break
                    if iteration >= got.next_count:
                        if (rest := got.dispatch(engine, iteration)) is not None:
                            yield from rest
                        if requests.pending:
                            feed.in_hand = batch
                            engine = None
                            yield from self._serve_requests(between_steps=False)
                            engine = self.engine
                            feed.in_hand = END

                state.iteration = iteration = iteration + 1
                if is_busy:
                    if iteration >= started.next_count:
                        if (rest := started.dispatch(engine, iteration)) is not None:
                            yield from rest
                        if requests.pending:
                            feed.in_hand = batch
                            engine = None
                            yield from self._serve_requests(between_steps=False)
                            engine = self.engine
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
                state.iterations_completed = iteration
                if iteration >= completed.next_count:
                    feed.consumed = consumed
                    dispatch = completed.dispatch
                    if (rest := dispatch(engine, iteration)) is not None:
                        yield from rest
                    feed.consumed = None
                if requests.pending:
                    feed.consumed, engine = consumed, None
                    yield from self._serve_requests()
                    feed.consumed, engine = None, self.engine

                if is_timed:
                    is_timed, watch.weight = False, 0
                    # Read each time: an epoch may go on with another driver than it began with.
                    if (had_turn := self._others_had_a_turn) is not None and perf_counter() >= self._next_yield:
                        runs = had_turn()
                        watch.runs = runs or 1
                        if not runs:  # otherwise the step has waited for something
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
        elif isinstance(error, Exception):
            if self.log_error_of_data(error):
                yield from self._serve_requests()  # which ends the run
            self._bus.note(error, f"the data ({self.source.name}), fetching batch {self.completed + 1}")

    def log_error_of_data(self, error: BaseException) -> bool:
        """Log an error of the data where it is not to fail the run, since that is to end cleanly; return whether.

        A signal to a process group ends a DataLoader's workers, and may end a broker's connection, at the very moment
        at which this process is to terminate its run, and so to save it.
        """
        if Request.TERMINATE not in self._requests.pending:
            return False
        self._bus.logger.error("the data (%s) failed as the run was to terminate", self.source.name, exc_info=error)
        return True

    def _meet_end_of_data(self) -> Generator[Awaitable[Any] | Effect, Any, Any]:
        """Restart the data and return its first batch; END if it ends an epoch whose length was not known."""
        if self._requests.agreement is not None:
            yield from self._agree(has_batch=False)
        return (yield from self._end_pass())

    def _end_pass(self) -> Generator[Awaitable[Any] | Effect, Any, Any]:
        if self.feed.end(self.completed):
            return END
        yield from self._fire_end_of_data()
        yield from self._fetching(self.feed.restart(self.completed))
        batch = yield from self._fetching(self.feed.fetch())
        if batch is END:
            raise Exhausted
        return batch

    def _fire_end_of_data(self) -> LoopGenerator:
        """Fire DATALOADER_STOP_ITERATION, a handler of which may set other data; else one-shot data has ended."""
        ended = self.source
        yield from self._dispatch("DATALOADER_STOP_ITERATION")
        yield from self._serve_requests(between_steps=False)
        if self.source is ended and ended.is_one_shot:
            raise Exhausted

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

    # Agreeing with other processes

    def _agree(self, *, has_batch: bool, error: BaseException | None = None) -> Generator[Any, Any, bool]:
        """Have what all processes agree on be served here, too. Returns whether all have a batch."""
        requests = self._requests
        wishes = requests.wishes(self._state.iteration + 1, has_batch=has_batch)
        assert requests.agreement is not None, "looked at by the caller"  # noqa: S101
        self._is_agreeing = True  # what it raises ends it for this process: it is not asked once more
        agreed: Any = requests.agreement.agree(wishes if error is None else replace(wishes, error=error))
        if is_awaitable(agreed):
            agreed = yield agreed
        self._is_agreeing = False
        if error is None:
            requests.agree(agreed)
            yield from self._serve_requests(between_steps=False)
        return bool(agreed.has_batch)

    def _agree_to_step(self, batch: Any, last_output: Any) -> Generator[Any, Any, Any]:
        """Return the batch to step on: this one; or, where the data of another process has ended, one of the next pass.

        END if that is the end of the epoch. One-shot data keeps its batch for the next run.
        """
        while batch is not END:
            self.feed.in_hand = batch
            do_all_have_one = yield from self._agree(has_batch=True)
            if do_all_have_one:
                self.feed.in_hand = END
                break
            self._bus.logger.info("the pass over the data ends: another process has no batch for this iteration")
            self._state.batch, self._state.output = None, last_output
            self.feed.in_hand = END
            batch = yield from self._end_pass()
            if batch is not END:
                self._state.output = None
        return batch

    # Events and requests

    def _dispatch(self, name: str, payload: Any = None) -> LoopGenerator:
        self._bus.stopwatch.weight = 1
        topic = self._bus.topic(name)
        topic.mark_fired_by_loop()
        count = topic.count_firing(payload)
        if count >= topic.next_count:
            yield from topic.dispatch(self.engine, count, payload) or ()

    def _serve_requests(self, *, between_steps: bool = True) -> LoopGenerator:  # noqa: C901, PLR0912 -- a branch a request
        """Serve what was requested, until nothing is pending that keeps the loop from going on.

        What may be requested without end, by threads that fire steadily, is served once: then the loop goes on.
        """
        requests, put_off = self._requests, set[Request]()
        has_fired = has_waited = False
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
                if between_steps and (not has_fired or Request.PAUSE in requests.pending):
                    has_fired = True
                    yield from self._fire_requested()
                else:
                    put_off.add(Request.FIRE)
            elif requests.take(Request.MAKE_ROOM):
                if not has_waited or Request.PAUSE in requests.pending:
                    has_waited = True
                    for _ in range(len(requests.deferred_backpressure)):
                        yield requests.deferred_backpressure.popitem()[1]
                else:
                    put_off.add(Request.MAKE_ROOM)
            elif Request.PAUSE in requests.pending:
                yield Effect.PAUSE
        requests.put_off(put_off)

    def _fire_requested(self) -> LoopGenerator:
        to_fire = self._requests.to_fire
        for _ in range(self._requests.calls):  # not those that are requested meanwhile, which may have no end
            if to_fire:
                firing = to_fire.popleft()
                yield from self._dispatch(firing.event, firing.payload)

    def _accept_no_more(self) -> LoopGenerator:
        """Accept no more requests, then fire what was requested in time: in this order, or one in between is lost."""
        self._requests.enter(Phase.IDLE)
        self._bus.completions.end()
        yield from self._fire_requested()

    def _flush(self) -> LoopGenerator:
        # Else there is nothing to wait for, and a worker need not hand over to the event loop for it.
        if self._bus.has_company or Request.RAISE_FAILURE in self._requests.pending:
            yield Effect.FLUSH

    def _suspend(self) -> LoopGenerator:
        """Leave the run in its middle, and go on from here in the next."""
        requests, state = self._requests, self._state
        yield from self._dispatch("INTERRUPT")
        yield from self.feed.suspend(self.completed)
        phase = requests.phase
        yield from self._accept_no_more()
        requests.take(Request.INTERRUPT)  # requested again meanwhile, it is served, too
        yield from self._flush()
        state.stop_reason = StopReason.INTERRUPTED
        yield Effect.SUSPEND
        requests.enter(phase)

    def _topics_of_an_iteration(self) -> tuple[Topic, Topic, Topic, Topic]:
        bus = self._bus
        if self.source.data is None:
            getting = got = bus.topic("")  # which is never fired
        else:
            getting, got = bus.topic("GET_BATCH_STARTED"), bus.topic("GET_BATCH_COMPLETED")
        topics = getting, got, bus.topic("ITERATION_STARTED"), bus.topic("ITERATION_COMPLETED")
        for topic in topics:
            topic.reschedule(self._state.iteration)
        return topics

    def _finish_listeners(self) -> LoopGenerator:
        """Give those that asked for it their last event, if it did not come by itself."""
        topics = [topic for topic in self._bus.topics if topic.has_at_end]
        if topics and self.completed > self._first:  # the hot path does not record these
            for name in ("GET_BATCH_STARTED", "GET_BATCH_COMPLETED"):
                self._bus.topic(name).record_firing(self.completed - 1)
            for name in ("ITERATION_STARTED", "ITERATION_COMPLETED"):
                self._bus.topic(name).record_firing(self.completed)
        for topic in topics:
            yield from topic.dispatch_at_end(self.engine)

    # The end

    def _report(self, error: BaseException) -> LoopGenerator:
        """Fire CANCELLED or EXCEPTION_RAISED, as clean-up."""
        is_cancellation = isinstance(error, self.cancellations)
        self._state.stop_reason = StopReason.CANCELLED if is_cancellation else StopReason.FAILED
        if not is_cancellation:
            self._state.error = describe_error(error)
            if self._is_given_up is not None and self._is_given_up():
                self._bus.logger.error("engine %r failed after its run was given up", self._bus.name, exc_info=error)
        self._requests.enter(Phase.ENDING_EPOCH)
        if self._requests.agreement is not None and not self._is_agreeing:
            yield Effect.SHIELD
            try:
                yield from self._agree(has_batch=False, error=error)
            except Exception as another:  # noqa: BLE001 -- the others are not to wait; it is raised with the first
                self.also_raised.append(another)
        if error is self.feed.empty:
            yield from self._accept_no_more()
            return
        yield Effect.SHIELD
        self._bus.stopwatch.weight = 1
        topic = self._bus.topic("CANCELLED" if is_cancellation else "EXCEPTION_RAISED")
        payload = None if is_cancellation else error
        for dispatch in topic.dispatch_to_each(self.engine, topic.count_firing(), payload):
            try:
                yield from dispatch
            except Exception as another:  # noqa: BLE001 -- the others are called, too; it is raised with the first
                if another is not error:
                    self.also_raised.append(another)
        try:
            yield from self._accept_no_more()
        except Exception as another:  # noqa: BLE001 -- likewise
            self.also_raised.append(another)

    def _failure_of(self, error: BaseException) -> BaseException:
        """Return what the run fails with: this error, unless it is a cancellation that is not the run's."""
        failure = error
        if self._explain is not None:
            failure = self._explain(error)
        elif is_cancellation_of_asyncio(error):  # of something that plain code has used: no event loop runs here
            failure = StrayCancellation("something was cancelled, but the run was not: the cause says where")
            failure.__cause__ = error
        if failure is not error:
            self._bus.note(failure, "the step, or a handler")
        return failure

    def _close(self, *, gently: bool, exits: bool) -> LoopGenerator:
        self._requests.enter(Phase.IDLE)
        try:
            yield from self.feed.close(gently=gently, exits=exits)
        except Exception as error:
            is_clean = self._state.stop_reason not in (StopReason.FAILED, StopReason.CANCELLED)
            # That it was not closed in time is not the data's error but ours.
            if isinstance(error, HandlerTimeout) or not (is_clean and self.log_error_of_data(error)):
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

"""The loop: epochs, batches, steps, events, stop requests. It does no I/O, knows no event loop, and never waits.

It is a plain generator. What must be awaited (by a step, a handler, the data) it yields, and is sent the result or
thrown the exception. Whoever drives it decides where it runs: on the event loop, on a thread, or on neither.
"""

import warnings
from collections.abc import Awaitable, Callable, Generator
from time import perf_counter
from types import CoroutineType, GeneratorType
from typing import Any

from aengine.bus.bus import Bus
from aengine.bus.topic import NEVER_FIRED, Topic
from aengine.callables import is_awaitable, refuse_stop_iteration
from aengine.data.source import PENDING, Source
from aengine.errors import DataExhausted, DataExhaustedWarning
from aengine.events import ALWAYS, NEVER
from aengine.loop.attending import Attending, EpochTerminated, Terminated
from aengine.loop.effects import BUDGET, Effect, LoopGenerator, NextBatch, WaitCancelled
from aengine.loop.progress import Progress, last_iteration, tell_exhaustion
from aengine.loop.requests import Phase, Request, Requests
from aengine.state import State, StopReason


class _Exhausted(Exception):
    pass


_END = object()


class Loop(Attending):
    """One run, from STARTED to COMPLETED, across interruptions.

    Attributes:
        completed: iterations whose step has returned. `state.iteration` is one more while a step runs.
        waits_for_data: whether what was yielded last is the next batch.
        also_raised: errors of handlers and of the data that came while a first one was being told of.
        to_recall: restores the randomness of the run that is gone on with, once all is fired that it did not fire.
        others_had_a_turn: asked when the time budget is spent: if not, BREATHE is yielded. Set by the driver where the
            loop runs on the event loop's own thread, else None.
        cancellations: the exceptions that are told of as CANCELLED; the driver adds its event loop's own.
    """

    def __init__(
        self,
        engine: Any,
        step: Callable[[Any, Any], Any],
        source: Source,
        progress: Progress,
        *,
        state: State,
        bus: Bus,
        requests: Requests,
    ) -> None:
        super().__init__(engine, state, bus, requests)
        self.source = source
        self.completed = progress.iteration
        self.waits_for_data = False
        self.also_raised: list[BaseException] = []
        self.restore_rng: Callable[[], object] | None = None
        self.others_had_a_turn: Callable[[], bool] | None = None
        self.cancellations: tuple[type[BaseException], ...] = (KeyboardInterrupt, SystemExit)
        self._step = step
        self._next_source: Source | None = None
        self._has_other_data = False  # than when the epoch began: there may be batches to be told of now, or none
        self._epoch_is_complete = progress.epoch_is_complete
        self._first = progress.iteration
        self._batch: Any = _END  # fetched and not yet stepped on, else _END
        self._unreported: DataExhausted | None = None
        self._is_closed = False
        self._next_breath = perf_counter() + BUDGET
        # Of what steps return, the types that are not awaitable: asking `inspect` costs as much as a whole iteration.
        self._plain_types: set[type] = set()

    def run(self) -> LoopGenerator:  # noqa: PLR0915 -- the story
        """Tell the whole story. Yields what must be awaited; raises what fails the run."""
        state, began = self._state, perf_counter()
        state.stop_reason = None
        state.times.update(EPOCH_COMPLETED=0.0, COMPLETED=0.0)
        try:
            try:
                yield from self._fire("STARTED")
                if self._epoch_is_complete or self._is_done:
                    self._restore_rng()
                while not self._is_done:
                    yield from self._epoch()
                reason = StopReason.COMPLETED
            except Terminated as end:
                reason = end.reason
                self._requests.phase = Phase.ENDING_EPOCH
                yield from self._dispatch("TERMINATE")
            except _Exhausted:
                reason = StopReason.DATA_EXHAUSTED
                warnings.warn(self._exhaustion(), DataExhaustedWarning, stacklevel=2)
            self._requests.phase = Phase.ENDING_EPOCH
            yield from self._finish_listeners()
            state.stop_reason = reason
            state.set_progress(self.progress())
            state.times["COMPLETED"] = perf_counter() - began
            if not self._requests.skips_completed:
                yield from self._dispatch("COMPLETED")
                yield from self._bus.topic("COMPLETED").finish(self._engine, state.epoch)
                state.times["COMPLETED"] = perf_counter() - began
            yield from self._take_no_more_requests()
            yield Effect.FLUSH
            yield from self._close(gently=True)
        except GeneratorExit:  # an interrupted engine is given up: nobody is there to await anything
            if self._batch is not _END:
                self.source.unread_batch(self._batch)
                self._batch = _END
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
        try:
            if state.iteration < self._end_of_epoch:  # else it was resumed, and lacks but its last page
                yield from self._fire("EPOCH_STARTED")
            self._restore_rng()
            requests.phase = Phase.ITERATING
            yield from self._iterations()
        except EpochTerminated:
            requests.phase = Phase.ENDING_EPOCH
            self.completed = state.iteration  # at ITERATION_STARTED: begun, never stepped, and gone
            yield from self._dispatch("TERMINATE_SINGLE_EPOCH", state.iteration - state.epoch_start)
            yield from self._restart_data()
            yield from self._complete_epoch(began, tell=not requests.skip_epoch_completed)
        except _Exhausted:
            if state.iteration > state.epoch_start:
                yield from self._complete_epoch(began)
            else:
                state.epoch -= 1
                self._epoch_is_complete = True
            raise
        else:
            yield from self._complete_epoch(began)

    def _restore_rng(self) -> None:
        restore, self.restore_rng = self.restore_rng, None
        if restore is not None:
            restore()

    def _complete_epoch(self, began: float, *, tell: bool = True) -> LoopGenerator:
        requests, times = self._requests, self._state.times
        requests.phase = Phase.ENDING_EPOCH
        self._epoch_is_complete = True
        times["EPOCH_COMPLETED"] = perf_counter() - began
        if tell:
            yield from self._dispatch("EPOCH_COMPLETED")
            times["EPOCH_COMPLETED"] = perf_counter() - began
        yield from self._serve_requests()
        requests.phase = Phase.BETWEEN_EPOCHS

    # One story in one go: told in parts, the calls between them would cost more than the parts.
    def _iterations(self) -> LoopGenerator:  # noqa: C901, PLR0912, PLR0915
        """The hot path: fetch, step, next. One number says whether an iteration is busy: whether anybody listens."""
        engine, state, step, requests, bus = self._engine, self._state, self._step, self._requests, self._bus
        watch, plain_types, coroutine = bus.stopwatch, self._plain_types, CoroutineType
        getting, got, started, completed = self._topics_of_an_iteration()
        end = min(self._end_of_epoch, NEVER if state.max_iters is None else state.max_iters)
        watch.weight, bus.next_due = 0, ALWAYS  # the epoch before may have ended at this very iteration
        is_timed, mark, batch = False, 0.0, _END
        usual: type | None = None  # what the step has returned last, if that is not to be awaited
        try:
            while (iteration := state.iteration) < end:
                state.batch = None  # so that its memory is free before the next one comes
                if is_busy := iteration >= bus.next_due:
                    if self._has_other_data:
                        self._has_other_data = False
                        getting, got, started, completed = self._topics_of_an_iteration()
                    if is_timed := iteration >= watch.next_reading:
                        watch.read(iteration)
                        bus.next_due = min(watch.next_reading, getting.due, got.due, started.due - 1)
                    if iteration >= getting.due:
                        if (rest := getting.dispatch(engine, iteration)) is not None:
                            yield from rest
                        if requests.pending:
                            yield from self._serve_requests(between_steps=False)
                    if is_timed:
                        mark = perf_counter()
                try:
                    take = self.source.take  # calls of a local are specialised, those of such an attribute are not
                    batch = take()
                    if batch is PENDING:
                        batch = _END
                        self.waits_for_data = True
                        batch = yield NextBatch(self.source.arrival())
                        self.waits_for_data = False
                except (StopIteration, StopAsyncIteration):
                    batch = _END
                except BaseException as error:
                    yield from self._meet_error_of_data(error)
                    raise
                if batch is _END:
                    if (yield from self._meet_end_of_data()):
                        break
                    batch = yield from self._fetch_after_restart()
                state.output = None
                state.batch = batch
                if is_busy:
                    if is_timed:
                        watch.data += (perf_counter() - mark) * watch.weight
                    if iteration >= got.due:
                        if (rest := got.dispatch(engine, iteration)) is not None:
                            yield from rest
                        if requests.pending:
                            self._batch = batch
                            yield from self._serve_requests(between_steps=False)
                            self._batch = _END

                state.iteration = iteration = iteration + 1
                if is_busy:
                    if iteration >= started.due:
                        if (rest := started.dispatch(engine, iteration)) is not None:
                            yield from rest
                        if requests.pending:
                            self._batch = batch
                            yield from self._serve_requests(between_steps=False)
                            self._batch = _END
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
                    self.note(error, "the step")
                    raise
                if is_timed:
                    watch.step += (perf_counter() - mark) * watch.weight
                state.output = output
                batch = _END
                self.completed = iteration
                if iteration >= completed.due:
                    dispatch = completed.dispatch
                    if (rest := dispatch(engine, iteration)) is not None:
                        yield from rest
                if requests.pending:
                    yield from self._serve_requests()

                if is_timed:
                    is_timed, watch.weight = False, 0
                    # Asked of anew: the epoch may have begun with another driver.
                    if (had_turn := self.others_had_a_turn) is not None and perf_counter() >= self._next_breath:
                        if not had_turn():  # else the step has waited for something
                            yield Effect.YIELD
                            had_turn()
                        self._next_breath = perf_counter() + BUDGET
        finally:
            self._batch = batch  # what was fetched and not stepped on is not lost
        if self._end_of_epoch > state.iteration:  # max_iters, inside an epoch
            raise Terminated(StopReason.COMPLETED)

    # Events

    def _suspend(self) -> LoopGenerator:
        requests, state = self._requests, self._state
        yield from self._dispatch("INTERRUPT")
        if self.source.must_be_awaited:
            yield self.source.suspend(self.completed + (self._batch is not _END))
        phase = requests.phase
        yield from self._take_no_more_requests()
        requests.pending.discard(Request.INTERRUPT)  # it was asked for again meanwhile, and has been done
        yield Effect.FLUSH
        state.stop_reason = StopReason.INTERRUPTED
        yield Effect.SUSPEND
        requests.phase = phase
        state.stop_reason = None

    def _topics_of_an_iteration(self) -> tuple[Topic, Topic, Topic, Topic]:
        bus = self._bus
        nobody = Topic("", bus)
        has_data = self.source.data is not None
        getting = bus.topic("GET_BATCH_STARTED") if has_data else nobody
        got = bus.topic("GET_BATCH_COMPLETED") if has_data else nobody
        topics = getting, got, bus.topic("ITERATION_STARTED"), bus.topic("ITERATION_COMPLETED")
        for topic in topics:
            topic.reschedule(self._state.iteration)
        return topics

    def _finish_listeners(self) -> LoopGenerator:
        """Give those that asked for it their last event, if it did not come by itself."""
        hot = {  # whose counts the hot path does not keep
            "GET_BATCH_STARTED": self.completed - 1,
            "GET_BATCH_COMPLETED": self.completed - 1,
            "ITERATION_STARTED": self.completed,
            "ITERATION_COMPLETED": self.completed,
        }
        for topic in self._bus.topics:
            count = hot.get(topic.name, topic.count) if self.completed > self._first else topic.count
            if count != NEVER_FIRED:
                yield from topic.finish(self._engine, count)

    # The data

    @property
    def _end_of_epoch(self) -> int:
        length = self._state.epoch_length
        return NEVER if length is None else self._state.epoch_start + length

    @property
    def _is_done(self) -> bool:
        state = self._state
        return self.progress().reaches(state.max_epochs, state.max_iters, state.epoch_length)

    def _look_ahead(self) -> LoopGenerator:
        """Data that cannot be restarted must have more before an epoch is begun for it: no epoch is to be empty."""
        source = self.source
        if not source.is_one_shot or self.completed == self._first:
            return
        if not source.has_ended:
            batch = yield from self._fetch()
            if batch is _END:
                source.end(self.completed)
            else:
                source.unread_batch(batch)
        if source.has_ended:
            raise _Exhausted

    def _fetch(self) -> Generator[Awaitable[Any] | Effect, Any, Any]:
        try:
            batch = self.source.take()
            if batch is PENDING:
                self.waits_for_data = True
                batch = yield NextBatch(self.source.arrival())
                self.waits_for_data = False
        except (StopIteration, StopAsyncIteration):
            return _END
        except BaseException as error:
            yield from self._meet_error_of_data(error)
            raise
        return batch

    def _meet_error_of_data(self, error: BaseException) -> LoopGenerator:
        self.waits_for_data = False
        if isinstance(error, WaitCancelled):
            yield from self._serve_requests()  # which ends the run: nothing else wakes
        elif isinstance(error, Exception):
            self.note(error, f"the data ({self.source.name}), fetching batch {self.completed + 1}")

    def _meet_end_of_data(self) -> Generator[Awaitable[Any] | Effect, Any, bool]:
        """Restart the data, or return True if its end is the end of an epoch of unknown length."""
        state, source = self._state, self.source
        is_empty = source.passed(self.completed) == 0
        self.waits_for_data = False
        source.end(self.completed)
        if self.completed == self._first and (is_empty or source.is_one_shot):
            self._unreported = DataExhausted(self._exhaustion())
            raise self._unreported
        if state.epoch_length is None and self.completed > state.epoch_start:
            state.epoch_length = self.completed - state.epoch_start
            return True
        if source.is_one_shot:
            raise _Exhausted
        yield from self._dispatch("DATALOADER_STOP_ITERATION")
        yield from self._serve_requests(between_steps=False)
        yield from self._restart_data()
        return False

    def _fetch_after_restart(self) -> Generator[Awaitable[Any] | Effect, Any, Any]:
        batch = yield from self._fetch()
        if batch is _END:
            raise _Exhausted
        return batch

    def _restart_data(self) -> LoopGenerator:
        source = self.source
        batch, self._batch = self._batch, _END
        if source.is_one_shot:
            if batch is not _END:
                source.unread_batch(batch)
            return
        if source.must_be_awaited:
            yield source.aclose()
        else:
            source.close()
        source.forget()
        source.restart(self.completed)

    def set_data(self, source: Source) -> None:
        """Have the next batch come from another source. From any thread."""
        self._next_source = source
        self._requests.request(Request.CHANGE_DATA)

    def _change_data(self) -> LoopGenerator:
        new = self._next_source
        assert new is not None, "set before it is asked for"  # noqa: S101
        if self.source.must_be_awaited:
            yield self.source.aclose()
        else:
            self.source.close()
        new.host, self.source.host = self.source.host, None
        new.restart(self.completed)
        self._state.dataloader = new.data
        self.source = new
        self._has_other_data, self._bus.next_due = True, ALWAYS

    # Ends

    def _report(self, error: BaseException) -> LoopGenerator:
        is_cancellation = isinstance(error, self.cancellations)
        self._state.stop_reason = StopReason.CANCELLED if is_cancellation else StopReason.FAILED
        self._requests.phase = Phase.ENDING_EPOCH
        if error is self._unreported:
            yield from self._take_no_more_requests()
            return
        yield Effect.SHIELD
        self._bus.stopwatch.weight = 1
        topic = self._bus.topic("CANCELLED" if is_cancellation else "EXCEPTION_RAISED")
        count = self._bus.count_firing(topic)
        for part in topic.parts():
            try:
                yield from part.dispatch(self._engine, count, () if is_cancellation else (error,)) or ()
            except Exception as another:  # noqa: BLE001 -- the others are to be told too; it is raised with the first
                if another is not error:
                    self.also_raised.append(another)
            finally:
                part.clear()
        try:
            yield from self._take_no_more_requests()
        except Exception as another:  # noqa: BLE001 -- likewise
            self.also_raised.append(another)

    def _close(self, *, gently: bool) -> LoopGenerator:
        self._requests.phase = Phase.IDLE
        if self._is_closed:  # and that is what failed
            return
        self._is_closed = True
        batch, self._batch = self._batch, _END
        if batch is not _END:
            self.source.unread_batch(batch)
        try:
            if self.source.must_be_awaited:
                yield Effect.SHIELD
                yield self.source.aclose(gently=gently)
                yield self.source.leave()
            else:
                self.source.close()
        except Exception as error:
            self.note(error, f"closing the data ({self.source.name})")
            raise

    def can_use(self, fetched: int) -> bool:
        """Say whether this run can use another batch, when it has fetched so many of its iterations'."""
        return fetched < last_iteration(self._state)

    def progress(self) -> Progress:
        """Return what is completed: where to go on from here."""
        return Progress(
            iteration=self.completed,
            epoch=self._state.epoch,
            epoch_start=self._state.epoch_start,
            epoch_is_complete=self._epoch_is_complete,
            position=self.source.position(self.completed),
        )

    def _is_awaitable(self, output: Any) -> bool:
        if is_awaitable(output):
            return True
        if type(output) is not GeneratorType:  # of those, some are and some are not
            self._plain_types.add(type(output))
        return False

    def _exhaustion(self) -> str:
        return tell_exhaustion(self._state, self.source, self.completed, self._first)

    def note(self, error: BaseException, where: str) -> None:
        """Note on an error where it was raised, unless it came from beside the loop, where that was noted."""
        state = self._state
        if error is self._bus.reported:
            return
        error.add_note(f"in {where}, engine {self._bus.name!r}, epoch {state.epoch}, iteration {state.iteration}")

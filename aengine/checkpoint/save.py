"""Saving: when a snapshot is taken, how it is written beside the steps, and what waits for its end.

The threads that meet here: the one that the step runs on takes the snapshot; a thread for each save writes it; the
event loop's waits for the end. Requests come from any thread.
"""

import logging
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal

import anyio
from anyio.to_thread import run_sync as in_thread

from aengine.bus.listeners import NotYet
from aengine.checkpoint.acknowledge import Acknowledgements, acknowledge_of
from aengine.checkpoint.events import (
    DEFERRED_EVENTS,
    FAILURE_EVENTS,
    FINAL_EVENTS,
    REQUESTED,
    AnyEngine,
    CheckpointEvents,
    is_in_step,
)
from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.checkpoint.writer import Saving, Writer
from aengine.drivers.services import Service
from aengine.engine import session_of
from aengine.errors import CheckpointNotWritten, CheckpointWarning, InboxOverflow
from aengine.events import Event, Events
from aengine.state import StopReason
from aengine.threads.dedicated import wait_until_done

_logger = logging.getLogger("aengine.checkpoint")

_RUN_ENDED = (
    "the run ended before the save that was asked for: in a step that did not complete, or while the save before it was"
    " being written"
)

_ACCIDENTS: dict[StopReason | None, str] = {
    StopReason.CANCELLED: Events.CANCELLED.name,
    StopReason.FAILED: Events.EXCEPTION_RAISED.name,
}
"""How a run ends that does not come to its own end, and what is fired then."""


class SaveRequests:
    """Saves that were asked for from beside the loop, and have not been staged. From any thread.

    They are served between two steps of a run. Before it ends it closes them: what was asked for in vain is refused.

    Attributes:
        deferred: the event at which a save was put off, or at which one was asked for without waiting for it; else "".
        is_open: whether there is a run that serves them.
    """

    def __init__(self) -> None:
        self.deferred: str = ""
        self.is_open: bool = False
        self._waiting: list[Future[Saving]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def open(self) -> None:
        """A run begins, which serves them."""
        self.deferred, self.is_open = "", True

    def close(self, why: str = _RUN_ENDED) -> None:
        """The run has ended: refuse those that it did not serve. One that comes later sees `is_open`."""
        self.is_open = False  # before the look at the list, as `add` comes before a look at this: one sees the other
        self.refuse(why)

    def add(self) -> "Future[Saving]":
        """Ask for a save. The future has it when it is staged, or the reason why there is none."""
        request: Future[Saving] = Future()
        with self._lock:
            self._waiting.append(request)
        return request

    def withdraw(self, request: "Future[Saving]") -> bool:
        """Take a request back. Returns False if it was answered already."""
        with self._lock:
            if request not in self._waiting:
                return False
            self._waiting.remove(request)
            return True

    def answer(self, saving: Saving) -> None:
        """Give this save to all that wait."""
        for request in self._take_all():
            request.set_result(saving)

    def refuse(self, why: str | BaseException = _RUN_ENDED) -> None:
        """Tell all that wait why there is none."""
        error = CheckpointNotWritten(why) if isinstance(why, str) else why
        for request in self._take_all():
            request.set_exception(error)

    def _take_all(self) -> list["Future[Saving]"]:
        with self._lock:
            waiting, self._waiting, self.deferred = self._waiting, [], ""
        return waiting


class Saver(Service):
    """Saves the runs of one engine: says when, takes the snapshot, and follows the write to its end.

    `take` is the snapshot of its subscribers, and `follow` their handler: so it is taken after all inline handlers of
    the event, where the step runs, and an error fails the run before its next step. As a service it is awaited by
    `flush()` and at the end of a run, and refuses what was asked for in vain, however the run ends.

    Attributes:
        saved: saves that were committed.
        skipped: saves that were skipped.
        failures: saves that failed.
        saves_the_end: whether the state at the end of a run is to be saved, also of one that fails or is cancelled.
    """

    def __init__(self, writer: Writer, when_busy: Literal["wait", "skip"], on_error: Literal["raise", "log"]) -> None:
        self.saved: int = 0
        self.skipped: int = 0
        self.failures: int = 0
        self.saves_the_end = False
        self._writer = writer
        self._when_busy = when_busy
        self._on_error = on_error
        self._saving: Saving | None = None  # the last
        self._saving_of_end: Saving | None = None  # of a run that failed or was cancelled: its error is only warned of
        self._has_warned_of_end = False
        self._requests = SaveRequests()
        self._is_staging = threading.Lock()  # where the step runs, or, between runs, where save() was called
        self._has_failed = False  # nothing more is saved of this run
        self._acknowledgements = Acknowledgements()

    @property
    def under_way(self) -> Saving | None:
        """The save that is being written, None if there is none."""
        saving = self._saving
        return None if saving is None or saving.is_over else saving

    # As a service

    def run_started(self, engine: AnyEngine) -> None:  # noqa: ARG002 -- a service's signature
        """Serve requests from now on."""
        self._has_failed = self._has_warned_of_end = False
        self._acknowledgements.begin()
        self._requests.open()

    async def flush(self) -> None:
        """Wait until no save is under way, whatever becomes of it. Cancellable; the write goes on."""
        while (saving := self.under_way) is not None:
            await saving.wait()

    async def run_ended(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:  # noqa: ARG002 -- a service's signature
        """Refuse what was asked for in vain. Its subscribers have followed the last save to its end by now."""
        self._close()

    def run_abandoned(self, engine: AnyEngine, reason: StopReason, error: BaseException | None) -> None:  # noqa: ARG002 -- a service's signature
        """Do the same where the run did not get as far as its end."""
        self._close()

    def _close(self) -> None:
        self._requests.close()
        if self._saving is not None:  # a subscriber that was cancelled has not followed it
            self._saving.permit()

    # In a run

    async def open(self) -> None:
        """Take the directory before the first step: no other writer may have it while the run lasts.

        In a thread: a file system across a network takes its time, and so does removing what a killed writer left.

        Raises:
            CheckpointLocked, CheckpointNotWritten: another has it, or it cannot be written to. The run fails.
        """
        try:
            await in_thread(self._writer.open)
        except Exception:
            self._has_failed = True  # and so nothing is saved of it
            raise

    def take(self, event: str, engine: AnyEngine) -> Saving | NotYet | None:
        """Take the snapshot, between two steps, where the step runs, and have it written."""
        before = self.under_way  # before the rest: a save that fails sets `_has_failed` before it is over
        if not self._is_due(event, engine) or self._is_deferred(event, engine):
            return None
        is_requested = bool(self._requests) or self._requests.deferred == REQUESTED
        is_of_end = event == REQUESTED and not (is_requested or self._requests.deferred)
        with self._is_staging:
            if (before := before or self.under_way) is None:
                return self._stage(event, engine, is_of_end=is_of_end)
            if self._when_busy == "wait" or is_requested or is_of_end or event in FINAL_EVENTS:
                return NotYet(before.wait())
            self._requests.deferred = ""
            self.skipped += 1
            return None

    def _stage(self, event: str, engine: AnyEngine, *, is_of_end: bool) -> Saving | None:
        try:
            self._raise_unreported()
            name = self._requests.deferred if event == REQUESTED else event
            if is_of_end:
                name = _ACCIDENTS.get(engine.state.stop_reason, "")
            is_mid_step = event in FAILURE_EVENTS and is_in_step(engine)
            staged = self._writer.stage(name or event, engine, is_mid_step=is_mid_step)
            on_end = partial(self._on_end, acknowledge_of(engine), is_of_end=is_of_end)
            # `follow` permits it, when the services are done: log lines of steps that a checkpoint covers are on the
            # disk before it is committed, or a run that is resumed from it would never write them.
            is_permitted = not session_of(engine).must_prepare_commit
            saving = self._saving = Saving(staged, on_end, is_permitted=is_permitted)
        except Exception as error:
            self.failures += 1
            self._requests.refuse(error)
            if is_of_end:  # what ended the run is to be raised, and nothing beside it
                self._warn_of_end(engine, f"its last state could not be saved: {type(error).__name__}: {error}", error)
                return None
            if self._on_error == "raise":
                self._has_failed = True
                raise
            _log_failure(error)
            return None
        if is_of_end:
            self._saving_of_end = saving
        self._requests.answer(saving)
        return saving

    def _is_due(self, event: str, engine: AnyEngine) -> bool:
        if self._has_failed:
            error = self._saving.error if self._saving is not None else None
            self._requests.refuse(error or _RUN_ENDED)
            return False
        if event == REQUESTED:
            if is_in_step(engine):  # as when that step has failed
                self._requests.refuse()
            return bool(self._requests or self._requests.deferred) or self._is_end_due(engine)
        return event not in FAILURE_EVENTS or self._writer.saved_step != engine.state_dict()["iteration"]

    def _is_end_due(self, engine: AnyEngine) -> bool:
        """Say whether a run has failed or was cancelled whose last state is to be saved, and is not yet.

        Between two steps that state is whole. In a step, it is that of no iteration: never saved, and warned of.
        """
        if not self.saves_the_end or engine.state.stop_reason not in _ACCIDENTS:
            return False
        completed = engine.state_dict()["iteration"]
        if completed in (0, self._writer.saved_step):
            return False
        if is_in_step(engine):
            self._warn_of_end(
                engine, f"it ended in step {completed + 1}, whose changes are in the state, and is not saved"
            )
            return False
        return True

    def _warn_of_end(self, engine: AnyEngine, why: str, error: BaseException | None = None) -> None:
        if self._has_warned_of_end:
            return
        self._has_warned_of_end = True
        saved, last = self._writer.saved_step, "nothing is saved of it"
        if saved is not None:
            last = f"the last step that is saved is {saved}"
        message = f"the run of engine {engine.name!r} did not end as it should: {why}; {last}"
        _logger.warning(message, exc_info=error)
        warnings.warn(message, CheckpointWarning, stacklevel=2)

    def _is_deferred(self, event: str, engine: AnyEngine) -> bool:
        """Put the save off if a run is under way that could not be resumed from here to the same results, bit by bit.

        It is put off also at the user's own events, which may be fired within a step, and when the epoch is about to be
        terminated, which a restored run would not know.
        """
        if event in Events.__members__ or event == REQUESTED:
            ends_epoch = event == Events.ITERATION_COMPLETED.name and engine.should_terminate_single_epoch
            if event not in DEFERRED_EVENTS and not ends_epoch:
                return False
        if not engine.is_running:
            return False
        self._requests.deferred = event
        return engine.fire_event_soon(REQUESTED)

    def _on_end(self, acknowledge: Callable[[Any], Any] | None, saving: Saving, *, is_of_end: bool) -> None:
        """In the thread of a save of a run: if it failed, the run fails before its next step."""
        self._count(acknowledge, saving)
        if saving.error is not None and not saving.is_reported and self._on_error == "raise" and not is_of_end:
            self._has_failed = True

    def _count(self, acknowledge: Callable[[Any], Any] | None, saving: Saving) -> None:
        """In the thread of a save, of which there is one at a time: note how it ended."""
        if saving.error is None:
            self.saved += 1
        else:
            self.failures += 1
        self._acknowledgements.add(acknowledge, saving)

    async def follow(self, engine_of: Callable[[], AnyEngine | None], event: Event[Any, Any]) -> None:
        """Beside the step: wait for the write, and fire what became of it."""
        saving: Saving | None = event.snapshot
        engine = engine_of()
        if saving is None or engine is None:  # it cannot be gone: this is called in a run of it
            return
        try:
            await session_of(engine).before_commit()
            saving.permit()
            await self._wait_for(saving, engine)
        except Exception:  # of a handler of CHECKPOINT_STAGED: it is raised, unless the save has failed as well
            if saving.error is not None and self._on_error == "raise":
                saving.result()
            raise
        except BaseException:
            saving.is_reported = True  # by what ends this: the run was cancelled, or its grace is over
            self._stop(saving)
            self._requests.refuse()  # those that wait for its end, to have a save of their own: the run is over
            raise
        if saving.error is None:
            await self._report_committed(engine, saving)
        elif saving is self._saving_of_end:
            saving.is_reported = True
            self._warn_of_end(engine, f"its last state was not saved: {saving.error}", saving.error)
        elif self._on_error == "raise":
            saving.result()
        else:
            saving.is_reported = True
            _log_failure(saving.error)

    async def _wait_for(self, saving: Saving, engine: AnyEngine) -> None:
        """Fire that it is staged, and wait for its end, even if a handler of that event fails."""
        try:
            await self._fire(engine, CheckpointEvents.CHECKPOINT_STAGED, saving.step)
        except Exception:
            await saving.wait()
            raise
        await saving.wait()

    async def _report_committed(self, engine: AnyEngine, saving: Saving) -> None:
        """Fire that it is committed, and then have the data acknowledge what it covers."""
        await self._fire(engine, CheckpointEvents.CHECKPOINT_COMMITTED, saving.result())
        await self._acknowledgements.call(engine)

    async def _fire(self, engine: AnyEngine, event: CheckpointEvents, payload: Any) -> None:
        try:
            await engine.emit(event, payload)
        except InboxOverflow:
            if engine.is_running:
                raise
            # Between runs nothing empties an inbox. That is no failure of the save.
            _logger.warning("%s was sent to an inbox that is full, and no run is under way", event.name)

    def _raise_unreported(self) -> None:
        """Raise the error of the save before, if what waited for that one was cancelled."""
        saving = self._saving
        if saving is not None and saving.is_unawaited and saving.error is not None and not saving.is_reported:
            saving.result()

    def _stop(self, saving: Saving) -> None:
        saving.stop()
        self._writer.stop()

    # Asked for

    async def save(self, engine: AnyEngine) -> CheckpointInfo:
        """Save before the next step, or at once if no run is under way. See `Checkpoint.save`."""
        if session_of(engine).is_inside:
            raise RuntimeError(
                "save() waits for the end of the step, which waits for it here: call checkpoint.save_soon()"
            )
        while True:
            request = self._requests.add()
            try:
                is_in_run = engine.fire_event_soon(REQUESTED)
                if is_in_run and not self._requests.is_open:  # of that run only the clean-up is left
                    self._requests.refuse()
                if is_in_run or not self._requests.withdraw(request):
                    await wait_until_done(request)
                    saving = request.result()
                    await saving.wait()
                    return saving.result().checkpoint
            finally:
                del request  # holds the error, whose traceback holds this frame
            with self._is_staging:
                before = self.under_way
                if before is None:
                    self._raise_unreported()
                    on_end = partial(self._count, acknowledge_of(engine))
                    saving = self._saving = Saving(self._writer.stage("", engine), on_end)
                    break
            await before.wait()  # and meanwhile a run may begin
        try:
            await self._wait_for(saving, engine)
        except BaseException:
            saving.is_unawaited = True
            raise
        committed = saving.result()
        await self._report_committed(engine, saving)
        return committed.checkpoint

    def save_soon(self, engine: AnyEngine) -> None:
        """Have a run under way save before its next step. See `Checkpoint.save_soon`."""
        self._requests.deferred = REQUESTED
        if not engine.fire_event_soon(REQUESTED):
            self._requests.deferred = ""
            raise RuntimeError("save_soon() asks a run under way, and there is none: write  await checkpoint.save()")

    async def settle(self) -> None:
        """Wait until no save is under way, and raise the error of the last if it was not reported. Cancellable."""
        await self.flush()
        saving = self._saving
        if saving is not None and saving.error is not None and not saving.is_reported:
            saving.result()

    def refuse_requests(self) -> None:
        """Refuse what was asked for, and what will be before another run begins: the Checkpoint leaves its engine."""
        if self._requests.deferred:  # nothing waits for it, so it would be lost in silence
            _logger.warning("the Checkpoint was closed or detached before a save that was asked for: there is none")
        self._requests.close("the Checkpoint was closed or detached before the save that was asked for")

    async def close(self) -> None:
        """Settle, and let go of the directory. On cancellation the save under way is given up."""
        try:
            await self.settle()
        finally:
            with anyio.CancelScope(shield=True):
                if (saving := self.under_way) is not None:
                    self._stop(saving)
                    await saving.wait()
                await in_thread(self._writer.close)
            if (saving := self._saving) is not None and saving.error is not None:
                # For what still follows it. The traceback of the error itself would hold the engine.
                saving.error = CheckpointNotWritten(str(saving.error))
            self._saving = self._saving_of_end = None


def _log_failure(error: BaseException) -> None:
    _logger.error("a checkpoint failed, and the run goes on", exc_info=error)

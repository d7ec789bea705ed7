"""Checkpoint: saves a run while it goes on, and puts it back where it stood.

The snapshot is taken inline, between two steps, where the step runs; the write goes on beside the steps.
"""

import logging
import os
import threading
import warnings
from functools import partial
from typing import Any, Literal, Self

import anyio
from anyio.to_thread import run_sync as in_thread

from aengine.bus.emitter import RemovableEventHandle
from aengine.bus.listeners import NotYet
from aengine.checkpoint.arguments import check_choice, check_directory, check_engine, check_keep, check_serializer
from aengine.checkpoint.capture.parts import parts_of
from aengine.checkpoint.capture.randomness import RandomStates
from aengine.checkpoint.formats.contents import Contents
from aengine.checkpoint.formats.serializers import Serializer, TorchFile
from aengine.checkpoint.occasions import (
    ACCIDENTS,
    LAST_WORDS,
    REQUESTED,
    WITHIN,
    CheckpointEvents,
    is_in_a_step,
)
from aengine.checkpoint.requests import Requests
from aengine.checkpoint.restore import AnyEngine, Restoring
from aengine.checkpoint.save import Saving
from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.checkpoint.store.retention import Keep
from aengine.checkpoint.store.store import Store
from aengine.errors import CheckpointWarning, InboxOverflow
from aengine.events import AnyEvent, Event, Events, FilteredEvent, Selector, selectors

_logger = logging.getLogger("aengine.checkpoint")


class Checkpoint(Restoring):
    """Saves the state of a run into a directory, while the run goes on, and restores it.

        checkpoint = Checkpoint("checkpoints", {"model": model, "optimizer": optimizer})
        checkpoint.attach(trainer, Events.ITERATION_COMPLETED(every=500))
        await checkpoint.restore(trainer)  # the newest that is whole, if there is any
        await trainer.run(loader, max_epochs=10)

    What is saved belongs to one instant: after the inline handlers of the event, before the next step. Besides what is
    handed in that is, without being asked for: the engine (counters, the position of the data), the states of python's,
    numpy's and torch's random number generators and of the DataLoader's own, `engine.state.metrics`, and those of the
    engine's handlers that have a `state_dict`. A run that is restored from it goes on as if it had never been stopped,
    to the last bit, as long as its steps are deterministic. What is due where no step is complete, at ITERATION_STARTED
    or at events of one's own, say, is saved when one is. A run that is interrupted in such a place, and saved there,
    draws again what handlers and data have drawn since the last step.

    One Checkpoint serves one engine and one directory; it has the directory for itself from `restore()`, or from the
    start of the run, until `close()`, or the end of its `async with`.

    Args:
        directory: where the checkpoints are; made when the first one is written.
        state: what has `state_dict` and `load_state_dict`, or a dictionary of that, nested. torch's, numpy's and
            python's random generators may be in it. DistributedDataParallel and compiled modules are unwrapped.
            An engine in it, such as an evaluator that a handler runs, is saved with its metrics and its handlers that
            have a `state_dict`; once restored, it begins anew at its next run if it was done, as in memory.
        keep: which checkpoints stay.
        serializer: how the state is written; by default `torch.save`, loaded with `weights_only=True` only.
        when_busy: what happens when a save is due while the one before is being written: "wait" has the loop wait,
            "skip" goes on without (counted in `skipped`); the last ones of a run are never skipped.
        on_error: what a save that fails does: "raise" fails the run before its next step, "warn" gives a
            CheckpointWarning, counts it in `failures`, and goes on.
        write_in: "thread", or "process", which takes nothing from steps that are short.

    Attributes:
        skipped: saves that were skipped.
        failures: saves that failed and were warned of.
        damaged: what `restore` and `load` found damaged.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        state: Any,
        *,
        keep: Keep | None = None,
        serializer: Serializer | None = None,
        when_busy: Literal["wait", "skip"] = "wait",
        on_error: Literal["raise", "warn"] = "raise",
        write_in: Literal["thread", "process"] = "thread",
    ) -> None:
        keep = Keep() if keep is None else keep
        serializer = TorchFile() if serializer is None else serializer
        check_directory(directory)
        check_keep(keep)
        check_serializer(serializer)
        check_choice("when_busy", when_busy, "wait", "skip")
        check_choice("on_error", on_error, "raise", "warn")
        check_choice("write_in", write_in, "thread", "process")
        contents = Contents(serializer, in_process=write_in == "process")
        super().__init__(parts_of(state), Store(directory, keep), contents)
        self.skipped = 0
        self.failures = 0
        self._when_busy = when_busy
        self._on_error = on_error
        self._requests = Requests()
        self._is_staging = threading.Lock()  # where the step runs, or, between runs, where save_now() was called
        self._has_failed = False  # nothing more is saved of this run
        self._handles: dict[RemovableEventHandle, Selector | None] = {}  # of each, where it saves, if it does

    @property
    def committed(self) -> CheckpointInfo | None:
        """The last checkpoint that this object has written, None before the first."""
        return self._writer.committed

    # Saving

    def attach(self, engine: AnyEngine, event: AnyEvent) -> RemovableEventHandle:
        """Save at an event, filtered or not, or at several: also on time, by `every=timedelta(minutes=10)`.

        Returns what detaches it again. At CANCELLED and EXCEPTION_RAISED it saves unless the step before the one that
        did not complete is saved already. What is saved then may be in the middle of that step: it is marked so, and
        `restore()` prefers any that is not.

        Raises:
            TypeError: this is no engine, or no event.
            ValueError: this Checkpoint serves another engine; or the engine has no such event.
            RuntimeError: it saves at that very event, with that very filter, already.
        """
        check_engine(engine, "attach(engine, event)")
        chosen = selectors(event)
        self._serve(engine)
        for index, one in enumerate(chosen):
            if one in (*self._handles.values(), *chosen[:index]):
                raise RuntimeError(f"this Checkpoint is attached to {one} already, and would save twice there")
        handles = {
            engine.subscribe(
                FilteredEvent(one.name, one.filter),
                partial(self._follow, engine),
                snapshot=partial(self._take, one.name),
                name=f"Checkpoint({str(self.directory)!r})",
            ): one
            for one in chosen
        }
        self._handles |= handles

        def remove() -> None:
            for handle in handles:
                handle.remove()
                self._handles.pop(handle, None)

        return RemovableEventHandle(remove)

    async def save_now(self) -> CheckpointInfo:
        """Save before the next step, or at once if no run is under way, and return when it is committed.

        From any task but the run's own. Cancellable: the write goes on then.

        Raises:
            CheckpointError: it failed. A run under way fails as well, unless `on_error="warn"`.
            RuntimeError: called in the step or in an inline handler, which the loop waits for; or not attached yet.
        """
        engine = self._served()
        if engine.is_inside:
            raise RuntimeError(
                "save_now() waits for the end of the step, which waits for it here: call checkpoint.save_soon()"
            )
        while True:
            request = self._requests.add()
            if self._ask(engine) or not self._requests.withdraw(request):
                saving = await request.granted()
                await saving.wait()
                return self._outcome(saving)
            with self._is_staging:
                before = self._under_way()
                if before is None:
                    self._look_back()
                    saving = self._saving = Saving(self._writer.stage("", engine), lambda _: None)
                    break
            await before.wait()  # and meanwhile a run may begin
        return await self._see_to(saving, engine)

    def save_soon(self) -> None:
        """Have a run under way save before its next step. From anywhere, also in steps and handlers; never waits.

        Raises:
            RuntimeError: no run is under way.
        """
        engine = self._served()
        self._requests.wanted_by = CheckpointEvents.CHECKPOINT_REQUESTED.name
        if not self._ask(engine):
            self._requests.wanted_by = ""
            raise RuntimeError(
                "save_soon() asks a run under way, and there is none: write  await checkpoint.save_now()"
            )

    async def drain(self) -> None:
        """Wait until no save is under way. Cancellable.

        Raises:
            CheckpointError: one failed, and nobody has been told yet.
        """
        while (saving := self._saving) is not None and not saving.is_over:
            await saving.wait()
        if saving is not None and saving.error is not None and not saving.is_told:
            self._outcome(saving)

    async def close(self) -> None:
        """Wait for the save under way, detach from the engine, and let others have the directory.

        Cancellable: the save under way is given up then. It can be attached again, also to another engine.

        Raises:
            CheckpointError: as `drain` does.
        """
        for handle in self._handles:
            handle.remove()
        self._handles, self._engine, self._writer.saved_step = {}, None, None
        self._requests.refuse("the Checkpoint was closed before the save that was asked for")
        try:
            await self.drain()
        finally:
            with anyio.CancelScope(shield=True):
                if (saving := self._under_way()) is not None:
                    saving.stop()
                    self._contents.stop()
                    await saving.wait()
                await in_thread(self._contents.close)
            if self._saving is not None:
                self._saving.error = None  # whose traceback would hold the engine
                self._saving = None
            self._store.unlock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await self.close()

    def _serve(self, engine: AnyEngine) -> None:
        if self._engine is engine:
            return
        if self._engine is not None:
            raise ValueError(
                f"this Checkpoint serves engine {self._engine.name!r}: make another one, with a directory of its own,"
                f' for {engine.name!r}, or hand that in as state, {{"{engine.name}": engine}}'
            )
        self._engine = engine
        if engine.randomness is None:
            engine.randomness = RandomStates()
        engine.register_events(*CheckpointEvents)
        self._handles[engine.add_event_handler(Events.STARTED, self._begin)] = None
        self._handles[engine.add_event_handler(Events.CANCELLED, self._ask_again)] = None
        self._handles[engine.add_event_handler(Events.EXCEPTION_RAISED, self._ask_again)] = None
        self.attach(engine, CheckpointEvents.CHECKPOINT_REQUESTED)

    def _served(self) -> AnyEngine:
        if self._engine is None:
            raise RuntimeError("this Checkpoint serves no engine yet: call  checkpoint.attach(engine, event)  first")
        return self._engine

    def _begin(self) -> None:
        """A run begins: no other writer may have the directory."""
        self._has_failed = True  # nothing is saved of a run that fails for this
        self._store.lock()
        self._contents.start()
        self._has_failed = False

    def _take(self, event: str, engine: AnyEngine) -> Saving | NotYet | None:
        """Take the snapshot, between two steps, where the step runs, and have it written."""
        before = self._under_way()  # before the rest: one that fails says so before it is over
        if not self._is_due(event, engine) or self._is_put_off(event, engine):
            return None
        with self._is_staging:
            if (before := before or self._under_way()) is not None:
                is_asked_for = self._requests or self._requests.wanted_by == REQUESTED
                if self._when_busy == "skip" and not is_asked_for and event not in LAST_WORDS:
                    self._requests.wanted_by = ""
                    self.skipped += 1
                    return None
                return NotYet(before.wait())
            try:
                self._look_back()
                name = self._requests.wanted_by if event == REQUESTED else event
                is_mid_step = event in ACCIDENTS and is_in_a_step(engine)
                write = self._writer.stage(name or event, engine, is_mid_step=is_mid_step)
                saving = self._saving = Saving(write, self._finished)
            except Exception as error:
                self._requests.answer(None, error)
                if self._on_error == "raise":
                    self._has_failed = True
                    raise
                self._warn(error)
                return None
            self._requests.answer(saving)
            return saving

    def _ask(self, engine: AnyEngine) -> bool:
        """Have the loop serve the requests before its next step. Whom it does not come to is told so at its end."""
        return engine.fire_between_steps(CheckpointEvents.CHECKPOINT_REQUESTED, at_end=self._requests.refuse)

    def _ask_again(self) -> None:
        """The run ends, perhaps while the loop was waiting to serve those who ask: it does so before it is over."""
        if self._requests:
            self._ask(self._served())

    def _look_back(self) -> None:
        """Raise the error of the save before, if who waited for that one was cancelled, and so nobody was told."""
        saving = self._saving
        if saving is not None and saving.is_left and saving.error is not None and not saving.is_told:
            self._outcome(saving)

    def _is_due(self, event: str, engine: AnyEngine) -> bool:
        if self._has_failed:
            error = self._saving.error if self._saving is not None else None
            self._requests.refuse() if error is None else self._requests.answer(None, error)
            return False
        if event == REQUESTED:
            if is_in_a_step(engine):  # as when that step has failed
                self._requests.refuse()
            return bool(self._requests or self._requests.wanted_by)
        return event not in ACCIDENTS or self._writer.saved_step != engine.state_dict()["iteration"]

    def _is_put_off(self, event: str, engine: AnyEngine) -> bool:
        """Have it saved later, if a run is under way and this is no place where it could be gone on with, bitwise."""
        is_of_the_loop = event in Events.__members__ or event == REQUESTED
        if is_of_the_loop and event not in WITHIN and not self._ends_epoch(event, engine):
            return False
        if not engine.is_running:
            return False
        self._requests.wanted_by = event
        return self._ask(engine)

    def _ends_epoch(self, event: str, engine: AnyEngine) -> bool:
        """Say whether the epoch is to be ended here, which a run that is restored would not know."""
        return event == Events.ITERATION_COMPLETED.name and engine.should_terminate_single_epoch

    def _finished(self, saving: Saving) -> None:
        """In the thread of a save of a run: at its next boundary the run is over, if this failed."""
        if saving.error is not None and not saving.is_told and self._on_error == "raise":
            self._has_failed = True

    async def _follow(self, engine: AnyEngine, event: Event) -> None:
        """Beside the step: wait for the write, and tell of it."""
        saving: Saving | None = event.snapshot
        if saving is None:
            return
        try:
            await self._wait_for(saving, engine)
        except Exception:  # of a handler of CHECKPOINT_STAGED: that one is raised, and this goes before it
            if saving.error is not None and self._on_error == "raise":
                self._outcome(saving)
            raise
        except BaseException:
            saving.is_told = True  # by what ends this: the run was cancelled, or its grace is over
            saving.stop()
            self._contents.stop()
            self._requests.refuse()  # those who wait for its end to have their own save: the run is over
            raise
        if saving.error is None:
            await self._tell(engine, CheckpointEvents.CHECKPOINT_COMMITTED)
        elif self._on_error == "raise":
            self._outcome(saving)
        else:
            saving.is_told = True
            self._warn(saving.error)

    async def _see_to(self, saving: Saving, engine: AnyEngine) -> CheckpointInfo:
        """Between runs: wait for the write, and tell of it."""
        try:
            await self._wait_for(saving, engine)
        except BaseException:
            saving.is_left = True
            raise
        info = self._outcome(saving)
        await self._tell(engine, CheckpointEvents.CHECKPOINT_COMMITTED)
        return info

    async def _wait_for(self, saving: Saving, engine: AnyEngine) -> None:
        """Tell that it is staged, and wait for its end, even if a handler that is told so fails."""
        try:
            await self._tell(engine, CheckpointEvents.CHECKPOINT_STAGED)
        except Exception:
            await saving.wait()
            raise
        await saving.wait()

    async def _tell(self, engine: AnyEngine, event: CheckpointEvents) -> None:
        try:
            await engine.emit(event)
        except InboxOverflow:
            if engine.is_running:
                raise
            # Nobody empties an inbox between runs, and a save is not a failure for that.
            _logger.warning("%s was sent to an inbox that is full, and no run is under way", event.name)

    def _outcome(self, saving: Saving) -> CheckpointInfo:
        if saving.error is not None:
            saving.is_told = True
            raise saving.error
        assert saving.info is not None, "it is over"  # noqa: S101
        return saving.info

    def _warn(self, error: BaseException) -> None:
        self.failures += 1
        _logger.error("a checkpoint failed, and the run goes on", exc_info=error)
        warnings.warn(f"a checkpoint failed, and the run goes on: {error}", CheckpointWarning, stacklevel=2)

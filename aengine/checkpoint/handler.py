"""Checkpoint: saves a run while it goes on, and puts it back where it stood.

The snapshot is taken inline, between two steps, where the step runs; the write goes on beside the steps.
"""

import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import anyio
import torch
from anyio.to_thread import run_sync as in_thread

from aengine.checkpoint.contents import Contents
from aengine.checkpoint.files import Stopped
from aengine.checkpoint.keep import Keep
from aengine.checkpoint.manifest import CheckpointInfo
from aengine.checkpoint.parts import gather, parts_of, scatter
from aengine.checkpoint.randomness import RandomStates
from aengine.checkpoint.resume import Found, Reader
from aengine.checkpoint.saving import Request, Saving
from aengine.checkpoint.serializers import Serializer, TorchFile
from aengine.checkpoint.store import Store
from aengine.engine import Engine
from aengine.errors import CheckpointNotFound, CheckpointNotWritten, CheckpointWarning, EngineBusy
from aengine.events import AnyEvent, Event, EventEnum, Events, FilteredEvent, selectors
from aengine.publishing import RemovableEventHandle
from aengine.topic import NotYet

AnyEngine: TypeAlias = Engine[Any, Any]

_logger = logging.getLogger("aengine.checkpoint")

_LAST_WORDS = frozenset({"TERMINATE", "INTERRUPT", "COMPLETED", "CANCELLED", "EXCEPTION_RAISED"})
"""Events after which there may be no other: what is due there is never skipped."""

_ACCIDENTS = frozenset({"CANCELLED", "EXCEPTION_RAISED"})
"""Events that can come in the middle of a step: what was saved of the step before is not replaced then."""


_VERSIONS = {
    "aengine": sys.modules["aengine"].__version__,  # to import it here would be to import upwards
    "torch": str(torch.__version__),
    "python": platform.python_version(),
}


class CheckpointEvents(EventEnum):
    """What a Checkpoint fires on its engine, beside the step. Subscribe to them."""

    CHECKPOINT_REQUESTED = "checkpoint_requested"
    CHECKPOINT_STAGED = "checkpoint_staged"
    CHECKPOINT_COMMITTED = "checkpoint_committed"
    CHECKPOINT_DAMAGED = "checkpoint_damaged"


class Checkpoint:
    """Saves the state of a run into a directory, while the run goes on, and restores it.

        checkpoint = Checkpoint("checkpoints", {"model": model, "optimizer": optimizer})
        checkpoint.attach(trainer, Events.ITERATION_COMPLETED(every=500))
        await checkpoint.restore(trainer)  # the newest that is whole, if there is any
        await trainer.run(loader, max_epochs=10)

    What is saved belongs to one instant: after the inline handlers of the event, before the next step. Besides what is
    handed in that is, without being asked for: the engine (counters, the position of the data), the states of python's,
    numpy's and torch's random number generators and of the DataLoader's own, `engine.state.metrics`, and those of the
    engine's handlers that have a `state_dict`. A run that is restored from it goes on as if it had never been stopped,
    to the last bit, as long as its steps are deterministic. At GET_BATCH_STARTED, GET_BATCH_COMPLETED,
    ITERATION_STARTED and INTERRUPT, what handlers and data have drawn since the last step is drawn again.

    One Checkpoint serves one engine and one directory; it has the directory for itself from `restore()`, or from the
    start of the run, until `close()`, or the end of its `async with`.

    Args:
        directory: where the checkpoints are; made when the first one is written.
        state: what has `state_dict` and `load_state_dict`, or a dictionary of that, nested. torch's, numpy's and
            python's random generators may be in it. DistributedDataParallel and compiled modules are unwrapped.
        keep: which checkpoints stay.
        serializer: how the state is written; by default `torch.save`, loaded with `weights_only=True` only.
        when_busy: what happens when a save is due while the one before is being written: "wait" has the loop wait,
            "skip" goes on without (counted in `skipped`); the last ones of a run are never skipped.
        on_error: what a save that fails does: "raise" fails the run before its next step, "warn" gives a
            CheckpointWarning, counts it in `failures`, and goes on.
        write_in: "thread", or "process", which takes nothing from steps that are short.

    Attributes:
        committed: the last checkpoint that this object has written, None before the first.
        skipped: saves that were skipped.
        failures: saves that failed and were warned of.
        damaged: what `restore` found damaged.

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
        _check_choice("when_busy", when_busy, "wait", "skip")
        _check_choice("on_error", on_error, "raise", "warn")
        _check_choice("write_in", write_in, "thread", "process")
        self.committed: CheckpointInfo | None = None
        self.skipped = 0
        self.failures = 0
        self.damaged: tuple[Path, ...] = ()
        self._parts = parts_of(state)
        self._keep = keep or Keep()
        self._store = Store(directory, self._keep)
        self._contents = Contents(serializer or TorchFile(), in_process=write_in == "process")
        self._when_busy = when_busy
        self._on_error = on_error
        self._engine: AnyEngine | None = None
        self._saving: Saving | None = None
        self._requests: list[Request] = []
        self._is_wanted = False  # by save_soon(), which nobody waits for
        self._has_failed = False
        self._place: Any = None  # where the loop stood at the last save
        self._restored: Path | None = None
        self._went_back_to: CheckpointInfo | None = None
        self._handles: list[RemovableEventHandle] = []

    @property
    def directory(self) -> Path:
        """Where the checkpoints are."""
        return self._store.directory

    # Saving

    def attach(self, engine: AnyEngine, event: AnyEvent) -> RemovableEventHandle:
        """Save at an event, filtered or not, or at several: also on time, by `every=timedelta(minutes=10)`.

        Returns what detaches it again. At CANCELLED and EXCEPTION_RAISED it saves unless the step before the one that
        did not complete is saved already: a model may then be in the middle of a step.

        Raises:
            ValueError: this Checkpoint serves another engine.
        """
        self._serve(engine)
        handles = [
            engine.subscribe(
                FilteredEvent(one.name, one.filter),
                self._follow,
                snapshot=partial(self._take, one.name),
                name=f"Checkpoint({str(self.directory)!r})",
            )
            for one in selectors(event)
        ]
        self._handles += handles

        def remove() -> None:
            for handle in handles:
                handle.remove()

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
        request = Request()
        self._requests.append(request)
        if not engine.fire_between_steps(CheckpointEvents.CHECKPOINT_REQUESTED):
            self._requests.remove(request)
            return await self._save_here(engine)
        await request.bell.wait()
        if request.error is not None:
            raise request.error
        assert request.saving is not None, "it has one or the other"  # noqa: S101
        await request.saving.wait()
        return self._outcome(request.saving)

    def save_soon(self) -> None:
        """Have a run under way save before its next step. From anywhere, also in steps and handlers; never waits.

        Raises:
            RuntimeError: no run is under way.
        """
        engine = self._served()
        self._is_wanted = True
        if not engine.fire_between_steps(CheckpointEvents.CHECKPOINT_REQUESTED):
            self._is_wanted = False
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

        Raises:
            CheckpointError: as `drain` does.
        """
        for handle in self._handles:
            handle.remove()
        try:
            await self.drain()
        finally:
            await in_thread(self._contents.close)
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
        self._handles.append(engine.add_event_handler(Events.STARTED, self._begin))
        self._handles.append(engine.add_event_handler(Events.CANCELLED, self._ask_again))
        self._handles.append(engine.add_event_handler(Events.EXCEPTION_RAISED, self._ask_again))
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
        under_way = self._saving
        is_busy = under_way is not None and not under_way.is_over  # before the rest: one that fails says so before that
        if not self._is_due(event, engine):
            return None
        if under_way is not None and is_busy:
            if self._when_busy == "skip" and event not in _LAST_WORDS and not self._requests:
                self.skipped += 1
                return None
            return NotYet(under_way.wait())
        try:
            saving = self._saving = self._stage(event, engine)
        except Exception as error:
            self._refuse(error)
            if self._on_error == "raise":
                self._has_failed = True
                raise
            self._warn(error)
            return None
        for request in self._take_requests():
            request.saving = saving
            request.bell.ring()
        return saving

    def _take_requests(self) -> list[Request]:
        requests, self._requests, self._is_wanted = self._requests, [], False
        return requests

    def _refuse(self, error: BaseException | None = None) -> None:
        """Answer those who wait that there will be no save."""
        for request in self._take_requests():
            request.error = error or CheckpointNotWritten(
                "the run ended before the save that was asked for: in a step that did not complete, or while the save"
                " before it was being written"
            )
            request.bell.ring()

    def _ask_again(self) -> None:
        """The run ends, perhaps while the loop was waiting to serve those who ask: it does so before it is over."""
        if self._requests:
            self._served().fire_between_steps(CheckpointEvents.CHECKPOINT_REQUESTED)

    def _is_due(self, event: str, engine: AnyEngine) -> bool:
        if self._has_failed:
            self._refuse(self._saving.error if self._saving is not None else None)
            return False
        if event == CheckpointEvents.CHECKPOINT_REQUESTED.name:
            if _is_in_a_step(engine):  # as when that step has failed
                self._refuse()
            return bool(self._requests) or self._is_wanted
        return event not in _ACCIDENTS or self._place != _place_of(engine.state_dict())

    def _stage(self, event: str, engine: AnyEngine) -> Saving:
        self._store.lock()
        tree = gather(self._parts, engine)
        step = int(tree["engine"]["iteration"])
        staged = self._contents.stage(tree)
        self._place = _place_of(tree["engine"])
        about: dict[str, Any] = {
            "step": step,
            "epoch": engine.state.epoch,
            "event": event,
            "metrics": _numbers(engine.state.metrics),
            "versions": _VERSIONS,
        }
        metric = self._keep.metric
        if metric is not None and metric not in about["metrics"]:
            _logger.warning(
                "checkpoint of step %d: engine.state.metrics has no number %r, by which the best are kept", step, metric
            )
        return Saving(partial(self._write, staged, about), self._finished)

    def _write(self, staged: Any, about: dict[str, Any], is_stopped: Callable[[], bool]) -> CheckpointInfo:
        """In the thread of a save: write, commit, and only then remove what is not to be kept."""
        if self._went_back_to is not None:
            left, self._went_back_to = self._store.abandon_after(self._went_back_to), None
            if left:
                _logger.warning(
                    "the run went back: %d later checkpoints were set aside, %s the first", len(left), left[-1]
                )
        try:
            with self._store.begin(about["step"]) as draft:
                info = draft.commit(**about, extra=self._contents.write(staged, draft, is_stopped))
        except Stopped as error:
            raise CheckpointNotWritten(
                f"the checkpoint of step {about['step']} was not written: it was given up with the run, whose grace was"
                " over. Nothing of it stays"
            ) from error
        self.committed = info
        self._store.retain([path for path in (self._restored, info.path) if path is not None])
        return info

    def _finished(self, saving: Saving) -> None:
        if saving.error is not None and self._on_error == "raise":
            self._has_failed = True

    async def _follow(self, event: Event) -> None:
        """Beside the step: wait for the write, and tell of it."""
        saving, engine = event.snapshot, self._served()
        if saving is None:
            return
        try:
            await engine.emit(CheckpointEvents.CHECKPOINT_STAGED)
            await saving.wait()
        except BaseException:
            saving.is_told = True  # by what ends this: the run was cancelled, or its grace is over
            saving.stop()
            self._contents.stop()
            self._refuse()  # those who wait for its end to have their own save: the run is over
            raise
        if saving.error is None:
            await engine.emit(CheckpointEvents.CHECKPOINT_COMMITTED)
        elif self._on_error == "raise":
            self._outcome(saving)
        else:
            saving.is_told = True
            self._warn(saving.error)

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

    async def _save_here(self, engine: AnyEngine) -> CheckpointInfo:
        self._has_failed = False
        while (saving := self._saving) is not None and not saving.is_over:
            await saving.wait()
        saving = self._saving = self._stage("", engine)
        await engine.emit(CheckpointEvents.CHECKPOINT_STAGED)
        await saving.wait()
        info = self._outcome(saving)
        await engine.emit(CheckpointEvents.CHECKPOINT_COMMITTED)
        return info

    # What there is

    def list(self) -> list[CheckpointInfo]:
        """Return the committed checkpoints, oldest first. Not verified: see `restore`."""
        return self._store.list()

    def pin(self, step: int) -> None:
        """Have the checkpoint of a step stay, whatever `keep` says.

        Raises:
            CheckpointNotFound: there is none of this step.
        """
        self._store.pin(self._store.find(step))

    def unpin(self, step: int) -> None:
        """Let `keep` decide over it again."""
        self._store.unpin(self._store.find(step))

    # Restoring

    async def restore(
        self, engine: AnyEngine, which: int | str | os.PathLike[str] | None = None, *, strict: bool = True
    ) -> CheckpointInfo | None:
        """Put the engine and the state back to a checkpoint, before `run()`. Returns which, None if there is none yet.

        Files are read in a thread, and verified by their checksums. The state is loaded in the calling task.

        Args:
            engine: the one to go on, with its handlers attached.
            which: None for the newest that is whole; "must" for the same, which must then exist; a step; or a path.
                One that was asked for by step or path is taken, or it is an error; when the run then saves, later ones
                are set aside as abandoned, so that they are not gone on from. Of the newest, a damaged one is set
                aside, CHECKPOINT_DAMAGED is fired and a warning given, and the one before is tried.
            strict: whether the checkpoint must have just the parts and handlers that there are here.

        Raises:
            CheckpointNotFound: there is none, and there must be.
            CheckpointDamaged: none of those that there are is whole: a run is not begun anew in their place.
            CheckpointMismatch: it has other keys or shapes than the state here. No other is tried then.
            EngineBusy: the engine runs.
            ValueError: this Checkpoint serves another engine.

        Cancellable while it reads; nothing is changed then.
        """
        self._serve(engine)
        if engine.is_running:
            raise EngineBusy(f"engine {engine.name!r} is running: restore() comes before run()")
        reader = Reader(self._store, partial(self._contents.read, live=partial(gather, self._parts, engine)))
        if which is None or which == "must":
            found = await self._newest(engine, reader, must=which is not None)
        else:
            found = await in_thread(reader.read, which)
        if found is None:
            return None
        info = found.info
        scatter(found.tree, self._parts, engine, strict=strict)
        self._restored, self._place = info.path, None
        self._went_back_to = None if which is None or which == "must" else info
        _logger.info("restored step %d, epoch %d, from %s", info.step, info.epoch, info.path)
        return info

    async def _newest(self, engine: AnyEngine, reader: Reader, *, must: bool) -> Found | None:
        try:
            found = await in_thread(reader.newest)
        finally:
            for problem in reader.problems:
                self.damaged += (problem.path,)
                said = f"a checkpoint is damaged, and was not used ({problem.path}): {problem.why}"
                _logger.warning(said)
                warnings.warn(said, CheckpointWarning, stacklevel=3)
                await engine.emit(CheckpointEvents.CHECKPOINT_DAMAGED)
        if found is None and must:
            raise CheckpointNotFound(f"there is no checkpoint in {self.directory}, and one must be there")
        return found


def _check_choice(name: str, value: Any, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{name}= is one of {', '.join(map(repr, choices))}, got {value!r}")


def _is_in_a_step(engine: AnyEngine) -> bool:
    """Say whether a step was begun that did not complete: the state is that of no step then."""
    return bool(engine.state.iteration != engine.state_dict()["iteration"])


def _place_of(saved: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return where the loop stands, by its `state_dict`."""
    return saved["iteration"], saved["progress"]["epoch"], saved["progress"]["epoch_is_complete"]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return those metrics that are single numbers, to show and to choose by."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            continue
    return numbers

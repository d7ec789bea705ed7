"""Checkpoint: saves a run while it goes on, and puts it back where it stood.

The snapshot is taken inline, between two steps, where the step runs; the write goes on beside the steps.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self
from weakref import ref

import anyio
from anyio.to_thread import run_sync as in_thread

from aengine.arguments import check_choice
from aengine.attachment import Attachment
from aengine.bus.emitter import RemovableEventHandle
from aengine.callables import named
from aengine.checkpoint.capture.parts import Choice, capture, parts_of, restore
from aengine.checkpoint.capture.randomness import RandomStates
from aengine.checkpoint.events import REQUESTED, AnyEngine, CheckpointEvents, CheckpointStatistics
from aengine.checkpoint.formats.contents import Contents
from aengine.checkpoint.formats.serializers import Serializer, TorchFile, check_serializer
from aengine.checkpoint.save import Saver
from aengine.checkpoint.store.files import printable
from aengine.checkpoint.store.find import Finder, Found, Which, check_which
from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.checkpoint.store.retention import Keep
from aengine.checkpoint.store.store import Store
from aengine.checkpoint.writer import Writer
from aengine.engine import Engine, session_of
from aengine.errors import CheckpointWarning, EngineBusy
from aengine.events import EventLike, Events, FilteredEvent, Selector, selectors
from aengine.keywords import explain_wrong_call
from aengine.threads.dedicated import DedicatedThread, wait_until_done

_logger = logging.getLogger("aengine.checkpoint")


@explain_wrong_call
class Checkpoint:
    """Saves the state of a run into a directory, while the run goes on, and restores it.

        async with Checkpoint("checkpoints", {"model": model, "optimizer": optimizer}) as checkpoint:
            checkpoint.attach(trainer, Events.ITERATION_COMPLETED(every=500))
            await checkpoint.restore()  # the newest that is whole, if there is any
            await trainer.run(loader, max_epochs=10)

    A checkpoint is a snapshot of one instant: after the inline handlers of the event, before the next step. Besides the
    state that is handed in, it holds the engine (its counters, the position in the data), the states of python's,
    numpy's and torch's random number generators and of the DataLoader's own, `engine.state.metrics`, and the engine's
    handlers that have a `state_dict`. A run that is restored from it gives the same results, bit by bit, as one that
    was never stopped, as long as its steps are deterministic.

    A save that is due within an iteration, at ITERATION_STARTED or at an event of one's own, say, is taken when the
    step is complete. Only a run that is interrupted there, and saved, draws again what handlers and data have drawn
    since the last step.

    One Checkpoint serves one engine and one directory. It locks the directory, from `restore()` or the start of the run
    on, until `aclose()` or the end of its `async with`.

    Args:
        directory: where the checkpoints are; made when the first one is written.
        state: what has `state_dict` and `load_state_dict`, or a dictionary of that, nested. torch's, numpy's and
            python's random generators may be in it. DistributedDataParallel and compiled modules are unwrapped. Of a
            model that is frozen but for an adapter, pass `trainable(model)`.
            An engine in it, such as an evaluator that a handler runs, is saved with its metrics and its handlers that
            have a `state_dict`; once restored, it begins anew at its next run if it was done, as in memory.
        keep: which checkpoints stay.
        when_busy: what happens when a save is due while the one before is being written: "wait" has the loop wait,
            "skip" goes on without (counted in `statistics()`); the last ones of a run are never skipped.
        on_error: what a save that fails does: "raise" fails the run before its next step, "log" logs it and goes on.
            Both are counted in `statistics()`.
        write_in: "thread", or "process", which takes nothing from steps that are short.
        rng: what a run that goes on from `restore` draws. "process": what it would have drawn without the break, since
            python's, numpy's and torch's generators are set back, for all that this process does. Right for a program
            that trains. "data": those are left alone, so that no other job of a server draws the same numbers again;
            the data still goes on where it stood, in its order. Generators in the state are set back in any case.
        serializer: how the state is written; by default `torch.save`, loaded with `weights_only=True` only.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        state: Any,
        *,
        keep: Keep = Keep(),  # noqa: B008 -- it is frozen
        when_busy: Literal["wait", "skip"] = "wait",
        on_error: Literal["raise", "log"] = "raise",
        write_in: Literal["thread", "process"] = "thread",
        rng: Literal["process", "data"] = "process",
        serializer: Serializer = TorchFile(),  # noqa: B008 -- it has no state
    ) -> None:
        if not isinstance(directory, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Checkpoint(directory, state) takes a path first, got {type(directory).__qualname__}")
        if not isinstance(keep, Keep):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"keep= is a Keep, such as Keep(last=3), got {keep!r}")
        check_serializer(serializer)
        check_choice(when_busy, "when_busy=", ["wait", "skip"])
        check_choice(on_error, "on_error=", ["raise", "log"])
        check_choice(write_in, "write_in=", ["thread", "process"])
        check_choice(rng, "rng=", ["process", "data"])
        self._reseeds = rng == "process"
        self._parts = parts_of(state)
        self._contents = Contents(serializer, in_process=write_in == "process")
        self._name = printable(os.fspath(directory))
        self._store = Store(directory, keep)
        self._writer = Writer(self._parts, self._store, self._contents)
        self._saver = Saver(self._writer, when_busy, on_error)
        self._damaged: tuple[Path, ...] = ()
        self._attachment = Attachment(self, takes_several=True)
        self._service: list[RemovableEventHandle] = []  # what serves all of its events
        self._events: dict[RemovableEventHandle, Selector] = {}  # of each, where it saves
        self._attached: list[RemovableEventHandle] = []  # of each call of attach() that is not removed

    @property
    def directory(self) -> Path:
        """Where the checkpoints are."""
        return self._store.directory

    @property
    def last_saved(self) -> CheckpointInfo | None:
        """The last checkpoint that this object has written, None before the first."""
        return self._writer.last_saved

    def statistics(self) -> CheckpointStatistics:
        """Return what became of the saves so far. Cheap; at any time, from any thread."""
        saver = self._saver
        is_saving = saver.under_way is not None
        return CheckpointStatistics(saver.saved, saver.skipped, saver.failures, self._damaged, is_saving)

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
        """Let `keep` decide again whether the checkpoint of a step stays.

        Raises:
            CheckpointNotFound: there is none of this step.
        """
        self._store.unpin(self._store.find(step))

    # Saving

    def attach(self, engine: AnyEngine, event: EventLike | None = None) -> RemovableEventHandle:
        """Save at an event, filtered or not, or at several: also on time, by `every=timedelta(minutes=10)`.

        Without an event it saves only when it is told to, by `save` and `save_soon`. It may be attached to further
        events of its engine. What is returned removes this one. With the last of them it serves the engine no more: a
        save that is asked for is refused, one that is being written is completed, and it may be attached again, to any
        engine. The directory stays locked until `aclose()`.

        With `at_end=True` the last state is saved however the run ends: also where it fails or is cancelled, within the
        engine's `grace`, unless that happens in a step, which then did not complete. That state is the one of no
        iteration: it is not saved, and a CheckpointWarning says which step is.

        At CANCELLED and EXCEPTION_RAISED it saves unless the step before the one that did not complete is saved
        already. What is saved then may be in the middle of that step: it is marked so, and `restore()` prefers any that
        is not.

        The engine is not kept by this: keep it in a variable.

        Raises:
            TypeError: this is no engine, or no event.
            ValueError: the engine has no such event.
            RuntimeError: it is attached to another engine; or it saves at that very event, with that very filter,
                already.
        """
        advice = f", or hand engine {getattr(engine, 'name', '')!r} in as a part of the state"
        removal = self._attachment.begin(engine, self._listen(engine, event), advice)
        self._attached.append(removal)
        return RemovableEventHandle(partial(self._remove, removal))

    async def save(self) -> CheckpointInfo:
        """Save before the next step, or at once if no run is under way, and return when it is committed.

        From any task but the run's own. Cancellable: the write goes on then.

        Raises:
            CheckpointError: it failed. A run under way fails as well, unless `on_error="log"`.
            RuntimeError: called in the step or in an inline handler, which the loop waits for; or it is attached to no
                engine, or to one that is gone.
        """
        return await self._saver.save(self._served())

    def save_soon(self) -> None:
        """Have a run under way save before its next step. From anywhere, also in steps and handlers; never waits.

        Raises:
            RuntimeError: no run is under way; or it is attached to no engine, or to one that is gone.
        """
        self._saver.save_soon(self._served())

    async def flush(self) -> None:
        """Wait until no save is under way. Cancellable.

        Raises:
            CheckpointError: one failed, and that was not raised anywhere yet.
        """
        await self._saver.settle()

    async def aclose(self) -> None:
        """Wait for the save under way, detach from the engine, and let others have the directory.

        Cancellable: the save under way is given up then. It can be attached again, also to another engine.

        Raises:
            CheckpointError: as `flush` does.
        """
        for removal in tuple(self._attached):
            self._remove(removal)
        await self._saver.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()

    def _listen(self, engine: AnyEngine, event: EventLike | None) -> Iterator[RemovableEventHandle]:
        """Have the engine served, and saved at an event; yield what removes each of these."""
        if event is not None:
            engine.on(event)  # raises for what is no event of this engine
        chosen = () if event is None else selectors(event)
        for index, one in enumerate(chosen):
            if one in (*self._events.values(), *chosen[:index]):
                raise RuntimeError(f"this Checkpoint is attached to {one} already, and would save twice there")
        if not self._attached:
            self._begin_service(engine)
        yield RemovableEventHandle(self._end_service_of_last)
        for one in chosen:
            handle = self._subscribe(engine, FilteredEvent(one.name, one.filter), one, f"at {one}")
            self._events[handle] = one
            yield RemovableEventHandle(partial(self._unsubscribe, handle))
        self._look_for_end()

    def _remove(self, removal: RemovableEventHandle) -> None:
        if removal in self._attached:
            self._attached.remove(removal)
            removal.remove()

    def _begin_service(self, engine: AnyEngine) -> None:
        session_of(engine).use_randomness(RandomStates())
        engine.register_events(*CheckpointEvents, REQUESTED)
        lock_directory = named(self._saver.open, f"checkpoint: lock ({self._name})")  # as statistics() shows it
        # Also where the run fails or is cancelled: the loop may have been about to serve a request, and waiting for the
        # save before. It is served in the clean-up then, before the run is over.
        requested = Events.CANCELLED | Events.EXCEPTION_RAISED | REQUESTED
        self._service = [
            engine.add_event_handler(Events.STARTED, lock_directory),
            engine.add_service(self._saver, name=f"checkpoint ({self._name})"),
            self._subscribe(engine, requested, Selector(REQUESTED), "on request"),
        ]

    def _end_service_of_last(self) -> None:
        """Serve the engine no more, if nothing else is attached to it."""
        if self._attached:
            return
        service, self._service = self._service, []
        self._saver.refuse_requests()  # before the service is removed, which would say that the run has ended
        for handle in service:
            handle.remove()

    def _subscribe(self, engine: AnyEngine, event: EventLike, where: Selector, role: str) -> RemovableEventHandle:
        return engine.subscribe(
            event,
            partial(self._saver.follow, ref(engine)),  # weakly: the engine has this, and is freed by reference count
            snapshot=partial(self._saver.take, where.name),
            name=f"checkpoint: save {role} ({self._name})",
        )

    def _unsubscribe(self, handle: RemovableEventHandle) -> None:
        handle.remove()
        self._events.pop(handle, None)
        self._look_for_end()

    def _look_for_end(self) -> None:
        filters = [where.filter for where in self._events.values()]
        self._saver.saves_the_end = any(one is not None and one.at_end for one in filters)

    def _served(self) -> AnyEngine:
        engine = self._attachment.engine
        if engine is None and self._attached:
            raise RuntimeError(
                "the engine that this Checkpoint is attached to is gone: keep it in a variable, since this does not"
            )
        if engine is None:
            raise RuntimeError(
                "this Checkpoint is attached to no engine: call  checkpoint.attach(engine, event)  first, without the"
                " event, where it is to save only when it is told to"
            )
        return engine

    # Restoring

    @explain_wrong_call
    async def restore(
        self, which: Which = "latest", *, required: bool = False, strict: bool = True
    ) -> CheckpointInfo | None:
        """Put the engine and the state back to a checkpoint, before `run()`. Returns which, None if there is none yet.

        The engine is the one that it is attached to. Its handlers are attached before this, as theirs is restored, too.

        Files are read in a thread, and verified by their checksums. The state is loaded in the calling task; random
        number generators are set back as the run begins, or not, as `rng` says.

        Args:
            which: "latest" for the newest that is whole; "best" for the best that is whole, by the `metric` and `mode`
                of `keep`; a step; or a `pathlib.Path`. One that was asked for by step or path is taken, or it is an
                error. Of the newest and the best, a damaged one is set aside,
                CHECKPOINT_DAMAGED is fired and a warning given, and the next is tried. The newest is one from the
                middle of a step only if there is no other; a warning says so. When a run goes on from another than the
                newest and then saves, later ones are set aside as abandoned, so that no run goes on from them.
            required: whether it is an error that there is no checkpoint yet.
            strict: whether the checkpoint must have just the parts and handlers that there are here.

        Raises:
            CheckpointNotFound: there is none, and it is required; or none has a number by which it could be the best.
            CheckpointDamaged: none of those that there are is whole: a run is not begun anew in their place.
            CheckpointMismatch: it has other keys or shapes than the state here. No other is tried then.
            EngineBusy: the engine runs.
            TypeError, ValueError: an argument is wrong; "best" was asked for, and `keep` has no metric.
            RuntimeError: it is attached to no engine, or to one that is gone.

        Cancellable while it reads; nothing is changed then.
        """
        _refuse_engine(which, "restore")
        check_which(which, self._store)
        engine = self._served()
        read = partial(self._contents.read, live=partial(capture, self._parts, engine))
        found = await self._find(which, Finder(self._store, read), engine, "restore", required=required)
        if found is None:
            return None
        restore(found.tree, self._parts, engine, strict=strict, reseeds=self._reseeds)
        info = found.info
        _logger.info("restored step %d, epoch %d, from %s", info.step, info.epoch, printable(str(info.path)))
        self._writer.go_on_from(info, is_newest=which == "latest")
        return info

    @explain_wrong_call
    async def load(self, which: Which = "latest", *, only: Iterable[str] | None = None) -> CheckpointInfo:
        """Load the state of a checkpoint, or some parts of it, and nothing else. Returns which.

            await checkpoint.load("best", only=["model"])

        For the end of a training, or a program that has but the model. The engine, its data, its handlers and the
        random states stay as they are; so does everything on the disk, and no engine is needed. It reads and verifies
        as `restore` does. A damaged one is warned of and passed over, and not set aside.

        Args:
            which: as for `restore`; the newest by default.
            only: the names of the parts that are loaded, as in `state`; all of them, which the checkpoint must then
                have and no other, by default.

        Raises:
            CheckpointNotFound: there is none, or none has a number by which it could be the best.
            CheckpointDamaged: it is not whole; of the newest and the best: none of them is.
            CheckpointMismatch: it has no such part, or one of other keys or shapes. No other is tried then.
            EngineBusy: the engine that this Checkpoint serves runs, and would go on with what is loaded.
            TypeError, ValueError: an argument is wrong, or `only` has a name that the state has not; "best" was asked
                for, and `keep` has no metric.

        Cancellable while it reads; nothing is changed then.
        """
        _refuse_engine(which, "load")
        check_which(which, self._store)
        choice = Choice(self._parts, only)
        read = partial(self._contents.read, live=choice.capture, places=choice.places)
        finder = Finder(self._store, read, sets_aside=False)
        found = await self._find(which, finder, self._attachment.engine, "load", required=True)
        assert found is not None, "it must be there"  # noqa: S101
        choice.restore(found.tree)
        path = printable(str(found.info.path))
        _logger.info("loaded %s of step %d from %s", only or "the state", found.info.step, path)
        return found.info

    async def _find(
        self, which: Which, finder: Finder, engine: AnyEngine | None, caller: str, *, required: bool
    ) -> Found | None:
        _refuse_running(engine, caller)
        await self._saver.flush()  # what is being written may be the one
        if isinstance(which, str):
            await in_thread(finder.lock)  # for good: so not by what may be given up
        try:
            found = await _read(finder, which, required=required)
        except BaseException as error:
            await self._report(finder, engine if isinstance(error, Exception) else None)
            raise
        await self._report(finder, engine)
        _refuse_running(engine, caller)  # once more: a run may have begun while this was awaited
        if found is not None and found.info.is_mid_step and which == "latest":
            step, path = found.info.step, found.info.path
            _warn(
                f"there is no checkpoint but of the middle of a step: the one after step {step} had begun, and what"
                f" that had changed is in it ({path})",
                stacklevel=5,
            )
        return found

    async def _report(self, finder: Finder, engine: AnyEngine | None) -> None:
        """Say what was found damaged; to the engine, too, unless there is none or nothing more can be awaited."""
        for problem in finder.problems:
            self._damaged += (problem.path,)
            _warn(f"a checkpoint is damaged, and was not used ({problem.path}): {problem.why}", stacklevel=6)
            if engine is not None:
                engine.register_events(*CheckpointEvents)
                await engine.emit(CheckpointEvents.CHECKPOINT_DAMAGED, problem)


async def _read(finder: Finder, which: Which, *, required: bool) -> Found | None:
    """Have the checkpoint found and read, in a thread. On cancellation the thread is left to end by itself."""
    thread = DedicatedThread("aengine checkpoint: read")  # a daemon: a disk that hangs must not keep the process
    reading = thread.submit(partial(finder.find, which, required=required))
    thread.abandon()
    try:
        try:
            await wait_until_done(reading)
        except BaseException:
            if not finder.give_up():  # it changes the disk: it is to be over before anything else happens
                with anyio.CancelScope(shield=True):
                    await wait_until_done(reading)
            raise
        return reading.result()
    finally:
        del reading  # holds the error, whose traceback holds this frame


def _refuse_engine(which: Any, call: str) -> None:
    if isinstance(which, Engine):
        raise TypeError(
            f"{call}(which) takes no engine, since it is the one that the Checkpoint is attached to: call "
            f" checkpoint.attach(engine, event)  and then  await checkpoint.{call}()"
        )


def _refuse_running(engine: AnyEngine | None, caller: str) -> None:
    if engine is not None and engine.is_running:
        raise EngineBusy(f"engine {engine.name!r} is running: {caller}() comes before run(), or after it")


def _warn(message: str, stacklevel: int) -> None:
    """Warn at the call of the Checkpoint's method, so many calls above: one of them is that of `explain_wrong_call`."""
    message = printable(message)
    _logger.warning(message)
    warnings.warn(message, CheckpointWarning, stacklevel=stacklevel)

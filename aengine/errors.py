"""Every error and warning of the package.

    AengineError
    ├── EngineBusy (RuntimeError)      run() of an engine that is running
    ├── DataExhausted (ValueError)     the data gave nothing when more was asked of it
    ├── HandlerTimeout (TimeoutError)  a concurrent handler outlived the grace period
    ├── InboxOverflow (RuntimeError)   an inbox with overflow="error" was full
    ├── StrayCancellation (RuntimeError)  a task of the run was cancelled from outside of it
    └── CheckpointError (RuntimeError) whatever goes wrong with checkpoints
        ├── CheckpointNotFound         there is none, or not the one that was asked for
        ├── CheckpointDamaged          what is on disk does not verify
        ├── CheckpointMismatch         it is whole, but does not fit what it is to be loaded into
        ├── CheckpointNotWritten       a save failed; the checkpoints before it are as they were
        ├── CheckpointLocked           another writer has the directory
        └── NotSerializable (TypeError)  something in the state could not be loaded back

    DataExhaustedWarning (UserWarning) the data ended before the run was complete
    CheckpointWarning (UserWarning)    a save failed or a checkpoint was damaged, and the run goes on

What a user's own step, handler or data raises is never wrapped: it comes out of `run()` as the very object
that was raised, with a note that says where. Arguments that are wrong are plain ValueErrors and TypeErrors.
"""

import logging

_logger = logging.getLogger("aengine.engine")


class AengineError(Exception):
    """The root of what aengine itself raises."""


class EngineBusy(AengineError, RuntimeError):
    """The engine is running already: one engine runs one loop at a time."""


class DataExhausted(AengineError, ValueError):
    """The data has nothing to give, and cannot be restarted to give more."""


class HandlerTimeout(AengineError, TimeoutError):
    """Concurrent handlers did not finish what they had accepted within the engine's `grace` seconds."""


class InboxOverflow(AengineError, RuntimeError):
    """An event met a full inbox whose policy is `overflow="error"`, or one that nobody empties: no run is under way."""


class StrayCancellation(AengineError, RuntimeError):
    """A task of the run was cancelled, and not by the run: natively, as `asyncio.run()` does to what is left.

    A handler that lets out the cancellation of something that it awaited is one, too. A cancellation of the run itself
    takes its place.
    """


class CheckpointError(AengineError, RuntimeError):
    """The root of what goes wrong with checkpoints. None of it is ever silent."""


class CheckpointNotFound(CheckpointError):
    """There is no checkpoint where one must be, or not the one that was asked for."""


class CheckpointDamaged(CheckpointError):
    """A checkpoint is cut, changed or incomplete, so that nothing of it can be trusted."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint is whole, but was made of something else: other keys, or other shapes."""


class CheckpointNotWritten(CheckpointError):
    """A save failed. Nothing of it is left behind, and the checkpoints before it are as they were."""


class CheckpointLocked(CheckpointError):
    """Another writer has the directory: two would remove each other's checkpoints."""


class NotSerializable(CheckpointError, TypeError):
    """Something in the state could not be loaded back with `weights_only=True`, so it is not saved either."""


class CheckpointWarning(UserWarning):
    """A save failed, or a checkpoint was damaged and set aside, and the run goes on."""


class DataExhaustedWarning(UserWarning):
    """The data ended before the run was complete, and could not be restarted. The run was closed cleanly."""


def raise_failures(name: str, failures: list[BaseException], cancellation: BaseException | None = None) -> None:
    """Raise a single failure as the very object it is, several as a group; without any, the cancellation, if any."""
    failures = list({id(error): error for error in failures}.values())
    try:
        for index, error in enumerate(failures):
            if isinstance(error, KeyboardInterrupt | SystemExit):
                for other in failures[:index] + failures[index + 1 :]:
                    _logger.error("engine %r failed as well", name, exc_info=other)
                del error
                raise failures[index]
            del error
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise BaseExceptionGroup(f"several failures in a run of engine {name!r}", failures)
        if cancellation is not None:
            raise cancellation
    finally:
        # An error's traceback holds this frame: no cycle may hold the engine.
        failures = []
        cancellation = None

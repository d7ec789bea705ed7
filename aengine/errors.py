"""Every error and warning of the package.

    AengineError
    ├── EngineBusy (RuntimeError)         run() was called while the engine was running
    ├── DataExhausted (ValueError)        the data had no batch to give, and cannot be restarted
    ├── HandlerTimeout (TimeoutError)     a handler or a clean-up took longer than the grace period
    ├── InboxOverflow (RuntimeError)      an inbox with overflow="error" was full
    ├── StrayCancellation (RuntimeError)  something in the run was cancelled, and the run was not
    └── CheckpointError (RuntimeError)    something went wrong with a checkpoint
        ├── CheckpointNotFound            there is none, or not the one that was requested
        ├── CheckpointDamaged             its files are not those that were written
        ├── CheckpointMismatch            it is whole, but does not fit what it is to be loaded into
        ├── CheckpointNotWritten          a save failed; the checkpoints before it are unchanged
        ├── CheckpointLocked              another writer is using the directory
        └── NotSerializable (TypeError)   something in the state could not be loaded again

    DataExhaustedWarning (UserWarning) the data ended before the run was complete
    DataOrderWarning (UserWarning)     the data of a run that is resumed comes in another order
    CheckpointWarning (UserWarning)    a save failed or a checkpoint was damaged, and the run continues

An exception of a user's own step, handler or data is never wrapped: `run()` raises the very same object, with a note
that says where it came from. Wrong arguments are plain ValueErrors and TypeErrors.
"""

import logging

_logger = logging.getLogger("aengine.engine")


class AengineError(Exception):
    """The base of all errors that are aengine's own."""


class EngineBusy(AengineError, RuntimeError):
    """The engine is running already: an engine runs one loop at a time."""


class DataExhausted(AengineError, ValueError):
    """The data has no batch to give, and cannot be restarted."""


class HandlerTimeout(AengineError, TimeoutError):
    """Concurrent handlers had not emptied their inboxes, or a clean-up was not over, after `grace` seconds."""


class InboxOverflow(AengineError, RuntimeError):
    """An inbox with `overflow="error"` was full; or one with "wait", while no run is under way that empties it."""


class StrayCancellation(AengineError, RuntimeError):
    """Something that the run awaited was cancelled, but the run was not. Its cause is that cancellation.

    For instance: a step, a handler, the data, a service or the body of `iterate()` awaits a future which other code has
    cancelled, and does not catch its CancelledError. Let out as one, that would end the run as if it were cancelled,
    and a task group would drop it without a word. Also raised where one task of the run is cancelled by itself, by
    asyncio's `Task.cancel()`. A run that is itself cancelled as well raises its own cancellation instead.
    """


class CheckpointError(AengineError, RuntimeError):
    """The base of all errors of checkpoints. None of them is ever silent."""


class CheckpointNotFound(CheckpointError):
    """There is no checkpoint where there must be one, or not the one that was requested."""


class CheckpointDamaged(CheckpointError):
    """A checkpoint is truncated, changed or incomplete, so that nothing of it can be trusted."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint is whole, but is one of something else: its keys or shapes differ."""


class CheckpointNotWritten(CheckpointError):
    """A save failed. None of its files remain, and the checkpoints before it are unchanged."""


class CheckpointLocked(CheckpointError):
    """Another writer is using the directory: two would remove each other's checkpoints."""


class NotSerializable(CheckpointError, TypeError):
    """Something in the state could not be loaded with `weights_only=True`, so it is not saved in the first place."""


class CheckpointWarning(UserWarning):
    """A save failed, or a checkpoint was damaged and set aside, and the run continues."""


class DataExhaustedWarning(UserWarning):
    """The data ended before the run was complete, and cannot be restarted. The run ended cleanly."""


class DataOrderWarning(UserWarning):
    """The data of a run that is resumed comes in another order than before: samples of the pass are seen twice."""


def raise_failures(name: str, failures: list[BaseException], cancellation: BaseException | None = None) -> None:
    """Raise a single failure as the very object it is, several as a group; without any, the cancellation, if any.

    A KeyboardInterrupt or SystemExit among several is raised by itself, for only so does it end the program; the others
    are logged.
    """
    failures = list({id(error): error for error in failures}.values())  # one may have been reported from two places
    try:
        exits = [index for index, error in enumerate(failures) if isinstance(error, KeyboardInterrupt | SystemExit)]
        if exits:
            for other in failures[: exits[0]] + failures[exits[0] + 1 :]:
                if not isinstance(other, KeyboardInterrupt):  # the same Ctrl-C, or another one
                    _logger.error("engine %r failed as well", name, exc_info=other)
            raise failures[exits[0]]
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise BaseExceptionGroup(f"several failures in a run of engine {name!r}", failures)
        if cancellation is not None:
            raise cancellation
    finally:
        # The traceback of what is raised refers to this frame. If the frame still referred to the error, the two would
        # form a cycle, and all that the traceback refers to (the engine, the model, memory of a GPU) would stay until
        # the garbage collector runs. So no variable of this function names the raised error, and these are emptied.
        failures = []
        cancellation = None

"""Every error and warning of the package.

    AengineError
    ├── EngineBusy (RuntimeError)      run() of an engine that is running
    ├── DataExhausted (ValueError)     the data gave nothing when more was asked of it
    ├── HandlerTimeout (TimeoutError)  a concurrent handler outlived the grace period
    ├── InboxOverflow (RuntimeError)   an inbox with overflow="error" was full
    └── StrayCancellation (RuntimeError)  a task of the run was cancelled from outside of it

    DataExhaustedWarning (UserWarning) the data ended before the run was complete

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
    """An event met a full inbox whose policy is `overflow="error"`."""


class StrayCancellation(AengineError, RuntimeError):
    """A task of the run was cancelled, and not by the run: natively, as `asyncio.run()` does to what is left.

    A handler that lets out the cancellation of something that it awaited is one, too. A cancellation of the run itself
    takes its place.
    """


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

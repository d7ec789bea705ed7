"""A task of a run that hands over its error, where another place is to raise it."""

from collections.abc import Awaitable, Callable


async def guarded(
    task: Callable[[], Awaitable[object]],
    on_error: Callable[[BaseException], object],
    stray: Callable[[], BaseException],
) -> None:
    """Await `task()`. What it raises is given to `on_error`, and not raised: a task group would wrap it in a group.

    Args:
        task: does all its work inside a shielded scope of its own, by which the run cancels it.
        on_error: called on the event loop's thread, with the very object that was raised.
        stray: makes the error to report for a cancellation that is not the run's; the cancellation is its cause.
    """
    try:
        await task()
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 -- handed over
        # KeyboardInterrupt and SystemExit, too: asyncio would leave its event loop with them at once, without clean-up.
        on_error(error)
    except BaseException as error:  # noqa: BLE001 -- handed over
        # A cancellation. That of the task's own scope ends in that scope, and the shield keeps out those of the scopes
        # around it. So this is a native one, as `asyncio.run()` cancels what is left at its end, or that of something
        # which the task awaited. Let out, it would end the task without a word, and the run would wait for it forever.
        lost = stray()
        lost.__cause__ = error
        on_error(lost)
        del lost  # the cancellation's traceback holds this frame: no cycle may hold the engine

"""The scope in which the user's code runs."""

import anyio
import pytest

from aengine.threads.event_loop import CancelOnceScope

pytestmark = pytest.mark.every_event_loop


async def test_a_scope_that_is_cancelled_twice_and_then_held_lets_what_is_inside_go_on() -> None:
    """No timer of the first cancellation ends the hold: neither at its next look nor at the end of its grace."""
    scope = CancelOnceScope(grace=0.05)
    has_gone_on = False

    async def cancel_twice() -> None:
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
        scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(cancel_twice)
        with scope:
            with pytest.raises(anyio.get_cancelled_exc_class()):
                await anyio.sleep_forever()
            scope.take_requests()
            scope.hold()
            await anyio.sleep(0.1)
            has_gone_on = True
    assert has_gone_on

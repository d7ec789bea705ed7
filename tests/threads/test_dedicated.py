"""DedicatedThread: calls in order, their outcome, and a call that is no longer waited for."""

import gc
import threading
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
import torch

from aengine.threads.dedicated import DedicatedThread, wait_until_done
from aengine.threads.thread_state import ThreadState


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


async def test_calls_are_made_on_one_thread_and_in_order() -> None:
    thread = DedicatedThread("mine")
    seen: list[tuple[int, int]] = []
    for number in range(3):
        await thread.call(lambda n: seen.append((n, threading.get_ident())), number)
    thread.stop()
    assert [number for number, _ in seen] == [0, 1, 2]
    assert len({ident for _, ident in seen} - {threading.get_ident()}) == 1
    assert not threads_named("mine")


async def test_no_thread_is_started_before_the_first_call() -> None:
    thread = DedicatedThread("mine")
    assert not threads_named("mine")
    thread.stop()  # nothing to be stopped
    assert await thread.call(threading.current_thread) is not threading.current_thread()
    thread.stop()


async def test_what_a_call_raises_is_raised_where_it_is_awaited_and_nothing_holds_it_then() -> None:
    class Mark(Exception):
        pass

    def fail() -> None:
        raise Mark

    thread = DedicatedThread("mine")
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(Mark):
            await thread.call(fail)
        assert await thread.call(int, "7") == 7  # and the thread goes on
        assert not [thing for thing in gc.get_objects() if type(thing) is Mark]
    finally:
        gc.enable()
        thread.stop()


async def test_a_cancelled_call_is_abandoned_with_its_thread() -> None:
    thread = DedicatedThread("mine")
    begun, release = threading.Event(), threading.Event()
    abandoned: list[threading.Thread] = []

    def hang() -> None:
        abandoned.append(threading.current_thread())
        begun.set()
        release.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(thread.call, hang)
        await anyio.to_thread.run_sync(begun.wait)
        group.cancel_scope.cancel()
    assert await thread.call(threading.current_thread) is not abandoned[0]  # though the first call is still under way
    thread.stop()
    assert abandoned[0].is_alive()
    release.set()
    abandoned[0].join()


async def test_several_tasks_wait_for_one_call_and_a_cancelled_one_does_not_end_it() -> None:
    thread = DedicatedThread("mine")
    release = threading.Event()
    future = thread.submit(lambda: release.wait() and "done")
    thread.abandon()  # it ends with this call
    woken: list[Any] = []

    async def wait(*, task_status: anyio.abc.TaskStatus[anyio.CancelScope]) -> None:
        with anyio.CancelScope() as scope:
            task_status.started(scope)
            await wait_until_done(future)
            woken.append(future.result())

    async with anyio.create_task_group() as group:
        for _ in range(2):
            await group.start(wait)
        (await group.start(wait)).cancel()
        release.set()
    assert woken == ["done", "done"]


async def test_calls_have_the_context_of_the_caller_and_the_settings_of_the_thread() -> None:
    mark: ContextVar[str] = ContextVar("mark")
    with torch.no_grad():
        thread = DedicatedThread("mine", ThreadState().entered)
    mark.set("the caller's")
    assert await thread.call(lambda: (mark.get(), torch.is_grad_enabled())) == ("the caller's", False)
    thread.stop()


async def test_a_call_knows_whether_it_is_on_the_thread() -> None:
    thread = DedicatedThread("mine")
    assert not thread.is_here
    assert await thread.call(lambda: thread.is_here)
    abandoned = threading.Event()

    def ask_late() -> bool:
        abandoned.wait()
        return thread.is_here

    future = thread.submit(ask_late)
    thread.abandon()
    abandoned.set()
    await wait_until_done(future)
    assert future.result()
    thread.stop()
    assert not thread.is_here

"""What belongs to a thread and must cross to the worker: context variables, torch's settings."""

import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from contextvars import Context, copy_context
from typing import Any


def context_for_thread() -> Context:
    """Return a copy of the caller's context for code on another thread, where no event loop runs."""
    context = copy_context()
    if sniffio := sys.modules.get("sniffio"):  # it keeps in the context which event loop runs, and none runs there
        context.run(sniffio.current_async_library_cvar.set, None)
    return context


class ThreadState:
    """torch's settings of one thread, to be had on another: those of the caller of `run()`, for its step on the worker.

    Grad mode, inference mode, autocast, default device and CUDA device. Nothing if torch is not loaded.
    """

    def __init__(self) -> None:
        """Record the settings of the calling thread."""
        self._torch: Any = sys.modules.get("torch")
        if torch := self._torch:
            self._grad = torch.is_grad_enabled()
            self._inference = torch.is_inference_mode_enabled()
            self._device = torch.get_default_device()
            self._cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            self._autocast = [
                (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
                for kind in (["cpu"] if self._cuda is None else ["cpu", "cuda"])
            ]
            self._caches = torch.is_autocast_cache_enabled()

    @contextmanager
    def entered(self) -> Generator[None]:
        """Give the calling thread these settings for a while; then what it had before."""
        with ExitStack() as entered:
            if self._torch is not None:
                self._enter(self._torch, entered)
            yield

    def _enter(self, torch: Any, entered: ExitStack) -> None:
        torch.get_num_threads()  # or convolutions do not keep to `set_num_threads()` on a thread that has never asked
        if self._cuda is not None:
            entered.enter_context(torch.cuda.device(self._cuda))
        before = torch.get_default_device()
        if self._device != before:
            torch.set_default_device(self._device)
        entered.callback(_restore_device, torch, before)
        # Each of these restores, on leaving, also what a step has left behind.
        entered.enter_context(torch.inference_mode(self._inference))
        entered.enter_context(torch.set_grad_enabled(self._grad))
        # Set, instead of entering an autocast(): torch drops its cache of cast weights when the outermost autocast is
        # left. That must be the one in the step, or the next step would compute with the weights of this one.
        for kind, dtype, enabled in self._autocast:
            entered.callback(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind))
            entered.callback(torch.set_autocast_dtype, kind, torch.get_autocast_dtype(kind))
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        entered.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(self._caches)
        entered.callback(torch.clear_autocast_cache)


def _restore_device(torch: Any, before: Any) -> None:
    if torch.get_default_device() != before:
        torch.set_default_device(None if before.type == "cpu" else before)

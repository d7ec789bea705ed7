"""What belongs to a thread and must cross to the worker: context variables, torch's settings."""

import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from contextvars import Context, ContextVar, Token, copy_context
from operator import is_
from typing import Any


def context_for_thread() -> Context:
    """Return a copy of the caller's context for code on another thread, where no event loop runs."""
    context = copy_context()
    if sniffio := sys.modules.get("sniffio"):  # it keeps in the context which event loop runs, and none runs there
        context.run(sniffio.current_async_library_cvar.set, None)
    return context


class ContextFollower:
    """Repeats in the current context what was changed in another: of two that take turns, each follows the other.

    Two threads cannot be in one context at once, and the token of `ContextVar.set()` is good only where it was made. So
    each keeps its own context, and values are copied where one waits for the other.
    """

    def __init__(self, other: Context) -> None:
        """Follow another context from here, a copy of it, on."""
        self._seen = dict(other)
        self._variables, self._values = tuple(self._seen), tuple(self._seen.values())
        self._tokens: dict[ContextVar[Any], Token[Any]] = {}

    def is_behind(self, other: Context) -> bool:
        """Say whether something was set there since the last time. `other` is a copy."""
        # By identity, since values may have an equality of their own, as tensors. Most often nothing has changed, and
        # then both have the same order.
        variables = self._variables
        return not (
            len(variables) == len(other)
            and all(map(is_, variables, other))
            and all(map(is_, self._values, other.values()))
        )

    def follow(self, other: Context) -> None:
        """Set here what was set there since the last time. `other` is a copy."""
        before, self._seen = self._seen, dict(other)
        self._variables, self._values = tuple(self._seen), tuple(self._seen.values())
        for variable, value in other.items():
            if value is not before.get(variable, _UNSET) and value is not variable.get(_UNSET):
                if variable.name == "current_async_library_cvar":  # sniffio's, which is right on each side
                    continue
                token = variable.set(value)
                if token.old_value is Token.MISSING:  # the only way to have a variable unset again
                    self._tokens[variable] = token
        for variable in before:
            if variable not in other and variable.get(_UNSET) is not _UNSET and variable in self._tokens:
                variable.reset(self._tokens.pop(variable))


class SharedContext:
    """The context variables of a run: those of its task on the event loop, and those of its worker.

    Attributes:
        context: the worker's, in which everything on it runs.
        of_task: follows the worker in the task.
        of_worker: follows the task on the worker.
    """

    __slots__ = ("context", "of_task", "of_worker")

    def __init__(self, context: Context) -> None:
        """Called in the task, with a context of `context_for_thread()`."""
        self.context: Context = context
        self.of_task: ContextFollower = ContextFollower(context.copy())
        self.of_worker: ContextFollower = ContextFollower(copy_context())


_UNSET = object()


def bound_to_this_thread() -> str | None:
    """Name what of torch is in force on the calling thread, and would see nothing of another. None for nothing.

    A mode can be put into place on several threads, but counts and caches without a lock, and `FakeTensorMode` fails as
    soon as two of them compute at once. A profiler records the thread that started it. torch lets others join it, but
    then no longer lets go of the first, which counts everything twice from then on.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    core: Any = torch._C  # noqa: SLF001 -- torch has no public names for what is looked at here
    modes = [core._get_dispatch_stack_at(index) for index in range(core._len_torch_dispatch_stack())]  # noqa: SLF001
    modes += [core._get_function_stack_at(index) for index in range(core._len_torch_function_stack())]  # noqa: SLF001
    kinds = [type(mode) for mode in modes]
    bound = [kind.__name__.lstrip("_") for kind in kinds if kind.__module__ != "torch.utils._device"]  # the default one
    if core._autograd._profiler_enabled():  # noqa: SLF001
        bound.append("a torch profiler")
    if core._functorch.get_dynamic_layer_stack_depth():  # noqa: SLF001
        bound.append("a transform of torch.func")
    if not core._is_torch_function_enabled():  # noqa: SLF001
        bound.append("DisableTorchFunctionSubclass")
    return " and ".join(bound) or None


class ThreadState:
    """torch's settings of one thread, to be had on another: those of the caller of `run()`, for its step on the worker.

    Grad mode, inference mode, autocast, default device, CUDA device and stream, hooks for saved tensors. Nothing if
    torch is not loaded.

    Attributes:
        bound: what is in force on that thread and cannot be had on another, by name; None for nothing.
    """

    def __init__(self, *, is_needed: bool = True) -> None:
        """Record the settings of the calling thread; none, where no other thread is to have them."""
        torch: Any = sys.modules.get("torch") if is_needed else None
        self.bound: str | None = bound_to_this_thread() if is_needed else None
        # Where a mode is bound to the thread, no other is given its settings; and the mode would see our calls here.
        self._torch = torch = torch if self.bound is None else None
        if torch:
            self._grad = torch.is_grad_enabled()
            self._inference = torch.is_inference_mode_enabled()
            self._multithreaded = torch._C._is_multithreading_enabled()  # noqa: SLF001 -- torch has no public name
            self._hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # noqa: FBT003, SLF001 -- likewise
            self._no_hooks = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()  # noqa: SLF001
            self._device = torch.get_default_device()
            self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
            self._autocast = [
                (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
                for kind in (["cpu"] if self._stream is None else ["cpu", "cuda"])
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
        if self._stream is not None:
            entered.enter_context(torch.cuda.stream(self._stream))  # and its device
        before = torch.get_default_device()
        if self._device != before:
            torch.set_default_device(self._device)
        entered.callback(_restore_device, torch, before)
        # Each of these restores, on leaving, also what a step has left behind.
        entered.enter_context(torch.inference_mode(self._inference))
        entered.enter_context(torch.set_grad_enabled(self._grad))
        entered.enter_context(torch.autograd.set_multithreading_enabled(self._multithreaded))
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
        hooks = [] if self._hooks is None else [self._hooks]  # torch never calls but the innermost pair
        entered.callback(_exchange_hooks, torch, *_exchange_hooks(torch, hooks, self._no_hooks))


def _restore_device(torch: Any, before: Any) -> None:
    if torch.get_default_device() != before:
        torch.set_default_device(None if before.type == "cpu" else before)


def _exchange_hooks(
    torch: Any, hooks: list[tuple[Any, Any]], forbidden: str | None
) -> tuple[list[tuple[Any, Any]], str | None]:
    """Have these hooks for saved tensors, outermost first, or none with this error. Returns what there was before."""
    autograd = torch._C._autograd  # noqa: SLF001 -- torch has no public names for this, but for a with statement
    before: list[tuple[Any, Any]] = []
    forbidden_before = autograd._saved_tensors_hooks_get_disabled_error_message()  # noqa: SLF001
    while (pair := autograd._top_saved_tensors_default_hooks(True)) is not None:  # noqa: FBT003, SLF001
        before.insert(0, pair)
        autograd._pop_saved_tensors_default_hooks()  # noqa: SLF001
    if forbidden_before is not None:
        autograd._saved_tensors_hooks_enable()  # noqa: SLF001
    for pair in hooks:
        autograd._push_saved_tensors_default_hooks(*pair)  # noqa: SLF001
    if forbidden is not None:
        autograd._saved_tensors_hooks_disable(forbidden)  # noqa: SLF001
    return before, forbidden_before

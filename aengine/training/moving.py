"""Moving: batches are copied to a GPU beside the step, while it computes with the batches before them.

    data = prefetch_to_device(DataLoader(..., pin_memory=True), "cuda")
    await trainer.run(data, max_epochs=10, prefetch=2)

The prefetcher copies each batch on a CUDA stream of its own. Where the step runs, just before it does, its stream is
made to wait for the copy, and the memory is marked as in use by that stream: so the allocator does not give it to the
copy of another batch before the step's kernels have run. No thread waits for the GPU.

Without this, a supervised trainer with `device="cuda"` copies in its step, and unless it has `non_blocking=True` waits
there for everything that the GPU was given so far. It needs `prefetch=`, else a batch is copied only when it is
requested; and pinned memory, else the prefetcher's thread, though not the step, waits for each copy. NVIDIA's apex and
torchtnt do the same. Why the memory is marked:
https://docs.pytorch.org/docs/stable/generated/torch.Tensor.record_stream.html

Without a GPU the tests cover all but the streams: what is moved, in which order, and resuming. The tests of the streams
need a GPU, and have not been run on one yet. On other accelerators batches are moved by `to()`, beside the step.
"""

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, cast

import anyio
import anyio.to_thread
import torch

from aengine.callables import name_of
from aengine.data.adapt import adapt, is_async_iterable, is_factory
from aengine.data.finish import HOOK
from aengine.keywords import explain_wrong_call
from aengine.state import Stateful
from aengine.training.supervised import Device, move


@explain_wrong_call
def prefetch_to_device(data: Any, device: Device) -> Any:
    """Return data whose batches are on a device when they come to a step, moved there as they are fetched.

    What the data can do, the returned object can: have a length, be async, restart, save its position and restore it.
    Handlers and the step see tensors on the device, at any depth of mappings, lists, tuples and dataclasses, and in
    objects with `to()`; the supervised trainer's `device=` then has nothing left to move. To continue a run in memory,
    pass the very object that this returned. It may be the data of several engines, as far as the data itself may.

    Only engines can make use of it: what else iterates it gets batches that are not handed over to its stream yet.

    Args:
        data: what `run()` would be given.
        device: where to move batches; "cuda" is the caller's current one.

    Raises:
        TypeError: it is no data.
        RuntimeError, AssertionError: torch has no such device here.
    """
    if data is None:
        raise TypeError(
            "prefetch_to_device(data, device) takes the data that run() would be given, and a run without data has no"
            " batches"
        )
    adapted = adapt(data)
    mover = _Mover(device)
    return _Context(data, mover) if adapted.is_manager else _opened(data, mover)


class Moved:
    """A batch on its way from the prefetcher to the step."""

    __slots__ = ("_batch", "_copied", "_device", "_tensors")

    def __init__(
        self, batch: Any, device: torch.device, copied: torch.cuda.Event | None, tensors: list[torch.Tensor]
    ) -> None:
        self._batch = batch
        self._device = device
        self._copied = copied
        self._tensors = tensors

    def hand_over(self) -> Any:
        """Return the batch, for use on the stream that is current here; again, if the step was put off."""
        if self._copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._copied)
            for tensor in self._tensors:
                tensor.record_stream(stream)
        return self._batch

    def __getitem__(self, _: object) -> NoReturn:  # also called where it is unpacked, as in  x, y = batch
        raise RuntimeError(
            "this batch was not handed over to a step: an engine does that where run() is given what"
            " prefetch_to_device(data, device) returned. Call that last, of what wraps data, and iterate it by engines"
        )


class _Mover:
    """Moves one batch after another, on the thread that calls it."""

    def __init__(self, device: Device) -> None:
        self._device = torch.device("cpu" if device is None else device)
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            index = cast("int | None", self._device.index)
            index = torch.cuda.current_device() if index is None else index  # threads differ in the current one
            self._device = torch.device("cuda", index)
            self._stream = torch.cuda.Stream(self._device)

    def __call__(self, batch: Any) -> Moved:
        stream = self._stream
        if stream is None:
            return Moved(move(batch, self._device), self._device, None, [])
        # A tensor that is on a GPU already may still be being computed, on the stream that is current on this thread.
        for device in {tensor.device for tensor in tensors_in(batch) if tensor.is_cuda}:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            moved = move(batch, self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        return Moved(moved, self._device, copied, [tensor for tensor in tensors_in(moved) if tensor.is_cuda])

    async def beside(self, batch: Any) -> Moved:
        """Move a batch on a thread. A cancellation waits for it: the data has given the batch, which would be lost."""
        limiter = anyio.CapacityLimiter(1)  # of its own: the application's threads stay free
        with anyio.CancelScope(shield=True):
            return await anyio.to_thread.run_sync(self, batch, limiter=limiter)
        raise AssertionError("this scope is never cancelled")


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch, at any depth of mappings, lists, tuples, dataclasses, and objects with `to()`.

    Raises:
        TypeError: an object has `to()`, but no tensors that can be found, whose memory must be marked as in use.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, tuple | list):
        for one in cast(list[Any], value):
            yield from tensors_in(one)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])
    elif hasattr(value, "to"):
        found = list(tensors_in(list(getattr(value, "__dict__", {}).values())))
        if not found:
            raise TypeError(
                f"a batch has a {name_of(value)}, which has to(), but no tensors among its attributes, so that their"
                " memory cannot be marked as in use: move it in the step"
            )
        yield from found


# The data, with other batches


def _opened(data: Any, mover: _Mover) -> Any:
    return _Factory(data, mover) if is_factory(data) else _iterable(data, mover)


def _iterable(data: Any, mover: _Mover) -> Any:
    return _AsyncIterable(data, mover) if is_async_iterable(data) else _PlainIterable(data, mover)


class _Wrapped:
    def __init__(self, data: Any, mover: _Mover) -> None:
        self.__wrapped__ = data
        self._mover = mover

    def __len__(self) -> int:
        return len(self.__wrapped__)

    def __bool__(self) -> bool:
        return bool(self.__wrapped__)  # not by the length, which the data may not have

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":  # missing while it is being copied: looking it up would come here again, for ever
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)  # its sampler, its generator, ...


class _Factory(_Wrapped):
    """A callable that makes the data."""

    def __call__(self) -> Any:
        return _iterable(self.__wrapped__(), self._mover)


class _Context(_Wrapped):
    """An async context manager."""

    async def __aenter__(self) -> Any:
        value = await self.__wrapped__.__aenter__()
        return _opened(self.__wrapped__ if value is None else value, self._mover)

    async def __aexit__(self, *failure: object) -> Any:
        return await self.__wrapped__.__aexit__(*failure)


class _Iterable(_Wrapped):
    """Data that can be iterated again, or one pass over it.

    If the data is its own iterator, so is this, by which the engine knows that it is not to close it. Its position is
    that of the data, which is read after each batch, before the next one is fetched.
    """

    def __init__(self, data: Any, mover: _Mover) -> None:
        super().__init__(data, mover)
        self._finish = getattr(data, HOOK, None)
        self._was_loaded = self._is_begun = False
        if isinstance(data, Stateful):  # attributes of its own, so that only then this is a Stateful as well
            self.state_dict = data.state_dict
            self.load_state_dict = self._load_state_dict

    def finish_batch_for_step(self, moved: Moved) -> Any:
        """Hand a batch over to the step's stream, then do what the data itself wants to be done."""
        batch = moved.hand_over()
        return batch if self._finish is None else self._finish(batch)

    def _load_state_dict(self, state_dict: Any) -> None:
        self.__wrapped__.load_state_dict(state_dict)
        self._was_loaded, self._is_begun = True, False

    def _begin(self) -> Any:
        if self._was_loaded and self._is_begun and type(self.__wrapped__).__module__.partition(".")[0] == "datasets":
            # Hugging Face's data sets begin each pass at the state that was loaded last, until another is loaded.
            self.__wrapped__.load_state_dict({})
        self._is_begun = True
        return self.__wrapped__


class _PlainIterable(_Iterable):
    def __iter__(self) -> Iterator[Moved]:
        iterator = iter(self._begin())
        return self if iterator is self.__wrapped__ else _PlainIterable(iterator, self._mover)

    def __next__(self) -> Moved:
        return self._mover(next(self.__wrapped__))


class _AsyncIterable(_Iterable):
    def __aiter__(self) -> AsyncIterator[Moved]:
        iterator = aiter(self._begin())
        return self if iterator is self.__wrapped__ else _AsyncIterable(iterator, self._mover)

    async def __anext__(self) -> Moved:
        return await self._mover.beside(await anext(self.__wrapped__))

"""Moving ahead: batches are copied to a GPU beside the step, while those before them are computed with.

    data = move_ahead(trainer, DataLoader(..., pin_memory=True), "cuda")
    await trainer.run(data, max_epochs=10, prefetch=2)

The prefetcher copies each batch on a stream of its own. Between two steps, where the step runs, the step's stream is
told to wait for the copy, should it not be over, and the memory is marked as in use by it, so that it is not given to
the copy of another batch before the step's kernels have run. Nobody waits for the GPU.

Without this, a supervised trainer with `device="cuda"` copies in its step, and unless it is given `non_blocking=True`
waits there for all that the GPU has been given so far. This pays with `prefetch=`, and from pinned memory: without the
one a batch is copied when it is asked for, without the other the thread of the prefetcher, though not the step, waits
for each copy. NVIDIA's apex and torchtnt do it in this way; why the memory is marked,
https://docs.pytorch.org/docs/stable/generated/torch.Tensor.record_stream.html says.

What is tested without a GPU is all but the streams: what is moved, in which order, where it is resumed. The tests of
the streams need a GPU, and have not been run on one yet. Other accelerators get a plain `to()`, beside the step.
"""

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, cast

import anyio
import anyio.to_thread
import torch

from aengine.data.adapt import adapt, has, is_factory, is_one_shot
from aengine.engine import Engine
from aengine.events import Events
from aengine.state import Stateful
from aengine.training.supervised import Device, move


def move_ahead(engine: Engine[Any, Any], data: Any, device: Device) -> Any:
    """Return data whose batches come to this engine's steps on a device, moved there by who fetches them.

    Before other handlers of GET_BATCH_COMPLETED are added, which would find batches that are yet to be handed over.
    Whatever the data can do it still can: have a length, be async, restart, say where it stands and be put back there.
    The step sees tensors on the device, at any depth of mappings, lists, tuples and dataclasses, and in objects with
    `to()`; a `device=` of the supervised trainer's finds nothing left to move. In memory a run is gone on with by the
    very object that this returned.

    Args:
        engine: that runs over it.
        data: what `run()` would be given.
        device: where to, "cuda" being the caller's current one.

    Raises:
        TypeError: this is no data.
        RuntimeError, AssertionError: torch has no such device here.
    """
    if data is None:
        raise TypeError("move_ahead() takes the data that run() would be given, and a run without data has no batches")
    adapt(data)
    if not engine.has_event_handler(_hand_over, Events.GET_BATCH_COMPLETED):
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, _hand_over)
    return _moved(data, _Mover(device))


class Moved:
    """A batch on its way from who fetched it to the step."""

    __slots__ = ("_batch", "_copied", "_device", "_tensors")

    def __init__(
        self, batch: Any, device: torch.device, copied: torch.cuda.Event | None, tensors: list[torch.Tensor]
    ) -> None:
        self._batch = batch
        self._device = device
        self._copied = copied
        self._tensors = tensors

    def hand_over(self) -> Any:
        """Return the batch, for use on the stream that is current here. Again, if the step was put off."""
        if self._copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._copied)
            for tensor in self._tensors:
                tensor.record_stream(stream)
        return self._batch

    def __getitem__(self, _: object) -> NoReturn:  # which is also how it would be unpacked
        raise RuntimeError(
            "this batch was moved ahead for another engine: call  move_ahead(engine, data, device)  with the one that"
            " runs over it, and before its handlers of GET_BATCH_COMPLETED are added"
        )


def _hand_over(engine: Engine[Any, Any]) -> None:
    batch = engine.state.batch
    if type(batch) is Moved:
        engine.state.batch = batch.hand_over()


class _Mover:
    """Moves one batch after another, in the thread of whoever asks."""

    def __init__(self, device: Device) -> None:
        self._device = torch.device("cpu" if device is None else device)
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            index = cast("int | None", self._device.index)
            index = torch.cuda.current_device() if index is None else index  # the same one in every thread
            self._device = torch.device("cuda", index)
            self._stream = torch.cuda.Stream(self._device)

    def __call__(self, batch: Any) -> Moved:
        stream = self._stream
        if stream is None:
            return Moved(move(batch, self._device), self._device, None, [])
        # What is on a GPU already may still be computed there, by what is current where the batch was made.
        for device in {tensor.device for tensor in tensors_in(batch) if tensor.is_cuda}:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            moved = move(batch, self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        return Moved(moved, self._device, copied, [tensor for tensor in tensors_in(moved) if tensor.is_cuda])

    async def beside(self, batch: Any) -> Moved:
        """Do it in a thread. Not cancellable, for then the batch would be lost."""
        limiter = anyio.CapacityLimiter(1)  # none of the application's threads are taken
        with anyio.CancelScope(shield=True):
            return await anyio.to_thread.run_sync(self, batch, limiter=limiter)
        raise AssertionError("nobody cancels that scope")


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch, at any depth of mappings, lists, tuples, dataclasses, and objects with `to()`.

    Raises:
        TypeError: an object has `to()`, and no tensor that could be found: its memory could not be minded.
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
                f"a batch has a {type(value).__qualname__}, which has to(), but no tensors among its attributes, so"
                " that their memory cannot be minded: move it in the step"
            )
        yield from found


# Data, as it was but for its batches


def _moved(data: Any, mover: _Mover) -> Any:
    return _Entered(data, mover) if has(data, "__aenter__") else _opened(data, mover)


def _opened(data: Any, mover: _Mover) -> Any:
    if is_factory(data):
        return _Made(data, mover)
    if not is_one_shot(data):
        return _again(data, mover)
    return _as_they_come(data, mover) if has(data, "__aiter__") else map(mover, data)


def _again(data: Any, mover: _Mover) -> Any:
    return _MovedAsync(data, mover) if has(data, "__aiter__") else _MovedPlain(data, mover)


async def _as_they_come(data: Any, mover: _Mover) -> AsyncIterator[Moved]:
    async for batch in data:
        yield await mover.beside(batch)


class _Wrapped:
    def __init__(self, data: Any, mover: _Mover) -> None:
        self._data = data
        self._mover = mover

    def __len__(self) -> int:
        return len(self._data)

    def __getattr__(self, name: str) -> Any:
        if name == "_data":  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self._data, name)  # its sampler, its generator, ...


class _Made(_Wrapped):
    """A callable that makes the data."""

    def __call__(self) -> Any:
        return _again(self._data(), self._mover)


class _Entered(_Wrapped):
    """An async context manager."""

    async def __aenter__(self) -> Any:
        value = await self._data.__aenter__()
        return _opened(self._data if value is None else value, self._mover)

    async def __aexit__(self, *failure: object) -> Any:
        return await self._data.__aexit__(*failure)


class _Again(_Wrapped):
    """Data that can be iterated anew. Where it is its own iterator, so is this: who did not open it does not close it.

    Its position is that of the data: it is asked for after each batch, before the next is fetched.
    """

    def __init__(self, data: Any, mover: _Mover) -> None:
        super().__init__(data, mover)
        self._own: Any = None
        self._is_put_back = self._is_begun = False
        if isinstance(data, Stateful):  # on itself, where Python looks
            self.state_dict = data.state_dict
            self.load_state_dict = self._load_state_dict

    def _load_state_dict(self, state_dict: Any) -> None:
        self._data.load_state_dict(state_dict)
        self._is_put_back, self._is_begun = True, False

    def _begin(self) -> Any:
        if self._is_put_back and self._is_begun and type(self._data).__module__.partition(".")[0] == "datasets":
            # Hugging Face's go back to the state that they were given at each pass, until they are given another.
            self._data.load_state_dict({})
        self._is_begun = True
        return self._data


class _MovedPlain(_Again):
    def __iter__(self) -> Iterator[Moved]:
        data = self._begin()
        iterator = iter(data)
        if iterator is data:
            self._own = iterator
            return self
        return _PlainIterator(iterator, self._mover)

    def __next__(self) -> Moved:
        return self._mover(next(self._own))


class _PlainIterator:
    def __init__(self, iterator: Any, mover: _Mover) -> None:
        self._iterator = iterator
        self._mover = mover
        if hasattr(iterator, "close"):
            self.close = iterator.close

    def __iter__(self) -> "_PlainIterator":
        return self

    def __next__(self) -> Moved:
        return self._mover(next(self._iterator))


class _MovedAsync(_Again):
    def __aiter__(self) -> AsyncIterator[Moved]:
        data = self._begin()
        iterator = aiter(data)
        if iterator is data:
            self._own = iterator
            return self
        return _AsyncIterator(iterator, self._mover)

    async def __anext__(self) -> Moved:
        return await self._mover.beside(await anext(self._own))


class _AsyncIterator:
    def __init__(self, iterator: Any, mover: _Mover) -> None:
        self._iterator = iterator
        self._mover = mover
        if hasattr(iterator, "aclose"):
            self.aclose = iterator.aclose

    def __aiter__(self) -> "_AsyncIterator":
        return self

    async def __anext__(self) -> Moved:
        return await self._mover.beside(await anext(self._iterator))

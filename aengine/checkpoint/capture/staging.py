"""Staging: copying the state aside, so that it can be written while the run goes on changing it.

This is the part of a save that blocks the run, so it is a copy of memory and as little else as can be: the tree is
walked twice, once to find the tensors and once to build the result, and between the two each stretch of memory is
copied once, into a buffer that was there before.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch

from aengine.checkpoint.capture.memory import PrivateMemory, SharedMemory
from aengine.checkpoint.capture.trees import Survey, rebuild
from aengine.threads.openmp import on_one_thread

_CPU = torch.device("cpu")
_MOST_THREADS = 8  # more do not make memory faster
_SMALL = 1 << 20  # bytes that are copied before another thread has begun


class Staging:
    """Copies trees of state into CPU buffers that are reused from one stage to the next.

        staging = Staging()
        staged = staging.stage({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        torch.save(staged, path)  # or on another thread, while the model is trained on

    What was staged is valid until the next `stage()`. One thread at a time.

    Args:
        memory: where the buffers come from; by default from this process's own.
        root: what errors call the tree; None if they are to call its parts by their keys.
    """

    def __init__(self, memory: PrivateMemory | SharedMemory | None = None, root: str | None = "state") -> None:
        self._root = root
        self._memory = PrivateMemory() if memory is None else memory
        self._plan: _Plan | None = None

    def stage(self, tree: Any) -> Any:
        """Return a tree equal to this one that shares nothing with it, with its tensors on the CPU.

        Tensors that share memory share it in the result: tied weights are one there, too. The others have a storage of
        their own each, with nothing but them in it. Their Python attributes and hooks are not state.

        Raises:
            NotSerializable: something in the tree could not be loaded back. Nothing has been copied.
        """
        # Under inference mode the buffers could not be written to again outside of it.
        with torch.inference_mode(mode=False), torch.no_grad():
            survey = Survey(tree, self._root)
            tensors = list(survey.tensors.values())
            layout = _layout(tensors)
            if self._plan is None or self._plan.layout != layout:
                self._plan = None  # until there is a whole one: what it refers to is given up
                self._plan = _Plan(layout, self._memory)
            self._plan.copy(tensors)
            staged: dict[int, Any] = dict(zip(survey.tensors, self._plan.results, strict=True))
            for distributed, local in survey.shards.values():
                staged[id(distributed)] = distribute_like(distributed, staged[id(local)])
            staged.update(survey.substitutes)
            return rebuild(tree, lambda leaf, _: staged.get(id(leaf), leaf))


class _Strided(NamedTuple):
    """A tensor, but for its numbers. With equal ones at all places, two trees are staged by the same plan."""

    storage: int  # tensors with equal ones share memory; counted anew in each tree, for addresses change
    offset: int  # in elements, as the strides
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_view_of_others: bool  # conjugated or negated when read: its memory is not its numbers
    is_parameter: bool
    requires_grad: bool

    @property
    def end(self) -> int:
        """Where its memory ends, in elements of the storage."""
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True)) + 1

    @property
    def memory(self) -> tuple[int, torch.Size, tuple[int, ...]]:
        """What tensors of one storage have in common if they are the same numbers."""
        return self.offset, self.size, self.stride

    @property
    def distinct(self) -> int:
        """How many elements it has in memory; more than that if its rows overlap."""
        return torch.Size(size for size, stride in zip(self.size, self.stride, strict=True) if stride).numel()

    def is_dense(self) -> bool:
        """Say whether it has all of its memory to itself, in whatever order of dimensions."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return True


def _layout(tensors: Iterable[torch.Tensor]) -> list[_Strided]:
    storages: dict[tuple[torch.device, int], int] = {}
    layout = []
    for tensor in tensors:
        device = tensor.device
        layout.append(
            _new_strided(
                _Strided,
                (
                    storages.setdefault((device, tensor.untyped_storage().data_ptr()), len(storages)),
                    int(tensor.storage_offset()),
                    tensor.size(),
                    tensor.stride(),
                    tensor.dtype,
                    device,
                    tensor.is_conj() or tensor.is_neg(),
                    type(tensor) is torch.nn.Parameter,
                    tensor.requires_grad,
                ),
            )
        )
    return layout


_new_strided: Callable[[type[_Strided], tuple[Any, ...]], _Strided] = tuple.__new__
"""Makes one of its fields in order, without the cost of its Python constructor: thousands are made as the run waits."""


@dataclass
class _Stretch:
    """What is copied in one go, into one region, and the tensors that are then to be found there."""

    members: list[int]  # indices into the layout
    start: int | None = None  # the first element of the storage that is copied; None if a tensor is, not memory
    length: int = 0  # in elements


class _Plan:
    """Which numbers go where, for one layout: made once, carried out at each stage."""

    def __init__(self, layout: list[_Strided], memory: PrivateMemory | SharedMemory) -> None:
        self.layout = layout
        stretches = _stretches(layout)
        self._devices = {strided.device for strided in layout}
        regions = memory.regions(
            [stretch.length * layout[stretch.members[0]].dtype.itemsize for stretch in stretches],
            pinned=any(device.type == "cuda" for device in self._devices),
        )
        self.results: list[torch.Tensor] = [torch.empty(0, device="cpu")] * len(layout)
        self._whole: list[tuple[int, torch.Tensor]] = []  # tensors, by index, and where they are copied to
        self._ranges: list[tuple[int, int, torch.Tensor]] = []  # the same for ranges of the memory of tensors
        for stretch, region in zip(stretches, regions, strict=True):
            self._place(stretch, region)
        for index, strided in enumerate(layout):
            if strided.is_parameter:
                self.results[index] = torch.nn.Parameter(self.results[index], requires_grad=strided.requires_grad)
            else:
                self.results[index].requires_grad_(strided.requires_grad)

    def copy(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the numbers of these tensors, laid out as the plan has it. Returns when GPUs have done their part."""
        targets = [target for _, target in self._whole] + [target for *_, target in self._ranges]
        sources = [tensors[index] for index, _ in self._whole]
        sources += [tensors[index].as_strided(target.shape, (1,), start) for index, start, target in self._ranges]
        if self._devices == {_CPU}:
            _copy_in_shares(targets, sources)
            return
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=source.is_cuda)
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def _place(self, stretch: _Stretch, region: torch.Tensor) -> None:
        storage = region.untyped_storage()
        first = stretch.members[0]
        for index in stretch.members:
            strided = self.layout[index]
            stride = strided.stride if stretch.start is not None else torch.empty(strided.size, device="meta").stride()
            offset = strided.offset - stretch.start if stretch.start is not None else 0
            empty = torch.empty(0, dtype=strided.dtype, device="cpu")
            self.results[index] = empty.set_(storage, offset, strided.size, stride)
        if len({self.layout[index].memory for index in stretch.members}) == 1:
            # Quicker than by its range. A view, for the result itself may yet become a Parameter.
            self._whole.append((first, self.results[first].detach()))
        else:
            assert stretch.start is not None  # noqa: S101 -- for type checkers
            flat = torch.empty(0, dtype=self.layout[first].dtype, device="cpu")
            self._ranges.append((first, stretch.start, flat.set_(storage, 0, (stretch.length,), (1,))))


def _stretches(layout: list[_Strided]) -> list[_Stretch]:
    """Divide tensors by the memory that they are in, so that none of it is copied twice and nothing else is copied."""
    stretches = []
    # By type, too: torch cannot save a storage that is read as two.
    sharing: dict[tuple[int, torch.dtype], list[int]] = defaultdict(list)
    for index, strided in enumerate(layout):
        if strided.is_view_of_others or strided.size.numel() == 0:
            stretches.append(_Stretch([index], length=strided.size.numel()))
        else:
            sharing[strided.storage, strided.dtype].append(index)
    for indices in sharing.values():
        stretches += _stretches_of_storage(layout, indices)
    return stretches


def _stretches_of_storage(layout: list[_Strided], indices: list[int]) -> list[_Stretch]:
    stretches: list[_Stretch] = []
    last = _Stretch([])
    for index in sorted(indices, key=lambda index: layout[index].offset):
        strided = layout[index]
        if last.start is not None and strided.offset <= last.start + last.length:
            last.members.append(index)
            last.length = max(last.length, strided.end - last.start)
        else:
            last = _Stretch([index], strided.offset, strided.end - strided.offset)
            stretches.append(last)
    return [part for stretch in stretches for part in _without_gaps(layout, stretch)]


def _without_gaps(layout: list[_Strided], stretch: _Stretch) -> list[_Stretch]:
    """Return the stretch itself; or, if some of its memory belongs to no tensor of the tree, its tensors one by one."""
    members = sorted(stretch.members, key=lambda index: layout[index].memory)
    same = [list(group) for _, group in groupby(members, key=lambda index: layout[index].memory)]
    if len(same) == 1:
        is_full = layout[members[0]].is_dense()
    else:
        is_full = sum(layout[group[0]].distinct for group in same) >= stretch.length
    if is_full:
        return [stretch]
    return [_Stretch(group, length=layout[group[0]].size.numel()) for group in same]


def _copy_in_shares(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy in some threads, each a share of its own in one call.

    torch itself would divide each tensor, and have its threads wait for each other after each: where something else has
    the core of one of them, that costs a time slice per tensor. And after each call a thread must get the GIL back,
    which the event loop may hold.
    """
    total = sum(target.nbytes for target in targets)
    count = max(1, min(torch.get_num_threads(), _MOST_THREADS, total // _SMALL))
    shares: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []) for _ in range(count)]
    sizes = [0] * count
    for target, source in _pieces(targets, sources, -(-total // count)):
        share = sizes.index(min(sizes))
        sizes[share] += target.nbytes
        shares[share][0].append(target)
        shares[share][1].append(source)
    if count == 1:
        _copy_all(*shares[0])
        return
    with ThreadPoolExecutor(count - 1, thread_name_prefix="aengine staging") as threads:
        others = [threads.submit(_copy_all, *share) for share in shares[1:]]
        _copy_all(*shares[0])
        for other in others:
            other.result()


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        with torch.no_grad(), on_one_thread():
            torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def _pieces(
    targets: list[torch.Tensor], sources: list[torch.Tensor], largest: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for target, source in zip(targets, sources, strict=True):
        if target.nbytes > largest and target.is_contiguous() and source.is_contiguous():
            length = max(1, largest // target.itemsize)
            yield from zip(target.view(-1).split(length), source.view(-1).split(length), strict=True)
        else:
            yield target, source


def distribute_like(like: Any, local: torch.Tensor) -> Any:
    """Return a DTensor with this local shard. Not by `from_local()`, which moves it to the device of the mesh."""
    staged = type(like)(local, like._spec, requires_grad=like.requires_grad)  # noqa: SLF001 -- there is no other way
    return torch.nn.Parameter(staged, like.requires_grad) if isinstance(like, torch.nn.Parameter) else staged

"""Digests of batches: whether the batch that comes at a place in the data is the one that came there before.

A batch is seen as its leaves: arrays, numbers, texts, each with the path to it. Of a large array some values are read,
so that a digest takes less than a millisecond.
"""

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, TypeAlias, cast

Digest: TypeAlias = dict[str, list[Any]]
"""Of each leaf, by path: a hash, how often it was changed in place, and what is shown of it. Plain values."""

_MOST_LEAVES = 32
_MOST_VALUES = 1_024
_MOST_CHARACTERS = 65_536
_DEEPEST = 6
_SHOWN = 4
_SCALARS = (int, float, complex, bool, str, bytes, type(None))


def digest_of(batch: Any) -> Digest:
    """Return the digest of a batch; leaves that cannot be read are left out."""
    return dict(islice(_leaves(batch, "", 0), _MOST_LEAVES))


def differing(then: Digest, now: Digest) -> list[str]:
    """Return the paths at which two batches differ, of those that can be compared.

    What only one has is not compared, since a step may take an entry out of its batch; nor what was changed in place
    since it was fetched.
    """
    return [
        path
        for path, (text, changes, _) in then.items()
        if path in now and now[path][1] == changes and now[path][0] != text
    ]


def is_of_real_numbers(path: str, digest: Digest) -> bool:
    """Say whether this leaf is real numbers, such as are augmented."""
    return str(digest[path][2]).startswith(("float", "bfloat"))


def _leaves(value: Any, path: str, depth: int) -> Iterator[tuple[str, list[Any]]]:
    if isinstance(value, _SCALARS):
        text = repr(value[:_MOST_CHARACTERS] if isinstance(value, str | bytes) else value)
        yield path, _leaf(type(value).__name__, text.encode(errors="replace"), text[:40])
    elif hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "tolist"):
        with suppress(Exception):  # sparse, quantized, on a device that is gone: it is not compared
            yield path, _leaf_of_array(value)
    elif depth < _DEEPEST:
        for name, one in islice(_parts(value), _MOST_LEAVES):
            yield from _leaves(one, f"{path}{name}", depth + 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, one in cast(Mapping[str, Any], value).items():
            yield f"[{key!r}]", one
    elif isinstance(value, list | tuple):
        items = cast(list[Any], value)
        if len(items) > _SHOWN and all(isinstance(one, _SCALARS) for one in islice(items, _MOST_VALUES)):
            yield "", repr(items[:_MOST_VALUES])  # numbers, as one leaf
        else:
            for index, one in enumerate(items):
                yield f"[{index}]", one
    else:
        for name, one in list(getattr(value, "__dict__", {}).items()):
            yield f".{name}", one


def _leaf(kind: str, content: bytes, shown: str, changes: Any = 0) -> list[Any]:
    return [hashlib.blake2b(content, digest_size=8).hexdigest(), changes, f"{kind} {shown}"]


def _leaf_of_array(value: Any) -> list[Any]:
    shape, dtype = tuple(int(size) for size in value.shape), str(value.dtype).rpartition(".")[2]
    count = 1
    for size in shape:
        count *= size
    changes = getattr(value, "_version", 0)  # of a tensor
    if hasattr(value, "detach"):
        value = value.detach()
    if count <= _MOST_VALUES:
        values = value.reshape(-1).tolist()
    else:
        # Spread by the golden ratio, so that they do not all lie in one column.
        flat = [int(index * 0.6180339887498949 % 1 * count) for index in range(_MOST_VALUES)]
        places: list[list[int]] = []
        for size in reversed(shape):
            places.append([index % size for index in flat])
            flat = [index // size for index in flat]
        values = value[tuple(reversed(places))].tolist()
    try:
        content = array("d", values).tobytes()
    except (TypeError, OverflowError):
        content = repr(values).encode()
    shown = ", ".join(f"{one:.5g}" if isinstance(one, float) else str(one)[:20] for one in values[:_SHOWN])
    more = ", ..." if count > _SHOWN else ""
    return _leaf(dtype, repr((shape, dtype)).encode() + content, f"{shape} [{shown}{more}]", changes)

"""The manifest: what a checkpoint is made of, as JSON. Nothing that is read is trusted. No I/O in here.

It ends with a checksum of its own: with those that it has of the files, each bit of a checkpoint is covered.

A checksum proves integrity, not origin: what can change a file of a checkpoint can change its manifest as well. What
keeps a malicious checkpoint from doing harm is that nothing in it is ever executed or followed: names are plain base
names, links are refused, sizes are bounded, and the state is loaded with `weights_only=True`.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from aengine.errors import CheckpointDamaged

MANIFEST = "manifest.json"
PINNED = "pinned"
STATE = "state.pt"
"""The file that each checkpoint has: it holds the tree."""

SUBDIRECTORY = "dcp"
"""The one directory that a checkpoint may have inside: torch.distributed.checkpoint writes into one of its own."""

INDEX = f"{SUBDIRECTORY}/.metadata"
"""The file that says which of those beside it holds which shard. One that has shards has it."""

SIZE_LIMIT = 1 << 20
"""Bytes of a manifest. One that is larger is not read: a few hundred bytes a file is what it takes."""

_FORMAT = 2
_SEAL = b',\n "sha256": "'
"""What the last member begins with. Before it stands what it is the checksum of, after it nothing but the end."""

_LARGEST = 2**63  # of the whole numbers, all of which are counted: a larger one is the work of a forger
_DIRECTORY = re.compile(r"step-([0-9]{10}|[1-9][0-9]{10,})(?:\.([2-9]|[1-9][0-9]+))?")
_BASE_NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}"
_NAME = re.compile(rf"{_BASE_NAME}|{SUBDIRECTORY}/(?:\.metadata|{_BASE_NAME})")
_RESERVED = {MANIFEST, PINNED, SUBDIRECTORY}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # strict JSON has no numbers for these


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: its name within, its size in bytes, and the SHA-256 of its content in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint, as its manifest describes it. It does not say whether its files are whole: see `restore`.

    Attributes:
        step: iterations that were completed when it was taken.
        revision: 1 for the first of its step, 2 for the next that was taken at the same step, and so on.
        number: its place in the order in which the checkpoints of its directory were taken, from 1. A later revision of
            a step has the number of the one that it stands in for.
        epoch: epochs begun when it was taken.
        event: the name of the event at which it was taken.
        metrics: results by name; any of them may be NaN or infinite.
        created: seconds since 1970, by the clock of the machine that wrote it.
        size: bytes of all its files together, without the manifest.
        path: its directory.
        is_pinned: whether it is kept for good, whatever the rules say.
        files: what it consists of.
        versions: of what wrote it, by name.
        world_size: how many processes took part.
        extra: what its writer says: "serializer", the name of that; "shards", how many tensors are sharded; "mid_step".
        is_mid_step: whether it was taken as a run failed or was cancelled in a step: the step's changes are in it.
    """

    step: int
    revision: int
    number: int
    epoch: int
    event: str
    metrics: Mapping[str, float] = field(hash=False)
    created: float
    size: int
    path: Path
    is_pinned: bool
    files: tuple[FileEntry, ...]
    versions: Mapping[str, str] = field(hash=False)
    world_size: int
    extra: Mapping[str, Any] = field(hash=False)

    @property
    def is_mid_step(self) -> bool:  # noqa: D102 -- an attribute, documented above
        return bool(self.extra.get("mid_step"))


def directory_name(step: int, revision: int = 1) -> str:
    """Return what the directory of a checkpoint is called."""
    return f"step-{step:010}" + (f".{revision}" if revision > 1 else "")


def step_and_revision(name: str) -> tuple[int, int] | None:
    """Return what a directory's name says, None if it is none that `directory_name()` would give."""
    match = _DIRECTORY.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else None


def file_name(path: Path) -> str:
    """Return the name by which a manifest calls a file: its base name, with "dcp/" before it if it is in there."""
    return f"{SUBDIRECTORY}/{path.name}" if path.parent.name == SUBDIRECTORY else path.name


def check_name(name: str) -> None:
    """Raise ValueError if a file of a checkpoint cannot be called that.

    Names are joined to the path of the checkpoint, so none may lead out of it.
    """
    if not _NAME.fullmatch(name) or ".." in name or name in _RESERVED:
        raise ValueError(
            f"{name!r} is no name for a file of a checkpoint: give a plain base name of letters, digits, '.', '_' and"
            f" '-', or {SUBDIRECTORY}/ and such a name; {', '.join(sorted(_RESERVED))} are taken"
        )


def encode(info: CheckpointInfo) -> bytes:
    """Return the manifest of a checkpoint. Where it lies and whether it is pinned is not in it: the disk says that.

    Raises:
        TypeError, ValueError: something in it could not be read back: metrics that are no plain numbers, say.
    """
    record = {
        "format": _FORMAT,
        "step": info.step,
        "revision": info.revision,
        "number": info.number,
        "epoch": info.epoch,
        "event": info.event,
        "metrics": {name: _as_json(value) for name, value in info.metrics.items()},
        "created": info.created,
        "files": [{"name": one.name, "size": one.size, "sha256": one.sha256} for one in info.files],
        "versions": dict(info.versions),
        "world_size": info.world_size,
        "extra": dict(info.extra),
    }
    data = _sealed(json.dumps(record, indent=1, allow_nan=False).encode().removesuffix(b"\n}"))
    _parse(data, info.path, pinned=info.is_pinned)  # what could not be read back is refused before it is written
    return data


def decode(data: bytes, path: Path, *, pinned: bool) -> CheckpointInfo:
    """Return what the manifest of the checkpoint at `path` says.

    Raises:
        CheckpointDamaged: anything in it is not as `encode()` writes it, or it is that of another step.
    """
    try:
        return _parse(data, path, pinned=pinned)
    except (ValueError, OverflowError, RecursionError) as error:
        raise CheckpointDamaged(f"{path / MANIFEST} is damaged: {error}") from None


def _parse(data: bytes, path: Path, *, pinned: bool) -> CheckpointInfo:
    if not data:
        raise ValueError("it is empty")
    if len(data) > SIZE_LIMIT:
        raise ValueError(f"it is larger than {SIZE_LIMIT} bytes")
    numbers = step_and_revision(path.name)
    if numbers is None:
        raise ValueError(f"it lies in {path.name!r}, which is no name of a checkpoint, such as {directory_name(500)!r}")
    record = _unsealed(data)
    files = tuple(_file(one) for one in _take(record, "files", list, "a list"))
    metrics: dict[str, Any] = _take(record, "metrics", dict, "an object")
    versions: dict[str, Any] = _take(record, "versions", dict, "an object")
    info = CheckpointInfo(
        step=_take_whole(record, "step", 0),
        revision=numbers[1],
        number=_take_whole(record, "number", 1),
        epoch=_take_whole(record, "epoch", 0),
        event=_take(record, "event", str, "text"),
        metrics=MappingProxyType({name: _number(value, f"metrics[{name!r}]") for name, value in metrics.items()}),
        created=_number(_take(record, "created", int | float, "a number"), "created"),
        size=sum(one.size for one in files),
        path=path,
        is_pinned=pinned,
        files=files,
        versions=MappingProxyType(
            {name: _typed(value, str, "text", f"versions[{name!r}]") for name, value in versions.items()}
        ),
        world_size=_take_whole(record, "world_size", 1),
        extra=MappingProxyType(_extra(_take(record, "extra", dict, "an object"))),
    )
    revision = _take_whole(record, "revision", 1)
    _refuse_unknown(record, "it")
    if (info.step, revision) != numbers:
        raise ValueError(f"it is that of {directory_name(info.step, revision)}, and lies in {path.name}")
    names = {one.name for one in files}
    if len(names) < len(files):
        raise ValueError("it names a file twice")
    for needed in (STATE, INDEX) if info.extra.get("shards") else (STATE,):
        if needed not in names:
            raise ValueError(f"it does not name {needed}, without which nothing can be loaded")
    return info


def _sealed(body: bytes) -> bytes:
    """Return a manifest: all of it but its last member, and that."""
    return body + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"\n}'


def _unsealed(data: bytes) -> dict[str, Any]:
    """Return the object without its checksum, which it must have. It is of the very bytes: each bit of them counts."""
    record = _loaded(data)
    if "sha256" not in record:
        _check_format(record)  # a version that knew no such checksum
    if data != _sealed(data.rpartition(_SEAL)[0]):
        raise ValueError("its content is not what was written (sha256)")
    _check_format(record)
    del record["sha256"]
    return record


def _loaded(data: bytes) -> dict[str, Any]:
    value = json.loads(data, object_pairs_hook=_without_duplicates, parse_constant=_no_number)
    record: dict[str, Any] = _typed(value, dict, "an object", "it")
    return record


def _check_format(record: dict[str, Any]) -> None:
    number = record.pop("format", None)
    if type(number) is not int or number != _FORMAT:
        raise ValueError(
            f"its format is {_shown(number)}, and this version of aengine reads {_FORMAT}: use the version that"
            f" has written it: {_shown(record.get('versions'))}"
        )


def _extra(record: dict[str, Any]) -> dict[str, Any]:
    left = dict(record)
    if "serializer" in left:
        _take(left, "serializer", str, "text")
    if "shards" in left:
        _take_whole(left, "shards", 0)
    if left.pop("mid_step", True) is not True:
        raise ValueError("'mid_step' must be true, or not be there")
    _refuse_unknown(left, "'extra'")
    return record


def _refuse_unknown(left: dict[str, Any], name: str) -> None:
    if left:
        raise ValueError(f"{name} has {_shown(sorted(left))}, which do not belong there")


def _take(record: dict[str, Any], name: str, kind: Any, words: str) -> Any:
    """Take a field out of a JSON object, by the type that it must have. What is left over does not belong there."""
    if name not in record:
        raise ValueError(f"{name!r} is missing")
    return _typed(record.pop(name), kind, words, repr(name))


def _take_whole(record: dict[str, Any], name: str, least: int) -> int:
    value: int = _take(record, name, int, "a whole number")
    if value < least:
        raise ValueError(f"{name!r} must be {least} or more, and is {_shown(value)}")
    if value >= _LARGEST:
        raise ValueError(f"{name!r} must be less than 2**63, and is {_shown(value)}")
    return value


def _file(value: Any) -> FileEntry:
    record: dict[str, Any] = _typed(value, dict, "an object", "an entry of 'files'")
    name, size = _take(record, "name", str, "text"), _take_whole(record, "size", 0)
    sha256: str = _take(record, "sha256", str, "text")
    check_name(name)
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"the sha256 of {name} is {_shown(sha256)}, not 64 hexadecimal digits")
    _refuse_unknown(record, f"the entry of {name}")
    return FileEntry(name, size, sha256)


def _as_json(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = float(value)
        return value if math.isfinite(value) else str(value)
    return value  # no number: reading it back refuses it


def _number(value: Any, name: str) -> float:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, and is {_shown(value)}")
    return float(value)


def _typed(value: Any, kind: Any, words: str, name: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} must be {words}, and is {_shown(value)}")  # noqa: TRY004 -- no argument is wrong
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("it has the same key twice in one object")
    return record


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."  # noqa: PLR2004 -- as much as helps to find it

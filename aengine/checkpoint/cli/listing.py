"""Listing: what a directory of checkpoints holds, whether it is whole, and from which one a run would go on.

For people, as lines of text, and for scripts, as plain JSON. Changes nothing, and needs neither the lock nor torch.
"""

import math
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from aengine.checkpoint.store import verify as reading
from aengine.checkpoint.store.draft import size_words, words
from aengine.checkpoint.store.find import Finder
from aengine.checkpoint.store.manifest import CheckpointInfo, step_and_revision
from aengine.checkpoint.store.store import Store
from aengine.command_line import plain
from aengine.errors import CheckpointDamaged, CheckpointNotFound

_GAP = _INDENT = "  "
_NUMBERS = 3  # columns: step, age, size
_FILES = 4  # the column that has the condition
_LONGEST = 40  # of a name that came out of a file
_LONGEST_WHY = 1_000  # for why.txt can be a megabyte, as can be a manifest
_MOST_METRICS = 20
_NO_BREAK = "\N{NO-BREAK SPACE}"  # at which no line is wrapped; printed as a space
_LARGEST = 10**15  # bytes: as many as there are names for
_LONGEST_AGO = 36_500 * 86_400  # seconds: more is not an age but a wrong clock


class Condition(Enum):
    """What is known of a checkpoint."""

    WHOLE = "whole"
    UNVERIFIED = "unverified"
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"  # by this user, here and now: it may be whole
    SET_ASIDE = "set aside"  # for its damage
    ABANDONED = "abandoned"  # by a run that went back to one before it


_BOLD = "1"
_COLOURS = {
    Condition.WHOLE: "32",
    Condition.DAMAGED: "31",
    Condition.UNREADABLE: "33",
    Condition.SET_ASIDE: "31",
}


_SET_ASIDE = {reading.DAMAGED: Condition.SET_ASIDE, reading.ABANDONED: Condition.ABANDONED}


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint, or what should be one.

    Attributes:
        path: its directory.
        condition: what is known of it.
        why: the reason, if it cannot be used.
        info: what its manifest says, None if that cannot be read or it was set aside.
        error: what was raised when it was read and verified, if something was.
    """

    path: Path
    condition: Condition
    why: str | None = None
    info: CheckpointInfo | None = None
    error: Exception | None = None

    @property
    def is_trouble(self) -> bool:
        """Whether it needs a look by the user."""
        return self.condition in {Condition.DAMAGED, Condition.UNREADABLE, Condition.SET_ASIDE}


def entries(directory: Path, *, verify: bool, step: int | None = None) -> Iterator[Entry]:
    """Yield what there is, oldest step first, then what was set aside. What is removed meanwhile is left out.

    Args:
        directory: an absolute path.
        verify: whether all files are read, and compared with their checksums. Takes as long as reading takes.
        step: only those of this step.
    """
    names = [(step_and_revision(path.name) or (-1, 0), path) for path in reading.entries(directory)]
    for (its_step, _), path in sorted(names):
        is_wanted = path.name.startswith("step-") if step is None else its_step == step
        if is_wanted and (entry := look(path, verify=verify)) is not None:
            yield entry
    for _, path in names if step is None else ():
        for prefix, condition in _SET_ASIDE.items():
            if path.name.startswith(prefix):
                yield Entry(path, condition, reading.why_set_aside(path))


def look(path: Path, *, verify: bool) -> Entry | None:
    """Return what there is at a path, None if it is gone."""
    info = None
    try:
        info = reading.read(path)
        if verify:
            reading.verify(info)
    except (CheckpointDamaged, CheckpointNotFound) as error:
        return Entry(path, Condition.DAMAGED, str(error), info, error) if os.path.lexists(path) else None
    except OSError as error:
        return Entry(path, Condition.UNREADABLE, words(error), info, error)
    return Entry(path, Condition.WHOLE if verify else Condition.UNVERIFIED, info=info)


def outlook(directory: Path, found: list[Entry]) -> tuple[CheckpointInfo | None, str]:
    """Return the checkpoint that `restore()` would find now, and a sentence that says so or why there is none.

    What was verified is not read again.
    """
    errors = {entry.path: entry.error for entry in found}

    def verify(info: CheckpointInfo) -> None:
        if (error := errors.get(info.path)) is not None:
            raise error

    finder = Finder(Store(directory), lambda _: {}, sets_aside=False, verify=verify)
    try:
        chosen = finder.find("latest")
    except CheckpointDamaged:
        return None, "A run would not resume: none of them is whole, and it does not begin anew for that."
    except OSError as error:
        why = words(error).replace(f"{directory}{os.sep}", "")
        return None, f"A run would not resume: it passes over no checkpoint that it may not read: {why}."
    if chosen is None:
        return None, "A run would begin anew: there is no checkpoint."
    info = chosen.info
    is_unverified = any(entry.condition is Condition.UNVERIFIED for entry in found)
    which = f" ({info.path.name})" if info.revision > 1 else ""  # of several of the same step
    proviso = " if that is whole" if is_unverified else ""
    return info, f"A run would resume from step {_clipped(str(info.step))}{which}{proviso}."


def record(entry: Entry) -> dict[str, Any]:
    """Return an entry as plain JSON: every key always there, null for what is not known."""
    info = entry.info
    step, revision = step_and_revision(entry.path.name) or (None, None)
    return {
        "path": os.fspath(entry.path),
        "condition": entry.condition.value,
        "why": entry.why,
        "step": step,
        "revision": revision,
        "epoch": info and info.epoch,
        "event": info and info.event,
        "mid_step": info and info.is_mid_step,
        "metrics": info and {name: one if math.isfinite(one) else str(one) for name, one in info.metrics.items()},
        "created": info and info.created,
        "size": info and info.size,
        "pinned": info and info.is_pinned,
    }


class Page:
    """Entries as text, for a terminal of some width. Nothing that came out of a file is printed as it is."""

    def __init__(self, directory: Path, width: int, *, is_coloured: bool) -> None:
        self._prefix = f"{directory}{os.sep}"
        self._width = width
        self._is_coloured = is_coloured

    def table(self, found: list[Entry], now: float) -> Iterator[str]:
        """Yield the lines of a table of those whose manifest can be read, the reasons below it."""
        readable = [(entry, entry.info) for entry in found if entry.info is not None]
        if readable:
            yield from self._rows(readable, now)
        unused = [entry for entry in found if entry.why is not None]
        if unused:
            yield from ([""] if readable else [])
            yield "Not used:"
        for entry in unused:
            yield from self.verdict(entry, _INDENT)

    def verdict(self, entry: Entry, indent: str = "") -> Iterator[str]:
        """Yield the lines that say of one entry whether it is whole, or why it cannot be used."""
        condition = self._colour(entry.condition.value, _COLOURS.get(entry.condition))
        size = f" ({_size(entry.info.size)})" if entry.info is not None else ""
        yield f"{indent}{plain(entry.path.name)}: {condition}{size}"
        why = (entry.why or "").replace(self._prefix, "")
        yield from self.wrapped(why if len(why) <= _LONGEST_WHY else f"{why[:_LONGEST_WHY]} ...", indent + _INDENT)

    def wrapped(self, text: str, indent: str = "") -> list[str]:
        """Return a text in lines, broken between words only."""
        return self._filled(plain(text), indent)

    def _rows(self, readable: list[tuple[Entry, CheckpointInfo]], now: float) -> Iterator[str]:
        heads = ["step", "age", "size", "event", "files", "pinned"]
        rows = [
            [
                _clipped(str(info.step)),
                _age(now - info.created),
                _size(info.size),
                _clipped(info.event) + (" (mid-step)" if info.is_mid_step else ""),
                entry.condition.value,
                "yes" if info.is_pinned else "",
            ]
            for entry, info in readable
        ]
        if not any(info.is_pinned for _, info in readable):
            heads.pop()
        widths = [max(len(head), *(len(row[n]) for row in rows)) for n, head in enumerate(heads)]
        taken = sum(widths) + len(_GAP) * len(widths)
        metrics = [_metrics(info) for _, info in readable]
        longest = max((len(each) for row in metrics for each in row), default=0)
        is_beside = taken + longest <= self._width  # or they have lines of their own, below
        heads = _padded(heads, widths) + (["metrics"] if is_beside and longest else [])
        yield self._colour(_GAP.join(heads).rstrip(), _BOLD)
        for row, (entry, _), its_metrics in zip(rows, readable, metrics, strict=True):
            cells = _padded(row, widths)
            cells[_FILES] = self._colour(cells[_FILES], _COLOURS.get(entry.condition))
            lines = self._filled(" ".join(its_metrics), " " * taken if is_beside else _INDENT * 4)
            first = lines.pop(0).lstrip() if is_beside and lines else ""
            yield _GAP.join([*cells, first]).rstrip()
            yield from lines

    def _filled(self, text: str, indent: str) -> list[str]:
        lines = textwrap.wrap(
            text,
            max(self._width, len(indent) + 1),
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return [line.replace(_NO_BREAK, " ") for line in lines]

    def _colour(self, text: str, code: str | None) -> str:
        return f"\033[{code}m{text}\033[0m" if self._is_coloured and code else text


def _padded(row: list[str], widths: list[int]) -> list[str]:
    """Numbers to the right, words to the left."""
    return [
        cell.rjust(width) if n < _NUMBERS else cell.ljust(width)
        for n, (cell, width) in enumerate(zip(row, widths, strict=False))
    ]


def _metrics(info: CheckpointInfo) -> list[str]:
    """Return names and numbers, each in one piece, to be put beside each other with spaces between them."""
    said = [f"{_clipped(name)} {value:.4g}".replace(" ", _NO_BREAK) for name, value in info.metrics.items()]
    if len(said) > _MOST_METRICS:
        said[_MOST_METRICS:] = [f"and {len(said) - _MOST_METRICS} more".replace(" ", _NO_BREAK)]
    return [f"{each}," for each in said[:-1]] + said[-1:]


def _clipped(text: str) -> str:
    text = plain(text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _size(size: int) -> str:
    return size_words(size) if size < _LARGEST else "?"


def _age(seconds: float) -> str:
    """Return a time that has passed, in a unit of which there are two at least."""
    if seconds > _LONGEST_AGO:
        return "?"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"  # another machine's clock may be ahead

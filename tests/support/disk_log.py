"""What a process does to the disk, call by call; and what a disk may look like after a power cut.

The worst that may happen: what was written to a file and not synced is there, or lost, or zeros; and each change of the
names in a directory that was not synced is there or not, whatever became of the others. (Journaling file systems keep
the order of the changes. Nothing here relies on that.)
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

from aengine.checkpoint.store.draft import Draft
from aengine.checkpoint.store.manifest import CheckpointInfo
from aengine.checkpoint.store.retention import Keep
from aengine.checkpoint.store.store import Store

CALLS = ["open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir"]

Call: TypeAlias = tuple[str, Path, Any]
"""What was done, to what, and with what: the bytes written, the new name, or None."""

Tree: TypeAlias = "bytes | frozenset[tuple[str, Tree]]"


@contextmanager
def locked(directory: Path, keep: Keep) -> Iterator[Store]:
    """Give a store that may be written to."""
    store = Store(directory, keep)
    store.lock()
    try:
        yield store
    finally:
        store.unlock()


def save(
    store: Store,
    step: int,
    content: bytes = b"weights",
    *,
    before_commit: Callable[[Draft], object] = lambda draft: None,
    **info: Any,
) -> CheckpointInfo:
    """Write and commit a small checkpoint with a file in each place where there may be one."""
    info = {"epoch": 1, "event": "iteration_completed", "metrics": {}, "versions": {"aengine": "0"}, **info}
    with store.begin(step) as draft:
        draft.write("state.pt", lambda file: file.write(content))
        draft.write("dcp/.metadata", lambda file: file.write(b"shards"))
        before_commit(draft)
        return draft.commit(step=step, **info)


@contextmanager
def watched(before: Callable[[str, Path, Any], object]) -> Iterator[None]:
    """Call `before(call, path, argument)` before each call of the system that changes the disk or makes it durable."""
    paths: dict[int, Path] = {}

    def path_of(target: Any, dir_fd: int | None) -> Path:
        if isinstance(target, int):
            return paths[target]
        return Path(paths[dir_fd] if dir_fd is not None else Path.cwd(), target)

    def watch(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **keywords: Any) -> Any:
            path = path_of(target, keywords.get("dir_fd"))
            if name == "open":
                if arguments[0] & os.O_CREAT and not path.exists():
                    before("create", path, None)
                descriptor = real(target, *arguments, **keywords)
                paths[descriptor] = path
                return descriptor
            before(name, path, arguments[0] if arguments and name in {"write", "rename"} else None)
            return real(target, *arguments, **keywords)

        return call

    with ExitStack() as patches:
        for name in CALLS:
            patches.enter_context(patch.object(os, name, watch(name, getattr(os, name))))
        yield


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Give the list that what is done to the disk is written into. Other things may be put into it as well."""
    record: list[Call] = []

    def note(call: str, path: Path, argument: Any) -> None:
        record.append((call, path, bytes(argument) if call == "write" else argument))

    with watched(note):
        yield record


@dataclass(eq=False)
class _File:
    content: bytes = b""
    synced: bytes = b""


@dataclass(eq=False)
class _Directory:
    changes: list[dict[str, "_File | _Directory | None"]] = field(default_factory=list)
    synced: int = 0

    def names(self, happened: Iterable[bool] | None = None) -> dict[str, "_File | _Directory"]:
        names: dict[str, _File | _Directory | None] = {}
        for change in self.changes if happened is None else itertools.compress(self.changes, happened):
            names.update(change)
        return {name: node for name, node in names.items() if node is not None}


def disks_after_power_cut(record: Iterable[Call], root: Path) -> set[Tree]:
    """Return every content of `root`, which was empty before these calls, that a power cut after them may leave."""
    top = _Directory()

    def node_at(path: Path) -> Any:
        node: Any = top
        for name in path.relative_to(root).parts:
            node = node.names()[name]
        return node

    for call, path, argument in record:
        match call:
            case "create" | "mkdir":
                node_at(path.parent).changes.append({path.name: _File() if call == "create" else _Directory()})
            case "write":
                node_at(path).content += argument
            case "rename":
                assert Path(argument).parent == path.parent
                node_at(path.parent).changes.append({path.name: None, Path(argument).name: node_at(path)})
            case "unlink" | "rmdir":
                node_at(path.parent).changes.append({path.name: None})
            case "fsync":
                node = node_at(path)
                if isinstance(node, _File):
                    node.synced = node.content
                else:
                    node.synced = len(node.changes)
            case _:
                pass
    return _trees(top)


def _trees(node: _File | _Directory) -> set[Tree]:
    if isinstance(node, _File):
        return {node.synced, node.content, bytes(len(node.content)) if node.content != node.synced else node.content}
    trees: set[Tree] = set()
    for unsynced in itertools.product([False, True], repeat=len(node.changes) - node.synced):
        names = node.names([True] * node.synced + list(unsynced))
        for contents in itertools.product(*(_trees(each) for each in names.values())):
            trees.add(frozenset(zip(names, contents, strict=True)))
    return trees


def build(tree: Tree, path: Path) -> None:
    """Put what was computed on a real disk."""
    if isinstance(tree, bytes):
        path.write_bytes(tree)
        return
    path.mkdir()
    for name, content in tree:
        build(content, path / name)

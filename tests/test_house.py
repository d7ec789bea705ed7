"""The house rules that no linter holds."""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aengine

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "aengine").rglob("*.py"))
FOLDERS = ("aengine", "benchmarks", "examples", "tests", ".ci", ".github")

# Run by a new interpreter: what an import costs and brings along. CPU time, since the clock on the wall also counts
# what else the machine does.
IMPORT = """
import json, sys, threading, time
before = set(sys.modules)
started = time.process_time()
{statement}
seconds = time.process_time() - started
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names
print(json.dumps({{"seconds": seconds, "loaded": sorted(loaded), "threads": threading.active_count()}}))
"""


def imported(statement: str) -> dict[str, Any]:
    program = IMPORT.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_is_short_enough_to_be_read_at_once(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    # The loop is one generator, the driver one run from its beginning to its end, the session what all of these begin
    # and end with, and the engine all that users call, most of it docstrings: each reads better in one piece.
    names = ("loop/loop.py", "drivers/driver.py", "drivers/session.py", "engine.py")
    assert lines <= (750 if path in [ROOT / "aengine" / name for name in names] else 500)


def test_tests_have_a_room_for_each_package() -> None:
    packages = [path.parent.relative_to(ROOT / "aengine") for path in MODULES if path.name == "__init__.py"]
    assert not [str(package) for package in packages if not list((ROOT / "tests" / package).glob("test_*.py"))]


# Words for people. What they stand for in a comment or docstring should be named: it is an object, a task, a thread.
PERSON = re.compile(r"\b(?:he|him|his|she|hers?|who|whom|whoever|somebody|someone|nobody)\b", re.IGNORECASE)
# Not for things: "users who", "those who write", "a caller who".
MEANT = re.compile(r"\b(?:authors?|callers?|developers?|people|persons?|readers? of the code|those|users?),? who\b")


def comments_and_docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Give each with the number of its first line."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_things_are_not_spoken_of_as_people(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{first + number}: {line.strip()}"
        for first, text in comments_and_docstrings(path.read_text(encoding="utf-8"))
        for number, line in enumerate(text.splitlines())
        if PERSON.search(MEANT.sub("", line))
    ]
    assert not found


def test_import_brings_nothing_but_the_standard_library() -> None:
    assert imported("import aengine, aengine.checkpoint, aengine.handlers, aengine.training")["loaded"] == ["aengine"]


def test_engine_brings_anyio_only_and_starts_no_thread() -> None:
    names = [name for name in aengine.__all__ if name != "Checkpoint"]
    found = imported(f"from aengine import {', '.join(names)}")
    assert set(found["loaded"]) <= {"aengine", "anyio", "sniffio"}  # anyio looks for sniffio
    assert found["threads"] == 1


@pytest.mark.slow
def test_import_is_quick() -> None:
    """The aim is 0.05 s; ten times that tells a heavy import apart from a slow machine."""
    seconds = min(imported("from aengine import Engine, Events")["seconds"] for _ in range(5))
    assert seconds < 0.5, "the fastest of five"


def test_no_path_of_one_machine_is_committed() -> None:
    """Neither a home directory nor a work tree: they are elsewhere on the next machine."""
    path_of_a_machine = re.compile(r"/(?:home|root|Users|work)/")
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for pattern in ("*.md", "*.toml", "*.txt", "*.yaml") for path in ROOT.glob(pattern)]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in files
        if "__pycache__" not in path.parts and path.suffix != ".png"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if path_of_a_machine.search(line)
    ]
    assert not found

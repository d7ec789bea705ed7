"""Users' programs under strict type checkers: right ones pass, and of wrong ones each marked line is refused.

A line of a wrong program says by which rules, mypy's and pyright's: `# error: arg-type, reportArgumentType`. README's
blocks are programs, too, as people write them who check less: by pyright's basic mode, and mypy as it is by default.
Each checker is run once, for all of them, as users run it: not with the settings of this repository.
"""

import builtins
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from symtable import SymbolTable, symtable
from typing import TypeAlias

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # each checker reads torch: mypy, the first time, for minutes

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"# error: ([\w-]+(?:, [\w-]+)*)$")

Rules: TypeAlias = dict[tuple[str, int], set[str]]
"""By which rules lines are refused, by the name of the file and the number of the line."""

MYPY = """
[mypy]
strict = True
explicit_package_bases = True
[mypy-readme.*]
check_untyped_defs = False
disallow_any_generics = False
disallow_incomplete_defs = False
disallow_subclassing_any = False
disallow_untyped_calls = False
disallow_untyped_decorators = False
disallow_untyped_defs = False
disable_error_code = import-untyped, var-annotated
implicit_reexport = True
warn_return_any = False
"""
CONSEQUENCES = ("reportUnknown", "reportUntyped")
"""The rules, by their beginnings, that pyright finds broken by whatever has no type, since it is wrong."""

PYRIGHT = {"typeCheckingMode": "basic", "strict": ["right", "wrong"], "extraPaths": [str(ROOT)]}


def names_of(table: SymbolTable, *, is_module: bool = True) -> tuple[set[str], set[str]]:
    """Return the names that a block binds, and those that it refers to, in its functions too."""
    symbols = table.get_symbols()
    bound = {one.get_name() for one in symbols if is_module and (one.is_assigned() or one.is_imported())}
    used = {one.get_name() for one in symbols if one.is_referenced() and (is_module or one.is_global())}
    for child in table.get_children():
        used |= names_of(child, is_module=False)[1]
    return bound, used


def blocks_of_readme() -> Iterator[tuple[str, str]]:
    """Give each block as a module, named by its line, that imports what earlier ones have bound."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    homes: dict[str, str] = {}
    for block in BLOCK.finditer(text):
        name = f"line_{text[: block.start(1)].count(chr(10)) + 1}"
        bound, used = names_of(symtable(block[1], name, "exec"))
        needed = sorted(used - bound - set(dir(builtins)))
        yield name, "; ".join(f"from readme.{homes[one]} import {one}" for one in needed) + "\n" + block[1]
        homes.update(dict.fromkeys(bound, name))


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    for kind in ("right", "wrong"):
        shutil.copytree(Path(__file__).parent / kind, tmp_path / kind)
    (tmp_path / "readme").mkdir()
    for name, code in blocks_of_readme():
        (tmp_path / "readme" / f"{name}.py").write_text(code, encoding="utf-8")
    return tmp_path


def expected(programs: Path, *, of_pyright: bool) -> Rules:
    rules: Rules = {}
    for path in programs.glob("wrong/*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if mark := MARK.search(line):
                rules[f"wrong/{path.name}", number] = {
                    rule for rule in mark[1].split(", ") if rule.startswith("report") is of_pyright
                }
    assert len(rules) > 50
    return rules


def run(programs: Path, *command: str) -> str:
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=programs, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_mypy_says_what_is_wrong_and_nothing_else(programs: Path) -> None:
    pytest.importorskip("mypy")
    (programs / "mypy.ini").write_text(MYPY, encoding="utf-8")
    cache = ROOT / ".mypy_cache" / "programs"
    said = run(programs, "mypy", "--no-pretty", "--cache-dir", str(cache), "right", "wrong", "readme")
    found: Rules = defaultdict(set)
    for path, line, rule in re.findall(
        r"^((?:right|wrong|readme)/\S+):(\d+): error: .*\[([\w-]+)\]$", said, re.MULTILINE
    ):
        found[path, int(line)].add(rule)
    assert found == expected(programs, of_pyright=False), said


def test_pyright_says_what_is_wrong_and_nothing_else(programs: Path) -> None:
    pytest.importorskip("pyright")
    (programs / "pyrightconfig.json").write_text(json.dumps(PYRIGHT), encoding="utf-8")
    said = json.loads(run(programs, "pyright", "--outputjson"))
    found: Rules = defaultdict(set)
    for one in said["generalDiagnostics"]:
        if one["severity"] == "error":
            path = Path(one["file"]).resolve().relative_to(programs.resolve()).as_posix()
            rule = one.get("rule", "syntax")
            if not (path.startswith("wrong/") and rule.startswith(CONSEQUENCES)):
                found[path, one["range"]["start"]["line"] + 1].add(rule)
    assert found == expected(programs, of_pyright=True), said

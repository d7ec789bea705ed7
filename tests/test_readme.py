"""README.md is true: its code runs, and what it should name is named."""

import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_python_blocks_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In order, in one namespace, as one reads them; tracebacks show the line of README.md."""
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    monkeypatch.chdir(tmp_path)
    for block in BLOCK.finditer(TEXT):
        lines_above = TEXT[: block.start(1)].count("\n")
        exec(compile("\n" * lines_above + block[1], str(README), "exec"), module.__dict__)


def test_no_python_block_escapes() -> None:
    assert len(BLOCK.findall(TEXT)) == len(re.findall(r"```\s*py", TEXT, re.IGNORECASE)) > 0
    assert "<!-- not run -->" not in TEXT


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_named(example: Path) -> None:
    assert f"examples/{example.name}" in TEXT


def test_paths_that_it_links_to_exist() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXT)
    assert not [link for link in links if not (ROOT / link).exists()]

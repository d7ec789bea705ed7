"""README.md, CONTRIBUTING.md and docs/ are true: their code runs, and the files and names that they mention exist."""

import io
import keyword
import re
import sys
import tokenize
import types
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

EVERY_PAGE = pytest.mark.parametrize("page", [README, *GUIDES], ids=lambda page: page.name)
EVERY_GUIDE = pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_in_prose(page: Path) -> list[str]:
    """Return what stands between backticks, outside of blocks."""
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


@cache
def names_in_the_code() -> set[str]:
    """Return every identifier in the package and its tests and the words of the settings; no comments, no strings."""
    names = {*keyword.kwlist, *re.findall(r"\w+", text_of(ROOT / "pyproject.toml"))}
    for path in [*(ROOT / "aengine").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        names.add(path.stem)
        tokens = tokenize.generate_tokens(io.StringIO(text_of(path)).readline)
        names.update(token.string for token in tokens if token.type == tokenize.NAME)
    return names


@EVERY_PAGE
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In order, in one namespace for each page; tracebacks show the line of the page."""
    module = types.ModuleType(page.stem)
    monkeypatch.setitem(sys.modules, page.stem, module)
    monkeypatch.chdir(tmp_path)
    text = text_of(page)
    for block in BLOCK.finditer(text):
        lines_above = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines_above + block[1], str(page), "exec"), module.__dict__)


@EVERY_PAGE
def test_no_python_block_escapes(page: Path) -> None:
    text = text_of(page)
    assert len(BLOCK.findall(text)) == len(re.findall(r"```\s*py", text, re.IGNORECASE)) > 0
    assert "<!-- not run -->" not in text


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_named(example: Path) -> None:
    assert f"examples/{example.name}" in text_of(README)


@EVERY_PAGE
def test_paths_that_it_links_to_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text_of(page))
    broken = [link for link in links if not (page.parent / link).exists()]
    assert not broken


@EVERY_GUIDE
def test_paths_that_it_mentions_exist(page: Path) -> None:
    """A path in capitals, such as `tests/PACKAGE/`, stands for many."""
    paths = [code for code in code_in_prose(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|\.\w+)", code)]
    mentioned = [path for path in paths if "/" in path and not re.search(r"[A-Z]{4}", path)]
    assert mentioned
    missing = [path for path in mentioned if not (ROOT / path).exists()]
    assert not missing


@EVERY_GUIDE
def test_names_that_it_mentions_exist(page: Path) -> None:
    """Classes, functions, attributes and arguments, with or without their dots, parentheses and equals signs."""
    chains = [code for code in code_in_prose(page) if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\)|=)?", code)]
    chains = [re.split(r"[=(]", chain)[0] for chain in chains if not (ROOT / chain).exists()]
    names = {name for chain in chains for name in chain.split(".")}
    assert names
    unknown = sorted(names - names_in_the_code())
    assert not unknown

"""What users import: docs/api.md, `__all__`, what packages hand on and what type checkers see are the same names.

And their parameters and members are those of the page: whatever else there is begins with an underscore.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from support.public_names import PUBLIC, members_of, names_in, values_in

from aengine.lazy import PACKAGES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
# What is also handed on by `aengine`, and is described with the rest of its package.
ELSEWHERE = {("aengine", "Checkpoint"), ("aengine", "Keep")}

EVERY_PACKAGE = pytest.mark.parametrize("package", PUBLIC)


class Entry(NamedTuple):
    """A name of the page: its parameters, as they are written, and its members with theirs."""

    signature: str
    members: dict[str, str]


@cache
def entries() -> dict[str, dict[str, Entry]]:
    """Return what the page lists, package by package.

    In the blocks under a heading that is a package's name, what is not indented begins an entry, and `.name` or
    `.name(parameters)` is one of its members. A comment ends with its line.
    """
    parts = re.split(r"^#+ `(aengine[\w.]*)`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, dict[str, Entry]] = {}
    for package, rest in zip(parts[1::2], parts[2::2], strict=True):
        section = re.split(r"^## ", rest, flags=re.MULTILINE)[0]
        blocks = "\n".join(re.findall(r"^```text\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL))
        bare = re.sub(r" *#.*$", "", blocks, flags=re.MULTILINE)
        for entry in re.split(r"\n(?=\S)", bare.strip()):
            words = re.findall(r"(\.?)(\w+)((?:\((?:[^()]|\([^()]*\))*\))?)", " ".join(entry.split()))
            (_, name, signature), *members = words
            assert all(dot for dot, *_ in members), entry
            assert name not in found.setdefault(package, {}), f"{name} stands twice"
            found[package][name] = Entry(signature, {member: given for _, member, given in members})
    return found


@EVERY_PACKAGE
def test_page_lists_what_a_package_hands_on(package: str) -> None:
    assert sorted(entries()[package]) == sorted(values_in(package))


def test_page_has_no_other_package() -> None:
    assert sorted(entries()) == sorted(PUBLIC)


@EVERY_PACKAGE
def test_parameters_are_those_of_the_page(package: str) -> None:
    written = {name: entry.signature for name, entry in entries()[package].items() if (package, name) not in ELSEWHERE}
    there = {name: given for name, given in names_in(package).items() if (package, name) not in ELSEWHERE}
    assert written == there


@EVERY_PACKAGE
def test_members_are_those_of_the_page(package: str) -> None:
    values = values_in(package)
    classes = {
        name: kind for name, kind in values.items() if inspect.isclass(kind) and (package, name) not in ELSEWHERE
    }
    assert {name: entries()[package][name].members for name in classes} == {
        name: dict(members_of(kind)) for name, kind in classes.items()
    }


@EVERY_PACKAGE
def test_every_name_says_what_it_is(package: str) -> None:
    described = {
        name: value for name, value in values_in(package).items() if inspect.isclass(value) or inspect.isroutine(value)
    }
    assert [name for name, value in described.items() if not value.__dict__.get("__doc__", value.__doc__)] == []


@EVERY_PACKAGE
def test_names_are_sorted(package: str) -> None:
    assert [*values_in(package)] == sorted(values_in(package))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_is_a_module_of_its_package(package: str) -> None:
    module = importlib.import_module(package)
    assert {*module.__all__} & {one.name for one in pkgutil.iter_modules(module.__path__)} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_what_is_handed_on(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse(inspect.getsource(module))
    [branch] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        one.name: statement.module
        for statement in branch.body
        if isinstance(statement, ast.ImportFrom)
        for one in statement.names
        if one.asname is None  # `handlers as handlers`: the packages themselves
    }
    [table] = [node for node in ast.walk(branch) if isinstance(node, ast.Dict)]
    handed_on = {name: f"{package}.{home}" for home, names in ast.literal_eval(table).items() for name in names.split()}
    assert seen == handed_on
    assert sorted(seen) == sorted(module.__all__)


PROGRAMS = [ROOT / "README.md", PAGE, *sorted((ROOT / "examples").glob("*.py"))]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_users_import_from_packages(path: Path) -> None:
    imports = re.findall(
        r"^\s*from (aengine[\w.]*) import (\([^)]*\)|.*)$", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    imported = {(package, name) for package, names in imports for name in re.findall(r"\w+", names.partition("#")[0])}
    public = {(package, name) for package in PUBLIC for name in values_in(package)}
    assert sorted(imported - public) == []

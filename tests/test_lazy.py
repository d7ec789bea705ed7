"""Packages hand their names on lazily: as if they were there, and what is not there says what is meant."""

import importlib
import inspect
import pickle
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

import aengine
import aengine.handlers
import aengine.loggers
from aengine.lazy import PACKAGES


def run(program: str) -> str:
    """Run a program with a new interpreter, and return what it has printed."""
    done = subprocess.run(
        [sys.executable, "-O", "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def message_of(statement: str) -> str:
    """Execute a statement that is to fail, and return the error, with its type."""
    with pytest.raises((ImportError, AttributeError)) as raised:
        exec(statement, {"aengine": aengine})
    return f"{raised.type.__name__}: {raised.value}"


def take_away_tqdm(patch: pytest.MonkeyPatch) -> None:
    """Have it not be installed, and what needs it not be loaded yet."""
    _ = aengine.handlers.TqdmBars
    patch.delattr(aengine.handlers, "TqdmBars")
    patch.delitem(sys.modules, "aengine.handlers.progress_tqdm")
    patch.setitem(sys.modules, "tqdm", None)
    patch.setitem(sys.modules, "tqdm.auto", None)


# What is there


def test_star_gives_all_names() -> None:
    given: dict[str, Any] = {}
    exec("from aengine.handlers import *", given)
    assert given.keys() - {"__builtins__"} == {*aengine.handlers.__all__}


def test_dir_and_what_looks_at_all_members_find_all_names() -> None:
    found = {name for name, _ in inspect.getmembers(aengine.handlers)}
    assert {*aengine.handlers.__all__} <= found <= {*dir(aengine.handlers)}


def test_reloaded_package_still_has_its_names() -> None:
    before = {name: getattr(aengine.handlers, name) for name in aengine.handlers.__all__}
    assert importlib.reload(aengine.handlers) is aengine.handlers
    assert before == {name: getattr(aengine.handlers, name) for name in aengine.handlers.__all__}


def test_instance_of_what_was_handed_on_is_pickled() -> None:
    assert pickle.loads(pickle.dumps(aengine.Events.STARTED)) is aengine.Events.STARTED
    assert pickle.loads(pickle.dumps(aengine.handlers.EarlyStopping)) is aengine.handlers.EarlyStopping


def test_packages_are_there_once_aengine_is_imported() -> None:
    assert run("import aengine; print(aengine.handlers.EarlyStopping.__name__)") == "EarlyStopping"


def test_package_loads_none_of_its_modules_until_a_name_is_asked_for() -> None:
    program = """
import sys, aengine, aengine.checkpoint, aengine.handlers, aengine.loggers, aengine.training
dir(aengine), aengine.__all__, aengine.__version__
print(sorted(name for name in sys.modules if name.startswith("aengine")))
"""
    loaded = {*eval(run(program))}
    assert loaded <= {*PACKAGES, "aengine.lazy", "aengine.guesses"}


def test_threads_that_ask_at_once_get_the_same() -> None:
    program = """
import threading, aengine
from concurrent.futures import ThreadPoolExecutor
start = threading.Barrier(8)
def ask(name):
    start.wait()
    return getattr(aengine, name)
with ThreadPoolExecutor(8) as executor:
    found = list(executor.map(ask, ["Engine", "Events", "Keep", "stop_on_signals"] * 2))
print([one.__name__ for one in found])
"""
    assert eval(run(program)) == ["Engine", "Events", "Keep", "stop_on_signals"] * 2


# What is not there


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("aengine.Enginee", "AttributeError: aengine has no 'Enginee': Engine?"),
        ("aengine.handers", "AttributeError: aengine has no 'handers': handlers?"),
        ("from aengine import Enginee", "ImportError: aengine has no 'Enginee': Engine?"),
        (
            "from aengine.handlers import ProgressBars",
            "ImportError: aengine.handlers has no 'ProgressBars': ProgressBar?",
        ),
        ("aengine.handlers.ProgressBars", "AttributeError: aengine.handlers has no 'ProgressBars': ProgressBar?"),
        ("from aengine.loggers import jsonlines_", "ImportError: aengine.loggers has no 'jsonlines_': JSONLines?"),
        (
            "from aengine.training import ProgressBar",
            "ImportError: aengine.training has no 'ProgressBar': from aengine.handlers import ProgressBar",
        ),
        (
            "from aengine.handlers import Checkpoint",
            "ImportError: aengine.handlers has no 'Checkpoint': from aengine import Checkpoint",
        ),
        (
            "from aengine import early_stoping",
            "ImportError: aengine has no 'early_stoping': from aengine.handlers import EarlyStopping?",
        ),
        (
            "from aengine.handlers import TerminateOnNan",
            "ImportError: aengine.handlers has no 'TerminateOnNan': from aengine.handlers import NanGuard",
        ),
        (
            "from aengine.handlers import EpochOutputStore",
            (
                "ImportError: aengine.handlers has no 'EpochOutputStore':"
                " from ignite.handlers import EpochOutputStore  # pytorch-ignite's own attaches as it is"
            ),
        ),
    ],
)
def test_wrong_name_is_answered_by_what_is_meant(statement: str, message: str) -> None:
    assert message_of(statement) == message


@pytest.mark.parametrize("statement", ["from aengine.plots import xyz", "import aengine.plots; aengine.plots.xyz"])
def test_name_that_is_like_no_other_is_answered_by_those_there_are(statement: str) -> None:
    names = ", ".join(importlib.import_module("aengine.plots").__all__)
    assert message_of(statement).endswith(f": aengine.plots has no 'xyz'; it has {names}")


@pytest.mark.parametrize("name", ["__wrapped__", "__path_hooks__", "_repr_html_", "_ipython_display_"])
def test_what_tools_ask_every_module_for_is_just_not_there(name: str) -> None:
    assert not hasattr(aengine, name)
    assert message_of(f"aengine.{name}") == f"AttributeError: aengine has no {name!r}"


def test_module_of_a_package_can_be_imported_from_it() -> None:
    given: dict[str, Any] = {}
    exec("from aengine.handlers import early_stopping", given)
    assert isinstance(given["early_stopping"], ModuleType)


def test_wrong_name_is_just_not_there_for_those_who_ask_first() -> None:
    assert not hasattr(aengine, "Enginee")
    assert getattr(aengine, "Enginee", None) is None


# Optional libraries


def test_name_whose_library_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    take_away_tqdm(monkeypatch)
    said = 'pip install "tqdm>=4.66", which is what the extra "progress" brings'
    for statement in ("from aengine.handlers import TqdmBars", "from aengine.handlers import *"):
        assert message_of(statement).startswith("ImportError: ")
        assert said in message_of(statement)
    assert said in message_of("aengine.handlers.TqdmBars")


def test_what_looks_at_all_members_goes_on_where_a_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    take_away_tqdm(monkeypatch)
    assert not hasattr(aengine.handlers, "TqdmBars")
    found = dict(inspect.getmembers(aengine.handlers))
    assert "TqdmBars" not in found
    assert "EarlyStopping" in found

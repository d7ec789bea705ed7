"""What a wrong word was meant to be: near ones, and other libraries' names."""

import importlib
import re
import warnings

import pytest

from aengine.guesses import KEYWORDS, NAMES, near_word
from aengine.lazy import PACKAGES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ignite.engine
    import ignite.handlers
    import ignite.metrics

NAMES_OF_LIGHTNING = {
    "AdvancedProfiler", "CSVLogger", "Callback", "DeviceStatsMonitor", "GradientAccumulationScheduler",
    "LearningRateFinder", "LearningRateMonitor", "LightningModule", "MLFlowLogger", "PyTorchProfiler",
    "RichProgressBar", "SimpleProfiler", "StochasticWeightAveraging", "TQDMProgressBar", "TensorBoardLogger", "Trainer",
    "WandbLogger",
}  # fmt: skip


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("drop-oldest", "drop_oldest"),
        ("DropOldest", "drop_oldest"),
        ("newest", None),
        ("lates", "latest"),
        ("wiat", "wait"),
        ("", None),
        ("9", None),
    ],
)
def test_near_word(word: str, meant: str | None) -> None:
    assert near_word(word, ["wait", "latest", "drop_oldest", "drop_new", "error"]) == meant


@pytest.mark.parametrize("advice", sorted({*NAMES.values()}))
def test_advice_for_another_librarys_name_is_an_import_that_works(advice: str) -> None:
    exec(advice, {})  # with its comment


def test_each_name_is_public_in_the_other_library() -> None:
    theirs = {*ignite.engine.__all__, *ignite.handlers.__all__, *ignite.metrics.__all__}
    others = {"Serializable", "convert_tensor", "metrics", "as_ignite", "ResumableEpochWise"}  # in modules of their own
    assert NAMES.keys() <= theirs | NAMES_OF_LIGHTNING | others
    assert NAMES.keys() >= NAMES_OF_LIGHTNING


def test_every_engine_and_handler_of_ignite_is_here_or_answered() -> None:
    ours = {name for package in PACKAGES for name in importlib.import_module(package).__all__}
    theirs = {*ignite.engine.__all__, *ignite.handlers.__all__}
    assert theirs <= ours | NAMES.keys()


def test_no_name_of_ours_is_answered_as_another_librarys() -> None:
    ours = {name for package in PACKAGES for name in importlib.import_module(package).__all__}
    assert not ours & NAMES.keys()


def test_keywords_are_answered_by_one_word_or_by_a_sentence() -> None:
    assert [word for word, meant in KEYWORDS.items() if not re.fullmatch(r"\w+|write .+", meant)] == []

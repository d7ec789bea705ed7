"""What all commands share: how a wrong one is answered, what the process exits with, and what a terminal is sent."""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from aengine.guesses import near_word

FINE, TROUBLE, WRONG = 0, 1, 2
"""What the process exits with: all is fine; something was found that is not; wrong usage, or it cannot be done."""

JSON = "print strict JSON, for scripts"
"""The help of `--json`."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command, and what may be meant."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = list(action.choices or ())
        if not choices or value in choices:
            return
        if os.sep in value or Path(value).exists():
            raise argparse.ArgumentError(
                action, f"it comes first, and then what it is done to: write  {self.prog} {choices[0]} {value}"
            )
        near = near_word(value, choices)
        meant = f"{near}?" if near else f"it is one of {', '.join(choices)}"
        raise argparse.ArgumentError(action, f"there is no {value!r}: {meant}")

    def error(self, message: str) -> NoReturn:
        """End the process, having said so."""
        self.exit(WRONG, f"{self.prog}: {plain(message)} (see --help)\n")


class ActionParser(Parser):
    """Takes what an action is done to and its options in any order: also `export DIR --safetensors FILE STEP`.

    argparse gives up on what may be missing, as a STEP, once an option has come. It has a way to parse both in turns,
    but not where one parser calls another, as for `aengine checkpoints export`.
    """

    _is_in_turns = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # its overloads say the same
        """Parse, as `argparse.ArgumentParser` says."""
        if self._is_in_turns:  # called by what is called below
            return super().parse_known_args(args, namespace)
        self._is_in_turns = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_in_turns = False


def plain(text: str) -> str:
    """Return a text in which nothing can command a terminal, or turn its direction around."""
    return "".join(one if one.isprintable() else " " if one.isspace() else "\N{REPLACEMENT CHARACTER}" for one in text)


def say(lines: Iterable[str]) -> None:
    """Print lines at once."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def say_json(value: dict[str, Any]) -> None:
    """Print strict JSON."""
    say([json.dumps(value, indent=1, allow_nan=False)])


def warn(why: str) -> None:
    """Print a line where errors go."""
    sys.stderr.write(f"aengine: {plain(why)}\n")

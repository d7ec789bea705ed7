"""The command line: `aengine checkpoints list DIR`, or `python -m aengine checkpoints list DIR`.

A command is a noun, a verb, and what it is done to. The package that has the things of a noun adds it to the parser.
What belongs to the process is in here.
"""

import io
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from aengine import __version__
from aengine.checkpoint.cli.command import add_checkpoints
from aengine.command_line import WRONG, Parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say, by default those of the process, and return what it should exit with."""
    parser = Parser(prog="aengine", description="The training-loop engine for async Python.")
    parser.add_argument("--version", action="version", version=f"aengine {__version__}")
    parser.set_defaults(do=None)
    nouns = parser.add_subparsers(title="commands", metavar="COMMAND")
    add_checkpoints(nouns)
    options = parser.parse_args(arguments)
    if options.do is None:  # a command alone, or none: it shows what may follow
        (options.parser if hasattr(options, "parser") else parser).print_help()
        return WRONG
    return int(options.do(options))


def run() -> NoReturn:
    """Do what the arguments of the process say, and end it."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any command, without a traceback
    for _stream in (sys.stdout, sys.stderr):
        if isinstance(_stream, io.TextIOWrapper):
            _stream.reconfigure(errors="backslashreplace")  # an old terminal must not keep a checkpoint from being seen
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    run()

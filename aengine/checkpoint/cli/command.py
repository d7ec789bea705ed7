"""The command `python -m aengine checkpoints DIR`: looks at checkpoints, pins them, and exports weights.

It never waits for a run and never disturbs one: no lock is taken, and only pin, unpin and export write anything.
Listing and verifying need the standard library only, so that the answer is there at once; export loads torch.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from aengine.checkpoint.cli.listing import Condition, Entry, Page, entries, outlook, plain, record
from aengine.checkpoint.store.draft import size_words, words
from aengine.checkpoint.store.manifest import MANIFEST, step_and_revision
from aengine.checkpoint.store.store import Store
from aengine.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound

FINE, DAMAGED, WRONG = 0, 1, 2
"""What the process exits with."""

_JSON = "print strict JSON, for scripts"
_ABOUT = """\
List the checkpoints in a directory, verify them, and say which one a run would
resume from. No lock is taken: a run may be writing there at the same time.
"""

_EPILOG = """\
exit status:
  0  all is fine
  1  something is damaged, cannot be read, or was set aside (which verify does
     not count)
  2  wrong usage, no such directory or step, or it cannot be done

--json prints one object, in strict JSON, with these keys.
list and verify:
  directory     its absolute path
  checkpoints   a list, oldest step first, then what was set aside. Each has
    path        of its directory
    condition   "whole", "unverified", "damaged", "unreadable", "set aside"
                (for its damage) or "abandoned" (by a run that went back)
    why         text, or null if it can be used
    step, revision, epoch, event, pinned
    mid_step    whether it was taken in the middle of a step that failed
    metrics     an object of numbers, and of the texts "nan", "inf" and "-inf"
    created     seconds since 1970
    size        in bytes
                each of these is null where it is not known
  resumes_from  the path that a run would resume from, or null;
                not there for verify STEP
pin and unpin:  path, step, pinned
export:         file, step, part, tensors, size
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog}: {plain(message)} (see --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say, by default those of the process, and return what it should exit with."""
    parser = _parser()
    options = parser.parse_args(arguments)
    directory = Path(options.directory).absolute()
    try:
        if not directory.is_dir():
            raise CheckpointNotFound(f"there is no directory {directory}")
        if step_and_revision(directory.name) is not None or (directory / MANIFEST).exists():
            raise CheckpointNotFound(
                f"{directory} is one checkpoint: give the directory that it is in, which is {directory.parent}"
            )
        return int(options.action(directory, options))
    except (CheckpointError, ImportError) as error:  # that of safetensors says how to install it
        _warn(str(error))
        return DAMAGED if isinstance(error, CheckpointDamaged) else WRONG
    except OSError as error:
        _warn(words(error))
        return WRONG


def _parser() -> _Parser:
    parser = _Parser(prog="python -m aengine", description="The training-loop engine for async Python.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="checkpoints")
    checkpoints = commands.add_parser(
        "checkpoints",
        help="list, verify, pin and export the checkpoints in a directory",
        description=_ABOUT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checkpoints.add_argument("directory", metavar="DIR", help="what Checkpoint(...) was given")
    checkpoints.add_argument("--json", action="store_true", help=_JSON)
    checkpoints.add_argument("--no-verify", action="store_true", help="read the manifests only, which is quick")
    checkpoints.set_defaults(action=_list)
    actions = checkpoints.add_subparsers(metavar="[ACTION]", title="actions, instead of the list")

    def add(name: str, do: Callable[[Path, argparse.Namespace], int], about: str) -> _Parser:
        action = actions.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=_JSON)  # here or before
        action.set_defaults(action=do)
        return action

    verify = add("verify", _verify, "read all files and compare them with their checksums")
    verify.add_argument("step", metavar="STEP", type=_step, nargs="?", help="only this one (default: all)")
    export = add("export", _export, "write the tensors of one part, such as a model's weights, to a file")
    export.add_argument("--safetensors", metavar="FILE", type=Path, required=True, help="the file to write")
    export.add_argument(
        "--step", metavar="N", type=_step, help="of this step (default: the one a run would resume from)"
    )
    export.add_argument("--part", metavar="NAME", help="which part (default: model, or the only module)")
    pin = add("pin", partial(_pin, is_pinned=True), "keep a checkpoint for good")
    pin.add_argument("step", metavar="STEP", type=_step)
    unpin = add("unpin", partial(_pin, is_pinned=False), "leave a pinned checkpoint to the rules again")
    unpin.add_argument("step", metavar="STEP", type=_step)
    return parser


def _step(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"a step is a whole number, not {text!r}")
    return int(text)


def _list(directory: Path, options: argparse.Namespace) -> int:
    found = list(entries(directory, verify=not options.no_verify))
    if options.json:
        _say_json(_records(directory, found))
    else:
        page = _page(directory)
        lines = list(page.table(found, time.time()))  # noqa: TID251 -- it is compared with another day's
        _say([*lines, *([""] if lines else []), *page.wrapped(outlook(directory, found)[1])])
    return _status(found)


def _verify(directory: Path, options: argparse.Namespace) -> int:
    page = _page(directory)
    found: list[Entry] = []
    for entry in entries(directory, verify=True, step=options.step):
        found.append(entry)
        if not options.json and entry.path.name.startswith("step-"):
            _say(page.verdict(entry))  # at once: the next may take a while
    if options.step is not None and not found:
        Store(directory).find(options.step)  # which raises, and says which there are
    if options.json:
        _say_json(_records(directory, found, is_all=options.step is None))
    elif options.step is None:
        _say(page.wrapped(outlook(directory, found)[1]))
    return _status(entry for entry in found if entry.condition is not Condition.SET_ASIDE)


def _export(directory: Path, options: argparse.Namespace) -> int:
    from aengine.checkpoint.cli.export import export  # noqa: PLC0415 -- it loads torch, and nothing else here needs it

    done = export(Store(directory), options.safetensors, step=options.step, part=options.part)
    for why in done.passed_over:
        _warn(f"passed over: {why}")
    if done.info.is_mid_step:
        _warn(
            f"warning: the checkpoint of step {done.info.step} is of the middle of a step: the next one had begun, and"
            " what that had changed is in the weights"
        )
    if options.json:
        about = {"step": done.info.step, "part": done.part, "tensors": done.tensors, "size": done.size}
        _say_json({"file": os.fspath(options.safetensors.absolute()), **about})
    else:
        said = f"{done.tensors} tensors of {done.part} ({size_words(done.size)})"
        _say([plain(f"step {done.info.step}: {said} written to {options.safetensors}")])
    return FINE


def _pin(directory: Path, options: argparse.Namespace, *, is_pinned: bool) -> int:
    store = Store(directory)
    info = store.find(options.step)
    (store.pin if is_pinned else store.unpin)(info)
    if options.json:
        _say_json({"path": os.fspath(info.path), "step": info.step, "pinned": is_pinned})
    else:
        _say([f"step {info.step}: {'pinned' if is_pinned else 'not pinned'}"])
    return FINE


def _page(directory: Path) -> Page:
    is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Page(directory, shutil.get_terminal_size().columns, is_coloured=is_coloured)


def _records(directory: Path, found: list[Entry], *, is_all: bool = True) -> dict[str, Any]:
    records: dict[str, Any] = {"directory": os.fspath(directory), "checkpoints": [record(entry) for entry in found]}
    if is_all:
        info, _ = outlook(directory, found)
        records["resumes_from"] = info and os.fspath(info.path)
    return records


def _status(found: Iterable[Entry]) -> int:
    return DAMAGED if any(entry.is_trouble for entry in found) else FINE


def _say(lines: Iterable[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _say_json(value: dict[str, Any]) -> None:
    _say([json.dumps(value, indent=1, allow_nan=False)])


def _warn(why: str) -> None:
    sys.stderr.write(f"python -m aengine: {plain(why)}\n")

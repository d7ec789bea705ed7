"""The command `aengine checkpoints`: looks at the checkpoints in a directory, pins them, and exports weights.

It never waits for a run and never disturbs one: no lock is taken, and only pin, unpin and export write anything.
Listing and verifying need the standard library only, so that the answer is there at once; export loads torch.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from aengine.checkpoint.cli.listing import Condition, Entry, Page, entries, outlook, record
from aengine.checkpoint.store.draft import size_words, words
from aengine.checkpoint.store.manifest import MANIFEST, step_and_revision
from aengine.checkpoint.store.store import Store
from aengine.command_line import FINE, JSON, TROUBLE, WRONG, ActionParser, Parser, plain, say, say_json, warn
from aengine.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound

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
                not there for verify DIR STEP
pin and unpin:  path, step, pinned
export:         file, step, part, tensors, size
"""


_MORE = "`aengine checkpoints --help` says what the exit status means, and which keys --json prints."


def add_checkpoints(nouns: "argparse._SubParsersAction[Parser]") -> None:  # pyright: ignore[reportPrivateUsage]
    """Add the command to the parser of the command line."""
    checkpoints = nouns.add_parser(
        "checkpoints",
        help="list, verify, pin, unpin or export the checkpoints in a directory",
        description=_ABOUT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checkpoints.set_defaults(parser=checkpoints)
    verbs = checkpoints.add_subparsers(title="actions", metavar="ACTION", parser_class=ActionParser)

    def add(name: str, do: Callable[[Path, argparse.Namespace], int], about: str, step: str | None = None) -> Parser:
        verb = verbs.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=_MORE)
        verb.add_argument("directory", metavar="DIR", help="what Checkpoint(...) was given")
        if step is not None:
            verb.add_argument("step", metavar="STEP", type=_step, nargs=None if step == "" else "?", help=step or None)
        verb.add_argument("--json", action="store_true", help=JSON)
        verb.set_defaults(do=partial(_do, do))
        return verb

    listed = add("list", _list, "list what there is, verified, and say which one a run would resume from")
    listed.add_argument("--no-verify", action="store_true", help="read the manifests only, which is quick")
    add("verify", _verify, "read all files and compare them with their checksums", "only this one (default: all)")
    add("pin", partial(_pin, is_pinned=True), "keep a checkpoint for good", "")
    add("unpin", partial(_pin, is_pinned=False), "leave a pinned checkpoint to the rules again", "")
    export = add(
        "export",
        _export,
        "write the tensors of one part, such as a model's weights, to a file",
        "of this step (default: the one a run would resume from)",
    )
    export.add_argument("--safetensors", metavar="FILE", type=Path, required=True, help="the file to write")
    export.add_argument("--part", metavar="NAME", help="which part (default: model, or the only module)")


def _do(action: Callable[[Path, argparse.Namespace], int], options: argparse.Namespace) -> int:
    directory = Path(options.directory).absolute()
    try:
        if not options.directory:  # as "$UNSET" is in a shell; it would be the current one
            raise CheckpointNotFound("DIR is empty: give the directory of the checkpoints")
        if not directory.is_dir():
            raise CheckpointNotFound(f"there is no directory {directory}")
        if step_and_revision(directory.name) is not None or (directory / MANIFEST).exists():
            raise CheckpointNotFound(
                f"{directory} is one checkpoint: give the directory that it is in, which is {directory.parent}"
            )
        return action(directory, options)
    except (CheckpointError, ImportError) as error:  # that of safetensors says how to install it
        warn(str(error))
        return TROUBLE if isinstance(error, CheckpointDamaged) else WRONG
    except OSError as error:
        warn(words(error))
        return WRONG


def _step(text: str) -> int:
    try:
        if text.isascii() and text.isdigit():  # int() takes more
            return int(text)  # it refuses thousands of digits
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"a step is a whole number, not {shorten(text, 40)!r}")


def _list(directory: Path, options: argparse.Namespace) -> int:
    found = list(entries(directory, verify=not options.no_verify))
    if options.json:
        say_json(_records(directory, found))
    else:
        page = _page(directory)
        lines = list(page.table(found, time.time()))  # noqa: TID251 -- it is compared with another day's
        say([*lines, *([""] if lines else []), *page.wrapped(outlook(directory, found)[1])])
    return _status(found)


def _verify(directory: Path, options: argparse.Namespace) -> int:
    page = _page(directory)
    found: list[Entry] = []
    for entry in entries(directory, verify=True, step=options.step):
        found.append(entry)
        if not options.json and entry.path.name.startswith("step-"):
            say(page.verdict(entry))  # at once: the next may take a while
    if options.step is not None and not found:
        Store(directory).find(options.step)  # which raises, and says which there are
    if options.json:
        say_json(_records(directory, found, is_all=options.step is None))
    elif options.step is None:
        say(page.wrapped(outlook(directory, found)[1]))
    return _status(entry for entry in found if entry.condition is not Condition.SET_ASIDE)


def _export(directory: Path, options: argparse.Namespace) -> int:
    from aengine.checkpoint.cli.export import export  # noqa: PLC0415 -- it loads torch, and nothing else here needs it

    done = export(Store(directory), options.safetensors, step=options.step, part=options.part)
    for why in done.passed_over:
        warn(f"passed over: {why}")
    if done.info.is_mid_step:
        warn(
            f"warning: the checkpoint of step {done.info.step} is of the middle of a step: the next one had begun, and"
            " what that had changed is in the weights"
        )
    if options.json:
        about = {"step": done.info.step, "part": done.part, "tensors": done.tensors, "size": done.size}
        say_json({"file": os.fspath(options.safetensors.absolute()), **about})
    else:
        said = f"{done.tensors} tensors of {done.part} ({size_words(done.size)})"
        say([plain(f"step {done.info.step}: {said} written to {options.safetensors}")])
    return FINE


def _pin(directory: Path, options: argparse.Namespace, *, is_pinned: bool) -> int:
    store = Store(directory)
    info = store.find(options.step)
    (store.pin if is_pinned else store.unpin)(info)
    if options.json:
        say_json({"path": os.fspath(info.path), "step": info.step, "pinned": is_pinned})
    else:
        say([f"step {info.step}: {'pinned' if is_pinned else 'not pinned'}"])
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
    return TROUBLE if any(entry.is_trouble for entry in found) else FINE

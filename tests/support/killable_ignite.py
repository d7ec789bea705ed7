"""The same training under pytorch-ignite, saved by its ModelCheckpoint, and resumed as its documentation shows."""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from support.ignite import ignite
from support.killable import EPOCHS, Report, Training, shuffled


def run(options: dict[str, Any], report: Report) -> None:
    """Resume from the newest checkpoint that loads, and run to the end."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    training = Training(report)
    trainer = ignite.engine.Engine(training.step)
    parts = {**training.parts(), "trainer": trainer}
    if options["directory"] is not None:
        handler = ignite.handlers.ModelCheckpoint(
            options["directory"], "run", n_saved=options["n_saved"], require_empty=False
        )
        trainer.add_event_handler(ignite.engine.Events.ITERATION_COMPLETED(every=5), handler, parts)
        found = newest(Path(options["directory"]))
        if found is not None:
            ignite.handlers.Checkpoint.load_objects(parts, found)
        report("restored", "something" if found else "nothing")
    trainer.run(shuffled(), max_epochs=EPOCHS)
    report("finished", training.digest())


def newest(directory: Path) -> dict[str, Any] | None:
    """Return the content of the newest file that loads."""
    for path in sorted(directory.glob("*.pt"), key=os.path.getmtime, reverse=True):
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            continue
        return content
    return None

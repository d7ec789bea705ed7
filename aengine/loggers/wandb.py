"""Weights & Biases: metrics in a run of its own, or in one that exists."""

import os
import secrets
import string
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from aengine.arguments import check_choice
from aengine.extras import missing_package
from aengine.keywords import explain_wrong_call
from aengine.loggers.runs import BAD, RecentRecords, SharedRun, check_mappings, check_reachable, check_texts
from aengine.loggers.sink import Record
from aengine.state import StopReason

try:
    import wandb
except ImportError as _error:
    raise missing_package(__name__, "wandb>=0.19.10", "wandb") from _error

_FAILED = 1
"""The exit code of a run that failed; 0 is that of one that did not."""

_STEP = "step"


@explain_wrong_call
class WandB:
    """Writes each record as a row of one W&B run: its numbers, its time, and the step of its engine.

        Tracker(WandB("digits", config={"lr": 0.01})).attach(trainer)

    A number of the engine "trainer" is called "trainer/loss" and drawn over "trainer/step": each engine counts its own
    steps, and W&B's step can only grow. A value that is itself called "step" becomes "trainer/step_"; a `*` in the name
    of an engine, which W&B reserves for patterns, becomes `_`.

    The run begins with the first record, or the first end; nothing is printed. It is finished when the engine's run
    ends, with exit code 1 if that raised or was cancelled, unless it was interrupted.
    Several engines may share one: the run then lasts until all of them have ended, and ends as the first of them did.
    What is written after the end goes to a run with the same id, which W&B resumes; offline, in a folder of its own.

    `wandb.init` and `finish` may take seconds; so give the Tracker a larger `shutdown_timeout` where much is uploaded.
    They are called in the thread of the sink, and `wandb.run` is not touched. As a part of a `Checkpoint` it makes a
    resumed training go on in the same W&B run.

    Args:
        project: the name of the project; by default WANDB_PROJECT, or what W&B chooses.
        name: the name of the run; by default W&B chooses one.
        run_id: the id of the run; one that exists is resumed. By default a new one.
        config: the configuration of the run, by name.
        mode: "online", "offline" or "disabled"; by default what WANDB_MODE says, or "online".
        directory: where W&B keeps its files, in a folder "wandb"; by default WANDB_DIR, or where the process runs.
        run: a run of your own, from `wandb.init`, to write into instead. It is never finished here.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        name: str | None = None,
        run_id: str | None = None,
        config: Mapping[str, Any] | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        directory: str | os.PathLike[str] | None = None,
        run: "wandb.Run | None" = None,
    ) -> None:
        check_texts("WandB", project=project, name=name, run_id=run_id)
        check_mappings("WandB", config=config)
        if mode is not None:
            check_choice(mode, "WandB(mode=)", ("online", "offline", "disabled"))
        if run_id is not None and (bad := set(run_id) & set("/\\#?%:")):
            raise ValueError(f"WandB(run_id=) may have none of the characters {' '.join(sorted(bad))}, got {run_id!r}")
        anything: Any = run
        if run is not None and not isinstance(anything, wandb.Run):
            raise TypeError(f"WandB(run=) is what wandb.init() returned, got {run!r}")
        if run is not None and any(one is not None for one in (project, name, run_id, config, mode, directory)):
            raise ValueError("WandB(run=) is as wandb.init() made it: give its project, name and so on there")
        self._own = run is None
        self._run: Any = run
        self._run_id = _new_id() if run_id is None else run_id
        self._arguments: dict[str, Any] = {"project": project, "name": name, "config": dict(config or {}), "mode": mode}
        self._directory = None if directory is None else Path(directory)
        self._groups: set[str] = set()  # of values, one for each engine, whose step W&B knows
        self._runs = SharedRun()
        self._written = RecentRecords()
        self._lock = threading.Lock()  # each engine that shares this calls it from a thread of its own

    @property
    def run_id(self) -> str:
        """W&B's name for the run."""
        return self._run_id if self._own else str(self._run.id)

    def run_started(self, engine_name: str, time: float, /) -> None:
        """Take note that a run of an engine began."""
        self._runs.begin(engine_name, time)

    def write(self, records: Sequence[Record], /) -> None:
        """Hand the records to W&B's own process, which sends them to the server when it likes.

        Raises:
            OSError: no server accepts a connection.
            wandb.Error: no run can be begun, or it was finished elsewhere.
        """
        with self._lock:
            records = self._written.unwritten(records)
            if records:
                self._open()
            for record in records:
                self._log(record)
                self._written.add(record)

    def run_ended(self, engine_name: str, time: float, reason: StopReason, /) -> None:
        """Take note that a run of an engine ended."""
        self._runs.end(engine_name, time, reason)

    def close(self) -> None:
        """Finish the run, if no engine's run is under way, and the run is not the application's own.

        Raises:
            OSError, wandb.Error: as `write`.
        """
        with self._lock:
            if not self._own or not self._runs.is_over or (self._run is None and not self._runs.has_news):
                return
            self._open()
            run: Any = self._run
            self._run = None
            self._runs.take_news()
            run.finish(exit_code=_FAILED if self._runs.reason in BAD else 0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs to go on in the same W&B run."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on in the run that this is the state of, unless the run is the application's own.

        Raises:
            RuntimeError: another run is under way.
        """
        with self._lock:
            if self._own and self._run is not None and state_dict["run_id"] != self._run_id:
                raise RuntimeError(
                    f"the W&B run {self._run_id!r} is under way, and cannot become {state_dict['run_id']!r}: load the"
                    " state before the first record is written"
                )
            self._run_id = state_dict["run_id"]

    def __repr__(self) -> str:
        return (
            f"WandB({self._arguments['project']!r}, run_id={self.run_id!r})" if self._own else f"WandB(run={self._run})"
        )

    def _open(self) -> None:
        """Begin or resume the run."""
        if self._run is not None:
            return
        settings: Any = wandb.setup().settings
        if (self._arguments["mode"] or settings.mode) == "online":
            check_reachable(settings.base_url)  # without, wandb.init() takes 90 s, and the interpreter waits for it
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)  # W&B takes another one if it is missing
        self._run = wandb.init(
            **self._arguments,
            id=self._run_id,
            dir=self._directory,
            resume="allow",
            reinit="create_new",  # leaves the application's run, if it has one, alone
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._groups.clear()

    def _log(self, record: Record) -> None:
        group = record.engine_name.replace("*", "_")
        if group not in self._groups:
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/{_STEP}")
            self._groups.add(group)
        row: dict[str, Any] = {
            f"{group}/{name}_" if name == _STEP else f"{group}/{name}": value for name, value in record.values.items()
        }
        self._run.log({**row, f"{group}/{_STEP}": record.step, "_timestamp": record.time})


def _new_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))

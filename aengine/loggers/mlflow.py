"""MLflow: metrics in a run of a tracking server, which ends as the engine's run did."""

import logging
import posixpath
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aengine.callables import check_callable
from aengine.extras import missing_package
from aengine.keywords import explain_wrong_call
from aengine.loggers.runs import RecentRecords, SharedRun, check_mappings, check_reachable, check_texts
from aengine.loggers.sink import Record, tag_of
from aengine.state import StopReason

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunStatus, RunTag
    from mlflow.tracking import get_tracking_uri
except ImportError as _error:
    raise missing_package(__name__, "mlflow-skinny>=3", "mlflow") from _error

_logger = logging.getLogger("aengine.loggers")

_METRICS = 1000
"""The most metrics in one request: MLflow's own limit."""

_KEY_LENGTH = 250
"""The most characters in the name of a metric or a parameter: likewise."""

_STATUS = {StopReason.FAILED: RunStatus.FAILED, StopReason.CANCELLED: RunStatus.KILLED}


@explain_wrong_call
class MLflow:
    """Writes each number of each record as a metric of one MLflow run, with the record's step and time.

        Tracker(MLflow("digits", params={"lr": 0.01}, tracking_uri="http://127.0.0.1:5000")).attach(trainer)

    The run begins with the first record, or the first end. It ends as FINISHED where the engine's run was completed or
    terminated, FAILED where it raised and KILLED where it was cancelled; it stays RUNNING where that was interrupted.
    Several engines may share one: the run then lasts until all of them have ended, and ends as the first of them did.
    What is written after the end is written to the same run, which is RUNNING again.

    MLflow's fluent API (`mlflow.log_metric`) and its active run are not touched. A server that is down is noticed
    before a request, and tried again as `Tracker` says. One that goes down during a request is tried again by mlflow
    itself, for some four minutes, with pauses that grow to a minute: in a thread that holds up nothing, but without a
    warning of ours. MLFLOW_HTTP_REQUEST_MAX_RETRIES=0 in the environment leaves that to the Tracker as well.

    As a part of a `Checkpoint` it makes a resumed training go on in the same MLflow run.

    Args:
        experiment: the name of the experiment; it is made if it is not there.
        name: the name of the run; by default MLflow chooses one.
        run_id: an existing run to go on with, whose experiment and name it then has.
        tracking_uri: as for mlflow; by default what `mlflow.set_tracking_uri` or MLFLOW_TRACKING_URI said.
        params: parameters of the run, by name. Those that the run has already stay as they are.
        tags: tags of the run, by name.
        key: `key(record, name)` returns the name of a metric. Characters that MLflow does not allow (all but letters,
            digits, `_`, `-`, `.`, `:`, `/` and spaces) become `_`, with a warning.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(
        self,
        experiment: str | None = None,
        *,
        name: str | None = None,
        run_id: str | None = None,
        tracking_uri: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        key: Callable[[Record, str], str] = tag_of,
    ) -> None:
        check_texts("MLflow", experiment=experiment, name=name, run_id=run_id, tracking_uri=tracking_uri)
        check_mappings("MLflow", params=params, tags=tags)
        check_callable(key, "MLflow(key=)", "key", "record", "name")
        if run_id is not None and (experiment is not None or name is not None):
            raise ValueError("MLflow(run_id=) has its experiment and its name already: leave experiment and name= out")
        self._experiment = experiment or "Default"
        self._name = name
        self._run_id = run_id
        self._uri = tracking_uri or get_tracking_uri()
        self._params = {_allowed(str(key)): str(value) for key, value in (params or {}).items()}
        self._tags = {_allowed(str(key)): str(value) for key, value in (tags or {}).items()}
        self._key = key
        self._client: Any = None
        self._is_open = False
        self._latest: float | None = None  # the time of the last record
        self._has_params = False
        self._names: dict[str, str] = {}  # of metrics, to the names that MLflow allows
        self._runs = SharedRun()
        self._written = RecentRecords()
        self._lock = threading.Lock()  # each engine that shares this calls it from a thread of its own

    @property
    def run_id(self) -> str | None:
        """MLflow's name for the run; None before the first record is written."""
        return self._run_id

    def run_started(self, engine_name: str, time: float, /) -> None:
        """Take note that a run of an engine began."""
        self._runs.begin(engine_name, time)

    def write(self, records: Sequence[Record], /) -> None:
        """Write the records, a thousand numbers in a request. Those that were written before are not written again.

        Raises:
            OSError: no server accepts a connection.
            mlflow.MlflowException: the server refused, or failed.
        """
        with self._lock:
            records = self._written.unwritten(records)
            if records:
                check_reachable(self._uri)
                self._open(records[0].time)
            for some in _chunks(records):
                self._client.log_batch(self._run_id, metrics=self._metrics(some), synchronous=True)
                for record in some:
                    self._written.add(record)
                    self._latest = record.time

    def run_ended(self, engine_name: str, time: float, reason: StopReason, /) -> None:
        """Take note that a run of an engine ended."""
        self._runs.end(engine_name, time, reason)

    def close(self) -> None:
        """Give the run its last status, if no engine's run is under way.

        Raises:
            OSError, mlflow.MlflowException: as `write`.
        """
        runs = self._runs
        with self._lock:
            if runs.is_over and (self._is_open or runs.has_news):
                check_reachable(self._uri)
                self._open(runs.began)
                self._set_status(_STATUS.get(runs.reason, RunStatus.FINISHED), runs.ended or self._latest)
                self._is_open = False
                runs.take_news()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs to go on in the same MLflow run."""
        return {"run_id": self._run_id}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on in the run that this is the state of; if it had none yet, in the present one."""
        if state_dict["run_id"] is not None:
            with self._lock:
                self._run_id, self._is_open, self._has_params = state_dict["run_id"], False, False

    def __repr__(self) -> str:
        run = f"{self._experiment!r}" if self._run_id is None else f"run_id={self._run_id!r}"
        return f"MLflow({run}, tracking_uri={self._uri!r})"

    def _open(self, began: float | None) -> None:
        """Make the run, or set it RUNNING again."""
        if self._is_open:
            return
        if self._client is None:
            self._client = MlflowClient(self._uri)
        if self._run_id is None:
            start = None if began is None else _milliseconds(began)
            run = self._client.create_run(self._experiment_id(), start_time=start, run_name=self._name)
            self._run_id = run.info.run_id
        else:
            run = self._client.get_run(self._run_id)
            if run.info.status != RunStatus.to_string(RunStatus.RUNNING):
                self._set_status(RunStatus.RUNNING, None)
        if not self._has_params:
            self._describe(run.data.params)
        self._is_open = True

    def _experiment_id(self) -> str:
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is None:
            return str(self._client.create_experiment(self._experiment))
        return str(experiment.experiment_id)

    def _describe(self, written: Mapping[str, str]) -> None:
        """Write the parameters, which MLflow does not change once they are written, and the tags."""
        changed = {key for key, value in self._params.items() if written.get(key, value) != value}
        if changed:
            _logger.warning(
                "parameters of the MLflow run %s stay as they were, though others were given: %s",
                self._run_id, ", ".join(f"{key} is {written[key]}, not {self._params[key]}" for key in sorted(changed)),
            )  # fmt: skip
        params = [Param(key, value) for key, value in self._params.items() if key not in written]
        tags = [RunTag(key, value) for key, value in self._tags.items()]
        self._client.log_batch(self._run_id, params=params, tags=tags, synchronous=True)
        self._has_params = True

    def _set_status(self, status: int, ended: float | None) -> None:
        # Not by set_terminated(), which prints.
        store = self._client._tracking_client.store  # noqa: SLF001 -- update_run() sets no end time
        store.update_run_info(self._run_id, status, None if ended is None else _milliseconds(ended), None)

    def _metrics(self, records: Sequence[Record]) -> list[Metric]:
        return [
            Metric(self._metric(self._key(record, name)), float(value), _milliseconds(record.time), record.step)
            for record in records
            for name, value in record.values.items()
        ]

    def _metric(self, name: str) -> str:
        allowed = self._names.get(name)
        if allowed is None:
            allowed = self._names[name] = _allowed(name)
            if allowed != name:
                _logger.warning("MLflow allows no metric with the name %r: it is written as %r", name, allowed)
        return allowed


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _chunks(records: Sequence[Record]) -> list[list[Record]]:
    """Return the records in their order, as many in a chunk as one request may have numbers.

    A record that has more numbers than that is a chunk by itself: mlflow makes several requests of it.
    """
    chunks: list[list[Record]] = []
    count = 0
    for record in records:
        count += len(record.values)
        if not chunks or count > _METRICS:  # the first may have no numbers at all
            chunks.append([])
            count = len(record.values)
        chunks[-1].append(record)
    return chunks


def _allowed(name: str) -> str:
    """Return the nearest name that MLflow allows: these characters only, and a path like that of a file."""
    path = posixpath.normpath("/" + re.sub(r"[^\w.\- :/]", "_", name)).lstrip("/")
    return path[:_KEY_LENGTH].rstrip("/") or "_"

"""MLflow: what its own client finds, in files and on a real server, and what becomes of a run while that is down.

With a real server: `.ci/mlflow-server python -m pytest -m mlflow_server tests/loggers/test_mlflow.py`.
"""

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from mlflow import MlflowClient
from support.record import Boom

from aengine import Engine, Events
from aengine.checkpoint import Checkpoint
from aengine.loggers import MLflow, Record, Tracker

AnyEngine: TypeAlias = Engine[Any, Any]

PatientTracker = partial(Tracker, shutdown_timeout=25.0)  # on a busy machine it takes seconds to begin

SERVER = os.environ.get("AENGINE_TEST_MLFLOW")
PROGRAM = os.environ.get("AENGINE_TEST_MLFLOW_SERVER")


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.fixture(params=["files", pytest.param("server", marks=pytest.mark.mlflow_server)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "files":
        return str(tmp_path / "mlruns")
    if SERVER is None:
        pytest.skip("AENGINE_TEST_MLFLOW is not set: run this by .ci/mlflow-server")
    return SERVER


def record(step: int, **values: float) -> Record:
    return Record(step, 1, 1000.5 + step, "ITERATION_COMPLETED", "trainer", values)


def run_of(sink: MLflow, uri: str) -> Any:
    assert sink.run_id is not None
    return MlflowClient(uri).get_run(sink.run_id)


def status_of(sink: MLflow, uri: str) -> str:
    return str(run_of(sink, uri).info.status)


def history(sink: MLflow, uri: str, key: str) -> list[tuple[int, float]]:
    assert sink.run_id is not None
    found = MlflowClient(uri).get_metric_history(sink.run_id, key)
    return sorted((one.step, one.value) for one in found)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


# What is written


async def test_a_run_becomes_metrics(uri: str, request: pytest.FixtureRequest) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: {"loss": batch / 2, "accuracy": batch}, name="trainer")
    times: list[float] = []

    class Noting(MLflow):
        def write(self, records: Sequence[Record]) -> None:
            times.extend(one.time for one in records)
            super().write(records)

    sink = Noting(request.node.name, name="first", params={"lr": 0.1}, tags={"kind": "test"}, tracking_uri=uri)
    PatientTracker(sink).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2], max_epochs=2)
    assert history(sink, uri, "trainer/loss") == [(1, 0.5), (2, 1.0), (3, 0.5), (4, 1.0)]
    assert history(sink, uri, "trainer/accuracy") == [(1, 1.0), (2, 2.0), (3, 1.0), (4, 2.0)]
    found = run_of(sink, uri)
    assert found.data.params == {"lr": "0.1"}
    assert found.data.tags["kind"] == "test"
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert MlflowClient(uri).get_experiment(found.info.experiment_id).name == request.node.name
    written = [one.timestamp / 1000 for one in MlflowClient(uri).get_metric_history(sink.run_id or "", "trainer/loss")]
    assert sorted(written) == pytest.approx(times, abs=0.001)
    assert found.info.start_time / 1000 <= times[0] + 0.001
    assert found.info.end_time / 1000 >= times[-1] - 0.001


def test_what_is_no_number_is_written_as_the_store_has_it(uri: str) -> None:
    sink = MLflow(tracking_uri=uri)
    sink.write([record(1, a=math.nan, b=math.inf, c=-math.inf, d=True, e=10**20)])
    sink.close()
    (nan,) = history(sink, uri, "trainer/a")
    assert math.isnan(nan[1])
    ((_, plus),), ((_, minus),) = history(sink, uri, "trainer/b"), history(sink, uri, "trainer/c")
    assert -minus == plus >= sys.float_info.max  # a database has no infinity: its largest number stands for it
    assert history(sink, uri, "trainer/d") == [(1, 1.0)]
    assert history(sink, uri, "trainer/e") == [(1, 1e20)]


def test_more_than_a_request_may_have_goes_in_several(uri: str) -> None:
    sink = MLflow(tracking_uri=uri)
    few = [record(step, **{f"m{number}": step for number in range(7)}) for step in range(1, 400)]
    many = record(400, **{f"m{number}": 400 for number in range(2500)})
    sink.write([*few, many])
    sink.close()
    assert history(sink, uri, "trainer/m0") == [(step, float(step)) for step in range(1, 401)]
    assert history(sink, uri, "trainer/m6") == [(step, float(step)) for step in range(1, 401)]
    assert len(run_of(sink, uri).data.metrics) == 2500


def test_a_name_that_is_not_allowed_becomes_one_that_is_with_one_warning(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    sink = MLflow(tracking_uri=uri, key=lambda record, name: name, params={"a=b": 1})
    names = {"loss (train)": "loss _train_", "/a//b/": "a/b", "../up": "up", ".": "_", "f1@5\\x": "f1_5_x", "": "_"}
    names |= {"x" * 300: "x" * 250, "äé 1": "äé 1"}
    for step, name in enumerate(names, start=1):
        for _ in range(2):
            sink.write([record(step, **{name: step}), record(step + 100, **{name: step})])
    sink.close()
    for step, allowed in enumerate(names.values(), start=1):
        assert (step, float(step)) in history(sink, uri, allowed)
    assert run_of(sink, uri).data.params == {"a_b": "1"}
    said = warnings_of(caplog)
    assert len(said) == len(names) - 1
    assert "'loss (train)': it is written as 'loss _train_'" in said[0]


async def test_it_prints_nothing(uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    PatientTracker(MLflow(tracking_uri=uri)).attach(engine)
    await engine.run([1])
    assert capfd.readouterr() == ("", "")


# Ends


async def test_a_run_that_is_terminated_is_finished(uri: str) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    sink = MLflow(tracking_uri=uri)
    PatientTracker(sink).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), engine.terminate, skip_completed=True)
    await engine.run([1, 2])
    assert status_of(sink, uri) == "FINISHED"


@pytest.mark.parametrize("fails_at", [1, 3])
async def test_a_run_that_raises_is_failed_even_before_its_first_record(uri: str, fails_at: int) -> None:
    def fail(engine: AnyEngine, batch: int) -> int:
        if batch == fails_at:
            raise Boom
        return batch

    engine, sink = Engine(fail, name="trainer"), MLflow(tracking_uri=uri)
    PatientTracker(sink).attach(engine, Events.ITERATION_COMPLETED)
    with pytest.raises(Boom):
        await engine.run([1, 2, 3, 4])
    assert status_of(sink, uri) == "FAILED"
    expected = [(step, float(step)) for step in range(1, fails_at)]
    assert (history(sink, uri, "trainer/output") if expected else []) == expected


async def test_a_run_that_failed_by_the_sink_itself_is_failed_as_well(uri: str) -> None:
    def tag(record: Record, name: str) -> str:
        if record.step == 2:
            raise Boom
        return name

    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    sink = MLflow(tracking_uri=uri, key=tag)
    PatientTracker(sink, on_error="raise").attach(engine, Events.ITERATION_COMPLETED)

    @engine.on(Events.ITERATION_STARTED(once=2))
    async def write_the_first(engine: AnyEngine) -> None:
        await engine.flush()

    with pytest.raises(Boom):
        await engine.run([1, 2, 3])
    assert status_of(sink, uri) == "FAILED"
    assert history(sink, uri, "output") == [(1, 1.0)]


async def test_records_without_numbers_are_written_too(uri: str) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: "no number")
    sink = MLflow(tracking_uri=uri)
    tracker = PatientTracker(sink)
    tracker.attach(engine, Events.STARTED | Events.ITERATION_COMPLETED)
    await engine.run([1, 2])
    written = tracker.statistics()
    assert (written.written, written.failures) == (3, 0)
    assert status_of(sink, uri) == "FINISHED"


async def test_a_run_that_is_cancelled_is_killed(uri: str) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch)
    sink = MLflow(tracking_uri=uri)
    PatientTracker(sink).attach(engine, Events.STARTED)
    with anyio.CancelScope() as scope:

        @engine.on(Events.ITERATION_COMPLETED(once=5))
        async def cancel() -> None:
            scope.cancel()

        await engine.run(iter(int, 1), epoch_length=10**9)
    assert status_of(sink, uri) == "KILLED"


async def test_a_run_that_is_interrupted_is_running_until_it_goes_on(uri: str) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    sink = MLflow(tracking_uri=uri)
    PatientTracker(sink).attach(engine, Events.ITERATION_COMPLETED)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    await engine.run([1, 2, 3])
    assert status_of(sink, uri) == "RUNNING"
    await engine.run()
    assert status_of(sink, uri) == "FINISHED"
    assert history(sink, uri, "trainer/output") == [(1, 1.0), (2, 2.0), (3, 3.0)]


async def test_two_runs_in_a_row_are_one_run_of_mlflow(uri: str) -> None:
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    sink = MLflow(tracking_uri=uri)
    PatientTracker(sink).attach(engine, Events.ITERATION_COMPLETED)
    await engine.run([1, 2])
    first, statuses = sink.run_id, []

    @engine.on(Events.COMPLETED)
    async def look() -> None:
        await engine.flush()
        while history(sink, uri, "trainer/output")[-1][0] < 4:
            await anyio.lowlevel.checkpoint()
        statuses.append(status_of(sink, uri))

    await engine.run([1, 2], max_epochs=2)
    assert sink.run_id == first
    assert (statuses, status_of(sink, uri)) == (["RUNNING"], "FINISHED")


async def test_a_trainer_and_its_evaluator_share_a_run_that_lasts_as_long_as_the_trainer(uri: str) -> None:
    sink, statuses = MLflow(tracking_uri=uri), []
    trainer: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    evaluator: AnyEngine = Engine(lambda engine, batch: batch * 10, name="evaluator")
    PatientTracker(sink).attach(trainer, Events.ITERATION_COMPLETED)
    PatientTracker(sink, step=lambda _: trainer.state.iteration).attach(evaluator, Events.COMPLETED)

    @trainer.on(Events.EPOCH_COMPLETED)
    async def evaluate() -> None:
        await evaluator.run([1, 2, 3])
        statuses.append(status_of(sink, uri))

    await trainer.run([1, 2], max_epochs=2)
    assert history(sink, uri, "trainer/output") == [(1, 1.0), (2, 2.0), (3, 1.0), (4, 2.0)]
    assert history(sink, uri, "evaluator/output") == [(2, 30.0), (4, 30.0)]
    assert (statuses, status_of(sink, uri)) == (["RUNNING", "RUNNING"], "FINISHED")


async def test_a_trainer_that_fails_beside_an_evaluator_that_does_not_has_failed(uri: str) -> None:
    def fail(engine: AnyEngine, batch: int) -> int:
        if batch == 3:
            raise Boom
        return batch

    sink = MLflow(tracking_uri=uri)
    trainer: AnyEngine = Engine(fail, name="trainer")
    evaluator: AnyEngine = Engine(lambda engine, batch: batch, name="evaluator")
    PatientTracker(sink).attach(trainer, Events.ITERATION_COMPLETED)
    PatientTracker(sink).attach(evaluator, Events.COMPLETED)

    @trainer.subscribe(Events.ITERATION_COMPLETED(once=1))
    async def evaluate(_: object) -> None:
        await evaluator.run([1, 2, 3])

    with pytest.raises(Boom):
        await trainer.run([1, 2, 3])
    assert status_of(sink, uri) == "FAILED"


async def test_an_evaluation_after_a_failure_does_not_make_it_good(uri: str) -> None:
    def fail(engine: AnyEngine, batch: int) -> int:
        raise Boom

    sink = MLflow(tracking_uri=uri)
    trainer: AnyEngine = Engine(fail, name="trainer")
    evaluator: AnyEngine = Engine(lambda engine, batch: batch, name="evaluator")
    PatientTracker(sink).attach(trainer, Events.ITERATION_COMPLETED)
    PatientTracker(sink).attach(evaluator, Events.COMPLETED)
    with pytest.raises(Boom):
        await trainer.run([1])
    await evaluator.run([1, 2, 3])
    assert status_of(sink, uri) == "FAILED"


# Resuming


async def test_a_run_that_is_resumed_goes_on_in_the_same_run_of_mlflow(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = MLflow("resumed", name="it", params={"lr": 0.1}, tracking_uri=uri)
    first.write([record(1, loss=1)])
    first.close()
    second = MLflow(run_id=first.run_id, params={"lr": 0.2, "layers": 3}, tracking_uri=uri)
    second.write([record(2, loss=2)])
    assert status_of(second, uri) == "RUNNING"
    second.close()
    assert status_of(second, uri) == "FINISHED"
    assert history(first, uri, "trainer/loss") == [(1, 1.0), (2, 2.0)]
    found = run_of(second, uri)
    assert found.data.params == {"lr": "0.1", "layers": "3"}
    assert found.info.run_name == "it"
    assert ["lr is 0.1, not 0.2" in one for one in warnings_of(caplog)] == [True]


async def test_a_checkpoint_has_it_go_on_in_the_same_run_of_mlflow(uri: str, tmp_path: Path) -> None:
    async def train(epochs: int) -> MLflow:
        engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
        sink = MLflow(tracking_uri=uri)
        PatientTracker(sink).attach(engine, Events.EPOCH_COMPLETED)
        async with Checkpoint(tmp_path / "checkpoints", {"mlflow": sink}) as checkpoint:
            checkpoint.attach(engine, Events.COMPLETED)
            await checkpoint.restore()

            @engine.on(Events.COMPLETED)
            async def until_it_has_a_name() -> None:
                while sink.run_id is None:
                    await anyio.lowlevel.checkpoint()

            await engine.run([1, 2], max_epochs=epochs)
        return sink

    first, second = await train(1), await train(3)
    assert first.run_id == second.run_id
    assert history(second, uri, "trainer/output") == [(2, 2.0), (4, 2.0), (6, 2.0)]


def test_what_was_written_before_a_failure_is_not_written_twice(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = MLflow(tracking_uri=uri)
    records = [record(step, **{f"m{number}": step for number in range(600)}) for step in range(1, 4)]
    whole: list[Any] = []
    log_batch = MlflowClient.log_batch

    def fail_once(self: MlflowClient, *given: Any, **named: Any) -> Any:  # as where the line is cut
        if named.get("metrics") and len(whole) == 2:
            whole.append("failed")
            raise ConnectionError
        if named.get("metrics"):
            whole.append(named["metrics"][0].step)
        return log_batch(self, *given, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", fail_once)
    with pytest.raises(ConnectionError):
        sink.write(records)
    sink.write([*records, record(4, m0=4)])
    sink.close()
    assert whole == [1, 2, "failed", 3]
    assert history(sink, uri, "trainer/m0") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


async def test_several_engines_at_once_lose_nothing(uri: str) -> None:
    sink = MLflow(tracking_uri=uri)
    engines: list[AnyEngine] = [Engine(lambda engine, batch: batch, name=f"engine{number}") for number in range(4)]
    async with anyio.create_task_group() as tasks:
        for engine in engines:
            PatientTracker(sink, shutdown_timeout=20).attach(engine, Events.ITERATION_COMPLETED)
            tasks.start_soon(engine.run, range(1, 21))
    for number in range(4):
        assert history(sink, uri, f"engine{number}/output") == [(step, float(step)) for step in range(1, 21)]
    assert status_of(sink, uri) == "FINISHED"


# Servers that are down


def a_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


# Both event loops in one process, since to import mlflow takes seconds.
DOWN = """
import sys, time
import anyio
from aengine import Engine, Events
from aengine.loggers import MLflow, Tracker

for backend in ("asyncio", "trio"):
    engine = Engine(lambda engine, batch: batch)
    tracker = Tracker(MLflow("x", tracking_uri=sys.argv[1]), shutdown_timeout=0.5, buffer=100)
    tracker.attach(engine, Events.ITERATION_COMPLETED)
    began = time.perf_counter()
    anyio.run(engine.run, range(1000), backend=backend)
    now = tracker.statistics()
    print(now.taken, now.written, now.dropped, now.waiting, time.perf_counter() - began)
"""


def said_when_it_ends(uri: str) -> str:
    began = perf_counter()
    done = subprocess.run([sys.executable, "-c", DOWN, uri], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = [line.split() for line in done.stdout.splitlines()]
    assert len(runs) == 2
    for *counts, seconds in runs:
        assert counts == ["1000", "0", "900", "100"]
        assert float(seconds) < 20
    assert perf_counter() - began < 60
    return done.stderr


def test_with_a_server_that_is_down_the_run_and_the_process_end_in_time() -> None:
    """With mlflow's own settings a request to a closed port takes four minutes."""
    said = said_when_it_ends(f"http://127.0.0.1:{a_free_port()}")
    assert said.count("failed; it is tried again") == 2
    assert said.count("the run ends, and of 1000 records") == 2
    assert "urllib3" not in said


def test_with_a_server_that_does_not_answer_the_run_and_the_process_end_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        said = said_when_it_ends(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert said.count("still busy") == 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """A server of one's own: its URL, what starts it, and what kills it. It keeps its database and its port."""
    if PROGRAM is None:
        pytest.skip("AENGINE_TEST_MLFLOW_SERVER is not set: run this by .ci/mlflow-server")
    port, running = a_free_port(), []
    command = [PROGRAM, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--default-artifact-root", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def start() -> None:
        running.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that its workers are killed with it
            )
        )
        while True:
            assert running[-1].poll() is None
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60):
                return
            threading.Event().wait(0.1)

    def kill() -> None:
        process = running.pop()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    with ExitStack() as entered:
        entered.callback(lambda: [kill() for _ in tuple(running)])
        yield f"http://127.0.0.1:{port}", start, kill


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await anyio.lowlevel.checkpoint()


def has_failed(tracker: Tracker) -> bool:
    return tracker.statistics().failures > 0


@pytest.mark.mlflow_server
async def test_a_server_that_is_killed_and_started_again_gets_all_of_it(
    server: tuple[str, Callable[[], None], Callable[[], None]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # of a request in whose midst it is killed
    uri, start, kill = server
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    sink = MLflow(tracking_uri=uri)
    tracker = PatientTracker(sink, shutdown_timeout=25)
    tracker.attach(engine, Events.ITERATION_COMPLETED)

    @engine.on(Events.ITERATION_COMPLETED(once=100))
    async def go_down() -> None:
        await until(lambda: tracker.statistics().written >= 50)
        await anyio.to_thread.run_sync(kill)

    @engine.on(Events.ITERATION_COMPLETED(once=200))
    async def come_up() -> None:
        await until(lambda: has_failed(tracker))
        await anyio.to_thread.run_sync(start)

    await anyio.to_thread.run_sync(start)
    await engine.run(range(300))
    assert history(sink, uri, "trainer/output") == [(step, float(step - 1)) for step in range(1, 301)]
    assert status_of(sink, uri) == "FINISHED"
    assert ["failed; it is tried again" in one for one in warnings_of(caplog) if "MLflow(" in one] == [True]


async def test_run_is_finished_when_its_tracker_is_removed(tmp_path: Path) -> None:
    sink = MLflow(tracking_uri=str(tmp_path / "mlruns"))
    engine: AnyEngine = Engine(lambda engine, batch: batch, name="trainer")
    handle = PatientTracker(sink).attach(engine, Events.ITERATION_COMPLETED)

    @engine.on(Events.ITERATION_STARTED(once=3))
    async def remove() -> None:
        handle.remove()
        await engine.flush()
        assert status_of(sink, str(tmp_path / "mlruns")) == "FINISHED"

    await engine.run(range(4))
    assert [step for step, _ in history(sink, str(tmp_path / "mlruns"), "trainer/output")] == [1, 2]


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experiment": 3}, "experiment="),
        ({"name": ""}, "name="),
        ({"tracking_uri": Path("mlruns")}, "tracking_uri="),
        ({"params": [("lr", 1)]}, "params="),
        ({"tags": "kind"}, "tags="),
        ({"key": "loss"}, "MLflow\\(key=\\) must be callable"),
        ({"key": lambda name: name}, "cannot be called as key\\(record, name\\)"),
    ],
    ids=["experiment", "name", "tracking_uri", "params", "tags", "key", "key of one argument"],
)
def test_what_cannot_work_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MLflow(**arguments)


def test_a_run_that_exists_has_its_experiment_and_name() -> None:
    with pytest.raises(ValueError, match="leave experiment and name= out"):
        MLflow("digits", run_id="1")


def test_it_touches_no_server_before_the_first_record(tmp_path: Path) -> None:
    sink = MLflow(tracking_uri=str(tmp_path / "mlruns"))
    sink.close()
    sink.write([])
    assert sink.run_id is None
    assert list(tmp_path.iterdir()) == []
    assert sink.state_dict() == {"run_id": None}


def test_without_the_package_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['mlflow'] = None; from aengine.loggers import MLflow"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install -e ".[mlflow]"' in done.stderr

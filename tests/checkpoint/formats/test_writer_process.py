"""The process that writes: what it is given it reads in place, and nothing of it is left when it or its parent dies."""

import gc
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

from aengine.checkpoint.capture.staging import Staging
from aengine.checkpoint.formats.writer_process import WriterProcess
from aengine.errors import CheckpointNotWritten


@pytest.fixture(scope="module")
def process() -> Iterator[WriterProcess]:
    with closing(WriterProcess()) as process:
        process.start()
        yield process


def wait_until_gone(process_id: int) -> None:
    """Wait for the end of a process that is not ours to wait for."""
    while Path(f"/proc/{process_id}/stat").exists():
        if Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return  # dead, and not reaped yet by the process that adopted it
        time.sleep(0.01)


def leave(status: int) -> None:
    raise SystemExit(status)  # not sys.exit, in whose place wandb puts a function of its own


def test_function_is_called_there_and_its_result_comes_back(process: WriterProcess) -> None:
    there = process.call(os.getpid)
    assert there != os.getpid()
    assert process.call(divmod, 17, 5) == (3, 2)
    assert process.call(os.getpid) == there


def test_staged_tensors_are_the_same_memory_there(process: WriterProcess) -> None:
    """What is written to them there is seen here: so nothing was copied."""
    staging = Staging(process.memory)
    state = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(3)}
    staged = staging.stage(state)
    process.call(torch.Tensor.fill_, staged["weight"], 7.0)
    assert staged["weight"].eq(7).all()
    assert staged["bias"].eq(0).all()
    assert state["weight"].sum() == 15


def test_every_stage_is_seen_there_also_when_the_memory_had_to_grow(process: WriterProcess) -> None:
    staging = Staging(process.memory)
    for length in (10, 10, 1_000_000, 20):
        tensor = torch.arange(length)
        assert process.call(torch.sum, staging.stage([tensor])[0]) == tensor.sum()


def test_tensors_arrive_with_their_types_layouts_and_sharing(process: WriterProcess, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {
        "tied": [weight, weight],
        "views": [weight.detach(), weight.detach()[1:]],
        "images": images,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
        "sparse": torch.eye(3).to_sparse(),
        "plain": [1, "two", None],
    }
    staged = Staging(process.memory).stage(state)
    process.call(torch.save, staged, tmp_path / "there.pt")
    loaded = torch.load(tmp_path / "there.pt", weights_only=True)
    assert loaded["tied"][0] is loaded["tied"][1]
    assert type(loaded["tied"][0]) is torch.nn.Parameter
    assert loaded["tied"][0].data_ptr() == loaded["views"][0].data_ptr()
    assert loaded["views"][1].equal(weight[1:])
    assert loaded["images"].stride() == images.stride()
    assert loaded["images"].equal(images)
    assert loaded["half"].equal(state["half"])
    assert loaded["empty"].shape == (0, 3)
    assert loaded["scalar"] == 1.5
    assert loaded["sparse"].to_dense().equal(torch.eye(3))
    assert loaded["plain"] == [1, "two", None]


def test_tensors_of_other_memory_are_copied(process: WriterProcess) -> None:
    ours = torch.zeros(3)
    theirs = process.call(torch.Tensor.add_, ours, 1)
    assert theirs.eq(1).all()
    assert ours.eq(0).all()


def test_error_comes_back_as_it_is_with_the_traceback_as_a_note(process: WriterProcess, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        process.call(os.listdir, tmp_path / "missing")
    assert caught.value.filename == str(tmp_path / "missing")
    assert "In the process that writes checkpoints:" in caught.value.__notes__[0]
    assert process.call(divmod, 17, 5) == (3, 2)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
def test_own_modules_are_found_and_errors_that_cannot_be_made_again_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.py").write_text(
        "class Odd(Exception):\n    def __init__(self, one, two): super().__init__(one + two)\n"
        "def fail(): raise Odd('no', 'thing')\n"
        "def dequantize(tensor): return tensor.dequantize()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    odd = importlib.import_module("odd")
    with closing(WriterProcess()) as process:
        with pytest.raises(CheckpointNotWritten, match=r"(?s)Traceback.*odd\.Odd: nothing"):
            process.call(odd.fail)
        tensor = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)
        assert process.call(odd.dequantize, tensor).equal(torch.ones(2))


def test_exit_there_is_raised_here(process: WriterProcess) -> None:
    with pytest.raises(SystemExit):
        process.call(leave, 3)
    assert process.call(divmod, 17, 5) == (3, 2)


def test_what_cannot_be_pickled_is_refused_before_anything_is_sent(process: WriterProcess) -> None:
    with pytest.raises((AttributeError, TypeError), match=r"pickle|local object"):
        process.call(lambda: None)
    assert process.call(divmod, 17, 5) == (3, 2)


def test_result_that_cannot_be_pickled_is_an_error(process: WriterProcess) -> None:
    with pytest.raises(TypeError, match="pickle"):
        process.call(threading.Lock)
    assert process.call(divmod, 17, 5) == (3, 2)


def test_killed_process_is_reported_with_its_signal_and_the_next_call_gets_a_new_one(process: WriterProcess) -> None:
    state = Staging(process.memory).stage([torch.ones(5)])
    before = process.call(os.getpid)
    with pytest.raises(CheckpointNotWritten, match="SIGKILL"):
        process.call(signal.raise_signal, signal.SIGKILL)
    assert process.call(torch.sum, state[0]) == 5  # the new one knows the memory, too
    assert process.call(os.getpid) != before


@pytest.mark.slow
def test_process_that_ends_otherwise_is_reported_as_well(process: WriterProcess) -> None:
    with pytest.raises(CheckpointNotWritten, match="SIGTERM"):
        process.call(signal.raise_signal, signal.SIGTERM)
    with pytest.raises(CheckpointNotWritten, match="status 3"):
        process.call(os._exit, 3)


def test_process_that_died_between_two_calls_fails_none(process: WriterProcess) -> None:
    there = process.call(os.getpid)
    os.kill(there, signal.SIGKILL)
    os.waitid(os.P_PID, there, os.WEXITED | os.WNOWAIT)
    assert process.call(divmod, 17, 5) == (3, 2)


def test_call_can_be_stopped_from_another_thread(process: WriterProcess, tmp_path: Path) -> None:
    """The call reads from a pipe that nothing writes to: it would wait for ever."""
    os.mkfifo(tmp_path / "pipe")

    def terminate_when_busy() -> None:
        with (tmp_path / "pipe").open("wb"):  # when it is opened for reading, too
            process.terminate()

    stopper = threading.Thread(target=terminate_when_busy)
    stopper.start()
    with pytest.raises(CheckpointNotWritten, match="was stopped"):
        process.call(Path.read_bytes, tmp_path / "pipe")
    stopper.join()
    assert process.call(divmod, 17, 5) == (3, 2)


def test_close_leaves_no_process_and_no_descriptor() -> None:
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    process = WriterProcess()
    staged = Staging(process.memory).stage([torch.ones(100)])
    there = process.call(os.getpid)
    assert process.call(torch.sum, staged[0]) == 100
    process.close()
    assert not Path(f"/proc/{there}").exists()
    assert staged[0].sum() == 100  # still there for what holds it
    del staged, process
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def run_script(script: str, folder: Path) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(script)
    return subprocess.Popen(
        [sys.executable, folder / "script.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        process_group=0,
    )


SCRIPT = """
import os, torch
from pathlib import Path
from aengine.checkpoint.capture.staging import Staging
from aengine.checkpoint.formats.writer_process import WriterProcess
Path("imported").write_text(Path("imported").read_text() + "x" if Path("imported").exists() else "x")
process = WriterProcess()
staged = Staging(process.memory).stage({"a": torch.ones(1000)})
print(process.call(torch.sum, staged["a"]).item(), process.call(os.getpid), flush=True)
"""


def test_script_without_a_guard_is_not_imported_again_and_may_end_without_closing(tmp_path: Path) -> None:
    own = """
def own(): pass
try:
    process.call(own)
except RuntimeError as error:
    print(error)
"""
    script = run_script(SCRIPT + own, tmp_path)
    output, errors = script.communicate()
    (result, there), (refusal,) = output.splitlines()[0].split(), output.splitlines()[1:]
    assert (result, errors, script.returncode) == ("1000.0", "", 0)
    assert "must be in a module, not in the script that is run" in refusal
    assert (tmp_path / "imported").read_text() == "x"
    wait_until_gone(int(there))


@pytest.mark.parametrize(
    "is_busy", [pytest.param(False, id="idle", marks=pytest.mark.slow), pytest.param(True, id="busy")]
)
def test_killed_parent_leaves_no_process_and_no_shared_memory(tmp_path: Path, is_busy: bool) -> None:  # noqa: FBT001
    os.mkfifo(tmp_path / "pipe")
    script = run_script(SCRIPT + ("process.call(Path.read_bytes, Path('pipe'))" if is_busy else "input()"), tmp_path)
    assert script.stdout is not None
    there = int(script.stdout.readline().split()[1])
    for each in (there, script.pid):  # memory that has no name cannot outlive the processes that have it open
        maps = Path(f"/proc/{each}/maps").read_text()
        assert "/memfd:aengine (deleted)" in maps
        assert "/dev/shm" not in maps
    if is_busy:
        with (tmp_path / "pipe").open("wb"):  # when it is opened for reading, too
            script.kill()
            script.communicate()
            wait_until_gone(there)
    else:
        script.kill()
        script.communicate()
        wait_until_gone(there)


@pytest.mark.slow
def test_orphan_ends_though_a_forked_worker_holds_its_socket(tmp_path: Path) -> None:
    fork = "worker = os.fork()\nif worker == 0: os.close(1); os.close(2); os.read(reader, 1); os._exit(0)\n"
    script = run_script(SCRIPT + "reader, writer = os.pipe()\n" + fork + "print(worker, flush=True)\ninput()", tmp_path)
    assert script.stdout is not None
    there = int(script.stdout.readline().split()[1])
    worker = int(script.stdout.readline())
    script.kill()
    script.communicate()
    try:
        wait_until_gone(there)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_interrupt_of_the_whole_group_does_not_reach_it(tmp_path: Path) -> None:
    waiting = """
import time
try:
    print("ready", flush=True)
    while True: time.sleep(0.01)
except KeyboardInterrupt:
    print(process.call(divmod, 17, 5), flush=True)
"""
    script = run_script(SCRIPT + waiting, tmp_path)
    assert script.stdout is not None
    while script.stdout.readline() != "ready\n":
        pass
    os.killpg(script.pid, signal.SIGINT)
    output, errors = script.communicate()
    assert (output, errors) == ("(3, 2)\n", "")


def test_interrupt_in_the_middle_of_a_call_ends_the_process_and_no_answer_is_mixed_up(
    process: WriterProcess, tmp_path: Path
) -> None:
    """The answer of the call that was given up must not be taken for that of the next."""
    os.mkfifo(tmp_path / "pipe")
    main_thread = threading.get_ident()

    def interrupt_when_busy() -> None:
        with suppress(BrokenPipeError), (tmp_path / "pipe").open("wb") as pipe:
            signal.pthread_kill(main_thread, signal.SIGINT)
            interrupted.wait()
            pipe.write(b"an answer that comes too late")

    interrupted = threading.Event()
    interrupter = threading.Thread(target=interrupt_when_busy)
    there = process.call(os.getpid)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        process.call(Path.read_bytes, tmp_path / "pipe")
    interrupted.set()
    interrupter.join()
    assert not Path(f"/proc/{there}").exists()
    assert process.call(divmod, 17, 5) == (3, 2)


def test_dropped_in_a_cycle_it_ends_without_a_warning_whatever_is_finalized_first() -> None:
    script = """
import gc, subprocess, warnings
warnings.simplefilter("error")
from aengine.checkpoint.formats.writer_process import WriterProcess

class YoungerGeneration(subprocess.Popen):
    def __new__(cls, *arguments, **keywords):
        gc.collect(0)  # what was made before is of an older generation, which is finalized later
        return super().__new__(cls)

subprocess.Popen = YoungerGeneration
gc.disable()
process = WriterProcess()
process.start()
process.itself = process
del process
gc.collect()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")

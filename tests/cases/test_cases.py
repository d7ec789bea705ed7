"""Each program of this folder holds, on each event loop that it may run on."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.backends import BACKENDS, Backend
from support.programs import run_program

HERE = Path(__file__).parent
PROGRAMS = sorted(path for path in HERE.glob("*/*.py"))

ASYNCIO = {  # asyncio's own calls are what it is about
    "cancelled_future_in_a_step",
    "cleanup_cut_off",
}
OWN_PROCESS = {  # they raise signals, end the process, start workers that take long to end
    "busy_after_its_event_loop_is_closed",
    "killed_worker",
    "loader_left_to_the_collector",
    "persistent_workers_of_hugging_face",
    "signal_that_wakes_no_event_loop",
    "stop_on_signals_beside_a_server",
}
SLOW = {  # they compile, import torch in another process, start a DataLoader's workers, or wait for seconds
    "average_of_a_compiled_model",
    "hole_in_the_log",
    "killed_worker",
    "loader_left_to_the_collector",
    "persistent_workers_of_hugging_face",
    "sigterm_to_the_whole_group",
    "stop_on_signals_beside_a_server",
}


def backends_of(program: Path) -> list[Any]:
    """Return the backends as the fixture has them. A plain `main()` has none, and is run once."""
    text = program.read_text(encoding="utf-8")
    if program.stem in ASYNCIO:
        return [each for each in BACKENDS if each.id != "trio"]
    if "async def main() -> None:" in text:
        return BACKENDS
    if "def main(backend:" in text:
        return [each for each in BACKENDS if each.id != "uvloop"]
    return [each for each in BACKENDS if each.id == "asyncio"]


CASES = [
    pytest.param(
        program,
        *backend.values,
        id=f"{program.parent.name}/{program.stem}-{backend.id}",
        marks=([pytest.mark.slow] + [pytest.mark.variant] * (position > 0)) if program.stem in SLOW else [],
    )
    for program in PROGRAMS
    for position, backend in enumerate(backends_of(program))
]


@pytest.mark.parametrize(("program", "anyio_backend"), CASES, indirect=["anyio_backend"])
def test_program_holds(program: Path, anyio_backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if program.stem not in OWN_PROCESS:
        run_program(program, anyio_backend)
        return
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent), prepend=":")
    backend = "uvloop" if anyio_backend[1] else anyio_backend[0]
    command = [sys.executable, "-m", "support.programs", str(program), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_each_name_that_is_listed_is_a_program() -> None:
    names = [program.stem for program in PROGRAMS]
    assert len(set(names)) == len(names)
    assert set(names) >= ASYNCIO | OWN_PROCESS | SLOW

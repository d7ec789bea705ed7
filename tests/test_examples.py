"""Each example is run as a user runs it: by a new interpreter, in a folder of its own."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]


def run(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the example without arguments. The minute that it may take is one of two idle cores: here others may run."""
    done = subprocess.run(command(name), cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_quickstart_reaches_95_percent_and_keeps_a_log(tmp_path: Path) -> None:
    done = run("quickstart.py", tmp_path)
    accuracy = re.search(r"test accuracy (\d\.\d+)", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.95
    assert (tmp_path / "quickstart.jsonl").read_text(encoding="utf-8").startswith('{"iteration": 10,')
    bar = [update for update in re.split(r"[\r\n]+", done.stderr) if update]
    assert all(update.startswith("training: ") for update in bar), done.stderr


def test_gan_draws_a_picture(tmp_path: Path) -> None:
    done = run("gan.py", tmp_path)
    assert (tmp_path / "gan.png").read_bytes().startswith(b"\x89PNG")
    assert not done.stderr


def test_streaming_learns_until_its_time_is_up(tmp_path: Path) -> None:
    done = run("streaming.py", tmp_path)
    bits = [float(each) for each in re.findall(r"(\d+\.\d+) bits per character", done.stdout)]
    assert bits[-1] < bits[0]
    assert not done.stderr


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_streaming_ends_cleanly_at_ctrl_c(tmp_path: Path, backend: str) -> None:
    with subprocess.Popen(
        command("streaming.py", "--seconds", "60", "--backend", backend),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("iteration")
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "terminated after" in output
    assert not errors


def test_resume_is_killed_and_loses_nothing(tmp_path: Path) -> None:
    done = run("resume.py", tmp_path)
    head, *lives, end = done.stdout.splitlines()
    assert head == "life  first step  last step"
    assert all("killed" in life for life in lives[:-1])
    assert lives[-1].endswith("finished")
    assert re.fullmatch(r"580 steps, \d+ taken again: all losses equal those of a run without a kill", end)
    assert not done.stderr


def test_resume_ends_at_sigterm_with_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    losses = tmp_path / "losses.txt"
    with subprocess.Popen(
        command("resume.py", "train"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while process.poll() is None and not (losses.exists() and losses.stat().st_size):
                time.sleep(0.01)
            process.terminate()
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert not errors
    step = int(losses.read_text(encoding="utf-8").splitlines()[-1].split()[0])
    assert output.splitlines() == ["beginning", f"terminated at step {step} of 580"]

    again = subprocess.run(command("resume.py", "train"), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines() == [f"resuming from step {step}", "completed at step 580 of 580"]
    assert not again.stderr
    steps = [line.split()[0] for line in losses.read_text(encoding="utf-8").splitlines()]
    assert steps == [str(step) for step in range(1, 581)], "none was skipped, and none taken twice"


def test_learning_curve_draws_two_pictures(tmp_path: Path) -> None:
    run("learning_curve.py", tmp_path)
    for name in ("learning_curve.png", "timeline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size < 120_000


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "gan.py",
        "learning_curve.py",
        "quickstart.py",
        "resume.py",
        "streaming.py",
    }

"""Each example is run as a user runs it: by a new interpreter, in a folder of its own."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]


def run(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the example without arguments. The minute that it may take is one of two idle cores: here others may run."""
    done = subprocess.run(command(name), cwd=folder, capture_output=True, text=True, timeout=100, check=False)
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


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"gan.py", "quickstart.py", "streaming.py"}

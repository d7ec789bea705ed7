"""Each example is run as a user runs it: by a new interpreter, in a folder of its own."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]


def run(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the example without arguments. It takes a minute at most on two idle cores; other tests may run here."""
    done = subprocess.run(command(name), cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done


def interrupt(folder: Path, *example: str) -> str:
    """Press Ctrl-C after the first line of output. Returns all output, of an example that must end cleanly."""
    with subprocess.Popen(
        command(*example), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert not errors
    return first + rest


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


def test_regression_predicts_half_of_the_variance(tmp_path: Path) -> None:
    done = run("regression.py", tmp_path)
    stopped, polynomial, result = done.stdout.splitlines()
    assert stopped.startswith("terminated after"), "the validation patients were predicted no better"
    assert "·bmi" in polynomial
    r2 = re.search(r"test R2 (\d\.\d+)", result)
    assert r2 is not None
    assert float(r2[1]) > 0.45
    assert not done.stderr, "the bar is for terminals"


def test_vae_draws_and_is_tested_beside_the_step(tmp_path: Path) -> None:
    done = run("vae.py", tmp_path)
    losses = [float(each) for each in re.findall(r"test loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 5
    assert losses[-1] < min(24.5, losses[0])
    for name in ("vae-reconstructions.png", "vae-samples.png"):
        with Image.open(tmp_path / name) as picture:
            pixels = picture.convert("L").tobytes()
        assert len(pixels) == 720 * 720
        assert min(pixels) == 0
        assert max(pixels) > 200, name
    assert not done.stderr


def test_language_model_learns_anneals_and_writes(tmp_path: Path) -> None:
    done = run("language_model.py", tmp_path)
    lines = re.findall(
        r"epoch +\d+: perplexity (\S+), training (\S+), learning rate (\S+)\n +(\S.*) \.\.\.\n", done.stdout
    )
    assert len(lines) == 12
    perplexities = [float(perplexity) for perplexity, *_ in lines]
    rates = [float(rate) for *_, rate, _ in lines]
    assert perplexities[-1] < perplexities[0] / 2
    best = [math.inf, *accumulate(perplexities, min)]
    for epoch in range(11):
        if perplexities[epoch] != best[epoch]:  # otherwise digits that are not printed decide
            expected = rates[epoch] if perplexities[epoch] < best[epoch] else rates[epoch] / 4
            assert rates[epoch + 1] == pytest.approx(expected, rel=0.01)
    test = re.search(r"completed after .*; test perplexity (\d+\.\d)\n(.+)\n$", done.stdout)
    assert test is not None
    assert float(test[1]) < 120  # of 1,400 words; the manual differs between versions of Python
    assert len(test[2].split()) > 40
    assert not done.stderr


def test_streaming_learns_until_its_time_is_up(tmp_path: Path) -> None:
    done = run("streaming.py", tmp_path)
    bits = [float(each) for each in re.findall(r"(\d+\.\d+) bits per character", done.stdout)]
    assert bits[-1] < bits[0]
    assert not done.stderr


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_streaming_ends_cleanly_at_ctrl_c(tmp_path: Path, backend: str) -> None:
    output = interrupt(tmp_path, "streaming.py", "--seconds", "60", "--backend", backend)
    assert output.startswith("iteration")
    assert "terminated after" in output


def test_language_model_is_tested_though_ctrl_c_ends_its_training(tmp_path: Path) -> None:
    output = interrupt(tmp_path, "language_model.py")
    assert output.startswith("epoch  1: ")
    assert re.search(r"terminated after .*; test perplexity \d+", output)
    assert "epoch 12" not in output


def test_resume_is_killed_and_loses_nothing(tmp_path: Path) -> None:
    done = run("resume.py", tmp_path)
    head, *runs, end = done.stdout.splitlines()
    assert head == " run  first step  last step"
    assert all("killed" in run for run in runs[:-1])
    assert runs[-1].endswith("finished")
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


def digits_end(output: str) -> tuple[str, ...]:
    """Return the numbers that it prints at its end: the best step, its validation accuracy, the test accuracy."""
    found = re.search(r"best is step (\d+), of validation accuracy (\S+)\ntest accuracy (\S+):", output)
    assert found is not None, output
    return found.groups()


def test_digits_reaches_97_percent_and_is_then_done(tmp_path: Path) -> None:
    done = run("digits.py", tmp_path)
    assert done.stdout.startswith("beginning\ntrainer: ")
    assert not done.stderr
    best, _, accuracy = digits_end(done.stdout)
    assert float(accuracy) >= 0.97
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = max(record["step"] for record in records)
    steps = [record["step"] for record in records if record["event"] == "ITERATION_COMPLETED"]
    assert steps == list(range(10, last + 1, 10))
    assert {"loss", "mean loss", "rate", "validation/accuracy"} == records[-2]["values"].keys()
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert len(kept) == 3, "the best and the last two"
    assert f"step-{int(best):010}" in kept
    assert kept[-1].startswith(f"step-{last:010}")

    again = run("digits.py", tmp_path)
    assert again.stdout.startswith(f"done at step {last}\nthe best is step {best}")
    assert not again.stderr
    assert digits_end(again.stdout) == digits_end(done.stdout)


def test_digits_ends_at_ctrl_c_and_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with subprocess.Popen(
        command("digits.py"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while process.poll() is None and not (log.exists() and log.stat().st_size):
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert not errors
    stopped = re.search(r"^stopped at step (\d+): the same command resumes$", output, re.MULTILINE)
    assert stopped is not None, output

    resumed = run("digits.py", tmp_path)
    assert resumed.stdout.startswith(f"resuming from step {stopped[1]}\n")
    assert not resumed.stderr
    other = tmp_path / "never stopped"
    other.mkdir()
    assert digits_end(resumed.stdout) == digits_end(run("digits.py", other).stdout)
    assert losses_of(tmp_path) == losses_of(other)


def losses_of(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {record["step"]: record["values"]["loss"] for record in records if record["engine"] == "trainer"}


def test_cartpole_keeps_the_pole_up(tmp_path: Path) -> None:
    done = run("cartpole.py", tmp_path)
    last = re.findall(r"^batch +\d+: mean return +(\d+\.\d), staleness \d+$", done.stdout, re.MULTILINE)[-1]
    assert float(last) >= 400
    assert "\nterminated after " in done.stdout
    assert re.search(r"^greedily, over 10 episodes: mean return \d+\.\d$", done.stdout, re.MULTILINE)
    assert not done.stderr


def test_learning_curve_draws_two_pictures(tmp_path: Path) -> None:
    run("learning_curve.py", tmp_path)
    for name in ("learning_curve.png", "timeline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size < 120_000


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "cartpole.py",
        "digits.py",
        "gan.py",
        "language_model.py",
        "learning_curve.py",
        "quickstart.py",
        "regression.py",
        "resume.py",
        "streaming.py",
        "vae.py",
    }

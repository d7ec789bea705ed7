"""Every example and benchmark answers `--help` at once: before it imports torch, and without any of its work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = {"measure.py", "torch_steps.py"}  # imported by the benchmarks
SCRIPTS = [
    path
    for folder in ("examples", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.name not in LIBRARIES
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help_needs_no_torch(script: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text('raise ImportError("--help is to be answered before torch is imported")\n')
    path = os.pathsep.join([str(tmp_path), str(ROOT)])  # where torch is looked for first
    done = subprocess.run(
        [sys.executable, "-B", str(script), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script.name}")
    description = done.stdout.split("\n\n")[1]
    assert description[0].isupper(), "it begins with a sentence on what the script does"
    assert not done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["torch.py"], "it wrote no files"

"""bench/plot_scaling.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "bench.plot_scaling"]


def run(*arguments):
    command = [*COMMAND, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_it_draws_what_it_is_given(tmp_path):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "1.png", tmp_path / "2.png"
    assert run("2:297.5", "1:577.9", "--out", first).returncode == 0
    assert run("2:397.5", "1:577.9", "--out", second).returncode == 0
    assert first.read_bytes()[:4] == b"\x89PNG"
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize("text", ["1", "0:5", "two:5", "2:-5", "2:fast"])
def test_what_is_not_a_pair_is_refused_in_one_line(text):
    done = run(text)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"argument GPUS:MS: invalid pair value: '{text}'" in done.stderr

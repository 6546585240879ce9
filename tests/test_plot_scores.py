"""Scores against training time: what the points are, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import plot_scores

ROOT = Path(plot_scores.__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "tools.plot_scores"]


def write_log(path: Path, seconds: float, before: float, final: float | None, **settings) -> Path:
    settings = {"max_wallclock_seconds": seconds, "matrix_lr": 0.02, "run_id": path.stem} | settings
    events = [{"event": "settings", "settings": settings}, {"event": "trained", "val_bpb": before}]
    events += [] if final is None else [{"event": "final", "val_bpb": final}]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def test_seeds_are_one_point_and_clocks_are_in_order(tmp_path):
    logs = [
        write_log(tmp_path / "d.jsonl", 400.0, 1.21, 1.20, seed=1),
        write_log(tmp_path / "a.jsonl", 180.0, 1.24, 1.22, seed=1),
        write_log(tmp_path / "b.jsonl", 180.0, 1.26, 1.23, seed=2),
        write_log(tmp_path / "c.jsonl", 180.0, 1.30, 1.29, seed=1, matrix_lr=0.03),
    ]
    points = plot_scores.read_points(logs)
    assert points["final"] == [(180.0, [1.22, 1.23]), (180.0, [1.29]), (400.0, [1.20])]
    assert points["before quantization"] == [
        (180.0, [1.24, 1.26]),
        (180.0, [1.30]),
        (400.0, [1.21]),
    ]


def test_the_command_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    log, out = write_log(tmp_path / "a.jsonl", 180.0, 1.24, 1.22), tmp_path / "scores.png"
    command = [*COMMAND, log, "--out", out, "--mark", "1.3103", "theirs"]
    subprocess.run(command, cwd=ROOT, check=True)
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("problem", ["unfinished", "not a log", "missing"])
def test_other_files_end_in_one_line(tmp_path, problem):
    log = tmp_path / "a.jsonl"
    if problem == "unfinished":
        write_log(log, 180.0, 1.24, None)
    elif problem == "not a log":
        log.write_text("hello\n")
    command = [*COMMAND, log, "--out", tmp_path / "scores.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(log) in done.stderr
    assert not (tmp_path / "scores.png").exists()

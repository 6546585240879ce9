"""Scores against training seconds: the curve, its forecast, its intervals, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools import scaling

ROOT = Path(scaling.__file__).resolve().parent.parent


def curve(seconds: float, floor: float = 1.05, scale: float = 2.0, power: float = 0.6) -> float:
    return floor + scale * seconds**-power


def write_log(path: Path, clock: float, bpb: float, steps: int = 100, gpus: int = 1) -> Path:
    settings = {
        "max_wallclock_seconds": clock + 4.0,
        "export_reserve_seconds": 4.0,
        "train_batch_tokens": 1000,
    }
    machine = {"hardware": f"{gpus} × NVIDIA H200"}
    events = [
        {"event": "settings", "settings": settings, "machine": machine},
        {"event": "trained", "steps": steps, "val_bpb": bpb},
    ]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def runs(noise: float, clocks=(22, 45, 90, 180), seeds: int = 2, **parameters) -> list[scaling.Run]:
    random = np.random.default_rng(1)
    return [
        scaling.Run(clock, curve(clock, **parameters) + noise * random.standard_normal(), 1.0)
        for clock in clocks
        for _ in range(seeds)
    ]


def test_a_curve_without_noise_is_found_and_its_interval_is_a_point():
    found = scaling.fit(runs(0.0), np.random.default_rng(0))
    assert found.parameters == pytest.approx([1.05, 2.0, 0.6], abs=1e-6)
    assert found.at(4800) == pytest.approx(curve(4800), abs=1e-9)
    assert np.ptp(found.samples(4800)) < 1e-9


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        noisy = [run._replace(bpb=run.bpb + 1e-3 * random.standard_normal()) for run in runs(0.0)]
        low, high = np.percentile(scaling.fit(noisy, random).samples(360), scaling.INTERVAL)
        held += low <= curve(360) <= high
    assert 44 <= held <= 60


def test_three_runs_show_no_noise_and_have_no_interval():
    found = scaling.fit(runs(0.0, clocks=(22, 45, 90), seeds=1), np.random.default_rng(0))
    assert found.at(180) == pytest.approx(curve(180), abs=1e-6)
    assert scaling.interval(found.samples(180)) == "unknown"


def test_nothing_is_foretold_to_score_below_zero():
    falling = [scaling.Run(s, 3.0 - 0.2 * s, 1.0) for s in (1, 3, 5, 8)]
    found = scaling.fit(falling, np.random.default_rng(0))
    assert found.parameters[0] == 0
    assert found.at(4800) > 0
    assert found.samples(4800).min() > 0


def test_the_longest_run_is_foretold_from_the_shorter_ones():
    line = scaling.foretold("ours", runs(0.0), np.random.default_rng(0))
    assert line.startswith(f"ours: 180 s foretold {curve(180):.4f}")
    assert line.endswith(f"measured {curve(180):.4f}")
    few = scaling.foretold("ours", runs(0.0, clocks=(45, 90, 180)), np.random.default_rng(0))
    assert "too few clocks" in few


def test_seconds_are_of_all_gpus_and_without_the_time_for_export(tmp_path):
    log = write_log(tmp_path / "a.jsonl", 45.0, 1.2, steps=300, gpus=8)
    assert scaling.read_run(log, 200_000) == scaling.Run(360.0, 1.2, 1.5)


def test_the_command_says_who_leads_and_leaves_repetition_out(tmp_path):
    pytest.importorskip("matplotlib")
    ours = [write_log(tmp_path / f"o{s}.jsonl", s, curve(s)) for s in (22, 45, 90, 180)]
    twin = [write_log(tmp_path / f"t{s}.jsonl", s, curve(s, 1.07)) for s in (22, 45, 90, 180)]
    ours.append(write_log(tmp_path / "o360.jsonl", 360, 2.0, steps=10_000))
    command = [sys.executable, "-m", "tools.scaling", "--ours", *ours, "--twin", *twin]
    command += ["--training-tokens", "1000000", "--out", tmp_path / "lead.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "ours: 1 runs of over 1.2 passes are not fitted" in done.stdout
    last = done.stdout.splitlines()[-1].split(" | ")
    assert last[0] == "| 4800"
    assert float(last[1]) == pytest.approx(curve(4800), abs=1e-4)
    assert float(last[5]) == pytest.approx(0.02, abs=1e-4)
    assert (tmp_path / "lead.png").read_bytes().startswith(b"\x89PNG")


def test_two_clocks_and_other_files_end_in_one_line(tmp_path):
    few = [write_log(tmp_path / f"{s}.jsonl", s, curve(s)) for s in (22, 45)]
    other = tmp_path / "other.jsonl"
    other.write_text("hello\n")
    for logs, message in ((few, "2 different clocks are too few"), ([other], str(other))):
        command = [sys.executable, "-m", "tools.scaling", "--ours", *logs, "--twin", *logs]
        command += ["--training-tokens", "1000000", "--out", tmp_path / "lead.png"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
        assert not (tmp_path / "lead.png").exists()

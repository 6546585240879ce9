"""Scores against training seconds: the curve, its forecast, its intervals, and what is refused."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import called_here
from tools import scaling
from tools.command import UserError

ROOT = Path(scaling.__file__).resolve().parent.parent


def curve(seconds: float, floor: float = 1.05, scale: float = 2.0, power: float = 0.6) -> float:
    return floor + scale * seconds**-power


def write_log(
    path: Path, clock: float, bpb: float, steps: int = 100, gpus: int = 1, **changes
) -> Path:
    """A run's log, as far as it is read; changes are of settings, or of what is named here."""
    told = {"hardware": "NVIDIA H200", "tokens": 1_000_000, "digest": "aa", "validation": "bb"}
    told |= {name: changes.pop(name) for name in told if name in changes}
    settings = {
        "max_wallclock_seconds": clock + 4.0,
        "export_reserve_seconds": 4.0,
        "train_batch_tokens": 1000,
        "seed": 1,
        "run_id": path.stem,
    } | changes
    machine = {"hardware": f"{gpus} × {told['hardware']}"}
    hashes = {"validation": {"v": told["validation"]}, "tokenizer": {"t": "cc"}}
    events = [
        {"event": "settings", "settings": settings, "machine": machine},
        {"event": "hashes", **hashes},
        {"event": "training_data", "tokens": told["tokens"], "digest": told["digest"]},
        {"event": "trained", "steps": steps, "val_bpb": bpb},
    ]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def one(seconds: float, bpb: float) -> scaling.Run:
    return scaling.Run(seconds, bpb, 1.0, scaling.Kind(Path("a.jsonl"), {}, {}), "NVIDIA H200")


def runs(noise: float, clocks=(22, 45, 90, 180), seeds: int = 2, **parameters) -> list[scaling.Run]:
    random = np.random.default_rng(1)
    return [
        one(clock, curve(clock, **parameters) + noise * random.standard_normal())
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
    falling = [one(s, 3.0 - 0.2 * s) for s in (1, 3, 5, 8)]
    found = scaling.fit(falling, np.random.default_rng(0))
    assert found.parameters[0] == 0
    assert found.at(4800) > 0
    assert found.samples(4800).min() > 0


def test_the_longest_run_is_foretold_from_the_shorter_ones():
    test = scaling.foretold("ours", runs(0.0), np.random.default_rng(0))
    assert test.line.startswith(f"ours: 180 s foretold {curve(180):.4f}")
    assert test.line.endswith(f"measured {curve(180):.4f}") and not test.failed
    few = scaling.foretold("ours", runs(0.0, clocks=(45, 90, 180)), np.random.default_rng(0))
    assert "too few clocks" in few.line and not few.failed


@pytest.mark.parametrize("off", [-0.02, 0.0, 0.02])
def test_a_curve_that_does_not_foretell_its_longest_clock_has_failed(off):
    shorter = runs(1e-3, clocks=(22, 45, 90))
    middle = scaling.fit(shorter, np.random.default_rng(0)).at(180)
    measured = [*shorter, one(180, middle + off)]
    test = scaling.foretold("ours", measured, np.random.default_rng(0))
    assert test.failed == bool(off)
    assert test.line.endswith("ours beyond 180 s is not to be believed") == bool(off)


def test_seconds_are_of_all_gpus_and_passes_by_the_logs_own_count(tmp_path):
    log = write_log(tmp_path / "a.jsonl", 45.0, 1.2, steps=300, gpus=8, tokens=200_000)
    found = scaling.read_run(log)
    assert (found.seconds, found.bpb, found.passes) == (360.0, 1.2, 1.5)


def start(folder: Path, ours: list[Path], twin: list[Path], *more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.scaling", "--ours", *ours, "--twin", *twin]
    command += ["--out", folder / "lead.png", *map(str, more)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def kinds(folder: Path) -> tuple[list[Path], list[Path]]:
    ours = [write_log(folder / f"o{s}.jsonl", s, curve(s)) for s in (22, 45, 90, 180)]
    twin = [
        write_log(folder / f"t{s}.jsonl", s, curve(s, 1.07), depth=2) for s in (22, 45, 90, 180)
    ]
    return ours, twin


def test_the_command_says_who_leads_and_leaves_repetition_out(tmp_path):
    pytest.importorskip("matplotlib")
    ours, twin = kinds(tmp_path)
    ours.append(write_log(tmp_path / "o360.jsonl", 360, 2.0, steps=10_000))
    done = start(tmp_path, ours, twin)
    assert done.returncode == 0, done.stderr
    assert "ours: 1 runs of over 1.2 passes are not fitted" in done.stdout
    last = done.stdout.splitlines()[-1].split(" | ")
    assert last[0] == "| 4800"
    assert float(last[1]) == pytest.approx(curve(4800), abs=1e-4)
    assert float(last[5]) == pytest.approx(0.02, abs=1e-4)
    assert (tmp_path / "lead.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_tells_what_was_measured_from_what_is_foretold():
    pytest.importorskip("matplotlib")
    both = {"ours": runs(1e-3), "twin": runs(1e-3, floor=1.07)}
    fits = {name: scaling.fit(found, np.random.default_rng(0)) for name, found in both.items()}
    for to, broken in ((4800, True), (90, False)):
        (axes,) = scaling.plot(both, fits, to, {"twin"}).axes
        lines = [line for line in axes.lines if len(line.get_xdata()) == 100]
        assert [line.get_linestyle() for line in lines] == ["-", "--"] * 2
        for solid, ahead in (lines[:2], lines[2:]):
            assert max(solid.get_xdata()) == pytest.approx(180)
            assert (max(ahead.get_xdata()) > 181) == broken
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == ["ours", "twin: failed its test, foretells nothing"]
    assert "but twin failed the test" in scaling.caption(180, {"twin"})


MIXED = {
    "other settings": ({"matrix_lr": 0.1}, "MATRIX_LR="),
    "another batch": ({"train_batch_tokens": 10}, "TRAIN_BATCH_TOKENS="),
    "half the text": ({"digest": "dd"}, "has another training text than"),
    "another validation text": ({"validation": "ee"}, "has another validation than"),
    "another machine": ({"hardware": "CPU x86_64"}, "ran on CPU x86_64, but"),
    "one seed twice": ({}, "has SEED=1 at 26 s, as"),
}


@pytest.mark.parametrize(("changes", "message"), MIXED.values(), ids=MIXED)
def test_runs_of_one_kind_differ_in_clock_and_seed(tmp_path, changes, message):
    """Whatever was given was fitted: half the text, other models, one log twice."""
    ours, twin = kinds(tmp_path)
    odd = write_log(tmp_path / "odd.jsonl", 22, curve(22), **changes)
    with pytest.raises(UserError, match=message):
        scaling.read_kinds([*ours, odd], twin)
    with pytest.raises(UserError):
        scaling.read_kinds([odd, *ours], twin)
    write_log(odd, 22, curve(22), seed=2)
    assert len(scaling.read_kinds([*ours, odd], twin)["ours"]) == 5


def test_logs_that_only_score_again_are_left_out(tmp_path, capsys):
    """h-*.jsonl finds them beside the runs', and they say nothing of training."""
    ours, twin = kinds(tmp_path)
    again = tmp_path / "h-22.eval.jsonl"
    again.write_text('{"event": "settings", "settings": {"eval_only": true}, "machine": {}}\n')
    assert len(scaling.read_kinds([again, *ours], twin)["ours"]) == len(ours)
    assert capsys.readouterr().err == f"left out, as they only score again: {again}\n"


def test_kinds_of_other_text_or_machines_are_not_compared(tmp_path):
    ours, _ = kinds(tmp_path)
    for changes in ({"digest": "dd"}, {"validation": "ee"}, {"hardware": "CPU"}):
        twin = [write_log(tmp_path / "twin.jsonl", 22, 1.3, **changes)]
        with pytest.raises(UserError):
            scaling.read_kinds(ours, twin)


def test_other_files_and_arguments_end_in_one_line(tmp_path):
    ours, twin = kinds(tmp_path)
    other, empty, old = (tmp_path / f"{name}.jsonl" for name in ("other", "empty", "old"))
    other.write_text("hello\n")
    write_log(empty, 22, None)
    nan = write_log(tmp_path / "nan.jsonl", 22, float("nan"))
    old.write_text("".join(line for line in ours[0].open() if "training_data" not in line))
    seen = write_log(tmp_path / "seen.jsonl", 22, 1.2, steps=2000)
    # It trained for less than its clock, and would stand at the wrong place.
    ended = write_log(tmp_path / "ended.jsonl", 999, 1.1, steps=500, iterations=500)
    cases = [
        (ours[:2], [], "ours: 2 different clocks are too few"),
        (
            [seen],
            [],
            "ours: 0 different clocks are too few for a curve of three parameters; 1 runs",
        ),
        ([other], [], str(other)),
        ([empty], [], "has no score"),
        ([nan], [], "has no score"),
        ([*ours, ended], [], "ended.jsonl was not trained to the end of its clock"),
        ([old], [], "does not say which text was read"),
        (ours, ["--seed", "-1"], "--seed -1"),
        (ours, ["--to", "1e300"], "--to 1e+300"),
        (ours, ["--to", "nan"], "--to nan"),
        (ours, ["--out", tmp_path / "x.pdfx"], "x.pdfx"),
        (ours, ["--out", tmp_path], "is a folder"),
        (ours, ["--out", ours[0]], "would be written over"),
    ]
    for logs, more, message in cases:
        arguments = ["--ours", *logs, "--twin", *twin, "--out", tmp_path / "lead.png", *more]
        main = functools.partial(scaling.run_command, "scaling.py", scaling.main)
        done = called_here(main, "scaling.py", *arguments)
        assert done.returncode == 2
        assert done.stdout == "" and done.stderr.count("\n") == 1
        assert message in done.stderr
        assert not (tmp_path / "lead.png").exists()

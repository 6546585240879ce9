"""Scores against training time: what the points are, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import plot_scores
from tools.command import UserError

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
    assert [(point.seconds, point.scores["final"]) for point in points] == [
        (180.0, [1.22, 1.23]),
        (180.0, [1.29]),
        (400.0, [1.20]),
    ]
    before = [point.scores["before quantization"] for point in points]
    assert before == [[1.24, 1.26], [1.30], [1.21]]
    assert [plot_scores.name_of(point) for point in points] == ["2 seeds", "c", "d"]


def test_one_seed_is_no_two_and_another_text_is_another_point(tmp_path):
    """A log that was given twice passed for two seeds that agree to the last digit."""
    log = write_log(tmp_path / "a.jsonl", 180.0, 1.24, 1.22, seed=1)
    copy = write_log(tmp_path / "b.jsonl", 180.0, 1.24, 1.22, seed=1)
    for logs in ([log, log], [log, copy]):
        with pytest.raises(UserError, match="has SEED=1, as another run"):
            plot_scores.read_points(logs)
    counts = {"event": "validation_data", "tokens": 9, "documents": 1, "bytes": 9}
    copy.write_text(copy.read_text() + json.dumps(counts) + "\n")
    assert len(plot_scores.read_points([log, copy])) == 2
    write_log(copy, 180.0, float("nan"), 1.22, seed=2)
    with pytest.raises(UserError, match="has no score"):
        plot_scores.read_points([copy])


def test_a_run_that_iterations_ended_is_where_its_training_ended(tmp_path):
    """It stood at MAX_WALLCLOCK_SECONDS, or at 0 without one."""
    for clock, steps, place in ((600.0, 500, 97.5), (0.0, 500, 97.5), (600.0, 499, 600.0)):
        log = write_log(tmp_path / "a.jsonl", clock, 1.24, 1.22, iterations=500)
        told = f'"steps": {steps}, "train_clock_seconds": 97.5, "val_bpb": 1.24'
        log.write_text(log.read_text().replace('"val_bpb": 1.24', told))
        (point,) = plot_scores.read_points([log])
        assert point.seconds == place


def test_a_line_joins_what_differs_in_the_clock_alone(tmp_path):
    def series(name: str, seconds: float, script: str | None, **settings) -> str:
        log = write_log(tmp_path / f"{name}.jsonl", seconds, 1.3, 1.2, **settings)
        if script is not None:
            log.with_suffix(".txt").write_text(f"{script}\n{'=' * 100}\nmessages\n")
        (point,) = plot_scores.read_points([log])
        return point.series

    short = series("short", 180.0, "a script")
    assert series("long", 400.0, "a script", seed=2) == short
    assert series("other-script", 400.0, "another") != short
    assert series("other-rate", 400.0, "a script", matrix_lr=0.03) != short
    assert series("untold", 400.0, None) not in (short, series("untold-too", 400.0, None))


def test_names_say_which_run_a_point_is_and_the_title_which_text():
    logs = ROOT / "logs"
    old = [*logs.glob("h200-short-*.jsonl"), logs / "h200-400s.jsonl", logs / "h200-45s.jsonl"]
    points = plot_scores.read_points(old)
    assert len({point.series for point in points}) == len(points) == 3
    assert [point.seconds for point in points] == [45.0, 180.0, 400.0]
    assert plot_scores.name_of(points[1]).endswith(", 3 seeds")
    assert {point.text for point in points} == {plot_scores.UNTOLD}
    (tiny,) = plot_scores.read_points([ROOT / "data" / "tiny" / "tiny.jsonl"])
    assert tiny.text == "not FineWeb"


def test_names_of_one_clock_do_not_cover_each_other(tmp_path, monkeypatch):
    """They are lines of one label, in the order of their points."""
    logs = [
        write_log(tmp_path / "low.jsonl", 180.0, 1.24, 1.22),
        write_log(tmp_path / "high.jsonl", 180.0, 1.26, 1.23, matrix_lr=0.03),
        write_log(tmp_path / "long.jsonl", 360.0, 1.20, 1.19),
    ]
    figures = []
    monkeypatch.setattr(plot_scores, "write_picture", lambda out, figure: figures.append(figure))
    plot_scores.plot(plot_scores.read_points(logs), [], "a text", tmp_path / "plot.png")
    (axes,) = figures[0].axes
    assert sorted((label.get_text(), *label.xy) for label in axes.texts) == [
        ("high\nlow", 180.0, 1.26),
        ("long", 360.0, 1.20),
    ]


def test_the_command_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    log, out = write_log(tmp_path / "a.jsonl", 180.0, 1.24, 1.22), tmp_path / "scores.png"
    command = [*COMMAND, log, "--out", out, "--mark", "1.3103", "theirs"]
    subprocess.run(command, cwd=ROOT, check=True)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_logs_that_only_score_again_lie_beside_those_that_are_drawn(tmp_path, capsys):
    """As logs/*.jsonl finds both."""
    log = write_log(tmp_path / "a.jsonl", 180.0, 1.24, 1.22)
    again = tmp_path / "a.eval.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [record for record in records if record["event"] != "trained"]
    again.write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert plot_scores.read_points([again, log]) == plot_scores.read_points([log])
    assert capsys.readouterr().err == f"left out, as they only score again: {again}\n"
    with pytest.raises(UserError, match="not the .jsonl log of a finished run"):
        plot_scores.read_points([again])


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

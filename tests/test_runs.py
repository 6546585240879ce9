"""tools/runs.py: what the table of runs says, how it is sorted, and what is refused."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import runs
from tools.command import UserError
from tools.summary import longer_command

ROOT = Path(runs.__file__).resolve().parent.parent


def write_log(path: Path, final: float | None = None, steps: int = 50, **settings) -> Path:
    chosen = {"run_id": path.stem, "eval_only": False, "train_batch_tokens": 1000, "seed": 1}
    records = [{"event": "settings", "settings": chosen | {"matrix_lr": 0.02} | settings}]
    for step in range(1, steps + 1):
        loss = 5 - step / 50
        record = {"event": "train", "step": step, "train_loss": loss, "train_ms": 40.0 * step}
        records.append(record | {"step_avg_ms": 40.0})
    if final is not None:
        trained = {
            "event": "trained",
            "steps": steps,
            "step_avg_ms": 41.0,
            "bytes_total": 15_900_000,
        }
        records.append(trained | {"val_bpb": final + 0.01})
        records.append({"event": "after_quantization", "val_bpb": final + 0.012})
        records.append({"event": "final", "val_bpb": final})
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def start(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.runs", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_best_is_first_and_only_what_differs_is_shown(tmp_path):
    write_log(tmp_path / "worse.jsonl", 1.3, matrix_lr=0.03)
    write_log(tmp_path / "deeper" / "better.jsonl", 1.2)
    write_log(tmp_path / "stopped.jsonl", seed=2)
    (tmp_path / "other.jsonl").write_text('{"event": "something else"}\n')
    (tmp_path / "no-log.jsonl").write_text("hello\n")
    done = start(tmp_path, "--csv", tmp_path / "runs.csv")
    assert done.returncode == 0, done.stderr
    header, *rows = [line.split() for line in done.stdout.splitlines()]
    assert header == ["run", *runs.FIGURES, "state", "SEED", "MATRIX_LR"]
    assert rows[0] == [
        "better",
        "50",
        "41.0",
        "1.2100",
        "1.2120",
        "1.2000",
        "15,900,000",
        "final",
        "1",
        "0.02",
    ]
    assert (rows[1][0], *rows[1][-2:]) == ("worse", "1", "0.03")
    assert rows[2] == [
        "stopped",
        "50",
        "40.0",
        "no",
        "score;",
        "last",
        "told:",
        "train",
        "of",
        "step",
        "50",
        "2",
        "0.02",
    ]
    with (tmp_path / "runs.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["run"] for row in found] == ["better", "worse", "stopped"]
    assert float(found[1]["after"]) == 1.3 + 0.012
    assert found[2]["final"] == ""


def test_of_a_log_with_two_runs_the_last_counts_and_an_error_is_told(tmp_path):
    first = write_log(tmp_path / "a.jsonl", 1.3).read_text()
    second = write_log(tmp_path / "a.jsonl").read_text()
    error = {"event": "error", "error": "training diverged"}
    (tmp_path / "a.jsonl").write_text(first + second + json.dumps(error) + "\n")
    run = runs.read_run(tmp_path / "a.jsonl")
    assert "final" not in run.figures
    assert run.state == "training diverged"
    assert len(run.losses) == 50


def test_of_the_ranks_that_failed_the_first_says_why(tmp_path):
    log = write_log(tmp_path / "a.jsonl")
    with log.open("a") as file:
        for rank, error in ((1, "a bad token"), (0, "another rank has ended")):
            file.write(json.dumps({"event": "error", "error": error, "rank": rank}) + "\n")
    assert runs.read_run(log).state == "rank 1: a bad token"


def test_a_column_or_a_setting_sorts(tmp_path):
    logs = [
        write_log(tmp_path / f"{name}.jsonl", final, steps, matrix_lr=rate)
        for name, final, steps, rate in (
            ("a", 1.2, 30, 0.03),
            ("b", 1.3, 10, 0.01),
            ("c", 1.1, 20, 0.02),
        )
    ]
    found = [runs.read_run(path) for path in logs]
    orders = {"final": "cab", "steps": "bca", "matrix_lr": "bca"}
    for column, order in orders.items():
        assert "".join(run.name for run in runs.sorted_runs(found, column)) == order


def test_losses_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    log = write_log(tmp_path / "a.jsonl", 1.2)
    done = start(log, "--plot", tmp_path / "curves.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("loss", ["NaN", "Infinity"])
def test_losses_that_diverged_are_left_out_of_the_picture(tmp_path, loss):
    """The first one set the picture's limits, and was a traceback; a run without any has none."""
    pytest.importorskip("matplotlib")
    log = write_log(tmp_path / "a.jsonl", 1.2)
    lines = log.read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if '"event": "train"' in line)
    lines[place] = re.sub(r'("train_loss": )[\d.]+', rf"\g<1>{loss}", lines[place])
    log.write_text("".join(lines))
    run = runs.read_run(log)
    assert len(runs.finite_losses(run)) == len(run.losses) - 1
    runs.plot([run], tmp_path / "curves.png")
    log.write_text("".join(re.sub(r'("train_loss": )[\d.]+', rf"\g<1>{loss}", x) for x in lines))
    with pytest.raises(UserError, match="no run has a training loss to draw"):
        runs.plot([runs.read_run(log)], tmp_path / "curves.png")


@pytest.mark.parametrize("count", [1, runs.MOST_NAMES, runs.MOST_NAMES + 1])
def test_the_names_of_many_runs_do_not_cover_their_curves(tmp_path, monkeypatch, count):
    """As of all that lie in logs/: a legend longer than the picture left curves no room."""
    pytest.importorskip("matplotlib")
    run = runs.read_run(write_log(tmp_path / "a.jsonl", 1.2))
    figures = []
    monkeypatch.setattr(runs, "write_picture", lambda out, figure: figures.append(figure))
    runs.plot([run] * count, tmp_path / "curves.png")
    figures[0].draw_without_rendering()  # which warns where there is no room
    legend = figures[0].axes[0].get_legend()
    assert (legend is not None) == (count <= runs.MOST_NAMES)
    if legend:
        assert legend.get_window_extent().ymin > 0


def test_a_mean_covers_its_neighbours_evenly():
    line = [float(i) for i in range(50)]
    assert runs.smoothed(line) == line
    spike = [0.0] * 20
    spike[10] = 9.0
    assert runs.smoothed(spike)[5:16] == [0.0] + [1.0] * 9 + [0.0]


def test_a_line_that_was_cut_off_hides_no_run(tmp_path):
    """As a full disk leaves it, or a machine that went down; the run then went on behind it."""
    log = write_log(tmp_path / "a.jsonl", 1.2)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:20], lines[20][:30] + "\n", *lines[21:]]) + '{"event": "fin')
    (run,) = [runs.read_run(path) for path in runs.find_logs([tmp_path])]
    assert run.figures["final"] == 1.2
    assert [record["step"] for record in run.losses] == [n for n in range(1, 51) if n != 20]
    log.write_text("".join(lines) + "other text\n")
    assert runs.read_first(log) == ""


@pytest.mark.parametrize("value", ["x", None, [], {}, True], ids=repr)
def test_what_is_no_figure_is_left_out(tmp_path, value):
    log = write_log(tmp_path / "a.jsonl", 1.2)
    counts = {"event": "validation_data", "scored_tokens": value, "bytes": value}
    final = {"event": "final", "val_bpb": value}
    records = [*log.read_text().splitlines()[:-1], *map(json.dumps, (counts, final))]
    log.write_text("\n".join(records))
    run = runs.read_run(log)
    header, row = runs.table([run], [])
    assert dict(zip(header, row, strict=True))["final"] == ""
    assert runs.scored_text(run).endswith("not counted in the log")
    loss = {"event": "train", "step": 51, "train_loss": value, "train_ms": 1.0}
    log.write_text("\n".join([*records, json.dumps(loss)]))
    with pytest.raises(UserError, match="is not a run's .jsonl log"):
        runs.read_run(log)


def test_runs_that_diverged_come_last(tmp_path):
    """NaN is neither above nor below a number: it left the others in any order."""
    scores = {"c": 1.3, "x": float("nan"), "a": 1.2, "y": float("inf"), "b": 1.1}
    read = [runs.read_run(write_log(tmp_path / f"{name}.jsonl", scores[name])) for name in scores]
    assert [run.name for run in runs.sorted_runs(read, "final")] == ["b", "a", "c", "x", "y"]
    cells = [row[runs.FIGURES.index("final") + 1] for row in runs.table(read, [])[1:]]
    assert cells == ["1.3000", "nan", "1.2000", "inf", "1.1000"]


@pytest.mark.parametrize("problem", ["empty folder", "no log", "unknown column", "missing"])
def test_mistakes_end_in_one_line(tmp_path, problem):
    log = tmp_path / "a.jsonl"
    arguments = [log]
    if problem == "empty folder":
        arguments = [tmp_path]
    elif problem == "no log":
        log.write_text("hello\n")
    elif problem == "unknown column":
        write_log(log, 1.2)
        arguments += ["--sort", "beauty"]
    done = start(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("runs.py: error: ")
    assert done.stderr.count("\n") == 1


def test_committed_logs_are_read():
    """Logs of scripts of several weeks, those of runs that were only scored among them."""
    found = [runs.read_run(path) for path in runs.find_logs([ROOT / "logs"])]
    assert len(found) > 20
    assert any(run.name.endswith("(scored again)") for run in found)
    assert all(run.state for run in found)


def test_a_run_that_was_resumed_has_the_losses_of_all_its_starts_each_step_once(tmp_path):
    log = write_log(tmp_path / "a.jsonl", steps=20)
    first = log.read_text().splitlines()
    resumed = json.dumps({"event": "resumed", "step": 15, "clock": 0.6, "starts": 2})
    again = write_log(tmp_path / "a.jsonl", 1.3, steps=40).read_text().splitlines()
    log.write_text("\n".join([*first, again[0], resumed, *again[16:]]) + "\n")
    assert [loss["step"] for loss in runs.read_run(log).losses] == list(range(1, 41))


def test_a_short_runs_losses_are_drawn_as_they_are():
    """A mean over most of a short run would be a straight line."""
    losses = [5.0, 3.0, 4.0, 2.0, 2.5, 1.0, 2.0]
    assert runs.smoothed(losses) == losses


def test_the_longer_run_keeps_the_settings_that_the_run_was_given():
    """Else it would be another model."""
    settings = {"run_id": "a", "log_dir": "logs", "mlp_mult": 4, "matrix_lr": 0.1, "seed": 1}
    settings["eval_nll_path"] = "a.npy"  # which the longer run would write over
    started = {"settings": settings, "given": ["mlp_mult", "eval_nll_path"]}
    command = longer_command(started)
    assert command.startswith("RUN_ID=a-longer LOG_DIR=logs MLP_MULT=4 MAX_WALLCLOCK_SECONDS=600 ")
    assert not any(name in command for name in ("MATRIX_LR", "SEED", "EVAL_NLL_PATH"))


def test_each_text_has_a_table_and_many_settings_share_a_column(tmp_path):
    """A score of another text stands apart, though it is lower."""
    many = {f"setting_{number}": "x" * 30 for number in range(9)}
    write_log(tmp_path / "a.jsonl", 1.2, data_path="one", **many)
    write_log(tmp_path / "b.jsonl", 1.3, data_path="one", **dict.fromkeys(many, "y"))
    write_log(tmp_path / "c.jsonl", 0.9, data_path="two")
    lines = start(tmp_path).stdout.splitlines()
    assert "cannot be compared" in lines[0]
    assert [line.split(",")[0] for line in lines if "Scored text" in line] == [
        "Scored text: DATA_PATH=two",
        "Scored text: DATA_PATH=one",
    ]
    assert lines[-3].endswith("SETTING_3                       others")
    assert lines[-2].endswith("…") and "SETTING_4=xxx" in lines[-2]

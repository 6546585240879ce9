"""train_gpt.py --rehearse: on two CPU ranks, and what it finds before a run is paid for."""

import re
import subprocess
import sys

import pytest

import train_gpt as t
from tests.support import (
    PATIENCE,
    SCRIPT,
    mistake,
    process_environment,
    run_environment,
    run_here,
    tiny,
    torchrun,
)
from tools import hand_over, rehearse

FINE = rehearse.Needs(30.0, 12.0, 45.0, 3.0, 100.0, 200.0, 30 * 10**9, 10**9)


def rehearsal_environment(shards, folder, **changes) -> dict[str, str]:
    """A run by the clock, which the rehearsal's 20 steps are a part of."""
    clock = {"max_wallclock_seconds": 600.0, "export_reserve_seconds": 60.0, "iterations": 4000}
    names = {"run_id": None, "train_log_every": None, "recur_start": 0.5, "layer_order": "0-2,1,2"}
    return run_environment(shards, folder, **(clock | names | changes))


def test_two_ranks_rehearse_all_of_a_run(shards, tmp_path):
    """Training, a stop, going on from a checkpoint, export, scores and adapting; nothing stays.

    Started as the script starts it, which the test below shows.
    """
    done = subprocess.run(
        torchrun("--nproc_per_node=2", hand_over.__file__, "--rehearse", str(SCRIPT)),
        env=process_environment(rehearsal_environment(shards, tmp_path)),
        capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert "hardware=2 × CPU" in said
    assert re.search(r"^resumed \S+/rehearsal.checkpoint: step 10, ", said, re.MULTILINE)
    assert "ITERATIONS" not in said.split("settings given: ")[1].splitlines()[0]
    assert re.search(r"^the rehearsal alone has .*ITERATIONS=20 ", said, re.MULTILINE)
    assert "step:10/20 " in said.split("resumed")[0]
    assert "step:20/20 " in said.split("resumed")[1]
    last = said.split("the rehearsal went well; the run needs\n")[1].splitlines()
    assert [line.split(":")[0].strip() for line in last] == [
        "start", "steps", "clock", "export", "evaluation", "memory", "disk", "in all", "artifact"
    ]  # fmt: skip
    step_ms = float(re.search(r"steps: ([\d.]+) ms each", said)[1])
    steps = int(re.search(r"clock: ([\d,]+) steps", said)[1].replace(",", ""))
    assert steps == pytest.approx(min(4000, 540_000 / step_ms), rel=0.02)
    assert " at k=5.00, " in last[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_script_starts_it(monkeypatch):
    """With the process that it is, so that a rank stays one."""
    started = []
    monkeypatch.setattr("os.execv", lambda *arguments: started.extend(arguments))
    assert run_here(monkeypatch, {}, "--rehearse") == 0
    command = [sys.executable, hand_over.__file__, "--rehearse", str(SCRIPT)]
    assert started == [sys.executable, command]


def test_a_fault_behind_training_is_found_and_leaves_nothing(
    monkeypatch, capsys, shards, tmp_path, signal_handlers
):
    """As of a run, in one line."""

    def export(*_):
        raise t.UserError("GPTQ would have failed")

    monkeypatch.setattr(t, "export", export)
    monkeypatch.setattr(t, "main", rehearse.rehearse)
    environment = rehearsal_environment(shards, tmp_path)
    said = mistake(monkeypatch, capsys, environment)
    assert "GPTQ would have failed" in said
    assert list(tmp_path.iterdir()) == []
    assert t.Batches is not rehearse.StoppingBatches


def test_the_rehearsal_has_the_runs_settings_but_for_its_length(tmp_path):
    settings = tiny(sdclip_k=5.0, eval_nll_path="x.npy", val_loss_every=7, artifact="elsewhere")
    short = rehearse.in_small(settings, str(tmp_path))
    changed = {name for name in t.FIELDS if getattr(short, name) != getattr(settings, name)}
    assert changed == {
        "log_dir", "artifact", "eval_nll_path", "iterations", "train_log_every", "val_loss_every",
        "sdclip_k", "sdclip_most",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"export_seconds": 9.0}, "EXPORT_RESERVE_SECONDS"),
        ({"scoring_seconds": 601.0}, "EVAL_MAX_SECONDS"),
        ({"adapting_seconds": 9999.0}, None),  # test-time training then gives epochs up
        ({"disk_bytes": 10**12}, "disk space in LOG_DIR"),
    ],
    ids=str,
)
def test_what_the_run_lacks_is_a_problem(changes, problem):
    settings = t.Settings(eval_mode="sliding")
    found = FINE._replace(**changes).problems(settings, free=10**11)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"adapting_seconds": 500.0}, None),
        ({"adapting_seconds": 541.0}, "documents need over 0.9 EVAL_MAX_SECONDS to adapt"),
        ({"scoring_seconds": 601.0}, "raise TTT_LORA_PIECE"),
    ],
    ids=str,
)
def test_documents_that_the_clock_would_leave_frozen_are_a_problem(changes, problem):
    settings = t.Settings(eval_mode="documents")
    needs = FINE._replace(**({"scoring_seconds": 0.0, "adapting_seconds": 0.0} | changes))
    found = needs.problems(settings, free=10**11)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_without_a_clock_an_export_may_take_its_time():
    slow = FINE._replace(export_seconds=99.0)
    assert slow.problems(t.Settings(max_wallclock_seconds=0.0), free=10**11) == []
    lines = FINE.describe(t.Settings(max_wallclock_seconds=0.0, iterations=10_000), 10**11, 10**11)
    parts = "30 s to start, 453 of training and GPTQ, "
    parts += "3 × 100 to score before and after quantization and in the end, 200 to adapt"
    assert lines[-1] == f"in all: about 16.4 minutes ({parts})"
    plain = {"eval_mode": "plain", "ttt_enabled": False, "max_wallclock_seconds": 0.0}
    once = FINE.describe(t.Settings(**plain, iterations=10_000), 10**11, 10**11)
    assert "2 × 100 to score before and after quantization, 200 to adapt" in once[-1]
    ends_early = FINE.describe(t.Settings(iterations=1000), 10**11, 10**11)  # before its clock
    assert "30 s to start, 48 of training and GPTQ, " in ends_early[-1]
    by_the_clock = FINE.describe(t.Settings(), 10**11, 10**11)
    assert "30 s to start, 600 of training and GPTQ, " in by_the_clock[-1]


def test_an_evaluation_alone_is_not_rehearsed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(t, "main", rehearse.rehearse)
    environment = {"EVAL_ONLY": "1", "PRESET": "tiny", "LOG_DIR": str(tmp_path / "logs")}
    assert "unset EVAL_ONLY" in mistake(monkeypatch, capsys, environment)
    assert list(tmp_path.iterdir()) == []

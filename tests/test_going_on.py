"""Going on after training: an evaluation that was interrupted starts over from the artifact, a run
that is finished is not written over.
"""

import contextlib
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import train_gpt as t
from tests import forked
from tests.support import (
    PATIENCE,
    SCRIPT,
    SOLO,
    mistake,
    process_environment,
    run_environment,
    run_here,
    torchrun,
)
from tools import contradictions, logs
from tools.report.sections import whole_time
from tools.runs import read_run

# The last step's checkpoint alone, so that what would be trained again is counted.
QUICK = {"checkpoint_every": 0, "eval_mode": "plain", "ttt_enabled": False}
QUICK |= {"calibration_tokens": 64, "iterations": 4}


def environment_of(shards: Path, folder: Path, **changes) -> dict[str, str]:
    return run_environment(shards, folder, **(QUICK | changes))


class Killed(Exception):
    """Stands for the end of a process."""


def kill_in(phase: str, environment: dict[str, str]):
    """A run ends at once when it comes to its "final" score, or to the one "after quantization"."""
    evaluate = t.Evaluator.evaluate

    def die(*arguments):
        raise Killed

    def die_if_final(evaluator, started=None, *more):
        return evaluate(evaluator) if started is None else die()

    with pytest.MonkeyPatch.context() as patch:
        if phase == "final":
            patch.setattr(t.Evaluator, "evaluate", die_if_final)
        else:
            patch.setattr(t, "load_model", die)
        with pytest.raises(Killed):
            run_here(patch, environment)


@contextlib.contextmanager
def nothing_is_trained():
    def fail(*arguments):
        raise AssertionError("it trains")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "accumulate_gradients", fail)
        patch.setattr(t, "export", fail)
        yield


def records(folder: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    return [record for record in lines if record["event"] == event]


def counts(folder: Path, *events: str) -> list[int]:
    return [len(records(folder, event)) for event in events]


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, environment_of(shards, folder)) == 0
    return folder


# ---- An interrupted evaluation -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "phase", "attempts"),
    [
        ("plain", "final", [1, 2, 3]),
        ("plain", "after quantization", [1, 2]),  # the same
        ("sliding", "final", [1, 2, 3]),
        ("sliding", "after quantization", [1]),
    ],
)
def test_an_interrupted_evaluation_starts_over_and_nothing_is_trained(
    monkeypatch, shards, tmp_path, undisturbed, mode, phase, attempts
):
    """Without a checkpoint, too; and its logs are those of one run, of one mind."""
    environment = environment_of(shards, tmp_path, eval_mode=mode)
    kill_in(phase, environment)
    artifact = tmp_path / "a.int6.lzma"
    written = artifact.stat().st_mtime_ns
    for path in tmp_path.glob("*.checkpoint*"):
        path.unlink()
    with nothing_is_trained():
        if phase == "final":
            kill_in(phase, environment)
        assert run_here(monkeypatch, environment) == 0
    assert artifact.stat().st_mtime_ns == written
    assert artifact.read_bytes() == (undisturbed / "a.int6.lzma").read_bytes()
    assert [record["attempt"] for record in records(tmp_path, "evaluation")] == attempts
    assert counts(tmp_path, "ready", "trained", "after_quantization", "final") == [1, 1, 1, 1]
    plain = "final" if mode == "plain" else "after_quantization"
    (score,) = records(undisturbed, "final")
    assert records(tmp_path, plain)[0]["val_loss"] == score["val_loss"]
    events = logs.finished_run(tmp_path / "a.jsonl")
    assert events["trained"]["steps"] == 4
    both = contradictions.read_logs(tmp_path / "a.txt")
    assert contradictions.contradictions(both, artifact) == []
    assert contradictions.unprinted(both) == []
    assert logs.attempts_at_evaluation(both.records) == len(attempts)
    assert 0 <= logs.seconds_to_score(both.records) < 60
    assert not both.earlier


@pytest.mark.parametrize(("adapting", "scores"), [(False, 2), (True, 3)])
def test_a_final_score_in_plain_windows_is_made_once_and_told_as_both(
    monkeypatch, shards, tmp_path, adapting, scores
):
    """It is the one after quantization, unless the weights adapt."""
    evaluate, made = t.Evaluator.evaluate, []

    def counted(evaluator, started=None):
        made.append(evaluator.settings.adapts)
        return evaluate(evaluator, started)

    monkeypatch.setattr(t.Evaluator, "evaluate", counted)
    changes = {"ttt_enabled": adapting, "eval_nll_path": str(tmp_path / "nats.npy")}
    assert run_here(monkeypatch, environment_of(shards, tmp_path, **changes)) == 0
    assert (len(made), made[-1]) == (scores, adapting)
    events = logs.finished_run(tmp_path / "a.jsonl")
    first, last = events["after_quantization"], events["final"]
    same = all(first[name] == last[name] for name in ("val_loss", "val_bpb", "evaluation_seconds"))
    assert same == (not adapting)
    tables = [events[f"{event}_profile"]["window_position"] for event in (first["event"], "final")]
    assert (tables[0] == tables[1]) == same
    nats = np.load(tmp_path / "nats.npy")
    assert nats.mean(dtype=np.float64) == pytest.approx(last["val_loss"], abs=1e-7)
    both = contradictions.read_logs(tmp_path / "a.txt")
    assert contradictions.contradictions(both, tmp_path / "a.int6.lzma") == []
    assert contradictions.unprinted(both) == []
    told = str(whole_time(read_run(tmp_path / "a.jsonl")))
    assert ("score after quantization" in told) == adapting
    assert "-" not in re.sub(r"<[^>]*>", "", told)  # no phase of less than no time


def test_a_late_score_in_plain_windows_is_told_once_too(monkeypatch, capsys, shards, tmp_path):
    """As the one after quantization, which no clock ends; EVAL_ONLY=1 tells of the final one."""
    late = environment_of(shards, tmp_path, eval_max_seconds=1e-6)
    assert "no score in EVAL_MAX_SECONDS" in mistake(monkeypatch, capsys, late)
    assert counts(tmp_path, "after_quantization", "final") == [1, 0]
    with nothing_is_trained():
        assert run_here(monkeypatch, environment_of(shards, tmp_path)) == 0
    assert counts(tmp_path, "after_quantization", "final") == [1, 1]
    again = score_again(monkeypatch, tmp_path, RUN_ID="a")
    assert "after_quantization" not in again
    assert again["final"]["val_loss"] == records(tmp_path, "final")[0]["val_loss"]


def test_an_evaluation_that_was_too_long_is_tried_in_another_mode(
    monkeypatch, capsys, shards, tmp_path
):
    settings = {"eval_mode": "sliding", "eval_max_seconds": 1e-6}
    said = mistake(monkeypatch, capsys, environment_of(shards, tmp_path, **settings))
    assert "no score in EVAL_MAX_SECONDS" in said
    with nothing_is_trained():
        assert run_here(monkeypatch, environment_of(shards, tmp_path)) == 0
    assert [record["attempt"] for record in records(tmp_path, "evaluation")] == [1, 2]
    events = logs.last_run(tmp_path / "a.jsonl")
    assert events["settings"]["settings"]["eval_mode"] == "plain"


@pytest.mark.parametrize("left", [b"", b"another run's"], ids=["none", "another"])
def test_without_the_artifact_of_the_log_export_is_repeated_from_the_checkpoint(
    monkeypatch, capsys, shards, tmp_path, undisturbed, left
):
    environment = environment_of(shards, tmp_path)
    kill_in("final", environment)
    artifact = tmp_path / "a.int6.lzma"
    artifact.write_bytes(left)
    if left:  # whose it is, nobody knows
        said = mistake(monkeypatch, capsys, environment)
        assert f"{artifact} is there already, and not by {tmp_path / 'a.jsonl'}: move it" in said
        assert artifact.read_bytes() == left
        artifact.unlink()
    assert run_here(monkeypatch, environment) == 0
    assert "resumed" in capsys.readouterr().out
    assert counts(tmp_path, "ready", "trained", "evaluation", "final") == [2, 2, 2, 1]
    assert artifact.read_bytes() == (undisturbed / "a.int6.lzma").read_bytes()


def test_other_settings_of_training_are_refused_as_a_checkpoints_are(
    monkeypatch, capsys, shards, tmp_path
):
    """RESUME=never trains with them."""
    kill_in("final", environment_of(shards, tmp_path))
    other = environment_of(shards, tmp_path, matrix_lr=0.03)
    said = mistake(monkeypatch, capsys, other)
    assert "MATRIX_LR=0.02, not 0.03; RESUME=never starts anew" in said
    assert run_here(monkeypatch, other | {"RESUME": "never"}) == 0
    assert counts(tmp_path, "ready", "evaluation_again", "final") == [2, 0, 1]


KILL_IN_EVALUATION_ONCE = """
import os, signal, sys
from pathlib import Path
import train_gpt as t
mark, evaluate = Path(sys.argv.pop(1)), t.Evaluator.evaluate
def kill_once(evaluator, started=None, *more):
    if started is not None and evaluator.ranks.rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(evaluator, started, *more)
t.Evaluator.evaluate = kill_once
sys.exit(t.run())
"""


def test_torchrun_restarts_a_killed_rank_and_the_evaluation_starts_over(shards, tmp_path):
    (tmp_path / "kill.py").write_text(KILL_IN_EVALUATION_ONCE)
    launch = ["--nproc_per_node=2", "--max-restarts=1"]
    launch += [str(tmp_path / "kill.py"), str(tmp_path / "mark")]
    environment = environment_of(shards, tmp_path, warmup_steps=0)
    done = forked.run(
        torchrun(*launch),
        env=process_environment(environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=SCRIPT.parent,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mark").exists()
    assert counts(tmp_path, "ready", "evaluation_again", "final") == [1, 1, 1]
    assert [record["attempt"] for record in records(tmp_path, "evaluation")] == [1, 2]


def test_a_signal_in_evaluation_says_how_to_go_on(monkeypatch, capsys, shards, tmp_path):
    environment = environment_of(shards, tmp_path)
    evaluate = t.Evaluator.evaluate

    def signalled(evaluator, started=None, *more):
        if started is not None:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(evaluator, started, *more)

    with monkeypatch.context() as patch:
        patch.setattr(t.Evaluator, "evaluate", signalled)
        said = mistake(patch, capsys, environment)
    assert "stopped by SIGTERM; RUN_ID=a goes on from its artifact\n" in said
    with nothing_is_trained():
        assert run_here(monkeypatch, environment) == 0


def test_a_signal_in_an_evaluation_under_overwrite_says_what_leads_on(
    monkeypatch, capsys, shards, tmp_path
):
    """With OVERWRITE=1 the same command trains anew, and so it does not go on from anything."""
    environment = environment_of(shards, tmp_path)
    again = environment | {"OVERWRITE": "1", "SEED": "7"}
    assert run_here(monkeypatch, environment) == 0

    def signalled(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:  # the earlier run's artifact and score are not its own
        patch.setattr(t.Trainer, "warm_up", signalled)
        said = mistake(patch, capsys, again)
    assert "; RUN_ID=a goes on from the start: nothing that it trained is kept\n" in said
    with monkeypatch.context() as patch:
        patch.setattr(t, "evaluate_artifact", signalled)
        said = mistake(patch, capsys, again)
    assert "; without OVERWRITE=1, RUN_ID=a goes on from its artifact\n" in said
    with nothing_is_trained():
        assert run_here(monkeypatch, environment | {"SEED": "7"}) == 0


def test_a_signal_under_resume_never_says_without_what_its_checkpoint_is_taken_up(
    monkeypatch, capsys, shards, tmp_path
):
    never = environment_of(shards, tmp_path, resume="never")
    export = t.export

    def signalled(*_):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(t, "export", signalled)
        said = mistake(patch, capsys, never)
    told = "; without RESUME=never, RUN_ID=a goes on from the last checkpoint\n"
    assert told in said
    assert t.export is export
    del never["RESUME"]
    assert run_here(monkeypatch, never) == 0
    assert "resumed" in capsys.readouterr().out


# ---- A finished run ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"OVERWRITE": "1"}], ids=str)
def test_a_signal_behind_the_score_says_that_the_run_is_finished(
    monkeypatch, capsys, shards, tmp_path, changes
):
    """It said that the run goes on from its artifact."""
    report = t.report

    def signalled(log, event, *arguments, **more):
        report(log, event, *arguments, **more)
        if event == "final":
            signal.raise_signal(signal.SIGTERM)

    environment = environment_of(shards, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(t, "report", signalled)
        said = mistake(patch, capsys, environment | changes)
    told = f"EVAL_ONLY=1 RUN_ID=a scores it again: the run is finished, {tmp_path}/a.jsonl has its"
    assert f"stopped by SIGTERM; {told} score\n" in said
    assert f"RUN_ID=a is finished, {tmp_path}/a.jsonl has" in mistake(
        monkeypatch, capsys, environment
    )


def test_a_finished_run_is_not_written_over_unless_it_is_said(
    monkeypatch, capsys, shards, tmp_path
):
    """And then is trained anew, whatever checkpoint a process left that was killed at its end."""
    environment = environment_of(shards, tmp_path)
    checkpoint = tmp_path / "a.checkpoint"
    finish = t.report

    def keep(log, event, *more, **values):
        if event == "final":
            kept.append(checkpoint.read_bytes())
        finish(log, event, *more, **values)

    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(t, "report", keep)
        assert run_here(patch, environment) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for more in ({}, {"RESUME": "never"}, {"MATRIX_LR": "0.03"}):
        said = mistake(monkeypatch, capsys, environment | more)
        assert "RUN_ID=a is finished" in said
        assert "OVERWRITE=1" in said
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    checkpoint.write_bytes(kept[0])  # by a process that was killed at its end
    assert "RUN_ID=a is finished" in mistake(monkeypatch, capsys, environment)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run_here(monkeypatch, environment | {"EVAL_ONLY": "1"}) == 0
    checkpoint.write_bytes(kept[0])
    capsys.readouterr()
    assert run_here(monkeypatch, environment | {"OVERWRITE": "1", "SEED": "7"}) == 0
    assert "resumed" not in capsys.readouterr().out
    assert counts(tmp_path, "ready", "final") == [2, 2]
    assert (tmp_path / "a.int6.lzma").read_bytes() != before[tmp_path / "a.int6.lzma"]


def test_an_older_runs_score_and_artifact_do_not_end_a_newer_one(
    monkeypatch, capsys, shards, tmp_path
):
    """Of one name: the newer one, killed while it trains, is trained to its end."""
    environment = environment_of(shards, tmp_path)
    assert run_here(monkeypatch, environment) == 0
    with monkeypatch.context() as patch:
        patch.setattr(t, "export", t.Evaluator)  # anything that fails
        with pytest.raises(TypeError):
            run_here(patch, environment | {"OVERWRITE": "1"})
    capsys.readouterr()
    assert run_here(monkeypatch, environment) == 0
    assert "resumed" in capsys.readouterr().out
    assert counts(tmp_path, "ready", "evaluation_again", "final") == [3, 0, 2]


@pytest.mark.parametrize("way", ["named", "linked", "log lost", "log cut"])
def test_an_artifact_that_is_no_start_of_this_runs_own_is_not_written_over(
    monkeypatch, capsys, shards, tmp_path, scored, way
):
    """Under whatever name it is reached, and whatever became of its log."""
    artifact = tmp_path / "base.int6.lzma"
    artifact.write_bytes((scored / "a.int6.lzma").read_bytes())
    before = artifact.read_bytes()
    environment = environment_of(shards, tmp_path, run_id="other", iterations=2, warmup_steps=0)
    environment["ARTIFACT"] = str(artifact)
    log = (scored / "a.jsonl").read_text()
    if way == "linked":
        link = tmp_path / "link"
        link.symlink_to(artifact)
        environment["ARTIFACT"] = str(link)
        assert t.read_settings(environment)[0].artifact_path == artifact
    elif way != "named":
        environment |= {"RUN_ID": "base", "ARTIFACT": ""}
    if way == "log cut":
        (tmp_path / "base.jsonl").write_text(log[: log.index('{"event": "packed"')])
    with nothing_is_trained():
        said = mistake(monkeypatch, capsys, environment)
    assert f"{artifact} is there already, and not by" in said
    assert artifact.read_bytes() == before
    if way == "linked":
        assert run_here(monkeypatch, environment | {"OVERWRITE": "1"}) == 0
        assert artifact.read_bytes() != before
        assert link.is_symlink()


def test_an_artifact_whose_run_was_killed_before_it_said_so_is_its_own(
    monkeypatch, shards, tmp_path
):
    """The log has its SHA-256 before the file is there; a later start's log does not hide that."""
    environment = environment_of(shards, tmp_path)
    write = t.write_whole

    def killed(path, *parts, **more):
        write(path, *parts, **more)
        if path.suffix == ".lzma":
            raise Killed

    def die(*arguments):
        raise Killed

    for owner, name, stop in ((t, "write_whole", killed), (t, "export", die)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, stop)
            run_here(patch, environment)
    assert (tmp_path / "a.int6.lzma").exists()
    assert run_here(monkeypatch, environment) == 0
    assert counts(tmp_path, "ready", "packed", "trained", "final") == [3, 2, 1, 1]


def test_overwrite_trains_anew_what_has_no_score_yet(monkeypatch, shards, tmp_path):
    """But not again where torchrun restarts it."""
    environment = environment_of(shards, tmp_path)
    kill_in("final", environment)
    restart = environment | {"OVERWRITE": "1", "TORCHELASTIC_RESTART_COUNT": "1"}
    with nothing_is_trained():
        kill_in("final", restart)
    assert run_here(monkeypatch, environment | {"OVERWRITE": "1", "SEED": "7"}) == 0
    assert counts(tmp_path, "ready", "trained", "resumed", "final") == [2, 2, 0, 1]


def test_an_evaluation_does_not_go_on_over_another_text(monkeypatch, capsys, shards, tmp_path):
    environment = environment_of(shards, tmp_path)
    kill_in("final", environment)
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    here = environment | {"DATA_PATH": str(other)}
    (validation,) = other.glob("*_val_*.bin")
    data = validation.read_bytes()
    validation.write_bytes(data[:-2] + data[-4:-2])  # as many tokens, but the last one
    said = mistake(monkeypatch, capsys, here)
    assert f"DATA_PATH={other} has another validation text than the run began with" in said
    validation.write_bytes(data)
    assert run_here(monkeypatch, here) == 0  # the same text elsewhere


def test_a_log_that_was_cut_off_or_is_none_says_nothing_of_a_run(tmp_path):
    path = tmp_path / "a.jsonl"
    assert t.last_records(path) == {}
    start = [{"event": "settings"}, {"event": "ready"}, {"event": "trained"}]
    expected = {record["event"]: record for record in start}
    lines = [json.dumps(record) for record in ({"event": "final"}, *start)]
    path.write_text("\n".join([*lines, "[1]", '"event"', '{"event": "fin']))
    assert t.last_records(path) == expected
    path.write_text("\n".join(lines[:2]))
    assert t.last_records(path) == {}
    odd = [json.dumps({"event": event}) for event in ([1], {}, None, 1)]
    path.write_text("\n".join([*lines, *odd]))
    assert t.last_records(path) == expected


def test_a_log_goes_on_behind_a_half_line_in_a_line_of_its_own(tmp_path):
    """A machine that went down left it, or a disk that was full: of the record, and of the text."""
    settings = t.Settings(log_dir=str(tmp_path), run_id="a")
    (tmp_path / "a.txt").write_text("step:1/2 train_lo")
    (tmp_path / "a.jsonl").write_text('{"event": "train", "st')
    with contextlib.closing(t.Log()) as log:
        log.open(settings, SOLO, "a")
        assert (tmp_path / "a.txt").read_text() == "step:1/2 train_lo"  # it may be refused yet
        log("begun", "settings")
        log.begin()
    assert [record["event"] for record in t.read_records(tmp_path / "a.jsonl")] == ["settings"]
    half, text = (tmp_path / "a.txt").read_text().split("\n", 1)
    assert half == "step:1/2 train_lo"
    assert text.startswith('"""Parameter Golf')
    assert text.endswith("\nbegun\n")


def test_a_record_of_which_a_disk_takes_a_part_at_a_time_is_whole(tmp_path):
    """A file without a buffer says how much it took, and raises nothing."""
    with contextlib.closing(t.Log()) as log:
        log.open(t.Settings(log_dir=str(tmp_path), run_id="a"), SOLO, "a")
        log.begin()
        log.said = [NearlyFull(file) for file in log.files]
        log("a line of some length", "event of some length")
    (record,) = t.read_records(tmp_path / "a.jsonl")
    assert record["event"] == "event of some length"
    assert (tmp_path / "a.txt").read_text().endswith("\na line of some length\n")


class NearlyFull:
    """A file that takes seven bytes at once."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        return self.file.write(data[:7])


@pytest.mark.parametrize("odd", [None, [], "x", 1], ids=repr)
@pytest.mark.parametrize("find", [t.find_unscored, t.find_settings], ids=["train", "score"])
def test_a_start_whose_settings_are_none_is_told_in_a_line(tmp_path, find, odd):
    settings = t.Settings(log_dir=str(tmp_path), run_id="a")
    (tmp_path / "a.int6.lzma").write_bytes(b"x")
    trained = {"event": "trained", "artifact_sha256": t.file_sha256(settings.artifact_path)}
    first = {"event": "settings", "settings": odd}
    records = [first, {"event": "ready"}, trained]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(t.UserError, match=r"a\.jsonl is damaged, its settings are none"):
        find(settings)
    del first["settings"]  # as an older script left them out
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    find(settings)


# ---- Scoring alone -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(shards, tmp_path_factory) -> Path:
    """The folder of a run whose evaluation is not its preset's: sliding, with small chunks."""
    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        environment = environment_of(shards, folder, eval_mode="sliding", ttt_enabled=True)
        assert run_here(patch, environment) == 0
    return folder


def score_again(monkeypatch, folder: Path, **settings) -> dict[str, dict]:
    """The records of a run's artifact scored with nothing given but these."""
    environment = {"EVAL_ONLY": "1", "DEVICE": "cpu", "LOG_DIR": str(folder)} | settings
    assert run_here(monkeypatch, environment) == 0
    return logs.last_run(folder / f"{settings['RUN_ID']}.eval.jsonl")


def test_a_run_is_scored_again_with_its_own_settings(monkeypatch, capsys, scored):
    """Its preset, data, windows and chunks; to the last digit."""
    events = score_again(monkeypatch, scored, RUN_ID="a")
    then = logs.last_run(scored / "a.jsonl")
    for name in ("val_loss", "val_bpb"):
        assert events["final"][name] == then["final"][name]
    assert f"settings from {scored / 'a.jsonl'}\n" in capsys.readouterr().out
    ours, theirs = (x["settings"]["settings"] for x in (events, then))
    assert all(ours[name] == theirs[name] for name in t.SCORED_WITH)
    assert {"preset", "data_path", "eval_stride", "seed", "mamba_d_state"} <= {*t.SCORED_WITH}
    assert events["settings"]["given"] == ["device", "eval_only", "log_dir", "run_id"]


def test_what_is_given_goes_before_the_runs_settings_and_is_told(monkeypatch, capsys, scored):
    given = {"EVAL_MODE": "plain", "TTT_ENABLED": "0", "VAL_BATCH_SIZE": "128"}
    events = score_again(monkeypatch, scored, RUN_ID="a", **given)
    told = "a.jsonl; but EVAL_MODE=plain (there sliding) TTT_ENABLED=0 (there 1)\n"
    assert told in capsys.readouterr().out
    then = logs.last_run(scored / "a.jsonl")["after_quantization"]
    assert events["final"]["val_loss"] == then["val_loss"]
    with monkeypatch.context() as patch:
        only = {"EVAL_ONLY": "1", "DEVICE": "cpu", "LOG_DIR": str(scored), "RUN_ID": "a"}
        said = mistake(patch, capsys, only | {"MODEL_DIM": "64"})
        assert "MODEL_DIM=64 contradicts the artifact, which has 32: unset it" in said
        said = mistake(patch, capsys, only | {"PRESET": "short"})
        assert f"PRESET=short contradicts {scored / 'a.jsonl'}, which has tiny: unset it" in said


def edited_log(scored: Path, folder: Path, *changes: tuple[str, str]) -> dict[str, str]:
    """What scores a copy of the artifact again by a copy of its log in which texts are changed."""
    text = (scored / "a.jsonl").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "a.jsonl").write_text(text)
    (folder / "a.int6.lzma").write_bytes((scored / "a.int6.lzma").read_bytes())
    return {"EVAL_ONLY": "1", "DEVICE": "cpu", "LOG_DIR": str(folder), "RUN_ID": "a"}


def test_a_log_switches_off_no_check_and_no_clock(monkeypatch, capsys, scored, tmp_path):
    """A log of another script is told, with what that could be told about its evaluation and this
    one cannot; whole numbers stand for others.
    """
    lost = '"ttt_lora_alpha": 57.6, "eval_\\n": 1, "eval_temp": 1, "sdclip_mlp": 0.9'
    changes = [
        ('"eval_any_tokens": false', f'"eval_any_tokens": true, {lost}'),
        ('"ttt_lr": 0.005', '"ttt_lr": 1'),
    ]
    changes += [('"eval_max_seconds": 600.0', '"eval_max_seconds": 1e12')]
    changes += [(t.file_sha256(t.__file__), "0" * 64)]
    environment = edited_log(scored, tmp_path, *changes)
    assert run_here(monkeypatch, environment | {"ITERATIONS": "5"}) == 0
    told = "of another train_gpt.py, which had TTT_LORA_ALPHA=57.6"
    told += f" ({t.REFUSED['TTT_LORA_ALPHA'][1]}), which had 'EVAL_\\n'=1 (another version's)"
    told += "; but EVAL_MAX_SECONDS=600.0 (there 1000000000000.0)\n"
    said = f"settings from {tmp_path / 'a.jsonl'}, {told}"
    assert said in capsys.readouterr().out
    settings = logs.last_run(tmp_path / "a.eval.jsonl")["settings"]["settings"]
    assert settings["eval_any_tokens"] is False
    assert settings["ttt_lr"] == 1.0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"eval_stride": 8', '"eval_stride": [8]', '{log}: EVAL_STRIDE="[8]" should be a whole'),
        ('"ttt_epochs": 2', '"ttt_epochs": true', '{log}: TTT_EPOCHS="True" should be a whole'),
        ('"ttt_lr": 0.005', '"ttt_lr": null', '{log}: TTT_LR="None" should be a number'),
        ('"preset": "tiny"', '"preset": "x"', "{log}: this script does not know PRESET=x"),
        ('"ttt_lr": 0.005', '"ttt_lr": -1', "TTT_LR=-1.0 must be from 0 to"),
        ('"eval_stride": 8', '"eval_stride": 33', "EVAL_STRIDE=33 is longer than TRAIN_SEQ_LEN=32"),
        ('"data_path": "/', '"data_path": "/no/', "bin shards in /no/"),
    ],
)
def test_what_a_log_may_not_have_is_refused_by_name(
    monkeypatch, capsys, scored, tmp_path, old, new, said
):
    """And the log is named where what it has is no setting's value."""
    environment = edited_log(scored, tmp_path, (old, new))
    line = mistake(monkeypatch, capsys, environment)
    assert said.format(log=tmp_path / "a.jsonl") in line


def test_a_shorter_window_needs_no_other_stride_typed(scored, tmp_path):
    """The log's yields to it; what the log has is told."""
    environment = edited_log(scored, tmp_path) | {"TRAIN_SEQ_LEN": "4"}
    settings, given = t.read_settings(environment)
    settings, line = t.settings_to_score(settings, given, 1)
    assert (settings.train_seq_len, settings.eval_stride) == (4, 1)
    assert "EVAL_STRIDE=1 (there 8)" in line


@pytest.mark.parametrize("log", ["none", "of another artifact"])
def test_without_its_log_an_artifact_tells_its_preset_and_window(
    monkeypatch, capsys, scored, tmp_path, log
):
    """Older ones tell neither."""
    artifact = tmp_path / "b.int6.lzma"
    artifact.write_bytes((scored / "a.int6.lzma").read_bytes())
    if log != "none":
        sha256 = t.file_sha256(artifact)
        text = (scored / "a.jsonl").read_text().replace(sha256, sha256[::-1])
        (tmp_path / "b.jsonl").write_text(text.replace('"ttt_epochs": 2', '"ttt_epochs": 1'))
    then = logs.last_run(scored / "a.jsonl")["settings"]["settings"]
    names = "data_path tokenizer_path eval_stride val_batch_size ttt_chunk_tokens mamba_chunk_size"
    given = {name.upper(): str(then[name]) for name in names.split()} | {"ARTIFACT": str(artifact)}
    events = score_again(monkeypatch, tmp_path, RUN_ID="b", **given)
    assert events["final"]["val_loss"] == logs.last_run(scored / "a.jsonl")["final"]["val_loss"]
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("settings from")]
    assert line.endswith("b.int6.lzma; without its log, as PRESET=tiny has them")

    data = artifact.read_bytes()
    line, payload = data[len(t.ARTIFACT_MAGIC) : -t.DIGEST_BYTES].split(b"\n", 1)
    former = json.loads(line)
    del former["preset"], former["train_seq_len"]
    artifact.write_bytes(b"".join(t.seal(t.ARTIFACT_MAGIC, former, payload)))
    environment = {"EVAL_ONLY": "1", "LOG_DIR": str(tmp_path), "RUN_ID": "b"} | given
    settings, line = t.settings_to_score(*t.read_settings(environment), 1)
    assert line.endswith("as PRESET=default has them")
    assert settings.train_seq_len == 2048


def test_a_run_has_its_score_when_its_targets_nats_are_written(
    monkeypatch, capsys, shards, tmp_path
):
    """One that is killed as it writes them is evaluated again; one that cannot is scored."""
    log, nats, written, fsync = tmp_path / "a.jsonl", tmp_path / "a.npy", [], os.fsync

    def full_disk(file):
        if os.readlink(f"/proc/self/fd/{file}").endswith("a.npy.part"):
            written.append('"event": "final"' in log.read_text())
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    environment = environment_of(shards, tmp_path, eval_nll_path=nats)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        said = mistake(patch, capsys, environment)
    way = "make room, and EVAL_ONLY=1 RUN_ID=a scores it again: the run is finished, "
    assert f"cannot write {nats}: No space left on device; {way}{log} has its score\n" in said
    assert written == [False]
    assert counts(tmp_path, "target_nats", "final") == [0, 1]
    with nothing_is_trained():  # what the line says is true: the same command, and that
        assert "RUN_ID=a is finished" in mistake(monkeypatch, capsys, environment)
        assert run_here(monkeypatch, environment | {"EVAL_ONLY": "1"}) == 0
    (score,) = records(tmp_path, "final")
    assert np.load(nats).mean(dtype=np.float64) == pytest.approx(score["val_loss"], abs=1e-7)


def test_the_log_says_where_the_targets_nats_are_and_what_reads_them(
    monkeypatch, capsys, shards, tmp_path
):
    environment = environment_of(shards, tmp_path, eval_nll_path=tmp_path / "a.npy")
    assert run_here(monkeypatch, environment) == 0
    count = len(np.load(tmp_path / "a.npy"))
    lines = capsys.readouterr().out.splitlines()
    told = f"nats of {count:,} targets: {tmp_path}/a.npy; python -m tools.token_scores reads"
    assert lines[-2] == f"{told} those of plain windows"  # the score stays the last
    assert lines[-1].startswith("final_")
    (record,) = records(tmp_path, "target_nats")
    assert (record["path"], record["targets"]) == (str(tmp_path / "a.npy"), count)
    assert importlib.util.find_spec("tools.token_scores")

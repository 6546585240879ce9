"""A run started again from its logs: the same script, settings and losses; and logs that are
none.
"""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import (
    SCRIPT,
    called_here,
    process_environment,
    run_environment,
    run_here,
    subprocess_with,
)
from tools import again as again_tool
from tools.again import given_settings
from tools.logs import last_run


@pytest.fixture(scope="module")
def logs(shards, tmp_path_factory) -> Path:
    """Of a run of four steps, behind another's in the same files."""
    folder = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        settings = {"eval_mode": "plain", "ttt_enabled": False, "calibration_tokens": 64}
        settings["eval_nll_path"] = str(folder / "a 'b\" $c.npy")
        settings["train_log_every"] = 1
        for iterations in (1, 4):
            settings |= {"iterations": iterations, "overwrite": iterations == 4}
            environment = run_environment(shards, folder, **settings)
            assert run_here(patch, environment) == 0
    return folder


def again(log: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    """As a user starts it; it starts the run."""
    return subprocess.run(
        [sys.executable, "-m", "tools.again", str(log), *arguments],
        env=process_environment(settings),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=SCRIPT.parent,
    )


def losses(path: Path) -> list[float]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["train_loss"] for record in records if record["event"] == "train"]


def test_a_run_can_be_repeated_from_its_logs(logs):
    scores = logs / "a 'b\" $c.npy"
    first = scores.stat().st_mtime_ns
    done = again(logs / "a.txt")
    assert done.returncode == 0, done.stderr
    # It wrote over the first run's scores of single tokens.
    assert scores.stat().st_mtime_ns == first
    assert (logs / "a 'b\" $c-again.npy").read_bytes() == scores.read_bytes()
    assert (logs / "a-again.py").read_bytes() == SCRIPT.read_bytes()
    assert losses(logs / "a-again.jsonl") == losses(logs / "a.jsonl")[-4:]
    assert (logs / "a-again.int6.lzma").read_bytes() == (logs / "a.int6.lzma").read_bytes()


def test_the_command_is_shown_and_the_environment_goes_before(logs):
    (logs / "a-again.py").unlink(missing_ok=True)
    before = sorted(logs.iterdir())
    done = again(logs / "a.txt", "--dry-run", SEED="7", RUN_ID="b")
    assert done.returncode == 0, done.stderr
    assert sorted(logs.iterdir()) == before
    assert "nothing is written" in done.stderr
    out = done.stdout
    assert " SEED=7 " in out
    assert " RUN_ID=b " in out
    assert " ITERATIONS=4 " in out
    assert " TTT_ENABLED=0 " in out
    script = shlex.quote(str(logs / "a-again.py"))
    assert out.endswith(f" {script}\n")
    shown = "-c 'import os; print(os.environ[\"EVAL_NLL_PATH\"])'"
    shell = out.removesuffix(f"{script}\n") + shown
    assert (
        subprocess.run(shell, shell=True, capture_output=True, text=True).stdout
        == f"{logs}/a 'b\" $c-again.npy\n"
    )
    done = again(logs / "a.txt", "--dry-run", EVAL_NLL_PATH="x.npy", LOG_DIR="elsewhere")
    assert " EVAL_NLL_PATH=x.npy " in done.stdout


@pytest.mark.parametrize(("given", "kept"), [("ttt_optimizer", "sliding"), ("seed", None)])
def test_a_mode_that_another_scripts_name_took_along_is_kept(given, kept):
    """TTT_OPTIMIZER=sgd is EVAL_MODE=sliding, and what a record holds is names that were given."""
    values = {"run_id": "a", "log_dir": "logs", "seed": 7, "eval_mode": "sliding"}
    settings = given_settings({"settings": values, "given": [given]})
    assert settings.get("EVAL_MODE") == kept
    assert settings.get("SEED") == ("7" if given == "seed" else None)


def test_it_writes_beside_the_log_wherever_the_run_wrote(logs, tmp_path):
    """The folder that a log names may be another machine's; LOG_DIR names one that is meant."""
    shutil.copy(logs / "a.txt", tmp_path)
    records = (logs / "a.jsonl").read_text().replace(json.dumps(str(logs)), '"/pod/logs"')
    assert "/pod/logs" in records
    (tmp_path / "a.jsonl").write_text(records)
    for wanted, settings in ((tmp_path, {}), ("elsewhere", {"LOG_DIR": "elsewhere"})):
        out = again(tmp_path / "a.txt", "--dry-run", **settings).stdout
        assert f" LOG_DIR={wanted} " in f" {out}"
        assert "/pod/logs" not in out


def test_a_scoring_can_be_repeated_and_finds_the_artifact_of_the_run_that_trained(logs, shards):
    """What it would start runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        environment = run_environment(shards, logs, eval_only=True, eval_mode="plain")
        assert run_here(patch, environment) == 0
        started = []

        def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
            started.extend(command)
            return subprocess.CompletedProcess(command, run_here(patch, env))

        patch.setattr(again_tool, "subprocess", subprocess_with(run=run))
        line = ("again.py", logs / "a.eval.txt")
        done = called_here(again_tool.main, *line, environment=process_environment({}))
        assert done.returncode == 0
    script = logs / "a.eval-again.py"
    assert started == [sys.executable, str(script)]
    assert script.read_bytes() == SCRIPT.read_bytes()
    scores = [
        last_run(logs / f"{name}.eval.jsonl")["final"]["val_loss"] for name in ("a", "a-again")
    ]
    assert scores[0] == scores[1]


def test_as_many_processes_as_the_run_had(logs, tmp_path):
    shutil.copy(logs / "a.txt", tmp_path)
    text = (logs / "a.jsonl").read_text().replace('"hardware": "1 ', '"hardware": "8 ')
    text = text.replace('"hardware": "1 \\u00d7', '"hardware": "8 \\u00d7')
    (tmp_path / "a.jsonl").write_text(text)
    assert "--nproc_per_node=8 " in again(tmp_path / "a.txt", "--dry-run").stdout


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a"),
        ("a.jsonl", "{}"),
        ("a.jsonl", "a"),
        ("a.txt", None),
        ("a.jsonl", '{"event": [1]}'),
        ("a.jsonl", '{"event": "settings", "settings": {}, "machine": {"hardware": "1 × CPU"}}'),
        ("a.jsonl", '{"event": "settings", "settings": ["run_id"], "given": [], "machine": {}}'),
    ],
    ids=str,
)
def test_other_files_are_refused_in_one_line(logs, tmp_path, name, text):
    for other in ("a.txt", "a.jsonl"):
        shutil.copy(logs / other, tmp_path)
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    done = again(tmp_path / "a.txt")
    assert done.returncode == 2
    assert done.stderr.startswith("again.py: error: ")
    assert done.stderr.count("\n") == 1

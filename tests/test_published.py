"""data/tiny: the published artifact still loads, belongs to what lies beside it, and scores what it
did.

Its log says what it scored when it was made; another CPU adds in another order.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import train_gpt as t
from data.tiny import make
from tests.support import SCRIPT, run_here, write_shard
from tools import logs, summary
from tools.command import run_command

FOLDER = SCRIPT.parent / "data" / "tiny"
ARTIFACT = FOLDER / "tiny.int6.lzma"
TOKENIZER = FOLDER / "tokenizer.model"
MOST_BYTES = 2_000_000  # of all files together
NOISE_BPB = 1e-4


def records(path: Path) -> dict[str, dict]:
    """The last record of each kind in a log."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {record["event"]: record for record in map(json.loads, lines)}


def test_it_scores_what_its_log_says(monkeypatch, capsys, tmp_path):
    """In plain windows with frozen weights, as every run scores what it has just quantized; all
    else, the data too, is in the log beside it, and what that does not say is not told as its word.
    """
    monkeypatch.chdir(SCRIPT.parent)
    environment = {"DEVICE": "cpu", "RUN_ID": "a", "LOG_DIR": str(tmp_path)}
    environment |= {"EVAL_ONLY": "1", "EVAL_MODE": "plain", "TTT_ENABLED": "0"}
    environment |= {"ARTIFACT": str(ARTIFACT.relative_to(SCRIPT.parent))}
    assert run_here(monkeypatch, environment) == 0
    told = "but EVAL_MODE=plain (there sliding) TTT_ENABLED=0 (there 1)\n"
    assert f"of another train_gpt.py; {told}" in capsys.readouterr().out
    scored = records(tmp_path / "a.eval.jsonl")
    then = records(FOLDER / "tiny.jsonl")
    assert scored["final"]["val_bpb"] == pytest.approx(
        then["after_quantization"]["val_bpb"], abs=NOISE_BPB
    )
    assert then["final"]["val_bpb"] < then["after_quantization"]["val_bpb"]
    for name in ("documents", "tokens", "bytes"):
        assert scored["validation_data"][name] == then["validation_data"][name]


def test_the_files_belong_together_and_are_small():
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    described = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in files:
        assert path.name == "README.md" or f"`{path.name}`" in described


def test_the_commands_that_name_it_name_files_that_are_there():
    pages = ("docs/using.md", "docs/pod.md", "Makefile", "tools/container_check.sh")
    text = "\n".join((SCRIPT.parent / page).read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"data/tiny(?:/[\w.]+)?", text))
    assert {f"data/tiny/{path.name}" for path in (ARTIFACT, TOKENIZER)} <= named
    for path in named:
        assert (SCRIPT.parent / path).exists(), path


def test_its_summary_ends_with_no_command_for_a_text_that_is_not_there(tmp_path):
    events = records(FOLDER / "tiny.jsonl")
    assert not [line for line in summary.summary(events) if "train_gpt.py" in line]
    (tmp_path / "a_train_000000.bin").touch()
    events["settings"]["settings"]["data_path"] = str(tmp_path)
    (line,) = [line for line in summary.summary(events) if "train_gpt.py" in line]
    assert "MAX_WALLCLOCK_SECONDS=600" in line


@pytest.mark.parametrize(("event", "key"), [("sample", "sample"), ("final", "val_bpb")])
@pytest.mark.parametrize("odd", [math.nan, 10**400], ids=["nan", "huge"])
def test_a_summary_of_a_damaged_log_is_a_line(tmp_path, monkeypatch, capsys, event, key, odd):
    """Numbers in the place of text, and those that no float holds, were tracebacks."""
    found = records(FOLDER / "tiny.jsonl")
    found[event] = found.get(event, {"event": event}) | {key: odd}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, found.values())))
    monkeypatch.setattr("sys.argv", ["summary.py", str(path)])
    status = run_command("summary.py", summary.main)
    if event != "final" or odd > 1:  # which a run may come to
        assert status == 2
        told = f"summary.py: error: {path} is not a run's .jsonl log\n"
        assert capsys.readouterr().err == told
    assert logs.number_in({"x": odd}, "x") is None


def test_a_shard_is_cut_behind_a_whole_document(tmp_path):
    tokens = np.arange(make.VALIDATION_TOKENS + 500) % 900 + 4
    borders = (0, 700, make.VALIDATION_TOKENS + 30, make.VALIDATION_TOKENS + 60)
    tokens[list(borders)] = t.BOS_ID
    source = write_shard(tmp_path / "a_val_000000.bin", tokens)
    make.cut_shard(source, tmp_path / "b_val_000000.bin")
    kept = t.Shard(tmp_path / "b_val_000000.bin").read()
    assert kept.tolist() == tokens[: borders[2]].tolist()

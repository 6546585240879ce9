"""What the checks on a GPU say before they run, and what becomes of a part that fails."""

import subprocess
import sys

import pytest
import torch

import train_gpt as t
from tests import gpu_checks
from tests.gpu_checks import Part
from tests.support import CPU, SOLO, interpreted, tiny
from tools.command import UserError


def test_parts_are_chosen_by_name_and_by_what_stands_before_the_hyphen():
    everything = gpu_checks.parts()
    assert list(gpu_checks.choose_parts(["scans"])) == ["scans"]
    assert list(gpu_checks.choose_parts(["graphs-dsq", "optimizer"])) == ["optimizer", "graphs-dsq"]
    graphs = {name for name in everything if name.startswith("graphs-")}
    assert set(gpu_checks.choose_parts(["graphs"])) == graphs
    assert len(graphs) == 4
    alone = [part.alone for part in gpu_checks.choose_parts([]).values()]
    assert alone == sorted(alone)
    assert len(alone) == len(everything)
    assert all(part.seconds < gpu_checks.LIMIT for part in everything.values())
    # A part's process is started by its name, which may not begin others' too.
    assert all(list(gpu_checks.choose_parts([name])) == [name] for name in everything)
    with pytest.raises(UserError, match="scan, tims: no such part; there are attention, "):
        gpu_checks.choose_parts(["tims", "scans", "scan"])


@pytest.mark.parametrize(
    ("said", "shown"), [("", "?"), ("\n \n", "?"), ("one\ntwo\n\n", "two"), ("one", "one")]
)
def test_a_process_that_said_nothing_is_shown_too(said, shown):
    assert gpu_checks.last_line(said) == shown


def test_what_will_run_is_said_with_its_time():
    chosen = {
        "one": Part(print, 60, "first"),
        "two": Part(print, 60, "second"),
        "clock": Part(print, 90, "third", alone=True),
    }
    lines = gpu_checks.describe_parts(chosen, jobs=2).splitlines()
    assert lines[0].split() == ["one", "about", "60", "s", "first"]
    assert lines[-1] == "in all 3, about 2 min"  # (60 + 60) / 2 + 90 s
    assert gpu_checks.describe_parts(chosen, 1).endswith("about 4 min")  # 3.5, to the even


@pytest.mark.parametrize(
    "code, limit, said, good",
    [
        ("print('ok   a row')", 60, "ok   a row", True),
        ("print('FAIL a row'); raise SystemExit(1)", 60, "FAIL a row", False),
        ("raise SystemExit(2)", 60, "FAIL it ended by an error", False),
        (
            "import time; print('ok', flush=True); time.sleep(60)",
            1,
            "FAIL x: not done in 1 s",
            False,
        ),
    ],
)
def test_a_parts_process_fails_by_its_rows_by_an_error_and_by_its_limit(
    monkeypatch, capsys, code, limit, said, good
):
    start = subprocess.Popen

    def other(command, **options):
        assert command[1:] == ["-m", "tests.gpu_checks", "--here", "x"]
        return start([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "Popen", other)
    assert gpu_checks.run_apart("x", limit) == good
    assert said in capsys.readouterr().out


def test_settings_of_every_model_are_possible():
    """Only the calls' arguments can be looked at here."""
    models = [p.run for n, p in gpu_checks.parts().items() if n.startswith("model-")]
    for run in models:
        settings = gpu_checks.model_settings(**getattr(run, "keywords", {}))
        assert settings.train_seq_len * 4 <= 2048
        t.build_model(settings, SOLO)  # from these files alone: no tokenizer is asked for


@pytest.mark.parametrize("adapts", [False, True], ids=["frozen", "adapting"])
def test_documents_are_checked_on_a_cpu_too_but_for_kernels(monkeypatch, capsys, adapts):
    monkeypatch.setattr(gpu_checks, "DEVICE", CPU)
    monkeypatch.setattr(gpu_checks, "model_settings", lambda **changes: tiny(**changes))
    gpu_checks.check_documents(adapts, train_seq_len=32, ttt_lora_piece=16, ttt_lora_lr=0.03)
    said = capsys.readouterr().out
    assert "FAIL" not in said
    assert said.count("ok  ") == 11 + adapts


@pytest.fixture
def small_layer(monkeypatch):
    """Calls gpu_checks' check of weight gradients for a layer that is interpreted in a second."""
    for name, (_, columns, _, stages) in t.FLOAT8_TILES.items():
        monkeypatch.setitem(t.FLOAT8_TILES, name, (16, columns, 16, stages))
    monkeypatch.setattr(gpu_checks, "DEVICE", CPU)
    monkeypatch.setattr(t, "can_fuse_mlp", lambda *sizes: True)

    def check(rows: int) -> None:
        torch.manual_seed(0)
        gpu_checks.check_weight_gradients((rows,), width=64, hidden=256, dtype=torch.float32)

    return check


@interpreted
def test_weight_gradients_are_checked_on_a_cpu_too(small_layer, capsys):
    small_layer(40)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 + 2 + 5
    assert all(row.startswith("ok  ") for row in rows)
    errors = [float(row.split(" (at most")[0].split()[-1]) for row in rows if "unrounded" in row]
    assert max(errors) < 1e-5  # in float32 nothing is rounded


@interpreted
def test_a_copy_that_differs_and_a_sum_that_is_too_small_are_seen(small_layer, monkeypatch, capsys):
    usual, product = t.turned_rows, t.scaled_product

    def too_small(a8, b8, *others):
        return 0.999 * product(a8, b8, *others)

    def spoiled(x8, *others):
        turned = usual(x8, *others)
        turned[3, 7] += 1
        return turned

    monkeypatch.setattr(t, "turned_rows", spoiled)
    monkeypatch.setattr(t, "scaled_product", too_small)
    monkeypatch.setattr(gpu_checks, "failures", 0)
    small_layer(16)
    said = capsys.readouterr().out
    for name in ("x8", "d_y8"):
        assert f"FAIL 8-bit weight gradients, 16 tokens: {name} transposed" in said
    for name in ("f8", "d_v8"):
        assert f"ok   8-bit weight gradients, 16 tokens: {name} transposed" in said
    assert "FAIL 8-bit weight gradients, 16 tokens: too small by" in said
    assert "ok   8-bit weight gradients, 16 tokens: error" in said
    assert gpu_checks.failures == 5  # both copies, a sum, and by them d up and d down

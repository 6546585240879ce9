"""bench.steps: the statistics of its verdict, and the whole command on a CPU."""

import dataclasses
import json
import random
from types import SimpleNamespace

import pytest

import train_gpt as t
from bench import bench, steps
from tests.support import SCRIPT, tiny_environment
from tools.command import UserError
from tools.logs import last_run

COARSE = """
import torch


def install(script):
    class MLP(script.MLP):
        def forward(self, *inputs):
            y = super().forward(*inputs)
            return y + (y.to(torch.float8_e5m2).to(y.dtype) - y).detach()

    script.MLP = MLP
"""


@pytest.mark.parametrize("kind", [UserError, t.UserError, ZeroDivisionError])
def test_a_mistake_in_a_child_is_told_once_and_a_bug_with_its_traceback(monkeypatch, kind):
    """An idea with parameters of its own ended in the child's traceback beside the one line."""

    def refuse(idea):
        raise kind("other parameters")

    monkeypatch.setattr(steps, "Variant", refuse)
    told = []
    pipe = SimpleNamespace(send=told.append)
    if kind is ZeroDivisionError:
        with pytest.raises(kind):
            steps.serve(pipe, None)
        assert told == [("ZeroDivisionError: other parameters", None)]
    else:
        steps.serve(pipe, None)
        assert told == [("other parameters", None)]


def test_the_shape_is_what_the_official_script_trained(monkeypatch):
    """By that script's log: whatever PRESET=short has become, all is as there but MLPs' width."""
    log = last_run(SCRIPT.parent / "logs" / "h200-short-1337.jsonl")
    trained = log["settings"]["settings"]
    monkeypatch.setattr("os.environ", {})
    timed = dataclasses.asdict(bench.read_settings(steps.SHAPE))
    groups = ("model", "recurrence", "optimizer")
    names = {name for name, group in t.FIELDS.items() if group in groups} & set(trained)
    names |= {"vocab_size", "train_batch_tokens", "train_seq_len", "document_reset"}
    assert len(names) > 30
    assert {name for name in names if timed[name] != trained[name]} == {"mlp_mult"}


def errors_of(scale: float, batches: int, seed: int) -> list[float]:
    """Squared errors by batch that scatter by a half."""
    numbers = random.Random(seed)
    return [scale**2 * numbers.uniform(0.5, 1.5) for _ in range(batches)]


def test_a_ratios_standard_error_is_what_repetitions_scatter_by():
    found = [
        steps.ratio_with_error(errors_of(1.1, 8, seed), errors_of(1.0, 8, 1000 + seed))
        for seed in range(400)
    ]
    mean = sum(ratio for ratio, _ in found) / len(found)
    scatter = (sum((ratio - mean) ** 2 for ratio, _ in found) / len(found)) ** 0.5
    told = sum(error for _, error in found) / len(found)
    assert mean == pytest.approx(1.1, abs=0.02)
    assert told == pytest.approx(scatter, rel=0.15)


def test_equal_errors_have_a_ratio_of_one_and_a_single_batch_tells_nothing():
    assert steps.ratio_with_error([0.0, 0.0], [0.0, 0.0]) == (1.0, 0.0)
    assert steps.ratio_with_error([4.0], [1.0]) == (2.0, float("inf"))


@pytest.mark.parametrize(
    ("new", "ratio", "verdict"),
    [
        ([9.0, 9.1, 9.0], (1.0, 0.05), "train seeds with it"),
        ([9.0, 9.1, 9.0], (1.3, 0.04), "leave it"),
        ([9.0, 9.1, 9.0], (1.3, 0.06), "more --batches"),
        ([9.0, 11.0, 9.5], (1.0, 0.05), "more --rounds"),
        ([11.0, 11.1, 11.0], (1.0, 0.05), "leave it"),
    ],
)
def test_verdicts(new, ratio, verdict):
    times = {steps.PLAIN: [10.0, 10.0, 10.1], "it": new}
    lines = steps.judge("it", times, {"matrix": {"it: ratio, its error": ratio}})
    assert verdict in lines[-1]
    assert any("matrix" in line for line in lines) == (ratio[0] > 1.2)


def test_the_command_on_a_cpu(tmp_path, monkeypatch, capsys):
    """An idea that rounds what MLPs add to four binary digits has worse gradients."""
    for name, value in tiny_environment(precision="bfloat16", scan_backend="chunked").items():
        monkeypatch.setenv(name, value)
    idea, out = tmp_path / "coarse.py", tmp_path / "out.json"
    idea.write_text(COARSE)
    few = "--rounds", "2", "--steps", "2", "--batches", "3", "--parts", "2"
    assert steps.main(["--idea", str(idea), *few, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {name: len(times) for name, times in found["step, ms"].items()} == {
        "without": 2,
        "coarse": 2,
    }
    rows = found["gradients"]
    assert all(0 < row["without"] < 0.2 for row in rows.values())
    ratio, error = rows["embedding.weight"]["coarse: ratio, its error"]
    assert ratio - 2 * error > 1.2
    assert "verdict: leave it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--idea", "/nowhere/idea.py"], "no such file"),
        (["--idea", __file__, "--idea", __file__], "names of their own"),
        (["--idea", __file__, "--batches", "0"], "--batches should be above 0"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        steps.main(arguments)

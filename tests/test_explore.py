"""tools/explore.py: a variant scores as train_gpt.py's own run of it does; averages of several
lengths; and mistakes.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import train_gpt as t
from tests.support import SOLO, run_environment, run_here, tiny
from tools import explore


def test_a_variant_scores_as_its_run_does(monkeypatch, explore_here, shards, tmp_path):
    """Before and after quantization and in the end, to the last digit shown."""
    assert run_here(monkeypatch, run_environment(shards, tmp_path, sdclip_k=6.0)) == 0
    records = {
        r["event"]: r for r in map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    }
    status, (first, second), _ = explore_here("other: MLP_MULT=1", "it: SDCLIP_K=6", "--export")
    assert status == 0
    assert second["name"] == "it"
    assert second["steps"] == records["trained"]["steps"] == 6
    assert second["bpb"] == {"ema": pytest.approx(records["trained"]["val_bpb"], abs=1e-5)}
    assert second["last_loss"] == pytest.approx(records["train"]["train_loss"], abs=1e-4)
    assert second["k"] == 6.0
    assert second["quantized"] == pytest.approx(records["after_quantization"]["val_bpb"], abs=1e-5)
    assert second["final"] == pytest.approx(records["final"]["val_bpb"], abs=1e-5)
    assert first["bpb"] != second["bpb"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.int6.lzma",
        "a.jsonl",
        "a.txt",
    ]  # nothing new


def test_ternary_weights_are_scored_on_their_grid(monkeypatch, explore_here, shards, tmp_path):
    """As the run scores them; the floats behind them scored better, and are no artifact's."""
    environment = run_environment(shards, tmp_path, quantizer="ternary")
    assert run_here(monkeypatch, environment) == 0
    records = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    (trained,) = (record for record in records if record["event"] == "trained")
    status, (line,), _ = explore_here("it: QUANTIZER=ternary")
    assert status == 0
    assert line["bpb"] == {"ema": pytest.approx(trained["val_bpb"], abs=1e-5)}


def test_the_same_weights_are_quantized_again(explore_here):
    """As a run with these settings would, on the same calibration text; others are refused."""
    # A model of few matrices: a trellis takes seconds. The test above has another and its score.
    small = "NUM_LAYERS=1 MAMBA_LAYERS=0 EVAL_MODE=plain TTT_ENABLED=0"
    status, (line,), _ = explore_here(
        f"it: SDCLIP_K=6 {small}",
        "--export",
        *("--requantize", "as before: SDCLIP_K=6", "--requantize", "finer: SDCLIP_K=5"),
        *("--requantize", "trellis: TRELLIS_STATES=4"),
    )
    assert status == 0
    status, (other,), _ = explore_here(f"finer: SDCLIP_K=5 {small}", "--export")
    assert status == 0
    first = {name: line[name] for name in ("k", "quantized", "final")}
    assert line["as before"] == first
    assert line["finer"]["k"] == 5
    assert line["trellis"]["k"] == 6 and line["trellis"] != first
    assert line["finer"] != first
    assert line["finer"] == {name: other[name] for name in first}


IDEAS = Path(explore.__file__).parent / "ideas"


@pytest.mark.parametrize("idea", ["backout", "channel_mix", "heads_apart", "value_mix"])
def test_an_idea_without_a_test_of_its_own_trains_and_exports_another_model(
    idea, explore_here, monkeypatch
):
    """An idea stays as it was while the script's classes change: one met a context of its own."""
    for name, value in vars(t).copy().items():  # all is put back
        monkeypatch.setattr(t, name, value)
    monkeypatch.setenv("IDEA_HEADS", "all")
    usual = "it: SDCLIP_K=6 NUM_LAYERS=3 MAMBA_LAYERS=0 EVAL_MODE=plain TTT_ENABLED=0", "--export"
    (status, (without,), _), (after, (line,), _) = (
        explore_here(*usual, *more) for more in ([], ["--idea", str(IDEAS / f"{idea}.py")])
    )
    assert status == after == 0
    assert line["bpb"] != without["bpb"]
    assert abs(line["quantized"] - line["bpb"]["ema"]) < 0.1
    assert line["final"] == line["quantized"]


def test_an_export_that_fails_costs_no_score(explore_here):
    status, (line,), _ = explore_here(
        "too large: TARGET_MB=0.142 NUM_LAYERS=5 MAMBA_LAYERS=0 SDCLIP_K=16", "--export"
    )
    assert status == 0
    assert 0 < line["bpb"]["ema"] < 9
    assert "make the model smaller" in line["error"]
    assert "final" not in line


def test_each_kind_of_average_is_scored(explore_here):
    """SWA's snapshots are of the last weights here, one behind each step of the last three."""
    settings = "AVERAGE_HORIZON=0.9 SWA_START_FRAC=0.95 SWA_EVERY=1"
    kinds = ["none", "ema", "swa", "ema+swa"]
    status, lines, _ = explore_here(*(f"{kind}: AVERAGE={kind} {settings}" for kind in kinds))
    assert status == 0
    assert [list(line["bpb"]) for line in lines] == [[kind] for kind in kinds]
    assert len({line["bpb"][kind] for line, kind in zip(lines, kinds, strict=True)}) == 4


def test_a_run_shorter_than_every_is_scored_as_it_was_trained(explore_here):
    """Once it was scored as it was initialized. Six steps: what --averages leaves are the last
    weights.
    """
    variants = "own: AVERAGE=none", "other: AVERAGE=none MATRIX_LR=0.05"
    _, expected, _ = explore_here(*variants)
    variants = "own:", "other: MATRIX_LR=0.05"
    status, lines, _ = explore_here(*variants, "--averages", "0.1", "--every", "10")
    assert status == 0
    assert [line["bpb"]["0.1"] for line in lines] == [line["bpb"]["none"] for line in expected]
    assert lines[0]["bpb"] != lines[1]["bpb"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_variant_that_is_stopped_ends_in_one_line_and_those_before_are_kept(
    explore_here, monkeypatch, number
):
    update = t.WeightAverage.update

    def stop(averages, *arguments):
        update(averages, *arguments)
        stop.steps = getattr(stop, "steps", 0) + 1
        if stop.steps == 10:  # two of them warm-ups
            os.kill(os.getpid(), number)

    monkeypatch.setattr(t.WeightAverage, "update", stop)
    status, (line,), error = explore_here("first:", "second:", "third:")
    assert status == 2
    assert line["name"] == "first"
    assert (
        error.splitlines()[-1] == f'explore.py: error: "second": stopped by {number.name} at step 2'
    )
    assert "Traceback" not in error


def test_each_average_looks_back_over_its_part_of_the_run():
    """Against the sums written out, on weights that are the number of the step; steps that were all
    skipped count in none.
    """
    model = torch.nn.Linear(1, 1, bias=False)
    averages = explore.Averages(model, tiny(), SOLO, [0.1, 0.4], every=5)
    expected = {0.1: float(model.weight.detach()), 0.4: float(model.weight.detach())}
    for step in range(1, 201):
        torch.nn.init.constant_(model.weight, step)
        skip = torch.tensor(float(145 < step <= 150 or step == 100))
        averages.after_step(step, skip, False)
        if step % 5 == 0 and step != 150:
            for part in expected:
                rate = min(1.0, 5 / (part * step))
                expected[part] += rate * (step - expected[part])
    for part, average in averages.each.items():
        assert float(average.ema[0]) == pytest.approx(expected[part], rel=1e-5)
    assert 180 < expected[0.1] < 190
    assert 120 < expected[0.4] < 160


def test_lines_are_appended_to_the_file(explore_here, tmp_path):
    for name in ("one", "two"):
        status, lines, _ = explore_here(
            f"{name}:", "--averages", "0.1,0.9", "--out", str(tmp_path / "out")
        )
        assert status == 0
        assert list(lines[0]["bpb"]) == ["0.1", "0.9"]
    assert [json.loads(line)["name"] for line in (tmp_path / "out").read_text().splitlines()] == [
        "one",
        "two",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no colon"], "a name, a colon and settings"),
        ([": MLP_MULT=4"], "a name, a colon and settings"),
        (["a: MLP_MULT"], '"a": MLP_MULT should be SETTING=VALUE'),
        (["a: MLP_MULTI=4"], '"a": MLP_MULTI is not a setting'),
        (["a: MLP_MULT=x"], '"a": MLP_MULT="x" should be a number'),
        (
            ["a: AVERAGE=swa", "--averages", "0.1"],
            '"a": AVERAGE=swa, but --averages are all of kind ema',
        ),
        (["a: NUM_LAYERS=0"], '"a": NUM_LAYERS=0 must be'),
        (["a:", "--averages", "0.1,x"], "--averages 0.1,x: write numbers below 1"),
        (["a:", "--averages", "1.5"], "--averages 1.5: write numbers below 1"),
        (["a:", "--every", "0"], "--every 0 should be above 0"),
        (["a: DATA_PATH=/nowhere"], "no *_val_*.bin shards in /nowhere"),
        (["a:", "b: EVAL_STRIDE=9999"], '"b": EVAL_STRIDE=9999 is longer'),  # before a has trained
        (["a:", "--requantize", "b: SDCLIP_K=5"], "--requantize needs --export"),
        (
            ["a:", "--export", "--requantize", "b: MLP_MULT=4"],
            '"b": MLP_MULT is no setting of quantization',
        ),
        (["a:", "--idea", "/nowhere/idea.py"], "--idea /nowhere/idea.py: no such file"),
        (["a:", "--idea", __file__], "has no install(script)"),
        (["a:", "--idea", str(IDEAS.parent.parent / "README.md")], "is no Python file"),
        (
            ["a:", "--export", "--requantize", "b: SDCLIP_K=5", "--requantize", "b: SDCLIP_K=6"],
            '--requantize "b" is there twice',
        ),
        *(
            (["a:", "--export", "--requantize", f"{name}: SDCLIP_K=5"], "a figure of that name")
            for name in ("bpb", "k", "error")
        ),
        (["a:", "--out", "/nowhere/out"], "/nowhere/out: No such file or directory"),
        ([], "required"),
    ],
)
def test_mistakes_end_in_one_line(explore_here, arguments, said):
    status, lines, error = explore_here(*arguments)
    assert status == 2
    assert lines == []
    assert error.splitlines()[-1].startswith("explore.py: error: ")
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error


def test_an_average_of_a_part_looks_back_as_a_runs_own_does():
    model = torch.nn.Linear(3, 3)
    settings = tiny(average_horizon=0.3, ema_decay=0.99999)
    own = t.WeightAverage(model, settings, SOLO)
    ours = explore.Averages(model, tiny(), SOLO, [0.3], every=1)
    for step in range(1, 100):
        torch.nn.init.normal_(model.weight)
        skip = torch.zeros((), device=SOLO.device)
        for average in (own, ours):
            average.update(average.rate(step), skip)
            average.after_step(step, skip, False)
    assert torch.allclose(own.ema[0], ours.each[0.3].ema[0])

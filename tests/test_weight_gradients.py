"""What bench.weight_gradients checks: it holds where kernels are interpreted, and can fail. And the
idea that has a run compute them.
"""

from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from bench import weight_gradients as bench
from tests.support import CPU, interpreted
from tools.ideas import eight_bit_weight_gradients as idea


@pytest.fixture
def small(monkeypatch):
    """A layer that is interpreted in a second."""
    for name, (_, columns, _, stages) in t.FLOAT8_TILES.items():
        monkeypatch.setitem(t.FLOAT8_TILES, name, (16, columns, 16, stages))
    monkeypatch.setattr(t, "PART_TILE", (64, 64, 16, 2))
    sizes = {"DEVICE": CPU, "DTYPE": torch.float32, "WIDTH": 64, "HIDDEN": 256}
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "cublas", lambda a8, b8, *_: a8 @ b8.mT)


@interpreted
def test_all_checks_pass(small, capsys):
    report = bench.Report(None)
    case = bench.random_case(40)
    steps = bench.check_stored(report, case)
    given = steps.x8, steps.d_y8, steps.size, t.mean_size(steps.size)
    bench.check_sums(report, steps.d_v, t.launch_turn_rows(*given)[0])
    bench.check_gradients(report, case)
    assert report.failures == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(" ok " in line for line in lines) == 18
    gradients = [value for name, value in report.found.items() if "weights' gradients" in name]
    assert len(gradients) == 6
    assert max(gradients) < 1e-5


@interpreted
def test_a_copy_that_differs_is_seen(small, monkeypatch):
    usual = t.launch_turn_rows

    def spoiled(*given):
        turned, other = usual(*given)
        turned[3, 7] += 1
        return turned, other

    monkeypatch.setattr(t, "launch_turn_rows", spoiled)
    report = bench.Report(None)
    bench.check_stored(report, bench.random_case(16))
    assert [name for name in report.found if "FAILED" in name] == [
        "FAILED 16 rows: x8 transposed (at most 0)"
    ]


@pytest.mark.parametrize(
    ("usual", "wanted"),
    [
        ("mlp,in_proj", "mlp,in_proj,gradients"),
        ("mlp,gradients", "mlp,gradients"),
        ("in_proj", "in_proj"),
        ("none", "none"),
    ],
)
def test_the_idea_adds_them_where_the_mlp_has_8_bits(usual, wanted):
    script = SimpleNamespace(choose_float8=lambda *_: usual, EVERY_FLOAT8=t.EVERY_FLOAT8)
    idea.install(script)
    assert script.choose_float8(None, None, CPU, "before") == wanted
    assert script.EVERY_FLOAT8 == "mlp,in_proj,gradients"


def test_without_such_a_gpu_one_line_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(bench.UserError, match="needs an H100 or H200"):
        bench.main([])

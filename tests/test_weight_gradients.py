"""What bench.weight_gradients checks: it holds where kernels are interpreted, and can fail."""

import pytest
import torch

import train_gpt as t
from bench import weight_gradients as bench
from tests.support import CPU, interpreted


@pytest.fixture
def small(monkeypatch):
    """A layer that is interpreted in a second."""
    for name, (_, columns, _, stages) in t.FLOAT8_TILES.items():
        monkeypatch.setitem(t.FLOAT8_TILES, name, (16, columns, 16, stages))
    sizes = {"DEVICE": CPU, "DTYPE": torch.float32, "WIDTH": 64, "HIDDEN": 256}
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "cublas", lambda a8, b8, *_: a8 @ b8.mT)


@interpreted
def test_all_checks_pass(small, capsys):
    report = bench.Report(None)
    case = bench.random_case(40)
    steps = bench.check_stored(report, case)
    bench.check_sums(report, *steps.up_factors)
    bench.check_gradients(report, case)
    assert report.failures == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(" ok " in line for line in lines) == 11
    gradients = [value for name, value in report.found.items() if "gradients in 8 bits" in name]
    assert len(gradients) == 3
    assert max(gradients) < 1e-5


@interpreted
def test_a_copy_that_differs_is_seen(small, monkeypatch):
    usual = t.turned_rows

    def spoiled(x8, *others):
        turned = usual(x8, *others)
        turned[3, 7] += 1
        return turned

    monkeypatch.setattr(t, "turned_rows", spoiled)
    report = bench.Report(None)
    bench.check_stored(report, bench.random_case(16))
    assert [name for name in report.found if "FAILED" in name] == [
        "FAILED 16 rows: x8 transposed (at most 0)",
        "FAILED 16 rows: d_y8 transposed (at most 0)",
    ]


def test_without_such_a_gpu_one_line_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(bench.UserError, match="needs an H100 or H200"):
        bench.main([])

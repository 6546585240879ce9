"""Rounding by a trellis: the best path, in Triton's interpreter too, what it gains, and an artifact
whose weights are those that GPTQ meant.
"""

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.support import SOLO, gptq, interpreted, random_model, tiny
from tests.test_export import (
    Quiet,
    correlated_problem,
    dequantized,
    export_to,
    grid_scale,
    hessian_error,
    row_limits,
    wide_model,
)
from tests.test_precision import trainer_of
from tools.audit import decoder
from tools.command import UserError

each_trellis = pytest.mark.parametrize("states", t.TRELLISES)


def random_numbers(segments: int, rows: int, spread: float = 3.0) -> torch.Tensor:
    """Gaussian weights, in steps of many sizes and none behind the last row, and limits."""
    generator = torch.Generator().manual_seed(segments)
    weights = spread * torch.randn(segments, rows, generator=generator)
    steps = 0.1 + torch.rand(segments, rows, generator=generator)
    steps[-1, rows // 2 :] = 0
    limits = torch.tensor([3.0, 31.0, 127.0])[torch.arange(segments * rows) % 3]
    return torch.stack([weights, steps, limits.view(segments, rows)])


def squared_error(numbers: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return ((numbers[0] - points) * numbers[1]).double().square().sum(dim=1)


def points_of(integers: torch.Tensor, states: int) -> torch.Tensor:
    """trellis_points() of integers that lie as those of trellis_search(): a segment after another,
    each from the first state.
    """
    return t.trellis_points(integers.T.to(torch.int8), states).T


@each_trellis
def test_the_path_found_is_the_best_of_all(states):
    """Of five rows' integers, -3 to 3, every choice is tried; limits are 3."""
    numbers = random_numbers(12, 5, spread=1.5)
    numbers[2] = 3
    every = torch.tensor(list(itertools.product(range(-3, 4), repeat=5)))
    all_points = points_of(every, states)
    found = squared_error(numbers, t.trellis_search(numbers, states))
    for segment, error in enumerate(found):
        alone = numbers[:, segment, None].expand(-1, len(every), -1)
        assert abs(error - squared_error(alone, all_points).min()) < 1e-6
    assert len(all_points.unique(dim=0)) == len(every)


@each_trellis
def test_points_are_what_their_integers_say_and_stay_within_limits(states):
    numbers = random_numbers(40, t.TRELLIS_ROWS, spread=20.0)
    points = t.trellis_search(numbers, states)
    assert torch.equal(points_of(points.floor(), states), points)
    assert (points.floor().abs() <= numbers[2]).all() and (points.floor().abs() == 31).any()
    assert 0.3 < (points > points.floor()).float().mean() < 0.7


@each_trellis
def test_the_error_is_a_decibel_below_that_of_integers(states):
    """Of uniform numbers, whose best scalar quantizer the integers are; no more than 1.53 are to
    be had in any number of dimensions.
    """
    generator = torch.Generator().manual_seed(1)
    weights = 40 * torch.rand(64, 1024, generator=generator) - 20
    numbers = torch.stack([weights, torch.ones_like(weights), torch.full_like(weights, 31.0)])
    mean = (weights - t.trellis_search(numbers, states)).square().mean()
    gain = 10 * math.log10(1 / 12 / mean)
    assert gain == pytest.approx({4: 0.99, 8: 1.09, 16: 1.16, 32: 1.23}[states], abs=0.03)


def entropy(integers: torch.Tensor) -> float:
    counts = torch.unique(integers, return_counts=True)[1].double()
    return float(torch.special.entr(counts / counts.sum()).sum()) / math.log(2)


@each_trellis
def test_at_equal_entropy_of_gaussian_weights_nine_tenths_of_that_are_left(states):
    """Of trellises that begin again every TRELLIS_ROWS rows; 6.02 decibels are a bit."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(1000, t.TRELLIS_ROWS, generator=generator)
    limit, step = torch.full_like(weights, 31.0), torch.full_like(weights, 15 / 31)
    points = t.trellis_search(torch.stack([weights / step, step, limit]), states)
    plain = t.round_to_grid(weights, step, limit)
    ratio = (weights - plain * step).square().mean() / (weights - points * step).square().mean()
    bits = entropy(points.floor()) - entropy(plain)
    assert 0 < bits < 0.015
    gain = 10 * math.log10(ratio) - 6.02 * bits
    assert gain > {4: 0.85, 8: 0.93, 16: 0.98, 32: 1.02}[states]


@interpreted
@each_trellis
def test_the_kernel_finds_the_same_points(states):
    numbers = random_numbers(35, 12)
    assert torch.equal(t.fused_trellis_search(numbers, states), t.trellis_search(numbers, states))


def test_what_a_gpu_can_do_is_asked_once(monkeypatch):
    """Not for each column that GPTQ rounds by a trellis, nor each launch of a scan's kernels."""
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=232_448)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    gpu = torch.device("cuda", 77)  # no machine has so many, so that no other test asks for it
    assert [t.kernel_limits(gpu), t.kernel_limits(gpu)] == [(90, 232_448)] * 2
    assert asked == [gpu]


def test_columns_of_any_number_of_rows_and_matrices_are_cut_into_segments():
    """The last segment of a matrix is shorter, and no matrix reaches into the next."""
    rows = 2 * t.TRELLIS_ROWS + 30
    numbers = random_numbers(3, rows)
    numbers[1].clamp_(min=0.1)
    weights, steps, limits = numbers.unsqueeze(-1)
    points = t.round_by_trellis(weights * steps, steps, limits, 8)
    assert points.shape == (3, rows, 1)
    assert torch.equal(
        t.trellis_points(points.floor()[..., 0].T.to(torch.int8), 8), points[..., 0].T
    )
    for matrix in range(3):
        alone = t.round_by_trellis((weights * steps)[matrix], steps[matrix], limits[matrix], 8)
        assert torch.equal(alone, points[matrix])


@pytest.mark.parametrize("rows", [24, 300])
def test_gptq_by_a_trellis_costs_outputs_a_decibel_less(rows):
    """And what it returns are points of trellises, down every column of the unsorted matrix."""
    weight, hessian = correlated_problem(rows)
    hessian[9] = hessian[:, 9] = 0  # an input that never fires
    limits = row_limits(rows, 4)
    scale = grid_scale(weight, limits, tiny(), 15.0)
    plain = gptq(weight, hessian, scale, limits)
    points = gptq(weight, hessian, scale, limits, trellis_states=8)
    assert torch.equal(t.trellis_points(points.floor().to(torch.int8), 8), points)
    assert not points[:, 9].any() and (points.floor().abs() <= limits).all()
    errors = [hessian_error(weight, found * scale, hessian) for found in (plain, points)]
    assert 10 * math.log10(errors[0] / errors[1]) > (0.6 if rows == 24 else 0.9)


@each_trellis
def test_an_artifact_holds_what_gptq_meant(states, tmp_path, monkeypatch):
    """Read by the script and by the audit; its header says by which trellis."""
    settings = tiny(trellis_states=states)
    model, gptq, meant = random_model(settings), t.gptq, []

    def remember(weight, *others):
        meant.append(gptq(weight, *others))
        return meant[-1]

    monkeypatch.setattr(t, "gptq", remember)
    stored = t.quantize_model(model, settings, SOLO, {}, 8.0)
    (tmp_path / "a").write_bytes(t.pack_artifact(settings, stored))
    loaded, read = t.load_model(tmp_path / "a", tiny(), set(), SOLO)
    assert read.trellis_states == states
    every = {points.numpy().tobytes() for group in meant for points in group}
    halves = []
    for name in t.grid_limits(model):
        weight = loaded.get_parameter(name).detach()
        points = weight / stored[name][: len(weight), None].float()
        points = (2 * points).round() / 2
        assert points.numpy().tobytes() in every
        assert torch.equal(points * stored[name][: len(weight), None].float(), weight)
        halves.append((points % 1 != 0).float().mean())
    assert 0.3 < torch.stack(halves).mean() < 0.7
    layout = [
        decoder.Parameter(name, tuple(p.shape), name in t.grid_limits(model))
        for name, p in model.named_parameters()
    ]
    decoded = decoder.decode(decoder.take_apart(tmp_path / "a"), layout)
    for name, p in loaded.named_parameters():
        assert torch.equal(torch.tensor(decoded[name]), p), name


@pytest.mark.parametrize("states", [3, -4, 64, 4.0, "8", True, False, None, [8], 10**40], ids=str)
def test_the_audit_refuses_a_header_whose_trellis_the_script_would_not_read(states):
    """Whatever JSON holds, also where no matrix is on a grid."""
    parts = decoder.Parts({"trellis_states": states}, b"", np.zeros(0, "<u2"))
    with pytest.raises(UserError, match="there is no trellis of "):
        decoder.decode(parts, [])


def test_the_finest_grid_whose_file_fits_is_found_at_once(tmp_path):
    settings, model = wide_model()
    target = int(t.predict_bytes(model, settings, 9.0))
    settings = t.replace(settings, trellis_states=4)
    finest = t.fit_sdclip(model, settings, target)
    assert 9.0 <= finest < 9.3  # the integers are spread a little wider
    said = export_to(tmp_path / "a", settings, model, target)
    (line,) = [text for text in said if text.startswith("GPTQ at k=")]
    (k,) = re.findall(r"k=([\d.]+);", line)
    assert finest <= float(k) < finest + 0.1  # and by GPTQ's errors, which the fit knows there
    assert 0.95 * target < (tmp_path / "a").stat().st_size <= target


def test_the_kernel_is_compiled_before_the_training_clock_starts(monkeypatch):
    """A run's first column would else wait for it, within EXPORT_RESERVE_SECONDS."""
    search, seen = t.trellis_search, []

    def remember(numbers, states):
        seen.append((numbers.shape[2], states))
        return search(numbers, states)

    monkeypatch.setattr(t, "trellis_search", remember)
    trainer = trainer_of(tiny(trellis_states=16, warmup_steps=0))
    trainer.log = Quiet()
    trainer.warm_up()
    assert seen == [(t.TRELLIS_ROWS, 16)]


def test_without_a_trellis_nothing_changes():
    """An artifact is the one of a script that knows of none."""
    settings = tiny()
    assert settings.trellis_states == 0 == t.FORMER_DEFAULTS["trellis_states"]
    stored = t.quantize_model(random_model(settings), settings, SOLO, {}, 8.0)
    name = "blocks.1.mixer.query.weight"
    weight = random_model(settings).get_parameter(name).detach()
    rows = stored[name][: len(weight), None].float()
    plain = t.round_to_grid(weight, rows, torch.full_like(rows, 31.0)) * rows
    assert torch.equal(dequantized(stored, name), plain)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trellis_states": 6}, "TRELLIS_STATES=6 should be one of 0, 4, 8, 16, 32"),
        ({"trellis_states": 8, "quantizer": "round"}, "QUANTIZER=round needs TRELLIS_STATES=0$"),
        ({"trellis_states": 8, "quantizer": "dsq"}, "QUANTIZER=dsq needs TRELLIS_STATES=0$"),
        ({"trellis_states": 8, "late_qat_threshold": 0.1}, "=0.1 needs TRELLIS_STATES=0$"),
        ({"trellis_states": 8, "quantizer": "round", "eval_only": True}, ""),  # it scores a file
        ({"trellis_states": 0, "quantizer": "round"}, ""),
    ],
    ids=str,
)
def test_what_a_trellis_does_not_go_with_is_refused_in_one_line(changes, said):
    if not said:
        t.validate_settings(tiny(**changes), 1)
        return
    with pytest.raises(t.UserError, match=said):
        t.validate_settings(tiny(**changes), 1)

"""Export: GPTQ, the grids, packing, and an artifact file that is either read exactly or refused in
one line.
"""

import copy
import doctest
import hashlib
import itertools
import json
import lzma
import math
import random
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as t
from tests.support import (
    SMALLEST,
    SOLO,
    bounded,
    collect_factors,
    gptq,
    random_model,
    random_tokens,
    relative,
    run_ranks,
    tiny,
    with_settings,
)
from tools.audit import decoder


def row_limits(rows: int, int8_rows: int) -> torch.Tensor:
    """Limits of a matrix whose last rows have eight bits."""
    return torch.tensor([[31.0]] * (rows - int8_rows) + [[127.0]] * int8_rows)


def dequantized(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What a stored parameter stands for."""
    integers = stored.get(f"{name} integers")
    if integers is None:
        return stored[name].float()
    rows, columns = stored[name].float().split(integers.shape)
    return integers.float() * (rows[:, None] * columns)


def grid_scale(
    weight: torch.Tensor, limits: torch.Tensor, settings: t.Settings, k: float
) -> torch.Tensor:
    """The grid's step at each weight."""
    return math.prod(t.grid_steps(weight, limits, settings, k))


QUANTIZERS = t.Settings.__dataclass_fields__["quantizer"].metadata["unit"].split("|")
each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)
each_version = pytest.mark.parametrize("version", [2, 3], ids=["Mamba-2", "Mamba-3"])


# ---- Rounding ------------------------------------------------------------------------------------


def correlated_problem(
    rows: int = 24, columns: int = 160, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of inputs that a few directions explain, as activations are. More
    than one GPTQ block.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 12, generator=generator) @ torch.randn(12, columns, generator=generator)
    x += 0.3 * torch.randn(2000, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), 2 * x.T @ x


def hessian_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = (weight - rounded).double()
    return float((difference @ hessian.double() * difference).sum())


def test_gptq_beats_plain_rounding_on_correlated_inputs():
    """In the norm that counts, the error of the layer's outputs: by a factor of three and more."""
    weight, hessian = correlated_problem()
    settings, limits = tiny(), row_limits(24, 4)
    scale = grid_scale(weight, limits, settings, 4.0)
    plain = t.round_to_grid(weight, scale, limits) * scale
    clever = gptq(weight, hessian, scale, limits) * scale
    assert hessian_error(weight, clever, hessian) < hessian_error(weight, plain, hessian) / 3


def test_gptq_is_column_by_column_rounding_with_the_rest_corrected():
    """Against optimal brain quantization with the inverse Hessian itself, in float64: no blocks, no
    Cholesky factor.
    """
    weight, hessian = correlated_problem()
    limits = row_limits(24, 4)
    scale = grid_scale(weight, limits, tiny(), 4.0)
    rest, expected = weight.double(), torch.zeros(24, 160)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(160)
    order = hessian.diagonal().argsort(descending=True).tolist()
    for step, column in enumerate(order):
        inverse = torch.linalg.inv(damped[order[step:]][:, order[step:]])
        expected[:, column] = t.round_to_grid(
            rest[:, column, None], scale[:, column, None], limits
        )[:, 0].float()
        error = (rest[:, column] - expected[:, column] * scale[:, column]) / inverse[0, 0]
        rest[:, order[step:]] -= error[:, None] * inverse[0]
    integers = gptq(weight, hessian, scale, limits)
    assert (integers == expected).float().mean() > 0.99  # float32 may round a tie the other way


def test_gptq_with_independent_inputs_is_plain_rounding():
    weight, _ = correlated_problem()
    limits = row_limits(24, 4)
    scale = grid_scale(weight, limits, tiny(), 4.0)
    assert torch.equal(
        gptq(weight, torch.eye(160), scale, limits), t.round_to_grid(weight, scale, limits)
    )


def test_gptq_of_a_stack_is_gptq_of_each():
    """Each with its own order of columns, damping, grid and limits."""
    limits = [row_limits(24, 4), row_limits(24, 0), row_limits(24, 24)]
    problems = []
    for seed, own in enumerate(limits):
        weight, hessian = correlated_problem(seed=seed)
        problems.append(
            (weight, (1 + seed) * hessian, grid_scale(weight, own, tiny(), 4.0 + seed), own)
        )
    alone = torch.stack([gptq(*problem) for problem in problems])
    together = gptq(*(torch.stack(parts) for parts in zip(*problems, strict=True)))
    assert (
        together == alone
    ).float().mean() > 0.999  # a product of stacks may round a tie the other way


def test_gptq_stays_on_the_grid_with_eight_bits_in_the_last_rows():
    weight, hessian = correlated_problem()
    weight[3] *= 100
    limits = row_limits(24, 4)
    integers = gptq(
        weight, hessian, grid_scale(weight, limits, tiny(sdclip_k_int8=2.0), 2.0), limits
    )
    assert torch.equal(integers, integers.round())
    assert integers[:20].abs().max() == 31
    assert integers[20:].abs().max() == 127


def test_gptq_survives_inputs_that_never_fire_and_inputs_that_are_equal():
    """A singular Hessian needs damping; a dead column's weight must not be spread over the
    others.
    """
    weight, hessian = correlated_problem()
    hessian[:, 7] = hessian[:, 5]
    hessian[7] = hessian[5]
    hessian[9] = hessian[:, 9] = 0
    limits = row_limits(24, 0)
    scale = grid_scale(weight, limits, tiny(), 4.0)
    integers = gptq(weight, hessian, scale, limits)
    assert integers.isfinite().all()
    assert not integers[:, 9].any()
    plain = t.round_to_grid(weight, scale, limits)
    assert (
        hessian_error(weight, integers * scale, hessian)
        < hessian_error(weight, plain * scale, hessian) / 3
    )


def test_a_damping_that_is_too_small_is_raised_until_it_helps():
    """GPTQ_DAMP=1e-20 on inputs of one direction: "training diverged" was said of a sound run."""
    torch.manual_seed(0)
    column = torch.randn(64, 1)
    _, upper, _ = t.factor_hessian(column @ column.T, 1e-30)
    assert upper.isfinite().all()
    with pytest.raises(t.UserError, match="diverged"):
        t.factor_hessian(torch.full((4, 4), torch.nan), 1e-30)


def test_blocks_change_speed_alone_and_much_damping_makes_gptq_plain_rounding():
    weight, hessian = correlated_problem()
    limits = row_limits(24, 4)
    scale = grid_scale(weight, limits, tiny(), 4.0)
    usual = gptq(weight, hessian, scale, limits)
    for block_size in (1, 7, 64, 1000):
        same = gptq(weight, hessian, scale, limits, block_size=block_size) == usual
        assert same.float().mean() > 0.99
    plain = t.round_to_grid(weight, scale, limits)
    damped = gptq(weight, hessian, scale, limits, damp=1e6)
    assert (damped == plain).float().mean() > 0.999 > 0.95 > (usual == plain).float().mean()


@pytest.mark.parametrize("changes", [{"gptq_block_size": 1}, {"trellis_states": 4}], ids=str)
def test_gptq_s_settings_reach_it(changes, monkeypatch):
    settings, gptq, seen = tiny(**changes), t.gptq, []

    def remember(*arguments):
        seen.append(arguments[7:])
        return gptq(*arguments)

    monkeypatch.setattr(t, "gptq", remember)
    exported(random_model(settings), settings)
    expected = {"gptq_block_size": 128, "trellis_states": 0} | changes
    assert set(seen) == {tuple(expected.values())}


def test_damping_is_gptq_damp_s(tmp_path, monkeypatch):
    settings, factor, seen = tiny(gptq_damp=0.5), t.factor_hessian, []

    def remember(hessian, damp=0.5):  # that of no Hessian does not count
        seen.append(damp)
        return factor(hessian, damp)

    monkeypatch.setattr(t, "factor_hessian", remember)
    export_to(tmp_path / "a", settings, random_model(settings), 10**6)
    assert set(seen) == {0.5}


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_ranks_share_the_factors_of_hessians_and_get_the_same_bits(monkeypatch, world_size):
    """Each had factored all of them. A bool is summed too, and an order of columns."""
    factor = t.factor_hessian
    factored = []
    monkeypatch.setattr(t, "factor_hessian", lambda *a: (factored.append(len(a[0])), factor(*a))[1])
    torch.manual_seed(0)
    inputs = {
        name: torch.randn(50, columns) for name, columns in zip("abcdefg", [8, 4] * 4, strict=False)
    }
    inputs["a"][:, 3] = 0.0  # never seen
    hessians = {name: 2 * x.T @ x for name, x in inputs.items()}
    alone = {name: factor(hessian, 0.02) for name, hessian in hessians.items()}
    shares = run_ranks(world_size, lambda ranks: t.factor_hessians({**hessians}, 0.02, ranks))
    assert sorted(factored) == [4] * 3 + [8] * 4
    for shared in shares:
        assert shared.keys() == alone.keys()
        for name, tensors in shared.items():
            for tensor, wanted in zip(tensors, alone[name], strict=True):
                assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted)


def test_every_rank_ends_where_one_s_hessian_is_not_finite():
    """Others would wait for its factors."""
    hessians = {"a": torch.eye(4), "b": torch.eye(4).fill_(torch.nan)}

    def diverge(ranks: t.Ranks) -> str:
        with pytest.raises(t.UserError, match="training diverged") as caught:
            t.factor_hessians({**hessians}, 0.01, ranks)
        return str(caught.value)

    assert len(run_ranks(2, diverge)) == 2


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_gptq_ends_where_no_damping_helps(poison):
    """Activations that are not finite make such a Hessian."""
    weight, hessian = correlated_problem()
    hessian[3, 3] = poison
    limits = row_limits(24, 0)
    with pytest.raises(t.UserError, match="training diverged"):
        gptq(weight, hessian, grid_scale(weight, limits, tiny(), 4.0), limits)


@pytest.mark.parametrize("rows", [(1e-9, 1.0, 1e4), (0.0, 1.0, 1.0)], ids=str)
@each_quantizer
def test_steps_are_positive_and_survive_float16(rows, quantizer):
    """Rows and columns of zeros must not divide by zero, and the stored steps must be those that
    were rounded with.
    """
    weight = torch.randn(3, 64) * torch.tensor(rows)[:, None]
    weight[:, 5] = 0
    steps = t.grid_steps(weight, row_limits(3, 1), tiny(quantizer=quantizer), 5.0)
    assert [step.shape for step in steps] == [(3, 1), (64,)]
    assert all(torch.equal(step.half().float(), step) and (step > 0).all() for step in steps)
    assert (
        (t.round_to_grid(weight, math.prod(steps), row_limits(3, 1)) * math.prod(steps))
        .isfinite()
        .all()
    )


def test_an_in_proj_of_another_mixer_has_no_rows_of_eight_bits_unless_it_says_so():
    model = random_model(tiny())
    layer = model.blocks[0].mixer.in_proj
    name = "blocks.0.mixer.in_proj.weight"
    usual = row_limits(len(layer.weight), layer.dynamics_rows)
    assert torch.equal(t.grid_limits(model)[name], usual)
    del layer.dynamics_rows
    assert torch.equal(t.grid_limits(model)[name], row_limits(len(layer.weight), 0))


@each_version
def test_rows_that_drive_the_recurrence_have_eight_bits_and_are_the_last(version):
    """Step size, decay, trapezoid and angles: 3 heads' worth and the angles in Mamba-3, the step
    size in Mamba-2.
    """
    settings = tiny(mamba_version=version)
    model = random_model(settings)
    limits = t.grid_limits(model)
    stored = t.quantize_model(model, settings, SOLO, {}, 12.85)
    heads, angles = 64 // 16, 8 // 2 // 2
    expected = 3 * heads + angles if version == 3 else heads
    for layer in (0, 2):
        name = f"blocks.{layer}.mixer.in_proj.weight"
        assert torch.equal(limits[name], row_limits(2 * 64 + 2 * 8 + expected, expected))
        weight = model.get_parameter(name).detach()
        error = (dequantized(stored, name) - weight).norm(dim=1) / weight.norm(dim=1)
        assert error[-expected:].max() < error[:-expected].min() / 2
    assert torch.equal(limits["embedding.weight"], row_limits(512, 512))
    assert torch.equal(limits["blocks.1.mixer.query.weight"], row_limits(32, 0))
    assert {stored[f"{name} integers"].dtype for name in limits} == {torch.int8}
    assert {stored[name].dtype for name in limits} == {torch.float16}
    types = {name: stored[name].dtype for name, _ in model.named_parameters() if name not in limits}
    assert {types.pop(name) for name in list(types) if name.endswith((".dt_bias", ".D"))} == {
        torch.float32
    }
    assert set(types.values()) == {torch.float16}
    assert {
        name for name, p in model.named_parameters() if p.dim() == 2 and name.endswith("weight")
    } - set(limits) == (
        {f"blocks.{layer}.mixer.conv.weight" for layer in (0, 2)} if version == 2 else set()
    )


def test_hessians_are_twice_the_sum_of_outer_products_of_the_inputs():
    """Of every linear layer, over all batches and over both passes of a layer that repeats."""
    settings = tiny(layer_order="0,1,1,2", unet_skips=False)
    model, tokens = random_model(settings), random_tokens(5, 32)
    seen, scanned = [], []
    handles = [
        model.blocks[1].mixer.query.register_forward_hook(
            lambda module, args, out: seen.append(args[0])
        ),
        model.blocks[0].mixer.out_proj.register_forward_hook(
            lambda module, args, out: scanned.append(args[0])
        ),
    ]
    with torch.no_grad():
        final = model(tokens, model.order(True)).flatten(0, 1)
    for handle in handles:
        handle.remove()
    hessians, _ = t.collect_costs(model, tokens.split(2), SOLO)
    x = torch.cat([part.flatten(0, 1) for part in seen])
    assert len(seen) == 2
    assert relative(hessians["blocks.1.mixer.query.weight"], 2 * x.T @ x) < 1e-5
    assert relative(hessians["embedding.weight"], 2 * final.T @ final) < 1e-5
    (y,) = (
        part.flatten(0, 1) for part in scanned
    )  # what is normed behind the product counts as normed
    y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt()
    assert relative(hessians["blocks.0.mixer.out_proj.weight"], 2 * y.T @ y) < 1e-5
    missing = set(t.grid_limits(model)) - set(hessians)
    assert missing == {"bigram_embedding.weight"}
    untied = random_model(tiny(tie_embeddings=False))
    hessians, _ = t.collect_costs(untied, tokens.split(2), SOLO)
    limits = t.grid_limits(untied)
    assert set(limits) - set(hessians) == {"bigram_embedding.weight", "embedding.weight"}
    for name in ("embedding.weight", "output_embedding.weight"):
        assert torch.equal(limits[name], row_limits(512, 512))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("call", ["positional", "by name"])
def test_a_hessian_is_of_what_the_weight_sees_however_a_scale_is_passed(call, monkeypatch):
    """out_proj's rows are scaled behind the product: its Hessian is of the scaled rows."""
    settings = tiny()
    model, tokens = random_model(settings), random_tokens(4, 32)
    scale = torch.rand(2, 32, 1) + 0.5
    seen = []

    def forward(mixer, u, context, state=None):
        layer = mixer.out_proj
        y = mixer.in_proj(u)[..., : layer.in_features]
        if mixer is model.blocks[0].mixer:
            seen.append((y * scale).flatten(0, 1))
        y = layer(y, scale) if call == "positional" else layer(y, scale=scale)
        return y, state

    monkeypatch.setattr(t.Mamba, "forward", forward)
    with torch.no_grad():
        hessian = t.collect_costs(model, tokens.split(2), SOLO)[0]["blocks.0.mixer.out_proj.weight"]
    x = torch.cat(seen)
    assert relative(hessian, 2 * x.T @ x) < 1e-6


SELF = {"calibration": "self", "calibration_tokens": 256, "gptq_gen_len": 16}


def own_texts(world_size: int = 1, **changes) -> list[torch.Tensor]:
    """What a model writes on each rank for its own calibration."""
    settings = tiny(**SELF | changes)
    model = random_model(tiny())

    def write(ranks: t.Ranks) -> torch.Tensor:
        return t.calibration_sequences(model, settings, ranks, batches=None)

    return run_ranks(world_size, write)


def test_a_model_s_own_calibration_text_is_what_it_would_write(monkeypatch):
    """Many texts at once, behind BOS, each token by the model's probabilities
    at that temperature.
    """
    (texts,) = own_texts()
    assert texts.shape == (16, 16)
    assert (texts[:, 0] == t.BOS_ID).all()
    assert len({tuple(text.tolist()) for text in texts}) == 16
    monkeypatch.setattr(t, "TEXTS_AT_ONCE", 5)  # the last four ones are fewer
    assert own_texts()[0].shape == (16, 16)
    model = random_model(tiny())
    (cold,) = own_texts(gptq_gen_temp=0.05)
    nats = model.score(cold[:, :-1], cold[:, 1:], model.order(True))
    hot = model.score(texts[:, :-1], texts[:, 1:], model.order(True))
    assert nats.mean() < hot.mean() - 1


def test_a_model_s_own_calibration_text_is_by_seed_and_rank():
    assert torch.equal(*own_texts(), *own_texts())
    assert not torch.equal(*own_texts(), *own_texts(seed=5))
    first, second = own_texts(2)
    assert first.shape == second.shape == (8, 16)
    assert not torch.equal(first, second)
    assert all(map(torch.equal, own_texts(2), (first, second)))


def test_a_text_is_no_longer_than_the_model_s_window():
    assert own_texts(gptq_gen_len=1000)[0].shape == (8, 32)
    assert own_texts(calibration_tokens=1)[0].shape == (1, 16)


@each_quantizer
def test_two_ranks_quantize_to_the_same_bits_as_one(quantizer):
    settings = tiny(quantizer=quantizer)
    model, tokens = random_model(settings), random_tokens(4, 32)
    factors = collect_factors(model, tokens, rows=2)
    alone = t.quantize_model(model, settings, SOLO, factors, 5.0)
    for stored in run_ranks(
        2, lambda ranks: t.quantize_model(model, settings, ranks, factors, 5.0)
    ):
        assert t.pack_artifact(settings, stored) == t.pack_artifact(settings, alone)


def layer_error(
    quantizer: str, weight: torch.Tensor, hessian: torch.Tensor, k: float = 5.0
) -> float:
    """Of the outputs of a layer that is quantized as export() does it, as a part of the outputs."""
    settings, limits = tiny(quantizer=quantizer), row_limits(len(weight), 0)
    scale = grid_scale(weight, limits, settings, k)
    known = torch.eye(len(hessian)) if quantizer == "round" else hessian
    error = hessian_error(weight, gptq(weight, known, scale, limits) * scale, hessian)
    return error / hessian_error(weight, torch.zeros_like(weight), hessian)


def test_with_outliers_the_other_grids_beat_plain_rounding_and_on_outlying_columns_sdclip_too():
    """Outliers widen a row's grid for all its weights: a percentile ignores them, steps of columns
    take them out.
    """
    weight, hessian = correlated_problem()
    generator = torch.Generator().manual_seed(1)

    def error(quantizer, weights):
        return layer_error(quantizer, weights, hessian)

    scattered = torch.where(torch.rand(24, 160, generator=generator) < 0.01, 30 * weight, weight)
    assert error("gptq", scattered) < error("round", scattered)
    assert error("percentile", scattered) < error("gptq", scattered)
    assert error("dsq", scattered) < error("round", scattered)
    columns = weight.clone()
    columns[:, ::40] *= 30
    for grid in ("percentile", "dsq"):
        assert error(grid, columns) < error("round", columns)
    assert error("dsq", columns) < error("gptq", columns) / 2


def test_percentile_takes_the_one_that_errs_least_in_each_row():
    weight, _ = correlated_problem()
    weight[::3] = weight[::3] ** 5  # heavy tails, which the grid should cut in another place
    limits, settings = row_limits(24, 4), tiny(quantizer="percentile", sdclip_k_int8=3.0)
    rows, columns = t.grid_steps(weight, limits, settings, 3.0)
    assert (columns == 1).all()
    for row, limit, step in zip(weight, limits, rows, strict=True):
        ordered, errors = row.abs().sort().values, {}
        for percentile in (0.99, 0.995, 0.998, 1.0):
            scale = (ordered[int(percentile * 160) - 1] / limit).half().float()
            errors[float(scale)] = float(
                (row - t.round_to_grid(row, scale, limit) * scale).square().sum()
            )
        assert float(step) == min(errors, key=errors.get)
    assert (
        len(
            {
                float(row.abs().max() / step / limit)
                for row, step, limit in zip(weight, rows, limits, strict=True)
            }
        )
        > 2
    )


def test_decoupled_scales_make_rows_and_columns_alike():
    """A matrix that is but scaled along both sides has the same integers."""
    weight, _ = correlated_problem()
    limits, settings = row_limits(24, 4), tiny(quantizer="dsq")
    scaled = (
        weight
        * 2.0 ** torch.arange(-5, 7).repeat(2)[:, None]
        * 2.0 ** torch.arange(-4, 4).repeat(20)
    )
    rows, columns = t.grid_steps(scaled, limits, settings, 5.0)
    integers = t.round_to_grid(scaled, rows * columns, limits)
    sizes = integers.square().mean(dim=0).sqrt()
    assert sizes.max() < 1.6 * sizes.min()
    assert (columns[7] / columns[0]).log2() == pytest.approx(7, abs=0.6)


def test_ternary_rows_are_rounded_by_their_mean_magnitude():
    """BitNet b1.58's rule; the rows that need eight bits keep them."""
    settings = tiny(quantizer="ternary")
    model = random_model(settings)
    limits = t.grid_limits(model)
    stored = exported(model, settings)
    for name, row_limit in limits.items():
        integers, weight = stored[f"{name} integers"], model.get_parameter(name).detach()
        assert set(row_limit.flatten().tolist()) <= {1.0, 127.0}
        ternary = row_limit.flatten() == 1
        mean = weight[ternary].abs().mean(dim=1, keepdim=True)
        assert set(integers[ternary].unique().tolist()) <= {-1, 0, 1}
        agree = integers[ternary] == (weight[ternary] / mean).round().clamp(-1, 1)
        assert (~agree).sum() <= 0.01 * agree.numel()  # the stored step is a float16
        assert ternary.all() or integers[~ternary].abs().max() > 1
    assert {name for name in limits if (limits[name] == 1).any()} == set(model.linear_layers()) | {
        "bigram_embedding.weight"
    }


# ---- Quantization-aware training -----------------------------------------------------------------


def test_fake_quantization_stands_on_the_grid_and_restores_the_weights_exactly():
    settings = tiny(sdclip_k=4.0)
    model = random_model(settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    k, matrices = t.fit_sdclip(model, settings, 1e6), t.grid_limits(model)
    with t.fake_quantization(model, matrices, k):
        for name, p in model.named_parameters():
            if name not in matrices:
                assert torch.equal(p, before[name])
                continue
            assert not torch.equal(p, before[name]), name
            limits = matrices[name]
            steps = p / grid_scale(before[name], limits, settings, 4.0)
            assert torch.allclose(steps, steps.round(), atol=1e-3)
            assert (steps.abs() <= limits + 1e-3).all()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ZeroDivisionError), t.fake_quantization(model, matrices, k):
        raise ZeroDivisionError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@each_quantizer
def test_fake_quantization_is_what_export_without_a_hessian_stores(quantizer):
    """Otherwise training would adapt to another grid than the artifact has."""
    settings = tiny(sdclip_k=4.0, quantizer=quantizer)
    model = random_model(settings)
    stored = t.quantize_model(model, settings, SOLO, {}, 4.0)
    with t.fake_quantization(model, t.grid_limits(model), t.fit_sdclip(model, settings, 1e6)):
        for name in t.grid_limits(model):
            assert torch.equal(model.get_parameter(name), dequantized(stored, name)), name


def test_gradients_pass_straight_through_the_rounding():
    settings = tiny()
    model, other = random_model(settings), random_model(settings)
    tokens = random_tokens(2, 33)
    with t.fake_quantization(model, t.grid_limits(model), t.fit_sdclip(model, settings, 1e6)):
        rounded = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.loss(tokens[:, :-1], tokens[:, 1:], model.order(True)).backward()
    other.load_state_dict(rounded)
    other.loss(tokens[:, :-1], tokens[:, 1:], model.order(True)).backward()
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


# ---- Fitting the size ----------------------------------------------------------------------------


def wide_model(quantizer: str = "gptq") -> tuple[t.Settings, t.Model]:
    """Some 250,000 Gaussian weights."""
    settings = tiny(model_dim=128, mamba_head_dim=32, sdclip_k=0.0, quantizer=quantizer)
    return settings, random_model(settings)


def exported(model: t.Model, settings: t.Settings, k: float = 5.0) -> dict[str, torch.Tensor]:
    return t.quantize_model(model, settings, SOLO, {}, k)


@pytest.mark.parametrize("quantizer", ["gptq", "ternary"])
def test_bytes_by_kind_are_those_of_the_code_and_come_to_the_file(quantizer):
    settings, model = wide_model(quantizer)
    stored = exported(model, settings)
    size = len(t.pack_artifact(settings, stored))
    sizes = t.bytes_by_kind(model, stored, size)
    assert sum(sizes.values()) == size and 0 < sizes["rest"] < 0.15 * size
    few = "int2" if quantizer == "ternary" else "int6"
    kinds = {f"{kind}, {few}" for kind in t.KINDS.values()} - {f"embedding, {few}"}
    assert sizes.keys() == kinds | {"embedding, int8", "Mamba in, int8", "rest"}
    least, states = (dict.fromkeys(t.KINDS.values(), 0) for _ in range(2))
    for name in t.grid_limits(model):
        symbols = stored[f"{name} integers"].numpy().view(np.uint8).ravel()
        _, words = t.encode_integers(symbols.astype(np.int32), 1)
        least[t.layer_kind(name)] += 2 * len(words) - 4 * t.ANS_LANES
        states[t.layer_kind(name)] += 4 * t.ANS_LANES
    for kind, code in least.items():
        told = sum(count for name, count in sizes.items() if name.startswith(f"{kind},"))
        assert 0.99 * code < told < 1.01 * code + states[kind], kind


def test_a_row_of_eight_bits_is_told_from_the_others():
    """Beside a coarse grid of six bits, its integers are larger, so rarer, so longer."""
    settings, model = wide_model()
    sizes = t.bytes_by_kind(model, exported(model, settings, 16.0), 10**6)
    matrices = {n: m for n, m in model.named_modules() if n.endswith("in_proj")}
    eight = sum(m.dynamics_rows * m.in_features for m in matrices.values())
    six = sum(m.weight.numel() for m in matrices.values()) - eight
    assert sizes["Mamba in, int8"] / eight > 1.1 * sizes["Mamba in, int6"] / six


@pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if name != "ternary"])
def test_the_grid_is_as_fine_as_the_target_allows_and_the_real_file_fits(quantizer):
    settings, model = wide_model(quantizer)
    finest, coarsest = (t.predict_bytes(model, settings, k) for k in (4.0, 16.0))
    assert coarsest < 0.9 * finest
    for target in (0.4 * coarsest + 0.6 * finest, 0.8 * coarsest + 0.2 * finest):
        k = t.fit_sdclip(model, settings, target)
        assert (
            t.predict_bytes(model, settings, k)
            <= target
            < t.predict_bytes(model, settings, k - 0.1)
        )
        data = t.pack_artifact(settings, exported(model, settings, k))
        assert 0.9 * target < len(data) <= target
    assert t.fit_sdclip(model, settings, 1.01 * finest) == 4.0
    assert t.fit_sdclip(model, settings, 0.5 * coarsest) == 16.0
    assert t.fit_sdclip(model, tiny(sdclip_k=7.0), 1.0) == 7.0


def test_row_steps_are_rounded_so_that_they_take_few_bytes():
    """Within a sixteenth, to numbers of four leading bits; no step is 0 or beyond float16."""
    steps = 2 ** torch.linspace(-20, 20, 4001)
    coarse = t.coarse_steps(steps)
    inside = (steps > 2**-14) & (steps < 60_000)
    assert ((coarse / steps - 1).abs()[inside] <= 1 / 16).all()
    mantissas, _ = torch.frexp(coarse)
    assert torch.equal(16 * mantissas, (16 * mantissas).round())
    assert coarse.min() == 2**-14 and torch.equal(coarse, coarse.half().float())
    assert (coarse.diff() >= 0).all()


def test_a_file_ends_close_below_what_it_may_take(tmp_path):
    """With tables in common and steps by what errors cost; a small model has a small margin."""
    settings = tiny(model_dim=192, mamba_head_dim=32, sdclip_k=0.0, sdclip_most=20.0)
    settings = with_settings(settings, shared_tables=True, sdclip_by_matrix=1.0, sdclip_by_row=0.5)
    model = random_model(settings)
    target = int(t.predict_bytes(model, settings, 9.0))
    said = export_to(tmp_path / "a", settings, model, target)
    assert len([text for text in said if text.startswith("GPTQ at k=")]) == 1
    assert 0.985 * target < (tmp_path / "a").stat().st_size <= target


def test_the_fit_of_k_finds_the_same_k_for_the_same_bytes():
    """A fixed target: what a run has to fit follows the size of the script itself."""
    settings = tiny(model_dim=128, mamba_head_dim=32, sdclip_k=0.0)
    model = t.build_model(settings, SOLO)
    for name, p in model.named_parameters():  # by a formula: no generator's version matters
        phases = torch.arange(p.numel(), dtype=torch.float64) * 12.9898 + sum(name.encode())
        wave = torch.sin(phases)
        uniform = (wave * 43_758.5453).abs().frac().clamp(1e-6, 1 - 1e-6)
        p.data = torch.special.ndtri(uniform).float().view(p.shape)
    targets = (10**9, 390_000, 370_000, 340_000, 310_000, 1)
    fitted = [t.fit_sdclip(model, settings, target) for target in targets]
    assert fitted == [4.0, 5.03, 6.17, 8.41, 11.5, 16.0]


class Quiet:
    """A log that keeps what it was told."""

    def __init__(self):
        self.said: list[str] = []

    def track(self, what: str, items):
        return items

    def __call__(self, text: str, event: str = "", **values) -> None:
        self.said.append(text)


def export_to(
    path: Path, settings: t.Settings, model: t.Model, target: int, ranks: t.Ranks = SOLO
) -> list[str]:
    """Runs export() as behind a training run, on random tokens; returns what it logged."""
    settings = with_settings(settings, artifact=str(path))
    trainer = types.SimpleNamespace(
        model=model,
        settings=settings,
        ranks=ranks,
        log=Quiet(),
        calibration_rows=1 if settings.shares_bits else 2,
        clock=t.TrainingClock(),
        target_bytes=target,
        tokenizer_sha256="",
    )
    tokens = random_tokens(4 // ranks.world_size, 32, seed=ranks.rank)
    values = t.export(trainer, types.SimpleNamespace(next=lambda: (tokens, tokens)))
    kinds = values.pop("bytes_by_kind")
    assert sum(kinds.values()) in [path.stat().st_size for path in path.parent.glob("*")]
    assert values == {
        "sdclip_k": values["sdclip_k"],
        "train_clock_seconds": trainer.clock.seconds(),
    }
    return trainer.log.said


@pytest.mark.parametrize("sdclip_k", [0.0, 5.0])
def test_an_artifact_that_is_too_large_is_quantized_again_until_it_fits_and_not_much_further(
    tmp_path, monkeypatch, sdclip_k
):
    """Whether the prediction was wrong or SDCLIP_K too fine; on every rank alike, and all of it on
    the training clock.
    """
    settings, model = wide_model()
    settings = with_settings(settings, sdclip_k=sdclip_k)
    predict = t.predict_bytes
    monkeypatch.setattr(t, "predict_bytes", lambda *a, **b: 0.93 * predict(*a, **b))
    target = int(predict(model, settings, 6.0))

    def export(ranks: t.Ranks) -> list[str]:
        said = export_to(
            tmp_path / f"{ranks.world_size}", settings, copy.deepcopy(model), target, ranks
        )
        return [re.sub(r"[\d.]+s\b", "", text) for text in said]

    for world_size in (1, 2):
        said, *others = run_ranks(world_size, export)
        assert all(other == said for other in others)
        assert len([text for text in said if text.startswith("GPTQ at k=")]) >= 2
        assert 0.9 * target < (tmp_path / f"{world_size}").stat().st_size <= target, said
        t.load_model(tmp_path / f"{world_size}", tiny(), set(), SOLO)


def test_what_gptq_adds_to_weights_is_foretold(tmp_path):
    """Errors of columns widen those behind them, on coarse grids and for few texts so much that a
    file whose nearest integers fit is too large, and all would be quantized twice.
    """
    settings = tiny(model_dim=128, mamba_head_dim=32, sdclip_k=0.0, sdclip_most=120.0)
    model = random_model(settings)
    solvers = collect_factors(model, random_tokens(1, 32), rows=1)
    stored = t.quantize_model(model, settings, SOLO, solvers, 60.0)
    size = len(t.pack_artifact(settings, stored))
    nearest, told = (t.predict_bytes(model, settings, 60.0, given) for given in (None, solvers))
    assert nearest < 0.99 * size < size < told < 1.06 * size
    assert (
        t.fit_sdclip(model, settings, size - 1)
        < 60
        < t.fit_sdclip(model, settings, size - 1, solvers)
    )
    trellis = with_settings(settings, trellis_states=8)
    fine = [t.predict_bytes(model, trellis, 8.0, given) for given in (None, solvers)]
    assert fine[0] < fine[1] < 1.002 * fine[0]  # where steps are small there is little to add


def test_what_calibration_spends_on_factors_is_no_time_of_hessians(tmp_path, monkeypatch):
    """By a clock that goes on three seconds a pass over the text, one a factor, and not else."""
    now = [0.0]
    for name, seconds in (("collect_costs", 3.0), ("factor_hessian", 1.0)):
        usual = getattr(t, name)

        def slow(*arguments, usual=usual, seconds=seconds):
            now[0] += seconds
            return usual(*arguments)

        monkeypatch.setattr(t, name, slow)
    monkeypatch.setattr(t, "synchronized_time", lambda: now[0])
    model = random_model(tiny())
    factors = len(model.linear_layers()) + 1  # and one of the output matrix
    said = export_to(tmp_path / "a", tiny(sdclip_by_matrix=1.0), model, 10**6)
    (line,) = [text for text in said if text.startswith("calibration: ")]
    assert line.endswith(f"; text 0.00s, pass 3.00s, factor {factors}.00s")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("source", ["train", "self"])
def test_calibration_s_source_tokens_and_seconds_are_logged(tmp_path, source, world_size):
    """And the two sources make two artifacts."""
    settings = tiny(**SELF | {"calibration": source})
    model = random_model(settings)

    def export(ranks: t.Ranks) -> list[str]:
        return export_to(tmp_path / "a", settings, copy.deepcopy(model), 10**6, ranks)

    said = run_ranks(world_size, export)[0]
    (line,) = [text for text in said if text.startswith("calibration: ")]
    words = {"train": "training text", "self": "text that the model wrote"}[source]
    seconds = r"text [\d.]+s, pass [\d.]+s, factor [\d.]+s"
    assert re.fullmatch(rf"calibration: 256 tokens of {words}; {seconds}", line)
    took = r"GPTQ at k=.+; training clock [\d.]+s, of which this took [\d.]+s"
    assert any(re.fullmatch(took, text) for text in said)
    export_to(tmp_path / "round", with_settings(settings, quantizer="round"), model, 10**6)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "round").read_bytes()
    if source == "self":
        export_to(tmp_path / "other", with_settings(settings, calibration="train"), model, 10**6)
        assert (tmp_path / "a").read_bytes() != (tmp_path / "other").read_bytes()


def test_coarser_grids_are_tried_up_to_sdclip_most(tmp_path):
    settings, model = wide_model()
    assert t.fit_sdclip(model, with_settings(settings, sdclip_most=30.0), 1) == 30.0
    target = int(t.predict_bytes(model, settings, 20.0))
    with pytest.raises(t.UserError, match="raise it or SDCLIP_MOST, or make the model smaller"):
        export_to(tmp_path / "a", settings, model, target)
    export_to(tmp_path / "a", with_settings(settings, sdclip_most=30.0), model, target)
    assert (tmp_path / "a").stat().st_size <= target


def test_a_model_that_could_not_be_loaded_again_is_refused_before_it_is_trained(shards):
    """Of more numbers than the loader takes: before there is memory for any."""
    settings = tiny(bigram_vocab_size=1 << 20, bigram_dim=100, data_path=str(shards))
    training = t.open_shards(str(shards), "train")
    with bounded(more_memory=64 << 20), pytest.raises(t.UserError, match="has at most 67,108,864"):
        t.train_and_export(settings, SOLO, training, None, Quiet())


@each_quantizer
def test_every_quantizer_exports_within_the_target_and_reads_its_own_grid_back(tmp_path, quantizer):
    settings, model = wide_model(quantizer)
    target = int(t.predict_bytes(model, settings, 6.0)) + 1000
    said = export_to(tmp_path / "a", settings, model, target)
    assert any(text.startswith(f"{quantizer.upper()} at k=") for text in said)
    assert (tmp_path / "a").stat().st_size <= target
    loaded, _ = t.load_model(tmp_path / "a", tiny(), set(), SOLO)
    k = float(re.findall(r" at k=(.+);", "\n".join(said))[-1])
    for name, limits in t.grid_limits(model).items():
        scale = grid_scale(model.get_parameter(name).detach(), limits, settings, k)
        steps = loaded.get_parameter(name).detach() / scale
        assert relative(steps, steps.round()) < 5e-3  # k is a rounded one
        assert (steps.abs() <= 1.01 * limits).all()


@pytest.mark.parametrize("sdclip_k", [0.0, 5.0, 20.0])
@pytest.mark.parametrize("target", [1000, -1000])
def test_an_artifact_that_cannot_fit_is_an_error_that_says_what_to_do(tmp_path, sdclip_k, target):
    settings = tiny(sdclip_k=sdclip_k)
    with pytest.raises(
        t.UserError, match=f"of {target} at SDCLIP_K=.*raise it or SDCLIP_MOST, or make the model"
    ):
        export_to(tmp_path / "a", settings, random_model(settings), target)
    assert not list(tmp_path.iterdir())


# ---- Packing -------------------------------------------------------------------------------------


ODD = {
    "model_dim": 36,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mamba_head_dim": 8,
    "mlp_mult": 1.3,
    "bigram_dim": 5,
    "tie_embeddings": False,
}


@each_version
@each_quantizer
@pytest.mark.parametrize("changes", [{}, ODD], ids=["even", "odd sizes"])
def test_what_is_read_back_is_bit_equal_to_what_was_quantized(
    version, quantizer, changes, tmp_path
):
    settings = tiny(mamba_version=version, quantizer=quantizer, **changes)
    model = random_model(settings)
    stored = exported(model, settings)
    (tmp_path / "a").write_bytes(t.pack_artifact(settings, stored, "00ff"))
    header, _ = t.read_artifact(tmp_path / "a")
    assert header.pop("tokenizer_sha256") == "00ff"
    assert (header.pop("preset"), header.pop("train_seq_len")) == ("tiny", 32)
    assert header == {name: getattr(settings, name) for name in t.MODEL_FIELDS}
    loaded, loaded_settings = t.load_model(tmp_path / "a", tiny(), set(), SOLO)
    assert {name: getattr(loaded_settings, name) for name in t.MODEL_FIELDS} == header
    integers = {f"{name} integers" for name in t.grid_limits(model)}
    assert {name for name, _ in loaded.named_parameters()} | integers == set(stored)
    assert all(torch.equal(p, dequantized(stored, name)) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["vector", "steps"])
def test_an_artifact_with_numbers_that_are_not_finite_is_refused(tmp_path, number, kind):
    """Its score was nan, and the run's status 0."""
    settings = tiny()
    model = random_model(settings)
    stored = exported(model, settings)
    matrices = t.grid_limits(model)
    name = next(n for n, _ in model.named_parameters() if (n in matrices) == (kind == "steps"))
    stored[name].flatten()[0] = number
    (tmp_path / "a").write_bytes(t.pack_artifact(settings, stored))
    with pytest.raises(t.UserError, match=f"{name} has numbers that are not finite"):
        t.load_model(tmp_path / "a", tiny(), set(), SOLO)


def test_an_artifact_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "new" / "a"
    t.write_whole(path, b"one")
    t.write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a"]


# ---- A file that is not what it should be --------------------------------------------------------

# The smallest model there is: its artifact is read in a fraction of a millisecond.
MINUTE = SMALLEST | {"num_layers": 1, "bigram_vocab_size": 0}


@pytest.fixture(scope="module")
def minute() -> bytes:
    settings = tiny(**MINUTE)
    t.validate_settings(settings, 1)
    model = random_model(settings)
    with torch.device("meta"):  # torch's first on this device takes it seconds to import
        t.Model(settings, torch.device("meta"))
    return t.pack_artifact(settings, exported(model, settings))


def header_of(data: bytes) -> dict:
    return json.loads(data[8 : data.index(b"\n")])


def payload_of(data: bytes) -> bytes:
    return data[data.index(b"\n") + 1 : -32]


def parts_of(data: bytes) -> tuple[bytes, bytes]:
    """What the LZMA stream holds, and the coded integers behind it."""
    unpacker = lzma.LZMADecompressor()
    return unpacker.decompress(payload_of(data)), unpacker.unused_data


def sealed(data: bytes, header: dict | list | bytes, payload: bytes | None = None) -> bytes:
    """The artifact with another header, and perhaps other data, under a checksum that is right."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = data[:8] + text + b"\n" + (payload_of(data) if payload is None else payload)
    return body + hashlib.sha256(body).digest()


def load(path: Path, data: bytes) -> t.Model:
    path.write_bytes(data)
    with bounded(seconds=5, more_memory=1 << 29):
        return t.load_model(path, tiny(), set(), SOLO)[0]


def refused(path: Path, data: bytes) -> str:
    """What load_model() says against this file; fails if it is slow, greedy, or raises something
    else.
    """
    with pytest.raises(t.UserError) as error:
        load(path, data)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


def test_the_untouched_artifact_loads(minute, tmp_path):
    load(tmp_path / "a", minute)
    load(tmp_path / "a", sealed(minute, header_of(minute)))


def test_a_missing_artifact_is_refused(tmp_path):
    with pytest.raises(t.UserError, match="no artifact at"):
        t.read_artifact(tmp_path / "nothing")
    with pytest.raises(t.UserError, match="no artifact at"):
        t.read_artifact(tmp_path)
    with pytest.raises(t.UserError, match="no artifact at"):
        t.read_artifact(tmp_path / ("x" * 300))
    with pytest.raises(t.UserError, match="no artifact at"):
        t.read_artifact(Path("/dev/zero"))  # without an end


def test_an_artifact_that_cannot_be_read_is_refused(minute, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(minute)

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    for method in ("stat", "read_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(t.os.path, "isfile", lambda _: True)
            patch.setattr(Path, method, fail)
            with pytest.raises(t.UserError, match=f"cannot read {path}: Permission denied"):
                t.read_artifact(path)
            assert method == "stat" or t.file_sha256(str(path)) == ""


def test_truncation_is_refused_wherever_it_cuts(minute, tmp_path):
    cuts = {0, 1, 7, 8, 11, 12, 43, 44, 45, len(minute) - 1, len(minute) - 31, len(minute) - 33}
    for size in cuts | set(range(0, len(minute), 17)):
        refused(tmp_path / "a", minute[:size])


def test_every_flipped_byte_is_refused(minute, tmp_path):
    generator = random.Random(0)
    for place in {*range(60), *range(0, len(minute), 13), *range(len(minute) - 40, len(minute))}:
        data = bytearray(minute)
        data[place] ^= generator.randrange(1, 256)
        refused(tmp_path / "a", bytes(data))


@pytest.mark.parametrize("extra", [b"\0", b"x" * 32, b"\0" * 10_000], ids=len)
def test_appended_bytes_are_refused(minute, tmp_path, extra):
    refused(tmp_path / "a", minute + extra)
    refused(tmp_path / "a", extra + minute)


def test_a_file_far_over_the_cap_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with bounded(), pytest.raises(t.UserError, match="far too large"):
        t.read_artifact(tmp_path / "a")


HUGE = 10**9


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": HUGE},
        {"num_layers": HUGE, "mamba_layers": "all"},
        {"num_layers": 10**30},
        {"num_layers": 0},
        {"num_layers": True},
        {"num_layers": 1.0},
        {"num_layers": "1"},
        {"num_layers": None},
        {"model_dim": HUGE},
        {"model_dim": 1 << 20, "num_heads": 1},
        {"model_dim": 1 << 40},
        {"model_dim": -8},
        {"vocab_size": 65_536, "model_dim": 1 << 16},
        {"vocab_size": 17},
        {"mlp_mult": 1e300},
        {"mlp_mult": 1e7},
        {"mamba_expand": 1e300},
        {"mamba_expand": 1e7},
        {"mamba_expand": math.inf},
        {"mamba_expand": math.nan},
        {"mamba_d_state": 1 << 30},
        {"mamba_head_dim": 1 << 40},
        {"mamba_layers": f"0-{HUGE}"},
        {"mamba_layers": f"0-{10**18}"},
        {"mamba_layers": "nonsense"},
        {"mamba_layers": ["0"]},
        {"layer_order": ",".join(["0"] * 100_000)},
        {"bigram_vocab_size": HUGE},
        {"bigram_vocab_size": 1 << 20, "bigram_dim": 1 << 20},
        {"qk_gain_init": -1.0},
        {"rope_fraction": 2.0},
        {"logit_softcap": math.inf},
        {"unet_skips": 1},
        {"mlp_layers": "none"},
        {"num_layers": 2, "mamba_layers": "0-1"},
    ],
    ids=lambda change: str(change)[:60],
)
def test_settings_in_the_header_that_cannot_be_are_refused(minute, tmp_path, change):
    """Quickly, and without building the monster they describe: its tensors are not in the file."""
    refused(tmp_path / "a", sealed(minute, header_of(minute) | change))


@pytest.mark.parametrize(
    "change", [lambda c: c[:-1], lambda c: c[: len(c) // 2], lambda c: b"", lambda c: c + b"xx"],
    ids=["shorter", "half", "none", "longer"],
)  # fmt: skip
@pytest.mark.parametrize("part", [0, 1], ids=["LZMA", "integers"])
def test_data_of_another_length_than_the_model_s_are_refused(minute, tmp_path, part, change):
    parts = list(parts_of(minute))
    parts[part] = change(parts[part])
    payload = lzma.compress(parts[0]) + parts[1]
    assert "not its header's model" in refused(
        tmp_path / "a", sealed(minute, header_of(minute), payload)
    )


@pytest.mark.parametrize("sums", [0, 65_535, 65_537, 2**32 - 1])
def test_frequencies_that_do_not_sum_up_are_refused(minute, tmp_path, sums):
    content, codes = parts_of(minute)
    table = np.frombuffer(content, "<u4", 256, len(content) - 4 * 256).astype(np.int64)
    assert table.sum() == 65_536
    table[table.argmax()] += sums - 65_536
    payload = lzma.compress(content[: -4 * 256] + table.astype("<u4").tobytes()) + codes
    assert "not its header's model" in refused(
        tmp_path / "a", sealed(minute, header_of(minute), payload)
    )


def test_integers_that_are_altered_are_refused(minute, tmp_path):
    """Without the checksum's help: the last state of every code must be the first of the coding."""
    content, codes = parts_of(minute)
    for place in range(0, len(codes), 97):
        altered = bytearray(codes)
        altered[place] ^= 1
        data = sealed(minute, header_of(minute), lzma.compress(content) + bytes(altered))
        assert "not its header's model" in refused(tmp_path / "a", data)


@given(
    st.one_of(
        st.lists(st.integers(-128, 127), min_size=1, max_size=2000),
        st.tuples(st.integers(0, 2**32 - 1), st.floats(0.01, 60), st.integers(1, 70_000)).map(
            lambda drawn: np.random.default_rng(drawn[0]).normal(size=drawn[2]) * drawn[1]
        ),
    ),
    st.integers(1, 3),
)
def test_coded_integers_come_back_and_take_their_entropy(numbers, count):
    """By one table of frequencies or by several, some of which no number has."""
    integers = np.clip(np.round(numbers), -128, 127).astype(np.int8)
    symbols = integers.view(np.uint8)
    tables = np.arange(len(symbols), dtype=np.int32) * 7 % 11 % count
    frequencies, words = t.encode_integers(256 * tables + symbols, count)
    decoded, rest = t.decode_integers(frequencies, np.append(words, np.uint16(7)), tables)
    assert (decoded == integers).all()
    assert rest.tolist() == [7]
    entropy = 0.0
    for table in range(count):
        counts = np.bincount(symbols[tables == table], minlength=256)
        counts = counts[counts > 0]
        entropy -= (counts * np.log2(counts / counts.sum())).sum()
    # A lane's state takes 32 bits, of which 16 hold numbers; the last row may not be full; rare
    # values cost a little more.
    assert 16 * len(words) <= 1.004 * entropy + 32 * t.ANS_LANES + 16 * 256


def test_values_that_take_more_slots_than_their_part_overflow_nothing():
    """Once what is taken back from the most frequent one went below zero, with a warning."""
    symbols = np.append(np.full(1_000_000, 5), np.arange(256)).astype(np.uint8)
    tables = np.zeros(len(symbols), np.int32)
    frequencies, words = t.encode_integers(symbols.astype(np.int32), 1)
    assert frequencies.sum() == 65_536
    decoded, _ = t.decode_integers(frequencies, words, tables)
    assert (decoded.view(np.uint8) == symbols).all()


def uneven_model() -> tuple[t.Settings, t.Model, dict[str, torch.Tensor]]:
    """And what is stored of it: integers of rows and of columns that reach octaves further."""
    settings, model = wide_model()
    stored = exported(model, settings)
    for name in t.grid_limits(model):
        rows, columns = stored[f"{name} integers"].shape
        rows = torch.randn(rows, 1, generator=torch.Generator().manual_seed(rows))
        columns = torch.randn(columns, generator=torch.Generator().manual_seed(columns))
        integers = stored[f"{name} integers"] * 2 ** (rows + columns / 2 - 1)
        stored[f"{name} integers"] = integers.round().clamp(-127, 127).to(torch.int8)
    return settings, model, stored


@pytest.mark.parametrize("shared", [False, True])
def test_integers_come_back_by_shared_tables_and_by_a_matrix_s_own(tmp_path, shared):
    """And by the audit's decoder, which knows nothing of the script's."""
    settings, model, stored = uneven_model()
    settings = with_settings(settings, shared_tables=shared)
    data = t.pack_artifact(settings, stored)
    (tmp_path / "a").write_bytes(data)
    loaded, read = t.load_model(tmp_path / "a", tiny(), set(), SOLO)
    assert read.shared_tables == shared
    matrices = t.grid_limits(model)
    layout = [
        decoder.Parameter(name, tuple(p.shape), name in matrices)
        for name, p in model.named_parameters()
    ]
    decoded = decoder.decode(decoder.take_apart(tmp_path / "a"), layout)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, dequantized(stored, name)), name
        assert torch.equal(p, torch.tensor(decoded[name])), name


def test_integers_that_reach_as_far_share_a_table_and_take_fewer_bytes():
    """What is told of the size by code_bits() beforehand, a matrix alone, holds for all at once."""
    settings, model, stored = uneven_model()
    sizes = {}
    for shared in (False, True):
        model.settings = with_settings(settings, shared_tables=shared)
        sizes[shared] = len(t.pack_artifact(model.settings, stored))
        told = t.bytes_by_kind(model, stored, sizes[shared])
        assert 0 < told["rest"] < 0.2 * sizes[shared]
    assert sizes[True] < 0.92 * sizes[False]
    reaches = t.measure_reaches(model.settings, torch.tensor([[4, -4], [8, 8]], dtype=torch.int8))
    assert reaches.tolist() == [16 + 8, 16 + 12, 16, 16]  # four to an octave, from REACH on
    tables = t.choose_tables(torch.tensor([0, 20, 200, 16, 18], dtype=torch.uint8), 3, 2)
    assert tables.tolist() == [[0, 2], [20, 22], [63, 63]]


@pytest.mark.parametrize("function", [t.ans_push, t.ans_pop], ids=lambda f: f.__name__)
def test_the_coder_s_worked_example_is_so(function):
    """What a reader is shown in the docstrings of the coder's two steps."""
    (example,) = doctest.DocTestFinder().find(function, globs=vars(t))
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples))
    assert len(example.examples) == 3


def test_the_coder_s_states_are_a_stack():
    """Of the drawing's four slots: what is put on last comes off first, whatever lies under it."""
    slots = {"A": (3, 0), "B": (1, 3)}
    for text in itertools.product("AB", repeat=9):
        state = 4
        for letter in reversed(text):
            state = t.ans_push(state, *slots[letter], bits=2)
        for letter in text:
            assert letter == "AAAB"[state % 4]
            state = t.ans_pop(state, *slots[letter], bits=2)
        assert state == 4


def test_the_record_is_as_the_file_s_drawing_has_it():
    """Where the steps of the rows stand that make Mamba's step sizes, and that none is rounded
    again on its way.
    """
    settings = tiny()
    model = random_model(settings)
    stored = exported(model, settings)
    data = t.pack_artifact(settings, stored)
    layout = t.record_layout(model)
    (record,) = np.frombuffer(parts_of(data)[0], layout)
    layer = model.blocks[0].mixer.in_proj
    steps = torch.from_numpy(record["blocks.0.mixer.in_proj.weight"].copy())
    assert steps.dtype == torch.float16
    rows, columns = t.grid_steps(
        layer.weight, t.grid_limits(model)["blocks.0.mixer.in_proj.weight"], settings, 5.0
    )
    assert torch.equal(steps.float(), torch.cat([rows.squeeze(1), columns]))
    first = layer.out_features - layer.dynamics_rows
    dynamics = steps[
        first : layer.out_features
    ].float()  # the step size's rows stand first in these
    assert torch.equal(dynamics, rows[-layer.dynamics_rows :, 0])
    assert record["blocks.0.mixer.dt_bias"].dtype == record["blocks.0.mixer.D"].dtype == np.float32
    assert all(
        record[name].dtype in (np.float16, np.uint32)
        for name in layout.names
        if not name.endswith((".dt_bias", ".D"))
    )
    place = list(t.grid_limits(model)).index("blocks.0.mixer.in_proj.weight")
    (frequencies,) = record["frequencies"][place]
    counts = np.bincount(
        stored["blocks.0.mixer.in_proj.weight integers"].numpy().view(np.uint8).ravel(),
        minlength=256,
    )
    assert (frequencies.astype(bool) == counts.astype(bool)).all()
    assert frequencies.sum() == 65_536


@pytest.mark.parametrize("payload", [b"", b"\0", b"\xff" * 100, bytes(range(256)) * 10], ids=len)
def test_content_that_does_not_unpack_is_refused(minute, tmp_path, payload):
    assert "not its header's model" in refused(
        tmp_path / "a", sealed(minute, header_of(minute), payload)
    )


def test_a_decompression_bomb_is_not_unpacked(minute, tmp_path):
    """40 KB that would become 256 MB: no more than the model needs is read; a model of 400 million
    numbers is refused.
    """
    compressor = lzma.LZMACompressor(preset=0)
    bomb = b"".join(
        [compressor.compress(bytes(1 << 20)) for _ in range(256)] + [compressor.flush()]
    )
    assert len(bomb) < 1 << 17
    (tmp_path / "a").write_bytes(sealed(minute, header_of(minute), bomb))
    with bounded(more_memory=160 << 20), pytest.raises(t.UserError, match="not its header's model"):
        t.load_model(tmp_path / "a", tiny(), set(), SOLO)
    huge = header_of(minute) | {"bigram_vocab_size": 1 << 20, "bigram_dim": 400}
    (tmp_path / "a").write_bytes(sealed(minute, huge, bomb))
    said = "the model has 419,[0-9,]+ numbers, but an artifact has at most 67,108,864"
    with bounded(more_memory=160 << 20), pytest.raises(t.UserError, match=said):
        t.load_model(tmp_path / "a", tiny(), set(), SOLO)


@pytest.mark.parametrize("key", ["num_layers", "mamba_layers", "mlp_mult", "unet_skips"])
@pytest.mark.parametrize("value", ["missing", None, 7, "text", [], {}, [[]], [None]], ids=str)
def test_a_header_with_a_part_missing_or_of_the_wrong_kind_is_refused(minute, tmp_path, key, value):
    header = header_of(minute)
    if value == "missing":
        del header[key]
    else:
        header[key] = value
    refused(tmp_path / "a", sealed(minute, header))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
    ],
    ids=lambda text: repr(text[:8]),
)
def test_a_header_that_is_not_an_object_is_refused(minute, tmp_path, text):
    refused(tmp_path / "a", sealed(minute, text))


def test_a_header_without_an_end_is_refused(minute, tmp_path):
    body = minute[:-32].replace(b"\n", b" ")
    assert "its header lacks" in refused(tmp_path / "a", body + hashlib.sha256(body).digest())


def test_random_damage_under_a_right_checksum_never_ends_in_a_traceback(minute, tmp_path):
    """It may happen to be a model of the same shape; anything but that and UserError is a bug."""
    generator = random.Random(1)
    size = minute.index(b"\n") - 8
    loaded = 0
    for _ in range(300):
        data = bytearray(minute[:-32])
        for _ in range(generator.choice((1, 1, 2, 5))):
            place = (
                generator.randrange(8, 8 + size)
                if generator.random() < 0.7
                else generator.randrange(8, len(data))
            )
            data[place] = generator.choice(
                (generator.randrange(256), ord(generator.choice('0123456789"[]{},:-eE.')))
            )
        try:
            load(tmp_path / "a", bytes(data) + hashlib.sha256(data).digest())
            loaded += 1
        except t.UserError:
            pass
    assert loaded < 200


def test_a_variable_that_contradicts_the_artifact_is_refused(minute, tmp_path):
    (tmp_path / "a").write_bytes(minute)
    with pytest.raises(t.UserError, match="NUM_LAYERS=2 contradicts the artifact, which has 1"):
        t.load_model(tmp_path / "a", tiny(**MINUTE | {"num_layers": 2}), {"num_layers"}, SOLO)
    # Switches as they are typed: what stands in the line can be copied.
    with pytest.raises(t.UserError, match="SHARED_TABLES=1 contradicts the artifact, which has 0"):
        t.load_model(tmp_path / "a", tiny(**MINUTE, shared_tables=True), {"shared_tables"}, SOLO)
    _, settings = t.load_model(
        tmp_path / "a", tiny(num_layers=2, eval_mode="plain"), {"eval_mode"}, SOLO
    )
    assert (settings.num_layers, settings.eval_mode) == (1, "plain")

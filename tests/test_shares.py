"""Grid steps that share a file's bits by what errors of rows cost, and steps that are fitted to
GPTQ's integers.
"""

import copy

import pytest
import torch

import train_gpt as t
from tests.support import (
    SOLO,
    collect_factors,
    random_model,
    random_tokens,
    relative,
    run_ranks,
    tiny,
)
from tests.support import with_settings as changed
from tests.test_export import export_to
from tests.test_trellis import entropy

SHARED = {"sdclip_by_matrix": 1.0, "sdclip_by_row": 0.5}


def uneven_model(settings: t.Settings, seed: int = 0) -> t.Model:
    """Layers add unequal parts to the residual stream, so that errors of some count for little;
    root mean squares, the usual measure of steps, do not tell in which matrices.
    """
    model = random_model(settings, seed)
    with torch.no_grad():
        for layer, factor in enumerate((0.1, 1.0, 0.02)):
            block = model.blocks[layer]
            output = block.mixer.out_proj if hasattr(block.mixer, "out_proj") else block.mixer.out
            output.weight *= factor
            block.mlp.down.weight *= 1.0 - 0.9 * factor
    return model


def shared_model(settings: t.Settings, seed: int = 0, tokens=None) -> tuple[t.Model, dict]:
    """An uneven_model() with its grid_factors, and what GPTQ knows of its inputs."""
    model = uneven_model(settings, seed)
    tokens = random_tokens(32, 32, seed=seed) if tokens is None else tokens
    hessians, energies = t.collect_costs(model, tokens.split(8), SOLO, with_energies=True)
    factors = {name: t.factor_hessian(hessian) for name, hessian in hessians.items()}
    model.row_costs = t.find_row_costs(factors, energies)
    model.grid_factors = t.find_grid_factors(model, settings)
    return model, factors


def collect_energies(model: t.Model, tokens: torch.Tensor, ranks: t.Ranks, rows: int) -> dict:
    return t.collect_costs(model, tokens.split(rows), ranks, with_energies=True)[1]


# ---- What errors cost ----------------------------------------------------------------------------


def nudged_nats(model: t.Model, tokens: torch.Tensor, layer, call: int, at: tuple, by: float):
    """Nats of a text where one output of a layer, in one of its calls, is off by so much."""
    calls = []

    def hook(module, positional, output):
        calls.append(output)
        if len(calls) - 1 == call:
            output = output.clone()
            output[at] += by
        return output

    handle = layer.register_forward_hook(hook)
    hidden = model(tokens, model.full_order)[:, :-1]
    handle.remove()
    return model.nats(hidden, tokens[:, 1:], tokens[:, :-1]).sum()


@torch.no_grad()
def test_energies_are_what_nudged_outputs_do_to_the_loss():
    """By differences in float64; a layer that runs twice has the mean of both."""
    model = random_model(tiny(layer_order="0,1,1,2", unet_skips=False))
    model.double().compute_dtype = torch.float64
    tokens = random_tokens(2, 8)
    energies = collect_energies(model, tokens, SOLO, rows=1)
    assert energies.keys() == model.linear_layers().keys()
    places = [("blocks.0.mixer.in_proj.weight", 1, 5), ("blocks.1.mlp.up.weight", 2, 3)]
    for name, calls, row in [*places, ("blocks.2.mixer.out_proj.weight", 1, 31)]:
        squares = []
        for call in range(calls):
            for b, position in torch.cartesian_prod(torch.arange(2), torch.arange(8)).tolist():
                own = model, tokens, model.linear_layers()[name], call, (b, position, row)
                rise = nudged_nats(*own, 1e-5) - nudged_nats(*own, -1e-5)
                squares.append((rise / 2e-5).square())
        assert float(energies[name][row]) == pytest.approx(float(sum(squares)) / len(squares), 1e-3)


def test_energies_leave_gradients_hooks_and_weights_as_they_were():
    model, tokens = random_model(tiny()), random_tokens(4, 32)
    before = {}
    for name, p in model.named_parameters():
        p.grad = torch.full_like(p, 3.0)
        before[name] = p.grad, p.grad.clone(), p.detach().clone()
    collect_energies(model, tokens, SOLO, rows=2)
    for name, p in model.named_parameters():
        gradient, value, weight = before[name]
        assert p.grad is gradient and torch.equal(p.grad, value) and torch.equal(p, weight)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_mlp_that_is_one_operator_is_taken_apart_for_its_energies(monkeypatch):
    model, tokens = random_model(tiny(precision="bfloat16")), random_tokens(2, 32)
    monkeypatch.setattr(t.MLP, "fused", lambda *_: pytest.fail("its matrices have no outputs"))
    layers = [module for module in model.modules() if isinstance(module, t.MLP)]
    for layer in layers:
        layer.can_fuse = True
    energies = collect_energies(model, tokens, SOLO, rows=2)
    assert energies.keys() == model.linear_layers().keys()
    assert all(layer.can_fuse for layer in layers)


def test_ranks_have_the_energies_of_all_their_text():
    model, tokens = random_model(tiny()), random_tokens(4, 32)
    alone = collect_energies(model, tokens, SOLO, rows=4)

    def collect(ranks: t.Ranks) -> dict:
        own = copy.deepcopy(model)  # of these threads, whose hooks see their own layers only
        return collect_energies(own, tokens.chunk(2)[ranks.rank], ranks, rows=1)

    for found in run_ranks(2, collect):
        assert found.keys() == alone.keys()
        assert all(relative(found[name], alone[name]) < 1e-5 for name in alone)


# ---- Steps ---------------------------------------------------------------------------------------


def test_factors_are_1_in_the_mean_and_leave_embeddings_alone():
    """Of the logarithm, over all weights. With both parts whole, all rows' costs become equal."""
    settings = tiny(sdclip_by_matrix=1.0, sdclip_by_row=1.0)
    model, tokens = uneven_model(settings), random_tokens(16, 32)
    hessians, energies = t.collect_costs(model, tokens.split(8), SOLO, with_energies=True)
    known = {name: t.factor_hessian(hessian) for name, hessian in hessians.items()}
    model.row_costs = t.find_row_costs(known, energies)
    factors = t.find_grid_factors(model, settings)
    assert factors.keys() == model.linear_layers().keys()
    logs = [
        factors[n].log().expand_as(p).flatten() for n, p in model.named_parameters() if n in factors
    ]
    logs = torch.cat(logs)
    assert abs(logs.mean()) < 1e-5 and logs.std() > 0.3
    costs = []
    for name, factor in factors.items():
        rows = t.grid_steps(
            model.get_parameter(name).detach(), t.grid_limits(model)[name], settings, t.SDCLIP_USUAL
        )[0]
        inverse = hessians[name] + 0.01 * hessians[name].diagonal().mean() * torch.eye(
            len(hessians[name])
        )
        order = inverse.diagonal().argsort(descending=True)
        upper = torch.linalg.cholesky(inverse[order][:, order].inverse(), upper=True)
        left = (1 / upper.diagonal().square()).mean()
        usual = energies[name] > 1e-3 * energies[name].mean()
        costs.append((left * energies[name] * (factor * rows).squeeze(1).square())[usual])
    costs = torch.cat(costs).log()
    assert costs.std() < 0.02


def test_parts_of_the_logarithm_are_taken():
    """SDCLIP_BY_ROW leaves a matrix's mean, SDCLIP_BY_MATRIX the ratios of its rows."""
    by_row, _ = shared_model(tiny(sdclip_by_row=0.5))
    twice, _ = shared_model(tiny(sdclip_by_row=1.0))
    by_matrix, _ = shared_model(tiny(sdclip_by_matrix=0.5))
    whole, _ = shared_model(tiny(sdclip_by_matrix=1.0))
    for name, factor in by_row.grid_factors.items():
        assert abs(factor.log().mean()) < 1e-4
        assert relative(2 * factor.log(), twice.grid_factors[name].log()) < 1e-3
        (one,) = by_matrix.grid_factors[name].unique()
        assert 2 * float(one.log()) == pytest.approx(
            float(whole.grid_factors[name].log().mean()), abs=1e-4
        )
    largest = max(factor.max() for factor in whole.grid_factors.values())
    smallest = min(factor.min() for factor in whole.grid_factors.values())
    assert largest > 2 * smallest


def test_no_step_is_so_fine_that_its_grid_clips():
    """A matrix whose errors would cost ten thousand times as much reaches four deviations yet."""
    settings, name = tiny(**SHARED), "blocks.1.mixer.query.weight"
    model, factors = shared_model(settings)
    weight = model.get_parameter(name).detach()
    model.grid_factors = {name: torch.full((len(weight), 1), 1e-4)}
    stored = t.quantize_model(model, settings, SOLO, factors, 12.0)
    reach = t.INT8_MAX * stored[name][: len(weight), None].float()
    deviations = weight.square().mean(1, keepdim=True).sqrt()
    assert relative(reach, 4 * deviations) < 0.04  # steps are rounded within 6 %
    assert 80 < stored[f"{name} integers"].abs().max() <= t.INT8_MAX
    off = weight - stored[f"{name} integers"] * reach / t.INT8_MAX
    assert off.norm() < 0.03 * weight.norm()


def divergence(model: t.Model, loaded: t.Model, tokens: torch.Tensor) -> float:
    """Mean nats that the second model's predictions are from the first's."""
    logs = []
    for each in (model, loaded):
        logs.append(each.logits(each(tokens, each.full_order)).log_softmax(-1))
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


@torch.no_grad()
@pytest.mark.parametrize("states", [0, 4])
def test_of_a_file_of_the_same_size_shared_steps_lose_less(tmp_path, states):
    """Predictions move a fifth less from the float model's, on text that none was calibrated on.
    Sizes are foretold: both files fill the target, but for what is allowed for small matrices.
    """
    settings = tiny(model_dim=64, mamba_head_dim=32, sdclip_k=0.0, trellis_states=states)
    sizes, lost = [], []
    for changes in ({}, SHARED):
        chosen = changed(settings, **changes)
        model, factors = shared_model(chosen)
        target = t.predict_bytes(random_model(settings), settings, 12.0)
        k = t.fit_sdclip(model, chosen, target)
        stored = t.quantize_model(model, chosen, SOLO, factors, k)
        (tmp_path / "a").write_bytes(t.pack_artifact(chosen, stored))
        loaded, _ = t.load_model(tmp_path / "a", tiny(), set(), SOLO)
        sizes.append((tmp_path / "a").stat().st_size)
        lost.append(divergence(model, loaded, random_tokens(16, 32, seed=9)))
    assert all(0.85 * target < size <= target for size in sizes)
    assert sizes[1] < 1.02 * sizes[0]
    assert lost[1] < 0.8 * lost[0]


def test_a_path_errs_less_where_it_costs_more():
    """By 16-fold costs of every fourth row. At the same steps, whose integers have as many bits: a
    third less in all, and in those rows more than half; the others err more.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight = torch.randn(256, 24, generator=generator)
    solver = t.factor_hessian(2 * inputs.T @ inputs)
    order, upper, _ = solver
    dear = torch.arange(256) % 4 == 0
    weights = torch.where(dear, 4.0, 1.0).unsqueeze(1)
    scale, limits = torch.full_like(weight, 0.5), torch.full_like(weights, 127.0)
    costs, bits = [], []
    for own in (torch.ones_like(weights), weights):
        points = t.gptq(weight, scale, limits, *solver, own, trellis_states=8)
        off = (points * scale - weight)[:, order.squeeze(0)]
        left = torch.linalg.solve(upper.T, off.T).T  # e / U[j, j] of each column
        costs.append((left * weights).square())
        bits.append(entropy(points.floor()))
    assert abs(bits[1] - bits[0]) < 0.02
    assert costs[1].sum() < 0.66 * costs[0].sum()
    assert costs[1][dear].sum() < 0.45 * costs[0][dear].sum()
    assert costs[1][~dear].sum() > costs[0][~dear].sum()


@torch.no_grad()
def test_a_model_s_paths_are_weighed_by_its_rows_costs():
    """One matrix has rows whose errors cost nothing nearly: the others err less for it."""
    settings, name = tiny(trellis_states=8), "blocks.1.mlp.up.weight"
    model = random_model(settings)
    solvers = collect_factors(model, random_tokens(8, 32), rows=4)
    rows = torch.arange(len(model.get_parameter(name)))
    errors, others = [], []
    for costs in (1.0, 1e-4):
        model.row_costs = {name: torch.where(rows % 2 == 0, 1.0, costs).unsqueeze(1)}
        stored = t.quantize_model(model, settings, SOLO, solvers, 12.0)
        points = t.trellis_points(stored[f"{name} integers"], 8)
        off = points * stored[name][: len(rows), None].float() - model.get_parameter(name)
        left = torch.linalg.solve(solvers[name][1].T, off[:, solvers[name][0].squeeze(0)].T)
        errors.append(left[:, ::2].square().sum())
        others.append(stored["blocks.0.mlp.up.weight integers"])
    assert errors[1] < 0.5 * errors[0]
    assert torch.equal(*others)


# ---- Settings ------------------------------------------------------------------------------------


def test_without_shares_no_gradient_is_computed_and_grids_are_the_usual_ones(tmp_path, monkeypatch):
    settings, model = tiny(), random_model(tiny())
    for name in SHARED:
        assert t.PLAIN[name] == t.FORMER_DEFAULTS[name] == 0
    monkeypatch.setattr(t, "find_grid_factors", None)
    monkeypatch.setattr(torch.autograd, "grad", None)
    export_to(tmp_path / "a", settings, model, 10**6)
    assert model.grid_factors == {}
    stored = t.quantize_model(model, settings, SOLO, {}, 5.0)
    for name, limits in t.grid_limits(model).items():
        weight = model.get_parameter(name).detach()
        rows, columns = t.grid_steps(weight, limits, settings, 5.0)
        assert torch.equal(stored[name].float(), torch.cat([rows.squeeze(1), columns]))
        plain = t.round_to_grid(weight, rows, limits)
        assert torch.equal(stored[f"{name} integers"], plain.to(torch.int8))


def test_export_shares_by_its_own_text_and_forgets_the_last_one_s(tmp_path):
    """As whoever exports one model with several settings needs it."""
    settings, model = tiny(**SHARED), random_model(tiny())
    export_to(tmp_path / "shared", settings, model, 10**6)
    assert model.grid_factors.keys() == model.linear_layers().keys()
    export_to(tmp_path / "again", tiny(), model, 10**6)
    export_to(tmp_path / "fresh", tiny(), random_model(tiny()), 10**6)
    assert model.grid_factors == {}
    assert (tmp_path / "again").read_bytes() == (tmp_path / "fresh").read_bytes()
    assert (tmp_path / "again").read_bytes() != (tmp_path / "shared").read_bytes()


@pytest.mark.parametrize("changes", [{"quantizer": "round"}, {"late_qat_threshold": 0.1}], ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_what_needs_gptq_is_refused_without_it_in_one_line(name, changes):
    (blamed,) = changes
    said = f"^{blamed.upper()}={changes[blamed]} needs {name.upper()}=0$"
    with pytest.raises(t.UserError, match=said):
        t.validate_settings(tiny(**{name: 0.5} | changes), 1)
    t.validate_settings(tiny(**{name: 0.0} | changes), 1)

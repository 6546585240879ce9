"""The idea of rounding by what errors cost in rows, columns and tables."""

from pathlib import Path

import pytest
import torch

import train_gpt as t
from tests.support import SOLO, random_model, random_tokens, tiny
from tools.ideas import rounding_by_cost as idea

IDEA = Path(idea.__file__)


def nats_of(model, tokens) -> float:
    """The text's nats, summed."""
    hidden = model(tokens, model.full_order)[:, :-1]
    return float(model.nats(hidden, tokens[:, 1:], tokens[:, :-1]).sum())


@torch.no_grad()
def squared_slope(model, tokens, layer, lookup: tuple, column: int) -> float:
    """The square of the nats' derivative by one number that a table gives, by differences."""
    rises = []
    for by in (1e-5, -1e-5):

        def hook(module, positional, output, by=by):
            output = output.clone()
            output[(*lookup, column)] += by
            return output

        handle = layer.register_forward_hook(hook)
        rises.append(nats_of(model, tokens))
        handle.remove()
    return ((rises[0] - rises[1]) / 2e-5) ** 2


def test_what_lookups_cost():
    """By differences in float64, of a token that comes twice; and one that never comes costs 0."""
    model = random_model(tiny(model_dim=16, num_heads=2, num_kv_heads=1))
    model.double().compute_dtype = torch.float64
    tokens = random_tokens(1, 8)
    tokens[0, 5] = tokens[0, 1]
    found = idea.table_costs(model, [tokens], SOLO)["embedding.weight"]["lookups"]
    token = int(tokens[0, 1])
    squares = 0.0
    for place in (tokens[0] == token).nonzero().flatten().tolist():
        for column in range(16):
            squares += squared_slope(model, tokens, model.embedding, (0, place), column)
    assert found[token] == pytest.approx(2 * squares / 16, rel=1e-4)
    absent = next(x for x in range(4, 512) if x not in tokens)
    assert found[absent] == 0


@torch.no_grad()
def test_what_outputs_cost():
    """Beside autograd's gradients of logits."""
    model = random_model(tiny())
    tokens = random_tokens(2, 16)
    hidden = model(tokens, model.full_order)[:, :-1]
    with torch.enable_grad():
        raw = (hidden.float() @ model.output_matrix.T.detach()).requires_grad_()
        cap = model.settings.logit_softcap
        logits = cap * torch.tanh(raw / cap)
        chosen = tokens[:, 1:].unsqueeze(-1)
        nats = (logits.logsumexp(-1) - logits.gather(-1, chosen).squeeze(-1)).sum()
        (gradient,) = torch.autograd.grad(nats, raw)
    wanted = gradient.flatten(0, 1).square().sum(0)
    found = idea.squared_logit_gradients(model, hidden, tokens[:, 1:], tokens[:, :-1])
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-9)


def make_costs(**variant) -> tuple[idea.Costs, torch.Tensor, tuple]:
    """Costs, a matrix, and what gptq() knows of inputs that differ by columns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 24, generator=generator) * torch.logspace(-1.5, 1, 24)
    weight = torch.randn(128, 24, generator=generator)
    return idea.Costs(t, idea.Variant(**variant)), weight, t.factor_hessian(2 * x.T @ x)


def test_weighed_paths_err_less_where_it_costs_more():
    """In every fourth row: that the others err as they like leaves its numbers a finer grid."""
    costs, weight, solver = make_costs(weigh=True)
    weights = torch.where(torch.arange(128) % 4 > 0, 0.1, 1.0).unsqueeze(1)
    scale = torch.full_like(weight, 0.5)
    limits = torch.full_like(weight[:, :1], 127.0)
    errors = []
    for weigh in (False, True):
        costs.variant = idea.Variant(weigh=weigh)
        gptq = idea.weighing(costs, t.gptq)
        points = gptq(weight, scale, limits, *solver, weights, 128, 8)
        rest = (points * scale - weight) * weights
        upper = solver[1]
        order = solver[0].squeeze(0)
        errors.append(torch.linalg.solve(upper.T, rest[:, order].T).square().sum())
    assert errors[1] < 0.8 * errors[0]


def test_columns_of_even_cost_are_the_least():
    """At the same mean logarithm of steps; for the steps' four leading bits a little is left."""
    costs, _, solver = make_costs(columns=1.0)
    solvers = {"matrix": solver}
    before = costs.left("matrix", solvers)
    costs.find_columns(solvers)
    assert abs(float(costs.columns["matrix"].log().mean())) < 0.02
    assert costs.left("matrix", solvers) < 0.6 * before
    each = (costs.columns["matrix"][solver[0].squeeze(0)] / solver[1].diagonal()).square()
    assert each.max() < 1.3 * each.min()


def test_explore_compares_variants_on_the_same_weights(explore_here, monkeypatch):
    monkeypatch.setattr(t, "export", t.export)
    names = {121: "weighed", 122: "tables", 123: "both", 124: "all", 125: "columns"}
    others = []
    for number, name in names.items():
        others += ["--requantize", f"{name}: GPTQ_DAMP={number / 1e4}"]
    settings = "SDCLIP_K=9 TRELLIS_STATES=4 SDCLIP_BY_MATRIX=1 SDCLIP_BY_ROW=0.5 SHARED_TABLES=1"
    arguments = [f"it: {settings}", "--export", *others, "--requantize", "none: GPTQ_DAMP=0.01"]
    status, (line,), _ = explore_here(*arguments, "--idea", str(IDEA))
    assert status == 0
    assert line["none"]["quantized"] == line["quantized"]
    scores = [line["quantized"], *(line[name]["quantized"] for name in names.values())]
    assert len(set(scores)) == 6
    assert max(scores) - min(scores) < 0.3

"""Files of tools/ideas that change quantization compute what they say."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from tests.support import SOLO, Quiet, random_model, random_tokens, relative, tiny
from tools.ideas import late_grids, quantized_inputs, rows_make_up, tokens_that_count
from tools.ideas.steps_trained_again import points_of

SHARED = {"quantizer": "gptq", "sdclip_by_matrix": 1.0, "sdclip_by_row": 0.5}


@pytest.fixture
def script(monkeypatch):
    """train_gpt.py's module, as it was once the test is over."""
    changed = ("calibrate", "calibration_sequences", "collect_costs", "quantize_model")
    for name in (*changed, "schedule_at", "Trainer"):
        monkeypatch.setattr(t, name, getattr(t, name))
    return t


def seen_by(model: t.Model, name: str, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's inputs and the gradients of the text's nats by its outputs, (tokens, …)."""
    calls = []
    layer = model.linear_layers()[name]
    handle = layer.register_forward_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    hidden = model(tokens, model.full_order)
    handle.remove()
    nats = model.nats(hidden[:, :-1], tokens[:, 1:], tokens[:, :-1]).sum()
    ((positional, named, output),) = calls
    (gradient,) = torch.autograd.grad(nats, output)
    x = layer.effective_input(*positional, **named).detach().float()
    return x.flatten(0, -2), gradient.flatten(0, -2)


def test_hessians_weigh_tokens_by_their_gradients(script, monkeypatch):
    model = random_model(tiny(**SHARED))
    tokens = random_tokens(6, 32)
    usual, energies = t.collect_costs(model, tokens.split(2), SOLO, True)
    monkeypatch.setattr(t, "calibrate", lambda trainer, batches: None)
    tokens_that_count.install(script)
    for size, weighed in ((64, True), (128, False), (64, True)):
        t.calibrate(SimpleNamespace(settings=SimpleNamespace(gptq_block_size=size)), None)
        found, same = t.collect_costs(model, iter(tokens.split(2)), SOLO, True)
        assert all(torch.equal(same[name], energies[name]) for name in energies)
        assert torch.equal(found[model.output_name], usual[model.output_name])
        for name in energies:
            x, gradient = seen_by(model, name, tokens)
            weights = gradient.square().sum(1) if weighed else torch.ones(len(x))
            expected = 2 * (x.T * (weights / weights.mean())) @ x
            assert relative(found[name], expected) < 1e-5, (name, size)
    name = next(iter(energies))
    assert relative(found[name], usual[name]) > 0.01  # tokens do differ


def correlated(size: int, seed: int) -> torch.Tensor:
    """A covariance (size, size) whose numbers of a row go with those of others."""
    mixed = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return mixed @ mixed.mT / size + 0.1 * torch.eye(size)


@pytest.mark.parametrize(("rows", "block"), [(12, 4), (10, 4), (3, 8)])
def test_rows_factor_into_blocks(rows, block):
    covariance = correlated(rows, 1)
    m, costs = rows_make_up.factor_rows(covariance, block)
    inverse = torch.linalg.inv(m.double())
    damped = covariance.double() + rows_make_up.DAMP * torch.diag(covariance.diagonal().double())
    blocks = inverse.mT @ damped @ inverse  # C of B = M^T C M
    number = torch.arange(rows) // block
    same = number[:, None] == number
    assert blocks.masked_fill(same, 0).abs().max() < 1e-5
    assert relative(costs, blocks.diagonal()) < 1e-5
    assert torch.equal(m.masked_fill(~same, 0), torch.eye(rows))
    assert not m.triu(1).any()


def problem_of(rows: int, columns: int) -> tuple:
    """gptq()'s arguments of a random matrix, coarsely rounded, and its inputs' H."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator)
    hessian = 2 * correlated(columns, 2)
    scale = torch.full_like(weight, 0.4)
    limits = torch.full((rows, 1), 31.0)
    weights = torch.rand(rows, 1, generator=generator) + 0.5
    return (weight, scale, limits, *t.factor_hessian(hessian), weights), hessian


def by_loops(problem: tuple, m: torch.Tensor, block: int) -> torch.Tensor:
    """round_by_both() without a trellis, a block of a column after the other."""
    weight, scale, limits, order, upper, unused, _ = problem
    left = weight.masked_fill(unused, 0.0).take_along_dim(order, -1)
    scale = scale.take_along_dim(order, -1)
    for j in range(left.shape[1]):
        errors = torch.zeros(len(left))
        for first in range(0, len(left), block):
            rows = slice(first, first + block)
            target = left[rows, j] + m[rows, :first] @ errors[:first]
            rounded = t.round_to_grid(target, scale[rows, j], limits[rows, 0])
            errors[rows] = left[rows, j] - rounded * scale[rows, j]
            left[rows, j] = rounded
        left[:, j + 1 :] -= errors[:, None] / upper[j, j] * upper[j, j + 1 :]
    return left.take_along_dim(order.argsort(), -1)


@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(12, 7, 4), (10, 7, 4), (6, 30, 1), (3, 5, 4)]
)
def test_rows_make_up_for_those_above(monkeypatch, rows, columns, block):
    monkeypatch.setattr(t, "TRELLIS_ROWS", block)
    problem, _ = problem_of(rows, columns)
    m, _ = rows_make_up.factor_rows(correlated(rows, 1), block)
    found = rows_make_up.round_by_both(t, problem, m, 0)
    assert torch.equal(found, by_loops(problem, m, block))
    assert (len(m) > block) == (not torch.equal(found, t.gptq(*problem)))


@pytest.mark.parametrize("states", [0, 8])
def test_rows_that_go_with_no_others_are_gptqs(monkeypatch, states):
    monkeypatch.setattr(t, "TRELLIS_ROWS", 8)
    problem, _ = problem_of(20, 12)
    found = rows_make_up.round_by_both(t, problem, torch.eye(20), states)
    assert torch.equal(found, t.gptq(*problem, 128, states))


@pytest.mark.parametrize("states", [0, 8])
def test_errors_cost_less_when_rows_make_up_for_others(monkeypatch, states):
    """As trace(B D H D^T) counts them, which is what the idea is about."""
    monkeypatch.setattr(t, "TRELLIS_ROWS", 8)
    rows, columns = 64, 48
    (*problem, _), hessian = problem_of(rows, columns)
    covariance = correlated(rows, 1)

    def cost(integers: torch.Tensor) -> float:
        points = t.trellis_points(integers.floor().to(torch.int8), states) if states else integers
        wrong = problem[0] - points * problem[1]
        return float((covariance @ wrong @ hessian * wrong).sum())

    diagonal = covariance.diagonal().sqrt().unsqueeze(1)
    usual = cost(t.gptq(*problem, diagonal, 128, states))
    m, costs = rows_make_up.factor_rows(covariance, 8)
    both = cost(rows_make_up.round_by_both(t, (*problem, costs.sqrt().unsqueeze(1)), m, states))
    assert both < 0.8 * usual


def test_linear_layers_are_rounded_by_both_sides_where_it_is_asked_for(script, monkeypatch):
    monkeypatch.setattr(t, "TRELLIS_ROWS", 8)  # or these layers had one block
    settings = tiny(**SHARED, spelling_features=0)
    model = random_model(settings)
    tokens = random_tokens(6, 32)
    batches = SimpleNamespace(next=lambda: (tokens, tokens))

    def quantized(block_size: int) -> tuple[dict, dict]:
        now = replace(settings, gptq_block_size=block_size)
        log = Quiet()
        trainer = SimpleNamespace(
            settings=now, ranks=SOLO, model=model, calibration_rows=2, log=log
        )
        solvers = script.calibrate(trainer, batches)
        costs = dict(model.row_costs)
        return script.quantize_model(model, now, SOLO, solvers, 8.0), costs

    usual, usual_costs = quantized(128)
    rows_make_up.install(script)
    for size, both in ((64, True), (128, False), (64, True)):
        stored, costs = quantized(size)
        for name in model.linear_layers():
            same = torch.equal(stored[f"{name} integers"], usual[f"{name} integers"])
            assert same != both, (name, size)
            assert torch.equal(costs[name], usual_costs[name]) != both, (name, size)
    settings = replace(settings, sdclip_by_matrix=0.0, sdclip_by_row=0.0)
    with pytest.raises(t.UserError, match="set SDCLIP_BY_ROW above 0"):
        quantized(64)


def test_weights_stand_on_their_grids_and_come_back(script):
    settings = tiny(**SHARED, spelling_features=0)
    usual = t.schedule_at
    late_grids.install(script)
    model = random_model(settings)
    trainer = t.Trainer.__new__(t.Trainer)
    trainer.model, trainer.settings, trainer.ranks = model, settings, SOLO
    trainer.limits, trainer.calibration_rows, trainer.steps_done = t.grid_limits(model), 2, 7
    lines = []
    trainer.log = lines.append
    with torch.no_grad():
        kept = {name: p.clone() for name, p in model.named_parameters()}
        trainer.grids = late_grids.find_grids(script, trainer, random_tokens(4, 32))
        with trainer.weights_of(False):
            assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
        with trainer.weights_of(True):
            on_grids = {name: p.clone() for name, p in model.named_parameters()}
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert lines == [f"{len(trainer.limits)} matrices on their grids from step 7"]
    steps = {id(weight): rows for weight, rows, _ in trainer.grids}
    for name, p in model.named_parameters():
        if name not in trainer.limits:
            assert torch.equal(on_grids[name], kept[name])
            continue
        rows = steps[id(p)]
        integers = on_grids[name] / rows
        assert (integers - integers.round()).abs().max() < 1e-3, name
        inside = (kept[name] / rows).abs() < t.INT6_MAX
        assert ((on_grids[name] - kept[name]).abs() <= rows * 0.5001)[inside].all(), name
        assert not torch.equal(on_grids[name], kept[name])
    run = tiny(max_wallclock_seconds=0, iterations=1000, warmdown_fraction=0.8)
    now = [t.schedule_at(run, step, 0.0) for step in range(1000)]
    assert [each.quantized for each in now] == [
        each.lr_factor < late_grids.BELOW and each.progress > 0.1
        for each in (usual(run, step, 0.0) for step in range(1000))
    ]
    assert now[-1].quantized and not now[5].quantized and not now[500].quantized


def test_grids_are_found_once_by_the_first_step_that_wants_them(script, monkeypatch):
    found, steps = [], []
    monkeypatch.setattr(t.Trainer, "accumulate_gradients", lambda self, *step: steps.append(step))
    monkeypatch.setattr(t.Trainer, "warm_up", lambda self: None)
    monkeypatch.setattr(late_grids, "find_grids", lambda *_: found.append(len(steps)) or ["found"])
    late_grids.install(script)
    trainer = t.Trainer.__new__(t.Trainer)
    trainer.warm_up()
    assert trainer.qat_k == late_grids.K  # so that run() looks for none of its own
    for quantized in (False, True, True):
        trainer.accumulate_gradients(("order", quantized), "tokens", "targets")
    assert found == [1]
    assert trainer.grids == ["found"]
    assert len(steps) == 3


def test_the_best_weight_is_that_of_least_squares():
    generator = torch.Generator().manual_seed(5)
    weight, x = (torch.randn(n, 12, generator=generator) for n in (7, 200))
    changed = x + 0.3 * torch.randn(200, 12, generator=generator)
    hessian, cross = 2 * changed.mT @ changed, 2 * x.mT @ changed
    # Damping is as if there were more inputs, of which the layer should do the same as before.
    more = (0.01 * hessian.diagonal().mean() / 2).sqrt() * torch.eye(12)
    inputs = torch.cat([changed, more])
    for lost in (torch.zeros(200, 7), torch.randn(200, 7, generator=generator)):
        found = quantized_inputs.best_weight(weight, hessian, cross, 2 * lost.mT @ changed, 0.01)
        outputs = torch.cat([x @ weight.mT + lost, more @ weight.mT])
        assert relative(found, torch.linalg.lstsq(inputs, outputs).solution.mT) < 1e-5
        assert relative(found, weight) > 0.05
    zeros = torch.zeros(1)
    same = quantized_inputs.best_weight(weight, hessian, hessian, zeros, 0.01)
    assert relative(same, weight) < 1e-5


def test_a_layer_is_read_with_the_stream_that_it_adds_to():
    model = random_model(tiny(num_layers=2, mamba_layers="0", layer_order="0,1,0"))
    tokens = random_tokens(3, 32)
    seen = []
    for block in model.blocks:  # the stream behind each mixer, and behind each MLP
        block.mlp.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
        block.register_forward_hook(lambda module, x, output: seen.append(output[0]))
    with torch.no_grad():
        model(tokens, model.full_order)
        behind = {"0.mixer": (0, 4), "0.mlp": (1, 5), "1.mixer": (2,), "1.mlp": (3,)}
        seen = list(seen)
        for name, layer in model.linear_layers().items():
            x, stream = quantized_inputs.read_layer(model, name, tokens)
            adds = name.split(".")[-2] in quantized_inputs.ADDING
            assert (stream is not None) == adds, name
            if adds:
                _, number, part, *_ = name.split(".")
                expected = [seen[place].flatten(0, 1) for place in behind[f"{number}.{part}"]]
                assert relative(stream + x @ layer.weight.mT, torch.cat(expected)) < 1e-5, name


def test_layers_are_found_in_the_order_in_which_they_run():
    model = random_model(tiny(num_layers=2, mamba_layers="0", layer_order="0,1,0"))
    expected = [["bigram_proj.weight"]]
    expected += [[f"blocks.0.mixer.{name}.weight"] for name in ("in_proj", "out_proj")]
    expected += [[f"blocks.0.mlp.{name}.weight"] for name in ("up", "down")]
    expected += [[f"blocks.1.mixer.{name}.weight" for name in ("query", "key", "value")]]
    expected += [["blocks.1.mixer.out.weight"]]
    expected += [[f"blocks.1.mlp.{name}.weight"] for name in ("up", "down")]
    assert quantized_inputs.run_order(model, random_tokens(2, 32)) == expected


@pytest.mark.parametrize(("states", "size", "least"), [(0, 64, 0.96), (8, 64, 0.96), (0, 32, 0.9)])
def test_layers_undo_earlier_errors_if_rounded_for_quantized_inputs(script, states, size, least):
    lengths = {"train_batch_tokens": 6144, "calibration_tokens": 6144}
    settings = tiny(**SHARED, spelling_features=0, trellis_states=states, **lengths)
    model = random_model(settings)
    tokens, others = (random_tokens(rows, 32, seed=rows) for rows in (192, 64))
    batches = SimpleNamespace(next=lambda: (tokens, tokens))
    log = Quiet()

    def error_of(block_size: int) -> tuple[float, dict]:
        """How far other texts' hidden states are off once quantized, and what is stored."""
        now = replace(settings, gptq_block_size=block_size)
        trainer = SimpleNamespace(
            settings=now, ranks=SOLO, model=model, calibration_rows=50, log=log
        )
        solvers = script.calibrate(trainer, batches)
        stored = script.quantize_model(model, now, SOLO, solvers, 12.0)
        floats = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            usual = model(others, model.full_order)
            for name in script.grid_limits(model):
                model.get_parameter(name).copy_(points_of(script, stored, name, states)[0])
            changed = model(others, model.full_order)
            model.load_state_dict(floats)
        return relative(changed, usual), stored

    before, usual = error_of(128)
    quantized_inputs.install(script)
    after, stored = error_of(size)
    assert after < least * before
    again, same = error_of(128)
    assert again == before and all(torch.equal(same[name], x) for name, x in usual.items())
    for name, numbers in usual.items():
        layer = name.endswith("integers") and name.split()[0] in model.linear_layers()
        assert torch.equal(stored[name], numbers) != layer, name

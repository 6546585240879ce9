"""tools/ideas/tokens_that_count.py and late_grids.py compute what they say."""

from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from tests.support import SOLO, random_model, random_tokens, relative, tiny
from tools.ideas import late_grids, tokens_that_count

SHARED = {"quantizer": "gptq", "sdclip_by_matrix": 1.0, "sdclip_by_row": 0.5}


@pytest.fixture
def script(monkeypatch):
    """train_gpt.py's module, as it was once the test is over."""
    for name in ("calibrate", "collect_costs", "schedule_at", "Trainer"):
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

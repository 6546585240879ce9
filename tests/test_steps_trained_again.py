"""tools/ideas/steps_trained_again.py: gains have the gradients they should, and are stored."""

from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from tests.support import SOLO, random_model, random_tokens, relative, tiny
from tools.ideas import steps_trained_again as idea

GRIDS = {"quantizer": "gptq", "trellis_states": 4, "sdclip_k": 8.0}


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = random_tokens(4, 33, seed=seed)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture
def script(monkeypatch):
    """train_gpt.py's module, as it was once the test is over."""
    for name in ("calibrate", "quantize_model"):
        monkeypatch.setattr(t, name, getattr(t, name))
    return t


def test_a_gain_has_the_gradient_of_the_row_it_multiplies(monkeypatch):
    """Adam's first step goes by the gradient's sign alone: one of plain descent is compared."""
    monkeypatch.setattr(
        torch.optim, "Adam", lambda gains, betas: torch.optim.SGD(gains, lr=idea.RATE)
    )
    model = random_model(tiny(**GRIDS))
    name = next(iter(t.grid_limits(model)))
    weight = model.get_parameter(name).detach().clone()
    gains = idea.train_gains(model, {name: weight}, [batch(1)], rows=2)
    g = torch.zeros(len(weight), 1, requires_grad=True)
    tokens, targets = batch(1)

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return self.model.loss(tokens, targets, model.full_order)

    changed = {f"model.{name}": weight * (1 + g)}
    torch.func.functional_call(Loss(), changed, ()).backward()
    assert g.grad.abs().max() > 0
    assert relative(gains[name], -idea.RATE * g.grad) < 1e-4


@pytest.mark.parametrize("blocks", [64, 128])
def test_trained_steps_are_stored_if_asked_for_and_gain_on_what_was_read(
    blocks, script, monkeypatch
):
    settings = tiny(**GRIDS, gptq_block_size=blocks)
    model = random_model(settings)
    monkeypatch.setattr(t, "calibrate", lambda trainer, batches: {})
    usual = t.quantize_model(model, settings, SOLO, {}, 8.0)
    idea.install(script)
    lines = []
    trainer = SimpleNamespace(calibration_rows=2, log=lines.append)
    batches = SimpleNamespace(next=lambda: batch(5))  # one text, again and again
    kept = {name: p.clone() for name, p in model.named_parameters()}
    t.calibrate(trainer, batches)
    stored = t.quantize_model(model, settings, SOLO, {}, 8.0)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    (line,) = lines
    told = dict(part.rsplit(" ", 1) for part in line.split(", "))
    assert list(told) == ["quantized", "quantized again", "floats", "floats again"]
    assert float(told["quantized again"]) < float(told["quantized"])
    assert float(told["floats again"]) < float(told["floats"])
    matrices = t.grid_limits(model)
    changed = {name for name in stored if not torch.equal(stored[name], usual[name])}
    assert changed == (set(matrices) if blocks == idea.TRAINED_BLOCKS else set())
    for name in changed:
        rows = len(model.get_parameter(name))
        assert torch.equal(stored[name][rows:], usual[name][rows:])  # the columns' steps

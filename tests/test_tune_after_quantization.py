"""The idea of training what is stored beside integers: its gradients, and what it leaves alone."""

import tempfile
from pathlib import Path

import pytest
import torch

import train_gpt as t
from tests.support import SOLO, random_model, random_tokens, relative, tiny
from tools.ideas import tune_after_quantization as idea

IDEA = Path(idea.__file__)


@pytest.fixture
def script(monkeypatch):
    """train_gpt.py's module, as it was once the test is over."""
    for name in ("export", "predict_bytes"):
        monkeypatch.setattr(t, name, getattr(t, name))
    return t


class Repeating:
    """The same text again and again."""

    def __init__(self):
        self.tokens = random_tokens(4, 33, seed=5)

    def next(self):
        """Tokens and targets."""
        return self.tokens[:, :-1], self.tokens[:, 1:]


def unpacked(settings, stored: dict) -> dict:
    """The parameters that an artifact of what is stored gives."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(t.pack_artifact(settings, stored))
        _, payload = t.read_artifact(Path(file.name))
    return t.unpack_artifact(payload, t.model_skeleton(settings))


def make_case(stages: list[idea.Tuning], **settings):
    """A trainer of a random model; what stages make of it; the losses of each stage."""
    s = tiny(**settings)
    trainer = t.Trainer(random_model(s), s, SOLO, s.train_batch_tokens, 1e6, lambda *_, **__: None)
    model = random_model(s)
    losses = []

    def quantize(model):
        return t.quantize_model(model, s, SOLO, {}, 14.0)

    def tune_stage(stored, tuning):
        trainer.log = lambda text, event, **values: losses.append(values["losses"])
        idea.tune(t, trainer, Repeating(), model, stored, tuning)

    found = idea.quantize_in_stages(t, quantize, model, stages, tune_stage)
    return trainer, quantize(random_model(s)), found, losses


@pytest.mark.parametrize(
    "tuning",
    [
        idea.Tuning(steps=8, rows=0.01),
        idea.Tuning(steps=8, rows=0.0, vectors=0.0, columns=0.01),
        idea.Tuning(steps=8, rows=0.0, vectors=1.0),
        idea.Tuning(steps=8, rows=0.02, relative=True),
    ],
)
def test_the_loss_falls_and_integers_stay(tuning):
    """Nor do the weights of the model that trained change by a bit, and what is not to move."""
    trainer, before, after, (losses,) = make_case([tuning])
    assert losses[-1] < losses[0]
    assert list(after) == list(before)
    for name, old in before.items():
        assert after[name].dtype == old.dtype
        assert torch.equal(after[name], old) or "integers" not in name
    untouched = random_model(trainer.settings).state_dict()
    for name, p in trainer.model.state_dict().items():
        assert torch.equal(p, untouched[name])
    name = "blocks.1.mlp.up.weight"
    rows = trainer.model.get_parameter(name).shape[0]
    changed = after[name] != before[name]
    assert changed[:rows].any() == bool(tuning.rows)
    assert changed[rows:].any() == bool(tuning.columns)
    assert torch.equal(after["bigram_scale"], before["bigram_scale"]) == (not tuning.vectors)


def test_gradients_are_those_of_the_logarithms_of_steps():
    """Beside autograd through the products of integers and steps."""
    tuning = idea.Tuning(columns=1e-3, vectors=0.0)
    s = tiny()
    trainer = t.Trainer(random_model(s), s, SOLO, s.train_batch_tokens, 1e6, None)
    stored = t.quantize_model(trainer.model, s, SOLO, {}, 14.0)
    tuner = idea.Tuner(t, trainer, random_model(s), stored, tuning)
    tokens, targets = Repeating().next()
    found, _ = tuner.gradients(tokens, targets)
    found = tuner._moved_gradients(found)
    logs = {}
    weights = {}
    for name, grid in tuner.grids.items():
        logs[name] = [torch.zeros(n, requires_grad=True) for n in grid.shape]
        rows, columns = logs[name]
        weights[name] = grid * rows.exp()[:, None] * columns.exp()

    class Loss(torch.nn.Module):
        """As functional_call() wants it."""

        def __init__(self):
            super().__init__()
            self.model = trainer.model

        def forward(self):
            """The loss of the text."""
            return self.model.loss(tokens, targets, self.model.full_order)

    replaced = {f"model.{name}": weight for name, weight in weights.items()}
    loss = torch.func.functional_call(Loss(), replaced)
    wanted = torch.autograd.grad(
        loss, [log[0] for log in logs.values()] + [log[1] for log in logs.values()]
    )
    for x, y in zip(found, wanted, strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-6)


def test_what_is_tuned_is_what_the_artifact_holds():
    """Its integers on a trellis, and tuned steps within a rounding."""
    s = tiny(trellis_states=4, sdclip_k=14.0)
    model = random_model(s)
    trainer = t.Trainer(random_model(s), s, SOLO, s.train_batch_tokens, 1e6, None)
    stored = t.quantize_model(model, s, SOLO, {}, 14.0)
    before = {name: tensor.clone() for name, tensor in stored.items()}
    tuner = idea.Tuner(t, trainer, model, stored, idea.Tuning(steps=2, rows=0.03))
    tuner.run(Repeating())
    tuner.write_back()
    parameters = unpacked(s, stored)
    for name in tuner.rounded:
        assert relative(parameters[name], trainer.model.get_parameter(name)) < 0.01
        assert relative(unpacked(s, before)[name], parameters[name]) > 0.01


def test_late_matrices_move_before_they_are_rounded():
    stages = [idea.Tuning(steps=3, late=0.5, floats=0.05), idea.Tuning(steps=3, late=1.0)]
    _, before, after, losses = make_case(stages)
    assert [len(found) for found in losses] == [3, 3]
    assert list(after) == list(before)
    for name in ("blocks.2.mlp.up.weight", "blocks.0.mlp.up.weight", "embedding.weight"):
        early = name.startswith("blocks.0")
        name += " integers"
        assert torch.equal(after[name], before[name]) == early


def test_explore_compares_variants_on_the_same_weights(explore_here, script):
    """With spelling, which the model that trains keeps unfolded; the usual GPTQ_DAMP is as ever."""
    status, (line,), _ = explore_here(
        "it: SDCLIP_K=12 SPELLING_FEATURES=40 TRELLIS_STATES=4",
        "--export",
        *("--requantize", "steps: GPTQ_DAMP=0.0101"),
        *("--requantize", "vectors: GPTQ_DAMP=0.0102"),
        *("--requantize", "none: GPTQ_DAMP=0.01"),
        *("--idea", str(IDEA)),
    )
    assert status == 0
    assert line["none"]["quantized"] == line["quantized"]
    scores = [line[name]["quantized"] for name in ("none", "steps", "vectors")]
    assert len(set(scores)) == 3
    assert max(scores) - min(scores) < 0.3

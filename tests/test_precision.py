"""What activations are computed in: the choice, float16's scaled loss, how close losses stay."""

import itertools

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.support import (
    SMALLEST,
    SOLO,
    document_stream,
    fill_gradients,
    random_model,
    random_tokens,
    relative,
    tiny,
    validation_set,
)

GPU = torch.device("cuda")


@pytest.fixture
def t4(monkeypatch):
    """The device "cuda" is a T4, which has no bfloat16."""
    monkeypatch.setattr(t, "kernel_limits", lambda device: (75, 65_536))


def silent(*_, **__):
    pass


def trainer_of(settings: t.Settings) -> t.Trainer:
    model = t.build_model(settings, SOLO)
    return t.Trainer(model, settings, SOLO, settings.train_batch_tokens, 1e6, silent)


def test_auto_is_what_the_device_multiplies_fast(monkeypatch):
    monkeypatch.setattr(t, "kernel_limits", lambda device: (80, 166_912))
    assert t.activation_dtype(tiny(), GPU) == torch.bfloat16
    assert t.activation_dtype(tiny(), SOLO.device) == torch.float32


def test_a_gpu_without_bfloat16_takes_float16_and_the_scan_in_chunks(t4):
    assert t.activation_dtype(tiny(), GPU) == torch.float16
    assert t.activation_dtype(tiny(precision="bfloat16"), GPU) == torch.bfloat16
    assert t.choose_scan_backend(tiny(), GPU) == "chunked"


def test_the_scans_kernels_are_for_bfloat16_alone(monkeypatch):
    if t.triton is None:
        pytest.skip("needs triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(t, "kernel_limits", lambda device: (90, 232_448))
    sizes = {"mamba_d_state": 64, "mamba_head_dim": 64, "mamba_chunk_size": 64}
    chosen = [t.choose_scan_backend(tiny(precision=p, **sizes), GPU) for p in PRECISIONS]
    assert chosen == ["triton", "chunked", "chunked"]
    with pytest.raises(t.UserError, match="SCAN_BACKEND=triton is for PRECISION=bfloat16"):
        t.choose_scan_backend(tiny(precision="float16", scan_backend="triton", **sizes), GPU)


PRECISIONS = ("bfloat16", "float16", "float32")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activations_have_it_and_weights_stay_float32(precision):
    trainer = trainer_of(tiny(precision=precision))
    tokens = random_tokens(2, 33)
    hidden = trainer.model(tokens[:, :-1], trainer.model.order(True))
    assert str(hidden.dtype) == f"torch.{precision}"
    kind = trainer.model.order(True), False
    trainer.accumulate_gradients(kind, tokens[:, :-1], tokens[:, 1:])
    kept = [*trainer.tensors(), *(p.grad for p in trainer.model.parameters())]
    assert {x.dtype for x in kept} == {torch.float32}


def learn(precision: str, steps: int) -> np.ndarray:
    """The losses of a text in which four tokens may follow each."""
    settings = tiny(precision=precision, **SMALLEST)
    trainer = trainer_of(settings)
    generator = np.random.default_rng(0)
    followers = generator.integers(4, 16, (16, 4))
    order = trainer.model.order(True)
    losses = []
    for _ in range(steps):
        text = [generator.integers(4, 16, 4)]
        for _ in range(settings.train_seq_len):
            text.append(followers[text[-1], generator.integers(0, 4, 4)])
        tokens = torch.tensor(np.stack(text, axis=1))
        inputs = tokens[:, :-1], tokens[:, 1:]
        losses.append(trainer.graphed_steps((order, False), *inputs, 1.0, 0.95, 0.5).item())
    assert trainer.optimizers.skipped[0] == 0
    return np.array(losses)


def test_over_a_hundred_steps_losses_stay_within_a_hundredth():
    exact, *narrow = (learn(p, steps=100) for p in ("float32", "bfloat16", "float16"))
    assert exact[-10:].mean() < exact[:10].mean() - 0.3  # it learns
    for first, second in itertools.combinations([exact, *narrow], 2):
        assert abs(first[-10:].mean() - second[-10:].mean()) < 0.01


def test_the_scale_keeps_gradients_that_float16_has_not():
    """A loss of a thousandth stands for a mean over a thousand times as many tokens."""
    tokens = random_tokens(8, 33)
    settings = tiny(precision="float16")
    found = {}
    for precision, scaled in (("float32", False), ("float16", False), ("float16", True)):
        model = random_model(tiny(precision=precision))
        trainer = t.Trainer(model, settings, SOLO, settings.train_batch_tokens, 1e6, silent)
        trainer.optimizers.scales_loss = scaled
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], model.order(True)) / 1000
        loss.backward(trainer.optimizers.loss_scale())
        found[precision, scaled] = model.embedding.weight.grad / (2**16 if scaled else 1)
    expected = found["float32", False]
    assert relative(found["float16", True], expected) < 0.01
    assert relative(found["float16", False], expected) > 0.03


def test_a_step_that_overflows_is_skipped_and_halves_the_scale():
    trainer = trainer_of(tiny(precision="float16"))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    for step in range(2):
        assert trainer.optimizers.loss_scale() == 2 ** (16 - step)
        fill_gradients(trainer.model, poison=torch.inf)
        trainer.optimizers.step(1.0, 0.95)
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    fill_gradients(trainer.model)
    trainer.optimizers.step(1.0, 0.95)
    assert not all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    trainer.optimizers.skipped[0] = 100
    assert trainer.optimizers.loss_scale() == 1


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_adaptation_in_float16_scores_as_in_float32(precision):
    scores = []
    for chosen in ("float32", precision):
        settings = tiny(precision=chosen, ttt_lr=0.05)
        model = random_model(settings, spread=0.1)
        evaluator = t.Evaluator(model, settings, SOLO, validation_set(document_stream(257)))
        assert evaluator.scaler.is_enabled() == (chosen == "float16")
        scores.append(evaluator.evaluate().val_loss)
    assert scores[0] == pytest.approx(scores[1], abs=0.01)


def test_adaptation_survives_a_chunk_whose_gradients_overflow(monkeypatch):
    """Such an update is left out, as by torch.amp.GradScaler, and the next one is made."""
    settings = tiny(precision="float16")
    model = random_model(settings, spread=0.1)
    evaluator = t.Evaluator(model, settings, SOLO, validation_set(document_stream(257)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss, calls = evaluator.loss_function, itertools.count()
    overflowing = evaluator.scaler.get_scale() * 2.0**130

    def once_too_large(*inputs):
        found = loss(*inputs)
        return found * overflowing if next(calls) == 0 else found

    evaluator.loss_function = once_too_large
    sgd = torch.optim.SGD(evaluator.trained, lr=0.1)
    evaluator._train_epoch(0, 64, sgd)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    evaluator._train_epoch(0, 64, sgd)
    changed = [name for name, p in model.named_parameters() if not torch.equal(before[name], p)]
    assert changed and all(p.isfinite().all() for p in model.parameters())

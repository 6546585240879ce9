"""Tokens that are spelt alike: what they share, that it trains and is folded into the file."""

import dataclasses
import doctest
import os
import subprocess
import sys

import pytest
import torch

import train_gpt as t
from tests.support import (
    PATIENCE,
    SCRIPT,
    SOLO,
    Quiet,
    random_tokens,
    run_environment,
    run_here,
    tiny,
)


def make_trainer(settings: t.Settings) -> t.Trainer:
    """A trainer of a new model that says nothing."""
    model = t.build_model(settings, SOLO)
    return t.Trainer(model, settings, SOLO, 128, 10**6, Quiet())


def spelling_settings(tokenizer) -> t.Settings:
    return tiny(tokenizer_path=str(tokenizer), spelling_features=100)


def test_a_spelling_is_its_word_its_letters_and_how_it_begins():
    assert " ".join(t.spelling_of("▁The")) == (
        "space capital word:the <t th he e> <th the he> <the the>"
    )
    assert t.spelling_of("▁") == ["space", "word:", "<>"]
    (example,) = doctest.DocTestFinder().find(t.spelling_of, globs=vars(t))
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples))


def test_rows_have_one_length_and_controls_and_bytes_share_nothing(byte_tokenizer):
    tokenizer = t.Tokenizer(str(byte_tokenizer), 512)
    matrix = t.spelling_matrix(tokenizer, 100)
    assert matrix.shape == (512, 100)
    assert not matrix[:260].any()
    lengths = matrix[260:].norm(dim=1)
    assert (lengths < t.SPELLING_SCALE + 1e-6).all()
    assert (lengths > 0).float().mean() > 0.9


def test_features_are_the_same_in_every_process(byte_tokenizer):
    """Also where equally frequent ones are cut off, whatever a process's hashes of strings are."""
    code = "import sys, train_gpt as t; tokenizer = t.Tokenizer(sys.argv[1], 512); "
    code += "sys.stdout.buffer.write(t.spelling_matrix(tokenizer, 50).numpy())"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-c", code, str(byte_tokenizer)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, timeout=PATIENCE, check=True
    )
    own = t.spelling_matrix(t.Tokenizer(str(byte_tokenizer), 512), 50)
    assert done.stdout == own.numpy().tobytes()


def test_both_parts_train_as_the_embedding_and_are_folded_into_it(byte_tokenizer, monkeypatch):
    settings = spelling_settings(byte_tokenizer)
    # One layer, which is compiled fast.
    settings = dataclasses.replace(settings, num_layers=1, mamba_layers="none")
    usual = dataclasses.replace(settings, spelling_features=0)
    names = [name for name, _ in t.build_model(usual, SOLO).named_parameters()]
    trainer = make_trainer(settings)
    model = trainer.model
    parts = model.embedding.parametrizations.weight
    rate = settings.tied_embed_lr
    (group,) = (g for g in trainer.optimizers.adam.param_groups if g["base_lr"] == rate)
    assert {id(parts.original), id(parts[0].shared)} <= {id(p) for p in group["params"]}

    tokens = random_tokens(2, 33)
    order = model.order(True)
    pair = tokens[:, :-1], tokens[:, 1:]
    before = model.embedding.weight.detach().clone()
    for _ in range(3):
        trainer.accumulate_gradients((order, False), *pair)
        trainer.optimizers.step(1.0, 0.9)
    assert not torch.equal(model.embedding.weight, before)
    assert not torch.equal(model.embedding.weight, parts.original)  # both have learned
    nats = model.score(*pair, order)
    whole = torch.compile(model.score, fullgraph=True, backend="aot_eager")  # as on a GPU
    assert torch.allclose(whole(*pair, order), nats, atol=1e-5)

    t.fold_spelling(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model.score(*pair, order), nats)
    t.fold_spelling(model)  # where there is nothing to fold, nothing happens
    assert torch.equal(model.score(*pair, order), nats)


def test_what_is_exported_is_an_ordinary_model(monkeypatch, shards, tmp_path):
    environment = run_environment(shards, tmp_path, spelling_features=64)
    assert run_here(monkeypatch, environment) == 0
    loaded, settings = t.load_model(tmp_path / "a.int6.lzma", tiny(device="cpu"), set(), SOLO)
    assert settings.spelling_features == 0
    assert not any(name.startswith(t.SHARED_NAMES) for name, _ in loaded.named_parameters())


@pytest.mark.parametrize("other", [{"late_qat_threshold": 0.5}, {"quantizer": "ternary"}])
def test_training_on_the_grid_is_refused(other):
    with pytest.raises(t.UserError, match="needs SPELLING_FEATURES=0$"):
        t.validate_settings(tiny(spelling_features=9, **other), 1)


def test_a_run_that_was_killed_goes_on_with_both_parts(monkeypatch, shards, tmp_path):
    """To the same artifact, byte for byte."""
    files = []
    for name, stops in (("whole", False), ("killed", True)):
        changes = {"spelling_features": 64, "run_id": name, "checkpoint_every": 1e-6}
        environment = run_environment(shards, tmp_path, **changes)
        if stops:
            gradients, save = t.Trainer.accumulate_gradients, t.Trainer.save

            def fail(trainer, *arguments, gradients=gradients):
                if trainer.steps_done == 4:
                    raise ValueError("killed")
                return gradients(trainer, *arguments)

            def save_now(trainer, save=save):
                save(trainer)
                trainer.checkpoints.finish()

            with monkeypatch.context() as patch:
                patch.setattr(t.Trainer, "accumulate_gradients", fail)
                patch.setattr(t.Trainer, "save", save_now)
                with pytest.raises(ValueError, match="killed"):
                    run_here(patch, environment)
            assert (tmp_path / "killed.checkpoint").exists()
        assert run_here(monkeypatch, environment) == 0
        files.append((tmp_path / f"{name}.int6.lzma").read_bytes())
    assert files[0] == files[1]
    assert "resumed" in (tmp_path / "killed.txt").read_text()

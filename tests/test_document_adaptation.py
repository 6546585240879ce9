"""The idea of documents that adapt otherwise than EVAL_MODE=documents has them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.support import (
    SOLO,
    called_here,
    random_model,
    run_environment,
    run_here,
    stream_of,
    tiny,
    validation_set,
)
from tests.test_documents import LENGTHS, MATRICES, by_hand
from tests.test_evaluation import evaluate
from tools.command import UserError
from tools.ideas import document_adaptation as idea

VARIANTS = ("", "lesson=window", "start=orthogonal", "start=orthogonal moves=0", "momentum=0.5")


def variant(changes: str, **settings) -> idea.Choice:
    """A choice, by what the command line changes, of a model whose branches learn in large steps.

    Those of matrices, so that references by hand know them.
    """
    settings = {"ttt_lora_layers": f"{MATRICES},head", "tie_embeddings": False, **settings}
    _, choice = idea.read_variant(f"test: {changes}", tiny(eval_mode="documents", **settings))
    return choice


def nats_of(model: t.Model, choice: idea.Choice, tokens: np.ndarray) -> np.ndarray:
    """A stream's scores by a choice."""
    return idea.Trial(model, SOLO, validation_set(tokens)).score(choice).nats


@pytest.mark.parametrize("layers", ["mlp,head", MATRICES])
def test_without_a_change_scores_are_the_scripts_to_the_bit(layers):
    choice = variant("", ttt_lora_layers=layers)
    settings = tiny(eval_mode="documents", ttt_lora_layers=layers, tie_embeddings=False)
    assert settings == t.Settings(**{name: getattr(choice, name) for name in t.FIELDS})
    model = random_model(settings)
    tokens = stream_of(LENGTHS)
    unchanged = nats_of(model, choice, tokens)
    assert np.array_equal(unchanged, evaluate(model, settings, tokens).nats)
    for changes in VARIANTS[1:]:
        changed = variant(changes, ttt_lora_layers=layers)
        assert not np.array_equal(nats_of(model, changed, tokens), unchanged)


@pytest.mark.parametrize("changes", VARIANTS)
def test_scores_are_those_of_the_same_rule_by_hand(changes):
    """Of documents that are scored at once, and of one that is longer than a window."""
    choice = variant(changes, ttt_lora_lr=0.01)
    model = random_model(choice)
    tokens = stream_of([70, 25, 61])
    found = nats_of(model, choice, tokens)
    for begin, end in ((0, 70), (70, 95), (95, 156)):
        drawn = idea.Branches(model, choice)
        expected = by_hand(model, choice, tokens[begin : end + 1], drawn)
        assert np.abs(found[begin:end] - expected).max() < 2e-4


@pytest.mark.parametrize("changes", VARIANTS[1:])
def test_a_score_depends_on_earlier_tokens_of_its_document_alone(changes):
    choice = variant(changes)
    model = random_model(choice)
    tokens = stream_of(LENGTHS)
    expected = nats_of(model, choice, tokens)
    begins = np.cumsum([0, *LENGTHS])
    for document, seen in ((0, 30), (2, 8), (4, 64)):
        other = np.random.default_rng(3).integers(4, 512, len(tokens)).astype(np.uint16)
        other[tokens == t.BOS_ID] = t.BOS_ID
        kept = begins[document] + np.arange(seen)
        other[kept] = tokens[kept]
        found = nats_of(model, choice, other)
        assert np.array_equal(found[kept[:-1]], expected[kept[:-1]])
        assert (found != expected).mean() > 0.5


def test_orthogonal_matrices_are_as_large_as_uniform_ones():
    branches = [idea.Branches(random_model(c), c) for c in map(variant, ("", "start=orthogonal"))]
    uniform, orthogonal = (drawn.head.down.detach() for drawn in branches)
    squares = orthogonal.mT @ orthogonal
    assert torch.allclose(squares, torch.eye(3).expand(3, 3, 3) / 3, atol=1e-6)
    assert float(orthogonal.norm() / uniform.norm()) == pytest.approx(1, abs=0.2)


def test_a_trial_compares_with_the_same_windows_and_leaves_the_model_as_it_was():
    choice = variant("")
    model = random_model(choice)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    tokens = stream_of(LENGTHS)
    trial = idea.Trial(model, SOLO, validation_set(tokens))
    line = json.loads(json.dumps(trial.run("nothing", variant("lr=0 lesson=window"))))
    assert abs(line["gain"]) <= 1e-6 and line["gain_error"] <= 1e-6
    assert line["tokens"] == len(tokens) - 1
    score = trial.score(choice)
    line = trial.run("as it is", choice)
    assert line["bpb"] == round(score.val_bpb, 6)
    frozen = evaluate(model, dataclasses.replace(choice, ttt_enabled=False), tokens)
    gains = []
    for begin, length in zip(np.cumsum([0, *LENGTHS]), LENGTHS, strict=False):
        own = slice(begin, begin + length)
        gains.append((frozen.nats[own] - score.nats[own]).sum() / np.log(2))
    size = 2 * sum(LENGTHS)
    assert line["gain"] == pytest.approx(sum(gains) / size, abs=2e-6)
    unlike = [gain - sum(gains) / size * 2 * n for gain, n in zip(gains, LENGTHS, strict=True)]
    assert line["gain_error"] == pytest.approx(np.linalg.norm(unlike) / size, abs=2e-6)
    (row,) = line["by_length"]
    assert row["below"] == 256 and row["documents"] == len(LENGTHS)
    assert row["frozen_bpb"] == round(frozen.val_bpb, 5) and row["bpb"] == round(score.val_bpb, 5)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_trial_of_some_documents_scores_them_as_among_the_others():
    """Whatever their lengths; the last one ends with the text, without BOS."""
    tokens = stream_of([*range(2, 42)])[:-1]
    all_of_them = idea.choose_documents(validation_set(tokens))
    assert np.array_equal(all_of_them.validation.tokens, tokens)
    some = idea.choose_documents(validation_set(tokens), 4)
    assert np.diff(some.begins, append=len(some.places)).tolist() == [6, 16, 26, 36]
    choice = variant("slots=1")
    model = random_model(choice)
    whole = nats_of(model, choice, tokens)
    found = nats_of(model, choice, some.validation.tokens)
    assert np.array_equal(found, whole[some.places])
    assert np.array_equal(some.sums(whole[some.places])[:1], [whole[some.places[:6]].sum()])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rank=3", "a colon"),
        ("a: ranks=3", "ranks=3"),
        ("a: rank=b", 'rank="b" should be a whole number'),
        ("a: layers=mlp,tail", "should be some of"),
        ("a: slots=0", "TTT_LORA_SLOTS=0 must be from 1"),
        ("a: lr=nan", "TTT_LORA_LR=nan must be from 0"),
        ("a: decay=-1", "TTT_LORA_DECAY"),
        ("a: momentum=1", "MOMENTUM=1.0 must be"),
        ("a: lesson=none", "should be one of piece, window"),
    ],
)
def test_a_mistaken_variant_is_one_line(text, problem):
    with pytest.raises((UserError, t.UserError), match=problem):
        idea.read_variant(text, tiny(eval_mode="documents"))


@pytest.fixture
def environment(shards, tmp_path):
    """What an EVAL_ONLY of a random model's artifact is told."""
    where = {"artifact": tmp_path / "a.lzma", "eval_mode": "documents"}
    told = run_environment(shards, tmp_path, **where)
    settings, _ = t.read_settings(told)
    stored = t.quantize_model(random_model(settings), settings, SOLO, {}, 6.0)
    (tmp_path / "a.lzma").write_bytes(t.pack_artifact(settings, stored))
    return told | {"EVAL_ONLY": "1", "EVAL_NLL_PATH": str(tmp_path / "a.npy")}


@pytest.fixture
def start(environment):
    """Starts the command in that environment; its lines of JSON."""

    def run(*arguments) -> list[dict]:
        given = environment | {"EVAL_MODE": "sliding"}
        done = called_here(idea.command, "document_adaptation", *arguments, environment=given)
        assert done.returncode == 0
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_the_command_scores_an_artifact_as_the_script_does(
    monkeypatch, environment, start, tmp_path
):
    assert run_here(monkeypatch, environment) == 0
    *_, final, _ = t.read_records(tmp_path / "a.eval.jsonl")
    (line,) = start("--nats", str(tmp_path / "a.npy"))
    assert line["variant"] == "as it is" and line["choice"]["rank"] == 3
    assert line["bpb"] == line["nats_bpb"] == round(final["val_bpb"], 6)
    assert run_here(monkeypatch, environment | {"TTT_ENABLED": "0"}) == 0
    *_, final, _ = t.read_records(tmp_path / "a.eval.jsonl")
    assert line["frozen_bpb"] == round(final["val_bpb"], 6) != line["bpb"]


def test_the_command_compares_variants_on_some_documents(start, tmp_path):
    variants = ["--variant", "a: piece=16", "--variant", "b: moves=0 piece=16"]
    first, second = start(*variants, "--documents", "3", "--artifact", str(tmp_path / "a.lzma"))
    assert (first["variant"], second["variant"]) == ("a", "b")
    assert first["documents"] == second["documents"] == 3
    assert first["frozen_bpb"] == second["frozen_bpb"]
    assert first["gain"] != second["gain"]
    assert first["choice"]["moves"] and not second["choice"]["moves"]
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(UserError, match="no score for each target"):
        start("--nats", str(tmp_path / "a.npy"))

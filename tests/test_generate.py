"""Generation: one token at a time with carried state is the full forward, and needs every state."""

import functools
import json
import re

import pytest
import torch

import train_gpt as t
from tests.support import (
    SOLO,
    random_model,
    random_tokens,
    relative,
    run_environment,
    run_here,
    tiny,
)

LENGTH = 32
HINGE = {"layer_order": "0,1,2,1,2"}  # a state for each place in the order, not for each layer
VARIANTS = {
    "Mamba-3": HINGE,
    "Mamba-2": HINGE | {"mamba_version": 2},
    "the first Mamba": HINGE | {"mamba_version": 1},
    "heavy tails, no skips": {"mamba_decay": "heavy_tail", "unet_skips": False},
    "scaled, untied": {"ln_scale": True, "tie_embeddings": False},
    "attention, part of it turned": {"mamba_layers": "none", "rope_fraction": 0.5},
    "exclusive, untied, scaled by depth": {
        "xsa_last_n": 2,
        "tie_embeddings": False,
        "ln_scale": True,
        "rope_base": 100.0,
    },
    "no bigrams": {"bigram_vocab_size": 0},
    "documents, Mamba-3": HINGE | {"document_reset": True},
    "documents, Mamba-2": {"document_reset": True, "mamba_version": 2},
    "documents, the first Mamba": {"document_reset": True, "mamba_version": 1},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def model_and_tokens(variant: dict, dtype: torch.dtype) -> tuple[t.Model, torch.Tensor]:
    """A model whose every parameter matters, and two texts with documents that begin in them."""
    model = random_model(tiny(train_seq_len=LENGTH, **variant)).to(dtype)
    model.compute_dtype = dtype
    pairs = model.rotary_table.shape[-1]
    frequencies = model.settings.rope_base ** -(torch.arange(pairs, dtype=dtype) / pairs)
    model.rotary_table = t.rotary_turns(torch.arange(LENGTH, dtype=dtype), frequencies)
    tokens = random_tokens(2, LENGTH)
    tokens[0, [0, 9, 10, 20]] = t.BOS_ID
    tokens[1, 17] = t.BOS_ID
    return model, tokens


def step_by_step(model: t.Model, tokens: torch.Tensor, change=None) -> torch.Tensor:
    """Logits at every position of tokens, read one by one; change(state) after half of them."""
    order, outputs = model.order(True), []
    state = model.begin(len(tokens), order)
    for position, token in enumerate(tokens.split(1, dim=1)):
        if change is not None and position == LENGTH // 2:
            change(state)
        outputs.append(model.logits(model.step(token, order, state)))
    return torch.cat(outputs, dim=1)


@each_variant
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str
)
@torch.no_grad()
def test_one_token_at_a_time_gives_the_full_forwards_logits(variant, dtype, tolerance):
    model, tokens = model_and_tokens(variant, dtype)
    expected = model.logits(model(tokens, model.order(True)))
    found = step_by_step(model, tokens)
    assert found.dtype == dtype
    for position in range(LENGTH):
        assert relative(found[:, position], expected[:, position]) < tolerance, position


RECURRENT = {  # what layers 0 and 2 of a hybrid carry, by version; layer 1 is attention
    3: {"scan.angle", "scan.ssm", "scan.key", "scan.value"},
    2: {"scan.ssm", "inputs"},
    1: {"scan", "inputs"},
}
WITHOUT_WEIGHT = {"scan.key", "scan.value"}  # of Mamba-2, which looks back at no last token
CARRIED = [
    *[(3, f"layers.{place}.{name}") for place in (0, 2) for name in sorted(RECURRENT[3])],
    *[(version, f"layers.4.{name}") for version in (1, 2) for name in sorted(RECURRENT[version])],
    *[(3, f"layers.{place}.{name}") for place in (1, 3) for name in ("key", "value")],
    (3, "previous"),
    (3, "seen"),
]


def named_tensors(state, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors that hold anything in nested tuples and lists, by what leads to them."""
    if isinstance(state, torch.Tensor):
        return {name: state} if state.numel() else {}
    if state is None:
        return {}
    parts = dict(enumerate(state)) if isinstance(state, list) else state._asdict()
    found = (named_tensors(x, f"{name}.{key}".lstrip(".")) for key, x in parts.items())
    return functools.reduce(dict.__or__, found)


@pytest.mark.parametrize(("version", "name"), CARRIED)
@torch.no_grad()
def test_without_any_one_of_the_carried_states_the_logits_differ(version, name):
    """Each of them, put back to zero once, is missed at once; the list has all that there are."""
    model, tokens = model_and_tokens(HINGE | {"mamba_version": version}, torch.float64)
    tokens[tokens == t.BOS_ID] = 5

    def forget(state: t.TextState):
        tensors = named_tensors(state)
        recurrent = RECURRENT[version] | (WITHOUT_WEIGHT if version == 2 else set())
        layers = [recurrent, {"key", "value"}, recurrent, {"key", "value"}, recurrent]
        expected = {f"layers.{i}.{name}" for i, names in enumerate(layers) for name in names}
        assert set(tensors) == {"previous", "seen"} | expected
        assert tensors[name].any()
        tensors[name].zero_()

    expected = model.logits(model(tokens, model.order(True)))
    found = step_by_step(model, tokens, change=forget)
    half = LENGTH // 2
    assert relative(found[:, :half], expected[:, :half]) < 1e-9
    assert relative(found[:, half], expected[:, half]) > 1e-6


@torch.no_grad()
def test_beyond_the_training_window_attention_sees_the_last_window():
    """At every place of a text three windows long, one attention layer says what it says of the
    last window alone."""
    window = 8
    settings = tiny(train_seq_len=window, num_layers=1, mamba_layers="none", bigram_vocab_size=0)
    model, tokens = random_model(settings), random_tokens(2, 3 * window)
    order = model.order(True)
    state = model.begin(2, order)
    for end in range(1, 3 * window + 1):
        found = model.step(tokens[:, end - 1 : end], order, state)
        expected = model(tokens[:, max(0, end - window) : end], order)[:, -1:]
        assert relative(found, expected) < 1e-5


# ---- Drawing tokens ------------------------------------------------------------------------------


def test_draws_follow_temperature_and_top_p():
    """Counts of many draws: softmax(logits / temperature) of the fewest tokens that reach top_p."""
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)
    cases = {
        (1.0, 1.0): [0.1, 0.5, 0.15, 0.25],
        (1.0, 0.7): [0, 2 / 3, 0, 1 / 3],
        (1.0, 0.76): [0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9],
        (1.0, 1e-6): [0, 1, 0, 0],
        (0.5, 1.0): [x**2 / 0.345 for x in (0.1, 0.5, 0.15, 0.25)],
        (0.0, 1.0): [0, 1, 0, 0],
    }
    for (temperature, top_p), expected in cases.items():
        noise = torch.empty(logits.shape).exponential_(generator=generator)
        drawn = t.draw_tokens(logits, noise, temperature, top_p)
        shares = drawn.bincount(minlength=4) / len(drawn)
        assert torch.allclose(shares, torch.tensor(expected).float(), atol=0.01), (
            temperature,
            top_p,
        )


@pytest.mark.parametrize("prompt", [1, 2, 40])
@torch.no_grad()
def test_greedy_generation_takes_the_full_forwards_likeliest_tokens(prompt):
    model, tokens = random_model(tiny(train_seq_len=64)), random_tokens(3, prompt, bos=True)
    made = t.generate(model, tokens, 7, temperature=0.0)
    text = torch.cat([tokens, made], dim=1)
    logits = model.logits(model(text[:, :-1], model.order(True)))
    assert torch.equal(made, logits[:, prompt - 1 :].argmax(-1))


def test_the_same_generator_draws_the_same_texts_and_rows_differ():
    model, tokens = random_model(tiny()), random_tokens(1, 3, bos=True).expand(4, -1)
    first, again, other = (
        t.generate(model, tokens, 12, 1.0, 0.9, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row.tolist()) for row in first}) == 4


# ---- SAMPLE_PROMPT -------------------------------------------------------------------------------


def sample_run(monkeypatch, shards, folder, **settings) -> tuple[int, list[dict]]:
    """A run's status and records: a training run, or with eval_only one of its artifact."""
    usual = {"iterations": 2, "sample_prompt": "The film", "sample_tokens": 9}
    environment = run_environment(shards, folder, **(usual | settings))
    status = run_here(monkeypatch, environment)
    name = "a.eval.jsonl" if settings.get("eval_only") else "a.jsonl"
    records = (folder / name).read_text().splitlines() if (folder / name).exists() else []
    return status, [json.loads(line) for line in records]


def only(records: list[dict], event: str) -> dict:
    (record,) = (r for r in records if r["event"] == event)
    return record


def test_a_run_shows_what_its_artifact_writes_and_scores_as_without(
    monkeypatch, capsys, shards, tmp_path
):
    """The sample is of the weights as loaded, before the evaluation adapts them, and changes no
    score; EVAL_ONLY=1 draws it again, also where there is nothing to score."""
    status, records = sample_run(monkeypatch, shards, tmp_path)
    assert status == 0
    sample, out = only(records, "sample"), capsys.readouterr().out
    shown = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda c: rf"\x{ord(c[0]):02x}", sample["sample"])
    assert shown in out
    assert sample["sample"].startswith("The film")
    assert (sample["prompt"], sample["tokens"]) == ("The film", 9)
    events = [r["event"] for r in records]
    assert events.index("after_quantization") < events.index("sample") < events.index("final")

    settings, _ = t.read_settings(run_environment(shards, tmp_path))
    model, _ = t.load_model(settings.artifact_path, settings, set(), SOLO)
    tokenizer = t.Tokenizer(settings.tokenizer_path, settings.vocab_size)
    prompt = [t.BOS_ID, *tokenizer.model.encode("The film")]
    generator = torch.Generator().manual_seed(settings.seed)
    made = t.generate(model, torch.tensor([prompt]), 9, 0.8, 0.95, generator)
    assert sample["sample"] == tokenizer.decode(prompt + made[0].tolist())

    _, silent = sample_run(monkeypatch, shards, tmp_path, eval_only=True, sample_prompt="")
    assert not [r for r in silent if r["event"] == "sample"]
    assert only(silent, "final")["val_bpb"] == only(records, "final")["val_bpb"]

    (tmp_path / "a.eval.jsonl").unlink()
    capsys.readouterr()
    empty = tmp_path / "no shards"
    empty.mkdir()
    status, alone = sample_run(monkeypatch, shards, tmp_path, eval_only=True, data_path=empty)
    assert status == 0
    assert only(alone, "sample")["sample"] == sample["sample"]
    assert "nothing to score" in capsys.readouterr().out.splitlines()[-1]


def test_a_prompt_may_have_lines_and_a_samples_control_characters_are_shown(
    monkeypatch, capsys, shards, tmp_path
):
    monkeypatch.setattr(t.Tokenizer, "decode", lambda *_: "a\x1b[2J\0b\n\tc")
    status, records = sample_run(monkeypatch, shards, tmp_path, sample_prompt="The\n\tfilm\n")
    sample, out = only(records, "sample"), capsys.readouterr().out
    assert (status, sample["prompt"]) == (0, "The\n\tfilm\n")
    assert sample["sample"] == "a\x1b[2J\0b\n\tc"
    for text in (out, (tmp_path / "a.txt").read_text()):
        assert "SAMPLE_PROMPT='The\\n\\tfilm\\n'" in text
        assert "\n\n  a\\x1b[2J\\x00b\n  \tc\n\n" in text  # no line is one of the log's


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sample_prompt": "   "}, "SAMPLE_PROMPT holds no text"),
        ({"sample_prompt": "a\x1bb"}, "SAMPLE_PROMPT='a\\x1bb' holds a line break"),
        ({"sample_temperature": -1}, "SAMPLE_TEMPERATURE=-1.0 must be from 0 to 100"),
        ({"sample_top_p": 0}, "SAMPLE_TOP_P=0.0 must be from above 0 to 1"),
        ({"sample_top_p": 1.5}, "SAMPLE_TOP_P=1.5 must be from above 0 to 1"),
        ({"sample_tokens": 0}, "SAMPLE_TOKENS=0 must be from 1"),
    ],
    ids=str,
)
def test_a_sample_that_cannot_be_is_refused_before_anything_trains(
    changes, problem, monkeypatch, capsys, shards, tmp_path
):
    environment = run_environment(shards, tmp_path, **({"sample_prompt": "a"} | changes))
    assert run_here(monkeypatch, environment) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "a.int6.lzma").exists()

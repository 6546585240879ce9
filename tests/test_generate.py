"""Generation: one token at a time with carried state is the full forward, and needs every state."""

import functools

import pytest
import torch

import train_gpt as t
from tests.support import random_model, random_tokens, relative, tiny

LENGTH = 32
HINGE = {"layer_order": "0,1,2,1,2"}  # a state for each place in the order, not for each layer
VARIANTS = {
    "Mamba-3": HINGE,
    "Mamba-2": HINGE | {"mamba_version": 2},
    "the first Mamba": HINGE | {"mamba_version": 1},
    "heavy tails, no skips": {"mamba_decay": "heavy_tail", "unet_skips": False},
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


# ---- Drawing tokens --------------------------------------------------------------------------------------------------


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

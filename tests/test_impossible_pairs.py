"""MASK_IMPOSSIBLE_PAIRS: which pairs BPE never writes, against the tokenizer itself."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import train_gpt as t
from tests.support import (
    SCRIPT,
    TEXT,
    assert_equal_in_float64,
    cross_entropy_case,
    interpreted,
    random_model,
    random_tokens,
    tiny,
)

MARK = "\u2603"  # no piece holds it: what stands between two is encoded as if alone
IDEAS = SCRIPT.parent / "tools" / "ideas"


@pytest.fixture
def script(monkeypatch):
    """train_gpt.py's module, as it was once the test is over."""
    for name in ("Batches", "Trainer"):
        monkeypatch.setattr(t, name, getattr(t, name))
    return t


def never_encoded(tokenizer: t.Tokenizer, rows: np.ndarray) -> np.ndarray:
    """Which pairs of pieces the tokenizer writes otherwise, but for those with two spaces, which it
    makes one: (rows, V).
    """
    ids = list(range(tokenizer.model.vocab_size()))
    pieces, made = tokenizer.model.IdToPiece(ids), list(t.merge_order(tokenizer).values())
    never, tail = (
        np.zeros((len(rows), len(ids)), bool),
        [i for i in tokenizer.model.encode(MARK) if i not in made],
    )
    for row, first in enumerate(rows):
        others = [i for i in made if first in made and "▁▁" not in pieces[first] + pieces[i]]
        codes = tokenizer.model.encode([MARK + pieces[first] + pieces[i] + MARK for i in others])
        never[row, others] = [
            code[-2 - len(tail) :] != [first, i, *tail]
            for i, code in zip(others, codes, strict=True)
        ]
    return never


@pytest.mark.parametrize(
    "name", ["byte_tokenizer", "plain_tokenizer", "dummy_prefix_tokenizer", "sample"]
)
def test_pairs_are_those_that_the_tokenizer_never_writes(request, name):
    path = request.getfixturevalue(name)
    path = path / "sample_1024_bpe.model" if name == "sample" else path
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    tokenizer = t.Tokenizer(str(path), size)
    found = t.impossible_pairs(t.merge_order(tokenizer), size)
    rows = np.arange(0, size, {200: 1, 512: 3, 1024: 13}[size])
    assert (found[rows] == never_encoded(tokenizer, rows)).all()
    assert found.sum() > size / 2


def test_a_tokenizer_with_symbols_of_its_user_keeps_them_apart(tmp_path):
    """They are cut out before BPE begins: no pair with one is ruled out, and no other one
    wrongly.
    """
    path = tmp_path / "symbols.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 3),
        model_prefix=str(path.with_suffix("")),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<sep>", "tion", "▁the"],
        minloglevel=2,
    )
    tokenizer = t.Tokenizer(str(path), 400)
    merges = t.merge_order(tokenizer)
    assert len(merges) > 100
    symbols = [tokenizer.model.PieceToId(piece) for piece in ("<sep>", "tion", "▁the")]
    assert not set(symbols) & set(merges.values())
    found = t.impossible_pairs(merges, 400)
    assert found.sum() > 200
    assert not found[symbols].any()
    assert not found[:, symbols].any()
    assert not (found & ~never_encoded(tokenizer, np.arange(400))).any()


def test_merges_of_one_rank_are_made_from_the_left():
    """Of "aaa", BPE makes "aa" and "a": behind "a" there is no "aa"."""
    found = t.impossible_pairs({"aa": 0, "a": 1}, 2)
    assert found.tolist() == [[False, False], [True, True]]


def test_no_text_holds_such_a_pair(sample):
    tokenizer = t.Tokenizer(str(sample / "sample_1024_bpe.model"), 1024)
    never = t.impossible_pairs(t.merge_order(tokenizer), 1024)
    for split in ("train", "val"):
        for shard in t.open_shards(str(sample), split):
            tokens = shard.read()
            assert not never[tokens[:-1], tokens[1:]].any()


def train_unigram(path: Path) -> None:
    """A tokenizer of 100 tokens that knows no merges."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 3),
        model_prefix=str(path.with_suffix("")),
        vocab_size=100,
        model_type="unigram",
        minloglevel=2,
    )


def test_a_unigram_model_has_none(tmp_path):
    path = tmp_path / "unigram.model"
    train_unigram(path)
    assert t.merge_order(t.Tokenizer(str(path), 100)) == {}
    assert not t.impossible_pairs({}, 100).any()


def test_a_model_knows_them(byte_tokenizer):
    """Probabilities sum to one, those of impossible tokens are nothing, others are in the same
    proportion as before.
    """
    settings = tiny(tokenizer_path=str(byte_tokenizer))
    tokens, targets = random_tokens(2, 9), random_tokens(2, 9, seed=1)
    usual = random_model(settings)
    model = random_model(dataclasses.replace(settings, mask_impossible_pairs=True))
    never = t.unpacked_pairs(model.impossible[tokens], 512)
    hidden = model(tokens, model.order(True))
    every = torch.arange(512).expand(2, 9, 512)
    nats = torch.stack(
        [model.nats(hidden, every[..., token], tokens) for token in range(512)], dim=-1
    )
    assert torch.allclose(nats.neg().exp().sum(-1), torch.ones(2, 9))
    assert never.any()
    assert (nats[never] > settings.logit_softcap - 5).all()
    before = torch.log_softmax(usual.logits(usual(tokens, usual.order(True))), dim=-1)
    gained = (before + nats)[~never]
    row = torch.arange(18).view(2, 9, 1).expand_as(never)[~never]
    for i in range(18):
        assert torch.allclose(gained[row == i], gained[row == i][0], atol=1e-5)
    assert torch.equal(
        model.score(tokens, targets, model.order(True)), model.nats(hidden, targets, tokens)
    )
    assert set(model.state_dict()) == set(usual.state_dict())  # an artifact holds what it held


def test_another_tokenizer_is_refused(tmp_path):
    path = tmp_path / "unigram.model"
    train_unigram(path)
    with pytest.raises(t.UserError, match="no BPE model .* MASK_IMPOSSIBLE_PAIRS=0"):
        t.packed_pairs(str(path), 100)


def test_packed_rows_are_unpacked():
    torch.manual_seed(0)
    never = torch.rand(5, 13) < 0.5
    packed = torch.from_numpy(np.packbits(never.numpy(), axis=1, bitorder="little"))
    assert torch.equal(t.unpacked_pairs(packed, 13), never)


@interpreted
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("size", "cap"), [(1000, 30.0), (17, 3.0)])
def test_the_fused_cross_entropy(size, cap, compiled):
    """Nats and gradients against float64, also of a target that cannot be."""
    torch.manual_seed(0)
    hidden, weight, targets, grad = cross_entropy_case(size)
    tokens, never = torch.randint(0, size, (37,)), torch.rand(size, size) < 0.3
    never[tokens[0], targets[0]] = True
    packed = torch.from_numpy(np.packbits(never.numpy(), axis=1, bitorder="little"))

    def exact(hidden, weight):
        logits = (cap * torch.tanh(hidden @ weight.mT / cap)).masked_fill(never[tokens], -cap)
        return F.cross_entropy(logits, targets, reduction="none")

    def fused(hidden, weight, slopes=True):
        return t.fused_cross_entropy(hidden, weight, targets, cap, slopes, [tokens, packed])

    assert_equal_in_float64(
        exact, lambda *leaves: fused(*leaves)[0], compiled, hidden, weight, grad
    )
    nats, stored = fused(hidden, weight, slopes=False)
    assert torch.equal(nats, fused(hidden, weight)[0])
    assert stored.numel() == 0


def test_explore_trains_and_exports_with_an_idea(script, explore_here):
    usual = "it: SDCLIP_K=6", "--export"
    status, (without,), _ = explore_here(*usual)
    assert status == 0
    status, (line,), _ = explore_here(*usual, "--idea", str(IDEAS / "small_batches_first.py"))
    assert status == 0
    assert line["bpb"] != without["bpb"]
    assert line["steps"] > without["steps"]
    assert abs(line["quantized"] - line["bpb"]["ema"]) < 0.1
    assert math.isfinite(line["final"])

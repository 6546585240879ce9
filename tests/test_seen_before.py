"""tools/ideas/seen_before.py: what stood earlier is counted exactly, and mixing keeps sums of 1."""

import numpy as np
import pytest
import torch

import train_gpt as t
from tools.command import UserError
from tools.ideas import seen_before

TOKENS = np.random.default_rng(0).integers(0, 4, 300)
TOKENS[::60] = t.BOS_ID
DOCUMENTS = np.cumsum(TOKENS == t.BOS_ID)


def counted_one_by_one(tokens, places, length: int, target: int) -> tuple[int, int, int]:
    """Contexts, targets and kinds before a target, by looking at each earlier place."""
    context = tokens[target - length : target].tolist()
    followers = [
        tokens[place]
        for place in range(length, target)
        if tokens[place - length : place].tolist() == context
        and places[place - length : place].tolist() == places[target - length : target].tolist()
    ]
    return len(followers), followers.count(tokens[target]), len(set(followers))


@pytest.mark.parametrize("places", [np.zeros_like(TOKENS), DOCUMENTS], ids=["all", "document"])
def test_counts_are_those_of_a_loop(places):
    seen = seen_before.count(TOKENS, places, len(TOKENS))
    for length, columns in zip(seen_before.LENGTHS, seen, strict=True):
        for target in range(length, len(TOKENS)):
            wanted = counted_one_by_one(TOKENS, places, length, target)
            assert tuple(int(x[target]) for x in columns) == wanted, (length, target)


def test_a_target_and_what_follows_it_change_no_weight_of_its_score():
    others = TOKENS.copy()
    others[200:] = 3 - others[200:]
    for one, other in zip(
        seen_before.count(TOKENS, DOCUMENTS, len(TOKENS)),
        seen_before.count(others, DOCUMENTS, len(TOKENS)),
        strict=True,
    ):
        assert torch.equal(one.contexts[:201], other.contexts[:201])
        assert torch.equal(one.kinds[:201], other.kinds[:201])
        assert torch.equal(one.targets[:200], other.targets[:200])


def test_mixed_probabilities_of_all_tokens_sum_to_one():
    model = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    weights = [torch.tensor([0.5, 0.3, -0.7], dtype=torch.float64)] * len(seen_before.LENGTHS)
    total = torch.zeros(1, dtype=torch.float64)
    for token in range(4):
        tokens = np.r_[TOKENS[:250], token]
        seen = seen_before.count(tokens, np.zeros_like(tokens), 1)
        assert seen[0].contexts > 0
        total += seen_before.mixed(model[token : token + 1], seen, weights)
    torch.testing.assert_close(total, torch.ones(1, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_text_that_repeats_itself_gains(tmp_path, monkeypatch, capsys):
    text = np.tile(np.r_[t.BOS_ID, np.arange(2, 60)], 8)
    header = np.zeros(256, dtype="<i4")
    header[:3] = t.SHARD_MAGIC, 1, len(text)
    shard = tmp_path / "text.bin"
    shard.write_bytes(header.tobytes() + text.astype("<u2").tobytes())
    scores = tmp_path / "nats.npy"
    np.save(scores, np.full(len(text) - 1, 3.0, dtype=np.float32))
    options = ["--text", str(shard), "--scores", str(scores)]
    assert seen_before.main(options) == 0
    rows = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line)
    whole = next(float(row.split()[0]) for name, row in rows.items() if name.startswith("all  "))
    own = next(float(row.split()[0]) for name, row in rows.items() if name.startswith("the own"))
    assert whole > 1  # the first document is new, the others are known
    assert abs(own) < 0.1  # within a document no token stands twice
    np.save(scores, np.zeros(7, dtype=np.float32))
    with pytest.raises(UserError, match="is not of"):
        seen_before.main(options)

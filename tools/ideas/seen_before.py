"""Idea: each score is mixed with what followed the same tokens earlier, counted without a hash.

    EVAL_ONLY=1 RUN_ID=first EVAL_NLL_PATH=nats.npy python train_gpt.py
    python -m tools.ideas.seen_before --scores nats.npy \\
        --text data/datasets/fineweb10B_sp8192/fineweb_val_000000.bin

If the k tokens before a target occurred C times earlier, before T kinds of tokens, and c times
before this token, c / C is a distribution over tokens. From the shortest k to the longest, first
over all earlier text (--before shards, then the text) and then over the same document alone:

    P <- (1 - m) P + m c / C          where C > 0; at first P = exp(-score)
    m = sigmoid(a + b ln(C + 1) + d ln((T + 1/2) / (C + 1)))

m does not depend on the target, so P stays a distribution; only tokens already scored are counted.
a, b and d of each k are fitted to the scores of one half, and the gain is measured on the other.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m tools.ideas.seen_before",
        file=sys.stderr,
    )
    sys.exit(2)

import train_gpt as t
from tools.command import Parser, need, run_command

LENGTHS = (1, 2, 3, 4, 5, 6, 8)  # k
FIRST_MIX = -4.0  # of a: m is 0.02 before anything is fitted
PENALTY = 1e-5  # times the squares of a, b and d, which few targets may tell nothing of


class Seen(NamedTuple):
    """Of one k, for each target, float64: how often its context stood earlier, how often before
    the target, and before how many kinds of tokens.
    """

    contexts: Tensor
    targets: Tensor
    kinds: Tensor


# ---- Counting ------------------------------------------------------------------------------------


def in_groups(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """At each place the sum of values at earlier places that have the same id, int64."""
    order = np.argsort(ids, kind="stable")
    grouped = ids[order]
    sums = np.cumsum(values[order]) - values[order]
    begins = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]])
    sums -= np.repeat(sums[begins], np.diff(np.r_[begins, len(ids)]))
    found = np.empty(len(ids), dtype=np.int64)
    found[order] = sums
    return found


def pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """An id for each pair of ids, which are at least 0: the same for the same pair."""
    whole = first * (second.max() + 1) + second
    return np.unique(whole, return_inverse=True)[1].reshape(whole.shape)


def count(tokens: np.ndarray, places: np.ndarray, scored: int) -> list[Seen]:
    """Seen of each of LENGTHS for the last `scored` tokens, each but the first a target.

    places: an id for each token, of where contexts count as the same: its document, or always 0.
    """
    ones = np.ones(len(tokens), dtype=np.int64)
    # Ids of the k tokens that end here: with k = 1 each token, in its place.
    ids = pairs(places, tokens)
    found = []
    for length in range(1, max(LENGTHS) + 1):
        contexts = np.r_[0, ids[:-1] + 1]  # 0: before the first token there is none
        ids = pairs(contexts, tokens)
        if length in LENGTHS:
            targets = in_groups(ids, ones)
            kinds = in_groups(contexts, (targets == 0).astype(np.int64))
            columns = in_groups(contexts, ones), targets, kinds
            found.append(Seen(*(torch.tensor(x[-scored:], dtype=torch.float64) for x in columns)))
    return found


# ---- Mixing --------------------------------------------------------------------------------------


def mixed(probabilities: Tensor, seen: list[Seen], weights: list[Tensor]) -> Tensor:
    """Targets' probabilities (n,), mixed by the equation above; weights: (a, b, d) of each."""
    for (contexts, targets, kinds), (a, b, d) in zip(seen, weights, strict=True):
        rarity = torch.log((kinds + 0.5) / (contexts + 1))
        part = torch.sigmoid(a + b * torch.log(contexts + 1) + d * rarity) * (contexts > 0)
        probabilities = (1 - part) * probabilities + part * targets / contexts.clamp(min=1)
    return probabilities


def fit(probabilities: Tensor, seen: list[Seen]) -> list[Tensor]:
    """The weights with which these targets' scores are the least."""
    weights = [torch.tensor([FIRST_MIX, 0, 0], dtype=torch.float64) for _ in seen]
    for each in weights:
        each.requires_grad_()
    options = {"max_iter": 150, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(weights, lr=0.5, **options)

    def loss() -> Tensor:
        optimizer.zero_grad()
        nats = -torch.log(mixed(probabilities, seen, weights)).mean()
        nats = nats + PENALTY * sum(each.square().sum() for each in weights)
        nats.backward()
        return nats

    optimizer.step(loss)
    return [each.detach() for each in weights]


def gains(scores: Tensor, seen: list[Seen]) -> Tensor:
    """Nats that mixing takes from each score (n,), each half by weights fitted to the other."""
    middle = len(scores) // 2
    halves = slice(0, middle), slice(middle, None)
    parts = []
    for here, other in (halves, halves[::-1]):
        cut = [[Seen(*(x[half] for x in each)) for each in seen] for half in (here, other)]
        weights = fit(torch.exp(-scores[other]), cut[1])
        parts.append(scores[here] + torch.log(mixed(torch.exp(-scores[here]), cut[0], weights)))
    return torch.cat(parts)


# ---- The command ---------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", required=True, type=Path, metavar="SHARD", help="the tokens that were scored")
    add("--scores", required=True, type=Path, metavar="NPY", help="what EVAL_NLL_PATH kept of them")
    add("--before", nargs="*", default=[], type=Path, metavar="SHARD", help="tokens before them")
    return parser.parse_args(arguments)


def read(path: Path) -> np.ndarray:
    """A shard's tokens, int64. Raises UserError."""
    shard = t.Shard(path)
    return shard.read(0, shard.count).astype(np.int64)


def main(arguments: list[str] | None = None) -> int:
    """Tells the gains; returns the exit status."""
    options = parse_arguments(arguments)
    text = read(options.text)
    scores = torch.tensor(np.load(options.scores), dtype=torch.float64)
    problem = f"{len(scores):,} scores of {len(text):,} tokens, of which the first is no target"
    fits = len(scores) == len(text) - 1
    need(fits, f"{options.scores} is not of {options.text}: {problem}")
    tokens = np.concatenate([*map(read, options.before), text])
    documents = np.cumsum(tokens == t.BOS_ID)
    ways = {"all": count(tokens, np.zeros_like(tokens), len(scores))}
    ways["the own document"] = count(tokens, documents, len(scores))
    ways["all, then the own document"] = [*ways["all"], *ways["the own document"]]
    print(f"{len(scores):,} targets behind {len(tokens) - len(scores):,} tokens")
    print(f"{'':28} {scores.mean():.5f} nats a target")
    for name, seen in ways.items():
        less = gains(scores, seen)
        error = less.std() / len(less) ** 0.5
        print(f"{name:28} {(scores - less).mean():.5f}: {less.mean():.5f} ± {error:.5f} less")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("seen_before", main, t.UserError))

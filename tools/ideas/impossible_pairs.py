"""Idea: no probability for what BPE cannot write. An --idea of `python -m tools.explore`.

BPE merges two neighbours wherever it knows a merge for them, so that many tokens never stand
behind a given one: in the contest's tokenizers 2 % of all pairs, though likely ones (" th" is never
followed by "e"). The model need not learn which: here their logits are the least there are,
-LOGIT_SOFTCAP, and have no gradient. Which these are, the tokenizer alone says, and it depends on
the token before only; so it is still a softmax over the whole vocabulary, chosen before the target
is looked at.
"""

import functools
import itertools
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as t


def merge_order(tokenizer: t.Tokenizer) -> dict[str, int]:
    """The pieces that BPE makes and their tokens, in the order of its merges, that of the ids.

    Its scores fall by 1 from piece to piece, beginning at 0. User-defined symbols stand before
    them, all with a score of 0: they are cut out of a text before BPE sees it, are part of no
    merge, and so may stand beside every token. Empty for other models than BPE's.
    """
    ids = list(range(tokenizer.model.vocab_size()))
    ordinary = np.flatnonzero(~tokenizer.is_special & ~np.array(tokenizer.model.IsByte(ids)))
    scores = np.array(tokenizer.model.GetScore(ids))[ordinary]
    zeros = np.flatnonzero(scores == 0)
    if len(zeros) == 0:
        return {}
    first = zeros[-1]
    if scores[:first].any() or (np.diff(scores[first:]) != -1).any():
        return {}
    pieces = tokenizer.model.IdToPiece(ids)
    return {pieces[token]: int(token) for token in ordinary[first:]}


def last_parts(piece: str, merges: dict[str, int]) -> list[str]:
    """The two texts that BPE merges last when it makes a piece; of a character, itself."""
    parts = list(piece)
    while len(parts) > 2:
        order = [merges.get(left + right, math.inf) for left, right in itertools.pairwise(parts)]
        place = order.index(min(order))  # the leftmost, if the first merge of the order fits twice
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


class Making(NamedTuple):
    """How BPE makes its pieces, as far as neighbours can tell. A merge is named by its token."""

    latest: dict[str, int]  # of a piece, the last of the order's merges in it; characters: -1
    beginnings: dict[str, dict[str, float]]  # of a piece, what stood there: the merge that ended it
    endings: dict[str, dict[str, float]]  # likewise; what no merge ends, the piece, has infinity


def make_pieces(merges: dict[str, int]) -> Making:
    """Makes every piece as BPE does, and notes what stood at its two ends until which merge."""
    made = Making(defaultdict(lambda: -1), {}, {})
    for piece in sorted(merges, key=len):
        token = merges[piece]
        parts = last_parts(piece, merges)
        if len(parts) == 2:
            made.latest[piece] = max(token, made.latest[parts[0]], made.latest[parts[1]])
        for ends, part in ((made.beginnings, parts[0]), (made.endings, parts[-1])):
            ends[piece] = ends.get(part, {}) | {part: token, piece: math.inf}
    return made


class Stay(NamedTuple):
    """A text stands at one end of a token while BPE makes it."""

    token: int
    gone: float  # the merge that ends it


def by_text(ends: dict[str, dict[str, float]], merges: dict[str, int]) -> dict[str, list[Stay]]:
    """Of every text all tokens at whose beginning, or whose end, it stands for some time."""
    stays = defaultdict(list)
    for piece, texts in ends.items():
        for text, gone in texts.items():
            stays[text].append(Stay(merges[piece], gone))
    return stays


def impossible_pairs(merges: dict[str, int], size: int) -> np.ndarray:
    """Which tokens BPE never puts behind which: bool (size, size), the token before first.

    merges: merge_order()'s. Two tokens stay apart unless something at the end of the first and
    something at the beginning of the second, both there at the same time, make a known merge
    before they are gone. For each merge, and each way to cut its piece into a left and a right
    text, these are the tokens that end with the left one long enough, times those that begin with
    the right one long enough.
    """
    latest, beginnings, endings = make_pieces(merges)
    begins = by_text(beginnings, merges)
    ends = by_text(endings, merges)
    never = np.zeros((size, size), bool)
    for piece, merge in merges.items():
        for cut in range(1, len(piece)):
            left = piece[:cut]
            right = piece[cut:]
            # BPE works in the order of merges, and on equal ones from the left: one in the first
            # token comes before this one, one in the second behind it.
            before = [s.token for s in ends[left] if s.gone > max(merge, latest[right])]
            behind = [s.token for s in begins[right] if s.gone > max(merge - 1, latest[left])]
            never[np.ix_(before, behind)] = True
    return never


@functools.lru_cache(maxsize=1)
def table(path: str, vocab_size: int) -> Tensor:
    """impossible_pairs() of a tokenizer's file."""
    merges = merge_order(t.Tokenizer(path, vocab_size))
    return torch.from_numpy(impossible_pairs(merges, vocab_size))


@torch.library.custom_op("ideas::possible_cross_entropy", mutates_args=())
def fused_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    targets: Tensor,
    impossible: Tensor,
    cap: float,
    slopes: bool,
) -> tuple[Tensor, Tensor]:
    """t.fused_cross_entropy() of targets behind tokens (T,), with impossible pairs (V, V) bool.

    A logit of -infinity is capped at -cap and has a slope of 0. In the script, the kernel could
    read the pairs itself; here they are a pass of their own.
    """
    logits = F.linear(hidden, weight).masked_fill_(impossible[tokens], -torch.inf)
    return t.launch_cross_entropy(logits, targets, cap, slopes)


@fused_cross_entropy.register_fake
def possible_fake(hidden, weight, tokens, targets, impossible, cap, slopes):
    """The outputs without their values."""
    shape = (len(hidden), len(weight)) if slopes else (0,)
    return hidden.new_empty(len(hidden), dtype=torch.float32), hidden.new_empty(shape)


def possible_context(ctx, inputs, output) -> None:
    """What the backward pass needs: hidden states, weight and the logits' gradients."""
    hidden, weight, *_ = inputs
    _, gradients = output
    ctx.save_for_backward(hidden, weight, gradients)


def possible_autograd(ctx, d_nats: Tensor, d_logits: None):
    """Gradients of hidden states and weight, as the script's own operator has them."""
    d_hidden, d_weight, *_ = t.cross_entropy_autograd(ctx, d_nats, d_logits)
    return d_hidden, d_weight, None, None, None, None, None


fused_cross_entropy.register_autograd(possible_autograd, setup_context=possible_context)


def install(script) -> None:
    """Changes train_gpt.py's models."""

    class Model(script.Model):
        """Gives what BPE cannot write no probability."""

        def __init__(self, settings, device: torch.device, *others):
            super().__init__(settings, device, *others)
            pairs = table(settings.tokenizer_path, settings.vocab_size)
            self.register_buffer("impossible", pairs.to(device), persistent=False)

        def logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
            """Softcapped float32 logits of the vocabulary behind tokens."""
            logits = super().logits(hidden)
            return logits.masked_fill(self.impossible[tokens], -self.settings.logit_softcap)

        def nats(self, hidden: Tensor, targets: Tensor, tokens: Tensor) -> Tensor:
            """Negative log-likelihood of targets (B, T) behind tokens, float32 nats."""
            if not (hidden.is_cuda and t.triton):
                return super().nats(hidden, targets, tokens)
            nats, _ = fused_cross_entropy(
                hidden.flatten(0, 1),
                self.output_matrix.to(hidden.dtype),
                tokens.flatten(),
                targets.flatten(),
                self.impossible,
                self.settings.logit_softcap,
                torch.is_grad_enabled(),
            )
            return nats.view(targets.shape)

    script.Model = Model

"""Idea: no probability for what BPE cannot write. For `python -m tools.explore --idea tools/ideas/impossible_pairs.py`.

BPE merges two neighbours wherever it knows a merge for them, so that many tokens never stand behind a given one: in the
contest's tokenizers 2 % of all pairs, though likely ones (" th" is never followed by "e"). The model need not learn which: here
their logits are the least there are, -LOGIT_SOFTCAP, and have no gradient. Which these are, the tokenizer alone says, and it
depends on the token before only; so it is still a softmax over the whole vocabulary, chosen before the target is looked at.
"""

import functools
import math
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as t


def merge_order(tokenizer: t.Tokenizer) -> dict[str, int]:
    """The pieces that BPE makes and the tokens they are, in the order of its merges, which is that of the ids. Empty for
    other models than BPE's, whose scores fall by 1 from piece to piece."""
    ids = list(range(tokenizer.model.vocab_size()))
    made = np.flatnonzero(~tokenizer.is_special & ~np.array(tokenizer.model.IsByte(ids)))
    scores, pieces = np.array(tokenizer.model.GetScore(ids)), tokenizer.model.IdToPiece(ids)
    return {pieces[i]: int(i) for i in made} if (np.diff(scores[made]) == -1).all() else {}


def impossible_pairs(merges: dict[str, int], size: int) -> np.ndarray:
    """Which tokens BPE never puts behind which: bool (size, size), the token before first. merges: merge_order()'s.

    Two tokens stay apart unless something at the end of the first and something at the beginning of the second, both there
    at the same time while BPE makes the two, are merged before they are gone. So each piece is made as BPE makes it, and
    what has stood at its two ends is noted with the merge that took it away.
    """
    never, latest = (
        np.zeros((size, size), bool),
        defaultdict(lambda: -1),
    )  # latest: the last merge a piece is made by
    chains, sides = ({}, {}), (defaultdict(list), defaultdict(list))  # of beginnings, of ends
    for piece in sorted(merges, key=len):
        parts, token = list(piece), merges[piece]
        while len(parts) > 2:  # the first merge of the order, the leftmost if it fits twice
            at = min(
                range(len(parts) - 1), key=lambda k: merges.get(parts[k] + parts[k + 1], math.inf)
            )
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            latest[piece] = max(token, latest[parts[0]], latest[parts[1]])
        for part, chain, side in zip((parts[0], parts[-1]), chains, sides):
            chain[piece] = chain.get(part, {}) | {part: token, piece: math.inf}
            for text, gone in chain[piece].items():
                side[text].append((token, gone))
    begins, ends = sides
    for piece, merge in merges.items():
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece))):
            rows = [token for token, gone in ends[left] if gone > max(merge, latest[right])]
            columns = [
                token for token, gone in begins[right] if gone >= merge and gone > latest[left]
            ]
            never[np.ix_(rows, columns)] = True
    return never


@functools.lru_cache(maxsize=1)
def table(path: str, vocab_size: int) -> Tensor:
    """impossible_pairs() of a tokenizer's file."""
    return torch.from_numpy(
        impossible_pairs(merge_order(t.Tokenizer(path, vocab_size)), vocab_size)
    )


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
    """t.fused_cross_entropy() of targets behind tokens (T,), with impossible pairs (V, V) bool. A logit of -infinity is capped at
    -cap and has a slope of 0. In the script, the kernel could read the pairs itself; here they are a pass of their own."""
    logits = F.linear(hidden, weight).masked_fill_(impossible[tokens], -torch.inf)
    nats, size = hidden.new_empty(len(hidden), dtype=torch.float32), logits.shape[1]
    block, fast = t.triton.next_power_of_2(size), hidden.dtype == torch.bfloat16
    arguments = logits, targets, nats, size, cap, block, slopes, fast
    t.launch(t.cross_entropy_rows, (len(hidden),), *arguments, warps=max(4, block // 2048))
    return nats, logits if slopes else logits.new_empty(0)


@fused_cross_entropy.register_fake
def _(hidden, weight, tokens, targets, impossible, cap, slopes):
    shape = (len(hidden), len(weight)) if slopes else (0,)
    return hidden.new_empty(len(hidden), dtype=torch.float32), hidden.new_empty(shape)


fused_cross_entropy.register_autograd(
    lambda ctx, d_nats, _: (*t._cross_entropy_autograd(ctx, d_nats, _)[:2], *[None] * 5),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2], output[1]),
)


def install(script) -> None:
    """Changes train_gpt.py's models."""

    class Model(script.Model):
        def __init__(self, settings, device: torch.device):
            super().__init__(settings, device)
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
            rows, before, flat = hidden.flatten(0, 1), tokens.flatten(), targets.flatten()
            weight, cap = self.embedding.weight.to(hidden.dtype), self.settings.logit_softcap
            slopes = torch.is_grad_enabled()
            nats, _ = fused_cross_entropy(rows, weight, before, flat, self.impossible, cap, slopes)
            return nats.view(targets.shape)

    script.Model = Model

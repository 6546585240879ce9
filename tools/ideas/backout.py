"""Idea: the readout can leave out what the middle knew. An --idea of `python -m tools.explore`.

What layers need to find the next token stays in the residual stream to the end, where only the
prediction is wanted. Here logits are read from norm(x - b·middle), where middle is the stream
after the layer in the middle of the order and b a learned number, 0 at first.
"""

from functools import partial

import torch
from torch import nn


def install(script) -> None:
    """Changes train_gpt.py's Model and its Block."""

    class Model(script.Model):
        """Takes the middle's part out of what the last block leaves."""

        def __init__(self, settings, device, *others):
            super().__init__(settings, device, *others)
            self.backout = nn.Parameter(torch.zeros((), device=device))

        def through_blocks(self, embedded, order, context, states=None, run_block=None):
            """As the script's, whose norm comes behind."""
            middle = len(order) // 2
            kept = []

            def run(block, x, embedded, context, state):
                step = partial(run_block, block) if run_block else block
                x, state = step(x, embedded, context, state)
                kept.append(x)
                if len(kept) == len(order):
                    x = x - self.backout.to(x.dtype) * kept[middle]
                return x, state

            return super().through_blocks(embedded, order, context, states, run)

    script.Model = Model

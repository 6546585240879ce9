"""Idea: each channel has a residual mix of its own. An --idea of `python -m tools.explore`.

A block begins with x = keep·x + mix·embedded, where keep and mix are two numbers. Here they are
vectors (width,), ones and zeros at first, so that some channels can carry the token's embedding
through all layers and others what layers have computed. Adam trains them, as vectors and scales.
"""

import torch
from torch import nn


def install(script) -> None:
    """Changes train_gpt.py's Block."""

    class Block(script.Block):
        """Its forward() takes residual_mix apart by rows: keep and mix."""

        def __init__(self, settings, *others):
            super().__init__(settings, *others)
            scalars = self.residual_mix.detach()  # (2,)
            vectors = scalars.unsqueeze(1).repeat(1, settings.model_dim)
            self.residual_mix = nn.Parameter(vectors.to(torch.float32))  # (2, width)

    script.Block = Block

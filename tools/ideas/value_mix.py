"""Idea: attention's values read the embedding, too. An --idea of `python -m tools.explore`.

What an attention layer passes on about an earlier token is mostly which token it is, and the
residual stream no longer has that in its first form. Here value = W (x + m·embedded), with the
layer's input x, the normed embeddings and a learned vector m (width,), zeros at first; queries and
keys read x.
"""

import torch
from torch import nn


def install(script) -> None:
    """Changes train_gpt.py's Attention and Block."""

    class Value(script.Linear):
        """y = W (x + m·embedded); Block says what is embedded as long as it runs."""

        embedded = None

        def __init__(self, width: int, outputs: int):
            super().__init__(width, outputs)
            self.mix = nn.Parameter(torch.zeros(width))

        def mixed(self, x):
            """What W is applied to, in x's dtype."""
            return x + self.mix.to(x.dtype) * self.embedded

        def forward(self, x):
            """Values of x (..., width)."""
            return super().forward(self.mixed(x))

        def effective_input(self, x):
            """For GPTQ's Hessian."""
            return script.widened(self.mixed(x))

    class Attention(script.Attention):
        """The script's, with values of another layer."""

        def __init__(self, settings, *others):
            super().__init__(settings, *others)
            usual = self.value
            with torch.random.fork_rng(devices=[]):  # others begin as they would
                self.value = Value(usual.in_features, usual.out_features)
            self.value.weight = usual.weight

    class Block(script.Block):
        """Lends attention's values the embeddings."""

        def forward(self, x, embedded, context, state=None):
            """As the script's."""
            if not isinstance(self.mixer, Attention):
                return super().forward(x, embedded, context, state)
            self.mixer.value.embedded = embedded
            result = super().forward(x, embedded, context, state)
            self.mixer.value.embedded = None
            return result

    script.Attention = Attention
    script.Block = Block

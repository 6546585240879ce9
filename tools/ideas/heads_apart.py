"""Idea: Muon sees each head as a matrix of its own. An --idea of `python -m tools.explore`.

MUON_ROW_GROUPS takes in_proj's gates, values, features and dynamics as matrices of their own. Here
the rows of a query or key matrix that make one head are a matrix, too, as no head reads another's.
With IDEA_HEADS=all, so are the rows that make one Mamba head's gate, and those that make its value.
Small matrices are padded to the size of the largest, so a step takes longer than it need.

    IDEA_HEADS=attention    or all
"""

import os

HEADS = os.environ.get("IDEA_HEADS", "attention")


def install(script) -> None:
    """Changes the groups of rows that train_gpt.py's Attention and Mamba tell."""
    if HEADS not in ("attention", "all"):
        raise script.UserError(f"IDEA_HEADS={HEADS} should be attention or all")

    class Attention(script.Attention):
        """Queries and keys head by head."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            for layer in (self.query, self.key):
                layer.row_groups = (self.head_dim,) * (layer.out_features // self.head_dim)

    class Mamba(script.Mamba):
        """Gates and values head by head."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            if self.in_proj.row_groups:
                gates, values, *others = self.in_proj.row_groups
                heads = (gates + values) // self.sizes.channels
                self.in_proj.row_groups = (self.sizes.channels,) * heads + tuple(others)

    script.Attention = Attention
    if HEADS == "all":
        script.Mamba = Mamba

"""Idea: tokens that are spelled alike learn together. For `python -m tools.explore --idea tools/ideas/spelling.py`.

While a model trains, a token's embedding is a vector of its own plus the weighted sum of vectors that it shares with all tokens
that have the same letters: the word without case, groups of two to four letters, a space in front, a capital. Behind
training the sum replaces them, so that the artifact holds no more than before. The tokenizer alone says what is shared.
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import train_gpt as t

FEATURES = 4096  # the most frequent
SCALE = 0.4  # of their sum, beside the token's own vector
OWN, SHARED = (
    "embedding.parametrizations.weight.original",
    "embedding.parametrizations.weight.0.shared",
)


def features(piece: str) -> list[str]:
    """What is shared by spelling, such as "<th" and "e>" of " the"."""
    core = piece.lstrip("▁")
    framed = f"<{core.lower()}>"
    groups = [framed[i : i + size] for size in (2, 3, 4) for i in range(len(framed) - size + 1)]
    return (
        ["space"] * piece.startswith("▁")
        + ["capital"] * core[:1].isupper()
        + [f"word:{core.lower()}", *groups]
    )


def feature_matrix(tokenizer: t.Tokenizer, most: int) -> Tensor:
    """Of each token the features that several have, at most so many, float32 (V, features); rows of length SCALE or less."""
    ids = list(range(len(tokenizer.is_special)))
    ordinary = ~tokenizer.is_special & ~np.array(tokenizer.model.IsByte(ids))
    found = [
        Counter(features(piece) if kept else ())
        for piece, kept in zip(tokenizer.model.IdToPiece(ids), ordinary)
    ]
    tokens_with = Counter(
        name for names in found for name in names
    )  # in one order in every process, also of equals
    column = {name: i for i, (name, count) in enumerate(tokens_with.most_common(most)) if count > 1}
    matrix = torch.zeros(len(ids), len(column))
    for row, names in zip(matrix, found):
        for name in names.keys() & column.keys():
            row[column[name]] = names[name]
    return SCALE * matrix / matrix.norm(dim=1, keepdim=True).clamp(min=1)


class SharedBySpelling(nn.Module):
    """Adds to a table (V, width) what its rows share."""

    def __init__(self, matrix: Tensor, width: int):
        super().__init__()
        self.shared = nn.Parameter(matrix.new_zeros(matrix.shape[1], width))
        self.register_buffer(
            "matrix", matrix.bfloat16() if matrix.is_cuda else matrix, persistent=False
        )

    def forward(self, table: Tensor) -> Tensor:
        return table + (self.matrix @ self.shared.to(self.matrix.dtype)).to(table.dtype)


def install(script) -> None:
    """Changes what train_gpt.py trains, not what it exports or loads."""

    class Model(script.Model):
        def named_parameters(self, *arguments, **options):
            """By names that tell the optimizers that these are embeddings."""
            usual = {OWN: "embedding.weight", SHARED: "spelling_embedding.weight"}
            for name, p in super().named_parameters(*arguments, **options):
                yield usual.get(name, name), p

    class Trainer(script.Trainer):
        def __init__(self, model, settings, *others, **options):
            tokenizer = t.Tokenizer(settings.tokenizer_path, settings.vocab_size)
            matrix = feature_matrix(tokenizer, FEATURES).to(model.embedding.weight.device)
            shared = SharedBySpelling(matrix, settings.model_dim)
            parametrize.register_parametrization(model.embedding, "weight", shared)
            super().__init__(model, settings, *others, **options)

    def export(trainer, batches) -> dict:
        parametrize.remove_parametrizations(
            trainer.model.embedding, "weight", leave_parametrized=True
        )
        return exported(trainer, batches)

    exported, script.export, script.Model, script.Trainer = script.export, export, Model, Trainer

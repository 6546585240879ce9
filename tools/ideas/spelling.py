"""Idea: tokens that are spelled alike learn together: `--idea tools/ideas/spelling.py`.

While a model trains, a token's embedding is a vector of its own plus the weighted sum of vectors
that it shares with all tokens that have the same letters: the word without case, groups of two to
four letters, a space in front, a capital. Behind training the sum replaces them, so that the
artifact holds no more than before. The tokenizer alone says what is shared.
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import train_gpt as t

FEATURES = 4096  # the most frequent
SCALE = 0.4  # of their sum, beside the token's own vector
PARAMETRIZED = "embedding.parametrizations."  # so begin torch's names of both parts


def features(piece: str) -> list[str]:
    """What a piece shares by its spelling, such as "<th" and "e>" of " the"."""
    word = piece.lstrip("▁")
    framed = f"<{word.lower()}>"
    found = []
    if piece.startswith("▁"):
        found.append("space")
    if word[:1].isupper():
        found.append("capital")
    found.append(f"word:{word.lower()}")
    for size in (2, 3, 4):
        found += [framed[start : start + size] for start in range(len(framed) - size + 1)]
    return found


def feature_matrix(tokenizer: t.Tokenizer, most: int) -> Tensor:
    """Which token has which feature how often, float32 (V, features), in rows of length SCALE.

    Features are those that several tokens have, the most frequent first, `most` of them at most:
    in one order in every process, also of equals. A row's length is SCALE, or 0 where nothing is
    shared, as in controls and bytes.
    """
    ids = list(range(len(tokenizer.is_special)))
    spelled = ~tokenizer.is_special & ~np.array(tokenizer.model.IsByte(ids))
    pieces = tokenizer.model.IdToPiece(ids)
    found = [Counter() for _ in ids]
    for token in np.flatnonzero(spelled):
        found[token].update(features(pieces[token]))
    tokens_with = Counter(name for names in found for name in names)
    frequent = tokens_with.most_common(most)
    shared = [name for name, count in frequent if count > 1]
    column = {name: number for number, name in enumerate(shared)}
    matrix = torch.zeros(len(ids), len(column))
    for row, names in zip(matrix, found, strict=True):
        for name in names.keys() & column.keys():
            row[column[name]] = names[name]
    return SCALE * matrix / matrix.norm(dim=1, keepdim=True).clamp(min=1)


class SharedBySpelling(nn.Module):
    """Adds to a table (V, width) what its rows share: matrix (V, features) by learned vectors."""

    def __init__(self, matrix: Tensor, width: int):
        super().__init__()
        self.shared = nn.Parameter(matrix.new_zeros(matrix.shape[1], width))
        half = matrix.bfloat16() if matrix.is_cuda else matrix
        self.register_buffer("matrix", half, persistent=False)

    def forward(self, table: Tensor) -> Tensor:
        """The table as the model reads it, (V, width)."""
        return table + (self.matrix @ self.shared.to(self.matrix.dtype)).to(table.dtype)


def install(script) -> None:
    """Changes what train_gpt.py trains, not what it exports or loads."""
    usual_kind = script.parameter_kind

    def parameter_kind(name: str, parameter: Tensor) -> str:
        """Both parts of the embedding train as it does."""
        return "embedding" if name.startswith(PARAMETRIZED) else usual_kind(name, parameter)

    class Trainer(script.Trainer):
        """Trains a model whose embedding has two parts."""

        def __init__(self, model, settings, *others, **options):
            tokenizer = t.Tokenizer(settings.tokenizer_path, settings.vocab_size)
            matrix = feature_matrix(tokenizer, FEATURES).to(model.embedding.weight.device)
            shared = SharedBySpelling(matrix, settings.model_dim)
            parametrize.register_parametrization(model.embedding, "weight", shared)
            super().__init__(model, settings, *others, **options)

    usual_export = script.export

    def export(trainer, batches) -> dict:
        """The same, once the sum of both parts is in the embedding's place."""
        parametrize.remove_parametrizations(trainer.model.embedding, "weight")
        return usual_export(trainer, batches)

    script.parameter_kind = parameter_kind
    script.export = export
    script.Trainer = Trainer

"""Idea: logits read more than the tied embedding. An --idea of `python -m tools.explore`.

One matrix E (vocab, width) says what a token is and what comes before it. Here the output matrix is
E + V U, where U (RANK, width) begins as any matrix and is Muon's, and V (vocab, RANK) begins with
zeros and is Adam's: what follows is learned beside what is meant, in RANK directions. The sum is
made once in a step and the logits cost no more. A product that begins at zero grows quickly under
Adam, so V has RATE of the embedding's rate. What tokens share by their spelling is in E alone.

    IDEA_HEAD_RANK=64     columns of V
    IDEA_HEAD_RATE=0.25   of TIED_EMBED_LR; with TIE_EMBEDDINGS=0 of HEAD_LR, and E is that matrix
"""

import os

from torch import nn

RANK = int(os.environ.get("IDEA_HEAD_RANK", "64"))
RATE = float(os.environ.get("IDEA_HEAD_RATE", "0.25"))


def install(script) -> None:
    """Changes train_gpt.py's Model, and the rate of one of its parameters."""
    usual_groups = script.parameter_groups

    class Model(script.Model):
        """Adds V U to the output matrix."""

        def __init__(self, settings, device, *others):
            super().__init__(settings, device, *others)
            # By its name it is Adam's, and an artifact holds integers of 6 bits.
            self.low_rank_embedding = nn.Embedding(settings.vocab_size, RANK, device=device)  # V
            nn.init.zeros_(self.low_rank_embedding.weight)
            self.low_rank_directions = script.Linear(settings.model_dim, RANK).to(device)  # U

        @property
        def output_matrix(self):
            """E + V U, (vocab, width) float32; the product in the activations' type."""
            tied = self.settings.tie_embeddings
            table = self.embedding.weight if tied else self.output_embedding.weight
            rows = self.low_rank_embedding.weight.to(self.compute_dtype)
            directions = self.low_rank_directions.weight.to(self.compute_dtype)
            return table + (rows @ directions).to(table.dtype)

    def parameter_groups(model, settings) -> tuple[dict, list[dict]]:
        """As train_gpt.py's, but V has a group and rate of its own."""
        matrices, others = usual_groups(model, settings)
        rows = model.low_rank_embedding.weight
        rate = settings.tied_embed_lr if settings.tie_embeddings else settings.head_lr
        groups = []
        for group in others:
            kept = [p for p in group["params"] if p is not rows]
            groups.append(group | {"params": kept})
            if len(kept) < len(group["params"]):
                own = group | {"params": [rows], "base_lr": RATE * rate}
        return matrices, [*groups, own]

    script.Model = Model
    script.parameter_groups = parameter_groups

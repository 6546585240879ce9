"""Idea: Muon sees what Mamba's in_proj makes as matrices of their own. An --idea of tools.explore.

in_proj stacks the rows that make gates, values, keys, queries and the recurrence's dynamics, so
that one matrix product serves all. Muon brings the singular values of the whole stack to one size:
a direction of the input that gates use then has less left for values. Here each group of rows is
orthogonalized by itself, keys and queries together, as are the dynamics. Rows keep the length that
they had: an orthogonal matrix of r rows and c columns has rows of length sqrt(min(1, c / r)).
"""

import torch

GROUPS = (("gate",), ("value",), ("key", "query"), ("step", "decay", "trapezoid", "angle_rate"))


def usual_factor(rows: int, columns: int) -> float:
    """What apply_updates() multiplies an update of this shape by."""
    return max(1, rows / columns) ** 0.5


def install(script) -> None:
    """Changes train_gpt.py's Mamba, which tells its groups, and its orthogonalize()."""
    groups_of = {}  # by in_proj's shape, the numbers of rows
    whole = script.orthogonalize

    class Mamba(script.Mamba):
        """Notes how many rows each group of in_proj has."""

        def __init__(self, settings, scan_backend):
            super().__init__(settings, scan_backend)
            widths = self.sizes.columns()
            rows = [sum(widths.get(name, 0) for name in names) for names in GROUPS]
            groups_of[tuple(self.in_proj.weight.shape)] = [count for count in rows if count]

    def orthogonalize(batches: list[torch.Tensor], steps: int) -> list[torch.Tensor]:
        """As train_gpt.py's, group by group."""
        parts, counts = [], []
        for x in batches:
            rows = groups_of.get(tuple(x.shape[-2:]), [x.shape[-2]])
            parts += x.split(rows, dim=-2)
            counts.append(len(rows))
        done = iter(whole(parts, steps))
        results = []
        for x, count in zip(batches, counts, strict=True):
            rows, columns = x.shape[-2:]
            pieces = [next(done) for _ in range(count)]
            factors = [usual_factor(piece.shape[-2], columns) for piece in pieces]
            scale = usual_factor(rows, columns)
            pieces = [y * (f / scale) for y, f in zip(pieces, factors, strict=True)]
            results.append(torch.cat(pieces, dim=-2) if count > 1 else pieces[0])
        return results

    script.Mamba = Mamba
    script.orthogonalize = orthogonalize

"""Idea: Muon sees each head as a matrix of its own. An --idea of `python -m tools.explore`.

Beyond separate_products.py, whose groups of in_proj's rows it takes over: the rows of a query and
key matrix that make one head are orthogonalized by themselves, as no head reads another's. With
IDEA_HEADS=all, also those that make one Mamba head's gate and those that make its value.

    IDEA_HEADS=attention    or all
"""

import collections
import os

import torch

from tools.ideas.separate_products import GROUPS, usual_factor

HEADS = os.environ.get("IDEA_HEADS", "attention")
FEW_ROWS = 128  # of parts that go by themselves: with others, they would be padded to their size


def rows_of_products(model) -> dict[int, tuple[int, ...]]:
    """How many rows the parts of a matrix have, in their order, by the id of its weight."""
    rows = {}
    for block in model.blocks:
        mixer = block.mixer
        if hasattr(mixer, "in_proj"):
            widths, channels = mixer.sizes.columns(), mixer.sizes.channels
            parts = []
            for names in GROUPS:
                count = sum(widths.get(name, 0) for name in names)
                by_head = HEADS == "all" and names[0] in ("gate", "value") and channels > 1
                parts += [channels] * (count // channels) if by_head else [count]
            rows[id(mixer.in_proj.weight)] = tuple(count for count in parts if count)
        else:
            for layer in (mixer.query, mixer.key):
                heads = layer.out_features // mixer.head_dim
                rows[id(layer.weight)] = (mixer.head_dim,) * heads
    return rows


def by_shape(parts: list[torch.Tensor], steps: int, whole) -> list[torch.Tensor]:
    """whole(parts, steps), where all parts of one shape are one batch, and small ones go apart."""
    places = collections.defaultdict(list)
    for place, x in enumerate(parts):
        places[tuple(x.shape[-2:])].append(place)
    small = [shape for shape in places if min(shape) <= FEW_ROWS]
    large = [shape for shape in places if min(shape) > FEW_ROWS]
    results = [None] * len(parts)
    for shapes in (small, large):
        batches = [torch.cat([parts[place] for place in places[shape]]) for shape in shapes]
        for shape, done in zip(shapes, whole(batches, steps) if batches else [], strict=True):
            pieces = done.split([len(parts[place]) for place in places[shape]])
            for place, piece in zip(places[shape], pieces, strict=True):
                results[place] = piece
    return results


def install(script) -> None:
    """Changes how train_gpt.py groups matrices, and its orthogonalize()."""
    if HEADS not in ("attention", "all"):
        raise script.UserError(f"IDEA_HEADS={HEADS} should be attention or all")
    plan = []  # of each of Muon's batches, in their order: the rows of its matrices' parts
    whole = script.orthogonalize
    usual_groups = script.parameter_groups

    def parameter_groups(model, settings) -> tuple[dict, list[dict]]:
        """As train_gpt.py's, but matrices of one batch have the same parts."""
        matrices, others = usual_groups(model, settings)
        rows = rows_of_products(model)
        batches = collections.defaultdict(list)
        for (rate, shape), weights in matrices.items():
            for p in weights:
                batches[rate, (shape, rows.get(id(p), (len(p),)))].append(p)
        plan[:] = [parts for _, (_, parts) in batches]
        return batches, others

    def orthogonalize(batches: list[torch.Tensor], steps: int) -> list[torch.Tensor]:
        """As train_gpt.py's, part by part."""
        parts = []
        for x, rows in zip(batches, plan, strict=True):
            parts += x.split(rows, dim=-2)
        done = iter(by_shape(parts, steps, whole))
        results = []
        for x, rows in zip(batches, plan, strict=True):
            columns = x.shape[-1]
            scale = usual_factor(x.shape[-2], columns)
            pieces = [next(done) * (usual_factor(count, columns) / scale) for count in rows]
            results.append(torch.cat(pieces, dim=-2))
        return results

    script.parameter_groups = parameter_groups
    script.orthogonalize = orthogonalize

"""Idea: a matrix's weight decays where its update also brings it nearer to 0, and nowhere else.

"Cautious weight decay" (arXiv 2510.12402): a weight that the gradient wants larger is not made
smaller at the same time. An --idea of `python -m tools.explore`.
"""

import torch


def apply_updates(batches: list, updates: list, rates: list, decay: float, skip: torch.Tensor):
    """As train_gpt.py's, with decay where weight and update have one sign."""
    for batch, update, rate in zip(batches, updates, rates, strict=True):
        rate = rate * (1 - skip)
        step = rate * max(1, update.shape[-2] / update.shape[-1]) ** 0.5
        changes = update[: len(batch)].unbind()
        for p, change in zip(batch, changes, strict=True):
            change = change.float()
            shrinks = (p * change > 0).float()
            p.mul_(1 - rate * decay * shrinks).sub_(step * change)


def install(script) -> None:
    """Changes train_gpt.py's update of matrices."""
    script.apply_updates = apply_updates

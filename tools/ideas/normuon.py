"""Idea: rows of Muon's updates by their own history. An --idea of `python -m tools.explore`.

Orthogonalized updates still have rows (units of a layer's output) of different lengths. NorMuon
(arXiv 2510.05491) divides each row by the root of an average of its mean square, as Adam does for
single numbers, and gives the whole its former length:

    v <- 0.95 v + 0.05 mean of u² over a row;   u' = u / sqrt(v);   u' |u| / |u'| moves the weights
"""

from torch import Tensor

BETA = 0.95


def normalize_rows(update: Tensor, square: Tensor, skip: Tensor) -> Tensor:
    """Updates (n, rows, columns) by rows' averages square (n, rows, 1), which they enter in place.

    Where skip, float32 (), is 1, square stays.
    """
    update = update.float()
    mean = update.square().mean(dim=-1, keepdim=True)
    square.lerp_(mean, (1 - BETA) * (1 - skip))
    scaled = update / (square.sqrt() + 1e-10)
    length = update.norm(dim=(-2, -1), keepdim=True)
    return scaled * (length / (scaled.norm(dim=(-2, -1), keepdim=True) + 1e-10))


def install(script) -> None:
    """Changes train_gpt.py's Muon."""

    class Muon(script.Muon):
        """Muon whose updates' rows are divided by the roots of their mean squares so far."""

        def __init__(self, batches, settings, ranks):
            super().__init__(batches, settings, ranks)
            self.squares = [share.new_zeros(*share.shape[:2], 1) for share in self.shares]
            inner = self.momentum_updates
            rescale = script.maybe_compile(normalize_rows, settings, ranks)

            def momentum_updates(gradients, shares, momentum, skip, steps):
                updates = inner(gradients, shares, momentum, skip, steps)
                pairs = zip(updates, self.squares, strict=True)
                return [rescale(update, square, skip) for update, square in pairs]

            self.momentum_updates = momentum_updates

    script.Muon = Muon

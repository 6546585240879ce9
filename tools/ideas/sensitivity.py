"""Idea: finer grids where the loss feels it: `--idea tools/ideas/sensitivity.py --export`.

A weight that is off by e costs about g² e² / 2, where g is the loss's gradient by it. With n
numbers of a matrix on a grid of step s, the cost is n mean(g²) s² / 24, and the file shrinks by n
bits for each doubling of s. The least cost for a number of bytes has mean(g²) s² alike in all
matrices. In the script s follows the weights' size alone: k root-mean-squares of a row over 31.
Here each matrix's k has a factor that makes up for both, with a mean logarithm of 0 over all int6
numbers. The 8-bit embedding keeps SDCLIP_K_INT8.
"""

import math

import torch

STRENGTH = 1.0  # 0: the script's grids; 1: what the formula asks for
MOST = 2.0  # the largest factor, and the smallest is its inverse
SEQUENCES = 64  # whose gradients are squared, each by itself


def mean_squares(model, tokens: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """The mean square of the gradients of each matrix's numbers, by its weight's name.

    tokens and targets (n, T) int64. A sequence's loss is its nats summed, so that what a token
    costs counts alike however long sequences are.
    """
    matrices = {name: layer.weight for name, layer in model.linear_layers().items()}
    totals = dict.fromkeys(matrices, 0.0)
    with torch.enable_grad():
        for row, target in zip(tokens.split(1), targets.split(1), strict=True):
            nats = model.score(row, target, model.full_order).sum()
            gradients = torch.autograd.grad(nats, list(matrices.values()), allow_unused=True)
            for name, gradient in zip(matrices, gradients, strict=True):
                if gradient is not None:
                    square = gradient.float().square()
                    totals[name] += float(square.mean())
    return {name: total / len(tokens) for name, total in totals.items()}


def factors(model, squares: dict[str, float]) -> dict[str, float]:
    """What each matrix's k is multiplied by."""
    logs, sizes = {}, {}
    for name, square in squares.items():
        weight = model.get_parameter(name).detach()
        size = float(weight.square().mean())
        if square and size:
            felt = math.log(square * size)
            logs[name] = -0.5 * STRENGTH * felt
            sizes[name] = weight.numel()
    total = sum(logs[name] * sizes[name] for name in logs)
    mean = total / sum(sizes.values())
    found = {}
    for name, log in logs.items():
        factor = math.exp(log - mean)
        found[name] = min(MOST, max(1 / MOST, factor))
    return found


def install(script) -> None:
    """Changes train_gpt.py's grids, from its calibration on."""
    usual_calibrate = script.calibrate
    usual_grids = script.grids
    found: dict[str, float] = {}

    def calibrate(trainer, batches):
        hessians = usual_calibrate(trainer, batches)
        tokens, targets = batches.next()
        squares = mean_squares(trainer.model, tokens[:SEQUENCES], targets[:SEQUENCES])
        found.clear()
        found.update(factors(trainer.model, squares))
        trainer.log("sensitivity: " + ", ".join(f"{n} {f:.2f}" for n, f in found.items()))
        return hessians

    def grids(model, settings, matrices: dict, k: float):
        for name, limits in matrices.items():
            yield from usual_grids(model, settings, {name: limits}, k * found.get(name, 1.0))

    script.calibrate = calibrate
    script.grids = grids

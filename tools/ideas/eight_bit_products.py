"""Idea: products of the MLP and of Mamba compute in 8-bit floats. An --idea of tools.explore.

It says what that costs in BPB at equal steps, before there are kernels: it simulates, and a step
takes longer. Tensor cores multiply 8-bit floats exactly and sum in float32, so that bfloat16's
products of rounded numbers differ from theirs by the order of sums alone. With Q the rounding,

    y = Q(x) Q(W)^T;    d_x = Q(d_y) Q(W);    d_W = d_y^T x

where d_W is of unrounded numbers, so that Muon's momentum gets what it got. Q multiplies a tensor
by a power of two that brings its largest absolute value into the upper half of the type's range,
found anew each time, rounds and divides. x and W become float8_e4m3fn (3 bits of mantissa, normal
down to 2^-15 of the largest); d_y has the type that IDEA_EIGHT_GRADIENT names.

    IDEA_EIGHT           mlp (up and down), in_proj, out_proj (Mamba's), several with commas, or all
    IDEA_EIGHT_GRADIENT  e5m2 (2 bits of mantissa, normal down to 2^-30 of the largest) or e4m3

Out_proj's input is rounded behind its norm, whose factor by row else follows the product: so rows
are alike in size, and what rounds them would read that factor. Evaluation, without gradients, is as
ever; test-time training is not. MLPs go by the formula: the fused kernels would not round.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
PARTS = ("mlp", "in_proj", "out_proj")
TINY = 1e-30  # as the largest of a tensor of zeros, such as an output matrix before training


def rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    """x, of any float type, as 8-bit floats with a power of two for all of it can hold it."""
    most = torch.finfo(kind).max
    largest = x.abs().amax().float().clamp(min=TINY)
    scale = (most / largest).log2().floor().exp2()
    scaled = (x.float() * scale).clamp(-most, most)  # the type does not saturate by itself
    return (scaled.to(kind).float() / scale).to(x.dtype)


def product_of(gradient_kind: torch.dtype):
    """A function of x (..., in) and W (out, in) that computes x W^T by this idea's formulas."""

    class EightBitProduct(torch.autograd.Function):
        """y = Q(x) Q(W)^T."""

        @staticmethod
        def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
            """y (..., out)."""
            ctx.save_for_backward(x, weight)
            return F.linear(rounded(x, torch.float8_e4m3fn), rounded(weight, torch.float8_e4m3fn))

        @staticmethod
        def backward(ctx, d_y: Tensor) -> tuple[Tensor, Tensor]:
            """The gradients of x and W."""
            x, weight = ctx.saved_tensors
            d_x = rounded(d_y, gradient_kind) @ rounded(weight, torch.float8_e4m3fn)
            return d_x, d_y.flatten(0, -2).mT @ x.flatten(0, -2)

    return EightBitProduct.apply


def install(script) -> None:
    """Changes train_gpt.py's MLP and Mamba as the environment says."""
    chosen = os.environ.get("IDEA_EIGHT", "mlp")
    parts = PARTS if chosen == "all" else chosen.split(",")
    gradient = os.environ.get("IDEA_EIGHT_GRADIENT", "e5m2")
    known = ", ".join(PARTS)
    script.need(set(parts) <= set(PARTS), f"IDEA_EIGHT={chosen} should be all or of {known}")
    kinds = ", ".join(KINDS)
    script.need(gradient in KINDS, f"IDEA_EIGHT_GRADIENT={gradient} should be one of {kinds}")
    product = product_of(KINDS[gradient])

    class EightBitLinear(script.Linear):
        """A Linear whose training is by this idea's formulas."""

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            """As train_gpt.py's Linear."""
            if not torch.is_grad_enabled():
                return super().forward(x, scale)
            if scale is not None:
                x = (x * scale).to(x.dtype)
            return product(x, self.weight.to(x.dtype))

    class MLP(script.MLP):
        """Both matrices compute in 8 bits; their first weights are what they were."""

        def __init__(self, settings, device):
            super().__init__(settings, device)
            self.up.__class__ = self.down.__class__ = EightBitLinear
            self.can_fuse = False

    class Mamba(script.Mamba):
        """As above, of the projections that are chosen."""

        def __init__(self, settings, scan_backend):
            super().__init__(settings, scan_backend)
            for name in set(parts) - {"mlp"}:
                getattr(self, name).__class__ = EightBitLinear

    if "mlp" in parts:
        script.MLP = MLP
    script.Mamba = Mamba

"""The MLP's products in 8-bit floats: interpreted in float32, beside formulas with rounding and
without.

    python -m tests.test_eight_bit_mlp

prints what the kernels need on an H100, for each of TILES.
"""

import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported
    from tests import compile_kernels

import torch

from tools.ideas import eight_bit_mlp as idea


def main() -> None:
    """Compiles the kernels for compute capability 9.0, as PRESET=short has their sizes."""
    compiler = compile_kernels.Compiler(90)
    products = ("eight_forward", "eight_backward")
    compiler.kernels += ("sum_squares", "round_weights", *products)
    idea.scaled_product = lambda a8, b8, *scales: torch.empty(len(a8), len(b8)).bfloat16()
    for name in sys.argv[1:] or idea.TILES:
        os.environ["IDEA_EIGHT_TILES"] = f"{name},{name}"
        for parts in ("forward,down,backward,input", "forward,backward", "forward,down,backward,input,slope"):
            x = torch.randn(256, 512).bfloat16().requires_grad_()
            up, down = torch.randn(2048, 512), torch.randn(512, 2048)
            x8, factor = idea.rounded_norm(x)
            compiler.built.clear()
            y, *_ = idea.eight_mlp(x, x8, factor, up.requires_grad_(), down.requires_grad_(), 1.0, parts)
            y.sum().backward()
            for kernel, built in compiler.built.items():
                needs = compile_kernels.usage(built)
                print(f"{name} {parts} {kernel}: {needs}", flush=True)


if __name__ == "__main__":
    main()

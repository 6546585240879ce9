"""Measures what is left in the matrix products of PRESET=short on this GPU: python bench/products.py

Times the products of each layer at 65,536 tokens, forward and both gradients, in bfloat16; those that could be taken in
8-bit floats, and the casts to them; and the MLP's first product with LeakyReLU² in its epilogue, in Triton, against a
product and a compiled activation. Inputs are random. What it found is in NOTES.md.
"""

import functools
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench
from triton.tools.tensor_descriptor import TensorDescriptor

TOKENS, WIDTH, HIDDEN = 65_536, 512, 1536
SHAPES = {  # inputs, outputs
    "MLP up": (512, 1536), "MLP down": (1536, 512), "Mamba in": (512, 2240), "Mamba out": (1024, 512),
    "output matrix": (512, 8192),
}  # fmt: skip
# Rows, columns and depth of a tile, warps, pipeline stages, programs on a multiprocessor.
TILINGS = (
    (128, 256, 64, 8, 3, 1), (128, 128, 64, 8, 4, 2), (128, 128, 64, 4, 3, 2), (64, 256, 64, 4, 3, 2), (256, 128, 64, 8, 3, 1),
)  # fmt: skip


@triton.jit
def product_and_activation(
    x, w, hidden, out, tiles_m, tiles_n, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PROGRAMS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Forward: hidden = x w^T (w: N × K), out = LeakyReLU(hidden, 0.5)². Backward: out = x w (w: K × N) times that one's
    derivative at hidden. All are tensor maps."""
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        m, n = tile // tiles_n * BM, tile % tiles_n * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            if BACKWARD:
                total = tl.dot(x.load([m, k]), w.load([k, n]), total, input_precision="ieee")
            else:
                total = tl.dot(x.load([m, k]), w.load([n, k]).T, total, input_precision="ieee")
        if BACKWARD:
            at = hidden.load([m, n]).to(tl.float32)
            total *= tl.where(at > 0, 2.0 * at, 0.5 * at)
        else:
            hidden.store([m, n], total.to(hidden.dtype))
            total = tl.where(total > 0, total, 0.5 * total)
            total *= total
        out.store([m, n], total.to(out.dtype))


def fused(x: Tensor, w: Tensor, hidden: Tensor, out: Tensor, backward: bool, tiling: tuple[int, ...]):
    """Launches product_and_activation() on matrices of whole tiles: x (M, K), hidden and out (M, N)."""
    bm, bn, bk, warps, stages, per_multiprocessor = tiling
    maps = (
        TensorDescriptor.from_tensor(x, [bm, bk]),
        TensorDescriptor.from_tensor(w, [bk, bn] if backward else [bn, bk]),
        TensorDescriptor.from_tensor(hidden, [bm, bn]),
        TensorDescriptor.from_tensor(out, [bm, bn]),
    )
    count = torch.cuda.get_device_properties(0).multi_processor_count if x.is_cuda else 1
    programs = count * per_multiprocessor
    product_and_activation[(programs,)](
        *maps, len(x) // bm, hidden.shape[1] // bn, x.shape[1], bm, bn, bk, programs, backward,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def activation(hidden: Tensor) -> Tensor:
    return torch.nn.functional.leaky_relu(hidden.float(), 0.5).square().to(hidden.dtype)


def activation_backward(gradient: Tensor, hidden: Tensor) -> Tensor:
    at = hidden.float()
    return (gradient.float() * torch.where(at > 0, 2 * at, 0.5 * at)).to(hidden.dtype)


def show(name: str, call: Callable, flops: float = 0.0):
    try:
        milliseconds = do_bench(call, return_mode="median")
    except Exception as error:  # a tiling that does not fit is one that is not taken
        print(f"{name:56} {type(error).__name__}: {str(error)[:60]}", flush=True)
        return
    rate = f"{flops / milliseconds / 1e9:8.0f} TFLOP/s" if flops else ""
    print(f"{name:56} {milliseconds:8.4f} ms {rate}", flush=True)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def time_products(name: str, inputs: int, outputs: int):
    """One layer's, in both kinds of numbers."""
    x, w, gradient, flops = (
        random(TOKENS, inputs),
        random(outputs, inputs),
        random(TOKENS, outputs),
        2 * TOKENS * inputs * outputs,
    )
    show(f"{name}, forward", lambda: x @ w.T, flops)
    show(f"{name}, gradient of the input", lambda: gradient @ w, flops)
    show(f"{name}, gradient of the weight", lambda: gradient.T @ x, flops)
    short, one = lambda x: x.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    x8, w8, gradient8, columns8 = map(short, (x, w, gradient, w.T.contiguous()))
    scaled = lambda a, b: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    show(f"{name}, forward, 8 bits", lambda: scaled(x8, w8), flops)
    show(f"{name}, gradient of the input, 8 bits", lambda: scaled(gradient8, columns8), flops)
    show(f"{name}, cast of the input to 8 bits", lambda: short(x))


def time_fused():
    """The MLP's first product and activation, and their gradient, apart and together."""
    up, down = 0.05 * random(HIDDEN, WIDTH), 0.05 * random(WIDTH, HIDDEN)
    x, hidden, out = random(TOKENS, WIDTH), random(TOKENS, HIDDEN), random(TOKENS, HIDDEN)
    compiled, compiled_backward = torch.compile(activation), torch.compile(activation_backward)
    show("activation", lambda: compiled(hidden))
    show("its gradient", lambda: compiled_backward(out, hidden))
    for tiling in TILINGS:
        for backward, w in ((False, up), (True, down)):
            what = f"product and {'gradient of the ' * backward}activation {tiling}"
            show(what, functools.partial(fused, x, w, hidden, out, backward, tiling), 2 * TOKENS * WIDTH * HIDDEN)


def main():
    if not torch.cuda.is_available():
        print("products.py: error: torch sees no GPU, and there is nothing to time without one", file=sys.stderr)
        sys.exit(2)
    print(torch.cuda.get_device_name(), torch.__version__)
    for name, shape in SHAPES.items():
        time_products(name, *shape)
    time_fused()


if __name__ == "__main__":
    main()

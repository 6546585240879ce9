"""Measures speed on this machine's NVIDIA GPU.

    python -m bench.bench                                   # everything, about a minute a part
    python -m bench.bench kernels scan --out now.json       # some parts
    python -m bench.bench --compare before.json now.json    # two saved runs; needs no GPU
    PRESET=peer7 NUM_LAYERS=9 python -m bench.bench steps --profile table.txt
    torchrun --standalone --nproc_per_node=2 -m bench.bench steps

Parts are kernels (each beside its floor), scan (the operator, ours and the library's), steps (of
training) and startup.

Settings are environment variables, as for train_gpt.py, and apply to everything that is measured.
`steps` times PRESET=peer7 as it is, and PRESET=peer7 and the default with a batch of 131,072
tokens; if PRESET is given, only that. Inputs and tokens are random.

First the machine's own ceilings are measured: the rate of a large copy (bytes read plus written)
and of a large bfloat16 matrix product. A kernel's floor is the longer of two times: its bytes at
the first rate, and its matrix products at the second. Beside it are the least times of the products
and of the bytes alone on an H100 and an H200. Kernels and scans run as CUDA graphs, so that a busy
host changes nothing; those that cannot be captured are marked. MFU, the model FLOPs utilization, is
the part of a peak rate that a step's necessary matrix products make up.
"""

import argparse
import dataclasses
import datetime
import functools
import gc
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m bench.bench", file=sys.stderr)
    sys.exit(2)

import train_gpt as t
from reference import mamba_ssm_operator
from tools.command import Parser, need_place, run_command, write_whole
from tools.explore import install_idea

# As the kernel below names them. Without Triton there are no kernels, and constexpr is a stand-in.
tl = t.tl if t.triton else None
constexpr = t.constexpr
PARTS = ("kernels", "scan", "steps", "startup")
# Dense bfloat16 a second: NVIDIA's figure for the H100 and the H200 in SXM form, which call
# themselves so.
DATASHEET_FLOPS = 989e12
DATASHEET_GPUS = r"H100 80GB HBM3|H200(?! NVL)"
# One micro-batch of PRESET=peer7.
KERNEL_SETTINGS = {"TRAIN_BATCH_TOKENS": "131072", "TRAIN_SEQ_LEN": "4096"}
STEP_CASES = {
    "peer7": {"PRESET": "peer7"},
    "peer7, small batch": {
        "PRESET": "peer7",
        "TRAIN_BATCH_TOKENS": "131072",
        "TRAIN_SEQ_LEN": "2048",
    },
    "default, small batch": {"TRAIN_BATCH_TOKENS": "131072", "TRAIN_SEQ_LEN": "2048"},
}


def read_settings(defaults: dict[str, str], world_size: int = 1) -> t.Settings:
    """The environment's settings over these defaults. Raises UserError as train_gpt.py does."""
    settings, _ = t.read_settings(defaults | os.environ)
    t.validate_settings(settings, world_size)
    return settings


# ============
# Timing and floors


def captured(call: Callable) -> tuple[Callable, str]:
    """What launches all of call's work on the GPU at once, as a CUDA graph, and ""; if that cannot
    be captured, call itself, and why.

    A host that is busy may take longer to launch kernels one by one than the GPU to run them.
    """
    try:
        aside = torch.cuda.Stream()  # a capture may not touch what earlier work is waiting for
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # compiles, tunes and allocates
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError) as error:  # the second: torch has no CUDA
        return call, f"{type(error).__name__}: {error}".splitlines()[0]
    return graph.replay, ""


def milliseconds(call: Callable, seconds: float = 0.5) -> float:
    """Median time of one call on the GPU, over about so many seconds."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repetitions = min(100, max(5, int(seconds / (time.perf_counter() - started))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    # Cycles, some 30 ms: the host gets ahead, so that its launches cost no time.
    torch.cuda._sleep(50_000_000)
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(between(marks))


def between(marks: list[torch.cuda.Event]) -> list[float]:
    """Milliseconds from each mark to the next."""
    return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]


class Ceilings(NamedTuple):
    """What this machine does at best."""

    bytes_per_second: float
    flops_per_second: float


# What copies and products reached on cards of 80 and 141 GB in SXM form, for floors that reports of
# different machines have in common.
CARDS = {"H100": Ceilings(3.003e12, 760e12), "H200": Ceilings(4.3e12, 760e12)}


def measure_ceilings(device: torch.device) -> Ceilings:
    """Times a copy of 1 GiB and bfloat16 products of several shapes (the best counts) of random
    numbers: a GPU multiplies zeros faster, since they draw less power.
    """
    random = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    source = random(2**29)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source))
    rates = []
    for rows, columns, inner in ((8192, 8192, 8192), (16384, 4096, 4096), (16384, 8192, 4096)):
        left, right = random(rows, inner), random(inner, columns)
        product = left @ right
        multiply = functools.partial(torch.mm, left, right, out=product)
        rates.append(2 * rows * columns * inner / milliseconds(multiply))
    return Ceilings(1e3 * copy, 1e3 * max(rates))


def floor(bytes_moved: float, flops: float, ceilings: Ceilings) -> tuple[float, str]:
    """The least milliseconds that such a kernel can take, and what binds it: "memory" or
    "matmul".
    """
    memory = bytes_moved / ceilings.bytes_per_second
    matmul = flops / ceilings.flops_per_second
    bound = "memory" if memory >= matmul else "matmul"
    return 1e3 * max(memory, matmul), bound


# ============
# FLOPs of matrix products. A backward pass takes twice its forward pass: one product for each
# operand.


def attention_flops(tokens: int, sequence_length: int, width: int) -> float:
    """Forward scores and weighted values of causal attention: half of all pairs. width: heads times
    their size.
    """
    return 2 * tokens * sequence_length * width


def scan_flops(tokens: int, heads: int, head_dim: int, state_size: int, chunk: int) -> float:
    """Forward products of the chunked scan: scores and values within chunks (causal), states read
    and written.
    """
    return tokens * heads * (chunk * (state_size + head_dim) + 4 * head_dim * state_size)


def newton_schulz_flops(shape: torch.Size, steps: int) -> float:
    """Orthogonalizing one matrix: every three steps two products with its long side; each step
    squares its Gram matrix, and between steps there are three more products of that size.
    """
    short, long = sorted(shape)
    parts = math.ceil(steps / 3)
    with_long_side = 2 * parts
    of_gram_matrices = steps + 3 * (steps - parts)
    return 2 * short**2 * (with_long_side * long + of_gram_matrices * short)


def mixer_flops(settings: t.Settings, letter: str, tokens: int) -> float:
    """Forward products of one layer's scan or attention, without its projections."""
    s = settings
    if letter == "A":
        return attention_flops(tokens, s.train_seq_len, s.model_dim)
    if s.mamba_version == 1:  # element by element
        return 0
    heads = s.mamba_inner_dim // s.mamba_head_dim
    return scan_flops(tokens, heads, s.mamba_head_dim, s.mamba_d_state, s.mamba_chunk_size)


def step_flops(model: t.Model, tokens: int) -> float:
    """Necessary matrix products of a training step: 6 FLOPs for each token and matrix entry (output
    matrix included, layers that recur counted each time), and three times the forward products of
    attention and scans.
    """
    s = model.settings
    letters = [type(block.mixer).__name__[0] for block in model.blocks]
    entries = s.vocab_size * s.model_dim
    if s.bigram_vocab_size:
        entries += s.bigram_dim * s.model_dim
    for layer in model.full_order:
        for module in model.blocks[layer].modules():
            if isinstance(module, t.Linear):
                entries += module.weight.numel()
    mixers = sum(mixer_flops(s, letters[layer], tokens) for layer in model.full_order)
    return 6 * tokens * entries + 3 * mixers


# ============
# Kernels, each with its least traffic and its matrix products


class Kernel(NamedTuple):
    """Something to time, and what it cannot do without."""

    call: Callable
    bytes_moved: float  # least traffic with memory
    flops: float  # of matrix products


def operator(
    function: Callable, inputs: tuple, parameters: tuple, forward_flops: float, backward=True
) -> Kernel:
    """function(*inputs), and the gradients of inputs and parameters (what function reads besides)
    where they need any.

    Forward reads all and writes the outputs; backward reads all again and the outputs' gradients,
    and writes the others. What one pass keeps for the other counts as avoidable.
    """

    def run() -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    read = [*inputs, *parameters]
    leaves = [x for x in read if x.requires_grad]
    with torch.set_grad_enabled(backward):  # compiles nothing but what is timed
        gradients = [torch.randn_like(y) for y in run()]
    forward_bytes = sum(x.nbytes for x in read + gradients)
    if not backward:
        return Kernel(torch.no_grad()(run), forward_bytes, forward_flops)
    backward_bytes = forward_bytes + sum(x.nbytes for x in leaves)

    def both_passes() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(), leaves, gradients)

    return Kernel(both_passes, forward_bytes + backward_bytes, 3 * forward_flops)


def random_activations(settings: t.Settings, device: torch.device, *widths: int) -> Tensor:
    """(sequences, TRAIN_SEQ_LEN, *widths) of a whole batch, standard normal, in the model's dtype
    there.
    """
    length = settings.train_seq_len
    shape = (settings.train_batch_tokens // length, length, *widths)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


def random_rows(settings: t.Settings, ranks: t.Ranks, width: int) -> Tensor:
    """(tokens, width): random_activations() without a gradient, as the operators take them."""
    return random_activations(settings, ranks.device, width).detach().flatten(0, 1)


def scan_kernel(settings: t.Settings, ranks: t.Ranks, backend: str, backward: bool) -> Kernel:
    """A scan from in_proj's output on, norms and copies included, compiled as in the model. backend
    may also be mamba_ssm: then what stands before the library's operator is compiled.
    """
    s = settings
    device = ranks.device
    state = s.mamba_d_state
    heads = s.mamba_inner_dim // s.mamba_head_dim
    chunk = s.mamba_chunk_size
    sizes = t.MambaSizes(heads, s.mamba_head_dim, state, state // 4, 3)
    random = functools.partial(torch.randn, device=device)
    ones = functools.partial(torch.ones, device=device)
    step = torch.exp(torch.empty(heads, device=device).uniform_(math.log(1e-3), math.log(1e-1)))
    # In the order of MambaParameters.
    step_bias = step.expm1().log()  # softplus of it is the step
    key_bias = 1 + 0.1 * random(heads, state)
    query_bias = 1 + 0.1 * random(heads, state)
    norms = (ones(state), ones(state))
    learned = (step_bias, ones(heads), key_bias, query_bias, *norms)

    def ours(projected: Tensor, *learned: Tensor) -> Tensor:
        parameters = t.MambaParameters(*learned)
        y, *_ = t.mamba_scan(projected, parameters, sizes, None, None, backend, chunk)
        return y

    def before_library(projected: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        inputs = t.scan_inputs(projected, t.MambaParameters(*learned), sizes, None)
        return mamba_ssm_operator.library_tensors(inputs)

    if backend == "mamba_ssm":
        prepare = t.maybe_compile(before_library, s, ranks)

        def run(*tensors: Tensor) -> Tensor:
            return mamba_ssm_operator.library_operator()(*prepare(*tensors), chunk_size=chunk)
    else:
        backend = t.choose_scan_backend(
            dataclasses.replace(s, scan_backend=backend, mamba_version=3), device
        )
        run = t.maybe_compile(ours, s, ranks)
    projected = random_activations(s, device, sum(sizes.columns().values()))
    inputs = projected, *(x.requires_grad_() for x in learned)
    return operator(run, inputs, (), mixer_flops(s, "M", s.train_batch_tokens), backward)


def selective_kernel(settings: t.Settings, ranks: t.Ranks, backend: str, backward: bool) -> Kernel:
    """The first Mamba's scan. The loop is not compiled: it would be a graph of thousands of nodes.
    No scan of this kind multiplies matrices.
    """
    s = settings
    device = ranks.device
    state = s.mamba_d_state
    inner = s.mamba_inner_dim
    tokens = functools.partial(random_activations, s, device)
    rates = -torch.arange(1.0, state + 1, device=device).repeat(inner, 1)
    learned = tuple(
        x.requires_grad_()
        for x in (rates, torch.ones(inner, device=device), torch.zeros(inner, device=device))
    )
    step = (tokens(inner).detach() * 0.5 - 4).requires_grad_()

    def scan(x, step, rates, key, query, skip, gate, bias) -> Tensor:
        tensors = x, step, rates, key, query, skip, gate, bias
        return t.selective_scan(tensors, None, None, backend, s.mamba_chunk_size)[0]

    run = scan if backend == "sequential" else t.maybe_compile(scan, s, ranks)
    inputs = (
        tokens(inner),
        step,
        learned[0],
        tokens(state),
        tokens(state),
        learned[1],
        tokens(inner),
        learned[2],
    )
    return operator(run, inputs, (), 0, backward)


def cross_entropy_kernel(settings: t.Settings, ranks: t.Ranks, masked: bool) -> Kernel:
    """From hidden states to the mean loss, the product with the output matrix included; masked: as
    with MASK_IMPOSSIBLE_PAIRS, of random pairs if the settings are without it.
    """
    s = settings
    device = ranks.device
    model = t.build_model(s, ranks)
    if masked and model.impossible is None:
        packed = s.vocab_size, (s.vocab_size + 7) // 8
        model.impossible = torch.randint(0, 256, packed, device=device, dtype=torch.uint8)
    hidden = random_activations(s, device, s.model_dim)
    shape = hidden.shape[:2]
    tokens, targets = torch.randint(0, s.vocab_size, (2, *shape), device=device)
    matrix = model.output_matrix

    def mean_loss(hidden: Tensor, targets: Tensor, tokens: Tensor) -> Tensor:
        return model.nats(hidden, targets, tokens).mean()

    loss = t.maybe_compile(mean_loss, s, ranks)
    flops = 2 * s.train_batch_tokens * matrix.numel()
    return operator(loss, (hidden, targets, tokens), (matrix,), flops)


def attention_kernel(settings: t.Settings, ranks: t.Ranks) -> Kernel:
    """Causal attention over random queries, keys and values.

    Positions are left out: the model rotates queries and keys in a kernel of their own.
    """
    s = settings
    head_dim = s.model_dim // s.num_heads
    # Queries, keys, values: several queries share a key and a value.
    inputs = tuple(
        random_activations(s, ranks.device, heads, head_dim)
        for heads in (s.num_heads, s.num_kv_heads, s.num_kv_heads)
    )
    attend = functools.partial(t.attend, documents=None, backend="auto")
    return operator(attend, inputs, (), mixer_flops(s, "A", s.train_batch_tokens))


def mlp_kernel(settings: t.Settings, ranks: t.Ranks, eight_bits: bool) -> Kernel:
    """The MLP: a norm, and two matrices with LeakyReLU² between them."""
    s = settings
    mlp = t.MLP(s, ranks.device).to(ranks.device)
    matrices = tuple(mlp.parameters())
    for matrix in matrices:  # one of them is zero at first, and zeros are fast
        torch.nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)

    def in_float8(x: Tensor) -> Tensor:
        return mlp.in_float8(x, 1.0)

    run = t.maybe_compile(in_float8 if eight_bits else mlp, s, ranks)
    x = random_activations(s, ranks.device, s.model_dim)
    flops = 2 * s.train_batch_tokens * sum(matrix.numel() for matrix in matrices)
    return operator(run, (x,), matrices, flops)


def product_kernel(
    settings: t.Settings, ranks: t.Ranks, shape: torch.Size, eight_bits: bool
) -> Kernel:
    """A linear layer's product with a weight of this shape, and its input's gradient; in 8-bit
    floats, casts left out.
    """
    outputs, inputs = shape
    x, gradient = (random_rows(settings, ranks, n) for n in (inputs, outputs))
    weight = torch.randn(shape, device=ranks.device, dtype=x.dtype)
    pairs = [(x, weight.mT), (gradient, weight)]
    multiply = torch.matmul
    out_bytes = x.nbytes + gradient.nbytes
    if eight_bits:
        short = functools.partial(torch.Tensor.to, dtype=torch.float8_e4m3fn)
        # The second by columns, as those products want it.
        pairs = [(short(a), short(b.mT.contiguous()).mT) for a, b in pairs]
        one = torch.ones((), device=ranks.device)
        options = {"scale_a": one, "scale_b": one, "out_dtype": x.dtype, "use_fast_accum": True}
        multiply = functools.partial(torch._scaled_mm, **options)
    read_bytes = sum(x.nbytes for pair in pairs for x in pair)

    def both_products() -> list[Tensor]:
        return [multiply(*pair) for pair in pairs]

    # Two products, of two operations for each token and entry of the weight.
    return Kernel(both_products, read_bytes + out_bytes, 4 * len(x) * shape.numel())


@t.jit
def product_and_activation(
    x,
    weight,
    hidden,
    out,
    rows,
    columns,
    depth,
    BM: constexpr,
    BN: constexpr,
    BK: constexpr,
    PROGRAMS: constexpr,
    BACKWARD: constexpr,
):
    """hidden = x weight^T and out = LeakyReLU(hidden, 0.5)²; BACKWARD: out = x weight · the
    derivative at hidden. Tensor maps; rows and columns are numbers of tiles.
    """
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        m = tile // columns * BM
        n = tile % columns * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, depth, BK):
            if BACKWARD:
                total = tl.dot(x.load([m, k]), weight.load([k, n]), total, input_precision="ieee")
            else:
                total = tl.dot(
                    x.load([m, k]), tl.trans(weight.load([n, k])), total, input_precision="ieee"
                )
        if BACKWARD:
            at = hidden.load([m, n]).to(tl.float32)
            total *= tl.where(at > 0, 2.0 * at, 0.5 * at)
        else:
            hidden.store([m, n], total.to(hidden.dtype))
            total = tl.where(total > 0, total, 0.5 * total)
            total *= total
        out.store([m, n], total.to(out.dtype))


# Rows, columns and depth of a tile, warps, pipeline stages, programs on a multiprocessor: the best
# of ten on an H200.
FORWARD_TILES = (128, 256, 64, 8, 3, 1)
BACKWARD_TILES = (128, 128, 64, 8, 4, 2)


def fused_mlp_product(
    x: Tensor, weight: Tensor, hidden: Tensor, out: Tensor, backward: bool, tiles: tuple[int, ...]
):
    """Launches product_and_activation() on matrices of whole tiles: x (M, K), weight (N, K) or,
    backward, (K, N), hidden and out (M, N).
    """
    bm, bn, bk, warps, stages, programs = tiles
    programs *= torch.cuda.get_device_properties(0).multi_processor_count if x.is_cuda else 1
    block_of_weight = [bk, bn] if backward else [bn, bk]
    tensor_map = t.TensorDescriptor.from_tensor
    maps = {"x": tensor_map(x, [bm, bk]), "weight": tensor_map(weight, block_of_weight)}
    maps["hidden"] = tensor_map(hidden, [bm, bn])
    maps["out"] = tensor_map(out, [bm, bn])
    # Every size is a whole number of tiles.
    product_and_activation[(programs,)](
        **maps,
        rows=len(x) // bm,
        columns=hidden.shape[1] // bn,
        depth=x.shape[1],
        BM=bm,
        BN=bn,
        BK=bk,
        PROGRAMS=programs,
        BACKWARD=backward,
        num_warps=warps,
        num_stages=stages,
    )


def activation_kernel(
    settings: t.Settings, ranks: t.Ranks, backward: bool, together: bool
) -> Kernel:
    """The MLP's first product and LeakyReLU², or the second's input gradient and that of
    LeakyReLU²; in one kernel or not.
    """
    s = settings
    width = int(s.mlp_mult * s.model_dim)
    x, hidden = (random_rows(s, ranks, n) for n in (s.model_dim, width))
    shape = (s.model_dim, width) if backward else (width, s.model_dim)
    weight = torch.randn(shape, device=x.device, dtype=x.dtype)
    out = torch.empty_like(hidden)

    def leaky_relu_square(hidden: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(hidden, 0.5).square()

    # Written out, since autograd would go back on the stream of a forward pass that no graph holds.
    def slope_times(hidden: Tensor, gradient: Tensor) -> Tensor:
        return gradient * torch.where(hidden > 0, 2 * hidden, 0.5 * hidden)

    activation = t.maybe_compile(slope_times if backward else leaky_relu_square, s, ranks)
    if together:
        tiles = BACKWARD_TILES if backward else FORWARD_TILES
        call = functools.partial(fused_mlp_product, x, weight, hidden, out, backward, tiles)
    elif backward:

        def call():
            return activation(hidden, x @ weight)
    else:

        def call():
            return activation(x @ weight.mT)

    bytes_moved = x.nbytes + weight.nbytes + 2 * hidden.nbytes
    return Kernel(call, bytes_moved, 2 * len(x) * weight.numel())


def product_makers(settings: t.Settings, ranks: t.Ranks) -> dict[str, Callable[[], Kernel]]:
    """Each large product of the model; on a GPU also what 8-bit floats, or the activation in a
    kernel of ours, would make of it.
    """
    on_gpu = ranks.device.type == "cuda"
    # Only there are 8-bit products and the kernel above of any use.
    choices = (False, True) if on_gpu else (False,)
    makers = {}
    with torch.device("meta"):
        model = t.Model(settings, torch.device("meta"))
    matrices = [model.output_matrix, *(layer.weight for layer in model.linear_layers().values())]
    for shape in dict.fromkeys(matrix.shape for matrix in matrices if matrix.numel() >= 500_000):
        for eight_bits in choices:
            name = f"product {shape[1]:,} × {shape[0]:,}"
            name += ", 8 bits" if eight_bits else ""
            makers[name] = functools.partial(product_kernel, settings, ranks, shape, eight_bits)
    for backward in (False, True):
        for together in choices:
            name = "product, LeakyReLU²"
            name += ", gradient" if backward else ""
            name += ", one kernel" if together else ""
            makers[name] = functools.partial(activation_kernel, settings, ranks, backward, together)
    return makers


def float8_mlp_kernel(settings: t.Settings, ranks: t.Ranks, backward: bool) -> Kernel:
    """The operator of one pass, of a batch of random rows: rounding of weights, kernels, and
    cuBLAS's products.
    """
    s = settings
    x = random_rows(s, ranks, s.model_dim)
    hidden = int(s.mlp_mult * s.model_dim)
    up = torch.randn(hidden, s.model_dim, device=ranks.device)
    down = torch.randn(s.model_dim, hidden, device=ranks.device)
    x8, factor = t.float8_norm(x)
    read = [x, x8, factor, up, down]
    call = functools.partial(t.float8_mlp, *read)
    products = 2 * s.train_batch_tokens * (up.numel() + down.numel())
    if backward:
        _, *kept = call()
        d_y8, size = t.float8_gradient(random_rows(s, ranks, s.model_dim))
        scale = t.turn_scale(size)
        scales = [scale / 4, scale]
        read = [d_y8, x8, size, *scales, *kept]
        call = functools.partial(t.float8_mlp_backward, d_y8, x8, size, scales, kept)
        products *= 2  # of each matrix, for its gradient and for its input's
    bytes_moved = sum(x.nbytes for x in (*read, *call()))
    return Kernel(call, bytes_moved, products)


def row_sizes_kernel(settings: t.Settings, ranks: t.Ranks) -> Kernel:
    """The size that all rows of a gradient are scaled by, from the size of each."""
    _, size = t.float8_gradient(random_rows(settings, ranks, settings.model_dim))
    return Kernel(functools.partial(t.turn_scale, size), size.nbytes, 0)


def turned_rows_kernel(settings: t.Settings, ranks: t.Ranks) -> Kernel:
    """Rows of 8-bit floats scaled and transposed, so that products sum over tokens."""
    x8, size = t.float8_gradient(random_rows(settings, ranks, settings.model_dim))
    scale = t.turn_scale(size)
    call = functools.partial(t.turned_rows, x8, size, scale)
    return Kernel(call, 2 * x8.nbytes + size.nbytes, 0)


def weight_gradient_kernel(
    settings: t.Settings, ranks: t.Ranks, shape: tuple[int, int], sums: str
) -> Kernel:
    """The gradient of a weight of this shape, a sum over tokens: of bfloat16 rows as they lie, or
    of 8-bit floats, which lie transposed, where cuBLAS has "fast" and "exact" sums.
    """
    outputs, inputs = shape
    gradient, x = (random_rows(settings, ranks, n) for n in (outputs, inputs))
    factors = gradient.mT, x
    multiply = torch.matmul
    if sums != "bfloat16":
        turned = [a.mT.contiguous().to(torch.float8_e4m3fn) for a in (gradient, x)]
        factors = turned[0], turned[1].mT
        one = torch.ones((), device=ranks.device)
        options = {"scale_a": one, "scale_b": one, "out_dtype": torch.float32}
        options["use_fast_accum"] = sums == "fast"
        multiply = functools.partial(torch._scaled_mm, **options)
    call = functools.partial(multiply, *factors)
    bytes_moved = sum(a.nbytes for a in (*factors, call()))
    return Kernel(call, bytes_moved, 2 * settings.train_batch_tokens * outputs * inputs)


def float8_makers(settings: t.Settings, ranks: t.Ranks) -> dict[str, Callable[[], Kernel]]:
    """The MLP in 8 bits and its parts, on GPUs where they run."""
    s = settings
    hidden = int(s.mlp_mult * s.model_dim)
    whole_tiles = s.model_dim % int(t.SIDE) == 0
    if not (whole_tiles and t.can_fuse_mlp(s.model_dim, hidden, ranks.device)):
        return {}
    kernels = {
        "MLP, 8 bits": (mlp_kernel, s, ranks, True),
        "MLP, 8 bits, forward operator": (float8_mlp_kernel, s, ranks, False),
        "MLP, 8 bits, backward operator": (float8_mlp_kernel, s, ranks, True),
        "MLP, 8 bits, size of rows": (row_sizes_kernel, s, ranks),
        "MLP, 8 bits, rows transposed": (turned_rows_kernel, s, ranks),
    }
    for outputs, inputs in ((hidden, s.model_dim), (s.model_dim, hidden)):
        for sums in ("bfloat16", "fast", "exact"):
            name = f"weight gradient {inputs:,} × {outputs:,}"
            name += "" if sums == "bfloat16" else f", 8 bits, {sums} sums"
            kernels[name] = weight_gradient_kernel, s, ranks, (outputs, inputs), sums
    return {name: functools.partial(*call) for name, call in kernels.items()}


def residual_kernel(settings: t.Settings, ranks: t.Ranks) -> Kernel:
    """What stands between two layers: one's output is scaled and added, the embedding mixed in, the
    sum normed.
    """
    s = settings
    device = ranks.device
    x, added, embedded = (random_activations(s, device, s.model_dim) for _ in range(3))
    numbers = functools.partial(torch.rand, s.model_dim, device=device, requires_grad=True)
    scale, keep, mix = (numbers() for _ in range(3))

    def run(x, added, embedded, scale, keep, mix):
        # The learned numbers are float32, activations bfloat16.
        x = x + scale.to(x.dtype) * added
        x = keep.to(x.dtype) * x + mix.to(x.dtype) * embedded
        return x, t.norm(x)

    return operator(t.maybe_compile(run, s, ranks), (x, added, embedded, scale, keep, mix), (), 0)


def optimizer_kernel(settings: t.Settings, ranks: t.Ranks) -> Kernel:
    """Muon, Adam and the weight average on the whole model, in float32; gradients are clipped, but
    not averaged.
    """
    s = settings
    model = t.build_model(s, ranks)
    optimizers = t.Optimizers(model, s, ranks)
    average = t.WeightAverage(model, s, ranks)
    gradients = [torch.randn_like(p) for p in model.parameters()]

    # With rate 0 the weights stay as they are, and the work is the same. As tensors, since a graph
    # may not copy numbers of the host.
    no_rate, momentum = torch.tensor([0.0, s.muon_momentum], device=ranks.device)

    def call():
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient  # a step drops it
        optimizers.step(no_rate, momentum)
        average.update(no_rate, optimizers.skip)

    matrices = [layer.weight for layer in model.linear_layers().values()]
    muon = sum(p.numel() for p in matrices)
    adam = sum(p.numel() for p in model.parameters()) - muon
    # Read: gradient; read and written: weight, average, and Muon's one momentum or Adam's two
    # moments.
    numbers = (1 + 2 + 2 + 2) * muon + (1 + 2 + 2 + 4) * adam
    flops = sum(newton_schulz_flops(p.shape, s.muon_backend_steps) for p in matrices)
    return Kernel(call, 4 * numbers, flops)


def newton_schulz_kernel(settings: t.Settings, ranks: t.Ranks) -> Kernel:
    """Orthogonalizing all of the model's matrices, Gram matrices as one batch."""
    s = settings
    shapes = {}
    for layer in t.build_model(s, ranks).linear_layers().values():
        shapes[layer.weight.shape] = shapes.get(layer.weight.shape, 0) + 1
    batches = [torch.randn(count, *shape, device=ranks.device) for shape, count in shapes.items()]

    orthogonalize = t.maybe_compile(t.orthogonalize, s, ranks)
    flops = sum(
        count * newton_schulz_flops(shape, s.muon_backend_steps) for shape, count in shapes.items()
    )
    call = functools.partial(orthogonalize, batches, s.muon_backend_steps)
    # float32 in, float16 out.
    bytes_moved = (4 + 2) * sum(batch.numel() for batch in batches)
    return Kernel(call, bytes_moved, flops)


def kernel_makers(settings: t.Settings, ranks: t.Ranks) -> dict[str, Callable[[], Kernel]]:
    """What the part "kernels" lists: forward and backward together, where there are two."""
    s = settings
    half = dataclasses.replace(s, train_seq_len=max(1, s.train_seq_len // 2))
    kernels = {
        "scan, forward only": (scan_kernel, s, ranks, s.scan_backend, False),
        "scan": (scan_kernel, s, ranks, s.scan_backend, True),
        "cross-entropy, output matrix included": (cross_entropy_kernel, s, ranks, False),
        "cross-entropy, impossible pairs masked": (cross_entropy_kernel, s, ranks, True),
        f"attention, sequences of {half.train_seq_len:,}": (attention_kernel, half, ranks),
        f"attention, sequences of {s.train_seq_len:,}": (attention_kernel, s, ranks),
        "MLP": (mlp_kernel, s, ranks, False),
        "residual mixing and RMSNorm": (residual_kernel, s, ranks),
        "optimizer step": (optimizer_kernel, s, ranks),
        "Newton-Schulz": (newton_schulz_kernel, s, ranks),
    }
    makers = {name: functools.partial(*call) for name, call in kernels.items()}
    return makers | float8_makers(s, ranks) | product_makers(s, ranks)


def scan_makers(settings: t.Settings, ranks: t.Ranks) -> dict[str, Callable[[], Kernel]]:
    """What the part "scan" lists: our operator and the library's; and the first Mamba's scan in
    hybrid18's sizes, on one sequence of 2,048 tokens.
    """
    first = {"mamba_version": 1, "mamba_d_state": 32, "mamba_expand": 1.5, "mamba_chunk_size": 256}
    shrunk = {"train_batch_tokens": 2048, "train_seq_len": 2048}
    selective = dataclasses.replace(settings, scan_backend="auto", **first, **shrunk)
    kernels = [(backend, scan_kernel, settings, backend) for backend in ("triton", "mamba_ssm")]
    for backend in ("sequential", "parallel", "fused"):
        kernels.append((f"first Mamba, {backend}", selective_kernel, selective, backend))
    return {
        f"{name}{'' if backward else ', forward only'}": functools.partial(
            kernel, sizes, ranks, backend, backward
        )
        for name, kernel, sizes, backend in kernels
        for backward in (False, True)
    }


def time_kernel(make: Callable[[], Kernel], ceilings: Ceilings) -> dict:
    """A row: milliseconds, in a CUDA graph or launched by the host; the floor on this machine, the
    time as a multiple of it, and what binds it; the least time of the matrix products alone on
    CARDS, and of the bytes alone on each.
    """
    kernel = make()
    call, problem = captured(kernel.call)
    if problem:
        print(f"{'':8} launched by the host, since it cannot be captured: {problem}", flush=True)
    ms = milliseconds(call)
    floor_ms, bound = floor(kernel.bytes_moved, kernel.flops, ceilings)
    row = {"ms": ms, "launched": "by the host" if problem else "as a graph"}
    row |= {"floor_ms": floor_ms, "ratio": ms / floor_ms, "bound": bound}
    row["matmul_ms"], _ = floor(0, kernel.flops, CARDS["H100"])  # both cards multiply as fast
    for card, best in CARDS.items():
        row[f"{card}_bytes"], _ = floor(kernel.bytes_moved, 0, best)
    return row


# ============
# Training steps


class SilentLog:
    """Stands in for the run's log."""

    def __init__(self):
        self.lines = []

    def __call__(self, text: str, event: str = "", **values):
        """Keeps the line and writes nothing: files would be part of the time."""
        self.lines.append(text)

    def progress(self, what: str, part: float, seconds: float, note: str = ""):
        """Shows nothing."""

    def track(self, what: str, items):
        """The items, and nothing said of them."""
        return items


class RandomBatches:
    """Stands in for the data: the same random tokens every step. Marks the time of each call on the
    GPU, and profiles from call number `profiled` on.
    """

    def __init__(self, settings: t.Settings, ranks: t.Ranks, profiled: int = 0):
        sequences = settings.train_batch_tokens // settings.train_seq_len // ranks.world_size
        shape = sequences, settings.train_seq_len + 1
        self.tokens = torch.randint(0, settings.vocab_size, shape, device=ranks.device)
        self.marks: list[torch.cuda.Event] = []
        self.profiled = profiled
        self.profiler = None

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets (sequences, TRAIN_SEQ_LEN)."""
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()
        if len(self.marks) == self.profiled:
            torch.cuda.synchronize()
            self.profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            )
            self.profiler.start()
        return self.tokens[:, :-1], self.tokens[:, 1:]


def make_trainer(settings: t.Settings, ranks: t.Ranks, steps: int) -> tuple[t.Trainer, int]:
    """A trainer whose run() makes so many steps, recurrence on and quantization off, and its
    micro-batch in tokens.
    """
    settings = dataclasses.replace(
        settings,
        iterations=steps,
        max_wallclock_seconds=0.0,
        recur_start=0.0,
        late_qat_threshold=0.0,
        val_loss_every=0,
        train_log_every=2**40,
        checkpoint_every=0.0,
    )
    model = t.build_model(settings, ranks)
    micro_batch = t.choose_micro_batch(settings, ranks)
    return t.Trainer(model, settings, ranks, micro_batch, 16e6, SilentLog()), micro_batch


def time_steps(
    settings: t.Settings, ranks: t.Ranks, steps: int, ceilings: Ceilings, profile: bool
) -> tuple[dict, list]:
    """A row for these settings, the median of so many steps, and one more step's profile: see
    gpu_time_by_kernel().
    """
    discarded = 6  # the first five are logged, for which the host waits
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer, micro_batch = make_trainer(settings, ranks, discarded + steps + 1)
    trainer.warm_up()
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - started
    batches = RandomBatches(settings, ranks, profiled=discarded + steps + 1 if profile else 0)
    trainer.run(batches, None)
    torch.cuda.synchronize()
    kernels = []
    if batches.profiler is not None:
        batches.profiler.stop()
        kernels = gpu_time_by_kernel(batches.profiler.key_averages())
    times = between(batches.marks[discarded:])
    step_ms = statistics.median(times)
    tokens = settings.train_batch_tokens
    rate = step_flops(trainer.model, tokens) / ranks.world_size / (step_ms / 1e3)
    known = re.search(DATASHEET_GPUS, torch.cuda.get_device_name())
    row = {
        "step_ms": step_ms,
        "fastest_ms": min(times),
        "tokens_per_s": round(tokens * 1e3 / step_ms),
        "MFU_datasheet": rate / DATASHEET_FLOPS if known else "unknown",
        "MFU_measured": rate / ceilings.flops_per_second,
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9,
        "warm_up_s": warm_up,
        "batch": tokens,
        "seq_len": settings.train_seq_len,
        "micro_batch": micro_batch,
    }
    return row, kernels


# Kinds of kernels by their names; the first that fits counts. Attention's may also say "cutlass".
KERNEL_KINDS = {
    "communication": r"nccl",
    "attention": r"sdpa|fmha|flash|flex_attention|attention",
    "mamba": r"(?<!device)scan|^(tokens|features)_(forward|backward)$|^rotate_features$|sum_turns",
    "cross-entropy": r"cross_entropy|softmax|nll_loss|softcap|logsumexp",
    "matmul": r"gemm|nvjet|cutlass|cublas|xmma|splitk|triton_tem_\w*mm",
    "optimizer": r"multi_tensor_apply|foreach|adam|muon|lerp",
    "copy": r"^memcpy|^memset",
    "elementwise": r"triton_|elementwise|reduce|norm|catarray|copy|embedding|index|cub::",
}


def kernel_kind(name: str) -> str:
    """What a GPU kernel of this name is for. Products of the optimizer are matmuls, norms and gates
    are elementwise.
    """
    for kind, pattern in KERNEL_KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def gpu_time_by_kernel(averages) -> list[tuple[str, float, int]]:
    """(name, milliseconds, launches) of each GPU kernel, the longest first, from a profiler's
    key_averages().
    """
    kernels = [
        (row.key, row.self_device_time_total / 1e3, row.count)
        for row in averages
        if ran_on_gpu(row)
    ]
    return sorted(kernels, key=lambda kernel: -kernel[1])


def ran_on_gpu(event) -> bool:
    """Whether an event of the profiler's is a GPU's kernel or copy, not a name put around some."""
    on_cpu = event.device_type == torch.autograd.DeviceType.CPU
    return not (on_cpu or getattr(event, "is_user_annotation", False))


def time_by_kind(kernels: list[tuple[str, float, int]]) -> dict[str, dict]:
    """Rows of the table by kind: milliseconds, their part of the sum, launches."""
    rows: dict[str, dict] = {}
    total = sum(ms for _, ms, _ in kernels)
    for name, ms, launches in kernels:
        row = rows.setdefault(kernel_kind(name), {"ms": 0.0, "share": 0.0, "launches": 0})
        row["ms"] += ms
        row["share"] += ms / total
        row["launches"] += launches
    return dict(sorted(rows.items(), key=lambda item: -item[1]["ms"]))


def profile_table(title: str, kernels: list[tuple[str, float, int]], rows: int = 60) -> str:
    """One step's GPU time by kind and by kernel, as text.

    The longest kernels come first; what is beyond so many rows is left out.
    """
    lines = [title, "", f"{'GPU ms':>10} {'share':>7} {'launches':>9}  kind"]
    for kind, row in time_by_kind(kernels).items():
        lines.append(f"{row['ms']:10.3f} {row['share']:7.1%} {row['launches']:9}  {kind}")
    lines += ["", f"{'GPU ms':>10} {'launches':>9}  {'kind':14} kernel"]
    lines += [
        f"{ms:10.3f} {launches:9}  {kernel_kind(name):14} {name[:200]}"
        for name, ms, launches in kernels[:rows]
    ]
    return "\n".join(lines) + "\n"


# ============
# Start-up


def first_step(defaults: dict[str, str], started: float):
    """Does all that a run does up to the end of its first step, short of reading data.

    Then prints, as JSON: the seconds from started, a time of day, to the end of each stage; the
    seconds of the longest phases of torch's compiler, which hold one another, so that they don't
    add up; and what was compiled ahead.
    """
    ends = {"imported": time.time()}
    settings = read_settings(defaults)
    t.prepare_torch()
    t.compile_ahead(settings)
    ranks = t.start_ranks(settings)
    trainer, _ = make_trainer(settings, ranks, 1)
    ends["model made"] = time.time()
    trainer.warm_up()
    ends["warmed up"] = time.time()
    trainer.run(RandomBatches(settings, ranks), None)
    torch.cuda.synchronize()
    ends["step done"] = time.time()
    names, seconds = torch._dynamo.utils.compile_times(repr="csv", aggregate=True)
    phases = {name: float(each) for name, each in zip(names, seconds, strict=True)}
    longest = sorted(phases, key=phases.get, reverse=True)
    row = {name: end - started for name, end in ends.items()}
    row["compiler"] = ", ".join(f"{name} {phases[name]:.1f}" for name in longest[:24])
    if ahead := [line for line in trainer.log.lines if "compiled ahead" in line]:
        row["ahead"] = "; ".join(ahead)
    print(json.dumps(row), flush=True)


FIRST_STEP = [sys.executable, "-m", "bench.bench", "--first-step"]


def time_startup(folder: str, ideas: Sequence[Path] = ()) -> dict:
    """A row: seconds from starting a new process, whose compile caches are in this folder, to the
    end of each stage up to a step's, and what torch's compiler spent them on.
    """
    caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    environment = os.environ | {name: str(Path(folder, name.lower())) for name in caches}
    command = [word for idea in ideas for word in ("--idea", str(idea))]
    command = [*FIRST_STEP, str(time.time()), *command]
    # A process that hangs, in a compiler say, is not waited for.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    printed = done.stdout.strip().splitlines()
    if done.returncode or not printed:
        raise RuntimeError((done.stderr.strip() or "it printed nothing").splitlines()[-1])
    return json.loads(printed[-1])  # behind what an idea may print


# ============
# Reports


def show(value) -> str:
    """A number with as many digits as matter, or text."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{3 if abs(value) < 10 else 1}f}"


class Report:
    """The results: {part: {row: {column: value}}}. Rows are printed, and FILE rewritten, as they
    come.
    """

    def __init__(self, out: str, quiet: bool):
        self.out = out
        self.quiet = quiet  # as on all ranks but the first
        self.results: dict[str, dict] = {}
        self.failures = 0
        self.columns = None  # of the row that was printed last

    def add(self, part: str, name: str, row: dict):
        """Prints a row, under its columns' names where they are new, and saves all so far."""
        self.results.setdefault(part, {})[name] = row
        self.failures += "error" in row
        if self.quiet:
            return
        if "error" in row or "skipped" in row:
            ((outcome, reason),) = row.items()
            print(f"{part:8} {name:40} {outcome.replace('error', 'FAILED')}: {reason}", flush=True)
        else:
            if (part, list(row)) != self.columns:
                self.columns = part, list(row)
                print("\n" + f"{part:49}" + "".join(f"{column:>14}" for column in row))
            print(
                f"{'':8} {name:40}" + "".join(f"{show(value):>14}" for value in row.values()),
                flush=True,
            )
        if self.out:
            write_whole(Path(self.out), json.dumps(self.results, indent=1) + "\n")

    def measure(self, part: str, name: str, function: Callable[[], dict]):
        """Adds the row that function returns, or why it failed. Leaves no memory behind, nor
        compiled code.
        """
        try:
            row = function()
        except Exception as error:
            if dist.is_initialized():  # the other ranks would wait for this one
                raise
            row = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        self.add(part, name, row)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


COMPARED = ("ms", "step_ms", "tokens_per_s", "peak_GB", "seconds", "GB_per_s", "TFLOP_per_s")


def compared_columns(rows: list[dict]) -> list[str]:
    """The columns that are compared of two rows: what was measured, not what follows from that.

    They are those of COMPARED; of rows without any, as a start-up's stages, all numbers.
    """
    columns = dict.fromkeys(column for row in rows for column in row)
    measured = [column for column in COMPARED if column in columns]
    return measured or [
        column
        for column in columns
        if all(isinstance(row.get(column, 0), (int, float)) for row in rows)
    ]


def compare(before: dict, after: dict) -> str:
    """Both reports as one table: what was measured, before, after, and after as a multiple of
    before.
    """
    machines = [report.get("machine", {}) for report in (before, after)]
    keys = dict.fromkeys((*machines[0], *machines[1]))
    lines = [
        f"{key:12} {' | '.join(str(machine.get(key, '-')) for machine in machines)}" for key in keys
    ]
    lines += ["", f"{'':66}{'before':>14}{'after':>14}{'after/before':>14}"]
    for part in dict.fromkeys((*before, *after)):
        if part == "machine":
            continue
        rows = before.get(part, {}), after.get(part, {})
        for name in dict.fromkeys((*rows[0], *rows[1])):
            pair = [side.get(name, {}) for side in rows]
            for column in compared_columns(pair):
                values = [row.get(column, "failed" if "error" in row else "-") for row in pair]
                both = all(column in row for row in pair)
                ratio = f"{values[1] / values[0]:.3f}" if both and values[0] else "-"
                cells = "".join(f"{cell:>14}" for cell in (*map(show, values), ratio))
                lines.append(f"{f'{part}: {name}: {column}':66}{cells}")
    return "\n".join(lines)


# ============
# The command


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; no parts given means all, on several ranks the steps.

    Raises UserError.
    """

    def part(name: str) -> str:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name} is not a part; there are {', '.join(PARTS)}")
        return name

    summary, *rest = (__doc__ or "").split("\n\n")
    parser = Parser(
        description=summary,
        epilog="\n\n".join(rest),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    every = f"some of {', '.join(PARTS)}; default: all"
    add("parts", nargs="*", type=part, metavar="PART", help=every)
    add("--out", default="", metavar="FILE", help="save the results as JSON")
    add("--compare", nargs=2, metavar="FILE", help="only print two saved results side by side")
    add("--steps", type=int, default=10, metavar="N", help="training steps to time (default 10)")
    add("--profile", default="", metavar="FILE", help="write a step's GPU time by kind and kernel")
    changes = "change the script first, as --idea of tools.explore does; may be repeated"
    add("--idea", type=Path, action="append", default=[], metavar="FILE", help=changes)
    # What time_startup() starts.
    add("--first-step", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    for out in filter(None, (options.out, options.profile)):
        need_place(Path(out), *options.idea)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and options.parts and options.parts != ["steps"]:
        parser.error("only the part steps runs on several ranks")
    options.parts = options.parts or (["steps"] if world_size > 1 else list(PARTS))
    return options


def run_parts(options: argparse.Namespace) -> int:
    """Measures the parts in turn; returns the exit status, 1 if a row failed."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    cases = {"environment": {}} if "PRESET" in os.environ else STEP_CASES
    step_settings = {name: read_settings(defaults, world_size) for name, defaults in cases.items()}
    kernel_settings = read_settings(KERNEL_SETTINGS)
    t.prepare_torch()
    ranks = t.start_ranks(kernel_settings)
    torch.manual_seed(0)
    report = Report(options.out, quiet=ranks.rank > 0)
    names = [f.name.upper() for f in dataclasses.fields(t.Settings)]
    machine = t.describe_machine(ranks) | {
        "settings": " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ),
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
    }
    if options.idea:
        machine["ideas"] = " ".join(map(str, options.idea))
    report.results["machine"] = machine
    if not report.quiet:
        print("  ".join(f"{key}={value}" for key, value in machine.items()))
    ceilings = measure_ceilings(ranks.device)
    report.add(
        "ceilings", "copy, bytes read and written", {"GB_per_s": ceilings.bytes_per_second / 1e9}
    )
    report.add(
        "ceilings", "bfloat16 matrix product", {"TFLOP_per_s": ceilings.flops_per_second / 1e12}
    )
    if "kernels" in options.parts:
        for name, make in kernel_makers(kernel_settings, ranks).items():
            report.measure("kernels", name, functools.partial(time_kernel, make, ceilings))
    if "scan" in options.parts:
        for name, make in scan_makers(kernel_settings, ranks).items():
            if ("mamba_ssm" in name or "fused" in name) and not mamba_ssm_operator.is_installed():
                report.add("scan", name, {"skipped": "mamba_ssm is not installed"})
            else:
                report.measure("scan", name, functools.partial(time_kernel, make, ceilings))
    if "steps" in options.parts:
        time_step_cases(report, step_settings, ranks, options, ceilings)
    if "startup" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("cold, caches empty", "warm, the same again"):
                report.measure(
                    "startup", name, functools.partial(time_startup, folder, options.idea)
                )
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(report.failures > 0)


def time_step_cases(
    report: Report, cases: dict[str, t.Settings], ranks: t.Ranks, options, ceilings: Ceilings
):
    """The part "steps", and with --profile its tables."""
    tables = []
    if options.profile:  # names that say what kernels compute, as torch has them by default
        torch._inductor.config.triton.descriptive_names = "original_aten"
    for name, settings in cases.items():
        kernels: list = []

        def row(settings=settings, kernels=kernels):
            row, found = time_steps(settings, ranks, options.steps, ceilings, bool(options.profile))
            kernels += found
            return row

        report.measure("steps", name, row)
        for kind, by_kind in time_by_kind(kernels).items():
            report.add("profile", f"{name}: {kind}", by_kind)
        tables.append(profile_table(f"{name}: GPU time of one step", kernels))
    if options.profile and ranks.rank == 0:
        write_whole(Path(options.profile), "\n".join(tables))
    if not report.quiet:
        datasheet = f"{DATASHEET_FLOPS / 1e12:.0f} TFLOP/s (the vendor's datasheet)"
        print(f"MFU: of {datasheet}, and of the product timed above")


def load(file: str) -> dict:
    """A saved report. Raises UserError for a file that is none.

    Which parts it has is not looked at: older reports lack some.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise t.UserError(f"{file} holds no saved results: {error}") from None
    if not is_report(found):
        raise t.UserError(f"{file} holds other results than those of bench.bench --out")
    return found


def is_report(found) -> bool:
    """Whether a value is as Report saves it: {part: {row: {column: value}}}, perhaps a machine."""
    if not (isinstance(found, dict) and isinstance(found.get("machine", {}), dict)):
        return False
    parts = [part for name, part in found.items() if name != "machine"]
    rows = [row for part in parts if isinstance(part, dict) for row in part.values()]
    values = [value for row in rows if isinstance(row, dict) for value in row.values()]
    tables = all(isinstance(table, dict) for table in (*parts, *rows))
    return tables and all(isinstance(value, (str, int, float)) for value in values)


def main(arguments: list[str] | None = None) -> int:
    """Measures or compares; returns the exit status: 1 if a row failed, 2 for a user's mistake.

    Comparing needs no GPU; all else does.
    """

    def command() -> int:
        options = parse_arguments(arguments)
        if options.compare:
            print(compare(*map(load, options.compare)))
            return 0
        for idea in options.idea:
            install_idea(idea)
        if not torch.cuda.device_count():  # is_available() would use CUDA, which no fork survives
            raise t.UserError(
                "needs an NVIDIA GPU, and torch sees none here (--compare works without)"
            )
        if options.first_step:
            defaults = {} if "PRESET" in os.environ else STEP_CASES["peer7"]
            first_step(defaults, options.first_step)
            return 0
        return run_parts(options)

    return run_command("bench.py", command, t.UserError)


if __name__ == "__main__":
    sys.exit(main())

"""Idea: products of the MLP and of Mamba compute in 8-bit floats, by kernels. An --idea of
tools.explore and of bench.steps, for an H100 or H200; elsewhere it changes nothing.

IDEA_EIGHT_PARTS names what is in 8 bits, several with commas:

    forward   f(W_up norm(x)), the MLP's first product
    down      its second; needs forward, whose epilogue also writes f in 8 bits
    backward  the gradient of f, d_y W_down
    input     the gradient of norm(x), d_v W_up; needs backward, whose epilogue writes d_v
    slope     backward reads f for its slope as `down` does, in 8 bits; needs down and backward
    in_proj   Mamba's first product; its gradients are as ever

Without it: forward,down,backward,input,in_proj. Weights' gradients are of unrounded factors.
IDEA_EIGHT_TILES=wide,two are the TILES of forward and of backward. IDEA_EIGHT_EXACT=1 has
torch._scaled_mm move its sums to float32 registers often, which is slower: tensor cores sum 8-bit
products with some 14 bits, and what is cut off at 64 additions is far less than the rounding of
factors, 2 to 3 %.

All is float8_e4m3fn, q: 3 bits of mantissa, from 448 = 2^8.8 down to 2^-6, and multiples of 2^-9
below. Nothing waits for a largest absolute value:

    x8 = q(16 norm(x))                     no number of a row of 512 is above sqrt(512) of its
    d_y8 = q(16 d_y / rms of the row)      root mean square, 362 < 448: none saturates
    W8 = q(4 W / rms(W))                   saturates beyond 112 root mean squares

A row's factor follows the product, where norm's already does. So gradients need no scale of an
earlier step, and no pass of their own: what writes x or d_y (a kernel that inductor makes) has the
row at hand. If weights and rows were independent, v8 = W8 x8 would have a root mean square of
16 · 4 · sqrt(512) = 1448; f and d_v are scaled as if they were:

    f8 = q(f(v8 / 1448) / 4)               saturates beyond 42 root mean squares of v
    d_v8 = q(d8 / 1448 · f'(v8 / 1448))    d8 = W_down8^T d_y8, as large as v8: beyond 448, of 1.5

and multiples of 2^-9 are 0.8 and 0.1 % of their root mean squares (1.2 and 1.5).

What was counted before it ran, of one layer of PRESET=short (65,536 tokens, width 512, 2048 hidden;
an H200's memory at 4.2 TB/s; tensor cores at 4,096 bfloat16 and 8,192 8-bit operations a cycle of
each multiprocessor, times of 32 rounds of tiles at 1.75 GHz):

    product    MB now (8 bits)  memory, ms   cycles a tile, products + epilogue   ms now  predicted
    forward    352 (453)        0.08 (0.11)  8192 + 2540 (4096 + 2900)            0.241   0.16
    down       336 (201)        0.08 (0.05)                                       0.206   0.12
    backward   621 (721)        0.15 (0.17)  8192 + 2540 (4096 + 3000)            0.329   0.27
    input      336 (201)        0.08 (0.05)                                       0.206   0.12
    in_proj    360 (327)        0.09 (0.08)                                       0.23    0.14

x8 and d_y8 are two more halves of a pass over the residual stream, 0.008 ms each. What rounds the
weights reads as much as what converted them to bfloat16. So a layer has 0.23 ms less forward and
backward if cuBLAS multiplies twice as fast and 0.31 if the kernels also wait for nothing: **2.0 to
2.8 ms** of a step of 43.4 for the MLPs of nine layers, 0.5 for in_proj of seven. `slope` reads
134 MB less: 0.02 ms of each backward, 0.2 of a step.
"""

import collections
import os

import torch
from torch import Tensor

import train_gpt as t
from train_gpt import (
    FAST,
    SIGN_COLUMNS,
    TensorDescriptor,
    constexpr,
    exact_dot,
    halves,
    jit,
    pack_signs,
    prefetch_tile,
    product_tile,
    sign_places,
    tl,
    triton,
    unpack_signs,
)

PARTS = ("forward", "down", "backward", "input", "slope", "in_proj")
NEEDED = {"down": ("forward",), "input": ("backward",), "slope": ("down", "backward")}
DEFAULT_PARTS = "forward,down,backward,input,in_proj"
EIGHT = torch.float8_e4m3fn
MOST = 448.0  # its largest number
LEAST = 1e-18  # as the root mean square of a row of zeros
WEIGHT_SIZE = 4.0  # a weight's root mean square in 8 bits
ACTIVE_SIZE = 0.25  # f's, for v's of 1
GRADIENT_SIZE = 1.0  # that of d_v, by d of 1 times f' of a v of 1
SUMS = constexpr(128)  # of squares of a matrix, by part
BLOCK = constexpr(4096)  # numbers squared at once
SIDE = constexpr(64)  # of a tile of a matrix that is rounded
# Where scalars that kernels and torch._scaled_mm read are in a tensor: 16 bytes apart. UP and DOWN
# bring rounded weights back to their size; UNIT is u / v8, ACTIVE f / f8; HIDDEN_GRADIENT makes
# d_v8 of d8 f'(u), and INPUT_GRADIENT undoes that and the scale of W_down; ONE is 1.
SCALARS = 28
PLACES = range(0, SCALARS, 4)
UP, DOWN, UNIT, ACTIVE, HIDDEN_GRADIENT, INPUT_GRADIENT, ONE = map(constexpr, PLACES)


# ============
# Rounding


def eight_type(dtype: torch.dtype) -> torch.dtype:
    """What numbers of this type are rounded to: float8_e4m3fn for bfloat16, others as they are.

    So the kernels compute in float32 where they are interpreted, and match the formula.
    """
    return EIGHT if dtype == torch.bfloat16 else dtype


def row_scale(width: int) -> float:
    """The power of two by which no row of so many numbers and root mean square 1 exceeds MOST."""
    scale = 1.0
    while 2 * scale * width**0.5 <= MOST:
        scale *= 2
    return scale


def usual_square(width: int) -> float:
    """The mean square of v8 and d8, sums of so many independent terms."""
    return width * (row_scale(width) * WEIGHT_SIZE) ** 2


def value_scale(width: int) -> float:
    """f8 of v8^2, for rows of so many numbers."""
    return ACTIVE_SIZE / usual_square(width)


def gradient_scale(width: int) -> float:
    """d8 f'(v8) of d_v8."""
    return usual_square(width) / GRADIENT_SIZE


def to_eight(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in eight_type(dtype), saturated as the type is not by itself; NaN stays NaN."""
    kind = eight_type(dtype)
    return x.clamp(-MOST, MOST).to(kind) if kind == EIGHT else x.to(kind)


# S in the next two kernels: a matrix (ROWS, COLUMNS) and, if PAIR, another of its transposed shape.
# ROW_SCALE is that of x8 and d_y8; f8 is VALUE v8^2, and d_v8 d8 f' / (GRADIENT · UNIT).
WeightSizes = collections.namedtuple(
    "WeightSizes", "ROWS COLUMNS WEIGHT_SIZE ROW_SCALE VALUE GRADIENT PAIR"
)


@jit
def sum_part(matrix, part, S: constexpr):
    """The sum of squares of a part of a matrix."""
    count: constexpr = S.ROWS * S.COLUMNS
    size: constexpr = triton.cdiv(count, SUMS)
    offsets = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, size, BLOCK):
        place = part * size + start + offsets
        inside = (start + offsets < size) & (place < count)
        x = tl.load(matrix + place, inside, 0.0).to(tl.float32)
        total += x * x
    return tl.sum(total, axis=0)


@jit
def sum_squares(first, second, sums, S: constexpr):
    """Of each matrix SUMS sums of squares."""
    part = tl.program_id(0)
    if tl.program_id(1) == 0:
        tl.store(sums + part, sum_part(first, part, S))
    else:
        tl.store(sums + SUMS + part, sum_part(second, part, S))


@jit
def scale_of(sums, S: constexpr):
    """What brings a matrix's root mean square to its size."""
    parts = tl.load(sums + tl.arange(0, SUMS))
    count: constexpr = S.ROWS * S.COLUMNS
    size = tl.sqrt(tl.sum(parts, axis=0) / count)
    return S.WEIGHT_SIZE / tl.maximum(size, 1e-12)


@jit
def round_tile(matrix, plain, turned, scale, i, j, ROWS: constexpr, COLUMNS: constexpr):
    """A tile of a matrix in 8 bits, as it stands and transposed."""
    side = tl.arange(0, SIDE)
    row = (i * SIDE + side)[:, None]
    column = (j * SIDE + side)[None, :]
    inside = (row < ROWS) & (column < COLUMNS)
    offset = row * COLUMNS + column
    x = tl.load(matrix + offset, inside, 0.0).to(tl.float32)
    x = (x * scale).to(plain.dtype.element_ty)
    tl.store(plain + offset, x, inside)
    offset = tl.trans(column) * ROWS + tl.trans(row)
    tl.store(turned + offset, tl.trans(x), tl.trans(inside))


@jit
def store_scalars(scalars, sums, input_scale, S: constexpr):
    """What the products of rounded numbers are multiplied by: see their names' uses."""
    up = 1.0 / scale_of(sums, S)
    down = up
    if S.PAIR:
        down = 1.0 / scale_of(sums + SUMS, S)
    unit = input_scale * up / S.ROW_SCALE  # u / v8
    gradient = 1.0 / (S.GRADIENT * unit)
    tl.store(scalars + UP, up)
    tl.store(scalars + DOWN, down)
    tl.store(scalars + UNIT, unit)
    tl.store(scalars + ACTIVE, unit * unit / S.VALUE)
    tl.store(scalars + HIDDEN_GRADIENT, gradient)
    tl.store(scalars + INPUT_GRADIENT, down / gradient)
    tl.store(scalars + ONE, 1.0)


@jit
def round_weights(
    first,
    second,
    sums,
    scalars,
    first8,
    first8_turned,
    second8,
    second8_turned,
    input_scale,
    S: constexpr,
):
    """Both matrices in 8 bits, with their transposed, and scalars."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    if tl.program_id(2) == 0:
        round_tile(first, first8, first8_turned, scale_of(sums, S), i, j, S.ROWS, S.COLUMNS)
        if i + j == 0:
            store_scalars(scalars, sums, input_scale, S)
    else:
        scale = scale_of(sums + SUMS, S)
        round_tile(second, second8, second8_turned, scale, j, i, S.COLUMNS, S.ROWS)


def weights_in_eight(
    first: Tensor, second: Tensor | None, dtype: torch.dtype, input_scale: float
) -> list[Tensor]:
    """[scalars, first8, its transposed, second8, its transposed], the latter two only of a pair.

    first (ROWS, COLUMNS) and second (COLUMNS, ROWS) are float32; dtype is the activations'.
    """
    rows, columns = first.shape
    matrices = [first] if second is None else [first, second]
    scalars, *rounded = weights_in_eight_fake(first, second, dtype, input_scale)
    sums = first.new_empty(2, int(SUMS), dtype=torch.float32)
    fixed = WEIGHT_SIZE, row_scale(columns), value_scale(columns), gradient_scale(columns)
    sizes = WeightSizes(rows, columns, *fixed, second is not None)
    names = ("first8", "first8_turned", "second8", "second8_turned")
    named = dict(zip(names, [*rounded, *rounded][:4], strict=True))
    named |= {"first": first.contiguous(), "second": matrices[-1].contiguous(), "sums": sums}
    named |= {"scalars": scalars, "input_scale": input_scale, "S": sizes}
    t.launch(sum_squares, (int(SUMS), len(matrices)), named)
    side = int(SIDE)
    grid = triton.cdiv(rows, side), triton.cdiv(columns, side), len(matrices)
    t.launch(round_weights, grid, named)
    return [scalars, *rounded]


def weights_in_eight_fake(first, second, dtype, input_scale) -> list[Tensor]:
    """weights_in_eight()'s results, without their values."""
    kind = eight_type(dtype)
    matrices = [first] if second is None else [first, second]
    found = [first.new_empty(SCALARS, dtype=torch.float32)]
    for matrix in matrices:
        found.append(torch.empty_like(matrix, dtype=kind))
        found.append(matrix.new_empty(matrix.shape[::-1], dtype=kind))
    return found


# ============
# Products with epilogues: train_gpt.py's, of rounded factors

# S: programs go through tiles of M rows and N columns, sums of WIDTH terms, STEP at a time. ROUNDS:
# whether the result is also written in 8 bits.
EightSizes = collections.namedtuple("EightSizes", "PROGRAMS WIDTH HIDDEN M N STEP VALUE ROUNDS")


@jit
def part_of(x, part: constexpr, S: constexpr):
    """SIGN_COLUMNS columns of a tile of one or two such parts."""
    return x if S.N == SIGN_COLUMNS else halves(x)[part]


@jit
def eight_forward(x8, up8, active_map, active8, signs, length, S: constexpr):
    """VALUE f(x8 up8^T), also in 8 bits, and the signs of the product."""
    tiles = tl.cdiv(length, S.M) * (S.HIDDEN // S.N)
    for number in tl.range(tl.program_id(0), tiles, S.PROGRAMS, flatten=True):
        row, column = product_tile(number, S)
        v = tl.full([S.M, S.N], 0.0, tl.float32)
        for k in range(0, S.WIDTH, S.STEP):
            v = exact_dot(x8.load([row, k]), tl.trans(up8.load([column, k])), v)
        rows = row + tl.arange(0, S.M)[:, None]
        for part in tl.static_range(S.N // SIGN_COLUMNS):
            left = column + part * SIGN_COLUMNS
            own = part_of(v, part, S)
            kept = own * own * tl.where(own < 0, 0.25 * S.VALUE, S.VALUE)
            active_map.store([row, left], kept.to(active_map.dtype))
            if S.ROUNDS:
                active8.store([row, left], kept.to(active8.dtype))
            places = sign_places(signs, rows, left, SIGN_COLUMNS, S)
            tl.store(places, pack_signs(own), rows < length)


@jit
def store_gradients(d, row, column, d_v, d_v8, scale, rounding, S: constexpr):
    """Some columns of d by a factor of the row, and by one of all in 8 bits."""
    d_v.store([row, column], (d * scale).to(d_v.dtype))
    if S.ROUNDS:
        d_v8.store([row, column], (d * rounding).to(d_v8.dtype))


@jit
def eight_backward(
    d_y8, down8, active_map, d_v, d_v8, active, signs, row_factor, scalars, length, S: constexpr
):
    """The gradient of W_up x, row_factor d8 f'(u) with d8 = d_y8 down8^T, and in 8 bits d8 f'(u) by
    its scalar."""
    tiles = tl.cdiv(length, S.M) * (S.HIDDEN // S.N)
    root_scale = tl.sqrt(tl.load(scalars + ACTIVE))
    rounding = tl.load(scalars + HIDDEN_GRADIENT) * root_scale
    for number in tl.range(tl.program_id(0), tiles, S.PROGRAMS, flatten=True):
        row, column = product_tile(number, S)
        d = tl.full([S.M, S.N], 0.0, tl.float32)
        for k in range(0, S.WIDTH, S.STEP):
            d = exact_dot(d_y8.load([row, k]), tl.trans(down8.load([column, k])), d)
        if FAST:
            ahead, beside = product_tile(number + S.PROGRAMS, S)
            prefetch_tile(active, ahead, beside, length, 1, S)
            prefetch_tile(signs, ahead, beside, length, 8, S)
        rows = row + tl.arange(0, S.M)[:, None]
        packed = tl.load(sign_places(signs, rows, column, S.N, S), rows < length, 0)
        scale = tl.load(row_factor + rows, rows < length, 0.0) * root_scale
        root = tl.sqrt(active_map.load([row, column]).to(tl.float32))
        d *= root * tl.where(unpack_signs(packed), -1.0, 2.0)
        if S.N == SIGN_COLUMNS:
            store_gradients(d, row, column, d_v, d_v8, scale, rounding, S)
        else:  # in quarters: a stage's room is worth more
            for half in tl.static_range(2):
                left, right = halves(halves(d)[half])
                place = column + half * SIGN_COLUMNS
                store_gradients(left, row, place, d_v, d_v8, scale, rounding, S)
                place += SIGN_COLUMNS // 2
                store_gradients(right, row, place, d_v, d_v8, scale, rounding, S)


# M, N, STEP, stages, warps of a program, programs on each multiprocessor, a thread's registers.
TILES = {
    "wide": (128, 256, 128, 3, 8, 1, None),  # reads least of the L2 cache; too large for backward
    "wide2": (128, 256, 128, 2, 8, 1, None),
    "deep": (128, 256, 64, 4, 8, 1, None),
    "pair": (128, 128, 64, 3, 4, 2, None),  # one's products run beside the other's epilogue
    "pair2": (128, 128, 64, 2, 4, 2, None),
    "pair8": (128, 128, 64, 2, 8, 2, 128),
}
DEFAULT_TILES = "wide,deep"


def tiles_of(kernel_name: str) -> tuple[int, ...]:
    """What TILES say of the name that IDEA_EIGHT_TILES gives for this kernel."""
    names = os.environ.get("IDEA_EIGHT_TILES", DEFAULT_TILES).split(",")
    known = set(names) <= set(TILES)
    t.need(
        known and len(names) == 2,
        f"IDEA_EIGHT_TILES should be two of {', '.join(TILES)} with a comma",
    )
    return TILES[names[kernel_name == "eight_backward"]]


def launch_eight(kernel, named: dict, width: int, blocks: dict, rounds: bool):
    """Runs a kernel; blocks: of tensor descriptors by name, sizes of the tiles; all in `named`."""
    length, hidden = named["active"].shape
    rows, columns, step, stages, warps, each, registers = tiles_of(kernel.__name__)
    programs = triton.cdiv(length, rows) * (hidden // columns)
    if named["active"].is_cuda:
        gpu = torch.cuda.get_device_properties(named["active"].device)
        programs = min(programs, each * gpu.multi_processor_count)
    tile = rows, columns, step
    sizes = EightSizes(programs, width, hidden, *tile, value_scale(width), rounds)
    part = int(SIGN_COLUMNS)
    sides = {"M": rows, "N": columns, "STEP": step, "PART": part}
    sides["STORED"] = part if columns == part else part // 2
    for name, block in blocks.items():
        if named[name] is not None:
            descriptor = TensorDescriptor.from_tensor(named[name], [sides[side] for side in block])
            named = named | {name: descriptor}
    named |= {"length": length, "S": sizes}
    t.launch(kernel, (programs,), named, warps=warps, stages=stages, registers=registers)


def scaled_product(a8: Tensor, b8: Tensor, a_scale: Tensor, b_scale: Tensor, dtype) -> Tensor:
    """(a_scale a8) (b_scale b8)^T in dtype, of a8 (M, K), b8 (N, K) and float32 scalars."""
    if a8.dtype != EIGHT:
        return (a8 @ b8.mT * (a_scale * b_scale)).to(dtype)
    fast = os.environ.get("IDEA_EIGHT_EXACT") != "1"
    return torch._scaled_mm(
        a8, b8.mT, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast
    )


# ============
# The MLP's operator

# Results after y, in their order; empty ones for parts that are off. Scalars and weights are
# weights_in_eight()'s.
KEPT_NAMES = ("active", "signs", "active8", "scalars", "up8", "up8_turned", "down8", "down8_turned")


@torch.library.custom_op("golf::eight_mlp", mutates_args=())
def eight_mlp(
    x: Tensor, x8: Tensor, factor: Tensor, up: Tensor, down: Tensor, input_scale: float, parts: str
) -> list[Tensor]:
    """y = down f(factor · up x) of rows x (T, width), and what backward needs: KEPT_NAMES.

    x8 (T, width) are norm(x) in 8 bits; factor (T,) float32 is norm's times input_scale; up and
    down are float32; parts as in IDEA_EIGHT_PARTS.
    """
    y, *kept = eight_mlp_fake(x, x8, factor, up, down, input_scale, parts)
    found = dict(zip(KEPT_NAMES, kept, strict=True))
    rounded = weights_in_eight(up, down, x.dtype, input_scale)
    found |= zip(KEPT_NAMES[3:], rounded, strict=True)
    if "forward" not in parts:
        plain = t.fused_mlp(x, factor, up.to(x.dtype), down.to(x.dtype))
        found |= zip(KEPT_NAMES, plain[1:], strict=False)
        found["scalars"][int(ACTIVE)] = 1.0
        return [plain[0], *found.values()]
    rounds = "down" in parts
    named = found | {"x8": x8, "active_map": found["active"]}
    blocks = {"x8": ("M", "STEP"), "up8": ("N", "STEP"), "active_map": ("M", "PART")}
    if rounds:
        blocks["active8"] = "M", "PART"
    else:
        named["active8"] = None
    launch_eight(eight_forward, named, x.shape[1], blocks, rounds)
    scales = [found["scalars"][int(i)] for i in (ACTIVE, DOWN)]
    if rounds:
        y = scaled_product(found["active8"], found["down8"], *scales, x.dtype)
    else:
        down16 = (down * scales[0]).to(x.dtype)
        y = found["active"] @ down16.mT
    return [y, *found.values()]


@eight_mlp.register_fake
def eight_mlp_fake(x, x8, factor, up, down, input_scale, parts) -> list[Tensor]:
    """eight_mlp()'s results, without their values."""
    length, hidden = len(x), len(up)
    signs = x.new_empty(length, hidden // 8, dtype=torch.uint8)
    rows8 = length if "down" in parts else 0
    active8 = x.new_empty(rows8, hidden, dtype=eight_type(x.dtype))
    plain = x.new_empty(length, len(down)), x.new_empty(length, hidden), signs, active8
    return [*plain, *weights_in_eight_fake(up, down, x.dtype, input_scale)]


@torch.library.custom_op("golf::eight_mlp_backward", mutates_args=())
def eight_mlp_backward(
    d_y8: Tensor,
    row_factor: Tensor,
    active: Tensor,
    signs: Tensor,
    read: Tensor,
    scalars: Tensor,
    down8_turned: Tensor,
    up8_turned: Tensor,
    parts: str,
) -> list[Tensor]:
    """The gradient of up x (T, HIDDEN); and x's (T, width), but for factors of rows, or nothing.

    d_y8 are rows of y's gradient, each by some factor; row_factor (T,) float32 takes that and
    down8's from the former result, times norm's factor. read is active, or for slope active8.
    """
    d_v, d_x = eight_mlp_backward_fake(
        d_y8, row_factor, active, signs, read, scalars, down8_turned, up8_turned, parts
    )
    rounded = "input" in parts
    d_v8 = torch.empty_like(d_v, dtype=d_y8.dtype) if rounded else None
    named = {"d_y8": d_y8, "down8": down8_turned, "active": read, "active_map": read}
    named |= {"d_v": d_v, "d_v8": d_v8, "signs": signs, "row_factor": row_factor}
    blocks = {"d_y8": ("M", "STEP"), "down8": ("N", "STEP"), "active_map": ("M", "N")}
    blocks |= {"d_v": ("M", "STORED"), "d_v8": ("M", "STORED")}
    named["scalars"] = scalars
    launch_eight(eight_backward, named, d_y8.shape[1], blocks, rounded)
    if rounded:
        scales = scalars[int(INPUT_GRADIENT)], scalars[int(UP)]
        d_x = scaled_product(d_v8, up8_turned, *scales, active.dtype)
    return [d_v, d_x]


@eight_mlp_backward.register_fake
def eight_mlp_backward_fake(
    d_y8, row_factor, active, signs, read, scalars, down8_turned, up8_turned, parts
) -> list[Tensor]:
    """eight_mlp_backward()'s results, without their values."""
    rows = len(d_y8) if "input" in parts else 0
    return [torch.empty_like(active), active.new_empty(rows, d_y8.shape[1])]


def rounded_rows(d_y: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient's rows in 8 bits, and their root mean squares (T,) float32 by ROW_SCALE."""
    scale = row_scale(d_y.shape[1])
    wide = t.widened(d_y)
    square = wide.square().mean(-1)
    size = square.sqrt().clamp(min=LEAST) / scale
    factor = 1 / size
    return to_eight(wide * factor.unsqueeze(-1), d_y.dtype), size


def eight_mlp_autograd(ctx, gradients):
    """The gradients of eight_mlp()'s arguments, from that of y, the first of its results."""
    x, factor, up, down, *kept = ctx.saved_tensors
    active, signs, read, scalars, up8_turned, down8_turned = kept
    d_y = gradients[0].contiguous()
    if "backward" in ctx.parts:
        d_y8, size = rounded_rows(d_y)
        row_factor = size * scalars[int(DOWN)] * factor
        tensors = (active, signs, read, scalars, down8_turned, up8_turned)
        d_v, d_x = eight_mlp_backward(d_y8, row_factor, *tensors, ctx.parts)
    else:
        root_scale = scalars[int(ACTIVE)].sqrt()
        d_v = t.fused_mlp_backward(d_y, factor * root_scale, down.to(x.dtype), active, signs)
    if "input" in ctx.parts:
        back = (size * factor).unsqueeze(-1)
        d_x = (d_x * back).to(x.dtype)
    else:
        d_x = d_v @ up.to(x.dtype)
    products = t.widened(d_x) * x
    d_factor = products.sum(-1) / factor
    d_up = (d_v.mT @ x).to(up.dtype)
    d_down = (d_y.mT @ active).to(down.dtype)
    d_down = d_down * scalars[int(ACTIVE)]
    return d_x, None, d_factor, d_up, d_down, None, None


def eight_mlp_by_formula(
    x: Tensor, up: Tensor, down: Tensor, d_y: Tensor, input_scale: float
) -> dict[str, Tensor]:
    """What the operators compute with all parts but slope, by PyTorch's own functions.

    y (T, width); of the kernels f active, f8 active8, and the gradient of up x d_v (T, HIDDEN); d_x
    (T, width), x's gradient where norm's factor is held constant. Sums are float32's.
    """
    dtype, width = x.dtype, x.shape[1]
    x8, norm_factor = rounded_norm(x)
    (up8, up_back), (down8, down_back) = (rounded_weight(w, dtype) for w in (up, down))
    unit = input_scale * up_back / row_scale(width)
    v8 = x8.float() @ up8.float().mT
    active = torch.nn.functional.leaky_relu(unit * v8, 0.5).square()
    active_back = unit**2 / value_scale(width)
    active8 = to_eight(active / active_back, dtype)
    y = active8.float() @ down8.float().mT * (active_back * down_back)
    d_y8, size = rounded_rows(d_y)
    root = active.to(dtype).float().sqrt()
    slope = torch.where(v8 < 0, -root, 2 * root)
    product = d_y8.float() @ down8.float() * slope
    row_factor = (size * input_scale * norm_factor).unsqueeze(-1)
    rounding = 1 / (gradient_scale(width) * unit)
    d_v8 = to_eight(product * rounding, dtype)
    d_x = d_v8.float() @ up8.float() * (down_back / rounding * up_back)
    d_v = product * down_back
    d_x, d_v = row_factor * d_x, row_factor * d_v
    return {"y": y, "active": active, "active8": active8, "d_v": d_v, "d_x": d_x}


def rounded_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix in 8 bits, for activations of this type; and () what brings it back to its size."""
    weight = weight.float()
    size = weight.square().mean().sqrt()
    scale = WEIGHT_SIZE / size.clamp(min=1e-12)
    return to_eight(weight * scale, dtype), 1 / scale


def keep_for_backward(ctx, inputs, output) -> None:
    """What eight_mlp_autograd() reads."""
    x, _, factor, up, down, _, ctx.parts = inputs
    _, active, signs, active8, scalars, _, up8_turned, _, down8_turned = output
    read = active8 if "slope" in ctx.parts else active
    ctx.save_for_backward(
        x, factor, up, down, active, signs, read, scalars, up8_turned, down8_turned
    )


eight_mlp.register_autograd(eight_mlp_autograd, setup_context=keep_for_backward)


# ============
# in_proj's operator


@torch.library.custom_op("golf::eight_linear", mutates_args=())
def eight_linear(x: Tensor, x8: Tensor, weight: Tensor, input_scale: float) -> Tensor:
    """x weight^T in x's dtype, of rows (T, width) and a float32 matrix; its gradients are plain.

    x8 (T, width) is x by row_scale() / input_scale, in 8 bits.
    """
    scalars, weight8, _ = weights_in_eight(weight, None, x.dtype, input_scale)
    scales = scalars[int(UNIT)], scalars[int(ONE)]
    return scaled_product(x8, weight8, *scales, x.dtype)


@eight_linear.register_fake
def eight_linear_fake(x, x8, weight, input_scale) -> Tensor:
    """eight_linear()'s result, without its values."""
    return x.new_empty(len(x), len(weight))


def eight_linear_autograd(ctx, gradient):
    """As of a product in x's dtype."""
    x, weight = ctx.saved_tensors
    d_weight = (gradient.mT @ x).to(weight.dtype)
    return gradient @ weight.to(x.dtype), None, d_weight, None


eight_linear.register_autograd(
    eight_linear_autograd,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], inputs[2]),
)


# ============
# The idea


def chosen_parts() -> tuple[str, ...]:
    """What IDEA_EIGHT_PARTS names, which makes sense together."""
    text = os.environ.get("IDEA_EIGHT_PARTS", DEFAULT_PARTS)
    parts = tuple(text.split(","))
    known = ", ".join(PARTS)
    t.need(set(parts) <= set(PARTS), f"IDEA_EIGHT_PARTS={text} should be of {known}")
    for part, others in NEEDED.items():
        missing = set(others) - set(parts)
        t.need(part not in parts or not missing, f"IDEA_EIGHT_PARTS={text}: {part} needs {others}")
    return parts


def has_eight_bits(device: torch.device) -> bool:
    """Whether this is a GPU of the kind that the kernels are for."""
    return device.type == "cuda" and t.kernel_limits(device)[0] == 90


def rounded_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x) of rows x (T, width) by row_scale(), in 8 bits; and norm's factor (T,) float32."""
    square = t.widened(x).square().mean(-1)
    factor = (square + t.NORM_EPS).rsqrt()
    scale = row_scale(x.shape[1]) * factor.detach()
    return to_eight(x.detach() * scale.unsqueeze(-1), x.dtype), factor


def install(script) -> None:
    """Changes train_gpt.py's MLP, Block and Linear as IDEA_EIGHT_PARTS says."""
    parts = chosen_parts()
    names = ",".join(parts)

    class MLP(script.MLP):
        """Computes by eight_mlp() where train_gpt.py's does by fused_mlp()."""

        def fused(self, x: Tensor, input_scale: float) -> Tensor:
            """forward() of x (B, T, width)."""
            rows = x.flatten(0, 1)
            x8, factor = rounded_norm(rows)
            weights = self.up.weight, self.down.weight
            y, *_ = eight_mlp(rows, x8, input_scale * factor, *weights, input_scale, names)
            return y.view(x.shape)

    class EightLinear(script.Linear):
        """An in_proj: its training multiplies 8-bit floats."""

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            """W x of x (B, T, width), a norm's result times input_scale."""
            if not torch.is_grad_enabled():
                return super().forward(x, scale)
            rows = x.flatten(0, 1)
            scale = row_scale(x.shape[2]) / self.input_scale
            x8 = to_eight(t.widened(rows.detach()) * scale, x.dtype)
            y = eight_linear(rows, x8, self.weight, self.input_scale)
            return y.view(*x.shape[:2], -1)

    class Block(script.Block):
        """Tells in_proj how large its inputs are."""

        def __init__(self, settings, layer: int, scan_backend: str, device: torch.device):
            super().__init__(settings, layer, scan_backend, device)
            in_proj = getattr(self.mixer, "in_proj", None)
            whole = in_proj is not None and len(in_proj.weight) % 16 == 0
            if whole and has_eight_bits(device):
                in_proj.__class__ = EightLinear
                in_proj.input_scale = self.input_scale

    if set(parts) - {"in_proj"}:
        script.MLP = MLP
    if "in_proj" in parts:
        script.Block = Block

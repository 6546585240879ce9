"""Idea: the MLP's norm and LeakyReLU² inside its products. For --idea of tools.explore.

With a row's norm as a factor s behind the product, the activation f and its slope:

    v = W x;   u = s v;   r = max(u, u / 2);   f(u) = r²;   f'(u) = 2 |r| for u > 0, else -|r|

Separate kernels read u and write f, and backward read f's gradient and u and write u's. Here the
products do both while their results are in registers: forward writes f, which the next matrix's
gradient asks for anyway, and the signs of u, a bit each; backward takes v's gradient from those.
The factor's own gradient is sum(d_u v) = sum(d_x x) / s, with d_x = W^T d_v: no row of v is kept.

    active  (T, F), as x  f(u)
    signs   (T, F / 8)    uint8: of 128 columns 16 bytes; bit j of byte c is of column 16 j + c

For NVIDIA GPUs with tensor maps (compute capability 9.0 and later). MLPs whose width is no multiple
of 256 are refused. bench/NOTES.md has the count of bytes that it comes from, and what was measured.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as t

# As the kernels name them. Without Triton constexpr is a stand-in, and nothing is launched.
tl = t.tl if t.triton else None
constexpr = t.constexpr
exact_dot = t.exact_dot
FAST = t.FAST
SIGN_COLUMNS = constexpr(128)
SIGN_BYTES = constexpr(16)


class ProductTile(NamedTuple):
    """How a product is cut. A program goes through tiles of (M, N) results, N = 2 SIGN_COLUMNS.

    Results go out through shared memory, OUT columns after another: it has not room for all.
    """

    M: int
    N: int
    STEP: int  # of the sum
    stages: int  # steps that are being loaded
    warps: int
    OUT: int


# The fastest of five each on an H200, at 65,536 rows of 512 and 2,048 numbers.
TILES = {
    "mlp_forward": ProductTile(128, 256, 64, 4, 8, 128),
    "mlp_backward": ProductTile(128, 256, 64, 3, 8, 64),
}


# ============
# Kernels


@t.jit
def tile_rows(row, M: constexpr):
    """The rows (M, 1) of a tile."""
    return row + tl.arange(0, M)[:, None]


@t.jit
def sign_places(signs, rows, column, HIDDEN: constexpr, N: constexpr):
    """Where the signs of a tile's rows (M, 1) lie, (M, N / 8)."""
    c = column // 8 + tl.arange(0, N // 8)[None, :]
    return signs + rows.to(tl.int64) * (HIDDEN // 8) + c


@t.jit
def pack_signs(x):
    """The signs of (M, SIGN_COLUMNS) float32 numbers, (M, SIGN_BYTES)."""
    bit = tl.arange(0, 8)[None, :, None]
    negative = (x.to(tl.uint32, bitcast=True) >> 31).reshape(x.shape[0], 8, SIGN_BYTES)
    return tl.sum(negative << bit, axis=1).to(tl.uint8)


@t.jit
def unpack_signs(packed):
    """Whether the numbers are below 0 (M, N) that pack_signs() made these bytes of, (M, N / 8)."""
    M: constexpr = packed.shape[0]
    N: constexpr = packed.shape[1] * 8
    packed = packed.to(tl.int32).reshape(M, N // SIGN_COLUMNS, 1, SIGN_BYTES)
    bits = (packed >> tl.arange(0, 8)[None, None, :, None]) & 1
    return (bits != 0).reshape(M, N)


@t.jit
def halves(x):
    """The left and the right half of a tile's columns."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@t.jit
def store_active(v, factor, active, signs, row, column, length, HIDDEN: constexpr):
    """f(u) and the signs of half a tile, v (M, SIGN_COLUMNS)."""
    rows = tile_rows(row, v.shape[0])
    scale = tl.load(factor + rows, rows < length, 0.0)
    square = scale * scale
    u_square = v * v * tl.where(v < 0, 0.25 * square, square)
    store_half(active, row, column, u_square)
    places = sign_places(signs, rows, column, HIDDEN, SIGN_COLUMNS)
    tl.store(places, pack_signs(v), rows < length)


@t.jit
def store_half(tensor_map, row, column, x):
    """Stores half a tile, in as many parts as its map says."""
    x = x.to(tensor_map.dtype)
    if x.shape[1] == tensor_map.block_shape[1]:
        tensor_map.store([row, column], x)
    else:
        left, right = halves(x)
        tensor_map.store([row, column], left)
        tensor_map.store([row, column + x.shape[1] // 2], right)


@t.jit
def prefetch_tile(tensor, row, column, length, HIDDEN: constexpr, M: constexpr, N: constexpr):
    """Has the L2 cache fetch a tile (M, N) of bfloat16, line by line of 64."""
    rows = tl.minimum(tile_rows(row, M), length - 1).to(tl.int64)
    place = tensor + rows * HIDDEN + column + 64 * tl.arange(0, N // 64)[None, :]
    code: constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(code, "=r,l", [place], tl.int32, False, 1)


@t.jit
def mlp_forward(
    x,  # tensor maps of tiles: (M, STEP)
    up,  # (N, STEP)
    active,  # out, (M, OUT)
    signs,  # out; from here on tensors
    factor,  # of each row, (T,), above 0
    length,
    WIDTH: constexpr,
    HIDDEN: constexpr,
    M: constexpr,
    N: constexpr,
    STEP: constexpr,
    PROGRAMS: constexpr,
):
    """f(factor · x up^T), and the signs of the product."""
    columns = HIDDEN // N
    tiles = tl.cdiv(length, M) * columns
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        row = tile // columns * M  # tiles of the same rows one after another
        column = tile % columns * N
        v = tl.zeros((M, N), tl.float32)
        for k in range(0, WIDTH, STEP):
            v = exact_dot(x.load([row, k]), tl.trans(up.load([column, k])), v)
        left, right = halves(v)
        store_active(left, factor, active, signs, row, column, length, HIDDEN)
        column += SIGN_COLUMNS
        store_active(right, factor, active, signs, row, column, length, HIDDEN)


@t.jit
def mlp_backward(
    d_y,  # tensor maps of tiles: (M, STEP)
    down,  # (STEP, N)
    active,  # (M, N)
    d_v,  # out, (M, OUT)
    active_tensor,  # from here on tensors
    signs,
    factor,
    length,
    WIDTH: constexpr,
    HIDDEN: constexpr,
    M: constexpr,
    N: constexpr,
    STEP: constexpr,
    PROGRAMS: constexpr,
):
    """The gradient of v, from d_y down, which is that of f(u)."""
    columns = HIDDEN // N
    tiles = tl.cdiv(length, M) * columns
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        row = tile // columns * M
        column = tile % columns * N
        d = tl.zeros((M, N), tl.float32)
        for k in range(0, WIDTH, STEP):
            d = exact_dot(d_y.load([row, k]), down.load([k, column]), d)
        if FAST:
            next_row = (tile + PROGRAMS) // columns * M
            next_column = (tile + PROGRAMS) % columns * N
            prefetch_tile(active_tensor, next_row, next_column, length, HIDDEN, M, N)
            prefetch_tile(signs, next_row, next_column // 8, length, HIDDEN // 8, M, 64)
        rows = tile_rows(row, M)
        packed = tl.load(sign_places(signs, rows, column, HIDDEN, N), rows < length, 0)
        scale = tl.load(factor + rows, rows < length, 0.0)
        root = tl.sqrt(active.load([row, column]).to(tl.float32))
        left, right = halves(d * root * tl.where(unpack_signs(packed), -scale, 2.0 * scale))
        store_half(d_v, row, column, left)
        store_half(d_v, row, column + SIGN_COLUMNS, right)


def launch_product(kernel, tensors: dict[str, Tensor], blocks: dict[str, list[int]], width: int):
    """Runs one of the kernels above on its tensors, by name.

    blocks: sizes of the tiles that it takes of some, by tensor map. width: the sum's length.
    """
    tile = TILES[kernel.__name__]
    length, hidden = tensors["active"].shape
    t.need(hidden % tile.N == 0, f"fused_mlp: an MLP of {hidden} is no multiple of {tile.N} wide")
    programs = t.triton.cdiv(length, tile.M) * (hidden // tile.N)
    if tensors["signs"].is_cuda:  # one on each multiprocessor
        properties = torch.cuda.get_device_properties(tensors["signs"].device)
        programs = min(programs, properties.multi_processor_count)
    tensor_map = t.TensorDescriptor.from_tensor
    maps = {name: tensor_map(tensors[name], block) for name, block in blocks.items()}
    sizes = {"length": length, "WIDTH": width, "HIDDEN": hidden, "PROGRAMS": programs}
    sizes |= {"M": tile.M, "N": tile.N, "STEP": tile.STEP}
    kernel[(programs,)](**(tensors | maps), **sizes, num_warps=tile.warps, num_stages=tile.stages)


# ============
# Operators


@torch.library.custom_op("golf::fused_mlp", mutates_args=())
def mlp_parts(x: Tensor, factor: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    """fused_mlp()'s y, and what its backward needs beside the arguments: active, signs."""
    y, active, signs = empty_parts(x, factor, up, down)
    tile = TILES["mlp_forward"]
    blocks = {"x": [tile.M, tile.STEP], "up": [tile.N, tile.STEP]}
    blocks["active"] = [tile.M, tile.OUT]
    tensors = {"x": x, "up": up, "active": active, "signs": signs, "factor": factor}
    launch_product(mlp_forward, tensors, blocks, x.shape[1])
    torch.mm(active, down.mT, out=y)
    return [y, active, signs]


@mlp_parts.register_fake
def empty_parts(x, factor, up, down) -> list[Tensor]:
    """mlp_parts()'s outputs, without their values."""
    length, hidden = len(x), len(up)
    signs = x.new_empty(length, hidden // 8, dtype=torch.uint8)
    return [x.new_empty(length, len(down)), x.new_empty(length, hidden), signs]


@torch.library.custom_op("golf::fused_mlp_slope", mutates_args=())
def product_gradient(
    d_y: Tensor, factor: Tensor, down: Tensor, active: Tensor, signs: Tensor
) -> Tensor:
    """The gradient (T, F) of the product x up^T, from that of y (T, width)."""
    d_v = torch.empty_like(active)
    tile = TILES["mlp_backward"]
    blocks = {"d_y": [tile.M, tile.STEP], "down": [tile.STEP, tile.N]}
    blocks |= {"active": [tile.M, tile.N], "d_v": [tile.M, tile.OUT]}
    tensors = {"d_y": d_y, "down": down, "active": active, "d_v": d_v, "active_tensor": active}
    tensors |= {"signs": signs, "factor": factor}
    launch_product(mlp_backward, tensors, blocks, d_y.shape[1])
    return d_v


@product_gradient.register_fake
def _empty_gradient(d_y, factor, down, active, signs) -> Tensor:
    return torch.empty_like(active)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])


def _autograd(ctx, gradients):
    x, factor, up, down, active, signs = ctx.saved_tensors
    d_y = gradients[0].contiguous()
    d_v = product_gradient(d_y, factor, down, active, signs)
    d_x = d_v @ up
    d_factor = (t.widened(d_x) * x).sum(-1) / factor
    return d_x, d_factor, d_v.mT @ x, d_y.mT @ active


mlp_parts.register_autograd(_autograd, setup_context=_keep)


def fused_mlp(x: Tensor, factor: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down f(factor · up x) of rows x (T, width), (T, width); factor (T,) float32.

    The matrices are up (F, width) and down (width, F), in x's dtype.
    """
    return mlp_parts(x, factor, up, down)[0]


def mlp_by_formula(x: Tensor, factor: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same by PyTorch's own functions, in x's dtype."""
    return F.leaky_relu((factor.unsqueeze(1) * x) @ up.mT, 0.5).square() @ down.mT


# ============
# The idea


def mlp_of_stream(mlp, stream: Tensor, input_scale: float) -> Tensor:
    """mlp(input_scale · norm(stream)), stream (B, T, width), shaped alike."""
    rows = stream.flatten(0, 1)
    factor = input_scale * (t.widened(rows).square().mean(-1) + 1e-6).rsqrt()
    matrices = mlp.up.weight.to(rows.dtype), mlp.down.weight.to(rows.dtype)
    return fused_mlp(rows, factor, *matrices).view(stream.shape)


def fusing(kind: type) -> type:
    """Blocks, of this kind, whose MLP norms its own input."""

    class Block(kind):
        """As its parent but for the MLP's kernels."""

        def forward(self, x: Tensor, embedded: Tensor, context, state=None) -> tuple:
            """As the script's; without gradients it is that, for GPTQ sees what matrices get."""
            if self.mlp is None or not torch.is_grad_enabled():
                return super().forward(x, embedded, context, state)
            keep, mix = self.residual_mix.to(x.dtype)
            x = keep * x + mix * embedded
            y, state = self.mixer(self.input_scale * t.norm(x), context, state)
            x = x + y
            return x + mlp_of_stream(self.mlp, x, self.input_scale), state

    return Block


def install(script) -> None:
    """Changes train_gpt.py's blocks."""
    script.need(script.triton is not None, "fused_mlp: needs triton and an NVIDIA GPU")
    script.Block = fusing(script.Block)

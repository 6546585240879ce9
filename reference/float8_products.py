"""train_gpt.py's products of 8-bit floats by PyTorch's own functions, on any device.

Operators have the script's signatures, and round as they do: in float32 not at all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as t


def rounded_weight(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W8 of a float32 matrix, float32 numbers, and its size (): W beside W8."""
    size = matrix.square().mean().sqrt()
    size = size.clamp(min=1e-12) / t.WEIGHT_SIZE
    return t.to_float8(matrix / size, dtype).float(), size


def sloped_root(active: Tensor, negative: Tensor) -> Tensor:
    """f'(w) of active = f(w) / 4 and of whether w is below 0."""
    root = (4 * active.float()).sqrt()
    return torch.where(negative, -root, 2 * root)


class Float8MLP(torch.autograd.Function):
    """float8_mlp() and its gradients."""

    @staticmethod
    def forward(ctx, x, x8, factor, up, down):
        """y, but for MLP.in_float8()'s factors."""
        usual = t.usual_product(x.shape[1])
        up8, up_size = rounded_weight(up, x.dtype)
        down8, down_size = rounded_weight(down, x.dtype)
        v8 = x8.float() @ up8.mT
        root = F.leaky_relu(v8 / usual, 0.5)
        active = root.square() / 4
        active8 = t.to_float8(active, x.dtype)
        slope = sloped_root(active8, v8 < 0)
        kept = (x, x8, factor, active8, slope, up8, up_size, down8, down_size)
        ctx.save_for_backward(*kept)
        # up_size twice is f's, of which one is left to who multiplies y.
        y = active8.float() @ down8.mT
        y *= up_size * down_size
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, d_y):
        """Of x, factor, up and down."""
        x, x8, factor, active8, slope, up8, up_size, down8, down_size = ctx.saved_tensors
        # Of f8, in rows of about the same size; then, in 8 bits, of w = v8 / USUAL.
        width = x.shape[1]
        d_y8, size = t.float8_gradient(d_y)
        d_active = d_y8.float() @ down8
        d_v = d_active * slope / t.usual_product(width)
        d_v8 = t.to_float8(d_v, x.dtype).float()
        row = t.row_scale(width) / 4 * size * factor
        # What brings a row's gradient back to its size: of up x, and with up's of x.
        row = down_size * row.unsqueeze(1)
        d_x = d_v8 @ up8
        d_x *= up_size * row
        products = d_x * x
        d_factor = products.sum(1) / factor
        d_up = turned_product(d_v8, x8, size) * (down_size / 4)
        d_down = turned_product(active8.float(), d_y8, size).mT
        d_down = up_size * d_down
        return d_x.to(x.dtype), None, d_factor, d_up, d_down


def turned_product(a8: Tensor, b8: Tensor, size: Tensor) -> Tensor:
    """The sum over rows of a8^T (size b8), where a row of size b8 is rounded again, float32."""
    scale = t.turn_scale(size)
    # Powers of two: only what becomes very small is rounded.
    rows = (size / scale).unsqueeze(1) * b8.float()
    rounded = rows.to(b8.dtype).float()
    return scale * (a8.float().mT @ rounded)


def turned(x8: Tensor, scale: Tensor | None = None) -> Tensor:
    """Rows x8 (T, N), by scale (T,), transposed as train_gpt.turned_like() says: of 16 the first,
    the ninth, the second, the tenth, ...; zeros behind them.
    """
    rows = x8.float()
    if scale is not None:
        rows = scale.unsqueeze(1) * rows
    rows = F.pad(rows, (0, 0, 0, t.turned_like(x8, 0).shape[1] - len(x8)))
    pairs = rows.view(-1, 2, 8, x8.shape[1]).permute(3, 0, 2, 1)
    return pairs.reshape(x8.shape[1], -1).to(x8.dtype)


def float8_mlp(x: Tensor, x8: Tensor, factor: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    """y, and in its place from train_gpt.float8_mlp()'s last result the size of up."""
    _, size = rounded_weight(up, x.dtype)
    y = Float8MLP.apply(x, x8, factor, up, down)
    return [y, *[size.reshape(1, 1)] * 4]


def float8_rows(x: Tensor, x8: Tensor, weight: Tensor) -> Tensor:
    """W x by 8-bit factors; its gradients are those of x and W unrounded."""
    weight8, size = rounded_weight(weight.detach(), x.dtype)
    # Values by 8-bit factors, gradients by the others.
    rounded = x8.float() @ weight8.mT
    rounded *= size / t.row_scale(x.shape[1])
    plain = x @ weight.to(x.dtype).mT
    difference = rounded - plain
    return (plain + difference.detach()).to(x.dtype)

"""Checks and times gradients of the MLP's weights by 8-bit factors, on an H100 or H200.

    python -m bench.weight_gradients [--rows 65536] [--out FILE.json]

Checks, each with what is allowed: that what the kernels store transposed is bit for bit what they
store as it stands (ptxas of CUDA 12.8 and 12.9 may spoil 8-bit floats); the sums over tokens beside
float32's of the same factors, with the part by which they are too small, for tensor cores cut fast
sums of 8-bit factors; the gradients of a layer beside float32's of what was not rounded.

Times are medians of CUDA graphs, in milliseconds: the kernels with gradients of weights in 8 bits
beside those without, in several tilings; the sums by the script's kernel and by cuBLAS, beside
bfloat16 products; a layer of PRESET=short, forward and backward, compiled. "FAILED" and status 1 if
a check fails; what cannot run says why.
"""

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m bench.weight_gradients",
        file=sys.stderr,
    )
    sys.exit(2)

import train_gpt as t
from bench import bench
from reference import float8_products as reference
from tools.command import Parser, UserError, need, run_command

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
WIDTH = 512
HIDDEN = 2048
SECONDS = 0.1  # for which each is timed
# M, N, STEP, stages, as in the script, whose own are the first.
FORWARD_TILES = ((128, 256, 128, 3), (128, 256, 128, 4))
BACKWARD_TILES = ((128, 128, 64, 3), (128, 128, 64, 4), (128, 256, 64, 4))
PART_TILES = ((128, 256, 128, 4), (128, 256, 64, 6), (256, 128, 128, 4), (128, 128, 128, 6))


# ============
# What is told


class Report:
    """Lines that are told as they are found, and saved."""

    def __init__(self, file: Path | None):
        self.file = file
        self.started = time.perf_counter()
        self.found: dict = {}
        self.failures = 0

    def tell(self, name: str, value) -> None:
        """A line, and the file anew."""
        self.found[name] = value
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"[{time.perf_counter() - self.started:5.1f} s] {name}: {shown}", flush=True)
        if self.file is not None:
            self.file.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def check(self, name: str, value: float, allowed: float) -> None:
        """A value that should be at most what is allowed; NaN is not."""
        good = value <= allowed
        self.failures += not good
        self.tell(f"{'ok' if good else 'FAILED'} {name} (at most {allowed:g})", value)

    def time(self, name: str, call: Callable) -> None:
        """Milliseconds of a call, as a CUDA graph where it can be one; or what goes wrong."""
        try:
            graph, why_not = bench.captured(call)
            milliseconds = bench.milliseconds(graph, SECONDS)
        except Exception as error:  # a tiling that does not fit, an operator that refuses
            self.tell(f"{name}, ms", f"{type(error).__name__}: {error}".splitlines()[0][:200])
            return
        self.tell(f"{name}, ms{why_not and f' ({why_not})'}", milliseconds)


# ============
# A layer, step by step
#
# The script's operators keep 8-bit factors of their products to themselves: they are seen where
# these products read them.


class Case(NamedTuple):
    """A layer's inputs and the gradient of its result, whose rows are of many sizes."""

    x: Tensor  # (T, WIDTH) bfloat16
    d_y: Tensor  # likewise
    up: Tensor  # (HIDDEN, WIDTH) float32
    down: Tensor  # (WIDTH, HIDDEN) float32


class Steps(NamedTuple):
    """What a layer's forward and backward have on the way, by the script's names."""

    x8: Tensor  # (T, WIDTH), as d_y8
    factor: Tensor  # (T,) float32, as size
    kept: list[Tensor]  # float8_mlp()'s results but y; the first is f8 transposed, or f in 16 bits
    active8: Tensor  # (T, HIDDEN), f8 as it stands
    d_y8: Tensor
    size: Tensor
    d_v: Tensor  # d_v8 transposed, or d_v in 16 bits
    d_v8: Tensor  # (T, HIDDEN), as it stands


def random_case(rows: int) -> Case:
    """Gradients as small as a mean over a batch makes them, sizes over some powers of two."""
    normal = functools.partial(torch.randn, device=DEVICE)
    x = normal(rows, WIDTH) * normal(rows, 1).exp()
    d_y = 1e-6 * normal(rows, WIDTH) * normal(rows, 1).exp()
    up = normal(HIDDEN, WIDTH) / WIDTH**0.5
    return Case(x.to(DTYPE), d_y.to(DTYPE), up, normal(WIDTH, HIDDEN) / HIDDEN**0.5)


@contextlib.contextmanager
def products_seen():
    """A list of the first factors of scaled_product()'s calls."""
    usual = t.scaled_product
    seen = []

    def watched(a8: Tensor, *others):
        seen.append(a8)
        return usual(a8, *others)

    t.scaled_product = watched
    try:
        yield seen
    finally:
        t.scaled_product = usual


def run_steps(case: Case, turn: bool) -> Steps:
    """A layer's kernels one after another."""
    x8, factor = t.float8_norm(case.x)
    d_y8, size = t.float8_gradient(case.d_y, turn)
    with products_seen() as seen:
        _, *kept = t.float8_mlp(case.x, x8, factor, *case[2:], turn)
        d_v, _ = t.float8_mlp_backward(d_y8, factor, kept, turn)
    active8, d_v8 = seen
    return Steps(x8, factor, kept, active8, d_y8, size, d_v, d_v8)


# ============
# Checks
#
# Copies have to agree bit for bit: they are rounded from the same numbers. Sums are compared with
# float32's of the same factors, so that only how they are summed shows; gradients with float32's of
# numbers that were not rounded, so that everything does.


def different(found: Tensor, wanted: Tensor) -> float:
    """The part of numbers whose bits differ."""
    return float((found.view(torch.uint8) != wanted.view(torch.uint8)).float().mean())


def relative(found: Tensor, wanted: Tensor) -> float:
    """The norm of the error beside that of what is wanted."""
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


def check_stored(report: Report, case: Case) -> Steps:
    """Both copies of what is stored twice; returns what the kernels made."""
    rows = len(case.x)
    steps = run_steps(case, True)
    plain = run_steps(case, False)
    off = different(steps.active8, plain.active8)
    report.check(f"{rows:,} rows: f8 beside the usual kernel's", off, 1e-4)
    turned = reference.turned(steps.active8)
    report.check(f"{rows:,} rows: f8 transposed", different(steps.kept[0], turned), 0)
    turned = reference.turned(steps.d_v8)
    report.check(f"{rows:,} rows: d_v8 transposed", different(steps.d_v, turned), 0)
    # d_y8 is rounded by other sizes here, d_v8 in another order.
    usual = plain.d_v8.float() * plain.size.unsqueeze(1)
    found = steps.d_v8.float() * steps.size.unsqueeze(1)
    report.check(f"{rows:,} rows: d_v8 beside the usual kernel's", relative(found, usual), 0.1)
    mean = t.mean_size(steps.size)
    turned = t.launch_turn_rows(steps.x8, steps.d_y8, steps.size, mean)
    for name, x8, found in zip(("x8", "d_y8"), (steps.x8, steps.d_y8), turned, strict=True):
        wanted = reference.turned(x8, steps.size / (int(t.TURN_SCALE) * mean))
        report.check(f"{rows:,} rows: {name} transposed", different(found, wanted), 0)
    return steps


def check_sums(report: Report, a8: Tensor, b8: Tensor) -> None:
    """Sums over tokens by the script's kernel and by cuBLAS, beside those in float32."""
    report.tell("tokens that are summed", a8.shape[1])
    wanted = a8.float() @ b8.float().mT
    one = torch.ones((), device=DEVICE)
    ways = {"parts": lambda: t.sum_in_parts(a8, b8).sum(0)}
    for kind, fast in (("fast", True), ("exact", False)):
        ways[f"cuBLAS, {kind}"] = functools.partial(cublas, a8, b8, one, fast)
    for name, way in ways.items():
        try:
            found = way()
        except RuntimeError as error:  # of cuBLAS, which need not have such a product
            report.tell(f"d_up by {name}", str(error).splitlines()[0][:200])
            continue
        report.check(f"d_up by {name}: error", relative(found, wanted), 0.02)
        short = 1 - (found.double() * wanted).sum() / wanted.double().square().sum()
        report.check(f"d_up by {name}: too small by", abs(float(short)), 0.02)


def cublas(a8: Tensor, b8: Tensor, one: Tensor, fast: bool) -> Tensor:
    """a8 b8^T in float32 by cuBLAS."""
    options = {"out_dtype": torch.float32, "use_fast_accum": fast}
    return torch._scaled_mm(a8, b8.mT, scale_a=one, scale_b=one, **options)


def layer(turn: bool, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A layer's MLP but for constants, with the norm in front."""
    x8, factor = t.float8_norm(x)
    return t.float8_mlp(x, x8, factor, up, down, turn)[0]


def unrounded_layer(case: Case, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """layer() in float32."""
    size = case.up.square().mean().sqrt() / t.WEIGHT_SIZE
    usual = t.WEIGHT_SIZE * WIDTH**0.5 * size
    hidden = torch.nn.functional.leaky_relu(t.norm(x) @ up.mT, 0.5)
    return hidden.square() @ down.mT * (size / (4 * usual**2))


def gradients(function: Callable, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Of x and of both matrices."""
    leaves = [case.x.to(dtype), *case[2:]]
    leaves = [x.detach().requires_grad_() for x in leaves]
    return torch.autograd.grad(function(*leaves), leaves, case.d_y.to(dtype))


def check_gradients(report: Report, case: Case) -> None:
    """A layer's, with gradients of weights in 8 bits and without, beside float32's."""
    exact = gradients(functools.partial(unrounded_layer, case), case, torch.float32)
    for turn in (False, True):
        found = gradients(functools.partial(layer, turn), case, DTYPE)
        title = "8 bits" if turn else "16 bits"
        for name, x, wanted in zip(("d x", "d up", "d down"), found, exact, strict=True):
            report.check(f"weights' gradients in {title}: {name}", relative(x, wanted), 0.1)


# ============
# Times
#
# Every call is one CUDA graph: launches by the host would hide what 0.05 ms are. Operators are
# timed with the products and the rounding of weights that they hold, alike in both cases.


def time_tilings(report: Report, name: str, tiles: tuple, call: Callable) -> None:
    """A kernel of FLOAT8_TILES in several tilings; the usual one stays."""
    usual = t.FLOAT8_TILES[name]
    for tile in tiles:
        t.FLOAT8_TILES[name] = tile
        report.time(f"{name} turned, {tile}", call)
    t.FLOAT8_TILES[name] = usual


def time_kernels(report: Report, case: Case, steps: Steps) -> None:
    """The operators that have the kernels in them, products and rounding of weights included."""
    one = case.x, steps.x8, steps.factor, *case[2:]
    usual = run_steps(case, False)
    report.time("forward, without", functools.partial(t.float8_mlp, *one, False))
    forward = functools.partial(t.float8_mlp, *one, True)
    time_tilings(report, "mlp_forward", FORWARD_TILES, forward)
    given = usual.d_y8, usual.factor, usual.kept, False
    report.time("backward, without", functools.partial(t.float8_mlp_backward, *given))
    given = steps.d_y8, steps.factor, steps.kept, True
    backward = functools.partial(t.float8_mlp_backward, *given)
    time_tilings(report, "mlp_backward", BACKWARD_TILES, backward)
    d_v = usual.d_v
    report.time("d_up by bfloat16", lambda: d_v.mT @ case.x)
    report.time("d_down by bfloat16", lambda: case.d_y.mT @ usual.kept[0])
    report.time("sizes of rows and their mean", lambda: t.mean_size(steps.size))
    given = steps.x8, steps.d_y8, steps.size, t.mean_size(steps.size)
    report.time("x8 and d_y8 transposed", functools.partial(t.launch_turn_rows, *given))


def further_apart(x8: Tensor) -> Tensor:
    """The same with rows that do not begin at multiples of a large power of two, whose lines might
    meet in the same banks of memory.
    """
    wider = x8.new_empty(len(x8), x8.shape[1] + 128)[:, : x8.shape[1]]
    return wider.copy_(x8)


def time_sums(report: Report, name: str, a8: Tensor, b8: Tensor) -> None:
    """A sum over tokens by each of the tilings and by cuBLAS."""
    usual = t.PART_TILE
    for tile in PART_TILES:
        t.PART_TILE = tile
        report.time(f"{name} in parts, {tile}", lambda: t.sum_in_parts(a8, b8).sum(0))
    t.PART_TILE = usual
    apart = [further_apart(x8) for x8 in (a8, b8)]
    report.time(f"{name} in parts, rows further apart", lambda: t.sum_in_parts(*apart).sum(0))
    one = torch.ones((), device=DEVICE)
    for kind, fast in (("fast", True), ("exact", False)):
        report.time(f"{name} by cuBLAS, {kind}", functools.partial(cublas, a8, b8, one, fast))


def time_layers(report: Report, case: Case) -> None:
    """Forward and backward of a layer, compiled."""
    leaves = [x.detach().requires_grad_() for x in (case.x, *case[2:])]
    for turn in (False, True):
        compiled = torch.compile(functools.partial(layer, turn), fullgraph=True)

        def both(compiled=compiled):
            return torch.autograd.grad(compiled(*leaves), leaves, case.d_y)

        report.time(f"a layer, weights' gradients in {'8' if turn else '16'} bits", both)


def main(arguments: list[str] | None = None) -> int:
    """Checks first; times are worth nothing where these fail."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65_536, help="tokens (65536)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="what is found")
    given = parser.parse_args(arguments)
    need(given.rows > 0, "--rows should be above 0")
    able = torch.cuda.is_available() and t.can_fuse_mlp(WIDTH, HIDDEN, DEVICE)
    need(able, "needs an H100 or H200, and triton")
    t.prepare_torch()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    report = Report(given.out)
    report.tell("device", f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    check_stored(report, random_case(1000))  # the last tile has a rest
    case = random_case(given.rows)
    steps = check_stored(report, case)
    turned = t.launch_turn_rows(steps.x8, steps.d_y8, steps.size, t.mean_size(steps.size))
    check_sums(report, steps.d_v, turned[0])
    check_gradients(report, case)
    time_kernels(report, case, steps)
    time_sums(report, "d_up", steps.d_v, turned[0])
    time_sums(report, "d_down", turned[1], steps.kept[0])
    time_layers(report, case)
    report.tell("failed checks", report.failures)
    return int(report.failures > 0)


if __name__ == "__main__":
    sys.exit(run_command("bench.weight_gradients", main, UserError, t.UserError))

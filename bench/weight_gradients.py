"""Checks and times gradients of the MLP's weights by 8-bit factors, on an H100 or H200.

    python -m bench.weight_gradients [--rows 65536] [--out FILE.json]

Checks, each with what is allowed: that what the kernels store transposed is bit for bit what they
store as it stands (ptxas of CUDA 12.8 and 12.9 may spoil 8-bit floats); the sums over tokens beside
float32's of the same factors, with the part by which they are too small, for tensor cores cut fast
sums of 8-bit factors; the gradients of a layer beside float32's of what was not rounded.

Times are medians of CUDA graphs, in milliseconds: the operators; the sums by cuBLAS, fast as in the
script and exact, beside bfloat16 products; a layer of PRESET=short, forward and backward, compiled.
"FAILED" and status 1 if a check fails; what cannot run says why.
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
        except RuntimeError as error:  # of cuBLAS, which need not have such a product
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

    forward: tuple  # float8_mlp()'s arguments
    backward: tuple  # float8_mlp_backward()'s: d_y8, x8, size, scales, kept
    active8: Tensor  # (T, HIDDEN), f8 as it stands
    d_v8: Tensor  # likewise
    up_factors: tuple[Tensor, Tensor]  # d_v8 and x8 transposed
    down_factors: tuple[Tensor, Tensor]  # d_y8 and f8 transposed


def random_case(rows: int) -> Case:
    """Gradients as small as a mean over a batch makes them, sizes over some powers of two."""
    normal = functools.partial(torch.randn, device=DEVICE)
    x = normal(rows, WIDTH) * normal(rows, 1).exp()
    d_y = 1e-6 * normal(rows, WIDTH) * normal(rows, 1).exp()
    up = normal(HIDDEN, WIDTH) / WIDTH**0.5
    return Case(x.to(DTYPE), d_y.to(DTYPE), up, normal(WIDTH, HIDDEN) / HIDDEN**0.5)


@contextlib.contextmanager
def products_seen():
    """A list of both factors of scaled_product()'s calls."""
    usual = t.scaled_product
    seen = []

    def watched(a8: Tensor, b8: Tensor, *others):
        seen.append((a8, b8))
        return usual(a8, b8, *others)

    t.scaled_product = watched
    try:
        yield seen
    finally:
        t.scaled_product = usual


def run_steps(case: Case) -> Steps:
    """A layer's operators one after another."""
    x8, factor = t.float8_norm(case.x)
    d_y8, size = t.float8_gradient(case.d_y)
    scale = t.turn_scale(size)
    forward = case.x, x8, factor, *case[2:]
    with products_seen() as seen:
        _, *kept = t.float8_mlp(*forward)
        backward = d_y8, x8, size, [scale / 4, scale], kept
        t.float8_mlp_backward(*backward)
    (active8, _), (d_v8, _), up_factors, down_factors = seen
    return Steps(forward, backward, active8, d_v8, up_factors, down_factors)


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
    steps = run_steps(case)
    d_y8, x8, size, (_, scale), _ = steps.backward
    d_v, x_turned = steps.up_factors
    d_turned, active = steps.down_factors
    wanted = {"f8": (active, reference.turned(steps.active8))}
    wanted["d_v8"] = d_v, reference.turned(steps.d_v8)
    wanted["x8"] = x_turned, reference.turned(x8, size / scale)
    wanted["d_y8"] = d_turned, reference.turned(d_y8, size / scale)
    for name, copies in wanted.items():
        report.check(f"{len(x8):,} rows: {name} transposed", different(*copies), 0)
    return steps


def check_sums(report: Report, a8: Tensor, b8: Tensor) -> None:
    """Sums over tokens by cuBLAS, beside those in float32."""
    report.tell("tokens that are summed", a8.shape[1])
    wanted = a8.float() @ b8.float().mT
    for kind in ("fast", "exact"):
        found = cublas(a8, b8, kind)
        report.check(f"d_up by cuBLAS, {kind}: error", relative(found, wanted), 0.02)
        short = 1 - (found.double() * wanted).sum() / wanted.double().square().sum()
        report.check(f"d_up by cuBLAS, {kind}: too small by", abs(float(short)), 0.02)


def cublas(a8: Tensor, b8: Tensor, kind: str) -> Tensor:
    """a8 b8^T in float32, as scaled_product() has it ("fast") or with exact sums."""
    one = torch.ones((), device=DEVICE)
    options = {"out_dtype": torch.float32, "use_fast_accum": kind == "fast"}
    return torch._scaled_mm(a8, b8.mT, scale_a=one, scale_b=one, **options)


def layer(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A layer's MLP but for constants, with the norm in front."""
    x8, factor = t.float8_norm(x)
    return t.float8_mlp(x, x8, factor, up, down)[0]


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
    """A layer's beside float32's."""
    exact = gradients(functools.partial(unrounded_layer, case), case, torch.float32)
    found = gradients(layer, case, DTYPE)
    for name, x, wanted in zip(("d x", "d up", "d down"), found, exact, strict=True):
        report.check(f"gradients in 8 bits: {name}", relative(x, wanted), 0.1)


# ============
# Times
#
# Every call is one CUDA graph: launches by the host would hide what 0.05 ms are.


def time_operators(report: Report, steps: Steps) -> None:
    """The operators, products and rounding of weights included; and parts of the second."""
    report.time("forward", functools.partial(t.float8_mlp, *steps.forward))
    report.time("backward", functools.partial(t.float8_mlp_backward, *steps.backward))
    _, x8, size, (_, scale), _ = steps.backward
    report.time("sizes of rows together", functools.partial(t.turn_scale, size))
    report.time("x8 transposed", functools.partial(t.turned_rows, x8, size, scale))
    for name, factors in (("d_up", steps.up_factors), ("d_down", steps.down_factors)):
        for kind in ("fast", "exact"):
            report.time(f"{name} by cuBLAS, {kind}", functools.partial(cublas, *factors, kind))
        # Tokens before columns, as activations lie.
        a, b = (x8.mT.to(torch.bfloat16).contiguous() for x8 in factors)
        report.time(f"{name} by bfloat16", functools.partial(torch.mm, a.mT, b))


def time_layer(report: Report, case: Case) -> None:
    """Forward and backward of a layer, compiled."""
    leaves = [x.detach().requires_grad_() for x in (case.x, *case[2:])]
    compiled = torch.compile(layer, fullgraph=True)
    report.time("a layer", lambda: torch.autograd.grad(compiled(*leaves), leaves, case.d_y))


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
    check_sums(report, *steps.up_factors)
    check_gradients(report, case)
    time_operators(report, steps)
    time_layer(report, case)
    report.tell("failed checks", report.failures)
    return int(report.failures > 0)


if __name__ == "__main__":
    sys.exit(run_command("bench.weight_gradients", main, UserError, t.UserError))

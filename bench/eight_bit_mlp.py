"""Times tools/ideas/eight_bit_mlp.py's products on an H100 or H200, beside the script's.

    python -m bench.eight_bit_mlp [--rows 65536] [--tiles wide,pair8]

A line for each, as soon as it is known: milliseconds (of a CUDA graph), and of 8-bit products the
relative error beside the formula that rounds alike, and beside bfloat16 without rounding. What
fails says why, and the others go on. Sizes are PRESET=short's; numbers are random, rows of several
sizes.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m bench.eight_bit_mlp",
        file=sys.stderr,
    )
    sys.exit(2)

import train_gpt as t
from bench import bench
from tools.command import Parser, need, run_command
from tools.ideas import eight_bit_mlp as idea

WIDTH = 512
HIDDEN = 2048
PROJECTED = 2240  # in_proj's results
# Parts of IDEA_EIGHT_PARTS: what forward and backward are timed with.
FORWARD = "forward,down"
BACKWARD = "forward,down,backward,input"
CHECKED = 4096  # rows that formulas compute in float32


def attempt(name: str, measure: Callable, *arguments) -> None:
    """Prints what measure(*arguments) tells, or why it fails."""
    try:
        told = measure(*arguments) or ""
    except Exception as error:  # of any kind: the other figures are worth having
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        told = f"failed: {lines[0][:300]}"
    print(f"{name:44} {told}", flush=True)


def timed(call: Callable) -> str:
    """Milliseconds of a call."""
    replay, problem = bench.captured(call)
    return f"{bench.milliseconds(replay, 0.1):8.4f} ms{f' ({problem})' if problem else ''}"


def error_of(found: Tensor, wanted: Tensor) -> str:
    """The relative error of some rows, and how many numbers are not finite."""
    found = found[: len(wanted)].float()
    relative = float((found - wanted.float()).norm() / wanted.float().norm())
    broken = int((~found.isfinite()).sum())
    return f"{relative:.5f}{f', {broken} not finite' if broken else ''}"


class Case:
    """Random tensors of a layer, and what the script and the idea make of them.

    Rows have sizes from 1 to 2.7, and gradients are as small as those of a mean over a batch. The
    matrices keep the size of what they multiply, as at the begin of training.
    """

    def __init__(self, rows: int):
        torch.manual_seed(0)
        device = torch.device("cuda")
        shape = rows, WIDTH
        sizes = torch.rand(2, rows, 1, device=device).exp()
        x = torch.randn(shape, device=device) * sizes[0]
        self.x = x.bfloat16()
        self.d_y = (1e-6 * torch.randn(shape, device=device) * sizes[1]).bfloat16()
        self.up = torch.randn(HIDDEN, WIDTH, device=device) / WIDTH**0.5
        self.down = torch.randn(WIDTH, HIDDEN, device=device) / HIDDEN**0.5
        self.up16 = self.up.bfloat16()
        self.down16 = self.down.bfloat16()
        self.x8, self.factor = idea.rounded_norm(self.x)
        self.in_proj = torch.randn(PROJECTED, WIDTH, device=device) / WIDTH**0.5
        self.d_y8, self.size = idea.rounded_rows(self.d_y)

    def forward(self, parts: str) -> list[Tensor]:
        """eight_mlp()'s results: y, then those that KEPT_NAMES names."""
        weights = self.up, self.down
        return idea.eight_mlp(self.x, self.x8, self.factor, *weights, 1.0, parts)

    def backward(self, kept: list[Tensor], parts: str) -> list[Tensor]:
        """eight_mlp_backward()'s results, from eight_mlp()'s but y."""
        active, signs, active8, scalars, _, up8_turned, _, down8_turned = kept
        row_factor = self.size * scalars[int(idea.DOWN)] * self.factor
        read = active8 if "slope" in parts else active
        tensors = (active, signs, read, scalars, down8_turned, up8_turned)
        return idea.eight_mlp_backward(self.d_y8, row_factor, *tensors, parts)


def time_script(case: Case) -> None:
    """The script's products in bfloat16."""
    factor = case.factor
    up = case.up16
    down = case.down16
    _, active, signs = t.fused_mlp(case.x, factor, up, down)
    d_v = t.fused_mlp_backward(case.d_y, factor, down, active, signs)
    in_proj = case.in_proj.bfloat16()
    calls = {
        "forward and down": (t.fused_mlp, case.x, factor, up, down),
        "down": (torch.mm, active, down.mT),
        "backward": (t.fused_mlp_backward, case.d_y, factor, down, active, signs),
        "input": (torch.mm, d_v, up),
        "weight's gradient": (torch.mm, d_v.mT, case.x),
        "in_proj": (torch.mm, case.x, in_proj.mT),
    }
    for name, call in calls.items():
        attempt(f"bfloat16: {name}", timed, functools.partial(*call))


def check_errors(case: Case) -> None:
    """Errors of the idea's kernels, with their default tiles, on the first rows.

    Beside the formula that rounds alike, some 0.002 is the rounding of results to bfloat16, and of
    8-bit results 0.01: sums in another order end on the other side of a limit now and then. Beside
    bfloat16, it is 8-bit floats' own: 0.02 to 0.06.
    """
    rows = slice(CHECKED)
    given = case.x[rows], case.up, case.down, case.d_y[rows], 1.0
    rounded = idea.eight_mlp_by_formula(*given)
    _, active, signs = t.fused_mlp(case.x, case.factor, case.up16, case.down16)
    d_v = t.fused_mlp_backward(case.d_y, case.factor, case.down16, active, signs)
    plain = {"y": active[rows] @ case.down16.mT, "d_v": d_v[rows], "d_x": d_v[rows] @ case.up16}
    y, *kept = case.forward(BACKWARD)
    d_v, d_x = case.backward(kept, BACKWARD)
    scalars = kept[3]
    # Operators leave these factors to who reads their results.
    found = {"y": y, "active": kept[0] * scalars[int(idea.ACTIVE)], "active8": kept[2]}
    found |= {"d_v": d_v, "d_x": d_x * (case.size * case.factor).unsqueeze(1)}
    for beside, all_wanted in (("rounded", rounded), ("bfloat16", plain)):
        for name, wanted in all_wanted.items():
            attempt(f"error of {name}, beside {beside}", error_of, found[name], wanted)


def time_products(case: Case) -> None:
    """Roundings and torch._scaled_mm, in both kinds of sums."""
    _, *kept = case.forward(BACKWARD)
    active8, scalars, up8, up8_turned, down8, _ = kept[2:]
    # Any scales take the same time: these are 1.
    one = scalars[int(idea.ONE)]
    in_proj8 = case.in_proj.to(idea.EIGHT)
    factors = {
        "down": (active8, down8),
        "input": (active8, up8_turned),
        "in_proj": (case.x8, in_proj8),
        "up, without epilogue": (case.x8, up8),
    }
    for exact in (False, True):
        os.environ["IDEA_EIGHT_EXACT"] = str(int(exact))
        how = ", exact sums" if exact else ""
        for name, pair in factors.items():
            call = functools.partial(idea.scaled_product, *pair, one, one, torch.bfloat16)
            attempt(f"8 bits: {name}{how}", timed, call)
    os.environ["IDEA_EIGHT_EXACT"] = "0"
    both = case.up, case.down, torch.bfloat16, 1.0
    attempt("round both weights", timed, functools.partial(idea.weights_in_eight, *both))
    rows = {"norm": (idea.rounded_norm, case.x), "gradient": (idea.rounded_rows, case.d_y)}
    for name, (function, x) in rows.items():
        call = functools.partial(torch.compile(function, dynamic=False), x)
        attempt(f"round rows by inductor: {name}", timed, call)


def time_forward(case: Case, parts: str) -> str:
    """Milliseconds of eight_forward by itself."""
    _, *kept = case.forward(BACKWARD)
    found = dict(zip(idea.KEPT_NAMES, kept, strict=True))
    # As eight_mlp() launches it, but for the weights, which are rounded already.
    rounds = "down" in parts
    named = found | {"x8": case.x8, "active_map": found["active"]}
    blocks = {"x8": ("M", "STEP"), "up8": ("N", "STEP"), "active_map": ("M", "PART")}
    blocks |= {"active8": ("M", "PART")}
    named["active8"] = found["active8"] if rounds else None
    arguments = idea.eight_forward, named, WIDTH, blocks, rounds
    return timed(functools.partial(idea.launch_eight, *arguments))


def time_backward(case: Case, parts: str) -> str:
    """Milliseconds of eight_backward by itself, without the product behind it."""
    _, *kept = case.forward(BACKWARD)
    # The operator has the product behind it, which is another kernel: here it gives anything.
    scaled_product = idea.scaled_product
    idea.scaled_product = lambda *rest: case.x
    try:
        return timed(functools.partial(case.backward, kept, parts))
    finally:
        idea.scaled_product = scaled_product


def time_tiles(case: Case, names: list[str]) -> None:
    """The kernels with each of these tilings; the other kernel keeps its own.

    A tiling that needs more shared memory than a program may have fails, and that is told.
    """
    forward, backward = idea.DEFAULT_TILES.split(",")
    for name in names:
        os.environ["IDEA_EIGHT_TILES"] = f"{name},{backward}"
        for parts in (FORWARD, "forward"):
            attempt(f"8 bits: {parts}; {name}", time_forward, case, parts)
        os.environ["IDEA_EIGHT_TILES"] = f"{forward},{name}"
        for parts in (BACKWARD, f"{BACKWARD},slope", "forward,down,backward"):
            told = parts.removeprefix("forward,down,")
            attempt(f"8 bits: {told}; {name}", time_backward, case, parts)


def main(arguments: list[str] | None = None) -> int:
    """Measures all, in the order of their use."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65_536, help="tokens of a step (65536)")
    parser.add_argument("--tiles", default=",".join(idea.TILES), help="names of TILES (all)")
    given = parser.parse_args(arguments)
    names = given.tiles.split(",")
    need(set(names) <= set(idea.TILES), f"--tiles should be of {', '.join(idea.TILES)}")
    need(torch.cuda.is_available(), "needs a GPU")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    case = Case(given.rows)
    attempt("the script's products are measured", time_script, case)
    attempt("errors are measured", check_errors, case)
    attempt("the idea's products are measured", time_products, case)
    attempt("tiles are measured", time_tiles, case, names)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("bench.eight_bit_mlp", main, t.UserError))

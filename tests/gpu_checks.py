"""Checks that need a CUDA GPU; where mamba_ssm is installed, of its scan too.

    python -m tests.gpu_checks                       # all
    python -m tests.gpu_checks scans graphs-gptq     # these: a part, or all that begin so
    python -m tests.gpu_checks --list                # names, and about how long each takes

Compares every fast path with its slow reference, on fresh random inputs, by norm-relative error;
and runs a small model with every newer setting and the presets of published systems to a score, a
T4's way of training beside bfloat16's, and PRESET=laptop in 8 GB. Says first what it will run.
Prints a table and exits with status 1 if a row fails.

Each part is a process of its own, which fails if it takes longer than --limit, two minutes. Parts
mostly wait for compilers, so --jobs of them run side by side; those that measure time come last and
have the GPU to themselves.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m tests.gpu_checks", file=sys.stderr
    )
    sys.exit(2)

import train_gpt as t
from bench.bench import RandomBatches, SilentLog
from reference import float8_products, mamba_ssm_operator
from reference.scan_cases import ScanCase, errors, in_two_calls, random_case, results
from tests.support import newton_schulz, random_model, relative, stream_of, validation_set
from tools.command import Parser, UserError, run_command

BF16_TOLERANCE = 2e-2  # bf16 operands leave 1e-3 to 1e-2; the library also rounds angles to bf16
DEVICE = torch.device("cuda")
ALONE = t.Ranks(0, 1, DEVICE)
failures = 0


def check(name: str, error: float, tolerance: float) -> None:
    """Prints one row and remembers a failure; NaN fails."""
    global failures
    good = error <= tolerance
    failures += not good
    print(
        f"{'ok  ' if good else 'FAIL'} {name:70} {error:.2e} (at most {tolerance:.0e})", flush=True
    )


def check_errors(label: str, off: dict[str, float], tolerance: float) -> None:
    """Two rows: the worst of outputs and final states, and the worst gradient, which may be three
    times as far off.
    """
    for gradient in (False, True):
        part = {name: error for name, error in off.items() if name.startswith("d ") == gradient}
        worst = max(
            part, key=lambda name: part[name] if part[name] == part[name] else torch.inf
        )  # NaN is worst
        check(
            f"{label}: worst {'gradient' if gradient else 'output'} ({worst})",
            part[worst],
            (1 + 2 * gradient) * tolerance,
        )


def fused_scan(projected, parameters, sizes, document_start, state, chunk_size: int = 64):
    return t.mamba_scan(projected, parameters, sizes, document_start, state, "triton", chunk_size)


def library_scan(projected, parameters, sizes, document_start, state):
    inputs = t.scan_inputs(projected, parameters, sizes, document_start)
    y, state = mamba_ssm_operator.mamba_ssm_scan(inputs, state, 64)
    y = y.flatten(2)
    return y, y.float().square().mean(-1), state


chunked_scan = functools.partial(t.mamba_scan, backend="chunked", chunk_size=64)


def scan_cases() -> dict[str, ScanCase]:
    """Each new combination of sizes and switches costs seconds of compilation, hence the
    few cases.
    """
    starts = (0, 63, 64, 65, 200, 332)
    return {
        "16 heads of 64, state 64": random_case(2, 512, 16, 64, 64, device=DEVICE),
        "16 heads of 64, state 64, odd length, documents, carried": random_case(
            2, 333, 16, 64, 64, starts=starts, carried=True, device=DEVICE
        ),
        "4 heads of 64, state 128, all rotate, carried": random_case(
            1, 256, 4, 64, 128, rope_fraction=1.0, carried=True, device=DEVICE
        ),
    }


def check_pointers() -> None:
    """The scan as on GPUs without instructions for tiles, whose kernels go by pointers: against
    chunks in float64, and against the same kernels with descriptors.
    """
    narrow, wide = torch.bfloat16, torch.float32
    limits = t.kernel_limits
    if not t.has_tile_instructions(DEVICE):
        print("skip descriptors: this GPU has none, and `scans` goes by pointers")
        return
    for name, case in scan_cases().items():
        described = results(fused_scan, case, narrow, wide)
        t.kernel_limits = lambda device: (89, 101_376)
        found, again = (results(fused_scan, case, narrow, wide) for _ in range(2))
        t.kernel_limits = limits
        label = f"fused, tiles by pointers, {name}"
        off = errors(found, results(chunked_scan, case, torch.float64))
        check_errors(label, off, BF16_TOLERANCE)
        check_errors(f"{label}, against descriptors", errors(found, described), BF16_TOLERANCE)
        different = [x for x in found if not torch.equal(found[x], again[x])]
        check(f"{label}: results whose bits differ in a second run", len(different), 0)


def check_scans() -> None:
    """The fused scan against chunks in float64, and against mamba_ssm's."""
    cases, chunked = scan_cases(), chunked_scan
    narrow, wide = torch.bfloat16, torch.float32
    for name, case in cases.items():
        expected = results(chunked, case, torch.float64)
        found, again = (results(fused_scan, case, narrow, wide) for _ in range(2))
        check_errors(f"fused, {name}", errors(found, expected), BF16_TOLERANCE)
        different = [x for x in found if not torch.equal(found[x], again[x])]
        check(f"fused, {name}: results whose bits differ in a second run", len(different), 0)
        if case.state is not None:
            found = results(in_two_calls(fused_scan, 192), case, narrow, wide)
            check_errors(f"fused in two calls, {name}", errors(found, expected), BF16_TOLERANCE)
        elif mamba_ssm_operator.is_installed():
            expected, found, library = (
                results(scan, case, *dtypes, from_state=False)
                for scan, *dtypes in (
                    (chunked, torch.float64),
                    (fused_scan, narrow, wide),
                    (library_scan, narrow, wide),
                )
            )
            check_errors(f"mamba_ssm, {name}", errors(library, expected), BF16_TOLERANCE)
            check_errors(f"fused against mamba_ssm, {name}", errors(found, library), BF16_TOLERANCE)
        else:
            print("skip mamba_ssm is not installed")
    small = random_case(1, 70, 2, 32, 32, starts=(5, 40), carried=True, device=DEVICE)
    found = results(functools.partial(fused_scan, chunk_size=32), small, torch.float32)
    check_errors(
        "fused, float32, 2 heads of 32", errors(found, results(chunked, small, torch.float64)), 1e-4
    )
    check_causality(cases["16 heads of 64, state 64"])


def check_causality(case: ScanCase) -> None:
    """Outputs must not depend on later tokens by a single bit."""
    parameters = t.MambaParameters(
        *(x.float() if isinstance(x, torch.Tensor) else x for x in case.parameters)
    )
    projected = case.projected.bfloat16()
    y, *_ = fused_scan(projected, parameters, case.sizes, None, None)
    for position in (62, 63, 64, 300):
        changed = torch.cat(
            [projected[:, : position + 1], projected[:, position + 1 :].flip(1)], dim=1
        )
        z, *_ = fused_scan(changed, parameters, case.sizes, None, None)
        different = (y != z)[:, : position + 1].sum()
        check(
            f"fused: outputs up to token {position} that depend on later tokens",
            float(different),
            0,
        )


def missing_library(version: int) -> str:
    """Why the fused scan of a Mamba cannot run here; empty if it can."""
    try:
        for library in t.LIBRARIES[version]:
            importlib.import_module(library)
    except ImportError as error:
        return str(error)
    return ""


def check_selective() -> None:
    """The first Mamba's scan in parallel, compiled as one graph, and fused where the libraries are
    installed, against the loop in float64; and the libraries' convolution against ours.
    """
    random = functools.partial(torch.randn, device=DEVICE, dtype=torch.float64)
    # Compilers unroll chunks and rounds: 1,000 tokens in chunks of 256 took them over five minutes.
    batch, length, channels, state = 2, 80, 768, 32
    tokens, narrow = functools.partial(random, batch, length), torch.bfloat16
    rates = -torch.arange(1.0, state + 1, device=DEVICE, dtype=torch.float64).repeat(channels, 1)
    tensors = (
        tokens(channels),
        tokens(channels),
        rates,
        tokens(state),
        tokens(state),
        random(channels),
        tokens(channels),
        random(channels) - 4,
    )
    names = ("x", "step", "A", "B", "C", "D", "gate", "bias")
    weights = tokens(channels)

    def outputs(scan, cast) -> dict[str, torch.Tensor]:
        leaves = [cast(x).requires_grad_() for x in tensors]
        y, _ = scan(leaves)
        gradients = torch.autograd.grad(y, leaves, weights.to(y.dtype))
        return {"y": y} | {
            f"d {name}": gradient for name, gradient in zip(names, gradients, strict=True)
        }

    def mixed(x: torch.Tensor) -> torch.Tensor:
        return x.to(narrow if x.dim() == 3 else torch.float32)

    scans = {
        backend: torch.compile(
            lambda tensors, backend=backend: t.selective_scan(tensors, None, None, backend, 32),
            fullgraph=True,
            dynamic=False,
        )
        for backend in ("parallel", "fused")
    }

    def exact(tensors):
        return t.selective_scan(tensors, None, None, "sequential", 256)

    expected = outputs(exact, lambda x: mixed(x).double())
    found = outputs(scans["parallel"], lambda x: mixed(x).float())
    check_errors(
        "selective scan, parallel, float32",
        {n: relative(x, expected[n]) for n, x in found.items()},
        1e-4,
    )
    found = outputs(scans["parallel"], mixed)
    off = {n: relative(x, expected[n]) for n, x in found.items()}
    check_errors("selective scan, parallel, bfloat16", off, BF16_TOLERANCE)
    if missing := missing_library(1):
        print(f"skip the fused selective scan: {missing}")
        return
    off = {n: relative(x, expected[n]) for n, x in outputs(scans["fused"], mixed).items()}
    check_errors("selective scan, fused, bfloat16", off, BF16_TOLERANCE)
    conv = t.ShortConv(channels, 4).to(DEVICE)
    x = tokens(channels).to(narrow).requires_grad_()
    leaves = (x, *conv.parameters())
    (ours, _), (theirs, _) = conv(x), conv(x, fused=True)
    check("causal_conv1d: y", relative(theirs, ours), BF16_TOLERANCE)
    pairs = (torch.autograd.grad(y, leaves, weights.to(narrow)) for y in (theirs, ours))
    for name, a, b in zip(("x", "weight", "bias"), *pairs, strict=True):
        check(f"causal_conv1d: d {name}", relative(a, b), BF16_TOLERANCE)


def attention_inputs(batch: int, length: int) -> list[torch.Tensor]:
    """Query of eight heads, key and value of four, 64 numbers each, in bfloat16."""
    return [
        torch.randn(batch, length, heads, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        for heads in (8, 4, 4)
    ]


def document_starts(batch: int, length: int) -> torch.Tensor:
    """Where documents as long as the contest's begin: 680 tokens in the mean, half of them under
    361.
    """
    spread = (2 * math.log(680 / 361)) ** 0.5
    lengths = torch.empty(batch * length // 100).log_normal_(math.log(361), spread)
    places = lengths.ceil().long().cumsum(0)
    start = torch.zeros(batch * length, dtype=torch.bool)
    start[places[places < len(start)]] = True
    return start.view(batch, length).to(DEVICE)


def runnable(backend: str, confined: bool) -> bool:
    """Whether attention can run so here; prints why not."""
    settings = t.Settings(attention_backend=backend, document_reset=confined)
    problem = "" if backend == "auto" else t.attention_problem(settings, DEVICE)
    if problem:
        print(f"absent attention {backend}{' in documents' * confined}: {problem}")
    return not problem


def check_mamba2() -> None:
    """Mamba-2's scan by chunks, and fused where mamba_ssm is installed, each compiled as one graph,
    against the loop in float64; then the milliseconds that forward and backward take at full size.
    """
    backends = ["chunked"]
    if missing := missing_library(2):
        print(f"skip the fused scan of Mamba-2: {missing}")
    else:
        backends.append("fused")
    sizes = t.MambaSizes(16, 64, 64, 0, 2)
    length = 300  # five chunks, which compilers unroll
    starts = torch.zeros(2, length, dtype=torch.bool, device=DEVICE)
    starts[1, [0, 63, 64, 65, 200, 277]] = True
    scans = {backend: mamba2_scan(sizes, backend) for backend in backends}
    for documents in (None, starts):
        leaves = mamba2_inputs(sizes, 2, length)
        exact = mamba2_scan(sizes, "sequential", compiled=False)
        expected = mamba2_results(exact, [x.double() for x in leaves], documents)
        for backend, scan in scans.items():
            found = mamba2_results(scan, leaves, documents)
            off = {name: relative(x, expected[name]) for name, x in found.items()}
            label = "" if documents is None else ", documents"
            check_errors(f"Mamba-2, {backend}{label}", off, BF16_TOLERANCE)
    leaves = mamba2_inputs(sizes, 256, 512)
    for backend, scan in scans.items():
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
        for mark in marks:
            mamba2_results(scan, leaves, None)
            mark.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(marks[1:], marks[2:], strict=False)]
        print(f"     Mamba-2, {backend}: {statistics.median(times):.2f} ms for 256 × 512 tokens")


MAMBA2_NAMES = ("projected", "step_bias", "skip", "decay_rate")


def mamba2_inputs(sizes: t.MambaSizes, batch: int, length: int) -> list[torch.Tensor]:
    """What a layer's scan has gradients of, by MAMBA2_NAMES."""
    normal = functools.partial(torch.randn, device=DEVICE)
    projected = normal(batch, length, sum(sizes.columns().values())).bfloat16()
    rates = -torch.linspace(1, 16, sizes.heads, device=DEVICE)
    return [projected, normal(sizes.heads) - 4, normal(sizes.heads), rates]


def mamba2_scan(sizes: t.MambaSizes, backend: str, compiled: bool = True):
    """y of projected, step bias, skip, decay rate and document starts."""

    def scan(projected, step_bias, skip, decay_rate, starts):
        no_bias = torch.zeros_like(skip).unsqueeze(1)
        learned = t.MambaParameters(step_bias, skip, no_bias, no_bias, decay_rate=decay_rate)
        return t.mamba_scan(projected, learned, sizes, starts, None, backend, 64)[0]

    return torch.compile(scan, fullgraph=True, dynamic=False) if compiled else scan


def mamba2_results(scan, tensors: list[torch.Tensor], starts) -> dict[str, torch.Tensor]:
    """y, and the gradients of one random weighting of it."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = scan(*leaves, starts)
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = torch.randn(y.shape, generator=generator, device=DEVICE).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, weights)
    named = zip(MAMBA2_NAMES, gradients, strict=True)
    return {"y": y.detach()} | {f"d {name}": x for name, x in named}


def check_attention() -> None:
    """Every backend, with and without documents, against the formula in float32."""
    for confined in (False, True):
        leaves, start = attention_inputs(2, 700), document_starts(2, 700)
        start[0, 300:303] = True
        documents = t.find_documents(start, "math") if confined else None
        exact = t.attend(*(x.float() for x in leaves), documents, "math")
        weights = torch.randn_like(leaves[0])
        expected = torch.autograd.grad(exact, leaves, weights.float())
        for backend in ("auto", "cudnn", "flash", "flex", "fa2", "fa3"):
            if (confined and backend == "auto") or not runnable(backend, confined):
                continue  # with documents, auto is flex
            documents = t.find_documents(start, backend) if confined else None
            y = t.attend(*leaves, documents, backend)
            gradients = torch.autograd.grad(y, leaves, weights)
            off = {"y": relative(y, exact)}
            for name, found, right in zip("qkv", gradients, expected, strict=True):
                off[f"d {name}"] = relative(found, right)
            label = f"attention ran by {backend}{' in documents' * confined}"
            check_errors(label, off, BF16_TOLERANCE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        t.attend(*attention_inputs(2, 512), None, "auto")
    print("auto's kernels:", [row.key[:80] for row in profile.key_averages()])


def attend_within(start, query, key, value, backend: str) -> torch.Tensor:
    """Attention within documents, found in the same graph."""
    return t.attend(query, key, value, t.find_documents(start, backend), backend)


def check_replayed_documents(backend: str) -> None:
    """Forward and backward as one compiled and captured graph, replayed with other documents."""
    leaves, start = attention_inputs(4, 1024), document_starts(4, 1024)
    weights = torch.randn_like(leaves[0])
    compiled = torch.compile(attend_within, fullgraph=True, dynamic=False)

    def both() -> tuple[torch.Tensor, ...]:
        y = compiled(start, *leaves, backend)
        return y, *torch.autograd.grad(y, leaves, weights)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = both()
    for mean in ("as before", "other", "none"):
        if mean != "as before":
            start.copy_(document_starts(4, 1024) & (mean == "other"))
        graph.replay()
        y = attend_within(start, *leaves, backend)
        eager = y, *torch.autograd.grad(y, leaves, weights)
        worst = max(relative(a, b) for a, b in zip(replayed, eager, strict=True))
        check(f"graph replayed, {backend}, documents {mean}", worst, 1e-2)


def milliseconds(function, repeats: int = 20) -> float:
    """Median time of a call on the GPU, once it is warm."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def time_attention() -> None:
    """Prints what documents save of attention at 2,048 tokens, forward and backward."""
    leaves, start = attention_inputs(32, 2048), document_starts(32, 2048)
    weights = torch.randn_like(leaves[0])
    compiled = torch.compile(attend_within, fullgraph=True, dynamic=False)
    whole = torch.compile(t.attend, fullgraph=True, dynamic=False)

    def timed(function, *arguments) -> float:
        return milliseconds(lambda: torch.autograd.grad(function(*arguments), leaves, weights))

    for backend in ("auto", "cudnn", "flash", "flex", "fa2", "fa3"):
        if runnable(backend, False):
            spent = timed(whole, *leaves, None, backend)
            print(f"     attention, 65,536 tokens, {backend}: {spent:.3f} ms")
    for backend in ("flex", "flash", "fa2", "fa3"):
        if runnable(backend, True):
            spent = timed(compiled, start, *leaves, backend)
            print(f"     attention, 65,536 tokens, {backend} in documents: {spent:.3f} ms")


def loss_milliseconds(settings: t.Settings, tokens: torch.Tensor) -> float:
    """Time of a new compiled model's loss and gradients of these tokens."""
    ranks = t.Ranks(0, 1, DEVICE)
    model = t.build_model(settings, ranks)
    loss, order = t.maybe_compile(model.loss, settings, ranks), model.order(True)
    return milliseconds(lambda: loss(tokens[:, :-1], tokens[:, 1:], order).backward())


def time_steps() -> None:
    """Prints a default model's loss and gradients of 65,536 tokens, with and without documents."""
    tokens = torch.randint(2, 8192, (32, 2049), device=DEVICE)
    tokens[:, :-1][document_starts(32, 2048)] = t.BOS_ID
    cases = {"no documents": {}, "scans alone reset": {"document_scope": "scans"}}
    cases |= {f"documents by {name}": {"attention_backend": name} for name in ("flex", "flash")}
    for label, changes in cases.items():
        settings = t.Settings(**t.PLAIN | {"document_reset": bool(changes)}, **changes)
        if "attention_backend" in changes and not runnable(settings.attention_backend, True):
            continue
        spent = loss_milliseconds(settings, tokens)
        print(f"     loss and gradients of 65,536 tokens, {label}: {spent:.2f} ms")


class DocumentBatches(RandomBatches):
    """Four batches in turn whose documents differ."""

    def __init__(self, settings: t.Settings, ranks: t.Ranks):
        super().__init__(settings, ranks)
        self.turn = []
        for _ in range(4):
            tokens = torch.randint_like(self.tokens, 2, settings.vocab_size)
            tokens[:, :-1][document_starts(*tokens[:, :-1].shape)] = t.BOS_ID
            self.turn.append(tokens)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.turn.append(self.turn.pop(0))
        self.tokens = self.turn[0]
        return super().next()


def check_replays() -> None:
    """Documents in graphs that were made before them."""
    for backend in ("flex", "flash", "fa2", "fa3"):
        if runnable(backend, True):
            check_replayed_documents(backend)


def check_document_steps(**overrides) -> None:
    """Graphed steps, each with other documents than the one before."""
    check_graphed_steps("gptq", DocumentBatches, document_reset=1, **overrides)


def check_optimizer() -> None:
    """Newton-Schulz steps in half precision against float64; singular values fall evenly, by as
    many powers of ten.
    """
    shapes, batches = ((512, 1536), (1536, 512), (512, 512), (256, 512)), []
    for powers in (0, 3, 5):
        for shape in shapes:
            u, _, v = torch.linalg.svd(torch.randn(2, *shape, device=DEVICE), full_matrices=False)
            batches.append(u * torch.logspace(0, -powers, u.shape[-1], device=DEVICE) @ v)
    for x, result in zip(
        batches, torch.compile(t.orthogonalize, fullgraph=True)(batches, 5), strict=True
    ):
        check(
            f"Newton-Schulz, {tuple(x.shape)}",
            relative(result, newton_schulz(x.double(), 5)),
            BF16_TOLERANCE,
        )


def mlp_results(function, case: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """y and the gradients of x, factor, up and down in this type, of factors float32 or more."""
    leaves = [x.to(dtype).requires_grad_() for x in case]
    wide = torch.promote_types(dtype, torch.float32)
    leaves[1] = case[1].to(wide).requires_grad_()
    y = function(*leaves[:4])
    return [y, *torch.autograd.grad(y, leaves[:4], leaves[4])]


def check_mlp() -> None:
    """The MLP's kernels against its formula, of the same bfloat16 numbers in float64; of whole
    tiles and of a rest.
    """

    def formula(x, factor, up, down):
        hidden = torch.nn.functional.leaky_relu((factor.unsqueeze(1) * x) @ up.mT, 0.5)
        return hidden.square() @ down.mT

    if not t.can_fuse_mlp(512, 2048, DEVICE):
        print("skip the MLP's kernels are for compute capability 9.0")
        return
    for rows in (16_384, 1_000):
        sizes = (rows, 512), (rows,), (2048, 512), (512, 2048), (rows, 512)
        case = [torch.randn(size, device=DEVICE).bfloat16() for size in sizes]
        case[1] = case[1].abs() + 0.1
        fused = functools.partial(mlp_results, case=case, dtype=torch.bfloat16)
        found, again = (fused(lambda *x: t.fused_mlp(*x)[0]) for _ in range(2))
        expected = mlp_results(formula, case, torch.float64)
        names = "y", "d x", "d factor", "d up", "d down"
        off = {n: relative(x, y) for n, x, y in zip(names, found, expected, strict=True)}
        check_errors(f"fused MLP, {rows:,} rows", off, BF16_TOLERANCE)
        different = sum(not torch.equal(x, y) for x, y in zip(found, again, strict=True))
        check(f"fused MLP, {rows:,} rows: results whose bits differ in a second run", different, 0)


def float8_results(function, x: torch.Tensor, weights: list, d_y: torch.Tensor) -> dict:
    """y, and the gradients of rows x, of norm's factor and of the matrices."""
    x8, factor = t.float8_norm(x)
    leaves = [a.detach().requires_grad_() for a in (x, factor, *weights)]
    y = function(leaves[0], x8, *leaves[1:])
    gradients = torch.autograd.grad(y, leaves, d_y.to(y.dtype))
    names = "d x", "d factor", "d up", "d down"
    return {"y": y} | dict(zip(names, gradients, strict=True))


def unrounded_mlp(size: torch.Tensor):
    """What float8_mlp() computes, in float32 and without rounding; size: up's root mean square."""
    size = size / t.WEIGHT_SIZE

    def formula(x, x8, factor, up, down):
        usual = t.WEIGHT_SIZE * x.shape[1] ** 0.5 * size
        hidden = torch.nn.functional.leaky_relu((factor.unsqueeze(1) * x) @ up.mT, 0.5)
        return hidden.square() @ down.mT * (size / (4 * usual**2))

    return formula


def float8_y(*arguments: torch.Tensor) -> torch.Tensor:
    """float8_mlp()'s y, without what it keeps."""
    return t.float8_mlp(*arguments)[0]


def check_float8_mlp(x, weights: list, d_y, exact: dict) -> None:
    """One layer's, with the gradients of its weights."""
    title = f"8-bit MLP, {len(x):,} rows"

    def reference_y(*arguments: torch.Tensor) -> torch.Tensor:
        return float8_products.float8_mlp(*arguments)[0]

    found, again = (float8_results(float8_y, x, weights, d_y) for _ in range(2))
    slow = float8_results(reference_y, x, weights, d_y)
    off = {name: relative(y, slow[name]) for name, y in found.items()}
    check_errors(f"{title}, beside its roundings", off, BF16_TOLERANCE)
    different = sum(not torch.equal(y, again[name]) for name, y in found.items())
    check(f"{title}: results whose bits differ in a second run", different, 0)
    for name, y in found.items():
        check(f"{title}, unrounded: {name}", relative(y, exact[name]), 0.1)


def check_float8() -> None:
    """Products of 8-bit floats beside their reference, which rounds alike: sums in another order
    end on the other side of a limit now and then. And beside unrounded ones: 2.6 % a rounding, of
    which there are three or four on the way to a result. Then a small model's gradients.
    """
    if not t.can_fuse_mlp(512, 2048, DEVICE):
        print("skip products of 8-bit floats are for compute capability 9.0")
        return
    normal = functools.partial(torch.randn, device=DEVICE)
    weights = [normal(2048, 512) / 512**0.5, normal(512, 2048) / 2048**0.5]
    for rows in (16_384, 1_000):
        x, d_y = (normal(2, rows, 512) * normal(2, rows, 1).exp()).bfloat16()
        unrounded = unrounded_mlp(weights[0].square().mean().sqrt())
        exact = float8_results(unrounded, x.float(), weights, d_y)
        check_float8_mlp(x, weights, d_y, exact)
    in_proj = normal(2240, 512) / 512**0.5
    u = t.norm(x)
    found = t.float8_linear(u.unsqueeze(0), in_proj)[0]
    u8 = t.to_float8(u.float() * t.row_scale(512), u.dtype)
    slow = float8_products.float8_rows(u, u8, in_proj)
    check("8-bit in_proj beside its roundings", relative(found, slow), 5e-3)
    check("8-bit in_proj unrounded", relative(found, u.float() @ in_proj.mT), 0.05)
    check_float8_model()


class Float8Steps(NamedTuple):
    """What a layer's forward and backward have on the way, by the script's names."""

    x8: torch.Tensor  # (T, width)
    d_y8: torch.Tensor  # likewise
    row_size: torch.Tensor  # (T,), by which both are multiplied as they are transposed
    active8: torch.Tensor  # (T, HIDDEN), f8 as it stands
    d_v8: torch.Tensor  # likewise
    up_factors: tuple[torch.Tensor, torch.Tensor]  # d_v8 and x8, transposed
    down_factors: tuple[torch.Tensor, torch.Tensor]  # d_y8 and f8, transposed


@contextlib.contextmanager
def products_seen():
    """A list of both factors of scaled_product()'s calls: operators keep them to themselves."""
    usual = t.scaled_product
    seen = []

    def watched(a8: torch.Tensor, b8: torch.Tensor, *others):
        seen.append((a8, b8))
        return usual(a8, b8, *others)

    t.scaled_product = watched
    try:
        yield seen
    finally:
        t.scaled_product = usual


def float8_steps(x: torch.Tensor, weights: list, d_y: torch.Tensor) -> Float8Steps:
    """A layer's operators one after another."""
    x8, factor = t.float8_norm(x)
    d_y8, size = t.float8_gradient(d_y)
    scale = t.turn_scale(size)
    with products_seen() as seen:
        _, *kept = t.float8_mlp(x, x8, factor, *weights)
        t.float8_mlp_backward(d_y8, x8, size, [scale / 4, scale], kept)
    (active8, _), (d_v8, _), up_factors, down_factors = seen
    return Float8Steps(x8, d_y8, size / scale, active8, d_v8, up_factors, down_factors)


def check_copies(title: str, steps: Float8Steps) -> None:
    """Factors that are stored plain and transposed: rounded from the same numbers, they have to
    agree bit for bit. ptxas of CUDA 12.8 and 12.9 may spoil 8-bit floats.
    """
    d_v, x_turned = steps.up_factors
    d_turned, active = steps.down_factors
    turned = float8_products.turned
    copies = {"f8": (active, turned(steps.active8)), "d_v8": (d_v, turned(steps.d_v8))}
    copies["x8"] = x_turned, turned(steps.x8, steps.row_size)
    copies["d_y8"] = d_turned, turned(steps.d_y8, steps.row_size)
    for name, (found, wanted) in copies.items():
        different = found.view(torch.uint8) != wanted.view(torch.uint8)
        check(f"{title}: {name} transposed, bytes that differ", float(different.sum()), 0)


def check_sums(title: str, a8: torch.Tensor, b8: torch.Tensor) -> None:
    """Sums over tokens beside float32's of the same factors, so that only how they are added up
    shows: tensor cores cut fast sums of 8-bit factors, by 0.7 % here, which become too small.
    """
    one = torch.ones((), device=DEVICE)
    found = t.scaled_product(a8, b8, one, one, torch.float32)
    wanted = a8.float() @ b8.float().mT
    check(f"{title}: error", relative(found, wanted), 0.002)
    part = (found.double() * wanted).sum() / wanted.double().square().sum()
    check(f"{title}: too small by", abs(float(1 - part)), 0.0003)


def check_weight_gradients(
    counts=(1_000, 65_536), width: int = 512, hidden: int = 2_048, dtype=torch.bfloat16
) -> None:
    """Gradients of the MLP's weights by 8-bit factors, which are sums over so many tokens: their
    factors, the sums alone, and all of a layer beside what rounds nothing.

    Rows' gradients are as small as a mean over a batch makes them, of sizes some powers of two
    apart; in 1,000 rows the last tile has a rest.
    """
    if not t.can_fuse_mlp(width, hidden, DEVICE):
        print("skip products of 8-bit floats are for compute capability 9.0")
        return
    normal = functools.partial(torch.randn, device=DEVICE)
    weights = [normal(hidden, width) / width**0.5, normal(width, hidden) / hidden**0.5]
    for rows in counts:
        title = f"8-bit weight gradients, {rows:,} tokens"
        x = (normal(rows, width) * normal(rows, 1).exp()).to(dtype)
        d_y = (1e-6 * normal(rows, width) * normal(rows, 1).exp()).to(dtype)
        steps = float8_steps(x, weights, d_y)
        check_copies(title, steps)
        check_sums(title, *steps.up_factors)
        unrounded = unrounded_mlp(weights[0].square().mean().sqrt())
        exact = float8_results(unrounded, x.float(), weights, d_y)
        for name, found in float8_results(float8_y, x, weights, d_y).items():
            check(f"{title}, unrounded: {name}", relative(found, exact[name]), 0.1)


def check_float8_model() -> None:
    """A compiled model's loss and gradients with 8-bit products, beside those without."""
    settings = model_settings(model_dim=512, float8_products="mlp,in_proj")
    model = changed_model(settings)
    problem = t.why_not_float8(model, settings.float8_products, DEVICE)
    check(f"8-bit products of a small model can run {problem}", bool(problem), 0)
    tokens = torch.randint(2, 1024, (8, settings.train_seq_len + 1), device=DEVICE)
    compiled = t.maybe_compile(model.loss, settings, ALONE)
    losses, gradients = [], []
    for products in ("none", settings.float8_products):
        loss = compiled(tokens[:, :-1], tokens[:, 1:], model.order(True), products)
        losses.append(loss.detach())
        found = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(factors_together(model, found))
    check("8-bit products, a small model: loss", relative(losses[1], losses[0]), 5e-3)
    usual, flat = (torch.cat([x.flatten().float() for x in each.values()]) for each in gradients)
    check("8-bit products, a small model: all gradients", relative(flat, usual), 0.2)
    usual, found = gradients
    off = {name: relative(found[name], x) for name, x in usual.items() if x.norm() > 1e-6}
    worst = max(off, key=off.get)
    check(f"8-bit products, a small model: worst gradient ({worst})", off[worst], 0.4)


def factors_together(model, gradients: tuple) -> dict[str, torch.Tensor]:
    """Gradients by parameters' names; of those of three numbers or fewer, one vector.

    Each of these numbers multiplies whole activations (bigram_scale, residual_mix): its gradient
    sums over all tokens and channels what nearly cancels, and what is left of one alone may be
    smaller than what rounding makes of the terms.
    """
    names = (name for name, _ in model.named_parameters())
    found = dict(zip(names, gradients, strict=True))
    single = [name for name, x in found.items() if x.numel() <= 3]
    factors = torch.cat([found.pop(name).flatten() for name in single])
    return found | {"factors of activations": factors}


def model_settings(**overrides) -> t.Settings:
    """Of a small model with every kind of block."""
    environment = {
        "NUM_LAYERS": "4",
        "MAMBA_LAYERS": "0,1,3",
        "MODEL_DIM": "256",
        "NUM_HEADS": "4",
        "NUM_KV_HEADS": "2",
        "TRAIN_SEQ_LEN": "512",
        "LAYER_ORDER": "0-2,1-3",
        "VOCAB_SIZE": "1024",
        "RECUR_START": "0",
        "MASK_IMPOSSIBLE_PAIRS": "0",  # which asks for a tokenizer, as does the next
        "SPELLING_FEATURES": "0",
    }
    settings, _ = t.read_settings(environment | {k.upper(): str(v) for k, v in overrides.items()})
    t.validate_settings(settings, 1)
    return settings


@torch.no_grad()
def changed_model(settings: t.Settings) -> t.Model:
    """A model on the GPU whose blocks say something: new ones have output matrices of zeros."""
    with torch.enable_grad():  # choosing an attention backend runs one backward
        model = t.build_model(settings, ALONE)
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))
    return model


def check_model(**overrides) -> None:
    """A compiled model (one whole graph) against the same weights in float32 on the CPU with the
    chunked scan.
    """
    settings = model_settings(**overrides)
    gpu = changed_model(settings)
    slow = "parallel" if settings.mamba_version == 1 else "chunked"
    cpu_settings = dataclasses.replace(settings, scan_backend=slow)
    cpu = t.build_model(cpu_settings, t.Ranks(0, 1, torch.device("cpu")))
    cpu.load_state_dict({k: v.cpu() for k, v in gpu.state_dict().items()})
    length = settings.train_seq_len
    tokens = torch.randint(2, 1024, (4 * 512 // length, length + 1))
    tokens[:, ::40] = t.BOS_ID
    label = " ".join(f"{k}={v}" for k, v in overrides.items()) or "default blocks"
    compiled = t.maybe_compile(gpu.loss, settings, t.Ranks(0, 1, DEVICE))
    for recurrent in (False, True):
        order = gpu.order(recurrent)
        loss = compiled(tokens[:, :-1].to(DEVICE), tokens[:, 1:].to(DEVICE), order)
        loss.backward()
        reference = cpu.loss(tokens[:, :-1], tokens[:, 1:], order)
        reference.backward()
        check(
            f"fullgraph model, {label}, recurrent={recurrent}: loss",
            relative(loss.cpu(), reference),
            5e-3,
        )
    worst = max(
        (relative(p.grad.cpu(), q.grad), n)
        for (n, p), q in zip(gpu.named_parameters(), cpu.parameters(), strict=True)
        if q.grad.norm() > 1e-6
    )
    check(f"fullgraph model, {label}: worst gradient ({worst[1]})", worst[0], 0.15)
    forward = t.maybe_compile(gpu.forward, settings, t.Ranks(0, 1, DEVICE))
    with torch.no_grad():
        order, tokens = gpu.order(True), tokens[:, :-1]
        off = relative(forward(tokens.to(DEVICE), order).float().cpu(), cpu(tokens, order))
    check(f"fullgraph forward, {label}", off, 2e-2)


def check_micro_batches() -> None:
    """The gradients of as many tokens as are ever computed at once against those of quarters: a
    place in memory that takes more than 31 bits would be another one, and show in no smaller batch.
    """
    most = t.MOST_TOKENS_AT_ONCE[3]
    environment = {
        "PRESET": "peer7",
        "NUM_LAYERS": "3",
        "MAMBA_LAYERS": "0,2",
        "FLOAT8_PRODUCTS": "auto",
        "MASK_IMPOSSIBLE_PAIRS": "0",  # which asks for a tokenizer
    }
    settings, _ = t.read_settings(environment)
    model = changed_model(settings)
    length = settings.train_seq_len
    tokens = torch.randint(2, settings.vocab_size, (most // length, length + 1), device=DEVICE)
    tokens[:, ::700] = t.BOS_ID
    float8 = t.choose_float8(model, settings, DEVICE)
    for products in dict.fromkeys((float8, "none")):
        label = f"products in 8 bits: {products}"
        check_quarters(label, model, tokens, model.loss, products, BF16_TOLERANCE)
    # Compiled, numbers are rounded to bfloat16 in other places for each shape. In 8 bits that alone
    # changes some gradients by as much as the 8 bits do, so that nothing could be told from it.
    compiled = t.maybe_compile(model.loss, settings, ALONE)
    check_quarters("compiled", model, tokens, compiled, "none", 0.15)


def check_quarters(
    label: str, model: t.Model, tokens: torch.Tensor, loss, float8: str, tolerance: float
) -> None:
    """The gradients of all tokens at once against those of quarters, one after another."""

    def gradients(parts: int) -> list[torch.Tensor]:
        model.zero_grad()
        for part in tokens.chunk(parts):
            (loss(part[:, :-1], part[:, 1:], model.order(False), float8) / parts).backward()
        return [p.grad.clone() for p in model.parameters()]

    off = map(relative, gradients(1), gradients(4))
    worst, name = max(zip(off, dict(model.named_parameters()), strict=True))
    check(f"{len(tokens)} sequences at once, {label} ({name})", worst, tolerance)


@torch.no_grad()
def check_generation(**overrides) -> None:
    """Steps against the full forward, and a generation's CUDA graph against the same steps without
    one.
    """
    settings = model_settings(**overrides)
    model = changed_model(settings)
    tokens = torch.randint(2, 1024, (8, 64), device=DEVICE)
    tokens[:, ::20] = t.BOS_ID
    order = model.order(True)
    state = model.begin(len(tokens), order)
    hidden = [model.step(token, order, state) for token in tokens.split(1, dim=1)]
    label = " ".join(f"{k}={v}" for k, v in overrides.items()) or "default blocks"
    off = relative(torch.cat(hidden, dim=1).float(), model(tokens, order).float())
    check(f"one token at a time, {label}", off, BF16_TOLERANCE)
    drawn, usual = [], t.EAGER_STEPS
    for t.EAGER_STEPS in (usual, len(tokens[0]) + 1000):
        generator = torch.Generator(DEVICE).manual_seed(0)
        drawn.append(t.generate(model, tokens, 64, 0.8, 0.95, generator))
    t.EAGER_STEPS = usual
    other = (drawn[0] != drawn[1]).float().mean()
    check(f"generation by graph, {label}: other tokens", float(other), 0)


def time_generation() -> None:
    """How long a step of 64 texts of the default model takes."""
    settings, _ = t.read_settings({"MASK_IMPOSSIBLE_PAIRS": "0"})
    model = t.build_model(settings, t.Ranks(0, 1, DEVICE))
    tokens = torch.full((64, 1), t.BOS_ID, device=DEVICE)
    t.generate(model, tokens, 8)  # loads what the first call needs
    started = t.synchronized_time()
    t.generate(model, tokens, 512)
    took = 1000 * (t.synchronized_time() - started) / 512
    print(f"     generation, 64 texts, default model: {took:.2f} ms a token of each")


# Of documents' tokens: longer than a window, whole windows and pieces, some alike, one token.
DOCUMENT_LENGTHS = (300, 257, 200, 129, 128, 128, 100, 65, 64, 33, 32, 31, 17, 17, 9, 5, 2, 1)


def document_models(**overrides) -> tuple[t.Model, t.Model]:
    """A model in bfloat16, and with the same weights one in float32 on the CPU, by the formula."""
    sizes = {"train_seq_len": 128, "mlp_mult": 3, "ttt_lora_piece": 32, "ttt_lora_slots": 16}
    chosen = {"eval_mode": "documents", "ttt_lora_lr": 2.5e-3} | sizes | overrides
    settings = model_settings(precision="bfloat16", **chosen)
    exact = {"scan_backend": "chunked", "attention_backend": "math", "precision": "float32"}
    reference = random_model(dataclasses.replace(settings, **exact))
    model = t.build_model(settings, t.Ranks(0, 1, DEVICE))
    model.load_state_dict(reference.state_dict())
    return model, reference


def document_surprise(model: t.Model, tokens: np.ndarray, observer=None, **changes):
    """Nats of a stream's targets by EVAL_MODE=documents, less those of a guess; float64, (N,)."""
    settings = dataclasses.replace(model.settings, **changes)
    ranks = t.Ranks(0, 1, model.rotary_table.device)
    evaluator = t.Evaluator(model, settings, ranks, validation_set(tokens), observer=observer)
    return torch.from_numpy(evaluator.evaluate().nats).double() - math.log(settings.vocab_size)


class AttentionWatch(t.EvaluationObserver):
    """Hears which attention a model has while it reads documents."""

    def __init__(self, model: t.Model):
        self.model = model
        self.backends = []

    def on_read(self, excerpt: t.Excerpt):
        """As an EvaluationObserver."""
        self.backends.append(self.model.attention_backend)


class MemoryWatch(t.EvaluationObserver):
    """Hears how many documents there is room for."""

    def __init__(self):
        self.rows = []

    def on_short_memory(self, rows: int):
        """As an EvaluationObserver."""
        self.rows.append(rows)


class ProductWatch(TorchDispatchMode):
    """Counts backward passes of the fused MLP, and products that have the shape of its weights."""

    def __init__(self, model: t.Model):
        super().__init__()
        mlp = model.blocks[0].mlp
        self.shapes = {tuple(mlp.up.weight.shape), tuple(mlp.down.weight.shape)}
        self.backwards = 0
        self.of_weights = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """As torch asks of a mode."""
        result = function(*args, **(kwargs or {}))
        self.backwards += "fused_mlp_backward" in str(function)
        self.of_weights += str(function) == "aten.mm.default" and tuple(result.shape) in self.shapes
        return result


def random_states() -> list[torch.Tensor]:
    """Of torch's generators, on the CPU and on the GPU."""
    on_gpu = [torch.cuda.get_rng_state()] if DEVICE.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


@contextlib.contextmanager
def sums_in_order():
    """While entered, attention's backward adds in one order, not as its programs come."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_documents(adapts: bool, **overrides) -> None:
    """EVAL_MODE=documents in bfloat16 against float32 on the CPU, and what its scores depend on."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for sums_in_order()
    model, reference = document_models(**overrides)
    label = "documents, adapting" if adapts else "documents, frozen"
    tolerance = (1 + 2 * adapts) * BF16_TOLERANCE  # gradients may be three times as far off
    tokens = stream_of(DOCUMENT_LENGTHS)
    scored = functools.partial(document_surprise, model, ttt_enabled=adapts)
    weights, states = [p.detach().clone() for p in model.parameters()], random_states()
    watch = AttentionWatch(model)
    found = scored(tokens, observer=watch)
    stayed = [*map(torch.equal, model.parameters(), weights)]
    stayed += [p.grad is None and p.requires_grad for p in model.parameters()]
    stayed += map(torch.equal, random_states(), states)
    check(f"{label}: weights and random states that are others afterwards", stayed.count(False), 0)
    wanted = document_surprise(reference, tokens, ttt_enabled=adapts)
    check(f"{label}: scores against float32 on the CPU", relative(found, wanted), tolerance)
    if adapts:
        frozen = document_surprise(reference, tokens, ttt_enabled=False)
        off = float((found - wanted).norm() / (wanted - frozen).norm())
        check(f"{label}: the same, as a part of how far adapting moves them", off, 0.15)
        print(f"     of all scores, adapting moves {relative(wanted, frozen):.3f}")
        print(f"     a second run's scores are {relative(scored(tokens), found):.2e} off")
    check_document_order(label, scored, tokens, found, tolerance)
    with sums_in_order() if adapts else contextlib.nullcontext():
        check_document_causality(label, scored, tokens, model.settings.vocab_size)
    if DEVICE.type == "cuda":
        check_document_kernels(label, model, watch, adapts)


def check_short_memory() -> None:
    """Documents that adapt in a part of the memory that they take at once."""
    model, _ = document_models(train_seq_len=1024, ttt_lora_piece=64, ttt_lora_slots=64)
    tokens = stream_of([1000] * 64)
    kept = torch.cuda.memory_allocated()
    found = document_surprise(model, tokens)
    needed = torch.cuda.max_memory_allocated() - kept
    print(f"     64 documents of 1,000 tokens: {needed / 1e9:.2f} GB beside the model")
    whole = torch.cuda.get_device_properties(DEVICE).total_memory
    for part in (0.6, 0.2):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((kept + part * needed) / whole)
        watch = MemoryWatch()
        scores = document_surprise(model, tokens, observer=watch)
        label = f"documents in {part:.0%} of the memory"
        print(f"     {label}: {', then '.join(map(str, watch.rows))} at once")
        check(f"{label}: as many at once as before", float(not watch.rows), 0)
        check(f"{label}: scores", relative(scores, found), 3 * BF16_TOLERANCE)
    torch.cuda.set_per_process_memory_fraction(1.0)


def check_document_order(label: str, scored, tokens, found, tolerance: float) -> None:
    """Scores of fewer documents at once, of other neighbours, and alone: floats' order alone."""
    halved = scored(tokens, ttt_lora_slots=8)
    check(f"{label}: scores with half the slots", relative(halved, found), tolerance)
    ends = np.cumsum(DOCUMENT_LENGTHS)
    texts, parts = np.split(tokens[:-1], ends[:-1]), np.split(found.numpy(), ends[:-1])
    order = np.random.default_rng(5).permutation(len(texts))
    shuffled = scored(np.concatenate([*(texts[i] for i in order), tokens[-1:]]))
    expected = torch.from_numpy(np.concatenate([parts[i] for i in order]))
    check(f"{label}: scores of the stream shuffled", relative(shuffled, expected), tolerance)
    chosen = (1, 4, 9)
    alone = torch.cat([scored(np.append(texts[i], t.BOS_ID).astype(np.uint16)) for i in chosen])
    expected = torch.from_numpy(np.concatenate([parts[i] for i in chosen]))
    check(f"{label}: scores of three documents alone", relative(alone, expected), tolerance)


def check_document_causality(label: str, scored, tokens: np.ndarray, vocab_size: int) -> None:
    """With other tokens later and in other documents, no score may differ by a bit."""
    found = scored(tokens)
    begins = np.cumsum([0, *DOCUMENT_LENGTHS])
    generator = np.random.default_rng(3)
    for chosen, seen in ((0, 290), (3, 70), (8, 40)):
        other = generator.integers(4, vocab_size, len(tokens)).astype(np.uint16)
        other[tokens == t.BOS_ID] = t.BOS_ID  # documents stay as long, and shapes as they were
        kept = np.arange(begins[chosen], begins[chosen] + seen)
        other[kept] = tokens[kept]
        scores = scored(other)
        different = (scores != found)[kept[:-1]].sum()
        name = f"{label}: of {seen - 1} scores, those that later or other text changes"
        check(name, float(different), 0)
        unmoved = (scores == found).double().mean()
        check(f"{label}: part of all scores that stay where other text stands", float(unmoved), 0.5)


def check_document_kernels(label: str, model: t.Model, watch: AttentionWatch, adapts: bool) -> None:
    """Attention is flash's, and the MLP's fused backward makes no gradients of weights."""
    if runnable("flash", False):
        others = sum(backend != "flash" for backend in watch.backends)
        check(f"{label}: excerpts read by another attention than flash", others, 0)
    counts = ProductWatch(model)
    cuda = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=cuda) as profile, counts:
        document_surprise(model, stream_of([100, 40]), ttt_enabled=adapts)
    names = {row.key for row in profile.key_averages()}
    if runnable("flash", False):
        missing = not any("flash" in name for name in names)
        check(f"{label}: kernels of flash attention that are missing", missing, 0)
        check(f"{label}: kernels of cuDNN", sum("cudnn" in name for name in names), 0)
    if adapts and model.blocks[0].mlp.can_fuse:
        check(f"{label}: fused backward passes of the MLP, none", counts.backwards == 0, 0)
        check(f"{label}: gradients of the MLP's weights", counts.of_weights, 0)
    elif adapts:
        print("skip the MLP's kernels are for compute capability 9.0")


def weights_of_twelve_steps(
    settings: t.Settings, ranks: t.Ranks, batches_of, graphed: bool
) -> torch.Tensor:
    """All weights after twelve steps of batches that are each rank's own, the same each time."""
    model = t.build_model(settings, ranks)
    trainer = t.Trainer(model, settings, ranks, 8192, 16e6, SilentLog())
    trainer.graphed_steps.enabled &= graphed
    trainer.warm_up()
    torch.manual_seed(ranks.rank)
    trainer.run(batches_of(settings, ranks), None)
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def check_graphed_steps(
    quantizer: str, batches_of=RandomBatches, ranks: t.Ranks = ALONE, **overrides
) -> None:
    """Twelve steps with and without CUDA graphs; recurrence and late QAT begin on the way."""
    settings = model_settings(
        train_batch_tokens=16384 * ranks.world_size,
        iterations=12,
        max_wallclock_seconds=0,
        recur_start=0.3,
        late_qat_threshold=0.5,
        quantizer=quantizer,
        **overrides,
    )
    trained = functools.partial(weights_of_twelve_steps, settings, ranks, batches_of)
    eager = trained(False)
    noise = relative(trained(False), eager)  # FlexAttention adds gradients in no fixed order
    label = " ".join([quantizer, *(f"{k}={v}" for k, v in overrides.items())])
    if ranks.world_size > 1:
        label = f"{label}, rank {ranks.rank} of {ranks.world_size}"
    print(f"     twelve eager steps, {label}: weights differ by {noise:.2e} in a second run")
    graphed = trained(True)
    # A ternary weight at its threshold flips by a rounding error, in one run and not in another.
    least = 1e-2 if quantizer == "ternary" else 1e-3
    off = relative(graphed, eager)
    check(f"twelve graphed steps, {label}: weights", off, max(least, 2 * noise))
    if ranks.world_size > 1:
        spread = (ranks.sum_(graphed.clone()) / ranks.world_size - graphed).abs().max()
        check(f"twelve graphed steps, {label}: weights, off the mean", float(spread), 0)


def check_ranks() -> None:
    """Graphed steps of two ranks, which torchrun starts with this part once more."""
    if "WORLD_SIZE" in os.environ:
        check_graphed_steps("gptq", ranks=t.start_ranks(model_settings()))
        torch.distributed.destroy_process_group()
        return
    if torch.cuda.device_count() < 2:
        print("skip two ranks: there is one GPU")
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "-m", "tests.gpu_checks", "--here", "ranks"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith(("ok", "FAIL", "    "))]
    print(*rows, sep="\n")
    if done.returncode:
        print(*done.stderr.splitlines()[-30:], sep="\n")
    check("two ranks: status", float(done.returncode), 0)


def check_trellis() -> None:
    """Points of the kernel, and its milliseconds for a column of nine MLPs, as GPTQ has it.

    Where sums are rounded otherwise, of two paths that are as good the other one may be found.
    """
    generator = torch.Generator().manual_seed(0)
    weights = 2 * torch.randn(9 * 1536 // t.TRELLIS_ROWS, t.TRELLIS_ROWS, generator=generator)
    steps = 0.1 + torch.rand(weights.shape, generator=generator)
    numbers = torch.stack([weights, steps, torch.full_like(weights, 31.0)]).cuda()
    for states in t.TRELLISES:
        found = t.fused_trellis_search(numbers, states)
        expected = t.trellis_search(numbers.cpu(), states).cuda()
        check(f"trellis {states}: other points", float((found != expected).float().mean()), 0.01)
        took = milliseconds(functools.partial(t.fused_trellis_search, numbers, states))
        print(f"trellis {states}: {took:.4f} ms a column")


def check_checkpoints() -> None:
    """How much longer a step takes while a checkpoint is written, with a model of contest size; and
    that a trainer which takes it up goes on as the one that wrote it.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "PRESET": "short",
            "MASK_IMPOSSIBLE_PAIRS": "0",
            "SPELLING_FEATURES": "0",
            "MAX_WALLCLOCK_SECONDS": "0",
            "LOG_DIR": folder,
            "RUN_ID": "checks",
        }
        settings, _ = t.read_settings(
            environment | {"ITERATIONS": "60", "CHECKPOINT_EVERY": "1e-3"}
        )
        ranks = t.Ranks(0, 1, DEVICE)
        batches, micro_batch = RandomBatches(settings, ranks), t.choose_micro_batch(settings, ranks)

        def trainer_of(settings: t.Settings) -> t.Trainer:
            return t.Trainer(
                t.build_model(settings, ranks), settings, ranks, micro_batch, 16e6, SilentLog()
            )

        trainer = trainer_of(settings)
        trainer.warm_up()
        half = trainer_of(dataclasses.replace(settings, iterations=60))
        with t.Checkpoints(settings, ranks, SilentLog()) as trainer.checkpoints:
            trainer.run(batches, None)
        settings.checkpoint_paths[0].unlink()  # the end's: the one before is to be taken up
        times = [
            a.elapsed_time(b) for a, b in zip(batches.marks[5:], batches.marks[6:], strict=False)
        ]
        usual = statistics.median(times)
        check(
            f"checkpoints: longest of {len(times)} steps, ms over the median {usual:.1f}",
            max(times) - usual,
            50.0,
        )
        half.resume()
        check("checkpoints: steps that were not taken up", float(not 0 < half.steps_done <= 60), 0)
        half.run(batches, None)
        weights = [
            torch.cat([p.detach().flatten() for p in x.model.parameters()]) for x in (half, trainer)
        ]
        check(
            f"checkpoints: weights after going on from step {half.steps_done}",
            relative(*weights),
            1e-2,
        )


def run_script(folder: str, **settings: str) -> subprocess.CompletedProcess:
    """train_gpt.py with these settings, its log in folder. The environment's go before them."""
    root = Path(t.__file__).parent
    command = [sys.executable, str(root / "train_gpt.py")]
    environment = {"LOG_DIR": folder} | settings | os.environ
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def last_line(said: str) -> str:
    """The last line of what a process said, "?" if that was nothing, as of one that was killed."""
    return (said.strip().splitlines() or ["?"])[-1]


def sample_is_there() -> bool:
    """Whether `make demo` has made its text; prints how else."""
    there = Path(t.__file__).with_name("data").joinpath("sample").is_dir()
    if not there:
        print("skip whole runs: make their text by `python data/prepare.py sample`")
    return there


def check_system(preset: str) -> None:
    """A published system's preset from shards to a score with test-time training, on the text of
    `make demo`. Without the first Mamba's libraries nothing is compiled: its scan takes minutes.
    """
    if not sample_is_there():
        return
    settings = {"PRESET": preset, "RUN_ID": preset, "DATA_PATH": "data/sample"}
    settings |= {"TOKENIZER_PATH": "data/sample/sample_1024_bpe.model", "VOCAB_SIZE": "1024"}
    settings |= {"TRAIN_SEQ_LEN": "512", "TRAIN_BATCH_TOKENS": "32768", "ITERATIONS": "30"}
    settings |= {"MAX_WALLCLOCK_SECONDS": "0"}
    if preset != "nemotron_hinge":
        plain = {"SCAN_BACKEND": "parallel", "COMPILE": "off"}
        settings |= plain if missing_library(1) else {"SCAN_BACKEND": "fused"}
    with tempfile.TemporaryDirectory() as folder:
        done = run_script(folder, **settings)
    scored = done.returncode == 0 and "final_int6_lzma_sliding_ttt_exact" in done.stdout
    check(f"PRESET={preset}: runs without a score", float(not scored), 0)
    print(f"     {last_line(done.stdout if scored else done.stderr)}")


NEWER_SETTINGS = {
    "MASK_IMPOSSIBLE_PAIRS": "1",
    "MUON_BETA2": "0.95",
    "SPELLING_FEATURES": "500",
    "DOCUMENT_RESET": "1",
    "TRELLIS_STATES": "8",
}
BPB_OF_300_STEPS = 1.9  # at most; 1.79 without them, on a CPU


def check_whole_run() -> None:
    """PRESET=tiny with the newer settings at once, from shards to a score; then its artifact alone,
    whose score may differ by what adapting adds up in no fixed order.
    """
    if not sample_is_there():
        return
    settings = {"PRESET": "tiny", "RUN_ID": "whole", "ITERATIONS": "300"}
    settings |= {"MAX_WALLCLOCK_SECONDS": "0"} | NEWER_SETTINGS
    with tempfile.TemporaryDirectory() as folder:
        runs = [run_script(folder, **settings)]
        runs.append(run_script(folder, RUN_ID="whole", EVAL_ONLY="1"))
        failed = [run for run in runs if run.returncode]
        check("PRESET=tiny, newer settings: runs without a score", len(failed), 0)
        if failed:
            print(f"     {last_line(failed[0].stderr)}")
            return
        logs = [t.read_records(Path(folder, f"whole{end}.jsonl")) for end in ("", ".eval")]
    finals = [[record for record in log if record["event"] == "final"] for log in logs]
    trained, again = (final["val_bpb"] for (final,) in finals)
    check("PRESET=tiny, newer settings: BPB after 300 steps", trained, BPB_OF_300_STEPS)
    check("PRESET=tiny, newer settings: BPB of its artifact, off by", abs(again - trained), 2e-4)
    print(f"     {trained:.6f} BPB in the run, {again:.6f} from its artifact")


# What a process is told before it runs the script: that it is on another GPU.
OF_A_T4 = "t.kernel_limits = lambda device: (75, 65_536)"
OF_8_GB = """\
whole = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(8e9 / whole)
free = 8e9 - torch.cuda.memory_allocated()
torch.cuda.mem_get_info = lambda device=None: (free, 8e9)"""


def laptop_records(machine: str, **settings: str) -> dict[str, list[dict]]:
    """The log of PRESET=laptop on the text of `make demo`, by event, on such a machine.

    Settings in the environment go before these. Of a run that failed, {}.
    """
    code = f"import sys, torch, train_gpt as t\n{machine}\nsys.exit(t.run())"
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PRESET": "laptop", "RUN_ID": "laptop", "LOG_DIR": folder} | settings
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(t.__file__).parent,
            env=environment | os.environ,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"     {last_line(done.stderr)}")
            return {}
        records = {}
        for line in Path(folder, "laptop.jsonl").read_text().splitlines():
            record = json.loads(line)
            records.setdefault(record["event"], []).append(record)
    return records


def check_float16() -> None:
    """200 steps of PRESET=laptop with bfloat16, and as on a T4, which has none."""
    settings = {"ITERATIONS": "200", "MAX_WALLCLOCK_SECONDS": "0", "TRAIN_LOG_EVERY": "1"}
    settings |= {"EVAL_MODE": "plain", "TTT_ENABLED": "0"}
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(laptop_records, machine, **settings) for machine in ("", OF_A_T4)]
        first, second = (run.result() for run in runs)
    if not (first and second):
        check("PRESET=laptop: runs without a score", 1.0, 0)
        return
    losses = [[x["train_loss"] for x in records["train"]][-50:] for records in (first, second)]
    means = [statistics.mean(x) for x in losses]
    check("as on a T4, last 50 of 200 losses: mean less bfloat16's", abs(means[1] - means[0]), 0.01)
    scores = [records["final"][-1]["val_loss"] for records in (first, second)]
    skipped = second["train"][-1]["skipped_steps"]
    ms = [records["trained"][-1]["step_avg_ms"] for records in (first, second)]
    print(f"     training loss {means}, final {scores}, ms a step {ms}; {skipped} steps skipped")


def check_laptop() -> None:
    """PRESET=laptop on a GPU of which 8 GB are to be had."""
    records = laptop_records(OF_8_GB)
    check("PRESET=laptop in 8 GB: runs without a score", float("final" not in records), 0)
    if records:
        trained, final = records["trained"][-1], records["final"][-1]
        peak = trained["peak_bytes"] / 1e9
        steps, ms, bpb = trained["steps"], trained["step_avg_ms"], final["val_bpb"]
        seconds = final["seconds"]
        print(
            f"     {steps} steps of {ms:.1f} ms, peak {peak:.2f} GB, {bpb:.4f} BPB, {seconds:.0f} s"
        )


class Part(NamedTuple):
    """Something to check in a process of its own."""

    run: Callable[[], None]
    seconds: int  # about, with empty compile caches, on an H200's host that has little else to do
    what: str
    alone: bool = False  # it measures time, and wants the GPU to itself


def parts() -> dict[str, Part]:
    """All, by name; what stands before a hyphen names several."""

    def call(function, *arguments, **overrides) -> Callable[[], None]:
        return functools.partial(function, *arguments, **overrides)

    first = {"mamba_version": 1, "num_layers": 2, "mamba_layers": "0", "layer_order": "0-1,0-1"}
    first |= {"document_reset": 1, "mamba_chunk_size": 32, "train_seq_len": 64}
    second = {"mamba_version": 2, "document_reset": 1, "train_seq_len": 128}
    short = {"mamba_version": 2, "train_seq_len": 128}
    rows = {
        "scans": Part(check_scans, 50, "the fused scan against chunks in float64"),
        "pointers": Part(check_pointers, 50, "its tiles by pointers against descriptors"),
        "selective": Part(check_selective, 90, "the first Mamba's scans"),
        "mamba2": Part(check_mamba2, 90, "Mamba-2's scans"),
        "attention": Part(check_attention, 30, "every backend against the formula"),
        "replays": Part(check_replays, 35, "attention in graphs, replayed with other documents"),
        "documents-mamba3": Part(check_document_steps, 60, "graphed steps, documents apart"),
        "documents-mamba2": Part(call(check_document_steps, **short), 60, "the same of Mamba-2"),
        "documents-frozen": Part(call(check_documents, False), 50, "documents scored apart"),
        "documents-adapting": Part(call(check_documents, True), 80, "documents that adapt"),
        "memory": Part(check_short_memory, 60, "documents in less memory than they take", True),
        "optimizer": Part(check_optimizer, 20, "Newton-Schulz steps against float64"),
        "mlp": Part(check_mlp, 30, "the MLP's kernels against its formula"),
        "float8-products": Part(check_float8, 90, "8-bit products against their reference"),
        "float8-gradients": Part(check_weight_gradients, 40, "8-bit sums over 65,536 tokens"),
        "model-default": Part(check_model, 50, "a compiled model against float32 on the CPU"),
        "model-documents": Part(call(check_model, document_reset=1), 50, "documents apart"),
        "model-mamba2": Part(call(check_model, **second), 60, "the same of Mamba-2"),
        "model-mamba1": Part(call(check_model, **first), 90, "the same of the first Mamba"),
        "model-wide": Part(call(check_model, mamba_d_state=128), 50, "states of 128"),
        "micro-batches": Part(check_micro_batches, 90, "the most tokens at once against quarters"),
        "generation-default": Part(check_generation, 30, "by steps and by a graph"),
        "generation-documents": Part(call(check_generation, document_reset=1), 30, "the same"),
        "generation-mamba2": Part(call(check_generation, mamba_version=2), 30, "the same"),
        "generation-mamba1": Part(call(check_generation, mamba_version=1), 30, "the same"),
        "trellis": Part(check_trellis, 30, "GPTQ's paths against the reference, and their time"),
        "tiny": Part(check_whole_run, 90, "a whole run with the newer settings, and its artifact"),
        "float16": Part(check_float16, 80, "PRESET=laptop as on a T4, beside bfloat16"),
        "laptop": Part(check_laptop, 80, "PRESET=laptop in 8 GB"),
        "checkpoints": Part(check_checkpoints, 70, "what writing them costs, going on", True),
        "times-attention": Part(time_attention, 60, "attention with and without documents", True),
        "times-steps": Part(time_steps, 70, "a model's gradients with and without them", True),
        "times-generation": Part(time_generation, 20, "a token of 64 texts", True),
    }
    rows["ranks"] = Part(check_ranks, 80, "graphed steps of two ranks, on two GPUs")
    for quantizer in ("gptq", "percentile", "dsq", "ternary"):
        what = f"twelve steps with and without CUDA graphs, {quantizer}"
        rows[f"graphs-{quantizer}"] = Part(call(check_graphed_steps, quantizer), 60, what)
    for preset in ("nemotron_hinge", "hybrid11", "hybrid18"):
        what = "a published system from shards to a score"
        rows[f"systems-{preset}"] = Part(call(check_system, preset), 100, what)
    return rows


LIMIT = 120  # seconds of a part


def choose_parts(names: list[str]) -> dict[str, Part]:
    """Parts of these names, or whose names begin so; without names all, those that are alone last.

    Raises UserError.
    """
    everything = parts()
    groups = {name.partition("-")[0] for name in everything}
    if unknown := sorted(set(names) - set(everything) - groups):
        known = ", ".join(sorted(groups))
        raise UserError(f"{', '.join(unknown)}: no such part; there are {known} (--list: in full)")
    chosen = {
        name: part
        for name, part in everything.items()
        if not names or name in names or name.partition("-")[0] in names
    }
    return dict(sorted(chosen.items(), key=lambda item: item[1].alone))


def describe_parts(chosen: dict[str, Part], jobs: int) -> str:
    """What will run, and about how long it takes."""
    lines = [f"{name:22} about {part.seconds:3} s  {part.what}" for name, part in chosen.items()]
    alone = sum(part.seconds for part in chosen.values() if part.alone)
    shared = [part.seconds for part in chosen.values() if not part.alone]
    longest = max([sum(shared) / min(jobs, max(len(shared), 1)), *shared])
    return "\n".join([*lines, f"in all {len(chosen)}, about {(alone + longest) / 60:.0f} min"])


def stop_group(process: subprocess.Popen) -> str:
    """Ends a process with the runs and ranks that it has started; what it said."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        return process.communicate(timeout=5)[0]
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def run_apart(name: str, limit: float) -> bool:
    """One part in a process of its own, whose rows are printed once it has ended; whether they are
    all good.
    """
    command = [sys.executable, "-m", "tests.gpu_checks", "--here", name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(
        command, cwd=Path(__file__).parent.parent, start_new_session=True, **pipes
    )
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        said = stop_group(process)
        said += f"FAIL {name}: not done in {limit:g} s\n"
    ended = (
        ""
        if process.returncode in (0, 1, -signal.SIGTERM, -signal.SIGKILL)
        else "FAIL it ended by an error\n"
    )
    print(f"{name}\n{said}{ended}", flush=True)
    return process.returncode == 0


def run_here(part: Part, name: str) -> int:
    """One part in this process; the exit status."""
    t.prepare_torch()
    torch.manual_seed(0)
    started = time.monotonic()
    part.run()
    print(f"     {name} took {time.monotonic() - started:.0f} s", flush=True)
    return int(failures > 0)


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line names; the exit status."""
    summary, _, details = __doc__.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=summary, epilog=details, formatter_class=formatter)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help="what to run; none: all")
    add("--list", action="store_true", help="only say what would run")
    add("--jobs", type=int, default=4, metavar="N", help="parts side by side (default 4)")
    limit = f"seconds after which a part has failed (default {LIMIT})"
    add("--limit", type=float, default=LIMIT, metavar="SECONDS", help=limit)
    add("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args(arguments)
    if options.jobs < 1 or options.limit <= 0:
        parser.error("--jobs must be at least 1, --limit above 0")
    chosen = choose_parts(options.parts)
    if options.here:
        if len(chosen) != 1:
            parser.error(f"--here runs one part, not {len(chosen)}: {', '.join(chosen)}")
        ((name, part),) = chosen.items()
        return run_here(part, name)
    print(describe_parts(chosen, options.jobs), flush=True)
    if options.list:
        return 0
    if not torch.cuda.is_available():
        raise UserError("needs an NVIDIA GPU, and torch sees none here (--list works without)")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    run = functools.partial(run_apart, limit=options.limit)
    with ThreadPoolExecutor(options.jobs) as pool:
        good = list(pool.map(run, (name for name, part in chosen.items() if not part.alone)))
    good += [run(name) for name, part in chosen.items() if part.alone]
    print(f"{len(good) - sum(good)} of {len(good)} parts failed")
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(run_command("gpu_checks", main))

"""Compiles the program's Triton kernels for NVIDIA GPUs that need not be here.

    python -m tests.compile_kernels [90 [16,128,64,64 ...]]
    python -m tests.compile_kernels scans 16,128,64,64 [80 86 ...]
    python -m tests.compile_kernels table [80 86 ...]
    python -m tests.compile_kernels shared [90 [16,128,64,64 ...]]
    python -m tests.compile_kernels --idea FILE ...

90 is a compute capability, here the H100's and H200's. Without shapes, each kernel that a run of
the default's sizes launches becomes a line of JSON: its name; the layer's state size; whether it
knows of document starts; the bytes of shared memory that a program needs; the registers of a
thread, and its bytes of local memory (the compiler puts there what finds no register); how many of
its numbers ptxas spoils, and how many it rounds together that the kernel rounds apart; and the
SHA-256 of its machine code. The sum leaves names, addresses in the file and line numbers out: two
versions of the script whose sums are equal run the same instructions. In the place of a state,
products of 8-bit floats have 8.

16,128,64,64 are a layer's heads, a head's channels, the state size and the chunk: a line of JSON
says whether the scan of this shape compiles, and what it needs. "scans" does so for its two largest
kernels on all of SHARED's capabilities, or on these. "table" does so for SHAPES, as text:
bench/results/kernels.txt. "shared" says of shapes near what the GPU serves how many bytes of shared
memory the kernel that has most of them needs, as in bench/results/shared.txt, where 86 stands for
all GPUs without tile instructions: seconds a shape, for it stops when the compiler has placed them.
--idea changes the script first, as that of tools.explore. Needs a triton with NVIDIA's assembler,
as its Linux packages are, and no GPU; test_compiled_kernels.py says what must hold.
"""

import hashlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # triton reads it when it is imported

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import compiler as nvidia  # noqa: E402

if not __package__:  # started by its path
    print(
        "error: start it in the repository's folder as python -m tests.compile_kernels",
        file=sys.stderr,
    )
    sys.exit(2)

import train_gpt as t  # noqa: E402
from bench import tune  # noqa: E402
from tools.explore import install_idea  # noqa: E402

TOKENS = 256  # a chunk and its neighbours: more would compile to the same
# Bytes of shared memory that a program may use, by compute capability, from the table of technical
# specifications in NVIDIA's CUDA C++ Programming Guide; a driver reports the same.
SHARED = {
    "80": 166_912,
    "86": 101_376,
    "89": 101_376,
    "90": 232_448,
    "100": 232_448,
    "120": 101_376,
}
SHAPES = (  # heads, channels, state, chunk
    (16, 64, 64, 64),  # the default's
    (16, 64, 128, 64),
    (4, 32, 32, 64),  # PRESET=tiny's
    (2, 16, 16, 16),
    (2, 64, 64, 32),
    (2, 64, 128, 32),
    (2, 128, 64, 64),
    (2, 128, 128, 32),
    (2, 128, 128, 64),
    (2, 64, 256, 64),
    (2, 32, 64, 128),
    (2, 16, 128, 128),
)
MORE_SHAPES = (  # on the H100 alone: elsewhere the compiler takes minutes for what it spills
    (1, 64, 64, 64),
    (2, 64, 256, 16),
    (2, 64, 64, 128),
    (2, 32, 32, 256),
    (2, 16, 1024, 16),
    (2, 256, 16, 16),
    (64, 16, 64, 64),
    (2, 8, 64, 64),
    (2, 64, 8, 64),
    (2, 64, 64, 8),
)
TITLES = "capability", "heads", "channels", "state", "chunk", "shared", "kernel", "registers"
TITLES += "local", "elsewhere", "kernel", "verdict"
WIDTHS = 10, 5, 8, 5, 5, 7, 17, 9, 5, 9, 17, 16
TABLE_HEAD = """\
python -m tests.compile_kernels table: the scan's kernels, compiled for bfloat16 by triton {version}
shared: bytes of shared memory of a program, of that kernel which needs most
registers, local: of a thread of scan_backward, which takes longest; local bytes found no register
and wait in memory: a few hundred cost little, thousands make the kernel wait for memory
elsewhere: local bytes of a thread of that other kernel which has most
verdict: whether a program may have that much shared memory on such a GPU; "spills": it may, but has
more than {spills} local bytes in a kernel, where other configurations have few
"""
SPILLS = 900
LARGE = ("scan_forward", "scan_backward", "tokens_forward", "tokens_backward")


class Usage(NamedTuple):
    """Bytes of shared memory that a program needs; registers and local bytes that a thread does."""

    shared: int
    registers: int
    local: int


def usage(kernel) -> Usage:
    """Of a compiled kernel, as its machine code declares it."""
    registers, local = re.search(r"\bREG:(\d+) STACK:(\d+)", dumped(kernel, "-res-usage")).groups()
    return Usage(kernel.metadata.shared, int(registers), int(local))


def dumped(kernel, option: str) -> str:
    """What cuobjdump says of a compiled kernel's machine code."""
    dump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([dump, option, file.name], capture_output=True, text=True)
    done.check_returncode()
    return done.stdout


def instructions(cubin: bytes) -> bytes:
    """The section .text.* of a cubin, a 64-bit ELF file, with a single kernel in it."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<II8x8xQQ", cubin, table + i * size) for i in range(count)]
    names_offset = headers[names][2]
    found = []
    for name, _, offset, length in headers:
        start = names_offset + name
        if cubin[start : cubin.index(b"\0", start)].startswith(b".text."):
            found.append(cubin[offset : offset + length])
    (code,) = found
    return code


def spoiled_pairs(ptx: str) -> int:
    """How many pairs of 8-bit floats are packed with another pair into a register, and also cut.

    ptxas of CUDA 12.8 and 12.9 makes one instruction of the packing and forgets the pair, so that
    its upper number is cut from a register that nothing wrote; that of 13.0 is right.
    """
    made = set(re.findall(r"cvt\S*e4m3x2\S*\s+(%rs\d+),", ptx))
    packed = set(re.findall(r"%rs\d+", " ".join(re.findall(r"mov\.b32\s+%r\d+, (\{.*?\})", ptx))))
    cut = set(re.findall(r"shr\.u16\s+%rs\d+, (%rs\d+), 8", ptx))
    return len(made & packed & cut)


def merged_roundings(kernel) -> int:
    """How many pairs are rounded to 8 bits less often than the kernel's text says.

    ptxas rounds once what it is told to round twice, and so may cut what spoiled_pairs() finds to
    be packed alone.
    """
    told = len(re.findall(r"cvt\S*\.e4m3x2\.f32\s", kernel.asm["ptx"]))
    if not told:
        return 0
    return told - len(re.findall(r"\bF2FP\S*\.E4M3\.F32", dumped(kernel, "-sass")))


class Compiler:
    """Stands for a GPU that is absent: a launched kernel is compiled and kept, and does not run."""

    def __init__(self, capability: int):
        self.capability = capability
        own = tune.KERNELS + ("cross_entropy_rows", "trellis_paths", "sum_squares", "round_matrix")
        self.kernels = own + ("turn_rows", *t.MLP_TILES)  # that are compiled
        self.built: dict[str, triton.compiler.CompiledKernel] = {}
        absent_gpu = SimpleNamespace(  # what compiling asks a driver for
            get_current_target=lambda: GPUTarget("cuda", self.capability, 32),
            get_current_device=lambda: self.capability,  # kernels are kept by device
            get_current_stream=lambda device=None: 0,
        )
        triton.runtime.driver.set_active(absent_gpu)
        run = triton.JITFunction.run

        def compile_only(kernel, *arguments, **options):
            if kernel.__name__ in self.kernels:
                self.built[kernel.__name__] = run(kernel, *arguments, **options | {"warmup": True})

        triton.JITFunction.run = compile_only
        t.kernel_limits = lambda device: (self.capability, SHARED[str(self.capability)])

    def report(self, state: int, documents: bool) -> None:
        """A line for each kernel launched since the last report."""
        for name, kernel in self.built.items():
            needs = usage(kernel)
            line = {
                "kernel": name,
                "state": state,
                "documents": documents,
                "shared": needs.shared,
                "registers": needs.registers,
                "local": needs.local,
                "spoiled": spoiled_pairs(kernel.asm["ptx"]),
                "merged": merged_roundings(kernel),
                "code": hashlib.sha256(instructions(kernel.asm["cubin"])).hexdigest(),
            }
            print(json.dumps(line), flush=True)
        self.built.clear()


def compile_shape(compiler: Compiler, shape: tuple[int, ...], measure=usage) -> dict:
    """The usage of each kernel of a layer of this shape: heads, channels, state, chunk.

    measure: what is told of a kernel in place of its Usage. Of a shape that does not compile, {}.
    """
    heads, channels, state, chunk = shape
    sizes = t.MambaSizes(heads, channels, state, state // 4, 3)
    width = sum(sizes.columns().values())
    projected = torch.randn(1, 2 * chunk, width).bfloat16().requires_grad_()
    shapes = (heads,), (heads,), (heads, state), (heads, state), (state,), (state,)
    parameters = t.MambaParameters(*(torch.ones(x, requires_grad=True) for x in shapes))
    try:
        y, *_ = t.mamba_scan(projected, parameters, sizes, None, None, "triton", chunk)
        torch.autograd.grad(y.sum().float(), projected)
        found = {name: measure(kernel) for name, kernel in compiler.built.items()}
    except (t.UserError, RuntimeError):  # of launch(), or of a pass of the compiler
        found = {}
    compiler.built.clear()
    return found


def table_row(capability: str, shape: tuple[int, ...], found: dict[str, Usage]) -> tuple:
    """The numbers and words under TITLES."""
    if not found:
        return capability, *shape, *("-" * 6), "does not compile"
    most = max(found, key=lambda name: found[name].shared)
    others = found.keys() - {"scan_backward"}
    spills = max(others, key=lambda name: (found[name].local, name))
    scan = found["scan_backward"]
    shared = found[most].shared
    fits = "fits" if shared <= SHARED[capability] else "does not fit"
    local = max(scan.local, found[spills].local)
    if fits == "fits" and local > SPILLS and not t.has_tile_instructions(torch.device("cuda")):
        fits = "spills"
    needs = shared, most, scan.registers, scan.local, found[spills].local
    return capability, *shape, *needs, spills if found[spills].local else "-", fits


def print_row(cells: tuple) -> None:
    """A line of the table."""
    words = (f"{cell!s:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
    print("  ".join(words), flush=True)


def print_table(capabilities: list[str]) -> None:
    """What the kernels of SHAPES need on these GPUs."""
    compiler = Compiler(0)
    print(TABLE_HEAD.format(version=triton.__version__, spills=SPILLS))
    print_row(TITLES)
    for capability in capabilities:
        compiler.capability = int(capability)
        more = MORE_SHAPES if capability == "90" else ()
        for shape in (*SHAPES, *more):
            print_row(table_row(capability, shape, compile_shape(compiler, shape)))


def compile_all(compiler: Compiler) -> None:
    """Prints a line for each kernel that a forward and a backward launch, in bfloat16, with what
    train_gpt.py launches it."""
    for state in (64, 128):
        for documents in (False, True):
            projected, parameters, sizes = tune.random_layer(state, torch.device("cpu"), 1, TOKENS)
            starts = torch.zeros(1, TOKENS, dtype=torch.bool) if documents else None
            y, square, _ = t.mamba_scan(projected, parameters, sizes, starts, None, "triton", 64)
            torch.autograd.grad(y.sum().float() + square.sum(), tune.learned(projected, parameters))
            compiler.report(state, documents)
    hidden, matrix = torch.randn(TOKENS, 512).bfloat16(), torch.randn(8192, 512).bfloat16()
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    pairs = [targets, torch.zeros(8192, 1024, dtype=torch.uint8)]
    for masked in (0, 1):  # in the place of a state
        for slopes in (True, False):
            t.fused_cross_entropy(hidden, matrix, targets, 30.0, slopes, pairs[: 2 * masked])
            compiler.report(masked, slopes)
    for states in t.TRELLISES:  # likewise
        t.fused_trellis_search(torch.zeros(3, 8, t.TRELLIS_ROWS), states)
        compiler.report(states, False)
    up, down = (torch.randn(shape).bfloat16() for shape in ((2048, 512), (512, 2048)))
    factor = torch.ones(TOKENS)
    _, active, signs = t.fused_mlp(hidden, factor, up, down)
    t.fused_mlp_backward(hidden, factor, down, active, signs)
    compiler.report(0, False)
    t.scaled_product = lambda a8, b8, *_: hidden.new_empty(len(a8), len(b8))  # which cuBLAS runs
    x8, factor = t.float8_norm(hidden)
    _, *kept = t.float8_mlp(hidden, x8, factor, up.float(), down.float())
    t.float8_mlp_backward(x8, x8, factor, [factor[0], factor[0]], kept)
    compiler.report(8, False)


def stop_at_shared_memory() -> None:
    """From here on kernels are compiled until it is known how much shared memory they need."""

    def place(backend, source, metadata, options, capability) -> str:
        version = nvidia.get_ptx_version_from_options(options, backend.target.arch)
        manager = nvidia.ir.pass_manager(source.context)
        nvidia.passes.ttgpuir.add_combine_tensor_select_and_if(manager)
        nvidia.passes.ttgpuir.add_allocate_warp_groups(manager)
        nvidia.passes.convert.add_scf_to_cf(manager)
        nvidia.passes.gluon.add_inliner(manager)
        of_gpu = nvidia.nvidia.passes.ttgpuir
        of_gpu.add_allocate_shared_memory_nv(manager, capability, version)
        manager.run(source, "make_llir")
        metadata |= dict.fromkeys(("tmem_size", "global_scratch_size", "profile_scratch_size"), 0)
        metadata |= dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1)
        metadata |= {"shared": source.get_int_attr("ttg.shared"), "name": "kernel"}
        return ""

    nvidia.CUDABackend.make_llir = place
    nvidia.CUDABackend.make_ptx = lambda *_: ""
    nvidia.CUDABackend.make_cubin = lambda *_: b""


def rows_are_aligned(heads: int, channels: int, state: int) -> bool:
    """Whether in_proj's rows begin at multiples of 32 bytes: loads by pointers take longer words,
    and more of them lie in shared memory."""
    width = sum(t.MambaSizes(heads, channels, state, state // 4, 3).columns().values())
    return (width + -width % 8) % 16 == 0


def shapes_near_a_limit(capability: str) -> list[tuple[int, ...]]:
    """Heads, channels, state and chunk that need 0.6 to 1.25 of what a GPU serves, by the sum.

    Few heads, and where these change what a program needs, many.
    """
    sizes = [2**i for i in range(4, 12)]
    found = []
    for channels, state, chunk in itertools.product(sizes, sizes[:7], sizes):
        heads = next(i for i in range(2, 100) if rows_are_aligned(i, channels, state))
        for count in (heads, 24):
            shape = count, channels, state, chunk
            needed = t.shared_bytes_by_sum(*shape, 90 if capability in ("90", "100") else 80)
            near = 0.6 < needed / SHARED[capability] < 1.25
            if near and (count == heads or channels == 16):
                found.append(shape)
    most = SHARED[capability] // 8
    found += [(most * i // 8 // chunk, 16, 16, chunk) for chunk in sizes[:5] for i in (5, 8)]
    return found


def print_shared(capability: str, shapes: list[str]) -> None:
    """A line for each shape: capability, the shape, the kernel that needs most, and its bytes."""
    stop_at_shared_memory()
    compiler = Compiler(int(capability))
    compiler.kernels = LARGE
    wanted = [tuple(map(int, text.split(","))) for text in shapes]
    for shape in wanted or shapes_near_a_limit(capability):
        found = compile_shape(compiler, shape, lambda kernel: kernel.metadata.shared)
        most = max(found, key=found.get, default="-")
        print(capability, *shape, most, found.get(most, "-"), flush=True)


def print_scans(text: str, capabilities: list[str]) -> None:
    """A line of JSON for each capability: what scan_forward and scan_backward of a shape need."""
    compiler = Compiler(0)
    compiler.kernels = ("scan_forward", "scan_backward")
    for capability in capabilities:
        compiler.capability = int(capability)
        found = compile_shape(compiler, tuple(map(int, text.split(","))))
        needs = {name: usage._asdict() for name, usage in found.items()}
        print(json.dumps({"capability": capability, "kernels": needs}), flush=True)


def main(capability: str = "90", *rest: str) -> None:
    """Of no shapes, everything that the script launches by default."""
    if capability == "--idea":
        idea, *others = rest
        install_idea(Path(idea))
        main(*others)
        return
    if capability == "table":
        print_table(rest or list(SHARED))
        return
    if capability == "shared":
        print_shared(rest[0] if rest else "90", rest[1:])
        return
    if capability == "scans":
        print_scans(rest[0], rest[1:] or list(SHARED))
        return
    compiler = Compiler(int(capability))
    for text in rest:
        shape = tuple(map(int, text.split(",")))
        found = compile_shape(compiler, shape)
        print(
            json.dumps(
                {"shape": shape, "shared": max((x.shared for x in found.values()), default=None)}
            ),
            flush=True,
        )
    if not rest:
        compile_all(compiler)


if __name__ == "__main__":
    main(*sys.argv[1:])

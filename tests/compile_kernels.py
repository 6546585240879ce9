"""Compiles the program's Triton kernels for an NVIDIA GPU that need not be here.

    python -m tests.compile_kernels [90 [128,64,64 ...]]

90 is a compute capability, here the H100's and H200's; 128,64,64 are a head's channels, the state
size and the chunk, of which only the scan itself is compiled. Each kernel becomes a line of JSON:
its name; the layer's state size; whether it knows of document starts; the bytes of shared memory
that a program needs and of local memory that a thread does (the compiler puts there what finds no
register); and the SHA-256 of its machine code. The sum leaves names, addresses in the file and line
numbers out: two versions of the script whose sums are equal run the same instructions. Needs a
triton with NVIDIA's assembler, as its Linux packages are, and no GPU; test_compiled_kernels.py says
what must hold.
"""

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

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

TOKENS = 256  # a chunk and its neighbours: more would compile to the same


def local_bytes(cubin: bytes) -> int:
    """A thread's local memory, as the machine code declares it."""
    dump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [dump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return sum(map(int, re.findall(r"\bSTACK:(\d+)", text)))


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


class Compiler:
    """Stands for a GPU that is absent: a launched kernel is compiled and kept, and does not run."""

    def __init__(self, capability: int):
        self.built: dict[str, triton.compiler.CompiledKernel] = {}
        absent_gpu = SimpleNamespace(  # what compiling asks a driver for
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
        )
        triton.runtime.driver.set_active(absent_gpu)
        run = triton.JITFunction.run

        def compile_only(kernel, *arguments, **options):
            self.built[kernel.__name__] = run(kernel, *arguments, **options | {"warmup": True})

        triton.JITFunction.run = compile_only

    def report(self, state: int, documents: bool) -> None:
        """A line for each kernel launched since the last report."""
        for name, kernel in self.built.items():
            cubin = kernel.asm["cubin"]
            line = {
                "kernel": name,
                "state": state,
                "documents": documents,
                "shared": kernel.metadata.shared,
                "local": local_bytes(cubin),
                "code": hashlib.sha256(instructions(cubin)).hexdigest(),
            }
            print(json.dumps(line), flush=True)
        self.built.clear()


def compile_shape(compiler: Compiler, channels: int, state: int, chunk: int) -> None:
    """Prints a line for the scan of one shape: the most shared memory, or the compiler's words."""
    sizes = t.MambaSizes(2, channels, state, state // 4, 3)
    width = sum(sizes.columns().values())
    projected = torch.randn(1, 2 * chunk, width).bfloat16().requires_grad_()
    shapes = (2,), (2,), (2, state), (2, state), (state,), (state,)
    parameters = t.MambaParameters(*(torch.ones(shape, requires_grad=True) for shape in shapes))
    line = {"channels": channels, "state": state, "chunk": chunk}
    try:
        y, *_ = t.mamba_scan(projected, parameters, sizes, None, None, "triton", chunk)
        torch.autograd.grad(y.sum().float(), projected)
        line["shared"] = max(kernel.metadata.shared for kernel in compiler.built.values())
    except triton.CompilationError as error:
        line["error"] = str(error).strip().splitlines()[0]
    compiler.built.clear()
    print(json.dumps(line), flush=True)


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
    for slopes in (True, False):
        targets = torch.zeros(TOKENS, dtype=torch.int64)
        t.fused_cross_entropy(hidden, matrix, targets, 30.0, slopes)
        compiler.report(0, slopes)


def main(capability: str = "90", *shapes: str) -> None:
    """Of no shapes, everything that the script launches by default."""
    compiler = Compiler(int(capability))
    for shape in shapes:
        compile_shape(compiler, *map(int, shape.split(",")))
    if not shapes:
        compile_all(compiler)


if __name__ == "__main__":
    main(*sys.argv[1:])

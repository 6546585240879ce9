"""Compiles the program's Triton kernels for an NVIDIA GPU that need not be here: python -m tests.compile_kernels [90]

90 is a compute capability, here the H100's and H200's. Each kernel becomes a line of JSON: the layer's state size, and the
bytes of shared memory that a program needs and of local memory that a thread does (the compiler puts there what finds no
register). Needs a triton with NVIDIA's assembler, as its Linux packages are, and no GPU; test_compiled_kernels.py says what
must hold.
"""

import json
import os
import re
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


def compile_all(capability: int) -> None:
    """Prints a line for each kernel that a forward and a backward launch, in bfloat16, with what train_gpt.py launches it."""
    absent_gpu = SimpleNamespace(  # what compiling asks a driver for
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )
    triton.runtime.driver.set_active(absent_gpu)
    run, built = triton.JITFunction.run, {}

    def compile_only(kernel, *arguments, **options):
        built[kernel.__name__] = run(kernel, *arguments, **options | {"warmup": True})

    def report(state: int):
        for name, kernel in built.items():
            line = {"kernel": name, "state": state, "shared": kernel.metadata.shared}
            print(json.dumps(line | {"local": local_bytes(kernel.asm["cubin"])}), flush=True)
        built.clear()

    triton.JITFunction.run = compile_only
    for state in (64, 128):
        for starts in (
            torch.zeros(1, TOKENS, dtype=torch.bool),
            None,
        ):  # the default, without documents, is told
            projected, parameters, sizes = tune.random_layer(state, torch.device("cpu"), 1, TOKENS)
            y, square, _ = t.mamba_scan(projected, parameters, sizes, starts, None, "triton", 64)
            torch.autograd.grad(y.sum().float() + square.sum(), tune.learned(projected, parameters))
        report(state)
    hidden, matrix = torch.randn(TOKENS, 512).bfloat16(), torch.randn(8192, 512).bfloat16()
    t.fused_cross_entropy(hidden, matrix, torch.zeros(TOKENS, dtype=torch.int64), 30.0, True)
    report(0)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]) if len(sys.argv) > 1 else 90)

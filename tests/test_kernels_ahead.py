"""tools/ideas/kernels_ahead.py: the process that compiles a run's kernels before they are launched,
without a GPU.

One process pretends to have a GPU of compute capability 9.0 and compiles ahead, a packed script's
kernels; another launches, on tensors of other sizes, what the readable script's model does, and
finds all of them in Triton's cache.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from tests.support import PATIENCE, run_environment, run_here, tiny
from tools import pack_script
from tools.ideas import kernels_ahead as idea

pytestmark = pytest.mark.skipif(t.triton is None, reason="needs triton")
# What it costs to test an idea that is in no run is asked for.
asked_for = pytest.mark.skipif(
    os.environ.get("KERNELS_AHEAD") != "1", reason="takes a minute: KERNELS_AHEAD=1 runs it"
)

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = 6  # multiprocessors of the GPU, and tiles of a product below

# Variables of a run whose kernels are compiled in seconds: layers of each kind, documents, masks.
RUN = {
    "VOCAB_SIZE": "1000",
    "NUM_LAYERS": "2",
    "MAMBA_LAYERS": "0",
    "MODEL_DIM": "128",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "MAMBA_EXPAND": "4",
    "MAMBA_HEAD_DIM": "32",
    "TRELLIS_STATES": "4",
}
SOME = {"scan_forward", "scan_backward", *t.MLP_TILES, "turn_rows", "round_matrix"}
SOME |= {"cross_entropy_rows", "trellis_paths"}

PRETENDED_GPU = f"""
import importlib.util, os, sys, time
from types import SimpleNamespace
import torch
import triton
from triton.backends.compiler import GPUTarget

properties = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=232_448)
properties.multi_processor_count = {PROGRAMS}
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_properties = lambda device=None: properties
gpu = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
gpu.get_current_device = lambda: 0
gpu.launcher_cls = lambda source, metadata: print("a launcher")
triton.runtime.driver.set_active(gpu)
"""

COMPILING = """
from tools.ideas import kernels_ahead as idea

spec = importlib.util.spec_from_file_location("packed", sys.argv[1])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
settings, _ = script.read_settings(dict(os.environ))
idea.compile_ahead(script, settings)
((process, _),) = idea.AHEAD
process.join()
idea.end_ahead()
"""

# All that it launches has to be compiled anew, or read from the cache: it prints which.
LAUNCHING = f"""
import json, os
from tests import compile_kernels
import torch
import triton

t = compile_kernels.t
found = []  # kernels by name, and whether the cache had them

def listen(src, cache_hit, **_):
    found.append((src.name, cache_hit))

triton.knobs.compilation.listener = listen
compiler = compile_kernels.Compiler(90)
here = {{"PRECISION": "bfloat16", "MASK_IMPOSSIBLE_PAIRS": "0"}}
settings, _ = t.read_settings(dict(os.environ) | here)
model = t.Model(settings, torch.device("cpu"), "triton")
for block in model.blocks:
    block.mlp.can_fuse = True
t.scaled_product = lambda a8, b8, a, b, dtype: torch.randn(len(a8), len(b8)).to(dtype)
tokens = torch.randint(settings.vocab_size, (3, 112))  # {PROGRAMS} tiles of 128 by 256 numbers
for float8 in ("mlp,in_proj", "none"):
    hidden = model(tokens, model.order(True), float8)
    hidden.float().square().sum().backward()
hidden, targets = hidden.detach().flatten(0, 1), tokens.flatten()
matrix = model.output_matrix.detach().to(hidden.dtype)
pairs = [targets, torch.zeros(1000, 125, dtype=torch.uint8)]
for slopes in (True, False):
    t.fused_cross_entropy(hidden, matrix, targets, settings.logit_softcap, slopes, pairs)
t.fused_trellis_search(torch.zeros(3, 7, t.TRELLIS_ROWS), settings.trellis_states)
t.fused_cross_entropy(hidden, matrix, targets, 99.0, False, pairs)  # no run's
print(json.dumps(found))
"""


def started(code: str, *arguments, **variables: str) -> subprocess.Popen:
    """A Python that runs this code in the repository's folder, with RUN's variables and these."""
    given = os.environ | RUN | {"TRITON_INTERPRET": "0"} | variables
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=given, text=True, **pipes)


def printed(code: str, *arguments, **variables: str) -> str:
    """What that code prints; it must say nothing else."""
    process = started(code, *arguments, **variables)
    out, problems = process.communicate(timeout=PATIENCE)
    assert (process.returncode, problems) == (0, "")
    return out


@asked_for
def test_a_run_finds_all_kernels_that_were_compiled_ahead(tmp_path):
    packed = tmp_path / "train_gpt.py"
    packed.write_bytes(pack_script.pack((ROOT / "train_gpt.py").read_bytes()))
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    told = printed(PRETENDED_GPU + COMPILING, packed, **cache)
    made = sorted(path.stem for path in tmp_path.glob("cache/*/*.cubin"))
    made_all = rf"kernels compiled ahead: {len(made)} in \d+\.\ds, all there are\n"
    assert re.fullmatch(made_all, told)
    assert set(made) >= SOME
    found = json.loads(printed(LAUNCHING, **cache))
    assert found.pop() == ["cross_entropy_rows", False]
    assert sorted(found) == [[name, True] for name in made]


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path):
    """Has compile_ahead() find a GPU here, in an environment without its folder."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))  # so that it is as before in the end
    monkeypatch.delenv("TRITON_CACHE_DIR")
    yield
    idea.end_ahead()


def process_gone(number: int) -> bool:
    """Whether there is no such process, not even one that has ended and was not waited for."""
    return not Path(f"/proc/{number}").exists()


def test_a_process_that_fails_or_is_late_is_a_line(pretended_gpu, monkeypatch, capfd):
    def fail(script, settings, ranks):
        os.write(1, b"noise")
        raise ValueError("no such\nkernel")

    monkeypatch.setattr(idea, "launch_kernels", fail)
    idea.compile_ahead(t, tiny())
    idea.AHEAD[0][0].join(PATIENCE)
    idea.end_ahead()
    monkeypatch.setattr(idea, "launch_kernels", lambda *values: time.sleep(PATIENCE))
    idea.compile_ahead(t, tiny())
    number = idea.AHEAD[0][0].pid
    assert not process_gone(number)
    started = time.monotonic()
    idea.end_ahead()
    idea.end_ahead()  # of a run that has none
    assert process_gone(number) and time.monotonic() - started < PATIENCE / 2
    problem = "kernels compiled ahead: 0, then ValueError: no such"
    assert capfd.readouterr() == (f"{problem}\nkernels compiled ahead: none\n", "")


# Two runs, of which one ends by itself and one is killed. Whoever has inherited `held` has ended
# once there is nothing more to read.
LATE = f"""
import os, sys, time, torch
import train_gpt as t
from tools.ideas import kernels_ahead as idea

torch.cuda.device_count = lambda: 1
idea.launch_kernels = lambda *values: time.sleep({PATIENCE})
held = os.dup(1)
for end in (lambda: sys.exit(3), lambda: os.kill(os.getpid(), 9)):
    number = os.fork()
    if not number:
        idea.compile_ahead(t, t.Settings())
        print(len(idea.AHEAD), flush=True)
        end()
    _, status = os.waitpid(number, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@asked_for
def test_it_ends_with_the_run(tmp_path):
    process = started(LATE, TRITON_CACHE_DIR=str(tmp_path))
    assert process.communicate(timeout=PATIENCE / 2) == ("1\n3\n1\n-9\n", "")


@pytest.mark.parametrize(
    ("variables", "shares"),
    [
        ({"LOCAL_RANK": "1"}, True),
        ({"EVAL_ONLY": "1"}, True),
        ({"DEVICE": "cpu"}, False),
        ({"TRITON_INTERPRET": "1"}, False),
    ],
)
def test_one_process_serves_a_machines_ranks(pretended_gpu, monkeypatch, variables, shares):
    """The others read what it makes: the same folder is theirs, but where kernels do not run."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings, _ = t.read_settings(variables)
    idea.compile_ahead(t, settings)
    assert idea.AHEAD == []
    folder = f"{os.environ['TORCHINDUCTOR_CACHE_DIR']}/triton/0"
    assert os.environ.get("TRITON_CACHE_DIR") == (folder if shares else None)


def test_where_cuda_is_in_use_nothing_is_forked(pretended_gpu, monkeypatch):
    """As in a benchmark that starts the processes whose first steps it times."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    idea.compile_ahead(t, tiny())
    assert idea.AHEAD == []
    assert "TRITON_CACHE_DIR" not in os.environ


def test_a_run_starts_it_before_cuda_is_used_and_tells_of_it_when_warm(
    monkeypatch, shards, tmp_path, capsys
):
    told, tell = multiprocessing.Pipe(duplex=False)
    process = SimpleNamespace(kill=lambda: steps.append("killed"), join=lambda: None)
    steps = []
    start_ranks = t.start_ranks

    def compile_ahead(script, settings):
        steps.append("ahead")
        tell.send("22 in 20.4s")
        idea.AHEAD.append((process, told))

    monkeypatch.setattr(idea, "compile_ahead", compile_ahead)
    monkeypatch.setattr(t, "start_ranks", lambda s: steps.append("ranks") or start_ranks(s))
    monkeypatch.setattr(t.Trainer, "warm_up", t.Trainer.warm_up)  # so that it is as before
    idea.install(t)
    assert run_here(monkeypatch, run_environment(shards, tmp_path, iterations=1)) == 0
    assert steps == ["ahead", "ranks", "killed"]
    before, line, after = capsys.readouterr().out.partition("kernels compiled ahead: 22 in 20.4s\n")
    assert line and "warming up" in before and after.startswith("ready after")

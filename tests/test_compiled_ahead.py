"""The process that compiles a run's kernels before they are launched, without a GPU.

One process pretends to have a GPU of compute capability 9.0 and compiles ahead, a packed script's
kernels; another launches, on tensors of other sizes, what the readable script's model does. Of each
launch Triton would look up the same in its cache. What really compiles takes most of a minute:
KERNELS_AHEAD=1 runs it, too.
"""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from tests import forked
from tests.support import PATIENCE, process_environment, run_environment, run_here, tiny
from tools import pack_script

pytestmark = pytest.mark.skipif(
    t.triton is None or sys.platform != "linux", reason="needs triton, and Linux"
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
SCAN = {"scan_forward", "scan_backward"}
FLOAT8 = {"turn_rows", "round_matrix"}
SOME = {*SCAN, *t.MLP_TILES, *FLOAT8, "cross_entropy_rows", "trellis_paths"}

PRETENDED_GPU = f"""
import hashlib, importlib.util, json, os, sys
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

# Instead of compiling, a line of a file says what, and by which options: what the cache goes by.
NOTING = """
def note(src, target=None, options=None, **_):
    key = f"{src.hash()} {sorted(options.items())}"
    key = hashlib.sha256(key.encode()).hexdigest()
    with open(f"{sys.argv[3]}/{variant}", "a") as notes:
        print(src.name, key, file=notes)
    return SimpleNamespace(hash=key, src=src, metadata=None)

triton.compiler.compile = note
"""

COMPILING = """
spec = importlib.util.spec_from_file_location("packed", sys.argv[1])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
for variant, changes in json.loads(sys.argv[2]).items():
    settings, _ = script.read_settings(dict(os.environ) | changes)
    script.compile_ahead(settings)
    ((process, _),) = script.AHEAD
    process.join()
    script.end_ahead(print)
"""

# All that it launches has to be compiled anew, or read from the cache: it prints which.
LAUNCHING = f"""
import json, os
from tests import compile_kernels
import torch
import triton

t = compile_kernels.t
variant = "run"
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

# Settings of runs that launch less than RUN's, and what they do not launch of SOME.
LESS = {
    "no Mamba layers": ({"MAMBA_LAYERS": "none"}, SCAN),
    "another scan": ({"SCAN_BACKEND": "chunked"}, SCAN),
    "no MLP": ({"MLP_LAYERS": "none", "FLOAT8_PRODUCTS": "none"}, {*t.MLP_TILES, *FLOAT8}),
    "no trellis": ({"TRELLIS_STATES": "0"}, {"trellis_paths"}),
}
ALL_MADE = r"kernels compiled ahead: (\d+) in \d+\.\ds, all there are"


def printed(code: str, *arguments, **variables: str) -> list[str]:
    """The lines that a Python prints which runs this code in the repository's folder, with RUN's
    variables and these; it must say nothing else.
    """
    given = os.environ | RUN | {"TRITON_INTERPRET": "0"} | variables
    command = [sys.executable, "-c", code, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": PATIENCE}
    done = subprocess.run(command, cwd=ROOT, env=given, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def packed(folder: Path) -> Path:
    """The script as it is handed in."""
    path = folder / "train_gpt.py"
    path.write_bytes(pack_script.pack((ROOT / "train_gpt.py").read_bytes()))
    return path


def test_what_is_compiled_ahead_is_what_a_run_launches(tmp_path):
    variants = {"all": {}} | {name: changes for name, (changes, _) in LESS.items()}
    notes = tmp_path / "notes"
    notes.mkdir()
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    code = PRETENDED_GPU + NOTING + COMPILING + LAUNCHING
    *told, found = printed(code, packed(tmp_path), json.dumps(variants), notes, **cache)
    assert found == "[]"  # nothing was compiled
    made = {path.name: path.read_text().splitlines() for path in notes.iterdir()}
    *run, other = made.pop("run")
    assert other.startswith("cross_entropy_rows ") and other not in run
    assert sorted(made["all"]) == sorted(run)
    counts = [re.fullmatch(ALL_MADE, line)[1] for line in told]
    assert counts == [str(len(made[name])) for name in variants]
    lacking = {name: SOME - {x.partition(" ")[0] for x in lines} for name, lines in made.items()}
    assert lacking == {"all": set()} | {name: names for name, (_, names) in LESS.items()}


@pytest.mark.skipif(os.environ.get("KERNELS_AHEAD") != "1", reason="KERNELS_AHEAD=1 runs it")
def test_a_run_finds_all_kernels_that_were_compiled_ahead(tmp_path):
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    (told,) = printed(PRETENDED_GPU + COMPILING, packed(tmp_path), '{"all": {}}', **cache)
    made = sorted(path.stem for path in tmp_path.glob("cache/*/*.cubin"))
    assert re.fullmatch(ALL_MADE, told)[1] == str(len(made))
    assert set(made) >= SOME
    found = json.loads(*printed(LAUNCHING, **cache))
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
    t.end_ahead(lambda line: None)


def process_gone(number: int) -> bool:
    """Whether there is no such process, not even one that has ended and was not waited for."""
    return not Path(f"/proc/{number}").exists()


def fail(*_) -> None:
    os.write(1, b"noise")
    raise ValueError("no such\nkernel")


def be_killed(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_late(*_) -> None:
    time.sleep(PATIENCE)


@pytest.mark.parametrize(
    ("work", "waits", "told"),
    [
        (fail, True, "0, then ValueError: no such"),
        (be_killed, True, "none"),
        (be_late, False, "none"),
    ],
)
def test_a_process_that_fails_or_is_late_is_a_line(
    pretended_gpu, monkeypatch, capfd, work, waits, told
):
    lines = []
    monkeypatch.setattr(t, "launch_kernels", work)
    t.compile_ahead(tiny())
    process = t.AHEAD[0][0]
    if waits:
        process.join(PATIENCE)
    assert waits != process.is_alive()
    started = time.monotonic()
    t.end_ahead(lines.append)
    t.end_ahead(lines.append)  # of a run that has none
    assert process_gone(process.pid) and time.monotonic() - started < PATIENCE / 2
    assert lines == [f"kernels compiled ahead: {told}"]
    assert capfd.readouterr() == ("", "")


# A run with a late process, up to where it would open its shards, and ends as the argument says.
# Whoever has inherited `held` has ended once there is nothing more to read.
ENDING_RUN = f"""
import os, signal, sys, time
import torch
import train_gpt as t

def choose_device(*_):
    print(len(t.AHEAD), "process,", len(os.listdir("/proc/self/task")), "thread", flush=True)
    return torch.device("cpu")

def end(*_):
    exec(compile(ending, "ending", "exec"))
    time.sleep({PATIENCE})

held = os.dup(1)
ending = sys.argv.pop()
torch.cuda.device_count = lambda: 1
t.choose_device = choose_device
t.launch_kernels = lambda *_: time.sleep({PATIENCE})
t.open_shards = end
sys.exit(t.run())
"""


@pytest.mark.parametrize(
    ("ending", "status", "told"),
    [
        ("raise t.UserError('no shards')", 2, "no shards"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 2, "stopped by SIGTERM"),
        ("os.killpg(0, signal.SIGINT)", 2, "stopped by SIGINT"),  # as Ctrl-C: to both
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
)
def test_it_ends_with_the_run(shards, tmp_path, ending, status, told):
    """Whatever ends that; it is forked before there are threads, and says nothing itself."""
    environment = run_environment(shards, tmp_path, device="auto")
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    process = forked.Popen(
        [sys.executable, "-c", ENDING_RUN, ending],
        env=process_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    out, error = process.communicate(timeout=PATIENCE / 2)
    assert process.returncode == status
    assert out.startswith("1 process, 1 thread\n")
    assert error.count("\n") == bool(told) and told in error


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
    t.compile_ahead(settings)
    assert t.AHEAD == []
    folder = f"{os.environ['TORCHINDUCTOR_CACHE_DIR']}/triton/0"
    assert os.environ.get("TRITON_CACHE_DIR") == (folder if shares else None)


def test_where_it_cannot_be_started_the_run_goes_on(pretended_gpu, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)  # no fork survives that
        t.compile_ahead(tiny())
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tmp_path}/file/cache")
        t.compile_ahead(tiny())
    assert "TRITON_CACHE_DIR" not in os.environ
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", lambda: os.stat(tmp_path / "missing"))  # or any OSError
        t.compile_ahead(tiny())
    assert t.AHEAD == []


def test_a_run_starts_it_before_cuda_is_used_and_logs_it_when_warm(
    monkeypatch, shards, tmp_path, capsys
):
    told, tell = multiprocessing.Pipe(duplex=False)
    process = SimpleNamespace(kill=lambda: steps.append("killed"), join=lambda: None)
    steps = []
    start_ranks = t.start_ranks

    def compile_ahead(settings):
        steps.append("ahead")
        tell.send("22 in 20.4s")
        t.AHEAD.append((process, told))

    monkeypatch.setattr(t, "compile_ahead", compile_ahead)
    monkeypatch.setattr(t, "start_ranks", lambda s: steps.append("ranks") or start_ranks(s))
    assert run_here(monkeypatch, run_environment(shards, tmp_path, iterations=1)) == 0
    assert steps == ["ahead", "ranks", "killed"]
    before, line, after = capsys.readouterr().out.partition("kernels compiled ahead: 22 in 20.4s\n")
    assert line and "warming up" in before and after.startswith("ready after")


def test_variants_have_none(monkeypatch, explore_here):
    """Nor has what else trains by parts of the script and is no run: a run's prepare_run() does."""
    monkeypatch.setattr(t, "compile_ahead", fail)
    status, lines, _ = explore_here("a: ITERATIONS=1")
    assert status == 0 and len(lines) == 1

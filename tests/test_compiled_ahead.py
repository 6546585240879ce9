"""The processes that compile what a run is about to launch, without a GPU.

Kernels: one process pretends to have a GPU of compute capability 9.0 and compiles ahead, a packed
script's kernels; another launches, on tensors of other sizes, what the readable script's model
does. Of each launch Triton would look up the same in its cache.

Updates, what torch compiles of a step behind its gradients, the average and calibration's
attention: a note of all that its caches go by stands in the compiler's place, and is the same of
a run's as of those made ahead.

What really compiles takes minutes: SLOW_TESTS=1 runs it, too.
"""

import collections
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from tests import forked
from tests.support import (
    CPU,
    PATIENCE,
    Quiet,
    process_environment,
    run_environment,
    run_here,
    run_ranks,
    slow,
    tiny,
)
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
    settings, _ = script.read_settings(dict(os.environ) | {"COMPILE": "off"} | changes)
    script.compile_ahead(settings)
    ((_, process, _),) = script.AHEAD
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


@slow
def test_a_run_finds_all_kernels_that_were_compiled_ahead(tmp_path):
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    (told,) = printed(PRETENDED_GPU + COMPILING, packed(tmp_path), '{"all": {}}', **cache)
    made = sorted(path.stem for path in tmp_path.glob("cache/*/*.cubin"))
    assert re.fullmatch(ALL_MADE, told)[1] == str(len(made))
    assert set(made) >= SOME
    found = json.loads(*printed(LAUNCHING, **cache))
    assert found.pop() == ["cross_entropy_rows", False]
    assert sorted(found) == [[name, True] for name in made]


# ---- Updates -------------------------------------------------------------------------------------

UPDATES = {"judge_gradients", "momentum_updates", "even_out_rows", "apply_updates", "take_in"}
AVERAGES = ["ema", "swa", "ema+swa", "none"]


def described(x, storages: dict):
    """All of an argument that torch's caches go by, but a tensor's numbers; which share storage."""
    if not isinstance(x, torch.Tensor):
        return repr(x)
    storage = x.untyped_storage()
    place = storages.setdefault(storage.data_ptr(), len(storages)), x.storage_offset()
    size = tuple(x.shape), x.stride(), storage.nbytes(), x.data_ptr() % 16
    return (*size, *place, x.dtype, x.device, x.requires_grad, type(x))


@pytest.fixture
def given(monkeypatch) -> dict[int, set]:
    """By rank, what the compiler is given of UPDATES: each one's name, options and arguments, and
    whether gradients are recorded. It returns functions as they are.
    """
    given = collections.defaultdict(set)

    def maybe_compile(function, settings, ranks, options=None):
        def noting(*arguments):
            values, structure = torch.utils._pytree.tree_flatten(arguments)
            storages = {}
            values = tuple(described(x, storages) for x in values)
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            given[ranks.rank].add((function.__name__, repr(options), modes, structure, values))
            return function(*arguments)

        return noting if function.__name__ in UPDATES else function

    monkeypatch.setattr(t, "maybe_compile", maybe_compile)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return given


def settings_with_updates(tokenizer: Path, **changes) -> t.Settings:
    """Of a model with every kind of parameter and group of Muon's."""
    changes = {"muon_beta2": 0.95, "muon_row_groups": True, "spelling_features": 100} | changes
    return tiny(tokenizer_path=str(tokenizer), warmup_steps=1, quantizer="round", **changes)


def make_updates_ahead(settings: t.Settings, rank: int = 0, world_size: int = 1) -> list[list]:
    """What both processes do that compile for a rank behind its gradients; what each of them says
    before and behind that.
    """
    said = []
    ranks = t.RanksApart(rank, world_size, CPU)
    for work in (t.compile_updates, t.compile_others):
        words = []
        pipe = SimpleNamespace(recv=lambda words=words: words.append("waits"))
        work(settings, ranks, pipe, lambda words=words: words.append("made"))
        said.append(words)
    return said


def make_updates(settings: t.Settings, ranks: t.Ranks):
    """Those of a run's warm-up, in which it compiles them."""
    tokens = t.choose_micro_batch(settings, ranks, free=math.inf)
    model = t.build_model(settings, ranks)
    t.Trainer(model, settings, ranks, tokens, 1e6, Quiet()).warm_up()


def expected_updates(average: str) -> list[str]:
    """Names of what a step gives to the compiler, as often as it does: an average for each kind."""
    averages = [] if average == "none" else ["take_in"] * len(average.split("+"))
    return sorted([*UPDATES - {"take_in"}, *averages])


def names(notes: set) -> list[str]:
    return sorted(name for name, *_ in notes)


@pytest.mark.parametrize("average", AVERAGES)
def test_updates_that_are_compiled_ahead_are_a_runs(given, byte_tokenizer, average):
    settings = settings_with_updates(byte_tokenizer, average=average)
    assert make_updates_ahead(settings) == [["waits", "made"]] * 2
    ahead = given.pop(0)
    make_updates(settings, t.Ranks(0, 1, CPU))
    assert ahead == given.pop(0)
    assert names(ahead) == expected_updates(average)


@pytest.mark.parametrize("changes", [{}, {"spelling_features": 0, "muon_beta2": 0.0}])
def test_each_rank_compiles_its_own_ahead(given, byte_tokenizer, changes):
    """Shares of matrices begin elsewhere, and gradients are views of what the ranks exchange."""
    settings = settings_with_updates(byte_tokenizer, average="ema+swa", **changes)
    for rank in range(2):
        make_updates_ahead(settings, rank, 2)
    ahead = dict(given)
    given.clear()
    run_ranks(2, lambda ranks: make_updates(settings, ranks))
    assert ahead == given
    assert ahead[0] != ahead[1]  # else nothing was compared that a rank has for itself
    lacking = {"even_out_rows"} if changes else set()
    for rank in range(2):
        assert set(names(ahead[rank])) == UPDATES - lacking


@pytest.mark.parametrize(
    "changes", [{}, {"sdclip_by_row": 0.5}, {"micro_batch_tokens": 64, "document_scope": "scans"}]
)
def test_calibrations_attention_is_compiled_ahead_as_a_run_calls_it(
    given, monkeypatch, byte_tokenizer, changes
):
    """With gradients or without, and of as many windows at once."""
    calls = []
    attend, collect_costs = t.attend, t.collect_costs

    def noting(query, key, value, documents, backend):
        tensors = query, key, value, *(documents or ())
        calls.append([torch.is_grad_enabled(), backend, *(described(x, {}) for x in tensors)])
        return attend(query, key, value, documents, backend)

    def calibrating(*arguments):
        calls.clear()
        return collect_costs(*arguments)

    monkeypatch.setattr(t, "attend", noting)
    monkeypatch.setattr(t, "collect_costs", calibrating)
    changes = {"quantizer": "gptq", "mamba_layers": "0", "document_reset": True} | changes
    settings = replace(settings_with_updates(byte_tokenizer), **changes)
    assert make_updates_ahead(settings)[1] == ["waits", "made", "made"]
    ahead = list(calls)
    make_updates(settings, t.Ranks(0, 1, CPU))
    assert len(ahead) == 1
    assert calls == ahead * (settings.num_layers - 1)


@pytest.mark.parametrize("changes", [{"mamba_layers": "all"}, {"quantizer": "round"}])
def test_no_attention_is_compiled_ahead_where_none_is_calibrated(given, byte_tokenizer, changes):
    settings = replace(settings_with_updates(byte_tokenizer), **changes)
    assert make_updates_ahead(settings)[1] == ["waits", "made"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_rank_apart_gets_tensors_like_those_of_a_rank(monkeypatch, world_size):
    def gather(whole, part):
        assert part.is_contiguous()
        whole.copy_(torch.cat([part] * world_size))

    monkeypatch.setattr(t.dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(t.dist, "all_gather_into_tensor", gather)
    last = world_size - 1, world_size, CPU
    apart, rank = t.RanksApart(*last), t.Ranks(*last)
    numbers = torch.arange(24.0)
    for tensor in (numbers, numbers.view(2, 3, 4).mT, numbers.bfloat16()[8:].view(4, 4)):
        assert apart.sum_(tensor) is tensor
        assert rank.sum_(tensor) is tensor
        found, wanted = apart.concatenate(tensor), rank.concatenate(tensor)
        assert described(found, {}) == described(wanted, {})
        assert (found is tensor) == (wanted is tensor)
        assert found.equal(wanted)


COMPILING_UPDATES = """
import json, sys
import torch
import train_gpt as t
from tests import test_compiled_ahead as tests

t.prepare_torch()
torch.cuda.set_device = lambda device: None
what, tokenizer = sys.argv[1:]
small = {"num_layers": 2, "mamba_layers": "0", "muon_backend_steps": 1, "compile": "on"}
settings = tests.settings_with_updates(tokenizer, average="ema+swa", **small)
if what == "ahead":
    tests.make_updates_ahead(settings)
else:
    compiled, chosen = t.maybe_compile, tests.UPDATES  # not the loss, which takes longest
    t.maybe_compile = lambda f, *options: compiled(f, *options) if f.__name__ in chosen else f
    tests.make_updates(settings, t.Ranks(0, 1, tests.CPU))
counters = torch._dynamo.utils.counters
caches = {"aot_autograd": "autograd_cache", "inductor": "fxgraph_cache"}
print(json.dumps([counters[x][f"{y}_{z}"] for x, y in caches.items() for z in ("hit", "miss")]))
"""


@slow
def test_a_run_finds_all_updates_that_were_compiled_ahead(tmp_path, byte_tokenizer):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    count = len(expected_updates("ema+swa"))
    for what, counts in (("ahead", [0, count, 0, count]), ("run", [count, 0, count, 0])):
        (found,) = printed(COMPILING_UPDATES, what, byte_tokenizer, **cache)
        assert json.loads(found) == counts


# ---- Processes -----------------------------------------------------------------------------------

OTHERS = "average and attention"


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path):
    """Has compile_ahead() find a GPU here, in an environment without its folder, and
    compile_updates() compute on the CPU.
    """
    apart = t.RanksApart
    monkeypatch.setattr(t, "RanksApart", lambda rank, count, gpu: apart(rank, count, CPU))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
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


WORKS = {"kernels": "launch_kernels", "updates": "Optimizers", OTHERS: "compile_average"}


@pytest.mark.parametrize("what", WORKS)
@pytest.mark.parametrize(
    ("work", "waits", "told"),
    [
        (fail, True, "0, then ValueError: no such"),
        (be_killed, True, "none"),
        (be_late, False, "none"),
    ],
)
def test_a_process_that_fails_or_is_late_is_a_line(
    pretended_gpu, monkeypatch, capfd, what, work, waits, told
):
    """Whatever the others do, which are late here."""
    lines = []
    wanted = dict.fromkeys(WORKS, "none") | {what: told}
    for name, function in WORKS.items():
        monkeypatch.setattr(t, function, work if name == what else be_late)
    t.compile_ahead(tiny())
    processes = {ahead.what: ahead.process for ahead in t.AHEAD}
    assert set(processes) == set(wanted)
    t.allow_updates_ahead(math.inf, 0)
    if waits:
        processes[what].join(PATIENCE)
    alive = {name for name, process in processes.items() if process.is_alive()}
    assert alive == set(wanted) - ({what} if waits else set())
    started = time.monotonic()
    t.end_ahead(lines.append)
    t.end_ahead(lines.append)  # of a run that has none
    assert all(process_gone(process.pid) for process in processes.values())
    assert time.monotonic() - started < PATIENCE / 2
    expected = [f"{name} compiled ahead: {told}" for name, told in wanted.items()]
    assert sorted(lines) == sorted(expected)
    assert capfd.readouterr() == ("", "")


def test_updates_wait_until_they_are_told_to_begin(pretended_gpu, monkeypatch):
    monkeypatch.setattr(t, "launch_kernels", lambda *_: None)
    for begins, told in ((False, "none"), (True, r"1 in \d+\.\ds, all there are")):
        lines = []
        t.compile_ahead(tiny(quantizer="round"))
        _, *waiting = t.AHEAD
        if begins:
            t.allow_updates_ahead(math.inf, 0)
        for _, process, pipe in waiting:
            if begins:
                process.join(PATIENCE)
            assert pipe.poll(0.3) == begins
        t.end_ahead(lines.append)
        for what, line in zip((OTHERS, "updates"), lines, strict=False):
            assert re.fullmatch(f"{what} compiled ahead: {told}", line)


def test_updates_are_told_to_begin_where_memory_is_spare(monkeypatch):
    pipes = {what: multiprocessing.Pipe() for what in WORKS}
    ahead = [t.Ahead(what, None, here) for what, (here, _) in pipes.items()]
    monkeypatch.setattr(t, "AHEAD", ahead)
    needed = t.CONTEXT_BYTES + t.UPDATE_BYTES * 1000
    for spare, begins in ((-1e9, False), (0, False), (needed, False), (needed + 1, True)):
        t.allow_updates_ahead(spare, 1000)
        told = [what for what, (_, there) in pipes.items() if there.poll()]
        assert told == (["updates", OTHERS] if begins else [])
    assert [pipes[what][1].recv() for what in told] == ["begin"] * 2
    pipes["updates"][1].close()  # it has ended: nobody is told, and the other one is
    t.allow_updates_ahead(math.inf, 1000)
    assert pipes[OTHERS][1].poll()


# A run with late processes, up to where it would open its shards, and ends as the argument says.
# Whoever has inherited `held` has ended once there is nothing more to read. They may be
# slow to begin, and then there is no parent any more whose end could end them.
ENDING_RUN = f"""
import os, signal, sys, time
import torch
import train_gpt as t

def choose_device(*_):
    t.allow_updates_ahead(1e18, 0)
    print(len(t.AHEAD), "processes,", len(os.listdir("/proc/self/task")), "thread", flush=True)
    return torch.device("cpu")

def end(*_):
    exec(compile(ending, "ending", "exec"))
    time.sleep({PATIENCE})

held = os.dup(1)
_, ending, late = sys.argv
begin = t.work_ahead
t.work_ahead = lambda *values: time.sleep(float(late)) or begin(*values)
sys.argv[1:] = []
torch.cuda.device_count = lambda: 1
t.choose_device = choose_device
t.launch_kernels = torch.cuda.set_device = lambda *_: time.sleep({PATIENCE})
t.open_shards = end
sys.exit(t.run())
"""


@pytest.mark.parametrize(
    ("ending", "late", "status", "told"),
    [
        ("raise t.UserError('no shards')", 0, 2, "no shards"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 0, 2, "stopped by SIGTERM"),
        ("os.killpg(0, signal.SIGINT)", 0, 2, "stopped by SIGINT"),  # as Ctrl-C: to all
        ("os.kill(os.getpid(), signal.SIGKILL)", 0, -signal.SIGKILL, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", 0.5, -signal.SIGKILL, ""),
    ],
)
def test_they_end_with_the_run(shards, tmp_path, ending, late, status, told):
    """Whatever ends that; they are forked before there are threads, and say nothing themselves."""
    environment = run_environment(shards, tmp_path, device="auto")
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    process = forked.Popen(
        [sys.executable, "-c", ENDING_RUN, ending, str(late)],
        env=process_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    out, error = process.communicate(timeout=PATIENCE / 2)
    assert process.returncode == status
    assert out.startswith("3 processes, 1 thread\n")
    assert error.count("\n") == bool(told) and told in error


@pytest.mark.parametrize(
    ("variables", "started", "shares"),
    [
        ({"LOCAL_RANK": "0"}, ["kernels", "updates", OTHERS], True),
        ({"LOCAL_RANK": "1"}, ["updates", OTHERS], True),
        ({"LOCAL_RANK": "2"}, [], False),  # there are two GPUs
        ({"COMPILE": "off"}, ["kernels"], True),
        ({"EVAL_ONLY": "1"}, [], True),
        ({"DEVICE": "cpu"}, [], False),
        ({"TRITON_INTERPRET": "1"}, [], False),
    ],
)
def test_one_process_compiles_the_kernels_of_a_machines_ranks(
    pretended_gpu, monkeypatch, variables, started, shares
):
    """The others read what it makes: the same folder is theirs, but where kernels do not run."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings, _ = t.read_settings(variables)
    t.compile_ahead(settings)
    assert [what for what, *_ in t.AHEAD] == started
    folder = f"{os.environ['TORCHINDUCTOR_CACHE_DIR']}/triton/0"
    assert os.environ.get("TRITON_CACHE_DIR") == (folder if shares else None)


def test_a_rank_compiles_for_its_own_gpu_and_place(pretended_gpu, monkeypatch):
    started = []
    monkeypatch.setattr(t, "RanksApart", lambda *values: values)
    monkeypatch.setattr(t, "start_ahead", lambda what, function, s, ranks: started.append(ranks))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    places = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    for name, value in (places | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    t.compile_ahead(tiny())
    assert started == [(3, 4, torch.device("cuda", 1))] * 2


def test_where_none_can_be_started_the_run_goes_on(pretended_gpu, monkeypatch, tmp_path):
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


def test_a_run_starts_them_before_cuda_is_used_and_logs_them_when_warm(
    monkeypatch, shards, tmp_path, capsys
):
    """And says what is spare once it has chosen its tokens at once, before the first step."""
    steps = []
    process = SimpleNamespace(kill=lambda: steps.append("killed"), join=lambda: None)
    start_ranks, step = t.start_ranks, t.Optimizers.step
    environment = run_environment(shards, tmp_path, iterations=1)
    settings, _ = t.read_settings(environment)
    count = sum(p.numel() for p in t.build_model(settings, t.Ranks(0, 1, CPU)).parameters())
    spare = 1e9 - settings.train_batch_tokens * t.token_bytes(settings, gpu=True)

    def compile_ahead(settings):
        steps.append("ahead")
        for what in ("kernels", "updates"):
            told, tell = multiprocessing.Pipe(duplex=False)
            tell.send("22 in 20.4s")
            t.AHEAD.append(t.Ahead(what, process, told))

    def first_step(optimizers, *rates):
        steps.append("step")
        return step(optimizers, *rates)

    monkeypatch.setattr(t, "compile_ahead", compile_ahead)
    monkeypatch.setattr(t, "start_ranks", lambda s: steps.append("ranks") or start_ranks(s))
    monkeypatch.setattr(t, "allow_updates_ahead", lambda *values: steps.append(values))
    monkeypatch.setattr(t.Optimizers, "step", first_step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**10))
    assert run_here(monkeypatch, environment) == 0
    warm = ["step"] * settings.warmup_steps
    assert steps == ["ahead", "ranks", (spare, count), *warm, "killed", "killed", "step"]
    lines = "".join(f"{what} compiled ahead: 22 in 20.4s\n" for what in ("updates", "kernels"))
    before, found, after = capsys.readouterr().out.partition(lines)
    assert found and "warming up" in before and after.startswith("ready after")


def test_variants_have_none(monkeypatch, explore_here):
    """Nor has what else trains by parts of the script and is no run: a run's prepare_run() does."""
    monkeypatch.setattr(t, "compile_ahead", fail)
    status, lines, _ = explore_here("a: ITERATIONS=1")
    assert status == 0 and len(lines) == 1

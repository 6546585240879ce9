"""Idea: a process beside the run compiles its Triton kernels before the run launches them.

    python -m bench.bench startup --idea tools/ideas/kernels_ahead.py

Triton compiles a kernel when it is first launched: in a cold start one after the other, some 20
seconds in all, in the process that also has all of torch's compiler to run. Here another process
launches what a step does as soon as the ranks start, on tensors without data ("meta"), by launches
that end when the kernel is compiled. The run finds it in Triton's cache, which goes by a kernel's
text, its arguments' types and constants, and the kind of GPU. bench/NOTES.md says what this should
gain, and how that is measured. A process that fails, or is late, changes nothing else.
"""

import atexit
import ctypes
import math
import multiprocessing
import os
import signal
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

AHEAD = []  # of compile_ahead(): its process, and where that tells what it has made


class OnTheGpu(torch.Tensor):
    """A tensor without data that says it lies on a GPU, for code that asks it which."""

    is_cuda = True
    device = torch.device("cuda", 0)


def install(script) -> None:
    """Starts the process before the ranks start, and ends it when the model is warm."""
    start_ranks = script.start_ranks
    warm_up = script.Trainer.warm_up

    def start_behind_it(settings):
        compile_ahead(script, settings)
        return start_ranks(settings)

    def warm_up_and_end_it(trainer):
        warm_up(trainer)
        end_ahead()

    script.start_ranks = start_behind_it
    script.Trainer.warm_up = warm_up_and_end_it


def compile_ahead(script, settings) -> None:
    """Starts the process for a run that trains on a GPU; end_ahead() ends it, or the run's end.

    It is forked, since importing torch takes long. Where CUDA is in use, which survives no fork, as
    in a process that only starts others to time them, nothing is done.
    """
    gpus = 0 if settings.device == "cpu" else torch.cuda.device_count()
    interpreted = script.triton is None or os.environ.get("TRITON_INTERPRET") == "1"
    if not gpus or interpreted or torch.cuda.is_initialized():
        return
    # Not earlier: torch's compiler reads variables that prepare_torch() sets when it is imported.
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    # torch's compiler would choose it later, for each GPU another: one process serves them all.
    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(0))
    _, local_rank, world_size = script.read_launch(dict(os.environ))
    if local_rank or settings.eval_only:  # an artifact's settings are not known yet
        return
    told, tell = multiprocessing.Pipe(duplex=False)
    ranks = script.Ranks(0, world_size, torch.device("cuda", 0))
    forking = multiprocessing.get_context("fork")
    values = script, settings, ranks, tell
    process = forking.Process(target=compile_kernels, args=values, daemon=True)
    process.start()
    tell.close()
    atexit.register(process.kill)
    AHEAD.append((process, told))


def end_ahead() -> None:
    """Ends compile_ahead()'s process, if there is one, and prints what it has made."""
    while AHEAD:
        process, told = AHEAD.pop()
        process.kill()
        process.join()
        print(f"kernels compiled ahead: {last_told(told)}", flush=True)


def last_told(told) -> str:
    """The newest message in a pipe whose other end is closed, or "none"."""
    newest = "none"
    try:
        while told.poll():
            newest = told.recv()
    except EOFError:
        pass
    return newest


def compile_kernels(script, settings, ranks, tell) -> None:
    """What the process does. It tells how many kernels Triton's cache has by then, and when."""
    ctypes.CDLL(None).prctl(script.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    started = time.monotonic()
    made = set()
    run = script.triton.JITFunction.run

    def compile_only(kernel, *arguments, **options):
        gpu = script.triton.runtime.driver.active
        gpu.get_current_stream = lambda device: 0  # a real one would take some of the GPU's memory
        compiled = run(kernel, *arguments, **options | {"warmup": True})
        if compiled.hash not in made:
            gpu.launcher_cls(compiled.src, compiled.metadata)  # until triton 3.6 a compiler's work
            made.add(compiled.hash)
            tell.send(count())

    def count() -> str:
        return f"{len(made)} in {time.monotonic() - started:.1f}s"

    script.triton.JITFunction.run = compile_only
    try:
        take_meta_for_gpu(script, ranks.device)
        with torch.device("meta"), OwnCode(script):
            launch_kernels(script, settings, ranks)
        tell.send(f"{count()}, all there are")
    except Exception as error:
        tell.send(f"{len(made)}, then {type(error).__name__}: {error}".splitlines()[0])


def take_meta_for_gpu(script, gpu: torch.device) -> None:
    """Has the script launch kernels on tensors without data as on this GPU, whose limits it reads
    and whose multiprocessors it counts.
    """
    limits = script.kernel_limits
    launch_product = script.launch_product

    def launch_as_on_gpu(kernel, named, *arguments):
        signs = named["signs"].as_subclass(OnTheGpu)
        return launch_product(kernel, named | {"signs": signs}, *arguments)

    script.kernel_limits = lambda device: limits(gpu if device.type == "meta" else device)
    script.launch_product = launch_as_on_gpu


class OwnCode(TorchDispatchMode):
    """While entered, the script's operators run on tensors without data, for which torch has their
    fakes.
    """

    def __init__(self, script):
        super().__init__()
        members = vars(script).values()
        defined = [x for x in members if isinstance(x, torch.library.CustomOpDef)]
        self.ours = {x._opoverload: x._init_fn for x in defined}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        """Runs an operator of ours by its own code, any other as torch does."""
        return self.ours.get(operator, operator)(*args, **kwargs or {})


def launch_kernels(script, settings, ranks) -> None:
    """Launches, by these settings, all that a step does, forward and backward, and the export."""
    s = settings
    gpu = ranks.device
    model = script.model_skeleton(s)
    model.compute_dtype = script.activation_dtype(s, gpu)
    shape = script.choose_micro_batch(s, ranks, free=math.inf) // s.train_seq_len, s.train_seq_len
    x = torch.empty(*shape, s.model_dim, dtype=model.compute_dtype, requires_grad=True)
    for float8 in (script.choose_float8(model, s, gpu), "none"):  # which is what all but steps has
        launch_layers(script, s, gpu, x, float8)
    hidden = x.detach().flatten(0, 1)
    output_matrix = torch.empty(s.vocab_size, s.model_dim, dtype=x.dtype)
    targets = torch.empty(len(hidden), dtype=torch.int64)
    impossible = torch.empty(s.vocab_size, -(-s.vocab_size // 8), dtype=torch.uint8)
    pairs = [targets, impossible] if s.mask_impossible_pairs else []
    for slopes in (True, False):
        script.fused_cross_entropy(hidden, output_matrix, targets, s.logit_softcap, slopes, pairs)
    if s.trellis_states:
        script.fused_trellis_search(torch.empty(3, 1, script.TRELLIS_ROWS), s.trellis_states)


def launch_layers(script, settings, gpu: torch.device, x: torch.Tensor, float8: str) -> None:
    """Launches what a Mamba layer and an MLP do with x (B, L, D), forward and backward."""
    s = settings
    start = torch.empty(x.shape[:2], dtype=torch.bool) if s.document_reset else None
    some_mamba = script.parse_layers(s, "mamba_layers")
    scan = script.choose_scan_backend(s, gpu) if some_mamba else "none"
    if scan == "triton":
        context = script.Context(start, turns=None, float8=float8)
        y, _ = script.Mamba(s, scan)(x, context)
        y.sum().backward()
    if script.parse_layers(s, "mlp_layers"):
        mlp = script.MLP(s, gpu)
        add = mlp.in_float8 if "mlp" in float8 else mlp
        add(x, 1.0).sum().backward()

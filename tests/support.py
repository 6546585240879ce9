"""What several test files share: tiny settings, random models, shards, and ranks that live in
threads of one process.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import queue
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt as t

CPU = torch.device("cpu")
PATIENCE = 300.0  # seconds that another process may take: machines that are shared stall
SOLO = t.Ranks(0, 1, CPU)
# Tests of half a minute that change with few files: CONTRIBUTING.md says when they are to run.
slow = pytest.mark.skipif(os.environ.get("SLOW_TESTS") != "1", reason="SLOW_TESTS=1 runs it")

# A model of some ten thousand parameters: layers Mamba, attention, Mamba.
SMALL = t.PLAIN | {
    "preset": "tiny",
    "vocab_size": 512,
    "train_seq_len": 32,
    "train_batch_tokens": 128,
    "num_layers": 3,
    "mamba_layers": "0,2",
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mamba_d_state": 8,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 8,
    "bigram_vocab_size": 64,
    "bigram_dim": 8,
    "eval_stride": 8,
    "val_batch_size": 128,
    "ttt_chunk_tokens": 64,
    "ttt_lora_rank": 3,
    "ttt_lora_lr": 0.02,
    "ttt_lora_piece": 8,
    "ttt_lora_slots": 3,
    "calibration_tokens": 256,
    "sdclip_k": 5.0,
    "warmup_steps": 0,
}

# A model of one Mamba and one attention layer, read in some milliseconds.
SMALLEST = {
    "num_layers": 2,
    "mamba_layers": "0",
    "mlp_mult": 1.0,
    "vocab_size": 16,
    "model_dim": 8,
    "num_heads": 1,
    "num_kv_heads": 1,
    "mamba_head_dim": 8,
    "bigram_vocab_size": 2,
    "bigram_dim": 2,
}


def tiny(**overrides) -> t.Settings:
    """Settings of a model small enough to run in milliseconds."""
    return t.Settings(**(SMALL | overrides))


def tiny_environment(**overrides) -> dict[str, str]:
    """The settings of tiny() as environment variables. A keyword argument of None leaves one out;
    SMALL's settings of test-time training that EVAL_MODE does not read are left out, too.
    """
    by_document = overrides.get("eval_mode") == "documents"
    idle = [n for n in SMALL if n.startswith("ttt_") and n.startswith("ttt_lora_") != by_document]
    small = {name: value for name, value in SMALL.items() if name not in idle}
    values = {name.upper(): value for name, value in (small | overrides).items()}
    return {
        name: str(int(v) if isinstance(v, bool) else v)
        for name, v in values.items()
        if v is not None
    }


def random_model(settings: t.Settings, seed: int = 0, spread: float = 0.3) -> t.Model:
    """A model in which every parameter matters: the initial one ignores its blocks, whose output
    matrices are zero.
    """
    with torch.enable_grad():  # choosing an attention backend runs one backward
        model = t.build_model(settings, SOLO)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = spread if p.dim() < 2 else spread * 3 * p.shape[-1] ** -0.5
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


def random_tokens(*shape: int, seed: int = 0, bos: bool = False) -> torch.Tensor:
    """Token ids of an ordinary text; with bos, every sequence begins with BOS."""
    tokens = torch.randint(4, 512, shape, generator=torch.Generator().manual_seed(seed))
    if bos:
        tokens[..., 0] = t.BOS_ID
    return tokens


def document_stream(length: int, seed: int = 0) -> np.ndarray:
    """A validation stream, uint16, of documents of irregular lengths that each begin with BOS."""
    generator = np.random.default_rng(seed)
    stream = generator.integers(4, 512, length).astype(np.uint16)
    stream[0] = t.BOS_ID
    stream[generator.choice(np.arange(1, length), length // 25, replace=False)] = t.BOS_ID
    return stream


def stream_of(lengths, seed: int = 0) -> np.ndarray:
    """Documents of so many tokens each, uint16, and the BOS of one that is empty behind them."""
    generator = np.random.default_rng(seed)
    texts = [[t.BOS_ID, *generator.integers(4, 512, length - 1)] for length in lengths]
    return np.array([*sum(texts, []), t.BOS_ID], dtype=np.uint16)


def plan_pieces(batch: t.DocumentBatch, settings: t.Settings, learns: bool):
    """Yields (context, begin, end) of all of a batch's pieces: t.plan_piece()."""
    begin = 0
    while batch.longer_than(begin):
        context, end = t.plan_piece(batch, settings, begin, learns)
        yield context, begin, end
        begin = end


def validation_set(tokens: np.ndarray) -> t.ValidationSet:
    """A validation set in which every target is two bytes long."""
    return t.ValidationSet(tokens, np.full(len(tokens) - 1, 2, dtype=np.int64))


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Error of result as a part of reference's norm."""
    result, reference = result.detach().double(), reference.detach().double()
    return float((result - reference).norm() / reference.norm().clamp_min(1e-300))


def write_shard(
    path: Path, tokens, magic: int = t.SHARD_MAGIC, version: int = 1, count: int | None = None
) -> Path:
    """Writes a shard whose header says what it is told."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


class ThreadRanks(t.Ranks):
    """A rank whose peers are threads of this process: collectives meet at a barrier. Made by
    run_ranks().
    """

    def __init__(
        self, rank: int, world_size: int, barrier: threading.Barrier, box: list, mail: dict
    ):
        super().__init__(rank, world_size, CPU)
        self.barrier, self.box, self.mail = barrier, box, mail

    def gather(self, value) -> list:
        """Every rank's value, in the order of ranks."""
        self.box[self.rank] = value
        self.barrier.wait(60)
        values = list(self.box)
        self.barrier.wait(60)
        return values

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(sum(self.gather(tensor.clone())))

    def from_main(self, value):
        return self.gather(value)[0]

    def concatenate(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.gather(tensor.clone()))

    def send(self, tensors: list[torch.Tensor], to: int) -> list:
        for tensor in tensors:
            self.mail[self.rank, to].put(tensor.clone())
        return []

    def receive(self, tensors: list[torch.Tensor], source: int) -> None:
        for tensor in tensors:
            sent = self.mail[source, self.rank].get(timeout=60)
            assert sent.dtype == tensor.dtype
            tensor.copy_(sent)


def run_ranks(world_size: int, function) -> list:
    """function(ranks) on every one of world_size ranks at once; their results in order."""
    barrier, box = threading.Barrier(world_size), [None] * world_size
    mail = {pair: queue.Queue() for pair in itertools.permutations(range(world_size), 2)}
    results, errors = [None] * world_size, []

    def work(rank: int) -> None:
        try:
            results[rank] = function(ThreadRanks(rank, world_size, barrier, box, mail))
        except BaseException as error:  # raised again below, in the test
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return results


@contextlib.contextmanager
def bounded(seconds: float = 10.0, more_memory: int = 1 << 30):
    """Turns an allocation beyond more_memory bytes, or a stall, into an exception instead of a dead
    machine.
    """

    def stop(*_):
        raise TimeoutError(f"took longer than {seconds} s")

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + more_memory, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, previous)


def gptq(weight, hessian, scale, limits, damp: float = 0.01, **options) -> torch.Tensor:
    """t.gptq() by a Hessian, or of a stack by theirs."""
    hessians = hessian.view(-1, *hessian.shape[-2:])
    parts = zip(*(t.factor_hessian(each, damp) for each in hessians), strict=True)
    factors = [torch.stack(each).view(*hessian.shape[:-2], *each[0].shape) for each in parts]
    return t.gptq(weight, scale, limits, *factors, **options)


def collect_factors(model: t.Model, tokens: torch.Tensor, rows: int) -> dict[str, tuple]:
    """What quantize_model() asks for, of a text."""
    hessians, _ = t.collect_costs(model, tokens.split(rows), SOLO)
    return {name: t.factor_hessian(hessian) for name, hessian in hessians.items()}


def gradients(model: t.Model) -> dict[str, torch.Tensor]:
    """Every parameter's gradient, of the loss on the same 64 random tokens."""
    tokens = random_tokens(2, 33)
    model.zero_grad()
    model.loss(tokens[:, :-1], tokens[:, 1:], model.order(True)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def with_settings(settings: t.Settings, **changes) -> t.Settings:
    """A copy of settings with some of them changed."""
    return dataclasses.replace(settings, **changes)


SCRIPT = Path(t.__file__).resolve()


FINAL = re.compile(r"final_int6_lzma_\w+_exact val_loss:(\d+\.\d{8}) val_bpb:(\d+\.\d{8})")


# Six steps without a clock; the target leaves room for any model.
SIX_STEPS = {"iterations": 6, "max_wallclock_seconds": 0.0, "warmup_steps": 1, "train_log_every": 2}


def run_environment(shards: Path, folder: Path, **changes) -> dict[str, str]:
    paths = {"data_path": shards, "tokenizer_path": shards / "tokenizer.model", "log_dir": folder}
    return tiny_environment(**(SIX_STEPS | paths | {"run_id": "a", "device": "cpu"} | changes))


def process_environment(settings: dict[str, str]) -> dict[str, str]:
    """Settings among what a process needs to start, without any variable that could be taken for a
    setting.
    """
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ
    }
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)} | settings


def free_port() -> str:
    """A port of this machine that nobody listens on, for ranks to meet at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def run_here(monkeypatch, environment: dict[str, str], *arguments: str) -> int:
    """run() in this process; returns the exit status."""
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    return t.run()


def on_console(text: str) -> str:
    """A log's messages as a console has them: one line without all settings."""
    return re.sub("  preset=.*", "", text)


def lines_of_compile_kernels(folder: Path, *arguments: str) -> list[str]:
    """What tests.compile_kernels prints, with a cache of its own in the folder."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", *arguments],
        cwd=SCRIPT.parent,
        env=os.environ | {"TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class Quiet:
    """A log that says nothing."""

    def __call__(self, text: str, event: str = "", **values) -> None: ...
    def progress(self, what: str, part: float, seconds: float, note: str = "") -> None: ...
    def track(self, what: str, items):
        return items

    def begin(self) -> None: ...
    def failed(self, text: str, **values) -> None: ...


def mistake(monkeypatch, capsys, environment: dict[str, str], *arguments: str) -> str:
    """The one line on stderr of a run that ends with status 2."""
    status = run_here(monkeypatch, environment, *arguments)
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.startswith("train_gpt.py: error: ")
    assert error.count("\n") == 1
    return error


def newton_schulz(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Newton-Schulz as its authors write it: every step multiplies the matrices themselves."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in [*t.POLAR_EXPRESS, *[t.POLAR_EXPRESS[-1]] * steps][:steps]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def fill_gradients(model: torch.nn.Module, poison: float | None = None):
    """Sets every gradient, each time to the same numbers; a poison stands in the last one only."""
    for p in model.parameters():
        p.grad = torch.cos(torch.arange(p.numel(), dtype=torch.float32)).view_as(p)
    if poison is not None:
        p.grad.view(-1)[-1] = poison


def optimizer_tensors(optimizers: t.Optimizers, average: t.WeightAverage) -> list[torch.Tensor]:
    """Copies of all that a step may change: parameters, momentum, Adam's moments and step counts,
    the average.
    """
    states = optimizers.muon.momenta + optimizers.muon.squares
    for state in optimizers.adam.state.values():
        states += state.values()
    return [x.detach().clone() for x in (*optimizers.parameters, *states, *average.tensors())]


def cross_entropy_case(vocabulary: int) -> tuple[torch.Tensor, ...]:
    """Hidden states (37, 32), output matrix, targets and the gradient of the nats."""
    hidden, weight = torch.randn(37, 32), torch.randn(vocabulary, 32)
    return hidden, weight, torch.randint(0, vocabulary, (37,)), torch.randn(37)


def assert_equal_in_float64(exact, fused, compiled: bool, hidden, weight, grad, *others) -> None:
    """Nats and gradients of exact(hidden, weight, *others) in float64 and of fused() in float32,
    perhaps compiled.
    """
    function = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    outcomes = []
    for nats, dtype in ((exact, torch.float64), (function, torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        y = nats(*leaves, *others)
        outcomes.append((y, *torch.autograd.grad(y, leaves, grad.to(dtype))))
    for wanted, found in zip(*outcomes, strict=True):
        assert (found.double() - wanted).norm() < 1e-5 * wanted.norm()


interpreted = pytest.mark.skipif(
    t.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton, interpreted, which conftest.py arranges where there is no GPU",
)


TEXT = (
    "The quick brown fox jumps over the lazy dog, and then it rests beneath an old oak tree.",
    "Numbers such as 1, 23 and 456 stand beside words: naïve, café, straße, Ελλάδα, 東京.",
    "In the morning the market opens; people come to buy bread, milk, honey and cheese.",
    "A function returns a value. A loop repeats a block. A test says what would break.",
    "Rivers run to the sea, winds run round the earth, and letters run across the page.",
    "She asked whether the train would stop at the village, or go on to the harbour.",
)


def train_tokenizer(path: Path, vocab_size: int, texts=TEXT, **options) -> Path:
    """Trains a tokenizer with the contest's special ids: 0 padding, 1 BOS, 2 end, 3 unknown."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 3),
        model_prefix=str(path.with_suffix("")),
        vocab_size=vocab_size,
        model_type="bpe",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        **(
            {"byte_fallback": True, "add_dummy_prefix": False, "character_coverage": 0.98} | options
        ),
    )
    return path


def write_data(folder: Path, tokenizer: Path | None = None) -> None:
    """A data folder: two training shards, one validation shard, and tokenizer.model of 512 pieces,
    a copy of the one given or a new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / "tokenizer.model"
    if tokenizer is None:
        train_tokenizer(own, 512)
    else:
        own.write_bytes(tokenizer.read_bytes())
    model = sentencepiece.SentencePieceProcessor(model_file=str(own))
    generator = np.random.default_rng(0)
    words = " ".join(TEXT).split()

    def text_tokens(documents: int) -> np.ndarray:
        texts = (
            " ".join(generator.choice(words, generator.integers(5, 60))) for _ in range(documents)
        )
        return np.concatenate([model.encode(text, add_bos=True) for text in texts])

    write_shard(folder / "words_train_000000.bin", text_tokens(60))
    write_shard(folder / "words_train_000001.bin", text_tokens(40))
    write_shard(folder / "words_val_000000.bin", text_tokens(40)[:600])


class WallClockEvent:
    """Stands in for torch.cuda.Event."""

    def __init__(self, enable_timing: bool):
        self.seconds = None

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "WallClockEvent") -> float:
        return 1e3 * (end.seconds - self.seconds)


def torchrun(*arguments: str) -> list[str]:
    """The command of a launch on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]


def subprocess_with(**others) -> types.SimpleNamespace:
    """What a module that imports subprocess may see in its place: with other functions for some."""
    return types.SimpleNamespace(**vars(subprocess) | others)


def called_here(
    main: Callable[[], int | None],
    name: str,
    *arguments,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """A tool's main() in this process, which has imported torch, with what a command line gives it:
    the tool's name, arguments, and an environment, which is the tests' own by default.

    Everything is as before when it returns; what it raises, but for SystemExit, comes through.
    """
    out, err = io.StringIO(), io.StringIO()
    command = [name, *map(str, arguments)]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", command)
        if environment is not None:
            patch.setattr(os, "environ", environment)
        try:
            status = main()
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(command, status or 0, out.getvalue(), err.getvalue())


def start_here(module: str, *arguments) -> subprocess.CompletedProcess:
    """`python -m MODULE` of ours in this process, as a new start of it: called_here()."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)  # runpy's
        patch.chdir(SCRIPT.parent)

        def main() -> None:
            runpy.run_module(module, run_name="__main__")

        return called_here(main, module, *arguments)

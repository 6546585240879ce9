"""What several test files share: tiny settings, random models, shards, and ranks that live in threads of one process."""

import contextlib
import dataclasses
import resource
import signal
import threading
from pathlib import Path

import numpy as np
import torch

import train_gpt as t

CPU = torch.device("cpu")
PATIENCE = 300.0  # seconds that another process may take: machines that are shared stall
SOLO = t.Ranks(0, 1, CPU)

# A model of some ten thousand parameters: layers Mamba, attention, Mamba.
SMALL = {
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
    "calibration_tokens": 256,
    "sdclip_k": 5.0,
    "warmup_steps": 0,
}


def tiny(**overrides) -> t.Settings:
    """Settings of a model small enough to run in milliseconds."""
    return t.Settings(**(SMALL | overrides))


def tiny_environment(**overrides) -> dict[str, str]:
    """The same as environment variables; keyword arguments are settings, None leaves a variable out."""
    values = {name.upper(): value for name, value in (SMALL | overrides).items()}
    return {
        name: str(int(v) if isinstance(v, bool) else v)
        for name, v in values.items()
        if v is not None
    }


def random_model(settings: t.Settings, seed: int = 0, spread: float = 0.3) -> t.Model:
    """A model in which every parameter matters: the initial one ignores its blocks, whose output matrices are zero."""
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
    """A rank whose peers are threads of this process: collectives meet at a barrier. Made by run_ranks()."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, box: list):
        super().__init__(rank, world_size, CPU)
        self.barrier, self.box = barrier, box

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

    def broadcast_(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        return tensor.copy_(self.gather(tensor.clone())[source])


def run_ranks(world_size: int, function) -> list:
    """function(ranks) on every one of world_size ranks at once; their results in order."""
    barrier, box = threading.Barrier(world_size), [None] * world_size
    results, errors = [None] * world_size, []

    def work(rank: int) -> None:
        try:
            results[rank] = function(ThreadRanks(rank, world_size, barrier, box))
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
    """Turns an allocation beyond more_memory bytes, or a stall, into an exception instead of a dead machine."""

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


def gradients(model: t.Model) -> dict[str, torch.Tensor]:
    """Of every parameter, by the loss of the same 64 random tokens."""
    tokens = random_tokens(2, 33)
    model.zero_grad()
    model.loss(tokens[:, :-1], tokens[:, 1:], model.order(True)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def with_settings(settings: t.Settings, **changes) -> t.Settings:
    """A copy of settings with some of them changed."""
    return dataclasses.replace(settings, **changes)

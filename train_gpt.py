"""Parameter Golf with state-space layers: from token shards to a scored artifact, in one file.

    python train_gpt.py                                     # one process, on a GPU if there is one
    torchrun --standalone --nproc_per_node=8 train_gpt.py   # one process per GPU
    PRESET=tiny python train_gpt.py                         # two minutes on two CPU cores
    python train_gpt.py --help                              # every setting, preset and option
    python train_gpt.py --presets                           # what each preset is for
    python train_gpt.py --dry-run                           # such a run's layers, sizes, memory
    python train_gpt.py --rehearse                          # its first steps, export and scores

The program trains a language model until its clock ends, quantizes it, packs it with this script's
own bytes into at most 16,000,000, and scores what that holds in bits per byte, adapting as it goes.

The model: layers of Mamba-3 with a few of attention between them, and MLPs after both.
    - Mamba-3: data-dependent decay, rotation of the state, trapezoidal inputs, one shared key/query
    - grouped-query attention with rotary positions, learned query gains and a gate on every head
    - MLPs of LeakyReLU(0.5) squared; only Mamba has biases, and norms with weights
    - embeddings tied to the output matrix, in part shared by spelling; hashed bigrams beside them
    - logits bounded by a tanh, and least for pairs of tokens that BPE never writes
    - U-Net skips from the first half to the second; layers may run more than once

Contents, in the order in which data flow; the last three may be left out at a first reading:
    1. Settings: every variable, presets, --help
    2. Ranks and device: what several processes need of each other, choices for the whole process
    3. Data: shards, batches, bytes per token
    4. The recurrence: Mamba-3's, in a loop and as matmuls
    5. Model: attention, Mamba and MLP blocks; generation, a token at a time
    6. Optimizers: Muon for matrices, Adam for the rest, weight average, schedule
    7. Evaluation: documents, or windows; test-time training on what is already scored
    8. Quantization: GPTQ onto grids of int6, and int8 where it matters
    9. Artifact: entropy coding near its bound, the file, loading
    10. Training and main: log, clock, checkpoints, loop, export
    11. Fused kernels: scan, MLP (by 8-bit floats, too), cross-entropy, trellis; compiling ahead
    12. Published peers: the first Mamba, library kernels, other grids, attention's backends
    13. Other scripts' names: translated, or refused

Words and letters:
    B, L (or T)    sequences of a batch, tokens of a sequence
    H, P, N, R     Mamba's heads, channels of a head, numbers of state a channel, angles (2R <= N)
    nats, BPB      -ln of a target's probability; the same in bits over the target's bytes of text
    key weight     what multiplies a token's key on its way into the state
    hinge          the layers at the turning point of the U-Net, which may run again
    k (SDClip)     a row's grid ends at k root-mean-squares of the row
    chunk          tokens that a scan takes in one matmul; in evaluation, tokens scored at once
"""

import atexit
import bisect
import collections
import ctypes
import datetime
import difflib
import errno
import fcntl
import hashlib
import importlib
import io
import itertools
import json
import lzma
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

# OpenMP, which torch brings, reads it when it is loaded. By default threads spin while they wait
# for each other: on a CPU that other programs use too, a run takes up to thirty times as long.
if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

try:
    from tqdm import tqdm
except ImportError:  # plain lines say the same
    tqdm = None

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    constexpr = tl.constexpr
    # Otherwise Triton makes of an argument that is 1 a compile-time constant, which has no type.
    jit = triton.jit(do_not_specialize=["length", "batch", "chunks"])
except ImportError:  # CPU builds of torch need none
    triton = None

    def jit(value):
        """Stands in for triton.jit and tl.constexpr: the kernels are never called."""
        return value

    constexpr = jit


BOS_ID = 1
ARTIFACT_CAP = 16_000_000  # bytes with the code: the contest's limit


class UserError(Exception):
    """A mistake the user can mend: run() prints it as one line."""

    def __init__(self, message: str):
        # Bytes of a path that are not UTF-8 reach Python as lone surrogates: shown as \xff.
        parts = (f"\\x{ord(x) & 255:x}" if "\udc80" <= x <= "\udcff" else x for x in message)
        super().__init__("".join(parts))


class SharedError(UserError):
    """A UserError that all ranks raise at once: rank 0 alone prints it."""


class OtherVersionError(UserError):
    """An artifact or checkpoint is intact, but has settings that this script does not know."""


class LateExportError(UserError):
    """An artifact that was made after the training clock's end."""


def need(condition, message: str):
    """Raises UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def explained_errors(doing: str):
    """Turns an operating system's error into a UserError that says what could not be done."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {doing}: {error.strerror}") from error


# ==================================================================================================
# 1. Settings
# A field of Settings in capitals is its environment variable, named as in the contest. What it may
# hold stands beside its default; help, validation and docs/settings.md are made from that.

UNBOUNDED = 2**50  # more than any count or number of seconds that means something
WIDEST = 2**16  # the most that a width, a number of heads or a factor of a width may be
LONGEST = 2**20  # the most tokens of a window or a text, rows of bigrams
ABOVE_0 = 1e-30  # the least of what must not be 0
BELOW_1 = 1 - 2**-53  # the most of what must not be 1
EVAL_MODES = ("plain", "sliding", "stateful", "documents")


def env(default, help, unit="", low=0, high=UNBOUNDED, group=""):
    """A field of Settings, whose type is its default's: a number of `unit`, from low to high; a
    text; or one of the words that unit lists between bars. The first field of a group names it.
    """
    unit = "0|1" if isinstance(default, bool) else unit
    facts = {"help": help, "unit": unit, "low": low, "high": high, "group": group}
    return field(default=default, metadata=facts)


def describe_values(low, high, unit, **_) -> str:
    """A setting's unit and bounds in a few words, such as "tokens >= 1", from its metadata."""
    least = "> 0" if low == ABOVE_0 else f">= {low}" if low else ""
    most = "< 1" if high == BELOW_1 else f"<= {high}" if high < UNBOUNDED else ""
    return f"{unit} {least}{', ' if least and most else ''}{most}".strip()


@dataclass(frozen=True)
class Settings:
    """All that a run can be told. Lists of layers are "all", "none" or such as "0,2-4"."""

    preset: str = env("default", "a set of defaults", "name", group="run")
    run_id: str = env("", "names logs and artifact", "name")
    device: str = env("auto", "auto: a GPU if there is one", "auto|cuda|cpu")
    precision: str = env("auto", "type of activations", "auto|bfloat16|float16|float32")
    compile: str = env("auto", "torch.compile; auto: on GPUs", "auto|on|off")
    scan_backend: str = env("auto", "Mamba's scan", "auto|triton|chunked|fused|parallel|sequential")
    attention_backend: str = env("auto", "attention's kernel", "auto|cudnn|flash|flex|math|fa3|fa2")
    micro_batch_tokens: int = env(0, "most at once on a rank; 0: what fits", "tokens")
    warmup_steps: int = env(3, "to compile, off the clock", "steps", 0, 1000)
    val_loss_every: int = env(0, "validation off the clock; 0: at the end", "steps")
    train_log_every: int = env(50, "training loss lines", "steps", 1)
    deterministic: bool = env(False, "the same bits again, slower")
    checkpoint_every: float = env(120.0, "0: only when stopped", "seconds")
    resume: str = env("auto", "checkpoint; auto: RUN_ID's last", "auto, never, file")
    overwrite: bool = env(False, "train RUN_ID, which has an artifact, anew")
    quantization_report: bool = env(False, "BPB lost by each kind of layer")
    log_dir: str = env("logs", "of logs and artifacts", "folder")
    artifact: str = env("", "empty: LOG_DIR/RUN_ID.int6.lzma", "file")
    eval_only: bool = env(False, "score ARTIFACT and train nothing")

    seed: int = env(1337, "of weights and batches", "integer", group="data")
    data_path: str = env("./data/datasets/fineweb10B_sp8192/", "*_train_*, *_val_*.bin", "folder")
    tokenizer_path: str = env("./data/tokenizers/fineweb_8192_bpe.model", "SentencePiece", "file")
    vocab_size: int = env(8192, "must be the tokenizer's", "tokens", 2, 65_536)
    train_batch_tokens: int = env(524_288, "a step's, over all ranks", "tokens", 1, 2**28)
    train_seq_len: int = env(2048, "training and evaluation window", "tokens", 1, LONGEST)
    document_reset: bool = env(True, "BOS resets the layers that DOCUMENT_SCOPE names")
    document_scope: str = env("all", "all: attention, convolutions, scans", "all|scans")

    num_layers: int = env(9, "physical layers", "layers", 1, 256, group="model")
    model_dim: int = env(512, "residual stream", "numbers", 1, WIDEST)
    mamba_layers: str = env("0,1,3-5,7,8", "the others are attention", "layers")
    mlp_layers: str = env("all", "have an MLP", "layers")
    mlp_mult: float = env(4.0, "MLP's hidden width", "× width", ABOVE_0, WIDEST)
    num_heads: int = env(8, "query heads", "heads", 1, WIDEST)
    num_kv_heads: int = env(4, "key/value heads", "heads", 1, WIDEST)
    rope_fraction: float = env(0.25, "of attention's heads", "part", 0, 1)
    rope_base: float = env(10_000.0, "of the pairs' frequencies", "factor", 1)
    xsa_last_n: int = env(0, "last layers that attend to other tokens alone", "layers", 0, 256)
    qk_gain_init: float = env(4.0, "queries' first gain", "factor", 0, WIDEST)
    mamba_version: int = env(3, "1: the first Mamba, a selective scan", "1|2|3")
    mamba_d_state: int = env(64, "state per channel", "numbers", 8, 1024)
    mamba_expand: float = env(2.0, "Mamba's inner width", "× width", ABOVE_0, WIDEST)
    mamba_head_dim: int = env(64, "channels per Mamba head", "numbers", 8, WIDEST)
    mamba_decay: str = env("softplus", "Mamba-3's decay rates", "softplus|heavy_tail")
    mamba_d_conv: int = env(4, "short convolution; none in Mamba-3", "2|3|4")
    mamba_chunk_size: int = env(64, "chunk of a scan", "tokens", 8, WIDEST)
    unet_skips: bool = env(True, "first half to second")
    ln_scale: bool = env(False, "inputs of layer l times 1 / sqrt(l + 1)")
    mask_impossible_pairs: bool = env(True, "least logit for tokens that BPE never writes next")
    bigram_vocab_size: int = env(4096, "hashed bigrams; 0: none", "rows", 0, LONGEST)
    bigram_dim: int = env(128, "before its projection", "numbers", 1, WIDEST)
    tie_embeddings: bool = env(True, "one matrix reads tokens in and out")
    tied_embed_init_std: float = env(0.005, "first embeddings and output matrix", "std")
    logit_softcap: float = env(15.0, "cap·tanh(logits/cap)", "nats", ABOVE_0, 60)

    layer_order: str = env("all", "in which they run, as 0-4,3,4,5", "layers", group="recurrence")
    recur_start: float = env(0.35, "before it, each layer runs once", "of run", 0, 1)

    iterations: int = env(20_000, "most training steps", "steps", 1, group="schedule")
    max_wallclock_seconds: float = env(600.0, "training and GPTQ; 0: ITERATIONS rule", "seconds")
    export_reserve_seconds: float = env(8.0, "of these, for GPTQ", "seconds")
    warmdown_fraction: float = env(0.8, "linear decay to the end", "of run", 0, 1)
    warmdown_iters: int = env(0, "the same in steps; 0: the fraction", "steps")
    warmdown_shape: str = env("linear", "of rates as they fall", "linear|cosine")
    min_lr: float = env(0.0, "of the rates: decay ends there", "part", 0, 1)

    matrix_lr: float = env(0.014, "Muon, attention and MLP matrices", "rate", group="optimizer")
    mamba_matrix_lr: float = env(0.0105, "Muon, Mamba's matrices", "rate")
    tied_embed_lr: float = env(0.008, "Adam, embeddings and output matrix", "rate")
    embed_lr: float = env(0.008, "Adam, embeddings, with TIE_EMBEDDINGS=0", "rate")
    head_lr: float = env(0.008, "Adam, output matrix, with TIE_EMBEDDINGS=0", "rate")
    scalar_lr: float = env(0.02, "Adam, vectors, scales and Mamba's dynamics", "rate")
    muon_momentum: float = env(0.95, "Nesterov momentum", "part", 0, BELOW_1)
    muon_momentum_warmup_start: float = env(0.0, "0: MUON_MOMENTUM × 0.9", "part", 0, BELOW_1)
    muon_momentum_warmup_steps: int = env(0, "until it is reached; 0: a tenth of the run", "steps")
    muon_beta2: float = env(0.95, "of rows' mean squares (NorMuon); 0: none", "part", 0, BELOW_1)
    muon_row_groups: bool = env(True, "Muon takes what Mamba's in_proj makes as several matrices")
    muon_backend_steps: int = env(5, "Newton-Schulz iterations", "steps", 1, 100)
    beta1: float = env(0.9, "Adam, of the mean gradient", "part", 0, BELOW_1)
    beta2: float = env(0.95, "Adam, of the mean square", "part", 0, BELOW_1)
    adam_eps: float = env(1e-8, "Adam; of vectors and scales at least 1e-6", "size", ABOVE_0)
    float8_products: str = env("auto", "8-bit ones, on H100", "auto|none|mlp|in_proj|mlp,in_proj")
    grad_clip_norm: float = env(1.0, "most of all gradients together; 0: not clipped", "norm")
    weight_decay: float = env(0.1, "decoupled, matrices and embeddings", "rate")
    embed_wd: float = env(-1.0, "of embeddings; negative: WEIGHT_DECAY", "rate", -1)
    adam_wd: float = env(0.0, "of vectors and scales", "rate")
    spelling_features: int = env(4096, "tokens spelt alike share at most; 0: none", "", 0, LONGEST)
    average: str = env("ema", "of the weights, for the artifact", "ema|swa|ema+swa|none")
    average_horizon: float = env(0.1, "ema: how far it looks back", "of run", 0, 1)
    ema_decay: float = env(0.999, "ema: at most 1 / (1 - EMA_DECAY) steps", "part", 0, BELOW_1)
    swa_start_frac: float = env(0.2, "swa: LR factor below which it averages", "factor", 0, 1)
    swa_every: int = env(50, "swa: from one snapshot to the next", "steps", 1)

    target_mb: float = env(16.0, "decimal, artifact and code", "MB", ABOVE_0, 16, group="export")
    quantizer: str = env("gptq", "ternary trains on it", "gptq|round|percentile|dsq|ternary")
    trellis_states: int = env(32, "of the trellis that GPTQ rounds by; 0: none", "0|4|8|16|32")
    shared_tables: bool = env(True, "integers of one reach share frequencies; 0: of one matrix")
    late_qat_threshold: float = env(0.0, "QAT below this LR factor; 0: never", "factor", 0, 1)
    sdclip_k: float = env(0.0, "int6 rows' k; 0: as fine as TARGET_MB allows", "std")
    sdclip_k_int8: float = env(16.0, "k of 8-bit rows", "std", ABOVE_0)
    sdclip_most: float = env(20.0, "the largest k that is tried for the size", "std", 4)
    sdclip_by_matrix: float = env(1.0, "steps by what errors cost; 0: by sizes", "part", 0, 1)
    sdclip_by_row: float = env(0.5, "the same, among a matrix's rows", "part", 0, 1)
    gptq_block_size: int = env(128, "columns whose errors spread at once", "", 1)
    gptq_damp: float = env(0.01, "of the Hessian's mean diagonal, added", "part", ABOVE_0)
    calibration: str = env("train", "text for GPTQ; self: the model's own", "train|self")
    calibration_tokens: int = env(131_072, "of text for GPTQ", "tokens", 1, 2**28)
    gptq_gen_len: int = env(512, "self: a text's length, at most TRAIN_SEQ_LEN", "tokens", 1)
    gptq_gen_temp: float = env(1.0, "self: temperature of its tokens", "factor", ABOVE_0)

    eval_mode: str = env("documents", "how text is cut", "|".join(EVAL_MODES), group="evaluation")
    eval_stride: int = env(512, "sliding: how far windows move", "tokens", 1)
    eval_overlap: int = env(0, "stateful: attention reads again; 0: half a window", "tokens")
    val_batch_size: int = env(524_288, "most scored at once over all ranks", "tokens", 1)
    eval_max_seconds: float = env(600.0, "evaluation clock", "seconds", ABOVE_0)
    eval_nll_path: str = env("", "every target's nats, float32", "file.npy")
    eval_any_tokens: bool = env(False, "score other tokens than TOKENIZER_PATH's, to try them")
    ttt_enabled: bool = env(True, "score-first test-time training")
    ttt_lr: float = env(0.005, "SGD, not of documents; cosine over the chunks", "rate")
    ttt_epochs: int = env(2, "passes over each scored chunk", "epochs", high=1000)
    ttt_momentum: float = env(0.9, "SGD", "part", 0, BELOW_1)
    ttt_grad_clip: float = env(1.0, "most of a step's gradient; 0: not clipped", "norm")
    ttt_freeze_blocks: int = env(0, "first blocks that are not trained", "layers", 0, 256)
    ttt_chunk_tokens: int = env(32_768, "scored, then trained on", "tokens", 1)
    ttt_lora_rank: int = env(128, "of documents' branches", "numbers", 1, WIDEST)
    ttt_lora_lr: float = env(1.5e-4, "of branches, by their usual gradient", "rate")
    ttt_lora_decay: float = env(0.5, "decoupled, of branches", "rate")
    ttt_lora_layers: str = env("mlp,head", "or query,key,value,out,in_proj,out_proj", "names")
    ttt_lora_piece: int = env(64, "scored, then learnt from; at most a window", "tokens", 1)
    ttt_lora_slots: int = env(64, "documents at once, on each rank", "documents", 1, WIDEST)

    sample_prompt: str = env("", "ARTIFACT continues it, unadapted", "text", group="sample")
    sample_tokens: int = env(200, "how far it is continued", "tokens", 1, LONGEST)
    sample_temperature: float = env(0.8, "of the draws; 0: the likeliest token", "factor", 0, 100)
    sample_top_p: float = env(0.95, "draws from the likeliest of this sum", "part", ABOVE_0, 1)

    @property
    def mamba_inner_dim(self) -> int:
        """Channels inside a Mamba layer."""
        return int(self.mamba_expand * self.model_dim)

    @property
    def attention_overlap(self) -> int:
        """Tokens that attention's windows have in common where states are carried."""
        return self.eval_overlap or max(1, self.train_seq_len // 2)

    @property
    def confines_documents(self) -> bool:
        """Whether attention and convolutions end at a document's start, as scans do."""
        return self.document_reset and self.document_scope == "all"

    @property
    def adapts(self) -> bool:
        """Whether evaluation trains on what it has scored."""
        return self.ttt_enabled and (self.eval_mode == "documents" or self.ttt_epochs > 0)

    @property
    def score_mode(self) -> str:
        """How the final score is made, as its line says; "plain" is plain_score()'s way."""
        return self.eval_mode + ("_ttt" if self.adapts else "")

    @property
    def calibrates(self) -> bool:
        """Whether quantization reads text: nearest integers need none."""
        return self.quantizer not in ("round", "ternary")

    @property
    def shares_bits(self) -> bool:
        """Whether grid steps follow what errors cost."""
        return self.sdclip_by_matrix > 0 or self.sdclip_by_row > 0

    @property
    def artifact_path(self) -> Path:
        """Where the artifact is written and read: of a link, what that leads to."""
        path = Path(self.artifact or Path(self.log_dir, f"{self.run_id}.int6.lzma"))
        return Path(os.path.realpath(path)) if os.path.islink(path) else path

    @property
    def checkpoint_paths(self) -> list[Path]:
        """The last checkpoint, and the one before it."""
        return [Path(self.log_dir, f"{self.run_id}.checkpoint{age}") for age in ("", "-before")]


# Conventional values, for published systems and small models: the defaults are tuned for the entry.
PLAIN = {
    "mlp_mult": 3.0, "rope_fraction": 1.0, "qk_gain_init": 1.5, "logit_softcap": 30.0,
    "document_reset": False, "mask_impossible_pairs": False, "spelling_features": 0,
    "warmdown_fraction": 0.6, "matrix_lr": 0.02, "mamba_matrix_lr": 0.015, "muon_beta2": 0.0,
    "muon_row_groups": False, "trellis_states": 0, "sdclip_by_matrix": 0.0, "sdclip_by_row": 0.0,
    "sdclip_most": 16.0, "shared_tables": False, "eval_mode": "sliding", "float8_products": "none",
}  # fmt: skip

HYBRID11 = PLAIN | {
    "data_path": "./data/datasets/fineweb10B_sp1024/", "vocab_size": 1024, "num_layers": 11,
    "tokenizer_path": "./data/tokenizers/fineweb_1024_bpe.model", "mamba_layers": "0,2,4,6,8",
    "mamba_version": 1, "mamba_d_state": 16, "mamba_chunk_size": 256,
}  # fmt: skip

TINY = PLAIN | {
    "data_path": "./data/sample/", "tokenizer_path": "./data/sample/sample_1024_bpe.model",
    "vocab_size": 1024, "train_batch_tokens": 4096, "train_seq_len": 256, "num_layers": 4,
    "mamba_layers": "0,1,3", "model_dim": 128, "num_heads": 4, "num_kv_heads": 2,
    "mamba_d_state": 32, "mamba_head_dim": 32, "bigram_vocab_size": 1024, "bigram_dim": 64,
    "max_wallclock_seconds": 120.0, "export_reserve_seconds": 12.0, "warmup_steps": 1,
    "train_log_every": 20, "tied_embed_lr": 0.015, "calibration_tokens": 16_384, "sdclip_k": 5.0,
    "eval_stride": 64, "val_batch_size": 8192, "ttt_chunk_tokens": 4096,
}  # fmt: skip

# The defaults that each PRESET changes. A variable of the environment overrides both.
PRESETS = {
    "default": {},
    "short": {
        "train_batch_tokens": 65_536, "max_wallclock_seconds": 180.0,
        "export_reserve_seconds": 6.0, "eval_max_seconds": 180.0},
    "peer7": PLAIN | {
        "train_batch_tokens": 1_048_576, "train_seq_len": 4096, "num_layers": 7,
        "mamba_layers": "0,1,3,4,6", "bigram_vocab_size": 0},
    "nemotron_hinge": PLAIN | {
        "num_layers": 8, "mamba_layers": "0-3,5-7", "layer_order": "0-4,3,4,3-7",
        "recur_start": 0.0, "train_seq_len": 4096},
    "hybrid11": HYBRID11,
    "hybrid18": HYBRID11 | {
        "num_layers": 18, "mamba_layers": "0-11,15-17", "mlp_layers": "12-14",
        "mamba_d_state": 32, "mamba_expand": 1.5, "bigram_vocab_size": 2048, "target_mb": 15.9},
    "tiny": TINY,
    "laptop": TINY | {
        "num_layers": 5, "mamba_layers": "0,1,3,4", "model_dim": 192, "num_heads": 6,
        "num_kv_heads": 3, "max_wallclock_seconds": 450.0, "export_reserve_seconds": 20.0,
        "eval_max_seconds": 150.0, "eval_stride": 128, "iterations": 3000},
}  # fmt: skip

PRESET_USES = {
    "default": "the entry: 8 GPUs, ten minutes",
    "short": "the same model in three minutes on one GPU",
    "peer7": "a published entry's shape, to compare speed",
    "nemotron_hinge": "a published system: the layers at the U-Net's turning point run three times",
    "hybrid11": "a published system: 11 layers, of which five are the first Mamba",
    "hybrid18": "a published system: 18 layers, of which 15 are the first Mamba",
    "tiny": "a small model on sample text: two minutes on two CPU cores",
    "laptop": "a larger one: ten minutes in all on CPU cores; on a GPU 3,000 steps, within 8 GB",
}
FOR_CPUS = ("tiny", "laptop")  # presets that one may train without a GPU

group = ""
FIELDS = {}  # the names of all settings, and their groups
for each_field in fields(Settings):
    group = each_field.metadata["group"] or group
    FIELDS[each_field.name] = group
del group, each_field  # as globals, they would hide a misspelt local

# What an artifact's header holds: all that the model's shapes and its forward pass depend on. Not
# TRAIN_SEQ_LEN, the window, which may be chosen anew when the artifact is scored.
MODEL_FIELDS = {name for name, group in FIELDS.items() if group in ("model", "recurrence")}
MODEL_FIELDS |= {"document_reset", "document_scope", "trellis_states", "shared_tables"}
MODEL_FIELDS = sorted({*MODEL_FIELDS, "vocab_size"} - {"mamba_chunk_size", "recur_start"})

# What EVAL_ONLY takes over from the run that wrote an artifact, unless it is given. Not how that
# was started and what it wrote; nor EVAL_ANY_TOKENS: no file may switch off a check of itself.
SCORED_WITH = ["preset", *(n for n, group in FIELDS.items() if group not in ("run", "sample"))]
SCORED_WITH = [name for name in SCORED_WITH if name not in ("eval_nll_path", "eval_any_tokens")]

# What a checkpoint's header holds: a resumed run must keep all that changes how it trains.
NOT_TRAINING = {name for name, group in FIELDS.items() if group in ("run", "evaluation", "sample")}
TRAINING_FIELDS = [n for n in FIELDS if n not in NOT_TRAINING | {"data_path", "tokenizer_path"}]
# Those of them that a resumed run may change after all, unless weights are trained on their grids.
EXPORT_FIELDS = {name for name, group in FIELDS.items() if group == "export"}


# ---- Reading and checking ------------------------------------------------------------------------


def shown(value) -> str:
    """A value as a one-line error quotes it: as a user would type it, cut after 200 characters."""
    value = int(value) if isinstance(value, bool) else value
    text = str(UserError(str(value)))
    text = text if text.isprintable() else repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def parse_layers(settings, name: str, text: str | None = None) -> tuple[int, ...]:
    """The layers, in order, that a text such as "0,2-4" names: a setting's, or that of the variable
    `name`. Raises UserError for layers that the model does not have.
    """
    text = getattr(settings, name) if text is None else text
    count = settings.num_layers
    if text in ("all", "none", ""):
        return tuple(range(count if text == "all" else 0))
    layers = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        digits = all(end.isdecimal() and len(end) < 10 for end in (first, last))
        if not (digits and int(first) <= int(last) < count):  # need() would write each part's text
            usual = f"from 0 to {count - 1}, write 0,2-4, or all, or none"
            raise UserError(f"{name.upper()}={shown(text)}: no layer {shown(part)}; {usual}")
        layers += range(int(first), int(last) + 1)
    return tuple(layers)


def parse_value(name: str, text: str, kind: type):
    """A variable's text as a bool, int, float or str; UserError quotes its name."""
    truth = {"0": False, "false": False, "1": True, "true": True}
    try:
        return truth[text.strip().lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        wanted = {bool: "0 or 1", int: "a whole number", float: "a number"}[kind]
        raise UserError(f'{name}="{shown(text)}" should be {wanted}') from None


def read_number(environment: dict[str, str], name: str, default: int):
    """The value of a variable that is no setting; the default if it is unset or empty.

    It has the default's type, int or bool. Raises UserError for others, and beyond 0 to 10,000.
    """
    text = environment.get(name, "").strip()
    value = parse_value(name, text or str(default), type(default))
    need(0 <= value <= 10_000, f"{name}={value} must be from 0 to 10000")
    return value


def read_own(environment: dict[str, str]) -> tuple[Settings, set[str]]:
    """Settings by our own names, given ones over the preset's; and the names of those given.

    Raises UserError for an unknown PRESET, and for texts that are not of a setting's type.
    """
    preset = environment.get("PRESET", "default").strip()
    need(preset in PRESETS, f"PRESET={shown(preset)} should be one of {', '.join(PRESETS)}")
    given = {}
    for f in fields(Settings):
        name = f.name.upper()
        if name not in environment:
            continue
        text = environment[name]
        if f.metadata["unit"] == "layers":
            text = ",".join(part.strip() for part in text.split(","))  # a list may have line breaks
        elif "|" in f.metadata["unit"] or name == "PRESET":
            text = text.strip()
        given[f.name] = parse_value(name, text, type(f.default))
    return Settings(**PRESETS[preset] | given), set(given)


def read_settings(environment: dict[str, str]) -> tuple[Settings, set[str]]:
    """read_own() after other scripts' names (section 13) are translated, and make_room().

    Raises UserError for names that are misspelt, refused or without effect. validate_settings()
    checks bounds.
    """
    refuse_misspelt(environment)
    settings, given = read_own(environment | translate_names(environment)[0])
    tied = settings.tie_embeddings
    for name in given & ({"embed_lr", "head_lr"} if tied else {"tied_embed_lr"}):
        other = "TIED_EMBED_LR is the rate" if tied else "EMBED_LR and HEAD_LR are the rates"
        raise UserError(f"{name.upper()} means nothing with TIE_EMBEDDINGS={int(tied)}: {other}")
    # A name of REFUSED whose value is harmless, such as TTT_OPTIMIZER=sgd, asks for a mode as well.
    others = {name.lower() for name in environment.keys() & REFUSED.keys()}
    given |= {name for name in others if modes_that_read(name) != EVAL_MODES}
    world_size = max(1, read_number(environment, "WORLD_SIZE", 1))  # read_launch() refuses 0
    return make_room(settings, given, world_size), given


def modes_that_read(name: str) -> tuple[str, ...]:
    """The EVAL_MODEs in which a setting means something."""
    if name.startswith("ttt_lora_"):
        return ("documents",)
    if name.startswith("ttt_") and name != "ttt_enabled":
        return ("plain", "sliding", "stateful")
    own = {"eval_stride": ("sliding",), "eval_overlap": ("stateful",)}
    return own.get(name, EVAL_MODES)


def make_room(s, given: set[str], world_size: int) -> Settings:
    """The settings, after those that were not given have yielded to those that were.

    What the quantizer excludes becomes 0, EVAL_MODE one that reads all that was given; EVAL_STRIDE
    and TTT_CHUNK_TOKENS follow the window, EXPORT_RESERVE_SECONDS the clock. Two given ones that
    contradict each other stay, for validate_settings() to refuse.
    """
    values = dict.fromkeys(excluded(s), 0)
    modes = [mode for mode in EVAL_MODES if all(mode in modes_that_read(name) for name in given)]
    if modes and s.eval_mode not in modes:
        values["eval_mode"] = "sliding" if "sliding" in modes else modes[0]
    slides = values.get("eval_mode", s.eval_mode) == "sliding"
    if slides and "train_seq_len" in given and s.eval_stride > s.train_seq_len:
        values["eval_stride"] = max(1, s.train_seq_len // 4)
    if 0 < s.max_wallclock_seconds <= s.export_reserve_seconds:
        values["export_reserve_seconds"] = s.max_wallclock_seconds / 5
    yielding = {name: type(getattr(s, name))(x) for name, x in values.items() if name not in given}
    s = replace(s, **yielding)
    cut = given & {"train_seq_len", "eval_overlap"} and "ttt_chunk_tokens" not in given
    return replace(s, ttt_chunk_tokens=whole_chunk(s, world_size)) if cut and s.adapts else s


def describe_room(settings, given: set[str]) -> str:
    """A line that names the settings which make_room() changed; empty if there are none."""
    usual = asdict(Settings(**PRESETS[settings.preset])).items()
    changed = sorted(asdict(settings).items() - usual)
    text = " ".join(f"{n.upper()}={shown(x)}" for n, x in changed if n not in given | {"run_id"})
    return text and f"settings not given that yield to those given: {text}"


def refuse_idle(settings, given: set[str]):
    """Raises UserError for given settings of test-time training that EVAL_MODE does not read.

    If EVAL_MODE was not given, also for others: make_room() found no mode that reads all of them.
    """
    mode = settings.eval_mode
    for name in sorted(given):
        modes = modes_that_read(name)
        concerns = name.startswith("ttt_") or "eval_mode" not in given
        if mode in modes or not concerns:
            continue
        others = [n.upper() for n in sorted(given) if not {*modes} & {*modes_that_read(n)}]
        beside = f", and no mode reads it beside {others[0]}" if others else ""
        problem = f"{name.upper()} means nothing with EVAL_MODE={mode}{beside}"
        raise UserError(f"{problem}: unset one of them")


def check(settings, name: str, condition: bool, problem: str):
    """Raises UserError, "NAME=value problem", unless the condition holds."""
    need(condition, f"{name.upper()}={shown(getattr(settings, name))} {problem}")


def check_multiple(settings, name: str, divisor: int, meaning: str):
    """Raises UserError unless a setting is a multiple of divisor; meaning says what divisor is."""
    multiple = getattr(settings, name) % divisor == 0
    check(settings, name, multiple, f"is not a multiple of {meaning} = {divisor}")


def check_values(s):
    """Raises UserError for a setting outside its own bounds or choices, whatever the others are."""
    for f in fields(s):
        value = getattr(s, f.name)
        unit = f.metadata["unit"]
        if "|" in unit:
            fits = isinstance(value, bool) or str(value) in unit.split("|")
            problem = f"should be one of {unit.replace('|', ', ')}"
        elif isinstance(value, str):  # line breaks would spoil names, headers, logs and errors
            text = value if unit == "text" else os.fsencode(value).decode(errors="replace")
            words = " ".join(text.split())
            fits = words.isprintable() and (unit == "text" or words == text)
            problem = "holds a line break, a space too many or a character that does not print"
            if unit == "folder" and not text:  # pathlib would take it for the current folder
                fits, problem = False, "is empty: unset it, or say which"
        else:
            low, high = f.metadata["low"], f.metadata["high"]
            fits = low <= value <= high
            least = "above 0" if low == ABOVE_0 else f"{low:.0f}"
            most = "below 1" if high == BELOW_1 else f"{high:.0f}"
            problem = f"must be from {least} to {most} ({describe_values(**f.metadata)})"
        check(s, f.name, fits, problem)
    one_name = s.run_id != ".." and "/" not in s.run_id and len(os.fsencode(s.run_id)) <= 230
    check(s, "run_id", one_name, "must be one file name, of at most 230 bytes")
    scores = s.run_id.endswith(".eval")
    check(s, "run_id", not scores, "ends as only the logs of EVAL_ONLY do: leave .eval out")


def validate_settings(s, world_size: int):
    """Raises UserError for settings that cannot work, alone or together, on so many ranks."""
    check_values(s)
    parse_layers(s, "mlp_layers")
    order = set(parse_layers(s, "layer_order"))
    check(s, "layer_order", len(order) == s.num_layers, "leaves out a layer")
    check(s, "mlp_mult", int(s.mlp_mult * s.model_dim) > 0, "leaves the MLP without a width")
    mamba = parse_layers(s, "mamba_layers")
    if len(set(mamba)) < s.num_layers:
        check_multiple(s, "model_dim", 2 * s.num_heads, "2 × NUM_HEADS")
        check_multiple(s, "num_heads", s.num_kv_heads, "NUM_KV_HEADS")
    if mamba:
        inner = s.mamba_inner_dim
        divides = inner > 0 and inner % s.mamba_head_dim == 0
        check(s, "mamba_head_dim", divides, f"does not divide MAMBA_EXPAND × MODEL_DIM = {inner}")
        for name in ("mamba_d_state", "mamba_head_dim", "mamba_chunk_size"):
            check(s, name, getattr(s, name).bit_count() == 1, "must be a power of two")
    known = s.mamba_decay == "softplus" or s.mamba_version == 3
    check(s, "mamba_decay", known, "needs MAMBA_VERSION=3")
    check(s, "bigram_vocab_size", s.bigram_vocab_size != 1, "hashes all alike; use 0 for none")
    zeros = [] if s.eval_only else excluded(s)
    blamed = "late_qat_threshold" if s.late_qat_threshold else "quantizer"
    check(s, blamed, not zeros, f"needs {'=0 '.join(zeros).upper()}=0")
    length = s.train_seq_len
    if not s.eval_only:
        check_multiple(s, "train_batch_tokens", world_size * length, "ranks × TRAIN_SEQ_LEN")
    check_multiple(s, "micro_batch_tokens", length, "TRAIN_SEQ_LEN")
    clock = s.max_wallclock_seconds
    spare = not clock or 0 < s.export_reserve_seconds < clock
    problem = f"leaves no time to train, or none for GPTQ, of MAX_WALLCLOCK_SECONDS={clock:g}"
    remedy = f"EXPORT_RESERVE_SECONDS={clock / 5:g} would leave both"
    check(s, "export_reserve_seconds", spare, f"{problem}: {remedy}")
    fits = s.eval_stride <= length or s.eval_mode != "sliding"
    check(s, "eval_stride", fits, f"is longer than TRAIN_SEQ_LEN={length}")
    overlap = s.attention_overlap
    check(s, "eval_overlap", overlap < length, f"leaves no new token of TRAIN_SEQ_LEN={length}")
    if s.eval_mode == "documents":
        known = set(s.ttt_lora_layers.split(",")) <= set(BRANCHED)
        check(s, "ttt_lora_layers", known, f"should be some of {','.join(BRANCHED)}")
    elif s.adapts:
        whole = whole_chunk(s, world_size)
        remedy = f"is not whole sequences for all ranks: TTT_CHUNK_TOKENS={whole} is"
        check(s, "ttt_chunk_tokens", s.ttt_chunk_tokens == whole, remedy)


def excluded(s) -> list[str]:
    """The settings that are not 0 and would have to be, given how the weights are quantized."""
    on_grids = s.late_qat_threshold or s.quantizer == "ternary"  # weights train on their grids
    names = ["spelling_features"] if on_grids else []
    if s.late_qat_threshold or s.quantizer != "gptq":
        names += ["trellis_states", "sdclip_by_matrix", "sdclip_by_row"]
    return [name for name in names if getattr(s, name)]


def ttt_sequence_length(s, world_size: int) -> int:
    """Tokens of a sequence of test-time training: a window's, fewer where many ranks share a chunk.

    In EVAL_MODE=stateful rounded down to whole strides of attention's windows, one at least.
    """
    stride = s.train_seq_len - s.attention_overlap if s.eval_mode == "stateful" else 1
    longest = min(s.train_seq_len, s.ttt_chunk_tokens // world_size)
    return max(1, stride, longest // max(1, stride) * stride)


def whole_chunk(s, world_size: int) -> int:
    """TTT_CHUNK_TOKENS rounded down to whole sequences, as many on each rank; one each at least."""
    shared = world_size * ttt_sequence_length(s, world_size)
    return max(1, s.ttt_chunk_tokens // shared) * shared


def describe_preset(name: str) -> str:
    """What a preset is for, and the defaults that it changes, each in a line."""
    changes = [f"{key.upper()}={shown(value)}" for key, value in PRESETS[name].items()]
    lines = [f"  PRESET={name}: {PRESET_USES[name]}", *(changes or ["none of them"])]
    return "\n      ".join(lines)


def help_text() -> str:
    """What --help prints: every setting, every preset, and other scripts' names for settings."""
    begins = (__doc__ or "").split("\n\n")[:2]  # python -OO keeps no docstrings
    lines = ["\n\n".join(begins), "", "Settings are environment variables:"]
    for f in fields(Settings):
        lines += [f"\n[{f.metadata['group']}]"] if f.metadata["group"] else []
        values = f"{shown(f.default):42} {describe_values(**f.metadata):25}"
        lines.append(f"  {f.name.upper():24} {values} {f.metadata['help']}")
    lines += ["\nPresets change these:", *map(describe_preset, PRESETS)]
    lines.append("\nOther names for these, as the contest's scripts have them:")
    lines += [f"  {name:24} sets {ours}" for name, (ours, _) in ALIASES.items()]
    return "\n".join(lines)


# ==================================================================================================
# 2. Ranks and device
# What several processes need of each other, and all that holds for torch in a whole process.

COLLECTIVE_SECONDS = 600.0  # a rank that does not answer for so long ends the run
CONTAINER_MEMORY = Path("/sys/fs/cgroup/memory.max")  # the limit in bytes, of cgroup v2
MOST_TOKENS_ON_A_CPU = 8192  # at once, of a rank
PROCESS_WIDE = ExitStack()  # what prepare_torch() has entered, for as long as the process lives
atexit.register(PROCESS_WIDE.close)  # after that, Python begins to take torch's modules down


def prepare_torch(deterministic: bool = False):
    """Makes all choices that hold for torch in a whole process, before CUDA is used."""
    PROCESS_WIDE.close()
    # SDPA calls the first of these kernels that can: cuDNN's is the fastest on Hopper; left out is
    # the memory-efficient one. Entered within the model, this would keep graphs out of the cache.
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    PROCESS_WIDE.enter_context(sdpa_kernel(kernels, set_priority=True))
    # Inductor's mix-order reduction: wrong sums with torch 2.10 (pytorch#190796), an assertion with
    # 2.11 (#176131). Off until `tests/gpu_checks.py systems` passes with this variable as 1.
    mixed = os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0") == "1"
    from torch._inductor import config as inductor  # it reads the variable when it is imported

    if hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = mixed
    # By default a kernel's name says all that it computes. Triton cuts the names of its files after
    # 150 letters; inductor (torch 2.11, 2.13) looks for whole ones, and so finds no such kernel in
    # its cache: every warm start would compile it anew.
    inductor.triton.descriptive_names = False
    torch._dynamo.config.recompile_limit = 64  # orders of layers, shapes: the usual 8 are too few
    if deterministic:
        os.environ.update(CUBLAS_WORKSPACE_CONFIG=":4096:8", TORCHINDUCTOR_DETERMINISTIC="1")
        torch.use_deterministic_algorithms(True)


def keeps_bytecode(module) -> bool:
    """Whether Python keeps a module's bytecode; if not, each process compiles the module anew."""
    kept = module.__spec__.cached  # None if this Python keeps no bytecode
    return bool(kept) and os.path.exists(kept)


@dataclass
class Ranks:
    """This process among its peers, and its device. Collectives are called by every rank alike."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def gpu(self) -> bool:
        """Whether this rank computes on a GPU."""
        return self.device.type == "cuda"

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place of the tensor."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value):
        """Rank 0's object on every rank; sent by gloo, so that no GPU has to be waited for."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value) -> list:
        """Every rank's object, in the ranks' order, on every rank; over gloo, as from_main()."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def concatenate(self, tensor: Tensor) -> Tensor:
        """The rows of every rank's tensor (n, ...), in the ranks' order: (ranks · n, ...)."""
        if self.world_size == 1:
            return tensor
        gathered = tensor.new_empty(self.world_size * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, tensor.contiguous())
        return gathered

    def send(self, tensors: list[Tensor], to: int) -> list:
        """Begins to send tensors to another rank; returns requests, each of which needs wait()."""
        return dist.batch_isend_irecv([dist.P2POp(dist.isend, x.contiguous(), to) for x in tensors])

    def receive(self, tensors: list[Tensor], source: int):
        """Fills tensors, which are contiguous, with those that the rank source sends."""
        wanted = [dist.P2POp(dist.irecv, tensor, source) for tensor in tensors]
        for request in dist.batch_isend_irecv(wanted):
            request.wait()


def read_launch(environment: dict[str, str]) -> tuple[int, int, int]:
    """torchrun's RANK, LOCAL_RANK and WORLD_SIZE; UserError if they do not fit together."""
    world_size = read_number(environment, "WORLD_SIZE", 1)
    rank = read_number(environment, "RANK", 0)
    wanted = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if world_size > 1 else ()
    lacking = ", ".join(name for name in wanted if not environment.get(name, "").strip())
    problem = f"without {lacking}" if lacking else f"does not fit RANK={rank}"
    remedy = "unset them for one process, or start with torchrun"
    need(rank < world_size and not lacking, f"WORLD_SIZE={world_size} {problem}: {remedy}")
    return rank, read_number(environment, "LOCAL_RANK", 0), world_size


def choose_device(settings, local_rank: int) -> torch.device:
    """DEVICE: the CPU, or this rank's GPU, made the current one; UserError if there is none."""
    gpus = torch.cuda.device_count()
    if settings.device == "cpu" or (settings.device == "auto" and not gpus):
        return torch.device("cpu")
    need(gpus, "DEVICE=cuda, but torch sees no GPU: unset DEVICE, or install a CUDA build")
    need(local_rank < gpus, f"more ranks than the {gpus} GPUs here: lower --nproc_per_node")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def activation_dtype(settings, device: torch.device) -> torch.dtype:
    """PRECISION; "auto": float32 on CPUs, on GPUs bfloat16, or float16 where that is emulated."""
    if settings.precision != "auto":
        return getattr(torch, settings.precision)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if kernel_limits(device)[0] >= 80 else torch.float16


def start_ranks(settings) -> Ranks:
    """Joins the ranks that torchrun started, if any, by gloo and NCCL; UserError if it cannot."""
    rank, local_rank, world_size = read_launch(dict(os.environ))
    ranks = Ranks(rank, world_size, choose_device(settings, local_rank))
    if world_size == 1:
        return ranks
    # While torch waits in C++ no handler of Python's runs: a signal ends the process, as usual.
    try:
        with handling_signals(signal.SIG_DFL):
            store, *_ = next(dist.rendezvous("env://"))
    except (RuntimeError, ValueError) as error:
        place = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot meet the other ranks at {place}: {reason}") from None
    # torchrun's store outlives its processes: after --max-restarts, new ones would read old keys.
    # Seen with torch 2.11; needed unless tests/test_checkpoint.py's restart passes without it.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
    timeout = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
    backends, device = ("cpu:gloo,cuda:nccl", ranks.device) if ranks.gpu else ("gloo", None)
    with handling_signals(signal.SIG_DFL):
        dist.init_process_group(backends, None, timeout, world_size, rank, store, device_id=device)
    # gloo's threads may hold a tensor when Python ends, and abort: one in four runs of two ranks
    # with torch 2.11. Needed unless a hundred such runs without it all end with status 0.
    atexit.register(time.sleep, 0.1)
    return ranks


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of number that is not above `most`; at least 1."""
    return next((n for n in range(min(number, most), 1, -1) if number % n == 0), 1)


def maybe_compile(function, settings, ranks, options: dict | None = None):
    """The function, compiled as one graph with COMPILE=on, and with COMPILE=auto on a GPU."""
    if settings.compile == "off" or (settings.compile == "auto" and not ranks.gpu):
        return function
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory; for the CPU, of this machine's, or of its container's if less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # "max" is no limit
        memory = min(memory, int(CONTAINER_MEMORY.read_text()))
    return memory


def synchronized_time() -> float:
    """time.perf_counter() once the GPU has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


# ==================================================================================================
# 3. Data
# Token shards on disk become batches to train on and one stream to score. Batches follow from the
# seed, the settings and the shards alone: any number of GPUs trains on the same data.

SHARD_MAGIC = 20_240_520
SHARD_HEADER_BYTES = 256 * 4  # int32: magic, version 1, number of tokens, and zeros
ROUND_TRIP_TOKENS = 1 << 14  # are decoded and encoded again, which takes a tenth of a second
MOST_LOST_PAIRS = 0.02  # of their pairs: 0.014 seen where many characters are unknown, else 0.0001
MOST_IMPOSSIBLE = 0.001  # of tokens, at about 2 LOGIT_SOFTCAP nats each; usual text: under 1e-5
FEW_PAIRS = 9  # fewer pairs that are lost, or impossible, are never an error


class Shard:
    """A file of tokens: SHARD_HEADER_BYTES, then uint16s; UserError for another file or length.

    It is read, not mapped into memory: if a mapped file is cut off, the process dies silently.
    """

    def __init__(self, path: Path):
        self.path = path
        named = "is named like a file of tokens, but is none; move it away"
        need(path.is_file() or not path.exists(), f"{path} {named}")  # opening a pipe would hang
        with explained_errors(f"read {path}"):
            self.file = path.open("rb", 0)
            weakref.finalize(self, self.file.close)  # else Python warns of a file left open
            found = os.fstat(self.file.fileno())
            header = np.fromfile(self.file, "<i4", 256)
        size = found.st_size
        self.state = {"size": size, "mtime_ns": found.st_mtime_ns}  # as manifest.json has them
        ours = len(header) == 256 and header[:2].tolist() == [SHARD_MAGIC, 1]
        problem = "is not a token shard (wrong magic number or version); see data/prepare.py"
        need(ours, f"{path} {problem}")
        self.count = int(header[2])
        wanted = SHARD_HEADER_BYTES + 2 * self.count
        problem = f"has {size} bytes, but its header says {wanted}; download it again"
        need(wanted == size, f"{path} {problem}")

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """Tokens from number `first` on, all by default: uint16 (count,). Threads may share it."""
        tokens = np.empty(self.count - first if count is None else count, "<u2")
        missing = tokens.view(np.uint8)
        with explained_errors(f"read {self.path}"):
            while len(missing):  # a call may give less than it was asked for; Linux 2 GB at most
                place = SHARD_HEADER_BYTES + 2 * first + tokens.nbytes - len(missing)
                found = os.preadv(self.file.fileno(), [missing], place)
                need(found, f"{self.path} was cut off after the start: download it again")
                missing = missing[found:]
        return tokens

    @cached_property
    def sample(self) -> bytes:
        """16 evenly spread pieces of 512 tokens, or 16 times a shorter shard: for digests."""
        places = np.linspace(0, max(0, self.count - 512), 16).astype(int)
        return b"".join(self.read(int(first), min(512, self.count)).tobytes() for first in places)

    @cached_property
    def sha256(self) -> str:
        """The whole file's."""
        return file_sha256(self.path)


def how_to_make(path: str) -> str:
    """What an error suggests if data are missing at a path: the command that makes them."""
    if "fineweb" in path:
        variant = "sp1024" if "1024" in path else "sp8192"
        return f"run: python data/prepare.py fineweb --variant {variant}"
    return "run: python data/prepare.py sample" if "data/sample" in path else "see data/prepare.py"


def holds_bytes(name: str) -> bool:
    """Whether a file is called NAME_val_bytes_NUMBER.bin: it has bytes per token, no tokens."""
    return name.rpartition("_")[0].endswith("_val_bytes")


def shard_paths(folder: str | Path, split: str) -> list[Path]:
    """A split's shards, "train" or "val", in the order of their names."""
    paths = sorted(Path(folder).glob(f"*_{split}_*.bin"))
    return [path for path in paths if not holds_bytes(path.name)]


def open_shards(folder: str, split: str) -> list[Shard]:
    """A split's shards in the order of shard_paths(), opened.

    Raises UserError if there are none, and if a number of NAME_0, NAME_1 ... is missing, so that
    the text is not whole, or there twice.
    """
    paths = shard_paths(folder, split)
    remedy = f"set DATA_PATH, or {how_to_make(folder)}"
    absent = "" if Path(folder).exists() else ", which does not exist"
    need(paths, f"no *_{split}_*.bin shards in {folder}{absent}: {remedy}")
    series = collections.defaultdict(dict)  # by NAME: its shards by number
    for path in paths:
        name, _, number = path.stem.rpartition("_")
        if number.isdecimal() and len(number) <= 6:  # more digits are a date, not a count
            other = series[name].setdefault(int(number), path)
            need(other is path, f"{other} and {path} are one number: take one of them away")
    for numbers in series.values():
        last = max(numbers)
        first = min(1, *numbers) if len(numbers) > 1 else last  # a shard alone may have any number
        for number in range(first, last):
            gap = f"{numbers[last]} is there, but not number {number}: fetch that, too"
            need(number in numbers, gap)
    return [Shard(path) for path in paths]


def summarize_shards(shards: list[Shard]) -> dict:
    """Their number, tokens in all, and a digest of names and lengths, which reads no tokens."""
    lengths = [(shard.path.name, shard.count) for shard in shards]
    digest = hashlib.sha256(ascii(lengths).encode()).hexdigest()[:16]
    return {"shards": len(shards), "tokens": sum(x.count for x in shards), "digest": digest}


def sampled_digest(shards: list[Shard]) -> str:
    """A digest of the names, lengths and Shard.sample of all shards, 16 hexadecimal digits."""
    parts = [ascii((x.path.name, x.count)).encode() + x.sample for x in shards]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def recorded_hashes(
    folder: str, shards: list[Shard], validation: dict[str, str]
) -> tuple[dict[str, str], int | None, list[str]]:
    """What manifest.json, which data/prepare.py leaves beside shards, says of training shards.

    validation: the SHA-256 of validation shards, by name, computed here. Returns
    - the training shards' SHA-256 by name: "" where size, time of change or sample are not those
      of the manifest's entry;
    - how many validation documents are training documents too: None unless the manifest lists
      exactly the shards that are here;
    - the validation shards that it lists and that are not here.
    A manifest that contradicts one of `validation`, or cannot be read, counts for nothing.
    """
    unknown = {shard.path.name: "" for shard in shards}
    with suppress(OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        manifest = json.loads(Path(folder, "manifest.json").read_bytes())
        entries = {name: x for name, x in manifest["shards"].items() if not holds_bytes(name)}
        told = {name: shown(entry["sha256"]) for name, entry in entries.items()}
        if told | validation != validation | told:  # they differ in a file that both have
            return unknown, None, []
        absent = [name for name in told if "_val_" in name and name not in validation]
        hashes = dict(unknown)
        for shard in shards:
            state = shard.state | {"sampled_sha256": hashlib.sha256(shard.sample).hexdigest()}
            if state.items() <= entries.get(shard.path.name, {}).items():
                hashes[shard.path.name] = told[shard.path.name]
        overlap = int(manifest["overlap"]["documents"])
        return hashes, overlap if validation | hashes == told else None, absent
    return unknown, None, []


def text_trained_on(settings, validation: list[Shard]) -> dict[str, str]:
    """Which shards of an evaluation are known to be training text: the reason, by shard name.

    One is if its name says so; if a training shard beside it has the same sample (only those of the
    same size are opened); or if the log of the run that wrote ARTIFACT has its SHA-256.
    """
    scored = [shard for shard in validation if shard.count]
    sizes = {shard.state["size"] for shard in scored}
    beside, told = {}, {}
    for path in shard_paths(settings.data_path, "train"):
        with suppress(OSError, UserError):  # a broken one does not matter: it is not scored
            if path.stat().st_size in sizes:
                beside[Shard(path).sample] = path
    if log := find_settings(settings)[0]:
        with suppress(LookupError, TypeError, AttributeError):  # a damaged record is left out
            told = dict.fromkeys(last_records(log)["hashes"]["training"].values(), log)
    found = {}
    for shard in scored:
        name = shard.path.name
        if "_train_" in name:
            found[name] = "is training text by its name"
        elif path := beside.get(shard.sample):
            found[name] = f"holds the text of {shown(path)}, a training shard"
        elif path := told.get(shard.sha256):
            found[name] = f"is training text by {shown(path)}"
    return found


def log_hashes(settings, training, validation: list[Shard], log, first=True):
    """Logs the files that are read by name and SHA-256, and what recorded_hashes() knows of them.

    Rank 0 (first) hashes the tokenizer and the validation shards, off every clock; training shards,
    16 GB of FineWeb, are not hashed. Raises UserError if a shard has the sample of a validation
    shard. Without training shards, only a warning says what text_trained_on() finds.
    """
    folder, path = settings.data_path, settings.tokenizer_path
    scored = {}
    for shard in validation:
        twin = scored.setdefault(shard.sample, shard.path.name) if shard.count else ""
        same = twin in ("", shard.path.name)
        need(same, f"{shard.path} holds the text of {twin}, which is scored: take one of them away")
    for shard in training:
        twin = scored.get(shard.sample, "")
        both = f"{shard.path} is training text and is scored, by its name: rename it"
        need(twin != shard.path.name, both)
        need(not twin, f"{shard.path} holds the text of {twin}, which is scored: take it away")
    if not first:
        return
    trained = {} if training else text_trained_on(settings, validation)
    for name, problem in trained.items():
        log(f"warning: {shown(name)} {problem}, and is scored")
    record = {"tokenizer": {os.path.basename(path): file_sha256(path)}}
    record["validation"] = {shard.path.name: shard.sha256 for shard in validation}
    recorded, overlap, absent = recorded_hashes(folder, training, record["validation"])
    if absent:
        log(f"warning: {folder} lacks {shown(', '.join(absent))}, which its manifest.json lists")
    record |= {"training": recorded} if training else {}
    for kind, hashes in record.items():
        parts = [f"{shown(name)} {sha256}" for name, sha256 in hashes.items() if sha256]
        source = " (by manifest.json)" if kind == "training" and parts else ""
        if lacking := len(hashes) - len(parts):
            remedy = f"python data/prepare.py manifest {shown(folder)}, once, does that"
            parts.append(f"{lacking} not hashed ({remedy})")
        log(f"SHA-256, {kind}{source}: {', '.join(parts)}")
    doubled = "not known" if overlap is None else f"{overlap:,} (by manifest.json)"
    text = f"validation documents that are training documents too: {doubled}"
    log(text, "hashes", **record, overlap_documents=overlap, computed=["tokenizer", "validation"])


def check_token_range(tokens: np.ndarray, size: int, split: str):
    """Raises UserError if a token is not below size, the vocabulary's."""
    largest = int(tokens.max(initial=0))
    problem = f"hold token id {largest}, but VOCAB_SIZE={size}: another tokenizer made them"
    need(largest < size, f"the {split} shards {problem}")


def batch_windows(lengths: list[int], seq_len: int, seed: int):
    """Yields (shard, first token) of windows of seq_len + 1 tokens, for ever.

    Each epoch visits every window of every shard once, one shard after the other, to keep reads
    local. Windows start at another phase in each epoch, so that a token's place in them changes.
    Shards keep their order over the epochs: text that comes again soon is still remembered, and
    teaches little. Raises UserError if no shard of these lengths holds a window.
    """
    long = max(lengths) > seq_len
    need(long, f"no training shard holds TRAIN_SEQ_LEN={seq_len} tokens and a target")
    order = []
    for epoch in itertools.count():
        generator = np.random.default_rng([seed, epoch])
        order = order or generator.permutation(len(lengths)).tolist()
        for shard in order:
            length = lengths[shard]
            phase = int(generator.integers(max(1, min(seq_len, length - seq_len))))
            for window in generator.permutation(max(0, (length - 1 - phase) // seq_len)):
                yield shard, phase + int(window) * seq_len


class Batches:
    """This rank's share of every global batch, from batch number `first` on.

    shards: by default, all training shards of DATA_PATH. A thread gathers three batches ahead of
    time; with a GPU it also copies them there, on a stream of its own.
    """

    def __init__(self, settings, ranks, first: int = 0, shards=None):
        self.settings = settings
        self.ranks = ranks
        self.shards = shards or open_shards(settings.data_path, "train")
        lengths = [shard.count for shard in self.shards]
        windows = batch_windows(lengths, settings.train_seq_len, settings.seed)
        self.sequences = settings.train_batch_tokens // settings.train_seq_len
        self.windows = itertools.islice(windows, first * self.sequences, None)
        self.stream = torch.cuda.Stream() if ranks.gpu else None
        self.thread = ThreadPoolExecutor(1)
        self.ahead = collections.deque(self.thread.submit(self._gather) for _ in range(3))
        self.ahead[0].result()  # raises the thread's UserError if the shards are wrong

    def _gather(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """This rank's next tokens (sequences, seq_len + 1) int64, and the event of their copy."""
        windows = list(itertools.islice(self.windows, self.sequences))
        mine = np.array_split(windows, self.ranks.world_size)[self.ranks.rank]
        length = self.settings.train_seq_len + 1
        rows = np.stack([self.shards[shard].read(start, length) for shard, start in mine])
        check_token_range(rows, self.settings.vocab_size, "training")
        tokens = torch.from_numpy(rows.astype(np.int64))
        if self.stream is None:
            return tokens, None
        torch.cuda.set_device(self.ranks.device)  # a thread begins on GPU 0
        with torch.cuda.stream(self.stream):
            on_device = tokens.pin_memory().to(self.ranks.device, non_blocking=True)
            return on_device, self.stream.record_event()

    def next(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets, each (sequences, seq_len) int64 on the device."""
        tokens, copied = self.ahead.popleft().result()
        self.ahead.append(self.thread.submit(self._gather))
        if copied is not None:
            copied.wait()
            tokens.record_stream(torch.cuda.current_stream())  # else their memory is reused early
        return tokens[:, :-1], tokens[:, 1:]


# ---- Capitals as operators -----------------------------------------------------------------------
# "The" and "the", "NASA" and "Nasa" are different tokens, and a model learns each by itself. A
# tokenizer may have operators instead: tokens which say that the letters after them were capitals.
# No text is lost. The operators are those of the contest's pull request 1729, which writes them
# between a space and its word; that cuts "▁the" in two. Here they stand before the space.

TITLE = "\ue001"  # the next letter was a capital, and begins a word: The
CAPITALS = "\ue002"  # all letters of the next word were, two or more: NASA
NEXT = "\ue003"  # the next letter was, within a word: iPhone
ESCAPE = "\ue004"  # the next character is text, and not an operator; a "_" stands for "▁"
CASE_OPERATORS = TITLE + CAPITALS + NEXT + ESCAPE  # tokens 4 to 7 of such a tokenizer
CASE_OPERATOR_IDS = slice(4, 8)
ESCAPE_ID = 7

HAS_TO_BE_ESCAPED = re.compile(f"[{CASE_OPERATORS}▁]")
FROM_A_CAPITAL_ON = re.compile("( ?)([A-Z][A-Za-z]*)")  # a word's rest, and a space before it
OPERATED = re.compile(
    f"{ESCAPE}(?P<escaped>.)|(?P<operator>[{TITLE}{CAPITALS}{NEXT}])(?P<space> ?)(?P<word>[a-z]+)",
    re.DOTALL,
)


def encode_case(text: str) -> str:
    """The text with operators and small letters in place of capitals A to Z.

    A word is letters A to Z and a to z in a row. Operators as T, C, N and E:

        The            T the             of The         of T" the"
        NASA           C nasa            McDonald       T mc N donald
        iPhone         i N phone         A              T a

    so that " the" is one piece, with or without a capital. A character of the text which
    decode_case() would take for an operator, or SentencePiece for a space, gets an ESCAPE in front:
    E becomes EE, T becomes ET, "▁" becomes E"_".
    """

    def escape(match: re.Match) -> str:
        return ESCAPE + ("_" if match[0] == "▁" else match[0])

    def operate(match: re.Match) -> str:
        space, letters = match.groups()
        marked = re.sub("[A-Z]", lambda capital: NEXT + capital[0].lower(), letters)
        before = match.string[max(0, match.start() - 1) : match.start()]
        if not space and "a" <= before <= "z":  # the word began with small letters
            return marked
        if len(letters) > 1 and letters.isupper():
            return CAPITALS + space + letters.lower()
        return TITLE + space + marked.removeprefix(NEXT)

    text = HAS_TO_BE_ESCAPED.sub(escape, text)
    return FROM_A_CAPITAL_ON.sub(operate, text)


def decode_case(text: str) -> str:
    """Undoes encode_case(). An operator without a word, as a model may write one, stays as it is.

    >>> decode_case(encode_case("The NASA's iPhone ▁"))
    "The NASA's iPhone ▁"
    """

    def restore(match: re.Match) -> str:
        if escaped := match["escaped"]:
            return "▁" if escaped == "_" else escaped
        word = match["word"]
        restored = word.upper() if match["operator"] == CAPITALS else word.capitalize()
        return match["space"] + restored

    return OPERATED.sub(restore, text)


def normalize(text: str) -> str:
    """The text as the contest's tokenizers see it, by nmt_nfkc: any white space is one space."""
    import sentencepiece

    rules = {"rule_name": "nmt_nfkc", "escape_whitespaces": False, "add_dummy_prefix": False}
    normalizer = sentencepiece.SentencePieceNormalizer(**rules, remove_extra_whitespaces=True)
    return normalizer.normalize(text)


def escaped_places(tokens: np.ndarray) -> np.ndarray:
    """The places of tokens right after an ESCAPE, whose first character is text: int64 (count,).

    Of ESCAPEs in a row, every other one escapes the one after it.
    """
    places = np.flatnonzero(tokens == ESCAPE_ID)
    begins = np.diff(places, prepend=-2) != 1  # a row of ESCAPEs
    before = places - places[begins][np.cumsum(begins) - 1]  # how many of its row stand before each
    escaped = places[before % 2 == 0] + 1
    return escaped[escaped < len(tokens)]


# ---- Tokens and their bytes ----------------------------------------------------------------------


class Tokenizer:
    """A SentencePiece model, and how many bytes of text each of its tokens stands for.

    Raises UserError for other files, and if it does not have vocab_size tokens. A model that has
    CASE_OPERATORS as tokens 4 to 7 was trained on texts that encode_case() had changed.
    """

    def __init__(self, path: str, vocab_size: int):
        import sentencepiece  # only here: a trained model can be loaded without the package

        there = os.path.isfile(path)  # unlike Path.is_file(), never raises an error
        need(there, f"no tokenizer at {path}: set TOKENIZER_PATH, or {how_to_make(path)}")
        try:
            self.model = model = sentencepiece.SentencePieceProcessor(model_file=os.fsencode(path))
            ids = list(range(model.vocab_size()))
            self.pieces = pieces = model.IdToPiece(ids)
        except (RuntimeError, OSError, UnicodeDecodeError):
            raise UserError(f"{path} is not a SentencePiece model, or cannot be read") from None
        problem = f"{path} has {len(ids)} tokens, but VOCAB_SIZE={vocab_size}"
        need(len(ids) == vocab_size, f"{problem}: set them to agree")
        special = [model.IsControl(ids), model.IsUnknown(ids), model.IsUnused(ids)]
        self.is_special = np.any(special, axis=0)
        self.has_space = np.array([piece.startswith("▁") for piece in pieces]) & ~self.is_special
        # target_bytes() counts a leading space, as that depends on the token before.
        texts = [piece.removeprefix("▁").replace("▁", " ") for piece in pieces]
        is_byte = np.array(model.IsByte(ids))
        self.is_text = ~(self.is_special | is_byte)
        lengths = np.where(is_byte, 1, [len(text.encode()) for text in texts])
        self.piece_bytes = np.where(self.is_special, 0, lengths)
        self.has_operators = pieces[CASE_OPERATOR_IDS] == [*CASE_OPERATORS]
        elsewhere = not self.has_operators and {*CASE_OPERATORS} <= {*pieces}
        problem = f"{path} has operators of capitals, but not as tokens 4 to 7: train it anew"
        need(not elsewhere, problem)
        self.drops_space = True  # whether decoding drops the space with which a text begins
        if self.has_operators:
            others = [*pieces]
            others[CASE_OPERATOR_IDS] = ""
            within = {*CASE_OPERATORS} & {*"".join(others)}  # would be counted as text
            silent = self.is_special[CASE_OPERATOR_IDS].any()  # would be missing in decoded text
            problem = f"{path} has operators of capitals within other pieces, or as control symbols"
            need(not within and not silent, f"{problem}: train it anew")
            self.piece_bytes[CASE_OPERATOR_IDS] = 0  # capitals and small letters have one byte each
            is_sign = [piece.startswith("_") or piece == "<0x5F>" for piece in pieces]
            is_sign = np.array(is_sign) & ~self.is_special
            self.escaped_bytes = np.where(is_sign, len("▁".encode()) - 1, 0)  # more if escaped
            self.escaped_bytes[CASE_OPERATOR_IDS] = len(ESCAPE.encode())
            first = int(np.argmax(self.has_space))
            self.drops_space = not model.decode([first]).startswith(" ")

    def target_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of text that each target tokens[1:] stands for, int64 (N,), of tokens (N + 1,).

        A leading space counts, but not after a special token if decoding drops it there. An
        operator has 0 bytes; an escaped one has its own 3, as has a "_" that stands for "▁".
        """
        targets = tokens[1:]
        space = self.has_space[targets]
        if self.drops_space:
            space = space & ~self.is_special[tokens[:-1]]
        counted = self.piece_bytes[targets] + space
        if self.has_operators:
            escaped = escaped_places(tokens)
            counted[escaped - 1] += self.escaped_bytes[tokens[escaped]]
        return counted

    def spelt_operators(self, tokens: np.ndarray) -> np.ndarray:
        """Where three byte tokens spell an operator: int64 (count,), the first one's places.

        No text is encoded so, since each operator is a token.
        """
        places = [np.empty(0, np.int64)]
        for operator in CASE_OPERATORS if self.has_operators else "":
            one, two, three = self.model.PieceToId([f"<0x{x:02X}>" for x in operator.encode()])
            alike = (tokens[:-2] == one) & (tokens[1:-1] == two) & (tokens[2:] == three)
            places += [np.flatnonzero(alike)] if self.model.IsByte(one) else []
        return np.concatenate(places)

    def restored(self, text: str) -> str:
        """Decoded text as people write it: capitals in place of operators.

        With operators a "▁" of the text is escaped: any other was a space that has no piece.
        """
        return decode_case(text.replace("▁", " ")) if self.has_operators else text

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts, as people write them, without BOS."""
        return self.model.encode([encode_case(x) for x in texts] if self.has_operators else texts)

    def mismatch(self, tokens: np.ndarray) -> str:
        """Why tokens cannot be this tokenizer's, or why it counts wrong bytes; "" if all is well.

        The first ROUND_TRIP_TOKENS are decoded and encoded again. Nearly all pairs of neighbours
        must come back; not all, as a document may be cut off, or change when it is normalized a
        second time. If a document comes back unchanged, the bytes counted must be those of its
        text, or one less if it begins with a space. A "▁" in the text was a space for which there
        is no piece. Capitals come back, too, and are made operators again.
        """
        tokens = np.append(BOS_ID, tokens[:ROUND_TRIP_TOKENS])
        runs = np.split(tokens, np.flatnonzero(self.is_special[tokens]))
        unknown = self.model.unk_id()  # what follows it is not the beginning of a document
        documents = [run[1:].tolist() for run in runs if len(run) > 1 and run[0] != unknown]
        texts = [self.restored(text) for text in self.model.decode(documents)]
        pairs, returned = collections.Counter(), collections.Counter()
        for document, text, again in zip(documents, texts, self.encode(texts), strict=True):
            pairs.update(itertools.pairwise(document))
            returned.update(itertools.pairwise(again))
            spaced = text if self.has_operators else text.replace("▁", " ")
            length = len(spaced.encode())
            counted = int(self.target_bytes(np.array([BOS_ID, *document])).sum())
            if document == again and length - counted not in (0, self.has_space[document[0]]):
                count = f"it counts {counted} bytes in a text of {length}"
                return f"{count}: has it no piece for a space?"
        lost = (pairs - returned).total()
        alike = lost < FEW_PAIRS or lost <= MOST_LOST_PAIRS * pairs.total()
        if alike:
            return ""
        layout = " (operators of capitals stand before the space?)" if self.has_operators else ""
        return f"decoded and encoded again, {lost / pairs.total():.0%} are others{layout}"

    def encode_prompt(self, prompt: str) -> list[int]:
        """SAMPLE_PROMPT as a document's first tokens, BOS in front; empty without a prompt.

        A tokenizer with operators does not normalize: its training text was normalized before, and
        so is the prompt. Raises UserError for a prompt without text.
        """
        (pieces,) = self.encode([normalize(prompt) if self.has_operators else prompt])
        need(pieces or not prompt, "SAMPLE_PROMPT holds no text: leave it out, or say something")
        return [BOS_ID, *pieces] if prompt else []

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, with an empty line between documents, which begin with BOS."""
        groups = itertools.groupby(tokens, key=lambda token: token == BOS_ID)
        documents = [list(group) for is_bos, group in groups if not is_bos]
        return "\n\n".join(map(self.restored, self.model.decode(documents)))


class ValidationSet(NamedTuple):
    """The text that is scored: N targets, each predicted from the tokens before it."""

    tokens: np.ndarray  # (N + 1,) uint16
    target_bytes: np.ndarray  # (N,) int64, of text that each target stands for
    shards: tuple[Shard, ...] = ()


def load_validation(settings, tokenizer) -> ValidationSet:
    """The validation shards as one stream; UserError if short, textless or another tokenizer's."""
    shards = open_shards(settings.data_path, "val")
    tokens = np.concatenate([shard.read() for shard in shards])
    short = f"the validation shards hold {len(tokens)} tokens, less than one sequence and a target"
    need(len(tokens) > settings.train_seq_len, short)
    check_token_range(tokens, settings.vocab_size, "validation")
    if not settings.eval_any_tokens:
        check_tokenizer(settings, tokenizer, shards, "validation")
    spelt = tokenizer.spelt_operators(tokens)
    problem = f"bytes of the validation shards spell an operator of capitals, {len(spelt):,} times"
    need(not len(spelt), f"{problem}, and would count as text: make them by data/prepare.py --case")
    target_bytes = tokenizer.target_bytes(tokens)
    need(target_bytes.any(), "the validation shards hold no text: no token stands for a byte")
    check_counted_bytes(settings, shards, target_bytes)
    return ValidationSet(tokens, target_bytes, (*shards,))


def file_of_bytes(shard: Shard) -> Path | None:
    """The file beside a validation shard that has its tokens' bytes: NAME_val_bytes_NUMBER.bin."""
    name, _, number = shard.path.name.rpartition("_")
    path = shard.path.with_name(f"{name}_bytes_{number}")
    return path if holds_bytes(path.name) and os.path.lexists(path) else None


def check_counted_bytes(settings, shards: list[Shard], target_bytes: np.ndarray):
    """Raises UserError if a file_of_bytes() counts other bytes than target_bytes (N,).

    It is a shard with each token's bytes in the token's place, uint16; BOS has 0. The first token
    of all is no target, and is not compared. Scores use the script's own count in any case.
    """
    start = 0  # place of the next shard in the stream
    remedy = "make the data anew by data/prepare.py, or take the file away: no run needs it"
    for shard in shards:
        first = 0 if start else 1  # the first of its tokens that is a target
        ours = target_bytes[max(0, start - 1) : max(0, start + shard.count - 1)]
        start += shard.count
        if (path := file_of_bytes(shard)) is None:
            continue
        try:
            theirs = Shard(path).read()
        except UserError as error:
            raise UserError(f"{error}; or take the file away: no run needs it") from None
        length = f"{path} holds {len(theirs):,} numbers, {shard.path.name} {shard.count:,} tokens"
        need(len(theirs) == shard.count, f"{length}: {remedy}")
        places = first + np.flatnonzero(theirs[first:] != ours)
        differ = f"{len(places):,} of its {shard.count:,} tokens other bytes"
        who = f"{path} gives {differ} than TOKENIZER_PATH={settings.tokenizer_path}"
        need(not len(places), f"{who}, token {min(places, default=0)} first: {remedy}")


def check_tokenizer(settings, tokenizer, shards: list[Shard], name: str):
    """Raises UserError if these shards, `name` in errors, begin with another tokenizer's tokens."""
    share = max(2048, ROUND_TRIP_TOKENS // len(shards))
    for shard in shards:
        tokens = shard.read(0, min(shard.count, share))
        check_token_range(tokens, settings.vocab_size, name)
        problem = tokenizer.mismatch(tokens)
        what = f"TOKENIZER_PATH={settings.tokenizer_path} does not fit the {name} shards"
        need(not problem, f"{what}: {problem}")
        if settings.mask_impossible_pairs and not settings.eval_only:  # there the artifact decides
            check_pairs(settings, tokens, name)


def check_pairs(settings, tokens: np.ndarray, name: str):
    """Raises UserError for tokens (n,) with many pairs that packed_pairs() calls impossible."""
    pairs = packed_pairs(settings.tokenizer_path, settings.vocab_size).numpy()
    target = tokens[1:]
    found = ((pairs[tokens[:-1], target // 8] >> (target % 8)) & 1).sum()
    problem = f"{found / len(tokens):.1%} of the {name} shards' tokens BPE never writes there"
    known = found < FEW_PAIRS or found <= MOST_IMPOSSIBLE * len(tokens)
    need(known, f"{problem} (is text encoded in pieces?): use MASK_IMPOSSIBLE_PAIRS=0")


# ==================================================================================================
# 4. The recurrence
#
# Each head of a state-space layer keeps one matrix, the state S (P x N). At a token it decays, gets
# the outer product of the token's value and key, times its step size, and is read by its query.
# Letters of all shapes, here and in section 11:
#
#     B  sequences in a batch         P  channels of a head: the numbers of a value
#     L  tokens in a sequence         N  state size: the numbers of a key and of a query
#     H  heads                        R  angles: 2R <= N numbers of keys and queries turn in pairs
#     C  tokens in a chunk
#
# Mamba-3 (arXiv 2603.15569), for each head and each token t:
#
#     dt_t     = softplus(step_t + step_bias)                        step size, above 0
#     A_t      = -max(softplus(decay_t), DECAY_FLOOR)                rate of decay, below 0
#     a_t      = exp(A_t dt_t)                                       decay, from 0 to 1
#     lambda_t = sigmoid(trapezoid_t)                                the step's part at its end
#     theta_t  = theta_{t-1} + pi tanh(angle_rate_t) dt_t            angle, by which pairs turn
#     k_t      = turn(norm(key_t) + key_bias, theta_t)               likewise q_t
#     S_t      = a_t (S_{t-1} + (1 - lambda_t) dt_t v_{t-1} k_{t-1}^T) + lambda_t dt_t v_t k_t^T
#     y_t      = (S_t q_t + D v_t) silu(gate_t)
#
# By the trapezoid rule a part of a step goes to the token at its beginning, t-1, the rest to that
# at its end, t. Mamba-2 has lambda = 1, no angles, norms or biases, and learns one A for each head.
#
# sequential_scan() computes this as it stands, chunked_scan() as matmuls, triton_scan() (section
# 11) in fused kernels. Each takes the state that earlier tokens left and returns the one it leaves.

DECAY_FLOOR = 1e-4  # so that no state of Mamba-3 lasts for ever
RESET_LOG_DECAY = -60.0  # a document's start in sums of log decays: exp(-60) is 1e-26
SCAN_NORM_EPS = 1e-5  # of the norms of keys, queries and a scan's outputs, beside a mean square
NORM_EPS = 1e-6  # of all other norms


class ScanInputs(NamedTuple):
    """What the recurrence reads of L tokens. It computes in step_size's dtype, float32 or more."""

    value: Tensor  # (B, L, H, P)
    key: Tensor  # (B, L, N), the paper's B: normed, not yet biased and turned, for all heads
    query: Tensor  # (B, L, N), the paper's C: likewise; Mamba-2 norms neither
    step_size: Tensor  # (B, L, H), dt > 0
    log_decay: Tensor  # (B, L, H), A·dt <= 0
    key_bias: Tensor  # (H, N)
    query_bias: Tensor  # (H, N)
    skip: Tensor  # (H,), the paper's D
    gate: Tensor  # (B, L, H, P), before SiLU
    trapezoid: Tensor | None = None  # (B, L, H), before the sigmoid; None in Mamba-2
    angle_rate: Tensor | None = None  # (B, L, R), before tanh; None in Mamba-2
    document_start: Tensor | None = None  # (B, L) bool: nothing before such a token reaches it


class ScanState(NamedTuple):
    """What earlier tokens leave to the next one: the state S, and the last angle, key and value."""

    angle: Tensor  # (B, H, R), from 0 to 2 pi
    ssm: Tensor  # (B, H, P, N)
    key: Tensor  # (B, H, N), biased and turned
    value: Tensor  # (B, H, P)


class ScanTerms(NamedTuple):
    """The terms of the recurrence's equations, for each head, float32 or float64."""

    state: ScanState  # before the first token
    angle: Tensor  # (B, L, H, R), theta_t
    key: Tensor  # (B, L, H, N), k_t
    query: Tensor  # (B, L, H, N), q_t
    value: Tensor  # (B, L, H, P), v_t
    current: Tensor  # (B, L, H), lambda_t dt_t: the weight of the token itself
    previous: Tensor  # (B, L, H), (1 - lambda_t) dt_t: the weight of the token before


class MambaSizes(NamedTuple):
    """The shape of one Mamba layer's recurrence, and which Mamba it is."""

    heads: int
    channels: int
    state: int
    angles: int
    version: int

    def columns(self) -> dict[str, int]:
        """The groups of in_proj's outputs that this Mamba has, in their order, and their widths."""
        inner = self.heads * self.channels
        widths = {"gate": inner, "value": inner}
        if self.version >= 2:
            widths |= {"key": self.state, "query": self.state, "step": self.heads}
        if self.version == 3:
            widths |= {"decay": self.heads, "trapezoid": self.heads, "angle_rate": self.angles}
        return widths

    def width_of(self, *groups: str) -> int:
        """How many of in_proj's outputs are in these groups; those this Mamba lacks count 0."""
        widths = self.columns()
        return sum(widths.get(name, 0) for name in groups)

    def split(self, projected: Tensor) -> dict[str, Tensor]:
        """in_proj's outputs (B, L, columns) by group; gate and value as (B, L, H, P)."""
        widths = self.columns()
        groups = dict(zip(widths, projected.split(list(widths.values()), dim=-1), strict=True))
        for name in ("gate", "value"):
            groups[name] = groups[name].unflatten(-1, (self.heads, self.channels))
        return groups


class MambaParameters(NamedTuple):
    """What a Mamba layer learns between its projections, float32."""

    step_bias: Tensor  # (H,), before softplus
    skip: Tensor  # (H,)
    key_bias: Tensor  # (H, N); Mamba-2 has none: zeros (H, 1)
    query_bias: Tensor  # likewise
    key_norm: Tensor | None = None  # (N,), Mamba-3
    query_norm: Tensor | None = None  # (N,), Mamba-3
    decay_rate: Tensor | None = None  # (H,), Mamba-2's A < 0
    heavy_tail: bool = False  # Mamba-3's decay rates by another function than softplus


def mamba_scan(
    projected: Tensor, parameters, sizes: MambaSizes, document_start, state, backend, chunk_size
) -> tuple[Tensor, Tensor, ScanState]:
    """The recurrence on in_proj's outputs, (B, L, columns), with a layer's MambaParameters.

    document_start: (B, L) bool or None. state: what earlier tokens left, or None. Returns the gated
    outputs (B, L, H·P) in projected's dtype, their mean squares (B, L), float32 or more, and the
    state that is left: None by backend "fused". Given a state, "chunked" stands in for that.
    """
    if backend == "triton":
        return triton_scan(projected, parameters, sizes, document_start, state, chunk_size)
    if backend == "fused" and state is None:  # the library's scan takes and returns none
        return library_scan(projected, parameters, sizes, document_start, chunk_size)
    inputs = scan_inputs(projected, parameters, sizes, document_start)
    if backend == "sequential":
        y, state = sequential_scan(inputs, state)
    else:
        y, state = chunked_scan(inputs, state, chunk_size)
    return y.flatten(2), y.to(inputs.step_size.dtype).square().mean((2, 3)), state


def scan_inputs(projected: Tensor, parameters, sizes: MambaSizes, document_start) -> ScanInputs:
    """in_proj's outputs (B, L, columns) as the recurrence reads them, Mamba-2's or Mamba-3's."""
    column = sizes.split(projected)
    step_size = F.softplus(widened(column.pop("step")) + parameters.step_bias)
    decay_rate = parameters.decay_rate
    if sizes.version == 3:
        column["key"] = norm(column["key"], parameters.key_norm, SCAN_NORM_EPS)
        column["query"] = norm(column["query"], parameters.query_norm, SCAN_NORM_EPS)
        decay = widened(column.pop("decay"))
        rate = F.softplus(decay)
        if parameters.heavy_tail:  # 1 + decay above 0, else 1 / (1 - decay): falls more slowly
            rate = torch.where(decay > 0, decay.abs() + 1, 1 / (decay.abs() + 1))
        decay_rate = -rate.clamp(min=DECAY_FLOOR)
    return ScanInputs(
        **column,  # value, key, query, gate; in Mamba-3 trapezoid and angle_rate
        step_size=step_size,
        log_decay=decay_rate * step_size,
        key_bias=parameters.key_bias,
        query_bias=parameters.query_bias,
        skip=parameters.skip,
        document_start=document_start,
    )


def widened(x: Tensor) -> Tensor:
    """x in float32 or more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm(x: Tensor, weight: Tensor | None = None, eps: float = NORM_EPS) -> Tensor:
    """RMSNorm over the last dimension, in float32 or more; the result has x's dtype."""
    wide = widened(x)
    weight = None if weight is None else weight.to(wide.dtype)
    return F.rms_norm(wide, x.shape[-1:], weight, eps).to(x.dtype)


def rotate_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """Turns the first 2R numbers of x (..., N), in pairs of neighbours, by angle (..., R), rad."""
    turning, rest = x.tensor_split([2 * angle.shape[-1]], dim=-1)
    even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)  # (..., R) each
    cos, sin = angle.cos(), angle.sin()
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([pairs.flatten(-2), rest], dim=-1)


def add_outer(ssm: Tensor, weight: Tensor, value: Tensor, key: Tensor) -> Tensor:
    """S + weight v k^T: (B, H, P, N), (B, H), (B, H, P), (B, H, N) -> (B, H, P, N)."""
    return ssm + (weight.unsqueeze(-1) * value).unsqueeze(-1) * key.unsqueeze(-2)


def empty_state(like: Tensor, batch, heads, channels, state, angles) -> ScanState:
    """The state before a text's first token, zeros; sizes are B, H, P, N and R, in this order."""
    zeros = partial(like.new_zeros, batch, heads)
    return ScanState(zeros(angles), zeros(channels, state), zeros(state), zeros(channels))


def scan_terms(inputs: ScanInputs, state: ScanState | None) -> ScanTerms:
    """The equations' terms: angles summed, keys and queries biased and turned, steps split."""
    step_size = inputs.step_size
    dtype = step_size.dtype
    if state is None:
        batch, _, heads, channels = inputs.value.shape
        angles = 0 if inputs.angle_rate is None else inputs.angle_rate.shape[-1]
        state = empty_state(step_size, batch, heads, channels, inputs.key.shape[-1], angles)
    state = ScanState(*(x.to(dtype) for x in state))
    key = inputs.key.to(dtype).unsqueeze(2) + inputs.key_bias.to(dtype)  # (B, L, H, N)
    query = inputs.query.to(dtype).unsqueeze(2) + inputs.query_bias.to(dtype)
    angle = state.angle.unsqueeze(1).expand(-1, key.shape[1], -1, -1)  # (B, L, H, R)
    if inputs.angle_rate is not None:
        rate = math.pi * torch.tanh(inputs.angle_rate.to(dtype))
        turn = rate.unsqueeze(2) * step_size.unsqueeze(-1)
        if turn.shape[1] > 1:  # a single token needs no cumsum(), whose order varies on GPUs
            turn = turn.cumsum(dim=1)
        angle = angle + turn
        key, query = (rotate_pairs(x, angle) for x in (key, query))
    current = step_size
    previous = torch.zeros_like(step_size)
    if inputs.trapezoid is not None:
        current = torch.sigmoid(inputs.trapezoid.to(dtype)) * step_size
        previous = step_size - current
    return ScanTerms(state, angle, key, query, inputs.value.to(dtype), current, previous)


def finish_scan(inputs: ScanInputs, terms: ScanTerms, y: Tensor, ssm: Tensor):
    """Adds the skip D v to y = S q (B, L, H, P) and gates it; returns that, and the ScanState."""
    y = y + inputs.skip.to(y.dtype).unsqueeze(-1) * terms.value
    y = (y * F.silu(inputs.gate.to(y.dtype))).to(inputs.value.dtype)
    angle = terms.angle[:, -1] % (2 * math.pi)
    return y, ScanState(angle, ssm, terms.key[:, -1], terms.value[:, -1])


def sequential_scan(inputs: ScanInputs, state: ScanState | None) -> tuple[Tensor, ScanState]:
    """The recurrence as written, all others' reference: gated outputs (B, L, H, P) in value's
    dtype, and the state that the last token leaves. state: the one before these tokens, or None.
    """
    terms = scan_terms(inputs, state)
    decay = inputs.log_decay.exp()
    if inputs.document_start is not None:  # a document begins by forgetting all of the state
        decay = decay.masked_fill(inputs.document_start.unsqueeze(-1), 0.0)
    _, ssm, last_key, last_value = terms.state
    outputs = []
    for t in range(terms.value.shape[1]):
        ssm = add_outer(ssm, terms.previous[:, t], last_value, last_key)
        ssm = decay[:, t, :, None, None] * ssm
        last_key = terms.key[:, t]
        last_value = terms.value[:, t]
        ssm = add_outer(ssm, terms.current[:, t], last_value, last_key)
        outputs.append((ssm @ terms.query[:, t].unsqueeze(-1)).squeeze(-1))  # (B, H, P)
    return finish_scan(inputs, terms, torch.stack(outputs, dim=1), ssm)


# The same as matmuls, after Mamba-2's SSD (arXiv 2405.21060).
#
# The folded key weight. The outer product v_s k_s^T enters the state twice: with its own token s,
# times lambda_s dt_s; and with the next one, times (1 - lambda_{s+1}) dt_{s+1} and a_{s+1}. Up to a
# later token t both decay by a_{s+1} ... a_t in all. One weight for each key holds the two:
#
#     w_s     = lambda_s dt_s + (1 - lambda_{s+1}) dt_{s+1}                      (the key weight)
#     S_t     = sum_{s<t} (a_{s+1} ... a_t) w_s v_s k_s^T + lambda_t dt_t v_t k_t^T
#     S_t q_t = sum_{s<t} (a_{s+1} ... a_t) w_s (q_t·k_s) v_s + lambda_t dt_t (q_t·k_t) v_t
#
# Token t's own product lacks its second half, which the next token adds. What is left is decayed
# linear attention with weighted keys, without a trapezoid. A state that is carried in gets the half
# that its last token lacks, (1 - lambda_1) dt_1 v_0 k_0^T, and adds (a_1 ... a_t) S_0 q_t.
#
# Chunks of C tokens. The sum over s is a masked matmul within a chunk, and a state between chunks,
# S', which is S with that half. A call's last token still lacks it, as the next one's lambda and
# dt are not known: what is left is S, and ScanState keeps that token's key and value.
#
#     tokens     0 ......... C-1     C ........ 2C-1     2C ....... 3C-1
#               +---------------+   +---------------+   +---------------+
#     outputs   | (Q K^T ∘ E) V |   | (Q K^T ∘ E) V |   | (Q K^T ∘ E) V |    step 2
#               +-------+-------+   +-------+-------+   +-------+-------+
#                ^      | leaves     ^      | leaves     ^      | leaves     step 3
#     incoming   |      v behind     |      v behind     |      v behind
#     S' --------+--- a·S' + O ------+--- a·S' + O ------+--- a·S' + O ----> S
#
# E holds decays times key weights, a is a chunk's whole decay, O its own outer products, decayed to
# its end. The incoming state is read by each of the chunk's queries (step 4).


def chunked_scan(inputs: ScanInputs, state: ScanState | None, chunk_size: int):
    """sequential_scan() as matmuls within chunks and a short loop between them."""
    terms = scan_terms(inputs, state)
    length = terms.value.shape[1]
    log_decay = inputs.log_decay
    if inputs.document_start is not None:
        log_decay = log_decay.masked_fill(inputs.document_start.unsqueeze(-1), RESET_LOG_DECAY)

    # 1. Cut (B, L, H, ...) into (B, H, chunks, C, ...). Padding has weight 0 and decay 1.
    def cut(x: Tensor) -> Tensor:
        padding = (0, 0) * (x.dim() - 2) + (0, -length % chunk_size)
        return F.pad(x, padding).unflatten(1, (-1, chunk_size)).movedim(3, 1)

    key, query, value = (cut(x) for x in (terms.key, terms.query, terms.value))
    key_weight = cut(terms.current + F.pad(terms.previous[:, 1:], (0, 0, 0, 1)))
    total = cut(log_decay).cumsum(dim=-1)  # (B, H, chunks, C), from the chunk's beginning on

    # 2. Within a chunk, from earlier tokens. Later ones are masked before exp(): it may overflow.
    between = total.unsqueeze(-1) - total.unsqueeze(-2)  # (B, H, chunks, C, C)
    not_before = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=value.device).triu()
    decay = between.masked_fill(not_before, -torch.inf).exp()
    y = (query @ key.mT * decay * key_weight.unsqueeze(-2)) @ value

    # 3. Between chunks: here the state is passed on. Each chunk reads what came before it.
    to_end = (total[..., -1:] - total).exp() * key_weight
    left_behind = (value * to_end.unsqueeze(-1)).mT @ key  # (B, H, chunks, P, N)
    chunk_decay = total[..., -1, None, None].exp()  # (B, H, chunks, 1, 1)
    ssm = add_outer(terms.state.ssm, terms.previous[:, 0], terms.state.value, terms.state.key)
    incoming = []
    for chunk in range(left_behind.shape[2]):
        incoming.append(ssm)
        ssm = chunk_decay[:, :, chunk] * ssm + left_behind[:, :, chunk]

    # 4. What the incoming state adds to each token of its chunk, and the token's own product.
    y = y + (query @ torch.stack(incoming, dim=2).mT) * total.exp().unsqueeze(-1)
    y = y.movedim(1, 3).flatten(1, 2)[:, :length]  # (B, L, H, P)
    own = terms.current * (terms.query * terms.key).sum(-1)
    y = y + own.unsqueeze(-1) * terms.value
    return finish_scan(inputs, terms, y, ssm)


# By MAMBA_VERSION, the fastest on a GPU first; the last one is the reference. fused: the published
# libraries' kernels (section 12); triton: our own (section 11).
SCAN_BACKENDS = {
    1: ("fused", "parallel", "sequential"),
    2: ("fused", "chunked", "sequential"),
    3: ("triton", "chunked", "sequential"),
}
FOR_GPUS = ("fused", "triton")
ADDS_IN_ORDER = ("triton", "parallel")  # give the same bits every time, on GPUs too


def choose_scan_backend(settings, device: torch.device) -> str:
    """SCAN_BACKEND, or for "auto" the first backend that runs these layers here; or UserError."""
    wanted = settings.scan_backend
    names = SCAN_BACKENDS[settings.mamba_version]
    reasons = {name: why_not(name, settings, device) for name in names}
    usable = [name for name in names if not reasons[name]]
    if wanted == "auto":
        # Without its library, the first Mamba is many times slower on a GPU: the error says to
        # install it. A CPU could only interpret what is for GPUs: that is not chosen either.
        install = settings.mamba_version == 1 and isinstance(reasons["fused"], LacksLibrary)
        chosen = [name for name in usable if device.type == "cuda" or name not in FOR_GPUS]
        wanted = names[0] if install or not chosen else chosen[0]
    reason = reasons.get(wanted, f"is no backend of MAMBA_VERSION={settings.mamba_version}")
    need(not reason, f"SCAN_BACKEND={wanted} {reason}; what runs: {', '.join(usable) or 'none'}")
    return wanted


def why_not(name: str, settings, device: torch.device) -> str:
    """Why a backend cannot run the layers of these settings on this device; empty if it can."""
    gpu = device.type == "cuda"
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if name in FOR_GPUS and not (gpu or interpreted):
        return "needs a GPU"
    if gpu and settings.deterministic and name not in ADDS_IN_ORDER:
        return "adds in any order, which DETERMINISTIC=1 excludes"
    if name == "triton":
        return why_not_triton(settings, device)
    return why_not_fused(settings) if name == "fused" else ""


# ==================================================================================================
# 5. Model
#
#     tokens --> embedding + hashed bigram --> norm --> block 0 --> block 1 ... --> norm --> logits
#
#     block:  x = keep·x + mix·embedded;  x = x + mixer(norm(x));  x = x + MLP(norm(x))
#
# A mixer, Attention or Mamba, is what carries anything from token to token. Weights are float32,
# activations as PRECISION says. Depth recurrence is another order of the blocks. Every pass goes
# through Model.through_blocks(): whole windows by forward(); and, with every mixer's state, a
# stream's next part by resume() and each text's next token by step().

SDPA_KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
VARIABLE_LENGTH = ("flash", "fa2", "fa3")  # keep documents apart by their lengths
GATE_INPUTS = 16  # channels of an attention layer's input that its gates read
STEP_RANK = 16  # the first Mamba's dt_rank: numbers from which dt_proj makes step sizes
EAGER_STEPS = 2  # of generate() on a GPU, before its kernels are recorded


def initial(kind: str, *shape: int) -> Tensor:
    """A new parameter, float32. Output matrices begin as zeros: a new block adds nothing yet."""
    x = torch.zeros(shape)
    match kind:
        case "zero":  # output matrices of mixers and MLPs, gates, biases of convolutions
            return x
        case "one":  # skips (D, U-net), weights of norms, biases of keys and queries
            return x + 1
        case "matrix":  # (rows, columns): outputs are as large as inputs
            return x.normal_(std=shape[1] ** -0.5)
        case "convolution":  # (channels, taps)
            return x.uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5)
        case "step bias":  # step sizes spread evenly in logarithm; softplus(bias) = step
            step = torch.exp(x.uniform_(math.log(1e-3), math.log(1e-1)))
            return step + torch.log(-torch.expm1(-step))
        case "log rate":  # Mamba-2, A for each head
            return x.uniform_(1, 16).log()
        case "log rates":  # the first Mamba, (channels, N): A = -1, -2, ... -N for each channel
            return torch.arange(1.0, shape[1] + 1).log().repeat(shape[0], 1)
    raise ValueError(kind)


class Documents(NamedTuple):
    """Where documents begin in a batch of windows, in the forms that layers ask for."""

    reach: Tensor  # (B, T) int32: how many tokens before it, in the window, a token may look at
    blocks: object = None  # for backend flex: its BlockMask
    edges: Tensor | None = None  # for flash, fa2, fa3: the first of document_edges()
    crowded: Tensor | None = None  # for the same, () bool: edges has no room for all documents


class Context(NamedTuple):
    """What all blocks of a forward pass share, over windows of T tokens or a stream's next T.

    Of a stream, scans and convolutions read the T tokens in a row. Attention reads them in windows
    of L = TRAIN_SEQ_LEN tokens that overlap by O: places count from the O tokens before the T on.
    """

    document_start: Tensor | None  # (B, T) bool, where scans forget; None: nowhere
    turns: Tensor  # rotary_turns() of T places, or of L after a state
    reach: Tensor | None = None  # Documents.reach, where convolutions end; None: nowhere
    documents: Documents | None = None  # where attention ends, in its windows; None: nowhere
    attention_backend: str = "auto"
    windows: Tensor | None = None  # of a stream, (W, L) int64: the places that each window reads
    outputs: Tensor | None = None  # (T,) int64, where each token's query is, in windows row by row
    float8: str = "none"  # FLOAT8_PRODUCTS where a step of training asks for them


def compact(x: Tensor) -> Tensor:
    """A contiguous copy: compiled blocks want its strides, and it keeps no larger tensor alive."""
    return x.clone(memory_format=torch.contiguous_format)


def stream_windows(seen: Tensor, overlap: int, length: int, size: int) -> tuple[Tensor, Tensor]:
    """Context's windows and outputs, for `length` tokens after `overlap` earlier ones.

    A window of `size` tokens has size - overlap new ones, a number that divides length. If only
    `seen`, () int64, of the earlier tokens exist, windows begin at the stream's first token and are
    filled up with later ones, at which causal attention does not look. With two earlier tokens e,
    four new ones and size 4, as places; and at a stream's beginning, where e do not exist:

        e0 e1 n0 n1         windows [0 1 2 3] [2 3 4 5], outputs 2 3 6 7
              n0 n1 n2 n3   windows [2 3 4 5] [2 3 4 5], outputs 0 1 6 7
    """
    stride = size - overlap
    first = torch.arange(0, length, stride, device=seen.device).clamp(min=overlap - seen)  # (W,)
    windows = first[:, None] + torch.arange(size, device=seen.device)
    token = torch.arange(length, device=seen.device)
    window = token // stride
    outputs = window * size + overlap + token - first[window]
    return windows.clamp(max=overlap + length - 1), outputs


class Linear(nn.Linear):
    """y = W x in x's dtype. W is float32; Muon trains it. zero: W begins as zeros."""

    row_groups: tuple[int, ...] = ()  # numbers of rows that Muon takes as matrices of their own
    dynamics_rows: int = 0  # the last rows that steer a recurrence: 8 bits each in the artifact

    def __init__(self, in_features: int, out_features: int, zero: bool = False):
        super().__init__(in_features, out_features, bias=False)
        self.weight = nn.Parameter(initial("zero" if zero else "matrix", out_features, in_features))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """W (scale·x) of x (..., in); scale (..., 1), one factor for a row, is applied after W."""
        y = F.linear(x, self.weight.to(x.dtype))
        return y if scale is None else (y * scale).to(x.dtype)

    def effective_input(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """What forward(x, scale) multiplies W by, float32 or more: GPTQ's Hessian is made of it."""
        return widened(x) if scale is None else widened(x) * scale


def find_documents(start: Tensor, backend: str) -> Documents:
    """The Documents of windows for an attention backend; start (B, T) bool: one begins here.

    A window's first token always begins one. Shapes depend on B and T alone: one graph serves all.
    """
    position = torch.arange(start.shape[1], device=start.device, dtype=torch.int32)
    reach = position - torch.where(start, position, 0).cummax(dim=1).values
    if backend == "flex":
        return Documents(reach, blocks=document_blocks(reach))
    if backend in VARIABLE_LENGTH:
        return Documents(reach, None, *document_edges(start))
    return Documents(reach)


def attend(query: Tensor, key: Tensor, value: Tensor, documents, backend: str) -> Tensor:
    """Causal softmax attention: y_t = sum over s <= t of softmax_s(q_t·k_s / sqrt(D)) v_s.

    query (B, T, heads, D), as the result; key and value (B, T, kv heads, D), where query head h
    reads key/value head h // (heads / kv heads): grouped queries (arXiv 2305.13245). s is of t's
    document; without documents (None), any. Backend "auto" is SDPA in prepare_torch()'s order.
    """
    if backend == "math":
        return attend_by_formula(query, key, value, documents)
    if backend in FLASH_LIBRARIES or (documents is not None and backend == "flash"):
        return attend_by_lengths(query, key, value, documents, backend)
    grouped = query.shape[2] != key.shape[2]
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]  # (B, heads, T, D)
    if backend == "flex":
        return attend_by_blocks(*heads_first, documents).transpose(1, 2)
    # Chosen within the graph: the compiler's cache does not see choices made outside of it.
    with nullcontext() if backend == "auto" else sdpa_kernel(SDPA_KERNELS[backend]):
        y = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2)


def attend_by_formula(query: Tensor, key: Tensor, value: Tensor, documents) -> Tensor:
    """attend()'s reference, in float32 or more. Of S >= T keys, T queries have the last places."""
    shared = query.shape[2] // key.shape[2]  # query heads that read one key head
    key, value = (x.repeat_interleave(shared, dim=2) for x in (key, value))
    q, k, v = (widened(x).transpose(1, 2) for x in (query, key, value))  # (B, heads, T or S, D)
    position = torch.arange(key.shape[1], device=query.device)
    distance = position[-query.shape[1] :, None] - position  # (T, S), from query back to key
    seen = distance >= 0
    if documents is not None:
        seen = seen & (distance <= documents.reach[:, None, :, None])  # (B, 1, T, S)
    scores = (q @ k.mT) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).to(query.dtype)


def choose_attention_backend(settings, device: torch.device) -> str:
    """ATTENTION_BACKEND, or what "auto" stands for; UserError if it cannot run on this device."""
    backend = settings.attention_backend
    if device.type == "meta":
        return "math"  # for a skeleton, which computes nothing
    if backend == "auto" and settings.confines_documents:
        flex = replace(settings, attention_backend="flex")
        return "math" if attention_problem(flex, device) else "flex"
    problem = "" if backend == "auto" else attention_problem(settings, device)
    need(not problem, f"ATTENTION_BACKEND={backend} does not run here: {problem}; auto does")
    return backend


def rotary_turns(positions: Tensor, frequencies: Tensor) -> Tensor:
    """cos and sin of the angles position × frequency: (T,), (R,) -> (2, T, R)."""
    angles = positions[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotary(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of x (B, T, heads, D), in its dtype.

    turns: (2, T, R). Entries i and R + i of a head, for i < R, are turned as a point of the plane,
    the rest is not. Products of queries and keys then depend on their distance alone.
    """
    pairs = turns.shape[-1]
    cos, sin = turns[:, :, None].to(x.dtype)  # (T, 1, R): every head turns alike
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


class AttentionState(NamedTuple):
    """What attention keeps of the last tokens of a stream, for those that follow."""

    key: Tensor  # (B, kept, kv heads, D), normed; not turned yet, as their places will change
    value: Tensor  # (B, kept, kv heads, D)


class Attention(nn.Module):
    """Causal grouped-query attention with normed queries and keys and a gate on every head.

    Queries and keys are RMS-normed, so that scores stay bounded (QK norm, arXiv 2010.04245); a
    learned gain per head stands in for the queries' lost length. A gate, twice a sigmoid of the
    first GATE_INPUTS channels, multiplies each head's output (arXiv 2505.06708; the channels as in
    modded-nanogpt): by softmax alone, no head could be silent. An exclusive layer (XSA_LAST_N)
    takes out of the output what lies along the token's own value.
    """

    def __init__(self, settings, exclusive: bool = False):
        super().__init__()
        self.exclusive = exclusive
        width = settings.model_dim
        self.head_dim = width // settings.num_heads
        kv_width = settings.num_kv_heads * self.head_dim
        self.query = Linear(width, width)
        self.key = Linear(width, kv_width)
        self.value = Linear(width, kv_width)
        self.out = Linear(width, width, zero=True)
        self.query_gain = nn.Parameter(torch.full((settings.num_heads,), settings.qk_gain_init))
        self.gate = nn.Parameter(initial("zero", settings.num_heads, min(GATE_INPUTS, width)))

    def forward(self, x: Tensor, context: Context, state=None) -> tuple[Tensor, AttentionState]:
        """A mixer's forward(), see Block. With a state, the kept tokens' keys stand before x's."""
        linears = (self.query, self.key, self.value)
        query, key, value = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in linears)
        query = norm(query) * self.query_gain.to(x.dtype)[:, None]  # (B, T, heads, D)
        key = norm(key)
        own_value = value
        if state is not None:
            key = torch.cat([state.key, key], dim=1)  # (B, kept + T, kv heads, D)
            value = torch.cat([state.value, value], dim=1)
            state = AttentionState(key[:, x.shape[1] :], value[:, x.shape[1] :])
        if context.windows is not None:
            kept = key.shape[1] - x.shape[1]
            query = F.pad(query, (0, 0, 0, 0, kept, 0))  # earlier tokens' outputs are not wanted
            query, key, value = (y[0, context.windows] for y in (query, key, value))  # (W, L, ...)
        query = rotary(query, context.turns[:, -query.shape[1] :])  # queries have the last places
        key = rotary(key, context.turns)
        y = attend(query, key, value, context.documents, context.attention_backend)
        if context.windows is not None:
            y = y.flatten(0, 1)[context.outputs].unsqueeze(0)
        if self.exclusive:
            y = without_own_value(y, own_value)
        opening = F.linear(x[..., : self.gate.shape[1]], self.gate.to(x.dtype))
        gate = 2 * opening.sigmoid()  # (B, T, heads), 1 for a new model
        return self.out((y * gate.unsqueeze(-1)).flatten(2)), state

    def new_state(self, batch: int, kept: int, dtype: torch.dtype) -> AttentionState:
        """The state before a text's first token: room for `kept` tokens' keys and values."""
        shape = (batch, kept, self.key.out_features // self.head_dim, self.head_dim)
        zeros = self.key.weight.new_zeros(shape, dtype=dtype)
        return AttentionState(zeros, zeros.clone())


def without_own_value(y: Tensor, value: Tensor) -> Tensor:
    """y - (y·u) u, u = v / |v|, of y (B, T, heads, D) and the token's v (B, T, kv heads, D)."""
    direction = F.normalize(value, dim=-1).repeat_interleave(y.shape[2] // value.shape[2], dim=2)
    return y - (y * direction).sum(dim=-1, keepdim=True) * direction


class ShortConv(nn.Module):
    """Causal depthwise convolution over the last few tokens, then SiLU, before a Mamba's scan.

    y_t = SiLU(bias + sum over i of weight_i x_(t - width + 1 + i)), each channel by itself.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(initial("convolution", channels, width))
        self.bias = nn.Parameter(initial("zero", channels))

    def forward(self, x: Tensor, reach=None, fused=False, before=None) -> tuple:
        """x (B, T, channels) -> the outputs, same shape, and the next call's `before`, or None.

        reach: Documents.reach, to stay within documents, or None. before: the inputs (B, width - 1,
        channels) that precede x, or None. fused: by causal_conv1d, if there is no reach.
        """
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        length = x.shape[1]
        past = weight.shape[1] - 1  # how many earlier tokens an output reads
        if before is not None:
            x = torch.cat([before, x], dim=1)
            before = x[:, length:]
            if reach is not None:
                age = torch.arange(past - 1, -1, -1, device=x.device)
                before = before.masked_fill((age > reach[:, -1:]).unsqueeze(-1), 0)
        if fused and reach is None:
            y = library_kernel([x.mT.contiguous(), weight, bias], None, "convolution", 0).mT
            return y[:, x.shape[1] - length :], before
        padded = F.pad(x, (0, 0, past + length - x.shape[1], 0))
        total = 0
        for i, tap in enumerate(weight.unbind(1)):
            earlier = padded[:, i : i + length]  # the token past - i places before each
            if reach is not None:
                earlier = earlier.masked_fill((reach < past - i).unsqueeze(-1), 0)
            total = total + tap * earlier
        return F.silu(bias + total), before


class MambaState(NamedTuple):
    """What a Mamba layer keeps of a stream for the tokens that follow."""

    scan: ScanState | Tensor  # a Tensor in the first Mamba: (B, inner, N)
    inputs: Tensor | None  # (B, taps - 1, channels), the last ones of the short convolution


class Mamba(nn.Module):
    """A state-space mixer: out_proj(norm(y)), where section 4's recurrence makes y of in_proj(u).

    Mamba-2 convolves value, key and query first. The first Mamba convolves the value, and makes
    step sizes, keys and queries of that; its heads are single channels (see selective_scan()), and
    its y is not normed. Without the norm, the newer ones' y would grow a hundredfold in training's
    first steps. Parameters have the papers' names.
    """

    def __init__(self, settings, scan_backend: str):
        super().__init__()
        s = settings
        version, inner, n = s.mamba_version, s.mamba_inner_dim, s.mamba_d_state
        channels = s.mamba_head_dim if version > 1 else 1
        heads = inner // channels
        self.backend = scan_backend
        longest = max(16, 1 << (s.train_seq_len - 1).bit_length())
        self.chunk_size = min(s.mamba_chunk_size, longest)  # more than a window would be padding
        self.heavy_tail = s.mamba_decay == "heavy_tail"
        angles = n // 4 if version == 3 else 0
        self.sizes = MambaSizes(heads, channels, n, angles, version)
        self.in_proj = Linear(s.model_dim, sum(self.sizes.columns().values()))
        dynamics = self.sizes.width_of("step", "decay", "trapezoid", "angle_rate")
        self.in_proj.dynamics_rows = dynamics
        if s.muon_row_groups:
            groups = (inner, inner, self.sizes.width_of("key", "query"), dynamics)
            self.in_proj.row_groups = tuple(count for count in groups if count)
        self.out_proj = Linear(inner, s.model_dim, zero=True)
        self.dt_bias = nn.Parameter(initial("step bias", heads))
        self.D = nn.Parameter(initial("one", heads))
        if version == 3:
            self.B_norm = nn.Parameter(initial("one", n))
            self.C_norm = nn.Parameter(initial("one", n))
            self.B_bias = nn.Parameter(initial("one", heads, n))
            self.C_bias = nn.Parameter(initial("one", heads, n))
        elif version == 2:
            self.A_log = nn.Parameter(initial("log rate", heads))
        else:
            self.x_proj = Linear(inner, STEP_RANK + 2 * n)
            self.dt_proj = Linear(STEP_RANK, inner)
            self.A_log = nn.Parameter(initial("log rates", inner, n))
        convolved = self.sizes.width_of("value", "key", "query")
        self.conv = ShortConv(convolved, s.mamba_d_conv) if version < 3 else None

    def forward(self, u: Tensor, context: Context, state=None) -> tuple[Tensor, MambaState]:
        """A mixer's forward(), see Block; single tokens go by sequential_scan()."""
        backend = "sequential" if u.shape[1] == 1 else self.backend
        if "in_proj" in context.float8:
            projected = float8_linear(u, self.in_proj.weight)  # (B, L, columns)
        else:
            projected = self.in_proj(u)
        scan, inputs = state or (None, None)
        start = context.document_start
        if self.conv is not None:
            widths = (self.out_proj.in_features, len(self.conv.weight), self.in_proj.dynamics_rows)
            gate, mixed, step = projected.split(widths, dim=-1)  # the first Mamba has no step
            mixed, inputs = self.conv(mixed, context.reach, self.backend == "fused", inputs)
            projected = torch.cat([gate, mixed, step], dim=-1)
        if self.sizes.version == 1:
            y, scan = self.selective(projected, start, scan, backend)
            return self.out_proj(y), MambaState(scan, inputs)
        y, mean_square, scan = mamba_scan(
            projected, self.scan_parameters(), self.sizes, start, scan, backend, self.chunk_size
        )
        # The norm has no weights: its factor is applied after out_proj, which saves a pass over y.
        scale = (mean_square + SCAN_NORM_EPS).rsqrt().unsqueeze(-1)
        return self.out_proj(y, scale), MambaState(scan, inputs)

    def scan_parameters(self) -> MambaParameters:
        """What Mamba-2 or Mamba-3 has learned, under the names that section 4 uses."""
        if self.sizes.version == 3:
            learned = (self.B_bias, self.C_bias, self.B_norm, self.C_norm)
            return MambaParameters(self.dt_bias, self.D, *learned, heavy_tail=self.heavy_tail)
        no_bias = torch.zeros_like(self.D).unsqueeze(1)  # (H, 1)
        return MambaParameters(self.dt_bias, self.D, no_bias, no_bias, decay_rate=-self.A_log.exp())

    def new_state(self, batch: int, kept: int, dtype: torch.dtype) -> MambaState:
        """The state before a text's first token, zeros. Its size does not depend on `kept`."""
        inputs = None
        if self.conv is not None:
            channels, taps = self.conv.weight.shape
            inputs = self.D.new_zeros(batch, taps - 1, channels, dtype=dtype)
        if self.sizes.version == 1:
            return MambaState(self.A_log.new_zeros(batch, *self.A_log.shape), inputs)
        heads, channels, state, angles, _ = self.sizes
        return MambaState(empty_state(self.D, batch, heads, channels, state, angles), inputs)

    def selective(self, projected: Tensor, start, state, backend: str) -> tuple[Tensor, Tensor]:
        """The first Mamba between its projections: (B, L, 2·inner) -> (B, L, inner), and state."""
        n = self.sizes.state
        gate, value = projected.chunk(2, dim=-1)
        low_rank, key, query = self.x_proj(value).tensor_split([-2 * n, -n], dim=-1)
        step = self.dt_proj(low_rank)
        tensors = (value, step, -self.A_log.exp(), key, query, self.D, gate, self.dt_bias)
        return selective_scan(tensors, start, state, backend, self.chunk_size)


class MLP(nn.Module):
    """LeakyReLU(0.5) squared between two matrices, after a norm: down(f(up norm(x)))."""

    def __init__(self, settings, device: torch.device):
        super().__init__()
        hidden = int(settings.mlp_mult * settings.model_dim)
        self.up = Linear(settings.model_dim, hidden)
        self.down = Linear(hidden, settings.model_dim, zero=True)
        self.can_fuse = can_fuse_mlp(settings.model_dim, hidden, device)

    def forward(self, x: Tensor, input_scale: float = 1.0) -> Tensor:
        """x (B, T, width), the residual stream -> what the layer adds to it, same shape.

        Without gradients by the formula: GPTQ has to see what the matrices multiply.
        """
        if self.can_fuse and x.dtype == torch.bfloat16 and torch.is_grad_enabled():
            return self.fused(x, input_scale)
        return self.by_formula(x, input_scale)

    def by_formula(self, x: Tensor, input_scale: float) -> Tensor:
        """forward() by PyTorch's own functions."""
        x = input_scale * norm(x)
        return self.down(F.leaky_relu(self.up(x), 0.5).square())

    def fused(self, x: Tensor, input_scale: float) -> Tensor:
        """forward() by section 11's kernels: the norm is a factor after the first product."""
        rows = x.flatten(0, 1)
        factor = input_scale * (widened(rows).square().mean(-1) + NORM_EPS).rsqrt()
        y, *_ = fused_mlp(rows, factor, self.up.weight.to(x.dtype), self.down.weight.to(x.dtype))
        return y.view(x.shape)

    def in_float8(self, x: Tensor, input_scale: float) -> Tensor:
        """forward() by kernels that multiply 8-bit floats; letters are those of section 11.

        With W_up = size · W_up8, the input of f is a · v8 / USUAL, a = size · 4 sqrt(width) ·
        input_scale. f is of second degree: its output is 4 a^2 f8. One of the two factors `size`
        in a^2 is in float8_mlp()'s result already.
        """
        rows = x.flatten(0, 1)
        x8, factor = float8_norm(rows)
        y, *_, up_sizes, _, _, _ = float8_mlp(rows, x8, factor, self.up.weight, self.down.weight)
        usual = WEIGHT_SIZE * x.shape[2] ** 0.5 * input_scale
        y = y * (4 * usual**2 * up_sizes.detach()[0, 0])
        return y.view(x.shape)


class Block(nn.Module):
    """A mixer and perhaps an MLP, each adding to the residual stream.

    To add a mixer, write a class beside Attention and Mamba with these methods:

    - forward(x, context, state=None): takes x (B, T, width), normed; returns what is added to the
      residual stream, and the state after x. No token may depend on a later one, nor on one of
      another document (context says where these begin). generate() gives a state with each token,
      EVAL_MODE=stateful with each part of a stream. It has to compile as one graph;
    - new_state(batch, kept, dtype): the state before any token, a NamedTuple of tensors whose
      shapes never change. Attention keeps the keys and values of `kept` tokens in it, as dtype, the
      activations'.

    Choose it below, by a setting in the group "model" (and say in FORMER_DEFAULTS what older files,
    which lack it, mean). Its matrices are Linear, the last with zero=True: Muon trains them, GPTQ
    quantizes them. Other parameters begin as initial() says, and Adam trains them. Names decide the
    rest: *_proj has Mamba's rate (parameter_kind()) and kind (KINDS); x_proj, dt_proj and the last
    dynamics_rows of in_proj have 8 bits (grid_limits()); .D and .dt_bias stay float32
    (float_type()). Add it to VARIANTS of tests/test_model.py and tests/test_generate.py.
    """

    def __init__(self, settings, layer: int, scan_backend: str, device: torch.device):
        super().__init__()
        exclusive = layer >= settings.num_layers - settings.xsa_last_n
        has_mamba = layer in parse_layers(settings, "mamba_layers")
        self.mixer = Mamba(settings, scan_backend) if has_mamba else Attention(settings, exclusive)
        self.mlp = MLP(settings, device) if layer in parse_layers(settings, "mlp_layers") else None
        self.residual_mix = nn.Parameter(torch.tensor([1.0, 0.0]))  # keep x, mix in nothing yet
        self.input_scale = (layer + 1) ** -0.5 if settings.ln_scale else 1.0  # less if deeper

    def forward(self, x: Tensor, embedded: Tensor, context: Context, state=None) -> tuple:
        """x, embedded (B, T, width) -> the residual stream after this block, the mixer's state."""
        keep, mix = self.residual_mix.to(x.dtype)
        x = keep * x + mix * embedded
        y, state = self.mixer(self.input_scale * norm(x), context, state)
        x = x + y
        if self.mlp is not None:
            add = self.mlp.in_float8 if "mlp" in context.float8 else self.mlp
            x = x + add(x, self.input_scale)
        return x, state


class TextState(NamedTuple):
    """What Model.step() has to know of the earlier tokens of a batch of texts."""

    previous: Tensor  # (B, 1) int64, the last tokens, for bigrams; BOS before the first
    seen: Tensor  # (B, 1) int32, how many of the last tokens attention may look at next
    layers: list  # each mixer's state, in the order in which they run

    def take(self, place: int):
        """The state of the mixer at this place in the order of layers."""
        return self.layers[place]

    def put(self, place: int, left):
        """Writes the state that the mixer at this place left over the one before, in place."""
        for old, new in zip(tensors_of(self.layers[place]), tensors_of(left), strict=True):
            old.copy_(new)


class Model(nn.Module):
    """forward() turns tokens into hidden states; logits() and nats() turn these into scores."""

    def __init__(self, settings, device: torch.device, scan_backend: str = "sequential"):
        super().__init__()
        self.settings = s = settings
        self.compute_dtype = activation_dtype(s, device)
        self.attention_backend = choose_attention_backend(s, device)
        self.full_order = parse_layers(s, "layer_order")
        self.embedding = nn.Embedding(s.vocab_size, s.model_dim)
        nn.init.normal_(self.embedding.weight, std=s.tied_embed_init_std)  # first logits: near 0
        if s.bigram_vocab_size:
            self.bigram_embedding = nn.Embedding(s.bigram_vocab_size, s.bigram_dim)
            nn.init.zeros_(self.bigram_embedding.weight)
            self.bigram_proj = Linear(s.bigram_dim, s.model_dim)
            self.bigram_scale = nn.Parameter(torch.tensor(0.05))
        if not s.tie_embeddings:
            self.output_embedding = nn.Embedding(s.vocab_size, s.model_dim)
            nn.init.normal_(self.output_embedding.weight, std=s.tied_embed_init_std)
        layers = range(s.num_layers)
        self.blocks = nn.ModuleList(Block(s, layer, scan_backend, device) for layer in layers)
        if s.unet_skips and len(self.full_order) > 1:
            self.skip_weights = nn.Parameter(initial("one", len(self.full_order) // 2))
        pairs = int(s.model_dim // s.num_heads * s.rope_fraction) // 2
        frequencies = s.rope_base ** -(torch.arange(pairs, dtype=torch.float32) / max(pairs, 1))
        positions = torch.arange(s.train_seq_len, dtype=torch.float32)
        # Kept as a table, since each compiled kernel would compute it anew.
        self.register_buffer("rotary_table", rotary_turns(positions, frequencies), persistent=False)
        masked = s.mask_impossible_pairs and device.type != "meta"  # a skeleton computes nothing
        impossible = packed_pairs(s.tokenizer_path, s.vocab_size) if masked else None
        self.register_buffer("impossible", impossible, persistent=False)
        self.output_name = "embedding.weight" if s.tie_embeddings else "output_embedding.weight"
        self.row_costs: dict[str, Tensor] = {}  # export's, of errors: find_row_costs()
        self.grid_factors: dict[str, Tensor] = {}  # export's, of grids: find_grid_factors()
        self.head_branch = None  # evaluation's, beside the output matrix: Branches
        self.to(device)

    def linear_layers(self) -> dict[str, Linear]:
        """All matrices but the embeddings, by the names of their weights."""
        return {f"{name}.weight": m for name, m in self.named_modules() if isinstance(m, Linear)}

    @property
    def output_matrix(self) -> Tensor:
        """What hidden states are multiplied by for logits: (V, width), float32."""
        tied = self.settings.tie_embeddings
        return self.embedding.weight if tied else self.output_embedding.weight

    def order(self, recurrent: bool) -> tuple[int, ...]:
        """The layers in the order in which they run: LAYER_ORDER, or each of them once."""
        return self.full_order if recurrent else tuple(range(len(self.blocks)))

    def forward(self, tokens: Tensor, order: tuple[int, ...], float8: str = "none") -> Tensor:
        """Hidden states (B, T, width) of tokens (B, T) int64; float8: a value of FLOAT8_PRODUCTS.

        order: the layers that run, as order() gives them.
        """
        return self.through_blocks(self.embed(tokens), order, self.context_of(tokens, float8))

    def context_of(self, tokens: Tensor, float8: str = "none") -> Context:
        """What blocks share of windows of tokens (B, T) int64."""
        start = tokens == BOS_ID if self.settings.document_reset else None
        backend = self.attention_backend
        reach = documents = None
        if self.settings.confines_documents:
            documents = find_documents(start, backend)
            reach = documents.reach
        turns = self.rotary_table[:, : tokens.shape[1]]
        return Context(start, turns, reach, documents, backend, float8=float8)

    def through_blocks(
        self, embedded: Tensor, order: tuple, context: Context, states=None, run_block=None
    ) -> Tensor:
        """Hidden states (B, T, width) of embedded tokens (B, T, width): all blocks, then a norm.

        With UNET_SKIPS, what leaves each layer of the first half enters one of the second, times a
        learned weight: the last takes the first's, as in a U-net. states.take(place) gives the
        state before these tokens of the mixer at that place in the order; states.put(place, state)
        gets the one after them. run_block: Block.forward, compiled.
        """
        x = embedded.clone()  # x and embedded as one tensor would have blocks compiled once more
        half = len(order) // 2 if self.settings.unet_skips else 0
        second_half = len(order) - half
        skips = []
        for place, layer in enumerate(order):
            if place >= second_half:
                x = x + self.skip_weights[place - second_half].to(x.dtype) * skips.pop()
            state = None if states is None else states.take(place)
            block = self.blocks[layer]
            forward = partial(run_block, block) if run_block else block
            x, state = forward(x, embedded, context, state)
            if states is not None:
                states.put(place, state)
            if place < half:
                skips.append(x)
        return norm(x)

    def resume(self, tokens: Tensor, seen: Tensor, order: tuple, states, run_block=None) -> Tensor:
        """Hidden states (1, T, width) of part of a stream, from the states that came before it.

        tokens (1, O + T) int64: the part, after the O tokens by which attention's windows overlap,
        of which only the last `seen`, () int64, exist. T is a multiple of TRAIN_SEQ_LEN - O.
        """
        overlap = self.settings.attention_overlap
        missing = torch.arange(tokens.shape[1], device=tokens.device) < overlap - seen
        tokens = tokens.masked_fill(missing, BOS_ID)  # before a text stands BOS, as in embed()
        embedded = compact(self.embed(tokens[:, overlap - 1 :])[:, 1:])
        begun = tokens == BOS_ID
        own = begun[:, overlap:]
        start = own if self.settings.document_reset else None
        size, backend = self.rotary_table.shape[1], self.attention_backend
        windows, outputs = stream_windows(seen, overlap, embedded.shape[1], size)
        reach = documents = None
        if self.settings.confines_documents:
            # Convolutions read the whole part: where a document began before it, they may look at
            # all that their states hold. Attention's documents are found in each of its windows.
            reach = find_documents(own, "math").reach
            reach = reach.masked_fill(own.cumsum(dim=1) == 0, tokens.shape[1])
            documents = find_documents(begun[0, windows], backend)
        context = Context(start, self.rotary_table, reach, documents, backend, windows, outputs)
        return self.through_blocks(embedded, order, context, states, run_block)

    def new_states(self, order: tuple[int, ...], batch: int = 1, kept: int | None = None) -> list:
        """Each mixer's state before a text, in order; of `kept` tokens, or attention's overlap."""
        kept = self.settings.attention_overlap if kept is None else kept
        mixers = [self.blocks[layer].mixer for layer in order]
        return [mixer.new_state(batch, kept, self.compute_dtype) for mixer in mixers]

    def begin(self, batch: int, order: tuple[int, ...]) -> TextState:
        """The state of a batch of texts before their first tokens, for layers in this order."""
        previous = torch.full((batch, 1), BOS_ID, device=self.embedding.weight.device)
        seen = torch.zeros_like(previous, dtype=torch.int32)
        layers = self.new_states(order, batch, kept=self.settings.train_seq_len - 1)
        return TextState(previous, seen, layers)

    def step(self, tokens: Tensor, order: tuple[int, ...], state: TextState) -> Tensor:
        """Hidden states (B, 1, width) of each text's next token (B, 1) int64.

        Attention sees the last TRAIN_SEQ_LEN tokens, or as many as there are. The state is changed
        in place, so that a step can be recorded as a CUDA graph.
        """
        embedded = self.embed(torch.cat([state.previous, tokens], dim=1))[:, 1:]
        start = tokens == BOS_ID if self.settings.document_reset else None
        if self.settings.confines_documents:
            state.seen.masked_fill_(start, 0)
        context = Context(start, self.rotary_table, state.seen, Documents(state.seen), "math")
        hidden = self.through_blocks(embedded, order, context, state)
        state.previous.copy_(tokens)
        state.seen.add_(1).clamp_(max=self.settings.train_seq_len - 1)
        return hidden

    def embed(self, tokens: Tensor) -> Tensor:
        """Normed embeddings (B, T, width) of tokens (B, T), each with that of the pair it ends."""
        s = self.settings
        x = self.embedding(tokens).to(self.compute_dtype)
        if s.bigram_vocab_size:
            before = F.pad(tokens[:, :-1], (1, 0), value=BOS_ID)
            mixed = (before * 36_313) ^ (tokens * 27_191)  # a hash; where BOS ends the pair, row 0
            row = (mixed % (s.bigram_vocab_size - 1) + 1).masked_fill(tokens == BOS_ID, 0)
            bigram = self.bigram_proj(self.bigram_embedding(row).to(x.dtype))
            x = x + bigram * self.bigram_scale.to(x.dtype)
        return norm(x)

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Softcapped logits (..., V) of hidden (..., width), float32 or more.

        tokens (...) are those that the logits follow: only MASK_IMPOSSIBLE_PAIRS reads them.
        """
        cap = self.settings.logit_softcap
        logits = F.linear(hidden, self.output_matrix.to(hidden.dtype))
        if self.head_branch is not None:
            logits = logits + self.head_branch(hidden)
        logits = cap * torch.tanh(widened(logits) / cap)
        if self.impossible is None:
            return logits
        return logits.masked_fill(unpacked_pairs(self.impossible[tokens], logits.shape[-1]), -cap)

    def nats(self, hidden: Tensor, targets: Tensor, tokens: Tensor | None = None) -> Tensor:
        """-ln p of each target (B, T), float32, from hidden (B, T, width); tokens: see logits()."""
        rows, flat = hidden.flatten(0, 1), targets.flatten()
        if hidden.is_cuda and triton and self.head_branch is None:
            weight, cap = self.output_matrix.to(hidden.dtype), self.settings.logit_softcap
            pairs = [] if self.impossible is None else [tokens.flatten(), self.impossible]
            nats, _ = fused_cross_entropy(rows, weight, flat, cap, torch.is_grad_enabled(), pairs)
        else:
            logits = self.logits(hidden, tokens).flatten(0, 1)
            nats = F.cross_entropy(logits, flat, reduction="none")
        return nats.view(targets.shape)

    def score(self, tokens: Tensor, targets: Tensor, order: tuple, float8: str = "none") -> Tensor:
        """Nats of each target (B, T), the token that follows each of tokens (B, T)."""
        return self.nats(self(tokens, order, float8), targets, tokens)

    def loss(self, tokens: Tensor, targets: Tensor, order: tuple, float8: str = "none") -> Tensor:
        """Mean nats, (): what training brings down."""
        return self.score(tokens, targets, order, float8).mean()


# ---- Tokens that are spelt alike -----------------------------------------------------------------
# "The", " the" and "them" have rows of their own in the embedding, and a rare one learns little.
# With SPELLING_FEATURES a row is trained as
#
#     row = own + 0.4 · sum of n_f v_f / sqrt(sum of n_f²),      f in its spelling, n_f times
#
# where each feature f of a spelling, such as the letters "the" or a space in front, has a vector
# v_f, which all tokens with that feature train. After training the sums replace the rows: the
# artifact gets no larger, and needs nothing but the rows.

SPELLING_SCALE = 0.4  # of the shared part, beside the token's own
SHARED_NAMES = "embedding.parametrizations."  # torch's names of both parts begin so


def spelling_of(piece: str) -> list[str]:
    """The features of a piece's spelling: space, capital, word, groups of two to four letters.

    >>> spelling_of("▁It")
    ['space', 'capital', 'word:it', '<i', 'it', 't>', '<it', 'it>', '<it>']
    """
    word = piece.lstrip("▁")
    framed = f"<{word.lower()}>"
    found = ["space"] if piece.startswith("▁") else []
    found += ["capital"] if word[:1].isupper() else []
    found.append(f"word:{word.lower()}")
    for size in (2, 3, 4):
        found += [framed[start : start + size] for start in range(len(framed) - size + 1)]
    return found


def spelling_matrix(tokenizer, most: int) -> Tensor:
    """How often each token has each feature, float32 (V, features), with rows scaled as above.

    Features that only one token has are left out; of the others, the `most` most frequent are
    taken, in the same order in every process. Rows of control tokens and bytes are 0.
    """
    found = [collections.Counter() for _ in tokenizer.pieces]
    for token in np.flatnonzero(tokenizer.is_text):
        found[token].update(spelling_of(tokenizer.pieces[token]))
    frequent = collections.Counter(name for names in found for name in names).most_common(most)
    # most_common() puts these first: places have no gaps.
    column = {name: place for place, (name, count) in enumerate(frequent) if count > 1}
    matrix = torch.zeros(len(found), len(column))
    for row, names in zip(matrix, found, strict=True):
        for name in names.keys() & column.keys():
            row[column[name]] = names[name]
    return SPELLING_SCALE * matrix / matrix.norm(dim=1, keepdim=True).clamp(min=1)


class SharedBySpelling(nn.Module):
    """Adds to a table (V, width) what rows share: a matrix (V, features) times learned vectors."""

    def __init__(self, matrix: Tensor, width: int):
        super().__init__()
        self.shared = nn.Parameter(matrix.new_zeros(matrix.shape[1], width, dtype=torch.float32))
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, table: Tensor) -> Tensor:
        """The table as the model reads it, (V, width)."""
        return table + (self.matrix @ self.shared.to(self.matrix.dtype)).to(table.dtype)


def share_by_spelling(model: Model):
    """Gives the embedding a shared part, of zeros, before training: the model computes the same."""
    s = model.settings
    matrix = spelling_matrix(Tokenizer(s.tokenizer_path, s.vocab_size), s.spelling_features)
    matrix = matrix.to(model.embedding.weight.device, model.compute_dtype)
    shared = SharedBySpelling(matrix, s.model_dim)
    parametrize.register_parametrization(model.embedding, "weight", shared)


def fold_spelling(model: Model):
    """Replaces rows by the sums, after share_by_spelling(); the model computes the same."""
    if parametrize.is_parametrized(model.embedding):
        parametrize.remove_parametrizations(model.embedding, "weight")


# ---- Tokens that BPE never writes side by side ---------------------------------------------------
# BPE merges two neighbours wherever it knows a merge for them, so that many tokens never follow a
# given one: in the contest's tokenizers only 2 % of all pairs, but pairs that a model would find
# likely (" th" is never followed by "e"). With MASK_IMPOSSIBLE_PAIRS it need not learn them: their
# logits are -LOGIT_SOFTCAP, the least there is, and have no gradient. Which ones they are depends
# on the tokenizer and the token before, not on the target: it is still a softmax over all tokens.


def merge_order(tokenizer) -> dict[str, int]:
    """The pieces that BPE makes and their tokens, in the order of its merges, which is that of ids.

    A BPE model's scores fall by 1 from piece to piece, beginning at 0. User-defined symbols come
    first, all with a score of 0: they are cut out of a text before BPE sees it, take part in no
    merge, and may stand beside every token. Empty if the tokenizer is not a BPE model.
    """
    ordinary = np.flatnonzero(tokenizer.is_text)
    scores = np.array(tokenizer.model.GetScore(ordinary.tolist()))
    first = np.flatnonzero(scores == 0).max(initial=0)
    begins = not scores[: first + 1].any()
    falls = (np.diff(scores[first:]) == -1).all()
    merges = {tokenizer.pieces[token]: int(token) for token in ordinary[first:]}
    return merges if begins and falls else {}


def last_parts(piece: str, merges: dict[str, int]) -> list[str]:
    """The two texts that BPE merges last to make a piece; a single character is its only part."""
    parts = list(piece)
    while len(parts) > 2:
        order = [merges.get(left + right, math.inf) for left, right in itertools.pairwise(parts)]
        place = order.index(min(order))  # the leftmost, if that merge fits in several places
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


class Standing(NamedTuple):
    """The tokens at whose beginning (or end) a text stands by itself for a while, as BPE makes them
    of smaller texts; and when, in each of them, a merge takes it in.
    """

    tokens: np.ndarray  # (n,) int64, sorted by gone
    gone: np.ndarray  # (n,) float64, the token that this merge makes; inf: the text is the token

    def after(self, merge: float) -> np.ndarray:
        """The tokens in which the text still stands by itself after this merge."""
        return self.tokens[np.searchsorted(self.gone, merge, side="right") :]


def find_standing(halves: dict[str, list[str]], merges: dict[str, int], side: int) -> dict:
    """The Standing of every text at the beginning (side 0) or end (1) of tokens, by text.

    halves: last_parts() by piece, of pieces that have two.
    """
    stays = collections.defaultdict(list)
    for piece, token in merges.items():
        text = piece
        gone = math.inf
        while text:
            stays[text].append((gone, token))
            gone = merges.get(text)
            text = halves[text][side] if text in halves else ""
    by_text = {}
    for text, found in stays.items():
        gone, tokens = zip(*sorted(found), strict=True)
        by_text[text] = Standing(np.array(tokens), np.array(gone, float))
    return by_text


def impossible_pairs(merges: dict[str, int], size: int) -> np.ndarray:
    """Which tokens BPE never puts after which: bool (size, size), the token before first.

    merges: merge_order()'s. Two tokens may be neighbours unless, while BPE makes them, a text at
    the first's end and one at the second's beginning stand side by side when the merge of the two
    is due. So for each merge, and each way to cut its piece in two, this rules out all tokens at
    whose end the left text still stands then, before all at whose beginning the right one does.
    """
    halves = {piece: last_parts(piece, merges) for piece in sorted(merges, key=len)}
    halves = {piece: parts for piece, parts in halves.items() if len(parts) == 2}
    latest = collections.defaultdict(lambda: -1)  # by piece, the last of the merges that make it
    for piece, (left, right) in halves.items():
        latest[piece] = max(merges[piece], latest[left], latest[right])
    begins = find_standing(halves, merges, 0)
    ends = find_standing(halves, merges, 1)
    never = np.zeros((size, size), bool)
    for piece, merge in merges.items():
        for cut in range(1, len(piece)):
            left = piece[:cut]
            right = piece[cut:]
            if left not in ends or right not in begins:
                continue
            # BPE takes merges in their order, and a merge that fits in several places from left to
            # right: within the first token before the border of the two, within the second after.
            first = ends[left].after(max(merge, latest[right]))
            second = begins[right].after(max(merge - 1, latest[left]))
            never[first[:, None], second] = True
    return never


@cache
def packed_pairs(tokenizer_path: str, vocab_size: int) -> Tensor:
    """impossible_pairs() of BPE, uint8 (V, ceil(V / 8)): bit v % 8 of byte v // 8; or UserError."""
    merges = merge_order(Tokenizer(tokenizer_path, vocab_size))
    problem = f"{tokenizer_path} is no BPE model whose tokens stand in the order of their merges"
    need(merges, f"{problem}: use MASK_IMPOSSIBLE_PAIRS=0")
    never = impossible_pairs(merges, vocab_size)
    return torch.from_numpy(np.packbits(never, axis=1, bitorder="little"))


def unpacked_pairs(packed: Tensor, vocab_size: int) -> Tensor:
    """Rows of packed_pairs(), uint8 (..., bytes), as bool (..., V)."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().flatten(-2)[..., :vocab_size]


def build_model(settings, ranks) -> Model:
    """A new model on the rank's device, from SEED; choose_scan_backend() may raise UserError."""
    torch.manual_seed(settings.seed)
    return Model(settings, ranks.device, choose_scan_backend(settings, ranks.device))


@torch.no_grad()
def generate(
    model: Model, tokens: Tensor, count: int, temperature=1.0, top_p=1.0, generator=None
) -> Tensor:
    """Continues a batch of texts: tokens (B, T > 0) int64 on the model's device -> (B, count).

    Tokens are read one by one, the prompt's too, each at the same cost however long a text becomes.
    temperature, top_p: see draw_tokens(). generator: a torch.Generator on the model's device.
    """
    order = model.order(recurrent=True)
    state = model.begin(len(tokens), order)
    last = tokens[:, :1].clone()  # what is read next
    noise = torch.empty(len(tokens), model.settings.vocab_size, device=tokens.device)

    def step():
        logits = model.logits(model.step(last, order, state), last)[:, 0]
        last.copy_(draw_tokens(logits, noise, temperature, top_p)[:, None])

    prompt = tokens.shape[1]
    text = F.pad(tokens, (0, count))
    for i in range(prompt + count - 1):
        noise.exponential_(generator=generator)
        if tokens.is_cuda and i == EAGER_STEPS:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # runs nothing yet
                step()
            step = graph.replay
        step()
        if i + 1 < prompt:
            last.copy_(tokens[:, i + 1 : i + 2])  # instead of what was drawn
        text[:, i + 1] = last[:, 0]
    return text[:, prompt:]


def draw_tokens(logits: Tensor, noise: Tensor, temperature: float, top_p: float) -> Tensor:
    """A next token for each row of logits (B, V): (B,) int64.

    Temperature 0 takes the likeliest; else p = softmax(logits / temperature), of which top_p < 1
    keeps the fewest, likeliest tokens that reach it together (nucleus sampling, arXiv 1904.09751).
    noise (B, V) is exponential: p_i / noise_i is the largest with a probability of p_i / sum p.
    """
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    p, token = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    if top_p < 1:
        # A token is kept unless those before it suffice. Integers add up exactly in any order.
        parts = (p.double() * 2**40).long()
        before = parts.cumsum(dim=-1) - parts
        p = p.masked_fill(before >= int(top_p * 2**40), 0.0)
    return token.gather(-1, (p / noise).argmax(dim=-1, keepdim=True))[:, 0]


# ==================================================================================================
# 6. Optimizers: Muon for matrices, Adam for all else, the average that a run leaves, the schedule


def parameter_kind(name: str, parameter: Tensor) -> str:
    """Muon trains kinds "matrix" and "mamba_matrix", Adam "embedding", "head" and "scalar"."""
    if name == "output_embedding.weight":
        return "head"  # the output matrix, where embeddings are not tied to it
    if name.endswith("embedding.weight") or name.startswith(SHARED_NAMES):
        return "embedding"
    if parameter.dim() != 2 or not name.endswith(".weight") or name.endswith("conv.weight"):
        return "scalar"  # short convolutions too
    return "mamba_matrix" if ".mixer." in name and "_proj." in name else "matrix"


# (a, b, c) of the first Newton-Schulz steps; the last row is for all further ones. Five steps bring
# singular values between 0.001 and 1 near 1 (Polar Express, arXiv 2505.16932).
POLAR_EXPRESS = (
    (8.20516, -22.90194, 16.46072),
    (4.06640, -2.86115, 0.51840),
    (3.90959, -2.82335, 0.52504),
    (3.28556, -2.41530, 0.48529),
    (2.27787, -1.61982, 0.39848),
    (1.875, -1.25, 0.375),
)
STEPS_OF_GRAM = 3  # in a row on Gram matrices alone; by more, their rounding errors would grow


def orthogonalize(batches: list[Tensor], steps: int) -> list[Tensor]:
    """About U V^T of each x = U S V^T, the semi-orthogonal matrix nearest to it.

    batches: (n, rows, columns) each, as the results, float16 on a GPU. A Newton-Schulz step takes x
    to P x, with G = x x^T and P = a + b G + c G^2: each singular value s to a s + b s^3 + c s^5.
    The next G is P G P: a few steps work on G alone, which is small, and x is multiplied once, by
    the product of their P (dao-lab.ai/blog/2026/gram-newton-schulz). All G, padded, go together.
    """
    wide = [x.mT if x.shape[-2] > x.shape[-1] else x for x in batches]  # rows <= columns
    # No singular value is larger than the Frobenius norm; 1 % is room for float16's rounding.
    wide = [x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7) for x in wide]
    wide = [x.half() if x.is_cuda else x for x in wide]
    rows = [x.shape[-2] for x in wide]
    coefficients = [*POLAR_EXPRESS, *steps * POLAR_EXPRESS[-1:]][:steps]
    for first in range(0, steps, STEPS_OF_GRAM):
        grams = [F.pad(x @ x.mT, 2 * (0, max(rows) - n)) for x, n in zip(wide, rows, strict=True)]
        gram, product = torch.cat(grams), None
        for a, b, c in coefficients[first : first + STEPS_OF_GRAM]:
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
            polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
            product = polynomial if product is None else polynomial @ product
            gram = polynomial @ gram @ polynomial
        products = product.split([len(x) for x in wide])
        wide = [p[:, :n, :n] @ x for p, n, x in zip(products, rows, wide, strict=True)]
    return [x if x.shape == y.shape else x.mT for x, y in zip(wide, batches, strict=True)]


def shape_factor(x: Tensor) -> float:
    """sqrt(max(1, rows / columns)) of x (..., rows, columns).

    An update is multiplied by it, so that outputs change by about as much whatever the shape.
    """
    return max(1, x.shape[-2] / x.shape[-1]) ** 0.5


def orthogonalize_groups(batches: list[Tensor], row_groups: list[tuple], steps: int) -> list:
    """orthogonalize(), with each group of rows as a matrix of its own in batches that have groups.

    A direction of the input that one group uses then takes nothing from another group's. The
    quotient turns the matrix's shape_factor(), which apply_updates() applies, into the group's.
    """
    pairs = zip(batches, row_groups, strict=True)
    parts = [x.split(groups, dim=-2) if groups else (x,) for x, groups in pairs]
    done = iter(orthogonalize(list(itertools.chain(*parts)), steps))
    updates = []
    for x, pieces in zip(batches, parts, strict=True):
        if len(pieces) == 1:
            updates.append(next(done))
            continue
        each = [next(done) * (shape_factor(piece) / shape_factor(x)) for piece in pieces]
        updates.append(torch.cat(each, dim=-2))
    return updates


def momentum_updates(
    gradients: list, momenta: list[Tensor], row_groups: list, momentum, scale, skip, steps: int
) -> list[Tensor]:
    """m <- momentum m + (1 - momentum) scale g, in place, for each batch's m (n, rows, columns).

    Returns the updates: the same mean once more, with the new m (Nesterov), orthogonalized. If
    skip, float32 (), is 1, no bit of m changes, and the updates are finite.
    """
    updates = []
    for batch, old in zip(gradients, momenta, strict=True):
        gradient = torch.where(skip > 0, old, torch.stack(batch) * scale)
        old.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(old, momentum)
        # Rows are first brought to one length, so that no unit is left behind (MuonEq-R).
        updates.append(update / (update.norm(dim=-1, keepdim=True) + 1e-12))
    return orthogonalize_groups(updates, row_groups, steps)


def even_out_rows(updates: list[Tensor], squares: list[Tensor], beta2: float, skip) -> list:
    """NorMuon (arXiv 2510.05491): divides rows of updates (n, rows, columns) by their usual size.

        s <- beta2 s + (1 - beta2) mean of u^2 over a row;    u / sqrt(s), scaled to u's whole norm

    squares, s (n, rows, 1), change in place, but not if skip, float32 (), is 1.
    """
    evened = []
    for update, square in zip(updates, squares, strict=True):
        update = update.float()
        square.lerp_(update.square().mean(dim=-1, keepdim=True), (1 - beta2) * (1 - skip))
        even = update / (square.sqrt() + 1e-10)
        length = update.norm(dim=(-2, -1), keepdim=True)
        evened.append(even * (length / (even.norm(dim=(-2, -1), keepdim=True) + 1e-10)))
    return evened


def apply_updates(batches: list, updates: list, rates: list[float], decay: float, factor, skip):
    """p <- (1 - rate decay) p - rate shape_factor() update, in place; nothing if skip is 1.

    rate: a batch's, times factor. p: (rows, columns) each; updates: (n or more, rows, columns).
    """
    for batch, update, rate in zip(batches, updates, rates, strict=True):
        rate = rate * factor * (1 - skip)
        step = rate * shape_factor(update)
        changes = update[: len(batch)].float().unbind()  # without the padding after them
        torch._foreach_mul_(batch, 1 - rate * decay)  # on lists: compiled, a launch or two in all
        torch._foreach_sub_(batch, torch._foreach_mul(changes, step))


class Muon:
    """Momentum whose update is orthogonalized (K. Jordan, 2024, kellerjordan.github.io/posts/muon).

    Making all singular values equal is the steepest descent, if a step's length is how far it can
    move a layer's outputs. Each rank makes the updates of its share of the matrices.
    """

    def __init__(self, batches: dict[tuple, list[Tensor]], settings, ranks):
        """batches: matrices (rows, columns), float32, by (rate, shape, Linear.row_groups)."""
        self.ranks = ranks
        self.steps = settings.muon_backend_steps
        self.weight_decay = settings.weight_decay
        self.rates = [rate for rate, *_ in batches]
        self.row_groups = [groups for *_, groups in batches]
        self.batches = list(batches.values())
        self.momenta = []
        for batch in self.batches:
            count = round_up(len(batch), ranks.world_size)  # so that all shares are equal
            self.momenta.append(batch[0].new_zeros(count, *batch[0].shape))
        # Views of this rank's part of each momentum; the other ranks' parts are out of date here.
        self.shares = [m.chunk(ranks.world_size)[ranks.rank] for m in self.momenta]
        self.beta2 = settings.muon_beta2
        kept = self.momenta if self.beta2 else []
        self.squares = [m.new_zeros(*m.shape[:2], 1) for m in kept]  # of rows, likewise
        self.square_shares = [s.chunk(ranks.world_size)[ranks.rank] for s in self.squares]
        # Gradients of up to 16 matrices are read where they lie; more, inductor would copy first.
        options = {"max_pointwise_cat_inputs": 16}
        self.momentum_updates = maybe_compile(momentum_updates, settings, ranks, options)
        self.even_out_rows = maybe_compile(even_out_rows, settings, ranks)
        self.apply_updates = maybe_compile(apply_updates, settings, ranks)

    def gather_state(self) -> list[Tensor]:
        """Each batch's momentum (n, rows, columns), then squares (n, rows, 1), from all ranks."""
        state, shares = self.momenta + self.squares, self.shares + self.square_shares
        for whole, share in zip(state, shares, strict=True):
            whole.copy_(self.ranks.concatenate(share))
        batches = itertools.cycle(self.batches)
        return [whole[: len(batch)] for whole, batch in zip(state, batches, strict=False)]

    def _gradients(self, batch: list[Tensor], share: Tensor) -> list[Tensor]:
        """The gradients of this rank's share of a batch; zeros fill up the last ranks' shares."""
        mine = batch[self.ranks.rank * len(share) :][: len(share)]
        return [p.grad for p in mine] + list(torch.zeros_like(share[len(mine) :]))

    @torch.no_grad()
    def step(self, lr_factor: Tensor, momentum: Tensor, scale: Tensor, skip: Tensor):
        """One step: rates times lr_factor, gradients times scale; none if skip. float32 () each."""
        gradients = list(map(self._gradients, self.batches, self.shares))
        updates = self.momentum_updates(
            gradients, self.shares, self.row_groups, momentum, scale, skip, self.steps
        )
        if self.beta2:
            updates = self.even_out_rows(updates, self.square_shares, self.beta2, skip)
        updates = [self.ranks.concatenate(update) for update in updates]
        self.apply_updates(self.batches, updates, self.rates, self.weight_decay, lr_factor, skip)


def judge_gradients(total: Tensor, clip_norm: float, skip: Tensor, skipped: Tensor) -> Tensor:
    """The factor () by which gradients of the norm `total`, float32 (), get clip_norm at most.

    Puts 1 into skip () if the norm is not finite, else 0. skipped (3,) counts such steps: all, the
    present streak, the longest streak. clip_norm 0: the factor is 1.
    """
    skip.copy_(~total.isfinite())
    count, streak, longest = skipped.unbind()
    streak = (streak + skip) * skip
    skipped.copy_(torch.stack([count + skip, streak, torch.maximum(longest, streak)]))
    return (clip_norm / (total + 1e-6)).clamp(max=1.0) if clip_norm else torch.ones_like(total)


class Optimizers:
    """Muon and Adam as one. The device itself skips a step whose gradients are not finite."""

    def __init__(self, model, settings, ranks):
        self.parameters = list(model.parameters())
        self.ranks = ranks
        self.scales_loss = model.compute_dtype == torch.float16
        self.clip_norm = settings.grad_clip_norm
        self.skip = torch.zeros((), device=ranks.device)  # 1: the latest step was skipped
        self.skipped = torch.zeros(3, device=ranks.device)
        self.judge_gradients = maybe_compile(judge_gradients, settings, ranks)
        matrices, others = parameter_groups(model, settings)
        self.muon = Muon(matrices, settings, ranks)
        betas = settings.beta1, settings.beta2
        self.adam = torch.optim.AdamW(others, 0.0, betas, fused=True, capturable=ranks.gpu)
        self.rates = torch.tensor([group["base_lr"] for group in others], device=ranks.device)
        # AdamW would make its moments in its first step: too late for CUDA graphs and checkpoints.
        for p in itertools.chain(*(group["params"] for group in others)):
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[p] = {"step": p.new_zeros(()), **moments}

    def loss_scale(self) -> Tensor | None:
        """With float16, what the loss is multiplied by, float32 (); else None.

        Gradients of a mean over many tokens fall below 6e-8, float16's least number. As with
        torch.amp.GradScaler, each skipped step halves the scale, down to 1; it never rises again.
        """
        return (16 - self.skipped[0]).clamp(min=0).exp2() if self.scales_loss else None

    def tensors(self) -> list[Tensor]:
        """What steps change besides the weights, float32, whatever the number of ranks."""
        moments = [x for state in self.adam.state.values() for x in state.values()]
        # Without the longest streak of skipped steps, which a resumed run counts anew.
        return [*moments, *self.muon.gather_state(), self.skipped[:2]]

    def _average_gradients(self):
        """Replaces gradients by their means over the ranks, views of one buffer: one exchange."""
        used = [p for p in self.parameters if p.grad is not None]
        used.sort(key=Tensor.dim, reverse=True)  # so that matrices begin at multiples of 16 bytes
        means = torch.cat([p.grad.flatten() for p in used])
        means /= self.ranks.world_size
        self.ranks.sum_(means)
        for p, mean in zip(used, means.split([p.numel() for p in used]), strict=True):
            p.grad = mean.view_as(p)

    @torch.no_grad()
    def step(self, lr_factor: float | Tensor, momentum: float | Tensor):
        """A step at lr_factor times all rates by the ranks' mean gradients, which it then drops."""
        lr_factor = torch.as_tensor(lr_factor, device=self.skip.device)
        momentum = torch.as_tensor(momentum, device=self.skip.device)
        if self.ranks.world_size > 1:
            self._average_gradients()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scales_loss:
            torch._foreach_div_(gradients, self.loss_scale())
        total = nn.utils.get_total_norm(gradients)
        scale = self.judge_gradients(total, self.clip_norm, self.skip, self.skipped)
        if self.clip_norm:  # Adam's; Muon scales its own as it reads them
            torch._foreach_mul_([p.grad for p in self.adam.state if p.grad is not None], scale)
        self.muon.step(lr_factor, momentum, scale, self.skip)
        rates = (self.rates * lr_factor).unbind()
        for group, rate in zip(self.adam.param_groups, rates, strict=True):
            group["lr"] = rate
        # As torch.amp.GradScaler does: if it is 1, Adam's fused kernel changes nothing.
        self.adam.found_inf = self.skip
        self.adam.step()
        for p in self.parameters:
            p.grad = None


def parameter_groups(model, settings) -> tuple[dict, list[dict]]:
    """Muon's batches and AdamW's groups, in the model's order, which is that of a checkpoint."""
    s = settings
    rates = {"matrix": s.matrix_lr, "mamba_matrix": s.mamba_matrix_lr}
    embed_lr = s.tied_embed_lr if s.tie_embeddings else s.embed_lr
    embed_decay = s.weight_decay if s.embed_wd < 0 else s.embed_wd
    scalar_eps = max(s.adam_eps, 1e-6)  # a residual mix's first gradients are rounding errors
    options = {
        "embedding": {"base_lr": embed_lr, "weight_decay": embed_decay, "eps": s.adam_eps},
        "head": {"base_lr": s.head_lr, "weight_decay": embed_decay, "eps": s.adam_eps},
        "scalar": {"base_lr": s.scalar_lr, "weight_decay": s.adam_wd, "eps": scalar_eps},
    }
    matrices, others = collections.defaultdict(list), {}
    layers = model.linear_layers()
    for name, p in model.named_parameters():
        kind = parameter_kind(name, p)
        if kind in rates:
            matrices[rates[kind], p.shape, layers[name].row_groups].append(p)
        else:
            others.setdefault(kind, {"params": [], **options[kind]})["params"].append(p)
    return matrices, list(others.values())


def take_in(average: list[Tensor], weights: list[Tensor], rate: Tensor, skip: Tensor):
    """a <- (1 - rate) a + rate w, in place, float32; not if skip is 1. Compiled, one pass."""
    rate = (1 - skip) * rate
    torch._foreach_mul_(average, 1 - rate)
    torch._foreach_add_(average, torch._foreach_mul(weights, rate))


class WeightAverage:
    """The average of the weights that a run leaves, as AVERAGE says.

    ema: weights after step n come in at a rate of 1 / (AVERAGE_HORIZON n), at least 1 - EMA_DECAY.
    swa: the mean of the weights, or of their ema, at Schedule's snapshots (arXiv 1803.05407).
    """

    def __init__(self, model, settings, ranks):
        kinds = settings.average.split("+")
        self.settings = settings
        self.parameters = list(model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters] if "ema" in kinds else []
        self.swa = [torch.zeros_like(p) for p in self.parameters] if "swa" in kinds else []
        self.snapshots = self.parameters[0].new_zeros(())  # in swa
        self.take_in = maybe_compile(take_in, settings, ranks)

    def tensors(self) -> list[Tensor]:
        """What steps change of it, float32: a checkpoint holds that."""
        return [*self.ema, *self.swa, self.snapshots] if self.swa else self.ema

    def rate(self, steps_done: int) -> float:
        """The rate at which the ema takes in the weights after so many steps, at most 1."""
        horizon = max(1.0, self.settings.average_horizon * steps_done)  # in steps
        return max(1 - self.settings.ema_decay, 1 / horizon)

    @torch.no_grad()
    def update(self, rate: float | Tensor, skip: Tensor):
        """The last part of a step: the ema takes in the weights, unless skip, float32 (), is 1."""
        if self.ema:
            rate = torch.as_tensor(rate, device=skip.device)
            self.take_in(self.ema, self.parameters, rate, skip)

    @torch.no_grad()
    def after_step(self, steps_done: int, skip: Tensor, snapshot: bool):
        """swa takes a snapshot if due, unless skip () is 1. steps_done: for other averages."""
        if self.swa and snapshot:
            self.take_in(self.swa, self.ema or self.parameters, 1 / (self.snapshots + 1), skip)
            self.snapshots += 1 - skip

    @torch.no_grad()
    def apply(self) -> str:
        """Replaces the weights by their average; says by which. swa needs a snapshot at least."""
        if self.swa and self.snapshots > 0:
            torch._foreach_copy_(self.parameters, self.swa)
            return f"{int(self.snapshots)} snapshots of {'the ema' if self.ema else 'the weights'}"
        if self.ema:
            torch._foreach_copy_(self.parameters, self.ema)
            return "ema"
        return "none: the last weights"


def compile_average(average, device: torch.device):
    """Compiles a WeightAverage by one step that is skipped, so that the average stays the same."""
    skip = torch.ones((), device=device)
    average.update(0.0, skip)
    average.after_step(1, skip, True)


class Schedule(NamedTuple):
    """What holds for one step."""

    progress: float  # part of the run that is over
    lr_factor: float  # of every learning rate
    momentum: float  # Muon's
    recurrent: bool  # layers run in LAYER_ORDER
    quantized: bool  # gradients are computed with weights on their grids
    snapshot: bool  # swa takes the weights after this step


def ramp(part: float, whole: float) -> float:
    """part / whole, at most 1; 1 if whole is 0."""
    return min(1.0, part / whole) if whole else 1.0


def schedule_at(settings, step: int, seconds: float) -> Schedule:
    """What holds for step number `step`, from 0, after so many seconds of the clock."""
    s = settings
    train_seconds = s.max_wallclock_seconds - s.export_reserve_seconds
    by_steps = step / s.iterations
    by_clock = seconds / train_seconds if s.max_wallclock_seconds else 0.0
    progress = min(1.0, max(by_steps, by_clock))
    # The part of the run that a step takes: by the clock, in the mean so far.
    step_part = by_clock / max(step, 1) if by_clock > by_steps else 1 / s.iterations
    warmdown = min(1.0, s.warmdown_iters * step_part) if s.warmdown_iters else s.warmdown_fraction
    decay = ramp(1 - progress, warmdown)
    if s.warmdown_shape == "cosine":
        decay = 0.5 - 0.5 * math.cos(math.pi * decay)
    lr_factor = ramp(progress + 1 / s.iterations, 0.01) * max(decay, s.min_lr)
    first = s.muon_momentum_warmup_start or 0.9 * s.muon_momentum
    steps = s.muon_momentum_warmup_steps
    risen = ramp(step, steps) if steps else ramp(progress, 0.1)
    momentum = first + (s.muon_momentum - first) * risen
    recurrent = progress >= s.recur_start
    # QAT and swa begin once rates have decayed enough, whether or not MIN_LR holds the rates up.
    quantized = decay < s.late_qat_threshold or s.quantizer == "ternary"
    snapshot = decay < s.swa_start_frac and (step + 1) % s.swa_every == 0
    return Schedule(progress, lr_factor, momentum, recurrent, quantized, snapshot)


# ==================================================================================================
# 7. Evaluation: all of a chunk is scored before test-time training may read any of it


def plan_windows(settings, first: int, last: int, rank: int, world_size: int) -> np.ndarray:
    """This rank's windows (context, begin, end), int64 (n, 3), of targets first <= p < last.

    A window reads tokens from context on and scores targets begin <= p < end; target p is
    tokens[p + 1]. Each is scored in one window of one rank. With EVAL_MODE=plain windows stand side
    by side; with sliding each is EVAL_STRIDE further on than the last and scores what is new.
    """
    length = settings.train_seq_len
    stride = settings.eval_stride if settings.eval_mode == "sliding" else length
    begin = np.arange(first, last, stride)[rank::world_size]
    context = np.maximum(0, begin + stride - length)
    return np.stack([context, begin, np.minimum(begin + stride, last)], axis=1)


class Excerpt(NamedTuple):
    """A part of the stream as the model reads it; the target at position p is tokens[p + 1]."""

    positions: np.ndarray  # (B, T) int64; outside the stream, its first or last token is read
    tokens: Tensor  # (B, T) int64, on the rank's device
    targets: Tensor  # (B, T) int64
    resumed: tuple | None = None  # stateful: `seen` and the states that Model.resume() began with


class EvaluationObserver:
    """What an Evaluator tells while it works. This one ignores it; tools/audit's does not."""

    def on_read(self, excerpt: Excerpt):
        """These tokens were read, to be scored, trained on or carried in states; no others are."""

    def on_score(self, excerpt: Excerpt, scored: np.ndarray, nats: Tensor):
        """Of an excerpt's targets, those where scored (B, T) is true got the scores nats (B, T)."""

    def on_train(self, excerpt: Excerpt):
        """An update is about to compute its gradient from this excerpt."""

    def on_short_memory(self, rows: int):
        """Memory has room for at most so many windows, or documents, at once."""


# Of a chunk: sums of nats in the first and the last epoch, before its update; epochs; seconds.
CHUNK_COLUMNS = ("first_epoch", "last_epoch", "epochs", "score_seconds", "adapt_seconds")


class Score(NamedTuple):
    """What an evaluation comes to."""

    val_loss: float  # nats per target
    val_bpb: float  # bits per byte of text
    nats: np.ndarray  # (N,) float32, in stream order
    epochs_given_up: int  # for want of time; in EVAL_MODE=documents, documents that learnt in part
    seconds: float = 0.0  # on its clock
    chunks: np.ndarray | None = None  # (chunks, 5) float64: CHUNK_COLUMNS


class StateRelay:
    """Every mixer's state on its way through the stream, from part to part and rank to rank.

    In a round, ranks score consecutive parts. A state goes to the next rank as soon as its mixer is
    done, and from the last rank to the first: R parts take 1 + (R - 1) / layers times one's time.
    """

    def __init__(self, ranks, states: list):
        self.ranks = ranks
        self.states = states
        self.before = {}  # by place: the states that take() gave for this part
        self.parts = 1  # of the round, not more than ranks
        self.sent = []

    def _receive(self, like, source: int):
        """Another rank's state, in new tensors: the old ones may still be on their way."""
        state = map_state(lambda tensor: tensor.new_empty(tensor.shape), like)
        self.ranks.receive(tensors_of(state), source)
        return state

    def take(self, place: int):
        """The state of the mixer at this place in the order, before this rank's part."""
        if self.ranks.rank > 0:
            self.states[place] = self._receive(self.states[place], self.ranks.rank - 1)
        self.before[place] = self.states[place]
        return self.states[place]

    def put(self, place: int, state):
        """Keeps the state after this rank's part, and sends it to the next rank."""
        state = map_state(compact, state)
        self.states[place] = state
        if self.ranks.rank + 1 < self.parts:
            self.sent += self.ranks.send(tensors_of(state), self.ranks.rank + 1)

    def end_round(self):
        """Gives the first rank the states after the round's last part; waits for what was sent."""
        last = self.parts - 1  # the rank of the round's last part
        if last > 0 and self.ranks.rank == last:
            for state in self.states:
                self.sent += self.ranks.send(tensors_of(state), 0)
        if last > 0 and self.ranks.rank == 0:
            self.states = [self._receive(state, last) for state in self.states]
        for work in self.sent:
            work.wait()
        self.sent.clear()


def map_state(function, state):
    """A state (a tensor, None or a NamedTuple of states) with function applied to each tensor."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state)
    return type(state)(*(map_state(function, part) for part in state))


def tensors_of(state) -> list[Tensor]:
    """A state's tensors, in order."""
    tensors = []
    map_state(tensors.append, state)
    return tensors


class Evaluator:
    """Scores a validation set once, and adapts the model to what it has scored if settings.adapts.

    Why test-time training cannot see a target before it is scored: evaluate() goes through the
    stream in chunks of TTT_CHUNK_TOKENS targets, in order. On each it first calls _score_chunk(),
    which fixes the nats of every target in the chunk, and only then _adapt(), which reads this
    chunk's tokens and targets and none after them. So the weights that score a target have been
    trained on earlier chunks alone. Within a chunk a window holds later tokens than a target, and
    only the model's causality keeps them from it. No target is scored again: _keep() counts, and
    _collect() raises unless each was scored exactly once. The last chunk, which nothing follows, is
    not trained on; the others are whole sequences by validate_settings(), so that training never
    reads past one. Ranks share a chunk's windows; gradients are summed.

    EVAL_MODE=stateful: parts of the stream are scored in order, each from the states that the part
    before has left (Model.resume(), StateRelay between ranks); attention alone sees no further than
    TRAIN_SEQ_LEN tokens back, in windows that overlap by EVAL_OVERLAP. Parts do not depend on the
    number of ranks. After an update, states are computed anew over the last window.
    EVAL_MODE=documents: weights stay as they are; each document has branches that adapt, see below.
    """

    def __init__(self, model, settings, ranks, validation, recurrent=True, observer=None):
        self.model = model
        self.settings = settings
        self.ranks = ranks
        self.validation = validation
        self.observer = observer or EvaluationObserver()
        self.order = model.order(recurrent)
        frozen = {id(p) for p in model.blocks[: settings.ttt_freeze_blocks].parameters()}
        self.trained = [p for p in model.parameters() if id(p) not in frozen]
        half = model.compute_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=half)
        self.nats_function = maybe_compile(model.score, settings, ranks)
        self.loss_function = maybe_compile(model.loss, settings, ranks)
        self.block_function = maybe_compile(Block.forward, settings, ranks)
        self.readout_function = maybe_compile(model.nats, settings, ranks)
        self.total = len(validation.target_bytes)
        self.nats = torch.zeros(self.total, device=ranks.device)
        self.times_scored = np.zeros(self.total, dtype=np.uint8)
        self.chunk = min(self.total, settings.ttt_chunk_tokens) if settings.adapts else self.total
        windows = len(plan_windows(settings, 0, self.chunk, 0, ranks.world_size))
        most = settings.val_batch_size // ranks.world_size
        self.most_tokens = most if ranks.gpu else min(most, MOST_TOKENS_ON_A_CPU)  # at once
        self.rows = max(1, min(windows, self.most_tokens // settings.train_seq_len))  # at once
        if settings.eval_mode == "documents":
            self.rows = round_up(settings.ttt_lora_slots, ROW_STEP)
        chunks = math.ceil(self.total / self.chunk)
        self.epoch_nats = torch.zeros(chunks, 2, device=ranks.device)  # two CHUNK_COLUMNS
        self.part_tokens = self._part_tokens()
        self.branches = None  # of the batch of documents at hand
        self.relay = StateRelay(ranks, [])
        self.states_from = 0  # the position from which on the states know the text
        self.scoring_seconds = 0.0  # the latest chunk's
        self.epoch_seconds = 0.0  # one epoch's, on the latest chunk that was trained on

    def _part_tokens(self) -> int:
        """Targets of a stateful evaluation's part: whole strides, an eighth of a chunk (8 ranks).

        At most 8 TRAIN_SEQ_LEN, since a compiler unrolls chunked_scan()'s loop over chunks.
        """
        s = self.settings
        stride = s.train_seq_len - s.attention_overlap
        tokens = min(self.chunk, s.val_batch_size, 64 * s.train_seq_len)
        most = max(1, tokens // (8 * stride))
        strides = math.ceil(self.chunk / stride)
        if self.chunk < self.total:  # parts end with chunks
            most = largest_divisor(strides, most)
        return stride * min(strides, most)

    def evaluate(self, started: float | None = None) -> Score:
        """Scores every chunk, and adapts to each but the last.

        started: the time.perf_counter() at which the evaluation clock began; by default now.
        """
        s = self.settings
        started = time.perf_counter() if started is None else started
        if s.eval_mode == "documents":
            return self._evaluate_documents(started)
        firsts = range(0, self.total, self.chunk)
        given_up = 0
        times = []  # CHUNK_COLUMNS without the first two, which self.epoch_nats has
        sgd = torch.optim.SGD(self.trained, lr=0.0, momentum=s.ttt_momentum)
        for index, first in enumerate(firsts):
            last = min(first + self.chunk, self.total)
            scoring_started = synchronized_time()
            self._score_chunk(first, last)
            now = synchronized_time()
            self.scoring_seconds = now - scoring_started
            epochs = 0
            if last < self.total:
                falling = 0.5 + 0.5 * math.cos(math.pi * (index / len(firsts)))  # from 1 to 0
                sgd.param_groups[0]["lr"] = s.ttt_lr * falling
                seconds_left = started + s.eval_max_seconds - now
                epochs = self._affordable_epochs(index, len(firsts) - 1 - index, seconds_left)
                self._adapt(first, last, sgd, epochs)
                given_up += s.ttt_epochs - epochs
            times.append([epochs, self.scoring_seconds, epochs * self.epoch_seconds])
        chunks = np.hstack([self.ranks.sum_(self.epoch_nats).cpu(), times])
        score = self._collect(given_up)
        return score._replace(seconds=time.perf_counter() - started, chunks=chunks)

    def _affordable_epochs(self, index: int, chunks_left: int, seconds_left: float) -> int:
        """How many epochs chunk number index may get, so that all others can be scored in time.

        Each of the chunks_left has an equal part of seconds_left: 1.2 times what scoring took last,
        and epochs. The first two chunks, whose times include compiling, get all epochs.
        """
        epochs = self.settings.ttt_epochs
        if index >= 2:
            spare = seconds_left / chunks_left - 1.2 * self.scoring_seconds
            epochs = min(epochs, max(0, int(spare / max(self.epoch_seconds, 1e-9))))
        # Rank 0's clock decides for all: ranks that disagreed would wait for gradients for ever.
        return self.ranks.from_main(epochs if seconds_left > 0 else 0)

    @torch.no_grad()
    def _score_chunk(self, first: int, last: int):
        """Scores this rank's part of the targets first <= p < last."""
        if self.settings.eval_mode == "stateful":
            self._score_parts(first, last)
            return
        windows = plan_windows(self.settings, first, last, self.ranks.rank, self.ranks.world_size)

        def score(part: slice):
            batch = windows[part]
            spare = np.tile([batch[-1, 0], 0, 0], (self.rows - len(batch), 1))
            # All batches have the same number of rows; the spare ones score nothing.
            context, begin, end = np.concatenate([batch, spare]).T[:, :, None]
            excerpt = self._read(context, self.settings.train_seq_len)
            nats = self.nats_function(excerpt.tokens, excerpt.targets, self.order)
            self._keep(excerpt, begin, end, nats)

        self._in_parts(len(windows), score, filled=True)

    def _in_parts(self, count: int, work, filled: bool = False) -> list:
        """The results of work(slice) for slices of count rows, each as large as memory allows.

        If work raises OutOfMemoryError it is called again on fewer rows, so it must bear repeating.
        filled: it reads spare rows with the last ones, as many in all as in other slices.
        """
        results = []
        first = 0
        while first < count:
            part = slice(first, min(first + self.rows, count))
            with suppress(torch.OutOfMemoryError):
                results.append(work(part))
                first = part.stop
                continue
            rows = self.rows if filled else part.stop - part.start
            self._take_fewer(rows)  # outside suppress(), its tensors are freed
        return results

    def _take_fewer(self, rows: int):
        """From now on at most half as many rows at once; OutOfMemoryError if it was one."""
        if rows == 1:
            raise torch.OutOfMemoryError("a single row is too much")
        self.rows = math.ceil(rows / 2)
        torch.cuda.empty_cache()  # pieces of free memory become larger ones
        self.observer.on_short_memory(self.rows)

    def _score_parts(self, first: int, last: int):
        """Stateful: rounds of one part for each rank, from the states before the first target."""
        rank, overlap = self.ranks.rank, self.settings.attention_overlap
        if first == 0:
            self.relay.states = self.model.new_states(self.order)
        for begin in range(first, last, self.part_tokens * self.ranks.world_size):
            parts = range(begin, last, self.part_tokens)[: self.ranks.world_size]
            self.relay.parts = len(parts)
            if rank < len(parts):
                excerpt, hidden = self._resume(parts[rank], self.part_tokens)
                before, targets = (x[:, overlap:] for x in (excerpt.tokens, excerpt.targets))
                nats = self.readout_function(hidden, targets, before)
                self._keep(excerpt, parts[rank], last, F.pad(nats, (overlap, 0)))
            self.relay.end_round()

    def _resume(self, first: int, length: int) -> tuple[Excerpt, Tensor]:
        """Reads `length` tokens and the overlap before `first`; hidden: (1, length, width)."""
        overlap = self.settings.attention_overlap
        seen = torch.tensor(min(overlap, first - self.states_from), device=self.ranks.device)
        excerpt = self._read(np.array([[first - overlap]]), overlap + length)
        block = self.block_function
        hidden = self.model.resume(excerpt.tokens, seen, self.order, self.relay, block)
        return excerpt._replace(resumed=(seen, list(self.relay.before.values()))), hidden

    @torch.no_grad()
    def _renew_states(self, position: int):
        """Rank 0's states before a position, by the present weights, from the last window alone."""
        stride = self.settings.train_seq_len - self.settings.attention_overlap
        window = stride * math.ceil(self.settings.train_seq_len / stride)
        self.states_from = max(0, position - window)
        if self.ranks.rank == 0:
            self.relay.states = self.model.new_states(self.order)
            self.relay.parts = 1
            self._resume(self.states_from, position - self.states_from)

    def _read(self, starts: np.ndarray, length: int) -> Excerpt:
        """`length` tokens from starts (B, 1) on; outside the stream, its first or last one."""
        positions = starts + np.arange(length + 1)
        stream = self.validation.tokens[np.clip(positions, 0, self.total)]
        tokens = torch.tensor(stream, dtype=torch.int64, device=self.ranks.device)
        targets = tokens[:, 1:].contiguous()
        excerpt = Excerpt(positions[:, :-1], tokens[:, :-1].contiguous(), targets)
        self.observer.on_read(excerpt)
        return excerpt

    def _keep(self, excerpt: Excerpt, first, last, nats: Tensor):
        """Keeps the nats (B, T) of an excerpt's targets first <= p < last, each int or (B, 1)."""
        scored = (first <= excerpt.positions) & (excerpt.positions < last)
        cells = np.flatnonzero(scored)
        where = excerpt.positions.flatten()[cells]
        np.add.at(self.times_scored, where, 1)
        self.nats[where] = nats.flatten()[cells]
        self.observer.on_score(excerpt, scored, nats)

    def _adapt(self, first: int, last: int, sgd: torch.optim.SGD, epochs: int):
        """Trains for so many epochs on targets first <= p < last, which have their scores."""
        started = synchronized_time()
        nats = [self._train_epoch(first, last, sgd) for _ in range(epochs)]
        if not nats:
            return
        self.epoch_nats[first // self.chunk] = torch.stack([nats[0], nats[-1]])
        if self.settings.eval_mode == "stateful":
            self._renew_states(last)
        self.epoch_seconds = (synchronized_time() - started) / epochs

    def _train_epoch(self, first: int, last: int, sgd: torch.optim.SGD) -> Tensor:
        """A step of SGD on targets first <= p < last; returns the sum of this rank's nats, ()."""
        s, world_size = self.settings, self.ranks.world_size
        length = ttt_sequence_length(s, world_size)
        whole = (last - first) % (world_size * length) == 0  # by validate_settings()
        assert whole or last == self.total, "training would read past its chunk"
        mine = np.array_split(np.arange(first, last, length), world_size)[self.ranks.rank]
        rows = largest_divisor(len(mine), self.most_tokens // length)
        share = rows / len(mine) / world_size  # a batch's weight in the chunk's mean
        total = torch.zeros((), device=self.ranks.device)
        for batch in mine.reshape(-1, rows, 1):
            excerpt = self._read(batch, length)
            self.observer.on_train(excerpt)
            loss = self.loss_function(excerpt.tokens, excerpt.targets, self.order)
            self.scaler.scale(loss * share).backward()
            total += loss.detach() * share
        for parameter in self.trained:
            self.ranks.sum_(parameter.grad)
        self.scaler.unscale_(sgd)
        if s.ttt_grad_clip:
            nn.utils.clip_grad_norm_(self.trained, s.ttt_grad_clip)
        self.scaler.step(sgd)
        self.scaler.update()
        self.model.zero_grad()
        return total * (last - first)

    def _evaluate_documents(self, started: float) -> Score:
        """evaluate() with EVAL_MODE=documents, which learn as long as DocumentClock lets them."""
        s = self.settings
        batches = plan_batches(self.validation.tokens, s)
        mine = share_batches(batches, s, self.ranks.world_size)[self.ranks.rank]
        clock = DocumentClock(s, started, sum(int(batch.lengths.sum()) for batch in mine))
        given_up = 0
        for batch in mine:
            clock.later -= int(batch.lengths.sum())
            least = clock.least_new(batch, 0)
            self.branches = None if least else Branches(self.model, s)
            with documents_alone(self.model, self.branches):
                given_up += self._score_batch(batch, clock, least)
        score = self._collect(sum(self.ranks.gather(given_up)))
        self.scoring_seconds = time.perf_counter() - started
        return score._replace(seconds=self.scoring_seconds)

    def _score_batch(self, batch: "DocumentBatch", clock, least: int) -> int:
        """Scores documents piece by piece; branches, if any, learn from each piece after its score.

        Once the DocumentClock forbids that, branches stay as they are and windows move further.
        Returns how many documents still had targets at that moment; 0 if there was none.
        """
        given_up = end = 0
        while documents := batch.longer_than(end):
            learns = not least
            if self.settings.adapts and not learns:
                given_up = given_up or documents
            begin = end
            context, end = plan_piece(batch, self.settings, begin, learns, least)
            going_on = batch.longer_than(end)  # documents that have another piece
            reading_since = synchronized_time()
            with torch.set_grad_enabled(learns and going_on > 0):
                piece, nats = self._score_piece(batch, context, begin, end)
            clock.count((end - context) * documents, reading_since)
            if not going_on:
                break
            least = clock.least_new(batch, end, self.branches is not None)
            # The piece has its scores. Only now do branches learn from it, for the pieces to come.
            if learns and not least:
                self.observer.on_train(Excerpt(*(part[:going_on] for part in piece)))
                if not self._add_gradients(nats[:going_on]):
                    nats = None  # lets go of what its gradients would need
                    place = context, begin, end
                    self._in_parts(going_on, partial(self._read_again, batch, place))
                self.branches.step()
        return given_up

    def _add_gradients(self, nats: Tensor) -> bool:
        """Whether memory was enough for Branches.add_gradients() of nats; else takes fewer rows."""
        if nats.requires_grad:
            with suppress(torch.OutOfMemoryError):
                self.branches.add_gradients(nats)
                return True
            self._take_fewer(len(nats))
        return False

    def _read_again(self, batch: "DocumentBatch", place: tuple, part: slice):
        """Gradients of a scored piece, at place, for a part of the documents, by another pass."""
        self.branches.forget(part)  # a pass on more rows may have left some
        with torch.enable_grad():
            nats = self._read_piece(batch, *place, part)[-1]
            self.branches.add_gradients(nats)

    def _score_piece(self, batch: "DocumentBatch", context: int, begin: int, end: int) -> tuple:
        """Scores targets begin to end, read from context on, of the documents that are so long.

        All three count from a document's first token. Returns positions, tokens and targets as a
        list, and nats, each (n, L); what stands after a document's end is void. The nats have what
        gradients need if these are enabled and memory has room for all documents at once.
        """
        rows = round_up(batch.longer_than(begin), ROW_STEP if self.ranks.gpu else 1)

        def score(part: slice) -> tuple:
            whole = part == slice(0, rows)
            with torch.set_grad_enabled(whole and torch.is_grad_enabled()):
                excerpt, piece, nats = self._read_piece(batch, context, begin, end, part)
            begins = batch.begins[part]
            last = begins + np.minimum(end, batch.lengths[part])
            behind = excerpt.tokens.shape[1] - (end - context)
            padded = F.pad(nats.detach(), (begin - context, behind))
            self._keep(excerpt, begins + begin, last, padded)
            return *piece, nats

        parts = self._in_parts(rows, score)
        if len(parts) > 1:  # without what gradients need
            positions, *tensors = zip(*parts, strict=True)
            parts = [(np.concatenate(positions), *map(torch.cat, tensors))]
        *piece, nats = parts[0]
        return piece, nats

    def _read_piece(
        self, batch: "DocumentBatch", context: int, begin: int, end: int, part: slice
    ) -> tuple:
        """The Excerpt that is read for a part of the documents; its piece, and nats (n, L)."""
        length = min(self.settings.train_seq_len, round_up(end - context, WIDTH_STEP))
        excerpt = self._read(batch.begins[part] + context, length)
        if self.branches:
            self.branches.begin_at(part.start)
        hidden = self.model(excerpt.tokens, self.order)
        columns = slice(begin - context, end - context)
        piece = [x[:, columns] for x in excerpt[:3]]
        _, tokens, targets = piece
        return excerpt, piece, self.model.nats(hidden[:, columns], targets, tokens)

    def _collect(self, epochs_given_up: int) -> Score:
        """The Score of all ranks' nats; RuntimeError if a target was not scored exactly once."""
        times = self.ranks.sum_(torch.tensor(self.times_scored, device=self.ranks.device))
        if (times != 1).any():
            raise RuntimeError("a target was not scored exactly once")
        nats = self.ranks.sum_(self.nats).cpu().numpy()
        total = float(nats.sum(dtype=np.float64))
        bits_per_byte = total / math.log(2) / int(self.validation.target_bytes.sum())
        return Score(total / self.total, bits_per_byte, nats, epochs_given_up)


# ---- Documents that adapt ------------------------------------------------------------------------
# EVAL_MODE=documents scores pieces of TTT_LORA_PIECE tokens, each from the window that ends with it
# and begins with its document, or TRAIN_SEQ_LEN tokens back. With TTT_ENABLED a document adapts the
# model, for itself alone: beside a matrix W stands a branch of low rank r (LoRA, arXiv 2106.09685;
# by document, as in the contest's #1530 and #1855),
#
#     y = W x + 1.8 B A x        A (r, inputs), B (outputs, r)
#
# B begins as 0, so that the artifact's model scores the first piece; A as one draw, the same for
# all documents and runs. A scored piece's mean nats make a step, for the pieces to come:
#
#     score piece 0, learn from 0, score 1, learn from 1, score 2, learn from 2, score the last
#
# The n-th step of a document, for each of its matrices P with the gradient G:
#
#     s <- 0.99 s + 0.01 mean of G^2;    P <- (1 - rate decay) P - rate G / sqrt(s / (1 - 0.99^n))
#
# That is AdamW without momentum, but with one s for a matrix instead of one for each number. With
# one for each, the first step would move every number by the whole rate: also in the head's rows of
# all the tokens that a piece says next to nothing about.
#
# So a score depends on earlier tokens of its own document, and on how long DocumentClock lets it
# learn: not on what is read beside it, nor on the order, nor on the number of ranks.
WIDTH_STEP = 64  # windows are filled up to a multiple of it, a scan's chunk: shapes are few
ROW_STEP = 16  # likewise, on GPUs, of documents read at once: some that have ended are read on
BRANCH_GAIN = 1.8  # of B A x beside W x
BRANCH_BETA2 = 0.99  # how much of s a step keeps
BRANCHED = ("mlp", "head", "query", "key", "value", "out", "in_proj", "out_proj")  # may have one


def round_up(number: int, step: int) -> int:
    """The least multiple of step that is not less."""
    return math.ceil(number / step) * step


class DocumentBatch(NamedTuple):
    """Documents that are scored at once, longest first; empty ones fill up the last batch."""

    begins: np.ndarray  # (slots, 1) int64: positions of their first tokens in the stream
    lengths: np.ndarray  # (slots, 1) int64: numbers of targets; the last is the next one's BOS

    def longer_than(self, offset: int) -> int:
        """How many documents, always the first ones, have a target at this offset."""
        return int((self.lengths > offset).sum())


def plan_batches(tokens: np.ndarray, settings) -> list[DocumentBatch]:
    """All documents, longest first, TTT_LORA_SLOTS a batch; the first token always begins one."""
    slots = settings.ttt_lora_slots
    begins = np.union1d(0, np.flatnonzero(tokens == BOS_ID))
    lengths = np.diff(begins, append=len(tokens) - 1)  # 0: a BOS that ends the stream
    order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    facts = np.stack([begins, lengths])[:, order, None]  # (2, documents, 1)
    facts = np.pad(facts, ((0, 0), (0, -len(order) % slots), (0, 0)))
    return [DocumentBatch(*part) for part in np.split(facts, facts.shape[1] // slots, axis=1)]


def plan_piece(batch: DocumentBatch, settings, begin: int, learns: bool, least=0) -> tuple:
    """(context, end): documents' targets begin to end come next, in windows from context on.

    A piece has TTT_LORA_PIECE targets, or `least` if that is more. If documents do not learn, the
    first one is as many such pieces as fit into a window.
    """
    window = settings.train_seq_len
    piece = min(max(settings.ttt_lora_piece, least), window)
    end = begin + piece
    if not learns:  # frozen weights score all targets of a window at once
        end = max(end, window // piece * piece)
    return max(0, end - window), min(end, int(batch.lengths.max()))


def share_batches(batches: list, settings, world_size: int) -> list[list[DocumentBatch]]:
    """Each rank's batches. One after the other goes to the rank with the fewest tokens to read."""
    shares = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for batch in batches:
        rank = loads.index(min(loads))
        shares[rank].append(batch)
        begin = 0
        while documents := batch.longer_than(begin):
            context, begin = plan_piece(batch, settings, begin, settings.adapts)
            loads[rank] += (begin - context) * documents
    return shares


@dataclass
class DocumentClock:
    """Decides how documents are read on, by how long reading has taken so far. The ways are

        1. pieces of TTT_LORA_PIECE, each learnt from
        2. windows that move by half of TRAIN_SEQ_LEN
        3. windows side by side

    The first is taken until the last tenth of EVAL_MAX_SECONDS. It and the second are taken only
    while the next way could still read all the rest in time, with a fifth to spare.
    """

    settings: Settings
    started: float  # by time.perf_counter()
    later: int  # targets of batches to come
    pieces: int = 0
    tokens: int = 0  # of all pieces but the first two, whose times include compiling
    seconds: float = 0.0  # that reading these took
    latest: float = 0.0  # seconds of a batch's window, a mean that forgets by halves

    def count(self, tokens: int, since: float):
        """Notes that a piece of so many tokens was read from the time `since` until now."""
        taken = synchronized_time() - since
        self.pieces += 1
        if self.pieces > 2:
            self.tokens += tokens
            self.seconds += taken
            self.latest = (self.latest + taken) / 2 if self.latest else taken

    def suffices(self, batch: DocumentBatch, begin: int, step: int) -> bool:
        """Whether windows that move by step could read all from begin on, and one more, in time.

        A window of this batch is taken to last as long as the latest, since with fewer documents it
        lasts hardly less; batches to come, as long as so many tokens have taken so far.
        """
        windows = max(0, int(batch.lengths.max()) - begin) / step + 1
        tokens = self.later * self.settings.train_seq_len / step
        needed = windows * self.latest + tokens * self.seconds / max(1, self.tokens)
        end = self.started + self.settings.eval_max_seconds
        return time.perf_counter() + 1.2 * needed < end

    def least_new(self, batch: DocumentBatch, begin: int, branched: bool = True) -> int:
        """How many targets, at least, come next from begin on; 0: a piece, which is learnt from.

        branched: whether this batch has branches. They are not begun in the middle of documents.
        """
        s = self.settings
        if not s.adapts:
            return 1
        half = max(1, s.train_seq_len // 2)
        in_time = time.perf_counter() < self.started + 0.9 * s.eval_max_seconds
        if branched and in_time and self.suffices(batch, begin, half):
            return 0
        return half if self.suffices(batch, begin, s.train_seq_len) else s.train_seq_len


class LowRank:
    """BRANCH_GAIN B A x, with A and B of its own for each document of a batch."""

    first = 0  # the number, in the batch, of the document in x's first row

    def __init__(self, inputs: int, outputs: int, settings, generator, device):
        rank = settings.ttt_lora_rank
        slots = settings.ttt_lora_slots
        uniform = 2 * torch.rand(inputs, rank, generator=generator) - 1
        drawn = (uniform * inputs**-0.5).to(device).expand(slots, -1, -1)  # the same for all
        self.down = drawn.clone().requires_grad_()  # A, transposed
        self.up = drawn.new_zeros(slots, rank, outputs).requires_grad_()  # B, transposed

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, T, inputs) of n documents -> (n, T, outputs), in x's dtype."""
        documents = slice(self.first, self.first + len(x))
        low = x @ self.down[documents].to(x.dtype)
        return BRANCH_GAIN * (low @ self.up[documents].to(x.dtype))


def add_branch(branch: LowRank, module, arguments: tuple, keywords: dict, output: Tensor) -> Tensor:
    """A forward hook: the layer's output plus what the branch beside it adds."""
    if isinstance(module, MLP):  # it gets the residual stream; its branch reads what `up` does
        stream, input_scale = arguments
        x = input_scale * norm(stream)
    else:
        x = module.effective_input(*arguments, **keywords)
    return output + branch(x.to(output.dtype))


class Branches:
    """New branches for a batch of documents, and how they learn; UserError if they could not."""

    def __init__(self, model: Model, settings):
        s = settings
        lost = "float16 loses the gradients of branches: use PRECISION=float32 or TTT_ENABLED=0"
        need(model.compute_dtype != torch.float16, lost)
        device = model.rotary_table.device
        draw = {"generator": torch.Generator().manual_seed(0), "device": device}  # SEED has no part
        names = s.ttt_lora_layers.split(",")
        self.beside = {}  # layers and their branches
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in names:
                ends = (module.up, module.down) if isinstance(module, MLP) else (module, module)
                sizes = ends[0].in_features, ends[1].out_features
                self.beside[module] = LowRank(*sizes, s, **draw)
        self.head = LowRank(s.model_dim, s.vocab_size, s, **draw) if "head" in names else None
        self.every = [*self.beside.values(), *filter(None, [self.head])]
        check(s, "ttt_lora_layers", self.every, "names nothing that the model has")
        self.matrices = [matrix for branch in self.every for matrix in (branch.down, branch.up)]
        self.squares = [matrix.new_zeros(len(matrix), 1, 1) for matrix in self.matrices]
        self.steps = 0
        self.rate = s.ttt_lora_lr
        self.kept = 1 - s.ttt_lora_lr * s.ttt_lora_decay  # what a step's decay leaves of a number

    def begin_at(self, first: int):
        """From now on, the first row that is read is of the batch's document number `first`."""
        for branch in self.every:
            branch.first = first

    def add_gradients(self, nats: Tensor):
        """Each document's gradients, of the mean of its piece's nats (n, L)."""
        nats.mean(dim=1).sum().backward()

    def forget(self, documents: slice):
        """Sets the gradients of some documents to 0."""
        for matrix in self.matrices:
            if matrix.grad is not None:
                matrix.grad[documents] = 0.0

    def step(self):
        """A step for each document by itself, by its gradients, which are then dropped."""
        self.steps += 1
        for matrix, square in zip(self.matrices, self.squares, strict=True):
            self.move(matrix, square, matrix.grad)

    @torch.no_grad()
    def move(self, matrix: Tensor, square: Tensor, direction: Tensor):
        """A step of a matrix (slots, ...) in a direction; square: the s of its gradient.

        step() gives the gradient as the direction; a subclass may give another.
        """
        square.lerp_(matrix.grad.square().mean(dim=(1, 2), keepdim=True), 1 - BRANCH_BETA2)
        usual = (square / (1 - BRANCH_BETA2**self.steps)).sqrt() + 1e-10
        matrix.mul_(self.kept).sub_(self.rate * (direction / usual))
        matrix.grad = None


@contextmanager
def documents_alone(model: Model, branches: Branches | None):
    """While entered, a row is one document, layers have branches, and weights no gradients."""
    before = {"settings": model.settings, "attention_backend": model.attention_backend}
    device = model.rotary_table.device
    alone = replace(model.settings, document_reset=False)
    flash = replace(alone, attention_backend="flash")
    many = alone.attention_backend == "auto" and device.type == "cuda"
    if many and not attention_problem(flash, device):
        alone = flash  # windows have many shapes, for each of which cuDNN would make a plan
    backend = choose_attention_backend(alone, device)
    with ExitStack() as after:
        after.callback(vars(model).update, before, head_branch=None)
        vars(model).update(settings=alone, attention_backend=backend)
        model.head_branch = branches.head if branches else None
        after.callback(model.requires_grad_, True)
        model.requires_grad_(False)
        for module, branch in branches.beside.items() if branches else ():
            hook = partial(add_branch, branch)
            after.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def profile(settings, validation: ValidationSet, score: Score) -> dict[str, dict[str, list]]:
    """Where the nats of a score are: tables for the log, with sums of targets, bytes and nats.

    A table groups targets by a number x: the length of the target's document in tokens, its place
    there (BOS has 0) or, of plain windows, its place in the window. Row i has those whose x has i
    binary digits, row 15 all with more. The table "chunks" has a row for each TTT_CHUNK_TOKENS.
    """
    chunk, place = settings.ttt_chunk_tokens, np.arange(len(validation.tokens))
    begins = np.union1d(0, np.flatnonzero(validation.tokens == BOS_ID))
    lengths = np.diff(begins, append=len(place))
    rows = {"document_length": np.repeat(lengths, lengths)[1:]}
    rows["document_position"] = (place - np.repeat(begins, lengths))[1:]
    if settings.eval_mode == "plain":
        in_chunk = place % chunk if settings.adapts else place  # windows begin anew with a chunk
        rows["window_position"] = in_chunk[:-1] % settings.train_seq_len
    rows = {name: np.minimum(np.frexp(x)[1], 15) for name, x in rows.items()}
    rows["chunks"] = place[:-1] // chunk
    sums = {"targets": None, "bytes": validation.target_bytes, "nats": score.nats}
    tables = {}
    for name, row in rows.items():
        tables[name] = {key: np.bincount(row, x).round(3).tolist() for key, x in sums.items()}
    if settings.adapts and score.chunks is not None:
        tables["chunks"] |= dict(zip(CHUNK_COLUMNS, score.chunks.T.round(3).tolist(), strict=True))
    return tables


# ==================================================================================================
# 8. Quantization
#
# A matrix W (rows, columns) is stored as integers Q on a grid of its own:
#
#     W[i, j]  ~  Q[i, j] · row_step[i] · column_step[j],        |Q[i, j]| <= limit[i]
#
#     limits  grid_limits(): 31, which is int6, in most rows; 127 where errors count for more
#     steps   grid_steps(), by SDClip: a row's grid ends at k root-mean-squares of its weights
#     k       fit_sdclip(): a larger k is a coarser grid, of fewer bytes; the least whose file fits
#     Q       gptq(): each column is rounded after it has made up for the errors of those before;
#             collect_costs() says which errors count, by the layer's inputs
#
# With TRELLIS_STATES some weights are Q + 1/2 steps: trellis_points(). With SDCLIP_BY_MATRIX and
# SDCLIP_BY_ROW steps differ by what errors cost, find_grid_factors(), and limits are 127.
#
# QUANTIZER=gptq is all of that, round takes the nearest integers; percentile, dsq and ternary have
# grid steps of their own (section 12). These steps are not section 4's step sizes dt.

DIVERGED = "training diverged; lower MATRIX_LR, MAMBA_MATRIX_LR, SCALAR_LR or TIED_EMBED_LR"

INT6_MAX, INT8_MAX, TERNARY_MAX = 31, 127, 1
SDCLIP_LEAST = 4.0  # the finest grid that is tried: weights beyond four root-mean-squares are rare
SDCLIP_PARTS = 100  # the values of k that are tried are 1 / 100 apart, up to SDCLIP_MOST
SDCLIP_USUAL = 12.0  # k of the steps that find_grid_factors() begins with
LEAST_ENERGY = 1e-3  # of a row's gradients, where the mean of its matrix is 1
OTHER_BYTES = 4096.0  # of a file besides its numbers, with room for a wrong prediction
DAMPING_ATTEMPTS = 12  # tenfold each time, until a Hessian is positive definite
LEAST_DAMPING = 1e-8  # of its mean diagonal, from the second attempt on: less is lost in float32
TEXTS_AT_ONCE = 256  # that the model writes for CALIBRATION=self

# Kinds of layers. A matrix is of the kind of the first of these parts that its name contains.
KINDS = {"bigram": "bigrams", "mlp": "MLP", "out_proj": "Mamba out", "_proj": "Mamba in"}
KINDS |= {"mixer": "attention", "": "embedding"}


def layer_kind(name: str) -> str:
    """A matrix's kind, such as "Mamba in", by its name: one of the values of KINDS."""
    return next(kind for part, kind in KINDS.items() if part in name)


def grid_limits(model) -> dict[str, Tensor]:
    """The largest integer in each row of every matrix, float32 (rows, 1), by the weight's name.

    It is INT8_MAX in the tokens' embedding and an untied output matrix; and, because a recurrence
    compounds their errors, in the rows that make step sizes, decays, trapezoids and angles: the
    last dynamics_rows of in_proj, and in the first Mamba all of x_proj and dt_proj.
    """
    usual = TERNARY_MAX if model.settings.quantizer == "ternary" else INT6_MAX
    limits = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            continue
        weight = layer.weight.detach()
        rows = weight.new_full((len(weight), 1), usual, device="cpu" if weight.is_meta else None)
        if name in ("embedding", "output_embedding") or name.endswith((".x_proj", ".dt_proj")):
            rows[:] = INT8_MAX
        elif name.endswith(".in_proj"):
            rows[len(rows) - getattr(layer, "dynamics_rows", 0) :] = INT8_MAX
        limits[f"{name}.weight"] = rows
    return limits


def exact_steps(steps: Tensor) -> Tensor:
    """The nearest normal float16 numbers, as float32: never 0, even if a row's weights all are."""
    return steps.clamp(min=2**-14, max=60_000.0).half().float()


def coarse_steps(steps: Tensor) -> Tensor:
    """exact_steps() rounded to four significant bits, which LZMA stores in half a byte.

    That is within 6 % of a step. What too fine and too coarse grids cost or save evens out, but for
    the mean square of these 6 %, about 0.1 %.
    """
    numbers = exact_steps(steps).half().view(torch.int16)
    return ((numbers + 64) & -128).view(torch.float16).float()  # keeps 3 of 10 bits of mantissa


def round_to_grid(weight: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    """The integers, in weight's dtype, whose products with the grid steps `scale` are nearest."""
    return (weight / scale).round().clamp(-limits, limits)


# Trellises by their number of states: two bit fields. Bit i of the first says whether the points of
# state i are halves; of the second, whether odd integers count as even. Both are parities of some
# bits of i: those with the least error on uniform numbers, 0.99 to 1.23 dB below integers' in long
# columns, 0.96 to 1.13 in paths of TRELLIS_ROWS.
TRELLISES = {4: (0xA, 0xC), 8: (0xAA, 0x96), 16: (0xAAAA, 0xA55A), 32: (0x5A5A5A5A, 0x5AA5A55A)}
TRELLIS_ROWS = 128  # of a column, after which a new path begins in state 0


def trellis_tables(states: int, device=None) -> Tensor:
    """The bits of TRELLISES by state, int64 (2, states): halves, flips."""
    bits = torch.tensor(TRELLISES[states], device=device).unsqueeze(1)
    return (bits >> torch.arange(states, device=device)) & 1


def trellis_points(integers: Tensor, states: int) -> Tensor:
    """What integers k (rows, columns) stand for, in units of a step: k or k + 1/2, float32.

    Trellis coded quantization (Marcellin and Fischer, 1990). A state, 0 at first, moves down each
    column; it has two bits h and f in trellis_tables():

        point = k + h / 2,        next state = (2 · state + (k mod 2 xor f)) mod states.

    Each state has as many points as there are integers, so that these take no more bits. But many
    paths of states lead down a column, and the best comes nearly as close to the weights as a grid
    of half the step: where two paths meet, k mod 2 keeps their points apart (Ungerboeck, 1982).
    """
    halves, flips = trellis_tables(states)
    rows, columns = integers.shape
    padded = F.pad(integers, (0, 0, 0, -rows % TRELLIS_ROWS)).view(-1, TRELLIS_ROWS, columns)
    points = padded.float()
    state = torch.zeros_like(padded[:, 0], dtype=torch.int64)
    for row in range(TRELLIS_ROWS):
        points[:, row] += halves[state] / 2
        state = (2 * state + ((padded[:, row] & 1) ^ flips[state])) % states
    return points.view(-1, columns)[:rows]


def round_by_trellis(column: Tensor, step: Tensor, limits: Tensor, states: int, weights=1.0):
    """The trellis_points() that, times step, have the least squared error summed over the column.

    All are (..., rows, 1), float32; limits are odd and bound the integers. Rows' errors are
    multiplied by weights before: a path accepts errors in some rows to avoid them in others.
    """
    rows = column.shape[-2]
    numbers = torch.stack([column / step, step * weights, limits]).squeeze(-1)
    numbers = F.pad(numbers, (0, -rows % TRELLIS_ROWS)).view(3, -1, TRELLIS_ROWS)
    fused = triton and column.is_cuda and kernel_limits(column.device)[0] >= 80
    search = fused_trellis_search if fused else trellis_search
    return search(numbers, states).reshape(*column.shape[:-2], -1, 1)[..., :rows, :]


def trellis_search(numbers: Tensor, states: int) -> Tensor:
    """The points (segments, rows) of best paths: Viterbi's algorithm, all segments at once.

    numbers (3, segments, rows): weights over steps; steps, which are 0 after a matrix's last row;
    limits. Two branches lead into state 2 i + u, from state i and from i + states / 2: the cheaper
    one is kept, and at the end the path into the cheapest state is followed back.
    """
    x, step, limits = numbers.mT.unsqueeze(2)  # (rows, 1, segments)
    halves, flips = trellis_tables(states, x.device)
    # The nearest points on each of four grids, 0: 2n, 1: 2n + 1/2, 2: 2n + 1, 3: 2n + 3/2.
    half, odd = torch.tensor([[0, 0.5, 0, 0.5], [0, 0, 1, 1]], device=x.device).unsqueeze(2)
    most = limits - 1 + odd  # limits are odd: the largest integer of the grid
    integers = 2 * ((x - half - odd) / 2 + 0.5).floor() + odd
    points = integers.clamp(-most, most) + half
    errors = ((x - points) * step).square()
    u = torch.arange(2, device=x.device)
    grid = halves.unsqueeze(1) + 2 * (u ^ flips.unsqueeze(1))  # of each state's two branches
    cost = x.new_full((states, x.shape[2]), math.inf)
    cost[0] = 0
    choices = []
    for error in errors.index_select(1, grid.flatten()).unflatten(1, (2, -1, 2)):
        first, second = cost.view(2, -1, 1, x.shape[2]) + error
        choices.append(second < first)
        cost = torch.minimum(first, second).view(cost.shape)
    steps_back = torch.stack(choices).view(-1, *cost.shape) * (states // 2)
    path = [cost.argmin(dim=0, keepdim=True)]
    for step_back in steps_back.flip(0):
        path.append((path[-1] >> 1) + step_back.gather(0, path[-1]))
    path = torch.stack(path[::-1])
    return points.gather(1, grid[path[:-1], path[1:] % 2]).squeeze(1).mT


def sdclip_steps(weight: Tensor, limits: Tensor, clips: Tensor) -> Tensor:
    """Steps (rows, 1) of grids that end at clips times each row's root mean square."""
    return coarse_steps(clips * weight.square().mean(dim=1, keepdim=True).sqrt() / limits)


def grid_steps(weight: Tensor, limits: Tensor, settings, k: float) -> tuple[Tensor, Tensor]:
    """A matrix's grid steps of rows (rows, 1) and columns (columns,). k: of rows that are int6."""
    clips = torch.where(limits == INT8_MAX, settings.sdclip_k_int8, k)
    if settings.quantizer == "dsq":
        return decoupled_steps(weight, limits, clips)
    rules = {"percentile": percentile_steps, "ternary": ternary_steps}
    rule = rules.get(settings.quantizer, sdclip_steps)
    return rule(weight, limits, clips), torch.ones_like(weight[0])


def stand_in(limits: Tensor) -> tuple[Tensor, Tensor]:
    """In place of a skeleton's matrix: Gaussian rows (64, 256), and limits (64, 1) from its own."""
    rows = torch.linspace(0, len(limits) - 1, 64).long()
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), limits[rows]


def grids(model, settings, matrices: dict[str, Tensor], k: float):
    """Yields (name, weight, limits, row steps, column steps) of each of grid_limits()'s matrices.

    A matrix in model.grid_factors has its row steps multiplied by these, and limits of INT8_MAX.
    """
    for name, limits in matrices.items():
        weight = model.get_parameter(name).detach()
        if weight.is_meta:
            weight, limits = stand_in(limits)
        rows, columns = grid_steps(weight, limits, settings, k)
        if name in model.grid_factors:
            limits = torch.full_like(limits, INT8_MAX)
            finest = sdclip_steps(weight, limits, SDCLIP_LEAST)  # finer ones would clip
            rows = coarse_steps(rows * model.grid_factors[name]).maximum(finest)
        yield name, weight, limits, rows, columns


def float_type(name: str) -> str:
    """The dtype in an artifact of a vector or of a matrix's grid steps, by a parameter's name."""
    return "float32" if name.endswith((".dt_bias", ".D")) else "float16"


def predict_bytes(model, settings, k: float, solvers=None) -> float:
    """The size of the artifact with this k, in bytes: known before GPTQ, within a percent."""
    return sum(predict_parts(model, settings, k, solvers).values())


@torch.no_grad()
def predict_parts(model, settings, k: float, solvers=None) -> dict[str, float]:
    """Bytes of the artifact with this k: by values of KINDS, of "vectors", and of what is "beside".

    GPTQ's integers are not known yet: the nearest ones stand in, of weights that spread_by_gptq()
    has spread as GPTQ would (solvers: calibrate()'s). Measured: the coder takes 0.1 % more than the
    entropy. Each lane's last state takes 4 bytes; the frequencies, packed, are not counted, as
    these states hold integers worth about as much. LZMA makes at most 0.6 bytes of one of
    coarse_steps(), 1.6 of another step, 0.35 of one of measure_reaches(). A skeleton's weights are
    Gaussian: stand_in().
    """
    matrices = grid_limits(model)
    others = [(name, p) for name, p in model.named_parameters() if name not in matrices]
    parts = dict.fromkeys(KINDS.values(), 0.0) | {"beside": OTHER_BYTES}
    parts["vectors"] = sum(p.numel() * np.dtype(float_type(name)).itemsize for name, p in others)
    counts = {}
    for name, weight, limits, rows, columns in grids(model, settings, matrices, k):
        p = model.get_parameter(name)
        scale = rows * columns
        if solvers and name in solvers:
            weight = spread_by_gptq(weight, scale, solvers[name][1], settings.trellis_states > 0)
        if settings.trellis_states:  # half of all integers stand for half a step more
            weight = weight - scale * (torch.arange(weight.shape[1], device=scale.device) % 2) / 2
        integers = round_to_grid(weight, scale, limits)
        places = code_places(measure_reaches(settings, integers), integers)
        counts[name] = count_values(places) * (p.numel() / weight.numel())
        fine = float((coarse_steps(rows) != rows).double().mean())  # part of steps: not coarse
        steps = (0.6 + fine) * len(p)
        if (columns != 1).any():
            steps += 1.6 * p.shape[1]
        parts[layer_kind(name)] += steps + 0.35 * settings.shared_tables * sum(p.shape)
    for names in codes_of(settings, matrices):
        bits = code_bits(sum(counts[name] for name in names))
        for name in names:
            coded = float((bits * counts[name]).sum()) / 8
            parts[layer_kind(name)] += 1.001 * coded + 4 * ANS_LANES / len(names)
    return parts


def spread_by_gptq(weight: Tensor, scale: Tensor, upper: Tensor, by_trellis: bool) -> Tensor:
    """The weight, with rows scaled to the size that they have when GPTQ rounds their columns.

    By then the columns i before have added to column j their mean square errors, step² / 12, times
    (U[i, j] / U[i, i])²; on a trellis, whose half steps spread integers already, a third of that.
    """
    taken = (upper / upper.diagonal().unsqueeze(1)).triu(1).square().sum(0).mean()
    errors = taken * scale.square().mean(1, keepdim=True) / (36 if by_trellis else 12)
    return weight * (1 + errors / weight.square().mean(1, keepdim=True).clamp(min=1e-20)).sqrt()


def fit_sdclip(model, settings, target_bytes: float, solvers=None) -> float:
    """SDCLIP_K or, if 0, the least k that should fit, or SDCLIP_MOST; UserError if diverged."""
    finite = all(p.is_meta or p.isfinite().all() for p in model.parameters())
    need(finite, f"weights are no longer finite: {DIVERGED}")
    if settings.sdclip_k:
        return settings.sdclip_k
    most, least = (int(SDCLIP_PARTS * k) for k in (settings.sdclip_most, SDCLIP_LEAST))
    falling = [k / SDCLIP_PARTS for k in range(most, least - 1, -1)]
    size = partial(predict_bytes, model, settings, solvers=solvers)  # rises as k falls
    return falling[max(1, bisect.bisect_right(falling, target_bytes, key=size)) - 1]


@contextmanager
def fake_quantization(model, matrices: dict[str, Tensor], k: float):
    """Quantization-aware training: while entered, matrices (grid_limits()) are on their grids.

    After that the weights are what they were before; the gradients computed at rounded weights are
    applied to them: the straight-through estimator (arXiv 1308.3432).
    """
    weights = [model.get_parameter(name).detach() for name in matrices]
    kept = [weight.clone() for weight in weights]
    for _, weight, limits, rows, columns in grids(model, model.settings, matrices, k):
        scale = rows * columns
        weight.copy_(round_to_grid(weight, scale, limits) * scale)
    try:
        yield
    finally:
        torch._foreach_copy_(weights, kept)


def calibration_sequences(model, settings, ranks, batches, track=iter) -> Tensor:
    """This rank's part (n, T), int64, of the CALIBRATION_TOKENS tokens that collect_costs() reads.

    CALIBRATION=train: the next ones of batches. self: texts that the model writes after BOS.
    track: Log.track() to show progress, or iter.
    """
    s = settings
    length = s.train_seq_len if s.calibration == "train" else min(s.gptq_gen_len, s.train_seq_len)
    count = max(1, s.calibration_tokens // (length * ranks.world_size))
    if s.calibration == "train":
        steps = range(0, s.calibration_tokens, s.train_batch_tokens)
        return torch.cat([batches.next()[0] for _ in steps])[:count]
    generator = torch.Generator(ranks.device)
    generator.manual_seed(s.seed * ranks.world_size + ranks.rank)  # other texts on each rank
    prompts = torch.full((count, 1), BOS_ID, device=ranks.device)
    texts = []
    for prompt in track(prompts.split(TEXTS_AT_ONCE)):
        text = generate(model, prompt, length - 1, s.gptq_gen_temp, generator=generator)
        texts.append(torch.cat([prompt, text], dim=1))
    return torch.cat(texts)


def collect_costs(model, batches, ranks, with_energies: bool = False) -> tuple[dict, dict]:
    """What errors cost: every matrix's Hessian, and the energies of linear layers' outputs.

    H = 2 sum x x^T over every input x, float32 (columns, columns): if weights are off by D, the
    squares of the outputs' errors, over all inputs, sum to sum(D H * D) / 2. Energies, if wanted:
    the mean of g^2, float32 (rows,), where g is the gradient of the text's nats by an output: an
    output that is off by d costs about (g d)^2 / 2. Both are returned by weights' names, of all
    ranks' batches (n, T) int64. Gradients of parameters, which may be in a CUDA graph's memory,
    are not touched.
    """
    hessians: dict[str, Tensor] = {}
    energies: dict[str, Tensor] = {}
    outputs: list[tuple[str, Tensor]] = []
    counts = collections.Counter()  # of outputs, on all ranks together

    @torch.no_grad()
    def add(name: str, x: Tensor):
        x = x.float().flatten(0, -2)
        hessians[name] = hessians.get(name, 0.0) + 2 * (x.T @ x)

    def hook(name: str, layer: Linear, positional: tuple, named: dict, output: Tensor):
        add(name, layer.effective_input(*positional, **named))
        if with_energies:
            outputs.append((name, output))

    with ExitStack() as undo, torch.set_grad_enabled(with_energies):
        for module in model.modules():
            if isinstance(module, MLP):  # fused to one operator, its matrices have no outputs
                undo.callback(setattr, module, "can_fuse", module.can_fuse)
                module.can_fuse = False
        for name, layer in model.linear_layers().items():
            undo.callback(layer.register_forward_hook(partial(hook, name), with_kwargs=True).remove)
        for batch in batches:
            hidden = model(batch, model.full_order)
            add(model.output_name, hidden)
            if with_energies:
                nats = model.nats(hidden[:, :-1], batch[:, 1:], batch[:, :-1]).sum()
                gradients = torch.autograd.grad(nats, [output for _, output in outputs])
                for (name, _), gradient in zip(outputs, gradients, strict=True):
                    squares = gradient.float().flatten(0, -2).square()
                    energies[name] = energies.get(name, 0.0) + squares.sum(0)
                    counts[name] += len(squares) * ranks.world_size
            outputs.clear()
    energies = {name: ranks.sum_(energies[name]) / counts[name] for name in sorted(energies)}
    return {name: ranks.sum_(hessians[name]) for name in sorted(hessians)}, energies


@torch.no_grad()
def find_row_costs(solvers: dict, energies: dict) -> dict[str, Tensor]:
    """c_i of each row i in energies, float32 (rows, 1): what errors of its weights cost the text.

    If a weight of column j is off by d when it is rounded, GPTQ's corrections leave errors of the
    outputs whose squares sum to (d / U[j, j])² / 2, which costs in proportion to energy_i
    (d / U[j, j])². The mean over columns is c_i d², with

        c_i = energy_i · (mean over j of 1 / U[j, j]²),

    energies by collect_costs(), U in solvers. No row counts for less than LEAST_ENERGY.
    """
    costs = {}
    for name, energy in energies.items():
        _, upper, _ = solvers[name]
        cost = energy * upper.diagonal().square().reciprocal().mean()
        costs[name] = cost.clamp(min=LEAST_ENERGY * cost.mean() + 1e-12).unsqueeze(1)
    return costs


@torch.no_grad()
def find_grid_factors(model, settings) -> dict[str, Tensor]:
    """What row steps are multiplied by so that bits go where errors cost most: float32 (rows, 1).

    Rounding row i of a matrix with steps s_i costs about c_i s_i² a weight, c_i of row_costs, and
    takes -log2 s_i bits a weight, plus a constant. At a given sum of bits, costs are least if all
    c_i s_i² are equal: factors f_i of the usual steps with f_i ~ c_i^(-1/2) / s_i. log f_i is
    split in two: of what differs among a matrix's rows, the part SDCLIP_BY_ROW is taken; of what
    they have in common, by the mean of c_i (f_i s_i)², the part SDCLIP_BY_MATRIX. The mean of
    log f_i over all weights of these matrices is 0.
    """
    limits = grid_limits(model)
    logs = {}
    total = numbers = 0
    for name, cost in model.row_costs.items():
        weight = model.get_parameter(name)
        steps, _ = grid_steps(weight, limits[name], settings, SDCLIP_USUAL)
        ratio = -cost.log() / 2 - steps.log()
        log = settings.sdclip_by_row * (ratio - ratio.mean())
        common = -(cost * (log.exp() * steps).square()).mean().log() / 2
        logs[name] = log + settings.sdclip_by_matrix * common
        total += logs[name].mean() * weight.numel()
        numbers += weight.numel()
    return {name: (log - total / numbers).exp() for name, log in logs.items()}


def factor_hessian(hessian: Tensor, damp: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """What gptq() has to know of a matrix's inputs, from their Hessian H (columns, columns).

    Returns: the order in which columns are rounded, (1, columns) int64, largest inputs first; in
    that order, U (columns, columns), upper triangular with U^T U = (H + damping I)^-1; whether a
    column's input was always 0, (1, columns) bool. Damping is damp times H's mean diagonal, or ten
    times as much until the sum is positive definite. Raises UserError if H is not finite.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp(min=1e-9)
    damping = damp * mean
    need(damping.isfinite(), DIVERGED)
    order = diagonal.argsort(descending=True)
    identity = torch.eye(len(hessian), device=hessian.device)
    for _ in range(DAMPING_ATTEMPTS):
        damped = hessian[order][:, order] + damping * identity
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            # Flipped back, lower is an upper R with H = R R^T; so H^-1 is R^-T R^-1, and U R^-1.
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return order[None], upper, diagonal[None] == 0
        damping = torch.maximum(10 * damping, LEAST_DAMPING * mean)
    raise UserError(DIVERGED)


def factor_hessians(hessians: dict[str, Tensor], damp: float, ranks) -> dict[str, tuple]:
    """factor_hessian() of each, by name, on all ranks; each rank makes a part.

    Empties `hessians`, to free their memory. Raises UserError if one is not finite.
    """
    finite = all(hessian.isfinite().all() for hessian in hessians.values())
    need(finite, DIVERGED)  # on all ranks at once, so that none waits for another's factors
    solvers = {}
    for number, name in enumerate(sorted(hessians, key=lambda x: (len(hessians[x]), x))):
        hessian = hessians.pop(name)
        if number % ranks.world_size == ranks.rank:
            solvers[name] = factor_hessian(hessian, damp)
        else:
            order = hessian.new_zeros(1, len(hessian), dtype=torch.int64)
            solvers[name] = order, torch.zeros_like(hessian), order > 0
    for tensor in itertools.chain(*solvers.values()):
        ranks.sum_(tensor)  # zeros except on the rank that factored it
    return solvers


@torch.no_grad()
def gptq(
    weight, scale, limits, order, upper, unused, weights=1.0, block_size=128, trellis_states=0
) -> Tensor:
    """Integers Q with (Q · scale) x close to W x for the inputs x that made H (arXiv 2210.17323).

    weight W and scale are (..., rows, columns), limits (..., rows, 1), and Q, all float32; order,
    upper U and unused are factor_hessian()'s. Column by column, in that order,

        q = round(w_j / s_j),    e = (w_j - q s_j) / U[j, j],    W[:, j+1:] -= e U[j, j+1:],

    changes the columns to come so that they undo, as well as they can, what rounding column j did
    to the outputs. Columns after a block get its errors all at once. With trellis_states it is
    round_by_trellis() that rounds, and a row's errors count times weights (..., rows, 1): the
    square roots of find_row_costs(), so that its paths cost least. Without them, rows with large
    steps would count most, although their steps are large because little depends on them.
    """
    weight = weight.masked_fill(unused, 0.0).take_along_dim(order, -1)
    scale = scale.take_along_dim(order, -1)
    trellis = partial(round_by_trellis, states=trellis_states, weights=weights)
    rounding = trellis if trellis_states else round_to_grid
    errors = torch.zeros_like(weight)
    columns = weight.shape[-1]
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        for j in range(first, last):
            # Left of j are integers; from j to last, weights that make up for all errors so far.
            step, column = scale[..., j, None], weight[..., j, None]
            rounded = rounding(column, step, limits)
            error = (column - rounded * step) / upper[..., j, j, None, None]
            weight[..., j:last] -= error * upper[..., j, None, j:last]
            weight[..., j, None] = rounded
            errors[..., j, None] = error
        weight[..., last:] -= errors[..., first:last] @ upper[..., first:last, last:]
    return weight.take_along_dim(order.argsort(), -1)


@torch.no_grad()
def quantize_model(model, settings, ranks, solvers: dict, k: float, track=iter) -> dict:
    """What the artifact stores of the model, in the order of its parameters; alike on all ranks.

    First, by each parameter's name, a vector in its float_type() or a matrix's grid steps
    (rows + columns,), float16; then as "NAME integers" each matrix, int8 (rows, columns). solvers:
    factor_hessian()'s by name; a matrix without one gets the nearest integers (or trellis points).
    All matrices of a shape are rounded by one rank, at once.
    """
    parameters = model.named_parameters()
    stored = {name: p.detach().to(getattr(torch, float_type(name))) for name, p in parameters}
    matrices = grid_limits(model)
    problems = collections.defaultdict(dict)  # gptq()'s arguments by shape and name
    for name, weight, limits, rows, columns in grids(model, settings, matrices, k):
        stored[name] = torch.cat([rows.squeeze(1), columns]).half()
        stored[f"{name} integers"] = torch.zeros_like(weight, dtype=torch.int8)
        solver = solvers.get(name) or factor_hessian(torch.eye(weight.shape[1]).to(weight))
        costs = model.row_costs.get(name, torch.ones_like(rows))
        weights = (costs / costs.mean()).sqrt()
        problems[weight.shape][name] = weight, rows * columns, limits, *solver, weights
    for group in track([*problems.values()][ranks.rank :: ranks.world_size]):
        stacked = [torch.stack(tensors) for tensors in zip(*group.values(), strict=True)]
        options = settings.gptq_block_size, settings.trellis_states
        rounded = gptq(*stacked, *options).floor()  # of a trellis's k + 1/2, the k
        for name, integers in zip(group, rounded, strict=True):
            stored[f"{name} integers"].copy_(integers)
    for name in matrices:
        ranks.sum_(stored[f"{name} integers"])  # zeros except on the rank that rounded it
    return stored


# ==================================================================================================
# 9. Artifact
#
# The file; numbers are little-endian, and nothing in it is unpickled or run:
#
#     SSMGOLF4{"bigram_dim":128, ... ,"vocab_size":8192}\n    magic; artifact_header() as JSON
#     LZMA stream of the record                               vectors, grid steps, frequencies
#     uint16 ...                                              the integers of all matrices, coded
#     32 bytes                                                SHA-256 of all before
#
# The record, once decompressed, has an entry for each parameter in the order of
# Model.named_parameters(), then what the decoder has to know, without gaps: name, type, numbers.
#
#     bigram_scale                           float16   1                a vector, in that type
#     ...
#     embedding.weight                       float16   vocab + width    a matrix's grid steps of
#     ...                                                               rows, then of columns
#     blocks.0.mixer.dt_bias                 float32   heads            D's too: see float_type()
#     ...
#     blocks.0.mixer.in_proj.weight          float16   rows + columns   columns': 1 but with dsq
#     ...
#     embedding.weight reaches               uint8     vocab + width    measure_reaches(), if
#     ...                                                               SHARED_TABLES
#     frequencies                            uint32    1, TABLES, 256   of the values in a table,
#                                                                       summing to 65,536
#
# Without SHARED_TABLES each matrix has a code and a table of its own: matrices, 1, 256 frequencies.
#
# in_proj's row steps are in the order of MambaSizes.columns(). Those of its int8 rows, step sizes
# first, are the last dynamics_rows. exact_steps() has made every step a float16 number, those of
# int8 rows too: their 8 bits buy reach (little clipping) and, at a large k, a finer grid.

ARTIFACT_MAGIC = b"SSMGOLF4"  # changes with the layout above
MOST_NUMBERS = 1 << 26  # of a model that is loaded: 256 MB in float32
DIGEST_BYTES = 32

# The entropy coder: asymmetric numeral systems (arXiv 1311.2540), within 0.2 % of the entropy; LZMA
# takes 3 to 8 % more. The state is one whole number, used as a stack. Pushing a value that occurs f
# times in 65,536 makes the state about 65,536 / f times as large: log2(65,536 / f) bits. It can
# be popped again because the 65,536 remainders are shared out as slots, f to each value. Values
# are pushed from the last to the first, so that they are popped in order.
ANS_LANES = 256  # states, which take turns: number n of a code is on state n % 256
ANS_BITS = 16  # frequencies sum to 2^16; states have 17 to 32 bits between two values

# A value's frequency is counted among integers that reach as far, in whichever matrix: as steps
# follow errors' costs, rows of one matrix are octaves apart, and one table for all costs more bits.
TABLES = 64  # of frequencies, a quarter of an octave apart
REACH = 16  # the table of integers whose root mean square is 1


def ans_push(state, frequency, start, bits: int = ANS_BITS):
    """The state after pushing a value that has the slots start to start + frequency - 1 of 2^bits.

    Numbers or arrays. With four slots, 0 to 2 for the letter A and 3 for B, and 4 as the empty
    state, the text "ABA" is pushed from its end; A takes 0.4 bits, B two:

    >>> ans_push(4, frequency=3, start=0, bits=2)  # A: 4 // 3 = 1 times four, slot 0 + 4 % 3 = 1
    5
    >>> ans_push(5, frequency=1, start=3, bits=2)  # B: 5 times four, slot 3
    23
    >>> ans_push(23, frequency=3, start=0, bits=2)  # A: 7 times four, slot 2
    30
    """
    return ((state // frequency) << bits) + start + state % frequency


def ans_pop(state, frequency, start, bits: int = ANS_BITS):
    """The state before its top value was pushed; the slot, state % 2^bits, tells which value it is.

    >>> ans_pop(30, frequency=3, start=0, bits=2)  # 30 % 4 is slot 2: A
    23
    >>> 23 % 4, ans_pop(23, frequency=1, start=3, bits=2)  # slot 3: B
    (3, 5)
    >>> 5 % 4, ans_pop(5, frequency=3, start=0, bits=2)  # slot 1: A, and the state is empty again
    (1, 4)
    """
    slot = state & ((1 << bits) - 1)
    return frequency * (state >> bits) + slot - start


def measure_reaches(settings, integers: Tensor) -> Tensor:
    """How far a matrix's integers reach: uint8 (rows + columns,), in quarters of an octave.

    REACH stands for a root mean square of 1: of a row, and of a column of rows divided by theirs.
    On a trellis an integer stands for 1/4 more in the mean. Without SHARED_TABLES: 0, not stored.
    """
    if not settings.shared_tables:
        return integers.new_zeros(sum(integers.shape), dtype=torch.uint8)
    more = 0.25 if settings.trellis_states else 0.0
    squares = (integers.float() + more).square()
    rows = squares.mean(1).clamp(min=2**-8)
    columns = (squares / rows.unsqueeze(1)).mean(0).clamp(min=2**-8)
    octaves = torch.cat([rows, columns]).log2() / 2
    return (4 * octaves + REACH).round().byte()


def choose_tables(reaches: Tensor, rows: int, columns: int) -> Tensor:
    """The number of the table that codes each integer, int32 (rows, columns)."""
    row, column = reaches.int().split([rows, columns])
    return (row.unsqueeze(1) + column - REACH).clamp(0, TABLES - 1)


def code_places(reaches: Tensor, integers: Tensor) -> Tensor:
    """For each integer 256 times the number of its table, plus its byte: int32 (rows, columns)."""
    return 256 * choose_tables(reaches, *integers.shape) + (integers.int() & 255)


def count_values(places: Tensor) -> Tensor:
    """How often each value occurs in each table, float64 (TABLES, 256), from code_places()."""
    return torch.bincount(places.flatten(), minlength=256 * TABLES).view(TABLES, 256).double()


def code_bits(counts: Tensor) -> Tensor:
    """log2(n / f) bits for a value that occurs f times among its table's n; the shape of counts."""
    counts = counts.clamp(min=1e-9)  # for values that never occur, any number will do
    return (counts.sum(1, keepdim=True) / counts).log2()


def codes_of(settings, names) -> list[list[str]]:
    """Groups of matrices that share a code: one group of all, or each matrix by itself."""
    return [list(names)] if settings.shared_tables else [[name] for name in names]


def count_tables(settings) -> int:
    """How many tables of frequencies a code has."""
    return TABLES if settings.shared_tables else 1


def encode_integers(places: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Encodes code_places() (n,) of `count` tables: frequencies, uint32 (count, 256), and uint16s.

    A state that a value would take beyond 32 bits first gives its lower 16 to the code; at the end
    all states follow. Then the code is reversed, as decoding begins with what came last.
    """
    counts = np.bincount(places, minlength=256 * count).reshape(count, 256)
    # Each value's part of 65,536 slots, one at least; the most frequent gets, or gives, the rest.
    slots = 1 << ANS_BITS
    totals = counts.sum(1, keepdims=True).clip(1)
    frequencies = np.maximum(counts * slots // totals, counts > 0)
    usual = counts.argmax(1)
    frequencies[np.arange(count), usual] += slots - frequencies.sum(1)
    starts = frequencies.cumsum(1) - frequencies
    table = places[-1] // 256
    padding = np.full(-len(places) % ANS_LANES, 256 * table + usual[table])
    places = np.append(places, padding)
    state = np.full(ANS_LANES, 1 << ANS_BITS)  # empty
    words = []
    for place in places.reshape(-1, ANS_LANES)[::-1]:
        frequency = frequencies.take(place)  # counted through all tables
        full = state >= (frequency << 16)
        words.append(state[full] & 0xFFFF)
        state = np.where(full, state >> 16, state)
        state = ans_push(state, frequency, starts.take(place))
    words += [state >> 16, state & 0xFFFF]
    return frequencies.astype(np.uint32), np.concatenate(words[::-1]).astype(np.uint16)


def decode_integers(frequencies: np.ndarray, words: np.ndarray, tables: np.ndarray) -> tuple:
    """Undoes encode_integers(), with tables (n,): int8 (n,), and the words left; or ValueError."""
    slots = 1 << ANS_BITS
    frequencies = frequencies.astype(np.int64)
    if (frequencies.sum(1) != slots).any() or len(words) < 2 * ANS_LANES:
        raise ValueError("no code")
    starts = frequencies.cumsum(1) - frequencies
    symbol_of_slot = np.arange(frequencies.size).astype(np.uint8).repeat(frequencies.ravel())
    low, high = words[: 2 * ANS_LANES].reshape(2, -1).astype(np.int64)
    words = words[2 * ANS_LANES :]
    state = low + (high << 16)
    filled = np.append(tables, tables[-1:].repeat(-len(tables) % ANS_LANES))
    for row in filled.reshape(-1, ANS_LANES):  # of tables; values replace them
        symbol = symbol_of_slot[slots * row + state % slots]
        place = 256 * row + symbol
        row[:] = symbol
        state = ans_pop(state, frequencies.take(place), starts.take(place))
        (short,) = np.nonzero(state < 1 << 16)
        if len(short) > len(words):
            raise ValueError("too few words")
        state[short] = (state[short] << 16) + words[: len(short)]
        words = words[len(short) :]
    if (state != 1 << ANS_BITS).any():
        raise ValueError("states that are not empty")
    return filled[: len(tables)].astype(np.int8), words


def artifact_header(settings, tokenizer_sha256: str = "") -> dict:
    """An artifact's header: MODEL_FIELDS, the tokenizer's hash, training's preset and window."""
    header = {n: getattr(settings, n) for n in (*MODEL_FIELDS, "preset", "train_seq_len")}
    return header | {"tokenizer_sha256": tokenizer_sha256}


def pack_artifact(settings, stored: dict[str, Tensor], tokenizer_sha256: str = "") -> bytes:
    """The artifact's bytes, laid out as above, from the tensors that quantize_model() returned."""
    integers = {name: x.cpu() for name, x in stored.items() if x.dtype == torch.int8}
    record = [x.cpu().numpy() for name, x in stored.items() if name not in integers]
    reaches = {name: measure_reaches(settings, x) for name, x in integers.items()}
    if settings.shared_tables:
        record += [x.numpy() for x in reaches.values()]
    codes = []
    for names in codes_of(settings, integers):
        places = [code_places(reaches[name], integers[name]).flatten() for name in names]
        places = torch.cat(places).numpy()
        frequencies, words = encode_integers(places, count_tables(settings))
        record.append(frequencies)
        codes.append(words)
    record = b"".join(array.tobytes() for array in record)
    header = artifact_header(settings, tokenizer_sha256)
    return b"".join(seal(ARTIFACT_MAGIC, header, lzma.compress(record), *codes))


def bytes_by_kind(model, stored: dict[str, Tensor], size: int) -> dict[str, int]:
    """How many of an artifact's `size` bytes code the integers of each kind of layer's rows.

    By code_bits(), separately for int6 and int8 rows; "rest" is all else in the file.
    """
    found = collections.Counter()
    matrices = grid_limits(model)
    for names in codes_of(model.settings, matrices):
        places = {}
        for name in names:
            integers = stored[f"{name} integers"]
            places[name] = code_places(measure_reaches(model.settings, integers), integers)
        bits = code_bits(sum(map(count_values, places.values()))).flatten()
        for name in names:
            limits = matrices[name]
            for limit in limits.unique().int().tolist():
                total = bits[places[name][limits.squeeze(1) == limit]].sum()
                found[f"{layer_kind(name)}, int{limit.bit_length() + 1}"] += float(total) / 8
    sizes = {kind: round(taken) for kind, taken in found.items()}
    return sizes | {"rest": size - sum(sizes.values())}


def seal(magic: bytes, header: dict, *payload) -> list:
    """Parts of an artifact or a checkpoint: magic, header as a line of JSON, payload, SHA-256."""
    line = json.dumps(header, separators=(",", ":")).encode()
    parts = [magic + line + b"\n", *payload]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return [*parts, digest.digest()]


# What headers mean that lack a setting, because they were written before there was one. A new
# setting in a header (artifact_header(), Trainer.header()) needs an entry here, for good.
FORMER_DEFAULTS = {"tokenizer_sha256": "", "training_data": "", "document_scope": "scans"}
FORMER_DEFAULTS |= {"xsa_last_n": 0, "rope_base": 1e4, "ln_scale": False, "calibration": "train"}
FORMER_DEFAULTS |= {"tie_embeddings": True, "tied_embed_init_std": 0.005, "embed_wd": -1.0}
FORMER_DEFAULTS |= {"embed_lr": 0.008, "head_lr": 0.008, "min_lr": 0.0, "warmdown_shape": "linear"}
FORMER_DEFAULTS |= {"muon_momentum_warmup_start": 0.0, "muon_momentum_warmup_steps": 0}
FORMER_DEFAULTS |= {"beta1": 0.9, "beta2": 0.95, "adam_eps": 1e-8, "adam_wd": 0.0}
FORMER_DEFAULTS |= {"grad_clip_norm": 1.0, "average": "ema", "average_horizon": 0.1}
FORMER_DEFAULTS |= {"swa_start_frac": 0.2, "swa_every": 50, "sdclip_most": 16.0, "starts": 1}
FORMER_DEFAULTS |= {"gptq_block_size": 128, "gptq_damp": 0.01, "gptq_gen_len": 512}
FORMER_DEFAULTS |= {"gptq_gen_temp": 1.0}
FORMER_DEFAULTS |= {"spelling_features": 0, "mask_impossible_pairs": False, "muon_beta2": 0.0}
FORMER_DEFAULTS |= {"muon_row_groups": False, "float8_products": "none"}
FORMER_DEFAULTS |= {"trellis_states": 0, "sdclip_by_matrix": 0.0, "sdclip_by_row": 0.0}
FORMER_DEFAULTS |= {"shared_tables": False, "preset": "", "train_seq_len": 0}  # "", 0: not known


def read_header(line: bytes | str, usual: dict) -> dict:
    """The header in a line of JSON; FORMER_DEFAULTS stand in for settings that an older one lacks.

    Raises UserError unless it then has the names of `usual`, with values of the same types.
    """
    header = {}
    with suppress(ValueError, RecursionError):
        found = json.loads(line)
        header = found if isinstance(found, dict) else {}
    # A setting that no longer exists is left out if its value is what holds without it.
    header = {n: value for n, value in header.items() if what_holds(n, value)}
    unknown = sorted(header.keys() - usual)
    if unknown:
        names = f"{ascii(unknown[:3])[:99]} ({what_holds(unknown[0], None)})"
        raise OtherVersionError(f"its header has settings that this script lacks: {names}")
    header = {name: FORMER_DEFAULTS[name] for name in usual if name in FORMER_DEFAULTS} | header
    lacking = sorted(usual.keys() - header)
    need(not lacking, f"its header lacks settings of this script: {', '.join(lacking[:3])}")
    for name, value in header.items():
        same_type = type(value) is type(usual[name])
        need(same_type and str(value).isprintable(), f"{name} in its header has the wrong type")
    return header


WHERE_TO_FIND = {
    "artifact": "set ARTIFACT to a file, or RUN_ID and LOG_DIR to those of the run that wrote it",
    "checkpoint": "set RESUME to the file of one, or to auto or never",
}


def read_sealed(path: Path, what: str, magic: bytes, most: int, usual: dict) -> tuple[dict, bytes]:
    """read_header() and payload of a file by seal(), of `most` bytes at most; else UserError."""
    need(os.path.isfile(path), f"no {what} at {path}: {WHERE_TO_FIND[what]}")
    with explained_errors(f"read {path}"):
        data = path.read_bytes() if path.stat().st_size <= most else b""
    try:
        need(data, "it is empty, or far too large")
        need(data.startswith(magic), "wrong magic number")
        digest = hashlib.sha256(memoryview(data)[:-DIGEST_BYTES]).digest()
        need(digest == data[-DIGEST_BYTES:], "its checksum does not match")
        line, _, payload = data[len(magic) : -DIGEST_BYTES].partition(b"\n")
        return read_header(line, usual), payload
    except UserError as error:
        raise type(error)(f"{path} is not a usable {what}: {error}") from None


def read_artifact(path: Path) -> tuple[dict, bytes]:
    """Header and payload of an artifact; raises UserError for other files."""
    usual = artifact_header(Settings())
    return read_sealed(path, "artifact", ARTIFACT_MAGIC, 4 * ARTIFACT_CAP, usual)


def adopt_artifact(header: dict, settings, given: set[str], world_size: int) -> Settings:
    """The settings with the model's from an artifact's header; UserError if given ones differ.

    So too if the file TOKENIZER_PATH exists and is not the tokenizer that the header names.
    """
    for name in MODEL_FIELDS:
        ours, theirs = getattr(settings, name), header[name]
        problem = f"contradicts the artifact, which has {shown(theirs)}: unset it"
        need(ours == theirs or name not in given, f"{name.upper()}={shown(ours)} {problem}")
    settings = replace(settings, **{name: header[name] for name in MODEL_FIELDS})
    validate_settings(settings, world_size)
    wanted, found = header["tokenizer_sha256"], file_sha256(settings.tokenizer_path)
    hashes = f"the artifact's has SHA-256 {wanted[:64]}, this one {found}"
    same = wanted in ("", found) or not found
    need(same, f"TOKENIZER_PATH={settings.tokenizer_path} is another tokenizer: {hashes}")
    return settings


def file_sha256(path: str | Path) -> str:
    """The hexadecimal SHA-256 of a file; "" if there is none, or it cannot be read."""
    with suppress(OSError):
        if os.path.isfile(path):
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return ""


def model_skeleton(settings) -> Model:
    """The model without memory for its numbers; UserError if they are more than MOST_NUMBERS."""
    with torch.device("meta") as meta:
        model = Model(settings, meta)
    numbers = sum(p.numel() for p in model.parameters())
    most = f"an artifact has at most {MOST_NUMBERS:,}: make it smaller"
    need(numbers <= MOST_NUMBERS, f"the model has {numbers:,} numbers, but {most}")
    return model


def check_size(skeleton: Model, target_bytes: float, memory: float):
    """Raises UserError if the model cannot fit target_bytes, or its Hessians `memory` bytes."""
    s = skeleton.settings
    numbers = sum(p.numel() for p in skeleton.parameters())
    # On the coarsest grid, with steps of k / 31 root mean squares, a Gaussian weight takes
    # log2(sqrt(2 pi e) 31 / k) bits; trained weights, which are not Gaussian, a quarter less.
    k = max(s.sdclip_most, s.sdclip_k)
    least = 0.75 * math.log2(math.sqrt(2 * math.pi * math.e) * INT6_MAX / k)
    if s.quantizer == "ternary":
        least = 1.0
    has = 8 * target_bytes / numbers
    problem = f"{numbers:,} numbers take {least:.1f} bits each on the coarsest grid (SDCLIP_MOST)"
    need(has > least, f"{problem}, TARGET_MB has {has:.1f}: make the model smaller")
    wanted = sum(4 * skeleton.get_parameter(name).shape[1] ** 2 for name in grid_limits(skeleton))
    problem = f"GPTQ takes {wanted / 1e9:.0f} GB for Hessians, and there are {memory / 1e9:.0f}"
    fits = wanted < memory or not s.calibrates
    zeros = "".join(f" {name.upper()}=0" for name in excluded(replace(s, quantizer="round")))
    remedy = f"lower MODEL_DIM, MLP_MULT or MAMBA_EXPAND, or take QUANTIZER=round{zeros}"
    need(fits, f"{problem}: {remedy}")


def record_layout(skeleton: Model) -> np.dtype:
    """The layout of a model's record, as drawn above: its entries' names, types and shapes."""
    matrices = grid_limits(skeleton)
    entries = []
    for name, p in skeleton.named_parameters():
        numbers = sum(p.shape) if name in matrices else tuple(p.shape)
        entries.append((name, float_type(name), numbers))
    settings = skeleton.settings
    if settings.shared_tables:
        entries += [(f"{n} reaches", "u1", sum(skeleton.get_parameter(n).shape)) for n in matrices]
    shape = len(codes_of(settings, matrices)), count_tables(settings), 256
    return np.dtype([*entries, ("frequencies", "<u4", shape)])


def read_record(payload: bytes, skeleton: Model) -> tuple[np.void, np.ndarray]:
    """The record in a payload, of record_layout(), and the code after it, uint16 (words,).

    Raises ValueError or lzma.LZMAError for any other, and never unpacks more than a record's bytes.
    """
    layout = record_layout(skeleton)
    unpacker = lzma.LZMADecompressor()
    (record,) = np.frombuffer(unpacker.decompress(payload, layout.itemsize + 1), layout)
    return record, np.frombuffer(unpacker.unused_data, "<u2")


def unpack_integers(record: np.void, words: np.ndarray, skeleton: Model) -> dict[str, Tensor]:
    """Every matrix's integers, int8 (rows, columns), by name, from read_record(); or ValueError."""
    settings = skeleton.settings
    shared = settings.shared_tables
    tables = {}
    for name in grid_limits(skeleton):
        rows, columns = skeleton.get_parameter(name).shape
        reaches = torch.tensor(record[f"{name} reaches"]) if shared else torch.zeros(rows + columns)
        tables[name] = choose_tables(reaches, rows, columns)
    integers = {}
    for names, frequencies in zip(codes_of(settings, tables), record["frequencies"], strict=True):
        chosen = torch.cat([tables[name].flatten() for name in names])
        found, words = decode_integers(frequencies, words, chosen.numpy())
        for name in names:
            shape = tables[name].shape
            integers[name] = torch.tensor(found[: shape.numel()]).view(shape)
            found = found[shape.numel() :]
    if len(words):
        raise ValueError("words after the last matrix")
    return integers


def unpack_artifact(payload: bytes, skeleton: Model) -> dict[str, Tensor]:
    """The parameters by name, float32, from an artifact's payload; raises as read_record() does."""
    record, words = read_record(payload, skeleton)
    integers = unpack_integers(record, words, skeleton)
    states = skeleton.settings.trellis_states
    parameters = {}
    for name, p in skeleton.named_parameters():
        numbers = torch.tensor(record[name].astype(np.float32))
        if name in integers:
            row_steps, column_steps = numbers.split(p.shape)
            points = integers[name]
            if states:
                points = trellis_points(points, states)
            numbers = points * row_steps[:, None] * column_steps
        parameters[name] = numbers
    return parameters


def load_model(path: Path, settings, given: set[str], ranks) -> tuple[Model, Settings]:
    """An artifact's model, on the rank's device, and adopt_artifact()'s settings; or UserError."""
    header, payload = read_artifact(path)
    settings = adopt_artifact(header, settings, given, ranks.world_size)
    skeleton = model_skeleton(settings)  # no memory is taken until the shapes fit the file
    try:
        parameters = unpack_artifact(payload, skeleton)
    except (ValueError, lzma.LZMAError):
        problem = "is not a usable artifact: its data are not its header's model"
        raise UserError(f"{path} {problem}") from None
    for name, numbers in parameters.items():
        finite = numbers.isfinite().all()
        need(finite, f"{path} is not a usable artifact: {name} has numbers that are not finite")
    model = build_model(settings, ranks)
    model.load_state_dict(parameters)
    return model, settings


# ==================================================================================================
# 10. Training and main
# In the order of a run: its log, clock, checkpoints, training, export, and main(), which calls all.

MADE_FOLDERS = []  # by this process's make_folder(), the innermost first


def make_folder(folder: Path):
    """Makes a folder, and those in which it lies, unless they are there; may raise OSError.

    One by one, from the outermost: "new/../logs" does not exist before "new" is made.
    """
    for each in (*reversed(folder.parents), folder):
        if not each.is_dir():
            with suppress(FileExistsError):  # another process was faster, or it is a file
                each.mkdir()
                MADE_FOLDERS.insert(0, each)
    folder.mkdir(exist_ok=True)


@contextmanager
def removing_empty_folders():
    """At the end, removes the folders that make_folder() made and that are empty.

    A start makes folders to see that it may write there; if it is refused, nothing is left of it.
    """
    try:
        yield
    finally:
        while MADE_FOLDERS:
            with suppress(OSError):  # it holds something, or could not be made
                MADE_FOLDERS.pop(0).rmdir()


def write_whole(path: Path, *parts, before: Path | None = None):
    """Writes bytes-like parts to a file, whole or not at all; its old content moves to `before`."""
    temporary = path.with_name(path.name + ".part")
    with explained_errors(f"write {path}"):
        make_folder(path.parent)
        temporary.unlink(missing_ok=True)  # if it were a link, another file would be overwritten
        try:
            with temporary.open("wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            if before and path.exists():
                path.replace(before)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


# ---- Log -----------------------------------------------------------------------------------------

PROGRESS_SECONDS = 5.0  # after so long without a line, there is one on progress
BAR = "{bar:20} {desc}"
BAR_OPTIONS = {"leave": False, "mininterval": 0.2, "miniters": 0, "dynamic_ncols": True}


class Log:
    """What rank 0 tells of a run, on the console and in LOG_DIR/NAME.txt and NAME.jsonl.

    The .txt begins with this script, as the contest wants it; the .jsonl has an object per event.
    Other ranks write only why they failed.
    """

    def __init__(self):
        self.started = time.perf_counter()
        self.last_line = time.monotonic()
        self.score_at = 0.0  # about when there will be a score, by monotonic(); 0: not known
        self.bar = None
        self.settings = None  # the run's, once open() was called
        self.paths = []  # of text and of records
        self.files = []  # both, open, on rank 0
        self.said = []  # where both are written: to memory until begin(), then to the files
        self.begun = False
        self.told = set()  # the events of this start, on every rank

    def open(self, settings, ranks, name: str):
        """Claims the files of this name in LOG_DIR; UserError if a living run has them.

        Nothing is written to them before begin(): a refused start changes no earlier run's log.
        """
        self.settings = settings
        folder = Path(settings.log_dir)
        self.paths = [folder / f"{name}.{end}" for end in ("txt", "jsonl")]
        if ranks.rank == 0:
            if tqdm and sys.stdout.isatty():
                self.bar = tqdm(total=1.0, file=sys.stdout, bar_format=BAR, **BAR_OPTIONS)
            with explained_errors(f"write logs in LOG_DIR={folder}"):
                make_folder(folder)
                self.files.append(claim_file(self.paths[0], "RUN_ID"))
                self.files.append(self.paths[1].open("ab", 0))
            self.said = [io.BytesIO(), io.BytesIO()]
            self.said[0].write(Path(__file__).read_bytes() + b"\n" + b"=" * 100 + b"\n")

    def begin(self):
        """Writes what was said so far to the files; from now on all goes there at once."""
        if not self.begun:
            with explained_errors("write logs"):
                for file, said in zip(self.files, self.said, strict=True):
                    end_half_line(file)
                    append_whole(file, said.getbuffer())
            self.said = self.files
            self.begun = True

    def __call__(self, line: str, event: str = "", console: str = "", **values):
        """Rank 0 writes a line (on the console `console`, if given) and, for an event, a record."""
        if not self.files:
            self.told.add(event)
            return
        self.last_line = time.monotonic()
        text = console or line
        try:
            print(text, flush=True) if self.bar is None else self.bar.write(text, sys.stdout)
        except OSError:  # the console is only a copy: its reader or its terminal may be gone
            sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115
            self.bar = None
        with explained_errors("write logs"):
            append_whole(self.said[0], f"{line}\n".encode(errors="backslashreplace"))
        if event:
            self.record(event, **values)

    def record(self, event: str, **values):
        """Writes a JSON object with these values, and no line."""
        record = {"event": event, "seconds": round(time.perf_counter() - self.started, 3)} | values
        if self.files:
            with explained_errors("write logs"):
                append_whole(self.said[1], f"{json.dumps(record)}\n".encode())
        self.told.add(event)

    def failed(self, line: str, **values):
        """Writes, on any rank, why the run ended, unless it ended before begin()."""
        if self.bar is not None:
            self.bar.close()
        if self.begun:
            with suppress(OSError, UserError):  # the console has it
                self.files = self.said = self.files or [path.open("ab", 0) for path in self.paths]
                for file in self.files:
                    end_half_line(file)
                append_whole(self.said[0], f"{line}\n".encode(errors="backslashreplace"))
                self.record("error", **values)

    def progress(self, what: str, part: float, seconds: float, note: str = ""):
        """Shows that `part`, at most 1, of a phase took so many seconds; note: text to add.

        A terminal shows a bar; if nothing was written for PROGRESS_SECONDS, there is a line, too.
        """
        now = time.monotonic()
        quiet = now - self.last_line > PROGRESS_SECONDS
        if self.files and (quiet or self.bar is not None):
            line = f"{what}: {part:.0%}, {seconds:.0f} of {seconds / part:.0f}s{note}"
            if self.score_at:
                line += f", score in about {max(0.0, self.score_at - now):.0f}s"
            if self.bar is not None:
                self.bar.desc = line
                self.bar.update(part - self.bar.n)
            if quiet:
                self(f"  {line}")

    def track(self, what: str, items):
        """Yields the items of a list, and shows how many of them are done."""
        started = time.monotonic()
        for number, item in enumerate(items, 1):
            yield item
            self.progress(what, number / len(items), time.monotonic() - started)

    def close(self):
        """Takes the bar off the terminal and closes the files, which frees their name.

        Empty ones, of a start that was refused, are removed. The text, which is locked, comes last.
        """
        if self.bar is not None:
            self.bar.close()
        for path, file in reversed([*zip(self.paths, self.files, strict=False)]):
            with file, suppress(OSError):
                if path.is_file() and not path.stat().st_size:
                    path.unlink()


class ScoringProgress(EvaluationObserver):
    """Shows in a log how far an evaluation of so many targets has come."""

    def __init__(self, log, what: str, validation: ValidationSet, ranks, rows: str = "windows"):
        self.log = log
        self.what = what
        self.rows = rows  # what is read at once
        self.targets = len(validation.target_bytes)
        self.scored = 0
        self.world_size = ranks.world_size
        self.started = time.monotonic()

    def on_score(self, excerpt: Excerpt, scored: np.ndarray, nats: Tensor):
        """Shows about how many targets have a score: this rank's, times the number of ranks."""
        self.scored += int(scored.sum()) * self.world_size
        done = min(self.scored, self.targets)
        seconds = time.monotonic() - self.started
        note = f", {done / max(seconds, 1e-9):,.0f} tokens/s"
        self.log.progress(self.what, done / self.targets, seconds, note)

    def on_short_memory(self, rows: int):
        """Warns, as reading in more parts takes longer."""
        text = f"memory has room for {rows} {self.rows} at once, from now on"
        self.log(f"warning: {self.what}: {text}")


def claim_file(path: Path, setting: str):
    """A file opened to append, locked until closed; UserError, with setting, if a run has it."""
    file = path.open("ab", 0)
    try:
        if path.is_file():  # not a device, which many may write to
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        remedy = f"wait for it, or choose another {setting}"
        raise UserError(f"{path} belongs to a run that has not ended: {remedy}") from None
    except OSError:
        pass  # some network file systems have no locks: there it stays unclaimed
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    file.close()  # it was removed between open() and the lock: try again
    return claim_file(path, setting)


def append_whole(file, data: bytes | memoryview):
    """Appends all data: a write to a nearly full disk may take a part of them without an error."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def end_half_line(file):
    """Completes a last line that was cut off, by a full disk or a machine that went down.

    What follows then begins on a line of its own, and readers lose only the broken one.
    """
    if not os.path.isfile(file.name):  # a device may have no end
        return
    with suppress(OSError), open(file.name, "rb") as written:
        written.seek(-1, os.SEEK_END)  # OSError: it is empty
        if written.read() != b"\n":
            append_whole(file, b"\n")


def describe_machine(ranks) -> dict[str, str]:
    """Versions and hardware for the log, with all ranks' hosts and GPUs: every rank calls it."""
    cpu = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if ranks.gpu else cpu
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"cuda": torch.version.cuda, "triton": triton and triton.__version__}
    versions["hardware"] = f"{ranks.world_size} × {device}"
    versions["host"] = ", ".join(dict.fromkeys(ranks.gather(platform.node())))
    if ranks.gpu:
        gpu = torch.cuda.get_device_properties(ranks.device)
        versions["gpus"] = ", ".join(ranks.gather(f"{gpu.name} {gpu.uuid}"))
        driver = Path("/sys/module/nvidia/version")
        versions["driver"] = driver.read_text().strip() if driver.is_file() else "unknown"
    return versions


def log_settings(log, settings, given: set[str], ranks, source: str = ""):
    """Logs the settings given, `source` (a line on the others), the machine, and all settings."""
    values = asdict(settings)
    names = sorted(given & values.keys())
    asked = " ".join(f"{name.upper()}={shown(values[name])}" for name in names)
    _, translated = translate_names(dict(os.environ))
    for line in filter(None, (f"settings given: {asked or 'none'}", *translated, source)):
        log(line)
    machine = describe_machine(ranks)
    said = {key: " ".join(shown(str(value)).split()) for key, value in (machine | values).items()}
    text = "  ".join(f"{key}={value}" for key, value in said.items())
    # On the console, over a hundred settings would bury all else: the log has them.
    here = "  ".join(f"{key}={said[key]}" for key in machine)
    script = {"script_sha256": file_sha256(__file__)}
    log(text, "settings", here, machine=machine, settings=values, given=sorted(given), **script)


# ---- Earlier starts ------------------------------------------------------------------------------


def read_records(path: Path) -> list[dict]:
    """The records of a .jsonl log, without broken lines; UserError if its settings are unusable."""
    records = []
    with suppress(OSError):
        content = path.read_bytes() if path.is_file() else b""  # a device may have no end
        for line in content.splitlines():
            with suppress(ValueError, RecursionError):
                records.append(json.loads(line))
    records = [x for x in records if isinstance(x, dict) and isinstance(x.get("event"), str)]
    for record in records:
        whole = record["event"] != "settings" or isinstance(record.get("settings", {}), dict)
        need(whole, f"{path} is damaged, its settings are none: mend it, or move it away")
    return records


def last_records(path: Path) -> dict[str, dict]:
    """By event, its last record since the last start that trained began; {} if none did."""
    records = read_records(path)
    ready = max((i for i, r in enumerate(records) if r["event"] == "ready"), default=0)
    starts = [i for i, r in enumerate(records[:ready]) if r["event"] == "settings"]
    return {r["event"]: r for r in records[starts[-1] :]} if starts else {}


def find_unscored(settings) -> dict[str, dict]:
    """last_records() of RUN_ID if it has its artifact but no score yet; {} if it is to be trained.

    It is trained if the artifact or settings of training are others than its log's, if RESUME is
    given, and with OVERWRITE=1 (but not again where torchrun restarts it). Raises UserError if it
    is finished, unless OVERWRITE=1. Removes the checkpoints of a run finished or trained anew.
    """
    s = settings
    path = Path(s.log_dir, f"{s.run_id}.jsonl")
    events = last_records(path)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    anew = s.overwrite and "trained" in events and not restarted
    if "final" in events or anew:
        for leftover in s.checkpoint_paths if s.resume == "auto" else ():
            leftover.unlink(missing_ok=True)  # it was killed right after its score
    if "final" in events:
        remedy = "choose another, EVAL_ONLY=1 to score it again, or OVERWRITE=1 to train it anew"
        need(s.overwrite, f"RUN_ID={s.run_id} is finished, {path} has its score: {remedy}")
    elif "trained" in events and s.resume == "auto" and not anew:
        theirs = FORMER_DEFAULTS | events["settings"].get("settings", {})
        same = all(theirs.get(name) == getattr(s, name) for name in TRAINING_FIELDS)
        written = events["trained"].get("artifact_sha256")
        return events if same and written and file_sha256(s.artifact_path) == written else {}
    return {}


@contextmanager
def claimed_artifact(settings):
    """While entered, only this run may write ARTIFACT; UserError if a living run has claimed it.

    Without OVERWRITE=1, also if there is a file already that RUN_ID's log does not name.
    """
    path = settings.artifact_path
    lock = Path(f"{path}.lock")  # stays after a kill, unlocked
    with explained_errors(f"write {lock}"):
        make_folder(lock.parent)  # again, as a refused start may have removed it since
        claim = claim_file(lock, "ARTIFACT")
    with claim, ExitStack() as after:
        after.callback(lock.unlink, missing_ok=True)
        log = Path(settings.log_dir, f"{settings.run_id}.jsonl")
        written = [record.get("artifact_sha256") for record in read_records(log)]
        if path.exists() and path.stat().st_size and file_sha256(path) not in written:
            remedy = "move it, choose another ARTIFACT, or OVERWRITE=1 to write over it"
            need(settings.overwrite, f"{path} is there already, and not by {log}: {remedy}")
        yield


def find_settings(settings) -> tuple[Path | None, dict, str]:
    """The log of the run that wrote ARTIFACT, what it has of SCORED_WITH, and words on this source.

    The log is RUN_ID's or stands beside the file; None, {}, "" if neither names that. The words
    also tell which of its settings no longer exist.
    """
    found = file_sha256(settings.artifact_path)
    beside = str(settings.artifact_path).removesuffix(".int6.lzma")
    for path in (Path(settings.log_dir, f"{settings.run_id}.jsonl"), Path(f"{beside}.jsonl")):
        events = last_records(path)
        if not found or events.get("trained", {}).get("artifact_sha256") != found:
            continue
        same = events["settings"].get("script_sha256") == file_sha256(__file__)
        words = str(path) if same else f"{path}, of another train_gpt.py"
        theirs = {}
        for name, value in events["settings"].get("settings", {}).items():
            fact = "" if name in FIELDS else what_holds(name, value)
            if name in SCORED_WITH:
                kind = type(getattr(Settings, name))
                theirs[name] = parse_value(f"{path}: {name.upper()}", str(value), kind)
            elif fact and name.startswith(("eval_", "ttt_")):  # others took effect in training
                words += f", which had {shown(name.upper())}={shown(value)} ({fact})"
        preset = theirs.get("preset", "default")
        need(preset in PRESETS, f"{path}: this script does not know PRESET={shown(preset)}")
        return path, theirs, words
    return None, {}, ""


def settings_to_score(settings, given: set[str], world_size: int) -> tuple[Settings, str]:
    """The settings with which EVAL_ONLY scores ARTIFACT, and a line that says where they are from.

    Given ones come first, then its run's log or, without one, the header's window and preset. The
    model's are always the header's: UserError if given ones, or a given PRESET, contradict.
    """
    s = settings
    for path in () if s.artifact or s.artifact_path.exists() else s.checkpoint_paths:
        begun = f"{path} is there: without EVAL_ONLY=1 the run goes on from it"
        need(not path.exists(), f"no artifact at {s.artifact_path} yet, but {begun}")
    header, _ = read_artifact(s.artifact_path)
    log, logged, words = find_settings(s)
    by_header = "preset" not in given and header["preset"] in PRESETS
    preset = logged.get("preset", header["preset"] if by_header else s.preset)
    theirs = asdict(Settings(**PRESETS[preset] | {"preset": preset}))
    window = header["train_seq_len"]  # 0: not known
    theirs |= ({"train_seq_len": window} if window else {}) | logged
    contradicts = f"PRESET={s.preset} contradicts {log}, which has {preset}: unset it"
    need("preset" not in given or s.preset == preset, contradicts)
    theirs["eval_max_seconds"] = min(theirs["eval_max_seconds"], Settings.eval_max_seconds)
    taken = {name: theirs[name] for name in SCORED_WITH if name not in given}
    settings = make_room(replace(s, **taken), given, world_size)
    settings = adopt_artifact(header, settings, given, world_size)
    refuse_idle(settings, given)
    if not log:
        words = f"{s.artifact_path}; without its log, as PRESET={preset} has them"
    differ = []
    for name, value in logged.items():
        now, was = shown(getattr(settings, name)), shown(value)
        if now != was and FIELDS[name] in ("data", "model", "evaluation"):
            differ.append(f"{name.upper()}={now} (there {was})")
    return settings, f"settings from {words}" + (f"; but {' '.join(differ)}" if differ else "")


# ---- Clock and signals ---------------------------------------------------------------------------


class TrainingClock:
    """Counts the seconds between start() and pause(); the latter waits for the GPU."""

    def __init__(self):
        self.counted = 0.0  # up to the last pause
        self.since = None  # the start after it

    def start(self):
        """Starts counting."""
        self.since = time.perf_counter()

    def pause(self):
        """Stops counting once the GPU has done all that was launched."""
        synchronized_time()
        self.counted = self.seconds()
        self.since = None

    def seconds(self) -> float:
        """The seconds counted so far."""
        return self.counted + (time.perf_counter() - self.since if self.since else 0.0)


# The ways in which a run is told to stop: from a keyboard, by kill, by a terminal that is gone, and
# by what clusters are set up to send before they kill (Slurm's --signal, limits of processor time).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
STOP_SIGNALS += (signal.SIGUSR2, signal.SIGXCPU)
AS_ONE_SECONDS = 3.0  # signals within it count as one: a launcher and a terminal may both send one
# When signals came, by time.monotonic(), whoever handled them: a run that ends because of one must
# not be interrupted by the next. By PR_SET_PDEATHSIG one comes for each thread of a launcher.
SIGNALLED_AT = [-math.inf]
PR_SET_PDEATHSIG = 1  # of Linux' prctl(): asks for a signal when the parent process ends


@contextmanager
def handling_signals(handler):
    """While entered, STOP_SIGNALS go to this handler; those that were ignored stay ignored."""
    usual = {n: signal.getsignal(n) for n in STOP_SIGNALS}
    taken = [n for n, before in usual.items() if before not in (signal.SIG_IGN, None)]
    try:
        for number in taken:
            signal.signal(number, handler)
        yield
    finally:
        for number in taken:
            signal.signal(number, usual[number])


@contextmanager
def stop_signals(at_once: bool = False):
    """While entered, notes signals to stop in a list, which it gives, for a loop to look at.

    With at_once a signal also raises KeyboardInterrupt with its name, so that files are closed.
    """
    received = []
    if at_once:
        SIGNALLED_AT[:] = [-math.inf]

    def receive(number: int, _):
        received.append(number)
        SIGNALLED_AT.append(time.monotonic())
        if at_once and SIGNALLED_AT[-1] - SIGNALLED_AT[-2] >= AS_ONE_SECONDS:
            raise KeyboardInterrupt(signal.Signals(number).name)

    def raise_again(ignored):
        if not (received and isinstance(ignored.exc_value, KeyboardInterrupt)):
            usual(ignored)
            return
        SIGNALLED_AT.append(-math.inf)  # a moment later: what is raised here is dropped as well
        threading.Timer(0.1, os.kill, (os.getpid(), received[-1])).start()

    # If a finalizer is running, Python drops what a handler raises, and the run would go on.
    usual = sys.unraisablehook
    sys.unraisablehook = raise_again if at_once else usual
    try:
        with handling_signals(receive):
            yield received
    finally:
        sys.unraisablehook = usual
    if received and not at_once:  # too late for the loop to see
        SIGNALLED_AT[:] = [-math.inf]
        signal.raise_signal(received[0])


# ---- Checkpoints ---------------------------------------------------------------------------------

CHECKPOINT_MAGIC = b"SSMCHKP2"  # changes with Trainer.tensors()
MOST_BYTES = 1 << 31  # of a checkpoint
COPIED_NUMBERS = 1 << 20  # at once from the GPU: a longer copy would hold up a step's launches
# What its header holds besides TRAINING_FIELDS. seconds: the training clock's; qat_k: the grids' k
# since late QAT began; training_data: of which shards batches were made; starts: how many processes
# have trained the run, one after the other. "" is not known.
PROGRESS_FIELDS = ("steps", "seconds", "qat_k", "training_data", "tokenizer_sha256", "starts")


def differences(theirs: dict, ours: dict, settings) -> list[str]:
    """Why a run with our header cannot go on from a checkpoint with theirs; [] if it can."""
    names = {name for name in TRAINING_FIELDS if theirs[name] != ours[name]}
    if theirs["export_reserve_seconds"] < ours["export_reserve_seconds"]:
        names -= {"export_reserve_seconds"}  # a late export's error asks to raise it
    if settings.float8_products == "auto":
        names -= {"float8_products"}  # the checkpoint's are taken
    if not any(x["late_qat_threshold"] or x["quantizer"] == "ternary" for x in (theirs, ours)):
        names -= EXPORT_FIELDS
    differ = [f"{n.upper()}={shown(theirs[n])}, not {shown(ours[n])}" for n in sorted(names)]
    for name, source in (("training_data", "DATA_PATH"), ("tokenizer_sha256", "TOKENIZER_PATH")):
        before, now = theirs[name], ours[name]
        if before and now and before != now:
            differ.append(f"trained on {before}, but {source} has {now}")
    return differ


def find_checkpoint(ours: dict, settings, log) -> tuple[Path, dict, bytes] | None:
    """Path, header and numbers of the first usable checkpoint that RESUME names, if there is one.

    ours is the header that the run would write. Raises UserError if a checkpoint is another run's
    or version's, or if the one file that was named is not usable. Nothing in a file is executed.
    """
    paths = [] if settings.resume == "never" else [Path(settings.resume)]
    if settings.resume == "auto":
        paths = [path for path in settings.checkpoint_paths if path.exists()]
    for path in paths:
        try:
            theirs, numbers = read_sealed(path, "checkpoint", CHECKPOINT_MAGIC, MOST_BYTES, ours)
        except UserError as error:
            if settings.resume != "auto":
                raise
            intact = isinstance(error, OtherVersionError)  # its own script can still use it
            need(not intact, f"{error}; RESUME=never starts anew")
            log(f"warning: {error}")
            continue
        differ = differences(theirs, ours, settings)
        need(not differ, f"{path} has {'; '.join(differ)}; RESUME=never starts anew")
        reserve = ours["export_reserve_seconds"]
        late = 0 < ours["max_wallclock_seconds"] < theirs["seconds"] + reserve
        if not late or path == paths[-1] or theirs["export_reserve_seconds"] >= reserve:
            return path, theirs, numbers
        log(f"{path} leaves too little for EXPORT_RESERVE_SECONDS: trying the one before it")
    return None


class Checkpoints(ThreadPoolExecutor):
    """Writes checkpoints in a thread of rank 0, and keeps two. Leaving its context waits for it."""

    def __init__(self, settings, ranks, log):
        super().__init__(1)
        self.settings = settings
        self.ranks = ranks
        self.log = log
        self.pending: Future | None = None
        self.begun = time.perf_counter()

    def due(self) -> bool:
        """Whether it is time for the next one and the thread is idle."""
        idle = self.pending is None or self.pending.done()
        return idle and 0 < self.settings.checkpoint_every <= time.perf_counter() - self.begun

    @torch.no_grad()
    def write_soon(self, header: dict, tensors: list[Tensor]):
        """Rank 0 copies the tensors, float32, on their device; the thread writes that copy.

        The newest one becomes the one before, or is replaced if younger than CHECKPOINT_EVERY / 2.
        """
        now = time.perf_counter()
        young = now - self.begun < self.settings.checkpoint_every / 2
        self.begun = now
        if self.ranks.rank == 0:
            numbers = torch.cat([x.view(-1) for x in tensors])
            copied = torch.cuda.current_stream().record_event() if numbers.is_cuda else None
            self.pending = self.submit(self._write, header, numbers, copied, young)

    def finish(self):
        """Waits, on every rank, until rank 0 has written the last one."""
        if self.pending is not None:
            self.pending.result()
        self.ranks.from_main(None)

    def _write(self, header: dict, numbers: Tensor, copied: torch.cuda.Event | None, young: bool):
        with torch.cuda.stream(torch.cuda.Stream(numbers.device) if copied else None):
            if copied:
                copied.wait()
            parts = [x.cpu().numpy() for x in numbers.split(COPIED_NUMBERS)]
        newest, before = self.settings.checkpoint_paths
        try:
            sealed = seal(CHECKPOINT_MAGIC, header, *parts)
            write_whole(newest, *sealed, before=None if young else before)
        except UserError as error:
            self.log(f"warning: {error}; training goes on")


# ---- Steps ---------------------------------------------------------------------------------------

# By MAMBA_VERSION, on a GPU. Mamba-3's is 1 % faster on an H200 than half as many, and takes twice
# the memory; the first Mamba keeps a state for every channel.
MOST_TOKENS_AT_ONCE = {1: 65_536, 2: 131_072, 3: 262_144}
CPU_FACTOR = 6  # of a token's bytes: numbers are twice as long, and no kernel fuses scans
USED_MEMORY = 0.7  # of what is free


def token_bytes(settings, gpu: bool) -> float:
    """About how many bytes a token of a training step takes until its gradients are known."""
    s = settings
    mamba = parse_layers(s, "mamba_layers")
    scan = s.mamba_inner_dim * (10 + 6 * s.mamba_d_state / s.mamba_head_dim)
    if gpu and s.scan_backend == "chunked":
        scan *= 5  # as counted on a CPU, compiled
    layers = parse_layers(s, "layer_order")
    mixers = sum(scan if layer in mamba else 9 * s.model_dim for layer in layers)
    mlps = len(layers) * (8 + 4 * s.mlp_mult) * s.model_dim
    return (mixers + mlps + 5 * s.vocab_size) * (1 if gpu else CPU_FACTOR)


def choose_micro_batch(settings, ranks, free: float | None = None) -> int:
    """How many tokens a rank runs at once: a divisor of its batch, MICRO_BATCH_TOKENS or what fits.

    free: bytes of memory; by default what the GPU has left, or this rank's part of the machine's.
    """
    s = settings
    most = s.micro_batch_tokens
    if not most:
        if free is None and ranks.gpu:
            free, _ = torch.cuda.mem_get_info()
            s = replace(s, scan_backend=choose_scan_backend(s, ranks.device))
        elif free is None:
            free = device_memory(ranks.device) / ranks.world_size
        most = MOST_TOKENS_AT_ONCE[s.mamba_version] if ranks.gpu else MOST_TOKENS_ON_A_CPU
        most = min(most, USED_MEMORY * free / token_bytes(s, ranks.gpu))
    sequences = s.train_batch_tokens // (ranks.world_size * s.train_seq_len)
    return s.train_seq_len * largest_divisor(sequences, int(most // s.train_seq_len))


def choose_calibration_rows(settings, micro_batch: int) -> int:
    """Windows that calibration runs at once; fewer with gradients, which are not compiled there."""
    part = 4 if settings.shares_bits else 1
    return max(1, micro_batch // settings.train_seq_len // part)


class GraphedSteps:
    """gradients(kind, tokens, targets), then update(*rates): a step. On a GPU, as a CUDA graph.

    A host takes longer to launch small kernels one by one than a GPU to run them. Steps of a kind
    (an order of layers, and whether weights are on their grids) launch the same kernels. With
    several ranks the graph ends with the gradients, as it may not hold what ranks exchange; the
    host launches the update while it runs. On a CPU there is no graph. The first two steps of a
    kind compile what warm_up() has not, and allocate what the graph, recorded in the third, relies
    on. One graph is kept, since each has memory of its own. A step may not

    - wait for the device, or branch on its values;
    - depend on Python numbers that change (rates are tensors), or change shapes;
    - make or move tensors that outlive it, except its loss and gradients.
    """

    def __init__(self, gradients, update, parameters: list[Tensor], ranks):
        self.gradients = gradients
        self.update = update
        self.parameters = parameters
        self.device = ranks.device
        self.enabled = ranks.gpu
        self.whole = ranks.world_size == 1  # the graph holds the update, too
        self.times_run = collections.Counter()
        self.release()

    def release(self):
        """Drops the graph, which frees its memory."""
        self.kind = None  # the kind of steps that the graph replays
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []  # what it reads
        self.loss: Tensor | None = None  # what it writes
        self.written: list[Tensor | None] = []  # and the gradients, unless it uses them itself

    def __call__(self, kind: tuple, tokens: Tensor, targets: Tensor, *rates: float) -> Tensor:
        """Makes one step; returns its loss, float32 (). Rates become float32, graph or not."""
        inputs = [tokens, targets, *torch.tensor(rates).to(self.device, non_blocking=True)]
        self.times_run[kind] += 1
        if not self.enabled or self.times_run[kind] < 3:
            self.release()
            loss = self.gradients(kind, tokens, targets)
            self.update(*inputs[2:])
            return loss
        if self.kind != kind:
            self._record(kind, inputs)
        torch._foreach_copy_(self.inputs[:2], inputs[:2])
        torch._foreach_copy_(self.inputs[2:], inputs[2:])  # one launch, as they have one dtype
        self.graph.replay()
        if not self.whole:
            for p, gradient in zip(self.parameters, self.written, strict=True):
                p.grad = gradient
            self.update(*inputs[2:])
        return self.loss

    def _record(self, kind: tuple, inputs: list[Tensor]):
        """Records the graph of steps of this kind, which computes nothing yet."""
        self.release()
        self.kind = kind
        self.inputs = [x.new_empty_strided(x.shape, x.stride()) for x in inputs]
        tokens, targets, *rates = self.inputs
        self.graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads copy batches, write checkpoints and watch collectives.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss = self.gradients(kind, tokens, targets)
            if self.whole:
                self.update(*rates)
        if not self.whole:
            self.written = [p.grad for p in self.parameters]


# ---- Training ------------------------------------------------------------------------------------

SKIPPED_STEPS_THAT_END = 10  # in a row
CPU_OPERATIONS = 5e10  # that a thread does in a second


def name_layers(model, order: tuple[int, ...]) -> str:
    """An order of layers in a line: the initials of their mixers, and their numbers."""
    return " ".join(f"{type(model.blocks[i].mixer).__name__[0]}{i}" for i in order)


@dataclass(eq=False)
class Trainer:
    """Trains by the clock: resume() takes up a checkpoint, warm_up() compiles, run() trains."""

    model: Model
    settings: Settings
    ranks: Ranks
    micro_batch: int  # tokens a rank runs at once
    target_bytes: float  # what the artifact may take
    log: Log
    checkpoints: Checkpoints | None = None  # without it, none is written
    make_average: type = WeightAverage
    training_data: str = ""  # a summary of the shards, which a checkpoint holds
    scored_tokens: int = 0  # of the validation text, to predict when there is a score

    def __post_init__(self):
        self.micro_sequences = self.micro_batch // self.settings.train_seq_len
        self.calibration_rows = choose_calibration_rows(self.settings, self.micro_batch)
        if self.settings.spelling_features:
            share_by_spelling(self.model)
        self._share_weights()
        self.optimizers = Optimizers(self.model, self.settings, self.ranks)
        self.average = self.make_average(self.model, self.settings, self.ranks)
        self.float8_products = choose_float8(self.model, self.settings, self.ranks.device)
        self.loss_function = maybe_compile(self.model.loss, self.settings, self.ranks)
        self.graphed_steps = GraphedSteps(
            self.accumulate_gradients, self.update, self.optimizers.parameters, self.ranks
        )
        self.in_flight = None  # the step launched last: see keep_one_ahead()
        self.clock = TrainingClock()
        self.steps_done = 0
        self.steps_saved = 0  # in the newest checkpoint
        self.qat_k = 0.0  # the grids' k once weights train on them
        self.starts = 1  # processes that have trained this run, this one included
        self.limits = grid_limits(self.model)
        self.tokenizer_sha256 = file_sha256(self.settings.tokenizer_path)

    @torch.no_grad()
    def _share_weights(self):
        """Gives every rank the weights of rank 0: from one seed, other GPUs may draw others."""
        for p in self.model.parameters():
            if self.ranks.rank:
                p.zero_()
            self.ranks.sum_(p)

    def announce(self, skeleton: Model):
        """Logs what is about to be trained; skeleton: the model as it will be exported."""
        s = self.settings
        cpu = not self.ranks.gpu
        if cpu and s.preset not in FOR_CPUS:
            remedy = f"PRESET={' or '.join(FOR_CPUS)} is for CPUs"
            self.log(f"warning: PRESET={s.preset} is for GPUs; {remedy}")
        if not keeps_bytecode(torch):
            remedy = "unset PYTHONDONTWRITEBYTECODE, or name a folder by PYTHONPYCACHEPREFIX"
            self.log(f"warning: Python keeps no bytecode of torch, so starts take longer: {remedy}")
        reserve = s.export_reserve_seconds
        if left := max(0.0, s.max_wallclock_seconds - reserve):
            self.log(f"clock: {left:g} s of training + {reserve:g} s kept for GPTQ")
        count = sum(p.numel() for p in skeleton.parameters())
        operations = (6 if s.shares_bits else 2) * count * s.calibration_tokens
        seconds = operations / (CPU_OPERATIONS * torch.get_num_threads() * self.ranks.world_size)
        if left and cpu and s.calibrates and seconds > reserve:
            remedy = f"not EXPORT_RESERVE_SECONDS={reserve:g}: raise that, or take QUANTIZER=round"
            self.log(f"warning: calibration alone takes about {seconds:.0f} s here, {remedy}")
        bits = 8 * self.target_bytes / count
        self.log(f"parameters: {count:,}, {bits:.2f} bits each within TARGET_MB")
        mixers = [block.mixer for block in self.model.blocks]
        self.log(f"layers: {name_layers(self.model, self.model.full_order)}")
        scan = next((mixer.backend for mixer in mixers if isinstance(mixer, Mamba)), "none")
        fastest = SCAN_BACKENDS[self.settings.mamba_version][0]
        reason = why_not(fastest, self.settings, self.ranks.device) if self.ranks.gpu else ""
        if reason and scan != "none":
            scan += f" ({fastest} {reason})"
        precision = str(self.model.compute_dtype).removeprefix("torch.")
        precision += describe_float8(self.model, s, self.ranks.device, self.float8_products)
        backends = f"{precision}; scan: {scan}; attention: {self.model.attention_backend}"
        self.log(f"{backends}; {self.micro_batch:,} tokens at once per rank")

    def tensors(self) -> list[Tensor]:
        """What training changes, float32, whatever the number of ranks."""
        return [*self.average.parameters, *self.average.tensors(), *self.optimizers.tensors()]

    def header(self) -> dict:
        """A checkpoint's header: what a run must share that goes on from it, and its progress."""
        made_of = self.training_data, self.tokenizer_sha256
        progress = self.steps_done, self.clock.seconds(), self.qat_k, *made_of, self.starts
        kept = {name: getattr(self.settings, name) for name in TRAINING_FIELDS}
        kept["float8_products"] = self.float8_products  # what auto stands for
        return kept | dict(zip(PROGRESS_FIELDS, progress, strict=True))

    def save(self):
        """Has a checkpoint written, between two steps."""
        self.checkpoints.write_soon(self.header(), self.tensors())
        self.steps_saved = self.steps_done

    @torch.no_grad()
    def resume(self):
        """Goes on from the checkpoint that RESUME asks for, if any; UserError if it is unusable."""
        found = find_checkpoint(self.header(), self.settings, self.log)
        if found is not None:
            path, header, numbers = found
            tensors = self.tensors()
            sizes = [x.numel() for x in tensors]
            sane = 0 <= header["steps"] <= self.settings.iterations and header["seconds"] >= 0
            need(sane and len(numbers) == 4 * sum(sizes), f"{path} is not a usable checkpoint")
            stored = torch.tensor(np.frombuffer(numbers, "<f4"), device=self.ranks.device)
            torch._foreach_copy_([x.view(-1) for x in tensors], list(stored.split(sizes)))
            self.steps_done = self.steps_saved = header["steps"]
            self.clock.counted = header["seconds"]
            self.qat_k = header["qat_k"]
            self.starts = header["starts"] + 1
            had = header["float8_products"]
            self.float8_products = choose_float8(self.model, self.settings, self.ranks.device, had)
            progress = {"step": self.steps_done, "clock": self.clock.counted, "starts": self.starts}
            text = f"resumed {path}: step {self.steps_done}, {self.clock.counted:.1f}s"
            self.log(text, "resumed", **progress)
        alike = self.ranks.from_main(self.steps_done) == self.steps_done
        need(alike, "the ranks must share LOG_DIR")

    def accumulate_gradients(self, kind: tuple, tokens: Tensor, targets: Tensor) -> Tensor:
        """Gradients of this rank's batch, (sequences, seq_len) each; returns its mean loss, ()."""
        order, quantized = kind
        rows = self.micro_sequences
        batches = list(zip(tokens.split(rows), targets.split(rows), strict=True))
        total = torch.zeros((), device=self.ranks.device)
        with self.weights_of(quantized):
            for batch in batches:
                loss = self.loss_function(*batch, order, self.float8_products)
                loss = loss / len(batches)
                loss.backward(self.optimizers.loss_scale())
                total += loss.detach()
        return total

    def update(self, lr_factor: Tensor, momentum: Tensor, average_rate: Tensor):
        """The second half of a step: changes the weights and their average. float32 () each."""
        self.optimizers.step(lr_factor, momentum)
        self.average.update(average_rate, self.optimizers.skip)

    def weights_of(self, quantized: bool):
        """A context in which the weights are on their grids if quantized, else as they are."""
        if not quantized:
            return nullcontext()
        return fake_quantization(self.model, self.limits, self.qat_k)

    def warm_up(self):
        """Compiles, off the clock, both layer orders, the average, and what calibration and GPTQ
        call; on random tokens, at rates of 0.
        """
        s = self.settings
        if AHEAD:
            free, _ = torch.cuda.mem_get_info()
            count = sum(p.numel() for p in self.average.parameters)
            allow_updates_ahead(free - self.micro_batch * token_bytes(s, gpu=True), count)
        optimizers = Optimizers(self.model, s, self.ranks)  # to be thrown away
        shape = self.micro_sequences, s.train_seq_len + 1
        device = self.ranks.device
        generator = torch.Generator(device).manual_seed(s.seed)  # leaves the global one alone
        tokens = torch.randint(0, s.vocab_size, shape, device=device, generator=generator)
        for order in sorted({self.model.order(False), self.model.order(True)}):
            for _ in self.log.track(f"warm-up of {len(order)} layers", range(s.warmup_steps)):
                self.accumulate_gradients((order, False), tokens[:, :-1], tokens[:, 1:])
                optimizers.step(0.0, s.muon_momentum)
        compile_average(self.average, device)
        if s.calibrates:  # as export will do it: FlexAttention compiles itself
            parts = [tokens[: self.calibration_rows, :-1]]
            collect_costs(self.model, parts, self.ranks, s.shares_bits)
        if s.trellis_states:  # compiles export's kernel
            round_by_trellis(*torch.ones(3, 1, 1, device=device), s.trellis_states)
        synchronized_time()
        end_ahead(self.log)

    def run(self, batches, validate):
        """Trains until the clock or ITERATIONS ends it; leaves the averaged weights in the model.

        batches.next() gives tokens and targets; validate(recurrent) a Score, every VAL_LOSS_EVERY
        steps and off the clock. A signal, or divergence, ends it with a checkpoint and UserError.
        """
        s = self.settings
        with stop_signals() as received:
            self.clock.start()
            while True:
                seconds, due, stopped = self.vote(received)
                if stopped:
                    number = next(itertools.chain(*self.ranks.gather(received)))
                    self.stop(f"stopped by {signal.Signals(number).name} at step {self.steps_done}")
                if due:
                    self.save()
                now = schedule_at(s, self.steps_done, seconds)
                if now.progress >= 1:
                    break
                if self.steps_done:
                    rate = round(self.steps_done * s.train_batch_tokens / seconds)
                    note = f", step {self.steps_done}, {rate:,} tokens/s"
                    self.log.progress("training", now.progress, seconds, note)
                if now.quantized and not self.qat_k:  # here, as fit_sdclip() waits for the GPU
                    self.qat_k = fit_sdclip(self.model, s, self.target_bytes)
                    self.log(f"QAT from step {self.steps_done}, k={self.qat_k:.2f}")
                kind = self.model.order(now.recurrent), now.quantized
                tokens, targets = batches.next()
                rates = now.lr_factor, now.momentum, self.average.rate(self.steps_done + 1)
                loss = self.graphed_steps(kind, tokens, targets, *rates)
                self.steps_done += 1
                self.average.after_step(self.steps_done, self.optimizers.skip, now.snapshot)
                self.keep_one_ahead()
                if self.steps_done <= 5 or self.steps_done % s.train_log_every == 0:
                    self.log_step(loss, now)
                if s.val_loss_every and self.steps_done % s.val_loss_every == 0:
                    self.clock.pause()
                    with self.weights_of(now.quantized):
                        self.log_score(validate(now.recurrent))
                    self.clock.start()
            self.count_skipped(self.optimizers.skipped)
            self.in_flight = None
            self.graphed_steps.release()
            if self.checkpoints is not None and self.steps_saved < self.steps_done:
                self.save()  # marks the end of training
            self.log(f"average: {self.average.apply()}")
            self.clock.pause()

    def vote(self, received: list[int]) -> tuple[float, bool, bool]:
        """Rank 0's clock, whether a checkpoint is due, whether to stop: alike on all ranks."""
        first = self.ranks.rank == 0
        due = first and self.checkpoints is not None and self.checkpoints.due()
        mine = [self.clock.seconds() if first else 0.0, due, len(received)]
        seconds, due, stopped = self.ranks.sum_(torch.tensor(mine, dtype=torch.float64)).tolist()
        return seconds, due > 0, stopped > 0

    def keep_one_ahead(self):
        """Waits for the step before the one just launched, so that neither GPU nor host idles."""
        before = self.in_flight
        skipped = self.optimizers.skipped.to("cpu", non_blocking=True)  # valid once `done` is
        done = torch.cuda.current_stream().record_event() if self.ranks.gpu else None
        self.in_flight = done, skipped
        if before is not None:
            done, skipped = before
            if done is not None:
                done.synchronize()
            self.count_skipped(skipped)

    def count_skipped(self, skipped: Tensor) -> int:
        """How many steps had gradients that are not finite; too many in a row end the run."""
        total, _, longest = skipped.int().tolist()
        if longest >= SKIPPED_STEPS_THAT_END:
            self.stop(f"{longest} steps in a row had gradients that are not finite: {DIVERGED}")
        return total

    def stop(self, why: str):
        """Writes a checkpoint, and raises SharedError, on all ranks."""
        if self.checkpoints is not None:
            self.save()
            self.checkpoints.finish()
            why += f"; {way_on(self.settings, 'the last checkpoint')}"
        raise SharedError(why)

    def step_ms(self) -> float:
        """Milliseconds of the training clock that a step took in the mean."""
        return 1000 * self.clock.seconds() / max(self.steps_done, 1)

    def log_step(self, loss: Tensor, now: Schedule):
        """Loss, time and speed, and how long training still takes."""
        mean = float(self.ranks.sum_(loss.clone())) / self.ranks.world_size
        skipped = self.count_skipped(self.optimizers.skipped)
        seconds = self.clock.seconds()
        ms = 1000 * seconds
        each = ms / self.steps_done
        pace = self.pace(seconds)
        left = pace["seconds_left"]
        text = f"train_loss:{mean:.4f} train_time:{ms:.0f}ms step_avg:{each:.2f}ms"
        text += f" {seconds / (seconds + left):.1%} of {seconds + left:.0f}s"
        text += f" {pace['tokens_per_second']:,} tokens/s {left:.0f}s left"
        if "seconds_to_score" in pace:
            text += f" score in {pace['seconds_to_score']:.0f}s"
        text += f" skipped_steps:{skipped}" if skipped else ""
        values = {"train_loss": mean, "train_ms": ms, "step_avg_ms": each, "skipped_steps": skipped}
        self.log_at_step(text, "train", **values, **pace, **now._asdict())

    def pace(self, seconds: float) -> dict[str, float]:
        """Tokens per second, seconds left of training, and about how many until there is a score.

        After training come the export, one or two scores in plain windows, and the evaluation. A
        token that is only read is taken to cost a third of one in a training step.
        """
        s = self.settings
        progress = schedule_at(s, self.steps_done, seconds).progress
        rate = self.steps_done * s.train_batch_tokens / seconds
        left = seconds * (1 - progress) / progress
        pace = {"tokens_per_second": round(rate), "seconds_left": round(left, 1)}
        if self.scored_tokens:
            # A document's windows begin with it: in the mean they have half of TRAIN_SEQ_LEN.
            strides = {"sliding": s.eval_stride, "documents": 2 * s.ttt_lora_piece}
            reads = s.train_seq_len / strides.get(s.eval_mode, s.train_seq_len)  # of each token
            steps = reads / 3 if s.eval_mode == "documents" else s.ttt_epochs
            final = (reads / 3 + s.adapts * steps) * self.scored_tokens / rate
            plain = (1 if s.score_mode == "plain" else 2) / 3 * self.scored_tokens / rate
            rest = s.export_reserve_seconds + plain + min(final, s.eval_max_seconds)
            self.log.score_at = time.monotonic() + left + rest
            pace["seconds_to_score"] = round(left + rest, 1)
        return pace

    def log_score(self, score: Score, when: str = ""):
        """Logs a validation score in the contest's form; when: text to add."""
        text = f"val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f}{when}"
        self.log_at_step(text, "validation", val_loss=score.val_loss, val_bpb=score.val_bpb)

    def log_at_step(self, text: str, event: str, **values):
        """Logs a line that begins with the number of the step, and its record."""
        text = f"step:{self.steps_done}/{self.settings.iterations} {text}"
        self.log(text, event, step=self.steps_done, **values)


# ---- Export and evaluation -----------------------------------------------------------------------


def prepare_training(settings, ranks, shards, log, checkpoints) -> tuple[Trainer, Batches]:
    """A trainer, in the state of a checkpoint if there is one, and its batches from there on.

    Raises UserError here, before anything is compiled, for all that could be refused later.
    """
    data = summarize_shards(shards)
    summary = "{tokens:,} tokens in {shards} shards (names and lengths {digest})".format(**data)
    log(f"training data: {summary}", "training_data", **data)
    target = int(settings.target_mb * 1e6) - code_bytes()
    skeleton = model_skeleton(settings)
    check_size(skeleton, target, device_memory(ranks.device))
    model = build_model(settings, ranks)
    if settings.eval_mode == "documents" and settings.adapts:
        Branches(model, replace(settings, ttt_lora_slots=1))  # raises UserError if there are none
    micro_batch = choose_micro_batch(settings, ranks)
    trainer = Trainer(model, settings, ranks, micro_batch, target, log, checkpoints)
    trainer.training_data = f"{summary}, text {sampled_digest(shards)}"
    # What the readers of its artifact and checkpoints would refuse is not trained.
    read_header(json.dumps(artifact_header(settings)), artifact_header(Settings()))
    read_header(json.dumps(trainer.header()), trainer.header())
    trainer.resume()
    trainer.announce(skeleton)
    return trainer, Batches(settings, ranks, trainer.steps_done, shards)


def train_and_export(settings, ranks, shards, validation: ValidationSet, log) -> str:
    """From shards to an artifact, scored before and after quantization; returns its SHA-256."""
    score = partial(plain_score, settings, ranks, validation, log=log)
    with Checkpoints(settings, ranks, log) as checkpoints:
        trainer, batches = prepare_training(settings, ranks, shards, log, checkpoints)
        log.begin()  # nothing is refused from here on
        log(f"{'compiling and ' if ranks.gpu or settings.compile == 'on' else ''}warming up ...")
        trainer.scored_tokens = len(validation.target_bytes)
        trainer.warm_up()
        log(f"ready after {time.perf_counter() - log.started:.1f}s; training starts", "ready")
        trainer.run(batches, partial(score, trainer.model))
        peak = torch.cuda.max_memory_allocated()
        each = trainer.step_ms()
        text = f"Code size: {code_bytes()} bytes; {trainer.steps_done} steps of {each:.2f}ms"
        log(text + (f"; peak GPU memory {peak / 1e9:.1f} GB" if ranks.gpu else ""))
        with trainer.weights_of(settings.quantizer == "ternary"):  # the weights that it trained
            before = score(trainer.model)
        trainer.log_score(before, " before quantization")
        checkpoints.finish()
    values = {"steps": trainer.steps_done, "step_avg_ms": each}
    values |= {"peak_bytes": peak, "bytes_code": code_bytes()}
    values |= export(trainer, batches)
    total = code_bytes() + settings.artifact_path.stat().st_size
    values |= {"val_loss": before.val_loss, "val_bpb": before.val_bpb, "bytes_total": total}
    values |= {"artifact_sha256": file_sha256(settings.artifact_path), "starts": trainer.starts}
    log(f"Total submission size int6+lzma: {total} bytes", "trained", **values)
    score_quantized(settings, ranks, validation, log)
    if settings.quantization_report:
        quantization_report(trainer, before, score)
    return values["artifact_sha256"]


def go_on_to_evaluation(unscored, settings, ranks, validation: ValidationSet, log) -> str:
    """In place of train_and_export(), of a run that has its artifact; unscored: find_unscored()."""
    theirs = unscored.get("hashes", {}).get("validation", {}).values()
    same = not theirs or sorted(theirs) == sorted(x.sha256 for x in validation.shards)
    problem = "has another validation text than the run began with: give it that, or EVAL_ONLY=1"
    check(settings, "data_path", same, problem)
    text = f"{settings.artifact_path} is trained and has no score: evaluation starts over"
    log(text, "evaluation_again")
    log.begin()
    if "after_quantization" not in unscored:
        score_quantized(settings, ranks, validation, log)
    return unscored["trained"]["artifact_sha256"]


def score_quantized(settings, ranks, validation: ValidationSet, log):
    """Logs the artifact's plain_score(), unless the final score will be that very score."""
    if settings.score_mode != "plain":
        quantized, _ = load_model(settings.artifact_path, settings, set(), ranks)
        after = plain_score(settings, ranks, validation, quantized, log=log)
        plain = replace(settings, eval_mode="plain", ttt_enabled=False)
        report(log, "after_quantization", plain, validation, after)


def code_bytes() -> int:
    """The size of this script in bytes, which counts with the artifact's."""
    return Path(__file__).stat().st_size


def plain_score(settings, ranks, validation, model, recurrent=True, log=None) -> Score:
    """The score in plain windows, without test-time training and off every clock."""
    plain = replace(settings, eval_mode="plain", ttt_enabled=False)
    observer = log and ScoringProgress(log, "plain windows", validation, ranks)
    return Evaluator(model, plain, ranks, validation, recurrent, observer).evaluate()


def export(trainer, batches) -> dict:
    """Calibrates, quantizes and packs the model into ARTIFACT; returns values for the log.

    If the artifact is too large, weights are quantized again with a larger k. All but packing is on
    the training clock. If that is over, the artifact goes to a file beside it, without a claim, and
    LateExportError says how to go on. UserError if it cannot get small enough.
    """
    s, ranks, log = trainer.settings, trainer.ranks, trainer.log
    clock, target = trainer.clock, trainer.target_bytes
    due = min(clock.seconds(), s.max_wallclock_seconds - s.export_reserve_seconds)
    clock.start()
    fold_spelling(trainer.model)
    solvers = calibrate(trainer, batches)
    k = fit_sdclip(trainer.model, s, target, solvers)
    while True:
        started = clock.seconds()
        stored = quantize_model(trainer.model, s, ranks, solvers, k, partial(log.track, "GPTQ"))
        clock.pause()
        took = clock.seconds() - started
        text = f"{s.quantizer.upper()} at k={k:.2f}; training clock {clock.seconds():.1f}s"
        log(f"{text}, of which this took {took:.2f}s", "quantized", k=k, quantize_seconds=took)
        data = pack_artifact(s, stored, trainer.tokenizer_sha256) if ranks.rank == 0 else b""
        size = ranks.from_main(len(data))
        text = f"{s.artifact_path}: {size} bytes of at most {target}"
        # Logged before the file is there: whenever the run is killed, the file is known as its own.
        log(text, "packed", artifact_sha256=hashlib.sha256(data).hexdigest())
        if size <= target:
            break
        problem = f"the artifact takes {size} bytes of {target} at SDCLIP_K={k:.2f}"
        remedy = "raise it or SDCLIP_MOST, or make the model smaller"
        grows = k < s.sdclip_most and s.quantizer != "ternary"  # its grids do not depend on k
        need(grows, f"{problem}: {remedy}")
        # A weight's bits, about 3.4, fall as log2 k rises: for 1 % less, k rises 2.4 %. Twice that.
        k = min(s.sdclip_most, k + 5 * k * (size - target) / size)
        clock.start()
    in_time = ranks.from_main(clock.seconds()) <= (s.max_wallclock_seconds or math.inf)
    aside = Path(f"{s.artifact_path}.late")
    if ranks.rank == 0:
        write_whole(s.artifact_path if in_time else aside, data)
        if in_time:
            aside.unlink(missing_ok=True)
    ranks.from_main(None)  # all ranks wait until it is written
    if not in_time:
        reserve = math.ceil(10 * (clock.seconds() - due)) / 10
        found = find_checkpoint(trainer.header() | {"export_reserve_seconds": reserve}, s, Log())
        way = "MAX_WALLCLOCK_SECONDS, too: no checkpoint leaves the time, RESUME=never starts anew"
        if found and found[1]["seconds"] + reserve <= s.max_wallclock_seconds:
            way = way_on(s, found[0])
        late = "GPTQ ended after MAX_WALLCLOCK_SECONDS: raise EXPORT_RESERVE_SECONDS to at least"
        raise LateExportError(f"{late} {reserve:g}, and {way}; {aside} has this model, unclaimed")
    kinds = bytes_by_kind(trainer.model, stored, size)
    return {"sdclip_k": k, "train_clock_seconds": clock.seconds(), "bytes_by_kind": kinds}


def calibrate(trainer, batches) -> dict[str, tuple]:
    """factor_hessian() of each matrix on CALIBRATION's text, by name; {} if nothing is calibrated.

    Logs a line. Also sets the model's row_costs and grid_factors, if settings.shares_bits.
    """
    s = trainer.settings
    ranks = trainer.ranks
    model = trainer.model
    model.row_costs = {}
    model.grid_factors = {}
    if not s.calibrates:
        return {}
    started = synchronized_time()
    track = partial(trainer.log.track, "calibration")
    sequences = calibration_sequences(model, s, ranks, batches, track)
    times = {"text": synchronized_time() - started}  # seconds, of one step after the other
    parts = track(sequences.split(trainer.calibration_rows))
    hessians, energies = collect_costs(model, parts, ranks, s.shares_bits)
    times["pass"] = synchronized_time() - started - sum(times.values())
    solvers = factor_hessians(hessians, s.gptq_damp, ranks)
    if s.shares_bits:
        model.row_costs = find_row_costs(solvers, energies)
        model.grid_factors = find_grid_factors(model, s)
    times["factor"] = synchronized_time() - started - sum(times.values())
    tokens = sequences.numel() * ranks.world_size
    source = {"train": "training text", "self": "text that the model wrote"}[s.calibration]
    took = ", ".join(f"{what} {seconds:.2f}s" for what, seconds in times.items())
    values = {f"{what}_seconds": seconds for what, seconds in times.items()}
    text = f"calibration: {tokens:,} tokens of {source}; {took}"
    trainer.log(text, "calibration", source=s.calibration, tokens=tokens, **values)
    return solvers


def quantization_report(trainer, before: Score, score):
    """Logs the BPB lost if each kind of layer alone is quantized; score(model) gives a Score."""
    model, s = trainer.model, trainer.settings
    quantized, _ = load_model(s.artifact_path, s, set(), trainer.ranks)
    with trainer.weights_of(s.quantizer == "ternary"):
        floats = {name: p.clone() for name, p in model.state_dict().items()}
    lost = {}
    for kind in KINDS.values():
        names = [name for name in grid_limits(model) if layer_kind(name) == kind]
        model.load_state_dict(floats | {name: quantized.get_parameter(name) for name in names})
        lost[kind] = round(score(model).val_bpb - before.val_bpb, 6)
    trainer.log(f"BPB lost by quantization: {lost}", "quantization_loss", bpb_by_kind=lost)


def evaluate_artifact(settings, given, ranks, validation, log, written, unscored):
    """Loads ARTIFACT and scores it within EVAL_MAX_SECONDS.

    written: SHA-256 of the file that this run has made, "" if it made none. unscored:
    find_unscored()'s. Raises UserError if ARTIFACT is another file, if its score is no number, or
    if time runs out.
    """
    attempt = 1 + unscored.get("evaluation", {}).get("attempt", 0)
    started = time.perf_counter()
    found = file_sha256(settings.artifact_path)
    same = written in ("", found)
    need(same, f"{settings.artifact_path} is not this run's: another run has the same ARTIFACT")
    log(f"evaluation: attempt {attempt}", "evaluation", attempt=attempt)
    model, s = load_model(settings.artifact_path, settings, given, ranks)
    log.begin()
    rows = "documents" if s.eval_mode == "documents" else "windows"
    observer = ScoringProgress(log, "evaluation", validation, ranks, rows)
    log.score_at = 0.0  # from here on, the evaluation's own progress tells
    if ranks.gpu:
        torch.cuda.reset_peak_memory_stats()
    score = Evaluator(model, s, ranks, validation, observer=observer).evaluate(started)
    peak = torch.cuda.max_memory_allocated()
    took = f"evaluation took {score.seconds:.1f}s of {s.eval_max_seconds:g}s"
    lost = "documents learnt in part" if s.eval_mode == "documents" else "epochs given up"
    if ranks.gpu:
        log(f"evaluation: peak GPU memory {peak / 1e9:.1f} GB")
    log(f"{took}; {score.epochs_given_up} {lost}", "evaluated")  # before its score: tools read both
    if s.score_mode == "plain" and not s.eval_only and "after_quantization" not in unscored:
        report(log, "after_quantization", s, validation, score)  # see score_quantized()
    overflow = f"numbers overflow in PRECISION={s.precision}, or {DIVERGED}"
    if s.adapts:
        overflow += f"; or {'TTT_LORA_LR' if s.eval_mode == 'documents' else 'TTT_LR'}"
    need(math.isfinite(score.val_loss), f"the score is {score.val_loss:g}: {overflow}")
    late = f"no score in EVAL_MAX_SECONDS={s.eval_max_seconds}: raise it, or change EVAL_MODE"
    need(ranks.from_main(score.seconds <= s.eval_max_seconds), late)
    try:
        if s.eval_nll_path and ranks.rank == 0:
            content = io.BytesIO()
            np.save(content, score.nats)
            write_whole(Path(s.eval_nll_path), content.getbuffer())
            use = "python -m tools.token_scores reads those of plain windows"
            text = f"nats of {len(score.nats):,} targets: {s.eval_nll_path}; {use}"
            log(text, "target_nats", path=s.eval_nll_path, targets=len(score.nats))
    finally:  # "final" comes last: a run that was killed before it is scored again
        report(log, "final", s, validation, score, artifact_sha256=found, peak_bytes=peak)


def report(log, event: str, settings, validation: ValidationSet, score: Score, **more):
    """Logs an artifact's score in the contest's form, with eight digits, and its profile()."""
    figures = {"val_loss": score.val_loss, "val_bpb": score.val_bpb}
    text = " ".join(f"{name}:{value:.8f}" for name, value in figures.items())
    more |= {"mode": settings.score_mode, "evaluation_seconds": round(score.seconds, 3)}
    more["epochs_given_up"] = score.epochs_given_up
    log(f"final_int6_lzma_{settings.score_mode}_exact {text}", event, **figures, **more)
    if log.files:  # of rank 0
        log.record(f"{event}_profile", **profile(settings, validation, score))


def sample_text(settings, given: set[str], ranks, tokenizer, prompt: list[int], log):
    """Logs how ARTIFACT's model continues a prompt (tokens), without adapting, off every clock."""
    started = time.perf_counter()
    model, s = load_model(settings.artifact_path, settings, given, ranks)
    log.begin()
    tokens = torch.tensor([prompt], device=ranks.device)
    generator = torch.Generator(ranks.device).manual_seed(s.seed)
    drawn = {"temperature": s.sample_temperature, "top_p": s.sample_top_p}
    made = generate(model, tokens, s.sample_tokens, **drawn, generator=generator)
    text = tokenizer.decode(prompt + made[0].tolist())
    took = round(time.perf_counter() - started, 3)
    said = {"prompt": s.sample_prompt, "sample": text, "tokens": s.sample_tokens} | drawn
    visible = "".join(x if x.isprintable() or x in "\n\t" else ascii(x)[1:-1] for x in text)
    what = f"sample, {s.sample_tokens} tokens in {took:.1f}s behind SAMPLE_PROMPT"
    inset = visible.replace("\n", "\n  ")  # or a line of it could pass for one of the log
    log(f"{what}:\n\n  {inset}\n", "sample", **said, took_seconds=took)


# ---- Main ----------------------------------------------------------------------------------------


def main(log):
    """A whole run, as the settings in the environment ask: training, export, evaluation."""
    settings, given, ranks = prepare_run(dict(os.environ))
    log.open(settings, ranks, log_name(settings))
    first = ranks.rank == 0
    writes = first and not settings.eval_only
    source = describe_room(settings, given)  # a line on settings that were not given
    if settings.eval_only:
        found = settings_to_score(settings, given, ranks.world_size) if first else None
        settings, source = ranks.from_main(found)
    check_outputs(settings)
    unscored = ranks.from_main(find_unscored(settings) if writes else {})
    log_settings(log, settings, given, ranks, source)
    with claimed_artifact(settings) if writes else nullcontext():
        tokenizer = Tokenizer(settings.tokenizer_path, settings.vocab_size)
        prompt = tokenizer.encode_prompt(settings.sample_prompt)
        training = [] if settings.eval_only else open_shards(settings.data_path, "train")
        validation = text_to_score(settings, tokenizer, prompt, training, log, first)
        check_alike(settings, ranks, training, validation)
        written = ""  # SHA-256 of the artifact that this run has made
        if unscored:
            written = go_on_to_evaluation(unscored, settings, ranks, validation, log)
        elif not settings.eval_only:
            written = train_and_export(settings, ranks, training, validation, log)
        if prompt:
            sample_text(settings, given, ranks, tokenizer, prompt, log)
        if validation is None:
            log(f"there is nothing to score: no *_val_*.bin in DATA_PATH={settings.data_path}")
        else:
            evaluate_artifact(settings, given, ranks, validation, log, written, unscored)
        if not settings.eval_only:  # the run has its score
            for path in settings.checkpoint_paths:
                path.unlink(missing_ok=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare_run(environment: dict[str, str]) -> tuple[Settings, set[str], Ranks]:
    """Settings with a RUN_ID that ranks share, names of those given, and ranks; or UserError."""
    settings, given = read_settings(environment)
    *_, world_size = read_launch(environment)
    check_values(settings)
    if not settings.eval_only:  # else settings_to_score() does, with those of the artifact
        validate_settings(settings, world_size)
        refuse_idle(settings, given)
    known = settings.artifact or settings.run_id or not settings.eval_only
    need(known, "EVAL_ONLY=1 needs ARTIFACT=file, or the RUN_ID that wrote it")
    prepare_torch(settings.deterministic)
    if "TORCHELASTIC_RUN_ID" in environment and sys.platform == "linux":
        # No orphans stay if the launcher is killed, or dies of SIGUSR1, which it does not handle.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    compile_ahead(settings)
    ranks = start_ranks(settings)
    run_id = choose_run_id(settings, environment) if ranks.rank == 0 else ""
    settings = replace(settings, run_id=ranks.from_main(run_id))
    check_values(settings)  # again, for a run id that is torchrun's
    return settings, given, ranks


def choose_run_id(settings, environment: dict[str, str]) -> str:
    """RUN_ID, or a new name, which with torchrun --max-restarts a restart finds; or UserError."""
    s = settings
    if s.run_id:
        return s.run_id
    if environment.get("TORCHELASTIC_MAX_RESTARTS", "").strip() not in ("", "0"):
        prefix = environment.get("TORCHELASTIC_RUN_ID", "none")
        problem = "torchrun --max-restarts without --standalone or --rdzv-id"
        need(prefix != "none", f"{problem} needs a RUN_ID: a restart would not find its run")
        return f"{prefix}-{s.preset}-{s.seed}"
    prefix = f"{time.strftime('%Y%m%d-%H%M%S')}-{s.preset}-{s.seed}"
    name = prefix
    numbers = itertools.count(2)
    while True:
        path = Path(s.log_dir, f"{log_name(replace(s, run_id=name))}.txt")
        with explained_errors(f"write {path}"), suppress(FileExistsError):  # another run's
            make_folder(path.parent)
            path.touch(exist_ok=False)
            return name
        name = f"{prefix}-{next(numbers)}"


def refuse_same_files(s):
    """Raises UserError if an output is an input or another output, or EVAL_NLL_PATH no .npy file.

    Symbolic links are followed. Hard links matter for logs alone, which grow in place: any other
    output replaces what has its name, and leaves that whole under other names: write_whole().
    """
    read = [__file__, s.tokenizer_path, *Path(s.data_path).glob("*_*_*.bin")]
    logs = [Path(s.log_dir, f"{log_name(s)}.{end}") for end in ("txt", "jsonl")]
    files = {"what is read": read, "a log": logs, "a checkpoint": [*s.checkpoint_paths, s.resume]}
    files |= {"ARTIFACT": [s.artifact_path], "EVAL_NLL_PATH": [s.eval_nll_path]}
    known = {}  # what each real path is; the ends are those of files that exist for a while
    for what, names in files.items():
        for name, end in itertools.product(filter(None, names), ("", ".part", ".late", ".lock")):
            other = known.setdefault(os.path.realpath(f"{name}{end}"), what)
            need(other == what, f"{name}{end} would be both {other} and {what}: give each its own")
    for log, (path, what) in itertools.product(filter(os.path.isfile, logs), known.items()):
        same = os.path.isfile(path) and os.path.samefile(log, path)
        linked = same and os.path.realpath(log) != path
        need(not linked, f"{log} is one file with {path}, {what}, by a link: take one of them away")
    begins = np.fromfile(s.eval_nll_path, "u1", 6) if os.path.isfile(s.eval_nll_path) else b""
    scores = bytes(begins) in (b"", np.lib.format.MAGIC_PREFIX)
    check(s, "eval_nll_path", scores, "is there already, and no .npy: choose another name")


def check_outputs(s):
    """Raises UserError, before anything is done, for outputs that could not be written later."""
    refuse_same_files(s)
    paths = [Path(s.eval_nll_path)] if s.eval_nll_path else []
    if not s.eval_only:
        code = code_bytes()
        check(s, "target_mb", s.target_mb * 1e6 > code, f"is less than the script's {code} bytes")
        paths += [s.artifact_path, *s.checkpoint_paths]
    for path in paths:
        with explained_errors(f"write {path}"):
            make_folder(path.parent)
            with suppress(FileNotFoundError):
                os.stat(f"{path}.late.part")  # may be too long: the longest name it has for a while
            plain = path.is_file() or not path.exists()
            need(plain, f"cannot write {path}: it is a folder or a device")
            need(os.access(path.parent, os.W_OK), f"cannot write in the folder of {path}")


def log_name(settings) -> str:
    """The name, without its end, of this run's files in LOG_DIR."""
    return settings.run_id + (".eval" if settings.eval_only else "")


def text_to_score(settings, tokenizer, prompt, training, log, first=True) -> ValidationSet | None:
    """The validation text, checked and logged; None if there is none but EVAL_ONLY and a prompt."""
    folder = Path(settings.data_path)
    if prompt and settings.eval_only and folder.is_dir() and not shard_paths(folder, "val"):
        return None
    validation = load_validation(settings, tokenizer)
    if training:
        check_tokenizer(settings, tokenizer, training, "training")
    tokens, target_bytes, shards = validation
    counts = {"shards": len(shards), "tokens": len(tokens), "scored_tokens": len(target_bytes)}
    counts |= {"documents": int((tokens == BOS_ID).sum()), "bytes": int(target_bytes.sum())}
    text = "{tokens:,} tokens in {shards} shards, {documents:,} documents; scored are"
    text += " {scored_tokens:,} tokens, {bytes:,} bytes"
    told = [path.name for path in map(file_of_bytes, shards) if path]
    agreed = f"; by {shown(', '.join(told))}, too" if told else ""
    log(f"validation text: {text.format(**counts)}{agreed}", "validation_data", **counts)
    log_hashes(settings, training, shards, log, first)
    lacking = [] if counts["documents"] else ["validation"]
    sample = np.frombuffer(b"".join(shard.sample for shard in training), "<u2")
    lacking += ["training"] if training and BOS_ID not in sample else []
    if lacking and (settings.document_reset or settings.eval_mode == "documents"):
        remedy = "put it before each document"  # with EVAL_ONLY, DOCUMENT_RESET is the artifact's
        remedy += "" if settings.eval_only else ", or set DOCUMENT_RESET=0 EVAL_MODE=sliding"
        log(f"warning: no BOS ({BOS_ID}) in the {' and '.join(lacking)} shards: {remedy}")
    return validation


def obey(arguments: list[str], log):
    """Does what the command line asks for: without arguments, main(log). UserError if unknown."""
    tools = ["--dry-run", "--rehearse"]
    asked = [name for name in [*tools, "--presets"] if name in arguments]
    need(len(asked) < 2, f"{' and '.join(asked)} are commands each by itself: give one of them")
    tool = asked[0] if asked and asked[0] in tools else ""
    if not arguments:
        main(log)
    elif tool:
        hand_over(tool, [argument for argument in arguments if argument != tool])
    elif {"--help", "-h", "--presets"} & set(arguments):
        text = "\n".join(f"{name:16}{use}" for name, use in PRESET_USES.items())
        names = [argument for argument in arguments if argument != "--presets"]
        if {"--help", "-h"} & set(names):
            text = help_text()
        elif names:
            odd = [name for name in names if name not in PRESETS]
            need(not odd, f"{' '.join(odd)}: no preset is called so; --presets lists them")
            text = "\n".join(map(describe_preset, names))
        with suppress(BrokenPipeError):  # as by --help | head
            print(text, flush=True)
    else:
        near = difflib.get_close_matches(arguments[-1], [*tools, "--help", "--presets"], 1, 0.8)
        meant = f"; did you mean {near[0]}?" if near else ": settings are environment variables"
        raise UserError(f"{arguments[-1]} is no command{meant}; --help lists them")


def hand_over(command: str, arguments: list[str]):
    """Turns the process into the tool for --dry-run or --rehearse; UserError if it is not found."""
    script = Path(__file__).resolve()
    folders = dict.fromkeys(map(str, (Path.cwd(), script.parent, script.parent.parent)))
    starts = [path for x in folders if os.path.isfile(path := f"{x}/tools/hand_over.py")]
    need(starts, f"{command} needs the repository's tools, which are not in {' or '.join(folders)}")
    os.execv(sys.executable, [sys.executable, starts[0], command, str(script), *arguments])


def check_alike(settings, ranks, training, validation: ValidationSet | None):
    """Raises UserError on a rank that has another script, text or settings than rank 0.

    On several machines, each rank reads its own machine's files and variables.
    """
    if ranks.world_size == 1:
        return
    compared = {n for n, group in FIELDS.items() if group == "evaluation"} - {"eval_nll_path"}
    mine = {name.upper(): getattr(settings, name) for name in [*TRAINING_FIELDS, *compared]}
    mine |= {"train_gpt.py": file_sha256(__file__), "training text": sampled_digest(training)}
    mine["TOKENIZER_PATH"] = file_sha256(settings.tokenizer_path)
    text = b"" if validation is None else validation.tokens
    mine["validation text"] = hashlib.sha256(text).hexdigest()
    theirs = ranks.from_main(mine)
    names = [name for name in sorted(mine) if mine[name] != theirs[name]]
    differ = [f"{name}={shown(mine[name])}, not {shown(theirs[name])}" for name in names]
    need(not differ, f"{'; '.join(differ)}: give this rank what rank 0 has")


def run() -> int:
    """obey() for a command line; returns the exit status, 0 or 2. A user's mistake is one line."""
    for name in ("stdin", "stdout", "stderr"):  # None if closed, as by >&-; open() takes its number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # consoles may lack signs: cp1251 has no ×, ASCII no ▁
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with removing_empty_folders(), closing(Log()) as log:
        try:
            with stop_signals(at_once=True):
                obey(sys.argv[1:], log)
            return 0
        except (Exception, KeyboardInterrupt) as error:
            problem = explain_failure(error, log)
            with suppress(KeyboardInterrupt, OSError):  # a second signal; no one reads the console
                tell_failure(error, problem, log)
            if not problem:
                raise
    return 2


OTHER_RANK_ENDED = "another rank has ended"
WAIT_FOR_MAIN = 5.0  # seconds for rank 0 to tell what all ranks see, and torchrun to end the others
WAIT_FOR_END = 20.0  # for torchrun to end the ranks that did not fail first


def tell_failure(error: BaseException, problem: str, log):
    """Writes why the run ends to its log and, unless the script is at fault, to the console.

    problem: explain_failure()'s. What all ranks see, rank 0 tells. If one rank has ended, it tells;
    torchrun then ends the others, and shows that rank's line, so they wait to be ended.
    """
    rank = os.environ.get("RANK", "")
    rank = int(rank) if rank.isdecimal() else 0
    if rank and problem:
        time.sleep(WAIT_FOR_MAIN + rank)
        if isinstance(error, SharedError):
            return
    what = problem or f"{type(error).__name__}: {error}"
    line = f"train_gpt.py: error: {f'rank {rank}: ' if rank else ''}{what}"
    log.failed(line, error=what, rank=rank)
    if problem == OTHER_RANK_ENDED:
        time.sleep(WAIT_FOR_END)
    # torchrun tells nothing of a signal to a rank, and of one to itself nothing but that.
    if problem and (problem.startswith("stopped by") or not left_to_torchrun(line)):
        print(line, file=sys.stderr, flush=True)


def left_to_torchrun(line: str) -> bool:
    """Gives torchrun the line to show in its last block, and says whether it did.

    Not if it will restart the ranks. Its traceback comes before that block (torch 2.9 to 2.13).
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if not path or restarts != os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
        return False
    message = {"message": f"\n{line}", "extraInfo": {"timestamp": int(time.time())}}
    Path(path).write_text(json.dumps({"message": message}))
    return True


def way_on(settings, source: str | Path, also_unset: str = "") -> str:
    """Words on how RUN_ID goes on from source; without RESUME, if that asks for something else."""
    s = settings
    asked = s.resume == "auto" or Path(s.resume) == source
    unset = [] if asked else [f"RESUME={shown(s.resume)}"]
    unset += [also_unset] if also_unset else []
    without = f"without {' '.join(unset)}, " if unset else ""
    return f"{without}RUN_ID={s.run_id} goes on from {source}"


def way_on_from_kept(settings, told: set[str]) -> str:
    """How to go on with what is kept of a run that was stopped, or whose disk is full, in words.

    told: the events of this start. OVERWRITE=1 does not go on from earlier starts.
    """
    s = settings
    path = Path(s.log_dir, f"{s.run_id}.jsonl")
    events = told if s.overwrite else last_records(path)
    if "final" in events:  # what is lacking is a file beside the score
        known = f"the run is finished, {path} has its score"
        return f"EVAL_ONLY=1 RUN_ID={s.run_id} scores it again: {known}"
    if "trained" in events:
        return way_on(s, "its artifact", "OVERWRITE=1" if s.overwrite else "")
    if any(path.exists() for path in s.checkpoint_paths):
        return way_on(s, "the last checkpoint")
    return f"RUN_ID={s.run_id} goes on from the start: nothing that it trained is kept"


def explain_failure(error: BaseException, log=None) -> str:
    """One line on what a user can mend, or has asked for; "" if the script itself is at fault."""
    full = getattr(error.__cause__, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
    if full or isinstance(error, KeyboardInterrupt):
        settings = log and log.settings
        trains = settings and not settings.eval_only
        way = way_on_from_kept(settings, log.told) if trains else "the same command starts over"
        return f"{error}; make room, and {way}" if full else f"stopped by {error}; {way}"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"cannot read or write {shown(error.filename)}: {error.strerror}"
    gpu = "GPU " if isinstance(error, torch.OutOfMemoryError) else ""
    if gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's
        return f"out of {gpu}memory: halve MICRO_BATCH_TOKENS, VAL_BATCH_SIZE or TTT_LORA_SLOTS"
    return explain_collective(error) if isinstance(error, RuntimeError) else ""


def explain_collective(error: RuntimeError) -> str:
    """Why a collective failed, if other ranks are to blame; "" for all other errors.

    gloo (seen with torch 2.13) raises plain RuntimeErrors, which only their text tells apart and
    which do not name the silent rank. So a rank that has timed out says so in the group's store:
    silent is who has not after 5 s. Needed until test_a_rank_that_stalls_is_named passes without.
    """
    if not dist.is_initialized():
        return ""
    if "imed out" in str(error):
        store = dist.distributed_c10d._get_default_store()
        store.set(f"rank {dist.get_rank()}", "")
        time.sleep(5)
        silent = [n for n in range(dist.get_world_size()) if not store.check([f"rank {n}"])]
        return f"ranks {silent} did not answer for {COLLECTIVE_SECONDS:g} s"
    gone = "closed by peer" in str(error) or "reset by peer" in str(error)
    return OTHER_RANK_ENDED if gone else ""


# ==================================================================================================
# 11. Fused kernels
#
# Section 4's scan and section 5's MLP and cross-entropy in Triton, for bfloat16 on NVIDIA GPUs.
# mamba_scan(), MLP.by_formula() and Model.nats() compute the same without, and tests compare.
#
# The scan, in order, on chunks of CHUNK tokens:
#
#   tokens_forward     a program per chunk: step sizes, decays, weights; normed keys and queries,
#                      and the product of a token's own
#   sum_turns          a program per 16 angles: the turns made in chunks, to those before each
#   rotate_features    a program per chunk and head: running angles, by which it turns keys and
#                      queries, unless scan_forward does
#   scan_forward       a program per head goes through the chunks, its state in registers
#   scan_backward      a program per head comes back through the chunks
#   features_backward  undoes rotate_features and the norms, summed over heads
#   sum_turns          likewise their gradient, from the last chunk on
#   tokens_backward    undoes the rest of tokens_forward
#
# They read in_proj's rows where they lie (gate, value, key, query, step, decay, trapezoid, angles),
# and write gradients alike. Decays are base-2 logarithms, for the GPU's own exponential is 2**x;
# angles are in turns, so that whole ones drop out exactly. Sums go through buffers, without
# atomics: two runs give the same bits. Keys, queries, biases and the state have their even entries
# first, then the odd ones, so that a pair to be rotated lies in two contiguous halves.
#
# Tensors, in section 4's letters, S.H and so on in kernels; `padded` is the length in whole chunks.
# Those marked * have in_proj's dtype, rotation float16, others float32. d_x is the gradient of x.
# A program's own places along B, length, H, N and R are b, t, h, n and r; k is its plane.
#
#   projected *   (B, length, WIDTH)    in_proj's rows, WIDTH being a multiple of 8
#   biases        (2, H, N)             of keys, of queries; likewise the norms' weights (2, N)
#   ssm_in, _out  (B, H, P, N)          the state before and after these tokens
#   turn_in       (B, H, R)             the running angle before them, in turns
#   y *           (B, length, H·P)      the outputs; squares (B, H, padded), summed over P
#   scalars       (6, B, H, padded)     numbers per token and head: planes below
#   features *    (2, B, padded, N)     keys, queries: normed, shared by the heads
#   half_turn     (B, padded, R)        tanh(angle rate) / 2, the turns of a step of size 1
#   turns         (B, chunks, H, R)     turns made in a chunk; after a sum, those before it
#   rotated *     (2, B, H, padded, N)  keys, queries: biased and rotated
#   rotation      (2, B, H, padded, R)  cos, sin of the running angle
#   states *      (B, H, chunks, P, N)  the state that enters each chunk
#
#   d_scalars     (4, B, H, padded)     k·dk, q·dq of each token, for the decays; and of its step,
#                                       by what it turns in its own part, by key and by query
#   d_diagonal    (B, H, padded)        what a token's output passes to its own value and key
#   d_end         (B, H, chunks, N)     the state's gradient times the state, after each chunk
#   d_turns       (B · parts, 2, H, R)  of the running angle, by key and by query, summed over a
#                                       part of the rows; later: the same of later chunks
#   d_half_turn   (2, B, padded, R)     of half_turn, by what a row turns in its own part
#   d_features    (B · parts, 2, H + 1, N)  of the biases and, last, of the norm, by part
#   d_heads       (B · chunks, 2, H)    of the step bias, and of skip, by chunk

# Planes: the first index of a buffer, by name. A kernel may read no global but such a constant.
STEP, DECAY_SUM, KEY_LOG, CURRENT, KEY_QUERY, WEIGHT = map(constexpr, range(6))  # of scalars
KEY, QUERY = map(constexpr, range(2))  # of features, rotated, biases, norms and their gradients
COS, SIN = map(constexpr, range(2))  # of rotation
# The model's constants, as section 4 has them, in the kernels' units.
LOG2_E = constexpr(math.log2(math.e))
TWO_PI = constexpr(2 * math.pi)
SLOWEST_DECAY = constexpr(DECAY_FLOOR)
RESET_LOG2_DECAY = constexpr(RESET_LOG_DECAY * math.log2(math.e))
FEATURE_EPS = constexpr(SCAN_NORM_EPS)
LEAST_WEIGHT = constexpr(1e-37)  # keeps a logarithm finite
LEAST_GATE = constexpr(1e-20)  # keeps a quotient finite
FAST = constexpr(os.environ.get("TRITON_INTERPRET") != "1")  # its interpreter has no instructions


# ---- Arithmetic, loads and stores ----------------------------------------------------------------


@jit
def approximate(x, instruction: constexpr):
    """One instruction of the GPU's; marked impure, lest the compiler compute it twice."""
    return tl.inline_asm_elementwise(instruction, "=f,f", [x], tl.float32, False, 1)


@jit
def exp2_tile(x):
    """2**x."""
    return approximate(x, "ex2.approx.ftz.f32 $0, $1;") if FAST else tl.exp2(x)


@jit
def reciprocal_tile(x):
    """1 / x."""
    return approximate(x, "rcp.approx.ftz.f32 $0, $1;") if FAST else 1.0 / x


@jit
def sigmoid_tile(x):
    """1 / (1 + exp(-x))."""
    return reciprocal_tile(1.0 + exp2_tile(x * -LOG2_E))


@jit
def softplus_tile(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + u) with u = exp(-|x|), which is 1 at most.

    log(1 + u) / u is a polynomial, off by 3e-8 at most: so a small u keeps all of its digits.
    """
    u = exp2_tile(tl.abs(x) * -LOG2_E)
    log = 0.0782259554 + u * (-0.0295052398 + u * 0.00523269409)
    log = -0.24842982 + u * (0.191060066 + u * (-0.136632457 + u * log))
    log = 0.99999994 + u * (-0.499994934 + u * (0.333190978 + u * log))
    return tl.maximum(x, 0.0) + u * log


@jit
def turn_cos_sin(turn):
    """cos and sin of 2·pi·turn.

    With a = pi·turn, half of that angle: cos 2a = 1 - 2 sin^2 a and sin 2a = 2 sin a cos a. Of a
    the polynomials are off by 1e-7 at most.
    """
    x = turn - tl.floor(turn + 0.5)  # whole turns drop out
    s = x * x
    sin = 2.55003138 + s * (-0.598045193 + s * 0.0772201602)
    sin = x * (3.14159258 + s * (-5.16770688 + s * sin))
    cos = 4.05841209 + s * (-1.33188109 + s * 0.219698463)
    cos = 0.999999954 + s * (-4.93479287 + s * cos)
    return 1.0 - 2.0 * sin * sin, 2.0 * sin * cos


@jit
def exact_dot(a, b, c=None):
    """a @ b, plus c, float32: of float32 factors without TF32, which would round them."""
    return tl.dot(a, b, c, input_precision="ieee")


@jit
def near_dot(a, b, dtype: constexpr):
    """a @ b of float32 factors; where all else has 16 bits (dtype), TF32 rounds them to 11."""
    precision: constexpr = "ieee" if dtype == tl.float32 else "tf32"
    return tl.dot(a, b, input_precision=precision)


@jit
def load_float(place, mask):
    """The numbers at these places, float32; 0 where mask is not set."""
    return tl.load(place, mask, 0.0).to(tl.float32)


@jit
def column_indices(count: constexpr):
    """(1, columns): 0, 1, ... for count columns or a few more, since tiles have powers of two."""
    return tl.arange(0, triton.next_power_of_2(count))[None, :]


@jit
def factor_columns(count: constexpr):
    """Likewise, but 16 at least, as a product's factors have."""
    return column_indices(count if count > 16 else 16)


@jit
def key_columns(b, t, length, S: constexpr):
    """Where the rows of tokens t have their first key column, in a tensor like projected."""
    return (b * length + t).to(tl.int64) * S.WIDTH + 2 * S.H * S.P


@jit
def feature_rows(features, k, b, t, batch, padded, S: constexpr):
    """Where the rows of tokens t begin in plane k of features."""
    return features + ((batch * k + b) * padded + t).to(tl.int64) * S.N


@jit
def head_rows(plane, head, t, batch, padded, S: constexpr):
    """Which rows tokens t have in tensors (planes, B, H, padded, ...); head: b · H + h, int64."""
    return (plane * batch * S.H + head) * padded + t


@jit
def turn_places(turns, b, h, r, S: constexpr):
    """Where turns (B, chunks, H, R) have the pairs r of heads h, for the chunk of this program."""
    chunk = b * tl.num_programs(0) + tl.program_id(0)
    return turns + (chunk * S.H + h) * S.R + r


@jit
def load_even_odd(place, mask, S: constexpr):
    """The even entries of keys or queries at these places, and their odd ones, half a row on."""
    other: constexpr = None if mask is None else 0.0
    return tl.load(place, mask, other), tl.load(place + S.N // 2, mask, other)


@jit
def load_float_even_odd(place, mask, S: constexpr):
    """Likewise, float32."""
    even, odd = load_even_odd(place, mask, S)
    return even.to(tl.float32), odd.to(tl.float32)


@jit
def store_even_odd(place, even, odd, mask, S: constexpr):
    """Stores what load_even_odd() reads."""
    tl.store(place, even, mask)
    tl.store(place + S.N // 2, odd, mask)


@jit
def norm_factor(x, S: constexpr):
    """1 / root mean square (rows, 1) of keys or queries x (rows, N)."""
    return tl.rsqrt(tl.sum(x * x, axis=1) / S.N + FEATURE_EPS)[:, None]


@jit
def state_offsets(head, S: constexpr):
    """Where a head's state (P, N) lies among others."""
    square = tl.arange(0, S.P)[:, None] * S.N + tl.arange(0, S.N)[None, :]
    return square + head.to(tl.int64) * S.P * S.N


@jit
def tile_pointers(tiles, place):
    """Where the numbers of the tile at a place (i, row, column) are, and which of them exist."""
    row = place[1] + tl.arange(0, tiles.HEIGHT)[:, None]
    column = place[2] + tl.arange(0, tiles.WIDTH)[None, :]
    matrix = tiles.tensor + (place[0] * tiles.rows).to(tl.int64) * tiles.columns
    return matrix + row * tiles.columns + column, row < tiles.rows


@jit
def read_tile(tiles, place):
    """The matrix at a place (i, row, column) of Tiles or of a tensor descriptor."""
    if isinstance(tiles, tl.tensor_descriptor):
        block = tiles.load(place)
        x = block.reshape(block.shape[1], block.shape[2])
    else:
        pointers, exist = tile_pointers(tiles, place)
        x = tl.load(pointers, exist, 0.0)
    return x


@jit
def read_row(tiles, place, count: constexpr):
    """The count numbers from a place (i, column) on, likewise."""
    if isinstance(tiles, tl.tensor_descriptor):
        x = tiles.load(place).reshape(count)
    else:
        row = tiles.tensor + place[0].to(tl.int64) * tiles.columns
        x = tl.load(row + place[1] + tl.arange(0, count))
    return x


@jit
def write_tile(tiles, place, x):
    """Stores matrix x at a place (i, row, column), in the tensor's dtype."""
    if isinstance(tiles, tl.tensor_descriptor):
        tiles.store(place, x.to(tiles.dtype).reshape(1, x.shape[0], x.shape[1]))
    else:
        pointers, exist = tile_pointers(tiles, place)
        tl.store(pointers, x, exist)


# ---- Tokens --------------------------------------------------------------------------------------
# Of a token's columns, for each head:
#
#   step       dt_t = softplus(step + bias)
#   log_decay  A_t dt_t log2(e), A_t = -max(softplus(decay), DECAY_FLOOR); fixed at document starts
#   decay_sum  D_t = sum of log_decay from the chunk's first token to t
#   current    c_t = lambda_t dt_t, with share lambda = sigmoid(trapezoid)
#   weight     w_t = c_t + (1 - lambda_{t+1}) dt_{t+1}: all that key t weighs; a call's last: c_t
#   key_log    D_t - log2 w_t, so that 2**(D_s - key_log_t) = w_t · decay from t to s
#
# and for each rotated pair the turns of a step of size 1, tanh(angle) / 2 = sigmoid(2 angle) - 1/2.
# The next token's columns are read again rather than exchanged between programs. A token's own
# product, which rotation does not change, is of what the heads share and of their biases:
#
#   (k + k_bias)·(q + q_bias) = k·q + k·q_bias + q·k_bias + k_bias·q_bias
@jit
def load_dynamics(row, live, step_bias, h, S: constexpr):
    """Raw step, step, raw decay, decay rate A, and lambda, each (CHUNK, heads)."""
    mask = live & (h < S.H)
    place = row + h
    raw_step = load_float(place, mask) + load_float(step_bias + h, h < S.H)
    step = tl.where(mask, softplus_tile(raw_step), 0.0)
    raw_decay = load_float(place + S.H, mask)
    rate = -tl.maximum(softplus_tile(raw_decay), SLOWEST_DECAY)
    return raw_step, step, raw_decay, rate, sigmoid_tile(load_float(place + 2 * S.H, mask))


@jit
def at_starts(x, value, starts, b, token, length):
    """x (CHUNK, heads), but for the tokens that start a document: of these value."""
    if starts is not None:
        start = tl.load(starts + b * length + token, token < length, 0)
        x = tl.where(start[:, None] != 0, value, x)
    return x


@jit
def times_exactly(a, b):
    """a of 16 bits @ b of 32, which is split in two of 16."""
    rounded = b.to(a.dtype)
    rest = (b - rounded.to(tl.float32)).to(a.dtype)
    return exact_dot(a, rest, exact_dot(a, rounded))


@jit
def store_normed(features, x, norms, k, b, t, batch, padded, S: constexpr):
    """Stores a chunk's keys or queries x (CHUNK, N), normed, and returns them."""
    x = x.to(tl.float32)
    x *= norm_factor(x, S)
    x *= tl.load(norms + k * S.N + tl.arange(0, S.N)[None, :])
    x = x.to(features.dtype.element_ty)
    even, odd = tl.split(tl.reshape(x, [S.CHUNK, S.N // 2, 2]))
    place = feature_rows(features, k, b, t, batch, padded, S) + tl.arange(0, S.N // 2)[None, :]
    store_even_odd(place, even, odd, None, S)
    return x


@jit
def store_key_query(scalars, key, query, biases, b, t, batch, padded, S: constexpr):
    """Writes scalars' KEY_QUERY of the tokens t (CHUNK, 1), by 16 heads."""
    n = tl.arange(0, S.N)[:, None]
    n = n // 2 + n % 2 * (S.N // 2)  # where biases have it, even entries first
    shared = tl.sum(key.to(tl.float32) * query.to(tl.float32), axis=1)[:, None]
    for first in range(0, S.H, 16):
        h = first + tl.arange(0, 16)[None, :]
        heads = h < S.H
        key_bias = load_float(biases + h * S.N + n, heads)
        query_bias = load_float(biases + (S.H + h) * S.N + n, heads)
        key_query = times_exactly(key, query_bias) + times_exactly(query, key_bias)
        key_query += shared + tl.sum(key_bias * query_bias, axis=0)[None, :]
        place = scalars + ((KEY_QUERY * batch + b) * S.H + h) * padded + t
        tl.store(place, key_query, heads)


@jit
def tokens_forward(
    projected,
    step_bias,
    norms,
    biases,
    starts,  # (B, length) bool: where documents start; or None
    scalars,  # out
    features,  # out
    half_turn,  # out
    turns,  # out
    length,
    batch,
    S: constexpr,
):
    """A chunk's keys and queries, normed, its scalars, and the turns it makes."""
    b = tl.program_id(1)
    padded = tl.num_programs(0) * S.CHUNK
    token = tl.program_id(0) * S.CHUNK + tl.arange(0, S.CHUNK)
    n = tl.arange(0, S.N)[None, :]
    t = token[:, None]
    h = column_indices(S.H)
    r = column_indices(S.R)
    live = t < length
    heads = h < S.H
    turning = r < S.R
    columns = projected + key_columns(b, t, length, S)
    row = columns + 2 * S.N
    # What is read is asked for here, before anything waits for it.
    key = tl.load(columns + n, live, 0.0)
    query = tl.load(columns + S.N + n, live, 0.0)
    angle = load_float(row + 3 * S.H + r, live & turning)
    _, step, _, rate, share = load_dynamics(row, live, step_bias, h, S)
    _, next_step, _, _, next_share = load_dynamics(row + S.WIDTH, t + 1 < length, step_bias, h, S)
    current = step * share
    weight = current + next_step * (1.0 - next_share)
    log_decay = at_starts(rate * step * LOG2_E, RESET_LOG2_DECAY, starts, b, token, length)
    decay_sum = tl.cumsum(log_decay, axis=0)
    key_log = decay_sum - tl.log2(tl.maximum(weight, LEAST_WEIGHT))
    plane = batch * S.H * padded
    place = scalars + (b * S.H + h) * padded + t
    tl.store(place + plane * STEP, step, heads)
    tl.store(place + plane * DECAY_SUM, decay_sum, heads)
    tl.store(place + plane * KEY_LOG, key_log, heads)
    tl.store(place + plane * CURRENT, current, heads)
    tl.store(place + plane * WEIGHT, weight, heads)
    half = tl.where(live, sigmoid_tile(2.0 * angle) - 0.5, 0.0)
    tl.store(half_turn + (b * padded + t) * S.R + r, half, turning)
    made = exact_dot(tl.trans(step), half)  # (heads, R)
    tl.store(turn_places(turns, b, tl.trans(h), r, S), made, tl.trans(heads) & turning)
    key = store_normed(features, key, norms, KEY, b, t, batch, padded, S)
    query = store_normed(features, query, norms, QUERY, b, t, batch, padded, S)
    store_key_query(scalars, key, query, biases, b, t, batch, padded, S)


# ---- Turns before a chunk ------------------------------------------------------------------------
# With turns[b, c] of a chunk c in all, and start[b] before the first or, back, after the last:
#
#   around[b, c] = start[b] + sum over c' < c of turns[b, c'],    end[b] = start[b] + all of them
#
# and back with c' > c. One kernel: torch's functions took nine launches, and its cumsum has no
# deterministic form. Sums are float64, for a long text makes many turns.
#
# S: PARTS, a power of two, are added up first; of COUNT angles a program has BLOCK, and of chunks
# AT_ONCE in registers.
SumSizes = collections.namedtuple("SumSizes", "COUNT PARTS BACK AT_ONCE BLOCK")


@jit
def sum_turns(turns, start, around, end, chunks, S: constexpr):
    """Of turns (B, chunks, PARTS, COUNT) and start (B, COUNT): around; end, without whole turns."""
    COUNT: constexpr = S.COUNT
    BLOCK: constexpr = S.BLOCK
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    exist = n < COUNT
    first = tl.load(start + b * COUNT + n, exist, 0.0)
    total = tl.zeros([BLOCK], tl.float64)
    part = tl.arange(0, S.PARTS)[None, :, None]
    for block in range(0, chunks, S.AT_ONCE):
        c = block + tl.arange(0, S.AT_ONCE)
        if S.BACK:
            c = chunks - 1 - c
        place = b * chunks + c[:, None]
        mask = (c >= 0)[:, None] & (c < chunks)[:, None] & exist[None, :]
        rows = place[:, :, None] * S.PARTS + part
        made = tl.load(turns + rows * COUNT + n[None, None, :], mask[:, None, :], 0.0)
        made = tl.sum(made, axis=1).to(tl.float64)
        passed = tl.cumsum(made, axis=0) - made + total[None, :]
        passed = first[None, :] + passed.to(tl.float32)
        tl.store(around + place * COUNT + n[None, :], passed, mask)
        total += tl.sum(made, axis=0)
    last = first + total.to(tl.float32)
    if not S.BACK:
        last -= tl.floor(last)
    tl.store(end + b * COUNT + n, last, exist)


# ---- Rotation ------------------------------------------------------------------------------------
# For each head, with the running angle a_t = turns before the chunk + sum of dt_s half_turn_s to t:
#
#   even' = even cos a_t - odd sin a_t,  odd' = even sin a_t + odd cos a_t
#
# of key + key bias and query + query bias. Pairs after the first R have half_turn 0 and stay. On a
# GPU that moves tiles by an instruction scan_forward turns them itself (rotates_in_scan() says of
# which sizes), and keeps them for the backward: features, which the heads share, come from a cache.
@jit
def rotate_features(
    scalars, features, half_turn, turns, biases, rotated, rotation, batch, S: constexpr
):
    """Writes rotation for a chunk of one head, and its rotated keys and queries, if not None."""
    h = tl.program_id(1)
    b = tl.program_id(2)
    padded = tl.num_programs(0) * S.CHUNK
    head = (b * S.H + h).to(tl.int64)
    token = tl.program_id(0) * S.CHUNK + tl.arange(0, S.CHUNK)
    n = column_indices(S.R if rotated is None else S.N // 2)
    t = token[:, None]
    turning = n < S.R
    half = load_float(half_turn + (b * padded + t) * S.R + n, turning)
    step = tl.load(scalars + head_rows(STEP, head, token, batch, padded, S))
    before = tl.load(turn_places(turns, b, h, n, S), turning, 0.0)
    if rotated is not None:  # loads wait for nothing here, and behind the sum for all warps
        keys = feature_rows(features, 0, b, t, batch, padded, S) + n
        queries = feature_rows(features, 1, b, t, batch, padded, S) + n
        even_key, odd_key = load_even_odd(keys, None, S)
        even_query, odd_query = load_even_odd(queries, None, S)
    made = tl.cumsum(step[:, None] * half, axis=0)
    cos, sin = turn_cos_sin(made + before)
    tl.store(rotation + head_rows(COS, head, t, batch, padded, S) * S.R + n, cos, turning)
    tl.store(rotation + head_rows(SIN, head, t, batch, padded, S) * S.R + n, sin, turning)
    if rotated is not None:
        for k in tl.static_range(2):  # key, then query
            even = even_key if k == 0 else even_query
            odd = odd_key if k == 0 else odd_query
            even_bias, odd_bias = load_even_odd(biases + (k * S.H + h) * S.N + n, None, S)
            even += even_bias
            odd += odd_bias
            place = rotated + head_rows(k, head, t, batch, padded, S) * S.N + n
            store_even_odd(place, even * cos - odd * sin, even * sin + odd * cos, None, S)


# Of a row, [even | odd], the first half of either turns, and the other stays. Parted and joined
# again, each thread has what it computes with: nothing is exchanged.
@jit
def rotate_tile(features, bias, rotated, k, head, t, cos, sin, batch, S: constexpr):
    """A chunk's keys or queries (CHUNK, N) for one head, biased and rotated; writes them too."""
    x = read_tile(features, [k * batch + head // S.H, t, 0])
    x += bias[None, :]
    x = tl.permute(tl.reshape(x, [S.CHUNK, 2, 2, S.R]), [0, 3, 1, 2])
    turning, others = tl.split(x)
    even, odd = tl.split(turning)  # each (CHUNK, R)
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    x = tl.permute(tl.join(turned, others), [0, 2, 3, 1])
    x = tl.reshape(x.to(features.dtype), [S.CHUNK, S.N])
    write_tile(rotated, [batch * k * S.H + head, t, 0], x)
    return x


# ---- Scan, forward -------------------------------------------------------------------------------
# Within a chunk, with keys K, queries Q (C, N), values V (C, P), h (P, N) the state S that enters:
#
#   E_ts = 2**(D_t - key_log_s) for s < t,  c_t for s = t,  0 for s > t
#   out  = (Q K^T ∘ E + skip I) V + 2**D ∘ (Q h^T)
#   y    = out ∘ gate sigmoid(gate)
#   h'   = 2**D_C h + (2**(D_C - key_log) ∘ V)^T K, D_C being D at the chunk's end
#
# On the diagonal the scalars' c_t (q_t·k_t) + skip stands, which no rounding of keys and queries
# touches. Padding after the sequence has step 0, so it changes no state. A program walks through
# the chunks of one head: the state never leaves its registers but for a copy for the backward.
@jit
def read_rotated(rotated, features, rotation, biases, head, t, batch, S: constexpr):
    """A chunk's keys and queries for one head, each (CHUNK, N); of rotation, if not None, made."""
    if rotation is None:
        key = read_tile(rotated, [batch * KEY * S.H + head, t, 0])
        query = read_tile(rotated, [batch * QUERY * S.H + head, t, 0])
    else:
        turn = rotation.load([0, head, t, 0]).reshape(2, S.CHUNK, S.R).to(tl.float32)
        cos, sin = tl.split(tl.permute(turn, [1, 2, 0]))
        both = biases.load([0, head % S.H, 0]).reshape(2, S.N)
        key_bias, query_bias = tl.split(tl.trans(both))
        key = rotate_tile(features, key_bias, rotated, KEY, head, t, cos, sin, batch, S)
        query = rotate_tile(features, query_bias, rotated, QUERY, head, t, cos, sin, batch, S)
    return key, query


@jit
def read_chunk(projected, scalars, decay_sums, skip, head, place, t, batch, S: constexpr):
    """A chunk's values for one head; D_C; and D, key_log, c and the diagonal, each (CHUNK,)."""
    heads = batch * S.H
    value = read_tile(projected, [head // S.H, t, (S.H + head % S.H) * S.P])
    end = tl.load(decay_sums + place * S.CHUNK + S.CHUNK - 1)
    if isinstance(scalars, tl.tensor_descriptor):  # four planes at once
        planes = scalars.load([DECAY_SUM, head, t]).reshape(2, 2, S.CHUNK)
        first, second = tl.split(tl.permute(planes, [2, 0, 1]))
        decay_sum, current = tl.split(first)
        key_log, key_query = tl.split(second)
    else:
        decay_sum = read_row(scalars, [heads * DECAY_SUM + head, t], S.CHUNK)
        key_log = read_row(scalars, [heads * KEY_LOG + head, t], S.CHUNK)
        current = read_row(scalars, [heads * CURRENT + head, t], S.CHUNK)
        key_query = read_row(scalars, [heads * KEY_QUERY + head, t], S.CHUNK)
    own = current * key_query + skip
    return value, end, decay_sum, key_log, current, own


@jit
def gate_and_sigmoid(gate):
    """The gate, float32, never 0, so that y / gate tells the backward what was gated; sigmoid."""
    gate = gate.to(tl.float32) + LEAST_GATE  # whose negative is no number of 16 bits
    return gate, sigmoid_tile(gate)


@jit
def scan_forward(
    projected,  # Tiles or tensor descriptors: (CHUNK, P)
    features,  # (CHUNK, N)
    rotation,  # (2, CHUNK, R); or None, and rotated is read
    biases,  # (N,)
    rotated,  # else out, (CHUNK, N)
    y,  # out, (CHUNK, P)
    states,  # out, (P, N)
    scalars,  # (CHUNK,)
    decay_sums,  # from here on tensors: the plane DECAY_SUM of scalars
    skip,
    ssm_in,
    ssm_out,  # out
    squares,  # out
    batch,
    chunks,
    S: constexpr,
):
    """Goes through one head's chunks, and stores the state that enters each."""
    head = tl.program_id(0)
    b = head // S.H
    h = head % S.H
    i = tl.arange(0, S.CHUNK)
    square = state_offsets(head, S)
    d = tl.load(skip + h)
    ssm = tl.load(ssm_in + square)
    for chunk in tl.range(chunks, num_stages=3 if S.N <= 64 else 2):  # two programs fit
        t = chunk * S.CHUNK
        place = head * chunks + chunk
        value, end, decay_sum, key_log, current, own = read_chunk(
            projected, scalars, decay_sums, d, head, place, t, batch, S
        )
        key, query = read_rotated(rotated, features, rotation, biases, head, t, batch, S)
        dtype = value.dtype
        old = ssm.to(dtype)
        write_tile(states, [place, 0, 0], old)
        scores = exact_dot(query, tl.trans(key))
        exponents = decay_sum[:, None] - key_log[None, :]
        decayed = tl.where(i[:, None] > i[None, :], scores * exp2_tile(exponents), 0.0)
        decayed = tl.where(i[:, None] == i[None, :], own[:, None], decayed)
        out = exact_dot(query, tl.trans(old)) * exp2_tile(decay_sum)[:, None]
        out = exact_dot(decayed.to(dtype), value, out)
        gate, sigmoid = gate_and_sigmoid(read_tile(projected, [b, t, h * S.P]))
        out *= gate * sigmoid
        write_tile(y, [b, t, h * S.P], out)
        tl.store(squares + place * S.CHUNK + i, tl.sum(out * out, axis=1))
        to_end = (value * exp2_tile(end - key_log)[:, None]).to(dtype)
        ssm = exact_dot(tl.trans(to_end), key, ssm * exp2_tile(end))
    tl.store(ssm_out + square, ssm)


# ---- Scan, backward ------------------------------------------------------------------------------
# With G the gradient by out, M = Q K^T ∘ E + skip I and dM = G V^T, as above:
#
#   dV = M^T G + 2**(D_C - key_log) ∘ (K dh'^T)
#   dK = (dM ∘ E)^T Q + 2**(D_C - key_log) ∘ (V dh')
#   dQ = (dM ∘ E) K + (2**D ∘ G) h
#   dh = 2**D_C dh' + (2**D ∘ G)^T Q
#
# diag(dM) holds what c_t and skip get. No gradient of E is formed: all that scales with 2**D_t is
# in q_t·dq_t, all that scales with 2**-key_log_t in k_t·dk_t, and all that scales with 2**D_C in
# sum(dh' ∘ h'). Scores are computed again, transposed, as dK and dV want them; h comes from states;
# and out from y / (gate sigmoid(gate)), which saves a buffer as large as y. The state's gradient is
# kept transposed, (N, P): so no product has to turn what was computed, but for one result.
@jit
def gate_backward(d_y, d_squares, projected, y, d_projected, place, head):
    """Stores the gate's gradient and returns G, that of out, float32."""
    gate, sigmoid = gate_and_sigmoid(read_tile(projected, place))
    gated = read_tile(y, place).to(tl.float32)
    d_gated = read_tile(d_y, place)
    d_square = read_row(d_squares, [head, place[1]], gated.shape[0])
    d_gated += 2.0 * d_square[:, None] * gated
    d_gate = d_gated * gated
    # The slope of u = gate sigmoid(gate) is u (1 / gate + 1 - sigmoid(gate)).
    d_gate *= reciprocal_tile(gate) + 1.0 - sigmoid
    write_tile(d_projected, place, d_gate)
    return d_gated * gate * sigmoid


@jit
def transposed_decay(decay_sum, key_log, current):
    """E^T (CHUNK, CHUNK)."""
    i = tl.arange(0, current.shape[0])
    exponents = decay_sum[None, :] - key_log[:, None]
    decay = tl.where(i[:, None] < i[None, :], exp2_tile(exponents), 0.0)
    return tl.where(i[:, None] == i[None, :], current[:, None], decay)


@jit
def scan_backward(
    d_y,  # Tiles or tensor descriptors, as scan_forward's
    d_squares,
    projected,
    rotated,
    y,
    states,
    d_projected,  # out: gate and value
    d_rotated,  # out
    scalars,
    decay_sums,  # from here on tensors
    skip,
    d_ssm_out,
    ssm_out,
    d_diagonal,  # out: diag(dM)
    d_end,  # out: sum(dh' ∘ h') over P, of each chunk
    d_ssm_in,  # out
    batch,
    chunks,
    S: constexpr,
):
    """Comes back through the chunks of scan_forward(), with the state's gradient in registers."""
    head = tl.program_id(0)
    b = head // S.H
    h = head % S.H
    square = tl.trans(state_offsets(head, S))  # (N, P)
    d = tl.load(skip + h)
    i = tl.arange(0, S.CHUNK)
    same = i[:, None] == i[None, :]
    d_ssm = tl.load(d_ssm_out + square)
    at_end = tl.sum(d_ssm * tl.load(ssm_out + square), axis=1)  # unsummed over N: no barrier
    for back in tl.range(chunks, num_stages=2):
        chunk = chunks - 1 - back
        t = chunk * S.CHUNK
        place = head * chunks + chunk
        tl.store(d_end + place * S.N + tl.arange(0, S.N), at_end)
        exact = gate_backward(d_y, d_squares, projected, y, d_projected, [b, t, h * S.P], head)
        value, end, decay_sum, key_log, current, own = read_chunk(
            projected, scalars, decay_sums, d, head, place, t, batch, S
        )
        key, query = read_rotated(rotated, None, None, None, head, t, batch, S)
        to_end = exp2_tile(end - key_log)[:, None]
        old = d_ssm.to(value.dtype)
        d_out = exact.to(value.dtype)
        decay = transposed_decay(decay_sum, key_log, current)
        decayed = tl.where(same, own[:, None], exact_dot(key, tl.trans(query)) * decay)
        d_value = exact_dot(decayed.to(key.dtype), d_out, exact_dot(key, old) * to_end)
        write_tile(d_projected, [b, t, (S.H + h) * S.P], d_value)
        d_decayed = exact_dot(value, tl.trans(d_out))  # dM transposed
        tl.store(d_diagonal + place * S.CHUNK + i, tl.sum(tl.where(same, d_decayed, 0.0), axis=1))
        d_scores = (d_decayed * decay).to(value.dtype)
        d_key = exact_dot(d_scores, query, exact_dot(value, tl.trans(old)) * to_end)
        write_tile(d_rotated, [batch * KEY * S.H + head, t, 0], d_key)
        d_state = (exact * exp2_tile(decay_sum)[:, None]).to(value.dtype)
        ssm = tl.trans(read_tile(states, [place, 0, 0]))
        d_query = exact_dot(tl.trans(key), d_scores, exact_dot(ssm, tl.trans(d_state)))
        write_tile(d_rotated, [batch * QUERY * S.H + head, t, 0], tl.trans(d_query))
        d_ssm = exact_dot(tl.trans(query), d_state, d_ssm * exp2_tile(end))
        at_end = tl.sum(d_ssm * ssm, axis=1)
    tl.store(d_ssm_in + square, d_ssm)


# ---- Rotation and norms, backward ----------------------------------------------------------------
# For each head, rotation is undone by the opposite angle; with u what was rotated and du its
# gradient, the angle's is even(u) odd(du) - odd(u) even(du), times 2·pi for turns, and u·du goes to
# d_scalars for the decays. u is not kept: it is features + bias again. A token's turn moves all
# later ones: what its own part of the rows gives its step and half_turn is summed up here, and
# what later parts give by tokens_backward. Over the heads, du sums up to the gradient of a normed
# row z = w ∘ x̂, with x̂ = x / rms(x):
#
#   dx = (w ∘ dz - x̂ mean(w ∘ dz ∘ x̂)) / rms(x),  dw = sum over tokens of dz ∘ x̂
#
# A program is one warp with few rows: nothing waits at barriers. Sums over its rows are products
# with ones where tensor cores take them (MULTIPLY), for as sums each number would pass from thread
# to thread three times. They go to rows of the program's own, added up later by matmul.
@jit
def sum_rows(x, ones, MULTIPLY: constexpr):
    """The sums over the rows of x (rows, columns), rounded to 16 bits first: in 1 or 16 rows."""
    return exact_dot(ones, x.to(ones.dtype)) if MULTIPLY else tl.sum(x, axis=0)[None, :]


@jit
def sum_rows_exactly(x, ones, MULTIPLY: constexpr):
    """Likewise, but not rounded."""
    return times_exactly(ones, x) if MULTIPLY else tl.sum(x, axis=0)[None, :]


@jit
def sum_onward(x, onward, MULTIPLY: constexpr):
    """Of x (rows, columns), not rounded: for each row the sum from it to the last.

    onward: (rows, rows), 1 where the other row is not before, else 0.
    """
    return times_exactly(onward, x) if MULTIPLY else tl.cumsum(x, axis=0, reverse=True)


@jit
def put_row(x, i, row):
    """x (rows, columns), but with row, or that row of it, in the place of its row i."""
    return tl.where(tl.arange(0, x.shape[0])[:, None] == i, row, x)


@jit
def put_sum(sums, i, x, ones, MULTIPLY: constexpr):
    """sums, but with the sum over the rows of x in row i."""
    return put_row(sums, i, sum_rows(x, ones, MULTIPLY))


@jit
def pair_columns(S: constexpr):
    """Which pairs of a row turn, and which of the tile exist; likewise those that do not turn."""
    r = column_indices(S.R)
    OTHERS: constexpr = S.N // 2 - S.R
    o = S.R + column_indices(OTHERS if OTHERS > 0 else 1)
    return r, r < S.R, o, o < S.N // 2


@jit
def no_sums(ROWS: constexpr, r, o):
    """Zeros for sums of even and odd entries of pairs that turn, and of the others."""
    sums = tl.zeros([ROWS, r.shape[1]], tl.float32)
    other_sums = tl.zeros([ROWS, o.shape[1]], tl.float32)
    return sums, sums, other_sums, other_sums


@jit
def add_biases(even, odd, biases, mask, S: constexpr):
    """Even and odd entries, biased, as rotate_features() rotated them."""
    even_bias, odd_bias = load_even_odd(biases, mask, S)
    return even + even_bias, odd + odd_bias


@jit
def undo_rotation(d_rotated, angle, plane, mask, S: constexpr):
    """The gradients of what turned, from those there, of what came of it.

    angle: where its cosines are; plane: of how many heads' tokens, after which the sines follow.
    """
    even, odd = load_even_odd(d_rotated, mask, S)
    cos = load_float(angle, mask)
    sin = load_float(angle + plane.to(tl.int64) * S.R, mask)
    return even * cos + odd * sin, odd * cos - even * sin


@jit
def feature_sums(d_features, row, h, S: constexpr):
    """Where a row of d_features has the sums for head h's biases, or for the norm as h = H."""
    return d_features + (row * (S.H + 1) + h) * S.N


@jit
def norm_backward(d_normed, place, live, norms, k, d_features, row, S: constexpr):
    """Stores dw, summed over tokens, as a row of d_features, and returns dx of the rows there."""
    x = load_float(place, live)
    n = tl.arange(0, S.N)[None, :]
    factor = norm_factor(x, S)
    x *= factor
    d_weight = tl.sum(d_normed * x, axis=0)
    tl.store(feature_sums(d_features, row, S.H, S) + n, d_weight[None, :])
    d_normed *= tl.load(norms + k * S.N + n)
    along = tl.sum(d_normed * x, axis=1) / S.N
    return factor * (d_normed - x * along[:, None])


@jit
def add_own_turns(d_half, half, turned, step, place):
    """d_half with what a head's turns add to it; stores at place what they add to its steps."""
    tl.store(place, tl.sum(half * turned, axis=1)[:, None])
    return d_half + step[:, None] * turned


@jit
def heads_backward(given, found, k, part, b, batch, ROWS: constexpr, S: constexpr):
    """Sums of du over the heads, of ROWS keys or queries; stores what heads have of their own.

    Even and odd entries of pairs that turn, then of others. given: what it reads; found: stores.
    """
    features, scalars, half_turn, rotation, biases, d_rotated = given
    d_scalars, d_half_turn, d_turns, d_features = found
    padded = tl.num_programs(1) * ROWS
    token = part * ROWS + tl.arange(0, ROWS)
    t = token[:, None]
    r, turning, o, still = pair_columns(S)
    MULTIPLY: constexpr = ROWS >= 16 and S.R >= 8  # the least that tensor cores do
    feature = feature_rows(features, k, b, t, batch, padded, S)
    even, odd = load_float_even_odd(feature + r, turning, S)
    other_even, other_odd = load_float_even_odd(feature + o, still, S)
    half = load_float(half_turn + (b * padded + t) * S.R + r, turning)
    onward = (t <= token[None, :]).to(d_rotated.dtype.element_ty)
    ones = tl.full([16, ROWS], 1.0, onward.dtype)
    d_half = tl.zeros_like(half)
    sum_even, sum_odd, sum_other_even, sum_other_odd = no_sums(ROWS, r, o)
    row = ((b * tl.num_programs(1) + part) * 2 + k).to(tl.int64)
    plane = batch * S.H * padded
    for first in range(0, S.H, 16):
        turns = tl.zeros([16, r.shape[1]], tl.float32)
        evens, odds, other_evens, other_odds = no_sums(16, r, o)
        for i in tl.range(0, tl.minimum(16, S.H - first), num_stages=3):
            head = (b * S.H + first + i).to(tl.int64)
            place = head_rows(k, head, t, batch, padded, S)
            bias = biases + (k * S.H + first + i) * S.N
            u_even, u_odd = add_biases(even, odd, bias + r, turning, S)
            rows = d_rotated + place * S.N
            angle = rotation + head_rows(COS, head, t, batch, padded, S) * S.R + r
            d_even, d_odd = undo_rotation(rows + r, angle, plane, turning, S)
            sum_even += d_even
            sum_odd += d_odd
            evens = put_sum(evens, i, d_even, ones, MULTIPLY)
            odds = put_sum(odds, i, d_odd, ones, MULTIPLY)
            turned = TWO_PI * (u_even * d_odd - u_odd * d_even)
            turns = put_row(turns, i, sum_rows_exactly(turned, ones, MULTIPLY))
            turned = sum_onward(turned, onward, MULTIPLY)
            step = tl.load(scalars + head_rows(STEP, head, token, batch, padded, S))
            d_half = add_own_turns(d_half, half, turned, step, d_scalars + place + 2 * plane)
            along = tl.sum(u_even * d_even + u_odd * d_odd, axis=1)
            if S.N > 2 * S.R:
                u_even, u_odd = add_biases(other_even, other_odd, bias + o, still, S)
                d_even, d_odd = load_float_even_odd(rows + o, still, S)
                sum_other_even += d_even
                sum_other_odd += d_odd
                other_evens = put_sum(other_evens, i, d_even, ones, MULTIPLY)
                other_odds = put_sum(other_odds, i, d_odd, ones, MULTIPLY)
                along += tl.sum(u_even * d_even + u_odd * d_odd, axis=1)
            tl.store(d_scalars + place, along[:, None])
        heads = first + tl.arange(0, 16)[:, None]
        tl.store(d_turns + (row * S.H + heads) * S.R + r, turns, (heads < S.H) & turning)
        place = feature_sums(d_features, row, heads, S)
        store_even_odd(place + r, evens, odds, (heads < S.H) & turning, S)
        if S.N > 2 * S.R:
            store_even_odd(place + o, other_evens, other_odds, (heads < S.H) & still, S)
    tl.store(d_half_turn + ((k * batch + b) * padded + t) * S.R + r, d_half, turning)
    return sum_even, sum_odd, sum_other_even, sum_other_odd


@jit
def features_backward(
    projected,
    features,
    scalars,
    half_turn,
    rotation,
    norms,
    biases,
    d_rotated,
    d_projected,  # out: key, query
    d_scalars,  # out
    d_half_turn,  # out
    d_turns,  # out
    d_features,  # out
    length,
    batch,
    ROWS: constexpr,
    S: constexpr,
):
    """Undoes rotate_features() and the norm of ROWS keys, or of ROWS queries, summed over heads."""
    k = tl.program_id(0)  # KEY or QUERY: side by side, they find rotation in a cache
    part = tl.program_id(1)
    b = tl.program_id(2)
    given = features, scalars, half_turn, rotation, biases, d_rotated
    found = d_scalars, d_half_turn, d_turns, d_features
    sums = heads_backward(given, found, k, part, b, batch, ROWS, S)
    pairs = tl.join(sums[0], sums[1])
    if S.N > 2 * S.R:
        pairs = tl.permute(tl.join(pairs, tl.join(sums[2], sums[3])), [0, 3, 1, 2])
    total = tl.reshape(pairs, [ROWS, S.N])
    t = part * ROWS + tl.arange(0, ROWS)[:, None]
    row = ((b * tl.num_programs(1) + part) * 2 + k).to(tl.int64)
    place = key_columns(b, t, length, S) + k * S.N + tl.arange(0, S.N)[None, :]
    total = norm_backward(total, projected + place, t < length, norms, k, d_features, row, S)
    tl.store(d_projected + place, total, t < length)


# ---- Tokens, backward ----------------------------------------------------------------------------
# From k·dk, q·dq, diag(dM), sum(dh' ∘ h') and the running angle's gradient to in_proj's columns:
#
#   dc_t = dM_tt (q_t·k_t) + dw_t,  dw_t = (k_t·dk_t - dM_tt c_t (q_t·k_t)) / w_t
#   d log_decay_s = sum over t >= s of (q_t·dq_t - k_t·dk_t), and the chunk's sum(dh' ∘ h')
#   d step_t = lambda_t dc_t + A_t d log_decay_t + (1 - lambda_t) dw_{t-1} + half_turn_t·d turn_t
#
# in natural logarithms: 2**(log_decay log2(e)) is exp(log_decay), so log2(e) never comes up here.
# Steps, rates and shares are computed again from their columns, which is cheaper than reading them.
@jit
def key_weight_backward(scalars, d_scalars, d_diagonal, place, mask, plane):
    """dc_t and dw_t; dM_tt (q_t·k_t) is what c_t gets from its own token."""
    own = load_float(d_diagonal + place, mask)
    own *= load_float(scalars + place + plane * KEY_QUERY, mask)
    later = load_float(d_scalars + place + plane * KEY, mask)
    later -= own * load_float(scalars + place + plane * CURRENT, mask)
    weight = tl.load(scalars + place + plane * WEIGHT, mask, 1.0)
    d_weight = later / tl.maximum(weight, LEAST_WEIGHT)
    return own + d_weight, d_weight


@jit
def turns_backward(
    d_step,
    step,
    half_turn,
    d_half_turn,
    d_turns,
    later,
    d_row,
    b,
    token,
    live,
    batch,
    ROWS: constexpr,
    S: constexpr,
):
    """Stores the angles' gradient; returns d_step (CHUNK, heads) with what the turns add to it.

    d_half_turn and d_step have what a token turns in its own part, of ROWS rows. To them comes what
    it turns in the chunk's later parts, whose sums d_turns has, and in later chunks.
    """
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    t = token[:, None]
    h = tl.trans(factor_columns(S.H))
    r = factor_columns(S.R)
    turning = live & (r < S.R)
    place = (b * chunks * S.CHUNK + t) * S.R + r
    half = load_float(half_turn + place, turning)
    d_half = load_float(d_half_turn + place, turning)
    d_half += load_float(d_half_turn + place + batch * chunks * S.CHUNK * S.R, turning)
    exist = (h < S.H) & (r < S.R)
    turned = load_float(turn_places(later, b, h, r, S), exist)  # (heads, R)
    dtype: constexpr = d_row.dtype.element_ty
    PARTS: constexpr = S.CHUNK // ROWS
    for back in tl.static_range(PARTS):
        part = PARTS - 1 - back
        mine = (t - chunk * S.CHUNK) // ROWS == part
        d_half += near_dot(tl.where(mine, step, 0.0), turned, dtype)
        d_step += near_dot(tl.where(mine, half, 0.0), tl.trans(turned), dtype)
        row = ((b * chunks + chunk) * PARTS + part) * 2
        turned += load_float(d_turns + (row * S.H + h) * S.R + r, exist)  # by keys
        turned += load_float(d_turns + ((row + 1) * S.H + h) * S.R + r, exist)
    slope = 0.5 - 2.0 * half * half  # of tanh(angle) / 2
    tl.store(d_row + 3 * S.H + r, d_half * slope, turning)
    return d_step


@jit
def own_turns_backward(d_scalars, mask, plane):
    """What the turns that steps make in their own parts give them, by keys and by queries."""
    by_keys = load_float(d_scalars + plane * (2 + KEY), mask)
    return by_keys + load_float(d_scalars + plane * (2 + QUERY), mask)


@jit
def store_by_heads(place, d_bias, d_skip, S: constexpr):
    """Stores the sums over tokens of the gradients (CHUNK, heads) of step biases, then of skips."""
    h = factor_columns(S.H)
    tl.store(place + h, tl.sum(d_bias, axis=0)[None, :], h < S.H)
    tl.store(place + S.H + h, tl.sum(d_skip, axis=0)[None, :], h < S.H)


@jit
def tokens_backward(
    projected,
    step_bias,
    starts,
    scalars,
    half_turn,
    d_half_turn,
    d_turns,
    later,  # (B, chunks, H, R): of all turns after a chunk
    d_scalars,
    d_diagonal,
    d_end,
    d_projected,  # out: step, decay, trapezoid, angles
    d_heads,  # out
    length,
    batch,
    ROWS: constexpr,
    S: constexpr,
):
    """Undoes what is left of tokens_forward(): step sizes, decays, weights and turns of a chunk."""
    chunk = tl.program_id(0)
    b = tl.program_id(1)
    chunks = tl.num_programs(0)
    padded = chunks * S.CHUNK
    token = chunk * S.CHUNK + tl.arange(0, S.CHUNK)
    t = token[:, None]
    h = factor_columns(S.H)
    live = t < length
    heads = h < S.H
    mask = live & heads
    row = key_columns(b, t, length, S) + 2 * S.N
    d_row = d_projected + row
    raw_step, step, raw_decay, rate, share = load_dynamics(projected + row, live, step_bias, h, S)
    place = (b * S.H + h) * padded + t
    plane = batch * S.H * padded
    d_current, _ = key_weight_backward(scalars, d_scalars, d_diagonal, place, heads, plane)
    d_decay_sum = load_float(d_scalars + place + plane * QUERY, heads)
    d_decay_sum -= load_float(d_scalars + place + plane * KEY, heads)  # the diagonal cancels
    ends = (b * S.H + tl.trans(h)) * chunks + chunk  # of the chunk, (heads, 1)
    at_end = load_float(d_end + ends * S.N + tl.arange(0, S.N)[None, :], tl.trans(heads))
    at_end = tl.sum(at_end, axis=1)[None, :]
    d_decay_sum += tl.where(t == chunk * S.CHUNK + S.CHUNK - 1, at_end, 0.0)
    d_log_decay = tl.cumsum(d_decay_sum, axis=0, reverse=True)
    d_log_decay = at_starts(d_log_decay, 0.0, starts, b, token, length)
    before = mask & (t > 0)  # this token's step also weighs the key before it
    _, d_previous = key_weight_backward(scalars, d_scalars, d_diagonal, place - 1, before, plane)
    d_step = share * d_current + rate * d_log_decay + (1.0 - share) * d_previous
    d_step += own_turns_backward(d_scalars + place, heads, plane)
    d_step = turns_backward(
        d_step, step, half_turn, d_half_turn, d_turns, later, d_row, b, token, live, batch, ROWS, S
    )
    d_decay = -step * d_log_decay * sigmoid_tile(raw_decay)
    d_decay = tl.where(rate < -SLOWEST_DECAY, d_decay, 0.0)
    d_share = step * (d_current - d_previous) * share * (1.0 - share)
    tl.store(d_row + S.H + h, d_decay, mask)
    tl.store(d_row + 2 * S.H + h, d_share, mask)
    d_raw = tl.where(mask, d_step * sigmoid_tile(raw_step), 0.0)
    tl.store(d_row + h, d_raw, mask)
    d_skip = load_float(d_diagonal + place, heads)
    store_by_heads(d_heads + 2 * (b * chunks + chunk) * S.H, d_raw, d_skip, S)


# ---- The operator --------------------------------------------------------------------------------
# To torch, forward and backward are one operator each. torch.compile leaves them whole; it has to
# know the shapes of their outputs (the fake), what forward keeps, and the backward.

# The name space of all operators. Compiled graphs call them by name, and stay in the compiler's
# cache when this file changes: then its operators, which may take or return other things, must have
# other names.
OPERATORS = f"golf_{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"


ScanSizes = collections.namedtuple("ScanSizes", "WIDTH R H P N CHUNK")  # S in the kernels
# A tensor (planes, rows, columns), or (planes, columns), whose tiles are read through pointers.
Tiles = collections.namedtuple("Tiles", "tensor rows columns HEIGHT WIDTH")
GIVEN = ("projected", "step_bias", "skip", "biases", "norms", "ssm_in", "turn_in")
SAVED = ("y", "ssm_out", "scalars", "features", "half_turn", "rotated", "rotation", "states")


def launch(kernel, grid: tuple, named: dict, *, warps: int = 4, registers=None, stages: int = 3):
    """Runs a kernel, one program for each place of the grid, on those of `named` that it takes.

    warps of a program, most registers of a thread, stages of a loop's loads: callers give what is
    fastest on an H200. Raises UserError if the kernel cannot run on this GPU.
    """
    arguments = {name: named[name] for name in kernel.arg_names}
    try:
        kernel[grid](**arguments, num_warps=warps, maxnreg=registers, num_stages=stages)
    except (triton.CompilationError, triton.OutOfResources) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        remedy = "a scan runs with SCAN_BACKEND=chunked"
        raise UserError(f"{kernel.__name__} does not run here: {reason}; {remedy}") from error


def scan_arguments(tensors: list[Tensor], starts, sizes: list[int]) -> dict:
    """Arguments by name that forward's and backward's kernels share; tensors: GIVEN, then SAVED."""
    named = dict(zip(GIVEN + SAVED, tensors, strict=True))
    batch, length, _ = named["projected"].shape
    named |= {"decay_sums": named["scalars"][int(DECAY_SUM)], "chunks": named["states"].shape[2]}
    return named | {"batch": batch, "length": length, "starts": starts, "S": ScanSizes(*sizes)}


def has_tile_instructions(device: torch.device) -> bool:
    """Whether a GPU, as Hopper, moves tiles by one instruction and multiplies them in place."""
    capability, _ = kernel_limits(device)
    return 90 <= capability < 120  # elsewhere tiles take registers, and 4 warps would spill


def rotates_in_scan(sizes: ScanSizes, device: torch.device) -> bool:
    """Whether scan_forward turns keys and queries itself, in place of rotate_features.

    It does if sizes are at most 64, so that two programs share a multiprocessor, and if half of a
    row turns, by eight angles or more, as a tile's rows take at least 16 bytes.
    """
    fit = max(sizes.P, sizes.N, sizes.CHUNK) <= 64 and sizes.N == 4 * sizes.R >= 32
    return fit and has_tile_instructions(device)


def launch_scan(kernel, named: dict) -> None:
    """Runs a program for each head; it reads tiles by tensor descriptors, or else by Tiles."""
    device = named["projected"].device
    by_descriptor = has_tile_instructions(device)
    _, angles, _, channels, state, chunk = named["S"]
    blocks = dict.fromkeys(("projected", "y", "d_projected", "d_y"), [chunk, channels])
    blocks |= dict.fromkeys(("features", "rotated", "d_rotated"), [chunk, state])
    blocks |= {"scalars": [chunk], "d_squares": [chunk], "states": [channels, state]}
    at_once = {}  # what is read of several planes
    if by_descriptor:
        at_once["scalars"] = [4, 1, chunk]
    tiles = {"rotation": None}
    if kernel is scan_forward and rotates_in_scan(named["S"], device):
        at_once |= {"rotation": [2, 1, chunk, angles], "biases": [2, 1, state]}
    for name, block in at_once.items():
        flat = named[name].flatten(1, 1 - len(block) + named[name].dim())
        tiles[name] = TensorDescriptor.from_tensor(flat, block)
    for name in (blocks.keys() & set(kernel.arg_names)) - at_once.keys():
        flat = named[name].flatten(0, -1 - len(blocks[name]))  # (planes, rows, columns)
        if by_descriptor:
            tiles[name] = TensorDescriptor.from_tensor(flat, [1, *blocks[name]])
        else:
            sides = constexpr(blocks[name][0]), constexpr(blocks[name][-1])
            tiles[name] = Tiles(flat, *flat.shape[-2:], *sides)
    batch, heads, *_ = named["states"].shape
    launch(kernel, (batch * heads,), named | tiles, warps=4 if by_descriptor else 8)


def launch_sum_turns(turns: Tensor, start: Tensor, back: bool, at_once: int = 32) -> list[Tensor]:
    """sum_turns()'s around (B, chunks, H, R) and end (B, H, R): turns in parts, start as end."""
    batch, chunks, parts, *_ = turns.shape
    around = turns.new_empty(batch, chunks, *start.shape[1:])
    end = torch.empty_like(start)
    named = {"turns": turns, "start": start, "around": around, "end": end, "chunks": chunks}
    sizes = SumSizes(start[0].numel(), parts, back, at_once, BLOCK=16)
    launch(sum_turns, (triton.cdiv(sizes.COUNT, sizes.BLOCK), batch), named | {"S": sizes})
    return [around, end]


@torch.library.custom_op(f"{OPERATORS}::fused_scan", mutates_args=())
def fused_scan(tensors: list[Tensor], starts: Tensor | None, sizes: list[int]) -> list[Tensor]:
    """The scan of GIVEN with ScanSizes: squares, the running angle turn_out, then SAVED."""
    squares, _, *saved = fused_scan_fake(tensors, starts, sizes)
    named = scan_arguments([*tensors, *saved], starts, sizes)
    batch, heads, chunks, _, _ = named["states"].shape
    turn_in = named["turn_in"]
    turns = turn_in.new_empty(batch, chunks, *turn_in.shape[1:])
    few = 128 if named["S"].N <= 64 else None  # more would spill kilobytes
    launch(tokens_forward, (chunks, batch), named | {"turns": turns}, registers=few)
    before, turn_out = launch_sum_turns(turns.unsqueeze(2), turn_in, back=False)
    angles = named | {"turns": before}
    in_scan = rotates_in_scan(named["S"], turns.device)
    if in_scan:
        angles["rotated"] = None
    launch(rotate_features, (chunks, heads, batch), angles, warps=1 if in_scan else 4)
    launch_scan(scan_forward, named | {"squares": squares})
    return [squares, turn_out, *saved]


@fused_scan.register_fake
def fused_scan_fake(tensors, starts, sizes) -> list[Tensor]:
    """fused_scan()'s outputs, without their values."""
    projected = tensors[0]
    _, angles, heads, channels, state, chunk = sizes
    batch, length, _ = projected.shape
    chunks = -(-length // chunk)
    padded = chunks * chunk
    new = projected.new_empty
    single = partial(new, dtype=torch.float32)
    finer = torch.float16 if projected.dtype == torch.bfloat16 else projected.dtype  # up to 1
    squares = single(batch, heads, padded)
    turn_out = single(batch, heads, angles)
    return [
        squares,
        turn_out,
        new(batch, length, heads * channels),  # from here on SAVED, in its order
        single(batch, heads, channels, state),
        single(6, batch, heads, padded),
        new(2, batch, padded, state),
        single(batch, padded, angles),
        new(2, batch, heads, padded, state),
        new(2, batch, heads, padded, angles, dtype=finer),
        new(batch, heads, chunks, channels, state),
    ]


@torch.library.custom_op(f"{OPERATORS}::fused_scan_backward", mutates_args=())
def fused_scan_backward(
    d_out: list[Tensor], kept: list[Tensor], starts: Tensor | None, sizes: list[int], ones: Tensor
) -> list[Tensor]:
    """The gradients of GIVEN, from those of squares, turn_out, y and ssm_out; some not summed up.

    For the step bias and skip d_heads, for biases and norms d_features' sum. ones: (B · parts).
    """
    d_squares, d_turn_out, d_y, d_ssm_out = d_out
    named = scan_arguments(kept, starts, sizes)
    _, angles, heads, _, state, chunk = sizes
    batch, _, padded = d_squares.shape
    chunks = padded // chunk
    programs = len(ones)
    parts = programs // batch
    single = d_squares.new_empty
    alike = ("projected", "rotated", "ssm_in")
    found = {f"d_{name}": torch.empty_like(named[name]) for name in alike}
    found |= {
        "d_scalars": single(4, batch, heads, padded),
        "d_diagonal": single(batch, heads, padded),
        "d_end": single(batch, heads, chunks, state),
        "d_half_turn": single(2, batch, padded, angles),
        "d_turns": single(programs, 2, heads, angles),
        "d_features": single(programs, 2, heads + 1, state),
        "d_heads": single(batch * chunks, 2, heads),
        "ROWS": padded // parts,
    }
    named |= found
    gradients = {"d_squares": d_squares, "d_y": d_y, "d_ssm_out": d_ssm_out}
    launch_scan(scan_backward, named | gradients)
    launch(features_backward, (2, parts, batch), named, warps=1)
    sums = ones @ found["d_features"].flatten(1)  # faster than sum()
    d_turns = found["d_turns"].view(batch, chunks, -1, heads, angles)
    later, d_turn_in = launch_sum_turns(d_turns, d_turn_out, back=True)
    launch(tokens_backward, (chunks, batch), named | {"later": later}, registers=128)
    features = sums.view(2, heads + 1, state)
    return [found["d_projected"], found["d_heads"], features, found["d_ssm_in"], d_turn_in]


@fused_scan_backward.register_fake
def _fused_scan_backward_fake(gradients, kept, starts, sizes, ones) -> list[Tensor]:
    projected, *_, ssm_in, turn_in = map(torch.empty_like, kept[: len(GIVEN)])
    batch, heads, chunks, _, state = kept[-1].shape  # of states
    by_head = ones.new_empty(batch * chunks, 2, heads)
    return [projected, by_head, ones.new_empty(2, heads + 1, state), ssm_in, turn_in]


def _keep_scan(ctx, inputs, output):
    tensors, starts, ctx.sizes = inputs
    ctx.save_for_backward(starts, *tensors, *output[2:])


def _fused_scan_autograd(ctx, gradients):
    """The gradients of GIVEN; the compiler sees, and fuses, what stands outside the operator."""
    starts, *kept = ctx.saved_tensors
    gradients = [x.contiguous() for x in gradients[:4]]
    batch, _, padded = gradients[0].shape
    _, _, _, _, state, chunk = ctx.sizes
    rows = min(chunk, 1024 // state)  # of a program of one warp: no barriers
    ones = gradients[0].new_ones(batch * padded // rows)  # compiled, once for all layers
    found = fused_scan_backward(gradients, kept, starts, ctx.sizes, ones)
    projected, by_head, features, *states = found
    given = [projected, *by_head.sum(0), features[:, :-1], features[:, -1], *states]
    return given, None, None


fused_scan.register_autograd(_fused_scan_autograd, setup_context=_keep_scan)


def gpu_properties(device: torch.device):
    """What CUDA says of a GPU; for device "meta", of tensors without data, of the current one."""
    return torch.cuda.get_device_properties(device if device.type == "cuda" else None)


@cache
def kernel_limits(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability, 90 of an H100, and a program's most bytes of shared memory."""
    if device.type == "cpu":  # where Triton interprets, kernels run as on the H100
        return 90, 232_448
    gpu = gpu_properties(device)
    return 10 * gpu.major + gpu.minor, gpu.shared_memory_per_block_optin


# Of a program's shared memory, by the first compute capability: a chunk times these times channels,
# state and chunk; and a state times the last. From 90 on, loads overlap with products.
SHARED_BYTES = {80: (11.0, 3.4, 2.2, 3.4), 90: (14.2, 8.9, 1.4, 4.9), 120: (11.0, 3.4, 2.2, 3.4)}
# Without tile instructions, programs that need more spill kilobytes; of 12 shapes, none other does.
MOST_SHARED_BYTES = 120_000
MOST_OF_LONG_CHUNKS = 110_000  # likewise, of chunks over 64
# What the compiler says of channels, state and chunk where that sum is less, and near what GPUs of
# these capabilities serve (bench/results/shared.txt): with narrow heads, products take other ways.
MORE_SHARED_BYTES = {
    80: {(16, 64, 128): 131_080, (16, 512, 32): 102_404, (32, 64, 128): 122_888},
    90: {
        (16, 16, 256): 210_564,
        (16, 32, 256): 243_844,
        (16, 64, 128): 148_084,
        (16, 64, 256): 359_540,
        (16, 128, 64): 111_988,
        (16, 128, 128): 232_052,
        (16, 256, 64): 202_100,
        (32, 16, 128): 106_116,
        (32, 16, 256): 276_612,
        (32, 64, 64): 105_592,
        (32, 64, 128): 178_804,
        (32, 128, 64): 132_468,
        (32, 128, 128): 264_820,
        (32, 256, 64): 230_772,
        (64, 16, 128): 164_484,
        (64, 128, 128): 330_356,
    },
}
MORE_SHARED_BYTES[120] = MORE_SHARED_BYTES[80]


def shared_bytes_by_sum(heads: int, channels: int, state: int, chunk: int, first: int) -> int:
    """About how much shared memory a program needs; first: a capability of SHARED_BYTES."""
    by_channels, by_state, by_chunk, whole = SHARED_BYTES[first]
    row = by_channels * channels + by_state * state + by_chunk * chunk
    of_scan = chunk * row + whole * state * channels
    return int(max(of_scan, 8 * chunk * heads))


def scan_shared_bytes(heads: int, channels: int, state: int, chunk: int, capability: int) -> int:
    """What a program needs of shared memory: near a GPU's limit no less than the compiler says.

    It is scan_forward's, scan_backward's, tokens_forward's or tokens_backward's. tokens_forward's
    loop over 16 heads a turn keeps the next turn's biases ready, and its sums pass on numbers of
    each token and head; tokens_backward multiplies these and those of each head and angle.
    """
    first = max(least for least in SHARED_BYTES if least <= capability)
    of_scan = MORE_SHARED_BYTES[first].get((channels, state, chunk), 0)
    of_loop = (4 * chunk + 256) * state + 64 * chunk if heads > 16 else 0
    columns = 1 << (heads - 1).bit_length()
    of_sums = (6 if chunk > 128 or heads > 512 else 8) * chunk * columns
    of_turns = 4 * (chunk + max(state // 4, 16)) * columns
    by_sum = shared_bytes_by_sum(heads, channels, state, chunk, first)
    return max(by_sum, of_scan, of_loop, of_sums, of_turns)


def why_not_triton(settings, device: torch.device) -> str:
    """Why the kernels cannot run the layers of these settings; "" if they can."""
    if settings.mamba_decay != "softplus":
        return "has no other MAMBA_DECAY than softplus"
    if triton is None:
        return "needs triton"
    if device.type != "cuda":
        return ""
    names = ("mamba_head_dim", "mamba_d_state", "mamba_chunk_size")
    sides = [getattr(settings, name) for name in names]
    if min(sides) < 16:  # tensor cores take no less; Triton's interpreter does
        return f"needs {names[sides.index(min(sides))].upper()} of 16 and more"
    capability, have = kernel_limits(device)
    if capability < 80:
        return "needs a GPU of compute capability 8.0 or more"
    if activation_dtype(settings, device) != torch.bfloat16:
        return "is for PRECISION=bfloat16"
    if 100 <= capability < 120 and settings.mamba_chunk_size > 32:  # Triton's pipeliner gives up
        return "needs MAMBA_CHUNK_SIZE of 32 or less on a GPU of compute capability 10"
    heads = settings.mamba_inner_dim // settings.mamba_head_dim
    needed = scan_shared_bytes(heads, *sides, capability)
    most = MOST_SHARED_BYTES if settings.mamba_chunk_size <= 64 else MOST_OF_LONG_CHUNKS
    spills = shared_bytes_by_sum(heads, *sides, 80) > most
    if spills and not has_tile_instructions(device):
        have = min(have, most)
    if needed > have:
        remedy = "a smaller MAMBA_CHUNK_SIZE, MAMBA_D_STATE or MAMBA_HEAD_DIM may do"
        return f"needs {needed:,} bytes of shared memory, this GPU serves {have:,} ({remedy})"
    return ""


def triton_scan(projected, p, sizes, document_start, state, chunk):
    """mamba_scan() of Mamba-3 by the kernels: products in projected's dtype, all else in float32.

    A state that comes in holds the last key and value apart, which the first token weighs: they are
    added to the state here. The state that goes out needs its last key, rotated, and its value.
    """
    first = scan_inputs(projected[:, :1], p, sizes, None)
    last = scan_inputs(projected[:, -1:], p, sizes, None)
    if padding := -projected.shape[-1] % 8:  # tensor descriptors want rows of 16 bytes
        projected = F.pad(projected, (0, padding))
    batch, _, width = projected.shape
    ssm = p.skip.new_zeros(batch, sizes.heads, sizes.channels, sizes.state)
    turn = p.skip.new_zeros(batch, sizes.heads, sizes.angles)
    if state is not None:
        terms = scan_terms(first, state)
        before, previous = terms.state, terms.previous[:, 0]
        ssm = evens_first(add_outer(before.ssm, previous, before.value, before.key))
        turn = before.angle / (2 * math.pi)
    biases = evens_first(torch.stack([p.key_bias, p.query_bias]))
    norms = torch.stack([p.key_norm, p.query_norm])
    learned = (p.step_bias, p.skip, biases, norms)
    tensors = [projected.contiguous(), *learned, ssm.contiguous(), turn.contiguous()]
    constants = [width, sizes.angles, sizes.heads, sizes.channels, sizes.state, chunk]
    starts = None if document_start is None else document_start.contiguous()
    squares, turn, y, ssm, *_ = fused_scan(tensors, starts, constants)
    angle = 2 * math.pi * turn
    key = rotate_pairs(last.key.float() + p.key_bias, angle)
    mean_square = squares[..., : y.shape[1]].sum(1) / y.shape[2]
    ssm = ssm.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # undoes evens_first()
    return y, mean_square, ScanState(angle, ssm, key, last.value[:, 0].float())


def evens_first(x: Tensor) -> Tensor:
    """The last dimension's even entries, then its odd ones: the kernels' order of the state."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


# ---- MLP -----------------------------------------------------------------------------------------
# With a row's norm as a factor s > 0 behind the first product, the activation f and its slope:
#
#   v = W x;   u = s v;   f(u) = max(u, u / 2)^2;   f'(u) = 2 sqrt(f) for u >= 0, else -sqrt(f)
#   y = W_down f(u);   d_v = s f'(u) ∘ W_down^T d_y
#
# Separate kernels would read v and write f, and backward read f's gradient and v and write v's. The
# products do both while a tile of their results is in registers: forward writes f, which the next
# matrix's gradient asks for anyway, and v's signs, a bit each; backward reads these. The factor's
# gradient is sum(d_x x) / s, with d_x = W^T d_v: no row of v is kept.
#
#   active *  (T, HIDDEN)      f(u)
#   signs     (T, HIDDEN / 8)  uint8: of 128 columns 16 bytes, bit j of byte c that of 16 j + c
#
SIGN_COLUMNS = constexpr(128)
SIGN_BYTES = constexpr(16)


# S in the kernels: tiles of M rows and N columns, sums of WIDTH terms by STEP.
# USUAL is that of 8-bit products, below; 0 of bfloat16 ones.
ProductSizes = collections.namedtuple("ProductSizes", "PROGRAMS WIDTH HIDDEN M N STEP USUAL")


@jit
def product_tile(number, S: constexpr):
    """The first row and column of a tile; those of the same rows come one after another."""
    columns = S.HIDDEN // S.N
    return number // columns * S.M, number % columns * S.N


@jit
def sign_places(signs, rows, column, N: constexpr, S: constexpr):
    """Where the signs of N columns of rows (M, 1) lie, (M, N / 8)."""
    return signs + rows.to(tl.int64) * (S.HIDDEN // 8) + column // 8 + column_indices(N // 8)


@jit
def pack_signs(x):
    """The signs of (M, SIGN_COLUMNS) float32 numbers, (M, SIGN_BYTES)."""
    bit = tl.arange(0, 8)[None, :, None]
    negative = (x.to(tl.uint32, bitcast=True) >> 31).reshape(x.shape[0], 8, SIGN_BYTES)
    return tl.sum(negative << bit, axis=1).to(tl.uint8)


@jit
def unpack_signs(packed):
    """Whether the numbers are below 0 (M, N) that pack_signs() made these bytes of, (M, N / 8)."""
    M: constexpr = packed.shape[0]
    N: constexpr = packed.shape[1] * 8
    packed = packed.to(tl.int32).reshape(M, N // SIGN_COLUMNS, 1, SIGN_BYTES)
    bits = (packed >> tl.arange(0, 8)[None, None, :, None]) & 1
    return (bits != 0).reshape(M, N)


@jit
def halves(x):
    """The left and the right half of a tile's columns."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@jit
def row_pairs(x):
    """Of a tile's rows (M, C) those j of each 16, and those 8 + j, (M / 16, 8, C) each.

    A thread has both at hand, as tensor cores leave results.
    """
    return x.reshape(x.shape[0] // 16, 2, 8, x.shape[1]).permute(0, 2, 3, 1).split()


@jit
def pack(first, second):
    """float32 numbers in 8 bits, two as one int16: the first has its lower bits."""
    code: constexpr = "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;"
    return tl.inline_asm_elementwise(code, "=h,f,f", [first, second], tl.int16, True, 1)


@jit
def store_pairs(first, second, plain, turned, row, column):
    """A tile's row_pairs() in 8 bits as they stand, and by columns, of rows 0, 8, 1, 9, ...

    Sums over rows have no order. Numbers move two by two, packed for each of the copies: one by one
    ptxas would spoil them, see round_tile().
    """
    blocks: constexpr = first.shape[0]
    rows: constexpr = 16 * blocks
    columns: constexpr = first.shape[2]
    half: constexpr = columns // 2
    if FAST:
        left, right = first.reshape(blocks, 8, half, 2).split()
        upper = pack(left, right)
        left, right = second.reshape(blocks, 8, half, 2).split()
        lower = pack(left, right)
        both = tl.join(upper, lower).permute(0, 3, 1, 2)
        plain.store([row, column // 2], both.reshape(rows, half))
        both = pack(first, second).reshape(rows // 2, columns)
        turned.store([column, row // 2], both.trans())
    else:
        both = tl.join(first, second)
        stacked = both.permute(0, 3, 1, 2)
        plain.store([row, column], stacked.reshape(rows, columns))
        stacked = both.permute(2, 0, 1, 3)
        turned.store([column, row], stacked.reshape(columns, rows))


@jit
def load_pairs(turned, row, column, S: constexpr):
    """The row_pairs(), float32, of a tile (M, N) that store_pairs() stored transposed."""
    if FAST:
        both = turned.load([column, row // 2]).trans()
        both = both.reshape(S.M // 16, 8, S.N)
        code: constexpr = "cvt.rn.f16x2.e4m3x2 $0, $1;"
        both = tl.inline_asm_elementwise(code, "=r,h", [both], tl.int32, True, 1)
        first = both.to(tl.int16).to(tl.float16, bitcast=True)  # what 8 bits hold, 16 do
        second = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        both = turned.load([column, row]).reshape(S.N, S.M // 16, 8, 2)
        first, second = both.permute(1, 2, 0, 3).split()
    return first.to(tl.float32), second.to(tl.float32)


@jit
def store_active(v, row, column, active, active8, signs, factor, length, S: constexpr):
    """f(u), or f8 twice, and the signs of half a tile, v (M, SIGN_COLUMNS)."""
    rows = row + tl.arange(0, S.M)[:, None]
    if S.USUAL > 0:
        quarter: constexpr = 0.25 / (S.USUAL * S.USUAL)
        first, second = row_pairs(v * v * tl.where(v < 0, quarter / 4, quarter))
        store_pairs(first, second, active8, active, row, column)
    else:
        square = tl.load(factor + rows, rows < length, 0.0)
        square *= square
        result = v * v * tl.where(v < 0, 0.25 * square, square)
        active.store([row, column], result.to(active.dtype))
    tl.store(sign_places(signs, rows, column, SIGN_COLUMNS, S), pack_signs(v), rows < length)


@jit
def prefetch(places):
    """Has the L2 cache fetch the lines that hold these."""
    code: constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(code, "=r,l", [places], tl.int32, False, 1)


@jit
def prefetch_tile(tensor, row, column, length, SHARE: constexpr, S: constexpr):
    """prefetch() of a tile of active (SHARE 1) or signs (8), by lines of 64 numbers."""
    rows = tl.minimum(row + tl.arange(0, S.M)[:, None], length - 1).to(tl.int64)
    lines = 64 * column_indices((S.N // SHARE + 63) // 64)
    prefetch(tensor + rows * (S.HIDDEN // SHARE) + column // SHARE + lines)


@jit
def prefetch_turned(turned, row, column, length, S: constexpr):
    """The same of a tile (M, N) of 8-bit floats transposed, a line of M for each column."""
    columns = tl.minimum(column + tl.arange(0, S.N), S.HIDDEN - 1).to(tl.int64)
    padded = tl.cdiv(length, S.M) * S.M
    prefetch(turned + columns * padded + tl.minimum(row, padded - S.M))


# x, up, active_map, d_y, down, d_v and those with an 8, which are None where S.USUAL is 0, are
# tensor descriptors of tiles, all else tensors. Of 8-bit floats active_map, d_v and mlp_backward's
# active are transposed, and descriptors of what is stored have two numbers as one.
@jit
def mlp_forward(x, up, active_map, active8, signs, factor, length, S: constexpr):
    """f(factor · x up^T), or f8 twice, and the signs of the product; factor (T,) is above 0."""
    tiles = tl.cdiv(length, S.M) * (S.HIDDEN // S.N)
    for number in tl.range(tl.program_id(0), tiles, S.PROGRAMS, flatten=True):
        row, column = product_tile(number, S)
        v = tl.full([S.M, S.N], 0.0, tl.float32)
        for k in range(0, S.WIDTH, S.STEP):
            v = exact_dot(x.load([row, k]), tl.trans(up.load([column, k])), v)
        left, right = halves(v)
        store_active(left, row, column, active_map, active8, signs, factor, length, S)
        column += SIGN_COLUMNS
        store_active(right, row, column, active_map, active8, signs, factor, length, S)


@jit
def mlp_backward(d_y, down, active_map, d_v, d_v8, active, signs, factor, length, S: constexpr):
    """The gradient of v, from d_y down, that of f(u); of d_y8, down8's transposed and f8 twice."""
    tiles = tl.cdiv(length, S.M) * (S.HIDDEN // S.N)
    for number in tl.range(tl.program_id(0), tiles, S.PROGRAMS, flatten=True):
        row, column = product_tile(number, S)
        d = tl.full([S.M, S.N], 0.0, tl.float32)
        for k in range(0, S.WIDTH, S.STEP):
            gradient = d_y.load([row, k])
            # Tensor cores read 8-bit factors along the sum's terms only.
            weights = tl.trans(down.load([column, k])) if S.USUAL > 0 else down.load([k, column])
            d = exact_dot(gradient, weights, d)
        if FAST:
            next_row, next_column = product_tile(number + S.PROGRAMS, S)
            if S.USUAL > 0:
                prefetch_turned(active, next_row, next_column, length, S)
            else:
                prefetch_tile(active, next_row, next_column, length, 1, S)
            prefetch_tile(signs, next_row, next_column, length, 8, S)
        rows = row + tl.arange(0, S.M)[:, None]
        packed = tl.load(sign_places(signs, rows, column, S.N, S), rows < length, 0)
        if S.USUAL > 0:
            slope: constexpr = 4.0 / S.USUAL  # of f8 = f / 4, so that f' is 4 sqrt(f8)
            first, second = row_pairs(d)
            first_active, second_active = load_pairs(active_map, row, column, S)
            first *= tl.sqrt(first_active)
            second *= tl.sqrt(second_active)
            first_negative, second_negative = row_pairs(unpack_signs(packed))
            first *= tl.where(first_negative, -slope / 2, slope)
            second *= tl.where(second_negative, -slope / 2, slope)
            store_pairs(first, second, d_v8, d_v, row, column)
        else:
            scale = tl.load(factor + rows, rows < length, 0.0)
            root = tl.sqrt(active_map.load([row, column]).to(tl.float32))
            d *= root * tl.where(unpack_signs(packed), -scale, 2.0 * scale)
            for half in tl.static_range(2):  # and in halves of these: a stage's room is worth more
                left, right = halves(halves(d.to(d_v.dtype))[half])
                d_v.store([row, column + half * S.N // 2], left)
                d_v.store([row, column + half * S.N // 2 + S.N // 4], right)


# Of each kernel M, N, STEP, stages. An H200's multiprocessor runs a program of 8 warps, or for N =
# 128 two of 4, of which one's products run beside what the other does with its own.
MLP_TILES = {"mlp_forward": (128, 256, 64, 4), "mlp_backward": (128, 256, 64, 3)}
FLOAT8_TILES = {"mlp_forward": (128, 256, 128, 4), "mlp_backward": (128, 128, 64, 4)}


def has_mlp_kernels(device: torch.device) -> bool:
    """Whether this is what the MLP's kernels are written for, an H100 or H200 with triton."""
    return triton is not None and device.type == "cuda" and kernel_limits(device)[0] == 90


def can_fuse_mlp(width: int, hidden: int, device: torch.device) -> bool:
    """Whether the MLP's kernels run: on such a GPU, in whole tiles of the hidden numbers."""
    whole = hidden % (2 * int(SIGN_COLUMNS)) == 0 and width % 8 == 0
    return whole and has_mlp_kernels(device)


def launch_product(kernel, named: dict, width: int, usual: float = 0.0):
    """Runs one of the MLP's kernels for sums of width terms; usual: S.USUAL, in FLOAT8_TILES."""
    length, bytes_of_signs = named["signs"].shape
    hidden = 8 * bytes_of_signs
    *tile, stages = (FLOAT8_TILES if usual else MLP_TILES)[kernel.__name__]
    programs = triton.cdiv(length, tile[0]) * (hidden // tile[1])
    if not named["signs"].is_cpu:
        gpu = gpu_properties(named["signs"].device)
        programs = min(programs, gpu.multi_processor_count * (256 // tile[1]))
    sizes = ProductSizes(programs, width, hidden, *tile, usual)
    named = named | {"length": length, "S": sizes}
    launch(kernel, (programs,), named, warps=tile[1] // 32, stages=stages)


@torch.library.custom_op(f"{OPERATORS}::fused_mlp", mutates_args=())
def fused_mlp(x: Tensor, factor: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    """y = down f(factor · up x) of rows x (T, width); and active and signs, for backward.

    factor (T,) float32, above 0; up (HIDDEN, width) and down (width, HIDDEN) have x's dtype.
    """
    y, active, signs = fused_mlp_fake(x, factor, up, down)
    rows, columns, step, _ = MLP_TILES["mlp_forward"]
    tiles = TensorDescriptor.from_tensor
    named = {"x": tiles(x, [rows, step]), "up": tiles(up, [columns, step]), "factor": factor}
    named |= {"active_map": tiles(active, [rows, columns // 2]), "active8": None, "signs": signs}
    launch_product(mlp_forward, named, x.shape[1])
    torch.mm(active, down.mT, out=y)
    return [y, active, signs]


@fused_mlp.register_fake
def fused_mlp_fake(x, factor, up, down) -> list[Tensor]:
    """fused_mlp()'s outputs, without their values."""
    length, hidden = len(x), len(up)
    signs = x.new_empty(length, hidden // 8, dtype=torch.uint8)
    return [x.new_empty(length, len(down)), x.new_empty(length, hidden), signs]


@torch.library.custom_op(f"{OPERATORS}::fused_mlp_backward", mutates_args=())
def fused_mlp_backward(
    d_y: Tensor, factor: Tensor, down: Tensor, active: Tensor, signs: Tensor
) -> Tensor:
    """The gradient (T, HIDDEN) of the product with up, from that of y (T, width)."""
    d_v = torch.empty_like(active)
    rows, columns, step, _ = MLP_TILES["mlp_backward"]
    tiles = TensorDescriptor.from_tensor
    named = {"d_y": tiles(d_y, [rows, step]), "down": tiles(down, [step, columns])}
    named |= {"active": active, "active_map": tiles(active, [rows, columns]), "signs": signs}
    named |= {"d_v": tiles(d_v, [rows, columns // 4]), "d_v8": None, "factor": factor}
    launch_product(mlp_backward, named, d_y.shape[1])
    return d_v


fused_mlp_backward.register_fake(lambda d_y, factor, down, active, signs: torch.empty_like(active))


def fused_mlp_autograd(ctx, gradients):
    """The gradients of fused_mlp()'s arguments, from that of y, the first of its results."""
    x, factor, up, down, active, signs = ctx.saved_tensors
    d_y = gradients[0].contiguous()
    d_v = fused_mlp_backward(d_y, factor, down, active, signs)
    d_x = d_v @ up
    d_factor = (widened(d_x) * x).sum(-1) / factor
    if not ctx.needs_input_grad[2]:  # weights that stay, beside which branches learn
        return d_x, d_factor, None, None
    return d_x, d_factor, d_v.mT @ x, d_y.mT @ active


fused_mlp.register_autograd(
    fused_mlp_autograd,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output[1:]),
)


# ---- Products of 8-bit floats --------------------------------------------------------------------
# An H100 multiplies numbers of float8_e4m3fn (arXiv 2209.05433) twice as fast as bfloat16's. q()
# rounds to them: to 3 bits of mantissa up to 448, and to multiples of 2^-9 below 2^-6. Training's
# steps compute FLOAT8_PRODUCTS: mlp is all of this, W being up; in_proj is v8 alone. Factors of
# rows and matrices follow the products, and are left out:
#
#   x8 = q(r norm(x))                        d_y8 = q(r d_y / rms of its row)
#   v8 = W8 x8,  W8 = q(4 W / rms(W))        d8 = W_down8^T d_y8
#   f8 = q(f(v8 / USUAL) / 4)                d_v8 = q(d8 / USUAL · f'(v8 / USUAL))
#   y = W_down8 f8                           d_x = W8^T d_v8
#
# No scale waits for a tensor's largest number, as 448 over that would. In a row of WIDTH none is
# above sqrt(WIDTH) root mean squares (rms): r, 16 for 512, is the power of two that keeps this
# within 448, and no row saturates. Weights do beyond 112 rms. Sums of WIDTH independent products,
# of rms 4 and r, have the rms USUAL = 4 r sqrt(WIDTH), 1448: v8 and d8 are within some percent of
# it in models trained with Muon, whose matrices stretch all directions alike. f' is 1.5 usually; f8
# saturates where v8 is above 42 USUAL, but was at most 10.7, d_v8 48. As f is of second degree,
# v's factors leave it squared. Each q() is off by 2.6 % (rms), f', by f8 and signs, by half of
# that; sums of 8-bit products have fewer bits than float32. The MLP's gradients of weights are the
# next chapter's; in_proj's gradients are bfloat16 products of what q() did not round. Interpreted,
# in float32, it rounds nothing.
FLOAT8 = torch.float8_e4m3fn
MOST_FLOAT8 = 448.0
WEIGHT_SIZE = 4.0
EVERY_FLOAT8 = "mlp,in_proj"  # of FLOAT8_PRODUCTS the one with most
SUMS = constexpr(128)  # of squares of a matrix, by part
SIDE = constexpr(64)  # of a tile of a matrix that is rounded


def choose_float8(model, settings, device: torch.device, before: str = EVERY_FLOAT8) -> str:
    """FLOAT8_PRODUCTS, or UserError; auto: those of `before`, a checkpoint's, that run here."""
    wanted = settings.float8_products
    if wanted == "auto":
        had = [part for part in EVERY_FLOAT8.split(",") if part in before.split(",")]
        return ",".join(x for x in had if not why_not_float8(model, x, device)) or "none"
    problem = why_not_float8(model, wanted, device)
    need(not problem, f"FLOAT8_PRODUCTS={wanted} {problem}; auto runs")
    return wanted


def describe_float8(model, settings, device: torch.device, chosen: str) -> str:
    """For a run's log: which products have 8 bits and, if auto chose fewer than all, why."""
    text = "" if chosen == "none" else f", 8 bits in {chosen}"
    if settings.float8_products != "auto" or device.type != "cuda" or chosen == EVERY_FLOAT8:
        return text
    reason = why_not_float8(model, EVERY_FLOAT8, device) or "is not what the checkpoint had"
    return f"{text} (FLOAT8_PRODUCTS={EVERY_FLOAT8} {reason})"


def why_not_float8(model, products: str, device: torch.device) -> str:
    """Why a model cannot train by these FLOAT8_PRODUCTS on this device; empty if it can."""
    if products == "none":
        return ""
    if not has_mlp_kernels(device) or model.compute_dtype != torch.bfloat16:
        return "needs an H100 or H200, triton and PRECISION=bfloat16"
    for part in products.split(","):
        sizes = {n: x.weight.shape for n, x in model.linear_layers().items() if f".{part}." in n}
        if not sizes:
            return f"finds no {part} in these layers"
        for name, (rows, columns) in sizes.items():
            whole = 2 * int(SIGN_COLUMNS) if name.endswith(".mlp.up.weight") else int(SIDE)
            if rows % whole or columns % int(SIDE):
                return f"needs multiples of {whole} and {int(SIDE)}: {name} is {rows} x {columns}"
    return ""


def float8_type(dtype: torch.dtype) -> torch.dtype:
    """What numbers of this type are rounded to: bfloat16 to FLOAT8, others not at all."""
    return FLOAT8 if dtype == torch.bfloat16 else dtype


def to_float8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in float8_type(dtype), saturated, as the type is not by itself; NaN stays NaN."""
    kind = float8_type(dtype)
    return x.clamp(-MOST_FLOAT8, MOST_FLOAT8).to(kind) if kind == FLOAT8 else x.to(kind)


def row_scale(width: int) -> float:
    """r above: the power of two by which no row of so many numbers and size 1 saturates."""
    return 2.0 ** math.floor(math.log2(MOST_FLOAT8 / width**0.5))


def usual_product(width: int) -> float:
    """USUAL above: the size of a sum of so many terms."""
    return WEIGHT_SIZE * row_scale(width) * width**0.5


def float8_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """x8 of rows x (T, width), without a gradient, and norm's factor (T,) float32."""
    factor = (widened(x).square().mean(-1) + NORM_EPS).rsqrt()
    scale = row_scale(x.shape[1]) * factor.detach().unsqueeze(-1)
    return to_float8(x.detach() * scale, x.dtype), factor


def power_above(x: Tensor) -> Tensor:
    """The next power of two above x (float32, above 0): its exponent's bits alone, plus one."""
    return 2 * (x.view(torch.int32) & -(2**23)).view(torch.float32)


def float8_gradient(d_y: Tensor) -> tuple[Tensor, Tensor]:
    """d_y8 of rows d_y (T, width), and (T,) float32 what brings each back to its size: powers of
    two, which multiply d_y8 without rounding it again.
    """
    wide = widened(d_y)
    size = wide.square().mean(-1).sqrt().clamp(min=1e-18)
    size = power_above(size / row_scale(d_y.shape[1]))
    return to_float8(wide * (1 / size).unsqueeze(-1), d_y.dtype), size


MatrixSizes = collections.namedtuple("MatrixSizes", "ROWS COLUMNS SIZE ROW_SCALE")  # S below


@jit
def sum_squares(matrix, sums, S: constexpr):
    """Of a matrix SUMS sums of squares, each of every SUMSth tile's worth of numbers."""
    tile: constexpr = SIDE * SIDE
    total = tl.full([tile], 0.0, tl.float32)
    for start in range(tl.program_id(0) * tile, S.ROWS * S.COLUMNS, SUMS * tile):
        x = tl.load(matrix + start + tl.arange(0, tile))
        total += x * x
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


@jit
def round_tile(matrix, to, scale, S: constexpr, TURNED: constexpr):
    """A tile of a matrix in 8 bits, to where it stands or, if TURNED, to its place transposed.

    No program does both. It would hold rounded numbers four in a register and, to turn them, one by
    one: there ptxas of CUDA 12.8 and 12.9, which triton 3.5 to 3.8 bring, has one of four come from
    a register that nothing wrote (tests/test_compiled_kernels.py looks for such code).
    """
    row = (tl.program_id(0) * SIDE + tl.arange(0, SIDE))[:, None]
    column = (tl.program_id(1) * SIDE + tl.arange(0, SIDE))[None, :]
    x = scale * tl.load(matrix + row * S.COLUMNS + column)
    place = column * S.ROWS + row if TURNED else row * S.COLUMNS + column
    tl.store(to + place, x.to(to.dtype.element_ty))


@jit
def round_matrix(matrix, sums, sizes, plain, turned, S: constexpr):
    """A matrix and its transposed in 8 bits; sizes: what brings these back, and rows of x8."""
    total = tl.sum(tl.load(sums + tl.arange(0, SUMS)), axis=0)
    scale = S.SIZE / tl.maximum(tl.sqrt(total / (S.ROWS * S.COLUMNS)), 1e-12)
    if tl.program_id(2) == 0:
        round_tile(matrix, plain, scale, S, False)
        tl.store(sizes, 1.0 / scale)
        tl.store(sizes + 4, 1.0 / S.ROW_SCALE)
    else:
        round_tile(matrix, turned, scale, S, True)


def float8_weight(matrix: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Of a float32 matrix, for activations of this type: W8, its transposed, and sizes.

    sizes (2, 4) float32: in the first column, 16 bytes apart as torch._scaled_mm reads them, W's
    size beside W8's and 1 / r.
    """
    plain, turned, sizes = float8_weight_fake(matrix, dtype)
    rows, columns = matrix.shape
    named = {"matrix": matrix.contiguous(), "sums": matrix.new_empty(int(SUMS)), "sizes": sizes}
    named |= {"plain": plain, "turned": turned}
    named["S"] = MatrixSizes(rows, columns, WEIGHT_SIZE, row_scale(columns))
    launch(sum_squares, (int(SUMS),), named)
    launch(round_matrix, (rows // int(SIDE), columns // int(SIDE), 2), named)
    return [plain, turned, sizes]


def float8_weight_fake(matrix: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """float8_weight()'s results, without their values."""
    plain = matrix.new_empty(matrix.shape, dtype=float8_type(dtype))
    return [plain, plain.new_empty(matrix.shape[::-1]), matrix.new_empty(2, 4)]


def scaled_product(a8: Tensor, b8: Tensor, a_scale: Tensor, b_scale: Tensor, dtype) -> Tensor:
    """(a_scale a8) (b_scale b8)^T in dtype, of a8 (M, K), b8 (N, K) and float32 scalars.

    Tensor cores cut their sums to 13 bits as they go. In bfloat16, over a width, that is little. In
    float32, over all tokens, it is not: cuBLAS adds those up outside, a tenth slower.
    """
    if a8.dtype != FLOAT8:
        return (a8 @ b8.mT * (a_scale * b_scale)).to(dtype)
    options = {"out_dtype": dtype, "use_fast_accum": dtype != torch.float32}
    return torch._scaled_mm(a8, b8.mT, scale_a=a_scale, scale_b=b_scale, **options)


@torch.library.custom_op(f"{OPERATORS}::float8_rows", mutates_args=())
def float8_rows(x: Tensor, x8: Tensor, weight: Tensor) -> Tensor:
    """W x of rows x (T, width), in x's dtype, by x8 = q(r x) and a float32 matrix's W8."""
    weight8, _, sizes = float8_weight(weight, x.dtype)
    return scaled_product(x8, weight8, sizes[1, 0], sizes[0, 0], x.dtype)


float8_rows.register_fake(lambda x, x8, weight: x.new_empty(len(x), len(weight)))


def _float8_rows_autograd(ctx, d_y):
    x, weight = ctx.saved_tensors
    return d_y @ weight.to(x.dtype), None, (d_y.mT @ x).to(weight.dtype)


float8_rows.register_autograd(
    _float8_rows_autograd,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], inputs[2]),
)


def float8_linear(u: Tensor, weight: Tensor) -> Tensor:
    """W u of rows u (B, T, width), whose root mean square is at most 1, in u's dtype."""
    rows = u.flatten(0, 1)
    u8 = to_float8(widened(rows.detach()) * row_scale(u.shape[2]), u.dtype)
    return float8_rows(rows, u8, weight).unflatten(0, u.shape[:2])


@torch.library.custom_op(f"{OPERATORS}::float8_mlp", mutates_args=())
def float8_mlp(x: Tensor, x8: Tensor, factor: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    """y = size of up · down f8 of rows x (T, width), with x8 and factor by float8_norm(); and, for
    backward, f8 turned_like(), signs, float8_weight() of up and of down, which are float32.
    """
    y, active, signs, *_ = float8_mlp_fake(x, x8, factor, up, down)
    active8 = active.new_empty(len(x), len(up))
    width = x.shape[1]
    up_weight, down_weight = (float8_weight(matrix, x.dtype) for matrix in (up, down))
    rows, columns, step, _ = FLOAT8_TILES["mlp_forward"]
    tiles = TensorDescriptor.from_tensor
    named = {"x": tiles(x8, [rows, step]), "up": tiles(up_weight[0], [columns, step])}
    named |= {"active8": paired_tiles(active8, [rows, columns // 2]), "signs": signs}
    named |= {"active_map": paired_tiles(active, [columns // 2, rows]), "factor": None}
    launch_product(mlp_forward, named, width, usual_product(width))
    sizes = up_weight[2][0, 0], down_weight[2][0, 0]
    y = scaled_product(active8, down_weight[0], *sizes, x.dtype)
    return [y, active, signs, *up_weight, *down_weight]


@float8_mlp.register_fake
def float8_mlp_fake(x, x8, factor, up, down) -> list[Tensor]:
    """float8_mlp()'s outputs, without their values."""
    signs = x8.new_empty(len(x), len(up) // 8, dtype=torch.uint8)
    weights = float8_weight_fake(up, x.dtype) + float8_weight_fake(down, x.dtype)
    return [torch.empty_like(x), turned_like(x8, len(up)), signs, *weights]


@torch.library.custom_op(f"{OPERATORS}::float8_mlp_backward", mutates_args=())
def float8_mlp_backward(
    d_y8: Tensor, x8: Tensor, size: Tensor, scales: list[Tensor], kept: list[Tensor]
) -> list[Tensor]:
    """The gradients of rows x, but for factors of these, and of up and down, float32.

    d_y8 and size by float8_gradient(); scales: turn_scale() / 4, as f8 is f / 4, and turn_scale();
    kept are float8_mlp()'s results but y.
    """
    active, signs, _, up_turned, up_sizes, _, down_turned, down_sizes = kept
    d_v = torch.empty_like(active)
    d_v8 = active.new_empty(len(d_y8), len(active))
    rows, columns, step, _ = FLOAT8_TILES["mlp_backward"]
    tiles = TensorDescriptor.from_tensor
    named = {"d_y": tiles(d_y8, [rows, step]), "down": tiles(down_turned, [columns, step])}
    named |= {"active": active, "active_map": paired_tiles(active, [columns, rows])}
    named |= {"d_v8": paired_tiles(d_v8, [rows, columns]), "signs": signs, "factor": None}
    named["d_v"] = paired_tiles(d_v, [columns, rows])
    width = d_y8.shape[1]
    launch_product(mlp_backward, named, width, usual_product(width))
    dtype = torch.bfloat16 if d_y8.dtype == FLOAT8 else torch.float32
    d_x = scaled_product(d_v8, up_turned, up_sizes[0, 0], down_sizes[0, 0], dtype)
    x_turned, d_y_turned = (turned_rows(rows, size, scales[1]) for rows in (x8, d_y8))
    d_up = scaled_product(d_v, x_turned, scales[0], down_sizes[0, 0], torch.float32)
    d_down = scaled_product(d_y_turned, active, scales[1], up_sizes[0, 0], torch.float32)
    return [d_x, d_up, d_down]


@float8_mlp_backward.register_fake
def float8_mlp_backward_fake(d_y8, x8, size, scales, kept) -> list[Tensor]:
    """float8_mlp_backward()'s outputs, without their values."""
    dtype = torch.bfloat16 if d_y8.dtype == FLOAT8 else torch.float32
    _, _, up8, _, _, down8, _, _ = kept
    weights = [torch.empty_like(x8, dtype=torch.float32) for x8 in (up8, down8)]
    return [torch.empty_like(d_y8, dtype=dtype), *weights]


def float8_mlp_autograd(ctx, gradients):
    """The gradients of float8_mlp()'s arguments, from that of y, the first of its results."""
    x, x8, factor, *kept = ctx.saved_tensors
    d_y8, size = float8_gradient(gradients[0].contiguous())
    scale = turn_scale(size)
    d_x, d_up, d_down = float8_mlp_backward(d_y8, x8, size, [scale / 4, scale], kept)
    row = 0.25 * row_scale(x.shape[1]) * size * factor
    d_x = (d_x * row.unsqueeze(-1)).to(x.dtype)
    d_factor = (widened(d_x) * x).sum(-1) / factor
    return d_x, None, d_factor, d_up, d_down


float8_mlp.register_autograd(
    float8_mlp_autograd,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3], *output[1:]),
)


# ---- Weight gradients in 8 bits ------------------------------------------------------------------
# Tensor cores read 8-bit factors along the sum's terms only: of d_up = d_v^T x and d_down = d_y^T f
# along tokens. f8 and d_v8 come transposed from the kernels that make them. Factors of rows cannot
# follow a sum over rows. f8 has none, and x's, 1 / rms, is that by which d_v's gradient is divided;
# what is left is size, the factor of d_y8's rows, beside its root mean square over all tokens, s:
#
#   d_up = c Σ_t d_v8 q(s x8 / 256);   d_down = c Σ_t q(s d_y8 / 256) f8
#
# Sizes are powers of two, so that nothing is rounded twice; numbers saturate only where one token
# has nearly all of the gradient. The gradient of half a batch's tokens is 90 % off the whole's, and
# these products 5 %, bfloat16's 4 (bench/NOTES.md). Both kernels of FLOAT8_TILES have as many rows
# a tile, of which the last is stored as a whole.


def turn_scale(size: Tensor) -> Tensor:
    """256 times the power of two above the rms of rows' sizes, which may all be tiny, ()."""
    return 256 * power_above(size.square().mean().sqrt().clamp(min=1e-18))


def turned_like(x8: Tensor, columns: int) -> Tensor:
    """Room for as many rows as x8 has, (T, columns), transposed, as store_pairs() orders them: with
    those of the last tile, which are zeros.
    """
    tile, *_ = FLOAT8_TILES["mlp_forward"]
    return x8.new_empty(columns, math.ceil(len(x8) / tile) * tile)


def paired_tiles(x8: Tensor, tile: list[int]):
    """store_pairs()'s descriptor of tiles: of 8 bits, of numbers two by two."""
    if x8.dtype != FLOAT8:
        return TensorDescriptor.from_tensor(x8, tile)
    return TensorDescriptor.from_tensor(x8.view(torch.int16), [tile[0], tile[1] // 2])


TurnSizes = collections.namedtuple("TurnSizes", "WIDTH ROWS")  # S below


@jit
def turn_rows(x8, size, scale, to, length, padded, S: constexpr):
    """Rows of x8 by size / scale, transposed as store_pairs() does; to is of int16, two numbers
    each, or of float32 where nothing is rounded.
    """
    half: constexpr = S.ROWS // 2
    pairs = (tl.program_id(0) * half + tl.arange(0, half))[:, None]
    columns = tl.program_id(1) * SIDE + column_indices(SIDE)
    rows = pairs + pairs // 8 * 8
    place = x8 + rows.to(tl.int64) * S.WIDTH + columns
    whole = tl.load(scale)
    first = load_float(size + rows, rows < length) / whole
    first *= load_float(place, rows < length)
    rows += 8
    second = load_float(size + rows, rows < length) / whole
    second *= load_float(place + 8 * S.WIDTH, rows < length)
    place = columns.to(tl.int64) * (padded // 2) + pairs
    if FAST:
        tl.store(to + place, pack(first, second))
    else:
        tl.store(to + 2 * place, first)
        tl.store(to + 2 * place + 1, second)


def turned_rows(x8: Tensor, size: Tensor, scale: Tensor) -> Tensor:
    """x8 (T, width) by sizes (T,) / scale (), turned_like()."""
    length, width = x8.shape
    turned = turned_like(x8, width)
    padded = turned.shape[1]
    named = {"x8": x8, "size": size, "scale": scale, "length": length, "padded": padded}
    named["to"] = turned.view(torch.int16) if x8.dtype == FLOAT8 else turned
    named["S"] = sizes = TurnSizes(width, FLOAT8_TILES["mlp_forward"][0])
    launch(turn_rows, (padded // sizes.ROWS, width // int(SIDE)), named)
    return turned


# ---- Cross-entropy -------------------------------------------------------------------------------
# With x = cap·tanh(logit / cap), of a row of logits and its target:
#
#   nats = log(sum over v of exp(x_v)) - x_target
#   d logit_v = (exp(x_v) / sum - [v is the target]) (1 - tanh(logit_v / cap)^2)
#
# A program has one row in registers, reads its logits once, and writes their gradient over them
# (backward scales it). No maximum is taken out: exp(cap) is finite for any cap in the settings. Of
# impossible pairs the logit is -inf, whose tanh is -1 to the bit: x is -cap and the gradient 0.
# Masks of x and of the slope would take registers of a fourth program from each multiprocessor.
CrossEntropySizes = collections.namedtuple("CrossEntropySizes", "V CAP BLOCK SLOPES")  # S


@jit
def softcap_tile(x, CAP: constexpr):
    """CAP·tanh(x / CAP), and its slope."""
    power = exp2_tile(x * (2.0 * LOG2_E / CAP))  # exp(2 x / CAP)
    tanh = 1.0 - 2.0 * reciprocal_tile(1.0 + power)
    return CAP * tanh, 1.0 - tanh * tanh


@jit
def mask_tile(x, bits, v):
    """Logits x where bit v of a row of packed_pairs() is 0; elsewhere -inf."""
    possible = ((bits.to(tl.int32) >> (v % 8)) & 1) == 0
    return tl.where(possible, x, float("-inf"))


@jit
def cross_entropy_rows(logits, targets, nats, tokens, impossible, S: constexpr):
    """The nats of one row of logits (T, V); with SLOPES, in its place, its logits' gradients.

    impossible: packed_pairs(), and tokens (T,) those before the targets; or both None.
    """
    V: constexpr = S.V
    CAP: constexpr = S.CAP
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, S.BLOCK)
    logits += row * V
    target = tl.load(targets + row)
    own = tl.load(logits + target).to(tl.float32)
    x = load_float(logits + v, v < V)
    if impossible is not None:
        impossible += tl.load(tokens + row) * ((V + 7) // 8)
        own = mask_tile(own, tl.load(impossible + target // 8), target)
        x = mask_tile(x, tl.load(impossible + v // 8, v < V, other=0), v)
    own, _ = softcap_tile(own, CAP)
    x, slope = softcap_tile(x, CAP)
    share = tl.where(v < V, exp2_tile(x * LOG2_E), 0.0)
    total = tl.sum(share, axis=0)
    tl.store(nats + row, tl.log(total) - own)
    if S.SLOPES:
        d_x = share / total - tl.where(v == target, 1.0, 0.0)
        tl.store(logits + v, d_x * slope, v < V)


@torch.library.custom_op(f"{OPERATORS}::cross_entropy", mutates_args=())
def fused_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, slopes: bool, pairs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Model.nats() of hidden (T, width), output matrix (V, width) and targets (T,).

    pairs: the tokens (T,) before them and packed_pairs(), if these are masked. Returns nats (T,)
    float32, and their gradients by logits (T, V) if slopes are wanted, else (0,).
    """
    logits = F.linear(hidden, weight)  # in whose place the gradients come
    count, vocab_size = logits.shape
    nats = logits.new_empty(count, dtype=torch.float32)
    tokens, impossible = pairs or (None, None)
    block = triton.next_power_of_2(vocab_size)
    named = {"logits": logits, "targets": targets, "nats": nats}
    named |= {"tokens": tokens, "impossible": impossible}
    named["S"] = CrossEntropySizes(vocab_size, cap, block, slopes)
    launch(cross_entropy_rows, (count,), named, warps=max(4, block // 2048))
    return nats, logits if slopes else logits.new_empty(0)


@fused_cross_entropy.register_fake
def _cross_entropy_fake(hidden, weight, targets, cap, slopes, *_) -> tuple[Tensor, Tensor]:
    shape = (len(hidden), len(weight)) if slopes else (0,)
    return hidden.new_empty(len(hidden), dtype=torch.float32), hidden.new_empty(shape)


def cross_entropy_autograd(ctx, d_nats, _):
    """The gradients of hidden and weight, from that of nats (T,)."""
    hidden, weight, slopes = ctx.saved_tensors
    scale = d_nats.unsqueeze(1).to(hidden.dtype)
    d_weight = slopes.mT @ (hidden * scale) if ctx.needs_input_grad[1] else None
    return slopes @ weight * scale, d_weight, None, None, None, ctx.no_pairs


def _keep_cross_entropy(ctx, inputs, output):
    hidden, weight, *_, pairs = inputs
    ctx.save_for_backward(hidden, weight, output[1])
    ctx.no_pairs = [None] * len(pairs)  # of a list, a gradient for each


fused_cross_entropy.register_autograd(cross_entropy_autograd, setup_context=_keep_cross_entropy)


# ---- Trellis -------------------------------------------------------------------------------------
# trellis_search() with a thread for each segment, which goes through the rows with the costs of all
# states in registers. Into state j lead branches from two, with u = j mod 2:
#
#   cost'_j = min over i in (j // 2, j // 2 + STATES / 2) of cost_i + error of i's grid for u
#
# A bit of choices, for each state, says which; the way back follows these from the best state.
#
# S in the kernel: HALVES and FLIPS as in TRELLISES, rows of a segment, segments of a program.
TrellisSizes = collections.namedtuple("TrellisSizes", "STATES HALVES FLIPS ROWS BLOCK")


@jit
def nearest_point(x, limit, half, last):
    """The nearest k + half to x, of integers k with the last bit last, up to an odd limit."""
    k = 2.0 * tl.floor((x - half - last) * 0.5 + 0.5) + last
    most = limit - 1.0 + last
    return tl.minimum(tl.maximum(k, -most), most) + half


@jit
def branch_cost(costs, errors, i: constexpr, u: constexpr, S: constexpr):
    """Of the best path that goes on from state i with u."""
    half: constexpr = (S.HALVES >> i) % 2
    last: constexpr = (S.FLIPS >> i) % 2 ^ u
    return costs[i] + errors[half + 2 * last]


@jit
def trellis_paths(numbers, choices, points, batch, S: constexpr):
    """points (batch, ROWS) of trellis_search()'s numbers; choices (batch, ROWS) int64 is room."""
    STATES: constexpr = S.STATES
    segment = tl.program_id(0) * S.BLOCK + tl.arange(0, S.BLOCK)
    live = segment < batch
    place = segment * S.ROWS
    plane = batch * S.ROWS
    costs = (tl.full([S.BLOCK], 0.0, tl.float32),)
    for _ in tl.static_range(1, STATES):
        costs = costs + (tl.full([S.BLOCK], float("inf"), tl.float32),)
    for row in range(S.ROWS):
        x = tl.load(numbers + place + row, live, other=0.0)
        step = tl.load(numbers + plane + place + row, live, other=0.0)
        limit = tl.load(numbers + 2 * plane + place + row, live, other=0.0)
        errors = ()
        for grid in tl.static_range(4):
            error = x - nearest_point(x, limit, 0.5 * (grid % 2), grid // 2)
            error *= step
            errors = errors + (error * error,)
        choice = tl.full([S.BLOCK], 0, tl.int64)
        reached = ()
        for j in tl.static_range(STATES):
            first = branch_cost(costs, errors, j // 2, j % 2, S)
            second = branch_cost(costs, errors, j // 2 + STATES // 2, j % 2, S)
            choice |= tl.where(second < first, 1 << j, 0)
            reached = reached + (tl.minimum(first, second),)
        costs = reached
        tl.store(choices + place + row, choice, live)
    least = costs[0]
    state = tl.full([S.BLOCK], 0, tl.int64)
    for j in tl.static_range(1, STATES):
        state = tl.where(costs[j] < least, j, state)
        least = tl.minimum(costs[j], least)
    for back in range(1, S.ROWS + 1):
        row = S.ROWS - back
        choice = tl.load(choices + place + row, live, other=0)
        before = state // 2 + STATES // 2 * ((choice >> state) & 1)
        half = ((S.HALVES >> before) & 1).to(tl.float32) * 0.5
        last = ((state ^ (S.FLIPS >> before)) & 1).to(tl.float32)
        x = tl.load(numbers + place + row, live, other=0.0)
        limit = tl.load(numbers + 2 * plane + place + row, live, other=0.0)
        tl.store(points + place + row, nearest_point(x, limit, half, last), live)
        state = before


def fused_trellis_search(numbers: Tensor, states: int) -> Tensor:
    """trellis_search(), by trellis_paths()."""
    points = torch.empty_like(numbers[0])
    choices = torch.empty_like(points, dtype=torch.int64)
    segments, rows = points.shape
    sizes = TrellisSizes(states, *TRELLISES[states], rows, BLOCK=32)
    named = {"numbers": numbers, "choices": choices, "points": points, "batch": segments}
    launch(trellis_paths, (triton.cdiv(segments, sizes.BLOCK),), named | {"S": sizes}, warps=1)
    return points


# ---- Compiled ahead ------------------------------------------------------------------------------
# A cold start compiles things that do not depend on each other: by torch's compiler the loss with
# its gradients, what steps do with these, their average, and calibration's attention; by Triton our
# own kernels, each when it is first launched. One process would do so one after another. So three
# more begin with the run: one launches our kernels, one makes a step's second half, one the rest,
# and what they compile lies on disk when the run looks for it, in Triton's cache and in torch's.
# One that fails, or is late, changes nothing else.


class Ahead(NamedTuple):
    """A process that compiles ahead."""

    what: str  # it compiles
    process: multiprocessing.Process
    pipe: multiprocessing.connection.Connection  # by which it tells what it made, and is told


AHEAD = []  # from compile_ahead() to end_ahead()


class RanksApart(Ranks):
    """A rank without the others: what they would send has the shape of what it has itself."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor as it is."""
        return tensor

    def concatenate(self, tensor: Tensor) -> Tensor:
        """The tensor (n, ...) in every rank's place: (ranks · n, ...)."""
        return torch.cat([tensor] * self.world_size) if self.world_size > 1 else tensor


def compile_ahead(settings):
    """Starts the processes for a run that trains on a GPU; they end by end_ahead() or with the run.

    They are forked, as importing torch again would take long; but not if CUDA is in use, which does
    not survive a fork. The only threads by now are those of numpy's OpenBLAS, which expects forks.
    """
    rank, local_rank, world_size = read_launch(dict(os.environ))
    gpus = 0 if settings.device == "cpu" else torch.cuda.device_count()
    interpreted = triton is None or os.environ.get("TRITON_INTERPRET") == "1"
    unfit = interpreted or torch.cuda.is_initialized() or sys.platform != "linux"
    if local_rank >= gpus or unfit:
        return
    with suppress(OSError, ImportError):
        # Not earlier: torch's compiler reads variables that prepare_torch() sets when imported.
        from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

        # Later, torch's compiler would choose one for each GPU; one process serves all of them.
        os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(0))
        if settings.eval_only:  # an artifact's settings are not known yet
            return
        ranks = RanksApart(rank, world_size, torch.device("cuda", local_rank))
        if local_rank == 0:
            start_ahead("kernels", compile_kernels, settings, ranks)
        if settings.compile != "off":
            start_ahead("updates", compile_updates, settings, ranks)
            start_ahead("average and attention", compile_others, settings, ranks)


def start_ahead(what: str, function, settings, ranks):
    """Starts a process that calls function, and puts it into AHEAD; OSError if it cannot."""
    here, there = multiprocessing.Pipe()
    values = function, settings, ranks, there
    process = multiprocessing.get_context("fork").Process(target=work_ahead, args=values)
    with handling_signals(signal.SIG_DFL):  # in it, signals end it; the run itself reports them
        process.start()
    there.close()
    atexit.register(process.kill)
    AHEAD.append(Ahead(what, process, here))


def work_ahead(function, settings, ranks, pipe):
    """What such a process does: calls function(settings, ranks, pipe, tell).

    That calls tell() for each thing that it has compiled, and the pipe gets the count.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # the run has ended before
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    started = time.monotonic()
    made = 0

    def tell(more: int = 1, note: str = ""):
        nonlocal made
        made += more
        pipe.send(f"{made} in {time.monotonic() - started:.1f}s{note}")

    try:
        function(settings, ranks, pipe, tell)
        tell(0, ", all there are")
    except Exception as error:
        pipe.send(f"{made}, then {type(error).__name__}: {error}".splitlines()[0])


def allow_updates_ahead(spare: float, count: int):
    """Tells waiting processes to begin if `spare` bytes of the GPU do for `count` parameters."""
    for what, _, pipe in AHEAD:
        if what != "kernels" and spare > UPDATE_BYTES * count + CONTEXT_BYTES:
            with suppress(OSError):  # it has ended
                pipe.send("begin")


def end_ahead(log):
    """Ends compile_ahead()'s processes, if there are any, and logs what they have made."""
    while AHEAD:
        what, process, pipe = AHEAD.pop()
        process.kill()
        process.join()
        made = "none"
        with suppress(OSError, EOFError):
            while pipe.poll():
                made = pipe.recv()
        log(f"{what} compiled ahead: {made}")


UPDATE_BYTES = 64  # of a parameter: itself twice, gradient, momentum, Adam's or Muon's, averages...
CONTEXT_BYTES = 2**31  # CUDA's own and kernels, of two processes; calibration's attention


def compile_updates(settings, ranks, pipe, tell):
    """Compiles what torch compiles of a step after its gradients, by a step that changes nothing.

    It takes some of the GPU's memory, so it waits until the run has chosen how much that takes.
    """
    model = await_model(settings, ranks, pipe)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Optimizers(model, settings, ranks).step(0.0, settings.muon_momentum)
    tell()


def compile_others(settings, ranks, pipe, tell):
    """Compiles the average, likewise, and FlexAttention as export's calibration calls it.

    Calibration is not compiled as a whole, so FlexAttention compiles itself there.
    """
    model = await_model(settings, ranks, pipe)
    compile_average(WeightAverage(model, settings, ranks), ranks.device)
    tell()
    attention = next((x for x in model.modules() if isinstance(x, Attention)), None)
    if attention and settings.calibrates:
        micro_batch = choose_micro_batch(settings, ranks, free=math.inf)
        shape = choose_calibration_rows(settings, micro_batch), settings.train_seq_len
        tokens = torch.full(shape, BOS_ID, device=ranks.device)
        x = torch.zeros(*shape, settings.model_dim, dtype=model.compute_dtype, device=ranks.device)
        with torch.set_grad_enabled(settings.shares_bits):  # as collect_costs() does
            y, _ = attention(x, model.context_of(tokens))
        if settings.shares_bits:
            y.sum().backward()
        tell()


def await_model(settings, ranks, pipe) -> Model:
    """A model like the run's, once the run has said that there is room for it on the GPU."""
    pipe.recv()
    torch.cuda.set_device(ranks.device)
    model = build_model(settings, ranks)
    if settings.spelling_features:
        share_by_spelling(model)
    return model


def compile_kernels(settings, ranks, pipe, tell):
    """Compiles our kernels: launches them on tensors without data, and runs none.

    Triton's cache goes by a kernel's text, its arguments' types and constants, and the kind of GPU.
    """
    made = set()
    run = triton.JITFunction.run

    def compile_only(kernel, *arguments, **options):
        gpu = triton.runtime.driver.active
        gpu.get_current_stream = lambda device: 0  # a real one would take some of the GPU's memory
        compiled = run(kernel, *arguments, **options | {"warmup": True})
        if compiled.hash not in made:
            gpu.launcher_cls(compiled.src, compiled.metadata)  # until triton 3.6 a compiler's work
            made.add(compiled.hash)
            tell()

    triton.JITFunction.run = compile_only
    with torch.device("meta"), OwnCode():
        launch_kernels(settings, ranks)


class OwnCode(TorchDispatchMode):
    """While entered, our operators' own code runs on tensors without data, in place of fakes."""

    def __init__(self):
        super().__init__()
        defined = [x for x in globals().values() if isinstance(x, torch.library.CustomOpDef)]
        self.ours = {x._opoverload: x._init_fn for x in defined}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        """Runs an operator of ours by its own code, any other as torch does."""
        return self.ours.get(operator, operator)(*args, **kwargs or {})


def launch_kernels(s, ranks):
    """Launches all our kernels that a step needs, forward and backward, and the export."""
    gpu = ranks.device
    scan = choose_scan_backend(s, gpu) if parse_layers(s, "mamba_layers") else "none"
    model = model_skeleton(s)
    model.compute_dtype = activation_dtype(s, gpu)
    shape = choose_micro_batch(s, ranks, free=math.inf) // s.train_seq_len, s.train_seq_len
    x = torch.empty(*shape, s.model_dim, dtype=model.compute_dtype, requires_grad=True)
    start = torch.empty(shape, dtype=torch.bool) if s.document_reset else None
    for float8 in (choose_float8(model, s, gpu), "none"):  # which is what all but steps has
        if scan == "triton":
            y, _ = Mamba(s, scan)(x, Context(start, turns=None, float8=float8))
            y.sum().backward()
        if parse_layers(s, "mlp_layers"):
            mlp = MLP(s, gpu)
            add = mlp.in_float8 if "mlp" in float8 else mlp
            add(x, 1.0).sum().backward()
    hidden = x.detach().flatten(0, 1)
    output_matrix = torch.empty(s.vocab_size, s.model_dim, dtype=x.dtype)
    targets = torch.empty(len(hidden), dtype=torch.int64)
    impossible = torch.empty(s.vocab_size, -(-s.vocab_size // 8), dtype=torch.uint8)
    pairs = [targets, impossible] if s.mask_impossible_pairs else []
    for slopes in (True, False):
        fused_cross_entropy(hidden, output_matrix, targets, s.logit_softcap, slopes, pairs)
    if s.trellis_states:
        fused_trellis_search(torch.empty(3, 1, TRELLIS_ROWS), s.trellis_states)


# ==================================================================================================
# 12. Published peers
# The first Mamba's scan, the libraries' kernels, other quantizers' grids, attention's backends.


def selective_scan(
    tensors, document_start: Tensor | None, state: Tensor | None, backend: str, chunk_size: int
) -> tuple[Tensor, Tensor | None]:
    """The first Mamba's recurrence (arXiv 2312.00752), H channels with N states each: y, last h.

        dt_t = softplus(step_t + bias)
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t
        y_t = (C_t h_t + D x_t) SiLU(gate_t)

    tensors: x, step (B, L, H), A (H, N) < 0, B, C (B, L, N), D (H,), gate (B, L, H), bias (H,).
    state: the h (B, H, N) that earlier tokens left, or None. The library, "fused", knows neither
    documents nor states: it returns None, and with a state given, "parallel" takes its place.
    """
    if backend == "fused" and state is None:  # mamba_ssm wants (B, H, L)
        turned = [x.mT.contiguous() if x.dim() == 3 else x for x in tensors]
        return library_kernel(turned, None, "selective_scan", 0).mT, None
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    value, step, decay_rate, key, query, skip, gate, bias = (x.to(dtype) for x in tensors)
    step = F.softplus(step + bias)
    reset = torch.zeros_like(step[..., 0])
    if document_start is not None:
        reset = reset.masked_fill(document_start, -torch.inf)
    if state is None:
        state = value.new_zeros(len(value), *decay_rate.shape)
    outputs = []
    options = {"use_reentrant": False, "preserve_rng_state": False}
    chunks = (x.split(chunk_size, dim=1) for x in (value, step, key, query, reset))
    for part in zip(*chunks, strict=True):
        inputs = (*part, decay_rate, state, backend)
        y, state = checkpoint(selective_chunk, *inputs, **options)  # stores one chunk's states
        outputs.append(y)
    y = torch.cat(outputs, dim=1) + skip * value
    return (y * F.silu(gate)).to(tensors[0].dtype), state


def selective_chunk(value, step, key, query, reset, decay_rate, state, backend: str):
    """C_t h_t (B, T, H) of a chunk's T tokens, and their last h (B, H, N).

    reset (B, T): 0, or -infinity where a document starts. "parallel" is Hillis and Steele's scan:
    after round r a token's state holds what the 2**r tokens up to it left; log2 T rounds suffice.
    """
    rates = torch.addcmul(reset[..., None, None], step.unsqueeze(-1), decay_rate)
    decay = rates.exp()  # (B, T, H, N)
    states = (step * value).unsqueeze(-1) * key.unsqueeze(2)
    if backend == "sequential":
        held = [state]
        for a, b in zip(decay.unbind(1), states.unbind(1), strict=True):
            held.append(a * held[-1] + b)
        states = torch.stack(held[1:], dim=1)
    else:
        first = states[:, :1] + decay[:, :1] * state.unsqueeze(1)
        states = torch.cat([first, states[:, 1:]], dim=1)
        decay = decay[:, 1:]  # from token reach on, over reach tokens
        reach = 1
        while reach < states.shape[1]:
            reached = states[:, reach:].addcmul(decay, states[:, :-reach])
            states = torch.cat([states[:, :reach], reached], dim=1)
            decay = decay[:, reach:] * decay[:, :-reach]
            reach *= 2
    return (states * query.unsqueeze(2)).sum(-1), states[:, -1].clone()


# ---- Libraries' kernels --------------------------------------------------------------------------
# Where a user has built them: causal_conv1d's convolution, mamba_ssm's scans (arXiv 2312.00752,
# 2405.21060), FlashAttention 2 and 3 (arXiv 2307.08691, 2407.08608). One operator calls them all,
# by name. Its backward pass runs the library's forward pass again, under autograd, as backward
# passes' own arguments differ from version to version.

LIBRARIES = {  # by MAMBA_VERSION; mamba_ssm can be built without selective_scan_cuda
    1: ("causal_conv1d", "selective_scan_cuda", "mamba_ssm.ops.selective_scan_interface"),
    2: ("causal_conv1d", "mamba_ssm.ops.triton.ssd_combined"),
}
FLASH_LIBRARIES = {"fa3": "flash_attn_interface", "fa2": "flash_attn"}  # by ATTENTION_BACKEND
INSTALL = "pip install --no-build-isolation mamba-ssm causal-conv1d"


class LacksLibrary(str):
    """A reason not to run that INSTALL removes."""


def why_not_fused(settings) -> str:
    """Why the libraries cannot run the layers of these settings; "" if they can."""
    version = settings.mamba_version
    if version == 1 and settings.document_reset:
        return "keeps no documents apart in the first Mamba"
    if version == 1 and settings.mamba_d_state > 256:
        return "has at most MAMBA_D_STATE=256"
    for module in LIBRARIES[version]:
        try:
            importlib.import_module(module)
        except Exception as error:  # any kind, as if built for another torch, CUDA or triton
            return LacksLibrary(f"lacks a library ({first_sentence(error)}): {INSTALL}")
    return ""


def call_library(tensors, sequence, name: str, size: int) -> Tensor:
    """Calls one of the libraries' functions; its result is shaped like the first tensor.

    name: "convolution", "selective_scan", "chunk_scan" or one of FLASH_LIBRARIES. sequence: for the
    chunked scan each token's document, for FlashAttention document_edges(), or None. size: the
    scan's chunk, or the most tokens that a document may have.
    """
    if name == "convolution":
        library = importlib.import_module("causal_conv1d")
        return library.causal_conv1d_fn(*tensors, activation="silu")
    if name == "selective_scan":
        library = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        return library.selective_scan_fn(*tensors, delta_softplus=True)
    if name == "chunk_scan":
        library = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        x, dt, a, b, c, d, z, bias = tensors
        options = {"D": d, "z": z, "dt_bias": bias, "seq_idx": sequence, "dt_softplus": True}
        return library.mamba_chunk_scan_combined(x, dt, a, b, c, size, **options)
    library = importlib.import_module(name)
    options = {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    function = library.flash_attn_func
    if sequence is not None:
        function = library.flash_attn_varlen_func
        options |= {"cu_seqlens_q": sequence, "cu_seqlens_k": sequence}
        options |= {"max_seqlen_q": size, "max_seqlen_k": size}
    y = function(*tensors, **options)
    return y[0] if isinstance(y, tuple) else y  # some versions also return log-sums


@torch.library.custom_op(f"{OPERATORS}::library_kernel", mutates_args=())
def library_kernel(tensors: list[Tensor], sequence: Tensor | None, name: str, size: int) -> Tensor:
    """call_library() as an operator; its result is contiguous."""
    return call_library(tensors, sequence, name, size).contiguous()


@torch.library.custom_op(f"{OPERATORS}::library_backward", mutates_args=())
def library_backward(
    d_y: Tensor, tensors: list[Tensor], sequence: Tensor | None, name: str, size: int
) -> list[Tensor]:
    """The gradients of tensors, by the library's own autograd, after its forward pass again."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    with torch.enable_grad():
        y = call_library(leaves, sequence, name, size)
    return [compact(x) for x in torch.autograd.grad(y, leaves, d_y)]  # results share no memory


def _keep_library_inputs(ctx, inputs, output):
    tensors, sequence, *ctx.rest = inputs
    ctx.save_for_backward(sequence, *tensors)


def _library_autograd(ctx, d_y):
    sequence, *tensors = ctx.saved_tensors
    return library_backward(d_y.contiguous(), tensors, sequence, *ctx.rest), None, None, None


library_kernel.register_fake(lambda tensors, *_: tensors[0].new_empty(tensors[0].shape))
library_kernel.register_autograd(_library_autograd, setup_context=_keep_library_inputs)
library_backward.register_fake(lambda _, tensors, *__: [x.new_empty(x.shape) for x in tensors])


def library_scan(projected, parameters, sizes, document_start, chunk_size: int):
    """mamba_scan() of Mamba-2 by mamba_ssm's chunked scan, without a state."""
    column = sizes.split(projected)
    key, query = (column[name].unsqueeze(2) for name in ("key", "query"))  # one for all heads
    tensors = [column["value"], column["step"], parameters.decay_rate, key, query]
    tensors += [parameters.skip, column["gate"], parameters.step_bias]
    # Documents are numbered: a token sees the tokens with its own number.
    number = None if document_start is None else document_start.cumsum(1, dtype=torch.int32)
    y = library_kernel(tensors, number, "chunk_scan", chunk_size).flatten(2)
    return y, y.to(parameters.skip.dtype).square().mean(-1), None


# ---- Other quantizers ----------------------------------------------------------------------------
# Steps of other grids than SDClip's, for grid_steps() in section 8.

PERCENTILES = (0.99, 0.995, 0.998, 1.0)


def percentile_steps(weight: Tensor, limits: Tensor, clips: Tensor) -> Tensor:
    """Steps (rows, 1) of grids that end at a percentile of a row's magnitudes, times clips / 3.

    Each row takes the one of PERCENTILES that errs least. clips / 3 is 1 for k = 3, which is about
    where the 99.7th percentile of a Gaussian's magnitudes lies.
    """
    magnitudes = weight.abs().sort(dim=1).values
    best = sdclip_steps(weight, limits, clips)
    least = torch.full_like(best, math.inf)
    for percentile in PERCENTILES:
        magnitude = magnitudes[:, int(percentile * weight.shape[1]) - 1, None]
        steps = exact_steps(clips / 3 * magnitude / limits)
        rounded = round_to_grid(weight, steps, limits) * steps
        error = (weight - rounded).norm(dim=1, keepdim=True)
        best = torch.where(error < least, steps, best)
        least = error.clamp(max=least)
    return best


def decoupled_steps(weight: Tensor, limits: Tensor, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Steps of rows (rows, 1) and columns (columns,), after Q-Mamba (2025.findings-acl.551).

    A column's step is its norm once all rows have length 1; rows' are SDClip's after that division.
    """
    columns = exact_steps(F.normalize(weight).norm(dim=0))
    return sdclip_steps(weight / columns, limits, clips), columns


def ternary_steps(weight: Tensor, limits: Tensor, clips: Tensor) -> Tensor:
    """Steps (rows, 1): of ternary rows mean magnitudes (arXiv 2402.17764), of others SDClip's."""
    mean_magnitude = exact_steps(weight.abs().mean(dim=1, keepdim=True))
    return torch.where(limits == TERNARY_MAX, mean_magnitude, sdclip_steps(weight, limits, clips))


# ---- Attention's backends ------------------------------------------------------------------------
# What attend() calls besides SDPA and the formula.

BLOCK = 128  # side, in tokens, of a block that FlexAttention computes or leaves out
compile_once = cache(torch.compile)


@torch.library.custom_op(f"{OPERATORS}::document_block_lists", mutates_args=())
def document_block_lists(reach: Tensor) -> list[Tensor]:
    """Which blocks of keys each block of queries reads, from reach (B, T) int32, and the reverse.

    A block of queries reads the blocks from the start of its first query's document up to itself.
    One that its last query sees as a whole needs no mask; others are masked token by token. Returns
    reach, then listed() four times, of blocks (B, 1, blocks, blocks): masked and whole ones by
    block of queries, then by block of keys. It is an operator because inductor (torch 2.11) refuses
    a mask whose tensors it would fuse.
    """
    length = reach.shape[1]
    block = torch.arange(-(-length // BLOCK), device=reach.device)
    first = block * BLOCK  # each block's first token
    last = (first + BLOCK - 1).clamp(max=length - 1)
    whole = (first + BLOCK <= length)[:, None]  # blocks of queries that the window does not cut off
    earliest = (first - reach[:, first])[:, None, :, None]  # key that the first query sees
    latest = (last - reach[:, last])[:, None, :, None]  # and the last one, (B, 1, blocks, 1)
    full = (block < block[:, None]) & whole & (first >= latest)  # (B, 1, of queries, of keys)
    masked = (block <= block[:, None]) & (first + BLOCK > earliest) & ~full
    lists = [*listed(masked), *listed(full), *listed(masked.mT), *listed(full.mT)]
    return [reach.clone(), *(x.contiguous() for x in lists)]  # kernels take the strides for granted


@document_block_lists.register_fake
def _document_block_lists_shapes(reach) -> list[Tensor]:
    blocks = -(-reach.shape[1] // BLOCK)
    shapes = [(len(reach), 1, blocks), (len(reach), 1, blocks, blocks)] * 4
    return [torch.empty_like(reach), *(reach.new_empty(shape) for shape in shapes)]


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many of chosen (..., N) are true, (...); their places first, (..., N). Both int32."""
    places = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), places.int()


def document_blocks(reach: Tensor):
    """FlexAttention's BlockMask of documents, from reach (B, T) int32, on its device."""
    # Imported only here, as that loads the compiler and puts its folder into the environment.
    from torch.nn.attention.flex_attention import BlockMask

    length = reach.shape[1]
    reach, *lists = document_block_lists(reach)

    def mask(b, _, query, key):
        return (key <= query) & (query - key <= reach[b, query])

    return BlockMask((length, length), *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask)


def attend_by_blocks(query, key, value, documents: Documents | None) -> Tensor:
    """attend() by FlexAttention (arXiv 2412.05496), which skips unseen blocks: (B, heads, T, D)."""
    from torch.nn.attention.flex_attention import flex_attention

    if documents is None:
        nowhere = torch.zeros(query.shape[0], query.shape[2], dtype=bool, device=query.device)
        documents = find_documents(nowhere, "flex")
    if query.is_cuda and not torch.compiler.is_compiling():  # not compiled, it has all scores
        flex_attention = compile_once(flex_attention, dynamic=False)
    return flex_attention(query, key, value, block_mask=documents.blocks, enable_gqa=True)


def document_edges(start: Tensor) -> tuple[Tensor, Tensor]:
    """Where documents begin in windows laid end to end, and where all end; start: (B, T) bool.

    Returns (slots + 1,) int32, ascending; slots left over hold the end. There is a slot for each
    window, and one more for every 128 tokens, at least 256. And () bool: whether they are too few.
    """
    batch, length = start.shape
    total = start.numel()
    slots = batch + max(256, total // 128)
    place = torch.arange(total, device=start.device, dtype=torch.int32)
    begins = start.flatten() | (place % length == 0)
    begun = torch.where(begins, place, total).sort().values[:slots]
    return F.pad(begun, (0, slots + 1 - len(begun)), value=total), begins.sum() > slots


TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def attend_by_lengths(query, key, value, documents: Documents | None, backend: str) -> Tensor:
    """attend() by FlashAttention, which takes documents by length; NaN if they are too many."""
    length = query.shape[1]
    edges = None if documents is None else documents.edges
    heads = [x if edges is None else x.flatten(0, 1) for x in (query, key, value)]
    if backend in FLASH_LIBRARIES:
        y = library_kernel(heads, edges, FLASH_LIBRARIES[backend], length)
    else:
        from torch.nn.attention.varlen import varlen_attn

        # From torch 2.11 on causal is a window, and no longer a flag.
        options = {"window_size": (-1, 0)} if TORCH >= (2, 11) else {"is_causal": True}
        if TORCH >= (2, 12):  # takes fewer key heads than query heads
            options["enable_gqa"] = True
        else:
            shared = query.shape[2] // key.shape[2]  # query heads that read one key head
            heads = [heads[0], *(x.repeat_interleave(shared, dim=1) for x in heads[1:])]
        y = varlen_attn(*heads, edges, edges, length, length, **options)
    y = y.view_as(query)
    return y if documents is None else y.masked_fill(documents.crowded, math.nan)


@cache
def attention_problem(settings, device: torch.device) -> str:
    """Why ATTENTION_BACKEND cannot run, by trying it forward and backward; "" if it can."""
    backend = settings.attention_backend
    confined = settings.confines_documents
    head = settings.model_dim // settings.num_heads
    if backend == "flex" and device.type != "cuda":
        return "FlexAttention has no backward pass on a CPU"
    if backend == "flex" and 16 <= head <= 256:  # known to run; a trial would compile for seconds
        return ""
    if confined and backend == "cudnn":
        return "cuDNN cannot keep documents apart"
    if confined and backend == "flash" and TORCH < (2, 10):  # varlen_attn()
        return "to keep documents apart, it needs torch 2.10 or later"
    dtype = activation_dtype(settings, device)
    options = {"device": device, "dtype": dtype, "requires_grad": True}
    heads = (settings.num_heads, settings.num_kv_heads, settings.num_kv_heads)
    try:
        with torch.enable_grad():
            leaves = [torch.ones(1, BLOCK, count, head, **options) for count in heads]
            nowhere = torch.zeros(1, BLOCK, dtype=torch.bool, device=device)
            documents = find_documents(nowhere, backend) if confined else None
            attend(*leaves, documents, backend).sum().backward()
    except Exception as error:  # any kind: libraries, compilers and drivers have their own
        absent = isinstance(error, ImportError | AttributeError) and backend in FLASH_LIBRARIES
        build = " (build it from FlashAttention's own repository)" if absent else ""
        return first_sentence(error) + build
    return ""


def first_sentence(error: Exception) -> str:
    """The first sentence of what an exception says, or, if it says nothing, its type."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].partition(". ")[0]


# ==================================================================================================
# 13. Other scripts' names
# The contest's published scripts read 137 variables, and people try others. If such a name were
# ignored, a sweep over it would be equal runs: so each is another name of a setting, or refused.
# A converter returns a setting's text, given the environment and the Settings of our own names.


def convert_recurrence(environment: dict[str, str], settings) -> str:
    """LAYER_ORDER with RECUR_REPEATS (1) more passes over RECUR_LAYERS, as RECUR_MODE says."""
    need("RECUR_LAYERS" in environment, "RECUR_REPEATS and RECUR_MODE need RECUR_LAYERS")
    mode = environment.get("RECUR_MODE", "block").strip()
    need(mode in ("block", "layer"), f"RECUR_MODE={shown(mode)} should be one of block, layer")
    layers = parse_layers(settings, "RECUR_LAYERS", environment["RECUR_LAYERS"])
    more = sorted(set(layers)) * read_number(environment, "RECUR_REPEATS", 1)
    order = list(range(settings.num_layers))
    after = max(layers, default=0) + 1
    order[after:after] = more
    if mode == "layer":
        order.sort()
    return ",".join(map(str, order)) if more else "all"


def convert_loops(environment: dict[str, str], settings) -> str:
    """LAYER_ORDER with NUM_LOOPS more passes over the layers from LOOP_START to LOOP_END."""
    need("NUM_LOOPS" in environment, "LOOP_START and LOOP_END need NUM_LOOPS, the passes to add")
    first = read_number(environment, "LOOP_START", 3)
    last = read_number(environment, "LOOP_END", 4)
    repeats = read_number(environment, "NUM_LOOPS", 0)
    count = settings.num_layers
    problem = f"LOOP_START={first} LOOP_END={last} are not layers of {count}: set both"
    need(not repeats or first <= last < count, f"NUM_LOOPS={repeats}: {problem}")
    layers = f"{first}-{last}" if repeats else "none"
    return convert_recurrence({"RECUR_LAYERS": layers, "RECUR_REPEATS": str(repeats)}, settings)


def convert_rope_dims(environment: dict[str, str], settings) -> str:
    """ROPE_FRACTION that turns ROPE_DIMS dimensions of each head; 0 is all."""
    head = settings.model_dim // max(1, settings.num_heads)
    dims = read_number(environment, "ROPE_DIMS", 0) or head
    need(dims <= head, f"ROPE_DIMS={dims} is more than a head has, {head}")
    fraction = dims / max(1, head)
    return repr(math.nextafter(fraction, 1.0) if int(head * fraction) < dims else fraction)


def convert_average(environment: dict[str, str], settings) -> str:
    """AVERAGE from EMA_ENABLED and SWA_ENABLED; one that is not given leaves its part as usual."""
    usual = settings.average
    parts = ["ema"] if read_number(environment, "EMA_ENABLED", "ema" in usual) else []
    parts += ["swa"] if read_number(environment, "SWA_ENABLED", "swa" in usual) else []
    return "+".join(parts) or "none"


# Names that are translated together; the setting that they become, and the converter.
CONVERTED = {
    "EMA_ENABLED SWA_ENABLED": ("AVERAGE", convert_average),
    "LOOP_END LOOP_START NUM_LOOPS": ("LAYER_ORDER", convert_loops),
    "RECUR_LAYERS RECUR_MODE RECUR_REPEATS": ("LAYER_ORDER", convert_recurrence),
    "ROPE_DIMS": ("ROPE_FRACTION", convert_rope_dims),
}

# Other names of settings, with the same values: the contest's, and some that people try.
RENAMED = """
    AVERAGE_HORIZON=EMA_HORIZON BETA1=ADAM_BETA1 BETA2=ADAM_BETA2 BIGRAM_DIM=BIGRAM_HASH_DIM
    BIGRAM_VOCAB_SIZE=BIGRAM_BUCKETS GRAD_CLIP_NORM=GRAD_CLIP,MAX_GRAD_NORM,CLIP_GRAD
    ITERATIONS=ITERS,NUM_ITERATIONS,NUM_STEPS,MAX_STEPS,TRAIN_STEPS,MAX_ITERS,TOTAL_STEPS,NSTEPS
    MAMBA_CHUNK_SIZE=MAMBA3_CHUNK_SIZE MAMBA_D_STATE=MAMBA3_D_STATE,D_STATE
    MAMBA_EXPAND=MAMBA3_EXPAND MAMBA_HEAD_DIM=MAMBA3_HEADDIM
    MAX_WALLCLOCK_SECONDS=MAX_WALLCLOCK,WALLCLOCK,MAX_SECONDS,TIME_LIMIT
    MODEL_DIM=D_MODEL,N_EMBD,HIDDEN_SIZE NUM_HEADS=N_HEAD,N_HEADS,NHEADS NUM_KV_HEADS=N_KV_HEADS
    NUM_LAYERS=N_LAYER,N_LAYERS QUANTIZER=QUANT RECUR_START=ENABLE_LOOPING_AT,RECUR_START_FRAC
    ROPE_BASE=ROPE_THETA SDCLIP_K=GPTQ_CLIP_SIGMAS SDCLIP_K_INT8=GPTQ_EMBED_CLIP_SIGMAS
    TRAIN_LOG_EVERY=LOG_EVERY,LOG_INTERVAL
    TRAIN_SEQ_LEN=SEQ_LEN,SEQUENCE_LENGTH,CONTEXT_LENGTH,MAX_SEQ_LEN,SEQLEN,N_CTX
    VAL_LOSS_EVERY=VAL_EVERY,EVAL_EVERY,EVAL_INTERVAL WARMDOWN_FRACTION=WARMDOWN_FRAC
    WARMDOWN_ITERS=WARMDOWN_STEPS WEIGHT_DECAY=MUON_WD,WD
"""
ALIASES = {name: fate for names, fate in CONVERTED.items() for name in names.split()}
for entry in RENAMED.split():
    ours, _, names = entry.partition("=")
    ALIASES |= dict.fromkeys(names.split(","), (ours, None))
del entry, ours, names

# Names that set nothing, and what holds instead. If a name has this value, it is let be.
REFUSALS = {
    "DTG_ENABLED=0 MTP_LOSS_WEIGHT=0 MTP_NUM_HEADS=0 TRIGRAM=0": "the model has no such part",
    "VALUE_RESIDUAL=0 VE_DIM VE_ENABLED=0 VE_LAYERS": "a layer's values are its own",
    "EVAL_BATCH_SEQS TTT_BATCH_SEQS": "VAL_BATCH_SIZE counts tokens, over all ranks",
    "FP16_EMBED=0 FP16_INPROJ_ROWS=0": "embeddings and Mamba's dynamics are stored as int8",
    "ATTN_PLACEMENT NUM_ATTN_LAYERS": "MAMBA_LAYERS names the layers that are not attention",
    "CONTROL_TENSOR_NAME_PATTERNS": "vectors and scales train in float32, by Adam",
    "EVAL_SEQ_LEN": "TRAIN_SEQ_LEN is also the window of evaluation",
    "EVAL_STATE_RESET=0": "EVAL_MODE and DOCUMENT_RESET say where state begins anew",
    "EVAL_TEMP=1": "the rules forbid to fit a temperature to validation text",
    "GATED_ATTENTION=1": "each head of attention has a gate",
    "GPTQ_CALIB_BATCHES GPTQ_NUM_SEQS": "CALIBRATION_TOKENS counts tokens",
    "GPTQ_LITE=0 USE_GPTQ=1": "QUANTIZER is round without GPTQ, and percentile to search for clips",
    "GRAD_ACCUM_STEPS GRADIENT_ACCUMULATION_STEPS": "MICRO_BATCH_TOKENS are computed at once",
    "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": "vectors are float16, but dt_bias and D float32",
    "LAWA_ENABLED=0 LAWA_FREQ LAWA_K": "AVERAGE says which average of the weights a run leaves",
    "MAMBA3_NGROUPS=1": "all heads share one group of keys and queries",
    "MAMBA3_OUTPROJ_NORM=1": "what enters out_proj is always normalized",
    "MAMBA3_ROPE_FRACTION=0.5": "half of a state's numbers turn",
    "MAMBA_GRAD_CHECKPOINT=1": "a scan's backward pass computes anew what it needs",
    "MAMBA_USE_CUDA=1": "SCAN_BACKEND says which scan runs, sequential being the loop",
    "MUON_EQ_R=1": "Muon always brings rows to one length",
    "QAT_ENABLED=0 QAT_START_FRAC=0": "LATE_QAT_THRESHOLD says when QAT begins",
    "QUANT_BITS=6 QUANT_BITS_MLP=6 QUANT_BITS_EMBED=8": "SDCLIP_K and QUANTIZER say how fine",
    "SWEEP_MODE=0": "tools/explore.py trains without exporting",
    "TTT_OPTIMIZER=sgd": "test-time training is by SGD, but of documents",
    "USE_BIGRAM_HASH=1": "BIGRAM_VOCAB_SIZE says how many rows bigrams have, 0 that there are none",
    "USE_BROTLI=0 USE_LZMA=1 USE_ZSTD=0": "artifacts are packed by an entropy coder and LZMA",
    "USE_ORTHO_INIT=0": "first weights are Gaussian, those of output matrices zero",
    "USE_SMEARGATE=0": "no gate mixes in the token before; Mamba-3's trapezoid does",
    # Former settings of this script.
    "SDCLIP_ATTENTION=1.0 SDCLIP_MLP=1.0": "SDCLIP_K is that of all int6 rows",
    "TTT_LORA_ALPHA": "branches are added 1.8 times, whatever TTT_LORA_RANK is",
    # Not the contest's, but people try them.
    "GLOBAL_BATCH_SIZE TOTAL_BATCH_SIZE BATCH_TOKENS BATCHSIZE": "TRAIN_BATCH_TOKENS is a step's",
    "DEVICE_BATCH_SIZE GRAD_ACCUM MICRO_BATCH_SIZE": "MICRO_BATCH_TOKENS is a rank's at once",
    "EPOCHS NUM_EPOCHS": "ITERATIONS or MAX_WALLCLOCK_SECONDS end a run",
    "SAVE_EVERY CKPT_EVERY CHECKPOINT_INTERVAL": "CHECKPOINT_EVERY says it, in seconds",
    "BATCH_SIZE TRAIN_BATCH_SIZE": "TRAIN_BATCH_TOKENS is a step's, VAL_BATCH_SIZE evaluation's",
    "ADAM_LR BASE_LR LEARNING_RATE LR LRATE MAX_LR MUON_LR": "MATRIX_LR, SCALAR_LR, …: see --help",
    "DROPOUT=0": "nothing is dropped",
    "DEPTH HEADS KV_HEADS LAYERS": "NUM_LAYERS, NUM_HEADS and NUM_KV_HEADS say how many",
    "DIM EMBED_DIM HIDDEN_DIM": "MODEL_DIM is the width of what layers add to",
    "D_FF FFN_DIM MLP_RATIO": "MLP_MULT is a hidden layer's width, in MODEL_DIM",
    "WARMUP_ITERS WARMUP_RATIO": "rates rise over a run's first hundredth; WARMUP_STEPS compile",
}

REFUSED = {}  # by name: the value that is let be, or "", and what holds instead
for entries, fact in REFUSALS.items():
    for entry in entries.split():
        refused, _, harmless = entry.partition("=")
        REFUSED[refused] = (harmless, fact)
del entries, entry, fact, refused, harmless, _

# Other programs use these names, too: only a warning says which setting may have been meant.
UNREAD = dict.fromkeys(("DATA_DIR", "DATA_FOLDER", "DATASET_PATH"), "DATA_PATH")
UNREAD |= dict.fromkeys(("LOGDIR", "LOG_PATH", "OUTPUT_DIR"), "LOG_DIR")
UNREAD |= dict.fromkeys(("RUN_NAME", "EXPERIMENT_NAME"), "RUN_ID")
UNREAD |= dict.fromkeys(("TOKENIZER", "TOKENIZER_FILE", "TOKENIZER_MODEL"), "TOKENIZER_PATH")


def same_value(text: str, other: str) -> bool:
    """Whether two texts are the same word or number; true is 1, false is 0."""
    words = [text.strip().lower(), other.strip().lower()]
    words = [{"false": "0", "true": "1"}.get(word, word) for word in words]
    with suppress(ValueError):
        words = [float(word) for word in words]
    return words[0] == words[1]


def what_holds(name: str, value) -> str:
    """What holds instead of a setting that does not exist; "" if this value says just that."""
    harmless, fact = REFUSED.get(name.upper(), ("", "another version's"))
    return "" if harmless and same_value(str(value), harmless) else fact


def translate_names(environment: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """For others' names variables of ours to add, and lines for the log; UserError if refused."""
    settings, _ = read_own(environment)
    added = {}
    lines = []
    for name in sorted(environment.keys() & REFUSED.keys()):
        _, fact = REFUSED[name]
        said = f"{name}={shown(environment[name])}"
        need(not what_holds(name, environment[name]), f"{said} cannot be set: {fact}")
        lines.append(f"{said} sets nothing: {fact}")
    for name in sorted(environment.keys() & ALIASES.keys()):
        ours, convert = ALIASES[name]
        value = convert(environment, settings) if convert else environment[name]
        try:
            check_values(read_own({ours: value})[0])
        except UserError as error:
            raise UserError(f"{name} is {ours} here: {error}") from None
        before = added.get(ours, environment.get(ours, value))
        twice = f"{name} is {ours}={shown(value)} here, but it is also {shown(before)}"
        need(same_value(before, value), f"{twice}: unset one")
        added[ours] = value
        lines.append(f"{name}={shown(environment[name])} is {ours}={shown(value)} here")
    for name in sorted(environment.keys() & UNREAD.keys()):
        if UNREAD[name] not in environment:
            lines.append(f"warning: {name} is not read; {UNREAD[name]} is the setting")
    return added, lines


# ---- Misspelt names ------------------------------------------------------------------------------

# Beginnings that no other program's variables have: a name with one must be a known one.
FAMILIES = ("BIGRAM_", "EMA_", "GPTQ_", "LATE_QAT_", "MUON_", "RECUR_", "SDCLIP_", "SWA_", "TTT_")

# Names merely similar to COMMON_WORDS are other programs'; so are MODEL_DIR, and mamba's own.
COMMON_WORDS = {"BATCH_SIZE", "LOG_DIR", "QUANTIZER", "RUN_ID", "SEQ_LEN"}
STRANGERS = {"MAMBA_EXE", "MAMBA_FORCE_BUILD", "MODEL_DIR"}

# What people write out, and our names abbreviate.
LONG_WORDS = {"_LEARNING_RATE": "_LR", "_MULTIPLIER": "_MULT", "_MULTIPLE": "_MULT"}
LONG_WORDS |= {"_DIMENSION": "_DIM", "_EPSILON": "_EPS", "VOCABULARY_": "VOCAB_"}


def refuse_misspelt(environment: dict[str, str]):
    """Raises UserError for an unknown variable that seems meant for this script.

    It does if it begins with one of FAMILIES; if, without case, underscores and LONG_WORDS, it is
    one of our names up to one letter or a tenth of them; or if it begins with a long one of ours.
    Short names of a single word are not compared.
    """
    known = {name.upper() for name in FIELDS} | ALIASES.keys() | REFUSED.keys()
    likely = [n for n in sorted(known - COMMON_WORDS) if len(n) >= (5 if n.find("_") > 1 else 9)]
    names = {name.replace("_", ""): name for name in likely}
    long_names = tuple(flat for flat, name in names.items() if len(flat) >= 10 and "_" in name)
    unknown = environment.keys() - known - STRANGERS
    for variable in sorted(name for name in unknown if name[:1].isalpha()):
        capitals = {variable.upper()} & known - environment.keys()
        need(not capitals, f"{variable} is not a setting: write {variable.upper()}, in capitals")
        flat = variable.upper()
        for written_out, short in LONG_WORDS.items():
            flat = flat.replace(written_out, short)
        flat = flat.replace("_", "")
        nearest = difflib.get_close_matches(flat, names, 1, 0.8)
        longest = max([1, len(flat), *map(len, nearest)])
        cutoff = min(0.9, 1 - 1 / longest)  # one letter in longest
        near = difflib.get_close_matches(flat, nearest, 1, cutoff) or flat.startswith(long_names)
        if near or variable.startswith(FAMILIES):
            meant = names[nearest[0]] if nearest else ""
            hint = f"did you mean {meant}? (see --help)" if meant else "see --help"
            reason = REFUSED.get(meant, ("", hint))[1]
            raise UserError(f"{variable} is not a setting; {reason}")


if __name__ == "__main__":
    sys.exit(run())

"""Proves what can be proved about a submission, and prints a Markdown table for its reviewers.

    python -m tools.audit ARTIFACT --data FOLDER --tokenizer FILE [--script train_gpt.py] [--log logs/run.txt]

FOLDER holds the validation shards. Settings of the evaluation are environment variables, as for the script; give those
of the run. Exit status: 0 if every check holds, 1 if one fails, 2 for unusable input.

Two evaluations of the whole set are made: one in a process of its own that runs the script as it stands, in a folder
with nothing but the script, artifact, tokenizer and validation shards; one here, watched. That they agree to the bit
ties what is proved here to what the script does there. Causality is tested on the first chunks only.

What it cannot prove: Python reports every file that Python opens, but not what native code opens by itself (the
tokenizer is read so); and what training did can be read from its log alone.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.audit", file=sys.stderr)
    sys.exit(2)

from tools.command import Parser, UserError

# The contest's figures, not the script's: what is audited does not set its own limits.
CAP_BYTES = 16_000_000
CLOCK_SECONDS = 600.0  # of training where the log names no clock
BOS_ID = 1
SHARD_HEADER_BYTES = 1024

PREFIX_CHUNKS = 3.5  # of test-time training, which the causality check reads
CUTS = 4  # places behind which it replaces all tokens
SAMPLED_TARGETS = 16  # whose whole distribution is computed
CANDIDATES = 1024  # of these at once
EXACT_DIGITS = 8  # of a score

# On a GPU, matrices are bfloat16 and sums of gradients come in any order; on the CPU, all is repeatable.
GPU_SCORE_NOISE = 1e-3  # BPB between two runs
OTHER_MACHINE_NOISE = 1e-2  # BPB between two kinds of machine
CPU_NATS_ERROR, GPU_NATS_ERROR = 2e-4, 5e-2  # of one target, float32 and bfloat16
CPU_SUM_ERROR, GPU_SUM_ERROR = 1e-4, 1e-2  # of a sum of probabilities


class LogFigures(NamedTuple):
    """What a run's log claims; None or {} where it does not say."""

    source: str  # of the script that wrote it, perhaps behind earlier runs
    settings: dict[str, str]  # of the run and its machine
    total_bytes: int | None
    label: str
    val_loss: str  # as printed
    val_bpb: str
    training_seconds: float | None
    evaluation_seconds: float | None
    evaluation_limit: float | None
    epochs_given_up: int


@dataclass(frozen=True, eq=False)  # compared by identity: what was computed for one is kept
class Entry:
    """A submission, as the checks get it."""

    script: Path
    artifact: Path
    environment: dict[str, str]  # of the evaluation: settings, and what a process needs
    settings: Any
    given: set[str]  # names of the settings that were given
    ranks: Any
    tokenizer: Any  # the script's
    validation: Any  # the script's
    log: LogFigures | None = None
    seed: int = 0

    @property
    def on_cpu(self) -> bool:
        return self.ranks.device.type == "cpu"


# ---- What is given ---------------------------------------------------------------------------------------------------


def load_script(path: Path) -> ModuleType:
    """The script as a module; it is not run."""
    spec = importlib.util.spec_from_file_location("audited_script", path)
    if not path.is_file() or spec is None:
        raise UserError(f"no script at {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be loaded: {error!r}") from None
    needed = (
        "Evaluator",
        "EvaluationObserver",
        "ValidationSet",
        "Tokenizer",
        "load_model",
        "load_validation",
        "prepare_run",
        "UserError",
    )
    if missing := [name for name in needed if not hasattr(module, name)]:
        raise UserError(f"{path} is not a train_gpt.py: it has no {missing[0]}")
    return module


def read_log(path: Path) -> LogFigures:
    """The figures of the last run in a log."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the log {path}: {error}") from None
    *before, run = re.split(r"^={100}\n", text, flags=re.MULTILINE)

    def last(pattern: str) -> tuple[str, ...] | None:
        found = re.findall(pattern, run, re.MULTILINE)
        return found[-1] if found else None

    final = last(r"^final_int6_lzma_(\w+)_exact val_loss:(\d+\.\d{8}) val_bpb:(\d+\.\d{8})$")
    took = last(r"^evaluation took ([\d.]+)s of ([\d.e+]+)s; (\d+) epochs given up$")
    if not (before and final and took):
        raise UserError(f"{path} is not the log of a finished run")
    total, clock = (
        last(r"^Total submission size int6\+lzma: (\d+) bytes$"),
        last(r"training clock ([\d.]+)s"),
    )
    (settings, *_) = [line for line in run.split("\n") if line.startswith("python=")] or [""]
    pairs = (item.split("=", 1) for item in settings.split("  ") if "=" in item)
    return LogFigures(
        source=before[-1], settings=dict(pairs), total_bytes=int(total) if total else None, label=final[0],
        val_loss=final[1], val_bpb=final[2], training_seconds=float(clock) if clock else None,
        evaluation_seconds=float(took[0]), evaluation_limit=float(took[1]), epochs_given_up=int(took[2]),
    )  # fmt: skip


def open_entry(
    script: ModuleType,
    artifact: Path,
    data: Path,
    tokenizer: Path,
    environment: dict[str, str],
    log: Path | None = None,
) -> Entry:
    """Reads and validates all that the checks need. environment: the evaluation's settings among other variables."""
    alone = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "EVAL_NLL_PATH", "LOG_DIR"}
    paths = {"ARTIFACT": str(artifact), "DATA_PATH": str(data), "TOKENIZER_PATH": str(tokenizer)}
    kept = {name: value for name, value in environment.items() if name not in alone}
    environment = kept | paths | {"EVAL_ONLY": "1", "RUN_ID": "audit"}
    try:
        settings, given, ranks = script.prepare_run(environment)
        pieces = script.Tokenizer(str(tokenizer), settings.vocab_size)
        validation = script.load_validation(settings, pieces)
        _, settings = script.load_model(artifact, settings, given, ranks)
    except script.UserError as error:
        raise UserError(str(error)) from None
    figures = read_log(log) if log else None
    # Another evaluation has another score; the clock alone does not change it, where no epoch was given up.
    free = ("eval_nll_path", "eval_max_seconds")
    names = [f.name for f in dataclasses.fields(settings)]
    for name in (
        ["vocab_size", "train_seq_len", *names[names.index("eval_mode") :]] if figures else ()
    ):
        ours, theirs = str(getattr(settings, name)), figures.settings.get(name)
        if name not in free and ours != theirs:
            raise UserError(
                f"the log was made with {name.upper()}={theirs}, here it is {ours}: set it"
            )
    path = Path(script.__file__).resolve()
    return Entry(path, artifact, environment, settings, given, ranks, pieces, validation, figures)


# ---- A process of its own --------------------------------------------------------------------------------------------

# Runs the script under a hook that Python calls before it opens a file, starts a program or uses the network.
GUARD = """
import json, os, runpy, sys, time

record = open("record.jsonl", "w", buffering=1)

def note(kind, what):
    record.write(json.dumps([time.perf_counter(), kind, what]) + "\\n")

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        note("open", os.fsdecode(arguments[0]))
    elif event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        if arguments[:2] != ("/sbin/ldconfig", ["/sbin/ldconfig", "-p"]):  # so Triton looks for a driver
            note("program", repr(arguments[0]))
    elif event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        if not isinstance(arguments[-1], (str, bytes)) or event.startswith("socket.get"):  # not a socket file's name
            note("network", f"{event} {[a for a in arguments if isinstance(a, (str, tuple))]}")
            raise PermissionError("the network is closed")

sys.addaudithook(watch)
sys.argv = ["train_gpt.py"]
note("start", "")
try:
    runpy.run_path("train_gpt.py", run_name="__main__")
finally:
    note("end", "")
"""


class Alone(NamedTuple):
    """What a run in a process of its own gave."""

    status: int
    said: str  # the last line, of errors if it failed
    log: LogFigures | None
    nats: np.ndarray | None
    seconds: float  # from opening the artifact to the end
    opened: list[str]  # real paths of all files
    strangers: list[str]  # of these, neither in its folder nor part of Python or the system
    programs: list[str]
    network: list[str]


def belongs(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


@functools.lru_cache(maxsize=1)
def run_alone(entry: Entry) -> Alone:
    """Scores the artifact by running the script in a folder that holds only what the contest allows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for part in ("data", "home"):
            (folder / part).mkdir()
        shutil.copy(entry.script, folder / "train_gpt.py")
        shutil.copy(entry.artifact, folder / "artifact")
        shutil.copy(entry.environment["TOKENIZER_PATH"], folder / "tokenizer.model")
        for path in Path(entry.environment["DATA_PATH"]).glob("*_val_*.bin"):
            shutil.copy(path, folder / "data" / path.name)
        (folder / "guard.py").write_text(GUARD, encoding="utf-8")
        environment = entry.environment | {
            "ARTIFACT": "artifact", "DATA_PATH": "data", "TOKENIZER_PATH": "tokenizer.model", "LOG_DIR": "logs",
            "EVAL_NLL_PATH": "nats.npy", "HOME": str(folder / "home"), "TMPDIR": str(folder / "home"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "guard.py"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        record = [
            json.loads(line)
            for line in (folder / "record.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        opened = list(
            dict.fromkeys(
                os.path.realpath(folder / what) for _, kind, what in record if kind == "open"
            )
        )
        began = [
            when for when, kind, what in record if kind == "open" and Path(what).name == "artifact"
        ]
        python = [
            sys.prefix,
            sys.base_prefix,
            *sysconfig.get_paths().values(),
            *site.getsitepackages(),
        ]
        python += [
            site.getusersitepackages(),
            "/proc",
            "/sys",
            "/dev",
            "/etc",
            "/usr",
            "/lib",
            "/lib64",
        ]
        known = [os.path.realpath(path) for path in python] + [str(folder)]
        training = re.compile(r"_train_[^/]*\.bin$")
        lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
        return Alone(
            status=done.returncode,
            said=lines[-1] if lines else "",
            log=None if done.returncode else read_log(folder / "logs" / "audit.eval.txt"),
            nats=np.load(folder / "nats.npy") if (folder / "nats.npy").is_file() else None,
            seconds=record[-1][0] - min(began, default=record[0][0]),
            opened=[path.removeprefix(f"{folder}/") for path in opened],
            strangers=[
                path for path in opened if training.search(path) or not belongs(path, known)
            ],
            programs=[what for _, kind, what in record if kind == "program"],
            network=[what for _, kind, what in record if kind == "network"],
        )


# ---- A watched evaluation --------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """Something that happened during an evaluation, in order."""

    kind: str  # score; train: an update reads targets; step: an optimizer's; changed: weights did, without a step
    targets: np.ndarray  # their positions


class Sampled(NamedTuple):
    """One target's score, and what it should be."""

    position: int
    nats: float  # that the evaluator kept
    expected: float  # -log softmax in float64
    total: float  # of the probabilities that the script's own nats() gives to all tokens


@dataclass
class Observation:
    """What was seen of an evaluation."""

    times_written: np.ndarray  # (N,) how often each target got a score
    written: np.ndarray  # (N,) the last one
    score: Any = None  # the script's result
    events: list[Event] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    with_gradients: bool = False  # whether a score was computed with gradients


class Watcher:
    """An observer of the script's Evaluator, which tells it of what it does while it does it.

    What it is told it holds against what it can see for itself: the stream's tokens, the weights,
    and (by torch's hook, which the script has no part in) every step of an optimizer.
    """

    def __init__(self, script: ModuleType, entry: Entry, model: torch.nn.Module):
        self.script = script
        self.ranks = entry.ranks
        self.model = model
        stream = entry.validation.tokens
        self.stream = stream
        self.count = len(stream) - 1
        sampled = min(SAMPLED_TARGETS, self.count)
        self.wanted = np.random.default_rng(entry.seed).choice(self.count, sampled, replace=False)
        self.weights = fingerprint(model)
        self.stepped = False  # since the weights were last looked at
        self.seen = Observation(
            times_written=np.zeros(self.count, dtype=np.int64),
            written=np.zeros(self.count, dtype=np.float32),
        )

    def on_read(self, excerpt: Any) -> None:
        """Weights are looked at before each use of them; also of those with which scores are made."""
        self.note_change()

    def on_score(self, excerpt: Any, scored: np.ndarray, nats: Tensor) -> None:
        """Counts the scores, and computes a few of them anew."""
        self.seen.with_gradients |= torch.is_grad_enabled()
        self.note_change()
        positions = excerpt.positions[scored]
        np.add.at(self.seen.times_written, positions, 1)
        self.seen.written[positions] = nats.detach().float().cpu().numpy()[scored]
        self.seen.events.append(Event("score", positions))
        sampled = scored & np.isin(excerpt.positions, self.wanted)
        if sampled.any():
            self.seen.sampled += self.sample(excerpt, sampled, nats)

    def on_train(self, excerpt: Any) -> None:
        """An update sees the excerpt's targets, or else any of the stream."""
        self.seen.events.append(Event("train", self.targets_in(excerpt)))

    def on_step(self, *_: Any) -> None:
        """torch's hook behind every step of an optimizer."""
        self.stepped = True
        self.seen.events.append(Event("step", np.empty(0, dtype=np.int64)))

    def note_change(self) -> None:
        """Weights may change by steps only."""
        now = fingerprint(self.model)
        if now != self.weights and not self.stepped:
            self.seen.events.append(Event("changed", np.empty(0, dtype=np.int64)))
        self.weights = now
        self.stepped = False

    def targets_in(self, excerpt: Any) -> np.ndarray:
        """Positions of the targets; all of them if these are not the stream's tokens there."""
        for tokens, ahead in ((excerpt.tokens, 0), (excerpt.targets, 1)):
            places = np.minimum(excerpt.positions + ahead, self.count)
            if not np.array_equal(tokens.cpu().numpy(), self.stream[places]):
                return np.arange(self.count)
        return np.unique(np.minimum(excerpt.positions, self.count - 1))

    @torch.no_grad()
    def sample(self, excerpt: Any, where: np.ndarray, nats: Tensor) -> list[Sampled]:
        """Compares the scores where (B, T) is true with the distribution of the model as it is."""
        hidden = self.hidden(excerpt)
        sampled = []
        for row, column in np.argwhere(where):
            position = int(excerpt.positions[row, column])
            one = hidden[row : row + 1, column : column + 1]
            before = excerpt.tokens[row : row + 1, column : column + 1]
            logits = self.model.logits(one, before)[0, 0].double()
            target = int(self.stream[position + 1])
            expected = float(-torch.log_softmax(logits, dim=0)[target])
            total = self.total_probability(one, before, len(logits))
            sampled.append(Sampled(position, float(nats[row, column]), expected, total))
        return sampled

    def hidden(self, excerpt: Any) -> Tensor:
        """The model's hidden states at an excerpt's tokens, by the weights and states as they are.

        Where evaluation is stateful, an excerpt begins with tokens of an earlier part: zeros here.
        """
        order = self.model.order(True)
        if excerpt.resumed is None:
            return self.model(excerpt.tokens, order)
        seen, states = excerpt.resumed
        held = self.script.StateRelay(self.ranks, list(states))
        hidden = self.model.resume(excerpt.tokens, seen, order, held)
        return torch.nn.functional.pad(hidden, (0, 0, excerpt.tokens.shape[1] - hidden.shape[1], 0))

    def total_probability(self, hidden: Tensor, before: Tensor, vocabulary: int) -> float:
        """Sum over all tokens of the probability that the script's own nats() gives to each."""
        total = 0.0
        for tokens in torch.arange(vocabulary, device=hidden.device).split(CANDIDATES):
            every = hidden.expand(1, len(tokens), -1).contiguous()
            nats = self.model.nats(every, tokens[None], before.expand(1, len(tokens)))
            total += float(nats.double().neg().exp().sum())
        return total


def fingerprint(model: torch.nn.Module) -> list[int]:
    """A number for each parameter, which a change to any one of its bits changes.

    The sum, modulo 2**64, of its bits in parts of 16, each times an odd number of its own; computed
    where the parameter lies, as it is asked for with every batch.
    """
    sums = []
    for parameter in model.parameters():
        parts = parameter.detach().contiguous().view(-1).view(torch.int16).to(torch.int64)
        place = torch.arange(len(parts), device=parts.device)
        factors = (place * 0x5851F42D4C957F2D + 0x14057B7EF767814F) | 1
        sums.append((parts * factors).sum())
    return torch.stack(sums).tolist()


def load(script: ModuleType, entry: Entry) -> tuple[Any, Any]:
    """The artifact's model, and settings to evaluate it by without a clock."""
    model, settings = script.load_model(entry.artifact, entry.settings, entry.given, entry.ranks)
    return model, dataclasses.replace(settings, eval_max_seconds=2.0**40)


def evaluate(script: ModuleType, entry: Entry, tokens: np.ndarray) -> Any:
    """The score of tokens, as evaluate_artifact() makes it."""
    model, settings = load(script, entry)
    validation = script.ValidationSet(tokens, entry.tokenizer.target_bytes(tokens))
    return script.Evaluator(model, settings, entry.ranks, validation).evaluate()


@functools.lru_cache(maxsize=1)
def observe(script: ModuleType, entry: Entry) -> Observation:
    """Evaluates the whole validation set and records every score, update and step, in order."""
    model, settings = load(script, entry)
    watcher = Watcher(script, entry, model)
    evaluator = script.Evaluator(model, settings, entry.ranks, entry.validation, observer=watcher)
    hook = register_optimizer_step_post_hook(watcher.on_step)
    try:
        watcher.seen.score = evaluator.evaluate()
    finally:
        hook.remove()
    return watcher.seen


# ---- Checks: each takes the script's module and returns whether it holds, and the evidence ------------------------------


def check_bytes(script: ModuleType, entry: Entry) -> tuple[bool, str]:
    """Code and artifact fit, as files on disk, and are those of the log."""
    code, model = entry.script.stat().st_size, entry.artifact.stat().st_size
    problems, log = [], entry.log
    if code + model > CAP_BYTES:
        problems.append(f"over the cap of {CAP_BYTES:,}")
    if log and log.total_bytes not in (None, code + model):
        problems.append(f"the log says {log.total_bytes:,}")
    if log and not log.source.endswith(entry.script.read_text(encoding="utf-8") + "\n"):
        problems.append("the log was written by another script")
    sizes = f"{code:,} of code + {model:,} of model = {code + model:,} of {CAP_BYTES:,} bytes"
    agrees = "; the log agrees, and holds this script" if log else ""
    return not problems, "; ".join([sizes, *problems]) + ("" if problems else agrees)


def same_machine(script: ModuleType, entry: Entry) -> bool:
    """Whether the log comes from a machine like this."""
    here = script.describe_machine(entry.ranks)
    return all(
        entry.log.settings.get(name) == str(here[name]) for name in ("torch", "cuda", "hardware")
    )


def check_reproduced(script: ModuleType, entry: Entry) -> tuple[bool, str]:
    """The score follows from the artifact alone: in another process, without network and training data."""
    alone = run_alone(entry)
    for what, found in (("used the network", alone.network), ("opened", alone.strangers)):
        if found:
            return False, f"it {what}: {', '.join(found[:3])}"
    if (
        alone.programs and entry.on_cpu and entry.settings.compile != "on"
    ):  # compiling starts compilers
        return False, f"it started {alone.programs[0]}"
    if alone.status:
        return False, f"the script ended with status {alone.status}: {alone.said}"
    if alone.log.epochs_given_up:
        return (
            False,
            f"{alone.log.epochs_given_up} epochs were given up: raise EVAL_MAX_SECONDS to reproduce a score",
        )
    watched, noise = observe(script, entry).score, 0.0 if entry.on_cpu else GPU_SCORE_NOISE
    if (
        not np.array_equal(alone.nats, watched.nats)
        and abs(float(alone.log.val_bpb) - watched.val_bpb) >= noise
    ):
        return (
            False,
            f"{alone.log.val_bpb} BPB there, {watched.val_bpb:.{EXACT_DIGITS}f} in the watched evaluation",
        )
    shards = [path for path in alone.opened if path.startswith("data/")]
    evidence = f"{alone.log.val_bpb} BPB; of {len(alone.opened)} files that Python opened, data are {', '.join(shards)}"
    evidence += "; no network"
    if not entry.log:
        return True, evidence + "; no log to compare with"
    claimed, difference = entry.log, abs(float(alone.log.val_bpb) - float(entry.log.val_bpb))
    if same_machine(script, entry) and not claimed.epochs_given_up:
        same = (alone.log.label, alone.log.val_loss, alone.log.val_bpb) == (
            claimed.label,
            claimed.val_loss,
            claimed.val_bpb,
        )
        holds = same if entry.on_cpu else difference <= GPU_SCORE_NOISE
        return holds, f"{evidence}; the log says {claimed.val_bpb} on such a machine"
    why = f"on {claimed.settings.get('hardware')}, {claimed.epochs_given_up} epochs given up"
    return difference <= OTHER_MACHINE_NOISE, f"{evidence}; the log says {claimed.val_bpb} ({why})"


def check_causal(script: ModuleType, entry: Entry) -> tuple[bool, str]:
    """No score moves when all tokens behind its target are replaced."""
    s, generator = entry.settings, np.random.default_rng(entry.seed)
    chunk = max(s.train_seq_len, s.ttt_chunk_tokens if s.adapts else 0)
    tokens = entry.validation.tokens[: int(PREFIX_CHUNKS * chunk) + 1]
    count = len(tokens) - 1
    # Just before and behind the end of a chunk, where an update comes between, and anywhere.
    ends = [end for end in (chunk - 1, chunk) if 0 < end < count]
    cuts = sorted({*ends, *generator.integers(1, count, CUTS).tolist()})
    before = evaluate(script, entry, tokens).nats
    # On a GPU, gradients differ from run to run by rounding.
    noise = (
        0.0
        if entry.on_cpu
        else 4 * float(np.abs(evaluate(script, entry, tokens).nats - before).max())
    )
    moved = []
    for cut in cuts:  # tokens[:cut + 1] stay, which hold the targets of scores[:cut]
        other = tokens.astype(np.int64)
        other[cut + 1 :] += generator.integers(1, s.vocab_size, count - cut)
        after = evaluate(script, entry, (other % s.vocab_size).astype(tokens.dtype)).nats
        if wrong := np.flatnonzero(~(np.abs(after[:cut] - before[:cut]) <= noise)).tolist():
            problem = f"with other tokens from {cut + 1} on, {len(wrong)} earlier scores move, first that of {wrong[0] + 1}"
            return False, problem
        moved.append(float((after[cut:] != before[cut:]).mean()))
    if min(moved) < 0.5:
        return (
            False,
            f"only {min(moved):.0%} of the scores behind a cut move: the test would not see a dependence",
        )
    bound = (
        "by a single bit"
        if not noise
        else f"by more than {noise:.1g} nats, the noise of two runs being a quarter"
    )
    adapting = "with" if s.adapts else "without"
    places = ", ".join(map(str, cuts))
    evidence = f"{len(cuts)} cuts of {count:,} targets (at {places}), {s.eval_mode} windows, {adapting} TTT"
    return (
        True,
        f"{evidence}: no score up to a cut moves {bound}, {min(moved):.0%} or more behind it do",
    )


def check_scored_once(script: ModuleType, entry: Entry) -> tuple[bool, str]:
    """Every target gets one score, which is the one that counts."""
    seen = observe(script, entry)
    never, again = (seen.times_written == 0).sum(), (seen.times_written > 1).sum()
    if never or again:
        return False, f"{never} targets are never scored, {again} more than once"
    if not np.array_equal(seen.written, seen.score.nats):
        return False, "what is summed is not what was scored"
    loss = float(seen.written.mean(dtype=np.float64))
    holds = math.isclose(loss, seen.score.val_loss, rel_tol=1e-9) and bool(
        (seen.written >= 0).all()
    )
    return holds, f"{len(seen.written):,} targets, each written once; their mean is {loss:.8f} nats"


def check_probabilities(script: ModuleType, entry: Entry) -> tuple[bool, str]:
    """Scores are -log of probabilities that sum to one over the vocabulary."""
    sampled = observe(script, entry).sampled
    most_nats, most_sum = (
        (CPU_NATS_ERROR, CPU_SUM_ERROR) if entry.on_cpu else (GPU_NATS_ERROR, GPU_SUM_ERROR)
    )
    nats = max((abs(one.nats - one.expected) for one in sampled), default=math.inf)
    total = max((abs(one.total - 1) for one in sampled), default=math.inf)
    evidence = f"{len(sampled)} random targets: sums over {entry.settings.vocab_size:,} tokens within {total:.1e} of 1, "
    evidence += f"scores within {nats:.1e} nats of -log softmax in float64"
    return bool(nats <= most_nats and total <= most_sum), evidence  # false for NaN too


def read_tokens(folder: str) -> np.ndarray:
    """The validation stream, without the script's help."""
    shards = []
    for path in sorted(Path(folder).glob("*_val_*.bin")):
        count = int(np.fromfile(path, dtype="<i4", count=3)[2])
        shards.append(np.fromfile(path, dtype="<u2", offset=SHARD_HEADER_BYTES, count=count))
    return np.concatenate(shards)


def text_bytes(
    model: sentencepiece.SentencePieceProcessor, tokens: list[int], text: str
) -> int | None:
    """UTF-8 bytes of the text that tokens decode to. A text that was cut within a character decodes to replacement
    characters: then those of the pieces. None if the pieces contradict the text."""
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return len(text.encode())
    pieces = zip(model.id_to_piece(tokens), model.is_byte(tokens))
    raw = b"".join(
        bytes([int(p[3:5], 16)]) if byte else p.replace("▁", " ").encode() for p, byte in pieces
    )
    raw = raw.removeprefix(b" ")
    try:
        return len(raw) if raw.decode() == text else None
    except UnicodeDecodeError:
        return len(raw)


def check_text_bytes(script: ModuleType, entry: Entry) -> tuple[bool, str]:
    """The bytes in bits per byte are those of the text, document by document."""
    tokens = read_tokens(entry.environment["DATA_PATH"])
    if not np.array_equal(tokens, entry.validation.tokens):
        return False, "the script's tokens are not those of the shards"
    model = sentencepiece.SentencePieceProcessor(model_file=entry.environment["TOKENIZER_PATH"])
    ids = list(range(model.vocab_size()))
    silent = np.any([model.is_control(ids), model.is_unknown(ids), model.is_unused(ids)], axis=0)[
        tokens
    ]
    # Texts are what stands between tokens without text; decoding drops the first space of each, as of a document.
    edges = np.flatnonzero(np.diff(np.concatenate([[True], silent, [True]]).astype(np.int8)))
    spans = list(zip(edges[::2].tolist(), edges[1::2].tolist()))
    pieces = [tokens[first:last].tolist() for first, last in spans]
    counted = np.concatenate(
        [[0, 0], np.cumsum(entry.validation.target_bytes)]
    )  # [i]: of tokens[:i]
    total = 0
    for (first, last), part, text in zip(spans, pieces, model.decode(pieces) if pieces else []):
        truth, ours = text_bytes(model, part, text), int(counted[last] - counted[first])
        if truth is not None and first == 0:  # the stream's first token is no target
            truth -= len(model.decode(part[:1]).encode())
        if truth != ours:
            return (
                False,
                f"tokens {first} to {last - 1} count as {ours} bytes; their text has {truth}: {text[:40]!r}",
            )
        total += ours
    if total != entry.validation.target_bytes.sum():
        return (
            False,
            f"{entry.validation.target_bytes.sum():,} bytes are counted, {total:,} of them in text",
        )
    seen = observe(script, entry)
    bpb = float(seen.written.sum(dtype=np.float64)) / math.log(2) / total
    evidence = f"{int((tokens == BOS_ID).sum()):,} documents, {total:,} bytes of decoded text; so {bpb:.8f} BPB"
    return math.isclose(bpb, seen.score.val_bpb, rel_tol=1e-9), f"{evidence}, as the script says"


def check_order(script: ModuleType, entry: Entry) -> tuple[bool, str]:
    """Score first: updates see only targets that are scored, and none sees the last chunk."""
    seen, s = observe(script, entry), entry.settings
    count = len(seen.times_written)
    last_chunk = (count - 1) // s.ttt_chunk_tokens * s.ttt_chunk_tokens if s.adapts else 0
    scored, trained, steps, waiting = (
        np.zeros(count, dtype=bool),
        np.zeros(count, dtype=bool),
        0,
        False,
    )
    if seen.with_gradients:
        return False, "a score was computed with gradients"
    for kind, targets in seen.events:
        if kind == "score":
            scored[targets] = True
        elif kind == "train":
            if not scored[targets].all():
                return (
                    False,
                    f"an update sees target {targets[~scored[targets]][0]} before it is scored",
                )
            if (targets >= last_chunk).any():
                return False, f"an update sees target {targets.max()}, of the last chunk"
            trained[targets], waiting = True, True
        elif kind == "step":
            if not waiting:
                return False, "an optimizer steps without a loss on scored targets"
            steps, waiting = steps + 1, False
        else:
            return False, "weights changed without a step of an optimizer"
    if steps and not s.adapts:
        return False, "weights are updated although TTT is off"
    if not steps:
        return True, f"{count:,} targets scored, weights never changed"
    evidence = f"{steps} updates on {trained.sum():,} of {count:,} targets, each scored before, without gradients"
    return True, f"{evidence}; none on the last {count - last_chunk:,}"


def check_clocks(script: ModuleType, entry: Entry) -> tuple[bool, str]:
    """Evaluation and training keep their time."""
    alone, limit, log = run_alone(entry), entry.settings.eval_max_seconds, entry.log
    parts, holds = [f"evaluation here {alone.seconds:.1f}s of {limit:g}s"], alone.seconds <= limit
    if log:
        parts.append(f"in the log {log.evaluation_seconds}s of {log.evaluation_limit:g}s")
        holds &= log.evaluation_seconds <= log.evaluation_limit
        if log.training_seconds is not None:
            most = float(log.settings.get("max_wallclock_seconds", 0)) or CLOCK_SECONDS
            parts.append(f"training {log.training_seconds}s of {most:g}s")
            holds &= log.training_seconds <= most
    return holds, "; ".join(parts)


CHECKS: dict[str, Callable[[ModuleType, Entry], tuple[bool, str]]] = {
    "16,000,000 bytes": check_bytes,
    "score from the artifact alone": check_reproduced,
    "causal": check_causal,
    "scored exactly once": check_scored_once,
    "probabilities sum to one": check_probabilities,
    "bytes are those of the text": check_text_bytes,
    "score first, then train": check_order,
    "clocks": check_clocks,
}


def audit(script: ModuleType, entry: Entry) -> dict[str, tuple[bool, str]]:
    """All checks by name; one that cannot be carried through has failed."""
    results = {}
    for name, check in CHECKS.items():
        try:
            results[name] = check(script, entry)
        except Exception as error:
            results[name] = False, f"{type(error).__name__}: {error}"
    return results


def table(results: dict[str, tuple[bool, str]]) -> str:
    """The results in Markdown."""
    rows = [
        (name, "holds" if holds else "FAILS", evidence)
        for name, (holds, evidence) in results.items()
    ]
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    return "\n".join(
        f"| {' | '.join(row)} |" for row in [["check", "result", "evidence"], ["---"] * 3, *cells]
    )


def main() -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the validation shards"
    )
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument(
        "--script", type=Path, default=Path(__file__).resolve().parent.parent / "train_gpt.py"
    )
    parser.add_argument("--log", type=Path, help="LOG_DIR/RUN_ID.txt of the run")
    try:
        given = parser.parse_args()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # one process, wherever it is started
            os.environ.pop(name, None)
        script = load_script(given.script)
        with contextlib.redirect_stdout(sys.stderr):
            entry = open_entry(
                script, given.artifact, given.data, given.tokenizer, dict(os.environ), given.log
            )
            results = audit(script, entry)
    except UserError as error:
        print(f"audit.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(table(results))
    return 0 if all(holds for holds, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Proves what can be proved about a submission, and prints a Markdown table for its reviewers.

    python -m tools.audit ARTIFACT --data FOLDER --tokenizer FILE [--script FILE] [--log FILE]

FOLDER holds the validation shards. Settings of the evaluation are the log's, or environment
variables, as for the script. What is being done, and how long it will take, is said on standard
error. Exit status: 0 if every check holds, 1 if one fails, 2 for unusable input.

Two evaluations of the whole set are made: one in a process of its own that runs the script as it
stands, in a folder with nothing but the script, artifact, tokenizer and validation shards; one
here, watched. That they agree to the bit ties what is proved here to what the script does there.
Causality is tested on the first chunks only.

What it cannot prove: Python reports every file that Python opens, but not what native code opens by
itself (the tokenizer is read so); the watched evaluation tells itself what it does, which is held
against its scores, the stream, the weights and the optimizer's steps; and what training did can be
read from its log alone.
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
import time
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

from tools.command import Parser, UserError, tolerate_consoles
from tools.logs import TextLog, read_text_log

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

# On a GPU, matrices are bfloat16 and sums of gradients come in any order; on the CPU, all is
# repeatable.
GPU_SCORE_NOISE = 1e-3  # BPB between two runs
OTHER_MACHINE_NOISE = 1e-2  # BPB between two kinds of machine
CPU_NATS_ERROR, GPU_NATS_ERROR = 2e-4, 5e-2  # of one target, float32 and bfloat16
CPU_SUM_ERROR, GPU_SUM_ERROR = 1e-4, 1e-2  # of a sum of probabilities


class Progress:
    """Says on standard error what is done, and how long the rest will take."""

    def __init__(self, targets: int):
        self.targets = targets  # to be evaluated in all
        self.evaluated = 0
        self.started = time.perf_counter()

    def say(self, text: str) -> None:
        """One line; with the time left, once a rate is known."""
        seconds = time.perf_counter() - self.started
        left = ""
        if 0 < self.evaluated < self.targets:
            rest = seconds * (self.targets - self.evaluated) / self.evaluated
            left = f", about {rest:.0f} s left"
        print(f"audit: {text} ({seconds:.0f} s{left})", file=sys.stderr, flush=True)

    def count(self, targets: int, what: str) -> None:
        """So many targets more were evaluated."""
        self.evaluated += targets
        self.say(f"evaluated {targets:,} targets {what}")


@dataclass(frozen=True, eq=False)  # compared by identity: what was computed for one is kept
class Entry:
    """A submission, as the checks get it.

    What is the script's own is made by the script; checks hold it against what they make.
    """

    script: Path
    artifact: Path
    environment: dict[str, str]  # of the evaluation: settings, and what a process needs
    settings: Any
    given: set[str]  # names of the settings that were given
    ranks: Any
    tokenizer: Any  # the script's
    validation: Any  # the script's
    progress: Progress
    log: TextLog | None = None
    seed: int = 0

    @property
    def on_cpu(self) -> bool:
        """Whether all is repeatable to the bit."""
        return self.ranks.device.type == "cpu"


# ---- What is given -----------------------------------------------------------------------------


def load_script(path: Path) -> ModuleType:
    """The script as a module; it is not run.

    Raises UserError for a file that cannot be imported or lacks what the audit calls.
    """
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


def score_settings(script: ModuleType) -> list[str]:
    """Names of the settings that a score depends on, beside those in the artifact's header.

    The clock alone does not change a score where no epoch was given up.
    """
    names = [f.name for f in dataclasses.fields(script.Settings)]
    names = ["vocab_size", "train_seq_len", *names[names.index("eval_mode") :]]
    return [name for name in names if name not in ("eval_nll_path", "eval_max_seconds")]


def settings_of_log(script: ModuleType, log: TextLog, given: dict[str, str]) -> dict[str, str]:
    """As environment variables, a log's settings that its score depends on and are not given."""
    flags = {"True": "1", "False": "0"}
    settings = {}
    for name in score_settings(script):
        value = log.settings.get(name)
        if value is not None and name.upper() not in given:
            settings[name.upper()] = flags.get(value, value)
    return settings


def evaluated_targets(settings: Any, count: int, on_cpu: bool) -> int:
    """How many targets all checks evaluate, of a set of so many."""
    prefix = min(count, int(PREFIX_CHUNKS * chunk_targets(settings)))
    evaluations_of_prefix = CUTS + 3 + (0 if on_cpu else 1)
    return 2 * count + evaluations_of_prefix * prefix


def open_entry(
    script: ModuleType,
    artifact: Path,
    data: Path,
    tokenizer: Path,
    environment: dict[str, str],
    log: Path | None = None,
) -> Entry:
    """Reads and validates all that the checks need.

    environment: the evaluation's settings among other variables, which the log's complete.
    """
    figures = read_text_log(log) if log else None
    alone = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "EVAL_NLL_PATH", "LOG_DIR"}
    paths = {"ARTIFACT": str(artifact), "DATA_PATH": str(data), "TOKENIZER_PATH": str(tokenizer)}
    kept = {name: value for name, value in environment.items() if name not in alone}
    environment = kept | paths | {"EVAL_ONLY": "1", "RUN_ID": "audit"}
    if figures:
        environment |= settings_of_log(script, figures, environment)
    try:
        settings, given, ranks = script.prepare_run(environment)
        pieces = script.Tokenizer(str(tokenizer), settings.vocab_size)
        validation = script.load_validation(settings, pieces)
        _, settings = script.load_model(artifact, settings, given, ranks)
    except script.UserError as error:
        raise UserError(str(error)) from None
    for name in score_settings(script) if figures else ():
        ours = str(getattr(settings, name))
        theirs = figures.settings.get(name)
        if theirs not in (None, ours):
            raise UserError(
                f"the log was made with {name.upper()}={theirs}, here it is {ours}: leave it out"
            )
    count = len(validation.tokens) - 1
    return Entry(
        script=Path(script.__file__).resolve(),
        artifact=artifact,
        environment=environment,
        settings=settings,
        given=given,
        ranks=ranks,
        tokenizer=pieces,
        validation=validation,
        progress=Progress(evaluated_targets(settings, count, ranks.device.type == "cpu")),
        log=figures,
    )


# ---- A process of its own ----------------------------------------------------------------------

# Runs the script under a hook that Python calls before it opens a file, starts a program or uses
# the network: it writes each down, and allows all but the network.
GUARD = """
import json, os, runpy, sys, time

record = open("record.jsonl", "w", buffering=1)

def note(kind, what):
    record.write(json.dumps([time.perf_counter(), kind, what]) + "\\n")

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        note("open", os.fsdecode(arguments[0]))
    elif event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        triton = "/sbin/ldconfig", ["/sbin/ldconfig", "-p"]  # so it looks for a driver
        if arguments[:2] != triton:
            note("program", repr(arguments[0]))
    elif event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        socket_file = isinstance(arguments[-1], (str, bytes))
        if not socket_file or event.startswith("socket.get"):
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
    """What a run in a process of its own gave.

    Where it failed, it gave no log and no nats.
    """

    status: int
    said: str  # the last line, of errors if it failed
    log: TextLog | None
    nats: np.ndarray | None
    seconds: float  # from opening the artifact to the end
    opened: list[str]  # real paths of all files
    strangers: list[str]  # of these, neither in its folder nor part of Python or the system
    programs: list[str]
    network: list[str]


# Where files lie that are Python's or the system's, beside Python's own folders.
SYSTEM_FOLDERS = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib", "/lib64")
TRAINING_SHARD = re.compile(r"_train_[^/]*\.bin$")


class Record(NamedTuple):
    """A line of what GUARD writes down."""

    seconds: float
    kind: str  # start, open, program, network, end
    what: str


@functools.lru_cache(maxsize=1)
def run_alone(entry: Entry) -> Alone:
    """Scores the artifact by running the script where only what the contest allows is."""
    count = len(entry.validation.tokens) - 1
    entry.progress.say(f"the script evaluates {count:,} targets in a process of its own")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        furnish(folder, entry)
        done = subprocess.run(
            [sys.executable, "guard.py"],
            cwd=folder,
            env=entry.environment | alone_environment(folder),
            capture_output=True,
            text=True,
            errors="replace",
        )
        alone = what_happened(folder, done)
    entry.progress.count(count, "in a process of its own")
    return alone


def furnish(folder: Path, entry: Entry) -> None:
    """Puts the script, artifact, tokenizer and validation shards into an empty folder."""
    for part in ("data", "home"):
        (folder / part).mkdir()
    shutil.copy(entry.script, folder / "train_gpt.py")
    shutil.copy(entry.artifact, folder / "artifact")
    shutil.copy(entry.environment["TOKENIZER_PATH"], folder / "tokenizer.model")
    for path in Path(entry.environment["DATA_PATH"]).glob("*_val_*.bin"):
        shutil.copy(path, folder / "data" / path.name)
    (folder / "guard.py").write_text(GUARD, encoding="utf-8")


def alone_environment(folder: Path) -> dict[str, str]:
    """The paths of what furnish() put into a folder."""
    return {
        "ARTIFACT": "artifact",
        "DATA_PATH": "data",
        "TOKENIZER_PATH": "tokenizer.model",
        "LOG_DIR": "logs",
        "EVAL_NLL_PATH": "nats.npy",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "home"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def what_happened(folder: Path, done: subprocess.CompletedProcess) -> Alone:
    """What GUARD has written down in a folder, and what the script has left there."""
    lines = (folder / "record.jsonl").read_text(encoding="utf-8").splitlines()
    record = [Record(*json.loads(line)) for line in lines]
    opened = [one for one in record if one.kind == "open"]
    # In order, each once; relative paths were relative to the folder.
    paths = list(dict.fromkeys(os.path.realpath(folder / one.what) for one in opened))
    began = [one.seconds for one in opened if Path(one.what).name == "artifact"]
    known = known_folders(folder)
    strangers = []
    for path in paths:
        if TRAINING_SHARD.search(path) or not belongs(path, known):
            strangers.append(path)
    programs = [one.what for one in record if one.kind == "program"]
    network = [one.what for one in record if one.kind == "network"]
    said = done.stderr if done.returncode else done.stdout
    last_line = (said.strip().splitlines() or [""])[-1]
    log = None if done.returncode else read_text_log(folder / "logs" / "audit.eval.txt")
    scores = folder / "nats.npy"
    nats = np.load(scores) if scores.is_file() else None
    seconds = record[-1].seconds - min(began, default=record[0].seconds)
    opened_here = [path.removeprefix(f"{folder}/") for path in paths]
    return Alone(
        status=done.returncode,
        said=last_line,
        log=log,
        nats=nats,
        seconds=seconds,
        opened=opened_here,
        strangers=strangers,
        programs=programs,
        network=network,
    )


def known_folders(folder: Path) -> list[str]:
    """Real paths of folders whose files a script may open: its own, Python's, the system's."""
    python = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()]
    packages = [*site.getsitepackages(), site.getusersitepackages()]
    return [os.path.realpath(path) for path in (folder, *python, *packages, *SYSTEM_FOLDERS)]


def belongs(path: str, folders: list[str]) -> bool:
    """Whether a path is one of these folders or lies in one."""
    return any(Path(path).is_relative_to(folder) for folder in folders)


# ---- A watched evaluation ----------------------------------------------------------------------


class Event(NamedTuple):
    """Something that happened during an evaluation, in order."""

    # score; train: an update reads targets; step: an optimizer's; changed: weights, without a step
    kind: str
    targets: np.ndarray  # positions of those that are scored or trained on


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
        self.stream = entry.validation.tokens
        self.count = len(self.stream) - 1
        sampled = min(SAMPLED_TARGETS, self.count)
        self.wanted = np.random.default_rng(entry.seed).choice(self.count, sampled, replace=False)
        self.weights = fingerprint(model)
        self.stepped = False  # since the weights were last looked at
        self.seen = Observation(
            times_written=np.zeros(self.count, dtype=np.int64),
            written=np.zeros(self.count, dtype=np.float32),
        )

    def on_read(self, excerpt: Any) -> None:
        """Looks at the weights before they are used."""
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


def evaluate(script: ModuleType, entry: Entry, tokens: np.ndarray, what: str) -> np.ndarray:
    """The nats of tokens' targets, as evaluate_artifact() makes them."""
    model, settings = load(script, entry)
    validation = script.ValidationSet(tokens, entry.tokenizer.target_bytes(tokens))
    score = script.Evaluator(model, settings, entry.ranks, validation).evaluate()
    entry.progress.count(len(tokens) - 1, what)
    return score.nats


@functools.lru_cache(maxsize=1)
def observe(script: ModuleType, entry: Entry) -> Observation:
    """Evaluates the whole validation set and records every score, update and step, in order."""
    entry.progress.say("the same evaluation, watched")
    model, settings = load(script, entry)
    watcher = Watcher(script, entry, model)
    evaluator = script.Evaluator(model, settings, entry.ranks, entry.validation, observer=watcher)
    hook = register_optimizer_step_post_hook(watcher.on_step)
    try:
        watcher.seen.score = evaluator.evaluate()
    finally:
        hook.remove()
    entry.progress.count(watcher.count, "watched")
    return watcher.seen


# ---- Checks ------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """What a check comes to.

    Each check below has a test in tests/test_audit.py that plants the violation it is there for.
    """

    holds: bool
    evidence: str


class Broken(Exception):
    """A check's condition does not hold, for the reason that the message gives."""


def expect(condition, message: str) -> None:
    """Ends a check unless its condition holds."""
    if not condition:
        raise Broken(message)


def a_check(function: Callable[[ModuleType, Entry], Finding]) -> Callable:
    """A function of the script's module and an entry, in which expect() may end the matter."""

    @functools.wraps(function)
    def check(script: ModuleType, entry: Entry) -> Finding:
        try:
            return function(script, entry)
        except Broken as reason:
            return Finding(False, str(reason))

    return check


@a_check
def check_bytes(script: ModuleType, entry: Entry) -> Finding:
    """Code and artifact fit, as files on disk, and are those of the log."""
    code = entry.script.stat().st_size
    model = entry.artifact.stat().st_size
    total = code + model
    log = entry.log
    found = [f"{code:,} of code + {model:,} of model = {total:,} of {CAP_BYTES:,} bytes"]
    if total > CAP_BYTES:
        found.append(f"over the cap of {CAP_BYTES:,}")
    if log and log.total_bytes not in (None, total):
        found.append(f"the log says {log.total_bytes:,}")
    if log and not log.source.endswith(entry.script.read_text(encoding="utf-8")):
        found.append("the log was written by another script")
    holds = len(found) == 1
    if holds and log:
        found.append("the log agrees, and holds this script")
    return Finding(holds, "; ".join(found))


def same_machine(script: ModuleType, entry: Entry) -> bool:
    """Whether the log comes from a machine like this."""
    here = script.describe_machine(entry.ranks)
    theirs = entry.log.settings
    return all(theirs.get(name) == str(here[name]) for name in ("torch", "cuda", "hardware"))


@a_check
def check_reproduced(script: ModuleType, entry: Entry) -> Finding:
    """The score follows from the artifact alone: elsewhere, without network and training data."""
    alone = run_alone(entry)
    expect(not alone.network, f"it used the network: {', '.join(alone.network[:3])}")
    expect(not alone.strangers, f"it opened: {', '.join(alone.strangers[:3])}")
    compiles = entry.settings.compile == "on" or not entry.on_cpu  # which starts compilers
    expect(compiles or not alone.programs, f"it started {', '.join(alone.programs[:1])}")
    expect(not alone.status, f"the script ended with status {alone.status}: {alone.said}")
    given_up = alone.log.epochs_given_up
    more_time = "raise EVAL_MAX_SECONDS to reproduce a score"
    expect(not given_up, f"{given_up} epochs were given up: {more_time}")

    bpb = alone.log.val_bpb
    watched = observe(script, entry).score
    if not np.array_equal(alone.nats, watched.nats):
        noise = 0.0 if entry.on_cpu else GPU_SCORE_NOISE
        here = f"{watched.val_bpb:.{EXACT_DIGITS}f} in the watched evaluation"
        expect(abs(float(bpb) - watched.val_bpb) < noise, f"{bpb} BPB there, {here}")
    holds, claim = compare_with_log(script, entry, alone.log)
    shards = ", ".join(path for path in alone.opened if path.startswith("data/"))
    files = f"of {len(alone.opened)} files that Python opened, data are {shards}; no network"
    return Finding(holds, f"{bpb} BPB; {files}; {claim}")


def compare_with_log(script: ModuleType, entry: Entry, found: TextLog) -> Finding:
    """Whether a score that was found is the one that the log claims.

    To the last digit on a CPU like the log's; on GPUs, and on other machines, within their noise.
    """
    claimed = entry.log
    if not claimed:
        return Finding(True, "no log to compare with")
    difference = abs(float(found.val_bpb) - float(claimed.val_bpb))
    says = f"the log says {claimed.val_bpb}"
    if same_machine(script, entry) and not claimed.epochs_given_up:
        holds = claimed.says_as(found) if entry.on_cpu else difference <= GPU_SCORE_NOISE
        return Finding(holds, f"{says} on such a machine")
    hardware = claimed.settings.get("hardware")
    why = f"on {hardware}, {claimed.epochs_given_up} epochs given up"
    return Finding(difference <= OTHER_MACHINE_NOISE, f"{says} ({why})")


def chunk_targets(settings: Any) -> int:
    """Targets between two updates, or of a window where that is more."""
    chunk = settings.ttt_chunk_tokens if settings.adapts else 0
    return max(settings.train_seq_len, chunk)


@a_check
def check_causal(script: ModuleType, entry: Entry) -> Finding:
    """No score moves when all tokens behind its target are replaced.

    Whatever a scorer may do, and whatever it may tell of it: it is what follows that is compared.
    On a CPU, not a single bit may move.
    """
    settings = entry.settings
    generator = np.random.default_rng(entry.seed)
    chunk = chunk_targets(settings)
    tokens = entry.validation.tokens[: int(PREFIX_CHUNKS * chunk) + 1]
    count = len(tokens) - 1
    # Just before and behind the end of a chunk, where an update comes between, and anywhere.
    ends = [end for end in (chunk - 1, chunk) if 0 < end < count]
    cuts = sorted({*ends, *generator.integers(1, count, CUTS).tolist()})

    before = evaluate(script, entry, tokens, "of the first chunks")
    noise = 0.0
    if not entry.on_cpu:  # gradients differ from run to run by rounding
        again = evaluate(script, entry, tokens, "of the first chunks, once more")
        noise = 4 * float(np.abs(again - before).max())
    moved = []  # part of the scores behind each cut
    for cut in cuts:
        after = evaluate(
            script,
            entry,
            replaced_behind(tokens, cut, settings.vocab_size, generator),
            f"with other tokens from {cut + 1} on",
        )
        still = np.abs(after[:cut] - before[:cut]) <= noise  # false for NaN too
        wrong = np.flatnonzero(~still)
        what = f"with other tokens from {cut + 1} on, {len(wrong)} earlier scores move"
        expect(still.all(), f"{what}, first that of {wrong.min(initial=cut) + 1}")
        moved.append(float((after[cut:] != before[cut:]).mean()))

    least = f"{min(moved):.0%}"
    blind = "the test would not see a dependence"
    expect(min(moved) >= 0.5, f"only {least} of the scores behind a cut move: {blind}")
    bound = "by a single bit"
    if noise:
        bound = f"by more than {noise:.1g} nats, the noise of two runs being a quarter"
    places = ", ".join(map(str, cuts))
    mode = f"{settings.eval_mode}, {'with' if settings.adapts else 'without'} TTT"
    tried = f"{len(cuts)} cuts of {count:,} targets (at {places}), {mode}"
    found = f"no score up to a cut moves {bound}, {least} or more behind it do"
    return Finding(True, f"{tried}: {found}")


def replaced_behind(
    tokens: np.ndarray, cut: int, vocab_size: int, generator: np.random.Generator
) -> np.ndarray:
    """A stream with the same targets of positions before the cut, and all others different."""
    other = tokens.astype(np.int64)
    behind = len(tokens) - (cut + 1)
    other[cut + 1 :] += generator.integers(1, vocab_size, behind)
    return (other % vocab_size).astype(tokens.dtype)


@a_check
def check_scored_once(script: ModuleType, entry: Entry) -> Finding:
    """Every target gets one score, which is the one that counts."""
    seen = observe(script, entry)
    never = int((seen.times_written == 0).sum())
    again = int((seen.times_written > 1).sum())
    expect(not never and not again, f"{never} targets are never scored, {again} more than once")
    same = np.array_equal(seen.written, seen.score.nats)
    expect(same, "what is summed is not what was scored")
    loss = float(seen.written.mean(dtype=np.float64))
    holds = math.isclose(loss, seen.score.val_loss, rel_tol=1e-9) and (seen.written >= 0).all()
    count = len(seen.written)
    evidence = f"{count:,} targets, each written once; their mean is {loss:.8f} nats"
    return Finding(bool(holds), evidence)


@a_check
def check_probabilities(script: ModuleType, entry: Entry) -> Finding:
    """Scores are -log of probabilities that sum to one over the vocabulary."""
    sampled = observe(script, entry).sampled
    most_nats = CPU_NATS_ERROR if entry.on_cpu else GPU_NATS_ERROR
    most_sum = CPU_SUM_ERROR if entry.on_cpu else GPU_SUM_ERROR
    # All of them: NaN, which compares as false, must not hide behind a maximum.
    nats = np.array([abs(one.nats - one.expected) for one in sampled])
    total = np.array([abs(one.total - 1) for one in sampled])
    exact = (nats <= most_nats) & (total <= most_sum)
    holds = len(sampled) > 0 and exact.all()
    vocabulary = f"{entry.settings.vocab_size:,} tokens"
    sums = f"sums over {vocabulary} within {total.max(initial=0.0):.1e} of 1"
    scores = f"scores within {nats.max(initial=0.0):.1e} nats of -log softmax in float64"
    return Finding(bool(holds), f"{len(sampled)} random targets: {sums}, {scores}")


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
    """UTF-8 bytes of the text that tokens decode to; None if the pieces contradict the text.

    A text that was cut within a character decodes to replacement characters: then the bytes are
    those of the pieces.
    """
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return len(text.encode())
    raw = b""
    for piece, is_byte in zip(model.id_to_piece(tokens), model.is_byte(tokens), strict=True):
        # A byte's piece is written <0xE6>.
        raw += bytes.fromhex(piece[3:5]) if is_byte else piece.replace("▁", " ").encode()
    raw = raw.removeprefix(b" ")
    try:
        return len(raw) if raw.decode() == text else None
    except UnicodeDecodeError:
        return len(raw)


def texts_between(silent: np.ndarray) -> list[tuple[int, int]]:
    """First and last + 1 of each run of tokens that have text."""
    bounded = np.concatenate([[True], silent, [True]])
    edges = np.flatnonzero(np.diff(bounded.astype(np.int8))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


@a_check
def check_text_bytes(script: ModuleType, entry: Entry) -> Finding:
    """The bytes in bits per byte are those of the text, document by document.

    Shards are read and decoded here, without the script, and compared with its target_bytes.
    """
    tokens = read_tokens(entry.environment["DATA_PATH"])
    same = np.array_equal(tokens, entry.validation.tokens)
    expect(same, "the script's tokens are not those of the shards")
    model = sentencepiece.SentencePieceProcessor(model_file=entry.environment["TOKENIZER_PATH"])
    ids = list(range(model.vocab_size()))
    silent = np.any([model.is_control(ids), model.is_unknown(ids), model.is_unused(ids)], axis=0)
    # Decoding drops the first space of each text, as the script does of a document.
    spans = texts_between(silent[tokens])
    pieces = [tokens[first:last].tolist() for first, last in spans]
    texts = model.decode(pieces) if pieces else []
    counts = entry.validation.target_bytes
    counted = np.concatenate([[0, 0], np.cumsum(counts)])  # [i]: of tokens[:i]
    total = 0
    for (first, last), part, text in zip(spans, pieces, texts, strict=True):
        truth = text_bytes(model, part, text)
        if truth is not None and first == 0:  # the stream's first token is no target
            truth -= len(model.decode(part[:1]).encode())
        ours = int(counted[last] - counted[first])
        what = f"tokens {first} to {last - 1} count as {ours} bytes; their text has {truth}"
        expect(truth == ours, f"{what}: {text[:40]!r}")
        total += ours
    all_counted = int(counts.sum())
    expect(total == all_counted, f"{all_counted:,} bytes are counted, {total:,} of them in text")

    seen = observe(script, entry)
    bpb = float(seen.written.sum(dtype=np.float64)) / math.log(2) / total
    documents = int((tokens == BOS_ID).sum())
    evidence = f"{documents:,} documents, {total:,} bytes of decoded text; so {bpb:.8f} BPB"
    holds = math.isclose(bpb, seen.score.val_bpb, rel_tol=1e-9)
    return Finding(holds, f"{evidence}, as the script says")


@a_check
def check_order(script: ModuleType, entry: Entry) -> Finding:
    """Score first: updates see only targets that are scored, and none sees the last chunk.

    A step of an optimizer needs a loss before it whose targets are known, and weights change by
    steps alone.
    """
    seen = observe(script, entry)
    settings = entry.settings
    count = len(seen.times_written)
    last_chunk = 0
    if settings.adapts:
        last_chunk = (count - 1) // settings.ttt_chunk_tokens * settings.ttt_chunk_tokens
    scored = np.zeros(count, dtype=bool)
    trained = np.zeros(count, dtype=bool)
    steps = 0
    gradient = False  # of a loss on scored targets, not yet used
    expect(not seen.with_gradients, "a score was computed with gradients")
    for kind, targets in seen.events:
        if kind == "score":
            scored[targets] = True
        elif kind == "train":
            early = targets[~scored[targets]]
            expect(
                not len(early),
                f"an update sees target {early.min(initial=count)} before it is scored",
            )
            latest = targets.max()
            expect(latest < last_chunk, f"an update sees target {latest}, of the last chunk")
            trained[targets] = True
            gradient = True
        elif kind == "step":
            expect(gradient, "an optimizer steps without a loss on scored targets")
            steps += 1
            gradient = False
        else:
            raise Broken("weights changed without a step of an optimizer")
    expect(settings.adapts or not steps, "weights are updated although TTT is off")
    if not steps:
        return Finding(True, f"{count:,} targets scored, weights never changed")
    updates = f"{steps} updates on {trained.sum():,} of {count:,} targets"
    how = "each scored before, without gradients"
    return Finding(True, f"{updates}, {how}; none on the last {count - last_chunk:,}")


@a_check
def check_clocks(script: ModuleType, entry: Entry) -> Finding:
    """Evaluation and training keep their time."""
    alone = run_alone(entry)
    limit = entry.settings.eval_max_seconds
    evidence = [f"evaluation here {alone.seconds:.1f}s of {limit:g}s"]
    kept = [alone.seconds <= limit]
    log = entry.log
    if log:
        evidence.append(f"in the log {log.evaluation_seconds}s of {log.evaluation_limit:g}s")
        kept.append(log.evaluation_seconds <= log.evaluation_limit)
    if log and log.training_seconds is not None:
        most = float(log.settings.get("max_wallclock_seconds", 0)) or CLOCK_SECONDS
        evidence.append(f"training {log.training_seconds}s of {most:g}s")
        kept.append(log.training_seconds <= most)
    return Finding(all(kept), "; ".join(evidence))


CHECKS: dict[str, Callable[[ModuleType, Entry], Finding]] = {
    "16,000,000 bytes": check_bytes,
    "score from the artifact alone": check_reproduced,
    "causal": check_causal,
    "scored exactly once": check_scored_once,
    "probabilities sum to one": check_probabilities,
    "bytes are those of the text": check_text_bytes,
    "score first, then train": check_order,
    "clocks": check_clocks,
}


def run_check(check: Callable, script: ModuleType, entry: Entry) -> Finding:
    """A check's finding; one that cannot be carried through has failed."""
    try:
        return check(script, entry)
    except Exception as error:
        return Finding(False, f"{type(error).__name__}: {error}")


def audit(script: ModuleType, entry: Entry) -> dict[str, Finding]:
    """All checks by name."""
    results = {}
    for number, (name, check) in enumerate(CHECKS.items(), start=1):
        results[name] = run_check(check, script, entry)
        outcome = "holds" if results[name].holds else "FAILS"
        entry.progress.say(f"{number} of {len(CHECKS)}: {name}: {outcome}")
    return results


def table(results: dict[str, Finding]) -> str:
    """The results in Markdown."""
    rows = [["check", "result", "evidence"], ["---", "---", "---"]]
    for name, (holds, evidence) in results.items():
        cells = (name, "holds" if holds else "FAILS", evidence)
        rows.append([" ".join(cell.replace("|", "\\|").split()) for cell in cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def read_arguments():
    """The command line's."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of validation shards")
    parser.add_argument("--tokenizer", type=Path, required=True)
    script = Path(__file__).resolve().parent.parent / "train_gpt.py"
    parser.add_argument("--script", type=Path, default=script)
    parser.add_argument("--log", type=Path, help="LOG_DIR/RUN_ID.txt of the run")
    return parser.parse_args()


def main() -> int:
    """Audits what the command line says; the process's exit status."""
    tolerate_consoles()
    try:
        given = read_arguments()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # one process, wherever it is started
            os.environ.pop(name, None)
        script = load_script(given.script)
        environment = dict(os.environ)
        with contextlib.redirect_stdout(sys.stderr):
            entry = open_entry(
                script, given.artifact, given.data, given.tokenizer, environment, given.log
            )
            results = audit(script, entry)
    except UserError as error:
        print(f"audit.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(table(results))
    return 0 if all(finding.holds for finding in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

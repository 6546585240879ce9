"""The submission under audit, and its evaluations, each in a cell of its own."""

import functools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.audit", file=sys.stderr)
    sys.exit(2)

from tools.audit import cell, script, text
from tools.audit.observation import Observation, read_observation
from tools.command import UserError, need
from tools.contradictions import RunLogs, read_logs
from tools.logs import TextLog, read_text_log

HERE = Path(__file__).resolve().parent
# What runs inside, beside the script.
INSIDE = ("__init__.py", "audit/__init__.py", "audit/observation.py", "audit/watch.py")
LOOKED_AT_EVERY = 5.0  # seconds: a line of a process is passed on

# Settings that a score depends on, beside those in an artifact's header: these, and all from
# eval_mode on. No evaluation here has a clock.
BEFORE_EVALUATION = ("precision", "vocab_size", "train_seq_len", "mamba_chunk_size")
WITHOUT_EFFECT = ("eval_nll_path", "eval_max_seconds")
NO_CLOCK = "1000000"
# What a run's place and ranks were; and what a cell sets.
NOT_PASSED = {"run_id", "log_dir", "artifact", "data_path", "tokenizer_path", "eval_only", "resume"}
NOT_PASSED |= {"overwrite", "eval_nll_path", "eval_max_seconds", "eval_any_tokens"}
NOT_PASSED |= {"sample_prompt", "preset"}

# Programs that compile: triton and torch start them, on a GPU.
COMPILERS = {"gcc", "cc", "g++", "c++", "clang", "cc1", "cc1plus", "as", "ld", "collect2", "ptxas"}
COMPILERS |= {"nvcc", "ldconfig", "nvidia-smi", "cuobjdump", "nvdisasm", "uname", "which", "sh"}
STARTERS = {"bwrap", Path(sys.executable).name, "python", "python3"}


class Progress:
    """Says on standard error what is done, and how long the rest will take."""

    def __init__(self, targets: int = 0):
        self.targets = targets  # to be evaluated in all
        self.evaluated = 0
        self.started = time.perf_counter()
        self.passed_on = self.started

    def say(self, what: str) -> None:
        """One line; with the time left, once a rate is known."""
        seconds = time.perf_counter() - self.started
        left = ""
        if 0 < self.evaluated < self.targets:
            rest = seconds * (self.targets - self.evaluated) / self.evaluated
            left = f", about {rest:.0f} s left"
        print(f"audit: {what} ({seconds:.0f} s{left})", file=sys.stderr, flush=True)

    def pass_on(self, line: str) -> None:
        """A line that a process said, now and then: a long evaluation is not silent."""
        now = time.perf_counter()
        if now - self.passed_on > LOOKED_AT_EVERY:
            self.passed_on = now
            self.say(f"... {line[:200]}")  # a line of progress is shorter

    def count(self, targets: int, what: str) -> None:
        """So many targets more were evaluated."""
        self.evaluated += targets
        self.say(f"evaluated {targets:,} targets {what}")


class Alone(NamedTuple):
    """What a run of the script as it stands gave.

    Where it failed, it gave no log and no nats.
    """

    status: int
    said: str  # its last line
    log: TextLog | None
    nats: np.ndarray | None
    seconds: float  # from opening the artifact to the end
    opened: list[str]  # real paths of all files
    strangers: list[str]  # of these, neither given nor part of Python, its packages or the system
    programs: list[str]
    network: list[str]
    traced: bool = False  # whether strace looked on, from outside


@dataclass(eq=False)  # compared by identity: what was computed for one is kept
class Case:
    """A submission, and what the reviewer wants to know of it."""

    script: Path
    artifact: Path
    data: Path
    tokenizer: Path
    settings: dict[str, str]  # the evaluation's, as environment variables
    isolation: cell.Isolation
    seed: int
    logs: RunLogs | None = None
    cuts: int = 4  # of the causality test
    fresh: Path | None = None  # a text that nobody had
    source: Path | None = None  # the documents that the shards were made of
    train: Path | None = None  # the training shards that the log names, or some of them
    held_out: Path | None = None  # a shard of such text as was not trained on
    strace: bool = True  # to be used where it is
    progress: Progress = field(default_factory=Progress)

    @functools.cached_property
    def identity(self) -> script.Identity:
        """Which script it is."""
        return script.identify(self.script)

    @functools.cached_property
    def shards(self) -> list[text.Shard]:
        """The validation shards."""
        return text.read_shards(self.data)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """The validation stream (N + 1,)."""
        return text.stream_of(self.shards)

    @property
    def count(self) -> int:
        """N, the number of targets."""
        return len(self.tokens) - 1

    @functools.cached_property
    def model(self) -> Any:
        """SentencePiece's reading of the tokenizer."""
        return text.open_tokenizer(self.tokenizer)

    @functools.cached_property
    def texts(self) -> list[text.Text]:
        """The validation stream, decoded."""
        self.progress.say("decoding the validation text")
        return text.texts_of(self.model, self.tokens)

    @functools.cached_property
    def alone(self) -> Alone:
        """The script as it stands scores the artifact."""
        self.progress.say(f"the script evaluates {self.count:,} targets in a cell of its own")
        found = run_alone(self, self.script, watch_files=True)
        self.progress.count(self.count, "by the script as it stands")
        return found

    @functools.cached_property
    def once_more(self) -> Alone:
        """The same evaluation once more: two runs on a GPU differ."""
        found = run_alone(self, self.script)
        self.progress.count(self.count, "once more")
        return found

    @functools.cached_property
    def by_own_script(self) -> Alone:
        """This folder's script scores the artifact."""
        self.progress.say("the project's own script evaluates the same")
        return run_alone(self, script.ROOT / script.NAME)

    @functools.cached_property
    def seen(self) -> Observation:
        """The same evaluation, watched. Raises ValueError if it came to nothing."""
        self.progress.say("the same evaluation, watched")
        found = watch(self)
        self.progress.count(self.count, "watched")
        return found

    def settled(self, name: str) -> str:
        """A setting as the script took it, by its log."""
        log = self.alone.log
        if log is None:
            raise ValueError(f"the script gave no score: {self.alone.said}")
        return log.settings.get(name, "")

    @property
    def on_cpu(self) -> bool:
        """Whether all is repeatable to the bit; by what is here, not by what the script says."""
        gpus = list(Path("/dev").glob("nvidia[0-9]*"))
        return self.settings.get("DEVICE") == "cpu" or not gpus

    @property
    def adapts(self) -> bool:
        """Whether evaluation trains on what it has scored."""
        epochs = self.by_document or int(self.settled("ttt_epochs")) > 0
        return self.settled("ttt_enabled") == "True" and epochs

    @property
    def by_document(self) -> bool:
        """Whether each document is scored by itself."""
        return self.settled("eval_mode") == "documents"

    @property
    def chunk(self) -> int:
        """Targets between two updates; without them, or of documents, as a window holds."""
        by_chunk = self.adapts and not self.by_document
        chunk = int(self.settled("ttt_chunk_tokens")) if by_chunk else 0
        return max(int(self.settled("train_seq_len")), chunk)

    def nats(self, tokens: np.ndarray, what: str, **settings: str) -> np.ndarray:
        """The nats of other tokens' targets, written into shards. Raises ValueError without any."""
        found = run_alone(self, self.script, tokens, settings)
        if found.nats is None:
            raise ValueError(f"no score {what}: {found.said}")
        self.progress.count(len(tokens) - 1, what)
        return found.nats


# ---- What is given -----------------------------------------------------------------------------


def score_settings(names: list[str]) -> list[str]:
    """Those of a script's settings that a score depends on.

    The others are in the artifact's header, or change how training went, or where files lie.
    """
    start = names.index("eval_mode") if "eval_mode" in names else len(names)
    kept = [*BEFORE_EVALUATION, *names[start:]]
    return [name for name in kept if name not in WITHOUT_EFFECT and name not in NOT_PASSED]


def without_idle(settings: dict[str, str]) -> dict[str, str]:
    """Settings without those of test-time training that the script would refuse, as idle.

    By EVAL_MODE: documents read TTT_LORA_..., other modes the others. Where it is not given, it
    is a preset's, or follows from these settings.
    """
    if "EVAL_MODE" not in settings:
        return settings
    by_document = settings["EVAL_MODE"] == "documents"
    idle = {
        name
        for name in settings
        if name.startswith("TTT_") and name.startswith("TTT_LORA_") != by_document
    }
    return {n: x for n, x in settings.items() if n not in idle - {"TTT_ENABLED"}}


def choose_settings(
    names: list[str], environment: dict[str, str], log: TextLog | None
) -> dict[str, str]:
    """The evaluation's settings: those given, and of the log's what its score depends on.

    A preset counts where there is no log: a log has all that a preset changes.
    Raises UserError where the two contradict each other.
    """
    given = {}
    for name in names:
        if name.upper() in environment and name not in NOT_PASSED:
            given[name.upper()] = environment[name.upper()]
    if not log and "preset" in names and "PRESET" in environment:
        given["PRESET"] = environment["PRESET"]
    flags = {"True": "1", "False": "0"}
    for name in score_settings(names) if log else ():
        theirs = log.settings.get(name)
        if theirs is None:
            continue
        theirs = flags.get(theirs, theirs)
        ours = given.setdefault(name.upper(), theirs)
        wrong = f"the log was made with {name.upper()}={theirs}, here it is {ours}: leave it out"
        need(same_value(ours, theirs), wrong)
    return given


def same_value(ours: str, theirs: str) -> bool:
    """Whether two texts say the same, as numbers or to the letter."""
    try:
        return float(ours) == float(theirs)
    except ValueError:
        return ours == theirs


def open_case(
    script_path: Path,
    artifact: Path,
    data: Path,
    tokenizer: Path,
    environment: dict[str, str],
    isolation: cell.Isolation,
    seed: int,
    log: Path | None = None,
    **options: Any,
) -> Case:
    """Reads and checks what can be, before anything is run. Raises UserError.

    environment: the evaluation's settings among other variables; the log's complete them.
    """
    logs = read_logs(log) if log else None
    need(artifact.is_file(), f"no artifact at {artifact}")
    names = script.setting_names(script_path)
    settings = choose_settings(names, environment, logs and logs.text)
    case = Case(
        script=script_path.resolve(),
        artifact=artifact.resolve(),
        data=data.resolve(),
        tokenizer=tokenizer.resolve(),
        settings=settings,
        isolation=isolation,
        seed=seed,
        logs=logs,
        **options,
    )
    need(case.count > 0, f"the shards in {data} hold nothing to score")
    # Read now, so that a wrong tokenizer is told now.
    need(case.model.vocab_size() > 0, f"{tokenizer} has no pieces")
    return case


# ---- In a cell ---------------------------------------------------------------------------------


def furnish(
    place: cell.Cell, case: Case, script_path: Path, tokens: np.ndarray | None
) -> dict[str, str]:
    """Puts into a cell what it is given; returns the settings that name these files.

    Everything is a copy. tokens: another stream, in shards of the same names; None is the
    validation text as it is.
    """
    data = place.given / "data"
    data.mkdir()
    shutil.copy(script_path, place.given / script.NAME)
    shutil.copy(case.artifact, place.given / "artifact")
    shutil.copy(case.tokenizer, place.given / "tokenizer.model")
    if tokens is None:
        for path in text.shard_paths(case.data):
            shutil.copy(path, data / path.name)
    else:
        text.write_stream(data, case.shards, tokens)
    shutil.copy(HERE / "guard.py", place.given / "guard.py")
    for name in INSIDE:
        target = place.given / "tools" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE.parent / name, target)
    settings = {
        "ARTIFACT": str(place.given / "artifact"),
        "DATA_PATH": str(data),
        "TOKENIZER_PATH": str(place.given / "tokenizer.model"),
        "LOG_DIR": "logs",
        "RUN_ID": "audit",
        "EVAL_ONLY": "1",
        "EVAL_MAX_SECONDS": NO_CLOCK,
        "PYTHONPATH": str(place.given),
    }
    # In every cell, so that nothing tells a script on which tokens it is tried. Whether they are
    # the tokenizer's is looked at here. Older scripts only warn of others.
    if "eval_any_tokens" in script.setting_names(script_path):
        settings["EVAL_ANY_TOKENS"] = "1"
    return settings


def run_alone(
    case: Case,
    script_path: Path,
    tokens: np.ndarray | None = None,
    changes: dict[str, str] | None = None,
    watch_files: bool = False,
) -> Alone:
    """Scores the artifact by running a script, on the validation text or on other tokens.

    It is started as anybody starts it, by EVAL_ONLY=1. changes: settings in place of the case's.
    watch_files: with guard.py, and strace around it, looking on.
    """
    with cell.open_cell() as place:
        files = furnish(place, case, script_path, tokens)
        settings = case.settings | files | (changes or {}) | {"EVAL_NLL_PATH": "nats.npy"}
        settings = without_idle(settings)
        line = [sys.executable, str(place.given / script.NAME)]
        trace = None
        if watch_files:
            line.insert(1, str(place.given / "guard.py"))
            if case.strace and cell.find_strace():
                trace = place.given.parent / "trace"
        status, said = cell.run_in_cell(
            case.isolation, place, line, settings, case.progress.pass_on, trace
        )
        count = case.count if tokens is None else len(tokens) - 1
        return what_happened(place, status, said, count, trace)


class Record(NamedTuple):
    """A line of what guard.py writes down."""

    seconds: float
    kind: str  # start, open, program, network, end
    what: str


def read_record(path: Path) -> list[Record]:
    """What guard.py wrote down; lines that it cannot have written are left out."""
    if path.is_symlink() or not path.is_file():
        return []
    record = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            seconds, kind, what = json.loads(line)
            record.append(Record(float(seconds), str(kind), str(what)))
        except (ValueError, TypeError):
            record.append(Record(0.0, "program", "something that overwrote guard.py's record"))
    return record


def read_nats(path: Path, count: int) -> np.ndarray | None:
    """The nats of so many targets, float32; None for another file.

    What a cell leaves is somebody else's: no links are followed, and nothing is unpickled.
    """
    if path.is_symlink() or not path.is_file():
        return None
    try:
        nats = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    usable = nats.shape == (count,) and nats.dtype == np.float32 and np.isfinite(nats).all()
    return nats if usable else None


def what_happened(
    place: cell.Cell, status: int, said: str, count: int, trace: Path | None
) -> Alone:
    """What a script has left in a cell, and what was written down of it.

    Where strace looked on, what it saw is added to what the hook within has told.
    """
    record = read_record(place.work / "record.jsonl")
    asked = [one.what for one in record if one.kind == "open"]
    programs = [one.what for one in record if one.kind == "program"]
    network = [one.what for one in record if one.kind == "network"]
    if trace is not None and trace.is_file():
        traced = cell.read_trace(trace, "guard.py")
        asked += traced.opened
        network += traced.network
        programs += [one for one in traced.programs if Path(one).name not in STARTERS | COMPILERS]
    # In order, each once; relative paths were relative to the folder.
    paths = list(dict.fromkeys(os.path.realpath(place.work / one) for one in asked))
    began = [one.seconds for one in record if one.kind == "open" and one.what.endswith("/artifact")]
    seconds = record[-1].seconds - min(began, default=record[0].seconds) if record else math.nan
    log = None
    nats = read_nats(place.work / "nats.npy", count)
    if not status:
        try:
            log = read_text_log(place.work / "logs" / "audit.eval.txt")
        except UserError as error:
            said = str(error)
    given = f"{place.given}/"
    return Alone(
        status=status,
        said=said,
        log=log,
        nats=None if status or log is None else nats,
        seconds=seconds,
        opened=[path.removeprefix(given) for path in paths],
        strangers=find_strangers(place, paths),
        programs=programs,
        network=network,
        traced=trace is not None and trace.is_file(),
    )


def find_strangers(place: cell.Cell, paths: list[str]) -> list[str]:
    """Those of some opened files, by their real paths, that no evaluation needs.

    That is what is neither given nor made in the cell, nor the system's or Python's; and what lies
    among Python's packages without being part of one.
    """
    base = str(place.given.parent)
    python = cell.python_folders()
    system = [os.path.realpath(path) for path in (*cell.SYSTEM, "/proc", "/dev", "/etc")]
    known = [base, *python, *system]
    strangers = []
    for path in paths:
        shared = path.startswith("/dev/shm/")
        hidden = "-packages/" in path and belongs(path, python) and is_unlisted(path)
        if shared or hidden or not belongs(path, known):
            strangers.append(path)
    return strangers


def belongs(path: str, folders: list[str]) -> bool:
    """Whether a path is one of these folders or lies in one."""
    return any(Path(path).is_relative_to(folder) for folder in folders)


def is_unlisted(path: str) -> bool:
    """Whether a file among the packages is part of none of them, by the packages' own lists.

    What Python itself compiles there is on no list.
    """
    generated = path.endswith((".pyc", ".pth")) or os.path.isdir(path)
    return not generated and path not in packaged_files() and os.path.exists(path)


@functools.lru_cache(maxsize=1)
def packaged_files() -> frozenset[str]:
    """Real paths of all files that installed packages list."""
    files = set()
    real_folder = functools.cache(os.path.realpath)  # of many files each
    for package in metadata.distributions():
        for one in package.files or ():
            folder, name = os.path.split(package.locate_file(one))
            path = os.path.join(real_folder(folder), name)
            special = name in ("", os.curdir, os.pardir) or os.path.islink(path)
            files.add(os.path.realpath(path) if special else path)
    return frozenset(files)


def watch(case: Case) -> Observation:
    """Evaluates the artifact by the script and tells what it does, by watch.py in a cell.

    Raises ValueError if that fails.
    """
    with cell.open_cell() as place:
        settings = without_idle(case.settings | furnish(place, case, case.script, None))
        inside = str(place.given / script.NAME)
        line = [sys.executable, "-m", "tools.audit.watch", inside, str(case.seed)]
        say: Callable = case.progress.pass_on
        status, said = cell.run_in_cell(case.isolation, place, line, settings, say)
        if status:
            raise ValueError(f"the watched evaluation ended with status {status}: {said}")
        return read_observation(place.work, case.count)

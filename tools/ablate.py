"""Compares variants of a model: trains each with several seeds and says what is more than noise.

    python -m tools.ablate tools/ablations/recurrence.toml --dry-run   # what would run
    python -m tools.ablate tools/ablations/recurrence.toml             # runs it, or goes on with it

A TOML file says what to compare. Settings are those of train_gpt.py, in capitals; names are free
text:

    seeds = [1337, 1338, 1339]  # every variant runs once with each
    processes = 1               # of each run, as torchrun's --nproc_per_node; 1 if left out
    parallel = 8                # runs at once, which may share GPUs; if left out, as many as there
                                # are GPUs for; on a CPU one

    [base]                      # what all variants share, and itself the first row of the table
    PRESET = "short"

    [[variant]]
    name = "no position in attention"
    ROPE_FRACTION = 0

    [[variant]]
    name = "hinge, one pass"
    LAYER_ORDER = "0-4,3-8"
    seeds = [1337, 1338]        # instead of the seeds above

    [grid]                      # every combination of these is a variant, named after its values
    MATRIX_LR = [0.02, 0.03]    # (one that equals the base is not run twice)
    NUM_LAYERS = [8, 9]

A variant does not train if an earlier one trains alike, that is, if the two differ only in settings
of the evaluation, such as TTT_ENABLED or EVAL_STRIDE (or of the sample). With EVAL_ONLY=1 it scores
the artifact of the earlier variant's run with the same seed, once that run is complete. If the
earlier variant is the base, their scores differ only by how they were made, so p is computed from
the differences by seed. A variant that differs in nothing trains anew: it shows what chance does.

[base] may have a `name`, too. Settings in the environment, such as DATA_PATH, hold for all runs
unless the file sets them. RUN_ID, SEED and LOG_DIR are chosen here. Runs that share a GPU hide
each other's compiling, and no clock is fair to them: compare them by steps, with
MAX_WALLCLOCK_SECONDS=0 and ITERATIONS.

The output folder, logs/NAME-OF-THE-FILE, gets table.md, results.json, plots and, in runs/, a folder
per run. Ctrl-C or SIGTERM stops the runs, and the same command goes on with them. (Ctrl-C does not
if the parent ignores it, as a shell script does for what it starts with &.) A complete run is kept
as long as its settings and the number of its processes stay the same. A run that failed, was
stopped or has other settings now starts anew.

--budget N stops losers early so that all runs together take at most about N GPU-seconds, from start
to score (on a CPU: seconds of a process). This is successive halving. All variants train to a rung,
1/2 or 1/4 or ... of their run. Training losses there are compared at the same part of the clock, as
means over the seeds. Variants with the higher losses are stopped; the better half goes on, and so
does the base in any case. The fewest halvings that fit the budget are made, none if it is enough
for all. A run is stopped by a signal and leaves a checkpoint; if it is to go on, it does so from
there, by the schedule of the whole run. table.md says which variants were stopped, when and by
what. The budget includes earlier calls. Costs are estimates: if the budget is spent before the end,
all runs are stopped, and the same command with a larger budget goes on, also with variants that a
smaller one had stopped.
An early training loss misjudges what acts late, such as WARMDOWN_FRACTION or EMA_DECAY, and cannot
judge what does not train: a variant that scores another's artifacts goes on or stops with it.
"""

import argparse
import contextlib
import difflib
import fcntl
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

try:
    import tomllib
except ImportError:  # Python 3.10
    try:
        import tomli as tomllib
    except ImportError:
        tomllib = None
try:
    from matplotlib.figure import Figure
    from scipy import stats
    from tqdm import tqdm
except ImportError as missing:
    print(
        f"ablate.py: error: {missing.name} is not installed: pip install -r requirements-dev.txt",
        file=sys.stderr,
    )
    sys.exit(2)

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.ablate", file=sys.stderr)
    sys.exit(2)

from tools.command import (
    Parser,
    UserError,
    environment_value,
    file_sha256,
    need,
    run_command,
    table_cell,
    write_picture,
    write_whole,
)
from tools.halving import Rung, choose_halvings, judge, kept_after, loss_at, rungs_of
from tools.logs import is_record, kind_of, spread

ROOT = Path(__file__).resolve().parent.parent
# torchrun, which picks a free port.
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
OWN_SETTINGS = {  # train_gpt.py's settings that a file may not give, and why
    "RUN_ID": "ablate.py names the runs",
    "SEED": "write seeds = [...] instead",
    "LOG_DIR": "ablate.py chooses each run's folder",
    "ARTIFACT": "each run writes its own",
    "EVAL_ONLY": "ablate.py sets it for variants that differ in the evaluation alone",
    "EVAL_NLL_PATH": "all runs would write the same file",
}
# In the environment of a run's processes: the run's folder, by which they are found again.
MARK = "ABLATE_RUN"
POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # for processes that were asked to stop
# Guesses, for the shared presets, of a run's time off its clocks: to start and compile, and to be
# read, scored and packed around training and evaluation.
START_SECONDS = 45.0
AROUND_SECONDS = 75.0
LOOK_SECONDS = 0.5  # between two looks at how far runs with a budget have come
PAUSE_SECONDS = 60.0  # for a run to leave its checkpoint
BPB = {"bpb_before": "before quantization", "bpb_after": "after quantization", "bpb_final": "final"}

SCORE_EVENTS = {  # of the log: which event holds which of these scores
    "bpb_before": "trained",
    "bpb_after": "after_quantization",
    "bpb_final": "final",
}


# ---- What to run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int
    processes: int
    settings: dict  # values of the settings given, by their names in capitals
    variables: dict[str, str]  # what the file adds to the environment
    resolved: object  # all settings, train_gpt.Settings
    uses_gpu: bool  # if there is one
    folder: Path
    source: "Run | None" = None  # the run whose artifact it scores, if it trains nothing

    @property
    def train_seconds(self) -> float:
        """The training clock; 0: none."""
        return self.resolved.max_wallclock_seconds

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"{self.variant}, seed {self.seed}"

    @property
    def run_id(self) -> str:
        """Its RUN_ID, and its folder's name."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """Its log for programs."""
        return self.folder / f"{self.run_id}{'.eval' if self.source else ''}.jsonl"

    @property
    def artifact(self) -> Path:
        """The artifact that it scores: its own, or its source's."""
        if self.source:
            return self.source.artifact
        return self.folder / f"{self.run_id}.int6.lzma"

    def cost(self, begin: float, end: float) -> float:
        """GPU-seconds that it may take from a part of its run to another; 1 includes its score."""
        if self.source and end < 1:
            return 0.0
        trains = 0.0 if self.source else (end - begin) * self.train_seconds
        seconds = START_SECONDS + trains
        if end == 1:
            seconds += AROUND_SECONDS + self.resolved.eval_max_seconds
        return self.processes * seconds

    @property
    def identity(self) -> dict:
        """What a kept result must agree with."""
        return {"settings": self.settings, "processes": self.processes}


@dataclass(frozen=True)
class Plan:
    """Runs in the order in which they start: all variants with the first seed, then with the
    next.
    """

    name: str
    variants: list[str]  # the base is the first
    runs: list[Run]
    processes: int
    parallel: int  # 0: as many as there are GPUs for

    @property
    def base(self) -> str:
        """The name of the variant that the others are compared with."""
        return self.variants[0]

    @functools.cached_property
    def leaders(self) -> dict[str, str]:
        """For each variant that trains nothing, the one whose artifacts it scores."""
        found = {run.variant: run.source.variant for run in self.runs if run.source}
        training = {run.variant for run in self.runs if not run.source}
        return {name: leader for name, leader in found.items() if name not in training}


def load_train_gpt() -> ModuleType:
    """train_gpt.py of this project, which knows its settings."""
    try:
        import train_gpt
    except ImportError as error:
        raise UserError(f"train_gpt.py cannot be imported: {error}") from None
    return train_gpt


def read_toml(path: Path) -> dict:
    """The file's content; the parser's message says which line is wrong."""
    need(tomllib, "Python 3.10 cannot read TOML: pip install tomli")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows marks UTF-8
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}".replace("\n", " ")) from None


def read_seeds(table: dict, where: str) -> list[int]:
    """The table's seeds, checked."""
    seeds = table.get("seeds")
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    need(whole and seeds, f"{where}: seeds should be a list of whole numbers, such as [1337, 1338]")
    need(len(set(seeds)) == len(seeds), f"{where}: seeds = {seeds} names a seed twice")
    return seeds


def read_variables(table: dict, where: str, train_gpt: ModuleType) -> dict[str, str]:
    """The table's settings as environment variables; every other name in it is refused.

    A setting may go by any of its names; train_gpt.py judges the values.
    """
    names = {name.upper() for name in train_gpt.FIELDS} | train_gpt.ALIASES.keys()
    variables = {}
    for name, value in table.items():
        if name in ("name", "seeds"):
            continue
        need(
            name not in OWN_SETTINGS,
            f"{where}: {name} cannot be set here: {OWN_SETTINGS.get(name)}",
        )
        if name not in names:
            near = difflib.get_close_matches(name.upper(), sorted(names), n=1, cutoff=0.0)[0]
            raise UserError(
                f"{where}: {name} is not a setting; did you mean {near}? (see train_gpt.py --help)"
            )
        simple = isinstance(value, (str, int, float)) and "\0" not in str(value)
        need(simple, f"{where}: {name} should be a string, a number, true or false")
        variables[name] = environment_value(value)
    return variables


def folder_name(variant: str) -> str:
    """The variant's name without what a path should not hold."""
    return re.sub(r"[^\w.+=-]+", "-", variant)


def read_content(path: Path) -> dict:
    """The file's tables and keys, each of the kind that it should be."""
    content = read_toml(path)
    known = ("seeds", "processes", "parallel", "base", "variant", "grid")
    for key in content:
        near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.0)[0]
        hint = f"did you mean {near}? (settings belong under [base])"
        need(key in known, f"{path}: {key} is unknown here; {hint}")
    for key in ("processes", "parallel"):
        value = content.get(key, 1)
        need(type(value) is int and value > 0, f"{path}: {key} should be a whole number above 0")
    base = content.get("base")
    missing = f"{path}: there is no [base], the settings that all variants share"
    need(isinstance(base, dict), missing)
    variants = content.get("variant", [])
    listed = isinstance(variants, list) and all(isinstance(variant, dict) for variant in variants)
    need(listed, f"{path}: variants are tables that begin with [[variant]]")
    grid = content.get("grid", {})
    need(isinstance(grid, dict), f"{path}: the grid is a table that begins with [grid]")
    for key, values in grid.items():
        need(key not in ("name", "seeds"), f"{path}: [grid]: {key} is no setting to vary")
        several = isinstance(values, list) and len(set(map(str, values))) == len(values) > 1
        usual = "a list of several values, none of them twice, such as [1, 2]"
        need(several, f"{path}: [grid]: {key} should be {usual}")
    return content


def grid_variants(grid: dict[str, list]) -> list[dict]:
    """A variant for each combination of the grid's values, named after them."""
    if not grid:
        return []
    variants = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        name = ", ".join(f"{key}={value}" for key, value in chosen.items())
        variants.append({"name": name, **chosen})
    return variants


def check_environment(environment: dict[str, str], train_gpt: ModuleType) -> None:
    """Raises UserError for a setting in the environment that is chosen here or is wrong."""
    for name, reason in OWN_SETTINGS.items():
        need(not environment.get(name), f"unset {name} in the environment: {reason}")
    with as_user_error("environment", train_gpt):
        train_gpt.read_settings(environment)


def check_name(path: Path, name: object, others: list[str]) -> None:
    """Raises UserError unless a name can be a folder's, and is no other variant's folder."""
    fits = isinstance(name, str) and re.fullmatch(r"\w[\w .,:;+=×/()-]{0,119}", name)
    allowed = "up to 120 letters, digits, spaces and .,:;+-=/()"
    need(fits, f"{path}: {name!r} cannot be a variant's name: {allowed}")
    # Some file systems do not tell capitals from small letters.
    folders = {folder_name(other).casefold(): other for other in others}
    twin = folders.get(folder_name(name).casefold())
    same = f"{path}: variant {name!r} has the same name as {twin!r}"
    need(twin is None, f"{same}: names must differ in letters or digits")


def read_variant(
    name: str,
    seeds: list[int],
    variables: dict[str, str],
    where: str,
    runs: Path,
    processes: int,
    train_gpt: ModuleType,
) -> list[Run]:
    """A variant's runs, one for each seed, their settings checked by train_gpt.py."""
    with as_user_error(where, train_gpt):
        launched = {"WORLD_SIZE": str(processes)}
        settings, given = train_gpt.read_settings(os.environ | variables | launched)
        train_gpt.validate_settings(settings, processes)
        train_gpt.refuse_idle(settings, given)
        for seed in seeds:  # what is each run's own, too, or every one would be refused later
            own = {"seed": seed, "run_id": f"{folder_name(name)}-{seed}"}
            train_gpt.check_values(replace(settings, **own))
    values = {
        field.upper(): getattr(settings, field) for field in sorted(given & train_gpt.FIELDS.keys())
    }
    return [
        Run(
            variant=name,
            seed=seed,
            processes=processes,
            settings=values,
            variables=variables,
            resolved=settings,
            uses_gpu=settings.device != "cpu",
            folder=runs / f"{folder_name(name)}-{seed}",
        )
        for seed in seeds
    ]


def equals_base(
    table: dict, runs: list[Run], shared: dict[str, str], path: Path, train_gpt: ModuleType
) -> bool:
    """Whether a combination of the grid has the settings of the base, whose runs come first."""
    where = f"{path}: [grid]"
    variables = shared | read_variables(table, where, train_gpt)
    launched = {"WORLD_SIZE": str(runs[0].processes)}
    with as_user_error(where, train_gpt):
        settings, _ = train_gpt.read_settings(os.environ | variables | launched)
    return settings == runs[0].resolved


def find_sources(runs: list[Run], train_gpt: ModuleType) -> list[Run]:
    """The runs, of which those that need not train have their source: the first run of their seed
    with the same settings but for the evaluation's and the sample's.

    The base's runs come first. What the source's log would say otherwise of how the artifact is
    scored is added to the variables, without what the run's EVAL_MODE does not read.
    """
    groups = train_gpt.FIELDS.items()
    scoring = [name for name, group in groups if group in ("evaluation", "sample")]
    first: dict[tuple, Run] = {}
    found = []
    for run in runs:
        settings = run.resolved
        trains = [getattr(settings, name) for name in train_gpt.FIELDS if name not in scoring]
        source = first.setdefault((run.seed, *trains), run)
        differ = [n for n in scoring if getattr(settings, n) != getattr(source.resolved, n)]
        if differ:
            variables = {
                name.upper(): environment_value(getattr(settings, name))
                for name in differ
                if settings.eval_mode in train_gpt.modes_that_read(name)
                and name.upper() not in run.settings
            }
            run = replace(run, source=source, variables=run.variables | variables)
        found.append(run)
    return found


def read_plan(
    path: Path,
    out: Path,
    train_gpt: ModuleType,
    processes: int = 0,
    parallel: int = 0,
    num_seeds: int | None = None,
) -> Plan:
    """The file's runs.

    processes and parallel go before the file's; of the seeds only the first num_seeds count.
    """
    content = read_content(path)
    processes = processes or content.get("processes", 1)
    parallel = parallel or content.get("parallel", 0)
    check_environment(dict(os.environ), train_gpt)
    base = content["base"]
    shared = read_variables(base, f"{path}: [base]", train_gpt)
    names: list[str] = []
    runs: list[Run] = []
    combinations = grid_variants(content.get("grid", {}))
    for table in ({"name": "base"} | base, *content.get("variant", []), *combinations):
        name = table.get("name")
        if table in combinations and equals_base(table, runs, shared, path, train_gpt):
            continue
        check_name(path, name, names)
        names.append(name)
        where = f"{path}: variant {name!r}"
        seeds = read_seeds(table, where) if "seeds" in table else read_seeds(content, str(path))
        variables = shared | read_variables(table, where, train_gpt)
        runs += read_variant(
            name, seeds[:num_seeds], variables, where, out / "runs", processes, train_gpt
        )
    # All variants with the first seed come first: an early look at the table is fair to them.
    order = {seed: place for place, seed in enumerate(dict.fromkeys(run.seed for run in runs))}
    runs.sort(key=lambda run: order[run.seed])
    return Plan(path.stem, names, find_sources(runs, train_gpt), processes, parallel)


@contextlib.contextmanager
def as_user_error(where: str, train_gpt: ModuleType):
    """Turns train_gpt.py's UserError into one of ours, which says where the mistake is."""
    try:
        yield
    except train_gpt.UserError as error:
        raise UserError(f"{where}: {error}") from None


def visible_gpus() -> list[str]:
    """Names of the GPUs here, as CUDA_VISIBLE_DEVICES wants them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = chosen.split(",") if chosen else [str(number) for number in range(count)]
    # The variable may name GPUs that do not exist.
    return names[:count]


def share_gpus(plan: Plan) -> list[list[str]]:
    """The GPUs of each run that may go on at once.

    Lists are disjoint as far as the GPUs go, and empty on a CPU.
    """
    gpus = visible_gpus() if any(run.uses_gpu for run in plan.runs) else []
    if not gpus:
        return [[] for _ in range(plan.parallel or 1)]
    size = plan.processes
    groups = [gpus[first : first + size] for first in range(0, len(gpus) - size + 1, size)]
    need(groups, f"processes = {size}, but there are only {len(gpus)} GPUs here")
    # More runs than groups begin again with the first.
    return [groups[place % len(groups)] for place in range(plan.parallel or len(groups))]


# ---- What a run left behind ----------------------------------------------------------------------


def read_records(run: Run) -> list[dict]:
    """Records of the run's log, as far as it came.

    The run may be writing at this moment, or have been stopped: a line that was cut off is left
    out, and a log that is not there yet is empty.
    """
    try:
        lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if is_record(record)]


def read_events(run: Run) -> dict[str, dict]:
    """The last record of each event in the run's log."""
    return {record["event"]: record for record in read_records(run)}


def written_sha256(run: Run) -> str | None:
    """The SHA-256 of the artifact that the run is to score, as the run that wrote it logged it."""
    return read_events(run.source or run).get("trained", {}).get("artifact_sha256")


def read_figures(run: Run) -> dict:
    """The run's numbers, as far as it came.

    One that scores another's artifact has what that run found of it, and a score of its own, unless
    it scored an earlier artifact.
    """
    events = read_events(run)
    if run.source:
        figures = read_figures(run.source) | {"bpb_final": None}
        final = events.get("final", {})
        if final.get("artifact_sha256") == written_sha256(run):
            figures["bpb_final"] = final.get("val_bpb")
        return figures
    trained = events.get("trained", {})
    figures = {}
    for name, event in SCORE_EVENTS.items():
        if event in events:
            figures[name] = events[event].get("val_bpb")
    if "bytes_total" in trained and "bytes_code" in trained:
        figures["artifact_bytes"] = trained["bytes_total"] - trained["bytes_code"]
    for name in ("steps", "step_avg_ms", "sdclip_k"):
        if name in trained:
            figures[name] = trained[name]
    kinds = events.get("quantization_loss", {}).get("bpb_by_kind")
    if isinstance(kinds, dict):
        # A kind that could not be measured has a text in place of a number.
        measured = {kind: lost for kind, lost in kinds.items() if isinstance(lost, (int, float))}
        figures["bpb_by_kind"] = measured
    return figures


def read_outcome(run: Run) -> dict:
    """How the run with these settings ended: status, error, seconds, script; {} if it has not."""
    try:
        outcome = json.loads((run.folder / "outcome.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(outcome, dict):
        return {}
    # One of other settings says nothing about this run.
    same = all(outcome.get(key) == value for key, value in run.identity.items())
    return outcome if same else {}


def read_curve(run: Run) -> list[dict]:
    """The run's records of training, of all its starts, without the steps that were made again."""
    curve: list[dict] = []
    anew = False
    for record in read_records(run):
        event = record["event"]
        if event == "settings":
            anew = True
        elif event == "resumed":
            curve = [step for step in curve if step["step"] <= record["step"]]
            anew = False
        elif event == "train":
            # A start that has taken up no checkpoint begins the run again.
            curve = [record] if anew else [*curve, record]
            anew = False
    return curve


def has_reached(run: Run, place: float) -> bool:
    """Whether the run has come to this part of its training; 1: whether it is complete."""
    if is_complete(run) or (run.source and place < 1):
        return True
    if place == 1 or not read_outcome(run):
        return False
    curve = read_curve(run)
    return bool(curve) and curve[-1]["progress"] >= place


def gpu_seconds(run: Run) -> float:
    """What the run has cost so far, with attempts that failed."""
    return read_outcome(run).get("gpu_seconds", 0.0)


def is_complete(run: Run) -> bool:
    """Whether the run need not be made again."""
    if read_outcome(run).get("status") != "complete":
        return False
    if run.source and not is_complete(run.source):  # which will write another artifact
        return False
    return read_figures(run).get("bpb_final") is not None


def hindrance(run: Run) -> str:
    """Why the run cannot score the artifact that it is to score; empty if it can, or may yet."""
    if run.source is None or is_complete(run):
        return ""
    writer = run.source.title
    if read_outcome(run.source).get("status") == "failed":
        return f"{writer}, whose artifact it would score, failed"
    if not is_complete(run.source):
        return ""
    try:
        found = file_sha256(run.artifact)
    except OSError as error:
        found, problem = "", error.strerror
    else:
        problem = f"not the artifact that {writer} wrote"
    remedy = f"put that back, or remove {run.source.folder} to have it trained anew"
    return "" if found == written_sha256(run) else f"{run.artifact}: {problem}; {remedy}"


def last_words(output: Path, exit_status: int) -> str:
    """The line of a failed run's output that says why: the program's own error, else an exception,
    else the last.
    """
    text = output.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    exception = re.compile(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception|Interrupt)\b")
    own = [line for line in lines if re.match(r"\w+\.py: error: ", line)]
    raised = [line for line in lines if exception.match(line) and "ChildFailedError" not in line]
    if own:
        return own[-1]
    last = (raised or lines or ["no output"])[-1]
    return f"exit status {exit_status}: {last[:300]}"


# ---- A budget ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """A plan within a budget, by successive halving."""

    plan: Plan
    budget: float  # GPU-seconds

    @functools.cached_property
    def halvings(self) -> int:
        """The fewest that the budget allows; UserError if none does."""
        return choose_halvings(len(self.trained) - 1, self.budget, self.cost)

    @property
    def trained(self) -> list[str]:
        """The variants that are judged: those that train, the base first."""
        return [variant for variant in self.plan.variants if variant not in self.plan.leaders]

    @property
    def places(self) -> list[float]:
        """Ends of the legs, as parts of a run: the rungs, and 1."""
        return [*rungs_of(self.halvings), 1.0]

    def runs_of(self, variants: Iterable[str]) -> list[Run]:
        """The variants' runs, in the plan's order."""
        return [run for run in self.plan.runs if run.variant in variants]

    def legs(self, halvings: int) -> list[tuple[int, float, float]]:
        """For each leg: the number of variants beside the base, its end, and its cost.

        Whichever variants go on, they cost no more than the dearest do, with those that score their
        artifacts.
        """
        found = []
        begin = 0.0
        base, *others = self.trained
        for leg, end in enumerate([*rungs_of(halvings), 1.0]):
            costs = dict.fromkeys(self.trained, 0.0)
            for run in self.plan.runs:
                costs[self.plan.leaders.get(run.variant, run.variant)] += run.cost(begin, end)
            kept = kept_after(len(others), leg)
            dearest = sorted((costs[name] for name in others), reverse=True)[:kept]
            found.append((kept, end, costs[base] + sum(dearest)))
            begin = end
        return found

    def cost(self, halvings: int) -> float:
        """GPU-seconds that all may take with so many halvings."""
        return sum(cost for _, _, cost in self.legs(halvings))

    def next_rung(self, rungs: list[Rung], tried: set[str]) -> Rung | None:
        """What is to be decided at the rung after these; None while runs are on their way to it.

        Runs whose RUN_ID is in tried have failed, and are not waited for.
        """
        place = self.places[len(rungs)]
        if place == 1:
            return None
        alive = [variant for variant in still_in(self.plan, rungs) if variant in self.trained]
        arrived = []
        for run in self.runs_of(alive):
            if has_reached(run, place):
                arrived.append(run)
            elif run.run_id not in tried:
                return None
        losses = {}
        for variant in alive:
            own = [loss_at(read_curve(run), place) for run in arrived if run.variant == variant]
            known = [loss for loss in own if loss is not None]
            losses[variant] = statistics.fmean(known) if known else None
        kept = kept_after(len(self.trained) - 1, len(rungs) + 1)
        return judge(place, losses, self.plan.base, kept)


def still_in(plan: Plan, rungs: list[Rung]) -> list[str]:
    """The variants that go on behind these rungs: those that were not stopped, neither themselves
    nor, if they score another's artifacts, with that one.
    """
    stopped = {variant for rung in rungs for variant in rung.stopped}
    return [name for name in plan.variants if plan.leaders.get(name, name) not in stopped]


def check_sweep(plan: Plan, gpus: list[list[str]], train_gpt: ModuleType) -> None:
    """Raises UserError if losses at a rung, by the runs' clocks, cannot compare these variants."""
    alone = len({gpu for own in gpus for gpu in own}) == sum(map(len, gpus))
    need(alone, "--budget: runs that share GPUs have no fair clock; choose a smaller --parallel")
    trained: dict[tuple, str] = {}
    texts = {(run.resolved.tokenizer_path, run.resolved.vocab_size) for run in plan.runs}
    need(
        len(texts) == 1, "--budget: losses of several tokenizers, in nats per token, do not compare"
    )
    names = [n for n in train_gpt.TRAINING_FIELDS if n not in train_gpt.EXPORT_FIELDS | {"seed"}]
    # The quantizer trains where weights stand on their grids.
    names += ["quantizer", "late_qat_threshold", "data_path"]
    for run in plan.runs:
        if run.source:  # it goes with that one
            continue
        where = f"--budget: variant {run.variant!r}"
        need(run.train_seconds, f"{where} has MAX_WALLCLOCK_SECONDS=0: its cost is unknown")
        need(run.resolved.resume == "auto", f"{where}: RESUME is what lets stopped runs go on")
        values = tuple(getattr(run.resolved, name) for name in names)
        twin = trained.setdefault(values, run.variant)
        alike = f"{where} trains as {twin!r} does: a training loss cannot tell which is better"
        need(twin == run.variant, alike)


# ---- Running -------------------------------------------------------------------------------------


def marked_processes(folder: Path) -> list[int]:
    """Ids of the living processes that belong to runs in the folder, however they were started
    (Linux).
    """
    mark = f"{MARK}={folder}".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended, or be another user's
            variables = (place / "environ").read_bytes().split(b"\0")
            # A run's own folder lies in the folder of all.
            if mark in variables or any(text.startswith(mark + b"/") for text in variables):
                found.append(int(place.name))
    return found


def ask_to_stop(folder: Path, child: subprocess.Popen) -> None:
    """Sends SIGTERM to a run's processes and returns at once: a run in training then leaves a
    checkpoint.
    """
    child.send_signal(signal.SIGTERM)
    for process in marked_processes(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)


def stop_processes(
    folder: Path, children: Iterable[subprocess.Popen] = (), grace: float | None = None
):
    """Ends the processes of runs in the folder, by force if they do not heed the request.

    torchrun's workers are not in its process group, and outlive a torchrun that is killed: so all
    are looked for by their mark.
    """
    deadline = time.monotonic() + (GRACE_SECONDS if grace is None else grace)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in children:
            child.send_signal(number)
        for process in marked_processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        while time.monotonic() < deadline:
            if all(child.poll() is not None for child in children) and not marked_processes(folder):
                return
            time.sleep(POLL_SECONDS)
        deadline += 2  # for those that were killed


@dataclass
class Job:
    """A run that goes on."""

    run: Run
    process: subprocess.Popen
    gpus: list[str]
    started: float
    digest: str  # of the script
    before: dict  # the outcome of its earlier legs
    patience: float = math.inf  # until then it may take to leave its checkpoint

    def outcome(self, **values) -> dict:
        """What outcome.json holds, with the seconds so far."""
        leg = time.monotonic() - self.started
        seconds = self.before.get("seconds", 0.0) + leg
        cost = self.before.get("gpu_seconds", 0.0) + self.run.processes * leg
        figures = {"seconds": round(seconds, 1), "gpu_seconds": round(cost, 1)}
        return {"error": "", **values, **figures, **self.run.identity, "script": self.digest}


def stage_of(run: Run) -> str:
    """How far a run has come, by the last line of its log."""
    records = read_records(run)
    if not records:
        return "starting"
    last = records[-1]
    if run.source:
        return "scoring"
    if "progress" in last:
        return f"{last['progress']:.0%} trained"
    # After training's last validation the model is exported, then scored twice.
    stages = {"validation": "exporting", "trained": "scoring", "after_quantization": "scoring"}
    return stages.get(last["event"], "starting")


class Runner:
    """Runs what is not complete, as many at once as there are lists of GPUs."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        script: Path,
        gpus: list[list[str]],
        sweep: Sweep | None = None,  # with a budget
    ):
        self.plan = plan
        self.out = out
        self.script = script
        self.free = list(gpus)  # of the runs that have not started
        self.parallel = len(gpus)
        self.jobs: list[Job] = []
        self.stopping = False
        self.next_show = 0.0  # when the bar is brought up to date again
        # Then a step's time says nothing.
        self.shared = any(gpus.count(own) > 1 for own in gpus if own)
        self.sweep = sweep
        self.rungs: list[Rung] = []  # that were decided
        self.tried: set[str] = set()  # RUN_IDs of those that failed in this call
        self.spent = sum(map(gpu_seconds, plan.runs))  # GPU-seconds, but for jobs
        self.out_of_budget = False
        self.next_look = 0.0  # at what the jobs have come to
        kept = [run for run in plan.runs if is_complete(run)]
        # Seconds of complete runs: of those that only score (True), and of those that train.
        self.durations: dict[bool, list[float]] = {True: [], False: []}
        for run in kept:
            self.durations[run.source is not None].append(read_outcome(run)["seconds"])
        self.bar = tqdm(
            total=len(plan.runs),
            initial=len(kept),
            disable=None,  # where no terminal shows it
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} runs |{bar:20}| {elapsed}{postfix}",
        )
        self._plan_leg()

    def run(self) -> bool:
        """Runs until all have ended, or a signal asks to stop; returns whether all have ended.

        No process is left over.
        """
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in handled}
        for number, handler in before.items():
            # One that is ignored stays so: nohup ignores the last.
            signal.signal(number, handler if handler == signal.SIG_IGN else self._stop)
        try:
            while (self.waiting or self.jobs) and not self.stopping:
                while self.free and (run := self._next()):
                    self._start(run)
                ended = [job for job in self.jobs if job.process.poll() is not None]
                for job in ended:
                    self._finish(job)
                self._look_at_rung()
                self._show()
                time.sleep(POLL_SECONDS)
        finally:
            grace = PAUSE_SECONDS if self.sweep else GRACE_SECONDS
            stop_processes(self.out, [job.process for job in self.jobs], grace)
            for job in self.jobs if self.sweep else ():
                self._write_outcome(job, status="paused")
            self.bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return not self.jobs and not self.waiting

    def _stop(self, *_):
        """What a signal does; run() looks between two naps."""
        self.stopping = True

    def _plan_leg(self):
        """Decides at the rung that all have come to; has the runs wait that are short of the next.

        Runs of variants that are stopped there are asked to end.
        """
        while self.sweep and (rung := self.sweep.next_rung(self.rungs, self.tried)):
            self.rungs.append(rung)
            for variant in rung.stopped:
                self._say(f"{variant}: {rung.reason(variant)}")
        self.end = self.sweep.places[len(self.rungs)] if self.sweep else 1.0
        alive = still_in(self.plan, self.rungs)
        for job in self.jobs:
            if job.run.variant not in alive:
                self._pause(job)
        busy = {job.run.run_id for job in self.jobs} | self.tried
        due = [run for run in self.plan.runs if run.variant in alive and run.run_id not in busy]
        self.waiting = [run for run in due if not has_reached(run, self.end)]

    def _next(self) -> Run | None:
        """Takes the first of those that wait whose source, if it has one, is complete.

        Those whose source has failed or left no artifact wait no more. A source that is to be tried
        again stands before them, and its start removes what an earlier call left.
        """
        for run in list(self.waiting):
            problem = hindrance(run)
            if problem:
                self.waiting.remove(run)
                self.tried.add(run.run_id)
                self.bar.update()
                self._say(f"{run.title}: not run: {problem}")
            elif run.source is None or is_complete(run.source):
                self.waiting.remove(run)
                return run
        return None

    def _look_at_rung(self):
        """Pauses runs that have come to the rung and others wait for; goes on to the next leg, or
        ends all when the budget is spent.
        """
        now = time.monotonic()
        # Without jobs it must look: nobody else would start any.
        if self.sweep is None or (self.jobs and now < self.next_look):
            return
        self.next_look = now + LOOK_SECONDS
        short = [job for job in self.jobs if not has_reached(job.run, self.end)]
        pausing = bool(self.waiting) or self._is_far(short)
        for job in self.jobs:
            if pausing and job not in short:
                self._pause(job)
            if now > job.patience:
                stop_processes(job.run.folder, [job.process])
        if not self.waiting and not short:
            self._plan_leg()
        running = sum(job.run.processes * (now - job.started) for job in self.jobs)
        self.out_of_budget = self.spent + running >= self.sweep.budget
        if self.out_of_budget and (self.jobs or self.waiting):
            self.stopping = True

    def _is_far(self, short: list[Job]) -> bool:
        """Whether one of these is further from the rung than it takes to start a run again."""
        for job in short:
            curve = read_curve(job.run)
            progress = curve[-1]["progress"] if curve else 0.0
            if (self.end - progress) * job.run.train_seconds > START_SECONDS:
                return True
        return False

    def _pause(self, job: Job):
        """Asks a run, once, to leave a checkpoint and end."""
        if job.patience == math.inf:
            job.patience = time.monotonic() + PAUSE_SECONDS
            ask_to_stop(job.run.folder, job.process)

    def _write_outcome(self, job: Job, **values):
        """Writes down how a run stands, and with which settings it came so far."""
        outcome = job.outcome(**values) | {"shared": self.shared}
        write_whole(job.run.folder / "outcome.json", json.dumps(outcome))

    def _start(self, run: Run):
        """Starts a run in an empty folder, or with what it left when it was paused."""
        before = read_outcome(run)
        digest = file_sha256(self.script)
        paused = before.get("status") == "paused" and before["script"] == digest
        if not (self.sweep and paused):
            before = {"gpu_seconds": before.get("gpu_seconds", 0.0)}
            shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True, exist_ok=True)
        gpus = self.free.pop(0)
        environment = os.environ | run.variables
        if run.source:
            environment |= {"EVAL_ONLY": "1", "ARTIFACT": str(run.artifact)}
        environment |= {
            "SEED": str(run.seed),
            "RUN_ID": run.run_id,
            "LOG_DIR": str(run.folder),
            MARK: str(run.folder),
        }
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        else:  # runs side by side would take every core each
            cores = max(1, (os.cpu_count() or 1) // (self.parallel * run.processes))
            environment.setdefault("OMP_NUM_THREADS", str(cores))
        command = [*LAUNCHER, f"--nproc_per_node={run.processes}", str(self.script)]
        with (run.folder / "output.txt").open("ab") as output:
            # A session of its own: Ctrl-C reaches only ablate.py.
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        job = Job(run, process, gpus, time.monotonic(), digest, before)
        self.jobs.append(job)
        if self.sweep:  # so that it is known what this folder holds, whatever happens
            self._write_outcome(job, status="paused")
        place = f" on GPU {','.join(gpus)}" if gpus else ""
        place += f", which scores the artifact of {run.source.title}" if run.source else ""
        self._say(f"{'went on with' if 'seconds' in before else 'started'} {run.title}{place}")

    def _finish(self, job: Job):
        """Writes down how a run ended and gives its GPUs to the next."""
        run = job.run
        status = job.process.returncode
        stop_processes(run.folder)  # a launcher that was killed leaves workers behind
        final = read_figures(run).get("bpb_final")
        self.jobs.remove(job)
        self.free.append(job.gpus)
        self.spent += run.processes * (time.monotonic() - job.started)
        if final is None and job.patience < math.inf:
            self._write_outcome(job, status="paused")
            # By now the next leg may have begun.
            alive = run.variant in still_in(self.plan, self.rungs)
            if alive and not has_reached(run, self.end):
                self.waiting.append(run)
            return
        error = ""
        # A run without a score has failed, whatever its status says.
        if status or final is None:
            error = last_words(run.folder / "output.txt", status)
            self.tried.add(run.run_id)
        seconds = job.outcome()["seconds"]
        if not error:
            self.durations[run.source is not None].append(seconds)
        self._write_outcome(job, status="failed" if error else "complete", error=error)
        self.bar.update()
        result = f"failed: {error}" if error else f"{final:.4f} bits per byte"
        self._say(f"{run.title}: {result}, after {seconds:.0f} s; {self._time_left()}")
        write_results(self.plan, self.out, rungs=self.rungs)

    def _time_left(self) -> str:
        """How long the rest will take, in words; with a budget, what is spent of it instead.

        By what complete runs took; until there is one, by the training clock.
        """
        if self.sweep:
            return f"{self.spent:.0f} of {self.sweep.budget:g} GPU-seconds spent"
        now = time.monotonic()
        spent = [(run, 0.0) for run in self.waiting]
        spent += [(job.run, now - job.started) for job in self.jobs]
        seconds = 0.0
        for run, so_far in spent:
            known = self.durations[run.source is not None]
            if known:
                whole = statistics.mean(known)
            elif run.source or run.train_seconds:
                trains = 0.0 if run.source else run.train_seconds
                whole = trains + START_SECONDS + AROUND_SECONDS
            else:
                return "time left unknown"
            seconds += max(0.0, whole - so_far)
        minutes = seconds / 60 / self.parallel
        return f"about {math.ceil(minutes)} min left"

    def _show(self):
        """Brings the bar up to date, every other second."""
        if self.bar.disable or time.monotonic() < self.next_show:
            return
        self.next_show = time.monotonic() + 2
        stages = [f"{job.run.title}: {stage_of(job.run)}" for job in self.jobs]
        self.bar.set_postfix_str("; ".join([self._time_left(), *stages]), refresh=True)

    def _say(self, text: str):
        """Prints a line above the bar."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()


# ---- Results -------------------------------------------------------------------------------------


def data_of(run: Run) -> dict[str, list[str]]:
    """SHA-256 or digest of what a run read, by kind, as far as its log tells it: tools.logs.Kind.

    One that scores another's artifact read no training text.
    """
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        return kind_of(run.log, read_events(run)).data
    return {}


def describe_run(run: Run, stopped: bool) -> dict:
    """A run as results.json holds it; stopped: whether its variant is."""
    outcome = read_outcome(run)
    status = outcome.get("status", "waiting")
    error = outcome.get("error", "")
    again = status == "complete" and not is_complete(run)  # there is another artifact to score
    if again or status in ("waiting", "paused"):
        status = "stopped" if stopped else "waiting"
        error = "" if stopped else hindrance(run)
        status = "not run" if error else status
    owner = run.source or run
    final = read_events(run).get("final", {})
    return {
        "variant": run.variant,
        "seed": run.seed,
        "status": status,
        "error": error,
        **run.identity,
        "artifact": str(run.artifact),
        "artifact_of": owner.variant,  # which trained it
        "artifact_sha256": final.get("artifact_sha256"),
        "seconds": outcome.get("seconds"),
        "gpu_seconds": outcome.get("gpu_seconds"),
        "shared": outcome.get("shared"),
        "script": outcome.get("script"),
        "folder": str(run.folder),
        "data_path": run.resolved.data_path,
        "data": data_of(run),
        # A log without an outcome is of a run that goes on, or was stopped.
        "figures": read_figures(run) if outcome else {},
    }


def welch_p(values: list[float], others: list[float]) -> float | None:
    """Two-sided p-value of Welch's t-test, whose groups may differ in variance; None where it is
    undefined.
    """
    if min(len(values), len(others)) < 2:
        return None
    with warnings.catch_warnings():  # about groups without any variance
        warnings.simplefilter("ignore")
        p = float(stats.ttest_ind(values, others, equal_var=False).pvalue)
    return p if math.isfinite(p) else None


def paired_p(differences: list[float]) -> float | None:
    """Two-sided p-value of the t-test that differences of pairs are 0 in the mean; None where it is
    undefined.
    """
    if len(differences) < 2:
        return None
    with warnings.catch_warnings():  # about differences without any variance
        warnings.simplefilter("ignore")
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return p if math.isfinite(p) else None


def compare(plan: Plan, runs: list[dict], variant: str) -> dict:
    """The variant's difference to the base in final BPB, its p-value, and the test's name.

    Scores of the base's own artifacts are compared with the base's seed by seed. All is None
    without scores on both sides, for the base, and where one folder held other data by then.
    """
    found = {"difference": None, "p": None, "test": None}
    score_of = functools.partial(figure_of, name="bpb_final")
    base = {run["seed"]: score_of(run) for run in runs if run["variant"] == plan.base}
    own = [run for run in runs if run["variant"] == variant and score_of(run) is not None]
    final = [score_of(run) for run in own]
    others = [score for score in base.values() if score is not None]
    if variant == plan.base or not final or not others:
        return found
    compared = [run for run in runs if run["variant"] == plan.base and score_of(run) is not None]
    if changed_data([*own, *compared]):
        return found
    if all(run["artifact_of"] == plan.base for run in own):
        differences = [score_of(run) - base[run["seed"]] for run in own]
        p = paired_p(differences)
        return {"difference": statistics.fmean(differences), "p": p, "test": "paired"}
    difference = statistics.fmean(final) - statistics.fmean(others)
    return {"difference": difference, "p": welch_p(final, others), "test": "Welch"}


def changed_data(runs: list[dict]) -> list[str]:
    """What one folder held otherwise for some of these runs than for others, in words.

    Runs of several calls may find other shards under one DATA_PATH. Those of several folders are
    another matter: variants with tokenizers of their own have theirs.
    """
    seen: dict[tuple[str, str], list[str]] = {}
    found = []
    for run in runs:
        for kind, sums in run["data"].items():
            here = run["data_path"]
            if seen.setdefault((here, kind), sums) != sums:
                found.append(f"another {kind} in DATA_PATH={here}")
    return list(dict.fromkeys(found))


def figure_of(run: dict, name: str) -> float | None:
    """A figure of a run of results.json, None where it has none; only complete runs have any."""
    return run["figures"].get(name) if run["status"] == "complete" else None


def complete_values(runs: list[dict], variant: str, name: str) -> list[float]:
    """The figure in each complete run of the variant that has it."""
    values = [figure_of(run, name) for run in runs if run["variant"] == variant]
    return [value for value in values if value is not None]


def summarize(plan: Plan, runs: list[dict]) -> list[dict]:
    """A row for each variant.

    It holds counts, the spread of each figure over complete runs, and the test against the base.
    """
    rows = []
    for variant in plan.variants:
        final = complete_values(runs, variant, "bpb_final")
        count = sum(run["variant"] == variant for run in runs)
        row = {"variant": variant, "n": len(final), "runs": count}
        for name in (*BPB, "artifact_bytes", "step_avg_ms"):
            row[name] = spread(complete_values(runs, variant, name))._asdict()
        row |= compare(plan, runs, variant)
        rows.append(row)
    return rows


def shown(value: float | None, form: str) -> str:
    """A cell of the table; a dash where there is nothing to show."""
    return "–" if value is None else format(value, form)


def plus_minus(figure: dict, form: str) -> str:
    """Mean and deviation in one cell; a single run has no deviation."""
    mean = shown(figure["mean"], form)
    return mean if figure["std"] is None else f"{mean} ± {figure['std']:{form}}"


HEADS = (
    "variant",
    "n",
    "BPB, final",
    "difference",
    "p",
    BPB["bpb_before"],
    BPB["bpb_after"],
    "artifact bytes, mean",
    "ms/step",
)


def table_row(row: dict, is_base: bool) -> str:
    """A variant's line of the table, its cells as HEADS names them."""
    count = str(row["n"])
    if row["n"] != row["runs"]:
        count += f" of {row['runs']}"
    name = row["variant"]
    if is_base:
        name += " (base)"
    cells = [name, count]
    cells.append(plus_minus(row["bpb_final"], ".4f"))
    cells.append(shown(row["difference"], "+.4f"))
    paired = ", paired" if row["test"] == "paired" and row["p"] is not None else ""
    cells.append(shown(row["p"], ".2g") + paired)
    cells.append(plus_minus(row["bpb_before"], ".4f"))
    cells.append(plus_minus(row["bpb_after"], ".4f"))
    cells.append(shown(row["artifact_bytes"]["mean"], ",.0f"))
    cells.append(plus_minus(row["step_avg_ms"], ".1f"))
    return "| " + " | ".join(cells) + " |"


def failed_row(run: dict) -> str:
    """The line of a run that failed or could not begin, below its variant's: why."""
    empty = "  |" * (len(HEADS) - 2)
    error = table_cell(run["error"])
    return f"| {run['variant']}, seed {run['seed']} | {run['status']}: {error} |{empty}"


def table_notes(runs: list[dict], notes: Iterable[str]) -> list[str]:
    """What a reader of the table has to know: what is missing, and what cannot be compared."""
    waiting = sum(run["status"] == "waiting" for run in runs)
    found = [f"{waiting} of {len(runs)} runs have not ended."] if waiting else []
    found += scoring_notes(runs)
    found += notes
    if any(run["shared"] for run in runs):
        found.append("Runs shared GPUs: ms/step compares nothing.")
    complete = [run for run in runs if run["status"] == "complete"]
    if changed := changed_data(complete):
        remedy = "nothing compares them; remove the older ones' folders to have them made anew"
        found.append(f"**Some runs found {', '.join(changed)}**: {remedy}.")
    scripts = len({run["script"] for run in runs if run["status"] == "complete"})
    if scripts > 1:
        found.append(f"The runs were made with {scripts} versions of the script.")
    return found


def scoring_notes(runs: list[dict]) -> list[str]:
    """Which variants score whose artifacts: for each of the latter a sentence."""
    scoring: dict[str, list[str]] = {}
    for run in runs:
        names = scoring.setdefault(run["artifact_of"], [])
        if run["variant"] not in (run["artifact_of"], *names):
            names.append(run["variant"])
    text = "These train nothing and score the artifacts of {}, seed by seed: {}."
    listed = [(owner, "; ".join(names)) for owner, names in scoring.items() if names]
    return [text.format(owner, names) for owner, names in listed]


def stopped_row(variant: str, leader: str, rung: Rung) -> str:
    """A stopped variant's line, below its own: when, and by what; the leader is itself, or the one
    whose artifacts it would score.
    """
    empty = "  |" * (len(HEADS) - 2)
    reason = rung.reason(leader)
    if leader != variant:
        reason = f"with {leader}, which was {reason}"
    return f"| {variant}, stopped | {reason} |{empty}"


def format_table(
    plan: Plan, runs: list[dict], notes: Iterable[str] = (), rungs: Iterable[Rung] = ()
) -> str:
    """table.md: a row for each variant, each that was stopped and each failed run, and what to
    know about them.
    """
    lines = [f"# {plan.name}", "", "| " + " | ".join(HEADS) + " |", "| --- " * len(HEADS) + "|"]
    rows = summarize(plan, runs)
    for row in rows:
        variant = row["variant"]
        lines.append(table_row(row, variant == plan.base))
        leader = plan.leaders.get(variant, variant)
        lines += [stopped_row(variant, leader, rung) for rung in rungs if leader in rung.stopped]
        own = [run for run in runs if run["variant"] == variant]
        lines += [failed_row(run) for run in own if run["status"] in ("failed", "not run")]
    lines += [
        "",
        "BPB is bits per byte, lower is better: mean ± sample standard deviation over n seeds.",
        "The difference is to the base's final BPB; p is Welch's two-sided t-test, "
        "uncorrected for many variants. Bytes are the mean too; a submission counts its largest.",
    ]
    if any(row["test"] == "paired" for row in rows):
        lines[-1] += (
            " Where variants score the base's own artifacts, p is the t-test of the differences by"
            " seed (paired): it holds for such artifacts, not for what another training would add."
        )
    for note in table_notes(runs, notes):
        lines += ["", note]
    return "\n".join(lines) + "\n"


def write_results(
    plan: Plan, out: Path, notes: Iterable[str] = (), rungs: Iterable[Rung] = ()
) -> list[dict]:
    """Writes results.json and table.md for the runs as they stand, and returns them."""
    alive = still_in(plan, rungs)
    runs = [describe_run(run, run.variant not in alive) for run in plan.runs]
    results = {
        "name": plan.name,
        "base": plan.base,
        "variants": summarize(plan, runs),
        "rungs": [rung.record() for rung in rungs],
        "runs": runs,
    }
    write_whole(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_whole(out / "table.md", format_table(plan, runs, notes, rungs))
    return runs


Groups = dict[str, dict[str, list[float]]]  # by variant and series, the values of complete runs


def bound_axis(axes, groups: Groups) -> None:
    """Lets an axis that does not begin at zero show all values, with room for their labels."""
    every = []
    for values in groups.values():
        for numbers in values.values():
            every += numbers
    room = max(max(every) - min(every), 1e-3)
    axes.set_ylim(min(every) - 0.3 * room, max(every) + 0.6 * room)


def grouped_bars(path: Path, groups: Groups, series: list[str], unit: str, from_zero: bool):
    """A PNG of means with their standard deviations: groups of bars, one bar for each series.

    Bars that do not begin at zero bear their values, since their lengths mislead.
    """
    figure = Figure(figsize=(max(7.0, 1.2 * len(groups) + 3), 5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for place, name in enumerate(series):
        figures = [spread(values.get(name, [])) for values in groups.values()]
        # The bars of a group stand around its place.
        offset = (place - (len(series) - 1) / 2) * width
        left = [group + offset for group in range(len(groups))]
        heights = [math.nan if f.mean is None else f.mean for f in figures]
        deviations = [f.std or 0.0 for f in figures]
        bars = axes.bar(left, heights, width, yerr=deviations, capsize=2, label=name)
        if not from_zero:
            labels = ["" if math.isnan(height) else f"{height:.4f}" for height in heights]
            axes.bar_label(bars, labels, rotation=90, padding=3, fontsize=7)
    if not from_zero:
        bound_axis(axes, groups)
    axes.set_xticks(range(len(groups)), list(groups), rotation=20, ha="right")
    axes.set_ylabel(unit if from_zero else f"{unit} (not from 0)")
    figure.legend(loc="outside upper center", ncols=len(series))
    write_picture(path, figure, dpi=120)


def loss_captions(plan: Plan) -> tuple[str, str]:
    """What a comparison by seconds of the training clock is worth, and one by steps."""
    shared = any(read_outcome(run).get("shared") for run in plan.runs)
    by_seconds = "fair: what is learned in the time that a run has"
    if shared:
        by_seconds = "not fair: runs shared GPUs, which slows their clocks unevenly"
    by_steps = "fair to what a step teaches, silent on how long it takes"
    if len({run.resolved.train_batch_tokens for run in plan.runs}) > 1:
        by_steps = "not fair: steps differ in tokens, TRAIN_BATCH_TOKENS"
    return f"seconds of training\n({by_seconds})", f"steps\n({by_steps})"


def draw_run(axes: tuple, curve: list[dict], ended: bool, **style) -> None:
    """A run's training loss by seconds and by steps; a cross ends the line of one that was
    stopped.
    """
    losses = [record["train_loss"] for record in curve]
    seconds = [record["train_ms"] / 1000 for record in curve]
    steps = [record["step"] for record in curve]
    if not ended:
        style |= {"marker": "x", "markevery": [-1]}
    for one, places in zip(axes, (seconds, steps), strict=True):
        one.plot(places, losses, linewidth=1, **style)


def plot_loss(path: Path, plan: Plan):
    """A PNG of training loss by seconds of the training clock and by steps, whose captions say
    which is fair: a colour for each variant, a line for each run that is complete or was paused.
    """
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    late = []
    for number, variant in enumerate(plan.variants):
        # Ten colours, then the same with other dashes.
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
        label = variant
        for run in plan.runs:
            curve = read_curve(run)
            shown = read_outcome(run).get("status") in ("complete", "paused")
            if run.variant != variant or not curve or not shown:
                continue
            draw_run(axes, curve, is_complete(run), label=label, **style)
            label = ""
            first = 0.1 * curve[-1]["step"]
            late += [record["train_loss"] for record in curve if record["step"] >= first]
    late = [loss for loss in late if math.isfinite(loss)]  # not those of skipped steps
    # The first steps' loss would hide all differences.
    if late:
        axes[0].set_ylim(min(late) - 0.02 * (max(late) - min(late)), max(late))
        axes[0].legend()
    for one, caption in zip(axes, loss_captions(plan), strict=True):
        one.set_xlabel(caption)
    axes[0].set_ylabel("training loss, nats per token")
    write_picture(path, figure, dpi=120)


def named_scores(figures: dict) -> dict[str, float]:
    """A run's scores, by the names that the plot has for them."""
    return {text: figures[key] for key, text in BPB.items() if figures.get(key) is not None}


def loss_by_kind(figures: dict) -> dict[str, float]:
    """What quantization of each kind of layer costs a run."""
    return figures.get("bpb_by_kind", {})


def collect(plan: Plan, runs: list[dict], read: Callable[[dict], dict[str, float]]) -> Groups:
    """What read() finds in the figures of complete runs; without variants that have nothing."""
    groups: Groups = {variant: {} for variant in plan.variants}
    for run in runs:
        if run["status"] != "complete":
            continue
        for name, value in read(run["figures"]).items():
            groups[run["variant"]].setdefault(name, []).append(value)
    return {variant: values for variant, values in groups.items() if values}


def draw_plots(plan: Plan, out: Path, runs: list[dict]) -> list[str]:
    """Writes the plots for which there are figures; returns notes on those left out."""
    # A plot of an earlier call says nothing any more.
    for name in ("loss.png", "bpb.png", "quantization_loss.png"):
        (out / name).unlink(missing_ok=True)
    scores = collect(plan, runs, named_scores)
    if not scores:
        return ["No plots: no run is complete."]
    plot_loss(out / "loss.png", plan)
    grouped_bars(out / "bpb.png", scores, list(BPB.values()), "bits per byte", from_zero=False)
    kinds = collect(plan, runs, loss_by_kind)
    if not kinds:
        missing = "QUANTIZATION_REPORT=1 among the settings measures it."
        return [f"No plot of quantization loss by kind of layer: {missing}"]
    names = sorted({name for values in kinds.values() for name in values})
    unit = "bits per byte lost by quantization"
    grouped_bars(out / "quantization_loss.png", kinds, names, unit, from_zero=True)
    return []


# ---- Command line --------------------------------------------------------------------------------


def count(text: str) -> int:
    """An argument that is a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def positive(text: str) -> float:
    """An argument that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; UserError if it makes no sense."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = Parser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.hint = " (see --help)"
    add = parser.add_argument
    number = {"type": count, "metavar": "N"}
    add("file", type=Path, metavar="FILE.toml", help="what to compare")
    folder = "output folder (default: logs/ and FILE's name)"
    add("--out", type=Path, metavar="FOLDER", help=folder)
    add("--processes", default=0, help="processes of each run, instead of FILE's", **number)
    add("--parallel", default=0, help="most runs at once, instead of FILE's", **number)
    add("--seeds", help="only the first N seeds of each variant", **number)
    script = ROOT / "train_gpt.py"
    add("--script", type=Path, default=script, help="program to run (train_gpt.py)")
    budget = "for all runs together: stops losers early (see below)"
    add("--budget", type=positive, metavar="GPU-SECONDS", help=budget)
    dry = "list what would run, in which order and at which cost, and change nothing"
    add("--dry-run", action="store_true", help=dry)
    return parser.parse_args(arguments)


def cost_text(run: Run) -> str:
    """What a run may cost from start to score, in words."""
    if not run.train_seconds and not run.source:
        return "cost unknown: no clock"
    return f"at most about {run.cost(0, 1):,.0f} GPU-seconds"


def list_runs(plan: Plan, gpus: list[list[str]], sweep: Sweep | None):
    """What --dry-run prints: runs in the order of their starts, what each may cost, and all."""
    due = [run for run in plan.runs if not is_complete(run)]
    for run in plan.runs:
        settings = " ".join(f"{name}={value}" for name, value in run.variables.items())
        state = "would run" if run in due else "is complete"
        if run.source and run in due:
            state = f"would score the artifact of {run.source.title}"
        problem = hindrance(run)  # a source that has failed is tried again
        if problem and run.source not in due:
            state = f"cannot run: {problem}"
        print(f"{run.title} ({state}): SEED={run.seed} {settings}; {cost_text(run)}")
    to_do = f"{len(due)} of {len(plan.runs)} runs to do"
    scoring = sum(run.source is not None for run in due)
    to_do += f", of which {scoring} only score" if scoring else ""
    print(f"{to_do}; at once: {len(gpus)}; processes: {plan.processes}")
    if all(run.train_seconds or run.source for run in due):
        cost = sum(run.cost(0, 1) for run in due)
        print(f"to the end of all: at most about {cost:,.0f} GPU-seconds")
    if sweep:
        list_legs(sweep)


def list_legs(sweep: Sweep):
    """What --dry-run prints of a budget: how far how many variants train, at what cost."""
    for kept, end, cost in sweep.legs(sweep.halvings):
        place = "the end" if end == 1 else f"{end:.1%}"
        print(f"to {place}: the base and {kept} more, at most about {cost:,.0f} GPU-seconds")
    whole = sweep.cost(sweep.halvings)
    print(f"with --budget {sweep.budget:g}: at most about {whole:,.0f} GPU-seconds")


@contextlib.contextmanager
def claimed(out: Path):
    """Makes the output folder and keeps other ablate.py out of it.

    The lock is held until this process ends, in whatever way.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another ablate.py is at work in {out}") from None
        yield


def main(arguments: list[str] | None = None) -> int:
    """Reads, runs, reports. Exit status: 0, 1 if a run failed, 130 if interrupted."""
    options = parse_arguments(arguments)
    out = (options.out or Path("logs") / options.file.stem).resolve()
    script = options.script.resolve()
    need(script.is_file(), f"{script}: no such program")
    train_gpt = load_train_gpt()
    plan = read_plan(
        options.file, out, train_gpt, options.processes, options.parallel, options.seeds
    )
    gpus = share_gpus(plan)
    sweep = None
    if options.budget:
        check_sweep(plan, gpus, train_gpt)
        sweep = Sweep(plan, options.budget)
        sweep.legs(sweep.halvings)  # raises UserError if the budget is too small
    if options.dry_run:
        list_runs(plan, gpus, sweep)
        return 0
    with claimed(out):
        stop_processes(out)  # of an ablate.py that was killed
        runner = Runner(plan, out, script, gpus, sweep)
        write_results(plan, out, rungs=runner.rungs)
        ended = runner.run()
        notes = budget_notes(runner)
        runs = write_results(plan, out, notes, runner.rungs)
        if not ended and not runner.out_of_budget:
            print(f"stopped; the same command continues. So far: {out}/table.md", flush=True)
            return 130
        write_results(plan, out, [*notes, *draw_plots(plan, out, runs)], runner.rungs)
    table = (out / "table.md").read_text(encoding="utf-8")
    print(f"\n{table}\nResults and plots: {out}", flush=True)
    return int(any(run["status"] not in ("complete", "stopped") for run in runs))


def budget_notes(runner: Runner) -> list[str]:
    """What the table says about a budget."""
    if not runner.sweep:
        return []
    spent = sum(map(gpu_seconds, runner.plan.runs))
    notes = [f"{spent:,.0f} of {runner.sweep.budget:,.0f} GPU-seconds were spent."]
    if runner.rungs:
        places = " and ".join(f"{rung.place:.1%}" for rung in runner.rungs)
        kept = "the half with the lower training loss there went on, and the base"
        notes.append(f"Successive halving at {places} of the run: {kept}.")
    if runner.out_of_budget and (runner.jobs or runner.waiting):
        notes.append("The budget is spent; the same command with a larger one goes on.")
    return notes


def run(arguments: list[str] | None = None) -> int:
    """main(), with a user's mistake printed as one line; returns the exit status."""
    try:
        return run_command("ablate.py", lambda: main(arguments))
    except KeyboardInterrupt:  # before the first run or after the last
        return 130


if __name__ == "__main__":
    sys.exit(run())

"""Compares variants of a model: trains each with several seeds and says which differences are more
than noise.

    python -m tools.ablate tools/ablations/recurrence.toml --dry-run   # what would run
    python -m tools.ablate tools/ablations/recurrence.toml             # run it, or continue after an interruption

A TOML file says what to compare. Settings are those of train_gpt.py, in capitals; names are free
text:

    seeds = [1337, 1338, 1339]  # every variant runs once with each
    processes = 1               # of each run, as in torchrun --nproc_per_node; 1 if left out
    parallel = 8                # runs at once; as many as there are GPUs for if left out, on a CPU one. More share GPUs

    [base]                      # what all variants share, and itself the first row of the table
    PRESET = "short"

    [[variant]]
    name = "no position in attention"
    ROPE_FRACTION = 0

    [[variant]]
    name = "hinge, one pass"
    LAYER_ORDER = "0-4,3-8"
    seeds = [1337, 1338]        # instead of the seeds above

`name` may stand in [base] too. Settings in the environment, such as DATA_PATH, hold for all runs
where the file says nothing else. RUN_ID, SEED and LOG_DIR are chosen here. Runs that share a GPU
hide each other's compiling; compare them by steps, with MAX_WALLCLOCK_SECONDS=0 and ITERATIONS,
since no clock is fair to them.

The output folder, logs/NAME-OF-THE-FILE, gets table.md, results.json, plots and, in runs/, a folder
per run. Ctrl-C stops the runs; the same command continues. A run that is complete is kept as long
as its settings and the number of its processes stay what they are; one that failed, was stopped or
has other settings now starts anew.
"""

import argparse
import contextlib
import difflib
import fcntl
import hashlib
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
from collections.abc import Iterable
from dataclasses import dataclass
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

from tools.command import Parser, UserError, need
from tools.summary import spread

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
]  # torchrun; it picks a free port
OWN_SETTINGS = {  # train_gpt.py's settings that a file may not give, and why
    "RUN_ID": "ablate.py names the runs",
    "SEED": "write seeds = [...] instead",
    "LOG_DIR": "ablate.py chooses each run's folder",
    "ARTIFACT": "each run writes its own",
    "EVAL_ONLY": "every run trains",
    "EVAL_NLL_PATH": "all runs would write the same file",
}
# In the environment of a run's processes: the run's folder, by which they are found again.
MARK = "ABLATE_RUN"
POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # for processes that were asked to stop
OVERHEAD_SECONDS = 120.0  # guess of a run's time off the training clock, until a run has shown it
BPB = {"bpb_before": "before quantization", "bpb_after": "after quantization", "bpb_final": "final"}


# ---- What to run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int
    processes: int
    settings: dict  # values of the settings given, by their names in capitals
    variables: dict[str, str]  # what the file adds to the environment
    train_seconds: float  # the training clock; 0: none
    uses_gpu: bool  # if there is one
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    @property
    def run_id(self) -> str:
        return self.folder.name

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
        return self.variants[0]


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
        return tomllib.loads(path.read_text(encoding="utf-8"))
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
    """The table's settings as environment variables; every other name in it is refused."""
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
        variables[name] = str(int(value) if isinstance(value, bool) else value)
    return variables


def folder_name(variant: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", variant)


def read_plan(
    path: Path,
    out: Path,
    train_gpt: ModuleType,
    processes: int = 0,
    parallel: int = 0,
    num_seeds: int | None = None,
) -> Plan:
    """The file's runs, their settings checked by train_gpt.py; processes and parallel go before the
    file's, and of the seeds the first num_seeds.
    """
    content, environment = read_toml(path), dict(os.environ)
    known = ("seeds", "processes", "parallel", "base", "variant")
    for key in content:
        near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.0)[0]
        need(
            key in known,
            f"{path}: {key} is unknown here; did you mean {near}? (settings belong under [base])",
        )
    for key in ("processes", "parallel"):
        value = content.get(key, 1)
        need(type(value) is int and value > 0, f"{path}: {key} should be a whole number above 0")
    processes, parallel = (
        processes or content.get("processes", 1),
        parallel or content.get("parallel", 0),
    )
    base, variants = content.get("base"), content.get("variant", [])
    need(
        isinstance(base, dict), f"{path}: there is no [base], the settings that all variants share"
    )
    listed = isinstance(variants, list) and all(isinstance(variant, dict) for variant in variants)
    need(listed, f"{path}: variants are tables that begin with [[variant]]")
    for name, reason in OWN_SETTINGS.items():
        need(not environment.get(name), f"unset {name} in the environment: {reason}")
    with as_user_error("environment", train_gpt):
        train_gpt.read_settings(environment)

    shared, names, rows = read_variables(base, f"{path}: [base]", train_gpt), [], []
    for table in ({"name": "base"} | base, *variants):
        name = table.get("name")
        fits = isinstance(name, str) and re.fullmatch(r"\w[\w .,:;+=×/()-]{0,59}", name)
        need(
            fits,
            f"{path}: {name!r} cannot be a variant's name: up to 60 letters, digits, spaces and .,:;+-=/()",
        )
        where = f"{path}: variant {name!r}"
        twin = [
            other
            for other in names
            if folder_name(other).casefold() == folder_name(name).casefold()
        ]
        need(
            not twin,
            f"{where} has the same name as {''.join(twin[:1])!r}: names must differ in letters or digits",
        )
        names.append(name)
        seeds = read_seeds(
            table if "seeds" in table else content, where if "seeds" in table else str(path)
        )[:num_seeds]
        variables = shared | read_variables(table, where, train_gpt)
        with as_user_error(where, train_gpt):
            settings, given = train_gpt.read_settings(environment | variables)
            train_gpt.validate_settings(settings, processes)
        values = {field.upper(): getattr(settings, field) for field in sorted(given)}
        for seed in seeds:
            folder = out / "runs" / f"{folder_name(name)}-{seed}"
            clock, gpu = settings.max_wallclock_seconds, settings.device != "cpu"
            rows.append(Run(name, seed, processes, values, variables, clock, gpu, folder))
    order = {seed: place for place, seed in enumerate(dict.fromkeys(run.seed for run in rows))}
    return Plan(
        path.stem, names, sorted(rows, key=lambda run: order[run.seed]), processes, parallel
    )


@contextlib.contextmanager
def as_user_error(where: str, train_gpt: ModuleType):
    """Says where train_gpt.py found a mistake."""
    try:
        yield
    except train_gpt.UserError as error:
        raise UserError(f"{where}: {error}") from None


def visible_gpus() -> list[str]:
    """Names of the GPUs here, as CUDA_VISIBLE_DEVICES wants them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (chosen.split(",") if chosen else [str(number) for number in range(count)])[:count]


def share_gpus(plan: Plan) -> list[list[str]]:
    """The GPUs of each run that may go on at once: disjoint lists as far as they go, empty on a
    CPU.
    """
    gpus = visible_gpus() if any(run.uses_gpu for run in plan.runs) else []
    if not gpus:
        return [[] for _ in range(plan.parallel or 1)]
    fit, size = len(gpus) // plan.processes, plan.processes
    need(fit, f"processes = {plan.processes}, but there are only {len(gpus)} GPUs here")
    return [gpus[i % fit * size : (i % fit + 1) * size] for i in range(plan.parallel or fit)]


# ---- What a run left behind ----------------------------------------------------------------------


def read_records(run: Run) -> list[dict]:
    """Records of the run's log; a line that was cut off is left out."""
    records = []
    with contextlib.suppress(OSError):
        for line in (
            (run.folder / f"{run.run_id}.jsonl")
            .read_text(encoding="utf-8", errors="replace")
            .splitlines()
        ):
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "event" in record]


def read_figures(run: Run) -> dict:
    """The run's numbers, as far as it came."""
    events = {record["event"]: record for record in read_records(run)}
    trained, figures = events.get("trained", {}), {}
    for name, event in (
        ("bpb_before", "trained"),
        ("bpb_after", "after_quantization"),
        ("bpb_final", "final"),
    ):
        if event in events:
            figures[name] = events[event].get("val_bpb")
    if "bytes_total" in trained and "bytes_code" in trained:
        figures["artifact_bytes"] = trained["bytes_total"] - trained["bytes_code"]
    figures |= {
        name: trained[name] for name in ("steps", "step_avg_ms", "sdclip_k") if name in trained
    }
    kinds = events.get("quantization_loss", {}).get("bpb_by_kind")
    if isinstance(kinds, dict):
        figures["bpb_by_kind"] = {
            kind: lost for kind, lost in kinds.items() if isinstance(lost, (int, float))
        }
    return figures


def read_outcome(run: Run) -> dict:
    """How the run with these settings ended: status, error, seconds, script; {} if it has not."""
    try:
        outcome = json.loads((run.folder / "outcome.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return outcome if all(outcome.get(key) == value for key, value in run.identity.items()) else {}


def is_complete(run: Run) -> bool:
    return (
        read_outcome(run).get("status") == "complete"
        and read_figures(run).get("bpb_final") is not None
    )


def last_words(output: Path, exit_status: int) -> str:
    """The line of a failed run's output that says why: the program's own error, else an exception,
    else the last.
    """
    lines = [
        line.strip()
        for line in output.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    exception = re.compile(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception|Interrupt)\b")
    own = [line for line in lines if re.match(r"\w+\.py: error: ", line)]
    raised = [line for line in lines if exception.match(line) and "ChildFailedError" not in line]
    text = (own or raised or lines or ["no output"])[-1]
    return text if own else f"exit status {exit_status}: {text[:300]}"


def write_whole(path: Path, text: str):
    """No reader, and no interruption, ever leaves half of the file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# ---- Running -------------------------------------------------------------------------------------


def marked_processes(folder: Path) -> list[int]:
    """Ids of the living processes that belong to runs in the folder, however they were started
    (Linux).
    """
    found, mark = [], f"{MARK}={folder}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended, or be another user's
            variables = (place / "environ").read_bytes().split(b"\0")
            if any(variable == mark or variable.startswith(mark + b"/") for variable in variables):
                found.append(int(place.name))
    return found


def stop_processes(folder: Path, children: Iterable[subprocess.Popen] = ()):
    """Ends the processes of runs in the folder, by force if they do not heed the request.
    torchrun's workers are not in its process group, and outlive a torchrun that is killed: so all
    are looked for by their mark.
    """
    deadline = time.monotonic() + GRACE_SECONDS
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


class Runner:
    """Runs what is not complete, as many at once as there are lists of GPUs."""

    def __init__(self, plan: Plan, out: Path, script: Path, gpus: list[list[str]]):
        self.plan, self.out, self.script, self.free = plan, out, script, list(gpus)
        self.parallel, self.jobs, self.stopping, self.next_show = len(gpus), [], False, 0.0
        self.shared = any(gpus.count(own) > 1 for own in gpus if own)
        self.waiting = [run for run in plan.runs if not is_complete(run)]
        kept = [run for run in plan.runs if is_complete(run)]
        self.durations = [read_outcome(run)["seconds"] for run in kept]
        self.bar = tqdm(
            total=len(plan.runs), initial=len(kept), disable=None, dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} runs |{bar:20}| {elapsed}{postfix}",
        )  # fmt: skip

    def run(self) -> bool:
        """Until all runs have ended, or a signal asks to stop; whether they have. No process is
        left over.
        """
        handled = (
            signal.SIGINT,
            signal.SIGTERM,
            signal.SIGHUP,
        )  # unless ignored, as nohup does with the last
        before = {number: signal.getsignal(number) for number in handled}
        for number, handler in before.items():
            signal.signal(number, handler if handler == signal.SIG_IGN else self._stop)
        try:
            while (self.waiting or self.jobs) and not self.stopping:
                while self.waiting and self.free:
                    self._start(self.waiting.pop(0))
                for job in [job for job in self.jobs if job.process.poll() is not None]:
                    self._finish(job)
                self._show()
                time.sleep(POLL_SECONDS)
        finally:
            stop_processes(self.out, [job.process for job in self.jobs])
            self.bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return not self.jobs and not self.waiting

    def _stop(self, *_):
        self.stopping = True

    def _start(self, run: Run):
        """Starts a run in an empty folder."""
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        gpus, environment = self.free.pop(0), os.environ | run.variables
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
        with (run.folder / "output.txt").open(
            "wb"
        ) as output:  # a session of its own: Ctrl-C reaches only ablate.py
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        digest = hashlib.sha256(self.script.read_bytes()).hexdigest()
        self.jobs.append(Job(run, process, gpus, time.monotonic(), digest))
        self._say(f"started {run.title}" + (f" on GPU {','.join(gpus)}" if gpus else ""))

    def _finish(self, job: Job):
        """Writes down how a run ended and gives its GPUs to the next."""
        run, status = job.run, job.process.returncode
        stop_processes(run.folder)  # a launcher that was killed leaves workers behind
        seconds, final, error = (
            round(time.monotonic() - job.started, 1),
            read_figures(run).get("bpb_final"),
            "",
        )
        if status or final is None:
            error = last_words(run.folder / "output.txt", status)
        else:
            self.durations.append(seconds)
        outcome = {
            "status": "failed" if error else "complete",
            "error": error,
            "seconds": seconds,
            "shared": self.shared,
        }
        write_whole(
            run.folder / "outcome.json", json.dumps(outcome | run.identity | {"script": job.digest})
        )
        self.jobs.remove(job)
        self.free.append(job.gpus)
        self.bar.update()
        result = f"failed: {error}" if error else f"{final:.4f} bits per byte"
        self._say(f"{run.title}: {result}, after {seconds:.0f} s; {self._time_left()}")
        write_results(self.plan, self.out)

    def _time_left(self) -> str:
        """From what complete runs took; until there is one, from the training clock."""
        now, seconds = time.monotonic(), 0.0
        usual = statistics.mean(self.durations) if self.durations else math.nan
        for run, spent in [(run, 0.0) for run in self.waiting] + [
            (job.run, now - job.started) for job in self.jobs
        ]:
            guess = run.train_seconds + OVERHEAD_SECONDS if run.train_seconds else math.nan
            seconds += max(0.0, (guess if math.isnan(usual) else usual) - spent)
        minutes = seconds / 60 / self.parallel
        return (
            "time left unknown" if math.isnan(minutes) else f"about {math.ceil(minutes)} min left"
        )

    def _show(self):
        """Brings the bar up to date, every other second."""
        if self.bar.disable or time.monotonic() < self.next_show:
            return
        self.next_show = time.monotonic() + 2
        stages = []
        for job in self.jobs:
            last = (read_records(job.run) or [{}])[-1]
            stage = {
                "validation": "exporting",
                "trained": "scoring",
                "after_quantization": "scoring",
            }
            part = (
                f"{last['progress']:.0%} trained"
                if "progress" in last
                else stage.get(last.get("event"), "starting")
            )
            stages.append(f"{job.run.title}: {part}")
        self.bar.set_postfix_str("; ".join([self._time_left(), *stages]), refresh=True)

    def _say(self, text: str):
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()


# ---- Results -------------------------------------------------------------------------------------


def describe_run(run: Run) -> dict:
    """A run as results.json holds it."""
    outcome = read_outcome(run)
    status = outcome.get("status", "waiting")
    return {
        "variant": run.variant, "seed": run.seed, "status": status, "error": outcome.get("error", ""),
        **run.identity, "seconds": outcome.get("seconds"), "shared": outcome.get("shared"),
        "script": outcome.get("script"), "folder": str(run.folder), "figures": read_figures(run) if outcome else {},
    }  # fmt: skip


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


def summarize(plan: Plan, runs: list[dict]) -> list[dict]:
    """A row for each variant: counts, the spread of each figure over complete runs, and the test
    against the base.
    """

    def values(variant: str, name: str) -> list[float]:
        complete = [
            run["figures"]
            for run in runs
            if run["variant"] == variant and run["status"] == "complete"
        ]
        return [figures[name] for figures in complete if figures.get(name) is not None]

    rows, base = [], values(plan.base, "bpb_final")
    for variant in plan.variants:
        final, is_base = values(variant, "bpb_final"), variant == plan.base
        row = {
            "variant": variant,
            "n": len(final),
            "runs": sum(run["variant"] == variant for run in runs),
        }
        row |= {
            name: spread(values(variant, name))._asdict()
            for name in (*BPB, "artifact_bytes", "step_avg_ms")
        }
        compared = bool(final and base) and not is_base
        row["difference"] = statistics.fmean(final) - statistics.fmean(base) if compared else None
        row["p"] = welch_p(final, base) if compared else None
        rows.append(row)
    return rows


def format_table(plan: Plan, runs: list[dict], notes: Iterable[str] = ()) -> str:
    """table.md: a row for each variant and each failed run, and what to know about them."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def plus_minus(figure: dict, form: str) -> str:
        return number(figure["mean"], form) + (
            f" ± {figure['std']:{form}}" if figure["std"] is not None else ""
        )

    heads = [
        "variant",
        "n",
        "BPB, final",
        "difference",
        "p",
        *list(BPB.values())[:2],
        "artifact bytes",
        "ms/step",
    ]
    lines = [f"# {plan.name}", "", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in summarize(plan, runs):
        count = str(row["n"]) if row["n"] == row["runs"] else f"{row['n']} of {row['runs']}"
        name = row["variant"] + (" (base)" if row["variant"] == plan.base else "")
        cells = [
            name,
            count,
            plus_minus(row["bpb_final"], ".4f"),
            number(row["difference"], "+.4f"),
        ]
        cells += [number(row["p"], ".2g"), *(plus_minus(row[key], ".4f") for key in list(BPB)[:2])]
        cells += [
            number(row["artifact_bytes"]["mean"], ",.0f"),
            plus_minus(row["step_avg_ms"], ".1f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        for run in runs:
            if run["variant"] == row["variant"] and run["status"] == "failed":
                error = run["error"].replace("|", "\\|")
                lines.append(
                    f"| {run['variant']}, seed {run['seed']} | failed: {error} |"
                    + "  |" * (len(heads) - 2)
                )
    lines += [
        "",
        "BPB is bits per byte, lower is better: mean ± sample standard deviation over n seeds.",
    ]
    lines.append(
        "The difference is to the base's final BPB; p is Welch's two-sided t-test, uncorrected for many variants."
    )
    waiting = sum(run["status"] == "waiting" for run in runs)
    shared = any(run["shared"] for run in runs)
    scripts = len({run["script"] for run in runs if run["status"] == "complete"})
    notes = [f"{waiting} of {len(runs)} runs have not ended."] * bool(waiting) + list(notes)
    notes += ["Runs shared GPUs: ms/step compares nothing."] * shared
    notes += [f"The runs were made with {scripts} versions of the script."] * (scripts > 1)
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def write_results(plan: Plan, out: Path, notes: Iterable[str] = ()) -> list[dict]:
    """Writes results.json and table.md for the runs as they stand, and returns them."""
    runs = [describe_run(run) for run in plan.runs]
    results = {
        "name": plan.name,
        "base": plan.base,
        "variants": summarize(plan, runs),
        "runs": runs,
    }
    write_whole(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_whole(out / "table.md", format_table(plan, runs, notes))
    return runs


def grouped_bars(
    path: Path,
    groups: dict[str, dict[str, list[float]]],
    series: list[str],
    unit: str,
    from_zero: bool,
):
    """A PNG of means with their standard deviations: groups of bars, one bar for each series. Bars
    that do not begin at zero bear their values.
    """
    figure = Figure(figsize=(max(7.0, 1.2 * len(groups) + 3), 5), layout="constrained")
    axes, width = figure.add_subplot(), 0.8 / len(series)
    for place, name in enumerate(series):
        figures = [spread(values.get(name, [])) for values in groups.values()]
        left = [group + (place - (len(series) - 1) / 2) * width for group in range(len(groups))]
        heights = [math.nan if f.mean is None else f.mean for f in figures]
        bars = axes.bar(
            left, heights, width, yerr=[f.std or 0.0 for f in figures], capsize=2, label=name
        )
        if not from_zero:
            labels = ["" if math.isnan(height) else f"{height:.4f}" for height in heights]
            axes.bar_label(bars, labels, rotation=90, padding=3, fontsize=7)
    if not from_zero:
        every = [
            value for values in groups.values() for numbers in values.values() for value in numbers
        ]
        room = max(max(every) - min(every), 1e-3)
        axes.set_ylim(min(every) - 0.3 * room, max(every) + 0.6 * room)
    axes.set_xticks(range(len(groups)), list(groups), rotation=20, ha="right")
    axes.set_ylabel(unit if from_zero else f"{unit} (not from 0)")
    figure.legend(loc="outside upper center", ncols=len(series))
    figure.savefig(path, dpi=120)


def plot_loss(path: Path, plan: Plan):
    """A PNG of training loss over the training clock, a colour for each variant and a line for each
    run; over steps, if runs shared GPUs.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, late, shared = (
        figure.add_subplot(),
        [],
        any(read_outcome(run).get("shared") for run in plan.runs),
    )
    for number, variant in enumerate(plan.variants):
        color, dashes = f"C{number % 10}", ("-", "--", ":")[number // 10 % 3]
        for place, run in enumerate(
            run for run in plan.runs if run.variant == variant and is_complete(run)
        ):
            steps = [record for record in read_records(run) if record["event"] == "train"]
            places = [s["step"] if shared else s["train_ms"] / 1000 for s in steps]
            losses = [s["train_loss"] for s in steps]
            label = "" if place else variant
            axes.plot(places, losses, color=color, linestyle=dashes, linewidth=1, label=label)
            late += [
                loss for loss, at in zip(losses, places, strict=True) if at >= 0.1 * places[-1]
            ]
    if late:  # the first steps' loss would hide all differences
        axes.set_ylim(min(late) - 0.02 * (max(late) - min(late)), max(late))
        axes.legend()
    axes.set_xlabel("steps" if shared else "seconds of training")
    axes.set_ylabel("training loss, nats per token")
    figure.savefig(path, dpi=120)


def draw_plots(plan: Plan, out: Path, runs: list[dict]) -> list[str]:
    """Writes the plots for which there are figures; returns notes on those left out."""

    def collect(read) -> dict[str, dict[str, list[float]]]:
        """By variant and series, the values of complete runs that read(figures), a dict by series,
        has.
        """
        groups: dict[str, dict[str, list[float]]] = {variant: {} for variant in plan.variants}
        for run in runs:
            for name, value in read(run["figures"]).items() if run["status"] == "complete" else ():
                groups[run["variant"]].setdefault(name, []).append(value)
        return {variant: values for variant, values in groups.items() if values}

    for name in (
        "loss.png",
        "bpb.png",
        "quantization_loss.png",
    ):  # a plot of an earlier call says nothing any more
        (out / name).unlink(missing_ok=True)
    scores = collect(
        lambda figures: {
            text: figures[key] for key, text in BPB.items() if figures.get(key) is not None
        }
    )
    if not scores:
        return ["No plots: no run is complete."]
    plot_loss(out / "loss.png", plan)
    grouped_bars(out / "bpb.png", scores, list(BPB.values()), "bits per byte", from_zero=False)
    kinds = collect(lambda figures: figures.get("bpb_by_kind", {}))
    if not kinds:
        return [
            "No plot of quantization loss by kind of layer: no run has a record `quantization_loss`."
        ]
    names = sorted({name for values in kinds.values() for name in values})
    grouped_bars(
        out / "quantization_loss.png",
        kinds,
        names,
        "bits per byte lost by quantization",
        from_zero=True,
    )
    return []


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    def count(text: str) -> int:
        if not text.isdecimal() or not int(text):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
        return int(text)

    summary, _, rest = __doc__.partition("\n\n")
    parser = Parser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.hint = " (see --help)"
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="what to compare")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="output folder (default: logs/ and FILE's name)"
    )
    parser.add_argument(
        "--processes", type=count, default=0, metavar="N", help="of each run, instead of FILE's"
    )
    parser.add_argument(
        "--parallel",
        type=count,
        default=0,
        metavar="N",
        help="most runs at once, instead of FILE's",
    )
    parser.add_argument(
        "--seeds", type=count, metavar="N", help="only the first N of each variant's"
    )
    parser.add_argument(
        "--script", type=Path, default=ROOT / "train_gpt.py", help="program to run (train_gpt.py)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would run, and change nothing"
    )
    return parser.parse_args(arguments)


def list_runs(plan: Plan, gpus: list[list[str]]):
    """What --dry-run prints."""
    complete = [is_complete(run) for run in plan.runs]
    for run, kept in zip(plan.runs, complete, strict=True):
        settings = " ".join(f"{name}={value}" for name, value in run.variables.items())
        print(f"{run.title} ({'is complete' if kept else 'would run'}): SEED={run.seed} {settings}")
    print(
        f"{complete.count(False)} of {len(plan.runs)} runs to do; at once: {len(gpus)}; processes: {plan.processes}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Reads, runs, reports. Exit status: 0, 1 if a run failed, 130 if interrupted."""
    options = parse_arguments(arguments)
    out, script = (
        (options.out or Path("logs") / options.file.stem).resolve(),
        options.script.resolve(),
    )
    need(script.is_file(), f"{script}: no such program")
    plan = read_plan(
        options.file, out, load_train_gpt(), options.processes, options.parallel, options.seeds
    )
    gpus = share_gpus(plan)
    if options.dry_run:
        list_runs(plan, gpus)
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")  # held until this process ends, in whatever way
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another ablate.py is at work in {out}") from None
        stop_processes(out)  # of an ablate.py that was killed
        write_results(plan, out)
        ended = Runner(plan, out, script, gpus).run()
        runs = write_results(plan, out)
        if not ended:
            print(f"stopped; the same command continues. So far: {out}/table.md", flush=True)
            return 130
        write_results(plan, out, draw_plots(plan, out, runs))
    print(
        "\n" + (out / "table.md").read_text(encoding="utf-8") + f"\nResults and plots: {out}",
        flush=True,
    )
    return int(any(run["status"] != "complete" for run in runs))


def run(arguments: list[str] | None = None) -> int:
    """main(), with a user's mistake printed as one line; returns the exit status."""
    try:
        return main(arguments)
    except UserError as error:
        print(f"ablate.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:  # before the first run or after the last
        return 130


if __name__ == "__main__":
    sys.exit(run())

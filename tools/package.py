"""Makes the contest's submission folder from the logs of finished runs, one per seed.

    python -m tools.package logs/a.txt logs/b.txt logs/c.txt --out FOLDER --name NAME --author A \\
        --github-id G
    python -m tools.package logs/a.txt ... --out FOLDER --baseline logs/x.txt logs/y.txt

With --baseline, it says whether the gain is significant.


FOLDER gets the script as the logs hold it, the logs, requirements.txt, submission.json and a
README.md with results. Nothing is written unless every run keeps the contest's limits and all are
runs of one script with the same settings. What is not three seeds of FineWeb on 8×H100 is packaged
as non-record, with the reasons.
"""

import argparse
import ast
import contextlib
import datetime
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.package", file=sys.stderr)
    sys.exit(2)

from tools.command import Parser, UserError, need, run_command
from tools.logs import SEPARATOR, last_run, not_a_log, split_text, spread
from tools.summary import CAP

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 600  # the contest's limit for training, and again for evaluation
GAIN = 0.005  # nats by which a record must beat the one before
SIGNIFICANCE = 0.01  # the p at which it must
# The last two messages of a finished run: seconds; val_loss, val_bpb.
FINAL = re.compile(
    r"^evaluation took ([\d.]+)s of .*\n\S+_exact val_loss:(\S+) val_bpb:(\S+)$", re.MULTILINE
)
FOREIGN_FINAL = re.compile(r"_exact val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+)[ \t]*$", re.MULTILINE)
# What one run may choose differently from the next: its seed, and where its files lie.
OUTPUTS = {"run_id", "log_dir", "artifact", "eval_nll_path", "checkpoint_every", "resume"}
MAY_DIFFER = {"seed", "data_path", "tokenizer_path"} | OUTPUTS


# ============
# Logs


class Score(NamedTuple):
    """Of the validation text: nats per token, bits per byte."""

    val_loss: float
    val_bpb: float

    @property
    def bytes_per_token(self) -> float:
        """The same for every model, so it tells the validation text and the tokenizer."""
        return self.val_loss / (self.val_bpb * math.log(2))


class Finished(NamedTuple):
    """What is known of every finished run, ours or a baseline's."""

    text: str
    events: dict[str, dict]
    seed: int
    score: Score
    evaluation_seconds: float


@dataclass(frozen=True)
class Run:
    """What a finished run's two logs say. Seconds are of the clocks, limits what the settings allow
    them.
    """

    path: Path
    settings: dict
    machine: dict
    ranks: int
    seed: int
    steps: int
    step_ms: float
    before_bpb: float
    after_bpb: float
    final: Score
    bytes_total: int
    bytes_code: int
    train_seconds: float
    train_limit: float
    evaluation_seconds: float
    evaluation_limit: float


def read_bytes(path: Path) -> bytes:
    """A file's content. Raises UserError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_text(path: Path) -> str:
    """A file's text, which must be UTF-8. Raises UserError."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError:
        raise UserError(f"cannot read {path}: it is not UTF-8 text") from None


def read_final(path: Path) -> Finished:
    """The last run in a text log and in the records beside it.

    Both must agree on the final score: they are of one run, and nobody has changed one of them.
    """
    text = read_text(path)
    records = path.with_suffix(".jsonl")
    events = last_run(records)
    score = None
    try:
        seed = int(events["settings"]["settings"]["seed"])
        if "final" in events:
            score = Score(*(float(events["final"][name]) for name in Score._fields))
    except (ValueError, KeyError, TypeError):
        raise not_a_log(records) from None
    _, messages = split_text(path, text)
    written = FINAL.findall(messages)
    need(written, f"{path} has no final score: the run did not finish")
    need(score, f"{records} has no final score: the run did not finish")
    seconds, *in_text = written[-1]
    in_records = [f"{value:.8f}" for value in score]
    differ = f"{path} has the final score val_loss {in_text[0]} and val_bpb {in_text[1]}"
    need(
        in_text == in_records,
        f"{differ}, but {records} {in_records[0]} and {in_records[1]}",
    )
    check_score(path, score)
    return Finished(text, events, seed, score, float(seconds))


def check_score(path: Path, score: Score) -> None:
    """Refuses a score that is no positive number."""
    usable = all(math.isfinite(value) and value > 0 for value in score)
    need(
        usable,
        f"{path} has no usable final score: val_loss {score.val_loss}, val_bpb {score.val_bpb}",
    )


def read_run(path: Path, script_path: Path, script: str) -> Run:
    """A run that may be packaged: finished, of this script, and within the contest's limits.

    Raises UserError with the first reason against it.
    """
    finished = read_final(path)
    events = finished.events
    try:
        settings = events["settings"]["settings"]
        machine = events["settings"]["machine"]
        need(
            not settings["eval_only"],
            f"{path} is of an EVAL_ONLY run: give the log of the run that trained",
        )
        trained = events["trained"]
        hardware = str(machine["hardware"])  # "8 × NVIDIA H100 80GB HBM3", say
        limit = float(settings["max_wallclock_seconds"])
        versions = {name: machine[name] for name in ("torch", "cuda")}
        figures = {name: int(trained[name]) for name in ("steps", "bytes_total", "bytes_code")}
        before_bpb = float(trained["val_bpb"])
        after_bpb = float(events["after_quantization"]["val_bpb"])
        step_ms = float(trained["step_avg_ms"])
        train_seconds = float(trained["train_clock_seconds"])
        evaluation_limit = float(settings["eval_max_seconds"])
        ranks = int(hardware.split(" × ")[0])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path.with_suffix('.jsonl')} is not a finished run's log: {error!r}"
        ) from None
    run = Run(
        path=path,
        settings=settings,
        machine={"hardware": hardware, **versions},
        ranks=ranks,
        seed=finished.seed,
        **figures,
        step_ms=step_ms,
        before_bpb=before_bpb,
        after_bpb=after_bpb,
        final=finished.score,
        train_seconds=train_seconds,
        train_limit=limit or math.inf,  # 0: no limit
        evaluation_seconds=finished.evaluation_seconds,
        evaluation_limit=evaluation_limit,
    )
    check_code(run, finished.text, script_path, script)
    check_limits(run)
    return run


def excerpt(line: str | None, start: int) -> str:
    """Part of a line as a message shows it; None: the file has no such line."""
    return "nothing" if line is None else repr(line[start : start + 60])


def check_code(run: Run, text: str, script_path: Path, script: str) -> None:
    """Refuses a run of another script; the text log holds the one that ran."""
    code, _ = split_text(run.path, text)
    # An earlier run's messages may stand before the script; then its length tells where it begins.
    if SEPARATOR in code:
        code = code.encode()[-run.bytes_code :].decode(errors="replace")
    lines = itertools.zip_longest(code.split("\n"), script.split("\n"))
    for number, (ran, here) in enumerate(lines, 1):
        if ran != here:
            # Of long lines, what stands around the first difference.
            start = max(0, len(os.path.commonprefix([ran or "", here or ""])) - 20)
            lines_differ = f"line {number} has {excerpt(ran, start)}, not {excerpt(here, start)}"
            raise UserError(f"{run.path} holds another script than {script_path}: {lines_differ}")
    size = len(code.encode())
    need(
        size == run.bytes_code,
        f"{run.path} counts {run.bytes_code} bytes of code, but its script has {size}",
    )


def check_limits(run: Run) -> None:
    """Refuses what the contest would: too many bytes, or too much time."""
    over = f"code and artifact take {run.bytes_total:,} bytes, over the cap of {CAP:,}"
    need(run.bytes_total <= CAP, f"{run.path}: {over}")
    # The run's own limit may be lower than the contest's, and was then not kept either.
    for phase, seconds, limit, name in (
        ("training", run.train_seconds, run.train_limit, "MAX_WALLCLOCK_SECONDS"),
        ("evaluation", run.evaluation_seconds, run.evaluation_limit, "EVAL_MAX_SECONDS"),
    ):
        took = f"{run.path}: {phase} took {seconds:.1f} s"
        need(seconds <= limit, f"{took}, over {name}={limit:g}")
        need(seconds <= MOST_SECONDS, f"{took}, over the contest's {MOST_SECONDS} s")


def check_agreement(runs: list[Run]) -> None:
    """Refuses runs that are not repetitions of one experiment with other seeds.

    Settings, machine and validation text must be the same, and no seed may count twice: the
    standard deviation would be too small.
    """
    first = runs[0]
    seen = {}
    for run in runs:
        need(run.seed not in seen, f"{run.path} has SEED={run.seed}, as {seen.get(run.seed)} has")
        seen[run.seed] = run.path
    for run in runs[1:]:
        for name in dict.fromkeys([*first.settings, *run.settings]):
            expected = first.settings.get(name)
            found = run.settings.get(name)
            differ = f"{run.path} has {name.upper()}={found}, but {first.path} has {expected}"
            need(expected == found or name in MAY_DIFFER, differ)
        for name, value in first.machine.items():  # submission.json has one field for each
            ours = run.machine[name]
            need(ours == value, f"{run.path} ran with {name} {ours}, but {first.path} with {value}")
        check_same_text(first.path, first.final, run.path, run.final)


def check_same_text(path: Path, score: Score, other_path: Path, other: Score) -> None:
    """Refuses to compare scores of different texts or tokenizers. The tolerance admits a last
    sequence left out.
    """
    here = score.bytes_per_token
    there = other.bytes_per_token
    differ = f"{there:.5f} bytes per token there, {here:.5f} in {path}"
    need(
        math.isclose(here, there, rel_tol=1e-5),
        f"{other_path} scored another text or used another tokenizer: {differ}",
    )


def read_baseline(path: Path) -> tuple[Score, int | None]:
    """The final score and the seed of a run to compare with. Other scripts' logs have no .jsonl:
    then the text's last exact score counts, and the seed is not known.
    """
    if path.with_suffix(".jsonl").exists():
        finished = read_final(path)
        return finished.score, finished.seed
    found = FOREIGN_FINAL.findall(read_text(path))
    need(found, f"{path} has no final score")
    score = Score(*map(float, found[-1]))
    check_score(path, score)
    return score, None


# ============
# Statistics


def welch(ours: list[float], baseline: list[float]) -> tuple[float, float]:
    """t and p of Welch's one-sided test that our mean lies more than GAIN below the baseline's."""
    try:
        from scipy.stats import ttest_ind  # only needed with a baseline
    except ImportError:
        raise UserError("--baseline needs SciPy: pip install scipy") from None
    # Groups of few runs may differ in variance, hence Welch's form of the test.
    shifted = [loss - GAIN for loss in baseline]
    result = ttest_ind(ours, shifted, equal_var=False, alternative="less")
    return float(result.statistic), float(result.pvalue)


def gain_text(ours: list[float], baseline: list[float]) -> str:
    """What the test says, in sentences that hold all that is needed to repeat it."""
    mean = statistics.fmean(ours)
    baseline_mean = statistics.fmean(baseline)
    runs = ", ".join(f"{loss:.5f}" for loss in baseline)
    means = f"mean val_loss {mean:.5f} (n={len(ours)}), "
    means += f"the baseline's {baseline_mean:.5f} (n={len(baseline)}: {runs}), "
    means += f"difference {mean - baseline_mean:+.5f} nats"
    claim = f"a gain of more than {GAIN} nats"
    untested = f"{means}. Whether this is {claim} cannot be tested:"
    if min(len(ours), len(baseline)) < 2:
        return f"{untested} that takes two runs or more on each side."
    if len(set(ours)) == len(set(baseline)) == 1:
        return f"{untested} the runs on each side do not differ."
    t, p = welch(ours, baseline)
    holds = "holds" if p < SIGNIFICANCE else "does NOT hold"
    verdict = f"{claim} {holds} at p < {SIGNIFICANCE}"
    return f"{means}. Welch's one-sided test: t = {t:.3f}, p = {p:.3g}; {verdict}."


# ============
# The folder


def seeds_text(runs: list[Run]) -> str:
    """ "1 seed" or "3 seeds"."""
    return "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"


def non_record_reasons(runs: list[Run]) -> list[str]:
    """What keeps these runs from being a record, or nothing."""
    reasons = []
    hardware = runs[0].machine["hardware"]
    # "NVIDIA H100 80GB HBM3" is the SXM form; others say PCIe or NVL.
    if not re.match(r"8 × NVIDIA H100(?! PCIe| NVL)\b", hardware):
        reasons.append(f"the hardware is {hardware}, not 8 × H100 SXM")
    for folder in dict.fromkeys(str(run.settings.get("data_path")) for run in runs):
        if not Path(folder).name.lower().startswith("fineweb"):
            named = "a folder named fineweb…, as the contest's data are"
            reasons.append(f"DATA_PATH={folder} is not {named}")
    if len(runs) < 3:
        reasons.append(f"{seeds_text(runs)}, not three or more")
    return reasons


def rounded(value: float | None) -> float | None:
    """To as many digits as the logs have; None stays None."""
    return None if value is None else round(value, 8)


def seed_result(run: Run) -> dict:
    """One run's entry in submission.json.

    Scores have as many digits as in the logs.
    """
    return {
        "val_loss": rounded(run.final.val_loss),
        "val_bpb": rounded(run.final.val_bpb),
        "train_steps": run.steps,
        "step_avg_ms": round(run.step_ms, 2),
        "bytes_total": run.bytes_total,
    }


def submission(runs: list[Run], fields: dict, record: bool) -> dict:
    """The contest's submission.json. Steps and their time are means; bytes_total is the largest."""
    loss = spread([run.final.val_loss for run in runs])
    bpb = spread([run.final.val_bpb for run in runs])
    steps = statistics.fmean(run.steps for run in runs)
    step_ms = statistics.fmean(run.step_ms for run in runs)
    machine = runs[0].machine  # that of all: they agree
    entry = dict(fields)
    entry["date"] = datetime.date.today().isoformat()
    entry["track"] = "track_10min_16mb" if record else "non-record"
    entry["val_loss"] = rounded(loss.mean)
    entry["val_bpb"] = rounded(bpb.mean)
    entry["val_loss_std"] = rounded(loss.std)
    entry["val_bpb_std"] = rounded(bpb.std)
    entry["seeds"] = [run.seed for run in runs]
    entry["seed_results"] = {str(run.seed): seed_result(run) for run in runs}
    entry["bytes_total"] = max(run.bytes_total for run in runs)
    entry["bytes_code"] = runs[0].bytes_code
    entry["train_steps"] = round(steps)
    entry["step_avg_ms"] = round(step_ms, 2)
    entry["hardware"] = machine["hardware"]
    entry["pytorch_version"] = machine["torch"]
    entry["cuda_version"] = machine["cuda"]
    return entry


def literal(node: ast.expr, known: dict[str, object]) -> object:
    """A value that is written out, perhaps with names of such values and unions of dictionaries.

    Raises ValueError, KeyError or TypeError for any other.
    """
    if isinstance(node, ast.Name):
        return known[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return literal(node.left, known) | literal(node.right, known)
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {
            ast.literal_eval(key): literal(value, known)
            for key, value in zip(node.keys, node.values, strict=True)
        }
    return ast.literal_eval(node)


def field_defaults(settings: ast.ClassDef) -> dict[str, object]:
    """The first argument of each field's call, which is its default."""
    defaults = {}
    for line in settings.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.value, ast.Call):
            continue
        # One that is not written out is left out: the setting will be shown.
        with contextlib.suppress(ValueError, IndexError):
            defaults[line.target.id] = ast.literal_eval(line.value.args[0])
    return defaults


def read_defaults(script: str) -> tuple[dict, dict[str, dict]]:
    """Defaults of the settings and of every preset, from the source.

    To import the script would need torch.
    """
    defaults: dict[str, object] = {}
    known: dict[str, object] = {}
    for node in ast.parse(script).body:
        if isinstance(node, ast.ClassDef) and node.name == "Settings":
            defaults = field_defaults(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                known[node.targets[0].id] = literal(node.value, known)
    return defaults, known.get("PRESETS", {})


def variables(run: Run, script: str) -> list[str]:
    """NAME=value of the settings that differ from the defaults, as a shell takes them.

    The seed and the outputs are left out: whoever repeats the run chooses them.
    """
    defaults: dict[str, object] = {}
    presets: dict[str, dict] = {}
    # A script that is written for a newer Python cannot be read: every setting is shown.
    with contextlib.suppress(SyntaxError):
        defaults, presets = read_defaults(script)
    defaults = defaults | presets.get(run.settings.get("preset"), {})
    shown = []
    for name, value in run.settings.items():
        is_default = name in defaults and defaults[name] == value
        if is_default or name in OUTPUTS or name == "seed":
            continue
        text = str(int(value)) if isinstance(value, bool) else str(value)
        text = text.removesuffix(".0") if isinstance(value, float) else text
        shown.append(f"{name.upper()}={shlex.quote(text)}")
    return shown


def command(runs: list[Run], script: str) -> str:
    """What repeats the runs, in a shell.

    Of several runs it is a loop over their seeds, which is all in which they differ.
    """
    ranks = runs[0].ranks
    launch = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    line = " ".join([*variables(runs[0], script), launch, "train_gpt.py"])
    if len(runs) == 1:
        return f"SEED={runs[0].seed} {line}"
    seeds = " ".join(str(run.seed) for run in runs)
    return f"for seed in {seeds}; do\n    SEED=$seed {line}\ndone"


def table_row(label: str, cells: Iterable[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join([label, *cells])} |"


def results_table(runs: list[Run]) -> list[str]:
    """A row per seed, their mean and their standard deviation, in Markdown."""
    columns = {
        "steps": ([run.steps for run in runs], ",.0f"),
        "ms/step": ([run.step_ms for run in runs], ".2f"),
        "BPB before quantization": ([run.before_bpb for run in runs], ".5f"),
        "after": ([run.after_bpb for run in runs], ".5f"),
        "final": ([run.final.val_bpb for run in runs], ".5f"),
        "final val_loss": ([run.final.val_loss for run in runs], ".5f"),
        "bytes": ([run.bytes_total for run in runs], ",.0f"),
    }
    rows = [table_row("seed", columns), table_row("---", ["---"] * len(columns))]
    for place, run in enumerate(runs):
        cells = [format(values[place], form) for values, form in columns.values()]
        rows.append(table_row(str(run.seed), cells))
    spreads = [(spread(values), form) for values, form in columns.values()]
    rows.append(table_row("mean", [format(s.mean, form) for s, form in spreads]))
    # A single run has no deviation.
    deviations = ["–" if s.std is None else format(s.std, form) for s, form in spreads]
    rows.append(table_row("std", deviations))
    return rows


def deviation(entry: dict) -> str:
    """What follows the mean of the scores; nothing where there is one."""
    std = entry["val_bpb_std"]
    return "" if std is None else f" ± {std:.5f}"


def result_lines(runs: list[Run], entry: dict) -> list[str]:
    """The README's table, what its columns mean, and what the runs took."""
    settings = runs[0].settings
    adapted = settings.get("ttt_enabled") and settings.get("ttt_epochs", 0) > 0
    final = f"{settings.get('eval_mode', 'its')} windows, "
    final += "with test-time training" if adapted else "without test-time training"
    train_seconds = max(run.train_seconds for run in runs)
    evaluation_seconds = max(run.evaluation_seconds for run in runs)
    machine = f"{entry['hardware']} with PyTorch {entry['pytorch_version']}"
    if entry["cuda_version"]:
        machine += f" and CUDA {entry['cuda_version']}"
    return [
        "## Results",
        "",
        *results_table(runs),
        "",
        f"Bytes are code ({entry['bytes_code']:,}) and artifact. std is the sample standard "
        "deviation. Before and after quantization: plain windows, frozen weights. "
        f"Final: {final}.",
        "",
        f"Training took at most {train_seconds:.1f} s, evaluation {evaluation_seconds:.1f} s, "
        f"on {machine}.",
        "",
    ]


def readme(runs: list[Run], entry: dict, script: str, reasons: list[str], gain: str) -> str:
    """The folder's README.md; gain is the sentence about the baseline, or empty."""
    score = f"**val_bpb {entry['val_bpb']:.5f}{deviation(entry)}** over {seeds_text(runs)}"
    size = f"at most {entry['bytes_total']:,} of {CAP:,} bytes."
    lines = [f"# {entry['name']}", "", entry["blurb"], "", f"{score}, {size}", ""]
    if reasons:
        lines += ["**Non-record**, because:", "", *(f"- {reason}" for reason in reasons), ""]
    lines += result_lines(runs, entry)
    if gain:
        lines += ["## Against the baseline", "", gain[0].upper() + gain[1:], ""]
    lines += ["## Reproduce", "", "```", "pip install -r requirements.txt"]
    lines += [*command(runs, script).split("\n"), "```", ""]
    lines += [
        "The logs `train_seed*.txt` begin with the script; `train_seed*.jsonl` hold the same "
        "figures for programs.",
        "",
    ]
    return "\n".join(lines)


def check_folder(out: Path, force: bool, inputs: list[Path]) -> None:
    """Refuses a folder that must not be replaced.

    That is one that holds an input or the working directory; and one with contents unless forced.
    """
    need(not out.exists() or out.is_dir(), f"{out} is not a folder")
    for path in (*inputs, Path.cwd()):
        need(not path.resolve().is_relative_to(out), f"--out {out} would replace {path.resolve()}")
    try:
        occupied = out.is_dir() and any(out.iterdir())
    except OSError as error:
        raise UserError(f"cannot read {out}: {error.strerror}") from None
    need(force or not occupied, f"{out} is not empty: --force replaces it")


def write_folder(out: Path, files: dict[str, bytes]) -> None:
    """Writes all of the files or none.

    They are put beside out, on the same disk, and renamed when they are complete. What was there
    before comes back if the last step fails.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".part", dir=out.parent))
        new, old = beside / "new", beside / "old"
        try:
            new.mkdir()
            for name, data in files.items():
                (new / name).write_bytes(data)
            if out.exists():
                out.rename(old)
            new.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            shutil.rmtree(beside)
            raise
        shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


# ============
# The command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; UserError if it makes no sense.

    What submission.json of this project says is the default of what names the entry.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "logs", nargs="+", type=Path, metavar="LOG", help="a run's .txt, with its .jsonl beside it"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the folder to make"
    )
    parser.add_argument("--name", help="of the entry; default: submission.json's")
    parser.add_argument("--author", help="default: submission.json's")
    parser.add_argument("--github-id", help="default: submission.json's")
    parser.add_argument("--blurb", help="a sentence or two on the entry; default: its result")
    parser.add_argument(
        "--baseline", nargs="+", type=Path, default=[], metavar="LOG", help="logs of runs to beat"
    )
    parser.add_argument(
        "--script",
        type=Path,
        default=ROOT / "train_gpt.py",
        help="what must have run; default: ours",
    )
    parser.add_argument("--force", action="store_true", help="replace FOLDER and all that is in it")
    return parser.parse_args(arguments)


def entry_fields(given: argparse.Namespace, runs: list[Run]) -> dict:
    """Author, name and blurb.

    A blurb of submission.json is about other runs, so it is not taken over.
    """
    path = ROOT / "submission.json"
    try:
        known = json.loads(read_text(path)) if path.exists() else {}
    except ValueError:
        raise UserError(f"{path} is not JSON") from None
    fields = {}
    for name in ("author", "github_id", "name"):
        fields[name] = getattr(given, name) or known.get(name)
    for name in ("author", "name"):
        need(fields[name], f"--{name} is missing, and submission.json has none")
    bpb = statistics.fmean(run.final.val_bpb for run in runs)
    seconds = max(run.train_seconds for run in runs)
    hardware = runs[0].machine["hardware"]
    facts = f"{bpb:.4f} bits per byte, trained {seconds:.0f} s on {hardware}."
    return fields | {"blurb": given.blurb or facts}


def check_paths(given: argparse.Namespace) -> None:
    """Refuses logs of another kind, and one that is given twice.

    Links and other spellings of a path count as the same log.
    """
    for path in given.logs:
        need(path.suffix == ".txt", f"{path}: give the run's .txt log")
    for path in given.baseline:
        need(path.suffix in (".txt", ".log"), f"{path}: give the baseline's .txt or .log")
    together = [path.resolve() for path in (*given.logs, *given.baseline)]
    for path in together:
        need(together.count(path) == 1, f"{path} is given twice")


def compare(runs: list[Run], baseline: list[Path]) -> str:
    """What the gain over the baseline's runs is worth, in sentences."""
    losses = []
    seeds = set()
    for path in baseline:
        score, seed = read_baseline(path)
        check_same_text(runs[0].path, runs[0].final, path, score)
        # Other scripts' logs do not tell the seed.
        repeated = seed is not None and seed in seeds
        need(not repeated, f"{path} has SEED={seed}, as another run of the baseline has")
        losses.append(score.val_loss)
        seeds.add(seed)
    return gain_text([run.final.val_loss for run in runs], losses)


def package(given: argparse.Namespace) -> list[str]:
    """Checks everything, then writes the folder; returns what to tell the user."""
    out = given.out.resolve()
    check_paths(given)
    requirements = ROOT / "requirements.txt"
    inputs = [*given.logs, *given.baseline, given.script, requirements]
    check_folder(out, given.force, inputs)

    script = read_text(given.script)
    runs = [read_run(path, given.script, script) for path in given.logs]
    check_agreement(runs)
    gain = compare(runs, given.baseline) if given.baseline else ""

    reasons = non_record_reasons(runs)
    entry = submission(runs, entry_fields(given, runs), record=not reasons)
    files = {
        "train_gpt.py": script.encode(),
        "requirements.txt": read_bytes(requirements),
        "submission.json": (json.dumps(entry, indent=2, ensure_ascii=False) + "\n").encode(),
        "README.md": readme(runs, entry, script, reasons, gain).encode(),
    }
    # Named by seed: logs of several folders may share a name.
    for run in runs:
        for suffix in (".txt", ".jsonl"):
            files[f"train_seed{run.seed}{suffix}"] = read_bytes(run.path.with_suffix(suffix))
    write_folder(out, files)

    score = f"val_bpb {entry['val_bpb']:.5f}{deviation(entry)}"
    lines = [f"{given.out}: {len(runs)} run(s), {score}, track {entry['track']}"]
    lines += [f"non-record: {reason}" for reason in reasons]
    if not entry["github_id"]:
        lines.append("github_id is empty: give --github-id before you submit")
    if gain:
        lines.append(f"baseline: {gain}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Packages as the command line asks; returns the exit status."""

    def command() -> int:
        print(*package(parse(arguments)), sep="\n")
        return 0

    return run_command("package.py", command)


if __name__ == "__main__":
    sys.exit(main())

"""Makes the contest's submission folder from the logs of finished runs, one per seed.

    python -m tools.package logs/a.txt logs/b.txt logs/c.txt --name NAME --author A --github-id G
    python -m tools.package logs/a.txt ... --out FOLDER --baseline logs/x.txt logs/y.txt

With --baseline, it says whether the gain is significant.

FOLDER (default: records/TRACK/DATE_NAME) gets the logs, the script that they contain (and, if that
is packed, its readable source, with which it is compared: tools/pack_script.py), requirements.txt,
submission.json and a README.md with the results and with what was checked. Nothing is written
unless every run keeps the contest's limits, its two logs, its artifact and their figures agree, and
all runs have one script and the same settings. Anything other than three seeds of FineWeb's whole
validation text on 8×H100 is packaged as non-record, and so are logs that do not say what a reviewer
must know; the reasons are given. Only tools.audit can prove what a log claims.
"""

import argparse
import ast
import contextlib
import datetime
import json
import re
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

if not __package__:  # started by its path
    print("error: start it in the repository's folder as python -m tools.package", file=sys.stderr)
    sys.exit(2)

from tools import evidence
from tools.command import (
    Parser,
    UserError,
    encoded,
    environment_value,
    need,
    run_command,
    table_cell,
)
from tools.contradictions import CAP_BYTES
from tools.evidence import Row
from tools.finished import (
    Run,
    check_agreement,
    check_same_text,
    read_baseline,
    read_bytes,
    read_run,
    read_text,
    refuse_copies,
)
from tools.known import variant_of
from tools.logs import OUTPUTS, spread
from tools.manifest import Manifest, find_manifest
from tools.pack_script import READABLE, source_of
from tools.significance import gain_text
from tools.summary import adapts

ROOT = Path(__file__).resolve().parent.parent


# ============
# The folder


def seeds_text(runs: list[Run]) -> str:
    """How many seeds there are, such as "1 seed" or "3 seeds"."""
    return "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"


def non_record_reasons(runs: list[Run], rows: list[Row]) -> list[str]:
    """What keeps these runs from being a record, or nothing."""
    reasons = []
    hardware = runs[0].machine["hardware"]
    # "NVIDIA H100 80GB HBM3" is the SXM form; others say PCIe or NVL.
    if not re.match(r"8 × NVIDIA H100(?! PCIe| NVL)\b", hardware):
        reasons.append(f"the hardware is {hardware}, not 8 × H100 SXM")
    if len(runs) < 3:
        reasons.append(f"{seeds_text(runs)}, not three or more")
    return [*reasons, *(reason for row in rows for reason in row.reasons)]


def check_rows(
    runs: list[Run], script: str, given: argparse.Namespace, manifest: Manifest | None, gain: str
) -> list[Row]:
    """What reviewers ask for, and what these runs answer: docs/conditions.md lists the questions.

    They agree in data and settings, so one of them stands for all where nothing else is said.
    """
    run = runs[0]
    events = run.logs.events
    sha256 = evidence.tokenizer_sum(events, run.artifact)
    if given.tokenizer and sha256:  # also where it is the contest's, whose file is not looked at
        evidence.need_tokenizer(given.tokenizer.read_bytes(), sha256, given.tokenizer)
    file = given.tokenizer or Path(run.settings["tokenizer_path"])
    largest = max(run.bytes_total for run in runs)
    # The files and their figures.
    rows = [evidence.artifact_row(runs), evidence.logs_row(runs), evidence.parts_row(runs)]
    # The data.
    rows += [evidence.scored_text(events, sha256, manifest), evidence.overlap_row(events, manifest)]
    rows += [evidence.provenance_row(events, run.settings, manifest)]
    rows += [evidence.tokenizer_row(sha256, file, largest)]
    # Training.
    rows += [evidence.documents_row(run.settings), evidence.warm_up_row()]
    rows += [evidence.calibration_row(events, run.settings), evidence.machine_row(runs)]
    # The claim.
    rows += [evidence.seeds_row(runs)]
    tests = gain or "no baseline was given"
    rows.append(Row("significance", tests, "Welch's t-test of the logs' scores"))
    rows += [evidence.attempts_row(runs), evidence.evaluation_row(variables(run, script))]
    return rows


def rounded(value: float | None) -> float | None:
    """A score with as many digits as in the logs; None stays None."""
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
    # A script for a newer Python, or one wrongly packed, cannot be read: every setting is shown.
    with contextlib.suppress(SyntaxError, UserError):
        defaults, presets = read_defaults(source_of(script.encode()).decode())
    defaults = defaults | presets.get(run.settings.get("preset"), {})
    shown = []
    for name, value in run.settings.items():
        is_default = name in defaults and defaults[name] == value
        if is_default or name in OUTPUTS or name == "seed":
            continue
        text = environment_value(value)
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
    mode = settings.get("eval_mode", "its")
    final = "documents by themselves, " if mode == "documents" else f"{mode} windows, "
    final += "with test-time training" if adapts(settings) else "without test-time training"
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


def check_table(rows: list[Row]) -> list[str]:
    """What was checked, as a section in Markdown."""
    lines = ["## What was checked", "", table_row("condition", ["found", "shown by"])]
    lines.append(table_row("---", ["---", "---"]))
    for row in rows:
        lines.append(table_row(row.question, [table_cell(row.answer), row.shown_by]))
    return [*lines, "", "What the logs say is claimed; tools.audit scores an artifact anew.", ""]


def readme(
    runs: list[Run],
    entry: dict,
    script: str,
    source: bytes | None,
    reasons: list[str],
    rows: list[Row],
    gain: str,
) -> str:
    """The folder's README.md.

    source: what a packed script unpacks to, or None; gain: the sentence on the baseline, or empty.
    """
    score = f"**val_bpb {entry['val_bpb']:.5f}{deviation(entry)}** over {seeds_text(runs)}"
    size = f"at most {entry['bytes_total']:,} of {CAP_BYTES:,} bytes."
    lines = [f"# {entry['name']}", "", entry["blurb"], "", f"{score}, {size}", ""]
    if reasons:
        lines += ["**Non-record**, because:", "", *(f"- {reason}" for reason in reasons), ""]
    lines += result_lines(runs, entry)
    if gain:
        lines += ["## Against the baseline", "", gain[0].upper() + gain[1:], ""]
    lines += check_table(rows)
    lines += ["## Reproduce", "", "```", "pip install -r requirements.txt"]
    lines += [*command(runs, script).split("\n"), "```", ""]
    if source is not None:
        size = f"`train_gpt.py` ({len(script.encode()):,} bytes, which count) is what was run"
        text = f"{size}: `{READABLE}` ({len(source):,} bytes), packed. Its first lines say how to "
        lines += [f"{text}unpack and compare it without running it.", ""]
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
    text = "a run's .txt, with its .jsonl beside it"
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help=text)
    text = "the folder to make; default: records/TRACK/DATE_NAME"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--name", help="name of the entry; default: submission.json's")
    parser.add_argument("--author", help="default: submission.json's")
    parser.add_argument("--github-id", help="default: submission.json's")
    parser.add_argument("--blurb", help="a sentence or two on the entry; default: its result")
    text = "logs of runs to beat"
    parser.add_argument("--baseline", nargs="+", type=Path, default=[], metavar="LOG", help=text)
    text = "script that the runs must have; default: ours"
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", help=text)
    text = "artifacts that are neither where they were written nor beside their logs"
    parser.add_argument("--artifacts", nargs="+", type=Path, default=[], metavar="FILE", help=text)
    text = "logs of earlier parts of runs that were resumed under another name"
    parser.add_argument("--parts", nargs="+", type=Path, default=[], metavar="LOG", help=text)
    text = "your own tokenizer, if it is not where the runs read it"
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help=text)
    text = "manifest.json of the data, if it is not where the runs read their shards"
    parser.add_argument("--manifest", type=Path, metavar="FILE", help=text)
    parser.add_argument("--force", action="store_true", help="replace FOLDER and all that is in it")
    return parser.parse_args(arguments)


def entry_fields(given: argparse.Namespace, runs: list[Run]) -> dict:
    """Author, name and blurb.

    A blurb of submission.json is about other runs, so it is not taken over. Raises UserError for a
    name, author or id that is no line of text: it heads the README and fills a field.
    """
    path = ROOT / "submission.json"
    try:
        known = json.loads(read_text(path)) if path.exists() else {}
    except ValueError:
        raise UserError(f"{path} is not JSON") from None
    need(isinstance(known, dict), f"{path} holds no fields of an entry")
    fields = {}
    for name in ("author", "github_id", "name"):
        value = getattr(given, name) or known.get(name)
        line = value is None or (isinstance(value, str) and value.isprintable())
        need(line, f"--{name.replace('_', '-')}: {value!r} is no line of text")
        fields[name] = value
    for name in ("author", "name"):
        need(fields[name], f"--{name} is missing, and submission.json has none")
    bpb = statistics.fmean(run.final.val_bpb for run in runs)
    seconds = max(run.train_seconds for run in runs)
    hardware = runs[0].machine["hardware"]
    facts = f"{bpb:.4f} bits per byte, trained {seconds:.0f} s on {hardware}."
    return fields | {"blurb": given.blurb or facts}


def check_paths(given: argparse.Namespace) -> None:
    """Refuses logs of another kind, one that is given twice, and other files that are not there.

    Links and other spellings of a path count as the same log.
    """
    options = {"--artifacts": given.artifacts, "--parts": given.parts}
    options |= {"--tokenizer": [given.tokenizer], "--manifest": [given.manifest]}
    for option, paths in options.items():
        for path in filter(None, paths):
            need(path.is_file(), f"{option} {path}: there is no such file")
    for path in given.logs:
        need(path.suffix == ".txt", f"{path}: give the run's .txt log")
    for path in given.baseline:
        need(path.suffix in (".txt", ".log"), f"{path}: give the baseline's .txt or .log")
    together = [path.resolve() for path in (*given.logs, *given.baseline)]
    for path in together:
        need(together.count(path) == 1, f"{path} is given twice")


def refuse_unused(artifacts: list[Path], runs: list[Run]) -> None:
    """Raises UserError for an artifact that was given and is no run's, by its name."""
    used = [run.artifact.resolve() for run in runs if run.artifact]
    for path in artifacts:
        none = f"--artifacts {path} is none of these runs', whose are named RUN_ID.int6.lzma"
        need(path.resolve() in used, none)


def compare(runs: list[Run], baseline: list[Path]) -> str:
    """What the gain over the baseline's runs is worth, in sentences."""
    losses = []
    seeds = []
    refuse_copies(baseline)
    for path in baseline:
        score, seed, settings = read_baseline(path)
        check_same_text(runs[0].path, runs[0].final, path, score)
        # Other scripts' logs do not tell the seed.
        repeated = seed is not None and seed in seeds
        need(not repeated, f"{path} has SEED={seed}, as another run of the baseline has")
        losses.append(score.val_loss)
        seeds.append(seed)
    text = gain_text([run.final.val_loss for run in runs], losses)
    shown = ", ".join("not in the log" if seed is None else str(seed) for seed in seeds)
    text += f" The baseline's seeds: {shown}."
    differing = evidence.evaluation_differences(runs[0].settings, settings or {})
    return f"{text} Evaluated differently: {', '.join(differing)}." if differing else text


def default_folder(entry: dict) -> Path:
    """Where the contest wants an entry: by track, date and name.

    Its folders have names of their own for what is no record.
    """
    track = entry["track"] if entry["track"].startswith("track_") else "track_non_record_16mb"
    name = re.sub(r"[^A-Za-z0-9.+-]+", "_", entry["name"]).strip("_.")
    return Path("records", track, f"{entry['date']}_{name}")


def package(given: argparse.Namespace) -> list[str]:
    """Checks everything, then writes the folder; returns what to tell the user."""
    check_paths(given)
    requirements = ROOT / "requirements.txt"
    inputs = [*given.logs, *given.baseline, given.script, requirements]
    inputs += filter(None, [*given.artifacts, *given.parts, given.tokenizer, given.manifest])
    if given.out:
        check_folder(given.out.resolve(), given.force, inputs)

    script = read_text(given.script)
    runs = [read_run(path, given.script, script, given) for path in given.logs]
    check_agreement(runs)
    refuse_unused(given.artifacts, runs)
    gain = compare(runs, given.baseline) if given.baseline else ""

    run = runs[0]
    manifest = find_manifest(given.manifest, str(run.settings.get("data_path")), run.logs.events)
    try:
        rows = check_rows(runs, script, given, manifest, gain)
        source_row, source = evidence.source_row(given.script, script, ROOT / "train_gpt.py")
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        logs = run.path.with_suffix(".jsonl")
        raise UserError(f"{logs} is not a finished run's log: {error!r}") from None
    rows.append(source_row)
    reasons = non_record_reasons(runs, rows)
    entry = submission(runs, entry_fields(given, runs), record=not reasons)
    shown = given.out or default_folder(entry)
    out = shown.resolve()
    check_folder(out, given.force, inputs)
    files = {
        "train_gpt.py": script.encode(),
        "requirements.txt": read_bytes(requirements),
        "submission.json": encoded(json.dumps(entry, indent=2, ensure_ascii=False) + "\n"),
        "README.md": encoded(readme(runs, entry, script, source, reasons, rows, gain)),
    }
    files |= {} if source is None else {READABLE: source}
    files |= log_files(runs, given.parts)
    if manifest:
        files["manifest.json"] = read_bytes(manifest.path)
    own = own_tokenizer(run, given.tokenizer)
    if own:
        files["tokenizer.model"] = read_bytes(own)
    write_folder(out, files)

    score = f"val_bpb {entry['val_bpb']:.5f}{deviation(entry)}"
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    lines = [f"{shown}: {count}, {score}, track {entry['track']}"]
    lines += [f"non-record: {reason}" for reason in reasons]
    if not entry["github_id"]:
        lines.append("github_id is empty: give --github-id before you submit")
    if gain:
        lines.append(f"baseline: {gain}")
    return lines


def log_files(runs: list[Run], parts: list[Path]) -> dict[str, bytes]:
    """Both logs of each run, named by seed, since logs of several folders may share a name; and
    those of earlier starts.
    """
    paths = {f"train_seed{run.seed}": run.path for run in runs}
    paths |= {f"part{number}": path for number, path in enumerate(parts, 1)}
    files = {}
    for name, path in paths.items():
        for suffix in (".txt", ".jsonl"):
            files[name + suffix] = read_bytes(path.with_suffix(suffix))
    return files


def own_tokenizer(run: Run, given: Path | None) -> Path | None:
    """The file of a tokenizer that is not the contest's, if it is there.

    It belongs to what a score needs, and so into the folder.
    """
    sha256 = evidence.tokenizer_sum(run.logs.events, run.artifact)
    path = given or Path(run.settings["tokenizer_path"])
    return path if sha256 and not variant_of(sha256) and path.is_file() else None


def main(arguments: list[str] | None = None) -> int:
    """Packages as the command line asks; returns the exit status."""

    def command() -> int:
        print(*package(parse(arguments)), sep="\n")
        return 0

    return run_command("package.py", command)


if __name__ == "__main__":
    sys.exit(main())

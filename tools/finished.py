"""Finished runs as their logs tell them: read, and refused if they break a limit or disagree.

A run's text log, its records and its artifact must agree, and runs that are compared must have one
script and the same settings, machine and text. tools/package.py checks this for a submission's
runs. Runs in tables and plots may differ in more, and are only checked by tools/logs.py.
"""

import argparse
import dataclasses
import hashlib
import itertools
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.package", file=sys.stderr)
    sys.exit(2)

from tools.command import UserError, need
from tools.contradictions import (
    CAP_BYTES,
    LIMIT_SECONDS,
    RunLogs,
    inner_contradictions,
    logged_hash,
    other_artifact,
    other_header,
    read_header,
    read_logs,
    untold_parts,
)
from tools.logs import (
    SEPARATOR,
    Kind,
    last_run,
    not_a_log,
    rank_count,
    refuse_other_settings,
    refuse_repeats,
    runs_in,
    split_text,
)
from tools.pack_script import FIRST

# The last messages of a finished run: seconds; val_loss, val_bpb. EVAL_NLL_PATH has one between.
FINAL = re.compile(
    r"^evaluation took ([\d.]+)s of .*\n(?:nats of .*\n)?\S+_exact val_loss:(\S+) val_bpb:(\S+)$",
    re.MULTILINE,
)
FOREIGN_FINAL = re.compile(r"_exact val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+)[ \t]*$", re.MULTILINE)


class Score(NamedTuple):
    """A score of the validation text: nats per token, bits per byte."""

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
    settings: dict
    seed: int
    score: Score
    evaluation_seconds: float


@dataclass(frozen=True)
class Run:
    """What a finished run's two logs say.

    Seconds are of the clocks, limits what the settings allow them, which may be more or less than
    the contest does. Scores before the final one are of plain windows, with frozen weights.
    """

    path: Path
    logs: RunLogs
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
    artifact: Path | None = None  # not found, or not looked for


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
        settings = events["settings"]["settings"]
        seed = int(settings["seed"])
        if "final" in events:
            score = Score(*(float(events["final"][name]) for name in Score._fields))
    except (ValueError, KeyError, TypeError, OverflowError):
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
    return Finished(text, events, settings, seed, score, float(seconds))


def check_score(path: Path, score: Score) -> None:
    """Refuses a score that is no positive number."""
    usable = all(math.isfinite(value) and value > 0 for value in score)
    need(
        usable,
        f"{path} has no usable final score: val_loss {score.val_loss}, val_bpb {score.val_bpb}",
    )


def read_run(path: Path, script_path: Path, script: str, given: argparse.Namespace) -> Run:
    """A run that may be packaged: finished, of this script, within the contest's limits, and of one
    mind with itself. given has artifacts and parts, which lie elsewhere. Raises UserError with the
    first reason against it.
    """
    finished = read_final(path)
    need(
        not finished.settings.get("eval_only"),
        f"{path} is of an EVAL_ONLY run: give the log of the run that trained",
    )
    try:
        run = run_of(path, finished)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{path.with_suffix('.jsonl')} is not a finished run's log: {error!r}"
        ) from None
    artifact = find_artifact(path, run.settings, given.artifacts)
    run = dataclasses.replace(run, artifact=artifact)
    check_code(run, finished.text, script_path, script)
    check_limits(run)
    check_contradictions(run)
    # Only now, since an earlier start's figures are its own.
    starts = [start for part in given.parts for start in runs_in(part.with_suffix(".jsonl"))]
    logs = run.logs._replace(earlier=[*starts, *run.logs.earlier])
    return dataclasses.replace(run, logs=logs)


def run_of(path: Path, finished: Finished) -> Run:
    """What the records say of a run.

    Raises KeyError, TypeError or ValueError if they do not say all of it.
    """
    settings, events = finished.settings, finished.events
    trained = events["trained"]
    figures = {name: int(trained[name]) for name in ("steps", "bytes_total", "bytes_code")}
    machine = events["settings"]["machine"]
    hardware = str(machine["hardware"])  # "8 × NVIDIA H100 80GB HBM3", say
    names = {"step_ms": "step_avg_ms", "before_bpb": "val_bpb"}
    names |= {"train_seconds": "train_clock_seconds"}
    figures |= {ours: float(trained[name]) for ours, name in names.items()}
    for name, value in figures.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}")
    limits = [float(settings[name]) for name in ("max_wallclock_seconds", "eval_max_seconds")]
    after = float(events["after_quantization"]["val_bpb"])
    return Run(
        path=path,
        logs=read_logs(path),
        settings=settings,
        machine={"hardware": hardware, "torch": machine["torch"], "cuda": machine["cuda"]},
        ranks=rank_count(machine),
        seed=finished.seed,
        **figures,
        after_bpb=after,
        final=finished.score,
        train_limit=limits[0] or math.inf,  # 0: no limit
        evaluation_seconds=finished.evaluation_seconds,
        evaluation_limit=limits[1],
    )


def find_artifact(path: Path, settings: dict, given: list[Path]) -> Path | None:
    """The artifact of a run: of those that were given, or beside its log, or where it was written.
    None if there is none.
    """
    name = f"{settings['run_id']}.int6.lzma"
    places = [file for file in given if file.name in (name, path.with_suffix(".int6.lzma").name)]
    places += given if len(given) == 1 else []
    written = settings["artifact"] or Path(settings["log_dir"], name)
    places += [path.with_name(name), Path(written)]
    found = [place for place in places if place.is_file()]
    return found[0] if found else None


def check_contradictions(run: Run) -> None:
    """Refuses a run whose logs, artifact and figures cannot all be true.

    Its limits, and what earlier starts account for, are looked at elsewhere.
    """
    try:
        found = inner_contradictions(run.logs) + untold_parts(run.logs)
        if run.artifact is not None:
            found += other_artifact(run.logs, run.artifact)
            found += other_header(run.logs, run.artifact)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{run.path.with_suffix('.jsonl')} is not a finished run's log: {error!r}"
        ) from None
    need(not found, f"{run.path}: {found[0] if found else ''}")


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
            if (ran or "").startswith(FIRST) and number == 1:
                lines_differ += "; it was packed by tools.pack_script: --script names that file"
            raise UserError(f"{run.path} holds another script than {script_path}: {lines_differ}")
    size = len(code.encode())
    need(
        size == run.bytes_code,
        f"{run.path} counts {run.bytes_code} bytes of code, but its script has {size}",
    )
    named = run.logs.events["settings"].get("script_sha256")
    held = hashlib.sha256(code.encode()).hexdigest()
    need(named in (None, held), f"{run.path} names its script by another SHA-256 than it has")


def check_limits(run: Run) -> None:
    """Refuses what the contest would: too many bytes, or too much time."""
    over = f"code and artifact take {run.bytes_total:,} bytes, over the cap of {CAP_BYTES:,}"
    need(run.bytes_total <= CAP_BYTES, f"{run.path}: {over}")
    # The run's own limit may be lower than the contest's, and was then not kept either.
    for phase, seconds, limit, name in (
        ("training", run.train_seconds, run.train_limit, "MAX_WALLCLOCK_SECONDS"),
        ("evaluation", run.evaluation_seconds, run.evaluation_limit, "EVAL_MAX_SECONDS"),
    ):
        took = f"{run.path}: {phase} took {seconds:.1f} s"
        need(seconds <= limit, f"{took}, over {name}={limit:g}")
        need(seconds <= LIMIT_SECONDS, f"{took}, over the contest's {LIMIT_SECONDS:g} s")


def check_agreement(runs: list[Run]) -> None:
    """Refuses runs that are not repetitions of one experiment with other seeds.

    Settings, machine and validation text must be the same, and no seed may count twice: the
    standard deviation would be too small.
    """
    first = runs[0]
    # Data are compared below, as far as these logs tell them.
    kinds = [Kind(run.path, run.settings, {}, logged_hash(run.logs)) for run in runs]
    refuse_repeats(kinds)
    for run, kind in zip(runs[1:], kinds[1:], strict=True):
        refuse_other_settings(kind, kinds[0])
        for name, value in first.machine.items():  # submission.json has one field for each
            ours = run.machine[name]
            need(ours == value, f"{run.path} ran with {name} {ours}, but {first.path} with {value}")
        check_same_text(first.path, first.final, run.path, run.final)
        check_same_data(first, run)
    refuse_same_scores([(run.path, run.final) for run in runs])


def refuse_same_scores(scores: list[tuple[Path, Score]]) -> None:
    """Refuses two logs with one score, to the last digit: a copy, whatever seed it names."""
    seen: dict[Score, Path] = {}
    for path, score in scores:
        other = seen.setdefault(score, path)
        told = f"{path} has the score of {other}, to the last digit: one run is not two seeds"
        need(other == path, told)


def refuse_copies(paths: list[Path]) -> None:
    """Refuses a log that is another's copy: the spread of two such is none.

    Other scripts' logs tell no seed, and may have too few digits to tell runs by their scores.
    """
    seen: dict[bytes, Path] = {}
    for path in paths:
        other = seen.setdefault(read_bytes(path), path)
        need(other == path, f"{path} is a copy of {other}")


def check_same_data(first: Run, run: Run) -> None:
    """Refuses runs that counted other texts or trained with other tokenizers."""
    for event in ("validation_data", "training_data"):
        ours, theirs = (said_of_data(one.logs.events.get(event, {})) for one in (run, first))
        need(ours == theirs, f"{run.path} has other {event.replace('_', ' ')} than {first.path}")
    if run.artifact is None or first.artifact is None:
        return
    ours, theirs = (read_header(one.artifact).get("tokenizer_sha256") for one in (run, first))
    need(ours == theirs, f"{run.artifact} has another tokenizer than {first.artifact}")


def said_of_data(record: dict) -> dict:
    """What a record says of the data, without when it did."""
    return {name: value for name, value in record.items() if name != "seconds"}


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


def read_baseline(path: Path) -> tuple[Score, int | None, dict | None]:
    """The final score, the seed and the settings of a run to compare with. Other scripts' logs have
    no .jsonl: then the text's last exact score counts, and the others are not known.
    """
    if path.with_suffix(".jsonl").exists():
        finished = read_final(path)
        return finished.score, finished.seed, finished.settings
    found = FOREIGN_FINAL.findall(read_text(path))
    need(found, f"{path} has no final score")
    score = Score(*map(float, found[-1]))
    check_score(path, score)
    return score, None, None

"""Reads a run's logs: LOG_DIR/RUN_ID.txt for people, RUN_ID.jsonl for programs.

The text log begins with the script that ran; after a line of 100 = the messages follow. The other
log has a record on each line, a JSON object whose "event" says what happened. Runs append to both:
a file may contain several runs, and the last of them counts.

In both, a start that only evaluates a trained artifact again belongs to the start that trained.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.runs", file=sys.stderr)
    sys.exit(2)

from tools.command import UserError, need

SEPARATOR = "\n" + "=" * 100 + "\n"  # between the script and the messages of a text log
FIRST_LINE = '\n"""Parameter Golf'  # how every version of the script begins, behind other text
# What one run may choose differently from the next: its seed, and where its files lie.
OUTPUTS = {"run_id", "log_dir", "artifact", "eval_nll_path", "checkpoint_every", "resume"}
OUTPUTS |= {"overwrite"}  # whether these names may be used again
MAY_DIFFER = {"seed", "data_path", "tokenizer_path"} | OUTPUTS
CLOCK = {"max_wallclock_seconds", "export_reserve_seconds"}
RECORD = '{"event": "'  # how a line of the .jsonl begins
AGAIN = re.compile(r"^.* is trained and has no score: evaluation starts over$", re.MULTILINE)


def read_records(path: Path) -> list[dict]:
    """Every record of every run in the file. Raises UserError if it is not a run's log."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise not_a_log(path) from None
    records = parse_records(text, path)
    if text and not records:
        raise not_a_log(path)
    return records


def parse_records(text: str | bytes, path: Path) -> list[dict]:
    """The records of a log, which lies at path. Raises UserError for other files.

    A line that begins as a record does and has no end is left out: a run that was ended by a full
    disk, or with its machine, leaves one, and goes on behind it.
    """
    records = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            if not line.startswith(RECORD if isinstance(line, str) else RECORD.encode()):
                raise not_a_log(path) from None
        except RecursionError:
            raise not_a_log(path) from None
    if not all(map(is_record, records)):
        raise not_a_log(path)
    return records


def is_record(value) -> bool:
    """Whether a value is what a run writes into its log, as far as all readers take it for granted.

    It names its event, and that of a start has settings and a machine by name, if it has any.
    """
    if not (isinstance(value, dict) and isinstance(value.get("event"), str)):
        return False
    parts = ("settings", "machine") if value["event"] == "settings" else ()
    return all(isinstance(value.get(part, {}), dict) for part in parts)


def runs_in(path: Path) -> list[list[dict]]:
    """The records of each run in the file, in order: a run begins with its settings.

    A run that was stopped and taken up again has a part for each start that trained. The records
    of one that only evaluates again follow those of the start before it, and so do their seconds.
    """
    starts = []
    for record in read_records(path):
        if record["event"] == "settings" or not starts:
            starts.append([])
        starts[-1].append(record)
    runs = []
    for start in starts:
        again = any(record["event"] == "evaluation_again" for record in start)
        if again and runs:
            runs[-1] += later(start, number_in(runs[-1][-1], "seconds") or 0.0)
        else:
            runs.append(start)
    return runs


def later(records: list[dict], seconds: float) -> list[dict]:
    """The records as if their start had begun so many seconds later."""
    moved = []
    for record in records:
        told = number_in(record, "seconds")
        moved.append(record if told is None else record | {"seconds": told + seconds})
    return moved


def attempts_at_evaluation(records: list[dict]) -> int:
    """How often the evaluation of a run was begun; 1 where its script did not count."""
    return max(1, sum(record["event"] == "evaluation" for record in records))


def logs_of_training(paths: list[Path]) -> list[Path]:
    """The paths without the logs of EVAL_ONLY, RUN_ID.eval.jsonl, which logs/*.jsonl finds as well.

    They say nothing of training. A line tells which are left out; if there are no others, none is.
    """
    trained = [path for path in paths if not path.name.endswith(".eval.jsonl")]
    scored = [str(path) for path in paths if path not in trained]
    if trained and scored:
        print(f"left out, as they only score again: {', '.join(scored)}", file=sys.stderr)
    return trained or paths


def last_run(path: Path) -> dict[str, dict]:
    """The last record of each event, of the last run in the file.

    Raises UserError if the file is not a run's log.
    """
    runs = runs_in(path)
    return {record["event"]: record for record in runs[-1]} if runs else {}


def finished_run(path: Path) -> dict[str, dict]:
    """last_run() of a finished run. Raises UserError if it has not come to its final score."""
    events = last_run(path)
    for event in ("settings", "trained", "after_quantization", "final"):
        if event not in events:
            raise UserError(f"{path} is of a run that has not finished: no {event!r} yet")
    return events


def number_in(record: dict, name: str) -> float | None:
    """A finite number of a record; None where it has none."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None  # NaN is not either


def ended_by_steps(events: dict[str, dict]) -> bool:
    """Whether ITERATIONS ended a run's training, and not its clock, MAX_WALLCLOCK_SECONDS.

    It then trained for less than that clock says. A log that does not tell was not.
    """
    settings = events.get("settings", {}).get("settings", {})
    steps = number_in(events.get("trained", {}), "steps")
    most = number_in(settings, "iterations")
    return None not in (steps, most) and steps >= most


def is_resumed(start: list[dict]) -> bool:
    """Whether a start took up a checkpoint."""
    return any(record["event"] == "resumed" for record in start)


def starts_of(runs: list[list[dict]]) -> list[list[dict]]:
    """The starts, of all in a file, that make up the last run: one if it was not resumed.

    They go back to the last one that took up no checkpoint, if the file holds it.
    """
    starts = runs[-1:]
    for start in reversed(runs[:-1]):
        if not is_resumed(starts[0]):
            break
        starts.insert(0, start)
    return starts


def seconds_to_score(records: list[dict]) -> float | None:
    """What passed on the wall between the last beginning of the evaluation and its end.

    Older scripts have no record of the beginning: there, it is the record before the score; nor of
    the end: there, it is the score, though EVAL_NLL_PATH or tables may be written between. This is
    what the evaluation took, and a little more. None where it is not told.
    """
    events = [record["event"] for record in records]
    place = events.index("final") if "final" in events else 0
    begun = [i for i, event in enumerate(events[:place]) if event == "evaluation"]
    begun = begun[-1] if begun else place - 1
    if begun < 0:
        return None
    told = "evaluated" in events[begun:place]
    ended = events.index("evaluated", begun) if told else place
    walls = [number_in(records[i], "seconds") for i in (begun, ended)]
    return None if None in walls else walls[1] - walls[0]


class Kind(NamedTuple):
    """What runs that are set side by side must have in common."""

    log: Path
    settings: dict
    # SHA-256 of validation shards and tokenizer, sorted; a digest of the training shards' names
    # and lengths, where the log tells it: not that of EVAL_ONLY.
    data: dict[str, list[str]]
    artifact: str = ""  # its SHA-256, where the log tells it


def kind_of(log: Path, events: dict[str, dict]) -> Kind:
    """What a log says of it. Raises KeyError, TypeError or AttributeError where it says none."""
    sums = {name: sorted(events["hashes"][name].values()) for name in ("validation", "tokenizer")}
    training = events.get("training_data", {}).get("digest")
    sums |= {"training text": [training]} if training else {}
    artifact = str(events["final"].get("artifact_sha256", "")) if "final" in events else ""
    return Kind(log, events["settings"]["settings"], sums, artifact)


def refuse_other_settings(one: Kind, first: Kind, may_differ: set[str] = MAY_DIFFER) -> None:
    """Raises UserError, by name, for the first setting in which two runs differ and may not."""
    for name in dict.fromkeys([*first.settings, *one.settings]):
        found, expected = one.settings.get(name), first.settings.get(name)
        differ = f"{one.log} has {name.upper()}={found}, but {first.log} has {expected}"
        need(found == expected or name in may_differ, differ)


def refuse_other_data(runs: list[Kind]) -> None:
    """Raises UserError for runs that scored or read other text, or with another tokenizer."""
    for name in ("validation", "tokenizer", "training text"):
        told = [run for run in runs if name in run.data]
        for run in told[1:]:
            same = run.data[name] == told[0].data[name]
            need(same, f"{run.log} has another {name} than {told[0].log}, by its digest")


def refuse_repeats(runs: list[Kind]) -> None:
    """Raises UserError for two runs of one kind that have the same clock and seed, or artifact.

    One of them may be the other's copy: the spread of the two is not that of two seeds.
    """
    seen: dict[tuple, Path] = {}
    artifacts: dict[str, Path] = {}
    for run in runs:
        other = artifacts.setdefault(run.artifact, run.log) if run.artifact else run.log
        twice = f"{run.log} has the artifact of {other}, by its SHA-256: one run is not two seeds"
        need(other == run.log, twice)
        clock, seed = (run.settings.get(name) for name in ("max_wallclock_seconds", "seed"))
        told = f"{run.log} has SEED={seed} at {float(clock):g} s, as {seen.get((clock, seed))} has"
        need((clock, seed) not in seen, told)
        seen[clock, seed] = run.log


def refuse_other_runs(runs: list[Kind], afresh: frozenset[str] = frozenset()) -> None:
    """Raises UserError for runs of one kind that differ in more than clock and seed, or in neither.

    afresh: settings that EVAL_ONLY does not take over from the run that trained.
    """
    first = runs[0]
    for run in runs[1:]:
        again = run.settings.get("eval_only") or first.settings.get("eval_only")
        refuse_other_settings(run, first, MAY_DIFFER | CLOCK | (afresh if again else set()))
    refuse_repeats(runs)


def not_a_log(path: Path) -> UserError:
    """The mistake of giving another file."""
    return UserError(f"{path} is not a run's .jsonl log")


def split_text(path: Path, text: str) -> tuple[str, str]:
    """The script and the messages of the last run in a text log.

    Earlier runs may stand before the script. Where it was the script of a start that only
    evaluated again, messages are those of the start before it, too.
    """
    script, separator, messages = text.rpartition(SEPARATOR)
    if not separator:
        changed = (
            f"{path}: its lines end by \\r\\n, as Windows leaves them; a run's end by \\n alone"
        )
        need("\r\n" not in text, changed)
        raise UserError(f"{path} is not a run's text log: no line of 100 = ends the script in it")
    before, found, _ = script.rpartition(FIRST_LINE)
    if found and AGAIN.search(messages):
        messages = split_text(path, before)[1] + "\n" + messages
    return script, messages


class TextLog(NamedTuple):
    """What the last run in a text log claims; None, {} or () where it does not say."""

    source: str  # of the script that wrote it, perhaps behind earlier runs
    settings: dict[str, str]  # of the run and its machine, as they are printed
    total_bytes: int | None  # of code and artifact
    label: str  # of the final score: its mode of evaluation
    val_loss: str  # as printed
    val_bpb: str
    training_seconds: float | None
    evaluation_seconds: float
    evaluation_limit: float
    epochs_given_up: int  # of test-time training
    resumed: tuple[tuple[int, float], ...] = ()  # step and clock of each checkpoint taken up
    messages: str = ""  # all that is printed below the script

    def says_as(self, other: "TextLog") -> bool:
        """Whether two logs have the same final line, to the last digit."""
        mine = (self.label, self.val_loss, self.val_bpb)
        return mine == (other.label, other.val_loss, other.val_bpb)


FINAL = r"^final_int6_lzma_(\w+)_exact val_loss:(\d+\.\d{8}) val_bpb:(\d+\.\d{8})$"
TOOK = (
    r"^evaluation took ([\d.]+)s of ([\d.e+]+)s; "
    r"(\d+) (?:epochs given up|documents learnt in part)$"
)
RESUMED = r"^resumed .*: step (\d+), ([\d.]+)s$"


def read_text_log(path: Path) -> TextLog:
    """The figures of the last run in a text log.

    Raises UserError for a file that is no log or whose last run did not finish.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the log {path}: {error}") from None
    try:
        source, run = split_text(path, text)
    except UserError:
        raise UserError(f"{path} is not the log of a finished run") from None

    def last(pattern: str) -> tuple[str, ...] | str | None:
        """What stands in a pattern's last match: a string, or one for each group."""
        found = re.findall(pattern, run, re.MULTILINE)
        return found[-1] if found else None

    final = last(FINAL)
    took = last(TOOK)
    if not (final and took):
        raise UserError(f"{path} is not the log of a finished run")
    label, val_loss, val_bpb = final
    seconds, limit, given_up = took
    total = last(r"^Total submission size int6\+lzma: (\d+) bytes$")
    clock = last(r"training clock ([\d.]+)s")
    settings = read_settings_line(last(r"^python=.*$") or "")
    resumed = [(int(step), float(at)) for step, at in re.findall(RESUMED, run, re.MULTILINE)]
    return TextLog(
        source=source,
        settings=settings,
        total_bytes=int(total) if total else None,
        label=label,
        val_loss=val_loss,
        val_bpb=val_bpb,
        training_seconds=float(clock) if clock else None,
        evaluation_seconds=float(seconds),
        evaluation_limit=float(limit),
        epochs_given_up=int(given_up),
        resumed=tuple(resumed),
        messages=run,
    )


def read_settings_line(line: str) -> dict[str, str]:
    """The names and values of the line in which a text log has its machine and settings."""
    items = [item for item in line.split("  ") if "=" in item]
    return dict(item.split("=", 1) for item in items)


def rank_count(machine: dict) -> int:
    """How many ranks a run had, of its record's machine, whose hardware is "2 × NVIDIA H200", say.

    Raises KeyError, TypeError or ValueError for what is no such record.
    """
    return int(str(machine["hardware"]).split(" × ")[0])


class Spread(NamedTuple):
    """Mean and sample standard deviation; None where there are too few values."""

    mean: float | None
    std: float | None


def spread(values: list[float]) -> Spread:
    """Mean and deviation of one figure in several runs, which differ in their seeds."""
    mean = statistics.fmean(values) if values else None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean, std)

"""Contradictions within a run's own logs: arithmetic that an edited figure breaks.

A run leaves two logs, RUN_ID.txt and RUN_ID.jsonl. Both are the contestant's claims, and this does
not find out who edits all of their lines alike. But the clock, the steps on it, the wall clock in
every record, the two prints of each figure and the artifact's own size and hash belong together,
and the contest's limits are not settings. tools/audit and tools/package.py both use this.
"""

import hashlib
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started by its path
    # Whoever takes it for a command is told which one it serves.
    print("error: no command by itself; start python -m tools.audit", file=sys.stderr)
    sys.exit(2)

from tools.command import UserError, file_sha256, need
from tools.logs import (
    TextLog,
    is_resumed,
    number_in,
    read_text_log,
    runs_in,
    seconds_to_score,
    starts_of,
)

# The contest's figures, whatever limits a run's settings gave it.
CAP_BYTES = 16_000_000  # of code and artifact
LIMIT_SECONDS = 600.0  # of training, and again of evaluation

# What honest clocks may differ by.
ROUNDING_SECONDS = 0.06  # figures are printed to a tenth of a second
SLOW_PART = 1.01  # of the clock may have passed on the wall between two steps ...
SLOW_SECONDS = 2.0  # ... and this much more: a checkpoint's copy, a machine that was busy
HURRIED_PART = 0.5  # of the time limit: who used less had no reason to give up an epoch
EVALUATION_SECONDS = 1.0  # by which the wall clock around an evaluation may be longer or shorter

PRINTED_CHARACTERS = 200  # of a setting, in the script's line of all
SHA256 = re.compile(r"\b[0-9a-f]{64}\b")
MAGIC = b"SSMGOLF"  # of every artifact; a digit for the layout follows
DIGEST_BYTES = 32  # of SHA-256, with which an artifact ends

# What the text log says of single steps, validations and the artifact in plain windows.
TRAIN_LINE = re.compile(
    r"^step:(\d+)/\d+ train_loss:(\S+) train_time:(\d+)ms step_avg:([\d.]+)ms", re.MULTILINE
)
VALIDATION_LINE = re.compile(r"^step:(\d+)/\d+ val_loss:(\S+) val_bpb:(\S+)", re.MULTILINE)
BEFORE_LINE = re.compile(r" val_loss:(\S+) val_bpb:(\S+) before quantization$", re.MULTILINE)
PLAIN_LINE = re.compile(r"_plain_exact val_loss:(\S+) val_bpb:(\S+)$", re.MULTILINE)
# What one start records at most once.
ONCE = (
    "validation_data",
    "hashes",
    "training_data",
    "ready",
    "trained",
    "after_quantization",
    "final",
)
VALIDATION_DATA_LINE = re.compile(
    r"^validation text: ([\d,]+) tokens in ([\d,]+) shards, ([\d,]+) documents; "
    r"scored are ([\d,]+) tokens, ([\d,]+) bytes",
    re.MULTILINE,
)
VALIDATION_COUNTS = ("tokens", "shards", "documents", "scored_tokens", "bytes")
TRAINING_DATA_LINE = re.compile(r"^training data: ([\d,]+) tokens in ([\d,]+) shards", re.MULTILINE)
TRAINING_COUNTS = ("tokens", "shards")
EVALUATION_LINE = re.compile(r"^evaluation: attempt (\d+)$", re.MULTILINE)
FILES = ("tokenizer", "validation", "training")
FILES_LINE = re.compile(
    rf"^SHA-256, ({'|'.join(FILES)})(?: \(by manifest\.json\))?: (.*)$", re.MULTILINE
)
OVERLAP_LINE = re.compile(
    r"^validation documents that are training documents too: (.*?)(?: \(by manifest\.json\))?$",
    re.MULTILINE,
)
STEPS_LINE = re.compile(r"^Code size: .*; (\d+) steps of ([\d.]+)ms", re.MULTILINE)


class RunLogs(NamedTuple):
    """The two logs of a finished run."""

    text: TextLog
    events: dict[str, dict]  # the last record of each event; {} without a .jsonl
    records: list[dict]  # of the last start, in order
    earlier: list[list[dict]]  # of each start before, in the same file


def read_logs(path: Path) -> RunLogs:
    """Reads RUN_ID.txt, and RUN_ID.jsonl where it stands beside it. Raises UserError."""
    text = read_text_log(path)
    records = path.with_suffix(".jsonl")
    runs = runs_in(records) if records.is_file() else []
    need(records.is_file() == bool(runs), f"{records} has no records")
    *earlier, last = runs or [[]]
    return RunLogs(text, {record["event"]: record for record in last}, last, earlier)


def contradictions(logs: RunLogs, artifact: Path | None = None) -> list[str]:
    """All that cannot be true at once, each in a sentence; an empty list for honest logs."""
    found = [
        *inner_contradictions(logs),
        *broken_limits(logs),
        *lost_parts(logs),
        *untold_parts(logs),
    ]
    if artifact is not None:
        found += other_artifact(logs, artifact)
    return found


def inner_contradictions(logs: RunLogs) -> list[str]:
    """Those between the figures of one start's two logs."""
    found = [*disagreements(logs), *other_lines(logs), *impossible_clocks(logs)]
    found += [*impossible_evaluations(logs), *miscounted_texts(logs)]
    found += [*other_sums(logs), *other_scored(logs), *odd_records(logs)]
    return found + learnt_shards(logs) + miscounted_shards(logs)


def disagreements(logs: RunLogs) -> list[str]:
    """What is printed otherwise in .txt than in .jsonl.

    The final score, the bytes, the machine and every setting that both have, and the clock.
    """
    if not logs.events:
        return []
    text, events = logs.text, logs.events
    final = events.get("final", {})
    trained = events.get("trained", {})
    started = events.get("settings", {})
    pairs = []
    for name, printed in (("val_loss", text.val_loss), ("val_bpb", text.val_bpb)):
        score = number_in(final, name)
        pairs.append((name, printed, "nothing" if score is None else f"{score:.8f}"))
    if text.total_bytes is not None:
        pairs.append(("bytes_total", str(text.total_bytes), str(trained.get("bytes_total"))))
    recorded = {**started.get("machine", {}), **started.get("settings", {})}
    for name, printed in text.settings.items():
        if name in recorded:
            pairs.append((name.upper(), printed, str(recorded[name])))
    found = [
        f".txt has {name} {printed[:60]}, .jsonl {value[:60]}"
        for name, printed, value in pairs
        if printed not in (value, repr(value), as_printed(value))
    ]
    clock = number_in(trained, "train_clock_seconds")
    if None not in (clock, text.training_seconds):
        apart = abs(clock - text.training_seconds)
        if apart > ROUNDING_SECONDS:
            found.append(f".txt has a clock of {text.training_seconds} s, .jsonl of {clock:.3f} s")
    return found


def as_printed(value: str) -> str:
    """A setting as the script's one line has it: its first characters, each space one space.

    What does not print is escaped, and so is a path's byte that is no text, a surrogate in Python.
    """
    text = "".join(f"\\x{ord(x) & 255:x}" if "\udc80" <= x <= "\udcff" else x for x in value)
    text = text if text.isprintable() else repr(value)
    text = text if len(text) <= PRINTED_CHARACTERS else text[:PRINTED_CHARACTERS] + "..."
    return " ".join(text.split())


def lines_of(logs: RunLogs) -> dict[str, tuple[list[tuple[str, ...]], list[tuple[str, ...]]]]:
    """Lines of .txt beside the records of .jsonl, both as they are printed, by what they tell.

    Rounding makes them equal or not: nothing is allowed for.
    """
    train = [
        (
            f"{r['step']}",
            f"{r['train_loss']:.4f}",
            f"{r['train_ms']:.0f}",
            f"{r['step_avg_ms']:.2f}",
        )
        for r in steps_of(logs.records)
    ]
    validation = [
        (f"{r['step']}", f"{r['val_loss']:.4f}", f"{r['val_bpb']:.4f}")
        for r in logs.records
        if r["event"] == "validation"
    ]
    before = [
        (f"{r['val_loss']:.4f}", f"{r['val_bpb']:.4f}")
        for r in logs.records
        if r["event"] == "trained"
    ]
    plain = [
        (f"{r['val_loss']:.8f}", f"{r['val_bpb']:.8f}")
        for r in logs.records
        if r["event"] == "after_quantization"
    ]
    steps = [
        (f"{r['steps']}", f"{r['step_avg_ms']:.2f}")
        for r in logs.records
        if r["event"] == "trained"
    ]
    messages = logs.text.messages
    attempts = [(found,) for found in EVALUATION_LINE.findall(messages)]
    evaluations = [(f"{r['attempt']}",) for r in logs.records if r["event"] == "evaluation"]
    validation_data = records_as_printed(logs, "validation_data", VALIDATION_COUNTS)
    training_data = records_as_printed(logs, "training_data", TRAINING_COUNTS)
    hashes = [record for record in logs.records if record["event"] == "hashes"]
    files = [(kind, *SHA256.findall(rest)) for kind, rest in FILES_LINE.findall(messages)]
    hashed = [line for record in hashes for line in file_lines(record)]
    overlap = [(text,) for text in OVERLAP_LINE.findall(messages)]
    counted = [(overlap_text(record),) for record in hashes]
    told = {"SHA-256 of the files": (files, hashed), "overlap": (overlap, counted)}
    told["the score before quantization"] = BEFORE_LINE.findall(messages), before
    return told | {
        "validation text": (VALIDATION_DATA_LINE.findall(messages), validation_data),
        "training data": (TRAINING_DATA_LINE.findall(messages), training_data),
        "a step of training": (TRAIN_LINE.findall(messages), train),
        "a validation": (VALIDATION_LINE.findall(messages), validation),
        # The final score is of plain windows too, with EVAL_MODE=plain.
        "plain windows": (PLAIN_LINE.findall(messages)[: len(plain) or None], plain),
        "steps": (STEPS_LINE.findall(messages), steps),
        "an evaluation": (attempts, evaluations),
    }


def records_as_printed(logs: RunLogs, event: str, names: tuple) -> list[tuple[str, ...]]:
    """The counts of a record, with commas, as a line of text has them.

    An event may come once for each start; of a start that is looked at, there is one, and one more
    for each that only evaluated again.
    """
    records = [record for record in logs.records if record["event"] == event]
    return [tuple(f"{record[name]:,}" for name in names) for record in records]


def files_of(record: dict, kind: str) -> dict[str, str]:
    """SHA-256 by name of one kind of FILES in a record "hashes"; "" of a file that has none.

    Training shards are not hashed where no manifest.json was, and a log may hold anything.
    """
    found = record.get(kind)
    files = found if isinstance(found, dict) else {}
    return {str(name): str(sha256) for name, sha256 in files.items()}


def file_lines(record: dict) -> list[tuple[str, ...]]:
    """A line for each kind of FILES that a record "hashes" has: the kind, and SHA-256 in order."""
    sums = {kind: files_of(record, kind).values() for kind in FILES if kind in record}
    return [(kind, *filter(None, of_kind)) for kind, of_kind in sums.items()]


def overlap_text(record: dict) -> str:
    """How many validation documents are training documents too, as a line of text has it."""
    number = record.get("overlap_documents")
    return f"{number:,}" if isinstance(number, int) else "not known"


def miscounted_shards(logs: RunLogs) -> list[str]:
    """Shards that a run counted, if it names, hashed or not, another number of them."""
    found = []
    for kind, event in (("validation", "validation_data"), ("training", "training_data")):
        named = files_of(logs.events.get("hashes", {}), kind)
        counted = number_in(logs.events.get(event, {}), "shards")
        if named and counted not in (None, len(named)):
            found.append(f"the log counts {counted:.0f} {kind} shards, and names {len(named)}")
    return found


def learnt_shards(logs: RunLogs) -> list[str]:
    """Validation shards that a run was trained on, by the log's own SHA-256."""
    record = logs.events.get("hashes", {})
    trained = set(files_of(record, "training").values())
    return [
        f"{name} is a training shard too, by its SHA-256"
        for name, sha256 in files_of(record, "validation").items()
        if sha256 in trained
    ]


def other_files(logs: RunLogs, kind: str, files: dict[str, str]) -> list[str]:
    """Whether the log's files of a kind are others than these, SHA-256 by name.

    Names may differ, but not what the files hold nor, of shards, their order.
    """
    logged = files_of(logs.events.get("hashes", {}), kind)
    if not logged or list(logged.values()) == list(files.values()):
        return []
    told = ", ".join(f"{name} {sha256[:16]}" for name, sha256 in logged.items())
    here = ", ".join(f"{name} {sha256[:16]}" for name, sha256 in files.items())
    return [f"the log's {kind} is of other files: {told}; here are {here} (SHA-256)"]


def other_lines(logs: RunLogs) -> list[str]:
    """What is printed otherwise, line for line, in .txt than in .jsonl."""
    found = []
    for name, (printed, recorded) in lines_of(logs).items():
        if not printed or not recorded:
            continue
        if len(printed) != len(recorded):
            found.append(f".txt has {len(printed)} lines of {name}, .jsonl {len(recorded)}")
        for line, record in zip(printed, recorded, strict=False):
            if line != record:
                found.append(f".txt has {' '.join(line)} of {name}, .jsonl {' '.join(record)}")
    return found


def other_scored(logs: RunLogs) -> list[str]:
    """An artifact that was scored, but is not the one that was trained."""
    sums = [logs.events.get(event, {}).get("artifact_sha256") for event in ("trained", "final")]
    if None in sums or sums[0] == sums[1]:
        return []
    return [f"the artifact that was scored is not the one that was trained: {sums[1][:16]}..."]


def odd_records(logs: RunLogs) -> list[str]:
    """Records that one start does not write: a second score, say, or a validation out of turn.

    A validation between two lines of steps excuses the time that passed, so it must have its place.
    """
    events = [record["event"] for record in logs.records]
    # Whoever evaluates again reads the validation text again.
    most = dict.fromkeys(("validation_data", "hashes"), events.count("settings"))
    found = [
        f"one start has {events.count(event)} records of {event!r}"
        for event in ONCE
        if events.count(event) > most.get(event, 1)
    ]
    every = number_in(trained_with(logs), "val_loss_every") or math.inf
    last = number_in(logs.events.get("trained", {}), "steps")
    for record in logs.records:
        step = number_in(record, "step")
        if record["event"] == "validation" and step != last and (step or 1) % every:
            found.append(f"a validation at step {step:.0f} is not one of VAL_LOSS_EVERY")
    return found


def trained_with(logs: RunLogs) -> dict:
    """The settings of the start that trained: one that only evaluates again may log otherwise."""
    starts = [record for record in logs.records if record["event"] == "settings"]
    return starts[0].get("settings", {}) if starts else {}


def off_the_clocks(logs: RunLogs) -> float | None:
    """Seconds between "ready" and "trained" that no clock counted: validation, and packing."""
    ends = [number_in(logs.events.get(event, {}), "seconds") for event in ("ready", "trained")]
    clock = number_in(logs.events.get("trained", {}), "train_clock_seconds")
    if None in (*ends, clock):
        return None
    resumed_at = logs.text.resumed[-1][1] if logs.text.resumed else 0.0
    return ends[1] - ends[0] - (clock - resumed_at)


def unprinted(logs: RunLogs) -> list[str]:
    """What one of the logs does not tell, so that the other cannot be held against it.

    Older scripts did not print all of it, and lines can be deleted: both are told alike.
    """
    names = [name for name, both in lines_of(logs).items() if not all(both)]
    if is_resumed(logs.records) and not steps_of(logs.records):
        names.remove("a step of training")  # there was none to make any more
    told = {"size": logs.text.total_bytes, "training clock": logs.text.training_seconds}
    told["seconds off the clocks"] = off_the_clocks(logs)
    if not all("seconds" in record for record in logs.records):
        names.append("seconds of every record")
    return [*names, *(name for name, value in told.items() if value is None)]


def impossible_evaluations(logs: RunLogs) -> list[str]:
    """An evaluation whose seconds are not those that passed on the wall, by the records around it.

    Without the record of a quantized model's score before it, that cannot be told.
    """
    passed = seconds_to_score(logs.records)
    if passed is None or "after_quantization" not in logs.events:
        return []
    seconds = logs.text.evaluation_seconds
    apart = abs(passed - seconds)
    if apart <= EVALUATION_SECONDS + (SLOW_PART - 1) * passed:
        return []
    return [f"evaluation took {seconds} s while {passed:.1f} s passed"]


def miscounted_texts(logs: RunLogs) -> list[str]:
    """A score whose two figures come to other bytes per token than the validation text has."""
    counts = logs.events.get("validation_data", {})
    final = logs.events.get("final", {})
    figures = [number_in(counts, name) for name in ("bytes", "scored_tokens")]
    figures += [number_in(final, name) for name in ("val_loss", "val_bpb")]
    if not all(figures):
        return []
    text_bytes, tokens, loss, bpb = figures
    counted = text_bytes / tokens
    scored = loss / (bpb * math.log(2))
    if math.isclose(counted, scored, rel_tol=1e-5):
        return []
    return [f"the score is of {scored:.5f} bytes per token, the text has {counted:.5f}"]


def other_sums(logs: RunLogs) -> list[str]:
    """Tables that do not sum up to their score and to the text that was counted, and an evaluation
    whose own clock is not the seconds that are printed. Older logs have neither.
    """
    found = []
    counts = logs.events.get("validation_data", {})
    for event in ("after_quantization", "final"):
        record = logs.events.get(event, {})
        loss = number_in(record, "val_loss")
        for name, table in logs.events.get(f"{event}_profile", {}).items():
            if loss is None or not isinstance(table, dict):
                continue
            what = f"the {event.replace('_', ' ')} score's table {name}"
            try:
                sums = {column: math.fsum(table[column]) for column in ("targets", "bytes", "nats")}
            except (KeyError, TypeError, ValueError, OverflowError):
                found.append(f"{what} has no sums")
                continue
            if not math.isclose(sums["nats"], loss * sums["targets"], rel_tol=1e-5):
                found.append(f"{what} comes to {sums['nats']:.1f} nats, the score to another sum")
            for column, key in {"targets": "scored_tokens", "bytes": "bytes"}.items():
                if sums[column] != number_in(counts, key):
                    found.append(f"{what} is of {sums[column]:,.0f} {column}, the text has others")
    seconds = number_in(logs.events.get("final", {}), "evaluation_seconds")
    printed = logs.text.evaluation_seconds
    if seconds is not None and abs(seconds - printed) > ROUNDING_SECONDS:
        found.append(f"evaluation took {printed} s in .txt, {seconds} s in .jsonl")
    return found


def impossible_clocks(logs: RunLogs) -> list[str]:
    """Steps that do not fit the training clock, and clocks that do not fit the wall's."""
    trained = logs.events.get("trained", {})
    clock = number_in(trained, "train_clock_seconds")
    steps = number_in(trained, "steps")
    step_ms = number_in(trained, "step_avg_ms")
    found = []
    if None not in (clock, steps, step_ms):
        product = steps * step_ms / 1000
        if product > clock + ROUNDING_SECONDS:
            what = f"{steps:.0f} steps of {step_ms:.2f} ms take {product:.1f} s"
            found.append(f"{what}, but the training clock stood at {clock:.1f} s")
    found += impossible_steps(logs, clock, steps)
    found += impossible_walls(logs, clock)
    seconds, limit = logs.text.evaluation_seconds, logs.text.evaluation_limit
    if logs.text.epochs_given_up and seconds < HURRIED_PART * limit:
        what = f"{logs.text.epochs_given_up} epochs were given up for lack of time"
        found.append(f"{what}, but evaluation took {seconds} s of {limit:g} s")
    return found


def impossible_steps(logs: RunLogs, clock: float | None, steps: float | None) -> list[str]:
    """Lines of single steps that contradict the run's last figures.

    The mean time of a step is the clock by the steps, in every line; the first steps and each
    TRAIN_LOG_EVERY after them have one.
    """
    found = []
    last = None
    for record in steps_of(logs.records):
        step, ms, each = (number_in(record, n) for n in ("step", "train_ms", "step_avg_ms"))
        if None in (step, ms, each):
            continue
        if not math.isclose(step * each, ms, rel_tol=1e-3, abs_tol=1.0):
            found.append(f"step {step:.0f}: {step:.0f} × {each:.2f} ms are not {ms:.0f} ms")
        last = step, ms
    every = number_in(trained_with(logs), "train_log_every")
    if last and clock is not None and last[1] / 1000 > clock + ROUNDING_SECONDS:
        what = f"step {last[0]:.0f} ended at {last[1] / 1000:.1f} s of training"
        found.append(f"{what}, but the whole clock is {clock:.1f} s")
    if last and None not in (steps, every) and not 0 <= steps - last[0] < max(every, 5):
        found.append(f"the last step logged is {last[0]:.0f}, of {steps:.0f} that are claimed")
    return found


def impossible_walls(logs: RunLogs, clock: float | None) -> list[str]:
    """What contradicts the wall clock beside every record, which bounds what was trained meanwhile.

    Between two lines of steps, without a validation, all is on the training clock: as much has
    passed on the wall. From "ready" to "trained" no more can have been counted than has passed.
    """
    found = []
    seconds = [number_in(record, "seconds") for record in logs.records]
    known = [value for value in seconds if value is not None]
    if known != sorted(known):
        found.append("the records' wall clock runs backwards")
    # NaN, say, compares with nothing; older scripts wrote no seconds.
    if len(known) < sum("seconds" in record for record in logs.records):
        found.append("the wall clock beside a record is no number")
    resumed_at = logs.text.resumed[-1][1] if logs.text.resumed else 0.0
    passed, counted = walls_and_clocks(logs.records, resumed_at)
    if passed > SLOW_PART * counted + SLOW_SECONDS or counted > passed + SLOW_SECONDS:
        what = f"{passed:.1f} s passed while steps were logged"
        found.append(f"{what}, of which the training clock counted {counted:.1f} s")
    walls = [number_in(logs.events.get(name, {}), "seconds") for name in ("ready", "trained")]
    if None not in (clock, *walls):
        passed = walls[1] - walls[0]
        if clock - resumed_at > passed + ROUNDING_SECONDS:
            what = f"{clock - resumed_at:.1f} s of training were counted"
            found.append(f"{what} while {passed:.1f} s passed")
    return found


def walls_and_clocks(records: list[dict], resumed_at: float) -> tuple[float, float]:
    """Seconds that passed between lines of steps, and those that the training clock counted.

    Without the parts in which validation, which is off the clock, came between.
    """
    passed = counted = 0.0
    before = None
    for record in records:
        wall = number_in(record, "seconds")
        ms = number_in(record, "train_ms")
        if record["event"] == "ready":
            ms = 1000 * resumed_at
        if record["event"] == "validation":
            before = None
        if record["event"] not in ("ready", "train") or None in (ms, wall):
            continue
        if before:
            passed += wall - before[0]
            counted += (ms - before[1]) / 1000
        before = wall, ms
    return passed, counted


def broken_limits(logs: RunLogs) -> list[str]:
    """Limits that were not kept: the contest's, or the run's own where these are lower."""
    text = logs.text
    found = []
    if text.total_bytes is not None and text.total_bytes > CAP_BYTES:
        found.append(f"{text.total_bytes:,} bytes are over the cap of {CAP_BYTES:,}")
    own = text.settings.get("max_wallclock_seconds", "")
    for what, seconds, allowed in (
        ("training", text.training_seconds, limit_of(own)),
        ("evaluation", text.evaluation_seconds, limit_of(text.evaluation_limit)),
    ):
        if seconds is not None and seconds > allowed:
            found.append(f"{what} took {seconds} s of {allowed:g} s")
    return found


def limit_of(own: float | str) -> float:
    """The seconds that count: a run's own limit, and the contest's where that is less or none."""
    try:
        limit = float(own)
    except ValueError:
        return LIMIT_SECONDS
    return min(limit, LIMIT_SECONDS) if limit > 0 else LIMIT_SECONDS  # nan, too, is none


def lost_parts(logs: RunLogs) -> list[str]:
    """What a resumed run's earlier starts do not account for.

    A checkpoint's step and clock are its header's claim. A start that could have written it must
    stand in the same log, which holds for starts that were resumed themselves, too. Those of a run
    that was made anew under its name (OVERWRITE=1) say nothing of this one.
    """
    if not (logs.text.resumed or is_resumed(logs.records)):
        return []
    every = max(5.0, number_in(trained_with(logs), "train_log_every") or 0.0)
    found = []
    own = starts_of(logs.earlier)
    for index, part in enumerate(own, len(logs.earlier) - len(own)):
        first = next(iter(steps_of(part)), None)
        if first and any(record["event"] == "resumed" for record in part):
            step, clock = (number_in(first, name) or 0.0 for name in ("step", "train_ms"))
            found += unaccounted(step - 1, clock / 1000, logs.earlier[:index], every)
    if logs.text.resumed:
        found += unaccounted(*logs.text.resumed[-1], logs.earlier, every)
    return found


def untold_parts(logs: RunLogs) -> list[str]:
    """That a run was resumed, where one log does not say so, or none although it was asked for."""
    found = []
    asked = logs.text.settings.get("resume", "auto")
    if logs.records and is_resumed(logs.records) != bool(logs.text.resumed):
        found.append("one of .txt and .jsonl says that the run was resumed, the other does not")
    if asked not in ("auto", "never") and not logs.text.resumed:
        found.append(f"RESUME={asked[:60]} asks for a checkpoint that no line says was taken up")
    return found


def unaccounted(step: float, clock: float, starts: list[list[dict]], every: float) -> list[str]:
    """Why none of the starts before can have written a checkpoint of this step and clock.

    One must have come to the step (it logs each `every` steps), and have counted no more seconds
    until then.
    """
    what = f"it was resumed at step {step:.0f} and {clock:.1f} s"
    told = [steps_of(part) for part in starts]
    reached = [steps for steps in told if steps]
    if not reached:
        return [f"{what}, and the log has no start before that trained"]
    counted = []
    for steps in reached:
        furthest = max(number_in(record, "step") or 0.0 for record in steps)
        earlier = [record for record in steps if (number_in(record, "step") or 0.0) <= step]
        if 0 < step <= furthest + every:
            ms = [number_in(record, "train_ms") or 0.0 for record in earlier]
            counted.append(max(ms, default=0.0) / 1000)
    if not counted:
        return [f"{what}, to which no start before in the log has come"]
    if min(counted) > clock + SLOW_SECONDS:
        return [f"{what}; by then {min(counted):.1f} s had been counted"]
    return []


def steps_of(records: list[dict]) -> list[dict]:
    """The records of single steps."""
    return [record for record in records if record["event"] == "train"]


def counted_seconds(start: list[dict]) -> float:
    """What a start added to the training clock, as far as its records tell.

    That clock goes on from a checkpoint's: what was on it already is told by the first step.
    """
    clocks = [number_in(record, "train_ms") or 0.0 for record in steps_of(start)]
    steps = [number_in(record, "step_avg_ms") or 0.0 for record in steps_of(start)]
    seconds = [ms / 1000 for ms in clocks]
    ended = [number_in(r, "train_clock_seconds") or 0.0 for r in start if r["event"] == "trained"]
    if not seconds:
        return 0.0
    before = max(0.0, seconds[0] - steps[0] / 1000) if is_resumed(start) else 0.0
    return max([*seconds, *ended]) - before


def changed_starts(logs: RunLogs) -> list[str]:
    """Machines or scripts of which a run had several, one after the other, in a sentence each.

    It may go on with other ones, but then what the last start says of either is not all of it.
    """
    starts = starts_of([*logs.earlier, logs.records])
    begun = [record for start in starts for record in start if record["event"] == "settings"]
    told = {"machines": [record.get("machine", {}).get("hardware") for record in begun]}
    told["scripts, by their SHA-256"] = [record.get("script_sha256") for record in begun]
    found = []
    for what, values in told.items():
        each = [str(value)[:60] for value in dict.fromkeys(filter(None, values))]
        if len(each) > 1:
            found.append(f"its starts had {len(each)} {what}: {', then '.join(each)}")
    return found


def history(logs: RunLogs) -> str:
    """How a run came to its end: in one start, or resumed, and from where."""
    if not logs.text.resumed:
        return "trained in one start"
    taken_up = ", ".join(f"step {step} at {clock} s" for step, clock in logs.text.resumed)
    return f"RESUMED from {taken_up}; the log holds {len(logs.earlier)} starts before"


def other_artifact(logs: RunLogs, artifact: Path) -> list[str]:
    """Whether the artifact is of the size and hash that the log gives it, where it does."""
    trained = logs.events.get("trained", {})
    found = []
    total, code = (number_in(trained, name) for name in ("bytes_total", "bytes_code"))
    size = artifact.stat().st_size
    if None not in (total, code) and total - code != size:
        found.append(f"the log's artifact has {total - code:,.0f} bytes, {artifact} {size:,}")
    logged = logged_hash(logs)
    if logged and logged != file_sha256(artifact):
        found.append(f"{artifact} is another file than the log's of SHA-256 {logged[:16]}...")
    return found


def other_header(logs: RunLogs, artifact: Path) -> list[str]:
    """Whether the artifact is of a model with other settings than the log's."""
    settings = logs.events.get("settings", {}).get("settings", {})
    return [
        f"{artifact} has {name.upper()}={value}, the log {settings[name]}"
        for name, value in read_header(artifact).items()
        if settings.get(name, value) != value
    ]


def read_header(artifact: Path) -> dict:
    """The settings of an artifact's model and its tokenizer's SHA-256.

    Raises UserError for a file that is none: a magic number, a line of JSON, weights, and the
    SHA-256 of all that.
    """
    try:
        data = artifact.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {artifact}: {error.strerror}") from None
    sealed = data[:-DIGEST_BYTES]
    need(data.startswith(MAGIC), f"{artifact} is not an artifact: wrong magic number")
    digest = hashlib.sha256(sealed).digest()
    problem = "is not a whole artifact: its checksum does not match"
    need(digest == data[-DIGEST_BYTES:], f"{artifact} {problem}")
    line = sealed[len(MAGIC) + 1 :].partition(b"\n")[0]
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{artifact} is not an artifact: its header cannot be read") from None


def logged_hash(logs: RunLogs) -> str:
    """The artifact's SHA-256 by the log; "" where it has none."""
    for event in ("trained", "final"):
        sha256 = logs.events.get(event, {}).get("artifact_sha256")
        if isinstance(sha256, str):
            return sha256
    return ""

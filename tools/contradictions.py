"""What a run's own logs say against each other: arithmetic that an edited figure breaks.

A run leaves two logs, RUN_ID.txt and RUN_ID.jsonl. Both are the contestant's claims, and who edits
all of their lines alike is not found out here. But a clock, the steps on it, the wall clock beside
every record, two prints of each figure and the artifact's own size and hash belong together, and
the contest's limits are no settings. tools/audit.py and tools/package.py both ask for this.
"""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

from tools.command import need
from tools.logs import TextLog, read_text_log, runs_in

# The contest's figures, whatever limits a run's settings gave it.
CAP_BYTES = 16_000_000  # of code and artifact
LIMIT_SECONDS = 600.0  # of training, and again of evaluation

# What honest clocks may differ by.
ROUNDING_SECONDS = 0.06  # figures are printed to a tenth of a second
SLOW_PART = 1.05  # of the clock may have passed on the wall between two steps ...
SLOW_SECONDS = 2.0  # ... and this much more: a checkpoint's copy, a machine that was busy
HURRIED_PART = 0.5  # of the time limit: who used less had no reason to give up an epoch


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
    found = [*disagreements(logs), *impossible_clocks(logs), *broken_limits(logs)]
    found += lost_parts(logs)
    if artifact is not None:
        found += other_artifact(logs, artifact)
    return found


def number_in(record: dict, name: str) -> float | None:
    """A finite number of a record; None where it has none."""
    value = record.get(name)
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else None


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
        value = number_in(final, name)
        pairs.append((name, printed, "nothing" if value is None else f"{value:.8f}"))
    if text.total_bytes is not None:
        pairs.append(("bytes_total", str(text.total_bytes), str(trained.get("bytes_total"))))
    told = {**started.get("machine", {}), **started.get("settings", {})}
    for name, printed in text.settings.items():
        if name in told:
            pairs.append((name.upper(), printed, str(told[name])))
    found = [
        f".txt has {name} {printed[:60]}, .jsonl {told[:60]}"
        for name, printed, told in pairs
        if printed != told and printed != repr(told)
    ]
    clock = number_in(trained, "train_clock_seconds")
    if None not in (clock, text.training_seconds):
        apart = abs(clock - text.training_seconds)
        if apart > ROUNDING_SECONDS:
            found.append(f".txt has a clock of {text.training_seconds} s, .jsonl of {clock:.3f} s")
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
    for record in logs.records:
        step, ms, each = (number_in(record, n) for n in ("step", "train_ms", "step_avg_ms"))
        if record["event"] != "train" or None in (step, ms, each):
            continue
        if not math.isclose(step * each, ms, rel_tol=1e-3, abs_tol=1.0):
            found.append(f"step {step:.0f}: {step:.0f} × {each:.2f} ms are not {ms:.0f} ms")
        last = step, ms
    every = number_in(logs.events.get("settings", {}).get("settings", {}), "train_log_every")
    if last and clock is not None and last[1] / 1000 > clock + ROUNDING_SECONDS:
        what = f"step {last[0]:.0f} ended at {last[1] / 1000:.1f} s of training"
        found.append(f"{what}, but the whole clock is {clock:.1f} s")
    if last and None not in (steps, every) and not 0 <= steps - last[0] < max(every, 5):
        found.append(f"the last step logged is {last[0]:.0f}, of {steps:.0f} that are claimed")
    return found


def impossible_walls(logs: RunLogs, clock: float | None) -> list[str]:
    """The wall clock beside every record bounds what was trained between two of them.

    Between two lines of steps, without a validation, all is on the training clock: as much has
    passed on the wall. From "ready" to "trained" no more can have been counted than has passed.
    """
    found = []
    seconds = [number_in(record, "seconds") for record in logs.records]
    known = [value for value in seconds if value is not None]
    if known != sorted(known):
        found.append("the records' wall clock runs backwards")
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
    """The contest's limits, and the run's own where these are lower."""
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
        return min(float(own) or LIMIT_SECONDS, LIMIT_SECONDS)
    except ValueError:
        return LIMIT_SECONDS


def lost_parts(logs: RunLogs) -> list[str]:
    """What a resumed run's earlier starts do not account for.

    A checkpoint's step and clock are its header's claim. A start that could have written it must
    stand in the same log, which holds for starts that were resumed themselves, too.
    """
    settings = logs.events.get("settings", {}).get("settings", {})
    every = max(5.0, number_in(settings, "train_log_every") or 0.0)
    found = []
    for index, part in enumerate(logs.earlier):
        first = next(iter(steps_of(part)), None)
        if first and any(record["event"] == "resumed" for record in part):
            step, clock = (number_in(first, name) or 0.0 for name in ("step", "train_ms"))
            found += unaccounted(step - 1, clock / 1000, logs.earlier[:index], every)
    if logs.text.resumed:
        found += unaccounted(*logs.text.resumed[-1], logs.earlier, every)
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


def history(logs: RunLogs) -> str:
    """How a run came to its end: in one start, or resumed, and from where."""
    if not logs.text.resumed:
        return "trained in one start"
    taken_up = ", ".join(f"step {step} at {clock} s" for step, clock in logs.text.resumed)
    return f"RESUMED from {taken_up}; the log holds {len(logs.earlier)} starts before"


def file_hash(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def other_artifact(logs: RunLogs, artifact: Path) -> list[str]:
    """Whether the artifact is of the size and hash that the log gives it, where it does."""
    trained = logs.events.get("trained", {})
    found = []
    total, code = (number_in(trained, name) for name in ("bytes_total", "bytes_code"))
    size = artifact.stat().st_size
    if None not in (total, code) and total - code != size:
        found.append(f"the log's artifact has {total - code:,.0f} bytes, {artifact} {size:,}")
    logged = logged_hash(logs)
    if logged and logged != file_hash(artifact):
        found.append(f"{artifact} is another file than the log's of SHA-256 {logged[:16]}...")
    return found


def logged_hash(logs: RunLogs) -> str:
    """The artifact's SHA-256 by the log; "" where it has none."""
    for event in ("artifact", "exported", "trained", "final"):
        record = logs.events.get(event, {})
        for name in ("artifact_sha256", "sha256"):
            if isinstance(record.get(name), str):
                return record[name]
    return ""

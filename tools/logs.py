"""Reads a run's logs: LOG_DIR/RUN_ID.txt for people, RUN_ID.jsonl for programs.

The text log begins with the script that ran, a line of 100 = ends it, and messages follow. The
other one holds a JSON object a line, a record, whose "event" says what happened. Both are appended
to: a file may hold several runs, and the last of them counts.
"""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from tools.command import UserError

SEPARATOR = "\n" + "=" * 100 + "\n"  # between the script and the messages of a text log


def read_records(path: Path) -> list[dict]:
    """Every record of every run in the file. Raises UserError if it is not a run's log."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise not_a_log(path) from None
    if not all(isinstance(record, dict) and "event" in record for record in records):
        raise not_a_log(path)
    return records


def last_run(path: Path) -> dict[str, dict]:
    """The last record of each event, of the last run in the file.

    A run begins with its settings. Raises UserError if the file is not a run's log.
    """
    events = {}
    for record in read_records(path):
        if record["event"] == "settings":
            events = {}
        events[record["event"]] = record
    return events


def finished_run(path: Path) -> dict[str, dict]:
    """As last_run(). Raises UserError if the run has not come to its final score."""
    events = last_run(path)
    for event in ("settings", "trained", "after_quantization", "final"):
        if event not in events:
            raise UserError(f"{path} is of a run that has not finished: no {event!r} yet")
    return events


def not_a_log(path: Path) -> UserError:
    """The mistake of giving another file."""
    return UserError(f"{path} is not a run's .jsonl log")


def split_text(path: Path, text: str) -> tuple[str, str]:
    """The script and the messages of the last run in a text log.

    Earlier runs may stand before the script.
    """
    script, separator, messages = text.rpartition(SEPARATOR)
    if not separator:
        raise UserError(f"{path} is not a run's text log: no line of 100 = ends the script in it")
    return script, messages


class Spread(NamedTuple):
    """Mean and sample standard deviation; None where there are too few values."""

    mean: float | None
    std: float | None


def spread(values: list[float]) -> Spread:
    """Of the same figure in several runs, which differ in their seeds."""
    mean = statistics.fmean(values) if values else None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean, std)
